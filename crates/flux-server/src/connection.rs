//! One client connection: its buffers, and its replies in the order of its requests.
//!
//! A request that cannot be answered at once takes a slot; later replies queue behind it. Nothing
//! here reads or executes: the worker does.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use flux_core::{Error, Reply};
use flux_proto::native as wire;
use flux_proto::resp::RequestParser;
use mio::net::TcpStream;
use parking_lot::Mutex;

use crate::codes::code_of;
use crate::native;
use crate::resp::{self, Form, Gather, NodeReply, Session};
use crate::scan::Walk;

/// A connection is not read while this much output waits: the client's own pace bounds our memory.
pub(crate) const OUTPUT_PAUSE: usize = 256 * 1024;

/// A connection is not read while this many of its requests wait.
pub(crate) const SLOTS_PAUSE: usize = 16 * 1024;

/// Which protocol a connection speaks; its first byte tells.
#[derive(Debug)]
pub(crate) enum Protocol {
    Unknown,
    Resp(Box<Resp>),
    /// After the preface.
    Native,
}

/// A RESP connection. The session is shared with the list of clients; its own worker holds the lock
/// while it serves the connection, so others wait shortly and it hardly ever does.
#[derive(Debug)]
pub(crate) struct Resp {
    pub(crate) parser: RequestParser,
    pub(crate) session: Arc<Mutex<Session>>,
}

/// How a reply is put into bytes.
#[derive(Clone, Debug)]
pub(crate) enum Render {
    Resp(Form),
    Native(native::Form),
}

/// A request's place in the order of replies.
#[derive(Debug)]
pub(crate) enum Slot {
    /// Its write is under way.
    Waiting(Render),
    /// Answered, but an earlier one is not.
    Done(Reply, Render),
    /// Rendered bytes.
    Bytes(Vec<u8>),
    /// Its keys span partitions; some parts are missing.
    Parts { parts: Vec<Option<Reply>>, missing: usize, gather: Gathering },
    /// All keys are being deleted; so many partitions are not done.
    Flush { missing: usize, failed: Option<Error> },
    /// Keys are being looked for, partition after partition. The outcome is there at the end.
    Walk { walk: Box<Walk>, render: WalkRender, outcome: Option<Result<(), Error>> },
}

/// How what a walk has found is put into bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WalkRender {
    /// A page of SCAN.
    Page,
    /// All keys, for KEYS.
    Keys,
    /// The first key, for RANDOMKEY.
    Key,
    Native(native::PageForm),
}

impl WalkRender {
    /// Appends the reply of a walk that has ended.
    pub(crate) fn put(
        &self,
        walk: Walk,
        outcome: Result<(), Error>,
        session: Option<&Session>,
        out: &mut Vec<u8>,
    ) {
        let next = walk.next();
        let keys = |walk: Walk| walk.items.into_iter().map(|item| item.key);
        let reply = match (self, outcome) {
            (WalkRender::Native(form), outcome) => {
                return native::render_page(form, &walk, outcome.as_ref().copied(), out);
            }
            (_, Err(error)) => NodeReply::Failed(error),
            (WalkRender::Page, _) => NodeReply::Page { next, keys: keys(walk).collect() },
            (WalkRender::Keys, _) if next.is_some() => {
                let text = "ERR too many keys match; use SCAN, which answers them in pages";
                NodeReply::Error(text.to_owned())
            }
            (WalkRender::Keys, _) => NodeReply::Keys(keys(walk).collect()),
            (WalkRender::Key, _) => NodeReply::Key(keys(walk).next()),
        };
        if let Some(session) = session {
            resp::render_node(&reply, session, out);
        }
    }
}

/// How the replies of several partitions become one.
#[derive(Debug)]
pub(crate) enum Gathering {
    Resp(Gather),
    Native(native::Gather),
}

impl Render {
    /// Appends a reply.
    pub(crate) fn put(&self, reply: &Reply, session: Option<&mut Session>, out: &mut Vec<u8>) {
        match (self, session) {
            (Render::Resp(form), Some(session)) => resp::render(form, reply, session, out),
            (Render::Native(form), _) => native::render(form, reply, out),
            (Render::Resp(_), None) => unreachable!("a connection that speaks RESP has a session"),
        }
    }
}

