//! From what a disk holds to a running process, and how a replica comes and goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use flux_core::replica::{
    Broken, Now, Position, Recovery, Replica, SnapshotMeta, StateRecord, View,
};
use flux_core::store::{Memory, Table, TableOptions};
use flux_log::{Disk, SnapshotWriter};
use flux_log::{Entry, Log, LogError, LogOptions, Record, SimDisk, Snapshot, SnapshotId, State};

use super::feed::{Link, PartitionFeed};
use super::peers::Peers;
use super::planted::Planted;
use super::{Hosted, Options, Process};
use crate::check::consensus::Contents;
use crate::plant::Plant;

/// Why a process cannot start or go on.
#[derive(Debug)]
pub enum BootError {
    /// The log or a snapshot, as the disk has it.
    Log(LogError),
    /// What they hold makes no sense.
    Broken(Broken),
    /// A snapshot holds what is none.
    Snapshot,
}

impl BootError {
    /// Whether data is lost, so that the node must come back as another one.
    pub fn is_damage(&self) -> bool {
        match self {
            BootError::Log(error) => matches!(error, LogError::Damaged { .. }),
            BootError::Broken(_) | BootError::Snapshot => true,
        }
    }
}

impl From<LogError> for BootError {
    fn from(error: LogError) -> BootError {
        BootError::Log(error)
    }
}

impl From<Broken> for BootError {
    fn from(error: Broken) -> BootError {
        BootError::Broken(error)
    }
}

/// A replica being recovered.
struct Recovering {
    recovery: Recovery,
    table: Arc<Table>,
    shadow: BTreeMap<u64, (u64, Contents)>,
    reset: (u64, u64),
    checked: u64,
}

impl Process {
    /// Starts a process on what its disks hold.
    ///
    /// # Errors
    /// If they hold no state that a node can go on from.
    pub fn boot(
        number: u64,
        (log_disk, snapshot_disk): (&SimDisk, &SimDisk),
        options: &Options,
        now: Now,
    ) -> Result<Process, BootError> {
        let mut recovering: BTreeMap<u16, Recovering> = BTreeMap::new();
        for id in Snapshot::list(snapshot_disk)? {
            let table = options.table();
            let meta = load(snapshot_disk, id, &table)?;
            recovering.insert(id.partition, Recovering::new(options, table, Some(meta)));
        }
        let log_options =
            LogOptions { segment_bytes: options.segment_bytes, ..LogOptions::new(options.seed) };
        let mut broken = None;
        let mut visit = |record: Record<'_>| {
            let partition = match &record {
                Record::State(state) => state.partition,
                Record::Entry(entry) => entry.partition,
            };
            let one = recovering
                .entry(partition)
                .or_insert_with(|| Recovering::new(options, options.table(), None));
            if broken.is_none() {
                broken = one.record(&record).err();
            }
        };
        let (log, _) = Log::open(Arc::new(log_disk.clone()), log_options, &mut visit, &mut |_| ())?;
        if let Some(broken) = broken {
            return Err(broken.into());
        }
        let mut process = Process {
            number,
            hosted: BTreeMap::new(),
            inbox: Vec::new(),
            log,
            snapshot_disk: snapshot_disk.clone(),
            options: options.clone(),
            written: Vec::new(),
            syncing: None,
            snapshot_indexes: BTreeMap::new(),
            walk: None,
            planted: Planted::new(options.plant),
            peers: Peers::default(),
            link: Link::default(),
            known_targets: Vec::new(),
        };
        for (partition, one) in recovering {
            if one.recovery.replica() == 0 {
                // Removed, and perhaps not all of it.
                process.remove_snapshots(partition)?;
                continue;
            }
            if one.checked > 0 {
                process.snapshot_indexes.insert(partition, one.checked);
            }
            let hosted = one.finish(options, partition, now)?;
            process.hosted.insert(partition, hosted);
        }
        Ok(process)
    }

    /// Makes a replica that begins here, and what shows on the disk that it did.
    pub(super) fn begin(
        &mut self,
        partition: u16,
        id: u64,
        founding: SnapshotMeta,
        now: Now,
    ) -> Result<Hosted, BootError> {
        let index = founding.position.index;
        let disk: Arc<dyn Disk> = Arc::new(self.snapshot_disk.clone());
        SnapshotWriter::create(disk, partition, index, &founding.encode())?.finish()?;
        self.snapshot_indexes.insert(partition, index);
        let mut one = Recovering::new(&self.options, self.options.table(), Some(founding));
        one.reset.0 = id;
        let hosted = one.finish(&self.options, partition, now)?;
        self.append_state(partition, &hosted.replica.first_record())?;
        self.log.write()?;
        self.log.sync_now()?;
        Ok(hosted)
    }

    /// Makes a replica that has nothing yet.
    pub(super) fn empty(&self, partition: u16, id: u64, now: Now) -> Result<Hosted, BootError> {
        let mut one = Recovering::new(&self.options, self.options.table(), None);
        one.reset.0 = id;
        one.finish(&self.options, partition, now)
    }

    /// Writes that a partition is not here any more, and removes its snapshots then: in this order, since
    /// a log whose snapshot is gone is damaged.
    pub(super) fn forget(&mut self, partition: u16) -> Result<(), LogError> {
        let gone = StateRecord { replica: 0, start: 0, term: 0, vote: 0 };
        self.append_state(partition, &gone)?;
        self.log.write()?;
        self.log.sync_now()?;
        self.remove_snapshots(partition)
    }

    fn remove_snapshots(&mut self, partition: u16) -> Result<(), LogError> {
        self.snapshot_indexes.remove(&partition);
        for id in Snapshot::list(&self.snapshot_disk)? {
            if id.partition == partition {
                let name = id.file_name();
                let removed = self.snapshot_disk.remove(&name);
                removed
                    .and_then(|()| self.snapshot_disk.sync_dir())
                    .map_err(|source| LogError::Io { action: "remove", file: name, source })?;
            }
        }
        Ok(())
    }

    pub(super) fn append_state(
        &mut self,
        partition: u16,
        state: &StateRecord,
    ) -> Result<(), LogError> {
        let StateRecord { replica, start, term, vote } = *state;
        let commit = 0;
        self.log.append(&Record::State(State { partition, term, vote, commit, replica, start }))
    }
}

