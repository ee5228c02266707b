//! What one partition's worker and its readers share: the newest changes in memory, how far readers have
//! come, and what they need of the log.
//!
//! The worker never waits for a reader: it puts entries in, and the oldest go when there is no room. Who
//! reads says so from time to time; where nobody has for a while, nothing is kept at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use flux_core::effect::EffectError;
use flux_core::feed::{Committed, Ring, RingRead};
use flux_core::{Cursor, Revision};
use flux_log::Lsn;
use flux_proto::event::Event;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::elsewhere::Fetches;

/// For so long changes are kept in memory, and what is needed of the log, after somebody has read last.
pub(super) const INTEREST_US: u64 = 60_000_000;
/// Readers of the log whose places are remembered. For one that is forgotten no log is kept, and it looks longer
/// for its own.
const MAX_PLACES: usize = 64;

/// Where a reader of the log has come to.
#[derive(Clone, Copy, Debug)]
struct ReadTo {
    revision: Revision,
    /// What comes behind this index is still needed.
    index: u64,
    /// The batch of the log that it read last, if it has read there: what comes next is in it, or behind it.
    lsn: Option<Lsn>,
    until_us: u64,
}

/// An entry that was read back from the log, and the batch there that holds it.
#[derive(Clone, Debug)]
pub(super) struct Older {
    pub(super) entry: Arc<Committed>,
    pub(super) lsn: Lsn,
}

#[derive(Debug, Default)]
pub(crate) struct PartitionFeed {
    /// None while nobody reads.
    ring: Mutex<Option<Ring>>,
    grown: Notify,
    /// More is synced. Who reads only that is not woken for each change.
    synced_more: Notify,
    /// When the interest of the last reader ends, in the node's monotonic microseconds.
    wanted_until_us: AtomicU64,
    /// How far the broker has confirmed changes to this node.
    confirmed: Mutex<Cursor>,
    /// How far changes are passed on, as the group has it.
    cursor: Mutex<Cursor>,
    /// The lowest index of the log with a change that is not passed on, as this node's disk surely has it.
    unconfirmed: AtomicU64,
    /// Up to here a power cut of this node undoes nothing.
    synced: Mutex<Cursor>,
    places: Mutex<Vec<ReadTo>>,
    /// What was read back from the log last: its readers take it in smaller parts.
    older: Mutex<Option<Arc<[Older]>>>,
    /// What other nodes are asked for, because the log here does not have it.
    pub(super) fetches: Fetches,
    /// The entry that was read last, as events.
    decoded: Mutex<Option<(u64, Arc<[Event]>)>>,
    /// One of these was of use since they were last looked after.
    was_of_use: AtomicBool,
}

impl PartitionFeed {
    /// Says that somebody reads.
    pub(super) fn want(&self, now_us: u64) {
        self.wanted_until_us.fetch_max(now_us + INTEREST_US, Ordering::Relaxed);
    }

    pub(crate) fn is_wanted(&self, now_us: u64) -> bool {
        self.wanted_until_us.load(Ordering::Relaxed) > now_us
    }

    /// Begins to keep changes in memory, from behind this entry on.
    pub(crate) fn begin(&self, limit_bytes: usize, at: Cursor) {
        let mut ring = Ring::new(limit_bytes);
        ring.begin((at.revision, at.index));
        *self.ring.lock() = Some(ring);
        self.grown.notify_waiters();
    }

    /// Nobody reads any more.
    pub(crate) fn end(&self) {
        *self.ring.lock() = None;
        *self.decoded.lock() = None;
        *self.older.lock() = None;
        self.fetches.clear();
    }

    /// Lets go of what was read and nobody came for. To be called from time to time.
    pub(crate) fn tidy(&self) {
        if !self.was_of_use.swap(false, Ordering::Relaxed) {
            *self.decoded.lock() = None;
            *self.older.lock() = None;
        }
        self.fetches.sweep();
    }

    /// Takes what was applied, up to the entry that is `at` now. Where that is not what follows, the
    /// contents were replaced.
    pub(crate) fn grew(&self, entries: &mut Vec<Committed>, at: Cursor) {
        let mut ring = self.ring.lock();
        let Some(ring) = &mut *ring else { return entries.clear() };
        let grows = !entries.is_empty();
        entries.drain(..).for_each(|entry| ring.push(Arc::new(entry)));
        let is_replaced = ring.last() != Some(at.revision);
        if is_replaced {
            ring.begin((at.revision, at.index));
        }
        if grows || is_replaced {
            self.grown.notify_waiters();
        }
    }

    /// What is in memory after a revision, about so many bytes; none while nothing is kept.
    pub(super) fn recent(&self, after: Revision, bytes: usize) -> Option<RingRead> {
        self.ring.lock().as_ref().map(|ring| ring.after(after, bytes))
    }

