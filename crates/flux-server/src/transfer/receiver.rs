//! The receiving side: a file and a table, chunk by chunk.
//!
//! One transfer at a time goes on for a partition, and the newest has precedence: it may be the same
//! one again over a new connection, when the end of the old one has not been noticed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flux_core::replica::SnapshotMeta;
use flux_core::store::Table;
use flux_log::{Disk, LogError, SnapshotId, SnapshotWriter};
use flux_proto::peer::{Failure, Frame, SnapshotOffer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Instrument as _;

use super::wire::{self, Lost, Reader, Writer};
use super::{Received, Replicas, TransferLimits, blocking};
use crate::peer::BulkStream;

/// Connections that are served at a time, transfers or not. More are closed.
const CONNECTIONS: usize = 32;
/// How long a transfer may go on when another one should have its place.
const MAKE_ROOM: Duration = Duration::from_secs(1);
/// How long nothing may come on it then.
const QUIET: Duration = Duration::from_millis(100);
/// What is written is synced so often, so that the end does not take long.
const SYNC_BYTES: u64 = 32 * 1024 * 1024;

/// Serves what comes until the other end of the queue is dropped.
pub(super) async fn run(
    disk: Arc<dyn Disk>,
    replicas: Arc<dyn Replicas>,
    limits: TransferLimits,
    mut streams: mpsc::Receiver<BulkStream>,
) {
    let transfers = Mutex::new(Ongoing::default());
    let receiver = Arc::new(Receiver { disk, replicas, limits, transfers });
    let mut running = JoinSet::new();
    loop {
        let due = receiver.transfers.lock().kept.values().map(|kept| kept.until).min();
        let expire = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stream = streams.recv() => {
                let Some(stream) = stream else { break };
                if running.len() < CONNECTIONS {
                    running.spawn(Arc::clone(&receiver).serve(stream).in_current_span());
                }
            }
            Some(ended) = running.join_next(), if !running.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "the reception of a snapshot failed");
                }
            }
            () = expire => {
                let late = receiver.transfers.lock().take_late(Instant::now());
                // Dropping a large table takes long.
                let _ = blocking(move || drop(late)).await;
            }
        }
    }
    running.shutdown().await;
}

struct Receiver {
    disk: Arc<dyn Disk>,
    replicas: Arc<dyn Replicas>,
    limits: TransferLimits,
    transfers: Mutex<Ongoing>,
}

/// Transfers by partition.
#[derive(Debug, Default)]
struct Ongoing {
    /// Those under way; to be told when another one should have their place.
    active: BTreeMap<u16, Arc<Notify>>,
    /// Those that broke off.
    kept: BTreeMap<u16, Kept>,
}

#[derive(Debug)]
struct Kept {
    partial: Partial,
    until: Instant,
}

impl Ongoing {
    fn take_late(&mut self, now: Instant) -> Vec<Kept> {
        self.kept.extract_if(.., |_, kept| kept.until <= now).map(|(_, kept)| kept).collect()
    }
}

/// What is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Offer {
    id: SnapshotId,
    replica_from: u64,
    replica_to: u64,
    term: u64,
    size: u64,
    meta: SnapshotMeta,
}

impl Offer {
    /// `None` where the snapshot does not describe itself as it is offered.
    fn from_frame(offer: &SnapshotOffer<'_>) -> Option<Offer> {
        let meta = SnapshotMeta::decode(offer.meta)?;
        let id = SnapshotId { partition: offer.partition, index: offer.index };
        let SnapshotOffer { replica_from, replica_to, term, size, .. } = *offer;
        let fits = meta.position.index == offer.index;
        fits.then_some(Offer { id, replica_from, replica_to, term, size, meta })
    }

    /// Whether it is of a file that describes itself alike, perhaps in a later term. Whether that has the
    /// same chunks, the sender finds out.
    fn continues(&self, earlier: &Offer) -> bool {
        *self == Offer { term: self.term, ..earlier.clone() }
    }
}

/// What has arrived of a snapshot.
#[derive(Debug)]
struct Partial {
    offer: Offer,
    writer: SnapshotWriter,
    table: Table,
    chunks: u64,
    /// Of the chunks so far, as ACCEPT says it.
    crc: u32,
    bytes: u64,
    synced: u64,
}

/// Why a transfer ends.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Lost(#[from] Lost),
    #[error("another connection takes its place")]
    Displaced,
    #[error("the sender says: {0}")]
    Failed(String),
    #[error("{0}")]
    Damaged(String),
    #[error(transparent)]
    Disk(#[from] LogError),
    #[error("no replica here has a use for the snapshot")]
    Unwanted,
    #[error("too many snapshots are being received")]
    Busy,
    #[error("the replica has not taken the snapshot in time")]
    Late,
    #[error("the node is stopping")]
    Stopping,
}

impl Fault {
    /// Whether the transfer may go on over another connection.
    fn is_a_break(&self) -> bool {
        match self {
            Fault::Lost(lost) => matches!(lost, Lost::Ended | Lost::Silent | Lost::Socket(_)),
            other => matches!(other, Fault::Displaced),
        }
    }

