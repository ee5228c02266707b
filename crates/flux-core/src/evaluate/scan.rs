//! Pages of a partition's keys, in the order of its table.
//!
//! A page shows what is applied, not what is in flight: what a scan promises holds for keys that are there
//! from its first page to its last. It can be read while others write to the table.

use crate::command::{KeyFilter, PageLimits};
use crate::glob;
use crate::reply::Item;
use crate::store::{Entry, Position, Table};
use crate::{Reply, UnixMillis, Value};

/// Entries that are looked at between two looks at the limits.
const STEP_ENTRIES: u32 = 256;

/// Bytes of keys and values in a page, whatever a command asks for.
const MAX_PAGE_BYTES: usize = 8 * 1024 * 1024;

/// Entries that a page looks at, whatever a command asks for.
const MAX_LOOKED_AT: u32 = 100_000;

/// A page in the making.
struct Page<'a> {
    table: &'a Table,
    now_ms: UnixMillis,
    filter: &'a KeyFilter<&'a [u8]>,
    keys_only: bool,
    matches: usize,
    bytes_limit: usize,
    items: Vec<Item>,
    bytes: usize,
    looked_at: u32,
    /// Where the next page starts, once this one is full.
    stopped_at: Option<Position>,
}

/// The answer to a `Command::Scan`.
pub(super) fn page(
    table: &Table,
    now_ms: UnixMillis,
    from: u32,
    filter: &KeyFilter<&[u8]>,
    limits: PageLimits,
    keys_only: bool,
) -> Reply {
    let mut page = Page {
        table,
        now_ms,
        filter,
        keys_only,
        matches: limits.matches.max(1) as usize,
        bytes_limit: (limits.bytes as usize).clamp(1, MAX_PAGE_BYTES),
        items: Vec::new(),
        bytes: 0,
        looked_at: 0,
        stopped_at: None,
    };
    let looked_at = limits.looked_at.clamp(1, MAX_LOOKED_AT);
    let mut next = Some(Position(from));
    while let Some(from) = next {
        let step = (looked_at - page.looked_at).min(STEP_ENTRIES);
        next = table.scan(from, step as usize, |entry| page.visit(&entry));
        if page.stopped_at.is_some() {
            next = page.stopped_at;
            break;
        }
        if page.looked_at >= looked_at || page.items.len() >= page.matches {
            break;
        }
    }
    let next = next.map(|position| position.0);
    Reply::Page { next, looked_at: page.looked_at, items: page.items }
}

impl Page<'_> {
    fn visit(&mut self, entry: &Entry<'_>) {
        if self.stopped_at.is_some() {
            return;
        }
        let counts = !entry.is_expired(self.now_ms) && self.filter.takes(entry.key);
        let value: &[u8] = if self.keys_only { &[] } else { entry.value };
        let size = entry.key.len() + value.len();
        if counts && self.is_full(size) {
            // Entries at one position belong to one page: the next one starts at a position.
            let position = self.table.hash(entry.key).position();
            let last = self.items.last().map(|item| self.table.hash(&item.key).position());
            if last != Some(position) {
                self.stopped_at = Some(position);
                return;
            }
        }
        self.looked_at += 1;
        if counts {
            self.bytes += size;
            let (version, expires_at_ms) = (entry.version, entry.expires_at_ms);
            let value = Value { bytes: value.to_vec(), version, expires_at_ms };
            self.items.push(Item { key: entry.key.to_vec(), value });
        }
    }

    /// Whether an entry of this size is for the next page.
    fn is_full(&self, size: usize) -> bool {
        let has_room = self.items.is_empty() || self.bytes + size <= self.bytes_limit;
        self.items.len() >= self.matches || !has_room
    }
}

