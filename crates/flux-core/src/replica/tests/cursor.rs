//! How far changes have been passed on: it is replicated like the table, and takes no revision.

use super::*;
use crate::effect::cursor_of;

/// What a node of before this was there has left: a state, an entry that is empty and two batches.
const OLD_BATCHES: [&[u8]; 2] = [
    b"\x01\x00\x68\xe5\xcf\x8b\x01\0\0\x01\0\0\0\0\0\0\0\x01\x01\x01a1\x03\x01b",
    b"\x01\x00\x68\xe5\xcf\x8b\x01\0\0\x03\0\0\0\0\0\0\0\x01\x01\x01c3",
];

fn cursor(revision: u64, index: u64) -> Cursor {
    Cursor { revision, index }
}

#[test]
fn it_rides_on_the_next_batch_and_takes_no_revision() {
    let mut alone = Alone::started();
    assert!(!alone.replica.propose_cursor(cursor(1, 2)), "nothing was written");
    alone.set("a", "1");
    alone.turn();
    assert!(alone.replica.propose_cursor(cursor(1, 2)) && alone.replica.has_open_batch());
    assert!(!alone.replica.propose_cursor(cursor(1, 2)), "it is in flight");
    let waiter = alone.set("b", "2");
    let read = alone.execute(&Command::Get { key: b"a".as_slice() });
    assert_eq!(alone.replica.cursor(), Cursor::default());
    alone.turn();
    assert_eq!(alone.reply(waiter), Some(Reply::Written { version: 2 }));
    assert!(matches!(alone.reply(read), Some(Reply::Value(Some(_)))));
    assert_eq!(alone.replica.cursor(), cursor(1, 2));
    let entries = alone.records.iter().filter(|one| matches!(one, Record::Entry { .. })).count();
    assert_eq!(entries, 3, "of the term, of a and of b with the cursor");

    // Alone in its batch it commits too, and nobody waits for it.
    assert!(!alone.replica.propose_cursor(cursor(1, 2)), "it is known");
    assert!(!alone.replica.propose_cursor(cursor(3, 4)), "it is not written yet");
    assert!(alone.replica.propose_cursor(cursor(2, 3)));
    alone.turn();
    assert_eq!((alone.replica.cursor(), alone.replica.revision()), (cursor(2, 3), 2));
    assert_eq!(alone.view.applied(), alone.replica.applied().index);
    let waiter = alone.set("c", "3");
    alone.turn();
    assert_eq!(alone.reply(waiter), Some(Reply::Written { version: 3 }));
}

#[test]
fn a_read_does_not_wait_for_it() {
    let mut alone = Alone::started();
    alone.set("a", "1");
    alone.turn();
    assert!(alone.replica.propose_cursor(cursor(1, 2)));
    let get = Command::Get { key: b"a".as_slice() };
    let waiter = alone.execute(&get);
    assert!(alone.reply(waiter).is_some());
    alone.replica.propose(&mut alone.replies);
    let number = alone.write().expect("an entry to persist");
    let waiter = alone.execute(&get);
    assert!(alone.reply(waiter).is_some());
    alone.replica.persisted(number);
    alone.turn();
    assert_eq!(alone.replica.cursor(), cursor(1, 2));
}

#[test]
fn one_that_is_refused_may_come_again() {
    let mut alone = Alone::started();
    alone.set("a", "1");
    alone.turn();
    assert!(alone.replica.propose_cursor(cursor(1, 2)));
    alone.replica.refuse_open(NOW, &Error::DiskFull, &mut alone.replies);
    assert!(!alone.replica.has_open_batch());
    assert!(alone.replica.propose_cursor(cursor(1, 2)));
    alone.turn();
    assert_eq!(alone.replica.cursor(), cursor(1, 2));
}

#[test]
fn it_comes_back_from_records_and_from_snapshots() {
    let mut alone = Alone::started();
    let mut cursors = vec![(alone.records.len(), Cursor::default())];
    for round in 1..10 {
        alone.set("key", &format!("value{round}"));
        alone.turn();
        assert!(alone.replica.propose_cursor(cursor(round, alone.replica.applied().index)));
        alone.turn();
        cursors.push((alone.records.len(), alone.replica.cursor()));
    }
    for length in 0..=alone.records.len() {
        let mut again = Alone::recovered(&alone.records[..length]);
        again.turn();
        let written = cursors.iter().rev().find(|(records, _)| *records <= length);
        let expected = written.map_or(Cursor::default(), |(_, cursor)| *cursor);
        assert_eq!(again.replica.cursor(), expected, "{length} records");
    }
    let meta = alone.replica.snapshot_meta();
    assert_eq!(meta.cursor, alone.replica.cursor());
    let memory = Memory::new(0);
    let recovery = Recovery::new(table(&memory), Some(meta), SnapshotMeta::default(), 0);
    let view = Arc::new(View::default());
    let again = Replica::<u32>::new(&config(), recovery, memory, view, at(NOW));
    assert_eq!(again.expect("a state").cursor(), alone.replica.cursor());
}

#[test]
fn logs_and_snapshots_of_before_are_read() {
    let state = StateRecord { replica: 1, start: 0, term: 1, vote: 1 };
    let mut records = vec![Record::State(state)];
    let payloads = [b"".as_slice()].into_iter().chain(OLD_BATCHES);
    records.extend((1..).zip(payloads).map(|(index, data)| Record::Entry {
        entry: Entry { term: 1, index, data: data.to_vec(), ..Entry::default() },
        commit: index - 1,
    }));
    let mut alone = Alone::recovered(&records);
    alone.turn();
    assert_eq!((alone.replica.revision(), alone.replica.cursor()), (3, Cursor::default()));
    let contents = alone.contents();
    let found: Vec<_> = contents.iter().map(|(key, (value, _))| (&key[..], &value[..])).collect();
    assert_eq!(found, [(b"a".as_slice(), b"1".as_slice()), (b"c", b"3")]);
    assert!(OLD_BATCHES.iter().all(|payload| cursor_of(payload) == Ok(None)));

    // Index 5, term 2, revision 9, one voter, nobody outgoing, no learner; then epoch 7.
    let words = [5u64, 2, 9, 1, 1, 0, 0];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let meta = SnapshotMeta {
        position: Position { index: 5, term: 2 },
        revision: 9,
        members: Members::of_voters(vec![1]),
        ..SnapshotMeta::default()
    };
    assert_eq!(SnapshotMeta::decode(&bytes), Some(meta.clone()));
    assert_eq!(meta.encode(), bytes, "without a cursor they are as before");
    bytes.extend_from_slice(b"\xe0\x07\0\0\0\0\0\0\0");
    assert_eq!(SnapshotMeta::decode(&bytes), Some(SnapshotMeta { epoch: 7, ..meta.clone() }));
    bytes.extend_from_slice(b"\xe1\x08\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0");
    let meta = SnapshotMeta { epoch: 7, cursor: cursor(8, 4), ..meta };
    assert_eq!(SnapshotMeta::decode(&bytes), Some(meta.clone()));
    assert_eq!(meta.encode(), bytes);
}
