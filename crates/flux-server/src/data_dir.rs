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

mod description;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flux_core::placement::NodeId;
use flux_log::Disk;

pub(crate) use description::random_u64;

use crate::folders::{Folders, RealFolders};
use description::{DESCRIPTION, Description, NEW_DESCRIPTION, new_node_id, node_number};

const SNAPSHOTS: &str = "snapshots";
/// Partitions of a new directory when nobody asked for a number: those of a node alone. Joining a
/// cluster replaces it by the cluster's.
const DEFAULT_PARTITIONS: u16 = 16;
/// Begins the names of folders with data that was set aside.
const DAMAGED: &str = "damaged-";

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
        let description = match description::read(folders.root()) {
            Ok(bytes) => description::decode(&file, &bytes)?,
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
                description::write(folders.root(), &description).map_err(failed("write", &file))?;
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
        description::write(self.folders.root(), &description).map_err(|source| {
            DataDirError::Io {
                action: "write",
                path: self.folders.path().join(DESCRIPTION),
                source,
            }
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

/// Whether nothing lies there but what a start that did not get far leaves.
fn is_unused(folders: &dyn Folders) -> io::Result<bool> {
    let ours = ["LOCK", NEW_DESCRIPTION, "lost+found"];
    let mut names = folders.root().list()?;
    names.append(&mut folders.list()?);
    Ok(names.iter().all(|name| ours.contains(&name.as_str())))
}
