//! A replica alone in its group: when it answers, what it leaves, how it comes back.

use std::collections::BTreeMap;

use super::*;
use crate::store::TableOptions;
use crate::{Command, Condition, Expiry};

mod capture;
mod cursor;
mod fresh;
mod group;
mod history;

const NOW: UnixMillis = 1_700_000_000_000;

fn at(ms: UnixMillis) -> Now {
    Now { ms, us: 1 }
}

/// A replica that is alone in its group, with the records it wrote.
struct Alone {
    replica: Replica<u32>,
    view: Arc<View>,
    records: Vec<Record>,
    replies: Replies<u32>,
    next_waiter: u32,
}

#[derive(Clone, Debug)]
enum Record {
    State(StateRecord),
    Entry { entry: Entry, commit: u64 },
}

fn config() -> ReplicaConfig {
    ReplicaConfig {
        partition: PartitionId(0),
        id: 1,
        tick_us: 50_000,
        heartbeat_ticks: 2,
        election_ticks: 12,
        drift_percent: 10,
        tail_bytes: 0,
        previous_versions: false,
        include_previous: false,
        seed: 1,
    }
}

fn table(memory: &Arc<Memory>) -> Arc<Table> {
    Arc::new(Table::new(TableOptions { hash_seed: 7, shards: 1 }, Arc::clone(memory)))
}

impl Alone {
    fn new() -> Alone {
        Alone::recovered(&[])
    }

    /// A replica that finds these records on its disk.
    fn recovered(records: &[Record]) -> Alone {
        let memory = Memory::new(0);
        let mut recovery = Recovery::new(table(&memory), None, SnapshotMeta::alone(1), 0);
        for record in records {
            match record {
                Record::State(state) => recovery.state(state),
                Record::Entry { entry, commit } => {
                    let position = Position { index: entry.index, term: entry.term };
                    let entry_type = entry.entry_type as u8;
                    recovery.entry(position, *commit, entry_type, &entry.data).expect("a log");
                }
            }
        }
        recovery.finish().expect("a whole log");
        let view = Arc::new(View::default());
        let replica = Replica::new(&config(), recovery, memory, Arc::clone(&view), at(NOW));
        Alone {
            replica: replica.expect("a state to go on from"),
            view,
            records: records.to_vec(),
            replies: Vec::new(),
            next_waiter: 0,
        }
    }

    /// Takes everything that is ready and writes it, but reports nothing as persisted.
    fn write(&mut self) -> Option<u64> {
        let mut last = None;
        while let Some(ready) = self.replica.ready(&mut self.replies).expect("sound entries") {
            assert!(ready.messages.is_empty() && ready.persisted_messages.is_empty());
            self.records.extend(ready.state.map(Record::State));
            let commit = ready.commit;
            let records = ready.entries.into_iter().map(|entry| Record::Entry { entry, commit });
            self.records.extend(records);
            last = Some(ready.number);
        }
        last
    }

    fn turn(&mut self) {
        self.replica.propose(&mut self.replies);
        while let Some(number) = self.write() {
            self.replica.persisted(number);
        }
    }

    fn started() -> Alone {
        let mut alone = Alone::new();
        alone.turn();
        alone
    }

    /// Executes a command; its reply comes now or with a later turn.
    fn execute(&mut self, command: &Command<&[u8]>) -> u32 {
        let waiter = self.next_waiter;
        self.next_waiter += 1;
        self.replies.extend(self.replica.execute(at(NOW), command, &Meta::default(), waiter));
        waiter
    }

    fn set(&mut self, key: &str, value: &str) -> u32 {
        self.execute(&set(key.as_bytes(), value.as_bytes(), Expiry::Never))
    }

    fn reply(&mut self, waiter: u32) -> Option<Reply> {
        let at = self.replies.iter().position(|(whose, _)| *whose == waiter)?;
        Some(self.replies.swap_remove(at).1)
    }

    fn contents(&self) -> BTreeMap<Vec<u8>, (Vec<u8>, u64)> {
        let mut contents = BTreeMap::new();
        let mut from = Some(crate::store::Position(0));
        while let Some(position) = from {
            from = self.replica.table().scan(position, 100, |entry| {
                contents.insert(entry.key.to_vec(), (entry.value.to_vec(), entry.version));
            });
        }
        contents
    }
}

fn set<'a>(key: &'a [u8], value: &'a [u8], expiry: Expiry) -> Command<&'a [u8]> {
    Command::Set { key, value, expiry, condition: Condition::Always, return_previous: false }
}

