//! Short runs of what the fuzz target does at length.

use flux_log::{SimDisk, fuzzing};
use proptest::prelude::*;

use crate::support::{entry, open, state, write};

/// A segment with a few batches.
fn segment() -> Vec<u8> {
    let disk = SimDisk::new(1);
    let (mut log, ..) = open(&disk, 1024).unwrap();
    for index in 1..=4 {
        write(&mut log, &[entry(1, index, &[index as u8; 20]), state(2, index, 1)]).unwrap();
    }
    log.close().unwrap();
    disk.contents("00000000000000000000.log").unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        fuzzing::recover(&bytes);
    }

    #[test]
    fn a_segment_with_some_bytes_changed(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        length in any::<prop::sample::Index>(),
    ) {
        let mut bytes = segment();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        fuzzing::recover(&bytes);
        bytes.truncate(length.index(bytes.len()));
        fuzzing::recover(&bytes);
    }

    /// As the body of a batch whose checksums are right: record headers with all sorts of lengths.
    #[test]
    fn a_body_of_records(
        claimed in 0_u8..5,
        records in prop::collection::vec((0_u32..64, 0_u8..4, any::<[u8; 27]>(), 0_usize..9), 0..5),
        huge in prop::option::of(any::<u32>()),
    ) {
        let mut bytes = vec![claimed];
        for (length, kind, rest, words) in records {
            bytes.extend_from_slice(&huge.unwrap_or(length).to_le_bytes());
            bytes.push(kind);
            bytes.extend_from_slice(&rest);
            bytes.resize(bytes.len() + 8 * words, 1);
        }
        fuzzing::recover(&bytes);
    }
}
