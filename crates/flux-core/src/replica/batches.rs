//! Commands on the leader, from their evaluation to the entry that carries their effects: the open batch,
//! the proposed ones, and what those are told who wait for one that comes to nothing.
//!
//! What a command does is `evaluate`'s to say, and how a committed batch gets into the table that of
//! `committed`.

use super::{Meta, Now, Position, Proposed, Replica, Replies};
use crate::draft::{Draft, Previous, Repeat};
use crate::evaluate::evaluate;
use crate::{Command, Cursor, Error, MAX_REPLY_BYTES, Reply, UnixMillis};

/// Ticks after which a proposal's outcome is called unknown; it may still be committed.
const OUTCOME_TICKS: u64 = 100;

impl<W> Replica<W> {
    /// Evaluates a command. A reply that depends on nothing in flight comes back at once, if nobody else
    /// can lead now; any other is delivered by `ready`: when the batch that it depends on has been
    /// applied, or when a quorum has confirmed that this replica led. A write that is repeated with the
    /// same `meta.once` takes effect once, and gets the first answer.
    pub fn execute(
        &mut self,
        now: Now,
        command: &Command<&[u8]>,
        meta: &Meta<'_>,
        waiter: W,
    ) -> Option<(W, Reply)> {
        self.now = now;
        if !self.leads {
            return Some((waiter, Reply::Error(Error::NotLeader)));
        }
        self.in_flight.set_trace(meta.trace);
        let mut draft = Draft::new(&self.table, &mut self.in_flight, &self.memory, now.ms);
        let once = meta.once.filter(|_| command.is_write());
        let reply = match once.and_then(|once| draft.repeated(&self.sessions, once)) {
            Some(Repeat::Now(reply)) => return Some((waiter, reply)),
            Some(Repeat::InFlight(reply)) => reply,
            None => {
                let reply = evaluate(&mut draft, command);
                if let Some(once) = once {
                    draft.remember(once, &reply);
                }
                reply
            }
        };
        if self.in_flight.is_empty() {
            if self.has_lease() {
                return Some((waiter, reply));
            }
            return self.confirm_later(waiter, reply);
        }
        if self.open.is_empty() && self.proposed.is_empty() {
            self.waiting_bytes = 0;
        }
        // Reads of large values wait here for what they read from: that must not fill the memory.
        let waiting_bytes = self.waiting_bytes + reply.value_bytes();
        if waiting_bytes > MAX_REPLY_BYTES && !command.is_write() {
            return Some((waiter, Reply::Error(Error::Overloaded)));
        }
        self.waiting_bytes = waiting_bytes;
        self.open.push((waiter, reply));
        self.stir();
        None
    }

    /// Whether commands wait for `propose`.
    pub fn has_open_batch(&self) -> bool {
        !self.open.is_empty() || self.in_flight.open_bytes() > 0
    }

    /// How many batches were proposed that are not applied yet.
    pub fn proposals(&self) -> usize {
        self.proposed.len()
    }

    /// The size of the batch that `propose` would propose, at most.
    pub fn open_bytes(&self) -> usize {
        let open = self.in_flight.open_bytes();
        match self.previous() {
            Previous::Values => open + self.in_flight.previous_bytes(&self.table),
            Previous::Versions | Previous::Nothing => open,
        }
    }

    /// What its batches say of what their keys had before.
    pub(super) fn previous(&self) -> Previous {
        match (self.include_previous, self.previous_versions || self.captures) {
            (true, _) => Previous::Values,
            (false, true) => Previous::Versions,
            (false, false) => Previous::Nothing,
        }
    }

    /// The size of all that is evaluated and not yet applied.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight.bytes()
    }

    /// Makes the open batch one entry of the log. Commands without effects wait for the newest
    /// proposal that they may have read from; or, where nothing proves that this replica leads now, for
    /// an empty entry of their own. While leadership is being handed over the batch stays open.
    pub fn propose(&mut self, replies: &mut Replies<W>) {
        if !self.leads || self.node.raft.lead_transferee.is_some() {
            return;
        }
        let waiting = std::mem::take(&mut self.open);
        let sure = self.has_lease();
        let payload = match self.in_flight.close(&self.table, self.previous()) {
            Some(batch) => batch.payload.to_vec(),
            None if waiting.is_empty() => return,
            // What a quorum has said of earlier proposals it may have said before these commands came.
            None if !sure => Vec::new(),
            None => {
                match self.proposed.back_mut() {
                    Some(last) => last.replies.extend(waiting),
                    None => replies.extend(waiting),
                }
                return;
            }
        };
        let proposed = self.node.propose(Vec::new(), payload);
        proposed.expect("a leader that does not hand over takes proposals");
        self.stir();
        let raft = &self.node.raft;
        let position = Position { index: raft.raft_log.last_index(), term: raft.term };
        self.proposed.push_back(Proposed { position, replies: waiting, tick: self.ticks });
    }

    /// Adds to the open batch how far changes have been passed on. False if that is not news, here or in
    /// flight, or if this replica does not lead or is about to hand over. It counts once its batch is applied,
    /// see [`cursor`](Replica::cursor), and is lost with it if it comes to nothing.
    pub fn propose_cursor(&mut self, cursor: Cursor) -> bool {
        let newest = self.cursor.max(self.in_flight.cursor().unwrap_or_default());
        let is_news = newest.revision < cursor.revision && cursor.revision <= self.revision;
        if !is_news || !self.leads || self.node.raft.lead_transferee.is_some() {
            return false;
        }
        self.in_flight.set_cursor(self.now.ms, cursor);
        self.stir();
        true
    }

    /// Gives up the open batch, which was never proposed: its commands get `error`.
    pub fn refuse_open(&mut self, now_ms: UnixMillis, error: &Error, replies: &mut Replies<W>) {
        self.rearm_timers(now_ms);
        self.in_flight.discard_open(&self.table);
        replies.extend(refused(std::mem::take(&mut self.open), error));
    }

    /// Gives up everything in flight because the log failed: it may be on disk or not. The owner must
    /// call nothing but reads after this.
    pub fn abandon(&mut self, replies: &mut Replies<W>) {
        self.in_flight.discard_all();
        let proposed = self.proposed.drain(..).flat_map(|batch| batch.replies);
        let waiting = proposed.chain(std::mem::take(&mut self.open)).collect();
        replies.extend(refused(waiting, &Error::OutcomeUnknown));
        replies.append(&mut self.decided);
        replies.extend(self.rounds.stop());
    }

    /// Answers those who wait for what was proposed here, all of which may still be committed. For an owner
    /// that cannot go on with `ready` for long.
    pub fn give_up_outcomes(&mut self, replies: &mut Replies<W>) {
        give_up(self.proposed.iter_mut(), replies);
    }

    /// The same for those who have waited too long.
    pub(super) fn give_up_overdue(&mut self) {
        let overdue = |batch: &Proposed<W>| self.ticks - batch.tick > OUTCOME_TICKS;
        let count = self.proposed.iter().take_while(|batch| overdue(batch)).count();
        give_up(self.proposed.iter_mut().take(count), &mut self.decided);
    }
}

fn give_up<'a, W: 'a>(
    batches: impl Iterator<Item = &'a mut Proposed<W>>,
    replies: &mut Replies<W>,
) {
    for batch in batches {
        replies.extend(refused(std::mem::take(&mut batch.replies), &Error::OutcomeUnknown));
    }
}

pub(super) fn refused<W>(waiting: Replies<W>, error: &Error) -> impl Iterator<Item = (W, Reply)> {
    waiting.into_iter().map(move |(waiter, _)| (waiter, Reply::Error(error.clone())))
}
