//! Watching partitions at another node, for a watcher of this one. Which node that is, and what comes after
//! it ends, is the session's to say.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use flux_proto::Code;
use flux_proto::event::Token;
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::grpc::watch::record_of;
use tokio::time::{Duration, timeout};
use wire::watch_response::Kind;

use super::hub::Seat;
use super::keys::Keys;
use super::outlet::Place;
use crate::feed::nodes::Nodes;

/// The other node says at least so often that it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// A node that has been silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(6);
/// How watching at another node came to its end.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) partitions: Vec<u16>,
    /// Something came besides that it had begun.
    pub(super) was_under_way: bool,
    /// The watcher is too slow for the other node.
    pub(super) is_too_slow: bool,
}

/// Watches partitions at another node until that fails.
pub(super) async fn follow(
    nodes: Arc<Nodes>,
    to: SocketAddr,
    seat: Seat,
    cluster: u64,
    partitions: Vec<u16>,
) -> Lost {
    let mut lost = Lost { partitions, was_under_way: false, is_too_slow: false };
    let Some(mut client) = nodes.client(to) else { return lost };
    let request = request(&seat, cluster, &lost.partitions);
    let asked = timeout(SILENCE, client.watch(request)).await;
    let mut stream = match asked {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => {
            tracing::debug!(%to, %status, "a node does not let its partitions be watched");
            return lost;
        }
        Err(_) => return lost,
    };
    loop {
        let response = match timeout(SILENCE, stream.message()).await {
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) | Err(_) => return lost,
            Ok(Err(status)) => {
                tracing::debug!(%to, %status, "watching at another node ended");
                let code = status.metadata().get(CODE_TRAILER);
                lost.is_too_slow = code.is_some_and(|code| code == Code::WatchTooSlow.name());
                return lost;
            }
        };
        let wire::WatchResponse { kind: Some(kind), token } = response else { continue };
        match kind {
            Kind::Started(_) | Kind::KeepAlive(_) => {
                lost.was_under_way |= matches!(kind, Kind::KeepAlive(_));
                let positions = Token::decode(&token).map(|token| token.positions);
                for (partition, revision) in positions.into_iter().flatten() {
                    if lost.partitions.contains(&partition) {
                        seat.outlet.reach(partition, revision);
                    }
                }
                let _ = seat.outlet.start();
            }
            kind => {
                let Some(record) = record_of(kind) else { continue };
                if !lost.partitions.contains(&record.partition()) {
                    return lost;
                }
                seat.outlet.room().await;
                seat.outlet.push_surely(record);
                lost.was_under_way = true;
            }
        }
    }
}

/// What to ask of the other node: to go on where the watcher is. Either all of the partitions have no place
/// yet, or none of them.
fn request(seat: &Seat, cluster: u64, partitions: &[u16]) -> wire::WatchRequest {
    let places = partitions.iter().map(|&partition| (partition, seat.outlet.place(partition)));
    let places: Vec<(u16, Place)> = places.collect();
    let known = |&(partition, place): &(u16, Place)| match place {
        Place::After(revision) => Some((partition, revision)),
        Place::Now | Place::Rows => None,
    };
    let from = (!places.iter().any(|(_, place)| *place == Place::Now)).then(|| {
        let token = Token { cluster, positions: places.iter().filter_map(known).collect() };
        wire::watch_request::From::Token(Bytes::from(token.encode()))
    });
    let keys = match &seat.keys {
        Keys::One(key) => wire::watch_request::Keys::Key(key.clone()),
        Keys::Prefix(prefix) => wire::watch_request::Keys::Prefix(prefix.clone()),
    };
    wire::WatchRequest {
        keys: Some(keys),
        from,
        partitions: partitions.iter().copied().map(u32::from).collect(),
        here_only: true,
        // It asks the others for what its log lacks: this one does not, for a partition that it has not got.
        own_log_only: false,
        keep_alive_ms: KEEP_ALIVE.as_millis() as u32,
    }
}
