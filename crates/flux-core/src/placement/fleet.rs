//! What a plan knows of the nodes and the groups, and the next change that each group needs.
//!
//! In what order changes are made, and how many, is not decided here.

use std::collections::{BTreeMap, BTreeSet};

use super::arrange::{Candidate, arrange, number_zones};
use super::id::{NodeId, ReplicaId};
use super::map::{PlacementMap, numbered};
use super::plan::{Nodes, Reason, Step};
use super::{PartitionStatus, Placeable};
use crate::slot::PartitionId;

/// How far a partition is on the way to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody is known to lead it.
    Dark,
    /// Its leader has something left to do.
    Moving,
    /// It waits for a replica that cannot come.
    Stalled,
    /// It is as its target says.
    Settled,
}

/// A partition as a plan sees it.
pub(super) struct Group<'a> {
    pub(super) partition: PartitionId,
    pub(super) target: &'a [ReplicaId],
    pub(super) status: Option<&'a PartitionStatus>,
    pub(super) stage: Stage,
    /// What a new target starts from: the old one, or the voters where that is stalled.
    pub(super) replicas: Vec<ReplicaId>,
}

pub(super) fn groups<'a>(
    map: &'a PlacementMap,
    fleet: &Fleet<'_>,
    statuses: &'a [PartitionStatus],
) -> Vec<Group<'a>> {
    let statuses: BTreeMap<PartitionId, &PartitionStatus> =
        statuses.iter().map(|status| (status.partition, status)).collect();
    let group = |(partition, target): (PartitionId, &'a Vec<ReplicaId>)| {
        let status = statuses.get(&partition).copied().filter(|status| status.leader.is_some());
        let stage = status.map_or(Stage::Dark, |status| fleet.stage(target, status));
        let mut replicas = target.clone();
        if let Some(status) = status.filter(|_| stage == Stage::Stalled) {
            replicas.retain(|replica| status.voters.contains(replica));
            replicas.extend(status.voters.iter().filter(|voter| !target.contains(voter)));
        }
        Group { partition, target, status, stage, replicas }
    };
    numbered(&map.targets).map(group).collect()
}

/// A change of one replica that a partition needs.
pub(super) struct Change<'a> {
    pub(super) group: &'a Group<'a>,
    pub(super) reason: Reason,
    goes: Option<ReplicaId>,
    pub(super) comes: Option<NodeId>,
}

impl Change<'_> {
    /// The new replica stands where the old one stood.
    pub(super) fn step(&self, added: Option<ReplicaId>) -> Step {
        let mut target = self.group.replicas.clone();
        let place = self.goes.and_then(|goes| target.iter().position(|&replica| replica == goes));
        let place = place.unwrap_or(target.len());
        target.splice(place..(place + 1).min(target.len()), added);
        let removed = self.group.target.iter().copied().find(|replica| !target.contains(replica));
        Step { partition: self.group.partition, reason: self.reason, added, removed, target }
    }
}

/// The nodes as a plan asks for them.
pub(super) struct Fleet<'a> {
    map: &'a PlacementMap,
    nodes: &'a Nodes,
    up: BTreeSet<NodeId>,
    zones: BTreeMap<NodeId, usize>,
}

