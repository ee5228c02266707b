//! What a benchmark says at its end: a table for people, or JSON for programs.
//!
//! Docs: the shape of the JSON is that of the structs here. Latencies are in microseconds.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    measure::{CONNECTION_LOST, Measurements, OVERLOADED},
    phase::{Outcome, Phase},
    workload::Operation,
};

/// Everything about one run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The version of this program.
    pub version: &'static str,
    /// What was asked for.
    pub settings: Settings,
    /// The filling before, with `--load`.
    pub load: Option<Figures>,
    /// The load itself; absent with `--requests 0`.
    pub run: Option<Figures>,
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub struct Settings {
    protocol: String,
    addr: String,
    cluster: bool,
    clients: u64,
    pipeline: u64,
    threads: u64,
    /// Requests a second; null for a closed loop.
    rate: Option<f64>,
    mix: String,
    keys: u64,
    distribution: Option<String>,
    key_size: usize,
    value_size: usize,
    ttl_ms: Option<u64>,
    seed: u64,
    warmup_s: f64,
}

impl Settings {
    /// The settings of a phase.
    pub fn of(phase: &Phase) -> Settings {
        let shape = &phase.shape;
        Settings {
            protocol: format!("{:?}", phase.protocol).to_lowercase(),
            addr: phase.addresses.join(","),
            cluster: phase.cluster,
            clients: phase.clients,
            pipeline: phase.pipeline,
            threads: phase.threads,
            rate: phase.rate,
            mix: shape.mix.to_string(),
            keys: shape.keys,
            distribution: shape.distribution.map(|distribution| distribution.to_string()),
            key_size: shape.key_size,
            value_size: shape.value_size,
            ttl_ms: shape.ttl_ms,
            seed: shape.seed,
            warmup_s: phase.warmup.as_secs_f64(),
        }
    }
}

/// What one phase gave.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// From when measuring began to the last reply.
    elapsed_s: f64,
    /// Requests that succeeded.
    requests: u64,
    /// Requests that succeeded, a second.
    throughput_per_s: f64,
    /// Null with gRPC.
    bytes_sent: Option<u64>,
    /// Null with gRPC.
    bytes_received: Option<u64>,
    /// What this program itself used of its cores, as the kernel counts it.
    client_cpu_s: f64,
    /// The same for one request, failed ones included.
    client_cpu_us_per_request: f64,
    errors: Errors,
    /// Of all operations together.
    latency_us: Latency,
    operations: BTreeMap<&'static str, OperationFigures>,
}

/// What did not succeed.
#[derive(Debug, Serialize)]
struct Errors {
    total: u64,
    overloaded: u64,
    connection_lost: u64,
    /// Requests of an open loop that could not be sent in time.
    unsent: u64,
    by_kind: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct OperationFigures {
    requests: u64,
    throughput_per_s: f64,
    latency_us: Latency,
}

/// Of requests that succeeded; from when they were due in an open loop, else from when they were
/// sent.
#[derive(Debug, Serialize)]
struct Latency {
    mean: f64,
    min: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    p99_99: f64,
    max: f64,
}

impl Latency {
    fn of(nanoseconds: &Histogram<u64>) -> Latency {
        // Whole hundredths of a microsecond: more digits would only pretend.
        let rounded = |nanoseconds: f64| (nanoseconds / 10.0).round() / 100.0;
        let at = |quantile| rounded(nanoseconds.value_at_quantile(quantile) as f64);
        Latency {
            mean: rounded(nanoseconds.mean()),
            min: rounded(nanoseconds.min() as f64),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            p99_99: at(0.9999),
            max: rounded(nanoseconds.max() as f64),
        }
    }
}

impl Figures {
    /// The figures of a phase during which this program used so much CPU time.
    pub fn of(outcome: &Outcome, cpu: Duration) -> Figures {
        let Measurements { errors, unsent, bytes_sent, bytes_received, .. } = &outcome.measurements;
        let elapsed_s = outcome.elapsed.as_secs_f64().max(1e-9);
        let all = outcome.measurements.all_latencies();
        let failed: u64 = errors.values().sum();
        let operations = Operation::ALL
            .into_iter()
            .map(|operation| (operation.name(), outcome.measurements.latencies(operation)))
            .filter(|(_, latencies)| !latencies.is_empty())
            .map(|(name, latencies)| (name, OperationFigures::of(latencies, elapsed_s)))
            .collect();
        let counted_bytes = |bytes| (bytes > 0).then_some(bytes);
        let counted = |kind: &str| errors.get(kind).copied().unwrap_or(0);
        Figures {
            elapsed_s,
            requests: all.len(),
            throughput_per_s: all.len() as f64 / elapsed_s,
            bytes_sent: counted_bytes(*bytes_sent),
            bytes_received: counted_bytes(*bytes_received),
            client_cpu_s: cpu.as_secs_f64(),
            client_cpu_us_per_request: cpu.as_nanos() as f64
                / 1e3
                / (all.len() + failed).max(1) as f64,
            errors: Errors {
                total: failed + unsent,
                overloaded: counted(OVERLOADED),
                connection_lost: counted(CONNECTION_LOST),
                unsent: *unsent,
                by_kind: errors.clone(),
            },
            latency_us: Latency::of(&all),
            operations,
        }
    }

