//! What happened, in order: always as a hash, and as lines for people when they ask for them.
//!
//! Two runs of a seed are the same exactly if their hashes are, so everything that happens goes in.

use std::fmt::{self, Arguments};
use std::io::Write;

/// The record of a run.
pub struct Trace {
    hash: u64,
    events: u64,
    /// Where lines go, at once, so that they are there when the run ends in a panic.
    out: Option<Box<dyn Write>>,
}

impl Trace {
    /// A record; lines go to `out` if there is one.
    pub fn new(out: Option<Box<dyn Write>>) -> Trace {
        Trace { hash: 0xcbf2_9ce4_8422_2325, events: 0, out }
    }

    /// Takes part of an event into the hash.
    pub fn word(&mut self, word: u64) {
        // FNV-1a by words, with a rotation so that high bits reach low ones.
        self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }

    /// Counts an event that begins, at a time and of a kind.
    pub fn event(&mut self, now_us: u64, kind: u64) {
        self.events += 1;
        self.word(now_us);
        self.word(kind);
    }

    /// Writes a line, if lines are wanted. A reader that went away is no reason to stop.
    pub fn line(&mut self, now_us: u64, text: Arguments<'_>) {
        if let Some(out) = &mut self.out {
            let _ = writeln!(out, "{:>10.6}  {text}", now_us as f64 / 1e6);
        }
    }

    /// Whether lines are wanted, for those whose text is dear.
    pub fn has_lines(&self) -> bool {
        self.out.is_some()
    }

    /// The hash of all events so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many events there were.
    pub fn events(&self) -> u64 {
        self.events
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("hash", &self.hash).field("events", &self.events).finish()
    }
}
