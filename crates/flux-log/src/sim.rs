//! A [`Disk`] in memory that can lose what a real one can lose, as a seed decides.
//!
//! A power cut keeps, of each 512-byte sector written since its file was synced, any version from the
//! synced one to the last; of a length that was not synced, the old or the new; of the creations,
//! renames and removals that were not synced, any that can stand alone. A sector is written wholly or
//! not at all. Time does not exist here: nothing is slow.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::disk::{Disk, File};

const SECTOR: usize = 512;
/// Versions of a sector that are remembered between two syncs; enough to mix old and new.
const SECTOR_VERSIONS: usize = 4;

/// A disk in memory. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<SimState>>,
}

#[derive(Clone, Debug)]
struct SimState {
    random: u64,
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// What `names` has over `durable_names`, in order.
    name_changes: Vec<NameChange>,
    powered: bool,
    faults: Faults,
    write_calls: u64,
}

#[derive(Clone, Debug, Default)]
struct Faults {
    /// Writes that still succeed before one fails.
    fail_write_after: Option<u64>,
    fail_sync_after: Option<u64>,
    /// Changes of any kind that still happen before the power fails.
    power_off_after: Option<u64>,
    capacity: Option<u64>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, usize),
    Rename(String, String, usize),
    Remove(String, usize),
}

#[derive(Clone, Debug, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Earlier contents of the sectors written since the last sync, the synced one apart.
    dirty: BTreeMap<usize, Vec<[u8; SECTOR]>>,
}

impl SimDisk {
    /// An empty disk. The seed decides what power cuts keep and how much of a failed write is done.
    pub fn new(seed: u64) -> SimDisk {
        let state = SimState {
            random: seed,
            inodes: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_changes: Vec::new(),
            powered: true,
            faults: Faults::default(),
            write_calls: 0,
        };
        SimDisk { state: Arc::new(Mutex::new(state)) }
    }

    /// Turns the power off, and returns the disk as it is after a restart, without faults. Everything
    /// that still uses this one gets errors.
    pub fn power_cut(&self) -> SimDisk {
        let mut state = self.lock();
        state.powered = false;
        let mut after = state.clone();
        // Two cuts of the same disk need not keep the same.
        state.next_random();
        drop(state);
        after.lose_unsynced();
        after.powered = true;
        after.faults = Faults::default();
        SimDisk { state: Arc::new(Mutex::new(after)) }
    }

    /// Lets `count` writes succeed and then fails one, of which a part is done.
    pub fn fail_write_after(&self, count: u64) {
        self.lock().faults.fail_write_after = Some(count);
    }

    /// Lets `count` syncs of files or the directory succeed and then fails one. As on Linux, what a
    /// failed sync did not write counts as written afterwards, and is lost in a power cut.
    pub fn fail_sync_after(&self, count: u64) {
        self.lock().faults.fail_sync_after = Some(count);
    }

    /// Lets `count` changes of any kind happen and then turns the power off. What is left is up to
    /// [`power_cut`](SimDisk::power_cut).
    pub fn power_off_after(&self, count: u64) {
        self.lock().faults.power_off_after = Some(count);
    }

    /// Limits the bytes of all files together; `None` for no limit.
    pub fn limit_capacity(&self, bytes: Option<u64>) {
        self.lock().faults.capacity = bytes;
    }

    /// Bytes that all files take together.
    pub fn used(&self) -> u64 {
        self.lock().used()
    }

    /// Flips one bit, as decay does; false if the file has no such byte.
    pub fn flip_bit(&self, name: &str, offset: u64, bit: u8) -> bool {
        let mut state = self.lock();
        let Some(inode) = state.names.get(name).copied() else {
            return false;
        };
        let Some(inode) = state.inodes.get_mut(inode) else {
            return false;
        };
        let offset = offset as usize;
        let Some(byte) = inode.live.get_mut(offset) else {
            return false;
        };
        *byte ^= 1 << (bit & 7);
        if let Some(byte) = inode.durable.get_mut(offset) {
            *byte ^= 1 << (bit & 7);
        }
        true
    }

