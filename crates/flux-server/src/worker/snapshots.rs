//! Takes snapshots of a worker's partitions, one at a time, when its log has grown too long or somebody
//! asks for one.
//!
//! The worker walks the table in small chunks between its turns; a thread writes them to the disk. At
//! most `WINDOW` chunks are between the two, so a slow disk slows the walk and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flux_core::PartitionId;
use flux_core::replica::SnapshotMeta;
use flux_core::store::Table;
use flux_log::{Disk, Keep, LogError, SnapshotId, SnapshotWriter};

use super::dispatch::Dispatch;
use super::turn::Turn;
use crate::config::Settings;
use crate::mailbox::{Mailbox, Return, SnapshotAnswer, TakenSnapshot};

/// Bytes of a chunk: what the walk adds to a turn.
const CHUNK_BYTES: usize = 64 * 1024;
/// Chunks that the disk may be behind the walk.
const WINDOW: usize = 4;
/// Time until a snapshot is tried again after one failed.
const RETRY: Duration = Duration::from_secs(10);
/// After so long without, it is told again that log had to go which somebody needed.
const RELEASED_QUIET: Duration = Duration::from_secs(60);

/// What the thread is told.
enum Job {
    Start { partition: u16, index: u64, meta: Vec<u8> },
    Chunk(Vec<u8>),
    Finish,
    Abort,
}

/// The walk that is under way.
struct Walk {
    partition: PartitionId,
    index: u64,
    meta: SnapshotMeta,
    table: Arc<Table>,
    /// Whether the whole table has been walked, and only the disk is not done.
    complete: bool,
    /// The replica has left or begun anew meanwhile: the snapshot is of no use.
    void: bool,
    /// Who waits for it.
    answers: Vec<SnapshotAnswer>,
}

impl Walk {
    fn answer(&mut self, result: impl Fn() -> Result<TakenSnapshot, String>) {
        for answer in self.answers.drain(..) {
            // Whoever asked may have given up.
            let _ = answer.send(result());
        }
    }
}

pub(super) struct Snapshots {
    disk: Arc<dyn Disk>,
    /// Snapshots that were asked for and have not begun.
    wanted: VecDeque<(PartitionId, SnapshotAnswer)>,
    sender: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    walk: Option<Walk>,
    room: usize,
    /// The index of each partition's newest snapshot.
    indexes: BTreeMap<u16, u64>,
    log_bytes: u64,
    not_before: Option<Instant>,
    /// When log last had to go that somebody who follows changes still needed.
    released: Option<Instant>,
}

impl Snapshots {
    pub(super) fn start(
        worker: u16,
        disk: Arc<dyn Disk>,
        mailbox: Arc<Mailbox>,
        indexes: BTreeMap<u16, u64>,
        settings: &Settings,
    ) -> io::Result<Snapshots> {
        // Start, the chunks of the window, and Finish or Abort: a send never waits.
        let (sender, receiver) = sync_channel(WINDOW + 2);
        let own_disk = Arc::clone(&disk);
        let span = tracing::Span::current();
        let write = move || span.in_scope(|| write_snapshots(&receiver, &disk, &mailbox));
        let thread =
            std::thread::Builder::new().name(format!("flux-snapshot-{worker}")).spawn(write)?;
        Ok(Snapshots {
            disk: own_disk,
            wanted: VecDeque::new(),
            sender: Some(sender),
            thread: Some(thread),
            walk: None,
            room: WINDOW,
            indexes,
            log_bytes: settings.snapshot_log_bytes,
            not_before: None,
            released: None,
        })
    }

    /// Takes a snapshot of the partition as soon as the one under way is done. Whoever asks bounds how
    /// many are asked for.
    pub(super) fn want(&mut self, partition: PartitionId, answer: SnapshotAnswer) {
        self.wanted.push_back((partition, answer));
    }

    /// Starts a snapshot if one is due or wanted, or walks one chunk of the one under way.
    pub(super) fn step(&mut self, dispatch: &mut Dispatch, turn: &mut Turn) {
        if self.walk.is_none() && !self.begin(dispatch, turn) {
            return;
        }
        let Some(walk) = &mut self.walk else { return };
        if walk.complete || self.room == 0 {
            return;
        }
        let mut chunk = Vec::with_capacity(CHUNK_BYTES + 4096);
        let complete = walk.table.snapshot_chunk(CHUNK_BYTES, &mut chunk);
        if !chunk.is_empty() {
            self.room -= 1;
            self.send(Job::Chunk(chunk));
        }
        if complete && let Some(walk) = &mut self.walk {
            walk.table.end_snapshot();
            walk.complete = true;
            self.send(Job::Finish);
        }
    }

