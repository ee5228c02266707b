//! Replies of partitions, in both versions of the protocol.

use flux_core::reply::{Description, Lcs, LcsRun};
use flux_core::{Error, Reply, Value};
use flux_proto::resp::Version;

use super::*;

fn value(text: &str) -> Value {
    Value { bytes: text.into(), version: 7, expires_at_ms: None }
}

fn rendered(form: &Form, reply: &Reply, session: &mut Session) -> String {
    let mut out = Vec::new();
    render(form, reply, session, &mut out);
    String::from_utf8(out).expect("tests use text")
}

/// Checks a reply in RESP2, and in RESP3 where it is another there.
#[track_caller]
fn check(form: &Form, reply: &Reply, resp2: &str, resp3: Option<&str>) {
    let mut session = session();
    assert_eq!(rendered(form, reply, &mut session), resp2, "{form:?}");
    session.version = Version::V3;
    assert_eq!(rendered(form, reply, &mut session), resp3.unwrap_or(resp2), "{form:?}");
}

#[test]
fn values_and_writes() {
    let (written, not_written) = (Reply::Written { version: 7 }, Reply::NotWritten { version: 3 });
    check(&Form::Value, &Reply::Value(Some(value("v"))), "$1\r\nv\r\n", None);
    check(&Form::Value, &Reply::Value(None), "$-1\r\n", Some("_\r\n"));
    check(&Form::Written, &written, "+OK\r\n", None);
    check(&Form::Written, &not_written, "$-1\r\n", Some("_\r\n"));
    check(&Form::WrittenCount, &written, ":1\r\n", None);
    check(&Form::WrittenCount, &not_written, ":0\r\n", None);
    check(&Form::Integer, &Reply::Integer(-3), ":-3\r\n", None);
    check(&Form::Integer, &Reply::Counter { value: 8, version: 1 }, ":8\r\n", None);
    check(&Form::Bytes, &Reply::Bytes(b"1.5".into()), "$3\r\n1.5\r\n", None);
    check(&Form::Renamed, &Reply::Integer(1), "+OK\r\n", None);
    let previous = |previous| Reply::Previous { previous, written: true };
    check(&Form::Previous, &previous(Some(value("v"))), "$1\r\nv\r\n", None);
    check(&Form::Previous, &previous(None), "$-1\r\n", Some("_\r\n"));
    let values = Reply::Values(vec![Some(value("v")), None]);
    check(&Form::Values, &values, "*2\r\n$1\r\nv\r\n$-1\r\n", Some("*2\r\n$1\r\nv\r\n_\r\n"));
    let error = Reply::Error(Error::NotInteger);
    let text = "-ERR value is not an integer or out of range\r\n";
    check(&Form::Integer, &error, text, None);
}

/// The replies are those of Redis to `LCS` of these values.
#[test]
fn longest_common_subsequences() {
    let lcs = Reply::Lcs(Lcs {
        bytes: b"mytext".into(),
        runs: vec![LcsRun { left: 4..8, right: 5..9 }, LcsRun { left: 2..4, right: 0..2 }],
    });
    check(&Form::LcsText, &lcs, "$6\r\nmytext\r\n", None);
    check(&Form::LcsLength, &lcs, ":6\r\n", None);
    let runs = "$7\r\nmatches\r\n*2\r\n*2\r\n*2\r\n:4\r\n:7\r\n*2\r\n:5\r\n:8\r\n*2\r\n*2\r\n:2\r\n:3\r\n\
                *2\r\n:0\r\n:1\r\n$3\r\nlen\r\n:6\r\n";
    let (resp2, resp3) = (format!("*4\r\n{runs}"), format!("%2\r\n{runs}"));
    check(&Form::LcsRuns { min_length: 0, with_length: false }, &lcs, &resp2, Some(&resp3));
    let runs = "$7\r\nmatches\r\n*1\r\n*3\r\n*2\r\n:4\r\n:7\r\n*2\r\n:5\r\n:8\r\n:4\r\n\
                $3\r\nlen\r\n:6\r\n";
    let (resp2, resp3) = (format!("*4\r\n{runs}"), format!("%2\r\n{runs}"));
    check(&Form::LcsRuns { min_length: 4, with_length: true }, &lcs, &resp2, Some(&resp3));
}

