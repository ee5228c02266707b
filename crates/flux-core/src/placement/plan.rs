//! The controller's next steps: how the targets of a few partitions should change now.
//!
//! Each step changes a partition's target by one replica. Its leader carries that out: a learner that
//! catches up, a joint configuration, the old replica's end. Nothing is remembered from plan to plan:
//! whether a step is done shows in what the leaders report.
//!
//! How a step is carried out, when a node counts as dead, and how the map is written are not decided here.

use std::collections::{BTreeMap, BTreeSet};

use super::fleet::{Fleet, Stage, groups, nodes_of};
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
