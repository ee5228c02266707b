//! The links of one worker to the other nodes of its cluster, inside its event loop.
//!
//! One connection goes out to each other node and carries frames one way; what the others send comes
//! in on connections that they opened. docs/peer-protocol.md says what is sent.
//!
//! The worker calls `ready` for the events of the tokens that it gave, then once a round `receive`,
//! `flush` and, at the time that `next_due` says, `tick`. Nothing here blocks, and nothing is kept for
//! a link that is down: a frame that cannot be queued is the caller's to drop. Frames are not looked
//! into, and which nodes there are is decided elsewhere.

mod incoming;
mod outgoing;
mod refusals;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use flux_proto::peer::{Frame, Hello, LinkKind, Refusal, WRONG_PROTOCOL, encode};
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use rustix::net::sockopt;
use slab::Slab;

pub(crate) use incoming::Source;
use incoming::{Incoming, Lost, Step};
use outgoing::{Change, Outgoing};
use refusals::{Refusals, named};

/// Bytes read from a socket at a time.
const READ_BYTES: usize = 64 * 1024;
/// Bytes read from one link in a round, and then it is another's turn.
const ROUND_BYTES: usize = 1024 * 1024;

/// Who this worker is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalIdentity {
    pub(crate) cluster: u64,
    pub(crate) node: u32,
    /// Drawn at random when the process started.
    pub(crate) instance: u64,
    /// The number of this worker, and how many the node has.
    pub(crate) worker: u16,
    pub(crate) workers: u16,
}

impl LocalIdentity {
    /// The hello of a connection to that node.
    pub(crate) fn hello(&self, to: u32, kind: LinkKind) -> Hello {
        Hello {
            min_version: flux_proto::peer::MIN_VERSION,
            max_version: flux_proto::peer::VERSION,
            kind,
            worker: self.worker,
            cluster: self.cluster,
            from: self.node,
            to,
            instance: self.instance,
        }
    }
}

/// Bounds of time and space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Nothing is added to a link's output while this much of it is not sent.
    pub(crate) out_bytes: usize,
    pub(crate) connect_timeout: Duration,
    /// How long the other side of a new connection has for its part of the handshake.
    pub(crate) handshake_timeout: Duration,
    /// A link whose peer has taken nothing for so long is opened anew.
    pub(crate) blocked_timeout: Duration,
    /// How long bytes of one frame are signs of life before it is whole.
    pub(crate) frame_timeout: Duration,
    /// The pause after the first failure, which doubles up to the longest one.
    pub(crate) first_pause: Duration,
    pub(crate) longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            out_bytes: 16 * 1024 * 1024,
            connect_timeout: Duration::from_secs(1),
            handshake_timeout: Duration::from_secs(2),
            blocked_timeout: Duration::from_secs(5),
            frame_timeout: Duration::from_secs(30),
            first_pause: Duration::from_millis(20),
            longest_pause: Duration::from_secs(1),
        }
    }
}

/// What has become of the links to and from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Frames can be sent to the node.
    LinkUp(u32),
    /// They cannot any more; those not yet sent are lost, and perhaps some that were.
    LinkDown(u32),
    /// Nothing listens at the node's address: its process does not run. Told once until a link is up.
    Absent(u32),
    /// A connection from the node has ended. A newer one may have taken its place: what the node had said on
    /// the older one and was not read is lost.
    InboundDown {
        node: u32,
        /// The node ended it, as the kernel does for a process that was killed. Otherwise this side did.
        by_peer: bool,
    },
}

/// A connection that another worker should have. `Peers::adopt` takes it there.
#[derive(Debug)]
pub(crate) struct Misplaced {
    pub(crate) worker: u16,
    pub(crate) stream: TcpStream,
    /// What was read from it, the hello included.
    pub(crate) input: Vec<u8>,
}

/// A connection on which a snapshot comes, after the handshake.
#[derive(Debug)]
pub(crate) struct BulkStream {
    pub(crate) from: u32,
    pub(crate) stream: TcpStream,
    /// What was read from it after the hello.
    pub(crate) input: Vec<u8>,
}

