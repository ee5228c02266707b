//! Who belongs to a group, and how an entry of the log changes it: joint consensus, as in section 4.3
//! of the Raft dissertation and in the `raft` crate, which does the same on its own state.
//!
//! Recovery has no running `raft` to ask, so the rules are here once more; a replica compares the two
//! whenever a change is applied.

use prost_of_raft::Message as _;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState,
};

/// The configuration of a group. Every list is sorted. While `outgoing` is not empty the configuration is
/// joint: a decision needs a majority of `voters` and one of `outgoing`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// The voters, in a joint configuration those to come.
    pub voters: Vec<u64>,
    /// The voters that a joint configuration is about to leave behind.
    pub outgoing: Vec<u64>,
    /// Replicas that follow and do not vote.
    pub learners: Vec<u64>,
}

impl Members {
    /// A group of voters.
    pub fn of_voters(mut voters: Vec<u64>) -> Members {
        voters.sort_unstable();
        Members { voters, ..Members::default() }
    }

    /// Whether two majorities are needed.
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether a replica has a vote.
    pub fn is_voter(&self, id: u64) -> bool {
        self.voters.contains(&id) || self.outgoing.contains(&id)
    }

    /// Whether a replica belongs to the group, with or without a vote.
    pub fn contains(&self, id: u64) -> bool {
        self.is_voter(id) || self.learners.contains(&id)
    }

    /// Whether this replica decides alone.
    pub fn is_alone(&self, id: u64) -> bool {
        self.voters == [id] && self.outgoing.is_empty()
    }

