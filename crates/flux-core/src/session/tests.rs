//! The answers' bytes, and what is remembered and forgotten when.

use proptest::collection::vec;
use proptest::prelude::*;

use super::answer::{decode, encode};
use super::*;
use crate::reply::{Description, Lcs, LcsRun};
use crate::{Error, Value};

const GONE: Option<Reply> = Some(Reply::Error(Error::AnswerGone));

fn once(session: u64, sequence: u64, acked_below: u64) -> Once {
    Once { session, sequence, acked_below }
}

fn written(version: u64) -> Reply {
    Reply::Written { version }
}

fn encoded(reply: &Reply) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    encode(reply, &mut bytes).then_some(bytes)
}

/// Answers as they come from the log, with `version` for an answer.
fn remember(sessions: &mut Sessions, once: Once, version: u64, now_ms: u64) {
    sessions.advance(now_ms);
    let reply = encoded(&written(version)).expect("it has bytes");
    sessions.remember(&once, &reply, now_ms);
    check(sessions);
}

/// What holds at any time.
fn check(sessions: &Sessions) {
    assert!(sessions.recent <= MAX_SESSIONS && sessions.len() - sessions.recent <= MAX_FADED);
    assert!(sessions.bytes() <= MAX_BYTES);
    assert_eq!(sessions.order.len(), sessions.len());
}

fn check_in_full(sessions: &Sessions) {
    check(sessions);
    let mut last_used_at_ms = 0;
    for (used, id) in &sessions.order {
        let session = &sessions.by_id[id];
        assert_eq!(session.used, *used);
        assert!(last_used_at_ms <= session.used_at_ms && session.used_at_ms <= sessions.clock_ms);
        last_used_at_ms = session.used_at_ms;
        let sequences = session.answers.iter().map(|answer| answer.sequence);
        assert!(sequences.is_sorted() && session.answers.len() <= MAX_ANSWERS);
        assert!(session.answers.front().is_none_or(|first| first.sequence >= session.floor));
        assert!(*used >= sessions.faded_below || session.answers.is_empty());
    }
    let answers = sessions.by_id.values().flat_map(|session| &session.answers);
    assert_eq!(sessions.bytes(), answers.map(Answer::bytes).sum::<usize>());
    assert_eq!(sessions.recent, sessions.order.range(sessions.faded_below..).count());
}

fn values() -> impl Strategy<Value = Value> {
    (vec(any::<u8>(), 0..40), any::<u64>(), any::<Option<u64>>())
        .prop_map(|(bytes, version, expires_at_ms)| Value { bytes, version, expires_at_ms })
}

fn replies() -> impl Strategy<Value = Reply> {
    let size = prop_oneof![0usize..300, any::<usize>()];
    let run = [size.clone(), size.clone(), size.clone(), size.clone()]
        .prop_map(|[a, b, c, d]| LcsRun { left: a..b, right: c..d });
    let description = (
        any::<u64>(),
        any::<Option<u64>>(),
        size.clone(),
        any::<u32>(),
        size.clone(),
    )
        .prop_map(|(version, expires_at_ms, value_bytes, written_at_s, memory_bytes)| {
            Description { version, expires_at_ms, value_bytes, written_at_s, memory_bytes }
        });
    let leaf = prop_oneof![
        any::<u64>().prop_map(written),
        any::<u64>().prop_map(|version| Reply::NotWritten { version }),
        any::<i64>().prop_map(Reply::Integer),
        (any::<i64>(), any::<u64>()).prop_map(|(value, version)| Reply::Counter { value, version }),
        proptest::option::of(values()).prop_map(Reply::Value),
        vec(proptest::option::of(values()), 0..4).prop_map(Reply::Values),
        vec(any::<u8>(), 0..40).prop_map(Reply::Bytes),
        (proptest::option::of(values()), any::<bool>())
            .prop_map(|(previous, written)| Reply::Previous { previous, written }),
        proptest::option::of(0usize..300).prop_map(|position| Reply::Aborted { position }),
        (vec(any::<u8>(), 0..40), vec(run, 0..4))
            .prop_map(|(bytes, runs)| Reply::Lcs(Lcs { bytes, runs })),
        proptest::option::of(description).prop_map(Reply::Described),
    ];
    let inner =
        prop_oneof![4 => leaf.clone(), 1 => size.prop_flat_map(errors).prop_map(Reply::Error)];
    prop_oneof![4 => leaf, 1 => vec(inner, 0..6).prop_map(Reply::Many)]
}

