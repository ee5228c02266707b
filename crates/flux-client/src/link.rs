//! One connection to one address, made anew whenever it is lost.
//!
//! While the address cannot be reached, requests are turned away at once rather than kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use flux_proto::native::{
    self, MAX_FRAME_BYTES, Opcode, Preface, Request, RequestHeader, ServerPreface, feature,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::dial::{Dial, ReadHalf, WriteHalf};
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
    /// Ready.
    Up(Terms),
    /// The address cannot be reached, for this reason and since then; attempts go on.
    Down { reason: Arc<str>, since: Instant },
}

/// What the node said when it took the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// The most that may follow the length field of a request.
    pub(crate) max_frame_bytes: usize,
    /// The protocol's features that it granted.
    pub(crate) features: u16,
}

/// The near end of a link.
#[derive(Debug)]
pub(crate) struct Link {
    queue: mpsc::Sender<Submission>,
    state: watch::Receiver<State>,
    room: Arc<Semaphore>,
    max_in_flight: usize,
    wanted: Arc<Notify>,
}

impl Link {
    /// A link and the task that runs it, which ends after the link is dropped.
    pub(crate) fn new(
        addr: String,
        config: Arc<Config>,
        dial: Arc<dyn Dial>,
    ) -> (Link, impl Future<Output = ()> + Send) {
        let (queue_sender, queue) = mpsc::channel(config.max_in_flight);
        let (state_sender, state) = watch::channel(State::Connecting);
        let room = Arc::new(Semaphore::new(config.max_in_flight));
        let max_in_flight = config.max_in_flight;
        let wanted = Arc::new(Notify::new());
        let task = run(addr, config, dial, queue, state_sender, Arc::clone(&wanted));
        (Link { queue: queue_sender, state, room, max_in_flight, wanted }, task)
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Whether the link's task has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// Says that somebody waits for this link: the next attempt to connect comes as soon as the
    /// shortest pause is over.
    pub(crate) fn want(&self) {
        self.wanted.notify_one();
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
    addr: String,
    config: Arc<Config>,
    dial: Arc<dyn Dial>,
    mut queue: mpsc::Receiver<Submission>,
    state: watch::Sender<State>,
    wanted: Arc<Notify>,
) {
    // Attempts in a row that led to no answer from the node.
    let mut failures = 0_u32;
    let mut down_since = None;
    loop {
        let connected = tokio::select! {
            connected = connect(&addr, &config, &*dial) => connected,
            () = state.closed() => return,
        };
        let was_up = connected.is_ok();
        let reason = match connected {
            Ok(connection) => {
                tracing::debug!(%addr, "connected");
                down_since = None;
                state.send_replace(State::Up(connection.terms));
                let Connection { reader, writer, received, .. } = connection;
                let stall = config.stall_timeout;
                let end = exchange::run(reader, writer, received, &mut queue, stall).await;
                failures = if end.answered { 0 } else { failures.saturating_add(1) };
                end.reason.into_reason()
            }
            Err(reason) => {
                failures = failures.saturating_add(1);
                reason
            }
        };
        tracing::debug!(%addr, %reason, failures, "connection lost");
        // The node took a connection a moment ago: requests may wait for the next one. A node that
        // takes connections and breaks them without an answer gets this only once.
        if was_up && failures <= 1 {
            state.send_replace(State::Connecting);
            continue;
        }
        let reason = format!("{addr}: {reason}");
        let since = *down_since.get_or_insert_with(Instant::now);
        state.send_replace(State::Down { reason: reason.as_str().into(), since });
        let limit = backoff::limit(failures, config.reconnect_min, config.reconnect_max);
        // At least half of the limit: attempts must not come in a burst by chance.
        let pause = sleep(limit / 2 + backoff::jittered(limit / 2));
        let cut_short = async {
            sleep(config.reconnect_min).await;
            wanted.notified().await;
        };
        tokio::select! {
            () = pause => {}
            () = cut_short => {}
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
    reader: ReadHalf,
    writer: WriteHalf,
    received: BytesMut,
    terms: Terms,
}

async fn connect(addr: &str, config: &Config, dial: &dyn Dial) -> Result<Connection, String> {
    match timeout(config.connect_timeout, handshake(addr, config, dial)).await {
        Ok(connected) => connected,
        Err(_) => Err(format!("not connected within {:?}", config.connect_timeout)),
    }
}

async fn handshake(addr: &str, config: &Config, dial: &dyn Dial) -> Result<Connection, String> {
    let text = |error: std::io::Error| error.to_string();
    let (mut reader, mut writer) = dial.dial(addr).await.map_err(text)?;

    let mut hello = Vec::new();
    native::encode_preface(&mut hello, &Preface { flags: feature::ALL, ..Preface::default() });
    if let Some(credentials) = &config.credentials {
        let password = credentials.password.as_bytes();
        let auth = Request::Auth { user: &credentials.user, password };
        let header = RequestHeader::new(AUTH_ID, Opcode::Auth);
        native::encode_request(&mut hello, &header, &auth).map_err(|error| error.to_string())?;
    }
    writer.write_all(&hello).await.map_err(text)?;

    let mut received = BytesMut::new();
    let terms = loop {
        match native::decode_server_preface(&received).map_err(|error| error.to_string())? {
            Some((ServerPreface::Refused { message, .. }, _)) => return Err(message.to_owned()),
            Some((ServerPreface::Accepted(accepted), taken)) => {
                if accepted.version != native::VERSION {
                    return Err(format!("the node chose protocol version {}", accepted.version));
                }
                let max_frame_bytes = (accepted.max_frame_bytes as usize).min(MAX_FRAME_BYTES);
                let terms = Terms { max_frame_bytes, features: accepted.flags & feature::ALL };
                let _ = received.split_to(taken);
                break terms;
            }
            None => read_more(&mut reader, &mut received).await?,
        }
    };
    if config.credentials.is_some() {
        authenticated(&mut reader, &mut received).await?;
    }
    Ok(Connection { reader, writer, received, terms })
}

/// Waits for the answer to the authentication that was sent with the preface.
async fn authenticated(reader: &mut ReadHalf, received: &mut BytesMut) -> Result<(), String> {
    loop {
        match native::decode_response(received).map_err(|error| error.to_string())? {
            Some((frame, taken)) => {
                let answer = frame.response().map_err(|error| error.to_string())?;
                answer.map_err(|failure| failure.message.to_owned())?;
                let _ = received.split_to(taken);
                return Ok(());
            }
            None => read_more(reader, received).await?,
        }
    }
}

async fn read_more(reader: &mut ReadHalf, received: &mut BytesMut) -> Result<(), String> {
    received.reserve(4096);
    match reader.read_buf(received).await {
        Ok(0) => Err("the node closed the connection".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
