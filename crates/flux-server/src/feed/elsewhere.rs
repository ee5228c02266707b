//! Changes that this node's log does not have, because its replica began from a snapshot, read from the logs
//! of other nodes: those keep what the broker has not confirmed as long as this one would.
//!
//! A reader's place that is found to be missing here becomes a [`Fetch`]. The other nodes are asked one after
//! the other; the first that has the next change is read from, until the log here goes on. If none of those
//! that answer has it, but one does not answer that is to have a replica, that one is waited for: a node that
//! was killed comes back with its log. Only then is it said that nobody has it.
//!
//! What this module does not do: wait for longer than a moment at a time, or know how nodes are reached.

mod remote;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use flux_cdc::{BoxFuture, Limit};
use flux_core::placement::NodeId;
use flux_proto::event::Event;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Duration, Instant, timeout, timeout_at};

pub(super) use remote::NodeOthers;

/// Streams from other nodes that may be open or being opened; further readers wait for one to end.
const MAX_STREAMS: usize = 64;
/// Places in one partition that are remembered.
const MAX_FETCHES: usize = 64;
/// For so long a reader is kept before it is told to come again, so that it can see to other partitions.
const TURN: Duration = Duration::from_millis(100);
/// How long a node may look for the first change: it may have to read much of its log.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a stream under way may bring nothing, although all that is asked for is committed.
const SILENCE: Duration = Duration::from_secs(5);
/// A place that nobody reads on from has its stream closed, and is forgotten after [`WAIT`] besides: until then it
/// is known since when somebody is waited for.
const IDLE: Duration = Duration::from_secs(20);
/// How long a node that does not answer is waited for.
const WAIT: Duration = Duration::from_secs(60);
/// The pause until the nodes are asked again, the first time; then twice as long each time.
const PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(4);

/// Another node, as far as a partition goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Other {
    pub(super) node: NodeId,
    /// It is to have a replica: if it does not answer it is waited for.
    pub(super) holds: bool,
}

/// Why a node is of no use, at least now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unhelpful {
    /// It answered, and has not got it.
    Lacks,
    /// It did not answer, or not in time: it may have it.
    Silent(String),
}

/// Changes of one partition as another node sends them.
pub(super) trait Changes: Send {
    /// The next one. Cancel-safe.
    fn next(&mut self) -> BoxFuture<'_, Result<Event, Unhelpful>>;
}

/// The other nodes.
pub(super) trait Others: fmt::Debug + Send + Sync + 'static {
    /// Those to ask about a partition, the likeliest first.
    fn nodes(&self, partition: u16) -> Vec<Other>;

    /// Begins to read what a node has in its own log behind a revision.
    fn changes(
        &self,
        node: NodeId,
        partition: u16,
        after: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Changes>, Unhelpful>>;
}

/// What comes of reading at a place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Dense from behind the place, never empty.
    Changes(Vec<Event>),
    /// To be read again soon.
    Later,
    /// No node that answers has it, and none is waited for any more.
    Nobody,
}

/// Reads from the other nodes.
#[derive(Debug)]
pub(super) struct Elsewhere {
    others: Arc<dyn Others>,
    streams: Arc<Semaphore>,
}

/// What came of asking all nodes.
enum Asked {
    Found(Stream, Event),
    Silent(Vec<(NodeId, String)>),
    Nobody,
}

struct Stream {
    node: NodeId,
    changes: Box<dyn Changes>,
    _permit: OwnedSemaphorePermit,
}

enum Phase {
    /// The nodes are to be asked, not before this moment.
    Due(Instant),
    Asking(Pin<Box<dyn Future<Output = Asked> + Send>>),
    /// A node sends; since when it has been waited for in vain.
    Open(Stream, Option<Instant>),
}

/// A place behind which the log here lacks changes.
struct Fetch {
    /// The changes that were received begin behind this.
    at: u64,
    /// What comes behind this is here.
    until: u64,
    received: VecDeque<Event>,
    phase: Phase,
    /// Since when somebody is waited for.
    waits_since: Option<Instant>,
    /// How often that was in vain.
    rounds: u32,
    read_at: Instant,
}

/// What is being fetched of a partition. One that is read is taken out meanwhile: two readers at one place
/// have one each.
#[derive(Default)]
pub(super) struct Fetches(Mutex<Vec<Fetch>>);

impl fmt::Debug for Fetches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fetches").field(&self.0.lock().len()).finish()
    }
}

