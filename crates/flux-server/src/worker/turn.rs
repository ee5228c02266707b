//! A worker's turn: what gathered since the last one becomes one write to the log.
//!
//! With `fsync = always` one sync is under way at a time, and what is to be written meanwhile is written
//! just before the next one. A replica that is alone proposes nothing until then. One in a group proposes
//! a few batches at once, for the followers to have them, and gathers what comes behind. With the other
//! policies a batch is applied as soon as it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use flux_core::replica::{Message, Ready, Replica, StateRecord};
use flux_core::store::Position;
use flux_core::{Error, PartitionId};
use flux_log::{Entry, Log, LogError, Lsn, PreparedSegment, Record, State};

use super::LOG_INTERVAL;
use super::captured::Mark;
use super::dispatch::Dispatch;
use super::syncer::Syncer;
use crate::config::{Fsync, Settings};
use crate::mailbox::Waiter;
use crate::recovery::TICK;

/// Room that a batch needs in the log besides its payload: for each entry, and for the batch.
const RECORD_OVERHEAD: usize = 128;
/// With `fsync = everysec`.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// So many batches of a group may be under way while there is a sync; more gather.
const PROPOSALS_IN_SYNC: usize = 2;
/// A batch of this size is written though a sync is under way.
const WRITE_BYTES: usize = 1024 * 1024;
/// So much is left to be synced at the most, whatever the policy.
const SYNC_BYTES: u64 = 4 * 1024 * 1024;

/// What a replica asked to be written, and may send when it is persisted.
struct Written {
    partition: PartitionId,
    /// Its id: another one may have taken its place meanwhile.
    replica: u64,
    number: u64,
    messages: Vec<Message>,
}

pub(super) struct Turn {
    log: Log,
    syncer: Syncer,
    policy: Fsync,
    overload_wait: Duration,
    /// Set while a sync is under way.
    syncing_since: Option<Instant>,
    /// What the sync under way covers: partitions and the `Ready` numbers that it makes persistent.
    syncing: Vec<Written>,
    /// Written, and waiting for a sync to start.
    written: Vec<Written>,
    /// The partitions of these, and of `held`.
    pending: BTreeSet<PartitionId>,
    /// How many of those the log has written; the others are in its batch.
    in_file: usize,
    /// Partitions whose batches are still open because a sync is under way.
    gathering: Vec<PartitionId>,
    /// Set while the log holds a batch that does not fit on the disk: when that is tried again. Nothing is
    /// written before it, so the replicas here only do what needs no record.
    stuck: Option<Instant>,
    /// What waits for that batch: of each partition the last.
    held: BTreeMap<PartitionId, Written>,
    /// Written since the last sync, whoever waits for it.
    unsynced: bool,
    next_sync: Instant,
    /// What those who follow changes may rely on when the sync under way has ended.
    marks: Vec<Mark>,
    /// Of `touch`; kept for their capacity.
    positions: Vec<Position>,
    places: Vec<PartitionId>,
    /// The disk was full when room was last asked for.
    full: bool,
    next_warning: Instant,
}

impl Turn {
    pub(super) fn new(log: Log, syncer: Syncer, settings: &Settings, now: Instant) -> Turn {
        Turn {
            log,
            syncer,
            policy: settings.fsync,
            overload_wait: Duration::from_millis(settings.overload_wait_ms),
            syncing_since: None,
            syncing: Vec::new(),
            written: Vec::new(),
            in_file: 0,
            gathering: Vec::new(),
            pending: BTreeSet::new(),
            stuck: None,
            held: BTreeMap::new(),
            unsynced: false,
            next_sync: now + SYNC_INTERVAL,
            marks: Vec::new(),
            positions: Vec::new(),
            places: Vec::new(),
            full: false,
            next_warning: now,
        }
    }

