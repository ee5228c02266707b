//! Reads the segments back at start: visits every record, decides what damage means, cuts a torn tail.
//!
//! It never skips: what it visits is exactly what was written, from the oldest segment on, up to
//! where it stops. Where it stops short of the end, either nothing shows that the rest had ever been
//! durable, and the rest is cut, or something does, and it refuses.

use std::{collections::BTreeMap, io::ErrorKind, ops::ControlFlow, sync::Arc};

use crate::{
    batch::{BatchHeader, BatchKind},
    disk::{Disk, File},
    error::LogError,
    reader::{Found, Reader},
    record::{Record, State},
    segment::{self, ActiveSegment, SEGMENT_HEADER_BYTES, SealedSegment, SegmentHeader},
};

const PROGRESS_BYTES: u64 = 16 << 20;

/// LSNs above this cannot have been reached; below it, sums with file offsets cannot overflow.
const MAX_BASE: u64 = 1 << 62;

/// How far a recovery has come, in bytes of segment files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read.
    pub done: u64,
    /// Bytes to read.
    pub total: u64,
}

/// What a recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Segments read; 0 for a log that is new.
    pub segments: usize,
    /// Records visited.
    pub records: u64,
    /// Bytes of valid batches and headers.
    pub bytes: u64,
    /// The log ended with the mark of a clean close.
    pub clean: bool,
    /// What was cut off at the end, never having been known to be durable.
    pub cut: Option<Cut>,
}

/// A torn tail that was overwritten with zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Name of the segment file.
    pub file: String,
    /// Where in the file it began.
    pub offset: u64,
    /// Up to its last byte that was not zero.
    pub bytes: u64,
}

/// What the log goes on from.
pub(crate) struct Recovered {
    pub sealed: Vec<SealedSegment>,
    /// The last segment and the offset where its batches end; `None` if there was no segment.
    pub last: Option<(ActiveSegment, u64)>,
    pub states: BTreeMap<u16, State>,
    pub report: RecoveryReport,
}

struct Recovery<'a> {
    disk: &'a dyn Disk,
    visit: &'a mut dyn FnMut(Record<'_>),
    progress: &'a mut dyn FnMut(Progress),
    shown: Progress,
    states: BTreeMap<u16, State>,
    sealed: Vec<SealedSegment>,
    /// Highest entry index of each partition in the segment being read.
    highest: BTreeMap<u16, u64>,
    /// The highest LSN that any batch said to be durable.
    synced: u64,
    report: RecoveryReport,
    buffer: Vec<u8>,
}

/// Reads the log on `disk`, and leaves it such that a second reading finds the same and no tail.
pub(crate) fn recover(
    disk: &dyn Disk,
    visit: &mut dyn FnMut(Record<'_>),
    progress: &mut dyn FnMut(Progress),
) -> Result<Recovered, LogError> {
    let bases = list_segments(disk)?;
    let mut total = 0;
    let mut files = Vec::with_capacity(bases.len());
    for base in &bases {
        let name = segment::file_name(*base);
        let file = disk.open(&name).map_err(|error| LogError::disk("open", &name, error))?;
        total += file.size().map_err(|error| LogError::disk("read", &name, error))?;
        files.push((name, *base, file));
    }
    let mut recovery = Recovery {
        disk,
        visit,
        progress,
        shown: Progress { done: 0, total },
        states: BTreeMap::new(),
        sealed: Vec::new(),
        highest: BTreeMap::new(),
        synced: 0,
        report: RecoveryReport { segments: files.len(), ..RecoveryReport::default() },
        buffer: Vec::new(),
    };
    let mut last = None;
    for (place, (name, base, file)) in files.into_iter().enumerate() {
        match bases.get(place + 1) {
            Some(next) => {
                let segment = recovery.sealed(&name, base, file, *next)?;
                recovery.sealed.push(segment);
            }
            None => last = Some(recovery.last(name, base, file)?),
        }
    }
    recovery.show(total);
    let Recovery { states, sealed, report, .. } = recovery;
    Ok(Recovered { sealed, last, states, report })
}

/// The bases of all segments in order. Segments that a crash kept from being finished are removed.
fn list_segments(disk: &dyn Disk) -> Result<Vec<u64>, LogError> {
    let names = disk.list().map_err(|error| LogError::disk("list", "the directory", error))?;
    let mut bases = Vec::new();
    for name in names {
        if segment::is_temporary(&name) {
            match disk.remove(&name) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(LogError::disk("remove", &name, error));
                }
                _ => {}
            }
        } else if let Some(base) = segment::base_of(&name) {
            if base > MAX_BASE {
                return Err(LogError::damaged(&name, 0, "no log gets as long as its name says"));
            }
            bases.push(base);
        }
    }
    bases.sort_unstable();
    Ok(bases)
}