/// Those that a command has by its own fault.
fn errors(bytes: usize) -> impl Strategy<Value = Error> {
    proptest::sample::select(vec![
        Error::NotInteger,
        Error::NotFloat,
        Error::Overflow,
        Error::NotFinite,
        Error::OffsetOutOfRange,
        Error::InvalidExpiry,
        Error::NoSuchKey,
        Error::EmptyKey,
        Error::KeyTooLong(bytes),
        Error::ValueTooLarge(bytes),
        Error::WriteTooLarge(bytes),
        Error::ReplyTooLarge(bytes),
        Error::TooLargeToCompare(bytes),
    ])
}

#[derive(Clone, Debug)]
enum Step {
    Remember {
        once: Once,
        bytes: usize,
    },
    Pass(u64),
    /// The clock of the leader, not that of the sessions.
    Back(u64),
}

/// Few sessions and sequences, so that they meet; now and then a long time.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sequence = prop_oneof![9 => 0u64..30, 1 => u64::MAX - 2..=u64::MAX];
    let bytes = prop_oneof![4 => 0usize..20, 1 => Just(MAX_ANSWER_BYTES)];
    let step = prop_oneof![
        20 => (0u64..5, sequence, 0u64..30, bytes).prop_map(|(session, sequence, back, bytes)| {
            Step::Remember { once: once(session, sequence, sequence.saturating_sub(back)), bytes }
        }),
        2 => (0..TIMEOUT_MS / 2).prop_map(Step::Pass),
        1 => (0..TIMEOUT_MS).prop_map(Step::Back),
        1 => Just(Step::Pass(TIMEOUT_MS)),
    ];
    vec(step, 0..100)
}

fn take(sessions: &mut Sessions, now_ms: &mut u64, step: &Step) {
    match step {
        Step::Remember { once, bytes } => {
            sessions.advance(*now_ms);
            sessions.remember(once, &vec![7; *bytes], *now_ms);
        }
        Step::Pass(ms) => {
            // What passes at once counts for little.
            for _ in 0..ms / MAX_STEP_MS {
                *now_ms += MAX_STEP_MS;
                sessions.advance(*now_ms);
            }
            *now_ms += ms % MAX_STEP_MS;
        }
        Step::Back(ms) => *now_ms = now_ms.saturating_sub(*ms),
    }
    check_in_full(sessions);
}

