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
//! It does not know which connection asks (`W` is the owner's), nor how records are stored.

mod entries;
mod expiry;
mod recovery;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use raft::eraftpb::{Entry, EntryType, HardState, Message};
use raft::{RawNode, StateRole};

pub use entries::Position;
pub use recovery::{Recovery, SnapshotMeta};

use crate::draft::{Draft, InFlight, apply};
use crate::effect::{Effect, EffectError, Effects};
use crate::evaluate::evaluate;
use crate::store::{Memory, Table};
use crate::wheel::Wheel;
use crate::{Command, Error, MAX_REPLY_BYTES, PartitionId, Reply, Revision, UnixMillis};
use entries::Entries;

/// A batch of a few usual writes.
const SMALL_BATCH_BYTES: usize = 2048;

/// What a replica is told when it starts.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The partition it is a replica of.
    pub partition: PartitionId,
    /// This replica's Raft id, not 0.
    pub id: u64,
    /// The group's voters when the partition is new.
    pub voters: Vec<u64>,
    /// Ticks without a leader until an election.
    pub election_ticks: usize,
    /// How many bytes of applied entries stay in memory for followers.
    pub tail_bytes: usize,
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
    /// Raft refused its state.
    #[error("the consensus state is unusable")]
    Raft(#[source] raft::Error),
}

/// What to write and send. Entries replace what stands at their indexes.
#[derive(Debug)]
pub struct Ready {
    /// Give this to `persisted` when the entries and the state are on disk.
    pub number: u64,
    /// Term and vote, when they changed; always to be synced.
    pub state: Option<HardState>,
    /// Entries to append, each with the commit index known now.
    pub entries: Vec<Entry>,
    /// Goes with each entry into the log, so that recovery need not wait for an election.
    pub commit: u64,
    /// May be sent at once.
    pub messages: Vec<Message>,
    /// May be sent only when `number` is persisted.
    pub persisted_messages: Vec<Message>,
}

/// The replies of commands whose batch has been decided.
pub type Replies<W> = Vec<(W, Reply)>;

/// A replica. `W` says whom a reply is for.
pub struct Replica<W> {
    partition: PartitionId,
    node: RawNode<Entries>,
    table: Arc<Table>,
    memory: Arc<Memory>,
    serving: Arc<AtomicBool>,
    in_flight: InFlight,
    /// Commands of the open batch, with the replies they get when it is committed.
    open: Replies<W>,
    /// Commands of proposed batches.
    proposed: VecDeque<Proposed<W>>,
    /// Bytes of values in the replies that wait, at most.
    waiting_bytes: usize,
    wheel: Wheel,
    /// Timers that `expire` works on; kept for its capacity.
    due: Vec<crate::store::Position>,
    applied: Position,
    revision: Revision,
    tail_bytes: usize,
}

struct Proposed<W> {
    position: Position,
    replies: Replies<W>,
}

