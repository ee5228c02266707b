//! `flux consume --verify`: compares what a file of events says with what the store has.
//!
//! What this module does not do: hold still a store that is written to.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use bytes::Bytes;
use flux_cdc::consumer::{lines::Lines, rotate::rotated};
use flux_client::{Client, Config, Error, Item, ScanOptions};

use super::{
    counted,
    replay::{Entry, Replay, Replayed},
};

/// Keys of a page.
const PAGE: u32 = 1000;
/// How long one page is tried for, when the store is not there or overloaded.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause after an attempt.
const PAUSE: Duration = Duration::from_millis(100);
/// How much of a key a line shows.
const SHOWN_BYTES: usize = 200;

const DIFFERS: u8 = 1;
const IRREGULAR: u8 = 2;

/// Compares files with the store that a node is of.
pub async fn run(files: &[PathBuf], address: &str) -> anyhow::Result<ExitCode> {
    let replayed = replay(files)?;
    let config = Config::new([address]);
    let client = Client::connect(config).await.context("cannot reach the data port of a node")?;
    let compared = compare(&client, &replayed.table).await;
    client.close().await;
    let differences =
        compared.with_context(|| format!("cannot read all keys through {address}"))?;
    let mut out = io::stdout().lock();
    for line in replayed.irregular.iter().chain(&differences) {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "{}", told(&replayed, differences.len()))?;
    out.flush()?;
    Ok(match (replayed.irregular.is_empty(), differences.is_empty()) {
        (false, _) => ExitCode::from(IRREGULAR),
        (true, false) => ExitCode::from(DIFFERS),
        (true, true) => ExitCode::SUCCESS,
    })
}

fn told(replayed: &Replayed, differences: usize) -> String {
    let Replayed { table, records, partitions, irregular } = replayed;
    let result = match (irregular.len(), differences) {
        (0, 0) => "equal".to_owned(),
        (0, differences) => counted(differences as u64, "difference"),
        (irregular, differences) => format!(
            "{} in the file, {}",
            counted(irregular as u64, "hole or repeat"),
            counted(differences as u64, "difference")
        ),
    };
    let (keys, events) = (counted(table.len() as u64, "key"), counted(*records, "event"));
    format!("{result}: {keys} of {events} in {}", counted(*partitions as u64, "partition"))
}

fn replay(files: &[PathBuf]) -> anyhow::Result<Replayed> {
    let with_rotated = |path: &Path| -> io::Result<Vec<PathBuf>> {
        let mut all = rotated(path)?;
        all.push(path.to_owned());
        Ok(all)
    };
    let files = match files {
        [one] => with_rotated(one).with_context(|| format!("cannot read {}", one.display()))?,
        several => several.to_vec(),
    };
    let mut replay = Replay::default();
    for file in files {
        let mut lines = Lines::open(&file, 0)?;
        // A line without its end is one that its consumer is about to write, or to cut off.
        while let Some(record) = lines.next_record()? {
            replay.take(record);
        }
    }
    Ok(replay.end())
}

/// All differences, in words. What has expired by the end of the comparison counts on neither side.
async fn compare(client: &Client, table: &HashMap<Bytes, Entry>) -> Result<Vec<String>, Error> {
    let mut differences = Vec::new();
    let mut same = HashSet::new();
    let options = ScanOptions { limit: PAGE, ..ScanOptions::default() };
    let mut cursor: Option<Bytes> = None;
    loop {
        let page = page(client, &options, cursor.as_deref()).await?;
        for item in page.items {
            match table.get_key_value(&item.key) {
                Some((key, entry)) if is_same(entry, &item) => {
                    same.insert(key);
                }
                entry => differences.push((entry.map(|(_, entry)| entry), item)),
            }
        }
        cursor = page.cursor;
        if cursor.is_none() {
            break;
        }
    }
    let now_ms =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64);
    let lives = |expires_at_ms: Option<u64>| expires_at_ms.is_none_or(|at| at > now_ms);
    differences.retain(|(_, item)| lives(item.value.expires_at_ms));
    let differing: HashSet<&Bytes> = differences.iter().map(|(_, item)| &item.key).collect();
    let in_store = differences.iter();
    let mut lines: Vec<String> = in_store.map(|(entry, item)| difference(*entry, item)).collect();
    for (key, entry) in table {
        if lives(entry.expires_at_ms) && !same.contains(key) && !differing.contains(key) {
            let Entry { partition, version, .. } = entry;
            let key = shown(key);
            lines.push(format!(
                "only in the file: {key}, version {version} of partition {partition}"
            ));
        }
    }
    lines.sort();
    Ok(lines)
}

