//! A blocking connection that sends one command and waits for its reply.
//!
//! For people and scripts: one request is in flight at a time. It does not retry by itself, since a
//! command whose reply was lost may have been carried out.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use flux_proto::resp::{Reply, ReplyError, parse_reply, skip_reply, write};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 256 * 1024;

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// Nothing answers at the address.
    #[error(
        "cannot connect to {address}: {cause}; is a node running there? (`flux up` starts one)"
    )]
    Connect {
        /// As it was given.
        address: String,
        /// What the system says.
        cause: io::Error,
    },
    /// The connection broke since the last reply.
    #[error("{address} closed the connection in the meantime; the command was not sent")]
    Closed {
        /// As it was given.
        address: String,
    },
    /// The connection broke with a command under way.
    #[error(
        "the connection to {address} was lost before the reply came: {cause}; a write may or may not have taken place"
    )]
    Lost {
        /// As it was given.
        address: String,
        /// What the system says.
        cause: io::Error,
    },
    /// What came is not RESP.
    #[error("{address} does not speak RESP: {cause}")]
    Protocol {
        /// As it was given.
        address: String,
        /// What is wrong.
        cause: ReplyError,
    },
}

/// A connection to one server, made when it is first needed and again after it broke.
pub struct Connection {
    address: String,
    resp3: bool,
    open: Option<Open>,
}

struct Open {
    stream: TcpStream,
    input: Vec<u8>,
    pushes: VecDeque<Reply>,
}

impl Connection {
    /// A connection that is not made yet. With `resp3` it says `HELLO 3` first.
    pub fn new(address: String, resp3: bool) -> Connection {
        Connection { address, resp3, open: None }
    }

    /// The server's address, as it was given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether the connection is there, as far as is known.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Connects if need be.
    pub fn open(&mut self) -> Result<(), ConnectionError> {
        self.opened().map(drop)
    }

    /// Sends a command and waits for the reply. After an error the next call connects anew.
    pub fn request(&mut self, args: &[Vec<u8>]) -> Result<Reply, ConnectionError> {
        let open = self.opened()?;
        if open.is_closed() {
            self.open = None;
            return Err(ConnectionError::Closed { address: self.address.clone() });
        }
        let outcome = open.exchange(args);
        outcome.map_err(|error| {
            self.open = None;
            let address = self.address.clone();
            match error {
                Broken::Io(cause) => ConnectionError::Lost { address, cause },
                Broken::Reply(cause) => ConnectionError::Protocol { address, cause },
            }
        })
    }

    /// What the server sent without being asked, oldest first.
    pub fn take_pushes(&mut self) -> Vec<Reply> {
        self.open.as_mut().map(|open| open.pushes.drain(..).collect()).unwrap_or_default()
    }

    #[cfg(test)]
    pub fn wait_for_close(&self) {
        let stream = &self.open.as_ref().expect("the test has connected").stream;
        assert_eq!(stream.peek(&mut [0]).expect("the stream works"), 0);
    }

    fn opened(&mut self) -> Result<&mut Open, ConnectionError> {
        if self.open.is_none() {
            let stream = connect(&self.address).map_err(|cause| ConnectionError::Connect {
                address: self.address.clone(),
                cause,
            })?;
            let mut open = Open { stream, input: Vec::new(), pushes: VecDeque::new() };
            if self.resp3 {
                let hello = [b"HELLO".to_vec(), b"3".to_vec()];
                open.exchange(&hello).map_err(|error| ConnectionError::Connect {
                    address: self.address.clone(),
                    cause: error.into(),
                })?;
            }
            return Ok(self.open.insert(open));
        }
        Ok(self.open.as_mut().expect("just checked"))
    }
}

enum Broken {
    Io(io::Error),
    Reply(ReplyError),
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> io::Error {
        match broken {
            Broken::Io(error) => error,
            Broken::Reply(error) => io::Error::other(error),
        }
    }
}

impl Open {
    /// Whether the server has closed its side already.
    fn is_closed(&self) -> bool {
        let peeked = self.stream.set_nonblocking(true).and_then(|()| self.stream.peek(&mut [0]));
        let restored = self.stream.set_nonblocking(false);
        let waits = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        restored.is_err()
            || !matches!(&peeked, Ok(1..)) && !peeked.is_err_and(|error| waits(&error))
    }

    fn exchange(&mut self, args: &[Vec<u8>]) -> Result<Reply, Broken> {
        let mut output = Vec::new();
        write::request(&mut output, args);
        self.stream.write_all(&output).map_err(Broken::Io)?;
        loop {
            // A large reply comes in many pieces: looking for its end is cheaper than parsing.
            if skip_reply(&self.input).map_err(Broken::Reply)?.is_none() {
                self.read().map_err(Broken::Io)?;
                continue;
            }
            if let Some((reply, length)) = parse_reply(&self.input).map_err(Broken::Reply)? {
                self.input.drain(..length);
                match reply {
                    Reply::Push(_) => self.pushes.push_back(reply),
                    reply => return Ok(reply),
                }
            }
        }
    }

    /// Reads what has arrived, or waits for some.
    fn read(&mut self) -> io::Result<()> {
        let start = self.input.len();
        self.input.resize(start + READ_BYTES, 0);
        let outcome = self.stream.read(&mut self.input[start..]);
        self.input.truncate(start + outcome.as_ref().map_or(0, |count| *count));
        match outcome? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it")),
            _ => Ok(()),
        }
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&candidate, CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
