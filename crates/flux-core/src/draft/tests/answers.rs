//! Answers in a batch: found while in flight, taken back with it, in the sessions once applied.

use std::collections::VecDeque;

use super::*;
use crate::session::{MAX_ANSWER_BYTES, MAX_STEP_MS, TIMEOUT_MS};

struct Partition {
    table: Table,
    memory: Arc<Memory>,
    in_flight: InFlight,
    sessions: Sessions,
    applied: Revision,
    payloads: VecDeque<Vec<u8>>,
}

fn once(sequence: u64) -> Once {
    Once { session: 4, sequence, acked_below: 0 }
}

fn written(version: u64) -> Reply {
    Reply::Written { version }
}

impl Partition {
    fn new() -> Partition {
        let (in_flight, sessions, payloads) = (InFlight::new(0), Sessions::new(), VecDeque::new());
        Partition {
            table: table(),
            memory: Memory::new(0),
            in_flight,
            sessions,
            applied: 0,
            payloads,
        }
    }

    fn draft(&mut self) -> Draft<'_> {
        Draft::new(&self.table, &mut self.in_flight, &self.memory, 0)
    }

    fn put(&mut self, key: &[u8]) -> Revision {
        self.draft().put(key, b"", None)
    }

    fn remember(&mut self, sequence: u64, version: u64) {
        self.draft().remember(&once(sequence), &written(version));
    }

    fn repeated(&mut self, sequence: u64) -> Option<Repeat> {
        let Partition { table, memory, in_flight, sessions, .. } = self;
        Draft::new(table, in_flight, memory, 0).repeated(sessions, &once(sequence))
    }

    fn close(&mut self) -> Option<(Revision, Revision)> {
        let batch = self.in_flight.close(&self.table, Previous::Nothing)?;
        self.payloads.push_back(batch.payload.to_vec());
        Some((batch.first_revision, batch.last_revision))
    }

    fn apply(&mut self) -> Revision {
        let payload = self.payloads.pop_front().expect("one is closed");
        let (table, sessions) = (&self.table, &mut self.sessions);
        let applied = apply(table, sessions, self.applied, &payload, |_, _, _| {});
        self.applied = applied.expect("valid").revision;
        self.in_flight.applied(self.applied);
        self.applied
    }
}

fn in_flight(version: u64) -> Option<Repeat> {
    Some(Repeat::InFlight(written(version)))
}

fn now(version: u64) -> Option<Repeat> {
    Some(Repeat::Now(written(version)))
}

#[test]
fn an_answer_is_in_flight_until_its_batch_is_applied() {
    let mut one = Partition::new();
    assert_eq!(one.repeated(1), None);
    let version = one.put(b"a");
    one.remember(1, version);
    assert_eq!(one.repeated(1), in_flight(1));
    assert_eq!(one.close(), Some((1, 1)));
    // Two batches of answers alone stand between two with effects.
    one.remember(2, 20);
    assert!(one.in_flight.open_bytes() > 0);
    assert_eq!(one.close(), Some((2, 1)));
    one.remember(3, 30);
    one.remember(4, 40);
    assert_eq!(one.close(), Some((2, 1)));
    one.put(b"a");
    one.remember(5, 50);
    assert_eq!(one.close(), Some((2, 2)));
    assert_eq!(one.close(), None);

    let expect = |one: &mut Partition, first_in_flight: u64| {
        for (sequence, version) in [(1, 1), (2, 20), (3, 30), (4, 40), (5, 50)] {
            let applied = sequence < first_in_flight;
            let expected = if applied { now(version) } else { in_flight(version) };
            assert_eq!(one.repeated(sequence), expected, "{sequence} of {first_in_flight}");
        }
        assert_eq!(one.repeated(6), None);
        assert_eq!(one.in_flight.is_empty(), first_in_flight == 6);
    };
    expect(&mut one, 1);
    for (revision, first_in_flight) in [(1, 2), (1, 3), (1, 5), (2, 6)] {
        assert_eq!(one.apply(), revision);
        expect(&mut one, first_in_flight);
    }
    assert_eq!((one.in_flight.bytes(), one.in_flight.next_revision()), (0, 3));
}

