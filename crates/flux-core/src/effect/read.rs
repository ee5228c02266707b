//! Batches as they come from the log: the format of `effect`, as it is read.
//!
//! The bytes may be anything. What a batch means for a table is not known here.

use super::{
    ANSWER, DELETE_EXPIRED, DELETE_EXPLICIT, Effect, EffectError, FORMAT, HEADER_BYTES, PUT,
    PUT_EXPIRING, Part, Reason,
};
use crate::session::{MAX_ANSWER_BYTES, Once};
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision, UnixMillis};

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
