use flux_core::Condition;
use flux_core::session::Once;
use tokio::sync::oneshot;

use super::*;
use crate::mailbox::PeerRequest;

const HERE: PartitionId = PartitionId(3);

fn forwards() -> (Forwards, Instant) {
    (Forwards::new(5), Instant::now())
}

/// A waiter that tells nobody.
fn waiter() -> Waiter {
    Waiter::Task(oneshot::channel().0)
}

fn add(forwards: &mut Forwards, key: &str, write: bool, now: Instant) {
    let key = key.as_bytes();
    let command = match write {
        true => Command::DeleteIf { key, condition: Condition::Always },
        false => Command::Get { key },
    };
    forwards.add(HERE, &command, Ask::default(), waiter(), now).expect("there is room");
}

/// Sends what can be sent, and returns the ids.
fn sent(forwards: &mut Forwards, candidates: &[u32]) -> Vec<u64> {
    let mut ids = Vec::new();
    if forwards.node(HERE, None, candidates).is_some() {
        forwards.send(HERE, |id, _| {
            ids.push(id);
            true
        });
    }
    ids
}

fn refusal() -> Reply {
    Reply::Error(Error::NotLeader)
}

#[test]
fn ids_tell_worker_and_attempt() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "k", true, now);
    let ids = sent(&mut forwards, &[1]);
    assert_eq!(Forwards::worker_of(ids[0]), 5);
    assert_eq!(Forwards::partition_of(ids[0]), HERE);
    let decided = forwards.answered(ids[0], Reply::Integer(1)).expect("an answer");
    assert_eq!(decided.1, Reply::Integer(1));
    assert!(forwards.is_empty() && forwards.pending().is_empty());
    assert!(forwards.answered(ids[0], Reply::Integer(1)).is_none(), "once");
}

#[test]
fn after_a_refusal_all_go_to_the_next_node_in_their_order() {
    let (mut forwards, now) = forwards();
    for key in ["a", "b", "c"] {
        add(&mut forwards, key, true, now);
    }
    let first = sent(&mut forwards, &[1, 2]);
    assert_eq!(first.len(), 3);
    assert!(forwards.answered(first[1], refusal()).is_none());
    add(&mut forwards, "d", true, now);
    assert!(sent(&mut forwards, &[1, 2]).is_empty(), "not before all have come back");
    assert!(forwards.answered(first[0], refusal()).is_none());
    assert!(forwards.answered(first[2], refusal()).is_none());
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(2));
    let mut keys = Vec::new();
    let mut ids = Vec::new();
    forwards.send(HERE, |id, forward| {
        ids.push(id);
        keys.push(*forward.command.iter().rev().nth(1).expect("a key"));
        true
    });
    assert_eq!(keys, *b"abcd");
    assert_ne!(Forwards::attempt_of(ids[0]), Forwards::attempt_of(first[0]));
    forwards.answered(ids[0], refusal());
    for id in &ids[1..] {
        forwards.answered(*id, refusal());
    }
    assert_eq!(forwards.node(HERE, None, &[1, 2]), None, "each has refused");
    forwards.tick(now, &mut Vec::new());
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(1), "after a pause they are asked again");
}

#[test]
fn an_attempt_that_was_refused_never_comes_again() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "a", true, now);
    let refused = sent(&mut forwards, &[1, 2]);
    forwards.answered(refused[0], refusal());
    let taken = sent(&mut forwards, &[1, 2]);
    forwards.answered(taken[0], Reply::Integer(1));
    assert!(forwards.is_empty());
    add(&mut forwards, "b", true, now);
    let later = sent(&mut forwards, &[1, 2]);
    assert_ne!(Forwards::attempt_of(later[0]), Forwards::attempt_of(refused[0]));
}

#[test]
fn what_a_lost_node_had_is_unknown_for_writes_and_asked_again_for_reads() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "w", true, now);
    add(&mut forwards, "r", false, now);
    sent(&mut forwards, &[1]);
    let mut decided = Vec::new();
    forwards.lost(2, &mut decided);
    assert!(decided.is_empty(), "another node");
    forwards.lost(1, &mut decided);
    assert_eq!(decided.len(), 1);
    assert_eq!(decided[0].1, Reply::Error(Error::OutcomeUnknown));
    forwards.tick(now, &mut decided);
    assert_eq!(sent(&mut forwards, &[2]).len(), 1, "the read");
}