impl<W> Replica<W> {
    /// A replica that goes on from what recovery found. It keeps `serving` true while the table may
    /// answer linearizable reads, from any thread. A group of one voter leads itself at once:
    /// the first `ready` has its term and the entry that opens it.
    ///
    /// # Errors
    ///
    /// `Broken::Raft` if the recovered state is none that Raft can go on from.
    pub fn new(
        config: &ReplicaConfig,
        recovery: Recovery,
        memory: Arc<Memory>,
        serving: Arc<AtomicBool>,
        now_ms: UnixMillis,
    ) -> Result<Replica<W>, Broken> {
        let (table, applied, revision) =
            (Arc::clone(&recovery.table), recovery.applied, recovery.revision);
        let entries = recovery.into_entries();
        let alone = entries.voters() == [config.id];
        let raft_config = raft::Config {
            id: config.id,
            applied: applied.index,
            election_tick: config.election_ticks,
            heartbeat_tick: 1,
            // One apart: `raft` has no room to draw a timeout from ambient randomness.
            min_election_tick: config.election_ticks,
            max_election_tick: config.election_ticks + 1,
            check_quorum: true,
            pre_vote: true,
            max_inflight_msgs: 256,
            max_size_per_msg: 1 << 20,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut node = RawNode::new(&raft_config, entries, &logger).map_err(Broken::Raft)?;
        if alone {
            node.campaign().map_err(Broken::Raft)?;
        }
        let mut replica = Replica {
            partition: config.partition,
            node,
            table,
            memory,
            serving,
            in_flight: InFlight::new(revision),
            open: Vec::new(),
            proposed: VecDeque::new(),
            waiting_bytes: 0,
            wheel: Wheel::new(now_ms),
            due: Vec::new(),
            applied,
            revision,
            tail_bytes: config.tail_bytes,
        };
        replica.rebuild_wheel(now_ms);
        Ok(replica)
    }

    /// Evaluates a command. A reply that depends on nothing in flight comes back at once; any other
    /// is delivered by `ready` when the batch that it depends on has been applied.
    pub fn execute(
        &mut self,
        now_ms: UnixMillis,
        command: &Command<&[u8]>,
        waiter: W,
    ) -> Option<(W, Reply)> {
        if !self.serving.load(Ordering::Relaxed) {
            return Some((waiter, Reply::Error(Error::NotLeader)));
        }
        let mut draft = Draft::new(&self.table, &mut self.in_flight, &self.memory, now_ms);
        let reply = evaluate(&mut draft, command);
        if self.in_flight.is_empty() {
            return Some((waiter, reply));
        }
        if self.open.is_empty() && self.proposed.is_empty() {
            self.waiting_bytes = 0;
        }
        // Reads of large values wait here for what they read from: that must not fill the memory.
        let waiting_bytes = self.waiting_bytes + reply.value_bytes();
        if waiting_bytes > MAX_REPLY_BYTES && !command.is_write() {
            return Some((waiter, Reply::Error(Error::Overloaded)));
        }
        self.waiting_bytes = waiting_bytes;
        self.open.push((waiter, reply));
        None
    }

    /// Whether commands wait for `propose`.
    pub fn has_open_batch(&self) -> bool {
        !self.open.is_empty() || self.in_flight.open_bytes() > 0
    }

    /// The size of the batch that `propose` would propose.
    pub fn open_bytes(&self) -> usize {
        self.in_flight.open_bytes()
    }

    /// The size of all that is evaluated and not yet applied.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight.bytes()
    }

    /// Appends where the keys of the open batch are in the table, if the batch is small: for the owner
    /// to look up those of all its replicas together. A large batch does so by itself.
    pub fn open_positions(&self, positions: &mut Vec<crate::store::Position>) {
        if self.in_flight.open_bytes() > SMALL_BATCH_BYTES {
            return;
        }
        let Ok(effects) = Effects::new(self.in_flight.open_payload()) else { return };
        positions.extend(effects.flatten().map(|(_, one)| self.table.hash(one.key()).position()));
    }

    /// Makes the open batch one entry of the log. Commands without effects wait for the newest
    /// proposal that they may have read from.
    pub fn propose(&mut self, replies: &mut Replies<W>) {
        let waiting = std::mem::take(&mut self.open);
        let Some(batch) = self.in_flight.close() else {
            match self.proposed.back_mut() {
                Some(last) => last.replies.extend(waiting),
                None => replies.extend(waiting),
            }
            return;
        };
        let term = self.node.raft.term;
        match self.node.propose(Vec::new(), batch.payload.to_vec()) {
            Ok(()) => {
                let index = self.node.raft.raft_log.last_index();
                let position = Position { index, term };
                self.proposed.push_back(Proposed { position, replies: waiting });
            }
            // Not a leader any more: this batch was not appended, and the entry that comes in its
            // place, of a later term, voids it. Nothing new is evaluated on top of it.
            Err(_) => {
                self.serving.store(false, Ordering::Release);
                let index = self.node.raft.raft_log.last_index() + 1;
                let position = Position { index, term: self.applied.term };
                self.proposed.push_back(Proposed { position, replies: Vec::new() });
                replies.extend(refused(waiting, &Error::NotLeader));
            }
        }
    }

    /// Gives up the open batch, which was never proposed: its commands get `error`.
    pub fn refuse_open(&mut self, now_ms: UnixMillis, error: &Error, replies: &mut Replies<W>) {
        self.rearm_timers(now_ms);
        self.in_flight.discard_open(&self.table);
        replies.extend(refused(std::mem::take(&mut self.open), error));
    }

