//! What any thread may know of a replica without asking its owner.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Revision;

/// A replica's standing, written by its owner and read by all.
#[derive(Debug, Default)]
pub struct View {
    lease_until_us: AtomicU64,
    leader: AtomicU64,
    fresh_us: AtomicU64,
    revision: AtomicU64,
}

impl View {
    /// Whether the table may answer a linearizable read at this moment of the owner's monotonic clock.
    /// The moment must have been taken after the read was asked for: a process that was stopped in
    /// between must not judge by an old one.
    #[inline]
    pub fn may_serve(&self, now_us: u64) -> bool {
        now_us < self.lease_until_us.load(Ordering::Acquire)
    }

    /// The replica that leads as far as this one knows; 0 if it knows of none.
    pub fn leader(&self) -> u64 {
        self.leader.load(Ordering::Relaxed)
    }

    /// The newest revision in the table, and for how many microseconds, at most, newer ones may have been
    /// committed elsewhere; `None` if this replica has never been up to date.
    pub fn staleness(&self, now_us: u64) -> (Revision, Option<u64>) {
        let revision = self.revision.load(Ordering::Relaxed);
        match self.fresh_us.load(Ordering::Relaxed) {
            0 => (revision, None),
            fresh_us => (revision, Some(now_us.saturating_sub(fresh_us))),
        }
    }

    /// There is no replica here any more.
    pub fn clear(&self) {
        self.set_lease(0);
        self.set_leader(0);
        self.fresh_us.store(0, Ordering::Relaxed);
        self.set_revision(0);
    }

    pub(super) fn set_lease(&self, until_us: u64) {
        if self.lease_until_us.load(Ordering::Relaxed) != until_us {
            self.lease_until_us.store(until_us, Ordering::Release);
        }
    }

    pub(super) fn set_leader(&self, id: u64) {
        if self.leader.load(Ordering::Relaxed) != id {
            self.leader.store(id, Ordering::Relaxed);
        }
    }

    pub(super) fn set_fresh(&self, us: u64) {
        if self.fresh_us.load(Ordering::Relaxed) < us {
            self.fresh_us.store(us, Ordering::Relaxed);
        }
    }

    pub(super) fn set_revision(&self, revision: Revision) {
        if self.revision.load(Ordering::Relaxed) != revision {
            self.revision.store(revision, Ordering::Relaxed);
        }
    }
}
