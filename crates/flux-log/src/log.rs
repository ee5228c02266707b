//! The log that a worker writes: batches of records, one write each, in segments.
//!
//! It never syncs of its own accord except where a segment ends; when to sync, and what may be
//! acknowledged, is the caller's policy. It starts no thread.

mod trim;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use crate::{
    batch::{Batch, BatchKind, MARK_BYTES},
    disk::Disk,
    error::LogError,
    record::{Record, State},
    recovery::{self, Progress, Recovered, RecoveryReport},
    segment::{self, ActiveSegment, SealedSegment, SegmentHeader},
    sync::{PrepareTarget, PreparedSegment, SyncGate, SyncTarget},
    tail::{Catalog, LogReader},
};

pub use trim::{Keep, Trimmed};

/// A place in the log: bytes since its beginning, headers included. "Durable up to an LSN" means all
/// bytes before it.
pub type Lsn = u64;

/// How to open a log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Size of a segment file, in bytes. One that must hold a larger batch becomes larger.
    pub segment_bytes: u64,
    /// A random number, new at each start and kept from users: it goes into the checksums of new
    /// segments, so that nobody can craft a value that reads as a record.
    pub salt: u64,
    /// A batch that reaches where nothing was written yet takes so many bytes of zeros with it. Blocks
    /// that a file only has reserved cost the sync that follows their first write a commit of the file
    /// system's journal; with this, one sync in many pays for it. 0 where syncs are rare.
    pub zero_ahead_bytes: u64,
}

impl LogOptions {
    /// The defaults: segments of 64 MiB, and no zeros.
    pub fn new(salt: u64) -> LogOptions {
        LogOptions { segment_bytes: 64 << 20, salt, zero_ahead_bytes: 0 }
    }
}

/// An open log. One thread owns it; syncs run elsewhere through [`SyncTarget`].
///
/// After a failed write or sync it is poisoned: every later call that touches the disk returns
/// [`LogError::Poisoned`], because what the disk holds is then unknown.
#[derive(Debug)]
pub struct Log {
    disk: Arc<dyn Disk>,
    options: LogOptions,
    sealed: VecDeque<SealedSegment>,
    /// Of these the oldest that the last trim found covered by snapshots and left for readers. They stay
    /// covered: snapshots only go on, and what a new history voids counts no more.
    covered: usize,
    active: ActiveSegment,
    prepared: Option<PreparedSegment>,
    /// A `PrepareTarget` is out.
    preparing: bool,
    next_temporary: u64,
    batch: Batch,
    /// What the batch changes of `active.highest` and `states` once it is written, in its order.
    changes: Vec<Change>,
    /// The last state of each partition that is written.
    states: BTreeMap<u16, State>,
    /// Partitions that were reset, and the LSN after it. Until that is durable, a power cut may bring
    /// back what the reset voids in the sealed segments.
    resets: Vec<(u16, Lsn)>,
    written: Lsn,
    /// Up to where the active segment was written to, with data or zeros.
    zeroed: Lsn,
    synced: Lsn,
    gate: Arc<SyncGate>,
    catalog: Arc<Catalog>,
    poison: Option<Arc<str>>,
}

/// What a record means for the log's own account.
#[derive(Debug)]
enum Change {
    /// Entries of a partition, up to this index at the highest.
    Entries(u16, u64),
    State(State),
}

