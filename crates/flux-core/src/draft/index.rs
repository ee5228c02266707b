//! Which in-flight effect is the newest of a key: an open-addressing hash table of revisions.
//!
//! It holds no keys and no bytes: a slot is a key's hash and a revision, and the caller compares keys
//! by looking at that revision's effect. It does not order or count anything.
//!
//! Revisions only grow, and applying a batch makes all revisions up to its last one stale. So no
//! slot is ever touched to remove it: a revision below `live_from` is stale and its slot may be taken
//! over, and one below `empty_below` even ends a probe, as a slot that was never used does.

use crate::Revision;

const MIN_SLOTS: usize = 64;

/// Stands for a revision that was taken back; its slot may be taken over, but ends no probe.
const TAKEN_BACK: Revision = Revision::MAX;

#[derive(Clone, Copy, Debug)]
struct Slot {
    hash: u64,
    revision: Revision,
}

/// A map from key to the revision of its newest effect that is not applied.
#[derive(Debug)]
pub(super) struct Index {
    /// None, or a power of two of them, at most half used. A probe starts at the slot of the hash's
    /// low bits and goes on to the next one.
    slots: Vec<Slot>,
    /// How many slots do not end a probe.
    used: usize,
    /// At least 1, so that 0 marks a slot that was never used.
    empty_below: Revision,
    live_from: Revision,
    /// Whether there may be slots that hold `TAKEN_BACK`.
    taken_back: bool,
}

impl Index {
    /// An empty index; all revisions to come are from `live_from` on.
    pub(super) fn new(live_from: Revision) -> Index {
        Index {
            slots: Vec::new(),
            used: 0,
            empty_below: live_from.max(1),
            live_from,
            taken_back: false,
        }
    }

    /// The newest revision of a key; `same_key` says whether a revision with this hash is of the key.
    pub(super) fn find(&self, hash: u64, same_key: impl Fn(Revision) -> bool) -> Option<Revision> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut position = hash as usize & mask;
        loop {
            let slot = self.slots[position];
            if slot.revision < self.empty_below {
                return None;
            }
            if slot.hash == hash && self.is_live(slot) && same_key(slot.revision) {
                return Some(slot.revision);
            }
            position = (position + 1) & mask;
        }
    }

    /// Makes `revision` the newest of a key and returns the one that was.
    pub(super) fn insert(
        &mut self,
        hash: u64,
        revision: Revision,
        same_key: impl Fn(Revision) -> bool,
    ) -> Option<Revision> {
        if (self.used + 1) * 2 > self.slots.len() {
            self.rehash();
        }
        let mask = self.slots.len() - 1;
        let mut position = hash as usize & mask;
        let mut free = None;
        loop {
            let slot = &mut self.slots[position];
            if slot.revision < self.empty_below {
                break;
            }
            if slot.revision < self.live_from || slot.revision == TAKEN_BACK {
                free = free.or(Some(position));
            } else if slot.hash == hash && same_key(slot.revision) {
                return Some(std::mem::replace(&mut slot.revision, revision));
            }
            position = (position + 1) & mask;
        }
        if free.is_none() {
            self.used += 1;
        }
        self.slots[free.unwrap_or(position)] = Slot { hash, revision };
        None
    }

    /// Undoes the insertion of `revision`, which returned `previous` and is the newest of its key.
    pub(super) fn take_back(&mut self, hash: u64, revision: Revision, previous: Option<Revision>) {
        let mask = self.slots.len() - 1;
        let mut position = hash as usize & mask;
        while self.slots[position].revision != revision {
            position = (position + 1) & mask;
        }
        // What was applied since is found in the table. It may be below `empty_below` by now, and
        // must not cut this chain.
        let previous = previous.filter(|&previous| previous >= self.live_from);
        self.slots[position].revision = previous.unwrap_or(TAKEN_BACK);
        self.taken_back |= previous.is_none();
    }

    /// All revisions below `live_from` are applied and found in the table from now on.
    pub(super) fn applied(&mut self, live_from: Revision) {
        self.live_from = live_from;
    }

    /// Empties the index, in constant time unless something was taken back since the last time. All
    /// revisions to come are from `live_from` on, and all so far are below.
    pub(super) fn reset(&mut self, live_from: Revision) {
        if self.taken_back {
            return self.clear(live_from);
        }
        self.live_from = live_from;
        self.empty_below = live_from.max(1);
        self.used = 0;
    }

    /// Empties the index when revisions will be given out a second time.
    pub(super) fn clear(&mut self, live_from: Revision) {
        self.slots.fill(Slot { hash: 0, revision: 0 });
        self.taken_back = false;
        self.reset(live_from);
    }

    fn is_live(&self, slot: Slot) -> bool {
        slot.revision >= self.live_from && slot.revision != TAKEN_BACK
    }

    /// Drops stale slots, and makes room for as many again as there are live ones.
    fn rehash(&mut self) {
        let live = || self.slots.iter().filter(|slot| self.is_live(**slot));
        let used = live().count();
        let mask = ((used + 1) * 4).next_power_of_two().max(MIN_SLOTS) - 1;
        let mut slots = vec![Slot { hash: 0, revision: 0 }; mask + 1];
        for slot in live() {
            let mut position = slot.hash as usize & mask;
            while slots[position].revision != 0 {
                position = (position + 1) & mask;
            }
            slots[position] = *slot;
        }
        self.slots = slots;
        self.used = used;
        self.taken_back = false;
    }
}
