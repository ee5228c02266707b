//! The controller: runs on every node and acts on the elected one. It creates the cluster, and keeps
//! the placement map as the nodes that are there need it.
//!
//! It only ever writes the map and asks leaders to hand over; partitions' leaders carry the map out. It
//! keeps nothing that a successor would miss: the map and the nodes' answers say all there is to know.
//! What should be where is decided in `flux_core::placement`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flux_core::placement::{
    self, Limits, NodeId, Nodes, PartitionStatus, Placeable, PlacementMap, Reason, ReplicaId, Step,
    Timing,
};
use flux_core::{PartitionId, Partitions};
use tokio::sync::watch;
use tokio::time::Instant;

use super::control::Core;
use super::data_plane::PartitionRole;
use super::format::StoredMap;
use super::registry::{Placement, Registration, RegistryState, Snapshot};
use super::report::{self, Answers};
use super::setup;
use super::topology::Topology;
use crate::config::Settings;
use crate::data_dir::random_u64;

/// How often it looks while something is going on.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often it looks when all was well the last time.
const QUIET_INTERVAL: Duration = Duration::from_secs(5);
/// How long no new node has come before a cluster is created.
const SETTLING_TIME: Duration = Duration::from_secs(1);
/// Partitions of a new cluster when nobody asked for a number.
const DEFAULT_PARTITIONS: u32 = 64;
/// The longest map that is written: etcd takes requests of 1.5 MiB.
const MAX_MAP_BYTES: usize = 1_400_000;
/// Leaderships that are asked to move at one time, at least, and which part of all.
const MIN_TRANSFERS: usize = 8;
const TRANSFERRED_PART: usize = 8;
/// How long a leadership that did not move is left where it is.
const TRANSFER_PAUSE: Duration = Duration::from_secs(15);
/// A replica that is so many entries behind does not become leader: writes wait while it catches up.
const MAX_LAG: u64 = 1000;

