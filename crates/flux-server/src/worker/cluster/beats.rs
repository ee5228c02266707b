//! Signs of life between nodes, and what their replicas say to each other about sleeping.
//!
//! A beat stands for the heartbeats of all groups that sleep: what it means to one of them is decided in
//! `flux-core`.

use std::time::{Duration, Instant};

use flux_core::PartitionId;
use flux_core::replica::Signal;
use flux_proto::peer::{Frame, encode};

use super::{BEAT_TICKS, node_of};
use crate::recovery::TICK;
use crate::worker::dispatch::Dispatch;

/// After so long without a byte the links to and from a node are opened anew.
const SILENCE: Duration = Duration::from_secs(3);
/// A node that has not answered a beat for so long is sent no commands.
const UNANSWERED: Duration = Duration::from_secs(2);
/// Ticks without a beat of a node until the groups that it leads wake up.
const SILENT_TICKS: u64 = 5;

impl Dispatch {
    pub(super) fn on_beat(&mut self, from: u32, sent_us: u64) {
        let now = self.now;
        let Some(cluster) = &mut self.cluster else { return };
        cluster.beats.push((from, sent_us));
        cluster.heard.insert(from, now.us);
    }

    /// What is sent to the node arrives.
    pub(super) fn note_answer(&mut self, node: u32) {
        if let Some(cluster) = &mut self.cluster {
            cluster.answered.insert(node, self.now.us);
        }
        if let Some(seat) = &self.shared.cluster {
            seat.answered.lock().insert(node, self.now.us);
        }
    }

    /// What is sent to the node does not arrive until it answers again.
    pub(super) fn forget_answer(&mut self, node: u32) {
        if let Some(cluster) = &mut self.cluster {
            cluster.answered.remove(&node);
        }
        if let Some(seat) = &self.shared.cluster {
            seat.answered.lock().remove(&node);
        }
    }

    /// Takes in what other workers know of who answers.
    fn share_answers(&mut self) {
        let (Some(cluster), Some(seat)) = (&mut self.cluster, &self.shared.cluster) else { return };
        for (node, at) in seat.answered.lock().iter() {
            let known = cluster.answered.entry(*node).or_default();
            *known = (*known).max(*at);
        }
    }

    /// Whether what is sent to a node arrives, as far as is known: a link may be up though its wire is cut.
    pub(super) fn reaches(&self, node: u32) -> bool {
        let answered = self.cluster.as_ref().and_then(|cluster| cluster.answered.get(&node));
        let unanswered = |at: &u64| self.now.us.saturating_sub(*at);
        answered.is_some_and(|at| unanswered(at) < UNANSWERED.as_micros() as u64)
    }

    pub(super) fn on_beat_reply(&mut self, from: u32, sent_us: u64) {
        let now = self.now;
        self.note_answer(from);
        // Not what this node's last process has sent, nor another worker.
        if !self.cluster.as_ref().is_some_and(|cluster| cluster.sent.contains(sent_us)) {
            return;
        }
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
    pub(super) fn on_signal(&mut self, from: u32, partition: PartitionId, signal: Signal) {
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
    pub(super) fn send_signals(&mut self) {
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
    pub(super) fn beat(&mut self) {
        self.share_answers();
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
    pub(super) fn wake_with(&mut self, node: u32) {
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
}
