//! The data directory: who may use it, what it was created with, and where its parts lie.
//!
//! ```text
//! LOCK                  held while a node runs
//! node.toml             what was fixed at creation, and the generation of the logs
//! log-<generation>-<n>/ the log of worker n
//! snapshots/            snapshots of all partitions
//! cluster.json          the placement map and the members, as last seen (`cluster::saved`)
//! damaged-<n>/          logs and snapshots that were set aside, for a person to look at
//! ```
//!
//! The logs belong to workers. When their number changes, the records are copied into logs of a new
//! generation; `node.toml` names the generation that counts, so a crash in between changes nothing.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flux_core::placement::NodeId;
use flux_log::Disk;
use serde::{Deserialize, Serialize};

use crate::folders::{Folders, RealFolders};

/// The format of the directory that this version reads and writes.
const FORMAT: u32 = 1;
const DESCRIPTION: &str = "node.toml";
/// A description that is being written.
const NEW_DESCRIPTION: &str = "node.toml.new";
const SNAPSHOTS: &str = "snapshots";
/// Partitions of a new directory when nobody asked for a number: those of a node alone. Joining a
/// cluster replaces it by the cluster's.
const DEFAULT_PARTITIONS: u16 = 16;
/// Begins the names of folders with data that was set aside.
const DAMAGED: &str = "damaged-";
/// No description is as long.
const MAX_DESCRIPTION_BYTES: u64 = 64 * 1024;

/// An open data directory, locked as long as the value lives.
#[derive(Debug)]
pub(crate) struct DataDir {
    folders: Box<dyn Folders>,
    pub(crate) description: Description,
}

/// What a directory is opened for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// A node alone, with so many partitions; 0 where nobody asked for a number.
    Alone(u16),
    /// A node of a cluster, which says how many there are.
    Cluster,
}

/// One of the directories in it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its path, for messages.
    pub(crate) name: String,
    pub(crate) disk: Arc<dyn Disk>,
}

