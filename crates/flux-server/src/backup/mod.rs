//! Backups: what a node hands out of its partitions, and what the files of a backup are.
//!
//! A backup is a folder with one file for each partition, which is the partition's snapshot as
//! `docs/log-format.md` describes it, and `backup.json`, the [`Manifest`], which is written last: a
//! folder without it is no backup. Each partition's leader takes a snapshot when it is asked for one, so
//! a file holds every write of its partition that was acknowledged before, and none of it in part;
//! different partitions are of different moments.
//!
//! Who asks, writes the files and restores them is `flux admin`; nothing here decides when.

mod fetch;
mod file;
mod manifest;
mod routes;

pub use fetch::{Download, FetchError, Source};
pub use file::{FileError, Pair, PartitionFile};
pub use manifest::{MANIFEST, Manifest, ManifestError, PartitionRecord};
pub use routes::Overview;
pub(crate) use routes::routes;

/// Tells which entry of the partition's log a snapshot ends with.
const INDEX_HEADER: &str = "flux-snapshot-index";
