//! Whether the operations on a key can be put into one order, each between its call and its answer.
//!
//! The search is that of Wing and Gong (1993) with the memory of Lowe ("Testing for linearizability",
//! 2017), in the form that Porcupine gave it (github.com/anishathalye/porcupine): the calls and
//! answers of a key are one list by time; a call that can take effect next is taken out together with
//! its answer, and put back when the search meets an answer whose call it has not taken. A set of taken
//! operations that led to the same state before is not tried again. Keys are independent of each other,
//! so each is searched alone.
//!
//! Two things make it short here. Answers show versions, which only rise: whatever shows one is taken in
//! that order. And an operation without an answer may be taken at any time, or never; it is tried last,
//! and a state that was reached with fewer of them makes all those useless that need more.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Write as _;

use super::history::{Answer, Call, History, Key, Operation};
use super::register::{Contents, Register};
use super::{Promise, Violation};

/// How many steps the search of one key may take. A key of a usual run takes some thousand.
pub const SEARCH_STEPS: u64 = 4_000_000;

/// How many it may take before the outcomes that clients do not know are looked up.
const UNAIDED_STEPS: u64 = 30_000;

/// As many for a part of a key's operations, to see where a search that was given up gets long.
const UNDECIDED_STEPS: u64 = 100_000;

/// When answers come that nobody gets.
const NEVER_US: u64 = u64::MAX - 1;

/// Operations of a failing window that are shown at the most.
const SHOWN: usize = 40;

/// What a search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order.
    Linearizable,
    /// There is none.
    NotLinearizable,
    /// The search gave up.
    Undecided,
}

/// Searches every key; the violations found, with the shortest window that shows each.
///
/// What a client does not know, `outcome` does: where the search gets long, it is asked for the answers that
/// writes without one would have had, as [`Reference::outcome`](super::reference::Reference::outcome) gives
/// them.
pub fn check(
    history: &History,
    outcome: &dyn Fn(Key, &Operation) -> Option<Answer>,
) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (key, operations) in history.keys() {
        let mut operations = operations.to_vec();
        operations.sort_by_key(|operation| operation.invoked_us);
        if search(Register::ABSENT, &operations, UNAIDED_STEPS) == Verdict::Undecided {
            for one in operations.iter_mut().filter(|one| one.returned.is_none()) {
                one.returned = outcome(key, one).map(|answer| (NEVER_US, answer));
            }
            operations.retain(|one| one.returned.is_some());
        }
        match search(Register::ABSENT, &operations, SEARCH_STEPS) {
            Verdict::Linearizable => {}
            Verdict::NotLinearizable => {
                let evidence = report(key, &operations, SEARCH_STEPS);
                violations.push(Violation::new(Promise::Linearizable, evidence));
            }
            Verdict::Undecided => {
                let evidence = report(key, &operations, UNDECIDED_STEPS);
                violations.push(Violation::new(Promise::Undecided, evidence));
            }
        }
    }
    violations
}

/// Searches an order of `operations`, which are sorted by `invoked_us`, from a state.
pub fn search(initial: Register, operations: &[Operation], steps: u64) -> Verdict {
    Search::new(operations).run(initial, steps)
}

/// A call or an answer of an operation that has both, in a list by time.
#[derive(Clone, Copy)]
struct Event {
    at_us: u64,
    operation: usize,
    is_call: bool,
    /// For a call: where its answer is.
    answer: usize,
    before: usize,
    next: usize,
}

/// What is tried next.
#[derive(Clone, Copy)]
enum Choice {
    /// The call at this place of the list, or what follows if an answer is there.
    Answered(usize),
    /// The operation of this number among those without an answer.
    Open(usize),
}

/// The list, linked so that taking out and putting back is cheap: as in Porcupine, and Knuth's dancing
/// links before it. The first and the last place are its two ends.
struct Search<'a> {
    operations: &'a [Operation],
    events: Vec<Event>,
    /// Answers still in the list.
    unanswered: usize,
    /// By operation, where its version stands among all; 0 for one that shows none. Versions only rise, so
    /// operations that show one are taken in the order of `ranks`, of which `ranked` are taken.
    rank: Vec<u64>,
    ranks: Vec<u64>,
    ranked: usize,
    /// Operations without an answer, by their calls.
    open: Vec<usize>,
    taken: Taken,
    seen: Seen,
}

/// Which operations are taken: those with an answer, and those without.
#[derive(Clone)]
struct Taken {
    answered: Box<[u64]>,
    open: Box<[u64]>,
}

/// States reached before, by what is taken of those with an answer, and what the key holds: each with the
/// least version that can follow, and what is taken of the others. Only asked for what it holds, so its
/// order is of no matter.
#[derive(Default)]
struct Seen(HashMap<(Box<[u64]>, Contents), Vec<Reached>>);

