//! The native protocol's requests as commands, and replies as its responses. No sockets.

use flux_core::command::{Guard, TransactionMode};
use flux_core::{Command, Condition, Error, Expiry, PartitionId, Partitions, Reply, Value};
use flux_proto::Code;
use flux_proto::native as wire;
use flux_proto::native::{Opcode, Request, Response};

use crate::clock::unix_ms;
use crate::codes::code_of;
use crate::scan::{self, PageLimits};
use crate::shared::Shared;

/// Keys and values of a page of a scan: well within a frame.
const PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Keys that a page looks at.
const PAGE_LOOKED_AT: usize = 100_000;

/// How a reply is put into a frame.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) id: u64,
    pub(crate) opcode: Opcode,
    /// The opcodes of a batch's writes, whose replies stand in one.
    writes: Vec<Opcode>,
}

/// How the values of several partitions become one reply: where each stands in it.
#[derive(Debug)]
pub(crate) struct Gather {
    pub(crate) id: u64,
    /// For each part the positions of its keys in the request.
    positions: Vec<Vec<usize>>,
    count: usize,
}

/// What a request turns into.
pub(crate) enum Plan<'a> {
    /// Answered already.
    Done,
    One {
        partition: PartitionId,
        command: Command<&'a [u8]>,
        form: Form,
    },
    Many {
        parts: Vec<(PartitionId, Command<&'a [u8]>)>,
        gather: Gather,
    },
    /// A scan, which runs when the connection's earlier writes are done.
    Scan(Scan<'a>),
}

/// A request for a page of keys.
pub(crate) struct Scan<'a> {
    id: u64,
    prefix: &'a [u8],
    cursor: &'a [u8],
    limit: u32,
    keys_only: bool,
}

/// Turns a frame into commands. Errors of one request are answered in `out`.
pub(crate) fn plan<'a>(frame: &wire::Frame<'a>, shared: &Shared, out: &mut Vec<u8>) -> Plan<'a> {
    let (id, opcode) = (frame.header.id, frame.header.opcode);
    let request = match frame.request() {
        Ok(request) => request,
        Err(error) => {
            wire::encode_error(out, id, opcode, error.code(), &error.to_string());
            return Plan::Done;
        }
    };
    let form = Form { id, opcode: request.opcode(), writes: Vec::new() };
    let one = |key: &[u8], command| Plan::One {
        partition: shared.partitions.of(key),
        command,
        form: form.clone(),
    };
    match request {
        Request::Ping { payload } => respond(out, id, Opcode::Ping, &Response::Pong { payload }),
        Request::Auth { .. } => {
            let message = "this node has no users: send no AUTH";
            wire::encode_error(out, id, opcode, Code::Unsupported, message);
        }
        Request::Info => info(id, shared, out),
        Request::Get { key } => return one(key, Command::Get { key }),
        Request::Set { key, value, expiry, condition, return_previous } => {
            let (expiry, condition) = (expiry_of(expiry), condition_of(condition));
            let command = Command::Set { key, value, expiry, condition, return_previous };
            return one(key, command);
        }
        Request::Delete { key, condition } => {
            let condition = condition_of(condition);
            return one(key, Command::DeleteIf { key, condition });
        }
        Request::Increment { key, delta } => return one(key, Command::Increment { key, delta }),
        Request::Expire { key, expiry } => {
            let (at, condition) = (expiry_of(expiry), Default::default());
            return one(key, Command::Expire { key, at, condition });
        }
        Request::Persist { key } => return one(key, Command::Persist { key }),
        Request::BatchGet { keys } => return batch_get(id, &keys, shared.partitions),
        Request::BatchWrite { guards, writes } => {
            return batch_write(form, &guards, &writes, shared.partitions, out);
        }
        // Scans of one partition are not among the features that this node grants.
        Request::Scan { prefix, cursor, limit, keys_only, partition: None } => {
            return Plan::Scan(Scan { id, prefix, cursor, limit, keys_only });
        }
        Request::Scan { .. } => {
            let message = "this node scans all partitions or none";
            wire::encode_error(out, id, opcode, Code::Unsupported, message);
        }
    }
    Plan::Done
}

fn respond(out: &mut Vec<u8>, id: u64, opcode: Opcode, response: &Response<'_>) {
    if let Err(error) = wire::encode_response(out, id, opcode, response) {
        wire::encode_error(out, id, opcode as u8, Code::TooLarge, &error.to_string());
    }
}

fn info(id: u64, shared: &Shared, out: &mut Vec<u8>) {
    let data_addr = shared.data_addr.to_string();
    let info = wire::Info {
        node: &shared.node_id,
        server_version: env!("CARGO_PKG_VERSION"),
        members: vec![wire::Member { name: &shared.node_id, data_addr: &data_addr, zone: "" }],
        leaders: vec![Some(0); usize::from(shared.partitions.count())],
        epoch: 0,
        replicas: Vec::new(),
    };
    respond(out, id, Opcode::Info, &Response::Info(info));
}

