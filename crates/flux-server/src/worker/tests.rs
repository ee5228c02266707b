//! A worker's parts without its thread and sockets: frames of other nodes go in, and what is kept, owed
//! or written is looked at.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use flux_core::effect::Changes;
use flux_core::placement::{NodeId, PlacementMap, ReplicaId};
use flux_core::replica::{
    Message as RaftMessage, MessageType, Recovery, Replica, SnapshotMeta, Status, encode_message,
};
use flux_core::session::Once;
use flux_core::store::{Memory, Table, TableOptions};
use flux_core::{Command, Condition, Error, Expiry, PartitionId, Partitions, Reply};
use flux_log::{Log, LogOptions, SimDisk};
use flux_proto::peer::{Frame, Request, TRACES_SINCE, VERSION, decode, encode};
use tokio::sync::oneshot;

use super::cluster::Cluster;
use super::dispatch::Dispatch;
use super::forward::PATIENCE;
use super::syncer::Syncer;
use super::turn::Turn;
use crate::clock;
use crate::cluster::{Member, Registration, Topology};
use crate::config::{Fsync, Settings};
use crate::forward_codec::{encode_command, encode_reply};
use crate::mailbox::{Ask, Mailbox, Message, PeerRequest, Return, Waiter};
use crate::peer::{Limits, LocalIdentity, Peers};
use crate::recovery::{TICK, replica_config};
use crate::shared::{ClusterSeat, PartitionView, Shared};

const PARTITIONS: u16 = 2;
const ME: u32 = 1;

const HERE: PartitionId = PartitionId(0);
const THERE: PartitionId = PartitionId(1);
const THEIR_INSTANCE: u64 = 22;
const SEGMENT_BYTES: u64 = 64 * 1024;
/// Far longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(20);

/// A worker's parts, alone on its node, which is one of a cluster.
struct Bench {
    dispatch: Dispatch,
    turn: Turn,
    disk: SimDisk,
    now: Instant,
    poll: mio::Poll,
    _mailbox: Receiver<Message>,
}

/// A waiter that tells nobody.
fn waiter() -> Waiter {
    Waiter::Task(oneshot::channel().0)
}

fn set() -> Command<&'static [u8]> {
    Command::Set {
        key: b"k",
        value: b"v",
        expiry: Expiry::Never,
        condition: Condition::Always,
        return_previous: false,
    }
}

fn id(node: u32) -> u64 {
    ReplicaId::new(NodeId(node), node).get()
}

impl Bench {
    /// Every partition begins with replicas on these nodes.
    fn of(nodes: &[u32]) -> Bench {
        let poll = mio::Poll::new().expect("a poll");
        let waker = mio::Waker::new(poll.registry(), super::WAKER).expect("a waker");
        let (mailbox, receiver) = Mailbox::new(waker);
        let shared = Arc::new(shared(mailbox));
        let voters: Vec<u64> = nodes.iter().map(|node| id(*node)).collect();
        let new = |partition| replica(&shared, partition, id(ME), &voters);
        let replicas: Vec<Replica<Waiter>> = shared.partitions.iter().map(new).collect();
        let disk = SimDisk::new(1);
        let options = LogOptions { segment_bytes: SEGMENT_BYTES, ..LogOptions::new(1) };
        let log = Log::open(Arc::new(disk.clone()), options, &mut |_| {}, &mut |_| {});
        let syncer = Syncer::start(0, Arc::clone(&shared.mailboxes[0])).expect("a thread");
        let now = Instant::now();
        let turn = Turn::new(log.expect("a new log").0, syncer, &shared.settings, now);
        let mut dispatch = Dispatch::new(0, Arc::clone(&shared), replicas);
        let cluster = Cluster::new(0, NodeId(ME), Arc::new(Topology::default()));
        dispatch.cluster = Some(Box::new(cluster));
        dispatch.look_at_clock();
        Bench { dispatch, turn, disk, now, poll, _mailbox: receiver }
    }

    fn cluster(&mut self) -> &mut Cluster {
        self.dispatch.cluster.as_mut().expect("it is one of a cluster")
    }

    /// Lets every replica do what it can, as if all was on the disk at once.
    fn turn(&mut self) {
        for partition in self.dispatch.shared.partitions.iter() {
            let (replica, replies) = self.dispatch.replica(partition).expect("a replica");
            replica.propose(replies);
            while let Some(ready) = replica.ready(replies).expect("it is sound") {
                replica.persisted(ready.number);
            }
        }
    }

