//! What a partition's log replicates: the effects of writes, in batches.
//!
//! The payload of one Raft entry is one batch. Followers and recovery apply its effects as they are:
//! nothing in here depends on a clock, on what a key held before, or on how a command was evaluated.
//! A batch also holds the answers that must be known again when a write is repeated (see `session`).
//! What this module does not do: frame or checksum the payload (`flux-log` does), decide what a
//! command writes (`evaluate` does), or touch a table (`draft::apply` does).
//!
//! # Format 1
//!
//! Integers are little endian. A varint is LEB128 (seven bits to a byte, lowest first, the high bit
//! set on all but the last), in as few bytes as the number needs and at most four.
//!
//! ```text
//! batch   format          u8    1
//!         committed_at_ms u64   the leader's clock when it evaluated the batch, Unix milliseconds
//!         first_revision  u64   of the first effect; each further one takes the next revision
//!         effect*               up to the end of the payload; none, if there are answers only
//!
//! effect  kind            u8
//!   0x01  put                   varint key length, varint value length, key, value
//!   0x02  put, expiring         varint key length, varint value length,
//!                               u64 expires_at_ms, key, value
//!   0x03  delete, explicit      varint key length, key
//!   0x04  delete, expired       varint key length, key
//!   0x81  answer                u64 session, u64 sequence, u64 acked_below,
//!                               varint reply length, reply; takes no revision
//! ```
//!
//! Kind 0x00 is never used, so that zeros do not decode. Kinds 0x05 to 0x7f are for further effects
//! that take a revision, kinds 0x80 to 0xff for effects that take none; a reader that does not know a
//! kind refuses the batch. A key has 1 to `MAX_KEY_BYTES` bytes, a value 0 to `MAX_VALUE_BYTES`,
//! a reply 0 to `MAX_ANSWER_BYTES`: its format is that of `session`, and one that is not kept is empty.

use crate::session::{MAX_ANSWER_BYTES, Once};
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision, UnixMillis};

const FORMAT: u8 = 1;
const PUT: u8 = 0x01;
const PUT_EXPIRING: u8 = 0x02;
const DELETE_EXPLICIT: u8 = 0x03;
const DELETE_EXPIRED: u8 = 0x04;
const ANSWER: u8 = 0x81;

/// The length of a batch's header.
pub const HEADER_BYTES: usize = 1 + 8 + 8;

/// The most that one effect takes besides its key and value.
pub const EFFECT_OVERHEAD_BYTES: usize = 1 + 4 + 4 + 8;

/// One change of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<'a> {
    /// The key now has this value and expiry, whatever it had before.
    Put {
        /// The key.
        key: &'a [u8],
        /// Its whole new value.
        value: &'a [u8],
        /// When it expires, if it does.
        expires_at_ms: Option<UnixMillis>,
    },
    /// The key is gone.
    Delete {
        /// The key.
        key: &'a [u8],
        /// Why it is gone.
        reason: Reason,
    },
}

impl<'a> Effect<'a> {
    /// The key that changes.
    pub fn key(&self) -> &'a [u8] {
        match *self {
            Effect::Put { key, .. } | Effect::Delete { key, .. } => key,
        }
    }
}

/// What a batch consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// A change, with the revision that it takes.
    Effect(Revision, Effect<'a>),
    /// What a write was answered.
    Answer {
        /// Which write.
        once: Once,
        /// The answer as `session` encodes it; empty if it is not kept.
        reply: &'a [u8],
    },
}

/// Why a key was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A command removed it.
    Explicit,
    /// Its time was up.
    Expired,
}

/// Why a payload is not a batch that can be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EffectError {
    /// The first byte is none that this version knows.
    #[error("batch format {0} is unknown; it may come from a newer version")]
    Format(u8),
    /// The payload ends within the header or an effect.
    #[error("batch ends inside the part at offset {offset}")]
    Truncated {
        /// Where the part that is cut off starts.
        offset: usize,
    },
    /// An effect of a kind that this version does not know.
    #[error(
        "effect kind {kind:#04x} at offset {offset} is unknown; it may come from a newer version"
    )]
    Kind {
        /// The kind byte.
        kind: u8,
        /// Where the effect starts.
        offset: usize,
    },
    /// A length that is over its limit or not in its shortest form, or an empty key.
    #[error("effect at offset {offset} has an invalid length")]
    Length {
        /// Where the effect starts.
        offset: usize,
    },
    /// The batch does not follow on what was applied before it.
    #[error("batch starts at revision {found} where {expected} is next")]
    Revision {
        /// The revision that would follow.
        expected: Revision,
        /// The one in the batch.
        found: Revision,
    },
}

