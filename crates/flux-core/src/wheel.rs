//! When keys expire: a hierarchical timing wheel (Varghese and Lauck 1987) of times and positions.
//!
//! It knows no keys and forgets nothing by itself: that a key was written again or removed is seen when
//! its old time comes and the table is asked. The caller compares `len` with the number of keys that
//! expire and rebuilds the wheel when most of it is stale.
//!
//! Time is counted in ticks of 8 ms, rounded up, so that nothing is due early. A level has 64 slots of
//! 64 times the width of the level below; an entry lies at the level of the highest digit (base 64) in
//! which its tick differs from the current one. Slots are visited by a bitmap of those in use, so a
//! jump of any length costs only what lies in between.

use std::fmt;

use crate::UnixMillis;
use crate::store::Position;

#[cfg(test)]
mod tests;

const TICK_BITS: u32 = 3;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// Enough digits for every tick of a u64 of milliseconds.
const LEVELS: usize = (64 - TICK_BITS).div_ceil(SLOT_BITS) as usize;
/// How many entries one call moves to lower levels at most, so that it takes well under a millisecond.
const MAX_MOVES: usize = 16 * 1024;

/// Positions by the time at which they are due.
pub struct Wheel {
    /// Every entry up to this tick is in `due` or `moving`.
    current: u64,
    levels: Vec<Level>,
    /// What is due and was not given yet.
    due: Vec<Position>,
    /// A slot whose width has been entered, on its way to lower levels.
    moving: Vec<Timer>,
    len: usize,
}

struct Level {
    /// Bit n is set if slot n has entries.
    used: u64,
    slots: [Vec<Timer>; SLOTS],
}

/// A tick, in two halves so that a timer takes 12 bytes, and a position.
#[derive(Clone, Copy)]
struct Timer {
    tick_low: u32,
    tick_high: u32,
    position: Position,
}

impl Timer {
    fn new(tick: u64, position: Position) -> Timer {
        Timer { tick_low: tick as u32, tick_high: (tick >> 32) as u32, position }
    }

    fn tick(self) -> u64 {
        u64::from(self.tick_high) << 32 | u64::from(self.tick_low)
    }
}

impl Wheel {
    /// An empty wheel at `now_ms`.
    pub fn new(now_ms: UnixMillis) -> Wheel {
        let level = || Level { used: 0, slots: std::array::from_fn(|_| Vec::new()) };
        Wheel {
            current: now_ms >> TICK_BITS,
            levels: std::iter::repeat_with(level).take(LEVELS).collect(),
            due: Vec::new(),
            moving: Vec::new(),
            len: 0,
        }
    }

    /// Adds a position that is due at a time, which may also be past or far away.
    pub fn insert(&mut self, expires_at_ms: UnixMillis, position: Position) {
        self.len += 1;
        self.place(Timer::new(expires_at_ms.div_ceil(1 << TICK_BITS), position));
    }

    fn place(&mut self, timer: Timer) {
        let tick = timer.tick();
        if tick <= self.current {
            self.due.push(timer.position);
            return;
        }
        let level = (tick ^ self.current).ilog2() / SLOT_BITS;
        let slot = (tick >> (level * SLOT_BITS)) as usize % SLOTS;
        let level = &mut self.levels[level as usize];
        level.used |= 1 << slot;
        push_tightly(&mut level.slots[slot], timer);
    }

    /// Moves the time on and appends up to `limit` positions that are due by `now_ms`. Those beyond the
    /// limit stay due for the next call. Nothing is early, nor later than one tick of 8 ms, unless so
    /// many entries come due together that a call stops to keep short; `next_due_ms` then says to call
    /// again at once. A time before that of an earlier call counts as that one.
    pub fn advance(&mut self, now_ms: UnixMillis, limit: usize, due: &mut Vec<Position>) {
        let now = (now_ms >> TICK_BITS).max(self.current);
        let (mut wanted, mut moves) = (limit, MAX_MOVES);
        loop {
            let count = wanted.min(self.due.len());
            due.extend(self.due.drain(self.due.len() - count..));
            self.len -= count;
            wanted -= count;
            if wanted == 0 || moves == 0 {
                return;
            }
            if self.due.capacity() > SLOTS {
                self.due = Vec::new();
            }
            if !self.moving.is_empty() {
                let count = moves.min(self.moving.len());
                moves -= count;
                for timer in self.moving.split_off(self.moving.len() - count) {
                    self.place(timer);
                }
                continue;
            }
            match self.next_slot() {
                Some((level, slot, start)) if start <= now => {
                    self.current = start;
                    let level = &mut self.levels[level];
                    level.used &= !(1 << slot);
                    self.moving = std::mem::take(&mut level.slots[slot]);
                }
                _ => {
                    self.current = now;
                    return;
                }
            }
        }
    }

    /// The next slot in use: its level, its number there and its first tick.
    fn next_slot(&self) -> Option<(usize, usize, u64)> {
        // Entries of a level share all higher digits with the current tick, so lower levels come first.
        let (level, used) =
            self.levels.iter().map(|level| level.used).enumerate().find(|&(_, used)| used != 0)?;
        let slot = used.trailing_zeros() as usize;
        let shift = level as u32 * SLOT_BITS;
        let above = self.current >> shift >> SLOT_BITS << SLOT_BITS;
        Some((level, slot, (above | slot as u64) << shift))
    }

    /// The number of entries, those due but not given yet included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// When to call `advance` next: nothing is due before. It may turn out that nothing is due then
    /// either. `None` if the wheel is empty.
    pub fn next_due_ms(&self) -> Option<UnixMillis> {
        if !self.due.is_empty() || !self.moving.is_empty() {
            return Some(self.current << TICK_BITS);
        }
        let (_, _, start) = self.next_slot()?;
        Some(start.checked_mul(1 << TICK_BITS).unwrap_or(UnixMillis::MAX))
    }

    /// Drops all entries; the time stays.
    pub fn clear(&mut self) {
        *self = Wheel::new(self.current << TICK_BITS);
    }
}

impl fmt::Debug for Wheel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Wheel");
        debug.field("len", &self.len).field("next_due_ms", &self.next_due_ms());
        debug.finish_non_exhaustive()
    }
}

/// Appends with at most a quarter to spare, where `push` would double a big vector.
fn push_tightly(slot: &mut Vec<Timer>, timer: Timer) {
    if slot.len() == slot.capacity() {
        slot.reserve_exact((slot.len() / 4).max(4));
    }
    slot.push(timer);
}
