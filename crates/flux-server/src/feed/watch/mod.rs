//! Watching: each watcher is shown the committed changes of the keys that it asks for, those of a partition
//! in the order of its revisions, every one, once.
//!
//! ```text
//! feed ── hub ── outlet ── stream      up to date: one read for all
//!      └─ session ┘  │                 behind: each by itself, as fast as the watcher takes it
//! other node ────────┘                 where this one has no replica that is in touch
//! ```
//!
//! What is shown carries a token, which resumes behind it at any node. A token says how far the watcher is in
//! each partition; in those that it does not name, current values come first. What this module does not do:
//! speak gRPC to the watcher, or keep anything of one that is gone.

mod hub;
mod keys;
mod outlet;
mod route;
mod session;
#[cfg(test)]
mod tests;
mod upstream;

use std::collections::HashSet;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use flux_cdc::Feed;
use flux_core::Partitions;
use flux_proto::event::{Record, Token};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Duration;
use tokio_stream::Stream;

use hub::{Hub, Seat};
pub(crate) use keys::Keys;
pub(crate) use outlet::Room;
use outlet::{Outlet, Place, Taken};
pub(crate) use route::{NodeRoutes, Routes};
use session::Session;

use super::nodes::Nodes;
use crate::stats::Stats;

/// Watches at a time of other nodes that read what their logs lack.
const LENT: usize = 1024;

/// From where a watcher wants to see changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    Now,
    /// From behind the message that had it.
    Token(Bytes),
    /// The current values first.
    Snapshot,
}

/// What a watcher wants to see.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) keys: Keys,
    pub(crate) begin: Begin,
    /// Only these; all where it is empty.
    pub(crate) partitions: Vec<u32>,
    /// Never at another node.
    pub(crate) here_only: bool,
    /// Nothing that other nodes are asked for because the log here lacks it.
    pub(crate) own_log_only: bool,
    /// After so much silence it is told that the watch goes on.
    pub(crate) keep_alive: Duration,
}

/// Why there is no watch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("{0}")]
    Invalid(&'static str),
    #[error("the limit of watches, max_watches, is reached")]
    TooMany,
}

/// Why a watch ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the watcher takes its changes too slowly; the last token resumes")]
    TooSlow,
    #[error("the node is stopping; the last token resumes at another one")]
    Stopping,
    #[error("this node has no replica of the partition that is in touch with its leader")]
    NotHere,
    #[error("a partition can be watched nowhere for now; the last token resumes")]
    Unavailable,
}

/// What a watcher is shown next.
#[derive(Debug)]
pub(crate) enum What {
    Started,
    Record(Arc<Record>),
    KeepAlive,
}

#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) what: What,
    /// Resumes behind it.
    pub(crate) token: Vec<u8>,
}

/// All watches of a node.
pub(crate) struct Watches {
    hub: Arc<Hub>,
    routes: Arc<dyn Routes>,
    nodes: Arc<Nodes>,
    /// In tokens: places mean nothing to another cluster.
    cluster: u64,
    partitions: Partitions,
    places: Arc<Semaphore>,
    /// For other nodes that read what their logs lack, whatever clients take.
    lent: Arc<Semaphore>,
    open: Arc<AtomicUsize>,
    room: Room,
    stats: Arc<Stats>,
    next_id: AtomicU64,
    sessions: Mutex<JoinSet<()>>,
    stopping: watch::Receiver<bool>,
}

