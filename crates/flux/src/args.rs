//! The command line: subcommands, and one flag for each row of the settings table.

use std::{env, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, FromArgMatches, Parser, Subcommand};
use flux_server::config::{ConfigError, Configuration, Form, Inputs, SETTINGS};

use crate::{admin, bench, cli, consume, up};

const DEFAULT_FILE: &str = "flux.toml";

const SETTINGS_HELP: &str = "\
Settings come from, in rising priority: the defaults, a TOML file (--config, else FLUX_CONFIG, else
./flux.toml if there is one), FLUX_* variables (FLUX_DATA_ADDR for --data-addr), and flags. What is
unknown or not allowed stops the start. `flux config` shows what is in force and where it was set.";

/// Flux-KV: key-value data in memory, durable and in order on disk, over RESP, gRPC and HTTP
#[derive(Debug, Parser)]
#[command(name = "flux", version, subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a node, or a cluster of several, and an HTTP gateway in one process
    #[command(after_help = SETTINGS_HELP)]
    Up(UpArgs),
    /// Start a node
    #[command(after_help = SETTINGS_HELP)]
    Server(SettingArgs),
    /// Start an HTTP gateway to nodes that run elsewhere
    #[command(after_help = SETTINGS_HELP)]
    Gateway(SettingArgs),
    /// Write change events from RabbitMQ to a file, each once, or compare such a file with the store
    Consume(consume::Args),
    /// Send commands to a node: at a prompt, from arguments or from standard input
    Cli(cli::Args),
    /// Show a cluster and change it
    Admin(admin::Args),
    /// Put a node under load and measure it
    Bench(bench::Args),
    /// Print the settings that are in force, and where each was set
    #[command(after_help = SETTINGS_HELP)]
    Config(ConfigArgs),
    /// Print the version
    Version,
}

/// The arguments of `flux up`.
#[derive(Debug, clap::Args)]
pub struct UpArgs {
    /// How many nodes to start. More than one are a cluster: the ports of each are 100 above those of the
    /// one before, and its data is in data_dir/node-1, -2 and so on
    #[arg(long, value_name = "NODES", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(up::MAX_NODES)))]
    pub nodes: u16,

    /// The settings of the first node.
    #[command(flatten)]
    pub settings: SettingArgs,
}

/// The arguments of `flux config`.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// Print the documentation's table of settings instead
    #[arg(long)]
    pub markdown: bool,

    /// The settings to print.
    #[command(flatten)]
    pub settings: SettingArgs,
}

/// Everything that settings can come from on the command line.
#[derive(Debug, clap::Args)]
pub struct SettingArgs {
    /// Read settings from this TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    flags: SettingFlags,
}

impl SettingArgs {
    /// The settings from all sources.
    pub fn load(&self) -> Result<Configuration, ConfigError> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
        };
        Configuration::load(&Inputs {
            file: self.config.clone(),
            default_file: Some(PathBuf::from(DEFAULT_FILE)),
            environment: env::vars_os().map(text).collect(),
            flags: self.flags.0.clone(),
        })
    }
}

/// The flags that were given, by the setting's name. Values are looked at when all sources are.
#[derive(Clone, Debug, Default)]
struct SettingFlags(Vec<(String, String)>);

