//! What a watcher may rely on, over a feed in memory and in a time that only goes on when all wait.

mod property;

use std::future::poll_fn;
use std::net::SocketAddr;

use flux_cdc::memory::MemoryFeed;
use flux_core::PartitionId;
use flux_proto::event::{Event, Op};
use tokio::time::{Instant, timeout};

use super::route::Route;
use super::*;

const CLUSTER: u64 = 7;
const ROOM: Room = Room { bytes: 64 << 10, items: 100 };

/// A node that is always the place to watch, or never.
#[derive(Debug, Default)]
struct Fixed(Mutex<Option<Option<SocketAddr>>>);

impl Routes for Fixed {
    fn route(&self, _: u16, _: u32) -> Route {
        match *self.0.lock() {
            None => Route::Here,
            Some(None) => Route::Nowhere,
            Some(Some(node)) => Route::There(node),
        }
    }
}

struct Rig {
    feed: Arc<MemoryFeed>,
    routes: Arc<Fixed>,
    watches: Watches,
    stop: watch::Sender<bool>,
}

impl Rig {
    fn new(partitions: u16, room: Room) -> Rig {
        let feed = Arc::new(MemoryFeed::new("flux", partitions, usize::MAX));
        let (stop, stopping) = watch::channel(false);
        let routes = Arc::new(Fixed::default());
        let watches = Watches::new(
            Arc::clone(&feed) as Arc<dyn Feed>,
            (Arc::clone(&routes) as Arc<dyn Routes>, Arc::default()),
            CLUSTER,
            (20, room),
            Arc::default(),
            Arc::default(),
            stopping,
        );
        Rig { feed, routes, watches, stop }
    }

    fn set(&self, key: &str, value: &str) -> u64 {
        let PartitionId(partition) = self.watches.partitions.of(key.as_bytes());
        self.feed.set(partition, key.as_bytes(), value.as_bytes(), 5)
    }

    fn remove(&self, op: Op, key: &str) -> Option<u64> {
        let PartitionId(partition) = self.watches.partitions.of(key.as_bytes());
        self.feed.remove(partition, op, key.as_bytes(), 5)
    }

    fn open(&self, keys: Keys, begin: Begin) -> Watching {
        self.watches.open(wanted(keys, begin)).expect("a watch")
    }
}

fn key(text: &str) -> Keys {
    Keys::One(Bytes::copy_from_slice(text.as_bytes()))
}

fn prefix(text: &str) -> Keys {
    Keys::Prefix(Bytes::copy_from_slice(text.as_bytes()))
}

fn wanted(keys: Keys, begin: Begin) -> Wanted {
    let keep_alive = Duration::from_secs(10);
    Wanted {
        keys,
        begin,
        partitions: Vec::new(),
        here_only: false,
        own_log_only: false,
        keep_alive,
    }
}

fn token(shown: &Shown) -> Begin {
    Begin::Token(Bytes::copy_from_slice(&shown.token))
}

