//! The node's committed changes, for those who follow them: the publisher and watchers.
//!
//! What is recent comes from memory, what is older from the log on disk, what the log here does not have from
//! another node's, and what is nowhere any more is a gap, with the current values in its place. Nothing here
//! decides what is committed or puts anything into the log: the worker does, see `worker/captured.rs`.

mod catch_up;
mod decode;
mod elsewhere;
mod nodes;
mod partition;
pub(crate) mod publish;
pub(crate) mod report;
mod rows;
pub(crate) mod watch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flux_cdc::{BoxFuture, Chunk, Feed, FeedError, Led, Limit, RowMark, Rows};
use flux_core::feed::{Committed, RingRead};
use flux_core::{Cursor, PartitionId};
use flux_log::LogReader;
use flux_proto::event::{Event, Gap, Place};
use tokio::sync::watch::Receiver;

use catch_up::CatchUp;
use elsewhere::{Answer, Elsewhere, NodeOthers};
pub(crate) use nodes::Nodes;
use partition::Older;
pub(crate) use partition::PartitionFeed;

use crate::clock::monotonic_us;
use crate::config::Fsync;
use crate::shared::{PartitionView, Shared};

/// What is read of the log at a time, in bytes: a pass over it is dear. Each partition may keep so much.
const LEAST_LOG_READ_BYTES: usize = 64 << 10;
const MOST_LOG_READ_BYTES: usize = 1 << 20;
/// Who waits for changes says so again after a third of the time for which that holds.
const RENEWAL: Duration = Duration::from_micros(partition::INTEREST_US / 3);

/// The feed of this node's replicas.
#[derive(Debug)]
pub(crate) struct NodeFeed {
    shared: Arc<Shared>,
    /// By worker.
    logs: Vec<CatchUp>,
    elsewhere: Elsewhere,
}

/// What of the log here comes behind a revision.
enum Own {
    Entries(Arc<[Older]>),
    /// It does not have that. What comes behind this revision it has, if that is known.
    Missing {
        until: Option<u64>,
    },
}

impl NodeFeed {
    /// A feed that reads the workers' logs back, each in a thread of its own.
    pub(crate) fn start(shared: &Arc<Shared>, readers: Vec<LogReader>) -> io::Result<NodeFeed> {
        let start = |(worker, reader)| CatchUp::start(worker, reader, Arc::clone(shared));
        let logs = (0..).zip(readers).map(start).collect::<io::Result<_>>()?;
        let elsewhere = Elsewhere::new(Arc::new(NodeOthers(Arc::clone(shared))));
        Ok(NodeFeed { shared: Arc::clone(shared), logs, elsewhere })
    }

    fn view(&self, partition: u16) -> Result<&PartitionView, FeedError> {
        self.shared.views.get(usize::from(partition)).ok_or(FeedError::NotHere)
    }

    /// Whether a reader waits for more to be synced. With `always` everything that is applied is, and with `no`
    /// nothing ever is for sure.
    fn waits_for_sync(&self, limit: Limit) -> bool {
        limit.synced && self.shared.settings.fsync == Fsync::EverySec
    }

