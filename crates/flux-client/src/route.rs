//! Where an attempt goes: to the partition's leader, to one of its replicas, or to anybody.
//!
//! What this module does not do: send, or decide what follows a refusal.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::call::{Kind, Setback};
use crate::directory::Known;
use crate::link::Terms;
use crate::node::{Node, Reach};
use crate::topology::{Seat, Topology};
use crate::{Client, Error};

/// A leader that could not be reached for so long, and leads all the same as far as others know, can be
/// reached by them only: they are asked to pass requests on.
const PASS_ON_AFTER: Duration = Duration::from_secs(1);

/// What a request is about.
#[derive(Clone, Debug)]
pub(crate) enum Target<'k> {
    /// Anybody may answer.
    Any,
    /// A key's partition.
    Key(&'k [u8]),
    /// This partition.
    Partition(u16),
    /// This node, which has replicas of all that is asked for.
    Seat(Arc<Seat>),
}

impl Target<'_> {
    pub(crate) fn partition(&self, topology: &Topology) -> Option<u16> {
        match self {
            Target::Any | Target::Seat(_) => None,
            Target::Key(key) => topology.partition_of(key),
            Target::Partition(partition) => Some(*partition),
        }
    }
}

/// A connection to send on.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) node: Arc<Node>,
    /// The number of the node's link.
    pub(crate) link: usize,
    pub(crate) terms: Terms,
    /// The partition for which the node was chosen because it leads it.
    pub(crate) leads: Option<u16>,
    /// Whether another node may come to be the better choice.
    pub(crate) has_others: bool,
}

impl Client {
    /// A connection to the right node. In a cluster this waits for a leader that can be reached as
    /// long as anybody can be, but no longer than the deadline.
    pub(crate) async fn place(
        &self,
        target: &Target<'_>,
        stale: bool,
        deadline: Instant,
    ) -> Result<Place, Setback> {
        loop {
            let known = self.shared.directory.first(deadline).await.map_err(Setback::last)?;
            let topology = &*known.topology;
            if let Target::Seat(seat) = target {
                return self.anybody(topology, [seat], deadline).await;
            }
            let partition = target.partition(topology).filter(|_| topology.is_clustered());
            let Some(partition) = partition else {
                return self.anybody(topology, topology.seats(), deadline).await;
            };
            if stale {
                return self.replica(topology, partition, deadline).await;
            }
            let reason = match self.leader(topology, partition)? {
                Leader::Ready(place) => return Ok(place),
                Leader::Connecting(node, link) => {
                    let settled = node.link(link).settled();
                    if timeout_at(deadline, settled).await.is_ok() {
                        continue;
                    }
                    format!("{}: not connected in time", node.addr())
                }
                Leader::Away(reason) => reason,
            };
            self.wait_for_a_leader(&known, reason, deadline).await?;
        }
    }

    /// Waits for news of the topology; in vain where nobody can be reached, or time is over.
    async fn wait_for_a_leader(
        &self,
        known: &Known,
        reason: String,
        deadline: Instant,
    ) -> Result<(), Setback> {
        let unavailable = |kind| Setback { error: Error::Unavailable(reason), kind };
        let directory = &self.shared.directory;
        let is_away = |seat: &Arc<Seat>| {
            let Some(addr) = seat.addr() else {
                return true;
            };
            let node = directory.nodes().find(addr);
            node.is_some_and(|node| matches!(node.reach(), Reach::Down(..)))
        };
        if known.topology.seats().iter().all(is_away) {
            directory.want();
            return Err(unavailable(Kind::Unsent));
        }
        if directory.refreshed(known, deadline).await {
            Ok(())
        } else {
            Err(unavailable(Kind::Final))
        }
    }

