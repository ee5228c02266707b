//! What the operating system says of this process.

use std::fs;

/// Memory and processor time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) resident_bytes: u64,
    pub(crate) user_s: f64,
    pub(crate) system_s: f64,
}

/// Clock ticks a second in `/proc`, on every Linux that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Reads `/proc/self`; zeros where there is none.
pub(crate) fn usage() -> Usage {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in parentheses may hold spaces; the fields after it may not.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse().ok()).unwrap_or(0.0);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok());
    Usage {
        resident_bytes: kilobytes.unwrap_or(0u64) * 1024,
        user_s: ticks(12) / TICKS_PER_SECOND,
        system_s: ticks(13) / TICKS_PER_SECOND,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_has_memory() {
        assert!(super::usage().resident_bytes > 100_000);
    }
}
