//! What a client sees on its connection: the order of replies, and its own writes.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use flux_proto::native;
use flux_proto::resp::Reply;

use super::machine::Machine;
use super::node::{small, start};
use super::resp_client::{Client, request, request_of};
use crate::config::{Fsync, Settings};
use crate::workers::Workers;

/// A node of two workers that syncs each write.
fn node() -> (Workers, SocketAddr) {
    let settings = Settings {
        segment_bytes: 1 << 20,
        snapshot_log_bytes: 64 << 20,
        max_inflight_bytes: 256 << 20,
        overload_wait_ms: 60_000,
        ..small(2, Fsync::Always)
    };
    let workers = start(&Machine::new(1), &settings).expect("started");
    let address = workers.shared().data_addr;
    (workers, address)
}

fn bulk(text: &str) -> Reply {
    Reply::Bulk(text.as_bytes().to_vec())
}

fn ok() -> Reply {
    Reply::Simple(b"OK".to_vec())
}

/// Requests of every way that a reply can take, and their replies.
fn conversation(rounds: usize) -> Vec<(Vec<u8>, Reply)> {
    let mut all = Vec::new();
    let mut say = |words: &[&str], reply: Reply| all.push((request(words), reply));
    for round in 0..rounds {
        let (key, text) = (format!("k{}", round % 7), format!("v{round}"));
        say(&["SET", &key, &text], ok());
        say(&["GET", &key], bulk(&text));
        say(&["PING"], Reply::Simple(b"PONG".to_vec()));
        say(&["MSET", "a", &text, "b", &text, "c", &text, "d", &text], ok());
        let four = vec![bulk(&text), bulk(&text), bulk(&text), bulk(&text)];
        say(&["MGET", "a", "b", "c", "d"], Reply::Array(four));
        say(&["NOSUCH"], Reply::Null);
        say(&["APPEND", &key, "+"], Reply::Integer(text.len() as i64 + 1));
        say(&["STRLEN", &key], Reply::Integer(text.len() as i64 + 1));
        say(&["DEL", "a", "b", "c", "nothing"], Reply::Integer(3));
        say(&["EXISTS", "a", "b", "c", "d"], Reply::Integer(1));
        say(&["MULTI"], ok());
        say(&["SET", "d", "in the transaction"], Reply::Simple(b"QUEUED".to_vec()));
        say(&["GET", "d"], Reply::Simple(b"QUEUED".to_vec()));
        say(&["EXEC"], Reply::Array(vec![ok(), bulk("in the transaction")]));
        say(&["GET", "d"], bulk("in the transaction"));
        say(&["DEL", "d"], Reply::Integer(1));
        say(&["INCR", "count"], Reply::Integer(round as i64 + 1));
        say(&["EXISTS", "count", "d"], Reply::Integer(1));
    }
    all
}

#[track_caller]
fn assert_reply(found: &Reply, expected: &Reply, request: &[u8]) {
    let expected_error = *expected == Reply::Null;
    let matches = if expected_error { matches!(found, Reply::Error(_)) } else { found == expected };
    let request = String::from_utf8_lossy(request);
    assert!(matches, "{request:?} answered {found:?}, not {expected:?}");
}

#[test]
fn a_pipeline_is_answered_in_order_and_sees_its_own_writes() {
    let (workers, address) = node();
    // Each connection begins anew; connections are given to the workers in turn.
    for _ in 0..4 {
        let mut client = Client::connect(address);
        let conversation = conversation(40);
        let bytes: Vec<u8> = conversation.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        client.send(&bytes);
        for (request, expected) in &conversation {
            assert_reply(&client.reply().expect("a reply"), expected, request);
        }
        assert_eq!(client.ask(&["FLUSHALL"]), ok());
    }
    workers.stop().expect("closed");
}