/// Acts whenever this node is the elected controller.
pub(super) async fn run(core: Arc<Core>, mut stopping: watch::Receiver<bool>) {
    let mut state = core.registry.state();
    loop {
        tokio::select! {
            elected = state.wait_for(|state| state.leads) => if elected.is_err() { return },
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        tracing::info!("this node is the cluster's controller");
        let mut controller = Controller::new(Arc::clone(&core));
        tokio::select! {
            () = controller.lead(&mut state) => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        tracing::info!("this node is not the cluster's controller any more");
    }
}

/// What one term of office remembers.
#[derive(Debug)]
struct Controller {
    core: Arc<Core>,
    /// The nodes that wait for a cluster, and since when they are these.
    gathering: Option<(BTreeSet<NodeId>, Instant)>,
    /// Nodes that the map names and nobody here has ever heard of, and since when.
    unheard: BTreeMap<NodeId, Instant>,
    /// When a partition's leadership was last asked to move.
    asked: BTreeMap<PartitionId, Instant>,
    /// The last complaint, so that it is made once.
    complaint: Option<String>,
}

impl Controller {
    fn new(core: Arc<Core>) -> Controller {
        Controller {
            core,
            gathering: None,
            unheard: BTreeMap::new(),
            asked: BTreeMap::new(),
            complaint: None,
        }
    }

    /// Returns when the node is not elected any more.
    async fn lead(&mut self, state: &mut watch::Receiver<RegistryState>) {
        let mut topology = self.core.topology.subscribe();
        loop {
            let current = state.borrow_and_update().clone();
            if !current.leads {
                return;
            }
            topology.mark_unchanged();
            let quiet = match current.snapshot.as_deref() {
                Some(snapshot) => self.look(snapshot).await,
                None => false,
            };
            tokio::time::sleep(INTERVAL).await;
            if quiet {
                tokio::select! {
                    () = tokio::time::sleep(QUIET_INTERVAL.saturating_sub(INTERVAL)) => {}
                    () = self.core.wake.notified() => {}
                    changed = topology.changed() => if changed.is_err() { return },
                    changed = state.wait_for(|state| !state.leads) => if changed.is_err() { return },
                }
            }
        }
    }

    /// Does what there is to do now. True if that is nothing.
    async fn look(&mut self, snapshot: &Snapshot) -> bool {
        if let Some(placement) = &snapshot.placement {
            let topology = Arc::clone(&self.core.topology.borrow());
            // What the node itself does not go by, it does not change either.
            let known = topology.placement().is_some_and(|known| known == *placement);
            return known && self.steer(&topology, placement).await;
        }
        if snapshot.unreadable.is_none() {
            self.bootstrap(snapshot).await;
        }
        false
    }

    /// Creates the cluster, when enough nodes have come and none of them has been part of one.
    async fn bootstrap(&mut self, snapshot: &Snapshot) {
        let topology = Arc::clone(&self.core.topology.borrow());
        let known = topology.cluster_id.is_some() || topology.map.is_some();
        if known || snapshot.nodes.values().any(|node| node.cluster_id.is_some()) {
            return;
        }
        let (timing, nodes) = self.founders(snapshot);
        let now = Instant::now();
        let since = match &self.gathering {
            Some((gathered, since)) if *gathered == nodes => *since,
            _ => now,
        };
        let settings = &self.core.setup.settings;
        let (count, factor) = (nodes.len(), settings.replication_factor);
        self.gathering = Some((nodes.clone(), since));
        if count < usize::from(factor) || now.duration_since(since) < SETTLING_TIME {
            return;
        }
        let map = match first_map(settings, timing, &nodes, snapshot) {
            Ok(map) => map,
            Err(reason) => {
                self.complain(format!("cannot create the cluster: {reason}"));
                return;
            }
        };
        let (cluster, partitions) = (map.cluster_id, map.partitions);
        match self.core.registry.write(&Placement { epoch: 1, map: map.into() }, None).await {
            Ok(true) => tracing::info!(
                cluster = format!("{cluster:016x}"),
                nodes = count,
                partitions,
                replication_factor = factor,
                "cluster created"
            ),
            // Somebody else was faster.
            Ok(false) => {}
            Err(error) => self.complain(format!("cannot create the cluster yet: {error}")),
        }
    }

    /// The nodes that a cluster can be made of: the most that reckon leases alike, and how they do.
    fn founders(&mut self, snapshot: &Snapshot) -> (Timing, BTreeSet<NodeId>) {
        let own = setup::timing(&self.core.setup.settings);
        let mut alike: Vec<(Timing, BTreeSet<NodeId>)> = vec![(own, BTreeSet::new())];
        for (&node, registration) in &snapshot.nodes {
            let timing = registration.timing.unwrap_or(own);
            match alike.iter_mut().find(|(other, _)| *other == timing) {
                Some((_, nodes)) => _ = nodes.insert(node),
                None => alike.push((timing, [node].into())),
            }
        }
        // Of as many those that are like this node, which stand first.
        let most = alike.iter().rev().max_by_key(|(_, nodes)| nodes.len());
        let (timing, founders) = most.cloned().expect("it has this node's at least");
        if let Some((other, nodes)) = alike.iter().find(|(other, _)| *other != timing) {
            let names: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
            self.complain(format!(
                "not counted for the new cluster: {}, with election_timeout_ms {} and clock_drift_percent {}. \
                 Most nodes have {} and {}, and leases need the same on every node",
                names.join(", "),
                other.election_timeout_ms,
                other.clock_drift_percent,
                timing.election_timeout_ms,
                timing.clock_drift_percent,
            ));
        }
        (timing, founders)
    }

    /// Takes the next steps towards where replicas and leaders should be. True if there are none, and
    /// none is under way.
    async fn steer(&mut self, topology: &Topology, placement: &Placement) -> bool {
        let map = &*placement.map;
        let answers = report::ask_all(&self.core, topology).await;
        let nodes = self.nodes(topology, map, &answers);
        let leaders = report::leaders(&answers);
        let statuses: Vec<PartitionStatus> =
            leaders.values().map(|leader| leader.status()).collect();
        let limits = Limits { max_moves: self.core.setup.settings.move_concurrency };
        let steps = placement::plan(map, &nodes, &statuses, &limits);
        if !steps.is_empty() {
            self.write(placement, &steps).await;
            return false;
        }
        let transfers = self.transfer(topology, map, &nodes, &statuses, &answers).await;
        let settled = report::partitions(map, &answers)
            .iter()
            .all(|report| report.state == report::PartitionState::Ok);
        settled && transfers == 0
    }

    /// Who can have replicas, and who is lost.
    fn nodes(&mut self, topology: &Topology, map: &PlacementMap, answers: &Answers) -> Nodes {
        let place = |registration: &Registration| Placeable {
            node: registration.node,
            zone: registration.zone.clone(),
        };
        let patience = Duration::from_secs(self.core.setup.settings.replace_after_s);
        let mut nodes = Nodes::default();
        for (&node, member) in &topology.members {
            let registration = &member.registration;
            let lost = member.away_since.is_some_and(|since| since.elapsed() >= patience);
            if member.alive {
                // One that has not joined yet cannot be given anything.
                if registration.cluster_id == Some(map.cluster_id) {
                    nodes.up.push(place(registration));
                }
            } else if lost && !answers.contains_key(&node) {
                nodes.dead.insert(node);
            } else {
                nodes.away.push(place(registration));
            }
        }
        let named: BTreeSet<NodeId> =
            map.targets.iter().flatten().map(|replica| replica.node()).collect();
        self.unheard.retain(|node, _| named.contains(node));
        for node in named.into_iter().filter(|node| !topology.members.contains_key(node)) {
            if self.unheard.entry(node).or_insert_with(Instant::now).elapsed() >= patience {
                nodes.dead.insert(node);
            }
        }
        // A node that came back as another has lost its data: nobody needs to wait for the old one.
        let replaced = topology.members.values().filter(|member| member.alive);
        for old in replaced.filter_map(|member| member.registration.replaces) {
            if !topology.members.get(&old).is_some_and(|member| member.alive) {
                nodes.dead.insert(old);
            }
        }
        nodes.away.retain(|place| !nodes.dead.contains(&place.node));
        nodes
    }

    /// Writes the steps, unless somebody has changed the map: the next look sees what they left.
    async fn write(&mut self, placement: &Placement, steps: &[Step]) {
        let mut map = PlacementMap::clone(&placement.map);
        for step in steps {
            map.apply(step);
        }
        if let Err(error) = map.validate() {
            self.complain(format!("the next placement map would be wrong: {error}"));
            return;
        }
        let new = Placement { epoch: placement.epoch + 1, map: map.into() };
        match self.core.registry.write(&new, Some(placement.epoch)).await {
            Ok(true) => steps.iter().for_each(log),
            Ok(false) => tracing::debug!(epoch = placement.epoch, "the map has changed meanwhile"),
            Err(error) => self.complain(format!("cannot change the placement map: {error}")),
        }
    }

    /// Asks leaders to hand over where another replica should lead. Returns how many were asked.
    async fn transfer(
        &mut self,
        topology: &Topology,
        map: &PlacementMap,
        nodes: &Nodes,
        statuses: &[PartitionStatus],
        answers: &Answers,
    ) -> usize {
        self.asked.retain(|_, at| at.elapsed() < TRANSFER_PAUSE);
        let wanted = placement::leader_transfers(map, nodes, statuses, usize::from(map.partitions));
        let most = MIN_TRANSFERS.max(usize::from(map.partitions) / TRANSFERRED_PART);
        let mut begun = 0;
        for transfer in wanted {
            if begun == most {
                break;
            }
            let placement::Transfer { partition, from, to } = transfer;
            if self.asked.contains_key(&partition) || !is_ready(answers, transfer) {
                continue;
            }
            begun += 1;
            self.asked.insert(partition, Instant::now());
            let (from, to) = (from.node(), to.node());
            match self.core.ask_to_transfer(topology, from, partition, to).await {
                Ok(()) => tracing::debug!(%partition, %from, %to, "leadership moves"),
                Err(error) => {
                    tracing::debug!(%partition, %from, %to, %error, "leadership does not move");
                }
            }
        }
        begun
    }

    /// Logs what keeps the controller from its work, once as long as it stays the same.
    fn complain(&mut self, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            tracing::error!("{complaint}");
            self.complaint = Some(complaint);
        }
    }
}

/// Whether the replica that should lead could do so at once.
fn is_ready(answers: &Answers, transfer: placement::Transfer) -> bool {
    let find = |replica: ReplicaId| {
        let mut partitions = answers.get(&replica.node())?.partitions.iter();
        partitions.find(|local| local.replica == replica)
    };
    let (Some(from), Some(to)) = (find(transfer.from), find(transfer.to)) else {
        return false;
    };
    to.role == PartitionRole::Follower
        && to.term == from.term
        && from.commit.saturating_sub(to.applied) <= MAX_LAG
}

fn log(step: &Step) {
    let Step { partition, reason, added, removed, .. } = step;
    let name = |replica: &Option<ReplicaId>| {
        replica.map_or("-".to_owned(), |replica| replica.node().to_string())
    };
    if *reason == Reason::Leader {
        tracing::debug!(%partition, "another replica is to lead");
        return;
    }
    let (to, from) = (name(added), name(removed));
    tracing::info!(%partition, ?reason, from, to, "a replica moves");
}

/// The map that a cluster of these registered nodes begins with.
fn first_map(
    settings: &Settings,
    timing: Timing,
    nodes: &BTreeSet<NodeId>,
    snapshot: &Snapshot,
) -> Result<PlacementMap, String> {
    let Settings { replication_factor: factor, partitions, .. } = *settings;
    let count = if partitions == 0 { DEFAULT_PARTITIONS } else { partitions };
    let partitions = u16::try_from(count).ok().and_then(Partitions::new);
    let partitions = partitions.ok_or_else(|| format!("{count} partitions cannot be"))?;
    let place = |registration: &Registration| Placeable {
        node: registration.node,
        zone: registration.zone.clone(),
    };
    let registrations = nodes.iter().filter_map(|node| snapshot.nodes.get(node));
    let nodes: Vec<Placeable> = registrations.map(place).collect();
    let layout = placement::desired(&nodes, partitions, factor, None);
    let cluster = random_u64().map_err(|error| error.to_string())?.max(1);
    let mut map = PlacementMap::new(cluster, factor, &layout).map_err(|error| error.to_string())?;
    map.timing = Some(timing);
    let bytes = StoredMap::encode(u64::MAX, &map).len();
    if bytes > MAX_MAP_BYTES {
        return Err(format!(
            "a map of {count} partitions with {factor} replicas each has {bytes} bytes, more than etcd takes: \
             set partitions to a quarter of it"
        ));
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::most_partitions;

    #[test]
    fn the_largest_map_that_the_settings_allow_can_be_written() {
        for factor in [1, 3, 5, 7] {
            let nodes: Vec<NodeId> = (0..u32::from(factor)).map(|n| NodeId(u32::MAX - n)).collect();
            let bytes = |partitions: u32| {
                let layout = vec![nodes.clone(); partitions as usize];
                let map = PlacementMap::new(u64::MAX, factor, &layout).expect("a valid map");
                StoredMap::encode(u64::MAX, &map).len()
            };
            let most = most_partitions(factor);
            assert!(bytes(most) <= MAX_MAP_BYTES, "{factor}");
            assert!(most == 16384 || bytes(2 * most) > MAX_MAP_BYTES, "{factor}");
        }
    }
}
