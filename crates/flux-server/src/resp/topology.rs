//! What a node knows of its cluster, and what that is in the terms of Redis Cluster.
//!
//! Redis has masters with whole replicas; here every partition has a leader of its own, and a node leads
//! some and follows in others. So a node that leads anything is a master to clients, and one that only
//! follows is a replica of the node that leads most of what it holds.
//!
//! A view is a snapshot that its maker owns; nothing here looks at the cluster or waits for it.

use std::ops::RangeInclusive;

use flux_core::{PartitionId, Partitions, Slot};

/// The nodes of a cluster and where its partitions are, as one node sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterView {
    /// False for a node alone: everything else is then of no account.
    pub enabled: bool,
    /// The version of the placement.
    pub epoch: u64,
    /// The node itself: its place in `nodes`.
    pub me: usize,
    /// Every node of the cluster.
    pub nodes: Vec<ClusterNode>,
    /// Every partition, in order.
    pub partitions: Vec<ClusterPartition>,
}

/// A node as clients are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNode {
    /// 40 hexadecimal digits.
    pub id: String,
    /// Where clients reach it: an address or a name.
    pub host: String,
    /// The port of its data listener.
    pub port: u16,
    /// The port of its peer listener.
    pub peer_port: u16,
    /// Whether it is thought to run.
    pub alive: bool,
    /// The zone that it is in; empty for none.
    pub zone: String,
}

/// Where a partition is, by places in `nodes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterPartition {
    /// The node that leads it, if that is known.
    pub leader: Option<usize>,
    /// The nodes that hold it, the preferred ones first. The leader may be among them.
    pub replicas: Vec<usize>,
}

/// Where commands on a slot belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// This node leads the partition, or nobody is known to and it holds it.
    Here,
    /// This node holds the partition, which is good for stale reads; the other one leads it.
    Replica {
        /// The leader's address or name.
        host: String,
        /// Its port.
        port: u16,
    },
    /// Another node has it.
    Elsewhere {
        /// The address or name of the leader, or of a node that holds the partition.
        host: String,
        /// Its port.
        port: u16,
    },
    /// No node that could serve it is known.
    Unserved,
}

/// What a node is to the clients of Redis Cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Master,
    /// It leads nothing; this node leads most of the partitions that it holds.
    ReplicaOf(usize),
}

/// Adjacent slots of the same nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotRange {
    pub(super) slots: RangeInclusive<u16>,
    pub(super) master: usize,
    /// The others that hold them.
    pub(super) replicas: Vec<usize>,
}

/// How many slots are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotCounts {
    /// Their partition has a leader.
    pub(super) served: u32,
    /// It has none now, and enough nodes to elect one.
    pub(super) electing: u32,
    /// It has no majority.
    pub(super) lost: u32,
}

impl ClusterNode {
    /// The id that clients know a node by, of the node's number.
    pub fn id(number: u32) -> String {
        format!("{number:08x}").repeat(5)
    }
}

impl ClusterPartition {
    /// The node that a client is sent to: the leader, or while none is known, a node that holds the
    /// partition and will know.
    fn master(&self, nodes: &[ClusterNode]) -> Option<usize> {
        let alive = |node: &&usize| nodes.get(**node).is_some_and(|node| node.alive);
        let known = self.leader.filter(|leader| *leader < nodes.len());
        known.or_else(|| self.replicas.iter().find(alive).copied())
    }

    /// The nodes besides `master` that hold it.
    fn others(&self, master: usize, nodes: usize) -> Vec<usize> {
        self.replicas.iter().copied().filter(|node| *node != master && *node < nodes).collect()
    }
}

impl ClusterView {
    fn partitions(&self) -> Option<Partitions> {
        Partitions::new(u16::try_from(self.partitions.len()).ok()?)
    }

