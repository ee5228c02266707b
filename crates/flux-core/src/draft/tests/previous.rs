//! What a batch says of its keys' past, and what is taken back of traces and cursors. That random commands
//! say the right things is tested with them, in `evaluate`.

use super::*;
use crate::MAX_VALUE_BYTES;
use crate::effect::{Changes, Cursor, cursor_of};

struct Partition {
    table: Table,
    memory: Arc<Memory>,
    in_flight: InFlight,
    sessions: Sessions,
    applied: Revision,
}

impl Partition {
    fn new() -> Partition {
        let memory = Memory::new(0);
        let table = Table::new(TableOptions { hash_seed: 1, shards: 4 }, Arc::clone(&memory));
        let (in_flight, sessions) = (InFlight::new(0), Sessions::new());
        Partition { table, memory, in_flight, sessions, applied: 0 }
    }

    fn draft(&mut self) -> Draft<'_> {
        Draft::new(&self.table, &mut self.in_flight, &self.memory, 0)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.draft().put(key, value, None);
    }

    fn close(&mut self, previous: Previous) -> Vec<u8> {
        let batch = self.in_flight.close(&self.table, previous);
        batch.expect("something is in it").payload.to_vec()
    }

    fn apply(&mut self, payload: &[u8]) {
        let Partition { table, sessions, applied, .. } = self;
        let found = apply(table, sessions, *applied, payload, |_, _, _| {});
        *applied = found.expect("it follows").revision;
        self.in_flight.applied(self.applied);
    }
}

fn versions(payload: &[u8]) -> Vec<Revision> {
    Changes::new(payload).expect("a batch").map(|change| change.previous).collect()
}

fn traces(payload: &[u8]) -> Vec<u8> {
    let changes = Changes::new(payload).expect("a batch");
    changes.map(|change| change.trace.map_or(0, |trace| trace[0])).collect()
}

#[test]
fn what_was_applied_since_it_was_evaluated_is_found_in_the_table() {
    let mut one = Partition::new();
    one.put(b"put", b"1");
    one.put(b"deleted", b"2");
    one.draft().delete(b"deleted", Reason::Explicit);
    let first = one.close(Previous::Versions);
    one.put(b"put", b"3");
    one.put(b"deleted", b"4");
    one.apply(&first);
    let second = one.close(Previous::Versions);
    assert_eq!([versions(&first), versions(&second)], [vec![0, 0, 2], vec![1, 0]]);
}

#[test]
fn many_keys_of_a_large_table_are_found_in_groups() {
    let mut one = Partition::new();
    let key = |number: u32| format!("key{number}").into_bytes();
    for number in 0..1000 {
        one.put(&key(number), &[7; 2000]);
    }
    let payload = one.close(Previous::Versions);
    one.apply(&payload);
    assert!(one.memory.used() > CACHED_BYTES);
    for number in 950..1050 {
        one.put(&key(number), &[8; 30]);
    }
    assert!(one.in_flight.open_payload().len() > SMALL_BATCH_BYTES);
    let before: Vec<u64> = (951..=1000).chain([0; 50]).collect();
    let payload = one.close(Previous::Values);
    assert_eq!(versions(&payload), before);
    let values = Changes::new(&payload).expect("a batch").map(|change| change.previous_value);
    assert!(values.eq(before.iter().map(|before| (*before > 0).then_some([7; 2000].as_slice()))));
}

#[test]
fn previous_values_are_left_out_where_the_batch_has_no_room() {
    let mut one = Partition::new();
    let large = vec![7; MAX_VALUE_BYTES - 1000];
    for key in [b"a", b"b", b"c"] {
        one.put(key, &large);
        let payload = one.close(Previous::Values);
        one.apply(&payload);
    }
    one.put(b"d", b"small");
    for key in [b"a", b"b", b"d"] {
        one.put(key, &large);
    }
    one.put(b"a", b"");
    let most = one.in_flight.open_bytes() + one.in_flight.previous_bytes(&one.table);
    let payload = one.close(Previous::Values);
    assert!(payload.len() <= most && most <= MAX_BATCH_BYTES);
    let changes = Changes::new(&payload).expect("a batch");
    let values: Vec<_> = changes.map(|change| change.previous_value.map(<[u8]>::len)).collect();
    assert_eq!(values, [None, None, None, Some(5), None]);
    assert_eq!(versions(&payload), [0, 1, 2, 4, 5]);
}

