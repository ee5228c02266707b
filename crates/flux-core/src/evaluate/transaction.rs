//! Several commands as one write, and the guards it depends on.

use super::read::{View, answer, check_reply};
use super::{check_key, evaluate, version_of};
use crate::command::{Guard, TransactionMode};
use crate::draft::Draft;
use crate::{Command, Error, Reply};

pub(super) fn run(
    draft: &mut Draft<'_>,
    guards: &[Guard<&[u8]>],
    commands: &[Command<&[u8]>],
    mode: TransactionMode,
) -> Result<Reply, Error> {
    if !guards_hold(draft, guards)? {
        return Ok(Reply::Aborted { position: None });
    }
    let savepoint = draft.savepoint();
    let outcome = replies(commands, mode, |command| evaluate(draft, command));
    if !matches!(outcome, Ok(Reply::Many(_))) {
        draft.rollback(savepoint);
    }
    outcome
}

pub(super) fn read(
    view: &impl View,
    guards: &[Guard<&[u8]>],
    commands: &[Command<&[u8]>],
    mode: TransactionMode,
) -> Result<Reply, Error> {
    if !guards_hold(view, guards)? {
        return Ok(Reply::Aborted { position: None });
    }
    replies(commands, mode, |command| answer(view, command).unwrap_or_else(Reply::Error))
}

fn guards_hold(view: &impl View, guards: &[Guard<&[u8]>]) -> Result<bool, Error> {
    for guard in guards {
        check_key(guard.key)?;
        if view.read(guard.key, version_of) != guard.version {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A reply for each command. In all or nothing mode the first that failed ends it, with its error or
/// its position.
fn replies(
    commands: &[Command<&[u8]>],
    mode: TransactionMode,
    mut carry_out: impl FnMut(&Command<&[u8]>) -> Reply,
) -> Result<Reply, Error> {
    let mut replies = Vec::with_capacity(commands.len());
    let mut bytes = 0;
    for (position, command) in commands.iter().enumerate() {
        let reply = carry_out(command);
        bytes += reply.value_bytes();
        check_reply(bytes)?;
        match (mode, reply) {
            // What the node refuses it refuses as a whole; only a command's own fault stands alone.
            (
                _,
                Reply::Error(
                    error @ (Error::Overloaded
                    | Error::OutOfMemory { .. }
                    | Error::ReplyTooLarge(_)
                    | Error::WriteTooLarge(_)),
                ),
            ) => return Err(error),
            (TransactionMode::AllOrNothing, Reply::Error(error)) => return Err(error),
            (TransactionMode::AllOrNothing, reply) if condition_failed(&reply) => {
                return Ok(Reply::Aborted { position: Some(position) });
            }
            (_, reply) => replies.push(reply),
        }
    }
    Ok(Reply::Many(replies))
}

fn condition_failed(reply: &Reply) -> bool {
    matches!(
        reply,
        Reply::NotWritten { .. } | Reply::Previous { written: false, .. } | Reply::Aborted { .. }
    )
}
