//! `GET /api/v1/watch`: committed changes as server-sent events, for as long as the client listens.
//!
//! A node is watched for each client, and another one where that is lost: the client hears of it only by
//! a comment. A client that does not keep up holds up its node, which then ends the watch, and is told
//! so. What this module does not do: keep changes for anybody.

mod frame;
mod nodes;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::Extension;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use flux_client::Code;
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1 as wire;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Duration, Instant, sleep, timeout};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use crate::error::ApiError;
use crate::input::{WatchInput, watch_of_query};
use crate::memory::Memory;
use crate::options::Options;
use nodes::Nodes;

/// What a browser sends when it comes again.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How often a node says that it is there; a client hears of it as often.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A node that has been silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(40);
/// Where no node can be watched for so long, the client is to come again.
const LOST: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// The watches of all clients.
#[derive(Clone)]
pub(crate) struct Watches {
    nodes: Arc<Nodes>,
    places: Arc<Semaphore>,
    memory: Memory,
}

/// Told when the gateway stops, which ends all watches at once.
#[derive(Clone)]
pub(crate) struct Draining(pub(crate) watch::Receiver<()>);

impl Watches {
    pub(crate) fn new(options: &Options, memory: Memory) -> Watches {
        let places = options.max_watches.min(Semaphore::MAX_PERMITS);
        let nodes = Arc::new(Nodes::new(&options.grpc_endpoints));
        Watches { nodes, places: Arc::new(Semaphore::new(places)), memory }
    }
}

/// `GET /api/v1/watch`
pub(crate) async fn watch(
    State(watches): State<Watches>,
    draining: Option<Extension<Draining>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let input = watch_of_query(query.as_deref())?;
    let request = request(input, &headers)?;
    let draining = draining.map(|Extension(Draining(draining))| draining);
    match open(&watches, request, draining).await {
        Ok(source) => {
            Ok(events(Body::from_stream(Frames { next: Some(Box::pin(advance(source))) })))
        }
        // A browser that comes again takes any other status for a reason never to come again.
        Err(error) if headers.contains_key(LAST_EVENT_ID) && error.may_pass() => {
            Ok(events(frame::come_again(error.message()).into()))
        }
        Err(error) => Err(error),
    }
}

