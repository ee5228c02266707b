//! Frames: where one ends, what kind it is, and its fields.

use std::fmt;

use bytes::BufMut;

use super::{LENGTH_BYTES, MAX_FRAME_BYTES};
use crate::native::{BodyError, Reader, put_bytes};
use crate::trace::TRACE_BYTES;

/// The longest text, in bytes.
const TEXT_LIMIT: usize = 512;

/// A partition and its term in a frame that says what is led.
const LED_BYTES: usize = 10;

/// Bit of a request's flags: any replica may answer the read from what it has applied.
const STALE: u8 = 1;
/// Bit of a request's flags: the three numbers of `once` are there.
const ONCE: u8 = 2;
/// Bit of a request's flags: a trace context is there. From version [`TRACES_SINCE`](super::TRACES_SINCE) on.
const TRACE: u8 = 4;

/// The kinds of frames, as numbered on the wire.
mod kind {
    pub(super) const WELCOME: u8 = 1;
    pub(super) const REFUSED: u8 = 2;
    pub(super) const RAFT: u8 = 16;
    pub(super) const BEAT: u8 = 17;
    pub(super) const BEAT_REPLY: u8 = 18;
    pub(super) const SLEEP: u8 = 19;
    pub(super) const ASLEEP: u8 = 20;
    pub(super) const WAKE: u8 = 21;
    pub(super) const GONE: u8 = 22;
    pub(super) const LEADS: u8 = 23;
    pub(super) const REQUEST: u8 = 32;
    pub(super) const RESPONSE: u8 = 33;
    pub(super) const OFFER: u8 = 48;
    pub(super) const ACCEPT: u8 = 49;
    pub(super) const CHUNK: u8 = 50;
    pub(super) const DONE: u8 = 51;
    pub(super) const FAILED: u8 = 52;
}

/// Three numbers by which a repeated write is known, so that it takes effect once. What each of them
/// stands for is the caller's.
pub type Once = (u64, u64, u64);

