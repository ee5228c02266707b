//! What is trimmed: never more than snapshots cover, and of that what no reader needs, or too much.

use flux_log::{Keep, Log, LogError, Scanned, SegmentInfo, SimDisk, Trimmed};
use proptest::prelude::*;

use crate::support::{Owned, entry, open, scan, scan_all, trim, write};

const SEGMENT_BYTES: u64 = 1024;
const PARTITIONS: usize = 3;

fn is_covered(segment: &SegmentInfo, keep: &dyn Fn(u16) -> Keep) -> bool {
    let highest = segment.highest.as_ref();
    highest.is_some_and(|all| all.iter().all(|(of, index)| *index <= keep(*of).snapshot))
}

fn is_needed(segment: &SegmentInfo, keep: &dyn Fn(u16) -> Keep) -> bool {
    let needed = |(of, index): &(u16, u64)| keep(*of).from <= *index;
    segment.highest.as_ref().is_some_and(|all| all.iter().any(needed))
}

/// All segments have the same size here.
fn check_trim(
    log: &mut Log,
    retention: u64,
    keep: &dyn Fn(u16) -> Keep,
) -> Result<Trimmed, TestCaseError> {
    let reader = log.reader();
    let before = reader.segments();
    let trimmed = log.trim(retention * SEGMENT_BYTES, &mut |partition| keep(partition)).unwrap();
    let after = reader.segments();
    let (gone, kept) = before.split_at(trimmed.segments);
    prop_assert_eq!(kept, &after[..]);

    prop_assert!(gone.iter().all(|one| is_covered(one, keep)), "never beyond a snapshot");
    let covered = before.iter().take_while(|one| is_covered(one, keep)).count();
    let left = covered - gone.len();
    let lost = gone.iter().rposition(|one| is_needed(one, keep));
    prop_assert_eq!(trimmed.released, lost.is_some());
    if let Some(lost) = lost {
        prop_assert!((covered - lost) as u64 > retention, "a pin was broken without need");
    }
    let stays = left == 0 || is_needed(&kept[0], keep) && left as u64 <= retention;
    prop_assert!(stays, "{} covered segments stay", left);

    prop_assert_eq!(log.pinned_bytes(), left as u64 * SEGMENT_BYTES);
    prop_assert_eq!(log.bytes_beyond(), (kept.len() - left) as u64 * SEGMENT_BYTES);
    prop_assert_eq!(log.bytes(), kept.len() as u64 * SEGMENT_BYTES);
    let oldest = after[left].highest.as_deref();
    prop_assert_eq!(log.oldest_segment(), oldest);
    Ok(trimmed)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn readers_keep_segments_up_to_the_retention(
        rounds in prop::collection::vec(
            (
                prop::collection::vec((0..PARTITIONS as u16, 0_usize..200), 0..40),
                any::<[(u8, u8); PARTITIONS]>(),
                0_u64..6,
            ),
            1..8,
        ),
    ) {
        let disk = SimDisk::new(1);
        let (mut log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
        let mut last = [0_u64; PARTITIONS];
        let mut snapshots = [0_u64; PARTITIONS];
        // The lowest index that no trim has taken from a reader.
        let mut all: Vec<Owned> = Vec::new();
        for (entries, keeps, retention) in rounds {
            for (partition, length) in entries {
                last[usize::from(partition)] += 1;
                all.push(entry(partition, last[usize::from(partition)], &vec![7; length]));
                write(&mut log, &all[all.len() - 1..]).unwrap();
            }
            let keeps: Vec<Keep> = keeps.iter().enumerate().map(|(of, (snapshot, from))| {
                // Snapshots go on, to some of the last index; readers are anywhere, or there is none.
                let ahead = (last[of] - snapshots[of]) * u64::from(*snapshot) / 255;
                snapshots[of] += ahead;
                let from = if from % 3 == 0 {
                    u64::MAX
                } else {
                    last[of] * u64::from(*from) / 255
                };
                Keep { snapshot: snapshots[of], from }
            }).collect();
            let keep = |partition: u16| keeps[usize::from(partition)];
            let oldest = log.reader().segments()[0].base;
            let readable = scan(&log.reader(), oldest).0.len();
            let trimmed = check_trim(&mut log, retention, &keep)?;

            // What snapshots do not cover is there, and what readers need unless they are told.
            let there = scan_all(&log.reader());
            prop_assert_eq!(&there[..], &all[all.len() - there.len()..]);
            for record in &all[all.len() - readable..all.len() - there.len()] {
                let Owned::Entry { partition, index, .. } = record else { unreachable!() };
                let Keep { snapshot, from } = keep(*partition);
                prop_assert!(*index <= snapshot && (*index < from || trimmed.released));
            }
        }
    }
}

/// Entries of partition 1 in so many sealed segments; the last index, which is in another one.
fn segments(disk: &SimDisk, count: usize) -> (Log, u64) {
    let (mut log, ..) = open(disk, SEGMENT_BYTES).unwrap();
    let mut index = 0;
    while log.segments() <= count {
        index += 1;
        write(&mut log, &[entry(1, index, &[7; 100])]).unwrap();
    }
    (log, index)
}

#[test]
fn a_reader_that_goes_on_lets_segments_go() {
    let (mut log, last) = segments(&SimDisk::new(1), 5);
    let all = |from| move |_: u16| Keep { snapshot: last, from };
    let trimmed = |segments, released| Trimmed { segments, released };
    let highest = log.oldest_segment().unwrap()[0].1;
    let bytes = 5 * SEGMENT_BYTES;

    assert_eq!(log.trim(bytes, &mut all(0)).unwrap(), trimmed(0, false));
    assert_eq!((log.pinned_bytes(), log.bytes_beyond()), (bytes, SEGMENT_BYTES));
    assert_eq!(log.oldest_segment(), None);
    assert_eq!(log.trim(bytes, &mut all(highest)).unwrap(), trimmed(0, false));
    assert_eq!(log.trim(bytes, &mut all(highest + 1)).unwrap(), trimmed(1, false));
    assert_eq!(log.trim(3 * SEGMENT_BYTES, &mut all(highest)).unwrap(), trimmed(1, true));
    assert_eq!(log.trim(0, &mut all(highest)).unwrap(), trimmed(3, true));
    assert_eq!(log.pinned_bytes(), 0);
    // The one being written is nobody's to trim.
    assert_eq!(log.trim(0, &mut all(0)).unwrap(), trimmed(0, false));
}

#[test]
fn a_restart_trims_as_before() {
    let disk = SimDisk::new(1);
    let (mut log, last) = segments(&disk, 5);
    let mut keep = |_| Keep { snapshot: last, from: 1 };
    log.trim(u64::MAX, &mut keep).unwrap();
    log.close().unwrap();
    let (mut log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
    assert_eq!(log.pinned_bytes(), 0, "nobody has said what is covered");
    assert_eq!(log.oldest_segment().unwrap().len(), 1);
    assert_eq!(log.trim(u64::MAX, &mut keep).unwrap(), Trimmed::default());
    assert_eq!(log.pinned_bytes(), 5 * SEGMENT_BYTES);
    assert_eq!(trim(&mut log, &mut |_| last).unwrap(), 5);
}

#[test]
fn on_a_full_disk_readers_lose_the_oldest_segments_and_writers_nothing() {
    let disk = SimDisk::new(1);
    let (mut log, last) = segments(&disk, 5);
    let highest = log.oldest_segment().unwrap()[0].1;
    // Two segments are covered, the reader needs both, and there are three more.
    let covered = 2 * highest;
    log.trim(u64::MAX, &mut |_| Keep { snapshot: covered, from: 1 }).unwrap();
    assert_eq!((log.pinned_bytes(), log.bytes_beyond()), (2 * SEGMENT_BYTES, 4 * SEGMENT_BYTES));
    disk.limit_capacity(Some(disk.used()));

    let reader = log.reader();
    let mut index = last;
    let mut begun = Vec::new();
    let full = loop {
        let segments = log.segments();
        let base = reader.segments()[0].base;
        index += 1;
        if let Err(error) = write(&mut log, &[entry(1, index, &[8; 100])]) {
            break error;
        }
        if reader.segments()[0].base != base {
            assert_eq!(log.segments(), segments, "one went where one began");
            begun.push(log.pinned_bytes());
            let (records, scanned) = scan(&reader, base);
            let oldest = reader.segments()[0].base;
            assert_eq!((records, scanned.unwrap()), (vec![], Scanned::Gone { oldest }));
        }
    };
    assert!(matches!(full, LogError::Full { .. }), "{full}");
    assert_eq!(begun, [SEGMENT_BYTES, 0], "as many as it takes, one at a time");
    let there = scan_all(&reader);
    assert_eq!(there[0], entry(1, covered + 1, &[7; 100]), "what no snapshot covers stays");
    assert_eq!(there.len() as u64, index - 1 - covered);
    disk.limit_capacity(None);
    assert_eq!(log.write().unwrap(), log.written(), "the batch has waited");
    assert_eq!(scan_all(&reader).last(), Some(&entry(1, index, &[8; 100])));
}

#[test]
fn a_disk_that_is_too_full_for_a_batch_gets_all_that_was_kept() {
    let disk = SimDisk::new(1);
    let (mut log, last) = segments(&disk, 5);
    log.trim(u64::MAX, &mut |_| Keep { snapshot: last, from: 1 }).unwrap();
    disk.limit_capacity(Some(disk.used()));
    write(&mut log, &[entry(1, last + 1, &[8; 4 * SEGMENT_BYTES as usize])]).unwrap();
    assert_eq!((log.segments(), log.pinned_bytes()), (2, 0));
}

#[test]
fn a_fault_while_room_is_made_is_not_hidden() {
    let disk = SimDisk::new(1);
    let (mut log, last) = segments(&disk, 5);
    log.trim(u64::MAX, &mut |_| Keep { snapshot: last, from: 1 }).unwrap();
    disk.limit_capacity(Some(disk.used()));
    disk.fail_sync_after(0);
    let error = log.reserve(SEGMENT_BYTES as usize).unwrap_err();
    assert!(matches!(error, LogError::Poisoned { .. } | LogError::Io { .. }), "{error}");
    assert!(log.poison().is_some());
}
