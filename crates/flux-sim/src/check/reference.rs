//! The committed history of each partition, and what follows from it: the table at every index, and
//! the write behind every version.
//!
//! Whoever applies an entry first makes it part of the history; everyone else is compared with it.

use std::collections::BTreeMap;

use bytes::Bytes;
use flux_core::Cursor;
use flux_core::effect::{Effect, Effects, Part, Parts, Reason};
use flux_core::store::{Position, Table};
use flux_proto::event::{Event, Op};

use super::consensus::Contents;
use super::history::{Answer, Call, History, Key, Operation, VALUE_STEP};
use super::{Promise, Violation};

/// Entries of the kind that carries effects, in Raft's numbering.
const NORMAL: i32 = 0;

/// The committed histories of all partitions.
#[derive(Debug, Default)]
pub struct Reference {
    partitions: BTreeMap<u16, Committed>,
}

/// One partition's committed history.
#[derive(Debug, Default)]
struct Committed {
    /// Term and contents of the entries from index 1 on.
    entries: Vec<(u64, Contents)>,
    /// The revision after each entry.
    revisions: Vec<u64>,
    /// When a leader had first applied an entry, in true microseconds: nobody acknowledges it earlier.
    served_us: Vec<u64>,
    /// What each key was from an index on.
    keys: BTreeMap<Vec<u8>, Vec<(u64, Option<Stored>)>>,
    /// Which key a revision wrote, and with which value; `None` for a removal.
    writes: BTreeMap<u64, (Vec<u8>, Option<Vec<u8>>)>,
    /// The revisions that gave a key a value which only one operation writes.
    by_value: BTreeMap<(Vec<u8>, i64), Vec<u64>>,
    /// The versions and sums that adding to a key gave, by what was added.
    by_addition: BTreeMap<(Vec<u8>, i64), Vec<Sum>>,
    /// The entries with the answer to a write of a session, and what the write removed, if it did.
    answers: BTreeMap<(u64, u64), Vec<Answered>>,
    /// The change of each revision from 1 on, and the index of its entry.
    changes: Vec<(u64, Event)>,
    /// How far changes are passed on, after each entry.
    cursors: Vec<Cursor>,
    /// What the first replica that showed them had for sessions at an index.
    sessions: BTreeMap<u64, Vec<u8>>,
}

/// A version and the sum that it has.
type Sum = (u64, i64);

/// The entry with the answer to a write, and the key that the write removed.
type Answered = (u64, Option<Vec<u8>>);

/// What a table must have for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    value: Vec<u8>,
    version: u64,
    expires_at_ms: Option<u64>,
}

impl Reference {
    /// A partition begins: its replicas take its first entry for applied, which is empty.
    pub fn begins(&mut self, partition: u16, term: u64) {
        let empty = Contents { entry_type: NORMAL, payload: Vec::new() };
        let committed = self.partitions.entry(partition).or_default();
        committed.push(term, &empty).expect("an empty entry follows on anything");
    }

    /// A replica applies an entry.
    ///
    /// # Errors
    /// If another entry was applied at its index before, or its effects do not continue the history.
    pub fn applies(
        &mut self,
        partition: u16,
        (index, term): (u64, u64),
        contents: &Contents,
    ) -> Result<(), Violation> {
        let committed = self.partitions.entry(partition).or_default();
        let place = (index as usize).wrapping_sub(1);
        match committed.entries.get(place) {
            Some((known, _)) if *known != term => {
                let evidence =
                    format!("partition {partition}, index {index}: term {known}, then {term}");
                Err(Violation::new(Promise::Committed, evidence))
            }
            Some((_, known)) if known != contents => {
                let evidence = format!("partition {partition}, index {index}: other contents");
                Err(Violation::new(Promise::Committed, evidence))
            }
            Some(_) => Ok(()),
            None if place == committed.entries.len() => {
                committed.push(term, contents).map_err(|what| {
                    let evidence = format!("partition {partition}, index {index}: {what}");
                    Violation::new(Promise::DenseRevisions, evidence)
                })
            }
            None => {
                let due = committed.entries.len() + 1;
                let evidence =
                    format!("partition {partition}: {index} is applied, {due} never was");
                Err(Violation::new(Promise::Committed, evidence))
            }
        }
    }

