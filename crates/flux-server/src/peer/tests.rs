//! Workers' links over real sockets of this machine, all in the test's thread. Time is what the test
//! says it is; the sockets' own time only bounds how long a test may take.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};

use flux_proto::peer::{HELLO_BYTES, MIN_VERSION, VERSION, decode, encode_hello, encode_with};
use mio::net::TcpListener;
use mio::{Events, Poll};
use rustix::net::{AddressFamily, SocketType, socket};

use super::*;

const CLUSTER: u64 = 7;
/// When a test has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const LISTENER: Token = Token(0);
const TOKENS: Range<usize> = 100..164;

/// One worker: its poll, its links, and what came of them.
struct Worker {
    poll: Poll,
    listener: Option<TcpListener>,
    peers: Peers,
    now: Instant,
    /// Node, number of the connection, and the frame's bytes.
    frames: Vec<(u32, u64, Vec<u8>)>,
    events: Vec<Event>,
    misplaced: Vec<Misplaced>,
    bulk: Vec<BulkStream>,
}

fn local() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn identity(node: u32) -> LocalIdentity {
    LocalIdentity { cluster: CLUSTER, node, instance: 99, worker: 0, workers: 1 }
}

impl Worker {
    fn new(node: u32) -> Worker {
        Worker::with(identity(node), listen(), Limits::default())
    }

    fn with(identity: LocalIdentity, listener: StdListener, limits: Limits) -> Worker {
        let poll = Poll::new().unwrap();
        let mut listener = TcpListener::from_std(listener);
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).unwrap();
        let registry = poll.registry().try_clone().unwrap();
        let peers = Peers::new(identity, registry, TOKENS, limits);
        Worker {
            poll,
            listener: Some(listener),
            peers,
            now: Instant::now(),
            frames: Vec::new(),
            events: Vec::new(),
            misplaced: Vec::new(),
            bulk: Vec::new(),
        }
    }

    fn address(&self) -> SocketAddr {
        self.listener.as_ref().unwrap().local_addr().unwrap()
    }

    fn knows(&mut self, members: &[(u32, SocketAddr)]) {
        self.peers.set_members(&members.iter().copied().collect(), self.now);
    }

    /// One round of the event loop. Time stands still.
    fn round(&mut self) {
        let mut events = Events::with_capacity(64);
        let wait = if self.peers.has_work() { Duration::ZERO } else { Duration::from_millis(1) };
        self.poll.poll(&mut events, Some(wait)).unwrap();
        for event in &events {
            if self.peers.owns(event.token()) {
                self.peers.ready(event, self.now);
            }
        }
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(TcpListener::accept) {
            self.peers.adopt(stream, Vec::new(), self.now);
        }
        let frames = &mut self.frames;
        self.peers.receive(self.now, |source, frame| {
            let mut bytes = Vec::new();
            encode(&mut bytes, &frame).unwrap();
            frames.push((source.node, source.session, bytes));
        });
        self.peers.flush(self.now);
        self.events.extend(self.peers.events());
        self.misplaced.extend(self.peers.misplaced());
        self.bulk.extend(self.peers.bulk());
    }

    /// Lets what is due happen.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.peers.tick(self.now);
        self.events.extend(self.peers.events());
    }

    fn send(&mut self, node: u32, frame: &Frame<'_>) -> bool {
        self.peers.out(node).is_some_and(|out| encode(out, frame).is_ok())
    }

    fn bytes_from(&self, node: u32) -> Vec<u8> {
        let from = self.frames.iter().filter(|(from, ..)| *from == node);
        from.flat_map(|(.., bytes)| bytes.clone()).collect()
    }

    fn incoming(&self) -> usize {
        self.peers.incoming.len() + self.peers.greeting.len()
    }
}

fn listen() -> StdListener {
    let listener = StdListener::bind(local()).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// Runs the workers until the condition holds.
fn run(workers: &mut [&mut Worker], what: &str, mut done: impl FnMut(&mut [&mut Worker]) -> bool) {
    let start = Instant::now();
    while !done(workers) {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        for worker in workers.iter_mut() {
            worker.round();
        }
    }
}

fn raft(partition: u16, bytes: &[u8]) -> Frame<'_> {
    Frame::Raft { partition, bytes }
}

fn bytes_of(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out, frame).unwrap();
    out
}

