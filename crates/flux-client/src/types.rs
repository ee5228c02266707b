//! What calls take and answer. Bytes share the buffer they were read into, at least 16 KiB: copy what
//! is kept for long.

use std::time::Duration;

use bytes::Bytes;
use flux_proto::native::{self, Condition, Expiry, StalePosition};

/// How a value is written. The default: in any case, and it does not expire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetOptions {
    /// What becomes of the key's expiry.
    pub expiry: Expiry,
    /// When the write applies.
    pub condition: Condition,
    /// Also answer the value before.
    pub return_previous: bool,
}

/// A value with what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The value.
    pub bytes: Bytes,
    /// The revision that wrote it.
    pub version: u64,
    /// When the key expires, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<u64>,
}

/// What a replica answered to a stale read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stale<T> {
    /// The answer.
    pub value: T,
    /// How old it is; none where the node does not tell.
    pub position: Option<Position>,
}

/// How up to date a replica was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The partition's revision that it had applied; none where several partitions answered.
    pub revision: Option<u64>,
    /// What was acknowledged longer ago than this is in the answer, of each partition; none where
    /// that is not known.
    pub age: Option<Duration>,
}

/// The answer to a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetReply {
    /// Whether the condition held and the value was written.
    pub written: bool,
    /// The key's version now: that of this write, or the one that the condition met, 0 for absent.
    /// May be unknown where the previous value was asked for.
    pub version: Option<u64>,
    /// The value before, where it was asked for and there was one.
    pub previous: Option<Value>,
}

/// A number after it was added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// The sum.
    pub value: i64,
    /// The key's version.
    pub version: u64,
}

/// Which keys a scan lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanOptions {
    /// Only keys that start with this.
    pub prefix: Vec<u8>,
    /// About how many keys a page has, 1 to 10,000; 0 for the node's choice.
    pub limit: u32,
    /// Leave values out.
    pub keys_only: bool,
}

/// A page of a scan. It may be empty though more pages follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The keys, in no particular order.
    pub items: Vec<Item>,
    /// For the next page; none where this was the last.
    pub cursor: Option<Bytes>,
}

/// A key of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The key.
    pub key: Bytes,
    /// What is stored; the bytes are empty where only keys were asked for.
    pub value: Value,
}

/// A node's account of itself and of who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// The node's name.
    pub node: String,
    /// The version of its software.
    pub server_version: String,
    /// The nodes that the leader map names.
    pub members: Vec<Member>,
    /// For each partition the position of its leader in `members`, if it has one.
    pub leaders: Vec<Option<u16>>,
    /// The epoch of the placement map; 0 without a cluster.
    pub epoch: u64,
    /// For each partition the positions of its replicas in `members`; empty where the node does not
    /// tell.
    pub replicas: Vec<Vec<u16>>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where its data port listens, as `host:port`.
    pub data_addr: String,
    /// The zone that it stands in; may be empty.
    pub zone: String,
}

impl Position {
    pub(crate) fn new(position: StalePosition) -> Position {
        let StalePosition { revision, age_ms } = position;
        let age = (age_ms != u64::MAX).then(|| Duration::from_millis(age_ms));
        Position { revision: (revision != 0).then_some(revision), age }
    }

    /// That of an answer made of two.
    pub(crate) fn merge(self, other: Position) -> Position {
        let age = self.age.zip(other.age).map(|(one, other)| one.max(other));
        Position { revision: None, age }
    }
}

impl Value {
    /// `frame` is what `value` was decoded from.
    pub(crate) fn new(frame: &Bytes, value: &native::Value<'_>) -> Value {
        let native::Value { bytes, version, expires_at_ms } = *value;
        Value { bytes: frame.slice_ref(bytes), version, expires_at_ms }
    }
}

impl SetReply {
    pub(crate) fn new(frame: &Bytes, reply: &native::SetReply<'_>) -> SetReply {
        let previous = reply.previous.as_ref().map(|value| Value::new(frame, value));
        SetReply { written: reply.written, version: reply.version, previous }
    }
}

impl Page {
    /// With the node's cursor as it is.
    pub(crate) fn new(frame: &Bytes, page: &native::Page<'_>) -> Page {
        let items = page.items.iter().map(|item| Item {
            key: frame.slice_ref(item.key),
            value: Value::new(frame, &item.value),
        });
        let cursor = (!page.cursor.is_empty()).then(|| frame.slice_ref(page.cursor));
        Page { items: items.collect(), cursor }
    }
}

impl ServerInfo {
    pub(crate) fn new(info: &native::Info<'_>) -> ServerInfo {
        let member = |member: &native::Member<'_>| Member {
            name: member.name.to_owned(),
            data_addr: member.data_addr.to_owned(),
            zone: member.zone.to_owned(),
        };
        ServerInfo {
            node: info.node.to_owned(),
            server_version: info.server_version.to_owned(),
            members: info.members.iter().map(member).collect(),
            leaders: info.leaders.clone(),
            epoch: info.epoch,
            replicas: info.replicas.clone(),
        }
    }
}
