//! What all threads of a node share: where partitions live, their tables, and the counters.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use flux_cdc::{Led, Metrics};
use flux_core::placement::NodeId;
use flux_core::replica::{Now, View};
use flux_core::store::{Memory, Table, TableOptions};
use flux_core::{Command, Error, PartitionId, Partitions, Reply, Revision};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{oneshot, watch};

use crate::clock;
use crate::cluster::Topology;
use crate::config::Settings;
use crate::feed::{Nodes, PartitionFeed};
use crate::mailbox::{Ask, Mailbox, Message, Waiter};
use crate::resp::Session;
use crate::stats::Stats;
use crate::transfer::Transfers;

/// A partition as any thread may see it.
#[derive(Debug)]
pub(crate) struct PartitionView {
    pub(crate) table: Arc<Table>,
    /// What the replica of this node is in its group.
    pub(crate) standing: Arc<View>,
    /// The other node that says to lead it, for where this node has no replica that would know.
    pub(crate) claim: Mutex<Option<Claim>>,
    /// Its changes, for those who follow them.
    pub(crate) feed: PartitionFeed,
}

/// A node says that it leads a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) node: NodeId,
    pub(crate) term: u64,
}

impl PartitionView {
    /// Another node says that it leads the partition. One of a later term knows better.
    pub(crate) fn claim(&self, claim: Claim) {
        let mut known = self.claim.lock();
        if known.is_none_or(|known| known.node == claim.node || known.term < claim.term) {
            *known = Some(claim);
        }
    }

    /// Forgets who says to lead the partition, if it is like that.
    pub(crate) fn void_claims(&self, like: impl Fn(&Claim) -> bool) {
        self.claim.lock().take_if(|claim| like(claim));
    }

    /// What `look` finds, which asks the standing first and then the table; `None` if the replica left
    /// meanwhile. Its standing ends before its table is emptied, so whoever has seen the one before and the
    /// other after would take what is gone for what never was.
    pub(crate) fn undisturbed<T>(&self, look: impl FnOnce() -> Option<T>) -> Option<T> {
        let replacements = self.table.replacements();
        let found = look()?;
        (self.table.replacements() == replacements).then_some(found)
    }
}

/// A RESP connection as other workers see it.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) worker: u16,
    pub(crate) session: Arc<Mutex<Session>>,
}

/// A node's place in its cluster.
#[derive(Debug)]
pub(crate) struct ClusterSeat {
    pub(crate) me: NodeId,
    /// Snapshots to and from other nodes.
    pub(crate) transfers: OnceLock<Transfers>,
    pub(crate) topology: RwLock<Arc<Topology>>,
    /// When each node last answered a beat of any worker: where nodes have different numbers of workers, the
    /// answer comes to another worker than the one that asked.
    pub(crate) answered: Mutex<BTreeMap<u32, u64>>,
}

/// The state of a node that is not one worker's own.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) node_id: String,
    pub(crate) data_addr: SocketAddr,
    pub(crate) partitions: Partitions,
    /// In a cluster: who this node is, and what is known of the others.
    pub(crate) cluster: Option<ClusterSeat>,
    pub(crate) views: Vec<PartitionView>,
    /// The partitions that are led here, for those who pass on their changes.
    pub(crate) led: watch::Sender<Arc<[Led]>>,
    /// What the publisher counts, where a broker is set.
    pub(crate) published: OnceLock<Arc<Metrics>>,
    pub(crate) table_options: TableOptions,
    pub(crate) mailboxes: Vec<Arc<Mailbox>>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) started: Instant,
    /// Connections open now, on the data port.
    pub(crate) connections: AtomicUsize,
    pub(crate) next_connection: AtomicU64,
    /// Connections to the gRPC servers of the other nodes.
    pub(crate) nodes: Arc<Nodes>,
    /// Watches open now.
    pub(crate) watchers: Arc<AtomicUsize>,
    /// The sessions of all RESP connections, by number.
    pub(crate) clients: Mutex<BTreeMap<u64, Client>>,
    /// Bytes of all workers' logs on disk.
    pub(crate) log_bytes: AtomicU64,
    /// Those that are kept for nobody but those who follow changes.
    pub(crate) log_pinned_bytes: AtomicU64,
    /// When a snapshot was last finished, in seconds since the Unix epoch; 0 for never.
    pub(crate) last_snapshot_s: AtomicU64,
    /// Settings that CONFIG SET can change.
    pub(crate) max_connections: AtomicUsize,
    pub(crate) idle_timeout_s: AtomicU64,
    /// Why the node takes no writes any more, if it does not.
    pub(crate) failure: Mutex<Option<String>>,
    /// Told once there is a failure.
    pub(crate) failed: tokio::sync::Notify,
    pub(crate) stopping: AtomicBool,
    /// Workers that were told to stop and have no connection left. The last one lets all of them end:
    /// until then each may be asked by the others.
    pub(crate) drained: AtomicUsize,
}

