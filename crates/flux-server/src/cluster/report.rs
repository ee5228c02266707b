//! The cluster as an operator sees it: what all nodes say, put together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use flux_core::placement::{NodeId, PlacementMap, ReplicaId};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::control::Core;
use super::data_plane::{LocalPartition, NodePartitions, PartitionRole};
use super::format;
use super::http::{self, CallError};
use super::topology::{Member, Topology};

/// Nodes that are asked at one time.
const ASKED_AT_ONCE: usize = 64;

/// The answer to `GET /cluster/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The setting.
    pub cluster_name: String,
    /// The cluster, in hexadecimal, once there is one.
    #[serde(with = "format::optional_hex")]
    pub cluster_id: Option<u64>,
    /// Who answers.
    pub node: NodeId,
    /// The epoch of the map that it knows; 0 while there is none.
    pub epoch: u64,
    /// The elected controller.
    pub controller: Option<NodeId>,
    /// For how long the registry has been out of touch, if it is, in seconds.
    pub registry_away_s: Option<u64>,
    /// What is wrong with the registry, and what to do.
    pub trouble: Option<String>,
    /// The replicas that each partition is to have.
    pub replication_factor: u8,
    /// The nodes that are there.
    pub nodes_alive: usize,
    /// The nodes that are missed.
    pub nodes_away: usize,
    /// The nodes that are being emptied.
    pub nodes_draining: usize,
    /// How many partitions there are.
    pub partitions: usize,
    /// Those that have a leader.
    pub partitions_led: usize,
    /// Those with fewer working replicas than they are to have.
    pub partitions_under_replicated: usize,
    /// Those that are on their way to other nodes.
    pub partitions_moving: usize,
    /// Keys held; none while a partition has no leader, which alone could count its keys.
    pub keys: Option<u64>,
}

/// One of the answers to `GET /cluster/nodes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The node.
    pub node: NodeId,
    /// Whether it is registered.
    pub alive: bool,
    /// For how long it has been missed, in seconds, as the answering node has seen it.
    pub away_s: Option<u64>,
    /// Whether it says how its replicas stand.
    pub answers: bool,
    /// Whether it is being emptied.
    pub draining: bool,
    /// Whether it is the elected controller.
    pub controller: bool,
    /// Its zone; empty if unknown.
    pub zone: String,
    /// The version of its program.
    pub version: String,
    /// RESP and the native protocol.
    pub data_addr: SocketAddr,
    /// Links between nodes.
    pub peer_addr: SocketAddr,
    /// gRPC.
    pub grpc_addr: SocketAddr,
    /// HTTP for administration.
    pub admin_addr: SocketAddr,
    /// The replicas that it has; not known, as the other figures of what it has, if it does not answer.
    pub replicas: Option<usize>,
    /// The partitions that it leads.
    pub leads: Option<usize>,
    /// The replicas that it is to have, by the placement map.
    pub placed: usize,
    /// Keys in its replicas.
    pub keys: Option<u64>,
    /// Memory of keys and values.
    pub bytes: Option<u64>,
}

/// One of the answers to `GET /cluster/partitions?all`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionReport {
    /// The partition.
    pub partition: u16,
    /// How it is.
    pub state: PartitionState,
    /// The node that leads it.
    pub leader: Option<NodeId>,
    /// The leader's term; not known, as the other figures that the leader has, while there is none.
    pub term: Option<u64>,
    /// The last index that the leader knows to be committed.
    pub commit: Option<u64>,
    /// The leader's last revision.
    pub revision: Option<u64>,
    /// Keys, as the leader counts.
    pub keys: Option<u64>,
    /// Memory of keys and values, as the leader counts.
    pub bytes: Option<u64>,
    /// Its replicas, as far as their nodes say so.
    pub replicas: Vec<ReplicaReport>,
    /// The nodes that it is to be on, the one that should lead first.
    pub target: Vec<NodeId>,
}

/// How a partition is, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartitionState {
    /// Nobody leads it: it cannot be read or written.
    NoLeader,
    /// Some of its voters do not answer.
    UnderReplicated,
    /// It is on its way to other nodes.
    Moving,
    /// As it should be.
    Ok,
}

/// A replica as its node reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Its node.
    pub node: NodeId,
    /// Its id.
    pub replica: ReplicaId,
    /// What it does.
    pub role: PartitionRole,
    /// The last index that it has applied.
    pub applied: u64,
}

/// What the nodes answered. Those that did not are not in it.
pub(super) type Answers = BTreeMap<NodeId, NodePartitions>;

/// Asks all members how their replicas stand, those that are missed too.
pub(super) async fn ask_all(core: &Arc<Core>, topology: &Topology) -> Answers {
    let own = core.node();
    let mut answers = Answers::from([(own, core.local_partitions().await)]);
    let mut asked = JoinSet::new();
    let others = topology.members.values().map(|member| &member.registration);
    for other in others.filter(|other| other.node != own) {
        if asked.len() >= ASKED_AT_ONCE {
            collect(asked.join_next().await, &mut answers);
        }
        let (peers, node, address) = (Arc::clone(&core.peers), other.node, other.admin_addr);
        asked
            .spawn(async move { (node, http::get(&*peers, address, "/cluster/partitions").await) });
    }
    while let Some(answer) = asked.join_next().await {
        collect(Some(answer), &mut answers);
    }
    answers
}

type Answered = (NodeId, Result<NodePartitions, CallError>);

fn collect(answer: Option<Result<Answered, tokio::task::JoinError>>, answers: &mut Answers) {
    match answer {
        // Another node may have the address by now.
        Some(Ok((node, Ok(answer)))) if answer.node == node => {
            answers.insert(node, answer);
        }
        Some(Ok((node, Ok(_)))) => tracing::debug!(%node, "another node answers at its address"),
        Some(Ok((node, Err(error)))) => tracing::debug!(%node, %error, "no answer"),
        Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
        None => {}
    }
}

