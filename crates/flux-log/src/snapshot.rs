//! Snapshots: one file for each partition with its state up to an index, in chunks.
//!
//! A file has its final name only when it is complete and durable, so a crash leaves the one before.
//! What chunks and `meta` mean is the caller's. Nothing here walks a table or decides when to do so.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
};

use crate::{
    disk::{Disk, File},
    error::LogError,
    fields::Fields,
    reader::Reader,
};

/// The most bytes that one chunk, or `meta`, may hold.
pub const MAX_CHUNK_BYTES: usize = 1 << 30;

const MAGIC: [u8; 8] = *b"FLUXSNP\n";
const FORMAT_VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const CHUNK_HEADER_BYTES: usize = 16;
const FOOTER_BYTES: usize = CHUNK_HEADER_BYTES + 8;
/// In place of a chunk's length: what follows is the footer.
const FOOTER: u32 = u32::MAX;
/// Chunks are gathered to writes of this size.
const WRITE_BYTES: usize = 256 << 10;
/// How the names of files end that are being taken, and that are being received.
const TAKING: &str = ".tmp";
const RECEIVING: &str = ".in";

/// Which snapshot: all of `partition` up to and including `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId {
    /// The partition, a Raft group of this worker.
    pub partition: u16,
    /// Index of the last entry that the snapshot contains.
    pub index: u64,
}

impl SnapshotId {
    /// The name of the file.
    pub fn file_name(&self) -> String {
        format!("snap-{:05}-{:020}", self.partition, self.index)
    }

    fn parse(name: &str) -> Option<SnapshotId> {
        let (partition, index) = name.strip_prefix("snap-")?.split_once('-')?;
        let digits = |text: &str, count| {
            text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(partition, 5) || !digits(index, 20) {
            return None;
        }
        Some(SnapshotId { partition: partition.parse().ok()?, index: index.parse().ok()? })
    }

    /// Where the checksums of its chunks start from, so that a chunk of another file is not valid.
    fn seed(&self) -> u32 {
        let seed = crc32c::crc32c(&self.partition.to_le_bytes());
        crc32c::crc32c_append(seed, &self.index.to_le_bytes())
    }
}

/// Writes a snapshot. Dropped before [`finish`](SnapshotWriter::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct SnapshotWriter {
    disk: Arc<dyn Disk>,
    file: Arc<dyn File>,
    id: SnapshotId,
    /// The file's name until it is complete.
    name: String,
    buffer: Vec<u8>,
    /// Bytes of the file that are written.
    written: u64,
    chunks: u64,
    chunk_bytes: u64,
    finished: bool,
    /// A write or sync failed: what the file holds is unknown, so it can never be finished.
    failed: bool,
}

impl SnapshotWriter {
    /// Begins a snapshot under a temporary name.
    ///
    /// # Errors
    /// [`LogError::Full`], [`LogError::TooLarge`] for `meta`, and what else the disk says.
    pub fn create(
        disk: Arc<dyn Disk>,
        partition: u16,
        index: u64,
        meta: &[u8],
    ) -> Result<SnapshotWriter, LogError> {
        SnapshotWriter::begin(disk, SnapshotId { partition, index }, meta, TAKING)
    }

    /// As [`create`](SnapshotWriter::create), for a snapshot that comes from another node. It has a
    /// temporary name of its own: the partition may be taking a snapshot at the same time, even at the
    /// same index. Whichever finishes last then has its place; both hold the same.
    ///
    /// # Errors
    /// As [`create`](SnapshotWriter::create).
    pub fn receive(
        disk: Arc<dyn Disk>,
        partition: u16,
        index: u64,
        meta: &[u8],
    ) -> Result<SnapshotWriter, LogError> {
        SnapshotWriter::begin(disk, SnapshotId { partition, index }, meta, RECEIVING)
    }

