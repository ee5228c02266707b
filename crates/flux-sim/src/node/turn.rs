//! A process's turn, and the end of its syncs.

use flux_core::replica::{Change, Meta, Now, Ready, Replica, Role};
use flux_core::store::{Position, Table};
use flux_core::{Command, Condition, Error, Expiry, Reply};
use flux_log::{Entry, LogError, Record};
use raft::eraftpb::{Message, MessageType};

use super::{Appended, Output, Process, Surroundings, Syncing, Work, Written};
use crate::check::consensus::Contents;
use crate::check::history::Call;
use crate::client::{Ask, Request};
use crate::plant::Plant;

/// Due keys that one turn deletes at the most.
const EXPIRE_LIMIT: usize = 16;

impl Process {
    /// Takes a turn.
    pub fn turn(&mut self, around: Surroundings<'_>) -> Output {
        let mut out = Output::default();
        let result = self.try_turn(around, &mut out);
        self.end(result, &mut out);
        out
    }

    /// The disk has done the sync under way.
    pub fn synced(&mut self) -> Output {
        let mut out = Output::default();
        let Some(mut syncing) = self.syncing.take() else { return out };
        let skipped = self.options.has(Plant::SkippedSync);
        let result = match syncing.result.take() {
            _ if skipped => Ok(()),
            Some(result) => self.log.synced(result).map(drop),
            None => self.log.synced(syncing.target.sync()).map(drop),
        };
        if result.is_ok() {
            self.persisted(syncing.covers, &mut out);
        }
        self.end(result, &mut out);
        out.again = true;
        out
    }

    fn end(&mut self, result: Result<(), LogError>, out: &mut Output) {
        let Err(error) = result else { return };
        for (partition, hosted) in &mut self.hosted {
            let mut replies = Vec::new();
            hosted.replica.abandon(&mut replies);
            out.replies
                .extend(replies.into_iter().map(|(waiter, reply)| (waiter, *partition, reply)));
        }
        out.failed = Some(error.to_string());
    }

    fn try_turn(&mut self, around: Surroundings<'_>, out: &mut Output) -> Result<(), LogError> {
        // Reads are answered by whatever thread they come to, and do not wait behind messages.
        let (reads, others): (Vec<Work>, Vec<Work>) =
            std::mem::take(&mut self.inbox).into_iter().partition(is_read);
        for work in reads.into_iter().chain(others) {
            self.take(work, around, out)?;
        }
        for (partition, hosted) in &mut self.hosted {
            let mut replies = Vec::new();
            hosted.replica.propose(&mut replies);
            let replies = replies.into_iter().map(|(waiter, reply)| (waiter, *partition, reply));
            out.replies.extend(replies);
        }
        self.write(out)?;
        for partition in std::mem::take(&mut self.peers.to_remove) {
            if let Some(id) = self.replica(partition).map(Replica::id) {
                out.notes.push(format!("p{partition} drops {id:x}"));
                self.remove(partition)?;
            }
        }
        self.step_feeds(around, out);
        self.step_snapshot(out)?;
        self.begin_sync(around.sync_early, out);
        self.flush_frames(around.now, out);
        Ok(())
    }

    fn take(
        &mut self,
        work: Work,
        around: Surroundings<'_>,
        out: &mut Output,
    ) -> Result<(), LogError> {
        let now = around.now;
        match work {
            Work::Message(partition, message) => self.step(partition, message, now),
            Work::Frame(from, frame) => self.take_frame(from, frame, now),
            Work::LinkUp(from) => self.link_opened(from, now),
            Work::LinkDown(node) => self.link_broken(node, now),
            Work::Request(request) => self.request(&request, now, around.read_now, out),
            Work::Snapshot(parcel) => self.take_in(parcel, now, out)?,
            Work::SnapshotReport(partition, to, arrived) => {
                if let Some(hosted) = self.hosted.get_mut(&partition) {
                    hosted.replica.report_snapshot(to, arrived);
                }
            }
            Work::Unreachable(partition, to) => {
                if let Some(hosted) = self.hosted.get_mut(&partition) {
                    hosted.replica.report_unreachable(to);
                }
            }
            Work::Tick => {
                self.tick(around, out);
                self.tick_feeds(now, out)?;
            }
            Work::BrokerOpened(session) => self.broker_opened(session, now),
            Work::BrokerLost(session) => self.broker_lost(session, now),
            Work::BrokerAnswers(session, tag, outcome) => {
                self.broker_answers(session, tag, outcome, now);
            }
            Work::ElsewhereAnswers(number, answered) => self.elsewhere_answers(number, answered),
            Work::Transfer(partition, to) => {
                if let Some(hosted) = self.hosted.get_mut(&partition)
                    && let Some(to) = to.or_else(|| hosted.replica.heir())
                {
                    // So that who leads next passes nothing on twice.
                    hosted.put_cursor();
                    let mut replies = Vec::new();
                    hosted.replica.propose(&mut replies);
                    let replies = replies.into_iter();
                    out.replies.extend(replies.map(|(waiter, reply)| (waiter, partition, reply)));
                    if !hosted.replica.transfer_leader(now, to) {
                        return Ok(());
                    }
                    out.notes.push(format!("p{partition} hands over to {to:x}"));
                }
            }
        }
        Ok(())
    }

