//! The writes of a partition that its table does not show yet.
//!
//! The leader evaluates commands into the open batch, closes it when it proposes it, and has several
//! closed batches in flight until each is committed and applied. Reads look here before they look at
//! the table. Keys and values stay where they are, in the batches' payloads: the index knows a key's
//! newest effect by its revision, and a batch knows where each of its effects starts. In the same way
//! answers that must be remembered are numbered and found by session and sequence.
//!
//! What this does not do: decide when to close a batch or how many may be in flight (the replica
//! does), or judge expiry (`Draft` does, which has the time).

use std::collections::VecDeque;
use std::ops::Range;

use super::index::Index;
use crate::effect::{
    BatchWriter, Cursor, Effect, NO_TRACE, PREVIOUS_VERSION_BYTES, Reason, Trace, decode_answer_at,
    decode_at,
};
use crate::session::{Once, encode_answer};
use crate::store::{KeyHash, Table};
use crate::{Reply, Revision, UnixMillis};

/// Buffers of applied batches that are kept for the next ones: so many, of at most this size.
const SPARE_BATCHES: usize = 4;
pub(super) const SPARE_BYTES: usize = 1024 * 1024;

/// A trace in a batch, with its kind.
const TRACE_BYTES: usize = 1 + size_of::<Trace>();

/// The batches that were evaluated and not applied yet, and the counter of revisions.
///
/// Revisions are dense: the next one is that of the last applied effect, plus the number of effects
/// in flight, plus one. A batch may hold nothing but answers, and no revision then.
#[derive(Debug)]
pub struct InFlight {
    pub(super) closed: VecDeque<Batch>,
    pub(super) open: Batch,
    spare: Vec<Batch>,
    index: Index,
    closed_bytes: usize,
    /// How many puts in flight have an expiry.
    volatile: usize,
    pub(super) applied: Revision,
    next: Revision,
    /// Of the effects to come; zeros for none.
    trace: Trace,
    /// By session and sequence, of answers that are numbered like revisions, from 1 at the start.
    answers: Index,
    /// The number of the oldest answer in flight, and of the next one.
    first_answer: u64,
    next_answer: u64,
    /// An answer or previous values being encoded; kept for its capacity.
    pub(super) encoded: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Batch {
    committed_at_ms: UnixMillis,
    pub(super) first_revision: Revision,
    /// The number of its first answer.
    first_answer: u64,
    /// Without a header while the batch is empty.
    pub(super) writer: BatchWriter,
    pub(super) effects: Vec<Placed>,
    /// Where its answers are in the payload.
    answers: Vec<u32>,
    /// Where traces are in the payload; each is right before an effect.
    traces: Vec<u32>,
    /// The cursor, and where it is in the payload.
    cursor: Option<(Cursor, u32)>,
    volatile: usize,
}

/// An effect in a batch's payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    offset: u32,
    /// How many revisions before this one the key's previous in-flight effect is; 0 if there was none.
    pub(super) back: u32,
}

/// A batch as it goes into the log.
#[derive(Clone, Copy, Debug)]
pub struct ClosedBatch<'a> {
    /// The revision of its first effect; if it has none, the one that is next.
    pub first_revision: Revision,
    /// The revision of the last effect in or before it, which `InFlight::applied` is called with in due
    /// time.
    pub last_revision: Revision,
    /// What to propose.
    pub payload: &'a [u8],
}

/// What a batch is to say of what its keys had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Previous {
    /// Nothing: it reads as if the keys had been absent.
    Nothing,
    /// Their versions.
    Versions,
    /// Their versions and their values.
    Values,
}

/// An in-flight effect with what its batch knows of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    pub(super) revision: Revision,
    pub(super) effect: Effect<'a>,
    pub(super) committed_at_ms: UnixMillis,
}

/// A part of a value that is built from an old one.
#[derive(Clone, Debug)]
pub(crate) enum Piece<'a> {
    /// These bytes of the old value.
    Old(Range<usize>),
    /// Other bytes.
    New(&'a [u8]),
    /// So many zero bytes.
    Zeros(usize),
}

impl Piece<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Piece::Old(range) => range.len(),
            Piece::New(bytes) => bytes.len(),
            &Piece::Zeros(count) => count,
        }
    }
}

