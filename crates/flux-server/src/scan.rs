//! Walks over keys, partition after partition, wherever they are led.
//!
//! A walk says which command its next step is, for whoever leads the partition, and takes the reply; it
//! sends nothing itself. A cursor is the partition and the position in it to go on from, so it stays valid
//! while keys come and go, partitions split their index, leaders change, and over a restart: the nodes of
//! a cluster hash keys alike.

use std::collections::BTreeSet;

use flux_core::command::{KeyFilter, PageLimits};
use flux_core::reply::Item;
use flux_core::{Command, Error, PartitionId, Reply};

use crate::mailbox::Ask;
use crate::resp::ScanCursor;
use crate::stale::Age;

/// Entries that one step looks at, at the most: about a millisecond.
const STEP_ENTRIES: u32 = 8 * 1024;

/// What a key takes in a reply besides itself and its value, about.
const FRAMING_BYTES: usize = 24;

/// Keys and values of a page with values: well within a frame or a message.
pub(crate) const PAGE_BYTES: u32 = 4 * 1024 * 1024;

/// Keys that a page looks at, whether they match or not.
pub(crate) const PAGE_LOOKED_AT: u32 = 100_000;

/// The cursor of the bytes that a page gave; empty is the start.
pub(crate) fn cursor_from_bytes(bytes: &[u8], partitions: u16) -> Option<ScanCursor> {
    if bytes.is_empty() {
        return ScanCursor::from_number(0);
    }
    let number = u64::from_le_bytes(bytes.try_into().ok()?);
    ScanCursor::from_number(number).filter(|cursor| cursor.partition.0 < partitions)
}

/// What the client is given to ask for the next page; empty at the end.
pub(crate) fn cursor_to_bytes(cursor: Option<ScanCursor>) -> Vec<u8> {
    cursor.map(|cursor| cursor.number().to_le_bytes().to_vec()).unwrap_or_default()
}

/// The partitions that a walk visits, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// So many: all of them.
    All(u16),
    /// These.
    Only(BTreeSet<PartitionId>),
}

impl Scope {
    /// The first one from a partition on.
    fn first_from(&self, partition: PartitionId) -> Option<PartitionId> {
        match self {
            Scope::All(count) => (partition.0 < *count).then_some(partition),
            Scope::Only(partitions) => partitions.range(partition..).next().copied(),
        }
    }

    /// All of them.
    pub(crate) fn partitions(&self) -> Vec<PartitionId> {
        match self {
            Scope::All(count) => (0..*count).map(PartitionId).collect(),
            Scope::Only(partitions) => partitions.iter().copied().collect(),
        }
    }
}

/// A walk under way, with what it has found.
#[derive(Debug)]
pub(crate) struct Walk {
    scope: Scope,
    /// Where it goes on; none at the end.
    at: Option<ScanCursor>,
    filter: KeyFilter<Vec<u8>>,
    keys_only: bool,
    /// How its steps are to be carried out.
    pub(crate) ask: Ask,
    /// How much more it may find and look at.
    left: PageLimits,
    /// Where nothing is found up to the end, it goes on at the start, once.
    wraps: bool,
    /// What is found does not fit beside the rest any more.
    is_full: bool,
    pub(crate) items: Vec<Item>,
    /// How old what a stale walk found is.
    pub(crate) age: Option<Age>,
}

impl Walk {
    pub(crate) fn new(
        scope: Scope,
        from: ScanCursor,
        filter: KeyFilter<Vec<u8>>,
        keys_only: bool,
        limits: PageLimits,
    ) -> Walk {
        let mut walk = Walk {
            scope,
            at: None,
            filter,
            keys_only,
            ask: Ask::default(),
            left: limits,
            wraps: false,
            is_full: false,
            items: Vec::new(),
            age: None,
        };
        walk.go_to(from);
        walk
    }

    /// A walk that ends with the first key after a cursor, around the end.
    pub(crate) fn to_one_key(scope: Scope, from: ScanCursor) -> Walk {
        let limits = PageLimits { matches: 1, looked_at: u32::MAX, bytes: PAGE_BYTES };
        let all = KeyFilter::Prefix(Vec::new());
        Walk { wraps: true, ..Walk::new(scope, from, all, true, limits) }
    }

