//! Golden bytes, round trips, every split point, and bytes from nowhere.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::Code;
use crate::trace::TraceContext;
use crate::trace::tests::{EXAMPLE, traces};

fn request_bytes(id: u64, request: &Request<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    encode_request(&mut out, &RequestHeader::new(id, request.opcode()), request).unwrap();
    out
}

fn response_bytes(opcode: Opcode, response: &Response<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    encode_response(&mut out, 7, opcode, response).unwrap();
    out
}

fn decode(bytes: &[u8]) -> Result<Request<'_>, BodyError> {
    decode_request(bytes).unwrap().unwrap().0.request()
}

const PROTOCOL: &str = include_str!("../../../../docs/protocol.md");

/// What one side sends in the example of docs/protocol.md, each block of text by itself.
fn documented(side: char) -> Vec<Vec<u8>> {
    let example = PROTOCOL.split_once("\n## An example\n").unwrap().1;
    let blocks = example.split("```text\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let bytes_of = |line: &str| -> Vec<u8> {
        let words = line.split_whitespace();
        words.map_while(|word| u8::from_str_radix(word, 16).ok()).collect()
    };
    let lines = |block: &str| {
        block.lines().filter_map(|line| line.strip_prefix(side)).map(bytes_of).collect()
    };
    blocks.map(|block| -> Vec<Vec<u8>> { lines(block) }).map(|lines| lines.concat()).collect()
}

#[test]
fn the_documented_example() {
    let mut sent = Vec::new();
    encode_preface(&mut sent, &Preface::default());
    let set = Request::Set {
        key: b"k",
        value: b"v1",
        expiry: Expiry::In(1500),
        condition: Condition::IfAbsent,
        return_previous: false,
    };
    let header = RequestHeader { deadline_ms: 5000, ..RequestHeader::new(1, Opcode::Set) };
    encode_request(&mut sent, &header, &set).unwrap();
    assert_eq!(documented('>')[0], sent);

    let mut answered = Vec::new();
    let accepted = ServerPreface::Accepted(Accepted::new("node-1", 16));
    encode_server_preface(&mut answered, &accepted);
    let reply = SetReply { written: true, version: Some(42), previous: None };
    encode_response(&mut answered, 1, Opcode::Set, &Response::Set(reply)).unwrap();
    assert_eq!(documented('<')[0], answered);

    let mut refused = Vec::new();
    encode_error(&mut refused, 1, Opcode::Set as u8, Code::Overloaded, "busy");
    assert_eq!(documented('<')[1], refused);
}

#[test]
fn the_documented_example_of_a_cluster() {
    let mut sent = Vec::new();
    encode_preface(&mut sent, &Preface { flags: feature::ALL, ..Preface::default() });
    let session = Session { id: 0xABCD, sequence: 9, acked_below: 8 };
    let increment = Request::Increment { key: b"n", delta: 1 };
    let trace = TraceContext::parse(EXAMPLE);
    let header = RequestHeader::new(1, Opcode::Increment);
    let header = RequestHeader { session: Some(session), trace, ..header };
    encode_request(&mut sent, &header.with_redirect(true), &increment).unwrap();
    let header = RequestHeader::new(2, Opcode::Get).with_stale(true).with_position(true);
    encode_request(&mut sent, &header, &Request::Get { key: b"k" }).unwrap();
    assert_eq!(documented('>')[2], sent);

    let mut answered = Vec::new();
    let accepted = Accepted { flags: feature::ALL, ..Accepted::new("node-1", 64) };
    encode_server_preface(&mut answered, &ServerPreface::Accepted(accepted));
    let hint = LeaderHint { partition: 7, leader_addr: "h:7379" };
    encode_not_leader(&mut answered, 1, Opcode::Increment as u8, "no", &hint);
    let position = Some(StalePosition { revision: 300, age_ms: 12 });
    encode_response_at(&mut answered, 2, Opcode::Get, &Response::Value(None), position).unwrap();
    assert_eq!(documented('<')[2], answered);
}

