//! A worker's part in its cluster: messages between replicas, commands for other nodes, and which
//! replicas are here.
//!
//! Frames come in before the turn and go out after it, all of a peer with one write. What the frames
//! mean to a group is decided in `flux-core`, how they travel in `peer`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flux_core::placement::{NodeId, ReplicaId};
use flux_core::replica::{
    Change, Message as RaftMessage, MessageType, Replica, Signal, Stamps, decode_message,
    encode_message,
};
use flux_core::session::Once;
use flux_core::{Command, Error, PartitionId, Reply};
use flux_proto::peer::{Frame, Request, encode, encode_with};

use super::dispatch::Dispatch;
use super::forward::{Forward, Forwards, deadline};
use super::led::Told;
use crate::cluster::Topology;
use crate::forward_codec::{decode_command, decode_reply, encode_reply};
use crate::mailbox::{Ask, Inspected, Message, PeerRequest, Return, Waiter};
use crate::peer::Event;
use crate::recovery::TICK;

/// Connections of other nodes that are remembered: far more than there are at a time.
const MAX_SESSIONS: usize = 4096;
/// Requests that are kept.
const MAX_KEPT: usize = 16 * 1024;
/// Answers that are kept for nodes whose links are down, and for how long.
const MAX_UNSENT: usize = 4096;
const UNSENT_PATIENCE: Duration = Duration::from_secs(2);
/// After so long without a byte the links to and from a node are opened anew.
const SILENCE: Duration = Duration::from_secs(3);
/// A node that has not answered a beat for so long is sent no commands.
const UNANSWERED: Duration = Duration::from_secs(2);
/// Ticks between two beats.
pub(super) const BEAT_TICKS: u64 = 2;
/// Ticks between two attempts of a replica without a place to learn that it is to go.
const ASK_TICKS: u64 = 20;
/// Ticks for which commands wait for the one that leadership is handed to, at most.
const HAND_OVER_TICKS: u64 = 10;
/// Ticks without a beat of a node until the groups that it leads wake up.
const SILENT_TICKS: u64 = 5;

/// What a worker of a clustered node has besides.
pub(super) struct Cluster {
    pub(super) me: NodeId,
    pub(super) topology: Arc<Topology>,
    pub(super) forwards: Forwards,
    /// Requests of these attempts are refused, since one before them was: by node, worker and partition.
    fences: BTreeMap<(u32, u64), u64>,
    /// Partitions whose leadership is being handed over, and to which replica.
    pub(super) handing_over: BTreeMap<PartitionId, HandOver>,
    /// Snapshots that followers are to be sent.
    pub(super) snapshots_to_send: Vec<(PartitionId, RaftMessage)>,
    /// A partition that is led here and needs a snapshot for a follower, as of the last tick.
    snapshot_wanted: Option<PartitionId>,
    /// The node is stopping, and takes no leadership over.
    pub(super) declines: bool,
    /// The topology has changed since the last tick.
    pub(super) changed: bool,
    pub(super) ticks: u64,
    /// There was a tick in this round.
    ticked: bool,
    /// What the other nodes know of what is led here.
    pub(super) told: Told,
    /// Requests whose reply from a replica here is not the last word.
    kept: BTreeMap<u64, Kept>,
    next_kept: u64,
    /// The connections that frames have come on.
    sessions: BTreeSet<u64>,
    /// Answers for nodes whose links are down, until when they are kept.
    pub(super) unsent: Vec<(Instant, PeerRequest, Reply)>,
    /// When the last frame of each node came, or a part of one.
    seen: BTreeMap<u32, u64>,
    /// When the last beat of each node came; of a node whose link was lost, since then.
    heard: BTreeMap<u32, u64>,
    /// When the last beats went out.
    sent: Stamps,
    /// When each node whose link is up last answered a beat.
    answered: BTreeMap<u32, u64>,
    /// When another node last sent a command.
    asked_us: u64,
    /// Beats to be answered.
    beats: Vec<(u32, u64)>,
    /// What replicas say about sleeping, and where to.
    signals: Vec<(u32, u16, Signal)>,
    /// Replicas that ask though their group has surely gone on without them.
    gone: Vec<(PartitionId, u64)>,
    /// Replicas of this worker that belong to their groups no more.
    pub(super) to_remove: Vec<PartitionId>,
}

/// Leadership on its way to another replica.
#[derive(Clone, Copy)]
pub(super) struct HandOver {
    to: u64,
    /// The other has been asked.
    begun: bool,
    /// The tick at which this began.
    since: u64,
}

/// A request that was given to a replica here, whose reply may have to be another one.
enum Kept {
    /// A read; the replica may not lead any more.
    Read { partition: PartitionId, command: Box<Command<Vec<u8>>>, ask: Ask, waiter: Waiter },
    /// A write that another node may have carried out: no error says that it was not.
    Again(Waiter),
}

