//! Commands on keys whatever their values are: deleting, counting, renaming, expiry, and walks.

use flux_core::command::ExpireCondition;
use flux_core::{Command, Expiry, PartitionId};
use flux_proto::resp::write;

use super::node::ScanCursor;
use super::request::{Outcome, Refusal, Request, integer};
use super::strings::{PartIndex, one_or_many};
use super::{Form, Gather, NodeCommand, Plan};

pub(super) fn delete<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    counted(request, true, |keys| Command::Delete { keys })
}

pub(super) fn exists<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    counted(request, false, |keys| Command::Exists { keys })
}

/// A command on keys that answers how many it found.
fn counted<'a>(
    request: &Request<'a, '_>,
    is_write: bool,
    command: impl Fn(Vec<&'a [u8]>) -> Command<&'a [u8]>,
) -> Outcome<'a> {
    if request.args.len() == 2 {
        let (partition, key) = request.key(1)?;
        return Ok(Plan::One { partition, command: command(vec![key]), form: Form::Integer });
    }
    let mut parts: Vec<(PartitionId, Vec<&[u8]>)> = Vec::new();
    let mut part_of_partition = PartIndex::new(request);
    for key in request.args.from(1).iter() {
        let partition = request.partition(key)?;
        let part = part_of_partition.part(partition, || parts.push((partition, Vec::new())));
        if let Some((_, part)) = parts.get_mut(usize::from(part)) {
            part.push(key);
        }
    }
    let parts = parts.into_iter().map(|(partition, keys)| (partition, command(keys)));
    Ok(one_or_many(parts.collect(), Form::Integer, Gather::Sum { is_write }))
}

pub(super) fn kind<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    described(request, 1, Form::Type)
}

pub(super) fn ttl<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let now_ms = request.node.now_ms();
    described(request, 1, Form::TimeLeft { seconds: true, now_ms })
}

pub(super) fn pttl<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let now_ms = request.node.now_ms();
    described(request, 1, Form::TimeLeft { seconds: false, now_ms })
}

pub(super) fn expiretime<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    described(request, 1, Form::ExpiresAt { seconds: true })
}

pub(super) fn pexpiretime<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    described(request, 1, Form::ExpiresAt { seconds: false })
}

/// A command about the key at `position` that its description answers.
pub(super) fn described<'a>(request: &Request<'a, '_>, position: usize, form: Form) -> Outcome<'a> {
    let (partition, key) = request.key(position)?;
    Ok(Plan::One { partition, command: Command::Describe { key }, form })
}

pub(super) fn rename<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    renamed(request, false, Form::Renamed)
}

pub(super) fn renamenx<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    renamed(request, true, Form::Integer)
}

fn renamed<'a>(request: &Request<'a, '_>, if_absent: bool, form: Form) -> Outcome<'a> {
    let (from, to) = (request.args.at(1), request.args.at(2));
    let partition = request.same_partition([from, to].into_iter())?;
    Ok(Plan::One { partition, command: Command::Rename { from, to, if_absent }, form })
}

pub(super) fn copy<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let mut replace = false;
    let mut options = request.args.from(3).iter();
    while let Some(option) = options.next() {
        if option.eq_ignore_ascii_case(b"REPLACE") {
            replace = true;
        } else if option.eq_ignore_ascii_case(b"DB") {
            if integer(options.next().ok_or(Refusal::SYNTAX)?)? != 0 {
                return Err(match (request.node.cluster)().enabled {
                    true => Refusal::new(
                        "ERR Copying to another database is not allowed in cluster mode",
                    ),
                    false => Refusal::DATABASE,
                });
            }
        } else {
            return Err(Refusal::SYNTAX);
        }
    }
    let (from, to) = (request.args.at(1), request.args.at(2));
    if from == to {
        return Err(Refusal::new("ERR source and destination objects are the same"));
    }
    let partition = request.same_partition([from, to].into_iter())?;
    let command = Command::Copy { from, to, replace };
    Ok(Plan::One { partition, command, form: Form::Integer })
}

pub(super) fn expire<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    expiring(request, true, false)
}

pub(super) fn pexpire<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    expiring(request, false, false)
}

