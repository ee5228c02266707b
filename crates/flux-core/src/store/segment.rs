//! A piece of the index: the slots of a range of positions, sorted.
//!
//! Open addressing with linear probing, ordered as by Robin Hood hashing (Celis, Larson, Munro 1985;
//! for sorted order Amble and Knuth 1974): a position has a home slot that grows with it, an entry lies
//! at its home or after it, and slots are sorted by position, so that walking them gives the entries in
//! order. Slots do not wrap around; some more follow the last home.
//!
//! A slot is `position << 32 | handle << 1 | fresh`. Fresh marks what was written since a snapshot's
//! point; it counts only in a segment whose `epoch` is that of the snapshot.

use super::Position;
use super::slab::Handle;

/// An unused slot. It is above every other, which ends a search.
const EMPTY: u64 = u64::MAX;
const FRESH: u64 = 1;

/// The fewest homes of a segment.
const MIN_HOMES: usize = 32;
/// The homes of a segment that is to be split when it is full. Splits then only add blocks of one size
/// and never free any, for growing through sizes in between leaves holes in the heap that cost more
/// than the slots saved.
const FULL_HOMES: usize = 2048;

/// What the index takes for an entry, on average.
pub(super) const AVERAGE_BYTES: usize = 13;

/// What a slot holds.
#[derive(Clone, Copy)]
pub(super) struct Slot(u64);

impl Slot {
    fn new(position: Position, handle: Handle, is_fresh: bool) -> Slot {
        let fresh = if is_fresh { FRESH } else { 0 };
        Slot(u64::from(position.0) << 32 | u64::from(handle.0) << 1 | fresh)
    }

    pub(super) fn position(self) -> Position {
        Position((self.0 >> 32) as u32)
    }

    pub(super) fn handle(self) -> Handle {
        Handle(self.0 as u32 >> 1)
    }

    pub(super) fn is_fresh(self) -> bool {
        self.0 & FRESH != 0
    }
}

/// The index of the entries with one prefix of `depth` bits of position.
pub(super) struct Segment {
    /// The last one is always empty.
    slots: Box<[u64]>,
    homes: u32,
    len: u32,
    /// The first position of the range.
    start: u32,
    /// How many bits of position all have in common, at most 32.
    depth: u32,
    /// The snapshot for which the fresh marks count.
    epoch: u64,
}

impl Segment {
    pub(super) fn new(start: Position, depth: u32) -> Segment {
        Segment::build(&[], MIN_HOMES, start.0, depth, 0)
    }

    /// A segment of sorted slots.
    fn build(sorted: &[u64], homes: usize, start: u32, depth: u32, epoch: u64) -> Segment {
        let (slots, homes) = (Box::default(), homes as u32);
        let mut segment = Segment { slots, homes, len: 0, start, depth, epoch };
        segment.fill(sorted);
        segment
    }

    /// Replaces the contents by sorted slots, in the same block if they fit well.
    fn fill(&mut self, sorted: &[u64]) {
        let homes = self.homes as usize;
        let spare = homes / 32 + 8;
        let home = |segment: &Segment, slot| segment.home(Slot(slot).position());
        let end = sorted.iter().fold(0, |next, &slot| home(self, slot).max(next) + 1);
        if self.slots.len() < end.max(homes) + spare / 2 {
            self.slots = vec![EMPTY; end.max(homes) + spare].into_boxed_slice();
        } else {
            self.slots.fill(EMPTY);
        }
        let mut next = 0;
        for &slot in sorted {
            next = home(self, slot).max(next);
            self.slots[next] = slot;
            next += 1;
        }
        self.len = sorted.len() as u32;
    }

    /// Changes the number of homes and the contents.
    fn rebuild_as(&mut self, homes: usize, sorted: &[u64]) {
        if homes != self.homes as usize {
            self.homes = homes as u32;
            self.slots = Box::default();
        }
        self.fill(sorted);
    }

    fn rebuild(&mut self, homes: usize) {
        let sorted: Vec<u64> = self.used().collect();
        self.rebuild_as(homes, &sorted);
    }

    fn used(&self) -> impl Iterator<Item = u64> {
        self.slots.iter().copied().filter(|&slot| slot != EMPTY)
    }

    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    pub(super) fn start(&self) -> Position {
        Position(self.start)
    }

    pub(super) fn depth(&self) -> u32 {
        self.depth
    }