/// What one node says to another after the hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The acceptor takes the connection.
    Welcome {
        /// The version that both sides speak from here on.
        version: u16,
        /// The acceptor's process, as in its own hellos.
        instance: u64,
    },
    /// The acceptor does not take the connection, and closes it.
    Refused {
        /// The number of a [`Refusal`].
        reason: u8,
        /// What is wrong, for a person to read.
        text: &'a str,
    },
    /// A message of Raft.
    Raft {
        /// The group it is for.
        partition: u16,
        /// The message, in raft-rs's encoding.
        bytes: &'a [u8],
    },
    /// Asks for a [`Frame::BeatReply`].
    Beat {
        /// The sender's monotonic clock, in microseconds from a start of its choice.
        sent_us: u64,
    },
    /// Answers a [`Frame::Beat`].
    BeatReply {
        /// As the beat had it.
        sent_us: u64,
    },
    /// The leader of an idle group proposes to stop its heartbeats.
    Sleep {
        /// The group.
        partition: u16,
        /// The leader's term.
        term: u64,
        /// Its last entry, which is committed.
        index: u64,
    },
    /// The follower has nothing else than the leader, and sleeps.
    Asleep {
        /// The group.
        partition: u16,
        /// As in the proposal.
        term: u64,
    },
    /// The group has something to do again.
    Wake {
        /// The group.
        partition: u16,
        /// The sender's term.
        term: u64,
    },
    /// The group has gone on without a replica that asks for votes: its node should remove it.
    Gone {
        /// The group.
        partition: u16,
        /// The replica.
        replica: u64,
    },
    /// What a worker of the sender leads now. Of its partitions it leads no others.
    Leads {
        /// The worker. Its partitions are those whose number, modulo `workers`, is this.
        worker: u16,
        /// How many workers the sender has; at least 1.
        workers: u16,
        /// The partitions that it leads, each with its term.
        led: Led<'a>,
    },
    /// A command that another node should carry out.
    Request(Request<'a>),
    /// Answers a request.
    Response {
        /// That of the request.
        id: u64,
        /// The reply, in an encoding of the caller's.
        payload: &'a [u8],
    },
    /// Bulk: the sender has a snapshot for a replica.
    Offer(SnapshotOffer<'a>),
    /// Bulk: the receiver wants the snapshot.
    Accept {
        /// The first chunk that it does not have yet, from 0.
        from_chunk: u64,
        /// CRC32C of the checksums of those before it, each as four bytes: 0 where there are none.
        crc: u32,
    },
    /// Bulk: a piece of the snapshot.
    Chunk {
        /// Its number, from 0 without holes.
        number: u64,
        /// CRC32C of the bytes.
        crc: u32,
        /// Whole entries of the table.
        bytes: &'a [u8],
    },
    /// Bulk: from the sender, that was the last chunk; from the receiver, the replica has it.
    Done {
        /// The number of chunks.
        chunks: u64,
    },
    /// Bulk: the side that sends it gives up, and closes the connection.
    Failed {
        /// The number of a [`Failure`].
        reason: u8,
        /// What is wrong, for a person to read.
        text: &'a str,
    },
}

/// Partitions with the terms in which they are led, as they are on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Led<'a>(&'a [u8]);

impl<'a> Led<'a> {
    /// Partitions and terms of such bytes; `None` if they end within one.
    pub fn new(bytes: &'a [u8]) -> Option<Led<'a>> {
        bytes.len().is_multiple_of(LED_BYTES).then_some(Led(bytes))
    }

    /// Appends a partition and its term to bytes that a `Led` is to be made of.
    pub fn put(out: &mut Vec<u8>, partition: u16, term: u64) {
        out.put_u16_le(partition);
        out.put_u64_le(term);
    }

    /// The partitions with their terms, as the sender put them.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u64)> + 'a {
        self.0.as_chunks::<LED_BYTES>().0.iter().map(|&[low, high, term @ ..]| {
            (u16::from_le_bytes([low, high]), u64::from_le_bytes(term))
        })
    }
}

/// A command that another node should carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The sender's choice, repeated in the response.
    pub id: u64,
    /// The partition that it concerns.
    pub partition: u16,
    /// How long the sender waits, from when the frame is read; 0 for no limit.
    pub deadline_ms: u32,
    /// Whether any replica may answer from what it has applied.
    pub stale: bool,
    /// By what a repeated write is known.
    pub once: Option<Once>,
    /// Which request of a distributed trace it is, in the form of
    /// [`TraceContext::to_bytes`](crate::trace::TraceContext::to_bytes). Only where both sides speak
    /// version [`TRACES_SINCE`](super::TRACES_SINCE).
    pub trace: Option<&'a [u8; TRACE_BYTES]>,
    /// The command, in an encoding of the caller's.
    pub payload: &'a [u8],
}

/// What a snapshot is, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotOffer<'a> {
    /// The partition.
    pub partition: u16,
    /// The sender's replica.
    pub replica_from: u64,
    /// The replica that is to be given the snapshot.
    pub replica_to: u64,
    /// The term in which it sends it.
    pub term: u64,
    /// The index of the last entry that the snapshot contains.
    pub index: u64,
    /// About how many bytes will follow: the length of the sender's file.
    pub size: u64,
    /// What was stored with the snapshot.
    pub meta: &'a [u8],
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No version in common.
    Version = 1,
    /// The nodes are of different clusters.
    Cluster = 2,
    /// The node that answers is not the one that was wanted: its address has another node now.
    OtherNode = 3,
    /// Both nodes have the same id.
    SameNode = 4,
    /// The hello has a field that the acceptor does not understand.
    Malformed = 5,
    /// There are too many connections.
    Busy = 6,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Version => "as there is no version of the protocol in common",
            Refusal::Cluster => "as the nodes are of different clusters",
            Refusal::OtherNode => "as another node has the address now",
            Refusal::SameNode => "as both nodes have the same id",
            Refusal::Malformed => "as it does not understand the hello",
            Refusal::Busy => "as it has too many connections",
        })
    }
}

