//! The registry against a real etcd, which each test starts for itself on free ports.
//!
//! Needs the program `etcd` in the PATH: `apt-get install etcd-server`.

#[path = "etcd/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, CompactionOptions, GetOptions};
use flux_core::placement::{NodeId, PlacementMap};
use flux_server::cluster::{
    ClusterError, Control, Etcd, Placement, Registration, Registry, RegistryState, Setup, Waiting,
};
use flux_server::config::Settings;
use server::{Server, Tap};
use tokio::sync::watch;

/// The least that etcd takes.
const TTL: Duration = Duration::from_secs(2);
/// Nothing here takes as long: a test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(20);

fn registration(node: u32, instance: u64) -> Registration {
    let address = |port: u32| format!("127.0.0.1:{}", 20_000 + port).parse().expect("an address");
    Registration {
        node: NodeId(node),
        cluster: "test".to_owned(),
        cluster_id: None,
        instance,
        started_ms: instance,
        data_addr: address(instance as u32),
        peer_addr: address(100 + instance as u32),
        grpc_addr: address(200 + instance as u32),
        admin_addr: address(300 + instance as u32),
        zone: String::new(),
        version: "0".to_owned(),
        replaces: None,
        timing: None,
    }
}

fn registry(endpoint: &str) -> Etcd {
    Etcd::start(&[endpoint.to_owned()], "test", TTL)
}

fn placement(epoch: u64, nodes: &[u32]) -> Placement {
    let layout = vec![nodes.iter().copied().map(NodeId).collect()];
    let map = PlacementMap::new(7, nodes.len() as u8, &layout).expect("a valid map");
    Placement { epoch, map: map.into() }
}

/// Waits until the registry says so.
async fn until(
    state: &mut watch::Receiver<RegistryState>,
    what: &str,
    wanted: impl Fn(&RegistryState) -> bool,
) -> RegistryState {
    let found = tokio::time::timeout(PATIENCE, state.wait_for(|state| wanted(state))).await;
    let found = found.map(|found| found.expect("the registry lives").clone());
    found.unwrap_or_else(|_| panic!("{what} never came: {:?}", state.borrow()))
}

fn nodes(state: &RegistryState) -> BTreeSet<u32> {
    state.snapshot.iter().flat_map(|snapshot| snapshot.nodes.keys().map(|node| node.0)).collect()
}

fn epoch(state: &RegistryState) -> Option<u64> {
    Some(state.snapshot.as_ref()?.placement.as_ref()?.epoch)
}

async fn client(endpoint: &str) -> Client {
    Client::connect([endpoint], None).await.expect("a client")
}

#[tokio::test]
async fn nodes_see_each_other_and_one_is_controller() {
    let server = Server::start().await;
    let (first, second) = (registry(server.endpoint()), registry(server.endpoint()));
    let (mut sees, mut sees_too) = (first.state(), second.state());
    first.register(registration(1, 1));
    first.campaign(true);
    until(&mut sees, "an election", |state| state.leads).await;
    second.register(registration(2, 2));
    second.campaign(true);
    until(&mut sees, "the other node", |state| nodes(state) == [1, 2].into()).await;
    let both = |state: &RegistryState| {
        let snapshot = state.snapshot.as_ref().expect("read");
        nodes(state) == [1, 2].into() && snapshot.controller == Some(NodeId(1))
    };
    assert!(!until(&mut sees_too, "both nodes", both).await.leads);

    let (one, two) = (placement(1, &[1, 2]), placement(2, &[2, 1]));
    assert!(first.write(&one, None).await.expect("written"));
    assert!(!second.write(&one, None).await.expect("answered"), "there is a map already");
    until(&mut sees_too, "the map", |state| epoch(state) == Some(1)).await;
    assert!(second.write(&two, Some(1)).await.expect("written"));
    assert!(!first.write(&two, Some(1)).await.expect("answered"), "it has changed since");
    let state = until(&mut sees, "the new map", |state| epoch(state) == Some(2)).await;
    assert_eq!(state.snapshot.expect("read").placement, Some(two));

    // A node that stops is missed at once, and another one is elected.
    first.close().await;
    let state = until(&mut sees_too, "another controller", |state| state.leads).await;
    assert_eq!(nodes(&state), [2].into());
}

