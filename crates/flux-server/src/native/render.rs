//! Replies as responses of the native protocol.

use flux_core::{Error, Reply, Value};
use flux_proto::Code;
use flux_proto::native as wire;
use flux_proto::native::{Opcode, Response, StalePosition};

use super::{Form, Gather};
use crate::codes::code_of;

/// Appends a response, or the error that it is too large.
pub(super) fn respond(
    out: &mut Vec<u8>,
    id: u64,
    opcode: Opcode,
    response: &Response<'_>,
    position: Option<StalePosition>,
) {
    if let Err(error) = wire::encode_response_at(out, id, opcode, response, position) {
        wire::encode_error(out, id, opcode as u8, Code::TooLarge, &error.to_string());
    }
}

pub(super) fn value_of(value: &Value) -> wire::Value<'_> {
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
    respond(out, form.id, form.opcode, &response, form.position);
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

pub(super) fn fail(out: &mut Vec<u8>, id: u64, opcode: Opcode, error: &Error) {
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
    respond(out, gather.id, Opcode::BatchGet, &Response::Values(values), gather.position);
}
