//! A random workload with power cuts, against a model of what must survive.
//!
//! Each record carries its own number, so what a recovery visits must be: states repeated from
//! segments that are gone, then a run of records without a hole, which reaches at least as far as
//! what was acknowledged as durable and no further than what was written. A reader sees all of it at
//! any time before.

use std::{collections::BTreeMap, sync::Arc};

use flux_log::{Keep, Log, LogError, SimDisk, Snapshot, SnapshotId, SnapshotWriter, State};
use proptest::prelude::*;

use crate::support::{Owned, open, scan_all};

const SEGMENT_BYTES: u64 = 2048;
const PARTITIONS: u16 = 3;

#[derive(Clone, Debug)]
enum Step {
    Append {
        partition: u16,
        length: usize,
    },
    State {
        partition: u16,
    },
    Write,
    Sync,
    /// Makes a target now that is synced some steps later.
    Target,
    RunTarget,
    Prepare,
    Snapshot {
        partition: u16,
    },
    /// A snapshot from elsewhere takes the place of what there is.
    Install {
        partition: u16,
        ahead: u64,
    },
    /// The partition leaves and comes back as another replica, from nothing.
    Replace {
        partition: u16,
    },
    /// Up to the snapshots; a reader needs what comes from this index on, up to so many segments.
    Trim {
        from: u64,
        retention: u64,
    },
    FailSync,
    FailWrite,
    /// Stops and starts the process; the disk keeps its power.
    Restart {
        clean: bool,
    },
    PowerCut,
    /// The power fails within one of the next steps.
    PowerOffAfter(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let partition = 0..PARTITIONS;
    prop_oneof![
        12 => (partition.clone(), 0_usize..700)
            .prop_map(|(partition, length)| Step::Append { partition, length }),
        3 => partition.clone().prop_map(|partition| Step::State { partition }),
        10 => Just(Step::Write),
        4 => Just(Step::Sync),
        3 => Just(Step::Target),
        3 => Just(Step::RunTarget),
        2 => Just(Step::Prepare),
        3 => partition.clone().prop_map(|partition| Step::Snapshot { partition }),
        2 => (partition.clone(), 1_u64..6)
            .prop_map(|(partition, ahead)| Step::Install { partition, ahead }),
        1 => partition.prop_map(|partition| Step::Replace { partition }),
        3 => (0_u64..40, 0_u64..4).prop_map(|(from, retention)| Step::Trim { from, retention }),
        1 => Just(Step::FailSync),
        1 => Just(Step::FailWrite),
        1 => any::<bool>().prop_map(|clean| Step::Restart { clean }),
        2 => Just(Step::PowerCut),
        2 => (0_u64..8).prop_map(Step::PowerOffAfter),
    ]
}

/// A record that was handed to `write`.
#[derive(Clone, Debug)]
struct Appended {
    /// LSN after its batch; `None` if the write failed, so it may or may not be there.
    end: Option<u64>,
    record: Owned,
}

struct World {
    disk: SimDisk,
    log: Log,
    target: Option<flux_log::SyncTarget>,
    /// All records by number.
    written: Vec<Appended>,
    batch: Vec<Owned>,
    acknowledged: u64,
    index: [u64; PARTITIONS as usize],
    /// Index of the last snapshot that was finished, and of one that failed after it.
    snapshots: [u64; PARTITIONS as usize],
    attempted: [Option<u64>; PARTITIONS as usize],
    /// The replica and start of each partition, as its states have them.
    lives: [(u64, u64); PARTITIONS as usize],
}

impl World {
    fn new(seed: u64) -> World {
        let disk = SimDisk::new(seed);
        let (log, ..) = open(&disk, SEGMENT_BYTES).unwrap();
        World {
            disk,
            log,
            target: None,
            written: Vec::new(),
            batch: Vec::new(),
            acknowledged: 0,
            index: [0; PARTITIONS as usize],
            snapshots: [0; PARTITIONS as usize],
            attempted: [None; PARTITIONS as usize],
            lives: [(1, 0); PARTITIONS as usize],
        }
    }