#[test]
fn a_session_goes_with_a_write_and_is_checked() {
    let with = |session| {
        let mut out = Vec::new();
        let header = RequestHeader { session, ..RequestHeader::new(1, Opcode::Persist) };
        encode_request(&mut out, &header, &Request::Persist { key: b"k" }).unwrap();
        out
    };
    let session = Session { id: 1, sequence: 2, acked_below: 2 };
    let bytes = with(Some(session));
    let (frame, taken) = decode_request(&bytes).unwrap().unwrap();
    assert_eq!((frame.header.session, taken), (Some(session), bytes.len()));
    assert_eq!(frame.request(), Ok(Request::Persist { key: b"k" }));
    assert_eq!(bytes.len(), with(None).len() + 24);

    let nobody = with(Some(Session { id: 0, ..session }));
    assert_eq!(decode(&nobody), Err(BodyError::Invalid { field: "session", value: 0 }));
    let ahead = with(Some(Session { acked_below: 3, ..session }));
    assert_eq!(decode(&ahead), Err(BodyError::Invalid { field: "acked_below", value: 3 }));
    // The flag on a frame that is too short for a session.
    let mut short = with(None);
    short[13] = 2;
    assert_eq!(decode(&short), Err(BodyError::Truncated { field: "session" }));
}

#[test]
fn a_trace_goes_behind_the_session() {
    let with = |session, trace| {
        let mut out = Vec::new();
        let header = RequestHeader::new(1, Opcode::Persist);
        let header = RequestHeader { session, trace, ..header };
        encode_request(&mut out, &header, &Request::Persist { key: b"k" }).unwrap();
        out
    };
    let session = Some(Session { id: 1, sequence: 2, acked_below: 2 });
    let trace = TraceContext::parse(EXAMPLE);
    for (session, at) in [(None, 18), (session, 42)] {
        let mut bytes = with(session, trace);
        assert_eq!(bytes.len(), with(session, None).len() + 25);
        assert_eq!(bytes[at..at + 25], trace.unwrap().to_bytes());
        let (frame, _) = decode_request(&bytes).unwrap().unwrap();
        assert_eq!((frame.header.session, frame.header.trace), (session, trace));
        assert_eq!(frame.request(), Ok(Request::Persist { key: b"k" }));

        // An id of zeros names no trace: the request is one without.
        bytes[at + 16..at + 24].fill(0);
        let (frame, _) = decode_request(&bytes).unwrap().unwrap();
        assert_eq!((frame.header.trace, frame.header.flags & 16), (None, 0));
        assert_eq!(frame.request(), Ok(Request::Persist { key: b"k" }));
    }
    // The flag on a frame that is too short for a trace.
    let mut short = with(None, None);
    short[13] = 16;
    assert_eq!(decode(&short), Err(BodyError::Truncated { field: "trace" }));
}

#[test]
fn what_is_asked_of_a_read_stands_in_the_flags() {
    let header = RequestHeader::new(1, Opcode::Get);
    assert!(!header.is_stale() && !header.wants_position() && !header.wants_redirect());
    assert!(!header.with_position(true).wants_position(), "only a stale read has a position");
    let header = header.with_stale(true).with_position(true).with_redirect(true);
    assert!(header.is_stale() && header.wants_position() && header.wants_redirect());
    assert_eq!(header.with_position(false).with_redirect(false).flags, 1);

    let position = StalePosition { revision: 1, age_ms: 2 };
    let mut out = Vec::new();
    encode_response_at(&mut out, 1, Opcode::Get, &Response::Value(None), Some(position)).unwrap();
    let (frame, _) = decode_response(&out).unwrap().unwrap();
    assert_eq!((frame.position, frame.response()), (Some(position), Ok(Ok(Response::Value(None)))));
    let mut plain = response_bytes(Opcode::Get, &Response::Value(None));
    plain[15] = 0xfe;
    let (frame, _) = decode_response(&plain).unwrap().unwrap();
    assert_eq!(frame.response(), Ok(Ok(Response::Value(None))), "unknown flags are ignored");
    plain[15] = 1;
    let (frame, _) = decode_response(&plain).unwrap().unwrap();
    assert_eq!(frame.response(), Err(BodyError::Truncated { field: "revision" }));
}