impl Refusal {
    /// The reason of that number, unless a later version has added it.
    pub fn from_number(number: u8) -> Option<Refusal> {
        Some(match number {
            1 => Refusal::Version,
            2 => Refusal::Cluster,
            3 => Refusal::OtherNode,
            4 => Refusal::SameNode,
            5 => Refusal::Malformed,
            6 => Refusal::Busy,
            _ => return None,
        })
    }
}

/// Why a transfer of a snapshot ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The receiver has no use for it. Offering it again is of no use either.
    Unwanted = 1,
    /// The receiver has too many of them under way, or its replica takes too long: offer it later.
    Busy = 2,
    /// What arrived is not what was sent, or not a snapshot.
    Damaged = 3,
    /// The disk of the side that says so does not do its part.
    Disk = 4,
    /// The node is stopping.
    Stopping = 5,
}

impl Failure {
    /// The reason of that number, unless a later version has added it.
    pub fn from_number(number: u8) -> Option<Failure> {
        Some(match number {
            1 => Failure::Unwanted,
            2 => Failure::Busy,
            3 => Failure::Damaged,
            4 => Failure::Disk,
            5 => Failure::Stopping,
            _ => return None,
        })
    }
}

/// Why bytes are not a frame. The connection must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame without a kind.
    #[error("a frame without a byte")]
    Empty,
    /// The length is over the limit.
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLarge(usize),
    /// No frame of this protocol version has this kind.
    #[error("frame kind {0} is not known")]
    UnknownKind(u8),
    /// A field is missing or not valid.
    #[error("a frame of kind {kind} is malformed")]
    Malformed {
        /// The kind.
        kind: u8,
        /// What is wrong with it.
        #[source]
        source: BodyError,
    },
}

/// What was to be sent does not fit in a frame. Nothing was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is over the limit of {MAX_FRAME_BYTES}")]
pub struct FrameTooLarge(pub usize);

/// Reads a frame and the count of bytes that it took; `None` where more bytes are needed. Only the
/// length is looked at until the whole frame is there.
pub fn decode(input: &[u8]) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some((&length, rest)) = input.split_first_chunk::<LENGTH_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge(length));
    }
    if length == 0 {
        return Err(FrameError::Empty);
    }
    let Some((&kind, body)) = rest.get(..length).and_then(<[u8]>::split_first) else {
        return Ok(None);
    };
    match decode_body(kind, Reader::new(body)) {
        Ok(Some(frame)) => Ok(Some((frame, LENGTH_BYTES + length))),
        Ok(None) => Err(FrameError::UnknownKind(kind)),
        Err(source) => Err(FrameError::Malformed { kind, source }),
    }
}

