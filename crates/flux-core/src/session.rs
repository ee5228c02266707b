//! Safe retries: which writes of which client a partition has answered, and how.
//!
//! A client that cannot know whether its write took place sends it again. So that it takes effect once,
//! it travels with the number of the client's session and one of its own, [`Once`], and its answer goes
//! into the log in the same batch as its effects. [`Sessions`] is what all answers so far come to: a
//! part of the replicated state like the table, changed by `draft::apply` alone and by nothing but what
//! is in the log, so it is the same on every replica at the same entry, and in its snapshots.
//!
//! A repeated write gets the answer of the first one. What is evaluated and not applied yet counts too:
//! `Draft::repeated` looks at both. Remembered is what was done, and also that a condition did not
//! hold; a command that was refused with an error changed nothing and is evaluated anew.
//!
//! Memory is bounded, so some things are forgotten, always the least recently used ones first:
//!
//! - Answers to sequences below `acked_below`: the client waits for them no more.
//! - The oldest of more than [`MAX_ANSWERS`] answers of one session, and all answers of the least
//!   recently used session, where there are more than [`MAX_SESSIONS`] or more than [`MAX_BYTES`].
//! - An answer longer than [`MAX_ANSWER_BYTES`], at once.
//!
//! In all these cases the write is still known to be an old one: repeated, it is answered
//! `Error::AnswerGone` and has no effect. That costs one number a session, its floor: the sequences
//! below it are old, known or not. Two things let go of the floor as well, and then an old write would
//! pass for a new one, so a client must have given up on it by then:
//!
//! - A session that wrote nothing for [`TIMEOUT_MS`], by the time that batches were evaluated at, on
//!   the clocks of the leaders. Time does not go back here, and what passes between two batches counts
//!   as no more than [`MAX_STEP_MS`]: a clock that is set forward by an hour must not end all sessions.
//! - The least recently used of more than [`MAX_SESSIONS`] and [`MAX_FADED`] sessions together.
//!
//! What this does not do: number writes (the client does), evaluate or propose.

mod answer;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use crate::{Error, Reply, UnixMillis};

pub(crate) use answer::encode as encode_answer;
use answer::{Reader, put_number};

/// How many sessions keep answers.
pub const MAX_SESSIONS: usize = 1024;

/// How many more sessions are known only by their floor.
pub const MAX_FADED: usize = 7 * 1024;

/// How many answers a session keeps.
pub const MAX_ANSWERS: usize = 4096;

/// The memory that answers take together, in bytes, with [`ANSWER_OVERHEAD`] for each.
pub const MAX_BYTES: usize = 4 * 1024 * 1024;

/// What an answer takes besides its own bytes.
pub const ANSWER_OVERHEAD: usize = 48;

/// The longest answer that is kept.
pub const MAX_ANSWER_BYTES: usize = 4096;

/// After so many milliseconds without a write a session is forgotten.
pub const TIMEOUT_MS: u64 = 10 * 60 * 1000;

/// How much time may pass from one batch to the next for sessions, in milliseconds.
pub const MAX_STEP_MS: u64 = 20 * 1000;

const FORMAT: u8 = 1;

/// Which write of which client this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Once {
    /// The client's session: a random number, so that no two are the same.
    pub session: u64,
    /// The write: a number that the session uses once.
    pub sequence: u64,
    /// The client waits for no answer to a lower sequence, and sends none again.
    pub acked_below: u64,
}

/// The answers that a partition remembers.
#[derive(Clone, Debug)]
pub struct Sessions {
    by_id: BTreeMap<u64, Session>,
    /// The sessions by `Session::used`: least recently used first.
    order: BTreeMap<u64, u64>,
    next_use: u64,
    /// Sessions used before this have faded: they have a floor and no answers.
    faded_below: u64,
    /// How many have not.
    recent: usize,
    /// What the answers take, overhead included.
    bytes: usize,
    /// The time that has passed for sessions. `used_at_ms` follows it, so the order of use is also that of
    /// time.
    clock_ms: u64,
    /// The time of the last batch, on its leader's clock.
    heard_ms: UnixMillis,
}

#[derive(Clone, Debug, Default)]
struct Session {
    /// Its place in the order; 0 before it has one.
    used: u64,
    used_at_ms: UnixMillis,
    /// Lower sequences are old.
    floor: u64,
    /// In order of sequences, none below the floor.
    answers: VecDeque<Answer>,
}

#[derive(Clone, Debug)]
struct Answer {
    sequence: u64,
    /// Empty if it was too long to keep.
    reply: Box<[u8]>,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions::new()
    }
}

impl Sessions {
    /// No session. Takes no memory.
    pub fn new() -> Sessions {
        Sessions {
            by_id: BTreeMap::new(),
            order: BTreeMap::new(),
            next_use: 1,
            faded_below: 1,
            recent: 0,
            bytes: 0,
            clock_ms: 0,
            heard_ms: 0,
        }
    }

