//! The parts of the log that may run on another thread: syncing, and allocating the next segment.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    disk::{Disk, File},
    error::LogError,
    log::Lsn,
    segment,
};

/// Lets one sync run at a time and remembers the first that failed.
///
/// The kernel reports a lost write to one of the syncs that could have noticed, and the next sync
/// then succeeds. So whoever succeeds must know of every failure before it.
#[derive(Debug, Default)]
pub(crate) struct SyncGate {
    failed: Mutex<Option<Arc<str>>>,
}

impl SyncGate {
    pub fn sync(&self, name: &str, file: &dyn File) -> io::Result<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cause) = &*failed {
            return Err(io::Error::other(cause.to_string()));
        }
        file.sync_data().inspect_err(|error| {
            *failed = Some(format!("cannot sync {name}: {error}").into());
        })
    }
}

/// All that was written when this was made, to be synced by any thread.
#[derive(Clone, Debug)]
pub struct SyncTarget {
    pub(crate) gate: Arc<SyncGate>,
    pub(crate) file: Arc<dyn File>,
    pub(crate) name: String,
    pub(crate) lsn: Lsn,
}

impl SyncTarget {
    /// Blocks until everything up to the returned LSN is durable. Hand the result to
    /// [`Log::synced`](crate::Log::synced), an error too.
    ///
    /// # Errors
    /// What the disk said, or that an earlier sync failed.
    pub fn sync(&self) -> io::Result<Lsn> {
        self.gate.sync(&self.name, &*self.file)?;
        Ok(self.lsn)
    }

    /// What a successful sync will have made durable.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }
}

/// The next segment, to be allocated by any thread ahead of need.
#[derive(Debug)]
pub struct PrepareTarget {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) name: String,
    pub(crate) size: u64,
}

impl PrepareTarget {
    /// Makes and allocates the file. Hand the result to [`Log::prepared`](crate::Log::prepared), an
    /// error too.
    ///
    /// # Errors
    /// As the disk gives them; the log is none the worse and tries again when it needs the segment.
    pub fn run(self) -> Result<PreparedSegment, LogError> {
        let file = segment::allocate(&*self.disk, &self.name, self.size)?;
        // Best effort: with the allocation on disk already, the sync at rotation has little to do.
        let _ = file.sync_data();
        Ok(PreparedSegment { file, name: self.name, size: self.size })
    }
}

/// An allocated file that waits to become a segment.
#[derive(Debug)]
pub struct PreparedSegment {
    pub(crate) file: Arc<dyn File>,
    pub(crate) name: String,
    pub(crate) size: u64,
}
