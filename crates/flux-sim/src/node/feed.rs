//! A node's changes on their way to the broker: what is recent from memory, what is older from the log, what the
//! log lacks from other nodes, and the current values of what is nowhere any more; and back, how far the broker
//! has confirmed them.
//!
//! As in `flux-server`'s `feed` and `worker/captured.rs`, and `flux-cdc`'s publisher, around the real ring, the
//! real reader of the log and the real lane. It acts in the process's turns, where the server has threads.

mod decode;
mod elsewhere;
mod older;

use std::sync::Arc;

use flux_cdc::{Chunk, Failure, Lane, Led, Publication, Want};
use flux_core::Cursor;
use flux_core::feed::{Committed, Ring, RingRead};
use flux_core::replica::{Now, Replica};
use flux_log::LogReader;
use flux_proto::event::{Event, Gap, Place};

pub use self::elsewhere::{Answered, Asked, TIMEOUT_US};
use self::elsewhere::{Fetch, Fetched, Others};
use self::older::Older;
use super::{Hosted, Options, Output, Process, Surroundings, Waiter};
use crate::plan::MS;
use crate::plant::Plant;

/// For so long changes are kept in memory after somebody has read last.
const INTEREST_US: u64 = 600 * MS;
/// Ticks between two entries that say how far changes are passed on, and between two attempts to trim what is
/// kept for readers.
const CURSOR_TICKS: u64 = 10;
/// Bytes of changes that a message takes, and that are read back from the log at a time.
const MESSAGE_BYTES: usize = 2 * 1024;
const LOG_READ_BYTES: usize = 4 * 1024;
/// A connection on which nothing was confirmed for so long is given up.
const CONFIRM_US: u64 = 1_500 * MS;
/// Pauses that double: between two connections, and until what was refused is sent again.
const RECONNECT_US: (u64, u64) = (20 * MS, 1_000 * MS);
const RESEND_US: (u64, u64) = (20 * MS, 500 * MS);
/// The pause after the log could not be read.
const READ_AGAIN_US: u64 = 100 * MS;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the queue.
    Stored,
    /// No queue takes it.
    Returned,
    /// The broker will not have it.
    Refused,
}

/// A message on its way to the broker.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The connection that it goes over.
    pub session: u64,
    /// Its number there.
    pub tag: u64,
    /// Whose changes it has.
    pub partition: u16,
    /// What it is.
    pub publication: Publication,
}

/// A gap that a node tells of.
#[derive(Clone, Debug)]
pub struct Told {
    /// The gap.
    pub gap: Gap,
    /// The entry after which the log of the node's replica begins.
    pub start: u64,
}

/// What a replica's node keeps for those who follow it.
#[derive(Debug, Default)]
pub(super) struct PartitionFeed {
    /// None while nobody reads.
    ring: Option<Ring>,
    wanted_until_us: u64,
    confirmed: Cursor,
    /// The lowest index of the log with a change that is not passed on.
    unconfirmed: u64,
    /// Where the lane has come to in the log, and the batch there.
    place: Option<(Cursor, u64)>,
    /// What was read back from the log last.
    older: Vec<Older>,
    /// What other nodes are asked for.
    fetch: Option<Fetch>,
    publishing: Option<Publishing>,
}

/// What is under way to the broker.
#[derive(Debug)]
struct Publishing {
    lane: Lane,
    term: u64,
    /// The message that is out: its connection, its number, and since when.
    out: Option<(u64, u64, u64)>,
    not_before_us: u64,
}

/// A process's connection to the broker.
#[derive(Debug, Default)]
pub(super) struct Link {
    session: Option<u64>,
    connecting: bool,
    not_before_us: u64,
    failures: u32,
    next_tag: u64,
    /// Questions to other nodes so far.
    asked: u64,
    ticks: u64,
}

fn applied(replica: &Replica<Waiter>) -> Cursor {
    Cursor { revision: replica.revision(), index: replica.applied().index }
}

