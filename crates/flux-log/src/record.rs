//! Records as the caller sees them, and their bytes within a batch.
//!
//! A record has no checksum of its own: the batch that holds it has one (see `batch.rs`).

use crate::fields::Fields;

/// The most bytes that one batch may hold, all records together.
pub const MAX_BATCH_BYTES: usize = 1 << 30;

/// Bytes of a record before its payload.
const HEADER_BYTES: usize = 32;
const KIND_ENTRY: u8 = 1;
const KIND_STATE: u8 = 2;
/// Payload of a state: replica and start. Without it a state is of replica 1 and start 0.
const STATE_BYTES: usize = 16;

/// One thing that a partition wants to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// An entry of the partition's replicated log.
    Entry(Entry<'a>),
    /// The partition's hard state; the last one written counts.
    State(State),
}

/// An entry of a partition's replicated log. One whose index is not above that of an earlier record
/// replaces that one and all after it, as Raft has it; the log itself draws no such conclusion. What a
/// reset voids, see [`State`], is another matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The partition, a Raft group of this worker.
    pub partition: u16,
    /// What the payload is, in the caller's numbering.
    pub entry_type: u8,
    /// Term of the leader that proposed it.
    pub term: u64,
    /// Place in the partition's log.
    pub index: u64,
    /// Highest index known to be committed when this was appended.
    pub commit: u64,
    /// The entry's bytes, opaque here.
    pub payload: &'a [u8],
}

/// What a replica must never forget, and may only forget together.
///
/// One whose `replica` or `start` differs from that of the partition's state before it is a **reset**:
/// every entry of the partition before it in the log is void, whatever its index. As the log may have
/// dropped some of those and not yet others, what is left of them when the log is read back need not
/// be without holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The partition, a Raft group of this worker.
    pub partition: u16,
    /// Current term.
    pub term: u64,
    /// Whom this replica voted for in that term; 0 for nobody.
    pub vote: u64,
    /// Highest index known to be committed.
    pub commit: u64,
    /// The replica whose history follows; 0 when the partition is not here any more.
    pub replica: u64,
    /// That history goes on after this index, on top of a snapshot that holds all up to it.
    pub start: u64,
}

impl State {
    /// Whether entries before this one are void, `previous` being the partition's state before it.
    pub(crate) fn resets(&self, previous: Option<&State>) -> bool {
        let previous = previous.map_or((1, 0), |state| (state.replica, state.start));
        (self.replica, self.start) != previous
    }
}

impl Record<'_> {
    /// Bytes that the record takes in a batch: a multiple of 8.
    pub fn encoded_len(&self) -> usize {
        match self {
            Record::Entry(entry) => {
                HEADER_BYTES.saturating_add(entry.payload.len()).saturating_add(7) & !7
            }
            Record::State(_) => HEADER_BYTES + STATE_BYTES,
        }
    }

    /// Appends the record's bytes. The caller has checked `encoded_len` against `MAX_BATCH_BYTES`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut state_payload = [0; STATE_BYTES];
        let (kind, entry_type, partition, term, index, commit, payload) = match *self {
            Record::Entry(Entry { partition, entry_type, term, index, commit, payload }) => {
                (KIND_ENTRY, entry_type, partition, term, index, commit, payload)
            }
            Record::State(State { partition, term, vote, commit, replica, start }) => {
                state_payload[..8].copy_from_slice(&replica.to_le_bytes());
                state_payload[8..].copy_from_slice(&start.to_le_bytes());
                (KIND_STATE, 0, partition, term, vote, commit, &state_payload[..])
            }
        };
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[4] = kind;
        header[5] = entry_type;
        header[6..8].copy_from_slice(&partition.to_le_bytes());
        header[8..16].copy_from_slice(&term.to_le_bytes());
        header[16..24].copy_from_slice(&index.to_le_bytes());
        header[24..32].copy_from_slice(&commit.to_le_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(payload);
        let padding = payload.len().wrapping_neg() & 7;
        out.extend_from_slice(&[0; 7][..padding]);
    }
}

/// Takes the next record off `body`; `None` if what is there is not a record.
pub(crate) fn decode<'a>(body: &mut Fields<'a>) -> Option<Record<'a>> {
    let mut header = Fields(body.bytes(HEADER_BYTES)?);
    let payload_bytes = header.u32()? as usize;
    let kind = header.u8()?;
    let entry_type = header.u8()?;
    let partition = header.u16()?;
    let (term, index, commit) = (header.u64()?, header.u64()?, header.u64()?);
    let payload = body.bytes(payload_bytes)?;
    body.bytes(payload_bytes.wrapping_neg() & 7)?;
    match kind {
        KIND_ENTRY => {
            Some(Record::Entry(Entry { partition, entry_type, term, index, commit, payload }))
        }
        KIND_STATE => {
            let mut fields = Fields(payload);
            let (replica, start) = match payload.len() {
                0 => (1, 0),
                STATE_BYTES => (fields.u64()?, fields.u64()?),
                _ => return None,
            };
            Some(Record::State(State { partition, term, vote: index, commit, replica, start }))
        }
        _ => None,
    }
}