/// Two nodes, linked both ways.
fn pair() -> (Worker, Worker) {
    let (mut one, mut two) = (Worker::new(1), Worker::new(2));
    let members = [(1, one.address()), (2, two.address())];
    one.knows(&members);
    two.knows(&members);
    run(&mut [&mut one, &mut two], "both links are up", |workers| {
        workers[0].peers.is_up(2) && workers[1].peers.is_up(1)
    });
    (one, two)
}

/// A connection to the worker that speaks by hand.
fn dial(worker: &Worker) -> StdStream {
    let stream = StdStream::connect(worker.address()).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

fn hello(from: u32, to: u32) -> Hello {
    identity(from).hello(to, LinkKind::Frames)
}

fn say_hello(stream: &mut StdStream, hello: &Hello) {
    let mut bytes = Vec::new();
    encode_hello(&mut bytes, hello);
    stream.write_all(&bytes).unwrap();
}

/// What the worker has sent on the connection, until it closes it.
fn read_to_end(worker: &mut Worker, stream: &mut StdStream) -> Vec<u8> {
    let mut all = Vec::new();
    run(&mut [worker], "the connection is closed", |_| {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                all.extend_from_slice(&buffer[..count]);
                false
            }
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    });
    all
}

/// The worker has welcomed the connection.
fn read_welcome(worker: &mut Worker, stream: &mut StdStream) {
    let welcome = bytes_of(&Frame::Welcome { version: VERSION, instance: 99 });
    let mut answer = vec![0; welcome.len()];
    run(&mut [worker], "the hello is answered", |_| stream.read_exact(&mut answer).is_ok());
    assert_eq!(answer, welcome);
}

#[test]
fn frames_go_both_ways_in_order() {
    let (mut one, mut two) = pair();
    assert_eq!(one.events, [Event::LinkUp(2)]);
    let (mut to_two, mut to_one) = (Vec::new(), Vec::new());
    for number in 0..1000_u16 {
        let payload = number.to_le_bytes().repeat(usize::from(number % 300));
        let frame = raft(number, &payload);
        assert!(one.send(2, &frame));
        to_two.extend_from_slice(&bytes_of(&frame));
        let beat = Frame::Beat { sent_us: u64::from(number) };
        assert!(two.send(1, &beat));
        to_one.extend_from_slice(&bytes_of(&beat));
    }
    run(&mut [&mut one, &mut two], "all is there", |workers| {
        workers[0].frames.len() == 1000 && workers[1].frames.len() == 1000
    });
    assert_eq!(two.bytes_from(1), to_two);
    assert_eq!(one.bytes_from(2), to_one);
    assert!(!one.send(1, &raft(0, b"to itself")));
    assert!(!one.send(3, &raft(0, b"to nobody")));
}

#[test]
fn three_nodes_reach_each_other() {
    let mut workers = [Worker::new(1), Worker::new(2), Worker::new(3)];
    let members: Vec<_> =
        workers.iter().zip(1..).map(|(worker, node)| (node, worker.address())).collect();
    for worker in &mut workers {
        worker.knows(&members);
    }
    let [one, two, three] = &mut workers;
    let all = &mut [one, two, three];
    run(all, "all links are up", |all| {
        all.iter().all(|worker| worker.peers.outgoing.values().all(Outgoing::is_up))
    });
    for (worker, from) in all.iter_mut().zip(1_u16..) {
        for to in (1..=3).filter(|to| *to != u32::from(from)) {
            assert!(worker.send(to, &raft(from, b"hello")));
        }
    }
    run(all, "all frames are there", |all| all.iter().all(|worker| worker.frames.len() == 2));
    for (worker, node) in all.iter().zip(1..) {
        for from in (1..=3).filter(|from| *from != node) {
            assert_eq!(worker.bytes_from(from), bytes_of(&raft(from as u16, b"hello")));
        }
    }
}

