//! A feed in memory, for tests and examples: it behaves as a node's does, and whoever holds it
//! decides what is committed, led, synced and forgotten.
//!
//! What this module does not do: outlive the process, or agree with anybody.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use flux_proto::event::{Event, Gap, Op, Place};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::feed::{BoxFuture, Chunk, Feed, FeedError, Led, Limit, RowMark, Rows};

/// Changes of some partitions, and the table that they make.
///
/// An entry holds one change, and the first entry of a partition holds none: the index of a revision
/// is one more than the revision.
#[derive(Debug)]
pub struct MemoryFeed {
    cluster: String,
    partitions: Vec<Partition>,
    led: watch::Sender<Arc<[Led]>>,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct Partition {
    state: Mutex<State>,
    /// Waiting reads look again.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The newest changes, at most `retention` of them; the last one has the revision `newest`.
    events: VecDeque<Event>,
    retention: usize,
    newest: u64,
    /// None: everything is.
    synced: Option<u64>,
    table: BTreeMap<(u16, Bytes), Event>,
    /// How often the table was replaced.
    generation: u32,
    cursor: Place,
    is_elsewhere: bool,
    has_left: bool,
}

impl MemoryFeed {
    /// A feed of so many partitions that has no change yet, leads nothing, and keeps the last
    /// `retention` changes of each partition.
    pub fn new(cluster: &str, partitions: u16, retention: usize) -> MemoryFeed {
        let partition = |_| {
            let state = State { retention, ..State::default() };
            Partition { state: Mutex::new(state), ..Partition::default() }
        };
        MemoryFeed {
            cluster: cluster.to_owned(),
            partitions: (0..partitions).map(partition).collect(),
            led: watch::Sender::new(Arc::from([])),
            stopping: AtomicBool::new(false),
        }
    }

    /// Commits a change.
    ///
    /// # Panics
    /// If the event is of another partition, or its revision is not the next one.
    pub fn push(&self, partition: u16, event: Event) {
        assert_eq!(event.partition, partition, "the event is of another partition");
        self.change(partition, |state| state.push(event));
    }

    /// Commits a write of a key, and gives its revision.
    pub fn set(&self, partition: u16, key: &[u8], value: &[u8], committed_at_ms: u64) -> u64 {
        self.change(partition, |state| {
            let value = Some(Bytes::copy_from_slice(value));
            state.push(state.next(Op::Set, partition, key, value, committed_at_ms));
            state.newest
        })
    }

    /// Commits the end of a key, and gives its revision; none where there is no such key.
    pub fn remove(&self, partition: u16, op: Op, key: &[u8], committed_at_ms: u64) -> Option<u64> {
        self.change(partition, |state| {
            state.table.get(&place_of(key))?;
            state.push(state.next(op, partition, key, None, committed_at_ms));
            Some(state.newest)
        })
    }

    /// Forgets the changes up to a revision: a reader that still needs one gets a gap.
    pub fn forget_to(&self, partition: u16, revision: u64) {
        self.change(partition, |state| {
            while state.forgotten() < revision && state.events.pop_front().is_some() {}
        });
    }

    /// Only changes up to a revision are synced. Before the first call all of them are; a later one
    /// never goes back.
    pub fn sync_to(&self, partition: u16, revision: u64) {
        self.change(partition, |state| {
            state.synced = Some(revision.max(state.synced.unwrap_or(0)));
        });
    }

    /// Replaces the table by itself, as a node does when it installs a snapshot: walks that are
    /// under way must begin anew.
    pub fn replace_table(&self, partition: u16) {
        self.change(partition, |state| state.generation += 1);
    }

    /// While it is so, what there is of a partition is only at other nodes, which are still being asked.
    pub fn look_elsewhere(&self, partition: u16, is_so: bool) {
        self.change(partition, |state| state.is_elsewhere = is_so);
    }

    /// The replica leaves: nothing of the partition can be read any more.
    pub fn leave(&self, partition: u16) {
        self.change(partition, |state| state.has_left = true);
    }