impl Cluster {
    pub(super) fn new(worker: u16, me: NodeId, topology: Arc<Topology>) -> Cluster {
        Cluster {
            me,
            topology,
            forwards: Forwards::new(worker),
            fences: BTreeMap::new(),
            handing_over: BTreeMap::new(),
            snapshots_to_send: Vec::new(),
            snapshot_wanted: None,
            declines: false,
            changed: true,
            ticks: 0,
            ticked: false,
            told: Told::default(),
            kept: BTreeMap::new(),
            next_kept: 0,
            sessions: BTreeSet::new(),
            seen: BTreeMap::new(),
            unsent: Vec::new(),
            heard: BTreeMap::new(),
            sent: Stamps::default(),
            answered: BTreeMap::new(),
            asked_us: 0,
            beats: Vec::new(),
            signals: Vec::new(),
            gone: Vec::new(),
            to_remove: Vec::new(),
        }
    }

    /// Keeps a request; what is returned stands for its waiter.
    fn keep(&mut self, kept: Kept) -> Waiter {
        self.next_kept += 1;
        self.kept.insert(self.next_kept, kept);
        Waiter::Kept(self.next_kept)
    }

    fn targets(&self, partition: PartitionId) -> &[ReplicaId] {
        self.topology.map.as_ref().map_or(&[], |map| map.target(partition))
    }

    /// Whether a request comes behind one of the same attempt that was refused. Nothing comes of an attempt
    /// any more when there is another one.
    fn is_fenced(&mut self, node: u32, id: u64) -> bool {
        let route = (node, Forwards::route_of(id));
        let fenced = self.fences.get(&route).copied();
        if fenced.is_some_and(|fenced| fenced != Forwards::attempt_of(id)) {
            self.fences.remove(&route);
            return false;
        }
        fenced.is_some()
    }

    /// Refuses what comes behind a request that was refused.
    fn fence(&mut self, node: u32, id: u64) {
        self.fences.insert((node, Forwards::route_of(id)), Forwards::attempt_of(id));
    }
}

/// The node of a replica.
fn node_of(replica: u64) -> u32 {
    ReplicaId::from_u64(replica).node().0
}

/// Whether a replica that takes a message has something to write before it can answer.
fn needs_a_record(message: &RaftMessage) -> bool {
    match message.msg_type() {
        MessageType::MsgAppend => !message.entries.is_empty(),
        MessageType::MsgRequestVote | MessageType::MsgTimeoutNow => true,
        _ => false,
    }
}

impl Dispatch {
    /// Takes the frames that have come.
    pub(super) fn receive_frames(&mut self, now: Instant) {
        let Some(mut peers) = self.peers.take() else { return };
        self.look_at_monotonic_clock();
        peers.receive(now, |source, frame| {
            self.note_session(source.node, source.session);
            self.on_frame(source.node, source.instance, &frame);
        });
        let events: Vec<Event> = peers.events().collect();
        if let Some(cluster) = &mut self.cluster {
            let now_us = self.now.us;
            cluster.seen.extend(peers.heard().map(|node| (node, now_us)));
        }
        self.peers = Some(peers);
        for event in events {
            match event {
                Event::LinkDown(node) => {
                    if let Some(cluster) = &mut self.cluster {
                        cluster.answered.remove(&node);
                    }
                    self.on_lost(node);
                }
                Event::InboundDown { node, .. } => {
                    self.void_claims_of(node);
                    self.on_lost(node);
                }
                Event::LinkUp(node) => {
                    self.note_answer(node);
                    if let Some(cluster) = &mut self.cluster {
                        cluster.told.forget(node);
                    }
                }
                Event::Absent(_) => {}
            }
        }
    }

    /// A new connection from a node may be from a new process, which has forgotten that its replicas slept.
    fn note_session(&mut self, from: u32, session: u64) {
        let now_us = self.now.us;
        let Some(cluster) = &mut self.cluster else { return };
        cluster.seen.insert(from, now_us);
        if cluster.sessions.insert(session) {
            cluster.heard.insert(from, self.now.us);
            while cluster.sessions.len() > MAX_SESSIONS {
                cluster.sessions.pop_first();
            }
            self.wake_with(from);
        }
    }

