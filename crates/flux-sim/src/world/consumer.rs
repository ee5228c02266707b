//! A consumer of the broker's queue: it writes each record once into a file, and is killed now and then.
//!
//! As in `flux-cdc`'s consumer, around its real intake and ledger. The file is cut by a crash to anything between
//! what was synced and what was written, and is all that the consumer remembers.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use flux_cdc::Ledger;
use flux_cdc::consumer::intake::Intake;
use flux_proto::event::{Record, read_json, read_json_body, write_json};

use super::{Event, World};
use crate::check::feed::Replay;
use crate::check::{Promise, Violation};
use crate::plan::MS;
use crate::plant::Plant;

/// Deliveries that may be unacknowledged.
const PREFETCH: usize = 20;
/// How long what is ahead waits for what is missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// Lines are written and synced so often.
const WRITE_US: u64 = 100 * MS;

/// The queue and its consumer.
#[derive(Debug)]
pub(super) struct Consumer {
    /// Messages that wait, by their number in the queue.
    ready: VecDeque<(u64, Vec<u8>)>,
    /// Messages that are delivered and not acknowledged, by the tag of their delivery.
    unacknowledged: BTreeMap<u64, (u64, Vec<u8>)>,
    /// So many at the front of those that wait were delivered before.
    again: usize,
    stored: u64,
    next_tag: u64,
    /// None while the consumer does not run.
    intake: Option<Intake>,
    /// When time began: the intake knows only real clocks, of which nothing but differences counts.
    epoch: Instant,
    file: Vec<u8>,
    synced: usize,
    wrote_us: u64,
    is_due: bool,
}

impl Default for Consumer {
    fn default() -> Consumer {
        Consumer {
            ready: VecDeque::new(),
            unacknowledged: BTreeMap::new(),
            again: 0,
            stored: 0,
            next_tag: 1,
            intake: Some(Intake::new(Ledger::new(), PATIENCE, PREFETCH)),
            epoch: Instant::now(),
            file: Vec::new(),
            synced: 0,
            wrote_us: 0,
            is_due: false,
        }
    }
}

impl Consumer {
    /// Whether all that is in the queue is in the file.
    pub(super) fn has_all(&self) -> bool {
        self.ready.is_empty() && self.unacknowledged.is_empty() && self.synced == self.file.len()
    }

    fn acknowledge(&mut self, tag: u64, multiple: bool) {
        if multiple {
            self.unacknowledged = self.unacknowledged.split_off(&(tag + 1));
        } else {
            self.unacknowledged.remove(&tag);
        }
    }

    /// What was delivered and not acknowledged comes again, at its old place.
    fn give_back(&mut self) {
        let mut back: Vec<_> = std::mem::take(&mut self.unacknowledged).into_values().collect();
        back.sort_unstable_by_key(|(number, _)| *number);
        back.into_iter().rev().for_each(|one| self.ready.push_front(one));
    }

    /// What is delivered together next comes in another order: so many that come again behind those that were
    /// never delivered. RabbitMQ does so.
    fn mix(&mut self) {
        let together = PREFETCH.min(self.ready.len());
        let again = self.again.min(together);
        self.ready.make_contiguous()[..together].rotate_left(again);
    }

    /// The lines of the file, without one that lacks its end.
    fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.file.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"))
    }
}

impl World {
    /// A message is in the queue.
    pub(super) fn queued(&mut self, body: Vec<u8>) {
        self.consumer.stored += 1;
        let number = self.consumer.stored;
        self.consumer.ready.push_back((number, body));
        self.consumer_soon();
    }

    fn consumer_soon(&mut self) {
        if self.consumer.intake.is_some() && !self.consumer.is_due {
            self.consumer.is_due = true;
            self.queue.push(self.now_us + self.random.between(MS, 20 * MS), Event::Consume);
        }
    }

