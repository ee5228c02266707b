//! One key's record, and its bytes: the same in memory and in a snapshot chunk.
//!
//! ```text
//! small  flags u8 · key length u8  · value length u16 · version u48
//! wide   flags u8 · key length u32 · value length u32 · version u64
//! then   written_at_s u32 · expires_at_ms u64 (only if flags say so) · key · value
//! ```
//!
//! Integers are little-endian. Flag bit 0 means wide, bit 1 means that the key expires; the others are
//! zero. The limits on keys and values are checked here only for bytes that come from outside.

use thiserror::Error;

use super::slab;
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, UnixMillis};

const WIDE: u8 = 1;
const EXPIRES: u8 = 2;

/// The end of the small form's lengths and version.
const SMALL_HEAD: usize = 10;
/// The end of the wide form's lengths and version.
const WIDE_HEAD: usize = 17;

/// A key with its value and what is known of it, borrowed from wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Up to 64 KiB, any bytes, also none.
    pub key: &'a [u8],
    /// Up to 16 MiB, any bytes, also none.
    pub value: &'a [u8],
    /// The revision that wrote the key last.
    pub version: u64,
    /// When the key is gone, in Unix milliseconds; `None` if it stays.
    pub expires_at_ms: Option<UnixMillis>,
    /// When the key was written, in Unix seconds.
    pub written_at_s: u32,
}

impl<'a> Entry<'a> {
    /// Whether the key is gone at `now_ms`: its time of expiry has come or passed.
    pub fn is_expired(&self, now_ms: UnixMillis) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// The bytes of memory that a table takes for the entry, with its average share of the index.
    pub fn memory_bytes(&self) -> usize {
        slab::allocated(self.encoded_len()) + super::segment::AVERAGE_BYTES
    }

    fn is_wide(&self) -> bool {
        self.key.len() > usize::from(u8::MAX)
            || self.value.len() > usize::from(u16::MAX)
            || self.version >= 1 << 48
    }

    /// The length of the entry's bytes.
    pub(super) fn encoded_len(&self) -> usize {
        let head = if self.is_wide() { WIDE_HEAD } else { SMALL_HEAD };
        let expiry = if self.expires_at_ms.is_some() { 8 } else { 0 };
        head + 4 + expiry + self.key.len() + self.value.len()
    }

    /// Writes the entry's bytes at the start of `out`, which is long enough.
    #[inline]
    pub(super) fn write_to(&self, out: &mut [u8]) {
        let mut flags = 0;
        if self.expires_at_ms.is_some() {
            flags |= EXPIRES;
        }
        let head = if self.is_wide() {
            let key_len = u32::try_from(self.key.len()).expect("keys are at most 64 KiB");
            let value_len = u32::try_from(self.value.len()).expect("values are at most 16 MiB");
            out[1..5].copy_from_slice(&key_len.to_le_bytes());
            out[5..9].copy_from_slice(&value_len.to_le_bytes());
            out[9..17].copy_from_slice(&self.version.to_le_bytes());
            flags |= WIDE;
            WIDE_HEAD
        } else {
            let lengths = self.key.len() as u64 | (self.value.len() as u64) << 8;
            out[1..4].copy_from_slice(&lengths.to_le_bytes()[..3]);
            out[4..10].copy_from_slice(&self.version.to_le_bytes()[..6]);
            SMALL_HEAD
        };
        out[0] = flags;
        let (written_at, rest) = out[head..].split_at_mut(4);
        written_at.copy_from_slice(&self.written_at_s.to_le_bytes());
        let rest = match self.expires_at_ms {
            None => rest,
            Some(at) => {
                let (expiry, rest) = rest.split_at_mut(8);
                expiry.copy_from_slice(&at.to_le_bytes());
                rest
            }
        };
        let (key, rest) = rest.split_at_mut(self.key.len());
        key.copy_from_slice(self.key);
        rest[..self.value.len()].copy_from_slice(self.value);
    }

