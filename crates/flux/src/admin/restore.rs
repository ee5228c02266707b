//! `flux admin restore`: checks a backup and writes its keys as any client would, so that it fits any
//! number of nodes and partitions.

use std::{
    fmt,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use flux_client::{Client, Code, Config, Error, Expiry, SetOptions};
use flux_server::{
    backup::{Manifest, Overview, PartitionFile, PartitionRecord},
    cluster::{Client as AdminClient, ClusterStatus},
};
use serde::Serialize;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{backup, table};

/// Writes that are under way at one time.
const WRITES: usize = 256;
/// Bytes of keys and values that are under way at one time: two of the largest values fit.
const BYTES: usize = 64 << 20;
/// How long a node may take to ask all others how many keys they have.
const STATUS_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one request is tried for, when the cluster is not there or overloaded.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause after an attempt.
const PAUSE: Duration = Duration::from_millis(100);

/// What was restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Keys that were written.
    keys: u64,
    /// Bytes of these keys and their values.
    bytes: u64,
    /// Keys that had expired.
    expired: u64,
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Restored { keys, bytes, expired } = *self;
        let s = if keys == 1 { "" } else { "s" };
        write!(f, "{keys} key{s} restored, {}", table::size(bytes))?;
        if expired > 0 {
            write!(f, "; {expired} had expired and were left out")?;
        }
        writeln!(f)
    }
}

/// Restores the backup in a folder, through the admin port of any node.
pub async fn run(address: &str, folder: &Path, force: bool) -> anyhow::Result<Restored> {
    let manifest = Manifest::read(folder)?;
    check(folder, &manifest)?;
    let overview = backup::overview(address).await?;
    if !force && has_keys(address, &overview).await? {
        bail!(
            "there are keys already, and nothing was restored. With --force the backup is written over \
             them: keys that it has too are overwritten, all others stay"
        );
    }
    let client = Client::connect(Config::new(reachable(&overview.data_addrs, address)))
        .await
        .context("cannot reach the data port of a node")?;
    let restored = write_all(&client, folder, &manifest).await;
    client.close().await;
    restored.context("the restore is not complete; repeat it with --force")
}

