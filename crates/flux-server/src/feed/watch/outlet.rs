//! What one watcher is still to be shown: a bounded queue between those who read changes and the stream
//! that takes them, and the watcher's place in each partition.
//!
//! Nobody who puts something in ever waits for the watcher: a full queue is told at once. What that
//! means for the watcher is the session's to say.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use flux_proto::event::{Positions, Record};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Ended;

/// What an item takes beside the bytes of its key and values, about.
const ITEM_BYTES: usize = 256;

/// How much may wait for a watcher. One item may pass the bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) bytes: usize,
    pub(crate) items: usize,
}

/// The place of a watcher in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It has none yet: what happens from now on is shown.
    Now,
    /// It needs the current values first.
    Rows,
    /// Everything up to this revision has been put into the queue, or does not concern it.
    After(u64),
}

/// Why somebody else must go on showing a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The queue is full.
    Full,
    /// What comes next is not in memory.
    Behind,
    /// This node has no replica, or one that is out of touch, and another may have a better one.
    Elsewhere,
    /// The node is stopping.
    Stopping,
    /// The log cannot be read.
    Failed(String),
}

#[derive(Debug)]
enum Item {
    Started(Positions),
    Record(Arc<Record>),
    /// Everything up to these places has been shown, or does not concern the watcher.
    At {
        positions: Positions,
        is_shown: bool,
    },
}

/// What a watcher is shown, with its place behind that.
#[derive(Debug)]
pub(super) enum Taken {
    Started,
    Record(Arc<Record>),
    KeepAlive,
}

#[derive(Debug)]
struct State {
    room: Room,
    items: VecDeque<Item>,
    bytes: usize,
    places: Vec<(u16, Place)>,
    /// By partition, the place behind what has been taken; none where current values come first.
    taken: Vec<(u16, Option<u64>)>,
    /// The places of the watcher when the watch was under way, until that is told.
    begins: Option<Positions>,
    has_started: bool,
    /// Something was taken since the last beat; since it was last asked whether nothing is.
    is_lively: bool,
    is_taken_from: bool,
    /// Partitions that somebody else must go on with.
    given_back: Vec<(u16, Why)>,
    ended: Option<Ended>,
    has_told_end: bool,
    taker: Option<Waker>,
}

/// The queue. All sides share it.
#[derive(Debug)]
pub(super) struct Outlet {
    state: Mutex<State>,
    /// There may be room.
    taken: Notify,
    /// A partition was given back.
    returned: Notify,
}

impl Outlet {
    /// An empty one, with the watcher's places.
    pub(super) fn new(room: Room, places: Vec<(u16, Place)>) -> Outlet {
        let known = |&(partition, place): &(u16, Place)| match place {
            Place::After(revision) => (partition, Some(revision)),
            Place::Now | Place::Rows => (partition, None),
        };
        let state = State {
            room,
            items: VecDeque::new(),
            bytes: 0,
            taken: places.iter().map(known).collect(),
            places,
            begins: Some(Positions::new()),
            has_started: false,
            is_lively: false,
            is_taken_from: false,
            given_back: Vec::new(),
            ended: None,
            has_told_end: false,
            taker: None,
        };
        Outlet { state: Mutex::new(state), taken: Notify::new(), returned: Notify::new() }
    }

    /// Puts a record in and moves the watcher's place; false if there is no room, and then nothing is done.
    /// After the end all is taken and dropped.
    pub(super) fn push(&self, record: &Arc<Record>) -> bool {
        self.put(record, false)
    }

    /// The same whether there is room or not. Only for who has waited for room before.
    pub(super) fn push_surely(&self, record: Record) {
        self.put(&Arc::new(record), true);
    }

