//! Golden bytes, round trips, every split point, and bytes from nowhere.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::native::BodyError;

const HELLO: Hello = Hello {
    min_version: 1,
    max_version: 2,
    kind: LinkKind::Frames,
    worker: 1,
    cluster: 0x0102_0304_0506_0708,
    from: 0xa1,
    to: 0xb2,
    instance: 0xc3,
};

fn bytes_of(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out, frame).unwrap();
    out
}

/// A frame with a body of that kind.
fn raw(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32 + 1).to_le_bytes().to_vec();
    bytes.push(kind);
    bytes.extend_from_slice(body);
    bytes
}

const PROTOCOL: &str = include_str!("../../../../docs/peer-protocol.md");

/// What one side sends in the example of docs/peer-protocol.md, each block of text by itself.
fn documented(side: char) -> Vec<Vec<u8>> {
    let example = PROTOCOL.split_once("\n## An example\n").unwrap().1;
    let blocks = example.split("```text\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let bytes_of = |line: &str| -> Vec<u8> {
        let words = line.split_whitespace();
        words.map_while(|word| u8::from_str_radix(word, 16).ok()).collect()
    };
    let lines = |block: &str| -> Vec<Vec<u8>> {
        block.lines().filter_map(|line| line.strip_prefix(side)).map(bytes_of).collect()
    };
    blocks.map(|block| lines(block).concat()).collect()
}

#[test]
fn the_documented_examples() {
    let mut sent = Vec::new();
    encode_hello(&mut sent, &HELLO);
    encode(&mut sent, &Frame::Raft { partition: 5, bytes: &[8, 3] }).unwrap();
    encode(&mut sent, &Frame::Beat { sent_us: 1000 }).unwrap();
    assert_eq!(documented('>')[0], sent);
    assert_eq!(documented('<')[0], bytes_of(&Frame::Welcome { version: 2, instance: 0xd4 }));

    let refused = Frame::Refused { reason: Refusal::Cluster as u8, text: "other" };
    assert_eq!(documented('<')[1], bytes_of(&refused));

    let mut sent = Vec::new();
    encode_hello(&mut sent, &Hello { kind: LinkKind::Bulk, worker: 0, ..HELLO });
    let offer = SnapshotOffer {
        partition: 5,
        replica_from: 0xa1_0000_0001,
        replica_to: 0xb2_0000_0004,
        term: 2,
        index: 900,
        size: 4096,
        meta: b"m",
    };
    encode(&mut sent, &Frame::Offer(offer)).unwrap();
    encode(&mut sent, &Frame::Chunk { number: 7, crc: 0xe306_9283, bytes: b"123456789" }).unwrap();
    encode(&mut sent, &Frame::Done { chunks: 8 }).unwrap();
    assert_eq!(documented('>')[2], sent);
    let mut answered = bytes_of(&Frame::Welcome { version: 2, instance: 0xd4 });
    encode(&mut answered, &Frame::Accept { from_chunk: 7, crc: 0x0102_0304 }).unwrap();
    encode(&mut answered, &Frame::Done { chunks: 8 }).unwrap();
    assert_eq!(documented('<')[2], answered);
}