#[test]
fn answers_are_taken_back_with_the_effects_around_them() {
    let mut one = Partition::new();
    one.put(b"closed");
    one.remember(1, 1);
    one.close();
    one.put(b"a");
    one.remember(2, 2);
    let before = one.in_flight.open_payload().to_vec();
    let savepoint = one.draft().savepoint();
    for _ in 0..2 {
        one.put(b"a");
        one.remember(3, 3);
        one.put(b"b");
        one.remember(4, 4);
        one.draft().rollback(savepoint);
        assert_eq!(one.in_flight.open_payload(), before);
        assert_eq!([2, 3, 4].map(|sequence| one.repeated(sequence)), [in_flight(2), None, None]);
        assert_eq!(one.in_flight.next_revision(), 3);
    }
    // An answer that comes before the effects.
    one.remember(3, 3);
    one.put(b"c");
    one.draft().rollback(savepoint);
    assert_eq!(one.in_flight.open_payload(), before);
    one.put(b"c");
    one.remember(3, 33);
    assert_eq!(one.repeated(3), in_flight(33));

    one.in_flight.discard_open(&one.table);
    assert_eq!([1, 2, 3].map(|sequence| one.repeated(sequence)), [in_flight(1), None, None]);
    assert_eq!(one.in_flight.open_bytes(), 0);
    assert_eq!((one.close(), one.in_flight.next_revision()), (None, 2));
    one.remember(2, 0);
    one.in_flight.discard_open(&one.table);
    assert_eq!((one.close(), one.repeated(2)), (None, None), "the batch had nothing else");
    one.remember(2, 0);
    one.close();
    one.remember(3, 0);

    one.in_flight.discard_all();
    one.payloads.clear();
    assert!(one.in_flight.is_empty() && one.in_flight.bytes() == 0);
    assert_eq!([1, 2, 3].map(|sequence| one.repeated(sequence)), [None, None, None]);
    one.put(b"again");
    one.remember(1, 9);
    assert_eq!(one.repeated(1), in_flight(9));
    one.close();
    one.apply();
    assert_eq!(one.repeated(1), now(9));
}

#[test]
fn what_is_not_kept_is_not_carried_out_again() {
    let mut one = Partition::new();
    let gone = Some(Repeat::Now(Reply::Error(Error::AnswerGone)));
    one.draft().remember(&once(1), &Reply::Bytes(vec![0; MAX_ANSWER_BYTES]));
    assert_eq!(one.repeated(1), gone);
    // Nothing was done here: it may be tried again.
    one.draft().remember(&once(2), &Reply::Error(Error::NotInteger));
    assert_eq!(one.repeated(2), None);
    one.close();
    one.apply();
    assert_eq!((one.repeated(1), one.repeated(2)), (gone, None));
}

#[test]
fn a_full_batch_takes_no_write_that_must_be_remembered() {
    let mut one = Partition::new();
    one.remember(1, 1);
    let value = vec![0; crate::MAX_VALUE_BYTES];
    while one.in_flight.open_bytes() < MAX_BATCH_BYTES {
        one.draft().put(b"key", &value, None);
    }
    assert_eq!(one.repeated(1), in_flight(1), "an old one needs no room");
    assert_eq!(one.repeated(2), Some(Repeat::Now(Reply::Error(Error::Overloaded))));
    one.close();
    assert_eq!(one.repeated(2), None);
}

#[test]
fn the_time_of_a_batch_without_answers_counts_too() {
    let mut one = Partition::new();
    one.remember(1, 1);
    one.close();
    one.apply();
    assert_eq!(one.repeated(1), now(1));
    for number in 1..=TIMEOUT_MS / MAX_STEP_MS {
        let mut writer = BatchWriter::default();
        writer.start(number * MAX_STEP_MS, number);
        writer.put(b"a", b"", None);
        one.payloads.push_back(writer.payload().to_vec());
        one.apply();
    }
    assert!(one.sessions.is_empty());
}

#[test]
#[should_panic(expected = "a write is answered once")]
fn a_second_answer_is_a_mistake() {
    let mut one = Partition::new();
    one.remember(1, 1);
    one.remember(1, 2);
}
