//! The broker: an exchange with one durable queue, connections to it that break, and answers that come late or
//! never.
//!
//! It keeps what it has stored, whatever happens to it. Messages of one connection keep their order.

use std::collections::BTreeMap;

use flux_proto::event::read_json_body;

use super::{Event, World};
use crate::check::{Promise, Violation};
use crate::node::{Outcome, Outgoing, Work};
use crate::plan::{Fault, MS};

/// Of a thousand messages so many are refused, so many answers never come, and so many come late.
const REFUSED_PER_MILLE: u32 = 5;
const UNANSWERED_PER_MILLE: u32 = 2;
const LATE_PER_MILLE: u32 = 30;

/// The broker's own state; what it has stored is with the checker.
#[derive(Debug)]
pub(super) struct Broker {
    pub(super) is_up: bool,
    pub(super) is_bound: bool,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
}

/// A connection, as the broker has it.
#[derive(Debug)]
struct Session {
    host: usize,
    process: u64,
    /// When the last message that was sent arrives.
    arrives_us: u64,
    /// It is broken, and the broker still takes in what had been sent.
    is_broken: bool,
}

impl Default for Broker {
    fn default() -> Broker {
        Broker { is_up: true, is_bound: true, sessions: BTreeMap::new(), next_session: 1 }
    }
}

impl World {
    /// A process wants a connection.
    pub(super) fn connect(&mut self, host: usize, process: u64) {
        let delay = self.random.between(MS / 2, 20 * MS);
        let session = self.broker.is_up.then_some(self.broker.next_session);
        self.broker.next_session += 1;
        if let Some(number) = session {
            let one = Session { host, process, arrives_us: 0, is_broken: false };
            self.broker.sessions.insert(number, one);
        }
        let opened = Work::BrokerOpened(session);
        self.queue.push(self.now_us + delay, Event::BrokerSays(host, process, opened));
    }

    /// A process sends a message.
    pub(super) fn publish(&mut self, outgoing: Outgoing) {
        let slow = if !self.settling && self.random.per_mille(20) { 200 * MS } else { 2 * MS };
        let at = self.now_us + self.random.between(50, slow);
        let Some(session) = self.broker.sessions.get_mut(&outgoing.session) else { return };
        session.arrives_us = session.arrives_us.max(at);
        self.queue.push(session.arrives_us, Event::Published(outgoing));
    }

    /// A message reaches the broker.
    pub(super) fn published(&mut self, outgoing: &Outgoing) {
        let Outgoing { session: number, tag, partition, publication } = outgoing;
        let Some(session) = self.broker.sessions.get(number) else { return };
        let (host, process, is_broken) = (session.host, session.process, session.is_broken);
        self.note(13, &[host as u64, *number, *tag, u64::from(*partition)]);
        let well = self.settling;
        let outcome = if !well && self.random.per_mille(REFUSED_PER_MILLE) {
            Outcome::Refused
        } else if self.broker.is_bound {
            self.store(host, &publication.body);
            Outcome::Stored
        } else {
            Outcome::Returned
        };
        let id = &publication.message_id;
        self.trace
            .line(self.now_us, format_args!("h{host} {id} is {outcome:?} (#{tag} of {number})"));
        if is_broken || !well && self.random.per_mille(UNANSWERED_PER_MILLE) {
            return;
        }
        let late = if !well && self.random.per_mille(LATE_PER_MILLE) { 1_000 * MS } else { 3 * MS };
        let at = self.now_us + self.random.between(50, late);
        let answer = Work::BrokerAnswers(*number, *tag, outcome);
        self.queue.push(at, Event::BrokerSays(host, process, answer));
    }

    fn store(&mut self, host: usize, body: &[u8]) {
        let stored = match read_json_body(body) {
            Ok(records) => self.feed.stored(&records, &self.reference),
            Err(error) => Err(Violation::new(Promise::FeedTrue, format!("no message: {error}"))),
        };
        if let Err(mut violation) = stored {
            violation.evidence = format!("from h{host}: {}", violation.evidence);
            self.violated(violation);
            return;
        }
        self.queued(body.to_vec());
    }

    /// Connections break: all of them, or those of one host. What was sent is lost, or comes to be stored with
    /// nobody to hear of it.
    pub(super) fn break_sessions(&mut self, host: Option<usize>) {
        let keeps = self.broker.is_up && self.random.per_mille(500);
        let mut told = Vec::new();
        for (number, session) in &mut self.broker.sessions {
            if host.is_none_or(|host| session.host == host) && !session.is_broken {
                session.is_broken = true;
                told.push((*number, session.host, session.process));
            }
        }
        if !keeps {
            let is_up = self.broker.is_up;
            self.broker
                .sessions
                .retain(|number, _| is_up && !told.iter().any(|(broken, ..)| broken == number));
        }
        for (number, host, process) in told {
            let at = self.now_us + self.random.between(50, 100 * MS);
            self.queue.push(at, Event::BrokerSays(host, process, Work::BrokerLost(number)));
        }
    }

    /// The broker stops, breaks connections or does not take what comes, for a while.
    pub(super) fn trouble_broker(&mut self, fault: Fault, host: usize, lasts: u64) {
        match fault {
            Fault::BrokerDown => {
                self.say(format_args!("the broker is down"));
                self.broker.is_up = false;
                self.break_sessions(None);
            }
            Fault::BrokerReset => {
                let host = self.random.per_mille(500).then_some(host);
                self.say(format_args!("connections to the broker break: {host:?}"));
                self.break_sessions(host);
                return;
            }
            _ => {
                self.say(format_args!("no queue is bound"));
                self.broker.is_bound = false;
            }
        }
        self.queue.push(self.now_us + lasts, Event::BrokerRecovers);
    }

    /// The broker is there and takes what comes.
    pub(super) fn broker_recovers(&mut self) {
        if !(self.broker.is_up && self.broker.is_bound) {
            self.say(format_args!("the broker is well"));
        }
        (self.broker.is_up, self.broker.is_bound) = (true, true);
    }

    /// Looks at how far a host's replica says that changes are passed on, and at the memory that they take.
    pub(super) fn observe_feed(&mut self, host: usize, partition: u16) {
        let process = self.hosts[host].process.as_ref();
        let Some(hosted) = process.and_then(|one| one.hosted.get(&partition)) else { return };
        let (cursor, bytes) = (hosted.replica.cursor(), hosted.ring_bytes());
        let through = self.feed.through(partition);
        if cursor.revision > through {
            let evidence =
                format!("h{host} p{partition}: {cursor:?}, the broker has all up to {through}");
            self.violated(Violation::new(Promise::CursorConfirmed, evidence));
        }
        if bytes > self.plan.ring_bytes {
            let evidence =
                format!("h{host} p{partition}: {bytes} bytes of {}", self.plan.ring_bytes);
            self.violated(Violation::new(Promise::RingBounded, evidence));
        }
    }

    /// What the broker lacks of a partition, if anything.
    pub(super) fn complaint_of_feed(&self, partition: u16) -> Option<String> {
        if !self.plan.publishes {
            return None;
        }
        let (_, end) = self.reference.end(partition);
        let through = self.feed.through(partition);
        if through != end {
            return Some(format!("the broker has p{partition} up to {through} of {end}"));
        }
        let lags = |cursor: u64| cursor != end;
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        let mut replicas = processes.filter_map(|one| one.replica(partition));
        let behind = replicas.find(|one| lags(one.cursor().revision))?;
        Some(format!("{:x} has the cursor at {:?} of {end}", behind.id(), behind.cursor()))
    }
}
