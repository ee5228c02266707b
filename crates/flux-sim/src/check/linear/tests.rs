//! Histories that have an order, and such that have none.

use super::*;
use crate::random::Random;

fn operation(invoked_us: u64, call: Call, returned: Option<(u64, Answer)>) -> Operation {
    Operation { client: 0, call, invoked_us, once: None, returned }
}

fn set(from: u64, to: u64, value: i64, version: u64) -> Operation {
    operation(from, Call::Set(value), Some((to, Answer::Written(version))))
}

fn get(from: u64, to: u64, seen: Option<(i64, u64)>) -> Operation {
    operation(from, Call::Get, Some((to, Answer::Value(seen))))
}

fn verdict(mut operations: Vec<Operation>) -> Verdict {
    operations.sort_by_key(|one| one.invoked_us);
    search(Register::ABSENT, &operations, SEARCH_STEPS)
}

#[test]
fn concurrent_operations_may_take_effect_in_any_order() {
    let good = vec![set(0, 10, 1, 1), set(0, 10, 2, 2), get(11, 12, Some((2, 2)))];
    assert_eq!(verdict(good), Verdict::Linearizable);
    let early = vec![set(0, 10, 1, 1), get(5, 6, Some((1, 1))), get(7, 8, Some((1, 1)))];
    assert_eq!(verdict(early), Verdict::Linearizable);
}

#[test]
fn a_stale_read_is_found() {
    let stale = vec![set(0, 1, 1, 1), set(2, 3, 2, 2), get(4, 5, Some((1, 1)))];
    assert_eq!(verdict(stale), Verdict::NotLinearizable);
    let back =
        vec![set(0, 1, 1, 1), set(2, 9, 2, 2), get(3, 4, Some((2, 2))), get(5, 6, Some((1, 1)))];
    assert_eq!(verdict(back), Verdict::NotLinearizable, "once seen, it stays seen");
}

#[test]
fn a_lost_write_and_a_lost_update_are_found() {
    let lost = vec![set(0, 1, 1, 1), get(2, 3, None)];
    assert_eq!(verdict(lost), Verdict::NotLinearizable);
    let add = |from, to, sum, version| {
        operation(from, Call::Increment(1), Some((to, Answer::Counter(sum, version))))
    };
    assert_eq!(verdict(vec![add(0, 9, 1, 1), add(0, 9, 2, 2)]), Verdict::Linearizable);
    assert_eq!(verdict(vec![add(0, 9, 1, 1), add(0, 9, 1, 2)]), Verdict::NotLinearizable);
}

#[test]
fn two_winners_of_one_condition_are_found() {
    let swap = |from, to, value, version| {
        let answer = Some((to, Answer::Written(version)));
        operation(from, Call::SetIfVersion(1, value), answer)
    };
    let one = vec![set(0, 1, 1, 1), swap(2, 9, 2, 2)];
    assert_eq!(verdict(one.clone()), Verdict::Linearizable);
    let two = [one, vec![swap(2, 9, 3, 3)]].concat();
    assert_eq!(verdict(two), Verdict::NotLinearizable);
}

#[test]
fn an_unknown_outcome_may_come_late_or_never() {
    let unknown = operation(2, Call::Set(2), None);
    let first = set(0, 1, 1, 1);
    let never = vec![first, unknown, get(5, 6, Some((1, 1))), get(7, 8, Some((1, 1)))];
    assert_eq!(verdict(never), Verdict::Linearizable);
    let late = vec![first, unknown, get(5, 6, Some((1, 1))), get(7, 8, Some((2, 2)))];
    assert_eq!(verdict(late), Verdict::Linearizable);
    let twice =
        vec![first, unknown, get(5, 6, Some((2, 2))), set(7, 8, 3, 3), get(9, 10, Some((2, 4)))];
    assert_eq!(verdict(twice), Verdict::NotLinearizable, "it takes effect once at the most");
}

#[test]
fn many_unknown_outcomes_do_not_make_a_search_long() {
    let mut history: Vec<_> = (0..40).map(|at| operation(at, Call::Set(at as i64), None)).collect();
    history.extend((0..40).map(|at| set(100 + at, 200, 100 + at as i64, 10 + at)));
    history.push(get(300, 301, Some((139, 49))));
    history.push(get(302, 303, Some((20, 60))));
    assert_eq!(search(Register::ABSENT, &history, 20_000), Verdict::Linearizable);
    history.push(get(304, 305, Some((139, 49))));
    assert_eq!(search(Register::ABSENT, &history, 200_000), Verdict::NotLinearizable);
}

#[test]
fn an_increment_that_takes_effect_twice_is_found() {
    let add = operation(0, Call::Increment(1), Some((9, Answer::Counter(1, 1))));
    let history = vec![add, get(10, 11, Some((2, 2)))];
    assert_eq!(verdict(history), Verdict::NotLinearizable);
}

