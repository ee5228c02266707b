//! How other threads reach a worker: bounded queues that wake its loop.
//!
//! Requests are refused when the queue is full. Answers come back through a queue of their own, which
//! cannot overflow: a worker has at most `MAX_OUTSTANDING` requests with others.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_core::replica::{Message as RaftMessage, Status};
use flux_core::session::Once;
use flux_core::{Command, PartitionId, Reply, Trace};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::cluster::Topology;
use crate::transfer::Received;

/// Requests that may wait in a worker's mailbox.
pub(crate) const CAPACITY: usize = 16 * 1024;

/// Requests of one worker that may be with other workers at a time.
pub(crate) const MAX_OUTSTANDING: usize = 16 * 1024;

/// Whom a reply is for.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A request of a connection.
    Connection(Origin),
    /// A task on the runtime of the gRPC server.
    Task(oneshot::Sender<Reply>),
    /// A request of another node.
    Peer(PeerRequest),
    /// A request that its worker has kept, because an error of the replica here is not the last word.
    Kept(u64),
}

/// A request of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerRequest {
    pub(crate) node: u32,
    /// The process that asks: the next one of the node may use its ids again.
    pub(crate) instance: u64,
    pub(crate) id: u64,
}

/// How a command wants to be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ask {
    /// Where another node leads, say so instead of asking that node.
    pub(crate) redirect: bool,
    /// Any replica may answer from what it has applied.
    pub(crate) stale: bool,
    /// By what a repeated write is known.
    pub(crate) once: Option<Once>,
    /// The trace that a write belongs to. Few have one, and those that have none stay small.
    pub(crate) trace: Option<Box<Trace>>,
    /// How long the client waits.
    pub(crate) patience: Option<Duration>,
    /// Until when this node looks for somebody who carries it out; unknown before it begins to.
    pub(crate) deadline: Option<Instant>,
}

/// A request of a connection, or one part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The worker that owns the connection.
    pub(crate) worker: u16,
    /// Which part of the request; 0 unless its keys span partitions.
    pub(crate) part: u32,
    /// The connection's place in its worker.
    pub(crate) connection: u32,
    /// Tells it from earlier connections at the same place.
    pub(crate) serial: u32,
    /// The request's number on the connection.
    pub(crate) sequence: u64,
}

/// What a worker is asked by another thread.
#[derive(Debug)]
pub(crate) enum Message {
    /// A command for one of its partitions.
    Command { partition: PartitionId, command: Box<Command<Vec<u8>>>, ask: Ask, waiter: Waiter },
    /// A message of Raft for one of its replicas.
    Raft { partition: PartitionId, message: Box<RaftMessage> },
    /// The group of one of its replicas has gone on without it.
    Gone { partition: PartitionId, replica: u64 },
    /// A connection of another node, with what was read from it.
    Peer { stream: mio::net::TcpStream, input: Vec<u8> },
    /// What is known of the cluster has changed.
    Topology(Arc<Topology>),
    /// Say how the replicas are.
    Inspect(oneshot::Sender<Vec<Inspected>>),
    /// Hand the leadership of a partition over to the replica of a node.
    HandOver { partition: PartitionId, to: NodeId, answer: oneshot::Sender<Result<(), String>> },
    /// Hand the leadership of every partition over, where another replica can lead.
    HandAllOver,
    /// Take a snapshot of a partition now.
    Snapshot { partition: PartitionId, answer: SnapshotAnswer },
    /// Accept connections, for all workers.
    Listen(mio::net::TcpListener),
    /// Accept connections of other nodes, for all workers.
    ListenPeers(mio::net::TcpListener),
    /// A connection that it shall own.
    Connection(mio::net::TcpStream),
    /// Close the connection with this number.
    Kill(u64),
    /// Stop: no new connections or requests, finish what is under way, close the log.
    Stop,
}

/// Who waits for a snapshot.
pub(crate) type SnapshotAnswer = oneshot::Sender<Result<TakenSnapshot, String>>;

