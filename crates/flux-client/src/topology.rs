//! Who is there, who leads each partition and who has replicas of it: what one node said, corrected by
//! hints since.
//!
//! A value; what this module does not do: ask anybody, or open links by itself.

use std::sync::{Arc, OnceLock};

use flux_proto::native::Info;

use crate::Error;
use crate::config::is_host_and_port;
use crate::node::{Node, Nodes};
use crate::slot::{is_partition_count, partition_of};

/// Members of a cluster, at most.
const MAX_MEMBERS: usize = 4096;

/// Why an answer to INFO is of no use. The node that gave it is not asked for more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Strange {
    #[error("{0} partitions, which is no power of two up to 16384")]
    Partitions(usize),
    #[error("replicas of {replicas} partitions, of which there are {partitions}")]
    Replicas { replicas: usize, partitions: usize },
    #[error("{0} members, over the limit of {MAX_MEMBERS}")]
    Members(usize),
    #[error("no member has an address of the form `host:port`")]
    NoAddress,
}

/// A member of the cluster.
#[derive(Debug)]
pub(crate) struct Seat {
    /// `host:port`; none where the node told something else.
    addr: Option<String>,
    /// Looked up once for each topology.
    node: OnceLock<Arc<Node>>,
}

impl Seat {
    fn new(addr: &str) -> Arc<Seat> {
        let addr = is_host_and_port(addr).then(|| addr.to_owned());
        Arc::new(Seat { addr, node: OnceLock::new() })
    }

    pub(crate) fn addr(&self) -> Option<&str> {
        self.addr.as_deref()
    }

    /// The node, to which links are opened where there are none.
    pub(crate) fn node(&self, nodes: &Nodes) -> Result<&Arc<Node>, Error> {
        if let Some(node) = self.node.get() {
            return Ok(node);
        }
        let addr = self.addr.as_deref();
        let addr = addr.ok_or_else(|| Error::Unavailable("it told no address".to_owned()))?;
        let node = nodes.open(addr)?;
        Ok(self.node.get_or_init(|| node))
    }
}

/// The cluster as far as it is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Topology {
    epoch: u64,
    seats: Vec<Arc<Seat>>,
    /// By partition; empty while nothing is known.
    leaders: Vec<Option<u16>>,
    /// By partition; empty where nothing is told of them. Shared, since hints do not change it.
    replicas: Arc<Vec<Vec<u16>>>,
    clustered: bool,
}

impl Topology {
    /// What is known before anybody was asked: requests go to the endpoints in turn.
    pub(crate) fn unknown(endpoints: &[String]) -> Topology {
        let seats = endpoints.iter().map(|endpoint| Seat::new(endpoint)).collect();
        Topology { seats, ..Topology::default() }
    }

    /// What a node answered. Where it is a node by itself, requests still go to the endpoints: its own
    /// address may be of no use outside of its machine.
    pub(crate) fn of(info: &Info<'_>, endpoints: &[String]) -> Result<Topology, Strange> {
        let partitions = info.leaders.len();
        if !is_partition_count(partitions) {
            return Err(Strange::Partitions(partitions));
        }
        let replicas = info.replicas.len();
        if replicas != 0 && replicas != partitions {
            return Err(Strange::Replicas { replicas, partitions });
        }
        if info.members.len() > MAX_MEMBERS {
            return Err(Strange::Members(info.members.len()));
        }
        let leaders = info.leaders.clone();
        if info.epoch == 0 && info.members.len() <= 1 {
            return Ok(Topology { leaders, ..Topology::unknown(endpoints) });
        }
        let seats: Vec<_> = info.members.iter().map(|member| Seat::new(member.data_addr)).collect();
        if seats.iter().all(|seat| seat.addr.is_none()) {
            return Err(Strange::NoAddress);
        }
        let (epoch, replicas) = (info.epoch, Arc::new(info.replicas.clone()));
        Ok(Topology { epoch, seats, leaders, replicas, clustered: true })
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether requests go to the leaders of partitions.
    pub(crate) fn is_clustered(&self) -> bool {
        self.clustered
    }

    /// How many partitions there are, where that is known.
    pub(crate) fn partitions(&self) -> Option<u16> {
        u16::try_from(self.leaders.len()).ok().filter(|&count| count > 0)
    }

    /// The partition of a key, where the number of partitions is known.
    pub(crate) fn partition_of(&self, key: &[u8]) -> Option<u16> {
        self.partitions().map(|count| partition_of(key, count))
    }

    /// Everybody, or the endpoints where nobody is known.
    pub(crate) fn seats(&self) -> &[Arc<Seat>] {
        &self.seats
    }

    /// The position of a partition's leader among the seats.
    pub(crate) fn leader(&self, partition: u16) -> Option<u16> {
        *self.leaders.get(usize::from(partition))?
    }

    /// The address of a partition's leader.
    pub(crate) fn leader_addr(&self, partition: u16) -> Option<&str> {
        self.seat(self.leader(partition)?)?.addr()
    }

    /// The seat at a position that this topology gave.
    pub(crate) fn seat(&self, position: u16) -> Option<&Arc<Seat>> {
        self.seats.get(usize::from(position))
    }

    /// The positions of a partition's replicas; none where nothing is told of them.
    pub(crate) fn replicas(&self, partition: u16) -> &[u16] {
        self.replicas.get(usize::from(partition)).map_or(&[], Vec::as_slice)
    }

    /// With another leader of one partition. None where that is no news, or no sense.
    pub(crate) fn with_leader(&self, partition: u16, addr: &str) -> Option<Topology> {
        let known = self.leaders.get(usize::from(partition))?;
        if !self.clustered || !is_host_and_port(addr) {
            return None;
        }
        let mut topology = self.clone();
        let seat = self.seats.iter().position(|seat| seat.addr() == Some(addr));
        let position = match seat {
            Some(position) => position,
            None if self.seats.len() < MAX_MEMBERS => {
                topology.seats.push(Seat::new(addr));
                self.seats.len()
            }
            None => return None,
        };
        let position = u16::try_from(position).ok()?;
        if *known == Some(position) {
            return None;
        }
        topology.leaders[usize::from(partition)] = Some(position);
        Some(topology)
    }

    /// Without a leader of one partition, if it was the one at this address.
    pub(crate) fn without_leader(&self, partition: u16, addr: &str) -> Option<Topology> {
        if !self.clustered || self.leader_addr(partition)? != addr {
            return None;
        }
        let mut topology = self.clone();
        topology.leaders[usize::from(partition)] = None;
        Some(topology)
    }
}

#[cfg(test)]
mod tests {
    use flux_proto::native::Member;

