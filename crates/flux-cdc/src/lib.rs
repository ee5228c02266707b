//! Change capture: the feed of committed changes, as its readers see it.
//!
//! A node implements [`Feed`]; publishers and watchers read it. [`consumer`] is the other end of a
//! publisher: what it writes down, by its [`Ledger`], is each change once. What this crate does not do:
//! know how a node keeps its changes, or decide what is committed.
//!
//! Features: `amqp` (on by default) is for RabbitMQ, `memory` adds a feed in memory for tests and
//! examples. Without both nothing here needs a runtime or touches the network.

#[cfg(feature = "amqp")]
mod amqp;
pub mod consumer;
pub mod feed;
pub mod lane;
pub mod ledger;
#[cfg(feature = "memory")]
pub mod memory;
pub mod message;
#[cfg(feature = "amqp")]
mod metrics;
#[cfg(feature = "amqp")]
mod publisher;
#[cfg(feature = "amqp")]
mod trouble;
mod url;

pub use feed::{BoxFuture, Chunk, Feed, FeedError, Led, Limit, RowMark, Rows};
pub use lane::{Failure, Lane, Message, Want};
pub use ledger::{Hole, Ledger, Position, Progress, Verdict};
pub use message::Publication;
#[cfg(feature = "amqp")]
pub use metrics::{Lag, LaneStatus, Metrics};
#[cfg(feature = "amqp")]
pub use publisher::{Publisher, PublisherConfig};
#[cfg(feature = "amqp")]
pub use trouble::Trouble;
pub use url::{Url, UrlError};
