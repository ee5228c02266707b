//! Commands for partitions that another node leads, or nobody for the moment.
//!
//! They are sent to the leader over the link of this worker, and what comes back is passed on as if it had
//! been carried out here. Commands of one partition take effect in the order they came. So they all go to
//! one node at a time; when it refuses one, because it does not lead, it refuses those behind it too (they
//! have the number of the same attempt in their ids), and all of them are sent again, to the next node.
//!
//! A node that the leader's cannot be reached from asks another one to pass its commands on, once.
//!
//! Nothing here is carried out twice: what was sent to a node that is gone has an unknown outcome, unless
//! it is a read, or a write of a session.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use flux_core::{Command, Error, PartitionId, Reply};

use crate::forward_codec::encode_command;
use crate::mailbox::{Ask, Waiter};

/// Commands of one worker that may be on their way.
const MAX_COMMANDS: usize = 16 * 1024;
/// Their bytes.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// The id of a command: worker, partition, attempt, number.
const PARTITION_BITS: u32 = 14;
const ATTEMPT_BITS: u32 = 10;
const COUNTER_BITS: u32 = 30;
/// How long a command is kept, when the client gave no time.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A command on its way.
#[derive(Debug)]
pub(super) struct Forward {
    pub(super) command: Vec<u8>,
    pub(super) is_write: bool,
    pub(super) ask: Ask,
    pub(super) waiter: Waiter,
    deadline: Instant,
    /// How long it waits.
    patience: Duration,
    /// It was with a node that is gone, and may have been carried out there.
    maybe_done: bool,
}

impl Forward {
    /// How much time is left.
    pub(super) fn left_ms(&self, now: Instant) -> u32 {
        let left = self.deadline.saturating_duration_since(now).as_millis();
        u32::try_from(left).unwrap_or(u32::MAX).max(1)
    }

    /// What to answer when there is no time left.
    pub(super) fn given_up(&self, partition: PartitionId, sent: bool) -> Error {
        if self.is_unsure() || self.is_write && sent {
            return Error::OutcomeUnknown;
        }
        Error::NoLeader { partition: partition.0, waited_ms: self.patience.as_millis() as u64 }
    }

    /// A write that may have been carried out before: no error says that it was not.
    pub(super) fn is_unsure(&self) -> bool {
        self.is_write && self.maybe_done
    }
}

/// Until when somebody is looked for who carries a command out. It stays the same however often the command
/// comes back.
pub(super) fn deadline(ask: &Ask, now: Instant) -> Instant {
    let patience = ask.patience.map_or(PATIENCE, |patience| patience.min(PATIENCE));
    ask.deadline.unwrap_or(now + patience)
}

/// The way to one partition.
#[derive(Debug, Default)]
struct Route {
    /// Where commands go; none while nobody is known.
    node: Option<u32>,
    /// The leader that was known when it was last looked for somebody to send them to.
    leader: Option<u32>,
    /// How many nodes have refused since the last pause.
    refused: usize,
    /// A node has refused: nothing is sent until all that was sent has come back.
    stalled: bool,
    /// Commands go to the known leader, not to one that may lead.
    asks_leader: bool,
    /// The known leader was the one that refused, as one does that was just elected: nobody knows better, so
    /// nothing is sent before the next pause, or until something else is known.
    waits_for_leader: bool,
    /// Sent and not answered.
    sent: BTreeMap<u64, Forward>,
    /// Came back, to be sent again before what waits.
    returned: BTreeMap<u64, Forward>,
    waiting: VecDeque<Forward>,
    /// Some of those that wait may be for `take_redirects`.
    redirects: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    worker: u16,
    next: u64,
    routes: BTreeMap<PartitionId, Route>,
    /// The number of each partition's attempt, in the ids of what is sent. It outlives the route: a node
    /// that has refused an attempt refuses all that comes of it.
    attempts: BTreeMap<PartitionId, u16>,
    count: usize,
    bytes: usize,
}

/// What is to be done with a command that came back.
pub(super) type Decided = (Waiter, Reply);

impl Forwards {
    pub(super) fn new(worker: u16) -> Forwards {
        Forwards { worker, ..Forwards::default() }
    }

    /// The worker that an id was made by.
    pub(super) fn worker_of(id: u64) -> u16 {
        (id >> (PARTITION_BITS + ATTEMPT_BITS + COUNTER_BITS)) as u16
    }

    /// The attempt that an id belongs to: with its worker and partition.
    pub(super) fn attempt_of(id: u64) -> u64 {
        id >> COUNTER_BITS
    }

    /// What an attempt is one of: worker and partition.
    pub(super) fn route_of(id: u64) -> u64 {
        id >> (ATTEMPT_BITS + COUNTER_BITS)
    }

    pub(super) fn partition_of(id: u64) -> PartitionId {
        PartitionId((id >> (ATTEMPT_BITS + COUNTER_BITS)) as u16 & ((1 << PARTITION_BITS) - 1))
    }

