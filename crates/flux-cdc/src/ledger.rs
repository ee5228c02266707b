//! What a consumer has, partition by partition: it tells what is new from what is a repeat, and sees
//! when something is missing.
//!
//! Delivery is at least once, and what was delivered but not acknowledged comes again, perhaps in
//! another order. Revisions are dense, and so are the rows of a gap: a number says it all.
//!
//! What this module does not do: keep the records, wait for what is missing, or decide when to go on
//! without it. No I/O and no clock.

mod json;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use flux_proto::event::{GapId, Record};

/// What to do with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one: keep it, and [`note`](Ledger::note) it.
    Fresh,
    /// It, or what stands for it, is here already.
    Repeat,
    /// Something before it has not come.
    Ahead {
        /// The revision that would be next, or, within the gap of the record, the row.
        expected: u64,
    },
}

/// Records that did not come before one that was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hole {
    /// Changes.
    Revisions {
        /// The partition.
        partition: u16,
        /// The first and the last of them.
        missing: RangeInclusive<u64>,
    },
    /// Current values that stand for what was lost in a gap. Row 0 is the begin of the gap.
    Rows {
        /// The gap.
        gap: GapId,
        /// The first and the last of them.
        missing: RangeInclusive<u64>,
    },
}

impl fmt::Display for Hole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hole::Revisions { partition, missing } => {
                write!(f, "partition {partition}, {} to {}", missing.start(), missing.end())
            }
            Hole::Rows { gap, missing } => {
                let (from, to) = (missing.start(), missing.end());
                write!(f, "partition {}, rows {from} to {to} of gap {gap}", gap.partition)
            }
        }
    }
}

/// What a consumer has of one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The first revision that it has, or that a gap's rows stand for.
    pub begins: u64,
    /// Where it stands.
    pub position: Position,
}

/// Where a consumer stands in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// It has everything up to a revision.
    Live {
        /// The revision.
        revision: u64,
    },
    /// It is being given the current values.
    InGap {
        /// The gap.
        gap: GapId,
        /// How many rows it has.
        rows: u64,
        /// Up to where it has everything besides, if that is known. What follows this revision may come
        /// among the rows, older than they are: another leader may still have it. If that reaches the
        /// gap's revision, the gap is over.
        before: Option<u64>,
    },
}

/// What a consumer has of each partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    partitions: BTreeMap<u16, Progress>,
}

impl Ledger {
    /// Nothing was ever seen.
    pub fn new() -> Ledger {
        Ledger::default()
    }

    /// What to do with a record. The first record that is seen of a partition is fresh, whatever it is.
    pub fn judge(&self, record: &Record) -> Verdict {
        let Some(progress) = self.partitions.get(&record.partition()) else {
            return Verdict::Fresh;
        };
        match progress.position {
            Position::Live { revision } => judge_live(revision, record),
            Position::InGap { gap, rows, before } => judge_in_gap(gap, rows, before, record),
        }
    }

    /// Notes that a record is kept, which was judged [`Verdict::Fresh`].
    pub fn note(&mut self, record: &Record) {
        let known = self.partitions.get(&record.partition()).copied();
        let begins = known.map_or_else(|| first_of(record), |progress| progress.begins);
        let before = known.map(Progress::before);
        let position = match record {
            Record::Change(event) => match known.map(|progress| progress.position) {
                // Of a leader that has been replaced and still has the log, or of a new one that has it. The
                // one that told of the gap may go on with its rows, and go on behind them.
                Some(Position::InGap { gap, rows, .. }) if event.revision < gap.at => {
                    Position::InGap { gap, rows, before: Some(event.revision) }
                }
                _ => Position::Live { revision: event.revision },
            },
            Record::GapBegin(gap) => {
                // A consumer that had nothing: the publisher goes on at what it says is lost.
                let before = before.unwrap_or(Some(gap.lost.start().saturating_sub(1)));
                Position::InGap { gap: gap.id(), rows: 0, before }
            }
            Record::Row { gap, number, .. } => {
                Position::InGap { gap: *gap, rows: *number, before: before.flatten() }
            }
            Record::GapEnd { gap, .. } => Position::Live { revision: gap.at },
        };
        self.partitions.insert(record.partition(), Progress { begins, position });
    }

