//! Snapshots: complete or not there.

use std::sync::Arc;

use flux_log::{Disk, FileDisk, LogError, SimDisk, Snapshot, SnapshotId, SnapshotWriter};
use proptest::prelude::*;

use crate::support::damaged_at;

fn take(
    disk: &(impl Disk + Clone + 'static),
    partition: u16,
    index: u64,
    meta: &[u8],
    chunks: &[Vec<u8>],
) -> Result<SnapshotId, LogError> {
    let mut writer = SnapshotWriter::create(Arc::new(disk.clone()), partition, index, meta)?;
    for chunk in chunks {
        writer.chunk(chunk)?;
    }
    writer.finish()
}

fn read(disk: &dyn Disk, id: SnapshotId) -> Result<(Vec<u8>, Vec<Vec<u8>>), LogError> {
    let mut snapshot = Snapshot::open(disk, id)?;
    let mut chunks = Vec::new();
    while let Some(chunk) = snapshot.next_chunk()? {
        chunks.push(chunk.to_vec());
    }
    assert_eq!(snapshot.position(), snapshot.size());
    assert!(snapshot.next_chunk()?.is_none());
    Ok((snapshot.meta().to_vec(), chunks))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read_back(
        partition in any::<u16>(),
        index in any::<u64>(),
        meta in prop::collection::vec(any::<u8>(), 0..100),
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..500), 0..20),
    ) {
        let disk = SimDisk::new(1);
        let id = take(&disk, partition, index, &meta, &chunks).unwrap();
        prop_assert_eq!(id, SnapshotId { partition, index });
        let after = disk.power_cut();
        prop_assert_eq!(Snapshot::list(&after).unwrap(), vec![id]);
        prop_assert_eq!(read(&after, id).unwrap(), (meta, chunks));
    }
}

#[test]
fn one_that_is_received_does_not_meet_one_that_is_taken() {
    let disk = SimDisk::new(1);
    let older = take(&disk, 3, 5, b"", &[]).unwrap();
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let mut taken = SnapshotWriter::create(Arc::clone(&shared), 3, 9, b"m").unwrap();
    taken.chunk(b"entries").unwrap();
    let mut received = SnapshotWriter::receive(Arc::clone(&shared), 3, 9, b"m").unwrap();
    received.chunk(b"ent").unwrap();
    taken.sync().unwrap();
    let id = taken.finish().unwrap();
    assert!(Snapshot::open(&disk, older).is_err());
    assert_eq!(read(&disk, id).unwrap(), (b"m".to_vec(), vec![b"entries".to_vec()]));
    received.chunk(b"ries").unwrap();
    received.finish().unwrap();
    let chunks = vec![b"ent".to_vec(), b"ries".to_vec()];
    assert_eq!(read(&disk.duplicate().power_cut(), id).unwrap(), (b"m".to_vec(), chunks));

    // One that is broken off leaves nothing behind, not even after a crash.
    let broken_off = SnapshotWriter::receive(Arc::clone(&shared), 3, 12, b"").unwrap();
    let after = disk.duplicate();
    drop(broken_off);
    assert_eq!(Snapshot::list(&after).unwrap(), vec![id]);
    assert_eq!((disk.list().unwrap().len(), after.list().unwrap().len()), (1, 1));
}

#[test]
fn a_large_snapshot_on_a_real_disk() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let chunks: Vec<Vec<u8>> = (0..10).map(|n: u8| vec![n; 300_000 * n as usize]).collect();
    let mut writer = SnapshotWriter::create(disk.clone(), 2, 9, b"meta").unwrap();
    for chunk in &chunks {
        writer.chunk(chunk).unwrap();
        writer.sync().unwrap();
    }
    let id = writer.finish().unwrap();
    assert_eq!(read(&*disk, id).unwrap(), (b"meta".to_vec(), chunks));
}

#[test]
fn the_newest_of_each_partition_counts() {
    let disk = SimDisk::new(1);
    take(&disk, 1, 5, b"", &[b"old".to_vec()]).unwrap();
    take(&disk, 2, 900, b"", &[]).unwrap();
    take(&disk, 1, 10, b"", &[b"new".to_vec()]).unwrap();
    let ids = Snapshot::list(&disk).unwrap();
    let expected = [(1, 10), (2, 900)].map(|(partition, index)| SnapshotId { partition, index });
    assert_eq!(ids, expected);
    assert_eq!(disk.list().unwrap().len(), 2, "the older one is gone");
}

#[test]
fn those_of_a_partition_can_be_removed() {
    let disk = SimDisk::new(1);
    take(&disk, 1, 5, b"", &[b"one".to_vec()]).unwrap();
    take(&disk, 12, 7, b"", &[]).unwrap();
    Snapshot::remove(&disk, 1).unwrap();
    Snapshot::remove(&disk, 3).unwrap();
    let left = [SnapshotId { partition: 12, index: 7 }];
    assert_eq!(Snapshot::list(&disk.power_cut()).unwrap(), left);
}

