//! Several replicas of one partition, with a network of their own: everything sent arrives unless a link
//! is cut, everything written is persisted at once. It is what the tests in `elections`, `moves` and `super::fresh`
//! share, and has none itself. Bad weather is the simulation's business.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

mod changes;
mod elections;
mod moves;

/// A snapshot as it was taken.
type Taken = (SnapshotMeta, Vec<u8>);

pub(super) struct Group {
    pub(super) replicas: BTreeMap<u64, Node>,
    wire: VecDeque<Message>,
    pub(super) cut: BTreeSet<u64>,
    /// These replicas and the others do not hear each other.
    pub(super) apart: BTreeSet<u64>,
    /// What is sent to these replicas goes to `late`.
    pub(super) slow: BTreeSet<u64>,
    pub(super) late: Vec<Message>,
    /// Nobody hears that this entry is committed.
    unheard: Option<u64>,
    /// Snapshots on their way, where they are to take time.
    held: Option<Vec<(Message, Taken)>>,
    /// Whether replicas hear what the others say about sleeping.
    pub(super) sleeps: bool,
    pub(super) now_us: u64,
    next_waiter: u32,
}

pub(super) struct Node {
    pub(super) replica: Replica<u32>,
    pub(super) view: Arc<View>,
    replies: Replies<u32>,
    snapshot: Option<(SnapshotMeta, Vec<u8>)>,
}

pub(super) fn node(id: u64, beginning: SnapshotMeta, promised: bool) -> Node {
    let memory = Memory::new(0);
    let mut recovery = Recovery::new(table(&memory), None, beginning, 1 << 16);
    recovery.has_history = promised;
    let config = ReplicaConfig { id, tail_bytes: 1 << 10, ..config() };
    let view = Arc::new(View::default());
    let replica = Replica::new(&config, recovery, memory, Arc::clone(&view), at(NOW));
    Node { replica: replica.expect("a state"), view, replies: Vec::new(), snapshot: None }
}

impl Node {
    fn dump(&self) -> Vec<u8> {
        let mut chunk = Vec::new();
        self.replica.table().begin_snapshot();
        while !self.replica.table().snapshot_chunk(1 << 20, &mut chunk) {}
        self.replica.table().end_snapshot();
        chunk
    }
}

impl Group {
    pub(super) fn of(ids: &[u64]) -> Group {
        let mut group = Group::founded(ids);
        group.elect();
        group
    }

    /// Nobody leads it yet.
    fn founded(ids: &[u64]) -> Group {
        let beginning = SnapshotMeta::founding(ids.to_vec());
        let replicas = ids.iter().map(|id| (*id, node(*id, beginning.clone(), false)));
        Group {
            replicas: replicas.collect(),
            wire: VecDeque::new(),
            cut: BTreeSet::new(),
            apart: BTreeSet::new(),
            slow: BTreeSet::new(),
            late: Vec::new(),
            unheard: None,
            held: None,
            sleeps: false,
            now_us: 1,
            next_waiter: 0,
        }
    }

    pub(super) fn now(&self) -> Now {
        Now { ms: NOW, us: self.now_us }
    }

    /// Lets everything happen that needs no time.
    pub(super) fn settle(&mut self) {
        let now = self.now();
        loop {
            let mut quiet = self.wire.is_empty();
            for node in self.replicas.values_mut() {
                node.replica.propose(&mut node.replies);
                while let Some(ready) = node.replica.ready(&mut node.replies).expect("sound") {
                    quiet = false;
                    self.wire.extend(ready.messages);
                    node.replica.persisted(ready.number);
                    self.wire.extend(ready.persisted_messages);
                }
                if node.replica.snapshot_wanted() {
                    let meta = node.replica.snapshot_meta();
                    node.snapshot = Some((meta.clone(), node.dump()));
                    node.replica.snapshot_taken(meta);
                }
            }
            if quiet {
                return;
            }
            self.carry_signals();
            for message in std::mem::take(&mut self.wire) {
                let unheard = self.unheard.is_some_and(|index| message.commit >= index);
                if unheard || !self.connects(message.from, message.to) {
                    continue;
                }
                if self.slow.contains(&message.to) {
                    self.late.push(message);
                    continue;
                }
                if message.msg_type() == MessageType::MsgSnapshot {
                    let snapshot = self.replicas[&message.from].snapshot.clone();
                    let snapshot = snapshot.expect("it was taken");
                    match &mut self.held {
                        Some(held) => held.push((message, snapshot)),
                        None => self.carry_snapshot(&message, snapshot),
                    }
                    continue;
                }
                let mut bytes = Vec::new();
                encode_message(&message, &mut bytes);
                let message = decode_message(&bytes).expect("what was encoded");
                let to = self.replicas.get_mut(&message.to).expect("looked up");
                to.replica.step(now, message);
            }
        }
    }