    pub(super) fn on_frame(&mut self, from: u32, instance: u64, frame: &Frame<'_>) {
        match *frame {
            Frame::Raft { partition, bytes } => {
                let message = decode_message(bytes).filter(|one| node_of(one.from) == from);
                if let Some(message) = message {
                    self.step(PartitionId(partition), message);
                }
            }
            Frame::Request(ref request) => {
                if let Some(cluster) = &mut self.cluster {
                    cluster.asked_us = self.now.us;
                }
                self.on_request(from, instance, request);
            }
            Frame::Response { id, payload } => {
                let worker = Forwards::worker_of(id);
                if worker == self.worker() {
                    self.on_response(id, payload);
                } else if let Some(mailbox) = self.shared().mailboxes.get(usize::from(worker)) {
                    mailbox.answer(Return::Forwarded { id, payload: payload.to_vec() });
                }
            }
            Frame::Gone { partition, replica } => {
                let partition = PartitionId(partition);
                let here = self.replica(partition).is_some_and(|(one, _)| one.id() == replica);
                if here && let Some(cluster) = &mut self.cluster {
                    cluster.to_remove.push(partition);
                }
            }
            Frame::Beat { sent_us } => self.on_beat(from, sent_us),
            Frame::BeatReply { sent_us } => self.on_beat_reply(from, sent_us),
            Frame::Sleep { partition, term, index } => {
                self.on_signal(from, PartitionId(partition), Signal::Sleep { term, index });
            }
            Frame::Asleep { partition, term } => {
                self.on_signal(from, PartitionId(partition), Signal::Asleep { term });
            }
            Frame::Wake { partition, term } => {
                self.on_signal(from, PartitionId(partition), Signal::Wake { term });
            }
            Frame::Leads { worker, workers, led } => self.on_leads(from, worker, workers, led),
            // The rest belongs to the handshake or to bulk connections, or asks for nothing yet.
            _ => {}
        }
    }

    /// Gives a message to the replica that it is for.
    pub(super) fn step(&mut self, partition: PartitionId, message: RaftMessage) {
        let owner = self.shared().owner(partition);
        if owner != self.worker() {
            let message = Message::Raft { partition, message: Box::new(message) };
            // Raft sends again what a full mailbox refuses.
            let _ = self.shared().mailboxes[usize::from(owner)].send(message);
            return;
        }
        if matches!(self.refusing, Some(Error::LogFailed(_))) {
            return;
        }
        let now = self.now;
        let declines = self.cluster.as_ref().is_some_and(|cluster| cluster.declines);
        if declines && message.msg_type() == MessageType::MsgTimeoutNow {
            return;
        }
        // What cannot be written is not taken either: it would only fill the memory.
        if needs_a_record(&message) && !self.can_write() {
            return;
        }
        let Some((replica, _)) = self.replica(partition) else { return };
        if replica.has_left(now, &message) {
            if let Some(cluster) = &mut self.cluster {
                cluster.gone.push((partition, message.from));
            }
            return;
        }
        let bytes: usize = message.entries.iter().map(|entry| entry.data.len() + 128).sum();
        replica.step(now, message);
        self.incoming_bytes += bytes;
        self.activate(partition);
    }

    fn on_beat(&mut self, from: u32, sent_us: u64) {
        let now = self.now;
        let Some(cluster) = &mut self.cluster else { return };
        cluster.beats.push((from, sent_us));
        cluster.heard.insert(from, now.us);
    }

    /// What is sent to the node arrives.
    fn note_answer(&mut self, node: u32) {
        if let Some(cluster) = &mut self.cluster {
            cluster.answered.insert(node, self.now.us);
        }
    }

    /// Whether what is sent to a node arrives, as far as is known: a link may be up though its wire is cut.
    fn reaches(&self, node: u32) -> bool {
        let answered = self.cluster.as_ref().and_then(|cluster| cluster.answered.get(&node));
        let unanswered = |at: &u64| self.now.us.saturating_sub(*at);
        answered.is_some_and(|at| unanswered(at) < UNANSWERED.as_micros() as u64)
    }

    fn on_beat_reply(&mut self, from: u32, sent_us: u64) {
        let now = self.now;
        // Not what this node's last process has sent.
        if !self.cluster.as_ref().is_some_and(|cluster| cluster.sent.contains(sent_us)) {
            return;
        }
        self.note_answer(from);
        for replica in self.replicas_mut().filter(|replica| replica.is_asleep()) {
            let there = |id: &u64| node_of(*id) == from;
            let id = match replica.leads() {
                true => replica.members().voters.iter().copied().find(there),
                false => Some(replica.leader()).filter(there),
            };
            if let Some(id) = id {
                replica.beat_answered(now, id, sent_us);
            }
        }
    }

    /// What another node's replica says about sleeping. One that is not of this worker does not sleep: the
    /// beats that it would rely on go to this one.
    fn on_signal(&mut self, from: u32, partition: PartitionId, signal: Signal) {
        let now = self.now;
        let Some((replica, _)) = self.replica(partition) else { return };
        let sender = replica.members().all().into_iter().find(|id| node_of(*id) == from);
        if let Some(sender) = sender {
            replica.signal(now, sender, signal);
            self.activate(partition);
        }
    }

