//! A replica's way back after a restart: a snapshot, then the records of the log.
//!
//! Entries that are known to be committed are applied at once, so a long log is never held in memory.
//! What follows them is left to Raft, which commits it or lets another leader replace it.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType, HardState};

use super::Broken;
use super::entries::{Entries, Position};
use super::history::History;
use super::members::{self, Members};
use crate::draft::apply;
use crate::session::Sessions;
use crate::store::Table;
use crate::{Cursor, Revision};

/// In the bytes of a snapshot's description: an epoch follows.
const EPOCH_FOLLOWS: u8 = 0xe0;

/// In the same place or after it: a cursor follows.
const CURSOR_FOLLOWS: u8 = 0xe1;

/// What a snapshot stands for; stored with it, and sent before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// The last entry it holds.
    pub position: Position,
    /// The last revision it holds.
    pub revision: Revision,
    /// The group's configuration at that entry.
    pub members: Members,
    /// The epoch of the newest placement map that the group has followed; 0 if it has followed none yet.
    pub epoch: u64,
    /// How far the changes up to that entry have been passed on; zeros if nothing has.
    pub cursor: Cursor,
    /// The answers that are remembered, as `Sessions::encode` has them.
    pub sessions: Vec<u8>,
}

impl SnapshotMeta {
    /// How a group begins that has these voters from the start. The first entry is number 2: a replica
    /// that joins later has nothing, and must not take an empty log for the beginning of this one.
    pub fn founding(voters: Vec<u64>) -> SnapshotMeta {
        let position = Position { index: 1, term: 1 };
        let members = Members::of_voters(voters);
        SnapshotMeta { position, members, ..SnapshotMeta::default() }
    }

    /// How a replica begins that is alone in its group for ever.
    pub fn alone(id: u64) -> SnapshotMeta {
        SnapshotMeta { members: Members::of_voters(vec![id]), ..SnapshotMeta::default() }
    }

    /// The bytes: index, term and revision, then voters, outgoing voters and learners, each list with its
    /// length in front; every number a little-endian u64. Where there is an epoch, a byte that no sessions
    /// begin with, and the epoch; where there is a cursor, another such byte, its revision and its index.
    /// Then the sessions. Older snapshots end after the voters.
    pub fn encode(&self) -> Vec<u8> {
        let mut words = vec![self.position.index, self.position.term, self.revision];
        for list in [&self.members.voters, &self.members.outgoing, &self.members.learners] {
            words.push(list.len() as u64);
            words.extend(list);
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if self.epoch != 0 {
            bytes.push(EPOCH_FOLLOWS);
            bytes.extend_from_slice(&self.epoch.to_le_bytes());
        }
        if self.cursor != Cursor::default() {
            bytes.push(CURSOR_FOLLOWS);
            bytes.extend_from_slice(&self.cursor.revision.to_le_bytes());
            bytes.extend_from_slice(&self.cursor.index.to_le_bytes());
        }
        bytes.extend_from_slice(&self.sessions);
        bytes
    }

    /// The opposite of `encode`; `None` for any other bytes, and for what no snapshot can be of. One of an
    /// empty replica has no members.
    pub fn decode(bytes: &[u8]) -> Option<SnapshotMeta> {
        let mut rest = bytes;
        let (index, term, revision) =
            (take_word(&mut rest)?, take_word(&mut rest)?, take_word(&mut rest)?);
        let mut members = Members { voters: take_list(&mut rest)?, ..Members::default() };
        if !rest.is_empty() {
            members.outgoing = take_list(&mut rest)?;
            members.learners = take_list(&mut rest)?;
        }
        let position = Position { index, term };
        let mut epoch = 0;
        if let Some((&EPOCH_FOLLOWS, after)) = rest.split_first() {
            rest = after;
            epoch = take_word(&mut rest)?;
        }
        let mut cursor = Cursor::default();
        if let Some((&CURSOR_FOLLOWS, after)) = rest.split_first() {
            rest = after;
            cursor = Cursor { revision: take_word(&mut rest)?, index: take_word(&mut rest)? };
        }
        let sessions = rest.to_vec();
        let is_of_a_group = members == Members::default() || members.is_sound();
        if !is_of_a_group || index == u64::MAX {
            return None;
        }
        (sessions.is_empty() || Sessions::decode(&sessions).is_some()).then_some(SnapshotMeta {
            position,
            revision,
            members,
            epoch,
            cursor,
            sessions,
        })
    }

    /// The answers that are remembered.
    pub(super) fn sessions(&self) -> Sessions {
        Sessions::decode(&self.sessions).unwrap_or_default()
    }
}

fn take_word(bytes: &mut &[u8]) -> Option<u64> {
    let (word, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*word))
}

