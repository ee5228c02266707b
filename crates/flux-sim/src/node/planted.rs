//! The planted bugs that need a memory: what a node answers that it should not.

use std::collections::BTreeMap;

use flux_core::Reply;
use flux_core::effect::{Effect, Effects};
use flux_core::session::Once;
use raft::eraftpb::Entry;

use super::Waiter;
use crate::check::history::Call;
use crate::client::{Ask, Request};
use crate::plant::Plant;

/// What a node with a planted bug remembers.
#[derive(Debug, Default)]
pub(super) struct Planted {
    plant: Option<Plant>,
    /// Who waits for a write, by the value that it writes.
    by_value: BTreeMap<Vec<u8>, Waiter>,
    by_waiter: BTreeMap<Waiter, Once>,
    /// Answers by session and sequence.
    answers: BTreeMap<(u64, u64), Reply>,
}

impl Planted {
    pub(super) fn new(plant: Option<Plant>) -> Planted {
        Planted { plant, ..Planted::default() }
    }

    /// Whether the node's bug is one of those here.
    pub(super) fn is_active(&self) -> bool {
        matches!(self.plant, Some(Plant::AcknowledgeBeforeCommit | Plant::AnswersNotReplicated))
    }

    /// A client asks for something; perhaps it asked before, of this very node.
    pub(super) fn asks(&mut self, request: &Request) -> Option<Reply> {
        let waiter = (request.client, request.attempt);
        if let Ask::Call(Call::Set(value)) = request.ask {
            self.by_value.insert(value.to_string().into_bytes(), waiter);
        }
        let once = request.once?;
        if self.plant != Some(Plant::AnswersNotReplicated) {
            return None;
        }
        self.by_waiter.insert(waiter, once);
        self.answers.get(&(once.session, once.sequence)).cloned()
    }

    /// Clients are answered.
    pub(super) fn answers(&mut self, replies: &[(Waiter, u16, Reply)]) {
        for (waiter, _, reply) in replies {
            let Some(once) = self.by_waiter.remove(waiter) else { continue };
            if !matches!(reply, Reply::Error(_)) {
                self.answers.insert((once.session, once.sequence), reply.clone());
            }
        }
    }

    /// Answers for writes that are in these entries, which were only just proposed.
    pub(super) fn acknowledges<'a>(
        &mut self,
        partition: u16,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> Vec<(Waiter, u16, Reply)> {
        let mut replies = Vec::new();
        if self.plant != Some(Plant::AcknowledgeBeforeCommit) {
            return replies;
        }
        let batches = entries.filter(|entry| entry.entry_type == 0);
        for (version, effect) in
            batches.flat_map(|entry| Effects::new(&entry.data)).flatten().flatten()
        {
            if let Effect::Put { value, .. } = effect
                && let Some(waiter) = self.by_value.remove(value)
            {
                replies.push((waiter, partition, Reply::Written { version }));
            }
        }
        replies
    }
}
