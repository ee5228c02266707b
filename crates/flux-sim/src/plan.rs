//! What a run will be like: everything that is decided before it begins, from its seed alone.

use clap::ValueEnum;

use crate::network::LinkQuality;
use crate::plant::Plant;
use crate::random::Random;

/// Microseconds in a millisecond, and in a second.
pub const MS: u64 = 1_000;
/// Microseconds in a second.
pub const SECOND: u64 = 1_000_000;

/// A kind of weather.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Any of the others but `beyond`, as the seed decides.
    #[default]
    Mixed,
    /// No faults.
    Calm,
    /// All kinds of faults, a few kinds in each run, one after the other.
    Weather,
    /// All kinds of faults, many at once.
    Storm,
    /// Clocks that run as differently as they may, and leaders that are cut off.
    Clocks,
    /// Power cuts and disks that fail.
    Disks,
    /// Replicas that move, and snapshots.
    Members,
    /// Groups with nothing to do, which sleep, and are woken by faults.
    Quiet,
    /// Messages that come so late that another leads by then.
    Late,
    /// Elections all the time, and nodes that lose power in them.
    Elections,
    /// A broker that comes and goes, and leaders that do.
    Feed,
    /// Clocks that run more differently than they may: reads are not checked.
    Beyond,
}

impl Profile {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Mixed => "mixed",
            Profile::Calm => "calm",
            Profile::Weather => "weather",
            Profile::Storm => "storm",
            Profile::Clocks => "clocks",
            Profile::Disks => "disks",
            Profile::Members => "members",
            Profile::Quiet => "quiet",
            Profile::Late => "late",
            Profile::Elections => "elections",
            Profile::Feed => "feed",
            Profile::Beyond => "beyond",
        }
    }
}

/// Something that goes wrong, or is asked of the cluster, during a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A node loses power, and what its disk had not synced.
    PowerCut,
    /// All nodes lose power at once.
    Blackout,
    /// A node's process is killed; what it wrote stays.
    Kill,
    /// A node's process is stopped for a while.
    Freeze,
    /// The nodes fall into two groups that do not hear each other.
    Split,
    /// A leader is cut off from all others.
    IsolateLeader,
    /// One direction of one link is cut.
    OneWay,
    /// Messages are lost, late and doubled.
    BadLinks,
    /// A node's syncs take long.
    SlowDisk,
    /// A sync fails.
    FailedSync,
    /// A write fails half-way.
    FailedWrite,
    /// A bit of what lies on a disk flips, and the node restarts.
    BitRot,
    /// A node's wall clock is set to another time.
    WallClock,
    /// A node's clocks get another speed.
    ClockRate,
    /// A leader is asked to hand over.
    Transfer,
    /// A replica moves to another node.
    Move,
    /// The broker stops, and starts again.
    BrokerDown,
    /// Connections to the broker break, before or after it has stored what is on its way.
    BrokerReset,
    /// No queue is bound to the exchange for a while: what comes is returned.
    BrokerUnbound,
    /// The consumer of the broker's queue is killed.
    ConsumerKill,
}

impl Fault {
    /// All kinds.
    pub const ALL: [Fault; 20] = [
        Fault::PowerCut,
        Fault::Blackout,
        Fault::Kill,
        Fault::Freeze,
        Fault::Split,
        Fault::IsolateLeader,
        Fault::OneWay,
        Fault::BadLinks,
        Fault::SlowDisk,
        Fault::FailedSync,
        Fault::FailedWrite,
        Fault::BitRot,
        Fault::WallClock,
        Fault::ClockRate,
        Fault::Transfer,
        Fault::Move,
        Fault::BrokerDown,
        Fault::BrokerReset,
        Fault::BrokerUnbound,
        Fault::ConsumerKill,
    ];

    /// Whether it needs a broker.
    pub fn is_of_broker(self) -> bool {
        matches!(
            self,
            Fault::BrokerDown | Fault::BrokerReset | Fault::BrokerUnbound | Fault::ConsumerKill
        )
    }
}

