//! Failed writes, failed syncs, and a disk that is full.

use flux_log::{LogError, SimDisk};

use crate::support::{entry, open, state, trim, write};

fn assert_poisoned(error: &LogError, cause: &str) {
    match error {
        LogError::Poisoned { cause: found } => assert!(found.contains(cause), "{found}"),
        other => panic!("not poisoned: {other}"),
    }
}

#[test]
fn a_failed_write_poisons() {
    for part in 0..20 {
        let disk = SimDisk::new(part);
        let (mut log, ..) = open(&disk, 4096).unwrap();
        write(&mut log, &[entry(1, 1, b"good")]).unwrap();
        log.sync_now().unwrap();
        disk.fail_write_after(0);
        let error = write(&mut log, &[entry(1, 2, &[1; 600])]).unwrap_err();
        assert!(matches!(&error, LogError::Io { action: "write", .. }), "{error}");
        let cause = "injected failure of a write";
        assert!(log.poison().unwrap().contains(cause));
        assert_poisoned(&log.append(&entry(1, 3, b"").record()).unwrap_err(), cause);
        assert_poisoned(&log.write().unwrap_err(), cause);
        assert_poisoned(&log.reserve(1).unwrap_err(), cause);
        assert_poisoned(&log.sync_now().unwrap_err(), cause);
        assert_poisoned(&trim(&mut log, &mut |_| 0).unwrap_err(), cause);
        let late = Ok(log.durable());
        assert_poisoned(&log.synced(late).unwrap_err(), cause);
        assert!(log.prepare_target().is_none());
        assert_poisoned(&log.close().unwrap_err(), cause);

        let (_, _, records) = open(&disk.power_cut(), 4096).unwrap();
        assert_eq!(records[0], entry(1, 1, b"good"));
    }
}

#[test]
fn a_failed_sync_poisons_whoever_syncs_next() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 4096).unwrap();
    write(&mut log, &[entry(1, 1, b"lost")]).unwrap();
    let target = log.sync_target();
    disk.fail_sync_after(0);
    let failed = target.sync();
    assert!(failed.is_err());
    // The disk would now report success, but what the failed sync dropped would not be there.
    let durable = log.durable();
    assert!(log.sync_now().is_err());
    assert_eq!(log.durable(), durable);
    assert!(log.synced(failed).is_err());
    assert_poisoned(&log.write().unwrap_err(), "injected failure of a sync");
}

/// After a failed sync the kernel counts the bytes as written. A restart sees them, takes them for
/// recovered, and so must see to it that they really are on the disk.
#[test]
fn what_is_recovered_after_a_failed_sync_is_durable() {
    for seed in 0..40 {
        let disk = SimDisk::new(seed);
        let (mut log, ..) = open(&disk, 4096).unwrap();
        write(&mut log, &[entry(1, 1, &[3; 900])]).unwrap();
        disk.fail_sync_after(0);
        assert!(log.sync_now().is_err());
        drop(log);
        let (log, _, records) = open(&disk, 4096).unwrap();
        assert_eq!(records.len(), 1);
        drop(log);
        let (_, _, after) = open(&disk.power_cut(), 4096).unwrap();
        assert_eq!(after, records);
    }
}

/// A rotation syncs, writes, syncs and renames: whichever fails, nothing that was durable is lost.
#[test]
fn a_fault_anywhere_in_a_rotation() {
    for seed in 0..20 {
        for step in 0..12 {
            let disk = SimDisk::new(seed);
            let (mut log, ..) = open(&disk, 1024).unwrap();
            let first = [state(1, 4, 2), entry(1, 1, &[1; 700])];
            write(&mut log, &first).unwrap();
            log.sync_now().unwrap();
            match step {
                0 => disk.fail_write_after(0),
                1..4 => disk.fail_sync_after(step - 1),
                _ => disk.power_off_after(step - 4),
            }
            let second = [entry(1, 2, &[2; 700])];
            let result = write(&mut log, &second).and_then(|_| log.sync_now());
            if result.is_err() {
                assert!(log.poison().is_some() || step >= 4);
            }
            let (_, report, records) = open(&disk.power_cut(), 1024).unwrap();
            assert_eq!(records[..2], first, "{report:?}");
            if result.is_ok() {
                assert_eq!(records[2..], second);
            }
        }
    }
}

