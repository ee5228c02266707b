//! The connection to one other node: opened, greeted, written to, and opened again when it is lost.
//!
//! A link that is down keeps nothing: what was not sent is dropped, and Raft repeats what matters.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_proto::peer::{Frame, Hello, MIN_VERSION, Refusal, VERSION, decode, encode_hello};
use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::{Limits, configure};

/// The output's memory is given back when it is sent and larger than this.
const KEPT_BYTES: usize = 256 * 1024;
/// A link that was up for less has failed like one that could not be opened.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// The most that the answer to a hello takes.
const ANSWER_BYTES: usize = 1024;

/// What a call has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Up,
    Down,
    /// Nothing listens there, which was not known before.
    Absent,
}

#[derive(Debug)]
enum Phase {
    /// Until it is tried again.
    Waiting(Instant),
    /// Until that is given up.
    Connecting(TcpStream, Instant),
    /// The hello is sent; until waiting for the answer is given up.
    Greeting(TcpStream, Instant),
    /// Since then.
    Up(TcpStream, Instant),
}

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no connection within the time limit")]
    ConnectTimeout,
    #[error("no answer to the hello within the time limit")]
    AnswerTimeout,
    #[error("refused, {reason}: {1}", reason = words(*.0))]
    Refused(u8, String),
    #[error("what answers is not a node of this version")]
    BadAnswer,
    #[error("the peer takes nothing any more")]
    Blocked,
    #[error("the peer has closed the connection")]
    Ended,
    #[error("nothing is heard of the peer")]
    Silent,
    #[error("the connection was lost")]
    Socket(#[source] io::Error),
}

#[derive(Debug)]
pub(super) struct Outgoing {
    node: u32,
    address: SocketAddr,
    hello: Vec<u8>,
    key: usize,
    token: Token,
    phase: Phase,
    /// To be sent, from `sent` on.
    pub(super) output: Vec<u8>,
    pub(super) sent: usize,
    /// Since when the socket takes no more; it says when it does.
    blocked: Option<Instant>,
    /// The socket has said that it takes more, since it was blocked.
    writable: bool,
    /// The answer to the hello, as far as it is there.
    answer: Vec<u8>,
    /// The process that the answer was of.
    instance: u64,
    /// The version of the protocol that it chose.
    version: u16,
    pub(super) failures: u32,
    /// It is known that nothing listens there.
    absent: bool,
    /// The refusal that was last logged.
    logged_refusal: Option<u8>,
    /// State of the generator of the pauses' jitter.
    random: u64,
}

impl Outgoing {
    pub(super) fn new(
        hello: &Hello,
        address: SocketAddr,
        key: usize,
        token: Token,
        now: Instant,
    ) -> Outgoing {
        let mut bytes = Vec::new();
        encode_hello(&mut bytes, hello);
        Outgoing {
            node: hello.to,
            address,
            hello: bytes,
            key,
            token,
            phase: Phase::Waiting(now),
            output: Vec::new(),
            sent: 0,
            blocked: None,
            writable: false,
            answer: Vec::new(),
            instance: 0,
            version: 0,
            failures: 0,
            absent: false,
            logged_refusal: None,
            random: hello.instance ^ (u64::from(hello.worker) << 32) ^ u64::from(hello.to),
        }
    }

    pub(super) fn node(&self) -> u32 {
        self.node
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn key(&self) -> usize {
        self.key
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up(..))
    }

    /// The process that the link leads to, while it is up.
    pub(super) fn instance(&self) -> Option<u64> {
        self.is_up().then_some(self.instance)
    }

    /// The version that is spoken on the link, while it is up.
    pub(super) fn version(&self) -> Option<u16> {
        self.is_up().then_some(self.version)
    }

    /// Where to append a frame, unless so much is not sent yet.
    pub(super) fn out(&mut self, limit: usize) -> Option<&mut Vec<u8>> {
        let room = self.is_up() && self.output.len() - self.sent < limit;
        room.then_some(&mut self.output)
    }

