//! The tasks that publish one partition each: which there are, and what each one does.
//!
//! A task ends when its partition is not led any more. What it has out then may still arrive, which
//! does no harm: see [`crate::lane`].
//!
//! What this module does not do: connect.

use std::collections::HashMap;

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::*;
use crate::amqp::Outcome;
use crate::feed::Led;
use crate::lane::Failure;

/// With batches, the time from one read to the next where the first did not fill a message: a small message
/// costs as much as a large one. The first change after a while is not held up.
const GATHERING: Duration = Duration::from_millis(20);
/// A task that failed is begun again after this.
const FAILED: Duration = Duration::from_secs(5);

/// Publishes all partitions that are led, until the publisher stops.
pub(super) async fn run(
    shared: &Arc<Shared>,
    links: watch::Receiver<Option<Link>>,
    mut stopping: watch::Receiver<bool>,
) {
    let mut led = shared.feed.led();
    let mut lanes = Lanes {
        shared,
        links,
        stopping: stopping.clone(),
        running: HashMap::new(),
        tasks: JoinSet::new(),
    };
    loop {
        let now: Arc<[Led]> = led.borrow_and_update().clone();
        lanes.follow(&now);
        tokio::select! {
            changed = led.changed() => if changed.is_err() { break },
            Some(ended) = lanes.tasks.join_next_with_id() => lanes.ended(ended),
            () = stopped(&mut stopping) => break,
        }
    }
    let all_ended = async { while lanes.tasks.join_next().await.is_some() {} };
    if timeout(STOPPING, all_ended).await.is_err() {
        lanes.tasks.shutdown().await;
    }
    for (partition, _) in lanes.running.drain() {
        shared.metrics.end_lane(partition);
        shared.troubles.forget(partition);
    }
}

struct Lanes<'a> {
    shared: &'a Arc<Shared>,
    links: watch::Receiver<Option<Link>>,
    stopping: watch::Receiver<bool>,
    running: HashMap<u16, Running>,
    tasks: JoinSet<()>,
}

struct Running {
    term: u64,
    task: AbortHandle,
}

impl Lanes<'_> {
    /// Ends and begins tasks so that exactly what is led is published.
    fn follow(&mut self, led: &[Led]) {
        let terms: HashMap<u16, u64> = led.iter().map(|led| (led.partition, led.term)).collect();
        let shared = self.shared;
        self.running.retain(|partition, running| {
            let stays = terms.get(partition) == Some(&running.term);
            if !stays {
                running.task.abort();
                shared.metrics.end_lane(*partition);
                shared.troubles.forget(*partition);
            }
            stays
        });
        for led in led {
            if !self.running.contains_key(&led.partition) {
                self.begin(*led, Duration::ZERO);
            }
        }
    }

    fn begin(&mut self, led: Led, delay: Duration) {
        let Led { partition, term, cursor } = led;
        let max_events = self.shared.config.batch_max_events;
        let task = LaneTask {
            lane: Lane::new(led, max_events),
            shared: self.shared.clone(),
            links: self.links.clone(),
            stopping: self.stopping.clone(),
            metrics: self.shared.metrics.begin_lane(partition, term, cursor),
            held: None,
        };
        let task = self.tasks.spawn(task.run(delay));
        self.running.insert(partition, Running { term, task });
    }

    /// A task that panicked begins again at its cursor: the others, and the node, go on.
    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let Err(error) = ended else { return };
        let found = self.running.iter().find(|(_, running)| running.task.id() == error.id());
        let Some((&partition, running)) = found.filter(|_| error.is_panic()) else { return };
        tracing::error!(partition, "publishing failed at a broken invariant; begins again");
        let led = Led { partition, term: running.term, ..self.last_led(partition) };
        self.begin(led, FAILED);
    }

    fn last_led(&self, partition: u16) -> Led {
        let led = self.shared.feed.led();
        let found = led.borrow().iter().find(|led| led.partition == partition).copied();
        found.unwrap_or(Led { partition, term: 0, cursor: Default::default() })
    }
}

/// What can be wrong with one message, one thing at a time.
const OF_MESSAGES: [Trouble; 3] = [Trouble::Unroutable, Trouble::Nacked, Trouble::TooLarge];