    /// Is told when there may be something new. To be asked for before it is looked.
    pub(super) fn grown(&self, only_synced: bool) -> Notified<'_> {
        let grows = if only_synced { &self.synced_more } else { &self.grown };
        grows.notified()
    }

    pub(crate) fn ring_bytes(&self) -> usize {
        self.ring.lock().as_ref().map_or(0, Ring::bytes)
    }

    /// All of an entry, which its next reader gets without reading it anew.
    pub(super) fn events_of(
        &self,
        partition: u16,
        entry: &Arc<Committed>,
    ) -> Result<Arc<[Event]>, EffectError> {
        self.was_of_use.store(true, Ordering::Relaxed);
        let index = entry.position.index;
        let known = self.decoded.lock().as_ref().filter(|(of, _)| *of == index).cloned();
        if let Some((_, events)) = known
            && events.first().is_some_and(|one| one.revision == entry.first)
        {
            return Ok(events);
        }
        let events: Arc<[Event]> = super::decode::events(partition, entry)?.into();
        *self.decoded.lock() = Some((index, Arc::clone(&events)));
        Ok(events)
    }

    /// The broker has confirmed everything up to here.
    pub(super) fn confirm(&self, to: Cursor) {
        let mut confirmed = self.confirmed.lock();
        *confirmed = (*confirmed).max(to);
    }

    pub(crate) fn confirmed(&self) -> Cursor {
        *self.confirmed.lock()
    }

    /// How far the group has it that changes are passed on.
    pub(crate) fn set_cursor(&self, cursor: Cursor) {
        *self.cursor.lock() = cursor;
    }

    pub(crate) fn cursor(&self) -> Cursor {
        *self.cursor.lock()
    }

    /// A cursor is on the disk that leaves only what is in the log from this index on.
    pub(crate) fn set_unconfirmed(&self, index: u64) {
        self.unconfirmed.store(index, Ordering::Relaxed);
    }

    /// Up to here a power cut of this node undoes nothing.
    pub(crate) fn set_synced(&self, to: Cursor) {
        if std::mem::replace(&mut *self.synced.lock(), to) != to {
            self.synced_more.notify_waiters();
        }
    }

    pub(super) fn synced(&self) -> Cursor {
        *self.synced.lock()
    }

    /// Entries that were read back and begin no later than behind `after`, if there are such.
    pub(super) fn read_before(&self, after: Revision) -> Option<Arc<[Older]>> {
        let older = self.older.lock();
        let older = older.as_ref()?;
        let (first, last) = (&older.first()?.entry, &older.last()?.entry);
        (first.first <= after + 1 && after < last.last).then(|| Arc::clone(older))
    }

    /// Keeps what was read back until its readers have come behind it.
    pub(super) fn keep_read(&self, older: Arc<[Older]>) {
        *self.older.lock() = Some(older);
    }

    /// Remembers that a reader who was at `before` is now at `at`, and will want what comes next from the log: the
    /// batch there that it read last is `lsn`.
    pub(super) fn move_place(&self, before: Revision, at: Cursor, lsn: Option<Lsn>, now_us: u64) {
        self.end_place(before);
        let mut places = self.places.lock();
        places.retain(|one| one.until_us > now_us);
        if places.len() >= MAX_PLACES {
            places.remove(0);
        }
        let until_us = now_us + INTEREST_US;
        places.push(ReadTo { revision: at.revision, index: at.index, lsn, until_us });
    }

    /// A reader of the log that was here does not need it any more, or is elsewhere.
    pub(super) fn end_place(&self, at: Revision) {
        let mut places = self.places.lock();
        if let Some(index) = places.iter().position(|one| one.revision == at) {
            places.swap_remove(index);
        }
    }

    /// Where a reader finds in the log what comes after a revision, if one has come to it.
    pub(super) fn place_of(&self, after: Revision) -> Option<Lsn> {
        let places = self.places.lock();
        places.iter().find(|one| one.revision == after)?.lsn
    }

    /// Lets those who wait look again.
    pub(crate) fn wake(&self) {
        self.grown.notify_waiters();
        self.synced_more.notify_waiters();
    }

    /// The lowest index that somebody needs of the log: those who read it, and where changes are passed on
    /// to a broker whoever leads next and publishes. `u64::MAX` for none.
    pub(crate) fn needs(&self, publishes: bool, now_us: u64) -> u64 {
        let places = self.places.lock();
        let readers = places.iter().filter(|one| one.until_us > now_us).map(|one| one.index + 1);
        let cursor = publishes.then(|| self.unconfirmed.load(Ordering::Relaxed));
        readers.chain(cursor).min().unwrap_or(u64::MAX)
    }

    /// There is no replica here any more.
    pub(crate) fn left(&self) {
        self.end();
        self.places.lock().clear();
        for place in [&self.confirmed, &self.cursor, &self.synced] {
            *place.lock() = Cursor::default();
        }
        self.set_unconfirmed(0);
        self.wake();
    }
}
