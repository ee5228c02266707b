//! Changes that the log here does not have, asked of the other nodes, one after the other, until one has them.
//!
//! As in `flux-server`'s `feed/elsewhere.rs`, with a question for every few changes where that has streams.

use flux_log::LogReader;
use flux_proto::event::{Event, Place};

use super::older::Question;
use super::{Hosted, LOG_READ_BYTES, MESSAGE_BYTES};
use crate::node::{Options, Output, Process};
use crate::plan::MS;

use flux_cdc::Chunk;
use flux_core::feed::RingRead;
use flux_core::replica::Now;

/// A node that has not answered for so long is silent.
pub const TIMEOUT_US: u64 = 500 * MS;
/// How long those that are silent are waited for, and the pause until they are asked again.
const WAIT_US: u64 = 2_500 * MS;
const PAUSE_US: u64 = 100 * MS;

/// A question to another node.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Tells it from others of the process.
    pub number: u64,
    /// Whose changes.
    pub partition: u16,
    /// What comes behind this revision.
    pub after: u64,
    /// The node.
    pub to: u32,
    /// Whether it is to have a replica.
    pub holds: bool,
}

/// What comes of a question.
#[derive(Clone, Debug)]
pub enum Answered {
    /// It has these.
    Has(Vec<Event>),
    /// It has not got them.
    Lacks,
    /// It cannot be reached, or does not know yet.
    Silent,
}

/// Those who can be asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Others<'a> {
    pub(super) me: u32,
    pub(super) targets: &'a [Vec<u64>],
    pub(super) nodes: &'a [u32],
}

impl Others<'_> {
    /// Those that are to have a replica first.
    fn of(&self, partition: u16) -> Vec<(u32, bool)> {
        let targets = self.targets.get(usize::from(partition)).map_or(&[][..], Vec::as_slice);
        let holding: Vec<u32> = targets.iter().map(|id| (*id >> 32) as u32).collect();
        let rest = self.nodes.iter().filter(|node| !holding.contains(node));
        let all = holding.iter().map(|node| (*node, true)).chain(rest.map(|node| (*node, false)));
        all.filter(|(node, _)| *node != self.me).collect()
    }
}

#[derive(Debug)]
enum State {
    /// The nodes are to be asked, not before this time.
    Due(u64),
    /// Until when an answer is waited for.
    Asking(Asked, u64),
    /// These were received, and not all of them were read.
    Has(Vec<Event>),
}

/// What is missing here.
#[derive(Debug)]
pub(super) struct Fetch {
    after: u64,
    /// Those that are still to be asked.
    left: Vec<(u32, bool)>,
    is_silent: bool,
    waits_since_us: Option<u64>,
    state: State,
}

/// What comes of looking for it.
pub(super) enum Fetched {
    Changes(Vec<Event>),
    Later,
    Nobody,
}

impl Fetch {
    pub(super) fn new(after: u64) -> Fetch {
        let state = State::Due(0);
        Fetch { after, left: Vec::new(), is_silent: false, waits_since_us: None, state }
    }

    /// Whether it is what comes behind a revision.
    pub(super) fn goes_on(&self, after: u64) -> bool {
        match &self.state {
            State::Has(events) => events.iter().any(|event| event.revision == after + 1),
            State::Due(_) | State::Asking(..) => self.after == after,
        }
    }

    /// Goes on.
    pub(super) fn step(
        &mut self,
        partition: u16,
        after: u64,
        others: Others<'_>,
        numbers: &mut u64,
        now: Now,
        out: &mut Output,
    ) -> Fetched {
        match &self.state {
            State::Has(events) => {
                let left = events.iter().filter(|event| event.revision > after);
                return Fetched::Changes(left.cloned().collect());
            }
            State::Asking(asked, until_us) if now.us >= *until_us => {
                self.is_silent |= asked.holds;
            }
            State::Asking(..) => return Fetched::Later,
            State::Due(at_us) if now.us < *at_us => return Fetched::Later,
            State::Due(_) => {
                self.left = others.of(partition);
                self.left.reverse();
                self.is_silent = false;
            }
        }
        let Some((to, holds)) = self.left.pop() else { return self.asked_all(now) };
        *numbers += 1;
        let asked = Asked { number: *numbers, partition, after, to, holds };
        out.asked.push(asked);
        self.state = State::Asking(asked, now.us + TIMEOUT_US);
        Fetched::Later
    }