impl Fetches {
    /// Closes what nobody has read from for a while.
    pub(super) fn sweep(&self) {
        let mut all = self.0.lock();
        all.retain(|one| one.read_at.elapsed() < WAIT + IDLE);
        all.iter_mut().filter(|one| one.read_at.elapsed() >= IDLE).for_each(Fetch::close);
    }

    pub(super) fn clear(&self) {
        self.0.lock().clear();
    }

    /// Takes out the one that goes on behind a revision.
    fn take(&self, after: u64) -> Option<Fetch> {
        let mut all = self.0.lock();
        let at = all.iter().position(|one| one.goes_on(after))?;
        Some(all.swap_remove(at))
    }

    fn put_back(&self, mut fetch: Fetch) {
        fetch.read_at = Instant::now();
        let mut all = self.0.lock();
        if all.len() >= MAX_FETCHES {
            all.remove(0);
        }
        all.push(fetch);
    }
}

/// A fetch that is read. It goes back also where its reader is cancelled: what was asked stays asked, and who
/// is waited for is waited for no longer than from the beginning.
struct Taken<'a> {
    home: &'a Fetches,
    fetch: Option<Fetch>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(fetch) = self.fetch.take() {
            self.home.put_back(fetch);
        }
    }
}

impl Elsewhere {
    pub(super) fn new(others: Arc<dyn Others>) -> Elsewhere {
        Elsewhere { others, streams: Arc::new(Semaphore::new(MAX_STREAMS)) }
    }

    /// Goes on with what is known to be missing here behind a revision; none if that is not known. Gives no
    /// changes behind `up_to`, which must be more than `after`.
    pub(super) async fn go_on(
        &self,
        fetches: &Fetches,
        (partition, after, up_to): (u16, u64, u64),
        limit: Limit,
    ) -> Option<Answer> {
        let fetch = fetches.take(after)?;
        let mut taken = Taken { home: fetches, fetch: Some(fetch) };
        let fetch = taken.fetch.as_mut()?;
        fetch.forget(after);
        let answer = self.advance(fetch, partition, up_to, limit);
        Some(timeout(TURN, answer).await.unwrap_or(Answer::Later))
    }

    /// Begins at a place behind which the log here lacks changes, up to one behind which it has them.
    pub(super) async fn begin(
        &self,
        fetches: &Fetches,
        (partition, after, up_to): (u16, u64, u64),
        until: u64,
        limit: Limit,
    ) -> Answer {
        if until <= after {
            return Answer::Later;
        }
        fetches.put_back(Fetch::new(after, until));
        self.go_on(fetches, (partition, after, up_to), limit).await.unwrap_or(Answer::Later)
    }

    async fn advance(&self, fetch: &mut Fetch, partition: u16, up_to: u64, limit: Limit) -> Answer {
        loop {
            if !fetch.received.is_empty() {
                fetch.fill(limit).await;
                return Answer::Changes(fetch.first(up_to, limit));
            }
            match &mut fetch.phase {
                Phase::Due(at) if *at > Instant::now() => return Answer::Later,
                Phase::Due(_) => {
                    let Ok(permit) = Arc::clone(&self.streams).try_acquire_owned() else {
                        return Answer::Later;
                    };
                    let asking = ask(Arc::clone(&self.others), permit, partition, fetch.end());
                    fetch.phase = Phase::Asking(Box::pin(asking));
                }
                Phase::Asking(asking) => {
                    let asked = asking.as_mut().await;
                    fetch.phase = Phase::Due(Instant::now());
                    if !fetch.answered(partition, asked) {
                        return Answer::Nobody;
                    }
                }
                Phase::Open(stream, waits_since) => {
                    let deadline = *waits_since.get_or_insert_with(Instant::now) + SILENCE;
                    let next = timeout_at(deadline, stream.changes.next()).await;
                    let silent = |_| Err(Unhelpful::Silent("it sends nothing more".to_owned()));
                    fetch.receive(next.unwrap_or_else(silent));
                }
            }
        }
    }
}

/// Asks the nodes one after the other, until one has what comes behind a revision.
async fn ask(
    others: Arc<dyn Others>,
    permit: OwnedSemaphorePermit,
    partition: u16,
    after: u64,
) -> Asked {
    let mut silent = Vec::new();
    for Other { node, holds } in others.nodes(partition) {
        let first = async {
            let mut changes = others.changes(node, partition, after).await?;
            let first = changes.next().await?;
            Ok((changes, first))
        };
        let why = match timeout(PATIENCE, first).await {
            Ok(Ok((changes, first))) if first.revision == after + 1 => {
                return Asked::Found(Stream { node, changes, _permit: permit }, first);
            }
            Ok(Ok(_) | Err(Unhelpful::Lacks)) => continue,
            Ok(Err(Unhelpful::Silent(why))) => why,
            Err(_) => "it does not answer in time".to_owned(),
        };
        tracing::debug!(partition, %node, why, "a node does not say whether it has changes");
        if holds {
            silent.push((node, why));
        }
    }
    if silent.is_empty() { Asked::Nobody } else { Asked::Silent(silent) }
}

