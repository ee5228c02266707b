//! The token that resumes a watch: how far it came in each partition.
//!
//! ```text
//! u8 format, 1 · u64 cluster, little endian · for each partition, in rising order:
//!     varint partition - the one before - 1 (the first: the partition itself) · varint revision
//! ```
//!
//! A varint has 7 bits a byte, the lowest first, and no more bytes than it needs: a token has one
//! encoding. What this module does not do: judge whether a token is of this cluster, or sign it; a
//! token that was made up resumes at some other place and nothing worse.

/// A revision for each partition, in rising order of the partitions, each once.
pub type Positions = Vec<(u16, u64)>;

const FORMAT: u8 = 1;

/// Up to where a watcher has seen the changes of the partitions that it watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The cluster's id: positions mean nothing to another one.
    pub cluster: u64,
    /// The last revision seen in each partition.
    pub positions: Positions,
}

impl Token {
    /// The token as bytes.
    ///
    /// # Panics
    /// If the partitions do not rise.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(9 + 5 * self.positions.len());
        out.push(FORMAT);
        out.extend_from_slice(&self.cluster.to_le_bytes());
        let mut next = 0;
        for &(partition, revision) in &self.positions {
            let partition = u64::from(partition);
            assert!(partition >= next, "partition {partition} of a token is out of order");
            put_varint(partition - next, &mut out);
            put_varint(revision, &mut out);
            next = partition + 1;
        }
        out
    }

    /// The token of these bytes, or `None` if `encode` never gives them.
    pub fn decode(bytes: &[u8]) -> Option<Token> {
        let (&FORMAT, rest) = bytes.split_first()? else { return None };
        let (cluster, mut rest) = rest.split_first_chunk()?;
        let mut positions = Positions::new();
        let mut next = 0u64;
        while !rest.is_empty() {
            let partition = u16::try_from(next.checked_add(take_varint(&mut rest)?)?).ok()?;
            positions.push((partition, take_varint(&mut rest)?));
            next = u64::from(partition) + 1;
        }
        Some(Token { cluster: u64::from_le_bytes(*cluster), positions })
    }
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        value |= bits << shift;
        if byte < 0x80 {
            let minimal = byte != 0 || shift == 0;
            return (minimal && bits << shift >> shift == bits).then_some(value);
        }
    }
    None
}