    /// Proposes what has gathered, writes it, and applies what that commits.
    pub(super) fn take(&mut self, dispatch: &mut Dispatch, now: Instant) {
        if self.stuck.is_some_and(|due| now >= due) {
            self.finish_batch(dispatch, now);
        }
        if self.stuck.is_some() {
            self.hold_out(dispatch, now);
            return;
        }
        if dispatch.active().is_empty() {
            self.finish(Ok(()), dispatch, now);
            return;
        }
        let active = dispatch.take_active();
        let syncs = self.waits_for_sync();
        let may_propose =
            (!syncs || dispatch.cluster.is_some()) && self.make_room(&active, dispatch, now);
        if may_propose {
            self.touch(&active, dispatch, Replica::open_positions);
            for &partition in &active {
                // In a group the followers are to have the first batches meanwhile; what comes behind them
                // gathers, and costs them one entry.
                if let Some((replica, replies)) = dispatch.replica(partition)
                    && replica.has_open_batch()
                    && !(syncs && replica.proposals() >= PROPOSALS_IN_SYNC)
                {
                    replica.propose(replies);
                }
            }
        }
        // A log that has just failed gives nothing more to write.
        let result = match dispatch.refusing {
            Some(Error::LogFailed(_)) => Ok(()),
            _ => self.write(&active, dispatch),
        };
        for &partition in &active {
            let open = dispatch.replica(partition).is_some_and(|(one, _)| one.has_open_batch());
            if open && syncs {
                self.gathering.push(partition);
            } else if open {
                dispatch.activate(partition);
            }
        }
        dispatch.recount(&active);
        dispatch.recycle(active);
        self.finish(result, dispatch, now);
    }

    /// Ends a turn: what was written is synced, if it is time.
    fn finish(&mut self, result: Result<(), LogError>, dispatch: &mut Dispatch, now: Instant) {
        match result.and_then(|()| self.sync_if_due(dispatch, now)) {
            Ok(()) => self.prepare_segment(),
            Err(LogError::Full { .. }) if dispatch.cluster.is_some() => {
                self.get_stuck(dispatch, now);
            }
            Err(error) => self.fail(&error, dispatch),
        }
        dispatch.watch_load(self.waited_too_long(now));
    }

    /// The batch does not fit on the disk. It is written when there is space; until then the groups go on
    /// without this node.
    fn get_stuck(&mut self, dispatch: &mut Dispatch, now: Instant) {
        self.stuck = Some(now);
        self.warn_of_full_disk(now);
        // Writes of its own it refuses at once, and who has come before is told in the next turn.
        dispatch.refusing = Some(Error::DiskFull);
        dispatch.activate_all();
    }

    /// Writes the batch that did not fit on the disk, if it does now.
    fn finish_batch(&mut self, dispatch: &mut Dispatch, now: Instant) {
        let reserved = self.log.reserve(self.log.batch_bytes());
        match reserved.and_then(|()| self.log.write()) {
            Ok(_) => {
                self.stuck = None;
                self.unsynced = true;
                self.written.extend(std::mem::take(&mut self.held).into_values());
                self.in_file = self.written.len();
                dispatch.refusing = None;
                dispatch.activate_all();
                tracing::info!("the disk has space again: this node takes part again");
            }
            Err(LogError::Full { .. }) => {
                self.stuck = Some(now + TICK);
                self.warn_of_full_disk(now);
                dispatch.hand_all_over();
                dispatch.give_up_outcomes();
            }
            Err(error) => self.fail(&error, dispatch),
        }
    }

    /// The turn of a node that can write nothing: what needs no record goes on, and nobody waits for what
    /// does.
    fn hold_out(&mut self, dispatch: &mut Dispatch, now: Instant) {
        dispatch.incoming_bytes = 0;
        let active = dispatch.take_active();
        refuse_open(&active, &Error::DiskFull, dispatch);
        let taken = self.take_all_ready(&active, dispatch);
        dispatch.recount(&active);
        dispatch.recycle(active);
        let synced = match taken {
            // Of what was written before, all can be synced.
            Ok(_) => self.sync_if_due(dispatch, now),
            Err(error) => Err(error),
        };
        if let Err(error) = synced {
            self.fail(&error, dispatch);
        }
        dispatch.watch_load(self.waited_too_long(now));
    }

    fn warn_of_full_disk(&mut self, now: Instant) {
        if now >= self.next_warning {
            self.next_warning = now + LOG_INTERVAL;
            tracing::error!("the disk is full: writes are refused until there is space");
        }
    }

    /// Whether what comes in gathers until the sync that is under way has ended.
    fn waits_for_sync(&self) -> bool {
        self.policy == Fsync::Always && self.syncing_since.is_some()
    }

