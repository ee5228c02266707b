//! One replica of one partition: Raft around the store, without I/O.
//!
//! The owner feeds it commands and time, writes what `ready` hands out to the log, tells it when that
//! is persisted, and delivers the replies that come back. One turn of the owner:
//!
//! ```text
//! execute, execute, …   evaluate against the table and what is in flight; effects gather in a batch
//! propose               the batch becomes one Raft entry
//! ready -> Ready        records for the log, messages for peers
//! persisted             what `ready` gave has reached the disk as far as the policy asks
//! ready -> replies      committed entries are applied to the table, their commands answered
//! ```
//!
//! Here are the type, its beginning and the turn; commands until they are proposed are in `batches`, and
//! entries from when they are committed in `committed`. It does not know which connection asks (`W` is the
//! owner's), nor how records are stored.

mod batches;
mod catch_up;
mod committed;
mod entries;
mod expiry;
mod fresh;
mod group;
mod history;
mod lease;
mod members;
mod messages;
mod recovery;
mod sleep;
mod view;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::HardState;
pub use raft::eraftpb::{Entry, Message, MessageType};
use raft::{RawNode, StateRole};

pub use entries::Position;
pub use fresh::Stamps;
pub use group::{Change, Progress, Role, Status};
pub use history::History;
pub use members::Members;
pub use messages::{decode_message, encode_message};
pub use recovery::{Recovery, SnapshotMeta, StateRecord};
pub use sleep::Signal;
pub use view::View;

use crate::draft::InFlight;
use crate::effect::EffectError;
use crate::feed::Committed;
use crate::session::Sessions;
use crate::store::{Memory, Table};
use crate::wheel::Wheel;
use crate::{Cursor, Error, Once, PartitionId, Reply, Revision, Trace, UnixMillis};
use batches::refused;
use catch_up::CatchUp;
use entries::Entries;
use fresh::Freshness;
use lease::Rounds;
use messages::Election;
use sleep::Sleep;

/// Replies that may wait for a proof of leadership.
const MAX_WAITING_READS: usize = 65_536;

/// Ticks that another replica has to take over. Nothing is proposed meanwhile.
const TRANSFER_TICKS: u64 = 4;

/// Entries for followers that are behind are kept in memory up to so many times `tail_bytes`.
const LAGGING_TAILS: usize = 8;

/// What a replica is told when it starts.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The partition it is a replica of.
    pub partition: PartitionId,
    /// This replica's Raft id, not 0.
    pub id: u64,
    /// The period of `tick`, in microseconds.
    pub tick_us: u64,
    /// Ticks between two heartbeats.
    pub heartbeat_ticks: usize,
    /// Ticks without a leader until an election, at least; up to half as many more are added.
    pub election_ticks: usize,
    /// By how much of its speed any clock may be wrong, in percent: leases are shortened by it.
    pub drift_percent: u8,
    /// How many bytes of applied entries stay in memory for followers.
    pub tail_bytes: usize,
    /// Whether batches always hold the versions that their keys had before, for readers of changes. Otherwise
    /// they do while this replica captures what it commits.
    pub previous_versions: bool,
    /// Whether batches also hold the values that their keys had before.
    pub include_previous: bool,
    /// Makes election timeouts differ, and repeatable.
    pub seed: u64,
}

/// The time, as the owner's clocks have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The wall clock: what is expired.
    pub ms: UnixMillis,
    /// The monotonic clock, in microseconds from any beginning, never 0: who leads.
    pub us: u64,
}

/// A log or an apply that no correct replica can produce.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Entries are missing.
    #[error("the log goes on with entry {found} where {expected} is due")]
    Hole {
        /// The index that is due.
        expected: u64,
        /// The index that came.
        found: u64,
    },
    /// The log goes on from a snapshot that is not there.
    #[error("the log goes on from a snapshot at entry {start}, and the newest there is at {found}")]
    NoSnapshot {
        /// The index of the snapshot.
        start: u64,
        /// The index reached without it.
        found: u64,
    },
    /// An entry of a kind that this version does not know.
    #[error("unknown entry type {0}")]
    EntryType(u8),
    /// An entry's effects do not decode or do not continue the history.
    #[error("entry {} of term {} cannot be applied", position.index, position.term)]
    Effects {
        /// The entry.
        position: Position,
        /// What is wrong with its payload.
        #[source]
        error: EffectError,
    },
    /// A change of the group's members that does not decode.
    #[error("entry {index} is no change of members")]
    Change {
        /// The entry.
        index: u64,
    },
    /// Raft refused its state.
    #[error("the consensus state is unusable")]
    Raft(#[source] raft::Error),
}

