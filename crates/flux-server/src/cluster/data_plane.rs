//! What the control plane asks of the data plane.

use std::fmt;

use flux_core::PartitionId;
use flux_core::placement::{NodeId, PartitionStatus, ReplicaId};
use serde::{Deserialize, Serialize};

use super::registry::BoxFuture;

/// The replicas of this node, as the control plane sees them.
pub trait DataPlane: fmt::Debug + Send + Sync {
    /// How each partition stands that this node has a replica of, in their order.
    fn partitions(&self) -> BoxFuture<'_, Vec<LocalPartition>>;

    /// Asks this node's replica, which leads the partition, to hand leadership to the one on another
    /// node. Returns when that has begun; whether it succeeds is seen in the partition's status.
    ///
    /// # Errors
    /// Why not, in words for an operator.
    fn transfer(&self, partition: PartitionId, to: NodeId) -> BoxFuture<'_, Result<(), String>>;
}

/// What a replica does in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartitionRole {
    /// It leads.
    Leader,
    /// It votes and follows, or stands for leader.
    Follower,
    /// It receives the log and does not vote.
    Learner,
}

/// A partition as one node's replica sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPartition {
    /// Which one.
    pub partition: u16,
    /// The replica.
    pub replica: ReplicaId,
    /// What it does.
    pub role: PartitionRole,
    /// The term.
    pub term: u64,
    /// Who leads, if that is known.
    pub leader: Option<ReplicaId>,
    /// The last index that is known to be committed.
    pub commit: u64,
    /// The last index that is applied.
    pub applied: u64,
    /// The last revision that is applied.
    pub revision: u64,
    /// The voters; in a joint configuration those that come in.
    pub voters: Vec<ReplicaId>,
    /// In a joint configuration the voters that it leaves behind; else empty.
    pub outgoing: Vec<ReplicaId>,
    /// The group is between two configurations, or a majority does not know for good yet that it has left
    /// one: the loss of another replica may be one too many.
    pub changing: bool,
    /// Replicas that do not vote.
    pub learners: Vec<ReplicaId>,
    /// Keys held.
    pub keys: u64,
    /// Memory of keys and values.
    pub bytes: u64,
}

impl LocalPartition {
    /// As placement asks for it.
    pub(super) fn status(&self) -> PartitionStatus {
        PartitionStatus {
            partition: PartitionId(self.partition),
            leader: self.leader,
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            changing: self.changing,
        }
    }
}

/// The answer to `GET /cluster/partitions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePartitions {
    /// Who answers.
    pub node: NodeId,
    /// The epoch of the map that it knows.
    pub epoch: u64,
    /// Its replicas.
    pub partitions: Vec<LocalPartition>,
}