/// The contents of `node.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Description {
    pub(crate) format: u32,
    pub(crate) node_id: String,
    /// Seeds the hash of keys: secret, so that nobody can choose keys that collide. Hexadecimal.
    pub(crate) hash_seed: String,
    pub(crate) partitions: u16,
    pub(crate) workers: u16,
    pub(crate) generation: u32,
    /// Every worker's log has been made: from here on one that is missing is lost.
    #[serde(default)]
    pub(crate) started: bool,
    /// The cluster that the node has joined. Hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cluster_id: Option<String>,
    /// The node that this one was before its data was set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replaces: Option<String>,
    /// Where what is not of this generation is being moved to: `damaged-<aside>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) aside: Option<u32>,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another node runs on it.
    #[error(
        "data directory {0} is in use by another node: stop that one, or give this one a data_dir of its own"
    )]
    InUse(PathBuf),
    /// It was created with another number of partitions.
    #[error(
        "data directory {path} was created with {created} partitions, and the setting partitions is {asked}: the number is fixed at creation; set it to {created}"
    )]
    Partitions {
        /// The directory.
        path: PathBuf,
        /// As created.
        created: u16,
        /// As configured.
        asked: u16,
    },
    /// It belongs to another cluster.
    #[error(
        "data directory {path} holds data of cluster {own:016x}, and this is cluster {other:016x}: give the node an empty data_dir to join this one, or the etcd_endpoints and the cluster_name of the other"
    )]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// The cluster it belongs to.
        own: u64,
        /// The one that the node was to join.
        other: u64,
    },
    /// It was filled by a node alone.
    #[error(
        "data directory {0} holds data of a node alone, which cannot join a cluster: give the node an empty data_dir, or start it without etcd_endpoints"
    )]
    Alone(PathBuf),
    /// It belongs to a node of a cluster, and is to be used without one.
    #[error(
        "data directory {path} belongs to a node of cluster {cluster:016x}, which cannot run alone: give etcd_endpoints and the cluster_name of that cluster, or --nodes and the folder around it if `flux up --nodes` made it; for a node alone give another data_dir"
    )]
    OfCluster {
        /// The directory.
        path: PathBuf,
        /// The cluster it belongs to.
        cluster: u64,
    },
    /// Its description cannot be read.
    #[error("{path} is not a description of a data directory: {reason}")]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It has no description, but files of someone else.
    #[error("{0} is not empty and is no data directory: give data_dir an empty or a new directory")]
    Foreign(PathBuf),
    /// It is a file.
    #[error("{0} is not a folder: give data_dir a folder")]
    NoFolder(PathBuf),
    /// The operating system said no.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl DataDir {
    /// Opens the directory, creating it if it does not exist. One that is of no use for the purpose is
    /// refused, and nothing in it is touched.
    pub(crate) fn open(
        path: &Path,
        purpose: Purpose,
        workers: u16,
    ) -> Result<DataDir, DataDirError> {
        match RealFolders::open(path) {
            Ok(folders) => DataDir::open_in(Box::new(folders), purpose, workers),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                Err(DataDirError::InUse(path.to_owned()))
            }
            Err(source) => Err(DataDirError::Io { action: "open", path: path.to_owned(), source }),
        }
    }

    /// The same, wherever the directory is. Logs that a crash left behind are removed.
    pub(crate) fn open_in(
        folders: Box<dyn Folders>,
        purpose: Purpose,
        workers: u16,
    ) -> Result<DataDir, DataDirError> {
        let path = folders.path().to_owned();
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| DataDirError::Io { action, path, source }
        };
        let file = path.join(DESCRIPTION);
        let description = match read(folders.root()) {
            Ok(bytes) => decode(&file, &bytes)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if !is_unused(&*folders).map_err(failed("list", &path))? {
                    return Err(DataDirError::Foreign(path));
                }
                let partitions = match purpose {
                    Purpose::Alone(0) | Purpose::Cluster => DEFAULT_PARTITIONS,
                    Purpose::Alone(partitions) => partitions,
                };
                let description = Description::create(partitions, workers)
                    .map_err(failed("read randomness for", &path))?;
                write(folders.root(), &description).map_err(failed("write", &file))?;
                description
            }
            Err(source) => return Err(failed("read", &file)(source)),
        };
        description.check(&path, purpose)?;
        let mut directory = DataDir { folders, description };
        directory.finish_setting_aside()?;
        directory.remove_stale_logs()?;
        Ok(directory)
    }

    /// Opens the log of a worker.
    pub(crate) fn log(&self, generation: u32, worker: u16) -> Result<Place, DataDirError> {
        self.place(&format!("log-{generation}-{worker}"))
    }

    /// Opens the snapshots.
    pub(crate) fn snapshots(&self) -> Result<Place, DataDirError> {
        self.place(SNAPSHOTS)
    }

    fn place(&self, name: &str) -> Result<Place, DataDirError> {
        let path = self.folders.path().join(name);
        match self.folders.open(name) {
            Ok(disk) => Ok(Place { name: path.display().to_string(), disk }),
            Err(source) => Err(DataDirError::Io { action: "open", path, source }),
        }
    }

    /// Notes that the log of every worker is there.
    pub(crate) fn mark_started(&mut self) -> Result<(), DataDirError> {
        if self.description.started {
            return Ok(());
        }
        self.describe(Description { started: true, ..self.description.clone() })
    }

    /// Who the node is.
    pub(crate) fn identity(&self) -> NodeId {
        node_number(&self.description.node_id).expect("checked when it was read")
    }

    /// Who it was before its data was set aside.
    pub(crate) fn replaces(&self) -> Option<NodeId> {
        self.description.replaces.as_deref().and_then(node_number)
    }

    /// The cluster that it has joined.
    pub(crate) fn cluster_id(&self) -> Option<u64> {
        self.description.cluster()
    }

    /// Makes the directory part of a cluster, once, with the cluster's number of partitions. To be
    /// called before the first log is made; again, it only checks.
    ///
    /// # Errors
    /// It belongs to another cluster, or a node alone has filled it.
    pub(crate) fn join(&mut self, cluster: u64, partitions: u16) -> Result<(), DataDirError> {
        let path = self.folders.path().to_owned();
        match self.cluster_id() {
            Some(own) if own != cluster => {
                return Err(DataDirError::OtherCluster { path, own, other: cluster });
            }
            None if self.description.started => return Err(DataDirError::Alone(path)),
            Some(_) if partitions != self.description.partitions => {
                let (created, asked) = (self.description.partitions, partitions);
                return Err(DataDirError::Partitions { path, created, asked });
            }
            Some(_) => return Ok(()),
            None => {}
        }
        let cluster_id = Some(format!("{cluster:016x}"));
        self.describe(Description { cluster_id, partitions, ..self.description.clone() })
    }

    /// Moves logs and snapshots out of the way and makes the node a new one, which says whom it
    /// replaces: what it had voted for and acknowledged is lost with its data, so it must not come
    /// back as itself. Returns the folder that the old data is in.
    ///
    /// The new identity is written first. A crash after that leaves the moving to the next start.
    pub(crate) fn set_aside(&mut self) -> Result<PathBuf, DataDirError> {
        let path = self.folders.path().to_owned();
        let failed = |action| {
            let path = path.clone();
            move |source| DataDirError::Io { action, path, source }
        };
        let names = self.folders.list().map_err(failed("list"))?;
        let numbers = names.iter().filter_map(|name| name.strip_prefix(DAMAGED)?.parse().ok());
        let number = numbers.max().map_or(1, |newest: u32| newest.saturating_add(1));
        let node_id = new_node_id().map_err(failed("read randomness for"))?;
        self.describe(Description {
            replaces: Some(self.description.node_id.clone()),
            node_id,
            generation: self.description.generation + 1,
            started: false,
            aside: Some(number),
            ..self.description.clone()
        })?;
        self.finish_setting_aside()?;
        Ok(path.join(format!("{DAMAGED}{number}")))
    }

    fn finish_setting_aside(&mut self) -> Result<(), DataDirError> {
        let Some(number) = self.description.aside else {
            return Ok(());
        };
        let path = self.folders.path().to_owned();
        let failed =
            |action, path: PathBuf| move |source| DataDirError::Io { action, path, source };
        let folder = format!("{DAMAGED}{number}");
        let current = format!("log-{}-", self.description.generation);
        for name in self.folders.list().map_err(failed("list", path.clone()))? {
            let log = name.starts_with("log-") && !name.starts_with(&current);
            if log || name == SNAPSHOTS {
                self.folders.set_aside(&name, &folder).map_err(failed("move", path.join(&name)))?;
            }
        }
        self.describe(Description { aside: None, ..self.description.clone() })
    }

    fn describe(&mut self, description: Description) -> Result<(), DataDirError> {
        write(self.folders.root(), &description).map_err(|source| DataDirError::Io {
            action: "write",
            path: self.folders.path().join(DESCRIPTION),
            source,
        })?;
        self.description = description;
        Ok(())
    }

    /// Makes another generation of logs, of so many workers, the one that counts, and removes the old.
    pub(crate) fn switch(&mut self, generation: u32, workers: u16) -> Result<(), DataDirError> {
        self.describe(Description { generation, workers, ..self.description.clone() })?;
        self.remove_stale_logs()
    }

    /// Removes the logs of every generation that does not count.
    fn remove_stale_logs(&self) -> Result<(), DataDirError> {
        let path = self.folders.path();
        let failed =
            |action, path: PathBuf| move |source| DataDirError::Io { action, path, source };
        let current = format!("log-{}-", self.description.generation);
        for name in self.folders.list().map_err(failed("list", path.to_owned()))? {
            if name.starts_with("log-") && !name.starts_with(&current) {
                self.folders.remove(&name).map_err(failed("remove", path.join(&name)))?;
            }
        }
        Ok(())
    }
}