/// What a token stands for.
#[derive(Debug)]
enum Place {
    Outgoing(u32),
    Incoming(Incoming),
}

/// The links of one worker.
#[derive(Debug)]
pub(crate) struct Peers {
    local: LocalIdentity,
    limits: Limits,
    registry: Registry,
    tokens: Range<usize>,
    /// By token, less the first one.
    places: Slab<Place>,
    outgoing: BTreeMap<u32, Outgoing>,
    /// The places of the connections that frames come in on, by node and its worker.
    incoming: BTreeMap<(u32, u16), usize>,
    /// The places of connections that have not said hello.
    greeting: Vec<usize>,
    /// Places that may have something to read.
    listed: Vec<usize>,
    scratch: Vec<u8>,
    next_session: u64,
    refusals: Refusals,
    events: VecDeque<Event>,
    /// The nodes that bytes of unfinished frames have come from.
    heard: Vec<u32>,
    misplaced: Vec<Misplaced>,
    bulk: Vec<BulkStream>,
}

impl Peers {
    /// No links yet. The tokens are for their sockets alone; three quarters of them bound the incoming
    /// connections, and the rest the nodes.
    pub(crate) fn new(
        local: LocalIdentity,
        registry: Registry,
        tokens: Range<usize>,
        limits: Limits,
    ) -> Peers {
        Peers {
            local,
            limits,
            registry,
            tokens,
            places: Slab::new(),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            greeting: Vec::new(),
            listed: Vec::new(),
            scratch: vec![0; READ_BYTES],
            next_session: 1,
            refusals: Refusals::default(),
            events: VecDeque::new(),
            heard: Vec::new(),
            misplaced: Vec::new(),
            bulk: Vec::new(),
        }
    }

    /// Keeps a link to each of these nodes, itself apart, and to no other.
    pub(crate) fn set_members(&mut self, members: &BTreeMap<u32, SocketAddr>, now: Instant) {
        let gone = |link: &&Outgoing| members.get(&link.node()) != Some(&link.address());
        let gone: Vec<u32> = self.outgoing.values().filter(gone).map(Outgoing::node).collect();
        for node in gone {
            if let Some(mut link) = self.outgoing.remove(&node) {
                let change = link.close(&self.registry);
                note(&mut self.events, node, change);
                self.places.remove(link.key());
            }
        }
        for (&node, &address) in members {
            if node == self.local.node || self.outgoing.contains_key(&node) {
                continue;
            }
            if self.places.len() >= self.tokens.len() {
                tracing::error!(
                    node = named(node),
                    "no link to a node: there are too many connections"
                );
                continue;
            }
            let key = self.places.insert(Place::Outgoing(node));
            let token = Token(self.tokens.start + key);
            let hello = self.local.hello(node, LinkKind::Frames);
            let link = Outgoing::new(&hello, address, key, token, now);
            self.outgoing.insert(node, link);
        }
        self.tick(now);
    }

    /// Breaks the links to and from a node that nothing is heard of: the kernel may take long to notice that
    /// packets are lost, and longer to send them again when they are not any more.
    pub(crate) fn reset(&mut self, node: u32, now: Instant) {
        if let Some(link) = self.outgoing.get_mut(&node) {
            let change = link.give_up(&self.registry, &self.limits, now);
            note(&mut self.events, node, change);
        }
        let keys: Vec<usize> = self
            .incoming
            .iter()
            .filter(|((from, _), _)| *from == node)
            .map(|(_, key)| *key)
            .collect();
        for key in keys {
            self.remove_incoming(key);
            self.events.push_back(Event::InboundDown { node, by_peer: false });
        }
    }

    /// Whether an event with this token is for `ready`.
    pub(crate) fn owns(&self, token: Token) -> bool {
        self.tokens.contains(&token.0)
    }