    /// What comes next, if there is something.
    async fn next(
        &self,
        partition: u16,
        after: u64,
        limit: Limit,
    ) -> Result<Option<Chunk>, FeedError> {
        let view = self.view(partition)?;
        let applied = view.standing.place().ok_or(FeedError::NotHere)?;
        let at = if self.waits_for_sync(limit) { view.feed.synced() } else { applied };
        match view.feed.recent(after, limit.bytes) {
            Some(RingRead::Entries(entries)) => {
                view.feed.end_place(after);
                return self.chunk(partition, after, at.revision, limit, &entries);
            }
            Some(RingRead::UpToDate) => return Ok(None),
            // What was replaced as a whole may be ahead of what is in memory for a moment.
            Some(RingRead::Older { .. }) | None if applied.revision <= after => return Ok(None),
            Some(RingRead::Older { .. }) | None => {}
        }
        // A gap of less than this would hold nothing.
        if at.revision <= after {
            return Ok(None);
        }
        let (place, fetches) = ((partition, after, at.revision), &view.feed.fetches);
        if !limit.here_only
            && let Some(answer) = self.elsewhere.go_on(fetches, place, limit).await
        {
            return self.looked_for_elsewhere(view, place, at, answer).map(Some);
        }
        let older = match self.own(view, partition, after).await? {
            Own::Entries(older) => older,
            Own::Missing { until } if !limit.here_only => {
                let until = until.unwrap_or(applied.revision);
                let answer = self.elsewhere.begin(fetches, place, until, limit).await;
                return self.looked_for_elsewhere(view, place, at, answer).map(Some);
            }
            Own::Missing { .. } => return Ok(Some(Chunk::Gap(self.gap(partition, after, at)))),
        };
        let entries = older.iter().map(|one| &one.entry);
        let chunk = self.chunk(partition, after, at.revision, limit, entries)?;
        if let Some(Chunk::Changes { through, .. }) = &chunk
            && let Some(last) = older.iter().find(|one| one.entry.last >= through.revision)
        {
            view.feed.move_place(after, cursor(*through), Some(last.lsn), monotonic_us());
        }
        Ok(chunk)
    }

    /// What other nodes have of what is not here.
    fn looked_for_elsewhere(
        &self,
        view: &PartitionView,
        (partition, after, _): (u16, u64, u64),
        at: Cursor,
        answer: Answer,
    ) -> Result<Chunk, FeedError> {
        let events = match answer {
            Answer::Changes(events) => events,
            Answer::Later => return Err(FeedError::Later),
            Answer::Nobody => {
                self.shared.stats.feed_gaps.add(1);
                return Ok(Chunk::Gap(self.gap(partition, after, at)));
            }
        };
        self.shared.stats.feed_remote_changes.add(events.len() as u64);
        let revision = events.last().map_or(after, |last| last.revision);
        // Other nodes do not say which entry of the log holds a change. The index of a place says from where
        // on the log is needed, nothing else: cursors and places are compared by revision, a cursor with an
        // index that is too low has every replica keep more than it must, within retention, until the next
        // one moves past what came from elsewhere. So any lower bound will do, and the index of the cursor
        // that the group has is one for all revisions behind it.
        let known = view.feed.cursor();
        let index = if known.revision <= after { known.index } else { 0 };
        let through = Place { revision, index };
        // The log here must still have what follows when this reader comes to it.
        view.feed.move_place(after, cursor(through), None, monotonic_us());
        Ok(Chunk::Changes { events, through })
    }

    /// Entries of the log here from the one with the next revision on.
    async fn own(
        &self,
        view: &PartitionView,
        partition: u16,
        after: u64,
    ) -> Result<Own, FeedError> {
        if let Some(older) = view.feed.read_before(after) {
            return Ok(Own::Entries(older));
        }
        let log = &self.logs[usize::from(self.shared.owner(PartitionId(partition)))];
        let share = self.shared.settings.cdc_memory_bytes as usize / self.shared.views.len();
        let bytes = share.clamp(LEAST_LOG_READ_BYTES, MOST_LOG_READ_BYTES);
        let from = view.feed.place_of(after);
        let read = log.read(partition, after, from, bytes).await;
        match read.ok_or_else(|| self.reader_ended())? {
            Ok(catch_up::Read::Entries(older)) => {
                view.feed.keep_read(Arc::clone(&older));
                Ok(Own::Entries(older))
            }
            Ok(catch_up::Read::Missing { until }) => Ok(Own::Missing { until }),
            Err(error) => Err(FeedError::Log(error)),
        }
    }

    /// Why nobody reads the log back any more.
    fn reader_ended(&self) -> FeedError {
        match self.shared.stopping.load(Ordering::Relaxed) {
            true => FeedError::Stopping,
            false => FeedError::Log("the thread that reads it has ended".to_owned()),
        }
    }