    /// A replica shows its table at an index.
    ///
    /// # Errors
    /// If the revision or a key differs from what the history makes of it.
    pub fn shows(
        &self,
        partition: u16,
        index: u64,
        revision: u64,
        table: &Table,
    ) -> Result<(), Violation> {
        let differs = |what: String| {
            let evidence = format!("partition {partition}, index {index}: {what}");
            Err(Violation::new(Promise::EqualTables, evidence))
        };
        let committed = self.partitions.get(&partition);
        let expected = match index.checked_sub(1) {
            None => Some(0),
            Some(place) => committed.and_then(|all| all.revisions.get(place as usize)).copied(),
        };
        let Some(expected) = expected else {
            return differs("it was never applied by anyone".to_owned());
        };
        if expected != revision {
            return differs(format!("revision {revision} where {expected} is due"));
        }
        let (mut found, mut wrong) = (0, None);
        let mut from = Some(Position(0));
        while let Some(position) = from {
            from = table.scan(position, 1024, |entry| {
                found += 1;
                let shown = Stored {
                    value: entry.value.to_vec(),
                    version: entry.version,
                    expires_at_ms: entry.expires_at_ms,
                };
                let due = committed.and_then(|all| all.at(entry.key, index));
                if due != Some(&shown) && wrong.is_none() {
                    let key = String::from_utf8_lossy(entry.key).into_owned();
                    wrong = Some(format!("key {key} is {shown:?}, due is {due:?}"));
                }
            });
        }
        if let Some(wrong) = wrong {
            return differs(wrong);
        }
        let due = committed.map_or(0, |all| all.len_at(index));
        if found != due {
            return differs(format!("{found} keys where {due} are due"));
        }
        Ok(())
    }

    /// A replica that leads has applied all up to an index, and may acknowledge it from this true time on.
    pub fn serves(&mut self, partition: u16, index: u64, now_us: u64) {
        let served_us = &mut self.partitions.entry(partition).or_default().served_us;
        served_us.resize(served_us.len().max(index as usize), now_us);
    }

    /// A replica at a revision says that all that it lacks was acknowledged after a true time.
    ///
    /// # Errors
    /// If the next revision may have been acknowledged before that.
    pub fn is_fresh(&self, partition: u16, revision: u64, since_us: u64) -> Result<(), Violation> {
        let Some(committed) = self.partitions.get(&partition) else { return Ok(()) };
        let next = committed.revisions.partition_point(|one| *one <= revision);
        match committed.served_us.get(next) {
            Some(served_us) if *served_us < since_us => {
                let evidence = format!(
                    "partition {partition}: at revision {revision} as of {since_us} us, the leader had \
                     the next at {served_us} us"
                );
                Err(Violation::new(Promise::Fresh, evidence))
            }
            _ => Ok(()),
        }
    }

    /// A replica shows the sessions that it remembers at an index.
    ///
    /// # Errors
    /// If another one had others there.
    pub fn shows_sessions(
        &mut self,
        partition: u16,
        index: u64,
        sessions: &[u8],
    ) -> Result<(), Violation> {
        let committed = self.partitions.entry(partition).or_default();
        let known = committed.sessions.entry(index).or_insert_with(|| sessions.to_vec());
        if known.as_slice() == sessions {
            return Ok(());
        }
        let evidence = format!(
            "partition {partition}, index {index}: sessions of {} and of {} bytes",
            known.len(),
            sessions.len()
        );
        Err(Violation::new(Promise::EqualTables, evidence))
    }

    /// A replica shows how far changes are passed on, at an index.
    ///
    /// # Errors
    /// If the entries up to there say something else.
    pub fn shows_cursor(&self, partition: u16, index: u64, shown: Cursor) -> Result<(), Violation> {
        let committed = self.partitions.get(&partition);
        let place = (index as usize).wrapping_sub(1);
        let due = committed.and_then(|all| all.cursors.get(place)).copied().unwrap_or_default();
        if due == shown {
            return Ok(());
        }
        let evidence =
            format!("partition {partition}, index {index}: {shown:?} where {due:?} is due");
        Err(Violation::new(Promise::EqualTables, evidence))
    }

