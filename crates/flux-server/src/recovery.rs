//! From the data directory to replicas: snapshots, then the log of each worker.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flux_core::PartitionId;
use flux_core::replica::{Broken, Position, Recovery, ReplicaConfig, SnapshotMeta, StateRecord};
use flux_core::store::Table;
use flux_log::{Log, LogError, LogOptions, Record, Snapshot, SnapshotId, State};

use crate::config::Settings;
use crate::data_dir::{DataDir, DataDirError, Place};

/// Time between two reports of a long recovery.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The period of Raft's clock.
pub(crate) const TICK: Duration = Duration::from_millis(50);
/// Recent log that is kept for followers of one partition, at least.
const MIN_TAIL_BYTES: usize = 64 * 1024;
/// Bytes that are copied into a log of a new generation at a time.
const COPY_BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Why the data cannot be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The directory.
    #[error(transparent)]
    Directory(#[from] DataDirError),
    /// A log or a snapshot.
    #[error("in {directory}")]
    Log {
        /// Where the file that it names lies.
        directory: String,
        /// What is wrong.
        #[source]
        source: LogError,
    },
    /// A log is gone.
    #[error(
        "the log in {directory} is gone: acknowledged writes were in it; a node alone needs a backup, one of a cluster gets its data from the other nodes"
    )]
    Missing {
        /// Where it was.
        directory: String,
    },
    /// A partition whose log makes no sense.
    #[error("partition {partition} in {directory}")]
    Broken {
        /// The partition.
        partition: u16,
        /// The directory of its log.
        directory: String,
        /// What is wrong.
        #[source]
        source: Broken,
    },
    /// A snapshot whose contents make no sense, though its checksums are right.
    #[error("the snapshot of partition {partition} in {directory} is not one of this version")]
    Snapshot {
        /// The partition.
        partition: u16,
        /// The directory of the snapshots.
        directory: String,
    },
}

/// How a partition's replica on this node begins, and whether there is one, where the disk says nothing.
#[derive(Clone, Debug)]
pub(crate) struct Beginning {
    pub(crate) partition: PartitionId,
    pub(crate) table: Arc<Table>,
    /// The group that this node founded with others, or that it is alone in; and its replica there.
    pub(crate) founded: Option<(u64, SnapshotMeta)>,
    /// The replica that it is to have now.
    pub(crate) assigned: Option<u64>,
    pub(crate) tail_bytes: usize,
}

/// A replica that starts.
pub(crate) struct Found {
    pub(crate) partition: PartitionId,
    pub(crate) id: u64,
    pub(crate) recovery: Recovery,
}

/// What one worker starts with.
pub(crate) struct Recovered {
    pub(crate) log: Log,
    pub(crate) replicas: Vec<Found>,
    /// The index of each partition's snapshot.
    pub(crate) snapshot_indexes: BTreeMap<u16, u64>,
}

/// The newest snapshot of each partition, of all workers.
pub(crate) struct Snapshots {
    /// Opened once: a directory has one owner.
    pub(crate) place: Place,
    newest: BTreeMap<u16, SnapshotId>,
}

/// Tells a person how a long recovery is getting on.
struct Reporter {
    what: String,
    next: Instant,
}

impl Reporter {
    fn new(what: String) -> Reporter {
        Reporter { what, next: Instant::now() + REPORT_INTERVAL }
    }

    fn report(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + REPORT_INTERVAL;
            let percent = done.saturating_mul(100) / total.max(1);
            tracing::info!(what = %self.what, done, total, "recovering: {percent}%");
        }
    }
}