impl Options {
    /// An empty table, as this node makes them.
    pub(super) fn table(&self) -> Table {
        Table::new(TableOptions { hash_seed: self.seed, shards: 2 }, Memory::new(0))
    }
}

impl Recovering {
    fn new(options: &Options, table: Table, snapshot: Option<SnapshotMeta>) -> Recovering {
        let table = Arc::new(table);
        let checked = snapshot.as_ref().map_or(0, |meta| meta.position.index);
        let beginning = SnapshotMeta::default();
        let recovery = Recovery::new(Arc::clone(&table), snapshot, beginning, options.tail_bytes);
        Recovering { recovery, table, shadow: BTreeMap::new(), reset: (0, 0), checked }
    }

    fn record(&mut self, record: &Record<'_>) -> Result<(), Broken> {
        match *record {
            Record::State(State { replica, start, term, vote, .. }) => {
                if self.reset != (replica, start) {
                    self.reset = (replica, start);
                    self.shadow.clear();
                }
                self.recovery.state(&StateRecord { replica, start, term, vote });
                Ok(())
            }
            Record::Entry(Entry { entry_type, term, index, commit, payload, .. }) => {
                let contents =
                    Contents { entry_type: i32::from(entry_type), payload: payload.to_vec() };
                self.shadow.split_off(&index);
                self.shadow.insert(index, (term, contents));
                self.recovery.entry(Position { index, term }, commit, entry_type, payload)
            }
        }
    }

    fn finish(mut self, options: &Options, partition: u16, now: Now) -> Result<Hosted, BootError> {
        self.recovery.finish()?;
        let id = if self.recovery.replica() == 0 { self.reset.0 } else { self.recovery.replica() };
        let view = Arc::new(View::default());
        let config = options.replica(partition, id);
        let memory = Memory::new(0);
        let mut replica = Replica::new(&config, self.recovery, memory, Arc::clone(&view), now)?;
        if options.has(Plant::VoteAfterRestart) {
            // The time for which it keeps its vote passes at once; that of an election does not.
            (0..config.election_ticks).for_each(|_| _ = replica.tick(now));
        }
        let begins = if self.shadow.is_empty() { self.checked } else { 0 };
        Ok(Hosted {
            replica,
            table: self.table,
            view,
            shadow: self.shadow,
            checked: self.checked,
            start: self.reset.1,
            begins,
            feed: PartitionFeed::default(),
        })
    }
}

/// Loads a snapshot into a table.
fn load(disk: &SimDisk, id: SnapshotId, table: &Table) -> Result<SnapshotMeta, BootError> {
    let mut snapshot = Snapshot::open(disk, id)?;
    let meta = SnapshotMeta::decode(snapshot.meta()).ok_or(BootError::Snapshot)?;
    while let Some(chunk) = snapshot.next_chunk()? {
        table.load(chunk).map_err(|_| BootError::Snapshot)?;
    }
    Ok(meta)
}
