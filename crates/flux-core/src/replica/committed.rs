//! Committed entries, on every replica alike: their effects go to the table, whoever waits for one is
//! answered, and entries that nobody will ask for are dropped.
//!
//! What a change of members does is in `group`, and recovery, which has no running replica, applies entries
//! by itself.

use raft::eraftpb::{Entry, EntryType};

use super::batches::refused;
use super::{Broken, Position, Replica, Replies};
use crate::Error;
use crate::draft::{Previous, SMALL_BATCH_BYTES, apply};
use crate::effect::{Effect, Effects};
use crate::feed::Committed;

impl<W> Replica<W> {
    /// Appends where the keys of the next entries to be applied are in the table, if those are few: for
    /// the owner to look up those of all its replicas together. Many are looked up when they are applied.
    pub fn next_positions(&self, positions: &mut Vec<crate::store::Position>) {
        if !self.proposed.is_empty() && self.previous() != Previous::Nothing {
            // They were looked up when they were proposed.
            return;
        }
        let log = &self.node.raft.raft_log;
        let mut bytes = 0;
        for index in self.applied.index + 1..=log.committed.min(log.persisted) {
            let Some(entry) = self.node.store().entry(index) else { return };
            bytes += entry.data.len();
            if bytes > SMALL_BATCH_BYTES {
                return;
            }
            let Ok(effects) = Effects::new(&entry.data) else { continue };
            let keys = effects.flatten().map(|(_, one)| self.table.hash(one.key()).position());
            positions.extend(keys);
        }
    }

    /// The same of the open batch, if `propose` will look up its keys.
    pub fn open_positions(&self, positions: &mut Vec<crate::store::Position>) {
        let payload = self.in_flight.open_payload();
        let is_small = (1..=SMALL_BATCH_BYTES).contains(&payload.len());
        if !is_small || self.previous() == Previous::Nothing {
            return;
        }
        let Ok(effects) = Effects::new(payload) else { return };
        let keys = effects.flatten().map(|(_, one)| self.table.hash(one.key()).position());
        positions.extend(keys);
    }

    /// Keeps committed entries with effects for [`take_committed`](Replica::take_committed), from the next
    /// one on, or no more; and has previous versions in what is proposed. Whoever asks for it has to take them
    /// after every `ready`.
    pub fn set_capture(&mut self, captures: bool) {
        self.captures = captures;
        if !captures {
            self.captured = Vec::new();
        }
    }

    /// Whether it keeps them.
    pub fn captures(&self) -> bool {
        self.captures
    }

    /// Appends the entries with effects that were applied since the last time, in order. They follow on each
    /// other, but after a snapshot that was installed: those before it are not to be had any more.
    pub fn take_committed(&mut self, committed: &mut Vec<Committed>) {
        committed.append(&mut self.captured);
    }

    pub(super) fn apply(&mut self, entry: Entry, replies: &mut Replies<W>) -> Result<(), Broken> {
        let position = Position { index: entry.index, term: entry.term };
        let proposed = self.proposed.front().map(|batch| batch.position);
        let own = proposed == Some(position);
        if !own && proposed.is_some_and(|proposed| proposed.index <= position.index) {
            // Another leader's entry took the place of ours: what we proposed is void.
            self.in_flight.discard_all();
            let void = self.proposed.drain(..).flat_map(|batch| batch.replies).collect();
            replies.extend(refused(void, &Error::NotLeader));
        }
        match entry.entry_type() {
            EntryType::EntryNormal if entry.data.is_empty() => {}
            EntryType::EntryNormal => self.apply_effects(position, entry.data)?,
            _ => self.apply_change(position.index, &entry.data)?,
        }
        self.applied = position;
        if own && let Some(batch) = self.proposed.pop_front() {
            replies.extend(batch.replies);
        }
        Ok(())
    }

    fn apply_effects(&mut self, position: Position, payload: Vec<u8>) -> Result<(), Broken> {
        let wheel = &mut self.wheel;
        let sessions = &mut self.sessions;
        let last = self.revision;
        let applied = apply(&self.table, sessions, last, &payload, |_, hash, effect| {
            if let Effect::Put { expires_at_ms: Some(expires_at_ms), .. } = effect {
                wheel.insert(*expires_at_ms, hash.position());
            }
        })
        .map_err(|error| Broken::Effects { position, error })?;
        self.revision = applied.revision;
        self.cursor = self.cursor.max(applied.cursor.unwrap_or_default());
        self.in_flight.applied(self.revision);
        if self.captures && self.revision > last {
            self.captured.push(Committed {
                position,
                first: last + 1,
                last: self.revision,
                payload,
            });
        }
        Ok(())
    }

    /// Drops entries that nobody will ask for: those that are applied, but for a tail; a leader keeps
    /// more for followers that are behind, within bounds.
    pub(super) fn truncate_entries(&mut self) {
        let applied = self.applied.index.min(self.node.raft.raft_log.applied);
        let tail_bytes = self.tail_bytes;
        if self.node.store().bytes() > tail_bytes || tail_bytes == 0 {
            let needed = self.needed_by_followers().map_or(applied, |index| index.min(applied));
            let bound = self.lagging_bytes();
            let store = self.node.mut_store();
            store.truncate(needed, tail_bytes);
            store.truncate(applied, bound);
        }
        self.judge_snapshot();
    }
}
