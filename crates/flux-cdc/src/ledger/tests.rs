//! What a consumer is told of each record, as scripts, and of any delivery that repeats, reorders or
//! loses records.

use bytes::Bytes;
use flux_proto::event::{Event, Gap, Op, Place};
use proptest::prelude::*;

use super::*;

const PARTITION: u16 = 7;

/// A change `c5`, a begin `b6-9@12.3` (lost 6 to 9, at 12, term 3), a row `r1@12.3`, an end `e1@12.3`.
fn record(text: &str) -> Record {
    let (kind, rest) = text.split_at(1);
    let (first, of) = rest.split_once('@').unwrap_or((rest, "0.0"));
    let (at, term) = of.split_once('.').expect("a gap has a term");
    let gap = GapId { partition: PARTITION, at: number(at), term: number(term) };
    match kind {
        "c" => Record::Change(event(number(first))),
        "b" => {
            let (from, to) = first.split_once('-').expect("what is lost");
            Record::GapBegin(Gap {
                partition: PARTITION,
                lost: number(from)..=number(to),
                at: Place { revision: gap.at, index: 0 },
                term: gap.term,
            })
        }
        "r" => Record::Row { gap, number: number(first), event: event(1) },
        "e" => Record::GapEnd { gap, rows: number(first) },
        other => panic!("there is no record of kind {other}"),
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text} is no number"))
}

fn event(revision: u64) -> Event {
    Event {
        op: Op::Set,
        key: Bytes::from_static(b"k"),
        value: Some(Bytes::new()),
        partition: PARTITION,
        revision,
        version: revision,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 0,
        trace: None,
    }
}

/// Runs lines of a record and what is said of it: `fresh` (which is then noted), `repeat`, `ahead N`, or
/// `skip HOLE`, after which it must be fresh. The ledger is kept as JSON between lines.
fn script(lines: &str) -> Ledger {
    let mut ledger = Ledger::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (what, expected) = line.split_once(' ').expect("a record and what is said of it");
        let record = record(what);
        let said = match expected.strip_prefix("skip ") {
            Some(_) => {
                let hole = ledger.skip_to(&record).expect("it was ahead");
                assert_eq!(ledger.judge(&record), Verdict::Fresh, "{line}");
                ledger.note(&record);
                format!("skip {hole}")
            }
            None => match ledger.judge(&record) {
                Verdict::Fresh => {
                    assert_eq!(ledger.skip_to(&record), None, "{line}");
                    ledger.note(&record);
                    "fresh".to_owned()
                }
                Verdict::Repeat => "repeat".to_owned(),
                Verdict::Ahead { expected } => format!("ahead {expected}"),
            },
        };
        assert_eq!(said, expected.trim(), "{line}");
        ledger = Ledger::decode(&ledger.encode()).expect("it was just encoded");
    }
    ledger
}

#[test]
fn changes_are_taken_once_and_in_order() {
    let ledger = script(
        "c1 fresh
         c2 fresh
         c2 repeat
         c1 repeat
         c4 ahead 3
         c3 fresh
         c4 fresh
         c3 repeat",
    );
    let live = Progress { begins: 1, position: Position::Live { revision: 4 } };
    assert_eq!(ledger.progress(PARTITION), Some(live));
    assert_eq!(ledger.progress(8), None);
}

#[test]
fn a_partition_may_begin_anywhere() {
    let ledger = script(
        "c41 fresh
         c40 repeat
         c43 ahead 42",
    );
    assert_eq!(ledger.progress(PARTITION).map(|progress| progress.begins), Some(41));
    let ledger = script("r3@12.1 fresh");
    assert_eq!(ledger.progress(PARTITION).map(|progress| progress.begins), Some(13));
}