    /// The consumer takes what is there, and writes from time to time.
    pub(super) fn consume(&mut self) {
        self.consumer.is_due = false;
        let now = self.consumer.epoch + Duration::from_micros(self.now_us);
        let plant = self.plan.plant;
        let Consumer { intake, ready, unacknowledged, next_tag, file, .. } = &mut self.consumer;
        let Some(intake) = intake else { return };
        let mut early = Vec::new();
        while unacknowledged.len() < PREFETCH
            && let Some((number, body)) = ready.pop_front()
        {
            let tag = *next_tag;
            *next_tag += 1;
            let taken = intake.take(tag, &body, now);
            taken.expect("the broker's checker has read it");
            if plant == Some(Plant::NoDedup) {
                for record in read_json_body(&body).into_iter().flatten() {
                    write_json(&record, file);
                    file.push(b'\n');
                }
            }
            if plant == Some(Plant::AckBeforeWrite) {
                early.push(tag);
            }
            unacknowledged.insert(tag, (number, body));
        }
        let holes = intake.give_up(now);
        early.into_iter().for_each(|tag| self.consumer.acknowledge(tag, false));
        self.note(14, &[self.consumer.next_tag]);
        if let Some(hole) = holes.first() {
            let evidence = format!("a consumer gives up waiting for {hole}");
            self.violated(Violation::new(Promise::FeedOrdered, evidence));
        }
        if self.now_us >= self.consumer.wrote_us + WRITE_US {
            self.write_lines();
        }
        if !self.consumer.has_all() {
            self.consumer_soon();
        }
    }

    fn write_lines(&mut self) {
        let consumer = &mut self.consumer;
        consumer.wrote_us = self.now_us;
        let Some(intake) = &mut consumer.intake else { return };
        if self.plan.plant != Some(Plant::NoDedup) {
            consumer.file.extend_from_slice(intake.lines());
        }
        // A crash may come before the sync, or between it and the acknowledgement; often before there is anything.
        let dies_per_mille = if consumer.synced == 0 { 300 } else { 10 };
        if !self.settling && self.random.per_mille(dies_per_mille) {
            return self.kill_consumer();
        }
        consumer.synced = consumer.file.len();
        if !self.settling && self.random.per_mille(10) {
            return self.kill_consumer();
        }
        let acks = intake.written();
        acks.into_iter().for_each(|ack| consumer.acknowledge(ack.tag, ack.multiple));
    }

    /// The consumer is gone, and perhaps what it had not synced.
    pub(super) fn kill_consumer(&mut self) {
        if self.consumer.intake.take().is_none() {
            return;
        }
        let (synced, end) = (self.consumer.synced as u64, self.consumer.file.len() as u64);
        let kept = self.random.between(synced, end);
        self.consumer.file.truncate(kept as usize);
        self.consumer.again = self.consumer.unacknowledged.len();
        self.consumer.give_back();
        self.say(format_args!("the consumer is killed, with {kept} bytes of {end}"));
        self.note(15, &[kept]);
        let down = self.random.between(10 * MS, 500 * MS);
        self.queue.push(self.now_us + down, Event::ConsumerStarts);
    }

    /// The consumer starts with what its file says.
    pub(super) fn start_consumer(&mut self) {
        let mut ledger = Ledger::new();
        for record in self.consumer.lines().map(record) {
            ledger.note(&record);
        }
        let whole = self.consumer.lines().map(<[u8]>::len).sum();
        self.consumer.file.truncate(whole);
        self.consumer.synced = whole;
        if self.random.per_mille(500) {
            self.consumer.mix();
        }
        self.consumer.intake = Some(Intake::new(ledger, PATIENCE, PREFETCH));
        self.consumer_soon();
    }

    /// The file has each record once, and what follows from it is the table.
    pub(super) fn check_file(&mut self) {
        let mut replays: BTreeMap<u16, Replay> = BTreeMap::new();
        let mut found = Vec::new();
        for record in self.consumer.lines().map(record) {
            let replay = replays.entry(record.partition()).or_default();
            match replay.take(&record) {
                Ok(true) => {}
                Ok(false) => {
                    let evidence = format!("the file has {record:?} twice");
                    found.push(Violation::new(Promise::FeedOrdered, evidence));
                }
                Err(violation) => found.push(violation),
            }
        }
        for partition in 0..self.plan.partitions {
            let replay = replays.entry(partition).or_default();
            found.extend(replay.is_complete(partition, &self.reference).err());
        }
        for mut violation in found {
            violation.evidence = format!("in the consumer's file: {}", violation.evidence);
            self.violated(violation);
        }
    }
}

fn record(line: &[u8]) -> Record {
    read_json(line.trim_ascii_end()).expect("lines are records")
}
