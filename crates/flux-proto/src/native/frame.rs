//! Frames: where one ends, whose it is, and its body as bytes.

use bytes::BufMut;

use super::body::{Reader, put_bytes};
use super::response::Failure;
use super::{BodyError, MAX_FRAME_BYTES, Opcode, Request, Response};
use crate::Code;

/// What follows the length field of a request, before the body.
const REQUEST_HEADER_BYTES: usize = 14;

/// What follows the length field of a response, before the body.
const RESPONSE_HEADER_BYTES: usize = 12;

/// The flag of a read that any replica may answer from what it has applied.
const STALE: u8 = 1;

/// The longest error message that is sent, in bytes.
const MESSAGE_LIMIT: usize = 4096;

/// What every request starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestHeader {
    /// The client's choice, repeated in the response; not 0.
    pub id: u64,
    /// Which operation; see [`Opcode`].
    pub opcode: u8,
    /// Bit 0: a stale read will do. The others must be 0.
    pub flags: u8,
    /// How long the client waits, from when the server reads the request; 0 for no limit.
    pub deadline_ms: u32,
}

impl RequestHeader {
    /// The header of a request, with no flags and no deadline.
    pub fn new(id: u64, opcode: Opcode) -> RequestHeader {
        RequestHeader { id, opcode: opcode as u8, flags: 0, deadline_ms: 0 }
    }

    /// Whether any replica may answer the read from what it has applied.
    pub fn is_stale(&self) -> bool {
        self.flags & STALE != 0
    }

    /// The same header, asking for a stale read or not.
    pub fn with_stale(mut self, stale: bool) -> RequestHeader {
        self.flags = if stale { STALE } else { 0 };
        self
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
        if self.header.flags & !STALE != 0 {
            return Err(BodyError::UnknownFlags(self.header.flags));
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
    /// The operation's fields, or an error's message.
    pub body: &'a [u8],
}

impl<'a> ResponseFrame<'a> {
    /// Decodes the body: what the operation answered, or the error that the server gave.
    pub fn response(&self) -> Result<Result<Response<'a>, Failure<'a>>, BodyError> {
        if self.status != 0 {
            // Servers may add fields after the message.
            let message = Reader::new(self.body).text("message")?;
            return Ok(Err(Failure { status: self.status, message }));
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
    let [i0, i1, i2, i3, i4, i5, i6, i7, opcode, flags, d0, d1, d2, d3] = header;
    let header = RequestHeader {
        id: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
        opcode,
        flags,
        deadline_ms: u32::from_le_bytes([d0, d1, d2, d3]),
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
    let [i0, i1, i2, i3, i4, i5, i6, i7, s0, s1, opcode, _] = header;
    let id = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
    let status = u16::from_le_bytes([s0, s1]);
    Ok(Some((ResponseFrame { id, status, opcode, body }, taken)))
}

/// Appends a request; the header's opcode is taken from the request.
pub fn encode_request(
    out: &mut Vec<u8>,
    header: &RequestHeader,
    request: &Request<'_>,
) -> Result<(), FrameTooLarge> {
    let start = begin(out);
    out.put_u64_le(header.id);
    out.put_u8(request.opcode() as u8);
    out.put_u8(header.flags);
    out.put_u32_le(header.deadline_ms);
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
    let start = begin(out);
    put_response_header(out, id, 0, opcode as u8);
    response.encode(out);
    finish(out, start)
}

/// Appends an error. `opcode` is as the request had it, known or not; id and opcode are 0 for an
/// error that concerns the connection and is its last frame. A message over 4 KiB is cut.
pub fn encode_error(out: &mut Vec<u8>, id: u64, opcode: u8, code: Code, message: &str) {
    let message = &message[..message.floor_char_boundary(MESSAGE_LIMIT)];
    out.put_u32_le((RESPONSE_HEADER_BYTES + 4 + message.len()) as u32);
    put_response_header(out, id, code.number(), opcode);
    put_bytes(out, message.as_bytes());
}

fn put_response_header(out: &mut Vec<u8>, id: u64, status: u16, opcode: u8) {
    out.put_u64_le(id);
    out.put_u16_le(status);
    out.put_u8(opcode);
    out.put_u8(0);
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