/// Encodes one batch into a buffer that it can be given and gives back, so that it can be reused.
///
/// Nothing but the buffer's growth allocates. Keys and values must be within the limits of the
/// format; callers check them (`evaluate` does) since they have a client to tell.
#[derive(Debug, Default)]
pub struct BatchWriter {
    payload: Vec<u8>,
}

impl BatchWriter {
    /// A writer into this buffer, which is emptied.
    pub fn new(mut buffer: Vec<u8>) -> BatchWriter {
        buffer.clear();
        BatchWriter { payload: buffer }
    }

    /// Writes the header; to be called once, before the first effect.
    pub fn start(&mut self, committed_at_ms: UnixMillis, first_revision: Revision) {
        debug_assert!(self.payload.is_empty());
        self.payload.push(FORMAT);
        self.payload.extend_from_slice(&committed_at_ms.to_le_bytes());
        self.payload.extend_from_slice(&first_revision.to_le_bytes());
    }

    /// Adds a put and returns the offset at which it starts.
    pub fn put(&mut self, key: &[u8], value: &[u8], expires_at_ms: Option<UnixMillis>) -> usize {
        self.put_built(key, value.len(), expires_at_ms, |payload| {
            payload.extend_from_slice(value);
        })
    }

    /// Adds a put whose value `build` appends to the payload, exactly `value_bytes` of it, and returns
    /// the offset at which it starts. `build` sees the payload so far and may copy from it.
    pub fn put_built(
        &mut self,
        key: &[u8],
        value_bytes: usize,
        expires_at_ms: Option<UnixMillis>,
        build: impl FnOnce(&mut Vec<u8>),
    ) -> usize {
        debug_assert!(!key.is_empty() && key.len() <= MAX_KEY_BYTES);
        debug_assert!(value_bytes <= MAX_VALUE_BYTES);
        let offset = self.payload.len();
        self.payload.reserve(EFFECT_OVERHEAD_BYTES + key.len() + value_bytes);
        self.payload.push(if expires_at_ms.is_some() { PUT_EXPIRING } else { PUT });
        write_varint(&mut self.payload, key.len());
        write_varint(&mut self.payload, value_bytes);
        if let Some(at) = expires_at_ms {
            self.payload.extend_from_slice(&at.to_le_bytes());
        }
        self.payload.extend_from_slice(key);
        let value_at = self.payload.len();
        build(&mut self.payload);
        assert_eq!(self.payload.len(), value_at + value_bytes, "a value of the announced length");
        offset
    }

    /// Adds a delete and returns the offset at which it starts.
    pub fn delete(&mut self, key: &[u8], reason: Reason) -> usize {
        debug_assert!(!key.is_empty() && key.len() <= MAX_KEY_BYTES);
        let offset = self.payload.len();
        self.payload.reserve(EFFECT_OVERHEAD_BYTES + key.len());
        self.payload.push(match reason {
            Reason::Explicit => DELETE_EXPLICIT,
            Reason::Expired => DELETE_EXPIRED,
        });
        write_varint(&mut self.payload, key.len());
        self.payload.extend_from_slice(key);
        offset
    }

    /// Adds an answer, encoded by `session`, and returns the offset at which it starts.
    pub(crate) fn answer(&mut self, once: &Once, reply: &[u8]) -> usize {
        debug_assert!(reply.len() <= MAX_ANSWER_BYTES);
        let offset = self.payload.len();
        self.payload.reserve(1 + 3 * 8 + 4 + reply.len());
        self.payload.push(ANSWER);
        for word in [once.session, once.sequence, once.acked_below] {
            self.payload.extend_from_slice(&word.to_le_bytes());
        }
        write_varint(&mut self.payload, reply.len());
        self.payload.extend_from_slice(reply);
        offset
    }

    /// Takes back what starts at `offset` and all after it.
    pub fn truncate(&mut self, offset: usize) {
        self.payload.truncate(offset);
    }

    /// What was written so far; empty before `start`.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// What the buffer holds without growing.
    pub fn capacity(&self) -> usize {
        self.payload.capacity()
    }

    /// The buffer.
    pub fn into_inner(self) -> Vec<u8> {
        self.payload
    }
}

