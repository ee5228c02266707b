//! Expiry on the leader: what is due is deleted by an effect in the log, like any other write.

use super::Replica;
use crate::UnixMillis;
use crate::draft::Draft;
use crate::effect::Effects;
use crate::store::Position;

/// The wheel is rebuilt when it holds this many stale timers besides one for each key that expires.
const STALE_TIMERS: usize = 65_536;

/// When a delete that was refused is tried again.
const RETRY_MS: u64 = 1000;

impl<W> Replica<W> {
    /// Adds deletes of expired keys to the open batch: of at most `limit` due timers. Returns how many
    /// timers it took; as many as `limit` means that more may be due.
    pub fn expire(&mut self, now_ms: UnixMillis, limit: usize) -> usize {
        if !self.leads || self.node.raft.lead_transferee.is_some() {
            return 0;
        }
        self.prune_wheel(now_ms);
        let mut due = std::mem::take(&mut self.due);
        self.wheel.advance(now_ms, limit, &mut due);
        self.in_flight.set_trace(None);
        let mut draft = Draft::new(&self.table, &mut self.in_flight, &self.memory, now_ms);
        draft.expire_at(&due);
        let count = due.len();
        due.clear();
        self.due = due;
        count
    }

    /// When `expire` has something to do next, at the earliest.
    pub fn next_expiry_ms(&self) -> Option<UnixMillis> {
        // Followers leave it to their leader.
        let acts = self.leads && self.node.raft.lead_transferee.is_none();
        acts.then(|| self.wheel.next_due_ms()).flatten()
    }

    /// Gives the keys of the open batch, which is given up, their timers back: those of keys that were
    /// to expire are spent.
    pub(super) fn rearm_timers(&mut self, now_ms: UnixMillis) {
        if self.table.volatile_len() == 0 {
            return;
        }
        let Ok(effects) = Effects::new(self.in_flight.open_payload()) else { return };
        for (_, effect) in effects.flatten() {
            let position = self.table.hash(effect.key()).position();
            self.wheel.insert(now_ms + RETRY_MS, position);
        }
    }

    /// Rebuilds the wheel if most of it is stale.
    pub(super) fn prune_wheel(&mut self, now_ms: UnixMillis) {
        if self.wheel.len() > 2 * self.table.volatile_len() + STALE_TIMERS {
            self.rebuild_wheel(now_ms);
        }
    }

    /// One timer for each key that expires, and no other. Timers are not removed when a key is
    /// rewritten, so without this a key that is rewritten for ever would leave timers for ever.
    pub(super) fn rebuild_wheel(&mut self, now_ms: UnixMillis) {
        self.wheel = crate::wheel::Wheel::new(now_ms);
        if self.table.volatile_len() == 0 {
            return;
        }
        let mut from = Some(Position(0));
        while let Some(position) = from {
            from = self.table.scan(position, 1024, |entry| {
                if let Some(expires_at_ms) = entry.expires_at_ms {
                    let position = self.table.hash(entry.key).position();
                    self.wheel.insert(expires_at_ms, position);
                }
            });
        }
    }
}
