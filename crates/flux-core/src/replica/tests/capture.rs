//! What readers of changes get of a replica: every committed entry with effects, once, in order.

use super::*;
use crate::effect::Changes;
use crate::feed::Committed;

fn taken(alone: &mut Alone) -> Vec<Committed> {
    let mut committed = Vec::new();
    alone.replica.take_committed(&mut committed);
    committed
}

#[test]
fn entries_with_effects_are_captured_when_they_are_applied() {
    let mut alone = Alone::started();
    alone.set("a", "1");
    alone.turn();
    assert!(taken(&mut alone).is_empty(), "nobody asked for it");
    alone.replica.set_capture(true);
    alone.set("b", "2");
    alone.set("c", "3");
    alone.replica.propose(&mut alone.replies);
    let number = alone.write().expect("an entry to persist");
    assert!(taken(&mut alone).is_empty(), "it is not committed");
    alone.replica.persisted(number);
    alone.write();
    let committed = taken(&mut alone);
    let position = alone.replica.applied();
    let entry = alone.records.iter().rev().find_map(|record| match record {
        Record::Entry { entry, .. } => Some(entry.clone()),
        Record::State(_) => None,
    });
    let entry = entry.expect("it was written");
    let payload = entry.data.clone();
    assert_eq!(committed, [Committed { position, first: 2, last: 3, payload }]);
    assert_eq!(Committed::read(entry), Ok(committed.first().cloned()), "as the log has it");

    // Without effects there is nothing to tell.
    assert!(alone.replica.propose_cursor(Cursor { revision: 3, index: position.index }));
    alone.turn();
    assert!(taken(&mut alone).is_empty());
    alone.set("d", "4");
    alone.turn();
    alone.replica.set_capture(false);
    assert!(taken(&mut alone).is_empty());
}

#[test]
fn a_trace_goes_with_the_changes_of_its_command_only() {
    let mut alone = Alone::started();
    alone.replica.set_capture(true);
    let traced = Meta { once: None, trace: Some(&[7; 25]) };
    for (waiter, meta) in [traced, Meta::default()].iter().enumerate() {
        let command = set(b"a", b"1", Expiry::In(1000));
        assert_eq!(alone.replica.execute(at(NOW), &command, meta, waiter as u32), None);
    }
    alone.turn();
    assert_eq!(alone.replica.execute(at(NOW), &set(b"b", b"", Expiry::Never), &traced, 9), None);
    assert!(alone.replica.expire(NOW + 1000, 10) > 0);
    alone.turn();
    let committed = taken(&mut alone);
    let changes = committed.iter().flat_map(|one| Changes::new(&one.payload).expect("a batch"));
    let told: Vec<_> = changes.map(|one| (one.previous, one.trace.copied())).collect();
    assert_eq!(told, [(0, Some([7; 25])), (1, None), (0, Some([7; 25])), (2, None)]);
}

#[test]
fn what_was_before_is_there_where_somebody_wants_it() {
    let old = Some(b"old".as_slice());
    // Captured here, always versions, values too; then what a change says of the version and the value.
    let cases = [
        ((false, false, false), (0, None)),
        ((true, false, false), (1, None)),
        ((false, true, false), (1, None)),
        ((false, false, true), (1, old)),
        ((true, true, true), (1, old)),
    ];
    for ((captures, previous_versions, include_previous), expected) in cases {
        let memory = Memory::new(0);
        let recovery = Recovery::new(table(&memory), None, SnapshotMeta::alone(1), 0);
        let config = ReplicaConfig { previous_versions, include_previous, ..config() };
        let replica = Replica::new(&config, recovery, memory, Arc::new(View::default()), at(NOW));
        let mut alone = Alone { replica: replica.expect("a state"), ..Alone::new() };
        alone.turn();
        alone.replica.set_capture(captures);
        alone.set("a", "old");
        alone.turn();
        alone.set("a", "new");
        let most = alone.replica.open_bytes();
        let mut positions = Vec::new();
        alone.replica.open_positions(&mut positions);
        assert_eq!(positions.len() as u64, expected.0, "only what will be looked up");
        alone.turn();
        let Some(Record::Entry { entry, .. }) = alone.records.last() else {
            panic!("it was written");
        };
        assert!(entry.data.len() <= most);
        let mut changes = Changes::new(&entry.data).expect("a batch");
        let change = changes.next().expect("one change");
        assert_eq!((change.revision, (change.previous, change.previous_value)), (2, expected));
    }
}
