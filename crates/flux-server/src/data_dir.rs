//! The data directory: who may use it, what it was created with, and where its parts lie.
//!
//! ```text
//! lock                  held while a node runs
//! node.toml             what was fixed at creation, and the generation of the logs
//! log-<generation>-<n>/ the log of worker n
//! snapshots/            snapshots of all partitions
//! ```
//!
//! The logs belong to workers. When their number changes, the records are copied into logs of a new
//! generation; `node.toml` names the generation that counts, so a crash in between changes nothing.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The format of the directory that this version reads and writes.
const FORMAT: u32 = 1;
const DESCRIPTION: &str = "node.toml";

/// An open data directory. Its lock is released when it is dropped.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    pub(crate) description: Description,
    _lock: File,
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
    /// Opens the directory, creating it if it does not exist.
    pub(crate) fn open(
        path: &Path,
        partitions: u16,
        workers: u16,
    ) -> Result<DataDir, DataDirError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| DataDirError::Io { action, path, source }
        };
        fs::create_dir_all(path).map_err(failed("create", path))?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path).map_err(failed("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataDirError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => {
                return Err(DataDirError::Io { action: "lock", path: lock_path, source });
            }
        }
        let file = path.join(DESCRIPTION);
        let description = match fs::read_to_string(&file) {
            Ok(text) => read(&file, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                refuse_foreign(path)?;
                let description = Description::create(partitions, workers)
                    .map_err(failed("read randomness for", path))?;
                write(path, &description).map_err(failed("write", &file))?;
                description
            }
            Err(source) => return Err(DataDirError::Io { action: "read", path: file, source }),
        };
        if description.partitions != partitions {
            let (created, asked) = (description.partitions, partitions);
            return Err(DataDirError::Partitions { path: path.to_owned(), created, asked });
        }
        Ok(DataDir { path: path.to_owned(), description, _lock: lock })
    }

    /// The directory of a worker's log.
    pub(crate) fn log(&self, generation: u32, worker: u16) -> PathBuf {
        self.path.join(format!("log-{generation}-{worker}"))
    }

    /// The directory of the snapshots.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// Makes another generation of logs, of so many workers, the one that counts.
    pub(crate) fn switch(&mut self, generation: u32, workers: u16) -> Result<(), DataDirError> {
        let description = Description { generation, workers, ..self.description.clone() };
        write(&self.path, &description).map_err(|source| DataDirError::Io {
            action: "write",
            path: self.path.join(DESCRIPTION),
            source,
        })?;
        self.description = description;
        Ok(())
    }

    /// Removes the logs of every generation that does not count.
    pub(crate) fn remove_stale_logs(&self) -> io::Result<()> {
        let current = format!("log-{}-", self.description.generation);
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("log-") && !name.starts_with(&current) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Description {
    fn create(partitions: u16, workers: u16) -> io::Result<Description> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let [seed, id] = [0, 8].map(|at| {
            let half = bytes[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(half)
        });
        Ok(Description {
            format: FORMAT,
            node_id: format!("node-{:08x}", id as u32),
            hash_seed: format!("{seed:016x}"),
            partitions,
            workers,
            generation: 1,
        })
    }

    /// The seed as a number.
    pub(crate) fn seed(&self) -> u64 {
        u64::from_str_radix(&self.hash_seed, 16).expect("checked when it was read")
    }
}

fn read(file: &Path, text: &str) -> Result<Description, DataDirError> {
    let wrong = |reason: String| DataDirError::Description { path: file.to_owned(), reason };
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
    if description.workers == 0 {
        return Err(wrong("workers is 0".to_owned()));
    }
    Ok(description)
}

/// A new description takes the place of the old one at once or not at all.
fn write(path: &Path, description: &Description) -> io::Result<()> {
    let text = toml::to_string(description).expect("plain fields");
    let new = path.join("node.toml.new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path.join(DESCRIPTION))?;
    File::open(path)?.sync_all()
}

fn refuse_foreign(path: &Path) -> Result<(), DataDirError> {
    let io = |source| DataDirError::Io { action: "list", path: path.to_owned(), source };
    for entry in fs::read_dir(path).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let ours = ["lock", "node.toml.new", "lost+found"];
        if !ours.iter().any(|own| name == *own) {
            return Err(DataDirError::Foreign(path.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_what_it_was_created_with() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = parent.path().join("data");
        let created = DataDir::open(&path, 16, 2).expect("created").description.clone();
        let mut again = DataDir::open(&path, 16, 4).expect("opened");
        assert_eq!(again.description, created);
        again.switch(2, 4).expect("switched");
        drop(again);
        let again = DataDir::open(&path, 16, 4).expect("opened");
        assert_eq!((again.description.generation, again.description.workers), (2, 4));
        assert_eq!(again.description.seed(), created.seed());
    }

    #[test]
    fn one_node_at_a_time() {
        let parent = tempfile::tempdir().expect("a directory");
        let _first = DataDir::open(parent.path(), 16, 1).expect("opened");
        let second = DataDir::open(parent.path(), 16, 1);
        assert!(matches!(second, Err(DataDirError::InUse(_))), "{second:?}");
    }

    #[test]
    fn wrong_directories_are_refused() {
        let parent = tempfile::tempdir().expect("a directory");
        drop(DataDir::open(parent.path(), 16, 1).expect("created"));
        let other = DataDir::open(parent.path(), 32, 1);
        assert!(matches!(other, Err(DataDirError::Partitions { created: 16, asked: 32, .. })));
        fs::write(parent.path().join(DESCRIPTION), "format = 9").expect("written");
        let damaged = DataDir::open(parent.path(), 16, 1);
        assert!(matches!(damaged, Err(DataDirError::Description { .. })), "{damaged:?}");

        let foreign = tempfile::tempdir().expect("a directory");
        fs::write(foreign.path().join("thesis.tex"), "precious").expect("written");
        let refused = DataDir::open(foreign.path(), 16, 1);
        assert!(matches!(refused, Err(DataDirError::Foreign(_))), "{refused:?}");
    }
}
