//! A cluster as the native protocol shows it: nodes over pipes in memory, one table behind all of them,
//! and leaders, faults and answers to INFO as a test wants them.

#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use flux_client::{Client, Config, Dial, Dialing, ReadHalf, WriteHalf};
use flux_proto::Code;
use flux_proto::native::*;
use flux_proto::trace::TraceContext;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::task::AbortHandle;

use crate::fake::State;

pub const PARTITIONS: u16 = 8;

/// What a node does with requests other than INFO, which has a mood of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Serve,
    /// Reads and says nothing, INFO included.
    Hang,
    /// Carries so many out, and breaks the connection instead of an answer.
    LoseAnswers(usize),
    /// Refuses everything.
    Refuse(Code),
}

/// What a node answers to INFO.
#[derive(Clone, Debug)]
pub enum Tale {
    /// What is so.
    Truth,
    /// What was so when this was noted.
    Old(Box<View>),
    /// These bytes, as the body.
    Bytes(Vec<u8>),
}

/// Who is there and who leads.
#[derive(Clone, Debug)]
pub struct View {
    pub epoch: u64,
    pub members: Vec<String>,
    pub leaders: Vec<Option<String>>,
    pub replicas: Vec<Vec<String>>,
}

pub struct Peer {
    pub mood: Mood,
    pub tale: Tale,
    pub features: u16,
    pub age_ms: u64,
    is_up: bool,
    /// Whether clients get through to it; other nodes do.
    is_reachable: bool,
    connections: Vec<AbortHandle>,
}

/// A request that a node got.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub node: String,
    pub opcode: Opcode,
    pub session: Option<Session>,
    pub trace: Option<TraceContext>,
    pub stale: bool,
    pub redirect: bool,
    pub keys: Vec<Vec<u8>>,
}

pub struct World {
    pub table: State,
    pub view: View,
    pub nodes: BTreeMap<String, Peer>,
    /// Whether `NOT_LEADER` says who leads.
    pub hints: bool,
    pub seen: Vec<Seen>,
    pub infos: usize,
    pub not_leader: usize,
    pub passed_on: usize,
    answers: HashMap<(u64, u64), Vec<u8>>,
    acked: HashMap<(u64, u16), u64>,
}

#[derive(Clone)]
pub struct Cluster(Arc<Mutex<World>>);

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cluster")
    }
}