/// Where an old value is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Old<'a> {
    Value(&'a [u8]),
    /// The value that the effect of this revision puts.
    InFlight(Revision),
}

impl InFlight {
    /// Nothing in flight after this revision; 0 for a partition that was never written.
    pub fn new(applied: Revision) -> InFlight {
        InFlight {
            closed: VecDeque::new(),
            open: Batch::default(),
            spare: Vec::new(),
            index: Index::new(applied + 1),
            closed_bytes: 0,
            volatile: 0,
            applied,
            next: applied + 1,
            trace: NO_TRACE,
            answers: Index::new(1),
            first_answer: 1,
            next_answer: 1,
            encoded: Vec::new(),
        }
    }

    /// The revision that the next effect takes.
    pub fn next_revision(&self) -> Revision {
        self.next
    }

    /// Whether every effect and every answer is applied.
    pub fn is_empty(&self) -> bool {
        !self.has_effects() && self.next_answer == self.first_answer
    }

    /// Whether some effect is not applied.
    fn has_effects(&self) -> bool {
        self.next != self.applied + 1
    }

    /// The size of the open batch's payload once it is closed, at most and without previous values; 0 when
    /// nothing is in it.
    pub fn open_bytes(&self) -> usize {
        match self.open.effects.len() {
            0 => self.open.bytes(),
            count => self.open.bytes() + 1 + count * PREVIOUS_VERSION_BYTES,
        }
    }

    /// The open batch's payload; empty when nothing is in it.
    pub fn open_payload(&self) -> &[u8] {
        self.open.writer.payload()
    }

    /// The size of all payloads in flight.
    pub fn bytes(&self) -> usize {
        self.closed_bytes + self.open.bytes()
    }

