//! Writers that remember what was acknowledged, and a check that it is there.
//!
//! Each writer has one write under way at a time and keys of its own, so at most one write of each is
//! of unknown outcome; the counters are everyone's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flux_core::command::TransactionMode;
use flux_core::{Command, Error, PartitionId, Reply};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::node::{ask, partition_of, set, value};
use crate::mailbox::Ask;
use crate::shared::Shared;

const WRITERS: u64 = 12;
const KEYS: u64 = 6;
const COUNTERS: u64 = 3;

/// A generator of test cases: splitmix64.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

type Contents = Option<Vec<u8>>;

/// What must be found, as far as the replies tell.
#[derive(Debug, Default)]
pub(super) struct Model {
    keys: BTreeMap<String, Contents>,
    /// The keys of a write of unknown outcome, all of which it writes or none, and what it leaves.
    unknown: Vec<(Vec<String>, Contents)>,
    counters: BTreeMap<String, Counter>,
    /// Effects that must have taken place, by partition: its revision is their number.
    effects: BTreeMap<PartitionId, u64>,
    probes: u64,
    pub(super) acknowledged: u64,
    /// Errors other than an unknown outcome.
    pub(super) refused: Vec<Error>,
}

#[derive(Debug, Default)]
struct Counter {
    acknowledged: i64,
    unknown: i64,
    replies: BTreeSet<i64>,
}

enum Write {
    Set { keys: Vec<String>, contents: Vec<u8> },
    Delete { key: String },
    Increment { key: String },
}

/// The keys that a writer only writes together.
fn pair(writer: u64) -> [String; 2] {
    ["left", "right"].map(|side| format!("{{t{writer}}}:{side}"))
}

impl Write {
    fn choose(random: &mut Random, writer: u64, number: u64) -> Write {
        let key = |random: &mut Random| format!("w{writer}:{}", random.below(KEYS));
        match random.below(10) {
            0 => Write::Delete { key: key(random) },
            1 | 2 => Write::Increment { key: format!("counter:{}", random.below(COUNTERS)) },
            3 | 4 => {
                let keys = pair(writer).to_vec();
                Write::Set { keys, contents: format!("pair {number}").into_bytes() }
            }
            _ => {
                let mut contents = format!("value {number} ").into_bytes();
                let padding = if random.below(16) == 0 { 6000 } else { random.below(200) };
                contents.resize(contents.len() + padding as usize, b'.');
                Write::Set { keys: vec![key(random)], contents }
            }
        }
    }

    fn command(&self) -> Command<Vec<u8>> {
        match self {
            Write::Set { keys, contents } if keys.len() == 1 => set(&keys[0], contents),
            Write::Set { keys, contents } => Command::Transaction {
                guards: Vec::new(),
                commands: keys.iter().map(|key| set(key, contents)).collect(),
                mode: TransactionMode::AllOrNothing,
            },
            Write::Delete { key } => Command::Delete { keys: vec![key.clone().into_bytes()] },
            Write::Increment { key } => {
                Command::Increment { key: key.clone().into_bytes(), delta: 1 }
            }
        }
    }

    fn key(&self) -> &str {
        match self {
            Write::Set { keys, .. } => &keys[0],
            Write::Delete { key } | Write::Increment { key } => key,
        }
    }
}

impl Model {
    /// Takes note of a reply; false if its write may or may not have taken place.
    fn note(&mut self, write: Write, reply: &Reply) -> bool {
        let effects = self.effects.entry(partition_of(write.key())).or_default();
        match (write, reply) {
            (Write::Set { keys, contents }, Reply::Written { .. } | Reply::Many(_)) => {
                *effects += keys.len() as u64;
                self.keys.extend(keys.into_iter().map(|key| (key, Some(contents.clone()))));
            }
            (Write::Delete { key }, Reply::Integer(count)) => {
                let before = self.keys.insert(key, None).flatten();
                assert_eq!(*count, i64::from(before.is_some()), "keys that were deleted");
                *effects += *count as u64;
            }
            (Write::Increment { key }, Reply::Counter { value, .. }) => {
                *effects += 1;
                let counter = self.counters.entry(key).or_default();
                counter.acknowledged += 1;
                assert!(counter.replies.insert(*value), "{value} was answered twice");
            }
            (write, Reply::Error(Error::OutcomeUnknown)) => {
                match write {
                    Write::Set { keys, contents } => self.unknown.push((keys, Some(contents))),
                    Write::Delete { key } => self.unknown.push((vec![key], None)),
                    Write::Increment { key } => {
                        self.counters.entry(key).or_default().unknown += 1;
                    }
                }
                return false;
            }
            (_, Reply::Error(error)) => {
                self.refused.push(error.clone());
                return false;
            }
            (write, reply) => panic!("a write of {} answered {reply:?}", write.key()),
        }
        self.acknowledged += 1;
        true
    }

