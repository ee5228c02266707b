//! The table of one partition: every key with its value, version and expiry, in memory.
//!
//! A table is ordered by hash. It is divided into shards by the top bits of the hash, each behind its own
//! lock, and a shard into small index segments that are split as they fill, so that no operation takes
//! long and memory grows smoothly. There are many readers and **one writer**: `put`, `remove`, `load`,
//! `replace`, `clear` and the snapshot functions are called by one thread at a time, the owning
//! worker's; reads by any.
//!
//! The table does not judge: it keeps expired entries until they are removed, and takes writes past the
//! memory limit. It has no clock and no randomness; equal calls give equal tables, in equal order.
//!
//! Closures passed in run under a shard's lock: they must be short and must not call the table again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::RwLock;
use rapidhash::v3::{RapidSecrets, rapidhash_v3_micro_inline};

mod entry;
mod memory;
mod saved;
mod segment;
mod shard;
mod slab;
#[cfg(test)]
mod tests;

pub use entry::{ChunkEntries, ChunkError, Entry, encode_entry};
pub use memory::Memory;

use shard::{END, Shard};

/// What a table is made with.
#[derive(Clone, Copy, Debug)]
pub struct TableOptions {
    /// The key of the hash. Secret and random for each data directory, so that nobody can choose keys
    /// that collide.
    pub hash_seed: u64,
    /// The number of shards: a power of two, at most 65536.
    pub shards: usize,
}

/// The keyed hash of a key, by one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash(pub u64);

impl KeyHash {
    /// Where the key is in the table's order.
    pub fn position(self) -> Position {
        Position((self.0 >> 32) as u32)
    }
}

/// A place in a table's order: the top 32 bits of the hash. Several keys may share one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u32);

/// The keys of one partition.
pub struct Table {
    stripes: Box<[Stripe]>,
    /// How many bits of position select the shard.
    shard_bits: u32,
    secrets: RapidSecrets,
    memory: Arc<Memory>,
    /// How many times all contents were replaced.
    replacements: AtomicU64,
}

/// A shard, and its figures as they may be read without its lock. Aligned so that two shards do not
/// share a cache line, nor a pair of them.
#[repr(align(128))]
struct Stripe {
    shard: RwLock<Shard>,
    len: AtomicUsize,
    volatile_len: AtomicUsize,
    bytes: AtomicU64,
    /// What the node's account has of `bytes`.
    reported: AtomicU64,
}

impl Stripe {
    /// Changes the shard and publishes its figures.
    fn write<R>(&self, memory: &Memory, change: impl FnOnce(&mut Shard) -> R) -> R {
        let mut shard = self.shard.write();
        let result = change(&mut shard);
        self.len.store(shard.len(), Ordering::Relaxed);
        self.volatile_len.store(shard.volatile_len(), Ordering::Relaxed);
        let bytes = shard.memory_bytes();
        self.bytes.store(bytes, Ordering::Relaxed);
        // The account is shared by all workers: small changes are not worth its cache line.
        let reported = self.reported.load(Ordering::Relaxed);
        if bytes.abs_diff(reported) > (bytes / 256).min(4096) {
            self.reported.store(bytes, Ordering::Relaxed);
            memory.replace(reported, bytes);
        }
        result
    }
}

/// As [`Table::touch`], over several tables.
pub fn touch<'a>(positions: impl Iterator<Item = (&'a Table, Position)> + Clone) -> u64 {
    // All locks at once: taking one waits for the loads before it.
    let shards: Vec<_> = positions
        .clone()
        .map(|(table, position)| table.stripe(position).shard.read_recursive())
        .collect();
    let near = positions.clone().map(|(_, position)| position).zip(&shards);
    let homes = near.map(|(position, shard)| shard.segment(position).touch(position));
    let homes = homes.fold(0, u64::wrapping_add);
    let near = positions.map(|(_, position)| position).zip(&shards);
    let entries = near.map(|(position, shard)| shard.touch(position));
    entries.fold(homes, u64::wrapping_add)
}