    /// Takes a command; refuses it when there are too many.
    pub(super) fn add(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        waiter: Waiter,
        now: Instant,
    ) -> Result<(), Decided> {
        let mut bytes = Vec::new();
        if self.count >= MAX_COMMANDS || self.bytes >= MAX_BYTES {
            return Err((waiter, Reply::Error(Error::Overloaded)));
        }
        if encode_command(command, &mut bytes).is_err() {
            return Err((waiter, Reply::Error(Error::WriteTooLarge(bytes.len()))));
        }
        self.count += 1;
        self.bytes += bytes.len();
        let is_write = command.is_write();
        let patience = ask.patience.map_or(PATIENCE, |patience| patience.min(PATIENCE));
        let deadline = deadline(&ask, now);
        let (redirects, ask) = (ask.redirect, Ask { deadline: Some(deadline), ..ask });
        let forward = Forward {
            command: bytes,
            is_write,
            ask,
            waiter,
            deadline,
            patience,
            maybe_done: false,
        };
        let route = self.routes.entry(partition).or_default();
        route.redirects |= redirects;
        route.waiting.push_back(forward);
        Ok(())
    }

    /// The partitions with commands to be sent.
    pub(super) fn pending(&self) -> Vec<PartitionId> {
        let pending = |(_, route): &(&PartitionId, &Route)| {
            !route.stalled && (!route.waiting.is_empty() || !route.returned.is_empty())
        };
        self.routes.iter().filter(pending).map(|(partition, _)| *partition).collect()
    }

