//! The commands on a plain map, one after the other, as simply as they can be told.

use std::collections::BTreeMap;

use super::Row;
use crate::command::{ExpireCondition, Guard, TransactionMode};
use crate::{Command, Condition, Error, Expiry, Reply, UnixMillis, Value};

#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) keys: BTreeMap<Vec<u8>, Value>,
    pub(super) revision: u64,
    pub(super) now_ms: UnixMillis,
}

type Bytes = Vec<u8>;

impl Model {
    pub(super) fn rows(&self) -> Vec<Row> {
        let row = |(key, value): (&Bytes, &Value)| {
            (key.clone(), value.bytes.clone(), value.version, value.expires_at_ms)
        };
        self.keys.iter().map(row).collect()
    }

    fn present(&self, key: &Bytes) -> Option<Value> {
        let value = self.keys.get(key)?;
        let expired = value.expires_at_ms.is_some_and(|at| at <= self.now_ms);
        (!expired).then(|| value.clone())
    }

    fn version(&self, key: &Bytes) -> u64 {
        self.present(key).map_or(0, |value| value.version)
    }

    fn put(&mut self, key: &Bytes, bytes: Bytes, expires_at_ms: Option<u64>) -> u64 {
        if self.keys.contains_key(key) && self.present(key).is_none() {
            self.revision += 1;
        }
        self.revision += 1;
        let version = self.revision;
        self.keys.insert(key.clone(), Value { bytes, version, expires_at_ms });
        version
    }

    fn delete(&mut self, key: &Bytes) -> i64 {
        let present = self.present(key).is_some();
        if present {
            self.revision += 1;
            self.keys.remove(key);
        }
        i64::from(present)
    }

    pub(super) fn run(&mut self, command: &Command<Bytes>) -> Reply {
        self.try_run(command).unwrap_or_else(Reply::Error)
    }

    fn try_run(&mut self, command: &Command<Bytes>) -> Result<Reply, Error> {
        Ok(match command {
            Command::Get { key } => Reply::Value(self.present(key)),
            Command::GetMany { keys } => {
                Reply::Values(keys.iter().map(|key| self.present(key)).collect())
            }
            Command::Length { key } => {
                Reply::Integer(self.present(key).map_or(0, |value| value.bytes.len()) as i64)
            }
            Command::Exists { keys } => {
                let exists = |key: &&Bytes| self.present(key).is_some();
                Reply::Integer(keys.iter().filter(exists).count() as i64)
            }
            Command::Set { key, value, expiry, condition, return_previous } => {
                self.set(key, value, *expiry, *condition, *return_previous)?
            }
            Command::SetMany { pairs, if_none_exists } => self.set_many(pairs, *if_none_exists),
            Command::Delete { keys } => {
                Reply::Integer(keys.iter().map(|key| self.delete(key)).sum())
            }
            Command::DeleteIf { key, condition } => match self.version(key) {
                version if holds(*condition, version) => Reply::Integer(self.delete(key)),
                version => Reply::NotWritten { version },
            },
            Command::GetDelete { key } => {
                let value = self.present(key);
                self.delete(key);
                Reply::Value(value)
            }
            Command::GetExpire { key, expiry } => self.read_and_expire(key, *expiry)?,
            Command::Append { key, suffix } => self.edit(key, |bytes| bytes.extend(suffix)),
            Command::SetRange { key, offset, value } => self.set_range(key, *offset, value)?,
            Command::Increment { key, delta } => self.increment(key, *delta)?,
            Command::Expire { key, at, condition } => self.expire(key, *at, condition)?,
            Command::Persist { key } => {
                let value = self.present(key).filter(|value| value.expires_at_ms.is_some());
                if let Some(value) = &value {
                    self.put(key, value.bytes.clone(), None);
                }
                Reply::Integer(i64::from(value.is_some()))
            }
            Command::Rename { from, to, if_absent } => self.rename(from, to, *if_absent)?,
            Command::Copy { from, to, replace } => match self.present(from) {
                Some(value) if from != to && (*replace || self.present(to).is_none()) => {
                    self.put(to, value.bytes, value.expires_at_ms);
                    Reply::Integer(1)
                }
                _ => Reply::Integer(0),
            },
            Command::Clear { .. } => {
                let removed = std::mem::take(&mut self.keys).len();
                self.revision += removed as u64;
                Reply::Integer(removed as i64)
            }
            Command::Transaction { guards, commands, mode } => {
                self.transaction(guards, commands, *mode)?
            }
            Command::Scan { .. } | Command::Count => unreachable!("they show what is applied"),
            Command::GetRange { .. }
            | Command::Lcs { .. }
            | Command::Describe { .. }
            | Command::IncrementFloat { .. } => unreachable!("not generated"),
        })
    }

    fn set(
        &mut self,
        key: &Bytes,
        value: &Bytes,
        expiry: Expiry,
        condition: Condition,
        return_previous: bool,
    ) -> Result<Reply, Error> {
        let previous = self.present(key);
        let expires_at_ms = match expiry {
            Expiry::Never => None,
            Expiry::Keep => previous.as_ref().and_then(|value| value.expires_at_ms),
            Expiry::In(0) | Expiry::At(0) => return Err(Error::InvalidExpiry),
            Expiry::In(ms) => Some(self.now_ms + ms),
            Expiry::At(at) => Some(at),
        };
        let mut version = self.version(key);
        let written = holds(condition, version);
        if written {
            version = self.put(key, value.clone(), expires_at_ms);
        }
        Ok(match (return_previous, written) {
            (true, _) => Reply::Previous { previous, written },
            (false, true) => Reply::Written { version },
            (false, false) => Reply::NotWritten { version },
        })
    }