fn decode_body(kind: u8, mut reader: Reader<'_>) -> Result<Option<Frame<'_>>, BodyError> {
    let frame = match kind {
        kind::WELCOME => {
            Frame::Welcome { version: reader.u16("version")?, instance: reader.u64("instance")? }
        }
        kind::REFUSED => Frame::Refused { reason: reader.u8("reason")?, text: text(&mut reader)? },
        kind::RAFT => {
            Frame::Raft { partition: reader.u16("partition")?, bytes: reader.remainder() }
        }
        kind::BEAT => Frame::Beat { sent_us: reader.u64("sent_us")? },
        kind::BEAT_REPLY => Frame::BeatReply { sent_us: reader.u64("sent_us")? },
        kind::SLEEP => {
            let (partition, term) = (reader.u16("partition")?, reader.u64("term")?);
            Frame::Sleep { partition, term, index: reader.u64("index")? }
        }
        kind::ASLEEP => {
            Frame::Asleep { partition: reader.u16("partition")?, term: reader.u64("term")? }
        }
        kind::WAKE => {
            Frame::Wake { partition: reader.u16("partition")?, term: reader.u64("term")? }
        }
        kind::GONE => {
            Frame::Gone { partition: reader.u16("partition")?, replica: reader.u64("replica")? }
        }
        kind::LEADS => decode_leads(&mut reader)?,
        kind::REQUEST => Frame::Request(decode_request(&mut reader)?),
        kind::RESPONSE => Frame::Response { id: reader.u64("id")?, payload: reader.remainder() },
        kind::OFFER => Frame::Offer(SnapshotOffer {
            partition: reader.u16("partition")?,
            replica_from: reader.u64("replica_from")?,
            replica_to: reader.u64("replica_to")?,
            term: reader.u64("term")?,
            index: reader.u64("index")?,
            size: reader.u64("size")?,
            meta: reader.bytes("meta")?,
        }),
        kind::ACCEPT => {
            Frame::Accept { from_chunk: reader.u64("from_chunk")?, crc: reader.u32("crc")? }
        }
        kind::CHUNK => {
            let (number, crc) = (reader.u64("number")?, reader.u32("crc")?);
            Frame::Chunk { number, crc, bytes: reader.remainder() }
        }
        kind::DONE => Frame::Done { chunks: reader.u64("chunks")? },
        kind::FAILED => Frame::Failed { reason: reader.u8("reason")?, text: text(&mut reader)? },
        _ => return Ok(None),
    };
    reader.finish()?;
    Ok(Some(frame))
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<&'a str, BodyError> {
    let text = reader.text("text")?;
    let (count, limit) = (text.len(), TEXT_LIMIT);
    if count > limit {
        return Err(BodyError::TooMany { field: "text", count, limit });
    }
    Ok(text)
}

fn decode_leads<'a>(reader: &mut Reader<'a>) -> Result<Frame<'a>, BodyError> {
    let (worker, workers) = (reader.u16("worker")?, reader.u16("workers")?);
    if worker >= workers {
        return Err(BodyError::Invalid { field: "worker", value: worker.into() });
    }
    let led = Led::new(reader.remainder()).ok_or(BodyError::Truncated { field: "led" })?;
    Ok(Frame::Leads { worker, workers, led })
}

fn decode_request<'a>(reader: &mut Reader<'a>) -> Result<Request<'a>, BodyError> {
    let (id, partition) = (reader.u64("id")?, reader.u16("partition")?);
    let deadline_ms = reader.u32("deadline_ms")?;
    let flags = reader.bits("flags", STALE | ONCE | TRACE)?;
    let once = match flags & ONCE {
        0 => None,
        _ => Some((reader.u64("once")?, reader.u64("once")?, reader.u64("once")?)),
    };
    let trace = match flags & TRACE {
        0 => None,
        _ => Some(reader.array("trace")?),
    };
    let (stale, payload) = (flags & STALE != 0, reader.remainder());
    Ok(Request { id, partition, deadline_ms, stale, once, trace, payload })
}

/// Appends a frame. A text over 512 bytes is cut.
///
/// # Errors
///
/// If the frame is over the limit; nothing was appended then.
pub fn encode(out: &mut Vec<u8>, frame: &Frame<'_>) -> Result<(), FrameTooLarge> {
    encode_with(out, frame, |_| {})
}