pub(super) fn expireat<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    expiring(request, true, true)
}

pub(super) fn pexpireat<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    expiring(request, false, true)
}

fn expiring<'a>(request: &Request<'a, '_>, seconds: bool, absolute: bool) -> Outcome<'a> {
    let condition = expire_condition(request)?;
    let number = request.integer(2)?;
    let factor = if seconds { 1000 } else { 1 };
    let base = if absolute { 0 } else { request.node.now_ms() as i64 };
    let milliseconds = number.checked_mul(factor);
    let at = milliseconds.and_then(|milliseconds| milliseconds.checked_add(base));
    let (Some(milliseconds), Some(at)) = (milliseconds, at) else {
        return Err(Refusal::expire_time(request.spec));
    };
    let at = match u64::try_from(milliseconds) {
        Ok(milliseconds @ 1..) if !absolute => Expiry::In(milliseconds),
        // A time before the epoch is as past as its first millisecond.
        _ => Expiry::At(at.max(1).unsigned_abs()),
    };
    let (partition, key) = request.key(1)?;
    let command = Command::Expire { key, at, condition };
    Ok(Plan::One { partition, command, form: Form::Integer })
}

fn expire_condition(request: &Request<'_, '_>) -> Result<ExpireCondition, Refusal> {
    let mut condition = ExpireCondition::default();
    for option in request.args.from(3).iter() {
        if option.eq_ignore_ascii_case(b"NX") {
            condition.if_none = true;
        } else if option.eq_ignore_ascii_case(b"XX") {
            condition.if_some = true;
        } else if option.eq_ignore_ascii_case(b"GT") {
            condition.if_later = true;
        } else if option.eq_ignore_ascii_case(b"LT") {
            condition.if_earlier = true;
        } else {
            let option = String::from_utf8_lossy(option);
            return Err(Refusal::new(format!("ERR Unsupported option {option}")));
        }
    }
    let ExpireCondition { if_none, if_some, if_later, if_earlier } = condition;
    if if_none && (if_some || if_later || if_earlier) {
        return Err(Refusal::new(
            "ERR NX and XX, GT or LT options at the same time are not compatible",
        ));
    }
    if if_later && if_earlier {
        return Err(Refusal::new("ERR GT and LT options at the same time are not compatible"));
    }
    Ok(condition)
}

pub(super) fn persist<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(1)?;
    Ok(Plan::One { partition, command: Command::Persist { key }, form: Form::Integer })
}

pub(super) fn keys<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    Ok(Plan::Node(NodeCommand::Keys { pattern: request.args.at(1) }))
}

pub(super) fn random<'a>(_: &mut Request<'a, '_>) -> Outcome<'a> {
    Ok(Plan::Node(NodeCommand::RandomKey))
}

pub(super) fn scan<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let cursor =
        ScanCursor::parse(request.args.at(1)).ok_or_else(|| Refusal::new("ERR invalid cursor"))?;
    let (mut pattern, mut count, mut strings) = (None, 10, true);
    let mut options = request.args.from(2).iter();
    while let Some(option) = options.next() {
        let argument = options.next().ok_or(Refusal::SYNTAX)?;
        if option.eq_ignore_ascii_case(b"MATCH") {
            pattern = Some(argument).filter(|pattern| *pattern != b"*");
        } else if option.eq_ignore_ascii_case(b"COUNT") {
            let number = usize::try_from(integer(argument)?).ok().filter(|count| *count > 0);
            count = number.ok_or(Refusal::SYNTAX)?;
        } else if option.eq_ignore_ascii_case(b"TYPE") {
            strings = argument.eq_ignore_ascii_case(b"string");
        } else {
            return Err(Refusal::SYNTAX);
        }
    }
    if !strings || cursor.partition.0 >= request.node.partitions.count() {
        // Every value is a string, so there is no key of another type; and nothing is past the end.
        write::array(request.out, 2);
        write::bulk(request.out, b"0");
        write::array(request.out, 0);
        return Ok(Plan::Done);
    }
    Ok(Plan::Node(NodeCommand::Scan { cursor, pattern, count }))
}
