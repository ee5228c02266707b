//! Changes and their cursor in a group: followers, one that gets a snapshot, and the next leader.

use super::*;
use crate::feed::Committed;

fn taken(group: &mut Group, id: u64) -> Vec<Committed> {
    let mut committed = Vec::new();
    group.replicas.get_mut(&id).expect("there").replica.take_committed(&mut committed);
    committed
}

fn pass_on(group: &mut Group) -> Cursor {
    let leader = group.leader().expect("a leader");
    let replica = &mut group.replicas.get_mut(&leader).expect("there").replica;
    let cursor = Cursor { revision: replica.revision(), index: replica.applied().index };
    assert!(replica.propose_cursor(cursor));
    group.settle();
    cursor
}

#[test]
fn every_replica_has_the_same_changes_and_the_next_leader_the_cursor() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("a leader");
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    assert!(
        !group
            .replicas
            .get_mut(&others[0])
            .expect("there")
            .replica
            .propose_cursor(Cursor { revision: 0, index: 1 })
    );
    for node in group.replicas.values_mut() {
        node.replica.set_capture(true);
    }
    for round in 0..5 {
        group.put("k", &format!("value{round}"));
    }
    let cursor = pass_on(&mut group);
    // What is committed reaches the followers with the next round.
    group.ticks(4);
    let committed = taken(&mut group, leader);
    assert_eq!(committed.iter().map(|one| one.last).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    for id in &others {
        assert_eq!(taken(&mut group, *id), committed);
        assert_eq!(group.replicas[id].replica.cursor(), cursor);
    }
    group.cut.insert(leader);
    let next = group.elect();
    assert!(next != leader);
    assert_eq!(group.replicas[&next].replica.cursor(), cursor);
    let replica = &mut group.replicas.get_mut(&next).expect("there").replica;
    assert!(!replica.propose_cursor(cursor), "it is known");
}

#[test]
fn after_a_snapshot_changes_go_on_behind_it() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("a leader");
    let away = (1..=3).find(|id| *id != leader).expect("another one");
    group.replicas.get_mut(&away).expect("there").replica.set_capture(true);
    group.put("k", "seen");
    group.ticks(4);
    group.cut.insert(away);
    for round in 0..200 {
        group.put("k", &format!("{round:0200}"));
    }
    let cursor = pass_on(&mut group);
    group.ticks(30);
    group.cut.remove(&away);
    group.ticks(30);
    assert_eq!(group.contents(away), group.contents(leader));
    let replica = &group.replicas[&away].replica;
    assert_eq!((replica.revision(), replica.cursor()), (201, cursor));
    let committed = taken(&mut group, away);
    assert!(committed.is_empty(), "the snapshot has what is before it: {committed:?}");
    group.put("k", "after");
    group.ticks(4);
    let committed = taken(&mut group, away);
    assert_eq!(committed.iter().map(|one| one.first).collect::<Vec<_>>(), [202]);
}
