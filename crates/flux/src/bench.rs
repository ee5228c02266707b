//! `flux bench`: a load generator for a node, or for any server that speaks RESP.
//!
//! It measures; it does not judge, and it starts no server. One thread is enough to load a server
//! on one core when requests are pipelined; it reports its own CPU time so that one can see whether
//! it was the bottleneck.

mod grpc;
mod lane;
mod measure;
mod pace;
mod phase;
mod random;
mod report;
mod slots;
mod wire;
mod workload;

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use lane::Shared;
use phase::{Outcome, Phase, Protocol};
use random::Distribution;
use report::{Figures, Report, Settings};
use workload::{Mix, Operation, Shape};

const AFTER_HELP: &str = "\
A closed loop (the default) sends the next batch of --pipeline requests on a connection when the last
one is answered: it finds the highest throughput. An open loop (--rate) sends on a fixed schedule, up
to --pipeline requests in flight on each connection, and counts each latency from when the request was
due: a stall of the server shows in every request that it delayed. For an overload, give --pipeline
room.

Keys are `key:` and a number with leading zeros; incr uses `ctr:`. The same --seed sends the same
requests. Latencies are of requests that succeeded; errors are counted by their code. Figures leave
out --warmup. Ctrl-C stops early and reports what was measured. Exit code 1 when nothing succeeded.

Examples:
  flux bench --load --requests 0                     fill 1000000 keys
  flux bench --mix get --pipeline 64                 reads, as fast as they go
  flux bench --rate 20000 --duration 30 --json -     a fixed rate, for a program to read
  flux bench --protocol grpc --clients 8 --pipeline 16";

/// The arguments of `flux bench`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// What to speak
    #[arg(long, value_enum, default_value_t = Protocol::Resp)]
    protocol: Protocol,

    /// The server, or with commas several that take the connections in turn [default:
    /// 127.0.0.1:7379, with grpc 127.0.0.1:50052]
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        value_parser = crate::args::host_and_port
    )]
    addr: Vec<String>,

    /// Send each key to the node that leads it, as clients of Redis Cluster do; a client has a
    /// connection to each
    #[arg(long)]
    cluster: bool,

    /// Clients, each with a connection
    #[arg(
        long,
        value_name = "N",
        default_value_t = 50,
        value_parser = clap::value_parser!(u64).range(1..=100_000)
    )]
    clients: u64,

    /// Requests in flight of each client
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..=100_000)
    )]
    pipeline: u64,

    /// Threads that share the connections
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..=256)
    )]
    threads: u64,

    /// Measure so many requests; 0 with --load only fills
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    requests: Option<u64>,

    /// Measure for so many seconds [default: 10, without --requests]
    #[arg(long, value_name = "S", value_parser = seconds)]
    duration: Option<Duration>,

    /// Run for so many seconds before measuring
    #[arg(long, value_name = "S", value_parser = seconds, default_value = "0")]
    warmup: Duration,

    /// Send so many requests a second, whether replies come or not (open loop)
    #[arg(long, value_name = "R", value_parser = positive)]
    rate: Option<f64>,

    /// Operations and their weights: set, get, incr, del
    #[arg(long, value_name = "MIX", default_value = "set=50,get=50")]
    mix: Mix,

    /// How many keys there are
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    keys: u64,

    /// How keys are chosen: uniform, or zipf:EXPONENT (zipf alone: 0.99)
    #[arg(long, value_name = "DIST", default_value = "uniform")]
    dist: Distribution,

    /// Bytes of a key
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 16,
        value_parser = clap::value_parser!(u32).range(5..=65_536)
    )]
    key_size: u32,

    /// Bytes of a value
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(0..=16 << 20)
    )]
    value_size: u32,

    /// Let written keys expire after so many milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=1 << 53))]
    ttl_ms: Option<u64>,

    /// Write every key once before, in order
    #[arg(long)]
    load: bool,

    /// Where all randomness comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Write the results as JSON to a file, or with - to standard output instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("must be a number of seconds from 0 to 1000000".into()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1e9 => Ok(rate),
        _ => Err("must be a number over 0 and up to 1000000000".into()),
    }
}

/// How deep the pipelines are that fill the keys.
const LOAD_PIPELINE: u64 = 64;

