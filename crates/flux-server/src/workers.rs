//! The workers of a node as one thing: started from a data directory, and stopped together.
//!
//! Where the data directory lies, on a disk or in a test's memory, and which other servers the node
//! runs, is not known here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, io};

use flux_core::placement::{NodeId, ReplicaId};
use flux_core::replica::{Replica, SnapshotMeta};
use flux_core::store::{Memory, Table, TableOptions};
use flux_core::{PartitionId, Partitions};
use flux_log::{Disk, LogError, LogOptions};
use mio::Poll;
use mio::net::TcpListener;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::clock;
use crate::cluster::Topology;
use crate::config::{Fsync, Settings};
use crate::data_dir::DataDir;
use crate::feed::{NodeFeed, PartitionFeed};
use crate::mailbox::{Mailbox, Message};
use crate::node::StartError;
use crate::peer::LocalIdentity;
use crate::recovery::{self, ALONE, Beginning, Found, Recovered, Snapshots};
use crate::replicas::Receiving;
use crate::shared::{ClusterSeat, PartitionView, Shared};
use crate::stats::Stats;
use crate::transfer::{TransferLimits, Transfers};
use crate::worker::{ClusterParts, WAKER, Worker, WorkerParts};

/// Lock stripes of all tables of a node together, about: enough for its readers not to meet.
const SHARDS: usize = 64;
/// With a sync for every batch; see `LogOptions`.
const ZERO_AHEAD_BYTES: u64 = 256 * 1024;
/// How often a start looks whether a log has failed meanwhile.
const FAILURE_CHECK: Duration = Duration::from_millis(100);

/// Running workers.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    feed: Arc<NodeFeed>,
    threads: Vec<JoinHandle<Result<(), LogError>>>,
    /// Locked until the workers have ended.
    _directory: DataDir,
}

/// A node's place in its cluster when it starts.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    pub(crate) cluster_id: u64,
    pub(crate) me: NodeId,
    /// Drawn at random when the process started.
    pub(crate) instance: u64,
    /// With a placement map.
    pub(crate) topology: Arc<Topology>,
}

impl Membership {
    /// What the tables of all nodes are ordered by: known to who knows the cluster's id.
    fn hash_seed(&self) -> u64 {
        self.cluster_id.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
    }

    fn parts(&self, worker: u16, workers: u16) -> ClusterParts {
        let &Membership { cluster_id: cluster, me, instance, .. } = self;
        let identity = LocalIdentity { cluster, node: me.0, instance, worker, workers };
        ClusterParts { identity, topology: Arc::clone(&self.topology) }
    }
}

/// Begins to send and to receive snapshots. The runtime is that of the caller.
fn start_transfers(shared: &Arc<Shared>, membership: &Membership, disk: Arc<dyn Disk>) {
    let Some(seat) = &shared.cluster else { return };
    let identity = membership.parts(0, shared.mailboxes.len() as u16).identity;
    let bytes_per_second = shared.settings.snapshot_rate;
    let limits = TransferLimits { bytes_per_second, ..TransferLimits::default() };
    let replicas = Arc::new(Receiving::new(shared));
    let transfers = Transfers::start(&Handle::current(), identity, disk, replicas, limits);
    let _ = seat.transfers.set(transfers);
}

/// How the replica of a partition begins on this node.
fn beginning(
    partition: PartitionId,
    table: Arc<Table>,
    settings: &Settings,
    partitions: Partitions,
    membership: Option<&Membership>,
) -> Beginning {
    let map = membership.and_then(|one| one.topology.map.as_ref().map(|map| (one.me, map)));
    let Some((me, map)) = map else {
        let founded = Some((ALONE, SnapshotMeta::alone(ALONE)));
        return Beginning { partition, table, founded, assigned: None, tail_bytes: 0 };
    };
    let mine = |replicas: &[ReplicaId]| {
        replicas.iter().find(|replica| replica.node() == me).map(|replica| replica.get())
    };
    let founders = map.bootstrap.get(usize::from(partition.0)).map_or(&[][..], Vec::as_slice);
    let ids = founders.iter().map(|replica| replica.get()).collect();
    let founded = mine(founders).map(|id| (id, SnapshotMeta::founding(ids)));
    let assigned = mine(map.target(partition));
    let config = recovery::replica_config(partition, 0, settings, partitions.count());
    Beginning { partition, table, founded, assigned, tail_bytes: config.tail_bytes }
}