#[test]
fn a_pipeline_may_be_split_at_any_byte() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    let conversation = conversation(1);
    let bytes: Vec<u8> = conversation.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
    for split in 1..bytes.len() {
        let (first, second) = bytes.split_at(split);
        client.send(first);
        let mut sent = 0;
        let (mut early, mut late) = (Vec::new(), Vec::new());
        for (request, expected) in &conversation {
            sent += request.len();
            if sent <= split { &mut early } else { &mut late }.push((request, expected));
        }
        // That the first part was read and answered, with the rest not sent, shows the split.
        for (request, expected) in early {
            assert_reply(&client.reply().expect("a reply"), expected, request);
        }
        client.send(second);
        for (request, expected) in late {
            assert_reply(&client.reply().expect("a reply"), expected, request);
        }
        assert_eq!(client.ask(&["DEL", "count"]), Reply::Integer(1));
    }
    workers.stop().expect("closed");
}

#[test]
fn a_watched_key_that_changed_stops_a_transaction() {
    let (workers, address) = node();
    let (mut one, mut two) = (Client::connect(address), Client::connect(address));
    for (other_writes, expected) in [(true, Reply::Null), (false, Reply::Array(vec![ok()]))] {
        assert_eq!(one.ask(&["WATCH", "{t}key"]), ok());
        if other_writes {
            assert_eq!(two.ask(&["SET", "{t}key", "theirs"]), ok());
        }
        // The transaction is also the one that follows a write of its own connection.
        let words: [&[&str]; 4] =
            [&["SET", "{t}other", "1"], &["MULTI"], &["SET", "{t}key", "ours"], &["EXEC"]];
        one.send(&words.iter().flat_map(|words| request(words)).collect::<Vec<_>>());
        assert_eq!(one.replies(3)[0], ok());
        assert_eq!(one.reply(), Some(expected));
    }
    assert_eq!(two.ask(&["GET", "{t}key"]), bulk("ours"));
    workers.stop().expect("closed");
}

#[test]
fn flushall_removes_every_key_however_many() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    for batch in 0..25 {
        let mut words = vec!["MSET".to_owned()];
        for number in 0..1000 {
            words.extend([format!("key:{batch}:{number}"), "v".to_owned()]);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        client.send(&request(&words));
    }
    // Without waiting: it comes behind the writes.
    for words in [&["DBSIZE"][..], &["FLUSHALL"], &["DBSIZE"], &["SET", "k", "v"], &["DBSIZE"]] {
        client.send(&request(words));
    }
    assert!(client.replies(25).iter().all(|reply| *reply == ok()));
    let [full, flushed, empty, set, one] = client.replies(5).try_into().expect("five");
    assert_eq!(full, Reply::Integer(25_000));
    assert_eq!((flushed, empty), (ok(), Reply::Integer(0)));
    assert_eq!((set, one), (ok(), Reply::Integer(1)));
    workers.stop().expect("closed");
}

#[test]
fn flushall_removes_keys_that_fill_more_than_a_batch() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    let padding = "k".repeat(65_000);
    for batch in 0..9 {
        for number in 0..100 {
            client.send(&request(&["SET", &format!("{{t}}{batch}:{number}:{padding}"), ""]));
        }
        assert!(client.replies(100).iter().all(|reply| *reply == ok()));
    }
    assert_eq!(client.ask(&["FLUSHALL"]), ok());
    assert_eq!(client.ask(&["DBSIZE"]), Reply::Integer(0));
    workers.stop().expect("closed");
}

