//! One connection under load: sends what is due, and measures each reply.
//!
//! A lane writes a batch with one system call and reads as many replies as have arrived with one
//! more. It never waits to write before it reads, so a server that answers a long pipeline while it
//! still reads it cannot block against it.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    time::Instant,
};

use super::{
    measure::{CONNECTION_LOST, Measurements},
    pace::{Pace, Timer},
    wire::{Wire, WireError},
    workload::{Operation, Workload},
};

/// The kind under which requests count that had no reply when the lane gave up.
pub const NO_REPLY: &str = "no reply";

const READ_BYTES: usize = 64 * 1024;

/// When a phase measures, and when it ends.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Requests that are due before this only warm up.
    pub measure_from: Instant,
    /// Requests that would be due from here on are not sent.
    pub stop_at: Option<Instant>,
    /// When to stop waiting for replies, and for a late schedule.
    pub give_up_at: Option<Instant>,
}

/// What lanes share with whoever watches them.
#[derive(Clone, Default)]
pub struct Shared {
    /// How many requests have been answered, well or not.
    pub answered: Arc<AtomicU64>,
    /// Set to end the phase early.
    pub stop: Arc<AtomicBool>,
}

/// What a lane needs to know.
pub struct Lane<W> {
    /// The protocol.
    pub wire: W,
    /// What to send.
    pub workload: Workload,
    /// When.
    pub pace: Pace,
    /// How many requests may be in flight.
    pub pipeline: usize,
    /// Until when.
    pub window: Window,
    /// How many requests are left to measure; `None` for no limit.
    pub quota: Option<u64>,
    /// What tells when the next request is due.
    pub timer: Timer,
    /// Where measurements go: those of the thread.
    pub measurements: Rc<RefCell<Measurements>>,
    /// For whoever watches.
    pub shared: Shared,
    /// What is sent and received; starts empty.
    pub traffic: Traffic,
}

/// The state of a lane's connection.
#[derive(Default)]
pub struct Traffic {
    greeted: bool,
    input: Vec<u8>,
    /// How much of `input` has been dealt with.
    consumed: usize,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
    in_flight: VecDeque<InFlight>,
    /// The id of the oldest request in flight; ids begin with 1 on each connection.
    oldest: u64,
}

struct InFlight {
    operation: Operation,
    due: Instant,
    answered: bool,
}