fn place(cursor: Cursor) -> Place {
    Place { revision: cursor.revision, index: cursor.index }
}

fn cursor(place: Place) -> Cursor {
    Cursor { revision: place.revision, index: place.index }
}

fn pause((first, most): (u64, u64), failures: u32) -> u64 {
    (first << failures.saturating_sub(1).min(10)).min(most)
}

impl PartitionFeed {
    /// The memory that recent changes take.
    pub(super) fn ring_bytes(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::bytes)
    }

    /// Takes what was applied. Where that is not what follows, the contents were replaced.
    fn grew(&mut self, entries: &mut Vec<Committed>, at: Cursor) {
        let Some(ring) = &mut self.ring else { return entries.clear() };
        entries.drain(..).for_each(|entry| ring.push(Arc::new(entry)));
        if ring.last().is_none_or(|last| last < at.revision) {
            ring.begin((at.revision, at.index));
        }
    }

    /// The planted bug: what is only proposed is passed on.
    pub(super) fn proposed(&mut self, entry: &raft::eraftpb::Entry) {
        if let (Some(ring), Ok(Some(one))) = (&mut self.ring, Committed::read(entry.clone())) {
            ring.push(Arc::new(one));
        }
    }

    /// The lowest index that somebody needs of the log.
    pub(super) fn needs(&self) -> u64 {
        let reader = self.place.map(|(at, _)| at.index + 1);
        self.unconfirmed.min(reader.unwrap_or(u64::MAX))
    }

    /// What the lane that is there may send at the most, to be sent again.
    fn failed(&mut self, now: Now, failure: Failure) {
        let Some(publishing) = &mut self.publishing else { return };
        if publishing.out.take().is_some() {
            publishing.lane.failed(failure);
            if failure != Failure::Unknown {
                publishing.not_before_us = now.us + pause(RESEND_US, publishing.lane.failures());
            }
        }
    }
}

impl Hosted {
    /// The memory that recent changes take.
    pub fn ring_bytes(&self) -> usize {
        self.feed.ring_bytes()
    }

    /// Gives what was applied to those who follow it.
    pub(super) fn pass_on_changes(&mut self) {
        if self.replica.captures() && !self.replica.is_restoring() {
            let mut committed = Vec::new();
            self.replica.take_committed(&mut committed);
            self.feed.grew(&mut committed, applied(&self.replica));
        }
    }

    /// Has the log say how far changes are passed on, if that has moved.
    pub(super) fn put_cursor(&mut self) {
        let confirmed = self.feed.confirmed;
        if self.replica.leads() && confirmed > self.replica.cursor() {
            self.replica.propose_cursor(confirmed);
        }
    }

    /// Begins and ends to keep changes in memory, and begins a lane with each term in which it leads.
    fn tick_feed(&mut self, options: &Options, now: Now) {
        let (replica, feed) = (&mut self.replica, &mut self.feed);
        feed.unconfirmed = replica.cursor().needs(applied(replica));
        if !replica.leads() {
            feed.fetch = None;
        }
        let wanted = feed.wanted_until_us > now.us;
        if wanted != replica.captures() {
            replica.set_capture(wanted);
            feed.ring = None;
            feed.older.clear();
            if wanted {
                let at = applied(replica);
                let mut ring = Ring::new(options.ring_bytes);
                ring.begin((at.revision, at.index));
                feed.ring = Some(ring);
            }
        }
        let term = replica.leads().then(|| replica.term());
        if feed.publishing.as_ref().map(|one| one.term) == term {
            return;
        }
        feed.publishing = term.map(|term| {
            let cursor = place(replica.cursor());
            let led = Led { partition: replica.partition().0, term, cursor };
            let lane = Lane::new(led, options.batch_max_events);
            Publishing { lane, term, out: None, not_before_us: 0 }
        });
    }

