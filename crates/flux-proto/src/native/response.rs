//! What a server answers, and how it lies in a response's body.

use bytes::BufMut;

use super::MAX_BATCH;
use super::body::{BodyError, Reader, put_bytes, put_count};
use super::info::{Info, LeaderHint};
use super::request::Opcode;
use crate::Code;

const WRITTEN: u8 = 1;
const VERSION_KNOWN: u8 = 2;
const HAS_PREVIOUS: u8 = 4;

/// The position of a failed operation where it was a guard that did not hold.
const NO_POSITION: u32 = u32::MAX;

/// One answer, borrowing the bytes it was decoded from or is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response<'a> {
    /// To a ping: its bytes.
    Pong {
        /// The same bytes.
        payload: &'a [u8],
    },
    /// The connection is authenticated.
    Authenticated,
    /// The node, and who leads the partitions.
    Info(Info<'a>),
    /// A key's value, if it is there.
    Value(Option<Value<'a>>),
    /// Whether a value was written.
    Set(SetReply<'a>),
    /// Whether a key was removed.
    Deleted(DeleteReply),
    /// A number after it was added to.
    Counter {
        /// The sum.
        value: i64,
        /// The key's version.
        version: u64,
    },
    /// Whether a key's expiry was set or removed.
    Changed(bool),
    /// The values of keys, in the order asked.
    Values(Vec<Option<Value<'a>>>),
    /// What became of a batch of writes.
    Batch(BatchReply),
    /// A page of keys.
    Page(Page<'a>),
}

/// An error that the server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure<'a> {
    /// The number of its code, not 0; servers of later versions may have new ones.
    pub status: u16,
    /// What is wrong, for a person to read.
    pub message: &'a str,
    /// With `NOT_LEADER`: who leads, where the server tells.
    pub leader: Option<LeaderHint<'a>>,
}

impl<'a> Failure<'a> {
    /// Servers may add fields at the end. A hint that cannot be understood is none: the error itself
    /// is what matters.
    pub(super) fn decode(status: u16, body: &'a [u8]) -> Result<Failure<'a>, BodyError> {
        let mut reader = Reader::new(body);
        let message = reader.text("message")?;
        let has_hint = status == Code::NotLeader.number();
        let leader = if has_hint { LeaderHint::decode(&mut reader).ok() } else { None };
        Ok(Failure { status, message, leader })
    }

    /// The code. One that is not known here is a defect of the server as far as a client can tell.
    pub fn code(&self) -> Code {
        Code::try_from(self.status).unwrap_or(Code::Internal)
    }
}

/// A value with what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value<'a> {
    /// The value.
    pub bytes: &'a [u8],
    /// The revision that wrote it.
    pub version: u64,
    /// When the key expires, in milliseconds since the Unix epoch; not 0.
    pub expires_at_ms: Option<u64>,
}

/// The answer to a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetReply<'a> {
    /// Whether the condition held and the value was written.
    pub written: bool,
    /// The key's version now: that of this write, or the one that the condition met, 0 for absent.
    /// May be unknown where the previous value was asked for.
    pub version: Option<u64>,
    /// The value before, where it was asked for and there was one.
    pub previous: Option<Value<'a>>,
}

/// The answer to a delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteReply {
    /// There was no key.
    Absent,
    /// The key was removed.
    Deleted,
    /// The condition did not hold; the key has this version, 0 for absent.
    Conflict(u64),
}

/// The answer to a batch of writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchReply {
    /// Everything was written; one result for each write, in order.
    Written(Vec<WriteResult>),
    /// Nothing was written: the condition of the write at this position did not hold, or a guard.
    NotWritten {
        /// The position of the write from 0; none where it was a guard.
        position: Option<u32>,
    },
}

/// What one write of a batch did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteResult {
    /// A set: the key's new version.
    Set {
        /// The new version.
        version: u64,
    },
    /// A delete: whether there was a key.
    Delete {
        /// Whether there was one.
        deleted: bool,
    },
    /// An increment.
    Increment {
        /// The sum.
        value: i64,
        /// The new version.
        version: u64,
    },
}

/// A page of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<'a> {
    /// For the next page; empty where this was the last.
    pub cursor: &'a [u8],
    /// The keys; may be none though more pages follow.
    pub items: Vec<Item<'a>>,
}

/// A key of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// The key.
    pub key: &'a [u8],
    /// What is stored; the bytes are empty where only keys were asked for.
    pub value: Value<'a>,
}

