//! A seed is a run: whoever runs it again sees the same, event by event.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use flux_sim::plan::{Plan, Profile};
use flux_sim::sweep::{Settings, run_seed, sweep};

/// Lines that are kept, to be compared.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lines_of(seed: u64, settings: Settings) -> (u64, Vec<u8>) {
    let lines = Lines::default();
    let (_, outcome) = run_seed(seed, settings, Some(Box::new(lines.clone())));
    let lines = lines.0.lock().expect("nobody panics with it").clone();
    (outcome.hash, lines)
}

#[test]
fn a_seed_gives_one_trace() {
    let profiles = [
        Profile::Weather,
        Profile::Storm,
        Profile::Members,
        Profile::Clocks,
        Profile::Elections,
        Profile::Feed,
    ];
    for (seed, profile) in (7..).zip(profiles) {
        let settings = Settings { profile, plant: None };
        let (first, second) = (lines_of(seed, settings), lines_of(seed, settings));
        assert!(first == second, "seed {seed} ({}) has two traces", profile.name());
        // Whether lines are written changes nothing.
        assert_eq!(run_seed(seed, settings, None).1.hash, first.0);
        assert!(first.1.len() > 10_000, "something happens");
        assert_ne!(lines_of(seed + 100, settings).0, first.0);
    }
}

#[test]
fn threads_do_not_change_what_a_seed_is() {
    let settings = Settings::default();
    let alone = sweep(0..6, settings, 1, usize::MAX, &|_, _, _| ());
    let together = sweep(0..6, settings, 3, usize::MAX, &|_, _, _| ());
    assert_eq!(alone.totals.events, together.totals.events);
    assert_eq!(alone.totals.faults, together.totals.faults);
    assert_eq!(alone.totals.messages, together.totals.messages);
}

#[test]
fn good_weather_and_bad_weather_are_survived() {
    let summary = sweep(0..40, Settings::default(), 2, usize::MAX, &|_, _, _| ());
    assert!(summary.failures.is_empty(), "{:?}", summary.failures);
    assert_eq!(summary.runs, 40);
    assert!(summary.totals.operations > 10_000 && summary.totals.snapshots > 0);
    // Every kind of fault is met with.
    assert!(summary.totals.faults.len() > 16, "{:?}", summary.totals.faults);
    let feed = summary.totals.feed;
    assert!(feed.changes > 2 * feed.repeats && feed.repeats > 0 && feed.rows > 0, "{feed:?}");
}

/// Clocks that are wrong beyond all bounds cost reads their freshness, and nothing else.
#[test]
fn writes_survive_clocks_beyond_the_bound() {
    let settings = Settings { profile: Profile::Beyond, plant: None };
    assert!(!Plan::new(0, Profile::Beyond, None).checks_reads());
    let summary = sweep(0..30, settings, 2, usize::MAX, &|_, _, _| ());
    assert!(summary.failures.is_empty(), "{:?}", summary.failures);
}