#[tokio::test]
async fn a_lease_that_is_lost_is_made_again() {
    let server = Server::start().await;
    let (node, other) = (registry(server.endpoint()), registry(server.endpoint()));
    let (mut state, mut seen) = (node.state(), other.state());
    node.register(registration(1, 1));
    node.campaign(true);
    until(&mut state, "an election", |state| state.leads).await;

    let mut client = client(server.endpoint()).await;
    let key = format!("/services/kv-service/{}", NodeId(1));
    let found = client.get(key, None::<GetOptions>).await.expect("read");
    let lease = found.kvs()[0].lease();
    until(&mut seen, "the node", |state| nodes(state) == [1].into()).await;
    client.lease_revoke(lease).await.expect("revoked");
    until(&mut seen, "its loss", |state| nodes(state).is_empty()).await;
    until(&mut seen, "its return", |state| nodes(state) == [1].into()).await;
    until(&mut state, "another election", |state| state.leads && state.registered).await;
}

#[tokio::test]
async fn what_happened_behind_a_compaction_is_read_anew() {
    let server = Server::start().await;
    let tap = Tap::open(server.endpoint()).await;
    let (behind, direct) = (registry(tap.endpoint()), registry(server.endpoint()));
    let (mut seen, mut direct_state) = (behind.state(), direct.state());
    direct.register(registration(1, 1));
    until(&mut seen, "the node", |state| nodes(state) == [1].into()).await;

    tap.shut();
    until(&mut seen, "the cut", |state| !state.connected).await;
    assert_eq!(nodes(&seen.borrow()), [1].into(), "the last that was known");
    assert!(direct.write(&placement(1, &[1]), None).await.expect("written"));
    assert!(direct.write(&placement(2, &[1]), Some(1)).await.expect("written"));
    let third = registry(server.endpoint());
    third.register(registration(3, 3));
    until(&mut direct_state, "a new node", |state| nodes(state) == [1, 3].into()).await;
    direct.close().await;
    let mut client = client(server.endpoint()).await;
    let revision = client.get("x", None).await.expect("read").header().expect("one").revision();
    let physical = CompactionOptions::new().with_physical();
    client.compact(revision, Some(physical)).await.expect("compacted");

    tap.open_again();
    let state = until(&mut seen, "what happened", |state| state.connected).await;
    assert_eq!((nodes(&state), epoch(&state)), ([3].into(), Some(2)));
}

#[tokio::test]
async fn a_server_that_stops_and_comes_back_finds_the_nodes_again() {
    let mut server = Server::start().await;
    let node = registry(server.endpoint());
    let mut state = node.state();
    node.register(registration(1, 1));
    node.campaign(true);
    until(&mut state, "an election", |state| state.leads).await;
    assert!(node.write(&placement(1, &[1]), None).await.expect("written"));

    // Frozen for longer than the lease lives.
    server.freeze();
    until(&mut state, "the silence", |state| !state.connected).await;
    assert_eq!(nodes(&state.borrow()), [1].into());
    assert!(node.write(&placement(2, &[1]), Some(1)).await.is_err());
    tokio::time::sleep(TTL).await;
    server.thaw();
    until(&mut state, "its return", |state| state.leads && state.registered).await;

    server.kill();
    until(&mut state, "its end", |state| !state.connected).await;
    server.run_again().await;
    let back = until(&mut state, "its start", |state| state.leads && state.registered).await;
    assert_eq!(epoch(&back), Some(1), "what it had written");
}

