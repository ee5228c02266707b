//! The gateway's routes and errors, against a node in this process.

#[path = "../../flux-client/tests/fake/mod.rs"]
mod fake;

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use axum::response::Response;
use fake::{Act, Fake};
use flux_client::{Client, Code, Config, Expiry, TraceContext};
use flux_gateway::{Options, router};
use serde_json::{Value, json};
use tower::ServiceExt;

const JSON: &str = "application/json";
const FORM: &str = "application/x-www-form-urlencoded";

struct Gateway {
    fake: Fake,
    router: axum::Router,
}

async fn gateway() -> Gateway {
    with_fake(Fake::start().await).await
}

async fn with_fake(fake: Fake) -> Gateway {
    let client = Client::connect(Config::new([fake.addr.to_string()])).await.unwrap();
    Gateway { fake, router: router(client, &Options::default()) }
}

impl Gateway {
    async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn ask(&self, method: Method, uri: &str) -> (StatusCode, Value) {
        let request = Request::builder().method(method).uri(uri).body(Body::empty()).unwrap();
        read(self.send(request).await).await
    }

    async fn post(&self, kind: &str, body: impl Into<Body>) -> (StatusCode, Value) {
        read(self.send(post(kind, body)).await).await
    }
}

fn post(kind: &str, body: impl Into<Body>) -> Request<Body> {
    let request = Request::post("/api/v1/kv").header(header::CONTENT_TYPE, kind);
    request.body(body.into()).unwrap()
}

async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    assert_eq!(response.headers()[header::CONTENT_TYPE], JSON);
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

/// The code of an error in the one shape, whose message is checked for some words.
#[track_caller]
fn fault((status, body): (StatusCode, Value), words: &str) -> (u16, String) {
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains(words), "{words:?} is not in {message:?}");
    assert_eq!(body.as_object().unwrap().len(), 1);
    (status.as_u16(), body["error"]["code"].as_str().unwrap().to_owned())
}

fn invalid() -> (u16, String) {
    (400, "INVALID_ARGUMENT".to_owned())
}

#[tokio::test]
async fn set_get_delete() {
    let gateway = gateway().await;
    let uri = "/api/v1/kv?key=hello%20w%C3%B6rld";
    assert_eq!(
        gateway.ask(Method::GET, uri).await,
        (StatusCode::NOT_FOUND, json!({"value": "", "found": false})),
    );
    let done = (StatusCode::OK, json!({"success": true}));
    assert_eq!(gateway.post(FORM, "key=hello+w%C3%B6rld&value=a%26b").await, done);
    assert_eq!(
        gateway.ask(Method::GET, uri).await,
        (StatusCode::OK, json!({"value": "a&b", "found": true})),
    );
    let body = json!({"key": "hello wörld", "value": "\u{0}\"", "ttl": 60}).to_string();
    assert_eq!(gateway.post("application/json; charset=UTF-8", body).await, done);
    let entry = gateway.fake.entry("hello wörld".as_bytes()).unwrap();
    assert_eq!((entry.value.as_slice(), entry.expiry), (&b"\0\""[..], Expiry::In(60_000)));
    assert_eq!(gateway.ask(Method::DELETE, uri).await, done);
    assert_eq!(gateway.ask(Method::DELETE, uri).await, done);
    assert_eq!(gateway.fake.len(), 0);
}