#[test]
fn an_older_one_does_not_come_back_when_its_partition_is_removed() {
    // Wherever the power fails while the second finishes, and then while both are removed.
    for (seed, first_cut) in (0..40).flat_map(|seed| (0..12).map(move |cut| (seed, cut))) {
        let disk = SimDisk::new(seed);
        take(&disk, 1, 5, b"", &[]).unwrap();
        disk.power_off_after(first_cut);
        let _ = take(&disk, 1, 9, b"", &[]);
        let disk = disk.power_cut();
        let found = Snapshot::list(&disk).unwrap();
        assert_eq!(found.len(), 1, "seed {seed}, cut {first_cut}");
        for second_cut in 0..6 {
            let disk = disk.duplicate();
            disk.power_off_after(second_cut);
            let _ = Snapshot::remove(&disk, 1);
            let left = Snapshot::list(&disk.power_cut()).unwrap();
            assert!(left.is_empty() || left == found, "seed {seed}: {left:?}, not {found:?}");
        }
    }
}

#[test]
fn every_flipped_bit_and_truncation_is_noticed() {
    let disk = SimDisk::new(1);
    let chunks = [b"one".to_vec(), vec![0; 40], vec![], vec![255; 33]];
    let id = take(&disk, 1, 5, b"some meta", &chunks).unwrap();
    let name = id.file_name();
    let contents = disk.contents(&name).unwrap();
    for offset in 0..contents.len() as u64 {
        for bit in 0..8 {
            let disk = disk.duplicate();
            disk.flip_bit(&name, offset, bit);
            let error = read(&disk, id).unwrap_err();
            let (file, at) = damaged_at(&error).unwrap_or_else(|| panic!("{error}"));
            assert_eq!(file, name);
            assert!(at <= offset);
        }
        disk.put(&name, contents[..offset as usize].to_vec());
        assert!(damaged_at(&read(&disk, id).unwrap_err()).is_some());
        disk.put(&name, contents.clone());
    }
    let longer = [&*contents, &[0; 8]].concat();
    disk.put(&name, longer);
    assert!(damaged_at(&read(&disk, id).unwrap_err()).is_some());
    disk.put("snap-00002-00000000000000000005", contents);
    let other = SnapshotId { partition: 2, index: 5 };
    assert!(damaged_at(&read(&disk, other).unwrap_err()).is_some());
}

/// The power fails before every single change that taking a second snapshot makes.
#[test]
fn a_crash_at_any_point_leaves_a_whole_snapshot() {
    for seed in 0..30 {
        for step in 0..12 {
            let disk = SimDisk::new(seed);
            let old = take(&disk, 1, 5, b"old", &[vec![1; 2000]]).unwrap();
            disk.power_off_after(step);
            let result = take(&disk, 1, 8, b"new", &[vec![2; 2000]]);
            let after = disk.power_cut();
            let ids = Snapshot::list(&after).unwrap();
            let [id] = ids[..] else { panic!("{ids:?}") };
            let expected: (&[u8], u8) = if id == old { (b"old", 1) } else { (b"new", 2) };
            let (meta, chunks) = read(&after, id).unwrap();
            assert_eq!((&*meta, chunks), (expected.0, vec![vec![expected.1; 2000]]));
            if result.is_ok() {
                assert_eq!(id.index, 8);
            }
            assert!(after.list().unwrap().iter().all(|name| !name.ends_with(".tmp")));
        }
    }
}

#[test]
fn a_full_disk_or_a_fault_leaves_the_old_one() {
    let disk = SimDisk::new(1);
    let old = take(&disk, 1, 5, b"old", &[vec![1; 100]]).unwrap();
    let used = disk.used();
    for extra in [0, 40, 100, 500] {
        disk.limit_capacity(Some(used + extra));
        let error = take(&disk, 1, 6, b"new", &[vec![2; 1000]]).unwrap_err();
        assert!(matches!(error, LogError::Full { .. }), "{error}");
        assert_eq!(disk.used(), used, "the temporary file is gone");
    }
    disk.limit_capacity(None);

    // A failed sync cannot be made good by the next one.
    let mut writer = SnapshotWriter::create(Arc::new(disk.clone()), 1, 6, b"").unwrap();
    writer.chunk(&[3; 1000]).unwrap();
    disk.fail_sync_after(0);
    assert!(writer.sync().is_err());
    assert!(matches!(writer.finish().unwrap_err(), LogError::Poisoned { .. }));
    assert_eq!(disk.used(), used);

    drop(SnapshotWriter::create(Arc::new(disk.clone()), 1, 7, b"").unwrap());
    assert_eq!(disk.used(), used, "a dropped writer leaves nothing");
    assert_eq!(Snapshot::list(&disk).unwrap(), [old]);
    assert_eq!(read(&disk, old).unwrap().0, b"old");
}

/// The process dies between giving a snapshot its name and syncing the directory. Once listed, the log
/// is trimmed for it, so a power cut must not take it away.
#[test]
fn a_snapshot_that_was_listed_stays() {
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        take(&disk, 1, 5, b"old", &[]).unwrap();
        disk.fail_sync_after(1);
        assert!(take(&disk, 1, 8, b"new", &[]).is_err());
        let listed = Snapshot::list(&disk).unwrap();
        assert_eq!(listed, [SnapshotId { partition: 1, index: 8 }]);
        assert_eq!(Snapshot::list(&disk.power_cut()).unwrap(), listed);
    }
}