    /// Whether commands of a partition are on their way or wait: later ones must not overtake them.
    pub(super) fn has(&self, partition: PartitionId) -> bool {
        self.count > 0 && self.routes.contains_key(&partition)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes the commands that can be carried out here, now that this node leads; none while some are with
    /// another node.
    pub(super) fn take_home(&mut self, partition: PartitionId) -> Vec<Forward> {
        let Some(route) = self.routes.get_mut(&partition).filter(|route| route.sent.is_empty())
        else {
            return Vec::new();
        };
        let returned = std::mem::take(&mut route.returned).into_values();
        let all: Vec<Forward> = returned.chain(std::mem::take(&mut route.waiting)).collect();
        self.routes.remove(&partition);
        for forward in &all {
            self.count -= 1;
            self.bytes -= forward.command.len();
        }
        all
    }

    /// Takes the commands that are not to be sent on, but were kept while leadership was on its way.
    pub(super) fn take_redirects(&mut self, partition: PartitionId) -> Vec<Waiter> {
        let Some(route) = self.routes.get_mut(&partition).filter(|route| route.redirects) else {
            return Vec::new();
        };
        route.redirects = false;
        self.take_waiting(partition, |one| one.ask.redirect)
    }

    /// The node that commands of a partition go to: one of these, in the order in which they are likely to
    /// lead, `leader` first if that is known. None while each of them has refused since the last pause and
    /// no other leader has become known.
    pub(super) fn node(
        &mut self,
        partition: PartitionId,
        leader: Option<u32>,
        candidates: &[u32],
    ) -> Option<u32> {
        let route = self.routes.get_mut(&partition)?;
        if route.stalled {
            return None;
        }
        // Those that are sent keep their order only on one link.
        if route.node.is_some() && !route.sent.is_empty() {
            // Once another leads, no more are sent to where they would be refused.
            return route.node.filter(|node| leader.is_none_or(|leader| leader == *node));
        }
        if std::mem::replace(&mut route.leader, leader) != leader {
            route.refused = 0;
            route.waits_for_leader = false;
        }
        if route.waits_for_leader {
            return None;
        }
        route.node = candidates.get(route.refused).copied();
        route.asks_leader = leader.is_some() && route.node == leader;
        route.node
    }

    /// Gives the commands of a partition that can be sent to `send`, in order, until it takes no more.
    pub(super) fn send(
        &mut self,
        partition: PartitionId,
        mut send: impl FnMut(u64, &Forward) -> bool,
    ) {
        let Some(route) = self.routes.get_mut(&partition) else { return };
        let place = u64::from(self.worker) << PARTITION_BITS | u64::from(partition.0);
        let attempt = self.attempts.get(&partition).copied().unwrap_or_default();
        let attempt = place << ATTEMPT_BITS | u64::from(attempt);
        loop {
            let again = route.returned.pop_first().map(|(_, forward)| forward);
            let Some(forward) = again.or_else(|| route.waiting.pop_front()) else { return };
            self.next = (self.next + 1) & ((1 << COUNTER_BITS) - 1);
            let id = attempt << COUNTER_BITS | self.next;
            if !send(id, &forward) {
                // The link has gone down or is full. Nothing of this attempt may be sent behind it, and what of
                // it comes back goes before all that is still here.
                let mut waiting = VecDeque::from([forward]);
                waiting.extend(std::mem::take(&mut route.returned).into_values());
                waiting.append(&mut route.waiting);
                route.waiting = waiting;
                route.node = route.node.filter(|_| !route.sent.is_empty());
                return;
            }
            route.sent.insert(id, forward);
        }
    }

    /// The node that has commands of a partition.
    pub(super) fn asked(&self, partition: PartitionId) -> Option<u32> {
        self.routes.get(&partition)?.node
    }

    /// Takes the answer to a command. Returns what is decided; nothing if it has to be sent again.
    pub(super) fn answered(&mut self, id: u64, reply: Reply) -> Option<Decided> {
        let partition = Forwards::partition_of(id);
        let route = self.routes.get_mut(&partition)?;
        let forward = route.sent.remove(&id)?;
        let decided = if matches!(reply, Reply::Error(Error::NotLeader | Error::Stopping)) {
            route.stalled = true;
            if matches!(forward.waiter, Waiter::Peer { .. }) {
                // Passed on for a node that knows better than to wait for it.
                self.count -= 1;
                self.bytes -= forward.command.len();
                Some((forward.waiter, Reply::Error(Error::NotLeader)))
            } else {
                route.returned.insert(id, forward);
                None
            }
        } else {
            self.count -= 1;
            self.bytes -= forward.command.len();
            route.refused = 0;
            let refused = matches!(reply, Reply::Error(_)) && forward.is_unsure();
            let reply = if refused { Reply::Error(Error::OutcomeUnknown) } else { reply };
            Some((forward.waiter, reply))
        };
        self.resume(partition);
        decided
    }

    /// Takes those that wait and came from a node in an attempt that it has been told to give up: it sends
    /// them again, behind the one that was refused.
    pub(super) fn take_refused(
        &mut self,
        partition: PartitionId,
        node: u32,
        attempt: u64,
    ) -> Vec<Waiter> {
        self.take_waiting(partition, |one| {
            matches!(&one.waiter, Waiter::Peer(peer)
                if peer.node == node && Forwards::attempt_of(peer.id) == attempt)
        })
    }

    fn take_waiting(
        &mut self,
        partition: PartitionId,
        is_taken: impl Fn(&Forward) -> bool,
    ) -> Vec<Waiter> {
        let Some(route) = self.routes.get_mut(&partition) else { return Vec::new() };
        let (taken, others): (VecDeque<_>, _) =
            std::mem::take(&mut route.waiting).into_iter().partition(is_taken);
        route.waiting = others;
        for forward in &taken {
            self.count -= 1;
            self.bytes -= forward.command.len();
        }
        self.resume(partition);
        taken.into_iter().map(|forward| forward.waiter).collect()
    }

    /// Goes on where all that was refused has come back.
    fn resume(&mut self, partition: PartitionId) {
        let Some(route) = self.routes.get_mut(&partition) else { return };
        if !route.sent.is_empty() {
            return;
        }
        if route.stalled {
            route.stalled = false;
            let attempt = self.attempts.entry(partition).or_default();
            *attempt = (*attempt + 1) & ((1 << ATTEMPT_BITS) - 1);
            route.refused += 1;
            route.waits_for_leader = route.asks_leader;
            route.node = None;
        }
        if route.returned.is_empty() && route.waiting.is_empty() {
            self.routes.remove(&partition);
        }
    }

    /// What was sent to a node is lost: it may have been carried out or not.
    pub(super) fn lost(&mut self, node: u32, decided: &mut Vec<Decided>) {
        let with: Vec<PartitionId> = self
            .routes
            .iter()
            .filter(|(_, route)| route.node == Some(node))
            .map(|(partition, _)| *partition)
            .collect();
        for partition in with {
            let Some(route) = self.routes.get_mut(&partition) else { continue };
            route.stalled = true;
            for (id, mut forward) in std::mem::take(&mut route.sent) {
                forward.maybe_done = true;
                if forward.is_write && forward.ask.once.is_none() {
                    self.count -= 1;
                    self.bytes -= forward.command.len();
                    decided.push((forward.waiter, Reply::Error(Error::OutcomeUnknown)));
                } else {
                    route.returned.insert(id, forward);
                }
            }
            self.resume(partition);
        }
    }

    /// After a pause: all nodes may be asked again, and who has waited too long is told so.
    pub(super) fn tick(&mut self, now: Instant, decided: &mut Vec<Decided>) {
        let partitions: Vec<PartitionId> = self.routes.keys().copied().collect();
        for partition in partitions {
            let Some(route) = self.routes.get_mut(&partition) else { continue };
            route.refused = 0;
            route.waits_for_leader = false;
            let mut given_up = Vec::new();
            for (list, sent) in [(&mut route.sent, true), (&mut route.returned, false)] {
                let late = list.extract_if(.., |_, forward| forward.deadline <= now);
                given_up
                    .extend(late.map(|(_, forward)| (forward.given_up(partition, sent), forward)));
            }
            for forward in std::mem::take(&mut route.waiting) {
                if forward.deadline <= now {
                    given_up.push((forward.given_up(partition, false), forward));
                } else {
                    route.waiting.push_back(forward);
                }
            }
            for (error, forward) in given_up {
                self.count -= 1;
                self.bytes -= forward.command.len();
                decided.push((forward.waiter, Reply::Error(error)));
            }
            self.resume(partition);
        }
    }
}

#[cfg(test)]
mod tests;
