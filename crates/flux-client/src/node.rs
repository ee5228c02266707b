//! The nodes that the client talks to: a few links to each, opened when they are first needed.
//!
//! What this module does not do: know what a node is in charge of.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::dial::Dial;
use crate::link::{Link, State, Terms};
use crate::{Config, Error};

/// Nodes to which links are open at a time: what a strange list of members can cost.
const MAX_NODES: usize = 1024;

/// How long a node that left something unanswered comes last. Then it is tried again.
const SILENCE: Duration = Duration::from_secs(5);

/// One node, by its address.
#[derive(Debug)]
pub(crate) struct Node {
    addr: String,
    links: Vec<Link>,
    next: AtomicUsize,
    since: Instant,
    /// When it left something unanswered, in milliseconds from `since` and counted from 1; 0: it has
    /// answered something since.
    silent_ms: AtomicU64,
}

/// Whether a node can be sent something now.
pub(crate) enum Reach {
    /// On the link with this number.
    Up(usize, Terms),
    /// Perhaps soon, on the link with this number.
    Connecting(usize),
    /// No: the reason, and since when.
    Down(Arc<str>, Instant),
    /// Never more.
    Closed,
}

impl Node {
    pub(crate) fn addr(&self) -> &str {
        &self.addr
    }

    /// The best of the node's links, in turn.
    pub(crate) fn reach(&self) -> Reach {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut best = Reach::Closed;
        for offset in 0..self.links.len() {
            let number = first.wrapping_add(offset) % self.links.len();
            let link = &self.links[number];
            if link.is_closed() {
                return Reach::Closed;
            }
            match (link.state(), &best) {
                (State::Up(terms), _) => return Reach::Up(number, terms),
                (State::Connecting, _) => best = Reach::Connecting(number),
                (State::Down { .. }, Reach::Connecting(_)) => {}
                (State::Down { reason, since }, _) => best = Reach::Down(reason, since),
            }
        }
        best
    }

    /// The link with a number that `reach` gave.
    pub(crate) fn link(&self, number: usize) -> &Link {
        &self.links[number]
    }

    /// Whether it left something unanswered a moment ago, as far as is known.
    pub(crate) fn is_silent(&self) -> bool {
        let at = self.silent_ms.load(Ordering::Relaxed);
        at != 0 && self.now_ms().saturating_sub(at) < SILENCE.as_millis() as u64
    }

    pub(crate) fn set_silent(&self, silent: bool) {
        let at = if silent { self.now_ms() } else { 0 };
        // A load is cheaper than a store where nothing changes, which is nearly always.
        if self.silent_ms.load(Ordering::Relaxed) != at {
            self.silent_ms.store(at, Ordering::Relaxed);
        }
    }

    fn now_ms(&self) -> u64 {
        self.since.elapsed().as_millis() as u64 + 1
    }

    /// Says that somebody waits for this node.
    pub(crate) fn want(&self) {
        self.links.iter().for_each(Link::want);
    }
}

/// The nodes that links are open to.
#[derive(Debug)]
pub(crate) struct Nodes {
    config: Arc<Config>,
    dial: Arc<dyn Dial>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<String, Arc<Node>>,
    /// The links' tasks; aborted when this is dropped.
    tasks: JoinSet<()>,
    closed: bool,
}

impl Nodes {
    pub(crate) fn new(config: Arc<Config>, dial: Arc<dyn Dial>) -> Nodes {
        Nodes { config, dial, inner: Mutex::default() }
    }

    /// The node with this address; starts to connect to it where it is new. Must be called within a
    /// tokio runtime.
    pub(crate) fn open(&self, addr: &str) -> Result<Arc<Node>, Error> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Error::Closed);
        }
        if let Some(node) = inner.nodes.get(addr) {
            return Ok(Arc::clone(node));
        }
        if inner.nodes.len() >= MAX_NODES {
            return Err(Error::Unavailable(format!("{addr}: there are too many nodes")));
        }
        while inner.tasks.try_join_next().is_some() {}
        let mut links = Vec::new();
        for _ in 0..self.config.connections_per_endpoint {
            let (config, dial) = (Arc::clone(&self.config), Arc::clone(&self.dial));
            let (link, task) = Link::new(addr.to_owned(), config, dial);
            links.push(link);
            inner.tasks.spawn(task);
        }
        let (next, since, silent_ms) = (AtomicUsize::new(0), Instant::now(), AtomicU64::new(0));
        let node = Arc::new(Node { addr: addr.to_owned(), links, next, since, silent_ms });
        inner.nodes.insert(addr.to_owned(), Arc::clone(&node));
        Ok(node)
    }

    /// The node with this address, if links to it are open.
    pub(crate) fn find(&self, addr: &str) -> Option<Arc<Node>> {
        self.lock().nodes.get(addr).cloned()
    }

    /// Lets go of nodes; their links end when nobody uses them any more.
    pub(crate) fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().nodes.retain(|addr, _| keep(addr));
    }

    /// Ends all links, and opens none any more.
    pub(crate) async fn close(&self) {
        let mut tasks = {
            let mut inner = self.lock();
            inner.closed = true;
            inner.nodes.clear();
            std::mem::take(&mut inner.tasks)
        };
        tasks.shutdown().await;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
