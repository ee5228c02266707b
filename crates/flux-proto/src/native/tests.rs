//! Golden bytes, round trips, every split point, and bytes from nowhere.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::Code;

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

/// Bytes of other bodies, written out: a change of the format must change them here.
#[test]
fn golden_bodies() {
    let body = |request: &Request<'_>| request_bytes(1, request)[18..].to_vec();
    let scan = Request::Scan { prefix: b"p", cursor: b"", limit: 10, keys_only: true };
    assert_eq!(body(&scan), b"\x01\x0a\0\0\0\x01\0\0\0p\0\0\0\0");
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
    unknown[13] = 2;
    assert_eq!(decode(&unknown), Err(BodyError::UnknownFlags(2)));
    unknown[13] = 1;
    assert!(decode_request(&unknown).unwrap().unwrap().0.header.is_stale());
    assert!(decode(&unknown).is_ok());

    for expiry in [Expiry::Never, Expiry::Keep] {
        let expire = request_bytes(1, &Request::Expire { key: b"k", expiry });
        assert!(matches!(decode(&expire), Err(BodyError::Invalid { field: "expiry", .. })));
    }
    let scan = Request::Scan { prefix: b"", cursor: b"", limit: 10_001, keys_only: false };
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
        members: vec![Member { name: "a", data_addr: "127.0.0.1:7379" }],
        leaders: vec![Some(0), None],
    };
    let mut bytes = response_bytes(Opcode::Info, &Response::Info(info.clone()));
    bytes.extend_from_slice(b"more");
    bytes[0] += 4;
    let (frame, _) = decode_response(&bytes).unwrap().unwrap();
    assert_eq!(frame.response(), Ok(Ok(Response::Info(info.clone()))));

    let nobody = Info { leaders: vec![Some(1)], ..info };
    let bytes = response_bytes(Opcode::Info, &Response::Info(nobody));
    let (frame, _) = decode_response(&bytes).unwrap().unwrap();
    assert_eq!(frame.response(), Err(BodyError::Invalid { field: "leader", value: 1 }));
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
                Request::Scan { prefix: key, cursor: value, limit, keys_only: self.choice == 1 }
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
                members: vec![Member { name: "node-1", data_addr: "127.0.0.1:1" }],
                leaders: self.keys.iter().map(|key| (key[0] > 9).then_some(0)).collect(),
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
    fn requests_survive_every_split(parts in parts(), id in 1..u64::MAX) {
        let request = parts.request();
        let mut bytes = request_bytes(id, &request);
        let whole = bytes.len();
        for end in 0..whole {
            prop_assert_eq!(decode_request(&bytes[..end]), Ok(None));
        }
        bytes.extend_from_slice(b"next");
        let (frame, taken) = decode_request(&bytes).unwrap().unwrap();
        prop_assert_eq!((frame.header.id, taken), (id, whole));
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
    fn no_body_makes_a_decoder_panic(opcode in 0..40_u8, body in vec(0..20_u8, 0..120)) {
        let mut bytes = (body.len() as u32 + 14).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, opcode, 0, 0, 0, 0, 0]);
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
