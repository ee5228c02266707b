//! Several replicas of one partition, with a network of their own: everything sent arrives unless a link
//! is cut, everything written is persisted at once. Bad weather is the simulation's business.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;
use crate::Value;

const FAR: u64 = u64::MAX - 1;

/// A snapshot as it was taken.
type Taken = (SnapshotMeta, Vec<u8>);

pub(super) struct Group {
    pub(super) replicas: BTreeMap<u64, Node>,
    wire: VecDeque<Message>,
    pub(super) cut: BTreeSet<u64>,
    /// These replicas and the others do not hear each other.
    pub(super) apart: BTreeSet<u64>,
    /// What is sent to these replicas goes to `late`.
    pub(super) slow: BTreeSet<u64>,
    pub(super) late: Vec<Message>,
    /// Nobody hears that this entry is committed.
    unheard: Option<u64>,
    /// Snapshots on their way, where they are to take time.
    held: Option<Vec<(Message, Taken)>>,
    /// Whether replicas hear what the others say about sleeping.
    pub(super) sleeps: bool,
    pub(super) now_us: u64,
    next_waiter: u32,
}

pub(super) struct Node {
    pub(super) replica: Replica<u32>,
    pub(super) view: Arc<View>,
    replies: Replies<u32>,
    snapshot: Option<(SnapshotMeta, Vec<u8>)>,
}

pub(super) fn node(id: u64, beginning: SnapshotMeta, promised: bool) -> Node {
    let memory = Memory::new(0);
    let mut recovery = Recovery::new(table(&memory), None, beginning, 1 << 16);
    recovery.has_history = promised;
    let config = ReplicaConfig { id, tail_bytes: 1 << 10, ..config() };
    let view = Arc::new(View::default());
    let replica = Replica::new(&config, recovery, memory, Arc::clone(&view), at(NOW));
    Node { replica: replica.expect("a state"), view, replies: Vec::new(), snapshot: None }
}

impl Node {
    fn dump(&self) -> Vec<u8> {
        let mut chunk = Vec::new();
        self.replica.table().begin_snapshot();
        while !self.replica.table().snapshot_chunk(1 << 20, &mut chunk) {}
        self.replica.table().end_snapshot();
        chunk
    }
}

impl Group {
    pub(super) fn of(ids: &[u64]) -> Group {
        let mut group = Group::founded(ids);
        group.elect();
        group
    }

    /// Nobody leads it yet.
    fn founded(ids: &[u64]) -> Group {
        let beginning = SnapshotMeta::founding(ids.to_vec());
        let replicas = ids.iter().map(|id| (*id, node(*id, beginning.clone(), false)));
        Group {
            replicas: replicas.collect(),
            wire: VecDeque::new(),
            cut: BTreeSet::new(),
            apart: BTreeSet::new(),
            slow: BTreeSet::new(),
            late: Vec::new(),
            unheard: None,
            held: None,
            sleeps: false,
            now_us: 1,
            next_waiter: 0,
        }
    }

    pub(super) fn now(&self) -> Now {
        Now { ms: NOW, us: self.now_us }
    }

    /// Lets everything happen that needs no time.
    pub(super) fn settle(&mut self) {
        let now = self.now();
        loop {
            let mut quiet = self.wire.is_empty();
            for node in self.replicas.values_mut() {
                node.replica.propose(&mut node.replies);
                while let Some(ready) = node.replica.ready(&mut node.replies).expect("sound") {
                    quiet = false;
                    self.wire.extend(ready.messages);
                    node.replica.persisted(ready.number);
                    self.wire.extend(ready.persisted_messages);
                }
                if node.replica.snapshot_wanted() {
                    let meta = node.replica.snapshot_meta();
                    node.snapshot = Some((meta.clone(), node.dump()));
                    node.replica.snapshot_taken(meta);
                }
            }
            if quiet {
                return;
            }
            self.carry_signals();
            for message in std::mem::take(&mut self.wire) {
                let unheard = self.unheard.is_some_and(|index| message.commit >= index);
                if unheard || !self.connects(message.from, message.to) {
                    continue;
                }
                if self.slow.contains(&message.to) {
                    self.late.push(message);
                    continue;
                }
                if message.msg_type() == MessageType::MsgSnapshot {
                    let snapshot = self.replicas[&message.from].snapshot.clone();
                    let snapshot = snapshot.expect("it was taken");
                    match &mut self.held {
                        Some(held) => held.push((message, snapshot)),
                        None => self.carry_snapshot(&message, snapshot),
                    }
                    continue;
                }
                let mut bytes = Vec::new();
                encode_message(&message, &mut bytes);
                let message = decode_message(&bytes).expect("what was encoded");
                let to = self.replicas.get_mut(&message.to).expect("looked up");
                to.replica.step(now, message);
            }
        }
    }

