//! One partition's way to the broker: what is read next, what is sent, and how far the cursor is.
//!
//! One message is out at a time, and the next one goes only after it was confirmed and not returned;
//! what failed is sent again, the same or the same read anew. So a lane sends the revisions from its cursor on without a
//! hole, and each of its messages continues what the queue already has. That holds for several lanes
//! of one partition at once too, as when an old leader does not know yet that it was replaced: each
//! began at a confirmed cursor. The first occurrences of the revisions at the queue are therefore in
//! order, always, and everything else is a repeat.
//!
//! What this module does not do: read, send, wait, or know what time it is.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use flux_proto::event::{Event, Gap, GapId, Place, Record};

use crate::feed::{Led, RowMark, Rows};

/// What a lane needs from the feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// What comes after a revision: answered by [`Lane::changes`] or [`Lane::gap`].
    Read {
        /// The cursor.
        after: u64,
    },
    /// A page of current values: answered by [`Lane::rows`].
    Rows {
        /// The gap that they stand for.
        gap: Gap,
        /// Where the page begins; none: at the beginning.
        from: Option<RowMark>,
    },
}

/// What became of a message that is not known to be in every queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The connection ended first: it may be in any of them.
    Unknown,
    /// It may be in some and not in others.
    Refused,
    /// It is in none.
    Nowhere,
}

/// What is sent as one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Changes, dense from the cursor on.
    Changes(Vec<Event>),
    /// The begin of a gap.
    GapBegin(Gap),
    /// Current values within a gap.
    Rows {
        /// The gap.
        gap: GapId,
        /// The number of the first row; the others count on.
        first: u64,
        /// The rows.
        events: Vec<Event>,
    },
    /// The end of a gap.
    GapEnd {
        /// The gap.
        gap: GapId,
        /// How many rows it had.
        rows: u64,
    },
}

impl Message {
    /// The records of the message, in order; never none.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record> + '_ {
        (0..self.len()).map(|at| match self {
            Message::Changes(events) => Record::Change(events[at].clone()),
            Message::GapBegin(gap) => Record::GapBegin(gap.clone()),
            Message::Rows { gap, first, events } => {
                Record::Row { gap: *gap, number: first + at as u64, event: events[at].clone() }
            }
            Message::GapEnd { gap, rows } => Record::GapEnd { gap: *gap, rows: *rows },
        })
    }

    /// The changes or rows that it carries.
    pub fn events(&self) -> &[Event] {
        match self {
            Message::Changes(events) | Message::Rows { events, .. } => events,
            Message::GapBegin(_) | Message::GapEnd { .. } => &[],
        }
    }

    fn len(&self) -> usize {
        match self {
            Message::Changes(events) | Message::Rows { events, .. } => events.len(),
            Message::GapBegin(_) | Message::GapEnd { .. } => 1,
        }
    }
}

/// One partition's publishing, from a cursor on.
///
/// There is either something that it wants or a message that it has out, never both.
#[derive(Debug)]
pub struct Lane {
    partition: u16,
    /// Everything up to here is confirmed.
    cursor: Place,
    max_events: usize,
    state: State,
    failures: u32,
    /// The message that is out may be in some queue, from an earlier time that it was sent.
    may_be_stored: bool,
}

#[derive(Debug)]
enum State {
    /// Wants what is behind the cursor.
    Idle,
    /// Changes are out.
    Changes { message: Message, through: Place },
    /// A gap is under way.
    Gap { walk: Walk, message: Option<Message> },
}

/// How far the rows of a gap are.
#[derive(Debug)]
struct Walk {
    gap: Gap,
    /// The rows that were put into messages so far, and those of them before the page that was read last.
    rows: u64,
    rows_before: u64,
    /// Where that page begins, and what is left of it.
    from: Option<RowMark>,
    page: VecDeque<Event>,
    next: Next,
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Page(Option<RowMark>),
    End,
    Done,
}

impl Lane {
    /// A lane that goes on at a cursor, with at most so many rows in a message. Of changes it sends
    /// in one message what it is given at once.
    pub fn new(led: Led, max_events: usize) -> Lane {
        let Led { partition, cursor, .. } = led;
        Lane {
            partition,
            cursor,
            max_events: max_events.max(1),
            state: State::Idle,
            failures: 0,
            may_be_stored: false,
        }
    }

    /// The partition.
    pub fn partition(&self) -> u16 {
        self.partition
    }

    /// Up to where everything is confirmed.
    pub fn cursor(&self) -> Place {
        self.cursor
    }

    /// How often the message that is out has failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// What is to be read; none while a message is out.
    pub fn want(&self) -> Option<Want> {
        match &self.state {
            State::Idle => Some(Want::Read { after: self.cursor.revision }),
            State::Gap { walk: Walk { gap, next: Next::Page(from), .. }, message: None } => {
                Some(Want::Rows { gap: gap.clone(), from: *from })
            }
            State::Changes { .. } | State::Gap { .. } => None,
        }
    }

