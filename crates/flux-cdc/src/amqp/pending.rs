//! Messages that went to the broker and have no confirm yet, by their delivery tags.
//!
//! What this module does not do: know what a message holds, or send it again.

use std::collections::VecDeque;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in every queue that takes it, and there is one.
    Stored,
    /// No queue takes it.
    Returned {
        /// What the broker says.
        reason: String,
    },
    /// The broker could not store it.
    Refused,
    /// It is too large for the broker.
    TooLarge {
        /// What the broker says.
        reason: String,
    },
    /// The connection ended first: it may be stored or not.
    Unknown,
}

/// A message that waits for its confirm.
#[derive(Debug)]
pub struct Waiting {
    /// Its message id.
    pub id: String,
    /// The bytes that it takes on the wire.
    pub size: usize,
    /// Since when.
    pub since: Instant,
    /// Gets the outcome; dropped, it means [`Outcome::Unknown`].
    pub reply: oneshot::Sender<Outcome>,
}

/// All messages of a channel that wait. Tags count 1, 2, 3, … in the order in which they went.
#[derive(Debug, Default)]
pub struct Pending {
    /// How many messages left at the front.
    settled: u64,
    /// None: confirmed out of order.
    messages: VecDeque<Option<(Waiting, Option<String>)>>,
}

impl Pending {
    /// A message went out.
    pub fn push(&mut self, waiting: Waiting) {
        self.messages.push_back(Some((waiting, None)));
    }

    /// Since when the oldest message waits.
    pub fn oldest(&self) -> Option<Instant> {
        self.messages.front()?.as_ref().map(|(waiting, _)| waiting.since)
    }

    /// The broker gives a message back; its confirm follows.
    pub fn give_back(&mut self, id: &str, reason: String) {
        // A partition that is led anew may have sent the same one again: then both come back, in their order.
        let mut waiting = self.messages.iter_mut().flatten();
        let found = waiting.find(|(waiting, returned)| waiting.id == id && returned.is_none());
        if let Some((_, returned)) = found {
            *returned = Some(reason);
        }
    }

    /// The broker ends the channel since a message is too large for it. It does not say which, but the
    /// largest one must be.
    pub fn refuse_largest(&mut self, reason: String) {
        let largest = self
            .messages
            .iter_mut()
            .max_by_key(|message| message.as_ref().map_or(0, |(waiting, _)| waiting.size));
        if let Some((waiting, _)) = largest.and_then(Option::take) {
            // Whoever waited may have been stopped.
            let _ = waiting.reply.send(Outcome::TooLarge { reason });
        }
    }

    /// The broker confirms or refuses a message, or all up to it. Gives how many; none where there
    /// is no such message, which breaks the protocol.
    pub fn settle(&mut self, tag: u64, multiple: bool, is_stored: bool) -> Option<usize> {
        // Tag 0 stands for all.
        let count = match tag {
            0 if multiple => self.messages.len(),
            _ => usize::try_from(tag.checked_sub(self.settled)?).ok()?,
        };
        let first = if multiple { 0 } else { count.checked_sub(1)? };
        if count > self.messages.len() {
            return None;
        }
        let mut settled = 0;
        for message in self.messages.range_mut(first..count) {
            if let Some((waiting, returned)) = message.take() {
                let outcome = match returned {
                    _ if !is_stored => Outcome::Refused,
                    Some(reason) => Outcome::Returned { reason },
                    None => Outcome::Stored,
                };
                settled += 1;
                // Whoever waited may have been stopped.
                let _ = waiting.reply.send(outcome);
            }
        }
        while let Some(None) = self.messages.front() {
            self.messages.pop_front();
            self.settled += 1;
        }
        Some(settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(count: u64) -> (Pending, Vec<oneshot::Receiver<Outcome>>) {
        let mut pending = Pending::default();
        let receivers = (1..=count).map(|number| {
            let (reply, receiver) = oneshot::channel();
            let size = (100 * number % 300) as usize;
            pending.push(Waiting {
                id: format!("c/7/{number}"),
                size,
                since: Instant::now(),
                reply,
            });
            receiver
        });
        let receivers = receivers.collect();
        (pending, receivers)
    }

    fn outcomes(receivers: &mut [oneshot::Receiver<Outcome>]) -> Vec<Option<Outcome>> {
        receivers.iter_mut().map(|receiver| receiver.try_recv().ok()).collect()
    }

    #[test]
    fn confirms_come_alone_together_and_out_of_order() {
        let (mut pending, mut receivers) = pending(5);
        assert_eq!(pending.settle(3, false, true), Some(1));
        assert_eq!(pending.settle(1, false, false), Some(1));
        assert_eq!(pending.settle(4, true, true), Some(2));
        let stored = Some(Outcome::Stored);
        let expected = [Some(Outcome::Refused), stored.clone(), stored.clone(), stored, None];
        assert_eq!(outcomes(&mut receivers), expected);
        assert_eq!(pending.settle(0, true, true), Some(1));
        assert!(pending.oldest().is_none());
    }

    #[test]
    fn a_returned_message_is_not_stored_although_it_is_confirmed() {
        let (mut pending, mut receivers) = pending(3);
        pending.give_back("c/7/2", "NO_ROUTE".to_owned());
        pending.give_back("c/7/9", "NO_ROUTE".to_owned());
        assert_eq!(pending.settle(3, true, true), Some(3));
        let returned = Outcome::Returned { reason: "NO_ROUTE".to_owned() };
        let expected = [Some(Outcome::Stored), Some(returned), Some(Outcome::Stored)];
        assert_eq!(outcomes(&mut receivers), expected);
    }

    #[test]
    fn a_message_that_is_out_twice_may_come_back_twice() {
        let (mut pending, mut receivers) = pending(2);
        let (reply, second) = oneshot::channel();
        pending.push(Waiting { id: "c/7/2".to_owned(), size: 1, since: Instant::now(), reply });
        receivers.push(second);
        pending.give_back("c/7/2", "first".to_owned());
        pending.give_back("c/7/2", "second".to_owned());
        assert_eq!(pending.settle(3, true, true), Some(3));
        let returned = |reason: &str| Some(Outcome::Returned { reason: reason.to_owned() });
        let expected = [Some(Outcome::Stored), returned("first"), returned("second")];
        assert_eq!(outcomes(&mut receivers), expected);
    }

    #[test]
    fn one_that_is_too_large_is_the_largest() {
        let (mut pending, mut receivers) = pending(4);
        pending.refuse_largest("too large".to_owned());
        let too_large = Some(Outcome::TooLarge { reason: "too large".to_owned() });
        assert_eq!(outcomes(&mut receivers), [None, too_large, None, None]);
    }

    #[test]
    fn a_tag_that_was_never_given_is_seen() {
        let (mut pending, _receivers) = pending(2);
        assert_eq!(pending.settle(3, false, true), None);
        assert_eq!(pending.settle(3, true, true), None);
        assert_eq!(pending.settle(u64::MAX, true, false), None);
        assert_eq!(pending.settle(0, false, true), None);
        assert_eq!(pending.settle(1, false, true), Some(1));
        assert_eq!(pending.settle(1, false, true), None);
        assert_eq!(pending.settle(2, false, true), Some(1));
    }
}
