//! The native protocol: length-prefixed binary frames with request ids, after a versioned preface.
//!
//! docs/protocol.md describes it to the byte. Everything is little endian. Decoders borrow from the
//! input and allocate only for lists whose count the remaining bytes can hold; no bytes make them
//! panic. Two kinds of errors are kept apart: a [`FrameError`] or [`PrefaceError`] means that the
//! framing is lost and the connection must end; a [`BodyError`] concerns one request, and the
//! connection goes on.
//!
//! What this module does not do: own a socket, keep state between frames, or know what a request
//! means.

mod body;
mod frame;
mod info;
mod preface;
mod request;
mod response;

#[cfg(test)]
mod tests;

pub use body::BodyError;
pub(crate) use body::{Reader, put_bytes};
pub use frame::{
    Frame, FrameError, FrameTooLarge, RequestHeader, ResponseFrame, Session, StalePosition,
    decode_request, decode_response, encode_error, encode_not_leader, encode_request,
    encode_response, encode_response_at,
};
pub use info::{Info, LeaderHint, Member};
pub use preface::{
    Accepted, MAGIC, PREFACE_BYTES, Preface, PrefaceError, ServerPreface, decode_preface,
    decode_server_preface, encode_preface, encode_server_preface, feature, is_native,
};
pub use request::{Condition, Expiry, Guard, Opcode, Request, Write};
pub use response::{
    BatchReply, DeleteReply, Failure, Item, Page, Response, SetReply, Value, WriteResult,
};

/// The one version of the protocol that this crate speaks.
pub const VERSION: u16 = 1;

/// The longest key, in bytes. The shortest has one.
pub const MAX_KEY_BYTES: usize = 64 * 1024;

/// The largest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 16 * 1024 * 1024;

/// The most that may follow a frame's length field, in bytes, in either direction.
pub const MAX_FRAME_BYTES: usize = MAX_VALUE_BYTES + 1024 * 1024;

/// The most keys of a batch, writes of a batch, or guards of a batch.
pub const MAX_BATCH: usize = 65_536;

/// The most keys that one page of a scan may be asked for.
pub const MAX_SCAN_LIMIT: u32 = 10_000;

/// The keys of a page where the request gives no limit.
pub const DEFAULT_SCAN_LIMIT: u32 = 100;

/// Feeds bytes to every decoder, as a fuzz target does: none may panic, and what decodes must come
/// out the same after it is encoded and decoded again.
#[doc(hidden)]
pub fn exercise(bytes: &[u8]) {
    let _ = decode_preface(bytes);
    let _ = decode_server_preface(bytes);
    if let Ok(Some((frame, _))) = decode_request(bytes)
        && let Ok(request) = frame.request()
    {
        let RequestHeader { flags, session, trace, .. } = frame.header;
        let mut again = Vec::new();
        encode_request(&mut again, &frame.header, &request).expect("it came in one frame");
        let (frame, _) = decode_request(&again).expect("well formed").expect("whole");
        assert_eq!(frame.request().as_ref(), Ok(&request));
        let header = frame.header;
        assert_eq!((header.flags, header.session, header.trace), (flags, session, trace));
    }
    if let Ok(Some((frame, _))) = decode_response(bytes)
        && let Ok(Ok(response)) = frame.response()
        && let Ok(opcode) = Opcode::try_from(frame.opcode)
    {
        let mut again = Vec::new();
        let position = frame.position;
        encode_response_at(&mut again, frame.id, opcode, &response, position)
            .expect("it came in one frame, but for what an older server leaves out");
        let (frame, _) = decode_response(&again).expect("well formed").expect("whole");
        assert_eq!((frame.response(), frame.position), (Ok(Ok(response)), position));
    }
}
