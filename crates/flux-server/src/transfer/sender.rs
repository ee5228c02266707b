//! The sending side: a few transfers at a time, each tried again until it is done or hopeless.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_log::{Disk, LogError, SnapshotId};
use flux_proto::peer::{
    Failure, Frame, LinkKind, MIN_VERSION, SnapshotOffer, VERSION, encode_hello,
};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{Id, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::Instrument as _;

use super::TransferLimits;
use super::rate::Rate;
use super::source::{Source, SourceError};
use super::wire::{self, Lost, Reader, Writer};
use crate::peer::{LocalIdentity, configure};

/// A snapshot to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing {
    pub(crate) node: u32,
    pub(crate) address: SocketAddr,
    /// Which file of the node's snapshots.
    pub(crate) id: SnapshotId,
    pub(crate) replica_from: u64,
    pub(crate) replica_to: u64,
    /// The sender's term.
    pub(crate) term: u64,
}

impl Outgoing {
    /// At most one transfer at a time is for the same replica.
    fn receiver(&self) -> (u16, u64) {
        (self.id.partition, self.replica_to)
    }
}

/// A snapshot to be sent, and whom to tell. Dropped before it is done, it says so.
pub(super) struct Job {
    outgoing: Outgoing,
    on_done: Option<Box<dyn FnOnce(bool) + Send>>,
}

impl Job {
    pub(super) fn new(outgoing: Outgoing, on_done: impl FnOnce(bool) + Send + 'static) -> Job {
        Job { outgoing, on_done: Some(Box::new(on_done)) }
    }

    fn done(&mut self, taken: bool) {
        if let Some(on_done) = self.on_done.take() {
            on_done(taken);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.done(false);
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("outgoing", &self.outgoing).finish_non_exhaustive()
    }
}

/// Carries out what comes until the other end of the queue is dropped.
pub(super) async fn run(
    local: LocalIdentity,
    disk: Arc<dyn Disk>,
    limits: TransferLimits,
    mut jobs: mpsc::Receiver<Job>,
) {
    let rate = Rate::new(limits.bytes_per_second);
    let sender = Arc::new(Sender { local, disk, limits, rate });
    let mut waiting: VecDeque<Job> = VecDeque::new();
    let mut running = JoinSet::new();
    // To whom each task sends.
    let mut receivers: Vec<(Id, (u16, u64))> = Vec::new();
    loop {
        let is_free = |job: &Job| receivers.iter().all(|(_, to)| *to != job.outgoing.receiver());
        let next = waiting.iter().position(is_free).filter(|_| running.len() < limits.outgoing);
        if let Some(job) = next.and_then(|next| waiting.remove(next)) {
            let receiver = job.outgoing.receiver();
            let task = running.spawn(Arc::clone(&sender).carry_out(job).in_current_span());
            receivers.push((task.id(), receiver));
            continue;
        }
        tokio::select! {
            job = jobs.recv() => {
                let Some(job) = job else { break };
                waiting.retain(|older| older.outgoing.receiver() != job.outgoing.receiver());
                if waiting.len() < limits.waiting {
                    waiting.push_back(job);
                }
            }
            Some(ended) = running.join_next_with_id(), if !running.is_empty() => {
                let id = match ended {
                    Ok((id, ())) => id,
                    Err(error) => {
                        tracing::error!(%error, "a transfer of a snapshot failed");
                        error.id()
                    }
                };
                receivers.retain(|(task, _)| *task != id);
            }
        }
    }
    running.shutdown().await;
}

/// Why an attempt has failed.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    #[error("cannot connect within the time limit")]
    ConnectTimeout,
    #[error("refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Lost(#[from] Lost),
    #[error("the receiver says: {text}")]
    Failed { reason: Option<Failure>, text: String },
    #[error(transparent)]
    Source(#[from] SourceError),
}

impl Setback {
    /// Whether another attempt can only end the same way.
    fn is_final(&self) -> bool {
        match self {
            Setback::Failed { reason, .. } => *reason == Some(Failure::Unwanted),
            // The receiver forgets them, and begins anew.
            Setback::Source(SourceError::OtherChunks(_)) => false,
            Setback::Source(_) | Setback::Lost(Lost::TooLarge(_)) => true,
            Setback::Connect(_)
            | Setback::ConnectTimeout
            | Setback::Refused(_)
            | Setback::Lost(_) => false,
        }
    }

    /// What the receiver answered in place of what was due.
    fn from_answer(frame: &Frame<'_>) -> Setback {
        match frame {
            Frame::Refused { text, .. } => Setback::Refused((*text).to_owned()),
            Frame::Failed { reason, text } => {
                let reason = Failure::from_number(*reason);
                Setback::Failed { reason, text: (*text).to_owned() }
            }
            _ => Lost::Unexpected.into(),
        }
    }
}

struct Sender {
    local: LocalIdentity,
    disk: Arc<dyn Disk>,
    limits: TransferLimits,
    rate: Rate,
}

impl Sender {
    async fn carry_out(self: Arc<Sender>, mut job: Job) {
        let Outgoing { node, id, replica_to, .. } = job.outgoing;
        let (node, replica) = (NodeId(node), format!("{replica_to:016x}"));
        let start = Instant::now();
        match self.try_often(&job.outgoing).await {
            Ok(bytes) => {
                let ms = start.elapsed().as_millis() as u64;
                tracing::info!(
                    partition = id.partition, index = id.index, %node, replica, bytes, ms,
                    "sent a snapshot"
                );
                job.done(true);
            }
            Err(error) => {
                if let Setback::Source(SourceError::File(LogError::Damaged { .. })) = error {
                    tracing::error!(partition = id.partition, index = id.index, %error, "not sent");
                } else {
                    tracing::warn!(
                        partition = id.partition, index = id.index, %node, replica, %error,
                        "a snapshot was not taken"
                    );
                }
                job.done(false);
            }
        }
    }