/// A run, before it begins. Times are in microseconds.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// The kind of weather; never `Mixed`.
    pub profile: Profile,
    /// The bug that the nodes have.
    pub plant: Option<Plant>,
    /// How many machines there are.
    pub hosts: usize,
    /// How many partitions.
    pub partitions: u16,
    /// Replicas of a partition.
    pub replication: usize,
    /// How long clients write and things go wrong.
    pub duration_us: u64,
    /// How long the cluster may take afterwards until all agree.
    pub settle_us: u64,
    /// The period of a replica's tick.
    pub tick_us: u64,
    /// Ticks until an election.
    pub election_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// By how much a clock's speed may be wrong, as the replicas are told, in percent.
    pub drift_percent: u8,
    /// By how much clocks' speeds are wrong at the most, in parts of a million.
    pub rate_ppm: u64,
    /// The links between nodes.
    pub links: LinkQuality,
    /// Time that a request or an answer takes.
    pub client_delay_us: (u64, u64),
    /// How many clients there are.
    pub clients: u32,
    /// Keys of a partition.
    pub keys: u16,
    /// How many of a thousand operations are reads, of one client or another.
    pub reads_per_mille: [u32; 4],
    /// A client's pause between two operations.
    pub think_us: (u64, u64),
    /// How long a client waits for an answer.
    pub timeout_us: u64,
    /// How long a sync takes.
    pub sync_us: (u64, u64),
    /// Size of a segment of the log, in bytes.
    pub segment_bytes: u64,
    /// A snapshot is taken when the log is as long, in bytes.
    pub snapshot_log_bytes: u64,
    /// Bytes of applied entries that stay in memory for followers.
    pub tail_bytes: usize,
    /// Whether nodes publish to a broker what they lead.
    pub publishes: bool,
    /// Changes in a message to the broker at the most.
    pub batch_max_events: usize,
    /// Memory for the recent changes of a replica.
    pub ring_bytes: usize,
    /// Log that is kept for the broker.
    pub retention_bytes: u64,
    /// Time between two faults.
    pub fault_every_us: (u64, u64),
    /// How long a fault lasts.
    pub fault_lasts_us: (u64, u64),
    /// Of a thousand nodes that go down so many come back at once.
    pub quick_start_per_mille: u32,
    /// The kinds of faults, each as often as it is to be likely.
    pub faults: Vec<Fault>,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64, profile: Profile, plant: Option<Plant>) -> Plan {
        let mut random = Random::new(seed ^ 0x706c_616e);
        let profile = match profile {
            Profile::Mixed => mixed(&mut random),
            other => other,
        };
        let mut plan = Plan::basic(seed, profile, plant, &mut random);
        plan.faults = faults(profile, &mut random);
        match profile {
            Profile::Mixed | Profile::Weather | Profile::Members => {}
            Profile::Calm => {
                plan.links.drop_per_mille = 0;
                plan.links.slow_per_mille = 0;
            }
            Profile::Storm => {
                plan.fault_every_us = (30 * MS, 400 * MS);
                plan.fault_lasts_us = (50 * MS, 1500 * MS);
            }
            Profile::Disks => plan.sync_us = (MS, 20 * MS),
            Profile::Quiet => {
                plan.tick_us = 10 * MS;
                plan.links.delay_us = (50, 500);
                plan.election_ticks = random.between(12, 30) as usize;
                plan.rate_ppm = u64::from(plan.drift_percent) * 10_000;
                plan.partitions = 3;
                plan.think_us = (50 * MS, 1500 * MS);
                plan.fault_every_us = (100 * MS, 800 * MS);
                plan.reads_per_mille = [600, 800, 900, 950];
            }
            Profile::Late => {
                plan.tick_us = 10 * MS;
                plan.links.slow_per_mille = 200;
                plan.links.slow_us = 3 * plan.tick_us * plan.election_ticks as u64;
                plan.links.in_order = false;
                plan.fault_lasts_us = (200 * MS, 1000 * MS);
                plan.reads_per_mille = [500, 800, 900, 990];
            }
            Profile::Elections => {
                plan.tick_us = 10 * MS;
                plan.links.slow_per_mille = 200;
                plan.links.drop_per_mille = 100;
                plan.fault_every_us = (20 * MS, 250 * MS);
                plan.fault_lasts_us = (5 * MS, 300 * MS);
            }
            Profile::Feed => {
                plan.partitions = random.between(1, 2) as u16;
                plan.segment_bytes = random.between(8, 16) * 1024;
                plan.snapshot_log_bytes = random.between(16, 64) * 1024;
                plan.reads_per_mille = [50, 50, 200, 600];
                plan.fault_every_us = (50 * MS, 800 * MS);
            }
            Profile::Clocks | Profile::Beyond => {
                // Long enough that what clocks differ by in it is more than a tick.
                plan.election_ticks = random.between(20, 40) as usize;
                plan.fault_lasts_us = (300 * MS, 2000 * MS);
                // With few writes one that hears nothing lacks nothing, and can be elected.
                if random.per_mille(700) {
                    plan.reads_per_mille = [960, 970, 980, 990];
                }
                plan.heartbeat_ticks = random.between(1, plan.election_ticks as u64 / 4) as usize;
                plan.tick_us = 10 * MS;
                plan.links.delay_us = (50, 500);
                let bound = u64::from(plan.drift_percent) * 10_000;
                plan.rate_ppm = if profile == Profile::Beyond { bound * 5 } else { bound };
            }
        }
        plan.publishing(&mut Random::new(seed ^ 0x6665_6564));
        plan.showing(plant);
        plan
    }

    /// How old a follower's table is, at most, where nothing goes wrong, by its own word in microseconds: a
    /// few rounds of heartbeats.
    pub fn usual_age_us(&self) -> u64 {
        (self.election_ticks + 4 * self.heartbeat_ticks) as u64 * self.tick_us
    }

    /// Whether reads must be right: not with clocks that are more wrong than replicas are told.
    pub fn checks_reads(&self) -> bool {
        self.profile != Profile::Beyond
    }

    /// Whether ages must be true as well: not by a wall clock, which is a bug that leases are to show.
    pub fn checks_ages(&self) -> bool {
        self.checks_reads() && self.plant != Some(Plant::WallClockLease)
    }

    /// The links as they are when all is well.
    pub fn calm_links(&self) -> LinkQuality {
        LinkQuality {
            slow_per_mille: 0,
            drop_per_mille: 0,
            duplicate_per_mille: 0,
            ..self.links.clone()
        }
    }

    /// What a planted bug needs to show, if that must come together.
    fn showing(&mut self, plant: Option<Plant>) {
        let Some(faults) = plant.and_then(Plant::faults) else { return };
        self.faults = faults.to_vec();
        self.fault_every_us = (20 * MS, 400 * MS);
        (self.hosts, self.partitions, self.replication) = (3, 4, 3);
        let timeout = self.tick_us * self.election_ticks as u64;
        self.fault_lasts_us = (timeout, 2 * timeout);
        self.reads_per_mille = [990; 4];
        self.quick_start_per_mille = 900;
    }

    /// Whether and how changes are published: as chance has it, but in the weather that is made for it.
    fn publishing(&mut self, random: &mut Random) {
        let for_it = self.profile == Profile::Feed;
        self.publishes = random.per_mille(500) || for_it;
        self.batch_max_events = [1, 5, 50][random.below(3) as usize];
        self.ring_bytes = random.between(1, 16) as usize * 1024;
        if random.per_mille(300) {
            self.retention_bytes = 2 * self.segment_bytes;
        }
        if !self.publishes {
            self.faults.retain(|fault| !fault.is_of_broker());
        }
    }

    fn basic(seed: u64, profile: Profile, plant: Option<Plant>, random: &mut Random) -> Plan {
        let hosts = random.between(3, 5) as usize;
        let tick_us = [10 * MS, 20 * MS, 50 * MS][random.below(3) as usize];
        let slow_network = random.per_mille(200);
        Plan {
            seed,
            profile,
            plant,
            hosts,
            partitions: random.between(1, 3) as u16,
            replication: if hosts == 5 && random.per_mille(200) { 5 } else { 3 },
            duration_us: random.between(8, 14) * SECOND,
            settle_us: 60 * SECOND,
            tick_us,
            election_ticks: random.between(10, 14) as usize,
            heartbeat_ticks: random.between(1, 3) as usize,
            drift_percent: 10,
            rate_ppm: random.below(100_000),
            links: LinkQuality {
                delay_us: if slow_network { (MS, 10 * MS) } else { (50, 2 * MS) },
                slow_per_mille: random.below(20) as u32,
                slow_us: random.between(10, 300) * MS,
                drop_per_mille: random.below(10) as u32,
                duplicate_per_mille: random.below(10) as u32,
                in_order: random.per_mille(500),
            },
            client_delay_us: (50, MS),
            clients: random.between(4, 9) as u32,
            keys: random.between(2, 8) as u16,
            reads_per_mille: [50, 300, 600, 950],
            think_us: (MS, random.between(10, 60) * MS),
            timeout_us: random.between(100, 600) * MS,
            sync_us: (100, random.between(1, 10) * MS),
            segment_bytes: random.between(8, 64) * 1024,
            snapshot_log_bytes: random.between(16, 256) * 1024,
            tail_bytes: [512, 4 * 1024, 64 * 1024][random.below(3) as usize],
            publishes: false,
            batch_max_events: 1,
            ring_bytes: 0,
            retention_bytes: u64::MAX,
            fault_every_us: (100 * MS, 1500 * MS),
            fault_lasts_us: (50 * MS, 2000 * MS),
            quick_start_per_mille: 300,
            faults: Vec::new(),
        }
    }
}

