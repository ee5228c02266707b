//! The native protocol's requests as commands. No sockets.

mod info;
mod render;
mod scan;

use std::sync::Arc;
use std::time::Duration;

use flux_core::command::{Guard, TransactionMode};
use flux_core::replica::Now;
use flux_core::session::Once;
use flux_core::{Command, Condition, Expiry, PartitionId};
use flux_proto::Code;
use flux_proto::native as wire;
use flux_proto::native::{Opcode, Request, Response, StalePosition};

use crate::mailbox::Ask;
use crate::scan::Walk;
use crate::shared::Shared;
use crate::stale::Age;
pub(crate) use info::accept;
use render::respond;
pub(crate) use render::{render, render_gathered};
pub(crate) use scan::{PageForm, render_page};

/// How a reply is put into a frame.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    id: u64,
    opcode: Opcode,
    /// The opcodes of a batch's writes, whose replies stand in one.
    writes: Vec<Opcode>,
    /// How old the answer is, where that is to be told.
    position: Option<StalePosition>,
}

/// How the values of several partitions become one reply: where each stands in it.
#[derive(Debug)]
pub(crate) struct Gather {
    id: u64,
    /// For each part the positions of its keys in the request.
    positions: Vec<Vec<usize>>,
    count: usize,
    /// How old the answer is, where that is to be told.
    position: Option<StalePosition>,
}

/// What a request turns into.
pub(crate) enum Plan<'a> {
    /// Answered already.
    Done,
    One {
        partition: PartitionId,
        command: Command<&'a [u8]>,
        form: Form,
        ask: Ask,
    },
    Many {
        parts: Vec<(PartitionId, Command<&'a [u8]>)>,
        gather: Gather,
        ask: Ask,
    },
    /// A scan, which runs when the connection's earlier writes are done.
    Scan {
        walk: Box<Walk>,
        form: PageForm,
    },
}

impl Plan<'_> {
    /// How it wants to be carried out; to be asked once.
    pub(crate) fn take_ask(&mut self) -> Ask {
        match self {
            Plan::Done => Ask::default(),
            Plan::One { ask, .. } | Plan::Many { ask, .. } => std::mem::take(ask),
            Plan::Scan { walk, .. } => walk.ask.clone(),
        }
    }
}

/// Turns a frame into commands. Errors of one request are answered in `out`.
pub(crate) fn plan<'a>(
    frame: &wire::Frame<'a>,
    shared: &Shared,
    now: Now,
    out: &mut Vec<u8>,
) -> Plan<'a> {
    let (id, opcode) = (frame.header.id, frame.header.opcode);
    let request = match frame.request() {
        Ok(request) => request,
        Err(error) => {
            wire::encode_error(out, id, opcode, error.code(), &error.to_string());
            return Plan::Done;
        }
    };
    let opcode = request.opcode();
    let header = &frame.header;
    Planner { id, opcode, header, ask: ask_of(header, opcode), shared, now, out }.plan(request)
}

/// How a request wants to be carried out.
fn ask_of(header: &wire::RequestHeader, opcode: Opcode) -> Ask {
    let is_read = matches!(opcode, Opcode::Get | Opcode::BatchGet | Opcode::Scan);
    let stale = is_read && header.is_stale();
    let once = header.session.filter(|_| opcode.is_write());
    let once = once.map(|wire::Session { id, sequence, acked_below }| Once {
        session: id,
        sequence,
        acked_below,
    });
    let trace = header.trace.filter(|_| opcode.is_write());
    let deadline_ms = u64::from(header.deadline_ms);
    Ask {
        redirect: header.wants_redirect() && !stale,
        stale,
        once,
        trace: trace.map(|trace| Box::new(trace.to_bytes())),
        patience: (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms)),
        deadline: None,
    }
}

/// A request on its way to a plan.
struct Planner<'w> {
    id: u64,
    opcode: Opcode,
    header: &'w wire::RequestHeader,
    ask: Ask,
    shared: &'w Shared,
    now: Now,
    out: &'w mut Vec<u8>,
}