#[test]
fn a_node_that_goes_is_noticed() {
    let (mut one, mut two) = pair();
    assert!(two.send(1, &raft(1, b"before")));
    run(&mut [&mut one, &mut two], "the frame is there", |all| all[0].frames.len() == 1);
    one.events.clear();
    drop(two);
    run(&mut [&mut one], "the end of both connections is seen", |all| all[0].events.len() == 2);
    assert!(one.events.contains(&Event::LinkDown(2)));
    assert!(one.events.contains(&Event::InboundDown { node: 2, by_peer: true }));
    assert!(!one.send(2, &raft(0, b"dropped")));

    one.events.clear();
    let mut attempts = 0;
    run(&mut [&mut one], "it has tried in vain some times", |all| {
        let due = all[0].peers.next_due().unwrap();
        attempts += u32::from(matches!(all[0].peers.outgoing[&2].failures, 2..));
        let now = all[0].now;
        all[0].pass(due.saturating_duration_since(now));
        attempts > 5
    });
    assert_eq!(one.events, [Event::Absent(2)], "told once");
}

#[test]
fn a_node_that_comes_later_is_found() {
    // The port is taken, so that nobody else gets it, but nobody listens yet.
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &local()).unwrap();
    let port = StdListener::from(socket);
    let mut one = Worker::new(1);
    one.knows(&[(2, port.local_addr().unwrap())]);
    run(&mut [&mut one], "the first attempt has failed", |all| !all[0].events.is_empty());
    assert_eq!(one.events, [Event::Absent(2)]);

    rustix::net::listen(&port, 16).unwrap();
    port.set_nonblocking(true).unwrap();
    let mut two = Worker::with(identity(2), port, Limits::default());
    two.knows(&[(1, one.address())]);
    run(&mut [&mut one, &mut two], "the links are up", |all| {
        all[0].pass(Duration::from_millis(10));
        all[0].peers.is_up(2) && all[1].peers.is_up(1)
    });
    assert!(two.send(1, &raft(1, b"to one")));
    assert!(one.send(2, &raft(2, b"to two")));
    run(&mut [&mut one, &mut two], "frames go both ways", |all| {
        all[0].frames.len() == 1 && all[1].frames.len() == 1
    });

    // It starts again: another connection has another number.
    let first = one.frames[0].1;
    let address = two.address();
    drop(two);
    let mut two = Worker::new(2);
    assert_ne!(two.address(), address);
    two.knows(&[(1, one.address())]);
    run(&mut [&mut one, &mut two], "the link is up", |all| all[1].peers.is_up(1));
    assert!(two.send(1, &raft(1, b"again")));
    run(&mut [&mut one, &mut two], "the frame is there", |all| all[0].frames.len() == 2);
    assert_ne!(one.frames[1].1, first);
}

#[test]
fn a_node_that_moved_is_found_at_its_new_address() {
    let (mut one, two) = pair();
    let mut moved = Worker::new(2);
    one.events.clear();
    one.knows(&[(2, moved.address())]);
    run(&mut [&mut one, &mut moved], "the link is up", |all| all[0].peers.is_up(2));
    assert_eq!(one.events[0], Event::LinkDown(2));
    assert!(one.send(2, &raft(0, b"here")));
    run(&mut [&mut one, &mut moved], "the frame is there", |all| all[1].frames.len() == 1);
    one.knows(&[(1, local())]);
    assert!(!one.peers.is_up(2));
    assert_eq!(one.peers.next_due(), None);
    drop(two);
}

#[test]
fn whoever_does_not_belong_is_refused() {
    let mut one = Worker::new(1);
    let fine = hello(2, 1);
    for (hello, reason) in [
        (Hello { cluster: CLUSTER + 1, ..fine }, Refusal::Cluster),
        (Hello { from: 1, instance: fine.instance + 1, ..fine }, Refusal::SameNode),
        (Hello { to: 3, ..fine }, Refusal::OtherNode),
        (Hello { min_version: VERSION + 1, max_version: VERSION + 2, ..fine }, Refusal::Version),
        (Hello { kind: LinkKind::Bulk, cluster: 0, ..fine }, Refusal::Cluster),
    ] {
        let mut stream = dial(&one);
        say_hello(&mut stream, &hello);
        let answer = read_to_end(&mut one, &mut stream);
        let (frame, taken) = decode(&answer).unwrap().unwrap();
        let Frame::Refused { reason: number, text } = frame else { panic!("{frame:?}") };
        assert_eq!((number, taken), (reason as u8, answer.len()));
        assert!(text.contains("node-00000001"), "{text}");
    }

    let mut bytes = Vec::new();
    encode_hello(&mut bytes, &fine);
    bytes[10] = 9;
    let mut stream = dial(&one);
    stream.write_all(&bytes).unwrap();
    let answer = read_to_end(&mut one, &mut stream);
    let (frame, _) = decode(&answer).unwrap().unwrap();
    assert!(matches!(frame, Frame::Refused { reason: 5, .. }), "{frame:?}");

    assert_eq!((one.incoming(), one.peers.places.len()), (0, 0));
    assert_eq!(one.events, []);
    assert!(one.bulk.is_empty());
}

