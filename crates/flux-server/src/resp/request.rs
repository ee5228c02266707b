//! A command on its way to a plan, and why it may not get there.

use std::borrow::Cow;

use flux_core::{Error, MAX_KEY_BYTES, MAX_VALUE_BYTES, PartitionId};
use flux_proto::resp::{self, Args};

use super::table::Spec;
use super::{NodeView, Plan, Session};

/// A well-known command with an acceptable number of arguments.
pub(super) struct Request<'a, 's> {
    pub(super) args: Args<'a>,
    pub(super) spec: &'static Spec,
    pub(super) session: &'s mut Session,
    pub(super) node: &'s NodeView<'s>,
    pub(super) out: &'s mut Vec<u8>,
}

pub(super) type Outcome<'a> = Result<Plan<'a>, Refusal>;

/// The error that answers a command, in full: `ERR syntax error`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) Cow<'static, str>);

impl Refusal {
    pub(super) const SYNTAX: Refusal = Refusal(Cow::Borrowed("ERR syntax error"));
    pub(super) const NOT_INTEGER: Refusal =
        Refusal(Cow::Borrowed("ERR value is not an integer or out of range"));
    pub(super) const DATABASE: Refusal = Refusal(Cow::Borrowed("ERR DB index is out of range"));
    pub(super) const CROSS_SLOT: Refusal =
        Refusal(Cow::Borrowed("CROSSSLOT Keys in request don't hash to the same slot"));

    pub(super) fn new(text: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal(text.into())
    }

    pub(super) fn arity(spec: &Spec) -> Refusal {
        let prefix = match spec.name {
            "exec" => "EXECABORT Transaction discarded because of:",
            _ => "ERR",
        };
        Refusal(format!("{prefix} wrong number of arguments for '{}' command", spec.name).into())
    }

    pub(super) fn expire_time(spec: &Spec) -> Refusal {
        Refusal(format!("ERR invalid expire time in '{}' command", spec.name).into())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal(super::errors::text(&error).into())
    }
}

impl<'a> Request<'a, '_> {
    /// The partition of a key that is within its limits.
    pub(super) fn partition(&self, key: &[u8]) -> Result<PartitionId, Refusal> {
        check_key(key)?;
        Ok(self.node.partitions.of(key))
    }

    /// The key at `position`, with its partition.
    pub(super) fn key(&self, position: usize) -> Result<(PartitionId, &'a [u8]), Refusal> {
        let key = self.args.at(position);
        Ok((self.partition(key)?, key))
    }

    /// The value at `position`.
    pub(super) fn value(&self, position: usize) -> Result<&'a [u8], Refusal> {
        let value = self.args.at(position);
        check_value(value)?;
        Ok(value)
    }

    /// The integer at `position`.
    pub(super) fn integer(&self, position: usize) -> Result<i64, Refusal> {
        integer(self.args.at(position))
    }

    /// The one partition of several keys.
    pub(super) fn same_partition(
        &self,
        mut keys: impl Iterator<Item = &'a [u8]>,
    ) -> Result<PartitionId, Refusal> {
        let Some(first) = keys.next() else {
            return Err(Refusal::SYNTAX);
        };
        let partition = self.partition(first)?;
        for key in keys {
            if self.partition(key)? != partition {
                return Err(Refusal::CROSS_SLOT);
            }
        }
        Ok(partition)
    }
}

/// An integer argument.
pub(super) fn integer(text: &[u8]) -> Result<i64, Refusal> {
    resp::parse_integer(text).ok_or(Refusal::NOT_INTEGER)
}

pub(super) fn check_value(value: &[u8]) -> Result<(), Refusal> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(Error::ValueTooLarge(value.len()).into());
    }
    Ok(())
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    match key.len() {
        0 => Err(Error::EmptyKey.into()),
        length if length > MAX_KEY_BYTES => Err(Error::KeyTooLong(length).into()),
        _ => Ok(()),
    }
}