/// By partition, what its leader says: the one of the highest term, if several think they lead.
pub(super) fn leaders(answers: &Answers) -> BTreeMap<u16, &LocalPartition> {
    let mut leaders: BTreeMap<u16, &LocalPartition> = BTreeMap::new();
    let all = answers.values().flat_map(|answer| &answer.partitions);
    for local in all.filter(|local| local.role == PartitionRole::Leader) {
        let known = leaders.entry(local.partition).or_insert(local);
        if known.term < local.term {
            *known = local;
        }
    }
    leaders
}

/// Whether a group has exactly the voters that it is to have, and nothing else.
pub(super) fn is_settled(leader: &LocalPartition, target: &[ReplicaId]) -> bool {
    let set = |ids: &[ReplicaId]| ids.iter().copied().collect::<BTreeSet<_>>();
    leader.learners.is_empty() && !leader.changing && set(&leader.voters) == set(target)
}

/// Every partition of the map.
pub(super) fn partitions(map: &PlacementMap, answers: &Answers) -> Vec<PartitionReport> {
    let leaders = leaders(answers);
    let mut replicas: BTreeMap<u16, Vec<ReplicaReport>> = BTreeMap::new();
    for (node, answer) in answers {
        for local in &answer.partitions {
            let LocalPartition { replica, role, applied, .. } = *local;
            let report = ReplicaReport { node: *node, replica, role, applied };
            replicas.entry(local.partition).or_default().push(report);
        }
    }
    let report = |(partition, target): (u16, &Vec<ReplicaId>)| {
        let leader = leaders.get(&partition).copied();
        let replicas = replicas.remove(&partition).unwrap_or_default();
        let working = |voter: &ReplicaId| replicas.iter().any(|report| report.replica == *voter);
        let state = match leader {
            None => PartitionState::NoLeader,
            Some(leader) if !leader.voters.iter().all(working) => PartitionState::UnderReplicated,
            Some(leader) if !is_settled(leader, target) => PartitionState::Moving,
            Some(leader) if leader.voters.len() < usize::from(map.replication_factor) => {
                PartitionState::UnderReplicated
            }
            Some(_) => PartitionState::Ok,
        };
        PartitionReport {
            partition,
            state,
            leader: leader.map(|leader| leader.replica.node()),
            term: leader.map(|leader| leader.term),
            commit: leader.map(|leader| leader.commit),
            revision: leader.map(|leader| leader.revision),
            keys: leader.map(|leader| leader.keys),
            bytes: leader.map(|leader| leader.bytes),
            replicas,
            target: target.iter().map(|replica| replica.node()).collect(),
        }
    };
    (0..map.partitions).zip(&map.targets).map(report).collect()
}

/// Every member.
pub(super) fn nodes(topology: &Topology, answers: &Answers) -> Vec<NodeReport> {
    let report = |(node, member): (&NodeId, &Member)| {
        let registration = &member.registration;
        let local = answers.get(node).map(|answer| &answer.partitions);
        let leads = |local: &Vec<LocalPartition>| {
            local.iter().filter(|local| local.role == PartitionRole::Leader).count()
        };
        let map = topology.map.as_deref();
        let targets = map.map_or(&[][..], |map| &map.targets);
        let placed = targets.iter().flatten().filter(|replica| replica.node() == *node).count();
        NodeReport {
            node: *node,
            alive: member.alive,
            away_s: member.away_since.map(seconds),
            answers: local.is_some(),
            draining: map.is_some_and(|map| map.draining.contains(node)),
            controller: topology.controller == Some(*node),
            zone: registration.zone.clone(),
            version: registration.version.clone(),
            data_addr: registration.data_addr,
            peer_addr: registration.peer_addr,
            grpc_addr: registration.grpc_addr,
            admin_addr: registration.admin_addr,
            replicas: local.map(Vec::len),
            leads: local.map(leads),
            placed,
            keys: local.map(|local| local.iter().map(|local| local.keys).sum()),
            bytes: local.map(|local| local.iter().map(|local| local.bytes).sum()),
        }
    };
    topology.members.iter().map(report).collect()
}

/// The whole cluster in a few numbers.
pub(super) fn status(core: &Core, topology: &Topology, answers: &Answers) -> ClusterStatus {
    let settings = &core.setup.settings;
    let map = topology.map.as_deref();
    let reports = map.map_or_else(Vec::new, |map| partitions(map, answers));
    let count = |state| reports.iter().filter(|report| report.state == state).count();
    let alive = topology.members.values().filter(|member| member.alive).count();
    let trouble = core.trouble.borrow().as_ref().map(|of| of.advice(settings));
    ClusterStatus {
        cluster_name: settings.cluster_name.clone(),
        cluster_id: topology.cluster_id,
        node: core.node(),
        epoch: topology.epoch,
        controller: topology.controller,
        registry_away_s: topology.registry_away_since.map(seconds),
        trouble,
        replication_factor: map.map_or(settings.replication_factor, |map| map.replication_factor),
        nodes_alive: alive,
        nodes_away: topology.members.len() - alive,
        nodes_draining: map.map_or(0, |map| map.draining.len()),
        partitions: reports.len(),
        partitions_led: reports.len() - count(PartitionState::NoLeader),
        partitions_under_replicated: count(PartitionState::UnderReplicated),
        partitions_moving: count(PartitionState::Moving),
        keys: reports.iter().map(|report| report.keys).sum(),
    }
}

fn seconds(since: Instant) -> u64 {
    since.elapsed().as_secs()
}