    /// Closes the open batch, which what its keys had before ends, and opens another; `None` when nothing is
    /// in it.
    pub fn close(&mut self, table: &Table, previous: Previous) -> Option<ClosedBatch<'_>> {
        if self.open.is_empty() {
            return None;
        }
        if !self.open.effects.is_empty() && previous != Previous::Nothing {
            self.add_previous_versions(table);
            if previous == Previous::Values {
                self.add_previous_values(table);
            }
        }
        let batch = std::mem::replace(&mut self.open, self.spare.pop().unwrap_or_default());
        self.closed_bytes += batch.bytes();
        self.closed.push_back(batch);
        let batch = self.closed.back()?;
        Some(ClosedBatch {
            first_revision: batch.first_revision,
            last_revision: batch.last_revision(),
            payload: batch.writer.payload(),
        })
    }

    /// Says where the effects to come are from.
    pub fn set_trace(&mut self, trace: Option<&Trace>) {
        self.trace = trace.copied().unwrap_or(NO_TRACE);
    }

    /// Adds a cursor to the open batch, in the place of one that is there.
    pub fn set_cursor(&mut self, now_ms: UnixMillis, cursor: Cursor) {
        self.start_batch(now_ms);
        let offset = match self.open.cursor {
            Some((_, offset)) => {
                self.open.writer.replace_cursor(offset as usize, &cursor);
                offset
            }
            None => offset_of(self.open.writer.cursor(&cursor)),
        };
        self.open.cursor = Some((cursor, offset));
    }

    /// The newest cursor in flight.
    pub fn cursor(&self) -> Option<Cursor> {
        let batches = self.closed.iter().chain([&self.open]);
        batches.filter_map(|batch| batch.cursor.map(|(cursor, _)| cursor)).max()
    }

    /// A batch was applied, and the table now shows everything up to this revision: the oldest closed
    /// batch is forgotten. To be called for each batch. On a replica that has nothing in flight this
    /// follows the revisions that others gave out.
    ///
    /// # Panics
    /// When it is not the oldest batch that this is the last revision of, or that one is not closed.
    pub fn applied(&mut self, revision: Revision) {
        if let Some(batch) = self.closed.pop_front() {
            assert!(batch.last_revision() == revision, "a batch is applied as a whole");
            self.closed_bytes -= batch.bytes();
            self.volatile -= batch.volatile;
            self.answers_applied(batch.answers.len());
            self.recycle(batch);
        } else if self.open.is_empty() {
            self.next = revision + 1;
        } else {
            let follows = revision + 1 == self.open.first_revision;
            assert!(follows, "what is in flight follows on what is applied");
        }
        self.applied = revision;
        if self.has_effects() {
            self.index.applied(revision + 1);
        } else {
            self.index.reset(revision + 1);
        }
    }

    fn answers_applied(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        self.first_answer += count as u64;
        if self.first_answer == self.next_answer {
            self.answers.reset(self.first_answer);
        } else {
            self.answers.applied(self.first_answer);
        }
    }

    /// Forgets the open batch, whose revisions will be given out again. For when it cannot be
    /// proposed: its commands must be answered with an error.
    pub fn discard_open(&mut self, table: &Table) {
        let first = self.next - self.open.effects.len() as u64;
        let first_answer = self.next_answer - self.open.answers.len() as u64;
        self.take_back(table, first, first_answer);
        // There may be a cursor left.
        self.open = std::mem::take(&mut self.open).emptied();
    }

    /// Forgets every batch that is not applied, for when the partition's leadership is lost.
    pub fn discard_all(&mut self) {
        while let Some(batch) = self.closed.pop_front() {
            self.recycle(batch);
        }
        self.open = std::mem::take(&mut self.open).emptied();
        self.closed_bytes = 0;
        self.volatile = 0;
        self.next = self.applied + 1;
        self.index.clear(self.next);
        self.first_answer = self.next_answer;
        self.answers.reset(self.next_answer);
    }

    /// Takes back the open batch's effects from this revision on, and its answers from this number on:
    /// all that was added to it after some point.
    pub(super) fn take_back(&mut self, table: &Table, from: Revision, from_answer: u64) {
        let mut end = self.open.bytes();
        while self.next_answer > from_answer {
            let offset = self.open.answers.pop().expect("only the open batch is taken back");
            self.next_answer -= 1;
            let (once, _) = self.open.answer_at(offset);
            self.answers.take_back(hash_of(table, &once).0, self.next_answer, None);
            end = end.min(offset as usize);
        }
        while self.next > from {
            let placed = self.open.effects.pop().expect("only the open batch is taken back");
            self.next -= 1;
            let effect = self.open.effect_at(placed);
            let previous = (placed.back > 0).then(|| self.next - u64::from(placed.back));
            self.index.take_back(table.hash(effect.key()).0, self.next, previous);
            let volatile = usize::from(is_volatile(&effect));
            self.open.volatile -= volatile;
            self.volatile -= volatile;
            end = end.min(placed.offset as usize);
        }
        let end = self.open.end_before_trace(end);
        self.open.cursor = self.open.cursor.filter(|(_, offset)| (*offset as usize) < end);
        let Batch { effects, answers, cursor, .. } = &self.open;
        if effects.is_empty() && answers.is_empty() && cursor.is_none() {
            self.open = std::mem::take(&mut self.open).emptied();
        } else {
            self.open.writer.truncate(end);
        }
    }

    /// The number that the next answer gets.
    pub(super) fn next_answer(&self) -> u64 {
        self.next_answer
    }

    /// The answer in flight to a write, as `session` encodes it.
    pub(super) fn find_answer(&self, table: &Table, once: &Once) -> Option<&[u8]> {
        if self.next_answer == self.first_answer {
            return None;
        }
        let (closed, open) = (&self.closed, &self.open);
        let number = self.answers.find(hash_of(table, once).0, |number| {
            is_same(&answer(closed, open, number).0, once)
        })?;
        Some(answer(closed, open, number).1)
    }

    /// Adds the answer to a write, which has none in flight, to the open batch.
    pub(super) fn answer(&mut self, now_ms: UnixMillis, table: &Table, once: &Once, reply: &Reply) {
        self.start_batch(now_ms);
        self.encoded.clear();
        if !encode_answer(reply, &mut self.encoded) {
            self.encoded.clear();
        }
        let offset = self.open.writer.answer(once, &self.encoded);
        let number = self.next_answer;
        self.next_answer += 1;
        let (closed, open) = (&self.closed, &self.open);
        let previous = self.answers.insert(hash_of(table, once).0, number, |other| {
            is_same(&answer(closed, open, other).0, once)
        });
        assert!(previous.is_none(), "a write is answered once");
        self.open.answers.push(offset_of(offset));
    }

    /// Whether some put in flight has an expiry.
    pub(super) fn has_volatile(&self) -> bool {
        self.volatile > 0
    }

    /// The revisions that are in flight.
    pub(super) fn revisions(&self) -> Range<Revision> {
        self.applied + 1..self.next
    }

    /// The revision of a key's newest effect in flight.
    pub(super) fn find(&self, hash: KeyHash, key: &[u8]) -> Option<Revision> {
        if !self.has_effects() {
            return None;
        }
        self.index.find(hash.0, |revision| self.at(revision).effect.key() == key)
    }

    /// The effect of a revision that is in flight.
    pub(super) fn at(&self, revision: Revision) -> Found<'_> {
        let batch = batch_of(&self.closed, &self.open, revision);
        Found { revision, effect: batch.effect(revision), committed_at_ms: batch.committed_at_ms }
    }

    /// Adds a put to the open batch.
    pub(super) fn put(
        &mut self,
        now_ms: UnixMillis,
        (hash, key): (KeyHash, &[u8]),
        value: &[u8],
        expires_at_ms: Option<UnixMillis>,
    ) -> Revision {
        self.start_effect(now_ms);
        let offset = self.open.writer.put(key, value, expires_at_ms);
        self.place(hash, key, offset, expires_at_ms.is_some())
    }

    /// Adds a put whose value is made of pieces, some of them of `old`.
    pub(super) fn put_pieces(
        &mut self,
        now_ms: UnixMillis,
        (hash, key): (KeyHash, &[u8]),
        old: Old<'_>,
        pieces: &[Piece<'_>],
        expires_at_ms: Option<UnixMillis>,
    ) -> Revision {
        self.start_effect(now_ms);
        let value_bytes = pieces.iter().map(Piece::len).sum();
        let InFlight { closed, open, .. } = self;
        // Where the old value is in the open payload itself, which grows while it is copied from.
        let mut within = None;
        let old = match old {
            Old::Value(value) => value,
            Old::InFlight(revision) if revision >= open.first_revision => {
                within = Some(open.value_range(revision));
                &[]
            }
            Old::InFlight(revision) => {
                let batch = closed_batch(closed, revision);
                &batch.writer.payload()[batch.value_range(revision)]
            }
        };
        let offset = open.writer.put_built(key, value_bytes, expires_at_ms, |payload| {
            for piece in pieces {
                match (piece, &within) {
                    (Piece::New(bytes), _) => payload.extend_from_slice(bytes),
                    (Piece::Zeros(count), _) => payload.resize(payload.len() + count, 0),
                    (Piece::Old(range), None) => payload.extend_from_slice(&old[range.clone()]),
                    (Piece::Old(range), Some(value)) => payload
                        .extend_from_within(value.start + range.start..value.start + range.end),
                }
            }
        });
        self.place(hash, key, offset, expires_at_ms.is_some())
    }

    /// Adds a delete to the open batch.
    pub(super) fn delete(
        &mut self,
        now_ms: UnixMillis,
        (hash, key): (KeyHash, &[u8]),
        reason: Reason,
    ) -> Revision {
        self.start_effect(now_ms);
        let offset = self.open.writer.delete(key, reason);
        self.place(hash, key, offset, false)
    }

    fn start_batch(&mut self, now_ms: UnixMillis) {
        if self.open.is_empty() {
            self.open.writer.start(now_ms, self.next);
            self.open.committed_at_ms = now_ms;
            self.open.first_revision = self.next;
            self.open.first_answer = self.next_answer;
        }
    }

    fn start_effect(&mut self, now_ms: UnixMillis) {
        self.start_batch(now_ms);
        if self.trace != *self.open.trace() {
            let offset = self.open.writer.trace(&self.trace);
            self.open.traces.push(offset_of(offset));
        }
    }

    fn place(&mut self, hash: KeyHash, key: &[u8], offset: usize, volatile: bool) -> Revision {
        let revision = self.next;
        self.next += 1;
        let (closed, open) = (&self.closed, &self.open);
        let previous = self.index.insert(hash.0, revision, |other| {
            batch_of(closed, open, other).effect(other).key() == key
        });
        let back = previous.map_or(0, |previous| revision - previous);
        let back = u32::try_from(back).expect("fewer effects in flight than bytes in memory");
        self.open.effects.push(Placed { offset: offset_of(offset), back });
        self.open.volatile += usize::from(volatile);
        self.volatile += usize::from(volatile);
        revision
    }

    fn recycle(&mut self, batch: Batch) {
        let batch = batch.emptied();
        if self.spare.len() < SPARE_BATCHES && batch.writer.capacity() <= SPARE_BYTES {
            self.spare.push(batch);
        }
    }
}

