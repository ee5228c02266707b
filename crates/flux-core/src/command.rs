//! What a client may ask of one partition, whatever protocol it speaks.
//!
//! A command is generic over its byte strings: `Command<&[u8]>` borrows a connection's input buffer on
//! the fast path, `Command<Vec<u8>>` owns its bytes and can cross threads. Commands whose keys span
//! partitions are split before they come here; every key of a `Command` is of one partition.
//!
//! Nodes send commands to each other in a form that numbers variants and fields by their place: new
//! variants of these enums are appended, and nothing that is there is moved, removed or given fields.

#![allow(missing_docs, reason = "a variant's comment says what its fields are")]

use serde::{Deserialize, Serialize};

use crate::{Revision, UnixMillis};

/// One request to one partition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command<B> {
    /// The value of a key. `Reply::Value`.
    Get { key: B },
    /// The values of keys. `Reply::Values`, in the order asked.
    GetMany { keys: Vec<B> },
    /// Bytes `start` to `end` of a value, both inclusive, negative from the end. `Reply::Bytes`.
    GetRange { key: B, start: i64, end: i64 },
    /// The length of a value, 0 where there is none. `Reply::Integer`.
    Length { key: B },
    /// How many of the keys exist; a key named twice counts twice. `Reply::Integer`.
    Exists { keys: Vec<B> },
    /// The longest common subsequence of two values. `Reply::Lcs`.
    Lcs { left: B, right: B },
    /// All that is known of a key but its value. `Reply::Described`.
    Describe { key: B },

    /// Writes a value. `Reply::Written`, `Reply::NotWritten`, or with `return_previous`
    /// `Reply::Previous`.
    Set { key: B, value: B, expiry: Expiry, condition: Condition, return_previous: bool },
    /// Writes several values as one. `Reply::Written`; with `if_none_exists`, `Reply::NotWritten`
    /// when one of the keys exists.
    SetMany { pairs: Vec<(B, B)>, if_none_exists: bool },
    /// Removes keys. `Reply::Integer`: how many there were.
    Delete { keys: Vec<B> },
    /// Removes a key if the condition holds. `Reply::Integer` (0 or 1) or `Reply::NotWritten`.
    DeleteIf { key: B, condition: Condition },
    /// Removes a key and answers its value. `Reply::Value`.
    GetDelete { key: B },
    /// Answers a value and changes its expiry. `Reply::Value`.
    GetExpire { key: B, expiry: Expiry },
    /// Appends to a value. `Reply::Integer`: the new length.
    Append { key: B, suffix: B },
    /// Overwrites a value from an offset on, padded with zero bytes. `Reply::Integer`: the new length.
    SetRange { key: B, offset: i64, value: B },
    /// Adds to a number in decimal text. `Reply::Counter`.
    Increment { key: B, delta: i64 },
    /// Adds to a floating point number in decimal text. `Reply::Bytes`: the new text.
    IncrementFloat { key: B, delta: B },
    /// Sets when a key expires; `at` must be `Expiry::In` or `Expiry::At`. `Reply::Integer`: 1 if set.
    Expire { key: B, at: Expiry, condition: ExpireCondition },
    /// Removes a key's expiry. `Reply::Integer`: 1 if there was one.
    Persist { key: B },
    /// Renames a key. `Reply::Integer`: 1, or 0 when `if_absent` and the new name exists.
    Rename { from: B, to: B, if_absent: bool },
    /// Copies a key with its expiry. `Reply::Integer`: 1 if copied.
    Copy { from: B, to: B, replace: bool },
    /// Removes up to `limit` keys, wherever they are in the partition. `Reply::Integer`: `limit` when
    /// there may be more, less when the partition is empty.
    Clear { limit: usize },

    /// When all guards hold, runs the commands as one atomic write. `Reply::Many` with a reply for
    /// each command, or `Reply::Aborted` when a guard does not hold.
    Transaction { guards: Vec<Guard<B>>, commands: Vec<Command<B>>, mode: TransactionMode },

    /// Keys of the partition from a position of its table on, 0 being the start: what is applied, not
    /// what is in flight. `Reply::Page`.
    Scan { from: u32, filter: KeyFilter<B>, limits: PageLimits, keys_only: bool },
    /// How many keys the partition has, those included that are expired and not yet deleted.
    /// `Reply::Integer`.
    Count,
}

/// Which keys a scan is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyFilter<B> {
    /// Keys that start with this; empty for all.
    Prefix(B),
    /// Keys that match this glob pattern.
    Pattern(B),
}

/// When a page of a scan ends, if the table does not end before. Each counts as 1 at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageLimits {
    /// Keys in the page.
    pub matches: u32,
    /// Keys looked at, whether they belong to the page or not; a few more, where their hashes collide.
    pub looked_at: u32,
    /// Bytes of keys and values; a larger entry is a page of its own.
    pub bytes: u32,
}

/// What a transaction does when one of its commands fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransactionMode {
    /// The command's error stands in its reply; the others are kept (MULTI/EXEC of Redis).
    KeepGoing,
    /// Nothing is written; the reply is the error, or `Reply::Aborted` with the position of the
    /// command whose condition did not hold (a batch write).
    AllOrNothing,
}

/// A transaction's precondition: the key still has the version that was seen; 0 for absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard<B> {
    pub key: B,
    pub version: Revision,
}