impl fmt::Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watches").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl Watches {
    /// No watches yet, at most so many at a time, which are counted in `open`. They end when `stopping` says
    /// so.
    pub(crate) fn new(
        feed: Arc<dyn Feed>,
        (routes, nodes): (Arc<dyn Routes>, Arc<Nodes>),
        cluster: u64,
        (most, room): (usize, Room),
        open: Arc<AtomicUsize>,
        stats: Arc<Stats>,
        stopping: watch::Receiver<bool>,
    ) -> Watches {
        let partitions =
            Partitions::new(feed.partitions()).expect("those of a feed are a power of two");
        Watches {
            hub: Arc::new(Hub::new(feed, Arc::clone(&routes))),
            routes,
            nodes,
            cluster,
            partitions,
            places: Arc::new(Semaphore::new(most)),
            lent: Arc::new(Semaphore::new(LENT)),
            open,
            room,
            stats,
            next_id: AtomicU64::new(0),
            sessions: Mutex::default(),
            stopping,
        }
    }

    /// Begins to watch.
    pub(crate) fn open(&self, wanted: Wanted) -> Result<Watching, Refused> {
        let places = self.places(&wanted)?;
        let all = if wanted.own_log_only { &self.lent } else { &self.places };
        let place = Arc::clone(all).try_acquire_owned().map_err(|_| Refused::TooMany)?;
        let partitions: Vec<u16> = places.iter().map(|(partition, _)| *partition).collect();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let outlet = Arc::new(Outlet::new(self.room, places));
        let seat = Seat {
            id,
            keys: wanted.keys,
            stays: wanted.here_only,
            own_log_only: wanted.own_log_only,
            outlet,
        };
        let session = Session {
            hub: Arc::clone(&self.hub),
            routes: Arc::clone(&self.routes),
            nodes: Arc::clone(&self.nodes),
            seat: seat.clone(),
            cluster: self.cluster,
            partitions: partitions.clone(),
            keep_alive: wanted.keep_alive,
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        let open = Arc::clone(&self.open);
        let seated = Seated { hub: Arc::clone(&self.hub), partitions, id, open, _place: place };
        let (outlet, stats) = (Arc::clone(&seat.outlet), Arc::clone(&self.stats));
        let stopping = self.stopping.clone();
        let run = async move {
            let ended = session.run(stopping).await;
            // From here on nobody holds anything for it.
            drop(seated);
            if ended == Ended::TooSlow {
                stats.watch_cut.add(1);
            }
            outlet.end(ended);
        };
        let mut sessions = self.sessions.lock();
        while sessions.try_join_next().is_some() {}
        let task = sessions.spawn(run);
        let (outlet, stats) = (seat.outlet, Arc::clone(&self.stats));
        Ok(Watching { outlet, cluster: self.cluster, task, stats })
    }

    /// How many watches there are.
    pub(crate) fn count(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Waits until all watches have ended, which they do when the node stops.
    pub(crate) async fn stopped(&self) {
        let mut sessions = std::mem::take(&mut *self.sessions.lock());
        while sessions.join_next().await.is_some() {}
        self.hub.stop().await;
    }

    /// The watcher's place in each partition that can hold its keys.
    fn places(&self, wanted: &Wanted) -> Result<Vec<(u16, Place)>, Refused> {
        let possible = wanted.keys.partitions(self.partitions);
        let asked: HashSet<u32> = wanted.partitions.iter().copied().collect();
        let is_one = |partition: u32| partition < u32::from(self.partitions.count());
        if !asked.iter().all(|&partition| is_one(partition)) {
            return Err(Refused::Invalid("`partitions` names one that the cluster has not"));
        }
        let is_asked = |partition: &u16| asked.is_empty() || asked.contains(&u32::from(*partition));
        let partitions = possible.into_iter().filter(is_asked);
        let places: Vec<(u16, Place)> = match &wanted.begin {
            Begin::Now => partitions.map(|partition| (partition, Place::Now)).collect(),
            Begin::Snapshot => partitions.map(|partition| (partition, Place::Rows)).collect(),
            Begin::Token(token) => {
                let wrong = Refused::Invalid("`token` is none that a watch of the cluster gave");
                let token = Token::decode(token).filter(|token| token.cluster == self.cluster);
                let positions = token.ok_or(wrong)?.positions;
                let places: Vec<(u16, Place)> = partitions
                    .map(|partition| {
                        let at = positions.binary_search_by_key(&partition, |(of, _)| *of);
                        (partition, at.map_or(Place::Rows, |at| Place::After(positions[at].1)))
                    })
                    .collect();
                let named = places.iter().filter(|(_, place)| *place != Place::Rows).count();
                if named != positions.len() {
                    return Err(Refused::Invalid("`token` is of a watch of other keys"));
                }
                places
            }
        };
        if places.is_empty() {
            return Err(Refused::Invalid("none of `partitions` can hold such keys"));
        }
        Ok(places)
    }
}

/// A watcher's place among all, and in the hub. Given up when it is dropped.
struct Seated {
    hub: Arc<Hub>,
    partitions: Vec<u16>,
    id: u64,
    open: Arc<AtomicUsize>,
    _place: OwnedSemaphorePermit,
}

impl Drop for Seated {
    fn drop(&mut self) {
        for &partition in &self.partitions {
            self.hub.leave(partition, self.id);
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A watch. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Watching {
    outlet: Arc<Outlet>,
    cluster: u64,
    task: AbortHandle,
    stats: Arc<Stats>,
}

impl Stream for Watching {
    type Item = Result<Shown, Ended>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.outlet.poll_take(context).map(|taken| {
            taken.map(|taken| {
                let (taken, positions) = taken?;
                let token = Token { cluster: self.cluster, positions }.encode();
                let what = match taken {
                    Taken::Started => What::Started,
                    Taken::Record(record) => What::Record(record),
                    Taken::KeepAlive => What::KeepAlive,
                };
                self.stats.watch_events.add(1);
                Ok(Shown { what, token })
            })
        })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}
