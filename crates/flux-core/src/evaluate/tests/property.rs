//! Random commands, with batches left in flight for random durations, against the model.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::model::Model;
use super::{Partition, rows};
use crate::command::{ExpireCondition, Guard, TransactionMode};
use crate::draft::{Applied, Previous, apply};
use crate::effect::{Changes, Effect, Effects};
use crate::session::Sessions;
use crate::{Command, Condition, Expiry};

#[derive(Clone, Debug)]
enum Step {
    Run(Command<Vec<u8>>),
    /// What is run from now on comes from there; 0 for nowhere.
    Trace(u8),
    Pass(u64),
    Close,
    ApplyOne,
    ApplyAll,
    DiscardOpen,
    DiscardAll,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => command().prop_map(Step::Run),
        4 => (0u8..3).prop_map(Step::Trace),
        4 => (0u64..30).prop_map(Step::Pass),
        8 => Just(Step::Close),
        5 => Just(Step::ApplyOne),
        1 => Just(Step::ApplyAll),
        1 => Just(Step::DiscardOpen),
        1 => Just(Step::DiscardAll),
    ]
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    "[a-e]".prop_map(String::into_bytes)
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof!["", "-?[0-9]{1,3}", "9223372036854775807", "[xyz]{1,9}"]
        .prop_map(String::into_bytes)
}

fn expiry() -> impl Strategy<Value = Expiry> {
    prop_oneof![
        3 => Just(Expiry::Never),
        1 => Just(Expiry::Keep),
        2 => (0u64..40).prop_map(Expiry::In),
        1 => (980u64..1_200).prop_map(Expiry::At),
        1 => (0u64..2).prop_map(Expiry::At),
    ]
}

fn condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        4 => Just(Condition::Always),
        1 => Just(Condition::IfAbsent),
        1 => Just(Condition::IfPresent),
        1 => (0u64..20).prop_map(Condition::IfVersion),
    ]
}

fn single() -> impl Strategy<Value = Command<Vec<u8>>> {
    let expire_condition = any::<[bool; 4]>().prop_map(|[none, some, later, earlier]| {
        let [if_none, if_some] = [none && some, some && !none];
        ExpireCondition { if_none, if_some, if_later: later, if_earlier: earlier && !later }
    });
    let pairs = vec((key(), value()), 1..4);
    prop_oneof![
        8 => (key(), value(), expiry(), condition(), any::<bool>()).prop_map(
            |(key, value, expiry, condition, return_previous)| {
                Command::Set { key, value, expiry, condition, return_previous }
            }
        ),
        2 => key().prop_map(|key| Command::Get { key }),
        1 => vec(key(), 1..4).prop_map(|keys| Command::GetMany { keys }),
        1 => key().prop_map(|key| Command::Length { key }),
        1 => vec(key(), 1..4).prop_map(|keys| Command::Exists { keys }),
        1 => (pairs, any::<bool>())
            .prop_map(|(pairs, if_none_exists)| Command::SetMany { pairs, if_none_exists }),
        2 => vec(key(), 1..4).prop_map(|keys| Command::Delete { keys }),
        1 => (key(), condition()).prop_map(|(key, condition)| Command::DeleteIf { key, condition }),
        1 => key().prop_map(|key| Command::GetDelete { key }),
        2 => (key(), expiry()).prop_map(|(key, expiry)| Command::GetExpire { key, expiry }),
        2 => (key(), value()).prop_map(|(key, suffix)| Command::Append { key, suffix }),
        2 => (key(), -1i64..12, value())
            .prop_map(|(key, offset, value)| Command::SetRange { key, offset, value }),
        3 => (key(), -9i64..9).prop_map(|(key, delta)| Command::Increment { key, delta }),
        3 => (key(), expiry(), expire_condition)
            .prop_map(|(key, at, condition)| Command::Expire { key, at, condition }),
        1 => key().prop_map(|key| Command::Persist { key }),
        2 => (key(), key(), any::<bool>())
            .prop_map(|(from, to, if_absent)| Command::Rename { from, to, if_absent }),
        2 => (key(), key(), any::<bool>())
            .prop_map(|(from, to, replace)| Command::Copy { from, to, replace }),
    ]
}

fn command() -> impl Strategy<Value = Command<Vec<u8>>> {
    let guard = (key(), 0u64..3).prop_map(|(key, version)| Guard { key, version });
    let mode = prop_oneof![Just(TransactionMode::KeepGoing), Just(TransactionMode::AllOrNothing)];
    prop_oneof![
        30 => single(),
        1 => Just(Command::Clear { limit: 100 }),
        4 => (vec(guard, 0..2), vec(single(), 0..6), mode)
            .prop_map(|(guards, commands, mode)| Command::Transaction { guards, commands, mode }),
    ]
}

