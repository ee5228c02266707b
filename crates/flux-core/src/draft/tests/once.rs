//! Clients that repeat their writes at random, over two replicas that take turns to lead: each write
//! takes effect once, and all its answers are the same.

use std::collections::{BTreeMap, VecDeque};

use proptest::collection::vec;
use proptest::sample::Index as Choice;

use super::*;
use crate::command::TransactionMode;
use crate::evaluate::{evaluate, read};
use crate::{Command, Condition, Expiry};

const CLIENTS: u64 = 3;
const KEYS: u8 = 3;

#[derive(Clone, Debug)]
enum Step {
    Write {
        client: u64,
        write: Write,
    },
    /// Sends one of all writes so far again: one that waits, or a late copy of one that is answered.
    Repeat(Choice),
    Close,
    Apply,
    DiscardOpen,
    /// The other replica leads. Of the batches that were proposed so many live on.
    Failover(usize),
    /// The other replica begins anew with a snapshot.
    Snapshot,
    Pass(u64),
}

/// Writes of which a second one would show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    Increment,
    Append,
    Create {
        key: u8,
    },
    /// Of a key that others create.
    Take {
        key: u8,
    },
    /// Two in one.
    Both,
}

fn step() -> impl Strategy<Value = Step> {
    let write = prop_oneof![
        3 => Just(Write::Increment),
        3 => Just(Write::Append),
        2 => (0..KEYS).prop_map(|key| Write::Create { key }),
        1 => (0..KEYS).prop_map(|key| Write::Take { key }),
        1 => Just(Write::Both),
    ];
    prop_oneof![
        10 => (0..CLIENTS, write).prop_map(|(client, write)| Step::Write { client, write }),
        10 => any::<Choice>().prop_map(Step::Repeat),
        4 => Just(Step::Close),
        4 => Just(Step::Apply),
        1 => Just(Step::DiscardOpen),
        1 => (0usize..4).prop_map(Step::Failover),
        1 => Just(Step::Snapshot),
        2 => (0u64..1_000).prop_map(Step::Pass),
    ]
}

fn command(number: usize, write: Write) -> Command<Vec<u8>> {
    let increment = || Command::Increment { key: b"n".to_vec(), delta: 1 };
    let append = || Command::Append { key: b"s".to_vec(), suffix: vec![number as u8] };
    match write {
        Write::Increment => increment(),
        Write::Append => append(),
        Write::Create { key } => Command::Set {
            key: vec![b'k', key],
            value: vec![number as u8],
            expiry: Expiry::Never,
            condition: Condition::IfAbsent,
            return_previous: false,
        },
        Write::Take { key } => Command::GetDelete { key: vec![b'k', key] },
        Write::Both => Command::Transaction {
            guards: Vec::new(),
            commands: vec![increment(), append()],
            mode: TransactionMode::AllOrNothing,
        },
    }
}

struct Replica {
    table: Table,
    sessions: Sessions,
    in_flight: InFlight,
    revision: Revision,
    /// How many entries of the log it has applied.
    applied: usize,
}

impl Replica {
    fn new() -> Replica {
        let (sessions, in_flight) = (Sessions::new(), InFlight::new(0));
        Replica { table: table(), sessions, in_flight, revision: 0, applied: 0 }
    }

    fn apply(&mut self, payload: &[u8]) {
        let Replica { table, sessions, revision, .. } = self;
        let applied = apply(table, sessions, *revision, payload, |_, _, _| {});
        *revision = applied.expect("it follows").revision;
        self.in_flight.applied(self.revision);
        self.applied += 1;
    }

    fn catch_up(&mut self, log: &[Vec<u8>]) {
        log[self.applied..].iter().for_each(|payload| self.apply(payload));
    }
}

struct Sent {
    once: Once,
    write: Write,
    answer: Option<Reply>,
}

/// The number of a write in `World::sent`, and what it will be answered.
type Waiters = Vec<(usize, Reply)>;

struct World {
    leader: Replica,
    other: Replica,
    memory: Arc<Memory>,
    now_ms: UnixMillis,
    /// What is committed.
    log: Vec<Vec<u8>>,
    proposed: VecDeque<(Vec<u8>, Waiters)>,
    open: Waiters,
    sent: Vec<Sent>,
}

impl World {
    fn new() -> World {
        World {
            leader: Replica::new(),
            other: Replica::new(),
            memory: Memory::new(0),
            now_ms: 1_000,
            log: Vec::new(),
            proposed: VecDeque::new(),
            open: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Write { client, write } => self.write(*client, *write),
            Step::Repeat(choice) => {
                if !self.sent.is_empty() {
                    self.send(choice.index(self.sent.len()));
                }
            }
            Step::Close => self.close(),
            Step::Apply => self.apply(),
            Step::DiscardOpen => {
                self.leader.in_flight.discard_open(&self.leader.table);
                self.open.clear();
            }
            Step::Failover(kept) => self.fail_over(*kept),
            Step::Snapshot => self.snapshot(),
            Step::Pass(ms) => self.now_ms += ms,
        }
    }

    fn write(&mut self, client: u64, write: Write) {
        // The newest acknowledgement travels with a new write; a copy of an old one has its own.
        let of_client = || self.sent.iter().filter(|sent| sent.once.session == client);
        let sequence = of_client().count() as u64 + 1;
        let mut waiting = of_client().filter(|sent| sent.answer.is_none());
        let acked_below = waiting.next().map_or(sequence, |sent| sent.once.sequence);
        let once = Once { session: client, sequence, acked_below };
        self.sent.push(Sent { once, write, answer: None });
        self.send(self.sent.len() - 1);
    }

