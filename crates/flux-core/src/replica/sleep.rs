//! Quiet groups sleep: their replicas neither tick nor send heartbeats, so that a thousand of them cost
//! nothing.
//!
//! A leader whose followers all have everything, and to which nothing has happened for a while, asks them
//! to sleep, and sleeps when all have agreed. From then on the owner's beats between whole nodes stand for
//! the heartbeats of all sleeping groups: a beat that a follower's node has answered is as good as a
//! heartbeat that the follower has answered, since a sleeping follower keeps its promise not to vote for
//! another. A follower that wakes up tells its leader before its node answers another beat, and the owner
//! wakes the followers of a node that it has not heard of for long.
//!
//! A beat that the leader's node has answered tells sleeping followers, too, that they lack nothing from
//! before it was sent: for as long as a leader has not told those that it asked to sleep to wake up, it
//! surely leads, and nothing is committed that it had not when it asked. So the owner lets its replicas
//! `vouch` before it answers beats, and answers none where it could not send a `Wake`.
//!
//! Whatever happens to a group wakes it: a write, a message, a lost link, a change of members.

use raft::{ProgressState, StateRole};

use super::{Now, Replica};

/// Ticks without anything happening until a leader asks to sleep, and asks again.
const QUIET_TICKS: u64 = 20;

/// What replicas say to each other about sleeping, besides what Raft says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// A leader would sleep. Its log ends at `index`, and all of it is committed.
    Sleep {
        /// The leader's term.
        term: u64,
        /// Its last entry.
        index: u64,
    },
    /// The follower sleeps.
    Asleep {
        /// The term.
        term: u64,
    },
    /// The sender does not sleep any more.
    Wake {
        /// Its term.
        term: u64,
    },
}

/// Whether a replica sleeps, and what it knows of the others.
#[derive(Debug, Default)]
pub(super) struct Sleep {
    asleep: bool,
    /// A leader has asked the others to sleep, and some may do so.
    asked: bool,
    /// Ticks since something happened.
    quiet_ticks: u64,
    /// The others that sleep, and from when the last beat is that their nodes have answered.
    others: Vec<(u64, u64)>,
    signals: Vec<(u64, Signal)>,
}

impl<W> Replica<W> {
    /// Whether it sleeps: it needs no ticks.
    pub fn is_asleep(&self) -> bool {
        self.sleep.asleep
    }

    /// What is to be sent to other replicas. A `Wake` must be sent, or the link be broken, before a beat of
    /// that node is answered. `Sleep` is for nodes only whose beats this one answers.
    pub fn take_signals(&mut self) -> Vec<(u64, Signal)> {
        std::mem::take(&mut self.sleep.signals)
    }

    /// Something has happened to the group.
    pub fn wake(&mut self, now: Now) {
        self.now = now;
        self.sleep.quiet_ticks = 0;
        let (raft, me) = (&mut self.node.raft, self.id);
        let wake = Signal::Wake { term: raft.term };
        if std::mem::take(&mut self.sleep.asleep) {
            raft.election_elapsed = 0;
            let leader = Some(raft.leader_id).filter(|id| *id != 0 && *id != me);
            self.sleep.signals.extend(leader.map(|id| (id, wake)));
        }
        if std::mem::take(&mut self.sleep.asked) {
            let others = self.members().all().into_iter().filter(|id| *id != me);
            self.sleep.signals.extend(others.map(|id| (id, wake)).collect::<Vec<_>>());
        }
        self.sleep.others.clear();
    }

    /// A beat is about to be answered. A leader that is not sure to lead any more wakes those that sleep.
    pub fn vouch(&mut self, now: Now) {
        let sure = self.leads && now.us < self.rounds.lease_until_us;
        if self.sleep.asked && !sure {
            self.wake(now);
        }
    }

    /// The node of the leader has not been heard of for so many ticks.
    pub fn wake_from_silence(&mut self, now: Now, silent_ticks: usize) {
        if self.sleep.asleep {
            self.wake(now);
            self.node.raft.election_elapsed = silent_ticks.min(self.election.election_ticks() - 1);
        }
    }