    /// Gives up everything in flight because the log failed: it may be on disk or not. The owner must
    /// call nothing but reads after this.
    pub fn abandon(&mut self, replies: &mut Replies<W>) {
        self.in_flight.discard_all();
        let proposed = self.proposed.drain(..).flat_map(|batch| batch.replies);
        let waiting = proposed.chain(std::mem::take(&mut self.open)).collect();
        replies.extend(refused(waiting, &Error::OutcomeUnknown));
    }

    /// One tick of Raft's clock.
    pub fn tick(&mut self) {
        self.node.tick();
    }

    /// Takes what Raft wants written and sent, and applies what is committed. Call it until it has
    /// nothing; every `Ready` must be written before the next one.
    ///
    /// # Errors
    ///
    /// `Broken::Effects` if a committed entry cannot be applied.
    pub fn ready(&mut self, replies: &mut Replies<W>) -> Result<Option<Ready>, Broken> {
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            for entry in ready.take_committed_entries() {
                self.apply(&entry, replies)?;
            }
            self.node.advance_apply_to(self.applied.index);
            let entries = ready.take_entries();
            // A new commit index alone is not worth a record: it travels with the next entry.
            let state = ready.hs().filter(|_| ready.must_sync()).cloned();
            if let Some(hard_state) = ready.hs() {
                self.node.mut_store().set_hard_state(hard_state.clone());
            }
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
            let applied = self.applied.index;
            self.node.mut_store().truncate(applied, self.tail_bytes);
            let idle = out.entries.is_empty()
                && out.state.is_none()
                && out.messages.is_empty()
                && out.persisted_messages.is_empty();
            // Nothing to write: a later number covers this one. Reporting it persisted here would
            // also report those before it, whose sync may be under way.
            if !idle {
                return Ok(Some(out));
            }
        }
        self.update_serving();
        Ok(None)
    }

    /// What `Ready` number `number` and those before it asked to write is on disk.
    pub fn persisted(&mut self, number: u64) {
        self.node.on_persist_ready(number);
    }

    fn apply(&mut self, entry: &Entry, replies: &mut Replies<W>) -> Result<(), Broken> {
        let position = Position { index: entry.index, term: entry.term };
        let proposed = self.proposed.front().map(|batch| batch.position);
        let own = proposed == Some(position);
        if !own && proposed.is_some_and(|proposed| proposed.index <= position.index) {
            // Another leader's entry took the place of ours: what we proposed is void.
            self.in_flight.discard_all();
            let void = self.proposed.drain(..).flat_map(|batch| batch.replies).collect();
            replies.extend(refused(void, &Error::NotLeader));
        }
        if entry.entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
            let wheel = &mut self.wheel;
            self.revision = apply(&self.table, self.revision, &entry.data, |_, hash, effect| {
                if let Effect::Put { expires_at_ms: Some(expires_at_ms), .. } = effect {
                    wheel.insert(*expires_at_ms, hash.position());
                }
            })
            .map_err(|error| Broken::Effects { position, error })?;
            self.in_flight.applied(self.revision);
        }
        self.applied = position;
        if own && let Some(batch) = self.proposed.pop_front() {
            replies.extend(batch.replies);
        }
        Ok(())
    }

    /// Serves while it leads and has applied an entry of its own term: only then does its table hold
    /// all that earlier leaders acknowledged.
    fn update_serving(&mut self) {
        let raft = &self.node.raft;
        let leads = raft.state == StateRole::Leader && self.applied.term == raft.term;
        if self.serving.load(Ordering::Relaxed) != leads {
            self.serving.store(leads, Ordering::Release);
        }
    }

    /// The partition.
    pub fn partition(&self) -> PartitionId {
        self.partition
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

    /// What a snapshot taken of the table now stands for.
    pub fn snapshot_meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            position: self.applied,
            revision: self.revision,
            voters: self.node.store().voters().to_vec(),
        }
    }
}

fn refused<W>(waiting: Replies<W>, error: &Error) -> impl Iterator<Item = (W, Reply)> {
    waiting.into_iter().map(move |(waiter, _)| (waiter, Reply::Error(error.clone())))
}