impl Cluster {
    /// Nodes `a:1`, `b:1` and so on; each partition has replicas on all, and they lead in turn.
    pub fn new(names: &[&str]) -> Cluster {
        let members: Vec<String> = names.iter().map(|name| format!("{name}:1")).collect();
        let leader = |partition: u16| members[usize::from(partition) % members.len()].clone();
        let view = View {
            epoch: 1,
            leaders: (0..PARTITIONS).map(|partition| Some(leader(partition))).collect(),
            replicas: vec![members.clone(); usize::from(PARTITIONS)],
            members: members.clone(),
        };
        let nodes = members.into_iter().map(|addr| (addr, Peer::new())).collect();
        let world = World {
            table: State::default(),
            view,
            nodes,
            hints: true,
            seen: Vec::new(),
            infos: 0,
            not_leader: 0,
            passed_on: 0,
            answers: HashMap::new(),
            acked: HashMap::new(),
        };
        Cluster(Arc::new(Mutex::new(world)))
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    pub fn config(&self) -> Config {
        Config { connections_per_endpoint: 1, ..Config::new(["a:1"]) }
    }

    pub async fn client(&self, config: Config) -> Client {
        let client = Client::with_dial(config, Arc::new(self.clone())).unwrap();
        client.ready().await.unwrap();
        client
    }

    /// As if its process were killed.
    pub fn kill(&self, addr: &str) {
        let mut world = self.world();
        let node = world.nodes.get_mut(addr).unwrap();
        node.is_up = false;
        node.connections.drain(..).for_each(|connection| connection.abort());
    }

    pub fn start(&self, addr: &str) {
        let mut world = self.world();
        let node = world.nodes.entry(addr.to_owned()).or_insert_with(Peer::new);
        (node.is_up, node.mood) = (true, Mood::Serve);
    }

    /// Clients get through to the node no more; it goes on serving.
    pub fn cut_off(&self, addr: &str) {
        let mut world = self.world();
        let node = world.nodes.get_mut(addr).unwrap();
        node.is_reachable = false;
        node.connections.drain(..).for_each(|connection| connection.abort());
    }

    pub fn mood(&self, addr: &str, mood: Mood) {
        self.world().nodes.get_mut(addr).unwrap().mood = mood;
    }

    pub fn tale(&self, addr: &str, tale: Tale) {
        self.world().nodes.get_mut(addr).unwrap().tale = tale;
    }

    /// Makes a node the leader of the partition of `key`, or nobody.
    pub fn lead(&self, key: &[u8], addr: Option<&str>) {
        self.world().view.leaders[usize::from(partition_of(key))] = addr.map(str::to_owned);
    }

    /// Makes a node the leader of everything that another one leads.
    pub fn succeed(&self, from: &str, to: Option<&str>) {
        for leader in &mut self.world().view.leaders {
            if leader.as_deref() == Some(from) {
                *leader = to.map(str::to_owned);
            }
        }
    }

    pub fn leader(&self, key: &[u8]) -> Option<String> {
        self.world().view.leaders[usize::from(partition_of(key))].clone()
    }

    /// The nodes that got requests since the last time, in order.
    pub fn asked(&self) -> Vec<String> {
        self.world().seen.drain(..).map(|seen| seen.node).collect()
    }

    pub fn connections(&self, addr: &str) -> usize {
        let world = self.world();
        world.nodes[addr].connections.iter().filter(|task| !task.is_finished()).count()
    }

    /// A key whose partition this node leads.
    pub fn key_of(&self, addr: &str) -> Vec<u8> {
        let mut keys = (0..).map(|number| format!("key-{number}").into_bytes());
        keys.find(|key| self.leader(key).as_deref() == Some(addr)).unwrap()
    }
}

impl Dial for Cluster {
    fn dial(&self, addr: &str) -> Dialing {
        let (cluster, addr) = (self.clone(), addr.to_owned());
        Box::pin(async move {
            let mut world = cluster.world();
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let node = world.nodes.get_mut(&addr).ok_or_else(refused)?;
            if !node.is_up || !node.is_reachable {
                return Err(refused());
            }
            let (near, far) = duplex(1 << 20);
            let task = tokio::spawn(serve(far, cluster.clone(), addr));
            node.connections.retain(|task| !task.is_finished());
            node.connections.push(task.abort_handle());
            let (reader, writer) = split(near);
            Ok((Box::new(reader) as ReadHalf, Box::new(writer) as WriteHalf))
        })
    }
}

async fn serve(mut stream: DuplexStream, cluster: Cluster, addr: String) {
    let mut input = Vec::new();
    let mut output = Vec::new();
    let mut is_greeted = false;
    loop {
        loop {
            let taken = if is_greeted {
                let Some((frame, taken)) = decode_request(&input).unwrap() else {
                    break;
                };
                if !cluster.world().answer(&addr, &frame, &mut output) {
                    return;
                }
                taken
            } else {
                let Some((preface, taken)) = decode_preface(&input).unwrap() else {
                    break;
                };
                let features = cluster.world().nodes[&addr].features;
                let accepted = Accepted::new(&addr, PARTITIONS);
                let accepted = Accepted { flags: features & preface.flags, ..accepted };
                encode_server_preface(&mut output, &ServerPreface::Accepted(accepted));
                is_greeted = true;
                taken
            };
            input.drain(..taken);
        }
        if stream.write_all(&output).await.is_err() {
            return;
        }
        output.clear();
        if !matches!(stream.read_buf(&mut input).await, Ok(1..)) {
            return;
        }
    }
}

impl Peer {
    fn new() -> Peer {
        Peer {
            mood: Mood::Serve,
            tale: Tale::Truth,
            features: feature::ALL,
            age_ms: 0,
            is_up: true,
            is_reachable: true,
            connections: Vec::new(),
        }
    }
}

impl World {
    /// Whether the connection goes on.
    fn answer(&mut self, addr: &str, frame: &Frame<'_>, output: &mut Vec<u8>) -> bool {
        let request = frame.request().unwrap();
        let header = frame.header;
        assert!(header.deadline_ms > 0, "every request has a deadline");
        if request == Request::Info {
            self.infos += 1;
            if self.nodes[addr].mood != Mood::Hang {
                self.info(addr, header.id, output);
            }
            return true;
        }
        let keys = keys_of(&request);
        self.seen.push(Seen {
            node: addr.to_owned(),
            opcode: request.opcode(),
            session: header.session,
            trace: header.trace,
            stale: header.is_stale(),
            redirect: header.wants_redirect(),
            keys: keys.iter().map(|key| key.to_vec()).collect(),
        });
        match self.nodes[addr].mood {
            Mood::Hang => return true,
            Mood::Refuse(code) => {
                encode_error(output, header.id, header.opcode, code, "refused");
                return true;
            }
            Mood::Serve | Mood::LoseAnswers(_) => {}
        }
        let mut partitions: Vec<u16> = keys.iter().map(|key| partition_of(key)).collect();
        if let Request::Scan { partition: Some(partition), .. } = request {
            partitions.push(partition);
        }
        if !self.is_served_here(addr, &header, &partitions, output) {
            return true;
        }
        let answer = self.carry_out(frame, &request, partitions.first().copied(), addr);
        if let Mood::LoseAnswers(count @ 1..) = self.nodes[addr].mood {
            let left = if count == 1 { Mood::Serve } else { Mood::LoseAnswers(count - 1) };
            self.nodes.get_mut(addr).unwrap().mood = left;
            return false;
        }
        output.extend_from_slice(&answer);
        true
    }

