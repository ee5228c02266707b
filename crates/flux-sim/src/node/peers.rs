//! What a process says to whole nodes besides Raft's messages: beats that stand for the heartbeats of groups
//! that sleep, what replicas say about sleeping, and who is told that its group has gone on without it.
//!
//! As in `flux-server`'s `worker/cluster.rs`. Frames travel over connections that keep their order or break.

use std::collections::BTreeMap;

use flux_core::replica::{Now, Signal, Stamps};
use raft::eraftpb::{Message, MessageType};

use super::{Output, Process, Surroundings};
use crate::plant::Plant;

/// Ticks between two beats.
const BEAT_TICKS: u64 = 2;
/// Ticks between two attempts of a replica without a place to learn that it is to go.
const ASK_TICKS: u64 = 20;
/// Ticks without a beat of a node until the groups that it leads wake up.
const SILENT_TICKS: u64 = 5;
/// Ticks without a beat of a node until the connection to it is opened anew.
const SILENCE_TICKS: u64 = 30;

/// What one node says to another.
#[derive(Clone, Copy, Debug)]
pub enum Frame {
    /// Asks for a sign of life, at this time of the sender.
    Beat(u64),
    /// The sign, with the time of the question.
    BeatReply(u64),
    /// What a replica of a partition says about sleeping.
    Signal(u16, Signal),
    /// The group of a partition has gone on without this replica.
    Gone(u16, u64),
}

/// What a process knows of the other nodes.
#[derive(Debug, Default)]
pub(super) struct Peers {
    ticks: u64,
    /// When the last beat of each node came.
    heard: BTreeMap<u32, u64>,
    /// When the last beats went out.
    sent: Stamps,
    /// Beats to be answered.
    beats: Vec<(u32, u64)>,
    /// Frames to be sent.
    frames: Vec<(u32, Frame)>,
    /// Partitions whose replicas are to go.
    pub(super) to_remove: Vec<u16>,
}

/// The node of a replica.
fn node_of(replica: u64) -> u32 {
    (replica >> 32) as u32
}

impl Process {
    /// Gives a message to the replica that it is for, unless it asks for the vote of a group that it does
    /// not belong to any more.
    pub(super) fn step(&mut self, partition: u16, message: Message, now: Now) {
        let Some(hosted) = self.hosted.get_mut(&partition) else { return };
        let replica = &mut hosted.replica;
        if replica.has_left(now, &message) {
            let gone = Frame::Gone(partition, message.from);
            self.peers.frames.push((node_of(message.from), gone));
            return;
        }
        replica.step(now, message);
    }

    /// Takes a frame of another node.
    pub(super) fn take_frame(&mut self, from: u32, frame: Frame, now: Now) {
        match frame {
            Frame::Beat(sent_us) => {
                self.peers.beats.push((from, sent_us));
                self.peers.heard.insert(from, now.us);
            }
            Frame::BeatReply(sent_us) => self.beat_answered(from, sent_us, now),
            Frame::Signal(partition, signal) => {
                let Some(hosted) = self.hosted.get_mut(&partition) else { return };
                let members = hosted.replica.members().all();
                if let Some(sender) = members.into_iter().find(|id| node_of(*id) == from) {
                    hosted.replica.signal(now, sender, signal);
                }
            }
            Frame::Gone(partition, replica) => {
                if self.replica(partition).is_some_and(|one| one.id() == replica) {
                    self.peers.to_remove.push(partition);
                }
            }
        }
    }

    fn beat_answered(&mut self, from: u32, sent_us: u64, now: Now) {
        if !self.peers.sent.contains(sent_us) {
            return;
        }
        let by_arrival = self.options.has(Plant::AgeByArrival);
        for hosted in self.hosted.values_mut() {
            let replica = &mut hosted.replica;
            let there = |id: &u64| node_of(*id) == from;
            let (id, since_us) = match replica.leads() {
                true => (replica.members().voters.iter().copied().find(there), sent_us),
                false if by_arrival => (Some(replica.leader()).filter(there), now.us),
                false => (Some(replica.leader()).filter(there), sent_us),
            };
            if let Some(id) = id {
                replica.beat_answered(now, id, since_us);
            }
        }
    }

    /// A connection from a node is new; it may be from a new process, which has forgotten what slept.
    pub(super) fn link_opened(&mut self, from: u32, now: Now) {
        self.peers.heard.insert(from, now.us);
        self.wake_with(from, now);
    }

