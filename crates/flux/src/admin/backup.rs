//! `flux admin backup`: asks each partition's leader for a snapshot and writes them to a folder.
//!
//! What is half done never looks done: files have temporary names until they are whole, checked and on
//! the disk, and the manifest, without which a folder is no backup, is the last.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::SocketAddr,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use flux_server::{
    backup::{
        Download, FetchError, MANIFEST, Manifest, Overview, PartitionFile, PartitionRecord, Source,
    },
    cluster::{CallError, Client, NodeReport, PartitionReport},
};

use super::table;

/// How long a node may take to say what there is.
const OVERVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to ask all others who leads what.
const LEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Attempts at one partition: its leader may change, or die, while it is read.
const ATTEMPTS: u32 = 20;
/// The pause after the first attempt; it doubles, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// How the names of files end that are being written.
const NEW: &str = ".new";

/// Takes a backup, through the admin port of any node, into a folder.
pub async fn run(address: &str, folder: &Path) -> anyhow::Result<Manifest> {
    let overview = overview(address).await?;
    prepare(folder)?;
    let leaders = match &overview.cluster_id {
        Some(_) => Some(leaders(address).await?),
        None => None,
    };
    let Overview { node, version, cluster_id, partitions, .. } = overview;
    let mut manifest = Manifest::new(now_ms(), cluster_id, node, version);
    let mut taking = Taking { source: Source::default(), address, folder, leaders };
    let bar = super::progress(u64::from(partitions), "backup");
    for partition in 0..partitions {
        let record = taking.take(partition).await?;
        manifest.partitions.push(record);
        bar.inc(1);
        bar.set_message(format!("{} keys, {}", manifest.keys(), table::size(manifest.bytes())));
    }
    bar.finish_and_clear();
    sync_folder(folder)?;
    manifest.ended_ms = now_ms();
    write_manifest(folder, &manifest)?;
    Ok(manifest)
}

/// What was done, in words.
pub fn done(manifest: &Manifest, folder: &Path) -> String {
    let are = if manifest.keys() == 1 { "is" } else { "are" };
    format!(
        "{} of {}, {}, {are} in {}\n",
        super::counted(manifest.keys() as usize, "key"),
        super::counted(manifest.partitions.len(), "partition"),
        table::size(manifest.bytes()),
        folder.display()
    )
}

/// What there is to back up, or to restore into.
pub async fn overview(address: &str) -> anyhow::Result<Overview> {
    match Client::default().get(address, "/cluster/backup", OVERVIEW_TIMEOUT).await {
        Ok(overview) => Ok(overview),
        Err(CallError::Refused { .. }) => bail!(
            "the node at {address} is starting, or of a version without backups: it does not answer /cluster/backup"
        ),
        Err(error) => Err(error.into()),
    }
}

/// The admin port of each partition's leader, by what all nodes say.
async fn leaders(address: &str) -> Result<Vec<Option<SocketAddr>>, CallError> {
    let client = Client::default();
    let nodes: Vec<NodeReport> = client.get(address, "/cluster/nodes", LEADERS_TIMEOUT).await?;
    let partitions: Vec<PartitionReport> =
        client.get(address, "/cluster/partitions?all", LEADERS_TIMEOUT).await?;
    let leader = |report: &PartitionReport| {
        let leads = report.leader?;
        nodes.iter().find(|node| node.node == leads).map(|node| node.admin_addr)
    };
    Ok(partitions.iter().map(leader).collect())
}

/// Makes the folder, or takes one in which nothing would be overwritten that counts.
fn prepare(folder: &Path) -> anyhow::Result<()> {
    let name = folder.display();
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {name}"))?;
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read the folder {name}"))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read the folder {name}"))?.file_name();
        let entry = entry.to_string_lossy();
        if entry == MANIFEST {
            bail!("{name} holds a backup already: give another folder");
        }
        let unfinished = entry.strip_suffix(NEW).unwrap_or(&entry);
        if unfinished != MANIFEST && !unfinished.ends_with(".snapshot") {
            bail!("{name} has other files in it, like {entry}: give an empty or a new folder");
        }
    }
    Ok(())
}

/// A backup that is being taken.
struct Taking<'a> {
    source: Source,
    address: &'a str,
    folder: &'a Path,
    /// For each partition the admin port of the node that leads it; `None` for a node alone.
    leaders: Option<Vec<Option<SocketAddr>>>,
}

/// Why a partition was not taken.
enum Setback {
    Fetch(FetchError),
    Here(anyhow::Error),
}