impl Description {
    fn create(partitions: u16, workers: u16) -> io::Result<Description> {
        Ok(Description {
            format: FORMAT,
            node_id: new_node_id()?,
            hash_seed: format!("{:016x}", random_u64()?),
            partitions,
            workers,
            generation: 1,
            started: false,
            cluster_id: None,
            replaces: None,
            aside: None,
        })
    }

    /// Whether the directory can be used for this.
    fn check(&self, path: &Path, purpose: Purpose) -> Result<(), DataDirError> {
        let path = path.to_owned();
        match (purpose, self.cluster()) {
            (Purpose::Alone(_), Some(cluster)) => Err(DataDirError::OfCluster { path, cluster }),
            (Purpose::Cluster, None) if self.started => Err(DataDirError::Alone(path)),
            (Purpose::Alone(asked), None) if asked != 0 && asked != self.partitions => {
                Err(DataDirError::Partitions { path, created: self.partitions, asked })
            }
            _ => Ok(()),
        }
    }

    /// The cluster as a number.
    fn cluster(&self) -> Option<u64> {
        let text = self.cluster_id.as_deref()?;
        Some(u64::from_str_radix(text, 16).expect("checked when it was read"))
    }

    /// The seed as a number.
    pub(crate) fn seed(&self) -> u64 {
        u64::from_str_radix(&self.hash_seed, 16).expect("checked when it was read")
    }
}

