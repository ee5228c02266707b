//! A partition begins anew: what it had before keeps no segment, but not before that is durable.

use flux_log::{Log, SimDisk, State};

use crate::support::{Owned, entry, open, reset, state, trim, write};

const SEGMENT_BYTES: u64 = 512;

/// A log with entries 1, 2, … of partition 1 in several segments, and the last index.
fn several_segments(disk: &SimDisk) -> (Log, u64) {
    let (mut log, ..) = open(disk, SEGMENT_BYTES).unwrap();
    let mut index = 0;
    while log.segments() < 4 {
        index += 1;
        write(&mut log, &[entry(1, index, &[7; 100])]).unwrap();
    }
    (log, index)
}

#[test]
fn entries_before_a_reset_keep_no_segment() {
    for (replica, start) in [(1, 1), (5, 0), (0, 0)] {
        let disk = SimDisk::new(1);
        let (mut log, last) = several_segments(&disk);
        assert_eq!(trim(&mut log, &mut |_| start).unwrap(), 0);
        // In one batch with entries before and after, so that their order matters.
        let batch = [entry(1, last + 1, b""), reset(1, replica, start), entry(1, start + 1, b"")];
        write(&mut log, &batch).unwrap();
        assert_eq!(trim(&mut log, &mut |_| start).unwrap(), 0, "the reset is not durable");
        log.sync_now().unwrap();
        assert_eq!(log.oldest_segment(), Some(&[][..]), "nothing in it needs a snapshot");
        assert_eq!(trim(&mut log, &mut |_| start).unwrap(), 3);

        // The new history is kept like any other, up to its own indexes.
        while log.segments() < 2 {
            write(&mut log, &[entry(1, start + 2, &[8; 100])]).unwrap();
        }
        let highest = log.oldest_segment().unwrap()[0].1;
        assert!((start + 1..start + 3).contains(&highest), "{highest}");
        assert_eq!(trim(&mut log, &mut |_| start).unwrap(), 0);
        assert_eq!(trim(&mut log, &mut |_| highest).unwrap(), 1);
    }
}

#[test]
fn the_same_state_again_is_no_reset() {
    let disk = SimDisk::new(1);
    let (mut log, _) = several_segments(&disk);
    write(&mut log, &[state(1, 8, 1)]).unwrap();
    log.sync_now().unwrap();
    assert_eq!(trim(&mut log, &mut |_| 0).unwrap(), 0, "a first state is of replica 1 and start 0");
    write(&mut log, &[reset(1, 3, 0), entry(1, 1, &[0; 300])]).unwrap();
    log.sync_now().unwrap();
    trim(&mut log, &mut |_| 0).unwrap();
    while log.segments() < 3 {
        write(&mut log, &[reset(1, 3, 0)]).unwrap();
    }
    log.sync_now().unwrap();
    assert_eq!(trim(&mut log, &mut |_| 0).unwrap(), 0);
}

#[test]
fn other_partitions_keep_theirs() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
    for index in 1..=10 {
        write(&mut log, &[entry(1, index, &[1; 60]), entry(2, index, &[1; 60])]).unwrap();
    }
    write(&mut log, &[reset(1, 0, 0)]).unwrap();
    log.sync_now().unwrap();
    let oldest = log.oldest_segment().unwrap().to_vec();
    assert!(matches!(oldest[..], [(2, _)]), "{oldest:?}");
    assert_eq!(trim(&mut log, &mut |_| 0).unwrap(), 0);
}

#[test]
fn a_restart_comes_to_the_same() {
    let disk = SimDisk::new(1);
    let (mut log, last) = several_segments(&disk);
    write(&mut log, &[entry(1, last + 1, b""), reset(1, 2, 3), entry(1, 4, b"new")]).unwrap();
    drop(log);
    let (mut log, _, records) = open(&disk, SEGMENT_BYTES).unwrap();
    assert_eq!(records.len() as u64, last + 3);
    assert_eq!(log.oldest_segment(), Some(&[][..]));
    assert_eq!(trim(&mut log, &mut |_| 3).unwrap(), 3);
    drop(log);

    // What is left has entries without those before them, then the reset.
    let (mut log, _, records) = open(&disk, SEGMENT_BYTES).unwrap();
    let place = records.iter().position(|record| *record == reset(1, 2, 3)).unwrap();
    assert_eq!(records[place + 1..], [entry(1, 4, b"new")]);
    assert!(matches!(records[0], Owned::Entry { index, .. } if index > 4));

    // Heads repeat the state with all it says.
    while log.segments() < 2 {
        write(&mut log, &[entry(1, 5, &[1; 60])]).unwrap();
    }
    assert_eq!(trim(&mut log, &mut |_| 5).unwrap(), 1);
    drop(log);
    let (_, _, records) = open(&disk, SEGMENT_BYTES).unwrap();
    assert_eq!(records[0], reset(1, 2, 3));
}

/// Until the reset is durable, the power may fail and leave the history before it in force.
#[test]
fn a_reset_that_is_lost_has_voided_nothing() {
    let mut lost = 0;
    for seed in 0..20 {
        let disk = SimDisk::new(seed);
        let (mut log, last) = several_segments(&disk);
        write(&mut log, &[reset(1, 0, 0)]).unwrap();
        trim(&mut log, &mut |_| 0).unwrap();
        let (_, _, records) = open(&disk.power_cut(), SEGMENT_BYTES).unwrap();
        if records.last() != Some(&reset(1, 0, 0)) {
            lost += 1;
            let indexes = records.iter().map(|record| match record {
                Owned::Entry { index, .. } => *index,
                Owned::State(state) => panic!("{state:?}"),
            });
            assert!(indexes.eq(1..=records.len() as u64));
            assert!(records.len() as u64 >= last - 1);
        }
    }
    assert!(lost > 0);
}

/// As logs were before states named their replica: 32 bytes, no payload.
#[test]
fn a_state_without_payload_is_of_replica_1() {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
    write(&mut log, &[state(6, 4, 1)]).unwrap();
    log.close().unwrap();
    let name = "00000000000000000000.log";
    let mut bytes = disk.contents(name).unwrap();
    let lsn = u64::from_le_bytes(bytes[72..80].try_into().unwrap());
    assert_eq!(lsn, 64, "the head, which has no records yet");
    let (batch, record) = (64 + 40, 64 + 40 + 40);
    let seed = {
        let crc = crc32c::crc32c(&bytes[24..32]);
        crc32c::crc32c_append(crc, &bytes[16..24])
    };
    for (payload_bytes, expected) in [(16_usize, true), (0, true), (8, false), (24, false)] {
        bytes[record..record + 4].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
        let body_bytes = 32 + payload_bytes;
        bytes[batch + 24..batch + 28].copy_from_slice(&(body_bytes as u32).to_le_bytes());
        bytes[record + body_bytes..].fill(0);
        let crc = crc32c::crc32c_append(seed, &bytes[record..record + body_bytes]);
        bytes[batch + 4..batch + 8].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c_append(seed, &bytes[batch + 4..batch + 40]);
        bytes[batch..batch + 4].copy_from_slice(&crc.to_le_bytes());
        let old = SimDisk::new(1);
        old.put(name, bytes.clone());
        match open(&old, SEGMENT_BYTES) {
            Ok((_, _, records)) => {
                let state =
                    State { partition: 6, term: 4, vote: 1, commit: 4, replica: 1, start: 0 };
                assert!(expected, "{payload_bytes}");
                assert_eq!(records, [Owned::State(state)]);
            }
            Err(error) => assert!(!expected, "{payload_bytes}: {error}"),
        }
    }
}
