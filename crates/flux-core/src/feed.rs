//! What readers of a partition's changes are given: committed entries, the recent ones from memory.
//!
//! A [`Ring`] keeps what was applied last within a bound, and says of anything older that it is to be read
//! elsewhere. It does not wait, wake or lock, and knows nothing of the log on disk; what an entry's effects
//! are, `effect::Changes` says.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType};

use crate::effect::{EffectError, Effects};
use crate::replica::Position;
use crate::{Cursor, Revision};

#[cfg(test)]
mod tests;

/// What an entry takes in memory besides its payload, about.
const ENTRY_BYTES: usize = 128;

/// An entry is not kept if it takes more than this part of a ring.
const LARGEST_PART: usize = 4;

/// A committed entry with effects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Where it is in the log.
    pub position: Position,
    /// The revision of its first effect.
    pub first: Revision,
    /// The revision of its last effect.
    pub last: Revision,
    /// The batch, for `effect::Changes`.
    pub payload: Vec<u8>,
}

impl Committed {
    /// An entry that was read back from the log; `None` if it has no effects.
    ///
    /// # Errors
    ///
    /// If the payload is not a batch that this version can read.
    pub fn read(entry: Entry) -> Result<Option<Committed>, EffectError> {
        if entry.entry_type() != EntryType::EntryNormal || entry.data.is_empty() {
            return Ok(None);
        }
        let position = Position { index: entry.index, term: entry.term };
        let payload = entry.data;
        let mut effects = Effects::new(&payload)?;
        let first = effects.next_revision();
        let mut last = None;
        for effect in &mut effects {
            last = Some(effect?.0);
        }
        Ok(last.map(|last| Committed { position, first, last, payload }))
    }

    /// Where a reader is who has read this entry up to a revision of it: what comes next is behind the index.
    pub fn read_to(&self, revision: Revision) -> Cursor {
        let index = self.position.index;
        Cursor { revision, index: if revision >= self.last { index } else { index - 1 } }
    }
}

/// The committed entries of a partition that were applied last.
#[derive(Debug)]
pub struct Ring {
    limit_bytes: usize,
    bytes: usize,
    /// They follow on each other.
    entries: VecDeque<Arc<Committed>>,
    /// The last revision that was applied, and the index of its entry or a later one. Nothing is known of
    /// what is applied where it is `None`.
    end: Option<(Revision, u64)>,
}

/// What a ring has after some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingRead {
    /// Entries that follow on each other, at least one. The first has the next revision in it, not always at
    /// its beginning.
    Entries(Vec<Arc<Committed>>),
    /// There is nothing newer yet.
    UpToDate,
    /// It is not held any more, or never was. The log may have it, in entries before this index.
    Older {
        /// The index of the first entry that is held, or would be; `u64::MAX` if the ring has not begun.
        until: u64,
    },
}

impl Ring {
    /// A ring that takes so many bytes at most, and has not begun.
    pub fn new(limit_bytes: usize) -> Ring {
        Ring { limit_bytes, bytes: 0, entries: VecDeque::new(), end: None }
    }

    /// Drops everything and begins after what is applied now: this revision, and the entry of this index.
    /// To be called before the first entry is pushed, and when a snapshot was installed.
    pub fn begin(&mut self, at: (Revision, u64)) {
        self.stop();
        self.end = Some(at);
    }

    /// Drops everything. What is applied from now on is not known here.
    pub fn stop(&mut self) {
        self.entries = VecDeque::new();
        self.bytes = 0;
        self.end = None;
    }

    /// Adds an entry that was applied. The oldest go where it finds no room, and all if it takes more than a
    /// quarter of the ring or does not follow on the last one; one that is known already is left out.
    pub fn push(&mut self, one: Arc<Committed>) {
        match self.end {
            Some((revision, _)) if one.last <= revision => return,
            Some((revision, _)) if one.first == revision + 1 => {}
            _ => self.stop(),
        }
        self.end = Some((one.last, one.position.index));
        let bytes = bytes_of(&one);
        if bytes > self.limit_bytes / LARGEST_PART {
            self.entries = VecDeque::new();
            self.bytes = 0;
            return;
        }
        self.bytes += bytes;
        self.entries.push_back(one);
        while self.bytes > self.limit_bytes {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.bytes -= bytes_of(&oldest);
        }
    }

    /// What comes after a revision: about so many bytes of payloads, and one entry at least.
    pub fn after(&self, revision: Revision, bytes: usize) -> RingRead {
        let Some((last, index)) = self.end else {
            return RingRead::Older { until: u64::MAX };
        };
        if revision >= last {
            return RingRead::UpToDate;
        }
        match self.entries.front() {
            Some(first) if first.first <= revision + 1 => {}
            first => {
                let until = first.map_or(index + 1, |first| first.position.index);
                return RingRead::Older { until };
            }
        }
        let start = self.entries.partition_point(|one| one.last <= revision);
        let mut room = bytes;
        let mut taken = Vec::new();
        for one in self.entries.range(start..) {
            if one.payload.len() > room && !taken.is_empty() {
                break;
            }
            room = room.saturating_sub(one.payload.len());
            taken.push(Arc::clone(one));
        }
        RingRead::Entries(taken)
    }

    /// The last revision that is known to be applied.
    pub fn last(&self) -> Option<Revision> {
        self.end.map(|(revision, _)| revision)
    }

    /// The memory that it takes, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn bytes_of(one: &Committed) -> usize {
    one.payload.len() + ENTRY_BYTES
}
