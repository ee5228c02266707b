//! The nodes that can be watched: one connection to each, which all watches share.

use std::sync::atomic::{AtomicUsize, Ordering};

use flux_proto::grpc::kv_v1::kv_client::KvClient;
use flux_proto::grpc::kv_v1::{WatchRequest, WatchResponse};
use flux_proto::native::MAX_FRAME_BYTES;
use tokio::time::{Duration, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a node may take to begin.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection whose other end says nothing is asked after this time, and given up after the next.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// What may be under way to one client: one that is slow holds up its node with it.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all clients together: so much that those who are slow hold up nobody else.
const CONNECTION_WINDOW: u32 = 1 << 30;

pub(super) struct Nodes {
    channels: Vec<Channel>,
    next: AtomicUsize,
}

impl Nodes {
    /// The nodes with these addresses. Connections are opened when they are needed.
    pub(super) fn new(endpoints: &[String]) -> Nodes {
        let channels = endpoints.iter().filter_map(|address| channel(address)).collect();
        Nodes { channels, next: AtomicUsize::new(0) }
    }

    pub(super) fn count(&self) -> usize {
        self.channels.len()
    }

    /// The number of a node to begin with, each in turn.
    pub(super) fn pick(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.count().max(1)
    }

    /// Watches a node; numbers go round.
    pub(super) async fn watch(
        &self,
        node: usize,
        request: WatchRequest,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let none = || Status::unavailable("there is no node");
        let channel = self.channels.get(node % self.count().max(1)).ok_or_else(none)?;
        // A change may have the value before it, too.
        let limit = 2 * MAX_FRAME_BYTES;
        let mut client = KvClient::new(channel.clone()).max_decoding_message_size(limit);
        let late = |_| Status::unavailable("the node does not answer");
        let begun = timeout(BEGIN_TIMEOUT, client.watch(request)).await.map_err(late)?;
        begun.map(tonic::Response::into_inner)
    }
}

fn channel(address: &str) -> Option<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .inspect_err(|error| tracing::error!(address, %error, "no address of a node to watch"))
        .ok()?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    Some(endpoint.connect_lazy())
}
