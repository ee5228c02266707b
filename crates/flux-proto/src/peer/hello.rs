//! The first bytes of the side that connects: who it is, whom it wants, and what for.

use bytes::BufMut;

use super::{MIN_VERSION, VERSION};
use crate::native::{BodyError, Reader};

/// How every connection between nodes starts. The first byte is neither that of RESP nor that of the
/// native protocol.
pub const MAGIC: [u8; 5] = *b"\xf2FLUX";

/// The length of a [`Hello`].
pub const HELLO_BYTES: usize = 40;

/// What a client of another protocol is told before the connection ends, as RESP has it.
pub const WRONG_PROTOCOL: &[u8] =
    b"-ERR this port is for other nodes of the cluster; clients use the data port\r\n";

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// Frames from a worker to a worker, in one direction.
    Frames = 0,
    /// One snapshot.
    Bulk = 1,
}

/// What the side that connects says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The lowest protocol version that it speaks.
    pub min_version: u16,
    /// The highest.
    pub max_version: u16,
    /// What the connection is for.
    pub kind: LinkKind,
    /// Which of its workers connects.
    pub worker: u16,
    /// The cluster it is of.
    pub cluster: u64,
    /// Its node id.
    pub from: u32,
    /// The node id of the node that it wants to reach.
    pub to: u32,
    /// Drawn at random when its process started.
    pub instance: u64,
}

impl Hello {
    /// The version to speak on this connection: the newest in common, if there is one.
    pub fn choose_version(&self) -> Option<u16> {
        let newest = self.max_version.min(VERSION);
        (newest >= self.min_version.max(MIN_VERSION)).then_some(newest)
    }
}

/// Why bytes are not a hello. The connection must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The other side speaks something else. It may be sent [`WRONG_PROTOCOL`].
    #[error("the connection does not start as one of the peer protocol")]
    BadMagic,
    /// A field has a value that is not defined.
    #[error("the hello of a peer is malformed")]
    Malformed(#[from] BodyError),
}

/// Reads a hello, which takes [`HELLO_BYTES`]; `None` where more bytes are needed. A wrong magic is
/// told by the first wrong byte.
pub fn decode_hello(input: &[u8]) -> Result<Option<Hello>, HelloError> {
    let known = input.len().min(MAGIC.len());
    if input[..known] != MAGIC[..known] {
        return Err(HelloError::BadMagic);
    }
    let Some(hello) = input.first_chunk::<HELLO_BYTES>() else {
        return Ok(None);
    };
    let mut reader = Reader::new(&hello[MAGIC.len()..]);
    // Reserved bytes are not looked at: a later version may give them a meaning.
    reader.u8("reserved")?;
    let (min_version, max_version) = (reader.u16("min_version")?, reader.u16("max_version")?);
    let kind = match reader.u8("kind")? {
        0 => LinkKind::Frames,
        1 => LinkKind::Bulk,
        kind => return Err(BodyError::Invalid { field: "kind", value: u64::from(kind) }.into()),
    };
    reader.u8("reserved")?;
    let worker = reader.u16("worker")?;
    reader.u16("reserved")?;
    Ok(Some(Hello {
        min_version,
        max_version,
        kind,
        worker,
        cluster: reader.u64("cluster")?,
        from: reader.u32("from")?,
        to: reader.u32("to")?,
        instance: reader.u64("instance")?,
    }))
}

/// Appends a hello.
pub fn encode_hello(out: &mut Vec<u8>, hello: &Hello) {
    out.extend_from_slice(&MAGIC);
    out.put_u8(0);
    out.put_u16_le(hello.min_version);
    out.put_u16_le(hello.max_version);
    out.put_u8(hello.kind as u8);
    out.put_u8(0);
    out.put_u16_le(hello.worker);
    out.put_u16_le(0);
    out.put_u64_le(hello.cluster);
    out.put_u32_le(hello.from);
    out.put_u32_le(hello.to);
    out.put_u64_le(hello.instance);
}