    /// Takes a turn of the worker.
    fn take_turn(&mut self) {
        self.dispatch.look_at_clock();
        self.turn.take(&mut self.dispatch, self.now);
    }

    /// Gives a message of node 2 to a replica here.
    fn step(&mut self, partition: PartitionId, kind: MessageType, message: RaftMessage) {
        let mut message = RaftMessage { from: id(2), to: id(ME), ..message };
        message.set_msg_type(kind);
        self.dispatch.step(partition, message);
    }

    fn status(&mut self, partition: PartitionId) -> Status {
        self.dispatch.replica(partition).expect("a replica").0.status()
    }

    fn tick(&mut self) {
        self.dispatch.tick(self.now);
        self.take_turn();
        self.dispatch.continue_hand_overs();
    }

    /// Lets turns follow each other until all is synced.
    fn settle(&mut self) {
        self.take_turn();
        while self.turn.is_busy(&self.dispatch) {
            self.wait_for_sync();
            self.take_turn();
        }
    }

    /// Has the replica here elected by node 2.
    fn elect(&mut self, partition: PartitionId) {
        for _ in 0..40 {
            self.tick();
        }
        let term = self.status(partition).term + 1;
        let answer = || RaftMessage { term, ..RaftMessage::default() };
        self.step(partition, MessageType::MsgRequestPreVoteResponse, answer());
        self.settle();
        self.step(partition, MessageType::MsgRequestVoteResponse, answer());
        self.settle();
        let index = self.status(partition).last;
        let message = RaftMessage { index, ..answer() };
        self.step(partition, MessageType::MsgAppendResponse, message);
        self.settle();
        assert!(self.dispatch.leads(partition), "{:?}", self.status(partition));
    }

    /// Lets node 2, as the leader, send more than the disk can hold.
    fn get_stuck(&mut self, partition: PartitionId) {
        self.disk.limit_capacity(Some(self.disk.used()));
        let mut message = RaftMessage { term: 9, index: 1, log_term: 1, ..RaftMessage::default() };
        message.entries = vec![Default::default(); 2];
        for (entry, index) in message.entries.iter_mut().zip(2..) {
            (entry.index, entry.term) = (index, 9);
            entry.data = vec![0; SEGMENT_BYTES as usize];
        }
        self.step(partition, MessageType::MsgAppend, message);
        self.take_turn();
        assert!(!self.dispatch.can_write());
    }

    /// Waits for the sync that is under way.
    fn wait_for_sync(&mut self) {
        let mailbox = Arc::clone(&self.dispatch.shared.mailboxes[0]);
        let mut answers = Vec::new();
        loop {
            mailbox.take_answers(&mut answers);
            for answer in answers.drain(..) {
                match answer {
                    Return::Synced(result) => return self.turn.synced(result, &mut self.dispatch),
                    Return::Prepared(result) => self.turn.prepared(result),
                    other => panic!("{other:?}"),
                }
            }
            mailbox.fall_asleep();
            if !mailbox.has_answers() {
                let mut events = mio::Events::with_capacity(1);
                self.poll.poll(&mut events, Some(DEADLINE)).expect("it can wait");
                assert!(!events.is_empty(), "no sync has ended");
            }
            mailbox.awake();
        }
    }

    /// The replies that are due, as their waiters would get them.
    fn replies(&mut self) -> Vec<Reply> {
        let replies = std::mem::take(&mut self.dispatch.replies);
        let unwrapped =
            replies.into_iter().filter_map(|(to, reply)| self.dispatch.unwrap_kept(to, reply));
        unwrapped.map(|(_, reply)| reply).collect()
    }

    /// Begins to open a link to a node that listens where is returned.
    fn link_to(&mut self, node: u32) -> TcpListener {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let registry = self.poll.registry().try_clone().expect("a registry");
        let identity = LocalIdentity { cluster: 1, node: ME, instance: 11, worker: 0, workers: 1 };
        let mut peers = Peers::new(identity, registry, super::PEERS, Limits::default());
        let address = listener.local_addr().expect("it is bound");
        peers.set_members(&[(node, address)].into(), self.now);
        self.dispatch.peers = Some(peers);
        listener
    }

    /// Welcomes the link as the process that frames come from.
    fn welcome(&mut self, listener: &TcpListener) -> TcpStream {
        self.welcome_with(listener, VERSION)
    }