    fn tick(&mut self, around: Surroundings<'_>, out: &mut Output) {
        let now = around.now;
        for hosted in self.hosted.values_mut() {
            hosted.replica.tick(now);
        }
        self.beat(now, around.nodes, out);
        self.ask_whether_gone(around, out);
        let changed = self.known_targets != around.targets;
        if changed {
            self.known_targets = around.targets.to_vec();
        }
        for (partition, hosted) in &mut self.hosted {
            let replica = &mut hosted.replica;
            if replica.next_expiry_ms().is_some_and(|due| due <= now.ms) {
                replica.expire(now.ms, EXPIRE_LIMIT);
            }
            if self.options.has(Plant::FollowerExpires) && !replica.leads() {
                drop_expired(&hosted.table, now.ms);
            }
            if replica.is_asleep() && !changed {
                continue;
            }
            let target = around.targets.get(usize::from(*partition)).map_or(&[][..], Vec::as_slice);
            if let Some(change) = replica.reconcile(now, around.epoch, target) {
                if let Change::Transfer(to) = change {
                    replica.transfer_leader(now, to);
                }
                out.notes.push(format!("p{partition} {change:x?}"));
            }
        }
    }

    fn request(&mut self, request: &Request, now: Now, read_now: Now, out: &mut Output) {
        let (waiter, partition) = ((request.client, request.attempt), request.key.partition);
        let Some(hosted) = self.hosted.get_mut(&partition) else {
            out.replies.push((waiter, partition, Reply::Error(Error::NotLeader)));
            return;
        };
        let (key, mut text) = (request.key.bytes(), String::new());
        let command = command(&key, request.ask, &mut text);
        let early = self.options.has(Plant::ServeBeforeOwnTerm)
            && !hosted.replica.leads()
            && hosted.replica.status().role == Role::Leader;
        if command.is_point_read() && (early || hosted.view.may_serve(read_now.us)) {
            // As any thread of a node does: straight from the table.
            let reply = hosted.table.read(hosted.table.hash(&key), &key, |entry| {
                Reply::Value(entry.map(|entry| flux_core::Value {
                    bytes: entry.value.to_vec(),
                    version: entry.version,
                    expires_at_ms: entry.expires_at_ms,
                }))
            });
            out.replies.push((waiter, partition, reply));
            return;
        }
        let mut once = request.once.as_ref();
        if self.planted.is_active() {
            once = once.filter(|_| !self.options.has(Plant::AnswersNotReplicated));
            if let Some(reply) = self.planted.asks(request) {
                out.replies.push((waiter, partition, reply));
                return;
            }
        }
        let meta = Meta { once, trace: None };
        if let Some((waiter, reply)) = hosted.replica.execute(now, &command, &meta, waiter) {
            out.replies.push((waiter, partition, reply));
        }
    }

    /// Writes what the replicas ask for until they ask for nothing more.
    fn write(&mut self, out: &mut Output) -> Result<(), LogError> {
        loop {
            let first = self.written.len();
            let mut sends = Vec::new();
            let partitions: Vec<u16> = self.hosted.keys().copied().collect();
            for partition in partitions {
                self.take_ready(partition, out, &mut sends)?;
            }
            if self.written.len() == first {
                return Ok(());
            }
            self.log.reserve(self.log.batch_bytes())?;
            self.log.write()?;
            for (partition, message) in sends {
                self.send(partition, message, out);
            }
        }
    }

