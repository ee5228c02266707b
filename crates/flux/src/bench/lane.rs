//! One client under load: sends what is due, and measures each reply.
//!
//! It has one connection, or in a cluster one to each node that leads anything, and its window is of all
//! of them together. A lane writes a batch with one system call and reads as many replies as have arrived with one
//! more, on each connection. It never waits to write before it reads, so a server that answers a long pipeline while it
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
    slots::Slots,
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
    /// Which connection is whose in a cluster; `None` where there is only one.
    pub slots: Option<Slots>,
    /// What is sent and received; starts empty.
    pub traffic: Traffic,
}

/// The state of a lane's connections.
#[derive(Default)]
pub struct Traffic {
    links: Vec<Link>,
    /// How many requests are in flight on all of them.
    in_flight: usize,
    /// Whether a reply said that the leaders are not those of `slots`.
    moved: bool,
}

/// The state of one connection.
#[derive(Default)]
struct Link {
    greeted: bool,
    input: Vec<u8>,
    /// How much of `input` has been dealt with.
    consumed: usize,
    output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
    in_flight: InFlight,
}

/// The requests in flight on one connection, in the order of their ids.
struct InFlight {
    requests: VecDeque<Asked>,
    /// The id of the oldest; ids begin with 1.
    oldest: u64,
}

#[derive(Clone, Copy)]
struct Asked {
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
    /// Runs until the end of the phase, or until the leaders have changed. After an error, too, the lane
    /// can go on with other connections. In a cluster, `streams` are to the nodes of `slots`.
    pub async fn run<S>(&mut self, mut streams: Vec<S>) -> Result<(), LaneError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.traffic = Traffic::default();
        for _ in &streams {
            let mut link = Link::default();
            self.wire.hello(&mut link.output);
            self.traffic.links.push(link);
        }
        let outcome = self.talk(&mut streams).await;
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

    async fn talk<S>(&mut self, streams: &mut [S]) -> Result<(), LaneError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            let now = Instant::now();
            self.greet()?;
            self.send_due(now);
            let traffic = &self.traffic;
            if traffic.in_flight == 0
                && traffic.is_greeted()
                && (traffic.moved || self.sends_no_more(now))
            {
                return Ok(());
            }
            if self.window.give_up_at.is_some_and(|at| now >= at) {
                return Ok(());
            }
            let wake_at = self.wake_at();
            let arrived = poll_fn(|context| self.poll(context, streams, wake_at)).await?;
            if arrived > 0 {
                self.take_replies(arrived)?;
            }
        }
    }

    fn greet(&mut self) -> Result<(), WireError> {
        for link in &mut self.traffic.links {
            if !link.greeted
                && let Some(length) = self.wire.greeting(&link.input)?
            {
                link.consumed += length;
                link.greeted = true;
            }
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
        if self.traffic.moved || !self.traffic.is_greeted() {
            return;
        }
        // A closed loop sends its next batch when the last one is answered, as redis-benchmark
        // does.
        if matches!(self.pace, Pace::Closed) && self.traffic.in_flight > 0 {
            return;
        }
        while self.traffic.in_flight < self.pipeline && !self.sends_no_more(now) {
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
            let request = self.workload.next();
            let place = self.slots.as_ref().map_or(0, |slots| slots.leader_of(request.key));
            let link = &mut self.traffic.links[place];
            let id = link.in_flight.push(request.operation, due);
            self.wire.encode(id, &request, &mut link.output);
            self.traffic.in_flight += 1;
        }
    }

    /// When the lane must look again though nothing arrives.
    fn wake_at(&self) -> Option<Instant> {
        match &self.pace {
            Pace::Open(schedule)
                if self.traffic.is_greeted()
                    && !self.traffic.moved
                    && self.traffic.in_flight < self.pipeline
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
        streams: &mut [S],
        wake_at: Option<Instant>,
    ) -> Poll<io::Result<usize>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut sent, mut received) = (0, 0);
        for (link, stream) in self.traffic.links.iter_mut().zip(streams) {
            sent += link.write(context, stream)?;
            received += link.read(context, stream)?;
        }
        self.measurements.borrow_mut().bytes_sent += sent as u64;
        if received > 0 {
            return Poll::Ready(Ok(received));
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
        for link in traffic.links.iter_mut().filter(|link| link.greeted) {
            while let Some(reply) = self.wire.reply(&link.input[link.consumed..])? {
                link.consumed += reply.length;
                let asked = link.in_flight.answer(reply.id).ok_or(WireError::Unasked)?;
                answered += 1;
                if asked.due >= self.window.measure_from {
                    match reply.error {
                        None => measurements.success(asked.operation, now - asked.due),
                        Some(kind) => measurements.failure(&String::from_utf8_lossy(kind), 1),
                    }
                }
                traffic.moved |=
                    self.slots.is_some() && reply.error.is_some_and(Slots::is_outdated_by);
            }
            link.input.drain(..link.consumed);
            link.consumed = 0;
        }
        traffic.in_flight -= answered;
        self.shared.answered.fetch_add(answered as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Counts what is in flight as failed.
    fn abandon(&mut self, kind: &str) {
        let from = self.window.measure_from;
        let asked = self.traffic.links.iter().flat_map(|link| &link.in_flight.requests);
        let open = asked.filter(|one| !one.answered && one.due >= from).count();
        self.measurements.borrow_mut().failure(kind, open as u64);
        self.traffic.links.clear();
    }
}

impl Traffic {
    fn is_greeted(&self) -> bool {
        self.links.iter().all(|link| link.greeted)
    }
}

impl Link {
    /// Writes what can be written; gives the count of bytes.
    fn write<S>(&mut self, context: &mut Context<'_>, stream: &mut S) -> io::Result<usize>
    where
        S: AsyncWrite + Unpin,
    {
        let mut sent = 0;
        while self.written < self.output.len() {
            match Pin::new(&mut *stream).poll_write(context, &self.output[self.written..])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => {
                    self.written += count;
                    sent += count;
                }
                Poll::Pending => return Ok(sent),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(sent)
    }

    /// Reads once, if anything has arrived; gives the count of bytes.
    fn read<S>(&mut self, context: &mut Context<'_>, stream: &mut S) -> io::Result<usize>
    where
        S: AsyncRead + Unpin,
    {
        self.input.reserve(READ_BYTES);
        match pin!(stream.read_buf(&mut self.input)).poll(context)? {
            Poll::Ready(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Poll::Ready(count) => Ok(count),
            Poll::Pending => Ok(0),
        }
    }
}

impl Default for InFlight {
    fn default() -> InFlight {
        InFlight { requests: VecDeque::new(), oldest: 1 }
    }
}

impl InFlight {
    /// Takes in a request; gives its id.
    fn push(&mut self, operation: Operation, due: Instant) -> u64 {
        self.requests.push_back(Asked { operation, due, answered: false });
        self.oldest + self.requests.len() as u64 - 1
    }

    /// What a reply is to: the request of this id, or the oldest one. `None` if nobody waits for it.
    fn answer(&mut self, id: Option<u64>) -> Option<Asked> {
        let place = id.map_or(Some(0), |id| id.checked_sub(self.oldest))?;
        let asked = self.requests.get_mut(usize::try_from(place).ok()?)?;
        let answered = std::mem::replace(&mut asked.answered, true);
        let asked = *asked;
        while self.requests.front().is_some_and(|oldest| oldest.answered) {
            self.requests.pop_front();
            self.oldest += 1;
        }
        (!answered).then_some(asked)
    }
}

#[cfg(test)]
mod tests;
