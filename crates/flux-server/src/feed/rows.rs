//! Current values, in the place of changes that are nowhere any more.
//!
//! A walk meets every key that is there all the while, and none that has changed since the walk's revision
//! is given: the change itself comes behind the rows.

use bytes::Bytes;
use flux_cdc::{FeedError, Limit, RowMark, Rows};
use flux_core::store::{Entry, Position};
use flux_proto::event::{Event, Gap, Op};

use crate::shared::PartitionView;

/// Entries that are looked at between two looks at the limit.
const STEP_ENTRIES: usize = 64;

/// Entries that are looked at for a page, about: others want to get on, too, where few of many are rows.
const MAX_ENTRIES: usize = 1024;

/// A mark holds a position, and in the bits above it how often the table had been replaced.
const POSITION_BITS: u32 = 32;

/// A page of what was there at the gap's revision.
///
/// # Errors
///
/// `Restart` if the table was replaced since the first page.
pub(super) fn page(
    view: &PartitionView,
    gap: &Gap,
    from: Option<RowMark>,
    limit: Limit,
) -> Result<Rows, FeedError> {
    let replacements = view.table.replacements() as u32;
    let mut at = Position(0);
    if let Some(RowMark(mark)) = from {
        if (mark >> POSITION_BITS) as u32 != replacements {
            return Err(FeedError::Restart);
        }
        at = Position(mark as u32);
    }
    let (mut events, mut bytes): (Vec<Event>, usize) = (Vec::new(), 0);
    let (mut next, mut looked) = (Some(at), 0);
    while let Some(position) = next
        && looked < MAX_ENTRIES
        && events.len() < limit.events.max(1)
        && bytes < limit.bytes.max(1)
    {
        next = view.table.scan(position, STEP_ENTRIES.min(limit.events.max(1)), |entry| {
            looked += 1;
            if entry.version <= gap.at.revision {
                bytes += entry.key.len() + entry.value.len();
                events.push(row(gap.partition, &entry));
            }
        });
    }
    let is_the_same = view.table.replacements() as u32 == replacements;
    if !is_the_same || !is_here(view, gap) {
        return Err(FeedError::Restart);
    }
    let mark = |at: Position| RowMark(u64::from(replacements) << POSITION_BITS | u64::from(at.0));
    Ok(Rows { events, next: next.map(mark) })
}

/// What a key was at the gap's revision, if it was there and has not changed since.
///
/// # Errors
///
/// `Restart` if the table is not as far any more.
pub(super) fn one(view: &PartitionView, gap: &Gap, key: &[u8]) -> Result<Option<Event>, FeedError> {
    let found = view.table.read(view.table.hash(key), key, |entry| {
        let entry = entry.filter(|entry| entry.version <= gap.at.revision)?;
        Some(row(gap.partition, &entry))
    });
    if is_here(view, gap) { Ok(found) } else { Err(FeedError::Restart) }
}

/// Whether the partition is as far as the gap. Asked behind the last look at the table: one that was replaced was
/// so in the standing before.
fn is_here(view: &PartitionView, gap: &Gap) -> bool {
    view.standing.place().is_some_and(|at| at.revision >= gap.at.revision)
}

fn row(partition: u16, entry: &Entry<'_>) -> Event {
    Event {
        op: Op::Set,
        key: Bytes::copy_from_slice(entry.key),
        value: Some(Bytes::copy_from_slice(entry.value)),
        partition,
        revision: entry.version,
        version: entry.version,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: entry.expires_at_ms,
        committed_at_ms: 0,
        trace: None,
    }
}
