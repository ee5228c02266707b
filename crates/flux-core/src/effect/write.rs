//! Batches on their way into the log: the format of `effect`, as it is written.
//!
//! What goes into a batch, and when it is full, is not decided here.

use super::{
    ANSWER, CURSOR, Cursor, DELETE_EXPIRED, DELETE_EXPLICIT, EFFECT_OVERHEAD_BYTES, FORMAT,
    PREVIOUS_VALUES, PREVIOUS_VERSIONS, PUT, PUT_EXPIRING, Reason, TRACE, Trace,
};
use crate::session::{MAX_ANSWER_BYTES, Once};
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision, UnixMillis};

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
        write_varint(&mut self.payload, key.len() as u64);
        write_varint(&mut self.payload, value_bytes as u64);
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
        write_varint(&mut self.payload, key.len() as u64);
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
        write_varint(&mut self.payload, reply.len() as u64);
        self.payload.extend_from_slice(reply);
        offset
    }

    /// Adds where the effects that follow come from, and returns the offset at which it starts.
    pub fn trace(&mut self, trace: &Trace) -> usize {
        let offset = self.payload.len();
        self.payload.push(TRACE);
        self.payload.extend_from_slice(trace);
        offset
    }

    /// Adds how far changes have been passed on, and returns the offset at which it starts.
    pub fn cursor(&mut self, cursor: &Cursor) -> usize {
        let offset = self.payload.len();
        self.payload.push(CURSOR);
        self.payload.extend_from_slice(&cursor_bytes(cursor));
        offset
    }

    /// Puts another cursor in the place of the one that starts at `offset`.
    pub(crate) fn replace_cursor(&mut self, offset: usize, cursor: &Cursor) {
        self.payload[offset + 1..][..16].copy_from_slice(&cursor_bytes(cursor));
    }

    /// Begins the previous versions: after all effects, answers, traces and cursors. Then comes
    /// `previous_version` for each effect.
    pub fn begin_previous_versions(&mut self) {
        self.payload.push(PREVIOUS_VERSIONS);
    }

    /// Adds the version that the key of the next effect, of this revision, had before; 0 for none.
    pub fn previous_version(&mut self, revision: Revision, version: Revision) {
        debug_assert!(version < revision);
        let distance = if version == 0 { 0 } else { revision - version };
        write_varint(&mut self.payload, distance);
    }

    /// Begins the previous values: after the previous versions. Then comes `previous_value` for each effect.
    pub fn begin_previous_values(&mut self) {
        self.payload.push(PREVIOUS_VALUES);
    }

    /// Adds the value that the key of the next effect had before.
    pub fn previous_value(&mut self, value: Option<&[u8]>) {
        write_varint(&mut self.payload, value.map_or(0, |value| value.len() as u64 + 1));
        self.payload.extend_from_slice(value.unwrap_or_default());
    }

    /// Adds parts that were written elsewhere.
    pub(crate) fn append(&mut self, parts: &[u8]) {
        self.payload.extend_from_slice(parts);
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

fn cursor_bytes(cursor: &Cursor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&cursor.revision.to_le_bytes());
    bytes[8..].copy_from_slice(&cursor.index.to_le_bytes());
    bytes
}

fn write_varint(payload: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        payload.push(number as u8 | 0x80);
        number >>= 7;
    }
    payload.push(number as u8);
}
