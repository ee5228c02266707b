//! What is wrong with publishing: each kind is told once when it begins and once when it is over,
//! however many partitions, messages and attempts it meets meanwhile.
//!
//! What this module does not do: decide what to do about it. Everything is tried again, always.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::feed::Feed;
use crate::metrics::Metrics;

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Trouble {
    /// There is no connection to the broker.
    Unreachable,
    /// The broker does not let this node in, or not do what it must.
    Refused,
    /// The exchange is not there and cannot be declared.
    NoExchange,
    /// The broker is short of memory or disk and takes no messages.
    Blocked,
    /// The broker takes long to confirm.
    Slow,
    /// A message came back: no queue takes it.
    Unroutable,
    /// The broker could not store a message.
    Nacked,
    /// The broker does not take a message of this size.
    TooLarge,
    /// The changes cannot be read.
    Unreadable,
}

impl Trouble {
    /// All kinds.
    pub const ALL: [Trouble; 9] = [
        Trouble::Unreachable,
        Trouble::Refused,
        Trouble::NoExchange,
        Trouble::Blocked,
        Trouble::Slow,
        Trouble::Unroutable,
        Trouble::Nacked,
        Trouble::TooLarge,
        Trouble::Unreadable,
    ];

    /// The name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Trouble::Unreachable => "unreachable",
            Trouble::Refused => "refused",
            Trouble::NoExchange => "no_exchange",
            Trouble::Blocked => "blocked",
            Trouble::Slow => "slow",
            Trouble::Unroutable => "unroutable",
            Trouble::Nacked => "nacked",
            Trouble::TooLarge => "too_large",
            Trouble::Unreadable => "unreadable",
        }
    }

    /// Whether a person must do something before it can end.
    const fn needs_a_person(self) -> bool {
        match self {
            Trouble::Refused
            | Trouble::NoExchange
            | Trouble::Unroutable
            | Trouble::TooLarge
            | Trouble::Unreadable => true,
            Trouble::Unreachable | Trouble::Blocked | Trouble::Slow | Trouble::Nacked => false,
        }
    }

    const fn advice(self) -> &'static str {
        match self {
            Trouble::Unreachable => "is the broker running, and rabbitmq_url its address?",
            Trouble::Refused => {
                "check user, password and virtual host of rabbitmq_url, and the user's right to \
                 write to the exchange"
            }
            Trouble::NoExchange => {
                "declare the exchange (topic, durable), or let the user of rabbitmq_url do so"
            }
            Trouble::Blocked => "give the broker memory or disk, or consume from its queues",
            Trouble::Slow => "the broker or its disk has too much to do",
            Trouble::Unroutable => {
                "bind a queue to the exchange with #, as `flux consume` does, or give the exchange \
                 an alternate one"
            }
            Trouble::Nacked => "the broker's log says why; is a queue full or without its leader?",
            Trouble::TooLarge => "raise max_message_size of the broker",
            Trouble::Unreadable => {
                "is the disk well, and are the files of the log as they were written?"
            }
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A trouble that ends and comes back within this is told again only if it lasts longer than that.
const QUIET: Duration = Duration::from_secs(10);

/// All troubles of a publisher.
pub(crate) struct Troubles {
    feed: Arc<dyn Feed>,
    metrics: Arc<Metrics>,
    states: Mutex<[State; Trouble::ALL.len()]>,
}

#[derive(Debug, Default)]
struct State {
    /// Who has it: partitions, or none for the whole publisher.
    active: BTreeSet<Option<u16>>,
    since: Option<Instant>,
    told: Option<Instant>,
    is_told: bool,
}

impl State {
    /// Whether this is to be told.
    fn begin(&mut self, who: Option<u16>, now: Instant) -> bool {
        if self.active.is_empty() {
            self.since = Some(now);
            self.is_told = false;
        }
        self.active.insert(who);
        let tells = !self.is_told && self.told.is_none_or(|told| now.duration_since(told) >= QUIET);
        if tells {
            self.is_told = true;
            self.told = Some(now);
        }
        tells
    }

    /// Whether this is to be told, and how long it took.
    fn end(&mut self, who: Option<u16>, now: Instant) -> Option<Duration> {
        if !self.active.remove(&who) || !self.active.is_empty() {
            return None;
        }
        let since = self.since.take().filter(|_| self.is_told)?;
        Some(now.duration_since(since))
    }
}

impl Troubles {
    pub(crate) fn new(feed: Arc<dyn Feed>, metrics: Arc<Metrics>) -> Troubles {
        Troubles { feed, metrics, states: Mutex::default() }
    }

    /// A partition, or the whole publisher, has it; `what` is what was seen.
    pub(crate) fn begin(&self, trouble: Trouble, who: Option<u16>, what: &str) {
        let is_told = {
            let mut states = self.states.lock();
            self.metrics.set_trouble(trouble, true);
            states[trouble as usize].begin(who, Instant::now())
        };
        let advice = trouble.advice();
        if is_told && trouble.needs_a_person() {
            tracing::error!(%trouble, partition = who, "changes are not published: {what}; {advice}");
        } else if is_told {
            tracing::warn!(%trouble, partition = who, "changes are not published: {what}; {advice}");
        }
    }

    /// It is over for a partition, or for the whole publisher.
    pub(crate) fn end(&self, trouble: Trouble, who: Option<u16>) {
        if !self.metrics.has_trouble(trouble) {
            return;
        }
        let told = {
            let mut states = self.states.lock();
            let state = &mut states[trouble as usize];
            let told = state.end(who, Instant::now());
            self.metrics.set_trouble(trouble, !state.active.is_empty());
            told
        };
        if let Some(lasted) = told {
            let events = self.metrics.lag(|partition| self.feed.newest(partition), 0).events;
            tracing::info!(%trouble, after = ?lasted, lag_events = events, "this trouble is over");
        }
    }

    /// A partition is not published from here any more: it has no trouble.
    pub(crate) fn forget(&self, partition: u16) {
        for trouble in Trouble::ALL {
            self.end(trouble, Some(partition));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn many_partitions_are_told_once_and_the_last_one_ends_it() {
        let start = Instant::now();
        let mut state = State::default();
        assert!(state.begin(Some(1), start));
        assert!(!state.begin(Some(2), start + SECOND));
        assert!(!state.begin(Some(1), start + SECOND));
        assert_eq!(state.end(Some(1), start + 2 * SECOND), None);
        assert_eq!(state.end(Some(1), start + 2 * SECOND), None);
        assert_eq!(state.end(Some(2), start + 3 * SECOND), Some(3 * SECOND));
    }

    #[test]
    fn what_comes_and_goes_is_told_every_ten_seconds_at_most() {
        let start = Instant::now();
        let mut state = State::default();
        assert!(state.begin(None, start));
        assert_eq!(state.end(None, start + SECOND), Some(SECOND));
        assert!(!state.begin(None, start + 2 * SECOND));
        assert_eq!(state.end(None, start + 3 * SECOND), None);
        assert!(!state.begin(None, start + 4 * SECOND));
        // One that stays is.
        assert!(state.begin(None, start + QUIET));
        assert!(!state.begin(None, start + QUIET + SECOND));
        assert_eq!(state.end(None, start + QUIET + SECOND), Some(QUIET - 3 * SECOND));
    }

    #[test]
    fn kinds_index_the_gauges() {
        for (at, trouble) in Trouble::ALL.into_iter().enumerate() {
            assert_eq!(trouble as usize, at);
        }
    }
}
