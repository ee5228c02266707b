//! Replicas that come, go and catch up: changes of the members, and the snapshots that bring a replica up to
//! date.

use super::*;

const FAR: u64 = u64::MAX - 1;

#[test]
fn a_new_replica_takes_the_place_of_one_that_leads() {
    let mut group = Group::of(&[1, 2, 3]);
    for round in 0..50 {
        group.put(&format!("key{round}"), "some value that fills the log");
    }
    let old = group.leader().expect("a leader");
    let mut target: Vec<u64> = [1, 2, 3, 4].into_iter().filter(|id| *id != old).collect();
    group.replicas.insert(4, node(4, SnapshotMeta::default(), false));
    target.sort_unstable();
    group.reconcile(&target);
    let leader = group.leader().expect("a leader");
    assert_ne!(leader, old);
    assert_eq!(*group.replicas[&leader].replica.members(), Members::of_voters(target.clone()));
    assert_eq!(group.contents(4), group.contents(leader));
    assert!(group.replicas[&4].replica.status().members.is_voter(4));
    group.put("after", "it");
    group.ticks(4);
    assert_eq!(group.contents(4), group.contents(leader));
    assert!(!group.replicas[&old].view.may_serve(FAR));
}

impl Group {
    /// Whether a replica says that another one, which asks, can go.
    fn lets_go(&mut self, id: u64, who: u64) -> bool {
        let index = self.replicas[&who].replica.status().last;
        let mut ask = Message { from: who, to: id, term: 99, index, ..Message::default() };
        ask.set_msg_type(MessageType::MsgRequestPreVote);
        let now = self.now();
        self.replicas.get_mut(&id).expect("there").replica.has_left(now, &ask)
    }
}

#[test]
fn who_has_left_stays_until_a_majority_knows_for_good() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    let leader = group.leader().expect("a leader");
    let old = [1, 2, 3].into_iter().find(|id| *id != leader).expect("a follower");
    let stay = [1, 2, 3].into_iter().find(|id| ![leader, old].contains(id)).expect("another");
    group.replicas.insert(4, node(4, SnapshotMeta::default(), false));
    let mut target = vec![leader, stay, 4];
    target.sort_unstable();
    let (now, mut change) = (group.now(), None);
    for _ in 0..100 {
        let one = group.replicas.get_mut(&leader).expect("there");
        change = one.replica.reconcile(now, 1, &target).or(change);
        if change == Some(Change::LeaveJoint) {
            break;
        }
        group.ticks(1);
    }
    assert_eq!(change, Some(Change::LeaveJoint));
    // It is committed, and only the leader has heard so before it is cut off from those who stay.
    group.unheard = Some(group.replicas[&leader].replica.status().last);
    group.settle();
    assert_eq!(*group.replicas[&leader].replica.members(), Members::of_voters(target.clone()));
    for id in [stay, 4] {
        assert!(group.replicas[&id].replica.members().is_joint(), "{id} needs the old ones' votes");
    }
    (group.unheard, group.cut) = (None, [stay, 4].into());
    group.ticks(1);
    assert!(!group.lets_go(leader, old));
    let now = group.now();
    let one = group.replicas.get_mut(&leader).expect("there");
    assert_eq!(one.replica.reconcile(now, 1, &target), Some(Change::Confirm));
    group.settle();
    assert!(!group.lets_go(leader, old), "nobody has answered");
    // Those who stay have it on their disks: now it does not matter who is lost.
    group.cut.clear();
    group.ticks(4);
    assert!(group.lets_go(leader, old));
    assert!(!group.lets_go(leader, stay) && !group.lets_go(stay, old), "only the leader says so");
    group.replicas.remove(&old);
    group.cut.insert(leader);
    group.elect();
}

#[test]
fn a_map_that_is_older_than_the_one_followed_changes_nothing() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    let leader = group.leader().expect("a leader");
    group.replicas.insert(4, node(4, SnapshotMeta::default(), false));
    let step = |group: &mut Group, epoch: u64, target: &[u64]| {
        let now = group.now();
        let leader = group.leader().expect("a leader");
        let one = group.replicas.get_mut(&leader).expect("there");
        let change = one.replica.reconcile(now, epoch, target);
        group.ticks(4);
        change
    };
    assert_eq!(step(&mut group, 5, &[1, 2, 3, 4]), Some(Change::AddLearner(4)));
    // A leader that has not heard of that map does not send the new replica away.
    assert_eq!(step(&mut group, 4, &[1, 2, 3]), None);
    assert_eq!(group.replicas[&4].replica.snapshot_meta().epoch, 5, "it came with the snapshot");
    group.cut.insert(leader);
    group.elect();
    group.cut.clear();
    group.ticks(20);
    assert_eq!(step(&mut group, 4, &[1, 2, 3]), None, "nor does another one");
    // And what a newer map has sent away does not come back.
    assert_eq!(step(&mut group, 6, &[1, 2, 3]), Some(Change::RemoveLearner(4)));
    assert_eq!(step(&mut group, 5, &[1, 2, 3, 4]), Some(Change::Confirm));
    assert_eq!(step(&mut group, 5, &[1, 2, 3, 4]), None);
}

