//! What a client asks, and how it lies in a request's body.

use bytes::BufMut;

use super::body::{BodyError, Reader, put_bytes, put_count};
use super::{DEFAULT_SCAN_LIMIT, MAX_BATCH, MAX_SCAN_LIMIT};

/// Options of a scan.
const KEYS_ONLY: u8 = 1;
const ONE_PARTITION: u8 = 2;

/// The operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Answers what it was sent.
    Ping = 1,
    /// Authenticates the connection.
    Auth = 2,
    /// Describes the node and who leads the partitions.
    Info = 3,
    /// Reads a key.
    Get = 16,
    /// Writes a key.
    Set = 17,
    /// Removes a key.
    Delete = 18,
    /// Adds to a number.
    Increment = 19,
    /// Sets when a key expires.
    Expire = 20,
    /// Removes a key's expiry.
    Persist = 21,
    /// Reads keys of any partitions.
    BatchGet = 32,
    /// Writes keys of one partition, all or none.
    BatchWrite = 33,
    /// Lists keys, a page at a time.
    Scan = 34,
}

impl TryFrom<u8> for Opcode {
    type Error = BodyError;

    fn try_from(opcode: u8) -> Result<Opcode, BodyError> {
        Ok(match opcode {
            1 => Opcode::Ping,
            2 => Opcode::Auth,
            3 => Opcode::Info,
            16 => Opcode::Get,
            17 => Opcode::Set,
            18 => Opcode::Delete,
            19 => Opcode::Increment,
            20 => Opcode::Expire,
            21 => Opcode::Persist,
            32 => Opcode::BatchGet,
            33 => Opcode::BatchWrite,
            34 => Opcode::Scan,
            unknown => return Err(BodyError::UnknownOpcode(unknown)),
        })
    }
}

impl Opcode {
    /// Whether the operation can change data, so that sending it twice may differ from once.
    pub fn is_write(self) -> bool {
        matches!(
            self,
            Opcode::Set
                | Opcode::Delete
                | Opcode::Increment
                | Opcode::Expire
                | Opcode::Persist
                | Opcode::BatchWrite
        )
    }
}

/// One request, borrowing the bytes it was decoded from. Keys and values are within their limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Answered by `Response::Pong` with the same bytes.
    Ping {
        /// Any bytes.
        payload: &'a [u8],
    },
    /// Answered by `Response::Authenticated`.
    Auth {
        /// The user's name; empty for the default user.
        user: &'a str,
        /// The user's password.
        password: &'a [u8],
    },
    /// Answered by `Response::Info`.
    Info,
    /// Answered by `Response::Value`.
    Get {
        /// The key to read.
        key: &'a [u8],
    },
    /// Answered by `Response::Set`.
    Set {
        /// The key to write.
        key: &'a [u8],
        /// Its new value.
        value: &'a [u8],
        /// What becomes of its expiry.
        expiry: Expiry,
        /// When the write applies.
        condition: Condition,
        /// Also answer the value before.
        return_previous: bool,
    },
    /// Answered by `Response::Deleted`.
    Delete {
        /// The key to remove.
        key: &'a [u8],
        /// When the removal applies.
        condition: Condition,
    },
    /// Answered by `Response::Counter`.
    Increment {
        /// The key of a number in decimal text; absent counts as 0.
        key: &'a [u8],
        /// What to add.
        delta: i64,
    },
    /// Answered by `Response::Changed`.
    Expire {
        /// The key.
        key: &'a [u8],
        /// `Expiry::In` or `Expiry::At`.
        expiry: Expiry,
    },
    /// Answered by `Response::Changed`.
    Persist {
        /// The key.
        key: &'a [u8],
    },
    /// Answered by `Response::Values`, in the order asked.
    BatchGet {
        /// The keys to read.
        keys: Vec<&'a [u8]>,
    },
    /// Answered by `Response::Batch`.
    BatchWrite {
        /// What must hold for any write to apply.
        guards: Vec<Guard<'a>>,
        /// Applied in order; a later one sees the earlier ones.
        writes: Vec<Write<'a>>,
    },
    /// Answered by `Response::Page`.
    Scan {
        /// Only keys that start with this; may be empty.
        prefix: &'a [u8],
        /// Empty for the first page, then what the page before said.
        cursor: &'a [u8],
        /// About how many keys, 1 to [`MAX_SCAN_LIMIT`]; 0 is decoded as [`DEFAULT_SCAN_LIMIT`].
        limit: u32,
        /// Leave values out.
        keys_only: bool,
        /// Only this partition; its cursors are good at any of its replicas.
        partition: Option<u16>,
    },
}

/// One write of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write<'a> {
    /// Writes a key.
    Set {
        /// The key to write.
        key: &'a [u8],
        /// Its new value.
        value: &'a [u8],
        /// What becomes of its expiry.
        expiry: Expiry,
        /// When the whole batch applies.
        condition: Condition,
    },
    /// Removes a key.
    Delete {
        /// The key to remove.
        key: &'a [u8],
        /// When the whole batch applies.
        condition: Condition,
    },
    /// Adds to a number.
    Increment {
        /// The key of a number in decimal text; absent counts as 0.
        key: &'a [u8],
        /// What to add.
        delta: i64,
    },
}

