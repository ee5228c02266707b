//! Segment files: their names, their header, and how one comes to be.
//!
//! A segment gets its final name only when the segment before it and its own head are durable. So a
//! segment that exists proves the one before it, and a head that does not read is never a torn write.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    batch::{Batch, BatchKind, MARK_BYTES},
    disk::{Disk, File},
    error::LogError,
    fields::Fields,
    log::LogOptions,
    record::{Record, State},
    sync::{PreparedSegment, SyncGate},
};

pub(crate) const SEGMENT_HEADER_BYTES: usize = 64;
const FORMAT_VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"FLUXLOG\n";
const TEMPORARY_PREFIX: &str = "segment-";
const TEMPORARY_SUFFIX: &str = ".tmp";

/// A segment's file name: its first LSN in 20 digits.
pub(crate) fn file_name(base: u64) -> String {
    format!("{base:020}.log")
}

/// The first LSN that a file name stands for, if it is a segment's.
pub(crate) fn base_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    if digits.len() != 20 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

pub(crate) fn temporary_name(number: u64) -> String {
    format!("{TEMPORARY_PREFIX}{number}{TEMPORARY_SUFFIX}")
}

pub(crate) fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY_PREFIX) && name.ends_with(TEMPORARY_SUFFIX)
}

/// The first bytes of a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentHeader {
    /// LSN of the file's first byte.
    pub base: u64,
    /// Random; mixed into each checksum.
    pub salt: u64,
}

/// Why a segment header does not read.
#[derive(Debug)]
enum HeaderError {
    Invalid(&'static str),
    Version(u32),
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.base.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.salt.to_le_bytes());
        let crc = crc32c::crc32c(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<SegmentHeader, HeaderError> {
        let short = HeaderError::Invalid("the file is too short for a segment header");
        let Some(bytes) = bytes.first_chunk::<SEGMENT_HEADER_BYTES>() else {
            return Err(short);
        };
        let mut fields = Fields(bytes);
        let parsed = (fields.array::<8>(), fields.u32(), fields.u32(), fields.u64(), fields.u64());
        let (Some(magic), Some(version), Some(crc), Some(base), Some(salt)) = parsed else {
            return Err(short);
        };
        if magic != MAGIC {
            return Err(HeaderError::Invalid("the file does not begin as a segment"));
        }
        let mut covered = *bytes;
        covered[12..16].fill(0);
        if crc32c::crc32c(&covered) != crc {
            return Err(HeaderError::Invalid("the checksum of the segment header is wrong"));
        }
        // After the checksum: else a flipped bit would look like a version from the future.
        if version != FORMAT_VERSION {
            return Err(HeaderError::Version(version));
        }
        Ok(SegmentHeader { base, salt })
    }

    /// The header that the file of this name and base begins with.
    pub fn check(bytes: &[u8], name: &str, base: u64) -> Result<SegmentHeader, LogError> {
        let header = match SegmentHeader::decode(bytes) {
            Ok(header) => header,
            Err(HeaderError::Invalid(reason)) => return Err(LogError::damaged(name, 0, reason)),
            Err(HeaderError::Version(found)) => {
                let (file, supported) = (name.to_owned(), FORMAT_VERSION);
                return Err(LogError::UnknownVersion { file, found, supported });
            }
        };
        if header.base != base {
            let reason = "the header is that of another segment; the file was renamed or copied";
            return Err(LogError::damaged(name, 0, reason));
        }
        Ok(header)
    }

    /// Where all checksums of this segment start from.
    pub fn seed(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.salt.to_le_bytes()), &self.base.to_le_bytes())
    }
}

/// Header and head batch of a new segment: all that an older segment could be needed for, except
/// entries.
pub(crate) fn head(header: SegmentHeader, states: &BTreeMap<u16, State>) -> Vec<u8> {
    let mut batch = Batch::new();
    for state in states.values() {
        batch
            .push(&Record::State(*state))
            .expect("65536 states of 48 bytes are less than a batch may hold");
    }
    let lsn = header.base + SEGMENT_HEADER_BYTES as u64;
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(batch.seal(BatchKind::Head, header.seed(), lsn, header.base));
    bytes
}

/// A segment file with valid checksums around a batch body that may be anything: for fuzzing.
pub(crate) fn with_body(body: &[u8]) -> Vec<u8> {
    let header = SegmentHeader { base: 0, salt: 1 };
    let mut bytes = head(header, &BTreeMap::new());
    let mut batch = Batch::from_body(body);
    let lsn = bytes.len() as u64;
    bytes.extend_from_slice(batch.seal(BatchKind::Records, header.seed(), lsn, lsn));
    bytes
}