/// What all workers share, with empty tables.
fn shared(
    settings: &Settings,
    directory: &DataDir,
    data_addr: SocketAddr,
    partitions: Partitions,
    membership: Option<&Membership>,
    mailboxes: Vec<Arc<Mailbox>>,
) -> Shared {
    let memory = Memory::new(settings.max_memory);
    let shards = (SHARDS / usize::from(partitions.count())).max(1);
    // The same on all nodes, so that a cursor of one is good for the others.
    let own_seed = directory.description.seed();
    let hash_seed = membership.map_or(own_seed, Membership::hash_seed);
    let table_options = TableOptions { hash_seed, shards };
    let view = |_| PartitionView {
        table: Arc::new(Table::new(table_options, Arc::clone(&memory))),
        standing: Arc::default(),
        claim: Mutex::default(),
        feed: PartitionFeed::default(),
    };
    Shared {
        node_id: directory.description.node_id.clone(),
        data_addr,
        partitions,
        cluster: membership.map(|one| ClusterSeat {
            me: one.me,
            transfers: OnceLock::new(),
            topology: RwLock::new(Arc::clone(&one.topology)),
            answered: Mutex::default(),
        }),
        views: partitions.iter().map(view).collect(),
        led: watch::Sender::default(),
        published: OnceLock::new(),
        table_options,
        mailboxes,
        memory,
        stats: Arc::new(Stats::default()),
        started: Instant::now(),
        connections: AtomicUsize::new(0),
        next_connection: AtomicU64::new(1),
        nodes: Arc::default(),
        watchers: Arc::default(),
        clients: Default::default(),
        log_bytes: AtomicU64::new(0),
        log_pinned_bytes: AtomicU64::new(0),
        last_snapshot_s: AtomicU64::new(0),
        max_connections: AtomicUsize::new(settings.max_connections),
        idle_timeout_s: AtomicU64::new(settings.idle_timeout_s),
        failure: Default::default(),
        failed: Default::default(),
        stopping: AtomicBool::new(false),
        drained: AtomicUsize::new(0),
        settings: settings.clone(),
    }
}

/// Where a worker's thread takes events and messages from.
struct Inbox {
    poll: Poll,
    messages: Receiver<Message>,
}

impl Workers {
    /// Recovers what the directory holds and starts the workers; returns when all partitions serve.
    /// Clients will reach the node at `data_addr`.
    pub(crate) fn start(
        settings: &Settings,
        mut directory: DataDir,
        data_addr: SocketAddr,
        membership: Option<&Membership>,
    ) -> Result<Workers, StartError> {
        let count = settings.worker_count() as u16;
        let options = LogOptions {
            segment_bytes: settings.segment_bytes,
            salt: salt()?,
            zero_ahead_bytes: if settings.fsync == Fsync::Always { ZERO_AHEAD_BYTES } else { 0 },
        };
        if directory.description.workers != count {
            recovery::relayout(&mut directory, count, &options)?;
        }
        let partitions =
            Partitions::new(directory.description.partitions).expect("checked when it was read");
        let (mailboxes, inboxes) = mailboxes(count).map_err(StartError::Worker)?;
        let shared = shared(settings, &directory, data_addr, partitions, membership, mailboxes);
        let snapshots = Snapshots::find(&directory)?;
        let beginnings: Vec<Beginning> = partitions
            .iter()
            .zip(&shared.views)
            .map(|(partition, view)| {
                beginning(partition, Arc::clone(&view.table), settings, partitions, membership)
            })
            .collect();
        let recovered = recover(&directory, &beginnings, &options, &snapshots)?;
        directory.mark_started()?;
        let shared = Arc::new(shared);
        if let Some(membership) = membership {
            start_transfers(&shared, membership, Arc::clone(&snapshots.place.disk));
        }
        let readers = recovered.iter().map(|one| one.log.reader()).collect();
        let feed = NodeFeed::start(&shared, readers).map_err(StartError::Worker)?;
        let (started, all_started) = channel();
        let workers: Vec<Worker> = (0..)
            .zip(recovered.into_iter().zip(inboxes))
            .map(|(id, (recovered, inbox))| {
                let disk = Arc::clone(&snapshots.place.disk);
                let cluster = membership.map(|one| one.parts(id, count));
                worker(id, &shared, recovered, inbox, disk, cluster, started.clone())
            })
            .collect::<Result<_, _>>()?;
        let mut threads = Vec::new();
        for (id, worker) in workers.into_iter().enumerate() {
            let name = format!("flux-worker-{id}");
            let span = tracing::Span::current();
            let run = move || span.in_scope(|| worker.run());
            let thread = std::thread::Builder::new().name(name).spawn(run);
            threads.push(thread.map_err(StartError::Worker)?);
        }
        drop(started);
        Workers { shared, feed: Arc::new(feed), threads, _directory: directory }.wait(&all_started)
    }