/// Bytes of other frames, written out: a change of the format must change them here.
#[test]
fn golden_frames() {
    let sleep = Frame::Sleep { partition: 1, term: 2, index: 3 };
    assert_eq!(bytes_of(&sleep), b"\x13\0\0\0\x13\x01\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0");
    let asleep = Frame::Asleep { partition: 1, term: 2 };
    assert_eq!(bytes_of(&asleep), b"\x0b\0\0\0\x14\x01\0\x02\0\0\0\0\0\0\0");
    let wake = Frame::Wake { partition: 1, term: 2 };
    assert_eq!(bytes_of(&wake), b"\x0b\0\0\0\x15\x01\0\x02\0\0\0\0\0\0\0");
    let gone = Frame::Gone { partition: 1, replica: 2 };
    assert_eq!(bytes_of(&gone), b"\x0b\0\0\0\x16\x01\0\x02\0\0\0\0\0\0\0");
    let mut led = Vec::new();
    Led::put(&mut led, 5, 6);
    Led::put(&mut led, 9, 7);
    let led = Led::new(&led).unwrap();
    assert_eq!(led.iter().collect::<Vec<_>>(), [(5, 6), (9, 7)]);
    assert_eq!(
        bytes_of(&Frame::Leads { worker: 1, workers: 4, led }),
        b"\x19\0\0\0\x17\x01\0\x04\0\x05\0\x06\0\0\0\0\0\0\0\x09\0\x07\0\0\0\0\0\0\0",
    );
    assert_eq!(bytes_of(&Frame::BeatReply { sent_us: 258 }), raw(18, b"\x02\x01\0\0\0\0\0\0"));
    let request = Request {
        id: 1,
        partition: 2,
        deadline_ms: 3,
        stale: true,
        once: Some((4, 5, 6)),
        trace: None,
        payload: b"get",
    };
    assert_eq!(
        bytes_of(&Frame::Request(request)),
        b"\x2b\0\0\0\x20\x01\0\0\0\0\0\0\0\x02\0\x03\0\0\0\x03\
          \x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0get",
    );
    let traced = Request { stale: false, trace: Some(&[7; 25]), ..request };
    assert_eq!(
        bytes_of(&Frame::Request(traced)),
        b"\x44\0\0\0\x20\x01\0\0\0\0\0\0\0\x02\0\x03\0\0\0\x06\
          \x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\
          \x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\
          \x07\x07\x07\x07\x07\x07\x07\x07\x07get",
    );
    let plain = Request { stale: false, once: None, ..request };
    assert_eq!(
        bytes_of(&Frame::Request(plain)),
        b"\x13\0\0\0\x20\x01\0\0\0\0\0\0\0\x02\0\x03\0\0\0\0get",
    );
    let response = Frame::Response { id: 1, payload: b"v" };
    assert_eq!(bytes_of(&response), b"\x0a\0\0\0\x21\x01\0\0\0\0\0\0\0v");
    let failed = Frame::Failed { reason: Failure::Busy as u8, text: "no" };
    assert_eq!(bytes_of(&failed), b"\x08\0\0\0\x34\x02\x02\0\0\0no");
}

#[test]
fn a_hello_arrives_in_pieces() {
    let mut out = Vec::new();
    encode_hello(&mut out, &HELLO);
    assert_eq!(out.len(), HELLO_BYTES);
    for end in 0..out.len() {
        assert_eq!(decode_hello(&out[..end]), Ok(None), "{end} bytes");
    }
    out.push(9);
    assert_eq!(decode_hello(&out), Ok(Some(HELLO)));

    out[10] = 2;
    let invalid = BodyError::Invalid { field: "kind", value: 2 };
    assert_eq!(decode_hello(&out), Err(HelloError::Malformed(invalid)));
}

#[test]
fn another_protocol_is_told_at_its_first_byte() {
    assert!(!crate::native::is_native(MAGIC[0]));
    for first in [&b"GET / HTTP/1.1"[..], b"*", b"\xf1FLUX", b"\xf2FLUS", b"\0"] {
        assert_eq!(decode_hello(first), Err(HelloError::BadMagic), "{first:?}");
    }
}

#[test]
fn the_version_is_chosen_from_both_ranges() {
    let range = |min_version, max_version| Hello { min_version, max_version, ..HELLO };
    assert_eq!(range(1, 1).choose_version(), Some(1));
    assert_eq!(range(0, 1).choose_version(), Some(1));
    assert_eq!(range(1, 2).choose_version(), Some(2));
    assert_eq!(range(0, 9).choose_version(), Some(2));
    assert_eq!(range(2, 9).choose_version(), Some(2));
    assert_eq!(range(3, 9).choose_version(), None);
    assert_eq!(range(0, 0).choose_version(), None);
    assert_eq!(range(9, 1).choose_version(), None);
}