    /// What comes after a revision, if there is something.
    fn read(
        &mut self,
        reader: &LogReader,
        after: u64,
        options: &Options,
        now: Now,
        elsewhere: Option<&mut Asking<'_>>,
    ) -> Result<Option<Chunk>, String> {
        self.feed.wanted_until_us = now.us + INTEREST_US;
        let Some(at) = self.view.place() else { return Ok(None) };
        let up_to = if options.has(Plant::FeedBeforeCommit) { u64::MAX } else { at.revision };
        match self.feed.ring.as_ref().map(|ring| ring.after(after, MESSAGE_BYTES)) {
            Some(RingRead::Entries(entries)) => {
                self.feed.place.take_if(|(at, _)| at.revision == after);
                return self.chunk(after, up_to, options, entries.iter());
            }
            Some(RingRead::UpToDate) => return Ok(None),
            Some(RingRead::Older { .. }) | None if at.revision <= after => return Ok(None),
            Some(RingRead::Older { .. }) | None => {}
        }
        self.feed.fetch.take_if(|fetch| !fetch.goes_on(after));
        if self.feed.fetch.is_none() && !self.feed.has_read(after) {
            let from = self.feed.place.filter(|(at, _)| at.revision == after).map(|(_, lsn)| lsn);
            let question = older::Question {
                partition: self.replica.partition().0,
                after,
                from,
                bytes: LOG_READ_BYTES,
                applied: self.view.applied(),
                keeps_replaced: options.has(Plant::LogReadKeepsReplaced),
            };
            self.feed.older = question.answer(reader).map_err(|error| error.to_string())?;
        }
        let older = match self.feed.fetch {
            Some(_) => Vec::new(),
            None => std::mem::take(&mut self.feed.older),
        };
        if older.is_empty() {
            if at.revision <= after {
                return Ok(None);
            }
            // What a lane sends beside what it may is not looked for elsewhere.
            let Some(elsewhere) = elsewhere else { return Ok(None) };
            match self.look_elsewhere(after, options, now, elsewhere) {
                Fetched::Changes(events) => {
                    return Ok(self.chunk_from_elsewhere(after, up_to, options, events));
                }
                Fetched::Later => return Ok(None),
                Fetched::Nobody => self.feed.fetch = None,
            }
            let term = self.feed.publishing.as_ref().map_or(0, |one| one.term);
            let partition = self.replica.partition().0;
            let gap = Gap { partition, lost: after + 1..=at.revision, at: place(at), term };
            return Ok(Some(Chunk::Gap(gap)));
        }
        let chunk = self.chunk(after, up_to, options, older.iter().map(|one| &one.entry));
        if let Ok(Some(Chunk::Changes { through, .. })) = &chunk
            && let Some(last) = older.iter().find(|one| one.entry.last >= through.revision)
        {
            self.feed.place = Some((cursor(*through), last.lsn));
        }
        self.feed.older = older;
        chunk
    }

    /// What other nodes have of what is not here.
    fn look_elsewhere(
        &mut self,
        after: u64,
        options: &Options,
        now: Now,
        Asking { others, numbers, out }: &mut Asking<'_>,
    ) -> Fetched {
        if options.has(Plant::GapWithoutAsking) {
            return Fetched::Nobody;
        }
        let partition = self.replica.partition().0;
        let fetch = self.feed.fetch.get_or_insert_with(|| Fetch::new(after));
        fetch.step(partition, after, *others, numbers, now, out)
    }

    /// The changes behind `after`, up to a revision and the limit of a message.
    fn chunk<'a>(
        &self,
        after: u64,
        up_to: u64,
        options: &Options,
        entries: impl Iterator<Item = &'a Arc<Committed>>,
    ) -> Result<Option<Chunk>, String> {
        let (mut events, mut bytes): (Vec<Event>, usize) = (Vec::new(), 0);
        let mut through = Place::default();
        let partition = self.replica.partition().0;
        for entry in entries.filter(|entry| entry.last > after) {
            let all = decode::events(partition, entry).map_err(|error| error.to_string())?;
            for event in all.into_iter().filter(|event| event.revision > after) {
                bytes += event.bytes();
                let is_full = events.len() >= options.batch_max_events || bytes > MESSAGE_BYTES;
                if event.revision > up_to || (is_full && !events.is_empty()) {
                    return Ok(chunk_of(events, through));
                }
                through = place(entry.read_to(event.revision));
                events.push(event);
            }
        }
        match events.first() {
            Some(first) if first.revision != after + 1 => {
                Err(format!("revision {} came where {} should", first.revision, after + 1))
            }
            _ => Ok(chunk_of(events, through)),
        }
    }
}

