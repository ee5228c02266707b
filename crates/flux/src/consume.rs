//! `flux consume`: writes the change events at the broker to a file, each once, or compares such a file
//! with the store.
//!
//! Here the command line is read and the report is told; the consumer itself is `flux_cdc`'s.

mod replay;
mod verify;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use flux_cdc::consumer::{
    ConsumerConfig, Report, consume,
    output::{Found, LineFile, Output, Rotation},
};
use flux_cdc::{Ledger, Position};
use flux_server::config::{LogFormat, Settings};
use tokio::sync::watch;

use crate::{stop::Stop, telemetry};

const AFTER_HELP: &str = "\
Events come at least once from the broker; in FILE each is exactly once. FILE says by itself what
the consumer has: after a crash, start it again with the same FILE. An event is acknowledged only
when its line is on the disk. FILE.cursor, beside it, saves reading all of FILE at a start; FILE.lock
keeps a second consumer away. A full FILE becomes FILE.1, FILE.1 becomes FILE.2, and so on.

What is missing is reported by partition and revision, 5 seconds after something came ahead of it
and again at the end. While the broker is away or refuses, the log says why, and the consumer goes
on by itself. SIGINT or SIGTERM stops it in order: what has come is written and acknowledged. A
second signal ends it at once, and nothing is lost by that either.

--verify replays FILE and compares keys, values, versions and expiry times with the store. Nobody
should write meanwhile, and the consumer must have caught up. It takes as much memory as the values
of all keys in FILE. Exit code of --verify: 0 equal; 1 it differs, a line for each difference; 2
FILE has holes or repeats, or does not begin with the first event of each partition; 3 it could not
be compared.

Examples:
  flux consume --output /var/lib/flux/changes.jsonl
  flux consume | jq .key
  flux consume --queue ends --bind 'delete.#' --bind 'expire.#' --output ends.jsonl
  flux consume --verify /var/lib/flux/changes.jsonl --addr 127.0.0.1:7379";

/// The exit code of a comparison that could not be made.
const NOT_COMPARED: u8 = 3;

/// The arguments of `flux consume`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The broker, as amqp://user:password@host:port/virtual-host. The variable keeps the password out of
    /// lists of processes
    #[arg(
        long,
        value_name = "URL",
        env = "FLUX_RABBITMQ_URL",
        hide_env_values = true,
        default_value = "amqp://guest:guest@127.0.0.1:5672"
    )]
    url: String,

    /// The exchange that the nodes publish to
    #[arg(long, value_name = "NAME", default_value = "flux_kv_events")]
    exchange: String,

    /// The consumer's queue; it is made if it is not there. Each purpose needs one of its own
    #[arg(long, value_name = "NAME", default_value = "flux-cdc")]
    queue: String,

    /// Which events, by routing key: * stands for a word, # for any number of words. May be given several
    /// times. With less than # nobody can tell what is missing from what does not match, and where nodes
    /// publish batches (cdc_batch_max_events) these have none of such keys
    #[arg(long, value_name = "KEY", default_value = "#")]
    bind: Vec<String>,

    /// Events that may be under way, unacknowledged; all of them are in memory
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1000,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    prefetch: u16,

    /// Write to this file. Without it events go to standard output, and those that were not acknowledged
    /// come again after a restart
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Begin a new file when it has so many bytes: a number, with kb, mb or gb. 0: never
    #[arg(long, value_name = "SIZE", requires = "output", default_value = "256mb", value_parser = size)]
    rotate_bytes: u64,

    /// How many older files to keep; the oldest is removed. 0: keep all
    #[arg(long, value_name = "N", requires = "output", default_value_t = 10)]
    keep: u32,

    /// The form of the log on standard error: text or json
    #[arg(long, value_name = "FORM", default_value = "text", value_parser = log_format)]
    log_format: LogFormat,

    /// Compare files with the store instead of consuming. One FILE is read after those that it was
    /// rotated into; several are read as they are given, oldest first
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["output", "queue", "bind"])]
    verify: Vec<PathBuf>,

    /// The data port of a node to compare with
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "verify",
        default_value = "127.0.0.1:7379",
        value_parser = crate::args::host_and_port
    )]
    addr: String,
}

/// Consumes, or verifies.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let settings = Settings { log_format: args.log_format, ..Settings::default() };
    telemetry::start(&settings);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if args.verify.is_empty() {
        return runtime.block_on(write_events(args));
    }
    let verified = runtime.block_on(verify::run(&args.verify, &args.addr));
    verified.or_else(|error| {
        writeln!(io::stderr(), "flux: {error:#}")?;
        Ok(ExitCode::from(NOT_COMPARED))
    })
}