/// The partition beside the model, and the model as it was after each closed batch.
struct Pair {
    partition: Partition,
    model: Model,
    applied: Model,
    closed: Vec<Model>,
    trace: u8,
    /// Where each revision comes from, from 1; the last ones may have been taken back.
    traces: Vec<u8>,
}

impl Pair {
    fn new() -> Pair {
        let partition = Partition::new(0, 1);
        let model = Model { now_ms: partition.now_ms, ..Model::default() };
        let (closed, traces) = (Vec::new(), Vec::new());
        Pair { partition, applied: model.clone(), closed, model, trace: 0, traces }
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Run(command) => {
                self.traces.truncate(self.model.revision as usize);
                prop_assert_eq!(self.partition.run(command), self.model.run(command));
                self.traces.resize(self.model.revision as usize, self.trace);
            }
            Step::Trace(trace) => {
                self.trace = *trace;
                let trace = [*trace; 25];
                self.partition.in_flight.set_trace((self.trace > 0).then_some(&trace));
            }
            Step::Pass(ms) => {
                self.partition.now_ms += ms;
                self.model.now_ms += ms;
            }
            Step::Close => self.close(),
            Step::ApplyOne => self.apply_one(),
            Step::ApplyAll => {
                self.close();
                while !self.closed.is_empty() {
                    self.apply_one();
                }
            }
            Step::DiscardOpen => {
                self.partition.in_flight.discard_open(&self.partition.table);
                self.back_to(self.closed.last().unwrap_or(&self.applied).clone());
            }
            Step::DiscardAll => {
                self.partition.discard_all();
                self.closed.clear();
                self.back_to(self.applied.clone());
            }
        }
        prop_assert_eq!(self.partition.in_flight.next_revision(), self.model.revision + 1);
        Ok(())
    }

    fn close(&mut self) {
        let before = self.partition.payloads.len();
        self.partition.close();
        if self.partition.payloads.len() > before {
            self.closed.push(self.model.clone());
        }
    }

    fn apply_one(&mut self) {
        self.partition.apply_one();
        if !self.closed.is_empty() {
            self.applied = self.closed.remove(0);
        }
    }

    fn back_to(&mut self, state: Model) {
        self.model = Model { now_ms: self.model.now_ms, ..state };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn commands_do_what_the_model_does(
        steps in vec(step(), 0..120),
        previous in prop_oneof![
            Just(Previous::Nothing),
            Just(Previous::Versions),
            Just(Previous::Values),
        ],
    ) {
        let mut pair = Pair::new();
        pair.partition.previous = previous;
        for step in &steps {
            pair.take(step)?;
        }
        prop_assert_eq!(rows(&pair.partition.table), pair.applied.rows());
        pair.take(&Step::ApplyAll)?;
        let Pair { partition, model, traces, .. } = pair;
        prop_assert_eq!(rows(&partition.table), model.rows());
        prop_assert_eq!(partition.in_flight.bytes(), 0);

        let replayed = Partition::new(0, 2);
        let mut last = 0;
        for payload in &partition.payloads {
            for item in Effects::new(payload).expect("a batch") {
                last += 1;
                prop_assert_eq!(item.expect("an effect").0, last, "revisions are dense");
            }
            let first = Effects::new(payload).expect("a batch").next_revision();
            let applied =
                apply(&replayed.table, &mut Sessions::new(), first - 1, payload, |_, _, _| {});
            prop_assert_eq!(applied, Ok(Applied { revision: last, cursor: None }));
        }
        prop_assert_eq!(last, model.revision);
        prop_assert_eq!(rows(&replayed.table), model.rows());
        check_changes(&partition.payloads, previous, &traces)?;
    }
}

/// Whether all changes say of their keys what the changes before made of them.
fn check_changes(
    payloads: &[Vec<u8>],
    previous: Previous,
    traces: &[u8],
) -> Result<(), TestCaseError> {
    let mut present: BTreeMap<&[u8], (u64, &[u8])> = BTreeMap::new();
    let mut traces = traces.iter();
    for payload in payloads {
        for change in Changes::new(payload).expect("a batch") {
            let before = match change.effect {
                Effect::Put { key, value, .. } => present.insert(key, (change.revision, value)),
                Effect::Delete { key, .. } => present.remove(key),
            };
            let deletes = matches!(change.effect, Effect::Delete { .. });
            prop_assert!(
                !deletes || before.is_some(),
                "a delete of an absent key takes no revision"
            );
            let version = before.map(|(version, _)| version);
            let version = version.filter(|_| previous != Previous::Nothing);
            prop_assert_eq!(change.previous, version.unwrap_or(0));
            let value = before.map(|(_, value)| value);
            let value = value.filter(|_| previous == Previous::Values);
            prop_assert_eq!(change.previous_value, value);
            let trace = traces.next().copied().filter(|trace| *trace > 0);
            prop_assert_eq!(change.trace.copied(), trace.map(|trace| [trace; 25]));
        }
    }
    Ok(())
}
