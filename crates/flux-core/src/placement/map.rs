//! The placement map: which replicas each partition is to have. It is agreed on through the registry;
//! this is its contents and its JSON form, not how it gets there.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::id::{NodeId, ReplicaId};
use super::plan::{Reason, Step};
use crate::slot::{PartitionId, Partitions};

/// Which replicas each partition of a cluster is to have.
///
/// In JSON node ids are `node-…` strings and the cluster and replica ids sixteen hexadecimal digits.
/// Fields that are not known here are ignored, so that an older node can read a newer map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementMap {
    /// The cluster, never 0. Drawn at random when the map is first made.
    #[serde(with = "hex")]
    pub cluster_id: u64,
    /// How many partitions there are: fixed for the life of the cluster.
    pub partitions: u16,
    /// How many replicas a partition is to have, where there are nodes enough.
    pub replication_factor: u8,
    /// What leases are reckoned by; `None` in maps of before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
    /// The sequence number of the next new replica: above those of all that ever were.
    pub next_sequence: u32,
    /// Nodes that are to give up their replicas and get no new ones.
    #[serde(default)]
    pub draining: BTreeSet<NodeId>,
    /// By partition, the voters it began with. Never changed.
    pub bootstrap: Vec<Vec<ReplicaId>>,
    /// By partition, the replicas that it is to have; the first is the one that should lead.
    pub targets: Vec<Vec<ReplicaId>>,
}

/// What the nodes of a cluster must agree on for a leader's lease to be one: fixed for the life of the
/// cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The election timeout in milliseconds.
    pub election_timeout_ms: u64,
    /// By how much clocks may differ in speed.
    pub clock_drift_percent: u8,
}

/// A rule of the placement map that is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The cluster id is 0.
    #[error("the placement map has cluster id 0")]
    Cluster,
    /// The number of partitions is none that slots can be divided by.
    #[error("the placement map has {0} partitions: it must be a power of two from 1 to 16384")]
    Partitions(usize),
    /// Partitions are to have no replica.
    #[error("the placement map has replication factor 0")]
    ReplicationFactor,
    /// A list does not have one entry for each partition.
    #[error("the {list} of the placement map are for {found} partitions, not for {partitions}")]
    Length {
        /// Which list.
        list: &'static str,
        /// How many entries it has.
        found: usize,
        /// How many partitions there are.
        partitions: u16,
    },
    /// A partition has no replica.
    #[error("partition {partition} has no replica in the {list} of the placement map")]
    Empty {
        /// Which list.
        list: &'static str,
        /// The partition.
        partition: PartitionId,
    },
    /// Node 0 is used.
    #[error("the placement map uses {}, which stands for a node without a cluster", NodeId(0))]
    NodeZero,
    /// A node has two replicas of a partition.
    #[error("partition {partition} is on {node} twice in the {list} of the placement map")]
    SameNode {
        /// Which list.
        list: &'static str,
        /// The partition.
        partition: PartitionId,
        /// The node.
        node: NodeId,
    },
    /// A replica has a sequence number that has not been given out.
    #[error(
        "replica {replica} of partition {partition} is not below the next sequence number {next}"
    )]
    Sequence {
        /// The replica.
        replica: ReplicaId,
        /// Its partition.
        partition: PartitionId,
        /// The map's counter.
        next: u32,
    },
    /// Two replicas share a sequence number.
    #[error("replicas {0} and {1} of the placement map have the same sequence number")]
    SameSequence(ReplicaId, ReplicaId),
    /// A replica belongs to two partitions.
    #[error("replica {replica} is one of partition {first} and of partition {second}")]
    TwoPartitions {
        /// The replica.
        replica: ReplicaId,
        /// One of its partitions.
        first: PartitionId,
        /// The other.
        second: PartitionId,
    },
}

impl PlacementMap {
    /// The first map of a cluster. `layout` names each partition's nodes, the one that should lead
    /// first, as [`desired`](super::desired) gives it.
    pub fn new(
        cluster_id: u64,
        replication_factor: u8,
        layout: &[Vec<NodeId>],
    ) -> Result<PlacementMap, Invalid> {
        let mut sequences = 1..;
        let with_ids = |nodes: &Vec<NodeId>| {
            nodes
                .iter()
                .copied()
                .zip(&mut sequences)
                .map(|(node, n)| ReplicaId::new(node, n))
                .collect()
        };
        let targets: Vec<Vec<ReplicaId>> = layout.iter().map(with_ids).collect();
        let map = PlacementMap {
            cluster_id,
            partitions: u16::try_from(layout.len())
                .map_err(|_| Invalid::Partitions(layout.len()))?,
            replication_factor,
            timing: None,
            next_sequence: sequences.start,
            draining: BTreeSet::new(),
            bootstrap: targets.clone(),
            targets,
        };
        map.validate().map(|()| map)
    }

