//! The machines of a test: which nodes run, how they reach each other, and what their groups are like.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use bytes::Bytes;
use flux_core::PartitionId;
use flux_core::placement::{NodeId, PlacementMap, ReplicaId};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::sync::watch;
use tower::ServiceExt as _;

use crate::cluster::http::{CallError, Peers, refusal};
use crate::cluster::registry::{BoxFuture, Registration};
use crate::cluster::setup::timing;
use crate::cluster::{
    ClusterError, ClusterHandle, Control, DataPlane, InProcess, LocalPartition, NodePartitions,
    PartitionRole, Setup, Topology, Waiting, routes,
};
use crate::config::Settings;

/// Everything that a test's cluster consists of.
pub(super) struct World {
    pub(super) registry: InProcess,
    pub(super) settings: Settings,
    pub(super) hall: Arc<Hall>,
    pub(super) nodes: BTreeMap<u32, Node>,
    /// Data directories outlive processes.
    directories: BTreeMap<u32, TempDir>,
    starts: u64,
}

/// A node that runs.
pub(super) struct Node {
    pub(super) control: Control,
}

/// Where requests find the node that has an address, and what all groups are like.
#[derive(Debug, Default)]
pub(super) struct Hall {
    present: Mutex<BTreeMap<SocketAddr, (NodeId, ClusterHandle)>>,
    groups: Mutex<BTreeMap<u16, Group>>,
    /// Groups stay as they are, whatever the map says.
    pub(super) still: AtomicBool,
}

#[derive(Clone, Debug)]
struct Group {
    voters: Vec<ReplicaId>,
    leader: Option<ReplicaId>,
    term: u64,
}

/// The data plane of one node: its groups do at once what the map says, if a quorum is there.
#[derive(Debug)]
struct Fake {
    node: NodeId,
    hall: Arc<Hall>,
    topology: watch::Receiver<Arc<Topology>>,
}

impl World {
    pub(super) fn new() -> World {
        let settings = Settings { partitions: 16, ..Settings::default() };
        World {
            registry: InProcess::open(None).expect("nothing to read"),
            settings,
            hall: Arc::default(),
            nodes: BTreeMap::new(),
            directories: BTreeMap::new(),
            starts: 0,
        }
    }

    /// A cluster of so many nodes, which has its map.
    pub(super) async fn with_nodes(count: u32) -> World {
        let mut world = World::new();
        for node in 1..=count {
            world.start(node).await;
        }
        world.settle().await;
        world
    }

    pub(super) fn setup(&mut self, node: u32) -> Setup {
        self.starts += 1;
        let address =
            |port: u32| SocketAddr::from(([127, 0, 0, 1], (10_000 + 10 * node + port) as u16));
        let directory =
            self.directories.entry(node).or_insert_with(|| tempfile::tempdir().expect("made"));
        let registration = Registration {
            node: NodeId(node),
            cluster: "flux".to_owned(),
            cluster_id: None,
            instance: self.starts,
            started_ms: self.starts,
            data_addr: address(0),
            peer_addr: address(1),
            grpc_addr: address(2),
            admin_addr: address(3),
            zone: String::new(),
            version: "0".to_owned(),
            replaces: None,
            timing: Some(timing(&self.settings)),
        };
        let (data_dir, settings) = (directory.path().to_owned(), self.settings.clone());
        Setup { registration, data_dir, settings, waiting: Waiting::default() }
    }

    /// Starts a node that has not been part of a cluster.
    pub(super) async fn start(&mut self, node: u32) {
        let setup = self.setup(node);
        self.start_as(setup).await.expect("started");
    }

    /// Starts a node again that has been part of this cluster.
    pub(super) async fn restart(&mut self, node: u32, cluster: u64) {
        let mut setup = self.setup(node);
        setup.registration.cluster_id = Some(cluster);
        self.start_as(setup).await.expect("started");
    }

    pub(super) async fn start_as(&mut self, setup: Setup) -> Result<(), ClusterError> {
        let Registration { node, admin_addr, cluster_id, .. } = setup.registration;
        let peers: Arc<dyn Peers> = Arc::clone(&self.hall) as _;
        let control = Control::start_among(setup, self.registry.attach(), peers).await?;
        let topology = control.topology();
        control.attach(Arc::new(Fake { node, hall: Arc::clone(&self.hall), topology }));
        self.hall.present.lock().insert(admin_addr, (node, control.handle()));
        if cluster_id.is_none() {
            join_when_there_is_a_map(&control);
        }
        self.nodes.insert(node.0, Node { control });
        Ok(())
    }

    /// Kills a node.
    pub(super) fn kill(&mut self, node: u32) {
        self.hall.present.lock().retain(|_, (present, _)| present.0 != node);
        self.nodes.remove(&node).expect("it runs");
    }

    /// Lets time go by until everything that has begun is done.
    pub(super) async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }

    pub(super) fn topology(&self, node: u32) -> Arc<Topology> {
        Arc::clone(&self.nodes[&node].control.topology().borrow())
    }

    pub(super) fn map(&self) -> Arc<PlacementMap> {
        let (_, node) = self.nodes.first_key_value().expect("a node runs");
        let topology = node.control.topology();
        let map = topology.borrow().map.clone();
        map.expect("there is a map")
    }

    pub(super) fn cluster_id(&self) -> u64 {
        self.map().cluster_id
    }

    /// How many replicas each node is to have.
    pub(super) fn placed(&self) -> BTreeMap<u32, usize> {
        let mut placed = BTreeMap::new();
        for replica in self.map().targets.iter().flatten() {
            *placed.entry(replica.node().0).or_default() += 1;
        }
        placed
    }

    /// How many partitions each node leads.
    pub(super) fn leads(&self) -> BTreeMap<u32, usize> {
        let mut leads = BTreeMap::new();
        for group in self.hall.groups.lock().values() {
            *leads.entry(group.leader.expect("a leader").node().0).or_default() += 1;
        }
        leads
    }

    /// Asks a node's admin port.
    pub(super) async fn ask(
        &self,
        node: u32,
        path: &str,
        body: Option<serde_json::Value>,
    ) -> Result<serde_json::Value, String> {
        let address = SocketAddr::from(([127, 0, 0, 1], (10_003 + 10 * node) as u16));
        let body = body.map(|body| body.to_string().into());
        let answer = self.hall.ask(address, path, body).await.map_err(|error| error.to_string())?;
        Ok(serde_json::from_slice(&answer).expect("JSON"))
    }
}