impl Shared {
    /// Tells all workers what has changed in the cluster. False if one of them must be told again.
    pub(crate) fn follow(&self, topology: &Arc<Topology>) -> bool {
        let Some(seat) = &self.cluster else { return true };
        *seat.topology.write() = Arc::clone(topology);
        let tell = |mailbox: &Arc<Mailbox>| mailbox.send(Message::Topology(Arc::clone(topology)));
        self.mailboxes.iter().map(tell).filter(Result::is_err).count() == 0
    }

    /// The worker that owns a partition.
    pub(crate) fn owner(&self, partition: PartitionId) -> u16 {
        partition.0 % self.mailboxes.len() as u16
    }

    /// Answers a read from the partition's table, if this node surely leads it at this moment, which must
    /// have been taken after the read came.
    pub(crate) fn read(
        &self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        now: Now,
    ) -> Option<Reply> {
        let view = &self.views[usize::from(partition.0)];
        view.undisturbed(|| {
            let may_serve = view.standing.may_serve(now.us);
            may_serve.then(|| flux_core::evaluate::read(&view.table, now.ms, command))
        })
    }

    /// Answers a read from what the replica of this node has applied, if there is one that ever was up to
    /// date; with its revision and age in microseconds.
    pub(crate) fn read_stale(
        &self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        now: Now,
    ) -> Option<(Reply, Revision, u64)> {
        let view = &self.views[usize::from(partition.0)];
        view.undisturbed(|| {
            let (revision, age_us) = view.standing.staleness(now.us);
            let age_us = age_us?;
            let reply = flux_core::evaluate::read(&view.table, now.ms, command);
            Some((reply, revision, age_us))
        })
    }

    /// Carries out a command from a task of the asynchronous runtime.
    pub(crate) async fn execute(
        &self,
        partition: PartitionId,
        command: Command<Vec<u8>>,
        ask: Ask,
    ) -> Reply {
        if (command.is_point_read() || command.is_walk())
            && let Some(reply) = self.read(partition, &command.borrowed(), clock::now())
        {
            self.stats.reads.add(1);
            return reply;
        }
        let (sender, receiver) = oneshot::channel();
        let (command, waiter) = (Box::new(command), Waiter::Task(sender));
        let mailbox = &self.mailboxes[usize::from(self.owner(partition))];
        if mailbox.send(Message::Command { partition, command, ask, waiter }).is_err() {
            let stopping = self.stopping.load(Ordering::Relaxed);
            let error = if stopping { Error::Stopping } else { Error::Overloaded };
            return Reply::Error(error);
        }
        // The worker drops the sender only when it ends before the batch is decided.
        receiver.await.unwrap_or(Reply::Error(Error::OutcomeUnknown))
    }

    /// What tells the node's cluster from any other one, in the tokens of watches. Of a node alone, what tells
    /// its data directory.
    pub(crate) fn token_cluster(&self) -> u64 {
        let alone = || {
            // FNV-1a.
            let mix = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            self.node_id.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
        };
        let topology = self.cluster.as_ref().map(|seat| Arc::clone(&seat.topology.read()));
        let id = topology.and_then(|topology| {
            topology.cluster_id.or(topology.map.as_ref().map(|map| map.cluster_id))
        });
        id.unwrap_or_else(alone)
    }

    /// Keys in all partitions.
    pub(crate) fn keys(&self) -> usize {
        self.views.iter().map(|view| view.table.len()).sum()
    }

    /// Keys that expire, in all partitions.
    pub(crate) fn volatile_keys(&self) -> usize {
        self.views.iter().map(|view| view.table.volatile_len()).sum()
    }

    /// Records why the node takes no writes any more; the first reason stays.
    pub(crate) fn fail(&self, reason: &str) {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            *failure = Some(reason.to_owned());
            self.failed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> PartitionView {
        let table = Table::new(TableOptions { hash_seed: 1, shards: 2 }, Memory::new(0));
        let (standing, claim) = (Arc::default(), Mutex::default());
        PartitionView { table: Arc::new(table), standing, claim, feed: PartitionFeed::default() }
    }

    #[test]
    fn what_a_replica_that_leaves_has_no_more_is_not_read_as_absent() {
        let view = view();
        assert_eq!(view.undisturbed(|| Some(7)), Some(7));
        assert_eq!(view.undisturbed(|| None::<u32>), None);
        // As `place_replicas` does it, on another thread, after the standing was looked at.
        let read = view.undisturbed(|| {
            view.standing.clear();
            view.table.clear();
            Some("absent")
        });
        assert_eq!(read, None);
    }

    #[test]
    fn of_two_nodes_that_claim_a_partition_the_later_term_counts() {
        let view = view();
        let known = || view.claim.lock().map(|claim| (claim.node.0, claim.term));
        let claim = |node, term| view.claim(Claim { node: NodeId(node), term });
        claim(1, 5);
        claim(2, 4);
        claim(3, 5);
        assert_eq!(known(), Some((1, 5)), "not an older one, nor one of the same term");
        claim(2, 6);
        assert_eq!(known(), Some((2, 6)));
        view.void_claims(|claim| claim.node == NodeId(1));
        assert_eq!(known(), Some((2, 6)), "of another node");
        view.void_claims(|claim| claim.term <= 6);
        assert_eq!(known(), None);
        claim(1, 5);
        assert_eq!(known(), Some((1, 5)));
    }
}