fn events(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        // Asks nginx, and whoever does as it does, to pass on what comes when it comes.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

async fn open(
    watches: &Watches,
    request: wire::WatchRequest,
    draining: Option<watch::Receiver<()>>,
) -> Result<Source, ApiError> {
    let full = |_| ApiError::overloaded("the limit of watches is reached; try again later");
    let place = Arc::clone(&watches.places).try_acquire_owned().map_err(full)?;
    let (node, stream) = begin(&watches.nodes, watches.nodes.pick(), &request).await?;
    Ok(Source {
        nodes: Arc::clone(&watches.nodes),
        node,
        request,
        stream: Some(stream),
        has_started: false,
        is_over: false,
        memory: watches.memory.clone(),
        draining,
        _place: place,
    })
}

/// What is asked of a node. A client that comes again goes on where it was, whatever its query says.
fn request(input: WatchInput, headers: &HeaderMap) -> Result<wire::WatchRequest, ApiError> {
    use wire::watch_request::{From, Keys};
    let last = match headers.get(LAST_EVENT_ID).map(HeaderValue::as_bytes) {
        None | Some([]) => None,
        Some(last) => Some(token_of(last, "Last-Event-ID")?),
    };
    let asked = input.token.map(|token| token_of(token.as_bytes(), "token")).transpose()?;
    let from = match last.or(asked) {
        Some(token) => Some(From::Token(token)),
        None => input.snapshot.then_some(From::Snapshot(true)),
    };
    let keys = match input.key {
        Some(key) => Keys::Key(key.into()),
        None => Keys::Prefix(input.prefix.unwrap_or_default().into()),
    };
    Ok(wire::WatchRequest {
        keys: Some(keys),
        from,
        partitions: Vec::new(),
        here_only: false,
        own_log_only: false,
        keep_alive_ms: KEEP_ALIVE.as_millis() as u32,
    })
}

fn token_of(text: &[u8], field: &str) -> Result<Bytes, ApiError> {
    let wrong = |_| ApiError::invalid(format!("`{field}` is no token that a watch gave"));
    URL_SAFE_NO_PAD.decode(text).map(Bytes::from).map_err(wrong)
}

/// Watches the first node that lets itself be watched.
async fn begin(
    nodes: &Nodes,
    first: usize,
    request: &wire::WatchRequest,
) -> Result<(usize, Streaming<wire::WatchResponse>), ApiError> {
    let mut refused = None;
    for node in first..first + nodes.count() {
        match nodes.watch(node, request.clone()).await {
            Ok(stream) => return Ok((node, stream)),
            Err(status) => {
                let code = code_of(&status);
                if code == Some(Code::InvalidArgument) {
                    return Err(ApiError::invalid(status.message()));
                }
                tracing::debug!(%status, "a node cannot be watched");
                refused = refused.or(code.map(|code| ApiError::new(code, status.message())));
            }
        }
    }
    Err(refused.unwrap_or_else(|| ApiError::new(Code::Unavailable, "no node can be reached")))
}

/// The code that a node gives with a failure; none where the failure is not the node's own.
fn code_of(status: &Status) -> Option<Code> {
    Code::from_name(status.metadata().get(CODE_TRAILER)?.to_str().ok()?)
}

/// Where the events of one client come from.
struct Source {
    nodes: Arc<Nodes>,
    /// The number of the node, counted on without end.
    node: usize,
    /// What is asked of the next node: it goes on behind what the client was sent.
    request: wire::WatchRequest,
    stream: Option<Streaming<wire::WatchResponse>>,
    has_started: bool,
    is_over: bool,
    memory: Memory,
    draining: Option<watch::Receiver<()>>,
    _place: OwnedSemaphorePermit,
}

impl Source {
    /// What the client is sent next; none at the end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.is_over {
            let Some(stream) = &mut self.stream else {
                self.is_over = !self.come_again().await;
                continue;
            };
            let message = tokio::select! {
                message = timeout(SILENCE, stream.message()) => message,
                () = drained(&mut self.draining) => return None,
            };
            match message {
                Ok(Ok(Some(response))) => {
                    if let Some(frame) = self.frame(response) {
                        return Some(frame);
                    }
                }
                Ok(Err(status)) if code_of(&status) == Some(Code::WatchTooSlow) => {
                    self.is_over = true;
                    return Some(frame::too_slow(status.message()));
                }
                Ok(Ok(None)) | Ok(Err(_)) | Err(_) => self.stream = None,
            }
        }
        None
    }

    /// Watches another node, or the same again; false if none can be watched for long.
    async fn come_again(&mut self) -> bool {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        while begun.elapsed() < LOST {
            self.node += 1;
            let watching = self.nodes.watch(self.node, self.request.clone());
            let watched = tokio::select! {
                watched = watching => watched,
                () = drained(&mut self.draining) => return false,
            };
            match watched {
                Ok(stream) => {
                    self.stream = Some(stream);
                    return true;
                }
                Err(status) if code_of(&status) == Some(Code::InvalidArgument) => return false,
                Err(status) => tracing::debug!(%status, "a node cannot be watched"),
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = drained(&mut self.draining) => return false,
            }
            pause = (pause * 2).min(MAX_PAUSE);
        }
        false
    }

    /// A message as the client is sent it; none if it means nothing to the client.
    fn frame(&mut self, response: wire::WatchResponse) -> Option<Bytes> {
        let wire::WatchResponse { kind, token } = response;
        let is_again = std::mem::replace(&mut self.has_started, true);
        let frame = frame::of(kind?, &URL_SAFE_NO_PAD.encode(&token), is_again)?;
        match self.memory.hold_large(frame) {
            Ok(frame) => {
                self.request.from = Some(wire::watch_request::From::Token(token));
                Some(frame)
            }
            // The client is to come again, for this one too.
            Err(error) => {
                self.is_over = true;
                Some(frame::come_again(error.message()))
            }
        }
    }
}

async fn drained(draining: &mut Option<watch::Receiver<()>>) {
    match draining {
        // Its sender is only ever dropped.
        Some(draining) => drop(draining.changed().await),
        None => std::future::pending().await,
    }
}

/// What comes next, with its source.
type Next = Pin<Box<dyn Future<Output = Option<(Source, Bytes)>> + Send>>;

async fn advance(mut source: Source) -> Option<(Source, Bytes)> {
    let frame = source.next().await?;
    Some((source, frame))
}

/// The body of an answer.
struct Frames {
    next: Option<Next>,
}

impl Stream for Frames {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(next) = &mut self.next else { return Poll::Ready(None) };
        let advanced = ready!(next.as_mut().poll(context));
        self.next = None;
        let frame = advanced.map(|(source, frame)| {
            self.next = Some(Box::pin(advance(source)));
            Ok(frame)
        });
        Poll::Ready(frame)
    }
}