    /// The partitions that a master was found for, with their slots, joined where `same` says so.
    fn joined(&self, same: impl Fn(&SlotRange, &SlotRange) -> bool) -> Vec<SlotRange> {
        let Some(partitions) = self.partitions() else { return Vec::new() };
        let mut ranges: Vec<SlotRange> = Vec::new();
        for (id, partition) in partitions.iter().zip(&self.partitions) {
            let Some(master) = partition.master(&self.nodes) else { continue };
            let slots = partitions.slots(id);
            let range = SlotRange {
                slots: slots.start..=slots.end - 1,
                master,
                replicas: partition.others(master, self.nodes.len()),
            };
            match ranges.last_mut() {
                Some(last) if *last.slots.end() + 1 == slots.start && same(last, &range) => {
                    last.slots = *last.slots.start()..=*range.slots.end();
                }
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// All slots that are served, as ranges with the same master and replicas, in order.
    pub(super) fn ranges(&self) -> Vec<SlotRange> {
        self.joined(|a, b| a.master == b.master && a.replicas == b.replicas)
    }

    /// The slots of each node that it is the master of, in order, by its place in `nodes`.
    pub(super) fn slots_by_master(&self) -> Vec<Vec<RangeInclusive<u16>>> {
        let mut slots = vec![Vec::new(); self.nodes.len()];
        for range in self.joined(|a, b| a.master == b.master) {
            slots[range.master].push(range.slots);
        }
        slots
    }

    /// What a node is.
    pub(super) fn role(&self, node: usize) -> Role {
        let mut led_by = vec![0_u32; self.nodes.len()];
        for partition in &self.partitions {
            match partition.master(&self.nodes) {
                Some(master) if master == node => return Role::Master,
                Some(master) if partition.replicas.contains(&node) => led_by[master] += 1,
                _ => {}
            }
        }
        let led = led_by.iter().enumerate().filter(|(_, count)| **count > 0);
        // The first of several, so that the answer stays the same.
        let most = led.max_by_key(|(master, count)| (**count, usize::MAX - master));
        most.map_or(Role::Master, |(master, _)| Role::ReplicaOf(master))
    }

    /// The nodes that hold a partition which this one leads, in their order.
    pub(super) fn my_replicas(&self) -> Vec<&ClusterNode> {
        let mine = self.partitions.iter().filter(|partition| partition.leader == Some(self.me));
        let mut holds = vec![false; self.nodes.len()];
        for replica in mine.flat_map(|partition| partition.others(self.me, self.nodes.len())) {
            holds[replica] = true;
        }
        self.nodes.iter().zip(holds).filter(|(_, holds)| *holds).map(|(node, _)| node).collect()
    }

    /// The slots by their state.
    pub(super) fn slot_counts(&self) -> SlotCounts {
        let mut counts = SlotCounts::default();
        let Some(partitions) = self.partitions() else { return counts };
        let slots = u32::from(partitions.slots(PartitionId(0)).end);
        for partition in &self.partitions {
            let alive = |node: &&usize| self.nodes.get(**node).is_some_and(|node| node.alive);
            let alive = partition.replicas.iter().filter(alive).count();
            let count = match partition.leader {
                Some(_) => &mut counts.served,
                None if alive > partition.replicas.len() / 2 => &mut counts.electing,
                None => &mut counts.lost,
            };
            *count += slots;
        }
        counts
    }

    /// How many replicas besides the leader surely have every write that was acknowledged: a majority
    /// less the leader, of the partition that has the fewest.
    pub(super) fn acknowledging_replicas(&self) -> usize {
        let sizes = self.partitions.iter().map(|partition| partition.replicas.len());
        if self.enabled { sizes.min().unwrap_or(0) / 2 } else { 0 }
    }

    /// Where commands on a slot belong. Asks nobody: the answer is as old as the view.
    pub fn route(&self, slot: Slot) -> Route {
        let partition = self.partitions().map(|partitions| usize::from(partitions.owner(slot).0));
        let Some(partition) = partition.and_then(|partition| self.partitions.get(partition)) else {
            return Route::Unserved;
        };
        let holds = partition.replicas.contains(&self.me);
        match partition.master(&self.nodes) {
            Some(master) if master == self.me => Route::Here,
            // It will hear of a leader as soon as there is one.
            _ if holds && partition.leader.is_none() => Route::Here,
            Some(master) => {
                let ClusterNode { host, port, .. } = &self.nodes[master];
                let (host, port) = (host.clone(), *port);
                if holds { Route::Replica { host, port } } else { Route::Elsewhere { host, port } }
            }
            None => Route::Unserved,
        }
    }
}
