//! What replicas do to agree: leaders, votes and entries, seen from outside as they happen.

use std::collections::BTreeMap;
use std::collections::btree_map;

use super::{Promise, Violation};

/// What all replicas of all partitions did so far.
#[derive(Debug, Default)]
pub struct Consensus {
    /// Who leads, by partition and term.
    leaders: BTreeMap<(u16, u64), u64>,
    /// Whom a replica voted for, by partition, replica and term.
    votes: BTreeMap<(u16, u64, u64), u64>,
    /// By partition, index and term: the term of the entry before, where known, and the contents.
    entries: BTreeMap<(u16, u64, u64), (Option<u64>, Contents)>,
}

/// What an entry holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Of what kind, in Raft's numbering.
    pub entry_type: i32,
    /// Its bytes.
    pub payload: Vec<u8>,
}

impl Consensus {
    /// A replica leads in a term.
    ///
    /// # Errors
    /// If another one did so before.
    pub fn leads(&mut self, partition: u16, term: u64, replica: u64) -> Result<bool, Violation> {
        match self.leaders.entry((partition, term)) {
            btree_map::Entry::Vacant(vacant) => {
                vacant.insert(replica);
                Ok(true)
            }
            btree_map::Entry::Occupied(known) if *known.get() == replica => Ok(false),
            btree_map::Entry::Occupied(known) => {
                let evidence = format!(
                    "partition {partition}, term {term}: {:#x} and {replica:#x}",
                    known.get()
                );
                Err(Violation::new(Promise::OneLeader, evidence))
            }
        }
    }

    /// A replica tells a candidate that it votes for it.
    ///
    /// # Errors
    /// If it told another candidate of the term so.
    pub fn votes(
        &mut self,
        partition: u16,
        replica: u64,
        term: u64,
        candidate: u64,
    ) -> Result<(), Violation> {
        let known = *self.votes.entry((partition, replica, term)).or_insert(candidate);
        if known == candidate {
            return Ok(());
        }
        let evidence = format!(
            "partition {partition}, term {term}: {replica:#x} voted for {known:#x} and {candidate:#x}"
        );
        Err(Violation::new(Promise::OneVote, evidence))
    }

    /// A replica writes an entry to its log. `before` is the term of the entry before it, where known.
    ///
    /// # Errors
    /// If another replica has another one of this index and term, or another one before it.
    pub fn appends(
        &mut self,
        partition: u16,
        (index, term): (u64, u64),
        before: Option<u64>,
        contents: &Contents,
    ) -> Result<(), Violation> {
        let known = match self.entries.entry((partition, index, term)) {
            btree_map::Entry::Vacant(vacant) => {
                vacant.insert((before, contents.clone()));
                return Ok(());
            }
            btree_map::Entry::Occupied(known) => known.into_mut(),
        };
        let same_before = match (known.0, before) {
            (Some(known), Some(before)) => known == before,
            (None, before) => {
                known.0 = before;
                true
            }
            (_, None) => true,
        };
        if same_before && known.1 == *contents {
            return Ok(());
        }
        let what = if same_before { "two contents" } else { "two entries before it" };
        let evidence = format!("partition {partition}: entry {index} of term {term} has {what}");
        Err(Violation::new(Promise::LogMatching, evidence))
    }

    /// How many terms had a leader.
    pub fn terms(&self) -> usize {
        self.leaders.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(byte: u8) -> Contents {
        Contents { entry_type: 0, payload: vec![byte] }
    }

    fn promise(result: Result<(), Violation>) -> Option<Promise> {
        result.err().map(|violation| violation.promise)
    }

    #[test]
    fn a_term_of_a_partition_has_one_leader() {
        let mut consensus = Consensus::default();
        assert!(consensus.leads(0, 5, 1).is_ok_and(|new| new));
        assert!(consensus.leads(0, 5, 1).is_ok_and(|new| !new));
        assert!(consensus.leads(1, 5, 2).is_ok());
        assert!(consensus.leads(0, 6, 2).is_ok());
        assert_eq!(promise(consensus.leads(0, 5, 2).map(drop)), Some(Promise::OneLeader));
        assert_eq!(consensus.terms(), 3);
    }

    #[test]
    fn a_replica_has_one_vote_in_a_term() {
        let mut consensus = Consensus::default();
        assert!(consensus.votes(0, 1, 5, 2).is_ok());
        assert!(consensus.votes(0, 1, 5, 2).is_ok());
        assert!(consensus.votes(0, 3, 5, 4).is_ok());
        assert_eq!(promise(consensus.votes(0, 1, 5, 3)), Some(Promise::OneVote));
    }

    #[test]
    fn entries_of_one_index_and_term_are_one() {
        let mut consensus = Consensus::default();
        assert!(consensus.appends(0, (2, 5), Some(4), &contents(1)).is_ok());
        assert!(consensus.appends(0, (2, 5), None, &contents(1)).is_ok());
        assert!(consensus.appends(0, (2, 6), Some(5), &contents(9)).is_ok());
        let other = consensus.appends(0, (2, 5), Some(4), &contents(2));
        assert_eq!(promise(other), Some(Promise::LogMatching));
        let before = consensus.appends(0, (2, 5), Some(3), &contents(1));
        assert_eq!(promise(before), Some(Promise::LogMatching));
    }
}