    /// Gives up what is missing before a record that is ahead, which is fresh then. None where nothing
    /// was missing.
    pub fn skip_to(&mut self, record: &Record) -> Option<Hole> {
        if !matches!(self.judge(record), Verdict::Ahead { .. }) {
            return None;
        }
        let partition = record.partition();
        let progress = self.partitions.get_mut(&partition)?;
        let before = progress.before();
        let (gap, last_row) = match record {
            Record::Change(_) | Record::GapBegin(_) => {
                // Where a gap is left unfinished, its rows stand for nothing.
                let revision = first_of(record).saturating_sub(1);
                progress.position = Position::Live { revision };
                let from = before.map_or(revision, |before| before.saturating_add(1));
                return Some(Hole::Revisions { partition, missing: from..=revision });
            }
            Record::Row { gap, number, .. } => (*gap, number.saturating_sub(1)),
            Record::GapEnd { gap, rows } => (*gap, *rows),
        };
        let first_row = match progress.position {
            Position::InGap { gap: same, rows, .. } if same == gap => rows.saturating_add(1),
            Position::InGap { .. } | Position::Live { .. } => 0,
        };
        progress.position = Position::InGap { gap, rows: last_row, before };
        Some(Hole::Rows { gap, missing: first_row..=last_row })
    }

    /// What there is of each partition of which something was seen, in order.
    pub fn partitions(&self) -> impl Iterator<Item = (u16, Progress)> + '_ {
        self.partitions.iter().map(|(&partition, &progress)| (partition, progress))
    }

    /// What there is of a partition.
    pub fn progress(&self, partition: u16) -> Option<Progress> {
        self.partitions.get(&partition).copied()
    }
}

impl Progress {
    /// Up to where everything is here, changes or rows; none where that is not known.
    pub const fn before(self) -> Option<u64> {
        match self.position {
            Position::Live { revision } => Some(revision),
            Position::InGap { before, .. } => before,
        }
    }
}

/// The first revision that is complete for a consumer that begins with a record.
fn first_of(record: &Record) -> u64 {
    match record {
        Record::Change(event) => event.revision,
        Record::GapBegin(gap) => *gap.lost.start(),
        // The rows before it are not here.
        Record::Row { gap, .. } | Record::GapEnd { gap, .. } => gap.at.saturating_add(1),
    }
}

fn judge_live(revision: u64, record: &Record) -> Verdict {
    let expected = revision.saturating_add(1);
    let (known, next) = match record {
        Record::Change(event) => return judge_change(revision, event.revision),
        Record::GapBegin(gap) => (gap.at.revision <= revision, *gap.lost.start() <= expected),
        // Its begin has not come.
        Record::Row { gap, .. } | Record::GapEnd { gap, .. } => (gap.at <= revision, false),
    };
    verdict(known, next, expected)
}

const fn judge_change(before: u64, revision: u64) -> Verdict {
    let expected = before.saturating_add(1);
    verdict(revision <= before, revision <= expected, expected)
}

fn judge_in_gap(gap: GapId, rows: u64, before: Option<u64>, record: &Record) -> Verdict {
    let expected = before.map_or(rows.saturating_add(1), |before| before.saturating_add(1));
    let reaches = |from: u64| before.is_none_or(|before| from <= before.saturating_add(1));
    match record {
        Record::Change(event) => match before {
            Some(before) => judge_change(before, event.revision),
            // What was before the gap is not known, so any change that it stands for may be next.
            None => verdict(false, event.revision <= gap.at, expected),
        },
        // A later leader, or a later walk, is of a later revision. What an earlier one still says adds
        // nothing.
        Record::GapBegin(begin) => {
            verdict(order(begin.id()) <= order(gap), reaches(*begin.lost.start()), expected)
        }
        Record::Row { gap: of, .. } | Record::GapEnd { gap: of, .. } if *of != gap => {
            verdict(order(*of) < order(gap), false, expected)
        }
        Record::Row { number, .. } => {
            let expected = rows.saturating_add(1);
            verdict(*number <= rows, *number <= expected, expected)
        }
        Record::GapEnd { rows: all, .. } => verdict(false, *all <= rows, rows.saturating_add(1)),
    }
}

const fn verdict(known: bool, next: bool, expected: u64) -> Verdict {
    match (known, next) {
        (true, _) => Verdict::Repeat,
        (false, true) => Verdict::Fresh,
        (false, false) => Verdict::Ahead { expected },
    }
}

/// Gaps of a partition, the later ones behind the earlier ones: a leader's own follow its table, and a
/// new leader has applied all that an earlier one had when it begins.
const fn order(gap: GapId) -> (u64, u64) {
    (gap.term, gap.at)
}
