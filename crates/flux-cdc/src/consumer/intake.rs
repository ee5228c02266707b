//! From deliveries to lines: what is new becomes a line once, in order, and a delivery is acknowledged
//! only when the lines that it stands for are safe.
//!
//! A record that is ahead of what is missing is kept back, unacknowledged, for as long as the missing
//! one may still come: a broker may give what an earlier consumer had not acknowledged behind what that
//! one had never seen. Of a partition of which nothing is known, everything but its beginning is ahead. What this module does not do: talk to a broker, write lines anywhere, or read a
//! clock.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use flux_proto::event::{EventError, GapId, Record, read_json_body, write_json};

use crate::ledger::{Hole, Ledger, Verdict};

/// What is to be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The delivery's tag.
    pub tag: u64,
    /// It and all before it.
    pub multiple: bool,
}

/// How much has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records that became lines.
    pub lines: u64,
    /// Records that were there already.
    pub repeats: u64,
    /// Begins of gaps among the lines.
    pub gaps: u64,
    /// Revisions that the gaps say are lost.
    pub lost: u64,
}

/// What has come and is not settled yet.
#[derive(Debug)]
pub struct Intake {
    ledger: Ledger,
    lines: Vec<u8>,
    counts: Counts,
    repeats: Vec<(u16, u64)>,
    /// Deliveries that are not acknowledged, in the order of their tags; false: not yet all lines.
    unsettled: VecDeque<(u64, bool)>,
    /// What is ahead, by partition.
    ahead: BTreeMap<u16, Shelf>,
    patience: Duration,
    most_ahead: usize,
    is_filtered: bool,
    /// The partition that may begin with whatever was kept back of it, since its beginning did not come.
    begins: Option<u16>,
}

/// What a partition has kept back.
#[derive(Debug)]
struct Shelf {
    /// When something became a line for the last time, or the first was kept back.
    since: Instant,
    waiting: BTreeMap<(Rank, u64), VecDeque<Record>>,
}

/// The order in which the records of a partition come.
type Rank = (u64, u64, u64);

impl Intake {
    /// For a consumer that has what the ledger says. What is ahead waits for `patience`, and no more
    /// than `most_ahead` deliveries do: with more, what is missing may have no room to come.
    pub fn new(ledger: Ledger, patience: Duration, most_ahead: usize) -> Intake {
        Intake {
            ledger,
            lines: Vec::new(),
            counts: Counts::default(),
            repeats: Vec::new(),
            unsettled: VecDeque::new(),
            ahead: BTreeMap::new(),
            patience,
            most_ahead,
            is_filtered: false,
            begins: None,
        }
    }

    /// For a consumer that does not get every record: what is ahead is taken at once, and a hole is
    /// none.
    pub fn filtered(self) -> Intake {
        Intake { is_filtered: true, ..self }
    }

    /// What the consumer has, the lines that are not written yet included.
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Lines that are to be written.
    pub fn lines(&self) -> &[u8] {
        &self.lines
    }

    /// How much has come since the start.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// The partitions and revisions that the delivery taken last had again.
    pub fn repeats(&self) -> &[(u16, u64)] {
        &self.repeats
    }

    /// Deliveries that are not acknowledged.
    pub fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// Takes a delivery. Tags rise.
    ///
    /// # Errors
    /// [`EventError`] where the body holds no records. The delivery is then none of this intake's any
    /// more.
    pub fn take(&mut self, tag: u64, body: &[u8], now: Instant) -> Result<(), EventError> {
        self.repeats.clear();
        let records = read_json_body(body)?;
        self.unsettled.push_back((tag, false));
        self.advance(tag, records.into(), now);
        Ok(())
    }

    /// Goes on without what is missing where it has been waited for long enough, or where too much is
    /// kept back. Gives what was given up.
    pub fn give_up(&mut self, now: Instant) -> Vec<Hole> {
        let mut holes = Vec::new();
        loop {
            let kept_back: usize = self.ahead.values().map(|shelf| shelf.waiting.len()).sum();
            let is_full = kept_back >= self.most_ahead;
            let due = self.ahead.iter().min_by_key(|(_, shelf)| shelf.since).map(
                |(&partition, shelf)| (partition, is_full || now >= shelf.since + self.patience),
            );
            let Some((partition, true)) = due else { return holes };
            holes.extend(self.skip(partition, now));
        }
    }

    /// When [`give_up`](Self::give_up) has something to do, if nothing comes.
    pub fn deadline(&self) -> Option<Instant> {
        self.ahead.values().map(|shelf| shelf.since + self.patience).min()
    }

    /// The lines are safe: what is to be acknowledged now.
    pub fn written(&mut self) -> Vec<Ack> {
        self.lines.clear();
        // A batch of large values must not cost its memory for ever.
        self.lines.shrink_to(1 << 20);
        let mut acks = Vec::new();
        while let Some(&(tag, true)) = self.unsettled.front() {
            self.unsettled.pop_front();
            acks = vec![Ack { tag, multiple: true }];
        }
        self.unsettled.retain(|&(tag, is_done)| {
            if is_done {
                acks.push(Ack { tag, multiple: false });
            }
            !is_done
        });
        acks
    }

