//! What a node tells of itself and of the cluster: members, and who leads and holds the partitions.
//!
//! What this module does not do: judge whether it makes sense; positions are checked, no more.

use bytes::BufMut;

use super::body::{BodyError, Reader, put_bytes, put_count};

/// The leader of a partition that has none.
const NO_LEADER: u16 = u16::MAX;

/// As many as there are slots.
const MAX_PARTITIONS: usize = 16384;

/// Replicas of one partition, learners and those that leave included.
const MAX_REPLICAS: usize = 64;

/// A node's account of itself and of who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The version of its software.
    pub server_version: &'a str,
    /// The nodes that the leader map names.
    pub members: Vec<Member<'a>>,
    /// For each partition the position of its leader in `members`, if it has one.
    pub leaders: Vec<Option<u16>>,
    /// The epoch of the placement map; 0 without a cluster.
    pub epoch: u64,
    /// For each partition the positions of its replicas in `members`; empty where the server tells
    /// of none.
    pub replicas: Vec<Vec<u16>>,
}

/// A node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where its data port listens, as `host:port`.
    pub data_addr: &'a str,
    /// The zone that it stands in; may be empty.
    pub zone: &'a str,
}

/// Who leads a partition, as the node knows that answers `NOT_LEADER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderHint<'a> {
    /// The partition.
    pub partition: u16,
    /// Where its leader's data port listens, as `host:port`; empty where it is not known.
    pub leader_addr: &'a str,
}

impl<'a> LeaderHint<'a> {
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<LeaderHint<'a>, BodyError> {
        let partition = reader.u16("partition")?;
        Ok(LeaderHint { partition, leader_addr: reader.text("leader_addr")? })
    }
}

impl<'a> Info<'a> {
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Info<'a>, BodyError> {
        let node = reader.text("node")?;
        let server_version = reader.text("server_version")?;
        let members = reader.list("members", usize::from(NO_LEADER), 8, |reader| {
            let (name, data_addr) = (reader.text("name")?, reader.text("data_addr")?);
            Ok(Member { name, data_addr, zone: "" })
        })?;
        let known = members.len();
        let leaders = reader.list("leaders", MAX_PARTITIONS, 2, |reader| {
            Ok(match reader.u16("leader")? {
                NO_LEADER => None,
                leader => Some(position(leader, known, "leader")?),
            })
        })?;
        let mut info =
            Info { node, server_version, members, leaders, epoch: 0, replicas: Vec::new() };
        // A server that knows no cluster may end here.
        if !reader.is_empty() {
            info.decode_topology(reader)?;
        }
        Ok(info)
    }

    /// The fields from the epoch on.
    fn decode_topology(&mut self, reader: &mut Reader<'a>) -> Result<(), BodyError> {
        self.epoch = reader.u64("epoch")?;
        let known = self.members.len();
        let zones = reader.list("zones", known, 4, |reader| reader.text("zone"))?;
        for (member, zone) in self.members.iter_mut().zip(zones) {
            member.zone = zone;
        }
        let replica = |reader: &mut Reader<'_>| position(reader.u16("replica")?, known, "replica");
        self.replicas = reader.list("replicas", self.leaders.len(), 4, |reader| {
            reader.list("replicas", MAX_REPLICAS, 2, replica)
        })?;
        Ok(())
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, self.node.as_bytes());
        put_bytes(out, self.server_version.as_bytes());
        put_count(out, self.members.len());
        for member in &self.members {
            put_bytes(out, member.name.as_bytes());
            put_bytes(out, member.data_addr.as_bytes());
        }
        put_count(out, self.leaders.len());
        for leader in &self.leaders {
            out.put_u16_le(leader.unwrap_or(NO_LEADER));
        }
        out.put_u64_le(self.epoch);
        put_count(out, self.members.len());
        for member in &self.members {
            put_bytes(out, member.zone.as_bytes());
        }
        put_count(out, self.replicas.len());
        for replicas in &self.replicas {
            put_count(out, replicas.len());
            for &replica in replicas {
                out.put_u16_le(replica);
            }
        }
    }
}

/// A position in the list of members.
fn position(position: u16, members: usize, field: &'static str) -> Result<u16, BodyError> {
    if usize::from(position) < members {
        Ok(position)
    } else {
        Err(BodyError::Invalid { field, value: u64::from(position) })
    }
}