#[tokio::test]
async fn the_trace_of_a_write_is_handed_on() {
    let gateway = gateway().await;
    let send =
        async |request: axum::http::request::Builder, traces: &[&str], body: &'static str| {
            let add = |request: axum::http::request::Builder, one: &&str| {
                // Names of headers have no case.
                request.header("TraceParent", *one)
            };
            let request = traces.iter().fold(request, add);
            let response = gateway.send(request.body(body.into()).unwrap()).await;
            assert_eq!(response.status(), StatusCode::OK);
            gateway.fake.traces()
        };
    let set = || Request::post("/api/v1/kv").header(header::CONTENT_TYPE, FORM);
    let one = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let other = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let (trace, body) = (TraceContext::parse(one), "key=k&value=v");
    assert_eq!(send(set(), &[one], body).await, [trace]);
    assert_eq!(send(set(), &[&one.replacen("00", "01", 1)], body).await, [trace]);
    assert_eq!(send(set(), &[], body).await, [None]);
    let get = Request::get("/api/v1/kv?key=k");
    assert_eq!(send(get, &[one], "").await, []);
    for bad in [
        &["", other][..],
        &[one, one],
        &["00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
        &["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
        &["ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
        &["nonsense"],
    ] {
        assert_eq!(send(set(), bad, body).await, [None], "{bad:?}");
    }
    let delete = Request::delete("/api/v1/kv?key=k");
    assert_eq!(send(delete, &[other], "").await, [TraceContext::parse(other)]);
}

#[tokio::test]
async fn a_value_that_is_not_text_comes_as_base64() {
    let gateway = gateway().await;
    gateway.fake.put(b"raw", b"\xff\xfe\0");
    assert_eq!(
        gateway.ask(Method::GET, "/api/v1/kv?key=raw").await.1,
        json!({"value": "//4A", "found": true, "encoding": "base64"}),
    );
}

#[tokio::test]
async fn health_tells_the_time() {
    let (status, body) = gateway().await.ask(Method::GET, "/health").await;
    assert_eq!((status, &body["status"]), (StatusCode::OK, &json!("ok")));
    assert!(body["time"].as_u64().unwrap() > 1_700_000_000);
}

#[tokio::test]
async fn bad_input_is_named_and_nothing_is_stored() {
    let gateway = gateway().await;
    for (kind, body, words) in [
        (FORM, &b"key=k"[..], "missing field `value`"),
        (FORM, b"key=&value=v", "`key` is empty"),
        (FORM, b"key=k&value=v&value=w", "duplicate field `value`"),
        (FORM, b"key=k&value=%ff", "`value` is not UTF-8"),
        (FORM, b"key=k&value=\xff", "`value` is not UTF-8"),
        (FORM, b"key=%zz&value=v", "`key` has a `%`"),
        (FORM, b"key=k&value=v&ttl=0", "`ttl`"),
        (FORM, b"key=k&value=v&ttl=99999999999999999999", "`ttl`"),
        (JSON, b"", "not a JSON object"),
        (JSON, b"{\"key\":\"k\",\"value\":\"\xff\"}", "unicode"),
        (JSON, b"{\"key\":\"k\",\"value\":1}", "a string for `value`"),
        (JSON, b"{\"key\":\"k\",\"value\":\"v\",\"ttl\":-1}", "`ttl`"),
        (JSON, b"{\"key\":\"k\",\"value\":\"v\"", "EOF"),
    ] {
        assert_eq!(fault(gateway.post(kind, body.to_vec()).await, words), invalid(), "{words}");
    }
    let deep = format!("{{\"a\":{}", "[".repeat(1_000_000));
    assert_eq!(fault(gateway.post(JSON, deep).await, "unknown field `a`"), invalid());
    for (uri, words) in [
        ("/api/v1/kv", "missing field `key`"),
        ("/api/v1/kv?key=", "`key` is empty"),
        ("/api/v1/kv?key=a&key=b", "duplicate field `key`"),
        ("/api/v1/kv?key=%ff", "`key` is not UTF-8"),
        ("/api/v1/kv?key=a&x=1", "unknown field `x`"),
    ] {
        for method in [Method::GET, Method::DELETE] {
            assert_eq!(fault(gateway.ask(method, uri).await, words), invalid(), "{uri}");
        }
    }
    let twice = Request::post("/api/v1/kv?key=a").header(header::CONTENT_TYPE, FORM);
    let twice = gateway.send(twice.body(Body::from("key=k&value=v")).unwrap()).await;
    assert_eq!(fault(read(twice).await, "query string"), invalid());
    assert_eq!((gateway.fake.len(), gateway.fake.requests()), (0, 0));
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let gateway = gateway().await;
    let too_large = (413, "TOO_LARGE".to_owned());
    let key = "k".repeat(64 * 1024 + 1);
    let answer = gateway.post(FORM, format!("key={key}&value=v")).await;
    assert_eq!(fault(answer, "`key` of 65537 bytes"), too_large);
    let value = "v".repeat(16 * 1024 * 1024 + 1);
    let answer = gateway.post(FORM, format!("key=k&value={value}")).await;
    assert_eq!(fault(answer, "`value` of 16777217 bytes"), too_large);
    let answer = gateway.post(JSON, vec![b' '; 102 * 1024 * 1024]).await;
    assert_eq!(fault(answer, "the body is over"), too_large);
    assert_eq!(gateway.fake.requests(), 0);
}

#[tokio::test]
async fn the_largest_value_fits_with_every_byte_escaped() {
    let gateway = gateway().await;
    let escaped = "\\u0001".repeat(16 * 1024 * 1024);
    let (status, _) =
        gateway.post(JSON, format!("{{\"key\":\"k\",\"value\":\"{escaped}\"}}")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(gateway.fake.entry(b"k").unwrap().value, vec![1; 16 * 1024 * 1024]);
}

#[tokio::test]
async fn what_http_itself_refuses() {
    let gateway = gateway().await;
    let (status, body) = gateway.ask(Method::GET, "/api/v2/kv").await;
    assert_eq!(fault((status, body), "/api/v2/kv"), (404, "NOT_FOUND".to_owned()));

    let put = Request::put("/api/v1/kv?key=a").body(Body::empty()).unwrap();
    let response = gateway.send(put).await;
    let allow = response.headers()[header::ALLOW].to_str().unwrap().to_owned();
    for method in ["GET", "POST", "DELETE"] {
        assert!(allow.contains(method), "{allow}");
    }
    assert_eq!(fault(read(response).await, "PUT"), (405, "UNSUPPORTED".to_owned()));
    let answer = gateway.ask(Method::POST, "/health").await;
    assert_eq!(fault(answer, "POST").0, 405);

    let unsupported = (415, "UNSUPPORTED".to_owned());
    for kind in ["text/plain", "", "multipart/form-data; boundary=x"] {
        let answer = gateway.post(kind, "key=k&value=v").await;
        assert_eq!(fault(answer, "Content-Type"), unsupported, "{kind}");
    }
    let answer = gateway.post("application/json; charset=latin1", "{}").await;
    assert_eq!(fault(answer, "charset"), unsupported);
    let mut packed = post(JSON, "{}");
    packed.headers_mut().insert(header::CONTENT_ENCODING, "gzip".parse().unwrap());
    assert_eq!(fault(read(gateway.send(packed).await).await, "Encoding"), unsupported);
}

#[tokio::test]
async fn a_refusal_of_the_node_has_the_status_of_its_code() {
    for code in [
        Code::OutOfMemory,
        Code::DiskFull,
        Code::Overloaded,
        Code::LogFailed,
        Code::InvalidArgument,
        Code::Internal,
    ] {
        let gateway = with_fake(Fake::with_script(move |_, _| Act::Refuse(code)).await).await;
        let response = gateway.send(post(FORM, "key=k&value=v")).await;
        let hint = response.headers().contains_key(header::RETRY_AFTER);
        assert_eq!(hint, code == Code::Overloaded, "{code}");
        let expected = (code.http(), code.name().to_owned());
        assert_eq!(fault(read(response).await, "refused"), expected);
    }
}

#[tokio::test]
async fn an_outcome_that_is_not_known_is_not_called_failure() {
    let gateway = with_fake(Fake::with_script(|_, _| Act::Break).await).await;
    let answer = gateway.post(FORM, "key=k&value=v").await;
    assert_eq!(fault(answer, "may or may not"), (504, "OUTCOME_UNKNOWN".to_owned()));
    assert!(gateway.fake.entry(b"k").is_some());
}

#[tokio::test]
async fn without_a_node() {
    let Gateway { fake, router } = gateway().await;
    let addr = fake.stop().await;
    let answer = loop {
        let request = Request::get("/api/v1/kv?key=a").body(Body::empty()).unwrap();
        let answer = read(router.clone().oneshot(request).await.unwrap()).await;
        if answer.1["error"]["message"].as_str().unwrap().contains("no node") {
            break answer;
        }
    };
    assert!(!answer.1.to_string().contains(&addr.to_string()), "addresses are not shown");
    assert_eq!(fault(answer, "no node"), (503, "UNAVAILABLE".to_owned()));
    let health = Request::get("/health").body(Body::empty()).unwrap();
    assert_eq!(router.oneshot(health).await.unwrap().status(), StatusCode::OK);
}