/// What to write and send. Entries replace what stands at their indexes.
#[derive(Debug)]
pub struct Ready {
    /// Give this to `persisted` when the entries and the state are on disk.
    pub number: u64,
    /// Term and vote, when they changed, and whether the log starts anew; always to be synced, and to be
    /// written before the entries.
    pub state: Option<StateRecord>,
    /// Entries to append, each with the commit index known now.
    pub entries: Vec<Entry>,
    /// Goes with each entry into the log, so that recovery need not wait for an election.
    pub commit: u64,
    /// May be sent at once.
    pub messages: Vec<Message>,
    /// May be sent only when `number` is persisted.
    pub persisted_messages: Vec<Message>,
}

/// What a command comes with, besides what it asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meta<'a> {
    /// Which write of which client it is, if it may be sent again.
    pub once: Option<&'a Once>,
    /// Where it comes from, if the client said so: for readers of changes.
    pub trace: Option<&'a Trace>,
}

/// The replies of commands whose batch has been decided.
pub type Replies<W> = Vec<(W, Reply)>;

/// A replica. `W` says whom a reply is for.
pub struct Replica<W> {
    partition: PartitionId,
    id: u64,
    node: RawNode<Entries>,
    table: Arc<Table>,
    memory: Arc<Memory>,
    view: Arc<View>,
    /// The time when the owner last told it.
    now: Now,
    /// It leads, and has applied an entry of its own term: only then does its table hold all that earlier
    /// leaders acknowledged.
    leads: bool,
    rounds: Rounds<W>,
    fresh: Freshness,
    sleep: Sleep,
    election: Election,
    in_flight: InFlight,
    /// Commands of the open batch, with the replies they get when it is committed.
    open: Replies<W>,
    /// Commands of proposed batches.
    proposed: VecDeque<Proposed<W>>,
    /// Replies that were decided between two calls of `ready`.
    decided: Replies<W>,
    /// Bytes of values in the replies that wait, at most.
    waiting_bytes: usize,
    wheel: Wheel,
    /// Timers that `expire` works on; kept for its capacity.
    due: Vec<crate::store::Position>,
    applied: Position,
    revision: Revision,
    sessions: Sessions,
    /// The epoch of the newest placement map that a change of the group has followed.
    epoch: u64,
    /// How far changes have been passed on, as of the entries applied.
    cursor: Cursor,
    /// Whether `captured` is filled.
    captures: bool,
    /// Committed entries with effects that the owner has not taken.
    captured: Vec<Committed>,
    tail_bytes: usize,
    previous_versions: bool,
    include_previous: bool,
    ticks: u64,
    /// Where the log starts, as the state records have it.
    start: u64,
    /// A snapshot that was received, until Raft has decided whether it is of use.
    received: Option<(SnapshotMeta, Table)>,
    /// The tick at which another replica was last asked to take over.
    transfer_tick: u64,
    /// The tick at which that last put off Raft's check for a quorum.
    put_off_tick: u64,
    /// The `Ready` that makes a received snapshot count; nothing else happens before it is persisted.
    restoring: Option<u64>,
    /// The next write must begin with the state: it makes entries void that lie in the log.
    owes_state: bool,
    /// The last entry that there was when this replica, leading, applied that others had left; else 0. See
    /// `is_confirmed`.
    left_at: u64,
    catch_up: CatchUp,
    /// The tick at which another replica was last heard of.
    heard_at: Vec<(u64, u64)>,
}

struct Proposed<W> {
    position: Position,
    replies: Replies<W>,
    tick: u64,
}

fn raft_config(config: &ReplicaConfig, applied: u64, jitter_ticks: usize) -> raft::Config {
    raft::Config {
        id: config.id,
        applied,
        election_tick: config.election_ticks,
        // Heartbeats go out with our own rounds; see `lease`.
        heartbeat_tick: config.election_ticks - 1,
        min_election_tick: config.election_ticks,
        max_election_tick: config.election_ticks + jitter_ticks + 2,
        check_quorum: true,
        pre_vote: true,
        skip_bcast_commit: true,
        max_inflight_msgs: 256,
        max_size_per_msg: 1 << 20,
        ..raft::Config::default()
    }
}

