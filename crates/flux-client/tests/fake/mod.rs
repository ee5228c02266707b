//! A node as the native protocol shows it: a map behind a socket, with faults on demand.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use flux_proto::Code;
use flux_proto::native::*;
use flux_proto::trace::TraceContext;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// What the node does with a request.
#[allow(dead_code)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// Carries it out and answers.
    Serve,
    /// Refuses it.
    Refuse(Code),
    /// Carries it out and closes the connection without an answer.
    Break,
    /// Never answers.
    Hang,
    /// Says that the connection ends, and closes it.
    Part(Code),
    /// Answers something that no operation answers.
    Babble,
}

type Script = Box<dyn FnMut(usize, &Request<'_>) -> Act + Send>;

#[derive(Clone)]
pub struct Entry {
    pub value: Vec<u8>,
    pub version: u64,
    pub expiry: Expiry,
}

/// What is stored, and what was asked.
#[derive(Default)]
pub struct State {
    pub entries: HashMap<Vec<u8>, Entry>,
    pub revision: u64,
    requests: usize,
    connections: usize,
    stale: usize,
    traces: Vec<Option<TraceContext>>,
    password: Option<Vec<u8>>,
}

/// Stops when it is dropped.
pub struct Fake {
    pub addr: SocketAddr,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[allow(dead_code)]
impl Fake {
    /// A node that serves everything.
    pub async fn start() -> Fake {
        Fake::with_script(|_, _| Act::Serve).await
    }

    /// A node that asks, for each request and its number from 0, what to do.
    pub async fn with_script(
        script: impl FnMut(usize, &Request<'_>) -> Act + Send + 'static,
    ) -> Fake {
        Fake::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), script)
    }

    pub fn on(
        listener: TcpListener,
        script: impl FnMut(usize, &Request<'_>) -> Act + Send + 'static,
    ) -> Fake {
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        let accepted = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                accepted.lock().unwrap().connections += 1;
                connections.spawn(serve(stream, Arc::clone(&accepted), Arc::clone(&script)));
            }
        });
        Fake { addr, state, task }
    }

    /// Stops the node and waits until its port is free.
    pub async fn stop(mut self) -> SocketAddr {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.addr
    }

    pub fn require_password(&self, password: &str) {
        self.state.lock().unwrap().password = Some(password.as_bytes().to_vec());
    }

    pub fn requests(&self) -> usize {
        self.state.lock().unwrap().requests
    }

    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    pub fn stale_reads(&self) -> usize {
        self.state.lock().unwrap().stale
    }

    /// The traces of the writes since the last time.
    pub fn traces(&self) -> Vec<Option<TraceContext>> {
        std::mem::take(&mut self.state.lock().unwrap().traces)
    }

    pub fn entry(&self, key: &[u8]) -> Option<Entry> {
        self.state.lock().unwrap().entries.get(key).cloned()
    }

    pub fn len(&self) -> usize {
        self.state.lock().unwrap().entries.len()
    }

    pub fn put(&self, key: &[u8], value: &[u8]) {
        self.state.lock().unwrap().set(key, value, Expiry::Never);
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>, script: Arc<Mutex<Script>>) {
    let mut input = Vec::new();
    let mut output = Vec::new();
    loop {
        match decode_preface(&input) {
            Ok(Some((preface, taken))) => {
                input.drain(..taken);
                let hello = match preface.choose_version() {
                    Some(_) => ServerPreface::Accepted(Accepted {
                        flags: preface.flags & feature::TRACES,
                        ..Accepted::new("fake", 16)
                    }),
                    None => ServerPreface::VERSION_MISMATCH,
                };
                encode_server_preface(&mut output, &hello);
                break;
            }
            Ok(None) => {}
            Err(_) => return,
        }
        if !matches!(stream.read_buf(&mut input).await, Ok(1..)) {
            return;
        }
    }
    loop {
        let goes_on = loop {
            match decode_request(&input) {
                Ok(Some((frame, taken))) => {
                    if !answer(&frame, &state, &script, &mut output) {
                        break false;
                    }
                    input.drain(..taken);
                }
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        if stream.write_all(&output).await.is_err() || !goes_on {
            return;
        }
        output.clear();
        if !matches!(stream.read_buf(&mut input).await, Ok(1..)) {
            return;
        }
    }
}

/// Whether the connection goes on.
fn answer(
    frame: &Frame<'_>,
    state: &Mutex<State>,
    script: &Mutex<Script>,
    output: &mut Vec<u8>,
) -> bool {
    let header = frame.header;
    let request = frame.request().unwrap();
    let mut state = state.lock().unwrap();
    if request.opcode().is_write() {
        state.traces.push(header.trace);
    } else {
        assert_eq!(header.trace, None, "a read has no use for a trace");
    }
    if let Request::Auth { password, .. } = request {
        if state.password.as_deref() == Some(password) {
            encode_response(output, header.id, Opcode::Auth, &Response::Authenticated).unwrap();
        } else {
            encode_error(output, header.id, header.opcode, Code::Unauthenticated, "wrong password");
        }
        return true;
    }
    assert!(header.deadline_ms > 0, "every request has a deadline");
    // Clients ask this by themselves: it is not counted, and always answered.
    if let Request::Info = request {
        state.carry_out(header.id, &request, output);
        return true;
    }
    let number = state.requests;
    state.requests += 1;
    state.stale += usize::from(header.is_stale());
    let act = script.lock().unwrap()(number, &request);
    match act {
        Act::Serve => state.carry_out(header.id, &request, output),
        Act::Refuse(code) => encode_error(output, header.id, header.opcode, code, "refused"),
        Act::Break => {
            state.carry_out(header.id, &request, &mut Vec::new());
            return false;
        }
        Act::Hang => {}
        Act::Part(code) => {
            encode_error(output, 0, 0, code, "goodbye");
            return false;
        }
        Act::Babble => {
            let nonsense = Response::Pong { payload: b"?" };
            encode_response(output, header.id, request.opcode(), &nonsense).unwrap();
        }
    }
    true
}

impl State {
    fn set(&mut self, key: &[u8], value: &[u8], expiry: Expiry) -> u64 {
        self.revision += 1;
        let entry = Entry { value: value.to_vec(), version: self.revision, expiry };
        self.entries.insert(key.to_vec(), entry);
        self.revision
    }

    fn value(&self, key: &[u8]) -> Option<Value<'_>> {
        self.entries.get(key).map(value_of)
    }

    fn increment(&mut self, key: &[u8], delta: i64) -> (i64, u64) {
        let old = self.entries.get(key).map(|entry| entry.value.clone());
        let text = String::from_utf8(old.unwrap_or_else(|| b"0".to_vec())).unwrap();
        let sum = text.parse::<i64>().unwrap() + delta;
        (sum, self.set(key, sum.to_string().as_bytes(), Expiry::Never))
    }

    pub fn carry_out(&mut self, id: u64, request: &Request<'_>, output: &mut Vec<u8>) {
        let opcode = request.opcode();
        let previous;
        let response = match request {
            Request::Ping { payload } => Response::Pong { payload },
            Request::Auth { .. } => Response::Authenticated,
            Request::Info => Response::Info(Info {
                node: "fake",
                server_version: "0.0.0",
                members: vec![Member { name: "fake", data_addr: "127.0.0.1:1", zone: "" }],
                leaders: vec![Some(0); 16],
                epoch: 0,
                replicas: Vec::new(),
            }),
            Request::Get { key } => Response::Value(self.value(key)),
            Request::Set { key, value, expiry, condition, return_previous } => {
                previous = self.entries.get(*key).cloned();
                let written = holds(previous.as_ref(), *condition);
                let version = match written {
                    true => self.set(key, value, *expiry),
                    false => version_of(previous.as_ref()),
                };
                let previous = previous.as_ref().filter(|_| *return_previous).map(value_of);
                Response::Set(SetReply { written, version: Some(version), previous })
            }
            Request::Delete { key, condition } => Response::Deleted(self.delete(key, *condition)),
            Request::Increment { key, delta } => {
                let (value, version) = self.increment(key, *delta);
                Response::Counter { value, version }
            }
            Request::Expire { key, expiry } => {
                let entry = self.entries.get_mut(*key);
                Response::Changed(entry.map(|entry| entry.expiry = *expiry).is_some())
            }
            Request::Persist { key } => {
                let had = |entry: &mut Entry| std::mem::take(&mut entry.expiry) != Expiry::Never;
                Response::Changed(self.entries.get_mut(*key).is_some_and(had))
            }
            Request::BatchGet { keys } => {
                Response::Values(keys.iter().map(|key| self.value(key)).collect())
            }
            Request::BatchWrite { guards, writes } => {
                let holds = guards.iter().all(|guard| {
                    holds(self.entries.get(guard.key), Condition::IfVersion(guard.version))
                });
                Response::Batch(match holds {
                    true => BatchReply::Written(self.write_all(writes)),
                    false => BatchReply::NotWritten { position: None },
                })
            }
            Request::Scan { prefix, cursor, limit, keys_only, .. } => {
                Response::Page(self.page(prefix, cursor, *limit as usize, *keys_only))
            }
        };
        encode_response(output, id, opcode, &response).unwrap();
    }

    fn delete(&mut self, key: &[u8], condition: Condition) -> DeleteReply {
        let entry = self.entries.get(key);
        if !holds(entry, condition) {
            DeleteReply::Conflict(version_of(entry))
        } else if self.entries.remove(key).is_some() {
            DeleteReply::Deleted
        } else {
            DeleteReply::Absent
        }
    }

    /// The keys behind the cursor, in order.
    fn page(&self, prefix: &[u8], cursor: &[u8], limit: usize, keys_only: bool) -> Page<'_> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(key, _)| *key);
        let mut items = entries
            .into_iter()
            .filter(|(key, _)| key.starts_with(prefix) && key.as_slice() > cursor)
            .map(|(key, entry)| Item { key, value: value_of(entry) });
        let mut page: Vec<_> = items.by_ref().take(limit).collect();
        let more = items.next().is_some();
        let cursor = page.last().filter(|_| more).map_or(&b""[..], |item| item.key);
        for item in page.iter_mut().filter(|_| keys_only) {
            item.value.bytes = b"";
        }
        Page { cursor, items: page }
    }

    fn write_all(&mut self, writes: &[Write<'_>]) -> Vec<WriteResult> {
        let mut results = Vec::new();
        for write in writes {
            results.push(match *write {
                Write::Set { key, value, expiry, .. } => {
                    WriteResult::Set { version: self.set(key, value, expiry) }
                }
                Write::Delete { key, .. } => {
                    WriteResult::Delete { deleted: self.entries.remove(key).is_some() }
                }
                Write::Increment { key, delta } => {
                    let (value, version) = self.increment(key, delta);
                    WriteResult::Increment { value, version }
                }
            });
        }
        results
    }
}

fn value_of(entry: &Entry) -> Value<'_> {
    let expires_at_ms = match entry.expiry {
        Expiry::Never | Expiry::Keep => None,
        Expiry::In(ms) | Expiry::At(ms) => Some(ms),
    };
    Value { bytes: &entry.value, version: entry.version, expires_at_ms }
}

fn version_of(entry: Option<&Entry>) -> u64 {
    entry.map_or(0, |entry| entry.version)
}

fn holds(entry: Option<&Entry>, condition: Condition) -> bool {
    match condition {
        Condition::Always => true,
        Condition::IfAbsent => entry.is_none(),
        Condition::IfPresent => entry.is_some(),
        Condition::IfVersion(version) => version_of(entry) == version,
    }
}
