//! What commands ask of partitions and of the node: `plans.txt`, where a `#` line starts a new
//! connection and a reply that is given at once stands in quotes.

use super::*;

fn readable<B: AsRef<[u8]>>(command: &Command<B>) -> Command<String> {
    command.map(&mut |bytes| String::from_utf8_lossy(bytes.as_ref()).into_owned())
}

/// A plan as text: the partition, the command, then how its reply is rendered.
fn shown(line: &str, session: &mut Session) -> String {
    let mut out = Vec::new();
    let plan = planned(line, session, &mut out, |plan| match plan {
        Plan::Done => String::new(),
        Plan::One { partition, command, form } => {
            format!("{partition}: {:?} as {form:?}", readable(&command))
        }
        Plan::Transaction { partition, command, form } => {
            format!("{partition}: {:?} as {form:?}", readable(&command))
        }
        Plan::Many { parts, gather } => {
            let parts: Vec<String> = parts
                .iter()
                .map(|(partition, command)| format!("{partition}: {:?}", readable(command)))
                .collect();
            format!("{} as {gather:?}", parts.join(", "))
        }
        other => format!("{other:?}"),
    });
    if out.is_empty() { plan } else { format!("{plan}{:?}", String::from_utf8_lossy(&out)) }
}

#[test]
fn commands_are_planned() {
    let mut session = session();
    for line in include_str!("plans.txt").lines() {
        if line.starts_with('#') {
            session = self::session();
        } else if let Some((line, expected)) = line.split_once(" => ") {
            assert_eq!(shown(line, &mut session), expected, "{line}");
        }
    }
}

#[test]
fn keys_and_values_are_limited() {
    let mut session = session();
    let long_key = "k".repeat(65_537);
    let expected = "-ERR key of 65537 bytes is over the limit of 65536\\r\\n";
    // An inline command may not be as long, so the arguments are given directly.
    for args in [["get", &long_key, ""], ["set", &long_key, "v"], ["mget", "a", &long_key]] {
        let args: OwnedArgs = args.iter().filter(|arg| !arg.is_empty()).collect();
        assert_eq!(answered(&args, &mut session), expected);
    }
    assert_eq!(answer("get \"\"", &mut session), "-ERR empty key\\r\\n");
    let value = vec![b'v'; 16 * 1024 * 1024 + 1];
    let args: OwnedArgs = [b"set".as_slice(), b"k", &value].into_iter().collect();
    let answer = answered(&args, &mut session);
    assert!(answer.ends_with("value of 16777217 bytes is over the limit of 16777216\\r\\n"));
}

#[test]
fn a_transaction_is_limited() {
    let mut session = session();
    answer("multi", &mut session);
    let value = vec![b'v'; 15 * 1024 * 1024];
    let args: OwnedArgs = [b"set".as_slice(), b"k", &value].into_iter().collect();
    assert_eq!(answered(&args, &mut session), "+QUEUED\\r\\n");
    assert_eq!(answered(&args, &mut session), "+QUEUED\\r\\n");
    let refused = answered(&args, &mut session);
    assert!(refused.starts_with("-ERR transaction is over the limit"), "{refused}");
    assert!(answer("exec", &mut session).starts_with("-EXECABORT"));

    let keys: Vec<String> = (0..4097).map(|number| number.to_string()).collect();
    let args: OwnedArgs = ["watch"].into_iter().chain(keys.iter().map(String::as_str)).collect();
    let refused = answered(&args, &mut session);
    assert!(refused.starts_with("-ERR watched keys are over the limit"), "{refused}");
}

/// Random commands, made of words that commands know: each is planned, or answered with exactly one
/// reply.
#[test]
fn every_command_has_a_plan_or_an_answer() {
    let words: Vec<&str> = "k {k}a {k}b * 0 1 -1 10 x 9223372036854775807 NX XX GT LT EX PX EXAT PXAT \
        KEEPTTL PERSIST GET IDX LEN MINMATCHLEN WITHMATCHLEN MATCH COUNT TYPE string REPLACE DB AUTH \
        SETNAME default ID ADDR SKIPME yes normal HELP SLEEP timeout maxclients FILTERBY PATTERN \
        ACLCAT SAMPLES ASYNC get mset client|id"
        .split_whitespace()
        .collect();
    // A linear congruential generator: the same commands in every run.
    let mut state = 1u64;
    let mut next = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut session = session();
    for _ in 0..100_000 {
        let spec = &table::COMMANDS[next(table::COMMANDS.len())];
        let mut args = vec![spec.name];
        if !spec.subcommands.is_empty() && next(4) > 0 {
            let (_, name) =
                spec.subcommands[next(spec.subcommands.len())].name.split_once('|').unwrap();
            args.push(name);
        }
        args.extend((0..next(6)).map(|_| words[next(words.len())]));
        let owned: OwnedArgs = args.iter().collect();
        let mut out = Vec::new();
        let answers = planned_args(owned.borrowed(), &mut session, &mut out, |plan| match plan {
            Plan::Done | Plan::Close => 1,
            _ => 0,
        });
        // Nobody renders the replies of partitions here.
        session.unanswered_watches = 0;
        let reply = flux_proto::resp::parse_reply(&out).expect("replies are well formed");
        match reply {
            Some((_, length)) => assert_eq!((answers, length), (1, out.len()), "{args:?}"),
            None => assert!(answers == 0 && out.is_empty(), "{args:?}"),
        }
    }
}
