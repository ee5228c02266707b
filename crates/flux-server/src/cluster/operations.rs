//! What an operator asks for: each is a change of the placement map, or a question to the node that it
//! is about. Any node takes it.

use std::sync::Arc;
use std::time::Duration;

use flux_core::PartitionId;
use flux_core::placement::{NodeId, PlacementMap};
use serde::{Deserialize, Serialize};

use super::control::Core;
use super::data_plane::LocalPartition;
use super::http::{self, CallError};
use super::registry::{Placement, RegistryError};
use super::report::{self, is_settled};
use super::topology::{Member, Topology, Trouble};

/// Others may change the map at the same time; each of them loses at most so often.
const ATTEMPTS: usize = 10;
/// How long a loser waits to see what the winner wrote.
const NEWS_TIMEOUT: Duration = Duration::from_secs(1);

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// What was asked for cannot be done; the reason is for the operator.
    #[error("{0}")]
    Wrong(String),
    /// The registry.
    #[error("the placement map cannot be changed now: {0}")]
    Registry(#[from] RegistryError),
    /// Others change the map all the time.
    #[error("the placement map is being changed by others: try again")]
    Contended,
    /// Another node had to be asked.
    #[error("{0}")]
    Call(#[from] CallError),
}

/// Which node an operation is about.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeRequest {
    /// A node's name, or a part of it that no other's has.
    pub node: String,
}

/// Which replica is to move where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoveRequest {
    /// The partition.
    pub partition: u16,
    /// The node that has the replica.
    pub from: String,
    /// The node that is to have it.
    pub to: String,
}

/// Who is to lead a partition.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransferRequest {
    /// The partition.
    pub partition: u16,
    /// The node that is to lead it.
    pub to: String,
    /// Whether another node passes the request on: it is not passed on again.
    #[serde(default)]
    pub forwarded: bool,
}

/// Whether to pass a request on to the controller.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RebalanceRequest {
    /// Whether another node passes the request on: it is not passed on again.
    #[serde(default)]
    pub forwarded: bool,
}

/// What was done, in words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// For an operator.
    pub message: String,
}

impl Core {
    /// Changes the map that the registry has. The change may be asked for several times, of newer maps.
    pub(super) async fn change_map(
        &self,
        change: impl Fn(&mut PlacementMap) -> Result<(), Refusal>,
    ) -> Result<Placement, Refusal> {
        let mut state = self.registry.state();
        for _ in 0..ATTEMPTS {
            let placement = self.current_placement()?;
            state.mark_unchanged();
            let mut map = PlacementMap::clone(&placement.map);
            change(&mut map)?;
            if map == *placement.map {
                return Ok(placement);
            }
            map.validate().map_err(|error| Refusal::Wrong(error.to_string()))?;
            let new = Placement { epoch: placement.epoch + 1, map: map.into() };
            if self.registry.write(&new, Some(placement.epoch)).await? {
                self.wake.notify_one();
                return Ok(new);
            }
            // Without news the next attempt fails for the same reason.
            let _ = tokio::time::timeout(NEWS_TIMEOUT, state.changed()).await;
        }
        Err(Refusal::Contended)
    }

    /// The registry's map, if it is one that this node goes by.
    fn current_placement(&self) -> Result<Placement, Refusal> {
        let state = self.registry.state();
        let state = state.borrow();
        let trouble =
            Topology::clone(&self.topology.borrow()).observe(&state, tokio::time::Instant::now());
        if let Some(trouble) = trouble {
            return Err(Refusal::Wrong(trouble.advice(&self.setup.settings)));
        }
        let snapshot = state.snapshot.as_ref().and_then(|snapshot| snapshot.placement.clone());
        snapshot.ok_or_else(|| {
            let needed = self.setup.settings.replication_factor;
            Refusal::Wrong(format!(
                "there is no cluster yet: it is created when {needed} nodes are registered"
            ))
        })
    }

    pub(super) async fn drain(&self, request: &NodeRequest) -> Result<Done, Refusal> {
        let node = self.named(&request.node)?;
        let topology = Arc::clone(&self.topology.borrow());
        self.change_map(|map| {
            if !map.draining.contains(&node) {
                has_room_without(map, &topology, node)?;
            }
            map.draining.insert(node);
            Ok(())
        })
        .await?;
        tracing::info!(%node, "draining");
        let message = format!(
            "{node} is being emptied: its replicas move to other nodes. `flux admin nodes` shows how many \
             are left; with none it can be stopped for good"
        );
        Ok(Done { message })
    }

    pub(super) async fn undrain(&self, request: &NodeRequest) -> Result<Done, Refusal> {
        let node = self.named(&request.node)?;
        self.change_map(|map| {
            if !map.draining.remove(&node) {
                return Err(Refusal::Wrong(format!("{node} is not being drained")));
            }
            Ok(())
        })
        .await?;
        tracing::info!(%node, "not draining any more");
        Ok(Done { message: format!("{node} takes replicas again") })
    }

