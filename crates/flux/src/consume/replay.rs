//! A file of change events, replayed into a table: the keys and values that it says there are.
//!
//! What this module does not do: read the file, or know the store.

use std::collections::HashMap;

use bytes::Bytes;
use flux_cdc::{Ledger, Position, Verdict};
use flux_proto::event::{Event, Op, Record};

/// A key as a file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The partition.
    pub partition: u16,
    /// The version.
    pub version: u64,
    /// The value.
    pub value: Bytes,
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<u64>,
    /// The last gap that named it, counted from 1; 0: none did.
    gap: u64,
}

/// A replay that is under way.
#[derive(Debug, Default)]
pub struct Replay {
    table: HashMap<Bytes, Entry>,
    ledger: Ledger,
    records: u64,
    gaps: u64,
    /// The gap that each partition is in, or was in last.
    gap_of: HashMap<u16, u64>,
    irregular: Vec<String>,
}

/// What a file says.
#[derive(Debug)]
pub struct Replayed {
    /// The keys.
    pub table: HashMap<Bytes, Entry>,
    /// How many records there were.
    pub records: u64,
    /// How many partitions they are of.
    pub partitions: usize,
    /// Holes and repeats, in words.
    pub irregular: Vec<String>,
}

impl Replay {
    /// Takes the next record.
    pub fn take(&mut self, record: Record) {
        self.records += 1;
        if let Some(hole) = self.ledger.skip_to(&record) {
            self.irregular.push(format!("hole: {hole}"));
        }
        if self.ledger.judge(&record) == Verdict::Repeat {
            let (partition, revision) = (record.partition(), record.revision());
            self.irregular.push(format!("repeat: partition {partition}, {revision}"));
            return;
        }
        self.ledger.note(&record);
        match record {
            // A leader that was replaced may send older changes while a newer one sends a gap's rows.
            Record::Change(event) if self.has_newer(&event) => {}
            Record::Change(event) => self.apply(event, 0),
            Record::GapBegin(gap) => {
                self.gaps += 1;
                self.gap_of.insert(gap.partition, self.gaps);
            }
            Record::Row { event, .. } => {
                let gap = self.gap_of.get(&event.partition).copied().unwrap_or(0);
                self.apply(event, gap);
            }
            Record::GapEnd { gap, .. } => {
                // The rows were all that there is of the partition.
                let named = self.gap_of.get(&gap.partition).copied().unwrap_or(0);
                self.table
                    .retain(|_, entry| entry.partition != gap.partition || entry.gap == named);
            }
        }
    }

    /// Whether the change is in what is here, or older.
    fn has_newer(&self, event: &Event) -> bool {
        self.table.get(&event.key).is_some_and(|entry| entry.version >= event.revision)
    }

    fn apply(&mut self, event: Event, gap: u64) {
        let Event { op, key, value, partition, version, expires_at_ms, .. } = event;
        match (op, value) {
            (Op::Set, Some(value)) => {
                self.table.insert(key, Entry { partition, version, value, expires_at_ms, gap });
            }
            _ => {
                self.table.remove(&key);
            }
        }
    }

    /// The file's end.
    pub fn end(self) -> Replayed {
        let Replay { table, ledger, records, mut irregular, .. } = self;
        for (partition, progress) in ledger.partitions() {
            if progress.begins > 1 {
                let before = progress.begins - 1;
                irregular.push(format!(
                    "hole: partition {partition}, 1 to {before}: the file begins later"
                ));
            }
            if let Position::InGap { gap, .. } = progress.position {
                irregular
                    .push(format!("hole: partition {partition}, the file ends within gap {gap}"));
            }
        }
        Replayed { table, records, partitions: ledger.partitions().count(), irregular }
    }
}

#[cfg(test)]
mod tests {
    use flux_proto::event::read_json;

    use super::*;

