//! The first bytes of each side: who speaks, in which version, within which limits.
//!
//! The first byte tells the protocol from RESP: no RESP value and no inline command starts with it.

use bytes::BufMut;

use super::body::{Reader, put_bytes};
use super::{BodyError, MAX_FRAME_BYTES, VERSION};
use crate::Code;

/// How every preface starts.
pub const MAGIC: [u8; 5] = *b"\xf1FLUX";

/// The length of a client's preface.
pub const PREFACE_BYTES: usize = 12;

/// The length of a server's preface up to the part whose length it gives.
const SERVER_HEAD_BYTES: usize = 14;

/// What the rest of a server's preface may take.
const SERVER_REST_LIMIT: usize = 64 * 1024;

/// Whether a connection whose first byte this is speaks the native protocol.
pub fn is_native(first_byte: u8) -> bool {
    first_byte == MAGIC[0]
}

/// What a server of version 1 may be able to do beyond what the first one did. A client asks for what
/// it knows and uses what is granted: the bits of the prefaces' flags.
pub mod feature {
    /// Writes may belong to a session, so that repeating one does not write twice.
    pub const SESSIONS: u16 = 1;
    /// The answer to a stale read may tell how old it is.
    pub const POSITIONS: u16 = 2;
    /// A request may ask for `NOT_LEADER` rather than to be passed on.
    pub const REDIRECTS: u16 = 4;
    /// A scan may be of one partition.
    pub const PARTITION_SCANS: u16 = 8;
    /// A request may come with a trace context.
    pub const TRACES: u16 = 16;
    /// All that this crate knows.
    pub const ALL: u16 = SESSIONS | POSITIONS | REDIRECTS | PARTITION_SCANS | TRACES;
}

/// A client's preface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preface {
    /// The lowest protocol version that the client speaks.
    pub min_version: u16,
    /// The highest.
    pub max_version: u16,
    /// The [features](feature) asked for.
    pub flags: u16,
}

impl Default for Preface {
    fn default() -> Preface {
        Preface { min_version: VERSION, max_version: VERSION, flags: 0 }
    }
}

impl Preface {
    /// The version to speak with this client, if there is one in common.
    pub fn choose_version(&self) -> Option<u16> {
        (self.min_version..=self.max_version).contains(&VERSION).then_some(VERSION)
    }
}

/// A server's preface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerPreface<'a> {
    /// The connection is open.
    Accepted(Accepted<'a>),
    /// The server closes the connection after this.
    Refused {
        /// The number of the error's code.
        code: u16,
        /// What is wrong, for a person to read.
        message: &'a str,
    },
}

/// What a server says of itself when it takes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted<'a> {
    /// The version that both sides speak from here on.
    pub version: u16,
    /// The [features](feature) granted, of those asked for.
    pub flags: u16,
    /// The most that may follow the length field of a request.
    pub max_frame_bytes: u32,
    /// The longest key.
    pub max_key_bytes: u32,
    /// The largest value.
    pub max_value_bytes: u32,
    /// How many partitions the slots are divided into.
    pub partitions: u16,
    /// The node's name.
    pub node: &'a str,
}

impl ServerPreface<'_> {
    /// The refusal of a client with which no version is in common.
    pub const VERSION_MISMATCH: ServerPreface<'static> = ServerPreface::Refused {
        code: Code::Unsupported.number(),
        message: "no protocol version in common: this server speaks version 1",
    };
}

/// Why bytes are not a preface. The connection must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefaceError {
    /// The other side speaks something else.
    #[error("the connection does not start with the preface of the native protocol")]
    BadMagic,
    /// The rest of a server's preface is longer than any server sends.
    #[error("a preface of {0} bytes is too long")]
    TooLong(usize),
    /// A field of a server's preface is wrong.
    #[error("the server's preface is malformed")]
    Malformed(#[from] BodyError),
}

/// Reads a client's preface and the count of bytes that it took; `None` where more bytes are needed.
pub fn decode_preface(input: &[u8]) -> Result<Option<(Preface, usize)>, PrefaceError> {
    check_magic(input)?;
    let Some(preface) = input.first_chunk::<PREFACE_BYTES>() else {
        return Ok(None);
    };
    let [_, _, _, _, _, _, min0, min1, max0, max1, flags0, flags1] = *preface;
    let preface = Preface {
        min_version: u16::from_le_bytes([min0, min1]),
        max_version: u16::from_le_bytes([max0, max1]),
        flags: u16::from_le_bytes([flags0, flags1]),
    };
    Ok(Some((preface, PREFACE_BYTES)))
}