fn mixed(random: &mut Random) -> Profile {
    match random.below(23) {
        0 => Profile::Calm,
        1..7 => Profile::Weather,
        7..11 => Profile::Storm,
        11..14 => Profile::Members,
        14 => Profile::Clocks,
        15 => Profile::Quiet,
        16 => Profile::Elections,
        17 => Profile::Late,
        18..21 => Profile::Feed,
        _ => Profile::Disks,
    }
}

/// The faults of a run. Not all kinds in every run: what one kind hides, another run shows (Groce and
/// others, "Swarm testing", 2012).
fn faults(profile: Profile, random: &mut Random) -> Vec<Fault> {
    let favoured: &[Fault] = match profile {
        Profile::Calm => return vec![Fault::Transfer],
        Profile::Mixed | Profile::Weather | Profile::Storm => &[],
        Profile::Clocks | Profile::Beyond => &[
            Fault::IsolateLeader,
            Fault::OneWay,
            Fault::WallClock,
            Fault::ClockRate,
            Fault::Freeze,
            Fault::Kill,
        ],
        Profile::Disks => &[
            Fault::PowerCut,
            Fault::Blackout,
            Fault::FailedSync,
            Fault::FailedWrite,
            Fault::BitRot,
        ],
        Profile::Quiet => &[
            Fault::IsolateLeader,
            Fault::OneWay,
            Fault::Freeze,
            Fault::Kill,
            Fault::PowerCut,
            Fault::ClockRate,
            Fault::Transfer,
        ],
        Profile::Late => &[Fault::IsolateLeader, Fault::OneWay, Fault::Split],
        Profile::Elections => {
            &[Fault::PowerCut, Fault::Blackout, Fault::Split, Fault::IsolateLeader, Fault::OneWay]
        }
        Profile::Feed => &[
            Fault::BrokerDown,
            Fault::BrokerReset,
            Fault::BrokerUnbound,
            Fault::ConsumerKill,
            Fault::Transfer,
            Fault::IsolateLeader,
            Fault::Kill,
        ],
        Profile::Members => &[Fault::Move, Fault::Transfer, Fault::PowerCut, Fault::Kill],
    };
    let mut faults: Vec<Fault> = favoured.iter().flat_map(|fault| [*fault; 3]).collect();
    let share = if favoured.is_empty() { 500 } else { 200 };
    faults.extend(Fault::ALL.iter().filter(|_| random.per_mille(share)));
    if faults.is_empty() {
        faults.push(Fault::PowerCut);
    }
    faults
}