fn batch_get<'a>(id: u64, keys: &[&'a [u8]], partitions: Partitions) -> Plan<'a> {
    let mut parts: Vec<(PartitionId, Vec<&[u8]>)> = Vec::new();
    let mut places = vec![None; usize::from(partitions.count())];
    let mut positions: Vec<Vec<usize>> = Vec::new();
    for (position, &key) in keys.iter().enumerate() {
        let partition = partitions.of(key);
        let place = *places[usize::from(partition.0)].get_or_insert_with(|| {
            parts.push((partition, Vec::new()));
            positions.push(Vec::new());
            parts.len() - 1
        });
        parts[place].1.push(key);
        positions[place].push(position);
    }
    let get = |(partition, keys)| (partition, Command::GetMany { keys });
    let gather = Gather { id, positions, count: keys.len() };
    Plan::Many { parts: parts.into_iter().map(get).collect(), gather }
}

fn batch_write<'a>(
    mut form: Form,
    guards: &[wire::Guard<'a>],
    writes: &[wire::Write<'a>],
    partitions: Partitions,
    out: &mut Vec<u8>,
) -> Plan<'a> {
    let key_of = |write: &wire::Write<'a>| match *write {
        wire::Write::Set { key, .. }
        | wire::Write::Delete { key, .. }
        | wire::Write::Increment { key, .. } => key,
    };
    let mut keys = guards.iter().map(|guard| guard.key).chain(writes.iter().map(key_of));
    let Some(first) = keys.next() else {
        respond(out, form.id, form.opcode, &Response::Batch(wire::BatchReply::Written(vec![])));
        return Plan::Done;
    };
    let partition = partitions.of(first);
    if keys.any(|key| partitions.of(key) != partition) {
        let message =
            "the keys of a batch must be of one partition; a hash tag keeps them together";
        wire::encode_error(out, form.id, form.opcode as u8, Code::CrossSlot, message);
        return Plan::Done;
    }
    form.writes = writes.iter().map(opcode_of).collect();
    let guard = |guard: &wire::Guard<'a>| Guard { key: guard.key, version: guard.version };
    let command = Command::Transaction {
        guards: guards.iter().map(guard).collect(),
        commands: writes.iter().map(command_of).collect(),
        mode: TransactionMode::AllOrNothing,
    };
    Plan::One { partition, command, form }
}

fn opcode_of(write: &wire::Write<'_>) -> Opcode {
    match write {
        wire::Write::Set { .. } => Opcode::Set,
        wire::Write::Delete { .. } => Opcode::Delete,
        wire::Write::Increment { .. } => Opcode::Increment,
    }
}

fn command_of<'a>(write: &wire::Write<'a>) -> Command<&'a [u8]> {
    match *write {
        wire::Write::Set { key, value, expiry, condition } => Command::Set {
            key,
            value,
            expiry: expiry_of(expiry),
            condition: condition_of(condition),
            return_previous: false,
        },
        wire::Write::Delete { key, condition } => {
            Command::DeleteIf { key, condition: condition_of(condition) }
        }
        wire::Write::Increment { key, delta } => Command::Increment { key, delta },
    }
}

fn expiry_of(expiry: wire::Expiry) -> Expiry {
    match expiry {
        wire::Expiry::Never => Expiry::Never,
        wire::Expiry::Keep => Expiry::Keep,
        wire::Expiry::In(ttl_ms) => Expiry::In(ttl_ms),
        wire::Expiry::At(expires_at_ms) => Expiry::At(expires_at_ms),
    }
}

fn condition_of(condition: wire::Condition) -> Condition {
    match condition {
        wire::Condition::Always => Condition::Always,
        wire::Condition::IfAbsent => Condition::IfAbsent,
        wire::Condition::IfPresent => Condition::IfPresent,
        wire::Condition::IfVersion(version) => Condition::IfVersion(version),
    }
}

fn value_of(value: &Value) -> wire::Value<'_> {
    wire::Value { bytes: &value.bytes, version: value.version, expires_at_ms: value.expires_at_ms }
}

