//! Which nodes each partition should be on. See the header of the parent module for the algorithm.
//!
//! Who leads, in what steps replicas get there, and whether a step is safe are not decided here.

mod chain;

use std::collections::{BTreeMap, BTreeSet};

use chain::{Few, Start};

use super::id::NodeId;
use super::quota::quotas;
use super::ring::Ring;
use super::{Placeable, leaders};
use crate::slot::{PartitionId, Partitions};

/// The nodes that each partition should be on, the one that should lead first.
///
/// Each partition gets `replication_factor` distinct nodes, or all where there are fewer. With at least
/// as many zones its nodes are in distinct ones; with fewer, no zone has more of them than it must.
/// Within that, nodes hold equally many replicas, to within one, and lead equally many partitions as
/// far as possible. What `current` has stays, but for what the rules and the balance take; nodes in it
/// that are not among `nodes` lose what they have.
pub fn desired(
    nodes: &[Placeable],
    partitions: Partitions,
    replication_factor: u8,
    current: Option<&[Vec<NodeId>]>,
) -> Vec<Vec<NodeId>> {
    let zones = number_zones(nodes);
    let candidate = |place: &Placeable| Candidate {
        node: place.node,
        zone: zones.get(place.zone.as_str()).copied(),
        open: true,
    };
    let count = usize::from(partitions.count());
    let mut now = current.map(<[_]>::to_vec).unwrap_or_default();
    now.resize(count, Vec::new());
    let candidates = nodes.iter().map(candidate).collect();
    let mut lists = arrange(candidates, replication_factor.into(), &now, &vec![false; count]);
    let places = leaders::spread(&lists, |_| true);
    for (list, place) in lists.iter_mut().zip(places) {
        if place < list.len() {
            list[..=place].rotate_right(1);
        }
    }
    lists
}

/// A node that has or may get replicas.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) node: NodeId,
    /// A number for its zone; `None` when that is not known, and then no rule about zones applies.
    pub(super) zone: Option<usize>,
    /// Whether it may get replicas; else it keeps those it has.
    pub(super) open: bool,
}

/// What holds for the nodes of every partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// How many there are.
    pub(super) wanted: usize,
    /// How many of them a zone may have.
    pub(super) zone_cap: usize,
}

impl Rules {
    /// As many nodes as there can be up to `wanted`, and then the lowest cap on a zone that lets all
    /// partitions have them.
    fn new(candidates: &[Candidate], wanted: usize) -> Rules {
        let wanted = wanted.min(candidates.len());
        let mut sizes: BTreeMap<Option<usize>, usize> = BTreeMap::new();
        for candidate in candidates {
            *sizes.entry(candidate.zone).or_default() += 1;
        }
        let unzoned = sizes.remove(&None).unwrap_or(0);
        let room = |cap: usize| sizes.values().map(|&size| size.min(cap)).sum::<usize>() + unzoned;
        let zone_cap = (1..wanted).find(|&cap| room(cap) >= wanted).unwrap_or(wanted);
        Rules { wanted, zone_cap }
    }
}

/// A number for each zone, in the order of their names.
pub(super) fn number_zones<'a>(
    places: impl IntoIterator<Item = &'a Placeable>,
) -> BTreeMap<&'a str, usize> {
    let names: BTreeSet<&str> = places.into_iter().map(|place| place.zone.as_str()).collect();
    names.into_iter().zip(0..).collect()
}

/// The nodes of each partition, those that stay first and in their order. `pinned` partitions keep
/// what they have.
pub(super) fn arrange(
    mut candidates: Vec<Candidate>,
    wanted: usize,
    current: &[Vec<NodeId>],
    pinned: &[bool],
) -> Vec<Vec<NodeId>> {
    candidates.sort_by_key(|candidate| candidate.node);
    candidates.dedup_by_key(|candidate| candidate.node);
    let mut board = Board::new(&candidates, wanted, current, pinned);
    board.trim();
    board.quota = quotas(&candidates, &board.loads(), current.len(), board.rules);
    board.place_along_the_ring();
    board.shed_along_the_ring();
    board.place_by_chains();
    board.shed_by_chains();
    let name = |&index: &usize| candidates[index].node;
    board.lists.iter().map(|list| list.iter().map(name).collect()).collect()
}

