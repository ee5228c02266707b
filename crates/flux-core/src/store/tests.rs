//! The table against simple models.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES};

mod replace;
mod snapshots;

/// What a model knows of a key: value, version, expiry, time of writing.
type Row = (Vec<u8>, u64, Option<u64>, u32);
type Model = BTreeMap<Vec<u8>, Row>;

fn table(shards: usize) -> Table {
    Table::new(TableOptions { hash_seed: 42, shards }, Memory::new(0))
}

fn row(entry: Entry<'_>) -> Row {
    (entry.value.to_vec(), entry.version, entry.expires_at_ms, entry.written_at_s)
}

fn put(table: &Table, hash: KeyHash, key: &[u8], row: &Row) {
    let (value, version, expires_at_ms, written_at_s) = row;
    let (version, expires_at_ms, written_at_s) = (*version, *expires_at_ms, *written_at_s);
    table.put(hash, Entry { key, value, version, expires_at_ms, written_at_s });
}

/// Everything in the table, by a walk in steps of at least `step` entries; no key may come twice.
fn contents(table: &Table, step: usize) -> Model {
    let mut found = Model::new();
    let mut from = Some(Position(0));
    while let Some(position) = from {
        from = table.scan(position, step, |entry| {
            assert_eq!(found.insert(entry.key.to_vec(), row(entry)), None, "visited twice");
        });
        assert!(from.is_none_or(|next| next > position), "no progress");
    }
    found
}

fn assert_equal(table: &Table, model: &Model) {
    assert_eq!(&contents(table, 7), model);
    assert_eq!(table.len(), model.len());
    assert_eq!(table.is_empty(), model.is_empty());
    let volatile = model.values().filter(|(_, _, expires, _)| expires.is_some()).count();
    assert_eq!(table.volatile_len(), volatile);
}

/// A hash for a small key number: spread, with equal positions, or all equal.
fn chosen_hash(table: &Table, style: u8, key: &[u8]) -> KeyHash {
    let hash = table.hash(key);
    match style {
        0 => hash,
        1 => KeyHash(hash.0 & 0xc000_0001_0000_00ff),
        2 => KeyHash(hash.0 | 0xffff_fff0_0000_0000),
        _ => KeyHash(u64::MAX),
    }
}

fn values() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => vec(any::<u8>(), 0..200),
        1 => (0..3000usize, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
        1 => (65_000..66_000usize, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
    ]
}

fn rows() -> impl Strategy<Value = Row> {
    let version = prop_oneof![9 => 0..1u64 << 48, 1 => any::<u64>()];
    (values(), version, any::<Option<u64>>(), any::<u32>())
}

fn keys(count: u32) -> impl Strategy<Value = Vec<u8>> {
    (0..count).prop_map(|number| match number % 16 {
        0 => Vec::new(),
        1 => vec![number as u8; 300],
        _ => number.to_le_bytes().to_vec(),
    })
}

#[derive(Clone, Debug)]
enum Op {
    Put(Vec<u8>, Row),
    Remove(Vec<u8>),
    Read(Vec<u8>),
}

fn ops(key_count: u32, len: usize) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => (keys(key_count), rows()).prop_map(|(key, row)| Op::Put(key, row)),
        2 => keys(key_count).prop_map(Op::Remove),
        1 => keys(key_count).prop_map(Op::Read),
    ];
    vec(op, 0..len)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_map(ops in ops(120, 300), shards in 0..3u32, style in 0..4u8) {
        let memory = Memory::new(0);
        let options = TableOptions { hash_seed: 42, shards: 1 << shards };
        let table = Table::new(options, Arc::clone(&memory));
        let empty_bytes = table.memory_bytes();
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Put(key, row) => {
                    put(&table, chosen_hash(&table, style, &key), &key, &row);
                    model.insert(key, row);
                }
                Op::Remove(key) => {
                    let removed = table.remove(chosen_hash(&table, style, &key), &key);
                    prop_assert_eq!(removed, model.remove(&key).is_some());
                }
                Op::Read(key) => {
                    let hash = chosen_hash(&table, style, &key);
                    let found = table.read(hash, &key, |entry| entry.map(row));
                    prop_assert_eq!(found.as_ref(), model.get(&key));
                }
            }
        }
        assert_equal(&table, &model);
        prop_assert!(memory.used().abs_diff(table.memory_bytes()) <= table.memory_bytes() / 128);
        for key in model.keys() {
            prop_assert!(table.remove(chosen_hash(&table, style, key), key));
        }
        assert_equal(&table, &Model::new());
        // The index may keep some slots beyond those it began with.
        prop_assert!(table.memory_bytes() <= empty_bytes * 8);
        drop(table);
        prop_assert_eq!(memory.used(), 0);
    }

    /// What is there during a whole walk is visited, whatever else changes between its steps.
    #[test]
    fn a_walk_misses_nothing_that_stays(
        stay in 1..1500u32,
        step in 100..400usize,
        changes in vec((any::<bool>(), 0..15_000u32, 1..1500u32), 1..40),
        style in 0..3u8,
    ) {
        let table = table(2);
        let key = |kind: u8, number: u32| [&[kind], number.to_le_bytes().as_slice()].concat();
        let put_key = |key: &[u8]| {
            put(&table, chosen_hash(&table, style, key), key, &(vec![1; 9], 1, None, 1));
        };
        for number in 0..stay {
            put_key(&key(0, number));
        }
        let mut seen = BTreeSet::new();
        let mut changes = changes.into_iter().cycle();
        let mut from = Some(Position(0));
        while let Some(position) = from {
            from = table.scan(position, step, |entry| {
                if entry.key[0] == 0 {
                    seen.insert(entry.key.to_vec());
                }
            });
            prop_assert!(from.is_none_or(|next| next > position));
            let (is_put, first, count) = changes.next().expect("they cycle");
            for number in first..first + count {
                let key = key(1, number);
                if is_put {
                    put_key(&key);
                } else {
                    table.remove(chosen_hash(&table, style, &key), &key);
                }
            }
        }
        prop_assert_eq!(seen.len(), stay as usize);
    }

    #[test]
    fn bytes_from_outside_do_not_panic(bytes in vec(prop_oneof![0..4u8, any::<u8>()], 0..200)) {
        let table = table(1);
        let count = table.load(&bytes);
        prop_assert!(count.is_err() || table.len() <= bytes.len() / 14);
    }
}

