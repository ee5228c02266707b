//! The part of a partition's Raft log that is kept in memory: what Raft may still ask for.
//!
//! The bytes on disk are written and read by the caller; this is the view that `raft` has of them.
//! Applied entries are dropped, but for a tail of bounded size that spares a follower which is a
//! little behind a whole snapshot.

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

use super::members::Members;
use super::recovery::SnapshotMeta;

/// The entries after `truncated`, which is the last one dropped.
#[derive(Debug)]
pub(crate) struct Entries {
    entries: VecDeque<Entry>,
    bytes: usize,
    truncated: Position,
    hard_state: HardState,
    members: Members,
    /// The newest snapshot that lies on the disk, for followers that need one.
    snapshot: Option<SnapshotMeta>,
    /// A follower needs a snapshot, and there is none that the entries here continue.
    wanted: Cell<bool>,
}

/// The index and term of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The entry's index.
    pub index: u64,
    /// The term it was proposed in.
    pub term: u64,
}

impl Entries {
    /// An empty log that goes on after `truncated`.
    pub(crate) fn new(truncated: Position, hard_state: HardState, members: Members) -> Entries {
        Entries {
            entries: VecDeque::new(),
            bytes: 0,
            truncated,
            hard_state,
            members,
            snapshot: None,
            wanted: Cell::new(false),
        }
    }

    /// Appends entries; they replace what stands at their indexes and after.
    ///
    /// # Panics
    ///
    /// If they leave a hole or replace a dropped entry: a broken invariant of Raft.
    pub(crate) fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else { return };
        let next = self.truncated.index + self.entries.len() as u64 + 1;
        assert!(
            self.truncated.index < first.index && first.index <= next,
            "entries from {} do not fit a log of {} to {}",
            first.index,
            self.truncated.index,
            next
        );
        while self.entries.back().is_some_and(|last| last.index >= first.index) {
            let last = self.entries.pop_back().expect("just seen");
            self.bytes -= last.data.len();
        }
        self.bytes += entries.iter().map(|entry| entry.data.len()).sum::<usize>();
        self.entries.extend(entries);
    }

    /// Drops entries up to `last` until at most `tail_bytes` are left of all.
    pub(crate) fn truncate(&mut self, last: u64, tail_bytes: usize) {
        while self.bytes > tail_bytes || tail_bytes == 0 {
            let Some(first) = self.entries.front().filter(|first| first.index <= last) else {
                return;
            };
            self.truncated = Position { index: first.index, term: first.term };
            self.bytes -= first.data.len();
            self.entries.pop_front();
        }
    }

    /// The size of all entries.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Begins anew after a snapshot that was received.
    pub(crate) fn restart(&mut self, after: Position) {
        self.entries.clear();
        self.bytes = 0;
        self.truncated = after;
        self.snapshot = None;
    }

    /// A snapshot lies on the disk.
    pub(crate) fn set_snapshot(&mut self, meta: SnapshotMeta) {
        self.snapshot = Some(meta);
        self.wanted.set(false);
    }

    /// Whether a follower waits for a snapshot that has to be taken first.
    pub(crate) fn snapshot_wanted(&self) -> bool {
        self.wanted.get()
    }

    /// The index of the newest snapshot on the disk; 0 if there is none.
    pub(crate) fn snapshot_index(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, |meta| meta.position.index)
    }

    /// The index of the last entry that was dropped.
    pub(crate) fn truncated_index(&self) -> u64 {
        self.truncated.index
    }

    /// The configuration as of the entries applied.
    pub(crate) fn set_members(&mut self, members: Members) {
        self.members = members;
    }

    pub(crate) fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// The configuration of the group.
    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    /// The term of an entry that is kept, or of the last one dropped.
    pub(crate) fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.truncated.index {
            return Some(self.truncated.term);
        }
        self.entry(index).map(|entry| entry.term)
    }

    /// An entry that is kept.
    pub(crate) fn entry(&self, index: u64) -> Option<&Entry> {
        let offset = index.checked_sub(self.truncated.index + 1)?;
        self.entries.get(usize::try_from(offset).ok()?)
    }
}

impl Storage for Entries {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), ConfState::from(&self.members)))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(Error::Store(StorageError::Compacted));
        }
        let first = self.truncated.index + 1;
        let range = (low - first) as usize..(high - first) as usize;
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut bytes = 0;
        let within = |entry: &&Entry| {
            let first = bytes == 0;
            bytes += entry.data.len() as u64 + 1;
            first || bytes <= limit
        };
        Ok(self.entries.range(range).take_while(within).cloned().collect())
    }

    fn term(&self, index: u64) -> Result<u64> {
        let missing = if index < self.truncated.index {
            StorageError::Compacted
        } else {
            StorageError::Unavailable
        };
        self.term_of(index).ok_or(Error::Store(missing))
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.truncated.index + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.truncated.index + self.entries.len() as u64)
    }

    /// For a follower that is too far behind. Only what the snapshot stands for goes through Raft, its
    /// contents another way; see the owner. One that the entries here do not continue is of no use, nor
    /// is one that was taken before the follower belonged to the group.
    fn snapshot(&self, request_index: u64, to: u64) -> Result<Snapshot> {
        let least = request_index.max(self.truncated.index);
        let usable = self
            .snapshot
            .as_ref()
            .filter(|meta| meta.position.index >= least && meta.members.contains(to));
        let Some(meta) = usable else {
            self.wanted.set(true);
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        };
        Ok(raft_snapshot(meta))
    }
}

/// A snapshot as Raft knows it.
pub(super) fn raft_snapshot(meta: &SnapshotMeta) -> Snapshot {
    let metadata = SnapshotMetadata {
        conf_state: Some(ConfState::from(&meta.members)),
        index: meta.position.index,
        term: meta.position.term,
    };
    Snapshot { data: Vec::new(), metadata: Some(metadata) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![0; 10], ..Entry::default() }
    }

    fn log(count: u64) -> Entries {
        let mut log = Entries::new(Position::default(), HardState::default(), Members::default());
        log.append((1..=count).map(|index| entry(index, 1)).collect());
        log
    }

    fn indexes(log: &Entries, low: u64, high: u64, max: u64) -> Vec<u64> {
        let entries = log.entries(low, high, max, GetEntriesContext::empty(false));
        entries.expect("in range").iter().map(|entry| entry.index).collect()
    }

    #[test]
    fn later_entries_replace_a_conflicting_suffix() {
        let mut log = log(5);
        log.append(vec![entry(3, 2)]);
        assert_eq!(log.last_index(), Ok(3));
        assert_eq!(log.term(3), Ok(2));
        assert_eq!(log.term(2), Ok(1));
        assert_eq!(log.bytes, 30);
    }

    #[test]
    fn truncation_keeps_a_tail_and_the_last_term() {
        let mut log = log(5);
        log.truncate(4, 20);
        assert_eq!(log.first_index(), Ok(4));
        assert_eq!(log.term(3), Ok(1));
        assert_eq!(log.term(2), Err(Error::Store(StorageError::Compacted)));
        log.truncate(4, 0);
        assert_eq!((log.first_index(), log.last_index()), (Ok(5), Ok(5)));
        log.truncate(5, 0);
        assert_eq!((log.first_index(), log.last_index()), (Ok(6), Ok(5)));
    }

    #[test]
    fn reads_are_limited_by_size_but_never_empty() {
        let log = log(5);
        assert_eq!(indexes(&log, 2, 6, u64::MAX), [2, 3, 4, 5]);
        assert_eq!(indexes(&log, 2, 6, 1), [2]);
        assert_eq!(indexes(&log, 2, 6, 22), [2, 3]);
    }
}