/// How other nodes are asked.
struct Asking<'a> {
    others: Others<'a>,
    numbers: &'a mut u64,
    out: &'a mut Output,
}

fn chunk_of(events: Vec<Event>, through: Place) -> Option<Chunk> {
    (!events.is_empty()).then_some(Chunk::Changes { events, through })
}

impl PartitionFeed {
    /// Whether what was read back last begins no later than behind `after`.
    fn has_read(&self, after: u64) -> bool {
        match (self.older.first(), self.older.last()) {
            (Some(first), Some(last)) => first.entry.first <= after + 1 && after < last.entry.last,
            _ => false,
        }
    }
}

impl Process {
    /// What a tick means for those who follow changes.
    pub(super) fn tick_feeds(
        &mut self,
        now: Now,
        out: &mut Output,
    ) -> Result<(), flux_log::LogError> {
        if !self.options.publishes {
            return Ok(());
        }
        self.link.ticks += 1;
        let puts = self.link.ticks.is_multiple_of(CURSOR_TICKS);
        for hosted in self.hosted.values_mut() {
            hosted.tick_feed(&self.options, now);
            if puts {
                hosted.put_cursor();
            }
        }
        if puts && self.log.pinned_bytes() > 0 {
            self.trim(out)?;
        }
        let overdue = self.hosted.values().any(|hosted| {
            let out = hosted.feed.publishing.as_ref().and_then(|one| one.out);
            out.is_some_and(|(_, _, since_us)| now.us > since_us + CONFIRM_US)
        });
        if overdue && let Some(session) = self.link.session {
            out.notes.push("gives up its connection to the broker".to_owned());
            self.broker_lost(session, now);
        }
        Ok(())
    }

    /// The broker has taken the connection that was asked for, or is not there.
    pub(super) fn broker_opened(&mut self, session: Option<u64>, now: Now) {
        self.link.connecting = false;
        self.link.session = session;
        match session {
            Some(_) => self.link.failures = 0,
            None => {
                self.link.failures += 1;
                self.link.not_before_us = now.us + pause(RECONNECT_US, self.link.failures);
            }
        }
    }

    /// A connection has broken: what became of the messages that were out is not known.
    pub(super) fn broker_lost(&mut self, session: u64, now: Now) {
        if self.link.session != Some(session) {
            return;
        }
        self.link.session = None;
        self.link.not_before_us = now.us + RECONNECT_US.0;
        self.hosted.values_mut().for_each(|hosted| hosted.feed.failed(now, Failure::Unknown));
    }

    /// The broker says what became of a message.
    pub(super) fn broker_answers(&mut self, session: u64, tag: u64, outcome: Outcome, now: Now) {
        if self.link.session != Some(session) {
            return;
        }
        let past_returned = self.options.has(Plant::CursorPastReturned);
        for hosted in self.hosted.values_mut() {
            let Some(publishing) = &mut hosted.feed.publishing else { continue };
            if publishing.out.is_none_or(|(_, out, _)| out != tag) {
                continue;
            }
            if outcome == Outcome::Stored || (outcome == Outcome::Returned && past_returned) {
                publishing.out = None;
                if let Some(to) = publishing.lane.confirmed() {
                    hosted.feed.confirmed = hosted.feed.confirmed.max(cursor(to));
                }
            } else if outcome == Outcome::Returned {
                hosted.feed.failed(now, Failure::Nowhere);
            } else {
                hosted.feed.failed(now, Failure::Refused);
            }
        }
    }

