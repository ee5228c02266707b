//! A machine for a node's data: simulated disks with one power switch, and syncs that can be held.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use flux_log::{Disk, File, SimDisk};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::folders::Folders;

/// Name of the disk of the directory itself.
const ROOT: &str = "";
/// Nothing here takes as long; a test fails instead of hanging.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Clones are the same machine.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    seed: u64,
    disks: Arc<Mutex<Disks>>,
    power: Arc<Power>,
    pub(super) syncs: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Disks {
    present: BTreeMap<String, SimDisk>,
    /// Removed, which a power cut may undo: nobody syncs that.
    removed: BTreeMap<String, SimDisk>,
}

/// One switch for all disks, so that there is one moment at which it goes off.
#[derive(Debug)]
struct Power {
    /// Changes of the disks until it goes off.
    left: AtomicI64,
    /// Writes to files, and syncs of files, so far.
    writes: AtomicU64,
    syncs: AtomicU64,
    /// Held shared while a disk changes.
    changing: RwLock<()>,
}

/// Holds syncs while it is closed.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: usize,
}

impl Gate {
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
    }

    pub(super) fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }

    /// Returns once a sync waits at the gate.
    pub(super) fn wait_for_sync(&self) {
        let mut state = self.state.lock();
        let waits = |state: &mut GateState| state.waiting == 0;
        let result = self.changed.wait_while_for(&mut state, waits, LONGEST_WAIT);
        assert!(!result.timed_out(), "no sync came");
    }

    fn pass(&self) {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.changed.notify_all();
        let closed = |state: &mut GateState| state.closed;
        let result = self.changed.wait_while_for(&mut state, closed, LONGEST_WAIT);
        assert!(!result.timed_out(), "the gate was never opened");
        state.waiting -= 1;
    }
}

impl Power {
    fn on() -> Arc<Power> {
        let (writes, syncs) = Default::default();
        Arc::new(Power { left: AtomicI64::new(i64::MAX), writes, syncs, changing: RwLock::new(()) })
    }

    fn change<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _changing = self.changing.read();
        if self.left.fetch_sub(1, Ordering::Relaxed) <= 0 {
            return Err(io::Error::other("the power is off"));
        }
        change()
    }

    fn off(&self) {
        let _nothing_changes = self.changing.write();
        self.left.store(0, Ordering::Relaxed);
    }
}

impl Machine {
    pub(super) fn new(seed: u64) -> Machine {
        Machine::with(seed, Disks::default())
    }

    fn with(seed: u64, disks: Disks) -> Machine {
        let disks = Arc::new(Mutex::new(disks));
        Machine { seed, disks, power: Power::on(), syncs: Arc::default() }
    }

    /// What a node opens its data directory in.
    pub(super) fn folders(&self) -> Box<dyn Folders> {
        Box::new(SimFolders { root: self.open(ROOT), machine: self.clone() })
    }

    /// How many writes to files, and syncs of files, there have been.
    pub(super) fn writes_and_syncs(&self) -> (u64, u64) {
        let Power { writes, syncs, .. } = &*self.power;
        (writes.load(Ordering::Relaxed), syncs.load(Ordering::Relaxed))
    }

    /// Lets so many changes of all disks together happen, and then turns the power off.
    pub(super) fn power_off_after(&self, changes: u64) {
        self.power.left.store(changes as i64, Ordering::Relaxed);
    }

    /// Whether the power went off by itself.
    pub(super) fn is_off(&self) -> bool {
        self.power.left.load(Ordering::Relaxed) <= 0
    }

    /// Turns the power off; returns the machine as it is after a restart.
    pub(super) fn power_cut(&self) -> Machine {
        self.power.off();
        let disks = self.disks.lock();
        let mut after = Disks::default();
        for (name, disk) in &disks.present {
            after.present.insert(name.clone(), disk.power_cut());
        }
        for (at, (name, disk)) in disks.removed.iter().enumerate() {
            if (self.seed >> (at % 64)) & 1 == 1 {
                after.present.entry(name.clone()).or_insert_with(|| disk.power_cut());
            }
        }
        Machine::with(self.seed.rotate_left(7).wrapping_add(1), after)
    }

    /// Kills the process; returns the machine with all that it had written, synced or not.
    pub(super) fn kill(&self) -> Machine {
        self.power.off();
        let disks = self.disks.lock();
        let copy = |(name, disk): (&String, &SimDisk)| (name.clone(), disk.duplicate());
        let present = disks.present.iter().map(copy).collect();
        Machine::with(self.seed.wrapping_add(1), Disks { present, removed: BTreeMap::new() })
    }

    /// The names of the directories, in order.
    pub(super) fn names(&self) -> Vec<String> {
        self.disks.lock().present.keys().filter(|name| *name != ROOT).cloned().collect()
    }

    /// The disk of a directory, for faults.
    pub(super) fn disk(&self, name: &str) -> SimDisk {
        let mut disks = self.disks.lock();
        let number = disks.present.len() as u64 + disks.removed.len() as u64;
        let new = || SimDisk::new(self.seed.wrapping_mul(31).wrapping_add(number));
        disks.present.entry(name.to_owned()).or_insert_with(new).clone()
    }

    fn open(&self, name: &str) -> Arc<dyn Disk> {
        let (power, syncs) = (Arc::clone(&self.power), Arc::clone(&self.syncs));
        Arc::new(PoweredDisk { disk: self.disk(name), power, syncs })
    }
}

#[derive(Debug)]
struct SimFolders {
    machine: Machine,
    root: Arc<dyn Disk>,
}

impl Folders for SimFolders {
    fn path(&self) -> &Path {
        Path::new("/simulated")
    }

    fn root(&self) -> &dyn Disk {
        &*self.root
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.machine.names())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Disk>> {
        self.machine.power.change(|| Ok(self.machine.open(name)))
    }

    fn set_aside(&self, name: &str, into: &str) -> io::Result<()> {
        self.machine.power.change(|| {
            let mut disks = self.machine.disks.lock();
            let disk = disks.present.remove(name).ok_or(io::ErrorKind::NotFound)?;
            disks.present.insert(format!("{into}/{name}"), disk);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.machine.power.change(|| {
            let mut disks = self.machine.disks.lock();
            let disk = disks.present.remove(name).ok_or(io::ErrorKind::NotFound)?;
            disks.removed.insert(name.to_owned(), disk);
            Ok(())
        })
    }
}

#[derive(Debug)]
struct PoweredDisk {
    disk: SimDisk,
    power: Arc<Power>,
    syncs: Arc<Gate>,
}

impl PoweredDisk {
    fn powered(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        let (power, syncs) = (Arc::clone(&self.power), Arc::clone(&self.syncs));
        Arc::new(PoweredFile { file, power, syncs })
    }
}

impl Disk for PoweredDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.power.change(|| self.disk.create(name)).map(|file| self.powered(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.disk.open(name).map(|file| self.powered(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.power.change(|| self.disk.rename(from, to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.power.change(|| self.disk.remove(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.power.change(|| self.disk.sync_dir())
    }
}

#[derive(Debug)]
struct PoweredFile {
    file: Arc<dyn File>,
    power: Arc<Power>,
    syncs: Arc<Gate>,
}

impl File for PoweredFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.power.writes.fetch_add(1, Ordering::Relaxed);
        self.power.change(|| self.file.write_at(bytes, offset))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.syncs.pass();
        self.power.syncs.fetch_add(1, Ordering::Relaxed);
        self.power.change(|| self.file.sync_data())
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.power.change(|| self.file.allocate(size))
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.power.change(|| self.file.truncate(size))
    }
}
