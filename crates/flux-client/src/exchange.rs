//! One connection at work: many requests out, answers in, matched by id.
//!
//! A writing and a reading half run side by side in the connection's task until one of them ends.
//! What this module does not do: connect, or decide what is sent again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flux_proto::Code;
use flux_proto::native::{ResponseFrame, decode_response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

/// Frames from here on are written by themselves rather than copied behind others.
const LARGE_FRAME_BYTES: usize = 64 * 1024;

/// How much is gathered for one write.
const WRITE_BUFFER_BYTES: usize = 256 * 1024;

/// How many requests are taken from the queue at once.
const WRITE_BATCH: usize = 128;

/// The least room for a read.
const READ_BYTES: usize = 16 * 1024;

/// Where a request's id stands in its frame.
const ID: std::ops::Range<usize> = 4..12;

/// A request on its way to a connection.
pub(crate) struct Submission {
    /// The whole frame, its id still to be filled in.
    pub(crate) frame: Vec<u8>,
    /// Decides between sending and giving up: who sets it first wins.
    pub(crate) claimed: Arc<AtomicBool>,
    /// Gets the whole response frame.
    pub(crate) reply: oneshot::Sender<Result<Bytes, Lost>>,
    /// The request's share of the connection, held until it is answered.
    pub(crate) permit: OwnedSemaphorePermit,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It did not leave.
    NotSent(String),
    /// It was sent, and then the connection broke.
    Broken(String),
    /// The node ended the connection and said why; it did nothing that it had not answered.
    Refused(Code, String),
}

impl Lost {
    /// For a person to read.
    pub(crate) fn into_reason(self) -> String {
        match self {
            Lost::NotSent(reason) | Lost::Broken(reason) | Lost::Refused(_, reason) => reason,
        }
    }
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) struct End {
    /// Why; shown to those who wait.
    pub(crate) reason: Lost,
    /// Whether it ever answered anything.
    pub(crate) answered: bool,
}

#[derive(Default)]
struct Pending {
    waiting: HashMap<u64, Waiting>,
    answered: bool,
}

struct Waiting {
    reply: oneshot::Sender<Result<Bytes, Lost>>,
    since: Instant,
    _permit: OwnedSemaphorePermit,
}

/// Sends what comes from the queue and answers it until the connection ends; `received` is what was
/// read already. Requests that were sent and not answered learn why.
pub(crate) async fn run(
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
    received: BytesMut,
    queue: &mut mpsc::Receiver<Submission>,
    stall_timeout: Duration,
) -> End {
    let pending = Mutex::new(Pending::default());
    let reason = tokio::select! {
        reason = read(reader, received, &pending, stall_timeout) => reason,
        reason = write(writer, queue, &pending) => reason,
    };
    let pending = pending.into_inner().unwrap_or_else(PoisonError::into_inner);
    for waiting in pending.waiting.into_values() {
        let _ = waiting.reply.send(Err(reason.clone()));
    }
    End { reason, answered: pending.answered }
}

async fn write(
    mut writer: impl AsyncWrite + Unpin,
    queue: &mut mpsc::Receiver<Submission>,
    pending: &Mutex<Pending>,
) -> Lost {
    let mut next_id = 1_u64;
    let mut batch = Vec::with_capacity(WRITE_BATCH);
    let mut buffer = Vec::new();
    while queue.recv_many(&mut batch, WRITE_BATCH).await > 0 {
        for mut submission in batch.drain(..) {
            // Whoever asked has given up: it must not be sent any more.
            if submission.reply.is_closed() || submission.claimed.swap(true, Ordering::AcqRel) {
                continue;
            }
            submission.frame[ID].copy_from_slice(&next_id.to_le_bytes());
            let waiting = Waiting {
                reply: submission.reply,
                since: Instant::now(),
                _permit: submission.permit,
            };
            lock(pending).waiting.insert(next_id, waiting);
            next_id += 1;
            let large = submission.frame.len() >= LARGE_FRAME_BYTES;
            if large || buffer.len() + submission.frame.len() > WRITE_BUFFER_BYTES {
                if let Err(error) = writer.write_all(&buffer).await {
                    return Lost::Broken(error.to_string());
                }
                buffer.clear();
            }
            if !large {
                buffer.extend_from_slice(&submission.frame);
            } else if let Err(error) = writer.write_all(&submission.frame).await {
                return Lost::Broken(error.to_string());
            }
        }
        if let Err(error) = writer.write_all(&buffer).await {
            return Lost::Broken(error.to_string());
        }
        buffer.clear();
    }
    Lost::Broken("the client is closed".to_owned())
}

async fn read(
    mut reader: impl AsyncRead + Unpin,
    mut buffer: BytesMut,
    pending: &Mutex<Pending>,
    stall_timeout: Duration,
) -> Lost {
    loop {
        loop {
            let (id, taken) = match decode_response(&buffer) {
                Ok(Some((frame, _))) if frame.id == 0 => return parting_words(&frame),
                Ok(Some((frame, taken))) => (frame.id, taken),
                Ok(None) => break,
                Err(error) => return Lost::Broken(error.to_string()),
            };
            let frame = buffer.split_to(taken).freeze();
            let waiting = {
                let mut pending = lock(pending);
                pending.answered = true;
                pending.waiting.remove(&id)
            };
            let Some(waiting) = waiting else {
                return Lost::Broken(format!("the node answered request {id}, which nobody sent"));
            };
            let _ = waiting.reply.send(Ok(frame));
        }
        buffer.reserve(missing_bytes(&buffer).max(READ_BYTES));
        match tokio::time::timeout(stall_timeout / 2, reader.read_buf(&mut buffer)).await {
            Ok(Ok(0)) => return Lost::Broken("the node closed the connection".to_owned()),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Lost::Broken(error.to_string()),
            Err(_) if is_stalled(pending, stall_timeout) => {
                return Lost::Broken(format!("no answer within {stall_timeout:?}"));
            }
            Err(_) => {}
        }
    }
}

/// How many bytes the frame at the start of the buffer lacks. `decode_response` has checked that its
/// length is within the limit.
fn missing_bytes(buffer: &[u8]) -> usize {
    let length = buffer.first_chunk::<4>().map_or(0, |&length| u32::from_le_bytes(length));
    (length as usize + 4).saturating_sub(buffer.len())
}

fn is_stalled(pending: &Mutex<Pending>, stall_timeout: Duration) -> bool {
    lock(pending).waiting.values().any(|waiting| waiting.since.elapsed() >= stall_timeout)
}

/// A response with id 0 concerns the connection and is its last. Where its code says that nothing
/// was written, that holds for every request not answered before it.
fn parting_words(frame: &ResponseFrame<'_>) -> Lost {
    match frame.response() {
        Ok(Err(failure)) if !failure.code().outcome_is_unknown() => {
            Lost::Refused(failure.code(), failure.message.to_owned())
        }
        Ok(Err(failure)) => Lost::Broken(failure.message.to_owned()),
        _ => Lost::Broken("the node sent an answer without a request".to_owned()),
    }
}

fn lock(pending: &Mutex<Pending>) -> std::sync::MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
