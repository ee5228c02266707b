//! Virtual clients: what they ask, whom they ask, and what they do with the answer.
//!
//! A client has one operation under way at a time. It asks the node that it believes to lead, follows
//! hints, and asks again what was surely not carried out. A write that may have been carried out it
//! leaves alone, with an unknown outcome; or, if the client has a session, it repeats it, since that
//! takes effect once.

use flux_core::session::Once;

use crate::check::history::{Answer, Call, History, Key, Operation, VALUE_STEP};
use crate::plan::Plan;
use crate::random::Random;

/// How often an operation is sent before the client gives up on it.
const TRIES: u32 = 12;
/// Keys from this number on have an expiry. They are not in the history.
pub const VOLATILE_KEYS: u16 = 1000;

/// A request on its way to a node.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which client asks.
    pub client: u32,
    /// Which of its tries this is.
    pub attempt: u64,
    /// The key.
    pub key: Key,
    /// What is asked.
    pub ask: Ask,
    /// Which write of which session it is.
    pub once: Option<Once>,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// An operation that goes into the history.
    Call(Call),
    /// A write of a key that expires after so many milliseconds.
    Expiring(i64, u64),
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// It was carried out.
    Answer(Answer),
    /// It was not carried out; perhaps that host leads.
    NotLeader(Option<usize>),
    /// It was not carried out.
    Refused,
    /// Nobody knows.
    Unknown,
    /// It was carried out before, and the answer is forgotten.
    Gone,
}

/// What a client does next.
#[derive(Clone, Debug)]
pub enum Next {
    /// It sends this to a host.
    Send(usize, Request),
    /// It waits for so long, and then begins or goes on.
    Pause(u64),
    /// The response was to nothing that it waits for.
    Nothing,
}

/// A client.
#[derive(Debug)]
pub struct Client {
    id: u32,
    random: Random,
    /// How many of a thousand operations are reads.
    reads_per_mille: u32,
    /// Its session, if it repeats writes.
    session: Option<u64>,
    /// Writes of the session so far.
    sequence: u64,
    /// The host that it believes to lead each partition.
    believed: Vec<usize>,
    current: Option<Current>,
    attempts: u64,
    next_value: i64,
    /// The last version seen of each key, by its place.
    versions: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Current {
    key: Key,
    ask: Ask,
    invoked_us: u64,
    tries: u32,
    /// The attempt that is waited for, and the host it was sent to.
    attempt: u64,
    once: Option<Once>,
    /// An earlier attempt may have been carried out or be on its way still.
    doubtful: bool,
    waiting: bool,
}

impl Client {
    /// A client that has not asked anything.
    pub fn new(id: u32, plan: &Plan, mut random: Random) -> Client {
        let reads_per_mille = plan.reads_per_mille[random.below(4) as usize];
        let session = random.per_mille(600).then(|| random.any());
        let hosts = plan.hosts as u64;
        let believed = (0..plan.partitions).map(|_| random.below(hosts) as usize).collect();
        let places = usize::from(plan.partitions) * usize::from(plan.keys);
        Client {
            id,
            random,
            reads_per_mille,
            session,
            sequence: 0,
            believed,
            current: None,
            attempts: 0,
            next_value: 1,
            versions: vec![0; places],
        }
    }

    /// Whether an operation is under way.
    pub fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// Begins an operation, or sends the one under way again.
    pub fn act(&mut self, now_us: u64, plan: &Plan) -> Next {
        if self.current.as_ref().is_some_and(|current| current.waiting) {
            return Next::Nothing;
        }
        if self.current.is_none() {
            let (key, ask) = self.choose(plan);
            let once = self.once(ask);
            self.current = Some(Current {
                key,
                ask,
                once,
                invoked_us: now_us,
                tries: 0,
                attempt: 0,
                doubtful: false,
                waiting: false,
            });
        }
        self.send()
    }

    /// The number of a write in the session.
    fn once(&mut self, ask: Ask) -> Option<Once> {
        let session = self.session.filter(|_| ask != Ask::Call(Call::Get))?;
        self.sequence += 1;
        Some(Once { session, sequence: self.sequence, acked_below: self.sequence })
    }

    fn send(&mut self) -> Next {
        let Some(current) = &mut self.current else { return Next::Nothing };
        self.attempts += 1;
        current.tries += 1;
        current.attempt = self.attempts;
        current.waiting = true;
        let host = self.believed[usize::from(current.key.partition)];
        let Current { key, ask, attempt, once, .. } = *current;
        Next::Send(host, Request { client: self.id, attempt, key, ask, once })
    }

