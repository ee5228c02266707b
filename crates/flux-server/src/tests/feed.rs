//! Followers of a node's changes: each change once and in order, wherever it comes from, and current values
//! for what is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flux_cdc::{Chunk, Feed, FeedError, Limit};
use flux_core::store::Position;
use flux_core::{Command, Reply};
use flux_proto::event::{Event, Gap, Op, Place};

use super::machine::Machine;
use super::node::{ask, partition_of, set, small, start};
use super::workload::{Model, Random, write};
use crate::config::{Fsync, Settings};
use crate::feed::NodeFeed;
use crate::workers::Workers;

const ALL: Limit = Limit { events: 1000, bytes: 64 * 1024, synced: false, here_only: false };

/// One that applies what it reads, from the first change on.
#[derive(Debug, Default)]
struct Follower {
    partition: u16,
    at: u64,
    keys: BTreeMap<Bytes, (u64, Bytes)>,
    gaps: Vec<Gap>,
    events: usize,
    /// Every change says what was before.
    knows_previous: bool,
}

impl Follower {
    fn of(partition: u16) -> Follower {
        Follower { partition, ..Follower::default() }
    }

    /// Reads until it has a revision.
    async fn follow(&mut self, feed: &NodeFeed, to: u64, limit: Limit) {
        while self.at < to {
            match feed.read(self.partition, self.at, limit).await.expect("it can be read") {
                Chunk::Changes { events, through } => {
                    events.iter().for_each(|event| self.take(event));
                    assert_eq!(through.revision, self.at);
                }
                Chunk::Gap(gap) => self.take_rows(feed, gap, limit).await,
            }
        }
    }

    fn take(&mut self, event: &Event) {
        assert_eq!(event.revision, self.at + 1, "each once and in order");
        let before = self.keys.remove(&event.key).map_or(0, |(version, _)| version);
        if self.knows_previous {
            assert_eq!(event.previous_version, before, "{event:?}");
        }
        if event.op == Op::Set {
            let value = event.value.clone().expect("a set has a value");
            self.keys.insert(event.key.clone(), (event.revision, value));
        } else {
            // A key that was deleted behind a gap may have been so before its rows were read.
            assert!(before != 0 || !self.gaps.is_empty(), "what is absent is not deleted");
        }
        self.at = event.revision;
        self.events += 1;
    }

