//! Commands of RESP that concern the node as a whole. They run when no earlier request of their
//! connection is under way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flux_core::command::{KeyFilter, PageLimits};
use flux_core::store::Position;
use flux_core::{Command, PartitionId, Slot as KeySlot};
use parking_lot::Mutex;

use super::Worker;
use super::request::{FLUSH_STEP, Request};
use crate::connection::{Gathering, Render, Slot, WalkRender};
use crate::mailbox::{Ask, Message, Origin};
use crate::resp::{
    self, ClientFilter, Form, Gather, NodeCommand, NodeInfo, NodeReply, ScanCursor, Session,
    SlotWalk,
};
use crate::scan::{Scope, Walk};

/// Bytes of keys that KEYS answers at the most: what waits for a reader is bounded.
const MAX_KEYS_BYTES: usize = 48 * 1024 * 1024;

/// What a key takes in a reply besides itself, about.
const KEY_FRAMING_BYTES: usize = 16;

/// Entries that one step of a walk over a slot looks at: about a millisecond.
const SLOT_STEP_ENTRIES: usize = 8 * 1024;

impl Worker {
    /// Runs a command whose connection has nothing under way. False if there is more of it to do: it is
    /// to come again as it is.
    pub(super) fn run_node_command(
        &mut self,
        key: usize,
        command: NodeCommand<'_>,
        session: &Arc<Mutex<Session>>,
    ) -> bool {
        let reply = match command {
            NodeCommand::KeyCount => {
                self.count_keys(key, session);
                return true;
            }
            NodeCommand::Keys { pattern } => {
                self.walk(key, self.all_keys(pattern), WalkRender::Keys, Some(session));
                return true;
            }
            NodeCommand::Scan { cursor, pattern, count } => {
                let walk = self.page(cursor, pattern, count);
                self.walk(key, walk, WalkRender::Page, Some(session));
                return true;
            }
            NodeCommand::KeysInSlot { slot, list } => {
                match self.keys_in_slot(slot, list, &mut session.lock().slot_walk) {
                    Some(reply) => reply,
                    None => return false,
                }
            }
            NodeCommand::RandomKey if self.shared.cluster.is_some() => {
                let walk = self.walk_to_random_key();
                self.walk(key, walk, WalkRender::Key, Some(session));
                return true;
            }
            NodeCommand::RandomKey => self.random_key(),
            NodeCommand::Flush => {
                self.flush_keys(key);
                return true;
            }
            NodeCommand::Info { sections } => {
                NodeReply::Text(resp::info(sections, &self.node_info()))
            }
            NodeCommand::ClientList { ids } => self.client_list(ids.as_deref()),
            NodeCommand::ClientKill { filter, reply_ok } => {
                self.client_kill(key, &filter, reply_ok)
            }
            NodeCommand::Configure { timeout_s, max_clients } => {
                self.configure(timeout_s, max_clients)
            }
            NodeCommand::ResetStats => {
                self.shared.stats.reset();
                NodeReply::Ok
            }
            NodeCommand::Sleep { milliseconds } => {
                self.sleep_connection(key, milliseconds);
                return true;
            }
        };
        if let Some(connection) = self.connections.get_mut(key) {
            resp::render_node(&reply, &session.lock(), &mut connection.output);
        }
        true
    }

    /// The partitions that commands without keys are about: all of them, or those that this node leads,
    /// where clients find the others by themselves.
    fn scope(&self) -> Scope {
        let shared = &self.shared;
        match &shared.cluster {
            Some(seat) if shared.settings.resp_redirect => {
                let mine = |one: &PartitionId| shared.leader(*one) == Some(seat.me);
                Scope::Only(shared.partitions.iter().filter(mine).collect())
            }
            _ => Scope::All(shared.partitions.count()),
        }
    }

    fn count_keys(&mut self, key: usize, session: &Mutex<Session>) {
        let count = |partition| (partition, Command::Count);
        let parts: Vec<_> = self.scope().partitions().into_iter().map(count).collect();
        let connection = &mut self.connections[key];
        let ask = Ask::default();
        let mut request = Request { connection, dispatch: &mut self.dispatch, key, ask };
        let gather = Gathering::Resp(Gather::Sum { is_write: false });
        request.many(&parts, gather, Some(&mut session.lock()));
        // Later requests of the connection must not run before it is answered.
        connection.barrier = !connection.slots.is_empty();
    }

    fn all_keys(&self, pattern: &[u8]) -> Walk {
        let (start, filter) = (self.start(), KeyFilter::Pattern(pattern.to_vec()));
        let limits =
            PageLimits { matches: u32::MAX, looked_at: u32::MAX, bytes: MAX_KEYS_BYTES as u32 };
        Walk::new(self.scope(), start, filter, true, limits)
    }

    fn page(&self, cursor: ScanCursor, pattern: Option<&[u8]>, count: usize) -> Walk {
        // A page may be one step of the loop: others wait for it.
        let looked_at = count.min(100_000) as u32;
        let filter = match pattern {
            Some(pattern) => KeyFilter::Pattern(pattern.to_vec()),
            None => KeyFilter::Prefix(Vec::new()),
        };
        let limits = PageLimits { matches: u32::MAX, looked_at, bytes: MAX_KEYS_BYTES as u32 };
        Walk::new(self.scope(), cursor, filter, true, limits)
    }

