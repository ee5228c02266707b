//! Truncated, flipped and missing bytes: the log is read exactly up to a reported cut, or refused.

use flux_log::{Disk, LogError, SimDisk};

use crate::support::{Owned, damaged_at, entry, open, state, write};

const SEGMENT_BYTES: u64 = 768;

/// A batch that was written: where, and what the log knew to be durable then.
#[derive(Debug)]
struct Written {
    start: u64,
    end: u64,
    synced: u64,
    records: Vec<Owned>,
}

struct SmallLog {
    disk: SimDisk,
    batches: Vec<Written>,
    /// Name and base of each segment.
    files: Vec<(String, u64)>,
}

/// A log of a few segments. `sync_every` batches it is synced; 0 for never.
fn small_log(sync_every: usize) -> SmallLog {
    let disk = SimDisk::new(3);
    let (mut log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
    let mut batches = Vec::new();
    for number in 1..=13_u64 {
        let mut records = vec![entry(1, number, &vec![number as u8; 5 * number as usize])];
        if number % 3 == 0 {
            records.push(state(2, number, 1));
        }
        for record in &records {
            log.append(&record.record()).unwrap();
        }
        log.reserve(log.batch_bytes()).unwrap();
        let (start, synced) = (log.written(), log.durable());
        let end = log.write().unwrap();
        batches.push(Written { start, end, synced, records });
        if sync_every > 0 && (number as usize).is_multiple_of(sync_every) {
            log.sync_now().unwrap();
        }
    }
    drop(log);
    let mut files: Vec<_> = disk.list().unwrap();
    files.sort();
    assert!(files.len() >= 3, "{files:?}");
    let base = |name: &String| name.trim_end_matches(".log").parse().unwrap();
    let files = files.iter().map(|name| (name.clone(), base(name))).collect();
    SmallLog { disk, batches, files }
}

impl SmallLog {
    fn last_base(&self) -> u64 {
        self.files.last().unwrap().1
    }

    fn records_before(&self, lsn: u64) -> Vec<Owned> {
        let whole = self.batches.iter().take_while(|batch| batch.end <= lsn);
        whole.flat_map(|batch| batch.records.clone()).collect()
    }

    /// The highest LSN that a batch after `lsn`, or a segment after it, says to have been durable.
    fn durable_seen_after(&self, lsn: u64) -> u64 {
        let batches = self.batches.iter().filter(|batch| batch.start >= lsn);
        let bases = self.files.iter().map(|(_, base)| *base);
        batches.map(|batch| batch.synced).chain(bases).max().unwrap()
    }
}

/// A log that was opened after a cut takes new records, and all of it reads without a cut.
fn check_goes_on(disk: &SimDisk, mut expected: Vec<Owned>) {
    let (mut log, report, records) = open(disk, SEGMENT_BYTES).unwrap();
    assert_eq!((report.cut, &records), (None, &expected));
    let more = entry(1, 999, b"new");
    write(&mut log, std::slice::from_ref(&more)).unwrap();
    log.close().unwrap();
    expected.push(more);
    let (_, report, records) = open(&disk.power_cut(), SEGMENT_BYTES).unwrap();
    assert!(report.clean);
    assert_eq!((report.cut, records), (None, expected));
}

#[test]
fn every_truncation_of_the_last_segment() {
    for sync_every in [0, 1, 3] {
        let log = small_log(sync_every);
        let (name, base) = log.files.last().unwrap();
        let contents = log.disk.contents(name).unwrap();
        let head_end = log.batches.iter().find(|batch| batch.start > *base).unwrap().start - base;
        for length in 0..contents.len() {
            let disk = log.disk.duplicate();
            disk.put(name, contents[..length].to_vec());
            let result = open(&disk, SEGMENT_BYTES);
            if (length as u64) < head_end {
                let error = result.unwrap_err();
                let offset = if length < 64 { 0 } else { 64 };
                assert_eq!(damaged_at(&error), Some((&**name, offset)), "{length}: {error}");
                continue;
            }
            let (opened, report, records) = result.unwrap();
            let expected = log.records_before(base + length as u64);
            assert_eq!(records, expected, "{length}");
            let whole = log.batches.iter().map(|batch| batch.end - batch.end.min(*base));
            let end = whole.filter(|end| *end <= length as u64).max().unwrap().max(head_end);
            let torn = contents[end as usize..length].iter().any(|byte| *byte != 0);
            assert_eq!(report.cut.is_some(), torn, "{length}: {report:?}");
            if let Some(cut) = &report.cut {
                assert_eq!((&cut.file, cut.offset), (name, end));
                assert!(cut.offset + cut.bytes <= length as u64);
            }
            drop(opened);
            check_goes_on(&disk, expected);
        }
    }
}

#[test]
fn every_truncation_of_an_earlier_segment() {
    let log = small_log(0);
    let (name, base) = &log.files[1];
    let used = (log.files[2].1 - base) as usize;
    let contents = log.disk.contents(name).unwrap();
    for length in 0..contents.len() {
        let disk = log.disk.duplicate();
        disk.put(name, contents[..length].to_vec());
        match open(&disk, SEGMENT_BYTES) {
            Err(error) => {
                assert!(length < used, "{length}: {error}");
                let (file, offset) = damaged_at(&error).unwrap();
                assert_eq!(file, name);
                assert!(offset <= length as u64);
            }
            Ok((_, report, records)) => {
                assert!(length >= used, "{length}");
                assert_eq!((report.cut, records), (None, log.records_before(u64::MAX)));
            }
        }
    }
}

/// Flips every bit of every segment, and knows for each what must come of it.
#[test]
fn every_flipped_bit() {
    for sync_every in [0, 1, 3] {
        let log = small_log(sync_every);
        for (name, base) in &log.files {
            let length = log.disk.contents(name).unwrap().len() as u64;
            for offset in 0..length {
                // All eight where it is cheap, else one that walks through the byte.
                let bits =
                    if sync_every == 3 { 0..8 } else { (offset % 8) as u8..(offset % 8) as u8 + 1 };
                for bit in bits {
                    check_flip(&log, name, *base, offset, bit);
                }
            }
        }
    }
}

fn check_flip(log: &SmallLog, name: &str, base: u64, offset: u64, bit: u8) {
    let disk = log.disk.duplicate();
    assert!(disk.flip_bit(name, offset, bit));
    let lsn = base + offset;
    let in_last = base == log.last_base();
    let following = log.files.iter().map(|(_, base)| *base).find(|other| *other > base);
    let all = log.records_before(u64::MAX);
    let hit = log.batches.iter().find(|batch| {
        batch.start >= base
            && following.is_none_or(|next| batch.end <= next)
            && (batch.start..batch.end).contains(&lsn)
    });
    let first = log.batches.iter().find(|batch| batch.start >= base).unwrap().start;
    let result = open(&disk, SEGMENT_BYTES);
    let context = format!("{name} at {offset} bit {bit}");
    match hit {
        Some(batch) if !in_last || log.durable_seen_after(batch.start) > batch.start => {
            let error = result.expect_err(&context);
            assert_eq!(damaged_at(&error), Some((name, batch.start - base)), "{context}");
        }
        Some(batch) => {
            let (_, report, records) = result.expect(&context);
            assert_eq!(records, log.records_before(batch.start), "{context}");
            assert_eq!(report.cut.expect(&context).offset, batch.start - base, "{context}");
        }
        None if lsn < first => {
            let error = result.expect_err(&context);
            let at = if offset < 64 { 0 } else { 64 };
            assert_eq!(damaged_at(&error), Some((name, at)), "{context}");
        }
        None => {
            let (_, report, records) = result.expect(&context);
            assert_eq!(records, all, "{context}");
            assert_eq!(report.cut.is_some(), in_last, "{context}");
        }
    }
}

#[test]
fn a_closed_log_refuses_any_damage() {
    let log = small_log(0);
    let (opened, ..) = open(&log.disk, SEGMENT_BYTES).unwrap();
    opened.close().unwrap();
    let last = log.batches.last().unwrap();
    let (name, base) = log.files.last().unwrap();
    for lsn in last.start..last.end {
        let disk = log.disk.duplicate();
        disk.flip_bit(name, lsn - base, 5);
        let error = open(&disk, SEGMENT_BYTES).unwrap_err();
        assert_eq!(damaged_at(&error), Some((&**name, last.start - base)), "{error}");
    }
}

/// Without a clean close too, what a start has recovered is proven from then on.
#[test]
fn what_was_recovered_once_is_never_cut() {
    let log = small_log(0);
    drop(open(&log.disk, SEGMENT_BYTES).unwrap());
    let last = log.batches.last().unwrap();
    let (name, base) = log.files.last().unwrap();
    log.disk.flip_bit(name, last.end - 1 - base, 0);
    let error = open(&log.disk, SEGMENT_BYTES).unwrap_err();
    assert_eq!(damaged_at(&error), Some((&**name, last.start - base)));
    let text = error.to_string();
    assert!(text.contains(&**name) && text.contains("backup"), "{text}");
}

#[test]
fn a_missing_segment_is_damage() {
    let log = small_log(1);
    log.disk.remove(&log.files[1].0).unwrap();
    let error = open(&log.disk, SEGMENT_BYTES).unwrap_err();
    let (file, offset) = damaged_at(&error).unwrap();
    assert_eq!((file, offset), (&*log.files[0].0, log.files[1].1 - log.files[0].1));
}

#[test]
fn a_renamed_segment_is_damage() {
    let log = small_log(1);
    let (name, base) = log.files.last().unwrap();
    let other = format!("{:020}.log", base + 8);
    log.disk.rename(name, &other).unwrap();
    assert!(damaged_at(&open(&log.disk, SEGMENT_BYTES).unwrap_err()).is_some());
    let huge = format!("{}.log", u64::MAX);
    log.disk.rename(&other, &huge).unwrap();
    assert_eq!(damaged_at(&open(&log.disk, SEGMENT_BYTES).unwrap_err()), Some((&*huge, 0)));
}

#[test]
fn an_unknown_version_says_so() {
    let log = small_log(1);
    let (name, _) = &log.files[0];
    let mut contents = log.disk.contents(name).unwrap();
    contents[8] = 2;
    contents[12..16].fill(0);
    let crc = crc32c::crc32c(&contents[..64]);
    contents[12..16].copy_from_slice(&crc.to_le_bytes());
    log.disk.put(name, contents);
    match open(&log.disk, SEGMENT_BYTES).unwrap_err() {
        LogError::UnknownVersion { file, found: 2, supported: 1 } => assert_eq!(file, *name),
        other => panic!("{other}"),
    }
}

/// A value that holds a whole segment of this very log is still only a value: wherever the batch
/// around it is torn, nothing in it is taken for a record or for proof.
#[test]
fn records_within_a_value_stay_a_value() {
    let log = small_log(1);
    let (name, _) = log.files.last().unwrap();
    let stolen = log.disk.contents(name).unwrap();
    let (mut opened, _, before) = open(&log.disk, SEGMENT_BYTES).unwrap();
    let crafted = entry(1, 500, &stolen);
    opened.append(&crafted.record()).unwrap();
    opened.reserve(opened.batch_bytes()).unwrap();
    let start = opened.written();
    let end = opened.write().unwrap();
    drop(opened);
    let name = log.disk.list().unwrap().into_iter().max().unwrap();
    let base: u64 = name.trim_end_matches(".log").parse().unwrap();
    for lsn in start..end {
        let disk = log.disk.duplicate();
        disk.flip_bit(&name, lsn - base, 2);
        let (_, report, records) = open(&disk, SEGMENT_BYTES).unwrap();
        assert_eq!(records, before);
        assert_eq!(report.cut.unwrap().offset, start - base);
    }
}

/// Bytes of a torn batch never come back, even when what is written over them is shorter.
#[test]
fn a_cut_tail_does_not_come_back() {
    let disk = SimDisk::new(5);
    let (mut log, ..) = open(&disk, 4096).unwrap();
    write(&mut log, &[entry(1, 1, b"kept")]).unwrap();
    let torn = log.written();
    write(&mut log, &[entry(1, 2, &[1; 64])]).unwrap();
    write(&mut log, &[entry(1, 3, b"old")]).unwrap();
    drop(log);
    let name = disk.list().unwrap().remove(0);
    disk.flip_bit(&name, torn + 80, 1);
    let (mut log, report, _) = open(&disk, 4096).unwrap();
    assert_eq!(report.cut.map(|cut| cut.offset), Some(torn));
    // As long as the torn batch and the mark together, so that "old" would follow in its place.
    write(&mut log, &[entry(1, 2, &[2; 24])]).unwrap();
    drop(log);
    let (_, _, records) = open(&disk, 4096).unwrap();
    assert_eq!(records, [entry(1, 1, b"kept"), entry(1, 2, &[2; 24])]);
}

/// A write that went astray within the segment has the right salt and checksums, but the wrong place.
#[test]
fn a_batch_in_the_wrong_place_is_not_read() {
    let disk = SimDisk::new(5);
    let (mut log, ..) = open(&disk, 4096).unwrap();
    let starts: Vec<usize> = (1..=3)
        .map(|index| {
            let start = log.written();
            write(&mut log, &[entry(1, index, &[index as u8; 48])]).unwrap();
            start as usize
        })
        .collect();
    let end = log.written() as usize;
    drop(log);
    let name = disk.list().unwrap().remove(0);
    let mut contents = disk.contents(&name).unwrap();
    contents.copy_within(starts[0]..starts[1], starts[2]);
    assert_eq!(end - starts[2], starts[1] - starts[0]);
    disk.put(&name, contents);
    let (_, report, records) = open(&disk, 4096).unwrap();
    assert_eq!(records, [1, 2].map(|index| entry(1, index, &[index as u8; 48])));
    assert_eq!(report.cut.map(|cut| cut.offset), Some(starts[2] as u64));
}
