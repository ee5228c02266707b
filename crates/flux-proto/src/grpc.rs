//! The messages, the server and the client of the gRPC service `flux.kv.v1.KV`.
//!
//! Generated from `proto/flux/kv/v1/kv.proto`, where the contract stands. Translating messages to
//! commands is the server's work.

pub mod watch;

/// The descriptors of every .proto file of this crate, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The trailer of a failed call that carries the name of its [`Code`](crate::code::Code).
pub const CODE_TRAILER: &str = "flux-code";

/// Version 1 of the package `flux.kv`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
pub mod kv_v1 {
    tonic::include_proto!("flux.kv.v1");
}
