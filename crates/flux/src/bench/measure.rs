//! What is measured while a load runs: latencies by operation, errors by kind, bytes.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::workload::Operation;

/// Latencies are kept to three digits, and up to ten minutes.
const LONGEST_NS: u64 = 600_000_000_000;

/// An error that says that the server refused work to protect itself.
pub const OVERLOADED: &str = "OVERLOADED";

/// The kind under which requests count whose connection broke.
pub const CONNECTION_LOST: &str = "connection lost";

/// The measurements of one thread, or of several after `add`.
pub struct Measurements {
    /// Nanoseconds, by operation; only of requests that succeeded.
    latencies: [Histogram<u64>; 4],
    /// How often each kind of error was answered.
    pub errors: BTreeMap<String, u64>,
    /// Requests of an open loop that were due but could not be sent before the end.
    pub unsent: u64,
    /// When the last request was answered, well or not.
    pub last_reply: Option<Instant>,
    /// Bytes written to connections; not known of gRPC.
    pub bytes_sent: u64,
    /// Bytes read from connections; not known of gRPC.
    pub bytes_received: u64,
}

impl Default for Measurements {
    fn default() -> Measurements {
        let empty = Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("the bounds are sound");
        Measurements {
            latencies: Operation::ALL.map(|_| empty.clone()),
            errors: BTreeMap::new(),
            unsent: 0,
            last_reply: None,
            bytes_sent: 0,
            bytes_received: 0,
        }
    }
}

impl Measurements {
    /// A request that succeeded.
    pub fn success(&mut self, operation: Operation, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(LONGEST_NS);
        self.latencies[operation as usize].saturating_record(nanoseconds);
    }

    /// Requests that failed in the same way.
    pub fn failure(&mut self, kind: &str, count: u64) {
        match self.errors.get_mut(kind) {
            Some(counted) => *counted += count,
            None if count > 0 => {
                self.errors.insert(kind.to_owned(), count);
            }
            None => {}
        }
    }

    /// The latencies of an operation in nanoseconds.
    pub fn latencies(&self, operation: Operation) -> &Histogram<u64> {
        &self.latencies[operation as usize]
    }

    /// The latencies of all operations together.
    pub fn all_latencies(&self) -> Histogram<u64> {
        let mut all = self.latencies[0].clone();
        for one in &self.latencies[1..] {
            all.add(one).expect("all have the same bounds");
        }
        all
    }

    /// Takes in the measurements of another thread.
    pub fn add(&mut self, other: &Measurements) {
        for (mine, theirs) in self.latencies.iter_mut().zip(&other.latencies) {
            mine.add(theirs).expect("all have the same bounds");
        }
        for (kind, count) in &other.errors {
            self.failure(kind, *count);
        }
        self.unsent += other.unsent;
        self.last_reply = self.last_reply.max(other.last_reply);
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_of_threads_add_up() {
        let mut one = Measurements::default();
        one.success(Operation::Set, Duration::from_micros(100));
        one.failure(OVERLOADED, 2);
        let mut two = Measurements::default();
        two.success(Operation::Get, Duration::from_millis(5));
        two.success(Operation::Get, Duration::from_secs(3600));
        two.failure(OVERLOADED, 1);
        two.failure("ERR", 0);
        one.add(&two);
        assert_eq!(one.latencies(Operation::Set).len(), 1);
        assert_eq!(one.latencies(Operation::Get).len(), 2);
        assert_eq!(one.all_latencies().len(), 3);
        assert!(one.all_latencies().max() >= LONGEST_NS - LONGEST_NS / 1000);
        assert_eq!(one.errors, BTreeMap::from([(OVERLOADED.to_owned(), 3)]));
    }
}