    pub(super) async fn move_replica(
        self: &Arc<Core>,
        request: &MoveRequest,
    ) -> Result<Done, Refusal> {
        let (from, to) = (self.named(&request.from)?, self.named(&request.to)?);
        let partition = request.partition;
        if from == to {
            return Err(Refusal::Wrong(format!(
                "FROM and TO are both {from}: give the node that has the replica, and then one that has none \
                 of partition {partition}"
            )));
        }
        let topology = Arc::clone(&self.topology.borrow());
        if !topology.members.get(&to).is_some_and(|member| member.alive) {
            return Err(Refusal::Wrong(format!("{to} is away")));
        }
        let answers = report::ask_all(self, &topology).await;
        let leader = report::leaders(&answers).get(&partition).copied();
        self.change_map(|map| replace(map, leader, partition, from, to)).await?;
        tracing::info!(partition, %from, %to, "replica is moved as an operator asked");
        let message = format!(
            "partition {partition} moves from {from} to {to}; `flux admin partitions` shows when it is there"
        );
        Ok(Done { message })
    }

    pub(super) async fn transfer(
        self: &Arc<Core>,
        request: &TransferRequest,
    ) -> Result<Done, Refusal> {
        let to = self.named(&request.to)?;
        let partition = PartitionId(request.partition);
        let topology = Arc::clone(&self.topology.borrow());
        let count = topology.map.as_ref().map_or(0, |map| map.partitions);
        if request.partition >= count {
            return Err(no_partition(request.partition, count));
        }
        let done = Done { message: format!("partition {partition} is handed to {to}") };
        let answers = if request.forwarded {
            report::Answers::from([(self.node(), self.local_partitions().await)])
        } else {
            report::ask_all(self, &topology).await
        };
        let leaders = report::leaders(&answers);
        let Some(leader) = leaders.get(&request.partition).map(|leader| leader.replica.node())
        else {
            return Err(Refusal::Wrong(format!("partition {partition} has no leader now")));
        };
        if leader == to {
            return Ok(Done { message: format!("{to} leads partition {partition} already") });
        }
        if leader == self.node() {
            self.transfer_own(partition, to).await?;
            return Ok(done);
        }
        self.ask_to_transfer(&topology, leader, partition, to).await?;
        Ok(done)
    }

    /// Hands over a partition that this node leads.
    async fn transfer_own(&self, partition: PartitionId, to: NodeId) -> Result<(), Refusal> {
        match self.data() {
            Some(data) => data.transfer(partition, to).await.map_err(Refusal::Wrong),
            None => Err(Refusal::Wrong(format!("{} is starting", self.node()))),
        }
    }

    /// Asks a partition's leader to hand it over.
    pub(super) async fn ask_to_transfer(
        &self,
        topology: &Topology,
        leader: NodeId,
        partition: PartitionId,
        to: NodeId,
    ) -> Result<(), Refusal> {
        if leader == self.node() {
            return self.transfer_own(partition, to).await;
        }
        let Some(member) = topology.members.get(&leader) else {
            return Err(Refusal::Wrong(format!("nothing is known of {leader}, which leads it")));
        };
        let request =
            TransferRequest { partition: partition.0, to: to.to_string(), forwarded: true };
        let address = member.admin_addr();
        let _: Done = http::post(&*self.peers, address, "/cluster/transfer", &request).await?;
        Ok(())
    }

    /// Has the controller look at once.
    pub(super) async fn rebalance(&self, request: &RebalanceRequest) -> Result<Done, Refusal> {
        self.needs_registry()?;
        let topology = Arc::clone(&self.topology.borrow());
        let Some(controller) = topology.controller else {
            return Err(Refusal::Wrong("no node is the cluster's controller now".to_owned()));
        };
        if controller != self.node() {
            let member = topology.members.get(&controller).filter(|_| !request.forwarded);
            let Some(member) = member else {
                return Err(Refusal::Wrong(format!("{controller} is the controller now")));
            };
            let request = RebalanceRequest { forwarded: true };
            let address = member.admin_addr();
            let path = "/cluster/rebalance";
            return Ok(http::post(&*self.peers, address, path, &request).await?);
        }
        self.wake.notify_one();
        let message = format!(
            "{controller} looks for what is out of balance now, as it does every few seconds by itself"
        );
        Ok(Done { message })
    }

