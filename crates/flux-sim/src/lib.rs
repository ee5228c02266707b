//! Whole Flux-KV clusters in one thread and in virtual time: the real replica and the real log, with
//! faults from a seed, and checkers of what clients saw and replicas did.
//!
//! A run is decided by its plan, which a seed makes. Nothing reads a clock, draws ambient randomness or
//! depends on the order of a hash map, so a seed can be replayed event by event.
//!
//! Not simulated: sockets, frames, worker threads, etcd; see `docs/simulation.md`.

#![allow(clippy::type_complexity, reason = "checkers compare plain tuples")]

pub mod check;
pub mod client;
pub mod clock;
pub mod network;
pub mod node;
pub mod plan;
pub mod plant;
pub mod random;
pub mod sweep;
pub mod trace;
pub mod world;
