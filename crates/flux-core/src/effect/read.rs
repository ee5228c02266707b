//! Batches as they come from the log: the format of `effect`, as it is read.
//!
//! The bytes may be anything. What a batch means for a table is not known here.

use super::{
    ANSWER, CURSOR, Change, Cursor, DELETE_EXPIRED, DELETE_EXPLICIT, Effect, EffectError, FORMAT,
    HEADER_BYTES, NO_TRACE, PREVIOUS_VALUES, PREVIOUS_VERSIONS, PUT, PUT_EXPIRING, Part, Reason,
    TRACE, Trace,
};
use crate::session::{MAX_ANSWER_BYTES, Once};
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision, UnixMillis};

/// The bytes of the longest varint, and of the longest varint64.
const VARINT_BYTES: usize = 4;
const VARINT64_BYTES: usize = 10;

/// The effects of a batch with their revisions, in order, without the other parts. Ends after
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
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The effects of a batch, each with all that the batch knows of it.
#[derive(Clone, Debug)]
pub struct Changes<'a> {
    parts: Parts<'a>,
    versions: PreviousVersions<'a>,
    values: PreviousValues<'a>,
    trace: Option<&'a Trace>,
}

impl<'a> Changes<'a> {
    /// Reads the whole batch, so that nothing can be wrong with it later.
    ///
    /// # Errors
    ///
    /// If the payload is not a batch of this format.
    pub fn new(payload: &'a [u8]) -> Result<Changes<'a>, EffectError> {
        let parts = Parts::new(payload)?;
        let mut versions = PreviousVersions { revision: parts.next_revision, bytes: &[] };
        let mut values = PreviousValues { bytes: &[] };
        for part in parts.clone() {
            match part? {
                Part::PreviousVersions(found) => versions = found,
                Part::PreviousValues(found) => values = found,
                Part::Effect(..) | Part::Answer { .. } | Part::Trace(_) | Part::Cursor(_) => {}
            }
        }
        Ok(Changes { parts, versions, values, trace: None })
    }

    /// The leader's time when it evaluated the batch.
    pub fn committed_at_ms(&self) -> UnixMillis {
        self.parts.committed_at_ms
    }

    /// The revision of the change that comes next; before iteration, the batch's first.
    pub fn next_revision(&self) -> Revision {
        self.parts.next_revision
    }
}

impl<'a> Iterator for Changes<'a> {
    type Item = Change<'a>;

    fn next(&mut self) -> Option<Change<'a>> {
        // `new` has seen that there are no errors.
        while let Some(Ok(part)) = self.parts.next() {
            match part {
                Part::Trace(trace) => self.trace = trace,
                Part::Effect(revision, effect) => {
                    let previous = self.versions.next().unwrap_or(0);
                    let previous_value = self.values.next().flatten();
                    let trace = self.trace;
                    return Some(Change { revision, effect, previous, previous_value, trace });
                }
                _ => {}
            }
        }
        None
    }
}

/// How far changes have been passed on, if the batch says so.
///
/// # Errors
///
/// If the payload is not a batch of this format.
pub fn cursor_of(payload: &[u8]) -> Result<Option<Cursor>, EffectError> {
    let mut newest = None;
    for part in Parts::new(payload)? {
        if let Part::Cursor(cursor) = part? {
            newest = newest.max(Some(cursor));
        }
    }
    Ok(newest)
}

/// The versions that the keys of a batch's effects had before, one for each effect; 0 for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousVersions<'a> {
    /// That of the effect which is next.
    revision: Revision,
    /// What is left; it was looked through before.
    bytes: &'a [u8],
}

impl Iterator for PreviousVersions<'_> {
    type Item = Revision;

    fn next(&mut self) -> Option<Revision> {
        let (distance, rest) = read_varint64(self.bytes, 0).ok()?;
        let version = if distance == 0 { 0 } else { self.revision.checked_sub(distance)? };
        self.bytes = rest;
        self.revision += 1;
        Some(version)
    }
}

/// The values that the keys of a batch's effects had before, one for each effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousValues<'a> {
    /// What is left; it was looked through before.
    bytes: &'a [u8],
}

impl<'a> Iterator for PreviousValues<'a> {
    type Item = Option<&'a [u8]>;

    fn next(&mut self) -> Option<Option<&'a [u8]>> {
        let (value, rest) = read_previous_value(self.bytes, 0).ok()?;
        self.bytes = rest;
        Some(value)
    }
}

