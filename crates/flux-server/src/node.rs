//! A node: recovers its data, opens its listeners, runs its workers, and stops them in order.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flux_core::PartitionId;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::Settings;
use crate::data_dir::{DataDir, DataDirError};
use crate::recovery::RecoveryError;
use crate::shared::Shared;
use crate::workers::Workers;
use crate::{admin, grpc};

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
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    shared: Arc<Shared>,
    addresses: Addresses,
    workers: Workers,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// The listeners, opened before the data is recovered: a wrong address is told at once.
struct Listeners {
    data: mio::net::TcpListener,
    admin: tokio::net::TcpListener,
    grpc: tokio::net::TcpListener,
    addresses: Addresses,
}

impl Node {
    /// Starts a node: returns when its data is recovered and it serves. Needs a tokio runtime, which
    /// the gRPC and admin servers run on.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings' addresses, the data directory or the data.
    pub async fn start(settings: &Settings) -> Result<Node, StartError> {
        let listeners = Listeners::open(settings).await?;
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        // The admin port answers while the node recovers: alive, but not ready.
        let ready = Arc::new(std::sync::OnceLock::new());
        tasks.spawn(admin::serve(listeners.admin, Arc::clone(&ready), stopping.clone()));

        let partitions = settings.partitions as u16;
        let workers = settings.worker_count() as u16;
        let directory = DataDir::open(&settings.data_dir, partitions, workers)?;
        let (owned, data) = (settings.clone(), listeners.data);
        // Recovery is long and blocks: not for the runtime's own threads.
        let start = move || Workers::start(&owned, directory, data, None);
        let workers = tokio::task::spawn_blocking(start)
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let shared = Arc::clone(workers.shared());
        let _ = ready.set(Arc::clone(&shared));
        tasks.spawn(grpc::serve(listeners.grpc, Arc::clone(&shared), stopping));
        Ok(Node { shared, addresses: listeners.addresses, workers, tasks, stop })
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

impl Listeners {
    async fn open(settings: &Settings) -> Result<Listeners, StartError> {
        let failed =
            |setting, address| move |source| StartError::Listen { setting, address, source };
        let data_failed = failed("data_addr", settings.data_addr);
        let data = mio::net::TcpListener::bind(settings.data_addr).map_err(data_failed)?;
        let open = async |setting, address| {
            tokio::net::TcpListener::bind(address).await.map_err(failed(setting, address))
        };
        let admin = open("admin_addr", settings.admin_addr).await?;
        let grpc = open("grpc_addr", settings.grpc_addr).await?;
        let addresses = Addresses {
            data: data.local_addr().map_err(data_failed)?,
            admin: admin.local_addr().map_err(failed("admin_addr", settings.admin_addr))?,
            grpc: grpc.local_addr().map_err(failed("grpc_addr", settings.grpc_addr))?,
        };
        Ok(Listeners { data, admin, grpc, addresses })
    }
}
