//! Snapshots, and the chunks they are made of.

use super::*;

/// Takes the chunks of a running snapshot, with writes between them.
fn take(table: &Table, budget: usize, mut between: impl FnMut(&Table)) -> Vec<Vec<u8>> {
    let mut chunks = Vec::new();
    loop {
        let mut chunk = Vec::new();
        let is_last = table.snapshot_chunk(budget, &mut chunk);
        chunks.push(chunk);
        if is_last {
            return chunks;
        }
        between(table);
    }
}

/// The contents of chunks, loaded into a new table; no key may come twice.
fn loaded(chunks: &[Vec<u8>]) -> Model {
    let table = Table::new(TableOptions { hash_seed: 7, shards: 4 }, Memory::new(0));
    let count: usize = chunks.iter().map(|chunk| table.load(chunk).expect("own chunks")).sum();
    assert_eq!(count, table.len(), "a key came twice");
    contents(&table, 100)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn is_the_table_at_its_point(
        before in ops(200, 400),
        during in vec(ops(250, 60), 1..6),
        budget in 1..4000usize,
        style in 0..4u8,
        abort in any::<bool>(),
    ) {
        let table = table(2);
        let apply = |ops: &[Op]| {
            for op in ops {
                match op {
                    Op::Put(key, row) => put(&table, chosen_hash(&table, style, key), key, row),
                    Op::Remove(key) | Op::Read(key) => {
                        table.remove(chosen_hash(&table, style, key), key);
                    }
                }
            }
        };
        apply(&before);
        if abort {
            // Marks left by a snapshot that was dropped must not count for the next.
            table.begin_snapshot();
            table.snapshot_chunk(budget, &mut Vec::new());
            apply(&during[0]);
            if style == 0 {
                table.end_snapshot();
            }
        }
        let expected = contents(&table, 50);
        let before_bytes = table.memory_bytes();
        table.begin_snapshot();
        let mut during = during.iter();
        let chunks = take(&table, budget, |_| during.next().into_iter().for_each(|ops| apply(ops)));
        prop_assert!(table.snapshot_chunk(budget, &mut Vec::new()));
        prop_assert!(abort || table.memory_bytes() <= before_bytes + 2_000_000);
        table.end_snapshot();
        prop_assert_eq!(loaded(&chunks), expected);
    }
}

/// Big enough that segments split and join ahead of the walk and behind it.
#[test]
fn outlives_splits_and_joins() {
    let table = table(4);
    let row = |number: u32, version| (number.to_le_bytes().repeat(5), version, None, 1);
    let put_all = |numbers: std::ops::Range<u32>, version| {
        for number in numbers {
            let key = number.to_le_bytes();
            put(&table, table.hash(&key), &key, &row(number, version));
        }
    };
    for round in 2..5 {
        put_all(0..30_000, 1);
        let expected = contents(&table, 1000);
        table.begin_snapshot();
        let mut step = 0;
        let chunks = take(&table, 20_000, |table| {
            step += 1;
            match step {
                3 => put_all(20_000..60_000, round),
                6 | 20 => {
                    for number in 1_000..55_000u32 {
                        let key = number.to_le_bytes();
                        table.remove(table.hash(&key), &key);
                    }
                }
                12 => put_all(0..40_000, round + 100),
                _ => {}
            }
        });
        assert!(step > 20);
        assert_eq!(loaded(&chunks), expected);
        table.end_snapshot();
    }
}

