//! Disks that fail, fill up or stand still: writes are refused by name, and reads go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flux_core::{Error, Reply};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::machine::Machine;
use super::node::{ask, set, small, start, value};
use super::workload::{Model, write};
use crate::config::{Fsync, Settings};
use crate::node::StartError;
use crate::shared::Shared;

/// Far longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(20);

fn spawn_set(shared: &Arc<Shared>, key: &str, bytes: &[u8]) -> JoinHandle<Reply> {
    let (shared, key, bytes) = (Arc::clone(shared), key.to_owned(), bytes.to_vec());
    tokio::spawn(async move { ask(&shared, &key, set(&key, &bytes)).await })
}

/// Starts writes until one is refused; returns the refusal and the writes that wait.
async fn write_until_refused(
    shared: &Arc<Shared>,
    bytes: &[u8],
) -> (Error, Vec<(String, JoinHandle<Reply>)>) {
    let (begun, mut waiting) = (Instant::now(), Vec::new());
    for number in 0.. {
        assert!(begun.elapsed() < DEADLINE, "nothing is refused");
        let key = format!("key:{number}");
        let mut task = spawn_set(shared, &key, bytes);
        match timeout(Duration::from_millis(10), &mut task).await {
            Ok(reply) => match reply.expect("no panic") {
                Reply::Error(error) => return (error, waiting),
                other => panic!("a write was answered with {other:?}"),
            },
            Err(_) => waiting.push((key, task)),
        }
    }
    unreachable!("the loop has no end of its own")
}

