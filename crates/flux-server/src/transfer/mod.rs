//! Snapshots on their way from one node to another.
//!
//! A leader whose log no longer reaches back far enough for a follower sends it a snapshot: the chunks
//! of the file that lies on its disk, over a connection of their own, at a bounded rate for the whole
//! node. The receiver writes the same file and loads a fresh table from it. Where a connection breaks,
//! the transfer goes on from the last chunk that arrived. docs/peer-protocol.md has the frames.
//!
//! This runs on tokio, beside the workers; files and tables are touched on its blocking threads. Which
//! snapshot a replica needs, and what becomes of one that has arrived, is decided by the replica.

mod rate;
mod receiver;
mod sender;
mod source;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use flux_core::replica::SnapshotMeta;
use flux_core::store::Table;
use flux_log::{Disk, SnapshotId};
use flux_proto::peer::SnapshotOffer;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use crate::peer::{BulkStream, LocalIdentity};
pub(crate) use sender::Outgoing;

/// Streams that wait to be looked at; more are closed.
const STREAMS: usize = 16;
/// Orders that wait to be looked at; more are refused.
const JOBS: usize = 64;

/// Bounds of time and space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TransferLimits {
    /// For everything that the node sends, in bytes per second; 0 for no limit.
    pub(crate) bytes_per_second: u64,
    /// Snapshots that are sent at a time.
    pub(crate) outgoing: usize,
    /// Those that wait for it.
    pub(crate) waiting: usize,
    /// Snapshots that are received at a time; as many are kept.
    pub(crate) incoming: usize,
    /// How long a transfer that broke off is kept to be gone on with.
    pub(crate) keep: Duration,
    /// Attempts in a row without a new chunk, until the sender gives up.
    pub(crate) attempts: u32,
    /// The pause after the first of them, which doubles up to the longest one.
    pub(crate) first_pause: Duration,
    pub(crate) longest_pause: Duration,
    pub(crate) connect_timeout: Duration,
    /// How long the other side may take for its part of the handshake, and the receiver to begin.
    pub(crate) answer_timeout: Duration,
    /// How long nothing may come or go, the receiver's last sync included.
    pub(crate) idle_timeout: Duration,
    /// How long a replica may take to install what has arrived.
    pub(crate) install_timeout: Duration,
}

impl Default for TransferLimits {
    fn default() -> TransferLimits {
        TransferLimits {
            bytes_per_second: 0,
            outgoing: 2,
            waiting: 256,
            incoming: 4,
            keep: Duration::from_secs(60),
            attempts: 8,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            answer_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            install_timeout: Duration::from_secs(60),
        }
    }
}

/// A snapshot that has arrived: its file is complete and durable, and the table holds what it holds.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) id: SnapshotId,
    /// The replica that sent it, and the one that it is for.
    pub(crate) replica_from: u64,
    pub(crate) replica_to: u64,
    /// The term in which it was sent.
    pub(crate) term: u64,
    pub(crate) meta: SnapshotMeta,
    pub(crate) table: Table,
    /// To be told whether the replica has taken it; the sender hears of it. Dropped, it says no.
    pub(crate) installed: oneshot::Sender<bool>,
}

/// What the receiver asks and tells the replicas. Both are called on tokio's threads and must not block.
pub(crate) trait Replicas: Send + Sync + 'static {
    /// An empty table for the snapshot, if a replica here has a use for it.
    fn wanted(&self, offer: &SnapshotOffer<'_>) -> Option<Table>;
    /// A snapshot has arrived.
    fn received(&self, received: Received);
}

/// All transfers of a node. When it is dropped they end.
#[derive(Debug)]
pub(crate) struct Transfers {
    jobs: mpsc::Sender<sender::Job>,
    streams: mpsc::Sender<BulkStream>,
    tasks: [JoinHandle<()>; 2],
}

impl Transfers {
    /// Begins with none. `disk` is that of the node's snapshots.
    pub(crate) fn start(
        runtime: &Handle,
        local: LocalIdentity,
        disk: Arc<dyn Disk>,
        replicas: Arc<dyn Replicas>,
        limits: TransferLimits,
    ) -> Transfers {
        let (jobs, job_queue) = mpsc::channel(JOBS);
        let (streams, stream_queue) = mpsc::channel(STREAMS);
        let sender = sender::run(local, Arc::clone(&disk), limits, job_queue);
        let receiver = receiver::run(disk, replicas, limits, stream_queue);
        let tasks =
            [runtime.spawn(sender.in_current_span()), runtime.spawn(receiver.in_current_span())];
        Transfers { jobs, streams, tasks }
    }

    /// Sends a snapshot, or lets it wait for those before it. One that waits for the same replica makes
    /// room for a newer one. `on_done` is called once, on any thread: whether the replica has taken it.
    pub(crate) fn send(&self, outgoing: Outgoing, on_done: impl FnOnce(bool) + Send + 'static) {
        // A job that is dropped says no.
        let _ = self.jobs.try_send(sender::Job::new(outgoing, on_done));
    }

    /// Takes a connection on which a snapshot comes. With too many it is closed; the sender tries again.
    pub(crate) fn receive(&self, stream: BulkStream) {
        let _ = self.streams.try_send(stream);
    }

    /// Ends all transfers.
    pub(crate) async fn stop(self) {
        drop((self.jobs, self.streams));
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

/// Runs what may block on a thread that may. `None` where the runtime is stopping.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Some(result),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => None,
        },
    }
}