impl Table {
    /// An empty table that reports to `memory`.
    ///
    /// # Panics
    ///
    /// If the number of shards is not a power of two up to 65536.
    pub fn new(options: TableOptions, memory: Arc<Memory>) -> Table {
        Table::empty(options.shards, RapidSecrets::seed(options.hash_seed), memory)
    }

    fn empty(shards: usize, secrets: RapidSecrets, memory: Arc<Memory>) -> Table {
        assert!(shards.is_power_of_two() && shards <= 1 << 16, "{shards} shards");
        let shard_bits = shards.trailing_zeros();
        let stripes: Box<[Stripe]> = (0..shards)
            .map(|number| Stripe {
                shard: RwLock::new(Shard::new(shard_start(number, shard_bits), shard_bits)),
                len: AtomicUsize::new(0),
                volatile_len: AtomicUsize::new(0),
                bytes: AtomicU64::new(0),
                reported: AtomicU64::new(0),
            })
            .collect();
        for stripe in &stripes {
            stripe.write(&memory, |_| ());
        }
        Table { stripes, shard_bits, secrets, memory, replacements: AtomicU64::new(0) }
    }

    /// The hash of a key in this table.
    #[inline]
    pub fn hash(&self, key: &[u8]) -> KeyHash {
        KeyHash(rapidhash_v3_micro_inline::<true, true>(key, &self.secrets))
    }

    #[inline]
    fn shard_of(&self, position: Position) -> usize {
        (u64::from(position.0) << self.shard_bits >> 32) as usize
    }

    #[inline]
    fn stripe(&self, position: Position) -> &Stripe {
        &self.stripes[self.shard_of(position)]
    }

    /// Passes the entry of a key to `f`, also one that has expired, under the shared lock of one shard.
    pub fn read<R>(&self, hash: KeyHash, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        let position = hash.position();
        let shard = self.stripe(position).shard.read();
        f(shard.find(position, key))
    }

    /// The account that this table reports to, with others.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Loads what lookups at these positions will need, so that the memory accesses of a batch overlap.
    /// The sum returned means nothing: it keeps the loads from being optimised away.
    pub fn touch(&self, positions: &[Position]) -> u64 {
        touch(positions.iter().map(|&position| (self, position)))
    }

    /// The versions of keys, 0 where there is none, in their order. All are looked up together, as by `touch`.
    pub fn versions(&self, keys: &[(KeyHash, &[u8])], mut found: impl FnMut(u64)) {
        let positions = keys.iter().map(|(hash, _)| hash.position());
        // All locks at once, as in `touch`.
        let shards: Vec<_> = positions
            .clone()
            .map(|position| self.stripe(position).shard.read_recursive())
            .collect();
        let near = positions.clone().zip(&shards);
        let homes = near.map(|(position, shard)| shard.segment(position).touch(position));
        let homes = homes.fold(0, u64::wrapping_add);
        let near = positions.zip(&shards);
        let entries = near.map(|(position, shard)| shard.touch(position));
        std::hint::black_box(entries.fold(homes, u64::wrapping_add));
        for ((hash, key), shard) in keys.iter().zip(&shards) {
            found(shard.find(hash.position(), key).map_or(0, |entry| entry.version));
        }
    }

    /// Stores an entry in the place of the one with its key, if there is one. `hash` is the key's.
    pub fn put(&self, hash: KeyHash, entry: Entry<'_>) {
        let position = hash.position();
        self.stripe(position).write(&self.memory, |shard| shard.put(position, &entry));
    }

    /// Removes the entry of a key. False if there was none.
    pub fn remove(&self, hash: KeyHash, key: &[u8]) -> bool {
        let position = hash.position();
        self.stripe(position).write(&self.memory, |shard| shard.remove(position, key))
    }