    /// Splits one entry off the front of `bytes`; `None` if its bytes end too early. Whatever the
    /// bytes are, this does not fail otherwise: unknown flags and limits are for `decode`.
    #[inline]
    pub(super) fn split_from(bytes: &'a [u8]) -> Option<(Entry<'a>, &'a [u8])> {
        let (&flags, _) = bytes.split_first()?;
        let (key_len, value_len, version, rest) = if flags & WIDE == 0 {
            let (head, rest) = bytes.split_first_chunk::<SMALL_HEAD>()?;
            let [_, k, v0, v1, n0, n1, n2, n3, n4, n5] = *head;
            let version = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, 0, 0]);
            (usize::from(k), usize::from(u16::from_le_bytes([v0, v1])), version, rest)
        } else {
            let rest = &bytes[1..];
            let (key_len, rest) = rest.split_first_chunk::<4>()?;
            let (value_len, rest) = rest.split_first_chunk::<4>()?;
            let (version, rest) = rest.split_first_chunk::<8>()?;
            let key_len = u32::from_le_bytes(*key_len) as usize;
            let value_len = u32::from_le_bytes(*value_len) as usize;
            (key_len, value_len, u64::from_le_bytes(*version), rest)
        };
        let (written_at, rest) = rest.split_first_chunk::<4>()?;
        let (expires_at_ms, rest) = if flags & EXPIRES == 0 {
            (None, rest)
        } else {
            let (at, rest) = rest.split_first_chunk::<8>()?;
            (Some(u64::from_le_bytes(*at)), rest)
        };
        let (key, rest) = rest.split_at_checked(key_len)?;
        let (value, rest) = rest.split_at_checked(value_len)?;
        let written_at_s = u32::from_le_bytes(*written_at);
        Some((Entry { key, value, version, expires_at_ms, written_at_s }, rest))
    }

    /// Reads bytes that `write_to` wrote.
    #[inline]
    pub(super) fn view(bytes: &'a [u8]) -> Entry<'a> {
        Entry::split_from(bytes).expect("the table wrote these bytes").0
    }
}

/// Appends an entry as it stands in a snapshot chunk.
pub fn encode_entry(entry: &Entry<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + entry.encoded_len(), 0);
    entry.write_to(&mut out[start..]);
}

/// Why the bytes of a snapshot chunk are not a row of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChunkError {
    /// The chunk ends inside the entry.
    #[error("the entry at byte {offset} of the chunk is cut short")]
    Truncated {
        /// Where in the chunk the entry starts.
        offset: usize,
    },
    /// The entry has flags that no entry has.
    #[error("the entry at byte {offset} of the chunk has unknown flags {flags:#04x}")]
    Flags {
        /// Where in the chunk the entry starts.
        offset: usize,
        /// The flags found.
        flags: u8,
    },
    /// The key or the value is longer than any may be.
    #[error("the entry at byte {offset} of the chunk is over the limit of a key or value")]
    TooLong {
        /// Where in the chunk the entry starts.
        offset: usize,
    },
}

/// The entries of a snapshot chunk, in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct ChunkEntries<'a> {
    chunk: &'a [u8],
    rest: &'a [u8],
}

impl<'a> ChunkEntries<'a> {
    /// Those of these bytes, which may be any.
    pub fn new(chunk: &'a [u8]) -> ChunkEntries<'a> {
        ChunkEntries { chunk, rest: chunk }
    }
}

impl<'a> Iterator for ChunkEntries<'a> {
    type Item = Result<Entry<'a>, ChunkError>;

    fn next(&mut self) -> Option<Self::Item> {
        let &flags = self.rest.first()?;
        let offset = self.chunk.len() - self.rest.len();
        let bytes = std::mem::take(&mut self.rest);
        if flags & !(WIDE | EXPIRES) != 0 {
            return Some(Err(ChunkError::Flags { offset, flags }));
        }
        let Some((entry, rest)) = Entry::split_from(bytes) else {
            return Some(Err(ChunkError::Truncated { offset }));
        };
        if entry.key.len() > MAX_KEY_BYTES || entry.value.len() > MAX_VALUE_BYTES {
            return Some(Err(ChunkError::TooLong { offset }));
        }
        self.rest = rest;
        Some(Ok(entry))
    }
}