async fn write_events(args: &Args) -> anyhow::Result<ExitCode> {
    let address: flux_cdc::Url = args.url.parse().context("--url or FLUX_RABBITMQ_URL")?;
    let mut stop = Stop::listen()?;
    let config = ConsumerConfig {
        address,
        exchange: args.exchange.clone(),
        queue: args.queue.clone(),
        bind: args.bind.clone(),
        prefetch: args.prefetch,
    };
    let (output, ledger) = open(args, config.is_filtered())?;
    let (stopping, is_stopping) = watch::channel(false);
    let signals = tokio::spawn(async move {
        let (signal, _) = stop.requested().await;
        tracing::info!(signal, "stopping; a second signal ends at once");
        let _ = stopping.send(true);
        stop.end_at_next().await;
    });
    let (report, ended) = consume(&config, output, ledger, is_stopping).await;
    signals.abort();
    io::stderr().write_all(told(&report).as_bytes())?;
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// The output, and what it has.
fn open(args: &Args, is_filtered: bool) -> anyhow::Result<(Output, Ledger)> {
    let Some(path) = &args.output else {
        tracing::warn!(
            "events go to standard output: those that were written but not acknowledged come again \
             after a restart"
        );
        return Ok((Output::Stdout, Ledger::new()));
    };
    let rotation = Rotation { bytes: args.rotate_bytes, keep: args.keep };
    let (file, ledger, found) = LineFile::open(path, rotation)?;
    let Found { records, torn_bytes, holes, repeats } = found;
    let partitions = ledger.partitions().count();
    let revisions: u64 = ledger.partitions().filter_map(|(_, progress)| progress.before()).sum();
    tracing::info!(file = %path.display(), partitions, revisions, read_again = records, "opened");
    if torn_bytes > 0 {
        tracing::info!(torn_bytes, "an unfinished line at the end was cut off; it comes again");
    }
    if repeats > 0 || holes > 0 && !is_filtered {
        tracing::warn!(holes, repeats, "the file is not whole: flux consume --verify says where");
    }
    for (partition, progress) in ledger.partitions() {
        if let Position::InGap { gap, rows, .. } = progress.position {
            tracing::info!(partition, %gap, rows, "goes on within a gap");
        }
    }
    Ok((Output::File(Box::new(file)), ledger))
}

/// What was done, in words.
fn told(report: &Report) -> String {
    let Report { counts, holes, listed_holes, unreadable } = report;
    let mut text = format!(
        "{} written, {} dropped, {}",
        counted(counts.lines, "event"),
        counted(counts.repeats, "repeat"),
        counted(*holes, "hole")
    );
    if counts.gaps > 0 {
        let revisions = counted(counts.lost, "revision");
        text += &format!(", {} of {revisions}", counted(counts.gaps, "gap"));
    }
    if *unreadable > 0 {
        text += &format!(", {} rejected", counted(*unreadable, "message"));
    }
    text.push('\n');
    for hole in listed_holes {
        text += &format!("hole: {hole}\n");
    }
    if *holes > listed_holes.len() as u64 {
        text += &format!("and {} more\n", *holes - listed_holes.len() as u64);
    }
    text
}

fn counted(count: u64, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

/// A number of bytes, perhaps with a unit.
fn size(text: &str) -> Result<u64, String> {
    let text = text.to_ascii_lowercase();
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text.as_str(), ""),
    };
    let shift = match unit {
        "" | "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        _ => 64,
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| {
        let factor = 1_u64.checked_shl(shift)?;
        number.checked_mul(factor)
    });
    bytes.ok_or_else(|| "must be a number of bytes, like 1000, 64kb, 256mb or 2gb".to_owned())
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be text or json".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use flux_cdc::Hole;
    use flux_cdc::consumer::intake::Counts;

    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("1000"), Ok(1000));
        assert_eq!(size("64KB"), Ok(64 << 10));
        assert_eq!(size("256mb"), Ok(256 << 20));
        assert_eq!(size("2gb"), Ok(2 << 30));
        for wrong in ["", "mb", "-1", "1.5gb", "1tb", "99999999999999gb", "1 mb"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_done_is_told() {
        let counts = Counts { lines: 1, repeats: 5, gaps: 0, lost: 0 };
        let mut report = Report { counts, ..Report::default() };
        assert_eq!(told(&report), "1 event written, 5 repeats dropped, 0 holes\n");
        report.counts = Counts { gaps: 1, lost: 30, ..counts };
        report.holes = 2;
        report.listed_holes = vec![Hole::Revisions { partition: 7, missing: 41..=43 }];
        report.unreadable = 1;
        assert_eq!(
            told(&report),
            "1 event written, 5 repeats dropped, 2 holes, 1 gap of 30 revisions, 1 message rejected\n\
             hole: partition 7, 41 to 43\nand 1 more\n"
        );
    }
}
