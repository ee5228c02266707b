//! One place in the pool: a connection to one endpoint, made anew whenever it is lost.
//!
//! While the endpoint cannot be reached, requests are turned away at once rather than kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use flux_proto::native::{
    self, MAX_FRAME_BYTES, Opcode, Preface, Request, RequestHeader, ServerPreface,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::exchange::{self, Lost, Submission};
use crate::{Config, backoff};

/// A request counts once more for each so many bytes.
const BYTES_PER_SHARE: usize = 64 * 1024;

/// The id under which a connection authenticates; requests count up from 1.
const AUTH_ID: u64 = u64::MAX;

/// What a link is doing.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Connecting for the first time, or right after a connection was lost.
    Connecting,
    /// Ready; the most that may follow the length field of a request.
    Up { max_frame_bytes: usize },
    /// The endpoint cannot be reached, for this reason; attempts go on.
    Down(Arc<str>),
}

/// The near end of a link.
#[derive(Debug)]
pub(crate) struct Link {
    queue: mpsc::Sender<Submission>,
    state: watch::Receiver<State>,
    room: Arc<Semaphore>,
    max_in_flight: usize,
}

impl Link {
    /// A link and the task that runs it, which ends after the link is dropped.
    pub(crate) fn new(
        endpoint: String,
        config: Arc<Config>,
    ) -> (Link, impl Future<Output = ()> + Send) {
        let (queue_sender, queue) = mpsc::channel(config.max_in_flight);
        let (state_sender, state) = watch::channel(State::Connecting);
        let room = Arc::new(Semaphore::new(config.max_in_flight));
        let max_in_flight = config.max_in_flight;
        let link = Link { queue: queue_sender, state, room, max_in_flight };
        (link, run(endpoint, config, queue, state_sender))
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Whether the link's task has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// Waits until the link is up or known to be down.
    pub(crate) async fn settled(&self) {
        let mut state = self.state.clone();
        // An error means that the task is gone; sending tells.
        let _ = state.wait_for(|state| !matches!(state, State::Connecting)).await;
    }

    /// Sends a frame and waits for the whole response frame. `None`: the deadline passed after the
    /// frame was sent, or might have been.
    pub(crate) async fn send(
        &self,
        frame: Vec<u8>,
        deadline: Instant,
    ) -> Option<Result<Bytes, Lost>> {
        let not_sent = |text: &str| Some(Err(Lost::NotSent(text.to_owned())));
        let shares = (1 + frame.len() / BYTES_PER_SHARE).min(self.max_in_flight) as u32;
        let room = Arc::clone(&self.room).acquire_many_owned(shares);
        let permit = match timeout_at(deadline, room).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return not_sent("the client is closed"),
            Err(_) => return not_sent("too many requests are under way"),
        };
        let claimed = Arc::new(AtomicBool::new(false));
        let (reply, answer) = oneshot::channel();
        let submission = Submission { frame, claimed: Arc::clone(&claimed), reply, permit };
        // Every submission in the queue holds a permit, so that there is always a place.
        if self.queue.try_send(submission).is_err() {
            return not_sent("the client is closed");
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => Some(answer),
            // Out of time, or the connection's task ended: if it had not yet been sent, it never is.
            Ok(Err(_)) if claimed.swap(true, Ordering::AcqRel) => {
                Some(Err(Lost::Broken("the client is closed".to_owned())))
            }
            Ok(Err(_)) => not_sent("the connection was lost"),
            Err(_) if claimed.swap(true, Ordering::AcqRel) => None,
            Err(_) => not_sent("the connection had no room for the request in time"),
        }
    }
}

