//! Whole clusters in one thread: real control planes on virtual time, with the registry in memory,
//! requests without sockets, and replicas that do at once what the map says.

mod lost_registry;
mod membership;
mod operations;
mod world;