/// Appends the response for a reply.
pub(crate) fn render(form: &Form, reply: &Reply, out: &mut Vec<u8>) {
    let response = match reply {
        Reply::Error(error) => return fail(out, form.id, form.opcode, error),
        Reply::Value(value) => Response::Value(value.as_ref().map(value_of)),
        Reply::Written { version } => set_reply(true, Some(*version), None),
        Reply::NotWritten { version } if form.opcode == Opcode::Delete => {
            Response::Deleted(wire::DeleteReply::Conflict(*version))
        }
        Reply::NotWritten { version } => set_reply(false, Some(*version), None),
        Reply::Previous { previous, written } => set_reply(*written, None, previous.as_ref()),
        Reply::Integer(count) if form.opcode == Opcode::Delete => {
            let deleted = wire::DeleteReply::Deleted;
            Response::Deleted(if *count > 0 { deleted } else { wire::DeleteReply::Absent })
        }
        Reply::Integer(count) => Response::Changed(*count > 0),
        Reply::Counter { value, version } => Response::Counter { value: *value, version: *version },
        Reply::Many(replies) => {
            let results =
                form.writes.iter().zip(replies).map(|(opcode, reply)| result_of(*opcode, reply));
            Response::Batch(wire::BatchReply::Written(results.collect()))
        }
        Reply::Aborted { position } => {
            let position = position.map(|position| position as u32);
            Response::Batch(wire::BatchReply::NotWritten { position })
        }
        // No request of this protocol asks for any other reply.
        other => {
            let message = format!("no response for {other:?}");
            wire::encode_error(out, form.id, form.opcode as u8, Code::Internal, &message);
            return;
        }
    };
    respond(out, form.id, form.opcode, &response);
}

fn set_reply(written: bool, version: Option<u64>, previous: Option<&Value>) -> Response<'_> {
    Response::Set(wire::SetReply { written, version, previous: previous.map(value_of) })
}

fn result_of(opcode: Opcode, reply: &Reply) -> wire::WriteResult {
    match (opcode, reply) {
        (Opcode::Delete, reply) => {
            wire::WriteResult::Delete { deleted: *reply == Reply::Integer(1) }
        }
        (_, &Reply::Counter { value, version }) => wire::WriteResult::Increment { value, version },
        (_, &Reply::Written { version }) => wire::WriteResult::Set { version },
        (_, _) => wire::WriteResult::Set { version: 0 },
    }
}

fn fail(out: &mut Vec<u8>, id: u64, opcode: Opcode, error: &Error) {
    wire::encode_error(out, id, opcode as u8, code_of(error), &error.to_string());
}

/// Appends the response of a batch of reads. The first error of a part is the whole answer.
pub(crate) fn render_gathered(gather: &Gather, replies: &[Reply], out: &mut Vec<u8>) {
    let mut values = vec![None; gather.count];
    for (reply, positions) in replies.iter().zip(&gather.positions) {
        match reply {
            Reply::Values(found) => {
                for (&position, value) in positions.iter().zip(found) {
                    values[position] = value.as_ref().map(value_of);
                }
            }
            Reply::Error(error) => return fail(out, gather.id, Opcode::BatchGet, error),
            other => {
                let message = format!("no response for {other:?}");
                let opcode = Opcode::BatchGet as u8;
                return wire::encode_error(out, gather.id, opcode, Code::Internal, &message);
            }
        }
    }
    respond(out, gather.id, Opcode::BatchGet, &Response::Values(values));
}

/// Runs a scan and appends its page.
pub(crate) fn scan(shared: &Shared, request: &Scan<'_>, out: &mut Vec<u8>) {
    let &Scan { id, prefix, cursor, limit, keys_only } = request;
    let Some(cursor) = scan::cursor_from_bytes(cursor, shared.partitions.count()) else {
        let message = "the cursor is not one that this node gave";
        let opcode = Opcode::Scan as u8;
        return wire::encode_error(out, id, opcode, Code::InvalidArgument, message);
    };
    let limits =
        PageLimits { matches: limit as usize, bytes: PAGE_BYTES, looked_at: PAGE_LOOKED_AT };
    let mut found: Vec<(Vec<u8>, Value)> = Vec::new();
    let next = scan::page(shared, cursor, prefix, limits, unix_ms(), |entry| {
        let bytes = if keys_only { Vec::new() } else { entry.value.to_vec() };
        let (version, expires_at_ms) = (entry.version, entry.expires_at_ms);
        found.push((entry.key.to_vec(), Value { bytes, version, expires_at_ms }));
    });
    match next {
        Ok(next) => {
            let cursor = scan::cursor_to_bytes(next);
            let item = |(key, value)| wire::Item { key, value: value_of(value) };
            let items = found.iter().map(|(key, value)| item((key, value))).collect();
            respond(out, id, Opcode::Scan, &Response::Page(wire::Page { cursor: &cursor, items }));
        }
        Err(error) => fail(out, id, Opcode::Scan, &error),
    }
}

/// The answer to a preface.
pub(crate) fn accept(preface: &wire::Preface, shared: &Shared, out: &mut Vec<u8>) -> bool {
    let Some(version) = preface.choose_version() else {
        wire::encode_server_preface(out, &wire::ServerPreface::VERSION_MISMATCH);
        return false;
    };
    let accepted = wire::Accepted {
        version,
        flags: 0,
        max_frame_bytes: wire::MAX_FRAME_BYTES as u32,
        max_key_bytes: wire::MAX_KEY_BYTES as u32,
        max_value_bytes: wire::MAX_VALUE_BYTES as u32,
        partitions: shared.partitions.count(),
        node: &shared.node_id,
    };
    wire::encode_server_preface(out, &wire::ServerPreface::Accepted(accepted));
    true
}
