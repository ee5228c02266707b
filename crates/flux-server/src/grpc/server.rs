//! The gRPC server: `flux.kv.v1.KV`, the standard health service and server reflection.
//!
//! It listens from before the node serves: until then every call but those of the health service is refused
//! with what the node waits for. Connections last over the change. Carrying out calls is the service's work.

use std::sync::Arc;
use std::time::Duration;

use axum::http;
use flux_cdc::Feed;
use flux_proto::Code;
use flux_proto::grpc::FILE_DESCRIPTOR_SET;
use flux_proto::grpc::kv_v1::kv_server::KvServer;
use flux_proto::native::MAX_FRAME_BYTES;
use tokio::net::TcpListener;
use tokio::sync::{SetOnce, watch};
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::ServiceExt as _;

use super::watch::watches;
use super::{Service, status};
use crate::cluster::Waiting;
use crate::feed::watch::Watches;
use crate::shared::Shared;

/// Calls of one connection at a time.
const CALLS_PER_CONNECTION: usize = 1024;
/// Streams of one connection at a time: a gateway has the watches of all its clients on one.
const STREAMS_PER_CONNECTION: u32 = 8192;
/// A connection that has said nothing for so long is asked whether the other end is still there, and closed
/// if no answer comes in the same time: watchers may be silent for ever.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// What answers calls. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    health: Routes,
    reporter: HealthReporter,
    /// Set once the node serves.
    served: Arc<SetOnce<Served>>,
}

#[derive(Debug)]
struct Served {
    routes: Routes,
    shared: Arc<Shared>,
    watches: Arc<Watches>,
}

impl Server {
    /// One that refuses calls.
    pub(crate) async fn new() -> Server {
        let (reporter, health) = tonic_health::server::health_reporter();
        let server = Server { health: Routes::new(health), reporter, served: Arc::default() };
        server.report(ServingStatus::NotServing).await;
        server
    }

    /// Calls are carried out from now on, and watches until `stopping` says so.
    pub(crate) async fn open(
        &self,
        shared: Arc<Shared>,
        feed: Arc<dyn Feed>,
        stopping: watch::Receiver<bool>,
    ) {
        let watches = Arc::new(watches(&shared, feed, stopping));
        let service = Service { shared: Arc::clone(&shared), watches: Arc::clone(&watches) };
        let service = KvServer::new(service)
            .max_decoding_message_size(MAX_FRAME_BYTES)
            // A change may have the value before it, too.
            .max_encoding_message_size(2 * MAX_FRAME_BYTES);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let v1 = reflection().build_v1().expect("the descriptors were made by this build");
        let v1alpha =
            reflection().build_v1alpha().expect("the descriptors were made by this build");
        let routes = self.health.clone().add_service(v1).add_service(v1alpha).add_service(service);
        // A node serves once.
        let _ = self.served.set(Served { routes, shared, watches });
        self.report(ServingStatus::Serving).await;
    }

    /// Answers until `stopping` says so, and then finishes the calls that are under way.
    pub(crate) async fn answer(
        self,
        listener: TcpListener,
        waiting: Waiting,
        mut stopping: watch::Receiver<bool>,
    ) {
        let refuse = async move || {
            status(Code::Unavailable, &waiting.reason()).into_http::<axum::body::Body>()
        };
        let refusing = Routes::from(self.health.clone().into_axum_router().fallback(refuse));
        let served = Arc::clone(&self.served);
        let answering = tower::service_fn(move |request: http::Request<Body>| {
            let routes = served.get().map_or(&refusing, |served| &served.routes);
            routes.clone().oneshot(request)
        });
        let stopped = async {
            let failed = tokio::select! {
                _ = stopping.wait_for(|stop| *stop) => false,
                () = self.failed() => true,
            };
            if failed {
                self.reporter.set_not_serving::<KvServer<Service>>().await;
            }
            // An error means that the node is gone, which ends this too.
            let _ = stopping.wait_for(|stop| *stop).await;
            self.reporter.set_not_serving::<KvServer<Service>>().await;
        };
        // The server's own option for this is of no use to one that is given its connections.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let ended = tonic::transport::Server::builder()
            .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_INTERVAL))
            .serve_with_incoming_shutdown(answering, incoming, stopped)
            .await;
        if let Err(error) = ended {
            tracing::error!(%error, "the gRPC server ended");
        }
        if let Some(served) = self.served.get() {
            served.watches.stopped().await;
        }
    }

    /// Waits until the log of the node that serves fails.
    async fn failed(&self) {
        self.served.wait().await.shared.failed.notified().await;
    }

    /// Says how it is with the service, and with the server as a whole.
    async fn report(&self, status: ServingStatus) {
        self.reporter.set_service_status("", status).await;
        match status {
            ServingStatus::Serving => self.reporter.set_serving::<KvServer<Service>>().await,
            _ => self.reporter.set_not_serving::<KvServer<Service>>().await,
        }
    }
}