    fn begin(
        disk: Arc<dyn Disk>,
        id: SnapshotId,
        meta: &[u8],
        suffix: &str,
    ) -> Result<SnapshotWriter, LogError> {
        check_length(meta)?;
        let name = id.file_name() + suffix;
        match disk.remove(&name) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(LogError::disk("remove", &name, error));
            }
            _ => {}
        }
        let file = disk.create(&name).map_err(|error| LogError::disk("create", &name, error))?;
        let mut writer = SnapshotWriter {
            disk,
            file,
            id,
            name,
            buffer: header(id, meta),
            written: 0,
            chunks: 0,
            chunk_bytes: 0,
            finished: false,
            failed: false,
        };
        // At once, so that a full disk shows before the table is walked.
        writer.flush()?;
        Ok(writer)
    }

    /// Adds a chunk.
    ///
    /// # Errors
    /// [`LogError::Full`], [`LogError::TooLarge`], and what else the disk says. Drop the writer then.
    pub fn chunk(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        check_length(bytes)?;
        push_chunk(&mut self.buffer, self.id, bytes.len() as u32, self.chunks, bytes);
        self.chunks += 1;
        self.chunk_bytes += bytes.len() as u64;
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    /// Bytes of the file so far.
    pub fn bytes(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Writes and syncs what there is. Called now and then, away from the event loop, it keeps
    /// [`finish`](SnapshotWriter::finish) from pushing all to the disk at once.
    ///
    /// # Errors
    /// As [`chunk`](SnapshotWriter::chunk).
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.flush()?;
        let synced = self.file.sync_data();
        self.checked("sync", synced)
    }

    /// Completes the snapshot, makes it durable, and removes the older ones of the partition.
    ///
    /// # Errors
    /// As [`chunk`](SnapshotWriter::chunk). The older snapshot is untouched unless the new one is
    /// durable. After a failure to remove the older ones the new one counts all the same.
    pub fn finish(mut self) -> Result<SnapshotId, LogError> {
        let total = self.chunk_bytes.to_le_bytes();
        push_chunk(&mut self.buffer, self.id, FOOTER, self.chunks, &total);
        self.sync()?;
        self.disk
            .rename(&self.name, &self.id.file_name())
            .map_err(|error| LogError::disk("rename", &self.name, error))?;
        self.finished = true;
        sync_dir(&*self.disk)?;
        let mut removed = false;
        for id in list_all(&*self.disk)? {
            if id.partition == self.id.partition && id.index < self.id.index {
                match remove(&*self.disk, &id.file_name()) {
                    // Another snapshot of the partition was finished at the same time.
                    Err(LogError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                    other => other?,
                }
                removed = true;
            }
        }
        if removed {
            sync_dir(&*self.disk)?;
        }
        Ok(self.id)
    }

    fn flush(&mut self) -> Result<(), LogError> {
        if self.failed {
            let cause = "an earlier write or sync of this snapshot failed".into();
            return Err(LogError::Poisoned { cause });
        }
        let written = self.file.write_at(&self.buffer, self.written);
        self.checked("write", written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        self.buffer.shrink_to(2 * WRITE_BYTES);
        Ok(())
    }

    /// After a failure the space is given back at once, for the log may need it.
    fn checked(&mut self, action: &'static str, result: io::Result<()>) -> Result<(), LogError> {
        result.map_err(|error| {
            self.failed = true;
            let _ = self.disk.remove(&self.name);
            LogError::disk(action, &self.name, error)
        })
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Else the next `Snapshot::list` does it.
            let _ = self.disk.remove(&self.name);
        }
    }
}

fn check_length(bytes: &[u8]) -> Result<(), LogError> {
    if bytes.len() > MAX_CHUNK_BYTES {
        let (bytes, limit) = (bytes.len() as u64, MAX_CHUNK_BYTES as u64);
        return Err(LogError::TooLarge { bytes, limit });
    }
    Ok(())
}

fn header(id: SnapshotId, meta: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + meta.len() + 8);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&id.index.to_le_bytes());
    bytes.extend_from_slice(&id.partition.to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(&(meta.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(meta);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let crc = crc32c::crc32c(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// `length` is that of `body`, or `FOOTER`.
fn push_chunk(out: &mut Vec<u8>, id: SnapshotId, length: u32, number: u64, body: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(8), 0);
    let crc = crc32c::crc32c_append(id.seed(), &out[start + 4..]);
    out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A snapshot being read.
#[derive(Debug)]
pub struct Snapshot {
    id: SnapshotId,
    meta: Vec<u8>,
    reader: Reader,
    name: String,
    offset: u64,
    chunks: u64,
    chunk_bytes: u64,
    complete: bool,
}

impl Snapshot {
    /// The newest snapshot of each partition, in order of partitions. Removes what unfinished writers
    /// and unfinished removals left behind, so call it at start, before there is any writer.
    ///
    /// # Errors
    /// What the disk says.
    pub fn list(disk: &dyn Disk) -> Result<Vec<SnapshotId>, LogError> {
        for name in names(disk)? {
            let unfinished = name.strip_suffix(TAKING).or(name.strip_suffix(RECEIVING));
            if unfinished.and_then(SnapshotId::parse).is_some() {
                remove(disk, &name)?;
            }
        }
        // A snapshot that was renamed just before a crash may be seen here and still be undone by a
        // power cut, after the log was trimmed for it.
        sync_dir(disk)?;
        let mut ids = list_all(disk)?;
        ids.sort_unstable_by_key(|id| (id.partition, std::cmp::Reverse(id.index)));
        let found = ids.len();
        let mut kept: Vec<SnapshotId> = Vec::with_capacity(found);
        for id in ids {
            if kept.last().is_some_and(|newest| newest.partition == id.partition) {
                remove(disk, &id.file_name())?;
            } else {
                kept.push(id);
            }
        }
        if kept.len() < found {
            // Else a power cut in a later `Snapshot::remove` may leave the older one alone.
            sync_dir(disk)?;
        }
        Ok(kept)
    }

    /// Removes every snapshot of a partition, durably. While it may be undone by a power cut the log
    /// must already say, durably, that what they hold is of no use: see [`State`](crate::State).
    ///
    /// # Errors
    /// What the disk says; some may be gone then.
    pub fn remove(disk: &dyn Disk, partition: u16) -> Result<(), LogError> {
        for id in list_all(disk)? {
            if id.partition == partition {
                remove(disk, &id.file_name())?;
            }
        }
        sync_dir(disk)
    }

    /// Opens a snapshot and reads its header.
    ///
    /// # Errors
    /// [`LogError::Damaged`], [`LogError::UnknownVersion`], and what the disk says.
    pub fn open(disk: &dyn Disk, id: SnapshotId) -> Result<Snapshot, LogError> {
        let name = id.file_name();
        let file = disk.open(&name).map_err(|error| LogError::disk("open", &name, error))?;
        let mut reader = Reader::new(file, &name, Vec::new())?;
        let meta = read_header(&mut reader, &name, id)?;
        let offset = (HEADER_BYTES + meta.len()).next_multiple_of(8) as u64;
        Ok(Snapshot { id, meta, reader, name, offset, chunks: 0, chunk_bytes: 0, complete: false })
    }

    /// Which snapshot this is.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What the writer was given as `meta`.
    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.reader.size()
    }

    /// Bytes of the file that have been read.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// The next chunk. `None` means that all of them were there; until then they are not proven to be
    /// the whole snapshot.
    ///
    /// # Errors
    /// [`LogError::Damaged`] with the offset of the chunk, and what the disk says.
    pub fn next_chunk(&mut self) -> Result<Option<&[u8]>, LogError> {
        if self.complete {
            return Ok(None);
        }
        let at = self.offset;
        let damaged = |reason| LogError::damaged(&self.name, at, reason);
        let mut fields = Fields(self.reader.at(at, CHUNK_HEADER_BYTES)?);
        let parsed = (fields.u32(), fields.u32(), fields.u64());
        let (Some(crc), Some(length), Some(number)) = parsed else {
            return Err(damaged("the snapshot ends before its footer"));
        };
        let footer = length == FOOTER;
        let body = if footer { FOOTER_BYTES - CHUNK_HEADER_BYTES } else { length as usize };
        let whole = (CHUNK_HEADER_BYTES + body).next_multiple_of(8);
        if body > MAX_CHUNK_BYTES || whole as u64 > self.reader.size().saturating_sub(at) {
            return Err(damaged("a chunk of the snapshot is longer than the file"));
        }
        let size = self.reader.size();
        let bytes = self.reader.at(at, whole)?;
        let valid = bytes.len() == whole
            && bytes.get(4..).map(|covered| crc32c::crc32c_append(self.id.seed(), covered))
                == Some(crc);
        if !valid || number != self.chunks {
            return Err(damaged("the checksum of a chunk of the snapshot is wrong"));
        }
        let body = bytes.get(CHUNK_HEADER_BYTES..CHUNK_HEADER_BYTES + body).unwrap_or_default();
        self.offset += whole as u64;
        if footer {
            if Fields(body).u64() != Some(self.chunk_bytes) || self.offset != size {
                return Err(damaged("the footer of the snapshot does not fit its contents"));
            }
            self.complete = true;
            return Ok(None);
        }
        self.chunks += 1;
        self.chunk_bytes += body.len() as u64;
        Ok(Some(body))
    }
}

/// Checks the header and returns `meta`.
fn read_header(reader: &mut Reader, name: &str, id: SnapshotId) -> Result<Vec<u8>, LogError> {
    let damaged = |reason| LogError::damaged(name, 0, reason);
    let size = reader.size();
    let mut fields = Fields(reader.at(0, HEADER_BYTES)?);
    let parsed = (fields.array::<8>(), fields.u32(), fields.u32(), fields.u64(), fields.u16());
    let (Some(magic), Some(version), Some(crc), Some(index), Some(partition)) = parsed else {
        return Err(damaged("the file is too short for a snapshot"));
    };
    let (Some(_), Some(meta_bytes)) = (fields.bytes(6), fields.u32()) else {
        return Err(damaged("the file is too short for a snapshot"));
    };
    if magic != MAGIC {
        return Err(damaged("the file does not begin as a snapshot"));
    }
    let meta_bytes = meta_bytes as usize;
    let whole = (HEADER_BYTES + meta_bytes).next_multiple_of(8);
    if meta_bytes > MAX_CHUNK_BYTES || whole as u64 > size {
        return Err(damaged("the file is too short for the header of the snapshot"));
    }
    let mut bytes = reader.at(0, whole)?.to_vec();
    if let Some(field) = bytes.get_mut(12..16) {
        field.fill(0);
    }
    if crc32c::crc32c(&bytes) != crc {
        return Err(damaged("the checksum of the snapshot header is wrong"));
    }
    if version != FORMAT_VERSION {
        let (file, supported) = (name.to_owned(), FORMAT_VERSION);
        return Err(LogError::UnknownVersion { file, found: version, supported });
    }
    if (SnapshotId { partition, index }) != id {
        return Err(damaged("the header is that of another snapshot; the file was renamed"));
    }
    Ok(bytes.get(HEADER_BYTES..HEADER_BYTES + meta_bytes).unwrap_or_default().to_vec())
}

fn names(disk: &dyn Disk) -> Result<Vec<String>, LogError> {
    disk.list().map_err(|error| LogError::disk("list", "the directory", error))
}

fn list_all(disk: &dyn Disk) -> Result<Vec<SnapshotId>, LogError> {
    Ok(names(disk)?.iter().filter_map(|name| SnapshotId::parse(name)).collect())
}

fn remove(disk: &dyn Disk, name: &str) -> Result<(), LogError> {
    disk.remove(name).map_err(|error| LogError::disk("remove", name, error))
}

fn sync_dir(disk: &dyn Disk) -> Result<(), LogError> {
    disk.sync_dir().map_err(|error| LogError::disk("sync", "the directory", error))
}