/// Publishes one partition.
struct LaneTask {
    lane: Lane,
    shared: Arc<Shared>,
    links: watch::Receiver<Option<Link>>,
    stopping: watch::Receiver<bool>,
    metrics: Arc<LaneMetrics>,
    /// Room for what was read and is not confirmed.
    held: Option<Held>,
}

/// Room in what may be in flight, given back when it is dropped.
struct Held {
    metrics: Arc<Metrics>,
    permit: OwnedSemaphorePermit,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.metrics.in_flight_bytes.fetch_sub(self.permit.num_permits() as u64, Relaxed);
    }
}

/// What was read.
enum Read {
    Chunk(Chunk),
    Rows(crate::feed::Rows),
}

impl Read {
    /// The count of changes or rows, and their bytes.
    fn size(&self) -> (usize, usize) {
        let events = match self {
            Read::Chunk(Chunk::Changes { events, .. }) => events,
            Read::Chunk(Chunk::Gap(_)) => return (0, 0),
            Read::Rows(rows) => &rows.events,
        };
        (events.len(), events.iter().map(flux_proto::event::Event::bytes).sum())
    }
}

impl LaneTask {
    async fn run(mut self, delay: Duration) {
        let mut stopping = self.stopping.clone();
        if !delay.is_zero() && !pause(delay, &mut stopping).await {
            return;
        }
        let mut failures = 0;
        let mut gathers_until = Instant::now();
        loop {
            let Some(want) = self.lane.want() else {
                if !self.send().await {
                    return;
                }
                continue;
            };
            self.held = None;
            let gathers_for = gathers_until.saturating_duration_since(Instant::now());
            if !gathers_for.is_zero() && !pause(gathers_for, &mut stopping).await {
                return;
            }
            let read = tokio::select! {
                read = self.read(&want) => read,
                () = stopped(&mut stopping) => return,
            };
            let partition = Some(self.lane.partition());
            match read {
                Ok(read) => {
                    failures = 0;
                    self.shared.troubles.end(Trouble::Unreadable, partition);
                    let (count, bytes) = read.size();
                    let max_events = self.shared.config.batch_max_events;
                    let is_chunk = matches!(read, Read::Chunk(_));
                    if is_chunk && count < max_events && bytes < MAX_MESSAGE_BYTES / 2 {
                        gathers_until = Instant::now() + GATHERING;
                    }
                    self.take(read);
                }
                Err(FeedError::Restart) => {
                    self.lane.restart();
                    if !pause(READ_AGAIN.pause(1), &mut stopping).await {
                        return;
                    }
                }
                Err(FeedError::Stopping) => return,
                Err(FeedError::Later) => {
                    failures = 0;
                    if !pause(READ_AGAIN.first, &mut stopping).await {
                        return;
                    }
                }
                // A replica that leaves is not led any more, which ends this task.
                Err(error) => {
                    if matches!(error, FeedError::Log(_)) {
                        self.shared.troubles.begin(
                            Trouble::Unreadable,
                            partition,
                            &error.to_string(),
                        );
                    }
                    failures += 1;
                    if !pause(READ_AGAIN.pause(failures), &mut stopping).await {
                        return;
                    }
                }
            }
        }
    }

    /// Reads what the lane wants, when there is room for it in what may be in flight.
    async fn read(&mut self, want: &Want) -> Result<Read, FeedError> {
        let shared = self.shared.clone();
        let events = shared.config.batch_max_events;
        let mut limit = Limit { events, bytes: MAX_MESSAGE_BYTES, synced: true, here_only: false };
        loop {
            let read = match want {
                Want::Read { after } => {
                    Read::Chunk(shared.feed.read(self.lane.partition(), *after, limit).await?)
                }
                Want::Rows { gap, from } => Read::Rows(shared.feed.rows(gap, *from, limit).await?),
            };
            if let Read::Chunk(Chunk::Changes { events, .. }) = &read {
                self.metrics.has_read(events[0].committed_at_ms);
            }
            let (count, bytes) = read.size();
            let needed = (2 * bytes + count * EVENT_OVERHEAD_BYTES).try_into().unwrap_or(u32::MAX);
            let needed = needed.min(shared.in_flight_bytes);
            let permits = shared.permits.clone();
            let room = self.held.as_ref().map_or(0, |held| held.permit.num_permits());
            if room >= needed as usize {
                return Ok(read);
            }
            self.held = None;
            if let Ok(permit) = permits.clone().try_acquire_many_owned(needed) {
                self.hold(permit);
                return Ok(read);
            }
            // What waits for room must not take any.
            drop(read);
            limit = Limit { events: count, bytes, ..limit };
            let acquired = permits.acquire_many_owned(needed).await;
            self.hold(acquired.map_err(|_| FeedError::Stopping)?);
        }
    }