#[test]
fn keeps_order_and_runs_of_equal_positions() {
    let table = table(4);
    for number in 0..5000u32 {
        // Ten keys for each position.
        let hash = KeyHash(u64::from(number / 10 * 7_919_113) << 32);
        put(&table, hash, &number.to_le_bytes(), &(Vec::new(), 1, None, 1));
    }
    let mut steps = 0;
    let mut from = Some(Position(0));
    let mut seen = BTreeSet::new();
    while let Some(position) = from {
        let mut visited = 0;
        from = table.scan(position, 25, |entry| {
            visited += 1;
            let number = u32::from_le_bytes(entry.key.try_into().expect("four bytes"));
            seen.insert((number / 10 * 7_919_113, number));
        });
        assert_eq!(visited % 10, 0, "a run was cut");
        assert!(visited == 30 || from.is_none());
        steps += 1;
    }
    assert_eq!((seen.len(), steps), (5000, 5000usize.div_ceil(30)));
    let mut at = Vec::new();
    table.at_position(Position(7_919_113), |entry| at.push(entry.key[0]));
    at.sort_unstable();
    assert_eq!(at, (10..20).collect::<Vec<u8>>());
}

/// Far more keys than a segment has slots, all of one position, then of one hash bit apart.
#[test]
fn survives_colliding_hashes() {
    for hashes in [[0, 0], [u64::MAX, u64::MAX], [0x7fff_ffff_ffff_ffff, 0x8000_0000_0000_0000]] {
        let table = table(2);
        let empty_bytes = table.memory_bytes();
        let hash = |number: u32| KeyHash(hashes[number as usize % 2]);
        for number in 0..2200u32 {
            put(&table, hash(number), &number.to_le_bytes(), &(vec![7], 1, None, 1));
        }
        assert_eq!(contents(&table, 1).len(), 2200);
        // Other keys find their way around.
        for number in 2200..12_000u32 {
            let key = number.to_le_bytes();
            put(&table, table.hash(&key), &key, &(vec![7], 1, None, 1));
        }
        assert_eq!(contents(&table, 100).len(), 12_000);
        for number in (0..2200u32).rev() {
            assert!(table.remove(hash(number), &number.to_le_bytes()));
            assert!(!table.remove(hash(number), &number.to_le_bytes()));
        }
        for number in 2200..12_000u32 {
            let key = number.to_le_bytes();
            assert!(table.remove(table.hash(&key), &key));
        }
        assert!(table.memory_bytes() <= empty_bytes * 8);
    }
}

#[test]
fn grows_and_shrinks() {
    let memory = Memory::new(1 << 30);
    let options = TableOptions { hash_seed: 1, shards: 4 };
    let table = Table::new(options, Arc::clone(&memory));
    let empty_bytes = table.memory_bytes();
    let count = 100_000u64;
    for number in 0..count {
        let key = number.to_be_bytes();
        put(&table, table.hash(&key), &key, &(key.to_vec(), number, Some(number), 1));
    }
    assert_eq!((table.len(), table.volatile_len()), (count as usize, count as usize));
    assert!(table.memory_bytes() <= count * (40 + 13), "{}", table.memory_bytes());
    assert!(memory.used().abs_diff(table.memory_bytes()) <= 4 * 4096);
    for number in 0..count {
        let key = number.to_be_bytes();
        let version = table.read(table.hash(&key), &key, |entry| entry.map(|entry| entry.version));
        assert_eq!(version, Some(number));
    }
    for number in 0..count {
        let key = number.to_be_bytes();
        assert!(table.remove(table.hash(&key), &key));
    }
    assert!(table.memory_bytes() <= empty_bytes * 8, "{}", table.memory_bytes());
    assert!(memory.used() <= empty_bytes * 9);
}

