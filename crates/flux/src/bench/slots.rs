//! Which node of a cluster leads the partition of a key, as a client of Redis Cluster learns it.
//!
//! A map is what one node said at one time: who finds it out of date asks for another one. Nothing here
//! follows a redirection; the nodes redirect only under `resp_redirect`, and else ask each other.

use anyhow::{Context, anyhow, bail};
use flux_proto::resp::{Reply, parse_reply};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The number of slots, as in Redis Cluster.
const SLOTS: usize = 16_384;

/// Errors that say that a map is out of date.
const MOVED_ON: [&[u8]; 3] = [b"MOVED", b"NOTLEADER", b"CLUSTERDOWN"];

/// The leaders of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    nodes: Vec<String>,
    /// For each slot, the place of its leader in `nodes`.
    leaders: Vec<u8>,
}

impl Slots {
    /// Asks a node with `CLUSTER SLOTS`.
    pub async fn ask(stream: &mut TcpStream) -> anyhow::Result<Slots> {
        stream.write_all(b"*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n").await?;
        let mut input = Vec::new();
        loop {
            if let Some((reply, _)) = parse_reply(&input)? {
                return Slots::read(&reply);
            }
            if stream.read_buf(&mut input).await? == 0 {
                bail!("the connection ended before CLUSTER SLOTS was answered");
            }
        }
    }

    /// A map from the reply to `CLUSTER SLOTS`: first slot, last slot, leader, others; again and again.
    fn read(reply: &Reply) -> anyhow::Result<Slots> {
        let ranges = match reply {
            Reply::Array(ranges) if !ranges.is_empty() => ranges,
            Reply::Array(_) => bail!("no node leads anything yet, by CLUSTER SLOTS"),
            Reply::Error(text) => bail!("CLUSTER SLOTS: {}", String::from_utf8_lossy(text)),
            _ => bail!("the reply to CLUSTER SLOTS is no list"),
        };
        // A slot that nobody leads is asked of the first node, which will say so.
        let mut slots = Slots { nodes: Vec::new(), leaders: vec![0; SLOTS] };
        for range in ranges {
            let (first, last, address) =
                read_range(range).context("a range in the reply to CLUSTER SLOTS is malformed")?;
            let known = slots.nodes.iter().position(|node| *node == address);
            let place = known.unwrap_or_else(|| {
                slots.nodes.push(address);
                slots.nodes.len() - 1
            });
            let place = u8::try_from(place).map_err(|_| anyhow!("over 256 nodes lead slots"))?;
            slots.leaders[first..=last].fill(place);
        }
        Ok(slots)
    }

    /// The addresses of the nodes that lead anything.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// The place in `nodes` of a key's leader.
    pub fn leader_of(&self, key: &[u8]) -> usize {
        usize::from(self.leaders[slot_of(key)])
    }

    /// Whether a kind of error says that a map is out of date.
    pub fn is_outdated_by(kind: &[u8]) -> bool {
        MOVED_ON.contains(&kind)
    }
}

fn read_range(range: &Reply) -> Option<(usize, usize, String)> {
    let Reply::Array(parts) = range else { return None };
    let [Reply::Integer(first), Reply::Integer(last), Reply::Array(leader), ..] = parts.as_slice()
    else {
        return None;
    };
    let [Reply::Bulk(host), Reply::Integer(port), ..] = leader.as_slice() else { return None };
    let (first, last) = (usize::try_from(*first).ok()?, usize::try_from(*last).ok()?);
    let host = String::from_utf8_lossy(host);
    let host = if host.contains(':') { format!("[{host}]") } else { host.into_owned() };
    (first <= last && last < SLOTS).then(|| (first, last, format!("{host}:{port}")))
}

/// The slot of a key of a workload, which never has a hash tag.
fn slot_of(key: &[u8]) -> usize {
    let crc = key
        .iter()
        .fold(0u16, |crc, &byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) as u8 ^ byte)]);
    usize::from(crc) % SLOTS
}

/// CRC16/XMODEM: polynomial 0x1021, initial value 0.
const CRC16: [u16; 256] = {
    let mut table = [0u16; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = (index as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Slots, String> {
        let (reply, length) = parse_reply(text).unwrap().unwrap();
        assert_eq!(length, text.len());
        Slots::read(&reply).map_err(|error| error.to_string())
    }

    #[test]
    fn slots_are_those_of_redis_cluster() {
        assert_eq!(slot_of(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
        assert_eq!(slot_of(b"bar"), 5061);
    }

    #[test]
    fn a_map_tells_the_leader_of_each_key() {
        let slots = read(
            b"*3\r\n*4\r\n:0\r\n:5060\r\n*2\r\n$1\r\na\r\n:1\r\n*2\r\n$1\r\nb\r\n:2\r\n\
              *3\r\n:5061\r\n:9999\r\n*3\r\n$1\r\nb\r\n:2\r\n$2\r\nid\r\n\
              *3\r\n:10000\r\n:16383\r\n*2\r\n$3\r\n::1\r\n:1\r\n",
        )
        .unwrap();
        assert_eq!(slots.nodes(), ["a:1", "b:2", "[::1]:1"]);
        assert_eq!(slots.leader_of(b"bar"), 1);
        assert_eq!(slots.leader_of(b"foo"), 2);
        assert_eq!((slots.leaders[5060], slots.leaders[10_000]), (0, 2));
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for (text, problem) in [
            (&b"*0\r\n"[..], "no node leads"),
            (b"-ERR cluster support disabled\r\n", "CLUSTER SLOTS: ERR cluster support"),
            (b"+OK\r\n", "is no list"),
            (b"*1\r\n*3\r\n:5\r\n:4\r\n*2\r\n$1\r\na\r\n:1\r\n", "malformed"),
            (b"*1\r\n*3\r\n:0\r\n:16384\r\n*2\r\n$1\r\na\r\n:1\r\n", "malformed"),
            (b"*1\r\n*3\r\n:-1\r\n:4\r\n*2\r\n$1\r\na\r\n:1\r\n", "malformed"),
            (b"*1\r\n:1\r\n", "malformed"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
