//! The group as its members see it: who belongs to it, how it changes, who should lead, and snapshots on
//! their way from one replica to another.

use raft::eraftpb::{ConfChangeType, Message, MessageType};
use raft::{ProgressState, SnapshotStatus, StateRole};

use super::entries::raft_snapshot;
use super::members::{self, Members, following, joint, one, simple};
use super::{Broken, Now, Position, Replica, Revision, SnapshotMeta, TRANSFER_TICKS, refused};
use crate::placement::ReplicaId;
use crate::store::Table;
use crate::{Error, PartitionId};

/// A learner that lacks no more entries than this has caught up.
const CAUGHT_UP_ENTRIES: u64 = 1024;

/// What a replica is in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader,
    /// It votes and follows, or stands for election.
    Follower,
    /// It follows and has no vote.
    Learner,
}

/// How far a leader knows another replica to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The replica.
    pub id: u64,
    /// The last entry that it surely has.
    pub matched: u64,
    /// It is being sent a snapshot.
    pub in_snapshot: bool,
    /// It has answered lately.
    pub active: bool,
}

/// A replica's state, for people and for the placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The partition.
    pub partition: PartitionId,
    /// The replica.
    pub id: u64,
    /// What it is.
    pub role: Role,
    /// It leads and can serve.
    pub serves: bool,
    /// Its term.
    pub term: u64,
    /// The leader it knows of; 0 for none.
    pub leader: u64,
    /// The last entry known to be committed.
    pub commit: u64,
    /// The last entry in the table.
    pub applied: u64,
    /// The last entry in the log.
    pub last: u64,
    /// The last revision in the table.
    pub revision: Revision,
    /// The group.
    pub members: Members,
    /// The group is between two configurations, or a majority does not know for good yet that it has left
    /// one, as far as this replica knows: the loss of another replica may be one too many.
    pub changing: bool,
    /// The others, where this replica leads.
    pub progress: Vec<Progress>,
}

/// A step towards the replicas that a group should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// This learner is added.
    AddLearner(u64),
    /// This learner is removed.
    RemoveLearner(u64),
    /// The group enters a joint configuration.
    EnterJoint,
    /// It leaves it.
    LeaveJoint,
    /// An empty entry, by which a majority learns for good that others have left.
    Confirm,
    /// This replica is to go, and that one is to lead first: for the owner to see to, with
    /// [`transfer_leader`](Replica::transfer_leader), when it has kept commands back and no batch is open.
    Transfer(u64),
}

impl<W> Replica<W> {
    /// The group's configuration, as of the entries applied.
    pub fn members(&self) -> &Members {
        self.node.store().members()
    }

    pub(super) fn is_alone(&self) -> bool {
        self.members().is_alone(self.id)
    }

    /// This replica's state.
    pub fn status(&self) -> Status {
        let raft = &self.node.raft;
        let role = match raft.state {
            StateRole::Leader => Role::Leader,
            _ if self.members().learners.contains(&self.id) => Role::Learner,
            _ => Role::Follower,
        };
        let mut progress = Vec::new();
        if role == Role::Leader {
            let others = raft.prs().iter().filter(|(id, _)| **id != self.id);
            progress.extend(others.map(|(id, one)| Progress {
                id: *id,
                matched: one.matched,
                in_snapshot: one.state == ProgressState::Snapshot,
                active: one.recent_active,
            }));
            progress.sort_unstable_by_key(|one| one.id);
        }
        Status {
            partition: self.partition,
            id: self.id,
            role,
            serves: self.leads,
            term: raft.term,
            leader: raft.leader_id,
            commit: raft.raft_log.committed,
            applied: self.applied.index,
            last: raft.raft_log.last_index(),
            revision: self.revision,
            members: self.members().clone(),
            changing: self.members().is_joint() || self.leads && !self.is_confirmed(),
            progress,
        }
    }