    /// When `tick` has something to do.
    pub(super) fn due(&self, limits: &Limits) -> Option<Instant> {
        match &self.phase {
            Phase::Waiting(until) | Phase::Connecting(_, until) | Phase::Greeting(_, until) => {
                Some(*until)
            }
            // Once the socket has said that it takes more, the next flush decides.
            Phase::Up(..) if self.writable => None,
            Phase::Up(..) => self.blocked.map(|since| since + limits.blocked_timeout),
        }
    }

    pub(super) fn tick(&mut self, registry: &Registry, limits: &Limits, now: Instant) -> Change {
        if self.due(limits).is_none_or(|due| due > now) {
            return Change::None;
        }
        let cause = match self.phase {
            Phase::Waiting(_) => return self.connect(registry, limits, now),
            Phase::Connecting(..) => Cause::ConnectTimeout,
            Phase::Greeting(..) => Cause::AnswerTimeout,
            Phase::Up(..) => Cause::Blocked,
        };
        self.fail(&cause, registry, limits, now)
    }

    fn connect(&mut self, registry: &Registry, limits: &Limits, now: Instant) -> Change {
        let opened = TcpStream::connect(self.address).and_then(|mut stream| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            registry.register(&mut stream, self.token, interest).map(|()| stream)
        });
        match opened {
            Ok(stream) => {
                self.phase = Phase::Connecting(stream, now + limits.connect_timeout);
                Change::None
            }
            Err(error) => self.fail(&Cause::Connect(error), registry, limits, now),
        }
    }

    /// Takes note of an event of the socket.
    pub(super) fn ready(
        &mut self,
        writable: bool,
        registry: &Registry,
        limits: &Limits,
        now: Instant,
    ) -> Change {
        let result = match self.phase {
            Phase::Waiting(_) => return Change::None,
            Phase::Connecting(..) => self.connected(limits, now),
            Phase::Greeting(..) => self.answered(now),
            Phase::Up(..) => {
                // `blocked` keeps its time until something was sent.
                self.watch_end(writable)
            }
        };
        match result {
            Ok(change) => change,
            Err(cause) => self.fail(&cause, registry, limits, now),
        }
    }

    /// If the connection stands, says hello.
    fn connected(&mut self, limits: &Limits, now: Instant) -> Result<Change, Cause> {
        let Phase::Connecting(stream, _) = &mut self.phase else { return Ok(Change::None) };
        if let Some(error) = stream.take_error().map_err(Cause::Connect)? {
            return Err(Cause::Connect(error));
        }
        match stream.peer_addr() {
            Ok(_) => {}
            // Not yet: the event was not for this.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(Change::None),
            Err(error) => return Err(Cause::Connect(error)),
        }
        configure(stream, limits.blocked_timeout).map_err(Cause::Connect)?;
        // The socket's buffer is empty, so a hello is taken whole.
        let count = stream.write(&self.hello).map_err(Cause::Connect)?;
        if count < self.hello.len() {
            return Err(Cause::Connect(io::ErrorKind::WriteZero.into()));
        }
        self.answer.clear();
        let until = now + limits.handshake_timeout;
        self.phase = match std::mem::replace(&mut self.phase, Phase::Waiting(now)) {
            Phase::Connecting(stream, _) => Phase::Greeting(stream, until),
            other => other,
        };
        // The answer may be there already.
        self.answered(now)
    }

    /// Reads the answer to the hello.
    fn answered(&mut self, now: Instant) -> Result<Change, Cause> {
        let Phase::Greeting(stream, _) = &mut self.phase else { return Ok(Change::None) };
        let mut scratch = [0; ANSWER_BYTES];
        while let Some(count) = read(stream, &mut scratch)? {
            self.answer.extend_from_slice(&scratch[..count]);
            if self.answer.len() > ANSWER_BYTES {
                return Err(Cause::BadAnswer);
            }
            match decode(&self.answer) {
                Ok(None) => {}
                Ok(Some((
                    Frame::Welcome { version: version @ MIN_VERSION..=VERSION, instance },
                    taken,
                ))) if taken == self.answer.len() => {
                    (self.version, self.instance) = (version, instance);
                    break;
                }
                Ok(Some((Frame::Refused { reason, text }, _))) => {
                    return Err(Cause::Refused(reason, text.to_owned()));
                }
                _ => return Err(Cause::BadAnswer),
            }
        }
        if self.answer.is_empty() || !matches!(decode(&self.answer), Ok(Some(_))) {
            return Ok(Change::None);
        }
        self.phase = match std::mem::replace(&mut self.phase, Phase::Waiting(now)) {
            Phase::Greeting(stream, _) => Phase::Up(stream, now),
            other => other,
        };
        tracing::info!(node = %NodeId(self.node), address = %self.address, "link to a node is up");
        self.answer = Vec::new();
        self.absent = false;
        self.logged_refusal = None;
        Ok(Change::Up)
    }

    /// On a link that is up nothing comes back but its end.
    fn watch_end(&mut self, writable: bool) -> Result<Change, Cause> {
        let Phase::Up(stream, _) = &mut self.phase else { return Ok(Change::None) };
        if read(stream, &mut [0; 16])?.is_some() {
            return Err(Cause::BadAnswer);
        }
        self.writable |= writable;
        Ok(Change::None)
    }

    /// Sends with one write what the socket takes.
    pub(super) fn flush(&mut self, registry: &Registry, limits: &Limits, now: Instant) -> Change {
        let Phase::Up(stream, _) = &mut self.phase else { return Change::None };
        if self.sent == self.output.len() || (self.blocked.is_some() && !self.writable) {
            return Change::None;
        }
        match stream.write(&self.output[self.sent..]) {
            Ok(0) => {
                let cause = Cause::Socket(io::ErrorKind::WriteZero.into());
                return self.fail(&cause, registry, limits, now);
            }
            Ok(count) => {
                self.sent += count;
                // The socket's buffer is full when it takes only a part; it says when it is not.
                self.blocked = (self.sent < self.output.len()).then_some(now);
                self.writable = false;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.blocked.get_or_insert(now);
                self.writable = false;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return self.fail(&Cause::Socket(error), registry, limits, now),
        }
        if self.sent == self.output.len() {
            self.sent = 0;
            self.output.clear();
            self.output.shrink_to(KEPT_BYTES);
        } else if self.sent > KEPT_BYTES.max(self.output.len() / 2) {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Change::None
    }

    /// Gives the connection up, to be opened again after a pause.
    fn fail(
        &mut self,
        cause: &Cause,
        registry: &Registry,
        limits: &Limits,
        now: Instant,
    ) -> Change {
        let lived = match self.phase {
            Phase::Up(_, since) => now.saturating_duration_since(since),
            _ => Duration::ZERO,
        };
        self.failures = if lived < SHORT_LIFE { self.failures.saturating_add(1) } else { 1 };
        self.log(cause);
        let change = self.close(registry);
        // Whoever refuses will do so again: that is for a person to change.
        let limit = match cause {
            Cause::Refused(..) => limits.longest_pause,
            _ => pause_limit(self.failures, limits),
        };
        self.random = next_random(self.random);
        self.phase = Phase::Waiting(now + jittered(limit, self.random));
        let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if let Cause::Connect(error) = cause
            && refused(error)
            && !std::mem::replace(&mut self.absent, true)
        {
            return Change::Absent;
        }
        change
    }

    fn log(&mut self, cause: &Cause) {
        let (node, address) = (NodeId(self.node), self.address);
        let error: &(dyn std::error::Error + 'static) = cause;
        match cause {
            Cause::Refused(reason, _) if self.logged_refusal != Some(*reason) => {
                self.logged_refusal = Some(*reason);
                // Another node at an address that is out of date is news, and no more: the registry knows.
                let passing = matches!(
                    Refusal::from_number(*reason),
                    Some(Refusal::Busy | Refusal::OtherNode)
                );
                if passing {
                    tracing::warn!(%node, %address, error, "a node refuses this one");
                } else {
                    tracing::error!(%node, %address, error, "a node refuses this one");
                }
            }
            _ if self.is_up() => tracing::info!(%node, %address, error, "link to a node is lost"),
            _ if self.failures == 1 => {
                tracing::info!(%node, %address, error, "no link to a node yet; trying on");
            }
            _ => tracing::debug!(%node, %address, error, "no link to a node"),
        }
    }

    /// Does not wait any longer before it tries again: the node lives.
    pub(super) fn hurry(&mut self, now: Instant) {
        if let Phase::Waiting(until) = &mut self.phase {
            *until = now.min(*until);
        }
    }

    /// Gives up a connection on which nothing is heard of the node any more.
    pub(super) fn give_up(&mut self, registry: &Registry, limits: &Limits, now: Instant) -> Change {
        match self.phase {
            Phase::Up(..) => self.fail(&Cause::Silent, registry, limits, now),
            _ => Change::None,
        }
    }

    /// Closes the connection and drops what was to be sent.
    pub(super) fn close(&mut self, registry: &Registry) -> Change {
        self.output = Vec::new();
        self.sent = 0;
        self.blocked = None;
        self.writable = false;
        let waiting = Phase::Waiting(Instant::now());
        match std::mem::replace(&mut self.phase, waiting) {
            Phase::Waiting(_) => Change::None,
            Phase::Connecting(mut stream, _) | Phase::Greeting(mut stream, _) => {
                let _ = registry.deregister(&mut stream);
                Change::None
            }
            Phase::Up(mut stream, _) => {
                let _ = registry.deregister(&mut stream);
                Change::Down
            }
        }
    }
}

/// Why a node refuses, by the number that it gave.
fn words(reason: u8) -> String {
    match Refusal::from_number(reason) {
        Some(reason) => reason.to_string(),
        None => format!("for a reason that this version does not know ({reason})"),
    }
}

/// Reads once; `None` where there is nothing now. The end is a cause to give up.
fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<Option<usize>, Cause> {
    loop {
        match stream.read(buffer) {
            Ok(0) => return Err(Cause::Ended),
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Cause::Socket(error)),
        }
    }
}

/// The longest pause after so many failures in a row.
fn pause_limit(failures: u32, limits: &Limits) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    limits.first_pause.saturating_mul(1 << doublings).min(limits.longest_pause)
}