#[test]
fn what_does_not_come_is_a_hole() {
    script(
        "c1 fresh
         c5 skip partition 7, 2 to 4
         c3 repeat
         c6 fresh
         b9-11@12.1 ahead 7
         b9-11@12.1 skip partition 7, 7 to 8
         r1@12.1 fresh
         r3@12.1 skip partition 7, rows 2 to 2 of gap 7/12/1
         e5@12.1 skip partition 7, rows 4 to 5 of gap 7/12/1
         c13 fresh
         r2@20.1 ahead 14
         r2@20.1 skip partition 7, rows 0 to 1 of gap 7/20/1
         c30 skip partition 7, 14 to 29
         e0@40.1 skip partition 7, rows 0 to 0 of gap 7/40/1
         c41 fresh",
    );
}

#[test]
fn a_gap_is_its_begin_its_rows_and_its_end() {
    script(
        "c1 fresh
         b2-9@9.1 fresh
         b2-9@9.1 repeat
         r1@9.1 fresh
         r3@9.1 ahead 2
         e3@9.1 ahead 2
         c10 ahead 2
         r2@9.1 fresh
         r1@9.1 repeat
         r3@9.1 fresh
         e3@9.1 fresh
         e3@9.1 repeat
         r3@9.1 repeat
         b2-9@9.1 repeat
         c9 repeat
         c10 fresh",
    );
}

#[test]
fn a_gap_may_begin_anew_or_be_left() {
    script(
        "c1 fresh
         b2-9@9.1 fresh
         r1@9.1 fresh
         b2-9@11.2 fresh
         r1@11.2 fresh
         r2@9.1 repeat
         e2@9.1 repeat
         b2-9@9.1 repeat
         b2-9@12.2 fresh
         r1@13.2 ahead 2
         r1@12.2 fresh
         c1 repeat
         c3 ahead 2
         c2 fresh
         c3 fresh
         r2@12.2 fresh
         c4 fresh
         e2@12.2 fresh
         c5 repeat
         c13 fresh",
    );
    // The changes reach the gap's revision: its rows are of no use any more.
    script(
        "c1 fresh
         b2-3@3.1 fresh
         r1@3.1 fresh
         c2 fresh
         c3 fresh
         r2@3.1 repeat
         e2@3.1 repeat
         c4 fresh",
    );
}

#[test]
fn a_gap_may_be_the_first_that_is_seen() {
    let ledger = script(
        "b5-9@12.1 fresh
         c4 repeat
         c5 fresh",
    );
    assert_eq!(ledger.progress(PARTITION).map(|progress| progress.begins), Some(5));
    script(
        "r3@12.1 fresh
         c14 ahead 4
         r4@12.1 fresh
         e4@12.1 fresh
         c13 fresh",
    );
    // What was before such a gap is not known.
    script(
        "r3@12.1 fresh
         c13 skip partition 7, 12 to 12
         c14 fresh",
    );
    script(
        "r3@12.1 fresh
         c9 fresh
         c10 fresh",
    );
    script("b1-0@0.0 fresh\n e0@0.0 fresh\n c1 fresh");
}

#[test]
fn partitions_do_not_touch_each_other() {
    let mut ledger = Ledger::new();
    ledger.note(&record("c5"));
    let other = Record::Change(Event { partition: 8, ..event(3) });
    assert_eq!(ledger.judge(&other), Verdict::Fresh);
    ledger.note(&other);
    assert_eq!(ledger.judge(&record("c6")), Verdict::Fresh);
    let partitions: Vec<u16> = ledger.partitions().map(|(partition, _)| partition).collect();
    assert_eq!(partitions, [7, 8]);
    assert_eq!(
        String::from_utf8(ledger.encode()).expect("JSON is text"),
        r#"{"7":{"begins":5,"revision":5},"8":{"begins":3,"revision":3}}"#
    );
}

