//! MULTI and EXEC: commands that are queued and then run as one, if watched keys did not change.
//!
//! A transaction lives in one partition. A key is watched by its version, so a key that was absent,
//! written and deleted counts as unchanged.

use flux_core::command::{Guard, TransactionMode};
use flux_core::{Command, PartitionId};
use flux_proto::resp::{Args, OwnedArgs, write};

use super::request::{Outcome, Refusal, Request};
use super::session::{Transaction, Watched};
use super::table::{NO_MULTI, Spec};
use super::{Form, Gather, Plan, TransactionPart, find, run};

/// The most commands that wait for EXEC.
const MAX_QUEUED_COMMANDS: usize = 64 * 1024;

/// What they may take in memory.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// The most keys that are watched, and their bytes.
const MAX_WATCHED_KEYS: usize = 4096;
const MAX_WATCHED_BYTES: usize = 4 * 1024 * 1024;

impl Transaction {
    /// Queues a command, or refuses it and with it the transaction.
    pub(super) fn push(&mut self, spec: &Spec, args: Args<'_>) -> Result<(), Refusal> {
        let queued = if spec.has(NO_MULTI) {
            Err(Refusal::new("ERR Command not allowed inside a transaction"))
        } else if self.queue.len() >= MAX_QUEUED_COMMANDS
            || self.queued_bytes + args.total_bytes() > MAX_QUEUED_BYTES
        {
            Err(Refusal::new(format!(
                "ERR transaction is over the limit of {MAX_QUEUED_COMMANDS} commands or \
                 {MAX_QUEUED_BYTES} bytes"
            )))
        } else {
            let args: OwnedArgs = args.iter().collect();
            self.queued_bytes += args.memory_bytes();
            self.queue.push(args);
            Ok(())
        };
        self.failed |= queued.is_err();
        queued
    }
}

/// Answers a command that was or was not queued.
pub(super) fn answer_queued(queued: Result<(), Refusal>, out: &mut Vec<u8>) {
    match queued {
        Ok(()) => write::simple(out, "QUEUED"),
        Err(refusal) => write::error(out, &refusal.0),
    }
}

pub(super) fn multi<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.transaction.is_some() {
        return Err(Refusal::new("ERR MULTI calls can not be nested"));
    }
    request.session.transaction = Some(Transaction::default());
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

pub(super) fn discard<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.transaction.is_none() {
        return Err(Refusal::new("ERR DISCARD without MULTI"));
    }
    if request.session.unanswered_watches > 0 {
        return Ok(Plan::Later);
    }
    request.session.transaction = None;
    request.session.watched.clear();
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

pub(super) fn watch<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.transaction.is_some() {
        return Err(Refusal::new("ERR WATCH inside MULTI is not allowed"));
    }
    if request.session.unanswered_watches > 0 {
        // How many keys are watched is not known yet.
        return Ok(Plan::Later);
    }
    let keys = request.args.from(1);
    let watched = &request.session.watched;
    let bytes: usize = watched.iter().map(|watched| watched.key.len()).sum();
    if watched.len() + keys.len() > MAX_WATCHED_KEYS
        || bytes + keys.total_bytes() > MAX_WATCHED_BYTES
    {
        return Err(Refusal::new(format!(
            "ERR watched keys are over the limit of {MAX_WATCHED_KEYS} or {MAX_WATCHED_BYTES} bytes"
        )));
    }
    let mut parts = Vec::with_capacity(keys.len());
    for key in keys.iter() {
        parts.push((request.partition(key)?, Command::Describe { key }));
    }
    request.session.unanswered_watches += 1;
    match (keys.len(), parts.pop()) {
        (1, Some((partition, command))) => {
            let form = Form::Watched { key: keys.at(0).into() };
            Ok(Plan::One { partition, command, form })
        }
        (_, last) => {
            parts.extend(last);
            let gather = Gather::Watched { keys: keys.iter().map(Box::from).collect() };
            Ok(Plan::Many { parts, gather })
        }
    }
}

pub(super) fn unwatch<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.unanswered_watches > 0 {
        return Ok(Plan::Later);
    }
    request.session.watched.clear();
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

pub(super) fn exec<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.unanswered_watches > 0 {
        return Ok(Plan::Later);
    }
    let Some(transaction) = request.session.transaction.take() else {
        return Err(Refusal::new("ERR EXEC without MULTI"));
    };
    let watched = std::mem::take(&mut request.session.watched);
    if transaction.failed {
        return Err(Refusal::new("EXECABORT Transaction discarded because of previous errors."));
    }
    let mut batch = Batch::default();
    for Watched { key, version } in watched {
        batch.belongs_to(request.node.partitions.of(&key))?;
        batch.guards.push(Guard { key: key.into_vec(), version });
    }
    for queued in &transaction.queue {
        let mut rendered = Vec::new();
        let args = queued.borrowed();
        let plan = match find(args)? {
            Some(spec) => run(&mut Request {
                args,
                spec,
                session: &mut *request.session,
                node: request.node,
                out: &mut rendered,
            }),
            None => Plan::Done,
        };
        batch.add(plan, rendered)?;
    }
    Ok(batch.plan(request.out))
}

/// The commands of a transaction as they are put together.
#[derive(Default)]
struct Batch {
    partition: Option<PartitionId>,
    guards: Vec<Guard<Vec<u8>>>,
    commands: Vec<Command<Vec<u8>>>,
    parts: Vec<TransactionPart>,
}

impl Batch {
    fn belongs_to(&mut self, partition: PartitionId) -> Result<(), Refusal> {
        if *self.partition.get_or_insert(partition) == partition {
            Ok(())
        } else {
            Err(Refusal::CROSS_SLOT)
        }
    }

    fn add(&mut self, plan: Plan<'_>, rendered: Vec<u8>) -> Result<(), Refusal> {
        match plan {
            Plan::Done => self.parts.push(TransactionPart::Rendered(rendered.into())),
            Plan::One { partition, command, form } => {
                self.belongs_to(partition)?;
                self.commands.push(command.to_owned());
                self.parts.push(TransactionPart::Partition(form));
            }
            Plan::Many { .. } => return Err(Refusal::CROSS_SLOT),
            // Commands with such plans are not queued: they are immediate or not allowed.
            Plan::Transaction { .. } | Plan::Node(_) | Plan::Later | Plan::Close => {
                return Err(Refusal::new("ERR Command not allowed inside a transaction"));
            }
        }
        Ok(())
    }

    fn plan<'a>(self, out: &mut Vec<u8>) -> Plan<'a> {
        let Batch { partition, guards, commands, parts } = self;
        if let Some(partition) = partition {
            let mode = TransactionMode::KeepGoing;
            let command = Command::Transaction { guards, commands, mode };
            let form = Form::Transaction { parts: parts.into() };
            return Plan::Transaction { partition, command, form };
        }
        write::array(out, parts.len());
        for part in parts {
            if let TransactionPart::Rendered(bytes) = part {
                out.extend_from_slice(&bytes);
            }
        }
        Plan::Done
    }
}