    /// Checks every rule that does not need an earlier map.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.cluster_id == 0 {
            return Err(Invalid::Cluster);
        }
        if Partitions::new(self.partitions).is_none() {
            return Err(Invalid::Partitions(self.partitions.into()));
        }
        if self.replication_factor == 0 {
            return Err(Invalid::ReplicationFactor);
        }
        self.validate_list("bootstrap", &self.bootstrap)?;
        self.validate_list("targets", &self.targets)?;
        self.validate_sequences()
    }

    /// How the slots are divided, or `None` in a map that is not valid.
    pub fn partitions(&self) -> Option<Partitions> {
        Partitions::new(self.partitions)
    }

    /// The replicas that a partition is to have, the one that should lead first; none of a partition
    /// that there is not.
    pub fn target(&self, partition: PartitionId) -> &[ReplicaId] {
        self.targets.get(usize::from(partition.0)).map_or(&[], Vec::as_slice)
    }

    /// Makes the change that a step says. Steps of a plan for this map are always possible.
    ///
    /// # Panics
    /// If there is no such partition.
    pub fn apply(&mut self, step: &Step) {
        self.targets[usize::from(step.partition.0)].clone_from(&step.target);
        if let Some(added) = step.added {
            self.next_sequence = self.next_sequence.max(added.sequence().saturating_add(1));
        }
    }

    /// The step by which an operator moves a replica from one node to another; `None` if it is not
    /// there, or the other node has one. Only for a partition of which the leader says that it is as
    /// its target has it: replicas move one at a time.
    pub fn replace(&self, partition: PartitionId, from: NodeId, to: NodeId) -> Option<Step> {
        let mut target = self.target(partition).to_vec();
        let place = target.iter().position(|replica| replica.node() == from)?;
        let there = target.iter().any(|replica| replica.node() == to);
        if there || to == NodeId(0) || self.next_sequence == u32::MAX {
            return None;
        }
        let added = ReplicaId::new(to, self.next_sequence);
        let removed = std::mem::replace(&mut target[place], added);
        Some(Step {
            partition,
            reason: Reason::Requested,
            added: Some(added),
            removed: Some(removed),
            target,
        })
    }

    fn validate_list(&self, list: &'static str, entries: &[Vec<ReplicaId>]) -> Result<(), Invalid> {
        if entries.len() != usize::from(self.partitions) {
            return Err(Invalid::Length {
                list,
                found: entries.len(),
                partitions: self.partitions,
            });
        }
        for (partition, replicas) in numbered(entries) {
            if replicas.is_empty() {
                return Err(Invalid::Empty { list, partition });
            }
            let mut nodes = BTreeSet::new();
            for &replica in replicas {
                if replica.node() == NodeId(0) {
                    return Err(Invalid::NodeZero);
                }
                if !nodes.insert(replica.node()) {
                    return Err(Invalid::SameNode { list, partition, node: replica.node() });
                }
                if replica.sequence() >= self.next_sequence {
                    return Err(Invalid::Sequence { replica, partition, next: self.next_sequence });
                }
            }
        }
        Ok(())
    }

    /// A replica may be in both lists, for one partition, and shares its sequence number with no other.
    fn validate_sequences(&self) -> Result<(), Invalid> {
        let lists = numbered(&self.bootstrap).chain(numbered(&self.targets));
        let mut all: Vec<(u32, ReplicaId, PartitionId)> = lists
            .flat_map(|(partition, replicas)| {
                replicas.iter().map(move |&r| (r.sequence(), r, partition))
            })
            .collect();
        all.sort_unstable();
        for pair in all.windows(2) {
            let ((sequence, replica, first), (other_sequence, other, second)) = (pair[0], pair[1]);
            if sequence == other_sequence && replica != other {
                return Err(Invalid::SameSequence(replica, other));
            }
            if replica == other && first != second {
                return Err(Invalid::TwoPartitions { replica, first, second });
            }
        }
        Ok(())
    }
}

