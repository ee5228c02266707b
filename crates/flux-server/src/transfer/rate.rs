//! One bound for all that a node sends in snapshots.
//!
//! The generic cell rate algorithm: each piece moves on the time at which the next one may go. Nothing
//! is said about fairness between transfers; they take turns as they ask.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// What was not used within this time is not made up for.
const BURST: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Rate {
    /// 0 for no limit.
    bytes_per_second: u64,
    /// When the next piece may go.
    next: Mutex<Option<Instant>>,
}

impl Rate {
    pub(super) fn new(bytes_per_second: u64) -> Rate {
        Rate { bytes_per_second, next: Mutex::new(None) }
    }

    /// Waits until a piece of so many bytes may go.
    pub(super) async fn take(&self, bytes: usize) {
        if self.bytes_per_second == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let now = Instant::now();
        let start = {
            let mut next = self.next.lock();
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let start = next.unwrap_or(now).max(earliest);
            *next = Some(start + cost);
            start
        };
        sleep_until(start).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A runtime whose time goes on by itself when all tasks wait.
    fn in_virtual_time(test: impl Future<Output = ()>) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(test);
    }

    #[test]
    fn two_transfers_share_the_rate() {
        in_virtual_time(async {
            let rate = Arc::new(Rate::new(1_000_000));
            let start = Instant::now();
            let tasks: Vec<_> = (0..2)
                .map(|_| {
                    let rate = Arc::clone(&rate);
                    tokio::spawn(async move {
                        for _ in 0..50 {
                            rate.take(100_000).await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            // 10 MB; the last piece goes when those before it are paid for.
            let took = start.elapsed().as_millis();
            assert!((9_900..=9_901).contains(&took), "{took} ms");
        });
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        in_virtual_time(async {
            let rate = Rate::new(1_000_000);
            rate.take(1000).await;
            tokio::time::sleep(Duration::from_secs(10)).await;
            let start = Instant::now();
            for _ in 0..10 {
                rate.take(100_000).await;
            }
            let took = start.elapsed().as_millis();
            assert!((850..=851).contains(&took), "{took} ms");
        });
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        in_virtual_time(async {
            let (rate, start) = (Rate::new(0), Instant::now());
            for _ in 0..1000 {
                rate.take(usize::MAX).await;
            }
            assert_eq!(start.elapsed(), Duration::ZERO);
        });
    }
}