    /// Gives the table all contents of `fresh`, and returns its own up to now as a table of their own:
    /// dropping that may take long, and may be done by another thread.
    ///
    /// One shard after the other is exchanged, so a reader finds each one old or new, and may find two
    /// keys of different age. A snapshot that runs ends here: `snapshot_chunk` has nothing more to give
    /// then, though what it gave so far is not complete. See [`replacements`](Table::replacements).
    ///
    /// # Panics
    ///
    /// If the tables differ in their number of shards or in their hash.
    pub fn replace(&self, mut fresh: Table) -> Table {
        assert_eq!(self.stripes.len(), fresh.stripes.len(), "tables of equal options");
        assert_eq!(self.secrets, fresh.secrets, "tables of equal options");
        // Whoever sees a table that is replaced, or this number, sees what the owner did before.
        self.replacements.fetch_add(1, Ordering::Release);
        for (stripe, other) in self.stripes.iter().zip(&mut fresh.stripes) {
            let new = other.shard.get_mut();
            new.end_snapshot();
            stripe.write(&self.memory, |shard| std::mem::swap(shard, new));
            // What was saved for the old snapshot goes only now, when no reader waits.
            other.write(&fresh.memory, Shard::end_snapshot);
        }
        fresh
    }

    /// Removes everything, as [`replace`](Table::replace) by an empty table does.
    pub fn clear(&self) -> Table {
        let memory = Arc::clone(&self.memory);
        self.replace(Table::empty(self.stripes.len(), self.secrets, memory))
    }

    /// How many times all contents were replaced. Whoever walks a snapshot compares it: once it has
    /// changed since `begin_snapshot`, what was walked so far is of no use. A reader that finds it as it
    /// was before has read nothing that replaced the contents since.
    pub fn replacements(&self) -> u64 {
        self.replacements.load(Ordering::Acquire)
    }

