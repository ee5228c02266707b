//! The other nodes as the cluster's map and the registry name them, read over gRPC.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use flux_cdc::BoxFuture;
use flux_core::PartitionId;
use flux_core::placement::NodeId;
use flux_proto::Code;
use flux_proto::event::{Event, Record, Token};
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::grpc::watch::record_of;
use tonic::{Status, Streaming};
use wire::watch_response::Kind;

use super::{Changes, Other, Others, Unhelpful};
use crate::shared::Shared;

/// How often the other node says that it is there; what counts is what it sends besides.
const KEEP_ALIVE_MS: u32 = 60_000;

/// All other nodes of the cluster: first those that are to have a replica of the partition, then the rest
/// of those that live, which may have one that has not left yet.
#[derive(Debug)]
pub(in crate::feed) struct NodeOthers(pub(in crate::feed) Arc<Shared>);

impl NodeOthers {
    fn address(&self, node: NodeId) -> Option<SocketAddr> {
        let topology = Arc::clone(&self.0.cluster.as_ref()?.topology.read());
        Some(topology.members.get(&node)?.registration.grpc_addr)
    }
}

impl Others for NodeOthers {
    fn nodes(&self, partition: u16) -> Vec<Other> {
        let Some(seat) = &self.0.cluster else { return Vec::new() };
        let topology = Arc::clone(&seat.topology.read());
        let targets = topology.map.iter().flat_map(|map| map.target(PartitionId(partition)));
        let targets: Vec<NodeId> = targets.map(|replica| replica.node()).collect();
        let is_alive = |node: &NodeId| topology.members.get(node).is_some_and(|one| one.alive);
        let (living, away): (Vec<NodeId>, Vec<NodeId>) =
            targets.iter().filter(|node| **node != seat.me).partition(|node| is_alive(node));
        let rest = topology.members.keys().copied();
        let rest =
            rest.filter(|node| *node != seat.me && !targets.contains(node) && is_alive(node));
        let holding = living.into_iter().chain(away).map(|node| Other { node, holds: true });
        holding.chain(rest.map(|node| Other { node, holds: false })).collect()
    }

    fn changes(
        &self,
        node: NodeId,
        partition: u16,
        after: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Changes>, Unhelpful>> {
        let client = self.address(node).and_then(|address| self.0.nodes.client(address));
        let token = Token { cluster: self.0.token_cluster(), positions: vec![(partition, after)] };
        let request = wire::WatchRequest {
            keys: Some(wire::watch_request::Keys::Prefix(Bytes::new())),
            from: Some(wire::watch_request::From::Token(token.encode().into())),
            partitions: vec![u32::from(partition)],
            here_only: true,
            own_log_only: true,
            keep_alive_ms: KEEP_ALIVE_MS,
        };
        Box::pin(async move {
            let mut client =
                client.ok_or_else(|| Unhelpful::Silent("it has no address".to_owned()))?;
            // One that has not begun to serve refuses the call itself.
            let stream = client.watch(request).await.map_err(|status| silent(&status))?;
            let stream = stream.into_inner();
            Ok(Box::new(Watched { partition, stream }) as Box<dyn Changes>)
        })
    }
}

fn silent(status: &Status) -> Unhelpful {
    Unhelpful::Silent(format!("{:?}: {}", status.code(), status.message()))
}

/// A watch of one partition at another node.
struct Watched {
    partition: u16,
    stream: Streaming<wire::WatchResponse>,
}

impl Changes for Watched {
    fn next(&mut self) -> BoxFuture<'_, Result<Event, Unhelpful>> {
        Box::pin(async move {
            loop {
                let kind = match self.stream.message().await {
                    Ok(Some(response)) => response.kind,
                    Ok(None) => return Err(Unhelpful::Silent("the stream ended".to_owned())),
                    Err(status) => return Err(ended(&status)),
                };
                match kind {
                    None | Some(Kind::Started(_) | Kind::KeepAlive(_)) => {}
                    Some(kind) => match record_of(kind) {
                        Some(Record::Change(event)) if event.partition == self.partition => {
                            return Ok(event);
                        }
                        // A gap: its log does not go back so far either.
                        _ => return Err(Unhelpful::Lacks),
                    },
                }
            }
        })
    }
}

/// A watch at one node only that has begun ends as unavailable where there is no replica. Without the code
/// the connection was lost.
fn ended(status: &Status) -> Unhelpful {
    let code = status.metadata().get(CODE_TRAILER);
    match code.is_some_and(|code| code == Code::Unavailable.name()) {
        true => Unhelpful::Lacks,
        false => silent(status),
    }
}