fn decode(file: &Path, bytes: &[u8]) -> Result<Description, DataDirError> {
    let wrong = |reason: String| DataDirError::Description { path: file.to_owned(), reason };
    let text = str::from_utf8(bytes).map_err(|error| wrong(error.to_string()))?;
    let description: Description =
        toml::from_str(text).map_err(|error| wrong(error.message().to_owned()))?;
    if description.format != FORMAT {
        return Err(wrong(format!(
            "format {} is not format {FORMAT}, which this version reads",
            description.format
        )));
    }
    if u64::from_str_radix(&description.hash_seed, 16).is_err() {
        return Err(wrong("hash_seed is not a hexadecimal number of 64 bits".to_owned()));
    }
    if node_number(&description.node_id).is_none() {
        return Err(wrong("node_id is not node- and eight hexadecimal digits".to_owned()));
    }
    if description.cluster_id.as_ref().is_some_and(|id| u64::from_str_radix(id, 16).is_err()) {
        return Err(wrong("cluster_id is not a hexadecimal number of 64 bits".to_owned()));
    }
    if description.workers == 0 {
        return Err(wrong("workers is 0".to_owned()));
    }
    Ok(description)
}

/// A number that nobody can guess.
pub(crate) fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The name of a node that has never been. 0 stands for the node without a cluster.
fn new_node_id() -> io::Result<String> {
    let number = random_u64()? as u32;
    Ok(NodeId(number.max(1)).to_string())
}

/// The number in a node's name.
fn node_number(name: &str) -> Option<NodeId> {
    name.parse().ok().filter(|node| *node != NodeId(0))
}