impl KeyFilter<&[u8]> {
    fn takes(&self, key: &[u8]) -> bool {
        match self {
            KeyFilter::Prefix(prefix) => key.starts_with(prefix),
            KeyFilter::Pattern(pattern) => glob::matches(pattern, key),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::store::{Memory, TableOptions};

    fn table(count: u32, value: &[u8]) -> Table {
        let table = Table::new(TableOptions { hash_seed: 7, shards: 2 }, Memory::new(0));
        for number in 0..count {
            let key = format!("{}:{number}", if number % 2 == 0 { "even" } else { "odd" });
            let expires_at_ms = (number % 10 == 0).then_some(500);
            let entry = Entry {
                key: key.as_bytes(),
                value,
                version: u64::from(number) + 1,
                expires_at_ms,
                written_at_s: 0,
            };
            table.put(table.hash(key.as_bytes()), entry);
        }
        table
    }

    /// All pages of a scan, with the most items and bytes of one.
    fn walk(table: &Table, filter: &KeyFilter<&[u8]>, limits: PageLimits) -> (Vec<Item>, usize) {
        let (mut all, mut pages, mut from) = (Vec::new(), 0, 0);
        loop {
            let Reply::Page { next, looked_at, items } =
                page(table, 1000, from, filter, limits, false)
            else {
                panic!("no page");
            };
            assert!(looked_at > 0 || next.is_none(), "no progress");
            let bytes: usize =
                items.iter().map(|item| item.key.len() + item.value.bytes.len()).sum();
            assert!(items.len() <= limits.matches as usize);
            assert!(bytes <= limits.bytes as usize || items.len() == 1);
            all.extend(items);
            pages += 1;
            match next {
                Some(next) => from = next,
                None => return (all, pages),
            }
        }
    }

    #[test]
    fn pages_hold_every_key_once_whatever_the_limits() {
        let table = table(3000, b"value");
        let all = KeyFilter::Prefix(&b""[..]);
        for (matches, looked_at, bytes, least_pages) in [
            (u32::MAX, u32::MAX, u32::MAX, 1),
            (7, u32::MAX, u32::MAX, 2700 / 7),
            (u32::MAX, 10, u32::MAX, 100),
            (u32::MAX, u32::MAX, 100, 100),
            (0, 0, 0, 1),
        ] {
            let limits = PageLimits { matches: matches.max(1), looked_at, bytes: bytes.max(1) };
            let (items, pages) = walk(&table, &all, limits);
            let keys: BTreeSet<&[u8]> = items.iter().map(|item| &item.key[..]).collect();
            assert_eq!((items.len(), keys.len()), (2700, 2700), "a tenth is expired");
            assert!(pages >= least_pages, "{pages} pages");
        }
    }

    #[test]
    fn large_values_end_a_page_and_one_is_always_in_it() {
        let table = table(40, &[0; 1000]);
        let limits = PageLimits { matches: 100, looked_at: 1000, bytes: 2500 };
        let (items, pages) = walk(&table, &KeyFilter::Prefix(b""), limits);
        assert_eq!((items.len(), pages), (36, 18));
        let limits = PageLimits { bytes: 10, ..limits };
        let (items, pages) = walk(&table, &KeyFilter::Prefix(b""), limits);
        assert_eq!((items.len(), pages), (36, 36));
    }

    #[test]
    fn filters_choose_keys() {
        let table = table(100, b"");
        let limits = PageLimits { matches: 100, looked_at: 1000, bytes: 1 << 20 };
        let (items, _) = walk(&table, &KeyFilter::Prefix(b"odd:"), limits);
        assert_eq!(items.len(), 50);
        let (items, _) = walk(&table, &KeyFilter::Pattern(b"*:?7"), limits);
        assert_eq!(items.len(), 9);
        let value = page(&table, 1000, 0, &KeyFilter::Pattern(b"odd:7"), limits, true);
        let Reply::Page { items, next: None, looked_at: 100 } = value else { panic!("{value:?}") };
        assert_eq!(items[0].value.version, 8);
    }
}
