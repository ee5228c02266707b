//! A request on its way from a connection to its partitions: where it goes, and where its reply goes.

use flux_core::{Command, PartitionId, Reply};
use flux_proto::resp::write;

use super::dispatch::Dispatch;
use crate::connection::{Connection, Gathering, Render, Slot};
use crate::mailbox::{Ask, Origin};
use crate::resp::{Form, Gather, Plan, Session};

/// Keys that one step of FLUSHALL deletes from a partition.
pub(super) const FLUSH_STEP: usize = 4096;

/// A request on its way from a connection to its partitions.
pub(super) struct Request<'w> {
    pub(super) connection: &'w mut Connection,
    pub(super) dispatch: &'w mut Dispatch,
    pub(super) key: usize,
    /// How it wants to be carried out.
    pub(super) ask: Ask,
}

impl Request<'_> {
    fn origin(&self, part: u32) -> Origin {
        Origin {
            worker: self.dispatch.worker(),
            part,
            connection: self.key as u32,
            serial: self.connection.serial,
            sequence: self.connection.next_sequence(),
        }
    }

    /// Whether a command must wait until all earlier requests of the connection are answered.
    pub(super) fn must_wait(&self, plan: &Plan<'_>) -> bool {
        match plan {
            Plan::Later => true,
            Plan::Node(_) => !self.connection.slots.is_empty(),
            // Planned once: the session has taken note of it.
            Plan::One { form: Form::Watched { .. }, .. }
            | Plan::Many { gather: Gather::Watched { .. }, .. } => false,
            Plan::One { partition, command, .. } => self.would_overtake(*partition, command),
            Plan::Many { parts, .. } => {
                parts.iter().any(|(partition, command)| self.would_overtake(*partition, command))
            }
            Plan::Done | Plan::Close | Plan::Transaction { .. } => false,
        }
    }

    pub(super) fn would_overtake(&self, partition: PartitionId, command: &Command<&[u8]>) -> bool {
        let owner = self.dispatch.shared().owner(partition);
        !command.is_write() && self.connection.would_overtake(owner)
    }

    /// Carries out a plan that need not wait. True if the connection is to end.
    pub(super) fn carry_out(
        &mut self,
        plan: Plan<'_>,
        text: Vec<u8>,
        session: &mut Session,
    ) -> bool {
        match plan {
            Plan::Done => self.connection.answer(text),
            Plan::Close => {
                self.connection.answer(text);
                return true;
            }
            Plan::One { partition, command, form } => {
                self.one(partition, &command, Render::Resp(form), Some(session));
            }
            Plan::Transaction { partition, command, form } => {
                self.one(partition, &command.borrowed(), Render::Resp(form), Some(session));
            }
            Plan::Many { parts, gather } => {
                self.many(&parts, Gathering::Resp(gather), Some(session));
            }
            Plan::Node(_) | Plan::Later => unreachable!("the caller has taken these"),
        }
        false
    }

    /// A command of one partition. A read is answered from the table at once, unless earlier requests of
    /// the connection are under way. Then it goes the way of the writes, so that it sees those before it
    /// and none after it.
    pub(super) fn one(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        render: Render,
        session: Option<&mut Session>,
    ) {
        let first = self.connection.slots.is_empty();
        if first && read_value(self, partition, command, &render, session.as_deref()) {
            return;
        }
        match self.run(partition, command, self.origin(0), first) {
            Some(reply) if first => render.put(&reply, session, &mut self.connection.output),
            Some(reply) => drop(self.connection.push(Slot::Done(reply, render))),
            None => drop(self.connection.push(Slot::Waiting(render))),
        }
    }

    /// Commands of several partitions with one reply.
    pub(super) fn many(
        &mut self,
        parts: &[(PartitionId, Command<&[u8]>)],
        gather: Gathering,
        session: Option<&mut Session>,
    ) {
        let first = self.connection.slots.is_empty();
        let mut replies = Vec::with_capacity(parts.len());
        for (index, (partition, command)) in parts.iter().enumerate() {
            replies.push(self.run(*partition, command, self.origin(index as u32), first));
        }
        let missing = replies.iter().filter(|reply| reply.is_none()).count();
        let slot = Slot::Parts { parts: replies, missing, gather };
        if first && missing == 0 {
            slot.put(session, &mut self.connection.output);
        } else {
            self.connection.push(slot);
        }
    }

    fn run(
        &mut self,
        partition: PartitionId,
        command: &Command<&[u8]>,
        origin: Origin,
        first: bool,
    ) -> Option<Reply> {
        let readable =
            command.is_point_read() || (!command.is_write() && self.dispatch.owns(partition));
        if first
            && readable
            && let Some(reply) = self.dispatch.read(partition, command)
        {
            return Some(reply);
        }
        if self.ask.stale
            && readable
            && let Some(reply) = self.dispatch.read_stale(partition, command)
        {
            return Some(reply);
        }
        self.connection.sent_to(self.dispatch.shared().owner(partition));
        self.dispatch.submit(partition, command, self.ask.clone(), origin)
    }
}

/// The shortest way for the most frequent read: from the table straight into the output.
fn read_value(
    request: &mut Request<'_>,
    partition: PartitionId,
    command: &Command<&[u8]>,
    render: &Render,
    session: Option<&Session>,
) -> bool {
    let (&Command::Get { key }, Render::Resp(Form::Value), Some(session)) =
        (command, render, session)
    else {
        return false;
    };
    let now = request.dispatch.now;
    let shared = request.dispatch.shared();
    let view = &shared.views[usize::from(partition.0)];
    let output = &mut request.connection.output;
    let before = output.len();
    let read = view.undisturbed(|| {
        if !view.standing.may_serve(now.us) {
            return None;
        }
        Some(view.table.read(view.table.hash(key), key, |entry| match entry {
            Some(entry) if !entry.is_expired(now.ms) => {
                write::bulk(output, entry.value);
                true
            }
            _ => {
                write::null(output, session.version);
                false
            }
        }))
    });
    let Some(hit) = read else {
        output.truncate(before);
        return false;
    };
    request.dispatch.count_read(hit);
    true
}

/// Goes on with FLUSHALL where a partition has more keys than one step deletes. Gives the reply back
/// when this partition is done, and any other reply.
pub(super) fn continue_flush(
    connection: &Connection,
    dispatch: &mut Dispatch,
    origin: Origin,
    reply: Reply,
) -> Option<Reply> {
    if !connection.is_flushing(origin.sequence) {
        return Some(reply);
    }
    let mut reply = reply;
    while reply == Reply::Integer(FLUSH_STEP as i64) {
        let step = Command::Clear { limit: FLUSH_STEP };
        reply = dispatch.submit(PartitionId(origin.part as u16), &step, Ask::default(), origin)?;
    }
    Some(reply)
}
