//! What the checkers are shown while a run goes on.

use flux_core::effect::Effects;
use flux_core::replica::Role;
use raft::eraftpb::{Message, MessageType};

use super::{World, node_now};
use crate::check::consensus::Contents;
use crate::check::{Promise, Violation};
use crate::node::{Appended, Output};

/// Of a thousand turns of a replica so many are followed by a look at its whole table.
const TABLES_PER_MILLE: u32 = 60;

impl World {
    pub(super) fn observe_appended(&mut self, host: usize, output: &Output) {
        for Appended { partition, position, before, contents } in &output.appended {
            self.say_appended(host, *partition, *position, contents);
            let seen = self.consensus.appends(*partition, *position, *before, contents);
            self.check(seen);
        }
    }

    fn say_appended(&mut self, host: usize, partition: u16, at: (u64, u64), contents: &Contents) {
        if !self.trace.has_lines() {
            return;
        }
        let what = match Effects::new(&contents.payload) {
            _ if contents.entry_type != 0 => "a change of members".to_owned(),
            _ if contents.payload.is_empty() => "nothing".to_owned(),
            Ok(effects) => {
                let first = effects.next_revision();
                format!("{} effects from revision {first}", effects.count())
            }
            Err(error) => error.to_string(),
        };
        self.say(format_args!(
            "h{host} p{partition} writes entry {} of term {}: {what}",
            at.0, at.1
        ));
    }

    pub(super) fn observe_message(&mut self, partition: u16, message: &Message) {
        if message.msg_type() == MessageType::MsgRequestVoteResponse && !message.reject {
            let Message { from, to, term, .. } = *message;
            let seen = self.consensus.votes(partition, from, term, to);
            self.check(seen);
        }
    }

    fn check(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result {
            self.violated(violation);
        }
    }

    /// Looks at what a host's replicas are and have applied, after each of its turns.
    pub(super) fn observe(&mut self, host: usize) {
        for partition in 0..self.plan.partitions {
            self.observe_applied(host, partition);
            self.observe_leader(host, partition);
            self.observe_feed(host, partition);
            if self.random.per_mille(TABLES_PER_MILLE) {
                self.observe_table(host, partition);
                self.observe_age(host, partition);
            }
        }
    }

    fn observe_leader(&mut self, host: usize, partition: u16) {
        let process = self.hosts[host].process.as_ref();
        let Some(replica) = process.and_then(|process| process.replica(partition)) else { return };
        let (leads, id, term) = (replica.leads(), replica.id(), replica.term());
        let asleep = leads && replica.is_asleep();
        let stands = leads || replica.status().role == Role::Leader;
        self.observe_sleep(host, partition, id, asleep);
        if !stands {
            return;
        }
        match self.consensus.leads(partition, term, id) {
            Ok(true) => {
                self.note(6, &[host as u64, id, term]);
                self.say(format_args!("h{host} p{partition} leads in term {term}"));
            }
            Ok(false) => {}
            Err(violation) => self.violated(violation),
        }
        if leads {
            self.observe_leases(host, partition, (id, term));
        }
    }

    fn observe_sleep(&mut self, host: usize, partition: u16, id: u64, asleep: bool) {
        if asleep == self.asleep.contains(&id) {
            return;
        }
        if asleep {
            self.outcome.naps += 1;
            self.asleep.insert(id);
        } else {
            self.asleep.remove(&id);
        }
        let what = if asleep { "sleeps" } else { "wakes" };
        self.say(format_args!("h{host} p{partition} {what}"));
    }

    /// Who leads and has an entry of its term committed may acknowledge writes: nobody of an earlier term
    /// may answer reads then.
    fn observe_leases(&mut self, host: usize, partition: u16, (id, term): (u64, u64)) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            let machine = &self.hosts[other];
            let Some(hosted) = machine.process.as_ref().and_then(|one| one.hosted.get(&partition))
            else {
                continue;
            };
            let now = node_now(&self.plan, machine, self.now_us);
            if hosted.replica.term() < term && hosted.view.may_serve(now.us) {
                let evidence = format!(
                    "p{partition}: {id:x} leads in term {term}, {:x} still may serve in term {}",
                    hosted.replica.id(),
                    hosted.replica.term()
                );
                if self.plan.checks_reads() {
                    self.violated(Violation::new(Promise::OneLease, evidence));
                }
                return;
            }
        }
    }

    fn observe_applied(&mut self, host: usize, partition: u16) {
        let Some(process) = &mut self.hosts[host].process else { return };
        let Some(hosted) = process.hosted.get_mut(&partition) else { return };
        let applied = hosted.replica.applied();
        if hosted.replica.leads() {
            self.reference.serves(partition, applied.index, self.now_us);
        }
        let first = hosted.checked + 1;
        if applied.index < first {
            return;
        }
        hosted.checked = applied.index;
        let mut found = Ok(());
        for index in first..=applied.index {
            let Some((term, contents)) = hosted.shadow.get(&index) else {
                let evidence =
                    format!("h{host} p{partition} applied {index}, which it never wrote");
                found = Err(Violation::new(Promise::Committed, evidence));
                break;
            };
            found = self.reference.applies(partition, (index, *term), contents);
            if found.is_err() {
                break;
            }
        }
        self.check(found);
    }

    /// Compares what a host says of the age of its table with what was committed meanwhile.
    fn observe_age(&mut self, host: usize, partition: u16) {
        let machine = &self.hosts[host];
        let process = machine.process.as_ref();
        let Some(hosted) = process.and_then(|one| one.hosted.get(&partition)) else { return };
        let (revision, age) = hosted.view.staleness(node_now(&self.plan, machine, self.now_us).us);
        let Some(age_us) = age.filter(|_| self.plan.checks_ages()) else { return };
        // By a clock that may be slow, and counts whole microseconds.
        let slowest = 100 - u64::from(self.plan.drift_percent);
        let since_us = self.now_us.saturating_sub(age_us * 100 / slowest + 2);
        let fresh = self.reference.is_fresh(partition, revision, since_us).map_err(|mut one| {
            one.evidence = format!("h{host} {}", one.evidence);
            one
        });
        self.check(fresh);
    }

    /// Compares a host's whole table with the history.
    pub(super) fn observe_table(&mut self, host: usize, partition: u16) {
        let process = self.hosts[host].process.as_ref();
        let Some(hosted) = process.and_then(|process| process.hosted.get(&partition)) else {
            return;
        };
        let (index, revision) = (hosted.replica.applied().index, hosted.replica.revision());
        let shown = self.reference.shows(partition, index, revision, &hosted.table);
        let sessions = hosted.replica.snapshot_meta().sessions;
        let shown = shown.and_then(|()| self.reference.shows_sessions(partition, index, &sessions));
        let cursor = hosted.replica.cursor();
        let shown = shown.and_then(|()| self.reference.shows_cursor(partition, index, cursor));
        let shown = shown.map_err(|mut violation| {
            violation.evidence = format!("h{host} {}", violation.evidence);
            violation
        });
        self.check(shown);
    }
}
