//! What the evaluation of commands sees and changes: a partition's table as it will be once
//! everything in flight is applied.
//!
//! A write takes no effect on the table when it is evaluated. It becomes an effect in the open batch
//! of `InFlight`, which the replica proposes to the log; `apply` carries out a batch that was
//! committed, on the leader as on any other replica. The answer to a write that may be sent again goes
//! with its effects, and is found when it is: `repeated` before an evaluation, `remember` after it. This
//! module does not know commands (`evaluate` does) and does not decide when a batch is closed or proposed.

mod in_flight;
mod index;
mod previous;
#[cfg(test)]
mod tests;

use crate::effect::{Cursor, EFFECT_OVERHEAD_BYTES, Effect, EffectError, Part, Parts, Reason};
use crate::session::{Sessions, decode_answer};
use crate::store::{Entry, KeyHash, Memory, Position, Table};
use crate::{Error, Once, Reply, Revision, UnixMillis};

pub(crate) use in_flight::Piece;
pub use in_flight::{ClosedBatch, InFlight, Previous};
use in_flight::{Found, Old};

/// The most that one batch may hold, so that it fits a segment of the log. It also bounds what one
/// command or transaction can write, however it multiplies the bytes it was sent with.
pub const MAX_BATCH_BYTES: usize = 48 * 1024 * 1024;

/// Tables that take so many bytes together are in the processor's cache, more or less.
const CACHED_BYTES: u64 = 512 * 1024;

/// Batches of a few usual writes: their owner looks up the keys of several at once.
pub(crate) const SMALL_BATCH_BYTES: usize = 2048;

/// How many effects of a batch are looked up together, so that their cache misses overlap.
const TOUCHED_AHEAD: usize = 32;

/// How many entries a scan of the table looks at between two returns.
const SCAN_ENTRIES: usize = 1024;

/// A partition in the eyes of one turn's evaluations: the table, overlaid by what is in flight.
///
/// What is put or deleted here is seen by later reads, of this draft and of others over the same
/// `InFlight`. Time stands still in a draft.
#[derive(Debug)]
pub struct Draft<'a> {
    table: &'a Table,
    in_flight: &'a mut InFlight,
    memory: &'a Memory,
    now_ms: UnixMillis,
    /// The size of the open batch when this draft began.
    open_before: usize,
}

/// A point to which a draft can be rolled back; only valid before the open batch is closed.
#[derive(Clone, Copy, Debug)]
pub struct Savepoint {
    revision: Revision,
    answer: u64,
}

/// What a write is answered without being evaluated.
#[derive(Clone, Debug, PartialEq)]
pub enum Repeat {
    /// This, at once. The write is an old one, and the answer is that of the first time, or
    /// `Error::AnswerGone` if it is not known any more; or there is no room to remember the answer.
    Now(Reply),
    /// This, but not before all that is in flight by now is applied: the first one is among it.
    InFlight(Reply),
}

