//! A consumer of the change events at the broker: it makes a file of them in which each is once,
//! although each may be delivered more than once.
//!
//! [`intake`] decides what becomes a line. What this module does not do: know what the events
//! are for.

pub mod intake;
