//! The client's session: which number each write gets, and which answers nobody waits for any more.
//!
//! See docs/protocol.md, "Sessions". What this module does not do: decide what is sent again.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flux_proto::native::Session;

/// Stands for the partition of a write while the number of partitions is not known.
const ANY_PARTITION: u16 = u16::MAX;

/// Numbers the writes of one client, over all its clones.
#[derive(Debug)]
pub(crate) struct Ledger {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The session's id and the number of partitions that its writes were sorted by.
    session: u64,
    partitions: Option<u16>,
    next: u64,
    /// Writes under way, as partition and sequence.
    under_way: BTreeSet<(u16, u64)>,
}

/// A write's number, from its first attempt to its end.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    ledger: &'a Ledger,
    session: u64,
    partition: u16,
    sequence: u64,
}

impl Ledger {
    pub(crate) fn new() -> Ledger {
        let (under_way, session) = (BTreeSet::new(), random_id());
        Ledger { inner: Mutex::new(Inner { session, partitions: None, next: 1, under_way }) }
    }

    /// A number for a new write to `partition` of `partitions`; none where that is not known.
    pub(crate) fn begin(&self, place: Option<(u16, u16)>) -> Ticket<'_> {
        let mut inner = self.lock();
        let partition = place.map_or(ANY_PARTITION, |(partition, _)| partition);
        if let Some((_, count)) = place {
            // With other partitions, what is acknowledged in one says nothing of another.
            if inner.partitions.is_some_and(|before| before != count) {
                inner.session = random_id();
            }
            inner.partitions = Some(count);
        }
        let sequence = inner.next;
        inner.next += 1;
        inner.under_way.insert((partition, sequence));
        Ticket { ledger: self, session: inner.session, partition, sequence }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The lowest sequence under way that may be of this partition.
    fn lowest(&self, partition: u16) -> Option<u64> {
        if partition == ANY_PARTITION {
            return self.under_way.iter().map(|&(_, sequence)| sequence).min();
        }
        let first = |partition| {
            self.under_way.range((partition, 0)..=(partition, u64::MAX)).next().map(|entry| entry.1)
        };
        first(partition).into_iter().chain(first(ANY_PARTITION)).min()
    }
}

impl Ticket<'_> {
    /// What is sent with the write: the same in every attempt but for what was acknowledged since.
    pub(crate) fn session(&self) -> Session {
        let lowest = self.ledger.lock().lowest(self.partition).unwrap_or(self.sequence);
        let acked_below = lowest.min(self.sequence);
        Session { id: self.session, sequence: self.sequence, acked_below }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.ledger.lock().under_way.remove(&(self.partition, self.sequence));
    }
}

fn random_id() -> u64 {
    fastrand::u64(1..)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(ticket: &Ticket<'_>) -> (u64, u64) {
        let session = ticket.session();
        (session.sequence, session.acked_below)
    }

    #[test]
    fn what_is_below_all_that_is_under_way_is_acknowledged_in_each_partition() {
        let ledger = Ledger::new();
        let first = ledger.begin(Some((3, 16)));
        let other = ledger.begin(Some((4, 16)));
        let second = ledger.begin(Some((3, 16)));
        assert_eq!(numbers(&first), (1, 1));
        assert_eq!(numbers(&other), (2, 2));
        assert_eq!(numbers(&second), (3, 1));
        drop(first);
        assert_eq!(numbers(&second), (3, 3));
        assert_ne!(second.session().id, 0);
        assert_eq!(second.session().id, other.session().id);
        drop((second, other));
        assert!(ledger.lock().under_way.is_empty());
    }

    #[test]
    fn a_write_whose_partition_is_not_known_holds_all_back() {
        let ledger = Ledger::new();
        let known = ledger.begin(Some((3, 16)));
        let unknown = ledger.begin(None);
        let later = ledger.begin(Some((5, 16)));
        assert_eq!(numbers(&unknown), (2, 1));
        assert_eq!(numbers(&later), (3, 2));
        drop(known);
        assert_eq!(numbers(&unknown), (2, 2));
    }

    #[test]
    fn other_partitions_are_another_session_and_sequences_go_on() {
        let ledger = Ledger::new();
        let before = ledger.begin(Some((3, 16)));
        let after = ledger.begin(Some((3, 32)));
        assert_ne!(before.session().id, after.session().id);
        assert_eq!((before.session().sequence, after.session().sequence), (1, 2));
        // The repetition of an earlier write stays in its session.
        assert_eq!(before.session().id, before.session().id);
    }
}
