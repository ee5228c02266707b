//! What a worker's turn costs the disk, however many partitions have something to write.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flux_core::{PartitionId, Reply};

use super::machine::Machine;
use super::node::{ask, set, small, start};
use crate::config::{Fsync, Settings};

const PARTITIONS: u16 = 64;
/// Nothing here takes as long; the test fails instead of hanging.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A key of each partition.
fn one_of_each(partition_of: impl Fn(&str) -> PartitionId) -> BTreeMap<PartitionId, String> {
    let mut keys = BTreeMap::new();
    for number in 0.. {
        let key = format!("key{number}");
        keys.entry(partition_of(&key)).or_insert(key);
        if keys.len() == usize::from(PARTITIONS) {
            break;
        }
    }
    keys
}

#[tokio::test]
async fn a_turn_is_one_write_and_one_sync_for_all_its_partitions() {
    let machine = Machine::new(1);
    let partitions = PARTITIONS.into();
    // Segments in which there is room for all of this.
    let settings = Settings { partitions, segment_bytes: 1 << 20, ..small(1, Fsync::Always) };
    let workers = start(&machine, &settings).expect("started");
    let shared = Arc::clone(workers.shared());
    let write = |key: String| {
        let shared = Arc::clone(&shared);
        async move { ask(&shared, &key, set(&key, b"value")).await }
    };

    write("before".to_owned()).await;
    // While a sync is under way, what comes in waits for the next turn.
    machine.syncs.close();
    let first = tokio::spawn(write("first".to_owned()));
    tokio::task::yield_now().await;
    machine.syncs.wait_for_sync();
    let before = machine.writes_and_syncs();
    let keys = one_of_each(|key| shared.partitions.of(key.as_bytes()));
    let writes: Vec<_> = keys.into_values().map(|key| tokio::spawn(write(key))).collect();
    let taken = async {
        while shared.stats.writes.value() < 2 + u64::from(PARTITIONS) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONGEST_WAIT, taken).await.expect("the worker has all of them");
    machine.syncs.open();
    assert!(matches!(first.await, Ok(Reply::Written { .. })));
    for write in writes {
        let reply = write.await.expect("it did not panic");
        assert!(matches!(reply, Reply::Written { .. }), "{reply:?}");
    }

    let (writes, syncs) = machine.writes_and_syncs();
    // The sync that was held, and one for 64 partitions.
    assert_eq!((writes - before.0, syncs - before.1), (1, 2));
    workers.stop().expect("closed");
}
