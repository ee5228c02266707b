//! The names of nodes and replicas. What they are given to and when is not decided here.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A node of a cluster. Written `node-` and eight hexadecimal digits. 0 is no node of any cluster: it
/// stands for the single node that runs without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct NodeId(pub u32);

/// A replica of a partition: the node it is on and a number that is never given twice in a cluster.
/// A replica that was dropped and placed again on its node is another one, so that late messages of
/// the old are not taken for the new one's. Written as sixteen hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ReplicaId(u64);

/// A text that names no node or replica.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// Not a node.
    #[error(
        "{0:?} is no node id: it must be node- and eight hexadecimal digits, like node-0badcafe"
    )]
    Node(String),
    /// Not a replica.
    #[error("{0:?} is no replica id: it must be sixteen hexadecimal digits")]
    Replica(String),
}

impl ReplicaId {
    /// The replica with this sequence number on a node.
    pub const fn new(node: NodeId, sequence: u32) -> ReplicaId {
        ReplicaId((node.0 as u64) << 32 | sequence as u64)
    }

    /// The node that the replica is on.
    pub const fn node(self) -> NodeId {
        NodeId((self.0 >> 32) as u32)
    }

    /// The number that tells it from earlier and later replicas.
    pub const fn sequence(self) -> u32 {
        self.0 as u32
    }

    /// The id as Raft knows it.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether a partition with these voters may take it in. New replicas have higher sequence numbers
    /// than all before them: one that has not was here before, and was dropped when a later one came.
    /// It would be asked to remember what it has forgotten.
    pub fn may_join(self, voters: &[ReplicaId]) -> bool {
        voters.iter().all(|voter| voter.sequence() < self.sequence())
    }

    /// The replica with this Raft id.
    pub const fn from_u64(id: u64) -> ReplicaId {
        ReplicaId(id)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node-{:08x}", self.0)
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<NodeId, InvalidId> {
        let id = text.strip_prefix("node-").and_then(|digits| hexadecimal(digits, 8));
        let id = id.and_then(|id| u32::try_from(id).ok());
        id.map(NodeId).ok_or_else(|| InvalidId::Node(text.to_owned()))
    }
}

impl FromStr for ReplicaId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<ReplicaId, InvalidId> {
        hexadecimal(text, 16).map(ReplicaId).ok_or_else(|| InvalidId::Replica(text.to_owned()))
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> String {
        id.to_string()
    }
}

impl From<ReplicaId> for String {
    fn from(id: ReplicaId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for NodeId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<NodeId, InvalidId> {
        text.parse()
    }
}

impl TryFrom<String> for ReplicaId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<ReplicaId, InvalidId> {
        text.parse()
    }
}

/// Exactly `count` lowercase digits, so that each id has one spelling.
pub(super) fn hexadecimal(digits: &str, count: usize) -> Option<u64> {
    let plain = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (plain && digits.len() == count).then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written() {
        let node = NodeId(0x00ba_dcaf);
        assert_eq!(node.to_string(), "node-00badcaf");
        assert_eq!("node-00badcaf".parse(), Ok(node));
        let replica = ReplicaId::new(node, 7);
        assert_eq!((replica.node(), replica.sequence()), (node, 7));
        assert_eq!(replica.to_string(), "00badcaf00000007");
        assert_eq!("00badcaf00000007".parse(), Ok(replica));
        assert_eq!(ReplicaId::from_u64(replica.get()), replica);
    }

    #[test]
    fn other_spellings_are_refused() {
        for text in
            ["", "node-", "node-1", "node-00BADCAF", "node-+0badcaf", "node-000000001", "0badcafe"]
        {
            assert_eq!(text.parse::<NodeId>(), Err(InvalidId::Node(text.to_owned())));
        }
        for text in ["", "1", "00BADCAF00000007", "+0badcaf00000007", "00badcaf000000071"] {
            assert_eq!(text.parse::<ReplicaId>(), Err(InvalidId::Replica(text.to_owned())));
        }
    }
}
