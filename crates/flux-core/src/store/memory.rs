//! The account of memory that the tables of a node share. It counts; refusing writes past the limit is
//! up to whoever evaluates them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How much memory the tables of a node take together, and how much they may.
///
/// A table reports to it in steps: the account may be behind by 0.4 % of a shard, at most 4 KiB a shard.
#[derive(Debug)]
pub struct Memory {
    used: AtomicU64,
    limit: u64,
}

impl Memory {
    /// An empty account. A limit of 0 bytes means none.
    pub fn new(limit: u64) -> Arc<Memory> {
        Arc::new(Memory { used: AtomicU64::new(0), limit })
    }

    /// The bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bytes that may be in use; 0 if there is no limit.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Changes what is in use by the difference of what one shard reported and now reports.
    pub(super) fn replace(&self, reported: u64, now: u64) {
        // Addition wraps, so a decrease is an increase by its two's complement.
        self.used.fetch_add(now.wrapping_sub(reported), Ordering::Relaxed);
    }
}
