//! What a watcher is told, as messages of `Watch`, and read back from them.
//!
//! Tokens, `started` and `keep_alive` are not records: who sends or reads a stream knows what to do with
//! them.

use crate::event::{Event, Gap, GapId, Op, Place, Record, TraceContext};

use super::kv_v1 as wire;
use wire::watch_response::Kind;

/// A record as a message.
pub fn kind_of(record: &Record) -> Kind {
    match record {
        Record::Change(event) => Kind::Change(change_of(event)),
        Record::GapBegin(Gap { partition, lost, at, term }) => Kind::Gap(wire::Gap {
            partition: u32::from(*partition),
            lost_from: *lost.start(),
            lost_to: *lost.end(),
            at: at.revision,
            term: *term,
        }),
        Record::Row { gap, number, event } => Kind::Row(wire::Row {
            key: event.key.clone(),
            value: event.value.clone().unwrap_or_default(),
            partition: u32::from(gap.partition),
            version: event.version,
            expires_at_ms: event.expires_at_ms,
            at: gap.at,
            term: gap.term,
            number: *number,
        }),
        &Record::GapEnd { gap: GapId { partition, at, term }, rows } => {
            Kind::RowsEnd(wire::RowsEnd { partition: u32::from(partition), at, term, rows })
        }
    }
}

/// The record of a message; `None` of one that is no record, or that no node sends.
pub fn record_of(kind: Kind) -> Option<Record> {
    match kind {
        Kind::Change(change) => event_of(change).map(Record::Change),
        Kind::Gap(wire::Gap { partition, lost_from, lost_to, at, term }) => {
            let (partition, at) = (partition.try_into().ok()?, Place { revision: at, index: 0 });
            Some(Record::GapBegin(Gap { partition, lost: lost_from..=lost_to, at, term }))
        }
        Kind::Row(row) => {
            let partition = row.partition.try_into().ok()?;
            let event = Event {
                op: Op::Set,
                key: row.key,
                value: Some(row.value),
                partition,
                revision: row.version,
                version: row.version,
                previous_version: 0,
                previous_value: None,
                expires_at_ms: row.expires_at_ms,
                committed_at_ms: 0,
                trace: None,
            };
            let gap = GapId { partition, at: row.at, term: row.term };
            Some(Record::Row { gap, number: row.number, event })
        }
        Kind::RowsEnd(wire::RowsEnd { partition, at, term, rows }) => {
            let gap = GapId { partition: partition.try_into().ok()?, at, term };
            Some(Record::GapEnd { gap, rows })
        }
        Kind::Started(_) | Kind::KeepAlive(_) => None,
    }
}

fn change_of(event: &Event) -> wire::Change {
    let kind = match event.op {
        Op::Set => wire::change::Kind::Set,
        Op::Delete => wire::change::Kind::Delete,
        Op::Expire => wire::change::Kind::Expire,
    };
    wire::Change {
        kind: kind.into(),
        key: event.key.clone(),
        value: event.value.clone().unwrap_or_default(),
        partition: u32::from(event.partition),
        revision: event.revision,
        version: event.version,
        previous_version: event.previous_version,
        previous_value: event.previous_value.clone(),
        expires_at_ms: event.expires_at_ms,
        committed_at_ms: event.committed_at_ms,
        traceparent: event.trace.map_or_else(String::new, |trace| trace.to_string()),
    }
}

fn event_of(change: wire::Change) -> Option<Event> {
    let op = match change.kind() {
        wire::change::Kind::Set => Op::Set,
        wire::change::Kind::Delete => Op::Delete,
        wire::change::Kind::Expire => Op::Expire,
    };
    Some(Event {
        op,
        key: change.key,
        value: (op == Op::Set).then_some(change.value),
        partition: change.partition.try_into().ok()?,
        revision: change.revision,
        version: change.version,
        previous_version: change.previous_version,
        previous_value: change.previous_value,
        expires_at_ms: change.expires_at_ms,
        committed_at_ms: change.committed_at_ms,
        trace: TraceContext::parse(&change.traceparent),
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn event(op: Op) -> Event {
        let is_set = op == Op::Set;
        Event {
            op,
            key: Bytes::from_static(b"k\xff"),
            value: is_set.then(|| Bytes::from_static(b"")),
            partition: 7,
            revision: 41,
            version: if is_set { 41 } else { 0 },
            previous_version: 3,
            previous_value: Some(Bytes::from_static(b"old")),
            expires_at_ms: is_set.then_some(99),
            committed_at_ms: 5,
            trace: Some(TraceContext { trace: [1; 16], span: [2; 8], flags: 1 }),
        }
    }

    #[test]
    fn records_are_what_they_were_after_both_ways() {
        let gap = GapId { partition: 7, at: 50, term: 3 };
        let at = Place { revision: 50, index: 0 };
        let row = Event {
            revision: 30,
            version: 30,
            previous_version: 0,
            previous_value: None,
            committed_at_ms: 0,
            trace: None,
            ..event(Op::Set)
        };
        for record in [
            Record::Change(event(Op::Set)),
            Record::Change(event(Op::Delete)),
            Record::Change(Event { trace: None, previous_value: None, ..event(Op::Expire) }),
            Record::GapBegin(Gap { partition: 7, lost: 3..=50, at, term: 3 }),
            Record::Row { gap, number: 2, event: row },
            Record::GapEnd { gap, rows: 2 },
        ] {
            assert_eq!(record_of(kind_of(&record)), Some(record));
        }
    }

    #[test]
    fn what_no_node_sends_is_no_record() {
        let partition = 65_536;
        assert_eq!(record_of(Kind::Row(wire::Row { partition, ..Default::default() })), None);
        assert_eq!(record_of(Kind::Gap(wire::Gap { partition, ..Default::default() })), None);
        assert_eq!(record_of(Kind::Change(wire::Change { partition, ..Default::default() })), None);
        assert_eq!(record_of(Kind::Started(wire::Started {})), None);
    }
}
