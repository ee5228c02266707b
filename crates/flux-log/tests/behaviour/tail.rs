//! A reader sees what a recovery would visit, whatever the log does meanwhile.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use flux_log::{
    BATCH_HEADER_BYTES, Disk, FileDisk, Keep, Log, LogError, LogReader, Lsn, Scanned, SimDisk,
};
use proptest::prelude::*;

use crate::{
    support::{
        Owned, damaged_at, entry, open, open_shared, reset, scan, scan_all, state, trim, write,
    },
    watched::{Model, SEGMENT_HEADER_BYTES, Watch, WatchedDisk},
};

const SEGMENT_BYTES: u64 = 1024;
/// How long a thread waits for the other before the test gives up.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Owned>),
    Sync,
    Prepare,
    /// As if there were snapshots of all partitions up to this index, and readers from the other.
    Trim(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let record = prop_oneof![
        8 => (0_u16..3, 1_u64..30, prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(partition, index, payload)| entry(partition, index, &payload)),
        1 => (0_u16..3, 1_u64..9).prop_map(|(partition, term)| state(partition, term, 1)),
        1 => (0_u16..3, 1_u64..3, 0_u64..9)
            .prop_map(|(partition, replica, start)| reset(partition, replica, start)),
    ];
    prop_oneof![
        12 => prop::collection::vec(record, 1..5).prop_map(Step::Write),
        2 => Just(Step::Sync),
        2 => Just(Step::Prepare),
        2 => (0_u64..40, 0_u64..60).prop_map(|(snapshot, from)| Step::Trim(snapshot, from)),
    ]
}