impl Log {
    /// Opens the log on `disk`, or starts one, and gives every record to `visit` in the order in
    /// which they were appended. The first records may be states repeated from segments that are
    /// gone. When it returns, all that was visited is durable.
    ///
    /// # Errors
    /// [`LogError::Damaged`] if something that had been durable is missing or changed,
    /// [`LogError::UnknownVersion`], and what the disk says. `visit` may have been called by then.
    pub fn open(
        disk: Arc<dyn Disk>,
        options: LogOptions,
        visit: &mut dyn FnMut(Record<'_>),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Log, RecoveryReport), LogError> {
        let Recovered { sealed, last, states, report } =
            recovery::recover(&*disk, visit, progress)?;
        let gate = Arc::new(SyncGate::default());
        let (active, end) = match last {
            Some((mut active, end)) => {
                active.capacity = segment::own_blocks(&active, end, options.segment_bytes)?;
                (active, end)
            }
            None => segment::create_first(&*disk, &options, &gate)?,
        };
        let written = active.header.base + end;
        let sealed = sealed.into();
        let catalog = Arc::new(Catalog::new(&sealed, active.header.base, written));
        let mut log = Log {
            disk,
            options,
            sealed,
            covered: 0,
            active,
            prepared: None,
            preparing: false,
            next_temporary: 1,
            batch: Batch::new(),
            changes: Vec::new(),
            states,
            resets: Vec::new(),
            written,
            zeroed: written,
            synced: written,
            gate,
            catalog,
            poison: None,
        };
        // With the mark, damage to what was just recovered can never pass for a torn write.
        if report.segments > 0 && !report.clean && log.room() >= MARK_BYTES as u64 {
            log.mark()?;
        }
        Ok((log, report))
    }

    /// Adds a record to the batch; nothing is written yet.
    ///
    /// # Errors
    /// [`LogError::TooLarge`] if the batch would exceed [`MAX_BATCH_BYTES`](crate::MAX_BATCH_BYTES).
    pub fn append(&mut self, record: &Record<'_>) -> Result<(), LogError> {
        self.check()?;
        self.batch
            .push(record)
            .map_err(|bytes| LogError::TooLarge { bytes, limit: crate::MAX_BATCH_BYTES as u64 })?;
        match record {
            Record::State(state) => self.changes.push(Change::State(*state)),
            Record::Entry(entry) => match self.changes.last_mut() {
                Some(Change::Entries(partition, highest)) if *partition == entry.partition => {
                    *highest = entry.index.max(*highest);
                }
                _ => self.changes.push(Change::Entries(entry.partition, entry.index)),
            },
        }
        Ok(())
    }

    /// Bytes that writing the batch takes; 0 if it is empty.
    pub fn batch_bytes(&self) -> usize {
        if self.batch.is_empty() { 0 } else { self.batch.len() }
    }

    /// Makes sure that a batch of `bytes` bytes, as [`batch_bytes`](Log::batch_bytes) counts them,
    /// can be written without more space. Begins the next segment if need be, which first syncs this
    /// one here and now: with many bytes between [`durable`](Log::durable) and
    /// [`written`](Log::written) that takes long, so keep that distance small by syncing elsewhere.
    ///
    /// On a full disk, segments that [`trim`](Log::trim) has left for readers alone make room, the
    /// oldest first and no more than it takes: a reader never costs a write.
    ///
    /// # Errors
    /// [`LogError::Full`] loses nothing else: try again when space has returned. Others poison the log.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), LogError> {
        self.check()?;
        if self.room() >= bytes as u64 {
            return Ok(());
        }
        loop {
            match self.rotate(bytes as u64) {
                Err(LogError::Full { .. }) if self.release_oldest()? => {}
                result => return result,
            }
        }
    }

    /// Writes the batch with one write and returns the LSN after it. Without a batch nothing happens.
    ///
    /// # Errors
    /// [`LogError::Full`], only if the space was not reserved, keeps the batch. Others poison the log.
    pub fn write(&mut self) -> Result<Lsn, LogError> {
        self.check()?;
        if self.batch.is_empty() {
            return Ok(self.written);
        }
        self.reserve(self.batch.len())?;
        let ActiveSegment { name, header, file, highest, capacity } = &mut self.active;
        self.batch.seal(BatchKind::Records, header.seed(), self.written, self.synced);
        let end = self.written + self.batch.len() as u64;
        let mut zeros = 0;
        if end > self.zeroed {
            let full = header.base + *capacity;
            self.zeroed = full.min(end + self.options.zero_ahead_bytes).max(end);
            zeros = (self.zeroed - end) as usize;
        }
        let bytes = self.batch.followed_by_zeros(zeros);
        let result = file.write_at(bytes, self.written - header.base);
        if let Err(error) = result {
            let error = LogError::io("write", name, error);
            return Err(self.poisoned_by(error));
        }
        self.written = end;
        self.catalog.wrote(end);
        for change in self.changes.drain(..) {
            match change {
                Change::Entries(partition, index) => {
                    let known = highest.entry(partition).or_default();
                    *known = index.max(*known);
                }
                Change::State(state) => {
                    let previous = self.states.insert(state.partition, state);
                    if state.resets(previous.as_ref()) {
                        highest.remove(&state.partition);
                        self.resets.push((state.partition, self.written));
                    }
                }
            }
        }
        self.batch.clear();
        Ok(self.written)
    }

