//! The log on a real file system.

use std::{fs, io::ErrorKind, sync::Arc};

use flux_log::{Disk, FileDisk, LogError};

use crate::support::{damaged_at, entry, open_shared, trim, write};

#[test]
fn a_directory_has_one_user() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b");
    let disk = FileDisk::open(&path).unwrap();
    let error = FileDisk::open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("in use"), "{error}");
    drop(disk);
    FileDisk::open(&path).unwrap();
}

#[test]
fn segments_are_allocated_and_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let (mut log, ..) = open_shared(disk.clone(), 1 << 16).unwrap();
    let length = |name: &str| fs::metadata(directory.path().join(name)).unwrap().len();
    assert_eq!(length("00000000000000000000.log"), 1 << 16);
    let records: Vec<_> = (1..=50).map(|index| entry(3, index, &[index as u8; 5000])).collect();
    for record in &records {
        write(&mut log, std::slice::from_ref(record)).unwrap();
    }
    assert!(log.segments() > 3);
    assert_eq!(trim(&mut log, &mut |_| 0).unwrap(), 0);
    log.close().unwrap();
    let (mut log, report, read) = open_shared(disk.clone(), 1 << 16).unwrap();
    assert!(report.clean);
    assert_eq!(read, records);
    let dropped = trim(&mut log, &mut |_| 50).unwrap();
    assert_eq!(dropped, report.segments - 1);
    let logs = disk.list().unwrap().iter().filter(|name| name.ends_with(".log")).count();
    assert_eq!(logs, 1);
}

#[test]
fn a_torn_file_is_cut_and_a_damaged_one_refused() {
    let directory = tempfile::tempdir().unwrap();
    let name = "00000000000000000000.log";
    let path = directory.path().join(name);
    let disk = Arc::new(FileDisk::open(directory.path()).unwrap());
    let (mut log, ..) = open_shared(disk.clone(), 1 << 16).unwrap();
    write(&mut log, &[entry(1, 1, b"first")]).unwrap();
    let second = log.written();
    write(&mut log, &[entry(1, 2, &[7; 100])]).unwrap();
    let end = log.written();
    drop(log);

    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(end - 30).unwrap();
    let (log, report, records) = open_shared(disk.clone(), 1 << 16).unwrap();
    let cut = report.cut.unwrap();
    assert_eq!((&*cut.file, cut.offset), (name, second));
    assert_eq!(records, [entry(1, 1, b"first")]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 16, "its blocks are back");
    log.close().unwrap();

    let mut bytes = fs::read(&path).unwrap();
    bytes[second as usize - 8] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = open_shared(disk, 1 << 16).unwrap_err();
    assert!(matches!(damaged_at(&error), Some((file, _)) if file == name), "{error}");
}

#[test]
fn errors_name_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(directory.path()).unwrap();
    fs::write(directory.path().join("00000000000000000000.log"), b"").unwrap();
    let error = open_shared(Arc::new(disk), 1 << 16).unwrap_err();
    assert!(matches!(error, LogError::Damaged { offset: 0, .. }), "{error}");
}
