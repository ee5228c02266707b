//! Who leads what, between nodes: each worker tells the others' what it leads, so that a node knows the
//! leaders of partitions too that it has no replica of.
//!
//! Clients are told by it, and commands are sent first where it says. Nothing that has to be right relies on
//! it: whoever is asked wrongly refuses.

use std::collections::BTreeSet;

use flux_core::placement::NodeId;
use flux_proto::peer::{Frame, Led, encode};

use super::cluster::BEAT_TICKS;
use super::dispatch::Dispatch;
use crate::shared::Claim;

/// Ticks until all are told again, though nothing has changed: 2 s.
const REPEAT_TICKS: u64 = 40;

/// What the other nodes were told.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The partitions led and their terms, as they are on the wire.
    led: Vec<u8>,
    /// The nodes that know.
    nodes: BTreeSet<u32>,
}

impl Told {
    /// The link to a node is new: what was sent on the one before may be lost.
    pub(super) fn forget(&mut self, node: u32) {
        self.nodes.remove(&node);
    }
}

impl Dispatch {
    /// Tells the nodes that do not know yet what this worker leads; with every beat, at most.
    pub(super) fn tell_what_is_led(&mut self) {
        let Some(cluster) = &mut self.cluster else { return };
        if !cluster.ticks.is_multiple_of(BEAT_TICKS) {
            return;
        }
        if cluster.ticks.is_multiple_of(REPEAT_TICKS) {
            cluster.told.nodes.clear();
        }
        let mut led = Vec::with_capacity(cluster.told.led.len());
        for replica in self.replicas.iter().flatten() {
            let (partition, term) = (replica.partition(), replica.term());
            if replica.leads() {
                Led::put(&mut led, partition.0, term);
            } else if replica.leader() == 0 {
                // Its leader of this term, if there was one, is not heard any more.
                self.shared.views[usize::from(partition.0)].void_claims(|claim| claim.term <= term);
            }
        }
        if led != cluster.told.led {
            cluster.told.led = led;
            cluster.told.nodes.clear();
        }
        let (worker, workers) = (self.worker(), self.shared().mailboxes.len() as u16);
        let (Some(cluster), Some(peers)) = (&mut self.cluster, &mut self.peers) else { return };
        let led = Led::new(&cluster.told.led).expect("whole ones were put");
        for node in cluster.topology.members.keys().map(|node| node.0) {
            if !cluster.told.nodes.contains(&node)
                && let Some(out) = peers.out(node)
            {
                encode(out, &Frame::Leads { worker, workers, led }).expect("it is short");
                cluster.told.nodes.insert(node);
            }
        }
    }

    /// Another node's worker says what it leads.
    pub(super) fn on_leads(&self, from: u32, worker: u16, workers: u16, led: Led<'_>) {
        let (node, views) = (NodeId(from), &self.shared().views);
        let mut leads = BTreeSet::new();
        for (partition, term) in led.iter() {
            if partition % workers == worker
                && let Some(view) = views.get(usize::from(partition))
            {
                view.claim(Claim { node, term });
                leads.insert(partition);
            }
        }
        for partition in (worker..views.len() as u16).step_by(usize::from(workers)) {
            if !leads.contains(&partition) {
                views[usize::from(partition)].void_claims(|claim| claim.node == node);
            }
        }
    }

    /// Nothing is heard of a node any more, or of one of its workers; the others will say again what they lead.
    pub(super) fn void_claims_of(&self, node: u32) {
        for view in &self.shared().views {
            view.void_claims(|claim| claim.node == NodeId(node));
        }
    }
}
