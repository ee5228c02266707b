//! Reading and writing the fields of a frame's body.
//!
//! What this module does not do: know which fields a body has.

use bytes::BufMut;

use super::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crate::Code;

/// Why a body is not what its opcode asks for. The frame around it is intact, so the connection can
/// go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// No operation of this protocol version has this opcode.
    #[error("opcode {0} is not known")]
    UnknownOpcode(u8),
    /// The header has flags that this protocol version does not define.
    #[error("header flags {0:#04x} are not known")]
    UnknownFlags(u8),
    /// The body ends within a field, or a count promises more than the body holds.
    #[error("the body ends within `{field}`")]
    Truncated {
        /// The field, as docs/protocol.md names it.
        field: &'static str,
    },
    /// Bytes follow the last field.
    #[error("{0} bytes follow the last field")]
    Trailing(usize),
    /// A field has a value that is not defined.
    #[error("{value} is not a valid `{field}`")]
    Invalid {
        /// The field, as docs/protocol.md names it.
        field: &'static str,
        /// What stood there.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("`{field}` is not UTF-8")]
    NotUtf8 {
        /// The field, as docs/protocol.md names it.
        field: &'static str,
    },
    /// A key has no bytes.
    #[error("empty key")]
    EmptyKey,
    /// A key is over its limit.
    #[error("key of {0} bytes is over the limit of {MAX_KEY_BYTES}")]
    KeyTooLong(usize),
    /// A value is over its limit.
    #[error("value of {0} bytes is over the limit of {MAX_VALUE_BYTES}")]
    ValueTooLarge(usize),
    /// A list is over its limit.
    #[error("`{field}` has {count} elements, over the limit of {limit}")]
    TooMany {
        /// The list, as docs/protocol.md names it.
        field: &'static str,
        /// Its length.
        count: usize,
        /// The longest that is allowed.
        limit: usize,
    },
}

impl BodyError {
    /// The code to answer.
    pub fn code(&self) -> Code {
        match self {
            BodyError::UnknownOpcode(_) | BodyError::UnknownFlags(_) => Code::Unsupported,
            BodyError::KeyTooLong(_) | BodyError::ValueTooLarge(_) | BodyError::TooMany { .. } => {
                Code::TooLarge
            }
            BodyError::Truncated { .. }
            | BodyError::Trailing(_)
            | BodyError::Invalid { .. }
            | BodyError::NotUtf8 { .. }
            | BodyError::EmptyKey => Code::InvalidArgument,
        }
    }
}

/// The bytes of a body that are not yet read.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Reader<'a> {
        Reader { rest: body }
    }

    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], BodyError> {
        self.array(field).copied()
    }

    /// So many bytes, as they lie in the body.
    pub(crate) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<&'a [u8; N], BodyError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(BodyError::Truncated { field })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, BodyError> {
        self.take(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, BodyError> {
        self.take(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, BodyError> {
        self.take(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, BodyError> {
        self.take(field).map(u64::from_le_bytes)
    }

    pub(super) fn i64(&mut self, field: &'static str) -> Result<i64, BodyError> {
        self.take(field).map(i64::from_le_bytes)
    }

    /// A byte of which only the bits of `known` may be set.
    pub(crate) fn bits(&mut self, field: &'static str, known: u8) -> Result<u8, BodyError> {
        let bits = self.u8(field)?;
        if bits & !known != 0 {
            return Err(BodyError::Invalid { field, value: u64::from(bits) });
        }
        Ok(bits)
    }

    pub(super) fn boolean(&mut self, field: &'static str) -> Result<bool, BodyError> {
        self.bits(field, 1).map(|bit| bit == 1)
    }

    /// A length of 32 bits and as many bytes.
    pub(crate) fn bytes(&mut self, field: &'static str) -> Result<&'a [u8], BodyError> {
        let length = self.u32(field)? as usize;
        let (bytes, rest) =
            self.rest.split_at_checked(length).ok_or(BodyError::Truncated { field })?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn text(&mut self, field: &'static str) -> Result<&'a str, BodyError> {
        std::str::from_utf8(self.bytes(field)?).map_err(|_| BodyError::NotUtf8 { field })
    }

    pub(super) fn key(&mut self) -> Result<&'a [u8], BodyError> {
        match self.bytes("key")? {
            [] => Err(BodyError::EmptyKey),
            key if key.len() > MAX_KEY_BYTES => Err(BodyError::KeyTooLong(key.len())),
            key => Ok(key),
        }
    }

    pub(super) fn value(&mut self) -> Result<&'a [u8], BodyError> {
        match self.bytes("value")? {
            value if value.len() > MAX_VALUE_BYTES => Err(BodyError::ValueTooLarge(value.len())),
            value => Ok(value),
        }
    }

    /// A time after which 0 stands for none.
    pub(super) fn expires_at_ms(&mut self) -> Result<Option<u64>, BodyError> {
        self.u64("expires_at_ms").map(|at| (at != 0).then_some(at))
    }

    /// A count, checked against its limit and against the bytes that are left, followed by as many
    /// elements of at least `min_bytes` each.
    pub(super) fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        min_bytes: usize,
        mut element: impl FnMut(&mut Reader<'a>) -> Result<T, BodyError>,
    ) -> Result<Vec<T>, BodyError> {
        let count = self.u32(field)? as usize;
        if count > limit {
            return Err(BodyError::TooMany { field, count, limit });
        }
        if count.saturating_mul(min_bytes) > self.rest.len() {
            return Err(BodyError::Truncated { field });
        }
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(element(self)?);
        }
        Ok(list)
    }

    /// All that is left.
    pub(crate) fn remainder(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Makes sure that nothing is left.
    pub(crate) fn finish(self) -> Result<(), BodyError> {
        if self.rest.is_empty() { Ok(()) } else { Err(BodyError::Trailing(self.rest.len())) }
    }
}

/// Appends a length of 32 bits and the bytes. A length that does not fit cannot do harm: the frame
/// is then over its limit and refused as a whole.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32_le(bytes.len() as u32);
    out.extend_from_slice(bytes);
}

/// Appends the count of a list.
pub(super) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.put_u32_le(count as u32);
}