impl Fetch {
    fn new(after: u64, until: u64) -> Fetch {
        let now = Instant::now();
        Fetch {
            at: after,
            until,
            received: VecDeque::new(),
            phase: Phase::Due(now),
            waits_since: None,
            rounds: 0,
            read_at: now,
        }
    }

    /// Ends what is under way. What was received comes anew.
    fn close(&mut self) {
        if !matches!(self.phase, Phase::Due(_)) {
            self.phase = Phase::Due(Instant::now());
        }
        self.received = VecDeque::new();
    }

    /// Up to here everything was received.
    fn end(&self) -> u64 {
        self.at + self.received.len() as u64
    }

    fn goes_on(&self, after: u64) -> bool {
        self.at <= after && after <= self.end() && after < self.until
    }

    /// Its reader has what is up to here.
    fn forget(&mut self, after: u64) {
        self.received.drain(..(after - self.at) as usize);
        self.at = after;
    }

    /// Takes the next change in, or that there is none from that node.
    fn receive(&mut self, next: Result<Event, Unhelpful>) {
        match next {
            Ok(event) if event.revision == self.end() + 1 => {
                if let Phase::Open(_, waits_since) = &mut self.phase {
                    *waits_since = None;
                }
                self.received.push_back(event);
                if self.end() >= self.until {
                    self.phase = Phase::Due(Instant::now());
                }
            }
            // From that node, or another one, anew.
            why => {
                if let Phase::Open(Stream { node, .. }, _) = &self.phase {
                    let why = why.map(|event| event.revision);
                    tracing::debug!(%node, ?why, "a node sends no more changes of its log");
                }
                self.phase = Phase::Due(Instant::now());
            }
        }
    }

    /// Takes in what came of asking. Whether there is still hope.
    fn answered(&mut self, partition: u16, asked: Asked) -> bool {
        let now = Instant::now();
        match asked {
            Asked::Found(stream, first) => {
                tracing::debug!(
                    partition,
                    after = self.end(),
                    node = %stream.node,
                    "changes that the log here does not have are read from another node"
                );
                self.waits_since = None;
                self.rounds = 0;
                self.phase = Phase::Open(stream, None);
                self.receive(Ok(first));
                true
            }
            Asked::Nobody => false,
            Asked::Silent(silent) => {
                let nodes: Vec<String> =
                    silent.iter().map(|(node, why)| format!("{node} ({why})")).collect();
                let nodes = nodes.join(", ");
                let first = self.waits_since.is_none();
                let since = *self.waits_since.get_or_insert(now);
                let after = self.end();
                if first {
                    tracing::warn!(
                        partition,
                        after,
                        nodes,
                        wait_s = WAIT.as_secs(),
                        "changes that the log here does not have may be in that of a node that does not \
                         answer, which is waited for: start it"
                    );
                } else if now.duration_since(since) >= WAIT {
                    tracing::warn!(partition, after, nodes, "a node is waited for no longer");
                    return false;
                }
                let pause = PAUSE.saturating_mul(1 << self.rounds.min(8)).min(MAX_PAUSE);
                self.rounds += 1;
                self.phase = Phase::Due(now + pause);
                true
            }
        }
    }

    /// Takes what has come already, as much as is read at once.
    async fn fill(&mut self, limit: Limit) {
        let mut bytes: usize = self.received.iter().map(Event::bytes).sum();
        while self.received.len() < limit.events && bytes < limit.bytes {
            let Phase::Open(stream, _) = &mut self.phase else { return };
            let next = tokio::select! {
                biased;
                next = stream.changes.next() => next,
                () = std::future::ready(()) => return,
            };
            bytes += next.as_ref().map_or(0, Event::bytes);
            self.receive(next);
        }
    }

    /// What is read at once of what was received.
    fn first(&self, up_to: u64, limit: Limit) -> Vec<Event> {
        let mut bytes = 0;
        let fits = |event: &&Event| {
            let fits = bytes == 0 || bytes < limit.bytes;
            bytes += event.bytes().max(1);
            fits && event.revision <= up_to
        };
        self.received.iter().take(limit.events.max(1)).take_while(fits).cloned().collect()
    }
}
