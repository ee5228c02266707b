//! The native protocol on a node alone: features, sessions, stale reads, scans.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use flux_core::{PartitionId, Partitions};
use flux_proto::Code;
use flux_proto::native::{
    self, Expiry, Preface, Request, RequestHeader, Response, ResponseFrame, ServerPreface, Session,
    StalePosition, feature,
};

use super::machine::Machine;
use super::node::{small, start};
use crate::config::{Fsync, Settings};

/// A connection that asks one thing at a time.
struct Client {
    stream: TcpStream,
    received: Vec<u8>,
    next_id: u64,
    features: u16,
}

impl Client {
    fn connect(address: SocketAddr, features: u16) -> Client {
        let stream = TcpStream::connect(address).expect("connected");
        let mut client = Client { stream, received: Vec::new(), next_id: 0, features: 0 };
        let mut bytes = Vec::new();
        native::encode_preface(&mut bytes, &Preface { flags: features, ..Preface::default() });
        client.stream.write_all(&bytes).expect("sent");
        client.features = client.receive(|received| {
            let (preface, bytes) = native::decode_server_preface(received).expect("valid")?;
            let ServerPreface::Accepted(accepted) = preface else { panic!("{preface:?}") };
            Some((accepted.flags, bytes))
        });
        client
    }

    fn receive<T>(&mut self, decode: impl Fn(&[u8]) -> Option<(T, usize)>) -> T {
        let mut buffer = [0; 65536];
        loop {
            if let Some((decoded, bytes)) = decode(&self.received) {
                self.received.drain(..bytes);
                return decoded;
            }
            let count = self.stream.read(&mut buffer).expect("answered");
            assert!(count > 0, "the connection ended");
            self.received.extend_from_slice(&buffer[..count]);
        }
    }

    /// What `read` makes of the answer.
    fn ask<T>(
        &mut self,
        request: &Request<'_>,
        header: impl Fn(RequestHeader) -> RequestHeader,
        read: impl Fn(&ResponseFrame<'_>) -> T,
    ) -> T {
        self.next_id += 1;
        let id = self.next_id;
        let header = header(RequestHeader::new(id, request.opcode()));
        let mut bytes = Vec::new();
        native::encode_request(&mut bytes, &header, request).expect("small");
        self.stream.write_all(&bytes).expect("sent");
        self.receive(|received| {
            let (frame, bytes) = native::decode_response(received).expect("valid")?;
            assert_eq!(frame.id, id);
            Some((read(&frame), bytes))
        })
    }

    fn increment(&mut self, session: Option<Session>) -> (i64, u64) {
        let request = Request::Increment { key: b"n", delta: 1 };
        let with_session = |header| RequestHeader { session, ..header };
        self.ask(&request, with_session, |frame| match frame.response() {
            Ok(Ok(Response::Counter { value, version })) => (value, version),
            other => panic!("{other:?}"),
        })
    }

    /// The keys of a scan, page by page.
    fn scan(&mut self, partition: Option<u16>, limit: u32) -> Vec<Vec<u8>> {
        let (mut keys, mut cursor) = (Vec::new(), Vec::new());
        loop {
            let request =
                Request::Scan { prefix: b"", cursor: &cursor, limit, keys_only: true, partition };
            let (next, found) = self.ask(
                &request,
                |header| header,
                |frame| match frame.response().expect("valid").expect("a page") {
                    Response::Page(page) => {
                        let keys = page.items.iter().map(|item| item.key.to_vec());
                        (page.cursor.to_vec(), keys.collect::<Vec<_>>())
                    }
                    other => panic!("{other:?}"),
                },
            );
            keys.extend(found);
            if next.is_empty() {
                return keys;
            }
            cursor = next;
        }
    }

    fn refusal(&mut self, request: &Request<'_>, session: Option<Session>) -> Code {
        let header = |header| RequestHeader { session, ..header };
        self.ask(request, header, |frame| frame.response().expect("valid").unwrap_err().code())
    }
}

#[test]
fn features_are_granted_as_asked_for() {
    let workers = start(&Machine::new(1), &small(2, Fsync::No)).expect("started");
    let address = workers.shared().data_addr;
    for (asked, granted) in [(0, 0), (feature::SESSIONS, feature::SESSIONS), (0xffff, feature::ALL)]
    {
        assert_eq!(Client::connect(address, asked).features, granted);
    }
    workers.stop().expect("closed");
}

#[test]
fn a_repeated_write_of_a_session_gets_the_first_answer() {
    let workers = start(&Machine::new(1), &small(2, Fsync::No)).expect("started");
    let address = workers.shared().data_addr;
    // The connections are with different workers.
    let mut one = Client::connect(address, feature::ALL);
    let mut other = Client::connect(address, feature::ALL);
    let session = |sequence| Some(Session { id: 7, sequence, acked_below: sequence });
    let first = one.increment(session(1));
    assert_eq!((first.0, other.increment(session(1))), (1, first));
    assert_eq!(other.increment(None).0, 2);
    assert_eq!(one.increment(session(2)).0, 3);
    let old = Request::Increment { key: b"n", delta: 1 };
    assert_eq!(one.refusal(&old, session(1)), Code::OutcomeUnknown);
    assert_eq!(
        one.refusal(&old, Some(Session { id: 0, sequence: 1, acked_below: 1 })),
        Code::InvalidArgument
    );
    workers.stop().expect("closed");
}

#[test]
fn a_stale_read_of_the_leader_is_current_and_says_so_if_asked() {
    let workers = start(&Machine::new(1), &small(2, Fsync::No)).expect("started");
    let mut client = Client::connect(workers.shared().data_addr, feature::ALL);
    let (_, version) = client.increment(None);
    let mut position = |request: &Request<'_>, position| {
        let header = |header: RequestHeader| header.with_stale(true).with_position(position);
        client.ask(request, header, |frame| {
            let response = frame.response().expect("valid").expect("no failure");
            match response {
                Response::Value(value) => assert_eq!(value.expect("there").bytes, b"1"),
                Response::Values(values) => assert!(values[0].is_some()),
                Response::Page(page) => assert_eq!(page.items.len(), 1),
                other => panic!("{other:?}"),
            }
            frame.position
        })
    };
    let get = Request::Get { key: b"n" };
    assert_eq!(position(&get, false), None);
    let current = |revision| Some(StalePosition { revision, age_ms: 0 });
    assert_eq!(position(&get, true), current(version));
    assert_eq!(position(&Request::BatchGet { keys: vec![b"n"] }, true), current(version));
    let keys = vec![&b"n"[..], b"a", b"b", b"c", b"d"];
    assert_eq!(position(&Request::BatchGet { keys }, true), current(0));
    let scan = |partition| Request::Scan {
        prefix: b"",
        cursor: b"",
        limit: 10,
        keys_only: true,
        partition,
    };
    assert_eq!(position(&scan(None), true), current(0));
    let partition = Partitions::new(4).expect("a power of two").of(b"n").0;
    assert_eq!(position(&scan(Some(partition)), true), current(version));
    workers.stop().expect("closed");
}