    fn connects(&self, from: u64, to: u64) -> bool {
        let cut = self.cut.contains(&from) || self.cut.contains(&to);
        let apart = self.apart.contains(&from) != self.apart.contains(&to);
        !cut && !apart && self.replicas.contains_key(&to)
    }

    /// What replicas say about sleeping, in their order.
    pub(super) fn carry_signals(&mut self) {
        let now = self.now();
        let from = |(id, node): (&u64, &mut Node)| (*id, node.replica.take_signals());
        let said: Vec<_> = self.replicas.iter_mut().map(from).collect();
        for (from, signals) in said {
            for (to, signal) in signals {
                if self.sleeps && self.connects(from, to) {
                    let to = self.replicas.get_mut(&to).expect("connected");
                    to.replica.signal(now, from, signal);
                }
            }
        }
    }

    /// Beats go from each replica's node to each other, and are answered after this time.
    pub(super) fn beat(&mut self, after_us: u64) {
        let sent_us = self.now_us;
        self.now_us += after_us;
        let now = self.now();
        let ids: Vec<u64> = self.replicas.keys().copied().collect();
        for (asks, answers) in ids.iter().flat_map(|one| ids.iter().map(move |two| (*one, *two))) {
            if asks == answers || !self.connects(asks, answers) {
                continue;
            }
            self.replicas.get_mut(&answers).expect("there").replica.vouch(now);
            self.carry_signals();
            let node = self.replicas.get_mut(&asks).expect("there");
            node.replica.beat_answered(now, answers, sent_us);
        }
        self.settle();
    }

    fn carry_snapshot(&mut self, message: &Message, (meta, chunk): (SnapshotMeta, Vec<u8>)) {
        let fresh = Table::new(TableOptions { hash_seed: 7, shards: 1 }, Memory::new(0));
        fresh.load(&chunk).expect("a chunk");
        let now = self.now();
        let to = self.replicas.get_mut(&message.to).expect("looked up");
        let installed = to.replica.install(now, message.from, message.term, meta, fresh);
        let from = self.replicas.get_mut(&message.from).expect("there");
        from.replica.report_snapshot(message.to, installed);
    }

    pub(super) fn ticks(&mut self, count: usize) {
        for _ in 0..count {
            self.now_us += 50_000;
            let now = self.now();
            for node in self.replicas.values_mut() {
                node.replica.tick(now);
            }
            self.settle();
        }
    }

    pub(super) fn leader(&self) -> Option<u64> {
        let mut leaders =
            self.replicas.iter().filter(|(id, one)| one.replica.leads() && !self.cut.contains(id));
        leaders.next().map(|(id, _)| *id)
    }

    pub(super) fn elect(&mut self) -> u64 {
        for _ in 0..60 {
            self.ticks(1);
            if let Some(leader) = self.leader() {
                return leader;
            }
        }
        panic!("nobody was elected");
    }

    pub(super) fn ask(&mut self, id: u64, command: &Command<&[u8]>) -> u32 {
        let (waiter, now) = (self.next_waiter, self.now());
        self.next_waiter += 1;
        let node = self.replicas.get_mut(&id).expect("there");
        node.replies.extend(node.replica.execute(now, command, None, waiter));
        waiter
    }

