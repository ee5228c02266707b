//! The node's side, on the admin port: snapshots of what this node leads.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use flux_core::{Command, Error, PartitionId, Reply};
use flux_log::File;
use hyper::body::{Frame, SizeHint};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;

use super::INDEX_HEADER;
use crate::mailbox::{Ask, Message, TakenSnapshot};
use crate::shared::Shared;

/// Snapshots of one node that are taken and sent at one time; one more is refused.
const STREAMS: usize = 4;
/// How long a partition may take to confirm that this node leads it.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that are read from a file at a time.
const PIECE_BYTES: usize = 256 * 1024;

/// The answer to `GET /cluster/backup`: what there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overview {
    /// Who answers.
    pub node: String,
    /// The version of its program.
    pub version: String,
    /// The cluster, in hexadecimal; none for a node alone.
    pub cluster_id: Option<String>,
    /// How many partitions there are.
    pub partitions: u16,
    /// Keys that this node has, of whatever it leads and follows.
    pub keys: u64,
    /// The data ports of the nodes that are there.
    pub data_addrs: Vec<SocketAddr>,
}

/// Why a node hands out no snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refused {
    pub(super) error: String,
}

/// What the routes share.
#[derive(Debug)]
struct Node {
    shared: Arc<Shared>,
    streams: Arc<Semaphore>,
}

/// The routes `/cluster/backup` and `/cluster/backup/<partition>`; a node alone has them, too.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/cluster/backup", get(overview))
        .route("/cluster/backup/{partition}", get(snapshot))
        .with_state(Arc::new(Node { shared, streams: Arc::new(Semaphore::new(STREAMS)) }))
}

async fn overview(State(node): State<Arc<Node>>) -> Json<Overview> {
    let shared = &node.shared;
    let topology = shared.cluster.as_ref().map(|seat| Arc::clone(&seat.topology.read()));
    let data_addrs = match &topology {
        Some(topology) => {
            let alive = topology.members.values().filter(|member| member.alive);
            alive.map(|member| member.registration.data_addr).collect()
        }
        None => vec![shared.data_addr],
    };
    let cluster_id = topology.and_then(|topology| topology.cluster_id);
    Json(Overview {
        node: shared.node_id.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster_id: cluster_id.map(|id| format!("{id:016x}")),
        partitions: shared.partitions.count(),
        keys: shared.keys() as u64,
        data_addrs,
    })
}

async fn snapshot(State(node): State<Arc<Node>>, Path(partition): Path<u16>) -> Response {
    let shared = &node.shared;
    let count = shared.partitions.count();
    if partition >= count {
        let error = format!("there is no partition {partition}: they are 0 to {}", count - 1);
        return refuse(StatusCode::BAD_REQUEST, error);
    }
    let Ok(permit) = Arc::clone(&node.streams).try_acquire_owned() else {
        let error = format!("{STREAMS} snapshots of this node are being read already");
        return refuse(StatusCode::SERVICE_UNAVAILABLE, error);
    };
    match take(shared, PartitionId(partition)).await.and_then(|taken| {
        let size = taken.file.size().map_err(Failure::Disk)?;
        Ok((taken, size))
    }) {
        Ok((taken, size)) => {
            let index = taken.id.index.to_string();
            let body = FileBody::new(taken.file, size, permit);
            ([(INDEX_HEADER, index)], Body::new(body)).into_response()
        }
        Err(Failure::Elsewhere) => {
            let error = format!("{} does not lead partition {partition}", shared.node_id);
            refuse(StatusCode::MISDIRECTED_REQUEST, error)
        }
        Err(Failure::Busy(error)) => refuse(StatusCode::SERVICE_UNAVAILABLE, error),
        Err(Failure::Disk(error)) => {
            let error = format!("cannot read the snapshot of partition {partition}: {error}");
            refuse(StatusCode::INTERNAL_SERVER_ERROR, error)
        }
    }
}

fn refuse(status: StatusCode, error: String) -> Response {
    (status, Json(Refused { error })).into_response()
}

/// Why there is no snapshot.
enum Failure {
    /// This node does not lead the partition.
    Elsewhere,
    /// Not now, for this reason.
    Busy(String),
    /// The disk.
    Disk(io::Error),
}

/// Has the partition's worker take a snapshot, once it is sure that this node leads: what was
/// acknowledged by then is in it.
async fn take(shared: &Shared, partition: PartitionId) -> Result<TakenSnapshot, Failure> {
    let probe = Command::Get { key: b"-".to_vec() };
    let ask = Ask { redirect: true, patience: Some(CONFIRM_TIMEOUT), ..Ask::default() };
    let confirmed = shared.execute(partition, probe, ask);
    match tokio::time::timeout(CONFIRM_TIMEOUT, confirmed).await {
        Ok(Reply::Error(Error::NotLeader)) => return Err(Failure::Elsewhere),
        Ok(Reply::Error(error)) => return Err(Failure::Busy(error.to_string())),
        Ok(_) => {}
        Err(_) => {
            let waited = CONFIRM_TIMEOUT.as_secs();
            let text = format!("partition {partition} has confirmed no leader within {waited} s");
            return Err(Failure::Busy(text));
        }
    }
    let (answer, answered) = oneshot::channel();
    let mailbox = &shared.mailboxes[usize::from(shared.owner(partition))];
    if mailbox.send(Message::Snapshot { partition, answer }).is_err() {
        return Err(Failure::Busy(Error::Overloaded.to_string()));
    }
    // The worker answers when the walk ends, one way or the other; or it ends itself.
    match answered.await {
        Ok(taken) => taken.map_err(Failure::Busy),
        Err(_) => {
            let error = format!("the node is stopping, or has no replica of {partition} any more");
            Err(Failure::Busy(error))
        }
    }
}

/// A file as the body of an answer, read as fast as it is taken.
struct FileBody {
    file: Arc<dyn File>,
    offset: u64,
    size: u64,
    reading: Option<JoinHandle<io::Result<Vec<u8>>>>,
    _permit: OwnedSemaphorePermit,
}

impl FileBody {
    fn new(file: Arc<dyn File>, size: u64, permit: OwnedSemaphorePermit) -> FileBody {
        FileBody { file, offset: 0, size, reading: None, _permit: permit }
    }

    /// Reads the next piece, away from the runtime's own threads.
    fn read(&self) -> JoinHandle<io::Result<Vec<u8>>> {
        let (file, offset) = (Arc::clone(&self.file), self.offset);
        let length = (self.size - offset).min(PIECE_BYTES as u64) as usize;
        tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; length];
            if file.read_at(&mut piece, offset)? < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(piece)
        })
    }
}

impl hyper::body::Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.offset == self.size {
            return Poll::Ready(None);
        }
        let mut reading = self.reading.take().unwrap_or_else(|| self.read());
        let Poll::Ready(read) = Pin::new(&mut reading).poll(context) else {
            self.reading = Some(reading);
            return Poll::Pending;
        };
        let piece = read.unwrap_or_else(|error| Err(io::Error::other(error)));
        if let Ok(piece) = &piece {
            self.offset += piece.len() as u64;
        }
        Poll::Ready(Some(piece.map(|piece| Frame::data(piece.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.size - self.offset)
    }
}
