//! How a connection to an address is opened: over TCP, or as a test or a tunnel wants it.
//!
//! What this module does not do: speak on the connection.

use std::fmt;
use std::io;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Where a connection is read from.
pub type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;

/// Where a connection is written to.
pub type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

/// A connection on its way.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<(ReadHalf, WriteHalf)>> + Send>>;

/// Opens connections; see [`Client::with_dial`](crate::Client::with_dial).
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Opens a connection to `addr`, which is `host:port`. May be dropped at any time.
    fn dial(&self, addr: &str) -> Dialing;
}

/// Opens TCP connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tcp;

impl Dial for Tcp {
    fn dial(&self, addr: &str) -> Dialing {
        let addr = addr.to_owned();
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            let (reader, writer) = stream.into_split();
            Ok((Box::new(reader) as ReadHalf, Box::new(writer) as WriteHalf))
        })
    }
}