    fn reply(&mut self, id: u64, waiter: u32) -> Option<Reply> {
        let replies = &mut self.replicas.get_mut(&id).expect("there").replies;
        let at = replies.iter().position(|(whose, _)| *whose == waiter)?;
        Some(replies.swap_remove(at).1)
    }

    pub(super) fn put(&mut self, key: &str, value: &str) -> Option<Reply> {
        let leader = self.leader().expect("a leader");
        let waiter = self.ask(leader, &set(key.as_bytes(), value.as_bytes(), Expiry::Never));
        self.settle();
        self.reply(leader, waiter)
    }

    fn reconcile(&mut self, target: &[u64]) {
        for _ in 0..100 {
            let now = self.now();
            for node in self.replicas.values_mut() {
                if let Some(Change::Transfer(to)) = node.replica.reconcile(now, 1, target) {
                    node.replica.transfer_leader(now, to);
                }
            }
            self.ticks(1);
        }
    }

    fn contents(&self, id: u64) -> Vec<u8> {
        self.replicas[&id].dump()
    }
}

fn get(key: &str) -> Command<&[u8]> {
    Command::Get { key: key.as_bytes() }
}

fn value(reply: Option<Reply>) -> Option<Vec<u8>> {
    match reply {
        Some(Reply::Value(Some(Value { bytes, .. }))) => Some(bytes),
        _ => None,
    }
}

#[test]
fn who_should_lead_a_new_group_does_so_at_once() {
    for first in [1, 2, 3] {
        let mut group = Group::founded(&[1, 2, 3]);
        group.replicas.get_mut(&first).expect("there").replica.stand_first();
        group.ticks(3);
        assert_eq!(group.leader(), Some(first));
        // In a group that somebody may have led it waits like the others.
        group.cut.insert(first);
        let next = group.elect();
        group.cut.clear();
        group.replicas.get_mut(&first).expect("there").replica.stand_first();
        group.ticks(30);
        assert_eq!(group.leader(), Some(next));
    }
}

#[test]
fn a_write_reaches_every_replica() {
    let mut group = Group::of(&[1, 2, 3]);
    assert_eq!(group.put("k", "v"), Some(Reply::Written { version: 1 }));
    group.ticks(4);
    for id in [1, 2, 3] {
        assert_eq!(group.contents(id), group.contents(1));
        assert_eq!(group.replicas[&id].replica.revision(), 1);
    }
}

#[test]
fn a_write_waits_for_a_quorum_and_its_outcome_is_unknown_without_one() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("a leader");
    group.cut = [1, 2, 3].into();
    let waiter = group.ask(leader, &set(b"k", b"v", Expiry::Never));
    group.ticks(5);
    assert_eq!(group.reply(leader, waiter), None);
    group.ticks(150);
    assert_eq!(group.reply(leader, waiter), Some(Reply::Error(Error::OutcomeUnknown)));
}

#[test]
fn a_lost_leader_is_replaced_and_what_it_acknowledged_stays() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    let old = group.leader().expect("a leader");
    group.cut.insert(old);
    let new = group.elect();
    assert_ne!(new, old);
    let waiter = group.ask(new, &get("k"));
    group.settle();
    assert_eq!(value(group.reply(new, waiter)), Some(b"v".to_vec()));
    assert_eq!(group.put("k", "w"), Some(Reply::Written { version: 2 }));
    // What the old one was still trying is void when it comes back.
    let waiter = group.ask(old, &set(b"k", b"lost", Expiry::Never));
    group.cut.clear();
    group.ticks(30);
    assert_eq!(group.reply(old, waiter), Some(Reply::Error(Error::NotLeader)));
    assert_eq!(group.contents(old), group.contents(new));
}