#[test]
fn a_hint_is_told_and_a_strange_one_is_none() {
    let failure = |bytes: &[u8]| {
        let (frame, _) = decode_response(bytes).unwrap().unwrap();
        let failure = frame.response().unwrap().unwrap_err();
        (failure.code(), failure.leader.map(|hint| (hint.partition, hint.leader_addr.to_owned())))
    };
    let mut out = Vec::new();
    let hint = LeaderHint { partition: 3, leader_addr: "a:1" };
    encode_not_leader(&mut out, 1, 16, "moved", &hint);
    assert_eq!(failure(&out), (Code::NotLeader, Some((3, "a:1".to_owned()))));
    let mut longer = out.clone();
    longer.extend_from_slice(b"more");
    longer[0] += 4;
    assert_eq!(failure(&longer), (Code::NotLeader, Some((3, "a:1".to_owned()))));
    for cut in 1..=9 {
        let mut short = out[..out.len() - cut].to_vec();
        short[0] -= cut as u8;
        assert_eq!(failure(&short), (Code::NotLeader, None), "{cut} bytes less");
    }
    out.clear();
    encode_error(&mut out, 1, 16, Code::Overloaded, "busy");
    assert_eq!(failure(&out), (Code::Overloaded, None));
}

/// Bytes of other bodies, written out: a change of the format must change them here.
#[test]
fn golden_bodies() {
    let body = |request: &Request<'_>| request_bytes(1, request)[18..].to_vec();
    let scan = |partition| {
        body(&Request::Scan { prefix: b"p", cursor: b"", limit: 10, keys_only: true, partition })
    };
    assert_eq!(scan(None), b"\x01\x0a\0\0\0\x01\0\0\0p\0\0\0\0");
    assert_eq!(scan(Some(258)), b"\x03\x02\x01\x0a\0\0\0\x01\0\0\0p\0\0\0\0");
    let increment = Request::Increment { key: b"n", delta: -1 };
    assert_eq!(body(&increment), b"\xff\xff\xff\xff\xff\xff\xff\xff\x01\0\0\0n");
    let expire = Request::Expire { key: b"k", expiry: Expiry::At(258) };
    assert_eq!(body(&expire), b"\x03\x02\x01\0\0\0\0\0\0\x01\0\0\0k");
    let batch = Request::BatchWrite {
        guards: vec![Guard { key: b"g", version: 5 }],
        writes: vec![Write::Delete { key: b"d", condition: Condition::IfVersion(6) }],
    };
    assert_eq!(
        body(&batch),
        b"\x01\0\0\0\x05\0\0\0\0\0\0\0\x01\0\0\0g\
          \x01\0\0\0\x12\x03\x06\0\0\0\0\0\0\0\x01\0\0\0d",
    );

    let answer = |opcode, response| response_bytes(opcode, &response)[16..].to_vec();
    assert_eq!(answer(Opcode::Get, Response::Value(None)), b"\0");
    let value = Value { bytes: b"v", version: 7, expires_at_ms: None };
    assert_eq!(
        answer(Opcode::Get, Response::Value(Some(value))),
        b"\x01\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0v",
    );
    let conflict = Response::Deleted(DeleteReply::Conflict(3));
    assert_eq!(answer(Opcode::Delete, conflict), b"\x02\x03\0\0\0\0\0\0\0");
    let refused = Response::Batch(BatchReply::NotWritten { position: None });
    assert_eq!(answer(Opcode::BatchWrite, refused), b"\0\xff\xff\xff\xff");
    let written = Response::Batch(BatchReply::Written(vec![WriteResult::Delete { deleted: true }]));
    assert_eq!(answer(Opcode::BatchWrite, written), b"\x01\x01\0\0\0\x12\x01");
}

#[test]
fn prefaces_go_both_ways() {
    let accepted = ServerPreface::Accepted(Accepted::new("node-1", 16));
    for preface in [accepted, ServerPreface::VERSION_MISMATCH] {
        let mut out = Vec::new();
        encode_server_preface(&mut out, &preface);
        for end in 0..out.len() {
            assert_eq!(decode_server_preface(&out[..end]), Ok(None), "{end} bytes");
        }
        out.push(9);
        assert_eq!(decode_server_preface(&out), Ok(Some((preface, out.len() - 1))));
    }

    let preface = Preface { min_version: 1, max_version: 3, flags: 5 };
    let mut out = Vec::new();
    encode_preface(&mut out, &preface);
    for end in 0..out.len() {
        assert_eq!(decode_preface(&out[..end]), Ok(None), "{end} bytes");
    }
    assert_eq!(decode_preface(&out), Ok(Some((preface, PREFACE_BYTES))));
}