    /// Sends what replicas say to each other about sleeping. A link that takes no `Wake` must not answer
    /// beats either: it is full, and is emptied or broken soon.
    fn send_signals(&mut self) {
        let Some(cluster) = &mut self.cluster else { return };
        // All replicas are looked through: with every tick, and before a beat is answered.
        if !std::mem::take(&mut cluster.ticked) && cluster.beats.is_empty() {
            return;
        }
        if !cluster.beats.is_empty() {
            // The clock was looked at before the beats came.
            self.look_at_monotonic_clock();
            let now = self.now;
            self.replicas_mut().for_each(|replica| replica.vouch(now));
        }
        let Some(peers) = &mut self.peers else { return };
        let Some(cluster) = &mut self.cluster else { return };
        let mut unsent = Vec::new();
        for replica in self.replicas.iter_mut().flatten() {
            let partition = replica.partition().0;
            for (to, signal) in replica.take_signals() {
                cluster.signals.push((node_of(to), partition, signal));
            }
        }
        for (node, partition, signal) in cluster.signals.drain(..) {
            let frame = match signal {
                Signal::Sleep { term, index } => Frame::Sleep { partition, term, index },
                Signal::Asleep { term } => Frame::Asleep { partition, term },
                Signal::Wake { term } => Frame::Wake { partition, term },
            };
            // Replicas rely on answers to beats, which a worker that has no counterpart there never gives.
            let asks = matches!(signal, Signal::Sleep { .. });
            if !peers.is_up(node) || (asks && !cluster.heard.contains_key(&node)) {
                continue;
            }
            match peers.out(node) {
                Some(out) => encode(out, &frame).expect("it is short"),
                None => unsent.push((node, partition, signal)),
            }
        }
        cluster.beats.retain(|(node, _)| !unsent.iter().any(|(other, ..)| other == node));
        cluster.signals = unsent;
    }

    /// Asks the other nodes for a sign of life, and wakes the groups whose leaders' nodes give none.
    fn beat(&mut self) {
        let (now, tick_us) = (self.now, TICK.as_micros() as u64);
        let Some(peers) = &mut self.peers else { return };
        let Some(cluster) = &mut self.cluster else { return };
        cluster.ticks += 1;
        cluster.ticked = true;
        if cluster.ticks.is_multiple_of(BEAT_TICKS) {
            cluster.sent.note(now.us);
            for node in cluster.topology.members.keys() {
                if let Some(out) = peers.out(node.0) {
                    encode(out, &Frame::Beat { sent_us: now.us }).expect("it is short");
                }
            }
        }
        for (&node, seen) in &mut cluster.seen {
            let silent_us = now.us.saturating_sub(*seen);
            if silent_us > SILENCE.as_micros() as u64 && peers.is_up(node) {
                peers.reset(node, Instant::now());
                *seen = now.us;
            }
        }
        let heard = &cluster.heard;
        for replica in self.replicas.iter_mut().flatten() {
            if !replica.is_asleep() || replica.leads() {
                continue;
            }
            let last = heard.get(&node_of(replica.leader())).copied().unwrap_or_default();
            let silent_ticks = now.us.saturating_sub(last) / tick_us;
            if silent_ticks >= SILENT_TICKS {
                replica.wake_from_silence(now, silent_ticks as usize);
            }
        }
    }

    /// Wakes every group that has a replica on a node.
    fn wake_with(&mut self, node: u32) {
        let now = self.now;
        let heard = self.cluster.as_ref().and_then(|cluster| cluster.heard.get(&node).copied());
        let silent_us = now.us.saturating_sub(heard.unwrap_or_default());
        let silent_ticks = (silent_us / TICK.as_micros() as u64) as usize;
        for replica in self.replicas_mut().filter(|replica| replica.is_asleep()) {
            if node_of(replica.leader()) == node {
                replica.wake_from_silence(now, silent_ticks);
            } else if replica.members().all().iter().any(|id| node_of(*id) == node) {
                replica.wake(now);
            }
        }
    }

    fn on_request(&mut self, from: u32, instance: u64, request: &Request<'_>) {
        let partition = PartitionId(request.partition);
        let waiter = Waiter::Peer(PeerRequest { node: from, instance, id: request.id });
        if usize::from(partition.0) >= self.shared().views.len() {
            return;
        }
        let Ok(command) = decode_command(request.payload) else {
            tracing::warn!(
                node = %NodeId(from),
                "a node asked for a command that this version does not know"
            );
            self.replies.push((waiter, Reply::Error(Error::NotLeader)));
            return;
        };
        let once = request.once.map(|(session, sequence, acked_below)| Once {
            session,
            sequence,
            acked_below,
        });
        // The sender does not reach every node, and would have this one ask the leader in its stead.
        let passes = request.deadline_ms > 0 && self.can_pass_on(from, partition);
        let patience = passes.then(|| Duration::from_millis(request.deadline_ms.into()));
        let stale = request.stale;
        let ask = Ask { redirect: !passes, stale, once, patience, ..Ask::default() };
        let owner = self.shared().owner(partition);
        if owner == self.worker() {
            self.execute_for(partition, &command, ask, waiter);
            return;
        }
        let command = Box::new(command.to_owned());
        let message = Message::Command { partition, command, ask, waiter };
        if let Err(Message::Command { waiter, .. }) =
            self.shared().mailboxes[usize::from(owner)].send(message)
        {
            self.replies.push((waiter, Reply::Error(Error::Overloaded)));
        }
    }

