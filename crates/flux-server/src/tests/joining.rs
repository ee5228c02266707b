//! Nodes that start with data or settings that do not fit their cluster.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::cluster::{
    BoxFuture, InProcess, Placement, Registration, Registry, RegistryError, RegistryState,
};
use crate::config::Settings;
use crate::data_dir::DataDirError;
use crate::node::{Node, StartError};

/// A registry that remembers who has registered.
#[derive(Debug)]
struct Recording {
    inner: Arc<dyn Registry>,
    registered: Arc<Mutex<Vec<Registration>>>,
}

impl Registry for Recording {
    fn state(&self) -> watch::Receiver<RegistryState> {
        self.inner.state()
    }

    fn register(&self, registration: Registration) {
        self.registered.lock().push(registration.clone());
        self.inner.register(registration);
    }

    fn campaign(&self, stands: bool) {
        self.inner.campaign(stands);
    }

    fn write<'a>(
        &'a self,
        placement: &'a Placement,
        over: Option<u64>,
    ) -> BoxFuture<'a, Result<bool, RegistryError>> {
        self.inner.write(placement, over)
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.inner.close()
    }
}

fn settings(directory: &Path) -> Settings {
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    Settings {
        data_dir: directory.to_owned(),
        data_addr: free,
        admin_addr: free,
        peer_addr: free,
        grpc_addr: free,
        workers: 1,
        replication_factor: 1,
        ..Settings::default()
    }
}

/// Starts a node of a cluster; also says how often it has registered.
async fn start(settings: &Settings, registry: &InProcess) -> (Result<Node, StartError>, usize) {
    let registered = Arc::default();
    let recording = || -> Option<Arc<dyn Registry>> {
        let registered = Arc::clone(&registered);
        Some(Arc::new(Recording { inner: registry.attach(), registered }))
    };
    let started = Node::start_in(settings, recording).await;
    let count = registered.lock().len();
    (started, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_a_node_alone_is_refused_before_anybody_counts_on_the_node() {
    let directory = tempfile::tempdir().expect("a directory");
    let settings = settings(directory.path());
    let alone = Node::start(&settings).await.expect("started alone");
    alone.shutdown().await.expect("stopped");
    let registry = InProcess::open(None).expect("nothing to read");
    let (refused, registered) = start(&settings, &registry).await;
    let refused = refused.expect_err("it runs");
    assert!(matches!(refused, StartError::DataDir(DataDirError::Alone(_))), "{refused:?}");
    assert_eq!(registered, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_a_cluster_is_refused_to_a_node_alone_and_left_as_it_is() {
    let directory = tempfile::tempdir().expect("a directory");
    let settings = settings(directory.path());
    let registry = InProcess::open(None).expect("nothing to read");
    let (member, _) = start(&settings, &registry).await;
    member.expect("started").shutdown().await.expect("stopped");
    let listed = || {
        let names = std::fs::read_dir(directory.path()).expect("listed");
        let mut names: Vec<_> = names.map(|name| name.expect("listed").file_name()).collect();
        names.sort();
        names
    };
    let before = listed();
    let other = Settings { workers: 2, ..settings.clone() };
    let refused = Node::start(&other).await.expect_err("it runs");
    assert!(matches!(refused, StartError::DataDir(DataDirError::OfCluster { .. })), "{refused:?}");
    assert_eq!(listed(), before, "the logs of one worker");
    let (member, _) = start(&settings, &registry).await;
    member.expect("started again").shutdown().await.expect("stopped");
}
