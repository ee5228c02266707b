//! What goes wrong, and how it ends.

use flux_log::{Disk, SimDisk};

use super::{Event, World, node_now, options};
use crate::network::LinkQuality;
use crate::node::{BootError, Process, Work};
use crate::plan::{Fault, MS, Plan};
use crate::random::Random;

/// By how much a wall clock is set wrong at the most.
const WALL_STEP_MS: u64 = 3_600_000;

/// How wrong the speed of a clock is, in parts of a million: often as wrong as it may be.
pub(super) fn rate(random: &mut Random, plan: &Plan) -> i64 {
    let most = plan.rate_ppm as i64;
    match random.below(8) {
        0..3 => most,
        3..6 => -most,
        _ => random.below(2 * plan.rate_ppm + 1) as i64 - most,
    }
}

impl World {
    /// Something happens, and later something else.
    pub(super) fn fault(&mut self) {
        if self.settling {
            return;
        }
        let (low, high) = self.plan.fault_every_us;
        let next = self.now_us + self.random.between(low, high);
        self.queue.push(next, Event::Fault);
        let Some(fault) = self.random.pick(&self.plan.faults).copied() else { return };
        let host = self.random.below(self.hosts.len() as u64) as usize;
        let (low, high) = self.plan.fault_lasts_us;
        let lasts = self.random.between(low, high);
        if self.inject(fault, host, lasts) {
            self.note(9, &[fault as u64, host as u64]);
            *self.outcome.faults.entry(fault).or_default() += 1;
        }
    }

    /// Does it, if it can be done now.
    fn inject(&mut self, fault: Fault, host: usize, lasts: u64) -> bool {
        let end = self.now_us + lasts;
        match fault {
            Fault::PowerCut => return self.cut_power(host, lasts),
            Fault::Blackout => {
                self.say(format_args!("blackout"));
                for host in 0..self.hosts.len() {
                    let down = self.random.between(10 * MS, lasts);
                    self.crash(host, true, down);
                }
            }
            Fault::Kill => {
                if self.hosts[host].process.is_none() {
                    return false;
                }
                self.say(format_args!("h{host} is killed"));
                let down = self.down_time(lasts);
                self.crash(host, false, down);
            }
            Fault::Freeze => return self.freeze(lasts),
            Fault::Split | Fault::IsolateLeader | Fault::OneWay => {
                self.cut_network(fault);
                self.queue.push(end, Event::Heal);
            }
            Fault::BadLinks => {
                self.say(format_args!("links get bad"));
                self.network.set_quality(bad_links(&mut self.random, &self.plan));
                self.queue.push(end, Event::LinksRecover);
            }
            Fault::SlowDisk => {
                self.say(format_args!("h{host} has a slow disk"));
                self.hosts[host].slow_until = end;
            }
            Fault::FailedSync | Fault::FailedWrite => return self.fail_disk(fault, host),
            Fault::BitRot => return self.rot(host),
            Fault::WallClock => {
                let step = self.random.below(2 * WALL_STEP_MS + 1) as i64 - WALL_STEP_MS as i64;
                // Most are small, as those of a time server.
                let step = if self.random.per_mille(700) { step / 1000 } else { step };
                self.say(format_args!("h{host} steps its wall clock by {step} ms"));
                self.hosts[host].clock.step_wall(step);
            }
            Fault::ClockRate => {
                let rate = rate(&mut self.random, &self.plan);
                self.say(format_args!("h{host} has a clock that is {rate} ppm fast"));
                self.hosts[host].clock.set_rate(self.now_us, rate);
            }
            Fault::BrokerDown | Fault::BrokerReset | Fault::BrokerUnbound => {
                self.trouble_broker(fault, host, lasts);
            }
            Fault::ConsumerKill => self.kill_consumer(),
            Fault::Transfer => return self.transfer(),
            Fault::Move => return self.move_replica(),
        }
        true
    }

    fn cut_network(&mut self, fault: Fault) {
        let count = self.hosts.len();
        match fault {
            Fault::Split => {
                let mut group: Vec<usize> = (0..count).collect();
                self.random.shuffle(&mut group);
                group.truncate(self.random.between(1, count as u64 - 1) as usize);
                self.say(format_args!("hosts {group:?} are cut off"));
                self.network.isolate(&group);
            }
            Fault::OneWay => {
                let leading = self.leading_host();
                let any = self.random.below(count as u64) as usize;
                let from = if self.random.per_mille(500) { leading } else { any };
                let to = (from + self.random.between(1, count as u64 - 1) as usize) % count;
                self.say(format_args!("h{to} does not hear h{from}"));
                self.network.cut(from, to);
            }
            _ => {
                let host = self.leading_host();
                self.say(format_args!("h{host} is cut off"));
                self.network.isolate(&[host]);
            }
        }
    }

