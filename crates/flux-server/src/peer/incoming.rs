//! A connection that another node opened: its hello, then its frames.
//!
//! Whether it is welcome is not decided here.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use flux_proto::peer::{
    Frame, FrameError, HELLO_BYTES, Hello, HelloError, decode, decode_hello, encode,
};
use mio::net::TcpStream;

use super::READ_BYTES;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the peer has closed the connection")]
    Ended,
    #[error("{0}")]
    Socket(io::Error),
    #[error("it does not speak the peer protocol")]
    WrongProtocol,
    #[error("its hello is malformed")]
    Hello,
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("a frame of a kind that is not due")]
    Unexpected,
}

/// How far a connection was served.
#[derive(Debug)]
pub(super) enum Step {
    /// There is nothing to read until an event says so.
    Idle,
    /// There may be more to read.
    More,
    /// It said hello and waits for an answer; what was read, the hello included, is in `input`.
    Hello(Hello),
    Lost(Lost),
}

/// Where frames come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) node: u32,
    /// The node's process, as it says.
    pub(crate) instance: u64,
    /// A number that no other connection has.
    pub(crate) session: u64,
}

#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) stream: TcpStream,
    /// Received and not yet consumed.
    pub(super) input: Vec<u8>,
    /// Known once it was welcomed.
    pub(super) source: Option<Source>,
    /// The worker of the node that opened it.
    pub(super) worker: u16,
    /// When it must have said hello.
    pub(super) hello_due: Instant,
    /// Since when a frame is on its way of which a part is here.
    pub(super) unfinished: Option<Instant>,
    /// The socket may have more to read: it has not said otherwise since it was last readable.
    pub(super) readable: bool,
    /// The other side has sent its last byte, though it may not have been read yet.
    pub(super) ended: bool,
    /// Listed to be served.
    pub(super) listed: bool,
}

impl Incoming {
    pub(super) fn new(stream: TcpStream, input: Vec<u8>, hello_due: Instant) -> Incoming {
        Incoming {
            stream,
            input,
            source: None,
            worker: 0,
            hello_due,
            unfinished: None,
            readable: true,
            ended: false,
            listed: false,
        }
    }

    /// Consumes what is there and reads on, at most `budget` bytes.
    pub(super) fn step(
        &mut self,
        scratch: &mut [u8],
        budget: &mut usize,
        deliver: &mut impl FnMut(Source, Frame<'_>),
    ) -> Step {
        match self.try_step(scratch, budget, deliver) {
            Ok(step) => step,
            Err(lost) => Step::Lost(lost),
        }
    }

    fn try_step(
        &mut self,
        scratch: &mut [u8],
        budget: &mut usize,
        deliver: &mut impl FnMut(Source, Frame<'_>),
    ) -> Result<Step, Lost> {
        if let Some(step) = self.consume_input(deliver)? {
            return Ok(step);
        }
        while self.readable {
            if *budget == 0 {
                return Ok(Step::More);
            }
            let room = scratch.len().min(*budget);
            let count = match self.stream.read(&mut scratch[..room]) {
                Ok(0) => return Err(Lost::Ended),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Lost::Socket(error)),
            };
            *budget -= count;
            // A read that did not fill the buffer has emptied the socket; more will be announced. The
            // end may have been announced already, together with these bytes.
            self.readable = count == room || self.ended;
            if let Some(step) = self.take(&scratch[..count], deliver)? {
                return Ok(step);
            }
        }
        Ok(Step::Idle)
    }

    /// Consumes bytes that were received; what is incomplete is kept.
    fn take(
        &mut self,
        received: &[u8],
        deliver: &mut impl FnMut(Source, Frame<'_>),
    ) -> Result<Option<Step>, Lost> {
        match self.source {
            Some(source) if self.input.is_empty() => {
                let consumed = consume(received, source, deliver)?;
                self.input.extend_from_slice(&received[consumed..]);
                Ok(None)
            }
            _ => {
                self.input.extend_from_slice(received);
                self.consume_input(deliver)
            }
        }
    }

    fn consume_input(
        &mut self,
        deliver: &mut impl FnMut(Source, Frame<'_>),
    ) -> Result<Option<Step>, Lost> {
        let Some(source) = self.source else {
            return match decode_hello(&self.input) {
                Ok(hello) => Ok(hello.map(Step::Hello)),
                Err(HelloError::BadMagic) => Err(Lost::WrongProtocol),
                Err(HelloError::Malformed(_)) => Err(Lost::Hello),
            };
        };
        let consumed = consume(&self.input, source, deliver)?;
        if consumed > 0 {
            self.input.drain(..consumed);
            // After a large frame its memory is given back.
            self.input.shrink_to(READ_BYTES);
        }
        Ok(None)
    }

    /// Whether what was just read is a sign of life though no frame may be whole: not if the one on its way
    /// has been so for too long.
    pub(super) fn is_heard(
        &mut self,
        read: bool,
        whole: bool,
        now: Instant,
        limit: Duration,
    ) -> bool {
        if self.input.is_empty() {
            self.unfinished = None;
            return false;
        }
        let since = match self.unfinished {
            Some(since) if !whole => since,
            _ => *self.unfinished.insert(now),
        };
        read && now.duration_since(since) < limit
    }

    /// Answers the hello, which is then consumed; `instance` is this process. The hello must be one that is
    /// not refused.
    pub(super) fn welcome(&mut self, hello: &Hello, instance: u64) -> io::Result<()> {
        let mut answer = Vec::new();
        let version = hello.choose_version().ok_or(io::ErrorKind::InvalidInput)?;
        let welcome = Frame::Welcome { version, instance };
        encode(&mut answer, &welcome).expect("a welcome fits in a frame");
        // The socket's buffer is empty, so this is taken whole.
        if self.stream.write(&answer)? < answer.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.input.drain(..HELLO_BYTES.min(self.input.len()));
        Ok(())
    }
}

/// Delivers the frames that are whole; returns how many bytes they took.
fn consume(
    input: &[u8],
    source: Source,
    deliver: &mut impl FnMut(Source, Frame<'_>),
) -> Result<usize, Lost> {
    let mut start = 0;
    while let Some((frame, taken)) = decode(&input[start..])? {
        if !is_of_a_link(&frame) {
            return Err(Lost::Unexpected);
        }
        deliver(source, frame);
        start += taken;
    }
    Ok(start)
}

fn is_of_a_link(frame: &Frame<'_>) -> bool {
    match frame {
        Frame::Raft { .. }
        | Frame::Beat { .. }
        | Frame::BeatReply { .. }
        | Frame::Sleep { .. }
        | Frame::Asleep { .. }
        | Frame::Wake { .. }
        | Frame::Gone { .. }
        | Frame::Leads { .. }
        | Frame::Request(_)
        | Frame::Response { .. } => true,
        Frame::Welcome { .. }
        | Frame::Refused { .. }
        | Frame::Offer(_)
        | Frame::Accept { .. }
        | Frame::Chunk { .. }
        | Frame::Done { .. }
        | Frame::Failed { .. } => false,
    }
}
