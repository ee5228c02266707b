//! Serving a connection: read, parse, plan, and answer in the order of the requests.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use flux_core::Command;
use flux_proto::native as wire;
use flux_proto::resp::{Args, Limits, Parsed, ProtocolError, RequestParser, write};
use parking_lot::Mutex;

use super::request::Request;
use super::{READ_BYTES, STRETCH, Worker};
use crate::connection::{Gathering, Protocol, Render, Resp, WalkRender};
use crate::mailbox::Ask;
use crate::native;
use crate::resp::{self, NodeView, Plan, RunningSettings, Session};
use crate::shared::{Client, Shared};

/// How far a connection's input was consumed.
struct Consumed {
    bytes: usize,
    /// The connection ends when its output is sent.
    end: bool,
    /// It ends because where the next request starts is not known.
    lost: bool,
}

impl Worker {
    /// Serves every listed connection once. One that has more to do is listed again.
    pub(super) fn serve_listed(&mut self, now: Instant) {
        let mut listed = std::mem::take(&mut self.listed);
        for key in listed.drain(..) {
            let Some(connection) = self.connections.get_mut(key) else { continue };
            connection.listed = false;
            if let Err(error) = self.serve(key, now) {
                tracing::debug!(%error, "connection lost");
                self.close(key);
            }
        }
        // Connections that were listed meanwhile are for the next round.
        listed.append(&mut self.listed);
        self.listed = listed;
    }

