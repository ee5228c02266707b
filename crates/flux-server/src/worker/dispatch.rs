//! Takes commands to where their partitions live: a replica of this worker, or another's mailbox.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use flux_cdc::Led;
use flux_core::feed::Committed;
use flux_core::replica::{Meta, Now, Replica, Replies};
use flux_core::{Command, Error, PartitionId, Reply, UnixMillis};

use super::cluster::Cluster;
use crate::clock::{monotonic_us, unix_us};
use crate::mailbox::{Ask, MAX_OUTSTANDING, Message, Origin, Return, Waiter};
use crate::peer::Peers;
use crate::shared::Shared;

/// Timers of expired keys that one partition works off in a turn: bounds what they add to its length.
const EXPIRIES_PER_TURN: usize = 160;

pub(super) struct Dispatch {
    id: u16,
    /// In a cluster: the links to the other nodes, and what is under way there.
    pub(super) peers: Option<Peers>,
    pub(super) cluster: Option<Box<Cluster>>,
    /// Bytes of entries that came from leaders since the last turn.
    pub(super) incoming_bytes: usize,
    pub(super) shared: Arc<Shared>,
    /// By partition; `None` where another worker owns it.
    pub(super) replicas: Vec<Option<Replica<Waiter>>>,
    /// Partitions of this worker.
    own: Vec<PartitionId>,
    /// Partitions with something for the next turn, each once.
    active: Vec<PartitionId>,
    is_active: Vec<bool>,
    /// Decided replies, for `Worker::deliver`.
    pub(super) replies: Replies<Waiter>,
    /// Replies for connections of other workers, by worker.
    answers: Vec<Vec<Return>>,
    /// Requests that are with other workers.
    pub(super) outstanding: usize,
    /// The time, as it was looked at last; see `look_at_clock`.
    pub(super) now: Now,
    /// The wall clock in microseconds since the Unix epoch.
    pub(super) unix_us: u64,
    max_in_flight_bytes: usize,
    in_flight_bytes: usize,
    /// The same for each partition, as it was counted last.
    in_flight_of: Vec<usize>,
    /// Which partitions are led here, as was logged last.
    led: Vec<bool>,
    /// No timer is due before this; none at all where there is none.
    expiry_due_ms: Option<UnixMillis>,
    /// Timers may be due beyond what the last turn took.
    more_expiries: bool,
    /// Why new writes are refused, if they are.
    pub(super) refusing: Option<Error>,
    /// What was applied and is to be passed on to those who follow it.
    pub(super) committed: Vec<Committed>,
    pub(super) feed_ticks: u64,
    /// What those who follow changes were told to be led here.
    pub(super) told_led: Vec<Led>,
    tally: Tally,
}

/// Lists a partition for the next turn, once.
fn activate(is_active: &mut [bool], active: &mut Vec<PartitionId>, partition: PartitionId) {
    let flag = &mut is_active[usize::from(partition.0)];
    if !*flag {
        *flag = true;
        active.push(partition);
    }
}

/// What a worker counts by itself: counters that all workers share are too slow for each request.
#[derive(Default)]
struct Tally {
    reads: u64,
    hits: u64,
    misses: u64,
    writes: u64,
}

impl Dispatch {
    pub(super) fn new(id: u16, shared: Arc<Shared>, replicas: Vec<Replica<Waiter>>) -> Dispatch {
        let count = usize::from(shared.partitions.count());
        let own = replicas.iter().map(Replica::partition).collect();
        let mut places: Vec<Option<Replica<Waiter>>> = (0..count).map(|_| None).collect();
        for replica in replicas {
            let index = usize::from(replica.partition().0);
            places[index] = Some(replica);
        }
        Dispatch {
            id,
            peers: None,
            cluster: None,
            incoming_bytes: 0,
            replicas: places,
            own,
            active: Vec::new(),
            is_active: vec![false; count],
            replies: Vec::new(),
            answers: shared.mailboxes.iter().map(|_| Vec::new()).collect(),
            outstanding: 0,
            now: Now::default(),
            unix_us: 0,
            max_in_flight_bytes: shared.settings.max_inflight_bytes as usize,
            in_flight_bytes: 0,
            in_flight_of: vec![0; count],
            led: vec![false; count],
            expiry_due_ms: Some(0),
            more_expiries: false,
            refusing: None,
            committed: Vec::new(),
            feed_ticks: 0,
            told_led: Vec::new(),
            tally: Tally::default(),
            shared,
        }
    }

