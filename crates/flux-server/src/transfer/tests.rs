//! Two nodes' transfers over real sockets, with simulated disks and a door between them that can cut,
//! corrupt or hold what passes.

mod door;
mod junk;
mod whole;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use flux_core::replica::Position;
use flux_core::store::{Entry, Memory, TableOptions};
use flux_log::{SimDisk, Snapshot, SnapshotWriter};
use parking_lot::Mutex;
use tokio::runtime::Runtime;

use super::*;
use door::{Act, Door};

/// When a test has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const PARTITION: u16 = 3;
const INDEX: u64 = 500;
const SENDER: u64 = 0x1_0000_0001;
const REPLICA: u64 = 0x2_0000_0001;

/// Entries of a table, by key.
type Contents = BTreeMap<Vec<u8>, (Vec<u8>, u64)>;

/// A transfer that arrived.
struct Arrival {
    id: SnapshotId,
    /// From and to.
    replicas: [u64; 2],
    term: u64,
    meta: SnapshotMeta,
    contents: Contents,
}

/// Stands in for the replicas of the receiving node.
struct Fake {
    memory: Arc<Memory>,
    wants: AtomicBool,
    installs: AtomicBool,
    asked: AtomicUsize,
    arrivals: Mutex<Vec<Arrival>>,
}

impl Replicas for Fake {
    fn wanted(&self, _: &SnapshotOffer<'_>) -> Option<Table> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let options = TableOptions { hash_seed: 77, shards: 2 };
        let wants = self.wants.load(Ordering::Relaxed);
        wants.then(|| Table::new(options, Arc::clone(&self.memory)))
    }

    fn received(&self, received: Received) {
        let Received { id, replica_from, replica_to, term, meta, table, installed } = received;
        let replicas = [replica_from, replica_to];
        let arrival = Arrival { id, replicas, term, meta, contents: contents(&table) };
        self.arrivals.lock().push(arrival);
        let _ = installed.send(self.installs.load(Ordering::Relaxed));
    }
}

fn contents(table: &Table) -> Contents {
    let mut all = Contents::new();
    let mut from = Some(flux_core::store::Position(0));
    while let Some(position) = from {
        from = table.scan(position, 100, |entry: Entry<'_>| {
            all.insert(entry.key.to_vec(), (entry.value.to_vec(), entry.version));
        });
    }
    all
}

fn meta(index: u64) -> SnapshotMeta {
    let position = Position { index, term: 2 };
    SnapshotMeta { position, revision: index * 2, ..SnapshotMeta::default() }
}

fn id(partition: u16) -> SnapshotId {
    SnapshotId { partition, index: INDEX }
}

/// Writes a snapshot of some table with chunks of about 4 KiB; returns what it holds.
fn write_snapshot(disk: &SimDisk, id: SnapshotId, entries: u64) -> Contents {
    let table = Table::new(TableOptions { hash_seed: 5, shards: 4 }, Memory::new(0));
    for number in 0..entries {
        let key = format!("key-{number}");
        let value = vec![number as u8; 100 + number as usize % 100];
        let hash = table.hash(key.as_bytes());
        let entry = Entry {
            key: key.as_bytes(),
            value: &value,
            version: number + 1,
            expires_at_ms: None,
            written_at_s: 0,
        };
        table.put(hash, entry);
    }
    table.begin_snapshot();
    let disk = Arc::new(disk.clone());
    let meta = meta(id.index).encode();
    let mut writer = SnapshotWriter::create(disk, id.partition, id.index, &meta).unwrap();
    loop {
        let mut chunk = Vec::new();
        let complete = table.snapshot_chunk(4096, &mut chunk);
        writer.chunk(&chunk).unwrap();
        if complete {
            break;
        }
    }
    table.end_snapshot();
    writer.finish().unwrap();
    contents(&table)
}

/// Writes a snapshot again that holds the same, in chunks that do not follow each other as before.
fn write_again_in_other_chunks(disk: &SimDisk, id: SnapshotId) {
    let mut snapshot = Snapshot::open(disk, id).unwrap();
    let mut chunks = Vec::new();
    while let Some(chunk) = snapshot.next_chunk().unwrap() {
        chunks.push(chunk.to_vec());
    }
    let disk = Arc::new(disk.clone());
    let mut writer = SnapshotWriter::create(disk, id.partition, id.index, snapshot.meta()).unwrap();
    chunks.iter().rev().for_each(|chunk| writer.chunk(chunk).unwrap());
    writer.finish().unwrap();
}

fn quick() -> TransferLimits {
    TransferLimits {
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(20),
        ..TransferLimits::default()
    }
}

fn identity(node: u32) -> LocalIdentity {
    LocalIdentity { cluster: 7, node, instance: 9, worker: 3, workers: 4 }
}

/// A sending and a receiving node.
struct Pair {
    runtime: Runtime,
    from: SimDisk,
    to: SimDisk,
    fake: Arc<Fake>,
    sender: Option<Transfers>,
    door: Arc<Door>,
    /// What the sender tells, by partition.
    tell: mpsc::Sender<(u16, bool)>,
    told: mpsc::Receiver<(u16, bool)>,
}

impl Pair {
    fn new(limits: TransferLimits, plan: Vec<Act>) -> Pair {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (from, to) = (SimDisk::new(1), SimDisk::new(2));
        let fake = Arc::new(Fake {
            memory: Memory::new(0),
            wants: AtomicBool::new(true),
            installs: AtomicBool::new(true),
            asked: AtomicUsize::new(0),
            arrivals: Mutex::new(Vec::new()),
        });
        let start = |node, disk: &SimDisk| {
            let (disk, fake) = (Arc::new(disk.clone()), Arc::clone(&fake));
            Transfers::start(runtime.handle(), identity(node), disk, fake, limits)
        };
        let (sender, receiver) = (start(1, &from), start(2, &to));
        let door = Door::open(&runtime, receiver, plan);
        let (tell, told) = mpsc::channel();
        Pair { runtime, from, to, fake, sender: Some(sender), door, tell, told }
    }

    fn send(&self, partition: u16) {
        self.send_file(id(partition), 8);
    }

    fn send_file(&self, id: SnapshotId, term: u64) {
        let outgoing = Outgoing {
            node: 2,
            address: self.door.address,
            id,
            replica_from: SENDER,
            replica_to: REPLICA,
            term,
        };
        let tell = self.tell.clone();
        let sender = self.sender.as_ref().unwrap();
        sender.send(outgoing, move |taken| tell.send((id.partition, taken)).unwrap());
    }

    /// What the sender was told next.
    fn result(&self) -> (u16, bool) {
        self.told.recv_timeout(PATIENCE).expect("every job is answered")
    }

    fn file(disk: &SimDisk, partition: u16) -> Option<Vec<u8>> {
        disk.contents(&id(partition).file_name())
    }

    fn names(disk: &SimDisk) -> Vec<String> {
        disk.list().unwrap()
    }
}

/// Waits for another thread to get there.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::yield_now();
    }
}
