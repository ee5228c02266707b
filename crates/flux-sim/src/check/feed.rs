//! What the broker was given: each change as it was committed, in order, without a hole, and all of them in the
//! end. A consumer that takes each once, by the real ledger, has the table.
//!
//! A queue has repeats, which are no fault: whoever publishes may do so again.

use std::collections::{BTreeMap, BTreeSet};

use flux_cdc::{Ledger, Verdict};
use flux_proto::event::{Event, Gap, GapId, Record};

use super::reference::Reference;
use super::{Promise, Violation};

/// What the broker has.
#[derive(Debug, Default)]
pub struct Feed {
    queues: BTreeMap<u16, Queue>,
    /// Changes, repeats of them, and gaps that came.
    pub counts: Counts,
}

/// How much came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Changes.
    pub changes: u64,
    /// Of these the ones that were there already.
    pub repeats: u64,
    /// Begins of gaps.
    pub gaps: u64,
    /// Rows of gaps.
    pub rows: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.changes += other.changes;
        self.repeats += other.repeats;
        self.gaps += other.gaps;
        self.rows += other.rows;
    }
}

/// What it has of a partition.
#[derive(Debug, Default)]
struct Queue {
    /// All changes up to here are there, or what stands for them.
    through: u64,
    replay: Replay,
}

/// A consumer that takes each record once.
#[derive(Debug, Default)]
pub struct Replay {
    ledger: Ledger,
    /// The keys that there are, with what was said of them last.
    keys: BTreeMap<Vec<u8>, Event>,
    /// The gap under way, and the keys that it has named.
    gap: Option<(GapId, BTreeSet<Vec<u8>>)>,
}

impl Feed {
    /// The revision up to which the broker has a partition's changes, or what stands for them.
    pub fn through(&self, partition: u16) -> u64 {
        self.queues.get(&partition).map_or(0, |queue| queue.through)
    }

    /// A message is in the queue.
    ///
    /// # Errors
    /// If a record of it is not true, or out of order.
    pub fn stored(&mut self, records: &[Record], reference: &Reference) -> Result<(), Violation> {
        for record in records {
            is_true(record, reference)?;
            let queue = self.queues.entry(record.partition()).or_default();
            queue.stored(record, &mut self.counts)?;
        }
        for record in records {
            self.queues.entry(record.partition()).or_default().replay.take(record)?;
        }
        Ok(())
    }

    /// Everything has come that will.
    ///
    /// # Errors
    /// If a change is missing, or what follows from them all is not the table.
    pub fn is_complete(&self, partition: u16, reference: &Reference) -> Result<(), Violation> {
        let (_, end) = reference.end(partition);
        let through = self.through(partition);
        if through != end {
            let evidence = format!("partition {partition}: {through} of {end} changes are there");
            return Err(Violation::new(Promise::FeedComplete, evidence));
        }
        let nothing = Replay::default();
        let replay = self.queues.get(&partition).map_or(&nothing, |queue| &queue.replay);
        replay.is_complete(partition, reference)
    }
}

impl Queue {
    fn stored(&mut self, record: &Record, counts: &mut Counts) -> Result<(), Violation> {
        let next = self.through + 1;
        let first = match record {
            Record::Change(event) => event.revision,
            Record::GapBegin(gap) => *gap.lost.start(),
            Record::Row { .. } | Record::GapEnd { .. } => next,
        };
        if first > next {
            let evidence = format!("{record:?} comes where {next} is next");
            return Err(Violation::new(Promise::FeedOrdered, evidence));
        }
        match record {
            Record::Change(event) => {
                counts.changes += 1;
                counts.repeats += u64::from(event.revision < next);
                self.through = self.through.max(event.revision);
            }
            Record::GapEnd { gap, .. } => self.through = self.through.max(gap.at),
            Record::GapBegin(_) => counts.gaps += 1,
            Record::Row { .. } => counts.rows += 1,
        }
        Ok(())
    }
}

