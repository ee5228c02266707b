//! A worker: one thread with one event loop, which owns connections and partitions.
//!
//! Each round it polls, serves the connections that are ready, looks at its mailbox, then takes one
//! turn: everything that came in since the last one goes to the log with one write, and all replies
//! that are due go out. Only fdatasync and snapshot files are left to threads of their own.
//!
//! ```text
//! poll -> serve (parse, read, evaluate) -> mailbox -> expire -> turn (propose, write, apply)
//!      -> deliver replies -> flush
//! ```

mod captured;
mod cluster;
mod connections;
mod dispatch;
mod forward;
mod led;
mod members;
mod node_commands;
mod request;
mod serve;
mod snapshots;
mod syncer;
#[cfg(test)]
mod tests;
mod turn;
mod walks;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_core::replica::Replica;
use flux_core::{PartitionId, Reply};
use flux_log::Log;
use mio::net::TcpListener;
use mio::{Events, Poll, Token};
use slab::Slab;

use crate::clock::unix_ms;
use crate::cluster::Topology;
use crate::connection::Connection;
use crate::mailbox::{Mailbox, Message, Origin, Return, Waiter};
use crate::peer::{Limits, LocalIdentity, Peers};
use crate::recovery::TICK;
use crate::shared::Shared;
use cluster::Cluster;
use dispatch::Dispatch;
use snapshots::Snapshots;
use syncer::Syncer;
use turn::Turn;

/// Token of the mailbox's waker.
pub(crate) const WAKER: Token = Token(usize::MAX);
/// Token of the listener, which the first worker has.
const LISTENER: Token = Token(usize::MAX - 1);
/// Token of the listener for other nodes, which the first worker has.
const PEER_LISTENER: Token = Token(usize::MAX - 2);
/// Tokens of connections with other nodes.
const PEERS: std::ops::Range<usize> = usize::MAX - 4096..usize::MAX - 16;

/// How often idle connections are looked for.
const IDLE_SWEEP: Duration = Duration::from_secs(1);
/// Bytes read from a socket at a time, and then it is another's turn.
const READ_BYTES: usize = 64 * 1024;
/// Messages taken from the mailbox in a round.
const MESSAGES_PER_ROUND: usize = 1024;
/// How long one connection, or the mailbox, may keep the worker at a stretch.
const STRETCH: Duration = Duration::from_millis(2);
/// A worker that stops waits until other nodes have sent no commands for so long: what they send to a link
/// that is closed has an unknown outcome.
const LINGER: Duration = Duration::from_millis(60);
/// And that long at the most.
const LINGER_LIMIT: Duration = Duration::from_millis(500);
/// The shortest time between two refusals of the same kind in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What a worker is made of when the node starts.
pub(crate) struct WorkerParts {
    pub(crate) id: u16,
    pub(crate) shared: Arc<Shared>,
    pub(crate) poll: Poll,
    pub(crate) mailbox: Receiver<Message>,
    pub(crate) replicas: Vec<Replica<Waiter>>,
    pub(crate) log: Log,
    pub(crate) snapshot_disk: Arc<dyn flux_log::Disk>,
    pub(crate) snapshot_indexes: BTreeMap<u16, u64>,
    /// In a cluster: who this worker is.
    pub(crate) cluster: Option<ClusterParts>,
    /// Told once the partitions of this worker serve; in a cluster, once it runs.
    pub(crate) started: Sender<()>,
}

/// What a worker of a clustered node is given besides.
pub(crate) struct ClusterParts {
    pub(crate) identity: LocalIdentity,
    pub(crate) topology: Arc<Topology>,
}

pub(crate) struct Worker {
    id: u16,
    shared: Arc<Shared>,
    own_mailbox: Arc<Mailbox>,
    poll: Poll,
    mailbox: Receiver<Message>,
    /// The first worker has it, once all partitions serve.
    listener: Option<TcpListener>,
    /// The same for the other nodes.
    peer_listener: Option<TcpListener>,
    /// Connections may wait to be accepted though no event will say so.
    accept_again: bool,
    next_accept_warning: Instant,
    connections: Slab<Connection>,
    dispatch: Dispatch,
    turn: Turn,
    snapshots: Snapshots,
    /// Connections to serve in this round.
    listed: Vec<usize>,
    /// Connections with output to send in this round.
    unflushed: Vec<usize>,
    /// Bytes read from a socket and parsed where they are.
    scratch: Vec<u8>,
    answers: Vec<Return>,
    /// Connections that sleep: when their reply is due.
    sleepers: Vec<(Instant, Origin)>,
    /// State of the generator behind RANDOMKEY.
    random: u64,
    /// Told once this worker's partitions serve.
    started: Option<Sender<()>>,
    next_serial: u32,
    next_worker: u16,
    next_tick: Instant,
    next_sweep: Instant,
    /// Set when the worker is to stop: when it ends with whatever is unfinished.
    stop_by: Option<Instant>,
    /// The same: when it ends though other nodes still send it commands.
    linger_by: Option<Instant>,
    /// It was told to stop and has no connection left.
    drained: bool,
    /// What the log took on the disk, and how much of that for those who follow changes, when it was last added
    /// to the node's figures.
    reported_log_bytes: [u64; 2],
}