#[test]
fn a_leader_without_a_lease_answers_only_when_a_quorum_confirms_it() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    group.ticks(4);
    let old = group.leader().expect("a leader");
    assert!(group.replicas[&old].view.may_serve(group.now_us));
    // It is stopped; the others go on without it.
    group.cut.insert(old);
    let mut asleep = group.replicas.remove(&old).expect("there");
    group.elect();
    group.put("k", "new");
    group.ticks(20);
    // It wakes up and knows nothing.
    assert!(asleep.replica.leads());
    assert!(!asleep.view.may_serve(group.now_us));
    let now = group.now();
    assert_eq!(
        asleep.replica.execute(now, &get("k"), None, 77),
        None,
        "not before it is confirmed"
    );
    group.replicas.insert(old, asleep);
    group.cut.clear();
    group.ticks(10);
    assert_eq!(group.reply(old, 77), Some(Reply::Error(Error::NotLeader)));
}

#[test]
fn a_late_acknowledgement_of_an_earlier_write_confirms_no_read() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    group.ticks(4);
    let old = group.leader().expect("a leader");
    let mut late = Vec::new();
    let mut sleeper = group.replicas.remove(&old).expect("there");
    // A write has reached the others; what they say to it is long on its way.
    let now = group.now();
    assert_eq!(sleeper.replica.execute(now, &set(b"a", b"1", Expiry::Never), None, 76), None);
    sleeper.replica.propose(&mut sleeper.replies);
    while let Some(ready) = sleeper.replica.ready(&mut sleeper.replies).expect("sound") {
        sleeper.replica.persisted(ready.number);
        for message in ready.messages {
            let Some(to) = group.replicas.get_mut(&message.to) else { continue };
            to.replica.step(now, message);
            while let Some(ready) = to.replica.ready(&mut to.replies).expect("sound") {
                to.replica.persisted(ready.number);
                late.extend(ready.persisted_messages);
            }
        }
    }
    group.elect();
    assert_eq!(group.put("k", "new"), Some(Reply::Written { version: 3 }));
    let now = group.now();
    assert!(sleeper.replica.leads() && !sleeper.view.may_serve(now.us));
    for (waiter, command) in [(77, get("k")), (78, get("a"))] {
        assert_eq!(sleeper.replica.execute(now, &command, None, waiter), None);
    }
    sleeper.replica.propose(&mut sleeper.replies);
    late.iter().for_each(|message| sleeper.replica.step(now, message.clone()));
    while let Some(ready) = sleeper.replica.ready(&mut sleeper.replies).expect("sound") {
        sleeper.replica.persisted(ready.number);
    }
    let answered: Vec<u32> = sleeper.replies.iter().map(|(waiter, _)| *waiter).collect();
    assert_eq!(answered, [76], "the write is committed, and nothing is known of the reads");
    // Nor are reads that are proposed only after all that they waited for was applied.
    let waiter = sleeper.replica.execute(now, &set(b"a", b"2", Expiry::Never), None, 79);
    assert_eq!(waiter, None);
    group.replicas.insert(old, sleeper);
    group.ticks(10);
    for waiter in [77, 78, 79] {
        assert_eq!(group.reply(old, waiter), Some(Reply::Error(Error::NotLeader)));
    }
}

#[test]
fn a_lease_outlives_no_promise_of_a_follower() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(4);
    let old = group.leader().expect("a leader");
    let view = Arc::clone(&group.replicas[&old].view);
    group.cut.insert(old);
    let new = group.elect();
    assert!(group.replicas[&new].view.may_serve(group.now_us) || !view.may_serve(group.now_us));
    assert!(!view.may_serve(group.now_us), "two may serve at {}", group.now_us);
}