    /// The change that has a revision, and the index of its entry, if it is committed.
    pub fn change(&self, partition: u16, revision: u64) -> Option<&(u64, Event)> {
        let changes = &self.partitions.get(&partition)?.changes;
        changes.get((revision as usize).checked_sub(1)?)
    }

    /// The keys that there are in the end, each with the change that it has from.
    pub fn last_values(&self, partition: u16) -> BTreeMap<&[u8], &Event> {
        let Some(committed) = self.partitions.get(&partition) else { return BTreeMap::new() };
        let index = committed.entries.len() as u64;
        let present = committed.keys.keys().filter_map(|key| {
            let version = committed.at(key, index)?.version;
            let (_, event) = self.change(partition, version)?;
            Some((key.as_slice(), event))
        });
        present.collect()
    }

    /// Every acknowledged write is in the history, at its version.
    pub fn keeps(&self, history: &History) -> Vec<Violation> {
        let mut violations = Vec::new();
        for (key, operations) in history.keys() {
            for operation in operations {
                let written = match (operation.call, operation.returned) {
                    (
                        Call::Set(value) | Call::SetIfAbsent(value) | Call::SetIfVersion(_, value),
                        Some((_, Answer::Written(version))),
                    ) => (version, value),
                    (Call::Increment(_), Some((_, Answer::Counter(sum, version)))) => {
                        (version, sum)
                    }
                    _ => continue,
                };
                if let Some(what) = self.missing(key, written) {
                    let evidence = format!("{key}  {operation}: {what}");
                    violations.push(Violation::new(Promise::Durable, evidence));
                }
            }
        }
        violations
    }

    /// No write is in the history twice.
    pub fn repeats_nothing(&self) -> Option<Violation> {
        let violation = |text| Some(Violation::new(Promise::Once, text));
        for (partition, committed) in &self.partitions {
            let twice = committed.by_value.iter().find(|(_, revisions)| revisions.len() > 1);
            if let Some(((key, value), revisions)) = twice {
                let key = String::from_utf8_lossy(key);
                return violation(format!("{key} = {value} has revisions {revisions:?}"));
            }
            let twice = committed.by_addition.iter().find(|(_, sums)| sums.len() > 1);
            if let Some(((key, added), sums)) = twice {
                let key = String::from_utf8_lossy(key);
                return violation(format!("{key} + {added} has revisions and sums {sums:?}"));
            }
            let twice = committed.answers.iter().find(|(_, indexes)| indexes.len() > 1);
            if let Some(((session, sequence), entries)) = twice {
                let indexes: Vec<u64> = entries.iter().map(|(index, _)| *index).collect();
                return violation(format!(
                    "partition {partition}: write {sequence} of session {session:x} is in entries {indexes:?}"
                ));
            }
        }
        None
    }

    /// What became of a write whose outcome its client does not know: the answer it would have had, or
    /// nothing if it never took effect.
    pub fn outcome(&self, key: Key, operation: &Operation) -> Option<Answer> {
        let committed = self.partitions.get(&key.partition)?;
        let bytes = key.bytes();
        match operation.call {
            Call::Get => None,
            Call::Set(value) | Call::SetIfAbsent(value) | Call::SetIfVersion(_, value) => {
                let revisions = committed.by_value.get(&(bytes, value))?;
                revisions.first().map(|version| Answer::Written(*version))
            }
            Call::Increment(by) => {
                let (version, sum) = committed.by_addition.get(&(bytes, by))?.first()?;
                Some(Answer::Counter(*sum, *version))
            }
            Call::Delete => {
                let (_, removed) = committed.answers.get(&operation.once?)?.first()?;
                (removed.as_deref() == Some(&bytes)).then_some(Answer::Deleted(true))
            }
        }
    }

    fn missing(&self, key: Key, (version, value): (u64, i64)) -> Option<String> {
        let writes = self.partitions.get(&key.partition).map(|committed| &committed.writes);
        let Some((found, bytes)) = writes.and_then(|writes| writes.get(&version)) else {
            return Some(format!("no effect has revision {version}"));
        };
        if *found == key.bytes() && bytes.as_deref() == Some(value.to_string().as_bytes()) {
            return None;
        }
        let (found, bytes) = (String::from_utf8_lossy(found), bytes.as_deref());
        Some(format!("revision {version} is of {found}: {:?}", bytes.map(String::from_utf8_lossy)))
    }

