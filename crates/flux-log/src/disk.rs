//! What the log and snapshots ask of a disk: one flat directory of files.
//!
//! Two implementations exist: [`FileDisk`](crate::FileDisk) on a real directory and
//! [`SimDisk`](crate::SimDisk) in memory, which can lose what was not synced.

use std::{fmt::Debug, io, sync::Arc};

/// A directory of files. Names are plain file names without a separator.
///
/// Creations, renames and removals survive a power cut only after [`sync_dir`](Disk::sync_dir).
/// Lack of space is always [`io::ErrorKind::StorageFull`].
pub trait Disk: Debug + Send + Sync {
    /// Makes a new empty file; an existing one of that name is an error.
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>>;
    /// Opens an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn File>>;
    /// Gives a file a new name, replacing any file that had it, in one step.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file. Handles that are open stay usable.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// The names of all files, in no particular order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes all creations, renames and removals so far durable.
    fn sync_dir(&self) -> io::Result<()>;
}

/// An open file, shared between the thread that writes and the one that syncs.
pub trait File: Debug + Send + Sync {
    /// Length in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills `buffer` from `offset`; returns fewer bytes only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`. After an error any part of them may have been written.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Returns once all that was written before the call, and the length, survive a power cut.
    fn sync_data(&self) -> io::Result<()>;
    /// Makes the file at least `size` bytes long, with blocks of its own for all of them and zeros
    /// where it grew. The contents up to its old length stay.
    fn allocate(&self, size: u64) -> io::Result<()>;
    /// Cuts or extends (with zeros) the file to `size` bytes.
    fn truncate(&self, size: u64) -> io::Result<()>;
}
