//! Reading the log back while it is written, on any thread.
//!
//! The log publishes in a catalog which segments there are and how far it has written; a reader takes
//! both from there and the bytes from the files. It visits what a recovery would visit, no more and no
//! less, up to what was written when it began. It waits for nothing, keeps nothing from being trimmed,
//! and draws no conclusion from what it reads: which entries count is the caller's to say.

use std::{
    collections::VecDeque,
    io,
    ops::ControlFlow,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    batch::{BATCH_HEADER_BYTES, BatchHeader, BatchKind},
    disk::{Disk, File},
    error::LogError,
    log::Lsn,
    reader::{Found, Reader},
    record::Record,
    segment::{self, SEGMENT_HEADER_BYTES, SealedSegment, SegmentHeader},
};

/// A segment, as a reader may know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// LSN of its first byte, where a scan of it begins.
    pub base: Lsn,
    /// Highest entry index of each partition that has an entry here which no durable reset voids, by
    /// partition. `None` for the segment that is being written.
    pub highest: Option<Vec<(u16, u64)>>,
}

/// How far a scan has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scanned {
    /// To the end of what was written when it began: go on from here when there is more.
    End(Lsn),
    /// Until it was stopped, in the batch at this LSN: to go on from here visits all of that again.
    Stopped(Lsn),
    /// What comes next has been trimmed, perhaps during the scan, after some records were visited. The
    /// log now begins here.
    Gone {
        /// Base of the oldest segment.
        oldest: Lsn,
    },
}

/// Reads a [`Log`](crate::Log) from any thread, at the same time as it is written. Clones are cheap.
///
/// One that outlives its log still reads what was written, until another log on the same disk changes
/// the files.
#[derive(Clone, Debug)]
pub struct LogReader {
    disk: Arc<dyn Disk>,
    catalog: Arc<Catalog>,
}

impl LogReader {
    pub(crate) fn new(disk: Arc<dyn Disk>, catalog: Arc<Catalog>) -> LogReader {
        LogReader { disk, catalog }
    }

    /// Gives the records from `from` on, in order, each with the LSN of its batch, to `visit` until
    /// that breaks or all that was written when the scan began is visited: written, not synced.
    ///
    /// `from` is the LSN of a batch; if there is no batch at it, the scan begins with the segment that
    /// it lies in. The first records may be states repeated from earlier segments, as in
    /// [`Log::open`](crate::Log::open). From the end on, or beyond, there is nothing to visit.
    ///
    /// # Errors
    /// [`LogError::Damaged`] names the file and offset of what is not as it was written; all before it
    /// has been visited. Also what the disk says. The log itself takes no harm.
    pub fn scan(
        &self,
        from: Lsn,
        visit: &mut dyn FnMut(Lsn, Record<'_>) -> ControlFlow<()>,
    ) -> Result<Scanned, LogError> {
        // Read before the segments: each batch up to here is whole, and in a segment that is listed.
        let end = self.catalog.written();
        let mut scan = Scan { first: true, buffer: Vec::new(), visit };
        let mut at = from;
        while at < end {
            let segment = match self.catalog.open(&*self.disk, at)? {
                Ok(segment) => segment,
                Err(oldest) => return Ok(Scanned::Gone { oldest }),
            };
            let segment_end = segment.next.map_or(end, |next| next.min(end));
            if let ControlFlow::Break(stopped) = scan.segment(segment, at, segment_end)? {
                return Ok(Scanned::Stopped(stopped));
            }
            at = segment_end;
        }
        Ok(Scanned::End(end))
    }

    /// The segments there are, from the oldest to the one that is being written.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        self.catalog.segments().iter().cloned().collect()
    }

    /// Up to where the log is written: where a scan that began now would end.
    pub fn written(&self) -> Lsn {
        self.catalog.written()
    }
}

struct Scan<'a> {
    /// Nothing has been visited: the states that a segment begins with are not yet repetitions.
    first: bool,
    buffer: Vec<u8>,
    visit: &'a mut dyn FnMut(Lsn, Record<'_>) -> ControlFlow<()>,
}