#[test]
fn the_version_is_chosen_from_both_ranges() {
    let range = |min_version, max_version| Preface { min_version, max_version, flags: 0 };
    assert_eq!(range(1, 1).choose_version(), Some(1));
    assert_eq!(range(0, 9).choose_version(), Some(1));
    assert_eq!(range(2, 9).choose_version(), None);
    assert_eq!(range(9, 1).choose_version(), None);
}

#[test]
fn another_protocol_is_told_at_its_first_byte() {
    assert!(is_native(MAGIC[0]));
    for byte in 0..0x80 {
        assert!(!is_native(byte), "{byte} may start a RESP value or an inline command");
    }
    assert_eq!(decode_preface(b"*"), Err(PrefaceError::BadMagic));
    assert_eq!(decode_preface(b"\xf1FLUS"), Err(PrefaceError::BadMagic));
    assert_eq!(decode_server_preface(b"-ERR"), Err(PrefaceError::BadMagic));
    let long = b"\xf1FLUX\0\x01\0\0\0\0\0\0\x80";
    assert_eq!(decode_server_preface(long), Err(PrefaceError::TooLong(1 << 31)));
}

#[test]
fn lengths_out_of_range_lose_the_framing() {
    for (length, error) in [
        (0, FrameError::TooShort(0)),
        (13, FrameError::TooShort(13)),
        (MAX_FRAME_BYTES as u32 + 1, FrameError::TooLarge(MAX_FRAME_BYTES + 1)),
        (1 << 31, FrameError::TooLarge(1 << 31)),
        (u32::MAX, FrameError::TooLarge(u32::MAX as usize)),
    ] {
        assert_eq!(decode_request(&length.to_le_bytes()), Err(error));
    }
    assert_eq!(decode_request(&(MAX_FRAME_BYTES as u32).to_le_bytes()), Ok(None));
    assert_eq!(decode_response(&11_u32.to_le_bytes()), Err(FrameError::TooShort(11)));
    assert_eq!(FrameError::TooShort(0).code(), Code::Malformed);
    assert_eq!(FrameError::TooLarge(0).code(), Code::TooLarge);
}

#[test]
fn a_bad_body_names_its_fault_and_keeps_the_framing() {
    let key = |bytes: &[u8]| request_bytes(1, &Request::Get { key: bytes });
    assert_eq!(decode(&key(b"")), Err(BodyError::EmptyKey));
    let long = vec![b'k'; MAX_KEY_BYTES + 1];
    assert_eq!(decode(&key(&long)), Err(BodyError::KeyTooLong(MAX_KEY_BYTES + 1)));
    assert!(decode(&key(&long[1..])).is_ok());

    let set = |value: &[u8], expiry| {
        let (condition, return_previous) = (Condition::Always, false);
        let set = Request::Set { key: b"k", value, expiry, condition, return_previous };
        request_bytes(1, &set)
    };
    let large = vec![0; MAX_VALUE_BYTES + 1];
    let too_large = BodyError::ValueTooLarge(MAX_VALUE_BYTES + 1);
    assert_eq!(decode(&set(&large, Expiry::Never)), Err(too_large.clone()));
    assert_eq!(too_large.code(), Code::TooLarge);
    assert!(decode(&set(&large[1..], Expiry::Never)).is_ok());
    let zero = BodyError::Invalid { field: "ttl_ms", value: 0 };
    assert_eq!(decode(&set(b"v", Expiry::In(0))), Err(zero));

    let mut trailing = key(b"k");
    trailing.push(0);
    trailing[0] += 1;
    assert_eq!(decode(&trailing), Err(BodyError::Trailing(1)));

    let mut unknown = key(b"k");
    unknown[12] = 99;
    assert_eq!(decode(&unknown), Err(BodyError::UnknownOpcode(99)));
    unknown[12] = Opcode::Get as u8;
    unknown[13] = 32;
    assert_eq!(decode(&unknown), Err(BodyError::UnknownFlags(32)));
    unknown[13] = 1;
    assert!(decode_request(&unknown).unwrap().unwrap().0.header.is_stale());
    assert!(decode(&unknown).is_ok());

    for expiry in [Expiry::Never, Expiry::Keep] {
        let expire = request_bytes(1, &Request::Expire { key: b"k", expiry });
        assert!(matches!(decode(&expire), Err(BodyError::Invalid { field: "expiry", .. })));
    }
    let (prefix, cursor, partition) = (&b""[..], &b""[..], None);
    let scan = Request::Scan { prefix, cursor, limit: 10_001, keys_only: false, partition };
    let over = BodyError::Invalid { field: "limit", value: 10_001 };
    assert_eq!(decode(&request_bytes(1, &scan)), Err(over));
}