    fn take_ready(
        &mut self,
        partition: u16,
        out: &mut Output,
        sends: &mut Vec<(u16, Message)>,
    ) -> Result<(), LogError> {
        let Some(hosted) = self.hosted.get_mut(&partition) else { return Ok(()) };
        let (mut replies, mut batches) = (Vec::new(), Vec::new());
        let broken = loop {
            match hosted.replica.ready(&mut replies) {
                Ok(Some(ready)) => batches.push(ready),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = broken {
            panic!("partition {partition} is broken: {error:?}");
        }
        out.replies.extend(replies.into_iter().map(|(waiter, reply)| (waiter, partition, reply)));
        if self.planted.is_active() {
            self.planted.answers(&out.replies);
            let own = batches.iter().flat_map(|ready: &Ready| &ready.entries);
            out.replies.extend(self.planted.acknowledges(partition, own));
        }
        for ready in batches {
            self.append(partition, &ready, out)?;
            let is_vote = ready.state.is_some() && ready.entries.is_empty();
            let Ready { number, messages, persisted_messages, .. } = ready;
            sends.extend(messages.into_iter().map(|message| (partition, message)));
            self.written.push(Written { partition, number, messages: persisted_messages, is_vote });
        }
        if let Some(hosted) = self.hosted.get_mut(&partition) {
            hosted.pass_on_changes();
        }
        Ok(())
    }

    fn append(&mut self, partition: u16, ready: &Ready, out: &mut Output) -> Result<(), LogError> {
        if let Some(state) = &ready.state {
            self.append_state(partition, state)?;
        }
        let Some(hosted) = self.hosted.get_mut(&partition) else { return Ok(()) };
        if let Some(state) = &ready.state
            && state.start != hosted.start
        {
            hosted.start = state.start;
            hosted.shadow.clear();
            hosted.checked = state.start;
        }
        for entry in &ready.entries {
            let (index, term) = (entry.index, entry.term);
            let contents = Contents { entry_type: entry.entry_type, payload: entry.data.to_vec() };
            hosted.shadow.split_off(&index);
            let before = hosted.shadow.get(&(index - 1)).map(|(term, _)| *term);
            hosted.shadow.insert(index, (term, contents.clone()));
            if self.options.has(Plant::FeedBeforeCommit) {
                hosted.feed.proposed(entry);
            }
            out.appended.push(Appended { partition, position: (index, term), before, contents });
            self.log.append(&Record::Entry(Entry {
                partition,
                entry_type: entry.entry_type as u8,
                term,
                index,
                commit: ready.commit,
                payload: &entry.data,
            }))?;
        }
        Ok(())
    }

    fn send(&mut self, partition: u16, message: Message, out: &mut Output) {
        if message.msg_type() == MessageType::MsgSnapshot {
            self.send_snapshot(partition, &message, out);
        } else {
            out.messages.push((partition, message));
        }
    }

    fn begin_sync(&mut self, early: bool, out: &mut Output) {
        if self.syncing.is_some() || self.written.is_empty() {
            return;
        }
        let only_votes = self.written.iter().all(|written| written.is_vote);
        if only_votes && self.options.has(Plant::VotesNotSynced) {
            let covers = std::mem::take(&mut self.written);
            self.persisted(covers, out);
            out.again = true;
            return;
        }
        let target = self.log.sync_target();
        let result = (early && !self.options.has(Plant::SkippedSync)).then(|| target.sync());
        self.syncing = Some(Syncing { covers: std::mem::take(&mut self.written), result, target });
        out.syncing = true;
    }

    fn persisted(&mut self, covers: Vec<Written>, out: &mut Output) {
        for Written { partition, number, messages, .. } in covers {
            let Some(hosted) = self.hosted.get_mut(&partition) else { continue };
            if hosted.replica.persisted(number) {
                hosted.pass_on_changes();
            }
            for message in messages {
                self.send(partition, message, out);
            }
        }
    }
}

fn is_read(work: &Work) -> bool {
    matches!(work, Work::Request(request) if request.ask == Ask::Call(Call::Get))
}

/// The planted bug: what is expired goes, though no effect says so.
fn drop_expired(table: &Table, now_ms: u64) {
    let mut expired = Vec::new();
    table.scan(Position(0), usize::MAX, |entry| {
        if entry.expires_at_ms.is_some_and(|at| at <= now_ms) {
            expired.push(entry.key.to_vec());
        }
    });
    for key in expired {
        table.remove(table.hash(&key), &key);
    }
}

/// What a client asks, as a command.
fn command<'a>(key: &'a [u8], ask: Ask, text: &'a mut String) -> Command<&'a [u8]> {
    let set = |value: i64, text: &'a mut String, expiry, condition| {
        *text = value.to_string();
        let value = text.as_bytes();
        Command::Set { key, value, expiry, condition, return_previous: false }
    };
    match ask {
        Ask::Expiring(value, after) => set(value, text, Expiry::In(after), Condition::Always),
        Ask::Call(Call::Get) => Command::Get { key },
        Ask::Call(Call::Set(value)) => set(value, text, Expiry::Never, Condition::Always),
        Ask::Call(Call::SetIfAbsent(value)) => set(value, text, Expiry::Never, Condition::IfAbsent),
        Ask::Call(Call::SetIfVersion(version, value)) => {
            set(value, text, Expiry::Never, Condition::IfVersion(version))
        }
        Ask::Call(Call::Delete) => Command::Delete { keys: vec![key] },
        Ask::Call(Call::Increment(delta)) => Command::Increment { key, delta },
    }
}
