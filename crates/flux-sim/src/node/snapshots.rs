//! A process's snapshots: taken chunk by chunk between its turns, sent to peers, and taken in from them.

use std::sync::Arc;

use flux_core::Cursor;
use flux_core::replica::{Now, SnapshotMeta};
use flux_log::{Keep, LogError, Snapshot, SnapshotId, SnapshotWriter};
use raft::eraftpb::Message;

use super::{Output, Process, SnapshotParcel};
use crate::plant::Plant;

/// Bytes of a chunk: small, so that writes fall between them.
const CHUNK_BYTES: usize = 200;

/// A walk over a table that is under way.
pub(super) struct Walk {
    partition: u16,
    meta: SnapshotMeta,
    replacements: u64,
    writer: SnapshotWriter,
}

impl Walk {
    pub(super) fn is_of(&self, partition: u16) -> bool {
        self.partition == partition
    }
}

impl Process {
    /// Begins a snapshot if one is due, or walks one chunk of the one under way.
    pub(super) fn step_snapshot(&mut self, out: &mut Output) -> Result<(), LogError> {
        let Some(mut walk) = self.walk.take() else { return self.begin_walk(out) };
        out.again = true;
        let Some(hosted) = self.hosted.get_mut(&walk.partition) else { return Ok(()) };
        if hosted.table.replacements() != walk.replacements {
            return Ok(());
        }
        let mut chunk = Vec::new();
        let complete = hosted.table.snapshot_chunk(CHUNK_BYTES, &mut chunk);
        if !chunk.is_empty() {
            walk.writer.chunk(&chunk)?;
        }
        if !complete {
            self.walk = Some(walk);
            return Ok(());
        }
        hosted.table.end_snapshot();
        let index = walk.meta.position.index;
        walk.writer.finish()?;
        out.notes.push(format!("p{} snapshot at {index}", walk.partition));
        self.snapshot_indexes.insert(walk.partition, index);
        hosted.replica.snapshot_taken(walk.meta);
        self.trim(out)
    }

    fn begin_walk(&mut self, out: &mut Output) -> Result<(), LogError> {
        let mut wanted = self.hosted.iter().filter(|(_, one)| one.replica.snapshot_wanted());
        let mut due = wanted.next().map(|(partition, _)| *partition);
        if due.is_none() && self.log.bytes_beyond() >= self.options.snapshot_log_bytes {
            let behind = |(partition, index): &&(u16, u64)| {
                let snapshot = self.snapshot_indexes.get(partition);
                self.hosted.contains_key(partition) && snapshot.is_none_or(|at| at < index)
            };
            let oldest = self.log.oldest_segment().unwrap_or_default();
            due = oldest.iter().find(behind).map(|(partition, _)| *partition);
        }
        let Some(partition) = due else { return Ok(()) };
        let Some(hosted) = self.hosted.get(&partition) else { return Ok(()) };
        let meta = hosted.replica.snapshot_meta();
        let index = meta.position.index;
        if self.snapshot_indexes.get(&partition) == Some(&index) || index == 0 {
            return Ok(());
        }
        let disk = Arc::new(self.snapshot_disk.clone());
        let writer = SnapshotWriter::create(disk, partition, index, &meta.encode())?;
        hosted.table.begin_snapshot();
        let replacements = hosted.table.replacements();
        self.walk = Some(Walk { partition, meta, replacements, writer });
        out.again = true;
        Ok(())
    }

    /// Removes the segments that snapshots have made useless, and that nobody who follows changes needs.
    pub(super) fn trim(&mut self, out: &mut Output) -> Result<(), LogError> {
        let (indexes, hosted) = (&self.snapshot_indexes, &self.hosted);
        let too_far = self.options.has(Plant::TrimmedTooFar);
        let keeps = self.options.publishes && !self.options.has(Plant::TrimIgnoresCursor);
        let trimmed = self.log.trim(self.options.retention_bytes, &mut |partition| {
            let one = hosted.get(&partition);
            let index = || indexes.get(&partition).copied().unwrap_or(0);
            let snapshot = if too_far || one.is_none() { u64::MAX } else { index() };
            let from = one.filter(|_| keeps).map_or(u64::MAX, |one| one.feed.needs());
            Keep { snapshot, from }
        })?;
        out.released |= trimmed.released;
        Ok(())
    }

    /// Reads the snapshot that a message stands for.
    pub(super) fn send_snapshot(&self, partition: u16, message: &Message, out: &mut Output) {
        let index = message.snapshot.as_ref().map_or(0, |one| one.get_metadata().index);
        let parcel = self.read_snapshot(SnapshotId { partition, index }).map(|(meta, chunks)| {
            let Message { from, term, to, .. } = *message;
            SnapshotParcel { partition, from, term, to, meta, chunks }
        });
        out.snapshots.push(parcel.ok_or((partition, message.to)));
    }

    fn read_snapshot(&self, id: SnapshotId) -> Option<(SnapshotMeta, Vec<Vec<u8>>)> {
        let mut snapshot = Snapshot::open(&self.snapshot_disk, id).ok()?;
        let meta = SnapshotMeta::decode(snapshot.meta())?;
        let mut chunks = Vec::new();
        while let Some(chunk) = snapshot.next_chunk().ok()? {
            chunks.push(chunk.to_vec());
        }
        Some((meta, chunks))
    }

    /// Takes in a snapshot that has arrived as a whole. The file is complete before the state is written
    /// that makes the log go on from it.
    pub(super) fn take_in(
        &mut self,
        mut parcel: SnapshotParcel,
        now: Now,
        out: &mut Output,
    ) -> Result<(), LogError> {
        let partition = parcel.partition;
        let Some(hosted) = self.hosted.get_mut(&partition) else { return Ok(()) };
        if hosted.replica.id() != parcel.to {
            return Ok(());
        }
        if self.options.has(Plant::SnapshotAtWrongIndex) {
            parcel.meta.position.index += 1;
        }
        if self.options.has(Plant::SnapshotIncomplete) {
            parcel.chunks.pop();
        }
        if self.options.has(Plant::SnapshotWithoutSessions) {
            parcel.meta.sessions.clear();
        }
        if self.options.has(Plant::SnapshotWithoutCursor) {
            parcel.meta.cursor = Cursor::default();
        }
        let index = parcel.meta.position.index;
        let disk = Arc::new(self.snapshot_disk.clone());
        let mut writer = SnapshotWriter::receive(disk, partition, index, &parcel.meta.encode())?;
        let table = self.options.table();
        for chunk in &parcel.chunks {
            writer.chunk(chunk)?;
            table.load(chunk).expect("a peer's snapshot, whose checksums were right");
        }
        let meta = parcel.meta;
        let wanted = hosted.replica.install(now, parcel.from, parcel.term, meta, table);
        if wanted {
            writer.finish()?;
            self.snapshot_indexes.insert(partition, index);
            out.notes.push(format!("p{partition} installs a snapshot at {index}"));
        }
        out.received.push((partition, parcel.from, parcel.to, wanted));
        Ok(())
    }
}
