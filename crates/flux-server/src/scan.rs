//! Walks over the keys of a whole node, a bounded step at a time.
//!
//! A cursor is the partition and the position in it to go on from, so it stays valid while keys come
//! and go, partitions split their index, and over a restart of the node.

use flux_core::store::{Entry, Position};
use flux_core::{Error, PartitionId, UnixMillis};

use crate::clock::monotonic_us;
use crate::resp::ScanCursor;
use crate::shared::Shared;

/// Entries that are looked at in one step, at least.
const STEP_ENTRIES: usize = 256;

/// The cursor of the bytes that a page gave; empty is the start.
pub(crate) fn cursor_from_bytes(bytes: &[u8], partitions: u16) -> Option<ScanCursor> {
    if bytes.is_empty() {
        return ScanCursor::from_number(0);
    }
    let number = u64::from_le_bytes(bytes.try_into().ok()?);
    ScanCursor::from_number(number).filter(|cursor| cursor.partition.0 < partitions)
}

/// What the client is given to ask for the next page; empty at the end.
pub(crate) fn cursor_to_bytes(cursor: Option<ScanCursor>) -> Vec<u8> {
    cursor.map(|cursor| cursor.number().to_le_bytes().to_vec()).unwrap_or_default()
}

/// Visits at least `min_entries` live entries from `cursor` on, unless the end comes first, in which
/// case it answers `None`. Entries that are expired are passed over.
pub(crate) fn walk(
    shared: &Shared,
    cursor: ScanCursor,
    min_entries: usize,
    now_ms: UnixMillis,
    mut visit: impl FnMut(Entry<'_>),
) -> Result<Option<ScanCursor>, Error> {
    let mut seen = 0;
    let mut cursor = cursor;
    while let Some(view) = shared.views.get(usize::from(cursor.partition.0)) {
        if !view.standing.may_serve(monotonic_us()) {
            return Err(Error::NotLeader);
        }
        let next = view.table.scan(Position(cursor.position), min_entries - seen, |entry| {
            seen += 1;
            if !entry.is_expired(now_ms) {
                visit(entry);
            }
        });
        cursor = match next {
            Some(Position(position)) => ScanCursor { position, ..cursor },
            None => ScanCursor { partition: PartitionId(cursor.partition.0 + 1), position: 0 },
        };
        if seen >= min_entries {
            break;
        }
    }
    Ok(shared.views.get(usize::from(cursor.partition.0)).map(|_| cursor))
}

/// A page of keys with a prefix: their entries, encoded by `visit`, at least one step of the walk and
/// until `limit` matches or `max_bytes` of keys and values.
pub(crate) fn page(
    shared: &Shared,
    cursor: ScanCursor,
    prefix: &[u8],
    limits: PageLimits,
    now_ms: UnixMillis,
    mut visit: impl FnMut(Entry<'_>),
) -> Result<Option<ScanCursor>, Error> {
    let (mut matches, mut looked_at, mut bytes, mut seen_bytes) = (0, 0, 0, 0_usize);
    let mut cursor = Some(cursor);
    while let Some(from) = cursor {
        // A step is not cut short: with large values it must be small.
        let left = limits.bytes - bytes.min(limits.bytes);
        let average = seen_bytes.checked_div(looked_at);
        let fitting = average.map_or(1, |average| left / average.max(1));
        let step = fitting.clamp(1, STEP_ENTRIES).min(limits.matches - matches);
        cursor = walk(shared, from, step, now_ms, |entry| {
            looked_at += 1;
            seen_bytes += entry.key.len() + entry.value.len();
            if entry.key.starts_with(prefix) {
                matches += 1;
                bytes += entry.key.len() + entry.value.len();
                visit(entry);
            }
        })?;
        let full = matches >= limits.matches || bytes >= limits.bytes;
        if full || looked_at >= limits.looked_at {
            break;
        }
    }
    Ok(cursor)
}

/// When a page ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageLimits {
    /// Keys that match, more than 0; one step may give a few more.
    pub(crate) matches: usize,
    /// Bytes of keys and values.
    pub(crate) bytes: usize,
    /// Keys looked at, whether they match or not: bounds the time that a page takes.
    pub(crate) looked_at: usize,
}
