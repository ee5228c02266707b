//! A cluster, its network and its clients in virtual time.
//!
//! One queue of events decides what happens next; the seed decides everything else. Times are true
//! microseconds since the run began; nodes see only their own clocks.

mod broker;
mod clients;
mod consumer;
mod elsewhere;
mod faults;
mod host;
mod links;
mod observe;
mod placement;
pub mod queue;
mod settle;

use std::collections::{BTreeMap, BTreeSet};

use flux_core::replica::{Now, SnapshotMeta};
use raft::eraftpb::Message;

use crate::check::consensus::Consensus;
use crate::check::feed::{Counts, Feed};
use crate::check::history::History;
use crate::check::reference::Reference;
use crate::check::{Promise, Violation};
use crate::client::{Client, Request, Response};
use crate::clock::NodeClock;
use crate::network::Network;
use crate::node::{
    Asked, Frame, Options, Outgoing, Output, Process, SnapshotParcel, Surroundings, Work,
};
use crate::plan::{Fault, MS, Plan};
use crate::plant::Plant;
use crate::random::Random;
use crate::trace::Trace;
use broker::Broker;
use consumer::Consumer;
use elsewhere::Failed;
use host::Host;
use links::Link;
use queue::Queue;

/// Events of a run at the most: a run that needs more goes in a circle.
const MAX_EVENTS: u64 = 20_000_000;
/// What waits for a process at the most; what comes then is lost.
const INBOX: usize = 10_000;
/// Violations after which a run ends.
const ENOUGH_VIOLATIONS: usize = 3;

/// Something that happens. Those of a process carry its number, and are void when it has ended.
#[derive(Debug)]
enum Event {
    Turn(usize, u64),
    Synced(usize, u64),
    Tick(usize, u64),
    /// For the node of the number, wherever it runs.
    Message(u32, u16, Message),
    /// What a node says to the process of a host.
    Frame(usize, u32, Frame),
    /// A connection between two hosts is found to be broken.
    LinkBreaks(usize, usize, u64),
    /// A connection of a node to a host has ended with its process.
    LinkEnded(usize, u32),
    LinkOpens(usize, usize),
    /// A new connection of a node has reached a host.
    LinkOpened(usize, u32),
    Snapshot(usize, SnapshotParcel),
    SnapshotReport(usize, u64, u16, u64, bool),
    Unreachable(usize, u64, u16, u64),
    Request(usize, Request),
    Response(u32, u64, usize, Response),
    ClientActs(u32),
    ClientTimesOut(u32, u64, usize),
    Fault,
    Heal,
    LinksRecover,
    PowerFails(usize, u64),
    Start(usize),
    Thaw(usize),
    MapArrives(usize),
    KeepHouse(usize),
    /// A node that lost its data is replaced.
    Replace(u32),
    /// A message reaches the broker.
    Published(Outgoing),
    /// A process's question has come to a host; when it was asked.
    Asked(usize, u64, usize, Asked, u64),
    /// What the broker or another node says reaches a process.
    BrokerSays(usize, u64, Work),
    BrokerRecovers,
    Consume,
    ConsumerStarts,
    /// Faults end.
    Settle,
    /// Is all well again?
    Inspect,
}

/// What a run was like.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What went wrong; empty for a good run.
    pub violations: Vec<Violation>,
    /// Hash of all that happened.
    pub hash: u64,
    /// Virtual time that passed.
    pub virtual_us: u64,
    /// Events handled.
    pub events: u64,
    /// Operations in the history.
    pub operations: u64,
    /// Faults by kind.
    pub faults: BTreeMap<Fault, u64>,
    /// Terms with a leader, over all partitions.
    pub terms: u64,
    /// Snapshots that a replica took in from another.
    pub snapshots: u64,
    /// Messages between nodes, and how many of them were lost.
    pub messages: u64,
    /// Messages between nodes that were lost.
    pub lost: u64,
    /// Nodes that lost their data and came back as others.
    pub replaced: u64,
    /// Times that a whole group fell asleep.
    pub naps: u64,
    /// What came to the broker.
    pub feed: Counts,
    /// Gaps that nodes told of.
    pub gaps: u64,
    /// Changes that a node had which another one's log lacked.
    pub elsewhere: u64,
}

