//! A node's process around the real replicas and the real log: what a worker of `flux-server` does,
//! without threads and sockets.
//!
//! It acts only in turns. A turn takes what came in, evaluates it, writes once, begins at most one sync,
//! and leaves what goes out in an [`Output`]; the world carries that on. It syncs as with `fsync = always`, and
//! sends what it proposes to the followers while its own sync is under way.

mod boot;
mod feed;
mod peers;
mod planted;
mod snapshots;
mod turn;

use std::collections::BTreeMap;
use std::sync::Arc;

use flux_core::replica::{Now, Replica, ReplicaConfig, SnapshotMeta, View};
use flux_core::store::Table;
use flux_core::{PartitionId, Reply};
use flux_log::{Log, LogError, Lsn, SimDisk};
use raft::eraftpb::Message;

use crate::check::consensus::Contents;
use crate::client::Request;
use crate::plan::Plan;
use crate::plant::Plant;

pub use boot::BootError;
pub use feed::{Answered, Asked, Outcome, Outgoing, TIMEOUT_US, Told};
pub use peers::Frame;

/// Whom a reply is for: a request of a client.
pub type Waiter = (u32, u64);

/// What came in for a process and waits for its next turn.
#[derive(Debug)]
pub enum Work {
    /// A message of a peer.
    Message(u16, Message),
    /// What another node says.
    Frame(u32, Frame),
    /// A connection from a node is new.
    LinkUp(u32),
    /// A connection to or from a node has broken.
    LinkDown(u32),
    /// A request of a client.
    Request(Request),
    /// A snapshot of a peer, complete.
    Snapshot(SnapshotParcel),
    /// What became of a snapshot that was sent to a replica.
    SnapshotReport(u16, u64, bool),
    /// What was sent to a replica may be lost.
    Unreachable(u16, u64),
    /// It is time for a tick.
    Tick,
    /// Somebody asks that the leader of a partition hand over.
    Transfer(u16, Option<u64>),
    /// The broker has taken a connection, by its number, or is not there.
    BrokerOpened(Option<u64>),
    /// A connection to the broker has broken.
    BrokerLost(u64),
    /// What became of a message, by its connection and its number there.
    BrokerAnswers(u64, u64, Outcome),
    /// What comes of a question for changes to another node, by its number.
    ElsewhereAnswers(u64, Answered),
}

/// A snapshot on its way.
#[derive(Clone, Debug)]
pub struct SnapshotParcel {
    /// The partition.
    pub partition: u16,
    /// Who sends it, and in which term.
    pub from: u64,
    /// The sender's term.
    pub term: u64,
    /// For whom it is.
    pub to: u64,
    /// What it stands for.
    pub meta: SnapshotMeta,
    /// Its contents.
    pub chunks: Vec<Vec<u8>>,
}

/// What a turn leaves for the world to carry on.
#[derive(Debug, Default)]
pub struct Output {
    /// Messages for peers, by partition.
    pub messages: Vec<(u16, Message)>,
    /// What other nodes are told, in this order.
    pub frames: Vec<(u32, Frame)>,
    /// Nodes to which the connection is to be opened anew.
    pub resets: Vec<u32>,
    /// Snapshots for peers; `Err` names a replica whose snapshot could not be read.
    pub snapshots: Vec<Result<SnapshotParcel, (u16, u64)>>,
    /// Snapshots that were taken in, or were of no use: the partition, who sent it, to whom, and whether
    /// it was installed.
    pub received: Vec<(u16, u64, u64, bool)>,
    /// Answers to clients.
    pub replies: Vec<(Waiter, u16, Reply)>,
    /// A sync began.
    pub syncing: bool,
    /// It wants a connection to the broker.
    pub connects: bool,
    /// Messages for the broker, in this order.
    pub publications: Vec<Outgoing>,
    /// Questions to other nodes for changes that the log here lacks.
    pub asked: Vec<Asked>,
    /// Gaps that the broker is to be told of.
    pub gaps: Vec<Told>,
    /// Log went that a reader still needed.
    pub released: bool,
    /// Entries that were written.
    pub appended: Vec<Appended>,
    /// What is of interest for the trace.
    pub notes: Vec<String>,
    /// There is more to do at once.
    pub again: bool,
    /// The log failed: the process ends.
    pub failed: Option<String>,
}

/// An entry that was written.
#[derive(Debug)]
pub struct Appended {
    /// The partition.
    pub partition: u16,
    /// Its index and term.
    pub position: (u64, u64),
    /// The term of the entry before it, where that is known.
    pub before: Option<u64>,
    /// What it holds.
    pub contents: Contents,
}

/// One replica of the process.
pub struct Hosted {
    /// The replica.
    pub replica: Replica<Waiter>,
    /// Its table.
    pub table: Arc<Table>,
    /// What any thread may know of it.
    pub view: Arc<View>,
    /// The entries of its log as they were written, from the last snapshot that it started from.
    pub shadow: BTreeMap<u64, (u64, Contents)>,
    /// The last applied entry that the checkers have seen.
    pub checked: u64,
    start: u64,
    /// The snapshot that it was last started from, if the log has nothing before that and does not say so: a
    /// process that took it in ended before it could.
    begins: u64,
    feed: feed::PartitionFeed,
}

