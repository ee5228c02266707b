//! The Rust client of Flux-KV, over the native protocol (docs/protocol.md).
//!
//! A [`Client`] keeps a few connections to each endpoint, sends many requests over each at once and
//! reconnects by itself. It repeats what is safe to repeat, within a budget, and says
//! [`Error::OutcomeUnknown`] where a write may or may not have taken place.
//!
//! What it deliberately does not do: cache, or repeat a write that may have been carried out.

mod backoff;
mod budget;
mod client;
mod config;
mod error;
mod exchange;
mod link;
mod types;

pub use client::Client;
pub use config::{Config, Credentials, Retry};
pub use error::Error;
pub use flux_proto::Code;
pub use flux_proto::native::{
    BatchReply, Condition, DeleteReply, Expiry, Guard, MAX_KEY_BYTES, MAX_VALUE_BYTES, Write,
    WriteResult,
};
pub use types::{
    Counter, Item, Member, Page, ScanOptions, ServerInfo, SetOptions, SetReply, Value,
};
