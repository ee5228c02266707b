//! Frames over a tokio socket.

use std::io;
use std::time::Duration;

use flux_proto::peer::{Frame, FrameError, FrameTooLarge, decode, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Bytes read from a socket at a time, at least.
const READ_BYTES: usize = 64 * 1024;

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the other side has closed the connection")]
    Ended,
    #[error("nothing has come or gone for too long")]
    Silent,
    #[error("the connection was lost: {0}")]
    Socket(#[from] io::Error),
    #[error("not a frame: {0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    TooLarge(#[from] FrameTooLarge),
    #[error("a frame of a kind that is not due")]
    Unexpected,
}

#[derive(Debug)]
pub(super) struct Reader {
    half: OwnedReadHalf,
    input: Vec<u8>,
    /// What the last frame took of `input`.
    taken: usize,
}

#[derive(Debug)]
pub(super) struct Writer {
    half: OwnedWriteHalf,
    output: Vec<u8>,
}

/// The two directions of a connection, of which `input` was read already.
pub(super) fn split(stream: TcpStream, input: Vec<u8>) -> (Reader, Writer) {
    let (read, write) = stream.into_split();
    (Reader { half: read, input, taken: 0 }, Writer { half: write, output: Vec::new() })
}

impl Reader {
    /// The next frame. A call that is dropped before it returns loses nothing.
    pub(super) async fn next(&mut self, limit: Duration) -> Result<Frame<'_>, Lost> {
        self.input.drain(..std::mem::take(&mut self.taken));
        while decode(&self.input)?.is_none() {
            self.input.reserve(READ_BYTES);
            let read = timeout(limit, self.half.read_buf(&mut self.input)).await;
            if read.map_err(|_| Lost::Silent)?? == 0 {
                return Err(Lost::Ended);
            }
        }
        let Some((frame, taken)) = decode(&self.input)? else { return Err(Lost::Ended) };
        self.taken = taken;
        Ok(frame)
    }
}

impl Writer {
    /// Sends bytes.
    pub(super) async fn send_bytes(&mut self, bytes: &[u8], limit: Duration) -> Result<(), Lost> {
        let sent = timeout(limit, self.half.write_all(bytes)).await;
        Ok(sent.map_err(|_| Lost::Silent)??)
    }

    /// Sends a frame. A call that is dropped before it returns may have sent a part of it.
    pub(super) async fn send(&mut self, frame: &Frame<'_>, limit: Duration) -> Result<(), Lost> {
        let mut output = std::mem::take(&mut self.output);
        output.clear();
        encode(&mut output, frame)?;
        let sent = self.send_bytes(&output, limit).await;
        output.shrink_to(4 * READ_BYTES);
        self.output = output;
        sent
    }
}

/// What ACCEPT says of chunks, with that of one more.
pub(super) fn chain(so_far: u32, chunk: u32) -> u32 {
    crc32c::crc32c_append(so_far, &chunk.to_le_bytes())
}