/// Between half the limit and all of it, so that workers that failed together try apart.
fn jittered(limit: Duration, random: u64) -> Duration {
    let fraction = (random >> 32) as f64 / f64::from(u32::MAX);
    limit.mul_f64(0.5 + fraction / 2.0)
}

/// splitmix64, <https://prng.di.unimi.it/splitmix64.c>, with the state's mix as the next state.
fn next_random(state: u64) -> u64 {
    let mut mixed = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_words() {
        let told = Cause::Refused(Refusal::OtherNode as u8, "this is node-00000007".to_owned());
        let expected = "refused, as another node has the address now: this is node-00000007";
        assert_eq!(told.to_string(), expected);
        let later = Cause::Refused(99, "no".to_owned()).to_string();
        assert_eq!(later, "refused, for a reason that this version does not know (99): no");
    }

    #[test]
    fn pauses_double_up_to_the_longest_one_and_differ() {
        let limits = Limits::default();
        let in_ms: Vec<_> = (1..=8).map(|n| pause_limit(n, &limits).as_millis()).collect();
        assert_eq!(in_ms, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(pause_limit(u32::MAX, &limits), limits.longest_pause);

        let mut random = 7;
        let mut pauses = Vec::new();
        for _ in 0..100 {
            random = next_random(random);
            pauses.push(jittered(limits.longest_pause, random));
        }
        let (half, whole) = (Duration::from_millis(500), Duration::from_millis(1000));
        assert!(pauses.iter().all(|pause| (half..=whole).contains(pause)));
        pauses.sort_unstable();
        assert!(pauses[90] - pauses[10] > Duration::from_millis(200), "{pauses:?}");
    }
}
