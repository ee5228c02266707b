//! A consumer of the change events at the broker: it makes a file of them in which each is once,
//! although each may be delivered more than once.
//!
//! [`intake`] decides what becomes a line, [`output`] keeps the lines, and with the feature `amqp`
//! [`consume`] gets the deliveries from RabbitMQ. What this module does not do: know what the events
//! are for.

#[cfg(feature = "amqp")]
mod broker;
mod cursor;
pub mod intake;
pub mod lines;
pub mod output;
pub mod rotate;
#[cfg(feature = "amqp")]
mod session;

#[cfg(feature = "amqp")]
pub use session::consume;

use crate::ledger::Hole;
#[cfg(feature = "amqp")]
use crate::url::Url;
use intake::Counts;

/// What a consumer must know.
#[cfg(feature = "amqp")]
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// The broker.
    pub address: Url,
    /// The exchange that events are published to.
    pub exchange: String,
    /// The consumer's queue. It is made if it is not there.
    pub queue: String,
    /// Which events: routing keys with `*` for a word and `#` for any number of them. Without `#` alone
    /// among them not every event comes, and holes are not told.
    pub bind: Vec<String>,
    /// Deliveries that may be under way. So much is in memory, whatever its size.
    pub prefetch: u16,
}

#[cfg(feature = "amqp")]
impl ConsumerConfig {
    /// Whether it asks for less than every event.
    pub fn is_filtered(&self) -> bool {
        self.bind.iter().all(|key| key != "#")
    }
}

/// What a consumer has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Records.
    pub counts: Counts,
    /// How often something was missing.
    pub holes: u64,
    /// What was missing, the first thousand of it.
    pub listed_holes: Vec<Hole>,
    /// Messages that were no events.
    pub unreadable: u64,
}