    /// What is to be sent, the same until it is confirmed.
    pub fn message(&self) -> Option<&Message> {
        match &self.state {
            State::Idle => None,
            State::Changes { message, .. } => Some(message),
            State::Gap { message, .. } => message.as_ref(),
        }
    }

    /// Changes were read.
    ///
    /// # Panics
    /// If they are not what [`Lane::want`] asks for: the changes behind the cursor without a hole.
    pub fn changes(&mut self, events: Vec<Event>, through: Place) {
        assert!(matches!(self.state, State::Idle), "no changes were asked for");
        let mut revision = self.cursor.revision;
        for event in &events {
            revision += 1;
            assert_eq!(event.revision, revision, "a hole in the feed");
        }
        assert!(!events.is_empty() && revision == through.revision, "a chunk without its end");
        self.state = State::Changes { message: Message::Changes(events), through };
    }

    /// What is behind the cursor is nowhere any more.
    ///
    /// # Panics
    /// If no changes were asked for, or the gap does not begin behind the cursor.
    pub fn gap(&mut self, gap: Gap) {
        assert!(matches!(self.state, State::Idle), "no changes were asked for");
        assert_eq!(*gap.lost.start(), self.cursor.revision + 1, "a hole before the gap");
        assert!(gap.at.revision > self.cursor.revision, "a gap that ends before it begins");
        let message = Some(Message::GapBegin(gap.clone()));
        let walk = Walk {
            gap,
            rows: 0,
            rows_before: 0,
            from: None,
            page: VecDeque::new(),
            next: Next::Page(None),
        };
        self.state = State::Gap { walk, message };
    }

    /// A page of rows was read.
    ///
    /// # Panics
    /// If no rows were asked for.
    pub fn rows(&mut self, rows: Rows) {
        assert!(matches!(self.want(), Some(Want::Rows { .. })), "no rows were asked for");
        if let State::Gap { walk, message } = &mut self.state {
            if let Next::Page(from) = walk.next {
                walk.from = from;
            }
            walk.rows_before = walk.rows;
            walk.page = rows.events.into();
            walk.next = rows.next.map_or(Next::End, |mark| Next::Page(Some(mark)));
            *message = walk.take(self.max_events);
        }
    }

    /// The message that is out is in the queue. Gives the new cursor, where it moves: past changes,
    /// and past a gap at its end only.
    ///
    /// # Panics
    /// If no message is out.
    pub fn confirmed(&mut self) -> Option<Place> {
        assert!(self.message().is_some(), "no message is out");
        self.failures = 0;
        self.may_be_stored = false;
        match &mut self.state {
            State::Gap { walk, message } => {
                if !matches!(walk.next, Next::Done) {
                    *message = walk.take(self.max_events);
                    return None;
                }
                self.cursor = walk.gap.at;
            }
            State::Changes { through, .. } => self.cursor = *through,
            State::Idle => {}
        }
        self.state = State::Idle;
        Some(self.cursor)
    }

    /// The message that is out goes again. One that failed by itself may fail for long, and is not kept for
    /// that where it can be read anew.
    pub fn failed(&mut self, failure: Failure) {
        self.failures = self.failures.saturating_add(1);
        self.may_be_stored |= failure != Failure::Nowhere;
        match (&mut self.state, failure) {
            (State::Changes { .. }, Failure::Refused | Failure::Nowhere) => {
                self.state = State::Idle;
                self.may_be_stored = false;
            }
            // Read anew, a page lacks the rows that have changed since: none of it may be in a queue, where
            // the others would then have wrong numbers.
            (State::Gap { walk, message }, Failure::Nowhere)
                if !self.may_be_stored && walk.has_whole_page_in(message) =>
            {
                walk.rows = walk.rows_before;
                walk.page.clear();
                walk.next = Next::Page(walk.from);
                *message = None;
            }
            _ => {}
        }
    }

    /// What was read does not belong together any more ([`crate::FeedError::Restart`]): from the cursor again.
    pub fn restart(&mut self) {
        self.state = State::Idle;
        self.failures = 0;
        self.may_be_stored = false;
    }
}

impl Walk {
    /// Whether nothing of the page that was read last was in a message before this one.
    fn has_whole_page_in(&self, message: &Option<Message>) -> bool {
        matches!(message, Some(Message::Rows { first, .. }) if *first == self.rows_before + 1)
    }

    /// The next message; none where a page must be read first.
    fn take(&mut self, max_events: usize) -> Option<Message> {
        let gap = self.gap.id();
        if !self.page.is_empty() {
            let events: Vec<Event> = self.page.drain(..max_events.min(self.page.len())).collect();
            let first = self.rows + 1;
            self.rows += events.len() as u64;
            return Some(Message::Rows { gap, first, events });
        }
        match self.next {
            Next::Page(_) | Next::Done => None,
            Next::End => {
                self.next = Next::Done;
                Some(Message::GapEnd { gap, rows: self.rows })
            }
        }
    }
}