impl Slot {
    /// Whether its reply can be rendered.
    fn is_due(&self) -> bool {
        match self {
            Slot::Waiting(_) => false,
            Slot::Done(..) | Slot::Bytes(_) => true,
            Slot::Parts { missing, .. } | Slot::Flush { missing, .. } => *missing == 0,
            Slot::Walk { outcome, .. } => outcome.is_some(),
        }
    }

    /// Appends the reply of a slot that is due.
    pub(crate) fn put(self, session: Option<&mut Session>, out: &mut Vec<u8>) {
        match self {
            Slot::Waiting(_) => unreachable!("it is not due"),
            Slot::Done(reply, render) => render.put(&reply, session, out),
            Slot::Bytes(bytes) => out.extend_from_slice(&bytes),
            Slot::Parts { parts, gather, .. } => {
                let replies: Vec<Reply> =
                    parts.into_iter().map(|part| part.expect("no part is missing")).collect();
                match (gather, session) {
                    (Gathering::Resp(gather), Some(session)) => {
                        resp::render_gathered(&gather, &replies, session, out);
                    }
                    (Gathering::Native(gather), _) => {
                        native::render_gathered(&gather, &replies, out);
                    }
                    (Gathering::Resp(_), None) => {
                        unreachable!("a connection that speaks RESP has a session")
                    }
                }
            }
            Slot::Flush { failed, .. } => {
                let reply = failed.map_or(NodeReply::Ok, NodeReply::Failed);
                if let Some(session) = session {
                    resp::render_node(&reply, session, out);
                }
            }
            Slot::Walk { walk, render, outcome } => {
                let outcome = outcome.expect("it is due");
                render.put(*walk, outcome, session.as_deref(), out);
            }
        }
    }
}