    /// Returns the length of the file once the receiver has it.
    async fn try_often(&self, outgoing: &Outgoing) -> Result<u64, Setback> {
        let mut source = Source::open(Arc::clone(&self.disk), outgoing.id).await?;
        let (meta, size) = source.description();
        let offer = SnapshotOffer {
            partition: outgoing.id.partition,
            replica_from: outgoing.replica_from,
            replica_to: outgoing.replica_to,
            term: outgoing.term,
            index: outgoing.id.index,
            size,
            meta: &meta,
        };
        let (mut failures, mut best) = (0, None);
        loop {
            let mut accepted = None;
            let setback = match self.attempt(outgoing, &offer, &mut source, &mut accepted).await {
                Ok(()) => return Ok(size),
                Err(setback) => setback,
            };
            if accepted > best {
                (failures, best) = (0, accepted);
            }
            failures += 1;
            if setback.is_final() || failures >= self.limits.attempts {
                return Err(setback);
            }
            tracing::debug!(
                partition = offer.partition, index = offer.index, node = %NodeId(outgoing.node),
                error = %setback, "a transfer broke off"
            );
            sleep(self.pause(failures)).await;
        }
    }

    fn pause(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        self.limits.first_pause.saturating_mul(1 << doublings).min(self.limits.longest_pause)
    }

    /// One connection. `accepted` is set to the chunk that the receiver asks for.
    async fn attempt(
        &self,
        outgoing: &Outgoing,
        offer: &SnapshotOffer<'_>,
        source: &mut Source,
        accepted: &mut Option<u64>,
    ) -> Result<(), Setback> {
        let (mut reader, mut writer) = self.connect(outgoing).await?;
        let (idle, answer) = (self.limits.idle_timeout, self.limits.answer_timeout);
        writer.send(&Frame::Offer(*offer), idle).await?;
        let first = match reader.next(answer).await? {
            Frame::Accept { from_chunk, crc } => (from_chunk, crc),
            other => return Err(Setback::from_answer(&other)),
        };
        *accepted = Some(first.0);
        if let Err(error) = self.stream(source, first, &mut reader, &mut writer).await {
            if let Setback::Source(error) = &error {
                let text = error.to_string();
                let reason = match error {
                    SourceError::OtherChunks(_) => Failure::Damaged,
                    _ => Failure::Disk,
                };
                let failed = Frame::Failed { reason: reason as u8, text: &text };
                let _ = writer.send(&failed, answer).await;
            }
            return Err(error);
        }
        writer.send(&Frame::Done { chunks: source.number() }, idle).await?;
        match reader.next(idle + self.limits.install_timeout).await? {
            Frame::Done { .. } => Ok(()),
            other => Err(Setback::from_answer(&other)),
        }
    }

    async fn connect(&self, outgoing: &Outgoing) -> Result<(Reader, Writer), Setback> {
        let connecting = TcpStream::connect(outgoing.address);
        let stream = timeout(self.limits.connect_timeout, connecting).await;
        let stream = stream.map_err(|_| Setback::ConnectTimeout)?.map_err(Setback::Connect)?;
        configure(&stream, self.limits.idle_timeout).map_err(Lost::Socket)?;
        let (mut reader, mut writer) = wire::split(stream, Vec::new());
        let mut hello = self.local.hello(outgoing.node, LinkKind::Bulk);
        hello.worker = 0;
        let mut bytes = Vec::new();
        encode_hello(&mut bytes, &hello);
        writer.send_bytes(&bytes, self.limits.answer_timeout).await?;
        match reader.next(self.limits.answer_timeout).await? {
            Frame::Welcome { version: MIN_VERSION..=VERSION, .. } => Ok((reader, writer)),
            other => Err(Setback::from_answer(&other)),
        }
    }

    /// Sends the chunks from `first` on, which comes with the checksum of those before it.
    async fn stream(
        &self,
        source: &mut Source,
        first: (u64, u32),
        reader: &mut Reader,
        writer: &mut Writer,
    ) -> Result<(), Setback> {
        let idle = self.limits.idle_timeout;
        source.seek(first.0, first.1).await?;
        loop {
            let number = source.number();
            let Some(bytes) = source.next().await? else { return Ok(()) };
            let crc = crc32c::crc32c(&bytes);
            let chunk = Frame::Chunk { number, crc, bytes: &bytes };
            let send = async {
                self.rate.take(bytes.len()).await;
                writer.send(&chunk, idle).await
            };
            let sent = tokio::select! {
                // The receiver says something only to end it.
                answer = reader.next(Duration::MAX) => {
                    return Err(Setback::from_answer(&answer?));
                }
                sent = send => sent,
            };
            if let Err(lost) = sent {
                // Why it closed the connection may still be there to be read.
                return Err(match reader.next(self.limits.answer_timeout).await {
                    Ok(answer) => Setback::from_answer(&answer),
                    Err(_) => lost.into(),
                });
            }
        }
    }
}
