//! A machine: its clocks and disks, and the process that runs on it, if one does.

use std::fmt;

use flux_core::replica::Now;
use flux_log::{Disk, SimDisk};

use crate::clock::NodeClock;
use crate::node::Process;

/// A machine of the simulated cluster.
pub struct Host {
    /// Its clocks.
    pub clock: NodeClock,
    /// The node's number: another one after its data was lost.
    pub node: u32,
    /// The disk of the log.
    pub log_disk: SimDisk,
    /// The disk of the snapshots.
    pub snapshot_disk: SimDisk,
    /// The process, while it runs.
    pub process: Option<Process>,
    /// Until when the process is stopped.
    pub frozen_until: Option<u64>,
    /// What its clocks showed when it was stopped, until its next turn.
    pub stopped_at: Option<Now>,
    /// Until when syncs take long.
    pub slow_until: u64,
    /// A turn is in the queue of events.
    pub turn_due: bool,
    /// A power cut waits for the disk's next changes.
    pub cut_armed: bool,
    /// Bits of its disks have flipped.
    pub rotten: bool,
    /// Log of its disk went that a reader still needed.
    pub released: bool,
    /// The voters that each partition should have, as this node last heard.
    pub targets: Vec<Vec<u64>>,
    /// The epoch of the map that it heard of.
    pub epoch: u64,
    /// When its process last ticked, on its monotonic clock.
    pub ticked_us: u64,
}

impl Host {
    /// A machine that has not been started, with empty disks.
    pub fn new(node: u32, clock: NodeClock, disk_seed: u64) -> Host {
        Host {
            clock,
            node,
            log_disk: SimDisk::new(disk_seed),
            snapshot_disk: SimDisk::new(disk_seed ^ 1),
            process: None,
            frozen_until: None,
            stopped_at: None,
            slow_until: 0,
            turn_due: false,
            cut_armed: false,
            rotten: false,
            released: false,
            targets: Vec::new(),
            epoch: 0,
            ticked_us: 0,
        }
    }

    /// What its clocks show.
    pub fn now(&self, now_us: u64) -> Now {
        Now { ms: self.clock.wall_ms(now_us), us: self.clock.monotonic_us(now_us) }
    }

    /// Whether its process runs and is not stopped.
    pub fn is_awake(&self) -> bool {
        self.process.is_some() && self.frozen_until.is_none()
    }

    /// Whether both disks have power.
    pub fn is_powered(&self) -> bool {
        self.log_disk.list().is_ok() && self.snapshot_disk.list().is_ok()
    }

    /// The power of the disks goes: what was not synced may be lost.
    pub fn cut_disks(&mut self) {
        self.log_disk = self.log_disk.power_cut();
        self.snapshot_disk = self.snapshot_disk.power_cut();
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("node", &self.node).finish_non_exhaustive()
    }
}
