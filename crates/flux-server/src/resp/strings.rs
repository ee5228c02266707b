//! Commands on values.

use flux_core::{Command, Condition, Error, Expiry, PartitionId};

use super::options::{ExpiryOption, SetOptions, Time};
use super::request::{Outcome, Refusal, Request, integer};
use super::table::Spec;
use super::{Form, Gather, Plan};

pub(super) fn get<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    Ok(Plan::One { partition, command: Command::Get { key }, form: Form::Value })
}

pub(super) fn set<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let options = if request.args.len() == 3 {
        SetOptions::default()
    } else {
        SetOptions::parse(request, true)?
    };
    let (partition, key) = request.key(1)?;
    let value = request.value(2)?;
    let expiry = match options.expiry {
        Some(ExpiryOption::Time(time)) => time.expiry(request)?,
        Some(ExpiryOption::Keep) => Expiry::Keep,
        _ => Expiry::Never,
    };
    let SetOptions { condition, return_previous, .. } = options;
    let form = if return_previous { Form::Previous } else { Form::Written };
    let command = Command::Set { key, value, expiry, condition, return_previous };
    Ok(Plan::One { partition, command, form })
}

pub(super) fn setnx<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    plain_set(request, 2, Expiry::Never, Condition::IfAbsent, Form::WrittenCount)
}

pub(super) fn setex<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let time = Time { text: request.args.at(2), seconds: true, absolute: false };
    plain_set(request, 3, time.expiry(request)?, Condition::Always, Form::Written)
}

pub(super) fn psetex<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let time = Time { text: request.args.at(2), seconds: false, absolute: false };
    plain_set(request, 3, time.expiry(request)?, Condition::Always, Form::Written)
}

pub(super) fn getset<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    plain_set(request, 2, Expiry::Never, Condition::Always, Form::Previous)
}

/// A SET whose value stands at `position`.
fn plain_set<'a>(
    request: &Request<'a, '_>,
    position: usize,
    expiry: Expiry,
    condition: Condition,
    form: Form,
) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    let value = request.value(position)?;
    let return_previous = form == Form::Previous;
    let command = Command::Set { key, value, expiry, condition, return_previous };
    Ok(Plan::One { partition, command, form })
}

pub(super) fn getdel<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    Ok(Plan::One { partition, command: Command::GetDelete { key }, form: Form::Value })
}

pub(super) fn getex<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let options = SetOptions::parse(request, false)?;
    let (partition, key) = request.key(1)?;
    let command = match options.expiry {
        None => Command::Get { key },
        Some(ExpiryOption::Time(time)) => Command::GetExpire { key, expiry: time.expiry(request)? },
        Some(_) => Command::GetExpire { key, expiry: Expiry::Never },
    };
    Ok(Plan::One { partition, command, form: Form::Value })
}

pub(super) fn mget<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let keys = request.args.from(1);
    let mut parts: Vec<(PartitionId, Vec<&[u8]>)> = Vec::new();
    let mut part_of_key = Vec::with_capacity(keys.len());
    let mut part_of_partition = PartIndex::new(request);
    for key in keys.iter() {
        let partition = request.partition(key)?;
        let part = part_of_partition.part(partition, || parts.push((partition, Vec::new())));
        if let Some((_, part)) = parts.get_mut(usize::from(part)) {
            part.push(key);
        }
        part_of_key.push(part);
    }
    let parts = parts.into_iter().map(|(partition, keys)| (partition, Command::GetMany { keys }));
    let gather = Gather::Values { part_of_key: part_of_key.into() };
    Ok(one_or_many(parts.collect(), Form::Values, gather))
}

pub(super) fn mset<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    check_pairs(request.args.len(), request.spec)?;
    let mut parts: Vec<(PartitionId, Vec<_>)> = Vec::new();
    let mut part_of_partition = PartIndex::new(request);
    for position in (1..request.args.len()).step_by(2) {
        let (partition, key) = request.key(position)?;
        let value = request.value(position + 1)?;
        let part = part_of_partition.part(partition, || parts.push((partition, Vec::new())));
        if let Some((_, part)) = parts.get_mut(usize::from(part)) {
            part.push((key, value));
        }
    }
    let parts = parts
        .into_iter()
        .map(|(partition, pairs)| (partition, Command::SetMany { pairs, if_none_exists: false }));
    Ok(one_or_many(parts.collect(), Form::Written, Gather::Written))
}