    fn hold(&mut self, permit: OwnedSemaphorePermit) {
        let metrics = self.shared.metrics.clone();
        metrics.in_flight_bytes.fetch_add(permit.num_permits() as u64, Relaxed);
        self.held = Some(Held { metrics, permit });
    }

    fn take(&mut self, read: Read) {
        match read {
            Read::Chunk(Chunk::Changes { events, through }) => self.lane.changes(events, through),
            Read::Rows(rows) => self.lane.rows(rows),
            Read::Chunk(Chunk::Gap(gap)) => {
                let lost = gap.lost.end() - gap.lost.start() + 1;
                let metrics = &self.shared.metrics;
                metrics.gaps.fetch_add(1, Relaxed);
                metrics.gap_revisions.fetch_add(lost, Relaxed);
                self.metrics.gap();
                tracing::error!(
                    partition = gap.partition,
                    lost_from = gap.lost.start(),
                    lost_to = gap.lost.end(),
                    "changes are lost to the broker, which gets the current values instead: no log has \
                     them, kept up to cdc_retention_bytes"
                );
                self.lane.gap(gap);
            }
        }
    }

    /// Sends the lane's message once. Ends with false where the publisher stops.
    async fn send(&mut self) -> bool {
        let mut stopping = self.stopping.clone();
        let link = tokio::select! {
            link = self.links.wait_for(Option::is_some) => match link {
                Ok(link) => link.clone(),
                Err(_) => None,
            },
            () = stopped(&mut stopping) => None,
        };
        let (Some(link), Some(message)) = (link, self.lane.message()) else { return false };
        let records = message.records().len() as u64;
        let shared = &self.shared;
        let batches = shared.config.batch_max_events > 1;
        let publication = Publication::new(shared.feed.cluster(), message, batches);
        shared.metrics.published.fetch_add(records, Relaxed);
        // A stop waits for this, for a while.
        let outcome = link.publish(publication).await;
        let partition = Some(self.lane.partition());
        let (trouble, what, failure, backoff) = match outcome {
            Outcome::Stored => {
                shared.metrics.confirmed.fetch_add(records, Relaxed);
                for trouble in OF_MESSAGES {
                    shared.troubles.end(trouble, partition);
                }
                if let Some(cursor) = self.lane.confirmed() {
                    self.metrics.confirmed(cursor);
                    self.shared.feed.advance(self.lane.partition(), cursor);
                }
                return true;
            }
            // The next connection sends it again, and waiting for that is pause enough.
            Outcome::Unknown => {
                self.lane.failed(Failure::Unknown);
                return true;
            }
            Outcome::Returned { reason } => {
                shared.metrics.returned.fetch_add(1, Relaxed);
                let what = format!("a message came back, {reason}");
                (Trouble::Unroutable, what, Failure::Nowhere, RESEND)
            }
            Outcome::Refused => {
                shared.metrics.refused.fetch_add(1, Relaxed);
                let what = "the broker refused a message".to_owned();
                (Trouble::Nacked, what, Failure::Refused, RESEND)
            }
            Outcome::TooLarge { reason } => {
                (Trouble::TooLarge, reason, Failure::Nowhere, TOO_LARGE)
            }
        };
        shared.troubles.begin(trouble, partition, &what);
        for other in OF_MESSAGES.into_iter().filter(|&other| other != trouble) {
            shared.troubles.end(other, partition);
        }
        self.lane.failed(failure);
        if self.lane.message().is_none() {
            // Others may have its room until it is read anew.
            self.held = None;
        }
        pause(backoff.pause(self.lane.failures()), &mut stopping).await
    }
}
