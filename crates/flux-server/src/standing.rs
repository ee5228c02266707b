//! Where the partitions of a cluster are, as clients are told: who leads each, and who holds it.

use flux_core::placement::{NodeId, ReplicaId};
use flux_core::{PartitionId, Slot};

use crate::cluster::{Member, Topology};
use crate::resp::{ClusterNode, ClusterPartition, ClusterView, Route};
use crate::shared::{ClusterSeat, Shared};

impl Shared {
    /// The node that leads a partition, as far as this one knows. `None` where this node is alone, or
    /// knows of no leader.
    pub(crate) fn leader(&self, partition: PartitionId) -> Option<NodeId> {
        let seat = self.cluster.as_ref()?;
        let view = &self.views[usize::from(partition.0)];
        match view.standing.leader() {
            // One that has given its replica away knows no better, and might name this node in turn.
            0 => {
                let claimed = view.claim.lock().map(|claim| claim.node);
                claimed.filter(|node| seat.topology.read_recursive().places(partition, *node))
            }
            known => Some(ReplicaId::from_u64(known).node()),
        }
    }

    /// Whether this node has a replica of a partition that has something in it.
    pub(crate) fn holds(&self, partition: PartitionId) -> bool {
        let Some(seat) = &self.cluster else { return true };
        seat.topology.read().places(partition, seat.me)
    }

    /// Where commands on a slot belong.
    pub(crate) fn route(&self, slot: Slot) -> Route {
        let partition = self.partitions.owner(slot);
        let (Some(seat), leader) = (&self.cluster, self.leader(partition)) else {
            return Route::Here;
        };
        if leader == Some(seat.me) {
            return Route::Here;
        }
        // Not every command: a client that asks the wrong node learns where to ask.
        self.cluster_view().route(slot)
    }

    /// The cluster in the terms of Redis.
    pub(crate) fn cluster_view(&self) -> ClusterView {
        match &self.cluster {
            Some(seat) => self.view_of(seat, &seat.topology.read()),
            None => self.view_alone(),
        }
    }

    fn view_of(&self, seat: &ClusterSeat, topology: &Topology) -> ClusterView {
        let members: Vec<(&NodeId, &Member)> = topology.members.iter().collect();
        let place = |node: NodeId| members.iter().position(|(id, _)| **id == node);
        let nodes = members.iter().map(|(id, member)| ClusterNode {
            id: ClusterNode::id(id.0),
            host: member.data_addr().ip().to_string(),
            port: member.data_addr().port(),
            peer_port: member.peer_addr().port(),
            alive: member.alive,
            zone: member.registration.zone.clone(),
        });
        let partition = |partition: PartitionId| {
            let targets = topology.map.as_ref().map_or(&[][..], |map| map.target(partition));
            ClusterPartition {
                leader: self.leader(partition).and_then(place),
                replicas: targets.iter().filter_map(|replica| place(replica.node())).collect(),
            }
        };
        ClusterView {
            enabled: true,
            epoch: topology.epoch,
            me: place(seat.me).unwrap_or_default(),
            nodes: nodes.collect(),
            partitions: self.partitions.iter().map(partition).collect(),
        }
    }

    /// A node alone leads everything.
    fn view_alone(&self) -> ClusterView {
        let number = self.node_id.strip_prefix("node-").unwrap_or_default();
        let node = ClusterNode {
            id: ClusterNode::id(u32::from_str_radix(number, 16).unwrap_or(0)),
            host: self.data_addr.ip().to_string(),
            port: self.data_addr.port(),
            peer_port: self.settings.peer_addr.port(),
            alive: true,
            zone: String::new(),
        };
        let partition = ClusterPartition { leader: Some(0), replicas: vec![0] };
        ClusterView {
            enabled: false,
            epoch: 0,
            me: 0,
            nodes: vec![node],
            partitions: vec![partition; usize::from(self.partitions.count())],
        }
    }
}
