//! What a node knows of its cluster, and how that follows from what the registry says.
//!
//! Pure: the registry's state and the time come in, a new topology and what is worth telling an
//! operator come out. A registry that is away, empty, or of another cluster changes nothing: the node
//! goes on with what it knew.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use flux_core::PartitionId;
use flux_core::placement::{NodeId, PlacementMap};
use tokio::time::Instant;

use super::registry::{Placement, Registration, RegistryState, Snapshot};

/// A node of the cluster, as last heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// What it said of itself.
    pub registration: Registration,
    /// Whether it is registered now, or was when the registry was last in touch.
    pub alive: bool,
    /// Since when it has been missed, if it is not alive. The time in which the registry was out of
    /// touch does not count, and neither does that before this process started.
    pub away_since: Option<Instant>,
}

impl Member {
    /// Where its links to other nodes are opened.
    pub fn peer_addr(&self) -> SocketAddr {
        self.registration.peer_addr
    }

    /// Where clients reach it.
    pub fn data_addr(&self) -> SocketAddr {
        self.registration.data_addr
    }

    /// Where it is administered.
    pub fn admin_addr(&self) -> SocketAddr {
        self.registration.admin_addr
    }
}

/// What a node knows of its cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The cluster, once this node has joined it.
    pub cluster_id: Option<u64>,
    /// The epoch of the map; 0 while there is none.
    pub epoch: u64,
    /// The placement map.
    pub map: Option<Arc<PlacementMap>>,
    /// Every node that is registered or named by the map, as far as it was ever heard of.
    pub members: BTreeMap<NodeId, Member>,
    /// The elected controller.
    pub controller: Option<NodeId>,
    /// Since when the registry is out of touch, if it is.
    pub registry_away_since: Option<Instant>,
}

/// Something about the registry that an operator should know. It is repeated as long as it lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It is out of touch.
    Away(Duration),
    /// It has no map, although a node has joined a cluster: its data was lost.
    Wiped,
    /// Its map is of another cluster.
    OtherCluster { own: u64, other: u64 },
    /// Its map is older than the one known here: it was restored from a backup.
    OlderMap { epoch: u64, known: u64 },
    /// Its map cannot be read.
    Unreadable(String),
}

impl Topology {
    /// The map with its epoch.
    pub fn placement(&self) -> Option<Placement> {
        let map = self.map.clone()?;
        Some(Placement { epoch: self.epoch, map })
    }

    /// Whether the map gives a node a replica of a partition.
    pub(crate) fn places(&self, partition: PartitionId, node: NodeId) -> bool {
        let map = self.map.as_ref();
        map.is_some_and(|map| map.target(partition).iter().any(|one| one.node() == node))
    }

    /// Takes in what the registry says. Returns what is wrong with it, if anything is.
    pub(super) fn observe(&mut self, state: &RegistryState, now: Instant) -> Option<Trouble> {
        let Some(snapshot) = state.snapshot.as_deref().filter(|_| state.connected) else {
            let since = *self.registry_away_since.get_or_insert(now);
            return Some(Trouble::Away(now.saturating_duration_since(since)));
        };
        let returned = self.registry_away_since.take().is_some();
        self.controller = snapshot.controller;
        let trouble = self.observe_map(snapshot);
        self.observe_members(&snapshot.nodes, returned, now);
        trouble
    }

    fn observe_map(&mut self, snapshot: &Snapshot) -> Option<Trouble> {
        if let Some(reason) = &snapshot.unreadable {
            return Some(Trouble::Unreadable(reason.clone()));
        }
        let Some(Placement { epoch, map }) = &snapshot.placement else {
            let joined = |registration: &Registration| registration.cluster_id.is_some();
            let lost = self.cluster_id.is_some()
                || self.map.is_some()
                || snapshot.nodes.values().any(joined);
            return lost.then_some(Trouble::Wiped);
        };
        let own = self.cluster_id.or(self.map.as_ref().map(|map| map.cluster_id));
        if let Some(own) = own.filter(|own| *own != map.cluster_id) {
            return Some(Trouble::OtherCluster { own, other: map.cluster_id });
        }
        let next = self.map.as_ref().map_or(0, |known| known.next_sequence);
        if *epoch < self.epoch || map.next_sequence < next {
            return Some(Trouble::OlderMap { epoch: *epoch, known: self.epoch });
        }
        self.epoch = *epoch;
        self.map = Some(Arc::clone(map));
        None
    }

    fn observe_members(
        &mut self,
        nodes: &BTreeMap<NodeId, Registration>,
        returned: bool,
        now: Instant,
    ) {
        let own = self.cluster_id.or(self.map.as_ref().map(|map| map.cluster_id));
        let ours = |registration: &&Registration| {
            own.is_none() || registration.cluster_id.is_none() || registration.cluster_id == own
        };
        for registration in nodes.values().filter(ours) {
            let member =
                Member { registration: registration.clone(), alive: true, away_since: None };
            self.members.insert(registration.node, member);
        }
        let placed: BTreeSet<NodeId> = self.map.as_ref().map_or_else(BTreeSet::new, |map| {
            let holding = map.targets.iter().flatten().map(|replica| replica.node());
            holding.chain(map.draining.iter().copied()).collect()
        });
        self.members.retain(|node, _| nodes.contains_key(node) || placed.contains(node));
        for (node, member) in &mut self.members {
            if !nodes.contains_key(node) {
                member.alive = false;
                let since = member.away_since.get_or_insert(now);
                if returned {
                    *since = now;
                }
            }
        }
    }
}
