//! Questions of nodes for changes that their logs lack, on their way to other nodes and back; and whether a gap
//! that a node tells of was needed.

use super::{Event, World};
use crate::check::{Promise, Violation, feed};
use crate::node::{Answered, Asked, TIMEOUT_US, Told, Work};
use crate::plan::MS;

/// For so long a node that is there must have been asked in vain before it may be given up.
const LEAST_WAIT_US: u64 = 1_500 * MS;

/// A process's questions for one place to one node that came to nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    first_us: u64,
    last_us: u64,
    /// The node was to have a replica, as the one that asked had it.
    holds: bool,
    /// It answered that it has nothing. It may have got a replica since, and with that back what its log has of an
    /// earlier one.
    lacked: bool,
}

impl World {
    /// A process asks another node.
    pub(super) fn ask_elsewhere(&mut self, host: usize, process: u64, asked: Asked) {
        let target = self.hosts.iter().position(|one| one.node == asked.to);
        let arrives = target
            .and_then(|target| Some((target, self.network.send(self.now_us, host, target)[0]?)));
        match arrives {
            Some((target, at)) => {
                self.queue.push(at, Event::Asked(host, process, target, asked, self.now_us));
            }
            None => self.fails_to_answer(host, process, asked),
        }
    }

    /// The question has come.
    pub(super) fn asked(
        &mut self,
        (host, process): (usize, u64),
        target: usize,
        asked: Asked,
        since_us: u64,
    ) {
        self.note(14, &[host as u64, target as u64, u64::from(asked.partition), asked.after]);
        if self.hosts[target].is_awake()
            && let Some(other) = &self.hosts[target].process
        {
            let answered = other.own_changes(asked.partition, asked.after);
            let is_sure = !matches!(answered, Answered::Silent);
            if matches!(answered, Answered::Lacks) {
                self.failed_to_ask(host, process, asked, true);
            }
            if let Answered::Has(events) = &answered {
                self.outcome.elsewhere += events.len() as u64;
            }
            if let Some(at) = self.network.send(self.now_us, target, host)[0] {
                if !is_sure || at >= since_us + TIMEOUT_US {
                    self.failed_to_ask(host, process, asked, false);
                }
                let work = Work::ElsewhereAnswers(asked.number, answered);
                self.queue.push(at, Event::BrokerSays(host, process, work));
                return;
            }
        }
        self.fails_to_answer(host, process, asked);
    }

    /// A question or its answer is lost: who asked learns it from the connection, or from nobody.
    fn fails_to_answer(&mut self, host: usize, process: u64, asked: Asked) {
        self.failed_to_ask(host, process, asked, false);
        if self.random.per_mille(800) {
            let at = self.now_us + self.random.between(MS, 100 * MS);
            let work = Work::ElsewhereAnswers(asked.number, Answered::Silent);
            self.queue.push(at, Event::BrokerSays(host, process, work));
        }
    }

    fn failed_to_ask(&mut self, host: usize, process: u64, asked: Asked, lacks: bool) {
        let now_us = self.now_us;
        let place = (process, asked.partition, asked.after, asked.to);
        let first = Failed { first_us: now_us, last_us: now_us, holds: asked.holds, lacked: false };
        let failed = self.failed_asks.entry(place).or_insert(first);
        (failed.last_us, failed.holds) = (now_us, asked.holds);
        failed.lacked |= lacks;
        self.say(format_args!("h{host} asks {} for p{} in vain", asked.to, asked.partition));
    }

    /// A node tells of a gap.
    pub(super) fn observe_gap(&mut self, host: usize, process: u64, told: &Told) {
        self.outcome.gaps += 1;
        let released = self.hosts[host].released;
        let needed = feed::is_needed(&told.gap, told.start, released, &self.reference);
        if let Err(violation) = needed.and_then(|()| self.nobody_has(host, process, told)) {
            self.violated(violation);
        }
    }

    /// Whether none of the nodes that could be asked has what is lost.
    fn nobody_has(&self, host: usize, process: u64, told: &Told) -> Result<(), Violation> {
        let (partition, after) = (told.gap.partition, told.gap.lost.start() - 1);
        for (place, other) in self.hosts.iter().enumerate() {
            let reaches = self.network.reaches(host, place) && self.network.reaches(place, host);
            if place == host || !reaches || !other.is_awake() {
                continue;
            }
            let Some(running) = &other.process else { continue };
            if !matches!(running.own_changes(partition, after), Answered::Has(_)) {
                continue;
            }
            let failed = self.failed_asks.get(&(process, partition, after, other.node));
            let is_excused = failed.is_some_and(|failed| {
                failed.lacked || !failed.holds || failed.last_us - failed.first_us >= LEAST_WAIT_US
            });
            if !is_excused {
                let evidence =
                    format!("h{host} {:?}: h{place} has it, asked in vain: {failed:?}", told.gap);
                return Err(Violation::new(Promise::GapNeeded, evidence));
            }
        }
        Ok(())
    }
}