    fn welcome_with(&mut self, listener: &TcpListener, version: u16) -> TcpStream {
        let (mut stream, _) = listener.accept().expect("the link is being opened");
        let mut welcome = Vec::new();
        let frame = Frame::Welcome { version, instance: THEIR_INSTANCE };
        encode(&mut welcome, &frame).expect("it fits");
        stream.write_all(&welcome).expect("the other side reads");
        let peers = self.dispatch.peers.as_mut().expect("it has a link");
        let mut events = mio::Events::with_capacity(8);
        while !peers.is_up(2) {
            self.poll.poll(&mut events, Some(DEADLINE)).expect("it can wait");
            assert!(!events.is_empty(), "the link does not come up");
            for event in &events {
                peers.ready(event, self.now);
            }
            peers.flush(self.now);
        }
        stream
    }

    /// Takes a frame as it comes from a node.
    fn frame(&mut self, from: u32, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        encode(&mut bytes, frame).expect("it fits");
        let (frame, _) = decode(&bytes).expect("what was encoded").expect("a whole frame");
        self.dispatch.on_frame(from, THEIR_INSTANCE, &frame);
    }
}

/// A new replica of a group with these voters.
fn replica(shared: &Shared, partition: PartitionId, id: u64, voters: &[u64]) -> Replica<Waiter> {
    let config = replica_config(partition, id, &shared.settings, PARTITIONS);
    let view = &shared.views[usize::from(partition.0)];
    let (table, memory) = (Arc::clone(&view.table), Arc::clone(&shared.memory));
    let beginning = SnapshotMeta::founding(voters.to_vec());
    let recovery = Recovery::new(table, None, beginning, config.tail_bytes);
    let standing = Arc::clone(&view.standing);
    let replica = Replica::new(&config, recovery, memory, standing, clock::now());
    replica.expect("a founding state")
}

fn shared(mailbox: Arc<Mailbox>) -> Shared {
    let memory = Memory::new(0);
    let table_options = TableOptions { hash_seed: 1, shards: 1 };
    let partitions = Partitions::new(PARTITIONS).expect("a power of two");
    let view = |_| PartitionView {
        feed: Default::default(),
        table: Arc::new(Table::new(table_options, Arc::clone(&memory))),
        standing: Arc::default(),
        claim: Default::default(),
    };
    Shared {
        settings: Settings { workers: 1, fsync: Fsync::Always, ..Settings::default() },
        node_id: String::new(),
        data_addr: SocketAddr::from(([127, 0, 0, 1], 0)),
        partitions,
        cluster: Some(ClusterSeat {
            me: NodeId(ME),
            transfers: Default::default(),
            topology: Default::default(),
            answered: parking_lot::Mutex::default(),
        }),
        views: partitions.iter().map(view).collect(),
        led: Default::default(),
        published: Default::default(),
        table_options,
        mailboxes: vec![mailbox],
        memory,
        stats: Arc::default(),
        started: Instant::now(),
        connections: Default::default(),
        next_connection: Default::default(),
        nodes: Arc::default(),
        watchers: Default::default(),
        clients: Default::default(),
        log_bytes: Default::default(),
        log_pinned_bytes: Default::default(),
        last_snapshot_s: Default::default(),
        max_connections: Default::default(),
        idle_timeout_s: Default::default(),
        failure: Default::default(),
        failed: Default::default(),
        stopping: Default::default(),
        drained: Default::default(),
    }
}

#[test]
fn a_write_that_comes_home_from_a_lost_node_is_not_said_to_be_refused() {
    let mut bench = Bench::of(&[ME]);
    bench.turn();
    let (command, now) = (Command::DeleteIf { key: b"w", condition: Condition::Always }, bench.now);
    let add = |bench: &mut Bench, lost: bool| {
        let once = Some(Once { session: 1, sequence: 1, acked_below: 1 });
        let ask = Ask { once, ..Ask::default() };
        let forwards = &mut bench.cluster().forwards;
        forwards.add(HERE, &command.borrowed(), ask, waiter(), now).expect("there is room");
        if lost {
            assert_eq!(forwards.node(HERE, None, &[2]), Some(2));
            forwards.send(HERE, |_, _| true);
            bench.dispatch.on_lost(2);
        }
        bench.dispatch.refusing = Some(Error::Overloaded);
        bench.dispatch.send_forwards();
        bench.replies()
    };
    assert_eq!(add(&mut bench, false), [Reply::Error(Error::Overloaded)]);
    assert_eq!(add(&mut bench, true), [Reply::Error(Error::OutcomeUnknown)]);
}