#[test]
fn serves_only_after_an_entry_of_its_own_term_is_applied() {
    let mut alone = Alone::new();
    let waiter = alone.set("k", "v");
    assert_eq!(alone.reply(waiter), Some(Reply::Error(Error::NotLeader)));
    let number = alone.write().expect("a term and an entry to persist");
    assert!(!alone.view.may_serve(u64::MAX - 1), "nothing is persisted yet");
    alone.replica.persisted(number);
    alone.write();
    assert!(alone.view.may_serve(u64::MAX - 1));
    assert!(matches!(
        alone.records[0],
        Record::State(StateRecord { term: 1, vote: 1, replica: 1, start: 0 })
    ));
}

#[test]
fn answers_when_the_write_is_persisted_and_not_before() {
    let mut alone = Alone::started();
    let waiter = alone.set("k", "v");
    alone.replica.propose(&mut alone.replies);
    let number = alone.write().expect("an entry to persist");
    assert_eq!(alone.reply(waiter), None);
    // Time passes and Raft is asked again while the sync is under way.
    for _ in 0..30 {
        alone.replica.tick(at(NOW));
        assert_eq!(alone.write(), None);
    }
    assert_eq!(alone.reply(waiter), None);
    assert!(alone.contents().is_empty(), "applied before it was persisted");
    alone.replica.persisted(number);
    alone.write();
    assert_eq!(alone.reply(waiter), Some(Reply::Written { version: 1 }));
    assert_eq!(alone.contents()[b"k".as_slice()], (b"v".to_vec(), 1));
}

#[test]
fn a_reply_without_effects_waits_for_what_it_read() {
    let mut alone = Alone::started();
    let absent = Command::Set {
        key: b"k".as_slice(),
        value: b"w",
        expiry: Expiry::Never,
        condition: Condition::IfAbsent,
        return_previous: false,
    };
    alone.set("k", "v");
    alone.replica.propose(&mut alone.replies);
    let number = alone.write().expect("an entry to persist");
    let waiter = alone.execute(&absent);
    alone.replica.propose(&mut alone.replies);
    alone.write();
    assert_eq!(alone.reply(waiter), None, "it depends on a write that may still fail");
    alone.replica.persisted(number);
    alone.write();
    assert_eq!(alone.reply(waiter), Some(Reply::NotWritten { version: 1 }));
    let waiter = alone.execute(&absent);
    assert_eq!(alone.reply(waiter), Some(Reply::NotWritten { version: 1 }), "nothing in flight");
}

#[test]
fn a_refused_batch_leaves_no_trace() {
    let mut alone = Alone::started();
    alone.set("a", "1");
    alone.turn();
    let waiter = alone.set("a", "2");
    alone.replica.refuse_open(NOW, &Error::DiskFull, &mut alone.replies);
    assert_eq!(alone.reply(waiter), Some(Reply::Error(Error::DiskFull)));
    let waiter = alone.execute(&Command::Increment { key: b"a".as_slice(), delta: 1 });
    alone.turn();
    assert_eq!(alone.reply(waiter), Some(Reply::Counter { value: 2, version: 2 }));
}

#[test]
fn abandoned_writes_have_an_unknown_outcome() {
    let mut alone = Alone::started();
    let proposed = alone.set("a", "1");
    alone.replica.propose(&mut alone.replies);
    alone.write();
    let open = alone.set("b", "1");
    alone.replica.abandon(&mut alone.replies);
    for waiter in [proposed, open] {
        assert_eq!(alone.reply(waiter), Some(Reply::Error(Error::OutcomeUnknown)));
    }
}

#[test]
fn recovers_from_every_prefix_of_its_records() {
    let mut alone = Alone::started();
    let mut states = vec![(alone.records.len(), BTreeMap::new())];
    for round in 0..20 {
        alone.set(&format!("key{}", round % 7), &format!("value{round}"));
        alone.execute(&Command::Increment { key: b"counter".as_slice(), delta: round });
        if round % 3 == 0 {
            alone.execute(&Command::Delete { keys: vec![b"key1".as_slice(), b"key5"] });
        }
        alone.turn();
        states.push((alone.records.len(), alone.contents()));
    }
    for length in 0..=alone.records.len() {
        let mut again = Alone::recovered(&alone.records[..length]);
        again.turn();
        assert!(again.view.may_serve(u64::MAX - 1));
        let written = states.iter().rev().find(|(records, _)| *records <= length);
        let expected = written.map(|(_, contents)| contents.clone()).unwrap_or_default();
        assert_eq!(again.contents(), expected, "{length} records");
        // It goes on where it was: revisions stay dense.
        let revision = again.replica.revision();
        let waiter = again.set("new", "one");
        again.turn();
        assert_eq!(again.reply(waiter), Some(Reply::Written { version: revision + 1 }));
    }
}

