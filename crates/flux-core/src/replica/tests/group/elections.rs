//! Elections, leases and hand-overs: what a group acknowledges stays, whoever leads it, and nothing that a
//! peer sends ends a replica.

use super::*;
use crate::Value;
use crate::session::Once;

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
fn a_write_that_is_repeated_after_a_failover_takes_effect_once() {
    let mut group = Group::of(&[1, 2, 3]);
    let once = Once { session: 9, sequence: 1, acked_below: 1 };
    let add = Command::Increment { key: b"n".as_slice(), delta: 5 };
    let ask = |group: &mut Group, id: u64, waiter: u32| {
        let now = group.now();
        let node = group.replicas.get_mut(&id).expect("there");
        node.replies.extend(node.replica.execute(
            now,
            &add,
            &Meta { once: Some(&once), trace: None },
            waiter,
        ));
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
        asleep.replica.execute(now, &get("k"), &Meta::default(), 77),
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
    assert_eq!(
        sleeper.replica.execute(now, &set(b"a", b"1", Expiry::Never), &Meta::default(), 76),
        None
    );
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
        assert_eq!(sleeper.replica.execute(now, &command, &Meta::default(), waiter), None);
    }
    sleeper.replica.propose(&mut sleeper.replies);
    late.iter().for_each(|message| sleeper.replica.step(now, message.clone()));
    while let Some(ready) = sleeper.replica.ready(&mut sleeper.replies).expect("sound") {
        sleeper.replica.persisted(ready.number);
    }
    let answered: Vec<u32> = sleeper.replies.iter().map(|(waiter, _)| *waiter).collect();
    assert_eq!(answered, [76], "the write is committed, and nothing is known of the reads");
    // Nor are reads that are proposed only after all that they waited for was applied.
    let waiter =
        sleeper.replica.execute(now, &set(b"a", b"2", Expiry::Never), &Meta::default(), 79);
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