    fn serve(&mut self, key: usize, now: Instant) -> io::Result<()> {
        let connection = &mut self.connections[key];
        if connection.paused() || connection.closing {
            return Ok(());
        }
        connection.last_active = now;
        let mut input = std::mem::take(&mut connection.input);
        if !input.is_empty() {
            let consumed = self.consume(key, &input);
            input.drain(..consumed);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.receive_more(key, &mut input, &mut scratch);
        self.scratch = scratch;
        let connection = &mut self.connections[key];
        connection.input = input;
        if connection.input.is_empty() && connection.input.capacity() > READ_BYTES {
            connection.input = Vec::new();
        }
        self.list_for_flush(key);
        result
    }

    /// Reads once from the socket and consumes what came.
    fn receive_more(
        &mut self,
        key: usize,
        input: &mut Vec<u8>,
        scratch: &mut [u8],
    ) -> io::Result<()> {
        let connection = &mut self.connections[key];
        // A step that ended early has left input to be consumed before more is read.
        let yielded = connection.listed && !input.is_empty();
        if !connection.readable || connection.paused() || connection.closing || yielded {
            return Ok(());
        }
        let count = match connection.stream.read(scratch) {
            Ok(0) => return self.end_of_input(key),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connection.readable = false;
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.list(key);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.shared.stats.input_bytes.add(count as u64);
        self.dispatch.look_at_monotonic_clock();
        // A read that did not fill the buffer has emptied the socket; more will be announced. The end
        // may have been announced already, together with these bytes.
        if count < scratch.len() && !connection.ended {
            connection.readable = false;
        } else {
            self.list(key);
        }
        let received = &scratch[..count];
        if input.is_empty() {
            let consumed = self.consume(key, received);
            input.extend_from_slice(&received[consumed..]);
        } else {
            input.extend_from_slice(received);
            let consumed = self.consume(key, input);
            input.drain(..consumed);
        }
        Ok(())
    }

    /// The client sends no more: what it has sent is still answered.
    fn end_of_input(&mut self, key: usize) -> io::Result<()> {
        let connection = &mut self.connections[key];
        connection.readable = false;
        connection.closing = true;
        for (wake, origin) in &mut self.sleepers {
            if origin.connection as usize == key {
                *wake = Instant::now();
            }
        }
        if connection.slots.is_empty() && connection.unsent() == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    pub(super) fn list(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.listed {
            connection.listed = true;
            self.listed.push(key);
        }
    }

    pub(super) fn list_for_flush(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.unflushed {
            connection.unflushed = true;
            self.unflushed.push(key);
        }
    }

    /// Consumes whole requests; returns how many bytes they took.
    fn consume(&mut self, key: usize, input: &[u8]) -> usize {
        let mut start = 0;
        if matches!(self.connections[key].protocol, Protocol::Unknown) {
            match self.greet(key, input) {
                Some(bytes) => start = bytes,
                None => return 0,
            }
            if self.connections[key].closing {
                return input.len();
            }
        }
        let protocol = &mut self.connections[key].protocol;
        let consumed = match std::mem::replace(protocol, Protocol::Unknown) {
            Protocol::Resp(mut resp) => {
                let consumed = self.consume_resp(key, &mut resp, &input[start..]);
                self.connections[key].protocol = Protocol::Resp(resp);
                consumed
            }
            Protocol::Native => {
                self.connections[key].protocol = Protocol::Native;
                self.consume_native(key, &input[start..])
            }
            Protocol::Unknown => Consumed { bytes: 0, end: true, lost: false },
        };
        self.shared.stats.protocol_errors.add(u64::from(consumed.lost));
        if consumed.end || consumed.lost {
            self.connections[key].closing = true;
            return input.len();
        }
        start + consumed.bytes
    }

    /// Tells the protocol by the first byte. Returns the bytes of a preface; `None` while it is
    /// incomplete, or when the connection ends.
    fn greet(&mut self, key: usize, input: &[u8]) -> Option<usize> {
        let connection = &mut self.connections[key];
        if !wire::is_native(*input.first()?) {
            let address = |address: io::Result<std::net::SocketAddr>| {
                address.map_or_else(|_| "?:0".to_owned(), |address| address.to_string())
            };
            let (peer, local) =
                (address(connection.stream.peer_addr()), address(connection.stream.local_addr()));
            let session = Session::new(connection.id, peer, local, self.dispatch.now.ms);
            let session = Arc::new(Mutex::new(session));
            let client = Client { worker: self.id, session: Arc::clone(&session) };
            self.shared.clients.lock().insert(connection.id, client);
            let parser = RequestParser::new(Limits::default());
            connection.protocol = Protocol::Resp(Box::new(Resp { parser, session }));
            return Some(0);
        }
        match wire::decode_preface(input) {
            Ok(None) => None,
            Ok(Some((preface, bytes))) => {
                connection.protocol = Protocol::Native;
                if !native::accept(&preface, &self.shared, &mut connection.output) {
                    connection.closing = true;
                }
                Some(bytes)
            }
            Err(error) => {
                let message = error.to_string();
                wire::encode_server_preface(
                    &mut connection.output,
                    &wire::ServerPreface::Refused {
                        code: flux_proto::Code::Malformed.number(),
                        message: &message,
                    },
                );
                connection.closing = true;
                None
            }
        }
    }

    fn consume_resp(&mut self, key: usize, resp: &mut Resp, input: &[u8]) -> Consumed {
        let shared = &self.shared;
        let route = |slot| shared.route(slot);
        let redirects = shared.settings.resp_redirect && shared.cluster.is_some();
        let view = NodeView {
            partitions: shared.partitions,
            now_us: self.dispatch.unix_us,
            settings: &|| running_settings(shared),
            cluster: &|| shared.cluster_view(),
            redirect: redirects.then_some(&route),
        };
        let mut consumed = Consumed { bytes: 0, end: false, lost: false };
        let mut pace = Pace::begin();
        let mut session = resp.session.lock();
        let connection = &mut self.connections[key];
        while !consumed.end && consumed.bytes < input.len() && !connection.paused() {
            let rest = &input[consumed.bytes..];
            let bytes = match resp.parser.parse(rest) {
                Ok(Parsed::Command { consumed }) => consumed,
                Ok(Parsed::Incomplete { .. }) => break,
                Err(error) => {
                    connection.answer(error_text(&error));
                    consumed.lost = true;
                    break;
                }
            };
            let args = resp.parser.args(rest);
            if is_http(args) {
                consumed.lost = true;
                break;
            }
            let mut text = Vec::new();
            let direct = connection.slots.is_empty();
            let out = if direct { &mut connection.output } else { &mut text };
            let plan = resp::plan(args, &mut session, &view, out);
            let ask = Ask { stale: session.reads_stale(), ..Ask::default() };
            let mut request = Request { connection, dispatch: &mut self.dispatch, key, ask };
            if request.must_wait(&plan) {
                // It stays in the input until the earlier requests are answered.
                connection.barrier = true;
                break;
            }
            consumed.bytes += bytes;
            pace.count(is_heavy(&plan));
            if let Plan::Node(command) = plan {
                drop(session);
                if !self.run_node_command(key, command, &resp.session) {
                    consumed.bytes -= bytes;
                    pace.commands -= 1;
                }
                self.shared.stats.commands.add(pace.commands);
                // It may have been long: the rest of the input has its turn in the next round.
                self.list(key);
                return consumed;
            }
            consumed.end = request.carry_out(plan, text, &mut session);
            if pace.is_late() {
                break;
            }
        }
        drop(session);
        self.shared.stats.commands.add(pace.commands);
        if pace.late {
            self.list(key);
        }
        consumed
    }

    fn consume_native(&mut self, key: usize, input: &[u8]) -> Consumed {
        let mut consumed = Consumed { bytes: 0, end: false, lost: false };
        let mut pace = Pace::begin();
        let connection = &mut self.connections[key];
        while consumed.bytes < input.len() && !connection.paused() {
            let (frame, bytes) = match wire::decode_request(&input[consumed.bytes..]) {
                Ok(Some(decoded)) => decoded,
                Ok(None) => break,
                Err(error) => {
                    let mut text = Vec::new();
                    wire::encode_error(&mut text, 0, 0, error.code(), &error.to_string());
                    connection.answer(text);
                    consumed.lost = true;
                    break;
                }
            };
            let mut text = Vec::new();
            let direct = connection.slots.is_empty();
            let out = if direct { &mut connection.output } else { &mut text };
            let mut plan = native::plan(&frame, &self.shared, self.dispatch.now, out);
            let ask = plan.take_ask();
            let mut request = Request { connection, dispatch: &mut self.dispatch, key, ask };
            let waits = match &plan {
                native::Plan::Done => false,
                native::Plan::One { partition, command, .. } => {
                    request.would_overtake(*partition, command)
                }
                native::Plan::Many { parts, .. } => {
                    parts.iter().any(|(one, command)| request.would_overtake(*one, command))
                }
                native::Plan::Scan { .. } => !direct,
            };
            if waits {
                connection.barrier = true;
                break;
            }
            consumed.bytes += bytes;
            pace.count(!matches!(plan, native::Plan::Done | native::Plan::One { .. }));
            match plan {
                native::Plan::Done => request.connection.answer(text),
                native::Plan::One { partition, command, form, .. } => {
                    request.one(partition, &command, Render::Native(form), None);
                }
                native::Plan::Many { parts, gather, .. } => {
                    request.many(&parts, Gathering::Native(gather), None);
                }
                native::Plan::Scan { walk, form } => {
                    self.walk(key, *walk, WalkRender::Native(form), None);
                    self.shared.stats.commands.add(pace.commands);
                    self.list(key);
                    return consumed;
                }
            }
            if pace.is_late() {
                break;
            }
        }
        self.shared.stats.commands.add(pace.commands);
        if pace.late {
            self.list(key);
        }
        consumed
    }

    /// Puts the replies that are due into the connection's output, in order, and sends it.
    pub(super) fn flush_all(&mut self, now: Instant) {
        let mut unflushed = std::mem::take(&mut self.unflushed);
        for key in unflushed.drain(..) {
            let Some(connection) = self.connections.get_mut(key) else { continue };
            connection.unflushed = false;
            let was_paused = connection.paused();
            let sent = connection.answer_and_flush();
            let unsent = connection.unsent() as u64;
            let ended = connection.closing && unsent == 0 && connection.slots.is_empty();
            match sent {
                Ok(bytes) if bytes > 0 => {
                    connection.last_active = now;
                    self.shared.stats.output_bytes.add(bytes as u64);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "connection lost");
                    self.close(key);
                    continue;
                }
            }
            if unsent > self.shared.settings.output_buffer_limit {
                tracing::warn!(unsent, "closing a client that does not read its replies");
                self.shared.stats.output_limit_closes.add(1);
                self.close(key);
            } else if ended {
                self.close(key);
            } else if was_paused && !self.connections[key].paused() {
                self.list(key);
            }
        }
        unflushed.append(&mut self.unflushed);
        self.unflushed = unflushed;
    }
}

/// Settings under Redis's names.
fn running_settings(shared: &Shared) -> Vec<(&'static str, String)> {
    resp::redis_settings(&RunningSettings {
        data_addr: shared.data_addr,
        data_dir: &shared.settings.data_dir,
        fsync: shared.settings.fsync.name(),
        max_memory: shared.memory.limit(),
        max_clients: shared.max_connections.load(Ordering::Relaxed),
        timeout_s: shared.idle_timeout_s.load(Ordering::Relaxed),
        cluster_enabled: shared.cluster.is_some(),
    })
}

fn error_text(error: &ProtocolError) -> Vec<u8> {
    let mut text = Vec::new();
    write::error(&mut text, &format!("ERR {error}"));
    text
}

/// Whether this is a line of an HTTP request. A page in a browser can send one here, whose body would
/// then be carried out line by line: the connection is closed before that, as Redis does.
fn is_http(args: Args<'_>) -> bool {
    let name = args.at(0);
    name.eq_ignore_ascii_case(b"POST") || name.eq_ignore_ascii_case(b"Host:")
}

/// Whether a command can take long enough for others to notice.
fn is_heavy(plan: &Plan<'_>) -> bool {
    match plan {
        Plan::Done | Plan::Close | Plan::Later | Plan::Node(_) => false,
        Plan::One { command, .. } => {
            matches!(
                command,
                Command::Lcs { .. } | Command::GetMany { .. } | Command::SetMany { .. }
            )
        }
        Plan::Many { .. } | Plan::Transaction { .. } => true,
    }
}

/// So many light commands take less than a stretch.
const COMMANDS_PER_CHECK: u64 = 64;

/// Sees to it that a connection with much to do lets others have their turn.
struct Pace {
    /// When it was first looked at: most stretches end before.
    began: Option<Instant>,
    commands: u64,
    unchecked: u64,
    late: bool,
}

impl Pace {
    fn begin() -> Pace {
        Pace { began: None, commands: 0, unchecked: 0, late: false }
    }

    fn count(&mut self, heavy: bool) {
        self.commands += 1;
        self.unchecked += if heavy { COMMANDS_PER_CHECK } else { 1 };
    }

    fn is_late(&mut self) -> bool {
        if self.unchecked >= COMMANDS_PER_CHECK {
            self.unchecked = 0;
            let now = Instant::now();
            self.late = now.duration_since(*self.began.get_or_insert(now)) >= STRETCH;
        }
        self.late
    }
}