#[test]
fn recovery_goes_on_from_a_snapshot() {
    let mut alone = Alone::started();
    for round in 0..10 {
        alone.set(&format!("key{round}"), "before");
        alone.turn();
    }
    let meta = alone.replica.snapshot_meta();
    let mut chunk = Vec::new();
    alone.replica.table().begin_snapshot();
    assert!(alone.replica.table().snapshot_chunk(1 << 20, &mut chunk));
    alone.replica.table().end_snapshot();
    for round in 5..15 {
        alone.set(&format!("key{round}"), "after");
        alone.turn();
    }

    assert_eq!(SnapshotMeta::decode(&meta.encode()), Some(meta.clone()));
    let memory = Memory::new(0);
    let table = table(&memory);
    table.load(&chunk).expect("a chunk");
    let mut recovery = Recovery::new(table, Some(meta), SnapshotMeta::default(), 0);
    for record in &alone.records {
        if let Record::Entry { entry, commit } = record {
            let position = Position { index: entry.index, term: entry.term };
            recovery.entry(position, *commit, entry.entry_type as u8, &entry.data).expect("a log");
        }
    }
    let view = Arc::new(View::default());
    let replica = Replica::new(&config(), recovery, memory, Arc::clone(&view), at(NOW));
    let mut again = Alone { replica: replica.expect("a state"), view, ..Alone::new() };
    again.turn();
    assert_eq!(again.contents(), alone.contents());
    assert_eq!(again.replica.revision(), alone.replica.revision());
}

/// What a follower finds that was sent a snapshot, and lost its power before it could write that the log it
/// had is void: the snapshot's last entry is another one than its own.
#[test]
fn a_log_that_a_snapshot_has_replaced_is_void() {
    let snapshot = |term| SnapshotMeta {
        position: Position { index: 5, term },
        members: Members::of_voters(vec![1, 2, 3]),
        ..SnapshotMeta::default()
    };
    let recovered = |term, entries: &[(u64, u64)]| {
        let memory = Memory::new(0);
        let mut recovery =
            Recovery::new(table(&memory), Some(snapshot(term)), SnapshotMeta::default(), 0);
        recovery.state(&StateRecord { replica: 1, start: 1, term: 2, vote: 0 });
        for &(index, term) in entries {
            recovery.entry(Position { index, term }, 1, 0, &[]).expect("an entry");
        }
        recovery.finish().expect("a whole log");
        let view = Arc::new(View::default());
        Replica::<u32>::new(&config(), recovery, memory, view, at(NOW)).expect("a state")
    };
    let of_term_2 = [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2)];
    assert_eq!(recovered(2, &of_term_2).status().last, 7, "the snapshot is of the same log");

    let mut replica = recovered(3, &of_term_2);
    assert_eq!(replica.status().last, 5);
    let mut append =
        Message { to: 1, from: 2, term: 3, index: 5, log_term: 3, ..Message::default() };
    append.entries = vec![Entry { index: 6, term: 3, ..Entry::default() }];
    append.set_msg_type(MessageType::MsgAppend);
    replica.step(at(NOW), append);
    let ready = replica.ready(&mut Vec::new()).expect("it is sound").expect("something to write");
    assert_eq!(ready.state.map(|state| (state.replica, state.start)), Some((1, 5)));
    assert_eq!(ready.entries.len(), 1);

    // Entries that were overwritten before the snapshot are void as well, and what followed them.
    let overwritten = [&of_term_2[..], &[(4, 3), (5, 3)]].concat();
    assert_eq!(recovered(3, &overwritten).status().last, 5);
}

#[test]
fn snapshot_metadata_of_any_length_is_refused_or_understood() {
    let meta = SnapshotMeta {
        position: Position { index: 5, term: 2 },
        revision: 9,
        members: Members { voters: vec![1, 2, 3], outgoing: vec![2], learners: vec![9] },
        epoch: 7,
        cursor: Cursor { revision: 8, index: 4 },
        sessions: Vec::new(),
    };
    let bytes = meta.encode();
    assert_eq!(SnapshotMeta::decode(&bytes), Some(meta.clone()));
    let (voters_end, lists_end) = (7 * 8, 11 * 8);
    let epoch_end = lists_end + 1 + 8;
    let without = SnapshotMeta { cursor: Cursor::default(), ..meta.clone() };
    assert_eq!(SnapshotMeta::decode(&bytes[..epoch_end]), Some(without.clone()), "nor this one");
    let decoded = SnapshotMeta::decode(&bytes[..lists_end]);
    assert_eq!(
        decoded,
        Some(SnapshotMeta { epoch: 0, ..without }),
        "none is written where it is 0"
    );
    let whole = [voters_end, lists_end, epoch_end];
    for length in (0..bytes.len()).filter(|length| !whole.contains(length)) {
        assert_eq!(SnapshotMeta::decode(&bytes[..length]), None, "{length} bytes");
    }
    let older = SnapshotMeta::decode(&bytes[..voters_end]).expect("all that older snapshots have");
    assert_eq!(older.members, Members::of_voters(vec![1, 2, 3]));
}