    /// The connection is gone: whatever was not acknowledged comes again, under other tags. The lines
    /// stay, since the ledger has them.
    pub fn disconnected(&mut self) {
        self.unsettled.clear();
        self.ahead.clear();
    }

    /// Takes records of a delivery until one is ahead, and what waited for them.
    fn advance(&mut self, tag: u64, records: VecDeque<Record>, now: Instant) {
        let mut next = Some((tag, records));
        let mut moved = Vec::new();
        while let Some((tag, mut records)) = next.take() {
            self.take_fresh(&mut records, &mut moved);
            match records.front() {
                None => self.settle(tag),
                Some(first) => {
                    let shelf = self
                        .ahead
                        .entry(first.partition())
                        .or_insert_with(|| Shelf { since: now, waiting: BTreeMap::new() });
                    shelf.waiting.insert((rank(first), tag), records);
                }
            }
            while let Some(&partition) = moved.last() {
                next = self.released(partition, now);
                if next.is_some() {
                    break;
                }
                moved.pop();
            }
        }
    }

    /// Makes lines of the records up to the first that is ahead; adds the partitions that went on.
    fn take_fresh(&mut self, records: &mut VecDeque<Record>, moved: &mut Vec<u16>) {
        while let Some(record) = records.front() {
            match self.ledger.judge(record) {
                Verdict::Ahead { .. } if self.is_filtered => {
                    let _ = self.ledger.skip_to(record);
                    continue;
                }
                Verdict::Ahead { .. } => return,
                Verdict::Fresh if self.may_begin_earlier(record) => return,
                Verdict::Repeat => {
                    self.counts.repeats += 1;
                    self.repeats.push((record.partition(), record.revision()));
                }
                Verdict::Fresh => {
                    self.ledger.note(record);
                    write_json(record, &mut self.lines);
                    self.lines.push(b'\n');
                    self.counts.lines += 1;
                    if let Record::GapBegin(gap) = record {
                        self.counts.gaps += 1;
                        let after = gap.lost.end().saturating_add(1);
                        let lost = after.saturating_sub(*gap.lost.start());
                        self.counts.lost = self.counts.lost.saturating_add(lost);
                    }
                    if moved.last() != Some(&record.partition()) {
                        moved.push(record.partition());
                    }
                }
            }
            records.pop_front();
        }
    }

    /// Whether nothing is known of the record's partition, and something before it may still come.
    fn may_begin_earlier(&self, record: &Record) -> bool {
        let partition = record.partition();
        let is_first = match record {
            Record::Change(event) => event.revision <= 1,
            Record::GapBegin(gap) => *gap.lost.start() <= 1,
            Record::Row { .. } | Record::GapEnd { .. } => false,
        };
        let is_known = self.ledger.progress(partition).is_some();
        !is_first && !is_known && !self.is_filtered && self.begins != Some(partition)
    }

    /// What waited in a partition that went on, if it waits no longer.
    fn released(&mut self, partition: u16, now: Instant) -> Option<(u64, VecDeque<Record>)> {
        let shelf = self.ahead.get_mut(&partition)?;
        shelf.since = now;
        let first = shelf.waiting.first_entry()?;
        let record = first.get().front().expect("what waits has a record");
        if matches!(self.ledger.judge(record), Verdict::Ahead { .. }) {
            return None;
        }
        let ((_, tag), records) = first.remove_entry();
        if shelf.waiting.is_empty() {
            self.ahead.remove(&partition);
        }
        Some((tag, records))
    }

    /// Takes the first that waits in a partition without what is missing before it.
    fn skip(&mut self, partition: u16, now: Instant) -> Option<Hole> {
        let shelf = self.ahead.get_mut(&partition)?;
        let ((_, tag), records) = shelf.waiting.pop_first()?;
        shelf.since = now;
        if shelf.waiting.is_empty() {
            self.ahead.remove(&partition);
        }
        let hole = self.ledger.skip_to(records.front().expect("what waits has a record"));
        self.begins = Some(partition);
        self.advance(tag, records, now);
        self.begins = None;
        hole
    }

    fn settle(&mut self, tag: u64) {
        if let Ok(index) = self.unsettled.binary_search_by_key(&tag, |&(tag, _)| tag) {
            self.unsettled[index].1 = true;
        }
    }
}

fn rank(record: &Record) -> Rank {
    let row = |gap: &GapId, number| (gap.at, gap.term, number);
    match record {
        Record::Change(event) => (event.revision, 0, 0),
        Record::GapBegin(gap) => row(&gap.id(), 0),
        Record::Row { gap, number, .. } => row(gap, *number),
        Record::GapEnd { gap, .. } => row(gap, u64::MAX),
    }
}