fn read(root: &dyn Disk) -> io::Result<Vec<u8>> {
    let file = root.open(DESCRIPTION)?;
    let mut bytes = vec![0; file.size()?.min(MAX_DESCRIPTION_BYTES) as usize];
    let count = file.read_at(&mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// A new description takes the place of the old one at once or not at all.
fn write(root: &dyn Disk, description: &Description) -> io::Result<()> {
    let text = toml::to_string(description).expect("plain fields");
    match root.remove(NEW_DESCRIPTION) {
        // A crash left it.
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = root.create(NEW_DESCRIPTION)?;
    file.write_at(text.as_bytes(), 0)?;
    file.sync_data()?;
    root.rename(NEW_DESCRIPTION, DESCRIPTION)?;
    root.sync_dir()
}

/// Whether nothing lies there but what a start that did not get far leaves.
fn is_unused(folders: &dyn Folders) -> io::Result<bool> {
    let ours = ["LOCK", NEW_DESCRIPTION, "lost+found"];
    let mut names = folders.root().list()?;
    names.append(&mut folders.list()?);
    Ok(names.iter().all(|name| ours.contains(&name.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_directory_keeps_what_it_was_created_with() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path().join("data");
        let created =
            DataDir::open(&path, Purpose::Alone(16), 2).expect("created").description.clone();
        let mut again = DataDir::open(&path, Purpose::Alone(16), 4).expect("opened");
        assert_eq!(again.description, created);
        again.switch(2, 4).expect("switched");
        drop(again);
        let again = DataDir::open(&path, Purpose::Alone(16), 4).expect("opened");
        assert_eq!((again.description.generation, again.description.workers), (2, 4));
        assert_eq!(again.description.seed(), created.seed());
    }

    #[test]
    fn one_node_at_a_time() {
        let parent = tempfile::tempdir().expect("a directory");
        let _first = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("opened");
        let second = DataDir::open(parent.path(), Purpose::Alone(16), 1);
        assert!(matches!(second, Err(DataDirError::InUse(_))), "{second:?}");
    }

    #[test]
    fn wrong_directories_are_refused() {
        let parent = tempfile::tempdir().expect("a directory");
        drop(DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("created"));
        let other = DataDir::open(parent.path(), Purpose::Alone(32), 1);
        assert!(matches!(other, Err(DataDirError::Partitions { created: 16, asked: 32, .. })));
        fs::write(parent.path().join(DESCRIPTION), "format = 9").expect("written");
        let damaged = DataDir::open(parent.path(), Purpose::Alone(16), 1);
        assert!(matches!(damaged, Err(DataDirError::Description { .. })), "{damaged:?}");

        let foreign = tempfile::tempdir().expect("a directory");
        fs::write(foreign.path().join("thesis.tex"), "precious").expect("written");
        let refused = DataDir::open(foreign.path(), Purpose::Alone(16), 1);
        assert!(matches!(refused, Err(DataDirError::Foreign(_))), "{refused:?}");

        let foreign = tempfile::tempdir().expect("a directory");
        fs::create_dir(foreign.path().join("photos")).expect("made");
        let refused = DataDir::open(foreign.path(), Purpose::Alone(16), 1);
        assert!(matches!(refused, Err(DataDirError::Foreign(_))), "{refused:?}");
    }

    #[test]
    fn logs_that_a_crash_left_are_removed() {
        let parent = tempfile::tempdir().expect("a directory");
        let directory = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("created");
        for (generation, worker) in [(1, 0), (2, 0), (2, 1), (11, 0)] {
            directory.log(generation, worker).expect("made");
        }
        fs::write(parent.path().join("node.toml.new"), "half of i").expect("written");
        drop(directory);
        let mut directory = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("opened");
        let logs = |directory: &DataDir| {
            let names = directory.folders.list().expect("listed");
            names.into_iter().filter(|name| name.starts_with("log-")).collect::<Vec<_>>()
        };
        assert_eq!(logs(&directory), ["log-1-0"]);
        directory.log(2, 0).expect("made");
        directory.switch(2, 1).expect("switched");
        assert_eq!(logs(&directory), ["log-2-0"]);
    }

    #[test]
    fn a_directory_joins_one_cluster_for_good() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path();
        let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("created");
        assert_eq!((directory.cluster_id(), directory.description.partitions), (None, 16));
        assert_ne!(directory.identity(), NodeId(0));
        directory.join(7, 64).expect("joined");
        directory.join(7, 64).expect("again");
        directory.mark_started().expect("written");
        let node = directory.identity();
        drop(directory);
        let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("opened");
        assert_eq!((directory.cluster_id(), directory.identity()), (Some(7), node));
        assert_eq!(directory.description.partitions, 64);
        let other = directory.join(8, 64).expect_err("another cluster");
        assert!(matches!(other, DataDirError::OtherCluster { own: 7, other: 8, .. }), "{other}");
        let other = directory.join(7, 32).expect_err("another number");
        assert!(
            matches!(other, DataDirError::Partitions { created: 64, asked: 32, .. }),
            "{other}"
        );
    }

    #[test]
    fn data_of_a_node_alone_joins_no_cluster() {
        let parent = tempfile::tempdir().expect("a directory");
        let mut directory = DataDir::open(parent.path(), Purpose::Cluster, 1).expect("created");
        directory.mark_started().expect("written");
        let refused = directory.join(7, 64);
        assert!(matches!(refused, Err(DataDirError::Alone(_))), "{refused:?}");
        assert_eq!(directory.cluster_id(), None);
        drop(directory);
        let refused = DataDir::open(parent.path(), Purpose::Cluster, 1);
        assert!(matches!(refused, Err(DataDirError::Alone(_))), "{refused:?}");
    }

    #[test]
    fn data_of_a_cluster_is_not_touched_by_a_node_alone() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path();
        let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("created");
        directory.join(7, 64).expect("joined");
        directory.mark_started().expect("written");
        // What a crash left, and the next start of the node itself removes.
        directory.log(2, 0).expect("made");
        drop(directory);
        for partitions in [0, 64, 16] {
            let refused = DataDir::open(path, Purpose::Alone(partitions), 2);
            let Err(error @ DataDirError::OfCluster { cluster: 7, .. }) = refused else {
                panic!("opened: {refused:?}");
            };
            let text = error.to_string();
            assert!(text.contains("cluster 0000000000000007"), "{text}");
            assert!(text.contains("give etcd_endpoints"), "{text}");
        }
        assert!(path.join("log-2-0").is_dir());
        DataDir::open(path, Purpose::Cluster, 1).expect("its own node opens it");
    }

    #[test]
    fn a_directory_without_a_cluster_reads_as_ever() {
        let parent = tempfile::tempdir().expect("a directory");
        let text = "format = 1\nnode_id = \"node-0badcafe\"\nhash_seed = \"00000000000000ff\"\n\
                    partitions = 16\nworkers = 1\ngeneration = 1\nstarted = true\n";
        fs::write(parent.path().join(DESCRIPTION), text).expect("written");
        let mut directory = DataDir::open(parent.path(), Purpose::Alone(0), 1).expect("opened");
        assert_eq!(directory.identity(), NodeId(0x0bad_cafe));
        assert_eq!((directory.cluster_id(), directory.replaces()), (None, None));
        directory.switch(1, 1).expect("written");
        drop(directory);
        let written = fs::read_to_string(parent.path().join(DESCRIPTION)).expect("read");
        assert_eq!(written, text, "what an older version reads too");
    }

    #[test]
    fn data_that_is_set_aside_makes_another_node() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path();
        let mut directory = DataDir::open(path, Purpose::Cluster, 2).expect("created");
        directory.join(7, 64).expect("joined");
        for worker in 0..2 {
            directory.log(1, worker).expect("made");
        }
        directory.snapshots().expect("made");
        directory.mark_started().expect("written");
        fs::write(path.join("log-1-1/1.log"), "damaged").expect("written");
        let old = directory.identity();
        let aside = directory.set_aside().expect("moved");
        assert_eq!(aside, path.join("damaged-1"));
        assert_eq!(fs::read(aside.join("log-1-1/1.log")).expect("kept"), b"damaged");
        assert!(aside.join("snapshots").is_dir() && !path.join("snapshots").exists());
        assert_ne!(directory.identity(), old);
        assert_eq!((directory.replaces(), directory.cluster_id()), (Some(old), Some(7)));
        assert_eq!((directory.description.generation, directory.description.started), (2, false));
        drop(directory);

        // A crash came after the new identity was written, and before anything was moved.
        let mut directory = DataDir::open(path, Purpose::Cluster, 2).expect("opened");
        let second = directory.identity();
        directory.log(2, 0).expect("made");
        let description = Description {
            node_id: "node-00000009".to_owned(),
            replaces: Some(second.to_string()),
            generation: 3,
            aside: Some(2),
            ..directory.description.clone()
        };
        directory.describe(description).expect("written");
        drop(directory);
        let directory = DataDir::open(path, Purpose::Cluster, 2).expect("opened");
        assert!(path.join("damaged-2/log-2-0").is_dir() && !path.join("log-2-0").exists());
        assert_eq!((directory.identity(), directory.replaces()), (NodeId(9), Some(second)));
        assert_eq!(directory.description.aside, None);
    }
}