/// Appends a client's preface.
pub fn encode_preface(out: &mut Vec<u8>, preface: &Preface) {
    out.extend_from_slice(&MAGIC);
    out.put_u8(0);
    out.put_u16_le(preface.min_version);
    out.put_u16_le(preface.max_version);
    out.put_u16_le(preface.flags);
}

/// Reads a server's preface and the count of bytes that it took; `None` where more bytes are needed.
pub fn decode_server_preface(
    input: &[u8],
) -> Result<Option<(ServerPreface<'_>, usize)>, PrefaceError> {
    check_magic(input)?;
    let Some((head, rest)) = input.split_first_chunk::<SERVER_HEAD_BYTES>() else {
        return Ok(None);
    };
    let [_, _, _, _, _, _, version0, version1, flags0, flags1, length @ ..] = *head;
    let length = u32::from_le_bytes(length) as usize;
    if length > SERVER_REST_LIMIT {
        return Err(PrefaceError::TooLong(length));
    }
    let Some(rest) = rest.get(..length) else {
        return Ok(None);
    };
    let version = u16::from_le_bytes([version0, version1]);
    let flags = u16::from_le_bytes([flags0, flags1]);
    let preface = decode_server_rest(version, flags, rest)?;
    Ok(Some((preface, SERVER_HEAD_BYTES + length)))
}

/// Fields after the known ones are left for servers to add and are not looked at.
fn decode_server_rest(
    version: u16,
    flags: u16,
    rest: &[u8],
) -> Result<ServerPreface<'_>, BodyError> {
    let mut reader = Reader::new(rest);
    if version == 0 {
        let code = reader.u16("code")?;
        return Ok(ServerPreface::Refused { code, message: reader.text("message")? });
    }
    Ok(ServerPreface::Accepted(Accepted {
        version,
        flags,
        max_frame_bytes: reader.u32("max_frame_bytes")?,
        max_key_bytes: reader.u32("max_key_bytes")?,
        max_value_bytes: reader.u32("max_value_bytes")?,
        partitions: reader.u16("partitions")?,
        node: reader.text("node")?,
    }))
}

/// Appends a server's preface. A node name or message over 4 KiB is cut.
pub fn encode_server_preface(out: &mut Vec<u8>, preface: &ServerPreface<'_>) {
    let (version, flags) = match preface {
        ServerPreface::Accepted(accepted) => (accepted.version, accepted.flags),
        ServerPreface::Refused { .. } => (0, 0),
    };
    out.extend_from_slice(&MAGIC);
    out.put_u8(0);
    out.put_u16_le(version);
    out.put_u16_le(flags);
    let length_at = out.len();
    out.put_u32_le(0);
    match preface {
        ServerPreface::Accepted(accepted) => {
            out.put_u32_le(accepted.max_frame_bytes);
            out.put_u32_le(accepted.max_key_bytes);
            out.put_u32_le(accepted.max_value_bytes);
            out.put_u16_le(accepted.partitions);
            put_bytes(out, cut(accepted.node).as_bytes());
        }
        ServerPreface::Refused { code, message } => {
            out.put_u16_le(*code);
            put_bytes(out, cut(message).as_bytes());
        }
    }
    let length = (out.len() - length_at - 4) as u32;
    out[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
}

impl<'a> Accepted<'a> {
    /// What a server of this crate's version says of itself. It grants no features.
    pub fn new(node: &'a str, partitions: u16) -> Accepted<'a> {
        Accepted {
            version: VERSION,
            flags: 0,
            max_frame_bytes: MAX_FRAME_BYTES as u32,
            max_key_bytes: super::MAX_KEY_BYTES as u32,
            max_value_bytes: super::MAX_VALUE_BYTES as u32,
            partitions,
            node,
        }
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(4096)]
}

/// The magic may arrive in pieces: a wrong byte is told as soon as it is there.
fn check_magic(input: &[u8]) -> Result<(), PrefaceError> {
    let known = input.len().min(MAGIC.len());
    if input[..known] == MAGIC[..known] { Ok(()) } else { Err(PrefaceError::BadMagic) }
}
