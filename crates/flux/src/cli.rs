//! `flux cli`: a command line for a node's data port, or for any server that speaks RESP.
//!
//! Three ways to use it: with a command as arguments, with commands on standard input, or at a
//! prompt. It shows replies as redis-cli does. It knows nothing of what a command means.

mod commands;
mod connection;
mod repl;
mod show;
mod words;

use std::{
    io::{self, BufRead, IsTerminal, Write},
    os::unix::ffi::OsStringExt,
    process::ExitCode,
};

use flux_proto::resp::Reply;

use connection::{Connection, ConnectionError};
use show::{Style, show};

const AFTER_HELP: &str = "\
Without a command: a prompt on a terminal (Tab completes, `help` explains), else one command a line from
standard input. Arguments are quoted as in redis-cli: \"a\\x00b\\n\" or 'literally'.
Exit code: 0; 1 when a reply was an error; 2 when there was no reply.

Examples:
  flux cli                         a prompt
  flux cli set greeting hello
  flux cli get greeting
  echo 'incr visits' | flux cli";

/// The arguments of `flux cli`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The data port to connect to
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7379", value_parser = crate::args::host_and_port)]
    addr: String,

    /// Speak RESP3
    #[arg(long, short = '3')]
    resp3: bool,

    /// Show replies raw, also on a terminal
    #[arg(long, conflicts_with = "no_raw")]
    raw: bool,

    /// Show replies with their types, also to a pipe
    #[arg(long)]
    no_raw: bool,

    /// A command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

const ERROR_REPLY: u8 = 1;
const NO_REPLY: u8 = 2;

/// Runs the command line.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let raw = args.raw || !args.no_raw && !io::stdout().is_terminal();
    let style = if raw { Style::Raw } else { Style::Pretty };
    let mut connection = Connection::new(args.addr, args.resp3);
    if !args.command.is_empty() {
        let words: Vec<Vec<u8>> = args.command.into_iter().map(OsStringExt::into_vec).collect();
        let outcome = once(&words, &mut connection, style, &mut io::stdout());
        return Ok(ExitCode::from(outcome?));
    }
    if io::stdin().is_terminal() {
        repl::run(connection, style)?;
        return Ok(ExitCode::SUCCESS);
    }
    let outcome = script(io::stdin().lock(), &mut connection, style, &mut io::stdout().lock());
    Ok(ExitCode::from(outcome?))
}

/// Carries out one command; the exit code.
fn once(
    words: &[Vec<u8>],
    connection: &mut Connection,
    style: Style,
    out: &mut impl Write,
) -> io::Result<u8> {
    match connection.request(words) {
        Ok(reply) => {
            out.write_all(&show(&reply, style))?;
            Ok(if matches!(reply, Reply::Error(_)) { ERROR_REPLY } else { 0 })
        }
        Err(error) => {
            complain(&error)?;
            Ok(NO_REPLY)
        }
    }
}

/// Carries out a command a line; the exit code. A lost connection ends it: what was to come may
/// build on what was lost.
fn script(
    input: impl BufRead,
    connection: &mut Connection,
    style: Style,
    out: &mut impl Write,
) -> io::Result<u8> {
    let mut worst = 0;
    for line in input.lines() {
        let line = line?;
        match words::split(&line) {
            Ok(words) if words.is_empty() => {}
            Ok(words) => match once(&words, connection, style, out)? {
                NO_REPLY => return Ok(NO_REPLY),
                code => worst = worst.max(code),
            },
            Err(error) => {
                writeln!(io::stderr(), "invalid arguments in {line:?}: {error}")?;
                worst = ERROR_REPLY;
            }
        }
    }
    out.flush()?;
    Ok(worst)
}

fn complain(error: &ConnectionError) -> io::Result<()> {
    writeln!(io::stderr(), "{error}")
}

#[cfg(test)]
mod tests;
