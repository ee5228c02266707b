//! One phase of a benchmark: a load of one shape, by several threads, from its start to its end.
//!
//! Each thread runs its lanes on an event loop of its own and measures into histograms of its own;
//! they are added up at the end.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};
use tokio::{
    net::TcpStream,
    runtime,
    task::LocalSet,
    time::{Instant, sleep},
};

use super::{
    grpc,
    lane::{Lane, Shared, Traffic, Window},
    measure::Measurements,
    pace::{Pace, Schedule, Timer},
    slots::Slots,
    wire::{Native, Resp, Wire},
    workload::{Shape, Workload},
};

/// How long a phase waits for replies, and for a late schedule, after its time.
const GRACE: Duration = Duration::from_secs(10);

const RECONNECT_AFTER: Duration = Duration::from_millis(100);

/// What to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// RESP2, as Redis clients do; works against Redis and Valkey too
    Resp,
    /// The native protocol
    Native,
    /// The gRPC service `flux.kv.v1.KV`
    Grpc,
}

/// A load.
#[derive(Clone, Debug)]
pub struct Phase {
    /// What to speak.
    pub protocol: Protocol,
    /// With whom; at least one. Connections take turns.
    pub addresses: Vec<String>,
    /// Whether these are nodes of a cluster, and each key is sent to its leader.
    pub cluster: bool,
    /// Connections; in a cluster, clients with a connection to each leader.
    pub clients: u64,
    /// Requests in flight on each.
    pub pipeline: u64,
    /// Threads that share the connections.
    pub threads: u64,
    /// What is asked.
    pub shape: Shape,
    /// How often, all connections together; `None` for a closed loop.
    pub rate: Option<f64>,
    /// How many requests to measure.
    pub requests: Option<u64>,
    /// How long to measure.
    pub duration: Option<Duration>,
    /// How long to run before measuring.
    pub warmup: Duration,
}

/// What a phase gave.
pub struct Outcome {
    /// The measurements of all threads.
    pub measurements: Measurements,
    /// From when measuring began to the last reply.
    pub elapsed: Duration,
}

/// One of the parts that a phase is divided into: connections, or for gRPC calls in flight.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Which one.
    pub lane: u64,
    /// Of how many.
    pub lanes: u64,
}

impl Phase {
    /// Runs the load; blocks until it is over.
    pub fn run(&self, shared: &Shared) -> anyhow::Result<Outcome> {
        let start_line = StartLine {
            barrier: Barrier::new(self.threads as usize),
            failed: AtomicBool::new(false),
        };
        let results: Vec<anyhow::Result<ThreadOutcome>> = thread::scope(|scope| {
            let start_line = &start_line;
            let threads: Vec<_> = (0..self.threads)
                .map(|number| scope.spawn(move || self.run_thread(number, start_line, shared)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the benchmark panicked")))
            };
            threads.into_iter().map(join).collect()
        });
        let mut measurements = Measurements::default();
        let mut elapsed = Duration::ZERO;
        let mut missing = None;
        for result in results {
            match result? {
                Some((part, took)) => {
                    measurements.add(&part);
                    elapsed = elapsed.max(took);
                }
                None => missing = Some(()),
            }
        }
        match missing {
            None => Ok(Outcome { measurements, elapsed }),
            Some(()) => Err(anyhow!("another thread failed")),
        }
    }

    fn run_thread(
        &self,
        number: u64,
        start_line: &StartLine,
        shared: &Shared,
    ) -> anyhow::Result<ThreadOutcome> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let local = LocalSet::new();
        let run = async {
            match self.protocol {
                Protocol::Resp => self.run_lanes(number, start_line, shared, || Resp).await,
                Protocol::Native => self.run_lanes(number, start_line, shared, || Native).await,
                Protocol::Grpc => grpc::run_calls(self, number, start_line, shared).await,
            }
        };
        local.block_on(&runtime, run)
    }

