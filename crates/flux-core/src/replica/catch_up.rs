//! Snapshots for followers, and how much of what is written meanwhile is kept for them.
//!
//! A snapshot is of no use without the entries after it. While one is made and sent, and until its receiver
//! has caught up, more entries stay in memory than for those who are only behind. If even those are not enough
//! all that time is lost, and the next attempt waits: longer each time, so that snapshots which never get
//! there do not take the disk and the network all day.

use raft::{ProgressState, StateRole};

use super::{LAGGING_TAILS, Replica, SnapshotMeta};

/// Entries after a snapshot may take this part of the partition's data, and never more than so many times
/// `tail_bytes`.
const SNAPSHOT_SHARE: u64 = 4;
const SNAPSHOT_TAILS: usize = 64;

/// Ticks until the next attempt after one that was lost; doubled each time, up to the longest.
const PAUSE_TICKS: u64 = 200;
const LONGEST_PAUSE_TICKS: u64 = 3200;

/// The snapshot that is under way.
#[derive(Debug, Default)]
pub(super) struct CatchUp {
    /// What was applied when it was first wanted, until it is taken.
    wanted_at: Option<u64>,
    /// Its index, from when it was taken until the followers have caught up.
    index: Option<u64>,
    /// More entries are kept than for those who are only behind.
    is_granted: bool,
    /// How many were lost one after the other.
    lost: u32,
    /// No snapshot is taken for a follower before this tick.
    not_before: u64,
    /// One was lost, and the owner has not been told.
    untold: bool,
}

impl<W> Replica<W> {
    /// Whether a follower waits for a snapshot that has to be taken first, and now.
    pub fn snapshot_wanted(&self) -> bool {
        self.node.raft.state == StateRole::Leader
            && self.node.store().snapshot_wanted()
            && self.ticks >= self.catch_up.not_before
    }

    /// A snapshot lies on the disk. A follower that needs one is sent a `MsgSnapshot`, which stands for
    /// it: the owner sends the contents, and then tells `report_snapshot`.
    pub fn snapshot_taken(&mut self, meta: SnapshotMeta) {
        let index = meta.position.index;
        // One that was begun earlier is of use only by chance.
        if self.catch_up.wanted_at.take_if(|wanted_at| *wanted_at <= index).is_some() {
            self.catch_up.index = Some(index);
        }
        if index >= self.node.store().snapshot_index() {
            self.node.mut_store().set_snapshot(meta);
        }
        self.judge_snapshot();
    }

    /// Whether a snapshot for a follower was lost since this was last asked: more was written since it was
    /// begun than is kept in memory. Somebody has to know: it may happen again and again.
    pub fn take_lost_snapshot(&mut self) -> bool {
        std::mem::take(&mut self.catch_up.untold)
    }

    /// Notes from when on a snapshot is one for those who want it.
    pub(super) fn note_wanted_snapshot(&mut self) {
        if self.snapshot_wanted() {
            self.catch_up.wanted_at.get_or_insert(self.applied.index);
        }
    }

    /// Bytes of entries that are kept for followers that are behind.
    pub(super) fn lagging_bytes(&mut self) -> usize {
        self.catch_up.is_granted |= self.is_snapshot_under_way();
        let lagging = self.tail_bytes.saturating_mul(LAGGING_TAILS);
        if !self.catch_up.is_granted {
            return lagging;
        }
        let share = usize::try_from(self.table.memory_bytes() / SNAPSHOT_SHARE);
        let most = self.tail_bytes.saturating_mul(SNAPSHOT_TAILS);
        share.unwrap_or(usize::MAX).clamp(lagging, most)
    }

    /// Whether a snapshot that is still of use is being sent, or has to be taken first.
    fn is_snapshot_under_way(&self) -> bool {
        let dropped = self.node.store().truncated_index();
        let mut followers = self.active_followers();
        self.snapshot_wanted()
            || followers
                .any(|one| one.state == ProgressState::Snapshot && one.pending_snapshot >= dropped)
    }

    /// Notes that another replica is heard of.
    pub(super) fn note_heard(&mut self, from: u64) {
        let ticks = self.ticks;
        match self.heard_at.iter_mut().find(|(id, _)| *id == from) {
            Some((_, at)) => *at = ticks,
            None => {
                let raft = &self.node.raft;
                self.heard_at.retain(|(id, _)| raft.prs().get(*id).is_some());
                self.heard_at.push((from, ticks));
            }
        }
    }

    /// Those that answer; none where this replica does not lead. Raft's own note of it is of no use here: it
    /// is taken back with each check of the quorum, until the next answer.
    pub(super) fn active_followers(&self) -> impl Iterator<Item = &raft::Progress> {
        let raft = &self.node.raft;
        let leads = raft.state == StateRole::Leader;
        let since = self.ticks.saturating_sub(2 * self.election.election_ticks() as u64);
        let answers =
            move |id: u64| self.heard_at.iter().any(|(one, at)| *one == id && *at >= since);
        let others = raft.prs().iter().filter(move |(id, _)| leads && **id != self.id);
        others.filter(move |(id, _)| answers(**id)).map(|(_, one)| one)
    }

    /// Sees whether the snapshot under way has served its purpose, or cannot any more.
    pub(super) fn judge_snapshot(&mut self) {
        let store = self.node.store();
        let dropped = store.truncated_index();
        let few = store.bytes() <= self.tail_bytes.saturating_mul(LAGGING_TAILS);
        if let Some(index) = self.catch_up.index {
            let least = self.active_followers().map(|one| one.matched).min().unwrap_or(u64::MAX);
            if index < dropped && least < dropped {
                let pause = PAUSE_TICKS << self.catch_up.lost.min(16);
                self.catch_up = CatchUp {
                    lost: self.catch_up.lost + 1,
                    not_before: self.ticks + pause.min(LONGEST_PAUSE_TICKS),
                    untold: true,
                    ..CatchUp::default()
                };
            } else if few && least >= index {
                (self.catch_up.index, self.catch_up.lost) = (None, 0);
            }
        }
        if few && !self.is_snapshot_under_way() {
            self.catch_up.is_granted = false;
        }
    }
}
