//! Which connections a node refuses, and what it says about them in its log: once for each peer and
//! reason in a while, since whoever is refused keeps trying.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use flux_core::placement::NodeId;
use flux_proto::peer::{Hello, Refusal};
use mio::net::TcpStream;
use tracing::field::DisplayValue;

use super::LocalIdentity;
use super::incoming::Lost;

/// The shortest time between two lines about the same peer and reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The most peers and reasons that are remembered; with more, all are forgotten.
const REMEMBERED: usize = 256;

/// Whether the other side is who it should be, and wants this node.
pub(super) fn judge(local: &LocalIdentity, hello: &Hello) -> Result<(), Refusal> {
    if hello.choose_version().is_none() {
        Err(Refusal::Version)
    } else if hello.cluster != local.cluster {
        Err(Refusal::Cluster)
    } else if hello.from == local.node && hello.instance == local.instance {
        // This process itself, which looks for a node that had its address before.
        Err(Refusal::OtherNode)
    } else if hello.from == local.node {
        Err(Refusal::SameNode)
    } else if hello.to != local.node {
        Err(Refusal::OtherNode)
    } else {
        Ok(())
    }
}

/// What the peer is told.
pub(super) fn text(reason: Refusal, local: &LocalIdentity) -> String {
    let LocalIdentity { cluster, node, .. } = local;
    match reason {
        Refusal::Version => {
            let (oldest, newest) = (flux_proto::peer::MIN_VERSION, flux_proto::peer::VERSION);
            format!("node-{node:08x} speaks versions {oldest} to {newest}")
        }
        Refusal::Cluster => format!("node-{node:08x} is of another cluster, {cluster:016x}"),
        Refusal::OtherNode => format!("this is node-{node:08x}"),
        Refusal::SameNode => format!(
            "two nodes have the id node-{node:08x}; one of them must be given a new data directory"
        ),
        Refusal::Malformed => format!("node-{node:08x} does not understand the hello"),
        Refusal::Busy => format!("node-{node:08x} has too many connections"),
    }
}

/// A node as a field of the log.
pub(super) fn named(node: u32) -> DisplayValue<NodeId> {
    tracing::field::display(NodeId(node))
}

/// Who a line in the log is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Node(u32),
    Address(Option<IpAddr>),
}

/// When what was last logged.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    logged: BTreeMap<(Source, u8), Instant>,
}

impl Refusals {
    /// A connection was refused.
    pub(super) fn refused(
        &mut self,
        stream: &TcpStream,
        from: Option<u32>,
        reason: Refusal,
        text: &str,
        now: Instant,
    ) {
        let address = stream.peer_addr().ok();
        let source = match from {
            Some(node) => Source::Node(node),
            None => Source::Address(address.map(|address| address.ip())),
        };
        if !self.is_news(source, reason as u8, now) {
            return;
        }
        let address = address.map(tracing::field::display);
        let node = from.map(named);
        match reason {
            Refusal::SameNode | Refusal::Cluster => {
                tracing::error!(node, address, %reason, text, "refused a peer");
            }
            // An address has changed hands; whoever looked for the other node there says so.
            Refusal::OtherNode => tracing::debug!(node, address, text, "refused a peer"),
            _ => tracing::warn!(node, address, %reason, text, "refused a peer"),
        }
    }

    /// Something else than a node has connected.
    pub(super) fn wrong_protocol(&mut self, stream: &TcpStream, now: Instant) {
        let address = stream.peer_addr().ok();
        if self.is_news(Source::Address(address.map(|address| address.ip())), 0, now) {
            let address = address.map(tracing::field::display);
            tracing::warn!(address, "a client that is not a node connected to the peer port");
        }
    }

    /// A node has sent what is no frame.
    pub(super) fn bad_frame(&mut self, from: Option<u32>, lost: &Lost, now: Instant) {
        let source = from.map_or(Source::Address(None), Source::Node);
        if self.is_news(source, u8::MAX, now) {
            tracing::warn!(node = from.map(named), reason = %lost, "closed the connection of a peer");
        }
    }

    fn is_news(&mut self, source: Source, reason: u8, now: Instant) -> bool {
        let last = self.logged.get(&(source, reason));
        if last.is_some_and(|last| now.saturating_duration_since(*last) < LOG_INTERVAL) {
            return false;
        }
        if self.logged.len() >= REMEMBERED {
            self.logged.clear();
        }
        self.logged.insert((source, reason), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_meets_itself_is_no_second_one_of_its_id() {
        let local = LocalIdentity { cluster: 1, node: 7, instance: 99, worker: 0, workers: 1 };
        let hello = local.hello(6, flux_proto::peer::LinkKind::Frames);
        assert_eq!(
            judge(&local, &hello),
            Err(Refusal::OtherNode),
            "it looks for what was here before"
        );
        let copy = Hello { instance: 98, ..hello };
        assert_eq!(judge(&local, &copy), Err(Refusal::SameNode));
    }

    #[test]
    fn a_peer_that_keeps_trying_is_logged_once_a_minute_for_each_reason() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(refusals.is_news(Source::Node(1), 2, start));
        assert!(!refusals.is_news(Source::Node(1), 2, after(59)));
        assert!(refusals.is_news(Source::Node(1), 4, after(59)));
        assert!(refusals.is_news(Source::Node(2), 2, after(59)));
        assert!(refusals.is_news(Source::Node(1), 2, after(60)));
        for node in 0..1000 {
            assert!(refusals.is_news(Source::Node(node), 9, start));
        }
        assert!(refusals.logged.len() <= REMEMBERED);
    }
}
