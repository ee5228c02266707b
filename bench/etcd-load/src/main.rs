//! Puts etcd under load and measures it: the peer's side of `bench/cluster.py`.
//!
//! A closed loop: each client has --in-flight calls under way and sends the next one when one is
//! answered; clients share the connections, as gRPC is made for. It measures; it starts no server and
//! judges nothing. Any call that fails ends the run: a benchmark with errors says nothing.

use std::{
    collections::VecDeque,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use etcd_client::{Client, KvClient};
use futures_util::{StreamExt, stream::FuturesUnordered};
use hdrhistogram::Histogram;
use serde_json::json;
use tokio::time::Instant;

/// Puts etcd under load; prints JSON, with latencies in microseconds
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The members
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', required = true)]
    endpoints: Vec<String>,

    /// Which of them to talk to
    #[arg(long, value_enum, default_value_t = Target::All)]
    target: Target,

    /// What to send; fill puts each key once
    #[arg(long, value_enum)]
    operation: Operation,

    /// Connections, which take turns among the members
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,

    /// Clients, which take turns among the connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,

    /// Calls under way of each client
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,

    /// How many keys there are, 16 bytes each
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,

    /// Bytes of a value
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    value_size: usize,

    /// Run for so many seconds before measuring; not for fill
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    warmup: f64,

    /// Measure for so many seconds; not for fill
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    duration: f64,

    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    All,
    Leader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Operation {
    Put,
    /// A linearizable range of one key
    Get,
    Fill,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = match args.threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        threads => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()?,
    };
    let report = runtime.block_on(run(args))?;
    println!("{report}");
    Ok(())
}

async fn run(args: Args) -> anyhow::Result<serde_json::Value> {
    let endpoints = match args.target {
        Target::All => args.endpoints.clone(),
        Target::Leader => vec![leader(&args.endpoints).await?],
    };
    let mut connections = Vec::new();
    for number in 0..args.connections as usize {
        let endpoint = &endpoints[number % endpoints.len()];
        let client = connect(endpoint).await?;
        connections.push(client.kv_client());
    }
    let start = Instant::now();
    let measure_from = match args.operation {
        Operation::Fill => start,
        _ => start + Duration::from_secs_f64(args.warmup),
    };
    let plan = Arc::new(Plan {
        measure_from,
        stop_at: measure_from + Duration::from_secs_f64(args.duration),
        filled: AtomicU64::new(0),
        value: "v".repeat(args.value_size),
        args,
    });
    let mut running: VecDeque<_> = (0..plan.args.clients as usize)
        .map(|number| {
            let connection = connections[number % connections.len()].clone();
            tokio::spawn(client(connection, plan.clone()))
        })
        .collect();
    let mut latencies = no_latencies();
    while let Some(client) = running.pop_front() {
        latencies.add(client.await??)?;
    }
    let elapsed = measure_from.elapsed().as_secs_f64();
    let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(json!({
        "operations": latencies.len(),
        "elapsed_s": elapsed,
        "ops_s": latencies.len() as f64 / elapsed,
        "p50_us": us(0.5),
        "p99_us": us(0.99),
        "p99_9_us": us(0.999),
    }))
}

async fn connect(endpoint: &str) -> anyhow::Result<Client> {
    Client::connect([endpoint], None).await.with_context(|| format!("cannot connect to {endpoint}"))
}

async fn leader(endpoints: &[String]) -> anyhow::Result<String> {
    for endpoint in endpoints {
        let status = connect(endpoint).await?.status().await?;
        if status.header().is_some_and(|header| header.member_id() == status.leader()) {
            return Ok(endpoint.clone());
        }
    }
    bail!("none of the members leads")
}

/// What all clients have in common.
struct Plan {
    args: Args,
    /// Calls that begin before this only warm up.
    measure_from: Instant,
    stop_at: Instant,
    /// How many keys have been handed out to be put once.
    filled: AtomicU64,
    value: String,
}

impl Plan {
    /// The key of the next call; `None` when the run is over.
    fn next_key(&self) -> Option<String> {
        let number = match self.args.operation {
            Operation::Fill => self.filled.fetch_add(1, Ordering::Relaxed),
            _ if Instant::now() >= self.stop_at => return None,
            _ => fastrand::u64(0..self.args.keys),
        };
        (number < self.args.keys).then(|| format!("key:{number:012}"))
    }
}

fn no_latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("the bounds are sound")
}

/// Runs one client; gives its latencies in nanoseconds.
async fn client(connection: KvClient, plan: Arc<Plan>) -> anyhow::Result<Histogram<u64>> {
    let mut latencies = no_latencies();
    let mut calls = FuturesUnordered::new();
    loop {
        while calls.len() < plan.args.in_flight as usize
            && let Some(key) = plan.next_key()
        {
            calls.push(call(connection.clone(), plan.clone(), key));
        }
        let Some(outcome) = calls.next().await else {
            return Ok(latencies);
        };
        let (begun, took) = outcome?;
        if begun >= plan.measure_from {
            latencies.saturating_record(took.as_nanos() as u64);
        }
    }
}

/// One call; gives when it began and how long it took.
async fn call(
    mut connection: KvClient,
    plan: Arc<Plan>,
    key: String,
) -> anyhow::Result<(Instant, Duration)> {
    let begun = Instant::now();
    match plan.args.operation {
        Operation::Put | Operation::Fill => {
            connection.put(key, plan.value.as_str(), None).await?;
        }
        Operation::Get => {
            let reply = connection.get(key.as_str(), None).await?;
            if reply.kvs().len() != 1 {
                bail!("{key} is not there: fill first");
            }
        }
    }
    Ok((begun, begun.elapsed()))
}
