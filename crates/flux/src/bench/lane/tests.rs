//! One connection of the load generator against servers that stall, lie or go away.

use std::{collections::BTreeMap, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::bench::{
    pace::Schedule,
    random::Distribution,
    wire::Resp,
    workload::{Mix, Shape},
};

const MS: Duration = Duration::from_millis(1);

fn shape() -> Shape {
    Shape {
        mix: Mix::only(Operation::Get),
        distribution: Some(Distribution::Uniform),
        keys: 10,
        key_size: 8,
        value_size: 8,
        ttl_ms: None,
        seed: 1,
    }
}

fn lane(pace: Pace, pipeline: usize, window: Window, quota: Option<u64>) -> Lane<Resp> {
    Lane {
        wire: Resp,
        workload: Workload::new(shape(), 0, 1),
        pace,
        pipeline,
        window,
        quota,
        timer: Timer::coarse(),
        measurements: Rc::default(),
        shared: Shared::default(),
        slots: None,
        traffic: Traffic::default(),
    }
}

fn window(start: Instant, duration: Duration) -> Window {
    let stop_at = start + duration;
    Window {
        measure_from: start,
        stop_at: Some(stop_at),
        give_up_at: Some(stop_at + Duration::from_secs(10)),
    }
}

const GET_BYTES: usize = b"*2\r\n$3\r\nGET\r\n$8\r\nkey:0000\r\n".len();

/// Answers every request after a millisecond, but takes a nap of `stall` before the request number
/// `stall_at`. Gives the greatest number of requests that were waiting at one time.
async fn server(mut stream: DuplexStream, stall_at: usize, stall: Duration) -> usize {
    let (mut served, mut most) = (0, 0);
    let mut input = Vec::new();
    loop {
        input.reserve(1 << 16);
        match stream.read_buf(&mut input).await {
            Ok(0) | Err(_) => return most,
            Ok(_) => {}
        }
        most = most.max(input.len() / GET_BYTES);
        while input.len() >= GET_BYTES {
            input.drain(..GET_BYTES);
            tokio::time::sleep(if served == stall_at { stall } else { MS }).await;
            served += 1;
            if stream.write_all(b"$-1\r\n").await.is_err() {
                return most;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_loop_counts_a_stall_for_every_request_that_was_due_in_it() {
    let start = Instant::now();
    // 100 requests a second for 10 seconds; the server stalls for 2 seconds in between.
    let pace = Pace::Open(Schedule::new(start, 100.0, 0, 1));
    let mut lane = lane(pace, 1, window(start, 10_000 * MS), None);
    let (client, remote) = duplex(1 << 16);
    let serving = tokio::spawn(server(remote, 300, 2000 * MS));
    lane.run(vec![client]).await.expect("the server stays");
    lane.count_unsent();
    let most = serving.await.expect("the server ends");
    let measurements = lane.measurements.borrow();
    let latencies = measurements.latencies(Operation::Get);
    assert_eq!(latencies.len(), 1000);
    assert_eq!((measurements.unsent, measurements.errors.len()), (0, 0));
    assert_eq!(most, 1, "no more than the pipeline is in flight");
    // 200 requests were due in the stall, evenly spread over it: about 100 waited over a second.
    let second = 1_000_000_000;
    let waited = latencies.len() - latencies.count_between(0, second);
    assert!((95..=125).contains(&waited), "{waited}");
    assert!(latencies.max() >= 2 * second - second / 100);
    assert!(latencies.value_at_quantile(0.5) < 3_000_000);
}

#[tokio::test(start_paused = true)]
async fn a_closed_loop_waits_for_the_stalled_server() {
    let start = Instant::now();
    let mut lane = lane(Pace::Closed, 1, window(start, 10_000 * MS), None);
    let (client, remote) = duplex(1 << 16);
    let serving = tokio::spawn(server(remote, 300, 2000 * MS));
    lane.run(vec![client]).await.expect("the server stays");
    serving.await.expect("the server ends");
    let measurements = lane.measurements.borrow();
    let latencies = measurements.latencies(Operation::Get);
    let slow = latencies.len() - latencies.count_between(0, 100_000_000);
    assert_eq!(slow, 1, "only the one request that met the stall");
    assert!((7_900..=8_002).contains(&latencies.len()), "{}", latencies.len());
}

#[tokio::test(start_paused = true)]
async fn what_an_overrun_open_loop_cannot_send_is_counted() {
    let start = Instant::now();
    // 2000 a second, where the server takes 1000: without time to catch up half are left over.
    let pace = Pace::Open(Schedule::new(start, 2000.0, 0, 1));
    let mut no_grace = window(start, 1000 * MS);
    no_grace.give_up_at = no_grace.stop_at;
    let mut lane = lane(pace, 10, no_grace, None);
    let (client, remote) = duplex(1 << 16);
    let serving = tokio::spawn(server(remote, usize::MAX, MS));
    lane.run(vec![client]).await.expect("the server stays");
    lane.count_unsent();
    // One may be with the server while the others wait.
    let most = serving.await.expect("the server ends");
    assert!((9..=10).contains(&most), "the pipeline was full: {most}");
    let measurements = lane.measurements.borrow();
    let answered = measurements.latencies(Operation::Get).len();
    let open = measurements.errors[NO_REPLY];
    assert!((980..=1000).contains(&answered), "{answered}");
    assert_eq!(answered + open + measurements.unsent, 2000);
}

#[tokio::test(start_paused = true)]
async fn a_quota_ends_a_closed_loop_and_warming_up_is_not_measured() {
    let start = Instant::now();
    let window = Window { measure_from: start + 500 * MS, stop_at: None, give_up_at: None };
    let mut lane = lane(Pace::Closed, 16, window, Some(100));
    let (client, remote) = duplex(1 << 16);
    let serving = tokio::spawn(server(remote, usize::MAX, MS));
    lane.run(vec![client]).await.expect("the server stays");
    assert_eq!(serving.await.expect("the server ends"), 16);
    assert_eq!(lane.measurements.borrow().latencies(Operation::Get).len(), 100);
    assert!(lane.shared.answered.load(Ordering::Relaxed) > 500);
    assert!(lane.is_over());
}

#[tokio::test(start_paused = true)]
async fn errors_and_lost_connections_are_counted_by_kind() {
    let start = Instant::now();
    let mut lane = lane(Pace::Closed, 4, window(start, 10 * MS), None);
    let (client, mut remote) = duplex(1 << 16);
    let serving = tokio::spawn(async move {
        let mut input = vec![0; 4 * GET_BYTES];
        remote.read_exact(&mut input).await.expect("a batch");
        let replies = b"-OVERLOADED busy\r\n+OK\r\n-ERR no\r\n";
        remote.write_all(replies).await.expect("the client reads");
    });
    lane.run(vec![client]).await.expect_err("the server went away");
    serving.await.expect("the server ends");
    let kinds = [("OVERLOADED", 1), ("ERR", 1), (CONNECTION_LOST, 1)];
    let expected: BTreeMap<_, _> = kinds.map(|(kind, count)| (kind.to_owned(), count)).into();
    assert_eq!(lane.measurements.borrow().errors, expected);
    assert_eq!(lane.measurements.borrow().latencies(Operation::Get).len(), 1);
    assert!(!lane.is_over());
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_nobody_asked_for_is_an_error() {
    let mut lane = lane(Pace::Closed, 1, window(Instant::now(), 10 * MS), None);
    let (client, mut remote) = duplex(1 << 16);
    remote.write_all(b"+OK\r\n+OK\r\n").await.expect("there is room");
    let error = lane.run(vec![client]).await.expect_err("two replies to one request");
    assert!(matches!(error, LaneError::Wire(WireError::Unasked)), "{error}");
}

/// A map in which the first node leads the lower half of the slots, and the second one the upper half.
async fn halves() -> Slots {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let ranges = b"*2\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\na\r\n:1\r\n\
            *3\r\n:8192\r\n:16383\r\n*2\r\n$1\r\nb\r\n:2\r\n";
        stream.write_all(ranges).await.expect("the client reads");
        stream
    });
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let slots = Slots::ask(&mut stream).await.expect("a good map");
    serving.await.expect("the server ends");
    slots
}

#[tokio::test]
async fn in_a_cluster_each_key_goes_to_its_leader_within_one_window() {
    let slots = halves().await;
    let window = Window { measure_from: Instant::now(), stop_at: None, give_up_at: None };
    let mut lane = lane(Pace::Closed, 10, window, Some(10));
    lane.slots = Some(slots.clone());
    let (lower, mut a) = duplex(1 << 16);
    let (upper, mut b) = duplex(1 << 16);
    let serving = tokio::spawn(async move {
        let mut counts = [0; 2];
        for (place, stream) in [&mut a, &mut b].into_iter().enumerate() {
            let mut input = vec![0; 10 * GET_BYTES];
            let read = stream.read(&mut input).await.expect("the client writes");
            for request in input[..read].chunks(GET_BYTES) {
                assert_eq!(slots.leader_of(&request[GET_BYTES - 10..GET_BYTES - 2]), place);
                counts[place] += 1;
                stream.write_all(b"$-1\r\n").await.expect("the client reads");
            }
        }
        counts
    });
    lane.run(vec![lower, upper]).await.expect("both stay");
    let counts = serving.await.expect("the server ends");
    assert!(counts[0] > 0 && counts[1] > 0 && counts[0] + counts[1] == 10, "{counts:?}");
    assert_eq!(lane.measurements.borrow().latencies(Operation::Get).len(), 10);
}

#[tokio::test]
async fn a_lane_ends_for_another_map_when_a_key_has_moved() {
    let mut lane = lane(Pace::Closed, 2, window(Instant::now(), 60_000 * MS), None);
    lane.slots = Some(halves().await);
    let (lower, a) = duplex(1 << 16);
    let (upper, b) = duplex(1 << 16);
    let serving = [a, b].map(|mut remote| {
        tokio::spawn(async move {
            let mut request = vec![0; GET_BYTES];
            while remote.read_exact(&mut request).await.is_ok() {
                remote.write_all(b"-MOVED 1 c:3\r\n").await.expect("the client reads");
            }
        })
    });
    lane.run(vec![lower, upper]).await.expect("both stay");
    for server in serving {
        server.await.expect("the server ends");
    }
    assert_eq!(lane.measurements.borrow().errors, BTreeMap::from([("MOVED".to_owned(), 2)]));
    assert!(!lane.is_over());
}
