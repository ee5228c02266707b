//! The heart of a Flux-KV replica: commands, slots and partitions, the store, expiry and the Raft
//! replica around them.
//!
//! Everything here is pure and synchronous. There is no I/O, no clock, no thread and no ambient
//! randomness: the time and the seeds come in as arguments, so the same inputs give the same outputs,
//! byte for byte. Wire formats live in `flux-proto`, files in `flux-log`, sockets in `flux-server`.

pub mod command;
pub mod draft;
pub mod effect;
pub mod evaluate;
pub mod feed;
pub mod glob;
pub mod placement;
pub mod replica;
pub mod reply;
pub mod session;
pub mod slot;
pub mod store;
pub mod wheel;

pub use command::{Command, Condition, ExpireCondition, Expiry};
pub use effect::{Cursor, Trace};
pub use reply::{Error, Reply, Value};
pub use session::Once;
pub use slot::{PartitionId, Partitions, Slot};

/// Milliseconds since the Unix epoch. Always given by the caller.
pub type UnixMillis = u64;

/// The position of an effect in its partition's history: 1, 2, 3, … without holes.
pub type Revision = u64;

/// The longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 64 * 1024;

/// The most bytes of values in one reply.
pub const MAX_REPLY_BYTES: usize = 64 * 1024 * 1024;

/// The largest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 16 * 1024 * 1024;
