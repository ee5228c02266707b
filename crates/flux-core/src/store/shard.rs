//! One lock stripe of a table: a directory of index segments, and the entries they name.
//!
//! Extendible hashing (Fagin, Nievergelt, Pippenger, Strong 1979): the directory is indexed by the next
//! bits of position after those that select the shard; a segment that is too full is split by one more
//! bit, and two halves that are nearly empty are joined, so that no step touches more than a segment.

use super::entry::{Entry, encode_entry};
use super::segment::{Segment, Slot};
use super::slab::{Handle, Slab};
use super::{Position, saved::Saved};

/// Two halves with at most so many entries are joined.
const JOIN_LEN: usize = 512;
/// The directory has at most so many places a segment, else segments grow rather than split. Hashes
/// spread evenly stay far below.
const MAX_PLACES_PER_SEGMENT: usize = 16;

/// A shard of the positions with one prefix.
pub(super) struct Shard {
    /// How many bits of position select the shard.
    prefix_bits: u32,
    /// The directory has `1 << depth` places.
    depth: u32,
    directory: Vec<u32>,
    segments: Vec<Segment>,
    index_bytes: u64,
    slab: Slab,
    len: usize,
    volatile_len: usize,
    /// How many snapshots were begun.
    epoch: u64,
    /// The first position that the running snapshot has not walked; the end if none runs.
    frontier: u64,
    saved: Saved,
}

/// The position after the last one.
pub(super) const END: u64 = 1 << 32;

/// Header and key of a usual entry.
const KEY_REACH: usize = 40;

impl Shard {
    pub(super) fn new(start: Position, prefix_bits: u32) -> Shard {
        let first = Segment::new(start, prefix_bits);
        Shard {
            prefix_bits,
            depth: 0,
            directory: vec![0],
            index_bytes: first.bytes(),
            segments: vec![first],
            slab: Slab::new(),
            len: 0,
            volatile_len: 0,
            epoch: 0,
            frontier: END,
            saved: Saved::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn volatile_len(&self) -> usize {
        self.volatile_len
    }

    /// The bytes of entries, index and what a snapshot saved.
    pub(super) fn memory_bytes(&self) -> u64 {
        let directory = self.directory.len() * size_of::<u32>();
        self.slab.used_bytes() + self.index_bytes + directory as u64 + self.saved.bytes()
    }

    fn place(&self, position: Position) -> usize {
        let within = (u64::from(position.0) << self.prefix_bits) & u64::from(u32::MAX);
        (within >> (32 - self.depth)) as usize
    }

    /// The segment of a position.
    pub(super) fn segment(&self, position: Position) -> &Segment {
        &self.segments[self.directory[self.place(position)] as usize]
    }

    /// The entry that a slot names.
    pub(super) fn entry(&self, slot: Slot) -> Entry<'_> {
        self.slab.entry(slot.handle())
    }

    pub(super) fn find(&self, position: Position, key: &[u8]) -> Option<Entry<'_>> {
        let segment = self.segment(position);
        let mut index = segment.lower_bound(position);
        while let Some(slot) = segment.slot(index).filter(|slot| slot.position() == position) {
            let entry = self.entry(slot);
            if entry.key == key {
                return Some(entry);
            }
            index += 1;
        }
        None
    }

    /// Loads the entry of a position, whatever its key, only to bring it near.
    pub(super) fn touch(&self, position: Position) -> u64 {
        let segment = self.segment(position);
        match segment.slot(segment.lower_bound(position)) {
            Some(slot) if slot.position() == position => {
                // The header and the key mostly lie across two cache lines.
                let bytes = self.slab.bytes(slot.handle());
                u64::from(bytes[0]) + u64::from(bytes[bytes.len().min(KEY_REACH) - 1])
            }
            _ => 0,
        }
    }

