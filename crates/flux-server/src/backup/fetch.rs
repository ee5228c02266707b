//! Asks a node for the snapshot of a partition, and reads it as it comes.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::{StatusCode, Uri};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::INDEX_HEADER;
use super::routes::Refused;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node may take to take a snapshot, before it sends the first of it.
const TAKE_TIMEOUT: Duration = Duration::from_secs(600);
/// How long it may send nothing.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// No refusal is as long.
const MAX_REFUSAL_BYTES: usize = 64 * 1024;

/// Where snapshots come from: the admin ports of nodes.
#[derive(Clone, Debug)]
pub struct Source {
    client: legacy::Client<HttpConnector, Empty<Bytes>>,
}

/// Why there is no snapshot, or only a part of it.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The node does not lead the partition.
    #[error("{message}")]
    Elsewhere {
        /// The node's words.
        message: String,
    },
    /// The node cannot do it now.
    #[error("{message}")]
    Busy {
        /// The node's words.
        message: String,
    },
    /// It cannot be reached, or fell silent.
    #[error("cannot reach the admin port {address}: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// What it answered is no snapshot.
    #[error("{address} does not hand out snapshots: {reason}")]
    Foreign {
        /// The address.
        address: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

impl FetchError {
    /// Whether the same question may be answered later, or by another node.
    pub fn may_pass(&self) -> bool {
        !matches!(self, FetchError::Foreign { .. })
    }
}

/// A snapshot on its way.
#[derive(Debug)]
pub struct Download {
    address: String,
    body: Incoming,
    index: u64,
    size: u64,
}

impl Default for Source {
    fn default() -> Source {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        Source { client: legacy::Client::builder(TokioExecutor::new()).build(connector) }
    }
}

impl Source {
    /// Has the node with this admin port take a snapshot of a partition, and send it.
    ///
    /// # Errors
    /// It cannot be reached, or refuses.
    pub async fn fetch(&self, address: &str, partition: u16) -> Result<Download, FetchError> {
        let unreachable = |reason| FetchError::Unreachable { address: address.to_owned(), reason };
        let foreign = |reason| FetchError::Foreign { address: address.to_owned(), reason };
        let uri: Uri = format!("http://{address}/cluster/backup/{partition}")
            .parse()
            .map_err(|error: hyper::http::uri::InvalidUri| unreachable(error.to_string()))?;
        let response = match tokio::time::timeout(TAKE_TIMEOUT, self.client.get(uri)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                return Err(unreachable(cause.unwrap_or_else(|| error.to_string())));
            }
            Err(_) => {
                return Err(unreachable(format!("no answer within {} s", TAKE_TIMEOUT.as_secs())));
            }
        };
        let (parts, body) = response.into_parts();
        if parts.status != StatusCode::OK {
            let body = Limited::new(body, MAX_REFUSAL_BYTES).collect().await;
            let bytes = body.map_err(|error| foreign(error.to_string()))?.to_bytes();
            let Ok(Refused { error: message }) = serde_json::from_slice(&bytes) else {
                return Err(foreign(format!("it answers {}", parts.status)));
            };
            return Err(match parts.status {
                StatusCode::MISDIRECTED_REQUEST => FetchError::Elsewhere { message },
                _ => FetchError::Busy { message },
            });
        }
        let index =
            parts.headers.get(INDEX_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        let (Some(index), Some(size)) = (index, body.size_hint().exact()) else {
            return Err(foreign("it does not say which snapshot it sends".to_owned()));
        };
        Ok(Download { address: address.to_owned(), body, index, size })
    }
}

impl Download {
    /// The last entry of the partition's log that is in the snapshot.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes; `None` when all of them have come.
    ///
    /// # Errors
    /// The node broke off, or fell silent.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        let address = &self.address;
        let broken = |reason| FetchError::Unreachable { address: address.clone(), reason };
        loop {
            let frame = tokio::time::timeout(SILENCE_TIMEOUT, self.body.frame()).await;
            let silent = |_| broken(format!("nothing came for {} s", SILENCE_TIMEOUT.as_secs()));
            match frame.map_err(silent)? {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(error.to_string())),
                // Trailers are of no interest.
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }
}
