//! What a partition's log replicates: the effects of writes, in batches.
//!
//! The payload of one Raft entry is one batch. Followers and recovery apply its effects as they are:
//! nothing in here depends on a clock, on what a key held before, or on how a command was evaluated.
//! A batch also holds the answers that must be known again when a write is repeated (see `session`), and
//! what readers of changes want to know and could not find out later: what each key had before, who asked,
//! and how far the changes have been passed on.
//! What this module does not do: frame or checksum the payload (`flux-log` does), decide what a
//! command writes (`evaluate` does), or touch a table (`draft::apply` does).
//!
//! # Format 1
//!
//! Integers are little endian. A varint is LEB128 (seven bits to a byte, lowest first, the high bit
//! set on all but the last), in as few bytes as the number needs and at most four; a varint64 may have ten.
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
//!   0x82  previous versions     for each effect of the batch, in order: varint64, its revision less the
//!                               version that the key had before it; 0 if the key was absent
//!   0x83  previous values       for each effect, in order: varint length + 1, value; a length of 0
//!                               and no value if the key was absent, or the batch had no room for it
//!   0x84  trace                 trace id 16, span id 8, flags 1: of the effects that follow; zeros end it
//!   0x85  cursor                u64 revision, u64 index: changes up to here have been passed on
//! ```
//!
//! The previous versions come last and once, but for the previous values, which come after them. A batch
//! of an older version has neither: its keys read as absent before.
//!
//! Kind 0x00 is never used, so that zeros do not decode. Kinds 0x05 to 0x7f are for further effects
//! that take a revision, kinds 0x80 to 0xff for effects that take none; a reader that does not know a
//! kind refuses the batch. A key has 1 to `MAX_KEY_BYTES` bytes, a value 0 to `MAX_VALUE_BYTES`,
//! a reply 0 to `MAX_ANSWER_BYTES`: its format is that of `session`, and one that is not kept is empty.

mod read;
#[cfg(test)]
mod tests;
mod write;

use crate::session::Once;
use crate::{Revision, UnixMillis};

pub use read::{Changes, Effects, Parts, PreviousValues, PreviousVersions, cursor_of};
pub(crate) use read::{decode_answer_at, decode_at};
pub use write::BatchWriter;

const FORMAT: u8 = 1;
const PUT: u8 = 0x01;
const PUT_EXPIRING: u8 = 0x02;
const DELETE_EXPLICIT: u8 = 0x03;
const DELETE_EXPIRED: u8 = 0x04;
const ANSWER: u8 = 0x81;
const PREVIOUS_VERSIONS: u8 = 0x82;
const PREVIOUS_VALUES: u8 = 0x83;
const TRACE: u8 = 0x84;
const CURSOR: u8 = 0x85;

/// What a trace part that ends one has.
pub(crate) const NO_TRACE: Trace = [0; 25];

/// The length of a batch's header.
pub const HEADER_BYTES: usize = 1 + 8 + 8;

/// The most that a key's previous version takes.
pub const PREVIOUS_VERSION_BYTES: usize = 10;

/// The most that one effect takes besides its key and value, and the value before.
pub const EFFECT_OVERHEAD_BYTES: usize = 1 + 4 + 4 + 8 + PREVIOUS_VERSION_BYTES;

/// Where a write comes from, as W3C Trace Context has it: the trace's id (16 bytes), the span's (8) and the
/// flags (1). All zeros stand for none.
pub type Trace = [u8; 25];

/// How far a partition's changes have been passed on. Ordered by revision; of two the larger counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// All changes up to this one.
    pub revision: Revision,
    /// An index of the log behind which everything is that is not among them.
    pub index: u64,
}

impl Cursor {
    /// The lowest index of the log with a change that may not be among these, where the log is applied up to
    /// `applied`. What comes behind that is new.
    pub fn needs(self, applied: Cursor) -> u64 {
        let is_all = self.revision >= applied.revision;
        1 + if is_all { self.index.max(applied.index) } else { self.index }
    }
}

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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Where the effects that follow come from, if somebody said so.
    Trace(Option<&'a Trace>),
    /// How far changes have been passed on.
    Cursor(Cursor),
    /// The version that each effect's key had before.
    PreviousVersions(PreviousVersions<'a>),
    /// The value that each effect's key had before.
    PreviousValues(PreviousValues<'a>),
}

/// An effect with all that its batch knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<'a> {
    /// The revision that it took.
    pub revision: Revision,
    /// What it does.
    pub effect: Effect<'a>,
    /// The version that the key had before; 0 if it was absent, or the batch does not say.
    pub previous: Revision,
    /// The value that the key had before, where the batch has it.
    pub previous_value: Option<&'a [u8]>,
    /// Where the write comes from, if the client said so.
    pub trace: Option<&'a Trace>,
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
    /// A number that is over its limit or not in its shortest form, or an empty key.
    #[error("effect at offset {offset} has an invalid length")]
    Length {
        /// Where the effect starts.
        offset: usize,
    },
    /// A part that comes after those that end a batch, or one of these without what it follows.
    #[error("part at offset {offset} is not in its place")]
    Misplaced {
        /// Where the part starts.
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