    /// Loads what small batches will need of their tables, those that are proposed next or applied next: alone
    /// each of them waits for a few cache misses, together they wait once.
    fn touch(
        &mut self,
        active: &[PartitionId],
        dispatch: &mut Dispatch,
        positions: fn(&Replica<Waiter>, &mut Vec<Position>),
    ) {
        for &partition in active {
            let Some((replica, _)) = dispatch.replica(partition) else { continue };
            positions(replica, &mut self.positions);
            self.places.resize(self.positions.len(), partition);
        }
        let views = &dispatch.shared().views;
        let table = |partition: &PartitionId| &*views[usize::from(partition.0)].table;
        let keys = self.places.iter().map(table).zip(self.positions.iter().copied());
        std::hint::black_box(flux_core::store::touch(keys));
        self.positions.clear();
        self.places.clear();
    }

    /// Makes sure that the open batches fit on the disk. Where they do not, they are refused.
    fn make_room(&mut self, active: &[PartitionId], dispatch: &mut Dispatch, now: Instant) -> bool {
        let open = |partition: &PartitionId| {
            let replica = dispatch.replica(*partition).map(|(replica, _)| replica);
            let open = replica.filter(|replica| replica.has_open_batch());
            open.map_or(0, |replica| replica.open_bytes() + RECORD_OVERHEAD)
        };
        let open: usize = active.iter().map(open).sum();
        let incoming = std::mem::take(&mut dispatch.incoming_bytes);
        let bytes = self.log.batch_bytes() + RECORD_OVERHEAD + open + incoming;
        let error = match self.log.reserve(bytes) {
            Ok(()) => {
                if std::mem::take(&mut self.full) {
                    tracing::info!("the disk has space again: writes are accepted");
                }
                return true;
            }
            Err(LogError::Full { .. }) => Error::DiskFull,
            Err(error) => {
                self.fail(&error, dispatch);
                return false;
            }
        };
        self.full = true;
        self.warn_of_full_disk(now);
        dispatch.hand_all_over();
        refuse_open(active, &error, dispatch);
        false
    }

    /// Writes what the replicas ask for until they ask for nothing more, and sends what may be sent.
    fn write(&mut self, active: &[PartitionId], dispatch: &mut Dispatch) -> Result<(), LogError> {
        loop {
            self.touch(active, dispatch, Replica::next_positions);
            let first = self.written.len();
            let must_sync = self.take_all_ready(active, dispatch)? || self.policy == Fsync::Always;
            if self.written.len() == first {
                return Ok(());
            }
            // What the next sync covers is written just before it: the kernel has a page at a time.
            if self.waits_for_sync() && self.log.batch_bytes() < WRITE_BYTES {
                return Ok(());
            }
            self.write_batch(dispatch)?;
            // Numbers are persisted in order: not before one that waits for a sync.
            if must_sync || first > 0 || !self.syncing.is_empty() {
                return Ok(());
            }
            self.pending.clear();
            self.in_file = 0;
            for written in std::mem::take(&mut self.written) {
                persisted(dispatch, written);
            }
        }
    }

    fn write_batch(&mut self, dispatch: &Dispatch) -> Result<(), LogError> {
        let bytes = self.log.batch_bytes() as u64;
        if bytes == 0 {
            return Ok(());
        }
        if let Err(error) = self.log.write() {
            // What waits for this batch must not be taken for synced with what was written before.
            let late = self.written.split_off(self.in_file);
            self.held.extend(late.into_iter().map(|written| (written.partition, written)));
            return Err(error);
        }
        self.in_file = self.written.len();
        self.unsynced = true;
        let stats = &dispatch.shared().stats;
        stats.log_batches.add(1);
        stats.log_bytes.add(bytes);
        Ok(())
    }

    /// Appends what replicas want written, until they want nothing more. Whether a state was among it, which
    /// has to be synced whatever the policy.
    fn take_all_ready(
        &mut self,
        active: &[PartitionId],
        dispatch: &mut Dispatch,
    ) -> Result<bool, LogError> {
        let mut must_sync = false;
        for &partition in active {
            while let Some((replica, ready)) = next_ready(dispatch, partition) {
                must_sync |= ready.state.is_some();
                self.take_ready(dispatch, partition, replica, ready)?;
            }
            dispatch.pass_on_changes(partition);
        }
        Ok(must_sync)
    }

