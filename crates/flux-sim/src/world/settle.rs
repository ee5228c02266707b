//! The end of a run: faults end, the cluster has some time, and then all must agree.

use std::fmt::Write as _;

use flux_core::replica::Replica;

use super::{Event, Host, World, node_now};
use crate::check::history::{Answer, Call, Key, Operation};
use crate::check::{Promise, Violation, linear, versions};
use crate::plan::MS;

/// The client that reads all keys in the end.
const LAST_READER: u32 = 999;

impl World {
    pub(super) fn settle(&mut self) {
        self.settling = true;
        self.say(format_args!("faults end"));
        self.broker_recovers();
        self.network.heal();
        self.network.set_quality(self.plan.calm_links());
        for host in 0..self.hosts.len() {
            self.hosts[host].slow_until = 0;
            if self.hosts[host].frozen_until.is_some() {
                self.thaw_now(host);
            }
            self.disarm(host);
            if self.hosts[host].process.is_none() {
                self.start(host);
            }
        }
        self.queue.push(self.now_us + 200 * MS, Event::Inspect);
    }

    pub(super) fn inspect(&mut self) {
        let complaint = self.complaint();
        let Some(complaint) = complaint else {
            self.say(format_args!("all is well"));
            self.finish();
            return;
        };
        if self.now_us >= self.plan.duration_us + self.plan.settle_us {
            self.violated(Violation::new(Promise::Recovers, complaint));
            self.finish();
            return;
        }
        for host in 0..self.hosts.len() {
            if self.hosts[host].process.is_none() {
                self.start(host);
            }
        }
        for partition in 0..self.plan.partitions {
            self.replan_stalled(partition);
        }
        self.queue.push(self.now_us + 100 * MS, Event::Inspect);
    }

    /// What is not as it should be yet.
    fn complaint(&self) -> Option<String> {
        if let Some(client) = self.clients.iter().position(crate::client::Client::is_busy) {
            return Some(format!("client {client} waits for an answer"));
        }
        if !self.consumer.has_all() {
            return Some("the consumer has not all that is in the queue".to_owned());
        }
        (0..self.plan.partitions).find_map(|partition| self.complaint_of(partition))
    }

    fn complaint_of(&self, partition: u16) -> Option<String> {
        if !self.is_in_place(partition) {
            let standing = self.standing(partition);
            return Some(format!(
                "p{partition} has not the replicas that it should have{standing}"
            ));
        }
        let (end, _) = self.reference.end(partition);
        let target = &self.targets[usize::from(partition)];
        for (place, host) in self.hosts.iter().enumerate() {
            let Some(process) = &host.process else { return Some(format!("h{place} is down")) };
            let due = target.iter().any(|id| (*id >> 32) as u32 == host.node);
            let age_us = self.age(host, partition);
            match process.replica(partition) {
                None if due => return Some(format!("h{place} has no replica of p{partition}")),
                Some(replica) if !due => {
                    let standing = self.standing(partition);
                    return Some(format!("h{place} still has {:x}{standing}", replica.id()));
                }
                Some(replica) if replica.applied().index != end => {
                    let applied = replica.applied().index;
                    return Some(format!("h{place} p{partition} is at {applied} of {end}"));
                }
                Some(_)
                    if self.plan.checks_ages()
                        && age_us.is_none_or(|age_us| age_us > self.plan.usual_age_us()) =>
                {
                    return Some(format!("h{place} p{partition} says that its age is {age_us:?}"));
                }
                _ => {}
            }
        }
        self.complaint_of_feed(partition)
    }

    /// What a host says of the age of a partition's table, in microseconds.
    fn age(&self, host: &Host, partition: u16) -> Option<u64> {
        let hosted = host.process.as_ref()?.hosted.get(&partition)?;
        hosted.view.staleness(node_now(&self.plan, host, self.now_us).us).1
    }

    /// What each replica of a partition knows, line by line.
    fn standing(&self, partition: u16) -> String {
        let target = &self.targets[usize::from(partition)];
        let mut text = format!(": {target:x?}; lost: {:x?}", self.lost);
        for (place, host) in self.hosts.iter().enumerate() {
            let replica = host.process.as_ref().and_then(|process| process.replica(partition));
            let Some(status) = replica.map(Replica::status) else { continue };
            let _ = write!(text, "\n    h{place} {status:x?}");
        }
        text
    }

    /// The last reads, and all that is checked of the run as a whole.
    fn finish(&mut self) {
        self.done = true;
        for client in &mut self.clients {
            client.stop(&self.plan, &mut self.history);
        }
        for partition in 0..self.plan.partitions {
            for host in 0..self.hosts.len() {
                self.observe_table(host, partition);
            }
            self.read_all(partition);
            if self.plan.publishes
                && let Err(violation) = self.feed.is_complete(partition, &self.reference)
            {
                self.violated(violation);
            }
        }
        if self.plan.publishes {
            self.check_file();
        }
        let mut history = std::mem::take(&mut self.history);
        let kept = self.reference.keeps(&history);
        let kept = kept.into_iter().chain(versions::check(&history));
        kept.chain(self.reference.repeats_nothing()).for_each(|one| self.violated(one));
        if !self.plan.checks_reads() {
            history.retain(|operation| operation.call != Call::Get);
        }
        let outcome = |key: Key, one: &Operation| self.reference.outcome(key, one);
        for violation in linear::check(&history, &outcome) {
            self.violated(violation);
        }
        self.history = history;
    }

    /// What the leader has in the end is what a client would read.
    fn read_all(&mut self, partition: u16) {
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        let mut hosted = processes.filter_map(|process| process.hosted.get(&partition));
        let Some(leader) = hosted.find(|hosted| hosted.replica.leads()) else { return };
        let end = self.now_us + 1;
        for number in 0..self.plan.keys {
            let key = Key { partition, number };
            let bytes = key.bytes();
            let table = &leader.table;
            let value = table.read(table.hash(&bytes), &bytes, |entry| {
                let entry = entry?;
                let value = std::str::from_utf8(entry.value).ok()?.parse().ok()?;
                Some((value, entry.version))
            });
            let returned = Some((end, Answer::Value(value)));
            let operation = Operation {
                client: LAST_READER,
                call: Call::Get,
                invoked_us: end,
                once: None,
                returned,
            };
            self.history.add(key, operation);
        }
    }
}