/// Takes a step; where the batch is that it wrote.
fn take(log: &mut Log, step: &Step) -> Result<Option<Lsn>, LogError> {
    match step {
        Step::Write(records) => {
            for record in records {
                log.append(&record.record())?;
            }
            let bytes = log.batch_bytes() as u64;
            return Ok(Some(log.write()? - bytes));
        }
        Step::Sync => drop(log.sync_now()?),
        Step::Prepare => {
            if let Some(target) = log.prepare_target() {
                log.prepared(target.run());
            }
        }
        Step::Trim(snapshot, from) => {
            let keep = Keep { snapshot: *snapshot, from: *from };
            log.trim(3 * SEGMENT_BYTES, &mut |_| keep)?;
        }
    }
    Ok(None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn at_no_moment_does_it_see_more_or_less(
        steps in prop::collection::vec(step(), 1..60),
        clean in any::<bool>(),
    ) {
        let watch = Arc::new(Mutex::new(None));
        let disk = WatchedDisk { disk: SimDisk::new(1), watch: watch.clone() };
        let mut model = Model::default();
        for round in 0..2 {
            let (mut log, _, visited) = open(&disk, SEGMENT_BYTES).unwrap();
            let reader = log.reader();
            prop_assert_eq!(&visited, &scan_all(&reader), "round {}", round);
            *watch.lock().unwrap() = Some(Watch { reader, model, looks: 0 });
            for step in &steps {
                let lsn = take(&mut log, step).unwrap();
                let mut watch = watch.lock().unwrap();
                let watch = watch.as_mut().unwrap();
                if let (Some(lsn), Step::Write(records)) = (lsn, step) {
                    watch.model.0.extend(records.iter().map(|record| (lsn, record.clone())));
                }
                watch.look();
            }
            // Not while the log is opened: that is not yet the log that the reader is of.
            if clean {
                log.close().unwrap();
            } else {
                drop(log);
            }
            let watched = watch.lock().unwrap().take().unwrap();
            prop_assert!(watched.looks >= steps.len() as u64);
            model = watched.model;
        }
    }

    #[test]
    fn another_thread_reads_what_one_writes(
        steps in prop::collection::vec(step(), 100..200),
    ) {
        race(Arc::new(SimDisk::new(1)), &steps, SEGMENT_BYTES);
    }
}

/// What a scan of the reading thread saw. It stops where the second batch begins, now and then.
#[derive(Debug)]
struct Seen {
    from: Lsn,
    records: Vec<(Lsn, Owned)>,
    scanned: Scanned,
}

/// Scans again and again, from where the last scan ended, and tells how far it is.
fn follow(reader: &LogReader, written: &AtomicBool, told: &Sender<Lsn>) -> Vec<Seen> {
    let (mut seen, mut from) = (Vec::new(), 0);
    for round in 0_u64.. {
        let last = written.load(Ordering::SeqCst);
        let mut records: Vec<(Lsn, Owned)> = Vec::new();
        let scanned = reader
            .scan(from, &mut |lsn, record| {
                let second = records.last().is_some_and(|(before, _)| *before != lsn);
                if round % 3 == 0 && second {
                    return ControlFlow::Break(());
                }
                records.push((lsn, Owned::from_record(record)));
                ControlFlow::Continue(())
            })
            .unwrap();
        let (Scanned::End(next) | Scanned::Stopped(next) | Scanned::Gone { oldest: next }) =
            scanned;
        if next != from {
            seen.push(Seen { from, records, scanned });
            // The writer may have gone.
            let _ = told.send(next);
        } else if last && scanned == Scanned::End(from) {
            break;
        }
        from = next;
        thread::yield_now();
    }
    seen
}

/// Waits until the reading thread is there.
fn wait_for(reached: &Receiver<Lsn>, lsn: Lsn) {
    while reached.recv_timeout(DEADLINE).expect("the reader goes on") < lsn {}
}

/// One thread writes and trims while another reads; then all that it has read is checked.
fn race(disk: Arc<dyn Disk>, steps: &[Step], segment_bytes: u64) -> usize {
    let (mut log, ..) = open_shared(disk.clone(), segment_bytes).unwrap();
    let reader = log.reader();
    let mut model = Model::default();
    let written = AtomicBool::new(false);
    let (told, reached) = mpsc::channel();
    let seen = thread::scope(|scope| {
        let (reader, written) = (&reader, &written);
        let follower = scope.spawn(move || follow(reader, written, &told));
        for (place, step) in steps.iter().enumerate() {
            if let (Some(lsn), Step::Write(records)) = (take(&mut log, step).unwrap(), step) {
                model.0.extend(records.iter().map(|record| (lsn, record.clone())));
            }
            if place % 50 == 49 && !model.0.is_empty() {
                wait_for(&reached, log.written());
            }
        }
        written.store(true, Ordering::SeqCst);
        follower.join().unwrap()
    });
    let mut next = 0;
    for one in &seen {
        assert_eq!(one.from, next);
        next = check(one, &model);
    }
    assert_eq!(next, log.written(), "it has read all");
    let last = scan_all(&reader);
    drop(log);
    let (_, _, visited) = open_shared(disk, segment_bytes).unwrap();
    assert_eq!(last, visited);
    seen.len()
}

/// Compares what a scan saw with what was written, and returns where the next one begins.
fn check(seen: &Seen, model: &Model) -> Lsn {
    let Seen { from, records, scanned } = seen;
    let rest = &model.0[model.0.partition_point(|(lsn, _)| lsn < from)..];
    // A scan that begins with a segment may begin with the states of its head.
    let head = from + SEGMENT_HEADER_BYTES;
    let is_head = |(lsn, _): &&(Lsn, Owned)| *lsn == head && rest.iter().all(|(at, _)| at != lsn);
    let heads = records.iter().take_while(is_head).count();
    let states = records[..heads].iter().map(|(_, state)| state);
    assert!(heads == 0 || states.eq(&model.states(*from)), "{seen:?}");
    let records = &records[heads..];
    assert_eq!(records, &rest[..records.len()]);
    let missed = rest.get(records.len()).map(|(lsn, _)| *lsn);
    match *scanned {
        Scanned::End(end) => {
            assert!(missed.is_none_or(|lsn| lsn >= end), "{seen:?}");
            end
        }
        Scanned::Stopped(at) => {
            assert!(missed == Some(at) || at == head, "{seen:?}");
            at
        }
        Scanned::Gone { oldest } => {
            // It may have had no records.
            assert!(oldest > *from, "{seen:?}");
            oldest
        }
    }
}

#[test]
fn another_thread_reads_files() {
    let directory = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(directory.path()).unwrap();
    let mut steps = Vec::new();
    for index in 1..=2000 {
        let payload = vec![index as u8; 40 * (index as usize % 50)];
        steps.push(Step::Write(vec![entry(1, index, &payload), entry(2, index, &payload)]));
        match index % 100 {
            30 => steps.push(Step::Write(vec![state(1, index, 3)])),
            60 => steps.push(Step::Trim(index.saturating_sub(200), u64::MAX)),
            80 => steps.push(Step::Prepare),
            90 => steps.push(Step::Sync),
            _ => {}
        }
    }
    let scans = race(Arc::new(disk), &steps, 1 << 16);
    assert!(scans > 20, "{scans} scans do not overlap with what is written");
}

/// Batches of two entries each, in several segments, and the LSN of each batch.
fn some_segments(disk: &SimDisk) -> (Log, Vec<Lsn>) {
    let (mut log, ..) = open(disk, SEGMENT_BYTES).unwrap();
    let mut batches = Vec::new();
    for index in 1..=12 {
        let records = vec![entry(1, 2 * index - 1, &[1; 90]), entry(1, 2 * index, &[2; 90])];
        batches.extend(take(&mut log, &Step::Write(records)).unwrap());
    }
    assert!(log.segments() >= 4);
    (log, batches)
}

fn indexes(records: &[(Lsn, Owned)]) -> Vec<u64> {
    let index = |(_, record): &(Lsn, Owned)| match record {
        Owned::Entry { index, .. } => *index,
        Owned::State(state) => panic!("{state:?}"),
    };
    records.iter().map(index).collect()
}

#[test]
fn a_scan_begins_with_a_batch_or_else_with_a_segment() {
    let disk = SimDisk::new(1);
    let (log, batches) = some_segments(&disk);
    let reader = log.reader();
    let bases: Vec<Lsn> = reader.segments().iter().map(|segment| segment.base).collect();
    for from in 0..log.written() + 20 {
        let (records, scanned) = scan(&reader, from);
        assert_eq!(scanned.unwrap(), Scanned::End(log.written()));
        let base = *bases.iter().rfind(|base| **base <= from).unwrap();
        let first = match from {
            _ if from >= log.written() => batches.len(),
            _ if batches.contains(&from) => batches.iter().position(|lsn| *lsn == from).unwrap(),
            _ => batches.iter().position(|lsn| *lsn >= base).unwrap(),
        };
        let expected: Vec<u64> = (2 * first as u64 + 1..=24).collect();
        assert_eq!(indexes(&records), expected, "from {from}");
    }
}

#[test]
fn a_scan_stops_when_told_and_goes_on_with_that_batch() {
    let (log, batches) = some_segments(&SimDisk::new(1));
    let reader = log.reader();
    for stop in 1..=24 {
        let mut visited = 0;
        let scanned = reader.scan(0, &mut |_, _| {
            visited += 1;
            if visited == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let at = batches[(stop - 1) / 2];
        assert_eq!(scanned.unwrap(), Scanned::Stopped(at));
        let first = (stop as u64 - 1) / 2 * 2 + 1;
        assert_eq!(indexes(&scan(&reader, at).0), (first..=24).collect::<Vec<_>>());
    }
}

#[test]
fn what_is_written_during_a_scan_is_for_the_next() {
    let (mut log, _) = some_segments(&SimDisk::new(1));
    let (reader, end) = (log.reader(), log.written());
    let mut visited = Vec::new();
    let scanned = reader.scan(0, &mut |lsn, record| {
        if visited.is_empty() {
            // The segment that was being written is full by the time that the scan gets there.
            for index in 25..=40 {
                write(&mut log, &[entry(1, index, &[3; 90])]).unwrap();
            }
        }
        visited.push((lsn, Owned::from_record(record)));
        ControlFlow::Continue(())
    });
    assert_eq!(scanned.unwrap(), Scanned::End(end));
    assert_eq!(indexes(&visited), (1..=24).collect::<Vec<_>>());
    let (records, scanned) = scan(&reader, end);
    assert_eq!(scanned.unwrap(), Scanned::End(log.written()));
    assert_eq!(indexes(&records), (25..=40).collect::<Vec<_>>());
}

#[test]
fn the_segments_are_known() {
    let (mut log, _) = some_segments(&SimDisk::new(1));
    let reader = log.reader();
    let segments = reader.segments();
    assert_eq!(segments.len(), log.segments());
    let highest: Vec<_> = segments.iter().map(|one| one.highest.clone()).collect();
    assert_eq!(highest[0].as_deref(), log.oldest_segment());
    assert_eq!(highest.last(), Some(&None), "it is being written");
    assert!(segments.is_sorted_by_key(|segment| segment.base));

    write(&mut log, &[reset(1, 4, 20)]).unwrap();
    assert_eq!(reader.segments()[0].highest, highest[0], "the reset is not durable");
    log.sync_now().unwrap();
    let segments = reader.segments();
    let (_, sealed) = segments.split_last().unwrap();
    assert!(sealed.iter().all(|segment| segment.highest == Some(Vec::new())), "{segments:?}");
}

#[test]
fn what_is_trimmed_is_gone() {
    let disk = SimDisk::new(1);
    let (mut log, batches) = some_segments(&disk);
    let reader = log.reader();
    let bases: Vec<Lsn> = reader.segments().iter().map(|segment| segment.base).collect();
    let highest = log.oldest_segment().unwrap()[0].1;
    assert_eq!(trim(&mut log, &mut |_| highest).unwrap(), 1);
    for from in [0, bases[1] - 8] {
        let (records, scanned) = scan(&reader, from);
        assert_eq!(scanned.unwrap(), Scanned::Gone { oldest: bases[1] });
        assert_eq!(records, []);
    }
    assert_eq!(indexes(&scan(&reader, bases[1]).0)[0], highest + 1);

    // What is trimmed while it is read is read to its end; what comes next is gone.
    let mut visited = Vec::new();
    let scanned = reader.scan(bases[1], &mut |lsn, record| {
        if visited.is_empty() {
            assert_eq!(trim(&mut log, &mut |_| 24).unwrap(), bases.len() - 2);
        }
        visited.push((lsn, Owned::from_record(record)));
        ControlFlow::Continue(())
    });
    let oldest = *bases.last().unwrap();
    assert_eq!(scanned.unwrap(), Scanned::Gone { oldest });
    let of_segment =
        batches.iter().filter(|lsn| (bases[1]..bases[2]).contains(*lsn)).count() as u64;
    assert_eq!(indexes(&visited), (highest + 1..=highest + 2 * of_segment).collect::<Vec<_>>());
    assert_eq!(scan(&reader, oldest).1.unwrap(), Scanned::End(log.written()));
}

#[test]
fn damage_is_named_and_what_is_before_it_visited() {
    let names: Vec<String> = {
        let disk = SimDisk::new(1);
        some_segments(&disk);
        disk.list().unwrap()
    };
    assert!(names.len() >= 4);
    for name in names {
        let disk = SimDisk::new(1);
        let (log, batches) = some_segments(&disk);
        let reader = log.reader();
        let base: Lsn = name.strip_suffix(".log").unwrap().parse().unwrap();
        let next = reader.segments().iter().map(|one| one.base).find(|next| *next > base);
        let end = next.unwrap_or(log.written());
        for offset in 0..end - base {
            assert!(disk.flip_bit(&name, offset, 3));
            let (records, scanned) = scan(&reader, 0);
            let error = scanned.unwrap_err();
            let (file, at) = damaged_at(&error).unwrap_or_else(|| panic!("{error}"));
            assert_eq!(file, name);
            // A batch is what can be named, and the header, and the head.
            let lsn = batches.iter().rfind(|lsn| **lsn <= base + offset && **lsn >= base);
            let expected = lsn.map_or(if offset < 64 { 0 } else { 64 }, |lsn| lsn - base);
            assert_eq!(at, expected, "offset {offset}");
            let before = batches.iter().take_while(|lsn| **lsn < base + at).count() as u64;
            assert_eq!(indexes(&records), (1..=2 * before).collect::<Vec<_>>());
            // A scan that begins behind it does not see it, if it is not the header that is damaged.
            if let Some(lsn) = batches.iter().find(|lsn| **lsn > base + offset) {
                let (_, scanned) = scan(&reader, *lsn);
                assert_eq!(scanned.is_ok(), offset >= 64 || *lsn >= end, "offset {offset}");
            }
            assert!(disk.flip_bit(&name, offset, 3));
        }
        assert_eq!(scan(&reader, 0).1.unwrap(), Scanned::End(log.written()));
    }
}

#[test]
fn a_file_that_is_cut_or_lost_is_an_error() {
    let disk = SimDisk::new(1);
    let (log, batches) = some_segments(&disk);
    let reader = log.reader();
    let name = "00000000000000000000.log";
    let last = batches.iter().rfind(|lsn| **lsn < reader.segments()[1].base).unwrap();
    disk.open(name).unwrap().truncate(last + BATCH_HEADER_BYTES as u64 + 8).unwrap();
    let error = scan(&reader, 0).1.unwrap_err();
    assert_eq!(damaged_at(&error), Some((name, *last)));
    disk.remove(name).unwrap();
    let error = scan(&reader, 0).1.unwrap_err();
    assert!(matches!(&error, LogError::Io { file, .. } if file == name), "{error}");
    drop(disk.power_cut());
    assert!(matches!(scan(&reader, *last).1, Err(LogError::Io { .. })), "the power is off");
}
