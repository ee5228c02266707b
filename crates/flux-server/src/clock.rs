//! The node's clocks, read once a turn.

use std::time::{SystemTime, UNIX_EPOCH};

use flux_core::UnixMillis;

/// Microseconds since the Unix epoch on the wall clock; 0 before it.
pub(crate) fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Milliseconds since the Unix epoch on the wall clock; 0 before it.
pub(crate) fn unix_ms() -> UnixMillis {
    unix_us() / 1000
}
