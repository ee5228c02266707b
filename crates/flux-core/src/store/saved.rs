//! Entries that were overwritten or removed ahead of a snapshot's walk, until the next chunk takes them.

use std::collections::VecDeque;

use super::entry::{Entry, encode_entry};

/// A block holds about so many bytes of small entries.
const BLOCK_BYTES: usize = 32 * 1024;

/// Saved entries, already encoded. Large ones are moved here, not copied.
#[derive(Default)]
pub(super) struct Saved {
    blocks: VecDeque<Vec<u8>>,
    large: VecDeque<Box<[u8]>>,
    bytes: u64,
}

impl Saved {
    /// The bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn push(&mut self, entry: &Entry<'_>) {
        let len = entry.encoded_len();
        let fits = |block: &Vec<u8>| block.len() + len <= block.capacity();
        if !self.blocks.back().is_some_and(fits) {
            self.blocks.push_back(Vec::with_capacity(BLOCK_BYTES.max(len)));
        }
        encode_entry(entry, self.blocks.back_mut().expect("just pushed"));
        self.bytes += len as u64;
    }

    pub(super) fn push_large(&mut self, bytes: Box<[u8]>) {
        self.bytes += bytes.len() as u64;
        self.large.push_back(bytes);
    }

    /// Appends whole entries until all are out or `out` has reached `end` bytes.
    pub(super) fn drain_into(&mut self, end: usize, out: &mut Vec<u8>) {
        while out.len() < end {
            let block = match self.blocks.pop_front() {
                Some(block) => block,
                None => match self.large.pop_front() {
                    Some(bytes) => bytes.into_vec(),
                    None => return,
                },
            };
            self.bytes -= block.len() as u64;
            out.extend_from_slice(&block);
        }
    }
}