impl Planner<'_> {
    fn plan<'a>(mut self, request: Request<'a>) -> Plan<'a> {
        match request {
            Request::Ping { payload } => self.respond(&Response::Pong { payload }),
            Request::Auth { .. } => {
                self.refuse(Code::Unsupported, "this node has no users: send no AUTH")
            }
            Request::Info => {
                info::info(self.id, self.shared, self.out);
                Plan::Done
            }
            Request::Get { key } => self.get(key),
            Request::Set { key, value, expiry, condition, return_previous } => {
                let (expiry, condition) = (expiry_of(expiry), condition_of(condition));
                self.one(key, Command::Set { key, value, expiry, condition, return_previous })
            }
            Request::Delete { key, condition } => {
                let condition = condition_of(condition);
                self.one(key, Command::DeleteIf { key, condition })
            }
            Request::Increment { key, delta } => self.one(key, Command::Increment { key, delta }),
            Request::Expire { key, expiry } => {
                let (at, condition) = (expiry_of(expiry), Default::default());
                self.one(key, Command::Expire { key, at, condition })
            }
            Request::Persist { key } => self.one(key, Command::Persist { key }),
            Request::BatchGet { keys } => self.batch_get(&keys),
            Request::BatchWrite { guards, writes } => self.batch_write(&guards, &writes),
            Request::Scan { prefix, cursor, limit, keys_only, partition } => {
                let partition = partition.map(PartitionId);
                self.scan(&scan::Request { prefix, cursor, limit, keys_only, partition })
            }
        }
    }

    fn respond<'a>(&mut self, response: &Response<'_>) -> Plan<'a> {
        respond(self.out, self.id, self.opcode, response, None);
        Plan::Done
    }

    fn refuse<'a>(&mut self, code: Code, message: &str) -> Plan<'a> {
        wire::encode_error(self.out, self.id, self.opcode as u8, code, message);
        Plan::Done
    }

    fn form(&self) -> Form {
        Form { id: self.id, opcode: self.opcode, writes: Vec::new(), position: None }
    }

    /// Answers a client that follows redirects, if another node leads a partition.
    fn redirects(&mut self, partition: PartitionId) -> bool {
        let Some(seat) = self.shared.cluster.as_ref().filter(|_| self.ask.redirect) else {
            return false;
        };
        if self.shared.leader(partition) == Some(seat.me) {
            return false;
        }
        let topology = Arc::clone(&seat.topology.read());
        let leader = info::likely_leader(self.shared, &topology, partition);
        let leader = leader.and_then(|node| topology.members.get(&node));
        let leader_addr = leader.map(|member| member.data_addr().to_string()).unwrap_or_default();
        let hint = wire::LeaderHint { partition: partition.0, leader_addr: &leader_addr };
        let message = flux_core::Error::NotLeader.to_string();
        wire::encode_not_leader(self.out, self.id, self.opcode as u8, &message, &hint);
        true
    }

    /// A command of one key.
    fn one<'a>(&mut self, key: &[u8], command: Command<&'a [u8]>) -> Plan<'a> {
        let partition = self.shared.partitions.of(key);
        if self.redirects(partition) {
            return Plan::Done;
        }
        Plan::One { partition, command, form: self.form(), ask: std::mem::take(&mut self.ask) }
    }

    /// A stale read is answered at once from the replica here. Where there is none, the leader answers.
    fn get<'a>(&mut self, key: &'a [u8]) -> Plan<'a> {
        let (command, mut form) = (Command::Get { key }, self.form());
        if !self.ask.stale {
            return self.one(key, command);
        }
        let partition = self.shared.partitions.of(key);
        let age = self.shared.age(partition, self.now);
        if self.header.wants_position() {
            form.position = Some(age.unwrap_or(Age::CURRENT).into());
        }
        let reply = age.and_then(|_| self.shared.read_stale(partition, &command, self.now));
        match reply {
            Some((reply, ..)) => {
                self.shared.stats.reads.add(1);
                render(&form, &reply, self.out);
                Plan::Done
            }
            None => {
                let ask = Ask { stale: false, ..self.ask.clone() };
                Plan::One { partition, command, form, ask }
            }
        }
    }

    fn batch_get<'a>(&mut self, keys: &[&'a [u8]]) -> Plan<'a> {
        let partitions = self.shared.partitions;
        let mut parts: Vec<(PartitionId, Vec<&[u8]>)> = Vec::new();
        let mut places = vec![None; usize::from(partitions.count())];
        let mut positions: Vec<Vec<usize>> = Vec::new();
        for (position, &key) in keys.iter().enumerate() {
            let partition = partitions.of(key);
            let place = *places[usize::from(partition.0)].get_or_insert_with(|| {
                parts.push((partition, Vec::new()));
                positions.push(Vec::new());
                parts.len() - 1
            });
            parts[place].1.push(key);
            positions[place].push(position);
        }
        if parts.iter().any(|(partition, _)| self.redirects(*partition)) {
            return Plan::Done;
        }
        let mut ask = self.ask.clone();
        let age = self.shared.age_of_all(parts.iter().map(|(partition, _)| *partition), self.now);
        // Where a replica is missing the leaders are asked for all.
        ask.stale &= age.is_some();
        let position = Some(age.filter(|_| ask.stale).unwrap_or(Age::CURRENT).into());
        let position = position.filter(|_| self.ask.stale && self.header.wants_position());
        let get = |(partition, keys)| (partition, Command::GetMany { keys });
        let gather = Gather { id: self.id, positions, count: keys.len(), position };
        Plan::Many { parts: parts.into_iter().map(get).collect(), gather, ask }
    }

    fn scan<'a>(&mut self, request: &scan::Request<'_>) -> Plan<'a> {
        if request
            .partition
            .is_some_and(|one| one.0 < self.shared.partitions.count() && self.redirects(one))
        {
            return Plan::Done;
        }
        // A scan of all partitions is of no use to a client that is sent elsewhere for each.
        let mut ask = self.ask.clone();
        ask.redirect &= request.partition.is_some();
        let count = self.shared.partitions.count();
        match scan::walk(self.id, request, count, ask, self.out) {
            Some(walk) => {
                let wants_position = self.header.wants_position();
                let form = PageForm { id: self.id, wants_position };
                Plan::Scan { walk: Box::new(walk), form }
            }
            None => Plan::Done,
        }
    }

    fn batch_write<'a>(
        &mut self,
        guards: &[wire::Guard<'a>],
        writes: &[wire::Write<'a>],
    ) -> Plan<'a> {
        let key_of = |write: &wire::Write<'a>| match *write {
            wire::Write::Set { key, .. }
            | wire::Write::Delete { key, .. }
            | wire::Write::Increment { key, .. } => key,
        };
        let mut keys = guards.iter().map(|guard| guard.key).chain(writes.iter().map(key_of));
        let Some(first) = keys.next() else {
            return self.respond(&Response::Batch(wire::BatchReply::Written(vec![])));
        };
        let partitions = self.shared.partitions;
        let partition = partitions.of(first);
        if keys.any(|key| partitions.of(key) != partition) {
            let message =
                "the keys of a batch must be of one partition; a hash tag keeps them together";
            return self.refuse(Code::CrossSlot, message);
        }
        let guard = |guard: &wire::Guard<'a>| Guard { key: guard.key, version: guard.version };
        let command = Command::Transaction {
            guards: guards.iter().map(guard).collect(),
            commands: writes.iter().map(command_of).collect(),
            mode: TransactionMode::AllOrNothing,
        };
        match self.one(first, command) {
            Plan::One { partition, command, form, ask } => {
                let writes = writes.iter().map(opcode_of).collect();
                Plan::One { partition, command, form: Form { writes, ..form }, ask }
            }
            answered => answered,
        }
    }
}