    fn set_many(&mut self, pairs: &[(Bytes, Bytes)], if_none_exists: bool) -> Reply {
        let existing = pairs.iter().find(|(key, _)| self.version(key) != 0);
        if let Some((key, _)) = existing.filter(|_| if_none_exists) {
            return Reply::NotWritten { version: self.version(key) };
        }
        let put = |(key, value): &(Bytes, Bytes)| self.put(key, value.clone(), None);
        Reply::Written { version: pairs.iter().map(put).last().unwrap_or(0) }
    }

    fn set_range(&mut self, key: &Bytes, offset: i64, value: &Bytes) -> Result<Reply, Error> {
        let offset = usize::try_from(offset).map_err(|_| Error::OffsetOutOfRange)?;
        if value.is_empty() {
            return self.try_run(&Command::Length { key: key.clone() });
        }
        Ok(self.edit(key, |bytes| {
            bytes.resize(bytes.len().max(offset + value.len()), 0);
            bytes[offset..offset + value.len()].copy_from_slice(value);
        }))
    }

    fn increment(&mut self, key: &Bytes, delta: i64) -> Result<Reply, Error> {
        let old = self.present(key);
        let number = old.as_ref().map_or(Some(0), |value| {
            let text = std::str::from_utf8(&value.bytes).ok()?;
            text.parse().ok().filter(|number: &i64| number.to_string() == text)
        });
        let number = number.ok_or(Error::NotInteger)?;
        let value = number.checked_add(delta).ok_or(Error::Overflow)?;
        let expires_at_ms = old.and_then(|value| value.expires_at_ms);
        let version = self.put(key, value.to_string().into_bytes(), expires_at_ms);
        Ok(Reply::Counter { value, version })
    }

    fn expire(
        &mut self,
        key: &Bytes,
        at: Expiry,
        condition: &ExpireCondition,
    ) -> Result<Reply, Error> {
        let at = match at {
            Expiry::In(ms) => self.now_ms + ms,
            Expiry::At(at) => at,
            _ => return Err(Error::InvalidExpiry),
        };
        let Some(value) = self.present(key) else {
            return Ok(Reply::Integer(0));
        };
        let never = u64::MAX;
        let current = value.expires_at_ms.unwrap_or(never);
        let applies = (!condition.if_none || current == never)
            && (!condition.if_some || current != never)
            && (!condition.if_later || at > current)
            && (!condition.if_earlier || at < current);
        if applies && at <= self.now_ms {
            self.delete(key);
        } else if applies {
            self.put(key, value.bytes, Some(at));
        }
        Ok(Reply::Integer(i64::from(applies)))
    }

    fn rename(&mut self, from: &Bytes, to: &Bytes, if_absent: bool) -> Result<Reply, Error> {
        let value = self.present(from).ok_or(Error::NoSuchKey)?;
        if if_absent && self.present(to).is_some() {
            return Ok(Reply::Integer(0));
        }
        if from != to {
            self.put(to, value.bytes, value.expires_at_ms);
            self.delete(from);
        }
        Ok(Reply::Integer(1))
    }

    fn transaction(
        &mut self,
        guards: &[Guard<Bytes>],
        commands: &[Command<Bytes>],
        mode: TransactionMode,
    ) -> Result<Reply, Error> {
        if guards.iter().any(|guard| self.version(&guard.key) != guard.version) {
            return Ok(Reply::Aborted { position: None });
        }
        let before = self.clone();
        let mut replies = Vec::new();
        for (position, command) in commands.iter().enumerate() {
            let reply = self.run(command);
            let failed = match &reply {
                Reply::Error(error) => Some(Err(error.clone())),
                Reply::NotWritten { .. } | Reply::Previous { written: false, .. } => {
                    Some(Ok(Reply::Aborted { position: Some(position) }))
                }
                _ => None,
            };
            if mode == TransactionMode::AllOrNothing
                && let Some(outcome) = failed
            {
                *self = before;
                return outcome;
            }
            replies.push(reply);
        }
        Ok(Reply::Many(replies))
    }

    fn edit(&mut self, key: &Bytes, edit: impl FnOnce(&mut Bytes)) -> Reply {
        let old = self.present(key);
        let expires_at_ms = old.as_ref().and_then(|value| value.expires_at_ms);
        let mut bytes = old.map_or(Vec::new(), |value| value.bytes);
        edit(&mut bytes);
        let length = bytes.len() as i64;
        self.put(key, bytes, expires_at_ms);
        Reply::Integer(length)
    }

    fn read_and_expire(&mut self, key: &Bytes, expiry: Expiry) -> Result<Reply, Error> {
        let Some(mut value) = self.present(key) else {
            return Ok(Reply::Value(None));
        };
        let expires_at_ms = match expiry {
            Expiry::Keep => return Ok(Reply::Value(Some(value))),
            Expiry::Never if value.expires_at_ms.is_none() => return Ok(Reply::Value(Some(value))),
            Expiry::Never => None,
            Expiry::In(0) | Expiry::At(0) => return Err(Error::InvalidExpiry),
            Expiry::In(ms) => Some(self.now_ms + ms),
            Expiry::At(at) => Some(at),
        };
        if expires_at_ms.is_some_and(|at| at <= self.now_ms) {
            self.delete(key);
        } else {
            value.version = self.put(key, value.bytes.clone(), expires_at_ms);
            value.expires_at_ms = expires_at_ms;
        }
        Ok(Reply::Value(Some(value)))
    }
}

fn holds(condition: Condition, version: u64) -> bool {
    match condition {
        Condition::Always => true,
        Condition::IfAbsent => version == 0,
        Condition::IfPresent => version > 0,
        Condition::IfVersion(wanted) => version == wanted,
    }
}