    /// Takes a signal of another replica.
    pub fn signal(&mut self, now: Now, from: u64, signal: Signal) {
        self.now = now;
        let raft = &self.node.raft;
        let term = raft.term;
        match signal {
            Signal::Sleep { term: theirs, index } => {
                let log = &raft.raft_log;
                let same = theirs == term && raft.leader_id == from && log.last_index() == index;
                let done = log.committed == index && self.applied.index == index;
                let follows = raft.state == StateRole::Follower && self.restoring.is_none();
                if same && done && follows && log.persisted >= index {
                    self.sleep.asleep = true;
                    self.node.raft.election_elapsed = 0;
                    self.sleep.signals.push((from, Signal::Asleep { term }));
                }
            }
            Signal::Asleep { term: theirs } => {
                if theirs == term && self.is_quiet() {
                    self.sleep.others.retain(|(id, _)| *id != from);
                    self.sleep.others.push((from, 0));
                    let asleep = |id: &u64| self.sleep.others.iter().any(|(one, _)| one == id);
                    let me = self.id;
                    let mut others = self.members().all().into_iter().filter(|id| *id != me);
                    self.sleep.asleep = others.all(|id| asleep(&id));
                }
            }
            Signal::Wake { term: theirs } => {
                if theirs >= term {
                    self.wake(now);
                }
            }
        }
    }

    /// The node of another replica has answered a beat that this process sent at this time. Renews the lease
    /// of a leader that sleeps. A follower that sleeps is up to date if it is the leader's answer.
    pub fn beat_answered(&mut self, now: Now, from: u64, sent_us: u64) {
        if !self.sleep.asleep {
            return;
        }
        self.now = now;
        if !self.leads {
            if self.node.raft.leader_id == from {
                self.view.set_fresh(sent_us);
            }
            return;
        }
        let Some(other) = self.sleep.others.iter_mut().find(|(id, _)| *id == from) else { return };
        other.1 = other.1.max(sent_us);
        let others = self.sleep.others.clone();
        let answered = |since_us: u64| {
            let has = |id: u64| {
                id == self.id || others.iter().any(|(one, at)| *one == id && *at >= since_us)
            };
            self.members().has_quorum(has)
        };
        let confirmed = others.iter().map(|(_, at)| *at).filter(|at| answered(*at)).max();
        if let Some(since_us) = confirmed.filter(|since_us| *since_us > 0) {
            let term = self.node.raft.term;
            self.rounds.extend_lease(term, since_us);
            self.view.set_lease(self.rounds.lease_until_us);
            if self.has_lease() {
                self.view.set_fresh(self.now.us);
            }
        }
    }

    /// Counts a tick in which nothing happened, and asks to sleep after enough of them. True while asleep.
    pub(super) fn tick_sleep(&mut self) -> bool {
        if self.sleep.asleep {
            // A leader that nobody answers must find out what is the matter.
            if self.leads {
                self.vouch(self.now);
            }
            self.sleep.quiet_ticks += 1;
            return self.sleep.asleep;
        }
        self.sleep.quiet_ticks += 1;
        if self.sleep.quiet_ticks.is_multiple_of(QUIET_TICKS) && self.is_quiet() {
            let raft = &self.node.raft;
            let signal = Signal::Sleep { term: raft.term, index: raft.raft_log.last_index() };
            let others = self.members().all();
            let me = self.id;
            let signals = others.into_iter().filter(|id| *id != me).map(|id| (id, signal));
            self.sleep.others.clear();
            self.sleep.asked = true;
            self.sleep.signals.extend(signals);
        }
        false
    }

    /// Something other than a heartbeat.
    pub(super) fn stir(&mut self) {
        self.sleep.quiet_ticks = 0;
        if self.sleep.asleep | self.sleep.asked {
            self.wake(self.now);
        }
    }

    /// Whether a leader's group has nothing to do.
    fn is_quiet(&self) -> bool {
        let raft = &self.node.raft;
        let last = raft.raft_log.last_index();
        let done = self.applied.index == last && raft.raft_log.persisted == last;
        let caught_up = |(id, one): (&u64, &raft::Progress)| {
            *id == self.id
                || (one.matched == last
                    && one.recent_active
                    && one.state != ProgressState::Snapshot)
        };
        self.leads
            && self.has_lease()
            && done
            && self.in_flight.is_empty()
            && !self.rounds.is_waited_for()
            && !self.is_alone()
            && !self.members().is_joint()
            && raft.lead_transferee.is_none()
            && !raft.has_pending_conf()
            && raft.prs().iter().all(caught_up)
    }
}