type Reached = (u64, Box<[u64]>);

impl Seen {
    /// Notes a state. False if a better one was seen: of the same contents, at a version that leaves as
    /// much open, with no operation taken that is still open here.
    fn insert(&mut self, taken: &Taken, state: Register) -> bool {
        let (contents, floor) = state.parts();
        let known = self.0.entry((taken.answered.clone(), contents)).or_default();
        let within = |few: &[u64], many: &[u64]| few.iter().zip(many).all(|(a, b)| a & !b == 0);
        if known.iter().any(|(least, open)| *least <= floor && within(open, &taken.open)) {
            return false;
        }
        known.retain(|(least, open)| *least < floor || !within(&taken.open, open));
        known.push((floor, taken.open.clone()));
        true
    }
}

impl<'a> Search<'a> {
    fn new(operations: &'a [Operation]) -> Search<'a> {
        let answered = operations
            .iter()
            .enumerate()
            .filter_map(|(at, one)| Some((at, one.invoked_us, one.returned?.0)));
        // At equal times calls come first: operations that touch count as concurrent.
        let both = answered.flat_map(|(at, from, to)| [(from, 0, at), (to, 1, at)]);
        let mut order: Vec<(u64, u8, usize)> = both.collect();
        order.sort_unstable();
        let end = order.len() + 1;
        let edge = |at_us, before, next| Event {
            at_us,
            operation: 0,
            is_call: false,
            answer: end,
            before,
            next,
        };
        let mut events = vec![edge(0, 0, 1)];
        let mut called = vec![0; operations.len()];
        for (place, (at_us, kind, operation)) in order.into_iter().enumerate() {
            let (place, is_call) = (place + 1, kind == 0);
            if is_call {
                called[operation] = place;
            } else {
                events[called[operation]].answer = place;
            }
            let (before, next) = (place - 1, place + 1);
            events.push(Event { at_us, operation, is_call, answer: end, before, next });
        }
        events.push(edge(u64::MAX, end - 1, end));
        let open = |at: &usize| operations[*at].returned.is_none();
        let rank: Vec<u64> = operations.iter().map(rank_of).collect();
        let mut ranks: Vec<u64> = rank.iter().copied().filter(|rank| *rank > 0).collect();
        ranks.sort_unstable();
        let words = || vec![0; operations.len().div_ceil(64)].into_boxed_slice();
        Search {
            operations,
            events,
            unanswered: operations.iter().filter(|one| one.returned.is_some()).count(),
            rank,
            ranks,
            ranked: 0,
            open: (0..operations.len()).filter(open).collect(),
            taken: Taken { answered: words(), open: words() },
            seen: Seen::default(),
        }
    }

    fn run(mut self, initial: Register, steps: u64) -> Verdict {
        let mut state = initial;
        let mut path: Vec<(Choice, Register)> = Vec::new();
        let mut choice = Choice::Answered(self.events[0].next);
        for _ in 0..steps {
            if self.unanswered == 0 {
                return Verdict::Linearizable;
            }
            let tried = match choice {
                Choice::Answered(at) if self.events[at].is_call => {
                    Some((self.events[at].operation, Choice::Answered(self.events[at].next)))
                }
                // This answer came, so its call was before: only what has none is left to be tried.
                Choice::Answered(_) => {
                    choice = Choice::Open(0);
                    continue;
                }
                Choice::Open(number) => {
                    self.open_call(number).map(|call| (call, Choice::Open(number + 1)))
                }
            };
            if let Some((operation, otherwise)) = tried {
                let Operation { call, returned, .. } = self.operations[operation];
                let next = state.step(call, returned.map(|(_, answer)| answer));
                // What an open write overwrites that nobody saw need not have been taken.
                let hides =
                    matches!((choice, path.last()), (Choice::Open(_), Some((Choice::Open(_), _))))
                        && matches!(call, Call::Set(_) | Call::Delete);
                let fits = !hides && !self.is_taken(operation) && self.is_due(operation);
                let next = next.filter(|_| fits);
                match next.filter(|next| self.take(choice, operation, *next)) {
                    Some(next) => {
                        path.push((choice, state));
                        state = next;
                        choice = Choice::Answered(self.events[0].next);
                    }
                    None => choice = otherwise,
                }
            } else {
                let Some((last, before)) = path.pop() else { return Verdict::NotLinearizable };
                state = before;
                choice = self.put_back(last);
            }
        }
        Verdict::Undecided
    }

    /// An operation without an answer that was called before the first answer that is left.
    fn open_call(&self, number: usize) -> Option<usize> {
        let operation = *self.open.get(number)?;
        let mut first = self.events[0].next;
        while self.events[first].is_call {
            first = self.events[first].next;
        }
        let called = self.operations[operation].invoked_us;
        (called <= self.events[first].at_us).then_some(operation)
    }

    fn words(&mut self, operation: usize) -> &mut u64 {
        let answered = self.operations[operation].returned.is_some();
        let words = if answered { &mut self.taken.answered } else { &mut self.taken.open };
        &mut words[operation / 64]
    }

    fn is_taken(&mut self, operation: usize) -> bool {
        *self.words(operation) >> (operation % 64) & 1 == 1
    }

    fn is_due(&self, operation: usize) -> bool {
        let rank = self.rank[operation];
        rank == 0 || self.ranks.get(self.ranked) == Some(&rank)
    }

    /// Takes an operation, unless nothing new comes of it.
    fn take(&mut self, choice: Choice, operation: usize, next: Register) -> bool {
        *self.words(operation) ^= 1 << (operation % 64);
        if !self.seen.insert(&self.taken, next) {
            *self.words(operation) ^= 1 << (operation % 64);
            return false;
        }
        self.ranked += usize::from(self.rank[operation] > 0);
        if let Choice::Answered(call) = choice {
            self.unlink(call);
            self.unlink(self.events[call].answer);
            self.unanswered -= 1;
        }
        true
    }

    /// Undoes the last choice, and gives the one to try instead.
    fn put_back(&mut self, choice: Choice) -> Choice {
        let (operation, otherwise) = match choice {
            Choice::Answered(call) => {
                self.link(self.events[call].answer);
                self.link(call);
                self.unanswered += 1;
                (self.events[call].operation, Choice::Answered(self.events[call].next))
            }
            Choice::Open(number) => (self.open[number], Choice::Open(number + 1)),
        };
        *self.words(operation) ^= 1 << (operation % 64);
        self.ranked -= usize::from(self.rank[operation] > 0);
        otherwise
    }

    fn unlink(&mut self, place: usize) {
        let Event { before, next, .. } = self.events[place];
        self.events[before].next = next;
        self.events[next].before = before;
    }

    fn link(&mut self, place: usize) {
        let Event { before, next, .. } = self.events[place];
        self.events[before].next = place;
        self.events[next].before = place;
    }
}

/// Orders operations by the version that their answers show: who writes one before who sees it.
fn rank_of(operation: &Operation) -> u64 {
    match operation.returned {
        Some((_, Answer::Written(version) | Answer::Counter(_, version))) => 2 * version,
        Some((_, Answer::Value(Some((_, version))) | Answer::NotWritten(version)))
            if version > 0 =>
        {
            2 * version + 1
        }
        _ => 0,
    }
}

/// The shortest window of a key's operations that has no order: up to the first answer that is one too
/// many, from the last quiet moment that still shows it.
pub fn shortest_window(operations: &[Operation], steps: u64) -> Vec<Operation> {
    let fails = |initial, operations: &[Operation]| {
        search(initial, operations, steps) != Verdict::Linearizable
    };
    let mut ends: Vec<u64> = operations.iter().filter_map(|one| Some(one.returned?.0)).collect();
    ends.sort_unstable();
    // What has no order up to a time has none up to a later one.
    let first = ends.partition_point(|end| !fails(Register::ABSENT, &until(operations, *end)));
    let Some(&end) = ends.get(first) else { return operations.to_vec() };
    let prefix = until(operations, end);
    let mut starts: Vec<u64> = prefix.iter().map(|one| one.invoked_us).collect();
    let spanned = |at: u64| {
        let over = |one: &Operation| one.returned.is_some_and(|(end, _)| end >= at);
        prefix.iter().any(|one| one.invoked_us < at && over(one))
    };
    starts.retain(|start| !spanned(*start));
    for start in starts.into_iter().rev() {
        // What has no answer may take effect in the window even if it was called before it.
        let inside = |one: &&Operation| one.invoked_us >= start || one.returned.is_none();
        let window: Vec<Operation> = prefix.iter().filter(inside).copied().collect();
        if fails(Register::ANYTHING, &window) {
            return window;
        }
    }
    prefix
}

/// What was known at a time: later calls are not, and answers that came later were still out.
fn until(operations: &[Operation], end_us: u64) -> Vec<Operation> {
    let before = operations.iter().filter(|one| one.invoked_us <= end_us);
    before
        .map(|one| Operation { returned: one.returned.filter(|(at, _)| *at <= end_us), ..*one })
        .collect()
}

fn report(key: Key, operations: &[Operation], steps: u64) -> String {
    let window = shortest_window(operations, steps);
    let mut text = format!(
        "key {key}: no order of {} of its {} operations was found:",
        window.len(),
        operations.len()
    );
    // The end is where it fails.
    let hidden = window.len().saturating_sub(SHOWN);
    if hidden > 0 {
        let _ = write!(text, "\n    … and {hidden} before");
    }
    for operation in &window[hidden..] {
        let _ = write!(text, "\n    {operation}");
    }
    text
}
