//! The bytes that a remembered answer is kept in: in the log, in snapshots, in memory.
//!
//! A format of its own and not that of the enum: it is replicated, so all versions of this program must
//! read it whatever becomes of `Reply`, and most answers fit a few bytes. Only answers that say what was
//! done have one; a refusal is never remembered.
//!
//! ```text
//! answer  0x01 written       version
//!         0x02 not written   version
//!         0x03 integer       signed
//!         0x04 counter       signed, version
//!         0x05 no value
//!         0x06 value         value
//!         0x07 previous      u8 bit 0: written, bit 1: there was one; then value
//!         0x08 bytes         bytes
//!         0x09 values        count, then for each u8 0, or 1 and value
//!         0x0a aborted       position + 1, or 0 for none
//!         0x0b many          count, answers
//!         0x0c subsequence   bytes, count, then for each run left start, end, right start, end
//!         0x0d not described
//!         0x0e described     version, expiry, length, written_at_s, memory bytes
//!         0x0f error         u8 which, then its number where it has one
//! value   bytes, version, expiry
//! bytes   length, then so many
//! expiry  u8 0, or 1 and u64 Unix milliseconds, little endian
//! ```
//!
//! All other numbers are LEB128, signed ones zigzag (0, -1, 1, -2, …) before. An error can only be one
//! in `many`, which is also the only answer that holds answers, up to `MAX_DEPTH` in each other.

use super::MAX_ANSWER_BYTES;
use crate::reply::{Description, Lcs, LcsRun};
use crate::{Error, Reply, UnixMillis, Value};

const WRITTEN: u8 = 0x01;
const NOT_WRITTEN: u8 = 0x02;
const INTEGER: u8 = 0x03;
const COUNTER: u8 = 0x04;
const NO_VALUE: u8 = 0x05;
const VALUE: u8 = 0x06;
const PREVIOUS: u8 = 0x07;
const BYTES: u8 = 0x08;
const VALUES: u8 = 0x09;
const ABORTED: u8 = 0x0a;
const MANY: u8 = 0x0b;
const LCS: u8 = 0x0c;
const NOT_DESCRIBED: u8 = 0x0d;
const DESCRIBED: u8 = 0x0e;
const ERROR: u8 = 0x0f;

/// How deep answers may be in each other.
const MAX_DEPTH: usize = 4;

/// Appends the bytes of an answer. False if it has none or they are too many; then some may be there.
#[inline]
pub(crate) fn encode(reply: &Reply, out: &mut Vec<u8>) -> bool {
    if let Reply::Written { version } = *reply {
        out.push(WRITTEN);
        put_number(out, version);
        return true;
    }
    if matches!(reply, Reply::Error(_)) || reply.value_bytes() > MAX_ANSWER_BYTES {
        return false;
    }
    let end = out.len() + MAX_ANSWER_BYTES;
    encode_within(reply, end, MAX_DEPTH, out).is_some() && out.len() <= end
}

/// `None` when it cannot be encoded, or as soon as it is clear that `out` becomes longer than `end`.
fn encode_within(reply: &Reply, end: usize, depth: usize, out: &mut Vec<u8>) -> Option<()> {
    match reply {
        Reply::Written { version } => put_tagged(out, WRITTEN, *version),
        Reply::NotWritten { version } => put_tagged(out, NOT_WRITTEN, *version),
        Reply::Integer(number) => put_tagged(out, INTEGER, zigzag(*number)),
        Reply::Counter { value, version } => {
            put_tagged(out, COUNTER, zigzag(*value));
            put_number(out, *version);
        }
        Reply::Value(None) => out.push(NO_VALUE),
        Reply::Value(Some(value)) => {
            out.push(VALUE);
            put_value(out, value);
        }
        Reply::Previous { previous, written } => {
            out.extend([PREVIOUS, u8::from(*written) | u8::from(previous.is_some()) << 1]);
            previous.iter().for_each(|value| put_value(out, value));
        }
        Reply::Bytes(bytes) => {
            out.push(BYTES);
            put_bytes(out, bytes);
        }
        Reply::Values(values) => {
            put_tagged(out, VALUES, values.len() as u64);
            for value in values {
                out.push(u8::from(value.is_some()));
                value.iter().for_each(|value| put_value(out, value));
                (out.len() <= end).then_some(())?;
            }
        }
        Reply::Aborted { position } => {
            put_tagged(out, ABORTED, position.map_or(0, |position| position as u64 + 1));
        }
        Reply::Many(replies) => {
            let depth = depth.checked_sub(1)?;
            put_tagged(out, MANY, replies.len() as u64);
            for reply in replies {
                encode_within(reply, end, depth, out)?;
                (out.len() <= end).then_some(())?;
            }
        }
        Reply::Lcs(Lcs { bytes, runs }) => {
            out.push(LCS);
            put_bytes(out, bytes);
            put_number(out, runs.len() as u64);
            for LcsRun { left, right } in runs {
                for bound in [left.start, left.end, right.start, right.end] {
                    put_number(out, bound as u64);
                }
                (out.len() <= end).then_some(())?;
            }
        }
        Reply::Described(None) => out.push(NOT_DESCRIBED),
        Reply::Described(Some(description)) => put_description(out, description),
        Reply::Error(error) => {
            let (which, number) = error_code(error)?;
            out.extend([ERROR, which]);
            number.into_iter().for_each(|number| put_number(out, number as u64));
        }
        // No write is answered so, and a transaction that is, is too long.
        Reply::Page { .. } => return None,
    }
    Some(())
}

/// The answer of these bytes; `None` if they are not exactly one.
pub(crate) fn decode(bytes: &[u8]) -> Option<Reply> {
    let mut reader = Reader(bytes);
    let reply = reader.reply(MAX_DEPTH)?;
    reader.0.is_empty().then_some(reply)
}