    async fn take_rows(&mut self, feed: &NodeFeed, gap: Gap, limit: Limit) {
        assert_eq!(*gap.lost.start(), self.at + 1);
        self.keys.clear();
        let mut from = None;
        loop {
            let page = feed.rows(&gap, from, limit).await.expect("nothing is replaced");
            for row in page.events {
                assert!(row.version <= gap.at.revision);
                self.keys.insert(row.key, (row.version, row.value.expect("a row has a value")));
            }
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        self.at = gap.at.revision;
        self.gaps.push(gap);
    }

    /// Asserts that it has what the table has.
    fn check(&self, workers: &Workers) {
        let mut table = BTreeMap::new();
        let view = &workers.shared().views[usize::from(self.partition)];
        let mut next = Some(Position(0));
        while let Some(from) = next {
            next = view.table.scan(from, 64, |entry| {
                let value = (entry.version, Bytes::copy_from_slice(entry.value));
                table.insert(Bytes::copy_from_slice(entry.key), value);
            });
        }
        assert_eq!(self.keys, table);
    }
}

fn newest(workers: &Workers, partition: u16) -> u64 {
    workers.feed().newest(partition).expect("it is here")
}

/// A key of a partition.
fn key_of(workers: &Workers, partition: u16) -> String {
    let is_there = |key: &String| workers.shared().partitions.of(key.as_bytes()).0 == partition;
    (0..).map(|number| format!("of:{number}")).find(is_there).expect("each has some")
}

/// The broker has everything of a partition. Gives how much that is.
async fn confirm_all(workers: &Workers, partition: u16) -> u64 {
    let newest = newest(workers, partition);
    let last = workers.feed().read(partition, newest - 1, ALL).await;
    let Ok(Chunk::Changes { through, .. }) = last else { panic!("no last change: {last:?}") };
    workers.feed().advance(partition, through);
    newest
}

/// Writes of all kinds to a few hundred keys.
async fn churn(workers: &Workers, seed: u64, count: u64) {
    let mut random = Random(seed);
    for number in 0..count {
        let key = format!("key:{}", random.below(300));
        let command = match random.below(6) {
            0 => Command::Delete { keys: vec![key.clone().into_bytes()] },
            1 => set(&key, &vec![b'.'; random.below(3000) as usize]),
            _ => set(&key, format!("value {number} of {seed}").as_bytes()),
        };
        ask(workers.shared(), &key, command).await;
    }
}

/// Settings of a node whose changes are published.
fn publishing(workers: usize) -> Settings {
    let rabbitmq_url = Some("amqp://127.0.0.1:1".parse().expect("a URL"));
    Settings { rabbitmq_url, ..small(workers, Fsync::Always) }
}

async fn follow_all(workers: &Workers, limit: Limit) -> Vec<Follower> {
    let mut followers = Vec::new();
    for partition in 0..4 {
        let mut follower = Follower { knows_previous: true, ..Follower::of(partition) };
        follower.follow(workers.feed(), newest(workers, partition), limit).await;
        follower.check(workers);
        followers.push(follower);
    }
    followers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_changes_are_there_from_the_first_on_until_they_are_confirmed() {
    let machine = Machine::new(1);
    let settings = publishing(2);
    let workers = start(&machine, &settings).expect("started");
    let mut model = write(workers.shared(), Model::default(), 1, 600).await;
    for limit in
        [ALL, Limit { events: 1, ..ALL }, Limit { events: 7, bytes: 1, synced: true, ..ALL }]
    {
        for follower in follow_all(&workers, limit).await {
            assert_eq!(follower.gaps, [], "nothing may be lost");
            assert_eq!(follower.events as u64, follower.at);
        }
    }
    assert!(workers.shared().stats.feed_log_reads.value() > 0, "the log is longer than memory");
    workers.stop().expect("closed");
    // Whatever was in memory is gone.
    let workers = start(&machine, &settings).expect("started");
    model.check(workers.shared()).await;
    for follower in follow_all(&workers, ALL).await {
        assert_eq!(follower.gaps, []);
    }
    workers.stop().expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_keep_up_with_writers() {
    let machine = Machine::new(2);
    let workers = start(&machine, &small(2, Fsync::Always)).expect("started");
    // Longer than memory holds, so that some are read from the log while more is written.
    let feed = workers.feed();
    for round in 0..6 {
        let mut followers: Vec<Follower> = (0..4).map(Follower::of).collect();
        let writing = churn(&workers, round, 1000);
        let following = async {
            for turn in 0..40 {
                let follower = &mut followers[turn % 4];
                let to = newest(&workers, follower.partition);
                follower.follow(feed, to, Limit { events: 50, ..ALL }).await;
            }
        };
        tokio::join!(writing, following);
        for follower in &mut followers {
            follower.follow(feed, newest(&workers, follower.partition), ALL).await;
            follower.check(&workers);
        }
    }
    workers.stop().expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_gone_is_a_gap_and_the_current_values() {
    let machine = Machine::new(3);
    let settings = Settings { cdc_retention_bytes: 0, ..publishing(1) };
    let workers = start(&machine, &settings).expect("started");
    write(workers.shared(), Model::default(), 3, 1500).await;
    let followers = follow_all(&workers, Limit { events: 3, ..ALL }).await;
    assert!(followers.iter().any(|follower| !follower.gaps.is_empty()), "the log was trimmed");
    for follower in followers {
        for gap in &follower.gaps {
            assert!(gap.lost.end() <= &gap.at.revision && !gap.lost.is_empty(), "{gap:?}");
        }
    }
    workers.stop().expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_confirmed_is_remembered_and_its_log_goes() {
    let machine = Machine::new(4);
    let settings = publishing(1);
    let workers = start(&machine, &settings).expect("started");
    write(workers.shared(), Model::default(), 4, 600).await;
    let log_bytes = || workers.shared().log_bytes.load(Ordering::Relaxed);
    wait_until(|| log_bytes() > 10 * settings.segment_bytes).await;
    let mut confirmed = Vec::new();
    for follower in follow_all(&workers, ALL).await {
        let last = workers.feed().read(follower.partition, follower.at - 1, ALL).await;
        let Ok(Chunk::Changes { through, .. }) = last else { panic!("no last change: {last:?}") };
        workers.feed().advance(follower.partition, through);
        // It never goes back.
        workers.feed().advance(follower.partition, Place { revision: 1, index: 1 });
        confirmed.push(through);
    }
    let cursors = |workers: &Workers| -> Vec<u64> {
        workers.shared().views.iter().map(|view| view.feed.cursor().revision).collect()
    };
    let expected: Vec<u64> = confirmed.iter().map(|place| place.revision).collect();
    wait_until(|| cursors(&workers) == expected).await;
    wait_until(|| log_bytes() < 10 * settings.segment_bytes).await;
    for (partition, place) in confirmed.iter().enumerate() {
        assert_eq!(newest(&workers, partition as u16), place.revision, "a cursor is no change");
    }
    workers.stop().expect("closed");
    let workers = start(&machine, &settings).expect("started");
    wait_until(|| cursors(&workers) == expected).await;
    workers.stop().expect("closed");
}

/// What the log holds of those that are not written is of no use to the broker, though its last entries there say
/// nothing of changes: elections, and cursors themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_at_rest_keep_no_log() {
    let machine = Machine::new(9);
    let settings = publishing(1);
    let workers = start(&machine, &settings).expect("started");
    let log_bytes = || workers.shared().log_bytes.load(Ordering::Relaxed);
    let (rests, written) = (key_of(&workers, 1), key_of(&workers, 3));
    ask(workers.shared(), &rests, set(&rests, b"once")).await;
    confirm_all(&workers, 1).await;
    for _ in 0..800 {
        ask(workers.shared(), &written, set(&written, &[b'.'; 3000])).await;
    }
    wait_until(|| log_bytes() > 10 * settings.segment_bytes).await;
    confirm_all(&workers, 3).await;
    wait_until(|| log_bytes() < 10 * settings.segment_bytes).await;
    workers.stop().expect("closed");
}

/// An entry of which the broker has confirmed a part is still needed, whatever has a snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_of_an_entry_is_kept() {
    let machine = Machine::new(10);
    let settings = publishing(1);
    let names: Vec<String> = (0..10).map(|number| format!("{{t}}{number}")).collect();
    let partition = partition_of(&names[0]).0;
    let workers = start(&machine, &settings).expect("started");
    for name in &names {
        ask(workers.shared(), name, set(name, b"v")).await;
    }
    let keys = names.iter().map(|name| name.clone().into_bytes()).collect();
    let deleted = ask(workers.shared(), &names[0], Command::Delete { keys }).await;
    assert_eq!(deleted, Reply::Integer(10));
    let three = workers.feed().read(partition, 10, Limit { events: 3, ..ALL }).await;
    let Ok(Chunk::Changes { events, through }) = three else { panic!("no changes: {three:?}") };
    assert_eq!((events.len(), through.revision), (3, 13));
    workers.feed().advance(partition, through);
    workers.stop().expect("closed");

    let workers = start(&machine, &settings).expect("started");
    let other = (0..4).find(|one| *one != partition).expect("there are more");
    let written = key_of(&workers, other);
    for _ in 0..10 {
        for _ in 0..50 {
            ask(workers.shared(), &written, set(&written, &[b'.'; 3000])).await;
        }
        confirm_all(&workers, other).await;
    }
    // There are some of the other partition, which trim the log, and one at least of this one.
    wait_until(|| workers.shared().stats.snapshots.value() > 8).await;
    workers.stop().expect("closed");
    let workers = start(&machine, &settings).expect("started");
    let rest = workers.feed().read(partition, 13, ALL).await;
    let Ok(Chunk::Changes { events, .. }) = rest else { panic!("it is gone: {rest:?}") };
    assert_eq!(events.len(), 7);
    workers.stop().expect("closed");
}

/// However short before: whoever publishes next repeats nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_confirmed_before_a_stop_is_remembered() {
    let machine = Machine::new(8);
    let partition = 1;
    for round in 1..=5 {
        let workers = start(&machine, &publishing(2)).expect("started");
        churn(&workers, round, 40).await;
        let newest = confirm_all(&workers, partition).await;
        workers.stop().expect("closed");
        let workers = start(&machine, &publishing(2)).expect("started");
        let cursor = || workers.shared().views[usize::from(partition)].feed.cursor().revision;
        // The first tick says it.
        wait_until(|| cursor() > 0).await;
        assert_eq!(cursor(), newest, "round {round}");
        workers.stop().expect("closed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_waits_hears_of_the_next_change() {
    let machine = Machine::new(5);
    let workers = start(&machine, &small(1, Fsync::Always)).expect("started");
    let partition = workers.shared().partitions.of(b"k").0;
    for number in 0..20_u64 {
        let feed = Arc::clone(workers.feed());
        let read = tokio::spawn(async move { feed.read(partition, number, ALL).await });
        ask(workers.shared(), "k", set("k", b"v")).await;
        let Ok(Ok(Chunk::Changes { events, .. })) = read.await else { panic!("no change") };
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].key, "k");
    }
    // Nobody is left waiting when the node stops.
    let feed = Arc::clone(workers.feed());
    let read = tokio::spawn(async move { feed.read(partition, 20, ALL).await });
    workers.shared().stopping.store(true, Ordering::Release);
    workers.stop().expect("closed");
    let ended = tokio::time::timeout(Duration::from_secs(60), read).await.expect("in time");
    assert_eq!(ended.expect("no panic"), Err(FeedError::Stopping));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_of_absent_keys_are_no_changes() {
    let machine = Machine::new(6);
    let workers = start(&machine, &small(1, Fsync::Always)).expect("started");
    let partition = workers.shared().partitions.of(b"k");
    let delete = || Command::Delete { keys: vec![b"k".to_vec()] };
    assert_eq!(ask(workers.shared(), "k", delete()).await, Reply::Integer(0));
    ask(workers.shared(), "k", set("k", b"v")).await;
    assert_eq!(ask(workers.shared(), "k", delete()).await, Reply::Integer(1));
    assert_eq!(ask(workers.shared(), "k", delete()).await, Reply::Integer(0));
    let mut follower = Follower::of(partition.0);
    follower.follow(workers.feed(), 2, ALL).await;
    assert_eq!(newest(&workers, partition.0), 2);
    assert_eq!(workers.feed().newest(99), None);
    assert_eq!(workers.feed().begin_rows(99), Err(FeedError::NotHere));
    workers.stop().expect("closed");
}

/// Under `everysec` a power cut takes back what was not synced: who cannot take back an event is not given it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_power_cut_undoes_was_not_given_to_those_who_cannot_take_it_back() {
    let mut machine = Machine::new(7);
    let settings = small(1, Fsync::EverySec);
    let synced = Limit { synced: true, ..ALL };
    let mut given: Vec<Follower> = (0..4).map(Follower::of).collect();
    for round in 0..3 {
        let workers = start(&machine, &settings).expect("started");
        for follower in &mut given {
            assert!(newest_of(&workers, follower.partition) >= follower.at, "it was undone");
        }
        churn(&workers, round, 300).await;
        for follower in &mut given {
            let to = newest_of(&workers, follower.partition);
            let following = follower.follow(workers.feed(), to, synced);
            // Some of it is synced meanwhile, and some is not.
            let _ = tokio::time::timeout(Duration::from_millis(300), following).await;
        }
        machine = machine.power_cut();
        drop(workers);
    }
    assert!(given.iter().any(|follower| follower.at > 0), "a sync comes every second");
}

fn newest_of(workers: &Workers, partition: u16) -> u64 {
    let view = &workers.shared().views[usize::from(partition)];
    view.standing.place().map_or(0, |at| at.revision)
}

async fn wait_until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