fn batch_of<'a>(closed: &'a VecDeque<Batch>, open: &'a Batch, revision: Revision) -> &'a Batch {
    if !open.effects.is_empty() && revision >= open.first_revision {
        return open;
    }
    closed_batch(closed, revision)
}

fn closed_batch(closed: &VecDeque<Batch>, revision: Revision) -> &Batch {
    let batch = closed.iter().rev().find(|batch| batch.first_revision <= revision);
    batch.expect("the revision is in flight")
}

fn offset_of(offset: usize) -> u32 {
    u32::try_from(offset).expect("`MAX_BATCH_BYTES` bounds a batch")
}

/// The answer of a number that is in flight.
fn answer<'a>(closed: &'a VecDeque<Batch>, open: &'a Batch, number: u64) -> (Once, &'a [u8]) {
    let in_open = !open.answers.is_empty() && number >= open.first_answer;
    let batch = if in_open {
        open
    } else {
        let batch = closed.iter().rev().find(|batch| batch.first_answer <= number);
        batch.expect("the answer is in flight")
    };
    batch.answer_at(batch.answers[(number - batch.first_answer) as usize])
}

fn hash_of(table: &Table, once: &Once) -> KeyHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&once.session.to_le_bytes());
    bytes[8..].copy_from_slice(&once.sequence.to_le_bytes());
    table.hash(&bytes)
}

