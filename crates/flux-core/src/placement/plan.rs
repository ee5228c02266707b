//! The controller's next steps: how the targets of a few partitions should change now.
//!
//! Each step changes a partition's target by one replica. Its leader carries that out: a learner that
//! catches up, a joint configuration, the old replica's end. Nothing is remembered from plan to plan:
//! whether a step is done shows in what the leaders report.
//!
//! How a step is carried out, when a node counts as dead, and how the map is written are not decided here.

use std::collections::{BTreeMap, BTreeSet};

use super::arrange::{Candidate, arrange, number_zones};
use super::id::{NodeId, ReplicaId};
use super::map::{PlacementMap, numbered};
use super::{PartitionStatus, Placeable, leaders};
use crate::slot::PartitionId;

/// What is known of the nodes. One that is named nowhere here is away, and its zone is not known.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    /// Those that are registered, the draining ones too.
    pub up: Vec<Placeable>,
    /// Those that are not, but may be back. They keep what they have and get nothing.
    pub away: Vec<Placeable>,
    /// Those that have been away for so long that their replicas are to be replaced.
    pub dead: BTreeSet<NodeId>,
}

/// How much may be under way at one time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Partitions whose replicas are not yet as their target says.
    pub max_moves: usize,
}

/// A change to the target of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The partition.
    pub partition: PartitionId,
    /// Why.
    pub reason: Reason,
    /// The replica that comes, if one does. Its sequence number is the map's next.
    pub added: Option<ReplicaId>,
    /// The replica that goes, if one does.
    pub removed: Option<ReplicaId>,
    /// The new target, the one that should lead first.
    pub target: Vec<ReplicaId>,
}

/// Why a target changes. What comes first is done first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The replica that was to come cannot: its node died, or it has been here before.
    Stalled,
    /// A replica's node is dead.
    Dead,
    /// There are fewer replicas than there should be.
    Missing,
    /// A replica's node is draining.
    Draining,
    /// There are more replicas than there should be.
    Surplus,
    /// Nodes should hold equally many replicas, in the right zones.
    Balance,
    /// Another replica should lead; nothing else changes.
    Leader,
    /// An operator asked for it.
    Requested,
}

/// A leadership to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The partition.
    pub partition: PartitionId,
    /// Who leads it.
    pub from: ReplicaId,
    /// Who should.
    pub to: ReplicaId,
}

/// The steps to take now, in the order in which [`PlacementMap::apply`] must see them.
///
/// Repairs come first, and of those the ones with the fewest replicas left; then what is draining, then
/// balance. A replica is replaced only where the partition's leader reports the target as reached, and
/// with a quorum up before and after. A partition with a replica that is away is left alone until that
/// one is back or dead. What has nowhere to go stays, on a dead or draining node too.
///
/// `statuses` has the word of each partition's leader; of several for one partition the last counts.
/// A partition without one may be under way as far as anyone knows: it counts against `max_moves`, but
/// not for repairs, and not when most of its nodes are dead and it can only wait for them.
pub fn plan(
    map: &PlacementMap,
    nodes: &Nodes,
    statuses: &[PartitionStatus],
    limits: &Limits,
) -> Vec<Step> {
    let fleet = Fleet::new(map, nodes);
    let groups = groups(map, &fleet, statuses);
    let mut changes = fleet.changes(&groups, map.replication_factor.into());
    changes.sort_by_key(|change| {
        (change.reason, fleet.count_up(&change.group.replicas), change.group.partition)
    });
    let count = |stage: Stage| groups.iter().filter(|group| group.stage == stage).count();
    let mut under_way = count(Stage::Moving) + count(Stage::Stalled);
    let in_the_dark = groups
        .iter()
        .filter(|group| group.stage == Stage::Dark && fleet.can_recover(group))
        .count();
    let mut steps = Vec::new();
    let mut next = map.next_sequence;
    for change in changes {
        let allowed = match change.reason {
            Reason::Stalled => true,
            Reason::Dead | Reason::Missing => under_way < limits.max_moves,
            _ => under_way + in_the_dark < limits.max_moves,
        };
        // The last sequence number is never given out, so that the counter cannot run over.
        if !allowed || change.comes.is_some() && next == u32::MAX {
            continue;
        }
        under_way += usize::from(change.reason != Reason::Stalled);
        let added = change.comes.map(|node| ReplicaId::new(node, next));
        next += u32::from(added.is_some());
        steps.push(change.step(added));
    }
    let leaders = new_leaders(map, &fleet, &mut steps);
    steps.extend(leaders);
    steps
}

