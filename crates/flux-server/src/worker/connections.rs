//! Connections of clients, from the listener to their end: who gets them, which are refused, what an event
//! says of one, and when it is closed.
//!
//! What is read from them is in `serve`; the links to other nodes are those of `peer`.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Token};

use super::{LISTENER, LOG_INTERVAL, Worker};
use crate::connection::Connection;
use crate::mailbox::Message;
use crate::recovery::TICK;

/// Closes a connection with a last word, in RESP: what it speaks is not known yet.
fn refuse(mut stream: TcpStream, text: &[u8]) {
    // The socket's buffer is empty, so this is taken whole; a client that has gone misses it.
    let _ = io::Write::write(&mut stream, text);
}

impl Worker {
    pub(super) fn listen(&mut self, mut listener: TcpListener) {
        if self.stop_by.is_some() {
            return;
        }
        // Fails only for want of memory in the kernel; then the node is of no use.
        let registered = self.poll.registry().register(&mut listener, LISTENER, Interest::READABLE);
        registered.expect("a listener can be watched");
        self.listener = Some(listener);
        self.accept();
    }

    pub(super) fn accept(&mut self) {
        self.accept_again = false;
        let Some(listener) = &self.listener else { return };
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let target = self.next_worker;
                    self.next_worker = (target + 1) % self.shared.mailboxes.len() as u16;
                    let mailbox = &self.shared.mailboxes[usize::from(target)];
                    if let Err(Message::Connection(stream)) =
                        mailbox.send(Message::Connection(stream))
                    {
                        refuse(
                            stream,
                            b"-OVERLOADED too much work is waiting; try again later\r\n",
                        );
                        self.shared.stats.connections_refused.add(1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of file descriptors, mostly. What waits is not announced again.
                    self.accept_again = true;
                    let now = Instant::now();
                    if now >= self.next_accept_warning {
                        self.next_accept_warning = now + LOG_INTERVAL;
                        tracing::warn!(
                            %error,
                            "cannot accept connections; trying again every {TICK:?}"
                        );
                    }
                    return;
                }
            }
        }
    }

    pub(super) fn adopt(&mut self, mut stream: TcpStream) {
        let limit = self.shared.max_connections.load(Ordering::Relaxed);
        if self.stop_by.is_some() {
            return;
        }
        if self.shared.connections.load(Ordering::Relaxed) >= limit {
            self.shared.stats.connections_refused.add(1);
            refuse(stream, b"-ERR max number of clients reached\r\n");
            return;
        }
        // Replies are whole when they are written: waiting for more would only delay them.
        let _ = stream.set_nodelay(true);
        let key = self.connections.vacant_key();
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut stream, Token(key), interest) {
            tracing::warn!(%error, "cannot watch a connection");
            return;
        }
        self.next_serial = self.next_serial.wrapping_add(1);
        let id = self.shared.next_connection.fetch_add(1, Ordering::Relaxed);
        let mut connection = Connection::new(stream, id, self.next_serial, Instant::now());
        connection.listed = true;
        self.connections.insert(connection);
        self.listed.push(key);
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        self.shared.stats.connections_accepted.add(1);
    }

    pub(super) fn ready(&mut self, key: usize, event: &mio::event::Event) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            connection.readable = true;
            connection.ended |= event.is_read_closed() || event.is_error();
            if !connection.listed {
                connection.listed = true;
                self.listed.push(key);
            }
        }
        if event.is_writable() && connection.blocked {
            connection.blocked = false;
            if !connection.unflushed {
                connection.unflushed = true;
                self.unflushed.push(key);
            }
        }
    }

    pub(super) fn close(&mut self, key: usize) {
        if let Some(mut connection) = self.connections.try_remove(key) {
            // Closing the descriptor takes it out of the poll in any case.
            let _ = self.poll.registry().deregister(&mut connection.stream);
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            self.shared.clients.lock().remove(&connection.id);
        }
    }

    pub(super) fn close_idle(&mut self, now: Instant) {
        let timeout = Duration::from_secs(self.shared.idle_timeout_s.load(Ordering::Relaxed));
        if timeout.is_zero() {
            return;
        }
        let idle = |connection: &Connection| {
            connection.slots.is_empty() && now.duration_since(connection.last_active) >= timeout
        };
        let keys: Vec<usize> =
            self.connections.iter().filter(|(_, one)| idle(one)).map(|(key, _)| key).collect();
        self.shared.stats.idle_closes.add(keys.len() as u64);
        for key in keys {
            self.close(key);
        }
    }
}