impl<'a> Draft<'a> {
    /// A draft over a table and what is in flight to it.
    pub fn new(
        table: &'a Table,
        in_flight: &'a mut InFlight,
        memory: &'a Memory,
        now_ms: UnixMillis,
    ) -> Draft<'a> {
        let open_before = in_flight.open_bytes();
        Draft { table, in_flight, memory, now_ms, open_before }
    }

    /// The time at which everything here happens.
    pub fn now_ms(&self) -> UnixMillis {
        self.now_ms
    }

    /// The table as it is, without what is in flight.
    pub fn table(&self) -> &Table {
        self.table
    }

    /// Reads a key's newest state, in-flight writes included. An expired key is absent.
    pub fn read<R>(&self, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        self.newest(self.table.hash(key), key, |entry| {
            f(entry.filter(|entry| !entry.is_expired(self.now_ms)))
        })
    }

    /// Gives a key a value and an expiry. Key and value must be within the limits.
    pub fn put(&mut self, key: &[u8], value: &[u8], expires_at_ms: Option<UnixMillis>) -> Revision {
        let hash = self.table.hash(key);
        self.remove_expired(hash, key);
        self.in_flight.put(self.now_ms, (hash, key), value, expires_at_ms)
    }

    /// Gives `target` a value that is made of pieces of the one of `source`, which must not be absent
    /// when there are any, and which may be the same key. An old value is copied once, from where it
    /// is into the batch.
    pub(crate) fn put_pieces(
        &mut self,
        source: &[u8],
        target: &[u8],
        pieces: &[Piece<'_>],
        expires_at_ms: Option<UnixMillis>,
    ) -> Revision {
        let hash = self.table.hash(target);
        self.remove_expired(hash, target);
        let Draft { table, in_flight, now_ms, .. } = self;
        let source_hash = if source == target { hash } else { table.hash(source) };
        let put = |in_flight: &mut InFlight, old: Old<'_>| {
            in_flight.put_pieces(*now_ms, (hash, target), old, pieces, expires_at_ms)
        };
        match in_flight.find(source_hash, source) {
            Some(revision) => put(in_flight, Old::InFlight(revision)),
            None => table.read(source_hash, source, |entry| {
                put(in_flight, Old::Value(entry.map_or(&[], |entry| entry.value)))
            }),
        }
    }

    /// Deletes a key, which should be there: a delete of an absent key takes a revision too.
    pub fn delete(&mut self, key: &[u8], reason: Reason) -> Revision {
        self.in_flight.delete(self.now_ms, (self.table.hash(key), key), reason)
    }

    /// Deletes what is expired of the table's keys at these positions, and returns how many that were.
    /// A key that is written in flight is left alone: what it is then has a time of its own.
    pub fn expire_at(&mut self, positions: &[Position]) -> usize {
        let Draft { table, in_flight, now_ms, .. } = self;
        let before = in_flight.next_revision();
        for group in positions.chunks(TOUCHED_AHEAD) {
            if table.memory().used() > CACHED_BYTES {
                std::hint::black_box(table.touch(group));
            }
            for &position in group {
                table.at_position(position, |entry| {
                    let hash = table.hash(entry.key);
                    if entry.is_expired(*now_ms) && in_flight.find(hash, entry.key).is_none() {
                        in_flight.delete(*now_ms, (hash, entry.key), Reason::Expired);
                    }
                });
            }
        }
        (in_flight.next_revision() - before) as usize
    }

    /// Deletes up to `limit` keys, expired ones included, and returns how many; less than `limit` means
    /// that none is left. A batch that is full ends it early, and then it answers `limit`.
    pub fn clear(&mut self, limit: usize) -> usize {
        let before = self.in_flight.next_revision();
        self.clear_in_flight(limit);
        let Draft { table, in_flight, now_ms, .. } = self;
        let mut position = Some(Position(0));
        let full = |in_flight: &InFlight| {
            let removed = (in_flight.next_revision() - before) as usize;
            removed >= limit || in_flight.open_bytes() >= MAX_BATCH_BYTES
        };
        while let Some(at) = position.filter(|_| !full(in_flight)) {
            position = table.scan(at, SCAN_ENTRIES, |entry| {
                let hash = table.hash(entry.key);
                if !full(in_flight) && in_flight.find(hash, entry.key).is_none() {
                    let reason = reason_to_delete(&entry, *now_ms);
                    in_flight.delete(*now_ms, (hash, entry.key), reason);
                }
            });
        }
        let removed = (self.in_flight.next_revision() - before) as usize;
        // There may be more than fits this batch.
        if self.in_flight.open_bytes() >= MAX_BATCH_BYTES { limit } else { removed }
    }

    /// Whether there is memory for so many bytes more, with everything in flight counted, and room in
    /// the batch. To be asked before a put that adds data; nothing else is ever refused.
    pub fn admit(&self, additional_bytes: usize) -> Result<(), Error> {
        self.check_room(additional_bytes)?;
        let limit = self.memory.limit();
        let in_flight = self.in_flight.bytes() as u64;
        if limit != 0 && self.memory.used() + in_flight + additional_bytes as u64 > limit {
            return Err(Error::OutOfMemory { limit });
        }
        Ok(())
    }

    /// Whether there is room in the batch for a key and value of so many bytes together. To be asked
    /// before a put that adds no data, such as a change of expiry.
    ///
    /// What does not fit a batch at all is too large; what only finds this batch too full may come again.
    pub(crate) fn check_room(&self, bytes: usize) -> Result<(), Error> {
        let (open, needed) = (self.in_flight.open_bytes(), bytes + EFFECT_OVERHEAD_BYTES);
        let own = open.saturating_sub(self.open_before) + needed;
        if own > MAX_BATCH_BYTES {
            return Err(Error::WriteTooLarge(own));
        }
        if open + needed > MAX_BATCH_BYTES {
            return Err(Error::Overloaded);
        }
        Ok(())
    }

    /// What a write is to be answered instead of being evaluated; `None` if it is new, and then its
    /// answer must be given to `remember` before another write is looked at.
    pub fn repeated(&self, sessions: &Sessions, once: &Once) -> Option<Repeat> {
        if let Some(reply) = sessions.answer(once) {
            return Some(Repeat::Now(reply));
        }
        if let Some(reply) = self.in_flight.find_answer(self.table, once) {
            return Some(match decode_answer(reply) {
                gone @ Reply::Error(_) => Repeat::Now(gone),
                reply => Repeat::InFlight(reply),
            });
        }
        let full = self.in_flight.open_bytes() >= MAX_BATCH_BYTES;
        full.then_some(Repeat::Now(Reply::Error(Error::Overloaded)))
    }

    /// Adds the answer to a write to the batch that the write's effects are in. An error is not
    /// remembered: nothing was done, so the write may be evaluated again.
    pub fn remember(&mut self, once: &Once, reply: &Reply) {
        if !matches!(reply, Reply::Error(_)) {
            self.in_flight.answer(self.now_ms, self.table, once, reply);
        }
    }

    /// Where to roll back to.
    pub fn savepoint(&self) -> Savepoint {
        let (revision, answer) = (self.in_flight.next_revision(), self.in_flight.next_answer());
        Savepoint { revision, answer }
    }

    /// Takes back everything written since the savepoint; its revisions will be given out again.
    pub fn rollback(&mut self, savepoint: Savepoint) {
        self.in_flight.take_back(self.table, savepoint.revision, savepoint.answer);
    }

    /// A key's newest state, even if it is expired.
    fn newest<R>(&self, hash: KeyHash, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        match self.in_flight.find(hash, key) {
            Some(revision) => f(entry_of(&self.in_flight.at(revision))),
            None => self.table.read(hash, key, f),
        }
    }

    /// A put over an expired key first says that the old one is gone, so that whoever follows the
    /// effects sees a key end before it begins anew. Without volatile entries this costs nothing.
    fn remove_expired(&mut self, hash: KeyHash, key: &[u8]) {
        if !self.in_flight.has_volatile() && self.table.volatile_len() == 0 {
            return;
        }
        let is_expired = |entry: Entry<'_>| entry.is_expired(self.now_ms);
        if self.newest(hash, key, |entry| entry.is_some_and(is_expired)) {
            self.in_flight.delete(self.now_ms, (hash, key), Reason::Expired);
        }
    }

    /// Deletes up to `limit` of the keys whose newest state is a put in flight.
    fn clear_in_flight(&mut self, limit: usize) {
        let mut removed = 0;
        for revision in self.in_flight.revisions() {
            if removed == limit || self.in_flight.open_bytes() >= MAX_BATCH_BYTES {
                return;
            }
            let found = self.in_flight.at(revision);
            let Some(entry) = entry_of(&found) else {
                continue;
            };
            let hash = self.table.hash(entry.key);
            if self.in_flight.find(hash, entry.key) == Some(revision) {
                let reason = reason_to_delete(&entry, self.now_ms);
                // The key is in the very buffers that the delete is added to.
                let key = entry.key.to_vec();
                self.in_flight.delete(self.now_ms, (hash, &key), reason);
                removed += 1;
            }
        }
    }
}