    /// None of those that answered has it.
    fn asked_all(&mut self, now: Now) -> Fetched {
        let since_us = *self.waits_since_us.get_or_insert(now.us);
        self.state = State::Due(now.us + PAUSE_US);
        match self.is_silent && now.us < since_us + WAIT_US {
            true => Fetched::Later,
            false => Fetched::Nobody,
        }
    }

    /// A node answers.
    fn answered(&mut self, number: u64, answered: Answered) {
        let State::Asking(asked, until_us) = &mut self.state else { return };
        if asked.number != number {
            return;
        }
        match answered {
            Answered::Has(events)
                if events.first().is_some_and(|one| one.revision == asked.after + 1) =>
            {
                self.state = State::Has(events);
            }
            // The next one is asked at once.
            Answered::Has(_) | Answered::Lacks => {
                asked.holds = false;
                *until_us = 0;
            }
            Answered::Silent => *until_us = 0,
        }
    }
}

impl Hosted {
    /// What of other nodes' changes is read at once.
    pub(super) fn chunk_from_elsewhere(
        &self,
        after: u64,
        up_to: u64,
        options: &Options,
        events: Vec<Event>,
    ) -> Option<Chunk> {
        let (mut taken, mut bytes): (Vec<Event>, usize) = (Vec::new(), 0);
        for event in events.into_iter().filter(|event| event.revision <= up_to) {
            let is_full = taken.len() >= options.batch_max_events || bytes >= MESSAGE_BYTES;
            if is_full && !taken.is_empty() {
                break;
            }
            bytes += event.bytes();
            taken.push(event);
        }
        // Any lower bound of the index will do, and the cursor's is one.
        let known = self.replica.cursor();
        let index = if known.revision <= after { known.index } else { 0 };
        let revision = taken.last()?.revision;
        Some(Chunk::Changes { events: taken, through: Place { revision, index } })
    }

    /// For another node: what is here behind a revision.
    fn own_changes(&self, reader: &LogReader, after: u64, options: &Options) -> Answered {
        let Some(at) = self.view.place() else { return Answered::Lacks };
        if at.revision <= after {
            return Answered::Silent;
        }
        let recent = self.feed.ring.as_ref().map(|ring| ring.after(after, MESSAGE_BYTES));
        let entries = match recent {
            Some(RingRead::Entries(entries)) => entries,
            _ => {
                let question = Question {
                    partition: self.replica.partition().0,
                    after,
                    from: None,
                    bytes: LOG_READ_BYTES,
                    applied: self.view.applied(),
                    keeps_replaced: false,
                };
                match question.answer(reader) {
                    Ok(older) if older.is_empty() => return Answered::Lacks,
                    Ok(older) => older.into_iter().map(|one| one.entry).collect(),
                    Err(_) => return Answered::Silent,
                }
            }
        };
        match self.chunk(after, at.revision, options, entries.iter()) {
            Ok(Some(Chunk::Changes { events, .. })) => Answered::Has(events),
            Ok(_) | Err(_) => Answered::Silent,
        }
    }
}

impl Process {
    /// What this node has, itself, behind a revision of a partition.
    pub fn own_changes(&self, partition: u16, after: u64) -> Answered {
        match self.hosted.get(&partition) {
            Some(hosted) => hosted.own_changes(&self.log.reader(), after, &self.options),
            None => Answered::Lacks,
        }
    }

    /// What comes of a question.
    pub(in crate::node) fn elsewhere_answers(&mut self, number: u64, answered: Answered) {
        let fetches = self.hosted.values_mut().filter_map(|hosted| hosted.feed.fetch.as_mut());
        for fetch in fetches {
            if matches!(&fetch.state, State::Asking(asked, _) if asked.number == number) {
                return fetch.answered(number, answered);
            }
        }
    }
}
