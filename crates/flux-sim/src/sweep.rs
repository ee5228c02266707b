//! Runs of single seeds, and of many on all processors.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use crate::check::{Promise, Violation};
use crate::plan::{Fault, Plan, Profile};
use crate::plant::Plant;
use crate::trace::Trace;
use crate::world::{Outcome, World};

thread_local! {
    /// Where the last panic of this thread was, and what it said.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    /// This thread is in a run, which may end in a panic.
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// Which runs a seed stands for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// The kind of weather.
    pub profile: Profile,
    /// The bug that all nodes have.
    pub plant: Option<Plant>,
}

/// A run that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// Its weather, as the seed decided it.
    pub profile: Profile,
    /// What was wrong.
    pub violations: Vec<Violation>,
}

/// What many runs came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// How many runs there were.
    pub runs: u64,
    /// Those that went wrong, in the order of their seeds.
    pub failures: Vec<Failure>,
    /// The sums of all runs' figures.
    pub totals: Outcome,
    /// Runs by weather.
    pub profiles: BTreeMap<&'static str, u64>,
}

/// Runs a seed. A panic counts as a broken promise.
pub fn run_seed(seed: u64, settings: Settings, out: Option<Box<dyn Write>>) -> (Plan, Outcome) {
    keep_panics();
    let plan = Plan::new(seed, settings.profile, settings.plant);
    let trace = Trace::new(out);
    let world = AssertUnwindSafe(|| World::new(plan.clone(), trace).run());
    RUNNING.set(true);
    let outcome = catch_unwind(world);
    RUNNING.set(false);
    let outcome = outcome.unwrap_or_else(|panic| {
        let place = PANIC.with_borrow_mut(Option::take);
        let what = place.unwrap_or_else(|| text_of(&*panic));
        Outcome { violations: vec![Violation::new(Promise::Intact, what)], ..Outcome::default() }
    });
    (plan, outcome)
}

/// Runs seeds on so many threads; `progress` hears after each how many are done and how many failed, and of
/// the failure if it is one. Ends early after `enough` failures.
pub fn sweep(
    seeds: Range<u64>,
    settings: Settings,
    threads: usize,
    enough: usize,
    progress: &(dyn Fn(u64, usize, Option<&Failure>) + Sync),
) -> Summary {
    let next = AtomicU64::new(seeds.start);
    let summary = Mutex::new(Summary::default());
    let lock = || summary.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || lock().failures.len() >= enough {
                        return;
                    }
                    let (plan, outcome) = run_seed(seed, settings, None);
                    let mut summary = lock();
                    let failed = summary.add(&plan, outcome);
                    let failure = summary.failures.last().filter(|_| failed);
                    progress(summary.runs, summary.failures.len(), failure);
                }
            });
        }
    });
    let mut summary = summary.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary.failures.sort_by_key(|failure| failure.seed);
    summary
}

impl Summary {
    /// True if the run went wrong.
    fn add(&mut self, plan: &Plan, outcome: Outcome) -> bool {
        self.runs += 1;
        *self.profiles.entry(plan.profile.name()).or_default() += 1;
        let totals = &mut self.totals;
        totals.virtual_us += outcome.virtual_us;
        totals.events += outcome.events;
        totals.operations += outcome.operations;
        totals.terms += outcome.terms;
        totals.snapshots += outcome.snapshots;
        totals.messages += outcome.messages;
        totals.lost += outcome.lost;
        totals.replaced += outcome.replaced;
        totals.naps += outcome.naps;
        totals.gaps += outcome.gaps;
        totals.elsewhere += outcome.elsewhere;
        totals.feed += outcome.feed;
        for (fault, count) in outcome.faults {
            *totals.faults.entry(fault).or_default() += count;
        }
        let failed = !outcome.violations.is_empty();
        if failed {
            let (seed, profile) = (plan.seed, plan.profile);
            self.failures.push(Failure { seed, profile, violations: outcome.violations });
        }
        failed
    }

    /// Faults by kind, as words.
    pub fn faults(&self) -> Vec<(Fault, u64)> {
        self.totals.faults.iter().map(|(fault, count)| (*fault, *count)).collect()
    }
}

/// Panics of runs are kept for the report, not printed: they are what a run may end in.
fn keep_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let otherwise = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !RUNNING.get() {
                return otherwise(info);
            }
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            let text = format!("panic at {place}: {}", text_of(info.payload()));
            PANIC.set(Some(text));
        }));
    });
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
