//! Frames: where one ends, whose it is, and its body as bytes.

use bytes::BufMut;

use super::body::{Reader, put_bytes};
use super::response::Failure;
use super::{BodyError, LeaderHint, MAX_FRAME_BYTES, Opcode, Request, Response};
use crate::Code;
use crate::trace::{TRACE_BYTES, TraceContext};

/// What follows the length field of a request, before the body.
const REQUEST_HEADER_BYTES: usize = 14;

/// What follows the length field of a response, before the body.
const RESPONSE_HEADER_BYTES: usize = 12;

/// The flag of a read that any replica may answer from what it has applied.
const STALE: u8 = 1;

/// The flag of a write that belongs to a session, which follows the header.
const SESSION: u8 = 2;

/// The flag of a stale read whose answer is to say how old it is.
const POSITION: u8 = 4;

/// The flag of a request that is not to be passed on to the partition's leader.
const REDIRECT: u8 = 8;

/// The flag of a request that comes with a trace context, behind the header and the session.
const TRACE: u8 = 16;

const REQUEST_FLAGS: u8 = STALE | SESSION | POSITION | REDIRECT | TRACE;

/// The flag of an answer that starts with the position it was read at.
const POSITIONED: u8 = 1;

/// The longest error message that is sent, in bytes.
const MESSAGE_LIMIT: usize = 4096;

/// What every request starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestHeader {
    /// The client's choice, repeated in the response; not 0.
    pub id: u64,
    /// Which operation; see [`Opcode`].
    pub opcode: u8,
    /// Bit 0: a stale read will do. Bit 1: a session follows; encoding sets it as `session` is.
    /// Bit 2: the answer to a stale read is to tell its position. Bit 3: answer `NOT_LEADER` rather
    /// than pass the request on. Bit 4: a trace context follows; encoding sets it as `trace` is. The
    /// others must be 0.
    pub flags: u8,
    /// How long the client waits, from when the server reads the request; 0 for no limit.
    pub deadline_ms: u32,
    /// The session that a write belongs to. None also where the flag is set and the frame too short
    /// for it, which decoding the request tells.
    pub session: Option<Session>,
    /// Which request of a distributed trace it is: for the readers of what it changes. One with an id of
    /// zeros is decoded as none, without its flag. None also where the flag is set and the frame too short
    /// for it, which decoding the request tells.
    pub trace: Option<TraceContext>,
}

/// Which write of which client this is, so that a repeated one can be told: it gets the answer of
/// the first and is carried out once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// The client's choice, at random; not 0.
    pub id: u64,
    /// Another one for each of the session's writes, the same when one is repeated.
    pub sequence: u64,
    /// The partition may forget its answers to lower ones and must carry none of them out any more;
    /// at most `sequence`.
    pub acked_below: u64,
}

/// How up to date a replica was when it answered a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StalePosition {
    /// The revision that it had applied; 0 where the answer is from several partitions.
    pub revision: u64,
    /// For how long it may have missed writes, in milliseconds; the longest of several partitions.
    pub age_ms: u64,
}

impl RequestHeader {
    /// The header of a request, with no flags and no deadline.
    pub fn new(id: u64, opcode: Opcode) -> RequestHeader {
        RequestHeader { id, opcode: opcode as u8, ..RequestHeader::default() }
    }

    /// Whether any replica may answer the read from what it has applied.
    pub fn is_stale(&self) -> bool {
        self.flags & STALE != 0
    }

    /// The same header, asking for a stale read or not.
    pub fn with_stale(self, stale: bool) -> RequestHeader {
        self.with_flag(STALE, stale)
    }

    /// Whether the answer to the stale read is to tell its position.
    pub fn wants_position(&self) -> bool {
        self.flags & (STALE | POSITION) == STALE | POSITION
    }

    /// The same header, asking for a stale read's position or not.
    pub fn with_position(self, position: bool) -> RequestHeader {
        self.with_flag(POSITION, position)
    }

    /// Whether to answer `NOT_LEADER` rather than pass the request on.
    pub fn wants_redirect(&self) -> bool {
        self.flags & REDIRECT != 0
    }

    /// The same header, asking to be sent to the leader or not.
    pub fn with_redirect(self, redirect: bool) -> RequestHeader {
        self.with_flag(REDIRECT, redirect)
    }

    fn with_flag(mut self, flag: u8, on: bool) -> RequestHeader {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
        self
    }
}

impl Session {
    const BYTES: usize = 24;

    /// Splits a session off the start of a body, if it is long enough.
    fn split(body: &[u8]) -> Option<(Session, &[u8])> {
        let (bytes, body) = body.split_at_checked(Session::BYTES)?;
        let mut reader = Reader::new(bytes);
        let mut next = || reader.u64("session").ok();
        Some((Session { id: next()?, sequence: next()?, acked_below: next()? }, body))
    }

