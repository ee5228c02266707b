//! One watcher's course: from where it begins, through what it has missed, to where it is shown what is new,
//! here or at another node, and back whenever that ends.
//!
//! What this module does not do: take anything out of the watcher's queue, or say when the watcher is gone.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;

use flux_cdc::{Chunk, FeedError, Limit, RowMark};
use flux_proto::event::{Gap, Record};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, MissedTickBehavior, interval_at, sleep_until};

use super::Ended;
use super::hub::{CHUNK, Hub, Join, Seat, show};
use super::keys::Keys;
use super::outlet::{Place, Why};
use super::route::{Route, Routes};
use super::upstream::{Lost, follow};
use crate::feed::nodes::Nodes;

/// A watcher that had no room must have caught up within this time.
const SLOW: Duration = Duration::from_secs(10);
/// A watcher that takes nothing for so long while there is no room is gone.
const STALLED: Duration = Duration::from_secs(60);
/// A partition that cannot be watched anywhere for so long ends the watch.
const LOST: Duration = Duration::from_secs(30);
/// How long to wait before a partition is tried again, the first time; then twice as long each time.
const RETRY: Duration = Duration::from_millis(50);
const MAX_RETRY: Duration = Duration::from_secs(2);

/// A partition that is not watched anywhere for now.
#[derive(Debug)]
struct Trouble {
    since: Instant,
    /// Those that failed since what worked last ended.
    attempts: u32,
    /// When to try again; none while it is being tried.
    retry_at: Option<Instant>,
}

/// What the next step for a partition that is behind came to.
enum Step {
    Joined,
    /// It was shown changes, and there are more.
    More,
    /// It was shown current values. The changes behind them come next, while they are surely there.
    Rows,
}

pub(super) struct Session {
    pub(super) hub: Arc<Hub>,
    pub(super) routes: Arc<dyn Routes>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) seat: Seat,
    pub(super) cluster: u64,
    pub(super) partitions: Vec<u16>,
    pub(super) keep_alive: Duration,
}

/// What changes while the session runs.
struct Course {
    session: Session,
    /// To be stepped on, in turn.
    behind: VecDeque<u16>,
    troubles: BTreeMap<u16, Trouble>,
    upstreams: JoinSet<Lost>,
    /// It has been up to date everywhere. Before that it may take its time.
    has_caught_up: bool,
    /// Since when the watcher has been behind for lack of room.
    slow_since: Option<Instant>,
    /// Since when it has taken nothing while there was no room.
    stalled_since: Option<Instant>,
}

