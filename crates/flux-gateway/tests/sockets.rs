//! The gateway on real sockets: limits, slow clients and shutdown.

#[path = "../../flux-client/tests/fake/mod.rs"]
mod fake;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use fake::{Act, Fake};
use flux_client::{Client, Config};
use flux_gateway::{Drained, Options, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Server {
    fake: Fake,
    addr: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<io::Result<Drained>>,
}

async fn server(fake: Fake, options: Options) -> Server {
    let client = Client::connect(Config::new([fake.addr.to_string()])).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let served = tokio::spawn(serve(listener, client, options, shutdown));
    Server { fake, addr, stop, served }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }
}

/// Everything until the other side closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// One response, as far as its Content-Length goes.
async fn response(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    loop {
        let read = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = read.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if length.is_some_and(|length| length.parse() == Ok(body.len())) {
                return read;
            }
        }
        assert_ne!(stream.read_buf(&mut text).await.unwrap(), 0, "closed after {read:?}");
    }
}

const GET: &[u8] = b"GET /api/v1/kv?key=a HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test]
async fn requests_follow_each_other_on_a_connection() {
    let server = server(Fake::start().await, Options::default()).await;
    server.fake.put(b"a", b"1");
    let mut stream = server.connect().await;
    for _ in 0..3 {
        stream.write_all(GET).await.unwrap();
        let text = response(&mut stream).await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(text.ends_with(r#"{"value":"1","found":true}"#), "{text}");
    }
    let post = "POST /api/v1/kv HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
        Content-Type: application/x-www-form-urlencoded\r\n\r\n5\r\nkey=b\r\n8\r\n&value=2\r\n0\r\n\r\n";
    for piece in post.as_bytes().chunks(7) {
        stream.write_all(piece).await.unwrap();
        stream.flush().await.unwrap();
    }
    assert!(response(&mut stream).await.ends_with(r#"{"success":true}"#));
    assert_eq!(server.fake.entry(b"b").unwrap().value, b"2");
}

#[tokio::test]
async fn a_head_that_does_not_end_and_an_idle_connection_are_closed() {
    let options = Options { header_timeout: Duration::from_millis(100), ..Options::default() };
    let server = server(Fake::start().await, options).await;
    let mut slow = server.connect().await;
    slow.write_all(b"GET /health HTTP/1.1\r\nHost:").await.unwrap();
    assert!(!rest(&mut slow).await.contains("200 OK"));
    let mut silent = server.connect().await;
    assert_eq!(rest(&mut silent).await, "");
    let mut idle = server.connect().await;
    idle.write_all(GET).await.unwrap();
    let text = rest(&mut idle).await;
    assert!(text.starts_with("HTTP/1.1 404 Not Found"), "{text}");
}

#[tokio::test]
async fn a_body_that_does_not_end_is_answered() {
    let options = Options { body_timeout: Duration::from_millis(100), ..Options::default() };
    let server = server(Fake::start().await, options).await;
    let mut slow = server.connect().await;
    let head = "POST /api/v1/kv HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\
        Content-Type: application/x-www-form-urlencoded\r\n\r\nkey=a&value=1";
    slow.write_all(head.as_bytes()).await.unwrap();
    let text = rest(&mut slow).await;
    assert!(text.starts_with("HTTP/1.1 408 Request Timeout"), "{text}");
    assert!(text.contains(r#""code":"DEADLINE_EXCEEDED""#), "{text}");
    let mut short = server.connect().await;
    short.write_all(head.as_bytes()).await.unwrap();
    short.shutdown().await.unwrap();
    assert!(!rest(&mut short).await.contains("200 OK"));
    assert_eq!(server.fake.len(), 0);
}

#[tokio::test]
async fn connections_over_the_limit_are_told_so() {
    let options = Options { max_connections: 0, max_watches: 1, ..Options::default() };
    let server = server(Fake::start().await, options).await;
    let mut first = server.connect().await;
    first.write_all(GET).await.unwrap();
    response(&mut first).await;
    let text = response(&mut server.connect().await).await;
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable"), "{text}");
    assert!(text.contains(r#"{"error":{"code":"TOO_MANY_CLIENTS","#), "{text}");
    drop(first);
    let served = async {
        loop {
            let mut stream = server.connect().await;
            // A refused connection may be reset before the request is written.
            let _ = stream.write_all(GET).await;
            let mut head = [0; 12];
            if stream.read_exact(&mut head).await.is_ok() && head.ends_with(b"404") {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), served).await.expect("there is room again");
}

#[tokio::test]
async fn requests_over_the_limit_are_refused_and_health_is_not() {
    let (seen, mut was_seen) = tokio::sync::mpsc::unbounded_channel();
    let fake = Fake::with_script(move |_, _| {
        seen.send(()).unwrap();
        Act::Hang
    })
    .await;
    let server = server(fake, Options { max_requests: 1, ..Options::default() }).await;
    let mut first = server.connect().await;
    first.write_all(GET).await.unwrap();
    was_seen.recv().await.unwrap();
    let mut second = server.connect().await;
    second.write_all(GET).await.unwrap();
    let text = response(&mut second).await;
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable"), "{text}");
    assert!(text.contains("retry-after: 1") && text.contains("OVERLOADED"), "{text}");
    second.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(response(&mut second).await.starts_with("HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn strange_bytes_get_an_error_and_others_go_on() {
    let server = server(Fake::start().await, Options::default()).await;
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(200_000));
    let headers = format!("GET /health HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(1 << 20));
    for bytes in [
        &b"\xf1FLUX\0\x01\0\x01\0\0\0\r\n\r\n"[..],
        b"*1\r\n$4\r\nPING\r\n",
        long.as_bytes(),
        headers.as_bytes(),
    ] {
        let mut stream = server.connect().await;
        let _ = stream.write_all(bytes).await;
        let mut text = Vec::new();
        // The rest of what was sent may meet a closed socket.
        let _ = stream.read_to_end(&mut text).await;
        let text = String::from_utf8_lossy(&text);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    let mut stream = server.connect().await;
    stream.write_all(GET).await.unwrap();
    assert!(response(&mut stream).await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn shutdown_finishes_what_is_under_way() {
    let (seen, mut was_seen) = tokio::sync::mpsc::unbounded_channel();
    let fake = Fake::with_script(move |number, _| {
        seen.send(()).unwrap();
        if number == 0 { Act::Serve } else { Act::Hang }
    })
    .await;
    let options = Options { drain_timeout: Duration::from_millis(300), ..Options::default() };
    let server = server(fake, options).await;
    let mut idle = server.connect().await;
    idle.write_all(GET).await.unwrap();
    response(&mut idle).await;
    let mut hanging = server.connect().await;
    hanging.write_all(GET).await.unwrap();
    was_seen.recv().await.unwrap();
    was_seen.recv().await.unwrap();

    server.stop.send(()).unwrap();
    assert_eq!(rest(&mut idle).await, "");
    let drained = server.served.await.unwrap().unwrap();
    assert_eq!(drained, Drained { finished: 1, cut_off: 1 });
    assert!(TcpStream::connect(server.addr).await.is_err());
}
