//! The peer protocol: what the nodes of a cluster say to each other over TCP.
//!
//! docs/peer-protocol.md describes it to the byte. The side that connects starts with a [`Hello`];
//! everything after it, in both directions, is length-prefixed [`Frame`]s. Everything is little endian.
//! Decoders borrow from the input and take no memory; no bytes make them panic. After any error the
//! connection must end: both ends speak the version that the handshake agreed on, so there is nothing
//! to skip.
//!
//! What this module does not do: own a socket, decide whom to refuse, or look into payloads.

mod frame;
mod hello;

#[cfg(test)]
mod tests;

pub use frame::{
    Failure, Frame, FrameError, FrameTooLarge, Led, Once, Refusal, Request, SnapshotOffer, decode,
    encode, encode_with,
};
pub use hello::{
    HELLO_BYTES, Hello, HelloError, LinkKind, MAGIC, WRONG_PROTOCOL, decode_hello, encode_hello,
};

/// The newest version of the protocol that this crate speaks.
pub const VERSION: u16 = 2;

/// The oldest one that it speaks too: nodes are upgraded one after the other.
pub const MIN_VERSION: u16 = 1;

/// The version from which on a request may have a trace context.
pub const TRACES_SINCE: u16 = 2;

/// The most that may follow a frame's length field, in bytes: 64 MiB of payload and 1 KiB of fields.
pub const MAX_FRAME_BYTES: usize = 64 * 1024 * 1024 + 1024;

/// The length field in front of every frame.
pub const LENGTH_BYTES: usize = 4;

/// Feeds bytes to every decoder, as a fuzz target does: none may panic, and what decodes must come
/// out the same after it is encoded and decoded again.
#[doc(hidden)]
pub fn exercise(bytes: &[u8]) {
    if let Ok(Some(hello)) = decode_hello(bytes) {
        let mut again = Vec::new();
        encode_hello(&mut again, &hello);
        assert_eq!(decode_hello(&again), Ok(Some(hello)));
    }
    let mut rest = bytes;
    while let Ok(Some((frame, taken))) = decode(rest) {
        let mut again = Vec::new();
        encode(&mut again, &frame).expect("it came in one frame");
        assert_eq!(again.as_slice(), &rest[..taken]);
        rest = &rest[taken..];
    }
}
