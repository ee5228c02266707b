//! The replicas of a node as its control plane sees them: asked for, and told to hand leadership over.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use flux_core::PartitionId;
use flux_core::placement::{NodeId, ReplicaId};
use flux_core::replica::Role;
use flux_core::store::Table;
use flux_proto::peer::SnapshotOffer;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::cluster::{BoxFuture, Client, DataPlane, LocalPartition, PartitionRole};
use crate::mailbox::{Inspected, Message, Return};
use crate::shared::Shared;
use crate::transfer::{self, Received};

/// The data plane of a running node.
#[derive(Debug)]
pub(crate) struct Replicas {
    shared: Arc<Shared>,
}

impl Replicas {
    pub(crate) fn new(shared: Arc<Shared>) -> Replicas {
        Replicas { shared }
    }

    /// How all replicas of this node are, in the order of their partitions. A worker that does not answer
    /// is left out.
    pub(crate) async fn inspect(&self) -> Vec<Inspected> {
        let mut all = Vec::new();
        for mailbox in &self.shared.mailboxes {
            let (answer, answered) = oneshot::channel();
            if mailbox.send(Message::Inspect(answer)).is_ok() {
                all.append(&mut answered.await.unwrap_or_default());
            }
        }
        all.sort_unstable_by_key(|one| one.status.partition);
        all
    }

    /// Hands the leadership of every partition to others, where they can lead, and waits until that is
    /// done, but not for ever, nor for heirs that cannot come.
    pub(crate) async fn hand_over(&self) {
        let leads = |one: &Inspected| {
            one.status.role == Role::Leader && one.status.members.voters.len() > 1
        };
        let led = self.inspect().await.into_iter().filter(leads);
        let led: BTreeSet<PartitionId> = led.map(|one| one.status.partition).collect();
        // Until it has heard of the next leader it cannot say either who that is, nor what has become of
        // the writes that it proposed.
        let is_unsettled = |one: &&Inspected| {
            let known = one.status.leader != 0 && !leads(one);
            led.contains(&one.status.partition) && !known || leads(one)
        };
        let client = Client::default();
        for check in 1..=HAND_OVER_CHECKS {
            // Again each time: a replica may have found nobody fit to take over a moment ago.
            for mailbox in &self.shared.mailboxes {
                // One that takes no message has its followers elect.
                let _ = mailbox.send(Message::HandAllOver);
            }
            let replicas = self.inspect().await;
            let unsettled: Vec<&Inspected> = replicas.iter().filter(is_unsettled).collect();
            if unsettled.is_empty() {
                return;
            }
            if check % HEIR_CHECKS == 0 && !self.has_heirs(&client, &unsettled).await {
                tracing::info!(
                    partitions = unsettled.len(),
                    "no other node is there to lead what this one led"
                );
                return;
            }
            tokio::time::sleep(HAND_OVER_CHECK).await;
        }
        tracing::warn!(
            "some partitions found no new leader in time; their followers will elect one"
        );
    }

    /// Whether a node that has a vote in one of these partitions serves, and is not about to stop.
    async fn has_heirs(&self, client: &Client, led: &[&Inspected]) -> bool {
        let Some(seat) = &self.shared.cluster else { return false };
        let voters = led.iter().flat_map(|one| &one.status.members.voters);
        let mut nodes: BTreeSet<NodeId> =
            voters.map(|id| ReplicaId::from_u64(*id).node()).collect();
        nodes.remove(&seat.me);
        let addresses: Vec<SocketAddr> = {
            let topology = seat.topology.read();
            nodes.iter().filter_map(|node| Some(topology.members.get(node)?.admin_addr())).collect()
        };
        let mut asking = JoinSet::new();
        for address in addresses {
            let client = client.clone();
            asking.spawn(async move { client.is_ready(address, HEIR_TIMEOUT).await });
        }
        while let Some(answer) = asking.join_next().await {
            if answer.unwrap_or(false) {
                return true;
            }
        }
        false
    }
}

/// How often it is looked whether leadership has been handed over.
const HAND_OVER_CHECK: std::time::Duration = std::time::Duration::from_millis(10);
const HAND_OVER_CHECKS: usize = 200;
/// It is looked for heirs after so many checks each.
const HEIR_CHECKS: usize = 20;
/// How long a node may take to say that it is there.
const HEIR_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(300);

impl DataPlane for Replicas {
    fn partitions(&self) -> BoxFuture<'_, Vec<LocalPartition>> {
        Box::pin(async { self.inspect().await.iter().map(local_partition).collect() })
    }

    fn transfer(&self, partition: PartitionId, to: NodeId) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            if partition.0 >= self.shared.partitions.count() {
                return Err(format!("there is no partition {partition}"));
            }
            let mailbox = &self.shared.mailboxes[usize::from(self.shared.owner(partition))];
            let (answer, answered) = oneshot::channel();
            let message = Message::HandOver { partition, to, answer };
            if mailbox.send(message).is_err() {
                return Err("the node is overloaded".to_owned());
            }
            answered.await.unwrap_or_else(|_| Err("the node is stopping".to_owned()))
        })
    }
}

/// Where snapshots from other nodes go: the worker that has the replica.
#[derive(Debug)]
pub(crate) struct Receiving {
    shared: Weak<Shared>,
}

impl Receiving {
    pub(crate) fn new(shared: &Arc<Shared>) -> Receiving {
        Receiving { shared: Arc::downgrade(shared) }
    }
}

impl transfer::Replicas for Receiving {
    fn wanted(&self, offer: &SnapshotOffer<'_>) -> Option<Table> {
        let shared = self.shared.upgrade()?;
        let partition = PartitionId(offer.partition);
        let here = partition.0 < shared.partitions.count() && shared.holds(partition);
        here.then(|| Table::new(shared.table_options, Arc::clone(&shared.memory)))
    }

    fn received(&self, received: Received) {
        let Some(shared) = self.shared.upgrade() else { return };
        let owner = usize::from(shared.owner(PartitionId(received.id.partition)));
        shared.mailboxes[owner].answer(Return::SnapshotReceived(Box::new(received)));
    }
}

fn local_partition(one: &Inspected) -> LocalPartition {
    let status = &one.status;
    let ids = |ids: &[u64]| ids.iter().map(|id| ReplicaId::from_u64(*id)).collect();
    LocalPartition {
        partition: status.partition.0,
        replica: ReplicaId::from_u64(status.id),
        role: match status.role {
            Role::Leader => PartitionRole::Leader,
            Role::Follower => PartitionRole::Follower,
            Role::Learner => PartitionRole::Learner,
        },
        term: status.term,
        leader: (status.leader != 0).then(|| ReplicaId::from_u64(status.leader)),
        commit: status.commit,
        applied: status.applied,
        revision: status.revision,
        voters: ids(&status.members.voters),
        outgoing: ids(&status.members.outgoing),
        changing: status.changing,
        learners: ids(&status.members.learners),
        keys: one.keys,
        bytes: one.bytes,
    }
}
