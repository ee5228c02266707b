//! Batches: what is written with one call and is either wholly there or not at all.
//!
//! One checksum covers a batch, not one each record: a group commit is acknowledged as a whole, so
//! part of one is worth nothing, and checking long runs is what CRC hardware is fast at. The header
//! has a checksum of its own, so that its length can be trusted before the body is read, and holds
//! its own LSN: bytes that are valid in one place are not valid in any other.

use std::ops::ControlFlow;

use crate::{
    error::LogError,
    fields::Fields,
    record::{self, MAX_BATCH_BYTES, Record},
};

/// Bytes of a batch before its records: what [`Log::reserve`](crate::Log::reserve) needs on top of
/// their [`encoded_len`](Record::encoded_len).
pub const BATCH_HEADER_BYTES: usize = 40;

/// A mark is a batch without records.
pub(crate) const MARK_BYTES: usize = BATCH_HEADER_BYTES;

/// Why a batch was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BatchKind {
    /// Records of the caller.
    Records,
    /// The first batch of a segment: the last state of each partition.
    Head,
    /// No records: says that all before it is durable. Written on a clean close and after recovery.
    Mark,
}

impl BatchKind {
    fn code(self) -> u8 {
        match self {
            BatchKind::Records => 1,
            BatchKind::Head => 2,
            BatchKind::Mark => 3,
        }
    }

    fn from_code(code: u8) -> Option<BatchKind> {
        [BatchKind::Records, BatchKind::Head, BatchKind::Mark]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

/// A batch being filled. Its buffer is kept from one batch to the next.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Room for the header, then records.
    bytes: Vec<u8>,
    records: u32,
}

impl Batch {
    pub fn new() -> Batch {
        Batch { bytes: vec![0; BATCH_HEADER_BYTES], records: 0 }
    }

    /// A batch whose header may or may not fit `body`, for fuzzing: the first byte is the number of
    /// records that it claims.
    pub fn from_body(body: &[u8]) -> Batch {
        let (records, body) = body.split_first().unwrap_or((&0, &[]));
        let mut batch = Batch::new();
        batch.bytes.extend_from_slice(body);
        batch.bytes.resize(batch.bytes.len().next_multiple_of(8), 0);
        batch.records = (*records).into();
        batch
    }

    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Length on disk, header included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds a record; `Err` holds the length that would have been too much.
    pub fn push(&mut self, record: &Record<'_>) -> Result<(), u64> {
        let len = self.bytes.len().saturating_add(record.encoded_len());
        if len > MAX_BATCH_BYTES {
            return Err(len as u64);
        }
        record.encode(&mut self.bytes);
        self.records += 1;
        Ok(())
    }

    /// Fills in the header for this place and returns the bytes to write.
    pub fn seal(&mut self, kind: BatchKind, seed: u32, lsn: u64, synced: u64) -> &[u8] {
        let (header, body) = self.bytes.split_at_mut(BATCH_HEADER_BYTES);
        header[4..8].copy_from_slice(&crc32c::crc32c_append(seed, body).to_le_bytes());
        header[8..16].copy_from_slice(&lsn.to_le_bytes());
        header[16..24].copy_from_slice(&synced.to_le_bytes());
        header[24..28].copy_from_slice(&(body.len() as u32).to_le_bytes());
        header[28..32].copy_from_slice(&self.records.to_le_bytes());
        header[32..40].copy_from_slice(&[kind.code(), 0, 0, 0, 0, 0, 0, 0]);
        let crc = crc32c::crc32c_append(seed, &header[4..]);
        header[0..4].copy_from_slice(&crc.to_le_bytes());
        &self.bytes
    }

    /// The sealed bytes with zeros behind them. Only `clear` may follow.
    pub fn followed_by_zeros(&mut self, count: usize) -> &[u8] {
        self.bytes.resize(self.bytes.len() + count, 0);
        &self.bytes
    }

    pub fn clear(&mut self) {
        /// A buffer that one huge batch has grown is given back.
        const KEEP_BYTES: usize = 4 << 20;
        self.bytes.truncate(BATCH_HEADER_BYTES);
        self.bytes.shrink_to(KEEP_BYTES);
        self.records = 0;
    }
}

/// A batch header whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchHeader {
    pub kind: BatchKind,
    pub synced: u64,
    pub body_bytes: usize,
    records: u32,
    body_crc: u32,
}

impl BatchHeader {
    /// The header at `lsn`, or `None` if these bytes are not one that was written there.
    pub fn decode(bytes: &[u8], seed: u32, lsn: u64) -> Option<BatchHeader> {
        let bytes = bytes.first_chunk::<BATCH_HEADER_BYTES>()?;
        let mut fields = Fields(bytes);
        let crc = fields.u32()?;
        let covered = fields.0;
        let body_crc = fields.u32()?;
        // Comparing the LSN first makes a search through damaged bytes cheap.
        if fields.u64()? != lsn || crc32c::crc32c_append(seed, covered) != crc {
            return None;
        }
        let synced = fields.u64()?;
        let body_bytes = fields.u32()? as usize;
        let records = fields.u32()?;
        let kind = BatchKind::from_code(fields.u8()?)?;
        Some(BatchHeader { kind, synced, body_bytes, records, body_crc })
    }

    pub fn matches(&self, body: &[u8], seed: u32) -> bool {
        body.len() == self.body_bytes && crc32c::crc32c_append(seed, body) == self.body_crc
    }

    /// Length on disk, header included.
    pub fn len(&self) -> u64 {
        BATCH_HEADER_BYTES as u64 + self.body_bytes as u64
    }

    /// Gives the records of `body`, which matches, to `visit` until that breaks. `name` and `offset`
    /// say where the batch is.
    pub fn records<'a>(
        &self,
        body: &'a [u8],
        name: &str,
        offset: u64,
        visit: &mut dyn FnMut(Record<'a>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, LogError> {
        let mut fields = Fields(body);
        for _ in 0..self.records {
            let at = offset + (BATCH_HEADER_BYTES + body.len() - fields.0.len()) as u64;
            let Some(record) = record::decode(&mut fields) else {
                return Err(LogError::damaged(name, at, "a record of a valid batch is not valid"));
            };
            if visit(record).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        if !fields.0.is_empty() {
            let reason = "a valid batch is longer than its records";
            return Err(LogError::damaged(name, offset, reason));
        }
        Ok(ControlFlow::Continue(()))
    }
}