    /// Whether no session is known.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// How many sessions are known.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// About how many bytes of memory the answers take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The answer to a write that is an old one, `Error::AnswerGone` if it is not known any more; `None`
    /// if the write is new.
    pub fn answer(&self, once: &Once) -> Option<Reply> {
        let session = self.by_id.get(&once.session)?;
        match session.find(once.sequence) {
            Ok(place) => Some(decode_answer(&session.answers[place].reply)),
            Err(_) if once.sequence < session.floor => Some(Reply::Error(Error::AnswerGone)),
            Err(_) => None,
        }
    }

    /// A batch of this time is applied: forgets sessions that were not used for long.
    #[inline]
    pub(crate) fn advance(&mut self, committed_at_ms: UnixMillis) {
        if !self.by_id.is_empty() {
            self.expire(committed_at_ms);
        }
    }

    /// Lets time pass up to that of a batch.
    fn pass(&mut self, committed_at_ms: UnixMillis) {
        let step = committed_at_ms.saturating_sub(self.heard_ms).min(MAX_STEP_MS);
        self.clock_ms = self.clock_ms.saturating_add(step);
        self.heard_ms = committed_at_ms;
    }

    fn expire(&mut self, committed_at_ms: UnixMillis) {
        self.pass(committed_at_ms);
        while let Some((_, id)) = self.order.first_key_value() {
            let used_at_ms = self.by_id.get(id).map_or(0, |session| session.used_at_ms);
            if self.clock_ms - used_at_ms < TIMEOUT_MS {
                return;
            }
            self.forget_oldest();
        }
        // As if there had never been any, so that equal states are the same however they came to be.
        *self = Sessions::new();
    }

    /// Takes in an answer from the log, with its batch's time.
    pub(crate) fn remember(&mut self, once: &Once, reply: &[u8], committed_at_ms: UnixMillis) {
        self.pass(committed_at_ms);
        self.use_session(once.session);
        let session = self.by_id.get_mut(&once.session).expect("it is in use");
        self.bytes -= session.forget_below(once.acked_below);
        self.bytes += session.keep(once.sequence, reply);
        if session.answers.len() > MAX_ANSWERS {
            self.bytes -= session.forget_first();
        }
        while self.bytes > MAX_BYTES && self.recent > 1 {
            self.fade_oldest();
        }
        while self.bytes > MAX_BYTES {
            let session = self.by_id.get_mut(&once.session).expect("it is in use");
            self.bytes -= session.forget_first();
        }
    }

    /// Makes a session the most recently used one.
    fn use_session(&mut self, id: u64) {
        let session = self.by_id.entry(id).or_default();
        session.used_at_ms = self.clock_ms;
        let is_newest = session.used > 0 && session.used + 1 == self.next_use;
        if is_newest {
            return;
        }
        self.order.remove(&session.used);
        self.recent += usize::from(session.used < self.faded_below);
        session.used = self.next_use;
        self.order.insert(self.next_use, id);
        self.next_use += 1;
        if self.recent > MAX_SESSIONS {
            self.fade_oldest();
        }
        if self.by_id.len() - self.recent > MAX_FADED {
            self.forget_oldest();
        }
    }

    /// Drops the answers of the least recently used session that may have some.
    fn fade_oldest(&mut self) {
        let oldest = self.order.range(self.faded_below..).next();
        let (&used, id) = oldest.expect("there are recent sessions");
        let session = self.by_id.get_mut(id).expect("the order names sessions that are there");
        while !session.answers.is_empty() {
            self.bytes -= session.forget_first();
        }
        session.answers = VecDeque::new();
        self.faded_below = used + 1;
        self.recent -= 1;
    }

    /// Drops the least recently used session.
    fn forget_oldest(&mut self) {
        let Some((used, id)) = self.order.pop_first() else { return };
        let session = self.by_id.remove(&id).unwrap_or_default();
        self.recent -= usize::from(used >= self.faded_below);
        self.bytes -= session.answers.iter().map(Answer::bytes).sum::<usize>();
    }

