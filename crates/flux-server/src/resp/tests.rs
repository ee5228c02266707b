//! Golden tables: command lines, and what they are planned as or answered with.
//!
//! `answers.txt` holds replies of a real Redis 7.0.15, byte for byte, to commands that are answered
//! without any partition; a `#` line starts a new connection.

use std::time::Duration;

use flux_core::{Command, Partitions};
use flux_proto::resp::{Args, Limits, OwnedArgs, Parsed, RequestParser};

use super::*;

mod cluster;
mod plans;
mod rendering;

const NOW_MS: u64 = 1_700_000_000_000;

fn settings() -> Vec<(&'static str, String)> {
    redis_settings(&RunningSettings {
        data_addr: ([127, 0, 0, 1], 7379).into(),
        data_dir: "/data".as_ref(),
        fsync: "always",
        max_memory: 0,
        max_clients: 10_000,
        timeout_s: 0,
        cluster_enabled: false,
    })
}

fn session() -> Session {
    Session::new(4, "127.0.0.1:50000".into(), "127.0.0.1:7379".into(), NOW_MS)
}

/// Plans a command and passes the plan on.
fn planned_args<R>(
    args: Args<'_>,
    session: &mut Session,
    out: &mut Vec<u8>,
    see: impl FnOnce(Plan<'_>) -> R,
) -> R {
    planned_in(&ClusterView::default(), args, session, out, see)
}

/// The same on a node of a cluster, which redirects clients.
fn planned_in<R>(
    view: &ClusterView,
    args: Args<'_>,
    session: &mut Session,
    out: &mut Vec<u8>,
    see: impl FnOnce(Plan<'_>) -> R,
) -> R {
    let route = |slot| view.route(slot);
    let node = NodeView {
        partitions: Partitions::new(16).expect("a power of two"),
        now_us: Duration::from_millis(NOW_MS).as_micros() as u64 + 17,
        settings: &settings,
        cluster: &|| view.clone(),
        redirect: view.enabled.then_some(&route),
    };
    see(plan(args, session, &node, out))
}

/// The same for a command line, on a node alone.
fn planned<R>(
    line: &str,
    session: &mut Session,
    out: &mut Vec<u8>,
    see: impl FnOnce(Plan<'_>) -> R,
) -> R {
    parsed(line, |args| planned_args(args, session, out, see))
}

/// What a command is answered with at once.
fn answered(args: &OwnedArgs, session: &mut Session) -> String {
    let mut out = Vec::new();
    planned_args(args.borrowed(), session, &mut out, |plan| match plan {
        Plan::Done | Plan::Close => {}
        other => panic!("the command is not answered at once: {other:?}"),
    });
    out.escape_ascii().to_string()
}

/// Passes the arguments of a command line on, written as inline commands are.
fn parsed<R>(line: &str, see: impl FnOnce(Args<'_>) -> R) -> R {
    let mut parser = RequestParser::new(Limits::default());
    let input = format!("{line}\n");
    let parsed = parser.parse(input.as_bytes());
    assert_eq!(parsed, Ok(Parsed::Command { consumed: input.len() }), "{line}");
    see(parser.args(input.as_bytes()))
}

/// What a command line is answered with at once.
fn answer(line: &str, session: &mut Session) -> String {
    let mut out = Vec::new();
    planned(line, session, &mut out, |plan| match plan {
        Plan::Done | Plan::Close => {}
        other => panic!("{line} is not answered at once: {other:?}"),
    });
    out.escape_ascii().to_string()
}

#[test]
fn what_needs_no_partition_is_answered_as_redis_does() {
    let mut session = session();
    let mut wrong = Vec::new();
    for line in include_str!("tests/answers.txt").lines() {
        if line.starts_with('#') {
            session = self::session();
        } else if let Some((line, expected)) = line.split_once(" => ") {
            // `escape_ascii` escapes quotes, too.
            let answer = answer(line, &mut session).replace("\\'", "'").replace("\\\"", "\"");
            if answer != expected {
                wrong.push(format!("{line}\n  expected {expected}\n  answered {answer}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The table and what is answered from it, where a golden reply would only repeat the table.
#[test]
fn commands_describe_themselves() {
    let mut session = session();
    let count = table::COMMANDS.len();
    assert_eq!(answer("command count", &mut session), format!(":{count}\\r\\n"));
    assert!(answer("command", &mut session).starts_with(&format!("*{count}\\r\\n*10\\r\\n")));
    assert!(answer("command docs", &mut session).starts_with(&format!("*{}\\r\\n", count * 2)));
    let docs = "*2\\r\\n$3\\r\\nget\\r\\n*6\\r\\n$7\\r\\nsummary\\r\\n";
    assert!(answer("command docs get foo", &mut session).starts_with(docs));
    assert!(answer("command info client|id", &mut session).contains("client|id"));
    assert!(answer("command list filterby aclcat transaction", &mut session).starts_with("*5"));
    for container in ["client", "command", "config", "memory", "object", "debug"] {
        let help = answer(&format!("{container} help"), &mut session);
        assert!(help.contains(&format!("+{} <subcommand>", container.to_uppercase())), "{help}");
        assert!(help.contains("+HELP"), "{help}");
    }
}

#[test]
fn the_node_answers_with_its_own_figures() {
    let mut session = session();
    let time = "*2\\r\\n$10\\r\\n1700000000\\r\\n$2\\r\\n17\\r\\n";
    assert_eq!(answer("time", &mut session), time);
    let config = "*2\\r\\n$9\\r\\nmaxmemory\\r\\n$1\\r\\n0\\r\\n";
    assert_eq!(answer("config get MAXMEMORY", &mut session), config);
    assert!(answer("config get *", &mut session).starts_with("*26"));
    assert!(answer("lolwut", &mut session).contains("Flux-KV ver. "));
    answer("client setname worker", &mut session);
    answer("client setinfo lib-name redis-py", &mut session);
    let line = answer("client info", &mut session);
    for field in [
        "id=4 addr=127.0.0.1:50000 laddr=127.0.0.1:7379 ",
        " name=worker ",
        " multi=-1 ",
        " cmd=client|info ",
        " resp=2 lib-name=redis-py lib-ver=\\n",
    ] {
        assert!(line.contains(field), "{line}");
    }
    let setinfo = answer("client setinfo lib-ver \"a b\"", &mut session);
    let expected = "-ERR lib-ver cannot contain spaces, newlines or special characters.\\r\\n";
    assert_eq!(setinfo, expected);
    let setinfo = answer("client setinfo foo x", &mut session);
    assert_eq!(setinfo, "-ERR Unrecognized option \\'foo\\'\\r\\n");
}

#[test]
fn info_has_the_sections_that_are_asked_for() {
    let sections = |names: &[&str]| {
        let names: OwnedArgs = names.iter().collect();
        let node = NodeInfo { keys: 3, volatile_keys: 1, used_memory: 1536, ..NodeInfo::default() };
        info(names.borrowed(), &node)
    };
    assert_eq!(sections(&["foo"]), "");
    assert_eq!(sections(&["KEYSPACE"]), "# Keyspace\r\ndb0:keys=3,expires=1,avg_ttl=0\r\n");
    let two = sections(&["keyspace", "replication"]);
    assert!(two.starts_with("# Replication\r\nrole:master\r\nconnected_slaves:0\r\n\r\n# Key"));
    assert_eq!(sections(&[]), sections(&["everything"]));
    assert!(sections(&[]).contains("\r\nused_memory_human:1.50K\r\n"));
}
