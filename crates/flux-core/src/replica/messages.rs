//! What peers send, and when this replica stands for election.
//!
//! Raft trusts its messages; whatever arrives here is looked at first, because bytes of a peer must not
//! end the process. What cannot be right is dropped: Raft loses messages anyway.

use prost_of_raft::Message as _;
use raft::eraftpb::{Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, StateRole};

use super::lease::RoundMark;
use super::{Now, Replica, ReplicaConfig};
use crate::PartitionId;

/// Appends a message as it travels to a peer.
pub fn encode_message(message: &Message, out: &mut Vec<u8>) {
    message.encode(out).expect("a vector has room");
}

/// The opposite of `encode_message`; `None` for other bytes.
pub fn decode_message(bytes: &[u8]) -> Option<Message> {
    Message::decode(bytes).ok()
}

/// The term in which a group is founded.
const FOUNDING_TERM: u64 = 1;
/// Ticks until the replica stands for election that should lead a new group: links are opened meanwhile.
const FIRST_STAND_TICKS: usize = 2;

/// When to stand for election, and when not to vote.
#[derive(Debug)]
pub(super) struct Election {
    election_ticks: usize,
    pub(super) heartbeat_ticks: u64,
    seed: u64,
    /// Elections this replica has tried to start.
    attempts: u64,
    /// Which of the voters this one is, in an order that differs from group to group.
    rank: usize,
    /// Ticks for which it keeps its vote after a start: it may have promised it before.
    silent_ticks: usize,
}

impl Election {
    pub(super) fn new(config: &ReplicaConfig, promised: bool) -> Election {
        Election {
            election_ticks: config.election_ticks,
            heartbeat_ticks: config.heartbeat_ticks.max(1) as u64,
            seed: mix(config.seed ^ mix(config.id) ^ mix(u64::from(config.partition.0) + 1)),
            attempts: 0,
            rank: 0,
            silent_ticks: if promised { config.election_ticks } else { 0 },
        }
    }

    pub(super) fn election_ticks(&self) -> usize {
        self.election_ticks
    }

    /// Whether it may have promised its vote before it started.
    fn promised(&self) -> bool {
        self.silent_ticks > 0
    }

    /// By how much timeouts differ, at most.
    pub(super) fn jitter_ticks(&self) -> usize {
        (self.election_ticks / 2).max(1)
    }

    /// How long this replica waits for its leader. Each voter of a group waits for another time, so that
    /// the first one to stand is elected before the next one stands.
    fn timeout(&self) -> usize {
        // One tick more than the least: those asked for their vote must not feel bound to the old leader.
        self.election_ticks + 1 + (self.rank * 2).min(self.jitter_ticks())
    }

    /// Takes in who votes.
    pub(super) fn rank_among(&mut self, partition: PartitionId, id: u64, voters: &[u64]) {
        let place = |voter: &u64| mix(*voter ^ mix(u64::from(partition.0)));
        let own = place(&id);
        self.rank = voters.iter().filter(|voter| place(voter) < own).count();
    }
}

/// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl<W> Replica<W> {
    /// The voters have changed.
    pub(super) fn rank_anew(&mut self) {
        let voters = self.node.store().members().voters.clone();
        self.election.rank_among(self.partition, self.id, &voters);
    }

    /// Takes a message of a peer. One that makes no sense is dropped.
    pub fn step(&mut self, now: Now, mut message: Message) {
        self.now = now;
        if !self.accepts(&mut message) {
            return;
        }
        let from_leader =
            matches!(message.msg_type(), MessageType::MsgHeartbeat | MessageType::MsgAppend);
        let tail = self.take_tail(&mut message);
        let round = RoundMark::decode(&message.context).zip(tail);
        let (from, term) = (message.from, message.term);
        self.note_heard(from);
        let quiet = matches!(
            message.msg_type(),
            MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse
        );
        let leader_before = self.node.raft.leader_id;
        let asks_for_vote = matches!(
            message.msg_type(),
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote
        );
        // A vote is refused while the leader's node is heard of: nothing has happened to a sleeper.
        if !quiet && !asks_for_vote {
            self.stir();
        }
        let stood = matches!(self.node.raft.state, StateRole::PreCandidate | StateRole::Candidate);
        // An error says that the sender is no member, or that Raft dropped it.
        let _ = self.node.step(message);
        if stood && self.node.raft.state == StateRole::Follower && self.node.raft.leader_id == 0 {
            self.stand_again_soon();
        }
        let raft = &self.node.raft;
        if raft.leader_id != leader_before || (from_leader && self.is_asleep()) {
            self.stir();
        }
        let raft = &self.node.raft;
        if let Some((mark, tail)) = round
            && raft.leader_id == from
            && raft.term == term
        {
            self.heard_round(&mark, tail);
        }
        self.settle();
    }

    /// Whether Raft can be given a message. Makes a commit index harmless that the log here does not reach.
    fn accepts(&self, message: &mut Message) -> bool {
        let raft = &self.node.raft;
        let last = raft.raft_log.last_index();
        let to_me = message.to == self.id && message.from != 0 && message.from != self.id;
        if !to_me || message.term == 0 || self.restoring.is_some() {
            return false;
        }
        let forced = message.context == CAMPAIGN_TRANSFER;
        match message.msg_type() {
            MessageType::MsgHeartbeat => {
                // A log that lost its end with the power (`everysec`, `no`) is shorter than was told.
                message.commit = message.commit.min(last);
                true
            }
            MessageType::MsgAppend => self.continues(message),
            MessageType::MsgAppendResponse => message.index <= last || message.reject,
            // A replica that has nothing yet may have been another one that had promised its vote.
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
                !self.members().voters.is_empty() && (forced || self.election.silent_ticks == 0)
            }
            MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVoteResponse
            | MessageType::MsgTimeoutNow => true,
            // Snapshots come through `install`; the rest concerns a replica itself.
            _ => false,
        }
    }

    /// Whether entries follow each other, are of no later term than their leader's, and replace nothing
    /// that is committed.
    fn continues(&self, message: &Message) -> bool {
        let log = &self.node.raft.raft_log;
        let mut term = message.log_term;
        (message.index + 1..).zip(&message.entries).all(|(index, entry)| {
            let follows = entry.index == index && entry.term >= term && entry.term <= message.term;
            term = entry.term;
            let applied = index <= self.applied.index;
            let kept = index > log.committed
                || applied
                || log.term(index).is_ok_and(|known| known == entry.term);
            follows && kept && (0..=2).contains(&entry.entry_type)
        })
    }

    /// Raft's own tick. Who failed to be elected tries again soon: nothing is lost by asking.
    pub(super) fn tick_election(&mut self) {
        self.election.silent_ticks = self.election.silent_ticks.saturating_sub(1);
        let campaigned = self.node.tick();
        let timeout = self.election.timeout();
        let raft = &mut self.node.raft;
        let silent = raft.state == StateRole::Follower && raft.election_elapsed > timeout;
        if silent && !raft.promotable() && raft.leader_id != 0 {
            // Who has no vote does not stand, and would believe in its leader for ever. It must find out, if
            // its group has gone on without it.
            raft.become_follower(raft.term, 0);
        }
        let state = self.node.raft.state;
        if campaigned && matches!(state, StateRole::PreCandidate | StateRole::Candidate) {
            self.stand_again_soon();
        }
    }

    /// This replica should lead. In a group that nobody has led yet it stands for election at once, and so
    /// need not be made leader later: nobody can have promised a vote to another.
    pub fn stand_first(&mut self) {
        let raft = &mut self.node.raft;
        if raft.term <= FOUNDING_TERM && raft.leader_id == 0 && !self.election.promised() {
            raft.election_elapsed =
                raft.randomized_election_timeout().saturating_sub(FIRST_STAND_TICKS);
        }
    }

    /// Nobody leads: the next attempt need not wait for a whole timeout. It waits for a time of its own, so
    /// that two do not stand against each other again.
    fn stand_again_soon(&mut self) {
        self.election.attempts += 1;
        self.draw_timeout();
        let spread = (self.election.election_ticks / 2).max(1);
        let pause = 2 + mix(self.election.seed ^ self.election.attempts) as usize % spread;
        let timeout = self.node.raft.randomized_election_timeout();
        self.node.raft.election_elapsed = timeout.saturating_sub(pause);
    }

    /// Puts a timeout of our own in the place of each that Raft has drawn from ambient randomness.
    pub(super) fn draw_timeout(&mut self) {
        let timeout = self.election.timeout();
        self.node.raft.set_randomized_election_timeout(timeout);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_journey_and_junk_does_not() {
        let message = Message { to: 3, from: 4, term: 7, ..Message::default() };
        let mut bytes = Vec::new();
        encode_message(&message, &mut bytes);
        assert_eq!(decode_message(&bytes), Some(message));
        assert_eq!(decode_message(&[0xff; 9]), None);
    }
}