    /// Whether the node is the one to answer; if not, it has said so.
    fn is_served_here(
        &mut self,
        addr: &str,
        header: &RequestHeader,
        partitions: &[u16],
        output: &mut Vec<u8>,
    ) -> bool {
        if header.is_stale() {
            for &partition in partitions {
                let replicas = &self.view.replicas[usize::from(partition)];
                assert!(replicas.iter().any(|replica| replica == addr), "a replica is asked");
            }
            return true;
        }
        let leader = |partition: u16| self.view.leaders[usize::from(partition)].clone();
        let other = partitions.iter().find(|&&part| leader(part).as_deref() != Some(addr));
        let Some(&partition) = other else {
            return true;
        };
        let leader = leader(partition);
        let (id, opcode) = (header.id, header.opcode);
        if !header.wants_redirect() {
            self.passed_on += 1;
            let is_up = leader.is_some_and(|leader| self.nodes[&leader].is_up);
            if !is_up {
                encode_error(output, id, opcode, Code::Unavailable, "its leader is away");
            }
            return is_up;
        }
        self.not_leader += 1;
        if self.hints {
            let leader_addr = leader.as_deref().unwrap_or_default();
            let hint = LeaderHint { partition, leader_addr };
            encode_not_leader(output, id, opcode, "not here", &hint);
        } else {
            encode_error(output, id, opcode, Code::NotLeader, "not here");
        }
        false
    }

