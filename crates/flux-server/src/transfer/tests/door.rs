//! What stands between the two nodes: it shakes hands as a worker would, and lets bytes through.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};

use flux_proto::peer::{Frame, HELLO_BYTES, LinkKind, decode_hello, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// What becomes of one connection. Bytes are counted after the handshake, towards the receiver.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    /// All goes through.
    Pass,
    /// Both sides lose the connection after so many bytes.
    Cut(u64),
    /// The sender loses it after so many bytes, and the receiver does not notice.
    Freeze(u64),
    /// Nothing more goes through after so many bytes until `release`.
    Hold(u64),
    /// As `Hold`, and then both sides lose the connection.
    HoldAndCut(u64),
    /// One bit of that byte is another.
    Flip(u64),
    /// The hello is refused.
    Refuse,
}

pub(super) struct Door {
    pub(super) address: SocketAddr,
    receiver: Transfers,
    plan: Mutex<VecDeque<Act>>,
    /// Bytes that went towards the receiver, by connection.
    pub(super) passed: Mutex<Vec<u64>>,
    held: tokio::sync::Semaphore,
    /// Sockets whose other side has gone.
    frozen: Mutex<Vec<TcpStream>>,
}

impl Door {
    /// One act for each connection; after the last one all pass.
    pub(super) fn open(runtime: &Runtime, receiver: Transfers, plan: Vec<Act>) -> Arc<Door> {
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let door = Arc::new(Door {
            address: listener.local_addr().unwrap(),
            receiver,
            plan: Mutex::new(plan.into()),
            passed: Mutex::new(Vec::new()),
            held: tokio::sync::Semaphore::new(0),
            frozen: Mutex::new(Vec::new()),
        });
        let inside = Arc::clone(&door);
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let act = inside.plan.lock().pop_front().unwrap_or(Act::Pass);
                let number = {
                    let mut passed = inside.passed.lock();
                    passed.push(0);
                    passed.len() - 1
                };
                tokio::spawn(Arc::clone(&inside).attend(stream, act, number));
            }
        });
        door
    }

    pub(super) fn connections(&self) -> usize {
        self.passed.lock().len()
    }

    /// Hands the receiver a connection that did not come through the door.
    pub(super) fn receive(&self, stream: BulkStream) {
        self.receiver.receive(stream);
    }

    /// Lets what is held go on.
    pub(super) fn release(&self) {
        self.held.add_permits(1);
    }

    async fn attend(self: Arc<Door>, mut outside: TcpStream, act: Act, number: usize) {
        let mut hello = [0; HELLO_BYTES];
        if outside.read_exact(&mut hello).await.is_err() {
            return;
        }
        let hello = decode_hello(&hello).unwrap().unwrap();
        assert_eq!((hello.kind, hello.from, hello.to), (LinkKind::Bulk, 1, 2));
        assert_eq!((hello.cluster, hello.instance, hello.worker), (7, 9, 0));
        let answer = match act {
            Act::Refuse => Frame::Refused { reason: 3, text: "somebody else" },
            _ => Frame::Welcome { version: 1, instance: 8 },
        };
        let mut bytes = Vec::new();
        encode(&mut bytes, &answer).unwrap();
        outside.write_all(&bytes).await.unwrap();
        if let Act::Refuse = act {
            return;
        }
        let inside = self.hand_in(hello.from).await;
        self.pump(outside, inside, act, number).await;
    }

    /// Gives the receiver one end of a connection, and returns the other.
    async fn hand_in(&self, from: u32) -> TcpStream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (near, far) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let stream = mio::net::TcpStream::from_std(far.unwrap().0.into_std().unwrap());
        self.receiver.receive(BulkStream { from, stream, input: Vec::new() });
        near.unwrap()
    }

    async fn pump(&self, mut outside: TcpStream, mut inside: TcpStream, act: Act, number: usize) {
        let (mut inwards, mut outwards) = (vec![0; 1000], vec![0; 1000]);
        let (mut passed, mut released): (u64, bool) = (0, false);
        loop {
            let stop = match act {
                Act::Cut(at) | Act::Freeze(at) | Act::HoldAndCut(at) => Some(at),
                Act::Hold(at) if !released => Some(at),
                _ => None,
            };
            if stop == Some(passed) {
                match act {
                    Act::Freeze(_) => return self.frozen.lock().push(inside),
                    Act::Cut(_) => return,
                    _ => self.held.acquire().await.unwrap().forget(),
                }
                if let Act::HoldAndCut(_) = act {
                    return;
                }
                released = true;
                continue;
            }
            let room = stop.map_or(1000, |at| (at - passed).min(1000)) as usize;
            tokio::select! {
                read = outside.read(&mut inwards[..room]) => {
                    let Ok(count @ 1..) = read else { return };
                    if let Act::Flip(at) = act
                        && (passed..passed + count as u64).contains(&at)
                    {
                        inwards[(at - passed) as usize] ^= 1;
                    }
                    if inside.write_all(&inwards[..count]).await.is_err() {
                        return;
                    }
                    passed += count as u64;
                    self.passed.lock()[number] = passed;
                }
                read = inside.read(&mut outwards) => {
                    let Ok(count @ 1..) = read else { return };
                    if outside.write_all(&outwards[..count]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
