//! `node.toml`: who the node is, what its data directory was created with, and which logs count.
//!
//! It is read whole and checked, and replaced whole. When it changes, and what else that takes, is the
//! directory's to say.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::Path;

use flux_core::placement::NodeId;
use flux_log::Disk;
use serde::{Deserialize, Serialize};

use super::{DataDirError, Purpose};

/// The format of the directory that this version reads and writes.
const FORMAT: u32 = 1;
pub(super) const DESCRIPTION: &str = "node.toml";
/// A description that is being written.
pub(super) const NEW_DESCRIPTION: &str = "node.toml.new";
/// No description is as long.
const MAX_DESCRIPTION_BYTES: u64 = 64 * 1024;

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

impl Description {
    pub(super) fn create(partitions: u16, workers: u16) -> io::Result<Description> {
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
    pub(super) fn check(&self, path: &Path, purpose: Purpose) -> Result<(), DataDirError> {
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
    pub(super) fn cluster(&self) -> Option<u64> {
        let text = self.cluster_id.as_deref()?;
        Some(u64::from_str_radix(text, 16).expect("checked when it was read"))
    }

    /// The seed as a number.
    pub(crate) fn seed(&self) -> u64 {
        u64::from_str_radix(&self.hash_seed, 16).expect("checked when it was read")
    }
}

pub(super) fn decode(file: &Path, bytes: &[u8]) -> Result<Description, DataDirError> {
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
pub(super) fn new_node_id() -> io::Result<String> {
    let number = random_u64()? as u32;
    Ok(NodeId(number.max(1)).to_string())
}

/// The number in a node's name.
pub(super) fn node_number(name: &str) -> Option<NodeId> {
    name.parse().ok().filter(|node| *node != NodeId(0))
}

pub(super) fn read(root: &dyn Disk) -> io::Result<Vec<u8>> {
    let file = root.open(DESCRIPTION)?;
    let mut bytes = vec![0; file.size()?.min(MAX_DESCRIPTION_BYTES) as usize];
    let count = file.read_at(&mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// A new description takes the place of the old one at once or not at all.
pub(super) fn write(root: &dyn Disk, description: &Description) -> io::Result<()> {
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
