//! Reads a file through a large window, and batches out of it.

use std::sync::Arc;

use crate::{
    batch::{BATCH_HEADER_BYTES, BatchHeader},
    disk::File,
    error::LogError,
};

const WINDOW_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
static ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// A file and the part of it that is in memory.
#[derive(Debug)]
pub(crate) struct Reader {
    file: Arc<dyn File>,
    name: String,
    size: u64,
    buffer: Vec<u8>,
    /// Where the window starts, and how much of the buffer it fills.
    start: u64,
    filled: usize,
}

/// What is found where a batch may be.
pub(crate) enum Found<'a> {
    Batch(BatchHeader, &'a [u8]),
    /// Zeros, or the end of the file.
    Nothing,
    /// Bytes that are not a valid batch.
    Invalid,
}

/// What follows the last valid batch.
pub(crate) struct Tail {
    /// Offset after the last byte that is not zero; where the tail starts if there is none.
    pub end: u64,
    /// A later batch says that the start of the tail had been durable.
    pub had_been_synced: bool,
}

impl Reader {
    /// Reads `file` using `buffer`, whose contents do not matter.
    pub fn new(file: Arc<dyn File>, name: &str, buffer: Vec<u8>) -> Result<Reader, LogError> {
        Reader::up_to(u64::MAX, file, name, buffer)
    }

    /// As `new`, but as if the file ended at `end` at the latest: what lies behind is never read.
    pub fn up_to(
        end: u64,
        file: Arc<dyn File>,
        name: &str,
        buffer: Vec<u8>,
    ) -> Result<Reader, LogError> {
        let size = file.size().map_err(|error| LogError::disk("read", name, error))?.min(end);
        Ok(Reader { file, name: name.to_owned(), size, buffer, start: 0, filled: 0 })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Up to `count` bytes at `offset`; fewer only at the end of the file.
    pub fn at(&mut self, offset: u64, count: usize) -> Result<&[u8], LogError> {
        let count = self.size.saturating_sub(offset).min(count as u64) as usize;
        let inside = offset.checked_sub(self.start).filter(|skip| {
            skip.checked_add(count as u64).is_some_and(|end| end <= self.filled as u64)
        });
        let skip = match inside {
            Some(skip) => skip as usize,
            None => {
                self.fill(offset, count)?;
                0
            }
        };
        Ok(self.buffer.get(skip..self.filled.min(skip + count)).unwrap_or_default())
    }

    fn fill(&mut self, offset: u64, count: usize) -> Result<(), LogError> {
        let want = self.size.saturating_sub(offset).min(WINDOW_BYTES.max(count as u64)) as usize;
        if self.buffer.len() < want {
            self.buffer.resize(want, 0);
        }
        self.start = offset;
        self.filled = 0;
        self.filled = self
            .file
            .read_at(&mut self.buffer[..want], offset)
            .map_err(|error| LogError::disk("read", &self.name, error))?;
        Ok(())
    }

    /// Looks for a batch at `offset` of the segment that starts at `base`.
    pub fn batch(&mut self, base: u64, seed: u32, offset: u64) -> Result<Found<'_>, LogError> {
        let bytes = self.at(offset, BATCH_HEADER_BYTES)?;
        if bytes == &ZEROS[..bytes.len()] {
            return Ok(Found::Nothing);
        }
        let Some(header) = BatchHeader::decode(bytes, seed, base.saturating_add(offset)) else {
            return Ok(Found::Invalid);
        };
        let body = self.at(offset + BATCH_HEADER_BYTES as u64, header.body_bytes)?;
        Ok(if header.matches(body, seed) { Found::Batch(header, body) } else { Found::Invalid })
    }

    /// Goes through all from `offset` to the end of the file, which holds no batch at `offset`.
    pub fn tail(&mut self, base: u64, seed: u32, offset: u64) -> Result<Tail, LogError> {
        let mut tail = Tail { end: offset, had_been_synced: false };
        let mut block = offset;
        while block < self.size {
            let bytes = self.at(block, BLOCK_BYTES as usize)?;
            let Some(last) = last_set(bytes) else {
                block += BLOCK_BYTES;
                continue;
            };
            tail.end = block + last as u64 + 1;
            // A header whose first fields are zero may start in the block before.
            let mut at = block.saturating_sub(BATCH_HEADER_BYTES as u64).max(offset);
            while at < block + BLOCK_BYTES && !tail.had_been_synced {
                let bytes = self.at(at, BATCH_HEADER_BYTES)?;
                tail.had_been_synced = BatchHeader::decode(bytes, seed, base.saturating_add(at))
                    .is_some_and(|header| header.synced > base.saturating_add(offset));
                at += 8;
            }
            block += BLOCK_BYTES;
        }
        Ok(tail)
    }
}

/// Index of the last byte that is not zero.
fn last_set(bytes: &[u8]) -> Option<usize> {
    if bytes == &ZEROS[..bytes.len()] {
        return None;
    }
    bytes.iter().rposition(|byte| *byte != 0)
}
