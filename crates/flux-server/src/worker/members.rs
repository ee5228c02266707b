//! Which replicas a worker has: those that the placement map gives to its node.
//!
//! A replica is made when the map names it, empty, and learns everything from its leader. It goes when its
//! group has surely gone on without it, which a leader tells it.

use std::sync::Arc;
use std::time::Instant;

use flux_core::placement::{NodeId, ReplicaId};
use flux_core::replica::{Recovery, Replica, SnapshotMeta};
use flux_core::{Error, PartitionId};
use flux_log::SnapshotId;
use mio::Interest;
use mio::net::TcpListener;

use super::{PEER_LISTENER, Worker};
use crate::clock;
use crate::cluster::{Member, Topology};
use crate::mailbox::{Message, Return};
use crate::recovery::replica_config;
use crate::transfer::{Outgoing, Received};

impl Worker {
    /// Accepts the connections of other nodes, for all workers.
    pub(super) fn listen_to_peers(&mut self, mut listener: TcpListener) {
        let registry = self.poll.registry();
        let registered = registry.register(&mut listener, PEER_LISTENER, Interest::READABLE);
        registered.expect("a listener can be watched");
        self.peer_listener = Some(listener);
        self.accept_peers();
    }

    pub(super) fn accept_peers(&mut self) {
        let (Some(listener), Some(peers)) = (&self.peer_listener, &mut self.dispatch.peers) else {
            return;
        };
        while let Ok((stream, _)) = listener.accept() {
            peers.adopt(stream, Vec::new(), Instant::now());
        }
    }

    /// What the links have to do now and then, and the connections that belong elsewhere.
    pub(super) fn tick_links(&mut self, now: Instant) {
        // An accept that failed for want of descriptors is announced by no event.
        self.accept_peers();
        let Some(peers) = &mut self.dispatch.peers else { return };
        peers.tick(now);
    }

    /// Hands out the connections that are not for this worker.
    fn pass_on_streams(&mut self) {
        let Some(peers) = &mut self.dispatch.peers else { return };
        let misplaced: Vec<_> = peers.misplaced().collect();
        for one in misplaced {
            let message = Message::Peer { stream: one.stream, input: one.input };
            // A full mailbox refuses it; the other side tries again.
            let _ = self.shared.mailboxes[usize::from(one.worker)].send(message);
        }
        let transfers = self.shared.cluster.as_ref().and_then(|seat| seat.transfers.get());
        let Some(transfers) = transfers else { return };
        for stream in peers.bulk() {
            transfers.receive(stream);
        }
    }

    /// Sends the snapshots that followers need.
    fn send_snapshots(&mut self) {
        let Some(cluster) = &mut self.dispatch.cluster else { return };
        let transfers = self.shared.cluster.as_ref().and_then(|seat| seat.transfers.get());
        for (partition, message) in cluster.snapshots_to_send.drain(..) {
            let to = message.to;
            let mailbox = Arc::clone(&self.own_mailbox);
            let done = move |taken| mailbox.answer(Return::SnapshotSent { partition, to, taken });
            let node = ReplicaId::from_u64(to).node();
            let address = cluster.topology.members.get(&node).map(Member::peer_addr);
            let (Some(transfers), Some(address)) = (transfers, address) else {
                done(false);
                continue;
            };
            let index = message.get_snapshot().get_metadata().index;
            let outgoing = Outgoing {
                node: node.0,
                address,
                id: SnapshotId { partition: partition.0, index },
                replica_from: message.from,
                replica_to: to,
                term: message.term,
            };
            tracing::info!(%partition, to = %node, index, "sending a snapshot");
            transfers.send(outgoing, done);
        }
    }

    /// Gives a snapshot that has come to the replica that it is for.
    pub(super) fn install(&mut self, received: Received) {
        let Received { id, replica_from, replica_to, term, meta, table, installed } = received;
        let partition = PartitionId(id.partition);
        let now = self.dispatch.now;
        let here = self.dispatch.replica(partition).filter(|(one, _)| one.id() == replica_to);
        let taken =
            here.is_some_and(|(replica, _)| replica.install(now, replica_from, term, meta, table));
        if taken {
            // What is walked is about to be replaced, and the log begins anew after the snapshot.
            self.snapshots.restart(partition, id.index);
            self.shared.stats.snapshots_received.add(1);
            tracing::info!(%partition, index = id.index, "a snapshot has come");
        }
        self.dispatch.activate(partition);
        // The sender may have given up.
        let _ = installed.send(taken);
    }