#[test]
fn what_comes_behind_a_refused_request_is_refused_until_there_is_another_attempt() {
    let mut bench = Bench::of(&[ME]);
    let mut delete = Vec::new();
    let command = Command::DeleteIf { key: b"k", condition: Condition::Always };
    encode_command(&command, &mut delete).expect("it fits");
    let ask = |bench: &mut Bench, attempt: u64, number: u64| {
        let (id, partition) = (attempt << 30 | number, HERE.0);
        let payload = &delete;
        let request = Request {
            id,
            partition,
            deadline_ms: 0,
            stale: false,
            once: None,
            trace: None,
            payload,
        };
        bench.frame(2, &Frame::Request(request));
        bench.turn();
        let (waiter, reply) = bench.dispatch.replies.pop().expect("a reply");
        let Waiter::Peer(request) = waiter else { panic!("{waiter:?}") };
        bench.dispatch.respond(request, &reply);
        reply
    };
    // It does not lead before its first turn.
    assert_eq!(ask(&mut bench, 0, 1), Reply::Error(Error::NotLeader));
    assert_eq!(
        ask(&mut bench, 0, 2),
        Reply::Error(Error::NotLeader),
        "it would overtake the first"
    );
    assert_eq!(ask(&mut bench, 1, 3), Reply::Integer(0));
    assert_eq!(ask(&mut bench, 0, 4), Reply::Integer(0), "the numbers have gone round");
}

#[test]
fn each_write_of_a_batch_keeps_the_trace_that_it_came_with() {
    let mut bench = Bench::of(&[ME]);
    bench.turn();
    bench.dispatch.replica(HERE).expect("a replica").0.set_capture(true);
    let mut unnamed = [9; 25];
    unnamed[16..].fill(0);
    let traces = [Some([1; 25]), None, Some([2; 25]), Some([2; 25]), Some(unnamed)];
    for (number, trace) in (1..).zip(&traces) {
        let ask = Ask { trace: trace.map(Box::new), ..Ask::default() };
        if number % 2 == 0 {
            bench.dispatch.execute_for(HERE, &set(), ask, waiter());
            continue;
        }
        // From another node.
        let mut command = Vec::new();
        encode_command(&set(), &mut command).expect("it fits");
        let (partition, trace, payload) = (HERE.0, trace.as_ref(), &command);
        let (deadline_ms, stale, once) = (0, false, None);
        let request = Request { id: number, partition, deadline_ms, stale, once, trace, payload };
        bench.frame(2, &Frame::Request(request));
    }
    let read = Ask { trace: Some(Box::new([3; 25])), ..Ask::default() };
    bench.dispatch.execute_for(HERE, &Command::Get { key: b"k" }, read, waiter());
    bench.turn();
    let mut committed = Vec::new();
    bench.dispatch.replica(HERE).expect("a replica").0.take_committed(&mut committed);
    let [batch] = &committed[..] else { panic!("{committed:?}") };
    let changes = Changes::new(&batch.payload).expect("a batch");
    let told: Vec<_> = changes.map(|change| change.trace.copied()).collect();
    // An id of zeros, which no client can send, is not believed.
    let traces = traces.map(|trace| trace.filter(|trace| *trace != unnamed));
    assert_eq!(told, traces);
}

#[test]
fn a_trace_goes_with_a_forwarded_write_where_the_other_node_knows_of_traces() {
    for (version, known) in [(VERSION, true), (TRACES_SINCE - 1, false)] {
        let mut bench = Bench::of(&[1, 2, 3]);
        let listener = bench.link_to(2);
        let _stream = bench.welcome_with(&listener, version);
        bench.frame(2, &Frame::BeatReply { sent_us: 1 });
        // Of the three only that one is reached.
        let layout = vec![[1, 2, 3].map(NodeId).to_vec(); usize::from(PARTITIONS)];
        let map = PlacementMap::new(1, 3, &layout).expect("a valid map");
        let map = Some(Arc::new(map));
        bench.cluster().topology = Arc::new(Topology { map, ..Topology::default() });
        let ask = Ask { trace: Some(Box::new([7; 25])), ..Ask::default() };
        bench.dispatch.execute_for(HERE, &set(), ask, waiter());
        bench.dispatch.execute_for(HERE, &set(), Ask::default(), waiter());
        bench.dispatch.send_forwards();
        let mut traces = Vec::new();
        let mut sent =
            &bench.dispatch.peers.as_mut().and_then(|peers| peers.out(2)).expect("it is up")[..];
        while let Some((frame, taken)) = decode(sent).expect("frames") {
            if let Frame::Request(request) = frame {
                traces.push(request.trace.copied());
            }
            sent = &sent[taken..];
        }
        assert_eq!(traces, [known.then_some([7; 25]), None]);
    }
}

