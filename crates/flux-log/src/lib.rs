//! Bytes on disk: a segmented log shared by the partitions of one worker, its recovery, and
//! snapshots. Everything goes through the [`Disk`] trait, so that a simulated disk can cut the power.
//!
//! Deliberately not here: commands, tables and Raft. Records carry plain integers and opaque
//! payloads; what they mean, and when a write may be acknowledged, is decided by the caller.
//! The formats are documented to the byte in `docs/log-format.md`.

mod batch;
mod disk;
mod error;
mod fields;
mod file_disk;
pub mod fuzzing;
mod log;
mod reader;
mod record;
mod recovery;
mod segment;
mod sim;
mod snapshot;
mod sync;
mod tail;

pub use batch::BATCH_HEADER_BYTES;
pub use disk::{Disk, File};
pub use error::LogError;
pub use file_disk::FileDisk;
pub use log::{Keep, Log, LogOptions, Lsn, Trimmed};
pub use record::{Entry, MAX_BATCH_BYTES, Record, State};
pub use recovery::{Cut, Progress, RecoveryReport};
pub use sim::SimDisk;
pub use snapshot::{MAX_CHUNK_BYTES, Snapshot, SnapshotId, SnapshotWriter};
pub use sync::{PrepareTarget, PreparedSegment, SyncTarget};
pub use tail::{LogReader, Scanned, SegmentInfo};