#[test]
fn a_search_without_end_is_given_up() {
    let mut history: Vec<_> =
        (0..24).map(|at| operation(at, Call::Increment(1 << at), None)).collect();
    history.push(get(100, 101, Some((-1, 30))));
    assert_eq!(search(Register::ABSENT, &history, 10_000), Verdict::Undecided);
}

#[test]
fn the_window_is_what_fails_and_little_else() {
    let mut history: Vec<_> =
        (0..200).map(|at| set(at * 10, at * 10 + 5, at as i64, at + 1)).collect();
    history.push(get(1006, 1008, Some((98, 99))));
    history.sort_by_key(|one| one.invoked_us);
    let window = shortest_window(&history, SEARCH_STEPS);
    assert_eq!(window, vec![set(1000, 1005, 100, 101), get(1006, 1008, Some((98, 99)))]);
    let violations = check(
        &{
            let mut all = History::default();
            for one in &history {
                all.add(Key { partition: 1, number: 2 }, *one);
            }
            all
        },
        &|_, _| None,
    );
    assert_eq!(violations.len(), 1);
    assert!(
        violations[0].evidence.contains("p1/k2: no order of 2 of its 201"),
        "{}",
        violations[0]
    );
}

#[test]
fn looked_up_outcomes_decide_what_would_take_too_long() {
    let key = Key { partition: 0, number: 0 };
    let mut history = History::default();
    (0..24).for_each(|at| history.add(key, operation(at, Call::Increment(1 << at), None)));
    history.add(key, operation(30, Call::Set(7), None));
    history.add(key, operation(31, Call::Set(8), None));
    history.add(key, get(100, 101, Some((8, 30))));
    history.add(key, get(102, 103, Some((7, 40))));
    let outcome = |_: Key, one: &Operation| match one.call {
        Call::Set(7) => Some(Answer::Written(40)),
        Call::Set(_) => Some(Answer::Written(30)),
        _ => None,
    };
    assert!(check(&history, &outcome).is_empty());
    history.add(key, get(104, 105, Some((-1, 40))));
    let violations = check(&history, &outcome);
    assert_eq!(violations[0].promise, Promise::Linearizable);
}

/// Runs a real register under random concurrent clients: its histories have an order, and one
/// answer that is changed leaves them without, unless nobody could tell.
#[test]
fn histories_of_a_real_register_pass_and_changed_ones_fail() {
    let mut failed = 0;
    for seed in 0..100 {
        let mut random = Random::new(seed);
        let mut history = real_history(&mut random);
        assert_eq!(verdict(history.clone()), Verdict::Linearizable, "seed {seed}");
        let place = random.below(history.len() as u64) as usize;
        match &mut history[place].returned {
            Some((_, Answer::Value(Some((value, _))) | Answer::Counter(value, _))) => {
                *value += 1;
            }
            Some((_, Answer::Written(version))) => *version += 1000,
            Some((_, Answer::Deleted(there))) => *there = !*there,
            _ => continue,
        }
        failed += usize::from(verdict(history) == Verdict::NotLinearizable);
    }
    assert!(failed > 50, "only {failed}");
}

fn real_history(random: &mut Random) -> Vec<Operation> {
    let (mut contents, mut revision) = (None::<(i64, u64)>, 0);
    let mut history = Vec::new();
    let mut points: Vec<u64> = (0..60).map(|_| random.between(50, 5000)).collect();
    points.sort_unstable();
    points.dedup();
    for (number, point) in points.into_iter().enumerate() {
        let number = number as i64;
        let call = match random.below(6) {
            0 => Call::Get,
            1 => Call::Set(number),
            2 => Call::Delete,
            3 => Call::SetIfAbsent(number),
            4 => Call::SetIfVersion(contents.map_or(0, |(_, version)| version), number),
            _ => Call::Increment(number),
        };
        revision += 1;
        let before = contents;
        let mut write = |value| {
            contents = Some((value, revision));
            revision
        };
        let answer = match (call, before) {
            (Call::Get, _) => Answer::Value(before),
            (Call::Set(value) | Call::SetIfVersion(_, value), _) => Answer::Written(write(value)),
            (Call::SetIfAbsent(value), None) => Answer::Written(write(value)),
            (Call::SetIfAbsent(_), Some((_, version))) => Answer::NotWritten(version),
            (Call::Delete, _) => {
                contents = None;
                Answer::Deleted(before.is_some())
            }
            (Call::Increment(by), _) => {
                let sum = before.map_or(0, |(value, _)| value) + by;
                Answer::Counter(sum, write(sum))
            }
        };
        let from = point - random.below(50);
        let returned = (point + random.below(50), answer);
        let known = matches!(call, Call::Get) || !random.per_mille(100);
        history.push(operation(from, call, known.then_some(returned)));
    }
    history
}
