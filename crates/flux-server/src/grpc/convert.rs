//! Messages of `flux.kv.v1` as commands, and replies as messages.

use bytes::Bytes;
use flux_core::command::{Guard, TransactionMode};
use flux_core::{Command, Condition, Expiry, PartitionId, Partitions, Reply, Value};
use flux_proto::Code;
use flux_proto::grpc::kv_v1 as wire;
use tonic::Status;

use super::{invalid, status};
use crate::stale::Age;

pub(super) fn found(value: Option<Value>) -> wire::GetResponse {
    let Some(value) = value else { return wire::GetResponse::default() };
    wire::GetResponse {
        found: true,
        value: value.bytes.into(),
        version: value.version,
        expires_at_ms: value.expires_at_ms,
        position: None,
    }
}

pub(super) fn position(age: Age) -> wire::Position {
    wire::Position { revision: age.revision, age_ms: age.age_ms() }
}

pub(super) fn item(key: Bytes, value: Value) -> wire::Item {
    let Value { bytes, version, expires_at_ms } = value;
    wire::Item { key, value: bytes.into(), version, expires_at_ms }
}

pub(super) fn expiry(ttl_ms: Option<u64>, keep_ttl: bool) -> Result<Expiry, Status> {
    match (ttl_ms, keep_ttl) {
        (Some(0), _) => Err(invalid("ttl_ms must be at least 1")),
        (Some(_), true) => Err(invalid("ttl_ms and keep_ttl exclude each other")),
        (Some(ttl_ms), false) => Ok(Expiry::In(ttl_ms)),
        (None, true) => Ok(Expiry::Keep),
        (None, false) => Ok(Expiry::Never),
    }
}

pub(super) fn condition(condition: Option<wire::Condition>) -> Result<Condition, Status> {
    use wire::condition::Kind;
    let Some(condition) = condition else { return Ok(Condition::Always) };
    match condition.kind {
        Some(Kind::Absent(true)) => Ok(Condition::IfAbsent),
        Some(Kind::Present(true)) => Ok(Condition::IfPresent),
        Some(Kind::Version(version)) => Ok(Condition::IfVersion(version)),
        Some(Kind::Absent(false)) => Err(invalid("only_if.absent must be true if it is set")),
        Some(Kind::Present(false)) => Err(invalid("only_if.present must be true if it is set")),
        None => Err(invalid("only_if needs one of absent, present and version")),
    }
}

/// A command with the partition that it is for.
type Placed = (PartitionId, Command<Vec<u8>>);

/// The one transaction of a batch; `None` for an empty batch.
pub(super) fn batch(
    ops: Vec<wire::WriteOp>,
    guards: Vec<wire::Guard>,
    partitions: Partitions,
) -> Result<Option<Placed>, Status> {
    let mut partition = None;
    let mut place = |key: &Bytes| {
        let own = partitions.of(key);
        if *partition.get_or_insert(own) == own {
            return Ok(());
        }
        let message =
            "the keys of a batch must be of one partition; a hash tag keeps them together";
        Err(status(Code::CrossSlot, message))
    };
    let mut checks = Vec::with_capacity(guards.len());
    for guard in guards {
        place(&guard.key)?;
        checks.push(Guard { key: guard.key.into(), version: guard.version });
    }
    let mut commands = Vec::with_capacity(ops.len());
    for (position, op) in ops.into_iter().enumerate() {
        let (key, command) = command(op)
            .map_err(|status| invalid(format!("ops[{position}]: {}", status.message())))?;
        place(&key)?;
        commands.push(command);
    }
    let mode = TransactionMode::AllOrNothing;
    let command = Command::Transaction { guards: checks, commands, mode };
    Ok(partition.map(|partition| (partition, command)))
}

fn command(op: wire::WriteOp) -> Result<(Bytes, Command<Vec<u8>>), Status> {
    use wire::write_op::Op;
    match op.op {
        Some(Op::Set(wire::SetOp { key, value, ttl_ms, keep_ttl, only_if })) => {
            let command = Command::Set {
                key: key.to_vec(),
                value: value.into(),
                expiry: expiry(ttl_ms, keep_ttl)?,
                condition: condition(only_if)?,
                return_previous: false,
            };
            Ok((key, command))
        }
        Some(Op::Delete(wire::DeleteOp { key, only_if })) => {
            let condition = condition(only_if)?;
            Ok((key.clone(), Command::DeleteIf { key: key.into(), condition }))
        }
        Some(Op::Increment(wire::IncrementOp { key, delta })) => {
            let delta = delta.unwrap_or(1);
            Ok((key.clone(), Command::Increment { key: key.into(), delta }))
        }
        None => Err(invalid("needs one of set, delete and increment")),
    }
}

pub(super) fn write_result(reply: &Reply) -> wire::WriteResult {
    match *reply {
        Reply::Written { version } => {
            wire::WriteResult { version: Some(version), ..Default::default() }
        }
        Reply::Counter { value, version } => {
            wire::WriteResult { version: Some(version), value: Some(value), deleted: false }
        }
        Reply::Integer(count) => wire::WriteResult { deleted: count > 0, ..Default::default() },
        _ => wire::WriteResult::default(),
    }
}