    use super::*;

    fn member(data_addr: &'static str) -> Member<'static> {
        Member { name: "n", data_addr, zone: "" }
    }

    fn info() -> Info<'static> {
        Info {
            node: "n",
            server_version: "1",
            members: vec![member("a:1"), member("b:1")],
            leaders: vec![Some(0), None],
            epoch: 3,
            replicas: vec![vec![0, 1], vec![1]],
        }
    }

    fn of(info: &Info<'_>) -> Result<Topology, Strange> {
        Topology::of(info, &["e:1".to_owned()])
    }

    fn addrs(topology: &Topology) -> Vec<Option<&str>> {
        topology.seats().iter().map(|seat| seat.addr()).collect()
    }

    #[test]
    fn a_cluster_is_routed_and_a_node_by_itself_is_not() {
        let topology = of(&info()).unwrap();
        assert!(topology.is_clustered());
        assert_eq!(addrs(&topology), [Some("a:1"), Some("b:1")]);
        assert_eq!(
            (topology.leader(0), topology.leader(1), topology.leader(2)),
            (Some(0), None, None)
        );
        assert_eq!(topology.replicas(0), [0, 1]);
        assert_eq!(topology.partition_of(b"foo"), Some(1));

        let alone = Info {
            members: vec![member("a:1")],
            epoch: 0,
            leaders: vec![Some(0)],
            replicas: vec![],
            ..info()
        };
        let topology = of(&alone).unwrap();
        assert!(!topology.is_clustered());
        assert_eq!((addrs(&topology), topology.partitions()), (vec![Some("e:1")], Some(1)));
        // The last node of a cluster is one all the same.
        assert!(of(&Info { epoch: 1, ..alone }).unwrap().is_clustered());
        // Without the fields that older servers lack.
        assert!(of(&Info { epoch: 0, replicas: vec![], ..info() }).unwrap().is_clustered());
        assert_eq!(Topology::unknown(&[]).partition_of(b"foo"), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let three = Info { leaders: vec![None; 3], replicas: vec![], ..info() };
        assert_eq!(of(&three).unwrap_err(), Strange::Partitions(3));
        let none = Info { leaders: vec![], replicas: vec![], ..info() };
        assert_eq!(of(&none).unwrap_err(), Strange::Partitions(0));
        let short = Info { replicas: vec![vec![0]], ..info() };
        assert_eq!(of(&short).unwrap_err(), Strange::Replicas { replicas: 1, partitions: 2 });
        let many = Info { members: vec![member("a:1"); MAX_MEMBERS + 1], ..info() };
        assert_eq!(of(&many).unwrap_err(), Strange::Members(MAX_MEMBERS + 1));
        let nowhere = Info { members: vec![member(""), member("b:0")], ..info() };
        assert_eq!(of(&nowhere).unwrap_err(), Strange::NoAddress);
        let half = Info { members: vec![member("a:1"), member("nowhere")], ..info() };
        assert_eq!(addrs(&of(&half).unwrap()), [Some("a:1"), None]);
    }

    #[test]
    fn a_hint_changes_one_partition_and_may_name_somebody_new() {
        let topology = of(&info()).unwrap();
        assert!(topology.with_leader(0, "a:1").is_none(), "no news");
        assert!(topology.with_leader(2, "b:1").is_none(), "no such partition");
        assert!(topology.with_leader(0, "b").is_none(), "no address");
        let moved = topology.with_leader(0, "b:1").unwrap();
        assert_eq!((moved.leader(0), moved.leader(1)), (Some(1), None));
        let new = moved.with_leader(1, "c:1").unwrap();
        assert_eq!(new.seat(new.leader(1).unwrap()).unwrap().addr(), Some("c:1"));
        assert!(new.without_leader(0, "a:1").is_none(), "it leads no more");
        assert_eq!(new.without_leader(0, "b:1").unwrap().leader(0), None);
        assert!(Topology::unknown(&["e:1".to_owned()]).with_leader(0, "b:1").is_none());
    }
}
