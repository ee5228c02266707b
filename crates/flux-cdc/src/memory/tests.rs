//! What a reader of the feed may rely on.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::*;

const ALL: Limit = Limit { events: usize::MAX, bytes: usize::MAX, synced: false, here_only: false };
const SYNCED: Limit = Limit { synced: true, ..ALL };

fn feed() -> MemoryFeed {
    MemoryFeed::new("flux", 2, usize::MAX)
}

/// Writes `k1`, `k2`, … up to a revision.
fn fill(feed: &MemoryFeed, revisions: RangeInclusive<u64>) {
    for revision in revisions {
        assert_eq!(feed.set(0, format!("k{revision}").as_bytes(), b"v", 5), revision);
    }
}

/// The result of a read that need not wait.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}

fn is_waiting<T>(future: impl Future<Output = T>) -> bool {
    pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

fn revisions(chunk: Result<Chunk, FeedError>) -> Vec<u64> {
    match chunk {
        Ok(Chunk::Changes { events, through }) => {
            let revisions: Vec<u64> = events.iter().map(|event| event.revision).collect();
            let last = *revisions.last().expect("a chunk of changes is never empty");
            assert_eq!(through, Place { revision: last, index: last + 1 });
            revisions
        }
        other => panic!("no changes: {other:?}"),
    }
}

fn gap_of(chunk: Result<Chunk, FeedError>) -> Gap {
    match chunk {
        Ok(Chunk::Gap(gap)) => gap,
        other => panic!("no gap: {other:?}"),
    }
}

/// All rows of a gap, a page of one position at a time.
fn all_rows(feed: &dyn Feed, gap: &Gap) -> Vec<Vec<Event>> {
    let (mut pages, mut from) = (Vec::new(), None);
    loop {
        let limit = Limit { events: 1, ..ALL };
        let rows = ready(feed.rows(gap, from, limit)).expect("nothing was replaced");
        pages.push(rows.events);
        from = rows.next;
        if from.is_none() {
            return pages;
        }
    }
}

#[test]
fn changes_come_in_order_with_what_they_changed() {
    let feed = feed();
    assert_eq!(feed.set(0, b"a", b"1", 10), 1);
    assert_eq!(feed.set(0, b"a", b"2", 11), 2);
    assert_eq!(feed.remove(0, Op::Expire, b"a", 12), Some(3));
    assert_eq!(feed.remove(0, Op::Delete, b"a", 13), None, "an absent key takes no revision");
    assert_eq!(feed.set(1, b"b", b"1", 14), 1, "partitions count for themselves");
    assert_eq!((feed.newest(0), feed.newest(1), feed.newest(2)), (Some(3), Some(1), None));

    let Ok(Chunk::Changes { events, .. }) = ready(feed.read(0, 0, ALL)) else {
        panic!("there are changes");
    };
    let seen: Vec<_> = events
        .iter()
        .map(|event| (event.op, event.version, event.previous_version, event.value.as_deref()))
        .collect();
    let expected = [
        (Op::Set, 1, 0, Some(&b"1"[..])),
        (Op::Set, 2, 1, Some(&b"2"[..])),
        (Op::Expire, 0, 2, None),
    ];
    assert_eq!(seen, expected);
    assert_eq!(events[2].committed_at_ms, 12);
}

#[test]
fn a_read_takes_what_its_limit_allows_and_always_one() {
    let feed = feed();
    fill(&feed, 1..=9);
    let read = |after, events, bytes| {
        revisions(ready(feed.read(
            0,
            after,
            Limit { events, bytes, synced: false, here_only: false },
        )))
    };
    assert_eq!(read(0, 100, 100), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(read(4, 3, 100), [5, 6, 7]);
    assert_eq!(read(4, 0, 0), [5]);
    // 3 bytes each.
    assert_eq!(read(0, 100, 9), [1, 2, 3]);
    assert_eq!(read(0, 100, 11), [1, 2, 3]);
    assert_eq!(read(8, 100, 100), [9]);
}

#[tokio::test]
async fn a_read_waits_for_the_next_change() {
    let feed = Arc::new(feed());
    fill(&feed, 1..=2);
    assert!(is_waiting(feed.read(0, 2, ALL)));
    // One that was given up takes nothing away from the next.
    let reader = tokio::spawn({
        let feed = Arc::clone(&feed);
        async move { feed.read(0, 2, ALL).await }
    });
    tokio::task::yield_now().await;
    feed.set(1, b"other", b"v", 5);
    tokio::task::yield_now().await;
    assert!(!reader.is_finished(), "another partition is none of its business");
    fill(&feed, 3..=3);
    assert_eq!(revisions(reader.await.expect("it does not panic")), [3]);
    // A reader that is ahead waits until the feed has come there.
    assert!(is_waiting(feed.read(0, 10, ALL)));
}

#[test]
fn a_reader_is_told_what_it_lost_and_the_rest_makes_the_same_table() {
    let feed = MemoryFeed::new("flux", 1, 10);
    feed.lead(&[Led { partition: 0, term: 4, cursor: Place::default() }]);
    fill(&feed, 1..=30);
    feed.set(0, b"k5", b"new", 5);
    feed.remove(0, Op::Delete, b"k6", 5);
    assert_eq!(revisions(ready(feed.read(0, 22, ALL))).len(), 10);
    let gap = gap_of(ready(feed.read(0, 21, ALL)));
    let at = Place { revision: 32, index: 33 };
    assert_eq!(gap, Gap { partition: 0, lost: 22..=32, at, term: 4 });

    // Writes while the rows are walked.
    let first = ready(feed.rows(&gap, None, Limit { events: 5, ..ALL })).unwrap();
    feed.set(0, b"k7", b"newer", 5);
    feed.remove(0, Op::Delete, b"k8", 5);
    let rest = ready(feed.rows(&gap, first.next, ALL)).unwrap();
    assert_eq!(rest.next, None);
    let rows = first.events.into_iter().chain(rest.events);

    let mut table = BTreeMap::new();
    for row in rows {
        assert_eq!((row.op, row.version), (Op::Set, row.revision));
        assert!(row.revision <= 32, "what is newer comes as a change");
        assert!(table.insert(row.key, row.value).is_none(), "no key comes twice");
    }
    let Ok(Chunk::Changes { events, .. }) = ready(feed.read(0, gap.at.revision, ALL)) else {
        panic!("there are changes");
    };
    for event in events {
        match event.op {
            Op::Set => table.insert(event.key, event.value),
            Op::Delete | Op::Expire => table.remove(&event.key),
        };
    }
    let value = |key: &'static str| table.get(key.as_bytes()).cloned().flatten();
    assert_eq!(table.len(), 28);
    assert_eq!(value("k5").as_deref(), Some(&b"new"[..]));
    assert_eq!(value("k7").as_deref(), Some(&b"newer"[..]));
    assert_eq!((value("k6"), value("k8")), (None, None));
}

#[test]
fn forgetting_is_asked_for_too() {
    let feed = feed();
    fill(&feed, 1..=9);
    feed.forget_to(0, 4);
    assert_eq!(revisions(ready(feed.read(0, 4, ALL))), [5, 6, 7, 8, 9]);
    assert_eq!(gap_of(ready(feed.read(0, 3, ALL))).lost, 4..=9);
    feed.forget_to(0, 99);
    assert_eq!(gap_of(ready(feed.read(0, 8, ALL))).lost, 9..=9);
    assert!(is_waiting(feed.read(0, 9, ALL)));
}

#[test]
fn keys_of_one_position_come_on_one_page() {
    let feed = feed();
    // So many keys in 65,536 positions share some.
    let keys: Vec<String> = (0..2000).map(|number| format!("user:{number}")).collect();
    for key in &keys {
        feed.set(0, key.as_bytes(), b"v", 5);
    }
    let pages = all_rows(&feed, &feed.begin_rows(0).unwrap());
    let mut last = None;
    let mut seen = 0;
    for page in &pages {
        let positions: Vec<u16> = page.iter().map(|event| place_of(&event.key).0).collect();
        assert!(positions.iter().all(|position| *position == positions[0]));
        assert!(Some(positions[0]) > last, "positions rise, each on one page");
        assert!(page.windows(2).all(|pair| pair[0].key < pair[1].key));
        last = Some(positions[0]);
        seen += page.len();
    }
    assert_eq!(seen, keys.len());
    assert!(pages.len() < keys.len(), "no two keys share a position");
}

#[test]
fn rows_say_what_a_table_knows() {
    let feed = feed();
    assert_eq!(feed.begin_rows(0).unwrap().lost, RangeInclusive::new(1, 0));
    assert_eq!(all_rows(&feed, &feed.begin_rows(0).unwrap()), [[]]);
    let mut event = Event {
        op: Op::Set,
        key: Bytes::from_static(b"a"),
        value: Some(Bytes::from_static(b"2")),
        partition: 0,
        revision: 2,
        version: 2,
        previous_version: 1,
        previous_value: Some(Bytes::from_static(b"1")),
        expires_at_ms: Some(99),
        committed_at_ms: 12,
        trace: None,
    };
    feed.set(0, b"a", b"1", 11);
    feed.push(0, event.clone());
    let gap = feed.begin_rows(0).unwrap();
    assert_eq!(gap.lost, 1..=2);
    event.previous_version = 0;
    event.previous_value = None;
    event.committed_at_ms = 0;
    assert_eq!(all_rows(&feed, &gap), [[event]]);
}

#[test]
fn a_walk_over_a_replaced_table_begins_anew() {
    let feed = feed();
    fill(&feed, 1..=9);
    let gap = feed.begin_rows(0).unwrap();
    let one = Limit { events: 1, ..ALL };
    let next = ready(feed.rows(&gap, None, one)).unwrap().next;
    assert!(next.is_some());
    feed.replace_table(0);
    assert_eq!(ready(feed.rows(&gap, next, one)), Err(FeedError::Restart));
    assert_eq!(all_rows(&feed, &gap).concat().len(), 9);
}

#[test]
fn a_reader_of_what_is_synced_waits_for_that() {
    let feed = MemoryFeed::new("flux", 1, 10);
    fill(&feed, 1..=3);
    assert_eq!(revisions(ready(feed.read(0, 0, SYNCED))), [1, 2, 3]);
    feed.sync_to(0, 2);
    assert_eq!(revisions(ready(feed.read(0, 0, SYNCED))), [1, 2]);
    assert!(is_waiting(feed.read(0, 2, SYNCED)));
    assert_eq!(revisions(ready(feed.read(0, 2, ALL))), [3]);
    feed.sync_to(0, 1);
    assert_eq!(revisions(ready(feed.read(0, 0, SYNCED))), [1, 2], "syncing never goes back");

    // The rows of a gap are not newer than what is synced either.
    fill(&feed, 4..=11);
    feed.sync_to(0, 10);
    let gap = gap_of(ready(feed.read(0, 0, SYNCED)));
    assert_eq!((gap.lost.clone(), gap.at.revision), (1..=10, 10));
    assert_eq!(all_rows(&feed, &gap).concat().len(), 10);
    assert_eq!(gap_of(ready(feed.read(0, 0, ALL))).at.revision, 11);
}

#[test]
fn leadership_and_cursors_are_told() {
    let feed = feed();
    let mut led = feed.led();
    assert!(led.borrow_and_update().is_empty());
    let cursor = Place { revision: 3, index: 4 };
    let now = [Led { partition: 1, term: 7, cursor }];
    feed.lead(&now);
    assert!(led.has_changed().unwrap());
    assert_eq!(&led.borrow_and_update()[..], now);
    assert_eq!((feed.begin_rows(1).unwrap().term, feed.begin_rows(0).unwrap().term), (7, 0));

    assert_eq!(feed.cursor(1), Place::default());
    feed.advance(1, cursor);
    feed.advance(1, Place { revision: 2, index: 3 });
    feed.advance(9, cursor);
    assert_eq!((feed.cursor(1), feed.cursor(0)), (cursor, Place::default()));
    assert_eq!((feed.cluster(), feed.partitions()), ("flux", 2));
}

#[tokio::test]
async fn who_waits_is_told_that_there_will_be_nothing() {
    let feed = Arc::new(feed());
    let reader = |partition| {
        let feed = Arc::clone(&feed);
        tokio::spawn(async move { feed.read(partition, 0, ALL).await })
    };
    let (first, second) = (reader(0), reader(1));
    tokio::task::yield_now().await;
    feed.leave(0);
    assert_eq!(first.await.unwrap(), Err(FeedError::NotHere));
    assert_eq!((feed.newest(0), feed.newest(1)), (None, Some(0)));
    assert!(!second.is_finished());
    feed.stop();
    assert_eq!(second.await.unwrap(), Err(FeedError::Stopping));
    assert_eq!(feed.begin_rows(1), Err(FeedError::Stopping));
    let gap = Gap { partition: 0, lost: 1..=1, at: Place::default(), term: 0 };
    assert_eq!(ready(feed.rows(&gap, None, ALL)), Err(FeedError::Stopping));
    assert_eq!(ready(feed.read(2, 0, ALL)), Err(FeedError::NotHere));
}

#[test]
#[should_panic(expected = "the revision is not the next one")]
fn revisions_have_no_holes() {
    let feed = feed();
    fill(&feed, 1..=1);
    let Ok(Chunk::Changes { events, .. }) = ready(feed.read(0, 0, ALL)) else {
        panic!("there is a change");
    };
    feed.push(0, Event { revision: 3, version: 3, ..events[0].clone() });
}
