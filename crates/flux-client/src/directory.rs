//! Keeps the topology up to date: asks one node after another until one tells.
//!
//! One task does all the asking, so that at most one refresh is under way however many calls want
//! one. What this module does not do: choose where a request goes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flux_proto::native::{
    Opcode, Request, RequestHeader, Response, decode_response, encode_request,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};

use crate::node::{Node, Nodes, Reach};
use crate::topology::Topology;
use crate::{Config, Error, backoff};

/// How long one node may take to tell.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);

/// The longest pause between two refreshes that calls want: calls that wait for a leader pace
/// themselves by it. At least half of it passes.
const PAUSE: Duration = Duration::from_millis(100);

/// Nodes that are asked in one refresh, at most.
const ASKED: usize = 16;

/// The topology, and the nodes that it is about.
#[derive(Debug)]
pub(crate) struct Directory {
    config: Arc<Config>,
    nodes: Nodes,
    known: watch::Sender<Known>,
    wanted: Notify,
}

/// What is known at a time.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) topology: Arc<Topology>,
    /// How many refreshes have ended, well or not; 0: nothing was learned yet.
    pub(crate) rounds: u64,
    /// The client is closed.
    closed: bool,
}

impl Directory {
    /// Connects to the endpoints. Must be called within a tokio runtime.
    pub(crate) fn new(config: Arc<Config>, nodes: Nodes) -> Result<Directory, Error> {
        let topology = Arc::new(Topology::unknown(&config.endpoints));
        for seat in topology.seats() {
            seat.node(&nodes)?;
        }
        let (known, _) = watch::channel(Known { topology, rounds: 0, closed: false });
        Ok(Directory { config, nodes, known, wanted: Notify::new() })
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(crate) fn known(&self) -> Known {
        self.known.borrow().clone()
    }

    /// What is known once somebody was asked, or the deadline has passed.
    pub(crate) async fn first(&self, deadline: Instant) -> Result<Known, Error> {
        let known = self.known();
        let known = if known.rounds > 0 || known.closed {
            known
        } else {
            self.changed(deadline, |now| now.rounds > 0).await.unwrap_or_else(|| self.known())
        };
        if known.closed { Err(Error::Closed) } else { Ok(known) }
    }

    /// Asks for a refresh soon.
    pub(crate) fn want(&self) {
        self.wanted.notify_one();
    }

    /// Asks for a refresh soon, where there is a cluster to learn of.
    pub(crate) fn want_if_clustered(&self) -> bool {
        let is_clustered = self.known.borrow().topology.is_clustered();
        if is_clustered {
            self.want();
        }
        is_clustered
    }

    /// Asks for a refresh and waits until one has ended or the topology is another one; false where the
    /// deadline passed first.
    pub(crate) async fn refreshed(&self, before: &Known, deadline: Instant) -> bool {
        self.want();
        let news = |now: &Known| {
            now.rounds != before.rounds || !Arc::ptr_eq(&now.topology, &before.topology)
        };
        self.changed(deadline, news).await.is_some()
    }

    async fn changed(&self, deadline: Instant, news: impl Fn(&Known) -> bool) -> Option<Known> {
        let mut receiver = self.known.subscribe();
        let changed = receiver.wait_for(|now| now.closed || news(now));
        let known = timeout_at(deadline, changed).await.ok()?.ok()?;
        Some(known.clone())
    }

    /// Takes a node's word for who leads a partition; whether that was news.
    pub(crate) fn correct(&self, correction: impl Fn(&Topology) -> Option<Topology>) -> bool {
        self.known.send_if_modified(|known| match correction(&known.topology) {
            Some(topology) => {
                known.topology = Arc::new(topology);
                true
            }
            None => false,
        })
    }

    /// Wakes all that wait and ends all links.
    pub(crate) async fn close(&self) {
        self.known.send_modify(|known| known.closed = true);
        self.nodes.close().await;
    }

    /// Refreshes when it is wanted, and now and then.
    pub(crate) async fn run(self: Arc<Directory>) {
        let mut failures = 0_u32;
        loop {
            let learned = self.refresh().await;
            failures = if learned { 0 } else { failures.saturating_add(1) };
            sleep(PAUSE / 2 + backoff::jittered(PAUSE / 2)).await;
            let interval = match failures {
                0 => self.config.topology_refresh,
                _ => backoff::limit(failures, self.config.reconnect_min, self.config.reconnect_max),
            };
            tokio::select! {
                () = self.wanted.notified() => {}
                () = sleep(interval / 2 + backoff::jittered(interval)) => {}
            }
        }
    }

    /// Asks nodes until one knows as much as is known here. An older epoch is believed only where
    /// nobody has a newer one.
    async fn refresh(&self) -> bool {
        let current = self.known().topology;
        let mut older: Option<Topology> = None;
        let mut learned = None;
        for addr in self.candidates(&current).into_iter().take(ASKED) {
            match self.ask(&addr).await {
                Ok(topology) if topology.epoch() >= current.epoch() => {
                    learned = Some(topology);
                    break;
                }
                Ok(topology) => {
                    if older.as_ref().is_none_or(|older| older.epoch() < topology.epoch()) {
                        older = Some(topology);
                    }
                }
                Err(reason) => tracing::debug!(%addr, %reason, "no topology from this node"),
            }
        }
        let learned = learned.or(older);
        let has_learned = learned.is_some();
        if let Some(topology) = &learned {
            let seats = topology.seats();
            self.nodes.retain(|addr| seats.iter().any(|seat| seat.addr() == Some(addr)));
        }
        self.known.send_modify(|known| {
            known.rounds += 1;
            if let Some(topology) = learned {
                known.topology = Arc::new(topology);
            }
        });
        has_learned
    }

    /// Whom to ask, best first, in random order among equals: nodes that are connected and answer,
    /// then those that are not known to be away, then the rest. The endpoints come after the members:
    /// they are the way back to a cluster whose members are all others by now.
    fn candidates(&self, topology: &Topology) -> Vec<String> {
        let class = |addr: &str| {
            let Some(node) = self.nodes.find(addr) else {
                return 2;
            };
            match node.reach() {
                Reach::Up(..) if !node.is_silent() => 0,
                Reach::Connecting(_) => 1,
                Reach::Up(..) => 3,
                Reach::Down(..) | Reach::Closed => 4,
            }
        };
        let seats = topology.seats();
        let members: Vec<&str> = seats.iter().filter_map(|seat| seat.addr()).collect();
        let endpoints = self.config.endpoints.iter().map(String::as_str);
        let others = endpoints.filter(|endpoint| !members.contains(endpoint));
        let others: Vec<&str> = others.collect();
        let mut all: Vec<(u8, bool, &str)> = Vec::with_capacity(members.len() + others.len());
        all.extend(members.iter().map(|&addr| (class(addr), false, addr)));
        all.extend(others.iter().map(|&addr| (class(addr).max(1), true, addr)));
        fastrand::shuffle(&mut all);
        all.sort_by_key(|&(class, is_endpoint, _)| (class, is_endpoint));
        all.into_iter().map(|(_, _, addr)| addr.to_owned()).collect()
    }

    /// What one node tells.
    async fn ask(&self, addr: &str) -> Result<Topology, String> {
        let deadline = Instant::now() + ASK_TIMEOUT;
        let node = self.nodes.open(addr).map_err(|error| error.to_string())?;
        let Ok(answer) = timeout_at(deadline, info_from(&node, deadline)).await else {
            node.set_silent(true);
            return Err(format!("no answer within {ASK_TIMEOUT:?}"));
        };
        let frame = answer?;
        node.set_silent(false);
        let (frame, _) = decode_response(&frame)
            .map_err(|error| error.to_string())?
            .ok_or_else(|| "half a frame".to_owned())?;
        match frame.response().map_err(|error| error.to_string())? {
            Ok(Response::Info(info)) => {
                Topology::of(&info, &self.config.endpoints).map_err(|strange| strange.to_string())
            }
            Ok(_) => Err("the answer is of another operation".to_owned()),
            Err(failure) => Err(failure.message.to_owned()),
        }
    }
}

/// The whole response frame to an INFO.
async fn info_from(node: &Node, deadline: Instant) -> Result<Bytes, String> {
    let link = loop {
        match node.reach() {
            Reach::Up(number, _) => break node.link(number),
            Reach::Connecting(number) => node.link(number).settled().await,
            Reach::Down(reason, _) => return Err(reason.to_string()),
            Reach::Closed => return Err(Error::Closed.to_string()),
        }
    };
    let deadline_ms = ASK_TIMEOUT.as_millis() as u32;
    let header = RequestHeader { deadline_ms, ..RequestHeader::new(0, Opcode::Info) };
    let mut frame = Vec::new();
    encode_request(&mut frame, &header, &Request::Info).map_err(|error| error.to_string())?;
    match link.send(frame, deadline).await {
        Some(Ok(frame)) => Ok(frame),
        Some(Err(lost)) => Err(lost.into_reason()),
        None => std::future::pending().await,
    }
}
