//! The node's clocks.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use flux_core::UnixMillis;
use flux_core::replica::Now;

/// Both clocks.
pub(crate) fn now() -> Now {
    Now { ms: unix_ms(), us: monotonic_us() }
}

/// Microseconds since the process first asked, and one: a clock that is never set.
pub(crate) fn monotonic_us() -> u64 {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    1 + BEGINNING.get_or_init(Instant::now).elapsed().as_micros() as u64
}

/// Microseconds since the Unix epoch on the wall clock; 0 before it.
pub(crate) fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Milliseconds since the Unix epoch on the wall clock; 0 before it.
pub(crate) fn unix_ms() -> UnixMillis {
    unix_us() / 1000
}