    /// The cursor of the next page; none when the walk is at its end.
    pub(crate) fn next(&self) -> Option<ScanCursor> {
        self.at
    }

    /// The next command and its partition; none when the walk is done.
    pub(crate) fn step(&self) -> Option<(PartitionId, Command<&[u8]>)> {
        let left = self.left;
        if self.is_full || left.matches == 0 || left.looked_at == 0 || left.bytes == 0 {
            return None;
        }
        let ScanCursor { partition, position } = self.at?;
        let filter = match &self.filter {
            KeyFilter::Prefix(prefix) => KeyFilter::Prefix(&prefix[..]),
            KeyFilter::Pattern(pattern) => KeyFilter::Pattern(&pattern[..]),
        };
        let limits = PageLimits { looked_at: left.looked_at.min(STEP_ENTRIES), ..left };
        let keys_only = self.keys_only;
        Some((partition, Command::Scan { from: position, filter, limits, keys_only }))
    }

    /// Takes the reply to the last step. `age` is how old it is, for a stale walk.
    ///
    /// # Errors
    ///
    /// That of the partition.
    pub(crate) fn take(&mut self, reply: Reply, age: Age) -> Result<(), Error> {
        let (next, looked_at, items) = match reply {
            Reply::Page { next, looked_at, items } => (next, looked_at, items),
            Reply::Error(error) => return Err(error),
            other => {
                tracing::error!(?other, "a partition answered a scan with a reply of another kind");
                return Err(Error::NotLeader);
            }
        };
        let Some(ScanCursor { partition, .. }) = self.at else { return Ok(()) };
        let bytes: usize = items.iter().map(|item| item.bytes() + FRAMING_BYTES).sum();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // A large entry is a page of its own: it comes again in the next one.
        let is_one = self.items.is_empty() && items.len() == 1;
        let framing = (items.len() * FRAMING_BYTES) as u32;
        if bytes.saturating_sub(framing) > self.left.bytes && !is_one {
            self.is_full = true;
            return Ok(());
        }
        self.age = Some(self.age.map_or(age, |other| other.with(age)));
        self.left.bytes = self.left.bytes.saturating_sub(bytes);
        self.left.matches = self.left.matches.saturating_sub(items.len() as u32);
        self.left.looked_at = self.left.looked_at.saturating_sub(looked_at);
        self.items.extend(items);
        match next {
            Some(position) => self.at = Some(ScanCursor { partition, position }),
            None => self.go_to(ScanCursor { partition: PartitionId(partition.0 + 1), position: 0 }),
        }
        if self.at.is_none() && self.items.is_empty() && std::mem::take(&mut self.wraps) {
            self.go_to(ScanCursor { partition: PartitionId(0), position: 0 });
        }
        Ok(())
    }

    /// Goes on at a cursor, or at the start of the first partition after it that is visited.
    fn go_to(&mut self, cursor: ScanCursor) {
        self.at = match self.scope.first_from(cursor.partition) {
            Some(partition) if partition == cursor.partition => Some(cursor),
            first => first.map(|partition| ScanCursor { partition, position: 0 }),
        };
    }
}

#[cfg(test)]
mod tests {
    use flux_core::Value;

    use super::*;

    const START: ScanCursor = ScanCursor { partition: PartitionId(0), position: 0 };
    const FRESH: Age = Age::CURRENT;

    fn limits(matches: u32, bytes: u32) -> PageLimits {
        PageLimits { matches, looked_at: 1000, bytes }
    }

    fn walk(scope: Scope, from: ScanCursor, limits: PageLimits) -> Walk {
        Walk::new(scope, from, KeyFilter::Prefix(b"p".to_vec()), false, limits)
    }

    fn page(next: Option<u32>, sizes: &[usize]) -> Reply {
        let value = |size| Value { bytes: vec![0; size], version: 1, expires_at_ms: None };
        let item = |size: &usize| Item { key: b"p".to_vec(), value: value(*size) };
        Reply::Page { next, looked_at: 10, items: sizes.iter().map(item).collect() }
    }