    /// The partition's leader as it is known.
    fn leader(&self, topology: &Topology, partition: u16) -> Result<Leader, Setback> {
        let Some(seat) = topology.leader(partition).and_then(|leader| topology.seat(leader)) else {
            return Ok(Leader::Away(format!("partition {partition} has no leader")));
        };
        let node = match seat.node(self.shared.directory.nodes()) {
            Ok(node) => node,
            Err(Error::Closed) => return Err(Setback::last(Error::Closed)),
            Err(error) => return Ok(Leader::Away(error.to_string())),
        };
        Ok(match node.reach() {
            Reach::Up(link, terms) => {
                let (node, has_others) = (Arc::clone(node), topology.seats().len() > 1);
                Leader::Ready(Place { node, link, terms, leads: Some(partition), has_others })
            }
            Reach::Connecting(link) => Leader::Connecting(Arc::clone(node), link),
            Reach::Down(reason, since) => {
                node.want();
                let lasts = since.elapsed() >= PASS_ON_AFTER;
                let seats: Vec<_> = topology.seats().iter().collect();
                match self.choose(topology, &seats) {
                    Choice::Ready(place) if lasts => {
                        self.shared.directory.want();
                        Leader::Ready(place)
                    }
                    Choice::Closed => return Err(Setback::last(Error::Closed)),
                    _ => Leader::Away(reason.to_string()),
                }
            }
            Reach::Closed => return Err(Setback::last(Error::Closed)),
        })
    }

    /// One of the partition's replicas, in turn, or anybody where none can be reached.
    async fn replica(
        &self,
        topology: &Topology,
        partition: u16,
        deadline: Instant,
    ) -> Result<Place, Setback> {
        let replicas = topology.replicas(partition);
        let leader = topology.leader(partition);
        let known = if replicas.is_empty() { leader.as_slice() } else { replicas };
        let seats: Vec<_> = known.iter().filter_map(|&position| topology.seat(position)).collect();
        match self.anybody(topology, seats, deadline).await {
            Err(Setback { kind: Kind::Unsent, .. }) => {
                self.shared.directory.want();
                self.anybody(topology, topology.seats(), deadline).await
            }
            decided => decided,
        }
    }

    /// One of these nodes, in turn. Waits for a connection only while there is none that is ready.
    async fn anybody<'s>(
        &self,
        topology: &Topology,
        seats: impl IntoIterator<Item = &'s Arc<Seat>>,
        deadline: Instant,
    ) -> Result<Place, Setback> {
        let seats: Vec<_> = seats.into_iter().collect();
        loop {
            let unsent = |reason| {
                let error = Error::Unavailable(reason);
                Err(Setback { error, kind: Kind::Unsent })
            };
            match self.choose(topology, &seats) {
                Choice::Ready(place) => return Ok(place),
                Choice::Connecting(node, link) => {
                    if timeout_at(deadline, node.link(link).settled()).await.is_err() {
                        return unsent("no connection in time".to_owned());
                    }
                }
                Choice::Away(reason) => return unsent(reason),
                Choice::Closed => return Err(Setback::last(Error::Closed)),
            }
        }
    }

    /// The best of these nodes now: the first from a place in turn that answers, else one that is
    /// connected, else one that may be soon.
    fn choose(&self, topology: &Topology, seats: &[&Arc<Seat>]) -> Choice {
        let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        let has_others = topology.is_clustered() && topology.seats().len() > 1;
        let (mut silent, mut connecting, mut away) = (None, None, String::new());
        for offset in 0..seats.len() {
            let seat = seats[turn.wrapping_add(offset) % seats.len()];
            let node = match seat.node(self.shared.directory.nodes()) {
                Ok(node) => node,
                Err(Error::Closed) => return Choice::Closed,
                Err(error) => {
                    away = error.to_string();
                    continue;
                }
            };
            match node.reach() {
                Reach::Up(link, terms) => {
                    let node = Arc::clone(node);
                    let place = Place { node, link, terms, leads: None, has_others };
                    if !place.node.is_silent() {
                        return Choice::Ready(place);
                    }
                    silent.get_or_insert(place);
                }
                Reach::Connecting(link) => {
                    connecting.get_or_insert_with(|| (Arc::clone(node), link));
                }
                Reach::Down(reason, _) => away = reason.to_string(),
                Reach::Closed => return Choice::Closed,
            }
        }
        match (silent, connecting) {
            (Some(place), _) => Choice::Ready(place),
            (None, Some((node, link))) => Choice::Connecting(node, link),
            (None, None) => Choice::Away(away),
        }
    }
}

/// What can be said of a leader now.
enum Leader {
    Ready(Place),
    Connecting(Arc<Node>, usize),
    Away(String),
}

/// What can be said of several nodes now.
enum Choice {
    Ready(Place),
    Connecting(Arc<Node>, usize),
    Away(String),
    Closed,
}