    /// Takes the next step, if one can be taken now, towards a group of exactly these voters, which are
    /// those of the placement map of this epoch. To be called again when it is done: what to do follows from
    /// the configuration alone, so that any leader can go on. Only the leader does anything.
    ///
    /// A map that is older than one that the group has followed changes nothing: it would take out a replica
    /// that it does not know yet, or take in one that has left, and an id would come back.
    pub fn reconcile(&mut self, now: Now, epoch: u64, target: &[u64]) -> Option<Change> {
        self.now = now;
        let raft = &self.node.raft;
        if !self.leads || raft.has_pending_conf() || raft.lead_transferee.is_some() {
            return None;
        }
        if raft.raft_log.last_index() == self.left_at {
            self.node.propose(Vec::new(), Vec::new()).ok()?;
            self.stir();
            self.settle();
            return Some(Change::Confirm);
        }
        let members = self.members().clone();
        if target.is_empty() || !members.is_joint() && epoch < self.epoch {
            return None;
        }
        let change = self.next_change(&members, target)?;
        let proposal = match change {
            Change::Transfer(_) => return Some(change),
            Change::AddLearner(id) => following(epoch, simple(ConfChangeType::AddLearnerNode, id)),
            Change::RemoveLearner(id) => following(epoch, simple(ConfChangeType::RemoveNode, id)),
            Change::LeaveJoint | Change::Confirm => Default::default(),
            Change::EnterJoint => {
                let new = target.iter().filter(|id| members.learners.contains(id));
                let old =
                    members.voters.iter().filter(|id| !target.contains(id) && **id != self.id);
                let changes = new
                    .map(|id| one(ConfChangeType::AddNode, *id))
                    .chain(old.map(|id| one(ConfChangeType::RemoveNode, *id)));
                following(epoch, joint(changes.collect()))
            }
        };
        // Refused only if this replica has just lost its leadership: the next leader goes on.
        self.node.propose_conf_change(Vec::new(), proposal).ok()?;
        self.stir();
        self.settle();
        Some(change)
    }

    fn next_change(&self, members: &Members, target: &[u64]) -> Option<Change> {
        if members.is_joint() {
            // A leader that is to go hands over first: the group is not to wait for an election.
            let stays = members.voters.contains(&self.id);
            let heir = members.voters.iter().find(|id| !stays && self.has_caught_up(**id));
            return Some(heir.map_or(Change::LeaveJoint, |id| Change::Transfer(*id)));
        }
        // A plan may be taken back after its replica has left: an id never comes again.
        let voters: Vec<ReplicaId> =
            members.voters.iter().map(|id| ReplicaId::from_u64(*id)).collect();
        if let Some(id) = target.iter().find(|id| !members.contains(**id)) {
            let may_join = ReplicaId::from_u64(*id).may_join(&voters);
            return may_join.then_some(Change::AddLearner(*id));
        }
        if let Some(id) = members.learners.iter().find(|id| !target.contains(id)) {
            return Some(Change::RemoveLearner(*id));
        }
        let waits = |id: &&u64| members.learners.contains(id) && !self.has_caught_up(**id);
        if target.iter().any(|id| waits(&id)) {
            return None;
        }
        let ready = |id: &u64| *id == self.id || self.is_active(*id);
        if !Members::of_voters(target.to_vec()).has_quorum(|id| ready(&id)) {
            return None;
        }
        let to_add = target.iter().any(|id| members.learners.contains(id));
        let to_remove = members.voters.iter().any(|id| !target.contains(id) && *id != self.id);
        if to_add || to_remove {
            return Some(Change::EnterJoint);
        }
        if target.contains(&self.id) {
            return None;
        }
        // Only this replica is left to be removed, and a leader does not remove itself.
        let heir = target.iter().find(|id| self.has_caught_up(**id))?;
        Some(Change::Transfer(*heir))
    }

    fn is_active(&self, id: u64) -> bool {
        self.node.raft.prs().get(id).is_some_and(|one| one.recent_active)
    }

    fn has_caught_up(&self, id: u64) -> bool {
        let raft = &self.node.raft;
        raft.prs().get(id).is_some_and(|one| {
            // A quiet group leaves one that had a snapshot, and lacks nothing, in `Probe`.
            one.state != ProgressState::Snapshot
                && one.matched > 0
                && one.recent_active
                && one.matched + CAUGHT_UP_ENTRIES >= raft.raft_log.last_index()
        })
    }