#[test]
fn who_has_just_started_does_not_vote() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(4);
    let leader = group.leader().expect("a leader");
    let others: Vec<u64> = [1, 2, 3].into_iter().filter(|id| *id != leader).collect();
    // One follower has heard nothing for long, the other forgets in a restart what it promised.
    group.cut.insert(leader);
    let restarted = node(others[0], SnapshotMeta::founding(vec![1, 2, 3]), true);
    let lease = Arc::clone(&group.replicas[&leader].view);
    let mut bytes = Vec::new();
    let mut vote = Message {
        from: others[1],
        to: others[0],
        term: 50,
        index: 100,
        log_term: 50,
        ..Message::default()
    };
    vote.set_msg_type(MessageType::MsgRequestPreVote);
    encode_message(&vote, &mut bytes);
    group.replicas.insert(others[0], restarted);
    let now = group.now();
    let one = group.replicas.get_mut(&others[0]).expect("there");
    one.replica.step(now, vote);
    let answer = one.replica.ready(&mut one.replies).expect("sound");
    assert!(answer.is_none_or(|ready| ready.persisted_messages.is_empty()));
    assert!(lease.may_serve(group.now_us));
}

#[test]
fn a_leader_that_nobody_hears_steps_down_though_it_hands_over_again_and_again() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("elected");
    group.cut.insert(leader);
    for _ in 0..100 {
        let now = group.now();
        let replica = &mut group.replicas.get_mut(&leader).expect("there").replica;
        if let Some(heir) = replica.heir() {
            replica.transfer_leader(now, heir);
        }
        group.ticks(1);
    }
    assert!(!group.replicas[&leader].replica.leads());
}

#[test]
fn leadership_is_handed_over_without_losing_what_waits() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "1");
    group.ticks(4);
    let old = group.leader().expect("a leader");
    let heir = group.replicas[&old].replica.heir().expect("one is fit");
    let now = group.now();
    let node = group.replicas.get_mut(&old).expect("there");
    assert!(node.replica.transfer_leader(now, heir));
    assert!(!node.view.may_serve(now.us), "a vote for the heir needs no timeout");
    let waiter = group.ask(old, &set(b"k", b"2", Expiry::Never));
    group.settle();
    assert_eq!(group.leader(), Some(heir));
    assert_eq!(group.reply(old, waiter), Some(Reply::Error(Error::NotLeader)), "never proposed");
    assert_eq!(group.put("k", "3"), Some(Reply::Written { version: 2 }));
}

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
    one.replica.persisted(ready.number);
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
fn junk_of_a_peer_is_dropped() {
    let mut group = Group::of(&[1, 2, 3]);
    group.put("k", "v");
    group.ticks(4);
    let now = group.now();
    let kinds = 0..20;
    for kind in kinds {
        for (index, commit, term) in
            [(0, 0, 1), (99, 1 << 40, 99), (2, 99, 1), (1 << 50, 3, 1 << 40)]
        {
            let entries = vec![Entry { index: 7, term: 1 << 60, ..Entry::default() }];
            let junk = Message {
                msg_type: kind,
                from: 2,
                to: 1,
                term,
                index,
                commit,
                log_term: term,
                entries,
                ..Message::default()
            };
            let one = group.replicas.get_mut(&1).expect("there");
            one.replica.step(now, junk);
            while let Some(ready) = one.replica.ready(&mut one.replies).expect("sound") {
                one.replica.persisted(ready.number);
            }
        }
    }
}

#[test]
fn a_write_that_is_repeated_after_a_failover_takes_effect_once() {
    let mut group = Group::of(&[1, 2, 3]);
    let once = Once { session: 9, sequence: 1, acked_below: 1 };
    let add = Command::Increment { key: b"n".as_slice(), delta: 5 };
    let ask = |group: &mut Group, id: u64, waiter: u32| {
        let now = group.now();
        let node = group.replicas.get_mut(&id).expect("there");
        node.replies.extend(node.replica.execute(now, &add, Some(&once), waiter));
        group.settle();
        group.reply(id, waiter)
    };
    let old = group.leader().expect("a leader");
    let first = ask(&mut group, old, 1);
    assert_eq!(first, Some(Reply::Counter { value: 5, version: 1 }));
    group.cut.insert(old);
    let new = group.elect();
    assert_eq!(ask(&mut group, new, 2), first);
    assert_eq!(group.replicas[&new].replica.revision(), 1);
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