#[test]
fn a_trace_is_of_the_effects_of_its_command() {
    let mut one = Partition::new();
    let run = |one: &mut Partition, trace: u8, keys: &[&[u8]]| {
        one.in_flight.set_trace((trace > 0).then_some(&[trace; 25]));
        keys.iter().for_each(|key| one.put(key, b""));
    };
    run(&mut one, 0, &[b"a"]);
    run(&mut one, 1, &[b"b", b"c"]);
    run(&mut one, 1, &[b"d"]);
    run(&mut one, 2, &[b"e"]);
    run(&mut one, 0, &[b"f"]);
    let payload = one.close(Previous::Versions);
    assert_eq!(traces(&payload), [0, 1, 1, 1, 2, 0]);
    let parts = Parts::new(&payload).expect("a batch").flatten();
    let told = parts.filter(|part| matches!(part, Part::Trace(_))).count();
    assert_eq!(told, 3, "only where it changes");
    run(&mut one, 0, &[b"a"]);
    let payload = one.close(Previous::Versions);
    assert_eq!(payload.len(), 17 + 4 + 2, "none, and the version before");
}

#[test]
fn what_is_taken_back_leaves_no_trace() {
    let mut one = Partition::new();
    let (table, memory, in_flight) = (&one.table, &one.memory, &mut one.in_flight);
    in_flight.set_trace(Some(&[1; 25]));
    Draft::new(table, in_flight, memory, 0).put(b"a", b"", None);
    let open = in_flight.open_payload().len();
    for trace in [1, 2] {
        in_flight.set_trace(Some(&[trace; 25]));
        let mut draft = Draft::new(table, in_flight, memory, 0);
        let savepoint = draft.savepoint();
        draft.put(b"b", b"", None);
        draft.delete(b"a", Reason::Explicit);
        draft.rollback(savepoint);
        assert_eq!(in_flight.open_payload().len(), open);
    }
    Draft::new(table, in_flight, memory, 0).put(b"c", b"", None);
    assert_eq!(traces(&one.close(Previous::Versions)), [1, 2]);
}

#[test]
fn a_cursor_rides_on_the_open_batch() {
    let mut one = Partition::new();
    let cursor = |revision| Cursor { revision, index: revision + 1 };
    one.in_flight.set_cursor(0, cursor(1));
    assert!(one.in_flight.open_bytes() > 0 && one.in_flight.is_empty(), "it takes no revision");
    let mut draft = one.draft();
    let savepoint = draft.savepoint();
    draft.put(b"a", b"", None);
    draft.rollback(savepoint);
    assert_eq!(one.in_flight.cursor(), Some(cursor(1)), "it came before");
    one.put(b"a", b"");
    one.in_flight.set_cursor(0, cursor(3));
    let payload = one.close(Previous::Versions);
    assert_eq!(cursor_of(&payload), Ok(Some(cursor(3))));
    assert_eq!(payload.len(), 17 + 17 + 4 + 2, "the new one took the place of the old one");

    one.in_flight.set_cursor(0, cursor(5));
    assert_eq!(one.in_flight.cursor(), Some(cursor(5)));
    one.put(b"b", b"");
    one.in_flight.discard_open(&one.table);
    assert_eq!((one.in_flight.open_bytes(), one.in_flight.next_revision()), (0, 2));
    assert_eq!(one.in_flight.cursor(), Some(cursor(3)));
    one.apply(&payload);
    assert_eq!(one.in_flight.cursor(), None);

    one.in_flight.set_cursor(0, cursor(7));
    let payload = one.close(Previous::Values);
    assert_eq!(payload.len(), 17 + 17, "without effects nothing was before");
    one.in_flight.set_cursor(0, cursor(8));
    one.in_flight.discard_all();
    assert_eq!((one.in_flight.cursor(), one.in_flight.bytes()), (None, 0));
}
