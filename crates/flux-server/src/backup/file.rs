//! Reads the file of one partition.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flux_core::replica::SnapshotMeta;
use flux_core::store::{ChunkEntries, ChunkError};
use flux_log::{Disk, File, LogError, Snapshot, SnapshotId};
use std::os::unix::fs::FileExt as _;

use super::manifest::PartitionRecord;

/// Bytes that are read at a time for the checksum.
const PIECE_BYTES: usize = 256 * 1024;

/// A key of a backup, with what is written of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Its value.
    pub value: &'a [u8],
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<u64>,
}

/// The file of a partition, being read.
#[derive(Debug)]
pub struct PartitionFile {
    path: PathBuf,
    snapshot: Snapshot,
    revision: u64,
}

/// Why a partition's file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is not there.
    #[error("{0} is missing, which the backup's description names")]
    Missing(PathBuf),
    /// It is not as it was written.
    #[error("{path} is not as it was written: {reason}")]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// Its checksum is right, and its contents are not.
    #[error("{path} is no snapshot of this version")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: LogError,
    },
    /// The same, in what it says of itself.
    #[error("{0} does not say which revision it is of: it is no snapshot of this version")]
    Meta(PathBuf),
    /// The same, in one of its entries.
    #[error("{path} has an entry that is none")]
    Entry {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ChunkError,
    },
    /// The disk.
    #[error("cannot read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl PartitionFile {
    /// Opens the snapshot of a partition up to an index.
    ///
    /// # Errors
    /// It is not there, cannot be read, or is another one.
    pub fn open(path: &Path, partition: u16, index: u64) -> Result<PartitionFile, FileError> {
        let owned = || path.to_owned();
        let disk = OneFile { path: owned() };
        let opened = Snapshot::open(&disk, SnapshotId { partition, index });
        let snapshot = opened.map_err(|error| match error {
            LogError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                FileError::Missing(owned())
            }
            source => FileError::Snapshot { path: owned(), source },
        })?;
        let meta = SnapshotMeta::decode(snapshot.meta()).ok_or_else(|| FileError::Meta(owned()))?;
        Ok(PartitionFile { path: owned(), snapshot, revision: meta.revision })
    }

    /// The last revision that is in it.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Bytes that have been read.
    pub fn position(&self) -> u64 {
        self.snapshot.position()
    }

    /// Visits the next keys, some hundreds or one that is large. False if there were no more, and the
    /// file is whole.
    ///
    /// # Errors
    /// What is wrong with the file. The keys before it were visited.
    pub fn next(&mut self, mut visit: impl FnMut(Pair<'_>)) -> Result<bool, FileError> {
        let chunk = self
            .snapshot
            .next_chunk()
            .map_err(|source| FileError::Snapshot { path: self.path.clone(), source })?;
        let Some(chunk) = chunk else { return Ok(false) };
        for entry in ChunkEntries::new(chunk) {
            let entry =
                entry.map_err(|source| FileError::Entry { path: self.path.clone(), source })?;
            let (key, value, expires_at_ms) = (entry.key, entry.value, entry.expires_at_ms);
            visit(Pair { key, value, expires_at_ms });
        }
        Ok(true)
    }

    /// Reads all of a file and describes it: the record of the manifest.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn describe(path: &Path, partition: u16, index: u64) -> Result<PartitionRecord, FileError> {
        let (bytes, crc32c) = checksum(path)?;
        let mut file = PartitionFile::open(path, partition, index)?;
        let mut keys = 0;
        while file.next(|_| keys += 1)? {}
        let revision = file.revision();
        Ok(PartitionRecord { partition, index, revision, keys, bytes, crc32c })
    }

    /// Checks that the file of a backup in this folder is as the manifest says.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(folder: &Path, record: &PartitionRecord) -> Result<(), FileError> {
        let path = folder.join(PartitionRecord::file_name(record.partition));
        let changed = |reason| Err(FileError::Changed { path: path.clone(), reason });
        let (bytes, crc32c) = checksum(&path)?;
        if bytes != record.bytes {
            return changed(format!("it has {bytes} bytes and had {}", record.bytes));
        }
        if crc32c != record.crc32c {
            let expected = record.crc32c;
            return changed(format!("its checksum is {crc32c:08x} and was {expected:08x}"));
        }
        let found = PartitionFile::describe(&path, record.partition, record.index)?;
        if found != *record {
            return changed(format!(
                "it holds {} keys up to revision {}, and the backup's description says {} up to {}",
                found.keys, found.revision, record.keys, record.revision
            ));
        }
        Ok(())
    }
}

/// The length of a file and the CRC32C of all of it.
fn checksum(path: &Path) -> Result<(u64, u32), FileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => FileError::Missing(path.to_owned()),
        _ => FileError::Io { path: path.to_owned(), source },
    };
    let mut file = fs::File::open(path).map_err(failed)?;
    let (mut bytes, mut crc, mut piece) = (0, 0, vec![0; PIECE_BYTES]);
    loop {
        let count = io::Read::read(&mut file, &mut piece).map_err(failed)?;
        if count == 0 {
            return Ok((bytes, crc));
        }
        bytes += count as u64;
        crc = crc32c::crc32c_append(crc, &piece[..count]);
    }
}

