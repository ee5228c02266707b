//! A message as the broker gets it: body, routing key, id, and headers.
//!
//! The headers are the attributes of CloudEvents 1.0 in its AMQP binding (binary mode), and
//! `traceparent` of W3C Trace Context. docs/cdc.md describes the format.
//!
//! What this module does not do: decide what goes into a message, or write frames.

use std::fmt::Write as _;

use flux_proto::event::{Op, Record, message_id, routing_key, write_json};

use crate::lane::Message;

/// A key is the subject only up to this length: the headers of a message must fit into one frame,
/// and a part of a key would be another key.
pub const MAX_SUBJECT_BYTES: usize = 1024;

/// One message, ready for the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// Of a change or row `<op>.<key>`, of the begin and end of a gap `gap.partition-<n>`, and
    /// `batch.partition-<n>` of everything else where batches are sent.
    pub routing_key: String,
    /// Says what the message holds: sent again, it has the same id or one that overlaps it.
    pub message_id: String,
    /// Names and values, in the order in which they are sent.
    pub headers: Vec<(&'static str, String)>,
    /// When the first change was committed, in seconds since the Unix epoch; 0 where not known.
    pub timestamp: u64,
    /// A record in JSON, or an array of them.
    pub body: Vec<u8>,
}

impl Publication {
    /// Changes and rows are sent as an array where `batches` says so, however few they are, so that
    /// consumers can rely on the form. Else the message must hold one record.
    ///
    /// # Panics
    /// If it holds several and no batches are sent.
    pub fn new(cluster: &str, message: &Message, batches: bool) -> Publication {
        let mut records = message.records();
        let first = records.next().expect("a message is never empty");
        let publication = match message {
            Message::Changes(_) | Message::Rows { .. } if batches => {
                Publication::batch(cluster, message, &first)
            }
            _ => Publication::one(cluster, &first),
        };
        assert!(batches || records.next().is_none(), "several records where no batches are sent");
        publication
    }

    fn one(cluster: &str, record: &Record) -> Publication {
        let id = message_id(cluster, record);
        let kind = match record {
            Record::Change(event) => match event.op {
                Op::Set => "flux-kv.set",
                Op::Delete => "flux-kv.delete",
                Op::Expire => "flux-kv.expire",
            },
            Record::GapBegin(_) => "flux-kv.gap.begin",
            Record::Row { .. } => "flux-kv.gap.row",
            Record::GapEnd { .. } => "flux-kv.gap.end",
        };
        let event = event_of(record);
        let committed_at_ms = event.map_or(0, |event| event.committed_at_ms);
        let mut headers = attributes(cluster, record.partition(), &id, kind, committed_at_ms);
        let key = event.filter(|event| event.key.len() <= MAX_SUBJECT_BYTES);
        // An attribute is text without control characters.
        if let Some(Ok(subject)) = key.map(|event| str::from_utf8(&event.key))
            && !subject.is_empty()
            && !subject.contains(char::is_control)
        {
            headers.push(("cloudEvents:subject", subject.to_owned()));
        }
        if let Some(trace) = event.and_then(|event| event.trace) {
            headers.push(("traceparent", trace.to_string()));
        }
        let mut body = Vec::new();
        write_json(record, &mut body);
        let timestamp = committed_at_ms / 1000;
        Publication { routing_key: routing_key(record), message_id: id, headers, timestamp, body }
    }

    fn batch(cluster: &str, message: &Message, first: &Record) -> Publication {
        let partition = first.partition();
        let mut body = Vec::new();
        let mut last = first.revision();
        for record in message.records() {
            body.push(if body.is_empty() { b'[' } else { b',' });
            last = record.revision();
            write_json(&record, &mut body);
        }
        body.push(b']');
        let mut id = message_id(cluster, first);
        if let Message::Rows { first, events, .. } = message {
            last = first + events.len() as u64 - 1;
        }
        write!(id, "-{last}").expect("a string takes everything");
        let committed_at_ms = event_of(first).map_or(0, |event| event.committed_at_ms);
        let headers = attributes(cluster, partition, &id, "flux-kv.batch", committed_at_ms);
        Publication {
            routing_key: format!("batch.partition-{partition}"),
            message_id: id,
            headers,
            timestamp: committed_at_ms / 1000,
            body,
        }
    }
}

/// The attributes that every message has, and the time where it is known.
fn attributes(
    cluster: &str,
    partition: u16,
    id: &str,
    kind: &str,
    committed_at_ms: u64,
) -> Vec<(&'static str, String)> {
    let mut headers = Vec::with_capacity(7);
    headers.push(("cloudEvents:specversion", "1.0".to_owned()));
    headers.push(("cloudEvents:id", id.to_owned()));
    headers.push(("cloudEvents:source", format!("/flux-kv/{cluster}/{partition}")));
    headers.push(("cloudEvents:type", kind.to_owned()));
    if committed_at_ms > 0 {
        headers.push(("cloudEvents:time", rfc3339(committed_at_ms)));
    }
    headers
}

fn event_of(record: &Record) -> Option<&flux_proto::event::Event> {
    match record {
        Record::Change(event) | Record::Row { event, .. } => Some(event),
        Record::GapBegin(_) | Record::GapEnd { .. } => None,
    }
}