#[test]
fn takes_the_largest_keys_and_values() {
    let table = table(1);
    let mut model = Model::new();
    for value_len in [0, 1, 1000, 1024, 70_000, 3 << 20, MAX_VALUE_BYTES, 5 << 20, 1010, 0] {
        for key_len in [0, 255, 256, MAX_KEY_BYTES] {
            let key = vec![3; key_len];
            let row = (vec![value_len as u8; value_len], u64::MAX - 1, Some(u64::MAX), u32::MAX);
            put(&table, table.hash(&key), &key, &row);
            table.read(table.hash(&key), &key, |entry| {
                assert_eq!(entry.map(tests::row).as_ref(), Some(&row));
            });
            model.insert(key, row);
        }
        assert_equal(&table, &model);
    }
    assert!(table.memory_bytes() < 80_000);
}

#[test]
fn expiry_is_inclusive_and_sizes_are_told() {
    let mut entry =
        Entry { key: &[1; 16], value: &[2; 64], version: 1, expires_at_ms: None, written_at_s: 0 };
    assert_eq!(entry.memory_bytes(), 96 + 13);
    assert!(!entry.is_expired(u64::MAX));
    entry.expires_at_ms = Some(5);
    assert_eq!(entry.memory_bytes(), 104 + 13);
    assert!(!entry.is_expired(4) && entry.is_expired(5) && entry.is_expired(6));
}

#[test]
fn picks_any_entry_at_random() {
    let table = table(4);
    assert!(!table.random(1, |_| panic!("there is none")));
    for count in [1u32, 3, 50, 3000] {
        for number in 0..count {
            let key = number.to_le_bytes();
            put(&table, table.hash(&key), &key, &(Vec::new(), 1, None, 1));
        }
        let mut hits = BTreeMap::new();
        let rounds = u64::from(count) * 40;
        for seed in 0..rounds {
            assert!(table.random(seed, |entry| {
                *hits.entry(entry.key.to_vec()).or_insert(0) += 1;
            }));
        }
        assert_eq!(hits.len(), count as usize);
        let most = *hits.values().max().expect("some");
        assert!(count < 50 || most < 40 * 6, "one of {count} came {most} times");
    }
}

#[test]
fn a_batch_of_lookups_can_be_announced() {
    let table = table(4);
    let keys: Vec<_> = (0..500u32).map(u32::to_le_bytes).collect();
    let hashes: Vec<_> = keys.iter().map(|key| table.hash(key)).collect();
    let positions: Vec<_> = hashes.iter().map(|hash| hash.position()).collect();
    table.touch(&positions);
    for (key, &hash) in keys.iter().zip(&hashes) {
        put(&table, hash, key, &(Vec::new(), 1, None, 1));
    }
    table.touch(&positions);
    table.touch(&[Position(0), Position(u32::MAX)]);
    assert_eq!(table.len(), 500);
}

/// Readers see each key whole, at some version not older than one they saw before.
#[test]
fn readers_run_beside_the_writer() {
    let table = table(2);
    let done = AtomicBool::new(false);
    let keys: Vec<_> = (0..64u32).map(u32::to_le_bytes).collect();
    let check = |entry: Entry<'_>| {
        assert!(entry.value.iter().all(|&byte| byte == entry.version as u8), "torn");
        entry.version
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = vec![0; keys.len()];
                while !done.load(Ordering::Relaxed) {
                    for (key, seen) in keys.iter().zip(&mut seen) {
                        let version = table.read(table.hash(key), key, |entry| entry.map(check));
                        if let Some(version) = version {
                            assert!(version >= *seen, "went back");
                            *seen = version;
                        }
                    }
                    let mut visited = 0;
                    table.scan(Position(0), 1000, |entry| {
                        check(entry);
                        visited += 1;
                    });
                    assert!(visited <= keys.len());
                }
            });
        }
        for version in 1..300u64 {
            for (number, key) in keys.iter().enumerate() {
                let len = (version as usize * 37 + number * 11) % 1500;
                let row = (vec![version as u8; len], version, None, 1);
                put(&table, table.hash(key), key, &row);
                if (version + number as u64).is_multiple_of(7) {
                    table.remove(table.hash(key), key);
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