    pub(super) fn put(&mut self, position: Position, entry: &Entry<'_>) {
        let number = self.directory[self.place(position)] as usize;
        let to_save = u64::from(position.0) >= self.frontier;
        if to_save {
            self.segments[number].mark_for(self.epoch);
        }
        let (slab, mut was_volatile) = (&self.slab, false);
        let found = self.segments[number].find(position, |handle| {
            let old = slab.entry(handle);
            was_volatile = old.expires_at_ms.is_some();
            old.key == entry.key
        });
        self.volatile_len += usize::from(entry.expires_at_ms.is_some());
        match found {
            Ok(index) => {
                self.volatile_len -= usize::from(was_volatile);
                let slot = self.segments[number].slot(index).expect("found");
                let handle = if to_save && !slot.is_fresh() && self.save(slot.handle()) {
                    self.slab.insert(entry)
                } else {
                    self.slab.replace(slot.handle(), entry)
                };
                // Mostly nothing changes: then the slot's cache line need not be written back.
                if handle != slot.handle() || to_save {
                    self.segments[number].set(index, handle, to_save);
                }
            }
            Err(index) => {
                self.len += 1;
                let handle = self.slab.insert(entry);
                if !self.segments[number].insert(index, position, handle, to_save) {
                    self.insert_with_room(position, handle, to_save);
                }
            }
        }
    }

    pub(super) fn remove(&mut self, position: Position, key: &[u8]) -> bool {
        let number = self.directory[self.place(position)] as usize;
        let slab = &self.slab;
        let found = self.segments[number].find(position, |handle| slab.entry(handle).key == key);
        let Ok(index) = found else { return false };
        let to_save = u64::from(position.0) >= self.frontier;
        if to_save {
            self.segments[number].mark_for(self.epoch);
        }
        let slot = self.segments[number].slot(index).expect("found");
        self.len -= 1;
        self.volatile_len -= usize::from(self.entry(slot).expires_at_ms.is_some());
        let taken = to_save && !slot.is_fresh() && self.save(slot.handle());
        if !taken {
            self.slab.remove(slot.handle());
        }
        self.change(number, |segment| segment.remove(index));
        self.join_around(position);
        true
    }

    /// Keeps an entry for the snapshot. True if it was moved there and not copied.
    fn save(&mut self, handle: Handle) -> bool {
        if let Some(bytes) = self.slab.take_large(handle) {
            self.saved.push_large(bytes);
            true
        } else {
            self.saved.push(&self.slab.entry(handle));
            false
        }
    }

    /// Changes a segment and keeps the account of its bytes.
    fn change(&mut self, number: usize, change: impl FnOnce(&mut Segment)) {
        let segment = &mut self.segments[number];
        self.index_bytes -= segment.bytes();
        change(segment);
        self.index_bytes += segment.bytes();
    }

    /// Inserts into a segment that has no room, which is grown or split first.
    fn insert_with_room(&mut self, position: Position, handle: Handle, is_fresh: bool) {
        loop {
            let number = self.directory[self.place(position)] as usize;
            if self.segments[number].should_split() && self.may_split(number) {
                self.split(number);
            } else {
                self.change(number, Segment::grow);
            }
            let number = self.directory[self.place(position)] as usize;
            let segment = &mut self.segments[number];
            // The key is in no slot: any place at the end of its run will do.
            let index = segment.find(position, |_| false).unwrap_or_else(|index| index);
            if segment.insert(index, position, handle, is_fresh) {
                return;
            }
        }
    }

    fn may_split(&self, number: usize) -> bool {
        let depth = self.segments[number].depth();
        let places = self.directory.len();
        depth < 32
            && (depth - self.prefix_bits < self.depth
                || places * 2 <= self.segments.len() * MAX_PLACES_PER_SEGMENT)
    }

