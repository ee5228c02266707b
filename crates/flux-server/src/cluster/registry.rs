//! The registry: where nodes make themselves known, the placement map is kept, and a controller is
//! elected.
//!
//! Two implementations exist: [`etcd`](super::etcd) and, for several nodes in one process,
//! [`in_process`](super::in_process). Both work in the background and publish what they know as a
//! state that only the newest value of counts. Nothing here decides what a node does with it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use flux_core::placement::{NodeId, PlacementMap, Timing};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::format;

/// A future that a trait object returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Who it is.
    pub node: NodeId,
    /// The setting `cluster_name`: clusters may share the servers of a registry.
    pub cluster: String,
    /// The cluster that it has joined.
    #[serde(with = "format::optional_hex")]
    pub cluster_id: Option<u64>,
    /// Random for each start of the process.
    #[serde(with = "format::hex")]
    pub instance: u64,
    /// When the process started, by its wall clock, in milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// RESP and the native protocol.
    pub data_addr: SocketAddr,
    /// Links between nodes.
    pub peer_addr: SocketAddr,
    /// gRPC.
    pub grpc_addr: SocketAddr,
    /// HTTP for administration.
    pub admin_addr: SocketAddr,
    /// What it shares with others that may fail with it; empty if unknown.
    pub zone: String,
    /// The version of its program.
    pub version: String,
    /// The node that it was before its data was set aside.
    #[serde(default)]
    pub replaces: Option<NodeId>,
    /// What it reckons leases by; `None` of a version that did not say.
    #[serde(default)]
    pub timing: Option<Timing>,
}

impl Registration {
    /// Whether another process with the same node id must be a former one of the same place: it had
    /// the addresses that this process listens on now.
    pub(super) fn takes_over(&self, other: &Registration) -> bool {
        let place = |of: &Registration| (of.data_addr, of.peer_addr, of.admin_addr);
        place(self) == place(other) && other.started_ms <= self.started_ms
    }
}

/// A placement map and its epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Grows with each change of the map.
    pub epoch: u64,
    /// The map.
    pub map: Arc<PlacementMap>,
}

/// What a registry holds of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The nodes that are registered.
    pub nodes: BTreeMap<NodeId, Registration>,
    /// The placement map, once there is one.
    pub placement: Option<Placement>,
    /// Why the map that is there cannot be read.
    pub unreadable: Option<String>,
    /// The elected controller.
    pub controller: Option<NodeId>,
}

/// What a registry knows now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistryState {
    /// Whether it is in touch with its servers. What follows is as last known when it is not.
    pub connected: bool,
    /// What last kept it from that: the server and the cause. Of no meaning while it is in touch.
    pub failure: Option<String>,
    /// What it holds; `None` before it was first read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// Whether this node is registered.
    pub registered: bool,
    /// Whether this node is the elected controller.
    pub leads: bool,
    /// Another process has registered under this node's id.
    pub conflict: Option<Box<Registration>>,
}

/// Why a registry could not be written to.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Its servers do not answer, or not in time.
    #[error("the registry does not answer: {0}")]
    Away(String),
    /// What it holds cannot be read.
    #[error("{0}")]
    Unreadable(String),
}

/// Where the nodes of a cluster meet. See the module.
pub trait Registry: fmt::Debug + Send + Sync {
    /// What is known, and how it changes.
    fn state(&self) -> watch::Receiver<RegistryState>;

    /// Keeps this registered until [`close`](Registry::close), whatever happens to leases and
    /// servers. Again, it takes the place of the former registration. Returns at once.
    fn register(&self, registration: Registration);

    /// Whether to stand for controller. Whoever stops standing also resigns.
    fn campaign(&self, stands: bool);

    /// Writes the map with its epoch, which must be a new one, if the map that is there has the epoch
    /// `over`, or if there is none and `over` is `None`. False if another one was there.
    fn write<'a>(
        &'a self,
        placement: &'a Placement,
        over: Option<u64>,
    ) -> BoxFuture<'a, Result<bool, RegistryError>>;

    /// Takes the registration back and resigns, if the servers answer within a short time.
    fn close(&self) -> BoxFuture<'_, ()>;
}