proptest! {
    #[test]
    fn an_answer_is_read_as_it_was_written(reply in replies()) {
        let bytes = encoded(&reply).expect("it is short");
        prop_assert_eq!(decode(&bytes), Some(reply));
        for end in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..end]), None);
        }
        prop_assert_eq!(decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn arbitrary_bytes_are_no_answer_or_one(
        bytes in vec(prop_oneof![0u8..17, any::<u8>()], 0..60),
    ) {
        if let Some(reply) = decode(&bytes) {
            // An error alone can be read, though none is written.
            let is_error = matches!(reply, Reply::Error(_));
            prop_assert!(is_error || encoded(&reply) == Some(bytes), "one answer has one form");
        }
    }

    /// A replica that got the sessions with a snapshot goes on exactly as the one that gave them.
    #[test]
    fn a_snapshot_holds_all_that_counts(before in steps(), after in steps()) {
        let (mut sessions, mut now_ms) = (Sessions::new(), 1_000_000);
        before.iter().for_each(|step| take(&mut sessions, &mut now_ms, step));
        let bytes = sessions.encode();
        prop_assert_eq!(bytes.is_empty(), sessions.is_empty());
        let mut copy = Sessions::decode(&bytes).expect("its own bytes");
        check_in_full(&copy);
        prop_assert_eq!(copy.encode(), bytes);
        let mut same_ms = now_ms;
        for step in &after {
            take(&mut sessions, &mut now_ms, step);
            take(&mut copy, &mut same_ms, step);
            prop_assert_eq!(copy.encode(), sessions.encode());
        }
    }

    #[test]
    fn junk_never_panics(
        steps in steps(),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        end in any::<proptest::sample::Index>(),
        junk in vec(prop_oneof![0u8..4, any::<u8>()], 0..100),
    ) {
        let (mut sessions, mut now_ms) = (Sessions::new(), 1_000_000);
        steps.iter().for_each(|step| take(&mut sessions, &mut now_ms, step));
        let mut bytes = sessions.encode();
        let cut = &bytes[..end.index(bytes.len() + 1)];
        prop_assert!(cut.is_empty() || cut.len() == bytes.len() || Sessions::decode(cut).is_none());
        if !bytes.is_empty() {
            for (place, byte) in changes {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
        }
        for bytes in [bytes, junk.clone(), [&[FORMAT], &junk[..]].concat()] {
            if let Some(mut sessions) = Sessions::decode(&bytes) {
                check_in_full(&sessions);
                prop_assert_eq!(sessions.encode(), bytes, "one state has one form");
                let now_ms = sessions.clock_ms;
                take(&mut sessions, &mut now_ms.clone(), &Step::Remember { once: once(1, 9, 5), bytes: 9 });
            }
        }
    }
}

/// What is in logs and snapshots must be read by all versions to come.
#[test]
fn answers_have_the_documented_bytes() {
    let value = || Value { bytes: b"v".to_vec(), version: 300, expires_at_ms: Some(0x0102) };
    let stored = [&[1, b'v', 0xac, 2, 1, 2, 1, 0, 0, 0, 0, 0, 0][..]].concat();
    let with = |head: &[u8], tail: &[u8]| [head, &stored, tail].concat();
    let cases = [
        (written(300), vec![1, 0xac, 2]),
        (Reply::NotWritten { version: 0 }, vec![2, 0]),
        (Reply::Integer(-1), vec![3, 1]),
        (Reply::Counter { value: 64, version: 5 }, vec![4, 0x80, 1, 5]),
        (Reply::Value(None), vec![5]),
        (Reply::Value(Some(value())), with(&[6], &[])),
        (Reply::Previous { previous: None, written: true }, vec![7, 1]),
        (Reply::Previous { previous: Some(value()), written: false }, with(&[7, 2], &[])),
        (Reply::Bytes(b"ab".to_vec()), vec![8, 2, b'a', b'b']),
        (Reply::Values(vec![None, Some(value())]), with(&[9, 2, 0, 1], &[])),
        (Reply::Aborted { position: None }, vec![10, 0]),
        (Reply::Aborted { position: Some(2) }, vec![10, 3]),
        (
            Reply::Many(vec![Reply::Integer(0), Reply::Error(Error::KeyTooLong(9))]),
            vec![11, 2, 3, 0, 15, 9, 9],
        ),
        (
            Reply::Lcs(Lcs {
                bytes: b"x".to_vec(),
                runs: vec![LcsRun { left: 1..2, right: 3..4 }],
            }),
            vec![12, 1, b'x', 1, 1, 2, 3, 4],
        ),
        (Reply::Described(None), vec![13]),
        (
            Reply::Described(Some(Description {
                version: 1,
                expires_at_ms: None,
                value_bytes: 2,
                written_at_s: 3,
                memory_bytes: 4,
            })),
            vec![14, 1, 0, 2, 3, 4],
        ),
    ];
    for (reply, bytes) in cases {
        assert_eq!(encoded(&reply), Some(bytes), "{reply:?}");
    }
}

#[test]
fn what_is_too_long_or_no_answer_has_no_bytes() {
    let bytes = |count| Reply::Bytes(vec![1; count]);
    let longest = encoded(&bytes(MAX_ANSWER_BYTES - 3)).expect("just short enough");
    assert_eq!(longest.len(), MAX_ANSWER_BYTES);
    assert_eq!(encoded(&bytes(MAX_ANSWER_BYTES - 2)), None);
    assert_eq!(encoded(&Reply::Many(vec![Reply::Integer(1); MAX_ANSWER_BYTES])), None);
    assert_eq!(encoded(&Reply::Values(vec![None; MAX_ANSWER_BYTES])), None);
    for error in [Error::NotInteger, Error::Overloaded] {
        assert_eq!(encoded(&Reply::Error(error)), None);
    }
    assert_eq!(encoded(&Reply::Many(vec![Reply::Error(Error::Overloaded)])), None);
    let deep = |depth| (0..depth).fold(Reply::Integer(1), |reply, _| Reply::Many(vec![reply]));
    assert!(encoded(&deep(4)).is_some());
    assert_eq!(encoded(&deep(5)), None);
    assert_eq!(decode(&[&[11, 1].repeat(5)[..], &[3, 2]].concat()), None);
    assert_eq!(decode(&[11, 1].repeat(100_000)), None);
}

#[test]
fn a_repeated_write_gets_its_answer_until_it_is_acknowledged() {
    let mut sessions = Sessions::new();
    assert_eq!(sessions.answer(&once(1, 1, 1)), None);
    // Sequences need not come in order, nor follow on each other.
    for (sequence, version) in [(3, 30), (9, 90), (5, 50)] {
        remember(&mut sessions, once(1, sequence, 0), version, 0);
    }
    remember(&mut sessions, once(2, 5, 0), 99, 0);
    for (sequence, version) in [(3, 30), (5, 50), (9, 90)] {
        assert_eq!(sessions.answer(&once(1, sequence, 0)), Some(written(version)));
    }
    for sequence in [0, 4, 6, 10] {
        assert_eq!(sessions.answer(&once(1, sequence, 0)), None, "it is new");
    }
    remember(&mut sessions, once(1, 10, 6), 100, 0);
    for sequence in [0, 3, 4, 5] {
        assert_eq!(sessions.answer(&once(1, sequence, 0)), GONE);
    }
    assert_eq!(sessions.answer(&once(1, 6, 0)), None);
    assert_eq!(sessions.answer(&once(1, 9, 9)), Some(written(90)));
    assert_eq!(sessions.answer(&once(2, 5, 0)), Some(written(99)), "another session's");
    // A lower acknowledgement that comes later changes nothing, nor does a second answer.
    remember(&mut sessions, once(1, 9, 2), 91, 0);
    assert_eq!(sessions.answer(&once(1, 9, 0)), Some(written(90)));
    assert_eq!(sessions.answer(&once(1, 4, 0)), GONE);
    check_in_full(&sessions);
}

#[test]
fn an_answer_that_is_not_kept_is_gone_and_not_new() {
    let mut sessions = Sessions::new();
    sessions.remember(&once(1, 5, 5), &[], 0);
    assert_eq!(sessions.answer(&once(1, 5, 5)), GONE);
    sessions.remember(&once(1, 6, 5), b"no answer of this version", 0);
    assert_eq!(sessions.answer(&once(1, 6, 5)), GONE);
}

#[test]
fn a_session_keeps_its_newest_answers() {
    let mut sessions = Sessions::new();
    let last = MAX_ANSWERS as u64 + 10;
    for sequence in 1..=last {
        remember(&mut sessions, once(1, sequence, 0), sequence, 0);
    }
    for sequence in 1..=10 {
        assert_eq!(sessions.answer(&once(1, sequence, 0)), GONE);
    }
    for sequence in 11..=last {
        assert_eq!(sessions.answer(&once(1, sequence, 0)), Some(written(sequence)));
    }
    check_in_full(&sessions);
}

#[test]
fn sessions_fade_before_they_are_forgotten() {
    let mut sessions = Sessions::new();
    let count = (MAX_SESSIONS + MAX_FADED) as u64;
    for id in 1..=count {
        remember(&mut sessions, once(id, 100, 0), id, 0);
        // This one is always in use.
        remember(&mut sessions, once(0, id, id.saturating_sub(1)), id, 0);
    }
    assert_eq!(sessions.len() as u64, count, "one was forgotten");
    assert_eq!(sessions.answer(&once(1, 100, 0)), None);
    assert_eq!(sessions.answer(&once(0, count, 0)), Some(written(count)));
    for id in 2..=count {
        let kept = id > count - MAX_SESSIONS as u64 + 1;
        let expected = if kept { Some(written(id)) } else { GONE };
        assert_eq!(sessions.answer(&once(id, 100, 0)), expected, "{id}");
        assert_eq!(sessions.answer(&once(id, 101, 0)), None);
    }
    check_in_full(&sessions);

    // A faded one that is used again keeps answers again, and another fades in its place.
    let mut copy = Sessions::decode(&sessions.encode()).expect("its own bytes");
    check_in_full(&copy);
    for sessions in [&mut copy, &mut sessions] {
        remember(sessions, once(2, 101, 0), 7, 0);
        remember(sessions, once(3 + count, 1, 0), 7, 0);
    }
    assert_eq!(copy.encode(), sessions.encode());
    assert_eq!(sessions.answer(&once(2, 101, 0)), Some(written(7)));
    assert_eq!(sessions.answer(&once(2, 100, 0)), GONE);
    let oldest = count - MAX_SESSIONS as u64 + 2;
    assert_eq!(sessions.answer(&once(oldest, 100, 0)), GONE);
    check_in_full(&sessions);
}

#[test]
fn answers_take_a_bounded_amount_of_memory() {
    let mut sessions = Sessions::new();
    let large = vec![0; MAX_ANSWER_BYTES];
    let fit = (MAX_BYTES / (MAX_ANSWER_BYTES + ANSWER_OVERHEAD)) as u64;
    // Of one session the oldest ones go.
    for sequence in 1..=fit + 5 {
        sessions.remember(&once(1, sequence, 0), &large, 0);
    }
    check_in_full(&sessions);
    let session = &sessions.by_id[&1];
    assert_eq!((session.floor, session.answers.len() as u64), (6, fit));
    // Of several, all of the least recently used one.
    sessions.remember(&once(2, 1, 0), &large, 0);
    check_in_full(&sessions);
    assert_eq!(sessions.answer(&once(1, fit, 0)), GONE);
    assert_eq!(sessions.by_id[&1].floor, fit + 6);
    assert_eq!(sessions.by_id[&2].answers.len(), 1);
}

#[test]
fn a_session_that_is_not_used_expires() {
    let mut sessions = Sessions::new();
    let wait = |sessions: &mut Sessions, from: u64, to: u64| {
        (from..to).step_by(MAX_STEP_MS as usize).chain([to]).for_each(|at| sessions.advance(at));
    };
    remember(&mut sessions, once(1, 1, 0), 1, 1_000);
    remember(&mut sessions, once(2, 1, 0), 2, 2_000);
    wait(&mut sessions, 2_000, 1_000 + TIMEOUT_MS - 1);
    assert_eq!(sessions.answer(&once(1, 1, 0)), Some(written(1)));
    // The clock of another leader is behind: time stands still, and goes on from there.
    remember(&mut sessions, once(2, 2, 0), 3, 0);
    assert_eq!(sessions.by_id[&2].used_at_ms, 1_000 + TIMEOUT_MS - 1);
    sessions.advance(1);
    assert_eq!(sessions.answer(&once(1, 1, 0)), None);
    assert_eq!(sessions.answer(&once(2, 1, 0)), Some(written(2)));
    check_in_full(&sessions);
    wait(&mut sessions, 1, TIMEOUT_MS);
    assert!(sessions.is_empty());
    assert_eq!((sessions.bytes(), sessions.encode()), (0, Vec::new()));
    remember(&mut sessions, once(2, 1, 0), 4, 5);
    assert_eq!(sessions.clock_ms, 5, "as if there had been none before");
}

#[test]
fn a_clock_that_is_set_forward_ends_no_session() {
    let mut sessions = Sessions::new();
    remember(&mut sessions, once(1, 1, 0), 1, 1_000);
    for hours in 1..20 {
        sessions.advance(hours * 3_600_000);
        assert_eq!(sessions.answer(&once(1, 1, 0)), Some(written(1)), "after {hours} steps");
        sessions.advance(1_000);
    }
}
