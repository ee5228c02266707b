//! A blocking RESP client whose waits end: for tests that look at one connection.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use flux_proto::resp::reply::{Reply, parse_reply};

pub(super) struct Client {
    pub(super) stream: TcpStream,
    received: Vec<u8>,
}

impl Client {
    pub(super) fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("connected");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
        stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a socket");
        Client { stream, received: Vec::new() }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    /// Sends no more.
    pub(super) fn finish(&mut self) {
        self.stream.shutdown(Shutdown::Write).expect("shut down");
    }

    /// The next reply; `None` when the connection has ended.
    pub(super) fn reply(&mut self) -> Option<Reply> {
        let mut buffer = [0; 64 * 1024];
        loop {
            if let Some((reply, bytes)) = parse_reply(&self.received).expect("RESP") {
                self.received.drain(..bytes);
                return Some(reply);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    assert!(self.received.is_empty(), "the connection ended within a reply");
                    return None;
                }
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) => panic!("no reply: {error}"),
            }
        }
    }

    /// How many replies have arrived and were not taken, where the socket does not block.
    pub(super) fn received_replies(&mut self) -> usize {
        let mut buffer = [0; 64 * 1024];
        while let Ok(count @ 1..) = self.stream.read(&mut buffer) {
            self.received.extend_from_slice(&buffer[..count]);
        }
        let (mut start, mut count) = (0, 0);
        while let Some((_, bytes)) = parse_reply(&self.received[start..]).expect("RESP") {
            start += bytes;
            count += 1;
        }
        count
    }

    /// The next `count` replies.
    pub(super) fn replies(&mut self, count: usize) -> Vec<Reply> {
        (0..count).map(|_| self.reply().expect("a reply")).collect()
    }

    pub(super) fn ask(&mut self, words: &[&str]) -> Reply {
        self.send(&request(words));
        self.reply().expect("a reply")
    }
}

/// A request of these words.
pub(super) fn request(words: &[&str]) -> Vec<u8> {
    let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
    request_of(&words)
}

/// A request of these words, which may be any bytes.
pub(super) fn request_of(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}