/// Checks every file before the first key is written.
fn check(folder: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let bar = super::progress(manifest.bytes(), "check");
    for record in &manifest.partitions {
        PartitionFile::check(folder, record)
            .context("the backup is damaged, nothing was restored")?;
        bar.inc(record.bytes);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The data ports; where a node listens on all addresses, by the host that its admin port is reached by.
fn reachable(data: &[SocketAddr], admin: &str) -> Vec<String> {
    let host = admin.rsplit_once(':').map_or(admin, |(host, _)| host);
    let text = |address: &SocketAddr| match address.ip().is_unspecified() {
        true => format!("{host}:{}", address.port()),
        false => address.to_string(),
    };
    data.iter().map(text).collect()
}

/// Whether there is a key. In a cluster all leaders are asked.
async fn has_keys(address: &str, overview: &Overview) -> anyhow::Result<bool> {
    if overview.cluster_id.is_none() {
        return Ok(overview.keys > 0);
    }
    let (client, begun) = (AdminClient::default(), Instant::now());
    loop {
        let status = client.get::<ClusterStatus>(address, "/cluster/status", STATUS_TIMEOUT).await;
        let status = status.context("cannot see whether there are keys already")?;
        if let Some(keys) = status.keys {
            return Ok(keys > 0);
        }
        if begun.elapsed() >= PATIENCE {
            let without = status.partitions - status.partitions_led;
            bail!(
                "{} no leader, so it is not known whether there are keys already",
                match without {
                    1 => "1 partition has".to_owned(),
                    without => format!("{without} partitions have"),
                }
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A key that is to be written.
struct Owned {
    key: Vec<u8>,
    value: Vec<u8>,
    expiry: Expiry,
}

/// Writes every key of every file.
async fn write_all(
    client: &Client,
    folder: &Path,
    manifest: &Manifest,
) -> anyhow::Result<Restored> {
    let mut restored = Restored::default();
    let mut writing = Writing {
        client: client.clone(),
        room: Arc::new(Semaphore::new(BYTES)),
        tasks: JoinSet::new(),
    };
    let bar = super::progress(manifest.keys(), "restore");
    let begun = Instant::now();
    for record in &manifest.partitions {
        let path = folder.join(PartitionRecord::file_name(record.partition));
        let mut file = PartitionFile::open(&path, record.partition, record.index)?;
        loop {
            let (now_ms, mut chunk) = (backup::now_ms(), Vec::new());
            let more = file.next(|pair| {
                if pair.expires_at_ms.is_some_and(|at| at <= now_ms) {
                    restored.expired += 1;
                    return;
                }
                restored.keys += 1;
                restored.bytes += (pair.key.len() + pair.value.len()) as u64;
                let expiry = pair.expires_at_ms.map_or(Expiry::Never, Expiry::At);
                chunk.push(Owned { key: pair.key.to_vec(), value: pair.value.to_vec(), expiry });
            })?;
            for pair in chunk {
                writing.write(pair).await?;
            }
            let rate = restored.keys as f64 / begun.elapsed().as_secs_f64().max(1e-3);
            bar.set_position(restored.keys + restored.expired);
            bar.set_message(format!("{} keys, {rate:.0}/s", restored.keys));
            if !more {
                break;
            }
        }
    }
    writing.finish().await?;
    bar.finish_and_clear();
    Ok(restored)
}

/// Writes that are under way.
struct Writing {
    client: Client,
    room: Arc<Semaphore>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Writing {
    /// Begins to write a key, once there is room for it.
    async fn write(&mut self, pair: Owned) -> anyhow::Result<()> {
        while self.tasks.len() >= WRITES {
            self.join_one().await?;
        }
        let bytes = (pair.key.len() + pair.value.len()).min(BYTES) as u32;
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await?;
        let client = self.client.clone();
        self.tasks.spawn(async move {
            let written = write_one(&client, &pair).await;
            drop(room);
            written
        });
        Ok(())
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        while !self.tasks.is_empty() {
            self.join_one().await?;
        }
        Ok(())
    }

    async fn join_one(&mut self) -> anyhow::Result<()> {
        match self.tasks.join_next().await {
            Some(Ok(written)) => written,
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => Ok(()),
        }
    }
}

/// Writes a key, and again when it is not known whether it was written: twice is the same as once.
async fn write_one(client: &Client, pair: &Owned) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let options = SetOptions { expiry: pair.expiry, ..SetOptions::default() };
        let Err(error) = client.set(&pair.key, &pair.value, options).await else { return Ok(()) };
        if !may_pass(&error) || begun.elapsed() >= PATIENCE {
            let key = String::from_utf8_lossy(&pair.key[..pair.key.len().min(64)]).into_owned();
            return Err(error).with_context(|| format!("cannot write key {key:?}"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether the same write may succeed later, by itself. A lack of memory stays.
fn may_pass(error: &Error) -> bool {
    let code = error.code();
    (code.is_retryable() && code != Code::OutOfMemory) || code.outcome_is_unknown()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_listens_everywhere_is_reached_where_its_admin_port_is() {
        let data = ["0.0.0.0:7379", "10.0.0.2:7479"].map(|text| text.parse().expect("one"));
        assert_eq!(reachable(&data, "db1.local:7380"), ["db1.local:7379", "10.0.0.2:7479"]);
        assert_eq!(reachable(&["[::]:1".parse().expect("one")], "[::1]:2"), ["[::1]:1"]);
    }

    #[test]
    fn what_was_restored_is_told() {
        let all = Restored { keys: 3, bytes: 300, expired: 0 };
        assert!(all.to_string().starts_with("3 keys restored, "));
        let some = Restored { expired: 2, ..all };
        assert!(some.to_string().ends_with("; 2 had expired and were left out\n"));
    }

    #[test]
    fn only_what_passes_by_itself_is_tried_again() {
        let refused = |code| Error::Refused { code, message: String::new() };
        assert!(may_pass(&refused(Code::Overloaded)));
        assert!(may_pass(&refused(Code::DiskFull)));
        assert!(may_pass(&Error::OutcomeUnknown(String::new())));
        assert!(may_pass(&Error::Unavailable(String::new())));
        assert!(!may_pass(&refused(Code::OutOfMemory)));
        assert!(!may_pass(&refused(Code::TooLarge)));
    }
}
