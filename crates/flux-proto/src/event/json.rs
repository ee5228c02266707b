//! A record as JSON: written by hand, since every published change is, and read strictly.
//!
//! A record is one object without a line break: a line of a file, or the body of a message. A body
//! may also be an array of them. The fields stand in one order:
//!
//! ```text
//! op key value partition revision version previous_version expires_at_ms committed_at_ms   always
//! encoding previous_value traceparent phase lost_from lost_to gap row rows            where they apply
//! ```
//!
//! Key and values are text where all of them are UTF-8, else all are base64 and `encoding` says so.
//! The index of a gap's place is not written, and read as 0.
//!
//! What this module does not do: bound the size of what it reads, which its caller has in memory.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;

use super::{Event, Gap, GapId, Op, Place, Record, TraceContext};

/// Why a text is no record.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// It is not JSON, or a field is missing, there twice, or of another type.
    #[error("not an event in JSON")]
    Json(#[from] serde_json::Error),
    /// A field contradicts the others, or has a value that is not defined.
    #[error("`{field}` of an event is wrong: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// What would be right.
        reason: &'static str,
    },
}

/// Appends the record as one JSON object, without a line end.
pub fn write_json(record: &Record, out: &mut Vec<u8>) {
    match record {
        Record::Change(event) => write_event(event, out),
        Record::GapBegin(gap) => {
            write_gap(gap.id(), "begin", out);
            number(",\"lost_from\":", *gap.lost.start(), out);
            number(",\"lost_to\":", *gap.lost.end(), out);
            write_gap_id(gap.id(), out);
        }
        Record::Row { gap, number: row, event } => {
            write_event(event, out);
            write_gap_id(*gap, out);
            number(",\"row\":", *row, out);
        }
        Record::GapEnd { gap, rows } => {
            write_gap(*gap, "end", out);
            write_gap_id(*gap, out);
            number(",\"rows\":", *rows, out);
        }
    }
    out.push(b'}');
}

/// All of an event but the closing brace.
fn write_event(event: &Event, out: &mut Vec<u8>) {
    // Room for the field names and numbers; a value that must be escaped grows the buffer.
    out.reserve(event.bytes() + 256);
    let text = Text::of(event);
    literal("{\"op\":\"", out);
    literal(event.op.name(), out);
    literal("\",\"key\":", out);
    text.write(text.key, &event.key, out);
    literal(",\"value\":", out);
    match &event.value {
        Some(value) => text.write(text.value, value, out),
        None => literal("null", out),
    }
    number(",\"partition\":", u64::from(event.partition), out);
    number(",\"revision\":", event.revision, out);
    number(",\"version\":", event.version, out);
    number(",\"previous_version\":", event.previous_version, out);
    match event.expires_at_ms {
        Some(at) => number(",\"expires_at_ms\":", at, out),
        None => literal(",\"expires_at_ms\":null", out),
    }
    number(",\"committed_at_ms\":", event.committed_at_ms, out);
    if !text.is_text {
        literal(",\"encoding\":\"base64\"", out);
    }
    if let Some(previous) = &event.previous_value {
        literal(",\"previous_value\":", out);
        text.write(text.previous_value, previous, out);
    }
    if let Some(trace) = &event.trace {
        literal(",\"traceparent\":\"", out);
        literal(&trace.to_string(), out);
        out.push(b'"');
    }
}

/// The fields that every record has, of a gap's begin and end, and its phase.
fn write_gap(gap: GapId, phase: &str, out: &mut Vec<u8>) {
    literal("{\"op\":\"gap\",\"key\":null,\"value\":null", out);
    number(",\"partition\":", u64::from(gap.partition), out);
    number(",\"revision\":", gap.at, out);
    literal(",\"version\":0,\"previous_version\":0,\"expires_at_ms\":null", out);
    literal(",\"committed_at_ms\":0,\"phase\":\"", out);
    literal(phase, out);
    out.push(b'"');
}

fn write_gap_id(gap: GapId, out: &mut Vec<u8>) {
    literal(",\"gap\":\"", out);
    literal(&gap.to_string(), out);
    out.push(b'"');
}

/// An event's key and values as text, where all of them are.
struct Text<'a> {
    is_text: bool,
    key: &'a str,
    value: &'a str,
    previous_value: &'a str,
}