/// A snapshot that was asked for. Its file stays readable when a newer one takes its place.
#[derive(Debug)]
pub(crate) struct TakenSnapshot {
    pub(crate) id: flux_log::SnapshotId,
    pub(crate) file: Arc<dyn flux_log::File>,
}

/// A replica with the keys and bytes of its table.
#[derive(Clone, Debug)]
pub(crate) struct Inspected {
    pub(crate) status: Status,
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
}

/// What comes back to a worker, and never overflows.
#[derive(Debug)]
pub(crate) enum Return {
    /// The reply to a request of one of its connections.
    Reply(Origin, Reply),
    /// Its sync thread has finished.
    Synced(Result<flux_log::Lsn, io::Error>),
    /// Its sync thread has made the next segment, or could not.
    Prepared(Result<flux_log::PreparedSegment, flux_log::LogError>),
    /// Its snapshot thread has finished the snapshot of a partition, or could not.
    SnapshotWritten { partition: u16, result: Result<(), flux_log::LogError> },
    /// A replica of another node has taken the snapshot that it was sent, or has not.
    SnapshotSent { partition: PartitionId, to: u64, taken: bool },
    /// A snapshot for one of its replicas has come from another node.
    SnapshotReceived(Box<Received>),
    /// Another node has answered a command of this worker.
    Forwarded { id: u64, payload: Vec<u8> },
    /// The snapshot thread takes another chunk.
    SnapshotRoom,
}

/// The sending half, shared by all threads.
#[derive(Debug)]
pub(crate) struct Mailbox {
    sender: SyncSender<Message>,
    returns: Mutex<Vec<Return>>,
    asleep: AtomicBool,
    waker: mio::Waker,
}

impl Mailbox {
    /// A mailbox that wakes a loop through `waker`, and the end that the loop reads.
    pub(crate) fn new(waker: mio::Waker) -> (Arc<Mailbox>, Receiver<Message>) {
        let (sender, receiver) = sync_channel(CAPACITY);
        let (returns, asleep) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        (Arc::new(Mailbox { sender, returns, asleep, waker }), receiver)
    }

    /// Sends a request, or gives it back when the mailbox is full or its worker has ended.
    pub(crate) fn send(&self, message: Message) -> Result<(), Message> {
        self.sender.try_send(message).map_err(|error| match error {
            TrySendError::Full(message) | TrySendError::Disconnected(message) => message,
        })?;
        self.wake();
        Ok(())
    }

    /// Sends a request that must arrive. Waits until the mailbox has room, or its worker has ended.
    pub(crate) fn send_surely(&self, message: Message) {
        let _ = self.sender.send(message);
        self.wake();
    }

    /// Tells the worker to stop. Waits until its mailbox has room, or it has ended.
    pub(crate) fn stop(&self) {
        // A worker that has ended needs no telling.
        let _ = self.sender.send(Message::Stop);
        self.wake();
    }

    /// Sends an answer.
    pub(crate) fn answer(&self, answer: Return) {
        self.returns.lock().push(answer);
        self.wake();
    }

    /// Sends answers, leaving the vector empty.
    pub(crate) fn answer_all(&self, answers: &mut Vec<Return>) {
        self.returns.lock().append(answers);
        self.wake();
    }

    /// Takes the answers that have come, in exchange for an empty vector.
    pub(crate) fn take_answers(&self, into: &mut Vec<Return>) {
        std::mem::swap(&mut *self.returns.lock(), into);
    }

    /// The loop says that it is going to sleep. It must look at its queues once more before it does:
    /// what was sent before this is not going to wake it.
    pub(crate) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The loop is awake and will look at its queues.
    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Whether answers wait.
    pub(crate) fn has_answers(&self) -> bool {
        !self.returns.lock().is_empty()
    }

    /// Wakes the loop if it sleeps: one system call for any number of messages until it is awake.
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            // An eventfd write fails only when it is full, and then a wake-up is already pending.
            let _ = self.waker.wake();
        }
    }
}