    /// The changes behind `after`, up to a revision and the limit.
    fn chunk<'a>(
        &self,
        partition: u16,
        after: u64,
        up_to: u64,
        limit: Limit,
        entries: impl IntoIterator<Item = &'a Arc<Committed>>,
    ) -> Result<Option<Chunk>, FeedError> {
        let feed = &self.view(partition)?.feed;
        let (mut events, mut bytes): (Vec<Event>, usize) = (Vec::new(), 0);
        let mut through = Place::default();
        'entries: for entry in entries {
            if entry.last <= after {
                continue;
            }
            let all = feed
                .events_of(partition, entry)
                .map_err(|error| FeedError::Log(format!("entry {:?}: {error}", entry.position)))?;
            let known = all.partition_point(|event| event.revision <= after);
            for event in &all[known..] {
                bytes += event.bytes();
                let is_full = events.len() >= limit.events || bytes > limit.bytes;
                if event.revision > up_to || (is_full && !events.is_empty()) {
                    break 'entries;
                }
                through = place(entry.read_to(event.revision));
                events.push(event.clone());
            }
        }
        if events.is_empty() {
            return Ok(None);
        }
        if events[0].revision != after + 1 {
            let found = events[0].revision;
            return Err(FeedError::Log(format!(
                "revision {found} came where {} should",
                after + 1
            )));
        }
        Ok(Some(Chunk::Changes { events, through }))
    }

    /// Everything after a revision is lost to its reader, up to this one.
    fn gap(&self, partition: u16, after: u64, at: Cursor) -> Gap {
        let led = self.shared.led.borrow();
        let term = led.iter().find(|one| one.partition == partition).map_or(0, |one| one.term);
        Gap { partition, lost: after + 1..=at.revision, at: place(at), term }
    }
}

fn cursor(place: Place) -> Cursor {
    Cursor { revision: place.revision, index: place.index }
}

fn place(cursor: Cursor) -> Place {
    Place { revision: cursor.revision, index: cursor.index }
}

impl Feed for NodeFeed {
    fn cluster(&self) -> &str {
        &self.shared.settings.cluster_name
    }

    fn partitions(&self) -> u16 {
        self.shared.partitions.count()
    }

    fn led(&self) -> Receiver<Arc<[Led]>> {
        self.shared.led.subscribe()
    }

    fn newest(&self, partition: u16) -> Option<u64> {
        self.view(partition).ok()?.standing.place().map(|at| at.revision)
    }

    fn read(
        &self,
        partition: u16,
        after: u64,
        limit: Limit,
    ) -> BoxFuture<'_, Result<Chunk, FeedError>> {
        Box::pin(async move {
            let feed = &self.view(partition)?.feed;
            loop {
                let grown = feed.grown(self.waits_for_sync(limit));
                tokio::pin!(grown);
                // From here on what grows is heard of.
                grown.as_mut().enable();
                feed.want(monotonic_us());
                feed.fetches.sweep();
                if let Some(chunk) = self.next(partition, after, limit).await? {
                    return Ok(chunk);
                }
                if self.shared.stopping.load(Ordering::Relaxed) {
                    return Err(FeedError::Stopping);
                }
                let _ = tokio::time::timeout(RENEWAL, grown).await;
            }
        })
    }

    fn rows<'a>(
        &'a self,
        gap: &'a Gap,
        from: Option<RowMark>,
        limit: Limit,
    ) -> BoxFuture<'a, Result<Rows, FeedError>> {
        Box::pin(async move {
            let view = self.view(gap.partition)?;
            let now_us = monotonic_us();
            // The changes behind the rows are read next.
            view.feed.want(now_us);
            view.feed.move_place(gap.at.revision, cursor(gap.at), None, now_us);
            rows::page(view, gap, from, limit)
        })
    }

    fn row(&self, gap: &Gap, key: &[u8]) -> Result<Option<Event>, FeedError> {
        let view = self.view(gap.partition)?;
        view.feed.want(monotonic_us());
        rows::one(view, gap, key)
    }

    fn begin_rows(&self, partition: u16) -> Result<Gap, FeedError> {
        let view = self.view(partition)?;
        view.feed.want(monotonic_us());
        let at = view.standing.place().ok_or(FeedError::NotHere)?;
        Ok(self.gap(partition, 0, at))
    }

    fn advance(&self, partition: u16, to: Place) {
        if let Ok(view) = self.view(partition) {
            view.feed.confirm(cursor(to));
        }
    }
}