/// As a node does that finds the map: its directory belongs to the cluster from then on.
fn join_when_there_is_a_map(control: &Control) {
    let (mut topology, core) = (control.topology(), control.handle().0);
    let core = Arc::downgrade(&core);
    tokio::spawn(async move {
        let Ok(found) = topology.wait_for(|topology| topology.map.is_some()).await else {
            return;
        };
        if let (Some(core), Some(map)) = (core.upgrade(), &found.map)
            && core.setup.check(map).is_ok()
        {
            core.join(map.cluster_id);
        }
    });
}

impl Hall {
    fn is_up(&self, replica: ReplicaId) -> bool {
        self.present.lock().values().any(|(node, _)| *node == replica.node())
    }

    /// Lets each group choose a leader and follow the map, as far as it can.
    fn advance(&self, map: &PlacementMap) {
        if self.still.load(Ordering::Relaxed) {
            return;
        }
        let mut groups = self.groups.lock();
        for (partition, bootstrap) in (0..map.partitions).zip(&map.bootstrap) {
            let group = groups.entry(partition).or_insert_with(|| Group {
                voters: bootstrap.clone(),
                leader: None,
                term: 0,
            });
            let up: Vec<ReplicaId> =
                group.voters.iter().copied().filter(|voter| self.is_up(*voter)).collect();
            if up.len() * 2 <= group.voters.len() {
                group.leader = None;
                continue;
            }
            let target = map.target(PartitionId(partition));
            let coming = target.iter().filter(|replica| !group.voters.contains(replica));
            if coming.into_iter().all(|replica| self.is_up(*replica)) {
                group.voters = target.to_vec();
            }
            let leads = |leader: &ReplicaId| group.voters.contains(leader) && self.is_up(*leader);
            if !group.leader.as_ref().is_some_and(leads) {
                group.leader = group.voters.iter().copied().find(|voter| self.is_up(*voter));
                group.term += 1;
            }
        }
    }
}

impl Peers for Hall {
    fn ask<'a>(
        &'a self,
        address: SocketAddr,
        path: &'a str,
        body: Option<Bytes>,
    ) -> BoxFuture<'a, Result<Bytes, CallError>> {
        Box::pin(async move {
            let found = self.present.lock().get(&address).cloned();
            let Some((_, handle)) = found else {
                let (address, reason) = (address.to_string(), "nobody is there".to_owned());
                return Err(CallError::Unreachable { address, reason });
            };
            let method = if body.is_some() { "POST" } else { "GET" };
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(header::CONTENT_TYPE, "application/json")
                .body(Body::from(body.unwrap_or_default()))
                .expect("a request");
            let response = routes(handle).oneshot(request).await.expect("a router answers");
            let status = response.status();
            let body = response.into_body().collect().await.expect("a body").to_bytes();
            if status.is_success() {
                return Ok(body);
            }
            Err(refusal(&address.to_string(), path, status, &body))
        })
    }
}

impl DataPlane for Fake {
    fn partitions(&self) -> BoxFuture<'_, Vec<LocalPartition>> {
        Box::pin(async {
            let Some(map) = self.topology.borrow().map.clone() else {
                return Vec::new();
            };
            self.hall.advance(&map);
            let groups = self.hall.groups.lock();
            let local = |(partition, group): (&u16, &Group)| {
                let own = group.voters.iter().find(|voter| voter.node() == self.node)?;
                let leads = group.leader == Some(*own);
                Some(LocalPartition {
                    partition: *partition,
                    replica: *own,
                    role: if leads { PartitionRole::Leader } else { PartitionRole::Follower },
                    term: group.term,
                    leader: group.leader,
                    commit: 10,
                    applied: 10,
                    revision: 5,
                    voters: group.voters.clone(),
                    outgoing: Vec::new(),
                    changing: false,
                    learners: Vec::new(),
                    keys: 3,
                    bytes: 300,
                })
            };
            groups.iter().filter_map(local).collect()
        })
    }

    fn transfer(&self, partition: PartitionId, to: NodeId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let mut groups = self.hall.groups.lock();
            let group = groups.get_mut(&partition.0).ok_or("no such partition")?;
            if group.leader.is_none_or(|leader| leader.node() != self.node) {
                return Err(format!("{} does not lead partition {partition}", self.node));
            }
            let to = group.voters.iter().copied().find(|voter| voter.node() == to);
            let to = to.ok_or_else(|| format!("no voter of partition {partition} is there"))?;
            group.leader = Some(to);
            group.term += 1;
            Ok(())
        })
    }
}

/// The nodes of a report.
pub(super) fn names(report: &serde_json::Value) -> BTreeSet<String> {
    let nodes = report.as_array().expect("a list").iter();
    nodes.map(|node| node["node"].as_str().expect("a name").to_owned()).collect()
}

/// What a node answers to the controller, for tests of what it says.
pub(super) fn local(answer: serde_json::Value) -> NodePartitions {
    serde_json::from_value(answer).expect("partitions")
}
