//! Shows what is new to all who are up to date: each partition that is watched is read once, however many
//! watch it.
//!
//! A watcher that is behind reads by itself until it may join; one that does not keep up, and all of them
//! where the partition cannot be read here any more, are given back to their sessions. No reader is ever
//! waited for.

use std::collections::HashMap;
use std::sync::Arc;

use flux_cdc::{Chunk, Feed, FeedError, Limit};
use flux_proto::event::{Event, Record};
use parking_lot::Mutex;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Duration, MissedTickBehavior, interval};

use super::keys::{Index, Keys};
use super::outlet::{Outlet, Why};
use super::route::{Route, Routes};

/// What is read at once, for all or for one. For all only what this node has: who falls so far behind that it
/// has not reads by itself.
pub(super) const CHUNK: Limit =
    Limit { events: 1024, bytes: 256 << 10, synced: false, here_only: true };
/// How often it is looked whether this node is still the place to read a partition.
const ROUTE_CHECK: Duration = Duration::from_millis(500);

/// A watcher as the hub has it.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    pub(super) id: u64,
    pub(super) keys: Keys,
    /// Stays whether another node may be better or not.
    pub(super) stays: bool,
    /// Nothing that other nodes are asked for.
    pub(super) own_log_only: bool,
    pub(super) outlet: Arc<Outlet>,
}

/// From where a watcher joins.
pub(super) enum Join<'a> {
    Now,
    After(u64),
    /// Behind these, which it has not been shown yet.
    Behind {
        events: &'a [Event],
        through: u64,
    },
}

pub(super) struct Hub {
    feed: Arc<dyn Feed>,
    routes: Arc<dyn Routes>,
    channels: Vec<Mutex<Channel>>,
    pumps: Mutex<JoinSet<()>>,
}

/// Those who are up to date with a partition.
#[derive(Default)]
struct Channel {
    /// None while nobody watches.
    pump: Option<Pump>,
    /// Tells one pump of the partition from the next.
    generation: u64,
    members: HashMap<u64, Member>,
    index: Index,
}

struct Pump {
    /// Everything up to here has been shown to all.
    at: u64,
    task: AbortHandle,
}

struct Member {
    seat: Seat,
    /// What is up to here it has seen before.
    from: u64,
}

impl Hub {
    pub(super) fn new(feed: Arc<dyn Feed>, routes: Arc<dyn Routes>) -> Hub {
        let channels = (0..feed.partitions()).map(|_| Mutex::default()).collect();
        Hub { feed, routes, channels, pumps: Mutex::default() }
    }

    pub(super) fn feed(&self) -> &Arc<dyn Feed> {
        &self.feed
    }

    /// Adds a watcher to those that are up to date; false if it is not, and then nothing is done.
    ///
    /// # Errors
    /// If the partition cannot be read here.
    pub(super) fn join(
        self: &Arc<Self>,
        partition: u16,
        seat: &Seat,
        join: &Join<'_>,
    ) -> Result<bool, FeedError> {
        let mut channel = self.channels[usize::from(partition)].lock();
        let newest = self.feed.newest(partition).ok_or(FeedError::NotHere)?;
        let at = channel.pump.as_ref().map_or(newest, |pump| pump.at);
        let from = match *join {
            Join::Now => newest.max(at),
            Join::After(after) => after,
            Join::Behind { through, .. } => through,
        };
        if from < at {
            return Ok(false);
        }
        if channel.pump.is_none() {
            channel.generation += 1;
            let pump = Arc::clone(self).pump(partition, at, channel.generation);
            let mut pumps = self.pumps.lock();
            while pumps.try_join_next().is_some() {}
            channel.pump = Some(Pump { at, task: pumps.spawn(pump) });
        }
        if let Join::Behind { events, .. } = *join {
            show(seat, events);
        }
        seat.outlet.reach(partition, from);
        channel.index.insert(&seat.keys, seat.id);
        channel.members.insert(seat.id, Member { seat: seat.clone(), from });
        Ok(true)
    }

    /// Removes a watcher. Where it is in that partition stays known to its outlet.
    pub(super) fn leave(&self, partition: u16, id: u64) {
        let mut channel = self.channels[usize::from(partition)].lock();
        channel.remove(id);
        channel.end_if_idle();
    }

    /// Brings the place of a watcher up to date, if it has joined.
    pub(super) fn refresh(&self, partition: u16, id: u64) {
        let channel = self.channels[usize::from(partition)].lock();
        if let (Some(pump), Some(member)) = (&channel.pump, channel.members.get(&id)) {
            member.seat.outlet.reach(partition, member.from.max(pump.at));
        }
    }

