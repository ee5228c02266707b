//! The core's errors as RESP errors.
//!
//! Where Redis has the same error, its words are kept: clients compare them.

use flux_core::{Error, Slot};

use crate::codes::code_of;

/// An error as RESP answers it, without the leading `-`.
pub fn text(error: &Error) -> String {
    let prefix = code_of(error).resp_prefix();
    match error {
        Error::OutOfMemory { .. } => {
            format!("{prefix} command not allowed when used memory > 'maxmemory'. {error}")
        }
        Error::ValueTooLarge(_) => {
            format!("{prefix} string exceeds maximum allowed size (proto-max-bulk-len): {error}")
        }
        Error::TooLargeToCompare(_) => format!(
            "{prefix} Insufficient memory, transient memory for LCS exceeds proto-max-bulk-len: \
             {error}"
        ),
        _ => format!("{prefix} {error}"),
    }
}

/// The error that tells a client where a slot is.
pub fn moved(slot: Slot, host: &str, port: u16) -> String {
    format!("MOVED {} {host}:{port}", slot.0)
}

/// Too few nodes are there to serve anything.
#[allow(dead_code, reason = "a node alone is never without a majority")]
pub const CLUSTER_DOWN: &str = "CLUSTERDOWN The cluster is down";

/// No node is known to serve the slot of a key.
pub const SLOT_NOT_SERVED: &str = "CLUSTERDOWN Hash slot not served";

/// The same command may succeed in a moment.
#[allow(dead_code, reason = "a node alone elects nobody")]
pub const TRY_AGAIN: &str = "TRYAGAIN Multiple keys request during rehashing of slot";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_words_of_redis_or_a_prefix_of_their_own() {
        let cases = [
            (Error::NotInteger, "ERR value is not an integer or out of range"),
            (Error::NotFloat, "ERR value is not a valid float"),
            (Error::Overflow, "ERR increment or decrement would overflow"),
            (Error::NotFinite, "ERR increment would produce NaN or Infinity"),
            (Error::OffsetOutOfRange, "ERR offset is out of range"),
            (Error::NoSuchKey, "ERR no such key"),
            (Error::EmptyKey, "ERR empty key"),
            (Error::KeyTooLong(70_000), "ERR key of 70000 bytes is over the limit of 65536"),
            (
                Error::ValueTooLarge(16_777_217),
                "ERR string exceeds maximum allowed size (proto-max-bulk-len): value of 16777217 \
                 bytes is over the limit of 16777216",
            ),
            (
                Error::OutOfMemory { limit: 1000 },
                "OOM command not allowed when used memory > 'maxmemory'. max_memory of 1000 bytes \
                 is reached; delete keys, or raise max_memory and restart",
            ),
            (Error::Overloaded, "OVERLOADED too much work is waiting; try again later"),
            (
                Error::DiskFull,
                "DISKFULL the disk is full; writes are refused until there is space again",
            ),
            (
                Error::LogFailed("sync failed".into()),
                "LOGFAILED the log failed and the node takes no more writes: sync failed",
            ),
            (Error::NotLeader, "NOTLEADER this node does not lead the partition"),
            (
                Error::NoLeader { partition: 7, waited_ms: 5000 },
                "NOTLEADER no leader of partition 7 was found within 5 s",
            ),
            (
                Error::NoLeader { partition: 7, waited_ms: 250 },
                "NOTLEADER no leader of partition 7 was found within 0.25 s",
            ),
            (Error::OutcomeUnknown, "UNKNOWN outcome unknown: the write may or may not take place"),
            (Error::Stopping, "STOPPING the node is stopping"),
        ];
        for (error, expected) in cases {
            assert_eq!(text(&error), expected);
        }
    }
}