#[test]
fn counts_are_checked_before_memory_is_taken() {
    let batch = |count: u32| {
        let mut bytes = request_bytes(1, &Request::BatchGet { keys: vec![b"k"] });
        bytes[18..22].copy_from_slice(&count.to_le_bytes());
        bytes
    };
    assert_eq!(decode(&batch(1)), Ok(Request::BatchGet { keys: vec![b"k"] }));
    assert_eq!(decode(&batch(65_536)), Err(BodyError::Truncated { field: "keys" }));
    let count = u32::MAX as usize;
    let too_many = BodyError::TooMany { field: "keys", count, limit: MAX_BATCH };
    assert_eq!(decode(&batch(u32::MAX)), Err(too_many));
}

#[test]
fn a_frame_over_the_limit_leaves_the_buffer_as_it_was() {
    let mut out = b"before".to_vec();
    let payload = vec![0; MAX_FRAME_BYTES];
    let header = RequestHeader::new(1, Opcode::Ping);
    let refused = encode_request(&mut out, &header, &Request::Ping { payload: &payload });
    assert_eq!(refused, Err(FrameTooLarge(MAX_FRAME_BYTES + 14)));
    let response = Response::Pong { payload: &payload };
    assert!(encode_response(&mut out, 1, Opcode::Ping, &response).is_err());
    assert_eq!(out, b"before");
}

#[test]
fn an_error_with_an_unknown_number_is_still_an_error() {
    let mut out = Vec::new();
    encode_error(&mut out, 3, 16, Code::NotLeader, "ask node-2");
    out[12..14].copy_from_slice(&999_u16.to_le_bytes());
    let (frame, _) = decode_response(&out).unwrap().unwrap();
    let failure = frame.response().unwrap().unwrap_err();
    assert_eq!((failure.code(), failure.message), (Code::Internal, "ask node-2"));

    let message = "ä".repeat(4000);
    out.clear();
    encode_error(&mut out, 3, 16, Code::Internal, &message);
    let (frame, _) = decode_response(&out).unwrap().unwrap();
    assert_eq!(frame.response().unwrap().unwrap_err().message.len(), 4096);
}

#[test]
fn clients_skip_what_later_servers_add_to_info() {
    let info = Info {
        node: "a",
        server_version: "0.1.0",
        members: vec![Member { name: "a", data_addr: "127.0.0.1:7379", zone: "z" }],
        leaders: vec![Some(0), None],
        epoch: 5,
        replicas: vec![vec![0], vec![]],
    };
    let mut bytes = response_bytes(Opcode::Info, &Response::Info(info.clone()));
    bytes.extend_from_slice(b"more");
    bytes[0] += 4;
    let (frame, _) = decode_response(&bytes).unwrap().unwrap();
    assert_eq!(frame.response(), Ok(Ok(Response::Info(info.clone()))));

    let refused = |info: Info<'_>| {
        let bytes = response_bytes(Opcode::Info, &Response::Info(info));
        decode_response(&bytes).unwrap().unwrap().0.response().unwrap_err()
    };
    let nobody = Info { leaders: vec![Some(1)], ..info.clone() };
    assert_eq!(refused(nobody), BodyError::Invalid { field: "leader", value: 1 });
    let nowhere = Info { replicas: vec![vec![0], vec![0, 1]], ..info };
    assert_eq!(refused(nowhere), BodyError::Invalid { field: "replica", value: 1 });
}

