//! A file of lines through crashes at every byte and at every step of a rotation, and what is refused.

use std::ops::RangeInclusive;

use bytes::Bytes;
use flux_proto::event::{Event, Op, Record, write_json};
use tempfile::TempDir;

use super::*;

const NEVER: Rotation = Rotation { bytes: 0, keep: 0 };

fn change(revision: u64) -> Record {
    Record::Change(Event {
        op: Op::Delete,
        key: Bytes::from_static(b"k"),
        value: None,
        partition: 0,
        revision,
        version: 0,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 0,
        trace: None,
    })
}

/// The lines of these revisions.
fn text(revisions: RangeInclusive<u64>) -> Vec<u8> {
    let mut text = Vec::new();
    for revision in revisions {
        write_json(&change(revision), &mut text);
        text.push(b'\n');
    }
    text
}

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        // In memory, where that is possible: the tests sync thousands of times.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Place { folder: folder.expect("a folder") }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("out.jsonl")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.path(), suffix)
    }

    fn open(&self, rotation: Rotation) -> (LineFile, Ledger, Found) {
        LineFile::open(&self.path(), rotation).expect("it is as it was left")
    }

    fn refused(&self) -> String {
        LineFile::open(&self.path(), NEVER).expect_err("it is refused").to_string()
    }

    /// Starts a consumer that gets these revisions, some of which it has, and dies.
    fn consume(&self, rotation: Rotation, revisions: RangeInclusive<u64>) -> Found {
        let (mut file, mut ledger, found) = self.open(rotation);
        deliver(&mut file, &mut ledger, revisions);
        found
    }

    /// All lines in order, those of rotated files first.
    fn all(&self) -> Vec<u8> {
        let files = rotate::rotated(&self.path()).expect("the folder can be read");
        let files = files.into_iter().chain([self.path()]);
        files.flat_map(|file| fs::read(file).unwrap_or_default()).collect()
    }

    /// A copy of everything.
    fn copy(&self) -> Place {
        let copy = Place::new();
        for entry in fs::read_dir(self.folder.path()).expect("the folder can be read") {
            let entry = entry.expect("an entry");
            fs::copy(entry.path(), copy.folder.path().join(entry.file_name())).expect("copied");
        }
        copy
    }
}

/// Delivers revisions one by one.
fn deliver(file: &mut LineFile, ledger: &mut Ledger, revisions: RangeInclusive<u64>) {
    for revision in revisions {
        if ledger.judge(&change(revision)) != Verdict::Repeat {
            assert_eq!(ledger.judge(&change(revision)), Verdict::Fresh);
            ledger.note(&change(revision));
            file.write(&text(revision..=revision), ledger).expect("written");
        }
    }
}

#[test]
fn a_crash_at_every_byte_loses_and_repeats_nothing() {
    let place = Place::new();
    let (mut file, mut ledger, _) = place.open(NEVER);
    file.cursor_every = 300;
    let mut acknowledged = 0;
    for last in [2, 3, 6, 7] {
        // What the disk has before the next write is finished: the cursor that there is now, and any
        // part of the lines.
        let lines = text(acknowledged + 1..=last);
        let before = file.length;
        for length in 0..=lines.len() {
            let copy = place.copy();
            let written =
                [&fs::read(place.path()).expect("readable")[..], &lines[..length]].concat();
            fs::write(copy.path(), written).expect("written");
            let (mut file, mut ledger, found) = copy.open(NEVER);
            let whole = lines[..length].iter().filter(|&&byte| byte == b'\n').count() as u64;
            assert_eq!(
                file.length,
                before + text(acknowledged + 1..=acknowledged + whole).len() as u64
            );
            assert!((found.torn_bytes > 0) == (file.length < before + length as u64));
            assert_eq!((found.holes, found.repeats), (0, 0));
            // What was not acknowledged comes again.
            deliver(&mut file, &mut ledger, acknowledged + 1..=9);
            assert_eq!(
                copy.all(),
                text(1..=9),
                "the first {length} bytes of {acknowledged} to {last}"
            );
        }
        for revision in acknowledged + 1..=last {
            ledger.note(&change(revision));
        }
        file.write(&lines, &ledger).expect("written");
        acknowledged = last;
    }
    assert!(file.cursor_at > 0, "the cursor was written meanwhile");
}

#[test]
fn a_tail_that_was_never_written_is_cut_too() {
    let place = Place::new();
    place.consume(NEVER, 1..=3);
    let zeros = [&fs::read(place.path()).expect("readable")[..], &[0; 5000]].concat();
    fs::write(place.path(), zeros).expect("written");
    assert_eq!(place.consume(NEVER, 2..=5).torn_bytes, 5000);
    assert_eq!(place.all(), text(1..=5));
}

#[test]
fn a_start_reads_what_the_cursor_does_not_know() {
    let place = Place::new();
    assert_eq!(place.consume(NEVER, 1..=4), Found::default());
    assert_eq!(place.consume(NEVER, 1..=6), Found { records: 4, ..Found::default() });
    let (file, ledger, found) = place.open(NEVER);
    assert_eq!(found.records, 2);
    Output::File(Box::new(file)).close(&ledger).expect("closed");
    assert_eq!(place.open(NEVER).2, Found::default());
    // Without the cursor, or with one that is none, all of it is read.
    fs::remove_file(place.beside(".cursor")).expect("removed");
    assert_eq!(place.open(NEVER).2.records, 6);
    fs::write(place.beside(".cursor"), "{\"format\":1").expect("written");
    let (_, again, found) = place.open(NEVER);
    assert_eq!((again, found.records), (ledger, 6));
}