#[test]
fn snapshot_metadata_that_no_group_can_have_is_refused() {
    let members = Members { learners: vec![1], ..Members::default() };
    let without_voters = SnapshotMeta { members, ..SnapshotMeta::founding(Vec::new()) };
    assert_eq!(SnapshotMeta::decode(&without_voters.encode()), None);
    let mut without_end = SnapshotMeta::founding(vec![1]);
    without_end.position.index = u64::MAX;
    assert_eq!(SnapshotMeta::decode(&without_end.encode()), None);
    let of_nothing = SnapshotMeta::default();
    assert_eq!(SnapshotMeta::decode(&of_nothing.encode()), Some(of_nothing));
}

#[test]
fn a_log_with_a_hole_is_refused() {
    let memory = Memory::new(0);
    let mut recovery = Recovery::new(table(&memory), None, SnapshotMeta::alone(1), 0);
    recovery.entry(Position { index: 1, term: 1 }, 0, 0, &[]).expect("the first");
    recovery.entry(Position { index: 3, term: 1 }, 0, 0, &[]).expect("judged at the end");
    let hole = recovery.finish();
    assert!(matches!(hole, Err(Broken::Hole { expected: 2, found: 3 })), "{hole:?}");
    let kind = recovery.entry(Position { index: 1, term: 1 }, 0, 9, &[]);
    assert!(matches!(kind, Err(Broken::EntryType(9))), "{kind:?}");
}

#[test]
fn expired_keys_are_deleted_through_the_log() {
    let mut alone = Alone::started();
    for index in 0..100 {
        let key = format!("key{index}");
        alone.execute(&set(key.as_bytes(), b"v", Expiry::In(1000 + index)));
    }
    alone.set("stays", "v");
    alone.turn();
    let expire = |alone: &mut Alone, now| {
        alone.replica.expire(now, 40);
        alone.turn();
        alone.contents().len()
    };
    assert_eq!(expire(&mut alone, NOW + 900), 101);
    assert_eq!(expire(&mut alone, NOW + 1200), 61, "no more than the limit at a time");
    assert_eq!(expire(&mut alone, NOW + 1200), 21);
    assert_eq!(expire(&mut alone, NOW + 1200), 1);
    assert_eq!(alone.replica.revision(), 201, "each delete is an effect with its revision");
    let mut again = Alone::recovered(&alone.records);
    again.turn();
    assert_eq!(again.contents(), alone.contents());
}

#[test]
fn a_key_whose_delete_was_refused_expires_later() {
    let mut alone = Alone::started();
    alone.execute(&set(b"k", b"v", Expiry::In(1000)));
    alone.turn();
    assert_eq!(alone.replica.expire(NOW + 2000, 10), 1);
    alone.replica.refuse_open(NOW + 2000, &Error::DiskFull, &mut alone.replies);
    alone.turn();
    assert_eq!(alone.contents().len(), 1);
    assert!(alone.replica.next_expiry_ms().is_some());
    alone.replica.expire(NOW + 4000, 10);
    alone.turn();
    assert!(alone.contents().is_empty());
}

#[test]
fn timers_survive_recovery_and_do_not_pile_up() {
    let mut alone = Alone::started();
    for _ in 0..3 {
        for index in 0..30_000 {
            let key = format!("key{}", index % 10);
            alone.execute(&set(key.as_bytes(), b"v", Expiry::In(60_000)));
        }
        alone.turn();
    }
    assert_eq!(alone.replica.wheel.len(), 90_000);
    alone.replica.expire(NOW, 10);
    assert_eq!(alone.replica.wheel.len(), 10, "one for each key");
    let again = Alone::recovered(&alone.records);
    assert!(again.replica.wheel.len() <= 10);
    assert!(alone.replica.next_expiry_ms().is_some_and(|due| due > NOW && due <= NOW + 60_000));
}