    /// Puts a file there, durably, in place of any of that name.
    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.lock();
        let number = state.inodes.len();
        let inode = Inode { durable: bytes.clone(), live: bytes, dirty: BTreeMap::new() };
        state.inodes.push(inode);
        state.names.insert(name.to_owned(), number);
        state.durable_names.insert(name.to_owned(), number);
    }

    /// What a file holds now.
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.lock();
        let inode = state.names.get(name)?;
        state.inodes.get(*inode).map(|inode| inode.live.clone())
    }

    /// A separate disk that is as this one is now, synced or not.
    pub fn duplicate(&self) -> SimDisk {
        SimDisk { state: Arc::new(Mutex::new(self.lock().clone())) }
    }

    /// Number of calls of [`File::write_at`] so far.
    pub fn write_calls(&self) -> u64 {
        self.lock().write_calls
    }

    fn lock(&self) -> MutexGuard<'_, SimState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn powered(&self) -> io::Result<MutexGuard<'_, SimState>> {
        let state = self.lock();
        if state.powered { Ok(state) } else { Err(io::Error::other("the power is off")) }
    }

    /// For everything that changes the disk.
    fn changing(&self) -> io::Result<MutexGuard<'_, SimState>> {
        let mut state = self.powered()?;
        if countdown(&mut state.faults.power_off_after) {
            state.powered = false;
            return Err(io::Error::other("the power is off"));
        }
        Ok(state)
    }

    fn handle(&self, inode: usize) -> Arc<dyn File> {
        Arc::new(SimFile { disk: self.clone(), inode })
    }
}

