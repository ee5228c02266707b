//! Watching partitions at another node, for a watcher of this one. Which node that is, and what comes after
//! it ends, is the session's to say.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use flux_proto::Code;
use flux_proto::event::Token;
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::grpc::kv_v1::kv_client::KvClient;
use flux_proto::grpc::watch::record_of;
use flux_proto::native::MAX_FRAME_BYTES;
use parking_lot::Mutex;
use tokio::time::{Duration, timeout};
use tonic::transport::{Channel, Endpoint};
use wire::watch_response::Kind;

use super::hub::Seat;
use super::keys::Keys;
use super::outlet::Place;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection whose other end says nothing is asked after this time, and given up after the next.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// The other node says at least so often that it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// A node that has been silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(6);
/// What may be under way to one watcher; a watcher that is slow holds up the other node with it.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all watchers together: so much that those who are slow hold up nobody else.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// Connections to the other nodes: one to each that was ever asked, as many as the cluster has.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    channels: Mutex<HashMap<SocketAddr, Channel>>,
}

impl Nodes {
    fn channel(&self, to: SocketAddr) -> Option<Channel> {
        let mut channels = self.channels.lock();
        if let Some(known) = channels.get(&to) {
            return Some(known.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{to}")).ok()?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_lazy();
        channels.insert(to, channel.clone());
        Some(channel)
    }
}

/// The largest message: a change may have the value before it, too.
const MAX_MESSAGE_BYTES: usize = 2 * MAX_FRAME_BYTES;

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
    let Some(channel) = nodes.channel(to) else { return lost };
    let request = request(&seat, cluster, &lost.partitions);
    let mut client = KvClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
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
        keep_alive_ms: KEEP_ALIVE.as_millis() as u32,
    }
}
