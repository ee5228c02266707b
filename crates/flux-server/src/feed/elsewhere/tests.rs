//! What a reader gets of other nodes that have, have not, answer late or not at all, in a time that only goes
//! on when all wait.

use std::collections::BTreeMap;
use std::future::pending;
use std::ops::RangeInclusive;

use bytes::Bytes;
use flux_proto::event::Op;

use super::*;

const ALL: Limit = Limit { events: 1000, bytes: 64 << 10, synced: false, here_only: false };
const NOW: u64 = 1000;

/// What a node does when it is asked.
#[derive(Clone, Debug)]
enum Node {
    /// It has these, and when they are read it does the other thing.
    Has(RangeInclusive<u64>, After),
    Lacks,
    Down,
    /// It takes the call and says nothing.
    Frozen,
    /// It says that it has what it has not.
    Odd,
}

#[derive(Clone, Copy, Debug)]
enum After {
    Waits,
    Ends,
    Skips,
}

#[derive(Debug, Default)]
struct World {
    nodes: Mutex<BTreeMap<u32, (Node, bool)>>,
    /// Which nodes were asked, and behind what.
    asked: Mutex<Vec<(u32, u64)>>,
}

struct Sent {
    next: u64,
    last: u64,
    after: After,
}

fn event(revision: u64) -> Event {
    Event {
        op: Op::Set,
        key: Bytes::from(format!("k{revision}")),
        value: Some(Bytes::from_static(b"v")),
        partition: 3,
        revision,
        version: revision,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 1,
        trace: None,
    }
}

impl Changes for Sent {
    fn next(&mut self) -> BoxFuture<'_, Result<Event, Unhelpful>> {
        Box::pin(async move {
            if self.next > self.last {
                match self.after {
                    After::Waits => pending::<()>().await,
                    After::Ends => return Err(Unhelpful::Silent("gone".to_owned())),
                    After::Skips => self.next += 1,
                }
            }
            self.next += 1;
            Ok(event(self.next - 1))
        })
    }
}

impl Others for World {
    fn nodes(&self, _: u16) -> Vec<Other> {
        let nodes = self.nodes.lock();
        nodes
            .iter()
            .map(|(node, (_, holds))| Other { node: NodeId(*node), holds: *holds })
            .collect()
    }

    fn changes(
        &self,
        node: NodeId,
        partition: u16,
        after: u64,
    ) -> BoxFuture<'static, Result<Box<dyn Changes>, Unhelpful>> {
        assert_eq!(partition, 3);
        self.asked.lock().push((node.0, after));
        let node = self.nodes.lock()[&node.0].0.clone();
        Box::pin(async move {
            let sent = |next, last, after| Ok(Box::new(Sent { next, last, after }) as _);
            match node {
                Node::Has(has, then) if has.contains(&(after + 1)) => {
                    sent(after + 1, *has.end(), then)
                }
                Node::Has(..) | Node::Lacks => Err(Unhelpful::Lacks),
                Node::Down => Err(Unhelpful::Silent("refused".to_owned())),
                Node::Frozen => sent(1, 0, After::Waits),
                Node::Odd => sent(after + 2, u64::MAX, After::Waits),
            }
        })
    }
}

struct Rig {
    world: Arc<World>,
    elsewhere: Elsewhere,
    fetches: Fetches,
}

impl Rig {
    /// These nodes are to have a replica.
    fn new(nodes: impl IntoIterator<Item = Node>) -> Rig {
        let world = Arc::new(World::default());
        let holding = (1..).zip(nodes.into_iter().map(|node| (node, true)));
        *world.nodes.lock() = holding.collect();
        let elsewhere = Elsewhere::new(Arc::clone(&world) as Arc<dyn Others>);
        Rig { world, elsewhere, fetches: Fetches::default() }
    }

    fn set(&self, node: u32, does: Node) {
        self.world.nodes.lock().entry(node).and_modify(|one| one.0 = does);
    }

    /// As the feed does it.
    async fn once(&self, after: u64, until: u64, limit: Limit) -> Answer {
        self.fetches.sweep();
        match self.elsewhere.go_on(&self.fetches, (3, after, NOW), limit).await {
            Some(answer) => answer,
            None => self.elsewhere.begin(&self.fetches, (3, after, NOW), until, limit).await,
        }
    }

