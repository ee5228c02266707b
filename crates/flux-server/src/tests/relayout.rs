//! Restarts with another number of workers: the log is rewritten, and nothing is lost on the way.

use super::machine::Machine;
use super::node::{small, start, start_in};
use super::workload::{Model, write};
use crate::config::Fsync;
use crate::folders::RealFolders;

/// A machine that a node of one worker has written to, with snapshots and a log of some segments.
async fn written(seed: u64) -> (Machine, Model) {
    let machine = Machine::new(seed);
    let workers = start(&machine, &small(1, Fsync::Always)).expect("started");
    let model = write(workers.shared(), Model::default(), seed, 400).await;
    workers.stop().expect("closed");
    (machine, model)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_moves_along_when_the_number_of_workers_changes() {
    let (machine, mut model) = written(1).await;
    for (round, count) in [3, 2, 4, 1].into_iter().enumerate() {
        let workers = start(&machine, &small(count, Fsync::Always)).expect("started");
        let logs: Vec<String> = machine.names();
        let expected = (0..count).map(|worker| format!("log-{}-{worker}", round + 2));
        assert_eq!(logs, expected.chain(["snapshots".to_owned()]).collect::<Vec<_>>());
        model.check(workers.shared()).await;
        model = write(workers.shared(), model, round as u64 + 10, 300).await;
        workers.stop().expect("closed");
    }
    assert_eq!(model.refused, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_while_the_log_is_rewritten_loses_nothing() {
    let (machine, mut model) = written(2).await;
    let (mut machine, mut cuts) = (machine.power_cut(), 0);
    // 1 -> 3 -> 2 workers, each change cut at one step after the other until it gets through.
    for count in [3, 2] {
        let settings = small(count, Fsync::Always);
        for changes in 0.. {
            machine.power_off_after(changes);
            if let Ok(workers) = start(&machine, &settings) {
                model.check(workers.shared()).await;
                // It may get as far with the power going off.
                let _ = workers.stop();
                break;
            }
            assert!(machine.is_off(), "only the power can be in its way");
            cuts += 1;
            machine = machine.power_cut();
            // What is there is whole, whichever generation counts.
            if changes % 7 == 0 {
                let before = machine.kill();
                let workers = start(&before, &small(1 + (changes % 2) as usize, Fsync::Always));
                let workers = workers.expect("started");
                model.check_values(workers.shared()).await;
                workers.stop().expect("closed");
                machine = machine.power_cut();
            }
        }
        machine = machine.power_cut();
        let workers = start(&machine, &settings).expect("started");
        model.check(workers.shared()).await;
        model = write(workers.shared(), model, 20, 200).await;
        workers.stop().expect("closed");
        machine = machine.power_cut();
    }
    let workers = start(&machine, &small(2, Fsync::Always)).expect("started");
    model.check(workers.shared()).await;
    workers.stop().expect("closed");
    assert!(cuts > 30, "{cuts} cuts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_directory_is_recovered_by_any_number_of_workers() {
    let parent = tempfile::tempdir().expect("a directory");
    let (mut model, mut snapshots) = (Model::default(), 0);
    // All workers load snapshots at the same time, from a directory that has one owner.
    for (round, count) in [2, 2, 4, 4, 1, 3].into_iter().enumerate() {
        let folders = RealFolders::open(parent.path()).expect("a directory");
        let settings = small(count, Fsync::No);
        let workers = start_in(Box::new(folders), &settings).expect("started");
        model.check(workers.shared()).await;
        model = write(workers.shared(), model, round as u64, 1500).await;
        assert_eq!(model.refused, []);
        snapshots += workers.shared().stats.snapshots.value();
        workers.stop().expect("closed");
    }
    assert!(snapshots > 10, "{snapshots} snapshots");
}