    fn start(&self) -> ScanCursor {
        ScanCursor { partition: PartitionId(0), position: 0 }
    }

    /// A walk from somewhere to the next key. A partition is the more likely the more keys the replica
    /// here has; one without a replica here counts as an average one.
    fn walk_to_random_key(&mut self) -> Walk {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let seed = self.random;
        let scope = self.scope();
        let keys = |partition: &PartitionId| {
            let view = &self.shared.views[usize::from(partition.0)];
            self.shared.holds(*partition).then(|| view.table.len() as u64)
        };
        let all: Vec<(PartitionId, Option<u64>)> =
            scope.partitions().into_iter().map(|one| (one, keys(&one))).collect();
        let known: Vec<u64> = all.iter().filter_map(|(_, keys)| *keys).collect();
        let average = known.iter().sum::<u64>().checked_div(known.len() as u64).unwrap_or(0);
        let weight = |keys: Option<u64>| keys.unwrap_or(average.max(1));
        let total = all.iter().map(|(_, keys)| weight(*keys)).sum::<u64>().max(1);
        let mut rank = (seed >> 33) % total;
        let chosen = all.iter().find(|(_, keys)| {
            let here = rank < weight(*keys);
            rank = rank.saturating_sub(weight(*keys));
            here
        });
        let partition = chosen.map_or(PartitionId(0), |(partition, _)| *partition);
        let position = (seed.rotate_left(17) >> 32) as u32;
        Walk::to_one_key(scope, ScanCursor { partition, position })
    }

    /// One step over the partition of a slot, whose keys lie anywhere in it. None if it is not the last.
    ///
    /// What the node has counts, whether it leads the partition or not, as with Redis.
    fn keys_in_slot(
        &self,
        slot: KeySlot,
        list: Option<usize>,
        walk: &mut Option<SlotWalk>,
    ) -> Option<NodeReply> {
        let mut done = walk.take().unwrap_or_default();
        let now_ms = self.dispatch.now.ms;
        let wanted = list.unwrap_or(usize::MAX);
        let view = self.shared.views.get(usize::from(self.shared.partitions.owner(slot).0));
        let next = view.filter(|_| wanted > 0).and_then(|view| {
            view.table.scan(Position(done.position), SLOT_STEP_ENTRIES, |entry| {
                if done.count < wanted
                    && KeySlot::of(entry.key) == slot
                    && !entry.is_expired(now_ms)
                {
                    done.count += 1;
                    if list.is_some() {
                        done.key_bytes += entry.key.len() + KEY_FRAMING_BYTES;
                        done.keys.push(entry.key.to_vec());
                    }
                }
            })
        });
        if done.key_bytes > MAX_KEYS_BYTES {
            return Some(NodeReply::Error("ERR too many keys; ask for fewer".to_owned()));
        }
        match (next, list) {
            (Some(Position(position)), _) if done.count < wanted => {
                *walk = Some(SlotWalk { position, ..done });
                None
            }
            (_, None) => Some(NodeReply::Integer(done.count as i64)),
            (_, Some(_)) => Some(NodeReply::Keys(done.keys)),
        }
    }

    /// Some key that is not expired. Partitions are tried from a place that changes with each call.
    fn random_key(&mut self) -> NodeReply {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let seed = self.random;
        let views = &self.shared.views;
        let (total, now_ms) = (self.shared.keys(), self.dispatch.now.ms);
        if total == 0 {
            return NodeReply::Key(None);
        }
        // Each key has the same chance, whatever partition it is in.
        let mut rank = (seed >> 33) as usize % total;
        let first = views.iter().position(|view| {
            let len = view.table.len();
            let here = rank < len;
            rank = rank.saturating_sub(len);
            here
        });
        for step in 0..views.len() {
            let view = &views[(first.unwrap_or(0) + step) % views.len()];
            for attempt in 0..16 {
                let mut found = None;
                view.table.random(seed.rotate_left(attempt), |entry| {
                    if !entry.is_expired(now_ms) {
                        found = Some(entry.key.to_vec());
                    }
                });
                if found.is_some() {
                    return NodeReply::Key(found);
                }
            }
            // Many of its keys are expired: take the first that is not.
            let mut found = None;
            let mut from = Some(Position(0));
            while let (Some(position), None) = (from, &found) {
                from = view.table.scan(position, 1024, |entry| {
                    if found.is_none() && !entry.is_expired(now_ms) {
                        found = Some(entry.key.to_vec());
                    }
                });
            }
            if found.is_some() {
                return NodeReply::Key(found);
            }
        }
        NodeReply::Key(None)
    }