/// A time as RFC 3339 has it, in UTC. The date is by "days to civil" of Howard Hinnant's "chrono-Compatible
/// Low-Level Date Algorithms".
fn rfc3339(unix_ms: u64) -> String {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    const DAYS_FROM_0000_03_01: u64 = 719_468;
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let days = seconds / 86_400 + DAYS_FROM_0000_03_01;
    let (era, day_of_era) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
    let leap = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Years begin in March here, so that a leap day is the last one.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use flux_proto::event::{Event, Gap, Place, TraceContext, read_json_body};

    use super::*;

    fn event(key: &'static [u8], revision: u64) -> Event {
        Event {
            op: Op::Set,
            key: Bytes::from_static(key),
            value: Some(Bytes::from_static(b"v")),
            partition: 7,
            revision,
            version: revision,
            previous_version: 0,
            previous_value: None,
            expires_at_ms: None,
            committed_at_ms: 1_709_210_096_789,
            trace: None,
        }
    }

    fn gap() -> Gap {
        Gap { partition: 7, lost: 5..=20, at: Place { revision: 20, index: 31 }, term: 3 }
    }

    fn header<'a>(publication: &'a Publication, name: &str) -> Option<&'a str> {
        let found = publication.headers.iter().find(|(header, _)| *header == name);
        found.map(|(_, value)| value.as_str())
    }

    #[test]
    fn a_change_alone_has_all_its_attributes() {
        let trace = TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let change = Event { trace, ..event(b"user:7/name", 41) };
        let publication = Publication::new("blue", &Message::Changes(vec![change.clone()]), false);
        assert_eq!(publication.routing_key, "set.user.7.name");
        assert_eq!(publication.message_id, "blue/7/41");
        assert_eq!(publication.timestamp, 1_709_210_096);
        let expected = [
            ("cloudEvents:specversion", "1.0"),
            ("cloudEvents:id", "blue/7/41"),
            ("cloudEvents:source", "/flux-kv/blue/7"),
            ("cloudEvents:type", "flux-kv.set"),
            ("cloudEvents:time", "2024-02-29T12:34:56.789Z"),
            ("cloudEvents:subject", "user:7/name"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ];
        assert_eq!(publication.headers, expected.map(|(name, value)| (name, value.to_owned())));
        let records = read_json_body(&publication.body).expect("it was written here");
        assert_eq!(records, [Record::Change(change)]);
    }

    #[test]
    fn only_a_key_that_is_readable_and_short_is_the_subject() {
        let long = Bytes::from(vec![b'k'; MAX_SUBJECT_BYTES + 1]);
        for key in [Bytes::from_static(b"a\xff"), Bytes::from_static(b"a\nb"), long, Bytes::new()] {
            let change = Event { key, ..event(b"", 1) };
            let publication = Publication::new("c", &Message::Changes(vec![change]), false);
            assert_eq!(header(&publication, "cloudEvents:subject"), None);
        }
    }

    #[test]
    fn a_batch_is_an_array_however_small() {
        let (first, second) = (event(b"a", 5), event(b"b", 6));
        let both = Message::Changes(vec![first.clone(), second.clone()]);
        let publication = Publication::new("c", &both, true);
        assert_eq!(publication.routing_key, "batch.partition-7");
        assert_eq!(publication.message_id, "c/7/5-6");
        assert_eq!(header(&publication, "cloudEvents:id"), Some("c/7/5-6"));
        assert_eq!(header(&publication, "cloudEvents:type"), Some("flux-kv.batch"));
        assert_eq!(header(&publication, "cloudEvents:subject"), None);
        let records = read_json_body(&publication.body).expect("it was written here");
        assert_eq!(records, [Record::Change(first.clone()), Record::Change(second)]);

        let one = Publication::new("c", &Message::Changes(vec![first]), true);
        assert_eq!(one.message_id, "c/7/5-5");
        assert!(one.body.starts_with(b"[{") && one.body.ends_with(b"}]"));
    }

    #[test]
    fn the_parts_of_a_gap_say_what_they_are() {
        let rows = |events| Message::Rows { gap: gap().id(), first: 8, events };
        let (row, other) = (Event { committed_at_ms: 0, ..event(b"a", 3) }, event(b"b", 9));
        let messages = [
            (Message::GapBegin(gap()), false, "c/7/gap-20-3-begin", "gap.partition-7"),
            (Message::GapBegin(gap()), true, "c/7/gap-20-3-begin", "gap.partition-7"),
            (rows(vec![row.clone()]), false, "c/7/gap-20-3-8", "set.a"),
            (rows(vec![row.clone(), other]), true, "c/7/gap-20-3-8-9", "batch.partition-7"),
            (
                Message::GapEnd { gap: gap().id(), rows: 9 },
                true,
                "c/7/gap-20-3-end",
                "gap.partition-7",
            ),
        ];
        for (message, batches, id, key) in messages {
            let publication = Publication::new("c", &message, batches);
            assert_eq!(publication.message_id, id);
            assert_eq!(publication.routing_key, key);
            // The place of a gap is not written.
            let records = read_json_body(&publication.body).expect("it was written here");
            assert_eq!(records.len(), message.records().len());
            let no_time = message == Message::GapBegin(gap()) || message.events().contains(&row);
            assert!(!no_time || header(&publication, "cloudEvents:time").is_none());
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let known = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        ];
        for (unix_ms, text) in known {
            assert_eq!(rfc3339(unix_ms), text);
        }
        assert!(rfc3339(u64::MAX).ends_with('Z'));
    }
}
