//! The controller: runs on every node and acts on the elected one. It creates the cluster, and keeps
//! the placement map as the nodes that are there need it.
//!
//! It only ever writes the map; partitions' leaders carry it out. It keeps nothing that a successor
//! would miss: the map and the nodes' answers say all there is to know.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use flux_core::placement::{NodeId, PlacementMap};
use tokio::sync::watch;
use tokio::time::Instant;

use super::control::Core;
use super::registry::{Placement, RegistryState, Snapshot};
use crate::data_dir::random_u64;

/// How often it looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long no new node has come before a cluster is created.
const SETTLING_TIME: Duration = Duration::from_secs(1);
/// Partitions of a new cluster when nobody asked for a number.
const DEFAULT_PARTITIONS: u32 = 64;

/// Acts whenever this node is the elected controller.
pub(super) async fn run(core: Arc<Core>, mut stopping: watch::Receiver<bool>) {
    let mut state = core.registry.state();
    loop {
        tokio::select! {
            elected = state.wait_for(|state| state.leads) => if elected.is_err() { return },
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        tracing::info!("this node is the cluster's controller");
        let mut controller = Controller { core: Arc::clone(&core), gathering: None };
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
}

impl Controller {
    /// Returns when the node is not elected any more.
    async fn lead(&mut self, state: &mut watch::Receiver<RegistryState>) {
        loop {
            let current = state.borrow_and_update().clone();
            if !current.leads {
                return;
            }
            if let Some(snapshot) = current.snapshot.as_deref()
                && snapshot.placement.is_none()
                && snapshot.unreadable.is_none()
            {
                self.bootstrap(snapshot).await;
            }
            let changed = async {
                // The registry lives as long as the core.
                let _ = state.wait_for(|state| !state.leads).await;
            };
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = self.core.wake.notified() => {}
                () = changed => {}
            }
        }
    }

    /// Creates the cluster, when enough nodes have come and none of them has been part of one.
    async fn bootstrap(&mut self, snapshot: &Snapshot) {
        let topology = Arc::clone(&self.core.topology.borrow());
        let known = topology.cluster_id.is_some() || topology.map.is_some();
        if known || snapshot.nodes.values().any(|node| node.cluster_id.is_some()) {
            return;
        }
        let nodes: BTreeSet<NodeId> = snapshot.nodes.keys().copied().collect();
        let now = Instant::now();
        let since = match &self.gathering {
            Some((gathered, since)) if *gathered == nodes => *since,
            _ => now,
        };
        let settings = &self.core.setup.settings;
        let enough = nodes.len() >= usize::from(settings.replication_factor);
        if !enough || now.duration_since(since) < SETTLING_TIME {
            self.gathering = Some((nodes, since));
            return;
        }
        let map = match first_map(&self.core, snapshot) {
            Ok(map) => map,
            Err(reason) => {
                tracing::error!(reason, "cannot create the cluster");
                return;
            }
        };
        let (cluster, partitions) = (map.cluster_id, map.partitions);
        let placement = Placement { epoch: 1, map: map.into() };
        match self.core.registry.write(&placement, None).await {
            Ok(true) => tracing::info!(
                cluster = format!("{cluster:016x}"),
                nodes = nodes.len(),
                partitions,
                replication_factor = settings.replication_factor,
                "cluster created"
            ),
            // Somebody else was faster.
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot create the cluster yet"),
        }
    }
}

/// The map that a cluster of these nodes begins with.
fn first_map(core: &Core, snapshot: &Snapshot) -> Result<PlacementMap, String> {
    let settings = &core.setup.settings;
    let partitions = match settings.partitions {
        0 => DEFAULT_PARTITIONS,
        partitions => partitions,
    };
    let nodes: Vec<NodeId> = snapshot.nodes.keys().copied().collect();
    let replicas = usize::from(settings.replication_factor).min(nodes.len());
    let layout: Vec<Vec<NodeId>> = (0..partitions as usize)
        .map(|at| (0..replicas).map(|offset| nodes[(at + offset) % nodes.len()]).collect())
        .collect();
    let cluster = random_u64().map_err(|error| error.to_string())?.max(1);
    PlacementMap::new(cluster, settings.replication_factor, &layout)
        .map_err(|error| error.to_string())
}
