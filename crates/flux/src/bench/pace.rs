//! When requests are due: at once (a closed loop), or on a schedule that does not wait for replies
//! (an open loop), and timers that are exact enough to keep it.
//!
//! In an open loop a request's latency counts from when it was due, also if it was sent later
//! because the server stalled. Measuring from when it was sent would leave out just the requests
//! that a stall hurt (Tene's "coordinated omission").

use std::{
    io,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;

/// The rhythm of one lane.
#[derive(Clone, Debug)]
pub enum Pace {
    /// The next batch goes out when the replies to the last one are in.
    Closed,
    /// Requests are due at fixed distances.
    Open(Schedule),
}

/// Points in time at a fixed distance from each other.
#[derive(Clone, Debug)]
pub struct Schedule {
    first: Instant,
    /// Nanoseconds from one request of all lanes to the next, and how many lanes share them.
    per_second: f64,
    lanes: u64,
    /// How many requests this lane has taken off the schedule.
    taken: u64,
}

impl Schedule {
    /// The share of one lane in `per_second` requests of all lanes, which take turns.
    pub fn new(start: Instant, per_second: f64, lane: u64, lanes: u64) -> Schedule {
        let first = start + Duration::from_secs_f64(lane as f64 / per_second);
        Schedule { first, per_second, lanes, taken: 0 }
    }

    /// When the next request is due.
    pub fn due(&self) -> Instant {
        let turns = self.taken as f64 * self.lanes as f64;
        self.first + Duration::from_secs_f64(turns / self.per_second)
    }

    /// Goes on to the request after.
    pub fn advance(&mut self) {
        self.taken += 1;
    }

    /// How many requests are due before `end` and not taken yet.
    pub fn left_before(&self, end: Instant) -> u64 {
        let mut rest = self.clone();
        let span = end.saturating_duration_since(rest.first).as_secs_f64();
        let guess = (span * self.per_second / self.lanes as f64) as u64;
        // Rounding may be off by one either way.
        rest.taken = guess.saturating_sub(2).max(self.taken);
        while rest.due() < end {
            rest.advance();
        }
        rest.taken - self.taken
    }
}

/// A timer that can be set again and again.
pub enum Timer {
    /// Tokio's own: to the millisecond.
    #[cfg(any(test, not(target_os = "linux")))]
    Coarse(std::pin::Pin<Box<tokio::time::Sleep>>),
    /// The kernel's: to some ten microseconds.
    #[cfg(target_os = "linux")]
    Exact(exact::Timer),
}

impl Timer {
    /// The timer that counts in the runtime's time, which tests can pause.
    #[cfg(any(test, not(target_os = "linux")))]
    pub fn coarse() -> Timer {
        Timer::Coarse(Box::pin(tokio::time::sleep_until(Instant::now())))
    }

    /// The most exact timer that there is.
    #[cfg(target_os = "linux")]
    pub fn exact() -> io::Result<Timer> {
        exact::Timer::new().map(Timer::Exact)
    }

    /// The most exact timer that there is.
    #[cfg(not(target_os = "linux"))]
    pub fn exact() -> io::Result<Timer> {
        Ok(Timer::coarse())
    }

    /// Ready once `at` has come.
    pub fn poll_until(&mut self, context: &mut Context<'_>, at: Instant) -> Poll<io::Result<()>> {
        match self {
            #[cfg(any(test, not(target_os = "linux")))]
            Timer::Coarse(sleep) => {
                if sleep.deadline() != at {
                    sleep.as_mut().reset(at);
                }
                Future::poll(sleep.as_mut(), context).map(Ok)
            }
            #[cfg(target_os = "linux")]
            Timer::Exact(timer) => timer.poll_until(context, at),
        }
    }
}

#[cfg(target_os = "linux")]
mod exact {
    use std::{
        io,
        os::fd::OwnedFd,
        task::{Context, Poll, ready},
    };

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    use tokio::{io::unix::AsyncFd, time::Instant};

    /// A timerfd.
    pub struct Timer {
        descriptor: AsyncFd<OwnedFd>,
        armed_for: Option<Instant>,
    }

    impl Timer {
        pub fn new() -> io::Result<Timer> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let descriptor = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            #[expect(
                deprecated,
                reason = "its unsafe successor is for types whose descriptor may change under it; that \
                          of an OwnedFd cannot"
            )]
            let descriptor = AsyncFd::new(descriptor)?;
            Ok(Timer { descriptor, armed_for: None })
        }

        pub fn poll_until(
            &mut self,
            context: &mut Context<'_>,
            at: Instant,
        ) -> Poll<io::Result<()>> {
            if self.armed_for != Some(at) {
                let wait = at.saturating_duration_since(Instant::now());
                if wait.is_zero() {
                    return Poll::Ready(Ok(()));
                }
                self.arm(wait)?;
                self.armed_for = Some(at);
            }
            loop {
                ready!(self.descriptor.poll_read_ready(context))?.clear_ready();
                let mut expirations = [0; 8];
                match rustix::io::read(self.descriptor.get_ref(), &mut expirations) {
                    Ok(_) => {
                        self.armed_for = None;
                        return Poll::Ready(Ok(()));
                    }
                    // Set again before the last setting was read.
                    Err(rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Poll::Ready(Err(error.into())),
                }
            }
        }

        fn arm(&self, wait: std::time::Duration) -> io::Result<()> {
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let once = Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(wait.subsec_nanos()),
            };
            let setting = Itimerspec { it_interval: zero, it_value: once };
            timerfd_settime(self.descriptor.get_ref(), TimerfdTimerFlags::empty(), &setting)?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lanes_take_turns_on_one_schedule() {
        let start = Instant::now();
        let mut due = Vec::new();
        for lane in 0..4 {
            let mut schedule = Schedule::new(start, 1000.0, lane, 4);
            for _ in 0..3 {
                due.push(schedule.due().duration_since(start).as_micros());
                schedule.advance();
            }
        }
        due.sort_unstable();
        assert_eq!(due, (0..12).map(|at| at * 1000).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_is_counted() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start, 1000.0, 0, 2);
        assert_eq!(schedule.left_before(start + Duration::from_secs(10)), 5000);
        for _ in 0..4990 {
            schedule.advance();
        }
        assert_eq!(schedule.left_before(start + Duration::from_secs(10)), 10);
        assert_eq!(schedule.left_before(start), 0);
    }

    #[tokio::test]
    async fn the_exact_timer_waits_and_can_be_set_again() {
        let mut timer = Timer::exact().expect("the system has timers");
        for _ in 0..2 {
            let at = Instant::now() + Duration::from_millis(2);
            std::future::poll_fn(|context| timer.poll_until(context, at)).await.expect("it works");
            assert!(Instant::now() >= at);
        }
        let past = Instant::now();
        std::future::poll_fn(|context| timer.poll_until(context, past)).await.expect("it works");
    }
}