    /// Appends what a replica wants written. What it wants sent goes out now, or when that is persisted.
    fn take_ready(
        &mut self,
        dispatch: &mut Dispatch,
        partition: PartitionId,
        replica: u64,
        ready: Ready,
    ) -> Result<(), LogError> {
        append(&mut self.log, partition, &ready)?;
        let Ready { number, state, entries, messages, persisted_messages, .. } = ready;
        dispatch.send(partition, messages);
        let nothing = state.is_none() && entries.is_empty();
        let written = Written { partition, replica, number, messages: persisted_messages };
        // In their order: not before one that waits.
        if nothing && !self.pending.contains(&partition) {
            persisted(dispatch, written);
            return Ok(());
        }
        self.await_sync(written);
        Ok(())
    }

    /// Its records are in the log's batch.
    fn await_sync(&mut self, written: Written) {
        self.pending.insert(written.partition);
        if self.stuck.is_some() {
            // It may be long until then: Raft does without the messages.
            let written = Written { messages: Vec::new(), ..written };
            self.held.insert(written.partition, written);
        } else {
            self.written.push(written);
        }
    }

    /// Notes in the log that a replica is not here any more, and answers those that waited for it.
    pub(super) fn forget(&mut self, mut replica: Replica<Waiter>, dispatch: &mut Dispatch) {
        let (partition, id, term) = (replica.partition(), replica.id(), replica.term());
        replica.abandon(&mut dispatch.replies);
        let (vote, commit) = (0, replica.applied().index);
        let state = State { partition: partition.0, term, vote, commit, replica: 0, start: 0 };
        match self.log.append(&Record::State(state)) {
            Ok(()) => {
                let messages = Vec::new();
                self.await_sync(Written { partition, replica: id, number: 0, messages });
            }
            Err(error) => self.fail(&error, dispatch),
        }
    }

    /// Starts a sync if something waits for it, or a second has passed with `everysec`.
    fn sync_if_due(&mut self, dispatch: &Dispatch, now: Instant) -> Result<(), LogError> {
        if self.log.poison().is_some() {
            return Ok(());
        }
        let elapsed = self.policy == Fsync::EverySec && self.unsynced && now >= self.next_sync;
        // A segment is synced by the worker when it is full: what the thread has not synced by then
        // would stop everything.
        let far_behind = self.log.written() - self.log.durable() >= SYNC_BYTES;
        let wanted = !self.written.is_empty() || elapsed || far_behind;
        if self.syncing_since.is_some() || !wanted {
            return Ok(());
        }
        if self.stuck.is_none() {
            self.write_batch(dispatch)?;
        }
        self.in_file = 0;
        std::mem::swap(&mut self.syncing, &mut self.written);
        self.syncing_since = Some(now);
        self.next_sync = now + SYNC_INTERVAL;
        self.unsynced = false;
        if self.policy == Fsync::EverySec {
            self.marks = dispatch.marks();
        }
        self.syncer.sync(self.log.sync_target());
        Ok(())
    }

    /// Has the next segment made in advance, so that no turn waits for its allocation.
    fn prepare_segment(&mut self) {
        if let Some(target) = self.log.prepare_target() {
            self.syncer.prepare(target);
        }
    }

    /// The next segment is there, or could not be made.
    pub(super) fn prepared(&mut self, result: Result<PreparedSegment, LogError>) {
        self.log.prepared(result);
    }

    /// The sync thread has finished.
    pub(super) fn synced(&mut self, result: Result<Lsn, std::io::Error>, dispatch: &mut Dispatch) {
        let stats = &dispatch.shared().stats;
        stats.log_syncs.add(1);
        if let Some(since) = self.syncing_since.take() {
            stats.log_sync_microseconds.add(since.elapsed().as_micros() as u64);
        }
        if let Err(error) = self.log.synced(result) {
            self.fail(&error, dispatch);
            return;
        }
        dispatch.note_synced(std::mem::take(&mut self.marks));
        for partition in self.gathering.drain(..) {
            dispatch.activate(partition);
        }
        let written = self.written.iter().map(|written| written.partition);
        self.pending = written.chain(self.held.keys().copied()).collect();
        for written in std::mem::take(&mut self.syncing) {
            dispatch.activate(written.partition);
            persisted(dispatch, written);
        }
    }