    pub(super) fn heal(&mut self) {
        if self.network.is_cut() {
            self.say(format_args!("the network heals"));
            self.network.heal();
        }
    }

    /// A host with a leader, if there is one.
    fn leading_host(&mut self) -> usize {
        let leads = |host: &&usize| {
            let process = self.hosts[**host].process.as_ref();
            process.is_some_and(|one| one.hosted.values().any(|hosted| hosted.replica.leads()))
        };
        let places: Vec<usize> = (0..self.hosts.len()).collect();
        let leading: Vec<usize> = places.iter().filter(leads).copied().collect();
        let host = self.random.pick(&leading).or_else(|| places.first()).copied();
        host.unwrap_or(0)
    }

    /// How long a process is down: some come back at once.
    fn down_time(&mut self, lasts: u64) -> u64 {
        let quick = self.random.per_mille(self.plan.quick_start_per_mille);
        if quick { self.random.between(MS, 30 * MS) } else { lasts }
    }

    /// Cuts the power now, or in the middle of one of the disk's next changes.
    fn cut_power(&mut self, host: usize, lasts: u64) -> bool {
        let number = match &self.hosts[host].process {
            Some(process) if !self.hosts[host].cut_armed => process.number,
            _ => return false,
        };
        if self.random.per_mille(500) {
            let down = self.down_time(lasts);
            self.crash(host, true, down);
            return true;
        }
        let changes = self.random.below(8);
        self.say(format_args!("h{host} loses power after {changes} changes of its disks"));
        let machine = &mut self.hosts[host];
        machine.cut_armed = true;
        machine.log_disk.power_off_after(changes);
        machine.snapshot_disk.power_off_after(changes);
        self.queue.push(self.now_us + 100 * MS, Event::PowerFails(host, number));
        true
    }

    /// The power that was to fail by now does.
    pub(super) fn power_fails(&mut self, host: usize, number: u64) {
        if self.hosts[host].cut_armed && self.process(host, number).is_some() {
            let down = self.random.between(MS, 1000 * MS);
            self.crash(host, true, down);
        }
    }

    pub(super) fn disarm(&mut self, host: usize) {
        if self.hosts[host].cut_armed {
            self.crash(host, true, MS);
        }
    }

    /// The process is gone, and with `power` what the disks had not synced.
    pub(super) fn crash(&mut self, host: usize, power: bool, down_us: u64) {
        let now_us = self.now_us;
        let start = self.random.between(1, 1_000_000_000);
        let machine = &mut self.hosts[host];
        let was_down = machine.process.is_none();
        machine.process = None;
        machine.turn_due = false;
        machine.frozen_until = None;
        machine.stopped_at = None;
        if power {
            machine.cut_disks();
            machine.cut_armed = false;
            machine.clock.reboot(now_us, start);
            self.say(format_args!("h{host} has no power"));
        }
        self.note(10, &[host as u64, u64::from(power)]);
        self.links_end(host, power);
        if !was_down {
            self.queue.push(now_us + down_us, Event::Start(host));
        }
    }

    /// A process could not go on.
    pub(super) fn process_failed(&mut self, host: usize, reason: &str) {
        self.say(format_args!("h{host} ends: {reason}"));
        let power = !self.hosts[host].is_powered();
        let down = self.random.between(10 * MS, 500 * MS);
        self.crash(host, power, down);
    }

    /// Starts the process of a host.
    pub(super) fn start(&mut self, host: usize) {
        let machine = &self.hosts[host];
        if machine.process.is_some() {
            return;
        }
        let now = node_now(&self.plan, machine, self.now_us);
        let disks = (&machine.log_disk, &machine.snapshot_disk);
        let number = self.next_process;
        self.next_process += 1;
        let booted = Process::boot(number, disks, &options(&self.plan, machine), now);
        match booted {
            Ok(process) => {
                self.note(11, &[host as u64, process.hosted.len() as u64]);
                self.say(format_args!("h{host} starts with {} replicas", process.hosted.len()));
                let machine = &mut self.hosts[host];
                machine.process = Some(process);
                machine.turn_due = false;
                machine.ticked_us = machine.clock.monotonic_us(self.now_us);
                let phase = self.random.below(self.plan.tick_us);
                self.queue.push(self.now_us + phase, Event::Tick(host, number));
                self.links_begin(host);
                self.wake(host);
                self.observe(host);
            }
            Err(error) if error.is_damage() => {
                self.say(format_args!("h{host} cannot start: {error:?}"));
                self.lose_data(host);
            }
            Err(BootError::Log(error)) => self.restart_later(host, &error.to_string()),
            Err(error) => self.restart_later(host, &format!("{error:?}")),
        }
    }

