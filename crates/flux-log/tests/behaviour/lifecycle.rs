//! Writing, rotating, trimming and reading back, without faults.

use std::{
    sync::{Arc, mpsc},
    thread,
};

use flux_log::{FileDisk, Log, Progress, SimDisk};
use proptest::prelude::*;

use crate::support::{Owned, entry, open, open_shared, options, state, trim, write};

fn any_record() -> impl Strategy<Value = Owned> {
    let payload = prop::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        4 => (any::<u16>(), any::<u8>(), any::<[u64; 3]>(), payload).prop_map(
            |(partition, entry_type, [term, index, commit], payload)| Owned::Entry {
                partition, entry_type, term, index, commit, payload,
            }
        ),
        1 => (any::<u16>(), any::<[u64; 5]>()).prop_map(
            |(partition, [term, vote, commit, replica, start])| {
                Owned::State(flux_log::State { partition, term, vote, commit, replica, start })
            }
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read_back(
        batches in prop::collection::vec(prop::collection::vec(any_record(), 0..6), 0..30),
        segment_bytes in 256_u64..4096,
        clean in any::<bool>(),
    ) {
        let disk = SimDisk::new(1);
        let (mut log, report, records) = open(&disk, segment_bytes).unwrap();
        prop_assert_eq!(report.segments, 0);
        prop_assert!(records.is_empty());
        for batch in &batches {
            let calls = disk.write_calls();
            for record in batch {
                log.append(&record.record()).unwrap();
            }
            log.reserve(log.batch_bytes()).unwrap();
            let after_reserve = disk.write_calls();
            prop_assert!(after_reserve - calls <= 1, "only a rotation writes, and once");
            log.write().unwrap();
            let expected = u64::from(!batch.is_empty());
            prop_assert_eq!(disk.write_calls() - after_reserve, expected);
        }
        let segments = log.segments();
        if clean {
            log.close().unwrap();
        } else {
            drop(log);
        }
        let (_, report, records) = open(&disk, segment_bytes).unwrap();
        let written: Vec<Owned> = batches.concat();
        prop_assert_eq!(report.records, written.len() as u64);
        prop_assert_eq!(report.segments, segments);
        prop_assert_eq!(report.clean, clean);
        prop_assert_eq!(report.cut, None);
        prop_assert_eq!(records, written);
    }
}

#[test]
fn a_trimmed_log_forgets_no_state() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 600).unwrap();
    write(&mut log, &[state(1, 5, 2), state(9, 8, 3)]).unwrap();
    write(&mut log, &[state(1, 6, 4)]).unwrap();
    let mut index = 0;
    while log.segments() < 5 {
        index += 1;
        write(&mut log, &[entry(1, index, &[7; 100])]).unwrap();
    }
    let before = log.bytes();
    assert_eq!(log.oldest_segment().unwrap()[0].0, 1);

    assert_eq!(trim(&mut log, &mut |_| 0).unwrap(), 0, "nothing is covered by a snapshot");
    let (_, oldest) = log.oldest_segment().unwrap()[0];
    assert_eq!(trim(&mut log, &mut |_| oldest - 1).unwrap(), 0, "one entry is not covered");
    assert_eq!(trim(&mut log, &mut |_| oldest).unwrap(), 1, "the oldest segment is covered");
    assert_eq!(trim(&mut log, &mut |_| index).unwrap(), 3, "all but the one being written");
    assert_eq!(log.segments(), 1);
    assert_eq!(log.oldest_segment(), None);
    assert!(log.bytes() < before);
    drop(log);

    let (_, report, records) = open(&disk, 600).unwrap();
    assert_eq!(report.segments, 1);
    assert_eq!(records[..2], [state(1, 6, 4), state(9, 8, 3)]);
    assert!(records[2..].iter().all(|record| matches!(record, Owned::Entry { .. })));
    assert_eq!(records.last(), Some(&entry(1, index, &[7; 100])));
}

#[test]
fn what_a_segment_holds_is_known_again_after_a_restart() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 512).unwrap();
    for index in 1..=10 {
        write(&mut log, &[entry(4, index, &[1; 60]), entry(2, 100 + index, &[1; 60])]).unwrap();
    }
    let (segments, oldest) = (log.segments(), log.oldest_segment().unwrap().to_vec());
    assert!(segments > 2);
    drop(log);
    let (mut log, ..) = open(&disk, 512).unwrap();
    assert_eq!((log.segments(), log.oldest_segment()), (segments, Some(&*oldest)));
    assert_eq!(trim(&mut log, &mut |partition| if partition == 4 { 10 } else { 0 }).unwrap(), 0);
    assert_eq!(trim(&mut log, &mut |_| u64::MAX).unwrap(), segments - 1);
}

