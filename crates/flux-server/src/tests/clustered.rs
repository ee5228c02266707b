//! A node of a cluster, as its clients see it before it serves and where it has given replicas away. What
//! several nodes do together is tested with real processes.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use flux_core::placement::{NodeId, PlacementMap};
use flux_core::{PartitionId, Slot};
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1::GetRequest;
use flux_proto::grpc::kv_v1::kv_client::KvClient;

use super::machine::Machine;
use super::node::small;
use crate::cluster::{InProcess, Registration, RegistryState, Topology};
use crate::config::{Fsync, Settings};
use crate::data_dir::{DataDir, Purpose};
use crate::node::Node;
use crate::resp::Route;
use crate::shared::Claim;
use crate::workers::{Membership, Workers};

const PATIENCE: Duration = Duration::from_secs(20);

/// Of all ports the system chooses one.
const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_refused_until_the_node_serves() {
    let directory = tempfile::tempdir().expect("a directory");
    let registry = InProcess::open(None).expect("nothing to read");
    let observer = registry.attach();
    let mut registered = observer.state();
    let data_dir = directory.path().to_owned();
    let settings = Settings {
        data_addr: ANY_PORT,
        admin_addr: ANY_PORT,
        grpc_addr: ANY_PORT,
        peer_addr: ANY_PORT,
        data_dir,
        replication_factor: 3,
        ..small(1, Fsync::Always)
    };
    // Alone it waits for two more.
    let starting =
        tokio::spawn(async move { Node::start_in(&settings, || Some(registry.attach())).await });
    let is_there = |state: &RegistryState| {
        state.snapshot.as_ref().and_then(|all| all.nodes.values().next().cloned())
    };
    let waited = registered.wait_for(|state| is_there(state).is_some());
    let waited = tokio::time::timeout(PATIENCE, waited).await.expect("it registers");
    let found = is_there(&waited.expect("the registry is there")).expect("just seen");
    let Registration { data_addr, admin_addr, grpc_addr, .. } = found;
    TcpStream::connect(admin_addr).expect("the admin port listens while a node starts");
    let mut kv = KvClient::connect(format!("http://{grpc_addr}")).await.expect("it listens");
    let refused = kv.get(GetRequest::default()).await.expect_err("it does not serve");
    let name = refused.metadata().get(CODE_TRAILER).expect("the name of the code");
    assert_eq!((refused.code(), name.as_bytes()), (tonic::Code::Unavailable, &b"UNAVAILABLE"[..]));
    assert!(refused.message().starts_with("the node is starting: "), "{refused}");
    let told = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(data_addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET k\r\n")?;
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).map(|()| answer)
    });
    assert_eq!(&told.await.expect("no panic").expect("an answer"), b"-LOADING ");
    assert!(!starting.is_finished());
    starting.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_no_replica_any_more_is_not_named_as_leader() {
    let [me, other, former, third] = [1, 2, 3, 4].map(NodeId);
    let layout = vec![vec![other, third]; 4];
    let map = PlacementMap::new(7, 2, &layout).expect("a sound map");
    let topology = Topology { map: Some(Arc::new(map)), epoch: 1, ..Topology::default() };
    let membership = Membership { cluster_id: 7, me, instance: 1, topology: Arc::new(topology) };
    let settings = small(1, Fsync::Always);
    let directory =
        DataDir::open_in(Machine::new(1).folders(), Purpose::Alone(4), 1).expect("a directory");
    let workers = Workers::start(&settings, directory, ANY_PORT, Some(&membership));
    let workers = workers.expect("started");
    let shared = workers.shared();
    let claimed_by = |node: NodeId, term| {
        shared.views[0].claim(Claim { node, term });
        shared.leader(PartitionId(0))
    };
    assert_eq!(claimed_by(other, 1), Some(other));
    // They may have led it when they had the partition. Now they would name others, and in the end each
    // other.
    assert_eq!(claimed_by(former, 2), None);
    assert_eq!(claimed_by(me, 3), None);
    assert_ne!(shared.route(Slot::of(b"any")), Route::Here);
    workers.stop().expect("closed");
}