    /// The disk failed while the process started: it tries again.
    fn restart_later(&mut self, host: usize, reason: &str) {
        self.say(format_args!("h{host} cannot start: {reason}"));
        if !self.hosts[host].is_powered() {
            self.hosts[host].cut_disks();
            self.hosts[host].cut_armed = false;
        }
        self.queue.push(self.now_us + 50 * MS, Event::Start(host));
    }

    fn freeze(&mut self, lasts: u64) -> bool {
        let leader = self.random.per_mille(600);
        let host = if leader {
            self.leading_host()
        } else {
            self.random.below(self.hosts.len() as u64) as usize
        };
        if !self.hosts[host].is_awake() {
            return false;
        }
        self.say(format_args!("h{host} is stopped"));
        let stopped_at = node_now(&self.plan, &self.hosts[host], self.now_us);
        let machine = &mut self.hosts[host];
        machine.frozen_until = Some(self.now_us + lasts);
        machine.stopped_at = Some(stopped_at);
        machine.turn_due = false;
        self.queue.push(self.now_us + lasts, Event::Thaw(host));
        true
    }

    pub(super) fn thaw(&mut self, host: usize) {
        if self.hosts[host].frozen_until.is_some_and(|until| until <= self.now_us) {
            self.thaw_now(host);
        }
    }

    pub(super) fn thaw_now(&mut self, host: usize) {
        self.say(format_args!("h{host} goes on"));
        self.hosts[host].frozen_until = None;
        self.wake(host);
    }

    fn fail_disk(&mut self, fault: Fault, host: usize) -> bool {
        let after = self.random.below(4);
        let machine = &self.hosts[host];
        if machine.process.is_none() {
            return false;
        }
        let disk: &SimDisk =
            if self.random.per_mille(700) { &machine.log_disk } else { &machine.snapshot_disk };
        if fault == Fault::FailedSync {
            disk.fail_sync_after(after);
        } else {
            disk.fail_write_after(after);
        }
        self.say(format_args!("h{host}: {fault:?} after {after}"));
        true
    }

    /// Flips a bit of what is surely durable, where that can be borne: all groups of the host are whole.
    fn rot(&mut self, host: usize) -> bool {
        let machine = &self.hosts[host];
        let Some(process) = &machine.process else { return false };
        let bearable = process.hosted.keys().all(|partition| {
            self.targets[usize::from(*partition)].len() > 2 && self.is_in_place(*partition)
        });
        // One at a time: a group bears the loss of one of three.
        let whole = self.hosts.iter().all(|host| !host.rotten);
        if !bearable || !whole {
            return false;
        }
        let (disk, name) = match self.random.per_mille(500) {
            true => (&machine.snapshot_disk, machine.snapshot_disk.list()),
            // The last segment ends in what only a later write will prove to have been durable.
            false => (&machine.log_disk, machine.log_disk.list().map(sealed)),
        };
        let disk = disk.clone();
        let Ok(names) = name else { return false };
        let Some(name) = self.random.pick(&names) else { return false };
        let size = disk.contents(name).map_or(0, |bytes| bytes.len() as u64);
        let (offset, bit) = (self.random.below(size), self.random.below(8) as u8);
        if !disk.flip_bit(name, offset, bit) {
            return false;
        }
        self.say(format_args!("h{host}: bit {bit} of byte {offset} of {name} flips"));
        self.hosts[host].rotten = true;
        self.crash(host, false, 10 * MS);
        true
    }

    fn transfer(&mut self) -> bool {
        let host = self.leading_host();
        let Some(process) = &self.hosts[host].process else { return false };
        let leads = process.hosted.iter().filter(|(_, one)| one.replica.leads());
        let led: Vec<u16> = leads.map(|(partition, _)| *partition).collect();
        let Some(partition) = self.random.pick(&led).copied() else { return false };
        let voters = process.replica(partition).map(|one| one.members().voters.clone());
        let to = self.random.pick(&voters.unwrap_or_default()).copied();
        let to = if self.random.per_mille(500) { None } else { to };
        self.deliver(host, Work::Transfer(partition, to));
        true
    }
}

/// The names of all segments but the last, in the order of their bases.
fn sealed(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.ends_with(".log"));
    names.sort_unstable();
    names.pop();
    names
}

fn bad_links(random: &mut Random, plan: &Plan) -> LinkQuality {
    LinkQuality {
        delay_us: (plan.links.delay_us.0, plan.links.delay_us.1 * random.between(1, 20)),
        slow_per_mille: random.below(300) as u32,
        slow_us: random.between(10, 1000) * MS,
        drop_per_mille: random.below(400) as u32,
        duplicate_per_mille: random.below(200) as u32,
        in_order: random.per_mille(300),
    }
}
