//! The Rust client of Flux-KV, over the native protocol (docs/protocol.md).
//!
//! A [`Client`] keeps a few connections to each node that it needs, sends many requests over each at
//! once and reconnects by itself. In a cluster it learns from any node who leads, sends each request to
//! its partition's leader and follows when another one does. It repeats what is safe to repeat, within
//! a budget, and says [`Error::OutcomeUnknown`] where a write may or may not have taken place.
//!
//! What it deliberately does not do: cache, or repeat a write that may have been carried out where the
//! node could not tell that it is the same one.

mod backoff;
mod budget;
mod call;
mod client;
mod config;
mod dial;
mod directory;
mod error;
mod exchange;
mod gather;
mod link;
mod node;
mod page;
mod route;
mod session;
mod slot;
mod topology;
mod types;

pub use client::Client;
pub use config::{Config, Credentials, Retry};
pub use dial::{Dial, Dialing, ReadHalf, WriteHalf};
pub use error::Error;
pub use flux_proto::Code;
pub use flux_proto::native::{
    BatchReply, Condition, DeleteReply, Expiry, Guard, MAX_KEY_BYTES, MAX_VALUE_BYTES, Write,
    WriteResult,
};
pub use flux_proto::trace::{TRACEPARENT, TraceContext};
pub use types::{
    Counter, Item, Member, Page, Position, ScanOptions, ServerInfo, SetOptions, SetReply, Stale,
    Value,
};
