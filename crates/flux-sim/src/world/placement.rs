//! Who has which replicas: the part of the controller, of the registry, and of a node that follows them.

use flux_core::placement::ReplicaId;
use flux_core::replica::Replica;

use super::{Event, World};
use crate::check::{Promise, Violation};
use crate::node::BootError;
use crate::plan::MS;
use crate::plant::Plant;

impl World {
    /// An id that no replica had.
    pub(super) fn new_replica(&mut self, host: usize) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        u64::from(self.hosts[host].node) << 32 | u64::from(sequence)
    }

    /// The host of a replica's node, if that still is one.
    pub(super) fn host_of(&self, replica: u64) -> Option<usize> {
        let node = (replica >> 32) as u32;
        self.hosts.iter().position(|host| host.node == node)
    }

    /// The replicas that partitions begin with on a host.
    pub(super) fn found_replicas(&mut self, host: usize) {
        let now = self.hosts[host].now(self.now_us);
        for partition in 0..self.plan.partitions {
            let voters = self.targets[usize::from(partition)].clone();
            let node = self.hosts[host].node;
            let own = voters.iter().find(|id| (**id >> 32) as u32 == node);
            let process = self.hosts[host].process.as_mut();
            if let (Some(process), Some(id)) = (process, own) {
                let placed = process.found(partition, *id, &voters, now);
                placed.expect("the disk of a new node works");
            }
        }
        self.wake(host);
    }

    /// The map has changed: nodes hear of it, sooner or later.
    pub(super) fn announce(&mut self) {
        self.epoch += 1;
        for host in 0..self.hosts.len() {
            let at = self.now_us + self.random.between(MS, 300 * MS);
            self.queue.push(at, Event::MapArrives(host));
        }
    }

    pub(super) fn map_arrives(&mut self, host: usize) {
        self.hosts[host].targets.clone_from(&self.targets);
        self.hosts[host].epoch = self.epoch;
        self.follow_map(host);
    }

    /// A node looks now and then whether what it has is what it should have.
    pub(super) fn keep_house(&mut self, host: usize) {
        self.queue
            .push(self.now_us + self.random.between(50 * MS, 200 * MS), Event::KeepHouse(host));
        self.follow_map(host);
    }

    fn follow_map(&mut self, host: usize) {
        if !self.hosts[host].is_awake() {
            return;
        }
        for partition in 0..self.plan.partitions {
            let machine = &self.hosts[host];
            let target = &machine.targets[usize::from(partition)];
            let due = target.iter().copied().find(|id| (*id >> 32) as u32 == machine.node);
            let Some(process) = &machine.process else { return };
            let has = process.replica(partition);
            let done = match (has.map(Replica::id), due) {
                (None, Some(id)) => self.place(host, partition, id),
                // Made for a place that it does not have any more, before it learned anything.
                (Some(id), due) if due != Some(id) => {
                    match has.is_some_and(Replica::has_learned_nothing) {
                        true => self.drop_replica(host, partition, id),
                        false => Ok(()),
                    }
                }
                _ => Ok(()),
            };
            if let Err(error) = done {
                self.process_failed(host, &format!("{error:?}"));
                return;
            }
        }
    }

    fn place(&mut self, host: usize, partition: u16, id: u64) -> Result<(), BootError> {
        self.say(format_args!("h{host} p{partition} places {id:x}"));
        self.note(7, &[host as u64, id]);
        let now = super::node_now(&self.plan, &self.hosts[host], self.now_us);
        let process = self.hosts[host].process.as_mut();
        let placed = process.map_or(Ok(()), |process| process.place(partition, id, now));
        self.wake(host);
        placed
    }

    fn drop_replica(&mut self, host: usize, partition: u16, id: u64) -> Result<(), BootError> {
        self.say(format_args!("h{host} p{partition} drops {id:x} for the map"));
        self.note(8, &[host as u64, id]);
        let process = self.hosts[host].process.as_mut();
        process.map_or(Ok(()), |process| process.remove(partition).map_err(BootError::from))
    }

    /// Whether a partition has the replicas that it should have, and none of them is lost.
    pub(super) fn is_in_place(&self, partition: u16) -> bool {
        let target = &self.targets[usize::from(partition)];
        let mut sorted = target.clone();
        sorted.sort_unstable();
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        let mut leaders =
            processes.filter_map(|one| one.replica(partition)).filter(|one| one.leads());
        let settled = leaders.any(|replica| {
            let members = replica.members();
            members.voters == sorted && !replica.status().changing && members.learners.is_empty()
        });
        settled && target.iter().all(|id| !self.lost.contains(id))
    }

    /// Moves a replica: the map changes, and the nodes follow it.
    pub(super) fn move_replica(&mut self) -> bool {
        let partition = self.random.below(u64::from(self.plan.partitions)) as u16;
        let place = usize::from(partition);
        if self.replan_stalled(partition) {
            return true;
        }
        // Now and then the map changes again before the group has followed it.
        let hasty = self.random.per_mille(200);
        let whole = self.targets[place].iter().all(|id| !self.lost.contains(id));
        if !whole || !(hasty || self.is_in_place(partition)) {
            return false;
        }
        let taken: Vec<usize> = self.hosts_with(partition);
        let free: Vec<usize> = (0..self.hosts.len()).filter(|host| !taken.contains(host)).collect();
        let count = self.targets[place].len();
        let out = self.random.below(count as u64) as usize;
        match self.random.pick(&free).copied() {
            Some(host) => {
                let id = self.new_replica(host);
                if count < self.plan.replication {
                    self.targets[place].push(id);
                } else {
                    self.targets[place][out] = id;
                }
            }
            None if count > 2 => drop(self.targets[place].remove(out)),
            None => return false,
        }
        self.say_target(partition);
        self.announce();
        true
    }

    /// Where a replica cannot come, since a voter is on its node or it may have been here before, the map
    /// changes again, as the controller would do it. True if it has.
    pub(super) fn replan_stalled(&mut self, partition: u16) -> bool {
        let place = usize::from(partition);
        let Some(voters) = self.voters(partition) else { return false };
        let stalled = self.targets[place].iter().position(|id| {
            let taken = voters.iter().any(|voter| voter.node() == ReplicaId::from_u64(*id).node());
            !voters.contains(&ReplicaId::from_u64(*id))
                && (taken || !ReplicaId::from_u64(*id).may_join(&voters))
        });
        let Some(at) = stalled else { return false };
        let old = ReplicaId::from_u64(self.targets[place][at]);
        let host = self.host_of(old.get());
        self.targets[place][at] =
            match (voters.iter().find(|voter| voter.node() == old.node()), host) {
                (Some(voter), _) => voter.get(),
                (None, Some(host)) => self.new_replica(host),
                (None, None) => return false,
            };
        self.say_target(partition);
        self.announce();
        true
    }

    /// The voters of a partition as a leader of it knows them, outside a joint configuration.
    fn voters(&self, partition: u16) -> Option<Vec<ReplicaId>> {
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        let leading = |one: &&Replica<_>| one.leads();
        let replica = processes
            .filter_map(|one| one.replica(partition))
            .filter(leading)
            .max_by_key(|one| one.term())?;
        let members = replica.members();
        let voters = members.voters.iter().map(|id| ReplicaId::from_u64(*id)).collect();
        (!members.is_joint()).then_some(voters)
    }

    fn say_target(&mut self, partition: u16) {
        let target = &self.targets[usize::from(partition)];
        self.trace.line(self.now_us, format_args!("p{partition} is to be on {target:x?}"));
    }

    /// Hosts that should have a replica of a partition or have one in its group. One that has an old replica
    /// still, and has not heard that it left, may be given a new one.
    fn hosts_with(&self, partition: u16) -> Vec<usize> {
        let voters = self.voters(partition).unwrap_or_default();
        let target = self.targets[usize::from(partition)].iter().copied();
        let both = target.chain(voters.iter().map(|voter| voter.get()));
        both.filter_map(|id| self.host_of(id)).collect()
    }

    /// A host's data is lost: it comes back as another node, and the map is mended after a while.
    pub(super) fn lose_data(&mut self, host: usize) {
        let old = self.hosts[host].node;
        if !self.hosts[host].rotten {
            let evidence = format!("h{host} finds its data damaged, and nothing damaged it");
            self.violated(Violation::new(Promise::Intact, evidence));
            return;
        }
        self.outcome.replaced += 1;
        let keeps_id = self.plan.plant == Some(Plant::SameIdAfterLoss);
        let seed = self.random.any();
        let node = if keeps_id { old } else { self.next_node };
        self.next_node += 1;
        let clock = self.hosts[host].clock.clone();
        self.hosts[host] = super::Host::new(node, clock, seed);
        self.hosts[host].targets.clone_from(&self.targets);
        self.hosts[host].epoch = self.epoch;
        self.say(format_args!("h{host} has lost its data and comes back as node {node}"));
        if !keeps_id {
            for id in self.targets.iter().flatten().filter(|id| (**id >> 32) as u32 == old) {
                self.lost.insert(*id);
            }
            let at = self.now_us + self.random.between(100 * MS, 1500 * MS);
            self.queue.push(at, Event::Replace(old));
        }
        self.start(host);
    }

    /// Puts new replicas in the place of those of a node that is gone.
    pub(super) fn replace(&mut self, node: u32) {
        for partition in 0..self.targets.len() {
            let gone = self.targets[partition].iter().position(|id| (*id >> 32) as u32 == node);
            let Some(gone) = gone else { continue };
            let taken = self.hosts_with(partition as u16);
            let free: Vec<usize> =
                (0..self.hosts.len()).filter(|host| !taken.contains(host)).collect();
            let Some(host) = self.random.pick(&free).copied() else {
                let at = self.now_us + 200 * MS;
                self.queue.push(at, Event::Replace(node));
                continue;
            };
            self.targets[partition][gone] = self.new_replica(host);
            self.say_target(partition as u16);
        }
        self.announce();
    }
}