#[test]
fn a_node_that_is_refused_tries_again_slowly() {
    let mut one = Worker::new(1);
    let other = LocalIdentity { cluster: CLUSTER + 1, ..identity(2) };
    let mut two = Worker::with(other, listen(), Limits::default());
    two.knows(&[(1, one.address())]);
    run(&mut [&mut one, &mut two], "it was refused", |all| all[1].peers.outgoing[&1].failures == 1);
    let due = two.peers.next_due().unwrap();
    let pause = due.saturating_duration_since(two.now);
    assert!(pause >= Duration::from_millis(500), "{pause:?}");
    assert_eq!(two.events, []);
    two.now = due;
    two.peers.tick(two.now);
    run(&mut [&mut one, &mut two], "it was refused again", |all| {
        all[1].peers.outgoing[&1].failures == 2
    });
}

#[test]
fn a_client_of_another_protocol_is_told() {
    let mut one = Worker::new(1);
    for first in
        [&b"*1\r\n$4\r\nPING\r\n"[..], b"\xf1FLUX\0\x01\0\x01\0\0\0", b"GET / HTTP/1.1\r\n"]
    {
        let mut stream = dial(&one);
        stream.write_all(first).unwrap();
        assert_eq!(read_to_end(&mut one, &mut stream), WRONG_PROTOCOL);
    }
    assert_eq!(one.incoming(), 0);
}

#[test]
fn a_connection_for_another_worker_is_handed_over() {
    let worker = |worker| LocalIdentity { worker, workers: 2, ..identity(1) };
    let mut first = Worker::with(worker(0), listen(), Limits::default());
    let mut second = Worker::with(worker(1), listen(), Limits::default());
    // A node with more workers: its worker 3 is served by worker 1.
    let other = LocalIdentity { worker: 3, workers: 4, ..identity(2) };
    let mut two = Worker::with(other, listen(), Limits::default());
    two.knows(&[(1, first.address())]);
    run(&mut [&mut first, &mut second, &mut two], "the link is up", |all| {
        for Misplaced { worker, stream, input } in std::mem::take(&mut all[0].misplaced) {
            assert_eq!((worker, input.len()), (1, HELLO_BYTES));
            let now = all[1].now;
            all[1].peers.adopt(stream, input, now);
        }
        all[2].peers.is_up(1)
    });
    assert!(two.send(1, &raft(3, b"for worker 1")));
    run(&mut [&mut first, &mut second, &mut two], "it is there", |all| all[1].frames.len() == 1);
    assert_eq!(second.bytes_from(2), bytes_of(&raft(3, b"for worker 1")));
    assert_eq!((first.incoming(), first.frames.len()), (0, 0));
}

#[test]
fn a_bulk_connection_is_handed_out_after_the_handshake() {
    let mut one = Worker::new(1);
    let mut stream = dial(&one);
    say_hello(&mut stream, &Hello { kind: LinkKind::Bulk, worker: 5, ..hello(2, 1) });
    stream.write_all(b"ahead").unwrap();
    read_welcome(&mut one, &mut stream);
    assert_eq!(one.bulk.len(), 1);
    let mut bulk = one.bulk.pop().unwrap();
    let mut ahead = bulk.input;
    run(&mut [&mut one], "all is there", |_| {
        let mut buffer = [0; 16];
        let count = bulk.stream.read(&mut buffer).unwrap_or(0);
        ahead.extend_from_slice(&buffer[..count]);
        ahead == b"ahead"
    });
    assert_eq!((bulk.from, one.incoming(), one.peers.places.len()), (2, 0, 0));
}

