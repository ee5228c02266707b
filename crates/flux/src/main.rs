//! The `flux` command: a node, its gateway, a consumer of its change events, a command line,
//! administration and a benchmark in one binary.
//!
//! Reads the command line and hands over; what a node or a gateway does stands in their own crates.

mod admin;
mod args;
mod bench;
mod cli;
mod consume;
mod limits;
mod run;
mod stop;
mod telemetry;
mod up;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use flux_server::config::{Role, markdown_table};

use args::{Args, Command, ConfigArgs};

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Up(args) => serve(Role::Up, &args.settings, args.nodes),
        Command::Server(settings) => serve(Role::Server, &settings, 1),
        Command::Gateway(settings) => serve(Role::Gateway, &settings, 0),
        Command::Consume(args) => consume::run(&args),
        Command::Cli(args) => cli::run(args),
        Command::Admin(args) => admin::run(&args),
        Command::Bench(args) => bench(&args),
        Command::Config(args) => print_config(&args),
        Command::Version => print_version(),
    };
    outcome.unwrap_or_else(|error| {
        // Nothing is left to tell it to when standard error is gone.
        let _ = writeln!(io::stderr(), "flux: {error:#}");
        ExitCode::FAILURE
    })
}

/// Configuration, telemetry, build, run, drain.
fn serve(role: Role, settings: &args::SettingArgs, nodes: u16) -> anyhow::Result<ExitCode> {
    let configuration = settings.load()?;
    configuration.validate(role)?;
    telemetry::start(&configuration.settings);
    limits::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(run::run(role, &configuration.settings, nodes));
    // A recovery that was broken off still blocks a thread: the process does not wait for it.
    runtime.shutdown_background();
    outcome
}

fn bench(args: &bench::Args) -> anyhow::Result<ExitCode> {
    limits::raise_open_files();
    bench::run(args)
}

fn print_config(args: &ConfigArgs) -> anyhow::Result<ExitCode> {
    let text = if args.markdown {
        markdown_table()
    } else {
        let configuration = args.settings.load()?;
        configuration.validate(Role::Up)?;
        configuration.to_toml()
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn print_version() -> anyhow::Result<ExitCode> {
    let (version, system, machine) =
        (env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    writeln!(io::stdout(), "flux {version} ({machine} {system})")?;
    Ok(ExitCode::SUCCESS)
}