/// One file that cannot be written, whatever name it is asked for by: snapshots are read from disks.
#[derive(Debug)]
struct OneFile {
    path: PathBuf,
}

impl Disk for OneFile {
    fn create(&self, _: &str) -> io::Result<Arc<dyn File>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn open(&self, _: &str) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(ReadOnly(fs::File::open(&self.path)?)))
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync_dir(&self) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[derive(Debug)]
struct ReadOnly(fs::File);

impl File for ReadOnly {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.0.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use flux_core::store::{Entry, encode_entry};
    use flux_log::{FileDisk, SnapshotWriter};

    use super::*;

    const INDEX: u64 = 40;

    /// A folder with the file of partition 2, which has three keys in two chunks.
    fn backup() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let made = tempfile::tempdir().expect("a folder");
        let disk = Arc::new(FileDisk::open(made.path()).expect("a disk"));
        let meta = SnapshotMeta { revision: 31, ..SnapshotMeta::founding(vec![1, 2, 3]) };
        let mut writer =
            SnapshotWriter::create(disk, 2, INDEX, &meta.encode()).expect("a snapshot");
        for (keys, expires_at_ms) in [(&["a", "bb"][..], None), (&["c"], Some(77))] {
            let mut chunk = Vec::new();
            for key in keys {
                let (key, value) = (key.as_bytes(), &[b'v'; 300][..]);
                let entry = Entry { key, value, version: 3, expires_at_ms, written_at_s: 1 };
                encode_entry(&entry, &mut chunk);
            }
            writer.chunk(&chunk).expect("written");
        }
        let id = writer.finish().expect("finished");
        let path = folder.path().join(PartitionRecord::file_name(2));
        fs::copy(made.path().join(id.file_name()), &path).expect("copied");
        (folder, path)
    }

    #[test]
    fn a_file_gives_its_keys_and_is_as_described() {
        let (folder, path) = backup();
        let record = PartitionFile::describe(&path, 2, INDEX).expect("a snapshot");
        assert_eq!(
            (record.partition, record.index, record.revision, record.keys),
            (2, INDEX, 31, 3)
        );
        PartitionFile::check(folder.path(), &record).expect("as it was written");
        let mut file = PartitionFile::open(&path, 2, INDEX).expect("a snapshot");
        let mut pairs = Vec::new();
        while file
            .next(|pair| pairs.push((pair.key.to_vec(), pair.value.len(), pair.expires_at_ms)))
            .expect("whole")
        {}
        let expected = [
            (b"a".to_vec(), 300, None),
            (b"bb".to_vec(), 300, None),
            (b"c".to_vec(), 300, Some(77)),
        ];
        assert_eq!(pairs, expected);
        assert_eq!(file.position(), record.bytes);
    }

    #[test]
    fn every_changed_byte_and_every_lost_end_is_noticed() {
        let (folder, path) = backup();
        let record = PartitionFile::describe(&path, 2, INDEX).expect("a snapshot");
        let whole = fs::read(&path).expect("the file");
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            fs::write(&path, &changed).expect("written");
            let error = PartitionFile::check(folder.path(), &record).expect_err("changed");
            assert!(matches!(error, FileError::Changed { .. }), "byte {at}: {error}");
            // Without the checksum of the whole, too, nothing else is read than what was written.
            let unchecked = PartitionFile::describe(&path, 2, INDEX);
            assert!(unchecked.is_err(), "byte {at}");
        }
        for length in [0, 10, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("written");
            let error = PartitionFile::check(folder.path(), &record).expect_err("cut");
            assert!(error.to_string().contains(&format!("{length} bytes")), "{error}");
        }
        fs::remove_file(&path).expect("removed");
        let error = PartitionFile::check(folder.path(), &record).expect_err("gone");
        assert!(matches!(error, FileError::Missing(_)), "{error}");
    }

    #[test]
    fn the_file_of_another_partition_or_moment_is_refused() {
        let (_folder, path) = backup();
        for (partition, index) in [(3, INDEX), (2, INDEX + 1)] {
            let error = PartitionFile::open(&path, partition, index).expect_err("another one");
            assert!(matches!(error, FileError::Snapshot { .. }), "{error}");
        }
    }

    #[test]
    fn a_description_that_does_not_fit_its_file_is_told() {
        let (folder, path) = backup();
        let record = PartitionFile::describe(&path, 2, INDEX).expect("a snapshot");
        let other = PartitionRecord { keys: 4, ..record };
        let error = PartitionFile::check(folder.path(), &other).expect_err("another count");
        assert!(error.to_string().contains("3 keys"), "{error}");
    }
}
