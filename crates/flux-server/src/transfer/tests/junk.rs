//! A sender that says what no sender should.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener as StdListener, TcpStream as StdStream};

use flux_proto::peer::{Failure, Frame, decode, encode};

use super::*;

/// A connection to the receiver, on which nothing is said yet.
fn dial(pair: &Pair) -> StdStream {
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let near = StdStream::connect(listener.local_addr().unwrap()).unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    let (far, _) = listener.accept().unwrap();
    far.set_nonblocking(true).unwrap();
    let stream = mio::net::TcpStream::from_std(far);
    pair.door.receive(BulkStream { from: 1, stream, input: Vec::new() });
    near
}

fn say(stream: &mut StdStream, frames: &[Frame<'_>]) {
    let mut bytes = Vec::new();
    for frame in frames {
        encode(&mut bytes, frame).unwrap();
    }
    // The receiver may have heard enough.
    let _ = stream.write_all(&bytes);
}

/// What the receiver says until it closes the connection: whether it accepted, and why it failed.
fn hear(mut stream: StdStream) -> (bool, Option<Failure>) {
    let mut bytes = Vec::new();
    // A reset may follow what it said.
    let _ = stream.read_to_end(&mut bytes);
    let (mut accepted, mut failure, mut rest) = (false, None, bytes.as_slice());
    while let Some((frame, taken)) = decode(rest).unwrap() {
        match frame {
            Frame::Accept { from_chunk: 0, .. } => accepted = true,
            Frame::Failed { reason, .. } => failure = Failure::from_number(reason),
            other => panic!("{other:?}"),
        }
        rest = &rest[taken..];
    }
    (accepted, failure)
}

fn offer(meta: &[u8]) -> SnapshotOffer<'_> {
    SnapshotOffer {
        partition: PARTITION,
        replica_from: SENDER,
        replica_to: REPLICA,
        term: 8,
        index: INDEX,
        size: 1000,
        meta,
    }
}

fn chunk(number: u64, bytes: &[u8]) -> Frame<'_> {
    Frame::Chunk { number, crc: crc32c::crc32c(bytes), bytes }
}

#[test]
fn bad_transfers_end_and_leave_nothing() {
    let pair = Pair::new(quick(), vec![]);
    write_snapshot(&pair.from, SnapshotId { partition: PARTITION, index: INDEX }, 3);
    let mut good = Snapshot::open(&pair.from, id(PARTITION)).unwrap();
    let good = good.next_chunk().unwrap().unwrap().to_vec();
    let meta = meta(INDEX).encode();
    let fine = offer(&meta);
    let crc = crc32c::crc32c(&good);
    let large = vec![0; 1001];
    let damaged = (true, Some(Failure::Damaged));
    for (frames, heard) in [
        (vec![chunk(1, &good)], damaged),
        (vec![chunk(0, &good), chunk(0, &good)], damaged),
        (vec![Frame::Chunk { number: 0, crc: crc ^ 1, bytes: &good }], damaged),
        (vec![chunk(0, &good[1..])], damaged),
        (vec![chunk(0, b"\xff")], damaged),
        (vec![chunk(0, &large)], damaged),
        (vec![chunk(0, &good), Frame::Done { chunks: 2 }], damaged),
        (vec![Frame::Done { chunks: 1 }], damaged),
        (vec![Frame::Beat { sent_us: 1 }], (true, None)),
        (vec![Frame::Offer(fine)], (true, None)),
        (vec![Frame::Failed { reason: 4, text: "no disk" }], (true, None)),
    ] {
        let mut stream = dial(&pair);
        say(&mut stream, &[Frame::Offer(fine)]);
        say(&mut stream, &frames);
        assert_eq!(hear(stream), heard, "{frames:?}");
    }

    let other = SnapshotOffer { index: INDEX + 1, ..fine };
    let not_meta = SnapshotOffer { meta: b"?", ..fine };
    for (first, heard) in [
        (Frame::Offer(other), (false, Some(Failure::Damaged))),
        (Frame::Offer(not_meta), (false, Some(Failure::Damaged))),
        (chunk(0, &good), (false, None)),
        (Frame::Failed { reason: 4, text: "no disk" }, (false, None)),
    ] {
        let mut stream = dial(&pair);
        say(&mut stream, &[first]);
        assert_eq!(hear(stream), heard, "{first:?}");
    }

    let mut stream = dial(&pair);
    say(&mut stream, &[Frame::Offer(fine)]);
    stream.write_all(&[0xff; 100]).unwrap();
    assert_eq!(hear(stream), (true, None));

    assert!(pair.fake.arrivals.lock().is_empty());
    wait_until("nothing is left", || {
        Pair::names(&pair.to).is_empty() && pair.fake.memory.used() == 0
    });

    // The place is free for one that is good.
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
}

#[test]
fn another_snapshot_does_not_go_on_with_what_is_there() {
    let pair = Pair::new(quick(), vec![]);
    write_snapshot(&pair.from, id(PARTITION), 3);
    let mut good = Snapshot::open(&pair.from, id(PARTITION)).unwrap();
    let good = good.next_chunk().unwrap().unwrap().to_vec();
    let meta = meta(INDEX).encode();
    let fine = offer(&meta);
    // Until the end of the connection before is noticed, the receiver has no room.
    let break_off = || {
        wait_until("it is accepted", || {
            let mut stream = dial(&pair);
            say(&mut stream, &[Frame::Offer(fine), chunk(0, &good)]);
            let mut answer = [0; 17];
            let _ = stream.read_exact(&mut answer);
            matches!(decode(&answer), Ok(Some((Frame::Accept { from_chunk: 0, .. }, _))))
        });
    };
    let first_chunk = |offer: SnapshotOffer<'_>| {
        let mut number = None;
        wait_until("it is accepted", || {
            let mut stream = dial(&pair);
            say(&mut stream, &[Frame::Offer(offer)]);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            if let Ok(Some((Frame::Accept { from_chunk, .. }, _))) = decode(&bytes) {
                number = Some(from_chunk);
            }
            number.is_some()
        });
        number.unwrap()
    };
    break_off();
    assert_eq!(first_chunk(fine), 1);
    assert_eq!(first_chunk(SnapshotOffer { term: 9, ..fine }), 1);
    for other in [
        SnapshotOffer { replica_from: SENDER + 1, ..fine },
        SnapshotOffer { replica_to: REPLICA + 1, ..fine },
        SnapshotOffer { size: 1001, ..fine },
    ] {
        break_off();
        wait_until("what broke off is there", || first_chunk(fine) == 1);
        assert_eq!(first_chunk(other), 0, "{other:?}");
    }
}
