//! What any thread may know of a replica without asking its owner.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Cursor, Revision};

/// A replica's standing, written by its owner and read by all.
#[derive(Debug, Default)]
pub struct View {
    lease_until_us: AtomicU64,
    leader: AtomicU64,
    fresh_us: AtomicU64,
    revision: AtomicU64,
    applied: AtomicU64,
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

    /// A revision that is in the table, and for how many microseconds, at most, newer ones may have been
    /// acknowledged by this moment of the owner's monotonic clock: 0 where the table may answer linearizable
    /// reads. `None` if this replica has never been up to date. The table is to be read after this, and what
    /// was read counts only if the table was not emptied meanwhile.
    pub fn staleness(&self, now_us: u64) -> (Revision, Option<u64>) {
        // The revision comes last: it was published before what is said of it, and only grows.
        let may_serve = self.may_serve(now_us);
        let age_us = match self.fresh_us.load(Ordering::Acquire) {
            0 => None,
            _ if may_serve => Some(0),
            fresh_us => Some(now_us.saturating_sub(fresh_us)),
        };
        (self.revision.load(Ordering::Acquire), age_us.filter(|_| self.is_here()))
    }

    /// The index of an entry that is in the table, and in the log. It may be newer than a revision that was
    /// read before, and is never older; 0 if there is no replica here.
    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// A revision that is in the table, and the index of its entry or an earlier one; `None` if there is no
    /// replica here, or it has applied nothing.
    pub fn place(&self) -> Option<Cursor> {
        let index = self.applied();
        (index > 0).then(|| Cursor { revision: self.revision.load(Ordering::Acquire), index })
    }

    /// Whether there is a replica here that was up to date at some time. One that is removed says so before
    /// its table is emptied.
    pub(super) fn is_here(&self) -> bool {
        self.fresh_us.load(Ordering::Acquire) != 0
    }

    /// There is no replica here any more. To be called before the table is emptied.
    pub fn clear(&self) {
        self.set_lease(0);
        self.set_leader(0);
        self.fresh_us.store(0, Ordering::Release);
        self.set_revision(0);
        self.set_applied(0);
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
            self.fresh_us.store(us, Ordering::Release);
        }
    }

    pub(super) fn set_applied(&self, index: u64) {
        if self.applied.load(Ordering::Relaxed) != index {
            self.applied.store(index, Ordering::Release);
        }
    }

    pub(super) fn set_revision(&self, revision: Revision) {
        if self.revision.load(Ordering::Relaxed) != revision {
            self.revision.store(revision, Ordering::Release);
        }
    }
}
