//! The retry budget: a token bucket that requests fill and retries empty, so that retries stay a
//! fixed share of the load however bad things are (as in Finagle and Envoy).

use std::sync::atomic::{AtomicU64, Ordering};

/// One retry, in hundredths: what a percentage counts in.
const RETRY: u64 = 100;

/// The budget of one client. Counts only; the order among threads does not matter.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    hundredths: AtomicU64,
    per_request: u64,
    capacity: u64,
}

impl RetryBudget {
    pub(crate) fn new(percent: u32, reserve: u32) -> RetryBudget {
        let capacity = u64::from(reserve) * RETRY;
        RetryBudget {
            hundredths: AtomicU64::new(capacity),
            per_request: u64::from(percent),
            capacity,
        }
    }

    /// Notes a first attempt.
    pub(crate) fn deposit(&self) {
        let current = self.hundredths.load(Ordering::Relaxed);
        if current < self.capacity {
            // A race may overfill by one deposit per thread, which harms nothing.
            self.hundredths.fetch_add(self.per_request, Ordering::Relaxed);
        }
    }

    /// Takes one retry, if there is one.
    pub(crate) fn withdraw(&self) -> bool {
        let take = |current: u64| current.checked_sub(RETRY);
        self.hundredths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_requests_once_the_reserve_is_spent() {
        let budget = RetryBudget::new(10, 3);
        assert_eq!((0..10).filter(|_| budget.withdraw()).count(), 3);
        let retries = (0..1000).filter(|_| {
            budget.deposit();
            budget.withdraw()
        });
        assert_eq!(retries.count(), 100);
    }

    #[test]
    fn the_reserve_is_also_the_most() {
        let budget = RetryBudget::new(10, 3);
        (0..1000).for_each(|_| budget.deposit());
        assert_eq!((0..10).filter(|_| budget.withdraw()).count(), 3);
    }
}