    /// Whether another node than that one leads a partition, surely enough, and is reached.
    fn can_pass_on(&self, from: u32, partition: PartitionId) -> bool {
        let leader = self.shared().leader(partition);
        leader.is_some_and(|leader| leader.0 != from && self.reaches(leader.0))
    }

    /// Whether a request of a peer must be refused because one before it was.
    pub(super) fn is_fenced(&mut self, waiter: &Waiter) -> bool {
        let Waiter::Peer(PeerRequest { node, id, .. }) = *waiter else { return false };
        self.cluster.as_mut().is_some_and(|cluster| cluster.is_fenced(node, id))
    }

    /// Answers a command that another node sent.
    pub(super) fn respond(&mut self, request: PeerRequest, reply: &Reply) {
        let PeerRequest { node, instance, id } = request;
        if let Some(cluster) = &mut self.cluster
            && matches!(reply, Reply::Error(Error::NotLeader | Error::Stopping))
        {
            cluster.fence(node, id);
        }
        let there = self.peers.as_ref().and_then(|peers| peers.instance(node));
        if there.is_some_and(|there| there != instance) {
            return tracing::debug!(node, "the process that waited for a reply is gone");
        }
        let Some(out) = self.peers.as_mut().and_then(|peers| peers.out(node)) else {
            // A node that has just started may be heard before it is reached.
            if let Some(cluster) = self.cluster.as_mut().filter(|one| one.unsent.len() < MAX_UNSENT)
            {
                let until = Instant::now() + UNSENT_PATIENCE;
                cluster.unsent.push((until, request, reply.clone()));
            }
            return;
        };
        let mut encoded = Ok(());
        let framed = encode_with(out, &Frame::Response { id, payload: &[] }, |out| {
            encoded = encode_reply(reply, out);
        });
        if encoded.is_err() || framed.is_err() {
            // Nothing of it is in the frame: the other side reads an answer that says too little.
            tracing::warn!(node = %NodeId(node), "a reply is too large for another node");
        }
    }

    /// Whether other nodes have sent no commands for so long: they know who leads instead of this one.
    pub(super) fn is_left_alone(&self, since: Duration) -> bool {
        let asked_us = self.cluster.as_ref().map_or(0, |cluster| cluster.asked_us);
        self.now.us.saturating_sub(asked_us) >= since.as_micros() as u64
    }

    /// Takes the answer of another node to a command.
    pub(super) fn on_response(&mut self, id: u64, payload: &[u8]) {
        let reply = decode_reply(payload).unwrap_or(Reply::Error(Error::OutcomeUnknown));
        let Some(cluster) = &mut self.cluster else { return };
        let decided = cluster.forwards.answered(id, reply);
        self.replies.extend(decided);
    }

    /// The links to or from a node are down.
    pub(super) fn on_lost(&mut self, node: u32) {
        if let Some(cluster) = &mut self.cluster {
            cluster.forwards.lost(node, &mut self.replies);
        }
        self.wake_with(node);
        if let Some(cluster) = &mut self.cluster {
            cluster.heard.remove(&node);
        }
        for index in 0..self.own().len() {
            let partition = self.own()[index];
            let Some((replica, _)) = self.replica(partition) else { continue };
            if !replica.leads() {
                continue;
            }
            let there: Vec<u64> =
                replica.members().all().into_iter().filter(|id| node_of(*id) == node).collect();
            for id in there {
                replica.report_unreachable(id);
            }
        }
    }

    /// Appends messages to what goes to their nodes. What cannot be sent is lost, and Raft is told.
    pub(super) fn send(&mut self, partition: PartitionId, messages: Vec<RaftMessage>) {
        for message in messages {
            if message.msg_type() == MessageType::MsgSnapshot {
                if let Some(cluster) = &mut self.cluster {
                    cluster.snapshots_to_send.push((partition, message));
                }
                continue;
            }
            let (to, kind) = (message.to, message.msg_type());
            let out = self.peers.as_mut().and_then(|peers| peers.out(node_of(to)));
            let frame = Frame::Raft { partition: partition.0, bytes: &[] };
            let sent = out.is_some_and(|out| {
                encode_with(out, &frame, |out| encode_message(&message, out)).is_ok()
            });
            if !sent
                && kind == MessageType::MsgAppend
                && let Some((replica, _)) = self.replica(partition)
            {
                replica.report_unreachable(to);
            }
        }
    }

