//! How a leader knows that it still is one: rounds of heartbeats that a quorum answers.
//!
//! A round that a quorum answered proves that nobody else led when it began. So a reply that was made
//! before it began may be sent (ReadIndex, section 6.4 of the Raft dissertation), and, since none of
//! those who answered will vote for another within an election timeout, reads need no round of their own
//! until that has passed on a clock that may be slow by the drift bound (section 6.4.1).
//!
//! What has to hold for the lease: a follower refuses its vote for `election_ticks` ticks after it heard
//! from its leader, and for as long after it started, since it does not remember whom it heard
//! (`messages`); and a leader that asked another to take over gives its lease up for the rest of its
//! term, because a vote for that one needs no timeout.

use std::collections::VecDeque;

use raft::StateRole;

use super::{Replica, ReplicaConfig, Replies};
use crate::{Error, Reply};

/// A replica's rounds of heartbeats and what they prove.
#[derive(Debug)]
pub(super) struct Rounds<W> {
    /// How long a lease lasts from the beginning of its round.
    lease_us: u64,
    /// The number of the last round that began.
    begun: u64,
    /// The number of the last one that a quorum answered.
    pub(super) confirmed: u64,
    /// Until when reads need no round.
    pub(super) lease_until_us: u64,
    /// The term in which leadership was offered to another replica, and no lease is taken any more.
    given_up_in: u64,
    /// Replies that wait for the round of their number.
    waiting: VecDeque<(u64, W, Reply)>,
    waiting_bytes: usize,
}

impl<W> Rounds<W> {
    pub(super) fn new(config: &ReplicaConfig) -> Rounds<W> {
        // A follower's first tick may come right after it heard from the leader.
        let promise_us = config.election_ticks.saturating_sub(1) as u64 * config.tick_us;
        let drift = u64::from(config.drift_percent.min(99));
        Rounds {
            lease_us: promise_us * (100 - drift) / (100 + drift),
            begun: 0,
            confirmed: 0,
            lease_until_us: 0,
            given_up_in: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
        }
    }

    /// No lease from here on, in this term.
    pub(super) fn give_up_lease(&mut self, term: u64) {
        self.given_up_in = term;
        self.lease_until_us = 0;
    }

    /// Notes that a quorum heard from this leader at this time or later.
    pub(super) fn extend_lease(&mut self, term: u64, from_us: u64) {
        if self.given_up_in != term {
            self.lease_until_us = self.lease_until_us.max(from_us + self.lease_us);
        }
    }

    /// Takes back all that was proved, and what waits for more.
    pub(super) fn stop(&mut self) -> impl Iterator<Item = (W, Reply)> {
        self.lease_until_us = 0;
        self.confirmed = self.begun;
        self.waiting_bytes = 0;
        let refused = |(_, waiter, _)| (waiter, Reply::Error(Error::NotLeader));
        std::mem::take(&mut self.waiting).into_iter().map(refused)
    }

    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a reply waits for a round that has not begun.
    pub(super) fn is_asked_for(&self) -> bool {
        self.waiting.back().is_some_and(|(round, ..)| *round > self.begun)
    }
}

/// What a heartbeat of a round carries, for those who answer to send back.
pub(super) struct RoundMark {
    pub(super) number: u64,
    pub(super) term: u64,
    begun_us: u64,
    /// What was committed when it began.
    pub(super) commit: u64,
}

impl RoundMark {
    fn encode(&self) -> Vec<u8> {
        let words = [self.number, self.term, self.begun_us, self.commit];
        words.iter().flat_map(|one| one.to_le_bytes()).collect()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<RoundMark> {
        let (&[number, term, begun_us, commit], []) = bytes.as_chunks::<8>() else { return None };
        let words = [number, term, begun_us, commit].map(u64::from_le_bytes);
        let [number, term, begun_us, commit] = words;
        Some(RoundMark { number, term, begun_us, commit })
    }
}

impl<W> Replica<W> {
    /// Whether a reply from the table may be sent at once.
    pub(super) fn has_lease(&self) -> bool {
        self.is_alone() || self.now.us < self.rounds.lease_until_us
    }

    /// Keeps a reply that was made from the table until it is proved that nobody else led meanwhile.
    pub(super) fn confirm_later(&mut self, waiter: W, reply: Reply) -> Option<(W, Reply)> {
        self.stir();
        let rounds = &mut self.rounds;
        let bytes = rounds.waiting_bytes + reply.value_bytes();
        if bytes > crate::MAX_REPLY_BYTES || rounds.waiting.len() >= super::MAX_WAITING_READS {
            return Some((waiter, Reply::Error(Error::Overloaded)));
        }
        rounds.waiting_bytes = bytes;
        rounds.waiting.push_back((rounds.begun + 1, waiter, reply));
        None
    }

    /// Begins a round: asks all others whether they still follow.
    pub(super) fn begin_round(&mut self) {
        if self.node.raft.state != StateRole::Leader {
            return;
        }
        if !self.node.raft.commit_to_current_term() {
            // Raft confirms no reads yet; followers must hear of their leader all the same.
            return self.node.ping();
        }
        self.rounds.begun += 1;
        let commit = self.node.raft.raft_log.committed;
        let (number, term) = (self.rounds.begun, self.node.raft.term);
        let mark = RoundMark { number, term, begun_us: self.now.us, commit };
        let context = mark.encode();
        self.node.read_index(context.clone());
        self.echo_stamps(number, &context);
    }

    /// Takes note of a round that a quorum has answered.
    pub(super) fn confirm(&mut self, context: &[u8]) {
        let Some(mark) = RoundMark::decode(context) else { return };
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader || raft.term != mark.term {
            return;
        }
        self.rounds.confirmed = self.rounds.confirmed.max(mark.number);
        self.rounds.extend_lease(self.node.raft.term, mark.begun_us);
        if self.leads {
            // Without a lease, too, its table had all that was acknowledged when the round began.
            self.view.set_fresh(mark.begun_us);
        }
    }

    /// Sends the replies that waited for a round which has been confirmed.
    pub(super) fn release_confirmed(&mut self, replies: &mut Replies<W>) {
        if !self.leads {
            return;
        }
        let rounds = &mut self.rounds;
        while rounds.waiting.front().is_some_and(|(round, ..)| *round <= rounds.confirmed) {
            let Some((_, waiter, reply)) = rounds.waiting.pop_front() else { return };
            rounds.waiting_bytes -= reply.value_bytes();
            replies.push((waiter, reply));
        }
    }
}
