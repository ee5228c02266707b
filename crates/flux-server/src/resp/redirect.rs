//! MOVED and CROSSSLOT: what a node answers to clients that are to find the right node themselves.
//!
//! The order is that of Redis: a command of another node is refused before its arguments are looked at
//! and before it is queued, and spoils the transaction that it belongs to.

use flux_core::{Command, Slot};
use flux_proto::resp::Args;

use super::request::Refusal;
use super::table::{Spec, WRITE};
use super::{Plan, Route, Session, errors, find};

/// Refuses a command whose keys are of several slots, or of a slot that another node has.
pub(super) fn check(
    route: &dyn Fn(Slot) -> Route,
    spec: &Spec,
    args: Args<'_>,
    session: &Session,
) -> Result<(), Refusal> {
    if spec.name == "exec" && session.unanswered_watches > 0 {
        // It is planned again when they are answered.
        return Ok(());
    }
    let mut keys = Keys { slot: None, write: spec.has(WRITE) };
    match &session.transaction {
        Some(transaction) if spec.name == "exec" => {
            for queued in &transaction.queue {
                let args = queued.borrowed();
                // It was found when it was queued.
                if let Ok(Some(spec)) = find(args) {
                    keys.add(spec, args)?;
                }
            }
        }
        _ => keys.add(spec, args)?,
    }
    let Some(slot) = keys.slot else {
        return Ok(());
    };
    match route(slot) {
        Route::Here => Ok(()),
        Route::Replica { .. } if session.reads_stale() && !keys.write => Ok(()),
        Route::Replica { host, port } | Route::Elsewhere { host, port } => {
            Err(Refusal::new(errors::moved(slot, &host, port)))
        }
        Route::Unserved => Err(Refusal::new(errors::SLOT_NOT_SERVED)),
    }
}

/// The one slot of a command's keys, or of those of a transaction.
struct Keys {
    slot: Option<Slot>,
    write: bool,
}

impl Keys {
    fn add(&mut self, spec: &Spec, args: Args<'_>) -> Result<(), Refusal> {
        self.write |= spec.has(WRITE);
        for position in spec.key_positions(args.len()) {
            let slot = Slot::of(args.at(position));
            if *self.slot.get_or_insert(slot) != slot {
                return Err(Refusal::CROSS_SLOT);
            }
        }
        Ok(())
    }
}

/// Takes note in the session that a command was redirected.
pub(super) fn note(spec: &Spec, session: &mut Session) {
    if spec.name == "exec" {
        session.transaction = None;
        session.watched.clear();
    } else if let Some(transaction) = &mut session.transaction {
        transaction.failed = true;
    }
}

impl Plan<'_> {
    /// The slot of the first key, if the plan is one for partitions.
    #[allow(dead_code, reason = "for a worker that sends plans to other nodes")]
    pub fn slot(&self) -> Option<Slot> {
        let key = match self {
            Plan::One { command, .. } => first_key(command),
            Plan::Many { parts, .. } => parts.first().and_then(|(_, command)| first_key(command)),
            Plan::Transaction { command, .. } => first_key(command),
            Plan::Done | Plan::Node(_) | Plan::Later | Plan::Close => None,
        };
        key.map(Slot::of)
    }
}

/// The first key of a command; none where it has no keys.
fn first_key<B: AsRef<[u8]>>(command: &Command<B>) -> Option<&[u8]> {
    let key = match command {
        Command::Get { key }
        | Command::GetRange { key, .. }
        | Command::Length { key }
        | Command::Describe { key }
        | Command::Set { key, .. }
        | Command::DeleteIf { key, .. }
        | Command::GetDelete { key }
        | Command::GetExpire { key, .. }
        | Command::Append { key, .. }
        | Command::SetRange { key, .. }
        | Command::Increment { key, .. }
        | Command::IncrementFloat { key, .. }
        | Command::Expire { key, .. }
        | Command::Persist { key } => Some(key),
        Command::GetMany { keys } | Command::Exists { keys } | Command::Delete { keys } => {
            keys.first()
        }
        Command::Lcs { left: key, .. }
        | Command::Rename { from: key, .. }
        | Command::Copy { from: key, .. } => Some(key),
        Command::SetMany { pairs, .. } => pairs.first().map(|(key, _)| key),
        Command::Clear { .. } | Command::Scan { .. } | Command::Count => None,
        Command::Transaction { guards, commands, .. } => {
            return match guards.first() {
                Some(guard) => Some(guard.key.as_ref()),
                None => commands.iter().find_map(first_key),
            };
        }
    };
    key.map(AsRef::as_ref)
}
