//! The index against a plain map, and answers to repeated writes; what a draft shows is tested with the
//! commands, in `evaluate`.

mod answers;
mod once;
mod previous;

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::index::Index;
use super::*;
use crate::effect::BatchWriter;
use crate::session::Sessions;
use crate::store::TableOptions;

const KEYS: u8 = 80;

#[derive(Clone, Debug)]
enum Step {
    Insert(u8),
    TakeBack(u8),
    /// Applies all but so many of the newest revisions.
    Apply(u8),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0..KEYS).prop_map(Step::Insert),
        2 => (0u8..20).prop_map(Step::TakeBack),
        2 => (0u8..30).prop_map(Step::Apply),
        1 => Just(Step::Apply(0)),
        1 => Just(Step::Clear),
    ]
}

proptest! {
    /// Keys have few hashes, so that they collide in all 64 bits and in their slots.
    #[test]
    fn the_index_is_a_map(steps in proptest::collection::vec(step(), 0..400)) {
        let hash = |key: u8| u64::from(key % 7) | u64::from(key % 3) << 60;
        let mut index = Index::new(1);
        let mut live_from = 1;
        // The key and previous revision of each revision, from 1.
        let mut history: Vec<(u8, Option<u64>)> = Vec::new();
        for step in steps {
            let next = history.len() as u64 + 1;
            let newest = |key: u8, history: &[(u8, Option<u64>)]| {
                let at = history.iter().rposition(|(other, _)| *other == key)?;
                Some(at as u64 + 1).filter(|revision| *revision >= live_from)
            };
            match step {
                Step::Insert(key) => {
                    let previous = index.insert(hash(key), next, |revision| {
                        history[revision as usize - 1].0 == key
                    });
                    prop_assert_eq!(previous, newest(key, &history));
                    history.push((key, previous));
                }
                Step::TakeBack(count) => {
                    let stay = (next - 1).saturating_sub(u64::from(count)).max(live_from - 1);
                    while history.len() as u64 > stay {
                        let revision = history.len() as u64;
                        let (key, previous) = history.pop().expect("it is longer");
                        index.take_back(hash(key), revision, previous);
                    }
                }
                Step::Apply(count) => {
                    live_from = next.saturating_sub(u64::from(count)).max(live_from);
                    if live_from == next { index.reset(next) } else { index.applied(live_from) }
                }
                Step::Clear => {
                    history.truncate(live_from as usize - 1);
                    index.clear(live_from);
                }
            }
            let history = &history;
            for key in 0..KEYS {
                let found = index.find(hash(key), |revision| history[revision as usize - 1].0 == key);
                let at = history.iter().rposition(|(other, _)| *other == key);
                let expected = at.map(|at| at as u64 + 1).filter(|revision| *revision >= live_from);
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic_when_applied(
        bytes in proptest::collection::vec(prop_oneof![0u8..6, 0x81u8..0x86, any::<u8>()], 17..200),
    ) {
        let mut payload = bytes;
        payload[..17].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let table = table();
        let mut last = 0;
        let applied = apply(&table, &mut Sessions::new(), 0, &payload, |revision, _, _| last = revision);
        prop_assert!(applied.is_err() || applied.is_ok_and(|applied| applied.revision == last));
    }
}

fn table() -> Table {
    Table::new(TableOptions { hash_seed: 1, shards: 1 }, Memory::new(0))
}

#[test]
fn effects_are_seen_with_their_revisions_and_hashes() {
    let table = table();
    let mut writer = BatchWriter::default();
    writer.start(7_000, 5);
    writer.put(b"a", b"1", Some(9_000));
    writer.put(b"b", b"2", None);
    let cursor = Cursor { revision: 3, index: 4 };
    writer.cursor(&cursor);
    writer.delete(b"b", Reason::Explicit);
    writer.cursor(&Cursor { revision: 2, index: 9 });
    let mut seen = HashMap::new();
    let applied =
        apply(&table, &mut Sessions::new(), 4, writer.payload(), |revision, hash, effect| {
            assert_eq!(hash, table.hash(effect.key()));
            seen.insert(revision, matches!(effect, Effect::Put { .. }));
        });
    assert_eq!(applied, Ok(Applied { revision: 7, cursor: Some(cursor) }), "the larger one");
    assert_eq!(seen, HashMap::from([(5, true), (6, true), (7, false)]));
    assert_eq!((table.len(), table.volatile_len()), (1, 1));
    table.read(table.hash(b"a"), b"a", |entry| {
        let entry = entry.expect("it was put");
        assert_eq!((entry.version, entry.written_at_s), (5, 7));
    });
}

#[test]
fn a_batch_that_does_not_follow_is_refused() {
    let mut writer = BatchWriter::default();
    writer.start(0, 3);
    writer.put(b"a", b"1", None);
    let table = table();
    for last in [0, 1, 3] {
        let error = EffectError::Revision { expected: last + 1, found: 3 };
        assert_eq!(
            apply(&table, &mut Sessions::new(), last, writer.payload(), |_, _, _| {}),
            Err(error)
        );
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn batches_leave_in_the_order_they_came() {
    let (table, memory) = (table(), Memory::new(0));
    let mut in_flight = InFlight::new(10);
    assert!(in_flight.is_empty() && in_flight.close(&table, Previous::Nothing).is_none());
    let mut payloads = Vec::new();
    for value in [b"1", b"2", b"3"] {
        let mut draft = Draft::new(&table, &mut in_flight, &memory, 0);
        draft.put(b"same", value, None);
        draft.put(value, value, None);
        let batch = in_flight.close(&table, Previous::Nothing).expect("it has effects");
        payloads.push((batch.first_revision, batch.last_revision, batch.payload.to_vec()));
    }
    let bytes: usize = payloads.iter().map(|(_, _, payload)| payload.len()).sum();
    assert_eq!((in_flight.bytes(), in_flight.open_bytes()), (bytes, 0));
    let mut last = 10;
    for (position, (first_revision, last_revision, payload)) in payloads.iter().enumerate() {
        assert_eq!((*first_revision, *last_revision), (last + 1, last + 2));
        let applied = apply(&table, &mut Sessions::new(), last, payload, |_, _, _| {});
        last = applied.expect("it follows").revision;
        in_flight.applied(last);
        let draft = Draft::new(&table, &mut in_flight, &memory, 0);
        let newest = draft.read(b"same", |entry| entry.expect("it was put").value.to_vec());
        assert_eq!(newest, b"3");
        assert_eq!(in_flight.is_empty(), position == 2);
    }
    assert_eq!((in_flight.bytes(), in_flight.next_revision()), (0, 17));
    // As on a replica that follows.
    in_flight.applied(20);
    assert_eq!(in_flight.next_revision(), 21);
}

#[test]
#[should_panic(expected = "a batch is applied as a whole")]
fn half_a_batch_cannot_be_applied() {
    let (table, memory) = (table(), Memory::new(0));
    let mut in_flight = InFlight::new(0);
    let mut draft = Draft::new(&table, &mut in_flight, &memory, 0);
    draft.put(b"a", b"", None);
    draft.put(b"b", b"", None);
    in_flight.close(&table, Previous::Nothing);
    in_flight.applied(1);
}

#[test]
fn what_is_due_is_deleted_unless_it_was_written_again() {
    let table = Arc::new(table());
    let memory = Memory::new(0);
    let mut in_flight = InFlight::new(0);
    let mut draft = Draft::new(&table, &mut in_flight, &memory, 0);
    for key in [b"due", b"new", b"not"] {
        draft.put(key, b"", Some(if key == b"not" { 200 } else { 100 }));
    }
    let payload =
        in_flight.close(&table, Previous::Nothing).expect("it has effects").payload.to_vec();
    let applied = apply(&table, &mut Sessions::new(), 0, &payload, |_, _, _| {});
    in_flight.applied(applied.expect("it follows").revision);

    let mut draft = Draft::new(&table, &mut in_flight, &memory, 100);
    let revision = draft.put(b"new", b"again", Some(100));
    assert_eq!(revision, 5, "after the delete of the expired one");
    let mut expire = |key: &[u8; 3]| draft.expire_at(&[table.hash(key).position()]);
    assert_eq!([expire(b"due"), expire(b"new"), expire(b"not")], [1, 0, 0]);
    assert_eq!(expire(b"due"), 0, "its delete is in flight");
    let present = |key: &[u8; 3]| draft.read(key, |entry| entry.is_some());
    assert_eq!([present(b"due"), present(b"new"), present(b"not")], [false, false, true]);
}

#[test]
fn without_an_expiry_in_sight_nothing_is_looked_up() {
    let (table, memory) = (table(), Memory::new(0));
    let mut in_flight = InFlight::new(0);
    for discard in [true, false, true] {
        let mut draft = Draft::new(&table, &mut in_flight, &memory, 0);
        let savepoint = draft.savepoint();
        draft.put(b"a", b"", Some(5));
        draft.rollback(savepoint);
        assert!(!in_flight.has_volatile());
        Draft::new(&table, &mut in_flight, &memory, 0).put(b"a", b"", Some(5));
        assert!(in_flight.has_volatile());
        let last =
            in_flight.close(&table, Previous::Nothing).expect("it has an effect").last_revision;
        if discard {
            in_flight.discard_all();
        } else {
            in_flight.applied(last);
        }
        assert!(!in_flight.has_volatile());
    }
}