#[test]
fn a_batch_larger_than_a_segment_gets_a_larger_one() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 512).unwrap();
    let large = entry(1, 1, &[9; 10_000]);
    write(&mut log, std::slice::from_ref(&large)).unwrap();
    write(&mut log, &[entry(1, 2, b"after")]).unwrap();
    log.close().unwrap();
    let (_, _, records) = open(&disk, 512).unwrap();
    assert_eq!(records, [large, entry(1, 2, b"after")]);
}

#[test]
fn a_prepared_segment_is_used_and_survives_none_it_is_not() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 1024).unwrap();
    assert!(log.prepare_target().is_none(), "the first segment has just begun");
    write(&mut log, &[entry(1, 1, &[0; 600])]).unwrap();
    let target = log.prepare_target().expect("more than half is used");
    assert!(log.prepare_target().is_none(), "one is on its way");
    log.prepared(target.run());
    let used = disk.used();
    write(&mut log, &[entry(1, 2, &[0; 600])]).unwrap();
    assert_eq!(log.segments(), 2);
    assert_eq!(disk.used(), used, "rotating took the prepared file");

    // Too small for what comes, it grows; left over, it is removed at the next start.
    write(&mut log, &[entry(1, 3, &[0; 300])]).unwrap();
    let target = log.prepare_target().unwrap();
    log.prepared(target.run());
    write(&mut log, &[entry(1, 4, &[0; 5000])]).unwrap();
    assert_eq!(disk.used(), log.bytes(), "it had grown before the write");
    let target = log.prepare_target().unwrap();
    log.prepared(target.run());
    log.close().unwrap();
    let (log, _, records) = open(&disk, 1024).unwrap();
    assert_eq!(records.len(), 4);
    assert_eq!(disk.used(), log.bytes());
}

#[test]
fn progress_reaches_the_total() {
    let disk = SimDisk::new(1);
    let segment_bytes = 20 << 20;
    let (mut log, ..) = open(&disk, segment_bytes).unwrap();
    for index in 1..=5 {
        write(&mut log, &[entry(1, index, &vec![index as u8; 9 << 20])]).unwrap();
    }
    drop(log);
    let mut seen: Vec<Progress> = Vec::new();
    let disk = Arc::new(disk);
    Log::open(disk, options(segment_bytes), &mut |_| {}, &mut |at| {
        seen.push(at);
    })
    .unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.done, last.total), (60 << 20, 60 << 20));
    assert!(seen.len() >= 3, "{seen:?}");
    assert!(seen.is_sorted_by_key(|at| at.done), "{seen:?}");
}

/// One thread writes while another syncs; what was reported durable is there after a power cut.
#[test]
fn another_thread_syncs() {
    let disk = SimDisk::new(77);
    let (mut log, ..) = open(&disk, 2048).unwrap();
    write_with_sync_thread(&mut log);
    let durable = log.durable();
    assert_eq!(durable, log.written());
    let (_, _, records) = open(&disk.power_cut(), 2048).unwrap();
    assert_eq!(records.len(), 500);

    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let (mut log, ..) = open_shared(disk.clone(), 8192).unwrap();
    write_with_sync_thread(&mut log);
    drop(log);
    let (_, report, records) = open_shared(disk, 8192).unwrap();
    assert!(report.segments > 1);
    assert_eq!(records.len(), 500);
}

fn write_with_sync_thread(log: &mut Log) {
    let (targets, inbox) = mpsc::sync_channel::<flux_log::SyncTarget>(4);
    let (results, outbox) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            for target in inbox {
                results.send(target.sync()).unwrap();
            }
        });
        for index in 1..=500 {
            write(log, &[entry(1, index, &index.to_le_bytes())]).unwrap();
            targets.send(log.sync_target()).unwrap();
            for result in outbox.try_iter() {
                let durable = log.synced(result).unwrap();
                assert!(durable <= log.written());
            }
        }
        drop(targets);
        for result in outbox {
            log.synced(result).unwrap();
        }
    });
}