    /// The LSN after the last batch written.
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// The LSN up to which all is known to be durable.
    pub fn durable(&self) -> Lsn {
        self.synced
    }

    /// What to sync, perhaps on another thread, to make all that is written durable.
    pub fn sync_target(&self) -> SyncTarget {
        // Earlier segments were synced when this one was begun.
        SyncTarget {
            gate: self.gate.clone(),
            file: self.active.file.clone(),
            name: self.active.name.clone(),
            lsn: self.written,
        }
    }

    /// Takes note of what [`SyncTarget::sync`] returned and gives the LSN up to which all is durable.
    ///
    /// # Errors
    /// A failed sync poisons the log.
    pub fn synced(&mut self, result: io::Result<Lsn>) -> Result<Lsn, LogError> {
        match result {
            Ok(lsn) => {
                self.synced = self.synced.max(lsn);
                self.void_what_was_reset();
            }
            Err(error) => {
                let error = LogError::io("sync", &self.active.name, error);
                return Err(self.poisoned_by(error));
            }
        }
        self.check()?;
        Ok(self.synced)
    }

    /// Syncs all that is written, on this thread.
    ///
    /// # Errors
    /// A failed sync poisons the log.
    pub fn sync_now(&mut self) -> Result<Lsn, LogError> {
        self.check()?;
        if self.synced == self.written {
            return Ok(self.synced);
        }
        let result = self.sync_target().sync();
        self.synced(result)
    }

    /// Writes what is in the batch, syncs, and marks the log as complete, so that damage from now on
    /// can never pass for a torn write.
    ///
    /// # Errors
    /// As [`write`](Log::write) and [`sync_now`](Log::sync_now).
    pub fn close(mut self) -> Result<(), LogError> {
        self.write()?;
        self.sync_now()?;
        if self.capacity_left() >= MARK_BYTES as u64 {
            self.mark()?;
        }
        Ok(())
    }

    /// What to run, perhaps on another thread, to have the next segment allocated before it is
    /// needed; `None` while that is not worth it.
    pub fn prepare_target(&mut self) -> Option<PrepareTarget> {
        let early = self.room() > self.active.capacity / 2;
        if early || self.preparing || self.prepared.is_some() || self.poison.is_some() {
            return None;
        }
        self.preparing = true;
        let name = self.temporary_name();
        Some(PrepareTarget { disk: self.disk.clone(), name, size: self.options.segment_bytes })
    }

