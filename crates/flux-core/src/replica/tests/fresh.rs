//! What a replica says of its age is never too little, and never much too much.

use raft::eraftpb::{Message, MessageType};

use super::group::{Group, Node, node};
use super::*;
use crate::Command;

/// Ticks between two rounds of heartbeats, in microseconds.
const ROUND_US: u64 = 100_000;

impl Group {
    /// Since when a replica says to lack nothing.
    fn since_us(&self, id: u64) -> u64 {
        let (_, age_us) = self.replicas[&id].view.staleness(self.now_us);
        self.now_us - age_us.expect("it was up to date before")
    }

    fn followers(&self) -> Vec<u64> {
        let leader = self.leader().expect("a leader");
        self.replicas.keys().copied().filter(|id| *id != leader).collect()
    }

    fn step(&mut self, id: u64, message: Message) {
        let now = self.now();
        self.replicas.get_mut(&id).expect("there").replica.step(now, message);
    }
}

fn round(message: &Message) -> bool {
    message.msg_type() == MessageType::MsgHeartbeat && !message.context.is_empty()
}

#[test]
fn a_follower_is_a_few_rounds_old() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(10);
    for id in [1, 2, 3] {
        assert!(group.since_us(id) + 3 * ROUND_US >= group.now_us, "replica {id}");
    }
    let leader = group.leader().expect("a leader");
    assert_eq!(group.since_us(leader), group.now_us);
}

#[test]
fn a_message_that_comes_late_makes_no_follower_younger() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(10);
    let behind = group.followers()[0];
    group.slow.insert(behind);
    group.ticks(4);
    assert!(group.put("k", "v").is_some());
    let acknowledged_us = group.now_us;
    group.now_us += 5_000_000;
    for message in std::mem::take(&mut group.late).into_iter().filter(round) {
        group.step(behind, message);
    }
    group.settle();
    assert_eq!(group.replicas[&behind].replica.revision(), 0);
    assert!(group.since_us(behind) <= acknowledged_us, "the write is lacking");
}

#[test]
fn who_leads_no_more_makes_no_follower_younger() {
    let mut both_lead = false;
    // How long a leader goes on alone depends on when it looked for its followers last.
    for warm_up in 10..22 {
        let mut group = Group::of(&[1, 2, 3, 4, 5]);
        group.ticks(warm_up);
        let (old, behind) = (group.leader().expect("a leader"), group.followers()[0]);
        group.apart = [old, behind].into();
        let mut acknowledged_us = None;
        for _ in 0..40 {
            group.ticks(1);
            let leads =
                |(id, one): (&u64, &Node)| (*id != old && one.replica.leads()).then_some(*id);
            let Some(new) = group.replicas.iter().find_map(leads) else { continue };
            group.ask(new, &Command::Increment { key: b"n", delta: 1 });
            group.settle();
            both_lead |= group.replicas[&old].replica.leads();
            acknowledged_us.get_or_insert(group.now_us);
            for id in [old, behind] {
                assert!(group.since_us(id) <= acknowledged_us.expect("set"), "replica {id}");
            }
        }
        assert!(acknowledged_us.is_some(), "another was elected");
    }
    assert!(both_lead);
}

#[test]
fn a_new_leader_must_know_what_earlier_ones_acknowledged() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(10);
    let old = group.leader().expect("a leader");
    assert!(group.put("k", "v").is_some());
    let acknowledged_us = group.now_us;
    group.now_us += 1000;
    let heir = group.replicas[&old].replica.heir().expect("one is fit");
    let third = group.followers().into_iter().find(|id| *id != heir).expect("three");
    group.slow.insert(third);
    let now = group.now();
    assert!(group.replicas.get_mut(&old).expect("there").replica.transfer_leader(now, heir));
    group.settle();
    assert_eq!(group.leader(), Some(heir));
    let late = std::mem::take(&mut group.late);
    assert!(late.iter().any(|one| one.from == heir && one.msg_type() == MessageType::MsgAppend));
    for message in late {
        group.step(third, message);
        assert_eq!(group.replicas[&third].replica.revision(), 0, "nothing was applied yet");
        assert!(group.since_us(third) <= acknowledged_us);
    }
}

#[test]
fn ages_do_not_grow_where_no_lease_is_taken() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(4);
    let leader = group.leader().expect("a leader");
    let heir = group.replicas[&leader].replica.heir().expect("one is fit");
    let now = group.now();
    group.cut.insert(heir);
    assert!(group.replicas.get_mut(&leader).expect("there").replica.transfer_leader(now, heir));
    group.settle();
    group.cut.clear();
    group.ticks(20);
    assert_eq!(group.leader(), Some(leader), "the other did not hear of it");
    assert!(!group.replicas[&leader].view.may_serve(group.now_us));
    for id in [1, 2, 3] {
        assert!(group.since_us(id) + 5 * ROUND_US >= group.now_us, "replica {id}");
    }
}