    /// All replicas, each once.
    pub fn all(&self) -> Vec<u64> {
        let lists = [&self.voters, &self.outgoing, &self.learners];
        let mut all: Vec<u64> = lists.into_iter().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether it is a configuration that a group can have. Raft takes any other for a broken state and
    /// ends the process.
    pub fn is_sound(&self) -> bool {
        let Members { voters, outgoing, learners } = self;
        let lists = [voters, outgoing, learners];
        let are_sets = lists.iter().all(|list| {
            // No replica has the id 0.
            list.first() != Some(&0) && list.is_sorted_by(|one, next| one < next)
        });
        !voters.is_empty() && are_sets && !learners.iter().any(|id| self.is_voter(*id))
    }

    /// Whether these replicas are enough to decide.
    pub fn has_quorum(&self, has: impl Fn(u64) -> bool) -> bool {
        let majority = |ids: &[u64]| {
            let count = ids.iter().filter(|id| has(**id)).count();
            ids.is_empty() || count > ids.len() / 2
        };
        majority(&self.voters) && majority(&self.outgoing)
    }

    /// The configuration after a change that was committed.
    pub(super) fn after(&self, change: &ConfChangeV2) -> Members {
        let mut next = self.clone();
        if change.leave_joint() {
            next.outgoing.clear();
            return next;
        }
        if change.enter_joint().is_some() {
            next.outgoing = next.voters.clone();
        }
        for one in &change.changes {
            let id = one.node_id;
            next.learners.retain(|learner| *learner != id);
            match one.change_type() {
                ConfChangeType::AddNode => {
                    next.voters.push(id);
                    next.voters.sort_unstable();
                    next.voters.dedup();
                }
                ConfChangeType::AddLearnerNode => {
                    next.voters.retain(|voter| *voter != id);
                    next.learners.push(id);
                    next.learners.sort_unstable();
                }
                ConfChangeType::RemoveNode => next.voters.retain(|voter| *voter != id),
            }
        }
        next
    }
}

impl From<&ConfState> for Members {
    fn from(state: &ConfState) -> Members {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        Members {
            voters: sorted(&state.voters),
            outgoing: sorted(&state.voters_outgoing),
            learners: sorted(&state.learners),
        }
    }
}

impl From<&Members> for ConfState {
    fn from(members: &Members) -> ConfState {
        ConfState {
            voters: members.voters.clone(),
            voters_outgoing: members.outgoing.clone(),
            learners: members.learners.clone(),
            ..ConfState::default()
        }
    }
}

/// A change of one replica.
pub(super) fn one(kind: ConfChangeType, id: u64) -> ConfChangeSingle {
    ConfChangeSingle { change_type: kind as i32, node_id: id }
}

/// Adds a learner or removes one: no joint configuration is needed.
pub(super) fn simple(kind: ConfChangeType, id: u64) -> ConfChangeV2 {
    ConfChangeV2 { changes: vec![one(kind, id)], ..ConfChangeV2::default() }
}

/// Enters a joint configuration, which is left by a change of its own.
pub(super) fn joint(changes: Vec<ConfChangeSingle>) -> ConfChangeV2 {
    let transition = ConfChangeTransition::Explicit as i32;
    ConfChangeV2 { transition, changes, ..ConfChangeV2::default() }
}

/// A change, with the epoch of the placement map that it follows.
pub(super) fn following(epoch: u64, change: ConfChangeV2) -> ConfChangeV2 {
    ConfChangeV2 { context: epoch.to_le_bytes().to_vec(), ..change }
}

/// The epoch of the placement map that a change follows; 0 where it follows none, as the end of a joint
/// configuration.
pub(super) fn epoch_of(change: &ConfChangeV2) -> u64 {
    change.context.as_slice().try_into().map_or(0, u64::from_le_bytes)
}

/// The change that an entry of the log holds; `None` if it is not one.
pub(super) fn decode(data: &[u8]) -> Option<ConfChangeV2> {
    ConfChangeV2::decode(data).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_replaced_through_a_joint_configuration() {
        let members = Members::of_voters(vec![3, 1, 2]);
        let members = members.after(&simple(ConfChangeType::AddLearnerNode, 4));
        assert_eq!((&members.voters[..], &members.learners[..]), (&[1, 2, 3][..], &[4][..]));
        let changes = vec![one(ConfChangeType::AddNode, 4), one(ConfChangeType::RemoveNode, 1)];
        let members = members.after(&joint(changes));
        assert_eq!((&members.voters[..], &members.outgoing[..]), (&[2, 3, 4][..], &[1, 2, 3][..]));
        assert!(members.learners.is_empty() && members.is_joint());
        assert!(members.has_quorum(|id| id == 2 || id == 3));
        assert!(!members.has_quorum(|id| id == 2 || id == 4), "not of the outgoing");
        let members = members.after(&ConfChangeV2::default());
        assert_eq!(members, Members::of_voters(vec![2, 3, 4]));
    }

    #[test]
    fn what_no_group_can_be() {
        let members = |voters: &[u64], outgoing: &[u64], learners: &[u64]| Members {
            voters: voters.to_vec(),
            outgoing: outgoing.to_vec(),
            learners: learners.to_vec(),
        };
        assert!(members(&[1], &[], &[]).is_sound());
        assert!(members(&[2, 3, 4], &[1, 2, 3], &[5, 6]).is_sound());
        for (voters, outgoing, learners) in [
            (&[][..], &[][..], &[1][..]),
            (&[], &[1], &[]),
            (&[0, 1], &[], &[]),
            (&[1, 1], &[], &[]),
            (&[2, 1], &[], &[]),
            (&[1], &[1, 1], &[]),
            (&[1], &[], &[2, 2]),
            (&[1, 2], &[], &[2]),
            (&[1], &[2], &[2]),
        ] {
            assert!(!members(voters, outgoing, learners).is_sound(), "{voters:?} {outgoing:?}");
        }
    }

    #[test]
    fn the_raft_form_and_back() {
        let members = Members { voters: vec![1, 2], outgoing: vec![1, 3], learners: vec![9] };
        assert_eq!(Members::from(&ConfState::from(&members)), members);
        assert_eq!(members.all(), [1, 2, 3, 9]);
    }
}
