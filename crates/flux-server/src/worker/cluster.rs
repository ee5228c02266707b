//! A worker's part in its cluster: frames of other nodes, messages between replicas, and what is due for
//! groups that change. Signs of life are in `beats`, commands for other nodes in `relay`.
//!
//! Frames come in before the turn and go out after it, all of a peer with one write. What the frames
//! mean to a group is decided in `flux-core`, how they travel in `peer`.

mod beats;
mod relay;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flux_core::placement::{NodeId, ReplicaId};
use flux_core::replica::{
    Change, Message as RaftMessage, MessageType, Replica, Signal, Stamps, decode_message,
    encode_message,
};
use flux_core::{Command, Error, PartitionId, Reply};
use flux_proto::peer::{Frame, encode, encode_with};

use super::dispatch::Dispatch;
use super::forward::Forwards;
use super::led::Told;
use crate::cluster::Topology;
use crate::mailbox::{Ask, Inspected, Message, PeerRequest, Return, Waiter};
use crate::peer::Event;

/// Connections of other nodes that are remembered: far more than there are at a time.
const MAX_SESSIONS: usize = 4096;
/// Ticks between two beats.
pub(super) const BEAT_TICKS: u64 = 2;
/// Ticks between two attempts of a replica without a place to learn that it is to go.
const ASK_TICKS: u64 = 20;
/// Ticks for which commands wait for the one that leadership is handed to, at most.
const HAND_OVER_TICKS: u64 = 10;

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
                    self.forget_answer(node);
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
                self.on_gone(PartitionId(partition), replica);
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

    /// The group of a replica has gone on without it.
    pub(super) fn on_gone(&mut self, partition: PartitionId, replica: u64) {
        let owner = self.shared().owner(partition);
        if owner != self.worker() {
            // The replica asks again when a full mailbox refuses it.
            let gone = Message::Gone { partition, replica };
            let _ = self.shared().mailboxes[usize::from(owner)].send(gone);
            return;
        }
        let here = self.replica(partition).is_some_and(|(one, _)| one.id() == replica);
        if here && let Some(cluster) = &mut self.cluster {
            cluster.to_remove.push(partition);
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

    /// Whether other nodes have sent no commands for so long: they know who leads instead of this one.
    pub(super) fn is_left_alone(&self, since: Duration) -> bool {
        let asked_us = self.cluster.as_ref().map_or(0, |cluster| cluster.asked_us);
        self.now.us.saturating_sub(asked_us) >= since.as_micros() as u64
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
                let questions = self.questions(partition);
                self.send(partition, questions);
            }
            let asleep = |(replica, _): (&mut Replica<Waiter>, _)| replica.is_asleep();
            if changed || !self.replica(partition).is_some_and(asleep) {
                self.reconcile(partition);
            }
        }
    }

    /// A replica that has left its group, or has no place in the map, asks every node whether it can go: one
    /// that was away for long knows of nobody who is in its group now, and the map not of all.
    pub(super) fn questions(&self, partition: PartitionId) -> Vec<RaftMessage> {
        let replica = self.replicas[usize::from(partition.0)].as_ref();
        let Some((cluster, replica)) = self.cluster.as_ref().zip(replica) else {
            return Vec::new();
        };
        let (from, term, index) = (replica.id(), replica.term() + 1, replica.status().last);
        let has_a_place = cluster.targets(partition).iter().any(|id| id.get() == from);
        if has_a_place && !replica.is_removed() {
            return Vec::new();
        }
        let others = cluster.topology.members.keys().filter(|node| **node != cluster.me);
        let question = |node: &NodeId| {
            // To whatever replica is there.
            let to = ReplicaId::new(*node, 0).get();
            let mut message = RaftMessage { from, to, term, index, ..RaftMessage::default() };
            message.set_msg_type(MessageType::MsgRequestPreVote);
            message
        };
        others.map(question).collect()
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
            // So that who leads next passes nothing on twice.
            self.put_cursor(partition);
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
