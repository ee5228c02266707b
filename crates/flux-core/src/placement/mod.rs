//! Where the replicas of each partition live: the placement map and how it is changed.
//!
//! Nothing here talks to a registry or a node: the controller in `flux-server` reads the map and what
//! the nodes report, and writes back what this module says.

mod id;
mod map;

pub use id::{InvalidId, NodeId, ReplicaId};
pub use map::{Invalid, PlacementMap};

use crate::PartitionId;

/// A node that can hold replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placeable {
    /// The node.
    pub node: NodeId,
    /// What fails together with it, such as a rack or a site. Replicas of a partition go to distinct
    /// zones where there are enough. Nodes without a zone give the empty string and share one.
    pub zone: String,
}

/// What a partition's leader reports of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionStatus {
    /// The partition.
    pub partition: PartitionId,
    /// Who leads it, if anyone is known to.
    pub leader: Option<ReplicaId>,
    /// The voters; the incoming ones while the configuration is a joint one.
    pub voters: Vec<ReplicaId>,
    /// Replicas that receive the log and do not vote.
    pub learners: Vec<ReplicaId>,
    /// Whether the group is between two configurations (joint consensus).
    pub joint: bool,
}