    /// Whether nothing at all succeeded.
    pub fn is_failure(&self) -> bool {
        self.requests == 0 && self.errors.total > 0
    }
}

impl OperationFigures {
    fn of(latencies: &Histogram<u64>, elapsed_s: f64) -> OperationFigures {
        OperationFigures {
            requests: latencies.len(),
            throughput_per_s: latencies.len() as f64 / elapsed_s,
            latency_us: Latency::of(latencies),
        }
    }
}

impl Report {
    /// For a person.
    pub fn to_text(&self) -> String {
        let Settings { protocol, addr, clients, pipeline, threads, .. } = &self.settings;
        let Settings { mix, keys, key_size, value_size, distribution, .. } = &self.settings;
        let mode = match self.settings.rate {
            None => "closed loop".to_owned(),
            Some(rate) => format!("open loop at {rate}/s"),
        };
        let choice = distribution.as_deref().unwrap_or("in order");
        let mut text = format!(
            "{protocol} {addr}, {mode}: {clients} clients x pipeline {pipeline}, {threads} threads\n\
             {mix} over {keys} keys of {key_size} B ({choice}), values of {value_size} B\n"
        );
        for (name, figures) in [("load", &self.load), ("run", &self.run)] {
            if let Some(figures) = figures {
                figures.write(name, &mut text);
            }
        }
        text
    }
}

impl Figures {
    fn write(&self, name: &str, text: &mut String) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{name:<6} {:>11} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "requests", "per second", "p50 us", "p90", "p99", "p99.9", "p99.99", "max"
        );
        for (operation, figures) in &self.operations {
            row(text, operation, figures.requests, figures.throughput_per_s, &figures.latency_us);
        }
        if self.operations.len() != 1 {
            row(text, "all", self.requests, self.throughput_per_s, &self.latency_us);
        }
        if let (Some(sent), Some(received)) = (self.bytes_sent, self.bytes_received) {
            let (sent, received) = (sent as f64 / 1e6, received as f64 / 1e6);
            let _ = write!(text, "{sent:.1} MB sent, {received:.1} MB received, ");
        }
        let _ = writeln!(
            text,
            "{:.2} s; this program used {:.2} us of CPU per request, {:.0}% of a core",
            self.elapsed_s,
            self.client_cpu_us_per_request,
            self.client_cpu_s / self.elapsed_s * 100.0
        );
        let Errors { total, unsent, by_kind, .. } = &self.errors;
        if *total > 0 {
            let mut kinds: Vec<String> =
                by_kind.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
            if *unsent > 0 {
                kinds.push(format!("unsent {unsent}"));
            }
            let _ = writeln!(text, "errors: {total} ({})", kinds.join(", "));
        }
    }
}

fn row(text: &mut String, name: &str, requests: u64, throughput: f64, latency: &Latency) {
    let Latency { p50, p90, p99, p99_9, p99_99, max, .. } = latency;
    let _ = writeln!(
        text,
        "{name:<6} {requests:>11} {throughput:>10.0} {p50:>9.0} {p90:>9.0} {p99:>9.0} {p99_9:>9.0} \
         {p99_99:>9.0} {max:>9.0}"
    );
}