#[test]
fn descriptions() {
    let description = |expires_at_ms| {
        Reply::Described(Some(Description {
            version: 7,
            expires_at_ms,
            value_bytes: 1,
            written_at_s: (NOW_MS / 1000) as u32 - 5,
            memory_bytes: 99,
        }))
    };
    let absent = Reply::Described(None);
    let now_ms = NOW_MS;
    let expires = description(Some(NOW_MS + 9_600));
    let cases = [
        (Form::TimeLeft { seconds: true, now_ms }, ":10\r\n"),
        (Form::TimeLeft { seconds: false, now_ms }, ":9600\r\n"),
        (Form::ExpiresAt { seconds: true }, ":1700000010\r\n"),
        (Form::ExpiresAt { seconds: false }, ":1700000009600\r\n"),
    ];
    for (form, expected) in cases {
        check(&form, &expires, expected, None);
        check(&form, &description(None), ":-1\r\n", None);
        check(&form, &absent, ":-2\r\n", None);
    }
    check(&Form::Type, &expires, "+string\r\n", None);
    check(&Form::Type, &absent, "+none\r\n", None);
    let frequency = "-ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note \
         that when switching between policies at runtime LRU and LFU data will take some time to \
         adjust.\r\n";
    let cases = [
        (Form::IdleSeconds { now_ms }, ":5\r\n"),
        (Form::References, ":1\r\n"),
        (Form::MemoryUsage, ":99\r\n"),
        (Form::Frequency, frequency),
    ];
    for (form, expected) in cases {
        check(&form, &expires, expected, None);
        check(&form, &absent, "$-1\r\n", Some("_\r\n"));
    }
}

/// The encodings are those that Redis gives these values after SET.
#[test]
fn encodings() {
    let cases = [
        ("12", "int"),
        ("9223372036854775807", "int"),
        ("9223372036854775808", "embstr"),
        ("007", "embstr"),
        ("", "embstr"),
        ("12345678901234567890123456789012345678901234", "embstr"),
        ("123456789012345678901234567890123456789012345", "raw"),
    ];
    for (text, encoding) in cases {
        let expected = format!("${}\r\n{encoding}\r\n", encoding.len());
        check(&Form::Encoding, &Reply::Value(Some(value(text))), &expected, None);
    }
    check(&Form::Encoding, &Reply::Value(None), "$-1\r\n", Some("_\r\n"));
}

#[test]
fn a_reply_of_another_kind_is_an_error_and_not_a_panic() {
    let forms = [Form::Value, Form::Integer, Form::LcsText, Form::Type, Form::Renamed];
    for form in forms {
        let text = "-ERR internal error: unexpected reply\r\n";
        check(&form, &Reply::Written { version: 1 }, text, None);
    }
    let parts: Box<[_]> = [TransactionPart::Partition(Form::Value)].into();
    let text = "*1\r\n-ERR internal error: unexpected reply\r\n";
    check(&Form::Transaction { parts }, &Reply::Many(vec![]), text, None);
}

#[test]
fn transactions() {
    let parts = [
        TransactionPart::Partition(Form::Written),
        TransactionPart::Rendered(b"+PONG\r\n".as_slice().into()),
        TransactionPart::Partition(Form::Value),
    ];
    let form = Form::Transaction { parts: parts.into() };
    let replies = vec![Reply::Written { version: 1 }, Reply::Error(Error::NotFloat)];
    let expected = "*3\r\n+OK\r\n+PONG\r\n-ERR value is not a valid float\r\n";
    check(&form, &Reply::Many(replies), expected, None);
    check(&form, &Reply::Aborted { position: None }, "*-1\r\n", Some("_\r\n"));
    let text = "-OVERLOADED too much work is waiting; try again later\r\n";
    check(&form, &Reply::Error(Error::Overloaded), text, None);
}

fn gathered(gather: &Gather, replies: &[Reply], session: &mut Session) -> String {
    let mut out = Vec::new();
    render_gathered(gather, replies, session, &mut out);
    String::from_utf8(out).expect("tests use text")
}

#[test]
fn replies_of_several_partitions() {
    let mut session = session();
    let values = Gather::Values { part_of_key: [0, 1, 0, 1].into() };
    let parts = [
        Reply::Values(vec![Some(value("a")), None]),
        Reply::Values(vec![Some(value("b")), Some(value("c"))]),
    ];
    let expected = "*4\r\n$1\r\na\r\n$1\r\nb\r\n$-1\r\n$1\r\nc\r\n";
    assert_eq!(gathered(&values, &parts, &mut session), expected);

    let sum = Gather::Sum { is_write: true };
    assert_eq!(gathered(&sum, &[Reply::Integer(2), Reply::Integer(3)], &mut session), ":5\r\n");
    let written = Reply::Written { version: 1 };
    let all = [written.clone(), written.clone()];
    assert_eq!(gathered(&Gather::Written, &all, &mut session), "+OK\r\n");

    let overloaded = Reply::Error(Error::Overloaded);
    let text = "-OVERLOADED too much work is waiting; try again later";
    let all = [overloaded.clone(), overloaded.clone()];
    assert_eq!(gathered(&Gather::Written, &all, &mut session), format!("{text}\r\n"));
    let some = [written, overloaded.clone()];
    assert_eq!(
        gathered(&Gather::Written, &some, &mut session),
        format!("{text} (the keys of 1 of 2 partitions; those of the others were written)\r\n")
    );
    let some = [Reply::Integer(1), overloaded];
    let sum = Gather::Sum { is_write: false };
    assert_eq!(gathered(&sum, &some, &mut session), format!("{text}\r\n"));
}