#[tokio::test]
async fn a_second_process_of_a_node_is_told_and_the_first_goes_on() {
    let server = Server::start().await;
    let (first, copy) = (registry(server.endpoint()), registry(server.endpoint()));
    let (mut state, mut copy_state) = (first.state(), copy.state());
    first.register(registration(1, 1));
    until(&mut state, "a registration", |state| state.registered).await;
    copy.register(registration(1, 2));
    let told = until(&mut copy_state, "the conflict", |state| state.conflict.is_some()).await;
    assert_eq!(told.conflict.as_deref(), Some(&registration(1, 1)));
    assert!(state.borrow().registered && state.borrow().conflict.is_none());

    // One that has the same addresses, in a network of its own, finds out as well.
    let twin = registry(server.endpoint());
    let mut twin_state = twin.state();
    twin.register(Registration { instance: 5, started_ms: 5, ..registration(1, 1) });
    until(&mut twin_state, "the conflict", |state| state.conflict.is_some()).await;
    until(&mut state, "its place again", |state| state.registered).await;
    assert_eq!(state.borrow().conflict, None);
    drop(twin);

    // The same place after a crash: no wait for the lease of the one that is gone.
    drop(first);
    let again = registry(server.endpoint());
    let mut state = again.state();
    again.register(Registration { instance: 9, started_ms: 9, ..registration(1, 1) });
    let took = async { until(&mut state, "the place", |state| state.registered).await };
    tokio::time::timeout(TTL / 2, took).await.expect("sooner than the lease lapses");
}

/// The settings and the registration of a node that has a directory.
fn setup(endpoint: &str, directory: &tempfile::TempDir, node: u32, of: Option<u64>) -> Setup {
    let settings = Settings {
        etcd_endpoints: vec![endpoint.to_owned()],
        cluster_name: "test".to_owned(),
        replication_factor: 1,
        partitions: 4,
        ..Settings::default()
    };
    let registration = Registration { cluster_id: of, ..registration(node, u64::from(node)) };
    Setup {
        registration,
        data_dir: directory.path().to_owned(),
        settings,
        waiting: Waiting::default(),
    }
}

#[tokio::test]
async fn a_registry_that_lost_its_data_changes_nothing() {
    let mut server = Server::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let start = async |server: &Server, node: u32, of: Option<u64>| {
        let endpoint = server.endpoint();
        let setup = setup(endpoint, &directory, node, of);
        Control::start(setup, Arc::new(registry(endpoint))).await
    };
    let control = start(&server, 1, None).await.expect("started");
    let waited = tokio::time::timeout(PATIENCE, control.placement()).await;
    let map = waited.expect("a cluster was created").map;
    let cluster = map.cluster_id;
    control.joined(cluster);

    server.kill();
    let mut topology = control.topology();
    let away = topology.wait_for(|topology| topology.registry_away_since.is_some());
    tokio::time::timeout(PATIENCE, away).await.expect("noticed").expect("alive");
    server.wipe();
    server.run_again().await;
    let probe = registry(server.endpoint());
    let mut seen = probe.state();
    let back = |state: &RegistryState| nodes(state) == [1].into();
    let state = until(&mut seen, "the node", back).await;
    assert_eq!(state.snapshot.as_ref().expect("read").nodes[&NodeId(1)].cluster_id, Some(cluster));

    // Neither the node that was there nor one that comes creates another cluster.
    let empty = tempfile::tempdir().expect("a directory");
    let newcomer = setup(server.endpoint(), &empty, 2, None);
    let newcomer = Control::start(newcomer, Arc::new(registry(server.endpoint()))).await;
    let newcomer = newcomer.expect("started");
    let waited = tokio::time::timeout(Duration::from_secs(3), newcomer.placement()).await;
    assert!(waited.is_err(), "another cluster was created");
    assert_eq!(epoch(&seen.borrow()), None);
    assert_eq!(control.topology().borrow().map.as_ref(), Some(&map));
    control.stop().await;

    // A restart finds its own copy; a directory of another cluster is refused.
    let control = start(&server, 1, Some(cluster)).await.expect("started");
    assert_eq!(control.topology().borrow().map.as_ref(), Some(&map));
    control.stop().await;
    assert!(probe.write(&placement(1, &[2]), None).await.expect("written"));
    let refused = start(&server, 1, Some(cluster)).await;
    let Err(ClusterError::OtherCluster { own, other: 7, .. }) = refused else {
        panic!("joined another cluster: {refused:?}");
    };
    assert_eq!(own, cluster);
}
