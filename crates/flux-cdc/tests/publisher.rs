//! The publisher against a real broker, which each test starts for itself on free ports.
//!
//! Needs RabbitMQ where Debian installs it: `apt-get install rabbitmq-server`.

#[path = "broker/queue.rs"]
mod queue;
#[path = "broker/server.rs"]
mod server;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use flux_cdc::memory::MemoryFeed;
use flux_cdc::{Feed, Led, Metrics, Publisher, PublisherConfig, Trouble};
use flux_proto::event::{Op, Place, Record, TraceContext};
use queue::{Delivery, Queue, revisions};
use server::{Broker, until};

const EXCHANGE: &str = "changes";
/// Nothing here takes as long: a test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(40);

/// A publisher of all partitions of a feed, with what can be asked of it.
struct World {
    feed: Arc<MemoryFeed>,
    metrics: Arc<Metrics>,
    publisher: Publisher,
}

impl World {
    fn start(url: &str, partitions: u16, batch_max_events: usize) -> World {
        let feed = Arc::new(MemoryFeed::new("test", partitions, 1_000_000));
        let led = |partition| Led { partition, term: 2, cursor: Place::default() };
        feed.lead(&(0..partitions).map(led).collect::<Vec<Led>>());
        World::with_feed(feed, url, batch_max_events)
    }

    fn with_feed(feed: Arc<MemoryFeed>, url: &str, batch_max_events: usize) -> World {
        let config = PublisherConfig {
            url: url.parse().expect("an address"),
            exchange: EXCHANGE.to_owned(),
            batch_max_events,
            in_flight_bytes: 1 << 20,
        };
        let metrics = Arc::new(Metrics::default());
        let publisher = Publisher::start(feed.clone(), config, metrics.clone());
        World { feed, metrics, publisher }
    }

    /// Writes so many more changes, a different key each.
    fn write(&self, partition: u16, count: u64) {
        for _ in 0..count {
            let next = self.newest(partition) + 1;
            self.feed.set(
                partition,
                format!("p{partition}:{next}").as_bytes(),
                b"value",
                1000 + next,
            );
        }
    }

    fn newest(&self, partition: u16) -> u64 {
        self.feed.newest(partition).expect("it is here")
    }

    fn lag(&self) -> u64 {
        self.metrics.lag(|partition| self.feed.newest(partition), 5000).events
    }

    async fn begins(&self, trouble: Trouble) {
        until(trouble.name(), PATIENCE, || self.metrics.has_trouble(trouble)).await;
    }

    async fn catches_up(&self) {
        let led: Vec<(u16, u64)> =
            self.feed.led().borrow().iter().map(|led| (led.partition, led.term)).collect();
        until("everything is confirmed", PATIENCE, || {
            let lanes = self.metrics.lanes();
            let terms: Vec<(u16, u64)> =
                lanes.iter().map(|lane| (lane.partition, lane.term)).collect();
            terms == led && self.lag() == 0
        })
        .await;
        until("no trouble is left", PATIENCE, || {
            Trouble::ALL.iter().all(|&trouble| !self.metrics.has_trouble(trouble))
        })
        .await;
    }
}

/// What is logged on this thread, which is the one of all tasks of a test.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

thread_local! {
    static LOG: Log = Log::default();
}

impl Log {
    fn listen() -> Log {
        // One for all threads: tracing remembers at each place whether anybody listens at all.
        static LISTENING: Once = Once::new();
        LISTENING.call_once(|| {
            let writer = || LOG.with(Log::clone);
            let subscriber =
                tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
            tracing::subscriber::set_global_default(subscriber).expect("nobody else listens");
        });
        LOG.with(Log::clone)
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("no panic").clone()).expect("text")
    }

    /// The lines of a level that name a trouble.
    fn count(&self, level: &str, trouble: Trouble) -> usize {
        let field = format!("trouble={trouble}");
        self.text().lines().filter(|line| line.contains(level) && line.contains(&field)).count()
    }
}

impl Write for Log {
    #[expect(clippy::print_stdout, reason = "shown where a test fails")]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        print!("{}", String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn in_order(count: u64) -> Vec<u64> {
    (1..=count).collect()
}