    fn choose(&mut self, plan: &Plan) -> (Key, Ask) {
        let random = &mut self.random;
        let partition = random.below(u64::from(plan.partitions)) as u16;
        // Half of all operations meet at a few keys.
        let keys = if random.per_mille(500) { 2.min(plan.keys) } else { plan.keys };
        let number = random.below(u64::from(keys)) as u16;
        let place = usize::from(partition) * usize::from(plan.keys) + usize::from(number);
        let key = Key { partition, number };
        // Unique, so that a value says who wrote it.
        let own = i64::from(self.id + 1) * 1_000_000 + self.next_value;
        let value = own * VALUE_STEP;
        if random.per_mille(self.reads_per_mille) {
            return (key, Ask::Call(Call::Get));
        }
        self.next_value += 1;
        let call = match random.below(100) {
            0..40 => Call::Set(value),
            40..50 => Call::SetIfAbsent(value),
            50..70 => Call::SetIfVersion(self.versions[place], value),
            // Without a session nothing would tell afterwards whose removal took place.
            70..80 if self.session.is_some() => Call::Delete,
            70..95 => Call::Increment(own),
            _ => {
                let key = Key { partition, number: VOLATILE_KEYS + number };
                return (key, Ask::Expiring(value, random.between(20, 2000)));
            }
        };
        (key, Ask::Call(call))
    }

    /// Takes a response, or with `None` notes that none came in time, to an attempt.
    pub fn receive(
        &mut self,
        now_us: u64,
        (attempt, from): (u64, usize),
        response: Option<Response>,
        plan: &Plan,
        history: &mut History,
    ) -> Next {
        let Some(current) = self.current.as_mut().filter(|one| one.attempt == attempt) else {
            return Next::Nothing;
        };
        if !current.waiting {
            return Next::Nothing;
        }
        current.waiting = false;
        let partition = usize::from(current.key.partition);
        match response {
            Some(Response::Answer(answer)) => {
                self.believed[partition] = from;
                self.finish(Some((now_us, answer)), plan, history)
            }
            Some(Response::Gone) => {
                current.doubtful = true;
                self.finish(None, plan, history)
            }
            Some(Response::NotLeader(hint)) => {
                let hint = hint.filter(|host| *host != from);
                self.believed[partition] =
                    hint.unwrap_or_else(|| self.random.below(plan.hosts as u64) as usize);
                self.again(plan, history)
            }
            Some(Response::Refused) => self.again(plan, history),
            Some(Response::Unknown) | None => {
                if response.is_none() {
                    self.believed[partition] = self.random.below(plan.hosts as u64) as usize;
                }
                let reads = current.ask == Ask::Call(Call::Get);
                current.doubtful |= !reads;
                if reads || current.once.is_some() {
                    self.again(plan, history)
                } else {
                    self.finish(None, plan, history)
                }
            }
        }
    }

    /// The operation was not carried out by its last attempt, or may be repeated.
    fn again(&mut self, plan: &Plan, history: &mut History) -> Next {
        match &self.current {
            Some(current) if current.tries < TRIES => {
                let random = &mut self.random;
                Next::Pause(random.between(plan.tick_us / 4, plan.tick_us))
            }
            _ => self.finish(None, plan, history),
        }
    }

    fn finish(
        &mut self,
        returned: Option<(u64, Answer)>,
        plan: &Plan,
        history: &mut History,
    ) -> Next {
        let Some(current) = self.current.take() else { return Next::Nothing };
        let Ask::Call(call) = current.ask else { return self.pause(plan) };
        let place = usize::from(current.key.partition) * usize::from(plan.keys)
            + usize::from(current.key.number);
        match returned {
            Some((_, Answer::Value(Some((_, version)))))
            | Some((
                _,
                Answer::Written(version)
                | Answer::Counter(_, version)
                | Answer::NotWritten(version),
            )) => self.versions[place] = version,
            Some((_, Answer::Value(None) | Answer::Deleted(_))) => self.versions[place] = 0,
            None => {}
        }
        // What was surely not carried out, and reads without an answer, changed nothing.
        if returned.is_some() || current.doubtful {
            let Current { key, invoked_us, once, .. } = current;
            let once = once.map(|once| (once.session, once.sequence));
            history.add(key, Operation { client: self.id, call, invoked_us, once, returned });
        }
        self.pause(plan)
    }

    fn pause(&mut self, plan: &Plan) -> Next {
        let (low, high) = plan.think_us;
        Next::Pause(self.random.between(low, high))
    }

    /// Ends what is under way, at the end of a run.
    pub fn stop(&mut self, plan: &Plan, history: &mut History) {
        if let Some(current) = &mut self.current {
            current.doubtful |= current.waiting && current.ask != Ask::Call(Call::Get);
        }
        self.finish(None, plan, history);
    }
}