    /// Waits until all that the hub has started has ended.
    pub(super) async fn stop(&self) {
        let mut pumps = std::mem::take(&mut *self.pumps.lock());
        pumps.shutdown().await;
    }

    /// Shows what is new, until nobody watches or the partition cannot be read here.
    async fn pump(self: Arc<Self>, partition: u16, mut at: u64, generation: u64) {
        let mut checks = interval(ROUTE_CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut reading = self.feed.read(partition, at, CHUNK);
            let read = loop {
                tokio::select! {
                    read = &mut reading => break read,
                    _ = checks.tick() => {
                        if self.routes.route(partition, 0) != Route::Here {
                            self.send_elsewhere(partition, generation);
                        }
                    }
                }
            };
            drop(reading);
            match self.pass_on(partition, generation, read) {
                Some(through) => at = through,
                None => return,
            }
            // Let those who were shown something take it.
            tokio::task::yield_now().await;
        }
    }

    /// Shows what a pump has read. Gives where it goes on; none if it ends.
    fn pass_on(
        &self,
        partition: u16,
        generation: u64,
        read: Result<Chunk, FeedError>,
    ) -> Option<u64> {
        let mut channel = self.channels[usize::from(partition)].lock();
        if channel.generation != generation || channel.pump.is_none() {
            return None;
        }
        let why = match read {
            Ok(Chunk::Changes { events, through }) => {
                channel.show(partition, events, through.revision);
                return channel.pump.is_some().then_some(through.revision);
            }
            Ok(Chunk::Gap(_)) | Err(FeedError::Later) => Why::Behind,
            Err(FeedError::NotHere | FeedError::Restart) => Why::Elsewhere,
            Err(FeedError::Stopping) => Why::Stopping,
            Err(FeedError::Log(error)) => Why::Failed(error),
        };
        channel.give_back_if(partition, &why, |_| true);
        None
    }

    fn send_elsewhere(&self, partition: u16, generation: u64) {
        let mut channel = self.channels[usize::from(partition)].lock();
        if channel.generation == generation {
            channel.give_back_if(partition, &Why::Elsewhere, |member| !member.seat.stays);
        }
    }
}

impl Channel {
    fn show(&mut self, partition: u16, events: Vec<Event>, through: u64) {
        let mut full = Vec::new();
        for event in events {
            let (key, revision) = (event.key.clone(), event.revision);
            let mut event = Some(event);
            let mut record = None;
            for id in self.index.watchers(&key) {
                let Some(member) = self.members.get(&id).filter(|one| one.from < revision) else {
                    continue;
                };
                let change = || event.take().map(Record::Change).map(Arc::new);
                record = record.or_else(change);
                let is_taken = record.as_ref().is_none_or(|one| member.seat.outlet.push(one));
                if !is_taken {
                    full.push(id);
                }
            }
            for id in full.drain(..) {
                if let Some(Member { seat, .. }) = self.remove(id) {
                    seat.outlet.reach(partition, revision - 1);
                    seat.outlet.give_back(partition, Why::Full);
                }
            }
        }
        if let Some(pump) = &mut self.pump {
            pump.at = through;
        }
        self.end_if_idle();
    }

    /// Gives watchers back, each with its place.
    fn give_back_if(&mut self, partition: u16, why: &Why, is_one: impl Fn(&Member) -> bool) {
        let at = self.pump.as_ref().map_or(0, |pump| pump.at);
        let who = self.members.iter().filter(|(_, member)| is_one(member));
        for id in who.map(|(&id, _)| id).collect::<Vec<_>>() {
            if let Some(Member { seat, from }) = self.remove(id) {
                seat.outlet.reach(partition, from.max(at));
                seat.outlet.give_back(partition, why.clone());
            }
        }
        self.end_if_idle();
    }

    fn remove(&mut self, id: u64) -> Option<Member> {
        let member = self.members.remove(&id)?;
        self.index.remove(&member.seat.keys, id);
        Some(member)
    }

    fn end_if_idle(&mut self) {
        if self.members.is_empty()
            && let Some(pump) = self.pump.take()
        {
            pump.task.abort();
        }
    }
}

/// Shows a watcher those of some changes that it asks for, whether there is room or not.
pub(super) fn show(seat: &Seat, events: &[Event]) {
    for event in events.iter().filter(|event| seat.keys.matches(&event.key)) {
        seat.outlet.push_surely(Record::Change(event.clone()));
    }
}
