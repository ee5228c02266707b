//! The longest common subsequence of two values.
//!
//! The textbook table, and Redis's way back through it, so that of several longest ones the same is
//! found. Only two rows of lengths are kept, and of each cell one bit: which way to go back. That
//! takes 8 MiB at most, where the lengths would take 256 MiB.

use super::read::View;
use crate::reply::{Lcs, LcsRun};
use crate::{Error, Reply};

/// The most cells that are filled; it bounds for how long the partition's thread is busy, to about a
/// tenth of a second.
const MAX_CELLS: usize = 64 * 1024 * 1024;

pub(super) fn answer(view: &impl View, left: &[u8], right: &[u8]) -> Result<Reply, Error> {
    // Copies, so that writers need not wait for the comparison.
    let value = |key| view.read(key, |entry| entry.map_or(Vec::new(), |e| e.value.to_vec()));
    let (left, right) = (value(left), value(right));
    // The product of two lengths within the limit on values fits.
    if left.len() * right.len() > MAX_CELLS {
        return Err(Error::TooLargeToCompare(left.len() + right.len()));
    }
    Ok(Reply::Lcs(longest_common_subsequence(&left, &right)))
}

fn longest_common_subsequence(left: &[u8], right: &[u8]) -> Lcs {
    let steps = Steps::fill(left, right);
    let (mut i, mut j) = (left.len(), right.len());
    let mut lcs = Lcs { bytes: Vec::new(), runs: Vec::new() };
    let mut extends_run = false;
    while i > 0 && j > 0 {
        if left[i - 1] != right[j - 1] {
            extends_run = false;
            if steps.is_up(i, j) {
                i -= 1;
            } else {
                j -= 1;
            }
            continue;
        }
        i -= 1;
        j -= 1;
        lcs.bytes.push(left[i]);
        match lcs.runs.last_mut() {
            Some(run) if extends_run => (run.left.start, run.right.start) = (i, j),
            _ => lcs.runs.push(LcsRun { left: i..i + 1, right: j..j + 1 }),
        }
        extends_run = true;
    }
    lcs.bytes.reverse();
    lcs
}

/// For each pair of prefixes that end in different bytes: whether the subsequence gets longer by
/// going on with the left one shortened than with the right one shortened.
struct Steps {
    columns: usize,
    bits: Vec<u64>,
}

impl Steps {
    fn fill(left: &[u8], right: &[u8]) -> Steps {
        let columns = right.len();
        let mut steps = Steps { columns, bits: vec![0; (left.len() * columns).div_ceil(64)] };
        let mut above = vec![0u32; columns + 1];
        let mut row = vec![0u32; columns + 1];
        for (i, &byte) in left.iter().enumerate() {
            for (j, &other) in right.iter().enumerate() {
                row[j + 1] = if byte == other { above[j] + 1 } else { above[j + 1].max(row[j]) };
                let cell = i * columns + j;
                steps.bits[cell / 64] |= u64::from(above[j + 1] > row[j]) << (cell % 64);
            }
            std::mem::swap(&mut above, &mut row);
        }
        steps
    }

    fn is_up(&self, i: usize, j: usize) -> bool {
        let cell = (i - 1) * self.columns + (j - 1);
        self.bits[cell / 64] >> (cell % 64) & 1 != 0
    }
}