    fn check(self) -> Result<(), BodyError> {
        if self.id == 0 {
            return Err(BodyError::Invalid { field: "session", value: 0 });
        }
        if self.acked_below > self.sequence {
            return Err(BodyError::Invalid { field: "acked_below", value: self.acked_below });
        }
        Ok(())
    }
}

/// A request whose body is not yet looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Whose it is and what it asks.
    pub header: RequestHeader,
    /// Its fields, as the opcode defines them.
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Decodes the body. On an error the connection can go on: answer it under the frame's id.
    pub fn request(&self) -> Result<Request<'a>, BodyError> {
        let RequestHeader { flags, session, trace, .. } = self.header;
        if flags & !REQUEST_FLAGS != 0 {
            return Err(BodyError::UnknownFlags(flags));
        }
        match session {
            Some(session) => session.check()?,
            None if flags & SESSION != 0 => {
                return Err(BodyError::Truncated { field: "session" });
            }
            None => {}
        }
        if flags & TRACE != 0 && trace.is_none() {
            return Err(BodyError::Truncated { field: "trace" });
        }
        Request::decode(Opcode::try_from(self.header.opcode)?, self.body)
    }
}

/// A response whose body is not yet looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseFrame<'a> {
    /// The request's id; 0 for an error that concerns the connection, which then ends.
    pub id: u64,
    /// 0 for success, else the number of a [`Code`].
    pub status: u16,
    /// The request's opcode; 0 where the id is 0.
    pub opcode: u8,
    /// Bit 0: a success that starts with a position. The others are to be ignored.
    pub flags: u8,
    /// How old the answer to a stale read is, where the server tells. None also where the flag is
    /// set and the frame too short for it, which decoding the response tells.
    pub position: Option<StalePosition>,
    /// The operation's fields, or an error's message.
    pub body: &'a [u8],
}

impl<'a> ResponseFrame<'a> {
    /// Decodes the body: what the operation answered, or the error that the server gave.
    pub fn response(&self) -> Result<Result<Response<'a>, Failure<'a>>, BodyError> {
        if self.status != 0 {
            return Failure::decode(self.status, self.body).map(Err);
        }
        if self.flags & POSITIONED != 0 && self.position.is_none() {
            return Err(BodyError::Truncated { field: "revision" });
        }
        Response::decode(Opcode::try_from(self.opcode)?, self.body).map(Ok)
    }
}

/// Why the end of a frame cannot be found. The connection must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length does not even cover the header.
    #[error("a frame of {0} bytes is shorter than its header")]
    TooShort(usize),
    /// The length is over the limit.
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLarge(usize),
}

impl FrameError {
    /// The code to answer under id 0 before closing.
    pub fn code(self) -> Code {
        match self {
            FrameError::TooShort(_) => Code::Malformed,
            FrameError::TooLarge(_) => Code::TooLarge,
        }
    }
}

/// What was to be sent does not fit in a frame. Nothing was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is over the limit of {MAX_FRAME_BYTES}; ask for less at once")]
pub struct FrameTooLarge(pub usize);

/// Reads a request frame and the count of bytes that it took; `None` where more bytes are needed.
pub fn decode_request(input: &[u8]) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some((frame, taken)) = split_frame(input, REQUEST_HEADER_BYTES)? else {
        return Ok(None);
    };
    let Some((&header, body)) = frame.split_first_chunk::<REQUEST_HEADER_BYTES>() else {
        return Ok(None);
    };
    let [i0, i1, i2, i3, i4, i5, i6, i7, opcode, mut flags, d0, d1, d2, d3] = header;
    let with_session = if flags & SESSION != 0 { Session::split(body) } else { None };
    let (session, body) = match with_session {
        Some((session, body)) => (Some(session), body),
        None => (None, body),
    };
    let with_trace = body.split_first_chunk::<TRACE_BYTES>().filter(|_| flags & TRACE != 0);
    let (trace, body) = match with_trace {
        Some((bytes, body)) => (TraceContext::from_bytes(bytes), body),
        None => (None, body),
    };
    if with_trace.is_some() && trace.is_none() {
        flags &= !TRACE;
    }
    let header = RequestHeader {
        id: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
        opcode,
        flags,
        deadline_ms: u32::from_le_bytes([d0, d1, d2, d3]),
        session,
        trace,
    };
    Ok(Some((Frame { header, body }, taken)))
}

/// Reads a response frame and the count of bytes that it took; `None` where more bytes are needed.
pub fn decode_response(input: &[u8]) -> Result<Option<(ResponseFrame<'_>, usize)>, FrameError> {
    let Some((frame, taken)) = split_frame(input, RESPONSE_HEADER_BYTES)? else {
        return Ok(None);
    };
    let Some((&header, body)) = frame.split_first_chunk::<RESPONSE_HEADER_BYTES>() else {
        return Ok(None);
    };
    let [i0, i1, i2, i3, i4, i5, i6, i7, s0, s1, opcode, flags] = header;
    let id = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
    let status = u16::from_le_bytes([s0, s1]);
    let positioned = status == 0 && flags & POSITIONED != 0;
    let (position, body) = match body.split_first_chunk::<16>() {
        Some((bytes, body)) if positioned => (StalePosition::decode(bytes).ok(), body),
        _ => (None, body),
    };
    Ok(Some((ResponseFrame { id, status, opcode, flags, position, body }, taken)))
}