/// Appends a frame and lets `payload` append to its last field, so that what is large is written
/// where it is sent from. The frame must be of a kind that ends with bytes of any length: `Raft`,
/// `Request`, `Response` or `Chunk`, with none or the first of those bytes in it.
///
/// # Errors
///
/// If the frame is over the limit; nothing was appended then.
pub fn encode_with(
    out: &mut Vec<u8>,
    frame: &Frame<'_>,
    payload: impl FnOnce(&mut Vec<u8>),
) -> Result<(), FrameTooLarge> {
    let start = out.len();
    out.put_u32_le(0);
    put_body(out, frame);
    payload(out);
    let length = out.len() - start - LENGTH_BYTES;
    if length > MAX_FRAME_BYTES {
        out.truncate(start);
        return Err(FrameTooLarge(length));
    }
    out[start..start + LENGTH_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(())
}

fn put_body(out: &mut Vec<u8>, frame: &Frame<'_>) {
    out.put_u8(kind_of(frame));
    match *frame {
        Frame::Welcome { version, instance } => {
            out.put_u16_le(version);
            out.put_u64_le(instance);
        }
        Frame::Refused { reason, text } | Frame::Failed { reason, text } => {
            out.put_u8(reason);
            put_bytes(out, &text.as_bytes()[..text.floor_char_boundary(TEXT_LIMIT)]);
        }
        Frame::Raft { partition, bytes } => {
            out.put_u16_le(partition);
            out.extend_from_slice(bytes);
        }
        Frame::Beat { sent_us } | Frame::BeatReply { sent_us } => out.put_u64_le(sent_us),
        Frame::Sleep { partition, term, index } => {
            out.put_u16_le(partition);
            out.put_u64_le(term);
            out.put_u64_le(index);
        }
        Frame::Asleep { partition, term }
        | Frame::Wake { partition, term }
        | Frame::Gone { partition, replica: term } => {
            out.put_u16_le(partition);
            out.put_u64_le(term);
        }
        Frame::Leads { worker, workers, led } => {
            out.put_u16_le(worker);
            out.put_u16_le(workers);
            out.extend_from_slice(led.0);
        }
        Frame::Request(request) => put_request(out, &request),
        Frame::Response { id, payload } => {
            out.put_u64_le(id);
            out.extend_from_slice(payload);
        }
        Frame::Offer(offer) => {
            out.put_u16_le(offer.partition);
            out.put_u64_le(offer.replica_from);
            out.put_u64_le(offer.replica_to);
            out.put_u64_le(offer.term);
            out.put_u64_le(offer.index);
            out.put_u64_le(offer.size);
            put_bytes(out, offer.meta);
        }
        Frame::Accept { from_chunk, crc } => {
            out.put_u64_le(from_chunk);
            out.put_u32_le(crc);
        }
        Frame::Chunk { number, crc, bytes } => {
            out.put_u64_le(number);
            out.put_u32_le(crc);
            out.extend_from_slice(bytes);
        }
        Frame::Done { chunks } => out.put_u64_le(chunks),
    }
}

fn kind_of(frame: &Frame<'_>) -> u8 {
    match frame {
        Frame::Welcome { .. } => kind::WELCOME,
        Frame::Refused { .. } => kind::REFUSED,
        Frame::Raft { .. } => kind::RAFT,
        Frame::Beat { .. } => kind::BEAT,
        Frame::BeatReply { .. } => kind::BEAT_REPLY,
        Frame::Sleep { .. } => kind::SLEEP,
        Frame::Asleep { .. } => kind::ASLEEP,
        Frame::Wake { .. } => kind::WAKE,
        Frame::Gone { .. } => kind::GONE,
        Frame::Leads { .. } => kind::LEADS,
        Frame::Request(_) => kind::REQUEST,
        Frame::Response { .. } => kind::RESPONSE,
        Frame::Offer(_) => kind::OFFER,
        Frame::Accept { .. } => kind::ACCEPT,
        Frame::Chunk { .. } => kind::CHUNK,
        Frame::Done { .. } => kind::DONE,
        Frame::Failed { .. } => kind::FAILED,
    }
}

fn put_request(out: &mut Vec<u8>, request: &Request<'_>) {
    out.put_u64_le(request.id);
    out.put_u16_le(request.partition);
    out.put_u32_le(request.deadline_ms);
    let once = if request.once.is_some() { ONCE } else { 0 };
    let trace = if request.trace.is_some() { TRACE } else { 0 };
    out.put_u8(u8::from(request.stale) | once | trace);
    if let Some((first, second, third)) = request.once {
        out.put_u64_le(first);
        out.put_u64_le(second);
        out.put_u64_le(third);
    }
    if let Some(trace) = request.trace {
        out.extend_from_slice(trace);
    }
    out.extend_from_slice(request.payload);
}