#[test]
fn a_full_disk_refuses_and_recovers() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 1024).unwrap();
    write(&mut log, &[entry(1, 1, &[1; 500])]).unwrap();
    disk.limit_capacity(Some(disk.used() + 100));
    let (written, durable, bytes) = (log.written(), log.durable(), log.bytes());
    for _ in 0..3 {
        let error = log.reserve(600).unwrap_err();
        assert!(matches!(&error, LogError::Full { .. }), "{error}");
        assert_eq!((log.written(), log.durable(), log.bytes()), (written, durable, bytes));
        assert!(log.poison().is_none());
        assert_eq!(disk.used(), bytes, "nothing is left behind");
    }
    // What still fits in the segment goes on, and a batch that does not is kept.
    write(&mut log, &[entry(1, 2, b"fits")]).unwrap();
    let error = write(&mut log, &[entry(1, 3, &[1; 500])]).unwrap_err();
    assert!(matches!(error, LogError::Full { .. }));
    log.sync_now().unwrap();

    // A restart needs no space.
    let restarted = disk.duplicate();
    let (_, _, records) = open(&restarted, 1024).unwrap();
    assert_eq!(records.len(), 2);

    disk.limit_capacity(None);
    log.reserve(600).unwrap();
    log.write().unwrap();
    assert_eq!(log.segments(), 2);
    log.close().unwrap();
    let (_, report, records) = open(&disk, 1024).unwrap();
    assert!(report.clean);
    assert_eq!(records.len(), 3);
    assert_eq!(records[2], entry(1, 3, &[1; 500]));
}

#[test]
fn a_full_disk_does_not_matter_to_what_was_reserved() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 1024).unwrap();
    let record = entry(1, 1, &[1; 1500]);
    log.append(&record.record()).unwrap();
    log.reserve(log.batch_bytes()).unwrap();
    disk.limit_capacity(Some(disk.used()));
    log.write().unwrap();
    log.close().unwrap();
    let (_, report, records) = open(&disk, 1024).unwrap();
    assert!(report.clean, "the closing mark had its room too");
    assert_eq!(records, [record]);
}

#[test]
fn a_segment_that_cannot_be_prepared_harms_nothing() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 1024).unwrap();
    write(&mut log, &[entry(1, 1, &[1; 700])]).unwrap();
    disk.limit_capacity(Some(disk.used()));
    let target = log.prepare_target().unwrap();
    log.prepared(target.run());
    assert!(log.poison().is_none());
    disk.limit_capacity(None);
    write(&mut log, &[entry(1, 2, &[1; 700])]).unwrap();
    assert_eq!(log.segments(), 2);
}

/// Without space a restart still makes durable what it recovers.
#[test]
fn a_restart_on_a_full_disk_is_durable() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let (mut log, ..) = open(&disk, 1024).unwrap();
        write(&mut log, &[entry(1, 1, &[1; 700])]).unwrap();
        drop(log);
        disk.limit_capacity(Some(disk.used()));
        let (mut log, _, records) = open(&disk, 4096).unwrap();
        assert_eq!(records.len(), 1);
        assert!(matches!(log.reserve(100).unwrap_err(), LogError::Full { .. }));
        drop(log);
        let (_, _, after) = open(&disk.power_cut(), 4096).unwrap();
        assert_eq!(after, records);
    }
}

/// The process dies between giving a segment its name and syncing the directory.
#[test]
fn a_segment_that_a_restart_finds_stays() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let (mut log, ..) = open(&disk, 1024).unwrap();
        write(&mut log, &[entry(1, 1, &[1; 700])]).unwrap();
        // The syncs of a rotation: the segment, the next one's head, the directory.
        disk.fail_sync_after(2);
        assert!(write(&mut log, &[entry(1, 2, &[2; 700])]).is_err());
        drop(log);
        let (mut log, report, _) = open(&disk, 1024).unwrap();
        assert_eq!(report.segments, 2);
        write(&mut log, &[entry(1, 2, &[2; 700])]).unwrap();
        log.sync_now().unwrap();
        let (_, _, records) = open(&disk.power_cut(), 1024).unwrap();
        assert_eq!(records.len(), 2);
    }
}