    /// Takes in what has changed in the cluster.
    pub(super) fn follow(&mut self, topology: Arc<Topology>) {
        let Some(cluster) = &mut self.dispatch.cluster else { return };
        let known = cluster.topology.members.keys().chain(topology.members.keys());
        let addresses = known
            .filter_map(|node| {
                let member = topology.members.get(node).or(cluster.topology.members.get(node))?;
                Some((node.0, member.peer_addr()))
            })
            .collect();
        cluster.topology = topology;
        cluster.changed = true;
        if let Some(peers) = &mut self.dispatch.peers {
            peers.set_members(&addresses, Instant::now());
        }
        self.make_replicas();
    }

    /// Makes the replicas that the map gives to this worker and that are not here yet.
    fn make_replicas(&mut self) {
        let Some(cluster) = &self.dispatch.cluster else { return };
        let (me, topology) = (cluster.me, Arc::clone(&cluster.topology));
        let Some(map) = &topology.map else { return };
        if matches!(self.dispatch.refusing, Some(Error::LogFailed(_))) {
            return;
        }
        for partition in self.shared.partitions.iter() {
            if self.shared.owner(partition) != self.id {
                continue;
            }
            let mine = map.target(partition).iter().find(|replica| replica.node() == me);
            let here = self.dispatch.replica(partition).map(|(replica, _)| replica.id());
            match (mine, here) {
                (Some(mine), None) => self.make_replica(partition, mine.get()),
                (mine, Some(here)) if mine.is_none_or(|mine| mine.get() != here) => {
                    let (replica, _) = self.dispatch.replica(partition).expect("just seen");
                    if replica.has_learned_nothing()
                        && let Some(cluster) = &mut self.dispatch.cluster
                    {
                        cluster.to_remove.push(partition);
                    }
                }
                _ => {}
            }
        }
    }

    fn make_replica(&mut self, partition: PartitionId, id: u64) {
        let view = &self.shared.views[usize::from(partition.0)];
        let config =
            replica_config(partition, id, &self.shared.settings, self.shared.partitions.count());
        let table = Arc::clone(&view.table);
        let recovery = Recovery::new(table, None, SnapshotMeta::default(), config.tail_bytes);
        let (memory, standing) = (Arc::clone(&self.shared.memory), Arc::clone(&view.standing));
        let replica = Replica::new(&config, recovery, memory, standing, clock::now());
        self.snapshots.restart(partition, 0);
        tracing::info!(%partition, "a replica of the partition comes here");
        self.dispatch.insert(replica.expect("an empty replica needs nothing"));
    }

    /// Removes the replicas whose groups have gone on without them.
    pub(super) fn place_replicas(&mut self) {
        self.pass_on_streams();
        self.send_snapshots();
        let Some(cluster) = &mut self.dispatch.cluster else { return };
        let gone = std::mem::take(&mut cluster.to_remove);
        for partition in gone {
            let Some(replica) = self.dispatch.remove(partition) else { continue };
            tracing::info!(%partition, "the replica of the partition leaves");
            self.turn.forget(replica, &mut self.dispatch);
            self.snapshots.forget(partition);
            let view = &self.shared.views[usize::from(partition.0)];
            view.standing.clear();
            view.feed.left();
            view.table.clear();
            self.make_replicas();
        }
    }

    /// Begins to hand the leadership of a partition to another node's replica.
    pub(super) fn begin_hand_over(
        &mut self,
        partition: PartitionId,
        to: NodeId,
    ) -> Result<(), String> {
        let Some((replica, _)) = self.dispatch.replica(partition) else {
            return Err(format!("this node has no replica of partition {partition}"));
        };
        if !replica.leads() {
            return Err(format!("this node does not lead partition {partition}"));
        }
        let there = |id: &&u64| ReplicaId::from_u64(**id).node() == to;
        let Some(&target) = replica.members().voters.iter().find(there) else {
            return Err(format!("{to} has no voter of partition {partition}"));
        };
        if target != replica.id() {
            self.dispatch.hand_over(partition, target);
        }
        Ok(())
    }
}