    /// Looks at the clocks. To be done after requests were received and before they are carried out: a
    /// process that was stopped in between must not think that it still leads.
    pub(super) fn look_at_clock(&mut self) {
        self.unix_us = unix_us();
        self.now = Now { ms: self.unix_us / 1000, us: monotonic_us() };
    }

    /// Gives a command to its partition, behind those given before. The reply comes now, or later to
    /// `origin`.
    pub(super) fn submit(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        origin: Origin,
    ) -> Option<Reply> {
        let owner = self.shared.owner(partition);
        if owner == self.id {
            let waiter = Waiter::Connection(origin);
            return self.execute(partition, command, ask, waiter).map(|(_, reply)| reply);
        }
        if self.outstanding >= MAX_OUTSTANDING {
            return Some(self.turned_away());
        }
        let message = Message::Command {
            partition,
            command: Box::new(command.to_owned()),
            ask,
            waiter: Waiter::Connection(origin),
        };
        if self.shared.mailboxes[usize::from(owner)].send(message).is_err() {
            return Some(self.turned_away());
        }
        self.outstanding += 1;
        None
    }

    /// The same for the monotonic clock alone.
    pub(super) fn look_at_monotonic_clock(&mut self) {
        self.now.us = monotonic_us();
    }

    /// Answers a read from its table, if that may be done without asking the replica.
    pub(super) fn read(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
    ) -> Option<Reply> {
        let reply = self.shared.read(partition, command, self.now)?;
        match reply {
            Reply::Value(ref value) => self.count_read(value.is_some()),
            _ => self.tally.reads += 1,
        }
        Some(reply)
    }

    /// Answers a read from what the replica here has applied, if there is one.
    pub(super) fn read_stale(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
    ) -> Option<Reply> {
        let (reply, ..) = self.shared.read_stale(partition, command, self.now)?;
        self.tally.reads += 1;
        Some(reply)
    }

    /// Whether a partition is this worker's own: nobody writes to it while this worker reads.
    pub(super) fn owns(&self, partition: PartitionId) -> bool {
        self.replicas[usize::from(partition.0)].is_some()
    }

    /// Counts a read of one key.
    pub(super) fn count_read(&mut self, hit: bool) {
        self.tally.reads += 1;
        self.tally.hits += u64::from(hit);
        self.tally.misses += u64::from(!hit);
    }

    /// Adds what was counted since the last time to the node's counters.
    pub(super) fn publish_tally(&mut self) {
        let (tally, stats) = (std::mem::take(&mut self.tally), &self.shared.stats);
        for (counter, amount) in [
            (&stats.reads, tally.reads),
            (&stats.read_hits, tally.hits),
            (&stats.read_misses, tally.misses),
            (&stats.writes, tally.writes),
        ] {
            if amount > 0 {
                counter.add(amount);
            }
        }
    }

    /// Carries out a command that came through the mailbox.
    pub(super) fn execute_for(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        waiter: Waiter,
    ) {
        if let Some(decided) = self.execute(partition, command, ask, waiter) {
            self.replies.push(decided);
        }
    }

    fn execute(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        waiter: Waiter,
    ) -> Option<(Waiter, Reply)> {
        if self.cluster.is_some() && (!self.takes(partition) || self.is_fenced(&waiter)) {
            if ask.stale
                && !command.is_write()
                && let Some(reply) = self.read_stale(partition, command)
            {
                return Some((waiter, reply));
            }
            return self.forward(partition, command, ask, waiter);
        }
        let is_write = command.is_write();
        let waiter = if is_write { waiter } else { self.keep(partition, command, &ask, waiter) };
        *if is_write { &mut self.tally.writes } else { &mut self.tally.reads } += 1;
        if let Some(error) = &self.refusing
            && is_write
        {
            match error {
                Error::Overloaded => self.shared.stats.overloaded.add(1),
                Error::DiskFull => self.shared.stats.disk_full.add(1),
                _ => {}
            }
            return Some((waiter, Reply::Error(error.clone())));
        }
        let Some(replica) = &mut self.replicas[usize::from(partition.0)] else {
            return Some((waiter, Reply::Error(Error::NotLeader)));
        };
        let meta = Meta { once: ask.once.as_ref(), trace: ask.trace.as_deref() };
        let decided = replica.execute(self.now, command, &meta, waiter);
        let bytes = replica.in_flight_bytes();
        let known = &mut self.in_flight_of[usize::from(partition.0)];
        self.in_flight_bytes += bytes;
        self.in_flight_bytes -= std::mem::replace(known, bytes);
        if self.in_flight_bytes >= self.max_in_flight_bytes && self.refusing.is_none() {
            self.refusing = Some(Error::Overloaded);
        }
        self.activate(partition);
        let (waiter, reply) = decided?;
        self.unwrap_kept(waiter, reply)
    }