#[test]
fn a_follower_that_is_far_behind_gets_a_snapshot() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("a leader");
    let behind = [1, 2, 3].into_iter().find(|id| *id != leader).expect("a follower");
    group.cut.insert(behind);
    for round in 0..200 {
        let text = "x".repeat(200);
        assert!(group.put(&format!("key{round}"), &text).is_some());
        group.ticks(1);
    }
    group.cut.clear();
    group.ticks(40);
    assert!(group.replicas[&leader].snapshot.is_some());
    assert_eq!(group.contents(behind), group.contents(leader));
    let revision = group.replicas[&behind].replica.revision();
    assert_eq!(revision, 200);
    assert!(group.replicas[&behind].replica.first_record().start > 1);
}

/// What recovery makes of a snapshot at entry 300 of these voters and of states written later.
fn recovered(voters: &[u64], states: &[(u64, u64)]) -> (Replica<u32>, usize) {
    let memory = Memory::new(0);
    let table = table(&memory);
    let hash = table.hash(b"k");
    let (key, value) = (b"k".as_slice(), b"v".as_slice());
    table.put(
        hash,
        crate::store::Entry { key, value, version: 5, expires_at_ms: None, written_at_s: 0 },
    );
    let meta = SnapshotMeta {
        position: Position { index: 300, term: 2 },
        revision: 5,
        members: Members::of_voters(voters.to_vec()),
        ..SnapshotMeta::default()
    };
    let mut recovery =
        Recovery::new(Arc::clone(&table), Some(meta), SnapshotMeta::default(), 1 << 16);
    for (replica, start) in states {
        let (term, vote) = (7, 2);
        recovery.state(&StateRecord { replica: *replica, start: *start, term, vote });
    }
    recovery.finish().expect("nothing is missing");
    let config = ReplicaConfig { id: recovery.replica(), tail_bytes: 1 << 10, ..config() };
    let replica = Replica::new(&config, recovery, memory, Arc::default(), at(NOW));
    (replica.expect("a state"), table.len())
}

#[test]
fn what_an_earlier_replica_left_is_not_that_of_the_next_one() {
    let (replica, keys) = recovered(&[1, 2, 3], &[(1, 1), (0, 0), (9, 0)]);
    assert_eq!((replica.id(), replica.term(), keys), (9, 7, 0));
    assert_eq!((replica.applied(), replica.revision()), (Position::default(), 0));
    assert_eq!(*replica.members(), Members::default());
    assert_eq!(replica.status().commit, 0);
    assert!(!replica.is_removed(), "it waits for its group");
    // Nor where nothing but the snapshot is left of the earlier one.
    let (replica, keys) = recovered(&[1, 2, 3], &[(9, 0)]);
    assert_eq!((replica.applied().index, keys), (0, 0));
    // A snapshot of its own counts, written to the log or not; so does that of a still later one.
    for states in
        [&[(1, 1), (0, 0), (9, 0)][..], &[(0, 0), (9, 0), (9, 300)], &[(8, 0), (0, 0), (9, 300)]]
    {
        let (replica, keys) = recovered(&[2, 3, 9], states);
        assert_eq!((replica.id(), replica.applied().index, keys), (9, 300, 1), "{states:?}");
    }
}