    fn send(&mut self, number: usize) {
        let Sent { once, write, .. } = self.sent[number];
        let Replica { table, sessions, in_flight, .. } = &mut self.leader;
        let mut draft = Draft::new(table, in_flight, &self.memory, self.now_ms);
        match draft.repeated(sessions, &once) {
            Some(Repeat::Now(reply)) => self.answered(number, reply),
            Some(Repeat::InFlight(reply)) => self.open.push((number, reply)),
            None => {
                let reply = evaluate(&mut draft, &command(number, write).borrowed());
                draft.remember(&once, &reply);
                self.open.push((number, reply));
            }
        }
    }

    fn answered(&mut self, number: usize, reply: Reply) {
        let Sent { once, answer, .. } = &mut self.sent[number];
        match answer {
            // Only what the client has an answer to may be gone.
            Some(first) => assert!(*first == reply || reply == Reply::Error(Error::AnswerGone)),
            None => {
                assert!(!matches!(reply, Reply::Error(_)), "{once:?}: {reply:?}");
                *answer = Some(reply);
            }
        }
    }

    fn close(&mut self) {
        let waiters = std::mem::take(&mut self.open);
        if let Some(batch) = self.leader.in_flight.close(&self.leader.table, Previous::Nothing) {
            self.proposed.push_back((batch.payload.to_vec(), waiters));
        } else if let Some((_, last)) = self.proposed.back_mut() {
            last.extend(waiters);
        } else {
            // What they waited for has been applied meanwhile.
            waiters.into_iter().for_each(|(number, reply)| self.answered(number, reply));
        }
    }

    fn apply(&mut self) {
        if let Some((payload, waiters)) = self.proposed.pop_front() {
            self.leader.apply(&payload);
            self.log.push(payload);
            waiters.into_iter().for_each(|(number, reply)| self.answered(number, reply));
        }
    }

    fn fail_over(&mut self, kept: usize) {
        // Nobody hears from the old leader any more.
        self.open.clear();
        let kept = kept.min(self.proposed.len());
        self.log.extend(self.proposed.drain(..).take(kept).map(|(payload, _)| payload));
        self.leader.in_flight.discard_all();
        std::mem::swap(&mut self.leader, &mut self.other);
        self.leader.catch_up(&self.log);
    }

    /// The other replica gets what the leader's table and sessions are.
    fn snapshot(&mut self) {
        let mut chunk = Vec::new();
        self.leader.table.begin_snapshot();
        assert!(self.leader.table.snapshot_chunk(usize::MAX / 2, &mut chunk));
        self.leader.table.end_snapshot();
        let bytes = self.leader.sessions.encode();
        let Replica { revision, applied, .. } = self.leader;
        let (table, in_flight) = (table(), InFlight::new(revision));
        table.load(&chunk).expect("its own chunk");
        let sessions = Sessions::decode(&bytes).expect("its own bytes");
        self.other = Replica { table, sessions, in_flight, revision, applied };
    }

    fn get(&self, key: &[u8]) -> Vec<u8> {
        match read(&self.leader.table, self.now_ms, &Command::Get { key }) {
            Reply::Value(value) => value.map(|value| value.bytes).unwrap_or_default(),
            other => panic!("{other:?}"),
        }
    }

    /// Every write is repeated until it is answered; then their effects must be those of one each.
    fn finish(&mut self) {
        loop {
            self.close();
            while !self.proposed.is_empty() {
                self.apply();
            }
            match self.sent.iter().position(|sent| sent.answer.is_none()) {
                Some(number) => self.send(number),
                None => break,
            }
        }
        assert!(self.leader.in_flight.is_empty());
        self.other.catch_up(&self.log);
        assert_eq!(self.other.sessions.encode(), self.leader.sessions.encode());
        assert_eq!(self.other.revision, self.leader.revision);

        let count = |write| self.sent.iter().filter(|sent| sent.write == write).count();
        let increments = count(Write::Increment) + count(Write::Both);
        let number = String::from_utf8(self.get(b"n")).expect("a number");
        assert_eq!(number.parse().unwrap_or(0), increments);
        let mut appended = self.get(b"s");
        assert_eq!(appended.len(), count(Write::Append) + count(Write::Both));
        appended.sort_unstable();
        assert!(appended.is_sorted_by(|one, next| one < next), "one was appended twice");
        self.check_answers(increments);
    }

    /// The answers are those of as many writes, one after the other.
    fn check_answers(&self, increments: usize) {
        let mut counters = Vec::new();
        let mut there = BTreeMap::<u8, i64>::new();
        for Sent { write, answer, .. } in &self.sent {
            let answer = answer.as_ref().expect("all are answered");
            match (write, answer) {
                (Write::Both, Reply::Many(replies)) => counters.push(replies[0].clone()),
                (Write::Increment, counter) => counters.push(counter.clone()),
                (Write::Create { key }, Reply::Written { .. }) => {
                    *there.entry(*key).or_default() += 1;
                }
                (Write::Take { key }, Reply::Value(Some(_))) => {
                    *there.entry(*key).or_default() -= 1;
                }
                (Write::Create { .. }, Reply::NotWritten { .. })
                | (Write::Take { .. }, Reply::Value(None))
                | (Write::Append, Reply::Integer(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        let value = |counter| match counter {
            Reply::Counter { value, .. } => value,
            other => panic!("{other:?}"),
        };
        let mut values: Vec<i64> = counters.into_iter().map(value).collect();
        values.sort_unstable();
        assert!(values.into_iter().eq(1..=increments as i64), "each increment saw the one before");
        for key in 0..KEYS {
            let expected = i64::from(!self.get(&[b'k', key]).is_empty());
            assert_eq!(there.get(&key).copied().unwrap_or(0), expected, "created less taken");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_write_takes_effect_once(steps in vec(step(), 0..200)) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
        }
        world.finish();
    }
}