impl<'a> Fleet<'a> {
    pub(super) fn new(map: &'a PlacementMap, nodes: &'a Nodes) -> Fleet<'a> {
        let places = || nodes.up.iter().chain(&nodes.away);
        let numbers = number_zones(places());
        let zone =
            |place: &Placeable| numbers.get(place.zone.as_str()).map(|&zone| (place.node, zone));
        let up = nodes.up.iter().map(|place| place.node).collect();
        Fleet { map, nodes, up, zones: places().filter_map(zone).collect() }
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.up.contains(&node)
    }

    pub(super) fn is_dead(&self, node: NodeId) -> bool {
        !self.is_up(node) && self.nodes.dead.contains(&node)
    }

    fn is_away(&self, node: NodeId) -> bool {
        !self.is_up(node) && !self.nodes.dead.contains(&node)
    }

    pub(super) fn is_draining(&self, node: NodeId) -> bool {
        self.map.draining.contains(&node)
    }

    pub(super) fn may_take_over(&self, node: NodeId) -> bool {
        self.is_up(node) && !self.is_draining(node)
    }

    pub(super) fn count_up(&self, replicas: &[ReplicaId]) -> usize {
        replicas.iter().filter(|replica| self.is_up(replica.node())).count()
    }

    /// Whether a partition that nobody leads will find a leader when the nodes that are away are back.
    pub(super) fn can_recover(&self, group: &Group<'_>) -> bool {
        let dead = group.target.iter().filter(|replica| self.is_dead(replica.node())).count();
        group.target.len() - dead >= quorum(group.target.len())
    }

    fn stage(&self, target: &[ReplicaId], status: &PartitionStatus) -> Stage {
        let coming: Vec<ReplicaId> =
            target.iter().copied().filter(|replica| !status.voters.contains(replica)).collect();
        // A node has one replica of a partition at a time: none can come where a voter is.
        let is_taken = |node: NodeId| status.voters.iter().any(|voter| voter.node() == node);
        let cannot_come = |replica: &ReplicaId| {
            let node = replica.node();
            self.is_dead(node) || is_taken(node) || !replica.may_join(&status.voters)
        };
        if status.changing {
            Stage::Moving
        } else if coming.iter().any(cannot_come) {
            Stage::Stalled
        } else if coming.is_empty()
            && status.voters.len() == target.len()
            && status.learners.is_empty()
        {
            Stage::Settled
        } else {
            Stage::Moving
        }
    }

    /// Whether this plan leaves a partition as it is: it waits for a node that may come back, moves already, or
    /// nobody is known to lead it.
    fn pins(&self, group: &Group<'_>) -> bool {
        let any =
            |is: &dyn Fn(NodeId) -> bool| group.replicas.iter().any(|replica| is(replica.node()));
        let waits = any(&|node| self.is_away(node)) && !any(&|node| self.is_dead(node));
        waits || matches!(group.stage, Stage::Dark | Stage::Moving)
    }

    /// Everyone who has or may get replicas: not the draining and the dead.
    fn candidates(&self, groups: &[Group<'_>]) -> Vec<Candidate> {
        let mut nodes = self.up.clone();
        nodes.extend(groups.iter().flat_map(|group| nodes_of(&group.replicas)));
        nodes.extend(self.nodes.away.iter().map(|place| place.node));
        nodes.retain(|&node| !self.is_dead(node) && !self.is_draining(node));
        let candidate =
            |node| Candidate { node, zone: self.zones.get(&node).copied(), open: self.is_up(node) };
        nodes.into_iter().map(candidate).collect()
    }

    /// What each partition needs next.
    pub(super) fn changes<'g>(&self, groups: &'g [Group<'g>], wanted: usize) -> Vec<Change<'g>> {
        let current: Vec<Vec<NodeId>> =
            groups.iter().map(|group| nodes_of(&group.replicas)).collect();
        let pinned: Vec<bool> = groups.iter().map(|group| self.pins(group)).collect();
        let lists = arrange(self.candidates(groups), wanted, &current, &pinned);
        let mut changes = Vec::new();
        for (group, list) in groups.iter().zip(&lists) {
            let stalled = group.stage == Stage::Stalled;
            if !stalled && group.stage != Stage::Settled {
                continue;
            }
            match self.change(group, list, wanted).filter(|change| self.is_safe(change)) {
                Some(change) if stalled => {
                    changes.push(Change { reason: Reason::Stalled, ..change });
                }
                Some(change) => changes.push(change),
                None if stalled => {
                    changes.push(Change {
                        group,
                        reason: Reason::Stalled,
                        goes: None,
                        comes: None,
                    });
                }
                None => {}
            }
        }
        changes
    }

    /// The first of the changes that lead from a partition's replicas to a list of nodes.
    fn change<'g>(
        &self,
        group: &'g Group<'g>,
        list: &[NodeId],
        wanted: usize,
    ) -> Option<Change<'g>> {
        let reason = |replica: &ReplicaId| match replica.node() {
            node if self.is_dead(node) => Reason::Dead,
            node if self.is_draining(node) => Reason::Draining,
            _ => Reason::Balance,
        };
        let gone = group.replicas.iter().copied().filter(|replica| !list.contains(&replica.node()));
        let goes = gone.min_by_key(reason);
        let stays = |node: NodeId| group.replicas.iter().any(|replica| replica.node() == node);
        // One at a time: of several, one whose zone no replica that is still there is in.
        let mates = |node: &NodeId| {
            let others = group.replicas.iter().filter(|&&replica| Some(replica) != goes);
            others.filter(|other| self.zones.get(&other.node()) == self.zones.get(node)).count()
        };
        let comes = list.iter().copied().filter(|&node| !stays(node)).min_by_key(mates);
        let reason = goes.as_ref().map(reason);
        let have = group.replicas.len();
        match (goes, comes, reason) {
            (None, None, _) => None,
            (Some(_), _, Some(Reason::Dead)) if have > wanted => {
                Some(Change { group, reason: Reason::Dead, goes, comes: None })
            }
            (Some(_), _, _) if have > wanted => {
                Some(Change { group, reason: Reason::Surplus, goes, comes: None })
            }
            (Some(_), None, _) => None,
            (_, Some(_), Some(reason)) if reason == Reason::Dead || have == wanted => {
                Some(Change { group, reason, goes, comes })
            }
            (_, Some(_), _) => Some(Change { group, reason: Reason::Missing, goes: None, comes }),
        }
    }

    /// Whether a quorum is up now and when the change is done.
    fn is_safe(&self, change: &Change<'_>) -> bool {
        let up_and_all = |replicas: &[ReplicaId]| (self.count_up(replicas), replicas.len());
        let (voters_up, voters) =
            change.group.status.map_or((0, 0), |status| up_and_all(&status.voters));
        let (mut up, mut all) = up_and_all(&change.group.replicas);
        if let Some(goes) = change.goes {
            up -= usize::from(self.is_up(goes.node()));
            all -= 1;
        }
        if change.comes.is_some() {
            up += 1;
            all += 1;
        }
        voters_up >= quorum(voters) && up >= quorum(all)
    }
}

pub(super) fn nodes_of(replicas: &[ReplicaId]) -> Vec<NodeId> {
    replicas.iter().map(|replica| replica.node()).collect()
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}
