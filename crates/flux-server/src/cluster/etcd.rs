//! The registry in etcd.
//!
//! ```text
//! /services/kv-service/<node>    a registration, under the node's lease
//! /flux/<cluster_name>/placement the placement map and its epoch
//! /flux/<cluster_name>/controller the controller's node id, under its lease
//! ```
//!
//! One task holds a session with one server at a time (`session`): it reads everything, watches from
//! there, and keeps the lease. A session that fails is followed by one with the next server, which
//! reads everything again: a watch that was cut, or fell behind a compaction, needs no other remedy.
//! The lease outlives sessions as long as it is kept alive in time.

mod contents;
mod session;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::format::StoredMap;
use super::registry::{BoxFuture, Placement, Registration, Registry, RegistryError, RegistryState};
use session::{Ended, Session, Standing};

/// Waits between sessions that fail.
const LEAST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A registry behind etcd servers.
#[derive(Debug)]
pub struct Etcd {
    shared: Arc<Shared>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// What the session's task and its callers share.
#[derive(Debug)]
struct Shared {
    options: Options,
    state: watch::Sender<RegistryState>,
    wanted: watch::Sender<Wanted>,
    client: Mutex<Option<Connected>>,
}

/// A client of the session that is going on.
#[derive(Clone)]
struct Connected(Client);

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connected")
    }
}

/// How to reach it.
#[derive(Clone, Debug)]
struct Options {
    endpoints: Vec<String>,
    name: String,
    ttl: Duration,
}

/// What the node wants to be seen as.
#[derive(Clone, Debug, Default)]
struct Wanted {
    registration: Option<Registration>,
    stands: bool,
    closing: bool,
}

impl Options {
    /// How long a server may take for one answer.
    fn timeout(&self) -> Duration {
        (self.ttl / 3).min(Duration::from_secs(3))
    }

    fn placement_key(&self) -> String {
        format!("/flux/{}/placement", self.name)
    }

    fn controller_key(&self) -> String {
        format!("/flux/{}/controller", self.name)
    }
}

impl Etcd {
    /// Begins to look for the servers, in the background. Registrations live `ttl` after the last sign
    /// of life. Needs a tokio runtime.
    pub fn start(endpoints: &[String], cluster_name: &str, ttl: Duration) -> Etcd {
        let options = Options { endpoints: endpoints.to_vec(), name: cluster_name.to_owned(), ttl };
        let shared = Arc::new(Shared {
            options,
            state: watch::Sender::default(),
            wanted: watch::Sender::default(),
            client: Mutex::new(None),
        });
        let task = tokio::spawn(hold_sessions(Arc::clone(&shared)));
        Etcd { shared, task: Mutex::new(Some(task)) }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }
}

impl Registry for Etcd {
    fn state(&self) -> watch::Receiver<RegistryState> {
        self.shared.state.subscribe()
    }

    fn register(&self, registration: Registration) {
        self.shared.wanted.send_modify(|wanted| wanted.registration = Some(registration));
    }

    fn campaign(&self, stands: bool) {
        self.shared.wanted.send_modify(|wanted| wanted.stands = stands);
    }

    fn write<'a>(
        &'a self,
        placement: &'a Placement,
        over: Option<u64>,
    ) -> BoxFuture<'a, Result<bool, RegistryError>> {
        Box::pin(async move {
            let client = self.shared.client.lock().clone();
            let Some(Connected(mut client)) = client else {
                return Err(RegistryError::Away("there is no connection to etcd".to_owned()));
            };
            let timeout = self.shared.options.timeout();
            let write = write(&mut client, &self.shared.options, placement, over);
            tokio::time::timeout(timeout, write).await.unwrap_or_else(|_| {
                let patience = timeout.as_millis();
                Err(RegistryError::Away(format!("no answer within {patience} ms")))
            })
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.shared.wanted.send_modify(|wanted| wanted.closing = true);
            let task = self.task.lock().take();
            let Some(mut task) = task else {
                return;
            };
            if tokio::time::timeout(CLOSE_TIMEOUT, &mut task).await.is_err() {
                task.abort();
            }
        })
    }
}

async fn write(
    client: &mut Client,
    options: &Options,
    placement: &Placement,
    over: Option<u64>,
) -> Result<bool, RegistryError> {
    let away = |error: etcd_client::Error| RegistryError::Away(error.to_string());
    let key = options.placement_key();
    let found = client.get(key.clone(), None::<GetOptions>).await.map_err(away)?;
    let revision = match (found.kvs().first(), over) {
        (None, None) => 0,
        (Some(kv), Some(over)) => {
            let stored = StoredMap::decode(kv.value()).map_err(|reason| {
                RegistryError::Unreadable(format!("cannot read the map at {key}: {reason}"))
            })?;
            if stored.epoch != over {
                return Ok(false);
            }
            kv.mod_revision()
        }
        _ => return Ok(false),
    };
    let bytes = StoredMap::encode(placement.epoch, &placement.map);
    let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, revision);
    let txn = Txn::new().when([unchanged]).and_then([TxnOp::put(key, bytes, None)]);
    Ok(client.txn(txn).await.map_err(away)?.succeeded())
}

/// Holds one session after the other, until the registry is closed.
async fn hold_sessions(shared: Arc<Shared>) {
    let mut standing = Standing::default();
    let mut wait = LEAST_WAIT;
    let mut wanted = shared.wanted.subscribe();
    for endpoint in shared.options.endpoints.iter().cycle() {
        let begun = Instant::now();
        let ended = Session::hold(&shared, endpoint, &mut standing).await;
        *shared.client.lock() = None;
        match ended {
            Ok(Ended::Closed) => return,
            Ok(Ended::Stale(why)) => tracing::debug!(why, endpoint, "reading the registry anew"),
            Err(error) => {
                tracing::debug!(%error, endpoint, "lost the registry");
                let failure = format!("{endpoint}: {}", error.in_short());
                shared.state.send_if_modified(|state| {
                    let new = RegistryState {
                        connected: false,
                        leads: false,
                        failure: Some(failure),
                        ..state.clone()
                    };
                    let changed = *state != new;
                    *state = new;
                    changed
                });
            }
        }
        if wanted.borrow_and_update().closing {
            return;
        }
        if begun.elapsed() > LONGEST_WAIT {
            wait = LEAST_WAIT;
        }
        let jittered = wait.mul_f64(0.5 + fastrand::f64());
        wait = (wait * 2).min(LONGEST_WAIT);
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            // One more session takes the registration back, if it can.
            closing = wanted.wait_for(|wanted| wanted.closing) => if closing.is_err() { return },
        }
    }
}