#[test]
fn clients_of_all_workers_are_listed_and_killed() {
    let (workers, address) = node();
    let mut clients: Vec<Client> = (0..6).map(|_| Client::connect(address)).collect();
    let ids: Vec<i64> = clients
        .iter_mut()
        .map(|client| match client.ask(&["CLIENT", "ID"]) {
            Reply::Integer(id) => id,
            other => panic!("{other:?}"),
        })
        .collect();
    let mut first = clients.remove(0);
    let listed = |client: &mut Client| match client.ask(&["CLIENT", "LIST"]) {
        Reply::Bulk(text) | Reply::Verbatim { text, .. } => {
            let text = String::from_utf8(text).expect("text");
            text.lines()
                .map(|line| {
                    line.split([' ', '=']).nth(1).expect("an id").parse().expect("a number")
                })
                .collect::<BTreeSet<i64>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(listed(&mut first), ids.iter().copied().collect());
    for (client, id) in clients.iter_mut().zip(&ids[1..]) {
        assert_eq!(first.ask(&["CLIENT", "KILL", "ID", &id.to_string()]), Reply::Integer(1));
        assert_eq!(client.reply(), None, "the connection ends");
    }
    assert_eq!(listed(&mut first), BTreeSet::from([ids[0]]));
    workers.stop().expect("closed");
}

#[test]
fn a_connection_that_sleeps_delays_no_other() {
    let (workers, address) = node();
    let mut sleeper = Client::connect(address);
    let Reply::Integer(id) = sleeper.ask(&["CLIENT", "ID"]) else { panic!("no number") };
    sleeper.send(&request(&["DEBUG", "SLEEP", "600"]));
    // Some of these share its worker.
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address)).collect();
    for client in &mut clients {
        assert_eq!(client.ask(&["SET", "k", "v"]), ok());
        assert_eq!(client.ask(&["GET", "k"]), bulk("v"));
    }
    assert_eq!(clients[0].ask(&["CLIENT", "KILL", "ID", &id.to_string()]), Reply::Integer(1));
    assert_eq!(sleeper.reply(), None, "the connection ends");
    workers.stop().expect("closed");
}

#[test]
fn the_largest_value_goes_in_and_comes_out() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    let value: Vec<u8> = (0..16u32 << 20).map(|at| (at % 251) as u8).collect();
    client.send(&request_of(&[b"SET", b"large", &value]));
    client.send(&request(&["GET", "large"]));
    assert_eq!(client.reply(), Some(ok()));
    assert!(client.reply() == Some(Reply::Bulk(value)), "the value is as it was sent");
    client.send(&request_of(&[b"SET", b"larger", &vec![b'.'; (16 << 20) + 1]]));
    assert!(matches!(client.reply(), Some(Reply::Error(_))));
    assert_eq!(client.ask(&["EXISTS", "larger"]), Reply::Integer(0));
    workers.stop().expect("closed");
}

#[test]
fn many_replies_that_fill_the_output_all_come() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    // All reads wait for the write, and are due at once when it is done.
    for (size, count) in [(100_000, 3), (100_000, 60), (16_384, 17), (16_384, 100), (60_000, 16)] {
        let value = "v".repeat(size);
        assert_eq!(client.ask(&["SET", "big", &value]), ok());
        let mut bytes = request(&["SET", "small", "1"]);
        bytes.extend(request(&["GET", "big"]).repeat(count));
        client.send(&bytes);
        assert_eq!(client.reply(), Some(ok()));
        assert!(client.replies(count).iter().all(|reply| *reply == bulk(&value)));
    }
    workers.stop().expect("closed");
}

#[test]
fn a_scan_finds_every_key_that_is_there_all_along() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    for number in 0..2000 {
        client.send(&request(&["SET", &format!("stays:{number}"), "v"]));
    }
    client.replies(2000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = Client::connect(address);
            for number in 0.. {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                let key = format!("comes:{}", number % 5000);
                let command = if number % 3 == 2 { "DEL" } else { "SET" };
                let words = [command, &key, "v"];
                writer.ask(if command == "DEL" { &words[..2] } else { &words });
            }
        });
        for _ in 0..5 {
            let (mut cursor, mut seen) = ("0".to_owned(), BTreeSet::new());
            loop {
                let Reply::Array(page) =
                    client.ask(&["SCAN", &cursor, "MATCH", "stays:*", "COUNT", "64"])
                else {
                    panic!("no page")
                };
                let [Reply::Bulk(next), Reply::Array(keys)] = &page[..] else { panic!("{page:?}") };
                for key in keys {
                    let Reply::Bulk(key) = key else { panic!("{key:?}") };
                    seen.insert(key.clone());
                }
                cursor = String::from_utf8(next.clone()).expect("digits");
                if cursor == "0" {
                    break;
                }
            }
            assert_eq!(seen.len(), 2000);
        }
        done.store(true, Ordering::Relaxed);
    });
    workers.stop().expect("closed");
}