#[test]
fn a_write_that_may_have_been_carried_out_is_not_said_to_be_refused() {
    for refusal in [Error::Overloaded, Error::DiskFull, Error::LogFailed(String::new())] {
        let (mut forwards, now) = forwards();
        let once = Some(Once { session: 1, sequence: 1, acked_below: 1 });
        let command = Command::DeleteIf { key: b"w".as_slice(), condition: Condition::Always };
        let ask = Ask { once, ..Ask::default() };
        forwards.add(HERE, &command, ask, waiter(), now).expect("there is room");
        sent(&mut forwards, &[1]);
        forwards.lost(1, &mut Vec::new());
        forwards.tick(now, &mut Vec::new());
        let ids = sent(&mut forwards, &[2]);
        let decided = forwards.answered(ids[0], Reply::Error(refusal.clone())).expect("decided");
        assert_eq!(decided.1, Reply::Error(Error::OutcomeUnknown), "lost once, then {refusal:?}");

        add(&mut forwards, "w", true, now);
        let ids = sent(&mut forwards, &[2]);
        let decided = forwards.answered(ids[0], Reply::Error(refusal.clone())).expect("decided");
        assert_eq!(decided.1, Reply::Error(refusal), "sent only once");
    }
}

#[test]
fn who_waits_too_long_is_told_what_is_known() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "sent", true, now);
    sent(&mut forwards, &[1]);
    add(&mut forwards, "waits", true, now);
    let mut decided = Vec::new();
    forwards.tick(now + PATIENCE / 2, &mut decided);
    assert!(decided.is_empty());
    forwards.tick(now + PATIENCE, &mut decided);
    let replies: Vec<Reply> = decided.into_iter().map(|(_, reply)| reply).collect();
    let nobody = Error::NoLeader { partition: HERE.0, waited_ms: 5000 };
    assert_eq!(replies, [Reply::Error(Error::OutcomeUnknown), Reply::Error(nobody)]);
    assert!(forwards.is_empty());
}

#[test]
fn what_comes_back_and_goes_again_has_no_more_time() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "r", false, now);
    let back = forwards.take_home(HERE).pop().expect("it waits");
    let command = Command::Get { key: b"r".as_slice() };
    let later = now + PATIENCE / 2;
    forwards.add(HERE, &command, back.ask, back.waiter, later).expect("there is room");
    let mut decided = Vec::new();
    forwards.tick(now + PATIENCE, &mut decided);
    assert_eq!(decided.len(), 1, "its time is over");
}

#[test]
fn there_is_room_for_so_many() {
    let (mut forwards, now) = forwards();
    for _ in 0..MAX_COMMANDS {
        add(&mut forwards, "k", true, now);
    }
    let one_more = Command::Get { key: b"k".as_slice() };
    let refused = forwards.add(HERE, &one_more, Ask::default(), waiter(), now);
    assert!(matches!(refused, Err((_, Reply::Error(Error::Overloaded)))));
}

#[test]
fn a_leader_that_becomes_known_is_asked_before_the_pause_ends() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "k", true, now);
    for _ in 0..2 {
        let ids = sent(&mut forwards, &[1, 2]);
        forwards.answered(ids[0], refusal());
    }
    assert_eq!(forwards.node(HERE, None, &[1, 2]), None, "each has refused");
    assert_eq!(forwards.node(HERE, Some(2), &[2, 1]), Some(2));
    let ids = sent_there(&mut forwards);
    forwards.answered(ids[0], refusal());
    assert_eq!(forwards.node(HERE, Some(2), &[2, 1]), None, "the same one is no news");
}

#[test]
fn nothing_more_is_sent_to_a_node_once_another_leads() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "k", true, now);
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2]), Some(1));
    let ids = sent(&mut forwards, &[1, 2]);
    add(&mut forwards, "k", true, now);
    assert_eq!(forwards.node(HERE, Some(2), &[2, 1]), None, "it would be refused");
    forwards.answered(ids[0], refusal());
    assert_eq!(forwards.node(HERE, Some(2), &[2, 1]), Some(2));
}

#[test]
fn what_waits_for_a_hand_over_is_sent_back_and_the_rest_is_sent_on() {
    let (mut forwards, now) = forwards();
    let command = Command::Get { key: b"k".as_slice() };
    let asked_by = |id| Waiter::Peer(PeerRequest { node: 9, instance: 1, id });
    let redirect = Ask { redirect: true, ..Ask::default() };
    forwards.add(HERE, &command, redirect.clone(), asked_by(1), now).expect("there is room");
    add(&mut forwards, "k", true, now);
    forwards.add(HERE, &command, redirect, asked_by(2), now).expect("there is room");
    let back = forwards.take_redirects(HERE);
    let ids = back.iter().map(|waiter| match waiter {
        Waiter::Peer(request) => request.id,
        other => panic!("whose is {other:?}?"),
    });
    assert_eq!(ids.collect::<Vec<_>>(), [1, 2]);
    let ids = sent(&mut forwards, &[1]);
    assert_eq!(ids.len(), 1);
    forwards.answered(ids[0], Reply::Integer(1)).expect("an answer");
    assert!(forwards.is_empty() && !forwards.has(HERE));
}