    /// Waits until every worker has said that its partitions serve.
    fn wait(self, all_started: &Receiver<()>) -> Result<Workers, StartError> {
        let mut missing = self.threads.len();
        while missing > 0 {
            match all_started.recv_timeout(FAILURE_CHECK) {
                Ok(()) => missing -= 1,
                Err(RecvTimeoutError::Timeout) if self.shared.failure.lock().is_none() => {}
                // A log failed before its partitions served, or a worker ended.
                Err(_) => {
                    let reason = self.shared.failure.lock().clone();
                    let closed = self.stop().map_err(|error| error.to_string());
                    let reason = reason.or(closed.err());
                    return Err(StartError::Log(reason.unwrap_or("a worker ended".to_owned())));
                }
            }
        }
        Ok(self)
    }

    /// Accepts connections of clients from now on.
    pub(crate) fn listen(&self, listener: TcpListener) {
        self.shared.mailboxes[0].send_surely(Message::Listen(listener));
    }

    /// Accepts connections of the other nodes from now on.
    pub(crate) fn listen_to_peers(&self, listener: TcpListener) {
        // Waits for room: without it the node is of no use to its cluster.
        self.shared.mailboxes[0].send_surely(Message::ListenPeers(listener));
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The changes of this node's replicas.
    pub(crate) fn feed(&self) -> &Arc<NodeFeed> {
        &self.feed
    }

    /// Lets the workers finish what is under way within the setting `shutdown_timeout_ms`, and waits
    /// until they have closed their logs.
    ///
    /// # Errors
    ///
    /// If a log could not be synced.
    pub(crate) fn stop(self) -> Result<(), LogError> {
        for mailbox in &self.shared.mailboxes {
            mailbox.stop();
        }
        let mut result = Ok(());
        for thread in self.threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => result = Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        result
    }
}

fn mailboxes(count: u16) -> io::Result<(Vec<Arc<Mailbox>>, Vec<Inbox>)> {
    let (mut mailboxes, mut inboxes) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let poll = Poll::new()?;
        let (mailbox, messages) = Mailbox::new(mio::Waker::new(poll.registry(), WAKER)?);
        mailboxes.push(mailbox);
        inboxes.push(Inbox { poll, messages });
    }
    Ok((mailboxes, inboxes))
}

fn worker(
    id: u16,
    shared: &Arc<Shared>,
    recovered: Recovered,
    inbox: Inbox,
    snapshot_disk: Arc<dyn Disk>,
    cluster: Option<ClusterParts>,
    started: Sender<()>,
) -> Result<Worker, StartError> {
    let mut replicas = Vec::new();
    for Found { partition, id, recovery } in recovered.replicas {
        let view = &shared.views[usize::from(partition.0)];
        let count = shared.partitions.count();
        let config = recovery::replica_config(partition, id, &shared.settings, count);
        let (memory, standing) = (Arc::clone(&shared.memory), Arc::clone(&view.standing));
        let mut replica = Replica::new(&config, recovery, memory, standing, clock::now())
            .map_err(|source| StartError::Replica { partition, source })?;
        let map = cluster.as_ref().and_then(|parts| parts.topology.map.as_ref());
        let leader = map.and_then(|map| map.target(partition).first());
        if leader.is_some_and(|leader| leader.get() == id) {
            replica.stand_first();
        }
        replicas.push(replica);
    }
    Worker::new(WorkerParts {
        id,
        shared: Arc::clone(shared),
        poll: inbox.poll,
        mailbox: inbox.messages,
        replicas,
        log: recovered.log,
        snapshot_disk,
        snapshot_indexes: recovered.snapshot_indexes,
        cluster,
        started,
    })
    .map_err(StartError::Worker)
}

/// Recovers all workers' partitions side by side.
fn recover(
    directory: &DataDir,
    beginnings: &[Beginning],
    options: &LogOptions,
    snapshots: &Snapshots,
) -> Result<Vec<Recovered>, StartError> {
    let begun = Instant::now();
    let count = directory.description.workers;
    let span = tracing::Span::current();
    let recover = |worker: u16| {
        let _in_span = span.enter();
        let own = beginnings.iter().filter(|one| one.partition.0 % count == worker);
        let own: Vec<Beginning> = own.cloned().collect();
        recovery::recover(directory, worker, &own, options.clone(), snapshots)
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
    let keys: usize = beginnings.iter().map(|one| one.table.len()).sum();
    tracing::info!(keys, elapsed_ms = begun.elapsed().as_millis() as u64, "data recovered");
    Ok(recovered)
}

/// A number that users cannot know.
fn salt() -> Result<u64, StartError> {
    let mut bytes = [0; 8];
    let read = fs::File::open("/dev/urandom")
        .and_then(|mut random| io::Read::read_exact(&mut random, &mut bytes));
    read.map_err(StartError::Worker)?;
    Ok(u64::from_le_bytes(bytes))
}