#[test]
fn saves_only_what_is_overwritten_ahead_of_the_walk() {
    let table = table(1);
    let value = vec![1; 100_000];
    let write = |number: u32, version| {
        let key = number.to_le_bytes();
        put(&table, table.hash(&key), &key, &(value.clone(), version, None, 1));
    };
    (0..50).for_each(|number| write(number, 1));
    let bytes = table.memory_bytes();
    table.begin_snapshot();
    write(0, 2);
    let saved = table.memory_bytes() - bytes;
    assert!((100_000..101_000).contains(&saved), "the old value is kept: {saved}");
    write(0, 3);
    write(100, 3);
    write(100, 4);
    assert!(table.memory_bytes() - bytes < 202_000, "once, and nothing for a new key");
    let mut chunk = Vec::new();
    assert!(!table.snapshot_chunk(1, &mut chunk));
    assert!(table.memory_bytes() - bytes < 102_000, "the next chunk takes it");
    let mut rest = Vec::new();
    assert!(table.snapshot_chunk(usize::MAX / 2, &mut rest));
    let before = table.memory_bytes();
    (0..50).for_each(|number| write(number, 5));
    assert_eq!(table.memory_bytes(), before, "behind the walk");
    table.end_snapshot();
    let versions: BTreeSet<u64> = loaded(&[chunk, rest]).values().map(|row| row.1).collect();
    assert_eq!(versions, BTreeSet::from([1]));
}

#[test]
fn a_chunk_keeps_to_its_budget() {
    let table = table(4);
    for number in 0..20_000u32 {
        let key = number.to_le_bytes();
        put(&table, table.hash(&key), &key, &(vec![0; 50], 1, None, 1));
    }
    table.begin_snapshot();
    let chunks = take(&table, 10_000, |_| ());
    assert!(chunks.iter().all(|chunk| chunk.len() <= 10_100));
    assert!(chunks.len() < 2 * 20_000 * 68 / 10_000);
    table.end_snapshot();
    assert!(table.snapshot_chunk(10_000, &mut Vec::new()), "none runs");
}

#[test]
fn a_cut_chunk_is_refused_at_every_byte() {
    let table = table(1);
    let rows = [
        (vec![1], (vec![2; 10], 1, None, 3)),
        (vec![4; 20], (Vec::new(), 1 << 47, Some(9), 3)),
        (vec![5; 300], (vec![6; 70_000], u64::MAX, Some(u64::MAX), 3)),
    ];
    let mut chunk = Vec::new();
    let mut ends = vec![0];
    for (key, (value, version, expires_at_ms, written_at_s)) in &rows {
        let (version, expires_at_ms, written_at_s) = (*version, *expires_at_ms, *written_at_s);
        encode_entry(&Entry { key, value, version, expires_at_ms, written_at_s }, &mut chunk);
        ends.push(chunk.len());
    }
    for cut in 0..chunk.len() {
        let whole = ends.iter().rposition(|&end| end <= cut).expect("0 is one");
        let expected = match ends[whole] == cut {
            true => Ok(whole),
            false => Err(ChunkError::Truncated { offset: ends[whole] }),
        };
        assert_eq!(table.load(&chunk[..cut]), expected);
    }
    assert_eq!(table.load(&chunk), Ok(3));
    assert_equal(&table, &rows.into_iter().collect());
}

#[test]
fn damaged_chunks_name_the_place() {
    let table = table(1);
    let mut chunk = Vec::new();
    let entry = Entry { key: b"k", value: b"v", version: 1, expires_at_ms: None, written_at_s: 1 };
    encode_entry(&entry, &mut chunk);
    let offset = chunk.len();
    let with = |tail: &[u8]| [chunk.as_slice(), tail].concat();
    assert_eq!(table.load(&with(&[4; 50])), Err(ChunkError::Flags { offset, flags: 4 }));
    let mut long = vec![1];
    long.extend_from_slice(&(MAX_KEY_BYTES as u32 + 1).to_le_bytes());
    long.extend_from_slice(&[0; 17 - 5 + 4]);
    long.resize(long.len() + MAX_KEY_BYTES + 1, 0);
    assert_eq!(table.load(&with(&long)), Err(ChunkError::TooLong { offset }));
    long[1..9].fill(0xff);
    assert_eq!(table.load(&with(&long)), Err(ChunkError::Truncated { offset }));
}