/// The effects of a batch with their revisions, in order, without the answers between them. Ends after
/// the first error.
#[derive(Clone, Debug)]
pub struct Effects<'a>(Parts<'a>);

impl<'a> Effects<'a> {
    /// Reads a batch's header.
    ///
    /// # Errors
    ///
    /// If the payload is not a batch of this format.
    pub fn new(payload: &'a [u8]) -> Result<Effects<'a>, EffectError> {
        Parts::new(payload).map(Effects)
    }

    /// The leader's time when it evaluated the batch.
    pub fn committed_at_ms(&self) -> UnixMillis {
        self.0.committed_at_ms
    }

    /// The revision of the effect that comes next; before iteration, the batch's first.
    pub fn next_revision(&self) -> Revision {
        self.0.next_revision
    }
}

impl<'a> Iterator for Effects<'a> {
    type Item = Result<(Revision, Effect<'a>), EffectError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.next()? {
                Ok(Part::Effect(revision, effect)) => return Some(Ok((revision, effect))),
                Ok(Part::Answer { .. }) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Everything in a batch, in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    payload: &'a [u8],
    offset: usize,
    next_revision: Revision,
    committed_at_ms: UnixMillis,
}

impl<'a> Parts<'a> {
    /// Reads a batch's header.
    ///
    /// # Errors
    ///
    /// If the payload is not a batch of this format.
    pub fn new(payload: &'a [u8]) -> Result<Parts<'a>, EffectError> {
        let truncated = EffectError::Truncated { offset: 0 };
        let (&format, rest) = payload.split_first().ok_or(truncated.clone())?;
        if format != FORMAT {
            return Err(EffectError::Format(format));
        }
        let (committed_at, rest) = rest.split_first_chunk().ok_or(truncated.clone())?;
        let (first_revision, _) = rest.split_first_chunk().ok_or(truncated)?;
        Ok(Parts {
            payload,
            offset: HEADER_BYTES,
            next_revision: u64::from_le_bytes(*first_revision),
            committed_at_ms: u64::from_le_bytes(*committed_at),
        })
    }

    /// The leader's time when it evaluated the batch.
    pub fn committed_at_ms(&self) -> UnixMillis {
        self.committed_at_ms
    }

    /// The revision of the effect that comes next; before iteration, the batch's first.
    pub fn next_revision(&self) -> Revision {
        self.next_revision
    }

    fn decode_next(&mut self) -> Result<Part<'a>, EffectError> {
        if self.payload.get(self.offset) == Some(&ANSWER) {
            let (once, reply, end) = decode_answer_at(self.payload, self.offset)?;
            self.offset = end;
            return Ok(Part::Answer { once, reply });
        }
        let (effect, end) = decode_at(self.payload, self.offset)?;
        let revision = self.next_revision;
        // Only a forged batch comes near the end of the revisions.
        let next = revision.checked_add(1);
        self.next_revision = next.ok_or(EffectError::Revision { expected: 0, found: revision })?;
        self.offset = end;
        Ok(Part::Effect(revision, effect))
    }
}

impl<'a> Iterator for Parts<'a> {
    type Item = Result<Part<'a>, EffectError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.payload.len() {
            return None;
        }
        let part = self.decode_next();
        if part.is_err() {
            self.offset = self.payload.len();
        }
        Some(part)
    }
}

/// The effect that starts at `offset`, and the offset at which it ends.
pub(crate) fn decode_at(payload: &[u8], offset: usize) -> Result<(Effect<'_>, usize), EffectError> {
    let truncated = EffectError::Truncated { offset };
    let rest = payload.get(offset..).unwrap_or_default();
    let (&kind, rest) = rest.split_first().ok_or(truncated.clone())?;
    if !(PUT..=DELETE_EXPIRED).contains(&kind) {
        return Err(EffectError::Kind { kind, offset });
    }
    let (key_bytes, rest) = read_varint(rest, offset)?;
    if key_bytes == 0 || key_bytes > MAX_KEY_BYTES {
        return Err(EffectError::Length { offset });
    }
    if kind == DELETE_EXPLICIT || kind == DELETE_EXPIRED {
        let (key, rest) = rest.split_at_checked(key_bytes).ok_or(truncated)?;
        let reason = if kind == DELETE_EXPIRED { Reason::Expired } else { Reason::Explicit };
        return Ok((Effect::Delete { key, reason }, payload.len() - rest.len()));
    }
    let (value_bytes, mut rest) = read_varint(rest, offset)?;
    if value_bytes > MAX_VALUE_BYTES {
        return Err(EffectError::Length { offset });
    }
    let mut expires_at_ms = None;
    if kind == PUT_EXPIRING {
        let (at, after) = rest.split_first_chunk().ok_or(truncated.clone())?;
        expires_at_ms = Some(u64::from_le_bytes(*at));
        rest = after;
    }
    let (key, rest) = rest.split_at_checked(key_bytes).ok_or(truncated.clone())?;
    let (value, rest) = rest.split_at_checked(value_bytes).ok_or(truncated)?;
    Ok((Effect::Put { key, value, expires_at_ms }, payload.len() - rest.len()))
}