    /// What is led from now on.
    pub fn lead(&self, led: &[Led]) {
        self.led.send_replace(led.into());
    }

    /// Up to where everything is confirmed.
    pub fn cursor(&self, partition: u16) -> Place {
        self.partitions[usize::from(partition)].state.lock().cursor
    }

    /// Ends all reads, those that wait too.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for partition in &self.partitions {
            partition.changed.notify_waiters();
        }
    }

    fn change<T>(&self, partition: u16, change: impl FnOnce(&mut State) -> T) -> T {
        let partition = &self.partitions[usize::from(partition)];
        let result = change(&mut partition.state.lock());
        partition.changed.notify_waiters();
        result
    }

    /// Looks at a partition that is here.
    fn look<T>(
        &self,
        partition: u16,
        look: impl FnOnce(&State) -> Result<T, FeedError>,
    ) -> Result<T, FeedError> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err(FeedError::Stopping);
        }
        let here = self.partitions.get(usize::from(partition)).ok_or(FeedError::NotHere)?;
        let state = here.state.lock();
        if state.has_left { Err(FeedError::NotHere) } else { look(&state) }
    }

    fn term(&self, partition: u16) -> u64 {
        let led = self.led.borrow();
        led.iter().find(|led| led.partition == partition).map_or(0, |led| led.term)
    }

    async fn read_next(
        &self,
        partition: u16,
        after: u64,
        limit: Limit,
    ) -> Result<Chunk, FeedError> {
        let here = self.partitions.get(usize::from(partition)).ok_or(FeedError::NotHere)?;
        let term = self.term(partition);
        loop {
            // What changes after the look below must wake this.
            let mut changed = pin!(here.changed.notified());
            changed.as_mut().enable();
            let chunk = self.look(partition, |state| match state.is_elsewhere {
                true if after < state.newest => Err(FeedError::Later),
                _ => Ok(state.after(after, limit)),
            })?;
            match chunk {
                Some(Chunk::Gap(gap)) => return Ok(Chunk::Gap(Gap { partition, term, ..gap })),
                Some(changes) => return Ok(changes),
                None => changed.await,
            }
        }
    }
}

impl State {
    /// The event that a change of a key would be now.
    fn next(
        &self,
        op: Op,
        partition: u16,
        key: &[u8],
        value: Option<Bytes>,
        committed_at_ms: u64,
    ) -> Event {
        let revision = self.newest + 1;
        Event {
            op,
            key: Bytes::copy_from_slice(key),
            value,
            partition,
            revision,
            version: if op == Op::Set { revision } else { 0 },
            previous_version: self.table.get(&place_of(key)).map_or(0, |event| event.version),
            previous_value: None,
            expires_at_ms: None,
            committed_at_ms,
            trace: None,
        }
    }

    fn push(&mut self, event: Event) {
        assert_eq!(event.revision, self.newest + 1, "the revision is not the next one");
        self.newest = event.revision;
        let place = place_of(&event.key);
        match event.op {
            Op::Set => self.table.insert(place, event.clone()),
            Op::Delete | Op::Expire => self.table.remove(&place),
        };
        self.events.push_back(event);
        while self.events.len() > self.retention {
            self.events.pop_front();
        }
    }

    /// The newest revision that is not kept any more.
    fn forgotten(&self) -> u64 {
        self.newest - self.events.len() as u64
    }

    /// What comes after a revision, if there is something. The partition and term of a gap are left
    /// open.
    fn after(&self, after: u64, limit: Limit) -> Option<Chunk> {
        let synced = self.synced.filter(|_| limit.synced).unwrap_or(self.newest);
        let forgotten = self.forgotten();
        if after < forgotten {
            let at = synced.clamp(forgotten, self.newest);
            return Some(Chunk::Gap(gap(0, 0, after + 1, at)));
        }
        let mut events: Vec<Event> = Vec::new();
        let mut bytes = 0;
        let skipped = usize::try_from(after - forgotten).unwrap_or(usize::MAX);
        for event in self.events.iter().skip(skipped) {
            bytes += event.bytes();
            let full = events.len() >= limit.events || bytes > limit.bytes;
            if event.revision > synced || full && !events.is_empty() {
                break;
            }
            events.push(event.clone());
        }
        let through = place(events.last()?.revision);
        Some(Chunk::Changes { events, through })
    }