    /// Reads what lanes want and sends what they have, as far as that goes.
    pub(super) fn step_feeds(&mut self, around: Surroundings<'_>, out: &mut Output) {
        let Surroundings { now, targets, nodes, .. } = around;
        if !self.options.publishes {
            return;
        }
        let leads = self.hosted.values().any(|hosted| hosted.feed.publishing.is_some());
        if leads && self.link.session.is_none() && !self.link.connecting {
            self.link.connecting = self.link.not_before_us <= now.us;
            out.connects = self.link.connecting;
        }
        let reader = self.log.reader();
        for hosted in self.hosted.values_mut() {
            let others = Others { me: self.options.node, targets, nodes };
            let mut asking = Asking { others, numbers: &mut self.link.asked, out };
            hosted.fill_lane(&reader, &self.options, now, &mut asking);
            hosted.send(&mut self.link, &reader, &self.options, now, out);
        }
    }
}

impl Hosted {
    /// Reads what the lane wants until it has a message, or there is nothing.
    fn fill_lane(
        &mut self,
        reader: &LogReader,
        options: &Options,
        now: Now,
        asking: &mut Asking<'_>,
    ) {
        loop {
            let Some(publishing) = &mut self.feed.publishing else { return };
            if publishing.not_before_us > now.us {
                return;
            }
            match publishing.lane.want() {
                None => return,
                Some(Want::Rows { gap, from }) => {
                    let page = decode::page(self, &gap, from, options);
                    let Some(publishing) = &mut self.feed.publishing else { return };
                    match page {
                        Some(rows) => publishing.lane.rows(rows),
                        None => publishing.lane.restart(),
                    }
                }
                Some(Want::Read { after }) => {
                    let read = self.read(reader, after, options, now, Some(asking));
                    let out = &mut *asking.out;
                    let Some(publishing) = &mut self.feed.publishing else { return };
                    match read {
                        Ok(None) => return,
                        Ok(Some(Chunk::Changes { events, through })) => {
                            publishing.lane.changes(events, through);
                        }
                        Ok(Some(Chunk::Gap(gap))) => {
                            out.notes.push(format!("p{} tells of a gap: {gap:?}", gap.partition));
                            out.gaps.push(Told {
                                gap: gap.clone(),
                                start: self.start.max(self.begins),
                            });
                            publishing.lane.gap(gap);
                        }
                        Err(error) => {
                            out.notes.push(format!("cannot read its log back: {error}"));
                            publishing.not_before_us = now.us + READ_AGAIN_US;
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Sends the lane's message, if none is out and the time has come.
    fn send(
        &mut self,
        link: &mut Link,
        reader: &LogReader,
        options: &Options,
        now: Now,
        out: &mut Output,
    ) {
        let Some(publishing) = &mut self.feed.publishing else { return };
        let (Some(session), Some(message)) = (link.session, publishing.lane.message()) else {
            return;
        };
        if publishing.out.is_some() || publishing.not_before_us > now.us {
            return;
        }
        let partition = publishing.lane.partition();
        let batches = options.batch_max_events > 1;
        link.next_tag += 1;
        let tag = link.next_tag;
        let publication = Publication::new("sim", message, batches);
        out.publications.push(Outgoing { session, tag, partition, publication });
        publishing.out = Some((session, tag, now.us));
        let flux_cdc::Message::Changes(events) = message else { return };
        let through = events.last().map_or(0, |event| event.revision);
        if options.has(Plant::CursorBeforeConfirm) {
            let index = self.replica.applied().index;
            let early = Cursor { revision: through, index };
            self.feed.confirmed = self.feed.confirmed.max(early);
        }
        if options.has(Plant::NextBeforeConfirm)
            && let Ok(Some(Chunk::Changes { events, .. })) =
                self.read(reader, through, options, now, None)
        {
            link.next_tag += 1;
            let next = flux_cdc::Message::Changes(events);
            let publication = Publication::new("sim", &next, batches);
            out.publications.push(Outgoing { session, tag: link.next_tag, partition, publication });
        }
    }
}