impl<W> Replica<W> {
    /// A replica that goes on from what recovery found. It keeps `view` up to date for any thread. A group
    /// of one voter leads itself at once: the first `ready` has its term and the entry that opens it.
    ///
    /// # Errors
    ///
    /// `Broken::Raft` if the recovered state is none that Raft can go on from.
    pub fn new(
        config: &ReplicaConfig,
        mut recovery: Recovery,
        memory: Arc<Memory>,
        view: Arc<View>,
        now: Now,
    ) -> Result<Replica<W>, Broken> {
        let (table, applied, revision) =
            (Arc::clone(&recovery.table), recovery.applied, recovery.revision);
        let (replica, has_history) = (recovery.replica(), recovery.has_history);
        let sessions = std::mem::take(&mut recovery.sessions);
        let (epoch, cursor, owes_state) = (recovery.epoch, recovery.cursor, recovery.owes_state);
        let (entries, start) = recovery.into_entries();
        let alone = entries.members().is_alone(config.id);
        let election = Election::new(config, has_history && !alone);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft = raft_config(config, applied.index, election.jitter_ticks());
        let mut node = RawNode::new(&raft, entries, &logger).map_err(Broken::Raft)?;
        if alone {
            node.campaign().map_err(Broken::Raft)?;
        }
        let mut replica = Replica {
            partition: config.partition,
            id: config.id,
            node,
            table,
            memory,
            view,
            now,
            leads: false,
            rounds: Rounds::new(config),
            fresh: Freshness::default(),
            sleep: Sleep::default(),
            election,
            in_flight: InFlight::new(revision),
            open: Vec::new(),
            proposed: VecDeque::new(),
            decided: Vec::new(),
            waiting_bytes: 0,
            wheel: Wheel::new(now.ms),
            due: Vec::new(),
            applied,
            revision,
            sessions,
            epoch,
            cursor,
            captures: false,
            captured: Vec::new(),
            tail_bytes: config.tail_bytes,
            previous_versions: config.previous_versions,
            include_previous: config.include_previous,
            ticks: 0,
            // A replica that has not written its id yet does so with its first state.
            start: if replica == config.id { start } else { applied.index },
            received: None,
            transfer_tick: 0,
            put_off_tick: 0,
            restoring: None,
            owes_state,
            left_at: 0,
            catch_up: CatchUp::default(),
            heard_at: Vec::new(),
        };
        replica.rebuild_wheel(now.ms);
        replica.rank_anew();
        replica.settle();
        Ok(replica)
    }

    /// One tick of Raft's clock, every `tick_us` of the configuration. False if nothing came of it, because
    /// the replica sleeps.
    pub fn tick(&mut self, now: Now) -> bool {
        self.now = now;
        self.ticks += 1;
        if self.tick_sleep() {
            return false;
        }
        if self.restoring.is_some() {
            return true;
        }
        self.tick_election();
        let raft = &mut self.node.raft;
        if raft.lead_transferee.is_some() && self.ticks > self.transfer_tick + TRANSFER_TICKS {
            // It may still take over; until then this one goes on, without a lease.
            raft.abort_leader_transfer();
        }
        let leads = self.node.raft.state == StateRole::Leader;
        if leads && !self.is_alone() && self.ticks.is_multiple_of(self.election.heartbeat_ticks) {
            self.begin_round();
        }
        self.give_up_overdue();
        self.prune_wheel(now.ms);
        self.settle();
        true
    }

    /// Takes what Raft wants written and sent, and applies what is committed. Call it until it has
    /// nothing; every `Ready` must be written before the next one.
    ///
    /// # Errors
    ///
    /// `Broken::Effects` if a committed entry cannot be applied.
    pub fn ready(&mut self, replies: &mut Replies<W>) -> Result<Option<Ready>, Broken> {
        if self.rounds.is_asked_for() {
            self.begin_round();
        }
        while self.node.has_ready() {
            let out = self.next_ready(replies)?;
            let idle = out.entries.is_empty()
                && out.state.is_none()
                && out.messages.is_empty()
                && out.persisted_messages.is_empty();
            // Nothing to write: a later number covers this one. Reporting it persisted here would
            // also report those before it, whose sync may be under way.
            if !idle {
                self.settle();
                return Ok(Some(out));
            }
        }
        self.settle();
        self.release_confirmed(replies);
        replies.append(&mut self.decided);
        Ok(None)
    }