#[test]
fn bad_frames_name_their_fault() {
    assert_eq!(decode(&[0; 4]), Err(FrameError::Empty));
    let over = MAX_FRAME_BYTES as u32 + 1;
    assert_eq!(decode(&over.to_le_bytes()), Err(FrameError::TooLarge(over as usize)));
    assert_eq!(decode(&(over - 1).to_le_bytes()), Ok(None));
    for kind in [0, 3, 34, 53, 255] {
        assert_eq!(decode(&raw(kind, b"")), Err(FrameError::UnknownKind(kind)));
    }
    let malformed = |kind, source| Err(FrameError::Malformed { kind, source });
    let truncated = BodyError::Truncated { field: "sent_us" };
    assert_eq!(decode(&raw(17, &[0; 7])), malformed(17, truncated));
    assert_eq!(decode(&raw(17, &[0; 9])), malformed(17, BodyError::Trailing(1)));
    assert_eq!(
        decode(&raw(2, b"\x01\xff\xff\xff\xff")),
        malformed(2, BodyError::Truncated { field: "text" }),
    );
    let mut request = [0; 15];
    request[14] = 8;
    let flags = BodyError::Invalid { field: "flags", value: 8 };
    assert_eq!(decode(&raw(32, &request)), malformed(32, flags));
    request[14] = 2;
    let once = BodyError::Truncated { field: "once" };
    assert_eq!(decode(&raw(32, &request)), malformed(32, once));
    request[14] = 4;
    let trace = BodyError::Truncated { field: "trace" };
    assert_eq!(decode(&raw(32, &request)), malformed(32, trace));
    for workers in [0, 1] {
        let worker = BodyError::Invalid { field: "worker", value: 1 };
        assert_eq!(decode(&raw(23, &[1, 0, workers, 0])), malformed(23, worker));
    }
    let led = BodyError::Truncated { field: "led" };
    assert_eq!(decode(&raw(23, &[0, 0, 1, 0, 5, 0, 6])), malformed(23, led));
    let mut long = vec![1];
    crate::native::put_bytes(&mut long, &[b'x'; 513]);
    let too_long = BodyError::TooMany { field: "text", count: 513, limit: 512 };
    assert_eq!(decode(&raw(52, &long)), malformed(52, too_long));
}

#[test]
fn a_payload_is_written_in_place() {
    let mut out = b"before".to_vec();
    let frame = Frame::Raft { partition: 7, bytes: b"" };
    encode_with(&mut out, &frame, |out| out.extend_from_slice(b"message")).unwrap();
    let (frame, taken) = decode(&out[6..]).unwrap().unwrap();
    assert_eq!(frame, Frame::Raft { partition: 7, bytes: b"message" });
    assert_eq!(taken, out.len() - 6);
}

#[test]
fn a_frame_over_the_limit_leaves_the_buffer_as_it_was() {
    let mut out = b"before".to_vec();
    let payload = vec![0; MAX_FRAME_BYTES - 2];
    let frame = Frame::Raft { partition: 7, bytes: &payload };
    assert_eq!(encode(&mut out, &frame), Err(FrameTooLarge(MAX_FRAME_BYTES + 1)));
    assert_eq!(out, b"before");
    let frame = Frame::Raft { partition: 7, bytes: &payload[1..] };
    encode(&mut out, &frame).unwrap();
    assert_eq!(decode(&out[6..]), Ok(Some((frame, out.len() - 6))));
}

#[test]
fn a_long_text_is_cut_at_a_character() {
    let text = "ä".repeat(400);
    let bytes = bytes_of(&Frame::Failed { reason: 3, text: &text[..799 - 1] });
    let (frame, _) = decode(&bytes).unwrap().unwrap();
    assert_eq!(frame, Frame::Failed { reason: 3, text: &text[..512] });
}

#[test]
fn reasons_have_the_numbers_that_they_are_sent_with() {
    for number in 0..=u8::MAX {
        let refusal = Refusal::from_number(number);
        assert!(refusal.is_none_or(|reason| reason as u8 == number));
        assert_eq!(refusal.is_some(), (1..=6).contains(&number));
        let failure = Failure::from_number(number);
        assert!(failure.is_none_or(|reason| reason as u8 == number));
        assert_eq!(failure.is_some(), (1..=5).contains(&number));
    }
}