#[test]
fn one_port_speaks_both_protocols() {
    let (workers, address) = node();
    let mut resp = Client::connect(address);
    let mut client = Client::connect(address).stream;
    let mut bytes = Vec::new();
    native::encode_preface(&mut bytes, &native::Preface::default());
    let requests = |id: u64, value: &'static [u8]| {
        let set = native::Request::Set {
            key: b"k",
            value,
            expiry: native::Expiry::Never,
            condition: native::Condition::Always,
            return_previous: false,
        };
        let mut bytes = Vec::new();
        for (id, request) in [(id, set), (id + 1, native::Request::Get { key: b"k" })] {
            let header = native::RequestHeader::new(id, request.opcode());
            native::encode_request(&mut bytes, &header, &request).expect("small");
        }
        bytes
    };
    bytes.extend((0..50).flat_map(|round| requests(round * 2, b"native")));
    client.write_all(&bytes).expect("sent");
    let (mut received, mut answered, mut greeted) = (Vec::new(), 0, false);
    let mut buffer = [0; 4096];
    while answered < 100 {
        let count = client.read(&mut buffer).expect("answered");
        assert!(count > 0, "the connection ended after {answered} answers");
        received.extend_from_slice(&buffer[..count]);
        if !greeted {
            let Some((preface, bytes)) = native::decode_server_preface(&received).expect("valid")
            else {
                continue;
            };
            assert!(matches!(preface, native::ServerPreface::Accepted(_)), "{preface:?}");
            received.drain(..bytes);
            greeted = true;
        }
        while let Some((frame, bytes)) = native::decode_response(&received).expect("valid") {
            assert_eq!(frame.id, answered, "answers come in order");
            match frame.response().expect("valid").expect("no failure") {
                native::Response::Set(set) if answered % 2 == 0 => assert!(set.written),
                native::Response::Value(Some(value)) => assert_eq!(value.bytes, b"native"),
                other => panic!("{other:?}"),
            }
            received.drain(..bytes);
            answered += 1;
        }
    }
    assert_eq!(resp.ask(&["GET", "k"]), bulk("native"));
    workers.stop().expect("closed");
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_replies() {
    let (workers, address) = node();
    for _ in 0..50 {
        let mut client = Client::connect(address);
        for words in [&["SET", "k", "v"][..], &["GET", "k"], &["DBSIZE"], &["MGET", "k", "k"]] {
            client.send(&request(words));
        }
        client.finish();
        let replies = client.replies(4);
        let expected =
            [ok(), bulk("v"), Reply::Integer(1), Reply::Array(vec![bulk("v"), bulk("v")])];
        assert_eq!(replies, expected);
        assert_eq!(client.reply(), None, "the connection ends behind them");
    }
    workers.stop().expect("closed");
}

#[test]
fn a_client_may_end_while_its_request_is_under_way() {
    let (workers, address) = node();
    let (mut client, mut watcher) = (Client::connect(address), Client::connect(address));
    client.send(&request(&["DEBUG", "SLEEP", "0.3"]));
    loop {
        let list = watcher.ask(&["CLIENT", "LIST"]);
        let Reply::Bulk(text) = list else { panic!("{list:?}") };
        if String::from_utf8_lossy(&text).contains("cmd=debug") {
            break;
        }
    }
    // The end comes with the request, and both before the connection is read again.
    client.send(&request(&["PING"]));
    client.finish();
    assert_eq!(client.replies(2)[1], Reply::Simple(b"PONG".to_vec()));
    assert_eq!(client.reply(), None, "the connection ends behind them");
    workers.stop().expect("closed");
}

#[test]
fn reads_of_several_keys_never_see_half_a_write() {
    let (workers, address) = node();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = Client::connect(address);
            for number in 0..1500 {
                let text = number.to_string();
                assert_eq!(writer.ask(&["MSET", "{t}a", &text, "{t}b", &text]), ok());
            }
            done.store(true, Ordering::Release);
        });
        // Connections are dealt out to the workers in turn: some are not with the owner of the keys.
        for _ in 0..2 {
            scope.spawn(|| {
                let mut reader = Client::connect(address);
                while !done.load(Ordering::Acquire) {
                    let Reply::Array(both) = reader.ask(&["MGET", "{t}a", "{t}b"]) else {
                        panic!("not an array")
                    };
                    assert_eq!(both[0], both[1]);
                }
            });
        }
    });
    workers.stop().expect("closed");
}