pub(super) fn msetnx<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    check_pairs(request.args.len(), request.spec)?;
    let partition = request.same_partition(request.args.from(1).iter().step_by(2))?;
    let mut pairs = Vec::with_capacity(request.args.len() / 2);
    for position in (1..request.args.len()).step_by(2) {
        pairs.push((request.args.at(position), request.value(position + 1)?));
    }
    let command = Command::SetMany { pairs, if_none_exists: true };
    Ok(Plan::One { partition, command, form: Form::WrittenCount })
}

fn check_pairs(count: usize, spec: &Spec) -> Result<(), Refusal> {
    if count.is_multiple_of(2) { Err(Refusal::arity(spec)) } else { Ok(()) }
}

/// Which part of a plan has which partition.
pub(super) struct PartIndex {
    parts: Vec<u16>,
    count: u16,
}

impl PartIndex {
    const NONE: u16 = u16::MAX;

    pub(super) fn new(request: &Request<'_, '_>) -> PartIndex {
        let partitions = usize::from(request.node.partitions.count());
        PartIndex { parts: vec![PartIndex::NONE; partitions], count: 0 }
    }

    /// The part of a partition; calls `add` when it is a new one.
    pub(super) fn part(&mut self, partition: PartitionId, add: impl FnOnce()) -> u16 {
        // A key's partition is one of those that there are.
        let part = &mut self.parts[usize::from(partition.0)];
        if *part == PartIndex::NONE {
            *part = self.count;
            self.count += 1;
            add();
        }
        *part
    }
}

/// The plan of a command that was divided by partitions.
pub(super) fn one_or_many<'a>(
    mut parts: Vec<(PartitionId, Command<&'a [u8]>)>,
    form: Form,
    gather: Gather,
) -> Plan<'a> {
    if parts.len() == 1
        && let Some((partition, command)) = parts.pop()
    {
        return Plan::One { partition, command, form };
    }
    Plan::Many { parts, gather }
}

pub(super) fn append<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    let command = Command::Append { key, suffix: request.value(2)? };
    Ok(Plan::One { partition, command, form: Form::Integer })
}

pub(super) fn strlen<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    Ok(Plan::One { partition, command: Command::Length { key }, form: Form::Integer })
}

pub(super) fn getrange<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (start, end) = (request.integer(2)?, request.integer(3)?);
    let (partition, key) = request.key(1)?;
    let command = Command::GetRange { key, start, end };
    Ok(Plan::One { partition, command, form: Form::Bytes })
}

pub(super) fn setrange<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let offset = request.integer(2)?;
    if offset < 0 {
        return Err(Error::OffsetOutOfRange.into());
    }
    let (partition, key) = request.key(1)?;
    let command = Command::SetRange { key, offset, value: request.value(3)? };
    Ok(Plan::One { partition, command, form: Form::Integer })
}

pub(super) fn incr<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    increment(request, 1)
}

pub(super) fn decr<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    increment(request, -1)
}

pub(super) fn incrby<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    increment(request, request.integer(2)?)
}

pub(super) fn decrby<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let delta = request.integer(2)?.checked_neg();
    let delta = delta.ok_or_else(|| Refusal::new("ERR decrement would overflow"))?;
    increment(request, delta)
}

fn increment<'a>(request: &Request<'a, '_>, delta: i64) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    let command = Command::Increment { key, delta };
    Ok(Plan::One { partition, command, form: Form::Integer })
}

pub(super) fn incrbyfloat<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    let command = Command::IncrementFloat { key, delta: request.args.at(2) };
    Ok(Plan::One { partition, command, form: Form::Bytes })
}

pub(super) fn lcs<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (mut length, mut runs, mut with_length, mut min_length) = (false, false, false, 0);
    let mut options = request.args.from(3).iter();
    while let Some(option) = options.next() {
        if option.eq_ignore_ascii_case(b"IDX") {
            runs = true;
        } else if option.eq_ignore_ascii_case(b"LEN") {
            length = true;
        } else if option.eq_ignore_ascii_case(b"WITHMATCHLEN") {
            with_length = true;
        } else if option.eq_ignore_ascii_case(b"MINMATCHLEN") {
            let number = integer(options.next().ok_or(Refusal::SYNTAX)?)?;
            min_length = usize::try_from(number).unwrap_or(0);
        } else {
            return Err(Refusal::SYNTAX);
        }
    }
    let form = match (runs, length) {
        (true, true) => {
            return Err(Refusal::new(
                "ERR If you want both the length and indexes, please just use IDX.",
            ));
        }
        (true, false) => Form::LcsRuns { min_length, with_length },
        (false, true) => Form::LcsLength,
        (false, false) => Form::LcsText,
    };
    let (left, right) = (request.args.at(1), request.args.at(2));
    let partition = request.same_partition([left, right].into_iter())?;
    Ok(Plan::One { partition, command: Command::Lcs { left, right }, form })
}
