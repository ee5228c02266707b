//! A ring beside all that was ever pushed into it.

use proptest::prelude::*;

use super::*;
use crate::effect::{BatchWriter, Cursor};

fn entry(first: Revision, last: Revision, index: u64, bytes: usize) -> Arc<Committed> {
    let position = Position { index, term: 1 };
    Arc::new(Committed { position, first, last, payload: vec![0; bytes] })
}

fn firsts(read: RingRead) -> Vec<Revision> {
    match read {
        RingRead::Entries(entries) => entries.iter().map(|one| one.first).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reader_within_an_entry_still_needs_it() {
    let one = entry(21, 24, 10, 1);
    let read_to = |revision| one.read_to(revision);
    assert_eq!(read_to(23), Cursor { revision: 23, index: 9 });
    assert_eq!(read_to(24), Cursor { revision: 24, index: 10 });
    // Entries without changes have followed: nothing is needed where all changes are read.
    let applied = Cursor { revision: 24, index: 15 };
    assert_eq!(read_to(23).needs(applied), 10);
    assert_eq!(read_to(24).needs(applied), 16);
    assert_eq!(Cursor::default().needs(Cursor { revision: 0, index: 3 }), 4);
    assert_eq!(Cursor::default().needs(Cursor { revision: 1, index: 3 }), 1);
    // A cursor that is ahead of what is applied here.
    assert_eq!(read_to(24).needs(Cursor { revision: 20, index: 8 }), 11);
}

#[test]
fn recent_entries_are_held_and_older_ones_are_elsewhere() {
    let mut ring = Ring::new(10 * (ENTRY_BYTES + 100));
    assert_eq!(ring.after(0, 1), RingRead::Older { until: u64::MAX });
    ring.begin((20, 7));
    assert_eq!(ring.after(20, 1), RingRead::UpToDate);
    assert_eq!(ring.after(25, 1), RingRead::UpToDate, "a replica that lags");
    assert_eq!(ring.after(19, 1), RingRead::Older { until: 8 });
    for number in 0..10 {
        ring.push(entry(21 + 2 * number, 22 + 2 * number, 10 + number, 100));
    }
    assert_eq!((ring.last(), ring.bytes()), (Some(40), 10 * (ENTRY_BYTES + 100)));
    assert_eq!(firsts(ring.after(20, 250)), [21, 23]);
    assert_eq!(firsts(ring.after(21, 1)), [21], "the rest of an entry, and one at least");
    assert_eq!(firsts(ring.after(22, 200)), [23, 25]);
    assert_eq!(firsts(ring.after(37, usize::MAX)), [37, 39]);
    assert_eq!(ring.after(40, 1), RingRead::UpToDate);
    ring.push(entry(41, 41, 25, 1));
    assert_eq!(ring.after(21, 1), RingRead::Older { until: 11 }, "the oldest made room");
    assert_eq!(firsts(ring.after(22, 1)), [23]);
    ring.push(entry(40, 41, 25, 1));
    assert_eq!(ring.last(), Some(41), "it is known already");

    ring.begin((100, 60));
    assert_eq!(ring.after(41, 1), RingRead::Older { until: 61 });
    ring.stop();
    assert_eq!((ring.after(100, 1), ring.bytes()), (RingRead::Older { until: u64::MAX }, 0));
}

#[test]
fn what_is_too_large_or_does_not_follow_begins_anew() {
    let mut ring = Ring::new(4 * 1000);
    ring.begin((0, 1));
    ring.push(entry(1, 1, 2, 100));
    ring.push(entry(2, 5, 3, 1000));
    assert_eq!((ring.after(4, 1), ring.bytes()), (RingRead::Older { until: 4 }, 0));
    assert_eq!(ring.after(5, 1), RingRead::UpToDate);
    ring.push(entry(6, 6, 5, 100));
    assert_eq!(firsts(ring.after(5, 1)), [6]);
    assert_eq!(ring.after(4, 1), RingRead::Older { until: 5 });
    ring.push(entry(9, 9, 8, 100));
    assert_eq!(ring.after(7, 1), RingRead::Older { until: 8 }, "a hole is not passed over");
    assert_eq!(firsts(ring.after(8, 1)), [9]);
}

#[test]
fn entries_that_are_read_back_say_which_revisions_they_have() {
    let position = Position { index: 3, term: 2 };
    let mut writer = BatchWriter::default();
    writer.start(0, 7);
    writer.cursor(&Cursor::default());
    let read = |data: &[u8], entry_type: EntryType| {
        let entry_type = entry_type as i32;
        Committed::read(Entry {
            entry_type,
            index: 3,
            term: 2,
            data: data.to_vec(),
            ..Entry::default()
        })
    };
    let normal = EntryType::EntryNormal;
    assert_eq!(read(writer.payload(), normal), Ok(None));
    assert_eq!(read(&[], normal), Ok(None));
    writer.put(b"a", b"", None);
    writer.put(b"b", b"", None);
    let payload = writer.into_inner();
    let committed = Committed { position, first: 7, last: 8, payload: payload.clone() };
    assert_eq!(read(&payload, normal), Ok(Some(committed)));
    assert_eq!(read(&payload, EntryType::EntryConfChangeV2), Ok(None), "no batch at all");
    let cut = read(&payload[..payload.len() - 1], normal);
    assert!(matches!(cut, Err(EffectError::Truncated { .. })), "{cut:?}");
}

proptest! {
    /// Whatever is pushed, a read continues where it was asked to, and the bound holds.
    #[test]
    fn reads_are_dense_and_bounded(
        sizes in proptest::collection::vec((1u64..4, 1u64..3, 17usize..400), 1..60),
        limit in 0usize..3000,
        bytes in 0usize..600,
    ) {
        let mut ring = Ring::new(limit);
        ring.begin((0, 1));
        let (mut last, mut index) = (0, 1);
        for (effects, step, size) in sizes {
            index += step;
            ring.push(entry(last + 1, last + effects, index, size));
            last += effects;
            prop_assert!(ring.bytes() <= limit);
            let mut older = 0;
            for after in 0..=last {
                match ring.after(after, bytes) {
                    RingRead::UpToDate => prop_assert_eq!(after, last),
                    RingRead::Older { until } => {
                        prop_assert!(until <= index + 1 && older == after);
                        older += 1;
                    }
                    RingRead::Entries(entries) => {
                        prop_assert!(entries[0].first <= after + 1 && after < entries[0].last);
                        let pairs = entries.iter().zip(&entries[1..]);
                        prop_assert!(pairs.clone().all(|(one, next)| one.last + 1 == next.first));
                        let taken: usize = entries.iter().map(|one| one.payload.len()).sum();
                        prop_assert!(taken <= bytes || entries.len() == 1);
                    }
                }
            }
        }
    }
}