fn opcode_of(write: &wire::Write<'_>) -> Opcode {
    match write {
        wire::Write::Set { .. } => Opcode::Set,
        wire::Write::Delete { .. } => Opcode::Delete,
        wire::Write::Increment { .. } => Opcode::Increment,
    }
}

fn command_of<'a>(write: &wire::Write<'a>) -> Command<&'a [u8]> {
    match *write {
        wire::Write::Set { key, value, expiry, condition } => Command::Set {
            key,
            value,
            expiry: expiry_of(expiry),
            condition: condition_of(condition),
            return_previous: false,
        },
        wire::Write::Delete { key, condition } => {
            Command::DeleteIf { key, condition: condition_of(condition) }
        }
        wire::Write::Increment { key, delta } => Command::Increment { key, delta },
    }
}

fn expiry_of(expiry: wire::Expiry) -> Expiry {
    match expiry {
        wire::Expiry::Never => Expiry::Never,
        wire::Expiry::Keep => Expiry::Keep,
        wire::Expiry::In(ttl_ms) => Expiry::In(ttl_ms),
        wire::Expiry::At(expires_at_ms) => Expiry::At(expires_at_ms),
    }
}

fn condition_of(condition: wire::Condition) -> Condition {
    match condition {
        wire::Condition::Always => Condition::Always,
        wire::Condition::IfAbsent => Condition::IfAbsent,
        wire::Condition::IfPresent => Condition::IfPresent,
        wire::Condition::IfVersion(version) => Condition::IfVersion(version),
    }
}
