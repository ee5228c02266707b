//! Which entries of a log that is read back are committed.
//!
//! A log as it was written has entries that others took the place of later, entries that a snapshot made
//! void, and at its end some of which nobody knows yet. This gives out the committed ones, each once and in
//! order, as soon as something that is read says so: an entry is the last of its index when a record after
//! it, or its own, has a commit index that covers it. Recovery and the readers of older changes go by it.
//!
//! It reads no file, and does not know what an entry does. How much waits here is bounded by what a leader
//! may have in flight, as long as what is given out is taken.

use std::collections::VecDeque;
use std::ops::Range;

use raft::eraftpb::{Entry, EntryType};

use super::entries::Position;
use super::{Broken, StateRecord};

/// A reader of one partition's records, in the order in which they were written.
#[derive(Debug)]
pub struct History {
    /// Entries up to here are not wanted, or were given out.
    passed: u64,
    /// Entries up to here are known to be committed.
    commit: u64,
    /// Entries that were not given out; they follow on each other. Each with its mark.
    waiting: VecDeque<(Entry, u64)>,
    /// Whose log it is, and after which index it begins, as the last state says.
    log: Option<(u64, u64)>,
    /// The indexes of the entries that were read without a hole.
    run: Option<Range<u64>>,
}

impl History {
    /// A reader that wants the entries after this one, which is known to be committed. What it is given may
    /// begin anywhere.
    pub fn new(after: u64) -> History {
        History { passed: after, commit: after, waiting: VecDeque::new(), log: None, run: None }
    }

    /// A state that was written. If the log begins anew with it, what was read before is void.
    pub fn state(&mut self, state: &StateRecord) {
        let log = (state.replica, state.start);
        match self.log.replace(log) {
            Some(before) if before == log => {}
            Some(_) => self.forget(),
            // What was read so far may be of this log or of one before it. If it is of this one, nothing of it
            // is as old as its start; if not, the entries to come take the place of what is newer.
            None => {
                while self.waiting.pop_front_if(|(one, _)| one.index <= state.start).is_some() {}
                let run = self.run.take().map(|run| run.start.max(state.start + 1)..run.end);
                self.run = run.filter(|run| !run.is_empty());
            }
        }
    }

    /// An entry that was written, when entries up to `commit` were known to be committed. `mark` says where,
    /// in the caller's terms.
    ///
    /// # Errors
    ///
    /// `Broken::EntryType` if this version does not know what it is.
    pub fn entry(
        &mut self,
        position: Position,
        commit: u64,
        entry_type: u8,
        payload: &[u8],
        mark: u64,
    ) -> Result<(), Broken> {
        let Position { index, term } = position;
        // First of all: what this entry replaces was not committed, whatever `commit` says.
        while self.waiting.pop_back_if(|(one, _)| one.index >= index).is_some() {}
        self.release(commit);
        match &mut self.run {
            Some(run) if index <= run.end => *run = run.start.min(index)..index + 1,
            _ => {
                self.waiting.clear();
                self.run = Some(index..index + 1);
            }
        }
        if index > self.passed {
            let (entry_type, data) = (entry_type_from(entry_type)? as i32, payload.to_vec());
            self.waiting
                .push_back((Entry { entry_type, term, index, data, ..Entry::default() }, mark));
        }
        Ok(())
    }

    /// Entries up to this one are committed, as the caller knows.
    pub fn release(&mut self, commit: u64) {
        self.commit = self.commit.max(commit);
    }

    /// The next committed entry, with its mark. If it does not follow on the one before, or on what was asked
    /// for, then what is between them is not in this log.
    pub fn pop(&mut self) -> Option<(Entry, u64)> {
        let next = self.waiting.pop_front_if(|(one, _)| one.index <= self.commit)?;
        self.passed = next.0.index;
        Some(next)
    }

    /// The mark of the oldest entry that was not given out: what is read again later must begin there.
    pub fn oldest_mark(&self) -> Option<u64> {
        self.waiting.front().map(|(_, mark)| *mark)
    }

    /// The first entry from which on there is no hole in what was read, wanted or not.
    pub fn begins_at(&self) -> Option<u64> {
        self.run.as_ref().map(|run| run.start)
    }

    /// The index that follows on what was given out and what waits.
    pub(super) fn expected(&self) -> u64 {
        self.waiting.back().map_or(self.passed, |(last, _)| last.index) + 1
    }

    /// The index up to which entries are known to be committed.
    pub(super) fn commit(&self) -> u64 {
        self.commit
    }

    /// Drops what waits.
    pub(super) fn forget(&mut self) {
        self.waiting.clear();
        self.run = None;
    }

    /// What is left, and not known to be committed.
    pub(super) fn into_waiting(self) -> Vec<Entry> {
        self.waiting.into_iter().map(|(entry, _)| entry).collect()
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
