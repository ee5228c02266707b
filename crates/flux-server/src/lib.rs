//! A Flux-KV node: its configuration, its listeners, and the workers that own connections and
//! partitions.
//!
//! What a command does is decided in `flux-core`, how bytes look in `flux-proto` and `flux-log`. Here
//! are the threads, the sockets and the order in which things happen.

mod admin;
pub mod backup;
mod clock;
pub mod cluster;
mod codes;
pub mod config;
mod connection;
mod data_dir;
mod feed;
mod folders;
pub mod forward_codec;
mod grpc;
mod joining;
mod mailbox;
mod native;
mod node;
#[cfg_attr(not(test), expect(dead_code, reason = "no worker has peers yet"))]
mod peer;
mod process;
mod recovery;
mod replicas;
mod resp;
mod scan;
mod shared;
mod stale;
mod standing;
mod starting;
mod stats;
#[cfg(test)]
mod tests;
#[cfg_attr(not(test), expect(dead_code, reason = "no node transfers snapshots yet"))]
mod transfer;
mod worker;
mod workers;

pub use data_dir::DataDirError;
pub use node::{Addresses, Node, StartError};
pub use recovery::RecoveryError;
