//! Asking a node's admin port: JSON over HTTP. Used between nodes and by `flux admin`.

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// An answer that is longer is refused. The statuses of all 16384 partitions are a tenth of it.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections to one node that are kept for the next question.
const IDLE_CONNECTIONS: usize = 2;

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
    #[error("{address} does not answer as a Flux-KV admin port: {reason}")]
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
        self.call(Method::GET, &address.to_string(), path, Bytes::new(), timeout).await
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
        let body = serde_json::to_vec(body).expect("a request of plain fields").into();
        self.call(Method::POST, &address.to_string(), path, body, timeout).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        address: &str,
        path: &str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<T, CallError> {
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
                unreachable(std::error::Error::source(&error).unwrap_or(&error).to_string())
            })?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|error| foreign(error.to_string()))?.to_bytes()))
        };
        let (status, body): (StatusCode, Bytes) =
            tokio::time::timeout(timeout, exchange).await.map_err(|_| {
                unreachable(format!("no answer within {} ms", timeout.as_millis()))
            })??;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| foreign(error.to_string()));
        }
        if status == StatusCode::NOT_FOUND {
            let message = format!(
                "the node at {address} is not part of a cluster, or is starting: it answers {path} with 404"
            );
            return Err(CallError::Refused { message });
        }
        match serde_json::from_slice(&body) {
            Ok(ErrorBody { error }) => Err(CallError::Refused { message: error }),
            Err(_) => Err(foreign(format!("{path} answers {status}"))),
        }
    }
}