/// Which workers have the requests that are under way. It means nothing when there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UnderWay {
    With(u16),
    WithSeveral,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) id: u64,
    pub(crate) serial: u32,
    pub(crate) protocol: Protocol,
    /// Received and not yet consumed.
    pub(crate) input: Vec<u8>,
    /// To be sent, from `sent` on.
    pub(crate) output: Vec<u8>,
    pub(crate) sent: usize,
    pub(crate) slots: VecDeque<Slot>,
    under_way: UnderWay,
    /// The sequence number of the first slot.
    pub(crate) first_sequence: u64,
    /// The socket may have more to read: it has not said otherwise since it was last readable.
    pub(crate) readable: bool,
    /// The other side has sent its last byte, though it may not have been read yet.
    pub(crate) ended: bool,
    /// The socket takes no more until it says so.
    pub(crate) blocked: bool,
    /// Close when the output is sent.
    pub(crate) closing: bool,
    /// Listed by the worker to be served.
    pub(crate) listed: bool,
    /// Listed by the worker to be flushed.
    pub(crate) unflushed: bool,
    /// A command that runs when all slots are answered stopped the parsing.
    pub(crate) barrier: bool,
    pub(crate) last_active: Instant,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, id: u64, serial: u32, now: Instant) -> Connection {
        Connection {
            stream,
            id,
            serial,
            protocol: Protocol::Unknown,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            slots: VecDeque::new(),
            under_way: UnderWay::WithSeveral,
            first_sequence: 0,
            readable: true,
            ended: false,
            blocked: false,
            closing: false,
            listed: false,
            unflushed: false,
            barrier: false,
            last_active: now,
        }
    }

    /// Whether to stop reading requests until some are answered and sent.
    pub(crate) fn paused(&self) -> bool {
        self.barrier || self.unsent() >= OUTPUT_PAUSE || self.slots.len() >= SLOTS_PAUSE
    }

    pub(crate) fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Takes the next place in the order of replies; returns its sequence number.
    pub(crate) fn push(&mut self, slot: Slot) -> u64 {
        self.slots.push_back(slot);
        self.first_sequence + self.slots.len() as u64 - 1
    }

    /// The sequence number that the next `push` will return.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.first_sequence + self.slots.len() as u64
    }

    /// Fills in a reply. A late reply to a request that is gone is dropped.
    pub(crate) fn complete(&mut self, sequence: u64, part: u32, reply: Reply) {
        let index = sequence.checked_sub(self.first_sequence).map(|index| index as usize);
        let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) else { return };
        match slot {
            Slot::Waiting(render) => *slot = Slot::Done(reply, render.clone()),
            Slot::Parts { parts, missing, .. } => {
                if let Some(place) = parts.get_mut(part as usize) {
                    *place = Some(reply);
                    *missing -= 1;
                }
            }
            Slot::Flush { missing, failed } => {
                *missing -= 1;
                if let Reply::Error(error) = reply {
                    *failed = Some(error);
                }
            }
            _ => {}
        }
    }

    /// Answers with rendered bytes, behind the requests that are not answered yet.
    pub(crate) fn answer(&mut self, bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        if self.slots.is_empty() {
            self.output.extend_from_slice(&bytes);
        } else {
            self.push(Slot::Bytes(bytes));
        }
    }

    /// Tells a client of the native protocol, behind its replies, that what it sends from here on is
    /// not carried out. RESP has no words for that.
    pub(crate) fn say_goodbye(&mut self) {
        if let Protocol::Native = self.protocol {
            let mut text = Vec::new();
            let error = Error::Stopping;
            wire::encode_error(&mut text, 0, 0, code_of(&error), &error.to_string());
            self.answer(text);
        }
    }

    /// Whether a read of another worker's partition must wait until the requests under way are answered:
    /// it would overtake those that are with other workers. With one worker they keep their order.
    pub(crate) fn would_overtake(&self, owner: u16) -> bool {
        !self.slots.is_empty() && self.under_way != UnderWay::With(owner)
    }

    /// Notes that the next slot's request is with a worker.
    pub(crate) fn sent_to(&mut self, owner: u16) {
        self.under_way = match self.under_way {
            _ if self.slots.is_empty() => UnderWay::With(owner),
            UnderWay::With(other) if other == owner => UnderWay::With(owner),
            _ => UnderWay::WithSeveral,
        };
    }

    /// Whether a request is a FLUSHALL that is under way.
    pub(crate) fn is_flushing(&self, sequence: u64) -> bool {
        let index = sequence.checked_sub(self.first_sequence).map(|index| index as usize);
        let slot = index.and_then(|index| self.slots.get(index));
        matches!(slot, Some(Slot::Flush { .. }))
    }

    /// The walk of a request, if it is one under way.
    pub(crate) fn walk(
        &mut self,
        sequence: u64,
    ) -> Option<(&mut Walk, &mut Option<Result<(), Error>>)> {
        let index = sequence.checked_sub(self.first_sequence).map(|index| index as usize);
        match index.and_then(|index| self.slots.get_mut(index)) {
            Some(Slot::Walk { walk, outcome, .. }) if outcome.is_none() => Some((walk, outcome)),
            _ => None,
        }
    }

    /// Renders the replies that are due: those before the first request that is not answered.
    fn answer_due(&mut self) {
        if !self.slots.front().is_some_and(Slot::is_due) {
            return;
        }
        let session = match &self.protocol {
            Protocol::Resp(resp) => Some(Arc::clone(&resp.session)),
            _ => None,
        };
        let mut session = session.as_ref().map(|session| session.lock());
        while self.slots.front().is_some_and(Slot::is_due) && self.unsent() < OUTPUT_PAUSE {
            let Some(slot) = self.slots.pop_front() else { return };
            self.first_sequence += 1;
            slot.put(session.as_deref_mut(), &mut self.output);
        }
    }

    /// Renders the replies that are due and sends them, as far as the socket takes them.
    pub(crate) fn answer_and_flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        loop {
            self.answer_due();
            total += self.flush()?;
            // Replies are rendered a part at a time: there may be more for a socket that took them all.
            if self.blocked || !self.slots.front().is_some_and(Slot::is_due) {
                break;
            }
        }
        if self.slots.is_empty() {
            self.barrier = false;
        }
        Ok(total)
    }

    /// Sends what the socket takes. An error means that the connection is gone.
    fn flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        while self.sent < self.output.len() && !self.blocked {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.sent += count;
                    total += count;
                    // The socket's buffer is full when it takes only a part; it says when it is not.
                    self.blocked = self.sent < self.output.len();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.sent == self.output.len() {
            self.sent = 0;
            self.output.clear();
            if self.output.capacity() > OUTPUT_PAUSE {
                self.output = Vec::new();
            }
        } else if self.sent > OUTPUT_PAUSE {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(total)
    }
}
