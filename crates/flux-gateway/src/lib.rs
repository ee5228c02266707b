//! The HTTP gateway of Flux-KV: JSON over HTTP/1.1 in front of the native protocol, and
//! changes as server-sent events in front of gRPC.
//!
//! docs/API.md describes its routes and errors. `router` builds the service with its layers, `serve`
//! runs it on a listener until a shutdown is asked for.
//!
//! What it deliberately does not do: hold data of its own, or read configuration.

mod error;
mod form;
mod input;
mod kv;
mod memory;
mod options;
mod router;
mod serve;
mod stall;
mod watch;

pub use options::Options;
pub use router::router;
pub use serve::{Drained, serve};
