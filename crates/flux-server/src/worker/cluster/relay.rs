//! Commands that another node is to carry out, and those that this one carries out for others.
//!
//! The queues are in `forward`; here is where a command goes, and what becomes of its reply.

use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_core::session::Once;
use flux_core::{Command, Error, PartitionId, Reply};
use flux_proto::peer::{Frame, Request, TRACES_SINCE, encode, encode_with};
use flux_proto::trace::TraceContext;

use super::{Cluster, Kept};
use crate::forward_codec::{decode_command, decode_reply, encode_reply};
use crate::mailbox::{Ask, Message, PeerRequest, Waiter};
use crate::worker::dispatch::Dispatch;
use crate::worker::forward::{Forward, Forwards, deadline};

/// Requests that are kept.
const MAX_KEPT: usize = 16 * 1024;
/// Answers that are kept for nodes whose links are down, and for how long.
const MAX_UNSENT: usize = 4096;
const UNSENT_PATIENCE: Duration = Duration::from_secs(2);

impl Dispatch {
    pub(super) fn on_request(&mut self, from: u32, instance: u64, request: &Request<'_>) {
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
        let is_told =
            |trace: &&[u8; _]| command.is_write() && TraceContext::from_bytes(trace).is_some();
        let trace = request.trace.filter(is_told).copied().map(Box::new);
        // The sender does not reach every node, and would have this one ask the leader in its stead.
        let passes = request.deadline_ms > 0 && self.can_pass_on(from, partition);
        let patience = passes.then(|| Duration::from_millis(request.deadline_ms.into()));
        let stale = request.stale;
        let ask = Ask { redirect: !passes, stale, once, trace, patience, deadline: None };
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
    pub(super) fn can_pass_on(&self, from: u32, partition: PartitionId) -> bool {
        let leader = self.shared().leader(partition);
        leader.is_some_and(|leader| leader.0 != from && self.reaches(leader.0))
    }

    /// Whether a request of a peer must be refused because one before it was.
    pub(in crate::worker) fn is_fenced(&mut self, waiter: &Waiter) -> bool {
        let Waiter::Peer(PeerRequest { node, id, .. }) = *waiter else { return false };
        self.cluster.as_mut().is_some_and(|cluster| cluster.is_fenced(node, id))
    }

    /// Answers a command that another node sent.
    pub(in crate::worker) fn respond(&mut self, request: PeerRequest, reply: &Reply) {
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

    /// Takes the answer of another node to a command.
    pub(in crate::worker) fn on_response(&mut self, id: u64, payload: &[u8]) {
        let reply = decode_reply(payload).unwrap_or(Reply::Error(Error::OutcomeUnknown));
        let Some(cluster) = &mut self.cluster else { return };
        let partition = Forwards::partition_of(id);
        let asked = cluster.forwards.asked(partition);
        if matches!(reply, Reply::Error(Error::NotLeader | Error::Stopping))
            && let Some(view) = self.shared.views.get(usize::from(partition.0))
        {
            // If it has said to lead, it does so no more.
            view.void_claims(|claim| Some(claim.node.0) == asked);
        }
        let decided = cluster.forwards.answered(id, reply);
        if let Some((Waiter::Peer(peer), Reply::Error(Error::NotLeader))) = &decided {
            // What its sender has sent behind it must not be carried out before it.
            cluster.fence(peer.node, peer.id);
            let attempt = Forwards::attempt_of(peer.id);
            for waiter in cluster.forwards.take_refused(partition, peer.node, attempt) {
                self.replies.push((waiter, Reply::Error(Error::NotLeader)));
            }
        }
        self.replies.extend(decided);
    }

    /// Tries again to send the answers for nodes whose links were down.
    pub(in crate::worker) fn send_again(&mut self, now: Instant) {
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

    /// Keeps a read that cannot be answered before a quorum has confirmed that this node leads: if it does
    /// not, the one that does is asked.
    pub(in crate::worker) fn keep(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        ask: &Ask,
        waiter: Waiter,
    ) -> Waiter {
        let Some(cluster) = self.cluster.as_mut().filter(|_| !ask.redirect) else { return waiter };
        let may_serve = self.shared.views[usize::from(partition.0)].standing.may_serve(self.now.us);
        if may_serve || cluster.kept.len() >= MAX_KEPT {
            return waiter;
        }
        let command = Box::new(command.to_owned());
        let ask = Ask { deadline: Some(deadline(ask, Instant::now())), ..ask.clone() };
        cluster.keep(Kept::Read { partition, command, ask, waiter })
    }

    /// The one that a reply is for; none if the command has to be carried out elsewhere.
    pub(in crate::worker) fn unwrap_kept(
        &mut self,
        waiter: Waiter,
        reply: Reply,
    ) -> Option<(Waiter, Reply)> {
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
    pub(in crate::worker) fn forward(
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
    pub(in crate::worker) fn send_forwards(&mut self) {
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
            let traces = peers.version(node).is_some_and(|version| version >= TRACES_SINCE);
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
                    trace: forward.ask.trace.as_deref().filter(|_| traces),
                    payload: &forward.command,
                };
                encode(out, &Frame::Request(request)).is_ok()
            });
        }
    }

    /// Carries out a command that was on its way to another node.
    pub(super) fn carry_out_here(&mut self, partition: PartitionId, forward: Forward) {
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

    /// The nodes that may lead a partition, most likely first: the leader that is known, and of the others those
    /// last that have taken back their registration, as a node does before it stops.
    pub(super) fn candidates(&self, partition: PartitionId) -> Vec<u32> {
        let Some(cluster) = &self.cluster else { return Vec::new() };
        let first = self.shared().leader(partition).map(|node| node.0);
        let members = &cluster.topology.members;
        let is_alive = |node: &u32| members.get(&NodeId(*node)).is_some_and(|one| one.alive);
        let targets = cluster.targets(partition).iter().map(|replica| replica.node().0);
        let (alive, away): (Vec<u32>, Vec<u32>) = targets.partition(is_alive);
        let mut nodes = Vec::new();
        for node in first.into_iter().chain(alive).chain(away) {
            if node != cluster.me.0 && self.reaches(node) && !nodes.contains(&node) {
                nodes.push(node);
            }
        }
        nodes
    }

    /// Whether a command that has just come is carried out here: not if it would overtake earlier ones.
    pub(in crate::worker) fn takes(&mut self, partition: PartitionId) -> bool {
        let behind = |cluster: &Cluster| cluster.forwards.has(partition);
        !self.cluster.as_deref().is_some_and(behind) && self.leads(partition)
    }
}
