//! What commands do: `evaluate` carries one out against a draft, `read` answers one that only reads.
//!
//! The semantics are those of Redis 7.0, for whatever protocol a command came by; the limits on keys
//! and values are checked here, so that they hold for all of them. What this does not do: check
//! whether a command's keys are of one partition, or make anything durable. A reply to a write only
//! holds once the draft's batch is committed.

mod keys;
mod lcs;
mod long_double;
mod number;
mod read;
mod scan;
mod string;
mod transaction;

#[cfg(test)]
mod tests;

use crate::draft::Draft;
use crate::store::{Entry, Table};
use crate::{
    Command, Condition, Error, Expiry, MAX_KEY_BYTES, MAX_VALUE_BYTES, Reply, Revision, UnixMillis,
    Value,
};

/// Carries out a command. Its effects are in the draft afterwards, all of them or, when the reply is
/// an error, none.
pub fn evaluate(draft: &mut Draft<'_>, command: &Command<&[u8]>) -> Reply {
    let outcome = match *command {
        Command::Set { key, value, expiry, condition, return_previous } => {
            string::set(draft, key, value, expiry, condition, return_previous)
        }
        Command::SetMany { ref pairs, if_none_exists } => {
            string::set_many(draft, pairs, if_none_exists)
        }
        Command::Delete { ref keys } => keys::delete(draft, keys),
        Command::DeleteIf { key, condition } => keys::delete_if(draft, key, condition),
        Command::GetDelete { key } => keys::read_and_delete(draft, key),
        Command::GetExpire { key, expiry } => keys::read_and_expire(draft, key, expiry),
        Command::Append { key, suffix } => string::append(draft, key, suffix),
        Command::SetRange { key, offset, value } => string::set_range(draft, key, offset, value),
        Command::Increment { key, delta } => number::increment(draft, key, delta),
        Command::IncrementFloat { key, delta } => number::increment_float(draft, key, delta),
        Command::Expire { key, at, condition } => keys::expire(draft, key, at, condition),
        Command::Persist { key } => keys::persist(draft, key),
        Command::Rename { from, to, if_absent } => keys::rename(draft, from, to, if_absent),
        Command::Copy { from, to, replace } => keys::copy(draft, from, to, replace),
        Command::Clear { limit } => Ok(Reply::Integer(count(draft.clear(limit)))),
        Command::Transaction { ref guards, ref commands, mode } => {
            transaction::run(draft, guards, commands, mode)
        }
        Command::Get { .. }
        | Command::GetMany { .. }
        | Command::GetRange { .. }
        | Command::Length { .. }
        | Command::Exists { .. }
        | Command::Lcs { .. }
        | Command::Describe { .. }
        | Command::Scan { .. }
        | Command::Count => read::answer(draft, command),
    };
    outcome.unwrap_or_else(Reply::Error)
}

/// Answers a command that only reads from what is applied, with nothing in flight.
///
/// # Panics
/// When the command `is_write`.
pub fn read(table: &Table, now_ms: UnixMillis, command: &Command<&[u8]>) -> Reply {
    let applied = read::Applied { table, now_ms };
    read::answer(&applied, command).unwrap_or_else(Reply::Error)
}

fn check_key(key: &[u8]) -> Result<(), Error> {
    match key.len() {
        0 => Err(Error::EmptyKey),
        length if length > MAX_KEY_BYTES => Err(Error::KeyTooLong(length)),
        _ => Ok(()),
    }
}

fn check_keys(keys: &[&[u8]]) -> Result<(), Error> {
    keys.iter().try_for_each(|key| check_key(key))
}

fn check_value_bytes(length: usize) -> Result<(), Error> {
    if length > MAX_VALUE_BYTES { Err(Error::ValueTooLarge(length)) } else { Ok(()) }
}

/// Whether a condition holds for a key of this version, 0 where it is absent.
fn holds(condition: Condition, version: Revision) -> bool {
    match condition {
        Condition::Always => true,
        Condition::IfAbsent => version == 0,
        Condition::IfPresent => version != 0,
        Condition::IfVersion(wanted) => version == wanted,
    }
}

/// The time that an expiry means, for one that names a time. It may be in the past.
fn expiry_time(expiry: Expiry, now_ms: UnixMillis) -> Result<UnixMillis, Error> {
    let at = match expiry {
        Expiry::In(ms) => now_ms.checked_add(ms),
        Expiry::At(at) => Some(at),
        Expiry::Never | Expiry::Keep => None,
    };
    // Protocols show it as a signed number.
    at.filter(|&at| i64::try_from(at).is_ok()).ok_or(Error::InvalidExpiry)
}

/// As `expiry_time`, for commands in which no time is before the first millisecond.
fn positive_expiry_time(expiry: Expiry, now_ms: UnixMillis) -> Result<UnixMillis, Error> {
    match expiry {
        Expiry::In(0) | Expiry::At(0) => Err(Error::InvalidExpiry),
        _ => expiry_time(expiry, now_ms),
    }
}

fn version_of(entry: Option<Entry<'_>>) -> Revision {
    entry.map_or(0, |entry| entry.version)
}

fn value_of(entry: Option<Entry<'_>>) -> Option<Value> {
    entry.map(|Entry { value, version, expires_at_ms, .. }| Value {
        bytes: value.to_vec(),
        version,
        expires_at_ms,
    })
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