impl<'a> Response<'a> {
    pub(super) fn decode(opcode: Opcode, body: &'a [u8]) -> Result<Response<'a>, BodyError> {
        let mut reader = Reader::new(body);
        let response = match opcode {
            Opcode::Ping => Response::Pong { payload: reader.remainder() },
            Opcode::Auth => Response::Authenticated,
            // Servers may add fields to this one.
            Opcode::Info => return Info::decode(&mut reader).map(Response::Info),
            Opcode::Get => Response::Value(found(&mut reader)?),
            Opcode::Set => Response::Set(set_reply(&mut reader)?),
            Opcode::Delete => Response::Deleted(delete_reply(&mut reader)?),
            Opcode::Increment => {
                let value = reader.i64("sum")?;
                Response::Counter { value, version: reader.u64("version")? }
            }
            Opcode::Expire | Opcode::Persist => Response::Changed(reader.boolean("changed")?),
            Opcode::BatchGet => Response::Values(reader.list("values", MAX_BATCH, 1, found)?),
            Opcode::BatchWrite => Response::Batch(batch_reply(&mut reader)?),
            Opcode::Scan => {
                let cursor = reader.bytes("cursor")?;
                let items = reader.list("items", MAX_BATCH, 25, item)?;
                Response::Page(Page { cursor, items })
            }
        };
        reader.finish()?;
        Ok(response)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Response::Pong { payload } => out.extend_from_slice(payload),
            Response::Authenticated => {}
            Response::Info(info) => info.encode(out),
            Response::Value(value) => put_found(out, value.as_ref()),
            Response::Set(reply) => {
                let mut bits = if reply.written { WRITTEN } else { 0 };
                bits |= if reply.version.is_some() { VERSION_KNOWN } else { 0 };
                bits |= if reply.previous.is_some() { HAS_PREVIOUS } else { 0 };
                out.put_u8(bits);
                out.put_u64_le(reply.version.unwrap_or(0));
                if let Some(previous) = &reply.previous {
                    put_value(out, previous);
                }
            }
            Response::Deleted(reply) => {
                let (outcome, version) = match reply {
                    DeleteReply::Absent => (0, 0),
                    DeleteReply::Deleted => (1, 0),
                    DeleteReply::Conflict(version) => (2, *version),
                };
                out.put_u8(outcome);
                out.put_u64_le(version);
            }
            Response::Counter { value, version } => {
                out.put_i64_le(*value);
                out.put_u64_le(*version);
            }
            Response::Changed(changed) => out.put_u8(u8::from(*changed)),
            Response::Values(values) => {
                put_count(out, values.len());
                for value in values {
                    put_found(out, value.as_ref());
                }
            }
            Response::Batch(reply) => put_batch(out, reply),
            Response::Page(page) => {
                put_bytes(out, page.cursor);
                put_count(out, page.items.len());
                for item in &page.items {
                    put_bytes(out, item.key);
                    put_value(out, &item.value);
                }
            }
        }
    }
}

fn value<'a>(reader: &mut Reader<'a>) -> Result<Value<'a>, BodyError> {
    let version = reader.u64("version")?;
    let expires_at_ms = reader.expires_at_ms()?;
    Ok(Value { bytes: reader.bytes("value")?, version, expires_at_ms })
}

fn put_value(out: &mut Vec<u8>, value: &Value<'_>) {
    out.put_u64_le(value.version);
    out.put_u64_le(value.expires_at_ms.unwrap_or(0));
    put_bytes(out, value.bytes);
}

fn found<'a>(reader: &mut Reader<'a>) -> Result<Option<Value<'a>>, BodyError> {
    if reader.boolean("found")? { value(reader).map(Some) } else { Ok(None) }
}

fn put_found(out: &mut Vec<u8>, value: Option<&Value<'_>>) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put_value(out, value);
    }
}

fn item<'a>(reader: &mut Reader<'a>) -> Result<Item<'a>, BodyError> {
    Ok(Item { key: reader.key()?, value: value(reader)? })
}

fn set_reply<'a>(reader: &mut Reader<'a>) -> Result<SetReply<'a>, BodyError> {
    let bits = reader.bits("outcome", WRITTEN | VERSION_KNOWN | HAS_PREVIOUS)?;
    let version = reader.u64("version")?;
    let previous = if bits & HAS_PREVIOUS != 0 { Some(value(reader)?) } else { None };
    Ok(SetReply {
        written: bits & WRITTEN != 0,
        version: (bits & VERSION_KNOWN != 0).then_some(version),
        previous,
    })
}

fn delete_reply(reader: &mut Reader<'_>) -> Result<DeleteReply, BodyError> {
    let outcome = reader.u8("outcome")?;
    let version = reader.u64("version")?;
    match outcome {
        0 => Ok(DeleteReply::Absent),
        1 => Ok(DeleteReply::Deleted),
        2 => Ok(DeleteReply::Conflict(version)),
        _ => Err(BodyError::Invalid { field: "outcome", value: u64::from(outcome) }),
    }
}

fn batch_reply(reader: &mut Reader<'_>) -> Result<BatchReply, BodyError> {
    if !reader.boolean("written")? {
        let position = reader.u32("position")?;
        let position = (position != NO_POSITION).then_some(position);
        return Ok(BatchReply::NotWritten { position });
    }
    reader.list("results", MAX_BATCH, 2, write_result).map(BatchReply::Written)
}

fn write_result(reader: &mut Reader<'_>) -> Result<WriteResult, BodyError> {
    let kind = reader.u8("kind")?;
    Ok(match Opcode::try_from(kind) {
        Ok(Opcode::Set) => WriteResult::Set { version: reader.u64("version")? },
        Ok(Opcode::Delete) => WriteResult::Delete { deleted: reader.boolean("deleted")? },
        Ok(Opcode::Increment) => {
            let value = reader.i64("sum")?;
            WriteResult::Increment { value, version: reader.u64("version")? }
        }
        _ => {
            return Err(BodyError::Invalid { field: "kind", value: u64::from(kind) });
        }
    })
}

fn put_batch(out: &mut Vec<u8>, reply: &BatchReply) {
    let results = match reply {
        BatchReply::NotWritten { position } => {
            out.put_u8(0);
            out.put_u32_le(position.unwrap_or(NO_POSITION));
            return;
        }
        BatchReply::Written(results) => results,
    };
    out.put_u8(1);
    put_count(out, results.len());
    for result in results {
        match *result {
            WriteResult::Set { version } => {
                out.put_u8(Opcode::Set as u8);
                out.put_u64_le(version);
            }
            WriteResult::Delete { deleted } => {
                out.put_u8(Opcode::Delete as u8);
                out.put_u8(u8::from(deleted));
            }
            WriteResult::Increment { value, version } => {
                out.put_u8(Opcode::Increment as u8);
                out.put_i64_le(value);
                out.put_u64_le(version);
            }
        }
    }
}
