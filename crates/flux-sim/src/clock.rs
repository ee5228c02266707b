//! A node's two clocks as functions of the simulation's true time.
//!
//! The monotonic clock runs at its own rate and never steps back while the machine is up; the wall
//! clock runs along with it and may be set to anything at any time. Nobody reads a real clock here.

/// The wall clock of a node without skew at true time 0, in Unix milliseconds.
pub const EPOCH_MS: u64 = 1_750_000_000_000;

/// Parts in a million: the unit of a clock's rate error.
const MILLION: i128 = 1_000_000;

/// The clocks of one machine. True time is in microseconds since the simulation began.
#[derive(Clone, Debug)]
pub struct NodeClock {
    /// Since when `rate_ppm` holds, and what the monotonic clock showed then.
    since_us: u64,
    since_monotonic_us: u64,
    rate_ppm: i64,
    /// What to add to the monotonic clock for the wall clock, in microseconds.
    wall_offset_us: i64,
}

impl NodeClock {
    /// A clock that runs `rate_ppm` parts in a million too fast, and shows `start_us` at true time
    /// `now_us`; its wall clock is right but for `skew_ms`.
    pub fn new(now_us: u64, start_us: u64, rate_ppm: i64, skew_ms: i64) -> NodeClock {
        let wall_offset_us =
            (EPOCH_MS * 1000) as i64 + now_us as i64 - start_us as i64 + skew_ms * 1000;
        NodeClock { since_us: now_us, since_monotonic_us: start_us, rate_ppm, wall_offset_us }
    }

    /// The monotonic clock, in microseconds from an arbitrary start.
    pub fn monotonic_us(&self, now_us: u64) -> u64 {
        let elapsed = i128::from(now_us.saturating_sub(self.since_us));
        let shown = elapsed * (MILLION + i128::from(self.rate_ppm)) / MILLION;
        self.since_monotonic_us + shown as u64
    }

    /// The wall clock, in Unix milliseconds.
    pub fn wall_ms(&self, now_us: u64) -> u64 {
        (self.monotonic_us(now_us) as i64 + self.wall_offset_us).max(0) as u64 / 1000
    }

    /// The first true time at which the monotonic clock shows at least `monotonic_us`.
    pub fn true_us(&self, monotonic_us: u64) -> u64 {
        let ahead = i128::from(monotonic_us.saturating_sub(self.since_monotonic_us));
        let rate = MILLION + i128::from(self.rate_ppm);
        self.since_us + ((ahead * MILLION + rate - 1) / rate) as u64
    }

    /// Gives the clock another rate from now on.
    pub fn set_rate(&mut self, now_us: u64, rate_ppm: i64) {
        self.since_monotonic_us = self.monotonic_us(now_us);
        self.since_us = now_us;
        self.rate_ppm = rate_ppm;
    }

    /// Steps the wall clock.
    pub fn step_wall(&mut self, by_ms: i64) {
        self.wall_offset_us += by_ms * 1000;
    }

    /// The machine starts again: its monotonic clock begins anew, the wall clock goes on.
    pub fn reboot(&mut self, now_us: u64, start_us: u64) {
        let shown = self.monotonic_us(now_us);
        self.wall_offset_us += shown as i64 - start_us as i64;
        self.since_us = now_us;
        self.since_monotonic_us = start_us;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_clock_gains_and_is_inverted_exactly() {
        let mut clock = NodeClock::new(1000, 500, 50_000, 0);
        assert_eq!(clock.monotonic_us(1000), 500);
        assert_eq!(clock.monotonic_us(1_001_000), 1_050_500);
        for shown in [500, 501, 1234, 99_999] {
            let at = clock.true_us(shown);
            assert!(clock.monotonic_us(at) >= shown, "{shown} is not reached at {at}");
            assert!(at == 1000 || clock.monotonic_us(at - 1) < shown, "{shown} is reached earlier");
        }
        clock.set_rate(1_001_000, -50_000);
        assert_eq!(clock.monotonic_us(2_001_000), 1_050_500 + 950_000);
    }

    #[test]
    fn the_wall_clock_steps_and_survives_a_reboot() {
        let mut clock = NodeClock::new(0, 77_000_000, 0, 5);
        assert_eq!(clock.wall_ms(0), EPOCH_MS + 5);
        clock.step_wall(-3_600_000);
        assert_eq!(clock.wall_ms(1_000_000), EPOCH_MS + 5 + 1000 - 3_600_000);
        clock.reboot(2_000_000, 9);
        assert_eq!(clock.monotonic_us(2_000_000), 9);
        assert_eq!(clock.wall_ms(2_000_000), EPOCH_MS + 5 + 2000 - 3_600_000);
    }
}