async fn run(
    endpoint: String,
    config: Arc<Config>,
    mut queue: mpsc::Receiver<Submission>,
    state: watch::Sender<State>,
) {
    // Attempts in a row that led to no answer from the node.
    let mut failures = 0_u32;
    loop {
        let connected = tokio::select! {
            connected = connect(&endpoint, &config) => connected,
            () = state.closed() => return,
        };
        let was_up = connected.is_ok();
        let reason = match connected {
            Ok(connection) => {
                tracing::debug!(%endpoint, "connected");
                let max_frame_bytes = connection.max_frame_bytes;
                state.send_replace(State::Up { max_frame_bytes });
                let (reader, writer) = connection.stream.into_split();
                let (received, stall) = (connection.received, config.stall_timeout);
                let end = exchange::run(reader, writer, received, &mut queue, stall).await;
                failures = if end.answered { 0 } else { failures.saturating_add(1) };
                match end.reason {
                    Lost::NotSent(text) | Lost::Broken(text) | Lost::Refused(_, text) => text,
                }
            }
            Err(reason) => {
                failures = failures.saturating_add(1);
                reason
            }
        };
        tracing::debug!(%endpoint, %reason, failures, "connection lost");
        // The node took a connection a moment ago: requests may wait for the next one. A node that
        // takes connections and breaks them without an answer gets this only once.
        if was_up && failures <= 1 {
            state.send_replace(State::Connecting);
            continue;
        }
        let reason = format!("{endpoint}: {reason}");
        state.send_replace(State::Down(reason.as_str().into()));
        let limit = backoff::limit(failures, config.reconnect_min, config.reconnect_max);
        // At least half of the limit: attempts must not come in a burst by chance.
        let pause = sleep(limit / 2 + backoff::jittered(limit / 2));
        tokio::select! {
            () = pause => {}
            () = turn_away(&mut queue, &reason) => return,
        }
    }
}

/// Refuses what is in the queue and what comes, until the link is dropped.
async fn turn_away(queue: &mut mpsc::Receiver<Submission>, reason: &str) {
    while let Some(submission) = queue.recv().await {
        if !submission.claimed.swap(true, Ordering::AcqRel) {
            let _ = submission.reply.send(Err(Lost::NotSent(reason.to_owned())));
        }
    }
}

struct Connection {
    stream: TcpStream,
    received: BytesMut,
    max_frame_bytes: usize,
}

async fn connect(endpoint: &str, config: &Config) -> Result<Connection, String> {
    match timeout(config.connect_timeout, handshake(endpoint, config)).await {
        Ok(connected) => connected,
        Err(_) => Err(format!("not connected within {:?}", config.connect_timeout)),
    }
}

async fn handshake(endpoint: &str, config: &Config) -> Result<Connection, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect(endpoint).await.map_err(text)?;
    stream.set_nodelay(true).map_err(text)?;

    let mut hello = Vec::new();
    native::encode_preface(&mut hello, &Preface::default());
    if let Some(credentials) = &config.credentials {
        let password = credentials.password.as_bytes();
        let auth = Request::Auth { user: &credentials.user, password };
        let header = RequestHeader::new(AUTH_ID, Opcode::Auth);
        native::encode_request(&mut hello, &header, &auth).map_err(|error| error.to_string())?;
    }
    stream.write_all(&hello).await.map_err(text)?;

    let mut received = BytesMut::new();
    let max_frame_bytes = loop {
        match native::decode_server_preface(&received).map_err(|error| error.to_string())? {
            Some((ServerPreface::Refused { message, .. }, _)) => return Err(message.to_owned()),
            Some((ServerPreface::Accepted(accepted), taken)) => {
                if accepted.version != native::VERSION {
                    return Err(format!("the node chose protocol version {}", accepted.version));
                }
                let limit = (accepted.max_frame_bytes as usize).min(MAX_FRAME_BYTES);
                let _ = received.split_to(taken);
                break limit;
            }
            None => read_more(&mut stream, &mut received).await?,
        }
    };
    if config.credentials.is_some() {
        authenticated(&mut stream, &mut received).await?;
    }
    Ok(Connection { stream, received, max_frame_bytes })
}

/// Waits for the answer to the authentication that was sent with the preface.
async fn authenticated(stream: &mut TcpStream, received: &mut BytesMut) -> Result<(), String> {
    loop {
        match native::decode_response(received).map_err(|error| error.to_string())? {
            Some((frame, taken)) => {
                let answer = frame.response().map_err(|error| error.to_string())?;
                answer.map_err(|failure| failure.message.to_owned())?;
                let _ = received.split_to(taken);
                return Ok(());
            }
            None => read_more(stream, received).await?,
        }
    }
}

async fn read_more(stream: &mut TcpStream, received: &mut BytesMut) -> Result<(), String> {
    received.reserve(4096);
    match stream.read_buf(received).await {
        Ok(0) => Err("the node closed the connection".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