    fn put(&self, record: &Arc<Record>, surely: bool) -> bool {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return true;
        }
        if !surely && state.is_full() {
            return false;
        }
        let partition = record.partition();
        match &**record {
            Record::Change(event) => state.set_place(partition, Place::After(event.revision)),
            Record::GapBegin(_) => state.set_place(partition, Place::Rows),
            Record::Row { .. } => {}
            Record::GapEnd { gap, .. } => state.set_place(partition, Place::After(gap.at)),
        }
        state.bytes += bytes_of(record);
        state.items.push_back(Item::Record(Arc::clone(record)));
        state.wake();
        true
    }

    /// What is up to this revision has been put in, or does not concern the watcher.
    pub(super) fn reach(&self, partition: u16, revision: u64) {
        let mut state = self.state.lock();
        match state.place(partition) {
            Place::Now => {
                state.set_place(partition, Place::After(revision));
                if let Some(begins) = &mut state.begins {
                    begins.push((partition, revision));
                }
            }
            Place::After(before) if before < revision => {
                state.set_place(partition, Place::After(revision));
            }
            Place::After(_) | Place::Rows => {}
        }
    }

    pub(super) fn place(&self, partition: u16) -> Place {
        self.state.lock().place(partition)
    }

    /// Says that the watch is under way, once every partition has a place. What is in the queue comes behind
    /// that. Whether it has been said.
    pub(super) fn start(&self) -> bool {
        let mut state = self.state.lock();
        if state.places.iter().any(|(_, place)| *place == Place::Now) {
            return false;
        }
        if let Some(mut begins) = state.begins.take() {
            begins.sort_unstable();
            state.items.push_front(Item::Started(begins));
            state.bytes += ITEM_BYTES;
            state.has_started = true;
            state.wake();
        }
        true
    }

    /// To be called from time to time: tells the watcher that it is not forgotten, if it has heard nothing
    /// since the last call, and brings its places up to date.
    pub(super) fn beat(&self) {
        let mut state = self.state.lock();
        let is_waiting = matches!(state.items.back(), Some(Item::At { .. }));
        if !state.has_started || state.ended.is_some() || is_waiting || state.is_full() {
            return;
        }
        let is_shown = !std::mem::take(&mut state.is_lively) && state.items.is_empty();
        let known = |&(partition, place): &(u16, Place)| match place {
            Place::After(revision) => Some((partition, revision)),
            Place::Now | Place::Rows => None,
        };
        let positions: Positions = state.places.iter().filter_map(known).collect();
        state.bytes += ITEM_BYTES;
        state.items.push_back(Item::At { positions, is_shown });
        state.wake();
    }

    /// Whether there is no room, and nothing was taken since the last call.
    pub(super) fn has_stalled(&self) -> bool {
        let mut state = self.state.lock();
        !std::mem::take(&mut state.is_taken_from) && state.is_full()
    }

    /// Somebody else must go on showing a partition, from its place on.
    pub(super) fn give_back(&self, partition: u16, why: Why) {
        self.state.lock().given_back.push((partition, why));
        self.returned.notify_one();
    }

    /// Waits for partitions that were given back.
    pub(super) async fn given_back(&self) -> Vec<(u16, Why)> {
        loop {
            let given_back = std::mem::take(&mut self.state.lock().given_back);
            if !given_back.is_empty() {
                return given_back;
            }
            self.returned.notified().await;
        }
    }

    /// Waits for room.
    pub(super) async fn room(&self) {
        loop {
            // What is taken after the look must be heard of.
            let mut taken = std::pin::pin!(self.taken.notified());
            taken.as_mut().enable();
            if !self.state.lock().is_full() {
                return;
            }
            taken.await;
        }
    }

    /// Ends the watch: what has not been taken is dropped, the last token resumes before it.
    pub(super) fn end(&self, ended: Ended) {
        let mut state = self.state.lock();
        if state.ended.is_none() {
            state.ended = Some(ended);
            state.items = VecDeque::new();
            state.bytes = 0;
            state.wake();
            self.taken.notify_waiters();
        }
    }

    /// What comes next, with the watcher's places behind it.
    pub(super) fn poll_take(
        &self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<(Taken, Positions), Ended>>> {
        let mut state = self.state.lock();
        while state.has_started || state.ended.is_some() {
            let was_full = state.is_full();
            let Some(item) = state.items.pop_front() else { break };
            state.bytes -= item.bytes();
            state.is_taken_from = true;
            let taken = state.pass(item);
            if was_full && !state.is_full() {
                self.taken.notify_waiters();
            }
            if let Some(taken) = taken {
                state.is_lively = true;
                let positions = state.taken.iter();
                let positions = positions.filter_map(|&(partition, at)| Some((partition, at?)));
                return Poll::Ready(Some(Ok((taken, positions.collect()))));
            }
        }
        match &state.ended {
            None => {
                state.taker = Some(context.waker().clone());
                Poll::Pending
            }
            Some(_) if state.has_told_end => Poll::Ready(None),
            Some(ended) => {
                let ended = ended.clone();
                state.has_told_end = true;
                Poll::Ready(Some(Err(ended)))
            }
        }
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.bytes >= self.room.bytes || self.items.len() >= self.room.items
    }

    fn place(&self, partition: u16) -> Place {
        let at = self.places.binary_search_by_key(&partition, |(of, _)| *of);
        at.map_or(Place::Rows, |at| self.places[at].1)
    }

    fn set_place(&mut self, partition: u16, place: Place) {
        if let Ok(at) = self.places.binary_search_by_key(&partition, |(of, _)| *of) {
            self.places[at].1 = place;
        }
    }

    fn set_taken(&mut self, partition: u16, revision: Option<u64>) {
        if let Ok(at) = self.taken.binary_search_by_key(&partition, |(of, _)| *of) {
            self.taken[at].1 = revision;
        }
    }

    /// Moves the places behind an item; gives what the watcher is shown of it.
    fn pass(&mut self, item: Item) -> Option<Taken> {
        match item {
            Item::Started(begins) => {
                for (partition, revision) in begins {
                    self.set_taken(partition, Some(revision));
                }
                Some(Taken::Started)
            }
            Item::Record(record) => {
                let partition = record.partition();
                match &*record {
                    Record::Change(event) => self.set_taken(partition, Some(event.revision)),
                    Record::GapBegin(_) => self.set_taken(partition, None),
                    Record::Row { .. } => {}
                    Record::GapEnd { gap, .. } => self.set_taken(partition, Some(gap.at)),
                }
                Some(Taken::Record(record))
            }
            Item::At { positions, is_shown } => {
                for (partition, revision) in positions {
                    self.set_taken(partition, Some(revision));
                }
                is_shown.then_some(Taken::KeepAlive)
            }
        }
    }

    fn wake(&mut self) {
        if let Some(taker) = self.taker.take() {
            taker.wake();
        }
    }
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Item::Record(record) => bytes_of(record),
            Item::Started(_) | Item::At { .. } => ITEM_BYTES,
        }
    }
}

fn bytes_of(record: &Record) -> usize {
    match record {
        Record::Change(event) | Record::Row { event, .. } => ITEM_BYTES + event.bytes(),
        Record::GapBegin(_) | Record::GapEnd { .. } => ITEM_BYTES,
    }
}