    /// Asks another voter to take over. Until it has, or an election timeout has passed, batches stay open
    /// and nothing new is proposed. Returns false if that one cannot lead now.
    pub fn transfer_leader(&mut self, now: Now, to: u64) -> bool {
        self.now = now;
        let fit = self.members().voters.contains(&to) && self.has_caught_up(to);
        if !self.leads || to == self.id || !fit {
            return false;
        }
        // A vote for the other needs no timeout: from here on no lease can be relied on.
        self.stir();
        self.rounds.give_up_lease(self.node.raft.term);
        // Raft would begin its wait for a quorum anew: a leader that tries again and again would never find
        // that nobody hears it. But it also gives a transfer up when that wait ends, so that the first one in
        // an election timeout may put the end off.
        let election_ticks = self.election.election_ticks() as u64;
        let mut elapsed = self.node.raft.election_elapsed;
        if self.ticks >= self.put_off_tick + election_ticks {
            self.put_off_tick = self.ticks;
            elapsed = elapsed.min(election_ticks.saturating_sub(TRANSFER_TICKS + 1) as usize);
        }
        self.transfer_tick = self.ticks;
        self.node.transfer_leader(to);
        self.node.raft.election_elapsed = elapsed;
        self.settle();
        true
    }

    /// The replica that leads as far as this one knows; 0 if it knows of none.
    pub fn leader(&self) -> u64 {
        self.node.raft.leader_id
    }

    /// Whether another voter has been asked to take over, and may still do so.
    pub fn is_handing_over(&self) -> bool {
        self.node.raft.lead_transferee.is_some()
    }

    /// The voter that is best fit to take over, if there is one.
    pub fn heir(&self) -> Option<u64> {
        let voters = self.members().voters.iter();
        let fit = voters.filter(|id| **id != self.id && self.has_caught_up(**id));
        fit.max_by_key(|id| self.node.raft.prs().get(**id).map_or(0, |one| one.matched)).copied()
    }

    /// Whether this replica knows of no group yet: nobody counts on it. Only such a one may go because the
    /// placement map does not name it any more; whatever the map says, one that knows more may be a voter
    /// that its group needs, until it is told that it can go, see `has_left`.
    pub fn has_learned_nothing(&self) -> bool {
        self.members().voters.is_empty() && self.received.is_none()
    }

    /// Whether the group goes on without this replica, as its log says. It must stay until it is told that it
    /// can go, see `has_left`: that it knows of its removal does not mean that those who stay do.
    pub fn is_removed(&self) -> bool {
        let members = self.members();
        !members.voters.is_empty() && !members.contains(self.id)
    }

    /// Whether a message asks for votes though its sender does not belong to the group any more, and may be
    /// told that it can go. Only a leader says so.
    ///
    /// A sender that believes to have a vote read so in its own log. If this replica has applied all that is
    /// in it and the group does not have the sender now, it was removed, and an id is not given again. One
    /// whose log goes further may have been added by what is not applied here yet; then only a leader that
    /// is sure to be one can tell.
    pub fn has_left(&mut self, now: Now, message: &Message) -> bool {
        self.now = now;
        let kind = message.msg_type();
        let asks = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        let members = self.members();
        let known = 0 < message.index && message.index <= self.applied.index;
        let sure = self.is_confirmed() && (known || self.has_lease());
        asks && sure && !members.voters.is_empty() && !members.contains(message.from)
    }

    /// Whether those who have left the group can go, whoever of it is lost.
    ///
    /// A configuration is in force where it is applied. While only the leader has applied that others left,
    /// those who stay need the votes of those for another leader. So a majority of those who stay must know,
    /// on its disk, that the change is committed. Of an entry that was proposed after the change was applied
    /// that is sure once it is committed: it travels with a commit index that covers the change, and lies in
    /// the log with it. The entry that opens a term is such a one, for all that was applied before.
    fn is_confirmed(&self) -> bool {
        self.leads && self.applied.index > self.left_at
    }

