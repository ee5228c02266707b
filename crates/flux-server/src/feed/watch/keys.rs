//! Which keys a watcher is shown, and who of many watchers is shown a key.
//!
//! What this module does not do: know whether a key exists.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use flux_core::{PartitionId, Partitions};

/// What a watcher asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    /// One key.
    One(Bytes),
    /// Every key that starts with this; all of them where it is empty.
    Prefix(Bytes),
}

impl Keys {
    pub(super) fn matches(&self, key: &[u8]) -> bool {
        match self {
            Keys::One(one) => one == key,
            Keys::Prefix(prefix) => key.starts_with(prefix),
        }
    }

    /// The partitions that can hold such keys, in order.
    pub(super) fn partitions(&self, of: Partitions) -> Vec<u16> {
        match self {
            Keys::One(key) => vec![of.of(key).0],
            Keys::Prefix(prefix) if has_whole_tag(prefix) => vec![of.of(prefix).0],
            Keys::Prefix(_) => of.iter().map(|PartitionId(partition)| partition).collect(),
        }
    }
}

/// Whether all keys that start so have the same hash tag.
fn has_whole_tag(prefix: &[u8]) -> bool {
    let tag = prefix.iter().position(|&byte| byte == b'{').map(|open| &prefix[open + 1..]);
    // An empty tag is none: then the whole key counts.
    tag.is_some_and(|tag| tag.iter().position(|&byte| byte == b'}').is_some_and(|end| end > 0))
}

/// Watchers by what they watch. Looking one up costs as much as there are different lengths of prefixes,
/// however many watchers there are.
#[derive(Debug, Default)]
pub(super) struct Index {
    keys: HashMap<Bytes, Vec<u64>>,
    prefixes: BTreeMap<usize, HashMap<Bytes, Vec<u64>>>,
}

impl Index {
    pub(super) fn insert(&mut self, keys: &Keys, id: u64) {
        let ids = match keys {
            Keys::One(key) => self.keys.entry(key.clone()).or_default(),
            Keys::Prefix(prefix) => {
                let same_length = self.prefixes.entry(prefix.len()).or_default();
                same_length.entry(prefix.clone()).or_default()
            }
        };
        ids.push(id);
    }

    pub(super) fn remove(&mut self, keys: &Keys, id: u64) {
        match keys {
            Keys::One(key) => remove_from(&mut self.keys, key, id),
            Keys::Prefix(prefix) => {
                let Some(same_length) = self.prefixes.get_mut(&prefix.len()) else { return };
                remove_from(same_length, prefix, id);
                if same_length.is_empty() {
                    self.prefixes.remove(&prefix.len());
                }
            }
        }
    }

    /// Who is shown a key.
    pub(super) fn watchers<'a>(&'a self, key: &'a [u8]) -> impl Iterator<Item = u64> + 'a {
        let by_prefix = self
            .prefixes
            .range(..=key.len())
            .filter_map(|(&length, same_length)| same_length.get(&key[..length]));
        self.keys.get(key).into_iter().chain(by_prefix).flatten().copied()
    }
}

fn remove_from(ids: &mut HashMap<Bytes, Vec<u64>>, of: &Bytes, id: u64) {
    let Some(same) = ids.get_mut(of) else { return };
    same.retain(|&one| one != id);
    if same.is_empty() {
        ids.remove(of);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &'static str) -> Keys {
        Keys::Prefix(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn a_prefix_with_a_whole_tag_is_of_one_partition() {
        let partitions = Partitions::new(64).expect("a power of two");
        for (text, whole) in
            [("{user:7}", true), ("a{b}:c", true), ("{user", false), ("{}x", false), ("", false)]
        {
            let found = prefix(text).partitions(partitions);
            assert_eq!(found.len(), if whole { 1 } else { 64 }, "{text}");
            if whole {
                assert_eq!(found[0], partitions.of(format!("{text}anything{{z}}").as_bytes()).0);
            }
        }
        let one = Keys::One(Bytes::from_static(b"k"));
        assert_eq!(one.partitions(partitions), [partitions.of(b"k").0]);
    }

    #[test]
    fn watchers_are_found_by_key_and_by_prefix_until_they_are_removed() {
        let one = Keys::One(Bytes::from_static(b"ab"));
        let watched = [one, prefix(""), prefix("a"), prefix("ab"), prefix("abc"), prefix("b")];
        let mut index = Index::default();
        for (id, keys) in (0..).zip(&watched) {
            index.insert(keys, id);
            index.insert(keys, id + 10);
        }
        let found = |index: &Index, key: &[u8]| {
            let mut ids: Vec<u64> = index.watchers(key).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(found(&index, b"ab"), [0, 1, 2, 3, 10, 11, 12, 13]);
        assert_eq!(found(&index, b"abcd"), [1, 2, 3, 4, 11, 12, 13, 14]);
        for (id, keys) in (0..).zip(&watched) {
            for key in [&b"ab"[..], b"abcd", b"b", b"x", b""] {
                assert_eq!(found(&index, key).contains(&id), keys.matches(key), "{keys:?}");
            }
            index.remove(keys, id + 10);
        }
        assert_eq!(found(&index, b"ab"), [0, 1, 2, 3]);
        for (id, keys) in (0..).zip(&watched) {
            index.remove(keys, id);
        }
        assert!(index.keys.is_empty() && index.prefixes.is_empty());
    }
}
