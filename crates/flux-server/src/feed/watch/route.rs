//! Where a partition can be watched: here, or at another node. Reaching that one is not done here.

use std::net::SocketAddr;
use std::sync::Arc;

use flux_core::PartitionId;

use crate::clock;
use crate::shared::Shared;

/// A replica is as good as the leader's while it may lack writes for no longer than this.
const FRESH_US: u64 = 2_000_000;

/// Where to watch a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Here,
    /// Here, though the replica is out of touch: nowhere better is known.
    HereLate,
    /// At the node whose gRPC server is there.
    There(SocketAddr),
    /// No node is known that has it.
    Nowhere,
}

/// What is known of where partitions are.
pub(crate) trait Routes: Send + Sync + 'static {
    /// Where to watch a partition; where that has failed, the next best place. 0 is the first attempt.
    fn route(&self, partition: u16, attempt: u32) -> Route;
}

/// What a node knows.
#[derive(Debug)]
pub(crate) struct NodeRoutes(pub(crate) Arc<Shared>);

impl Routes for NodeRoutes {
    fn route(&self, partition: u16, attempt: u32) -> Route {
        let shared = &self.0;
        let Some(seat) = &shared.cluster else { return Route::Here };
        let partition = PartitionId(partition);
        let age = shared.age(partition, clock::now());
        if age.is_some_and(|age| age.age_us < FRESH_US) && attempt == 0 {
            return Route::Here;
        }
        let leader = shared.leader(partition).filter(|node| *node != seat.me);
        let topology = seat.topology.read();
        let replicas = topology.map.iter().flat_map(|map| map.target(partition));
        let others = replicas.map(|replica| replica.node());
        let others = others.filter(|node| *node != seat.me && Some(*node) != leader);
        let there = leader.into_iter().chain(others).filter_map(|node| {
            let member = topology.members.get(&node).filter(|member| member.alive)?;
            Some(Route::There(member.registration.grpc_addr))
        });
        let here = age.map(|_| Route::HereLate);
        // An old replica here is better than an old one there, but not than the leader's.
        let mut places: Vec<Route> = there.collect();
        let at = usize::from(leader.is_some()).min(places.len());
        places.splice(at..at, here);
        let attempt = attempt as usize % places.len().max(1);
        places.get(attempt).copied().unwrap_or(Route::Nowhere)
    }
}