    fn place(walk: &Walk) -> Option<(u16, u32)> {
        let (partition, command) = walk.step()?;
        let Command::Scan { from, .. } = command else { panic!("{command:?}") };
        Some((partition.0, from))
    }

    #[test]
    fn partitions_are_visited_one_after_another() {
        let mut walk = walk(Scope::All(3), START, limits(100, 1000));
        assert_eq!(place(&walk), Some((0, 0)));
        walk.take(page(Some(7), &[1]), FRESH).expect("a page");
        assert_eq!(place(&walk), Some((0, 7)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        walk.take(page(None, &[2]), FRESH).expect("a page");
        assert_eq!(place(&walk), Some((2, 0)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!((place(&walk), walk.next(), walk.items.len()), (None, None, 2));
    }

    #[test]
    fn only_what_is_in_scope_is_visited() {
        let scope = Scope::Only([PartitionId(2), PartitionId(5)].into());
        let from = ScanCursor { partition: PartitionId(1), position: 9 };
        let mut walk = walk(scope, from, limits(100, 1000));
        assert_eq!(place(&walk), Some((2, 0)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!(place(&walk), Some((5, 0)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!(walk.next(), None);
    }

    #[test]
    fn limits_end_a_page_and_the_cursor_goes_on() {
        let mut one = walk(Scope::All(2), START, limits(2, 1000));
        one.take(page(Some(3), &[1, 1]), FRESH).expect("a page");
        assert!(one.step().is_none());
        assert_eq!(one.next(), Some(ScanCursor { partition: PartitionId(0), position: 3 }));

        let mut looked =
            walk(Scope::All(2), START, PageLimits { looked_at: 10, ..limits(2, 1000) });
        looked.take(page(Some(3), &[]), FRESH).expect("a page");
        assert!(looked.step().is_none() && looked.next().is_some());
    }

    #[test]
    fn a_large_entry_comes_alone_and_is_not_lost() {
        let mut walk_on = walk(Scope::All(2), START, limits(100, 1000));
        walk_on.take(page(Some(3), &[400]), FRESH).expect("a page");
        walk_on.take(page(Some(4), &[5000]), FRESH).expect("a page");
        assert_eq!((walk_on.items.len(), walk_on.step().is_none()), (1, true));
        let from = walk_on.next().expect("more");
        assert_eq!(from.position, 3, "the large one comes again");
        let mut next = walk(Scope::All(2), from, limits(100, 1000));
        next.take(page(Some(4), &[5000]), FRESH).expect("a page");
        assert_eq!((next.items.len(), next.step().is_none()), (1, true));
        assert_eq!(next.next().map(|cursor| cursor.position), Some(4));
    }

    #[test]
    fn one_key_is_looked_for_around_the_end() {
        let from = ScanCursor { partition: PartitionId(1), position: 8 };
        let mut walk = Walk::to_one_key(Scope::All(2), from);
        assert_eq!(place(&walk), Some((1, 8)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!(place(&walk), Some((0, 0)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!(place(&walk), Some((1, 0)));
        walk.take(page(None, &[]), FRESH).expect("a page");
        assert_eq!((place(&walk), walk.items.len()), (None, 0), "there is none");
    }

    #[test]
    fn the_error_of_a_partition_ends_it() {
        let mut walk = walk(Scope::All(2), START, limits(2, 1000));
        let refused = walk.take(Reply::Error(Error::Overloaded), FRESH);
        assert_eq!(refused, Err(Error::Overloaded));
    }

    #[test]
    fn cursors_are_checked() {
        let cursor = ScanCursor { partition: PartitionId(3), position: 9 };
        let bytes = cursor_to_bytes(Some(cursor));
        assert_eq!(cursor_from_bytes(&bytes, 4), Some(cursor));
        assert_eq!(cursor_from_bytes(&bytes, 3), None);
        assert_eq!(cursor_from_bytes(&bytes[1..], 4), None);
        assert_eq!(cursor_from_bytes(&cursor_to_bytes(None), 4), Some(START));
    }
}
