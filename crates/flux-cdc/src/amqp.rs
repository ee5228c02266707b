//! The connection to the broker: one socket and one channel, for all partitions of a node.
//!
//! Written on the codec of `amq-protocol` instead of a client library: what is needed is a handshake,
//! publishing and confirms, and one write for the messages of many partitions is what makes it cheap.
//! A library's task, queue and promise per message cost several times what is in here.
//!
//! A connection that fails in any way is given up as a whole, and with it the fate of the messages
//! that are out is not known. What this module does not do: connect again, or send anything twice.

mod frames;
mod handshake;
mod incoming;
mod pending;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::protocol::{AMQPClass, connection};
use amq_protocol::types::ShortString;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::message::Publication;
use crate::publisher::stopped;
use crate::trouble::{Trouble, Troubles};
use frames::{write_frame, write_method, write_publish};
use incoming::{FrameError, Incoming, read_frame};
pub(crate) use pending::Outcome;
use pending::{Pending, Waiting};

/// A message that is not confirmed for so long is told.
const SLOW: Duration = Duration::from_secs(5);
/// A message that is not confirmed for so long, without an alarm at the broker, is lost.
const LOST: Duration = Duration::from_secs(30);
/// How long a connection must have nothing to complain about before it counts as good.
const GOOD: Duration = Duration::from_secs(1);
/// How long the broker may take to say good-bye.
const CLOSING: Duration = Duration::from_millis(500);
/// Messages that wait to be written. Each partition has one out at a time.
const QUEUE: usize = 256;
/// No more messages are taken from the queue while so much waits for the socket.
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// What a broker closes a channel with on which a message came that is larger than it takes: as AMQP has it,
/// and RabbitMQ. While messages are published nothing else is answered so.
const CONTENT_TOO_LARGE: u16 = 311;
const PRECONDITION_FAILED: u16 = 406;

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AmqpError {
    #[error("no connection to the broker: {0}")]
    Socket(#[from] io::Error),
    #[error("the broker closed the connection")]
    Ended,
    #[error("the broker is silent for {0:?}")]
    Silent(Duration),
    #[error("the broker does not follow the protocol: {0}")]
    Protocol(String),
    #[error("the broker refuses: {0}")]
    Refused(String),
    #[error("the broker has no such exchange: {0}")]
    NoExchange(String),
    #[error("a message is too large for the broker: {0}")]
    TooLarge(String),
}

impl AmqpError {
    /// The connection's trouble; none where it is one message's, and told by whose that is.
    pub(crate) fn trouble(&self) -> Option<Trouble> {
        match self {
            AmqpError::Refused(_) => Some(Trouble::Refused),
            AmqpError::NoExchange(_) => Some(Trouble::NoExchange),
            AmqpError::Silent(_) => Some(Trouble::Slow),
            AmqpError::Socket(_) | AmqpError::Ended | AmqpError::Protocol(_) => {
                Some(Trouble::Unreachable)
            }
            AmqpError::TooLarge(_) => None,
        }
    }

    fn protocol(what: impl Into<String>) -> AmqpError {
        AmqpError::Protocol(what.into())
    }
}

impl From<FrameError> for AmqpError {
    fn from(error: FrameError) -> AmqpError {
        AmqpError::protocol(error.to_string())
    }
}

/// Where messages go in, from any task.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    queue: mpsc::Sender<Outgoing>,
    exchange: Arc<str>,
    frame_max: u32,
}

#[derive(Debug)]
struct Outgoing {
    id: String,
    frames: Vec<u8>,
    reply: oneshot::Sender<Outcome>,
}

impl Link {
    /// Publishes a message and waits for what becomes of it.
    pub(crate) async fn publish(&self, publication: Publication) -> Outcome {
        let (reply, outcome) = oneshot::channel();
        if self.queue.send(self.outgoing(publication, reply)).await.is_err() {
            return Outcome::Unknown;
        }
        outcome.await.unwrap_or(Outcome::Unknown)
    }