/// Recovers a worker's partitions into their tables.
pub(crate) fn recover(
    directory: &DataDir,
    worker: u16,
    partitions: &[Beginning],
    options: LogOptions,
    snapshots: &Snapshots,
) -> Result<Recovered, RecoveryError> {
    let mut replicas = BTreeMap::new();
    let mut snapshot_indexes = BTreeMap::new();
    for Beginning { partition, table, founded, tail_bytes, .. } in partitions {
        let meta = snapshots.load(*partition, table)?;
        if let Some(meta) = &meta {
            snapshot_indexes.insert(partition.0, meta.position.index);
        }
        let beginning = founded.as_ref().map(|(_, meta)| meta.clone()).unwrap_or_default();
        let recovery = Recovery::new(Arc::clone(table), meta, beginning, *tail_bytes);
        replicas.insert(partition.0, recovery);
    }
    let place = existing_log(directory, worker)?;
    let mut reporter = Reporter::new(place.name.clone());
    let mut broken = None;
    let mut visit = |record: Record<'_>| {
        if broken.is_none() {
            broken = replay(&mut replicas, &record).err();
        }
    };
    let opened = Log::open(Arc::clone(&place.disk), options, &mut visit, &mut |progress| {
        reporter.report(progress.done, progress.total);
    });
    let (log, report) = opened.map_err(|source| at(&place, source))?;
    let finish = |(partition, one): (&u16, &mut Recovery)| {
        one.finish().err().map(|source| (*partition, source))
    };
    if let Some((partition, source)) = broken.or_else(|| replicas.iter_mut().find_map(finish)) {
        return Err(RecoveryError::Broken { partition, directory: place.name, source });
    }
    if let Some(cut) = &report.cut {
        tracing::warn!(
            directory = %place.name, file = %cut.file, offset = cut.offset, bytes = cut.bytes,
            "cut a torn write off the end of the log; nothing acknowledged under fsync = always was in it"
        );
    }
    let mut found = Vec::new();
    for beginning in partitions {
        let recovery = replicas.remove(&beginning.partition.0).expect("one for each");
        found.extend(choose(beginning, recovery));
    }
    Ok(Recovered { log, replicas: found, snapshot_indexes })
}

/// The replica to start with: the one that the disk knows, else the one that this node founded a group
/// with, else an empty one where the placement map wants it.
fn choose(beginning: &Beginning, recovery: Recovery) -> Option<Found> {
    let partition = beginning.partition;
    if recovery.replica() != 0 {
        return Some(Found { partition, id: recovery.replica(), recovery });
    }
    if let Some((id, _)) = beginning.founded
        && !recovery.has_history()
    {
        return Some(Found { partition, id, recovery });
    }
    // What an earlier replica left is not that of the next one.
    beginning.table.clear();
    let (table, tail_bytes) = (Arc::clone(&beginning.table), beginning.tail_bytes);
    let recovery = Recovery::new(table, None, SnapshotMeta::default(), tail_bytes);
    beginning.assigned.map(|id| Found { partition, id, recovery })
}

/// The directory of a worker's log, of which nothing may be missing once the node has run.
fn existing_log(directory: &DataDir, worker: u16) -> Result<Place, RecoveryError> {
    let place = directory.log(directory.description.generation, worker)?;
    let files = place.disk.list().map_err(|source| DataDirError::Io {
        action: "list",
        path: place.name.clone().into(),
        source,
    })?;
    if directory.description.started && !files.iter().any(|name| name.ends_with(".log")) {
        return Err(RecoveryError::Missing { directory: place.name });
    }
    Ok(place)
}

/// The id of the replicas of a node that is alone.
pub(crate) const ALONE: u64 = 1;

/// How a replica is set up.
pub(crate) fn replica_config(
    partition: PartitionId,
    id: u64,
    settings: &Settings,
    partitions: u16,
) -> ReplicaConfig {
    let tick_us = TICK.as_micros() as u64;
    let here = usize::from(partitions).div_ceil(settings.worker_count());
    let tail_bytes = settings.replication_memory as usize / here.max(1);
    ReplicaConfig {
        partition,
        id,
        tick_us,
        heartbeat_ticks: 2,
        election_ticks: (settings.election_timeout_ms * 1000 / tick_us).max(4) as usize,
        drift_percent: settings.clock_drift_percent,
        tail_bytes: if id == ALONE { 0 } else { tail_bytes.max(MIN_TAIL_BYTES) },
        previous_versions: settings.rabbitmq_url.is_some(),
        include_previous: settings.cdc_include_previous,
        seed: 0,
    }
}

impl Snapshots {
    /// Finds the newest snapshot of each partition.
    pub(crate) fn find(directory: &DataDir) -> Result<Snapshots, RecoveryError> {
        let place = directory.snapshots()?;
        let found = Snapshot::list(&*place.disk).map_err(|source| at(&place, source))?;
        Ok(Snapshots { place, newest: found.into_iter().map(|id| (id.partition, id)).collect() })
    }