    /// The last index and revision of a partition's history.
    pub fn end(&self, partition: u16) -> (u64, u64) {
        self.partitions.get(&partition).map_or((0, 0), |committed| {
            let revision = committed.revisions.last().copied().unwrap_or(0);
            (committed.entries.len() as u64, revision)
        })
    }
}

impl Committed {
    fn push(&mut self, term: u64, contents: &Contents) -> Result<(), String> {
        let index = self.entries.len() as u64 + 1;
        let mut revision = self.revisions.last().copied().unwrap_or(0);
        let mut cursor = self.cursors.last().copied().unwrap_or_default();
        if contents.entry_type == NORMAL && !contents.payload.is_empty() {
            let mut removed = None;
            let parts = Parts::new(&contents.payload).map_err(|error| error.to_string())?;
            let batch = Effects::new(&contents.payload).map_err(|error| error.to_string())?;
            let committed_at_ms = batch.committed_at_ms();
            for part in parts {
                let (found, effect) = match part.map_err(|error| error.to_string())? {
                    Part::Effect(found, effect) => (found, effect),
                    Part::Answer { once, .. } => {
                        let place = self.answers.entry((once.session, once.sequence)).or_default();
                        place.push((index, removed.take()));
                        continue;
                    }
                    Part::Cursor(found) => {
                        cursor = cursor.max(found);
                        continue;
                    }
                    _ => continue,
                };
                if found != revision + 1 {
                    return Err(format!("revision {found} follows on {revision}"));
                }
                revision = found;
                removed = match effect {
                    Effect::Delete { key, .. } => Some(key.to_vec()),
                    Effect::Put { .. } => None,
                };
                let change = self.change(index, revision, &effect, committed_at_ms);
                self.changes.push((index, change));
                self.effect(index, revision, &effect);
            }
        }
        self.entries.push((term, contents.clone()));
        self.revisions.push(revision);
        self.cursors.push(cursor);
        Ok(())
    }

    /// What followers are to be told of an effect that comes next.
    fn change(
        &self,
        index: u64,
        revision: u64,
        effect: &Effect<'_>,
        committed_at_ms: u64,
    ) -> Event {
        let (op, value, expires_at_ms) = match *effect {
            Effect::Put { value, expires_at_ms, .. } => (Op::Set, Some(value), expires_at_ms),
            Effect::Delete { reason: Reason::Explicit, .. } => (Op::Delete, None, None),
            Effect::Delete { reason: Reason::Expired, .. } => (Op::Expire, None, None),
        };
        Event {
            op,
            key: Bytes::copy_from_slice(effect.key()),
            value: value.map(Bytes::copy_from_slice),
            partition: 0,
            revision,
            version: if op == Op::Set { revision } else { 0 },
            previous_version: self.at(effect.key(), index).map_or(0, |before| before.version),
            previous_value: None,
            expires_at_ms,
            committed_at_ms,
            trace: None,
        }
    }

    fn effect(&mut self, index: u64, revision: u64, effect: &Effect<'_>) {
        let stored = match *effect {
            Effect::Put { value, expires_at_ms, .. } => {
                Some(Stored { value: value.to_vec(), version: revision, expires_at_ms })
            }
            Effect::Delete { .. } => None,
        };
        let key = effect.key().to_vec();
        let value = stored.as_ref().map(|stored| stored.value.clone());
        let number = value.as_deref().and_then(parsed);
        match number {
            Some(number) if number != 0 && number % VALUE_STEP == 0 => {
                self.by_value.entry((key.clone(), number)).or_default().push(revision);
            }
            Some(sum) => {
                let before = self.at(&key, index).and_then(|stored| parsed(&stored.value));
                let added = sum - before.unwrap_or(0);
                let sums = self.by_addition.entry((key.clone(), added)).or_default();
                sums.push((revision, sum));
            }
            None => {}
        }
        self.writes.insert(revision, (key.clone(), value));
        self.keys.entry(key).or_default().push((index, stored));
    }