    /// Tries again to send the answers for nodes whose links were down.
    pub(super) fn send_again(&mut self, now: Instant) {
        let Some(cluster) = self.cluster.as_mut().filter(|one| !one.unsent.is_empty()) else {
            return;
        };
        let unsent = std::mem::take(&mut cluster.unsent);
        for (until, request, reply) in unsent {
            let up = self.peers.as_ref().is_some_and(|peers| peers.is_up(request.node));
            if up {
                self.respond(request, &reply);
            } else if now < until
                && let Some(cluster) = &mut self.cluster
            {
                cluster.unsent.push((until, request, reply));
            }
        }
    }

    /// Sends all frames of this round.
    pub(super) fn flush_frames(&mut self, now: Instant) {
        self.send_forwards();
        self.send_signals();
        self.send_again(now);
        let (Some(peers), Some(cluster)) = (&mut self.peers, &mut self.cluster) else { return };
        for (node, sent_us) in cluster.beats.drain(..) {
            if let Some(out) = peers.out(node) {
                encode(out, &Frame::BeatReply { sent_us }).expect("it is short");
            }
        }
        for (partition, replica) in cluster.gone.drain(..) {
            if let Some(out) = peers.out(node_of(replica)) {
                encode(out, &Frame::Gone { partition: partition.0, replica }).expect("it is short");
            }
        }
        peers.flush(now);
    }

    /// Keeps a read that cannot be answered before a quorum has confirmed that this node leads: if it does
    /// not, the one that does is asked.
    pub(super) fn keep(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        waiter: Waiter,
    ) -> Waiter {
        let Some(cluster) = self.cluster.as_mut().filter(|_| !ask.redirect) else { return waiter };
        let may_serve = self.shared.views[usize::from(partition.0)].standing.may_serve(self.now.us);
        if may_serve || cluster.kept.len() >= MAX_KEPT {
            return waiter;
        }
        let command = Box::new(command.to_owned());
        let ask = Ask { deadline: Some(deadline(&ask, Instant::now())), ..ask };
        cluster.keep(Kept::Read { partition, command, ask, waiter })
    }

    /// The one that a reply is for; none if the command has to be carried out elsewhere.
    pub(super) fn unwrap_kept(&mut self, waiter: Waiter, reply: Reply) -> Option<(Waiter, Reply)> {
        let Waiter::Kept(id) = waiter else { return Some((waiter, reply)) };
        match self.cluster.as_mut()?.kept.remove(&id)? {
            Kept::Read { partition, command, ask, waiter }
                if matches!(reply, Reply::Error(Error::NotLeader)) =>
            {
                self.forward(partition, &command.borrowed(), ask, waiter)
            }
            Kept::Again(waiter) if matches!(reply, Reply::Error(_)) => {
                Some((waiter, Reply::Error(Error::OutcomeUnknown)))
            }
            Kept::Read { waiter, .. } | Kept::Again(waiter) => Some((waiter, reply)),
        }
    }

    /// Keeps a command until it is known who leads its partition, and then sends it there.
    pub(super) fn forward(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: Ask,
        waiter: Waiter,
    ) -> Option<(Waiter, Reply)> {
        let fenced = self.is_fenced(&waiter);
        let keeps = |cluster: &&mut Box<Cluster>| {
            if fenced {
                return false;
            }
            // Who asks again while leadership is on its way finds nobody that leads.
            !ask.redirect || cluster.handing_over.contains_key(&partition)
        };
        let Some(cluster) = self.cluster.as_mut().filter(keeps) else {
            return Some((waiter, Reply::Error(Error::NotLeader)));
        };
        cluster.forwards.add(partition, command, ask, waiter, Instant::now()).err()
    }