/// INFO to the byte, and without the fields that servers without a cluster do not have.
#[test]
fn golden_info_and_its_older_form() {
    let info = Info {
        node: "a",
        server_version: "1",
        members: vec![
            Member { name: "a", data_addr: "h:1", zone: "x" },
            Member { name: "b", data_addr: "h:2", zone: "" },
        ],
        leaders: vec![Some(1), None],
        epoch: 258,
        replicas: vec![vec![1, 0], vec![]],
    };
    let older = b"\x01\0\0\0a\x01\0\0\x001\
        \x02\0\0\0\x01\0\0\0a\x03\0\0\0h:1\x01\0\0\0b\x03\0\0\0h:2\
        \x02\0\0\0\x01\0\xff\xff";
    let appended = b"\x02\x01\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0x\0\0\0\0\
        \x02\0\0\0\x02\0\0\0\x01\0\0\0\0\0\0\0";
    let mut bytes = response_bytes(Opcode::Info, &Response::Info(info.clone()));
    assert_eq!(bytes[16..], [&older[..], appended].concat());

    bytes.truncate(16 + older.len());
    bytes[0] -= appended.len() as u8;
    let mut alone = info;
    (alone.epoch, alone.replicas, alone.members[0].zone) = (0, vec![], "");
    let (frame, _) = decode_response(&bytes).unwrap().unwrap();
    assert_eq!(frame.response(), Ok(Ok(Response::Info(alone))));
}

/// The material of requests and responses of every kind.
#[derive(Clone, Debug)]
struct Parts {
    kind: usize,
    keys: Vec<Vec<u8>>,
    value: Vec<u8>,
    number: u64,
    choice: u8,
}

fn parts() -> impl Strategy<Value = Parts> {
    let keys = vec(vec(any::<u8>(), 1..40), 1..6);
    (0..12_usize, keys, vec(any::<u8>(), 0..60), any::<u64>(), 0..4_u8)
        .prop_map(|(kind, keys, value, number, choice)| Parts { kind, keys, value, number, choice })
}

impl Parts {
    fn condition(&self) -> Condition {
        match self.choice {
            0 => Condition::Always,
            1 => Condition::IfAbsent,
            2 => Condition::IfPresent,
            _ => Condition::IfVersion(self.number),
        }
    }

    fn expiry(&self) -> Expiry {
        match self.number % 4 {
            0 => Expiry::Never,
            1 => Expiry::Keep,
            2 => Expiry::In(self.number),
            _ => Expiry::At(self.number),
        }
    }

    fn request(&self) -> Request<'_> {
        let (key, value) = (self.keys[0].as_slice(), self.value.as_slice());
        let (expiry, condition) = (self.expiry(), self.condition());
        let delta = self.number as i64;
        match self.kind {
            0 => Request::Ping { payload: value },
            1 => Request::Auth { user: "someone", password: value },
            2 => Request::Info,
            3 => Request::Get { key },
            4 => {
                let return_previous = self.number.is_multiple_of(2);
                Request::Set { key, value, expiry, condition, return_previous }
            }
            5 => Request::Delete { key, condition },
            6 => Request::Increment { key, delta },
            7 => Request::Expire { key, expiry: Expiry::At(self.number) },
            8 => Request::Persist { key },
            9 => Request::BatchGet { keys: self.keys.iter().map(Vec::as_slice).collect() },
            10 => Request::BatchWrite {
                guards: self.keys.iter().map(|key| Guard { key, version: self.number }).collect(),
                writes: vec![
                    Write::Set { key, value, expiry, condition },
                    Write::Delete { key, condition },
                    Write::Increment { key, delta },
                ],
            },
            _ => {
                let limit = (self.number % 10_000) as u32 + 1;
                let partition = (self.choice > 1).then_some(self.number as u16);
                let keys_only = self.choice == 1;
                Request::Scan { prefix: key, cursor: value, limit, keys_only, partition }
            }
        }
    }

    fn response(&self) -> Response<'_> {
        let version = self.number;
        let expires_at_ms = (self.choice > 1).then_some(u64::from(self.choice));
        let value = Value { bytes: &self.value, version, expires_at_ms };
        let some = (self.choice != 0).then_some(value);
        match self.kind {
            0 => Response::Pong { payload: &self.value },
            1 => Response::Authenticated,
            2 => Response::Info(Info {
                node: "node-1",
                server_version: "0.1.0",
                members: vec![Member { name: "node-1", data_addr: "127.0.0.1:1", zone: "z" }],
                leaders: self.keys.iter().map(|key| (key[0] > 9).then_some(0)).collect(),
                epoch: self.number,
                replicas: self.keys.iter().map(|key| vec![0; usize::from(key[0] % 3)]).collect(),
            }),
            3 => Response::Value(some),
            4 => Response::Set(SetReply {
                written: self.choice == 1,
                version: (self.choice != 2).then_some(version),
                previous: some,
            }),
            5 => Response::Deleted(match self.choice {
                0 => DeleteReply::Absent,
                1 => DeleteReply::Deleted,
                _ => DeleteReply::Conflict(version),
            }),
            6 => Response::Counter { value: version as i64, version },
            7 | 8 => Response::Changed(self.choice == 1),
            9 => Response::Values(vec![some, None, Some(value)]),
            10 if self.choice < 2 => Response::Batch(BatchReply::NotWritten {
                position: (self.choice == 1).then_some(self.value.len() as u32),
            }),
            10 => Response::Batch(BatchReply::Written(vec![
                WriteResult::Set { version },
                WriteResult::Delete { deleted: self.choice == 2 },
                WriteResult::Increment { value: -1, version },
            ])),
            _ => Response::Page(Page {
                cursor: &self.value,
                items: self.keys.iter().map(|key| Item { key, value }).collect(),
            }),
        }
    }
}