impl Session {
    /// Runs until the watch must end.
    pub(super) async fn run(self, mut stopping: watch::Receiver<bool>) -> Ended {
        let beat = self.keep_alive / 2;
        let mut beats = interval_at(Instant::now() + beat, beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let outlet = Arc::clone(&self.seat.outlet);
        let mut course = Course {
            behind: VecDeque::new(),
            troubles: BTreeMap::new(),
            upstreams: JoinSet::new(),
            has_caught_up: false,
            slow_since: None,
            stalled_since: None,
            session: self,
        };
        course.settle(&course.session.partitions.clone());
        let mut step = None;
        loop {
            outlet.start();
            if step.is_none() {
                step = course.behind.pop_front().map(|partition| {
                    let (hub, seat) = (&course.session.hub, &course.session.seat);
                    Box::pin(one_step(Arc::clone(hub), seat.clone(), partition))
                });
            }
            let (slow_until, retry_at) = (course.slow_until(), course.retry_at());
            let ended = tokio::select! {
                _ = stopping.wait_for(|stop| *stop) => Some(Ended::Stopping),
                given_back = outlet.given_back() => course.take_back(given_back),
                Some(lost) = course.upstreams.join_next() => course.lost(lost),
                (partition, done) = async {
                    match &mut step {
                        Some(step) => step.await,
                        None => pending().await,
                    }
                } => {
                    step = None;
                    course.stepped(partition, done)
                }
                _ = beats.tick() => {
                    for &partition in &course.session.partitions {
                        course.session.hub.refresh(partition, course.session.seat.id);
                    }
                    outlet.beat();
                    course.look_for_stall(outlet.has_stalled())
                }
                () = until(slow_until) => Some(Ended::TooSlow),
                () = until(retry_at) => course.retry(),
            };
            if let Some(ended) = ended {
                return ended;
            }
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

impl Course {
    /// Begins to watch partitions where they are best watched now.
    fn settle(&mut self, partitions: &[u16]) {
        // By node, and apart whether they have a place.
        let mut away: BTreeMap<(SocketAddr, bool), Vec<u16>> = BTreeMap::new();
        for &partition in partitions {
            let attempts = self.troubles.get(&partition).map_or(0, |trouble| trouble.attempts);
            let seat = &self.session.seat;
            let route = match seat.stays {
                true => Route::Here,
                false => self.session.routes.route(partition, attempts),
            };
            match route {
                Route::Here | Route::HereLate => self.behind.push_back(partition),
                Route::There(node) => {
                    let has_place = seat.outlet.place(partition) != Place::Now;
                    away.entry((node, has_place)).or_default().push(partition);
                }
                Route::Nowhere => self.fail(partition),
            }
        }
        for ((node, _), partitions) in away {
            let Session { nodes, seat, cluster, .. } = &self.session;
            let following = follow(Arc::clone(nodes), node, seat.clone(), *cluster, partitions);
            self.upstreams.spawn(following);
        }
    }

    /// A partition could not be watched; it is tried again later.
    fn fail(&mut self, partition: u16) {
        let now = Instant::now();
        let first = || Trouble { since: now, attempts: 0, retry_at: None };
        let again = |trouble: &mut Trouble| trouble.attempts += 1;
        let trouble = self.troubles.entry(partition).and_modify(again).or_insert_with(first);
        let pause = RETRY.saturating_mul(1 << trouble.attempts.min(8)).min(MAX_RETRY);
        trouble.retry_at = Some(now + pause);
    }

    fn retry_at(&self) -> Option<Instant> {
        self.troubles.values().filter_map(|trouble| trouble.retry_at).min()
    }

    fn retry(&mut self) -> Option<Ended> {
        let now = Instant::now();
        let mut due = Vec::new();
        for (&partition, trouble) in &mut self.troubles {
            if trouble.retry_at.is_some_and(|at| at <= now) {
                if now.duration_since(trouble.since) >= LOST {
                    return Some(Ended::Unavailable);
                }
                trouble.retry_at = None;
                due.push(partition);
            }
        }
        self.settle(&due);
        None
    }

    fn slow_until(&self) -> Option<Instant> {
        self.slow_since.map(|since| since + SLOW)
    }

    fn take_back(&mut self, given_back: Vec<(u16, Why)>) -> Option<Ended> {
        for (partition, why) in given_back {
            match why {
                Why::Full => {
                    if self.has_caught_up {
                        self.slow_since.get_or_insert_with(Instant::now);
                    }
                    self.behind.push_back(partition);
                }
                Why::Behind => self.behind.push_back(partition),
                Why::Elsewhere if self.session.seat.stays => return Some(Ended::NotHere),
                Why::Elsewhere => self.fail(partition),
                Why::Stopping => return Some(Ended::Stopping),
                Why::Failed(error) => self.failed(partition, &error),
            }
        }
        None
    }

    fn failed(&mut self, partition: u16, error: &str) {
        tracing::warn!(partition, error, "changes cannot be read for a watcher");
        self.fail(partition);
    }

    fn lost(&mut self, lost: Result<Lost, tokio::task::JoinError>) -> Option<Ended> {
        let lost = lost.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        if lost.is_too_slow {
            return Some(Ended::TooSlow);
        }
        for partition in lost.partitions {
            if lost.was_under_way {
                self.troubles.remove(&partition);
            }
            self.fail(partition);
        }
        None
    }

    /// A partition was watched here, which is no trouble unless it is for want of a better place.
    fn is_well(&mut self, partition: u16) {
        let Session { seat, routes, .. } = &self.session;
        if self.troubles.contains_key(&partition)
            && (seat.stays || routes.route(partition, 0) == Route::Here)
        {
            self.troubles.remove(&partition);
        }
    }

    fn look_for_stall(&mut self, has_stalled: bool) -> Option<Ended> {
        if !has_stalled {
            self.stalled_since = None;
            return None;
        }
        let since = *self.stalled_since.get_or_insert_with(Instant::now);
        (since.elapsed() >= STALLED).then_some(Ended::TooSlow)
    }

    fn stepped(&mut self, partition: u16, step: Result<Step, FeedError>) -> Option<Ended> {
        match step {
            Ok(Step::Joined) => {
                self.is_well(partition);
                if self.behind.is_empty() {
                    self.has_caught_up |= self.troubles.is_empty();
                    self.slow_since = None;
                }
            }
            Ok(Step::More) => {
                self.is_well(partition);
                self.behind.push_back(partition);
            }
            Ok(Step::Rows) => {
                self.is_well(partition);
                self.behind.push_front(partition);
            }
            // No trouble of this node's: however long it takes, the feed says when there is nothing to
            // wait for. The watcher's other partitions go on meanwhile.
            Err(FeedError::Later) => {
                let now = Instant::now();
                let trouble = Trouble { since: now, attempts: 0, retry_at: Some(now + RETRY) };
                // There was room for what would have come.
                self.slow_since = None;
                self.troubles.insert(partition, trouble);
            }
            Err(FeedError::Stopping) => return Some(Ended::Stopping),
            Err(FeedError::NotHere | FeedError::Restart) if self.session.seat.stays => {
                return Some(Ended::NotHere);
            }
            Err(FeedError::NotHere | FeedError::Restart) => self.fail(partition),
            Err(FeedError::Log(error)) => self.failed(partition, &error),
        }
        None
    }
}

/// Brings the watcher on in a partition: shows it the next changes that it lacks, or all current values, or
/// lets it join those who are up to date.
async fn one_step(hub: Arc<Hub>, seat: Seat, partition: u16) -> (u16, Result<Step, FeedError>) {
    seat.outlet.room().await;
    let step = match seat.outlet.place(partition) {
        Place::Now => hub.join(partition, &seat, &Join::Now).map(|_| Step::Joined),
        Place::After(after) => next_changes(&hub, &seat, partition, after).await,
        Place::Rows => match hub.feed().begin_rows(partition) {
            Ok(gap) => rows(&hub, &seat, gap).await.map(|()| Step::Rows),
            Err(error) => Err(error),
        },
    };
    (partition, step)
}

async fn next_changes(
    hub: &Arc<Hub>,
    seat: &Seat,
    partition: u16,
    after: u64,
) -> Result<Step, FeedError> {
    if hub.join(partition, seat, &Join::After(after))? {
        return Ok(Step::Joined);
    }
    let limit = Limit { here_only: seat.own_log_only, ..CHUNK };
    match hub.feed().read(partition, after, limit).await? {
        Chunk::Changes { events, through } => {
            let through = through.revision;
            if hub.join(partition, seat, &Join::Behind { events: &events, through })? {
                return Ok(Step::Joined);
            }
            show(seat, &events);
            seat.outlet.reach(partition, through);
        }
        Chunk::Gap(gap) => {
            rows(hub, seat, gap).await?;
            return Ok(Step::Rows);
        }
    }
    Ok(Step::More)
}

/// Shows the watcher the current values in the place of what it missed.
async fn rows(hub: &Hub, seat: &Seat, mut gap: Gap) -> Result<(), FeedError> {
    loop {
        seat.outlet.room().await;
        seat.outlet.push_surely(Record::GapBegin(gap.clone()));
        match walk(hub, seat, &gap).await {
            Ok(rows) => {
                seat.outlet.push_surely(Record::GapEnd { gap: gap.id(), rows });
                return Ok(());
            }
            Err(FeedError::Restart) => {
                let again = hub.feed().begin_rows(gap.partition)?;
                gap = Gap { lost: *gap.lost.start()..=*again.lost.end(), ..again };
            }
            Err(error) => return Err(error),
        }
    }
}

/// Shows the rows of a gap; gives how many there were.
async fn walk(hub: &Hub, seat: &Seat, gap: &Gap) -> Result<u64, FeedError> {
    if let Keys::One(key) = &seat.keys {
        let row = hub.feed().row(gap, key)?;
        let number = u64::from(row.is_some());
        if let Some(event) = row {
            seat.outlet.push_surely(Record::Row { gap: gap.id(), number, event });
        }
        return Ok(number);
    }
    let (mut number, mut from): (u64, Option<RowMark>) = (0, None);
    loop {
        seat.outlet.room().await;
        let page = hub.feed().rows(gap, from, CHUNK).await?;
        for event in page.events {
            if seat.keys.matches(&event.key) {
                number += 1;
                seat.outlet.push_surely(Record::Row { gap: gap.id(), number, event });
            }
        }
        match page.next {
            Some(next) => from = Some(next),
            None => return Ok(number),
        }
        // A page without a row for this watcher must not keep others from theirs.
        tokio::task::yield_now().await;
    }
}