    /// What to tell the sender, if it may still listen.
    fn reason(&self) -> Option<Failure> {
        match self {
            Fault::Lost(_) | Fault::Displaced | Fault::Failed(_) => None,
            Fault::Damaged(_) => Some(Failure::Damaged),
            Fault::Disk(_) => Some(Failure::Disk),
            Fault::Unwanted => Some(Failure::Unwanted),
            Fault::Busy | Fault::Late => Some(Failure::Busy),
            Fault::Stopping => Some(Failure::Stopping),
        }
    }
}

impl Partial {
    fn create(disk: Arc<dyn Disk>, offer: Offer, table: Table) -> Result<Partial, LogError> {
        let SnapshotId { partition, index } = offer.id;
        let writer = SnapshotWriter::receive(disk, partition, index, &offer.meta.encode())?;
        Ok(Partial { offer, writer, table, chunks: 0, crc: 0, bytes: 0, synced: 0 })
    }

    /// Adds a chunk. After an error it is of no use any more.
    fn add(&mut self, number: u64, crc: u32, bytes: &[u8]) -> Result<(), Fault> {
        let damaged = |what: &str| Err(Fault::Damaged(format!("{what} in chunk {number}")));
        if number != self.chunks {
            return damaged("a hole");
        }
        if crc32c::crc32c(bytes) != crc {
            return damaged("a wrong checksum");
        }
        self.chunks += 1;
        self.crc = wire::chain(self.crc, crc);
        self.bytes += bytes.len() as u64;
        if self.bytes > self.offer.size {
            return damaged("more than was offered");
        }
        if let Err(error) = self.table.load(bytes) {
            return damaged(&error.to_string());
        }
        self.writer.chunk(bytes)?;
        if self.bytes - self.synced >= SYNC_BYTES {
            self.writer.sync()?;
            self.synced = self.bytes;
        }
        Ok(())
    }
}

/// The place of a transfer that is under way; given back when it is dropped.
struct Claim {
    receiver: Arc<Receiver>,
    partition: u16,
    displaced: Arc<Notify>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.receiver.transfers.lock().active.remove(&self.partition);
    }
}

impl Claim {
    /// Gives the place back and keeps what has arrived. Returns what had to go for it.
    fn keep(self, partial: Partial) -> Option<Kept> {
        let mut transfers = self.receiver.transfers.lock();
        let until = Instant::now() + self.receiver.limits.keep;
        let replaced = transfers.kept.insert(self.partition, Kept { partial, until });
        if transfers.kept.len() <= self.receiver.limits.incoming {
            return replaced;
        }
        let oldest = transfers.kept.iter().min_by_key(|(_, kept)| kept.until);
        let oldest = oldest.map(|(partition, _)| *partition);
        oldest.and_then(|oldest| transfers.kept.remove(&oldest))
    }
}

impl Receiver {
    async fn serve(self: Arc<Receiver>, stream: BulkStream) {
        let from = stream.from;
        let socket = TcpStream::from_std(stream.stream.into());
        let (mut reader, mut writer) = match socket {
            Ok(socket) => wire::split(socket, stream.input),
            Err(error) => return tracing::warn!(%error, "a bulk connection cannot be used"),
        };
        let start = Instant::now();
        match Arc::clone(&self).take(&mut reader, &mut writer).await {
            Ok((id, bytes)) => {
                let ms = start.elapsed().as_millis() as u64;
                tracing::info!(
                    partition = id.partition,
                    index = id.index,
                    bytes,
                    ms,
                    "received a snapshot"
                );
            }
            Err(fault) => {
                match &fault {
                    Fault::Damaged(_) | Fault::Disk(_) => {
                        tracing::error!(node = from, error = %fault, "a snapshot is not taken");
                    }
                    _ => tracing::debug!(node = from, error = %fault, "a snapshot is not taken"),
                }
                if let Some(reason) = fault.reason() {
                    let text = fault.to_string();
                    let failed = Frame::Failed { reason: reason as u8, text: &text };
                    let _ = writer.send(&failed, self.limits.answer_timeout).await;
                }
            }
        }
    }

    /// Takes a snapshot from its offer to its end. Returns which one, and how long it was.
    async fn take(
        self: Arc<Receiver>,
        reader: &mut Reader,
        writer: &mut Writer,
    ) -> Result<(SnapshotId, u64), Fault> {
        let (offer, table) = match reader.next(self.limits.answer_timeout).await? {
            Frame::Offer(offer) => {
                let table = self.replicas.wanted(&offer).ok_or(Fault::Unwanted)?;
                let offer = Offer::from_frame(&offer);
                let misfit = || Fault::Damaged("its description does not fit the offer".to_owned());
                (offer.ok_or_else(misfit)?, table)
            }
            Frame::Failed { text, .. } => return Err(Fault::Failed(text.to_owned())),
            _ => return Err(Lost::Unexpected.into()),
        };
        let (claim, kept) = self.claim(offer.id.partition)?;
        let mut partial = Some(self.begin(kept, offer, table).await?);
        let ended = self.take_chunks(&mut partial, reader, writer, &claim.displaced).await;
        match (ended, partial) {
            (Ok(()), Some(partial)) => self.finish(partial, writer).await,
            (Err(fault), Some(partial)) if fault.is_a_break() => {
                let dropped = claim.keep(partial);
                let _ = blocking(move || drop(dropped)).await;
                Err(fault)
            }
            (ended, partial) => {
                // Dropping a large table takes long.
                let _ = blocking(move || drop(partial)).await;
                Err(ended.err().unwrap_or(Fault::Stopping))
            }
        }
    }