/// The material of a frame of any kind.
#[derive(Clone, Debug)]
struct Parts {
    kind: usize,
    numbers: [u64; 6],
    small: (u16, u8, u32),
    choice: (bool, bool),
    bytes: Vec<u8>,
    text: String,
}

fn parts() -> impl Strategy<Value = Parts> {
    let bytes = vec(any::<u8>(), 0..60);
    (
        0..17_usize,
        any::<[u64; 6]>(),
        any::<(u16, u8, u32)>(),
        any::<(bool, bool)>(),
        bytes,
        ".{0,40}",
    )
        .prop_map(|(kind, numbers, small, choice, bytes, text)| Parts {
            kind,
            numbers,
            small,
            choice,
            bytes,
            text,
        })
}

impl Parts {
    fn frame(&self) -> Frame<'_> {
        let [one, two, three, four, five, _] = self.numbers;
        let (partition, reason, half) = self.small;
        let (bytes, text) = (self.bytes.as_slice(), self.text.as_str());
        match self.kind {
            0 => Frame::Welcome { version: partition, instance: one },
            1 => Frame::Refused { reason, text },
            2 => Frame::Raft { partition, bytes },
            3 => Frame::Beat { sent_us: one },
            4 => Frame::BeatReply { sent_us: one },
            5 => Frame::Sleep { partition, term: one, index: two },
            6 => Frame::Asleep { partition, term: one },
            7 => Frame::Wake { partition, term: one },
            8 => Frame::Request(Request {
                id: one,
                partition,
                deadline_ms: half,
                stale: self.choice.0,
                once: self.choice.1.then_some((two, three, four)),
                trace: self.bytes.first_chunk(),
                payload: bytes,
            }),
            9 => Frame::Response { id: one, payload: bytes },
            10 => Frame::Offer(SnapshotOffer {
                partition,
                replica_from: one,
                replica_to: two,
                term: three,
                index: four,
                size: five,
                meta: bytes,
            }),
            11 => Frame::Accept { from_chunk: one, crc: half },
            12 => Frame::Chunk { number: one, crc: half, bytes },
            13 => Frame::Done { chunks: one },
            14 => Frame::Gone { partition, replica: one },
            15 => {
                let whole = bytes.len() - bytes.len() % 10;
                let led = Led::new(&bytes[..whole]).expect("whole ones");
                let workers = u16::from(reason) + 1;
                Frame::Leads { worker: partition % workers, workers, led }
            }
            _ => Frame::Failed { reason, text },
        }
    }
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in(parts in parts(), more in vec(any::<u8>(), 0..20)) {
        let frame = parts.frame();
        let mut bytes = bytes_of(&frame);
        for end in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..end]), Ok(None));
        }
        let length = bytes.len();
        bytes.extend_from_slice(&more);
        prop_assert_eq!(decode(&bytes), Ok(Some((frame, length))));
    }

    #[test]
    fn hellos_come_out_as_they_went_in(
        versions in any::<(u16, u16)>(), bulk in any::<bool>(), worker in any::<u16>(),
        nodes in any::<(u32, u32)>(), numbers in any::<(u64, u64)>(),
    ) {
        let hello = Hello {
            min_version: versions.0,
            max_version: versions.1,
            kind: if bulk { LinkKind::Bulk } else { LinkKind::Frames },
            worker,
            cluster: numbers.0,
            from: nodes.0,
            to: nodes.1,
            instance: numbers.1,
        };
        let mut out = Vec::new();
        encode_hello(&mut out, &hello);
        prop_assert_eq!(decode_hello(&out), Ok(Some(hello)));
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        exercise(&bytes);
    }

    /// Bytes that get past the length and the kind.
    #[test]
    fn any_body_is_taken_or_refused(kind in any::<u8>(), body in vec(any::<u8>(), 0..100)) {
        exercise(&raw(kind, &body));
    }

    #[test]
    fn a_damaged_frame_is_taken_or_refused(parts in parts(), at in any::<usize>(), bit in 0..8_u8) {
        let mut bytes = bytes_of(&parts.frame());
        let at = at % bytes.len();
        bytes[at] ^= 1_u8 << bit;
        exercise(&bytes);
    }
}