/// Everything in a batch, in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    payload: &'a [u8],
    offset: usize,
    first_revision: Revision,
    /// The kind of the last part, if it is one of those that end a batch; else 0.
    ended_by: u8,
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
        let first_revision = u64::from_le_bytes(*first_revision);
        Ok(Parts {
            payload,
            offset: HEADER_BYTES,
            first_revision,
            ended_by: 0,
            next_revision: first_revision,
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
        let kind = self.payload.get(self.offset).copied().unwrap_or_default();
        if kind > DELETE_EXPIRED {
            return self.decode_other(kind);
        }
        if self.ended_by != 0 {
            return Err(EffectError::Misplaced { offset: self.offset });
        }
        let (effect, end) = decode_at(self.payload, self.offset)?;
        let revision = self.next_revision;
        // Only a forged batch comes near the end of the revisions.
        let next = revision.checked_add(1);
        self.next_revision = next.ok_or(EffectError::Revision { expected: 0, found: revision })?;
        self.offset = end;
        Ok(Part::Effect(revision, effect))
    }

    /// The next part, which is none that takes a revision.
    fn decode_other(&mut self, kind: u8) -> Result<Part<'a>, EffectError> {
        let (payload, offset) = (self.payload, self.offset);
        let follows = match kind {
            PREVIOUS_VALUES => PREVIOUS_VERSIONS,
            ANSWER | TRACE | CURSOR | PREVIOUS_VERSIONS => 0,
            _ => return Err(EffectError::Kind { kind, offset }),
        };
        if self.ended_by != follows {
            return Err(EffectError::Misplaced { offset });
        }
        // The kind is known.
        let body = &payload[offset + 1..];
        let truncated = EffectError::Truncated { offset };
        let (part, rest) = match kind {
            ANSWER => {
                let (once, reply, end) = decode_answer_at(payload, offset)?;
                (Part::Answer { once, reply }, &payload[end..])
            }
            TRACE => {
                let (trace, rest) = body.split_first_chunk().ok_or(truncated)?;
                (Part::Trace((*trace != NO_TRACE).then_some(trace)), rest)
            }
            CURSOR => {
                let (revision, rest) = body.split_first_chunk().ok_or(truncated.clone())?;
                let (index, rest) = rest.split_first_chunk().ok_or(truncated)?;
                let revision = u64::from_le_bytes(*revision);
                (Part::Cursor(Cursor { revision, index: u64::from_le_bytes(*index) }), rest)
            }
            PREVIOUS_VERSIONS => {
                self.ended_by = kind;
                let (bytes, rest) = self.split_versions(body)?;
                let revision = self.first_revision;
                (Part::PreviousVersions(PreviousVersions { revision, bytes }), rest)
            }
            _ => {
                self.ended_by = kind;
                let (bytes, rest) = self.split_values(body)?;
                (Part::PreviousValues(PreviousValues { bytes }), rest)
            }
        };
        self.offset = payload.len() - rest.len();
        Ok(part)
    }

    /// What is before the end of the previous versions, which are looked through, and what is after it.
    fn split_versions(&self, body: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), EffectError> {
        let mut rest = body;
        for revision in self.first_revision..self.next_revision {
            let (distance, after) = read_varint64(rest, self.offset)?;
            if distance >= revision {
                return Err(EffectError::Length { offset: self.offset });
            }
            rest = after;
        }
        Ok(body.split_at(body.len() - rest.len()))
    }

    fn split_values(&self, body: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), EffectError> {
        let mut rest = body;
        for _ in self.first_revision..self.next_revision {
            rest = read_previous_value(rest, self.offset)?.1;
        }
        Ok(body.split_at(body.len() - rest.len()))
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

fn read_previous_value(bytes: &[u8], offset: usize) -> Result<(Option<&[u8]>, &[u8]), EffectError> {
    let (length, rest) = read_varint(bytes, offset)?;
    let Some(length) = length.checked_sub(1) else {
        return Ok((None, rest));
    };
    if length > MAX_VALUE_BYTES {
        return Err(EffectError::Length { offset });
    }
    let split = rest.split_at_checked(length);
    split.map(|(value, rest)| (Some(value), rest)).ok_or(EffectError::Truncated { offset })
}

fn read_varint(bytes: &[u8], offset: usize) -> Result<(usize, &[u8]), EffectError> {
    let (number, rest) = read_number::<VARINT_BYTES>(bytes, offset)?;
    Ok((number as usize, rest))
}

fn read_varint64(bytes: &[u8], offset: usize) -> Result<(u64, &[u8]), EffectError> {
    read_number::<VARINT64_BYTES>(bytes, offset)
}

/// A varint of at most so many bytes, and what follows it. Inlined, since nearly all have one or two.
#[inline]
fn read_number<const BYTES: usize>(
    bytes: &[u8],
    offset: usize,
) -> Result<(u64, &[u8]), EffectError> {
    let mut number = 0;
    for (position, &byte) in bytes.iter().take(BYTES).enumerate() {
        let seven = u64::from(byte & 0x7f);
        let shifted = seven << (7 * position);
        number |= shifted;
        if byte & 0x80 == 0 {
            let shortest = byte != 0 || position == 0;
            let whole = shifted >> (7 * position) == seven;
            let valid = (shortest && whole).then_some((number, &bytes[position + 1..]));
            return valid.ok_or(EffectError::Length { offset });
        }
    }
    Err(if bytes.len() < BYTES {
        EffectError::Truncated { offset }
    } else {
        EffectError::Length { offset }
    })
}
