//! Entries of the log as events: keys and values are parts of the entry's bytes, not copies.

use std::sync::Arc;

use bytes::Bytes;
use flux_core::effect::{Changes, Effect, EffectError, Reason};
use flux_core::feed::Committed;
use flux_proto::event::{Event, Op, TraceContext};

/// The bytes of an entry, kept as long as any event of it is.
struct Payload(Arc<Committed>);

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        &self.0.payload
    }
}

/// All changes of an entry, in their order.
///
/// # Errors
///
/// If the entry is none that this version writes.
pub(super) fn events(partition: u16, entry: &Arc<Committed>) -> Result<Vec<Event>, EffectError> {
    let bytes = Bytes::from_owner(Payload(Arc::clone(entry)));
    let changes = Changes::new(&entry.payload)?;
    let committed_at_ms = changes.committed_at_ms();
    let events = changes.map(|change| {
        let (op, key, value, expires_at_ms) = match change.effect {
            Effect::Put { key, value, expires_at_ms } => {
                (Op::Set, key, Some(bytes.slice_ref(value)), expires_at_ms)
            }
            Effect::Delete { key, reason: Reason::Explicit } => (Op::Delete, key, None, None),
            Effect::Delete { key, reason: Reason::Expired } => (Op::Expire, key, None, None),
        };
        Event {
            op,
            key: bytes.slice_ref(key),
            value,
            partition,
            revision: change.revision,
            version: if op == Op::Set { change.revision } else { 0 },
            previous_version: change.previous,
            previous_value: change.previous_value.map(|value| bytes.slice_ref(value)),
            expires_at_ms,
            committed_at_ms,
            trace: change.trace.and_then(TraceContext::from_bytes),
        }
    });
    Ok(events.collect())
}
