//! Entries of the log and of the table as events.
//!
//! As in `flux-server`'s `feed/decode.rs` and `feed/rows.rs`.

use bytes::Bytes;
use flux_cdc::{RowMark, Rows};
use flux_core::effect::{Changes, Effect, EffectError, Reason};
use flux_core::feed::Committed;
use flux_core::store::{Entry, Position};
use flux_proto::event::{Event, Gap, Op};

use super::Hosted;
use crate::node::Options;
use crate::plant::Plant;

/// Entries that are looked at between two looks at the limit.
const STEP_ENTRIES: usize = 4;

/// A mark holds a position, and in the bits above it how often the table had been replaced.
const POSITION_BITS: u32 = 32;

/// All changes of an entry, in their order.
pub(super) fn events(partition: u16, entry: &Committed) -> Result<Vec<Event>, EffectError> {
    let changes = Changes::new(&entry.payload)?;
    let committed_at_ms = changes.committed_at_ms();
    let events = changes.map(|change| {
        let (op, key, value, expires_at_ms) = match change.effect {
            Effect::Put { key, value, expires_at_ms } => {
                (Op::Set, key, Some(Bytes::copy_from_slice(value)), expires_at_ms)
            }
            Effect::Delete { key, reason: Reason::Explicit } => (Op::Delete, key, None, None),
            Effect::Delete { key, reason: Reason::Expired } => (Op::Expire, key, None, None),
        };
        Event {
            op,
            key: Bytes::copy_from_slice(key),
            value,
            partition,
            revision: change.revision,
            version: if op == Op::Set { change.revision } else { 0 },
            previous_version: change.previous,
            previous_value: change.previous_value.map(Bytes::copy_from_slice),
            expires_at_ms,
            committed_at_ms,
            trace: None,
        }
    });
    Ok(events.collect())
}

/// A page of what was there at the gap's revision; `None` if the table was replaced since the first page.
pub(super) fn page(
    hosted: &Hosted,
    gap: &Gap,
    from: Option<RowMark>,
    options: &Options,
) -> Option<Rows> {
    let replacements = hosted.table.replacements() as u32;
    let mut at = Position(0);
    if let Some(RowMark(mark)) = from {
        if (mark >> POSITION_BITS) as u32 != replacements {
            return None;
        }
        at = Position(mark as u32);
    }
    if options.has(Plant::GapWithoutRows) {
        return Some(Rows { events: Vec::new(), next: None });
    }
    let newest = if options.has(Plant::RowsOfLaterVersions) { u64::MAX } else { gap.at.revision };
    let mut events = Vec::new();
    let mut next = Some(at);
    while let Some(position) = next
        && events.len() < options.batch_max_events
    {
        next = hosted.table.scan(position, STEP_ENTRIES, |entry| {
            if entry.version <= newest {
                events.push(row(gap.partition, &entry));
            }
        });
    }
    let is_here = hosted.view.place().is_some_and(|at| at.revision >= gap.at.revision);
    let mark = |at: Position| RowMark(u64::from(replacements) << POSITION_BITS | u64::from(at.0));
    is_here.then(|| Rows { events, next: next.map(mark) })
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