    /// A connection to or from a node has broken.
    pub(super) fn link_broken(&mut self, node: u32, now: Now) {
        self.wake_with(node, now);
        for hosted in self.hosted.values_mut().filter(|hosted| hosted.replica.leads()) {
            let members = hosted.replica.members().all();
            for id in members.into_iter().filter(|id| node_of(*id) == node) {
                hosted.replica.report_unreachable(id);
            }
        }
    }

    /// Wakes every group that has a replica on a node.
    fn wake_with(&mut self, node: u32, now: Now) {
        let heard = self.peers.heard.get(&node).copied().unwrap_or_default();
        let silent_ticks = (now.us.saturating_sub(heard) / self.options.tick_us) as usize;
        for hosted in self.hosted.values_mut().filter(|hosted| hosted.replica.is_asleep()) {
            let replica = &mut hosted.replica;
            if node_of(replica.leader()) == node {
                replica.wake_from_silence(now, silent_ticks);
            } else if replica.members().all().iter().any(|id| node_of(*id) == node) {
                replica.wake(now);
            }
        }
    }

    /// With every tick: asks the other nodes for a sign of life, and wakes the groups whose leaders' nodes
    /// give none.
    pub(super) fn beat(&mut self, now: Now, nodes: &[u32], out: &mut Output) {
        let tick_us = self.options.tick_us;
        let peers = &mut self.peers;
        peers.ticks += 1;
        if peers.ticks.is_multiple_of(BEAT_TICKS) {
            peers.sent.note(now.us);
            let others = nodes.iter().filter(|node| **node != self.options.node);
            peers.frames.extend(others.map(|node| (*node, Frame::Beat(now.us))));
        }
        for (node, heard) in &mut peers.heard {
            if now.us.saturating_sub(*heard) > SILENCE_TICKS * tick_us {
                out.resets.push(*node);
                *heard = now.us;
            }
        }
        for hosted in self.hosted.values_mut() {
            let replica = &mut hosted.replica;
            if replica.is_asleep() && !replica.leads() {
                let last = self.peers.heard.get(&node_of(replica.leader())).copied();
                let silent = now.us.saturating_sub(last.unwrap_or_default()) / tick_us;
                if silent >= SILENT_TICKS {
                    replica.wake_from_silence(now, silent as usize);
                }
            }
        }
    }

    /// A replica that has left its group, or has no place in the map, asks every node whether it can go: one
    /// that was away for long knows of nobody who is in its group now, and the map not of all.
    pub(super) fn ask_whether_gone(&mut self, around: Surroundings<'_>, out: &mut Output) {
        if !self.peers.ticks.is_multiple_of(ASK_TICKS) {
            return;
        }
        for (partition, hosted) in &self.hosted {
            let Some(targets) = around.targets.get(usize::from(*partition)) else { continue };
            let status = hosted.replica.status();
            if !hosted.replica.is_removed() && targets.contains(&status.id) {
                continue;
            }
            for node in around.nodes.iter().filter(|node| **node != node_of(status.id)) {
                // To whatever replica is there.
                let (from, to) = (status.id, u64::from(*node) << 32);
                let (term, index) = (status.term + 1, status.last);
                let mut message = Message { from, to, term, index, ..Message::default() };
                message.set_msg_type(MessageType::MsgRequestPreVote);
                out.messages.push((*partition, message));
            }
        }
    }

    /// At the end of a turn: what replicas say about sleeping goes out before beats are answered.
    pub(super) fn flush_frames(&mut self, now: Now, out: &mut Output) {
        let vouches = !self.peers.beats.is_empty();
        for (partition, hosted) in &mut self.hosted {
            if vouches {
                hosted.replica.vouch(now);
            }
            for (to, signal) in hosted.replica.take_signals() {
                let untold = matches!(signal, Signal::Wake { .. });
                if untold && self.options.has(Plant::WakeUntold) {
                    continue;
                }
                out.frames.push((node_of(to), Frame::Signal(*partition, signal)));
            }
        }
        out.frames.append(&mut self.peers.frames);
        let beats = self.peers.beats.drain(..);
        out.frames.extend(beats.map(|(node, sent_us)| (node, Frame::BeatReply(sent_us))));
    }
}