    /// Whether frames can be sent to the node now.
    pub(crate) fn is_up(&self, node: u32) -> bool {
        self.outgoing.get(&node).is_some_and(Outgoing::is_up)
    }

    /// The process that the link to the node leads to; none where it is down.
    pub(crate) fn instance(&self, node: u32) -> Option<u64> {
        self.outgoing.get(&node)?.instance()
    }

    /// The version of the protocol that is spoken on the link to the node; none where it is down.
    pub(crate) fn version(&self, node: u32) -> Option<u16> {
        self.outgoing.get(&node)?.version()
    }

    /// Where to append one frame for the node. `None` where the link is down, or too much waits for it.
    pub(crate) fn out(&mut self, node: u32) -> Option<&mut Vec<u8>> {
        self.outgoing.get_mut(&node)?.out(self.limits.out_bytes)
    }

    /// Sends what was appended, with one write for each node, as far as the sockets take it.
    pub(crate) fn flush(&mut self, now: Instant) {
        for link in self.outgoing.values_mut() {
            let change = link.flush(&self.registry, &self.limits, now);
            note(&mut self.events, link.node(), change);
        }
    }

    /// Takes note of an event that concerns one of the sockets. Events are hints: one too many, or for
    /// the socket that had the token before, does no harm.
    pub(crate) fn ready(&mut self, event: &mio::event::Event, now: Instant) {
        let Some(key) = event.token().0.checked_sub(self.tokens.start) else { return };
        let ended = event.is_read_closed() || event.is_error();
        match self.places.get_mut(key) {
            None => {}
            Some(Place::Outgoing(node)) => {
                let node = *node;
                let Some(link) = self.outgoing.get_mut(&node) else { return };
                let change = link.ready(event.is_writable(), &self.registry, &self.limits, now);
                note(&mut self.events, node, change);
            }
            Some(Place::Incoming(link)) => {
                link.readable |= event.is_readable() || ended;
                link.ended |= ended;
                self.list(key);
            }
        }
    }

    /// Does what is due: opens links, and gives up what has taken too long.
    pub(crate) fn tick(&mut self, now: Instant) {
        for link in self.outgoing.values_mut() {
            let change = link.tick(&self.registry, &self.limits, now);
            note(&mut self.events, link.node(), change);
        }
        let late: Vec<usize> =
            self.greeting.iter().copied().filter(|key| self.hello_due(*key) <= Some(now)).collect();
        for key in late {
            tracing::debug!("a connection to the peer port said no hello");
            self.remove_incoming(key);
        }
    }