    fn rows(&self, at: u64, from: Option<RowMark>, limit: Limit) -> Result<Rows, FeedError> {
        let from = match from {
            None => 0,
            Some(RowMark(mark)) if mark >> 16 == u64::from(self.generation) => mark as u16,
            Some(_) => return Err(FeedError::Restart),
        };
        let mut events: Vec<Event> = Vec::new();
        let (mut bytes, mut last) = (0, from);
        for ((position, _), event) in self.table.range((from, Bytes::new())..) {
            let full = events.len() >= limit.events || bytes >= limit.bytes;
            if *position != last && full && !events.is_empty() {
                let next = u64::from(self.generation) << 16 | u64::from(*position);
                return Ok(Rows { events, next: Some(RowMark(next)) });
            }
            last = *position;
            if event.revision <= at {
                bytes += event.bytes();
                events.push(row(event));
            }
        }
        Ok(Rows { events, next: None })
    }
}

/// A table knows neither what was before nor when a key was written.
fn row(event: &Event) -> Event {
    Event {
        previous_version: 0,
        previous_value: None,
        committed_at_ms: 0,
        trace: None,
        ..event.clone()
    }
}

fn place(revision: u64) -> Place {
    Place { revision, index: revision + 1 }
}

fn gap(partition: u16, term: u64, from: u64, at: u64) -> Gap {
    Gap { partition, lost: from..=at, at: place(at), term }
}

/// A key's place in the table: FNV-1a, folded to so few bits that keys may share a position.
fn place_of(key: &[u8]) -> (u16, Bytes) {
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = key.iter().fold(0x811c_9dc5, step);
    ((hash >> 16 ^ hash) as u16, Bytes::copy_from_slice(key))
}

impl Feed for MemoryFeed {
    fn cluster(&self) -> &str {
        &self.cluster
    }

    fn partitions(&self) -> u16 {
        u16::try_from(self.partitions.len()).expect("it was made with a number of 16 bits")
    }

    fn led(&self) -> watch::Receiver<Arc<[Led]>> {
        self.led.subscribe()
    }

    fn newest(&self, partition: u16) -> Option<u64> {
        self.look(partition, |state| Ok(state.newest)).ok()
    }

    fn read(
        &self,
        partition: u16,
        after: u64,
        limit: Limit,
    ) -> BoxFuture<'_, Result<Chunk, FeedError>> {
        Box::pin(self.read_next(partition, after, limit))
    }

    fn rows<'a>(
        &'a self,
        gap: &'a Gap,
        from: Option<RowMark>,
        limit: Limit,
    ) -> BoxFuture<'a, Result<Rows, FeedError>> {
        let page = move |state: &State| state.rows(gap.at.revision, from, limit);
        Box::pin(async move { self.look(gap.partition, page) })
    }

    fn row(&self, gap: &Gap, key: &[u8]) -> Result<Option<Event>, FeedError> {
        self.look(gap.partition, |state| {
            let event = state.table.get(&place_of(key));
            Ok(event.filter(|event| event.revision <= gap.at.revision).map(row))
        })
    }

    fn begin_rows(&self, partition: u16) -> Result<Gap, FeedError> {
        let term = self.term(partition);
        self.look(partition, |state| Ok(gap(partition, term, 1, state.newest)))
    }

    fn advance(&self, partition: u16, to: Place) {
        if let Some(here) = self.partitions.get(usize::from(partition)) {
            let mut state = here.state.lock();
            state.cursor = state.cursor.max(to);
        }
    }
}