    fn carry_out(
        &mut self,
        frame: &Frame<'_>,
        request: &Request<'_>,
        partition: Option<u16>,
        addr: &str,
    ) -> Vec<u8> {
        let id = frame.header.id;
        let mut answer = Vec::new();
        if let Request::Scan { partition: Some(partition), .. } = *request {
            let mut part = State::default();
            let entries = self.table.entries.iter();
            let entries = entries.filter(|(key, _)| partition_of(key) == partition);
            part.entries = entries.map(|(key, entry)| (key.clone(), entry.clone())).collect();
            part.carry_out(id, request, &mut answer);
            return answer;
        }
        let Some(session) = frame.header.session else {
            self.table.carry_out(id, request, &mut answer);
            if frame.header.wants_position() {
                let (frame, _) = decode_response(&answer).unwrap().unwrap();
                let response = frame.response().unwrap().unwrap();
                let (revision, age_ms) = (self.table.revision, self.nodes[addr].age_ms);
                let position = Some(StalePosition { revision, age_ms });
                let mut aged = Vec::new();
                let opcode = request.opcode();
                encode_response_at(&mut aged, id, opcode, &response, position).unwrap();
                return aged;
            }
            return answer;
        };
        let lane = (session.id, partition.unwrap());
        let acked = self.acked.entry(lane).or_default();
        *acked = (*acked).max(session.acked_below);
        let number = (session.id, session.sequence);
        if session.sequence < *acked {
            let opcode = frame.header.opcode;
            encode_error(&mut answer, id, opcode, Code::OutcomeUnknown, "forgotten");
        } else if let Some(first) = self.answers.get(&number) {
            answer.extend_from_slice(first);
            answer[4..12].copy_from_slice(&id.to_le_bytes());
        } else {
            self.table.carry_out(id, request, &mut answer);
            self.answers.insert(number, answer.clone());
        }
        answer
    }

    fn info(&self, addr: &str, id: u64, output: &mut Vec<u8>) {
        let view = match &self.nodes[addr].tale {
            Tale::Truth => &self.view,
            Tale::Old(view) => view,
            Tale::Bytes(bytes) => {
                encode_response(output, id, Opcode::Ping, &Response::Pong { payload: bytes })
                    .unwrap();
                let opcode_at = output.len() - bytes.len() - 2;
                output[opcode_at] = Opcode::Info as u8;
                return;
            }
        };
        encode_response(output, id, Opcode::Info, &Response::Info(view.info())).unwrap();
    }
}

impl View {
    pub fn info(&self) -> Info<'_> {
        let position = |addr: &String| {
            let position = self.members.iter().position(|member| member == addr)?;
            Some(position as u16)
        };
        let places = |replicas: &Vec<String>| replicas.iter().filter_map(position).collect();
        let member = |addr| Member { name: addr, data_addr: addr, zone: "z" };
        Info {
            node: "fake",
            server_version: "0",
            members: self.members.iter().map(|addr| member(addr.as_str())).collect(),
            leaders: self.leaders.iter().map(|leader| position(leader.as_ref()?)).collect(),
            epoch: self.epoch,
            replicas: self.replicas.iter().map(places).collect(),
        }
    }
}

fn keys_of<'a>(request: &Request<'a>) -> Vec<&'a [u8]> {
    match request {
        Request::Get { key }
        | Request::Set { key, .. }
        | Request::Delete { key, .. }
        | Request::Increment { key, .. }
        | Request::Expire { key, .. }
        | Request::Persist { key } => vec![key],
        Request::BatchGet { keys } => keys.clone(),
        Request::BatchWrite { writes, .. } => writes
            .iter()
            .map(|write| match *write {
                Write::Set { key, .. }
                | Write::Delete { key, .. }
                | Write::Increment { key, .. } => key,
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// As docs/protocol.md says: CRC16/XMODEM of the hash tag, modulo 16384, times the partitions. Bit by
/// bit, so that it owes nothing to the client's table. The keys of these tests have no hash tag.
pub fn partition_of(key: &[u8]) -> u16 {
    let crc = key.iter().fold(0_u16, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
        })
    });
    (u32::from(crc % 16384) * u32::from(PARTITIONS) / 16384) as u16
}