impl Replay {
    /// A record comes. Whether it is new.
    ///
    /// # Errors
    /// If it is ahead of what is there.
    pub fn take(&mut self, record: &Record) -> Result<bool, Violation> {
        match self.ledger.judge(record) {
            Verdict::Repeat => return Ok(false),
            Verdict::Fresh => {
                self.ledger.note(record);
                self.has_the_beginning(record)?;
            }
            Verdict::Ahead { expected } => {
                let progress = self.ledger.progress(record.partition());
                let evidence =
                    format!("a consumer at {progress:?} expects {expected}, and {record:?} comes");
                return Err(Violation::new(Promise::FeedOrdered, evidence));
            }
        }
        match record {
            // A leader that has been replaced may still send what came before a row.
            Record::Change(event)
                if self.keys.get(&*event.key).is_some_and(|row| row.version >= event.revision) => {}
            Record::Change(event) => {
                if self.gap.as_ref().is_some_and(|(gap, _)| gap.at <= event.revision) {
                    self.gap = None;
                }
                match &event.value {
                    Some(_) => drop(self.keys.insert(event.key.to_vec(), event.clone())),
                    None => drop(self.keys.remove(event.key.as_ref())),
                }
            }
            Record::GapBegin(gap) => self.gap = Some((gap.id(), BTreeSet::new())),
            Record::Row { event, .. } => {
                if let Some((_, named)) = &mut self.gap {
                    named.insert(event.key.to_vec());
                }
                self.keys.insert(event.key.to_vec(), event.clone());
            }
            Record::GapEnd { .. } => {
                if let Some((_, named)) = self.gap.take() {
                    self.keys.retain(|key, _| named.contains(key));
                }
            }
        }
        Ok(true)
    }

    /// The queue was there before the first change: whoever has something of a partition has it from 1 on.
    fn has_the_beginning(&self, record: &Record) -> Result<(), Violation> {
        let begins = self.ledger.progress(record.partition()).map_or(1, |progress| progress.begins);
        if begins > 1 {
            let evidence = format!("a consumer begins at {begins}, with {record:?}");
            return Err(Violation::new(Promise::FeedComplete, evidence));
        }
        Ok(())
    }

    /// Everything has come that will.
    ///
    /// # Errors
    /// If what follows from it is not the table.
    pub fn is_complete(&self, partition: u16, reference: &Reference) -> Result<(), Violation> {
        let due = reference.last_values(partition);
        let differs = |key: &[u8], has: Option<&Event>, due: Option<&Event>| {
            let key = String::from_utf8_lossy(key);
            let evidence = format!("partition {partition}: {key} is {has:?}, due is {due:?}");
            Err(Violation::new(Promise::FeedComplete, evidence))
        };
        for (key, event) in &self.keys {
            let due = due.get(key.as_slice()).copied();
            if due.is_none_or(|due| !is_same_state(event, due)) {
                return differs(key, Some(event), due);
            }
        }
        match due.iter().find(|(key, _)| !self.keys.contains_key(**key)) {
            Some((key, due)) => differs(key, None, Some(due)),
            None => Ok(()),
        }
    }
}

/// Whether two events leave a key in the same state.
fn is_same_state(one: &Event, other: &Event) -> bool {
    let state = |event: &Event| (event.value.clone(), event.version, event.expires_at_ms);
    one.key == other.key && state(one) == state(other)
}

/// Whether a record says what was committed.
fn is_true(record: &Record, reference: &Reference) -> Result<(), Violation> {
    let known = |revision| reference.change(record.partition(), revision).map(|(_, due)| due);
    let (is_true, due) = match record {
        Record::Change(event) => {
            let due = known(event.revision);
            let same = |due: &Event| *event == Event { partition: event.partition, ..due.clone() };
            (due.is_some_and(same), due)
        }
        Record::Row { gap, event, .. } => {
            let due = known(event.version);
            let same = |due: &Event| is_same_state(event, due);
            (event.version <= gap.at && due.is_some_and(same), due)
        }
        Record::GapBegin(_) | Record::GapEnd { .. } => return Ok(()),
    };
    if is_true {
        return Ok(());
    }
    let evidence = format!("{record:?}, due is {due:?}");
    Err(Violation::new(Promise::FeedTrue, evidence))
}