/// The writes that were taken take place, and new ones too, without anyone's doing. Returns how many
/// were taken.
async fn recovers(shared: &Arc<Shared>, waiting: Vec<(String, JoinHandle<Reply>)>) -> usize {
    let mut taken = 0;
    for (key, task) in waiting {
        let reply = timeout(DEADLINE, task).await.expect("answered").expect("no panic");
        let written = matches!(reply, Reply::Written { .. });
        // A refusal on its way to its task looks like a write that waits.
        assert!(written || reply == Reply::Error(Error::Overloaded), "{key}: {reply:?}");
        assert_eq!(value(shared, &key).await.is_some(), written, "{key}");
        taken += usize::from(written);
    }
    let begun = Instant::now();
    while let Reply::Error(error) = ask(shared, "again", set("again", b"1")).await {
        assert_eq!(error, Error::Overloaded);
        assert!(begun.elapsed() < DEADLINE, "it does not recover");
        tokio::task::yield_now().await;
    }
    taken
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_leaves_writes_unknown_and_the_node_readable() {
    for seed in 0..4 {
        let (machine, settings) = (Machine::new(seed), small(1, Fsync::Always));
        let workers = start(&machine, &settings).expect("started");
        let shared = Arc::clone(workers.shared());
        let mut model = write(&shared, Model::default(), seed, 100).await;
        machine.syncs.close();
        let first = spawn_set(&shared, "in the sync", b"1");
        machine.syncs.wait_for_sync();
        let second = spawn_set(&shared, "behind the sync", b"1");
        let log = machine.disk("log-1-0");
        log.fail_sync_after(0);
        machine.syncs.open();
        let first = timeout(DEADLINE, first).await.expect("answered").expect("no panic");
        assert_eq!(first, Reply::Error(Error::OutcomeUnknown));
        let second = timeout(DEADLINE, second).await.expect("answered").expect("no panic");
        assert!(
            matches!(second, Reply::Error(Error::OutcomeUnknown | Error::LogFailed(_))),
            "{second:?}"
        );
        fails_for_good(&shared, &mut model).await;
        workers.stop().expect_err("the log cannot be closed");
        let workers = start(&machine.power_cut(), &settings).expect("started");
        model.check_values(workers.shared()).await;
        assert!(matches!(ask(workers.shared(), "k", set("k", b"1")).await, Reply::Written { .. }));
        workers.stop().expect("closed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_write_leaves_writes_unknown_and_the_node_readable() {
    for (seed, fsync) in [(1, Fsync::Always), (2, Fsync::EverySec), (3, Fsync::No)] {
        let (machine, settings) = (Machine::new(seed), small(1, fsync));
        let workers = start(&machine, &settings).expect("started");
        let shared = Arc::clone(workers.shared());
        let model = write(&shared, Model::default(), seed, 100).await;
        machine.disk("log-1-0").fail_write_after(20);
        let mut model = write(&shared, model, seed + 10, u64::MAX / 2).await;
        fails_for_good(&shared, &mut model).await;
        workers.stop().expect_err("the log cannot be closed");
        let workers = start(&machine.kill(), &settings).expect("started");
        model.check(workers.shared()).await;
        workers.stop().expect("closed");
    }
}

async fn fails_for_good(shared: &Arc<Shared>, model: &mut Model) {
    let failed = |reply: &Reply| matches!(reply, Reply::Error(Error::LogFailed(_)));
    for key in ["one", "two", "three"] {
        let reply = ask(shared, key, set(key, b"late")).await;
        assert!(failed(&reply), "{reply:?}");
        assert_eq!(value(shared, key).await, None);
    }
    assert!(shared.failure.lock().is_some());
    model.check_acknowledged(shared).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_fails_at_the_start_fails_the_start() {
    let (machine, settings) = (Machine::new(1), small(2, Fsync::Always));
    start(&machine, &settings).expect("started").stop().expect("closed");
    machine.disk("log-1-1").fail_write_after(1);
    let error = start(&machine, &settings).expect_err("there is no log to write to");
    assert!(matches!(error, StartError::Log(_) | StartError::Recovery(_)), "{error:?}");
    start(&machine, &settings).expect("started").stop().expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_writes_until_there_is_space() {
    for (seed, fsync) in [(1, Fsync::Always), (2, Fsync::EverySec), (3, Fsync::No)] {
        let (machine, settings) = (Machine::new(seed), small(2, fsync));
        let workers = start(&machine, &settings).expect("started");
        let shared = Arc::clone(workers.shared());
        let mut model = write(&shared, Model::default(), seed, 200).await;
        for _ in 0..3 {
            for name in machine.names() {
                let disk = machine.disk(&name);
                disk.limit_capacity(Some(disk.used()));
            }
            model = write(&shared, model, seed + 10, u64::MAX / 2).await;
            assert!(!model.refused.is_empty());
            assert!(model.refused.iter().all(|error| *error == Error::DiskFull), "{model:?}");
            model.refused.clear();
            model.check_acknowledged(&shared).await;
            for name in machine.names() {
                machine.disk(&name).limit_capacity(None);
            }
            let before = model.acknowledged;
            model = write(&shared, model, seed + 20, 200).await;
            assert_eq!(model.refused, []);
            assert!(model.acknowledged >= before + 200);
        }
        workers.stop().expect("closed");
        let workers = start(&machine.power_cut(), &settings).expect("started");
        model.check(workers.shared()).await;
        workers.stop().expect("closed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_on_a_full_disk_serves_reads_or_says_why_not() {
    for seed in 0..6 {
        let (machine, settings) = (Machine::new(seed), small(1, Fsync::Always));
        let workers = start(&machine, &settings).expect("started");
        let mut model = write(workers.shared(), Model::default(), seed, 150).await;
        let full = |machine: &Machine| {
            for name in machine.names() {
                let disk = machine.disk(&name);
                disk.limit_capacity(Some(disk.used()));
            }
        };
        full(&machine);
        model = write(workers.shared(), model, seed + 10, u64::MAX / 2).await;
        model.refused.clear();
        let machine = machine.power_cut();
        workers.stop().expect_err("no power");
        full(&machine);
        match start(&machine, &settings) {
            Ok(workers) => {
                model.check_values(workers.shared()).await;
                let stopped = workers.stop();
                assert!(stopped.is_ok(), "{stopped:?}");
            }
            Err(error) => assert!(format!("{error:?}").contains("space"), "{error:?}"),
        }
        for name in machine.names() {
            machine.disk(&name).limit_capacity(None);
        }
        let workers = start(&machine, &settings).expect("started");
        model.check(workers.shared()).await;
        workers.stop().expect("closed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_wait_too_long_for_the_disk_make_the_node_refuse_more() {
    let machine = Machine::new(1);
    let settings = Settings { overload_wait_ms: 50, ..small(1, Fsync::Always) };
    let workers = start(&machine, &settings).expect("started");
    let shared = Arc::clone(workers.shared());
    ask(&shared, "before", set("before", b"1")).await;
    machine.syncs.close();
    let (error, waiting) = write_until_refused(&shared, b"1").await;
    assert_eq!(error, Error::Overloaded);
    // It does not waver while nothing has changed: for longer than the period of any timer.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(350) {
        let reply = timeout(DEADLINE, ask(&shared, "more", set("more", b"1"))).await;
        assert_eq!(reply.expect("at once"), Reply::Error(Error::Overloaded));
        assert_eq!(value(&shared, "before").await.as_deref(), Some(&b"1"[..]));
        tokio::task::yield_now().await;
    }
    machine.syncs.open();
    assert!(recovers(&shared, waiting).await > 0, "some writes were under way");
    workers.stop().expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_bytes_in_flight_make_the_node_refuse_more() {
    let machine = Machine::new(1);
    let settings = Settings {
        max_inflight_bytes: 64 * 1024,
        overload_wait_ms: 60_000,
        ..small(1, Fsync::Always)
    };
    let workers = start(&machine, &settings).expect("started");
    let shared = Arc::clone(workers.shared());
    ask(&shared, "before", set("before", b"1")).await;
    machine.syncs.close();
    let (error, waiting) = write_until_refused(&shared, &[b'.'; 10_000]).await;
    assert_eq!(error, Error::Overloaded);
    for _ in 0..100 {
        let reply = timeout(DEADLINE, ask(&shared, "more", set("more", b"1"))).await;
        assert_eq!(reply.expect("at once"), Reply::Error(Error::Overloaded));
        assert_eq!(value(&shared, "before").await.as_deref(), Some(&b"1"[..]));
    }
    machine.syncs.open();
    let taken = recovers(&shared, waiting).await;
    assert!((6..=8).contains(&taken), "{taken} writes of 10 kB in 64 KiB");
    workers.stop().expect("closed");
}
