//! What may go of the log: the oldest segments, once snapshots and readers can do without them.
//!
//! Snapshots decide what must stay. Readers only ask for more, up to a number of bytes and as long as
//! the disk has room; to whom that is a loss, and what then, is the caller's business.

use crate::{
    error::LogError,
    log::Log,
    segment::{self, SealedSegment},
};

/// What a partition's entries are kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Index of a snapshot that is durable and of the history that the partition's last state began;
    /// 0 for none.
    pub snapshot: u64,
    /// The lowest index that a reader still needs; `u64::MAX` for none.
    pub from: u64,
}

/// What a [`Log::trim`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trimmed {
    /// Segments removed.
    pub segments: usize,
    /// Among them was one that a reader still needed.
    pub released: bool,
}

impl Log {
    /// Removes the oldest segments, as long as each of their entries is covered: `keep` gives for its
    /// partition a snapshot that is not below it, or a durable reset voids it, see [`State`](crate::State).
    /// Before a reset is appended, the snapshot that its history goes on from must be durable.
    ///
    /// A covered segment with an entry at or above the index from which a reader still needs the
    /// partition's entries stays, and those behind it, until the covered ones take more than
    /// `retention_bytes` together. Only covered ones ever go, whatever they take.
    ///
    /// # Errors
    /// [`LogError::Io`] if a file cannot be removed, which harms nothing; a directory that cannot be
    /// synced poisons the log.
    pub fn trim(
        &mut self,
        retention_bytes: u64,
        keep: &mut dyn FnMut(u16) -> Keep,
    ) -> Result<Trimmed, LogError> {
        self.check()?;
        // After an error it is not known which are left.
        self.covered = 0;
        let mut bytes = 0;
        let mut needed = Vec::new();
        for segment in &self.sealed {
            let Some(of_use) = needed_by_readers(segment, keep) else { break };
            needed.push(of_use);
            bytes += segment.size;
        }
        let mut trimmed = Trimmed::default();
        for &of_use in &needed {
            if of_use && bytes <= retention_bytes {
                break;
            }
            bytes -= self.remove_oldest()?;
            trimmed.segments += 1;
            trimmed.released |= of_use;
        }
        self.covered = needed.len() - trimmed.segments;
        Ok(trimmed)
    }

    /// The partitions with entries in the oldest segment that the last [`trim`](Log::trim) did not find
    /// covered, and the highest index of each there: those to take snapshots of first. `None` while that
    /// is the one being written.
    pub fn oldest_segment(&self) -> Option<&[(u16, u64)]> {
        self.sealed.get(self.covered).map(|oldest| &*oldest.highest)
    }

    /// Bytes of the segments that the last [`trim`](Log::trim) found covered and left for readers; 0
    /// after one that failed.
    pub fn pinned_bytes(&self) -> u64 {
        self.sealed.iter().take(self.covered).map(|segment| segment.size).sum()
    }

    /// Bytes of the other segments: those that take snapshots to go.
    pub fn bytes_beyond(&self) -> u64 {
        let sealed: u64 = self.sealed.iter().skip(self.covered).map(|segment| segment.size).sum();
        sealed + self.active.capacity
    }

    /// Takes the oldest covered segment from the readers that it is kept for; false if there is none, or
    /// it cannot be removed.
    pub(super) fn release_oldest(&mut self) -> Result<bool, LogError> {
        if self.covered == 0 {
            return Ok(false);
        }
        let base = self.sealed.front().map(|oldest| oldest.base);
        match self.remove_oldest() {
            Ok(_) => {
                self.covered -= 1;
                tracing::warn!(base, "the disk is full: log that was kept for readers makes room");
                Ok(true)
            }
            Err(error) => {
                self.check()?;
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "log that was kept for readers cannot be removed"
                );
                Ok(false)
            }
        }
    }

    /// Removes the oldest segment and returns its size. An error that does not poison changes nothing.
    fn remove_oldest(&mut self) -> Result<u64, LogError> {
        let Some(oldest) = self.sealed.front() else { return Ok(0) };
        let (name, size) = (segment::file_name(oldest.base), oldest.size);
        self.catalog
            .remove_oldest(|| self.disk.remove(&name))
            .map_err(|error| LogError::disk("remove", &name, error))?;
        self.sealed.pop_front();
        // One at a time: were a later removal to survive a power cut without an earlier one,
        // the log would have a hole.
        if let Err(error) = self.disk.sync_dir() {
            let error = LogError::io("sync the directory after removing", &name, error);
            return Err(self.poisoned_by(error));
        }
        Ok(size)
    }
}

/// `None` if not all entries of the segment are covered by snapshots; else whether a reader needs any.
fn needed_by_readers(segment: &SealedSegment, keep: &mut dyn FnMut(u16) -> Keep) -> Option<bool> {
    let mut needed = false;
    for &(partition, highest) in &segment.highest {
        let Keep { snapshot, from } = keep(partition);
        if snapshot < highest {
            return None;
        }
        needed |= from <= highest && from != u64::MAX;
    }
    Some(needed)
}