    async fn run_lanes<W: Wire + 'static>(
        &self,
        number: u64,
        start_line: &StartLine,
        shared: &Shared,
        wire: impl Fn() -> W,
    ) -> anyhow::Result<ThreadOutcome> {
        let mine = (number..self.clients).step_by(self.threads as usize);
        let mut ready = Vec::new();
        let mut connected = Ok(());
        for lane in mine {
            match Connections::open(self.address(lane), self.cluster).await {
                Ok(connections) => ready.push((lane, connections)),
                Err(error) => connected = Err(error),
            }
            if connected.is_err() {
                break;
            }
        }
        let Some(start) = start_line.wait(connected)? else {
            return Ok(None);
        };
        let measurements = Rc::new(RefCell::new(Measurements::default()));
        let window = self.window(start);
        let mut tasks = Vec::new();
        for (lane, connections) in ready {
            let share = Share { lane, lanes: self.clients };
            let addresses = self.addresses_of(lane);
            let lane = Lane {
                wire: wire(),
                workload: Workload::new(self.shape.clone(), lane, self.clients),
                pace: self.pace(start, share),
                pipeline: self.pipeline as usize,
                window,
                quota: self.quota(share),
                timer: Timer::exact()?,
                measurements: measurements.clone(),
                shared: shared.clone(),
                slots: None,
                traffic: Traffic::default(),
            };
            let task = run_lane(lane, connections, addresses);
            tasks.push(tokio::task::spawn_local(task));
        }
        for task in tasks {
            task.await?;
        }
        Ok(Some(finished(measurements.take(), window)))
    }

    /// Where a connection goes.
    pub fn address(&self, client: u64) -> &str {
        &self.addresses[(client % self.addresses.len() as u64) as usize]
    }

    /// Where a connection goes, and where it goes next each time that it breaks.
    fn addresses_of(&self, client: u64) -> Vec<String> {
        let count = self.addresses.len() as u64;
        (client..client + count).map(|turn| self.address(turn).to_owned()).collect()
    }

    /// When the phase measures, having begun at `start`.
    pub fn window(&self, start: Instant) -> Window {
        let measure_from = start + self.warmup;
        let stop_at = self.duration.map(|duration| measure_from + duration);
        Window { measure_from, stop_at, give_up_at: stop_at.map(|at| at + GRACE) }
    }

    /// The rhythm of one part.
    pub fn pace(&self, start: Instant, share: Share) -> Pace {
        match self.rate {
            None => Pace::Closed,
            Some(rate) => Pace::Open(Schedule::new(start, rate, share.lane, share.lanes)),
        }
    }

    /// How many requests one part measures.
    pub fn quota(&self, share: Share) -> Option<u64> {
        let requests = self.requests?;
        Some(requests / share.lanes + u64::from(share.lane < requests % share.lanes))
    }
}

/// Nothing when another thread could not connect.
pub type ThreadOutcome = Option<(Measurements, Duration)>;

/// The measurements of a thread that has ended, with the time that they are to be divided by: to the
/// last reply, but at least to the end of the window that has passed.
pub fn finished(measurements: Measurements, window: Window) -> (Measurements, Duration) {
    let now = Instant::now();
    let end = window.stop_at.map_or(window.measure_from, |at| at.min(now));
    let end = end.max(measurements.last_reply.unwrap_or(end));
    (measurements, end.saturating_duration_since(window.measure_from))
}

/// Where threads wait for each other to be connected.
pub struct StartLine {
    barrier: Barrier,
    failed: AtomicBool,
}

impl StartLine {
    /// When the phase begins, or nothing when another thread is not ready. Blocks the thread, which
    /// has nothing else to do.
    pub fn wait(&self, ready: anyhow::Result<()>) -> anyhow::Result<Option<Instant>> {
        if ready.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        self.barrier.wait();
        ready?;
        Ok((!self.failed.load(Ordering::SeqCst)).then(Instant::now))
    }
}

/// Runs a lane, over as many connections as it needs: the first were by the first address.
async fn run_lane<W: Wire>(mut lane: Lane<W>, first: Connections, addresses: Vec<String>) {
    let cluster = first.slots.is_some();
    let mut connections = Some(first);
    for address in addresses.iter().cycle().skip(1) {
        if let Some(Connections { streams, slots }) = connections.take() {
            lane.slots = slots;
            match lane.run(streams).await {
                // The map that a node has just after a leader has changed may be the old one.
                Ok(()) if !lane.is_over() => sleep(RECONNECT_AFTER).await,
                Ok(()) => {}
                Err(error) => tracing::debug!(%error, "connection ended"),
            }
        }
        if lane.is_over() {
            lane.count_unsent();
            return;
        }
        match Connections::open(address, cluster).await {
            Ok(next) => connections = Some(next),
            Err(_) => sleep(RECONNECT_AFTER).await,
        }
    }
}

/// The connections of a lane: to one address, or to the nodes that lead a cluster.
struct Connections {
    streams: Vec<TcpStream>,
    /// Which of them is whose.
    slots: Option<Slots>,
}

impl Connections {
    async fn open(address: &str, cluster: bool) -> anyhow::Result<Connections> {
        let mut stream = connect(address).await?;
        if !cluster {
            return Ok(Connections { streams: vec![stream], slots: None });
        }
        let slots = Slots::ask(&mut stream).await.with_context(|| format!("at {address}"))?;
        let mut streams = Vec::new();
        for node in slots.nodes() {
            streams.push(connect(node).await?);
        }
        Ok(Connections { streams, slots: Some(slots) })
    }
}

async fn connect(address: &str) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
