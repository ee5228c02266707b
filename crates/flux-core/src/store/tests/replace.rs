//! All contents at once: another table's, or none.

use super::*;

const OPTIONS: TableOptions = TableOptions { hash_seed: 42, shards: 4 };

fn fill(table: &Table, model: &Model) {
    for (key, row) in model {
        put(table, table.hash(key), key, row);
    }
}

/// How far the account of a table may be behind.
fn slack(table: &Table) -> u64 {
    table.memory_bytes() / 256 + 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_contents_change_places(
        old in proptest::collection::btree_map(keys(300), rows(), 0..200),
        new in proptest::collection::btree_map(keys(300), rows(), 0..200),
        later in ops(300, 100),
        snapshots in any::<[bool; 2]>(),
        same_account in any::<bool>(),
    ) {
        let memory = Memory::new(0);
        let other_memory = if same_account { Arc::clone(&memory) } else { Memory::new(0) };
        let (table, fresh) =
            (Table::new(OPTIONS, Arc::clone(&memory)), Table::new(OPTIONS, Arc::clone(&other_memory)));
        fill(&table, &old);
        fill(&fresh, &new);
        for (table, snapshot) in [&table, &fresh].into_iter().zip(snapshots) {
            if snapshot {
                table.begin_snapshot();
                // Half of it is saved for the walk, and a little is walked.
                for key in old.keys().chain(new.keys()).step_by(2) {
                    put(table, table.hash(key), key, &(vec![1; 50], 1, None, 1));
                }
                fill(table, if std::ptr::eq(table, &fresh) { &new } else { &old });
                table.snapshot_chunk(500, &mut Vec::new());
            }
        }
        let (old, new) = (contents(&table, 50), contents(&fresh, 50));
        prop_assert_eq!(table.replacements(), 0);
        let before = table.replace(fresh);
        prop_assert_eq!(table.replacements(), 1);
        assert_equal(&table, &new);
        assert_equal(&before, &old);
        for table in [&table, &before] {
            prop_assert!(table.snapshot_chunk(1000, &mut Vec::new()), "no snapshot runs");
        }
        let used = memory.used() + if same_account { 0 } else { other_memory.used() };
        let bytes = table.memory_bytes() + before.memory_bytes();
        prop_assert!(used.abs_diff(bytes) <= slack(&table) + slack(&before));
        drop(before);
        prop_assert!(memory.used().abs_diff(table.memory_bytes()) <= slack(&table));
        prop_assert!(same_account || other_memory.used() == 0);

        // It is a table like any other, and can have a snapshot of its own.
        table.begin_snapshot();
        for op in later {
            match op {
                Op::Put(key, row) => put(&table, table.hash(&key), &key, &row),
                Op::Remove(key) | Op::Read(key) => {
                    table.remove(table.hash(&key), &key);
                }
            }
        }
        let mut chunk = Vec::new();
        prop_assert!(table.snapshot_chunk(usize::MAX / 2, &mut chunk));
        let copy = Table::new(OPTIONS, Memory::new(0));
        copy.load(&chunk).expect("its own chunk");
        assert_equal(&copy, &new);

        let empty_bytes = Table::new(OPTIONS, Memory::new(0)).memory_bytes();
        drop(table.clear());
        assert_equal(&table, &Model::new());
        prop_assert_eq!(table.memory_bytes(), empty_bytes);
        prop_assert!(memory.used().abs_diff(empty_bytes) <= slack(&table));
        prop_assert_eq!(table.replacements(), 2);
        drop(table);
        prop_assert_eq!(memory.used(), 0);
    }
}

#[test]
#[should_panic(expected = "tables of equal options")]
fn another_number_of_shards_is_refused() {
    let other = Table::new(TableOptions { shards: 2, ..OPTIONS }, Memory::new(0));
    Table::new(OPTIONS, Memory::new(0)).replace(other);
}

#[test]
#[should_panic(expected = "tables of equal options")]
fn another_hash_is_refused() {
    let other = Table::new(TableOptions { hash_seed: 43, ..OPTIONS }, Memory::new(0));
    Table::new(OPTIONS, Memory::new(0)).replace(other);
}

/// Each key has a value of the generation that its shard is of, and never an earlier one again.
#[test]
fn readers_see_each_shard_old_or_new() {
    const GENERATIONS: u64 = 200;
    let table = Table::new(OPTIONS, Memory::new(0));
    let keys: Vec<_> = (0..64u32).map(u32::to_le_bytes).collect();
    let generation = |generation: u64| -> Model {
        let row = (vec![generation as u8; 100], generation, Some(generation), 1);
        keys.iter().map(|key| (key.to_vec(), row.clone())).collect()
    };
    let check = |entry: Entry<'_>| {
        assert!(entry.value == [entry.version as u8; 100], "torn");
        assert_eq!(entry.expires_at_ms, Some(entry.version));
        entry.version
    };
    fill(&table, &generation(1));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = vec![1; keys.len()];
                while !done.load(Ordering::Relaxed) {
                    for (key, seen) in keys.iter().zip(&mut seen) {
                        let version = table.read(table.hash(key), key, |entry| entry.map(check));
                        let version = version.expect("each generation has every key");
                        assert!(version >= *seen, "went back");
                        *seen = version;
                    }
                    let mut visited = 0;
                    table.scan(Position(0), 1000, |entry| {
                        check(entry);
                        visited += 1;
                    });
                    assert_eq!(visited, keys.len());
                }
            });
        }
        for number in 2..GENERATIONS {
            let fresh = Table::new(OPTIONS, Memory::new(0));
            fill(&fresh, &generation(number));
            assert_eq!(contents(&table.replace(fresh), 10), generation(number - 1));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_equal(&table, &generation(GENERATIONS - 1));
}