    /// The number of entries, expired ones included. Cheap, from any thread.
    pub fn len(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.len.load(Ordering::Relaxed)).sum()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of entries that expire at some time. Cheap, from any thread.
    pub fn volatile_len(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.volatile_len.load(Ordering::Relaxed)).sum()
    }

    /// The bytes of entries and index, and what a running snapshot saved. Cheap, from any thread.
    pub fn memory_bytes(&self) -> u64 {
        self.stripes.iter().map(|stripe| stripe.bytes.load(Ordering::Relaxed)).sum()
    }

    /// Visits entries in order from a position on: at least `min_entries` unless the end comes first,
    /// and all of one position or none. Returns the position to go on from, `None` at the end.
    ///
    /// An entry that is there during a whole walk is visited at least once, whatever else changes
    /// between its steps. The lock of a shard is held for one segment at a time.
    pub fn scan(
        &self,
        from: Position,
        min_entries: usize,
        mut visit: impl FnMut(Entry<'_>),
    ) -> Option<Position> {
        let (min_entries, mut visited) = (min_entries.max(1), 0);
        let mut next = u64::from(from.0);
        while next < END {
            let position = Position(next as u32);
            if visited >= min_entries {
                return Some(position);
            }
            let shard = self.stripe(position).shard.read();
            let segment = shard.segment(position);
            let mut last = None;
            for (_, slot) in segment.iter_from(segment.lower_bound(position)) {
                if visited >= min_entries && last != Some(slot.position()) {
                    return Some(slot.position());
                }
                last = Some(slot.position());
                visited += 1;
                visit(shard.entry(slot));
            }
            next = segment.end();
        }
        None
    }

    /// Visits the entries at one position.
    pub fn at_position(&self, position: Position, mut visit: impl FnMut(Entry<'_>)) {
        let shard = self.stripe(position).shard.read();
        let segment = shard.segment(position);
        let slots = segment.iter_from(segment.lower_bound(position)).map(|(_, slot)| slot);
        for slot in slots.take_while(|slot| slot.position() == position) {
            visit(shard.entry(slot));
        }
    }

    /// Visits some entry, about equally likely any, that the seed decides. False if there is none.
    pub fn random(&self, seed: u64, visit: impl FnOnce(Entry<'_>)) -> bool {
        const TRIES: u64 = 32;
        let mut next = mix(seed) >> 32;
        let first = Position(next as u32);
        // The segment of a random position, then a random slot of it, until one is in use.
        {
            let shard = self.stripe(first).shard.read();
            let segment = shard.segment(first);
            for step in 1..=TRIES {
                let index = mix(seed.wrapping_add(step)) % segment.slot_count() as u64;
                if let Some(slot) = segment.slot(index as usize) {
                    visit(shard.entry(slot));
                    return true;
                }
            }
        }
        // It is nearly empty: take the next entry in the table's order.
        let mut visit = Some(visit);
        for end in [END, next] {
            while next < end {
                let position = Position(next as u32);
                let shard = self.stripe(position).shard.read();
                let segment = shard.segment(position);
                let mut slots = segment.iter_from(segment.lower_bound(position));
                if let Some((_, slot)) = slots.next() {
                    visit.take().expect("visited once")(shard.entry(slot));
                    return true;
                }
                next = segment.end();
            }
            next = 0;
        }
        false
    }

    /// Fixes the point of a snapshot: the table as it is now. One that runs is dropped.
    ///
    /// Until the walk has passed an entry, a write to it saves the old one first, once; nothing is saved
    /// for keys that are new since the point.
    pub fn begin_snapshot(&self) {
        for (number, stripe) in self.stripes.iter().enumerate() {
            let start = shard_start(number, self.shard_bits);
            stripe.write(&self.memory, |shard| shard.begin_snapshot(start));
        }
    }

    /// Appends the snapshot's next entries, as `encode_entry` does, until about `budget_bytes`. True if
    /// these were the last ones, also if no snapshot runs.
    ///
    /// A chunk may be longer by one entry, by the entries of one position, or by a block of 32 KiB.
    pub fn snapshot_chunk(&self, budget_bytes: usize, out: &mut Vec<u8>) -> bool {
        let end = out.len() + budget_bytes.max(1);
        for stripe in &self.stripes {
            if stripe.shard.read().saved().bytes() > 0 {
                stripe.write(&self.memory, |shard| shard.saved_mut().drain_into(end, out));
                if out.len() >= end {
                    return self.is_walked();
                }
            }
        }
        let mut budget = end - out.len();
        for (number, stripe) in self.stripes.iter().enumerate() {
            let shard_end = u64::from(shard_start(number, self.shard_bits).0) + self.shard_span();
            // There is no other writer, so nothing changes between these locks; readers go on.
            let mut next = stripe.shard.read().frontier();
            while next < shard_end && budget > 0 {
                let shard = stripe.shard.read();
                (next, budget) = shard.encode_from(Position(next as u32), budget, out);
            }
            if next < shard_end {
                stripe.shard.write().set_frontier(next);
                return false;
            }
            stripe.shard.write().set_frontier(END);
        }
        true
    }

    /// Whether the running snapshot is complete.
    fn is_walked(&self) -> bool {
        self.stripes.iter().all(|stripe| {
            let shard = stripe.shard.read();
            shard.frontier() == END && shard.saved().bytes() == 0
        })
    }

    /// Ends a snapshot, complete or not, and drops what was saved for it.
    pub fn end_snapshot(&self) {
        for stripe in &self.stripes {
            stripe.write(&self.memory, Shard::end_snapshot);
        }
    }

    /// Puts all entries of a snapshot chunk. Returns how many they were.
    ///
    /// # Errors
    ///
    /// If the bytes are not a row of entries within the limits. Those before the first bad one are put.
    pub fn load(&self, chunk: &[u8]) -> Result<usize, ChunkError> {
        let mut count = 0;
        for entry in ChunkEntries::new(chunk) {
            let entry = entry?;
            self.put(self.hash(entry.key), entry);
            count += 1;
        }
        Ok(count)
    }

    /// How many positions a shard has.
    fn shard_span(&self) -> u64 {
        END >> self.shard_bits
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        for stripe in &self.stripes {
            self.memory.replace(stripe.reported.load(Ordering::Relaxed), 0);
        }
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Table");
        debug.field("len", &self.len()).field("memory_bytes", &self.memory_bytes());
        debug.finish_non_exhaustive()
    }
}

/// The first position of a shard.
fn shard_start(number: usize, shard_bits: u32) -> Position {
    Position(((number as u64) << (32 - shard_bits)) as u32)
}

/// A pseudorandom number of a seed: SplitMix64 (Steele, Lea, Flood 2014).
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