impl Recovery<'_> {
    /// Reads a segment that has a successor, which proves that all of it had been durable.
    fn sealed(
        &mut self,
        name: &str,
        base: u64,
        file: Arc<dyn File>,
        next: u64,
    ) -> Result<SealedSegment, LogError> {
        let (mut reader, header) = self.open(name, base, file)?;
        let size = reader.size();
        let mut offset = SEGMENT_HEADER_BYTES as u64;
        while base + offset < next {
            let Some((_, length)) = self.batch(&mut reader, name, header, offset)? else {
                let reason = "what was written here up to the next segment is missing or changed";
                return Err(LogError::damaged(name, offset, reason));
            };
            offset += length;
        }
        if base + offset != next {
            let reason = "the next segment begins before the end of this one";
            return Err(LogError::damaged(name, offset, reason));
        }
        self.finish(reader);
        self.report.bytes += offset;
        let highest = std::mem::take(&mut self.highest).into_iter().collect();
        Ok(SealedSegment { base, size, highest })
    }

    /// Reads the segment that the log ends in, and cuts a torn tail off it.
    fn last(
        &mut self,
        name: String,
        base: u64,
        file: Arc<dyn File>,
    ) -> Result<(ActiveSegment, u64), LogError> {
        let (mut reader, header) = self.open(&name, base, file.clone())?;
        let capacity = reader.size();
        let mut offset = SEGMENT_HEADER_BYTES as u64;
        while let Some((kind, length)) = self.batch(&mut reader, &name, header, offset)? {
            offset += length;
            self.report.clean = kind == BatchKind::Mark;
        }
        let tail = reader.tail(base, header.seed(), offset)?;
        if tail.had_been_synced {
            let reason = "a later part of the log says that what was written here had been synced";
            return Err(LogError::damaged(&name, offset, reason));
        }
        self.finish(reader);
        self.report.bytes += offset;
        if tail.end > offset {
            self.report.clean = false;
            self.report.cut = Some(Cut { file: name.clone(), offset, bytes: tail.end - offset });
            erase(&*file, offset, tail.end).map_err(|e| LogError::disk("write", &name, e))?;
        }
        let unproven = self.synced.max(base) - base;
        self.rewrite(&*file, unproven, offset)
            .and_then(|()| file.sync_data())
            .and_then(|()| self.disk.sync_dir())
            .map_err(|error| LogError::disk("write", &name, error))?;
        let highest = std::mem::take(&mut self.highest);
        Ok((ActiveSegment { name, header, file, capacity, highest }, offset))
    }

    fn open(
        &mut self,
        name: &str,
        base: u64,
        file: Arc<dyn File>,
    ) -> Result<(Reader, SegmentHeader), LogError> {
        let mut reader = Reader::new(file, name, std::mem::take(&mut self.buffer))?;
        let header = SegmentHeader::check(reader.at(0, SEGMENT_HEADER_BYTES)?, name, base)?;
        // The head was synced before the file got its name, so it cannot be torn.
        let head = SEGMENT_HEADER_BYTES as u64;
        match reader.batch(base, header.seed(), head)? {
            Found::Batch(BatchHeader { kind: BatchKind::Head, .. }, _) => Ok((reader, header)),
            _ => Err(LogError::damaged(name, head, "the first batch of the segment is not valid")),
        }
    }

    fn finish(&mut self, reader: Reader) {
        let done = self.shown.done + reader.size();
        self.shown.done = done;
        self.buffer = reader.into_buffer();
    }

    /// Visits the batch at `offset`; `None` if there is no valid one.
    fn batch(
        &mut self,
        reader: &mut Reader,
        name: &str,
        segment: SegmentHeader,
        offset: u64,
    ) -> Result<Option<(BatchKind, u64)>, LogError> {
        let (header, body) = match reader.batch(segment.base, segment.seed(), offset)? {
            Found::Batch(header, body) => (header, body),
            Found::Nothing | Found::Invalid => return Ok(None),
        };
        self.synced = self.synced.max(header.synced);
        // A head repeats what was visited before, unless the segments before it are gone.
        let visible = header.kind == BatchKind::Records || self.report.bytes == 0;
        // It never breaks.
        let _ = header.records(body, name, offset, &mut |record| {
            self.record(record, visible);
            ControlFlow::Continue(())
        })?;
        let length = header.len();
        let end = offset + length;
        if offset / PROGRESS_BYTES != end / PROGRESS_BYTES {
            self.show(self.shown.done + end);
        }
        Ok(Some((header.kind, length)))
    }

    fn record(&mut self, record: Record<'_>, visible: bool) {
        match &record {
            Record::Entry(entry) => {
                let highest = self.highest.entry(entry.partition).or_default();
                *highest = entry.index.max(*highest);
            }
            Record::State(state) => {
                let previous = self.states.insert(state.partition, *state);
                if state.resets(previous.as_ref()) {
                    self.highest.remove(&state.partition);
                    self.sealed.iter_mut().for_each(|segment| segment.void(state.partition));
                }
            }
        }
        if visible {
            self.report.records += 1;
            (self.visit)(record);
        }
    }

    fn show(&mut self, done: u64) {
        let total = self.shown.total;
        (self.progress)(Progress { done: done.min(total), total });
    }

    /// Writes what is there once more: if a sync failed before the restart, the kernel may hold bytes
    /// as clean that never reached the disk, and a sync alone would not write them.
    fn rewrite(&mut self, file: &dyn File, from: u64, to: u64) -> std::io::Result<()> {
        self.buffer.resize(1 << 16, 0);
        let mut at = from;
        while at < to {
            let want = (to - at).min(self.buffer.len() as u64) as usize;
            let count = file.read_at(&mut self.buffer[..want], at)?;
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            file.write_at(&self.buffer[..count], at)?;
            at += count as u64;
        }
        Ok(())
    }
}

/// Zeros and not a shorter file: a crash half-way leaves a tail that is cut again.
fn erase(file: &dyn File, from: u64, to: u64) -> std::io::Result<()> {
    const ZEROS: &[u8] = &[0; 1 << 16];
    let mut at = from;
    while at < to {
        let count = (to - at).min(ZEROS.len() as u64);
        file.write_at(&ZEROS[..count as usize], at)?;
        at += count;
    }
    Ok(())
}
