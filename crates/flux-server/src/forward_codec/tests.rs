//! Every command and reply comes back as it was, and no junk gets further than an error.

use flux_core::command::{ExpireCondition, KeyFilter, PageLimits};
use flux_core::reply::{Description, Lcs, LcsRun};
use flux_core::{Condition, Error, Expiry, Value};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..40)
}

fn expiry() -> impl Strategy<Value = Expiry> {
    prop_oneof![
        Just(Expiry::Never),
        Just(Expiry::Keep),
        any::<u64>().prop_map(Expiry::In),
        any::<u64>().prop_map(Expiry::At),
    ]
}

fn condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        Just(Condition::Always),
        Just(Condition::IfAbsent),
        Just(Condition::IfPresent),
        any::<u64>().prop_map(Condition::IfVersion),
    ]
}

fn read_command() -> impl Strategy<Value = Command<Vec<u8>>> {
    prop_oneof![
        bytes().prop_map(|key| Command::Get { key }),
        vec(bytes(), 0..5).prop_map(|keys| Command::GetMany { keys }),
        (bytes(), any::<i64>(), any::<i64>()).prop_map(|(key, start, end)| Command::GetRange {
            key,
            start,
            end
        }),
        bytes().prop_map(|key| Command::Length { key }),
        vec(bytes(), 0..5).prop_map(|keys| Command::Exists { keys }),
        (bytes(), bytes()).prop_map(|(left, right)| Command::Lcs { left, right }),
        bytes().prop_map(|key| Command::Describe { key }),
        (any::<u32>(), bytes(), any::<[u32; 3]>(), any::<[bool; 2]>()).prop_map(
            |(from, bytes, [matches, looked_at, limit], [is_prefix, keys_only])| {
                let whole = if is_prefix { KeyFilter::Prefix } else { KeyFilter::Pattern };
                let limits = PageLimits { matches, looked_at, bytes: limit };
                Command::Scan { from, filter: whole(bytes), limits, keys_only }
            }
        ),
        Just(Command::Count),
    ]
}

fn value_command() -> impl Strategy<Value = Command<Vec<u8>>> {
    prop_oneof![
        (bytes(), bytes(), expiry(), condition(), any::<bool>()).prop_map(
            |(key, value, expiry, condition, return_previous)| Command::Set {
                key,
                value,
                expiry,
                condition,
                return_previous
            }
        ),
        (vec((bytes(), bytes()), 0..5), any::<bool>())
            .prop_map(|(pairs, if_none_exists)| Command::SetMany { pairs, if_none_exists }),
        (bytes(), bytes()).prop_map(|(key, suffix)| Command::Append { key, suffix }),
        (bytes(), any::<i64>(), bytes()).prop_map(|(key, offset, value)| Command::SetRange {
            key,
            offset,
            value
        }),
        (bytes(), any::<i64>()).prop_map(|(key, delta)| Command::Increment { key, delta }),
        (bytes(), bytes()).prop_map(|(key, delta)| Command::IncrementFloat { key, delta }),
    ]
}

fn key_command() -> impl Strategy<Value = Command<Vec<u8>>> {
    let expire_condition =
        any::<[bool; 4]>().prop_map(|[if_none, if_some, if_later, if_earlier]| ExpireCondition {
            if_none,
            if_some,
            if_later,
            if_earlier,
        });
    prop_oneof![
        vec(bytes(), 0..5).prop_map(|keys| Command::Delete { keys }),
        (bytes(), condition()).prop_map(|(key, condition)| Command::DeleteIf { key, condition }),
        bytes().prop_map(|key| Command::GetDelete { key }),
        (bytes(), expiry()).prop_map(|(key, expiry)| Command::GetExpire { key, expiry }),
        (bytes(), expiry(), expire_condition).prop_map(|(key, at, condition)| Command::Expire {
            key,
            at,
            condition
        }),
        bytes().prop_map(|key| Command::Persist { key }),
        (bytes(), bytes(), any::<bool>()).prop_map(|(from, to, if_absent)| Command::Rename {
            from,
            to,
            if_absent
        }),
        (bytes(), bytes(), any::<bool>()).prop_map(|(from, to, replace)| Command::Copy {
            from,
            to,
            replace
        }),
        any::<usize>().prop_map(|limit| Command::Clear { limit }),
    ]
}