#[test]
fn what_was_passed_on_and_refused_goes_back_to_the_node_that_asked() {
    let (mut forwards, now) = forwards();
    let command = Command::Get { key: b"k".as_slice() };
    let waiter = Waiter::Peer(PeerRequest { node: 9, instance: 1, id: 1 });
    forwards.add(HERE, &command, Ask::default(), waiter, now).expect("there is room");
    let ids = sent(&mut forwards, &[1, 2]);
    let (waiter, reply) = forwards.answered(ids[0], refusal()).expect("decided");
    assert!(matches!(waiter, Waiter::Peer(PeerRequest { node: 9, instance: 1, id: 1 })));
    assert_eq!(reply, refusal());
    assert!(forwards.is_empty() && !forwards.has(HERE));
}

#[test]
fn a_known_leader_that_refuses_is_asked_again_after_a_pause_and_nobody_else() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "a", true, now);
    let mut ids = Vec::new();
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2]), Some(1));
    forwards.send(HERE, |id, _| {
        ids.push(id);
        true
    });
    assert!(forwards.answered(ids[0], refusal()).is_none());
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2]), None, "another knows no better");
    assert_eq!(forwards.node(HERE, Some(2), &[2, 1]), Some(2), "the next leader is known");
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2]), Some(1));
    forwards.send(HERE, |id, _| {
        ids.push(id);
        true
    });
    assert!(forwards.answered(ids[1], refusal()).is_none());
    forwards.tick(now, &mut Vec::new());
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2]), Some(1), "after a pause");
}

#[test]
fn what_came_back_keeps_its_order_when_a_link_takes_none_of_it() {
    let (mut forwards, now) = forwards();
    for key in ["a", "b", "c"] {
        add(&mut forwards, key, true, now);
    }
    for id in sent(&mut forwards, &[1, 2]) {
        forwards.answered(id, refusal());
    }
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(2));
    forwards.send(HERE, |_, _| false);
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(2));
    let mut keys = Vec::new();
    forwards.send(HERE, |_, forward| {
        keys.push(*forward.command.iter().rev().nth(1).expect("a key"));
        true
    });
    assert_eq!(keys, *b"abc");
}

#[test]
fn what_waits_behind_a_refused_command_of_a_peer_is_refused_with_it() {
    let (mut forwards, now) = forwards();
    let attempt = |number: u64, attempt: u64| attempt << COUNTER_BITS | number;
    let mut asked_by = |node, id, key: &str| {
        let waiter = Waiter::Peer(PeerRequest { node, instance: 1, id });
        let command = Command::Get { key: key.as_bytes() };
        forwards.add(HERE, &command, Ask::default(), waiter, now).expect("there is room");
    };
    asked_by(9, attempt(1, 7), "same");
    asked_by(9, attempt(2, 7), "same");
    asked_by(9, attempt(3, 8), "another attempt");
    asked_by(8, attempt(4, 7), "another node");
    let refused = forwards.take_refused(HERE, 9, 7);
    let ids: Vec<u64> = refused
        .iter()
        .map(|waiter| match waiter {
            Waiter::Peer(peer) => peer.id,
            other => panic!("not of a peer: {other:?}"),
        })
        .collect();
    assert_eq!(ids, [attempt(1, 7), attempt(2, 7)]);
    assert_eq!(sent(&mut forwards, &[1]).len(), 2, "the others wait as before");
}

#[test]
fn where_no_leader_is_known_one_after_the_other_is_asked_whoever_led_before() {
    let (mut forwards, now) = forwards();
    add(&mut forwards, "a", true, now);
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2, 3]), Some(1));
    let ids = sent_there(&mut forwards);
    assert!(forwards.answered(ids[0], refusal()).is_none());
    assert_eq!(forwards.node(HERE, Some(1), &[1, 2, 3]), None);
    for node in [1, 2, 3] {
        assert_eq!(forwards.node(HERE, None, &[1, 2, 3]), Some(node));
        let ids = sent_there(&mut forwards);
        assert!(forwards.answered(ids[0], refusal()).is_none());
    }
    assert_eq!(forwards.node(HERE, None, &[1, 2, 3]), None, "each has refused");
}

#[test]
fn what_came_back_keeps_its_order_when_a_link_takes_some_of_it() {
    let (mut forwards, now) = forwards();
    for key in ["a", "b", "c"] {
        add(&mut forwards, key, true, now);
    }
    for id in sent(&mut forwards, &[1, 2]) {
        forwards.answered(id, refusal());
    }
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(2));
    let mut taken = Vec::new();
    forwards.send(HERE, |id, _| {
        taken.push(id);
        taken.len() == 1
    });
    forwards.answered(taken[0], refusal());
    forwards.tick(now, &mut Vec::new());
    assert_eq!(forwards.node(HERE, None, &[1, 2]), Some(1));
    let mut keys = Vec::new();
    forwards.send(HERE, |_, forward| {
        keys.push(*forward.command.iter().rev().nth(1).expect("a key"));
        true
    });
    assert_eq!(keys, *b"abc");
}

/// Sends what can be sent to the node that was chosen last, and returns the ids.
fn sent_there(forwards: &mut Forwards) -> Vec<u64> {
    let mut ids = Vec::new();
    forwards.send(HERE, |id, _| {
        ids.push(id);
        true
    });
    ids
}