    fn begin(&mut self, dispatch: &mut Dispatch, turn: &mut Turn) -> bool {
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return false;
        }
        let asked = self.wanted.front().map(|(partition, _)| *partition);
        let needed = asked.or_else(|| dispatch.snapshot_wanted());
        let Some(partition) = needed.or_else(|| self.due(dispatch, turn)) else { return false };
        let mut answers = Vec::new();
        for (of, answer) in std::mem::take(&mut self.wanted) {
            if of == partition {
                answers.push(answer);
            } else {
                self.wanted.push_back((of, answer));
            }
        }
        // Without a replica nobody is told but by the answers that are dropped.
        let Some((replica, _)) = dispatch.replica(partition) else { return false };
        let meta = replica.snapshot_meta();
        let table = Arc::clone(replica.table());
        table.begin_snapshot();
        let index = meta.position.index;
        tracing::debug!(%partition, index, "snapshot begins");
        self.send(Job::Start { partition: partition.0, index, meta: meta.encode() });
        let (complete, void) = (false, false);
        self.walk = Some(Walk { partition, index, meta, table, complete, void, answers });
        true
    }

    /// The partition whose entries keep the log from being trimmed, once that has grown too long.
    fn due(&mut self, dispatch: &Dispatch, turn: &mut Turn) -> Option<PartitionId> {
        let log_bytes = turn.log().bytes_beyond();
        if log_bytes < self.log_bytes {
            return None;
        }
        // A log as long as the data itself is no reason to write all the data again.
        let own = dispatch.own().iter();
        let views = &dispatch.shared().views;
        let data: u64 = own.map(|one| views[usize::from(one.0)].table.memory_bytes()).sum();
        if log_bytes < data {
            return None;
        }
        let behind = |(partition, index): &&(u16, u64)| {
            self.indexes.get(partition).is_none_or(|snapshot| snapshot < index)
        };
        let Some(&(partition, _)) = turn.log().oldest_segment()?.iter().find(behind) else {
            // All snapshots that it takes are there: an earlier trim failed, or never began.
            self.trim(dispatch, turn, retention_bytes(dispatch));
            return None;
        };
        Some(PartitionId(partition))
    }

    /// The replica of a partition has left. Once that is on the disk its entries are void, and nothing of it keeps
    /// the log from being trimmed.
    pub(super) fn forget(&mut self, partition: PartitionId) {
        self.stop_walk(partition);
    }

    /// A replica begins with nothing, or after a snapshot that was received and is durable.
    pub(super) fn restart(&mut self, partition: PartitionId, index: u64) {
        self.stop_walk(partition);
        self.indexes.insert(partition.0, index);
    }

    /// Gives up the walk over a table whose contents are about to be replaced.
    fn stop_walk(&mut self, partition: PartitionId) {
        let Some(walk) = self.walk.as_mut().filter(|walk| walk.partition == partition) else {
            return;
        };
        walk.answer(|| Err("the partition's contents were replaced meanwhile".to_owned()));
        if walk.complete {
            walk.void = true;
        } else {
            walk.table.end_snapshot();
            self.walk = None;
            self.send(Job::Abort);
        }
    }

    fn send(&self, job: Job) {
        let sender = self.sender.as_ref().expect("there until the worker ends");
        sender.try_send(job).expect("the channel holds a whole window");
    }

    /// The thread has written a chunk.
    pub(super) fn room(&mut self) {
        self.room += 1;
    }

    /// The thread has finished the snapshot, or could not.
    pub(super) fn written(
        &mut self,
        partition: PartitionId,
        result: Result<(), LogError>,
        dispatch: &mut Dispatch,
        turn: &mut Turn,
    ) {
        // A walk that was given up may still be heard of.
        let Some(mut walk) = self.walk.take_if(|walk| walk.partition == partition) else { return };
        if walk.void {
            return;
        }
        match result {
            Ok(()) => {
                dispatch.shared().stats.snapshots.add(1);
                dispatch.shared().last_snapshot_s.store(dispatch.now.ms / 1000, Ordering::Relaxed);
                self.indexes.insert(walk.partition.0, walk.index);
                tracing::debug!(partition = %walk.partition, index = walk.index, "snapshot done");
                let id = SnapshotId { partition: walk.partition.0, index: walk.index };
                walk.answer(|| match self.disk.open(&id.file_name()) {
                    Ok(file) => Ok(TakenSnapshot { id, file }),
                    Err(error) => Err(format!("cannot open the snapshot: {error}")),
                });
                if let Some((replica, _)) = dispatch.replica(walk.partition) {
                    replica.snapshot_taken(walk.meta);
                }
                self.trim(dispatch, turn, retention_bytes(dispatch));
            }
            Err(error) => {
                if matches!(error, LogError::Full { .. }) {
                    // A reader never costs a snapshot.
                    self.trim(dispatch, turn, 0);
                }
                walk.answer(|| Err(format!("the snapshot cannot be written: {error}")));
                if !walk.complete {
                    walk.table.end_snapshot();
                    self.send(Job::Abort);
                }
                self.not_before = Some(Instant::now() + RETRY);
                tracing::error!(
                    partition = %walk.partition, %error,
                    "a snapshot cannot be written; the log grows until one can"
                );
            }
        }
    }

    /// Removes the segments that snapshots have made useless, and that nobody who follows changes needs.
    fn trim(&mut self, dispatch: &Dispatch, turn: &mut Turn, retention_bytes: u64) {
        let (indexes, shared) = (&self.indexes, dispatch.shared());
        let publishes = shared.settings.rabbitmq_url.is_some();
        let keep = &mut |partition: u16| {
            let snapshot = indexes.get(&partition).copied().unwrap_or(0);
            let feed = &shared.views[usize::from(partition)].feed;
            Keep { snapshot, from: feed.needs(publishes, dispatch.now.us) }
        };
        match turn.log().trim(retention_bytes, keep) {
            Ok(trimmed) if trimmed.released => self.tell_released(),
            Ok(_) => {}
            Err(error) => {
                self.not_before = Some(Instant::now() + RETRY);
                tracing::warn!(%error, "old log segments cannot be removed; trying again");
            }
        }
    }

    /// Says that log had to go, once for as long as that goes on.
    fn tell_released(&mut self) {
        let before = self.released.replace(Instant::now());
        if before.is_none_or(|before| before.elapsed() > RELEASED_QUIET) {
            tracing::warn!(
                "log that was kept for those who follow changes has to go, as they have fallen too far behind: \
                 they get current values instead. If that must not be, raise cdc_retention_bytes"
            );
        }
    }

    /// Removes segments that were kept for those who follow changes, once they have come further.
    pub(super) fn trim_for_readers(&mut self, dispatch: &Dispatch, turn: &mut Turn) {
        if turn.log().pinned_bytes() > 0 {
            self.trim(dispatch, turn, retention_bytes(dispatch));
        }
    }

    /// Whether `step` has something to do though no event comes.
    pub(super) fn has_work(&self) -> bool {
        match &self.walk {
            Some(walk) => !walk.complete && self.room > 0,
            None => !self.wanted.is_empty(),
        }
    }
}

