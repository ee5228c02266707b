//! What a partition answers to a command, before a protocol renders it.
//!
//! Nodes send replies to each other: variants and fields are only ever appended, as in `command`.

#![allow(missing_docs, reason = "fields and errors say what they are")]

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Revision, UnixMillis};

/// The answer to a `Command`; which variant belongs to which command stands at the command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Value(Option<Value>),
    Values(Vec<Option<Value>>),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    Integer(i64),
    /// A number after it was added to.
    Counter {
        value: i64,
        version: Revision,
    },
    /// The write took place; the key now has this version.
    Written {
        version: Revision,
    },
    /// A condition did not hold and nothing changed; `version` is the key's, 0 where it is absent.
    NotWritten {
        version: Revision,
    },
    /// The answer to a `Set` with `return_previous`.
    Previous {
        previous: Option<Value>,
        written: bool,
    },
    Lcs(Lcs),
    Described(Option<Description>),
    Many(Vec<Reply>),
    /// A guard did not hold, or (all or nothing) the command at `position` had a condition that did not.
    Aborted {
        position: Option<usize>,
    },
    Error(Error),
    /// Keys with their values, and the position where the next page starts; none at the end.
    Page {
        next: Option<u32>,
        /// How many keys were looked at.
        looked_at: u32,
        items: Vec<Item>,
    },
}

impl Reply {
    /// About how many bytes of values it holds.
    pub fn value_bytes(&self) -> usize {
        match self {
            Reply::Value(value) => value.as_ref().map_or(0, |value| value.bytes.len()),
            Reply::Values(values) => values.iter().flatten().map(|value| value.bytes.len()).sum(),
            Reply::Previous { previous, .. } => {
                previous.as_ref().map_or(0, |value| value.bytes.len())
            }
            Reply::Bytes(bytes) => bytes.len(),
            Reply::Lcs(lcs) => lcs.bytes.len(),
            Reply::Many(replies) => replies.iter().map(Reply::value_bytes).sum(),
            Reply::Page { items, .. } => items.iter().map(Item::bytes).sum(),
            _ => 0,
        }
    }
}

/// A key's value with what the store knows of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    pub version: Revision,
    pub expires_at_ms: Option<UnixMillis>,
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    #[serde(with = "serde_bytes")]
    pub key: Vec<u8>,
    pub value: Value,
}

impl Item {
    /// The bytes of both.
    pub fn bytes(&self) -> usize {
        self.key.len() + self.value.bytes.len()
    }
}

/// What the store knows of a key besides its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    pub version: Revision,
    pub expires_at_ms: Option<UnixMillis>,
    /// Length of the value.
    pub value_bytes: usize,
    /// When the key was last written, in seconds since the Unix epoch.
    pub written_at_s: u32,
    /// What the entry takes in memory, its place in the index included.
    pub memory_bytes: usize,
}

/// A longest common subsequence, and where its runs stand in both values, last run first (as LCS IDX).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lcs {
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    pub runs: Vec<LcsRun>,
}

/// A run of equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LcsRun {
    pub left: Range<usize>,
    pub right: Range<usize>,
}

/// Why a command was not carried out. Nothing changed, except for `OutcomeUnknown` and, perhaps
/// earlier, `AnswerGone`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    #[error("value is not an integer or out of range")]
    NotInteger,
    #[error("value is not a valid float")]
    NotFloat,
    #[error("increment or decrement would overflow")]
    Overflow,
    #[error("increment would produce NaN or Infinity")]
    NotFinite,
    #[error("offset is out of range")]
    OffsetOutOfRange,
    #[error("invalid expire time")]
    InvalidExpiry,
    #[error("no such key")]
    NoSuchKey,
    #[error("key of {0} bytes is over the limit of 65536")]
    KeyTooLong(usize),
    #[error("empty key")]
    EmptyKey,
    #[error("value of {0} bytes is over the limit of 16777216")]
    ValueTooLarge(usize),
    #[error("writes of {0} bytes together are over the limit of 50331648")]
    WriteTooLarge(usize),
    #[error("a reply of {0} bytes is over the limit of 67108864; ask for less at once")]
    ReplyTooLarge(usize),
    #[error("values of {0} bytes together are too large to compare")]
    TooLargeToCompare(usize),
    #[error("max_memory of {limit} bytes is reached; delete keys, or raise max_memory and restart")]
    OutOfMemory { limit: u64 },
    #[error("too much work is waiting; try again later")]
    Overloaded,
    #[error("the disk is full; writes are refused until there is space again")]
    DiskFull,
    #[error("the log failed and the node takes no more writes: {0}")]
    LogFailed(String),
    #[error("this node does not lead the partition")]
    NotLeader,
    #[error("outcome unknown: the write may or may not take place")]
    OutcomeUnknown,
    #[error("outcome unknown: the write was sent before, and its answer is no longer known")]
    AnswerGone,
    #[error("the node is stopping")]
    Stopping,
    #[error("no leader of partition {partition} was found within {} s", *waited_ms as f64 / 1000.0)]
    NoLeader { partition: u16, waited_ms: u64 },
}