    /// When `tick` has something to do.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let outgoing = self.outgoing.values().filter_map(|link| link.due(&self.limits));
        outgoing.chain(self.greeting.iter().filter_map(|key| self.hello_due(*key))).min()
    }

    /// Whether `receive` has something to do though no event comes.
    pub(crate) fn has_work(&self) -> bool {
        !self.listed.is_empty()
    }

    /// Takes a connection that was accepted on the peer port, or that another worker gave up with what
    /// it had read. The stream must not be registered with any poll.
    pub(crate) fn adopt(&mut self, mut stream: TcpStream, input: Vec<u8>, now: Instant) {
        if self.places.len() >= self.tokens.len() - self.tokens.len() / 4 {
            self.refuse(&mut stream, None, Refusal::Busy, now);
            return;
        }
        let key = self.places.vacant_key();
        let token = Token(self.tokens.start + key);
        let watched = configure(&stream, self.limits.blocked_timeout)
            .and_then(|()| self.registry.register(&mut stream, token, Interest::READABLE));
        if let Err(error) = watched {
            tracing::warn!(%error, "cannot watch a connection of a peer");
            return;
        }
        let due = now + self.limits.handshake_timeout;
        self.places.insert(Place::Incoming(Incoming::new(stream, input, due)));
        self.greeting.push(key);
        self.list(key);
    }

    /// Reads what has come in, a bounded part of it, and delivers the frames of those who have shaken
    /// hands.
    pub(crate) fn receive(&mut self, now: Instant, mut deliver: impl FnMut(Source, Frame<'_>)) {
        let mut listed = std::mem::take(&mut self.listed);
        for key in listed.drain(..) {
            let Some(Place::Incoming(link)) = self.places.get_mut(key) else { continue };
            link.listed = false;
            self.receive_from(key, now, &mut deliver);
        }
        // Those that were listed meanwhile are for the next round.
        listed.append(&mut self.listed);
        self.listed = listed;
    }

    fn receive_from(
        &mut self,
        key: usize,
        now: Instant,
        deliver: &mut impl FnMut(Source, Frame<'_>),
    ) {
        let mut budget = ROUND_BYTES;
        loop {
            let Some(Place::Incoming(link)) = self.places.get_mut(key) else { return };
            let (before, mut whole) = (budget, false);
            let step = link.step(&mut self.scratch, &mut budget, &mut |source, frame| {
                whole = true;
                deliver(source, frame);
            });
            if let Some(Source { node, .. }) = link.source
                && link.is_heard(budget < before, whole, now, self.limits.frame_timeout)
            {
                self.heard.push(node);
            }
            match step {
                Step::Idle => return,
                Step::More => return self.list(key),
                Step::Hello(hello) => self.greet(key, &hello, now),
                Step::Lost(lost) => return self.lose(key, &lost, now),
            }
        }
    }

    /// Answers a hello: the connection stays here, or goes elsewhere, or ends.
    fn greet(&mut self, key: usize, hello: &Hello, now: Instant) {
        if let Err(reason) = refusals::judge(&self.local, hello) {
            if let Some(mut link) = self.remove_incoming(key) {
                self.refuse(&mut link.stream, Some(hello.from), reason, now);
            }
            return;
        }
        let worker = hello.worker % self.local.workers.max(1);
        if hello.kind == LinkKind::Frames && worker == self.local.worker {
            return self.welcome(key, hello, now);
        }
        let Some(mut link) = self.remove_incoming(key) else { return };
        if hello.kind == LinkKind::Frames {
            let (stream, input) = (link.stream, link.input);
            return self.misplaced.push(Misplaced { worker, stream, input });
        }
        if let Err(error) = link.welcome(hello, self.local.instance) {
            tracing::debug!(node = named(hello.from), %error, "a bulk connection was lost");
            return;
        }
        let Incoming { stream, input, .. } = link;
        self.bulk.push(BulkStream { from: hello.from, stream, input });
    }

    fn welcome(&mut self, key: usize, hello: &Hello, now: Instant) {
        let Some(Place::Incoming(link)) = self.places.get_mut(key) else { return };
        let welcomed = link.welcome(hello, self.local.instance);
        let (node, instance, session) = (hello.from, hello.instance, self.next_session);
        link.source = Some(Source { node, instance, session });
        link.worker = hello.worker;
        self.next_session += 1;
        self.greeting.retain(|other| *other != key);
        if let Some(outgoing) = self.outgoing.get_mut(&hello.from) {
            outgoing.hurry(now);
        }
        let older = self.incoming.insert((hello.from, hello.worker), key);
        if let Some(older) = older {
            tracing::debug!(
                node = named(hello.from),
                "a newer connection takes the place of an older one"
            );
            self.remove_incoming(older);
            self.events.push_back(Event::InboundDown { node: hello.from, by_peer: false });
        }
        if let Err(error) = welcomed {
            tracing::debug!(node = named(hello.from), %error, "a connection was lost in the handshake");
            self.lose(key, &Lost::Socket(error), now);
        }
    }

    /// Ends a connection that was lost, or whose bytes make no sense.
    fn lose(&mut self, key: usize, lost: &Lost, now: Instant) {
        let Some(mut link) = self.remove_incoming(key) else { return };
        let source = link.source.map(|source| source.node);
        match lost {
            Lost::Ended | Lost::Socket(_) => {
                tracing::debug!(node = source.map(named), reason = %lost, "a peer's connection ended");
            }
            Lost::WrongProtocol => {
                let _ = link.stream.write(WRONG_PROTOCOL);
                let _ = link.stream.shutdown(std::net::Shutdown::Write);
                self.refusals.wrong_protocol(&link.stream, now);
            }
            Lost::Hello => self.refuse(&mut link.stream, None, Refusal::Malformed, now),
            Lost::Frame(_) | Lost::Unexpected => {
                self.refusals.bad_frame(source, lost, now);
            }
        }
        if let Some(node) = source {
            let by_peer = matches!(lost, Lost::Ended | Lost::Socket(_));
            self.events.push_back(Event::InboundDown { node, by_peer });
        }
    }

    fn refuse(&mut self, stream: &mut TcpStream, from: Option<u32>, reason: Refusal, now: Instant) {
        let text = refusals::text(reason, &self.local);
        let mut frame = Vec::new();
        let refused = Frame::Refused { reason: reason as u8, text: &text };
        if encode(&mut frame, &refused).is_ok() {
            // The socket's buffer is empty, so this is taken whole; a peer that has gone misses it.
            let _ = stream.write(&frame);
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        self.refusals.refused(stream, from, reason, &text, now);
    }

    /// Connections for other workers.
    pub(crate) fn misplaced(&mut self) -> impl Iterator<Item = Misplaced> + '_ {
        self.misplaced.drain(..)
    }

    /// Connections for snapshots.
    pub(crate) fn bulk(&mut self) -> impl Iterator<Item = BulkStream> + '_ {
        self.bulk.drain(..)
    }

    /// The nodes of which a part of a frame has come since the last call: large ones take their time on a
    /// loaded link. A frame that takes longer than the limit counts when it is whole.
    pub(crate) fn heard(&mut self) -> impl Iterator<Item = u32> + '_ {
        self.heard.drain(..)
    }

    /// What has happened since the last call, in order.
    pub(crate) fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    fn hello_due(&self, key: usize) -> Option<Instant> {
        match self.places.get(key) {
            Some(Place::Incoming(link)) => Some(link.hello_due),
            _ => None,
        }
    }

    fn list(&mut self, key: usize) {
        if let Some(Place::Incoming(link)) = self.places.get_mut(key)
            && !link.listed
        {
            link.listed = true;
            self.listed.push(key);
        }
    }

    /// Takes an incoming connection out of the poll and of every list.
    fn remove_incoming(&mut self, key: usize) -> Option<Incoming> {
        if !matches!(self.places.get(key), Some(Place::Incoming(_))) {
            return None;
        }
        let Place::Incoming(mut link) = self.places.remove(key) else { return None };
        // Closing the descriptor would take it out too, but some are handed on.
        let _ = self.registry.deregister(&mut link.stream);
        self.greeting.retain(|other| *other != key);
        if let Some(Source { node, .. }) = link.source
            && self.incoming.get(&(node, link.worker)) == Some(&key)
        {
            self.incoming.remove(&(node, link.worker));
        }
        Some(link)
    }
}

fn note(events: &mut VecDeque<Event>, node: u32, change: Change) {
    match change {
        Change::None => {}
        Change::Up => events.push_back(Event::LinkUp(node)),
        Change::Down => events.push_back(Event::LinkDown(node)),
        Change::Absent => events.push_back(Event::Absent(node)),
    }
}

/// Sets what the kernel should do for a connection between nodes: send at once, and give up a peer
/// that for so long acknowledges or takes nothing, which a read would never notice and a write late.
pub(crate) fn configure(stream: &impl AsFd, timeout: Duration) -> io::Result<()> {
    sockopt::set_tcp_nodelay(stream, true)?;
    #[cfg(target_os = "linux")]
    {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(stream, timeout_ms)?;
        let second = Duration::from_secs(1);
        sockopt::set_tcp_keepidle(stream, timeout.max(second))?;
        sockopt::set_tcp_keepintvl(stream, second)?;
        sockopt::set_socket_keepalive(stream, true)?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = timeout;
    Ok(())
}