/// A running process.
pub struct Process {
    /// Tells it from earlier and later ones of its host.
    pub number: u64,
    /// By partition.
    pub hosted: BTreeMap<u16, Hosted>,
    /// What waits for the next turn.
    pub inbox: Vec<Work>,
    log: Log,
    snapshot_disk: SimDisk,
    options: Options,
    written: Vec<Written>,
    syncing: Option<Syncing>,
    snapshot_indexes: BTreeMap<u16, u64>,
    walk: Option<snapshots::Walk>,
    planted: planted::Planted,
    peers: peers::Peers,
    link: feed::Link,
    /// What the map said when it was last followed.
    known_targets: Vec<Vec<u64>>,
}

/// What a turn is told of the world.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The time.
    pub now: Now,
    /// What reads are judged by: the same time, unless a bug is planted.
    pub read_now: Now,
    /// The voters that each partition should have, as this node knows them.
    pub targets: &'a [Vec<u64>],
    /// The epoch of the map that has them.
    pub epoch: u64,
    /// The nodes of the cluster.
    pub nodes: &'a [u32],
    /// Whether the disk does a sync that begins now at once.
    pub sync_early: bool,
}

/// What a process is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's number.
    pub node: u32,
    /// Makes hashes and timeouts differ between nodes.
    pub seed: u64,
    /// The bug that it has.
    pub plant: Option<Plant>,
    tick_us: u64,
    election_ticks: usize,
    heartbeat_ticks: usize,
    drift_percent: u8,
    tail_bytes: usize,
    segment_bytes: u64,
    snapshot_log_bytes: u64,
    publishes: bool,
    batch_max_events: usize,
    ring_bytes: usize,
    retention_bytes: u64,
}

/// What a `Ready` asked to be written, and what waits for that to be durable.
struct Written {
    partition: u16,
    number: u64,
    messages: Vec<Message>,
    /// It was a term and vote, and no entries.
    is_vote: bool,
}

struct Syncing {
    covers: Vec<Written>,
    /// The result, if the disk did it when it was asked; else it does it when the time has passed. A power
    /// cut in between finds the writes safe or not, as it may be.
    result: Option<std::io::Result<Lsn>>,
    target: flux_log::SyncTarget,
}

impl Options {
    /// Those of a node in a plan.
    pub fn new(plan: &Plan, node: u32, seed: u64) -> Options {
        let ignores_drift = plan.plant == Some(Plant::LeaseIgnoresDrift);
        Options {
            node,
            seed,
            plant: plan.plant,
            tick_us: plan.tick_us,
            election_ticks: plan.election_ticks,
            heartbeat_ticks: plan.heartbeat_ticks,
            drift_percent: if ignores_drift { 0 } else { plan.drift_percent },
            tail_bytes: plan.tail_bytes,
            segment_bytes: plan.segment_bytes,
            snapshot_log_bytes: plan.snapshot_log_bytes,
            publishes: plan.publishes,
            batch_max_events: plan.batch_max_events,
            ring_bytes: plan.ring_bytes,
            retention_bytes: plan.retention_bytes,
        }
    }

    fn replica(&self, partition: u16, id: u64) -> ReplicaConfig {
        ReplicaConfig {
            partition: PartitionId(partition),
            id,
            tick_us: self.tick_us,
            heartbeat_ticks: self.heartbeat_ticks,
            election_ticks: self.election_ticks,
            drift_percent: self.drift_percent,
            tail_bytes: self.tail_bytes,
            previous_versions: true,
            include_previous: false,
            seed: self.seed,
        }
    }

    fn has(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }
}

impl Process {
    /// The replica of a partition, if there is one here.
    pub fn replica(&self, partition: u16) -> Option<&Replica<Waiter>> {
        self.hosted.get(&partition).map(|hosted| &hosted.replica)
    }

    /// Whether a sync is under way.
    pub fn is_syncing(&self) -> bool {
        self.syncing.is_some()
    }

    /// Puts a replica here with which its partition begins.
    ///
    /// # Errors
    /// What the log or disk says; the process cannot go on then.
    pub fn found(
        &mut self,
        partition: u16,
        id: u64,
        voters: &[u64],
        now: Now,
    ) -> Result<(), BootError> {
        let hosted = self.begin(partition, id, SnapshotMeta::founding(voters.to_vec()), now)?;
        self.hosted.insert(partition, hosted);
        Ok(())
    }

    /// Puts a new replica here, which knows nothing. It writes who it is with the first that it learns.
    ///
    /// # Errors
    /// None that an empty replica has.
    pub fn place(&mut self, partition: u16, id: u64, now: Now) -> Result<(), BootError> {
        let hosted = self.empty(partition, id, now)?;
        self.hosted.insert(partition, hosted);
        Ok(())
    }

    /// Removes a replica, of which nothing stays.
    ///
    /// # Errors
    /// What the log or disk says; the process cannot go on then.
    pub fn remove(&mut self, partition: u16) -> Result<(), LogError> {
        self.hosted.remove(&partition);
        self.written.retain(|written| written.partition != partition);
        if let Some(syncing) = &mut self.syncing {
            syncing.covers.retain(|written| written.partition != partition);
        }
        if self.walk.as_ref().is_some_and(|walk| walk.is_of(partition)) {
            self.walk = None;
        }
        self.forget(partition)
    }
}