#[test]
fn a_newer_connection_takes_the_place_of_an_older_one() {
    let mut one = Worker::new(1);
    let mut older = dial(&one);
    say_hello(&mut older, &hello(2, 1));
    read_welcome(&mut one, &mut older);
    let mut other_worker = dial(&one);
    say_hello(&mut other_worker, &Hello { worker: 1, ..hello(2, 1) });
    read_welcome(&mut one, &mut other_worker);
    let mut newer = dial(&one);
    say_hello(&mut newer, &hello(2, 1));
    read_welcome(&mut one, &mut newer);
    assert_eq!(read_to_end(&mut one, &mut older), b"");
    newer.write_all(&bytes_of(&raft(1, b"new"))).unwrap();
    other_worker.write_all(&bytes_of(&raft(2, b"other"))).unwrap();
    run(&mut [&mut one], "both are there", |all| all[0].frames.len() == 2);
    let replaced = Event::InboundDown { node: 2, by_peer: false };
    assert_eq!((one.incoming(), &one.events[..]), (2, &[replaced][..]));
    drop(newer);
    run(&mut [&mut one], "its end is seen", |all| all[0].events.len() > 1);
    assert_eq!(one.events[1..], [Event::InboundDown { node: 2, by_peer: true }]);
}

#[test]
fn a_peer_that_takes_nothing_fills_one_buffer_and_is_then_given_up() {
    let mut one = Worker::new(1);
    let listener = listen();
    one.knows(&[(2, listener.local_addr().unwrap())]);
    let mut taken = None;
    run(&mut [&mut one], "the link is up", |all| {
        if let Ok((mut stream, _)) = listener.accept() {
            stream
                .write_all(&bytes_of(&Frame::Welcome { version: VERSION, instance: 99 }))
                .unwrap();
            taken = Some(stream);
        }
        all[0].peers.is_up(2)
    });
    let limit = one.peers.limits.out_bytes;
    let payload = vec![7; 1024 * 1024];
    run(&mut [&mut one], "no more fits", |all| !all[0].send(2, &raft(0, &payload)));
    let link = &one.peers.outgoing[&2];
    let waiting = link.output.len() - link.sent;
    assert!((limit..limit + payload.len() + 16).contains(&waiting), "{waiting} bytes");

    let due = one.peers.next_due().expect("a blocked link is watched");
    one.now = due - Duration::from_millis(1);
    one.pass(Duration::ZERO);
    assert!(one.peers.is_up(2));
    one.events.clear();
    one.pass(Duration::from_millis(1));
    assert_eq!(one.events, [Event::LinkDown(2)]);
    assert!(one.peers.out(2).is_none());
}

#[test]
fn a_blocked_link_goes_on_when_the_peer_reads_again() {
    let (mut one, mut two) = pair();
    let payload = vec![7; 1024 * 1024];
    let mut sent = 0;
    run(&mut [&mut one], "no more fits", |all| {
        let fits = all[0].send(2, &raft(0, &payload));
        sent += usize::from(fits);
        !fits
    });
    assert!(one.peers.next_due().is_some());
    run(&mut [&mut one, &mut two], "all is there", |all| all[1].frames.len() == sent);
    assert_eq!(one.peers.next_due(), None, "it is blocked no more");
    assert!(one.peers.outgoing[&2].output.capacity() <= 1024 * 1024, "memory is given back");
}

#[test]
fn the_largest_frame_passes_without_keeping_others_waiting() {
    let (mut one, mut two) = pair();
    let mut three = dial(&two);
    say_hello(&mut three, &hello(3, 2));
    read_welcome(&mut two, &mut three);
    let size = 64 * 1024 * 1024;
    let out = one.peers.out(2).unwrap();
    encode_with(out, &raft(1, b""), |out| out.resize(out.len() + size, 5)).unwrap();
    assert!(one.peers.out(2).is_none(), "one oversized frame fills the buffer");
    let mut rounds = 0;
    run(&mut [&mut one, &mut two], "both frames are there", |all| {
        rounds += 1;
        if rounds == 3 {
            three.write_all(&bytes_of(&raft(2, b"small"))).unwrap();
        }
        all[1].frames.len() == 2
    });
    assert!(rounds >= 64, "at most 1 MiB is read in a round, but all was in {rounds}");
    assert_eq!(two.frames[0].0, 3, "the small frame did not wait for the large one");
    assert_eq!(two.frames[1].2.len(), 4 + 1 + 2 + size);
    for place in &two.peers.places {
        if let (_, Place::Incoming(link)) = place {
            assert!(link.input.capacity() <= READ_BYTES, "memory is given back");
        }
    }
    assert!(one.send(2, &raft(1, b"more")));
    run(&mut [&mut one, &mut two], "the link goes on", |all| all[1].frames.len() == 3);
}