/// Up to `limit` leaderships to move to the replicas that the map prefers, from the nodes that lead most
/// to those that lead least. Only where nothing else is under way and the preferred replica is up.
pub fn leader_transfers(
    map: &PlacementMap,
    nodes: &Nodes,
    statuses: &[PartitionStatus],
    limit: usize,
) -> Vec<Transfer> {
    let fleet = Fleet::new(map, nodes);
    let mut led: BTreeMap<NodeId, i64> = BTreeMap::new();
    let mut waiting = Vec::new();
    for group in groups(map, &fleet, statuses) {
        let Some(from) = group.status.and_then(|status| status.leader) else { continue };
        *led.entry(from.node()).or_default() += 1;
        let preferred = group.target.first().copied().filter(|to| fleet.may_take_over(to.node()));
        if let Some(to) = preferred.filter(|&to| to != from && group.stage == Stage::Settled) {
            waiting.push(Transfer { partition: group.partition, from, to });
        }
    }
    let mut transfers = Vec::new();
    while transfers.len() < limit {
        let leads = |node: NodeId| led.get(&node).copied().unwrap_or(0);
        let gain = |transfer: &Transfer| leads(transfer.to.node()) - leads(transfer.from.node());
        let best = (0..waiting.len()).min_by_key(|&place| gain(&waiting[place]));
        let Some(transfer) = best.map(|place| waiting.remove(place)) else { break };
        *led.entry(transfer.from.node()).or_default() -= 1;
        *led.entry(transfer.to.node()).or_default() += 1;
        transfers.push(transfer);
    }
    transfers
}

/// How far a partition is on the way to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
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
struct Group<'a> {
    partition: PartitionId,
    target: &'a [ReplicaId],
    status: Option<&'a PartitionStatus>,
    stage: Stage,
    /// What a new target starts from: the old one, or the voters where that is stalled.
    replicas: Vec<ReplicaId>,
}

fn groups<'a>(
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
struct Change<'a> {
    group: &'a Group<'a>,
    reason: Reason,
    goes: Option<ReplicaId>,
    comes: Option<NodeId>,
}

impl Change<'_> {
    /// The new replica stands where the old one stood.
    fn step(&self, added: Option<ReplicaId>) -> Step {
        let mut target = self.group.replicas.clone();
        let place = self.goes.and_then(|goes| target.iter().position(|&replica| replica == goes));
        let place = place.unwrap_or(target.len());
        target.splice(place..(place + 1).min(target.len()), added);
        let removed = self.group.target.iter().copied().find(|replica| !target.contains(replica));
        Step { partition: self.group.partition, reason: self.reason, added, removed, target }
    }
}

/// The nodes as a plan asks for them.
struct Fleet<'a> {
    map: &'a PlacementMap,
    nodes: &'a Nodes,
    up: BTreeSet<NodeId>,
    zones: BTreeMap<NodeId, usize>,
}

impl<'a> Fleet<'a> {
    fn new(map: &'a PlacementMap, nodes: &'a Nodes) -> Fleet<'a> {
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

    fn is_dead(&self, node: NodeId) -> bool {
        !self.is_up(node) && self.nodes.dead.contains(&node)
    }

    fn is_away(&self, node: NodeId) -> bool {
        !self.is_up(node) && !self.nodes.dead.contains(&node)
    }

    fn is_draining(&self, node: NodeId) -> bool {
        self.map.draining.contains(&node)
    }

    fn may_take_over(&self, node: NodeId) -> bool {
        self.is_up(node) && !self.is_draining(node)
    }

    fn count_up(&self, replicas: &[ReplicaId]) -> usize {
        replicas.iter().filter(|replica| self.is_up(replica.node())).count()
    }

    /// Whether a partition that nobody leads will find a leader when the nodes that are away are back.
    fn can_recover(&self, group: &Group<'_>) -> bool {
        let dead = group.target.iter().filter(|replica| self.is_dead(replica.node())).count();
        group.target.len() - dead >= quorum(group.target.len())
    }

    fn stage(&self, target: &[ReplicaId], status: &PartitionStatus) -> Stage {
        let coming: Vec<ReplicaId> =
            target.iter().copied().filter(|replica| !status.voters.contains(replica)).collect();
        let cannot_come =
            |replica: &ReplicaId| self.is_dead(replica.node()) || !replica.may_join(&status.voters);
        if status.joint {
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

    /// Whether a partition is to stay as it is for now.
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
    fn changes<'g>(&self, groups: &'g [Group<'g>], wanted: usize) -> Vec<Change<'g>> {
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

/// Spreads the leaders of the targets as they will be: in the steps there are, and in more where nothing
/// else changes.
fn new_leaders(map: &PlacementMap, fleet: &Fleet<'_>, steps: &mut [Step]) -> Vec<Step> {
    let mut targets = map.targets.clone();
    for step in steps.iter() {
        targets[usize::from(step.partition.0)].clone_from(&step.target);
    }
    let lists: Vec<Vec<NodeId>> = targets.iter().map(|target| nodes_of(target)).collect();
    let places = leaders::spread(&lists, |node| !fleet.is_dead(node) && !fleet.is_draining(node));
    let mut changed: BTreeMap<PartitionId, Vec<ReplicaId>> = BTreeMap::new();
    for ((partition, target), place) in numbered(&targets).zip(places) {
        if place > 0 {
            let mut target = target.clone();
            target[..=place].rotate_right(1);
            changed.insert(partition, target);
        }
    }
    for step in steps {
        if let Some(target) = changed.remove(&step.partition) {
            step.target = target;
        }
    }
    let reason = Reason::Leader;
    changed
        .into_iter()
        .map(|(partition, target)| Step { partition, reason, added: None, removed: None, target })
        .collect()
}

fn nodes_of(replicas: &[ReplicaId]) -> Vec<NodeId> {
    replicas.iter().map(|replica| replica.node()).collect()
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}