/// What a write does to a key's expiry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expiry {
    /// The key does not expire.
    #[default]
    Never,
    /// As it was.
    Keep,
    /// So many milliseconds from now, on the leader's clock.
    In(u64),
    /// At this time.
    At(UnixMillis),
}

/// When a write applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    #[default]
    Always,
    IfAbsent,
    IfPresent,
    /// The key has this version; 0 means absent.
    IfVersion(Revision),
}

/// When `Command::Expire` applies, as the options NX, XX, GT and LT of EXPIRE. A key without expiry
/// counts as one that expires infinitely late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpireCondition {
    pub if_none: bool,
    pub if_some: bool,
    pub if_later: bool,
    pub if_earlier: bool,
}

impl<B> Command<B> {
    /// Whether the command can change the partition. Reads may run without the log.
    pub fn is_write(&self) -> bool {
        match self {
            Command::Get { .. }
            | Command::GetMany { .. }
            | Command::GetRange { .. }
            | Command::Length { .. }
            | Command::Exists { .. }
            | Command::Lcs { .. }
            | Command::Describe { .. }
            | Command::Scan { .. }
            | Command::Count => false,
            Command::Transaction { commands, .. } => commands.iter().any(Command::is_write),
            _ => true,
        }
    }

    /// Whether the command reads one key only, so that it is atomic wherever it runs. Other reads are
    /// atomic only on the thread that writes the table.
    pub fn is_point_read(&self) -> bool {
        match self {
            Command::Get { .. }
            | Command::GetRange { .. }
            | Command::Length { .. }
            | Command::Describe { .. } => true,
            Command::GetMany { keys } | Command::Exists { keys } => keys.len() == 1,
            _ => false,
        }
    }

    /// Whether the command reads the whole table without promising one moment: it may run while others
    /// write.
    pub fn is_walk(&self) -> bool {
        matches!(self, Command::Scan { .. } | Command::Count)
    }

    /// The same command over other byte strings, each made from one of this command's.
    pub fn map<'a, C>(&'a self, f: &mut impl FnMut(&'a B) -> C) -> Command<C> {
        use Command as X;
        match self {
            X::Get { key } => X::Get { key: f(key) },
            X::GetMany { keys } => X::GetMany { keys: keys.iter().map(f).collect() },
            &X::GetRange { ref key, start, end } => X::GetRange { key: f(key), start, end },
            X::Length { key } => X::Length { key: f(key) },
            X::Exists { keys } => X::Exists { keys: keys.iter().map(f).collect() },
            X::Lcs { left, right } => X::Lcs { left: f(left), right: f(right) },
            X::Describe { key } => X::Describe { key: f(key) },
            &X::Set { ref key, ref value, expiry, condition, return_previous } => {
                X::Set { key: f(key), value: f(value), expiry, condition, return_previous }
            }
            &X::SetMany { ref pairs, if_none_exists } => X::SetMany {
                pairs: pairs.iter().map(|(key, value)| (f(key), f(value))).collect(),
                if_none_exists,
            },
            X::Delete { keys } => X::Delete { keys: keys.iter().map(f).collect() },
            &X::DeleteIf { ref key, condition } => X::DeleteIf { key: f(key), condition },
            X::GetDelete { key } => X::GetDelete { key: f(key) },
            &X::GetExpire { ref key, expiry } => X::GetExpire { key: f(key), expiry },
            X::Append { key, suffix } => X::Append { key: f(key), suffix: f(suffix) },
            &X::SetRange { ref key, offset, ref value } => {
                X::SetRange { key: f(key), offset, value: f(value) }
            }
            &X::Increment { ref key, delta } => X::Increment { key: f(key), delta },
            X::IncrementFloat { key, delta } => X::IncrementFloat { key: f(key), delta: f(delta) },
            &X::Expire { ref key, at, condition } => X::Expire { key: f(key), at, condition },
            X::Persist { key } => X::Persist { key: f(key) },
            &X::Rename { ref from, ref to, if_absent } => {
                X::Rename { from: f(from), to: f(to), if_absent }
            }
            &X::Copy { ref from, ref to, replace } => X::Copy { from: f(from), to: f(to), replace },
            &X::Clear { limit } => X::Clear { limit },
            &X::Transaction { ref guards, ref commands, mode } => X::Transaction {
                guards: guards
                    .iter()
                    .map(|guard| Guard { key: f(&guard.key), version: guard.version })
                    .collect(),
                commands: commands.iter().map(|command| command.map(f)).collect(),
                mode,
            },
            &X::Scan { from, ref filter, limits, keys_only } => {
                let filter = match filter {
                    KeyFilter::Prefix(prefix) => KeyFilter::Prefix(f(prefix)),
                    KeyFilter::Pattern(pattern) => KeyFilter::Pattern(f(pattern)),
                };
                X::Scan { from, filter, limits, keys_only }
            }
            X::Count => X::Count,
        }
    }
}

impl<B: AsRef<[u8]>> Command<B> {
    /// A copy that owns its bytes and can be sent to another thread.
    pub fn to_owned(&self) -> Command<Vec<u8>> {
        self.map(&mut |bytes| bytes.as_ref().to_vec())
    }

    /// The same command, borrowing this one's bytes.
    pub fn borrowed(&self) -> Command<&[u8]> {
        self.map(&mut |bytes| bytes.as_ref())
    }
}