#[test]
fn a_part_of_a_frame_is_a_sign_of_life_but_not_for_ever() {
    let mut worker = Worker::new(1);
    let mut stream = dial(&worker);
    say_hello(&mut stream, &hello(2, 1));
    read_welcome(&mut worker, &mut stream);
    let frame = bytes_of(&raft(1, &[7; 1000]));
    let mut sent = 0;
    let mut send = |worker: &mut Worker, upto: usize| {
        stream.write_all(&frame[sent..upto]).unwrap();
        sent = upto % frame.len();
        let (place, left) = (worker.peers.incoming[&(2, 0)], sent);
        run(
            &mut [&mut *worker],
            "the bytes are there",
            |all| matches!(&all[0].peers.places[place], Place::Incoming(one) if one.input.len() == left),
        );
        worker.peers.heard().collect::<Vec<u32>>()
    };
    assert_eq!(send(&mut worker, 100), [2]);
    worker.pass(Limits::default().frame_timeout / 2);
    assert_eq!(send(&mut worker, 200), [2]);
    worker.pass(Limits::default().frame_timeout / 2);
    assert!(send(&mut worker, 300).is_empty(), "one frame for ever is no life");
    send(&mut worker, frame.len());
    assert_eq!(worker.frames.len(), 1, "a slow frame is one all the same");
    assert_eq!(send(&mut worker, 10), [2], "the next frame has a time of its own");
}

#[test]
fn junk_ends_a_connection_and_nothing_else() {
    let mut one = Worker::new(1);
    let over = (flux_proto::peer::MAX_FRAME_BYTES as u32 + 1).to_le_bytes();
    let unexpected = bytes_of(&Frame::Accept { from_chunk: 1, crc: 0 });
    for (junk, node) in [(&over[..], 2), (&[0; 4], 3), (&[1, 0, 0, 0, 99], 4), (&unexpected, 5)] {
        let mut stream = dial(&one);
        say_hello(&mut stream, &hello(node, 1));
        read_welcome(&mut one, &mut stream);
        stream.write_all(&bytes_of(&raft(9, b"good"))).unwrap();
        stream.write_all(junk).unwrap();
        assert_eq!(read_to_end(&mut one, &mut stream), b"");
        assert_eq!(one.bytes_from(node), bytes_of(&raft(9, b"good")));
        assert_eq!(one.events, [Event::InboundDown { node, by_peer: false }]);
        one.events.clear();
    }
    assert_eq!(one.incoming(), 0);
}

#[test]
fn a_link_speaks_the_newest_version_that_both_sides_know() {
    let (one, _two) = pair();
    assert_eq!((one.peers.version(2), one.peers.version(3)), (Some(VERSION), None));

    // A node of the first version that connects is answered in it.
    let mut one = Worker::new(1);
    let mut stream = dial(&one);
    say_hello(&mut stream, &Hello { max_version: MIN_VERSION, ..hello(2, 1) });
    let welcome = bytes_of(&Frame::Welcome { version: MIN_VERSION, instance: 99 });
    let mut answer = vec![0; welcome.len()];
    run(&mut [&mut one], "the hello is answered", |_| stream.read_exact(&mut answer).is_ok());
    assert_eq!(answer, welcome);

    // And so is one that is connected to; what it cannot have chosen is no answer.
    for (version, chosen) in [(MIN_VERSION, Some(MIN_VERSION)), (VERSION + 1, None), (0, None)] {
        let mut one = Worker::new(1);
        let listener = listen();
        one.knows(&[(2, listener.local_addr().unwrap())]);
        let mut taken = None;
        run(&mut [&mut one], "the answer is taken", |all| {
            if let Ok((mut stream, _)) = listener.accept() {
                let welcome = bytes_of(&Frame::Welcome { version, instance: 99 });
                stream.write_all(&welcome).unwrap();
                taken = Some(stream);
            }
            all[0].peers.is_up(2) || all[0].peers.outgoing[&2].failures > 0
        });
        assert_eq!(one.peers.version(2), chosen);
    }
}

