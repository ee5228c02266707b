//! The one error type of this crate.

use std::{io, sync::Arc};

/// What can go wrong between the log or a snapshot and the disk.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk refused an operation. If it was a write or a sync of the log, the log is now poisoned.
    #[error("cannot {action} {file}")]
    Io {
        /// What was tried, as in "write".
        action: &'static str,
        /// Name of the file within the log's directory.
        file: String,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// No space (or quota) left. Nothing has changed; the same call succeeds once space returns.
    #[error("no space left on the disk to {action} {file}; free some space to take writes again")]
    Full {
        /// What was tried, as in "allocate".
        action: &'static str,
        /// Name of the file within the log's directory.
        file: String,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// An earlier write or sync failed, so what is on the disk is unknown.
    #[error(
        "the log takes nothing more since an earlier operation failed ({cause}); \
         check the disk, then restart the node"
    )]
    Poisoned {
        /// The first failure.
        cause: Arc<str>,
    },
    /// Bytes that had been durable are no longer what was written. Nothing was cut or skipped.
    #[error(
        "{file} is damaged at offset {offset}: {reason}; this data had been safely on the disk, \
         so nothing was cut; a node alone needs a backup, one of a cluster gets its data from the other nodes"
    )]
    Damaged {
        /// Name of the file within the log's directory.
        file: String,
        /// Offset in the file of the structure that is not valid.
        offset: u64,
        /// What is wrong there.
        reason: &'static str,
    },
    /// The file was written by a version of this program that is not known here.
    #[error("{file} has format version {found}, this program reads {supported}; use a newer one")]
    UnknownVersion {
        /// Name of the file within the log's directory.
        file: String,
        /// The version that the file names.
        found: u32,
        /// The version that this program writes and reads.
        supported: u32,
    },
    /// A record or chunk that the format cannot hold. Nothing has changed.
    #[error("{bytes} bytes are more than one batch or chunk may hold ({limit})")]
    TooLarge {
        /// What it would have taken.
        bytes: u64,
        /// The most that is allowed.
        limit: u64,
    },
}

impl LogError {
    /// Wraps what the disk said; a lack of space becomes [`LogError::Full`].
    pub(crate) fn disk(action: &'static str, file: &str, source: io::Error) -> LogError {
        let file = file.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                LogError::Full { action, file, source }
            }
            _ => LogError::Io { action, file, source },
        }
    }

    /// Wraps what the disk said when the log is poisoned by it, whatever the cause: never `Full`.
    pub(crate) fn io(action: &'static str, file: &str, source: io::Error) -> LogError {
        LogError::Io { action, file: file.to_owned(), source }
    }

    pub(crate) fn damaged(file: &str, offset: u64, reason: &'static str) -> LogError {
        LogError::Damaged { file: file.to_owned(), offset, reason }
    }
}
