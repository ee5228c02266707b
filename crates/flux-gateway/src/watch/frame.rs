//! Messages of a watch as server-sent events: `id` resumes behind it, `event` says what it is, `data` is
//! the JSON that docs/cdc.md describes.

use bytes::Bytes;
use flux_client::Code;
use flux_proto::event::{Record, write_json};
use flux_proto::grpc::kv_v1::watch_response::Kind;
use flux_proto::grpc::watch::record_of;

/// After so long a client is to come again whom nothing can be shown now.
const RETRY_MS: u32 = 5000;

/// A message as an event; none if it is not one that a client can be told. `is_again` where the watch
/// was under way before.
pub(super) fn of(kind: Kind, token: &str, is_again: bool) -> Option<Vec<u8>> {
    let comment = match kind {
        Kind::KeepAlive(_) => "keep-alive",
        Kind::Started(_) if is_again => "resumed",
        Kind::Started(_) => return Some(event(token, "started", |out| out.extend(b"{}"))),
        kind => {
            let record = record_of(kind)?;
            return Some(event(token, name(&record), |out| write_json(&record, out)));
        }
    };
    // An id alone is no event, but is remembered.
    Some(format!(": {comment}\nid: {token}\n\n").into_bytes())
}

/// The last event of a client that does not keep up. It leaves the id as it was.
pub(super) fn too_slow(message: &str) -> Bytes {
    let code = Code::WatchTooSlow.name();
    let data = serde_json::json!({"error": {"code": code, "message": message}});
    format!("event: too_slow\ndata: {data}\n\n").into()
}

/// The last words to a client that is to come again, in a while. They leave the id as it was.
pub(super) fn come_again(message: &str) -> Bytes {
    format!(": {message}\nretry: {RETRY_MS}\n\n").into()
}

fn name(record: &Record) -> &'static str {
    match record {
        Record::Change(event) => event.op.name(),
        Record::GapBegin(_) => "gap",
        Record::Row { .. } => "row",
        Record::GapEnd { .. } => "rows_end",
    }
}

fn event(token: &str, name: &str, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = format!("id: {token}\nevent: {name}\ndata: ").into_bytes();
    // JSON without a line break in it.
    write(&mut out);
    out.extend_from_slice(b"\n\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use flux_proto::grpc::kv_v1 as wire;

    fn text(kind: Kind, is_again: bool) -> String {
        String::from_utf8(of(kind, "dG9r", is_again).expect("an event")).expect("text")
    }

    #[test]
    fn every_kind_has_its_event() {
        let started = || Kind::Started(wire::Started {});
        assert_eq!(text(started(), false), "id: dG9r\nevent: started\ndata: {}\n\n");
        assert_eq!(text(started(), true), ": resumed\nid: dG9r\n\n");
        let alive = text(Kind::KeepAlive(wire::KeepAlive {}), true);
        assert_eq!(alive, ": keep-alive\nid: dG9r\n\n");
        let change = wire::Change {
            key: "a\nb".into(),
            value: "x".into(),
            revision: 3,
            version: 3,
            ..Default::default()
        };
        let set = text(Kind::Change(change.clone()), true);
        assert!(set.starts_with("id: dG9r\nevent: set\ndata: {\"op\":\"set\",\"key\":\"a\\nb\""));
        assert_eq!(set.lines().count(), 4, "one line of data");
        for (kind, name) in [
            (Kind::Change(wire::Change { kind: 1, ..change.clone() }), "delete"),
            (Kind::Change(wire::Change { kind: 2, ..change }), "expire"),
            (Kind::Gap(wire::Gap { at: 5, lost_from: 1, lost_to: 5, ..Default::default() }), "gap"),
            (Kind::Row(wire::Row { key: "k".into(), number: 1, ..Default::default() }), "row"),
            (Kind::RowsEnd(wire::RowsEnd::default()), "rows_end"),
        ] {
            assert!(text(kind, true).contains(&format!("\nevent: {name}\ndata: {{")), "{name}");
        }
        let partition = 1 << 20;
        let wrong = wire::RowsEnd { partition, ..Default::default() };
        assert_eq!(of(Kind::RowsEnd(wrong), "", true), None);
    }

    #[test]
    fn who_is_too_slow_is_told_in_the_one_shape() {
        let text = String::from_utf8(too_slow("too \"slow\"").to_vec()).expect("text");
        let data = r#"{"error":{"code":"WATCH_TOO_SLOW","message":"too \"slow\""}}"#;
        assert_eq!(text, format!("event: too_slow\ndata: {data}\n\n"));
    }
}
