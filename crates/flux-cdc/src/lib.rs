//! Change capture: the feed of committed changes, as its readers see it.
//!
//! A node implements [`Feed`]; publishers and watchers read it. What this crate does not do: know
//! how a node keeps its changes, or decide what is committed.
//!
//! Features: `amqp` (on by default) is for RabbitMQ, `memory` adds a feed in memory for tests and
//! examples. Without both nothing here needs a runtime or touches the network.

pub mod feed;
#[cfg(feature = "memory")]
pub mod memory;
mod url;

pub use feed::{BoxFuture, Chunk, Feed, FeedError, Led, Limit, RowMark, Rows};
pub use url::{Url, UrlError};