    /// Sends the commands that wait, each to the node that is likely to lead; or carries them out, where
    /// that is this one.
    pub(super) fn send_forwards(&mut self) {
        let Some(cluster) = self.cluster.as_ref().filter(|one| !one.forwards.is_empty()) else {
            return;
        };
        let now = Instant::now();
        for partition in cluster.forwards.pending() {
            if self.leads(partition) {
                let Some(cluster) = &mut self.cluster else { return };
                for forward in cluster.forwards.take_home(partition) {
                    self.carry_out_here(partition, forward);
                }
                continue;
            }
            let candidates = self.candidates(partition);
            let me = self.cluster.as_ref().map(|cluster| cluster.me);
            let targets = self.cluster.as_ref().map_or(&[][..], |one| one.targets(partition));
            let others = targets.iter().filter(|one| Some(one.node()) != me).count();
            let leader = self.shared().leader(partition).map(|node| node.0);
            let (Some(cluster), Some(peers)) = (&mut self.cluster, &mut self.peers) else { return };
            if cluster.handing_over.contains_key(&partition) {
                continue;
            }
            for waiter in cluster.forwards.take_redirects(partition) {
                self.replies.push((waiter, Reply::Error(Error::NotLeader)));
            }
            let leader = leader.filter(|leader| candidates.first() == Some(leader));
            let detour = candidates.len() < others;
            let Some(node) = cluster.forwards.node(partition, leader, &candidates) else {
                continue;
            };
            cluster.forwards.send(partition, |id, forward| {
                let Some(out) = peers.out(node) else { return false };
                let passed_on = matches!(forward.waiter, Waiter::Peer { .. });
                let may_pass_on = detour && !passed_on;
                let request = Request {
                    id,
                    partition: partition.0,
                    deadline_ms: if may_pass_on { forward.left_ms(now) } else { 0 },
                    stale: forward.ask.stale,
                    once: forward.ask.once.map(|one| (one.session, one.sequence, one.acked_below)),
                    payload: &forward.command,
                };
                encode(out, &Frame::Request(request)).is_ok()
            });
        }
    }

    /// Carries out a command that was on its way to another node.
    fn carry_out_here(&mut self, partition: PartitionId, forward: Forward) {
        let (is_unsure, given_up) = (forward.is_unsure(), forward.given_up(partition, false));
        let Forward { command, ask, mut waiter, .. } = forward;
        let Ok(command) = decode_command(&command) else {
            return self.replies.push((waiter, Reply::Error(given_up)));
        };
        if is_unsure && let Some(cluster) = &mut self.cluster {
            if cluster.kept.len() >= MAX_KEPT {
                return self.replies.push((waiter, Reply::Error(Error::OutcomeUnknown)));
            }
            waiter = cluster.keep(Kept::Again(waiter));
        }
        self.execute_for(partition, &command, ask, waiter);
    }

    /// The nodes that may lead a partition, most likely first.
    fn candidates(&self, partition: PartitionId) -> Vec<u32> {
        let Some(cluster) = &self.cluster else { return Vec::new() };
        let first = self.shared().leader(partition).map(|node| node.0);
        let targets = cluster.targets(partition).iter().map(|replica| replica.node().0);
        let mut nodes = Vec::new();
        for node in first.into_iter().chain(targets) {
            if node != cluster.me.0 && self.reaches(node) && !nodes.contains(&node) {
                nodes.push(node);
            }
        }
        nodes
    }

    /// Whether a command that has just come is carried out here: not if it would overtake earlier ones.
    pub(super) fn takes(&mut self, partition: PartitionId) -> bool {
        let behind = |cluster: &Cluster| cluster.forwards.has(partition);
        !self.cluster.as_deref().is_some_and(behind) && self.leads(partition)
    }

    /// The log has failed: what the replicas here have on the disk is not known. The groups go on without
    /// them, and commands go to the other nodes.
    pub(super) fn give_up_replicas(&mut self) {
        if self.cluster.is_none() {
            return;
        }
        for partition in self.own().to_vec() {
            self.remove(partition);
            self.shared.views[usize::from(partition.0)].standing.clear();
        }
    }

    /// Whether commands of a partition are carried out here.
    pub(super) fn leads(&mut self, partition: PartitionId) -> bool {
        let handed = |cluster: &Cluster| cluster.handing_over.contains_key(&partition);
        if self.cluster.as_deref().is_some_and(handed) {
            return false;
        }
        self.replica(partition).is_some_and(|(replica, _)| replica.leads())
    }

    /// What is due with every tick: forwards that wait, groups that are to change.
    pub(super) fn tick_cluster(&mut self, now: Instant) {
        self.beat();
        self.tell_what_is_led();
        let Some(cluster) = &mut self.cluster else { return };
        let changed = std::mem::take(&mut cluster.changed);
        cluster.forwards.tick(now, &mut self.replies);
        cluster.snapshot_wanted = None;
        let ask = self.cluster.as_ref().is_some_and(|one| one.ticks.is_multiple_of(ASK_TICKS));
        for index in 0..self.own().len() {
            let partition = self.own()[index];
            if ask {
                self.ask_whether_gone(partition);
            }
            let asleep = |(replica, _): (&mut Replica<Waiter>, _)| replica.is_asleep();
            if changed || !self.replica(partition).is_some_and(asleep) {
                self.reconcile(partition);
            }
        }
    }

