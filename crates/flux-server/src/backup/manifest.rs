//! `backup.json`: what is in a backup, and how it is told whether that is still so.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

/// The name of the file.
pub const MANIFEST: &str = "backup.json";

const KIND: &str = "flux-kv backup";
const FORMAT: u32 = 1;
/// No manifest is as long: one of 16384 partitions is a tenth of it.
const MAX_BYTES: u64 = 64 << 20;

/// What a backup consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    kind: String,
    format: u32,
    /// When the first partition was asked for, in milliseconds since the Unix epoch.
    pub begun_ms: u64,
    /// When the last one was there.
    pub ended_ms: u64,
    /// The cluster, in hexadecimal; none for a node alone.
    pub cluster_id: Option<String>,
    /// The node that told who leads.
    pub node: String,
    /// The version of its program.
    pub version: String,
    /// Every partition, in order.
    pub partitions: Vec<PartitionRecord>,
}

/// One partition's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionRecord {
    /// The partition.
    pub partition: u16,
    /// The last entry of its log that is in the file.
    pub index: u64,
    /// The last revision that is in it.
    pub revision: u64,
    /// Keys in it, those that have expired and were not removed yet among them.
    pub keys: u64,
    /// The length of the file.
    pub bytes: u64,
    /// CRC32C of the whole file.
    pub crc32c: u32,
}

/// Why a folder is not a backup that can be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is no such folder.
    #[error("there is no folder {0}")]
    NoFolder(PathBuf),
    /// There is no manifest in it.
    #[error(
        "{0} is not a backup, or one that was not finished: there is no {MANIFEST} in it, which is written last"
    )]
    NoBackup(PathBuf),
    /// It is not one of ours, or damaged.
    #[error("{path} is not the description of a backup: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The disk.
    #[error("cannot read {path}")]
    Io {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Manifest {
    /// A manifest of nothing yet.
    pub fn new(
        begun_ms: u64,
        cluster_id: Option<String>,
        node: String,
        version: String,
    ) -> Manifest {
        Manifest {
            kind: KIND.to_owned(),
            format: FORMAT,
            begun_ms,
            ended_ms: begun_ms,
            cluster_id,
            node,
            version,
            partitions: Vec::new(),
        }
    }

    /// Reads the manifest of the backup in a folder.
    ///
    /// # Errors
    /// There is none, or none that this version understands.
    pub fn read(folder: &Path) -> Result<Manifest, ManifestError> {
        let path = folder.join(MANIFEST);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ManifestError::Io { path, source }
        };
        match fs::metadata(folder) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(ManifestError::NoFolder(folder.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::NoFolder(folder.to_owned()));
            }
            Err(error) => return Err(failed(folder)(error)),
        }
        let unreadable = |reason| ManifestError::Unreadable { path: path.clone(), reason };
        let length = match fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::NoBackup(folder.to_owned()));
            }
            Err(error) => return Err(failed(&path)(error)),
        };
        if length > MAX_BYTES {
            return Err(unreadable(format!("it has {length} bytes")));
        }
        let bytes = fs::read(&path).map_err(failed(&path))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))?;
        manifest.check().map_err(unreadable)?;
        Ok(manifest)
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("plain fields");
        bytes.push(b'\n');
        bytes
    }

    /// Keys in all files.
    pub fn keys(&self) -> u64 {
        self.partitions.iter().map(|one| one.keys).sum()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.partitions.iter().map(|one| one.bytes).sum()
    }

    fn check(&self) -> Result<(), String> {
        if self.kind != KIND {
            return Err(format!("it is of kind {:?}, not {KIND:?}", self.kind));
        }
        if self.format != FORMAT {
            return Err(format!(
                "it has format {}, and this version reads format {FORMAT}",
                self.format
            ));
        }
        let in_order =
            self.partitions.iter().zip(0..).all(|(record, number)| record.partition == number);
        if !in_order || !self.partitions.len().is_power_of_two() || self.partitions.len() > 16384 {
            return Err("its partitions are not complete".to_owned());
        }
        // They are summed up, and no cluster has as many.
        let limit = u64::MAX / 16384;
        if self.partitions.iter().any(|one| one.keys > limit || one.bytes > limit) {
            return Err("a partition has more keys or bytes than can be".to_owned());
        }
        Ok(())
    }
}

impl PartitionRecord {
    /// The name of a partition's file.
    pub fn file_name(partition: u16) -> String {
        format!("{partition}.snapshot")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(count: u16) -> Manifest {
        let mut manifest = Manifest::new(1, Some("00ff".into()), "node-1".into(), "0.1.0".into());
        let record = |partition| PartitionRecord {
            partition,
            index: 7,
            revision: 5,
            keys: 3,
            bytes: 100,
            crc32c: 9,
        };
        manifest.partitions = (0..count).map(record).collect();
        manifest
    }

    fn read_back(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(MANIFEST), bytes).expect("a file");
        Manifest::read(folder.path())
    }

    #[test]
    fn what_is_written_is_read() {
        let written = manifest(4);
        assert_eq!(read_back(&written.encode()).expect("a manifest"), written);
        assert_eq!((written.keys(), written.bytes()), (12, 400));
    }

    #[test]
    fn every_kind_of_folder_that_is_no_backup_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Manifest::read(&folder.path().join("none")).expect_err("nothing there");
        assert!(matches!(error, ManifestError::NoFolder(_)), "{error}");
        let error = Manifest::read(folder.path()).expect_err("an empty folder");
        assert!(matches!(error, ManifestError::NoBackup(_)), "{error}");
        let file = folder.path().join("file");
        fs::write(&file, "x").expect("a file");
        assert!(matches!(Manifest::read(&file), Err(ManifestError::NoFolder(_))));
    }

    #[test]
    fn what_is_not_a_manifest_of_this_version_is_refused() {
        let unreadable = |bytes: &[u8]| match read_back(bytes) {
            Err(error @ ManifestError::Unreadable { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        };
        unreadable(b"");
        unreadable(b"{}");
        let cut = manifest(4).encode();
        unreadable(&cut[..cut.len() - 3]);
        assert!(unreadable(&manifest(3).encode()).contains("not complete"));
        assert!(unreadable(&manifest(0).encode()).contains("not complete"));
        let newer = Manifest { format: 2, ..manifest(1) };
        assert!(unreadable(&newer.encode()).contains("format 2"));
        let other = Manifest { kind: "photo".into(), ..manifest(1) };
        assert!(unreadable(&other.encode()).contains("photo"));
        let mut huge = manifest(1);
        huge.partitions[0].keys = u64::MAX;
        assert!(unreadable(&huge.encode()).contains("than can be"));
    }
}
