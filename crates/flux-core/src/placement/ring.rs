//! The hash ring: each node stands at many points of a circle of hashes, each partition at one, and a
//! partition prefers nodes in the order in which they follow it. How many replicas a node may have is
//! not known here.

use super::id::NodeId;
use crate::slot::PartitionId;

/// Points of a node. Exact balance comes from quotas, so these only need to spread a node's
/// neighbours: with 32 a node that goes leaves to many, and 1,000 nodes sort in a few milliseconds.
const VIRTUAL_NODES: u64 = 32;

/// The points of all nodes, in order.
pub(super) struct Ring {
    points: Vec<(u64, usize)>,
}

impl Ring {
    /// A ring of nodes, which it calls by their place in the list.
    pub(super) fn new(nodes: impl Iterator<Item = NodeId>) -> Ring {
        let points_of = |(index, node): (usize, NodeId)| {
            (0..VIRTUAL_NODES).map(move |number| (mix(u64::from(node.0) << 32 | number), index))
        };
        let mut points: Vec<_> = nodes.enumerate().flat_map(points_of).collect();
        points.sort_unstable();
        Ring { points }
    }

    /// The nodes as a partition prefers them; each comes once for each of its points.
    pub(super) fn walk(&self, partition: PartitionId) -> impl Iterator<Item = usize> {
        // No node is 0, so that a partition's point is no node's but by chance.
        let point = mix(u64::from(partition.0));
        let start = self.points.partition_point(|&(other, _)| other < point);
        let (before, after) = self.points.split_at(start);
        after.iter().chain(before).map(|&(_, index)| index)
    }
}

/// The mixing function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", 2014).
fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_meets_every_node_and_keeps_its_order_when_one_comes() {
        let nodes: Vec<_> = (1..=20).map(NodeId).collect();
        let (small, large) =
            (Ring::new(nodes[..19].iter().copied()), Ring::new(nodes.iter().copied()));
        for partition in (0..64).map(PartitionId) {
            let before: Vec<_> = small.walk(partition).collect();
            let after: Vec<_> = large.walk(partition).filter(|&index| index != 19).collect();
            assert_eq!(before, after);
            assert!((0..19).all(|node| before.contains(&node)));
        }
    }
}