#[test]
fn a_full_file_is_rotated_and_the_ledger_goes_on() {
    let place = Place::new();
    let line = text(1..=1).len() as u64;
    let rotation = Rotation { bytes: 2 * line, keep: 2 };
    place.consume(rotation, 1..=3);
    place.consume(rotation, 1..=9);
    let file = |suffix: &str| fs::read(place.beside(suffix)).expect("readable");
    assert_eq!((file(".2"), file(".1"), file("")), (text(5..=6), text(7..=8), text(9..=9)));
    assert!(!fs::exists(place.beside(".3")).expect("readable"));
    // Without a cursor the rotated files say what there was.
    fs::remove_file(place.beside(".cursor")).expect("removed");
    let (_, ledger, found) = place.open(rotation);
    assert_eq!(found.records, 5);
    assert_eq!(ledger.judge(&change(9)), Verdict::Repeat);
    let all = Rotation { keep: 0, ..rotation };
    place.consume(all, 1..=14);
    assert_eq!(place.all(), text(5..=14));
}

#[test]
fn a_crash_at_every_step_of_a_rotation_loses_and_repeats_nothing() {
    let line = text(1..=1).len() as u64;
    let rotation = Rotation { bytes: 2 * line, keep: 3 };
    let place = Place::new();
    place.consume(rotation, 1..=5);
    let (_, mut ledger, _) = place.open(rotation);
    ledger.note(&change(6));
    let last = [&fs::read(place.path()).expect("readable")[..], &text(6..=6)].concat();
    fs::write(place.path(), &last).expect("written");
    let check = |copy: Place, what: &str| {
        let found = copy.consume(rotation, 5..=7);
        assert_eq!((found.holes, found.repeats), (0, 0), "{what}");
        assert!(copy.all() == text(1..=7), "{what}");
        copy.consume(rotation, 5..=12);
        // The oldest goes when its time comes.
        assert!(text(1..=12).ends_with(&copy.all()), "{what}");
        assert_eq!(rotate::rotated(&copy.path()).expect("readable").len(), 3, "{what}");
    };
    check(place.copy(), "before the rotation");
    Cursor::new(last.len() as u64, true, ledger.clone()).save(&place.path()).expect("saved");
    let mut steps = 0;
    loop {
        check(place.copy(), &format!("after {steps} steps"));
        if !rotate::step(&place.path(), rotation.keep).expect("a step") {
            break;
        }
        steps += 1;
    }
    assert_eq!(steps, 3);
    File::create_new(place.path()).expect("it is free now");
    check(place.copy(), "after the new file is there");
    Cursor::new(0, false, ledger).save(&place.path()).expect("saved");
    check(place.copy(), "after the rotation");
}

#[test]
fn a_file_has_one_consumer() {
    let place = Place::new();
    let first = place.open(NEVER);
    assert!(place.refused().contains("another consumer writes to"));
    drop(first);
    place.open(NEVER);
}

#[test]
fn a_file_that_lost_what_was_written_is_refused() {
    let place = Place::new();
    let (file, ledger, _) = place.open(NEVER);
    Output::File(Box::new(file)).close(&ledger).expect("closed");
    place.consume(NEVER, 1..=3);
    drop(place.open(NEVER));
    let whole = fs::read(place.path()).expect("readable");
    fs::write(place.path(), text(1..=2)).expect("written");
    let refused = place.refused();
    let (length, known) = (text(1..=2).len(), whole.len());
    assert!(
        refused.contains(&format!("has {length} bytes, and {known} were written")),
        "{refused}"
    );
    assert!(refused.contains("out.jsonl.cursor"), "{refused}");
    fs::remove_file(place.path()).expect("removed");
    assert!(place.refused().contains("has 0 bytes"));
    assert!(!fs::exists(place.path()).expect("readable"), "nothing was made");
    fs::write(place.path(), &whole).expect("written");
    assert_eq!(place.consume(NEVER, 1..=4), Found::default());
    assert_eq!(place.all(), text(1..=4));
}

#[test]
fn damage_is_named_and_not_cut_off() {
    let place = Place::new();
    let mut damaged = text(1..=4);
    let at = text(1..=2).len();
    damaged[at + 5] ^= 1;
    fs::write(place.path(), &damaged).expect("written");
    let refused = place.refused();
    assert!(refused.contains(&format!("out.jsonl is damaged at byte {at}")), "{refused}");
    assert_eq!(fs::read(place.path()).expect("readable"), damaged);
}

#[test]
fn what_a_file_has_twice_or_not_at_all_is_told() {
    let place = Place::new();
    fs::write(place.path(), [text(1..=3), text(3..=3), text(6..=7)].concat()).expect("written");
    assert_eq!(place.open(NEVER).2, Found { records: 6, torn_bytes: 0, holes: 1, repeats: 1 });
}

#[test]
fn only_a_file_is_written_to() {
    let place = Place::new();
    fs::create_dir(place.path()).expect("a folder");
    assert!(place.refused().contains("is not a file"));
    let nowhere = place.folder.path().join("none").join("out");
    let error = LineFile::open(&nowhere, NEVER).expect_err("there is no such folder");
    assert!(error.to_string().starts_with("cannot lock"), "{error}");
}

#[test]
fn a_write_that_fails_leaves_whole_lines() {
    let place = Place::new();
    let (mut file, mut ledger, _) = place.open(NEVER);
    deliver(&mut file, &mut ledger, 1..=2);
    // A file that cannot be written to stands for a disk that refuses.
    file.file = File::open(place.path()).expect("readable");
    assert!(file.write(&text(3..=3), &ledger).is_err());
    drop(file);
    place.consume(NEVER, 3..=3);
    assert_eq!(place.all(), text(1..=3));
}