    /// The answer where a mailbox takes no more.
    fn turned_away(&self) -> Reply {
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Reply::Error(Error::Stopping);
        }
        self.shared.stats.overloaded.add(1);
        Reply::Error(Error::Overloaded)
    }

    /// Puts the deletes of expired keys into the batches of this turn.
    pub(super) fn expire(&mut self) {
        self.more_expiries = false;
        let due = self.expiry_due_ms.is_some_and(|due| due <= self.now.ms);
        if self.refusing.is_some() || !due {
            return;
        }
        for index in 0..self.own.len() {
            let partition = self.own[index];
            let Some(replica) = &mut self.replicas[usize::from(partition.0)] else { continue };
            if replica.next_expiry_ms().is_none_or(|due| due > self.now.ms) {
                continue;
            }
            let count = replica.expire(self.now.ms, EXPIRIES_PER_TURN);
            let bytes = replica.in_flight_bytes();
            let known = &mut self.in_flight_of[usize::from(partition.0)];
            self.in_flight_bytes += bytes;
            self.in_flight_bytes -= std::mem::replace(known, bytes);
            self.more_expiries |= count == EXPIRIES_PER_TURN;
            self.shared.stats.expired_keys.add(count as u64);
            self.activate(partition);
        }
        self.look_for_expiries();
    }

    /// Looks anew when the next timer of any partition is due.
    fn look_for_expiries(&mut self) {
        let replicas = self.replicas.iter().flatten();
        self.expiry_due_ms = replicas.filter_map(Replica::next_expiry_ms).min();
    }

    pub(super) fn next_expiry_ms(&self) -> Option<UnixMillis> {
        // While writes are refused nothing is deleted: there is nothing to wake up for.
        if self.refusing.is_some() {
            return None;
        }
        self.expiry_due_ms
    }

    pub(super) fn tick(&mut self, now: Instant) {
        // What is on the disk of a log that failed is not known: its replicas say nothing any more.
        if matches!(self.refusing, Some(Error::LogFailed(_))) {
            return;
        }
        // A replica that can write nothing must neither stand for election nor hold on to a leadership that
        // it cannot use.
        let writes = self.can_write();
        for replica in self.replicas.iter_mut().flatten().filter(|one| writes || one.leads()) {
            if replica.tick(self.now) {
                activate(&mut self.is_active, &mut self.active, replica.partition());
            }
        }
        self.tick_cluster(now);
        self.tick_feed();
        self.look_for_expiries();
    }

    /// Whether the replicas here can have records written. Not while the disk is so full that their last ones
    /// are not.
    pub(super) fn can_write(&self) -> bool {
        self.refusing != Some(Error::DiskFull)
    }

    /// Answers those who wait for proposals of replicas that do not lead any more and do not learn what becomes
    /// of them, since they can write nothing.
    pub(super) fn give_up_outcomes(&mut self) {
        for replica in self.replicas.iter_mut().flatten().filter(|one| !one.leads()) {
            replica.give_up_outcomes(&mut self.replies);
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.more_expiries || !self.replies.is_empty()
    }

    pub(super) fn activate(&mut self, partition: PartitionId) {
        activate(&mut self.is_active, &mut self.active, partition);
    }

    pub(super) fn activate_all(&mut self) {
        for index in 0..self.own.len() {
            self.activate(self.own[index]);
        }
    }

    pub(super) fn active(&self) -> &[PartitionId] {
        &self.active
    }

    /// Takes the partitions that are active; give the vector back to `recycle`.
    pub(super) fn take_active(&mut self) -> Vec<PartitionId> {
        for partition in &self.active {
            self.is_active[usize::from(partition.0)] = false;
        }
        std::mem::take(&mut self.active)
    }

    pub(super) fn recycle(&mut self, mut active: Vec<PartitionId>) {
        if self.active.is_empty() {
            active.clear();
            self.active = active;
        }
    }

    /// A replica of this worker, and where its replies go. None for a partition that does not exist: its
    /// number may come from another node.
    pub(super) fn replica(
        &mut self,
        partition: PartitionId,
    ) -> Option<(&mut Replica<Waiter>, &mut Replies<Waiter>)> {
        let replica = self.replicas.get_mut(usize::from(partition.0))?.as_mut()?;
        Some((replica, &mut self.replies))
    }

    pub(super) fn own(&self) -> &[PartitionId] {
        &self.own
    }

    /// Counts anew what these partitions have in flight, and when their next timer is due, after a turn.
    pub(super) fn recount(&mut self, active: &[PartitionId]) {
        for partition in active {
            let index = usize::from(partition.0);
            let Some(replica) = &self.replicas[index] else { continue };
            let leads = replica.leads();
            if std::mem::replace(&mut self.led[index], leads) != leads {
                let (term, what) = (replica.term(), if leads { "leads" } else { "follows" });
                tracing::debug!(%partition, term, "the replica {what} now");
            }
            let bytes = replica.in_flight_bytes();
            self.in_flight_bytes += bytes;
            self.in_flight_bytes -= std::mem::replace(&mut self.in_flight_of[index], bytes);
            if let Some(due) = replica.next_expiry_ms() {
                self.expiry_due_ms = Some(self.expiry_due_ms.map_or(due, |known| known.min(due)));
            }
        }
    }

    pub(super) fn recount_all(&mut self) {
        let own = self.own.clone();
        self.recount(&own);
    }

    /// Writes are refused while too much is in flight, or while the oldest of it has waited too long.
    pub(super) fn watch_load(&mut self, waited_too_long: bool) {
        let relieved = self.in_flight_bytes < self.max_in_flight_bytes / 2;
        match &self.refusing {
            None if waited_too_long => self.refusing = Some(Error::Overloaded),
            Some(Error::Overloaded) if relieved && !waited_too_long => self.refusing = None,
            _ => {}
        }
    }

    pub(super) fn in_flight_bytes(&self) -> usize {
        self.in_flight_bytes
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn answer_later(&mut self, origin: Origin, reply: Reply) {
        self.answers[usize::from(origin.worker)].push(Return::Reply(origin, reply));
    }

    pub(super) fn send_answers(&mut self) {
        for (worker, answers) in self.answers.iter_mut().enumerate() {
            if !answers.is_empty() {
                self.shared.mailboxes[worker].answer_all(answers);
            }
        }
    }

    /// Whether every partition of this worker serves.
    pub(super) fn all_serving(&self) -> bool {
        let serving = |partition: &PartitionId| {
            let view = &self.shared.views[usize::from(partition.0)];
            view.standing.may_serve(self.now.us)
        };
        self.own.iter().all(serving)
    }

    pub(super) fn replicas_mut(&mut self) -> impl Iterator<Item = &mut Replica<Waiter>> {
        self.replicas.iter_mut().flatten()
    }

    /// The replicas of this worker.
    pub(super) fn replicas(&self) -> impl Iterator<Item = &Replica<Waiter>> {
        self.replicas.iter().flatten()
    }

    /// Takes in a replica that is new here.
    pub(super) fn insert(&mut self, replica: Replica<Waiter>) {
        let partition = replica.partition();
        self.replicas[usize::from(partition.0)] = Some(replica);
        if !self.own.contains(&partition) {
            self.own.push(partition);
        }
        self.activate(partition);
    }

    /// Lets go of a replica.
    pub(super) fn remove(&mut self, partition: PartitionId) -> Option<Replica<Waiter>> {
        self.own.retain(|own| *own != partition);
        let index = usize::from(partition.0);
        self.in_flight_bytes -= std::mem::take(&mut self.in_flight_of[index]);
        self.replicas[usize::from(partition.0)].take()
    }

    /// The number of this worker.
    pub(super) fn worker(&self) -> u16 {
        self.id
    }
}
