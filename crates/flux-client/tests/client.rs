//! The client against a node that serves, refuses, breaks and comes back.

mod fake;

use std::time::Duration;

use fake::{Act, Fake};
use flux_client::{
    BatchReply, Client, Code, Condition, Config, Counter, Credentials, DeleteReply, Error, Expiry,
    Guard, Retry, ScanOptions, SetOptions, Write, WriteResult,
};
use flux_proto::native::Request;
use tokio::net::TcpListener;

fn config(fake: &Fake) -> Config {
    Config { connections_per_endpoint: 1, ..Config::new([fake.addr.to_string()]) }
}

async fn connect(fake: &Fake) -> Client {
    Client::connect(config(fake)).await.unwrap()
}

fn once(condition: Condition) -> SetOptions {
    SetOptions { condition, ..SetOptions::default() }
}

#[tokio::test]
async fn every_operation() {
    let fake = Fake::start().await;
    let client = connect(&fake).await;
    client.ping().await.unwrap();
    assert_eq!(client.info().await.unwrap().leaders, vec![Some(0); 16]);

    assert_eq!(client.get(b"a").await, Ok(None));
    let reply = client.set(b"a", b"\0\xff", SetOptions::default()).await.unwrap();
    assert_eq!((reply.written, reply.version, reply.previous), (true, Some(1), None));
    let value = client.get(b"a").await.unwrap().unwrap();
    assert_eq!((value.bytes.as_ref(), value.version), (&b"\0\xff"[..], 1));

    let reply = client.set(b"a", b"x", once(Condition::IfAbsent)).await.unwrap();
    assert_eq!((reply.written, reply.version), (false, Some(1)));
    let swap = SetOptions {
        expiry: Expiry::In(9000),
        condition: Condition::IfVersion(1),
        return_previous: true,
    };
    let reply = client.set(b"a", b"y", swap).await.unwrap();
    assert!(reply.written);
    assert_eq!(reply.previous.unwrap().bytes.as_ref(), b"\0\xff");
    assert_eq!(client.get(b"a").await.unwrap().unwrap().expires_at_ms, Some(9000));
    assert_eq!(client.persist(b"a").await, Ok(true));
    assert_eq!(client.expire(b"none", Expiry::In(5)).await, Ok(false));

    assert_eq!(client.increment(b"n", -3).await, Ok(Counter { value: -3, version: 3 }));
    assert_eq!(client.delete(b"n", Condition::IfVersion(9)).await, Ok(DeleteReply::Conflict(3)));
    assert_eq!(client.delete(b"n", Condition::Always).await, Ok(DeleteReply::Deleted));
    assert_eq!(client.delete(b"n", Condition::Always).await, Ok(DeleteReply::Absent));

    let (expiry, condition) = (Expiry::Never, Condition::Always);
    let writes = [
        Write::Set { key: b"b", value: b"1", expiry, condition },
        Write::Increment { key: b"b", delta: 1 },
    ];
    let written = client.batch_write(&[Guard { key: b"c", version: 0 }], &writes).await.unwrap();
    let results =
        vec![WriteResult::Set { version: 4 }, WriteResult::Increment { value: 2, version: 5 }];
    assert_eq!(written, BatchReply::Written(results));
    let refused = client.batch_write(&[Guard { key: b"c", version: 7 }], &writes).await.unwrap();
    assert_eq!(refused, BatchReply::NotWritten { position: None });

    let values = client.batch_get(&[b"b", b"none", b"a"]).await.unwrap();
    let values: Vec<_> = values.into_iter().map(|value| value.map(|v| v.bytes)).collect();
    assert_eq!(values, [Some("2".into()), None, Some("y".into())]);

    let options = ScanOptions { limit: 1, ..ScanOptions::default() };
    let first = client.scan(&options, None).await.unwrap();
    assert_eq!(first.items[0].key.as_ref(), b"a");
    let second = client.scan(&options, first.cursor.as_deref()).await.unwrap();
    assert_eq!((second.items[0].key.as_ref(), second.cursor), (&b"b"[..], None));

    assert_eq!(fake.stale_reads(), 0);
    client.with_stale_reads().get(b"a").await.unwrap();
    client.with_stale_reads().increment(b"n", 1).await.unwrap();
    assert_eq!(fake.stale_reads(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_requests_share_a_connection() {
    let fake = Fake::start().await;
    let settings = Config { max_in_flight: 100, ..config(&fake) };
    let client = Client::connect(settings).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..200 {
        let client = client.clone();
        tasks.spawn(async move {
            for turn in 0..10 {
                let key = format!("{task}-{turn}");
                client.set(key.as_bytes(), key.as_bytes(), SetOptions::default()).await.unwrap();
                let value = client.get(key.as_bytes()).await.unwrap().unwrap();
                assert_eq!(value.bytes, key);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!((fake.requests(), fake.connections()), (4000, 1));
}

#[tokio::test]
async fn large_values_and_what_is_too_large() {
    let fake = Fake::start().await;
    let client = connect(&fake).await;
    let value = vec![7; flux_client::MAX_VALUE_BYTES];
    client.set(b"big", &value, SetOptions::default()).await.unwrap();
    assert_eq!(client.get(b"big").await.unwrap().unwrap().bytes, value);
    let over = vec![7; 18 << 20];
    let error = client.set(b"big", &over, SetOptions::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::TooLarge);
    assert_eq!(fake.requests(), 2);
}

#[tokio::test]
async fn a_write_refused_for_overload_is_sent_again() {
    let fake = Fake::with_script(|number, _| match number {
        0 | 1 => Act::Refuse(Code::Overloaded),
        _ => Act::Serve,
    })
    .await;
    let client = connect(&fake).await;
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 1);
    assert_eq!(fake.requests(), 3);
}

#[tokio::test]
async fn a_refusal_that_lasts_is_not_repeated() {
    let fake = Fake::with_script(|_, _| Act::Refuse(Code::OutOfMemory)).await;
    let client = connect(&fake).await;
    let error = client.increment(b"n", 1).await.unwrap_err();
    let message = "refused".to_owned();
    assert_eq!(error, Error::Refused { code: Code::OutOfMemory, message });
    assert_eq!(fake.requests(), 1);
}

#[tokio::test]
async fn retries_stay_within_attempts_and_budget() {
    let fake = Fake::with_script(|_, _| Act::Refuse(Code::Overloaded)).await;
    let backoff = Duration::from_millis(1);
    let retry = Retry { max_attempts: 3, reserve: 3, backoff, ..Retry::default() };
    let client = Client::connect(Config { retry, ..config(&fake) }).await.unwrap();
    let mut requests = Vec::new();
    for _ in 0..4 {
        let error = client.get(b"a").await.unwrap_err();
        assert_eq!(error.code(), Code::Overloaded);
        requests.push(fake.requests());
    }
    // Three attempts, then two with what is left of the reserve, then one each.
    assert_eq!(requests, [3, 5, 6, 7]);
}

#[tokio::test]
async fn a_broken_connection_repeats_reads_and_never_writes() {
    let fake = Fake::with_script(|number, _| match number {
        0 | 2 => Act::Break,
        _ => Act::Serve,
    })
    .await;
    let client = connect(&fake).await;
    let error = client.increment(b"n", 1).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown(_)), "{error:?}");
    assert_eq!(fake.requests(), 1);
    // It had taken place; the next call finds a new connection.
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 2);
    let value = client.get(b"n").await.unwrap().unwrap();
    assert_eq!(value.bytes.as_ref(), b"2");
    assert_eq!(fake.requests(), 4);
}

#[tokio::test]
async fn a_node_that_breaks_every_connection_is_given_a_rest() {
    let fake = Fake::with_script(|_, _| Act::Break).await;
    let retry = Retry { max_attempts: 1, ..Retry::default() };
    let reconnect_min = Duration::from_secs(60);
    let settings = Config { retry, reconnect_min, reconnect_max: reconnect_min, ..config(&fake) };
    let client = Client::connect(settings).await.unwrap();
    // The first connection did answer something: who leads.
    for _ in 0..3 {
        assert!(matches!(client.get(b"a").await, Err(Error::ConnectionLost(_))));
    }
    // Now calls fail at once, and nobody connects until the pause is over.
    for _ in 0..10 {
        assert!(matches!(client.get(b"a").await, Err(Error::Unavailable(_))));
    }
    assert_eq!((fake.requests(), fake.connections()), (3, 3));
}

#[tokio::test]
async fn a_node_that_parts_with_a_word_has_not_done_it() {
    let fake = Fake::with_script(|number, _| match number {
        1 => Act::Part(Code::Stopping),
        _ => Act::Serve,
    })
    .await;
    let client = connect(&fake).await;
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 1);
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 2);
    assert_eq!((fake.requests(), fake.connections()), (3, 2));
}

#[tokio::test]
async fn an_answer_that_makes_no_sense_leaves_a_write_undecided() {
    let fake = Fake::with_script(|_, _| Act::Babble).await;
    let client = connect(&fake).await;
    let write = client.set(b"a", b"b", SetOptions::default()).await.unwrap_err();
    assert!(matches!(write, Error::OutcomeUnknown(_)), "{write:?}");
    let read = client.get(b"a").await.unwrap_err();
    assert!(matches!(read, Error::Protocol(_)), "{read:?}");
    let fake = Fake::with_script(|_, _| Act::Refuse(Code::DeadlineExceeded)).await;
    let client = connect(&fake).await;
    let write = client.set(b"a", b"b", SetOptions::default()).await.unwrap_err();
    assert_eq!(write.code(), Code::OutcomeUnknown);
    assert_eq!(client.get(b"a").await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn no_answer_in_time() {
    let fake = Fake::with_script(|_, request| match request {
        Request::Ping { .. } => Act::Serve,
        _ => Act::Hang,
    })
    .await;
    let client = connect(&fake).await;
    let hasty = client.with_timeout(Duration::from_millis(300));
    assert_eq!(hasty.get(b"a").await, Err(Error::Timeout));
    let error = hasty.set(b"a", b"b", SetOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown(_)), "{error:?}");
    assert_eq!(fake.requests(), 2);
    // Others on the connection are not disturbed, and late calls still count as under way.
    client.ping().await.unwrap();
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn a_request_without_room_does_not_leave() {
    let fake = Fake::with_script(|_, _| Act::Hang).await;
    let settings = Config { max_in_flight: 1, ..config(&fake) };
    let client = Client::connect(settings).await.unwrap();
    let hasty = client.with_timeout(Duration::from_millis(300));
    assert_eq!(hasty.get(b"a").await, Err(Error::Timeout));
    let error = hasty.set(b"a", b"b", SetOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    assert_eq!(fake.requests(), 1);
}

#[tokio::test]
async fn a_node_that_is_away_fails_calls_until_it_is_back() {
    let fake = Fake::start().await;
    let settings = Config {
        reconnect_min: Duration::from_millis(5),
        reconnect_max: Duration::from_millis(20),
        ..config(&fake)
    };
    let client = Client::connect(settings).await.unwrap();
    client.ping().await.unwrap();
    let addr = fake.stop().await;
    let error = loop {
        match client.set(b"a", b"b", SetOptions::default()).await {
            Err(Error::OutcomeUnknown(_)) => {}
            Err(error) => break error,
            Ok(_) => panic!("nobody is there"),
        }
    };
    assert!(matches!(&error, Error::Unavailable(reason) if reason.contains(&addr.to_string())));

    let fake = Fake::on(TcpListener::bind(addr).await.unwrap(), |_, _| Act::Serve);
    let back = async {
        while client.set(b"a", b"b", SetOptions::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), back).await.expect("it reconnects");
    assert!(fake.entry(b"a").is_some());
}

#[tokio::test]
async fn one_of_two_nodes_is_enough() {
    let fake = Fake::start().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = nobody.local_addr().unwrap();
    drop(nobody);
    let settings = Config::new([away.to_string(), fake.addr.to_string()]);
    let client = Client::connect(settings).await.unwrap();
    for _ in 0..10 {
        client.ping().await.unwrap();
    }
}

#[tokio::test]
async fn connecting_to_nobody_says_so() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let error = Client::connect(Config::new([addr.clone()])).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(reason) if reason.contains(&addr)), "{error:?}");
    assert!(matches!(Client::connect(Config::new(["x"])).await, Err(Error::Config(_))));
}

#[tokio::test]
async fn a_password_is_sent_on_every_connection() {
    let fake = Fake::start().await;
    fake.require_password("secret");
    let with = |password: &str| Config {
        credentials: Some(Credentials { user: String::new(), password: password.to_owned() }),
        ..config(&fake)
    };
    Client::connect(with("secret")).await.unwrap().ping().await.unwrap();
    let error = Client::connect(with("guess")).await.unwrap_err();
    assert!(error.to_string().contains("wrong password"), "{error}");
}

#[tokio::test]
async fn a_closed_client_refuses_calls() {
    let fake = Fake::start().await;
    let client = connect(&fake).await;
    client.clone().close().await;
    assert_eq!(client.ping().await, Err(Error::Closed));
}