/// A run under way.
pub struct World {
    plan: Plan,
    now_us: u64,
    queue: Queue<Event>,
    random: Random,
    hosts: Vec<Host>,
    network: Network,
    /// Connections, by the hosts that they come from and go to.
    frame_links: Vec<Link>,
    clients: Vec<Client>,
    trace: Trace,
    history: History,
    consensus: Consensus,
    reference: Reference,
    broker: Broker,
    consumer: Consumer,
    feed: Feed,
    /// Questions that came to nothing, by who asked, for what, and whom.
    failed_asks: BTreeMap<(u64, u16, u64, u32), Failed>,
    /// The voters that each partition should have.
    targets: Vec<Vec<u64>>,
    /// The epoch of the map that has them.
    epoch: u64,
    next_sequence: u32,
    next_process: u64,
    next_node: u32,
    /// Leaders that sleep.
    asleep: BTreeSet<u64>,
    /// Replicas whose data is lost.
    lost: BTreeSet<u64>,
    outcome: Outcome,
    settling: bool,
    done: bool,
}

impl World {
    /// A cluster that is about to start.
    pub fn new(plan: Plan, trace: Trace) -> World {
        let mut random = Random::new(plan.seed);
        let network = Network::new(plan.hosts, plan.links.clone(), random.fork());
        let mut clocks = random.fork();
        let hosts: Vec<Host> = (0..plan.hosts)
            .map(|place| {
                let rate = faults::rate(&mut clocks, &plan);
                let start = clocks.between(1, 1_000_000_000);
                let skew = clocks.below(2000) as i64 - 1000;
                let clock = NodeClock::new(0, start, rate, skew);
                Host::new(place as u32 + 1, clock, clocks.any())
            })
            .collect();
        let mut client_seeds = random.fork();
        let clients =
            (0..plan.clients).map(|id| Client::new(id, &plan, client_seeds.fork())).collect();
        let frame_links = vec![Link::default(); plan.hosts * plan.hosts];
        let mut world = World {
            now_us: 0,
            queue: Queue::new(),
            random,
            next_node: hosts.len() as u32 + 1,
            hosts,
            network,
            frame_links,
            clients,
            trace,
            history: History::default(),
            consensus: Consensus::default(),
            reference: Reference::default(),
            broker: Broker::default(),
            consumer: Consumer::default(),
            feed: Feed::default(),
            failed_asks: BTreeMap::new(),
            targets: Vec::new(),
            epoch: 0,
            next_sequence: 1,
            next_process: 1,
            asleep: BTreeSet::new(),
            lost: BTreeSet::new(),
            outcome: Outcome::default(),
            settling: false,
            done: false,
            plan,
        };
        world.found();
        world
    }