const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// Runs a benchmark.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (load, main) = phases(args)?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        settings: Settings::of(&main),
        load: None,
        run: None,
    };
    if let Some(load) = load {
        report.load = Some(watch(&load, "filling")?);
    }
    if args.requests != Some(0) {
        report.run = Some(watch(&main, "running")?);
    }
    let to_stdout = args.json.as_deref() == Some(Path::new("-"));
    if let Some(path) = &args.json {
        let mut json = serde_json::to_string_pretty(&report)?;
        json.push('\n');
        if to_stdout {
            io::stdout().write_all(json.as_bytes())?;
        } else {
            fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if !to_stdout {
        io::stdout().write_all(report.to_text().as_bytes())?;
    }
    let failed = [&report.load, &report.run].into_iter().flatten().any(Figures::is_failure);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The phase that fills the keys, if one is asked for, and the one that is measured.
fn phases(args: &Args) -> anyhow::Result<(Option<Phase>, Phase)> {
    let least = Shape::least_key_size(args.keys);
    if (args.key_size as usize) < least {
        bail!("--key-size {} is too short for {} keys: at least {least}", args.key_size, args.keys);
    }
    if args.threads > args.clients {
        bail!("--threads {} is more than --clients {}", args.threads, args.clients);
    }
    if args.cluster && args.protocol != Protocol::Resp {
        bail!("--cluster asks for the leaders by RESP: use --protocol resp");
    }
    if args.requests == Some(0) && !args.load {
        bail!("--requests 0 makes sense with --load only");
    }
    let default_addr = match args.protocol {
        Protocol::Resp | Protocol::Native => "127.0.0.1:7379",
        Protocol::Grpc => "127.0.0.1:50052",
    };
    let timed = args.requests.is_none();
    let main = Phase {
        protocol: args.protocol,
        addresses: if args.addr.is_empty() {
            vec![default_addr.to_owned()]
        } else {
            args.addr.clone()
        },
        cluster: args.cluster,
        clients: args.clients,
        pipeline: args.pipeline,
        threads: args.threads,
        shape: Shape {
            mix: args.mix,
            distribution: Some(args.dist),
            keys: args.keys,
            key_size: args.key_size as usize,
            value_size: args.value_size as usize,
            ttl_ms: args.ttl_ms,
            seed: args.seed,
        },
        rate: args.rate,
        requests: args.requests,
        duration: timed.then(|| args.duration.unwrap_or(DEFAULT_DURATION)),
        warmup: args.warmup,
    };
    let load = args.load.then(|| Phase {
        pipeline: LOAD_PIPELINE,
        shape: Shape { mix: Mix::only(Operation::Set), distribution: None, ..main.shape.clone() },
        rate: None,
        requests: Some(args.keys),
        duration: None,
        warmup: Duration::ZERO,
        ..main.clone()
    });
    Ok((load, main))
}

/// Runs a phase with a progress bar, and ends it early on Ctrl-C.
fn watch(phase: &Phase, what: &'static str) -> anyhow::Result<Figures> {
    let shared = Shared::default();
    let (outcome, cpu) = std::thread::scope(|scope| {
        let (done, ended) = tokio::sync::oneshot::channel();
        let running = scope.spawn({
            let shared = shared.clone();
            move || {
                // The watcher is told by the channel's end, also if this panics.
                let _done = done;
                phase.run(&shared)
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cpu_at_start = runtime.block_on(supervise(phase, what, &shared, ended));
        let outcome: Outcome =
            running.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the benchmark panicked")))?;
        anyhow::Ok((outcome, cpu_time().saturating_sub(cpu_at_start)))
    })?;
    Ok(Figures::of(&outcome, cpu))
}

/// Shows the progress until the phase has ended. Gives the CPU time at the end of the warm-up.
async fn supervise(
    phase: &Phase,
    what: &'static str,
    shared: &Shared,
    mut ended: tokio::sync::oneshot::Receiver<()>,
) -> Duration {
    let bar = progress_bar(phase, what);
    let start = Instant::now();
    let warm = tokio::time::sleep(phase.warmup);
    tokio::pin!(warm);
    let mut cpu_at_start = cpu_time();
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let mut interrupts = 0;
    loop {
        tokio::select! {
            _ = &mut ended => break,
            () = &mut warm, if !warm.is_elapsed() => cpu_at_start = cpu_time(),
            _ = tick.tick() => show(&bar, phase, shared, start),
            Ok(()) = tokio::signal::ctrl_c() => {
                interrupts += 1;
                if interrupts > 1 {
                    std::process::exit(130);
                }
                shared.stop.store(true, Ordering::Relaxed);
            }
        }
    }
    bar.finish_and_clear();
    cpu_at_start
}

fn progress_bar(phase: &Phase, what: &'static str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "{prefix} [{bar:40}] {percent:>3}%  {msg}";
    let length = phase.requests.unwrap_or_else(|| whole_time(phase).as_millis() as u64);
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    ProgressBar::new(length.max(1)).with_style(style.progress_chars("=> ")).with_prefix(what)
}

fn whole_time(phase: &Phase) -> Duration {
    phase.warmup + phase.duration.unwrap_or_default()
}

fn show(bar: &ProgressBar, phase: &Phase, shared: &Shared, start: Instant) {
    let answered = shared.answered.load(Ordering::Relaxed);
    let elapsed = start.elapsed();
    let position = match phase.requests {
        Some(_) => answered,
        None => elapsed.as_millis() as u64,
    };
    let rate = answered as f64 / elapsed.as_secs_f64().max(1e-3);
    bar.set_position(position);
    bar.set_message(format!("{answered} replies, {rate:.0}/s"));
}

/// What this process has used of its cores.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

#[cfg(test)]
mod tests;
