//! Asking a node's admin port: JSON over HTTP. Used between nodes and by `flux admin`.
//!
//! Nodes ask through [`Peers`], so that a whole cluster runs without sockets in the tests.

use std::error::Error;
use std::fmt::{Debug, Display};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::registry::BoxFuture;

/// An answer that is longer is refused. The statuses of all 16384 partitions are a tenth of it.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections to one node that are kept for the next question.
const IDLE_CONNECTIONS: usize = 2;

/// How a node asks others.
pub(super) trait Peers: Debug + Send + Sync {
    /// The body of the answer to a `GET`, or with a body a `POST`, of an admin port.
    fn ask<'a>(
        &'a self,
        address: SocketAddr,
        path: &'a str,
        body: Option<Bytes>,
    ) -> BoxFuture<'a, Result<Bytes, CallError>>;
}

/// How long a node may take to answer another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

impl Peers for Client {
    fn ask<'a>(
        &'a self,
        address: SocketAddr,
        path: &'a str,
        body: Option<Bytes>,
    ) -> BoxFuture<'a, Result<Bytes, CallError>> {
        Box::pin(async move {
            let method = if body.is_some() { Method::POST } else { Method::GET };
            let body = body.unwrap_or_default();
            self.call(method, &address.to_string(), path, body, ANSWER_TIMEOUT).await
        })
    }
}

/// Asks a node for something.
pub(super) async fn get<T: DeserializeOwned>(
    peers: &dyn Peers,
    address: SocketAddr,
    path: &str,
) -> Result<T, CallError> {
    read(&address.to_string(), &peers.ask(address, path, None).await?)
}

/// Asks a node to do something.
pub(super) async fn post<T: DeserializeOwned>(
    peers: &dyn Peers,
    address: SocketAddr,
    path: &str,
    request: &impl Serialize,
) -> Result<T, CallError> {
    read(&address.to_string(), &peers.ask(address, path, Some(write(request))).await?)
}

fn write(request: &impl Serialize) -> Bytes {
    serde_json::to_vec(request).expect("a request of plain fields").into()
}

fn read<T: DeserializeOwned>(address: &str, body: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(body).map_err(|error| CallError::Foreign {
        address: address.to_owned(),
        reason: error.to_string(),
    })
}

/// What an answer says that is not as it should be.
pub(super) fn refusal(address: &str, path: &str, status: StatusCode, body: &[u8]) -> CallError {
    if status == StatusCode::NOT_FOUND && body == crate::admin::UNKNOWN_PATH.as_bytes() {
        let message =
            format!("the node at {address} is not part of a cluster: it answers {path} with 404");
        return CallError::Refused { message };
    }
    match serde_json::from_slice(body) {
        Ok(ErrorBody { error }) => CallError::Refused { message: error },
        Err(_) => CallError::Foreign {
            address: address.to_owned(),
            reason: format!("{path} answers {status}"),
        },
    }
}

/// A client of admin ports, with a connection kept to each node. Clones share them.
#[derive(Clone, Debug)]
pub struct Client {
    inner: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// Why a node gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It cannot be reached, or did not answer in time.
    #[error("cannot reach the admin port {address}: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// It said no, and why.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// What it answered is not what was asked for.
    #[error("what answers at {address} is not the admin port of a node: {reason}")]
    Foreign {
        /// The address.
        address: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

/// How a refusal looks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ErrorBody {
    pub(super) error: String,
}

impl Default for Client {
    fn default() -> Client {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder.pool_max_idle_per_host(IDLE_CONNECTIONS);
        Client { inner: builder.build(connector) }
    }
}

impl Client {
    /// Asks for something.
    ///
    /// # Errors
    /// No answer within the timeout, or none that can be read.
    pub async fn get<T: DeserializeOwned>(
        &self,
        address: impl Display,
        path: &str,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let address = address.to_string();
        read(&address, &self.call(Method::GET, &address, path, Bytes::new(), timeout).await?)
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// As [`get`](Client::get), or the node said no.
    pub async fn post<T: DeserializeOwned>(
        &self,
        address: impl Display,
        path: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<T, CallError> {
        let address = address.to_string();
        read(&address, &self.call(Method::POST, &address, path, write(body), timeout).await?)
    }

    /// Whether a node says that it serves, and goes on doing so.
    pub(crate) async fn is_ready(&self, address: impl Display, timeout: Duration) -> bool {
        let address = address.to_string();
        self.call(Method::GET, &address, "/ready", Bytes::new(), timeout).await.is_ok()
    }

    async fn call(
        &self,
        method: Method,
        address: &str,
        path: &str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let unreachable =
            |reason: String| CallError::Unreachable { address: address.to_owned(), reason };
        let foreign = |reason: String| CallError::Foreign { address: address.to_owned(), reason };
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{path}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| unreachable(error.to_string()))?;
        let exchange = async {
            let response = self.inner.request(request).await.map_err(|error| {
                let mut last: &dyn Error = &error;
                while let Some(cause) = last.source() {
                    last = cause;
                }
                let (lost, last) = (last.is::<std::io::Error>(), last.to_string());
                let hyper = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
                match hyper {
                    Some(hyper) if !lost && !hyper.is_incomplete_message() => {
                        foreign(format!("no HTTP/1 there ({last})"))
                    }
                    _ => unreachable(last),
                }
            })?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|error| foreign(error.to_string()))?.to_bytes()))
        };
        let (status, body): (StatusCode, Bytes) =
            tokio::time::timeout(timeout, exchange).await.map_err(|_| {
                unreachable(format!("no answer within {} ms", timeout.as_millis()))
            })??;
        if status.is_success() { Ok(body) } else { Err(refusal(address, path, status, &body)) }
    }
}

#[cfg(test)]
mod tests {
    use axum::{Json, Router, routing};
    use tokio::net::TcpListener;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn answers_and_refusals_of_a_real_server() {
        let refuses = async || {
            let body = ErrorBody { error: "not today".to_owned() };
            (StatusCode::CONFLICT, Json(body))
        };
        let echoes = async |Json(number): Json<u64>| Json(number + 1);
        let hangs = async || std::future::pending::<()>().await;
        let router = Router::new()
            .route("/echo", routing::post(echoes))
            .route("/refuse", routing::get(refuses))
            .route("/text", routing::get(async || "words"))
            .route(
                "/alone",
                routing::get(async || (StatusCode::NOT_FOUND, crate::admin::UNKNOWN_PATH)),
            )
            .route("/hang", routing::get(hangs));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let server = tokio::spawn(axum::serve(listener, router).into_future());

        let client = Client::default();
        let answer: u64 = client.post(address, "/echo", &41, TIMEOUT).await.expect("an answer");
        assert_eq!(answer, 42);
        let get = async |path: &str, timeout: Duration| {
            client.get::<u64>(address, path, timeout).await.expect_err("refused").to_string()
        };
        assert_eq!(get("/refuse", TIMEOUT).await, "not today");
        assert!(get("/text", TIMEOUT).await.contains("is not the admin port of a node"));
        assert!(get("/none", TIMEOUT).await.contains("is not the admin port of a node"));
        assert!(get("/alone", TIMEOUT).await.contains("is not part of a cluster"));
        let late = get("/hang", Duration::from_millis(50)).await;
        assert!(late.ends_with("no answer within 50 ms"), "{late}");
        server.abort();
        assert!(server.await.expect_err("it was stopped").is_cancelled());
        let gone = Client::default().get::<u64>(address, "/echo", TIMEOUT).await;
        assert!(matches!(gone, Err(CallError::Unreachable { .. })), "{gone:?}");
    }
}
