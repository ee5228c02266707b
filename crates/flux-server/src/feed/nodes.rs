//! Connections to the gRPC servers of the other nodes, for all that this node reads of their changes.

use std::collections::HashMap;
use std::net::SocketAddr;

use flux_proto::grpc::kv_v1::kv_client::KvClient;
use flux_proto::native::MAX_FRAME_BYTES;
use parking_lot::Mutex;
use tokio::time::Duration;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection whose other end says nothing is asked after this time, and given up after the next.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// What may be under way to one reader; one that is slow holds up the other node with it.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all readers together: so much that those who are slow hold up nobody else.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// Connections to the other nodes: one to each that was ever asked, as many as the cluster has.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    channels: Mutex<HashMap<SocketAddr, Channel>>,
}

impl Nodes {
    /// A client of the node whose gRPC server is there. It connects when it is used.
    pub(super) fn client(&self, to: SocketAddr) -> Option<KvClient<Channel>> {
        let channel = self.channel(to)?;
        // A change may have the value before it, too.
        Some(KvClient::new(channel).max_decoding_message_size(2 * MAX_FRAME_BYTES))
    }

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
