//! A replica's way back after a restart: a snapshot, then the records of the log.
//!
//! Entries that are known to be committed are applied at once, so a long log is never held in memory.
//! What follows them is left to Raft, which commits it or lets another leader replace it.

use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType, HardState};

use super::entries::{Entries, Position};
use super::{Broken, ReplicaConfig};
use crate::Revision;
use crate::draft::apply;
use crate::store::Table;

/// What a snapshot stands for; stored with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// The last entry it holds.
    pub position: Position,
    /// The last revision it holds.
    pub revision: Revision,
    /// The group's voters at that entry.
    pub voters: Vec<u64>,
}

impl SnapshotMeta {
    /// The bytes: index, term, revision, number of voters and voters, each a little-endian u64.
    pub fn encode(&self) -> Vec<u8> {
        let head =
            [self.position.index, self.position.term, self.revision, self.voters.len() as u64];
        head.iter().chain(&self.voters).flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The opposite of `encode`; `None` for any other bytes.
    pub fn decode(bytes: &[u8]) -> Option<SnapshotMeta> {
        let (words, []) = bytes.as_chunks::<8>() else {
            return None;
        };
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let [index, term, revision, count, voters @ ..] = words.as_slice() else {
            return None;
        };
        if voters.len() as u64 != *count {
            return None;
        }
        let position = Position { index: *index, term: *term };
        Some(SnapshotMeta { position, revision: *revision, voters: voters.to_vec() })
    }
}

/// Rebuilds one replica from what the disk holds. Give it the snapshot's contents (into the table),
/// then every record of the partition in the order written, then `finish`.
#[derive(Debug)]
pub struct Recovery {
    pub(super) table: Arc<Table>,
    pub(super) applied: Position,
    pub(super) revision: Revision,
    voters: Vec<u64>,
    hard_state: HardState,
    /// Entries after `applied` that are not known to be committed.
    tail: Vec<Entry>,
}

impl Recovery {
    /// Starts from an empty table, or from the one that a snapshot was loaded into.
    pub fn new(table: Arc<Table>, snapshot: Option<SnapshotMeta>, config: &ReplicaConfig) -> Self {
        let meta = snapshot.unwrap_or_else(|| SnapshotMeta {
            position: Position::default(),
            revision: 0,
            voters: config.voters.clone(),
        });
        let commit = meta.position.index;
        let hard_state = HardState { term: meta.position.term, commit, ..HardState::default() };
        Recovery {
            table,
            applied: meta.position,
            revision: meta.revision,
            voters: meta.voters,
            hard_state,
            tail: Vec::new(),
        }
    }

    /// A term and vote that were written.
    pub fn state(&mut self, term: u64, vote: u64) {
        self.hard_state.term = term;
        self.hard_state.vote = vote;
    }

    /// An entry that was written, when entries up to `commit` were known to be committed.
    ///
    /// # Errors
    ///
    /// If the entry does not continue the log, or a committed one cannot be applied: the log is not
    /// one that a replica wrote.
    pub fn entry(
        &mut self,
        position: Position,
        commit: u64,
        entry_type: u8,
        payload: &[u8],
    ) -> Result<(), Broken> {
        self.hard_state.term = self.hard_state.term.max(position.term);
        self.commit_to(commit)?;
        if position.index <= self.applied.index {
            return Ok(());
        }
        self.tail.truncate((position.index - self.applied.index - 1) as usize);
        let expected = self.applied.index + self.tail.len() as u64 + 1;
        if position.index != expected {
            return Err(Broken::Hole { expected, found: position.index });
        }
        self.tail.push(Entry {
            entry_type: entry_type_from(entry_type)? as i32,
            term: position.term,
            index: position.index,
            data: payload.to_vec(),
            ..Entry::default()
        });
        Ok(())
    }

    /// Applies entries of the tail up to `commit`.
    fn commit_to(&mut self, commit: u64) -> Result<(), Broken> {
        if commit <= self.hard_state.commit {
            return Ok(());
        }
        self.hard_state.commit = commit;
        let count = (commit.saturating_sub(self.applied.index) as usize).min(self.tail.len());
        for entry in self.tail.drain(..count) {
            let position = Position { index: entry.index, term: entry.term };
            if !entry.data.is_empty() {
                self.revision = apply(&self.table, self.revision, &entry.data, |_, _, _| ())
                    .map_err(|error| Broken::Effects { position, error })?;
            }
            self.applied = position;
        }
        Ok(())
    }

    /// The index and revision reached so far.
    pub fn progress(&self) -> (u64, Revision) {
        (self.applied.index, self.revision)
    }

    /// The log as Raft goes on with it.
    pub(super) fn into_entries(mut self) -> Entries {
        // The commit may be of entries that a crash took from the log before they were synced; a
        // group of several voters sends them again.
        let last = self.applied.index + self.tail.len() as u64;
        self.hard_state.commit = self.hard_state.commit.clamp(self.applied.index, last);
        let mut entries = Entries::new(self.applied, self.hard_state, self.voters);
        entries.append(self.tail);
        entries
    }
}

fn entry_type_from(byte: u8) -> Result<EntryType, Broken> {
    match byte {
        0 => Ok(EntryType::EntryNormal),
        1 => Ok(EntryType::EntryConfChange),
        2 => Ok(EntryType::EntryConfChangeV2),
        _ => Err(Broken::EntryType(byte)),
    }
}