    /// Takes what [`PrepareTarget::run`] returned. A failure is not one of the log: allocation is
    /// tried again when the segment is needed.
    pub fn prepared(&mut self, result: Result<PreparedSegment, LogError>) {
        self.preparing = false;
        match result {
            Ok(segment) => self.prepared = Some(segment),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "segment not prepared");
            }
        }
    }

    /// A reader of this log, for any thread.
    pub fn reader(&self) -> LogReader {
        LogReader::new(self.disk.clone(), self.catalog.clone())
    }

    /// Bytes of disk that the log's segments take.
    pub fn bytes(&self) -> u64 {
        self.pinned_bytes() + self.bytes_beyond()
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.sealed.len() + 1
    }

    /// Why the log takes nothing more, if so.
    pub fn poison(&self) -> Option<&str> {
        self.poison.as_deref()
    }

    /// Bytes that batches may still take here. Room for a closing mark is kept.
    fn room(&self) -> u64 {
        self.capacity_left().saturating_sub(MARK_BYTES as u64)
    }

    fn capacity_left(&self) -> u64 {
        (self.active.header.base + self.active.capacity).saturating_sub(self.written)
    }

    fn check(&self) -> Result<(), LogError> {
        match &self.poison {
            Some(cause) => Err(LogError::Poisoned { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn poisoned_by(&mut self, error: LogError) -> LogError {
        let cause = match &error {
            LogError::Io { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        self.poison.get_or_insert_with(|| cause.into());
        error
    }

    fn temporary_name(&mut self) -> String {
        let name = segment::temporary_name(self.next_temporary);
        self.next_temporary += 1;
        name
    }

    /// Writes a mark after what is written and synced.
    fn mark(&mut self) -> Result<(), LogError> {
        let ActiveSegment { name, header, file, .. } = &self.active;
        let mut mark = Batch::new();
        let bytes = mark.seal(BatchKind::Mark, header.seed(), self.written, self.synced);
        if let Err(error) = file.write_at(bytes, self.written - header.base) {
            let error = LogError::io("write", name, error);
            return Err(self.poisoned_by(error));
        }
        self.written += MARK_BYTES as u64;
        self.catalog.wrote(self.written);
        self.sync_now()?;
        Ok(())
    }

    /// Begins the next segment, with room for a batch of `bytes`. Until the file has its final name
    /// the log is as before, so that a lack of space changes nothing.
    fn rotate(&mut self, bytes: u64) -> Result<(), LogError> {
        let header = SegmentHeader {
            base: self.written,
            salt: segment::salt_of(self.options.salt, self.written),
        };
        let head = segment::head(header, &self.states);
        let least = (head.len() + MARK_BYTES) as u64 + bytes;
        let next = match self.take_prepared(least) {
            Ok(next) => next,
            Err(error @ LogError::Full { .. }) => return Err(error),
            Err(error) => return Err(self.poisoned_by(error)),
        };
        if let Err(error) = self.sync_now() {
            self.prepared = Some(next);
            return Err(error);
        }
        let capacity = next.size;
        match segment::install(&*self.disk, &self.gate, next, header, &head) {
            Ok(active) => {
                tracing::debug!(segment = active.name, capacity, "segment begun");
                let full = std::mem::replace(&mut self.active, active).seal();
                self.catalog.begin(&full, header.base);
                self.sealed.push_back(full);
                self.written += head.len() as u64;
                self.catalog.wrote(self.written);
                self.zeroed = self.written;
                self.synced = self.written;
                Ok(())
            }
            Err(error @ LogError::Full { .. }) => Err(error),
            Err(error) => Err(self.poisoned_by(error)),
        }
    }

    /// Entries before a reset that is durable count no more. A segment is sealed when it is durable, so
    /// those of the active one were dropped at once, and those in all others are before the reset.
    fn void_what_was_reset(&mut self) {
        let Log { resets, sealed, synced, catalog, .. } = self;
        resets.retain(|(partition, lsn)| {
            if *lsn > *synced {
                return true;
            }
            sealed.iter_mut().for_each(|segment| segment.void(*partition));
            catalog.void(*partition);
            false
        });
    }

    /// An allocated file of at least `least` bytes.
    fn take_prepared(&mut self, least: u64) -> Result<PreparedSegment, LogError> {
        let size = self.options.segment_bytes.max(least.next_multiple_of(8));
        if let Some(mut prepared) = self.prepared.take() {
            if prepared.size < least {
                if let Err(error) = prepared.file.allocate(size) {
                    let error = LogError::disk("allocate", &prepared.name, error);
                    self.prepared = Some(prepared);
                    return Err(error);
                }
                prepared.size = size;
            }
            return Ok(prepared);
        }
        let name = self.temporary_name();
        let file = segment::allocate(&*self.disk, &name, size)?;
        Ok(PreparedSegment { file, name, size })
    }
}