/// The answer that starts at `offset`, and the offset at which it ends.
pub(crate) fn decode_answer_at(
    payload: &[u8],
    offset: usize,
) -> Result<(Once, &[u8], usize), EffectError> {
    let truncated = EffectError::Truncated { offset };
    // The kind is known.
    let mut rest = payload.get(offset + 1..).unwrap_or_default();
    let mut word = || -> Result<u64, EffectError> {
        let (word, after) = rest.split_first_chunk().ok_or(truncated.clone())?;
        rest = after;
        Ok(u64::from_le_bytes(*word))
    };
    let once = Once { session: word()?, sequence: word()?, acked_below: word()? };
    let (reply_bytes, rest) = read_varint(rest, offset)?;
    if reply_bytes > MAX_ANSWER_BYTES {
        return Err(EffectError::Length { offset });
    }
    let (reply, rest) = rest.split_at_checked(reply_bytes).ok_or(truncated)?;
    Ok((once, reply, payload.len() - rest.len()))
}

fn write_varint(payload: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        payload.push(number as u8 | 0x80);
        number >>= 7;
    }
    payload.push(number as u8);
}

fn read_varint(bytes: &[u8], offset: usize) -> Result<(usize, &[u8]), EffectError> {
    let mut number = 0;
    for (position, &byte) in bytes.iter().take(4).enumerate() {
        number |= usize::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            let shortest = byte != 0 || position == 0;
            let valid = shortest.then_some((number, &bytes[position + 1..]));
            return valid.ok_or(EffectError::Length { offset });
        }
    }
    Err(if bytes.len() < 4 {
        EffectError::Truncated { offset }
    } else {
        EffectError::Length { offset }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_batch_is_what_the_format_says() {
        let mut writer = BatchWriter::new(vec![9; 100]);
        writer.start(0x0102, 7);
        writer.put(b"k", b"vv", None);
        writer.put(b"k", b"", Some(0x0304));
        writer.delete(b"key", Reason::Explicit);
        let last = writer.delete(b"k", Reason::Expired);
        let expected = [
            &[1, 2, 1, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0][..],
            &[1, 1, 2, b'k', b'v', b'v'],
            &[2, 1, 0, 4, 3, 0, 0, 0, 0, 0, 0, b'k'],
            &[3, 3, b'k', b'e', b'y'],
            &[4, 1, b'k'],
        ]
        .concat();
        assert_eq!(writer.payload(), expected);
        assert_eq!(last, expected.len() - 3);

        let effects = Effects::new(writer.payload()).expect("a valid header");
        assert_eq!((effects.committed_at_ms(), effects.next_revision()), (0x0102, 7));
        let effects: Result<Vec<_>, _> = effects.collect();
        let expected = vec![
            (7, Effect::Put { key: b"k", value: b"vv", expires_at_ms: None }),
            (8, Effect::Put { key: b"k", value: b"", expires_at_ms: Some(0x0304) }),
            (9, Effect::Delete { key: b"key", reason: Reason::Explicit }),
            (10, Effect::Delete { key: b"k", reason: Reason::Expired }),
        ];
        assert_eq!(effects, Ok(expected));
    }

    #[test]
    fn an_answer_is_what_the_format_says() {
        let once = Once { session: 0x0102, sequence: 3, acked_below: 2 };
        let mut writer = BatchWriter::default();
        writer.start(0, 7);
        writer.answer(&once, b"reply");
        writer.delete(b"k", Reason::Explicit);
        let last = writer.answer(&once, b"");
        let words = [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
        let expected = [
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0x81][..],
            &words,
            b"\x05reply",
            &[3, 1, b'k', 0x81],
            &words,
            &[0],
        ]
        .concat();
        assert_eq!(writer.payload(), expected);
        assert_eq!(last, expected.len() - 26);

        let delete = (7, Effect::Delete { key: b"k", reason: Reason::Explicit });
        let parts: Result<Vec<_>, _> = Parts::new(writer.payload()).expect("a header").collect();
        let expected = vec![
            Part::Answer { once, reply: b"reply" },
            Part::Effect(delete.0, delete.1),
            Part::Answer { once, reply: b"" },
        ];
        assert_eq!(parts, Ok(expected));
        let effects: Result<Vec<_>, _> =
            Effects::new(writer.payload()).expect("a header").collect();
        assert_eq!(effects, Ok(vec![delete]));
    }

    #[test]
    fn damage_is_an_error_that_says_where() {
        let header = [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        let decode = |tail: &[u8]| {
            let payload = [&header[..], tail].concat();
            Effects::new(&payload).and_then(|mut effects| {
                let first = effects.next().expect("an effect or an error").map(|_| ());
                assert!(first.is_ok() || effects.next().is_none());
                first
            })
        };
        assert_eq!(decode(&[3, 1, b'k']), Ok(()));
        assert_eq!(Effects::new(&[]).err(), Some(EffectError::Truncated { offset: 0 }));
        assert_eq!(Effects::new(&header[..16]).err(), Some(EffectError::Truncated { offset: 0 }));
        assert_eq!(Effects::new(&[2; 17]).err(), Some(EffectError::Format(2)));
        let truncated = Err(EffectError::Truncated { offset: 17 });
        assert_eq!(decode(&[3]), truncated);
        assert_eq!(decode(&[3, 0x81]), truncated);
        assert_eq!(decode(&[3, 2, b'k']), truncated);
        assert_eq!(decode(&[1, 1, 1, b'k']), truncated);
        assert_eq!(decode(&[2, 1, 1, 0, 0, b'k', b'v']), truncated);
        for kind in [0, 5, 0x80, 0x82, 0xff] {
            assert_eq!(decode(&[kind, 1, b'k']), Err(EffectError::Kind { kind, offset: 17 }));
        }
        assert_eq!(decode(&[0x81; 20]), truncated);
        assert_eq!(decode(&[&[0x81; 25][..], &[2, 0]].concat()), truncated);
        let length = Err(EffectError::Length { offset: 17 });
        assert_eq!(decode(&[&[0x81; 25][..], &[0x81, 0x20], &[0; 4097]].concat()), length);
        assert_eq!(decode(&[3, 0]), length, "an empty key");
        assert_eq!(decode(&[3, 0x81, 0, b'k']), length, "not the shortest form");
        assert_eq!(decode(&[3, 0x81, 0x80, 4]), length, "a key over the limit");
        assert_eq!(decode(&[1, 1, 0x81, 0x80, 0x80, 8]), length, "a value over the limit");
        assert_eq!(decode(&[3, 0xff, 0xff, 0xff, 0xff, 0x7f]), length);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            effects in proptest::collection::vec(
                (
                    proptest::collection::vec(any::<u8>(), 1..200),
                    proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
                    any::<Option<u64>>(),
                ),
                0..10,
            ),
            first in 0u64..u64::MAX / 2,
        ) {
            let mut writer = BatchWriter::default();
            writer.start(5, first);
            for (key, value, expires_at_ms) in &effects {
                match value {
                    Some(value) => writer.put(key, value, *expires_at_ms),
                    None => writer.delete(key, Reason::Explicit),
                };
            }
            let read: Vec<_> = Effects::new(writer.payload()).unwrap().map(Result::unwrap).collect();
            let written: Vec<_> = (first..)
                .zip(effects.iter().map(|(key, value, expires_at_ms)| match value {
                    Some(value) => Effect::Put { key, value, expires_at_ms: *expires_at_ms },
                    None => Effect::Delete { key, reason: Reason::Explicit },
                }))
                .collect();
            prop_assert_eq!(read, written);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            valid_header in any::<bool>(),
            bytes in proptest::collection::vec(prop_oneof![0u8..6, Just(ANSWER), any::<u8>()], 0..200),
        ) {
            let mut payload = bytes;
            if valid_header && !payload.is_empty() {
                payload[0] = FORMAT;
            }
            if let Ok(parts) = Parts::new(&payload) {
                prop_assert!(parts.count() <= payload.len());
            }
        }
    }
}
