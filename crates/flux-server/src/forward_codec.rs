//! Commands and replies as bytes, for a node that forwards a client's command to another node.
//!
//! The form is postcard's: variants and fields by their place, integers as varints, byte strings with
//! their length before them. Both nodes must have the same enums, up to variants appended at the end: a
//! variant that is not known here is `Malformed`. **Variants may only be appended** to `Command`, `Reply`,
//! `Error` and what they hold.
//!
//! Nothing here is framed or sent. Bytes from outside are data: anything but an encoded command or reply
//! is an error, and nothing is decoded that nests deeper than a command in a transaction. What is decoded
//! takes at most some sixty times its input in memory, as when a list has a million empty values.

use flux_core::command::{Guard, TransactionMode};
use flux_core::{Command, MAX_REPLY_BYTES, Reply};
use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize, Serializer};

/// The most bytes of an encoded command or reply: a frame between nodes has room for them and its header.
pub const MAX_ENCODED_BYTES: usize = MAX_REPLY_BYTES;

/// The variants that hold others of their kind.
const TRANSACTION: u32 = 22;
const MANY: u32 = 10;

/// Why bytes are no command or reply, or cannot be made of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More than `MAX_ENCODED_BYTES`.
    #[error("a forwarded message is over the limit of {MAX_ENCODED_BYTES} bytes")]
    TooLong,
    /// Not what this version of the format has.
    #[error("a forwarded message is not a command or reply that this version knows")]
    Malformed,
}

/// Appends a command to `out`.
///
/// # Errors
///
/// `TooLong`; `out` is then as it was.
pub fn encode_command<B: AsRef<[u8]>>(
    command: &Command<B>,
    out: &mut Vec<u8>,
) -> Result<(), CodecError> {
    encode(&command.map(&mut |bytes: &B| Raw(bytes.as_ref())), out)
}

/// Appends a reply to `out`.
///
/// # Errors
///
/// `TooLong`; `out` is then as it was.
pub fn encode_reply(reply: &Reply, out: &mut Vec<u8>) -> Result<(), CodecError> {
    encode(reply, out)
}

/// A command, which borrows its bytes from the input.
///
/// # Errors
///
/// If the bytes are not one whole command.
pub fn decode_command(bytes: &[u8]) -> Result<Command<&[u8]>, CodecError> {
    let mut input = Input::new(bytes)?;
    let command = if input.variant()? == TRANSACTION {
        input.next::<u32>()?;
        let guards = input.next::<Vec<Guard<&[u8]>>>()?;
        let commands = input.list(TRANSACTION)?;
        let mode = input.next::<TransactionMode>()?;
        Command::Transaction { guards, commands, mode }
    } else {
        input.next()?
    };
    input.end(command)
}

/// A reply.
///
/// # Errors
///
/// If the bytes are not one whole reply.
pub fn decode_reply(bytes: &[u8]) -> Result<Reply, CodecError> {
    let mut input = Input::new(bytes)?;
    let reply = if input.variant()? == MANY {
        input.next::<u32>()?;
        Reply::Many(input.list(MANY)?)
    } else {
        input.next()?
    };
    input.end(reply)
}

/// Bytes as bytes: a plain slice would be written one by one.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

fn encode(value: &impl Serialize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let start = out.len();
    let appended = postcard::serialize_with_flavor(value, Bounded { out, start });
    appended.map_err(|_| {
        out.truncate(start);
        // Nothing else can fail: all lengths are known.
        CodecError::TooLong
    })
}

/// Appends to a vector up to the limit.
struct Bounded<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl Flavor for Bounded<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.try_extend(&[byte])
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        if self.out.len() - self.start + bytes.len() > MAX_ENCODED_BYTES {
            return Err(postcard::Error::SerializeBufferFull);
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// What is left to decode.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Result<Input<'a>, CodecError> {
        if bytes.len() > MAX_ENCODED_BYTES {
            return Err(CodecError::TooLong);
        }
        Ok(Input(bytes))
    }

    fn next<T: Deserialize<'a>>(&mut self) -> Result<T, CodecError> {
        let (value, rest) = postcard::take_from_bytes(self.0).map_err(|_| CodecError::Malformed)?;
        self.0 = rest;
        Ok(value)
    }

    /// Which variant comes next; it stays to be decoded.
    fn variant(&self) -> Result<u32, CodecError> {
        Input(self.0).next()
    }

    /// A list of enums. One that would nest further is refused before the decoder follows it: its depth
    /// would be the sender's choice, and the stack is ours.
    fn list<T: Deserialize<'a>>(&mut self, nesting: u32) -> Result<Vec<T>, CodecError> {
        let count = self.next::<usize>()?;
        let mut items = Vec::new();
        for _ in 0..count {
            if self.variant()? == nesting {
                return Err(CodecError::Malformed);
            }
            items.push(self.next()?);
        }
        Ok(items)
    }

    fn end<T>(self, value: T) -> Result<T, CodecError> {
        if self.0.is_empty() { Ok(value) } else { Err(CodecError::Malformed) }
    }
}

#[cfg(test)]
mod tests;