    /// Replays lines of `set key value`, `delete key`, `begin lost_from at`, `row number key version`,
    /// `end rows at` for partition 3; changes count their revisions by themselves, from `from` on.
    fn replay(from: u64, script: &str) -> Replayed {
        let (mut replay, mut revision) = (Replay::default(), from - 1);
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split(' ').collect();
            let text = match words[..] {
                ["set", key, value] => {
                    revision += 1;
                    set(key, value, revision, "")
                }
                ["delete", key] => {
                    revision += 1;
                    format!(
                        r#"{{"op":"delete","key":"{key}","value":null,"partition":3,"revision":{revision},"version":0,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0}}"#
                    )
                }
                ["begin", lost, at] => {
                    gap(at, &format!(r#""phase":"begin","lost_from":{lost},"lost_to":{at}"#))
                }
                ["row", number, key, version, at] => {
                    let of = format!(r#","gap":"3/{at}/1","row":{number}"#);
                    set(key, "row", version.parse().expect("a number"), &of)
                }
                ["end", rows, at] => {
                    revision = at.parse().expect("a number");
                    gap(at, &format!(r#""phase":"end","rows":{rows}"#))
                }
                ["skip", to] => {
                    revision = to.parse().expect("a number");
                    continue;
                }
                _ => panic!("{line} is no record"),
            };
            replay.take(read_json(text.as_bytes()).expect("a record"));
        }
        replay.end()
    }

    fn set(key: &str, value: &str, revision: u64, more: &str) -> String {
        format!(
            r#"{{"op":"set","key":"{key}","value":"{value}","partition":3,"revision":{revision},"version":{revision},"previous_version":0,"expires_at_ms":null,"committed_at_ms":0{more}}}"#
        )
    }

    fn gap(at: &str, phase: &str) -> String {
        format!(
            r#"{{"op":"gap","key":null,"value":null,"partition":3,"revision":{at},"version":0,"previous_version":0,"expires_at_ms":null,"committed_at_ms":0,{phase},"gap":"3/{at}/1"}}"#
        )
    }

    fn keys(replayed: &Replayed) -> Vec<String> {
        let text =
            |(key, entry): (&Bytes, &Entry)| format!("{} {}", key.escape_ascii(), entry.version);
        let mut keys: Vec<_> = replayed.table.iter().map(text).collect();
        keys.sort();
        keys
    }

    #[test]
    fn changes_make_a_table() {
        let replayed = replay(1, "set a 1\n set b 2\n set a 3\n delete b\n delete c\n set d 4");
        assert_eq!(keys(&replayed), ["a 3", "d 6"]);
        assert_eq!(replayed.table[&b"a"[..]].value, "3");
        assert_eq!((replayed.records, replayed.partitions), (6, 1));
        assert_eq!(replayed.irregular, [""; 0]);
    }

    #[test]
    fn what_no_row_of_a_gap_names_is_gone() {
        let replayed = replay(
            1,
            "set a 1
             set b 2
             set c 3
             begin 4 9
             row 1 b 2 9
             row 2 d 8 9
             end 2 9
             set c 4",
        );
        assert_eq!(keys(&replayed), ["b 2", "c 10", "d 8"]);
        assert_eq!(replayed.irregular, [""; 0]);
        let from_the_start = replay(1, "begin 1 9\n row 1 a 9 9\n end 1 9");
        assert_eq!(from_the_start.irregular, [""; 0]);
    }

    #[test]
    fn a_gap_that_was_left_takes_nothing_away() {
        let replayed = replay(
            1,
            "set a 1
             set b 2
             begin 3 5
             row 1 b 2 5
             set b 3
             set c 4
             set c 5",
        );
        assert_eq!(keys(&replayed), ["a 1", "b 3", "c 5"]);
        assert_eq!(replayed.irregular, [""; 0]);
    }

    #[test]
    fn an_older_change_does_not_take_the_place_of_a_row() {
        let replayed = replay(
            1,
            "set a 1
             set b 2
             begin 3 9
             row 1 a 7 9
             row 2 b 8 9
             row 3 d 4 9
             set a 3
             set d 4
             delete b
             set c 6
             end 3 9",
        );
        assert_eq!(keys(&replayed), ["a 7", "b 8", "d 4"]);
        assert_eq!(replayed.irregular, [""; 0]);
    }

    #[test]
    fn holes_and_repeats_are_told() {
        let replayed = replay(3, "set a 1\n skip 6\n set b 1\n skip 6\n set b 2\n begin 8 9");
        assert_eq!(
            replayed.irregular,
            [
                "hole: partition 3, 4 to 6",
                "repeat: partition 3, 7",
                "hole: partition 3, 1 to 2: the file begins later",
                "hole: partition 3, the file ends within gap 3/9/1",
            ]
        );
    }
}
