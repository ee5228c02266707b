//! Power cuts and killed processes: nothing acknowledged is lost.

use std::sync::atomic::Ordering;

use super::machine::Machine;
use super::node::{small, start};
use super::workload::{Model, Random, write};
use crate::config::Fsync;

const ENDLESS: u64 = u64::MAX / 2;

#[derive(Debug, Default)]
struct Seen {
    acknowledged: u64,
    snapshots: u64,
    starts_cut: u64,
}

/// Cuts the power again and again, at any change of the disks, also while the node starts.
async fn cut_again_and_again(seed: u64, rounds: u64, seen: &mut Seen) {
    let mut random = Random(seed);
    let settings = small(1 + (seed % 2) as usize, Fsync::Always);
    let (mut machine, mut model) = (Machine::new(seed), Model::default());
    for round in 0..rounds {
        let changes = if random.below(4) == 0 { random.below(20) } else { random.below(1200) };
        machine.power_off_after(changes);
        match start(&machine, &settings) {
            Ok(workers) => {
                model.check(workers.shared()).await;
                model = write(workers.shared(), model, seed * 1000 + round, ENDLESS).await;
                seen.snapshots += workers.shared().stats.snapshots.value();
                assert!(
                    workers.shared().failure.lock().is_some(),
                    "only a failure ends the writers"
                );
                workers.stop().expect_err("a log without power cannot be closed");
            }
            Err(error) => {
                assert!(machine.is_off(), "seed {seed}, round {round}: {error:?}");
                seen.starts_cut += 1;
            }
        }
        machine = machine.power_cut();
    }
    let workers = start(&machine, &settings).expect("the power stays on");
    model.check(workers.shared()).await;
    workers.stop().expect("closed");
    seen.acknowledged += model.acknowledged;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_loses_nothing_that_was_synced_before_it_was_acknowledged() {
    let mut seen = Seen::default();
    for seed in 0..16 {
        cut_again_and_again(seed, 8, &mut seen).await;
    }
    assert!(seen.acknowledged > 2000 && seen.snapshots > 20 && seen.starts_cut > 2, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_loses_nothing_that_was_acknowledged() {
    for (seed, fsync) in [(1, Fsync::Always), (2, Fsync::EverySec), (3, Fsync::No)] {
        let settings = small(2, fsync);
        let (mut machine, mut model) = (Machine::new(seed), Model::default());
        let mut random = Random(seed);
        let mut snapshots = 0;
        for round in 0..8 {
            let workers = start(&machine, &settings).expect("started");
            model.check(workers.shared()).await;
            machine.power_off_after(100 + random.below(900));
            model = write(workers.shared(), model, seed * 1000 + round, ENDLESS).await;
            snapshots += workers.shared().stats.snapshots.value();
            workers.stop().expect_err("a log without a disk cannot be closed");
            machine = machine.kill();
        }
        assert!(snapshots > 5, "{snapshots} snapshots with {fsync:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_syncs_a_power_cut_loses_the_end_and_nothing_else() {
    for (seed, fsync) in [(1, Fsync::EverySec), (2, Fsync::No), (3, Fsync::EverySec)] {
        let settings = small(2, fsync);
        let (mut machine, mut model) = (Machine::new(seed), Model::default());
        let mut random = Random(seed);
        for round in 0..8 {
            let workers = start(&machine, &settings).expect("started");
            model.adopt(workers.shared()).await;
            machine.power_off_after(100 + random.below(900));
            model = write(workers.shared(), model, seed * 1000 + round, ENDLESS).await;
            workers.stop().expect_err("a log without power cannot be closed");
            machine = machine.power_cut();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_stop_keeps_everything_under_any_policy() {
    for (seed, fsync) in [(1, Fsync::Always), (2, Fsync::EverySec), (3, Fsync::No)] {
        let settings = small(2, fsync);
        let (mut machine, mut model) = (Machine::new(seed), Model::default());
        for round in 0..3 {
            let workers = start(&machine, &settings).expect("started");
            model.check(workers.shared()).await;
            model = write(workers.shared(), model, seed * 1000 + round, 300).await;
            assert_eq!(model.refused, []);
            workers.shared().stopping.store(true, Ordering::Release);
            workers.stop().expect("closed");
            machine = machine.power_cut();
        }
        let workers = start(&machine, &settings).expect("started");
        model.check(workers.shared()).await;
        workers.stop().expect("closed");
    }
}
