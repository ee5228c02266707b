//! The control plane of a cluster: who its nodes are, which replicas each is to have, and who decides.
//!
//! Nodes register in a [`Registry`], which etcd is behind, or, for nodes of one process, memory. One of
//! them is elected controller: it writes the placement map, which every node follows. The data plane
//! reads the [`Topology`] and is asked through [`DataPlane`]; reading and writing keys never waits for
//! anything here.

mod control;
mod controller;
mod data_plane;
mod etcd;
mod format;
mod http;
mod in_process;
mod operations;
mod probe;
mod registry;
mod report;
mod routes;
mod saved;
mod setup;
#[cfg(test)]
mod tests;
mod topology;
mod waiting;

use std::net::SocketAddr;
use std::path::PathBuf;

use flux_core::placement::{NodeId, Timing};

pub use control::{ClusterHandle, Control};
pub use data_plane::{DataPlane, LocalPartition, NodePartitions, PartitionRole};
pub use etcd::Etcd;
pub use http::{CallError, Client};
pub use in_process::InProcess;
pub use operations::{Done, MoveRequest, NodeRequest, RebalanceRequest, TransferRequest};
pub use registry::{
    BoxFuture, Placement, Registration, Registry, RegistryError, RegistryState, Snapshot,
};
pub use report::{ClusterStatus, NodeReport, PartitionReport, PartitionState, ReplicaReport};
pub use routes::routes;
pub use setup::{Listening, Setup};
pub use topology::{Member, Topology};
pub(crate) use waiting::RECOVERING;
pub use waiting::Waiting;

/// Why a node cannot be part of its cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Another process has its id.
    #[error(
        "two processes run as {node}: this one, with peer_addr {own}, and one with peer_addr {other}. A copy of a data directory cannot run beside it: give this node a data_dir of its own (now {data_dir}), empty to join as a new node"
    )]
    Duplicate {
        /// The id.
        node: NodeId,
        /// Where this process listens for peers.
        own: SocketAddr,
        /// Where the other does.
        other: SocketAddr,
        /// This node's data directory.
        data_dir: PathBuf,
    },
    /// Its data belongs to another cluster than the registry's.
    #[error(
        "data directory {data_dir} belongs to cluster {own:016x}, and the registry holds cluster {other:016x} under cluster_name {name}: correct etcd_endpoints or cluster_name, or give the node an empty data_dir to join this one"
    )]
    OtherCluster {
        /// The cluster of the data.
        own: u64,
        /// The registry's.
        other: u64,
        /// The setting.
        name: String,
        /// The node's data directory.
        data_dir: PathBuf,
    },
    /// It reckons leases by other figures than its cluster.
    #[error(
        "election_timeout_ms is {} and clock_drift_percent {} here, and cluster {cluster:016x} was created with {} and {}: leases are safe only if all nodes have the same. Give this node the cluster's",
        own.election_timeout_ms, own.clock_drift_percent, fixed.election_timeout_ms, fixed.clock_drift_percent
    )]
    Timing {
        /// The node's settings.
        own: Timing,
        /// The cluster's.
        fixed: Timing,
        /// The cluster.
        cluster: u64,
    },
    /// It listens on all addresses, and none is known that others reach it by.
    #[error(
        "{setting} is {address}, and nothing tells by which address other nodes reach it: give it one of this machine's addresses"
    )]
    Unreachable {
        /// The setting.
        setting: &'static str,
        /// Its value.
        address: SocketAddr,
    },
    /// The registry.
    #[error("cannot use the registry")]
    Registry(#[from] RegistryError),
    /// The operating system gave no randomness.
    #[error("cannot read randomness")]
    Randomness(#[source] std::io::Error),
}
