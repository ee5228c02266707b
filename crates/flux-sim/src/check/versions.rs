//! The versions that clients were told, over all keys of a partition: a cheap check that sees what a
//! search of single keys cannot, since all writes of a partition share one count.

use std::collections::BTreeMap;

use super::history::{History, Key, Operation};
use super::{Promise, Violation};

/// No version is given twice, and a write that began after another was answered has a higher one.
pub fn check(history: &History) -> Vec<Violation> {
    let mut partitions: BTreeMap<u16, Vec<(Key, Operation)>> = BTreeMap::new();
    for (key, operations) in history.keys() {
        let writes = operations.iter().filter(|one| one.written_version().is_some());
        partitions.entry(key.partition).or_default().extend(writes.map(|one| (key, *one)));
    }
    partitions.values().filter_map(|writes| check_partition(writes)).collect()
}

fn check_partition(writes: &[(Key, Operation)]) -> Option<Violation> {
    let mut by_version: BTreeMap<u64, &(Key, Operation)> = BTreeMap::new();
    for write in writes {
        let version = write.1.written_version()?;
        if let Some(other) = by_version.insert(version, write) {
            return Some(violation("one version was given twice", other, write));
        }
    }
    // From the highest version down: nothing may begin after the answer of one that is higher.
    let mut earliest: Option<(u64, &(Key, Operation))> = None;
    for write in by_version.values().rev() {
        if let Some((returned_us, higher)) = earliest
            && returned_us < write.1.invoked_us
        {
            return Some(violation("a later write has a lower version", higher, write));
        }
        let returned_us = write.1.returned.map_or(u64::MAX, |(at, _)| at);
        if earliest.is_none_or(|(earliest_us, _)| returned_us < earliest_us) {
            earliest = Some((returned_us, write));
        }
    }
    None
}

fn violation(what: &str, first: &(Key, Operation), second: &(Key, Operation)) -> Violation {
    let lines = [first, second].map(|(key, one)| format!("\n    {key}  {one}")).concat();
    Violation::new(Promise::Versions, format!("{what}:{lines}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::history::{Answer, Call};

    fn check_writes(writes: &[(u16, u64, u64, u64)]) -> Vec<Violation> {
        let mut history = History::default();
        for &(number, invoked_us, returned_us, version) in writes {
            let returned = Some((returned_us, Answer::Written(version)));
            let operation =
                Operation { client: 0, call: Call::Set(1), invoked_us, once: None, returned };
            history.add(Key { partition: 0, number }, operation);
        }
        check(&history)
    }

    #[test]
    fn versions_rise_with_time_over_all_keys() {
        assert!(check_writes(&[(0, 0, 5, 1), (1, 6, 9, 2), (0, 10, 11, 7)]).is_empty());
        assert!(check_writes(&[(0, 0, 5, 2), (1, 5, 9, 1)]).is_empty(), "they were concurrent");
        let later = check_writes(&[(0, 0, 5, 2), (1, 6, 9, 1), (2, 20, 21, 9)]);
        assert!(later[0].evidence.contains("lower version"), "{later:?}");
    }

    #[test]
    fn a_version_belongs_to_one_write() {
        let twice = check_writes(&[(0, 0, 5, 1), (1, 2, 9, 1)]);
        assert!(twice[0].evidence.contains("twice"), "{twice:?}");
    }
}