/// Log of a worker that is kept for those who follow changes.
fn retention_bytes(dispatch: &Dispatch) -> u64 {
    let shared = dispatch.shared();
    shared.settings.cdc_retention_bytes / shared.mailboxes.len() as u64
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            // It ends when the sender is gone, and drops a snapshot that is not finished.
            let _ = thread.join();
        }
    }
}

/// The thread: one snapshot after the other. After a failure it takes no chunks until the next start.
fn write_snapshots(jobs: &Receiver<Job>, disk: &Arc<dyn Disk>, mailbox: &Mailbox) {
    let mut writer: Option<SnapshotWriter> = None;
    let mut current = 0;
    while let Ok(job) = jobs.recv() {
        let result = match job {
            Job::Start { partition, index, meta } => {
                current = partition;
                SnapshotWriter::create(Arc::clone(disk), partition, index, &meta)
                    .map(|created| writer = Some(created))
            }
            Job::Chunk(chunk) => {
                let result = writer.as_mut().map_or(Ok(()), |writer| writer.chunk(&chunk));
                mailbox.answer(Return::SnapshotRoom);
                result
            }
            Job::Finish => match writer.take().map(SnapshotWriter::finish) {
                Some(Ok(_)) => {
                    mailbox.answer(Return::SnapshotWritten { partition: current, result: Ok(()) });
                    Ok(())
                }
                Some(Err(error)) => Err(error),
                None => Ok(()),
            },
            Job::Abort => {
                writer = None;
                Ok(())
            }
        };
        if let Err(error) = result {
            writer = None;
            mailbox.answer(Return::SnapshotWritten { partition: current, result: Err(error) });
        }
    }
}