proptest! {
    #[test]
    fn requests_survive_every_split(parts in parts(), id in 1..u64::MAX, trace in traces()) {
        let request = parts.request();
        let sequence = parts.number;
        let session = Session { id, sequence, acked_below: sequence / 2 };
        let session = (parts.choice == 1).then_some(session);
        let header = RequestHeader { session, trace, ..RequestHeader::new(id, request.opcode()) };
        let mut bytes = Vec::new();
        encode_request(&mut bytes, &header, &request).unwrap();
        let whole = bytes.len();
        for end in 0..whole {
            prop_assert_eq!(decode_request(&bytes[..end]), Ok(None));
        }
        bytes.extend_from_slice(b"next");
        let (frame, taken) = decode_request(&bytes).unwrap().unwrap();
        prop_assert_eq!((frame.header.id, taken), (id, whole));
        prop_assert_eq!((frame.header.session, frame.header.trace), (session, trace));
        prop_assert_eq!(frame.request(), Ok(request));
    }

    #[test]
    fn responses_survive_every_split(parts in parts()) {
        let response = parts.response();
        let mut bytes = response_bytes(parts.request().opcode(), &response);
        let whole = bytes.len();
        for end in 0..whole {
            prop_assert_eq!(decode_response(&bytes[..end]), Ok(None));
        }
        bytes.extend_from_slice(b"next");
        let (frame, taken) = decode_response(&bytes).unwrap().unwrap();
        prop_assert_eq!((frame.id, taken), (7, whole));
        prop_assert_eq!(frame.response(), Ok(Ok(response)));
    }

    #[test]
    fn a_body_that_ends_early_is_refused(parts in parts(), cut in 1..200_usize) {
        let bytes = request_bytes(1, &parts.request());
        let body = &bytes[18..];
        prop_assume!(cut <= body.len() && parts.kind != 0);
        let header = decode_request(&bytes).unwrap().unwrap().0.header;
        let frame = Frame { header, body: &body[..body.len() - cut] };
        prop_assert!(frame.request().is_err());
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in vec(any::<u8>(), 0..300)) {
        exercise(&bytes);
    }

    #[test]
    fn no_body_makes_a_decoder_panic(
        opcode in 0..40_u8, flags in 0..32_u8, body in vec(0..20_u8, 0..120),
    ) {
        let mut bytes = (body.len() as u32 + 14).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, opcode, flags, 0, 0, 0, 0]);
        bytes.extend_from_slice(&body);
        exercise(&bytes);
        let mut bytes = (body.len() as u32 + 12).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, opcode, 0]);
        bytes.extend_from_slice(&body);
        exercise(&bytes);
    }

    #[test]
    fn a_flipped_byte_makes_no_decoder_panic(parts in parts(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = request_bytes(1, &parts.request());
        let position = at.index(bytes.len());
        bytes[position] = byte;
        exercise(&bytes);
        let mut bytes = response_bytes(parts.request().opcode(), &parts.response());
        let position = at.index(bytes.len());
        bytes[position] = byte;
        exercise(&bytes);
    }
}