impl Taking<'_> {
    /// Takes one partition, from whichever node leads it.
    async fn take(&mut self, partition: u16) -> anyhow::Result<PartitionRecord> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let error = match self.attempt(partition).await {
                Ok(record) => return Ok(record),
                Err(Setback::Here(error)) => return Err(error),
                Err(Setback::Fetch(error)) => error,
            };
            if attempt == ATTEMPTS || !error.may_pass() {
                let context = format!("partition {partition} cannot be backed up");
                return Err(error).context(context);
            }
            attempt += 1;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            // Where it is not reached, the backup still has what it knew.
            if self.leaders.is_some()
                && let Ok(newer) = leaders(self.address).await
            {
                self.leaders = Some(newer);
            }
        }
    }

    async fn attempt(&self, partition: u16) -> Result<PartitionRecord, Setback> {
        let address = match &self.leaders {
            None => self.address.to_owned(),
            Some(leaders) => match leaders.get(usize::from(partition)) {
                Some(Some(leader)) => leader.to_string(),
                _ => {
                    let message = format!("partition {partition} has no leader");
                    return Err(Setback::Fetch(FetchError::Busy { message }));
                }
            },
        };
        let download = self.source.fetch(&address, partition).await.map_err(Setback::Fetch)?;
        let name = PartitionRecord::file_name(partition);
        let (path, new) = (self.folder.join(&name), self.folder.join(name + NEW));
        let index = download.index();
        write(download, &new).await?;
        // What was read from the node and went to the disk is checked as a restore would.
        let described = PartitionFile::describe(&new, partition, index);
        let record = described.map_err(|error| {
            let context = format!("what {address} sent of partition {partition} is damaged");
            Setback::Here(anyhow::Error::from(error).context(context))
        })?;
        fs::rename(&new, &path)
            .with_context(|| format!("cannot rename {}", new.display()))
            .map_err(Setback::Here)?;
        Ok(record)
    }
}

/// Writes what comes to a file, and syncs it.
async fn write(mut download: Download, path: &Path) -> Result<(), Setback> {
    let failed = |error| Setback::Here(disk(error, path));
    let mut file = File::create(path).map_err(failed)?;
    while let Some(bytes) = download.next().await.map_err(Setback::Fetch)? {
        file.write_all(&bytes).map_err(failed)?;
    }
    file.sync_all().map_err(failed)
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let (path, new) = (folder.join(MANIFEST), folder.join(MANIFEST.to_owned() + NEW));
    let mut file = File::create(&new).map_err(|error| disk(error, &new))?;
    file.write_all(&manifest.encode()).map_err(|error| disk(error, &new))?;
    file.sync_all().map_err(|error| disk(error, &new))?;
    fs::rename(&new, &path).with_context(|| format!("cannot rename {}", new.display()))?;
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> anyhow::Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("cannot sync the folder {}", folder.display()))
}

fn disk(error: io::Error, path: &Path) -> anyhow::Error {
    let path = path.display();
    let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let text = match full {
        true => format!("there is no room for {path}: the backup is not finished"),
        false => format!("cannot write {path}"),
    };
    anyhow::Error::from(error).context(text)
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_taken_only_where_nothing_in_it_counts() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("a").join("b");
        prepare(&folder).expect("it is made");
        fs::write(folder.join("3.snapshot"), "x").expect("written");
        fs::write(folder.join("4.snapshot.new"), "x").expect("written");
        fs::write(folder.join("backup.json.new"), "x").expect("written");
        prepare(&folder).expect("a backup that was not finished");
        fs::write(folder.join("letter.txt"), "x").expect("written");
        let error = prepare(&folder).expect_err("somebody's file").to_string();
        assert!(error.contains("letter.txt"), "{error}");
        fs::remove_file(folder.join("letter.txt")).expect("removed");
        fs::write(folder.join(MANIFEST), "x").expect("written");
        let error = prepare(&folder).expect_err("a backup").to_string();
        assert!(error.contains("holds a backup already"), "{error}");
        let file = parent.path().join("file");
        fs::write(&file, "x").expect("written");
        prepare(&file).expect_err("no folder");
    }

    #[test]
    fn what_was_backed_up_is_told() {
        let mut manifest = Manifest::new(0, None, "node-1".to_owned(), "1".to_owned());
        let record = |partition, keys| {
            let (index, revision, bytes, crc32c) = (1, 1, 0, 0);
            PartitionRecord { partition, index, revision, keys, bytes, crc32c }
        };
        manifest.partitions.push(record(0, 1));
        let folder = Path::new("/b");
        assert_eq!(done(&manifest, folder), "1 key of 1 partition, 0 B, is in /b\n");
        manifest.partitions.push(record(1, 205));
        assert_eq!(done(&manifest, folder), "206 keys of 2 partitions, 0 B, are in /b\n");
    }

    #[test]
    fn a_full_disk_is_called_so() {
        let full = disk(io::ErrorKind::StorageFull.into(), Path::new("/b/1.snapshot.new"));
        assert!(full.to_string().contains("no room for /b/1.snapshot.new"), "{full}");
        let other = disk(io::ErrorKind::PermissionDenied.into(), Path::new("/b/x"));
        assert_eq!(other.to_string(), "cannot write /b/x");
    }
}