/// A segment that is full and synced, as far as the log must remember it.
#[derive(Debug)]
pub(crate) struct SealedSegment {
    pub base: u64,
    /// Length of the file.
    pub size: u64,
    /// Highest entry index of each partition that has an entry here, by partition.
    pub highest: Vec<(u16, u64)>,
}

impl SealedSegment {
    /// The partition's entries here count no more.
    pub fn void(&mut self, partition: u16) {
        void(&mut self.highest, partition);
    }
}

/// Takes the partition out of indexes by partition.
pub(crate) fn void(highest: &mut Vec<(u16, u64)>, partition: u16) {
    if let Ok(place) = highest.binary_search_by_key(&partition, |(of, _)| *of) {
        highest.remove(place);
    }
}

/// The segment that batches go to.
#[derive(Debug)]
pub(crate) struct ActiveSegment {
    pub name: String,
    pub header: SegmentHeader,
    pub file: Arc<dyn File>,
    /// Bytes that have blocks of their own, from the start of the file.
    pub capacity: u64,
    /// Highest entry index of each partition that has an entry here.
    pub highest: BTreeMap<u16, u64>,
}

impl ActiveSegment {
    pub fn seal(self) -> SealedSegment {
        SealedSegment {
            base: self.header.base,
            size: self.capacity,
            highest: self.highest.into_iter().collect(),
        }
    }
}

/// Makes a file with `size` bytes of its own under a temporary name. On an error it is gone again.
pub(crate) fn allocate(disk: &dyn Disk, name: &str, size: u64) -> Result<Arc<dyn File>, LogError> {
    let file = disk.create(name).map_err(|error| LogError::disk("create", name, error))?;
    if let Err(error) = file.allocate(size) {
        // Left behind it would only take up space until the next start.
        let _ = disk.remove(name);
        return Err(LogError::disk("allocate", name, error));
    }
    Ok(file)
}

/// Each segment has a salt of its own.
pub(crate) fn salt_of(salt: u64, base: u64) -> u64 {
    // The finaliser of splitmix64, https://prng.di.unimi.it/splitmix64.c
    let mut mixed = salt ^ base.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Gives the blocks back to a segment that lost them, as when it was restored by a tool that leaves
/// out zeros. Returns the bytes that batches may fill; without space, no more than are filled.
pub(crate) fn own_blocks(
    active: &ActiveSegment,
    end: u64,
    segment_bytes: u64,
) -> Result<u64, LogError> {
    let size = active.capacity.max(segment_bytes);
    match active.file.allocate(size).and_then(|()| active.file.sync_data()) {
        Ok(()) => Ok(size),
        Err(error) => match LogError::disk("allocate", &active.name, error) {
            LogError::Full { .. } => Ok(end),
            error => Err(error),
        },
    }
}

pub(crate) fn create_first(
    disk: &dyn Disk,
    options: &LogOptions,
    gate: &SyncGate,
) -> Result<(ActiveSegment, u64), LogError> {
    let header = SegmentHeader { base: 0, salt: salt_of(options.salt, 0) };
    let head = head(header, &BTreeMap::new());
    let size = options.segment_bytes.max((head.len() + MARK_BYTES) as u64);
    let name = temporary_name(0);
    let file = allocate(disk, &name, size)?;
    let next = PreparedSegment { file, name, size };
    let active = install(disk, gate, next, header, &head)?;
    Ok((active, head.len() as u64))
}

/// Turns an allocated file into the segment that `head` begins. An error that is `Full` has left
/// nothing behind; after any other the disk may or may not have the segment.
pub(crate) fn install(
    disk: &dyn Disk,
    gate: &SyncGate,
    next: PreparedSegment,
    header: SegmentHeader,
    head: &[u8],
) -> Result<ActiveSegment, LogError> {
    let PreparedSegment { file, name: temporary, size } = next;
    let name = file_name(header.base);
    let written = file
        .write_at(head, 0)
        .map_err(|error| LogError::disk("write", &temporary, error))
        .and_then(|()| {
            gate.sync(&temporary, &*file).map_err(|error| LogError::io("sync", &temporary, error))
        })
        .and_then(|()| {
            disk.rename(&temporary, &name)
                .map_err(|error| LogError::disk("rename", &temporary, error))
        });
    if let Err(error) = written {
        // It is no segment yet; at worst the next start removes it.
        let _ = disk.remove(&temporary);
        return Err(error);
    }
    disk.sync_dir().map_err(|error| LogError::io("sync the directory of", &name, error))?;
    let highest = BTreeMap::new();
    Ok(ActiveSegment { name, header, file, capacity: size, highest })
}
