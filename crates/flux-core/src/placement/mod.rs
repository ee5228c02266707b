//! Where the replicas of each partition live: the placement map and how it is changed.
//!
//! [`desired`] is consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam: "Consistent
//! hashing with bounded loads", 2016): nodes stand at many points of a ring of hashes, and a partition
//! goes to the first nodes that follow its own point, are not full and are allowed. By itself that
//! balances to within the bound and moves several times what it must when a node comes or goes, so here
//!
//! - the bound is each node's exact share (`quota`): its part of all replicas, to within one;
//! - what is placed stays. Only what a rule or a quota takes moves, and the ring says where to, and
//!   which of a node's partitions: those with the shortest way to a node that has room;
//! - what finds no node with room moves others out of its way, along the chain of moves that takes
//!   fewest replicas from where they were (as in a minimum-cost flow, which always has a solution);
//! - leadership is an assignment of its own (`leaders`), since it moves without data.
//!
//! [`plan()`] leads from a map to that, a replica at a time.
//!
//! Everything is decided from the arguments and without chance: a controller that takes over decides
//! the same. Nothing here talks to a registry or to a node: the controller in `flux-server` reads the
//! map and what nodes report, and writes back what this module says.

mod arrange;
mod fleet;
mod id;
mod leaders;
mod map;
mod plan;
mod quota;
mod ring;
#[cfg(test)]
mod tests;

pub use arrange::desired;
pub use id::{InvalidId, NodeId, ReplicaId};
pub use map::{Invalid, PlacementMap, Timing};
pub use plan::{Limits, Nodes, Reason, Step, Transfer, leader_transfers, plan};

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
    /// Whether the group is between two configurations (joint consensus), or a majority does not know for
    /// good yet that it has left one.
    pub changing: bool,
}