    /// Reads until there is something; none: nobody has it.
    async fn read(&self, after: u64, until: u64, limit: Limit) -> Option<RangeInclusive<u64>> {
        loop {
            let began = Instant::now();
            match self.once(after, until, limit).await {
                Answer::Changes(events) => {
                    let revisions: Vec<u64> = events.iter().map(|one| one.revision).collect();
                    let all = revisions[0]..=revisions[revisions.len() - 1];
                    assert_eq!(revisions, all.clone().collect::<Vec<_>>(), "without a hole");
                    return Some(all);
                }
                Answer::Nobody => return None,
                Answer::Later => tokio::time::sleep(Duration::from_millis(50)).await,
            }
            assert!(began.elapsed() <= TURN + Duration::from_millis(51), "a reader is held up");
        }
    }

    fn asked(&self) -> Vec<(u32, u64)> {
        std::mem::take(&mut self.world.asked.lock())
    }
}

#[tokio::test(start_paused = true)]
async fn what_one_node_has_is_read_in_one_stream_until_it_is_here() {
    let rig = Rig::new([Node::Lacks, Node::Has(1..=500, After::Waits), Node::Down]);
    let some = Limit { events: 40, ..ALL };
    let mut at = 9;
    while at < 200 {
        let read = rig.read(at, 200, some).await.expect("it has it");
        assert_eq!(*read.start(), at + 1);
        assert!(read.clone().count() <= 40);
        at = *read.end();
    }
    assert_eq!(at, 200, "what is behind this is here");
    assert_eq!(rig.asked(), [(1, 9), (2, 9)]);
    let place = (3, 200, NOW);
    assert_eq!(rig.elsewhere.go_on(&rig.fetches, place, ALL).await, None);
    assert_eq!(rig.elsewhere.streams.available_permits(), MAX_STREAMS, "the stream is closed");
}

