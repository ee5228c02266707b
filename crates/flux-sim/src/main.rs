//! The simulator's command line: replays one seed, or sweeps many.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use flux_sim::plan::Profile;
use flux_sim::plant::Plant;
use flux_sim::sweep::{Failure, Settings, Summary, run_seed, sweep};

/// Simulates whole Flux-KV clusters in virtual time, with faults from a seed, and checks what clients saw.
#[derive(Debug, Parser)]
#[command(name = "flux-sim", version)]
struct Arguments {
    /// Runs this one seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Runs the seeds from A up to and without B.
    #[arg(long, value_name = "A..B", default_value = "0..100", value_parser = parse_range)]
    seeds: Range<u64>,
    /// The kind of weather: mixed, or with a planted bug the one that shows it soonest, unless given.
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// Plants a bug, which is to be found.
    #[arg(long, value_enum)]
    plant: Option<Plant>,
    /// Writes what happens, line by line (with --seed).
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Threads; one for each processor unless given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Ends a sweep after so many failures.
    #[arg(long, value_name = "N", default_value_t = 20)]
    failures: usize,
}

impl Arguments {
    fn settings(&self) -> Settings {
        let fitting = self.plant.map(Plant::profile);
        Settings { profile: self.profile.or(fitting).unwrap_or_default(), plant: self.plant }
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let good = match arguments.seed {
        Some(seed) => replay(seed, &arguments)?,
        None => sweep_all(&arguments)?,
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn parse_range(text: &str) -> Result<Range<u64>> {
    let (from, to) =
        text.split_once("..").context("two seeds with .. between them, as in 0..500")?;
    let range = from.parse()?..to.parse()?;
    ensure!(!range.is_empty(), "no seed is in {text}");
    Ok(range)
}

fn replay(seed: u64, arguments: &Arguments) -> Result<bool> {
    let settings = arguments.settings();
    let out: Option<Box<dyn Write>> = arguments.trace.then(|| Box::new(stdout()) as Box<dyn Write>);
    let started = Instant::now();
    let (plan, outcome) = run_seed(seed, settings, out);
    let mut out = stdout().lock();
    writeln!(
        out,
        "seed {seed} ({}): {} hosts, {} partitions of {} replicas, {:.1} virtual seconds in {:.2} s",
        plan.profile.name(),
        plan.hosts,
        plan.partitions,
        plan.replication,
        outcome.virtual_us as f64 / 1e6,
        started.elapsed().as_secs_f64()
    )?;
    writeln!(
        out,
        "{} operations, {} messages ({} lost), {} terms, {} naps, {} snapshots installed, {} nodes replaced",
        outcome.operations,
        outcome.messages,
        outcome.lost,
        outcome.terms,
        outcome.naps,
        outcome.snapshots,
        outcome.replaced
    )?;
    let faults: Vec<String> =
        outcome.faults.iter().map(|(fault, count)| format!("{fault:?} {count}")).collect();
    writeln!(out, "faults: {}", if faults.is_empty() { "none".into() } else { faults.join(", ") })?;
    writeln!(out, "{} events, trace hash {:016x}", outcome.events, outcome.hash)?;
    for violation in &outcome.violations {
        writeln!(out, "VIOLATION {violation}")?;
    }
    if outcome.violations.is_empty() {
        writeln!(out, "good")?;
    }
    Ok(outcome.violations.is_empty())
}

fn sweep_all(arguments: &Arguments) -> Result<bool> {
    let settings = arguments.settings();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.threads.unwrap_or(processors);
    let seeds = arguments.seeds.clone();
    let count = seeds.end - seeds.start;
    let (started, terminal) = (Instant::now(), stderr().is_terminal());
    let step = if terminal { 5 } else { (count / 10).max(1) };
    let progress = |runs: u64, failures: usize, failure: Option<&Failure>| {
        if let Some(Failure { seed, violations, .. }) = failure {
            let what = violations.first().map(|one| one.promise.to_string()).unwrap_or_default();
            let start = if terminal { "\r" } else { "" };
            let _ = writeln!(stderr(), "{start}FAILED seed {seed}: {what}          ");
        }
        if runs.is_multiple_of(step) || runs == count {
            let (start, end) = if terminal { ("\r", "") } else { ("", "\n") };
            let seconds = started.elapsed().as_secs();
            // Who does not look at it misses nothing.
            let _ = write!(
                stderr(),
                "{start}{runs} of {count} runs, {failures} failed, {seconds} s{end}"
            );
        }
    };
    let summary = sweep(seeds.clone(), settings, threads, arguments.failures, &progress);
    if terminal {
        let _ = writeln!(stderr());
    }
    report(&summary, &seeds, arguments, started.elapsed().as_secs_f64())?;
    Ok(summary.failures.is_empty())
}

fn report(
    summary: &Summary,
    seeds: &Range<u64>,
    arguments: &Arguments,
    seconds: f64,
) -> Result<()> {
    let mut out = stdout().lock();
    let totals = &summary.totals;
    writeln!(
        out,
        "seeds {}..{}: {} runs, {} failed; {:.2} virtual hours in {seconds:.0} s",
        seeds.start,
        seeds.end,
        summary.runs,
        summary.failures.len(),
        totals.virtual_us as f64 / 3.6e9
    )?;
    let list = |items: Vec<String>| if items.is_empty() { "none".into() } else { items.join(", ") };
    let profiles = summary.profiles.iter().map(|(name, count)| format!("{name} {count}")).collect();
    writeln!(out, "weather: {}", list(profiles))?;
    let faults =
        summary.faults().iter().map(|(fault, count)| format!("{fault:?} {count}")).collect();
    writeln!(out, "faults: {}", list(faults))?;
    writeln!(
        out,
        "{} operations, {} messages ({} lost), {} terms, {} naps, {} snapshots installed, {} nodes replaced, \
         {} events\n{} changes at the broker and {} repeats, {} read from other nodes, {} gaps with {} rows",
        totals.operations,
        totals.messages,
        totals.lost,
        totals.terms,
        totals.naps,
        totals.snapshots,
        totals.replaced,
        totals.events,
        totals.feed.changes - totals.feed.repeats,
        totals.feed.repeats,
        totals.elsewhere,
        totals.feed.gaps,
        totals.feed.rows
    )?;
    let mut flags = String::new();
    if let Some(profile) = arguments.profile {
        flags += &format!(" --profile {}", profile.name());
    }
    if let Some(plant) = arguments.plant.and_then(|plant| plant.to_possible_value()) {
        flags += &format!(" --plant {}", plant.get_name());
    }
    for failure in &summary.failures {
        writeln!(out, "\nFAILED seed {} ({})", failure.seed, failure.profile.name())?;
        for violation in &failure.violations {
            writeln!(out, "  {violation}")?;
        }
        writeln!(out, "  replay: cargo run -p flux-sim -- --seed {}{flags} --trace", failure.seed)?;
    }
    Ok(())
}