    /// What a key is once `index` is applied.
    fn at(&self, key: &[u8], index: u64) -> Option<&Stored> {
        let states = self.keys.get(key)?;
        let count = states.partition_point(|(since, _)| *since <= index);
        states.get(count.checked_sub(1)?)?.1.as_ref()
    }

    fn len_at(&self, index: u64) -> usize {
        self.keys.keys().filter(|key| self.at(key, index).is_some()).count()
    }
}

fn parsed(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::history::Operation;
    use flux_core::effect::{BatchWriter, Reason};
    use flux_core::store::{Entry, Memory, TableOptions};

    fn batch(first: u64, effects: &[Effect<'_>]) -> Contents {
        let mut writer = BatchWriter::new(Vec::new());
        writer.start(7, first);
        for effect in effects {
            match *effect {
                Effect::Put { key, value, expires_at_ms } => writer.put(key, value, expires_at_ms),
                Effect::Delete { key, reason } => writer.delete(key, reason),
            };
        }
        Contents { entry_type: NORMAL, payload: writer.payload().to_vec() }
    }

    fn put<'a>(key: &'a str, value: &'a str) -> Effect<'a> {
        Effect::Put { key: key.as_bytes(), value: value.as_bytes(), expires_at_ms: None }
    }

    fn delete(key: &str) -> Effect<'_> {
        Effect::Delete { key: key.as_bytes(), reason: Reason::Explicit }
    }

    fn table(entries: &[(&str, &str, u64)]) -> Table {
        let table = Table::new(TableOptions { hash_seed: 1, shards: 1 }, Memory::new(0));
        for (key, value, version) in entries {
            let (key, value) = (key.as_bytes(), value.as_bytes());
            let entry =
                Entry { key, value, version: *version, expires_at_ms: None, written_at_s: 0 };
            table.put(table.hash(key), entry);
        }
        table
    }

    fn reference() -> Reference {
        let mut reference = Reference::default();
        reference.begins(0, 1);
        reference.applies(0, (2, 1), &batch(1, &[put("a", "1"), put("b", "2")])).expect("a batch");
        reference.applies(0, (3, 2), &batch(3, &[delete("a")])).expect("a batch");
        reference
    }

    #[test]
    fn a_committed_entry_stays() {
        let mut reference = reference();
        let same = batch(3, &[delete("a")]);
        assert!(reference.applies(0, (3, 2), &same).is_ok());
        let changed = |result: Result<(), Violation>| result.expect_err("changed").promise;
        assert_eq!(changed(reference.applies(0, (3, 3), &same)), Promise::Committed);
        let other = batch(3, &[delete("b")]);
        assert_eq!(changed(reference.applies(0, (3, 2), &other)), Promise::Committed);
        assert_eq!(changed(reference.applies(0, (5, 2), &other)), Promise::Committed);
        assert_eq!(reference.end(0), (3, 3));
    }

    #[test]
    fn revisions_have_no_hole() {
        let mut reference = reference();
        let hole = reference.applies(0, (4, 2), &batch(5, &[put("a", "1")]));
        assert_eq!(hole.expect_err("a hole").promise, Promise::DenseRevisions);
    }

    #[test]
    fn a_table_is_what_the_history_makes() {
        let reference = reference();
        let shows = |index, revision, entries: &[_]| {
            reference.shows(0, index, revision, &table(entries)).map_err(|one| one.evidence)
        };
        assert_eq!(shows(0, 0, &[]), Ok(()));
        assert_eq!(shows(2, 2, &[("a", "1", 1), ("b", "2", 2)]), Ok(()));
        assert_eq!(shows(3, 3, &[("b", "2", 2)]), Ok(()));
        for (index, revision, entries) in [
            (3, 2, &[("b", "2", 2)][..]),
            (3, 3, &[("b", "3", 2)]),
            (3, 3, &[("b", "2", 3)]),
            (3, 3, &[]),
            (3, 3, &[("a", "1", 1), ("b", "2", 2)]),
            (4, 3, &[("b", "2", 2)]),
        ] {
            assert!(shows(index, revision, entries).is_err(), "{index} {revision} {entries:?}");
        }
    }

    #[test]
    fn a_replica_is_as_old_as_it_says() {
        let mut reference = reference();
        reference.serves(0, 3, 7);
        reference.applies(0, (4, 2), &batch(4, &[put("c", "1")])).expect("a batch");
        assert!(reference.is_fresh(0, 3, 9000).is_ok(), "only followers have it yet");
        reference.serves(0, 4, 500);
        reference.serves(0, 3, 600);
        reference.serves(0, 4, 600);
        assert!(reference.is_fresh(0, 3, 500).is_ok());
        assert!(reference.is_fresh(0, 4, 9000).is_ok());
        assert!(reference.is_fresh(0, 3, 501).is_err());
        assert!(reference.is_fresh(0, 0, 7).is_ok());
        assert!(reference.is_fresh(0, 0, 8).is_err());
    }

    #[test]
    fn sessions_are_compared_at_the_same_index() {
        let mut reference = reference();
        assert!(reference.shows_sessions(0, 2, b"one").is_ok());
        assert!(reference.shows_sessions(0, 3, b"two").is_ok());
        assert!(reference.shows_sessions(1, 2, b"two").is_ok());
        assert!(reference.shows_sessions(0, 2, b"one").is_ok());
        assert!(reference.shows_sessions(0, 3, b"").is_err());
    }

    #[test]
    fn writes_that_are_there_twice_are_found() {
        let mut reference = reference();
        let own = (7 * VALUE_STEP).to_string();
        reference.applies(0, (4, 2), &batch(4, &[put("a", &own), put("b", &own)])).expect("new");
        assert!(reference.repeats_nothing().is_none(), "two keys");
        reference.applies(0, (5, 2), &batch(6, &[put("b", "5"), put("b", "5")])).expect("new");
        reference.applies(0, (6, 2), &batch(8, &[put("b", "5")])).expect("new");
        let sums = reference.repeats_nothing().expect("0 was added twice");
        assert!(sums.evidence.contains("b + 0"), "{sums}");
        reference.applies(0, (7, 2), &batch(9, &[put("a", &own)])).expect("new");
        let violation = reference.repeats_nothing().expect("twice");
        assert!(violation.evidence.contains("[4, 9]"), "{violation}");
    }

    #[test]
    fn what_became_of_a_write_is_looked_up() {
        let key = Key { partition: 0, number: 4 };
        let (name, value) = (key.to_string(), 7 * VALUE_STEP);
        let (first, second) = (value.to_string(), (value + 5).to_string());
        let mut reference = Reference::default();
        let writes = batch(1, &[put(&name, &first), put(&name, &second)]);
        reference.applies(0, (1, 1), &writes).expect("a batch");
        let outcome = |call| {
            let (invoked_us, once, returned) = (0, Some((1, 1)), None);
            reference.outcome(key, &Operation { client: 0, call, invoked_us, once, returned })
        };
        assert_eq!(outcome(Call::SetIfAbsent(value)), Some(Answer::Written(1)));
        assert_eq!(outcome(Call::Set(value + VALUE_STEP)), None);
        assert_eq!(outcome(Call::Increment(5)), Some(Answer::Counter(value + 5, 2)));
        assert_eq!(outcome(Call::Increment(6)), None);
        assert_eq!(outcome(Call::Delete), None);
    }

    #[test]
    fn an_acknowledged_write_that_is_not_there_is_found() {
        let key = Key { partition: 0, number: 4 };
        let name = key.to_string();
        let mut reference = Reference::default();
        reference.applies(0, (1, 1), &batch(1, &[put(&name, "5")])).expect("a batch");
        let keeps = |call, answer| {
            let mut history = History::default();
            let returned = Some((9, answer));
            history.add(key, Operation { client: 0, call, invoked_us: 0, once: None, returned });
            reference.keeps(&history).is_empty()
        };
        assert!(keeps(Call::Set(5), Answer::Written(1)));
        assert!(keeps(Call::Increment(2), Answer::Counter(5, 1)));
        assert!(!keeps(Call::Set(6), Answer::Written(1)));
        assert!(!keeps(Call::Set(5), Answer::Written(2)));
        assert!(!keeps(Call::SetIfVersion(1, 5), Answer::Written(2)));
    }
}