/// Each partition with its entry.
pub(super) fn numbered<T>(entries: &[T]) -> impl Iterator<Item = (PartitionId, &T)> {
    (0..=u16::MAX).map(PartitionId).zip(entries)
}

/// A cluster id as sixteen hexadecimal digits: many JSON readers round numbers of that size.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{id:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::super::id::hexadecimal(&text, 16).ok_or_else(|| {
            D::Error::custom(format_args!("{text:?} is no cluster id: sixteen hexadecimal digits"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u32) -> NodeId {
        NodeId(number)
    }

    fn map() -> PlacementMap {
        let layout = [vec![node(0xa), node(0xb)], vec![node(0xb), node(0xc)]];
        PlacementMap::new(0x00c0_ffee, 2, &layout).expect("a valid map")
    }

    const JSON: &str = r#"{"cluster_id":"0000000000c0ffee","partitions":2,"replication_factor":2,"#;
    const LISTS: &str =
        r#"[["0000000a00000001","0000000b00000002"],["0000000b00000003","0000000c00000004"]]"#;

    #[test]
    fn the_json_form() {
        let mut map = map();
        map.draining.insert(node(0xc));
        let json = format!(
            r#"{JSON}"next_sequence":5,"draining":["node-0000000c"],"bootstrap":{LISTS},"targets":{LISTS}}}"#
        );
        assert_eq!(serde_json::to_string(&map).expect("valid JSON"), json);
        assert_eq!(serde_json::from_str::<PlacementMap>(&json).expect("a map"), map);
    }

    #[test]
    fn a_newer_map_can_be_read() {
        let json = format!(
            r#"{JSON}"color":"blue","next_sequence":5,"bootstrap":{LISTS},"targets":{LISTS}}}"#
        );
        assert_eq!(serde_json::from_str::<PlacementMap>(&json).expect("a map"), map());
        let damaged = json.replace("0000000000c0ffee", "c0ffee");
        let error = serde_json::from_str::<PlacementMap>(&damaged).expect_err("no cluster id");
        assert!(error.to_string().starts_with("\"c0ffee\" is no cluster id"), "{error}");
    }

    #[test]
    fn each_rule_is_checked() {
        let broken = |change: &dyn Fn(&mut PlacementMap)| {
            let mut map = map();
            change(&mut map);
            map.validate().expect_err("a broken rule")
        };
        let (first, second) = (PartitionId(0), PartitionId(1));
        let id = |number, sequence| ReplicaId::new(node(number), sequence);
        assert_eq!(broken(&|map| map.cluster_id = 0), Invalid::Cluster);
        assert_eq!(broken(&|map| map.partitions = 3), Invalid::Partitions(3));
        assert_eq!(broken(&|map| map.replication_factor = 0), Invalid::ReplicationFactor);
        let length = Invalid::Length { list: "targets", found: 1, partitions: 2 };
        assert_eq!(broken(&|map| map.targets.truncate(1)), length);
        let empty = Invalid::Empty { list: "bootstrap", partition: second };
        assert_eq!(broken(&|map| map.bootstrap[1].clear()), empty);
        assert_eq!(broken(&|map| map.targets[0][0] = id(0, 1)), Invalid::NodeZero);
        let twice = Invalid::SameNode { list: "targets", partition: first, node: node(0xa) };
        assert_eq!(broken(&|map| map.targets[0][1] = id(0xa, 2)), twice);
        let late = Invalid::Sequence { replica: id(0xc, 4), partition: second, next: 4 };
        assert_eq!(broken(&|map| map.next_sequence = 4), late);
        let same = Invalid::SameSequence(id(0xa, 1), id(0xd, 1));
        assert_eq!(broken(&|map| map.targets[0][0] = id(0xd, 1)), same);
        let both = Invalid::TwoPartitions { replica: id(0xa, 1), first, second };
        assert_eq!(broken(&|map| map.targets[1][0] = id(0xa, 1)), both);
    }

    #[test]
    fn a_map_of_8192_partitions_fits_into_a_request_to_etcd() {
        let nodes: Vec<NodeId> = (0xffff_fff0..=0xffff_ffff).map(NodeId).collect();
        let map =
            PlacementMap::new(u64::MAX, 3, &vec![nodes[..3].to_vec(); 8192]).expect("a valid map");
        assert!(serde_json::to_vec(&map).expect("valid JSON").len() < 1024 * 1024);
    }
}