fn reason_to_delete(entry: &Entry<'_>, now_ms: UnixMillis) -> Reason {
    if entry.is_expired(now_ms) { Reason::Expired } else { Reason::Explicit }
}

/// The entry that an effect leaves behind.
fn entry_of<'a>(found: &Found<'a>) -> Option<Entry<'a>> {
    match found.effect {
        Effect::Put { key, value, expires_at_ms } => Some(Entry {
            key,
            value,
            version: found.revision,
            expires_at_ms,
            written_at_s: unix_seconds(found.committed_at_ms),
        }),
        Effect::Delete { .. } => None,
    }
}

/// What is reached with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The revision of its last effect; the one before it if it has none.
    pub revision: Revision,
    /// How far changes have been passed on, if the batch says so.
    pub cursor: Option<Cursor>,
}

/// Applies a committed batch to the table and the sessions. `last` is the revision that was applied last.
/// `on_effect` sees each effect after it took place.
///
/// # Errors
///
/// A batch that does not follow on `last`, or cannot be decoded, must stop the replica: the table may
/// show a part of it.
pub fn apply(
    table: &Table,
    sessions: &mut Sessions,
    last: Revision,
    payload: &[u8],
    mut on_effect: impl FnMut(Revision, KeyHash, &Effect<'_>),
) -> Result<Applied, EffectError> {
    let parts = Parts::new(payload)?;
    let (expected, found) = (last + 1, parts.next_revision());
    if expected != found {
        return Err(EffectError::Revision { expected, found });
    }
    let committed_at_ms = parts.committed_at_ms();
    let written_at_s = unix_seconds(committed_at_ms);
    sessions.advance(committed_at_ms);
    let ahead = if table.memory().used() > CACHED_BYTES { TOUCHED_AHEAD } else { 1 };
    let mut applied = Applied { revision: last, cursor: None };
    let mut parts = parts.peekable();
    let (mut group, mut positions) = (Vec::with_capacity(ahead), Vec::with_capacity(ahead));
    while parts.peek().is_some() {
        for part in parts.by_ref().take(ahead) {
            let (revision, effect) = match part? {
                Part::Effect(revision, effect) => (revision, effect),
                Part::Answer { once, reply } => {
                    sessions.remember(&once, reply, committed_at_ms);
                    continue;
                }
                Part::Cursor(cursor) => {
                    applied.cursor = applied.cursor.max(Some(cursor));
                    continue;
                }
                // For readers of changes.
                Part::Trace(_) | Part::PreviousVersions(_) | Part::PreviousValues(_) => continue,
            };
            let hash = table.hash(effect.key());
            positions.push(hash.position());
            group.push((revision, hash, effect));
        }
        if group.len() > 1 {
            std::hint::black_box(table.touch(&positions));
        }
        positions.clear();
        for (revision, hash, effect) in group.drain(..) {
            match effect {
                Effect::Put { key, value, expires_at_ms } => {
                    let version = revision;
                    table.put(hash, Entry { key, value, version, expires_at_ms, written_at_s });
                }
                Effect::Delete { key, .. } => {
                    table.remove(hash, key);
                }
            }
            on_effect(revision, hash, &effect);
            applied.revision = revision;
        }
    }
    Ok(applied)
}

/// Whole seconds, in the width of `Entry::written_at_s`, which lasts until 2106.
fn unix_seconds(ms: UnixMillis) -> u32 {
    u32::try_from(ms / 1000).unwrap_or(u32::MAX)
}