#[test]
fn what_is_written_behind_flushall_stays() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    for _ in 0..3 {
        let keys: Vec<String> = (0..9000).map(|number| format!("{{t}}{number}")).collect();
        let words: Vec<&str> = std::iter::once("MSET")
            .chain(keys.iter().flat_map(|key| [key.as_str(), "v"]))
            .collect();
        assert_eq!(client.ask(&words), ok());
        for words in [&["FLUSHALL"][..], &["SET", "{t}after", "1"], &["GET", "{t}after"]] {
            client.send(&request(words));
        }
        assert_eq!(client.replies(3), [ok(), ok(), bulk("1")]);
        assert_eq!(client.ask(&["DBSIZE"]), Reply::Integer(1));
    }
    workers.stop().expect("closed");
}

#[test]
fn a_reply_has_a_limit() {
    let (workers, address) = node();
    let mut client = Client::connect(address);
    let value = "v".repeat(9_000_000);
    assert_eq!(client.ask(&["SET", "big", &value]), ok());
    let Reply::Error(text) =
        client.ask(&["MGET", "big", "big", "big", "big", "big", "big", "big", "big"])
    else {
        panic!("not an error")
    };
    assert!(text.ends_with(b"ask for less at once"), "{}", text.escape_ascii());
    // Behind a write, where replies wait, no more of them may wait than one reply may hold.
    let mut bytes = request(&["SET", "small", "1"]);
    bytes.extend(request(&["GET", "big"]).repeat(40));
    client.send(&bytes);
    let replies = client.replies(41);
    let refused = replies.iter().filter(|reply| matches!(reply, Reply::Error(_))).count();
    assert!(refused < 40 && replies[1] == bulk(&value), "{refused} refused");
    assert_eq!(client.ask(&["PING"]), Reply::Simple(b"PONG".to_vec()));
    workers.stop().expect("closed");
}

#[test]
fn a_long_pipeline_lets_others_have_their_turn() {
    let (workers, address) = node();
    // Both connections are of one worker: they are dealt out in turn.
    let (mut busy, _other) = (Client::connect(address), Client::connect(address));
    let mut patient = Client::connect(address);
    assert_eq!(patient.ask(&["MSET", "{t}a", &"a".repeat(2000), "{t}b", &"b".repeat(2000)]), ok());
    busy.send(&request(&["LCS", "{t}a", "{t}b", "LEN"]).repeat(200));
    assert_eq!(busy.reply(), Some(Reply::Integer(0)));
    // With the first reply there, all the others are waiting to be worked off.
    assert_eq!(patient.ask(&["PING"]), Reply::Simple(b"PONG".to_vec()));
    busy.stream.set_nonblocking(true).expect("a socket");
    let waiting = busy.received_replies() < 199;
    busy.stream.set_nonblocking(false).expect("a socket");
    assert!(waiting, "the pipeline was worked off before anybody else had a turn");
    workers.stop().expect("closed");
}

#[test]
fn nothing_is_carried_out_behind_a_preface_of_another_version() {
    let (workers, address) = node();
    let mut client = Client::connect(address).stream;
    let mut bytes = Vec::new();
    let preface = native::Preface { min_version: 77, max_version: 78, flags: 0 };
    native::encode_preface(&mut bytes, &preface);
    let set = native::Request::Increment { key: b"k", delta: 1 };
    let header = native::RequestHeader::new(1, set.opcode());
    native::encode_request(&mut bytes, &header, &set).expect("small");
    client.write_all(&bytes).expect("sent");
    let mut received = Vec::new();
    client.read_to_end(&mut received).expect("closed by the node");
    let (preface, _) = native::decode_server_preface(&received).expect("valid").expect("whole");
    assert!(matches!(preface, native::ServerPreface::Refused { .. }), "{preface:?}");
    assert_eq!(Client::connect(address).ask(&["EXISTS", "k"]), Reply::Integer(0));
    workers.stop().expect("closed");
}
