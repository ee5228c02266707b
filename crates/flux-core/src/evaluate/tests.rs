//! Golden scripts for each family of commands, and random commands against a sequential model.

mod golden;
mod limits;
mod model;
mod property;
mod script;

use std::sync::Arc;

use crate::draft::{Draft, InFlight, Previous, apply};
use crate::session::Sessions;
use crate::store::{Memory, Position, Table, TableOptions};
use crate::{Command, Reply, UnixMillis};

/// A partition without a log: what is closed waits here until it is applied.
struct Partition {
    memory: Arc<Memory>,
    table: Table,
    in_flight: InFlight,
    now_ms: UnixMillis,
    /// What batches say of what their keys had before.
    previous: Previous,
    applied: u64,
    /// Payloads that are closed, oldest first, and the number of those that are applied.
    payloads: Vec<Vec<u8>>,
    applied_payloads: usize,
}

/// A key with all that the table keeps of it but when it was written.
type Row = (Vec<u8>, Vec<u8>, u64, Option<UnixMillis>);

impl Partition {
    fn new(memory_limit: u64, hash_seed: u64) -> Partition {
        let memory = Memory::new(memory_limit);
        let table = Table::new(TableOptions { hash_seed, shards: 2 }, Arc::clone(&memory));
        Partition {
            memory,
            table,
            in_flight: InFlight::new(0),
            now_ms: 1_000,
            previous: Previous::Nothing,
            applied: 0,
            payloads: Vec::new(),
            applied_payloads: 0,
        }
    }

    fn run(&mut self, command: &Command<Vec<u8>>) -> Reply {
        let command = command.borrowed();
        let settled = self.in_flight.is_empty() && !command.is_write();
        let read = settled.then(|| super::read(&self.table, self.now_ms, &command));
        let mut draft = Draft::new(&self.table, &mut self.in_flight, &self.memory, self.now_ms);
        let reply = super::evaluate(&mut draft, &command);
        assert!(read.is_none_or(|read| read == reply), "both ways to read give the same");
        reply
    }

    fn close(&mut self) {
        if let Some(batch) = self.in_flight.close(&self.table, self.previous) {
            self.payloads.push(batch.payload.to_vec());
        }
    }

    /// Applies the oldest closed batch.
    fn apply_one(&mut self) {
        if let Some(payload) = self.payloads.get(self.applied_payloads) {
            let applied =
                apply(&self.table, &mut Sessions::new(), self.applied, payload, |_, _, _| {});
            self.applied = applied.expect("batches follow on each other").revision;
            self.applied_payloads += 1;
            self.in_flight.applied(self.applied);
        }
    }

    fn apply_all(&mut self) {
        self.close();
        while self.applied_payloads < self.payloads.len() {
            self.apply_one();
        }
    }

    fn discard_all(&mut self) {
        self.in_flight.discard_all();
        self.payloads.truncate(self.applied_payloads);
    }
}

fn rows(table: &Table) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut position = Some(Position(0));
    while let Some(at) = position {
        position = table.scan(at, 10, |entry| {
            let (key, value) = (entry.key.to_vec(), entry.value.to_vec());
            rows.push((key, value, entry.version, entry.expires_at_ms));
        });
    }
    rows.sort();
    rows
}