fn is_same(one: &Once, other: &Once) -> bool {
    (one.session, one.sequence) == (other.session, other.sequence)
}

fn is_volatile(effect: &Effect<'_>) -> bool {
    matches!(effect, Effect::Put { expires_at_ms: Some(_), .. })
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.writer.payload().is_empty()
    }

    fn bytes(&self) -> usize {
        self.writer.payload().len()
    }

    fn last_revision(&self) -> Revision {
        self.first_revision + self.effects.len() as u64 - 1
    }

    fn effect(&self, revision: Revision) -> Effect<'_> {
        self.effect_at(self.effects[(revision - self.first_revision) as usize])
    }

    pub(super) fn effect_at(&self, placed: Placed) -> Effect<'_> {
        decode_at(self.writer.payload(), placed.offset as usize).expect("the writer encoded it").0
    }

    fn answer_at(&self, offset: u32) -> (Once, &[u8]) {
        let decoded = decode_answer_at(self.writer.payload(), offset as usize);
        let (once, reply, _) = decoded.expect("the writer encoded it");
        (once, reply)
    }

    /// Where the value of a put is in the payload.
    fn value_range(&self, revision: Revision) -> Range<usize> {
        let placed = self.effects[(revision - self.first_revision) as usize];
        let decoded = decode_at(self.writer.payload(), placed.offset as usize);
        let (effect, end) = decoded.expect("the writer encoded it");
        match effect {
            Effect::Put { value, .. } => end - value.len()..end,
            Effect::Delete { .. } => end..end,
        }
    }

    /// The trace of the last effect.
    fn trace(&self) -> &Trace {
        let bytes = self.traces.last().map(|offset| &self.writer.payload()[*offset as usize + 1..]);
        bytes.and_then(|bytes| bytes.first_chunk()).unwrap_or(&NO_TRACE)
    }

    /// Where what is to be taken back from `end` on begins: a trace goes with the effect right after it.
    fn end_before_trace(&mut self, mut end: usize) -> usize {
        while let Some(trace) = self.traces.pop_if(|at| *at as usize + TRACE_BYTES >= end) {
            end = end.min(trace as usize);
        }
        end
    }

    /// An empty batch that uses the same buffers.
    fn emptied(mut self) -> Batch {
        self.effects.clear();
        self.answers.clear();
        self.traces.clear();
        let writer = BatchWriter::new(self.writer.into_inner());
        let Batch { effects, answers, traces, .. } = self;
        Batch { writer, effects, answers, traces, ..Batch::default() }
    }
}
