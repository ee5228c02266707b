//! Logs of a follower with all that may happen to one, read back from anywhere to anywhere: what comes out
//! is what the group has committed.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// Entries that the group commits, now or later.
    Append(u64),
    /// Entries that others will take the place of.
    AppendVoid(u64),
    /// The group commits so many entries more.
    Commit(u64),
    /// The follower hears of what is committed.
    Hear,
    /// A term or a vote.
    State,
    /// A snapshot of all that the group has committed.
    Install,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (1u64..5).prop_map(Step::Append),
        2 => (1u64..4).prop_map(Step::AppendVoid),
        4 => (1u64..6).prop_map(Step::Commit),
        3 => Just(Step::Hear),
        1 => Just(Step::State),
        1 => Just(Step::Install),
    ]
}

/// The term of entries that the group commits; that of the others is higher.
const SOUND_TERM: u64 = 5;

/// A follower's log, as it is written.
#[derive(Debug, Default)]
struct Follower {
    records: Vec<Record>,
    /// What the group has committed.
    group_commit: u64,
    /// What the follower has heard of that.
    commit: u64,
    /// Its entries are the group's up to here, and void ones up to `last`.
    sound: u64,
    last: u64,
    start: u64,
    term: u64,
}

impl Follower {
    fn take(&mut self, step: &Step) {
        match *step {
            Step::Append(count) => {
                self.last = self.sound;
                for _ in 0..count {
                    self.sound += 1;
                    self.write(SOUND_TERM);
                }
            }
            Step::AppendVoid(count) => {
                // Nothing takes the place of what is committed.
                if self.last >= self.group_commit {
                    (0..count).for_each(|_| self.write(SOUND_TERM + 1));
                }
            }
            Step::Commit(count) => self.group_commit += count,
            Step::Hear => self.commit = self.commit.max(self.group_commit.min(self.sound)),
            Step::State => {
                self.term += 1;
                self.state();
            }
            Step::Install if self.group_commit > self.sound => {
                self.start = self.group_commit;
                self.state();
                (self.sound, self.last, self.commit) = (self.start, self.start, self.start);
            }
            Step::Install => {}
        }
    }

    fn write(&mut self, term: u64) {
        self.last += 1;
        let entry = Entry { index: self.last, term, ..Entry::default() };
        self.records.push(Record::Entry { entry, commit: self.commit });
    }

    fn state(&mut self) {
        let state = StateRecord { replica: 1, start: self.start, term: self.term, vote: 0 };
        self.records.push(Record::State(state));
    }
}

/// What comes out of these records, with the commit index that the follower has in the end.
fn read(records: &[Record], after: u64, applied: u64) -> (Vec<u64>, History) {
    let mut history = History::new(after);
    let mut popped = Vec::new();
    let mut take = |history: &mut History| {
        while let Some((entry, mark)) = history.pop() {
            assert_eq!(entry.term, SOUND_TERM, "entry {} is void", entry.index);
            assert_eq!(mark, entry.index * 10);
            popped.push(entry.index);
        }
    };
    for record in records {
        match record {
            Record::State(state) => history.state(state),
            Record::Entry { entry, commit } => {
                let position = Position { index: entry.index, term: entry.term };
                let entered = history.entry(position, *commit, 0, &[], entry.index * 10);
                entered.expect("an entry");
            }
        }
        take(&mut history);
    }
    history.release(applied);
    take(&mut history);
    (popped, history)
}

proptest! {
    #[test]
    fn what_is_committed_comes_out_once_and_in_order(
        steps in vec(step(), 1..40),
        from in 0usize..20,
        after in 0u64..20,
    ) {
        let mut follower = Follower { term: 1, ..Follower::default() };
        follower.state();
        for step in &steps {
            follower.take(step);
        }
        let records = &follower.records[from.min(follower.records.len())..];
        let (popped, history) = read(records, after, follower.commit);
        prop_assert!(popped.iter().zip(popped.iter().skip(1)).all(|(one, next)| one < next));
        prop_assert!(popped.iter().all(|index| after < *index && *index <= follower.commit));
        let oldest = history.oldest_mark().map(|mark| mark / 10);
        prop_assert!(oldest.is_none_or(|oldest| follower.commit < oldest));

        // All that is there behind the last hole, or the beginning, comes out.
        let Some(begins_at) = history.begins_at() else { return Ok(()) };
        let wanted: Vec<u64> = (begins_at.max(after + 1)..=follower.commit).collect();
        prop_assert!(popped.ends_with(&wanted), "{popped:?} {wanted:?}");
        if begins_at <= after + 1 {
            prop_assert_eq!(popped, wanted, "no hole");
        }
    }

    /// Wherever the follower stops, it goes on from all that it knew to be committed.
    #[test]
    fn recovery_reaches_what_was_known_to_be_committed(steps in vec(step(), 1..40)) {
        let mut follower = Follower { term: 1, ..Follower::default() };
        follower.state();
        for step in &steps {
            follower.take(step);
            let memory = Memory::new(0);
            let meta = |index| SnapshotMeta {
                position: Position { index, term: SOUND_TERM },
                ..SnapshotMeta::founding(vec![1, 2, 3])
            };
            let snapshot = (follower.start > 0).then(|| meta(follower.start));
            let mut recovery = Recovery::new(table(&memory), snapshot, meta(0), 0);
            let mut written = follower.start;
            for record in &follower.records {
                match record {
                    Record::State(state) => recovery.state(state),
                    Record::Entry { entry, commit } => {
                        let position = Position { index: entry.index, term: entry.term };
                        recovery.entry(position, *commit, 0, &[]).expect("an entry");
                        written = written.max(*commit);
                    }
                }
            }
            recovery.finish().expect("a whole log");
            prop_assert_eq!(recovery.progress().0, written);
            let (entries, start) = recovery.into_entries();
            prop_assert_eq!(start, follower.start);
            let last = raft::Storage::last_index(&entries).expect("it has an end");
            prop_assert_eq!(last, follower.last);
        }
    }
}

#[test]
fn a_log_that_begins_later_says_so() {
    let entry = |index| Record::Entry {
        entry: Entry { index, term: SOUND_TERM, ..Entry::default() },
        commit: index,
    };
    let records: Vec<Record> = (10..14).map(entry).collect();
    let (popped, history) = read(&records, 5, 0);
    assert_eq!((popped, history.begins_at()), (vec![10, 11, 12, 13], Some(10)));
    let (popped, history) = read(&records, 11, 0);
    assert_eq!((popped, history.begins_at()), (vec![12, 13], Some(10)));
    assert_eq!(read(&[], 11, 20).1.begins_at(), None);

    // A snapshot took the place of what is between.
    let reset = Record::State(StateRecord { replica: 1, start: 20, term: 1, vote: 0 });
    let records = [&records[..], &[reset]].concat();
    assert_eq!(read(&records, 5, 0).1.begins_at(), None);
    let records = [&records[..], &[entry(21)]].concat();
    let (popped, history) = read(&records, 5, 0);
    assert_eq!((popped, history.begins_at()), (vec![10, 11, 12, 13, 21], Some(21)));
    let unknown = History::new(0).entry(Position { index: 1, term: 1 }, 0, 9, &[], 0);
    assert!(matches!(unknown, Err(Broken::EntryType(9))), "{unknown:?}");
}