    /// The position after the last of the range; 2^32 if there is none.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.start) + (1 << (32 - self.depth))
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.slots.len() * size_of::<u64>() + size_of::<Segment>()) as u64
    }

    #[inline]
    fn home(&self, position: Position) -> usize {
        let within = (u64::from(position.0) << self.depth) & u64::from(u32::MAX);
        ((within * u64::from(self.homes)) >> 32) as usize
    }

    /// The home slot as it is; only to bring it near.
    pub(super) fn touch(&self, position: Position) -> u64 {
        self.slots[self.home(position)]
    }

    /// The index of the first slot that is not below `position`.
    #[inline]
    pub(super) fn lower_bound(&self, position: Position) -> usize {
        let target = u64::from(position.0) << 32;
        let mut index = self.home(position);
        while self.slots[index] < target {
            index += 1;
        }
        index
    }

    /// The slot at an index, if it is in use.
    #[inline]
    pub(super) fn slot(&self, index: usize) -> Option<Slot> {
        self.slots.get(index).filter(|&&slot| slot != EMPTY).map(|&slot| Slot(slot))
    }

    /// How many slots there are, used or not.
    pub(super) fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// The used slots from an index on, each with its index.
    pub(super) fn iter_from(&self, index: usize) -> impl Iterator<Item = (usize, Slot)> {
        let slots = self.slots.iter().enumerate().skip(index);
        slots.filter(|&(_, &slot)| slot != EMPTY).map(|(index, &slot)| (index, Slot(slot)))
    }

    /// The index of the slot at `position` whose handle satisfies `is_it`, else where it would go: the
    /// end of the run of equal positions.
    pub(super) fn find(
        &self,
        position: Position,
        mut is_it: impl FnMut(Handle) -> bool,
    ) -> Result<usize, usize> {
        let mut index = self.lower_bound(position);
        while let Some(slot) = self.slot(index).filter(|slot| slot.position() == position) {
            if is_it(slot.handle()) {
                return Ok(index);
            }
            index += 1;
        }
        Err(index)
    }

    pub(super) fn set(&mut self, index: usize, handle: Handle, is_fresh: bool) {
        self.slots[index] = Slot::new(Slot(self.slots[index]).position(), handle, is_fresh).0;
    }

    /// Puts a slot where `find` said. False, and nothing done, if there is no room: `grow`, or split.
    pub(super) fn insert(
        &mut self,
        index: usize,
        position: Position,
        handle: Handle,
        is_fresh: bool,
    ) -> bool {
        if self.is_full() {
            return false;
        }
        let Some(gap) = self.slots[index..].iter().position(|&slot| slot == EMPTY) else {
            return false;
        };
        let gap = index + gap;
        if gap + 1 == self.slots.len() {
            return false;
        }
        self.slots.copy_within(index..gap, index + 1);
        self.slots[index] = Slot::new(position, handle, is_fresh).0;
        self.len += 1;
        true
    }

    /// Removes a slot; what follows moves back towards its home.
    pub(super) fn remove(&mut self, index: usize) {
        let mut end = index + 1;
        while self.slot(end).is_some_and(|slot| self.home(slot.position()) < end) {
            end += 1;
        }
        self.slots.copy_within(index + 1..end, index);
        self.slots[end - 1] = EMPTY;
        self.len -= 1;
        let homes = self.homes as usize;
        if homes > MIN_HOMES && self.len() < homes / 4 {
            self.rebuild((homes / 2).max(MIN_HOMES));
        }
    }

    fn is_full(&self) -> bool {
        self.len() >= self.homes as usize / 32 * 29
    }

    /// Whether the segment has all entries that one should have.
    pub(super) fn should_split(&self) -> bool {
        self.homes as usize >= FULL_HOMES && self.is_full()
    }

    /// Makes room for one more.
    pub(super) fn grow(&mut self) {
        let homes = self.homes as usize;
        self.rebuild(match self.is_full() {
            false => homes,
            true if homes < FULL_HOMES => homes * 2,
            true => homes + homes / 2,
        });
    }

    /// Divides the range in two by its next bit: the upper half is returned.
    pub(super) fn split(&mut self) -> Segment {
        self.depth += 1;
        let middle = self.start | 1 << (32 - self.depth);
        let is_upper = |&slot: &u64| Slot(slot).position().0 >= middle;
        let half: Vec<u64> = self.used().filter(is_upper).collect();
        let upper = Segment::build(&half, FULL_HOMES, middle, self.depth, self.epoch);
        let half: Vec<u64> = self.used().filter(|slot| !is_upper(slot)).collect();
        let homes = if half.len() > FULL_HOMES / 2 { self.homes as usize } else { FULL_HOMES };
        self.rebuild_as(homes, &half);
        upper
    }

    /// Joins the two halves of a range, whose marks are of one epoch.
    pub(super) fn join(lower: &Segment, upper: &Segment) -> Segment {
        let sorted: Vec<u64> = lower.used().chain(upper.used()).collect();
        let homes = (sorted.len() * 4 / 3).next_power_of_two().max(MIN_HOMES);
        Segment::build(&sorted, homes, lower.start, lower.depth - 1, lower.epoch)
    }

    /// Whether the fresh marks count for a snapshot.
    pub(super) fn is_marked_for(&self, epoch: u64) -> bool {
        self.epoch == epoch
    }

    /// Makes the fresh marks count for a snapshot, none being set if they did not.
    pub(super) fn mark_for(&mut self, epoch: u64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            for slot in self.slots.iter_mut().filter(|slot| **slot != EMPTY) {
                *slot &= !FRESH;
            }
        }
    }
}
