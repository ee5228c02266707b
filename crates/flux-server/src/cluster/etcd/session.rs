//! A session with one etcd server: from reading everything until something fails.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, LeaseKeepAliveStream, LeaseKeeper,
    PutOptions, ResponseHeader, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use tokio::time::{Instant, MissedTickBehavior};

use super::contents::{Contents, Held, SERVICES};
use super::{Connected, Options, Shared, Wanted};
use crate::cluster::registry::{Registration, RegistryState};

/// What outlives sessions.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// The node's lease. It may have run out: only the servers know.
    lease: Option<i64>,
    /// This process has been registered: another one that is found there later runs beside it.
    registered: bool,
}

/// How a session ended that did not fail.
#[derive(Debug)]
pub(super) enum Ended {
    /// The registry was closed.
    Closed,
    /// What is known is not current any more: another session must read it.
    Stale(&'static str),
}

/// Why a session failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Etcd(#[from] etcd_client::Error),
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    #[error("the server ended the {0}")]
    Cut(&'static str),
}

impl SessionError {
    /// The words that help a person: of the layers of an error of the transport, the outermost and the
    /// innermost.
    pub(super) fn in_short(&self) -> String {
        let SessionError::Etcd(etcd_client::Error::GRpcStatus(status)) = self else {
            return self.to_string();
        };
        let outermost = status.message();
        let layers =
            std::iter::successors(std::error::Error::source(status), |error| error.source());
        match layers.last().map(ToString::to_string) {
            Some(innermost) if innermost != outermost => format!("{outermost}: {innermost}"),
            _ => outermost.to_owned(),
        }
    }
}

/// What is going on with one server.
pub(super) struct Session<'a> {
    shared: &'a Shared,
    client: Client,
    lease: i64,
    standing: &'a mut Standing,
    contents: Contents,
    /// Another process's registration that is where this node's should be, and since when.
    in_the_way: Option<(u64, Instant)>,
    conflict: Option<Registration>,
}

impl Session<'_> {
    /// Holds a session until it ends. The lease is left for the next one.
    pub(super) async fn hold(
        shared: &Shared,
        endpoint: &str,
        standing: &mut Standing,
    ) -> Result<Ended, SessionError> {
        let options = &shared.options;
        let connect =
            ConnectOptions::new().with_connect_timeout(options.timeout()).with_require_leader(true);
        let mut client = Client::connect([endpoint], Some(connect)).await?;
        let (lease, mut keeper, mut alive) =
            within(options, keep_lease(&mut client, options, standing)).await?;
        let (contents, revision) = within(options, read(&mut client, options)).await?;
        let mut events = within(options, watch(&mut client, options, revision + 1)).await?;

        *shared.client.lock() = Some(Connected(client.clone()));
        let mut session =
            Session { shared, client, lease, standing, contents, in_the_way: None, conflict: None };
        let mut wanted = shared.wanted.subscribe();
        let mut heard = Instant::now();
        let mut beat = tokio::time::interval(options.ttl / 3);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wants = wanted.borrow_and_update().clone();
            if wants.closing {
                within(options, session.leave()).await?;
                return Ok(Ended::Closed);
            }
            within(options, session.settle(&wants)).await?;
            session.publish(&wants);
            tokio::select! {
                event = events.message() => {
                    let Some(event) = event? else {
                        return Err(SessionError::Cut("watch"));
                    };
                    if event.canceled() {
                        return Ok(Ended::Stale("the watch fell behind a compaction"));
                    }
                    for event in event.events() {
                        session.contents.apply(options, event);
                    }
                }
                beat = alive.message() => {
                    let Some(beat) = beat? else {
                        return Err(SessionError::Cut("lease's keep-alive"));
                    };
                    if beat.ttl() <= 0 {
                        return Ok(Ended::Stale("the lease has run out"));
                    }
                    heard = Instant::now();
                }
                _ = beat.tick() => {
                    if heard.elapsed() > options.ttl * 2 / 3 {
                        return Err(SessionError::Timeout(heard.elapsed()));
                    }
                    within(options, async { Ok(keeper.keep_alive().await?) }).await?;
                }
                changed = wanted.changed() => if changed.is_err() {
                    return Ok(Ended::Closed);
                },
            }
        }
    }

    /// Takes one step towards what the node wants, if what is there differs from it. What comes of it
    /// is seen in an event.
    async fn settle(&mut self, wants: &Wanted) -> Result<(), SessionError> {
        let Some(own) = &wants.registration else {
            return Ok(());
        };
        let held = self.contents.nodes.get(&own.node).cloned();
        let registered = self.is_registered(own);
        if registered {
            self.standing.registered = true;
        } else if self.may_register(own, held.as_ref()) {
            self.register(own, held.map_or(0, |held| held.revision)).await?;
        }
        self.campaign(wants, own, registered).await
    }

    fn is_registered(&self, own: &Registration) -> bool {
        let held = self.contents.nodes.get(&own.node);
        held.is_some_and(|held| held.lease == self.lease && held.registration == *own)
    }

    /// Whether this node may put its registration over what is there.
    fn may_register(&mut self, own: &Registration, held: Option<&Held>) -> bool {
        let Some(Held { registration: other, .. }) =
            held.filter(|held| held.registration.instance != own.instance)
        else {
            self.in_the_way = None;
            return true;
        };
        if self.standing.registered {
            // Two processes run as one node: the one that was there first goes on.
            let age = |of: &Registration| (of.started_ms, of.instance);
            if age(own) < age(other) {
                return true;
            }
            self.conflict = Some(other.clone());
            return false;
        }
        if own.takes_over(other) {
            return true;
        }
        // A former process at other addresses lapses with its lease; one that lives does not.
        let since = match self.in_the_way {
            Some((instance, since)) if instance == other.instance => since,
            _ => Instant::now(),
        };
        self.in_the_way = Some((other.instance, since));
        if since.elapsed() > self.shared.options.ttl * 2 {
            self.conflict = Some(other.clone());
        }
        false
    }

    async fn register(&mut self, own: &Registration, over: i64) -> Result<(), SessionError> {
        let key = format!("{SERVICES}{}", own.node);
        let value = serde_json::to_vec(own).expect("plain fields");
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, over);
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(self.lease)));
        self.client.txn(Txn::new().when([unchanged]).and_then([put])).await?;
        Ok(())
    }

    /// Becomes controller if there is none, or resigns.
    async fn campaign(
        &mut self,
        wants: &Wanted,
        own: &Registration,
        registered: bool,
    ) -> Result<(), SessionError> {
        let key = self.shared.options.controller_key();
        match self.contents.controller {
            None if wants.stands && registered => {
                let free = Compare::create_revision(key.clone(), CompareOp::Equal, 0);
                let under_lease = PutOptions::new().with_lease(self.lease);
                let put = TxnOp::put(key, own.node.to_string(), Some(under_lease));
                self.client.txn(Txn::new().when([free]).and_then([put])).await?;
            }
            Some((_, lease)) if lease == self.lease && !wants.stands => {
                let ours = Compare::lease(key.clone(), CompareOp::Equal, self.lease);
                let delete = TxnOp::delete(key, None);
                self.client.txn(Txn::new().when([ours]).and_then([delete])).await?;
            }
            _ => {}
        }
        Ok(())
    }

    fn publish(&self, wants: &Wanted) {
        let leads = self.contents.controller.is_some_and(|(_, lease)| lease == self.lease);
        let own = wants.registration.as_ref();
        let new = RegistryState {
            connected: true,
            failure: None,
            snapshot: Some(Arc::new(self.contents.snapshot())),
            registered: own.is_some_and(|own| self.is_registered(own)),
            leads: leads && wants.stands,
            conflict: self.conflict.clone().map(Box::new),
        };
        self.shared.state.send_if_modified(|state| {
            let changed = *state != new;
            *state = new;
            changed
        });
    }

    /// Takes back everything that is under the lease.
    async fn leave(&mut self) -> Result<(), SessionError> {
        self.client.lease_revoke(self.lease).await?;
        self.standing.lease = None;
        Ok(())
    }
}