#[test]
fn a_stamp_of_another_process_means_nothing() {
    let mut group = Group::of(&[1, 2, 3]);
    group.ticks(10);
    let follower = group.followers()[0];
    group.slow.insert(follower);
    group.ticks(2);
    let before_us = group.since_us(follower);
    group.now_us += 1_000_000;
    let forged = (group.now_us - 1).to_le_bytes();
    for mut message in std::mem::take(&mut group.late).into_iter().filter(round) {
        let at = message.context.len() - 16;
        message.context[at..at + 8].copy_from_slice(&forged);
        group.step(follower, message);
    }
    assert_eq!(group.since_us(follower), before_us);
}

#[test]
fn what_came_with_the_last_look_at_the_clock_is_not_of_before_it() {
    let mut fresh = Freshness::default();
    fresh.note_echo(2, 70, 10);
    assert_eq!((fresh.echo(2, 10), fresh.echo(2, 11), fresh.echo(3, 11)), (0, 70, 0));
    fresh.note_echo(2, 80, 12);
    fresh.note_echo(2, 90, 12);
    assert_eq!((fresh.echo(2, 12), fresh.echo(2, 13)), (70, 90));
}

/// A group that sleeps, a follower of it, and its leader.
fn sleepers() -> (Group, u64, u64) {
    let mut group = Group::of(&[1, 2, 3]);
    group.sleeps = true;
    for _ in 0..40 {
        group.ticks(1);
        group.beat(100);
    }
    assert!(group.replicas.values().all(|one| one.replica.is_asleep()));
    let (leader, follower) = (group.leader().expect("a leader"), group.followers()[0]);
    (group, leader, follower)
}

#[test]
fn a_follower_that_sleeps_is_as_old_as_the_last_answer_to_its_beats() {
    let (mut group, _, follower) = sleepers();
    let asked_us = group.now_us;
    group.beat(3000);
    assert_eq!(group.since_us(follower), asked_us);
}

#[test]
fn a_leader_that_is_not_sure_any_more_wakes_who_relies_on_it() {
    let (mut group, leader, follower) = sleepers();
    let other = group.followers().into_iter().find(|id| *id != follower).expect("three");
    group.apart.insert(other);
    let last_us = group.now_us;
    // What the leader hears from its followers is lost, and it answers one of them all the same.
    for _ in 0..10 {
        group.now_us += 100_000;
        let (sent_us, now) = (group.now_us - 10, group.now());
        group.replicas.get_mut(&leader).expect("there").replica.vouch(now);
        group.carry_signals();
        let node = group.replicas.get_mut(&follower).expect("there");
        node.replica.beat_answered(now, leader, sent_us);
    }
    assert!(!group.replicas[&follower].replica.is_asleep());
    assert!(group.since_us(follower) < last_us + 600_000, "the others may have elected another");
}

#[test]
fn whoever_sleeps_is_told_when_there_is_something_new() {
    let (mut group, leader, follower) = sleepers();
    group.slow.insert(follower);
    assert!(group.put("k", "v").is_some());
    let acknowledged_us = group.now_us;
    group.carry_signals();
    assert!(!group.replicas[&follower].replica.is_asleep(), "though no entry has come");
    group.now_us += 50_000;
    let now = group.now();
    let node = group.replicas.get_mut(&follower).expect("there");
    node.replica.beat_answered(now, leader, now.us - 10);
    assert_eq!(node.replica.revision(), 0);
    assert!(group.since_us(follower) <= acknowledged_us);
}

#[test]
fn a_learner_that_hears_nothing_forgets_its_leader() {
    let mut group = Group::of(&[1, 2, 3]);
    let leader = group.leader().expect("a leader");
    let mut beginning = SnapshotMeta::founding(vec![1, 2, 3]);
    beginning.members.learners.push(4);
    group.replicas.insert(4, node(4, beginning, false));
    let mut heartbeat = Message { from: leader, to: 4, term: 9, ..Message::default() };
    heartbeat.set_msg_type(MessageType::MsgHeartbeat);
    group.step(4, heartbeat);
    assert_eq!(group.replicas[&4].replica.leader(), leader);
    group.cut.insert(4);
    group.ticks(40);
    assert_eq!(group.replicas[&4].replica.leader(), 0);
}

#[test]
fn a_view_without_a_replica_tells_no_age() {
    let view = View::default();
    assert_eq!(view.staleness(50), (0, None));
    view.set_revision(7);
    view.set_fresh(40);
    assert_eq!(view.staleness(50), (7, Some(10)));
    view.set_lease(60);
    assert_eq!(view.staleness(50), (7, Some(0)));
    assert!(view.is_here());
    view.clear();
    assert!(!view.is_here());
    assert_eq!(view.staleness(50), (0, None));
}