    /// Starts everything.
    fn found(&mut self) {
        for partition in 0..self.plan.partitions {
            let mut places: Vec<usize> = (0..self.plan.hosts).collect();
            self.random.shuffle(&mut places);
            places.truncate(self.plan.replication);
            let ids = places.into_iter().map(|place| self.new_replica(place)).collect();
            self.trace.line(0, format_args!("p{partition} begins with {ids:x?}"));
            self.targets.push(ids);
            let founding = SnapshotMeta::founding(Vec::new());
            self.reference.begins(partition, founding.position.term);
        }
        for place in 0..self.hosts.len() {
            self.hosts[place].targets = self.targets.clone();
            self.start(place);
            self.found_replicas(place);
            self.queue.push(self.random.below(100 * MS), Event::KeepHouse(place));
        }
        for client in 0..self.plan.clients {
            let at = self.random.between(100 * MS, 500 * MS);
            self.queue.push(at, Event::ClientActs(client));
        }
        if !self.plan.faults.is_empty() {
            self.queue.push(500 * MS, Event::Fault);
        }
        self.queue.push(self.plan.duration_us, Event::Settle);
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        while !self.done && self.outcome.violations.len() < ENOUGH_VIOLATIONS {
            let Some((at, event)) = self.queue.pop() else { break };
            self.now_us = at;
            if self.trace.events() >= MAX_EVENTS {
                self.violated(Violation::new(Promise::Recovers, "too many events"));
                break;
            }
            self.handle(event);
        }
        self.outcome.hash = self.trace.hash();
        self.outcome.virtual_us = self.now_us;
        self.outcome.events = self.trace.events();
        self.outcome.operations = self.history.len() as u64;
        self.outcome.terms = self.consensus.terms() as u64;
        self.outcome.lost = self.network.lost;
        self.outcome.feed = self.feed.counts;
        self.outcome
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Turn(host, process) => self.turn(host, process),
            Event::Synced(host, process) => self.synced(host, process),
            Event::Tick(host, process) => self.tick(host, process),
            Event::Message(node, partition, message) => {
                if let Some(host) = self.hosts.iter().position(|host| host.node == node) {
                    self.note(1, &[host as u64, u64::from(partition), message.from, message.index]);
                    self.deliver(host, Work::Message(partition, message));
                }
            }
            Event::Frame(host, from, frame) => {
                self.note(12, &[host as u64, u64::from(from)]);
                self.deliver(host, Work::Frame(from, frame));
            }
            Event::LinkBreaks(from, to, session) => self.link_breaks(from, to, session),
            Event::LinkEnded(host, node) => self.deliver(host, Work::LinkDown(node)),
            Event::LinkOpens(from, to) => self.link_opens(from, to),
            Event::LinkOpened(host, node) => self.deliver(host, Work::LinkUp(node)),
            Event::Snapshot(host, parcel) => self.deliver(host, Work::Snapshot(parcel)),
            Event::SnapshotReport(host, process, partition, to, arrived) => {
                self.for_process(host, process, Work::SnapshotReport(partition, to, arrived));
            }
            Event::Unreachable(host, process, partition, to) => {
                self.for_process(host, process, Work::Unreachable(partition, to));
            }
            Event::Request(host, request) => self.deliver(host, Work::Request(request)),
            Event::Response(client, attempt, from, response) => {
                self.client_receives(client, (attempt, from), Some(response));
            }
            Event::ClientActs(client) => self.client_acts(client),
            Event::ClientTimesOut(client, attempt, host) => {
                self.client_receives(client, (attempt, host), None);
            }
            Event::Fault => self.fault(),
            Event::Heal => self.heal(),
            // They are calm already when faults have ended.
            Event::LinksRecover if self.settling => {}
            Event::LinksRecover => self.network.set_quality(self.plan.links.clone()),
            Event::PowerFails(host, process) => self.power_fails(host, process),
            Event::Start(host) => self.start(host),
            Event::Thaw(host) => self.thaw(host),
            Event::MapArrives(host) => self.map_arrives(host),
            Event::KeepHouse(host) => self.keep_house(host),
            Event::Replace(node) => self.replace(node),
            Event::Published(outgoing) => self.published(&outgoing),
            Event::BrokerSays(host, process, work) => self.for_process(host, process, work),
            Event::Asked(host, process, target, asked, since_us) => {
                self.asked((host, process), target, asked, since_us);
            }
            Event::BrokerRecovers => self.broker_recovers(),
            Event::Consume => self.consume(),
            Event::ConsumerStarts => self.start_consumer(),
            Event::Settle => self.settle(),
            Event::Inspect => self.inspect(),
        }
    }

    /// Takes an event into the trace's hash.
    fn note(&mut self, kind: u64, words: &[u64]) {
        self.trace.event(self.now_us, kind);
        for word in words {
            self.trace.word(*word);
        }
    }

    fn say(&mut self, text: std::fmt::Arguments<'_>) {
        self.trace.line(self.now_us, text);
    }

    fn violated(&mut self, violation: Violation) {
        // One of a kind tells enough.
        if self.outcome.violations.iter().any(|known| known.promise == violation.promise) {
            return;
        }
        self.trace.line(self.now_us, format_args!("VIOLATION {violation}"));
        self.outcome.violations.push(violation);
    }

    /// The process of a host, if it is the one meant.
    fn process(&mut self, host: usize, number: u64) -> Option<&mut Process> {
        self.hosts[host].process.as_mut().filter(|process| process.number == number)
    }

    fn deliver(&mut self, host: usize, work: Work) {
        let Some(process) = &mut self.hosts[host].process else { return };
        if process.inbox.len() < INBOX {
            process.inbox.push(work);
            self.wake(host);
        }
    }

    fn for_process(&mut self, host: usize, number: u64, work: Work) {
        if self.process(host, number).is_some() {
            self.deliver(host, work);
        }
    }

    /// Sees to it that a process takes a turn soon.
    fn wake(&mut self, host: usize) {
        let delay = self.random.between(5, 60);
        let machine = &mut self.hosts[host];
        if machine.turn_due || machine.frozen_until.is_some() {
            return;
        }
        let Some(process) = &machine.process else { return };
        machine.turn_due = true;
        self.queue.push(self.now_us + delay, Event::Turn(host, process.number));
    }

    fn tick(&mut self, host: usize, number: u64) {
        if self.process(host, number).is_none() {
            return;
        }
        let machine = &mut self.hosts[host];
        if let Some(until) = machine.frozen_until {
            self.queue.push(until, Event::Tick(host, number));
            return;
        }
        // Never sooner than a tick after the last one, whatever was missed: a promise that is counted in
        // ticks would pass too soon.
        let shown = machine.clock.monotonic_us(self.now_us);
        let in_bursts = self.plan.plant == Some(Plant::TicksInBursts);
        machine.ticked_us = if in_bursts { machine.ticked_us + self.plan.tick_us } else { shown };
        let next = machine.clock.true_us(machine.ticked_us + self.plan.tick_us);
        self.queue.push(next.max(self.now_us), Event::Tick(host, number));
        self.deliver(host, Work::Tick);
    }

    fn turn(&mut self, host: usize, number: u64) {
        if self.process(host, number).is_none() {
            return;
        }
        let now_us = self.now_us;
        let sync_early = self.random.per_mille(500);
        let machine = &mut self.hosts[host];
        machine.turn_due = false;
        if machine.frozen_until.is_some() {
            return;
        }
        let now = node_now(&self.plan, machine, now_us);
        let stopped_at = machine.stopped_at.take();
        let stale = self.plan.plant == Some(Plant::StaleClock);
        let read_now = stopped_at.filter(|_| stale).unwrap_or(now);
        let nodes: Vec<u32> = self.hosts.iter().map(|host| host.node).collect();
        let Host { process, targets, epoch, .. } = &mut self.hosts[host];
        let Some(process) = process else { return };
        let waiting = process.inbox.len() as u64;
        let (epoch, nodes) = (*epoch, &nodes);
        let output =
            process.turn(Surroundings { now, read_now, targets, epoch, nodes, sync_early });
        self.note(2, &[host as u64, waiting]);
        self.carry_out(host, number, output);
    }

    fn synced(&mut self, host: usize, number: u64) {
        if self.process(host, number).is_none() {
            return;
        }
        let machine = &mut self.hosts[host];
        if let Some(until) = machine.frozen_until {
            self.queue.push(until, Event::Synced(host, number));
            return;
        }
        let Some(process) = &mut machine.process else { return };
        let output = process.synced();
        self.note(3, &[host as u64]);
        self.carry_out(host, number, output);
    }

    /// Does what a turn left to be done.
    fn carry_out(&mut self, host: usize, number: u64, output: Output) {
        self.observe_appended(host, &output);
        for (partition, message) in output.messages {
            self.observe_message(partition, &message);
            self.send(host, number, partition, message);
        }
        for (node, frame) in output.frames {
            self.send_frame(host, node, frame);
        }
        for node in output.resets {
            self.link_resets(host, node);
        }
        for snapshot in output.snapshots {
            self.send_snapshot(host, number, snapshot);
        }
        for (partition, from, to, installed) in output.received {
            self.outcome.snapshots += u64::from(installed);
            self.report_received(partition, from, to, installed);
        }
        for (waiter, partition, reply) in output.replies {
            self.reply(host, waiter, partition, reply);
        }
        for note in output.notes {
            self.say(format_args!("h{host} {note}"));
        }
        if output.syncing {
            let slow = self.hosts[host].slow_until > self.now_us;
            let (low, high) = self.plan.sync_us;
            let lasts = self.random.between(low, if slow { high * 40 } else { high });
            self.queue.push(self.now_us + lasts, Event::Synced(host, number));
        }
        self.hosts[host].released |= output.released;
        for told in &output.gaps {
            self.observe_gap(host, number, told);
        }
        for asked in output.asked {
            self.ask_elsewhere(host, number, asked);
        }
        if output.connects {
            self.connect(host, number);
        }
        for outgoing in output.publications {
            self.publish(outgoing);
        }
        if let Some(reason) = output.failed {
            self.process_failed(host, &reason);
            return;
        }
        if output.again {
            self.wake(host);
        }
        self.observe(host);
    }

    fn send(&mut self, host: usize, number: u64, partition: u16, message: Message) {
        self.outcome.messages += 1;
        let node = (message.to >> 32) as u32;
        let to = message.to;
        let Some(target) = self.hosts.iter().position(|host| host.node == node) else { return };
        if target == host {
            return;
        }
        let [first, second] = self.network.send(self.now_us, host, target);
        if first.is_none() && self.random.per_mille(100) {
            // A connection that broke tells its owner.
            let at = self.now_us + self.random.between(MS, 50 * MS);
            self.queue.push(at, Event::Unreachable(host, number, partition, to));
        }
        if let Some(at) = second {
            self.queue.push(at, Event::Message(node, partition, message.clone()));
        }
        if let Some(at) = first {
            self.queue.push(at, Event::Message(node, partition, message));
        }
    }

    fn send_snapshot(
        &mut self,
        host: usize,
        number: u64,
        snapshot: Result<SnapshotParcel, (u16, u64)>,
    ) {
        let late = self.now_us + self.random.between(20 * MS, 300 * MS);
        let (partition, to) = match &snapshot {
            Ok(parcel) => (parcel.partition, parcel.to),
            Err(failed) => *failed,
        };
        let node = (to >> 32) as u32;
        let target = self.hosts.iter().position(|host| host.node == node);
        let arrives = target.and_then(|target| {
            let [first, _] = self.network.send(self.now_us, host, target);
            Some((target, first?))
        });
        match (snapshot, arrives) {
            (Ok(parcel), Some((target, at))) => {
                self.say(format_args!(
                    "h{host} p{partition} sends a snapshot at {} to h{target}",
                    parcel.meta.position.index
                ));
                let at = at + self.random.between(MS, 100 * MS);
                self.queue.push(at, Event::Snapshot(target, parcel));
                // Lost with the process that takes it in: the sender learns that in the end.
                let gives_up = late + 500 * MS;
                self.queue
                    .push(gives_up, Event::SnapshotReport(host, number, partition, to, false));
            }
            _ => self.queue.push(late, Event::SnapshotReport(host, number, partition, to, false)),
        }
    }

    /// Tells the sender of a snapshot what became of it.
    fn report_received(&mut self, partition: u16, from: u64, to: u64, installed: bool) {
        let node = (from >> 32) as u32;
        let Some(sender) = self.hosts.iter().position(|host| host.node == node) else { return };
        let Some(process) = &self.hosts[sender].process else { return };
        let (number, at) = (process.number, self.now_us + self.random.between(100, 5 * MS));
        self.queue.push(at, Event::SnapshotReport(sender, number, partition, to, installed));
    }
}

/// What a process takes for the time.
fn node_now(plan: &Plan, host: &Host, now_us: u64) -> Now {
    let now = host.now(now_us);
    match plan.plant {
        Some(Plant::WallClockLease) => Now { us: now.ms * 1000, ..now },
        _ => now,
    }
}

/// The options of a host's process.
fn options(plan: &Plan, host: &Host) -> Options {
    Options::new(plan, host.node, plan.seed ^ (u64::from(host.node) << 40))
}