impl clap::Args for SettingFlags {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        for setting in SETTINGS {
            let default = if setting.default.is_empty() { "none" } else { setting.default };
            let help = format!("{} [default: {default}]", setting.meaning);
            let mut arg = Arg::new(setting.name)
                .long(setting.flag())
                .help(help.replace('`', ""))
                .help_heading("Settings")
                .value_name(setting.unit.replace(' ', "-").to_uppercase())
                .action(ArgAction::Set)
                .allow_hyphen_values(true);
            if setting.form == Form::Switch {
                arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
            }
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<SettingFlags, clap::Error> {
        let mut flags = SettingFlags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let given = SETTINGS.iter().filter_map(|setting| {
            let value = matches.get_one::<String>(setting.name)?;
            Some((setting.name.to_owned(), value.clone()))
        });
        self.0.extend(given);
        Ok(())
    }
}

/// Takes an address to connect to as it is, if it looks like one.
pub fn host_and_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err("must be a host and a port, like 127.0.0.1:7379".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn flags(words: &[&str]) -> Result<Vec<(String, String)>, String> {
        let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
        match args.command {
            Command::Up(up) => Ok(up.settings.flags.0),
            Command::Server(settings) | Command::Gateway(settings) => Ok(settings.flags.0),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_setting_is_a_flag_of_up_server_and_gateway() {
        for command in ["up", "server", "gateway"] {
            for setting in SETTINGS {
                let flag = format!("--{}", setting.flag());
                let words = ["flux", command, &format!("{flag}={}", setting.default)];
                let expected = (setting.name.to_owned(), setting.default.to_owned());
                assert_eq!(flags(&words).unwrap(), [expected]);
            }
        }
    }

    #[test]
    fn switches_need_no_value() {
        let insecure = |value: &str| vec![("insecure".to_owned(), value.to_owned())];
        assert_eq!(flags(&["flux", "up", "--insecure"]).unwrap(), insecure("true"));
        assert_eq!(flags(&["flux", "up", "--insecure=false"]).unwrap(), insecure("false"));
        assert_eq!(flags(&["flux", "up", "--workers", "-1"]).unwrap()[0].1, "-1");
    }

    #[test]
    fn an_unknown_flag_names_itself_and_the_like() {
        let error = flags(&["flux", "server", "--data-adr", "x"]).unwrap_err();
        assert!(error.contains("'--data-adr'") && error.contains("--data-addr"), "{error}");
    }

    #[test]
    fn up_starts_one_node_or_several() {
        let nodes = |words: &[&str]| match Args::try_parse_from(words).map(|args| args.command) {
            Ok(Command::Up(up)) => Ok(up.nodes),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(nodes(&["flux", "up"]), Ok(1));
        assert_eq!(nodes(&["flux", "up", "--nodes", "3", "--fsync=no"]), Ok(3));
        for wrong in ["0", "33", "x"] {
            let error = nodes(&["flux", "up", "--nodes", wrong]).expect_err("refused");
            assert!(error.contains("--nodes"), "{error}");
        }
    }

    #[test]
    fn what_admin_is_told_may_stand_anywhere() {
        for words in [
            &["flux", "admin", "--addr", "h:1", "--json", "nodes"][..],
            &["flux", "admin", "nodes", "--json", "--addr", "h:1"],
            &["flux", "admin", "move", "7", "node-1", "node-2", "--addr=h:1"],
        ] {
            let args = Args::try_parse_from(words).unwrap();
            assert!(matches!(args.command, Command::Admin(_)), "{words:?}");
        }
        let refused = Args::try_parse_from(["flux", "admin", "transfer", "x", "node-1"]);
        assert!(refused.unwrap_err().to_string().contains("'x'"));
    }

    #[test]
    fn consume_writes_or_verifies() {
        for words in [
            &["flux", "consume"][..],
            &["flux", "consume", "--output", "f", "--rotate-bytes", "1gb", "--keep", "0"],
            &["flux", "consume", "--bind", "set.#", "--bind", "gap.#"],
            &["flux", "consume", "--verify", "f.1", "f", "--addr", "h:1"],
        ] {
            let args = Args::try_parse_from(words).unwrap();
            assert!(matches!(args.command, Command::Consume(_)), "{words:?}");
        }
        for wrong in [
            &["--verify", "f", "--output", "g"][..],
            &["--rotate-bytes", "1gb"],
            &["--addr", "h:1"],
            &["--verify"],
            &["--prefetch", "0"],
            &["--output", "f", "--rotate-bytes", "1tb"],
        ] {
            let words = [&["flux", "consume"], wrong].concat();
            Args::try_parse_from(words).expect_err(&format!("{wrong:?}"));
        }
    }

    #[test]
    fn commands_of_the_command_line_may_have_hyphens() {
        let args =
            Args::try_parse_from(["flux", "cli", "--addr", "h:1", "getrange", "k", "0", "-1"]);
        assert!(matches!(args.unwrap().command, Command::Cli(_)));
        let args = Args::try_parse_from(["flux", "cli", "set", "k", "--addr"]);
        assert!(matches!(args.unwrap().command, Command::Cli(_)));
    }
}