    fn next_ready(&mut self, replies: &mut Replies<W>) -> Result<Ready, Broken> {
        let mut ready = self.node.ready();
        let restored = !ready.snapshot().is_empty();
        if restored {
            self.restore(ready.number());
        }
        for entry in ready.take_committed_entries() {
            self.apply(entry, replies)?;
        }
        for state in ready.take_read_states() {
            self.confirm(&state.request_ctx);
        }
        let entries = ready.take_entries();
        if let Some(hard_state) = ready.hs() {
            self.node.mut_store().set_hard_state(hard_state.clone());
        }
        let owed = std::mem::take(&mut self.owes_state);
        // A new commit index alone is not worth a record: it travels with the next entry.
        let changed = ready.hs().filter(|_| ready.must_sync()).cloned();
        let state =
            (changed.is_some() || restored || owed).then(|| self.state_record(changed.as_ref()));
        self.node.mut_store().append(entries.clone());
        let out = Ready {
            number: ready.number(),
            state,
            entries,
            commit: self.node.raft.raft_log.committed,
            messages: ready.take_messages(),
            persisted_messages: ready.take_persisted_messages(),
        };
        self.node.advance_append_async(ready);
        // A snapshot counts as applied for Raft only when it is persisted.
        let applied = self.applied.index.min(self.node.raft.raft_log.persisted);
        if applied > self.node.raft.raft_log.applied {
            self.node.advance_apply_to(applied);
        }
        self.truncate_entries();
        Ok(out)
    }

    fn state_record(&self, hard_state: Option<&HardState>) -> StateRecord {
        let raft = &self.node.raft;
        let (term, vote) =
            hard_state.map_or((raft.term, raft.vote), |state| (state.term, state.vote));
        StateRecord { replica: self.id, start: self.start, term, vote }
    }

    /// The record with which this replica's log begins: to be written and synced, with the snapshot that
    /// it starts from, before anything else of it.
    pub fn first_record(&self) -> StateRecord {
        self.state_record(None)
    }

    /// What `Ready` number `number` and those before it asked to write is on disk. Whether that was what a
    /// snapshot that came needed, which is visible from now on.
    pub fn persisted(&mut self, number: u64) -> bool {
        self.node.on_persist_ready(number);
        let is_restored = self.restoring.is_some_and(|restoring| restoring <= number);
        if is_restored {
            self.restoring = None;
            let applied = self.applied.index.min(self.node.raft.raft_log.persisted);
            if applied > self.node.raft.raft_log.applied {
                self.node.advance_apply_to(applied);
            }
            self.settle();
        }
        is_restored
    }

    /// Whether a snapshot is in the place of what was here, and the log does not say so yet: what the log holds
    /// may be no part of it.
    pub fn is_restoring(&self) -> bool {
        self.restoring.is_some()
    }

    /// Follows Raft in who leads, after anything that may have changed it: what a deposed leader was
    /// about to propose or to answer is refused.
    fn settle(&mut self) {
        self.draw_timeout();
        let is_leader = self.node.raft.state == StateRole::Leader;
        let leads = is_leader && self.applied.term == self.node.raft.term;
        if self.leads && !leads {
            self.in_flight.discard_open(&self.table);
            let waiting = std::mem::take(&mut self.open);
            self.decided.extend(refused(waiting, &Error::NotLeader));
            self.decided.extend(self.rounds.stop());
            // Followers that it asked to sleep must not believe that it still leads.
            self.stir();
        }
        self.leads = leads;
        if !is_leader {
            self.left_at = 0;
        }
        self.note_wanted_snapshot();
        let lease_until_us = match leads {
            true if self.is_alone() => u64::MAX,
            true => self.rounds.lease_until_us,
            false => 0,
        };
        // Whoever sees the revision sees the entry that holds it, and what is said of it goes after it. And who
        // reads the log back takes what it has up to there for committed.
        if self.restoring.is_none() {
            self.view.set_applied(self.applied.index);
            self.view.set_revision(self.revision);
        }
        self.view.set_lease(lease_until_us);
        self.view.set_leader(self.node.raft.leader_id);
        if leads && self.has_lease() {
            self.view.set_fresh(self.now.us);
        } else if self.restoring.is_none()
            && let Some(since_us) = self.fresh.since(self.applied.index)
        {
            self.view.set_fresh(since_us);
        }
    }

    /// The partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
    }

    /// This replica's id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The table, readable from any thread.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// The newest revision in the table.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.node.raft.term
    }

    /// The newest entry in the table.
    pub fn applied(&self) -> Position {
        self.applied
    }

    /// How far changes have been passed on, as of the entries in the table.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Whether it leads and its table holds all that was acknowledged.
    pub fn leads(&self) -> bool {
        self.leads
    }

    /// What a snapshot taken of the table now stands for.
    pub fn snapshot_meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            position: self.applied,
            revision: self.revision,
            members: self.node.store().members().clone(),
            epoch: self.epoch,
            cursor: self.cursor,
            sessions: if self.sessions.is_empty() { Vec::new() } else { self.sessions.encode() },
        }
    }
}