/// Why a lane's connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The server said something that the lane does not understand.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl<W: Wire> Lane<W> {
    /// Runs until the end of the phase. After an error the lane can go on with another connection.
    pub async fn run<S>(&mut self, mut stream: S) -> Result<(), LaneError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.traffic = Traffic { oldest: 1, ..Traffic::default() };
        self.wire.hello(&mut self.traffic.output);
        let outcome = self.talk(&mut stream).await;
        let kind = if outcome.is_ok() { NO_REPLY } else { CONNECTION_LOST };
        self.abandon(kind);
        outcome
    }

    /// Whether nothing more is to be sent.
    pub fn is_over(&self) -> bool {
        let now = Instant::now();
        self.sends_no_more(now) || self.window.give_up_at.is_some_and(|at| now >= at)
    }

    /// Counts the requests of the schedule that will never be sent.
    pub fn count_unsent(&mut self) {
        if let (Pace::Open(schedule), Some(end)) = (&self.pace, self.window.stop_at)
            && !self.shared.stop.load(Ordering::Relaxed)
        {
            let left = schedule.left_before(end).min(self.quota.unwrap_or(u64::MAX));
            self.measurements.borrow_mut().unsent += left;
        }
    }

    async fn talk<S>(&mut self, stream: &mut S) -> Result<(), LaneError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            let now = Instant::now();
            self.greet()?;
            self.send_due(now);
            let idle = self.traffic.in_flight.is_empty();
            if idle && self.traffic.greeted && self.sends_no_more(now) {
                return Ok(());
            }
            if self.window.give_up_at.is_some_and(|at| now >= at) {
                return Ok(());
            }
            let wake_at = self.wake_at();
            let arrived = poll_fn(|context| self.poll(context, stream, wake_at)).await?;
            if arrived > 0 {
                self.take_replies(arrived)?;
            }
        }
    }

    fn greet(&mut self) -> Result<(), WireError> {
        let traffic = &mut self.traffic;
        if !traffic.greeted
            && let Some(length) = self.wire.greeting(&traffic.input)?
        {
            traffic.consumed += length;
            traffic.greeted = true;
        }
        Ok(())
    }

    fn sends_no_more(&self, now: Instant) -> bool {
        let next = match &self.pace {
            Pace::Closed => now,
            Pace::Open(schedule) => schedule.due(),
        };
        self.quota == Some(0)
            || self.window.stop_at.is_some_and(|end| next >= end)
            || self.shared.stop.load(Ordering::Relaxed)
    }

    /// Encodes the requests that are due and may go out.
    fn send_due(&mut self, now: Instant) {
        if !self.traffic.greeted {
            return;
        }
        // A closed loop sends its next batch when the last one is answered, as redis-benchmark
        // does.
        if matches!(self.pace, Pace::Closed) && !self.traffic.in_flight.is_empty() {
            return;
        }
        while self.traffic.in_flight.len() < self.pipeline && !self.sends_no_more(now) {
            let due = match &mut self.pace {
                Pace::Closed => now,
                Pace::Open(schedule) => {
                    let due = schedule.due();
                    if due > now {
                        break;
                    }
                    schedule.advance();
                    due
                }
            };
            if due >= self.window.measure_from
                && let Some(left) = &mut self.quota
            {
                *left -= 1;
            }
            let traffic = &mut self.traffic;
            let id = traffic.oldest + traffic.in_flight.len() as u64;
            let request = self.workload.next();
            self.wire.encode(id, &request, &mut traffic.output);
            let operation = request.operation;
            traffic.in_flight.push_back(InFlight { operation, due, answered: false });
        }
    }

    /// When the lane must look again though nothing arrives.
    fn wake_at(&self) -> Option<Instant> {
        match &self.pace {
            Pace::Open(schedule)
                if self.traffic.greeted
                    && self.traffic.in_flight.len() < self.pipeline
                    && !self.sends_no_more(schedule.due()) =>
            {
                let due = schedule.due();
                Some(self.window.give_up_at.map_or(due, |at| at.min(due)))
            }
            _ => self.window.give_up_at,
        }
    }

    /// Writes what can be written, and is ready with the count of bytes read, or with 0 when it is
    /// time to look at the schedule.
    fn poll<S>(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut S,
        wake_at: Option<Instant>,
    ) -> Poll<io::Result<usize>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let traffic = &mut self.traffic;
        while traffic.written < traffic.output.len() {
            let rest = &traffic.output[traffic.written..];
            match Pin::new(&mut *stream).poll_write(context, rest)? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(count) => {
                    traffic.written += count;
                    self.measurements.borrow_mut().bytes_sent += count as u64;
                }
                Poll::Pending => break,
            }
        }
        if traffic.written == traffic.output.len() {
            traffic.output.clear();
            traffic.written = 0;
        }
        traffic.input.reserve(READ_BYTES);
        match pin!(stream.read_buf(&mut traffic.input)).poll(context)? {
            Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            Poll::Ready(count) => return Poll::Ready(Ok(count)),
            Poll::Pending => {}
        }
        match wake_at {
            Some(at) => self.timer.poll_until(context, at).map(|woken| woken.map(|()| 0)),
            None => Poll::Pending,
        }
    }

    /// Measures the replies that have arrived.
    fn take_replies(&mut self, arrived: usize) -> Result<(), LaneError> {
        let now = Instant::now();
        let mut measurements = self.measurements.borrow_mut();
        measurements.bytes_received += arrived as u64;
        measurements.last_reply = Some(now);
        let traffic = &mut self.traffic;
        let mut answered = 0;
        while traffic.greeted
            && let Some(reply) = self.wire.reply(&traffic.input[traffic.consumed..])?
        {
            traffic.consumed += reply.length;
            let position = reply.id.map_or(Some(0), |id| id.checked_sub(traffic.oldest));
            let asked = position
                .and_then(|position| traffic.in_flight.get_mut(position as usize))
                .filter(|asked| !asked.answered)
                .ok_or(WireError::Unasked)?;
            asked.answered = true;
            answered += 1;
            if asked.due >= self.window.measure_from {
                match reply.error {
                    None => measurements.success(asked.operation, now - asked.due),
                    Some(kind) => measurements.failure(&String::from_utf8_lossy(kind), 1),
                }
            }
            while traffic.in_flight.front().is_some_and(|oldest| oldest.answered) {
                traffic.in_flight.pop_front();
                traffic.oldest += 1;
            }
        }
        traffic.input.drain(..traffic.consumed);
        traffic.consumed = 0;
        self.shared.answered.fetch_add(answered, Ordering::Relaxed);
        Ok(())
    }

    /// Counts what is in flight as failed.
    fn abandon(&mut self, kind: &str) {
        let from = self.window.measure_from;
        let open = self.traffic.in_flight.iter().filter(|one| !one.answered && one.due >= from);
        self.measurements.borrow_mut().failure(kind, open.count() as u64);
        self.traffic.in_flight.clear();
    }
}

#[cfg(test)]
mod tests;
