//! Events in JSON to the byte, names at the broker, tokens, and what must be refused.

use proptest::prelude::*;

use super::*;
use crate::trace::tests::{EXAMPLE, traces};

fn event(op: Op, key: &'static str, value: Option<&'static str>) -> Event {
    Event {
        op,
        key: Bytes::from_static(key.as_bytes()),
        value: value.map(|value| Bytes::from_static(value.as_bytes())),
        partition: 7,
        revision: 42,
        version: if op == Op::Set { 42 } else { 0 },
        previous_version: 40,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 1_700_000_000_123,
        trace: None,
    }
}

fn set(key: &'static str, value: &'static str) -> Event {
    event(Op::Set, key, Some(value))
}

fn gap() -> Gap {
    Gap { partition: 7, lost: 11..=40, at: Place { revision: 41, index: 0 }, term: 3 }
}

fn json(record: &Record) -> String {
    let mut out = Vec::new();
    write_json(record, &mut out);
    assert_eq!(&read_json(&out).expect("it was just written"), record);
    String::from_utf8(out).expect("JSON is text")
}

#[test]
fn changes_are_one_line_with_their_fields_in_order() {
    assert_eq!(
        json(&Record::Change(Event {
            expires_at_ms: Some(1_700_000_060_123),
            ..set("user:7", "Ann")
        })),
        r#"{"op":"set","key":"user:7","value":"Ann","partition":7,"revision":42,"version":42,"previous_version":40,"expires_at_ms":1700000060123,"committed_at_ms":1700000000123}"#
    );
    assert_eq!(
        json(&Record::Change(event(Op::Delete, "user:7", None))),
        r#"{"op":"delete","key":"user:7","value":null,"partition":7,"revision":42,"version":0,"previous_version":40,"expires_at_ms":null,"committed_at_ms":1700000000123}"#
    );
    let traced = Event {
        previous_value: Some(Bytes::from_static(b"Ann")),
        trace: TraceContext::parse(EXAMPLE),
        ..event(Op::Expire, "user:7", None)
    };
    assert_eq!(
        json(&Record::Change(traced)),
        r#"{"op":"expire","key":"user:7","value":null,"partition":7,"revision":42,"version":0,"previous_version":40,"expires_at_ms":null,"committed_at_ms":1700000000123,"previous_value":"Ann","traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}"#
    );
}