impl Scan<'_> {
    /// Visits the batches of the segment from `from` to `end`; breaks with the LSN of the batch in
    /// which `visit` did.
    fn segment(
        &mut self,
        segment: OpenSegment,
        from: Lsn,
        end: Lsn,
    ) -> Result<ControlFlow<Lsn>, LogError> {
        let OpenSegment { base, name, file, .. } = segment;
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let count =
            file.read_at(&mut bytes, 0).map_err(|error| LogError::disk("read", &name, error))?;
        let header = SegmentHeader::check(&bytes[..count], &name, base)?;
        let seed = header.seed();
        let buffer = std::mem::take(&mut self.buffer);
        let mut reader = Reader::up_to(end - base, file, &name, buffer)?;
        let mut offset = from - base;
        if BatchHeader::decode(reader.at(offset, BATCH_HEADER_BYTES)?, seed, from).is_none() {
            offset = SEGMENT_HEADER_BYTES as u64;
        }
        while base + offset < end {
            let Found::Batch(batch, body) = reader.batch(base, seed, offset)? else {
                let reason = "what was written here is missing or changed";
                return Err(LogError::damaged(&name, offset, reason));
            };
            let lsn = base + offset;
            // Later heads repeat what was visited before.
            if batch.kind == BatchKind::Records || self.first {
                let visit = &mut *self.visit;
                let visited =
                    batch.records(body, &name, offset, &mut |record| visit(lsn, record))?;
                if visited.is_break() {
                    return Ok(ControlFlow::Break(lsn));
                }
            }
            self.first = false;
            offset += batch.len();
        }
        self.buffer = reader.into_buffer();
        Ok(ControlFlow::Continue(()))
    }
}

/// What a log lets its readers know. A segment is listed as long as its file has its name.
#[derive(Debug)]
pub(crate) struct Catalog {
    /// By base; the last one is being written.
    segments: Mutex<VecDeque<SegmentInfo>>,
    written: AtomicU64,
}

/// A segment whose file stays readable, though it may be removed meanwhile.
struct OpenSegment {
    base: Lsn,
    name: String,
    file: Arc<dyn File>,
    /// Base of the segment after it.
    next: Option<Lsn>,
}

impl Catalog {
    pub fn new(sealed: &VecDeque<SealedSegment>, active: Lsn, written: Lsn) -> Catalog {
        let sealed = sealed
            .iter()
            .map(|one| SegmentInfo { base: one.base, highest: Some(one.highest.clone()) });
        let active = SegmentInfo { base: active, highest: None };
        let segments = Mutex::new(sealed.chain([active]).collect());
        Catalog { segments, written: AtomicU64::new(written) }
    }

    /// All before this LSN is in the files.
    pub fn wrote(&self, lsn: Lsn) {
        // Whoever sees the number also sees the segment that it lies in.
        self.written.store(lsn, Ordering::Release);
    }

    /// The segment that was being written is sealed, and the next one has its name.
    pub fn begin(&self, sealed: &SealedSegment, base: Lsn) {
        let mut segments = self.segments();
        if let Some(last) = segments.back_mut() {
            last.highest = Some(sealed.highest.clone());
        }
        segments.push_back(SegmentInfo { base, highest: None });
    }

    /// Takes the oldest segment off the list if `remove` removes its file.
    pub fn remove_oldest(&self, remove: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Under the lock, so that what is listed can be opened.
        let mut segments = self.segments();
        remove()?;
        segments.pop_front();
        Ok(())
    }

    /// The partition's entries in the sealed segments count no more.
    pub fn void(&self, partition: u16) {
        for highest in self.segments().iter_mut().filter_map(|one| one.highest.as_mut()) {
            segment::void(highest, partition);
        }
    }

    fn written(&self) -> Lsn {
        self.written.load(Ordering::Acquire)
    }

    /// Opens the segment in which `at` lies; `Err` with the oldest one's base if that has gone.
    fn open(&self, disk: &dyn Disk, at: Lsn) -> Result<Result<OpenSegment, Lsn>, LogError> {
        let segments = self.segments();
        let next = segments.partition_point(|one| one.base <= at);
        let Some(place) = next.checked_sub(1) else {
            let oldest = segments.front().expect("one is always being written");
            return Ok(Err(oldest.base));
        };
        let base = segments[place].base;
        let next = segments.get(next).map(|one| one.base);
        let name = segment::file_name(base);
        let file = disk.open(&name).map_err(|error| LogError::disk("open", &name, error))?;
        Ok(Ok(OpenSegment { base, name, file, next }))
    }

    fn segments(&self) -> MutexGuard<'_, VecDeque<SegmentInfo>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
