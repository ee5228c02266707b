//! INFO, and the answer to a preface: what a node tells of itself and its cluster.

use std::collections::BTreeMap;
use std::sync::Arc;

use flux_core::PartitionId;
use flux_core::placement::NodeId;
use flux_proto::native as wire;
use flux_proto::native::{Opcode, Response, feature};

use super::render::respond;
use crate::cluster::{Member, Topology};
use crate::shared::Shared;

/// Answers INFO.
pub(super) fn info(id: u64, shared: &Shared, out: &mut Vec<u8>) {
    match &shared.cluster {
        Some(seat) => {
            let topology = Arc::clone(&seat.topology.read());
            info_of_cluster(id, shared, &topology, out);
        }
        None => info_alone(id, shared, out),
    }
}

fn info_alone(id: u64, shared: &Shared, out: &mut Vec<u8>) {
    let data_addr = shared.data_addr.to_string();
    let info = wire::Info {
        node: &shared.node_id,
        server_version: env!("CARGO_PKG_VERSION"),
        members: vec![wire::Member { name: &shared.node_id, data_addr: &data_addr, zone: "" }],
        leaders: vec![Some(0); usize::from(shared.partitions.count())],
        epoch: 0,
        replicas: Vec::new(),
    };
    respond(out, id, Opcode::Info, &Response::Info(info), None);
}

fn info_of_cluster(id: u64, shared: &Shared, topology: &Topology, out: &mut Vec<u8>) {
    let named: Vec<(String, String, &Member)> = topology
        .members
        .iter()
        .map(|(node, member)| (node.to_string(), member.data_addr().to_string(), member))
        .collect();
    let members = named.iter().map(|(name, data_addr, member)| wire::Member {
        name,
        data_addr,
        zone: &member.registration.zone,
    });
    let places: BTreeMap<NodeId, u16> = topology.members.keys().copied().zip(0..).collect();
    let replicas = |partition: PartitionId| {
        let targets = topology.map.as_ref().map_or(&[][..], |map| map.target(partition));
        targets.iter().filter_map(|replica| places.get(&replica.node()).copied()).collect()
    };
    let leader = |partition| places.get(&likely_leader(shared, topology, partition)?).copied();
    let info = wire::Info {
        node: &shared.node_id,
        server_version: env!("CARGO_PKG_VERSION"),
        members: members.collect(),
        leaders: shared.partitions.iter().map(leader).collect(),
        epoch: topology.epoch,
        replicas: shared.partitions.iter().map(replicas).collect(),
    };
    respond(out, id, Opcode::Info, &Response::Info(info), None);
}

/// The node to ask about a partition: its leader, as far as that is known. While nobody says to lead it, a node
/// that has no replica of it names the one that should: that one hears first.
pub(super) fn likely_leader(
    shared: &Shared,
    topology: &Topology,
    partition: PartitionId,
) -> Option<NodeId> {
    let known = shared.leader(partition);
    if known.is_some() || shared.holds(partition) {
        return known;
    }
    let targets = topology.map.as_ref()?.target(partition).iter().map(|replica| replica.node());
    let is_alive = |node: &NodeId| topology.members.get(node).is_some_and(|member| member.alive);
    targets.into_iter().find(is_alive)
}

/// The answer to a preface. False if the client is refused.
pub(crate) fn accept(preface: &wire::Preface, shared: &Shared, out: &mut Vec<u8>) -> bool {
    let Some(version) = preface.choose_version() else {
        wire::encode_server_preface(out, &wire::ServerPreface::VERSION_MISMATCH);
        return false;
    };
    let accepted = wire::Accepted {
        version,
        flags: preface.flags & feature::ALL,
        ..wire::Accepted::new(&shared.node_id, shared.partitions.count())
    };
    wire::encode_server_preface(out, &wire::ServerPreface::Accepted(accepted));
    true
}
