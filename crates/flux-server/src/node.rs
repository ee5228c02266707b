//! A node: recovers its data, opens its listeners, runs its workers, and stops them in order.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flux_cdc::Publisher;
use flux_core::PartitionId;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::cluster::{ClusterError, Control, Listening, Registry, Waiting};
use crate::config::Settings;
use crate::data_dir::{DataDir, DataDirError, Purpose};
use crate::feed::{publish, report};
use crate::recovery::RecoveryError;
use crate::replicas::Replicas;
use crate::shared::Shared;
use crate::workers::Workers;
use crate::{admin, grpc, joining, starting};

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process has the address, or it is not one of this machine.
    #[error(
        "cannot listen on {address}: give {setting} another address, or stop the process that has it"
    )]
    Listen {
        /// The setting that gives the address.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The data directory.
    #[error("cannot use the data directory")]
    DataDir(#[from] DataDirError),
    /// The data in it.
    #[error("cannot recover the data")]
    Recovery(#[from] RecoveryError),
    /// A log took nothing from the start.
    #[error("cannot write to the log: {0}")]
    Log(String),
    /// A partition's state is of no use to its replica.
    #[error("cannot start partition {partition}")]
    Replica {
        /// The partition.
        partition: PartitionId,
        /// Why not.
        #[source]
        source: flux_core::replica::Broken,
    },
    /// The cluster.
    #[error("cannot join the cluster")]
    Cluster(#[from] ClusterError),
    /// The operating system refused a thread, a poll or randomness.
    #[error("cannot start a worker")]
    Worker(#[source] io::Error),
}

/// Where a node listens, with the ports that were chosen where a setting said 0.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// RESP and the native protocol.
    pub data: SocketAddr,
    /// `/health`, `/ready` and `/metrics`.
    pub admin: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
    /// The other nodes of the cluster; nobody listens there for a node alone.
    pub peer: SocketAddr,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    shared: Arc<Shared>,
    addresses: Addresses,
    workers: Workers,
    /// Where a broker is set.
    publisher: Option<Publisher>,
    control: Option<Control>,
    waiting: Waiting,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// The sockets, which listen before the data is recovered: a wrong address is told at once, and clients that
/// come meanwhile are told what the node waits for.
struct Listeners {
    data: mio::net::TcpListener,
    /// In a cluster.
    peer: Option<mio::net::TcpListener>,
    admin: tokio::net::TcpListener,
    grpc: tokio::net::TcpListener,
    addresses: Addresses,
}

impl Node {
    /// Starts a node: returns when its data is recovered and it serves; in a cluster, when it takes part in
    /// it, which needs enough nodes the first time. Needs a tokio runtime, which the gRPC and admin servers
    /// run on.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings' addresses, the data directory, the data, or the cluster.
    pub async fn start(settings: &Settings) -> Result<Node, StartError> {
        Node::start_in(settings, || joining::registry(settings)).await
    }

    /// The same in the cluster of a registry that the caller makes; again, if the node has to begin anew as
    /// another one. None makes a node alone.
    ///
    /// # Errors
    ///
    /// As `start`.
    pub async fn start_in(
        settings: &Settings,
        make_registry: impl Fn() -> Option<Arc<dyn Registry>>,
    ) -> Result<Node, StartError> {
        let mut registry = make_registry();
        let listeners = Listeners::open(settings, registry.is_some()).await?;
        let Listeners { data, mut peer, admin, grpc, addresses } = listeners;
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        // The admin port answers while the node recovers: alive, but not ready.
        let ready = Arc::new(std::sync::OnceLock::new());
        let routes = Arc::new(std::sync::OnceLock::new());
        let waiting = Waiting::default();
        let (known, routing) = (Arc::clone(&ready), Arc::clone(&routes));
        let answering = admin::serve(admin, known, waiting.clone(), routing, stopping.clone());
        tasks.spawn(answering.in_current_span());
        let calls = grpc::Server::new().await;
        let answering = calls.clone().answer(grpc, waiting.clone(), stopping);
        tasks.spawn(answering.in_current_span());
        let refusing = refuse_while(&waiting, &data).map_err(StartError::Worker)?;

        let (control, workers) = loop {
            match start_workers(settings, registry.as_ref(), addresses, &waiting).await {
                Ok(started) => break started,
                Err((error, _)) if registry.is_none() || !joining::is_damage(&error) => {
                    return Err(error);
                }
                Err((error, control)) => {
                    if let Some(control) = control {
                        control.stop().await;
                    }
                    joining::begin_anew(settings, &error)?;
                    registry = make_registry();
                }
            }
        };
        drop(refusing);
        let shared = Arc::clone(workers.shared());
        let published = publish::start(workers.feed(), settings);
        let (publisher, metrics) = published.unzip();
        if let Some(metrics) = metrics {
            let _ = shared.published.set(metrics);
        }
        let mut served = crate::backup::routes(Arc::clone(&shared));
        served = served.merge(report::routes(Arc::clone(&shared)));
        if let Some(control) = &control {
            served = served.merge(crate::cluster::routes(control.handle()));
            control.attach(Arc::new(Replicas::new(Arc::clone(&shared))));
            let follow = joining::follow(Arc::clone(&shared), control.topology());
            tasks.spawn(follow.in_current_span());
            if let Some(peer) = peer.take() {
                workers.listen_to_peers(peer);
            }
        }
        let _ = routes.set(served);
        workers.listen(data);
        let feed = Arc::clone(workers.feed());
        calls.open(Arc::clone(&shared), feed, stop.subscribe()).await;
        // The last: where a node is told to be ready, it is at every port.
        let _ = ready.set(Arc::clone(&shared));
        Ok(Node { shared, addresses, workers, publisher, control, waiting, tasks, stop })
    }

    /// Waits until the node must stop, because another process has its identity.
    pub async fn failed(&self) -> StartError {
        match &self.control {
            Some(control) => control.failed().await.into(),
            None => std::future::pending().await,
        }
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.shared.node_id
    }

    /// How many keys it holds.
    pub fn keys(&self) -> usize {
        self.shared.keys()
    }

    /// Why it takes no writes any more, if its log failed.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.lock().clone()
    }

    /// Stops: takes no more connections, finishes what is under way within the setting
    /// `shutdown_timeout_ms`, syncs and closes the log.
    ///
    /// # Errors
    ///
    /// If a log could not be synced: acknowledged writes of the policies `everysec` and `no` may be
    /// lost when the machine loses power.
    pub async fn shutdown(mut self) -> Result<(), flux_log::LogError> {
        self.waiting.tell("stopping");
        if let Some(publisher) = self.publisher.take() {
            // What it has confirmed is still put into the log.
            publisher.stop().await;
        }
        if let Some(control) = self.control.take() {
            // Nobody is to give leadership to this node again while it hands it over; which it does while
            // it still serves, so that nobody waits for an election.
            control.stop().await;
            Replicas::new(Arc::clone(&self.shared)).hand_over().await;
        }
        self.shared.stopping.store(true, Ordering::Release);
        // A receiver that is gone has ended already.
        let _ = self.stop.send(true);
        let timeout = Duration::from_millis(self.shared.settings.shutdown_timeout_ms);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(timeout, ended).await.is_err() {
            tracing::warn!("requests over gRPC or the admin port are cut off");
            self.tasks.shutdown().await;
        }
        tracing::info!("finishing what is in flight");
        let closed = tokio::task::spawn_blocking(move || self.workers.stop());
        closed.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

/// Joins the cluster, if there is one, recovers the data and starts the workers. An error comes with the
/// control plane, if that had begun.
async fn start_workers(
    settings: &Settings,
    registry: Option<&Arc<dyn Registry>>,
    addresses: Addresses,
    waiting: &Waiting,
) -> Result<(Option<Control>, Workers), (StartError, Option<Control>)> {
    let early = |error: StartError| (error, None);
    let purpose = match registry {
        Some(_) => Purpose::Cluster,
        None => Purpose::Alone(settings.partitions as u16),
    };
    let mut directory = DataDir::open(&settings.data_dir, purpose, settings.worker_count() as u16)
        .map_err(|error| early(error.into()))?;
    let joined = match registry {
        Some(registry) => {
            let Addresses { data, admin, grpc, peer } = addresses;
            let listening = Listening { data, peer, grpc, admin };
            let registry = Arc::clone(registry);
            Some(
                joining::join(&mut directory, settings, listening, registry, waiting)
                    .await
                    .map_err(early)?,
            )
        }
        None => None,
    };
    let (control, membership) = joined.unzip();
    let owned = settings.clone();
    // Recovery is long and blocks: not for the runtime's own threads.
    let span = tracing::Span::current();
    let begin = move || Workers::start(&owned, directory, addresses.data, membership.as_ref());
    let start = move || span.in_scope(begin);
    let started = tokio::task::spawn_blocking(start).await;
    match started.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Ok(workers) => Ok((control, workers)),
        Err(error) => Err((error, control)),
    }
}

/// Tells clients why nothing is served whenever the node waits, until it is dropped.
fn refuse_while(waiting: &Waiting, data: &mio::net::TcpListener) -> io::Result<JoinSet<()>> {
    use std::os::fd::AsFd;
    let descriptor = data.as_fd().try_clone_to_owned()?;
    let listener = tokio::net::TcpListener::from_std(descriptor.into())?;
    let mut answering = JoinSet::new();
    answering.spawn(starting::answer(listener, waiting.clone()));
    Ok(answering)
}

impl Listeners {
    async fn open(settings: &Settings, clustered: bool) -> Result<Listeners, StartError> {
        let failed =
            |setting, address| move |source| StartError::Listen { setting, address, source };
        let data_failed = failed("data_addr", settings.data_addr);
        let data = mio::net::TcpListener::bind(settings.data_addr).map_err(data_failed)?;
        let open = async |setting, address| {
            tokio::net::TcpListener::bind(address).await.map_err(failed(setting, address))
        };
        let peer_failed = failed("peer_addr", settings.peer_addr);
        let peer = match clustered {
            true => Some(mio::net::TcpListener::bind(settings.peer_addr).map_err(peer_failed)?),
            false => None,
        };
        let peer_addr = match &peer {
            Some(peer) => peer.local_addr().map_err(peer_failed)?,
            None => settings.peer_addr,
        };
        let admin = open("admin_addr", settings.admin_addr).await?;
        let grpc = open("grpc_addr", settings.grpc_addr).await?;
        let addresses = Addresses {
            data: data.local_addr().map_err(failed("data_addr", settings.data_addr))?,
            admin: admin.local_addr().map_err(failed("admin_addr", settings.admin_addr))?,
            grpc: grpc.local_addr().map_err(failed("grpc_addr", settings.grpc_addr))?,
            peer: peer_addr,
        };
        Ok(Listeners { data, peer, admin, grpc, addresses })
    }
}