#[test]
fn scans_are_of_all_partitions_or_of_one() {
    let workers = start(&Machine::new(1), &small(2, Fsync::No)).expect("started");
    let mut client = Client::connect(workers.shared().data_addr, feature::ALL);
    let keys: BTreeSet<Vec<u8>> =
        (0..500).map(|number| format!("key:{number}").into_bytes()).collect();
    for key in &keys {
        let set = Request::Set {
            key,
            value: b"v",
            expiry: Expiry::Never,
            condition: native::Condition::Always,
            return_previous: false,
        };
        client.ask(&set, |header| header, |frame| assert_eq!(frame.status, 0));
    }
    let partitions = Partitions::new(4).expect("a power of two");
    for limit in [7, 10_000] {
        let found = client.scan(None, limit);
        assert_eq!((found.len(), found.into_iter().collect()), (500, keys.clone()));
        let of_one = |partition| {
            let found = client.scan(Some(partition), limit);
            assert!(found.iter().all(|key| partitions.of(key) == PartitionId(partition)));
            found
        };
        assert_eq!((0..4).flat_map(of_one).collect::<BTreeSet<_>>(), keys);
    }
    let page = |cursor, partition| Request::Scan {
        prefix: b"",
        cursor,
        limit: 1,
        keys_only: true,
        partition,
    };
    let of_another = 3_u64.to_le_bytes();
    for refused in [page(b"x", None), page(b"", Some(4)), page(&of_another, Some(0))] {
        assert_eq!(client.refusal(&refused, None), Code::InvalidArgument);
    }
    workers.stop().expect("closed");
}

#[test]
fn pages_with_the_largest_values_fit_into_frames() {
    let settings = Settings {
        segment_bytes: 64 << 20,
        snapshot_log_bytes: 256 << 20,
        max_inflight_bytes: 256 << 20,
        overload_wait_ms: 60_000,
        ..small(1, Fsync::No)
    };
    let workers = start(&Machine::new(1), &settings).expect("started");
    let mut client = Client::connect(workers.shared().data_addr, feature::ALL);
    let sizes = [native::MAX_VALUE_BYTES, 3 << 20, 3 << 20, native::MAX_VALUE_BYTES, 10];
    for (number, size) in sizes.into_iter().enumerate() {
        let (key, value) = (format!("{{tag}}{number}"), vec![0; size]);
        let set = Request::Set {
            key: key.as_bytes(),
            value: &value,
            expiry: Expiry::Never,
            condition: native::Condition::Always,
            return_previous: false,
        };
        client.ask(&set, |header| header, |frame| assert_eq!(frame.status, 0));
    }
    let (mut found, mut cursor, mut pages) = (BTreeMap::new(), Vec::new(), 0);
    loop {
        let (prefix, limit, keys_only, partition) = (&b""[..], 100, false, None);
        let request = Request::Scan { prefix, cursor: &cursor, limit, keys_only, partition };
        let read = |frame: &ResponseFrame<'_>| match frame.response().expect("valid") {
            Ok(Response::Page(page)) => {
                let sizes =
                    page.items.iter().map(|item| (item.key.to_vec(), item.value.bytes.len()));
                (page.cursor.to_vec(), sizes.collect::<Vec<_>>())
            }
            other => panic!("{other:?}"),
        };
        let (next, sizes) = client.ask(&request, |header| header, read);
        found.extend(sizes);
        pages += 1;
        if next.is_empty() {
            break;
        }
        cursor = next;
    }
    assert!(found.into_values().eq(sizes), "each comes once, or again as it was");
    assert!(pages >= 4, "{pages} pages");
    workers.stop().expect("closed");
}