#[tokio::test(start_paused = true)]
async fn what_was_read_can_be_read_again_and_never_goes_beyond_what_is_applied() {
    let rig = Rig::new([Node::Has(1..=500, After::Waits)]);
    assert_eq!(rig.read(0, 100, Limit { events: 7, ..ALL }).await, Some(1..=7));
    assert_eq!(rig.read(0, 100, Limit { events: 3, ..ALL }).await, Some(1..=3));
    assert_eq!(rig.read(3, 100, Limit { events: 2, bytes: 1, ..ALL }).await, Some(4..=4));
    let applied = rig.elsewhere.go_on(&rig.fetches, (3, 4, 6), ALL).await;
    assert_eq!(applied, Some(Answer::Changes(vec![event(5), event(6)])));
    assert_eq!(rig.read(6, 100, ALL).await, Some(7..=100));
    assert_eq!(rig.asked(), [(1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn another_node_goes_on_where_one_ends() {
    for then in [After::Ends, After::Skips, After::Waits] {
        let rig = Rig::new([Node::Has(5..=20, then), Node::Odd, Node::Has(15..=90, then)]);
        let mut at = 4;
        while at < 90 {
            at = *rig.read(at, 90, ALL).await.expect("somebody has it").end();
        }
        assert_eq!(rig.asked(), [(1, 4), (1, 20), (2, 20), (3, 20)]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_no_node_has_is_given_up_at_once() {
    for nodes in [vec![], vec![Node::Lacks, Node::Odd, Node::Has(7..=9, After::Waits)]] {
        let rig = Rig::new(nodes);
        let began = Instant::now();
        assert_eq!(rig.read(3, 50, ALL).await, None);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_to_have_it_is_waited_for() {
    for away in [Node::Down, Node::Frozen] {
        let rig = Rig::new([away, Node::Lacks]);
        let began = Instant::now();
        let comes_back = async {
            tokio::time::sleep(Duration::from_secs(40)).await;
            rig.set(1, Node::Has(1..=50, After::Waits));
        };
        let (read, ()) = tokio::join!(rig.read(0, 50, ALL), comes_back);
        assert_eq!(read, Some(1..=50));
        assert!(began.elapsed() >= Duration::from_secs(40), "not before it is there");
        assert!(began.elapsed() <= Duration::from_secs(40) + PATIENCE + 2 * MAX_PAUSE);
        let asked = rig.asked().len();
        assert!(asked <= 60, "it is not asked all the time, but {asked} times");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_come_back_is_given_up_after_a_while() {
    for away in [Node::Down, Node::Frozen] {
        let rig = Rig::new([Node::Lacks, away]);
        let began = Instant::now();
        assert_eq!(rig.read(0, 50, ALL).await, None);
        let waited = began.elapsed();
        assert!((WAIT..WAIT + 2 * (PATIENCE + MAX_PAUSE)).contains(&waited), "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_need_not_have_it_is_asked_but_not_waited_for() {
    let rig = Rig::new([Node::Lacks, Node::Down]);
    rig.world.nodes.lock().entry(2).and_modify(|one| one.1 = false);
    assert_eq!(rig.read(0, 50, ALL).await, None);
    rig.set(2, Node::Has(1..=50, After::Waits));
    assert_eq!(rig.read(0, 50, ALL).await, Some(1..=50));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_is_cancelled_asks_for_nothing_twice() {
    let rig = Rig::new([Node::Frozen, Node::Has(1..=9, After::Waits)]);
    let began = Instant::now();
    loop {
        // Cancelled long before its turn is over.
        let turn = Duration::from_millis(20);
        match timeout(turn, rig.once(0, 9, ALL)).await {
            Ok(Answer::Changes(events)) => break assert_eq!(events.len(), 9),
            Ok(Answer::Nobody) => panic!("the second one has it"),
            Ok(Answer::Later) | Err(_) => {}
        }
        assert!(began.elapsed() < 2 * PATIENCE);
    }
    assert_eq!(rig.asked(), [(1, 0), (2, 0)]);
}

/// One of many partitions, say, or one whose other rows take long.
#[tokio::test(start_paused = true)]
async fn who_comes_seldom_waits_no_longer() {
    let rig = Rig::new([Node::Down]);
    let began = Instant::now();
    while let Answer::Later = rig.once(0, 9, ALL).await {
        tokio::time::sleep(IDLE + Duration::from_secs(5)).await;
    }
    assert!(began.elapsed() >= WAIT && began.elapsed() < 2 * WAIT, "{:?}", began.elapsed());
}

/// Who has many partitions to see to is not held up by those whose time has not come.
#[tokio::test(start_paused = true)]
async fn a_pause_holds_up_nobody() {
    let rig = Rig::new([Node::Down]);
    assert_eq!(rig.once(0, 9, ALL).await, Answer::Later);
    let began = Instant::now();
    for _ in 0..100 {
        assert_eq!(rig.once(0, 9, ALL).await, Answer::Later);
    }
    assert!(began.elapsed() < TURN, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn streams_are_bounded_and_end_when_nobody_reads() {
    let rig = Rig::new([Node::Has(1..=900, After::Waits)]);
    let one = Limit { events: 1, ..ALL };
    let places = || (0..MAX_STREAMS as u64).map(|at| 10 * at);
    let partitions: Vec<Fetches> = places().map(|_| Fetches::default()).collect();
    for (after, fetches) in places().zip(&partitions) {
        let read = rig.elsewhere.begin(fetches, (3, after, NOW), 900, one).await;
        assert_eq!(read, Answer::Changes(vec![event(after + 1)]));
    }
    assert_eq!(rig.once(5, 900, one).await, Answer::Later, "there is no room");
    tokio::time::sleep(IDLE / 2).await;
    for (after, fetches) in places().zip(&partitions).skip(1) {
        let read = rig.elsewhere.go_on(fetches, (3, after + 1, NOW), one).await;
        assert_eq!(read, Some(Answer::Changes(vec![event(after + 2)])));
    }
    tokio::time::sleep(IDLE / 2).await;
    partitions.iter().for_each(Fetches::sweep);
    assert_eq!(rig.elsewhere.streams.available_permits(), 1, "those that are read stay open");
    assert_eq!(rig.once(5, 900, one).await, Answer::Changes(vec![event(6)]));
    for after in 100..100 + 2 * MAX_FETCHES as u64 {
        rig.once(after * 3, 900, one).await;
    }
    assert_eq!(rig.fetches.0.lock().len(), MAX_FETCHES);
}