    /// Puts the map that the nodes know back into a registry that has none, or an older one.
    pub(super) async fn republish(self: &Arc<Core>) -> Result<Done, Refusal> {
        let topology = Arc::clone(&self.topology.borrow());
        let Some(known) = topology.placement() else {
            return Err(Refusal::Wrong("this node knows no placement map".to_owned()));
        };
        self.needs_registry()?;
        let over = match &*self.trouble.borrow() {
            Some(Trouble::Wiped) => None,
            Some(Trouble::OlderMap { epoch, .. }) => Some(*epoch),
            _ => return Err(Refusal::Wrong("the registry misses no placement map".to_owned())),
        };
        let answers = report::ask_all(self, &topology).await;
        if let Some(newer) = answers.values().find(|answer| answer.epoch > known.epoch) {
            let node = newer.node;
            return Err(Refusal::Wrong(format!("{node} knows a newer map: ask that node")));
        }
        let epoch = known.epoch.max(over.unwrap_or(0)) + 1;
        if !self.registry.write(&Placement { epoch, map: known.map }, over).await? {
            return Err(Refusal::Contended);
        }
        tracing::info!(epoch, "the placement map was put back into the registry");
        Ok(Done { message: format!("the registry has the placement map again, as epoch {epoch}") })
    }

    /// What cannot be done, or known, while the registry is out of touch is refused.
    fn needs_registry(&self) -> Result<(), Refusal> {
        match &*self.trouble.borrow() {
            Some(away @ Trouble::Away(_)) => {
                let away = away.advice(&self.setup.settings);
                Err(Refusal::Wrong(format!("{away}: nothing is moved or put back until it does")))
            }
            _ => Ok(()),
        }
    }

    /// The node that a name stands for.
    fn named(&self, text: &str) -> Result<NodeId, Refusal> {
        let topology = self.topology.borrow();
        let draining = topology.map.iter().flat_map(|map| &map.draining);
        let mut known: Vec<NodeId> = topology.members.keys().chain(draining).copied().collect();
        known.sort_unstable();
        known.dedup();
        let mut fit =
            known.iter().filter(|node| !text.is_empty() && node.to_string().contains(text));
        match (fit.next(), fit.next()) {
            (Some(node), None) => Ok(*node),
            (Some(_), Some(_)) => {
                Err(Refusal::Wrong(format!("{text:?} stands for more than one node")))
            }
            (None, _) => {
                let names: Vec<String> = known.iter().map(NodeId::to_string).collect();
                let names = names.join(", ");
                Err(Refusal::Wrong(format!("there is no node {text:?}; the nodes are {names}")))
            }
        }
    }
}

fn no_partition(partition: u16, count: u16) -> Refusal {
    Refusal::Wrong(format!("there is no partition {partition}: they are 0 to {}", count.max(1) - 1))
}

/// Whether enough nodes are left to take what is on a node that is to be emptied.
fn has_room_without(map: &PlacementMap, topology: &Topology, node: NodeId) -> Result<(), Refusal> {
    let takes = |(other, member): &(&NodeId, &Member)| {
        **other != node && member.alive && !map.draining.contains(*other)
    };
    let left = topology.members.iter().filter(takes).count();
    let needed = usize::from(map.replication_factor);
    if left >= needed {
        return Ok(());
    }
    let missing = needed - left;
    let nodes = if missing == 1 { "node" } else { "nodes" };
    Err(Refusal::Wrong(format!(
        "{node} cannot be emptied: its replicas need {needed} other nodes that are alive and not draining \
         (replication_factor), and there would be {left}. Start {missing} more {nodes} first, or `flux admin \
         undrain` one"
    )))
}

/// Puts a new replica on one node into the place of that on another, if the partition's leader says that
/// the partition is as the map has it. Else a replica that still votes might lose its place to a new one on
/// its own node.
fn replace(
    map: &mut PlacementMap,
    leader: Option<&LocalPartition>,
    partition: u16,
    from: NodeId,
    to: NodeId,
) -> Result<(), Refusal> {
    if partition >= map.partitions {
        return Err(no_partition(partition, map.partitions));
    }
    let on = |node: NodeId| {
        map.target(PartitionId(partition)).iter().any(|replica| replica.node() == node)
    };
    let wrong = if on(to) {
        format!("partition {partition} has a replica on {to}")
    } else if !on(from) {
        format!("partition {partition} has no replica on {from}")
    } else if map.draining.contains(&to) {
        format!("{to} is being drained")
    } else if leader.is_none() {
        format!(
            "partition {partition} has no leader now that says how it is: try again when `flux admin \
             partitions` shows one"
        )
    } else if !leader.is_some_and(|one| is_settled(one, map.target(PartitionId(partition)))) {
        format!(
            "partition {partition} is still on its way to where it is to be, and replicas move one at a time: \
             try again when `flux admin partitions` does not show it as moving any more"
        )
    } else {
        let step = map.replace(PartitionId(partition), from, to);
        let step =
            step.ok_or_else(|| Refusal::Wrong("there are no replica ids left".to_owned()))?;
        map.apply(&step);
        return Ok(());
    };
    Err(Refusal::Wrong(wrong))
}
