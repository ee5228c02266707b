//! Publishes what a node leads: one small task per partition around a [`Lane`], one connection for
//! all of them.
//!
//! Nothing here is ever given up: whatever goes wrong is told once ([`Trouble`]), and tried again
//! with growing pauses until it goes. What is read and not confirmed is bounded by
//! [`PublisherConfig::in_flight_bytes`]; what does not fit is dropped and read again when it does, so
//! that an outage of any length costs no memory.
//!
//! What this module does not do: keep the cursor, or the changes.

mod lanes;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::amqp::{Connection, Link};
use crate::feed::{Chunk, Feed, FeedError, Limit};
use crate::lane::{Lane, Want};
use crate::message::Publication;
use crate::metrics::{LaneMetrics, Metrics};
use crate::trouble::{Trouble, Troubles};
use crate::url::Url;

/// The most bytes of changes in a message, unless one is larger.
const MAX_MESSAGE_BYTES: usize = 256 << 10;
/// What a change costs beside its key and values.
const EVENT_OVERHEAD_BYTES: usize = 512;
/// A connection that lived for so long was a good one: the next attempt need not wait.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);
/// How long a stop waits for the confirms that are out.
const STOPPING: Duration = Duration::from_secs(1);
const RECONNECT: Backoff =
    Backoff { first: Duration::from_millis(100), most: Duration::from_secs(10) };
const RESEND: Backoff = Backoff { first: Duration::from_millis(200), most: Duration::from_secs(5) };
/// Each attempt ends the connection for all partitions.
const TOO_LARGE: Backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(60) };
const READ_AGAIN: Backoff =
    Backoff { first: Duration::from_millis(100), most: Duration::from_secs(5) };

/// What a publisher must know.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// The broker.
    pub url: Url,
    /// The topic exchange.
    pub exchange: String,
    /// How many changes a message has at most; with more than one, every message is an array.
    pub batch_max_events: usize,
    /// The most bytes of changes that are read and not confirmed; a larger one goes alone.
    pub in_flight_bytes: usize,
}

/// Publishes in the background, from [`Publisher::start`] to [`Publisher::stop`].
#[derive(Debug)]
pub struct Publisher {
    stopping: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Starts to publish what the feed leads, on the current tokio runtime.
    pub fn start(feed: Arc<dyn Feed>, config: PublisherConfig, metrics: Arc<Metrics>) -> Publisher {
        let (stopping, is_stopping) = watch::channel(false);
        let troubles = Arc::new(Troubles::new(feed.clone(), metrics.clone()));
        let in_flight = config.in_flight_bytes.clamp(1, u32::MAX as usize);
        let shared = Arc::new(Shared {
            feed,
            metrics,
            troubles,
            permits: Arc::new(Semaphore::new(in_flight)),
            in_flight_bytes: in_flight as u32,
            config,
        });
        Publisher { stopping, task: tokio::spawn(run(shared, is_stopping)) }
    }

    /// Reads nothing more, waits up to a second for the confirms that are out, and ends all tasks.
    pub async fn stop(self) {
        self.stopping.send_replace(true);
        // A panic has been reported where it happened.
        let _ = self.task.await;
    }
}

/// What the tasks of a publisher have in common.
struct Shared {
    feed: Arc<dyn Feed>,
    config: PublisherConfig,
    metrics: Arc<Metrics>,
    troubles: Arc<Troubles>,
    permits: Arc<Semaphore>,
    in_flight_bytes: u32,
}

/// Pauses that double up to a bound.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// The pause after so many failures in a row, between half of it and all of it by chance.
    fn pause(self, failures: u32) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16));
        doubled.min(self.most).mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// Whether to go on after a pause, which a stop cuts short.
async fn pause(time: Duration, stopping: &mut watch::Receiver<bool>) -> bool {
    timeout(time, stopped(stopping)).await.is_err()
}

/// Ends when the publisher stops; also when it was dropped.
pub(crate) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

async fn run(shared: Arc<Shared>, stopping: watch::Receiver<bool>) {
    let (link, links) = watch::channel(None);
    let (closing, is_closing) = watch::channel(false);
    let connecting = tokio::spawn(stay_connected(shared.clone(), link, is_closing));
    lanes::run(&shared, links, stopping).await;
    closing.send_replace(true);
    let _ = connecting.await;
    for trouble in Trouble::ALL {
        shared.troubles.end(trouble, None);
    }
}

/// Keeps one connection open, and says which.
async fn stay_connected(
    shared: Arc<Shared>,
    link: watch::Sender<Option<Link>>,
    mut closing: watch::Receiver<bool>,
) {
    let Shared { config, troubles, metrics, .. } = &*shared;
    let (mut failures, mut connections) = (0, 0_u64);
    loop {
        let opened = Instant::now();
        let open = Connection::open(&config.url, &config.exchange, troubles);
        let opened_now = tokio::select! {
            opened = open => opened,
            () = stopped(&mut closing) => return,
        };
        let error = match opened_now {
            Ok((mut connection, opened_link)) => {
                metrics.reconnects.fetch_add(u64::from(connections > 0), Relaxed);
                connections += 1;
                link.send_replace(Some(opened_link));
                let ended = connection.run(&mut closing).await;
                // Before the connection goes, and the fate of its messages is unknown to the lanes.
                link.send_replace(None);
                match ended {
                    Ok(()) => return connection.close().await,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        let trouble = error.trouble();
        if let Some(trouble) = trouble {
            troubles.begin(trouble, None, &format!("{error} ({})", config.url));
        }
        // What is wrong with a connection is one thing at a time.
        for other in Trouble::ALL.into_iter().filter(|&other| Some(other) != trouble) {
            troubles.end(other, None);
        }
        failures = if opened.elapsed() > GOOD_CONNECTION { 1 } else { failures + 1 };
        if !pause(RECONNECT.pause(failures), &mut closing).await {
            return;
        }
    }
}