/// Whether a node had to tell of a gap: its replica's log begins after an entry that has what is lost, or a part
/// of it had to go.
///
/// # Errors
/// If it had not.
pub fn is_needed(
    gap: &Gap,
    start: u64,
    released: bool,
    reference: &Reference,
) -> Result<(), Violation> {
    let first = reference.change(gap.partition, *gap.lost.start()).map_or(0, |(index, _)| *index);
    if released || first <= start {
        return Ok(());
    }
    let evidence = format!(
        "{gap:?}: entry {first} has its first change, the log begins after {start} and all of it was kept"
    );
    Err(Violation::new(Promise::GapNeeded, evidence))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use flux_core::effect::{BatchWriter, Reason};
    use flux_proto::event::{Op, Place};

    use super::*;
    use crate::check::consensus::Contents;

    /// Revisions 1: a = 1, 2: b = 2, 3: a is deleted, 4: b = 4; one entry each, from index 2 on.
    fn reference() -> Reference {
        let mut reference = Reference::default();
        reference.begins(0, 1);
        for revision in 1..=4 {
            let mut writer = BatchWriter::new(Vec::new());
            writer.start(7, revision);
            match revision {
                1 => writer.put(b"a", b"1", None),
                2 => writer.put(b"b", b"2", None),
                3 => writer.delete(b"a", Reason::Explicit),
                _ => writer.put(b"b", b"4", Some(99)),
            };
            let contents = Contents { entry_type: 0, payload: writer.payload().to_vec() };
            reference.applies(0, (revision + 1, 1), &contents).expect("it follows");
        }
        reference
    }

    fn change(revision: u64) -> Record {
        let known = reference();
        Record::Change(known.change(0, revision).expect("it is committed").1.clone())
    }

    fn gap(lost: std::ops::RangeInclusive<u64>, at: u64) -> Gap {
        Gap { partition: 0, lost, at: Place { revision: at, index: at + 1 }, term: 1 }
    }

    fn row(gap: &Gap, revision: u64) -> Record {
        let Record::Change(event) = change(revision) else { unreachable!("it is a change") };
        let event = Event { previous_version: 0, committed_at_ms: 0, ..event };
        Record::Row { gap: gap.id(), number: 1, event }
    }

    fn promise(result: Result<(), Violation>) -> Option<Promise> {
        result.err().map(|violation| violation.promise)
    }

    /// What is wrong first: with a message, or with the whole.
    fn judge(records: &[Record]) -> Option<Promise> {
        let (mut feed, reference) = (Feed::default(), reference());
        let stored =
            records.iter().try_for_each(|one| feed.stored(std::slice::from_ref(one), &reference));
        promise(stored.and_then(|()| feed.is_complete(0, &reference)))
    }

    #[test]
    fn changes_with_repeats_are_complete() {
        assert_eq!(judge(&[1, 2, 1, 2, 3, 2, 4].map(change)), None);
        assert_eq!(judge(&[1, 2, 3].map(change)), Some(Promise::FeedComplete));
        assert_eq!(judge(&[1, 3].map(change)), Some(Promise::FeedOrdered));
        assert_eq!(judge(&[2, 1].map(change)), Some(Promise::FeedOrdered));
    }

    #[test]
    fn each_field_of_a_change_must_be_true() {
        let lies: [fn(&mut Event); 6] = [
            |event| event.op = Op::Delete,
            |event| event.key = Bytes::from_static(b"c"),
            |event| event.value = None,
            |event| event.previous_version = 1,
            |event| event.expires_at_ms = Some(98),
            |event| event.committed_at_ms = 8,
        ];
        for lie in lies {
            let Record::Change(mut event) = change(4) else { unreachable!("it is a change") };
            lie(&mut event);
            let last = Record::Change(event);
            let records = [change(1), change(2), change(3), last];
            assert_eq!(judge(&records), Some(Promise::FeedTrue));
        }
    }

    #[test]
    fn rows_stand_for_what_is_lost() {
        let gap = gap(2..=4, 4);
        let (begin, end) =
            (Record::GapBegin(gap.clone()), Record::GapEnd { gap: gap.id(), rows: 1 });
        assert_eq!(judge(&[change(1), begin.clone(), row(&gap, 4), end.clone()]), None);
        // The gap lacks a row, so that its end comes too soon; or it has no end.
        let short = [change(1), begin.clone(), end.clone()];
        assert_eq!(judge(&short), Some(Promise::FeedOrdered));
        assert_eq!(judge(&[change(1), begin.clone(), row(&gap, 4)]), Some(Promise::FeedComplete));
        let empty = Record::GapEnd { gap: gap.id(), rows: 0 };
        assert_eq!(judge(&[change(1), begin.clone(), empty]), Some(Promise::FeedComplete));
        // It begins behind what is there.
        assert_eq!(judge(&[begin, row(&gap, 4), end]), Some(Promise::FeedOrdered));
    }

    #[test]
    fn a_row_is_no_newer_than_its_gap() {
        let gap = gap(2..=3, 3);
        let records = [change(1), Record::GapBegin(gap.clone()), row(&gap, 4)];
        assert_eq!(judge(&records), Some(Promise::FeedTrue));
    }

    #[test]
    fn a_gap_is_needed_where_the_log_begins_later_or_had_to_go() {
        let (reference, gap) = (reference(), gap(2..=4, 4));
        // Revision 2 is in entry 3.
        assert_eq!(promise(is_needed(&gap, 3, false, &reference)), None);
        assert_eq!(promise(is_needed(&gap, 2, true, &reference)), None);
        assert_eq!(promise(is_needed(&gap, 2, false, &reference)), Some(Promise::GapNeeded));
    }
}