#[test]
fn one_snapshot_is_installed_before_the_next_is_taken() {
    let mut one = node(4, SnapshotMeta::default(), false);
    let meta = |index: u64| SnapshotMeta {
        position: Position { index, term: 1 },
        revision: index,
        members: Members::of_voters(vec![1, 2, 4]),
        ..SnapshotMeta::default()
    };
    let fresh = || Table::new(TableOptions { hash_seed: 7, shards: 1 }, Memory::new(0));
    assert!(one.replica.install(at(NOW), 1, 1, meta(50), fresh()));
    // An older one, sent before the first: Raft keeps what it has.
    for index in [40, 50, 60] {
        assert!(!one.replica.install(at(NOW), 1, 1, meta(index), fresh()), "{index}");
    }
    let ready = one.replica.ready(&mut one.replies).expect("sound").expect("a state");
    assert_eq!(ready.state.map(|state| state.start), Some(50));
    assert_eq!((one.replica.applied().index, one.replica.revision()), (50, 50));
    // Until the log says so, what it has up to there may be of another history.
    assert_eq!((one.view.applied(), one.replica.is_restoring()), (0, true));
    assert!(one.replica.persisted(ready.number));
    assert_eq!((one.view.applied(), one.replica.is_restoring()), (50, false));
    assert!(one.replica.install(at(NOW), 1, 1, meta(60), fresh()), "the next one");
}

impl Group {
    /// A group with some data, and a new learner 4 to which a snapshot is on its way, so far.
    fn with_snapshot_under_way() -> Group {
        let mut group = Group::of(&[1, 2, 3]);
        group.write(1000);
        group.held = Some(Vec::new());
        group.replicas.insert(4, node(4, SnapshotMeta::default(), false));
        for _ in 0..10 {
            let now = group.now();
            for node in group.replicas.values_mut() {
                node.replica.reconcile(now, 1, &[1, 2, 3, 4]);
            }
            group.ticks(1);
        }
        assert_eq!(group.held.as_ref().map(Vec::len), Some(1));
        group
    }

    /// Writes so many keys of about 200 bytes.
    fn write(&mut self, count: usize) {
        for number in 0..count {
            let done = self.put(&format!("key{number}"), &"x".repeat(200));
            assert!(matches!(done, Some(Reply::Written { .. })), "{done:?}");
            if number % 10 == 0 {
                self.ticks(1);
            }
        }
    }

    /// What is on its way arrives. Returns how many snapshots that are.
    fn deliver(&mut self) -> usize {
        let held = self.held.replace(Vec::new()).expect("snapshots are held");
        let count = held.len();
        held.into_iter().for_each(|(message, snapshot)| self.carry_snapshot(&message, snapshot));
        self.ticks(10);
        count
    }
}

#[test]
fn what_is_written_while_a_snapshot_is_sent_is_kept_for_its_receiver() {
    let mut group = Group::with_snapshot_under_way();
    let leader = group.leader().expect("a leader");
    // More than eight times the tail of 1 KiB, which is what those who are only behind are granted.
    group.write(150);
    assert_eq!(group.deliver(), 1);
    assert_eq!(group.deliver(), 0, "no other one was needed");
    assert_eq!(group.contents(4), group.contents(leader));
    assert!(!group.replicas.get_mut(&leader).expect("there").replica.take_lost_snapshot());
    // It has caught up, and what was kept for it is not kept any longer.
    let kept = group.replicas[&leader].replica.node.store().bytes();
    assert!(kept <= 8 << 10, "{kept}");
}

#[test]
fn a_snapshot_that_is_outrun_is_told_of_and_the_next_one_waits() {
    let mut group = Group::with_snapshot_under_way();
    let leader = group.leader().expect("a leader");
    group.write(700);
    let kept = group.replicas[&leader].replica.node.store().bytes();
    assert!(kept <= 64 << 10, "{kept}");
    assert_eq!(group.deliver(), 1);
    let one = group.replicas.get_mut(&leader).expect("there");
    assert!(one.replica.take_lost_snapshot() && !one.replica.take_lost_snapshot());
    assert!(!one.replica.snapshot_wanted(), "not at once");
    group.ticks(100);
    assert_eq!(group.deliver(), 0);
    group.ticks(200);
    assert_eq!(group.deliver(), 1, "after a while");
    assert_eq!(group.contents(4), group.contents(leader));
    assert!(!group.replicas.get_mut(&leader).expect("there").replica.take_lost_snapshot());
}

#[test]
fn a_snapshot_of_a_group_that_cannot_be_is_not_installed() {
    for members in [
        Members { learners: vec![1], ..Members::default() },
        Members { voters: vec![1, 2], learners: vec![1], ..Members::default() },
        Members { voters: vec![1, 1], ..Members::default() },
        Members { voters: vec![0, 1], ..Members::default() },
    ] {
        let mut one = node(1, SnapshotMeta::default(), false);
        let position = Position { index: 9, term: 1 };
        let meta = SnapshotMeta { position, members, ..SnapshotMeta::default() };
        let table = Table::new(TableOptions { hash_seed: 7, shards: 1 }, Memory::new(0));
        assert!(!one.replica.install(at(NOW), 2, 1, meta, table));
    }
}