    /// A replica that has left its group, or has no place in the map, asks whether it can go: those who have
    /// a place as well, since all that it knows of may be gone, too.
    fn ask_whether_gone(&mut self, partition: PartitionId) {
        let Some(cluster) = &self.cluster else { return };
        let mut others: Vec<u64> = cluster.targets(partition).iter().map(|id| id.get()).collect();
        let Some((replica, _)) = self.replica(partition) else { return };
        let (from, term) = (replica.id(), replica.term() + 1);
        if !replica.is_removed() && others.contains(&from) {
            return;
        }
        others.extend(&replica.members().voters);
        others.retain(|id| *id != from);
        others.sort_unstable();
        others.dedup();
        let index = replica.status().last;
        let ask = |to: u64| {
            let mut message = RaftMessage { from, to, term, index, ..RaftMessage::default() };
            message.set_msg_type(MessageType::MsgRequestPreVote);
            message
        };
        self.send(partition, others.into_iter().map(ask).collect());
    }

    /// Lets the group of a partition take its next step towards the replicas that it should have.
    fn reconcile(&mut self, partition: PartitionId) {
        let now = self.now;
        let Some(cluster) = &self.cluster else { return };
        let target: Vec<u64> = cluster.targets(partition).iter().map(|one| one.get()).collect();
        let epoch = cluster.topology.epoch;
        let Some((replica, _)) = self.replica(partition) else { return };
        let wanted = replica.snapshot_wanted();
        if wanted && let Some(cluster) = &mut self.cluster {
            cluster.snapshot_wanted = Some(partition);
        }
        let Some((replica, _)) = self.replica(partition) else { return };
        if replica.take_lost_snapshot() {
            tracing::warn!(
                %partition,
                "while a snapshot for a follower was made and sent more was written than is kept in memory: the \
                 next attempt waits. If this goes on, raise snapshot_rate or replication_memory, or write less"
            );
        }
        let Some(change) = replica.reconcile(now, epoch, &target) else { return };
        if let Change::Transfer(to) = change {
            return self.hand_over(partition, to);
        }
        tracing::info!(%partition, ?change, "group changes");
        self.activate(partition);
    }

    /// A partition whose leader is here and needs a snapshot for a follower.
    pub(super) fn snapshot_wanted(&self) -> Option<PartitionId> {
        self.cluster.as_ref()?.snapshot_wanted
    }

    /// Begins to hand the leadership of a partition over. Commands for it wait from now on.
    pub(super) fn hand_over(&mut self, partition: PartitionId, to: u64) {
        let Some(cluster) = &mut self.cluster else { return };
        let since = cluster.ticks;
        if let Entry::Vacant(entry) = cluster.handing_over.entry(partition) {
            entry.insert(HandOver { to, begun: false, since });
            self.activate(partition);
        }
    }

    /// Begins to hand over every partition that another replica can lead.
    pub(super) fn hand_all_over(&mut self) {
        if self.cluster.is_none() {
            return;
        }
        for index in 0..self.own().len() {
            let partition = self.own()[index];
            let heir = self.replica(partition).filter(|(one, _)| one.leads());
            if let Some(to) = heir.and_then(|(replica, _)| replica.heir()) {
                self.hand_over(partition, to);
            }
        }
    }

    /// Goes on handing leadership over, where no batch is open any more.
    pub(super) fn continue_hand_overs(&mut self) {
        let Some(cluster) = self.cluster.as_ref().filter(|one| !one.handing_over.is_empty()) else {
            return;
        };
        let (now, ticks, all) = (self.now, cluster.ticks, cluster.handing_over.clone());
        for (partition, HandOver { to, begun, since }) in all {
            let Some((replica, _)) = self.replica(partition) else {
                // It has left: nothing is on its way from here any more.
                if let Some(cluster) = &mut self.cluster {
                    cluster.handing_over.remove(&partition);
                }
                continue;
            };
            let leads = replica.leads();
            if leads && (replica.is_handing_over() || (!begun && replica.has_open_batch())) {
                continue;
            }
            // It has voted for the other, which is not elected yet.
            let elects = !leads && replica.leader() == 0 && ticks - since <= HAND_OVER_TICKS;
            if elects {
                continue;
            }
            let begins = leads && !begun && replica.transfer_leader(now, to);
            let Some(cluster) = &mut self.cluster else { return };
            if begins {
                cluster.handing_over.insert(partition, HandOver { to, begun: true, since });
                self.activate(partition);
            } else {
                // Somebody else leads, or this replica goes on because the other did not take over.
                cluster.handing_over.remove(&partition);
            }
        }
    }

    /// Every replica of this worker.
    pub(super) fn inspect(&self) -> Vec<Inspected> {
        let inspected = |replica: &Replica<Waiter>| Inspected {
            status: replica.status(),
            keys: replica.table().len() as u64,
            bytes: replica.table().memory_bytes(),
        };
        self.replicas().map(inspected).collect()
    }
}