/// A precondition of a batch: a key that still has the version that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard<'a> {
    /// The key; the batch need not write it.
    pub key: &'a [u8],
    /// The version it must have; 0 for absent.
    pub version: u64,
}

/// What a write does to a key's expiry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expiry {
    /// The key does not expire.
    #[default]
    Never,
    /// As it was.
    Keep,
    /// So many milliseconds from now; at least 1.
    In(u64),
    /// At this time, in milliseconds since the Unix epoch.
    At(u64),
}

/// When a write applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// In any case.
    #[default]
    Always,
    /// Only if the key is absent.
    IfAbsent,
    /// Only if the key is there.
    IfPresent,
    /// Only if the key has this version; 0 means absent.
    IfVersion(u64),
}

impl<'a> Request<'a> {
    /// The operation.
    pub fn opcode(&self) -> Opcode {
        match self {
            Request::Ping { .. } => Opcode::Ping,
            Request::Auth { .. } => Opcode::Auth,
            Request::Info => Opcode::Info,
            Request::Get { .. } => Opcode::Get,
            Request::Set { .. } => Opcode::Set,
            Request::Delete { .. } => Opcode::Delete,
            Request::Increment { .. } => Opcode::Increment,
            Request::Expire { .. } => Opcode::Expire,
            Request::Persist { .. } => Opcode::Persist,
            Request::BatchGet { .. } => Opcode::BatchGet,
            Request::BatchWrite { .. } => Opcode::BatchWrite,
            Request::Scan { .. } => Opcode::Scan,
        }
    }

    pub(super) fn decode(opcode: Opcode, body: &'a [u8]) -> Result<Request<'a>, BodyError> {
        let mut reader = Reader::new(body);
        let request = match opcode {
            Opcode::Ping => Request::Ping { payload: reader.remainder() },
            Opcode::Auth => {
                Request::Auth { user: reader.text("user")?, password: reader.bytes("password")? }
            }
            Opcode::Info => Request::Info,
            Opcode::Get => Request::Get { key: reader.key()? },
            Opcode::Set => {
                let return_previous = reader.boolean("options")?;
                let (expiry, condition) = (expiry(&mut reader)?, condition(&mut reader)?);
                let (key, value) = (reader.key()?, reader.value()?);
                Request::Set { key, value, expiry, condition, return_previous }
            }
            Opcode::Delete => {
                let condition = condition(&mut reader)?;
                Request::Delete { key: reader.key()?, condition }
            }
            Opcode::Increment => {
                let delta = reader.i64("delta")?;
                Request::Increment { key: reader.key()?, delta }
            }
            Opcode::Expire => {
                let expiry = expiry(&mut reader)?;
                if !matches!(expiry, Expiry::In(_) | Expiry::At(_)) {
                    let value = u64::from(expiry == Expiry::Keep);
                    return Err(BodyError::Invalid { field: "expiry", value });
                }
                Request::Expire { key: reader.key()?, expiry }
            }
            Opcode::Persist => Request::Persist { key: reader.key()? },
            Opcode::BatchGet => {
                Request::BatchGet { keys: reader.list("keys", MAX_BATCH, 5, Reader::key)? }
            }
            Opcode::BatchWrite => Request::BatchWrite {
                guards: reader.list("guards", MAX_BATCH, 13, guard)?,
                writes: reader.list("writes", MAX_BATCH, 7, write)?,
            },
            Opcode::Scan => {
                let options = reader.bits("options", KEYS_ONLY | ONE_PARTITION)?;
                let one = options & ONE_PARTITION != 0;
                let partition = if one { Some(reader.u16("partition")?) } else { None };
                let limit = scan_limit(reader.u32("limit")?)?;
                let (prefix, cursor) = (reader.bytes("prefix")?, reader.bytes("cursor")?);
                let keys_only = options & KEYS_ONLY != 0;
                Request::Scan { prefix, cursor, limit, keys_only, partition }
            }
        };
        reader.finish()?;
        Ok(request)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Request::Ping { payload } => out.extend_from_slice(payload),
            Request::Auth { user, password } => {
                put_bytes(out, user.as_bytes());
                put_bytes(out, password);
            }
            Request::Info => {}
            Request::Get { key } | Request::Persist { key } => put_bytes(out, key),
            Request::Set { key, value, expiry, condition, return_previous } => {
                out.put_u8(u8::from(*return_previous));
                put_set(out, key, value, *expiry, *condition);
            }
            Request::Delete { key, condition } => {
                put_condition(out, *condition);
                put_bytes(out, key);
            }
            Request::Increment { key, delta } => {
                out.put_i64_le(*delta);
                put_bytes(out, key);
            }
            Request::Expire { key, expiry } => {
                put_expiry(out, *expiry);
                put_bytes(out, key);
            }
            Request::BatchGet { keys } => {
                put_count(out, keys.len());
                for key in keys {
                    put_bytes(out, key);
                }
            }
            Request::BatchWrite { guards, writes } => {
                put_count(out, guards.len());
                for guard in guards {
                    out.put_u64_le(guard.version);
                    put_bytes(out, guard.key);
                }
                put_count(out, writes.len());
                for write in writes {
                    put_write(out, write);
                }
            }
            Request::Scan { prefix, cursor, limit, keys_only, partition } => {
                let keys_only = if *keys_only { KEYS_ONLY } else { 0 };
                out.put_u8(keys_only | if partition.is_some() { ONE_PARTITION } else { 0 });
                if let Some(partition) = partition {
                    out.put_u16_le(*partition);
                }
                out.put_u32_le(*limit);
                put_bytes(out, prefix);
                put_bytes(out, cursor);
            }
        }
    }
}