impl SimState {
    /// splitmix64, <https://prng.di.unimi.it/splitmix64.c>.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next_random() % limit.max(1) as u64) as usize
    }

    fn used(&self) -> u64 {
        let mut seen: Vec<usize> = self.names.values().copied().collect();
        seen.sort_unstable();
        seen.dedup();
        seen.iter().map(|inode| self.inodes[*inode].live.len() as u64).sum()
    }

    fn lookup(&self, name: &str) -> io::Result<usize> {
        self.names.get(name).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn make_room(&self, inode: usize, size: usize) -> io::Result<()> {
        let more = (size as u64).saturating_sub(self.inodes[inode].live.len() as u64);
        match self.faults.capacity {
            Some(capacity) if more > 0 && self.used() + more > capacity => {
                Err(ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    fn sync_fault(&mut self) -> bool {
        countdown(&mut self.faults.fail_sync_after)
    }

    fn lose_unsynced(&mut self) {
        self.lose_names();
        for number in 0..self.inodes.len() {
            // Half of the cuts treat all sectors of a file alike: nothing or all of it was written.
            let mode = self.below(4);
            let mut inode = std::mem::take(&mut self.inodes[number]);
            let size = if self.below(2) == 0 { inode.durable.len() } else { inode.live.len() };
            let mut kept = inode.durable.clone();
            kept.resize(kept.len().max(inode.live.len()), 0);
            for (sector, versions) in std::mem::take(&mut inode.dirty) {
                let choice = match mode {
                    0 => 0,
                    1 => versions.len() + 1,
                    _ => self.below(versions.len() + 2),
                };
                // 0 is the synced version, which `kept` has already.
                let version = match choice.checked_sub(1) {
                    None => continue,
                    Some(place) => {
                        versions.get(place).copied().unwrap_or_else(|| inode.sector(sector))
                    }
                };
                let start = sector * SECTOR;
                let end = kept.len().min(start + SECTOR);
                if start < end {
                    kept[start..end].copy_from_slice(&version[..end - start]);
                }
            }
            kept.truncate(size);
            inode.durable.clone_from(&kept);
            inode.live = kept;
            self.inodes[number] = inode;
        }
    }

    fn lose_names(&mut self) {
        let mut names = self.durable_names.clone();
        let changes = std::mem::take(&mut self.name_changes);
        let in_order = self.below(2) == 0;
        let keep = self.below(changes.len() + 1);
        for (place, change) in changes.into_iter().enumerate() {
            let kept = if in_order { place < keep } else { self.below(2) == 0 };
            if !kept {
                continue;
            }
            match change {
                NameChange::Create(name, inode) => {
                    names.entry(name).or_insert(inode);
                }
                // A change whose own beginning was lost is lost too.
                NameChange::Rename(from, to, inode) if names.get(&from) == Some(&inode) => {
                    names.remove(&from);
                    names.insert(to, inode);
                }
                NameChange::Remove(name, inode) if names.get(&name) == Some(&inode) => {
                    names.remove(&name);
                }
                NameChange::Rename(..) | NameChange::Remove(..) => {}
            }
        }
        self.durable_names.clone_from(&names);
        self.names = names;
    }
}

/// Whether the one that is to fail has come.
fn countdown(left: &mut Option<u64>) -> bool {
    match left {
        Some(0) => {
            *left = None;
            true
        }
        Some(count) => {
            *count -= 1;
            false
        }
        None => false,
    }
}

impl Inode {
    fn sector(&self, sector: usize) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        let start = (sector * SECTOR).min(self.live.len());
        let end = (start + SECTOR).min(self.live.len());
        bytes[..end - start].copy_from_slice(&self.live[start..end]);
        bytes
    }

    fn write(&mut self, bytes: &[u8], offset: usize) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + bytes.len();
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let before = self.sector(sector);
            match self.dirty.get_mut(&sector) {
                None => {
                    self.dirty.insert(sector, Vec::new());
                }
                Some(versions) => {
                    if versions.len() == SECTOR_VERSIONS {
                        versions.remove(0);
                    }
                    versions.push(before);
                }
            }
        }
        if self.live.len() < end {
            self.live.resize(end, 0);
        }
        self.live[offset..end].copy_from_slice(bytes);
    }

    fn sync(&mut self) {
        self.durable.resize(self.live.len(), 0);
        for sector in std::mem::take(&mut self.dirty).into_keys() {
            let start = (sector * SECTOR).min(self.live.len());
            let end = (start + SECTOR).min(self.live.len());
            self.durable[start..end].copy_from_slice(&self.live[start..end]);
        }
    }
}

impl Disk for SimDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let mut state = self.changing()?;
        if state.names.contains_key(name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.names.insert(name.to_owned(), inode);
        state.name_changes.push(NameChange::Create(name.to_owned(), inode));
        Ok(self.handle(inode))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let inode = self.powered()?.lookup(name)?;
        Ok(self.handle(inode))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.changing()?;
        let inode = state.lookup(from)?;
        state.names.remove(from);
        state.names.insert(to.to_owned(), inode);
        state.name_changes.push(NameChange::Rename(from.to_owned(), to.to_owned(), inode));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.changing()?;
        let inode = state.lookup(name)?;
        state.names.remove(name);
        state.name_changes.push(NameChange::Remove(name.to_owned(), inode));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.powered()?.names.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.changing()?;
        if state.sync_fault() {
            return Err(io::Error::other("injected failure of a directory sync"));
        }
        state.name_changes.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl File for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.powered()?.inodes[self.inode].live.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.powered()?;
        let live = &state.inodes[self.inode].live;
        let start = (offset as usize).min(live.len());
        let count = buffer.len().min(live.len() - start);
        buffer[..count].copy_from_slice(&live[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.changing()?;
        state.write_calls += 1;
        let offset = offset as usize;
        if countdown(&mut state.faults.fail_write_after) {
            let part = state.below(bytes.len() + 1);
            state.inodes[self.inode].write(&bytes[..part], offset);
            return Err(io::Error::other("injected failure of a write"));
        }
        state.make_room(self.inode, offset + bytes.len())?;
        state.inodes[self.inode].write(bytes, offset);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.changing()?;
        if state.sync_fault() {
            state.inodes[self.inode].dirty.clear();
            return Err(io::Error::other("injected failure of a sync"));
        }
        state.inodes[self.inode].sync();
        Ok(())
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        let mut state = self.disk.changing()?;
        let size = size as usize;
        state.make_room(self.inode, size)?;
        let inode = &mut state.inodes[self.inode];
        if inode.live.len() < size {
            inode.live.resize(size, 0);
        }
        Ok(())
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        let mut state = self.disk.changing()?;
        let size = size as usize;
        state.make_room(self.inode, size)?;
        let inode = &mut state.inodes[self.inode];
        if size < inode.live.len() {
            // Bytes that come back by growing again are zeros, synced or not.
            let (end, first) = (inode.live.len(), size);
            inode.write(&vec![0; end - first], first);
        }
        inode.live.resize(size, 0);
        Ok(())
    }
}
