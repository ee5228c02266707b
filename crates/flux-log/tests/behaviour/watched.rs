//! A disk that has a reader look at the log in the middle of everything that the log does to its files.
//!
//! It does not look while a file is removed: then the reader would have to wait for the log.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use flux_log::{Disk, File, LogReader, Lsn, Scanned, SimDisk, State};

use crate::support::{Owned, scan};

/// A segment's header: its head is the batch behind it.
pub const SEGMENT_HEADER_BYTES: u64 = 64;

/// The records written, each with the LSN of its batch.
#[derive(Debug, Default)]
pub struct Model(pub Vec<(Lsn, Owned)>);

impl Model {
    /// The state of each partition before `lsn`.
    pub fn states(&self, lsn: Lsn) -> Vec<Owned> {
        let mut states: BTreeMap<u16, State> = BTreeMap::new();
        for (_, record) in self.0.iter().take_while(|(at, _)| *at < lsn) {
            if let Owned::State(state) = record {
                states.insert(state.partition, *state);
            }
        }
        states.into_values().map(Owned::State).collect()
    }

    /// What a scan of all visits where the oldest segment has this base.
    pub fn visible(&self, base: Lsn) -> Vec<(Lsn, Owned)> {
        let head = base + SEGMENT_HEADER_BYTES;
        let states = self.states(base).into_iter().map(|state| (head, state));
        states.chain(self.0.iter().filter(|(lsn, _)| *lsn >= base).cloned()).collect()
    }
}

#[derive(Debug)]
pub struct Watch {
    pub reader: LogReader,
    pub model: Model,
    pub looks: u64,
}

impl Watch {
    pub fn look(&mut self) {
        self.looks += 1;
        let base = self.reader.segments()[0].base;
        let (records, scanned) = scan(&self.reader, base);
        assert_eq!(scanned.unwrap(), Scanned::End(self.reader.written()));
        assert_eq!(records, self.model.visible(base));
    }
}

/// Clones are the same disk. It watches as soon as there is a watch.
#[derive(Clone, Debug)]
pub struct WatchedDisk {
    pub disk: SimDisk,
    pub watch: Arc<Mutex<Option<Watch>>>,
}

impl WatchedDisk {
    pub fn look(&self) {
        if let Some(watch) = &mut *self.watch.lock().unwrap() {
            watch.look();
        }
    }

    fn watched(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(WatchedFile { file, disk: self.clone() })
    }
}

impl Disk for WatchedDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.look();
        self.disk.create(name).map(|file| self.watched(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.disk.open(name).map(|file| self.watched(file))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.look();
        self.disk.rename(from, to)?;
        self.look();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.look();
        self.disk.sync_dir()
    }
}

#[derive(Debug)]
struct WatchedFile {
    file: Arc<dyn File>,
    disk: WatchedDisk,
}

impl File for WatchedFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let half = bytes.len() / 2;
        self.file.write_at(&bytes[..half], offset)?;
        self.disk.look();
        self.file.write_at(&bytes[half..], offset + half as u64)?;
        self.disk.look();
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.look();
        self.file.sync_data()
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.file.allocate(size)
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.file.truncate(size)
    }
}
