//! A consumer of the change events at the broker: it makes a file of them in which each is once,
//! although each may be delivered more than once.
//!
//! [`intake`] decides what becomes a line, and [`output`] keeps the lines. What this module does not do: know what the events
//! are for.

mod cursor;
pub mod intake;
pub mod lines;
pub mod output;
pub mod rotate;
