//! How old the answer to a stale read is. What is read is the table of this node's replica, as it is.

use flux_core::replica::Now;
use flux_core::{PartitionId, Revision};
use flux_proto::native::StalePosition;

use crate::shared::Shared;

/// How up to date an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Age {
    /// The partition's revision that had been applied; 0 where that is not known, or of several.
    pub(crate) revision: Revision,
    /// For how long, at most, newer ones may have been acknowledged.
    pub(crate) age_us: u64,
}

impl Age {
    /// That of a linearizable answer of another node.
    pub(crate) const CURRENT: Age = Age { revision: 0, age_us: 0 };

    /// That of an answer made of two.
    pub(crate) fn with(self, other: Age) -> Age {
        Age { revision: 0, age_us: self.age_us.max(other.age_us) }
    }

    /// In whole milliseconds, rounded up: less would promise too much.
    pub(crate) fn age_ms(self) -> u64 {
        self.age_us.div_ceil(1000)
    }
}

impl From<Age> for StalePosition {
    fn from(age: Age) -> StalePosition {
        StalePosition { revision: age.revision, age_ms: age.age_ms() }
    }
}

impl Shared {
    /// How old an answer of this node's replica of a partition would be; none where there is no replica,
    /// or it was never up to date: another node must be asked.
    pub(crate) fn age(&self, partition: PartitionId, now: Now) -> Option<Age> {
        let standing = &self.views[usize::from(partition.0)].standing;
        let (revision, age_us) = standing.staleness(now.us);
        age_us.map(|age_us| Age { revision, age_us })
    }

    /// How old an answer of this node's replicas of several partitions would be.
    pub(crate) fn age_of_all(
        &self,
        partitions: impl IntoIterator<Item = PartitionId>,
        now: Now,
    ) -> Option<Age> {
        let mut ages = partitions.into_iter().map(|partition| self.age(partition, now));
        let first = ages.next().unwrap_or(Some(Age::CURRENT))?;
        ages.try_fold(first, |all, age| Some(all.with(age?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_ages_the_longer_counts_and_milliseconds_are_rounded_up() {
        let one = Age { revision: 7, age_us: 1001 };
        assert_eq!(StalePosition::from(one), StalePosition { revision: 7, age_ms: 2 });
        let both = one.with(Age { revision: 9, age_us: 5 });
        assert_eq!(both, Age { revision: 0, age_us: 1001 });
        assert_eq!(Age::CURRENT.age_ms(), 0);
    }
}