#[test]
fn bytes_that_come_back_on_a_link_end_it() {
    let mut one = Worker::new(1);
    let listener = listen();
    one.knows(&[(2, listener.local_addr().unwrap())]);
    let mut answer = bytes_of(&Frame::Welcome { version: VERSION, instance: 99 });
    let mut taken = Vec::new();
    run(&mut [&mut one], "the link is up", |all| {
        if let Ok((mut stream, _)) = listener.accept() {
            stream.write_all(&answer).unwrap();
            taken.push(stream);
        }
        all[0].peers.is_up(2)
    });
    taken[0].write_all(b"x").unwrap();
    run(&mut [&mut one], "the link is down", |all| !all[0].peers.is_up(2));
    assert_eq!(one.events, [Event::LinkUp(2), Event::LinkDown(2)]);

    // Too much at once is no answer either, nor is anything but a welcome.
    answer.push(0);
    for answer in [answer, bytes_of(&raft(1, b"?")), b"-ERR what?\r\n".to_vec()] {
        let failures = one.peers.outgoing[&2].failures;
        one.pass(Duration::from_secs(1));
        run(&mut [&mut one], "it has failed again", |all| {
            if let Ok((mut stream, _)) = listener.accept() {
                stream.write_all(&answer).unwrap();
                taken.push(stream);
            }
            all[0].peers.outgoing[&2].failures > failures
        });
        assert!(!one.peers.is_up(2));
    }
}

#[test]
fn silence_in_the_handshake_ends_it() {
    // The kernel takes the connection, but nobody answers.
    let mut one = Worker::new(1);
    let listener = listen();
    one.knows(&[(2, listener.local_addr().unwrap())]);
    run(&mut [&mut one], "the hello is sent", |all| {
        all[0].peers.next_due() == Some(all[0].now + all[0].peers.limits.handshake_timeout)
    });
    one.pass(Duration::from_secs(2));
    assert_eq!(one.peers.outgoing[&2].failures, 1);
    assert!(one.peers.next_due().unwrap() <= one.now + Duration::from_millis(20));
    assert_eq!(one.events, []);

    // And the other way round: half a hello, and then nothing.
    let mut two = Worker::new(2);
    let mut stream = dial(&two);
    stream.write_all(b"\xf2FLUX\0").unwrap();
    run(&mut [&mut two], "it is taken", |all| all[0].incoming() == 1);
    two.pass(Duration::from_millis(1999));
    assert_eq!(two.incoming(), 1);
    two.pass(Duration::from_millis(1));
    assert_eq!(two.incoming(), 0);
    assert_eq!(read_to_end(&mut two, &mut stream), b"");
}

#[test]
fn connections_are_bounded() {
    let mut one = Worker::new(1);
    let limit = TOKENS.len() - TOKENS.len() / 4;
    let mut streams: Vec<_> = (0..limit).map(|_| dial(&one)).collect();
    run(&mut [&mut one], "all are taken", |all| all[0].incoming() == limit);
    let mut one_more = dial(&one);
    let answer = read_to_end(&mut one, &mut one_more);
    let (frame, _) = decode(&answer).unwrap().unwrap();
    assert!(matches!(frame, Frame::Refused { reason: 6, .. }), "{frame:?}");
    // There is room for the nodes' links all the same.
    let two = Worker::new(2);
    one.knows(&[(2, two.address())]);
    assert_eq!(one.peers.outgoing.len(), 1);
    streams.clear();
    run(&mut [&mut one], "there is room again", |all| all[0].incoming() == 0);
}

#[test]
fn pauses_grow_while_nobody_is_there() {
    let mut one = Worker::new(1);
    let free = listen().local_addr().unwrap();
    one.knows(&[(2, free)]);
    for failures in 1..=8 {
        run(&mut [&mut one], "the attempt has failed", |all| {
            all[0].peers.outgoing[&2].failures == failures
        });
        let pause = one.peers.next_due().unwrap().saturating_duration_since(one.now);
        let longest = Duration::from_millis(20 << (failures - 1)).min(Duration::from_secs(1));
        assert!(pause >= longest / 2 && pause <= longest, "{failures}: {pause:?}");
        one.pass(pause);
    }
    assert_eq!(one.events, [Event::Absent(2)]);
}