    fn split(&mut self, number: usize) {
        if self.segments[number].depth() - self.prefix_bits == self.depth {
            self.directory = self.directory.iter().flat_map(|&place| [place, place]).collect();
            self.depth += 1;
        }
        let mut upper = None;
        self.change(number, |segment| upper = Some(segment.split()));
        let upper = upper.expect("just split");
        self.index_bytes += upper.bytes();
        self.segments.push(upper);
        self.enter(self.segments.len() - 1);
    }

    /// Lets the directory name a segment for its whole range.
    fn enter(&mut self, number: usize) {
        let segment = &self.segments[number];
        let first = self.place(segment.start());
        let count = 1 << (self.depth + self.prefix_bits - segment.depth());
        self.directory[first..first + count].fill(number as u32);
    }

    /// Joins the segment of a position with its other half while both are nearly empty.
    fn join_around(&mut self, position: Position) {
        loop {
            let number = self.directory[self.place(position)] as usize;
            let segment = &self.segments[number];
            let depth = segment.depth();
            if segment.len() > JOIN_LEN / 2 || depth == self.prefix_bits {
                return;
            }
            let other_start = Position(segment.start().0 ^ 1 << (32 - depth));
            let other = self.directory[self.place(other_start)] as usize;
            if self.segments[other].depth() != depth
                || segment.len() + self.segments[other].len() > JOIN_LEN
            {
                return;
            }
            self.join(number, other);
        }
    }

    fn join(&mut self, one: usize, other: usize) {
        for number in [one, other] {
            self.segments[number].mark_for(self.epoch);
            self.index_bytes -= self.segments[number].bytes();
        }
        let in_order = self.segments[one].start() < self.segments[other].start();
        let (lower, upper) = if in_order { (one, other) } else { (other, one) };
        let joined = Segment::join(&self.segments[lower], &self.segments[upper]);
        self.index_bytes += joined.bytes();
        self.segments[lower] = joined;
        self.enter(lower);
        self.segments.swap_remove(upper);
        if upper < self.segments.len() {
            self.enter(upper);
        }
        let used = self.depth + self.prefix_bits;
        if self.segments.iter().all(|segment| segment.depth() < used) {
            self.directory = self.directory.iter().copied().step_by(2).collect();
            self.depth -= 1;
        }
    }

    pub(super) fn begin_snapshot(&mut self, start: Position) {
        self.epoch += 1;
        self.frontier = u64::from(start.0);
        self.saved = Saved::default();
    }

    pub(super) fn end_snapshot(&mut self) {
        self.frontier = END;
        self.saved = Saved::default();
    }

    /// The first position that the running snapshot has not walked.
    pub(super) fn frontier(&self) -> u64 {
        self.frontier
    }

    pub(super) fn set_frontier(&mut self, frontier: u64) {
        self.frontier = frontier;
    }

    pub(super) fn saved(&self) -> &Saved {
        &self.saved
    }

    pub(super) fn saved_mut(&mut self) -> &mut Saved {
        &mut self.saved
    }

    /// Appends the entries of the snapshot's point from `from` on that are still in place, up to about
    /// `budget` bytes and at most to the end of a segment. Returns the position to go on from, and what
    /// of the budget is left: slots passed over count too.
    pub(super) fn encode_from(
        &self,
        from: Position,
        budget: usize,
        out: &mut Vec<u8>,
    ) -> (u64, usize) {
        let segment = self.segment(from);
        let is_marked = segment.is_marked_for(self.epoch);
        let (start, first) = (out.len(), segment.lower_bound(from));
        let mut last = None;
        for (index, slot) in segment.iter_from(first) {
            let spent = (out.len() - start).max((index - first) * size_of::<Slot>());
            if last != Some(slot.position()) && spent >= budget {
                return (u64::from(slot.position().0), 0);
            }
            last = Some(slot.position());
            if !(is_marked && slot.is_fresh()) {
                encode_entry(&self.entry(slot), out);
            }
        }
        let slots = (segment.slot_count() - first) * size_of::<Slot>();
        (segment.end(), budget.saturating_sub((out.len() - start).max(slots)))
    }
}