fn command() -> impl Strategy<Value = Command<Vec<u8>>> {
    let plain = || prop_oneof![read_command(), value_command(), key_command()];
    let guard = (bytes(), any::<u64>()).prop_map(|(key, version)| Guard { key, version });
    let mode = prop_oneof![Just(TransactionMode::KeepGoing), Just(TransactionMode::AllOrNothing)];
    let transaction = (vec(guard, 0..4), vec(plain(), 0..6), mode)
        .prop_map(|(guards, commands, mode)| Command::Transaction { guards, commands, mode });
    prop_oneof![3 => plain(), 1 => transaction]
}

fn value() -> impl Strategy<Value = Value> {
    (bytes(), any::<u64>(), any::<Option<u64>>())
        .prop_map(|(bytes, version, expires_at_ms)| Value { bytes, version, expires_at_ms })
}

fn error() -> impl Strategy<Value = Error> {
    prop_oneof![
        Just(Error::NotInteger),
        Just(Error::NotLeader),
        Just(Error::Stopping),
        any::<(u16, u64)>()
            .prop_map(|(partition, waited_ms)| Error::NoLeader { partition, waited_ms }),
        any::<usize>().prop_map(Error::KeyTooLong),
        any::<u64>().prop_map(|limit| Error::OutOfMemory { limit }),
        ".{0,20}".prop_map(Error::LogFailed),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let run = any::<[usize; 4]>().prop_map(|[a, b, c, d]| LcsRun { left: a..b, right: c..d });
    let lcs = (bytes(), vec(run, 0..4)).prop_map(|(bytes, runs)| Lcs { bytes, runs });
    let description = (any::<[u64; 3]>(), any::<Option<u64>>(), any::<u32>()).prop_map(
        |([version, value_bytes, memory_bytes], expires_at_ms, written_at_s)| Description {
            version,
            expires_at_ms,
            value_bytes: value_bytes as usize,
            written_at_s,
            memory_bytes: memory_bytes as usize,
        },
    );
    let plain = prop_oneof![
        proptest::option::of(value()).prop_map(Reply::Value),
        vec(proptest::option::of(value()), 0..5).prop_map(Reply::Values),
        bytes().prop_map(Reply::Bytes),
        any::<i64>().prop_map(Reply::Integer),
        any::<(i64, u64)>().prop_map(|(value, version)| Reply::Counter { value, version }),
        any::<u64>().prop_map(|version| Reply::Written { version }),
        any::<u64>().prop_map(|version| Reply::NotWritten { version }),
        (proptest::option::of(value()), any::<bool>())
            .prop_map(|(previous, written)| Reply::Previous { previous, written }),
        lcs.prop_map(Reply::Lcs),
        proptest::option::of(description).prop_map(Reply::Described),
        any::<Option<usize>>().prop_map(|position| Reply::Aborted { position }),
        error().prop_map(Reply::Error),
    ]
    .boxed();
    prop_oneof![3 => plain.clone(), 1 => vec(plain, 0..6).prop_map(Reply::Many)]
}

fn encoded_command(command: &Command<Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    encode_command(command, &mut out).expect("short");
    out
}

fn encoded_reply(reply: &Reply) -> Vec<u8> {
    let mut out = Vec::new();
    encode_reply(reply, &mut out).expect("short");
    out
}

proptest! {
    #[test]
    fn a_command_comes_back(command in command()) {
        let bytes = encoded_command(&command);
        prop_assert_eq!(decode_command(&bytes).map(|decoded| decoded.to_owned()), Ok(command));
    }

    #[test]
    fn a_reply_comes_back(reply in reply()) {
        prop_assert_eq!(decode_reply(&encoded_reply(&reply)), Ok(reply));
    }

    #[test]
    fn a_part_of_a_message_is_malformed(command in command(), reply in reply(), cut: prop::sample::Index) {
        let bytes = encoded_command(&command);
        let part = &bytes[..cut.index(bytes.len())];
        prop_assert_eq!(decode_command(part), Err(CodecError::Malformed));
        let bytes = encoded_reply(&reply);
        let part = &bytes[..cut.index(bytes.len())];
        prop_assert_eq!(decode_reply(part), Err(CodecError::Malformed));
    }

    /// Junk that decodes is a command of its own, and comes back like any other.
    #[test]
    fn junk_is_an_error_or_a_command(bytes in vec(prop_oneof![0u8..32, any::<u8>()], 0..60)) {
        if let Ok(command) = decode_command(&bytes) {
            let again = encoded_command(&command.to_owned());
            prop_assert_eq!(decode_command(&again), Ok(command));
        }
        if let Ok(reply) = decode_reply(&bytes) {
            prop_assert_eq!(decode_reply(&encoded_reply(&reply)), Ok(reply));
        }
    }

    #[test]
    fn a_damaged_message_is_no_panic(command in command(), at: prop::sample::Index, byte: u8) {
        let mut bytes = encoded_command(&command);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        // An error, or another command.
        drop(decode_command(&bytes));
        drop(decode_reply(&bytes));
    }
}

/// The numbers are part of the format: a variant that moves breaks a cluster in the middle of an upgrade.
#[test]
fn variants_keep_their_numbers() {
    let mode = TransactionMode::AllOrNothing;
    let (guards, commands) = (Vec::new(), vec![Command::Get { key: b"k".to_vec() }]);
    let transaction = Command::Transaction { guards, commands, mode };
    assert_eq!(encoded_command(&transaction), [TRANSACTION as u8, 0, 1, 0, 1, b'k', 1]);
    let many = Reply::Many(vec![Reply::Integer(-1)]);
    assert_eq!(encoded_reply(&many), [MANY as u8, 1, 3, 1]);
    assert_eq!(encoded_reply(&Reply::Error(Error::Stopping)), [12, 20]);
    let set = Command::Set {
        key: b"k".to_vec(),
        value: b"vv".to_vec(),
        expiry: Expiry::In(300),
        condition: Condition::IfPresent,
        return_previous: true,
    };
    let expected = [7, 1, b'k', 2, b'v', b'v', 2, 0xac, 2, 2, 1];
    assert_eq!(encoded_command(&set), expected);
}

#[test]
fn nesting_without_end_is_refused() {
    // Each level is a transaction of one command, which is the next level.
    let commands = [TRANSACTION as u8, 0, 1].repeat(1_000_000);
    assert_eq!(decode_command(&commands), Err(CodecError::Malformed));
    let replies = [MANY as u8, 1].repeat(1_000_000);
    assert_eq!(decode_reply(&replies), Err(CodecError::Malformed));
}

#[test]
fn lengths_beyond_the_input_are_malformed() {
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    for start in [&[0][..], &[1], &[TRANSACTION as u8], &[TRANSACTION as u8, 0]] {
        let bytes = [start, &huge].concat();
        assert_eq!(decode_command(&bytes), Err(CodecError::Malformed));
    }
    for start in [&[1][..], &[2], &[MANY as u8]] {
        let bytes = [start, &huge].concat();
        assert_eq!(decode_reply(&bytes), Err(CodecError::Malformed));
    }
}

#[test]
fn what_is_over_the_limit_is_refused_and_leaves_no_trace() {
    let mut out = b"before".to_vec();
    let reply = Reply::Bytes(vec![0; MAX_ENCODED_BYTES]);
    assert_eq!(encode_reply(&reply, &mut out), Err(CodecError::TooLong));
    assert_eq!(out, b"before");
    let bytes = vec![0; MAX_ENCODED_BYTES + 1];
    assert_eq!(decode_command(&bytes), Err(CodecError::TooLong));
    assert_eq!(decode_reply(&bytes), Err(CodecError::TooLong));
}