impl StalePosition {
    fn decode(bytes: &[u8]) -> Result<StalePosition, BodyError> {
        let mut reader = Reader::new(bytes);
        Ok(StalePosition { revision: reader.u64("revision")?, age_ms: reader.u64("age_ms")? })
    }
}

/// Appends a request; the header's opcode is taken from the request, and the flags of a session and a
/// trace are set as there are such.
pub fn encode_request(
    out: &mut Vec<u8>,
    header: &RequestHeader,
    request: &Request<'_>,
) -> Result<(), FrameTooLarge> {
    let start = begin(out);
    out.put_u64_le(header.id);
    out.put_u8(request.opcode() as u8);
    let header = header.with_flag(SESSION, header.session.is_some());
    let header = header.with_flag(TRACE, header.trace.is_some());
    out.put_u8(header.flags);
    out.put_u32_le(header.deadline_ms);
    if let Some(session) = header.session {
        out.put_u64_le(session.id);
        out.put_u64_le(session.sequence);
        out.put_u64_le(session.acked_below);
    }
    if let Some(trace) = &header.trace {
        out.extend_from_slice(&trace.to_bytes());
    }
    request.encode(out);
    finish(out, start)
}

/// Appends the answer to a request of this opcode.
pub fn encode_response(
    out: &mut Vec<u8>,
    id: u64,
    opcode: Opcode,
    response: &Response<'_>,
) -> Result<(), FrameTooLarge> {
    encode_response_at(out, id, opcode, response, None)
}

/// Appends the answer to a request of this opcode, and how old it is where there is a position: only
/// for a request that [asked for it](RequestHeader::wants_position).
pub fn encode_response_at(
    out: &mut Vec<u8>,
    id: u64,
    opcode: Opcode,
    response: &Response<'_>,
    position: Option<StalePosition>,
) -> Result<(), FrameTooLarge> {
    let start = begin(out);
    let flags = if position.is_some() { POSITIONED } else { 0 };
    put_response_header(out, id, 0, opcode as u8, flags);
    if let Some(position) = position {
        out.put_u64_le(position.revision);
        out.put_u64_le(position.age_ms);
    }
    response.encode(out);
    finish(out, start)
}

/// Appends an error. `opcode` is as the request had it, known or not; id and opcode are 0 for an
/// error that concerns the connection and is its last frame. A message over 4 KiB is cut.
pub fn encode_error(out: &mut Vec<u8>, id: u64, opcode: u8, code: Code, message: &str) {
    put_error(out, id, opcode, code, message, |_| {});
}

/// Appends the error `NOT_LEADER` and who leads instead.
pub fn encode_not_leader(
    out: &mut Vec<u8>,
    id: u64,
    opcode: u8,
    message: &str,
    hint: &LeaderHint<'_>,
) {
    put_error(out, id, opcode, Code::NotLeader, message, |out| {
        out.put_u16_le(hint.partition);
        put_bytes(out, hint.leader_addr.as_bytes());
    });
}

fn put_error(
    out: &mut Vec<u8>,
    id: u64,
    opcode: u8,
    code: Code,
    message: &str,
    rest: impl FnOnce(&mut Vec<u8>),
) {
    let start = begin(out);
    put_response_header(out, id, code.number(), opcode, 0);
    put_bytes(out, &message.as_bytes()[..message.floor_char_boundary(MESSAGE_LIMIT)]);
    rest(out);
    let length = (out.len() - start) as u32;
    out[start - 4..start].copy_from_slice(&length.to_le_bytes());
}

fn put_response_header(out: &mut Vec<u8>, id: u64, status: u16, opcode: u8, flags: u8) {
    out.put_u64_le(id);
    out.put_u16_le(status);
    out.put_u8(opcode);
    out.put_u8(flags);
}

/// The bytes after a length field, and the count of bytes with it.
fn split_frame(input: &[u8], shortest: usize) -> Result<Option<(&[u8], usize)>, FrameError> {
    let Some((&length, rest)) = input.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(length) as usize;
    if length < shortest {
        return Err(FrameError::TooShort(length));
    }
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge(length));
    }
    Ok(rest.get(..length).map(|frame| (frame, 4 + length)))
}

fn begin(out: &mut Vec<u8>) -> usize {
    out.put_u32_le(0);
    out.len()
}

/// Fills in the length of the frame whose header starts at `start`.
fn finish(out: &mut Vec<u8>, start: usize) -> Result<(), FrameTooLarge> {
    let length = out.len() - start;
    if length > MAX_FRAME_BYTES {
        out.truncate(start - 4);
        return Err(FrameTooLarge(length));
    }
    out[start - 4..start].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(())
}
