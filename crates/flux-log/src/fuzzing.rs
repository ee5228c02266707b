//! Entry points for fuzz targets: whatever the disk holds, reading it must not panic.

use std::{ops::ControlFlow, sync::Arc};

use crate::{Log, LogOptions, Scanned, Snapshot, segment, sim::SimDisk};

const SEGMENT_BYTES: u64 = 4096;

/// Recovers a log from `bytes`, once as a whole segment file, and once as the records of a batch whose
/// checksums are right; then reads `bytes` as a snapshot.
pub fn recover(bytes: &[u8]) {
    open(bytes.to_vec());
    open(segment::with_body(bytes));
    read_snapshot(bytes);
}

fn open(file: Vec<u8>) {
    let disk = SimDisk::new(0);
    disk.put(&segment::file_name(0), file);
    let options = LogOptions { segment_bytes: SEGMENT_BYTES, ..LogOptions::new(1) };
    let mut first = 0_u64;
    let opened =
        Log::open(Arc::new(disk.clone()), options.clone(), &mut |_| first += 1, &mut |_| {});
    if let Ok((log, _)) = opened {
        let reader = log.reader();
        let mut read = 0_u64;
        let scanned = reader.scan(reader.segments()[0].base, &mut |_, _| {
            read += 1;
            ControlFlow::Continue(())
        });
        assert!(matches!(scanned, Ok(Scanned::End(end)) if end == log.written()));
        assert_eq!(first, read, "a reader finds the same records");
        drop(log);
        let mut second = 0_u64;
        Log::open(Arc::new(disk), options, &mut |_| second += 1, &mut |_| {})
            .expect("a log that was opened once can be opened again");
        assert_eq!(first, second, "the second opening finds the same records");
    }
}

fn read_snapshot(bytes: &[u8]) {
    let disk = SimDisk::new(0);
    disk.put("snap-00000-00000000000000000001", bytes.to_vec());
    let Ok(ids) = Snapshot::list(&disk) else {
        return;
    };
    for id in ids {
        let Ok(mut snapshot) = Snapshot::open(&disk, id) else {
            continue;
        };
        while let Ok(Some(_)) = snapshot.next_chunk() {}
    }
}