#[test]
fn what_is_no_ledger_is_refused() {
    let ledger = script("c1 fresh\n b2-9@9.1 fresh\n r1@9.1 fresh");
    let text = String::from_utf8(ledger.encode()).expect("JSON is text");
    assert_eq!(text, r#"{"7":{"begins":1,"gap":"7/9/1","rows":1,"before":1}}"#);
    for length in 0..text.len() {
        assert_eq!(Ledger::decode(&text.as_bytes()[..length]), None, "the first {length} bytes");
    }
    for (from, to) in [
        ("\"7\"", "\"x\""),
        ("\"7\"", "\"65536\""),
        ("7/9/1", "8/9/1"),
        ("7/9/1", "7/9"),
        (",\"rows\":1", ""),
        ("\"begins\":1,", ""),
        ("\"before\":1", "\"before\":1,\"revision\":1"),
        ("\"before\":1", "\"later\":1"),
    ] {
        assert!(text.contains(from), "{from}");
        assert_eq!(Ledger::decode(text.replacen(from, to, 1).as_bytes()), None, "{from} -> {to}");
    }
}

/// What a publisher sends of one partition: changes, with a gap here and there.
fn streams() -> impl Strategy<Value = Vec<Record>> {
    let parts =
        proptest::collection::vec((1..5_u64, proptest::option::of((1..5_u64, 0..4_u64))), 1..6);
    (0..3_u64, parts).prop_map(|(begins, parts)| {
        let (mut records, mut revision) = (Vec::new(), begins);
        for (term, (changes, gap)) in (1..).zip(parts) {
            for _ in 0..changes {
                revision += 1;
                records.push(Record::Change(event(revision)));
            }
            if let Some((lost, rows)) = gap {
                let from = revision + 1;
                revision += lost;
                let at = Place { revision, index: 0 };
                let gap = Gap { partition: PARTITION, lost: from..=revision, at, term };
                records.push(Record::GapBegin(gap.clone()));
                records.extend((1..=rows).map(|number| Record::Row {
                    gap: gap.id(),
                    number,
                    event: event(1),
                }));
                records.push(Record::GapEnd { gap: gap.id(), rows });
            }
        }
        records
    })
}

proptest! {
    /// Whatever comes when, and how often: the consumer keeps each record once, in order.
    #[test]
    fn every_record_is_kept_once_and_in_order(
        stream in streams(),
        order in proptest::collection::vec(any::<proptest::sample::Index>(), 0..200),
    ) {
        let (mut ledger, mut kept) = (Ledger::new(), vec![stream[0].clone()]);
        // It begins with the first one; else the partition would begin later for it.
        ledger.note(&stream[0]);
        let random = order.iter().map(|index| index.index(stream.len()));
        // Then all of them in order, as often as the queue may give them again.
        let again = (0..stream.len()).flat_map(|_| 0..stream.len());
        for index in random.chain(again) {
            let record = &stream[index];
            if ledger.judge(record) == Verdict::Fresh {
                ledger.note(record);
                kept.push(record.clone());
            }
        }
        prop_assert_eq!(&kept, &stream);
        for record in &stream {
            prop_assert_eq!(ledger.judge(record), Verdict::Repeat);
        }
    }

    /// Whatever is lost on the way: the rest is kept, and the holes are what is missing.
    #[test]
    fn what_is_lost_is_reported(
        stream in streams(),
        lost in proptest::collection::vec(any::<bool>(), 40),
    ) {
        let is_lost = |index: usize| index != 0 && lost[index % lost.len()];
        let (mut ledger, mut holes, mut kept) = (Ledger::new(), 0, 0);
        for (index, record) in stream.iter().enumerate().filter(|&(index, _)| !is_lost(index)) {
            let hole = ledger.skip_to(record);
            // Something is missing just before it, if anything is.
            prop_assert_eq!(hole.is_some(), index > 0 && is_lost(index - 1), "{:?}", hole);
            if let Some(Hole::Revisions { missing, .. } | Hole::Rows { missing, .. }) = hole {
                prop_assert!(!missing.is_empty());
                holes += 1;
            }
            prop_assert_eq!(ledger.judge(record), Verdict::Fresh);
            ledger.note(record);
            kept += 1;
        }
        let missing = (0..stream.len()).filter(|&index| is_lost(index)).count();
        prop_assert_eq!(kept + missing, stream.len());
        let runs = (1..stream.len()).filter(|&i| is_lost(i - 1) && !is_lost(i)).count();
        prop_assert_eq!(holes, runs);
    }
}