    /// Deletes all keys, partition by partition, in steps; see `continue_flush`.
    fn flush_keys(&mut self, key: usize) {
        let partitions = self.scope().partitions();
        let connection = &mut self.connections[key];
        let origin = Origin {
            worker: self.id,
            part: 0,
            connection: key as u32,
            serial: connection.serial,
            sequence: connection.next_sequence(),
        };
        connection.push(Slot::Flush { missing: partitions.len(), failed: None });
        // Later requests of the connection must not run between its steps.
        connection.barrier = true;
        for partition in partitions {
            let origin = Origin { part: u32::from(partition.0), ..origin };
            let step = Command::Clear { limit: FLUSH_STEP };
            if let Some(reply) = self.dispatch.submit(partition, &step, Ask::default(), origin) {
                self.complete(origin, reply);
            }
        }
    }

    fn sleep_connection(&mut self, key: usize, milliseconds: u64) {
        let connection = &mut self.connections[key];
        let origin = Origin {
            worker: self.id,
            part: 0,
            connection: key as u32,
            serial: connection.serial,
            sequence: connection.next_sequence(),
        };
        connection.push(Slot::Waiting(Render::Resp(Form::Written)));
        self.sleepers.push((Instant::now() + Duration::from_millis(milliseconds), origin));
    }

    fn client_list(&self, ids: Option<&[u64]>) -> NodeReply {
        let now_ms = self.dispatch.now.ms;
        let clients: Vec<_> = {
            let clients = self.shared.clients.lock();
            let wanted = clients.iter().filter(|(id, _)| ids.is_none_or(|ids| ids.contains(id)));
            wanted.map(|(_, client)| Arc::clone(&client.session)).collect()
        };
        let line = |session: &Arc<Mutex<Session>>| session.lock().line(now_ms, (0, 0));
        NodeReply::Text(clients.iter().map(line).collect())
    }

    fn client_kill(&mut self, key: usize, filter: &ClientFilter<'_>, reply_ok: bool) -> NodeReply {
        let asking = self.connections[key].id;
        let targets: Vec<(u64, u16)> = {
            let clients = self.shared.clients.lock();
            let matches = clients.iter().filter(|(id, client)| {
                let session = client.session.lock();
                filter.matches(**id, &session.peer, &session.local, asking)
            });
            matches.map(|(id, client)| (*id, client.worker)).collect()
        };
        for &(id, worker) in &targets {
            if id == asking {
                self.connections[key].closing = true;
            } else if self.shared.mailboxes[usize::from(worker)].send(Message::Kill(id)).is_err() {
                return NodeReply::Failed(flux_core::Error::Overloaded);
            }
        }
        match (reply_ok, targets.len()) {
            (true, 0) => NodeReply::Error("ERR No such client".to_owned()),
            (true, _) => NodeReply::Ok,
            (false, count) => NodeReply::Integer(count as i64),
        }
    }

    /// Closes a connection of this worker.
    pub(super) fn kill(&mut self, id: u64) {
        let found = self.connections.iter().find(|(_, connection)| connection.id == id);
        if let Some(key) = found.map(|(key, _)| key) {
            self.close(key);
        }
    }

    fn configure(&mut self, timeout_s: Option<u64>, max_clients: Option<usize>) -> NodeReply {
        if let Some(timeout_s) = timeout_s {
            self.shared.idle_timeout_s.store(timeout_s, Ordering::Relaxed);
        }
        if let Some(max_clients) = max_clients {
            self.shared.max_connections.store(max_clients, Ordering::Relaxed);
        }
        NodeReply::Ok
    }

    fn node_info(&self) -> NodeInfo {
        let (shared, stats) = (&self.shared, &self.shared.stats);
        let relaxed = Ordering::Relaxed;
        let process = crate::process::usage();
        NodeInfo {
            node_id: shared.node_id.clone(),
            tcp_port: shared.data_addr.port(),
            uptime_s: shared.started.elapsed().as_secs(),
            now_us: self.dispatch.unix_us,
            config_file: String::new(),
            workers: shared.mailboxes.len(),
            partitions: shared.views.len(),
            connected_clients: shared.connections.load(relaxed),
            max_clients: shared.max_connections.load(relaxed),
            used_memory: shared.memory.used(),
            resident_memory: process.resident_bytes,
            max_memory: shared.memory.limit(),
            fsync: shared.settings.fsync.name(),
            log_bytes: shared.log_bytes.load(relaxed),
            last_snapshot_s: shared.last_snapshot_s.load(relaxed),
            write_failure: shared.failure.lock().clone().unwrap_or_default(),
            connections_received: stats.connections_accepted.value(),
            rejected_connections: stats.connections_refused.value(),
            commands_processed: stats.commands.value(),
            net_input_bytes: stats.input_bytes.value(),
            net_output_bytes: stats.output_bytes.value(),
            keyspace_hits: stats.read_hits.value(),
            keyspace_misses: stats.read_misses.value(),
            expired_keys: stats.expired_keys.value(),
            overloaded: stats.overloaded.value(),
            cpu_s: (process.system_s, process.user_s),
            keys: shared.keys() as u64,
            volatile_keys: shared.volatile_keys() as u64,
            cluster: shared.cluster_view(),
        }
    }
}