#[test]
fn a_read_that_is_kept_has_no_more_time_when_it_is_forwarded() {
    let mut bench = Bench::of(&[1, 2, 3]);
    let patience = Some(Duration::from_secs(3600));
    let ask = Ask { patience, ..Ask::default() };
    let get = Command::Get { key: b"k".as_slice() };
    let before = Instant::now();
    let kept = bench.dispatch.keep(HERE, &get, &ask, waiter());
    let after = Instant::now();
    let decided = bench.dispatch.unwrap_kept(kept, Reply::Error(Error::NotLeader));
    assert!(decided.is_none(), "it is asked elsewhere");
    let forward = bench.cluster().forwards.take_home(HERE).pop().expect("it waits");
    let deadline = forward.ask.deadline.expect("it was kept");
    assert!(before + PATIENCE <= deadline && deadline <= after + PATIENCE);
}

#[test]
fn what_a_removed_replica_had_written_counts_nothing_for_the_next_one() {
    let mut bench = Bench::of(&[ME]);
    bench.dispatch.activate(HERE);
    bench.take_turn();
    assert!(bench.dispatch.remove(HERE).is_some(), "its first records are being synced");
    let next = ReplicaId::new(NodeId(ME), 9).get();
    let replica = replica(&bench.dispatch.shared, HERE, next, &[next]);
    bench.dispatch.insert(replica);
    bench.take_turn();
    bench.wait_for_sync();
    bench.take_turn();
    assert!(!bench.dispatch.leads(HERE), "its own records are not synced");
    bench.wait_for_sync();
    bench.take_turn();
    assert!(bench.dispatch.leads(HERE));
}

#[test]
fn what_the_disk_had_no_room_for_is_not_taken_for_synced() {
    let mut bench = Bench::of(&[1, 2, 3]);
    bench.get_stuck(HERE);
    for _ in 0..4 {
        bench.take_turn();
        assert!(!bench.turn.is_busy(&bench.dispatch), "there is nothing to sync");
    }
    bench.disk.limit_capacity(None);
    bench.now += TICK;
    bench.take_turn();
    assert!(bench.dispatch.can_write() && bench.turn.is_busy(&bench.dispatch));
    bench.settle();
}

#[test]
fn while_the_disk_is_full_requests_are_answered() {
    let mut bench = Bench::of(&[1, 2, 3]);
    let (set, get) = (set(), Command::Get { key: b"k".as_slice() });
    let ask = Ask { redirect: true, ..Ask::default() };
    bench.elect(THERE);
    bench.dispatch.execute_for(THERE, &set, ask.clone(), waiter());
    bench.take_turn();
    bench.wait_for_sync();
    bench.dispatch.execute_for(THERE, &get, ask.clone(), waiter());
    bench.get_stuck(HERE);
    bench.dispatch.execute_for(THERE, &set, ask.clone(), waiter());
    bench.take_turn();
    // The read had come before; the write waits for the one that leadership is handed to.
    assert_eq!(bench.replies(), [Reply::Error(Error::DiskFull)]);
    // Nobody answers this leader, so it finds that it is none any more. The write's time is counted from when
    // it came, by the real clock, which may be ahead of the bench's.
    for _ in 0..400 {
        bench.now += TICK;
        bench.tick();
    }
    assert!(!bench.status(THERE).serves);
    // Of the first write and of the second.
    let none = Error::NoLeader { partition: THERE.0, waited_ms: 5000 };
    assert_eq!(bench.replies(), [Reply::Error(Error::OutcomeUnknown), Reply::Error(none)]);
    let term = bench.status(THERE).term;
    bench.dispatch.execute_for(THERE, &get, ask.clone(), waiter());
    assert_eq!(bench.replies(), [Reply::Error(Error::NotLeader)]);
    for _ in 0..100 {
        bench.now += TICK;
        bench.tick();
    }
    assert_eq!(bench.status(THERE).term, term, "who can write nothing does not stand for election");
}

#[test]
fn what_is_being_handed_over_already_makes_no_work() {
    let mut bench = Bench::of(&[1, 2, 3]);
    bench.elect(THERE);
    bench.dispatch.hand_all_over();
    assert_eq!(bench.dispatch.take_active(), [THERE]);
    bench.dispatch.hand_all_over();
    assert!(bench.dispatch.active().is_empty());
}