fn scan_limit(limit: u32) -> Result<u32, BodyError> {
    match limit {
        0 => Ok(DEFAULT_SCAN_LIMIT),
        1..=MAX_SCAN_LIMIT => Ok(limit),
        _ => Err(BodyError::Invalid { field: "limit", value: u64::from(limit) }),
    }
}

fn expiry(reader: &mut Reader<'_>) -> Result<Expiry, BodyError> {
    Ok(match reader.u8("expiry")? {
        0 => Expiry::Never,
        1 => Expiry::Keep,
        2 => match reader.u64("ttl_ms")? {
            0 => {
                return Err(BodyError::Invalid { field: "ttl_ms", value: 0 });
            }
            ttl_ms => Expiry::In(ttl_ms),
        },
        3 => Expiry::At(reader.u64("expires_at_ms")?),
        kind => {
            return Err(BodyError::Invalid { field: "expiry", value: u64::from(kind) });
        }
    })
}

fn condition(reader: &mut Reader<'_>) -> Result<Condition, BodyError> {
    Ok(match reader.u8("condition")? {
        0 => Condition::Always,
        1 => Condition::IfAbsent,
        2 => Condition::IfPresent,
        3 => Condition::IfVersion(reader.u64("version")?),
        kind => {
            return Err(BodyError::Invalid { field: "condition", value: u64::from(kind) });
        }
    })
}

fn guard<'a>(reader: &mut Reader<'a>) -> Result<Guard<'a>, BodyError> {
    let version = reader.u64("version")?;
    Ok(Guard { key: reader.key()?, version })
}

fn write<'a>(reader: &mut Reader<'a>) -> Result<Write<'a>, BodyError> {
    let kind = reader.u8("kind")?;
    Ok(match Opcode::try_from(kind) {
        Ok(Opcode::Set) => {
            let (expiry, condition) = (expiry(reader)?, condition(reader)?);
            Write::Set { key: reader.key()?, value: reader.value()?, expiry, condition }
        }
        Ok(Opcode::Delete) => {
            let condition = condition(reader)?;
            Write::Delete { key: reader.key()?, condition }
        }
        Ok(Opcode::Increment) => {
            let delta = reader.i64("delta")?;
            Write::Increment { key: reader.key()?, delta }
        }
        _ => {
            return Err(BodyError::Invalid { field: "kind", value: u64::from(kind) });
        }
    })
}

fn put_write(out: &mut Vec<u8>, write: &Write<'_>) {
    match write {
        Write::Set { key, value, expiry, condition } => {
            out.put_u8(Opcode::Set as u8);
            put_set(out, key, value, *expiry, *condition);
        }
        Write::Delete { key, condition } => {
            out.put_u8(Opcode::Delete as u8);
            put_condition(out, *condition);
            put_bytes(out, key);
        }
        Write::Increment { key, delta } => {
            out.put_u8(Opcode::Increment as u8);
            out.put_i64_le(*delta);
            put_bytes(out, key);
        }
    }
}

fn put_set(out: &mut Vec<u8>, key: &[u8], value: &[u8], expiry: Expiry, condition: Condition) {
    put_expiry(out, expiry);
    put_condition(out, condition);
    put_bytes(out, key);
    put_bytes(out, value);
}

fn put_expiry(out: &mut Vec<u8>, expiry: Expiry) {
    match expiry {
        Expiry::Never => out.put_u8(0),
        Expiry::Keep => out.put_u8(1),
        Expiry::In(ttl_ms) => {
            out.put_u8(2);
            out.put_u64_le(ttl_ms);
        }
        Expiry::At(at_ms) => {
            out.put_u8(3);
            out.put_u64_le(at_ms);
        }
    }
}

fn put_condition(out: &mut Vec<u8>, condition: Condition) {
    match condition {
        Condition::Always => out.put_u8(0),
        Condition::IfAbsent => out.put_u8(1),
        Condition::IfPresent => out.put_u8(2),
        Condition::IfVersion(version) => {
            out.put_u8(3);
            out.put_u64_le(version);
        }
    }
}