#[tokio::test]
async fn each_change_is_a_message_in_order_with_all_that_belongs_to_it() {
    let broker = Broker::start().await;
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    let world = World::start(&broker.url(), 3, 1);
    let trace = TraceContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    world.feed.set(1, b"user:7/name", b"Ada", 1_709_210_096_789);
    world.feed.remove(1, Op::Expire, b"user:7/name", 1_709_210_096_999);
    let large = vec![b'x'; 16 << 20];
    world.feed.set(1, b"large", &large, 1);
    let mut traced = queue::set(1, 4, b"a\xff", b"\0");
    traced.trace = trace;
    world.feed.push(1, traced.clone());
    for partition in [0, 2] {
        world.write(partition, 200);
    }
    world.catches_up().await;

    let deliveries = queue.take(404).await;
    assert_eq!(revisions(&deliveries, 0), in_order(200));
    assert_eq!(revisions(&deliveries, 2), in_order(200));
    let of_one: Vec<&Delivery> =
        deliveries.iter().filter(|one| one.records[0].partition() == 1).collect();
    let [set, expire, big, binary] = of_one.as_slice() else { panic!("{} messages", of_one.len()) };
    assert_eq!(set.routing_key, "set.user.7.name");
    assert_eq!(set.message_id, "test/1/1");
    assert_eq!((set.content_type.as_str(), set.delivery_mode), ("application/json", 2));
    assert_eq!(set.timestamp, Some(1_709_210_096));
    assert_eq!(set.header("cloudEvents:subject").as_deref(), Some("user:7/name"));
    assert_eq!(set.header("cloudEvents:type").as_deref(), Some("flux-kv.set"));
    assert_eq!(set.header("cloudEvents:time").as_deref(), Some("2024-02-29T12:34:56.789Z"));
    assert_eq!(expire.routing_key, "expire.user.7.name");
    let Record::Change(event) = &big.records[0] else { panic!("no change") };
    assert!(event.value.as_deref() == Some(&large), "the large value differs");
    assert_eq!(binary.records, [Record::Change(traced)]);
    assert_eq!(binary.header("traceparent"), trace.map(|trace| trace.to_string()));
    assert_eq!(binary.routing_key, "set.a_");

    assert_eq!((world.metrics.published(), world.metrics.confirmed()), (404, 404));
    assert_eq!(world.metrics.in_flight_bytes(), 0);
    for (partition, newest) in [(0, 200), (1, 4), (2, 200)] {
        assert_eq!(world.feed.cursor(partition).revision, newest);
    }
    world.publisher.stop().await;
    queue.nothing_more().await;
}

#[tokio::test]
async fn batches_gaps_and_changes_of_leadership() {
    let broker = Broker::start().await;
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    let feed = Arc::new(MemoryFeed::new("test", 2, 1_000_000));
    let world = World::with_feed(feed, &broker.url(), 10);
    world.write(0, 95);
    world.write(1, 3);
    world.feed.lead(&[Led { partition: 0, term: 2, cursor: Place::default() }]);
    world.catches_up().await;
    // All of it was there at once.
    let deliveries = queue.take(10).await;
    assert!(deliveries.iter().all(|one| one.routing_key == "batch.partition-0"));
    assert_eq!(deliveries[0].message_id, "test/0/1-10");
    assert_eq!(deliveries[9].records.len(), 5);
    assert_eq!(revisions(&deliveries, 0), in_order(95));

    // A new term begins at its cursor and repeats; of partition 1 the first two are gone.
    world.feed.forget_to(1, 2);
    let cursor = Place { revision: 90, index: 91 };
    let led = |partition, cursor| Led { partition, term: 3, cursor };
    world.feed.lead(&[led(0, cursor), led(1, Place::default())]);
    world.catches_up().await;
    let deliveries = queue.take(4).await;
    assert_eq!(revisions(&deliveries, 0), [91, 92, 93, 94, 95]);
    let gap: Vec<Record> = deliveries
        .iter()
        .filter(|one| one.records[0].partition() == 1)
        .flat_map(|one| one.records.clone())
        .collect();
    let [Record::GapBegin(begin), rows @ .., Record::GapEnd { rows: 3, .. }] = gap.as_slice()
    else {
        panic!("no gap: {gap:?}");
    };
    assert_eq!((begin.lost.clone(), begin.at.revision, begin.term), (1..=3, 3, 3));
    assert_eq!(rows.len(), 3);
    assert_eq!((world.metrics.gaps(), world.metrics.gap_revisions()), (1, 3));
    assert_eq!(world.feed.cursor(1).revision, 3);

    // Nothing is published of what is not led.
    world.feed.lead(&[led(0, cursor)]);
    until("the lane ends", PATIENCE, || world.metrics.lanes().len() == 1).await;
    world.write(1, 5);
    world.write(0, 1);
    world.catches_up().await;
    assert_eq!(revisions(&queue.take(1).await, 0), [96]);
    world.publisher.stop().await;
    queue.nothing_more().await;
}