impl<'a> Text<'a> {
    fn of(event: &'a Event) -> Text<'a> {
        let optional = |bytes: &'a Option<Bytes>| str::from_utf8(bytes.as_deref().unwrap_or(&[]));
        let key = str::from_utf8(&event.key);
        match (key, optional(&event.value), optional(&event.previous_value)) {
            (Ok(key), Ok(value), Ok(previous_value)) => {
                Text { is_text: true, key, value, previous_value }
            }
            _ => Text { is_text: false, key: "", value: "", previous_value: "" },
        }
    }

    /// Writes one of the fields: `text` if all are text, else `bytes` in base64.
    fn write(&self, text: &str, bytes: &[u8], out: &mut Vec<u8>) {
        out.push(b'"');
        if self.is_text {
            escaped(text.as_bytes(), out);
        } else {
            let start = out.len();
            let length = base64::encoded_len(bytes.len(), true).expect("bytes that are in memory");
            out.resize(start + length, 0);
            STANDARD.encode_slice(bytes, &mut out[start..]).expect("the room is exact");
        }
        out.push(b'"');
    }
}

/// Escapes what JSON does not allow within quotes: quote, backslash and control characters.
fn escaped(text: &[u8], out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut written = 0;
    for (at, &byte) in text.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&text[written..at]);
        written = at + 1;
        match byte {
            b'"' => literal("\\\"", out),
            b'\\' => literal("\\\\", out),
            b'\n' => literal("\\n", out),
            b'\r' => literal("\\r", out),
            b'\t' => literal("\\t", out),
            _ => {
                literal("\\u00", out);
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(&text[written..]);
}

fn literal(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(text.as_bytes());
}

fn number(name: &str, value: u64, out: &mut Vec<u8>) {
    literal(name, out);
    let mut digits = [0; 20];
    let mut start = digits.len();
    let mut rest = value;
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// Reads one record, as [`write_json`] writes it; white space between tokens and unknown fields are
/// passed over.
///
/// # Errors
/// [`EventError`], for everything that `write_json` would not have written.
pub fn read_json(line: &[u8]) -> Result<Record, EventError> {
    serde_json::from_slice::<Line>(line)?.record()
}

/// Reads the body of a message: one record, or an array of them.
///
/// # Errors
/// As [`read_json`], at the first record that is wrong.
pub fn read_json_body(body: &[u8]) -> Result<Vec<Record>, EventError> {
    if body.trim_ascii_start().starts_with(b"[") {
        let lines: Vec<Line> = serde_json::from_slice(body)?;
        lines.into_iter().map(Line::record).collect()
    } else {
        Ok(vec![read_json(body)?])
    }
}

/// The fields of a record, before it is known what they mean together.
#[derive(Deserialize)]
struct Line {
    op: Kind,
    // Without this, a missing field would be read as null.
    #[serde(deserialize_with = "Option::deserialize")]
    key: Option<String>,
    #[serde(deserialize_with = "Option::deserialize")]
    value: Option<String>,
    partition: u16,
    revision: u64,
    version: u64,
    previous_version: u64,
    #[serde(deserialize_with = "Option::deserialize")]
    expires_at_ms: Option<u64>,
    committed_at_ms: u64,
    encoding: Option<Encoding>,
    previous_value: Option<String>,
    traceparent: Option<String>,
    phase: Option<Phase>,
    lost_from: Option<u64>,
    lost_to: Option<u64>,
    gap: Option<String>,
    row: Option<u64>,
    rows: Option<u64>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Set,
    Delete,
    Expire,
    Gap,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Base64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Phase {
    Begin,
    End,
}

fn check(holds: bool, field: &'static str, reason: &'static str) -> Result<(), EventError> {
    if holds { Ok(()) } else { Err(EventError::Field { field, reason }) }
}

fn needed<T>(value: Option<T>, field: &'static str) -> Result<T, EventError> {
    value.ok_or(EventError::Field { field, reason: "it is missing" })
}

impl Line {
    fn record(self) -> Result<Record, EventError> {
        let gap = match &self.gap {
            Some(text) => {
                let parsed = GapId::parse(text).filter(|gap| gap.partition == self.partition);
                let reason = "it must be <partition>/<revision>/<term>, of this partition";
                Some(parsed.ok_or(EventError::Field { field: "gap", reason })?)
            }
            None => None,
        };
        let op = match self.op {
            Kind::Set => Op::Set,
            Kind::Delete => Op::Delete,
            Kind::Expire => Op::Expire,
            Kind::Gap => return self.gap_record(needed(gap, "gap")?),
        };
        check(self.phase.is_none(), "phase", "only a gap has one")?;
        check(self.lost_from.is_none(), "lost_from", "only a gap has one")?;
        check(self.lost_to.is_none(), "lost_to", "only a gap has one")?;
        check(self.rows.is_none(), "rows", "only a gap has them")?;
        let row = self.row;
        let event = self.event(op)?;
        let Some(gap) = gap else {
            check(row.is_none(), "row", "only a row of a gap has one")?;
            return Ok(Record::Change(event));
        };
        let number = needed(row, "row")?;
        check(number >= 1, "row", "rows count from 1")?;
        check(op == Op::Set, "op", "a row is a set")?;
        check(event.revision <= gap.at, "revision", "a row is not newer than its gap")?;
        Ok(Record::Row { gap, number, event })
    }

    fn event(self, op: Op) -> Result<Event, EventError> {
        let encoding = self.encoding;
        let decoded = |text: String, field: &'static str| match encoding {
            None => Ok(Bytes::from(text)),
            Some(Encoding::Base64) => STANDARD
                .decode(text)
                .map(Bytes::from)
                .map_err(|_| EventError::Field { field, reason: "it is not base64" }),
        };
        check(self.revision >= 1, "revision", "revisions count from 1")?;
        if op == Op::Set {
            check(self.value.is_some(), "value", "a set has one")?;
            check(self.version == self.revision, "version", "a set's is its revision")?;
        } else {
            check(self.value.is_none(), "value", "there is none after a delete")?;
            check(self.version == 0, "version", "it is 0 after a delete")?;
            check(self.expires_at_ms.is_none(), "expires_at_ms", "nothing is left to expire")?;
        }
        let earlier = self.previous_version < self.revision;
        check(earlier, "previous_version", "it must be before the revision")?;
        let trace = match self.traceparent {
            Some(text) => Some(TraceContext::parse(&text).ok_or(EventError::Field {
                field: "traceparent",
                reason: "it is not of W3C Trace Context",
            })?),
            None => None,
        };
        Ok(Event {
            op,
            key: decoded(needed(self.key, "key")?, "key")?,
            value: self.value.map(|value| decoded(value, "value")).transpose()?,
            partition: self.partition,
            revision: self.revision,
            version: self.version,
            previous_version: self.previous_version,
            previous_value: self
                .previous_value
                .map(|value| decoded(value, "previous_value"))
                .transpose()?,
            expires_at_ms: self.expires_at_ms,
            committed_at_ms: self.committed_at_ms,
            trace,
        })
    }

    fn gap_record(self, gap: GapId) -> Result<Record, EventError> {
        check(self.key.is_none(), "key", "a gap has none")?;
        check(self.value.is_none(), "value", "a gap has none")?;
        check(self.previous_value.is_none(), "previous_value", "a gap has none")?;
        check(self.encoding.is_none(), "encoding", "a gap has nothing that is encoded")?;
        check(self.traceparent.is_none(), "traceparent", "a gap has none")?;
        check(self.row.is_none(), "row", "a gap's begin and end have none")?;
        check(self.version == 0, "version", "a gap's is 0")?;
        check(self.previous_version == 0, "previous_version", "a gap's is 0")?;
        check(self.expires_at_ms.is_none(), "expires_at_ms", "a gap has none")?;
        check(self.committed_at_ms == 0, "committed_at_ms", "a gap's is 0")?;
        check(self.revision == gap.at, "revision", "a gap's is that of its rows")?;
        match needed(self.phase, "phase")? {
            Phase::Begin => {
                check(self.rows.is_none(), "rows", "they are not known at the begin")?;
                let from = needed(self.lost_from, "lost_from")?;
                let to = needed(self.lost_to, "lost_to")?;
                check(from >= 1, "lost_from", "revisions count from 1")?;
                let of_nothing = gap.at == 0 && from == 1 && to == 0;
                check(from <= to || of_nothing, "lost_to", "it must not be before lost_from")?;
                check(to <= gap.at, "lost_to", "the rows must stand for all that is lost")?;
                Ok(Record::GapBegin(Gap {
                    partition: gap.partition,
                    lost: from..=to,
                    at: Place { revision: gap.at, index: 0 },
                    term: gap.term,
                }))
            }
            Phase::End => {
                check(self.lost_from.is_none(), "lost_from", "the begin has it")?;
                check(self.lost_to.is_none(), "lost_to", "the begin has it")?;
                Ok(Record::GapEnd { gap, rows: needed(self.rows, "rows")? })
            }
        }
    }
}
