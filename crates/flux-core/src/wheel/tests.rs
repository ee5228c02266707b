//! The wheel against a sorted map.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const TICK_MS: u64 = 1 << TICK_BITS;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    Advance(u64, usize),
}

/// Times that are near, minutes away, years away, or anywhere.
fn spans() -> impl Strategy<Value = u64> {
    prop_oneof![0..100u64, 0..5_000u64, 0..10_000_000u64, 0..1u64 << 40]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => spans().prop_map(Op::Insert),
        1 => any::<u64>().prop_map(|at| Op::Insert(at.wrapping_sub(1 << 42))),
        2 => (spans(), prop_oneof![0..4usize, Just(usize::MAX)])
            .prop_map(|(by, limit)| Op::Advance(by, limit)),
    ];
    vec(op, 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_sorted_map(start in 0..1u64 << 42, ops in ops()) {
        let mut now = start;
        let mut wheel = Wheel::new(now);
        // Times by position; every position is used once.
        let mut model = BTreeMap::new();
        let mut next = 0;
        for op in ops {
            match op {
                Op::Insert(span) => {
                    let at = now.saturating_add(span).saturating_sub(1_000);
                    wheel.insert(at, Position(next));
                    model.insert(next, at);
                    next += 1;
                }
                Op::Advance(by, limit) => {
                    now += by;
                    let mut due = Vec::new();
                    wheel.advance(now, limit, &mut due);
                    prop_assert!(due.len() <= limit);
                    for position in &due {
                        let at = model.remove(&position.0);
                        prop_assert!(at.is_some_and(|at| at <= now), "early or twice");
                    }
                    if due.len() < limit {
                        let late = model.values().filter(|&&at| at.saturating_add(TICK_MS) <= now);
                        prop_assert_eq!(late.count(), 0);
                    }
                }
            }
            prop_assert_eq!(wheel.len(), model.len());
            prop_assert_eq!(wheel.is_empty(), model.is_empty());
            let hint = wheel.next_due_ms();
            prop_assert_eq!(hint.is_none(), model.is_empty());
            if let (Some(hint), Some(&earliest)) = (hint, model.values().min()) {
                prop_assert!(hint <= earliest.max(now).saturating_add(TICK_MS));
            }
        }
    }
}

/// Following the hint alone gives everything on time, in a bounded number of calls.
#[test]
fn the_hint_leads_to_every_entry() {
    let spans = [0, 1, 8, 9, 511, 512, 513, 40_000, 86_400_000, 365 * 86_400_000, 1 << 50];
    let start = 1_700_000_000_123;
    let mut wheel = Wheel::new(start);
    for (number, span) in spans.into_iter().enumerate() {
        wheel.insert(start + span, Position(number as u32));
    }
    let (mut due, mut calls) = (Vec::new(), 0);
    while let Some(at) = wheel.next_due_ms() {
        let already = due.len();
        wheel.advance(at.max(start), usize::MAX, &mut due);
        for position in &due[already..] {
            let expires_at = start + spans[position.0 as usize];
            assert!((expires_at..expires_at + TICK_MS).contains(&at.max(start)));
        }
        calls += 1;
        assert!(calls < 100);
    }
    assert_eq!(due.len(), spans.len());
}

#[test]
fn a_crowd_is_moved_in_bounded_steps() {
    let mut wheel = Wheel::new(0);
    let crowd = MAX_MOVES as u32 * 3;
    for number in 0..crowd {
        wheel.insert(3_600_000 + u64::from(number % 10_000), Position(number));
    }
    let mut due = Vec::new();
    let mut calls = 0u32;
    while !wheel.is_empty() {
        let before = due.len();
        wheel.advance(4_000_000, 1_000, &mut due);
        assert!(due.len() - before <= 1_000);
        assert!(wheel.is_empty() || wheel.next_due_ms() <= Some(4_000_000), "call again");
        calls += 1;
    }
    assert!(calls < crowd / 1_000 + 20);
    due.sort_unstable();
    assert!(due.iter().map(|position| position.0).eq(0..crowd));
}

#[test]
fn clear_keeps_the_time() {
    let mut wheel = Wheel::new(5);
    wheel.advance(1_000_000, 1, &mut Vec::new());
    wheel.insert(1_100_000, Position(1));
    wheel.clear();
    assert_eq!((wheel.len(), wheel.next_due_ms()), (0, None));
    let mut due = Vec::new();
    wheel.insert(900_000, Position(2));
    wheel.advance(5, 9, &mut due);
    assert_eq!(due, [Position(2)]);
}
