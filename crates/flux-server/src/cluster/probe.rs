//! Whether the process of another registration of this node's id still runs: it is asked on its peer port.
//!
//! Only a node that answers as one of the same id and cluster counts as alive. One that is silent, gone,
//! or starting itself, is not told apart here: its registration lapses, or does not.

use std::io;
use std::time::Duration;

use flux_proto::peer::{
    Frame, Hello, LinkKind, MIN_VERSION, Refusal, VERSION, decode, encode_hello,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::registry::Registration;

/// How long it has to answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// No refusal is as long.
const MAX_ANSWER_BYTES: usize = 4096;

/// Whether a process answers at the other registration's address that is this node as well.
pub(super) async fn lives(own: &Registration, other: &Registration) -> bool {
    let asked = tokio::time::timeout(TIMEOUT, ask(own, other)).await;
    matches!(asked, Ok(Ok(Some(Refusal::SameNode))))
}

/// What it refuses the connection for, if it does.
async fn ask(own: &Registration, other: &Registration) -> io::Result<Option<Refusal>> {
    let mut stream = TcpStream::connect(other.peer_addr).await?;
    let hello = Hello {
        min_version: MIN_VERSION,
        max_version: VERSION,
        kind: LinkKind::Frames,
        worker: 0,
        cluster: own.cluster_id.unwrap_or_default(),
        from: own.node.0,
        to: own.node.0,
        instance: own.instance,
    };
    let mut bytes = Vec::new();
    encode_hello(&mut bytes, &hello);
    stream.write_all(&bytes).await?;
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER_BYTES && stream.read_buf(&mut answer).await? > 0 {
        match decode(&answer) {
            Ok(None) => {}
            Ok(Some((Frame::Refused { reason, .. }, _))) => {
                return Ok(Refusal::from_number(reason));
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use flux_core::placement::{NodeId, Timing};
    use flux_proto::peer::{HELLO_BYTES, decode_hello, encode};
    use tokio::net::TcpListener;

    use super::*;

    fn registration(peer: std::net::SocketAddr, instance: u64) -> Registration {
        let address = ([127, 0, 0, 1], 9).into();
        Registration {
            node: NodeId(5),
            cluster: "flux".to_owned(),
            cluster_id: Some(7),
            instance,
            started_ms: instance,
            data_addr: address,
            peer_addr: peer,
            grpc_addr: address,
            admin_addr: address,
            zone: String::new(),
            version: "0".to_owned(),
            replaces: None,
            timing: Some(Timing { election_timeout_ms: 600, clock_drift_percent: 10 }),
        }
    }

    #[tokio::test]
    async fn only_a_node_of_the_same_id_counts_as_alive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let there = listener.local_addr().expect("bound");
        let (own, other) = (registration(([127, 0, 0, 1], 9).into(), 2), registration(there, 1));
        let cases =
            [(Some(Refusal::SameNode), true), (Some(Refusal::OtherNode), false), (None, false)];
        for (refusal, alive) in cases {
            let answer = async {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                let mut hello = [0; HELLO_BYTES];
                stream.read_exact(&mut hello).await.expect("a hello");
                let hello = decode_hello(&hello).expect("valid").expect("whole");
                assert_eq!((hello.from, hello.to, hello.cluster, hello.instance), (5, 5, 7, 2));
                if let Some(reason) = refusal {
                    let mut frame = Vec::new();
                    let refused = Frame::Refused { reason: reason as u8, text: "no" };
                    encode(&mut frame, &refused).expect("it fits");
                    stream.write_all(&frame).await.expect("sent");
                }
                // Without an answer it is silent until the other side gives up.
                let _ = stream.read(&mut [0]).await;
            };
            let (found, ()) = tokio::join!(lives(&own, &other), answer);
            assert_eq!(found, alive, "{refusal:?}");
        }
        drop(listener);
        assert!(!lives(&own, &other).await, "nobody listens");
    }
}
