//! Bytes on the wire: RESP, the native protocol, the frames between nodes, gRPC messages and change events
//! of Flux-KV, and the error codes and trace contexts that they share.
//!
//! Nothing here knows what a command means or touches a socket: parsers take bytes and give borrowed
//! pieces of them, writers append to a buffer. Bytes from outside never panic.

pub mod code;
pub mod event;
pub mod grpc;
pub mod native;
pub mod peer;
pub mod resp;
pub mod trace;

pub use code::Code;