    fn next_number(&self) -> u64 {
        (self.written.len() + self.batch.len()) as u64
    }

    fn append(&mut self, record: Owned) -> Result<(), LogError> {
        self.log.append(&record.record())?;
        self.batch.push(record);
        Ok(())
    }

    fn write(&mut self) -> Result<(), LogError> {
        let first = self.written.len();
        let records = self.batch.drain(..).map(|record| Appended { end: None, record });
        self.written.extend(records);
        let end = self.log.write()?;
        for appended in &mut self.written[first..] {
            appended.end = Some(end);
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), LogError> {
        match *step {
            Step::Append { partition, length } => {
                let number = self.next_number();
                let index = &mut self.index[partition as usize];
                *index += 1;
                let mut payload = vec![number as u8; length];
                payload.extend_from_slice(&number.to_le_bytes());
                let (index, term, commit) = (*index, number, 0);
                self.append(Owned::Entry {
                    partition,
                    entry_type: 0,
                    term,
                    index,
                    commit,
                    payload,
                })?;
            }
            Step::State { partition } => self.state(partition, self.lives[partition as usize])?,
            Step::Write => self.write()?,
            Step::Sync => self.acknowledged = self.log.sync_now()?,
            Step::Target => self.target = Some(self.log.sync_target()),
            Step::RunTarget => {
                if let Some(target) = self.target.take() {
                    self.acknowledged = self.log.synced(target.sync())?;
                }
            }
            Step::Prepare => {
                if let Some(target) = self.log.prepare_target() {
                    self.log.prepared(target.run());
                }
            }
            Step::Snapshot { partition } => self.snapshot(partition)?,
            Step::Install { partition, ahead } => self.install(partition, ahead)?,
            Step::Replace { partition } => self.replace(partition)?,
            Step::Trim { from, retention } => {
                let snapshots = self.snapshots;
                self.log.trim(retention * SEGMENT_BYTES, &mut |partition| Keep {
                    snapshot: snapshots[partition as usize],
                    from,
                })?;
            }
            Step::FailSync => self.disk.fail_sync_after(0),
            Step::FailWrite => self.disk.fail_write_after(0),
            Step::PowerOffAfter(count) => self.disk.power_off_after(count),
            Step::PowerCut => self.power_cut(),
            Step::Restart { clean } => self.restart(clean)?,
        }
        Ok(())
    }

    fn state(&mut self, partition: u16, (replica, start): (u64, u64)) -> Result<(), LogError> {
        let term = self.next_number();
        self.lives[partition as usize] = (replica, start);
        let (vote, commit) = (!term, 0);
        self.append(Owned::State(State { partition, term, vote, commit, replica, start }))
    }

    /// Only what is durable in the log may be in a snapshot.
    fn snapshot(&mut self, partition: u16) -> Result<(), LogError> {
        self.acknowledged = self.log.sync_now()?;
        let place = partition as usize;
        let of = |owned: &Owned| match owned {
            Owned::Entry { partition, .. } => *partition,
            Owned::State(state) => state.partition,
        };
        let batched: Vec<&Owned> =
            self.batch.iter().filter(|owned| of(owned) == partition).collect();
        let entries = batched.iter().filter(|owned| matches!(owned, Owned::Entry { .. })).count();
        let index = self.index[place].saturating_sub(entries as u64);
        // With a reset in the batch it is not known what is durable of the new history: nothing.
        if index <= self.snapshots[place] || entries < batched.len() {
            return Ok(());
        }
        self.write_snapshot(partition, index)
    }

    fn write_snapshot(&mut self, partition: u16, index: u64) -> Result<(), LogError> {
        self.attempted[partition as usize] = Some(index);
        let disk = Arc::new(self.disk.clone());
        let mut writer = SnapshotWriter::create(disk, partition, index, &index.to_le_bytes())?;
        writer.chunk(&[partition as u8; 900])?;
        writer.chunk(&index.to_le_bytes())?;
        writer.finish()?;
        self.snapshots[partition as usize] = index;
        self.attempted[partition as usize] = None;
        Ok(())
    }

    /// The history goes on from a snapshot that may lie before or after what the log has.
    fn install(&mut self, partition: u16, ahead: u64) -> Result<(), LogError> {
        let place = partition as usize;
        let start = self.snapshots[place] + ahead;
        self.write_snapshot(partition, start)?;
        self.state(partition, (self.lives[place].0, start))?;
        self.index[place] = start;
        Ok(())
    }

    fn replace(&mut self, partition: u16) -> Result<(), LogError> {
        let place = partition as usize;
        let number = self.next_number();
        // Another start each time, so that it is a reset even if this was tried before.
        self.state(partition, (0, number))?;
        self.write()?;
        self.acknowledged = self.log.sync_now()?;
        self.attempted[place] = Some(0);
        Snapshot::remove(&self.disk, partition)?;
        self.attempted[place] = None;
        self.snapshots[place] = 0;
        self.state(partition, (number + 2, 0))?;
        self.index[place] = 0;
        Ok(())
    }

    /// Stops and starts without losing power: everything written is still there.
    fn restart(&mut self, clean: bool) -> Result<(), LogError> {
        // Stands in for the log while it is closed.
        let (other, ..) = open(&SimDisk::new(0), SEGMENT_BYTES).unwrap();
        if clean {
            self.write()?;
            std::mem::replace(&mut self.log, other).close()?;
        }
        let acknowledged = self.acknowledged;
        let ends = self.written.iter().filter_map(|appended| appended.end);
        self.acknowledged = ends.max().unwrap_or(0).max(acknowledged);
        self.recover(self.disk.clone()).inspect_err(|_| self.acknowledged = acknowledged)
    }

    fn power_cut(&mut self) {
        // Beginning a segment makes all before it durable, and so trimmable.
        self.acknowledged = self.acknowledged.max(self.log.durable());
        let disk = self.disk.power_cut();
        self.recover(disk).unwrap();
    }

    /// Opens the log on `disk`, checks what it finds against the model, and goes on from there. Only
    /// injected faults may keep it from that.
    fn recover(&mut self, disk: SimDisk) -> Result<(), LogError> {
        let (log, report, visited) = match open(&disk, SEGMENT_BYTES) {
            Err(error @ LogError::Io { .. }) => return Err(error),
            opened => opened.unwrap(),
        };
        self.check_snapshots(&disk)?;
        let numbers: Vec<u64> = visited.iter().map(number).collect();
        let mut run = (1..numbers.len())
            .rev()
            .find(|place| numbers[*place] != numbers[place - 1] + 1)
            .unwrap_or(0);
        let mut first = numbers.get(run).map_or(0, |number| *number as usize);
        let mut end = numbers.last().map_or(0, |number| *number as usize + 1);

        let durable = self
            .written
            .iter()
            .rposition(|appended| appended.end.is_some_and(|end| end <= self.acknowledged))
            .map_or(0, |place| place + 1);
        let context = format!("{report:?}: visited {first}..{end}, durable {durable}");
        if end < durable {
            // Fine only if what is missing was trimmed, so that no more than a head is left.
            assert!(visited.iter().all(|record| matches!(record, Owned::State(_))), "{context}");
            (run, first, end) = (visited.len(), durable, durable);
        }
        assert!(end <= self.written.len(), "{context}");
        self.check_trimmed(first, end, &context);
        let expected = self.written[first..end].iter().map(|appended| &appended.record);
        assert!(visited[run..].iter().eq(expected), "{context}");
        self.check_states(&visited, run, first, end, &context);

        self.written.truncate(end);
        self.batch.clear();
        self.target = None;
        self.acknowledged = log.durable();
        for appended in &mut self.written {
            // Whatever was recovered is durable from now on.
            appended.end = Some(0);
        }
        self.disk = disk;
        self.log = log;
        Ok(())
    }

    /// What is missing before the run is covered by snapshots, or void by a reset that survived.
    fn check_trimmed(&self, first: usize, end: usize, context: &str) {
        let mut lives = [(1, 0); PARTITIONS as usize];
        let mut last_reset = [0; PARTITIONS as usize];
        for (place, appended) in self.written[..end].iter().enumerate() {
            if let Owned::State(state) = &appended.record {
                let life = &mut lives[state.partition as usize];
                if *life != (state.replica, state.start) {
                    *life = (state.replica, state.start);
                    last_reset[state.partition as usize] = place;
                }
            }
        }
        for (place, appended) in self.written[..first].iter().enumerate() {
            if let Owned::Entry { partition, index, .. } = &appended.record {
                let covered = *index <= self.snapshots[*partition as usize];
                assert!(covered || place < last_reset[*partition as usize], "{context}");
            }
        }
    }

    /// The last state of every partition is that of the records that survived.
    fn check_states(&self, visited: &[Owned], run: usize, first: usize, end: usize, context: &str) {
        let last = |records: &mut dyn Iterator<Item = &Owned>| {
            let mut states = BTreeMap::new();
            for record in records {
                if let Owned::State(state) = record {
                    states.insert(state.partition, *state);
                }
            }
            states
        };
        let written = |end: usize| self.written[..end].iter().map(|appended| &appended.record);
        assert_eq!(last(&mut visited.iter()), last(&mut written(end)), "{context}");
        let before_run = last(&mut visited[..run].iter());
        let known = last(&mut written(first));
        assert!(before_run.iter().all(|(of, state)| known.get(of) == Some(state)), "{context}");
    }

    /// A reader sees what a recovery would if the process stopped now.
    fn check_reader(&self) {
        let (visited, report) = match open(&self.disk.duplicate(), SEGMENT_BYTES) {
            Ok((_, report, visited)) => (visited, report),
            // An injected fault that is still to come, or no power.
            Err(LogError::Io { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(report.cut, None);
        assert_eq!(scan_all(&self.log.reader()), visited);
    }

    fn check_snapshots(&mut self, disk: &SimDisk) -> Result<(), LogError> {
        let found: BTreeMap<u16, u64> = Snapshot::list(disk)?
            .into_iter()
            .map(|SnapshotId { partition, index }| (partition, index))
            .collect();
        for partition in 0..PARTITIONS {
            let place = partition as usize;
            let index = found.get(&partition).copied().unwrap_or(0);
            let finished = self.snapshots[place];
            assert!(index == finished || Some(index) == self.attempted[place], "{found:?}");
            self.snapshots[place] = index;
            self.attempted[place] = None;
            if index > 0 {
                let id = SnapshotId { partition, index };
                let mut snapshot = Snapshot::open(disk, id).unwrap();
                assert_eq!(snapshot.meta(), index.to_le_bytes());
                assert_eq!(snapshot.next_chunk().unwrap(), Some(&[partition as u8; 900][..]));
                assert_eq!(snapshot.next_chunk().unwrap(), Some(&index.to_le_bytes()[..]));
                assert_eq!(snapshot.next_chunk().unwrap(), None);
            }
        }
        Ok(())
    }
}

fn number(record: &Owned) -> u64 {
    match record {
        Owned::Entry { term, .. } => *term,
        Owned::State(state) => state.term,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn what_was_acknowledged_survives(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(seed);
        for step in &steps {
            match world.step(step) {
                Ok(()) => world.check_reader(),
                // A node whose log fails stops; it comes back with or without its power.
                Err(_) => world.power_cut(),
            }
        }
        world.power_cut();
    }
}
