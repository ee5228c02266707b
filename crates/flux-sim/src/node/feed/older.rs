//! Reads the process's log back for a lane that is behind what is in memory.
//!
//! As in `flux-server`'s `feed/catch_up.rs`, one question at a time.

use std::ops::ControlFlow;
use std::sync::Arc;

use flux_core::effect::Effects;
use flux_core::feed::Committed;
use flux_core::replica::{History, Position, StateRecord};
use flux_log::{Entry, LogError, LogReader, Lsn, Record, Scanned, State};

/// An entry that was read back, and the batch of the log that holds it.
#[derive(Clone, Debug)]
pub(super) struct Older {
    pub(super) entry: Arc<Committed>,
    pub(super) lsn: Lsn,
}

/// What is looked for.
pub(super) struct Question {
    pub(super) partition: u16,
    pub(super) after: u64,
    /// The batch of the log to begin with, if that is known.
    pub(super) from: Option<Lsn>,
    pub(super) bytes: usize,
    /// Up to where entries are applied here.
    pub(super) applied: u64,
    /// The planted bug: the first entry of an index counts, not the last.
    pub(super) keeps_replaced: bool,
}

struct Search {
    question: Question,
    history: History,
    entries: Vec<Older>,
    found_bytes: usize,
    /// The highest index so far.
    highest: u64,
}

impl Question {
    /// Entries with changes, dense, beginning with the one that holds `after + 1`; none if the log does not
    /// have that.
    pub(super) fn answer(self, reader: &LogReader) -> Result<Vec<Older>, LogError> {
        let oldest = reader.segments().first().map_or(0, |segment| segment.base);
        // What comes next may lie in a later segment than what was read last, which may be gone.
        let from = match self.from.filter(|from| *from >= oldest) {
            Some(from) => from,
            None => begin_of(reader, self.partition, self.after)?,
        };
        let mut search = Search {
            question: self,
            history: History::new(0),
            entries: Vec::new(),
            found_bytes: 0,
            highest: 0,
        };
        let scanned = reader.scan(from, &mut |lsn, record| match search.take(lsn, &record) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        match scanned {
            Ok(Scanned::End(_)) => {
                search.history.release(search.question.applied);
                search.collect();
            }
            Ok(Scanned::Stopped(_) | Scanned::Gone { .. }) => {}
            Err(error) if search.entries.is_empty() => return Err(error),
            Err(_) => {}
        }
        Ok(search.entries)
    }
}

impl Search {
    /// Takes a record. Whether nothing more is needed.
    fn take(&mut self, lsn: Lsn, record: &Record<'_>) -> bool {
        let partition = self.question.partition;
        match *record {
            Record::State(State { replica, start, term, vote, partition: of, .. })
                if of == partition =>
            {
                self.history.state(&StateRecord { replica, start, term, vote });
            }
            Record::Entry(Entry { entry_type, term, index, commit, payload, partition: of })
                if of == partition =>
            {
                if self.question.keeps_replaced && index <= self.highest {
                    self.history.release(commit);
                    return self.collect();
                }
                self.highest = index;
                let position = Position { term, index };
                let taken = self.history.entry(position, commit, entry_type, payload, lsn);
                taken.expect("an entry of a kind that this version writes");
            }
            _ => return false,
        }
        self.collect()
    }

    /// Takes what is known to be committed. Whether nothing more is needed.
    fn collect(&mut self) -> bool {
        while let Some((entry, lsn)) = self.history.pop() {
            let read = Committed::read(entry).expect("a batch that this version writes");
            let Some(entry) = read else { continue };
            let after = self.question.after;
            let expected = self.entries.last().map_or(after + 1, |last| last.entry.last + 1);
            if entry.last < expected {
                continue;
            }
            if entry.first > expected {
                return true;
            }
            self.found_bytes += entry.payload.len();
            self.entries.push(Older { entry: Arc::new(entry), lsn });
            if self.found_bytes >= self.question.bytes {
                return true;
            }
        }
        false
    }
}

/// The beginning of the newest segment whose first entry of the partition is not behind what is looked for.
fn begin_of(reader: &LogReader, partition: u16, after: u64) -> Result<Lsn, LogError> {
    let segments = reader.segments();
    let has_some = |highest: &Option<Vec<(u16, u64)>>| {
        highest.as_ref().is_none_or(|all| all.iter().any(|(one, _)| *one == partition))
    };
    let having = segments.iter().filter(|segment| has_some(&segment.highest));
    let bases: Vec<Lsn> = having.map(|segment| segment.base).collect();
    let (mut low, mut high) = (0, bases.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match first_revision(reader, partition, bases[middle])? {
            Some(first) if first <= after + 1 => low = middle + 1,
            _ => high = middle,
        }
    }
    let oldest = segments.first().map_or(0, |segment| segment.base);
    Ok(low.checked_sub(1).map_or(oldest, |at| bases[at]))
}

/// The first revision of a partition from the beginning of a segment on.
fn first_revision(reader: &LogReader, partition: u16, from: Lsn) -> Result<Option<u64>, LogError> {
    let mut first = None;
    reader.scan(from, &mut |_, record| match record {
        Record::Entry(entry) if entry.partition == partition => {
            let batch = Effects::new(entry.payload).ok();
            first = batch.map(|effects| effects.next_revision()).filter(|first| *first > 0);
            if first.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        _ => ControlFlow::Continue(()),
    })?;
    Ok(first)
}
