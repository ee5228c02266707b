//! A ledger as JSON: an object of partitions, as a consumer keeps it beside its output.
//!
//! ```text
//! {"3":{"begins":1,"revision":41},"7":{"begins":1,"gap":"7/90/3","rows":12,"before":40}}
//! ```
//!
//! What this module does not do: say whether the ledger fits any output.

use std::collections::BTreeMap;

use flux_proto::event::GapId;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::{Ledger, Position, Progress};

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Line {
    begins: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<u64>,
}

impl Ledger {
    /// The ledger as JSON, on one line.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a map of plain fields")
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Option<Ledger> {
        serde_json::from_slice(bytes).ok()
    }
}

impl Serialize for Ledger {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let line = |(partition, Progress { begins, position }): (u16, Progress)| {
            let none = Line { begins, revision: None, gap: None, rows: None, before: None };
            let line = match position {
                Position::Live { revision } => Line { revision: Some(revision), ..none },
                Position::InGap { gap, rows, before } => {
                    Line { gap: Some(gap.to_string()), rows: Some(rows), before, ..none }
                }
            };
            (partition, line)
        };
        serializer.collect_map(self.partitions().map(line))
    }
}

impl<'de> Deserialize<'de> for Ledger {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Ledger, D::Error> {
        let lines = BTreeMap::<u16, Line>::deserialize(deserializer)?;
        let progress = |(partition, line): (u16, Line)| {
            let position = position(partition, &line).ok_or_else(|| {
                D::Error::custom(format_args!("partition {partition} is neither live nor in a gap"))
            })?;
            Ok((partition, Progress { begins: line.begins, position }))
        };
        let partitions = lines.into_iter().map(progress).collect::<Result<_, D::Error>>()?;
        Ok(Ledger { partitions })
    }
}

fn position(partition: u16, line: &Line) -> Option<Position> {
    match line {
        Line { revision: Some(revision), gap: None, rows: None, before: None, .. } => {
            Some(Position::Live { revision: *revision })
        }
        Line { revision: None, gap: Some(gap), rows: Some(rows), before, .. } => {
            let gap = GapId::parse(gap).filter(|gap| gap.partition == partition)?;
            Some(Position::InGap { gap, rows: *rows, before: *before })
        }
        _ => None,
    }
}