impl Watching {
    async fn next(&mut self) -> Option<Result<Shown, Ended>> {
        poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    async fn shown(&mut self) -> Shown {
        self.next().await.expect("not at its end").expect("not ended")
    }

    /// The next message in words.
    async fn words(&mut self) -> String {
        words(&self.shown().await)
    }

    /// Why it ends; what it is shown until then is dropped.
    async fn ended(&mut self) -> Ended {
        loop {
            if let Err(ended) = self.next().await.expect("an end with a reason") {
                assert!(self.next().await.is_none(), "nothing comes after the end");
                return ended;
            }
        }
    }
}

fn words(shown: &Shown) -> String {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let of = |Event { op, key, value, revision, .. }: &Event| {
        let value = value.as_ref().map(|value| format!("={}", text(value))).unwrap_or_default();
        format!("{} {}{value} @{revision}", op.name(), text(key))
    };
    match &shown.what {
        What::Started => "started".to_owned(),
        What::KeepAlive => "alive".to_owned(),
        What::Record(record) => match &**record {
            Record::Change(event) => of(event),
            Record::GapBegin(gap) => format!("gap {:?} at {}", gap.lost, gap.at.revision),
            Record::Row { number, event, .. } => format!("row {number} {}", of(event)),
            Record::GapEnd { rows, .. } => format!("end of {rows}"),
        },
    }
}

fn positions(shown: &Shown) -> Vec<(u16, u64)> {
    let token = Token::decode(&shown.token).expect("a token");
    assert_eq!(token.cluster, CLUSTER);
    token.positions
}

#[tokio::test(start_paused = true)]
async fn from_now_on_what_matches_is_shown_in_order() {
    let rig = Rig::new(1, ROOM);
    rig.set("a1", "before");
    let mut one = rig.open(key("a1"), Begin::Now);
    let mut some = rig.open(prefix("a"), Begin::Now);
    let mut all = rig.open(prefix(""), Begin::Now);
    for watching in [&mut one, &mut some, &mut all] {
        assert_eq!(watching.words().await, "started");
    }
    rig.set("a1", "x");
    rig.set("a2", "y");
    rig.set("b", "z");
    rig.remove(Op::Delete, "a1");
    rig.remove(Op::Expire, "a2");
    let told = ["set a1=x @2", "set a2=y @3", "set b=z @4", "delete a1 @5", "expire a2 @6"];
    for (watching, wanted) in
        [(&mut one, &[0, 3][..]), (&mut some, &[0, 1, 3, 4]), (&mut all, &[0, 1, 2, 3, 4])]
    {
        for &one in wanted {
            assert_eq!(watching.words().await, told[one]);
        }
        assert_eq!(watching.words().await, "alive");
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_resumes_behind_its_message() {
    let rig = Rig::new(1, ROOM);
    let mut first = rig.open(prefix("a"), Begin::Now);
    assert_eq!(first.words().await, "started");
    for number in 1..=300 {
        rig.set(&format!("a{number}"), "v");
        rig.set("b", "v");
        assert_eq!(first.words().await, format!("set a{number}=v @{}", 2 * number - 1));
    }
    let mut again = rig.open(prefix("a"), Begin::Now);
    let started = again.shown().await;
    assert_eq!(positions(&started), [(0, 600)]);
    let from = Begin::Token(Token { cluster: CLUSTER, positions: vec![(0, 301)] }.encode().into());
    let mut resumed = rig.open(prefix("a"), from);
    assert_eq!(resumed.words().await, "started");
    for number in 152..=300 {
        assert_eq!(resumed.words().await, format!("set a{number}=v @{}", 2 * number - 1));
    }
    rig.set("a", "new");
    for watching in [&mut first, &mut again, &mut resumed] {
        assert_eq!(watching.words().await, "set a=new @601");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_followed_by_what_changes_behind_it() {
    let rig = Rig::new(1, ROOM);
    rig.set("a", "1");
    rig.set("gone", "1");
    rig.set("b", "1");
    rig.remove(Op::Delete, "gone");
    rig.set("other", "1");
    let mut watching = rig.open(prefix("a"), Begin::Snapshot);
    let started = watching.shown().await;
    assert_eq!((words(&started).as_str(), positions(&started)), ("started", vec![]));
    let gap = watching.shown().await;
    assert_eq!((words(&gap).as_str(), positions(&gap)), ("gap 1..=5 at 5", vec![]));
    let row = watching.shown().await;
    assert_eq!((words(&row).as_str(), positions(&row)), ("row 1 set a=1 @1", vec![]));
    let end = watching.shown().await;
    assert_eq!((words(&end).as_str(), positions(&end)), ("end of 1", vec![(0, 5)]));
    rig.set("a", "2");
    assert_eq!(watching.words().await, "set a=2 @6");
    // In the middle of the rows there is no place to resume at: they come anew.
    let mut again = rig.open(prefix("a"), token(&row));
    assert_eq!(again.words().await, "started");
    assert_eq!(again.words().await, "gap 1..=6 at 6");
    assert_eq!(again.words().await, "row 1 set a=2 @6");
    let end = again.shown().await;
    assert_eq!(words(&end), "end of 1");
    rig.set("a", "3");
    let mut behind = rig.open(prefix("a"), token(&end));
    assert_eq!(behind.words().await, "started");
    assert_eq!(behind.words().await, "set a=3 @7");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_a_key_is_that_key_or_nothing() {
    let rig = Rig::new(1, ROOM);
    rig.set("a", "1");
    rig.set("ab", "1");
    let mut present = rig.open(key("a"), Begin::Snapshot);
    for wanted in ["started", "gap 1..=2 at 2", "row 1 set a=1 @1", "end of 1"] {
        assert_eq!(present.words().await, wanted);
    }
    rig.remove(Op::Delete, "a");
    let mut absent = rig.open(key("a"), Begin::Snapshot);
    for wanted in ["started", "gap 1..=3 at 3", "end of 0"] {
        assert_eq!(absent.words().await, wanted);
    }
    rig.set("a", "2");
    assert_eq!(present.words().await, "delete a @3");
    for watching in [&mut present, &mut absent] {
        assert_eq!(watching.words().await, "set a=2 @4");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_nowhere_is_a_gap_with_the_current_values() {
    let rig = Rig::new(1, ROOM);
    let mut watching = rig.open(prefix(""), Begin::Now);
    let started = watching.shown().await;
    drop(watching);
    for number in 0..5 {
        rig.set("k", &number.to_string());
    }
    rig.feed.forget_to(0, 3);
    rig.set("l", "x");
    let mut resumed = rig.open(prefix(""), token(&started));
    for wanted in ["started", "gap 1..=6 at 6", "row 1 set k=4 @5", "row 2 set l=x @6", "end of 2"]
    {
        assert_eq!(resumed.words().await, wanted);
    }
    rig.set("k", "5");
    assert_eq!(resumed.words().await, "set k=5 @7");
}

#[tokio::test(start_paused = true)]
async fn what_is_looked_for_at_other_nodes_holds_up_no_other_partition() {
    let rig = Rig::new(2, ROOM);
    let here = rig.watches.partitions.of(b"b1").0;
    let key = (0..).map(|number| format!("a{number}"));
    let away = { key }.find(|key| rig.watches.partitions.of(key.as_bytes()).0 != here);
    let away = away.expect("some key is of the other partition");
    rig.set(&away, "1");
    rig.set("b1", "1");
    rig.feed.look_elsewhere(1 - here, true);
    let positions = vec![(0, 0), (1, 0)];
    let mut watching =
        rig.open(prefix(""), Begin::Token(Token { cluster: CLUSTER, positions }.encode().into()));
    assert_eq!(watching.words().await, "started");
    assert_eq!(watching.words().await, "set b1=1 @1");
    let began = Instant::now();
    for revision in 2..=100 {
        rig.set("b1", "2");
        let asked = Instant::now();
        assert_eq!(watching.words().await, format!("set b1=2 @{revision}"));
        assert_eq!(asked.elapsed(), Duration::ZERO, "it waits for the other partition");
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    assert!(began.elapsed() > Duration::from_secs(60), "longer than any trouble may last");
    rig.feed.look_elsewhere(1 - here, false);
    assert_eq!(watching.words().await, format!("set {away}=1 @1"));
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_takes_nothing_is_told_and_cut_and_can_resume() {
    let rig = Rig::new(1, Room { bytes: usize::MAX, items: 10 });
    let mut slow = rig.open(prefix(""), Begin::Now);
    let mut quick = rig.open(prefix(""), Begin::Now);
    let last = slow.shown().await;
    assert_eq!(quick.words().await, "started");
    for number in 1..=50 {
        rig.set("k", "v");
        assert_eq!(quick.words().await, format!("set k=v @{number}"), "others do not wait");
    }
    let began = Instant::now();
    let ended = async {
        while rig.watches.stats.watch_cut.value() == 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(60), ended).await.expect("it is cut");
    assert!(began.elapsed() >= Duration::from_secs(9), "{:?}", began.elapsed());
    assert_eq!(rig.watches.count(), 1, "its place is free at once");
    assert_eq!(slow.ended().await, Ended::TooSlow);
    let mut resumed = rig.open(prefix(""), token(&last));
    assert_eq!(resumed.words().await, "started");
    for number in 1..=50 {
        assert_eq!(resumed.words().await, format!("set k=v @{number}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_that_passes_the_buffer_is_no_reason_to_cut() {
    let rig = Rig::new(1, Room { bytes: usize::MAX, items: 10 });
    let mut watching = rig.open(prefix(""), Begin::Now);
    assert_eq!(watching.words().await, "started");
    for number in 1..=5000 {
        rig.set("k", &number.to_string());
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for number in 1..=5000 {
        assert_eq!(watching.words().await, format!("set k={number} @{number}"));
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(watching.words().await, "alive");
}

#[tokio::test(start_paused = true)]
async fn one_value_larger_than_the_buffer_comes_through() {
    let rig = Rig::new(1, Room { bytes: 1000, items: 10 });
    let mut watching = rig.open(prefix(""), Begin::Now);
    assert_eq!(watching.words().await, "started");
    let large = "v".repeat(100_000);
    for number in 1..=5 {
        rig.set("k", &large);
        assert_eq!(watching.words().await, format!("set k={large} @{number}"));
    }
}

#[tokio::test(start_paused = true)]
async fn keep_alives_carry_the_newest_place() {
    let rig = Rig::new(2, ROOM);
    let mut watching = rig.open(prefix("a"), Begin::Now);
    assert_eq!(watching.words().await, "started");
    for _ in 0..20 {
        rig.set("b1", "v");
        rig.set("b2", "v");
    }
    let newest = [0, 1].map(|partition| (partition, rig.feed.newest(partition).expect("here")));
    let began = Instant::now();
    let alive = watching.shown().await;
    assert_eq!((words(&alive).as_str(), positions(&alive)), ("alive", newest.to_vec()));
    assert_eq!(watching.words().await, "alive");
    assert_eq!(began.elapsed(), Duration::from_secs(20), "after every 10 s of silence");
    // A change says where the other partition is, too, as of the last beat.
    let changed = rig.set("a", "v");
    let PartitionId(partition) = rig.watches.partitions.of(b"a");
    let shown = watching.shown().await;
    let mut expected = newest.to_vec();
    expected[usize::from(partition)].1 = changed;
    assert_eq!(positions(&shown), expected);
    // Nothing is shown twice or left out, whichever of them resumes.
    rig.feed.forget_to(0, newest[0].1);
    rig.feed.forget_to(1, newest[1].1);
    let mut resumed = rig.open(prefix("a"), token(&alive));
    assert_eq!(resumed.words().await, "started");
    assert_eq!(resumed.words().await, format!("set a=v @{changed}"));
    assert_eq!(resumed.words().await, "alive");
}

#[tokio::test(start_paused = true)]
async fn a_token_of_something_else_is_refused() {
    let rig = Rig::new(4, ROOM);
    let encode = |cluster, positions| Begin::Token(Token { cluster, positions }.encode().into());
    let PartitionId(of) = rig.watches.partitions.of(b"a");
    let other = (of + 1) % 4;
    for (keys, begin) in [
        (prefix(""), encode(CLUSTER + 1, vec![(0, 1)])),
        (prefix(""), encode(CLUSTER, vec![(4, 1)])),
        (prefix(""), Begin::Token(Bytes::from_static(b"x"))),
        (prefix(""), Begin::Token(Bytes::new())),
        (key("a"), encode(CLUSTER, vec![(other, 1)])),
    ] {
        let refused = rig.watches.open(wanted(keys, begin)).expect_err("refused");
        assert!(matches!(refused, Refused::Invalid(_)));
    }
    let only = |partitions| Wanted { partitions, ..wanted(key("a"), Begin::Now) };
    assert!(rig.watches.open(only(vec![4])).is_err());
    assert!(rig.watches.open(only(vec![u32::from(other)])).is_err());
    assert!(rig.watches.open(only(vec![0, 1, 2, 3])).is_ok());
    let _ = rig.open(key("a"), encode(CLUSTER, vec![(of, 1)]));
}

#[tokio::test(start_paused = true)]
async fn there_is_a_limit_of_watches_and_one_that_ends_makes_room() {
    let rig = Rig::new(1, ROOM);
    let mut open: Vec<Watching> = (0..20).map(|_| rig.open(prefix(""), Begin::Now)).collect();
    let refused = rig.watches.open(wanted(prefix(""), Begin::Now)).expect_err("refused");
    assert_eq!(refused, Refused::TooMany);
    open.truncate(19);
    while rig.watches.count() == 20 {
        tokio::task::yield_now().await;
    }
    let mut one = rig.open(prefix(""), Begin::Now);
    assert_eq!(one.words().await, "started");
}

#[tokio::test(start_paused = true)]
async fn all_watches_end_when_the_node_stops() {
    let rig = Rig::new(2, ROOM);
    let mut open: Vec<Watching> = (0..5).map(|_| rig.open(prefix(""), Begin::Now)).collect();
    for watching in &mut open {
        assert_eq!(watching.words().await, "started");
    }
    rig.stop.send_replace(true);
    for mut watching in open {
        assert_eq!(watching.ended().await, Ended::Stopping);
    }
    timeout(Duration::from_secs(1), rig.watches.stopped()).await.expect("all have ended");
    assert_eq!(rig.watches.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_leaves_ends_the_watch_if_no_other_has_the_partition() {
    let rig = Rig::new(1, ROOM);
    let mut any = rig.open(prefix(""), Begin::Now);
    let only_here = Wanted { here_only: true, ..wanted(prefix(""), Begin::Now) };
    let mut only_here = rig.watches.open(only_here).expect("a watch");
    for watching in [&mut any, &mut only_here] {
        assert_eq!(watching.words().await, "started");
    }
    let began = Instant::now();
    *rig.routes.0.lock() = Some(None);
    rig.feed.leave(0);
    assert_eq!(only_here.ended().await, Ended::NotHere);
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(any.ended().await, Ended::Unavailable);
    assert!(began.elapsed() >= Duration::from_secs(30), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_here_when_this_node_is_the_place_again() {
    let rig = Rig::new(1, ROOM);
    let mut watching = rig.open(prefix(""), Begin::Now);
    assert_eq!(watching.words().await, "started");
    rig.set("k", "1");
    assert_eq!(watching.words().await, "set k=1 @1");
    *rig.routes.0.lock() = Some(None);
    tokio::time::sleep(Duration::from_secs(3)).await;
    rig.set("k", "2");
    let silent = timeout(Duration::from_secs(3), watching.words()).await;
    assert!(silent.is_err() || silent.as_deref() == Ok("alive"), "{silent:?}");
    *rig.routes.0.lock() = None;
    let mut words = watching.words().await;
    while words == "alive" {
        words = watching.words().await;
    }
    assert_eq!(words, "set k=2 @2");
}