/// The errors that a command can have by its own fault.
fn error_code(error: &Error) -> Option<(u8, Option<usize>)> {
    Some(match *error {
        Error::NotInteger => (1, None),
        Error::NotFloat => (2, None),
        Error::Overflow => (3, None),
        Error::NotFinite => (4, None),
        Error::OffsetOutOfRange => (5, None),
        Error::InvalidExpiry => (6, None),
        Error::NoSuchKey => (7, None),
        Error::EmptyKey => (8, None),
        Error::KeyTooLong(bytes) => (9, Some(bytes)),
        Error::ValueTooLarge(bytes) => (10, Some(bytes)),
        Error::WriteTooLarge(bytes) => (11, Some(bytes)),
        Error::ReplyTooLarge(bytes) => (12, Some(bytes)),
        Error::TooLargeToCompare(bytes) => (13, Some(bytes)),
        Error::OutOfMemory { .. }
        | Error::Overloaded
        | Error::DiskFull
        | Error::LogFailed(_)
        | Error::NotLeader
        | Error::OutcomeUnknown
        | Error::AnswerGone
        | Error::Stopping
        | Error::NoLeader { .. } => return None,
    })
}

fn put_tagged(out: &mut Vec<u8>, tag: u8, number: u64) {
    out.push(tag);
    put_number(out, number);
}

pub(super) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    put_bytes(out, &value.bytes);
    put_number(out, value.version);
    put_expiry(out, value.expires_at_ms);
}

fn put_expiry(out: &mut Vec<u8>, expires_at_ms: Option<UnixMillis>) {
    out.push(u8::from(expires_at_ms.is_some()));
    expires_at_ms.iter().for_each(|at| out.extend_from_slice(&at.to_le_bytes()));
}

fn put_description(out: &mut Vec<u8>, description: &Description) {
    put_tagged(out, DESCRIBED, description.version);
    put_expiry(out, description.expires_at_ms);
    put_number(out, description.value_bytes as u64);
    put_number(out, description.written_at_s.into());
    put_number(out, description.memory_bytes as u64);
}

fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

/// What is left of bytes that may be anything.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    pub(super) fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if part << shift >> shift != part {
                return None;
            }
            number |= part << shift;
            if byte & 0x80 == 0 {
                return (byte != 0 || shift == 0).then_some(number);
            }
        }
        None
    }

    fn size(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok()
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = self.size()?;
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    fn expiry(&mut self) -> Option<Option<UnixMillis>> {
        Some(if self.flag()? { Some(self.word()?) } else { None })
    }

    fn value(&mut self) -> Option<Value> {
        let bytes = self.bytes()?.to_vec();
        let (version, expires_at_ms) = (self.number()?, self.expiry()?);
        Some(Value { bytes, version, expires_at_ms })
    }

    /// As many as a number says, each of at least one byte.
    fn several<T>(&mut self, one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let (count, mut one) = (self.size()?, one);
        if count > self.0.len() {
            return None;
        }
        let mut several = Vec::with_capacity(count);
        for _ in 0..count {
            several.push(one(self)?);
        }
        Some(several)
    }

    fn reply(&mut self, depth: usize) -> Option<Reply> {
        Some(match self.byte()? {
            WRITTEN => Reply::Written { version: self.number()? },
            NOT_WRITTEN => Reply::NotWritten { version: self.number()? },
            INTEGER => Reply::Integer(self.signed()?),
            COUNTER => Reply::Counter { value: self.signed()?, version: self.number()? },
            NO_VALUE => Reply::Value(None),
            VALUE => Reply::Value(Some(self.value()?)),
            PREVIOUS => {
                let flags = self.byte()?;
                let previous = if flags & 2 == 0 { None } else { Some(self.value()?) };
                (flags < 4).then_some(Reply::Previous { previous, written: flags & 1 != 0 })?
            }
            BYTES => Reply::Bytes(self.bytes()?.to_vec()),
            VALUES => Reply::Values(self.several(|reader| {
                Some(if reader.flag()? { Some(reader.value()?) } else { None })
            })?),
            ABORTED => Reply::Aborted { position: self.size()?.checked_sub(1) },
            MANY => {
                let depth = depth.checked_sub(1)?;
                Reply::Many(self.several(|reader| reader.reply(depth))?)
            }
            LCS => {
                let bytes = self.bytes()?.to_vec();
                let runs = self.several(|reader| {
                    let left = reader.size()?..reader.size()?;
                    Some(LcsRun { left, right: reader.size()?..reader.size()? })
                })?;
                Reply::Lcs(Lcs { bytes, runs })
            }
            NOT_DESCRIBED => Reply::Described(None),
            DESCRIBED => Reply::Described(Some(Description {
                version: self.number()?,
                expires_at_ms: self.expiry()?,
                value_bytes: self.size()?,
                written_at_s: u32::try_from(self.number()?).ok()?,
                memory_bytes: self.size()?,
            })),
            ERROR => Reply::Error(self.error()?),
            _ => return None,
        })
    }

    fn error(&mut self) -> Option<Error> {
        Some(match self.byte()? {
            1 => Error::NotInteger,
            2 => Error::NotFloat,
            3 => Error::Overflow,
            4 => Error::NotFinite,
            5 => Error::OffsetOutOfRange,
            6 => Error::InvalidExpiry,
            7 => Error::NoSuchKey,
            8 => Error::EmptyKey,
            9 => Error::KeyTooLong(self.size()?),
            10 => Error::ValueTooLarge(self.size()?),
            11 => Error::WriteTooLarge(self.size()?),
            12 => Error::ReplyTooLarge(self.size()?),
            13 => Error::TooLargeToCompare(self.size()?),
            _ => return None,
        })
    }
}