    /// The message as it goes over the wire; in its other form it is not kept.
    fn outgoing(&self, publication: Publication, reply: oneshot::Sender<Outcome>) -> Outgoing {
        let mut frames = Vec::new();
        write_publish(&self.exchange, &publication, self.frame_max, &mut frames);
        Outgoing { id: publication.message_id, frames, reply }
    }
}

/// An open connection, until it fails or is closed.
pub(crate) struct Connection {
    socket: TcpStream,
    frame_max: u32,
    /// How often one of both sides must say something; none: never.
    heartbeat: Option<Duration>,
    input: BytesMut,
    /// What is to be written, from `written` on.
    output: Vec<u8>,
    written: usize,
    last_read: Instant,
    last_write: Instant,
    opened: Instant,
    queue: mpsc::Receiver<Outgoing>,
    pending: Pending,
    /// The reason of a message that is being given back, until its id is here.
    returning: Option<String>,
    /// Why the broker takes nothing, if so.
    blocked: Option<String>,
    /// Confirms are waited for from here on, since none can come while the broker is blocked.
    unblocked: Instant,
    troubles: Arc<Troubles>,
}

impl Connection {
    /// Publishes what comes through the links, until something fails or `closing` says so.
    ///
    /// # Errors
    /// [`AmqpError`], and the fate of the messages that are out is not known.
    pub(crate) async fn run(
        &mut self,
        closing: &mut watch::Receiver<bool>,
    ) -> Result<(), AmqpError> {
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let has_output = self.written < self.output.len();
            let has_room = self.output.len() - self.written < MAX_OUTPUT_BYTES;
            let (mut reader, mut writer) = self.socket.split();
            tokio::select! {
                read = reader.read_buf(&mut self.input) => {
                    if read? == 0 {
                        return Err(AmqpError::Ended);
                    }
                    self.last_read = Instant::now();
                    while let Some(frame) = read_frame(&mut self.input, self.frame_max)? {
                        self.take(frame)?;
                    }
                }
                written = writer.write(&self.output[self.written..]), if has_output => {
                    self.written += written?;
                    self.last_write = Instant::now();
                    if self.written == self.output.len() {
                        self.output.clear();
                        self.written = 0;
                    } else if self.written >= MAX_OUTPUT_BYTES {
                        self.output.drain(..self.written);
                        self.written = 0;
                    }
                }
                Some(outgoing) = self.queue.recv(), if has_room => self.gather(outgoing).await,
                _ = tick.tick() => self.watch_over()?,
                () = stopped(closing) => return Ok(()),
            }
        }
    }

    /// Takes the messages that are there into one write.
    async fn gather(&mut self, first: Outgoing) {
        self.send(first);
        // Confirms come for many partitions at once, and each sends its next message: they get the
        // chance to, before anything is written.
        tokio::task::yield_now().await;
        while self.output.len() - self.written < MAX_OUTPUT_BYTES
            && let Ok(outgoing) = self.queue.try_recv()
        {
            self.send(outgoing);
        }
    }

    fn send(&mut self, outgoing: Outgoing) {
        let Outgoing { id, frames, reply } = outgoing;
        let size = frames.len();
        if self.output.is_empty() {
            self.output = frames;
        } else {
            self.output.extend_from_slice(&frames);
        }
        self.pending.push(Waiting { id, size, since: Instant::now(), reply });
    }

    fn take(&mut self, frame: Incoming) -> Result<(), AmqpError> {
        match frame {
            Incoming::Confirm { tag, multiple, is_stored } => {
                let unknown = || AmqpError::protocol("a confirm of a message that was never sent");
                self.pending.settle(tag, multiple, is_stored).ok_or_else(unknown)?;
                self.is_good();
            }
            Incoming::Return { text, routing_key } => {
                let routing_key = routing_key.escape_debug();
                self.returning = Some(format!("{text}, routing key {routing_key}"));
            }
            Incoming::Header { id } => {
                if let (Some(reason), Some(id)) = (self.returning.take(), id) {
                    self.pending.give_back(&id, reason);
                }
            }
            Incoming::Blocked { reason } => {
                self.blocked = Some(format!("the broker is blocked, {reason}"));
                self.tell_blocked();
            }
            Incoming::Unblocked => {
                self.blocked = None;
                self.unblocked = Instant::now();
                self.troubles.end(Trouble::Blocked, None);
            }
            Incoming::Close { code: CONTENT_TOO_LARGE | PRECONDITION_FAILED, text } => {
                self.pending.refuse_largest(text.clone());
                return Err(AmqpError::TooLarge(text));
            }
            Incoming::Close { code, text } => return Err(closed(code, text)),
            Incoming::Heartbeat | Incoming::Body | Incoming::Other => {}
            Incoming::Start | Incoming::Tune { .. } | Incoming::Done | Incoming::CloseOk => {
                return Err(AmqpError::protocol("a frame that has no place here"));
            }
        }
        Ok(())
    }

    /// What went wrong before this connection is over.
    fn is_good(&self) {
        for trouble in [Trouble::Unreachable, Trouble::Refused, Trouble::NoExchange] {
            self.troubles.end(trouble, None);
        }
        if self.waiting() < SLOW {
            self.troubles.end(Trouble::Slow, None);
        }
    }

    fn tell_blocked(&self) {
        if let Some(what) = &self.blocked {
            self.troubles.begin(Trouble::Blocked, None, what);
        }
    }

    /// How long the oldest message waits for a confirm that could come.
    fn waiting(&self) -> Duration {
        let since = self.pending.oldest().filter(|_| self.blocked.is_none());
        since.map_or(Duration::ZERO, |since| since.max(self.unblocked).elapsed())
    }

    /// Once a second: heartbeats, and messages that wait for too long.
    fn watch_over(&mut self) -> Result<(), AmqpError> {
        if let Some(heartbeat) = self.heartbeat {
            if self.last_read.elapsed() > 2 * heartbeat {
                return Err(AmqpError::Silent(self.last_read.elapsed()));
            }
            if self.last_write.elapsed() > heartbeat / 2 && self.output.is_empty() {
                write_frame(&AMQPFrame::Heartbeat, &mut self.output);
            }
        }
        self.tell_blocked();
        let waiting = self.waiting();
        if waiting >= LOST {
            return Err(AmqpError::Silent(waiting));
        }
        if waiting >= SLOW {
            let what = format!("the broker did not confirm within {SLOW:?}");
            self.troubles.begin(Trouble::Slow, None, &what);
        } else if self.pending.oldest().is_none() && self.opened.elapsed() >= GOOD {
            self.is_good();
        }
        Ok(())
    }

    /// Says good-bye, so that the broker need not complain.
    pub(crate) async fn close(mut self) {
        let close = connection::Close {
            reply_code: 200,
            reply_text: ShortString::from("stopping"),
            class_id: 0,
            method_id: 0,
        };
        let close = AMQPClass::Connection(connection::AMQPMethod::Close(close));
        write_method(0, close, &mut self.output);
        let good_bye = async {
            self.socket.write_all(&self.output[self.written..]).await?;
            loop {
                while let Some(frame) = read_frame(&mut self.input, self.frame_max)? {
                    if frame == Incoming::CloseOk {
                        return Ok::<(), AmqpError>(());
                    }
                }
                if self.socket.read_buf(&mut self.input).await? == 0 {
                    return Ok(());
                }
            }
        };
        // Nothing is lost without an answer.
        let _ = timeout(CLOSING, good_bye).await;
    }
}

/// Why the broker closed the connection or the channel, from its reply code.
fn closed(code: u16, text: String) -> AmqpError {
    const NOT_FOUND: u16 = 404;
    const CONNECTION_FORCED: u16 = 320;
    const INTERNAL_ERROR: u16 = 541;
    match code {
        NOT_FOUND => AmqpError::NoExchange(text),
        CONNECTION_FORCED | INTERNAL_ERROR => AmqpError::Socket(io::Error::other(text)),
        _ => AmqpError::Refused(text),
    }
}
