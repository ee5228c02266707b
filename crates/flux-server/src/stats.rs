//! Counters of a node, in Prometheus's sense: they only grow, and any thread may read them.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

macro_rules! stats {
    ($($field:ident: $help:literal,)*) => {
        /// All counters of a node.
        #[derive(Debug, Default)]
        pub(crate) struct Stats {
            $(#[doc = $help] pub(crate) $field: Counter,)*
        }

        impl Stats {
            /// Name, help and value of each counter.
            pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$((stringify!($field), $help, self.$field.value()),)*].into_iter()
            }

            /// Sets all counters to zero (CONFIG RESETSTAT).
            pub(crate) fn reset(&self) {
                $(self.$field.reset();)*
            }
        }
    };
}

stats! {
    commands: "Commands received on the data port.",
    reads: "Reads answered from a table.",
    writes: "Writes given to a partition.",
    read_hits: "Single-key reads that found a key.",
    read_misses: "Single-key reads that found none.",
    input_bytes: "Bytes received on the data port.",
    output_bytes: "Bytes sent on the data port.",
    connections_accepted: "Connections accepted on the data port.",
    connections_refused: "Connections refused on the data port: max_connections, or a full mailbox.",
    protocol_errors: "Connections closed because their framing was lost.",
    output_limit_closes: "Connections closed because they did not read their replies.",
    idle_closes: "Connections closed because they were idle.",
    overloaded: "Writes refused because too much work was waiting.",
    disk_full: "Writes refused because the disk was full.",
    expired_keys: "Timers of expired keys that were worked off.",
    log_batches: "Batches written to the log.",
    log_bytes: "Bytes written to the log.",
    log_syncs: "Syncs of the log.",
    log_sync_microseconds: "Time spent in syncs of the log, in microseconds.",
    snapshots: "Snapshots written.",
    feed_gaps: "Times that changes were gone before a follower had read them.",
    feed_remote_changes: "Changes that followers got from other nodes, because the log here does not go back so far.",
    feed_log_reads: "Times that changes were read back from the log.",
    feed_log_read_bytes: "Bytes of changes read back from the log.",
    watch_events: "Messages given to watchers.",
    watch_cut: "Watches ended because the watcher was too slow.",
    snapshots_received: "Snapshots of partitions that other nodes sent and replicas took.",
}