/// One replica's way from a node to another; from none when it is a new one.
#[derive(Clone, Copy)]
struct Leg {
    partition: usize,
    from: Option<usize>,
    to: usize,
}

/// The assignment while it is worked on. Nodes and partitions are called by their places.
struct Board<'a> {
    candidates: &'a [Candidate],
    rules: Rules,
    pinned: &'a [bool],
    ring: Ring,
    /// By partition, its nodes at first.
    home: Vec<Vec<usize>>,
    /// By partition, its nodes.
    lists: Vec<Vec<usize>>,
    /// By node, its partitions.
    held: Vec<BTreeSet<usize>>,
    /// By node, how many it should hold.
    quota: Vec<usize>,
    /// Nodes from which no chain leads to one below its quota. Chains never pass them, so it stays so.
    hopeless: Vec<bool>,
}

impl<'a> Board<'a> {
    fn new(
        candidates: &'a [Candidate],
        wanted: usize,
        current: &[Vec<NodeId>],
        pinned: &'a [bool],
    ) -> Board<'a> {
        let place =
            |node: &NodeId| candidates.binary_search_by_key(node, |candidate| candidate.node).ok();
        let lists: Vec<Vec<usize>> =
            current.iter().map(|list| list.iter().filter_map(place).collect()).collect();
        let mut held = vec![BTreeSet::new(); candidates.len()];
        for (partition, list) in lists.iter().enumerate() {
            for &node in list {
                held[node].insert(partition);
            }
        }
        Board {
            candidates,
            rules: Rules::new(candidates, wanted),
            pinned,
            ring: Ring::new(candidates.iter().map(|candidate| candidate.node)),
            home: lists.clone(),
            lists,
            held,
            quota: Vec::new(),
            hopeless: vec![false; candidates.len()],
        }
    }

    fn loads(&self) -> Vec<usize> {
        self.held.iter().map(BTreeSet::len).collect()
    }

    /// Takes away what breaks a rule, from the nodes that hold most.
    fn trim(&mut self) {
        for partition in 0..self.lists.len() {
            while !self.pinned[partition] {
                let list = &self.lists[partition];
                let crowded = |node: usize| {
                    list.iter().filter(|&&other| self.same_zone(node, other)).count()
                        > self.rules.zone_cap
                };
                let broken = |&node: &usize| list.len() > self.rules.wanted || crowded(node);
                let worst = |&node: &usize| (crowded(node), self.held[node].len());
                let Some(node) = list.iter().copied().filter(broken).max_by_key(worst) else {
                    break;
                };
                self.lists[partition].retain(|&other| other != node);
                self.held[node].remove(&partition);
            }
        }
    }

    /// Gives partitions what they lack: to each the first nodes on the ring that are not full.
    fn place_along_the_ring(&mut self) {
        for partition in 0..self.lists.len() {
            while self.lacks(partition) {
                let Some(to) = self.nearest(partition, None) else { break };
                self.apply(Leg { partition, from: None, to });
            }
        }
    }

    /// Takes from nodes above their quota the partitions that have the shortest way, on the ring, to a
    /// node below its own.
    fn shed_along_the_ring(&mut self) {
        for from in 0..self.candidates.len() {
            if self.excess(from) == 0 {
                continue;
            }
            let steps = |partition: usize| {
                let mut walk = self.ring.walk(number(partition));
                let step = walk
                    .position(|to| self.below_quota(to) && self.accepts(partition, Some(from), to));
                step.map(|step| (step, partition))
            };
            let mut offers: Vec<(usize, usize)> = self.movable(from).filter_map(steps).collect();
            offers.sort_unstable();
            for (_, partition) in offers {
                if self.excess(from) == 0 {
                    break;
                }
                if let Some(to) = self.nearest(partition, Some(from)) {
                    self.apply(Leg { partition, from: Some(from), to });
                }
            }
        }
    }

    /// Gives partitions what they still lack, by moving others out of the way; where that cannot be
    /// either, past the quota.
    fn place_by_chains(&mut self) {
        for partition in 0..self.lists.len() {
            while self.lacks(partition) {
                if self.apply_chain(Start::Partition(partition)) {
                    continue;
                }
                let accepting = |&to: &usize| self.accepts(partition, None, to);
                let ways = (0..self.candidates.len()).filter(accepting);
                let Some(to) = ways.min_by_key(|&to| self.held[to].len()) else { break };
                self.apply(Leg { partition, from: None, to });
            }
        }
    }

    /// Takes from nodes above their quota what has no direct way to a node below its own.
    fn shed_by_chains(&mut self) {
        for from in 0..self.candidates.len() {
            while self.excess(from) > 0 && !self.hopeless[from] {
                if !self.apply_chain(Start::Node(from)) {
                    self.hopeless[from] = true;
                }
            }
        }
    }

    fn apply_chain(&mut self, start: Start) -> bool {
        // The chain with the fewest moves may have two legs of one partition that are possible alone
        // only. The shortest one has not: the first could have gone where the second goes.
        for few in [Few::Moves, Few::Legs] {
            match chain::find(self, start, few) {
                Ok(legs) if self.apply_all(&legs) => return true,
                Ok(_) => {}
                Err(reached) => {
                    for node in reached {
                        self.hopeless[node] = true;
                    }
                    return false;
                }
            }
        }
        false
    }

    /// The partitions that a node may lose.
    fn movable(&self, node: usize) -> impl Iterator<Item = usize> {
        self.held[node].iter().copied().filter(|&partition| !self.pinned[partition])
    }

    /// The first node on the ring that is below its quota and may have the partition.
    fn nearest(&self, partition: usize, from: Option<usize>) -> Option<usize> {
        let mut walk = self.ring.walk(number(partition));
        walk.find(|&to| self.below_quota(to) && self.accepts(partition, from, to))
    }

    /// Whether a node may have a partition by every rule but the quota, once it is gone from another.
    fn accepts(&self, partition: usize, from: Option<usize>, to: usize) -> bool {
        let has = self.lists[partition].contains(&to);
        self.candidates[to].open && !has && !self.is_crowded(partition, from, to)
    }

    /// Whether a node's zone has all it may of a partition, apart from what is on another node.
    fn is_crowded(&self, partition: usize, from: Option<usize>, to: usize) -> bool {
        let others = self.lists[partition].iter().filter(|&&node| Some(node) != from);
        others.filter(|&&node| self.same_zone(node, to)).count() >= self.rules.zone_cap
    }

    fn same_zone(&self, one: usize, other: usize) -> bool {
        let zone = self.candidates[one].zone;
        zone.is_some() && zone == self.candidates[other].zone
    }

    fn lacks(&self, partition: usize) -> bool {
        !self.pinned[partition] && self.lists[partition].len() < self.rules.wanted
    }

    fn below_quota(&self, node: usize) -> bool {
        self.held[node].len() < self.quota[node]
    }

    fn excess(&self, node: usize) -> usize {
        self.held[node].len().saturating_sub(self.quota[node])
    }

    fn apply(&mut self, leg: Leg) {
        if let Some(from) = leg.from {
            self.lists[leg.partition].retain(|&node| node != from);
            self.held[from].remove(&leg.partition);
        }
        self.lists[leg.partition].push(leg.to);
        self.held[leg.to].insert(leg.partition);
    }

    /// All of the legs, or none if one of them is in another's way.
    fn apply_all(&mut self, legs: &[Leg]) -> bool {
        let before: Vec<Vec<usize>> =
            legs.iter().map(|leg| self.lists[leg.partition].clone()).collect();
        for (done, &leg) in legs.iter().enumerate() {
            if !self.accepts(leg.partition, leg.from, leg.to) {
                for (leg, list) in legs[..done].iter().zip(before).rev() {
                    self.held[leg.to].remove(&leg.partition);
                    leg.from.map(|from| self.held[from].insert(leg.partition));
                    self.lists[leg.partition] = list;
                }
                return false;
            }
            self.apply(leg);
        }
        true
    }
}

fn number(partition: usize) -> PartitionId {
    PartitionId(u16::try_from(partition).unwrap_or(u16::MAX))
}