    /// The bytes for a snapshot: none if there is no session, else
    ///
    /// ```text
    /// u8 format 1 · u64 clock_ms · u64 heard_ms · how many faded · how many not · sessions, least recently used first
    /// session  u64 id · u64 used_at_ms · u64 floor · how many answers · answers
    /// answer   sequence, less that of the one before plus 1 (the first: less the floor) · length · reply
    /// ```
    ///
    /// Integers are little endian, the other numbers LEB128.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.is_empty() {
            return out;
        }
        out.reserve(self.bytes + 40 * self.len());
        out.push(FORMAT);
        out.extend_from_slice(&self.clock_ms.to_le_bytes());
        out.extend_from_slice(&self.heard_ms.to_le_bytes());
        put_number(&mut out, (self.len() - self.recent) as u64);
        put_number(&mut out, self.recent as u64);
        for id in self.order.values() {
            let session = &self.by_id[id];
            for word in [*id, session.used_at_ms, session.floor] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            put_number(&mut out, session.answers.len() as u64);
            let mut least = session.floor;
            for answer in &session.answers {
                put_number(&mut out, answer.sequence - least);
                put_number(&mut out, answer.reply.len() as u64);
                out.extend_from_slice(&answer.reply);
                // Only the last one can be the highest number there is.
                least = answer.sequence.wrapping_add(1);
            }
        }
        out
    }

    /// The opposite of `encode`; `None` for any other bytes.
    pub fn decode(bytes: &[u8]) -> Option<Sessions> {
        let mut sessions = Sessions::new();
        if bytes.is_empty() {
            return Some(sessions);
        }
        let mut reader = Reader(bytes);
        if reader.byte()? != FORMAT {
            return None;
        }
        (sessions.clock_ms, sessions.heard_ms) = (reader.word()?, reader.word()?);
        let (faded, recent) = (reader.number()?, reader.number()?);
        if faded > MAX_FADED as u64 || recent > MAX_SESSIONS as u64 || faded + recent == 0 {
            return None;
        }
        sessions.recent = recent as usize;
        sessions.faded_below = faded + 1;
        let mut last_used_at_ms = 0;
        for used in 1..=faded + recent {
            let id = reader.word()?;
            let session = Session::decode(used, &mut reader)?;
            if used <= faded && !session.answers.is_empty() || session.used_at_ms < last_used_at_ms
            {
                return None;
            }
            last_used_at_ms = session.used_at_ms;
            sessions.bytes += session.answers.iter().map(Answer::bytes).sum::<usize>();
            sessions.order.insert(used, id);
            if sessions.by_id.insert(id, session).is_some() {
                return None;
            }
        }
        sessions.next_use = faded + recent + 1;
        let valid = reader.0.is_empty()
            && sessions.bytes <= MAX_BYTES
            && last_used_at_ms <= sessions.clock_ms;
        valid.then_some(sessions)
    }
}

/// The answer that these bytes stand for.
pub(crate) fn decode_answer(reply: &[u8]) -> Reply {
    answer::decode(reply).unwrap_or(Reply::Error(Error::AnswerGone))
}

impl Session {
    /// Where the answer is, or would be.
    fn find(&self, sequence: u64) -> Result<usize, usize> {
        // Mostly it is a new one.
        match self.answers.back() {
            Some(last) if last.sequence >= sequence => {
                self.answers.binary_search_by_key(&sequence, |answer| answer.sequence)
            }
            _ => Err(self.answers.len()),
        }
    }

    /// Keeps an answer, unless its sequence is an old one. Returns the bytes that this takes.
    fn keep(&mut self, sequence: u64, reply: &[u8]) -> usize {
        match self.find(sequence) {
            Err(place) if sequence >= self.floor => {
                let answer = Answer { sequence, reply: reply.into() };
                let bytes = answer.bytes();
                self.answers.insert(place, answer);
                bytes
            }
            _ => 0,
        }
    }

    /// Drops the answers below a sequence, which are all old from now on. Returns their bytes.
    fn forget_below(&mut self, floor: u64) -> usize {
        let mut bytes = 0;
        while self.answers.front().is_some_and(|first| first.sequence < floor) {
            bytes += self.forget_first();
        }
        self.floor = self.floor.max(floor);
        bytes
    }

    /// Drops the answer to the lowest sequence and returns its bytes.
    fn forget_first(&mut self) -> usize {
        let Some(first) = self.answers.pop_front() else { return 0 };
        self.floor = self.floor.max(first.sequence.saturating_add(1));
        first.bytes()
    }

    fn decode(used: u64, reader: &mut Reader<'_>) -> Option<Session> {
        let (used_at_ms, floor) = (reader.word()?, reader.word()?);
        let count = reader.number()?;
        if count > MAX_ANSWERS as u64 {
            return None;
        }
        let mut session = Session { used, used_at_ms, floor, answers: VecDeque::new() };
        let mut least = Some(floor);
        for _ in 0..count {
            let sequence = least?.checked_add(reader.number()?)?;
            let reply = reader.bytes().filter(|reply| reply.len() <= MAX_ANSWER_BYTES)?;
            session.answers.push_back(Answer { sequence, reply: reply.into() });
            least = sequence.checked_add(1);
        }
        Some(session)
    }
}

impl Answer {
    fn bytes(&self) -> usize {
        self.reply.len() + ANSWER_OVERHEAD
    }
}