    pub(super) fn apply_change(&mut self, index: u64, data: &[u8]) -> Result<(), Broken> {
        let change = members::decode(data).ok_or(Broken::Change { index })?;
        let before = self.members();
        let members = before.after(&change);
        let leaves = before.all().into_iter().any(|id| !members.contains(id));
        let state = self.node.apply_conf_change(&change).map_err(Broken::Raft)?;
        assert_eq!(members, Members::from(&state), "both have the same rules");
        let raft = &mut self.node.raft;
        if raft.state == StateRole::Leader && leaves {
            self.left_at = raft.raft_log.last_index();
        }
        if raft.state == StateRole::Leader && !members.is_voter(self.id) {
            // It led from the outgoing half of a joint configuration, which is left now.
            raft.become_follower(raft.term, 0);
        }
        self.epoch = self.epoch.max(members::epoch_of(&change));
        self.node.mut_store().set_members(members);
        self.rank_anew();
        Ok(())
    }

    /// The first entry before those that followers may still ask for; `None` if they ask for nothing.
    pub(super) fn needed_by_followers(&self) -> Option<u64> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return None;
        }
        let store = self.node.store();
        let (dropped, newest) = (store.truncated_index(), store.snapshot_index());
        let needed = self.active_followers().map(|one| match one.state {
            ProgressState::Snapshot => one.pending_snapshot,
            _ if one.matched >= dropped => one.matched,
            // It gets the newest snapshot, and then the entries after it.
            _ => one.matched.max(newest),
        });
        needed.min()
    }

    /// The snapshot that was sent to a replica has arrived, or has not.
    pub fn report_snapshot(&mut self, to: u64, arrived: bool) {
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.node.report_snapshot(to, status);
        self.settle();
    }

    /// What was sent to a replica may be lost.
    pub fn report_unreachable(&mut self, id: u64) {
        self.stir();
        self.node.report_unreachable(id);
        self.settle();
    }

    /// Takes a snapshot from its leader, which lies on the disk and was loaded into `table`. False if it
    /// is of no use any more; then its file is not either. Otherwise the next `Ready` begins the log anew.
    pub fn install(
        &mut self,
        now: Now,
        from: u64,
        term: u64,
        meta: SnapshotMeta,
        table: Table,
    ) -> bool {
        self.now = now;
        // One that is not newer than the table goes to Raft all the same, which tells the leader so: else
        // it would be sent again and again. Of two before the next `Ready` Raft might keep the first, and
        // what is installed must be what Raft has.
        if self.restoring.is_some()
            || self.received.is_some()
            || !(meta.members.is_sound() && meta.members.contains(self.id))
            || from == self.id
            || from == 0
        {
            return false;
        }
        let mut message = Message {
            to: self.id,
            from,
            term,
            snapshot: Some(raft_snapshot(&meta)),
            ..Message::default()
        };
        message.set_msg_type(MessageType::MsgSnapshot);
        self.received = Some((meta, table));
        let _ = self.node.step(message);
        self.settle();
        let wanted = self.node.snap().is_some_and(|snapshot| !snapshot.is_empty());
        if !wanted {
            self.received = None;
        }
        wanted
    }

    /// Puts a received snapshot in the place of all that was here.
    pub(super) fn restore(&mut self, number: u64) {
        let (meta, table) = self.received.take().expect("Raft was given it together with this");
        self.table.replace(table);
        self.applied = meta.position;
        self.revision = meta.revision;
        self.sessions = meta.sessions();
        self.epoch = meta.epoch;
        self.cursor = meta.cursor;
        self.captured.clear();
        self.start = meta.position.index;
        self.restoring = Some(number);
        self.in_flight.discard_all();
        self.in_flight.applied(meta.revision);
        let lost = self.proposed.drain(..).flat_map(|batch| batch.replies).collect();
        self.decided.extend(refused(lost, &Error::OutcomeUnknown));
        self.rebuild_wheel(self.now.ms);
        let Position { index, term } = meta.position;
        let store = self.node.mut_store();
        store.restart(Position { index, term });
        store.set_members(meta.members.clone());
        store.set_snapshot(meta);
        self.rank_anew();
    }
}