#[tokio::test]
async fn every_trouble_is_told_once_and_ends_in_catching_up() {
    let log = Log::listen();
    let broker = Broker::start().await;
    // Nobody has declared a queue.
    let world = World::start(&broker.url(), 4, 1);
    (0..4).for_each(|partition| world.write(partition, 50));
    world.begins(Trouble::Unroutable).await;
    assert_eq!(world.lag(), 200);
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    world.catches_up().await;
    let mut all = queue.take(200).await;
    assert_eq!(log.count("ERROR", Trouble::Unroutable), 1, "{}", log.text());
    assert_eq!(log.count("INFO", Trouble::Unroutable), 1, "{}", log.text());
    assert!(world.metrics.returned() >= 4);

    // Short of memory: the connection stays.
    broker.alarm(true).await;
    (0..4).for_each(|partition| world.write(partition, 10));
    world.begins(Trouble::Blocked).await;
    assert!(world.lag() > 0);
    broker.alarm(false).await;
    world.catches_up().await;
    all.extend(queue.take(40).await);
    assert_eq!(world.metrics.reconnects(), 0);
    assert_eq!(log.count("WARN", Trouble::Blocked), 1, "{}", log.text());
    assert_eq!(log.count("INFO", Trouble::Blocked), 1, "{}", log.text());

    // Slow: what is not confirmed in five seconds is told, and nothing is sent twice.
    broker.freeze();
    (0..4).for_each(|partition| world.write(partition, 10));
    world.begins(Trouble::Slow).await;
    broker.thaw();
    world.catches_up().await;
    all.extend(queue.take(40).await);
    assert_eq!(log.count("WARN", Trouble::Slow), 1, "{}", log.text());
    for partition in 0..4 {
        assert_eq!(revisions(&all, partition), in_order(70));
    }

    // The exchange is gone, and with it the bindings.
    queue.delete_exchange().await;
    (0..4).for_each(|partition| world.write(partition, 10));
    world.begins(Trouble::NoExchange).await;
    // The next connection declares it.
    world.begins(Trouble::Unroutable).await;
    queue.bind("#").await;
    world.catches_up().await;
    all.extend(queue.take(40).await);
    for partition in 0..4 {
        assert_eq!(revisions(&all, partition), in_order(80));
    }
    assert_eq!(log.count("ERROR", Trouble::NoExchange), 1, "{}", log.text());
    world.publisher.stop().await;
    assert!(!log.text().contains("s3cret"), "{}", log.text());
}

#[tokio::test]
async fn a_message_that_is_too_large_holds_up_its_partition_alone() {
    let log = Log::listen();
    let broker = Broker::start().await;
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    broker.max_message_size(10_000).await;
    let world = World::start(&broker.url(), 3, 1);
    // It takes all the room for what may be in flight.
    world.feed.set(0, b"large", &vec![b'x'; 700_000], 1000);
    (0..3).for_each(|partition| world.write(partition, 50));
    world.begins(Trouble::TooLarge).await;
    until("the others are published", PATIENCE, || {
        world.metrics.lanes().iter().all(|lane| lane.partition == 0 || lane.cursor == 50)
    })
    .await;
    assert_eq!(world.lag(), 51);
    broker.max_message_size(1 << 27).await;
    world.catches_up().await;
    let all = queue.drain().await;
    for (partition, count) in [(0, 51), (1, 50), (2, 50)] {
        assert_eq!(queue::first_occurrences(&all, partition), in_order(count));
    }
    assert_eq!(log.count("ERROR", Trouble::TooLarge), 1, "{}", log.text());
    assert_eq!(log.count("INFO", Trouble::TooLarge), 1, "{}", log.text());
    assert!(log.text().contains("configured max size 10000"), "{}", log.text());
    assert_eq!(log.text().matches("changes are not published").count(), 1, "{}", log.text());
    world.publisher.stop().await;
}