/// A worker that panics has found its own state broken. Its partitions could neither be served nor
/// trusted: the process ends, and recovery starts from the log.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Worker {
    pub(crate) fn new(parts: WorkerParts) -> io::Result<Worker> {
        let WorkerParts { id, shared, poll, mailbox, replicas, log, .. } = parts;
        let own_mailbox = Arc::clone(&shared.mailboxes[usize::from(id)]);
        let syncer = Syncer::start(id, Arc::clone(&own_mailbox))?;
        let now = Instant::now();
        let mut dispatch = Dispatch::new(id, Arc::clone(&shared), replicas);
        if let Some(ClusterParts { identity, topology }) = parts.cluster {
            let registry = poll.registry().try_clone()?;
            dispatch.peers = Some(Peers::new(identity, registry, PEERS, Limits::default()));
            let me = NodeId(identity.node);
            dispatch.cluster = Some(Box::new(Cluster::new(id, me, topology)));
        }
        Ok(Worker {
            id,
            own_mailbox: Arc::clone(&own_mailbox),
            poll,
            mailbox,
            listener: None,
            peer_listener: None,
            accept_again: false,
            next_accept_warning: now,
            connections: Slab::new(),
            dispatch,
            turn: Turn::new(log, syncer, &shared.settings, now),
            snapshots: Snapshots::start(
                id,
                parts.snapshot_disk,
                own_mailbox,
                parts.snapshot_indexes,
                &shared.settings,
            )?,
            shared,
            listed: Vec::new(),
            unflushed: Vec::new(),
            scratch: vec![0; READ_BYTES],
            answers: Vec::new(),
            sleepers: Vec::new(),
            random: u64::from(id),
            started: Some(parts.started),
            next_serial: 0,
            next_worker: 0,
            next_tick: now + TICK,
            next_sweep: now + IDLE_SWEEP,
            stop_by: None,
            linger_by: None,
            drained: false,
            reported_log_bytes: [0; 2],
        })
    }

    /// Runs until the node stops. The log is closed when it returns.
    pub(crate) fn run(mut self) -> Result<(), flux_log::LogError> {
        let _guard = AbortOnPanic;
        let mut events = Events::with_capacity(1024);
        // The first turn elects the replicas that are alone in their groups.
        self.dispatch.activate_all();
        self.round();
        loop {
            self.sleep(&mut events);
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => self.accept(),
                    PEER_LISTENER => self.accept_peers(),
                    token if PEERS.contains(&token.0) => {
                        if let Some(peers) = &mut self.dispatch.peers {
                            peers.ready(event, Instant::now());
                        }
                    }
                    Token(key) => self.ready(key, event),
                }
            }
            self.round();
            if self.finished() {
                break;
            }
        }
        self.turn.close()
    }

    /// Waits for the next event, or for the next thing that is due.
    fn sleep(&mut self, events: &mut Events) {
        self.own_mailbox.fall_asleep();
        let timeout = if self.has_work() { Duration::ZERO } else { self.until_due() };
        let polled = self.poll.poll(events, Some(timeout));
        self.own_mailbox.awake();
        if let Err(error) = polled
            && error.kind() != io::ErrorKind::Interrupted
        {
            // epoll_wait fails only when its arguments are wrong.
            panic!("worker {} cannot wait for events: {error}", self.id);
        }
    }

    /// Whether the next round has something to do without any event. Looks at the mailbox too, since
    /// what was sent before `fall_asleep` wakes nobody.
    fn has_work(&mut self) -> bool {
        if self.own_mailbox.has_answers() || !self.listed.is_empty() || self.dispatch.has_work() {
            return true;
        }
        if let Ok(message) = self.mailbox.try_recv() {
            self.receive(message);
            return true;
        }
        let frames = self.dispatch.peers.as_ref().is_some_and(Peers::has_work);
        frames || self.turn.is_due(&self.dispatch) || self.snapshots.has_work()
    }

    fn until_due(&self) -> Duration {
        let now = Instant::now();
        let mut due = self.next_tick.min(self.next_sweep);
        if let Some(wake) = self.sleepers.iter().map(|(wake, _)| *wake).min() {
            due = due.min(wake);
        }
        if let Some(sync) = self.turn.next_sync() {
            due = due.min(sync);
        }
        if let Some(link) = self.dispatch.peers.as_ref().and_then(Peers::next_due) {
            due = due.min(link);
        }
        let mut wait = due.saturating_duration_since(now);
        if let Some(expiry_ms) = self.dispatch.next_expiry_ms() {
            wait = wait.min(Duration::from_millis(expiry_ms.saturating_sub(unix_ms())));
        }
        wait
    }

    fn round(&mut self) {
        let now = Instant::now();
        self.dispatch.look_at_clock();
        for _ in 0..MESSAGES_PER_ROUND {
            let Ok(message) = self.mailbox.try_recv() else { break };
            self.receive(message);
            // Commands may be long: those who wait for the others have their turn, too.
            if now.elapsed() >= STRETCH {
                break;
            }
        }
        self.dispatch.receive_frames(now);
        self.serve_listed(now);
        self.take_answers();
        self.dispatch.expire();
        if now >= self.next_tick {
            // Not a tick more than time has passed: others rely on promises that are counted in ticks.
            self.next_tick = now + TICK;
            self.dispatch.tick(now);
            self.tick_links(now);
            if self.accept_again {
                self.accept();
            }
        }
        self.turn.take(&mut self.dispatch, now);
        if (self.dispatch.cluster.is_some() || self.dispatch.all_serving())
            && let Some(started) = self.started.take()
        {
            // The node may have given up starting.
            let _ = started.send(());
        }
        self.dispatch.continue_hand_overs();
        self.place_replicas();
        self.wake_sleepers(now);
        self.snapshots.step(&mut self.dispatch, &mut self.turn);
        self.deliver();
        self.dispatch.flush_frames(now);
        self.flush_all(now);
        self.dispatch.publish_tally();
        if now >= self.next_sweep {
            self.next_sweep = now + IDLE_SWEEP;
            self.close_idle(now);
            self.snapshots.trim_for_readers(&self.dispatch, &mut self.turn);
            self.report_log_bytes();
        }
    }

    /// Adds to the node's figures what the log has grown, or takes off what it has shrunk.
    fn report_log_bytes(&mut self) {
        let log = self.turn.log();
        let bytes = [log.bytes(), log.pinned_bytes()];
        let figures = [&self.shared.log_bytes, &self.shared.log_pinned_bytes];
        for ((figure, now), before) in figures.into_iter().zip(bytes).zip(self.reported_log_bytes) {
            figure.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
        }
        self.reported_log_bytes = bytes;
    }

    fn receive(&mut self, message: Message) {
        match message {
            Message::Command { partition, command, ask, waiter } => {
                self.dispatch.look_at_monotonic_clock();
                self.dispatch.execute_for(partition, &command.borrowed(), ask, waiter);
            }
            Message::Gone { partition, replica } => self.dispatch.on_gone(partition, replica),
            Message::Raft { partition, message } => {
                self.dispatch.look_at_monotonic_clock();
                self.dispatch.step(partition, *message);
            }
            Message::Peer { stream, input } => {
                if let Some(peers) = &mut self.dispatch.peers {
                    peers.adopt(stream, input, Instant::now());
                }
            }
            Message::ListenPeers(listener) => self.listen_to_peers(listener),
            Message::Topology(topology) => self.follow(topology),
            // Whoever asked may have given up.
            Message::Inspect(answer) => drop(answer.send(self.dispatch.inspect())),
            Message::HandOver { partition, to, answer } => {
                let _ = answer.send(self.begin_hand_over(partition, to));
            }
            Message::Snapshot { partition, answer } => self.snapshots.want(partition, answer),
            Message::HandAllOver => {
                if let Some(cluster) = &mut self.dispatch.cluster {
                    cluster.declines = true;
                }
                self.dispatch.hand_all_over();
            }
            Message::Listen(listener) => self.listen(listener),
            Message::Connection(stream) => self.adopt(stream),
            Message::Kill(id) => self.kill(id),
            Message::Stop => self.begin_stop(),
        }
    }

    fn take_answers(&mut self) {
        let mut answers = std::mem::take(&mut self.answers);
        self.own_mailbox.take_answers(&mut answers);
        for answer in answers.drain(..) {
            match answer {
                Return::Reply(origin, reply) => {
                    self.dispatch.outstanding -= 1;
                    self.complete(origin, reply);
                }
                Return::SnapshotSent { partition, to, taken } => {
                    if let Some((replica, _)) = self.dispatch.replica(partition) {
                        replica.report_snapshot(to, taken);
                        self.dispatch.activate(partition);
                    }
                }
                Return::SnapshotReceived(received) => self.install(*received),
                Return::Forwarded { id, payload } => self.dispatch.on_response(id, &payload),
                Return::Synced(result) => self.turn.synced(result, &mut self.dispatch),
                Return::Prepared(result) => self.turn.prepared(result),
                Return::SnapshotWritten { partition, result } => {
                    self.snapshots.written(
                        PartitionId(partition),
                        result,
                        &mut self.dispatch,
                        &mut self.turn,
                    );
                }
                Return::SnapshotRoom => self.snapshots.room(),
            }
        }
        self.answers = answers;
    }

    /// Hands out the replies of this turn.
    fn deliver(&mut self) {
        let mut replies = std::mem::take(&mut self.dispatch.replies);
        for (waiter, reply) in replies.drain(..) {
            let Some((waiter, reply)) = self.dispatch.unwrap_kept(waiter, reply) else { continue };
            match waiter {
                Waiter::Connection(origin) if origin.worker == self.id => {
                    self.complete(origin, reply);
                }
                Waiter::Connection(origin) => self.dispatch.answer_later(origin, reply),
                Waiter::Peer(request) => self.dispatch.respond(request, &reply),
                Waiter::Kept(_) => unreachable!("it was unwrapped"),
                // The task may have given up at its deadline.
                Waiter::Task(sender) => drop(sender.send(reply)),
            }
        }
        self.dispatch.replies = replies;
        self.dispatch.send_answers();
    }

    fn complete(&mut self, origin: Origin, reply: Reply) {
        let key = origin.connection as usize;
        let Some(connection) = self.connections.get_mut(key) else { return };
        if connection.serial != origin.serial {
            return;
        }
        let Some(reply) = request::continue_flush(connection, &mut self.dispatch, origin, reply)
        else {
            return;
        };
        let Some(reply) = walks::continue_walk(connection, &mut self.dispatch, origin, reply)
        else {
            return;
        };
        connection.complete(origin.sequence, origin.part, reply);
        if !connection.unflushed {
            connection.unflushed = true;
            self.unflushed.push(key);
        }
    }

    fn wake_sleepers(&mut self, now: Instant) {
        while let Some(at) = self.sleepers.iter().position(|(wake, _)| *wake <= now) {
            let (_, origin) = self.sleepers.swap_remove(at);
            self.complete(origin, Reply::Written { version: 0 });
        }
    }

    fn begin_stop(&mut self) {
        if self.stop_by.is_some() {
            return;
        }
        let now = Instant::now();
        let timeout = Duration::from_millis(self.shared.settings.shutdown_timeout_ms);
        self.stop_by = Some(now + timeout);
        self.linger_by = Some(now + LINGER_LIMIT);
        self.dispatch.wake_followers();
        // The publisher has stopped: what it has confirmed need not be published again after a restart.
        self.dispatch.put_cursors();
        // Dropping the listener refuses new connections.
        self.listener = None;
        // What clients have sent by now is still served, once; then nothing more is read.
        let keys: Vec<usize> = self.connections.iter().map(|(key, _)| key).collect();
        for &key in &keys {
            self.list(key);
        }
        self.serve_listed(now);
        for key in keys {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.say_goodbye();
                connection.closing = true;
                self.list_for_flush(key);
            }
        }
    }

    /// Whether the worker was told to stop and nobody needs it any more, or there is no time left.
    fn finished(&mut self) -> bool {
        let Some(stop_by) = self.stop_by else { return false };
        let count = self.shared.mailboxes.len();
        if !self.drained && self.connections.is_empty() {
            self.drained = true;
            if self.shared.drained.fetch_add(1, Ordering::AcqRel) + 1 == count {
                for mailbox in &self.shared.mailboxes {
                    mailbox.wake();
                }
            }
        }
        let all_drained = self.shared.drained.load(Ordering::Acquire) == count;
        let now = Instant::now();
        let left_alone =
            self.dispatch.is_left_alone(LINGER) || self.linger_by.is_none_or(|limit| now >= limit);
        (all_drained && left_alone && !self.turn.is_busy(&self.dispatch)) || now >= stop_by
    }
}
