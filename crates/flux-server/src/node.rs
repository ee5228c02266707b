//! A node: recovers its data, opens its listeners, runs its workers, and stops them in order.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flux_core::replica::Replica;
use flux_core::store::{Memory, Table, TableOptions};
use flux_core::{PartitionId, Partitions};
use flux_log::LogOptions;
use mio::Poll;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::Settings;
use crate::data_dir::{DataDir, DataDirError};
use crate::mailbox::Mailbox;
use crate::recovery::{self, Recovered, RecoveryError};
use crate::shared::{PartitionView, Shared};
use crate::stats::Stats;
use crate::worker::{WAKER, Worker, WorkerParts};
use crate::{admin, clock, grpc};

/// Lock stripes of all tables of a node together, about: enough for its readers not to meet.
const SHARDS: usize = 64;

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process has the address, or it is not one of this machine.
    #[error("cannot listen on {address} (setting {setting})")]
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
    workers: Vec<JoinHandle<Result<(), flux_log::LogError>>>,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    _directory: DataDir,
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

        let count = settings.worker_count() as u16;
        let partitions = Partitions::new(settings.partitions as u16).expect("settings are checked");
        let options = LogOptions { segment_bytes: settings.segment_bytes, salt: salt()? };
        let mut directory = DataDir::open(&settings.data_dir, partitions.count(), count)?;
        let (directory, started) = {
            let (settings, data) = (settings.clone(), listeners.data);
            let data_addr = listeners.addresses.data;
            // Recovery is long and blocks: not for the runtime's own threads.
            tokio::task::spawn_blocking(move || {
                if directory.description.workers != count {
                    recovery::relayout(&mut directory, count, &options)?;
                }
                let started =
                    start_workers(&settings, &directory, partitions, &options, data, data_addr)?;
                Ok::<_, StartError>((directory, started))
            })
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?
        };
        let (shared, workers) = started;
        let _ = ready.set(Arc::clone(&shared));
        tasks.spawn(grpc::serve(listeners.grpc, Arc::clone(&shared), stopping));
        Ok(Node {
            shared,
            addresses: listeners.addresses,
            workers,
            tasks,
            stop,
            _directory: directory,
        })
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
        for mailbox in &self.shared.mailboxes {
            mailbox.stop();
        }
        let workers = std::mem::take(&mut self.workers);
        let closed = tokio::task::spawn_blocking(move || {
            let mut result = Ok(());
            for worker in workers {
                match worker.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => result = Err(error),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result
        });
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

type Started = (Arc<Shared>, Vec<JoinHandle<Result<(), flux_log::LogError>>>);

fn start_workers(
    settings: &Settings,
    directory: &DataDir,
    partitions: Partitions,
    options: &LogOptions,
    listener: mio::net::TcpListener,
    data_addr: SocketAddr,
) -> Result<Started, StartError> {
    let count = directory.description.workers;
    let memory = Memory::new(settings.max_memory);
    let shards = (SHARDS / usize::from(partitions.count())).max(1);
    let hash_seed = directory.description.seed();
    let view = |_| PartitionView {
        table: Arc::new(Table::new(TableOptions { hash_seed, shards }, Arc::clone(&memory))),
        serving: Arc::new(AtomicBool::new(false)),
    };
    let views: Vec<PartitionView> = partitions.iter().map(view).collect();
    let recovered = recover_all(directory, partitions, options, &views)?;

    let polls: Vec<Poll> =
        (0..count).map(|_| Poll::new()).collect::<Result<_, _>>().map_err(StartError::Worker)?;
    let mut receivers = Vec::new();
    let mut mailboxes = Vec::new();
    for poll in &polls {
        let waker = mio::Waker::new(poll.registry(), WAKER).map_err(StartError::Worker)?;
        let (mailbox, receiver) = Mailbox::new(waker);
        mailboxes.push(mailbox);
        receivers.push(receiver);
    }
    let shared = Arc::new(Shared {
        node_id: directory.description.node_id.clone(),
        data_addr,
        partitions,
        views,
        mailboxes,
        memory,
        stats: Arc::new(Stats::default()),
        started: Instant::now(),
        connections: AtomicUsize::new(0),
        next_connection: AtomicU64::new(1),
        clients: Default::default(),
        log_bytes: AtomicU64::new(0),
        last_snapshot_s: AtomicU64::new(0),
        max_connections: AtomicUsize::new(settings.max_connections),
        idle_timeout_s: AtomicU64::new(settings.idle_timeout_s),
        failure: Default::default(),
        stopping: AtomicBool::new(false),
        drained: AtomicUsize::new(0),
        settings: settings.clone(),
    });

    let snapshot_disk = recovery::disk(&directory.snapshots())?;
    let mut listener = Some(listener);
    let (started, all_started) = std::sync::mpsc::channel();
    let mut threads = Vec::new();
    for (id, ((recovered, poll), mailbox)) in
        recovered.into_iter().zip(polls).zip(receivers).enumerate()
    {
        let mut replicas = Vec::new();
        for (partition, recovery) in recovered.replicas {
            let (view, memory) = (&shared.views[usize::from(partition.0)], &shared.memory);
            let config = recovery::replica_config(partition);
            let (memory, serving) = (Arc::clone(memory), Arc::clone(&view.serving));
            let replica = Replica::new(&config, recovery, memory, serving, clock::unix_ms())
                .map_err(|source| StartError::Replica { partition, source })?;
            replicas.push(replica);
        }
        let worker = Worker::new(WorkerParts {
            id: id as u16,
            shared: Arc::clone(&shared),
            poll,
            mailbox,
            listener: listener.take(),
            replicas,
            log: recovered.log,
            snapshot_disk: Arc::clone(&snapshot_disk),
            snapshot_indexes: recovered.snapshot_indexes,
            started: started.clone(),
        })
        .map_err(StartError::Worker)?;
        let name = format!("flux-worker-{id}");
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run());
        threads.push(thread.map_err(StartError::Worker)?);
    }
    drop(started);
    // Ends early if a worker ends, whose error `shutdown` gives.
    all_started.iter().take(threads.len()).for_each(drop);
    Ok((shared, threads))
}

/// Recovers all workers' partitions side by side.
fn recover_all(
    directory: &DataDir,
    partitions: Partitions,
    options: &LogOptions,
    views: &[PartitionView],
) -> Result<Vec<Recovered>, StartError> {
    let begun = Instant::now();
    let snapshots = recovery::snapshots(directory)?;
    let count = directory.description.workers;
    let recover = |worker: u16| {
        let own: Vec<_> = partitions
            .iter()
            .filter(|partition| partition.0 % count == worker)
            .map(|partition| (partition, Arc::clone(&views[usize::from(partition.0)].table)))
            .collect();
        recovery::recover(directory, worker, &own, options.clone(), &snapshots)
    };
    let recovered: Vec<Recovered> = std::thread::scope(|scope| {
        let recover = &recover;
        let threads: Vec<_> =
            (0..count).map(|worker| scope.spawn(move || recover(worker))).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect::<Result<_, _>>()
    })?;
    let keys: usize = views.iter().map(|view| view.table.len()).sum();
    tracing::info!(keys, elapsed_ms = begun.elapsed().as_millis() as u64, "data recovered");
    Ok(recovered)
}

/// A number that users cannot know.
fn salt() -> Result<u64, StartError> {
    let mut bytes = [0; 8];
    let read = std::fs::File::open("/dev/urandom")
        .and_then(|mut random| io::Read::read_exact(&mut random, &mut bytes));
    read.map_err(StartError::Worker)?;
    Ok(u64::from_le_bytes(bytes))
}