/// Takes a list with its length in front off the bytes.
fn take_list(bytes: &mut &[u8]) -> Option<Vec<u64>> {
    let count = usize::try_from(take_word(bytes)?).ok()?;
    let (list, rest) = bytes.split_at_checked(count.checked_mul(8)?)?;
    *bytes = rest;
    let (words, _) = list.as_chunks::<8>();
    Some(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// What a replica wrote about itself; the last one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateRecord {
    /// The replica's id; 0 if it was removed.
    pub replica: u64,
    /// Entries up to here that were written before this are void: a snapshot took their place.
    pub start: u64,
    /// The term.
    pub term: u64,
    /// Whom it voted for in it; 0 for nobody.
    pub vote: u64,
}

/// Rebuilds one replica from what the disk holds. Give it the snapshot's contents (into the table),
/// then every record of the partition in the order written, then `finish`.
#[derive(Debug)]
pub struct Recovery {
    pub(super) table: Arc<Table>,
    pub(super) applied: Position,
    pub(super) revision: Revision,
    pub(super) has_history: bool,
    pub(super) sessions: Sessions,
    pub(super) epoch: u64,
    pub(super) cursor: Cursor,
    replica: u64,
    start: u64,
    members: Members,
    hard_state: HardState,
    snapshot: Option<SnapshotMeta>,
    /// Where the snapshot ends, and the term of the log's own entry there, if the log has one.
    base: Position,
    term_at_base: Option<u64>,
    /// The log's end is void without a record that says so: one must be written before the next entry.
    pub(super) owes_state: bool,
    /// The newest applied entries, kept for followers: those after `kept_after`.
    kept: VecDeque<Entry>,
    kept_bytes: usize,
    kept_after: Position,
    tail_bytes: usize,
    /// The entries after `applied`.
    history: History,
    /// What makes the records those of no replica, unless a later one makes them void.
    broken: Option<Broken>,
}

impl Recovery {
    /// Starts from the snapshot that was loaded into the table; or from the beginning, with an empty
    /// table. Keeps at most `tail_bytes` of what it applies for followers that lack it.
    pub fn new(
        table: Arc<Table>,
        snapshot: Option<SnapshotMeta>,
        beginning: SnapshotMeta,
        tail_bytes: usize,
    ) -> Self {
        let meta = snapshot.clone().unwrap_or(beginning);
        let hard_state = HardState { term: meta.position.term, ..HardState::default() };
        Recovery {
            table,
            applied: meta.position,
            revision: meta.revision,
            has_history: snapshot.is_some(),
            sessions: meta.sessions(),
            epoch: meta.epoch,
            cursor: meta.cursor,
            replica: 0,
            start: 0,
            members: meta.members,
            hard_state,
            snapshot,
            base: meta.position,
            term_at_base: None,
            owes_state: false,
            kept: VecDeque::new(),
            kept_bytes: 0,
            kept_after: meta.position,
            tail_bytes,
            history: History::new(meta.position.index),
            broken: None,
        }
    }

    /// The id of the replica whose records these are; 0 if there are none, or it was removed.
    pub fn replica(&self) -> u64 {
        self.replica
    }

    /// Whether the disk had anything of the partition.
    pub fn has_history(&self) -> bool {
        self.has_history
    }

    /// A state that was written.
    pub fn state(&mut self, state: &StateRecord) {
        self.has_history = true;
        self.history.state(state);
        if (self.replica, self.start) != (state.replica, state.start) {
            // Another replica took the place of the one before, or a snapshot that of its log.
            if self.replica != state.replica {
                self.hard_state.term = state.term;
            }
            (self.replica, self.start) = (state.replica, state.start);
            self.term_at_base = None;
            self.forget_kept();
            self.broken = (state.start > self.applied.index)
                .then_some(Broken::NoSnapshot { start: state.start, found: self.applied.index });
        }
        self.hard_state.term = state.term;
        self.hard_state.vote = state.vote;
    }

    /// An entry that was written, when entries up to `commit` were known to be committed.
    ///
    /// # Errors
    ///
    /// If a committed entry cannot be applied: the log is not one that a replica wrote.
    pub fn entry(
        &mut self,
        position: Position,
        commit: u64,
        entry_type: u8,
        payload: &[u8],
    ) -> Result<(), Broken> {
        self.has_history = true;
        self.hard_state.term = self.hard_state.term.max(position.term);
        if position.index <= self.base.index {
            self.term_at_base = (position.index == self.base.index).then_some(position.term);
        }
        let expected = self.history.expected();
        if self.broken.is_some() {
            self.history.release(commit);
        } else if position.index <= expected {
            self.history.entry(position, commit, entry_type, payload, 0)?;
        } else {
            self.history.release(commit);
            self.broken = Some(Broken::Hole { expected, found: position.index });
        }
        while let Some((entry, _)) = self.history.pop() {
            self.apply(entry)?;
        }
        if self.broken.is_some() {
            self.history.forget();
        }
        Ok(())
    }

    fn apply(&mut self, entry: Entry) -> Result<(), Broken> {
        let position = Position { index: entry.index, term: entry.term };
        match entry.entry_type() {
            EntryType::EntryNormal if entry.data.is_empty() => {}
            EntryType::EntryNormal => {
                let (table, sessions) = (&self.table, &mut self.sessions);
                let applied = apply(table, sessions, self.revision, &entry.data, |_, _, _| ())
                    .map_err(|error| Broken::Effects { position, error })?;
                self.revision = applied.revision;
                self.cursor = self.cursor.max(applied.cursor.unwrap_or_default());
            }
            _ => {
                let change = members::decode(&entry.data);
                let change = change.ok_or(Broken::Change { index: position.index })?;
                self.members = self.members.after(&change);
                self.epoch = self.epoch.max(members::epoch_of(&change));
            }
        }
        self.applied = position;
        self.kept_bytes += entry.data.len();
        self.kept.push_back(entry);
        while self.kept_bytes > self.tail_bytes || self.tail_bytes == 0 {
            let Some(entry) = self.kept.pop_front() else { break };
            self.kept_bytes -= entry.data.len();
            self.kept_after = Position { index: entry.index, term: entry.term };
        }
        Ok(())
    }

    fn forget_kept(&mut self) {
        self.kept.clear();
        self.kept_bytes = 0;
        self.kept_after = self.applied;
    }

    /// Says whether the records were those of a replica.
    ///
    /// # Errors
    ///
    /// If entries are missing, or the snapshot that they continue is.
    pub fn finish(&mut self) -> Result<(), Broken> {
        if self.replica != 0 && self.start == 0 && !self.members.contains(self.replica) {
            self.begin_with_nothing();
        } else if self.term_at_base.is_some_and(|term| term != self.base.term) {
            self.go_on_from_snapshot();
        }
        self.broken.take().map_or(Ok(()), Err)
    }

    /// The replica has written its id and has received nothing yet: the snapshot and the entries that were
    /// found are those of an earlier one, which left. Known only at the end, since the snapshot may be that
    /// of a still later one.
    fn begin_with_nothing(&mut self) {
        self.table.clear();
        self.applied = Position::default();
        self.revision = 0;
        self.sessions = Sessions::default();
        self.members = Members::default();
        self.epoch = 0;
        self.cursor = Cursor::default();
        self.snapshot = None;
        self.history = History::new(0);
        self.forget_kept();
    }

    /// The snapshot is of another log: it came from a leader, and the crash came before the record that would
    /// have made what follows in this one void.
    fn go_on_from_snapshot(&mut self) {
        self.history.forget();
        self.start = self.base.index;
        self.owes_state = true;
    }

    /// The index and revision reached so far.
    pub fn progress(&self) -> (u64, Revision) {
        (self.applied.index, self.revision)
    }

    /// The log as Raft goes on with it.
    pub(super) fn into_entries(mut self) -> (Entries, u64) {
        // The commit may be of entries that a crash took from the log before they were synced; a
        // group of several voters sends them again.
        let last = self.history.expected() - 1;
        self.hard_state.commit = self.history.commit().clamp(self.applied.index, last);
        let mut entries = Entries::new(self.kept_after, self.hard_state, self.members);
        entries.append(self.kept.into());
        entries.append(self.history.into_waiting());
        if let Some(snapshot) = self.snapshot {
            entries.set_snapshot(snapshot);
        }
        (entries, self.start)
    }
}
