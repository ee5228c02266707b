//! The format to the byte, batches that come back as they went, and damage.

use proptest::prelude::*;

use super::*;

#[test]
fn a_batch_is_what_the_format_says() {
    let mut writer = BatchWriter::new(vec![9; 100]);
    writer.start(0x0102, 7);
    writer.put(b"k", b"vv", None);
    writer.put(b"k", b"", Some(0x0304));
    writer.delete(b"key", Reason::Explicit);
    let last = writer.delete(b"k", Reason::Expired);
    let expected = [
        &[1, 2, 1, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0][..],
        &[1, 1, 2, b'k', b'v', b'v'],
        &[2, 1, 0, 4, 3, 0, 0, 0, 0, 0, 0, b'k'],
        &[3, 3, b'k', b'e', b'y'],
        &[4, 1, b'k'],
    ]
    .concat();
    assert_eq!(writer.payload(), expected);
    assert_eq!(last, expected.len() - 3);

    let effects = Effects::new(writer.payload()).expect("a valid header");
    assert_eq!((effects.committed_at_ms(), effects.next_revision()), (0x0102, 7));
    let effects: Result<Vec<_>, _> = effects.collect();
    let expected = vec![
        (7, Effect::Put { key: b"k", value: b"vv", expires_at_ms: None }),
        (8, Effect::Put { key: b"k", value: b"", expires_at_ms: Some(0x0304) }),
        (9, Effect::Delete { key: b"key", reason: Reason::Explicit }),
        (10, Effect::Delete { key: b"k", reason: Reason::Expired }),
    ];
    assert_eq!(effects, Ok(expected));
}

#[test]
fn an_answer_is_what_the_format_says() {
    let once = Once { session: 0x0102, sequence: 3, acked_below: 2 };
    let mut writer = BatchWriter::default();
    writer.start(0, 7);
    writer.answer(&once, b"reply");
    writer.delete(b"k", Reason::Explicit);
    let last = writer.answer(&once, b"");
    let words = [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    let expected = [
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0x81][..],
        &words,
        b"\x05reply",
        &[3, 1, b'k', 0x81],
        &words,
        &[0],
    ]
    .concat();
    assert_eq!(writer.payload(), expected);
    assert_eq!(last, expected.len() - 26);

    let delete = (7, Effect::Delete { key: b"k", reason: Reason::Explicit });
    let parts: Result<Vec<_>, _> = Parts::new(writer.payload()).expect("a header").collect();
    let expected = vec![
        Part::Answer { once, reply: b"reply" },
        Part::Effect(delete.0, delete.1),
        Part::Answer { once, reply: b"" },
    ];
    assert_eq!(parts, Ok(expected));
    let effects: Result<Vec<_>, _> = Effects::new(writer.payload()).expect("a header").collect();
    assert_eq!(effects, Ok(vec![delete]));
}

const TRACE_OF_ONES: Trace = [1; 25];

#[test]
fn what_readers_of_changes_want_is_what_the_format_says() {
    let mut writer = BatchWriter::default();
    writer.start(0, 300);
    writer.trace(&TRACE_OF_ONES);
    writer.put(b"a", b"", None);
    writer.trace(&NO_TRACE);
    let cursor = Cursor { revision: 0x0102, index: 3 };
    let at = writer.cursor(&Cursor::default());
    writer.replace_cursor(at, &cursor);
    writer.delete(b"b", Reason::Explicit);
    writer.put(b"c", b"", None);
    writer.begin_previous_versions();
    writer.previous_version(300, 0);
    writer.previous_version(301, 300);
    writer.previous_version(302, 2);
    writer.begin_previous_values();
    writer.previous_value(None);
    writer.previous_value(Some(b""));
    writer.previous_value(Some(b"old"));
    let expected = [
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 44, 1, 0, 0, 0, 0, 0, 0, 0x84][..],
        &[1; 25],
        &[1, 1, 0, b'a', 0x84],
        &[0; 25],
        &[0x85, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
        &[3, 1, b'b', 1, 1, 0, b'c'],
        &[0x82, 0, 1, 0xac, 2],
        &[0x83, 0, 1, 4, b'o', b'l', b'd'],
    ]
    .concat();
    assert_eq!(writer.payload(), expected);

    let mut changes = Changes::new(writer.payload()).expect("a batch");
    assert_eq!((changes.committed_at_ms(), changes.next_revision()), (0, 300));
    let change = |revision, effect, previous, previous_value, trace| Change {
        revision,
        effect,
        previous,
        previous_value,
        trace,
    };
    let put = |key| Effect::Put { key, value: b"", expires_at_ms: None };
    let delete = Effect::Delete { key: b"b", reason: Reason::Explicit };
    let expected = [
        change(300, put(b"a"), 0, None, Some(&TRACE_OF_ONES)),
        change(301, delete, 300, Some(b"".as_slice()), None),
        change(302, put(b"c"), 2, Some(b"old"), None),
    ];
    assert!(changes.by_ref().eq(expected));
    assert_eq!(cursor_of(writer.payload()), Ok(Some(cursor)));
    let effects = Effects::new(writer.payload()).expect("a batch");
    let revisions: Result<Vec<_>, _> =
        effects.map(|one| one.map(|(revision, _)| revision)).collect();
    assert_eq!(revisions, Ok(vec![300, 301, 302]));
    // Every prefix is a batch or refused, and never another one.
    for length in 0..writer.payload().len() {
        if let Ok(changes) = Changes::new(&writer.payload()[..length]) {
            assert!(changes.count() <= 3);
        }
    }
}

