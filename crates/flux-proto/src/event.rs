//! What a change is to everything outside a node: the events that watchers and the broker get, their
//! JSON, their names at the broker, and the token that resumes a watch.
//!
//! docs/cdc.md describes the format. What this module does not do: know where events come from, or
//! which of them a reader already has.

mod json;
mod token;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;

use bytes::Bytes;

pub use json::{EventError, read_json, read_json_body, write_json};
pub use token::{Positions, Token};

pub use crate::trace::TraceContext;

/// The longest routing key that AMQP takes, in bytes.
pub const MAX_ROUTING_KEY_BYTES: usize = 255;

/// What became of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// It was written.
    Set,
    /// A client removed it.
    Delete,
    /// Its time was up.
    Expire,
}

impl Op {
    /// The name in JSON and the first word of a routing key.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Set => "set",
            Op::Delete => "delete",
            Op::Expire => "expire",
        }
    }
}

/// A revision and the entry that holds it. `index` lets the log be kept; consumers never see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The partition's revision.
    pub revision: u64,
    /// The index of its entry in the partition's log.
    pub index: u64,
}

/// One committed change of one key, or the key's current state in a [`Record::Row`].
///
/// A set has a value and its version is its revision; a delete and an expiry have neither value nor
/// expiry, and version 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What became of the key.
    pub op: Op,
    /// The key.
    pub key: Bytes,
    /// The whole new value.
    pub value: Option<Bytes>,
    /// The partition, which counts the revisions.
    pub partition: u16,
    /// 1, 2, 3, … in each partition. Of a row: the version.
    pub revision: u64,
    /// The key's version now; 0 where it is gone.
    pub version: u64,
    /// The key's version before; 0 where it was absent, or where that is not known.
    pub previous_version: u64,
    /// The value before, where the cluster keeps it for its readers.
    pub previous_value: Option<Bytes>,
    /// When the key expires, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<u64>,
    /// The leader's clock when it evaluated the change; 0 where that is not known, as of rows.
    pub committed_at_ms: u64,
    /// The request that caused it, where the client said.
    pub trace: Option<TraceContext>,
}

impl Event {
    /// The bytes of its key and values: what counts against a limit of bytes.
    pub fn bytes(&self) -> usize {
        let value = self.value.as_ref().map_or(0, Bytes::len);
        self.key.len() + value + self.previous_value.as_ref().map_or(0, Bytes::len)
    }
}

/// What a reader lost, and the state that stands for it: `lost.end() <= at.revision`.
///
/// `lost` is never empty, but for a snapshot of a partition that has no revision yet (`at` 0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The partition.
    pub partition: u16,
    /// The revisions that never come as changes.
    pub lost: RangeInclusive<u64>,
    /// The rows that follow are of this revision, and changes go on behind it.
    pub at: Place,
    /// The leader's term: with `at`, it tells one gap from another.
    pub term: u64,
}

impl Gap {
    /// Which gap it is.
    pub const fn id(&self) -> GapId {
        GapId { partition: self.partition, at: self.at.revision, term: self.term }
    }
}

/// Which gap: it names what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GapId {
    /// The partition.
    pub partition: u16,
    /// The revision of the rows.
    pub at: u64,
    /// The leader's term.
    pub term: u64,
}

impl GapId {
    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<GapId> {
        let (partition, rest) = text.split_once('/')?;
        let (at, term) = rest.split_once('/')?;
        // `parse` alone would take a sign and leading zeros.
        let id = GapId {
            partition: partition.parse().ok()?,
            at: at.parse().ok()?,
            term: term.parse().ok()?,
        };
        (id.to_string() == text).then_some(id)
    }
}

/// `<partition>/<at>/<term>`.
impl fmt::Display for GapId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.partition, self.at, self.term)
    }
}

/// One thing that a reader is told. A gap is a begin, its rows numbered 1, 2, 3, …, and an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A change.
    Change(Event),
    /// Changes were lost to this reader; the current values follow.
    GapBegin(Gap),
    /// The current value of a key.
    Row {
        /// The gap that it belongs to.
        gap: GapId,
        /// Its number in the gap, from 1 on.
        number: u64,
        /// The key and its value, as a set.
        event: Event,
    },
    /// The current values are complete: what no row named is absent.
    GapEnd {
        /// The gap that ends.
        gap: GapId,
        /// How many rows it had.
        rows: u64,
    },
}

impl Record {
    /// The partition that it is about.
    pub const fn partition(&self) -> u16 {
        match self {
            Record::Change(event) | Record::Row { event, .. } => event.partition,
            Record::GapBegin(gap) => gap.partition,
            Record::GapEnd { gap, .. } => gap.partition,
        }
    }

    /// As in the JSON: of a change its own, of a row its version, of a gap's begin and end `at`.
    pub const fn revision(&self) -> u64 {
        match self {
            Record::Change(event) | Record::Row { event, .. } => event.revision,
            Record::GapBegin(gap) => gap.at.revision,
            Record::GapEnd { gap, .. } => gap.at,
        }
    }
}

/// The routing key at the broker: `set.user.7.name` for the key `user:7/name`, `gap.partition-7` for
/// the begin and end of a gap. What is not UTF-8 becomes `_`, a byte each, and what is longer than
/// [`MAX_ROUTING_KEY_BYTES`] is cut at a character.
pub fn routing_key(record: &Record) -> String {
    let event = match record {
        Record::Change(event) | Record::Row { event, .. } => event,
        Record::GapBegin(_) | Record::GapEnd { .. } => {
            return format!("gap.partition-{}", record.partition());
        }
    };
    let mut text = String::with_capacity(MAX_ROUTING_KEY_BYTES.min(event.key.len() + 8));
    text.push_str(event.op.name());
    text.push('.');
    for chunk in event.key.utf8_chunks() {
        let unreadable = chunk.invalid().iter().map(|_| '_');
        for character in chunk.valid().chars().chain(unreadable) {
            let character = if matches!(character, ':' | '/') { '.' } else { character };
            if text.len() + character.len_utf8() > MAX_ROUTING_KEY_BYTES {
                return text;
            }
            text.push(character);
        }
    }
    text
}

/// The message's id at the broker: `<cluster>/<partition>/<revision>` for a change, and for the parts
/// of a gap `<cluster>/<partition>/gap-<at>-<term>-` with `begin`, the row's number, or `end`.
pub fn message_id(cluster: &str, record: &Record) -> String {
    let part = |gap: GapId, part: &dyn fmt::Display| {
        let GapId { partition, at, term } = gap;
        format!("{cluster}/{partition}/gap-{at}-{term}-{part}")
    };
    match record {
        Record::Change(event) => format!("{cluster}/{}/{}", event.partition, event.revision),
        Record::GapBegin(gap) => part(gap.id(), &"begin"),
        Record::Row { gap, number, .. } => part(*gap, number),
        Record::GapEnd { gap, .. } => part(*gap, &"end"),
    }
}

/// Feeds bytes to every decoder, as a fuzz target does: none may panic, and what decodes must come
/// out the same after it is encoded and decoded again.
#[doc(hidden)]
pub fn exercise(bytes: &[u8]) {
    for record in read_json_body(bytes).into_iter().flatten() {
        let mut again = Vec::new();
        write_json(&record, &mut again);
        assert_eq!(read_json(&again).expect("it was written here"), record);
        assert!(routing_key(&record).len() <= MAX_ROUTING_KEY_BYTES);
        assert!(message_id("c", &record).starts_with("c/"));
    }
    if let Some(token) = Token::decode(bytes) {
        assert_eq!(token.encode(), bytes);
    }
}