#[tokio::test]
async fn lost_connections_wrong_passwords_and_rights() {
    let log = Log::listen();
    let broker = Broker::start().await;
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    let world = World::start(&broker.url_with("wrong"), 2, 1);
    world.write(0, 20);
    world.begins(Trouble::Refused).await;
    broker.change_password("wrong").await;
    world.catches_up().await;
    assert_eq!(log.count("ERROR", Trouble::Refused), 1, "{}", log.text());

    // Reset while messages are under way: some are sent twice, none is lost, and the order stays.
    for round in 1..=5_u64 {
        world.write(0, 300);
        world.write(1, 300);
        let half = world.metrics.confirmed() + 100;
        until("it is under way", PATIENCE, || world.metrics.confirmed() >= half).await;
        broker.ctl(&["close_all_connections", "a test"]).await;
        until("it connects again", PATIENCE, || world.metrics.reconnects() >= round).await;
        world.catches_up().await;
    }
    queue.reconnect(&broker.url_with("wrong")).await;
    let all = queue.drain().await;
    assert_eq!(queue::first_occurrences(&all, 0), in_order(1520));
    assert_eq!(queue::first_occurrences(&all, 1), in_order(1500));

    // Without the right to declare, an exchange that is there will do; without that to write, nothing.
    broker.ctl(&["set_permissions", "flux", "^none$", ".*", ".*"]).await;
    let reconnects = world.metrics.reconnects();
    broker.ctl(&["close_all_connections", "a test"]).await;
    world.write(0, 5);
    until("it connects again", PATIENCE, || world.metrics.reconnects() > reconnects).await;
    world.catches_up().await;
    broker.ctl(&["set_permissions", "flux", "^none$", "^none$", ".*"]).await;
    broker.ctl(&["close_all_connections", "a test"]).await;
    world.write(0, 5);
    world.begins(Trouble::Refused).await;
    broker.ctl(&["set_permissions", "flux", ".*", ".*", ".*"]).await;
    world.catches_up().await;
    assert_eq!(world.feed.cursor(0).revision, 1530);
    world.publisher.stop().await;
}

#[tokio::test]
async fn a_killed_broker_costs_neither_changes_nor_memory() {
    let log = Log::listen();
    let mut broker = Broker::start().await;
    let mut queue = Queue::declare(&broker.url(), EXCHANGE, "all", "#").await;
    let world = World::start(&broker.url(), 8, 100);
    for _ in 0..2 {
        (0..8).for_each(|partition| world.write(partition, 500));
        until("it is under way", PATIENCE, || world.lag() < 3000).await;
        broker.kill().await;
        let value = vec![b'x'; 1000];
        for partition in 0..8 {
            for number in 0..2000_u64 {
                let key = format!("large{number}");
                world.feed.set(partition, key.as_bytes(), &value, number);
            }
        }
        world.begins(Trouble::Unreachable).await;
        // Each partition would hold a message of 100 kB and its overhead.
        assert!(world.metrics.in_flight_bytes() <= 1 << 20, "{}", world.metrics.in_flight_bytes());
        assert!(world.lag() >= 16_000);
        broker.run_again().await;
        world.catches_up().await;
    }
    // The second one is told unless it is over soon, and so soon after the first.
    assert!((1..=2).contains(&log.count("WARN", Trouble::Unreachable)), "{}", log.text());
    queue.reconnect(&broker.url()).await;
    let all = queue.drain().await;
    for partition in 0..8 {
        assert_eq!(queue::first_occurrences(&all, partition), in_order(5000));
        assert_eq!(world.feed.cursor(partition).revision, 5000);
    }
    world.publisher.stop().await;
}

#[tokio::test]
async fn a_publisher_without_a_broker_stops_at_once() {
    let world = World::start("amqp://127.0.0.1:1", 2, 1);
    world.write(0, 5);
    world.begins(Trouble::Unreachable).await;
    let stopped = tokio::time::timeout(Duration::from_secs(3), world.publisher.stop()).await;
    assert!(stopped.is_ok(), "it does not stop");
    assert!(world.metrics.lanes().is_empty());
    assert_eq!(world.metrics.in_flight_bytes(), 0);
}
