//! How a follower knows what it may lack at most.
//!
//! That a message came proves little: it may have been under way for long, and its sender may be a leader
//! no more. So a follower writes its clock, a stamp, into each answer to a heartbeat, and the leader's next
//! round of heartbeats brings the newest stamp back, beside what was committed when the round began. If
//! nobody else led then, that covers all that was acknowledged before the stamp was made, since a leader
//! begins rounds only when an entry of its own term is committed, and with it all that earlier leaders
//! acknowledged. A leader with a lease is sure at once, and says so; any other says so later, when a quorum
//! has answered the round. A follower that has applied as much lacks nothing from before the stamp, by its
//! own clock, however long messages were under way.
//!
//! A replica that is the only voter begins no rounds: its learners are not known to be up to date.

use std::collections::VecDeque;

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use super::Replica;
use super::lease::RoundMark;

/// Stamps that are remembered, and claims that wait.
const KEPT: usize = 16;
/// The bytes that a stamp adds to an answer.
const STAMP_BYTES: usize = 8;
/// The bytes that a stamp brought back, and the last round that is proved, add to a heartbeat.
const TAIL_BYTES: usize = 16;

/// The last times at which this process wrote its clock into something, in microseconds of that clock. What
/// comes back and is none of them was written by another process, whose clock means nothing here.
#[derive(Debug, Default)]
pub struct Stamps(VecDeque<u64>);

impl Stamps {
    /// Remembers a time, and forgets the oldest of many.
    pub fn note(&mut self, us: u64) {
        if self.0.back() == Some(&us) {
            return;
        }
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(us);
    }

    /// Whether it is one of the last times.
    pub fn contains(&self, us: u64) -> bool {
        self.0.contains(&us)
    }
}

/// What a leader says of a follower's table.
#[derive(Debug)]
struct Claim {
    /// It holds when this round is proved, and
    round: u64,
    /// up to here is applied: then
    commit: u64,
    /// nothing is lacking that was acknowledged before this.
    since_us: u64,
}

/// The last stamp that a follower sent.
#[derive(Debug)]
struct Echo {
    replica: u64,
    stamp: u64,
    /// What the leader's clock showed.
    at_us: u64,
    /// The last stamp before.
    earlier: u64,
}

/// What a replica knows of how up to date it is, and what it tells others.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    stamps: Stamps,
    /// What a leader said that is not proved or not applied yet, by rounds.
    claims: VecDeque<Claim>,
    /// The term of those, and the last round of it that is proved.
    term: u64,
    proved: u64,
    /// What followers stamped.
    echoes: Vec<Echo>,
}

impl Freshness {
    fn claim(&mut self, mark: &RoundMark, since_us: u64, proved: u64) {
        if mark.term != self.term {
            self.claims.clear();
            (self.term, self.proved) = (mark.term, 0);
        }
        self.proved = self.proved.max(proved);
        // The oldest claims stay, else one that never catches up quite would never learn how far it is.
        let is_new = self.claims.back().is_none_or(|last| last.round < mark.number);
        if is_new && self.claims.len() < KEPT && self.stamps.contains(since_us) {
            let (round, commit) = (mark.number, mark.commit);
            self.claims.push_back(Claim { round, commit, since_us });
        }
    }

    /// Since when nothing may be lacking, if more is known of it than before.
    pub(super) fn since(&mut self, applied: u64) -> Option<u64> {
        let mut since_us = None;
        while let Some(claim) = self.claims.front()
            && claim.round <= self.proved
            && claim.commit <= applied
        {
            since_us = since_us.max(Some(claim.since_us));
            self.claims.pop_front();
        }
        since_us
    }

    pub(super) fn note_echo(&mut self, replica: u64, stamp: u64, now_us: u64) {
        let Some(echo) = self.echoes.iter_mut().find(|echo| echo.replica == replica) else {
            return self.echoes.push(Echo { replica, stamp, at_us: now_us, earlier: 0 });
        };
        if echo.at_us < now_us {
            (echo.at_us, echo.earlier) = (now_us, echo.stamp);
        }
        echo.stamp = stamp;
    }

    /// The last stamp of a replica that surely came before this moment: the process may have been stopped
    /// between a look at the clock and what came then.
    pub(super) fn echo(&self, replica: u64, now_us: u64) -> u64 {
        let echo = self.echoes.iter().find(|echo| echo.replica == replica);
        echo.map_or(0, |echo| if echo.at_us < now_us { echo.stamp } else { echo.earlier })
    }
}

impl<W> Replica<W> {
    /// Adds to each heartbeat of a round that begins now what its receiver stamped last.
    pub(super) fn echo_stamps(&mut self, number: u64, context: &[u8]) {
        // A lease says that nobody else leads at this moment.
        let sure = self.now.us < self.rounds.lease_until_us;
        let proved = if sure { number } else { self.rounds.confirmed };
        let raft = &mut self.node.raft;
        let fresh = &mut self.fresh;
        fresh.echoes.retain(|echo| raft.prs().get(echo.replica).is_some());
        for message in &mut raft.msgs {
            if message.msg_type() == MessageType::MsgHeartbeat && message.context == context {
                message.context.extend(fresh.echo(message.to, self.now.us).to_le_bytes());
                message.context.extend(proved.to_le_bytes());
            }
        }
    }

    /// Takes away from a message what `fresh` adds to Raft's, which knows nothing of it. From a heartbeat:
    /// the stamp that it brings back and the last round that is proved.
    pub(super) fn take_tail(&mut self, message: &mut Message) -> Option<(u64, u64)> {
        let tail_bytes = match message.msg_type() {
            MessageType::MsgHeartbeat => TAIL_BYTES,
            MessageType::MsgHeartbeatResponse => STAMP_BYTES,
            _ => return None,
        };
        let mark_bytes = message.context.len().checked_sub(tail_bytes)?;
        RoundMark::decode(&message.context[..mark_bytes])?;
        let tail = message.context.split_off(mark_bytes);
        let (words, _) = tail.as_chunks::<8>();
        if let &[proved_us, round] = words {
            return Some((u64::from_le_bytes(proved_us), u64::from_le_bytes(round)));
        }
        let raft = &self.node.raft;
        let known = raft.state == StateRole::Leader && raft.prs().get(message.from).is_some();
        if let &[stamp] = words
            && known
            && raft.term == message.term
        {
            self.fresh.note_echo(message.from, u64::from_le_bytes(stamp), self.now.us);
        }
        None
    }

    /// Raft has taken a heartbeat of the leader: stamps the answer, and takes what the heartbeat claims.
    pub(super) fn heard_round(&mut self, mark: &RoundMark, tail: (u64, u64)) {
        let (leader, now_us) = (self.node.raft.leader_id, self.now.us);
        if let Some(answer) = self.node.raft.msgs.last_mut()
            && answer.msg_type() == MessageType::MsgHeartbeatResponse
            && answer.to == leader
            && RoundMark::decode(&answer.context).is_some()
        {
            answer.context.extend(now_us.to_le_bytes());
            self.fresh.stamps.note(now_us);
        }
        self.fresh.claim(mark, tail.0, tail.1);
    }
}