    /// Takes chunks until all are there. Nothing is left where one could not be taken.
    async fn take_chunks(
        &self,
        partial: &mut Option<Partial>,
        reader: &mut Reader,
        writer: &mut Writer,
        displaced: &Notify,
    ) -> Result<(), Fault> {
        let had = |partial: &Option<Partial>| partial.as_ref().map_or(0, |partial| partial.chunks);
        let crc = partial.as_ref().map_or(0, |partial| partial.crc);
        let accept = Frame::Accept { from_chunk: had(partial), crc };
        writer.send(&accept, self.limits.answer_timeout).await?;
        // When it has to make room: what is in the socket already is still taken, if that is soon.
        let mut ends = None;
        loop {
            let limit = ends.map_or(self.limits.idle_timeout, |_| QUIET);
            let next = tokio::select! {
                next = reader.next(limit) => next?,
                () = displaced.notified(), if ends.is_none() => {
                    ends = Some(Instant::now() + MAKE_ROOM);
                    continue;
                }
            };
            if ends.is_some_and(|ends| Instant::now() >= ends) {
                return Err(Fault::Displaced);
            }
            match next {
                Frame::Chunk { number, crc, bytes } => {
                    let (bytes, so_far) = (bytes.to_vec(), partial.take());
                    let added = blocking(move || {
                        let mut partial = so_far.ok_or(Fault::Stopping)?;
                        partial.add(number, crc, &bytes)?;
                        Ok::<Partial, Fault>(partial)
                    });
                    *partial = Some(added.await.ok_or(Fault::Stopping)??);
                }
                Frame::Done { chunks } if chunks == had(partial) => return Ok(()),
                Frame::Done { chunks } => {
                    let had = had(partial);
                    return Err(Fault::Damaged(format!("{had} of {chunks} chunks have come")));
                }
                Frame::Failed { text, .. } => return Err(Fault::Failed(text.to_owned())),
                _ => return Err(Lost::Unexpected.into()),
            }
        }
    }

    /// A place for a transfer of that partition, with what is kept of the one before.
    fn claim(self: &Arc<Receiver>, partition: u16) -> Result<(Claim, Option<Kept>), Fault> {
        let mut transfers = self.transfers.lock();
        if let Some(older) = transfers.active.get(&partition) {
            // It ends before the sender tries again.
            older.notify_one();
            return Err(Fault::Busy);
        }
        if transfers.active.len() >= self.limits.incoming {
            return Err(Fault::Busy);
        }
        let displaced = Arc::new(Notify::new());
        transfers.active.insert(partition, Arc::clone(&displaced));
        let kept = transfers.kept.remove(&partition);
        Ok((Claim { receiver: Arc::clone(self), partition, displaced }, kept))
    }

    /// Goes on with what was kept, if it is of the same snapshot, or begins anew.
    async fn begin(
        &self,
        kept: Option<Kept>,
        offer: Offer,
        table: Table,
    ) -> Result<Partial, Fault> {
        let disk = Arc::clone(&self.disk);
        let begun = blocking(move || match kept {
            Some(Kept { mut partial, .. }) if offer.continues(&partial.offer) => {
                partial.offer = offer;
                Ok(partial)
            }
            other => {
                drop(other);
                Partial::create(disk, offer, table)
            }
        });
        Ok(begun.await.ok_or(Fault::Stopping)??)
    }

    /// Makes the file durable, hands over the table, and tells the sender what has become of it.
    async fn finish(
        &self,
        partial: Partial,
        writer: &mut Writer,
    ) -> Result<(SnapshotId, u64), Fault> {
        let Partial { offer, writer: file, table, chunks, bytes, .. } = partial;
        let id = blocking(move || file.finish()).await.ok_or(Fault::Stopping)??;
        let (installed, answer) = oneshot::channel();
        let Offer { replica_from, replica_to, term, meta, .. } = offer;
        let received = Received { id, replica_from, replica_to, term, meta, table, installed };
        self.replicas.received(received);
        match timeout(self.limits.install_timeout, answer).await {
            Ok(Ok(true)) => {}
            Ok(_) => return Err(Fault::Unwanted),
            Err(_) => return Err(Fault::Late),
        }
        writer.send(&Frame::Done { chunks }, self.limits.answer_timeout).await?;
        Ok((id, bytes))
    }
}