async fn within<T>(
    options: &Options,
    asking: impl Future<Output = Result<T, SessionError>>,
) -> Result<T, SessionError> {
    let timeout = options.timeout();
    tokio::time::timeout(timeout, asking).await.unwrap_or(Err(SessionError::Timeout(timeout)))
}

/// Keeps the lease of an earlier session alive, or takes a new one.
async fn keep_lease(
    client: &mut Client,
    options: &Options,
    standing: &mut Standing,
) -> Result<(i64, LeaseKeeper, LeaseKeepAliveStream), SessionError> {
    if let Some(id) = standing.lease {
        match client.lease_keep_alive(id).await {
            Ok((keeper, alive)) => return Ok((id, keeper, alive)),
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => standing.lease = None,
            Err(error) => return Err(error.into()),
        }
    }
    let id = client.lease_grant(options.ttl.as_secs() as i64, None).await?.id();
    standing.lease = Some(id);
    let (keeper, alive) = client.lease_keep_alive(id).await?;
    Ok((id, keeper, alive))
}

/// Reads everything at one revision, which is returned too.
async fn read(client: &mut Client, options: &Options) -> Result<(Contents, i64), SessionError> {
    let prefix = Some(GetOptions::new().with_prefix());
    let all = Txn::new().and_then([
        TxnOp::get(SERVICES, prefix),
        TxnOp::get(options.placement_key(), None),
        TxnOp::get(options.controller_key(), None),
    ]);
    let found = client.txn(all).await?;
    let mut contents = Contents::default();
    for response in found.op_responses() {
        if let TxnOpResponse::Get(range) = response {
            for kv in range.kvs() {
                contents.put(options, kv);
            }
        }
    }
    let revision = found.header().map_or(0, ResponseHeader::revision);
    Ok((contents, revision))
}

/// Watches everything from a revision on.
async fn watch(
    client: &mut Client,
    options: &Options,
    from: i64,
) -> Result<WatchStream, SessionError> {
    let on = || WatchOptions::new().with_start_revision(from);
    let mut events = client.watch(SERVICES, Some(on().with_prefix())).await?;
    events.watch(options.placement_key(), Some(on())).await?;
    events.watch(options.controller_key(), Some(on())).await?;
    Ok(events)
}