    /// Loads a partition's snapshot, if there is one, into its table.
    fn load(
        &self,
        partition: PartitionId,
        table: &Table,
    ) -> Result<Option<SnapshotMeta>, RecoveryError> {
        let Some(&id) = self.newest.get(&partition.0) else { return Ok(None) };
        let failed = |source| at(&self.place, source);
        let unusable = || RecoveryError::Snapshot {
            partition: id.partition,
            directory: self.place.name.clone(),
        };
        let mut snapshot = Snapshot::open(&*self.place.disk, id).map_err(failed)?;
        let meta = SnapshotMeta::decode(snapshot.meta()).ok_or_else(unusable)?;
        let mut reporter = Reporter::new(format!("snapshot of partition {partition}"));
        let size = snapshot.size();
        loop {
            reporter.report(snapshot.position(), size);
            let Some(chunk) = snapshot.next_chunk().map_err(failed)? else { return Ok(Some(meta)) };
            table.load(chunk).map_err(|_| unusable())?;
        }
    }
}

fn replay(
    replicas: &mut BTreeMap<u16, Recovery>,
    record: &Record<'_>,
) -> Result<(), (u16, Broken)> {
    match *record {
        Record::State(state) => {
            if let Some(replica) = replicas.get_mut(&state.partition) {
                let State { replica: id, start, term, vote, .. } = state;
                replica.state(&StateRecord { replica: id, start, term, vote });
            }
            Ok(())
        }
        Record::Entry(entry) => {
            let Some(replica) = replicas.get_mut(&entry.partition) else { return Ok(()) };
            let position = Position { index: entry.index, term: entry.term };
            replica
                .entry(position, entry.commit, entry.entry_type, entry.payload)
                .map_err(|broken| (entry.partition, broken))
        }
    }
}

/// Copies the records of all workers' logs into logs for another number of workers, and makes those
/// the ones that count. A crash before the last step leaves the old ones in force.
pub(crate) fn relayout(
    directory: &mut DataDir,
    workers: u16,
    options: &LogOptions,
) -> Result<(), RecoveryError> {
    let (from, count) = (directory.description.generation, directory.description.workers);
    let to = from + 1;
    tracing::info!(from = count, to = workers, "the number of workers changed: rewriting the log");
    let mut targets = Vec::new();
    for worker in 0..workers {
        let place = directory.log(to, worker)?;
        let (log, _) =
            Log::open(Arc::clone(&place.disk), options.clone(), &mut |_| (), &mut |_| ())
                .map_err(|source| at(&place, source))?;
        targets.push((place, log));
    }
    for worker in 0..count {
        let place = existing_log(directory, worker)?;
        let mut reporter = Reporter::new(place.name.clone());
        let mut failed = None;
        let mut copy = |record: Record<'_>| {
            let partition = match record {
                Record::State(state) => state.partition,
                Record::Entry(entry) => entry.partition,
            };
            let (place, log) = &mut targets[usize::from(partition % workers)];
            let copied = log.append(&record).and_then(|()| flush(log, COPY_BATCH_BYTES));
            if let Err(error) = copied
                && failed.is_none()
            {
                failed = Some(at(place, error));
            }
        };
        Log::open(Arc::clone(&place.disk), options.clone(), &mut copy, &mut |progress| {
            reporter.report(progress.done, progress.total);
        })
        .map_err(|source| at(&place, source))?;
        if let Some(failed) = failed {
            return Err(failed);
        }
    }
    for (place, mut log) in targets {
        flush(&mut log, 0).and_then(|()| log.close()).map_err(|source| at(&place, source))?;
    }
    directory.switch(to, workers)?;
    Ok(())
}

fn at(place: &Place, source: LogError) -> RecoveryError {
    RecoveryError::Log { directory: place.name.clone(), source }
}

/// Writes the batch if it is larger than `bytes`.
fn flush(log: &mut Log, bytes: usize) -> Result<(), LogError> {
    if log.batch_bytes() > bytes {
        log.reserve(log.batch_bytes())?;
        log.write()?;
    }
    Ok(())
}
