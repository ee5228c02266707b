//! Exponential backoff with full jitter: a random pause up to a limit that doubles.
//!
//! Full jitter spreads clients that failed together; see "Exponential Backoff And Jitter" (AWS
//! Architecture Blog, 2015).

use std::time::Duration;

/// The longest pause before attempt `failures + 1`, given how many failed: nothing after none.
pub(crate) fn limit(failures: u32, first: Duration, longest: Duration) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else {
        return Duration::ZERO;
    };
    first.saturating_mul(1 << doublings.min(16)).min(longest)
}

/// A random pause up to the limit.
pub(crate) fn jittered(limit: Duration) -> Duration {
    limit.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_doubles_and_is_bounded() {
        let ms = Duration::from_millis;
        let limits: Vec<_> = (0..6).map(|n| limit(n, ms(50), ms(500))).collect();
        assert_eq!(limits, [ms(0), ms(50), ms(100), ms(200), ms(400), ms(500)]);
        assert_eq!(limit(u32::MAX, ms(50), ms(500)), ms(500));
        assert!((0..100).all(|_| jittered(ms(50)) <= ms(50)));
    }
}