fn is_same(entry: &Entry, item: &Item) -> bool {
    let Item { value, .. } = item;
    entry.version == value.version
        && entry.expires_at_ms == value.expires_at_ms
        && entry.value == value.bytes
}

fn difference(entry: Option<&Entry>, item: &Item) -> String {
    let (key, value) = (shown(&item.key), &item.value);
    let Some(entry) = entry else {
        return format!("only in the store: {key}, version {}", value.version);
    };
    let mut text = format!("differs: {key} of partition {}", entry.partition);
    let mut add = |what: &str, file: String, store: String| {
        text += &format!(", {what} {file} in the file and {store} in the store");
    };
    if entry.version != value.version {
        add("version", entry.version.to_string(), value.version.to_string());
    }
    let expiry = |at: Option<u64>| at.map_or("never".to_owned(), |at| at.to_string());
    if entry.expires_at_ms != value.expires_at_ms {
        add("expiry", expiry(entry.expires_at_ms), expiry(value.expires_at_ms));
    }
    if entry.value != value.bytes {
        add("value", bytes_of(&entry.value), bytes_of(&value.bytes));
    }
    text
}

fn bytes_of(value: &Bytes) -> String {
    counted(value.len() as u64, "byte")
}

fn shown(key: &[u8]) -> String {
    let more = if key.len() > SHOWN_BYTES { "..." } else { "" };
    format!("\"{}{more}\"", key[..key.len().min(SHOWN_BYTES)].escape_ascii())
}

/// A page of keys, tried for a while.
async fn page(
    client: &Client,
    options: &ScanOptions,
    cursor: Option<&[u8]>,
) -> Result<flux_client::Page, Error> {
    let begun = Instant::now();
    loop {
        match client.scan(options, cursor).await {
            Err(error) if error.code().is_retryable() && begun.elapsed() < PATIENCE => {
                tokio::time::sleep(PAUSE).await;
            }
            decided => return decided,
        }
    }
}

#[cfg(test)]
mod tests {
    use flux_client::Value;

    use super::*;

    #[test]
    fn a_difference_says_what_differs() {
        let item = |version, bytes: &'static [u8], expires_at_ms| Item {
            key: Bytes::from_static(b"k\xff\""),
            value: Value { bytes: Bytes::from_static(bytes), version, expires_at_ms },
        };
        let mut replay = Replay::default();
        let line = br#"{"op":"set","key":"k","value":"v","partition":3,"revision":1,"version":1,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0}"#;
        replay.take(flux_proto::event::read_json(line).expect("a record"));
        let replayed = replay.end();
        let entry = &replayed.table[&b"k"[..]];
        assert!(is_same(entry, &item(1, b"v", None)));
        for (item, expected) in [
            (item(2, b"v", None), "version 1 in the file and 2 in the store"),
            (item(1, b"v", Some(9)), "expiry never in the file and 9 in the store"),
            (item(1, b"ww", None), "value 1 byte in the file and 2 bytes in the store"),
        ] {
            assert!(!is_same(entry, &item));
            let expected = format!(r#"differs: "k\xff\"" of partition 3, {expected}"#);
            assert_eq!(difference(Some(entry), &item), expected);
        }
        let only = difference(None, &item(7, b"", None));
        assert_eq!(only, r#"only in the store: "k\xff\"", version 7"#);
        assert_eq!(told(&replayed, 0), "equal: 1 key of 1 event in 1 partition");
        assert_eq!(told(&replayed, 2), "2 differences: 1 key of 1 event in 1 partition");
        assert_eq!(shown(&[b'x'; 300]).len(), SHOWN_BYTES + 5);
    }
}
