//! Commands that only read, over anything that shows keys: a draft, or a table as it is.

use super::{check_key, check_keys, count, lcs, scan, transaction, value_of};
use crate::draft::Draft;
use crate::reply::Description;
use crate::store::{Entry, Table};
use crate::{Command, Error, Reply, UnixMillis};

/// Keys as they are at one moment, where an expired key is absent.
pub(super) trait View {
    fn read<R>(&self, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R;

    /// What is applied, with the time.
    fn applied(&self) -> Applied<'_>;
}

impl View for Draft<'_> {
    fn read<R>(&self, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        Draft::read(self, key, f)
    }

    fn applied(&self) -> Applied<'_> {
        Applied { table: self.table(), now_ms: self.now_ms() }
    }
}

/// A table on which nothing is in flight, or is not to be seen.
pub(super) struct Applied<'a> {
    pub(super) table: &'a Table,
    pub(super) now_ms: UnixMillis,
}

impl View for Applied<'_> {
    fn read<R>(&self, key: &[u8], f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        self.table.read(self.table.hash(key), key, |entry| {
            f(entry.filter(|entry| !entry.is_expired(self.now_ms)))
        })
    }

    fn applied(&self) -> Applied<'_> {
        Applied { ..*self }
    }
}

/// The reply to a command that is no write.
pub(super) fn answer(view: &impl View, command: &Command<&[u8]>) -> Result<Reply, Error> {
    match *command {
        Command::Get { key } => {
            check_key(key)?;
            Ok(Reply::Value(view.read(key, value_of)))
        }
        Command::GetMany { ref keys } => {
            check_keys(keys)?;
            let length =
                |key: &&[u8]| view.read(key, |entry| entry.map_or(0, |one| one.value.len()));
            check_reply(keys.iter().map(length).sum())?;
            Ok(Reply::Values(keys.iter().map(|key| view.read(key, value_of)).collect()))
        }
        Command::GetRange { key, start, end } => {
            check_key(key)?;
            Ok(Reply::Bytes(view.read(key, |entry| {
                range(entry.map_or(&[], |entry| entry.value), start, end).to_vec()
            })))
        }
        Command::Length { key } => {
            check_key(key)?;
            let length = view.read(key, |entry| entry.map_or(0, |entry| entry.value.len()));
            Ok(Reply::Integer(count(length)))
        }
        Command::Exists { ref keys } => {
            check_keys(keys)?;
            let exists = |key: &&&[u8]| view.read(key, |entry| entry.is_some());
            Ok(Reply::Integer(count(keys.iter().filter(exists).count())))
        }
        Command::Lcs { left, right } => {
            check_keys(&[left, right])?;
            lcs::answer(view, left, right)
        }
        Command::Describe { key } => {
            check_key(key)?;
            Ok(Reply::Described(view.read(key, |entry| entry.as_ref().map(description))))
        }
        Command::Transaction { ref guards, ref commands, mode } => {
            transaction::read(view, guards, commands, mode)
        }
        Command::Scan { from, ref filter, limits, keys_only } => {
            let Applied { table, now_ms } = view.applied();
            Ok(scan::page(table, now_ms, from, filter, limits, keys_only))
        }
        Command::Count => Ok(Reply::Integer(count(view.applied().table.len()))),
        _ => unreachable!("a write is evaluated on a draft"),
    }
}

/// Bytes `start` to `end`, both inclusive and counted from the end where they are negative. An end
/// before the first byte means the first byte, as in Redis, unless both are negative and crossed.
fn range(value: &[u8], start: i64, end: i64) -> &[u8] {
    let length = count(value.len());
    if length == 0 || (start < 0 && end < 0 && start > end) {
        return &[];
    }
    let from_start = |at: i64| {
        if at < 0 { at.saturating_add(length).max(0) } else { at }
    };
    let (start, end) = (from_start(start), from_start(end).min(length - 1));
    // Both are within the value once they are in order.
    if start > end { &[] } else { &value[start as usize..=end as usize] }
}

fn description(entry: &Entry<'_>) -> Description {
    Description {
        version: entry.version,
        expires_at_ms: entry.expires_at_ms,
        value_bytes: entry.value.len(),
        written_at_s: entry.written_at_s,
        memory_bytes: entry.memory_bytes(),
    }
}

/// Whether a reply may hold so many bytes of values: what waits for a reader must be bounded.
pub(super) fn check_reply(bytes: usize) -> Result<(), Error> {
    if bytes > crate::MAX_REPLY_BYTES {
        return Err(Error::ReplyTooLarge(bytes));
    }
    Ok(())
}