#[test]
fn text_is_escaped_as_json_asks() {
    let awkward = "\"\\\u{0}\u{8}\t\n\u{b}\r\u{1f} \u{7f}é\u{2028}日😀/";
    let line = json(&Record::Change(set("k", awkward)));
    let expected =
        "\"value\":\"\\\"\\\\\\u0000\\u0008\\t\\n\\u000b\\r\\u001f \u{7f}é\u{2028}日😀/\",";
    assert!(line.contains(expected), "{line}");
    assert!(!line.contains('\n') && !line.contains('\r'));
    assert!(json(&Record::Change(set("k", ""))).contains(r#""value":"","#));
}

#[test]
fn what_is_not_text_is_base64_all_of_it() {
    let start = r#"{"op":"set","key":"aw==","value":"/wA=","partition":7,"revision":42,"#;
    let mut binary = set("k", "");
    binary.value = Some(Bytes::from_static(&[0xff, 0]));
    let line = json(&Record::Change(binary.clone()));
    assert!(line.starts_with(start), "{line}");
    assert!(line.ends_with(r#""committed_at_ms":1700000000123,"encoding":"base64"}"#), "{line}");

    binary.key = Bytes::from_static(&[0xc3]);
    binary.value = Some(Bytes::from_static(b"text"));
    let line = json(&Record::Change(binary));
    assert!(line.starts_with(r#"{"op":"set","key":"ww==","value":"dGV4dA==","#), "{line}");

    let mut deleted = event(Op::Delete, "k", None);
    deleted.previous_value = Some(Bytes::from_static(&[0x80]));
    let line = json(&Record::Change(deleted));
    assert!(line.starts_with(r#"{"op":"delete","key":"aw==","value":null,"#), "{line}");
    assert!(line.ends_with(r#","encoding":"base64","previous_value":"gA=="}"#), "{line}");
}

#[test]
fn a_gap_has_a_begin_rows_and_an_end() {
    assert_eq!(
        json(&Record::GapBegin(gap())),
        r#"{"op":"gap","key":null,"value":null,"partition":7,"revision":41,"version":0,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0,"phase":"begin","lost_from":11,"lost_to":40,"gap":"7/41/3"}"#
    );
    let row = Event {
        revision: 9,
        version: 9,
        previous_version: 0,
        committed_at_ms: 0,
        ..set("user:7", "Ann")
    };
    assert_eq!(
        json(&Record::Row { gap: gap().id(), number: 1, event: row }),
        r#"{"op":"set","key":"user:7","value":"Ann","partition":7,"revision":9,"version":9,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0,"gap":"7/41/3","row":1}"#
    );
    assert_eq!(
        json(&Record::GapEnd { gap: gap().id(), rows: 1 }),
        r#"{"op":"gap","key":null,"value":null,"partition":7,"revision":41,"version":0,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0,"phase":"end","gap":"7/41/3","rows":1}"#
    );
    // A snapshot of a partition that was never written to.
    let of_nothing = Gap { lost: RangeInclusive::new(1, 0), at: Place::default(), ..gap() };
    assert!(
        json(&Record::GapBegin(of_nothing)).contains(r#""lost_from":1,"lost_to":0,"gap":"7/0/3""#)
    );
}

#[test]
fn the_index_of_a_place_stays_inside() {
    let mut out = Vec::new();
    write_json(&Record::GapBegin(Gap { at: Place { revision: 41, index: 99 }, ..gap() }), &mut out);
    assert_eq!(read_json(&out).unwrap(), Record::GapBegin(gap()));
}

#[test]
fn unknown_fields_and_white_space_are_passed_over() {
    let mut line = json(&Record::Change(set("k", "v")));
    line.truncate(line.len() - 1);
    let line = format!(" {line} , \"later\": [{{\"op\": 1}}] }}\n");
    assert_eq!(read_json(line.as_bytes()).unwrap(), Record::Change(set("k", "v")));
}

#[test]
fn a_body_is_a_record_or_several() {
    let records = [Record::Change(set("a", "1")), Record::Change(event(Op::Delete, "b", None))];
    let [first, second] = records.each_ref().map(json);
    assert_eq!(read_json_body(first.as_bytes()).unwrap(), records[..1]);
    assert_eq!(read_json_body(format!(" [{first},\n{second}]").as_bytes()).unwrap(), records);
    assert_eq!(read_json_body(b"[]").unwrap(), []);
    assert!(read_json_body(format!("[{first},{{}}]").as_bytes()).is_err());
    assert!(read_json_body(format!("[{first}").as_bytes()).is_err());
    assert!(read_json(format!("[{first}]").as_bytes()).is_err());
}

/// Replaces one part of a good line, which must be there, and gives what is said of the result.
fn refused(record: &Record, from: &str, to: &str) -> String {
    let line = json(record);
    assert!(line.contains(from), "{line} has no {from}");
    let changed = line.replacen(from, to, 1);
    match read_json(changed.as_bytes()) {
        Ok(record) => panic!("{changed} was read as {record:?}"),
        Err(EventError::Json(error)) => error.to_string(),
        Err(error @ EventError::Field { .. }) => error.to_string(),
    }
}

#[test]
fn a_change_that_contradicts_itself_is_refused() {
    let change = Record::Change(set("k", "v"));
    let refused = |from, to| refused(&change, from, to);
    assert_eq!(refused("\"v\"", "null"), "`value` of an event is wrong: a set has one");
    assert_eq!(refused("\"k\"", "null"), "`key` of an event is wrong: it is missing");
    assert!(refused("\"key\":\"k\",", "").contains("missing field `key`"));
    assert!(refused("\"value\":\"v\",", "").contains("missing field `value`"));
    assert!(refused("\"expires_at_ms\":null,", "").contains("missing field `expires_at_ms`"));
    assert!(refused("\"committed_at_ms\"", "\"committed_at\"").contains("missing field"));
    assert!(refused("\"set\"", "\"put\"").contains("unknown variant `put`"));
    assert!(refused("\"set\"", "\"delete\"").contains("`value`"));
    assert!(refused("\"set\"", "\"gap\"").contains("`gap`"));
    assert!(refused("\"partition\":7", "\"partition\":65536").contains("invalid value"));
    assert!(refused("\"revision\":42", "\"revision\":-42").contains("invalid value"));
    assert!(refused("\"revision\":42", "\"revision\":\"42\"").contains("invalid type"));
    assert!(refused("\"revision\":42", "\"revision\":0").contains("`revision`"));
    assert!(refused("\"version\":42", "\"version\":41").contains("`version`"));
    assert!(refused("\"previous_version\":40", "\"previous_version\":42").contains("`previous_"));
    assert!(refused("\"op\":\"set\"", "\"op\":\"set\",\"op\":\"set\"").contains("duplicate field"));
    assert!(refused("}", ",\"encoding\":\"hex\"}").contains("unknown variant `hex`"));
    assert!(refused("}", ",\"encoding\":\"base64\"}").contains("not base64"));
    assert!(refused("}", ",\"traceparent\":\"00\"}").contains("`traceparent`"));
    assert!(refused("}", ",\"row\":1}").contains("`row`"));
    assert!(refused("}", ",\"rows\":1}").contains("`rows`"));
    assert!(refused("}", ",\"phase\":\"end\"}").contains("`phase`"));
    assert!(refused("}", ",\"lost_from\":1}").contains("`lost_from`"));
    assert!(refused("}", ",\"lost_to\":1}").contains("`lost_to`"));
    assert!(refused("}", "}{").contains("trailing"));
    assert!(refused("}", "").contains("EOF"));
    assert!(refused("\"v\"", "\"\\ud800\"").contains("hex escape"));
    let expired = Record::Change(event(Op::Expire, "k", None));
    assert!(self::refused(&expired, "\"version\":0", "\"version\":42").contains("`version`"));
    let timed = "\"expires_at_ms\":5";
    assert!(self::refused(&expired, "\"expires_at_ms\":null", timed).contains("`expires_at_ms`"));
}

#[test]
fn a_gap_that_contradicts_itself_is_refused() {
    let begin = Record::GapBegin(gap());
    for (from, to, field) in [
        ("\"key\":null", "\"key\":\"k\"", "`key`"),
        ("\"value\":null", "\"value\":\"v\"", "`value`"),
        ("\"revision\":41", "\"revision\":42", "`revision`"),
        ("\"version\":0", "\"version\":1", "`version`"),
        ("\"committed_at_ms\":0", "\"committed_at_ms\":1", "`committed_at_ms`"),
        ("\"lost_from\":11", "\"lost_from\":0", "`lost_from`"),
        ("\"lost_from\":11", "\"lost_from\":41", "`lost_to`"),
        ("\"lost_to\":40", "\"lost_to\":42", "`lost_to`"),
        ("\"lost_to\":40,", "", "`lost_to`"),
        ("\"phase\":\"begin\",", "", "`phase`"),
        ("\"begin\"", "\"end\"", "`lost_from`"),
        ("\"7/41/3\"", "\"8/41/3\"", "`gap`"),
        ("\"7/41/3\"", "\"7/41\"", "`gap`"),
        ("\"7/41/3\"", "\"7/+41/3\"", "`gap`"),
        ("\"7/41/3\"", "\"7/041/3\"", "`gap`"),
        ("\"7/41/3\"", "\"7/41/3/\"", "`gap`"),
        (",\"gap\":\"7/41/3\"", "", "`gap`"),
        ("\"gap\":\"7/41/3\"", "\"gap\":\"7/41/3\",\"row\":1", "`row`"),
        ("\"gap\":\"7/41/3\"", "\"gap\":\"7/41/3\",\"rows\":1", "`rows`"),
    ] {
        let error = refused(&begin, from, to);
        assert!(error.contains(field), "{from} -> {to}: {error}");
    }
    let end = Record::GapEnd { gap: gap().id(), rows: 5 };
    assert!(refused(&end, ",\"rows\":5", "").contains("`rows`"));
    assert!(refused(&end, "\"end\"", "\"begin\"").contains("`rows`"));

    let row = Record::Row { gap: GapId { at: 42, ..gap().id() }, number: 1, event: set("k", "v") };
    assert!(refused(&row, "\"row\":1", "\"row\":0").contains("`row`"));
    assert!(refused(&row, ",\"row\":1", "").contains("`row`"));
    assert!(refused(&row, "7/42/3", "7/41/3").contains("`revision`"));
    let deleted = "\"op\":\"delete\"";
    assert!(refused(&row, "\"op\":\"set\"", deleted).contains("`value`"));
}

#[test]
fn routing_keys_say_the_operation_and_the_key() {
    let key = |key: &'static [u8]| {
        let key = Bytes::from_static(key);
        routing_key(&Record::Change(Event { key, ..set("", "v") }))
    };
    assert_eq!(key(b"user:7/name"), "set.user.7.name");
    assert_eq!(key(b"a.b::c//"), "set.a.b..c..");
    assert_eq!(key(b"{user:7}:name"), "set.{user.7}.name");
    assert_eq!(key("stra\u{df}e".as_bytes()), "set.stra\u{df}e");
    assert_eq!(key(b"a\xff\xc3b\xe2\x82"), "set.a__b__");
    assert_eq!(routing_key(&Record::Change(event(Op::Delete, "k", None))), "delete.k");
    assert_eq!(routing_key(&Record::Change(event(Op::Expire, "k", None))), "expire.k");
    let row = Record::Row { gap: gap().id(), number: 1, event: set("user:7", "v") };
    assert_eq!(routing_key(&row), "set.user.7");
    assert_eq!(routing_key(&Record::GapBegin(gap())), "gap.partition-7");
    assert_eq!(routing_key(&Record::GapEnd { gap: gap().id(), rows: 0 }), "gap.partition-7");
}

#[test]
fn routing_keys_are_cut_at_a_character() {
    let cut = |key: String| routing_key(&Record::Change(Event { key: key.into(), ..set("", "v") }));
    assert_eq!(cut("k".repeat(251)), format!("set.{}", "k".repeat(251)));
    assert_eq!(cut("k".repeat(252)), format!("set.{}", "k".repeat(251)));
    assert_eq!(cut("k".repeat(65_536)).len(), 255);
    // 3 bytes each: 83 of them end at byte 253, and the next would end at 256.
    assert_eq!(cut("\u{20ac}".repeat(100)), format!("set.{}", "\u{20ac}".repeat(83)));
    // A later character that would fit is not taken.
    assert_eq!(cut(format!("{}\u{20ac}k", "k".repeat(250))), format!("set.{}", "k".repeat(250)));
}

#[test]
fn message_ids_name_what_a_message_holds() {
    assert_eq!(message_id("flux", &Record::Change(set("k", "v"))), "flux/7/42");
    assert_eq!(message_id("flux", &Record::GapBegin(gap())), "flux/7/gap-41-3-begin");
    let row = Record::Row { gap: gap().id(), number: 12, event: set("k", "v") };
    assert_eq!(message_id("flux", &row), "flux/7/gap-41-3-12");
    assert_eq!(
        message_id("flux", &Record::GapEnd { gap: gap().id(), rows: 12 }),
        "flux/7/gap-41-3-end"
    );
}

#[test]
fn a_token_is_bytes_that_are_known() {
    let token =
        Token { cluster: 0x0102_0304_0506_0708, positions: vec![(0, 5), (1, 0), (300, 1 << 63)] };
    let mut expected = vec![1, 8, 7, 6, 5, 4, 3, 2, 1, 0, 5, 0, 0, 0xaa, 2];
    expected.extend([0x80; 9]);
    expected.push(1);
    assert_eq!(token.encode(), expected);
    assert_eq!(Token::decode(&expected), Some(token));
    let empty = Token { cluster: 9, positions: Vec::new() };
    assert_eq!(Token::decode(&empty.encode()), Some(empty));

    for length in 0..expected.len() {
        let shorter = Token::decode(&expected[..length]);
        // It ends between two partitions: another token, and a right one.
        let between = [9, 11, 13].contains(&length);
        assert_eq!(shorter.is_some(), between, "the first {length} bytes");
    }
    for (wrong, why) in [
        (&[2, 0, 0, 0, 0, 0, 0, 0, 0][..], "another format"),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 1], "a varint with a byte too many"),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 3, 1, 0, 1], "a partition past the last"),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x80, 4, 1], "a partition of 17 bits"),
        (
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
            "a revision of 65 bits",
        ),
    ] {
        assert_eq!(Token::decode(wrong), None, "{why}");
    }
}

#[test]
fn a_token_of_every_partition_is_small() {
    let positions = (0..1024).map(|partition| (partition, 2_000_000)).collect();
    assert_eq!(Token { cluster: u64::MAX, positions }.encode().len(), 9 + 1024 * 4);
}

#[test]
#[should_panic(expected = "partition 3 of a token is out of order")]
fn a_token_out_of_order_is_a_defect() {
    Token { cluster: 1, positions: vec![(3, 1), (3, 2)] }.encode();
}

fn bytes() -> impl Strategy<Value = Bytes> {
    let text = any::<String>().prop_map(Bytes::from);
    prop_oneof![text, proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)]
}

fn events() -> impl Strategy<Value = Event> {
    let ops = prop_oneof![Just(Op::Set), Just(Op::Delete), Just(Op::Expire)];
    let values = (bytes(), bytes(), proptest::option::of(bytes()));
    let numbers = (any::<u16>(), 1..=u64::MAX, any::<u64>(), any::<Option<u64>>(), any::<u64>());
    (ops, values, numbers, traces()).prop_map(
        |(op, (key, value, previous_value), numbers, trace)| {
            let (partition, revision, previous, expires_at_ms, committed_at_ms) = numbers;
            let is_set = op == Op::Set;
            Event {
                op,
                key,
                value: is_set.then_some(value),
                partition,
                revision,
                version: if is_set { revision } else { 0 },
                previous_version: previous % revision,
                previous_value,
                expires_at_ms: expires_at_ms.filter(|_| is_set),
                committed_at_ms,
                trace,
            }
        },
    )
}

fn records() -> impl Strategy<Value = Record> {
    let rows = (events(), 1..=u64::MAX, any::<u64>(), any::<u64>()).prop_filter_map(
        "rows are sets",
        |(event, number, newer, term)| {
            let at = event.revision.saturating_add(newer);
            let gap = GapId { partition: event.partition, at, term };
            (event.op == Op::Set).then_some(Record::Row { gap, number, event })
        },
    );
    let gaps = (any::<u16>(), 1..=u64::MAX, any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(partition, at, from, to, term)| {
            let from = 1 + from % at;
            let to = from + (to % (at - from + 1));
            let at = Place { revision: at, index: 0 };
            Gap { partition, lost: from..=to, at, term }
        },
    );
    let ends = (any::<u16>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(partition, at, term, rows)| Record::GapEnd { gap: GapId { partition, at, term }, rows },
    );
    prop_oneof![
        4 => events().prop_map(Record::Change),
        2 => rows,
        1 => gaps.prop_map(Record::GapBegin),
        1 => ends,
    ]
}

proptest! {
    #[test]
    fn json_reads_back_as_itself(records in proptest::collection::vec(records(), 1..4)) {
        let mut body = vec![b'['];
        for record in &records {
            let mut line = Vec::new();
            write_json(record, &mut line);
            prop_assert!(!line.contains(&b'\n'));
            prop_assert_eq!(&read_json(&line).unwrap(), record);
            // A foreign reader agrees that it is JSON, with the fields of the issue first.
            let object: serde_json::Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(object["revision"].as_u64(), Some(record.revision()));
            prop_assert_eq!(object["partition"].as_u64(), Some(u64::from(record.partition())));
            if body.len() > 1 {
                body.push(b',');
            }
            body.extend(line);
        }
        body.push(b']');
        prop_assert_eq!(read_json_body(&body).unwrap(), records);
    }

    #[test]
    fn routing_keys_are_short_text_that_begins_with_the_operation(event in events()) {
        let key = routing_key(&Record::Change(event.clone()));
        prop_assert!(key.len() <= MAX_ROUTING_KEY_BYTES);
        prop_assert!(key.starts_with(event.op.name()));
        prop_assert!(!key.contains([':', '/']));
    }

    #[test]
    fn tokens_read_back_as_themselves(
        cluster in any::<u64>(),
        positions in proptest::collection::btree_map(any::<u16>(), any::<u64>(), 0..50),
    ) {
        let token = Token { cluster, positions: positions.into_iter().collect() };
        prop_assert_eq!(Token::decode(&token.encode()), Some(token));
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        exercise(&bytes);
    }

    #[test]
    fn tokens_that_are_nearly_right_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 8..40)) {
        let mut token = vec![1];
        token.extend(bytes);
        exercise(&token);
    }

    /// Lines that are nearly right reach further than noise.
    #[test]
    fn no_damaged_line_panics(
        record in records(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut line = Vec::new();
        write_json(&record, &mut line);
        for (at, byte) in damage {
            let at = at.index(line.len());
            line[at] = byte;
        }
        if let Some(cut) = cut {
            line.truncate(cut.index(line.len()));
        }
        exercise(&line);
    }
}