    /// Whether the disk has kept the oldest write waiting for too long.
    fn waited_too_long(&self, now: Instant) -> bool {
        let waits = !self.syncing.is_empty() || self.policy == Fsync::Always;
        let since = self.syncing_since.filter(|_| waits);
        since.is_some_and(|since| now.duration_since(since) >= self.overload_wait)
    }

    /// The log is of no use any more: no write is acknowledged from here on.
    fn fail(&mut self, error: &LogError, dispatch: &mut Dispatch) {
        if matches!(dispatch.refusing, Some(Error::LogFailed(_))) {
            return;
        }
        let reason = with_causes(error);
        tracing::error!(
            %reason,
            "the log failed: no more writes are accepted; mend the disk and restart the node"
        );
        dispatch.shared().fail(&reason);
        dispatch.refusing = Some(Error::LogFailed(reason));
        for index in 0..dispatch.own().len() {
            let partition = dispatch.own()[index];
            if let Some((replica, replies)) = dispatch.replica(partition) {
                replica.abandon(replies);
            }
        }
        dispatch.recount_all();
        dispatch.give_up_replicas();
        self.stuck = None;
        self.held.clear();
        self.gathering.clear();
        self.written.clear();
        self.in_file = 0;
        self.syncing.clear();
        self.pending.clear();
        self.unsynced = false;
    }

    /// Whether `take` has something to do though no event comes.
    pub(super) fn is_due(&self, dispatch: &Dispatch) -> bool {
        !self.waits_for_sync() && !dispatch.active().is_empty()
    }

    /// When the next sync is due, with `everysec`.
    pub(super) fn next_sync(&self) -> Option<Instant> {
        let wanted = self.policy == Fsync::EverySec && self.unsynced;
        (wanted && self.syncing_since.is_none()).then_some(self.next_sync)
    }

    /// Whether something is under way that a stopping worker should wait for.
    pub(super) fn is_busy(&self, dispatch: &Dispatch) -> bool {
        self.syncing_since.is_some() || !self.written.is_empty() || dispatch.in_flight_bytes() > 0
    }

    pub(super) fn log(&mut self) -> &mut Log {
        &mut self.log
    }

    /// Syncs and closes the log.
    pub(super) fn close(self) -> Result<(), LogError> {
        drop(self.syncer);
        self.log.close()
    }
}

/// Refuses the commands of the batches that are open.
fn refuse_open(active: &[PartitionId], error: &Error, dispatch: &mut Dispatch) {
    let now_ms = dispatch.now.ms;
    for &partition in active {
        if let Some((replica, replies)) = dispatch.replica(partition) {
            let before = replies.len();
            replica.refuse_open(now_ms, error, replies);
            let refused = replies.len() - before;
            dispatch.shared().stats.disk_full.add(refused as u64);
        }
    }
}

/// What the replica of a partition wants next, with the replica's id.
fn next_ready(dispatch: &mut Dispatch, partition: PartitionId) -> Option<(u64, Ready)> {
    let (replica, replies) = dispatch.replica(partition)?;
    let ready = replica.ready(replies).unwrap_or_else(|error| {
        panic!("partition {partition} is broken, and so is this node: {error}")
    });
    Some((replica.id(), ready?))
}

/// What a replica asked for is persisted, or there was nothing to write. Means nothing to another replica
/// that is in its place now.
fn persisted(dispatch: &mut Dispatch, written: Written) {
    let Written { partition, replica: id, number, messages } = written;
    let here = dispatch.replica(partition).is_some_and(|(replica, _)| replica.id() == id);
    if !here {
        return;
    }
    dispatch.send(partition, messages);
    if dispatch.replica(partition).is_some_and(|(replica, _)| replica.persisted(number)) {
        dispatch.pass_on_changes(partition);
    }
}

/// An error with what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn append(log: &mut Log, partition: PartitionId, ready: &Ready) -> Result<(), LogError> {
    let (partition, commit) = (partition.0, ready.commit);
    if let Some(state) = &ready.state {
        let &StateRecord { replica, start, term, vote } = state;
        let state = State { partition, term, vote, commit, replica, start };
        log.append(&Record::State(state))?;
    }
    for entry in &ready.entries {
        log.append(&Record::Entry(Entry {
            partition,
            entry_type: entry.entry_type as u8,
            term: entry.term,
            index: entry.index,
            commit,
            payload: &entry.data,
        }))?;
    }
    Ok(())
}