#[test]
fn a_batch_of_an_older_version_says_nothing_of_before() {
    let mut writer = BatchWriter::default();
    writer.start(0, 7);
    writer.put(b"a", b"", None);
    let changes = Changes::new(writer.payload()).expect("a batch");
    let changes: Vec<_> =
        changes.map(|one| (one.previous, one.previous_value, one.trace)).collect();
    assert_eq!(changes, [(0, None, None)]);
    assert_eq!(cursor_of(writer.payload()), Ok(None));
}

#[test]
fn the_newest_cursor_of_a_batch_counts() {
    let mut writer = BatchWriter::default();
    writer.start(0, 7);
    for revision in [2, 5, 4] {
        writer.cursor(&Cursor { revision, index: revision });
    }
    assert_eq!(cursor_of(writer.payload()), Ok(Some(Cursor { revision: 5, index: 5 })));
}

#[test]
fn parts_that_end_a_batch_are_in_their_place_or_refused() {
    let header = [1, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
    let put = [1, 1, 0, b'a'];
    let read = |parts: &[&[u8]]| {
        Changes::new(&[&header[..], &parts.concat()].concat()).map(Iterator::count)
    };
    let misplaced = |offset| Err(EffectError::Misplaced { offset });
    assert_eq!(read(&[&put, &[0x82, 0], &[0x83, 0]]), Ok(1));
    assert_eq!(read(&[&put, &[0x83, 0]]), misplaced(21));
    assert_eq!(read(&[&put, &[0x82, 0], &put]), misplaced(23));
    assert_eq!(read(&[&put, &[0x82, 0], &[0x82, 0]]), misplaced(23));
    assert_eq!(read(&[&put, &[0x82, 0], &[0x83, 0], &[0x83, 0]]), misplaced(25));
    assert_eq!(read(&[&put, &[0x82, 0], &[0x84; 26]]), misplaced(23));
    assert_eq!(read(&[&[0x82]]), Ok(0), "of no effects");
    assert_eq!(read(&[&put, &put, &[0x82, 0]]), Err(EffectError::Truncated { offset: 25 }));
    let length = Err(EffectError::Length { offset: 21 });
    assert_eq!(read(&[&put, &[0x82, 3]]), length, "a version before the first");
    assert_eq!(read(&[&put, &[0x82, 0x80, 0]]), length, "not the shortest form");
    let (full, over) = ([0xff; 9], [&[0x82], &[0xff; 9][..], &[2]].concat());
    assert_eq!(read(&[&put, &over]), length, "more than 64 bits");
    assert_eq!(read(&[&put, &[0x82], &full, &[0xff]]), length);
    assert_eq!(read(&[&put, &[0x82], &full]), Err(EffectError::Truncated { offset: 21 }));
    assert_eq!(
        read(&[&put, &[0x82, 0], &[0x83, 0x82, 0x80, 0x80, 8]]),
        Err(EffectError::Length { offset: 23 }),
        "a value over the limit"
    );
    assert_eq!(read(&[&[0x84; 25]]), Err(EffectError::Truncated { offset: 17 }));
    assert_eq!(read(&[&[0x85; 16]]), Err(EffectError::Truncated { offset: 17 }));
}

#[test]
fn damage_is_an_error_that_says_where() {
    let header = [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let decode = |tail: &[u8]| {
        let payload = [&header[..], tail].concat();
        Effects::new(&payload).and_then(|mut effects| {
            let first = effects.next().expect("an effect or an error").map(|_| ());
            assert!(first.is_ok() || effects.next().is_none());
            first
        })
    };
    assert_eq!(decode(&[3, 1, b'k']), Ok(()));
    assert_eq!(Effects::new(&[]).err(), Some(EffectError::Truncated { offset: 0 }));
    assert_eq!(Effects::new(&header[..16]).err(), Some(EffectError::Truncated { offset: 0 }));
    assert_eq!(Effects::new(&[2; 17]).err(), Some(EffectError::Format(2)));
    let truncated = Err(EffectError::Truncated { offset: 17 });
    assert_eq!(decode(&[3]), truncated);
    assert_eq!(decode(&[3, 0x81]), truncated);
    assert_eq!(decode(&[3, 2, b'k']), truncated);
    assert_eq!(decode(&[1, 1, 1, b'k']), truncated);
    assert_eq!(decode(&[2, 1, 1, 0, 0, b'k', b'v']), truncated);
    for kind in [0, 5, 0x7f, 0x80, 0x86, 0xff] {
        assert_eq!(decode(&[kind, 1, b'k']), Err(EffectError::Kind { kind, offset: 17 }));
    }
    assert_eq!(decode(&[0x81; 20]), truncated);
    assert_eq!(decode(&[&[0x81; 25][..], &[2, 0]].concat()), truncated);
    let length = Err(EffectError::Length { offset: 17 });
    assert_eq!(decode(&[&[0x81; 25][..], &[0x81, 0x20], &[0; 4097]].concat()), length);
    assert_eq!(decode(&[3, 0]), length, "an empty key");
    assert_eq!(decode(&[3, 0x81, 0, b'k']), length, "not the shortest form");
    assert_eq!(decode(&[3, 0x81, 0x80, 4]), length, "a key over the limit");
    assert_eq!(decode(&[1, 1, 0x81, 0x80, 0x80, 8]), length, "a value over the limit");
    assert_eq!(decode(&[3, 0xff, 0xff, 0xff, 0xff, 0x7f]), length);
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        effects in proptest::collection::vec(
            (
                proptest::collection::vec(any::<u8>(), 1..200),
                proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
                any::<Option<u64>>(),
            ),
            0..10,
        ),
        first in 0u64..u64::MAX / 2,
    ) {
        let mut writer = BatchWriter::default();
        writer.start(5, first);
        for (key, value, expires_at_ms) in &effects {
            match value {
                Some(value) => writer.put(key, value, *expires_at_ms),
                None => writer.delete(key, Reason::Explicit),
            };
        }
        let read: Vec<_> = Effects::new(writer.payload()).unwrap().map(Result::unwrap).collect();
        let written: Vec<_> = (first..)
            .zip(effects.iter().map(|(key, value, expires_at_ms)| match value {
                Some(value) => Effect::Put { key, value, expires_at_ms: *expires_at_ms },
                None => Effect::Delete { key, reason: Reason::Explicit },
            }))
            .collect();
        prop_assert_eq!(read, written);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        valid_header in any::<bool>(),
        bytes in proptest::collection::vec(prop_oneof![0u8..6, ANSWER..=CURSOR + 1, any::<u8>()], 0..200),
    ) {
        let mut payload = bytes;
        if valid_header && !payload.is_empty() {
            payload[0] = FORMAT;
        }
        if let Ok(parts) = Parts::new(&payload) {
            let has_error = parts.clone().any(|part| part.is_err());
            prop_assert!(parts.count() <= payload.len());
            prop_assert_eq!(cursor_of(&payload).is_err(), has_error);
            match Changes::new(&payload) {
                Ok(changes) => prop_assert!(!has_error && changes.count() <= payload.len()),
                Err(_) => prop_assert!(has_error),
            }
        }
    }
}