    /// Checks what a node has after a restart and takes it for the truth from here on. Writes a key to
    /// each partition, which gives away its revision.
    pub(super) async fn check(&mut self, shared: &Shared) {
        self.check_values(shared).await;
        self.check_revisions(shared).await;
    }

    /// The same without writing.
    pub(super) async fn check_values(&mut self, shared: &Shared) {
        for (keys, left) in std::mem::take(&mut self.unknown) {
            let before: Vec<Contents> =
                keys.iter().map(|key| self.keys.get(key).cloned().flatten()).collect();
            let after = vec![left.clone(); keys.len()];
            let mut found = Vec::new();
            for key in &keys {
                found.push(value(shared, key).await);
            }
            assert!(found == before || found == after, "{keys:?} is neither as before nor written");
            if found != before {
                *self.effects.entry(partition_of(&keys[0])).or_default() += keys.len() as u64;
                self.keys.extend(keys.into_iter().zip(after));
            }
        }
        for (key, expected) in &self.keys {
            assert!(value(shared, key).await == *expected, "{key} is not as acknowledged");
        }
        for (key, counter) in &mut self.counters {
            let found = counter_value(shared, key).await;
            let most = counter.acknowledged + counter.unknown;
            assert!(
                (counter.acknowledged..=most).contains(&found),
                "{key} is {found} after {} to {most} increments",
                counter.acknowledged
            );
            let applied = (found - counter.acknowledged) as u64;
            *self.effects.entry(partition_of(key)).or_default() += applied;
            (counter.acknowledged, counter.unknown) = (found, 0);
        }
    }

    /// Checks on a running node that what was acknowledged can be read. A write of unknown outcome may
    /// have taken place.
    pub(super) async fn check_acknowledged(&self, shared: &Shared) {
        for (key, expected) in &self.keys {
            let found = value(shared, key).await;
            let unknown =
                |(keys, left): &(Vec<String>, Contents)| keys.contains(key) && *left == found;
            let fits = found == *expected || self.unknown.iter().any(unknown);
            assert!(fits, "{key} is not as acknowledged");
        }
        for (key, counter) in &self.counters {
            let found = counter_value(shared, key).await;
            let most = counter.acknowledged + counter.unknown;
            assert!((counter.acknowledged..=most).contains(&found), "{key} is {found}");
        }
    }

    /// Each partition's next revision is one more than the number of its effects.
    async fn check_revisions(&mut self, shared: &Shared) {
        let probes: Vec<String> = (0..64).map(|number| format!("probe:{number}")).collect();
        for partition in shared.partitions.iter() {
            let of_it = |probe: &&String| partition_of(probe) == partition;
            let probe = probes.iter().find(of_it).expect("64 keys are in all partitions");
            let next = self.effects.get(&partition).map_or(1, |effects| effects + 1);
            self.probes += 1;
            let contents = format!("probe {}", self.probes).into_bytes();
            let reply = shared.execute(partition, set(probe, &contents), Ask::default()).await;
            if let Reply::Written { version } = reply {
                assert_eq!(version, next, "revision of partition {partition}");
            }
            // The power may have gone again.
            self.note(Write::Set { keys: vec![probe.clone()], contents }, &reply);
        }
    }

    /// Forgets what was acknowledged, where that was no promise: the node's data is the truth.
    pub(super) async fn adopt(&mut self, shared: &Shared) {
        let written = self.unknown.drain(..).flat_map(|(keys, _)| keys);
        for key in written.chain(self.keys.keys().cloned()).collect::<Vec<_>>() {
            let found = value(shared, &key).await;
            self.keys.insert(key, found);
        }
        for writer in 0..WRITERS {
            let [left, right] = pair(writer);
            let found = (value(shared, &left).await, value(shared, &right).await);
            assert_eq!(found.0, found.1, "a transaction is there by halves");
        }
        for (key, counter) in &mut self.counters {
            counter.acknowledged = counter_value(shared, key).await;
            counter.unknown = 0;
            counter.replies.retain(|value| *value <= counter.acknowledged);
        }
    }
}

async fn counter_value(shared: &Shared, key: &str) -> i64 {
    let text = value(shared, key).await.unwrap_or_else(|| b"0".to_vec());
    String::from_utf8(text).expect("digits").parse().expect("a number")
}

/// Writes until `enough` writes are acknowledged, or each writer has met an error.
pub(super) async fn write(shared: &Arc<Shared>, model: Model, seed: u64, enough: u64) -> Model {
    let model = Arc::new(Mutex::new(model));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (shared, model) = (Arc::clone(shared), Arc::clone(&model));
        writers.spawn(async move {
            let mut random = Random(seed ^ (writer << 32));
            let end = model.lock().acknowledged + enough;
            for number in 0.. {
                let write = Write::choose(&mut random, writer, (seed << 20) + number);
                let reply = ask(&shared, write.key(), write.command()).await;
                let mut model = model.lock();
                if !model.note(write, &reply) || model.acknowledged >= end {
                    return;
                }
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.expect("a writer does not panic");
    }
    Arc::into_inner(model).expect("the writers have ended").into_inner()
}