/// WATCH takes versions from its reply; only then EXEC knows its guards.
#[test]
fn watched_keys_guard_the_transaction() {
    let mut session = session();
    let described = |version| {
        Reply::Described(Some(Description {
            version,
            expires_at_ms: None,
            value_bytes: 1,
            written_at_s: 0,
            memory_bytes: 99,
        }))
    };
    let form = planned("watch {k}a", &mut session, &mut Vec::new(), |plan| match plan {
        Plan::One { form, .. } => form,
        other => panic!("{other:?}"),
    });
    let later = |line: &str, session: &mut Session| {
        planned(line, session, &mut Vec::new(), |plan| matches!(plan, Plan::Later))
    };
    assert!(later("watch {k}b", &mut session));
    assert_eq!(rendered(&form, &described(7), &mut session), "+OK\r\n");
    let gather = planned("watch {k}b {k}a", &mut session, &mut Vec::new(), |plan| match plan {
        Plan::Many { gather, .. } => gather,
        other => panic!("{other:?}"),
    });
    assert_eq!(answer("multi", &mut session), r"+OK\r\n");
    assert_eq!(answer("get {k}a", &mut session), r"+QUEUED\r\n");
    assert!(later("exec", &mut session));
    let replies = [Reply::Described(None), described(9)];
    assert_eq!(gathered(&gather, &replies, &mut session), "+OK\r\n");
    let guards = planned("exec", &mut session, &mut Vec::new(), |plan| match plan {
        Plan::Transaction { command: Command::Transaction { guards, .. }, .. } => guards,
        other => panic!("{other:?}"),
    });
    // The version that was seen first counts; an absent key has version 0.
    let guards: Vec<_> = guards.iter().map(|guard| (&guard.key[..], guard.version)).collect();
    assert_eq!(guards, [(&b"{k}a"[..], 7), (&b"{k}b"[..], 0)]);
    assert_eq!(answer("exec", &mut session), r"-ERR EXEC without MULTI\r\n");
}

/// A WATCH that fails guards nothing, and does not hold up what follows.
#[test]
fn a_failed_watch_is_forgotten() {
    let mut session = session();
    let form = planned("watch k", &mut session, &mut Vec::new(), |plan| match plan {
        Plan::One { form, .. } => form,
        other => panic!("{other:?}"),
    });
    let reply = Reply::Error(Error::NotLeader);
    assert!(rendered(&form, &reply, &mut session).starts_with("-NOTLEADER"));
    assert_eq!(answer("multi", &mut session), r"+OK\r\n");
    assert_eq!(answer("exec", &mut session), r"*0\r\n");
}

/// Keys watched before are in the guards of an empty transaction, too.
#[test]
fn an_empty_transaction_checks_its_guards() {
    let mut session = session();
    let form = Form::Watched { key: b"k".as_slice().into() };
    rendered(&form, &Reply::Described(None), &mut session);
    answer("multi", &mut session);
    let is_transaction = |plan: Plan<'_>| matches!(plan, Plan::Transaction { .. });
    assert!(planned("exec", &mut session, &mut Vec::new(), is_transaction));
}

#[test]
fn replies_of_the_node() {
    let shown = |reply: NodeReply, version: Version| {
        let (mut session, mut out) = (session(), Vec::new());
        session.version = version;
        render_node(&reply, &session, &mut out);
        String::from_utf8(out).expect("tests use text")
    };
    let next = Some(ScanCursor { partition: PartitionId(3), position: 1 });
    let cases = [
        (NodeReply::Ok, "+OK\r\n", "+OK\r\n"),
        (NodeReply::Integer(3), ":3\r\n", ":3\r\n"),
        (NodeReply::Key(None), "$-1\r\n", "_\r\n"),
        (NodeReply::Key(Some(b"k".into())), "$1\r\nk\r\n", "$1\r\nk\r\n"),
        (NodeReply::Keys(vec![b"k".into()]), "*1\r\n$1\r\nk\r\n", "*1\r\n$1\r\nk\r\n"),
        (
            NodeReply::Page { next, keys: vec![b"k".into()] },
            "*2\r\n$5\r\n16387\r\n*1\r\n$1\r\nk\r\n",
            "*2\r\n$5\r\n16387\r\n*1\r\n$1\r\nk\r\n",
        ),
        (
            NodeReply::Page { next: None, keys: vec![] },
            "*2\r\n$1\r\n0\r\n*0\r\n",
            "*2\r\n$1\r\n0\r\n*0\r\n",
        ),
        (NodeReply::Text("a".into()), "$1\r\na\r\n", "=5\r\ntxt:a\r\n"),
        (NodeReply::Error("ERR a\r\nb".into()), "-ERR a  b\r\n", "-ERR a  b\r\n"),
        (
            NodeReply::Failed(Error::Overloaded),
            "-OVERLOADED too much work is waiting; try again later\r\n",
            "-OVERLOADED too much work is waiting; try again later\r\n",
        ),
    ];
    for (reply, resp2, resp3) in cases {
        assert_eq!(shown(reply.clone(), Version::V2), resp2);
        assert_eq!(shown(reply, Version::V3), resp3);
    }
}
