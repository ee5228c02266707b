//! A connection over a pipe in memory, under a paused clock.

use flux_proto::native::{
    Opcode, Request, RequestHeader, Response, decode_request, encode_error, encode_request,
    encode_response,
};
use tokio::io::{DuplexStream, duplex, split};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::*;

const STALL: Duration = Duration::from_secs(10);

struct Rig {
    queue: mpsc::Sender<Submission>,
    room: Arc<Semaphore>,
    server: DuplexStream,
    end: JoinHandle<End>,
}

fn rig() -> Rig {
    let (client, server) = duplex(1 << 20);
    let (queue, mut receiver) = mpsc::channel(16);
    let end = tokio::spawn(async move {
        let (reader, writer) = split(client);
        run(reader, writer, BytesMut::new(), &mut receiver, STALL).await
    });
    Rig { queue, room: Arc::new(Semaphore::new(16)), server, end }
}

type Answer = oneshot::Receiver<Result<Bytes, Lost>>;

impl Rig {
    async fn submit(&self, payload: &[u8]) -> (Answer, Arc<AtomicBool>) {
        let mut frame = Vec::new();
        let header = RequestHeader::new(0, Opcode::Ping);
        encode_request(&mut frame, &header, &Request::Ping { payload }).unwrap();
        let claimed = Arc::new(AtomicBool::new(false));
        let (reply, answer) = oneshot::channel();
        let permit = Arc::clone(&self.room).acquire_owned().await.unwrap();
        let submission = Submission { frame, claimed: Arc::clone(&claimed), reply, permit };
        self.queue.send(submission).await.ok().unwrap();
        (answer, claimed)
    }

    /// The ids and payloads of the next `count` requests.
    async fn receive(&mut self, count: usize) -> Vec<(u64, Vec<u8>)> {
        let mut input = Vec::new();
        let mut requests = Vec::new();
        while requests.len() < count {
            self.server.read_buf(&mut input).await.unwrap();
            while let Some((frame, taken)) = decode_request(&input).unwrap() {
                requests.push((frame.header.id, frame.body.to_vec()));
                input.drain(..taken);
            }
        }
        requests
    }

    async fn answer(&mut self, id: u64, payload: &[u8]) {
        let mut out = Vec::new();
        encode_response(&mut out, id, Opcode::Ping, &Response::Pong { payload }).unwrap();
        self.server.write_all(&out).await.unwrap();
    }
}

fn payload(frame: &Bytes) -> &[u8] {
    decode_response(frame).unwrap().unwrap().0.body
}

#[tokio::test(start_paused = true)]
async fn answers_are_matched_by_id_in_any_order() {
    let mut rig = rig();
    let (first, _) = rig.submit(b"1").await;
    let (second, _) = rig.submit(b"2").await;
    let requests = rig.receive(2).await;
    assert_eq!(requests, [(1, b"1".to_vec()), (2, b"2".to_vec())]);
    rig.answer(2, b"two").await;
    assert_eq!(payload(&second.await.unwrap().unwrap()), b"two");
    rig.answer(1, b"one").await;
    assert_eq!(payload(&first.await.unwrap().unwrap()), b"one");
    assert_eq!(rig.room.available_permits(), 16);
}

#[tokio::test(start_paused = true)]
async fn what_was_given_up_is_never_sent() {
    let mut rig = rig();
    let (dropped, _) = rig.submit(b"dropped").await;
    drop(dropped);
    let (late, claimed) = rig.submit(b"late").await;
    claimed.store(true, Ordering::Release);
    let (_wanted, claimed) = rig.submit(b"wanted").await;
    assert_eq!(rig.receive(1).await, [(1, b"wanted".to_vec())]);
    assert!(claimed.load(Ordering::Acquire));
    assert!(late.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_answers_nothing_is_given_up() {
    let mut rig = rig();
    // Idle is not stalled.
    tokio::time::sleep(STALL * 10).await;
    let started = Instant::now();
    let (answer, _) = rig.submit(b"1").await;
    rig.receive(1).await;
    assert!(matches!(answer.await.unwrap(), Err(Lost::Broken(_))));
    assert!(started.elapsed() >= STALL && started.elapsed() <= STALL * 2);
    assert!(!rig.end.await.unwrap().answered);
}

#[tokio::test(start_paused = true)]
async fn the_last_words_of_a_node_tell_what_became_of_requests() {
    for (code, certain) in [(Code::Stopping, true), (Code::OutcomeUnknown, false)] {
        let mut rig = rig();
        let (answer, _) = rig.submit(b"1").await;
        rig.receive(1).await;
        let mut out = Vec::new();
        encode_error(&mut out, 0, 0, code, "bye");
        rig.server.write_all(&out).await.unwrap();
        let lost = answer.await.unwrap().unwrap_err();
        let expected = if certain {
            Lost::Refused(code, "bye".to_owned())
        } else {
            Lost::Broken("bye".to_owned())
        };
        assert_eq!(lost, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn strange_bytes_end_the_connection() {
    let nobody = {
        let mut out = Vec::new();
        let pong = Response::Pong { payload: b"" };
        encode_response(&mut out, 77, Opcode::Ping, &pong).unwrap();
        out
    };
    for bytes in [&nobody[..], b"\0\0\0\0", b"\xff\xff\xff\xff"] {
        let mut rig = rig();
        let (answer, _) = rig.submit(b"1").await;
        rig.receive(1).await;
        rig.server.write_all(bytes).await.unwrap();
        assert!(matches!(answer.await.unwrap(), Err(Lost::Broken(_))), "{bytes:?}");
    }
}