    fn connects(&self, from: u64, to: u64) -> bool {
        let cut = self.cut.contains(&from) || self.cut.contains(&to);
        let apart = self.apart.contains(&from) != self.apart.contains(&to);
        !cut && !apart && self.replicas.contains_key(&to)
    }

    /// What replicas say about sleeping, in their order.
    pub(super) fn carry_signals(&mut self) {
        let now = self.now();
        let from = |(id, node): (&u64, &mut Node)| (*id, node.replica.take_signals());
        let said: Vec<_> = self.replicas.iter_mut().map(from).collect();
        for (from, signals) in said {
            for (to, signal) in signals {
                if self.sleeps && self.connects(from, to) {
                    let to = self.replicas.get_mut(&to).expect("connected");
                    to.replica.signal(now, from, signal);
                }
            }
        }
    }

    /// Beats go from each replica's node to each other, and are answered after this time.
    pub(super) fn beat(&mut self, after_us: u64) {
        let sent_us = self.now_us;
        self.now_us += after_us;
        let now = self.now();
        let ids: Vec<u64> = self.replicas.keys().copied().collect();
        for (asks, answers) in ids.iter().flat_map(|one| ids.iter().map(move |two| (*one, *two))) {
            if asks == answers || !self.connects(asks, answers) {
                continue;
            }
            self.replicas.get_mut(&answers).expect("there").replica.vouch(now);
            self.carry_signals();
            let node = self.replicas.get_mut(&asks).expect("there");
            node.replica.beat_answered(now, answers, sent_us);
        }
        self.settle();
    }

    fn carry_snapshot(&mut self, message: &Message, (meta, chunk): (SnapshotMeta, Vec<u8>)) {
        let fresh = Table::new(TableOptions { hash_seed: 7, shards: 1 }, Memory::new(0));
        fresh.load(&chunk).expect("a chunk");
        let now = self.now();
        let to = self.replicas.get_mut(&message.to).expect("looked up");
        let installed = to.replica.install(now, message.from, message.term, meta, fresh);
        let from = self.replicas.get_mut(&message.from).expect("there");
        from.replica.report_snapshot(message.to, installed);
    }

    pub(super) fn ticks(&mut self, count: usize) {
        for _ in 0..count {
            self.now_us += 50_000;
            let now = self.now();
            for node in self.replicas.values_mut() {
                node.replica.tick(now);
            }
            self.settle();
        }
    }

    pub(super) fn leader(&self) -> Option<u64> {
        let mut leaders =
            self.replicas.iter().filter(|(id, one)| one.replica.leads() && !self.cut.contains(id));
        leaders.next().map(|(id, _)| *id)
    }

    pub(super) fn elect(&mut self) -> u64 {
        for _ in 0..60 {
            self.ticks(1);
            if let Some(leader) = self.leader() {
                return leader;
            }
        }
        panic!("nobody was elected");
    }

    pub(super) fn ask(&mut self, id: u64, command: &Command<&[u8]>) -> u32 {
        let (waiter, now) = (self.next_waiter, self.now());
        self.next_waiter += 1;
        let node = self.replicas.get_mut(&id).expect("there");
        node.replies.extend(node.replica.execute(now, command, &Meta::default(), waiter));
        waiter
    }

    fn reply(&mut self, id: u64, waiter: u32) -> Option<Reply> {
        let replies = &mut self.replicas.get_mut(&id).expect("there").replies;
        let at = replies.iter().position(|(whose, _)| *whose == waiter)?;
        Some(replies.swap_remove(at).1)
    }

    pub(super) fn put(&mut self, key: &str, value: &str) -> Option<Reply> {
        let leader = self.leader().expect("a leader");
        let waiter = self.ask(leader, &set(key.as_bytes(), value.as_bytes(), Expiry::Never));
        self.settle();
        self.reply(leader, waiter)
    }

    fn reconcile(&mut self, target: &[u64]) {
        for _ in 0..100 {
            let now = self.now();
            for node in self.replicas.values_mut() {
                if let Some(Change::Transfer(to)) = node.replica.reconcile(now, 1, target) {
                    node.replica.transfer_leader(now, to);
                }
            }
            self.ticks(1);
        }
    }

    fn contents(&self, id: u64) -> Vec<u8> {
        self.replicas[&id].dump()
    }
}
