//! The gateway's limits.

use std::time::Duration;

/// How much the gateway takes on, and how long it waits.
#[derive(Clone, Debug)]
pub struct Options {
    /// The gRPC addresses of the nodes that clients watch, each `host:port`.
    pub grpc_endpoints: Vec<String>,
    /// Watches at a time; further ones are refused with 503.
    pub max_watches: usize,
    /// Connections at a time besides those of watches; further ones are refused with 503.
    pub max_connections: usize,
    /// Requests at a time; further ones are refused with 503.
    pub max_requests: usize,
    /// Memory for the bodies of all requests and answers under way, in bytes; a request that finds
    /// too little left is refused with 503.
    pub max_body_memory: usize,
    /// How long a client may take to send the head of a request. An idle connection is closed after
    /// this time.
    pub header_timeout: Duration,
    /// How long a client may take to send the body of a request.
    pub body_timeout: Duration,
    /// How long a client may read nothing of an answer that waits for it.
    pub write_timeout: Duration,
    /// How long requests under way may take to finish after a shutdown is asked for.
    pub drain_timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            grpc_endpoints: Vec::new(),
            max_watches: 4096,
            max_connections: 4096,
            max_requests: 1024,
            max_body_memory: 512 * 1024 * 1024,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(10),
        }
    }
}
