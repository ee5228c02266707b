//! The snapshot file that is being sent, read on tokio's blocking threads.

use std::sync::Arc;

use flux_log::{Disk, LogError, Snapshot, SnapshotId};

use super::{blocking, wire};

/// Why a file cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error("the snapshot cannot be read: {0}")]
    File(#[from] LogError),
    #[error("the receiver asks for chunk {0}, which the snapshot does not have")]
    NoSuchChunk(u64),
    #[error("the receiver has {0} chunks of another snapshot of the same index")]
    OtherChunks(u64),
    #[error("the node is stopping")]
    Stopping,
}

/// A snapshot, opened. It stays readable when a newer one takes its place on the disk, unless it has to
/// be read again from an earlier chunk.
#[derive(Debug)]
pub(super) struct Source {
    disk: Arc<dyn Disk>,
    id: SnapshotId,
    /// Away only while it is being read.
    snapshot: Option<Snapshot>,
    /// The number of the chunk that `next` returns.
    number: u64,
    /// Of the chunks before that, as ACCEPT says it.
    crc: u32,
}

impl Source {
    pub(super) async fn open(disk: Arc<dyn Disk>, id: SnapshotId) -> Result<Source, SourceError> {
        let snapshot = open(Arc::clone(&disk), id).await?;
        Ok(Source { disk, id, snapshot: Some(snapshot), number: 0, crc: 0 })
    }

    /// The file's `meta` and its length.
    pub(super) fn description(&self) -> (Vec<u8>, u64) {
        let snapshot = self.snapshot.as_ref();
        snapshot.map_or((Vec::new(), 0), |snapshot| (snapshot.meta().to_vec(), snapshot.size()))
    }

    /// The number of the chunk that `next` returns: how many come before it.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Goes on from that chunk, if the checksum is that of the chunks before it. The file is then read from
    /// its beginning the next time: another one may have its name.
    pub(super) async fn seek(&mut self, number: u64, crc: u32) -> Result<(), SourceError> {
        if number < self.number || self.snapshot.is_none() {
            self.snapshot = Some(open(Arc::clone(&self.disk), self.id).await?);
            (self.number, self.crc) = (0, 0);
        }
        while self.number < number {
            if self.read(|_| ()).await?.is_none() {
                return Err(SourceError::NoSuchChunk(number));
            }
        }
        if self.crc != crc {
            return Err(SourceError::OtherChunks(number));
        }
        Ok(())
    }

    /// The next chunk; `None` after the last one. Only then is the file known to be whole.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, SourceError> {
        self.read(<[u8]>::to_vec).await
    }

    async fn read<T: Send + 'static>(
        &mut self,
        take: impl FnOnce(&[u8]) -> T + Send + 'static,
    ) -> Result<Option<T>, SourceError> {
        let Some(mut snapshot) = self.snapshot.take() else { return Err(SourceError::Stopping) };
        let read = blocking(move || {
            let chunk = snapshot.next_chunk();
            let chunk = chunk.map(|chunk| chunk.map(|bytes| (crc32c::crc32c(bytes), take(bytes))));
            (snapshot, chunk)
        });
        let (snapshot, chunk) = read.await.ok_or(SourceError::Stopping)?;
        self.snapshot = Some(snapshot);
        let Some((crc, taken)) = chunk? else { return Ok(None) };
        self.number += 1;
        self.crc = wire::chain(self.crc, crc);
        Ok(Some(taken))
    }
}

async fn open(disk: Arc<dyn Disk>, id: SnapshotId) -> Result<Snapshot, SourceError> {
    let opened = blocking(move || Snapshot::open(&*disk, id)).await;
    Ok(opened.ok_or(SourceError::Stopping)??)
}