#[test]
fn a_reply_goes_to_the_process_that_asked() {
    let mut bench = Bench::of(&[1, 2, 3]);
    let listener = bench.link_to(2);
    let reply = Reply::Integer(1);
    let request = |instance| PeerRequest { node: 2, instance, id: 1 };
    bench.dispatch.respond(request(THEIR_INSTANCE), &reply);
    bench.dispatch.respond(request(THEIR_INSTANCE - 1), &reply);
    assert_eq!(bench.cluster().unsent.len(), 2, "the link is not up yet");
    let _stream = bench.welcome(&listener);
    bench.dispatch.send_again(bench.now);
    assert!(bench.cluster().unsent.is_empty());
    bench.dispatch.respond(request(THEIR_INSTANCE + 1), &reply);
    let mut payload = Vec::new();
    encode_reply(&reply, &mut payload).expect("it fits");
    let out = bench.dispatch.peers.as_mut().and_then(|peers| peers.out(2)).expect("it is up");
    let (frame, taken) = decode(out).expect("a frame").expect("a whole one");
    assert_eq!((frame, taken), (Frame::Response { id: 1, payload: &payload }, out.len()));
}

#[test]
fn frames_about_partitions_that_do_not_exist_are_nothing() {
    let mut bench = Bench::of(&[1, 2, 3]);
    let mut get = Vec::new();
    encode_command(&Command::Get { key: b"k" }, &mut get).expect("it fits");
    for partition in [PARTITIONS, 16_383, u16::MAX] {
        let request = |stale| Request {
            id: 1,
            partition,
            deadline_ms: 0,
            stale,
            once: None,
            trace: None,
            payload: &get,
        };
        let mut vote = Vec::new();
        let message = RaftMessage { from: id(2), to: id(1), term: 1, ..RaftMessage::default() };
        encode_message(&message, &mut vote);
        for frame in [
            Frame::Raft { partition, bytes: &vote },
            Frame::Sleep { partition, term: 1, index: 1 },
            Frame::Asleep { partition, term: 1 },
            Frame::Wake { partition, term: 1 },
            Frame::Gone { partition, replica: id(ME) },
            Frame::Request(request(false)),
            Frame::Request(request(true)),
            Frame::Response { id: u64::from(partition) << 40, payload: &[] },
        ] {
            bench.frame(2, &frame);
        }
    }
    assert!(bench.cluster().to_remove.is_empty() && bench.dispatch.active().is_empty());
    bench.frame(2, &Frame::Gone { partition: 1, replica: id(ME) });
    assert_eq!(bench.cluster().to_remove, [PartitionId(1)], "a partition that does exist");
}

#[test]
fn a_replica_without_a_place_asks_every_node_whether_it_can_go() {
    let mut bench = Bench::of(&[1, 2, 3]);
    // Node 4 leads, which neither the replica knows, nor the map names: it is to hand over to the new one.
    let placed = [NodeId(2), NodeId(3), NodeId(ME)].to_vec();
    let layout = vec![placed; usize::from(PARTITIONS)];
    let mut map = PlacementMap::new(1, 3, &layout).expect("a valid map");
    let topology = |map: &PlacementMap| Topology {
        members: (1..=4).map(|node| (NodeId(node), member(node))).collect(),
        map: Some(Arc::new(map.clone())),
        ..Topology::default()
    };
    bench.cluster().topology = Arc::new(topology(&map));
    let questions = bench.dispatch.questions(HERE);
    let asked: Vec<u32> =
        questions.iter().map(|message| ReplicaId::from_u64(message.to).node().0).collect();
    assert_eq!(asked, [2, 3, 4]);
    assert!(questions.iter().all(|message| message.from == id(ME) && message.index > 0));
    // One that has its place asks nothing.
    map.targets[usize::from(HERE.0)] = [1, 2, 3].map(|node| ReplicaId::from_u64(id(node))).to_vec();
    bench.cluster().topology = Arc::new(topology(&map));
    assert!(bench.dispatch.questions(HERE).is_empty());
}

fn member(node: u32) -> Member {
    let address = "127.0.0.1:1".parse().expect("an address");
    let registration = Registration {
        node: NodeId(node),
        cluster: String::new(),
        cluster_id: Some(1),
        instance: 1,
        started_ms: 0,
        data_addr: address,
        peer_addr: address,
        grpc_addr: address,
        admin_addr: address,
        zone: String::new(),
        version: String::new(),
        replaces: None,
        timing: None,
    };
    Member { registration, alive: true, away_since: None }
}
