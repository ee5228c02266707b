//! What a lane sends, as scripts; and the claim in the module's header, as a property.

use std::fmt::Write as _;

use bytes::Bytes;
use flux_proto::event::Op;
use proptest::prelude::*;

use super::*;

fn event(revision: u64) -> Event {
    Event {
        op: Op::Set,
        key: Bytes::from(format!("k{revision}")),
        value: Some(Bytes::from_static(b"v")),
        partition: 7,
        revision,
        version: revision,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 1,
        trace: None,
    }
}

fn events(revisions: impl IntoIterator<Item = u64>) -> Vec<Event> {
    revisions.into_iter().map(event).collect()
}

fn place(revision: u64) -> Place {
    Place { revision, index: 10 * revision }
}

fn lane(cursor: u64, max_events: usize) -> Lane {
    Lane::new(Led { partition: 7, term: 3, cursor: place(cursor) }, max_events)
}

fn gap(from: u64, at: u64) -> Gap {
    Gap { partition: 7, lost: from..=at, at: place(at), term: 3 }
}

/// The lane in one line: what it wants or has out, and its cursor.
fn shown(lane: &Lane) -> String {
    let mut text = String::new();
    match lane.want() {
        Some(Want::Read { after }) => write!(text, "read after {after}"),
        Some(Want::Rows { gap, from }) => {
            write!(text, "rows of {} from {:?}", gap.id(), from.map(|mark| mark.0))
        }
        None => Ok(()),
    }
    .expect("a string");
    match lane.message() {
        Some(Message::Changes(events)) => {
            let (first, last) = (&events[0], &events[events.len() - 1]);
            write!(text, "send {}-{}", first.revision, last.revision)
        }
        Some(Message::GapBegin(gap)) => write!(text, "send gap {} lost {:?}", gap.id(), gap.lost),
        Some(Message::Rows { gap, first, events }) => {
            write!(text, "send {} rows of {gap} from number {first}", events.len())
        }
        Some(Message::GapEnd { gap, rows }) => write!(text, "send end of {gap}, {rows} rows"),
        None => Ok(()),
    }
    .expect("a string");
    format!("{text}; cursor {}", lane.cursor().revision)
}

#[test]
fn changes_go_one_message_at_a_time() {
    let mut lane = lane(4, 10);
    assert_eq!(shown(&lane), "read after 4; cursor 4");
    lane.changes(events(5..=7), place(7));
    assert_eq!(shown(&lane), "send 5-7; cursor 4");
    assert_eq!(lane.confirmed(), Some(place(7)));
    assert_eq!(shown(&lane), "read after 7; cursor 7");
}

#[test]
fn what_failed_goes_again_and_the_cursor_stays() {
    let mut lane = lane(4, 10);
    lane.changes(events(5..=7), place(7));
    for failures in 1..=3 {
        lane.failed(Failure::Unknown);
        assert_eq!(lane.failures(), failures);
        assert_eq!(shown(&lane), "send 5-7; cursor 4");
    }
    assert_eq!(lane.confirmed(), Some(place(7)));
    assert_eq!(lane.failures(), 0);
}

#[test]
fn changes_that_failed_by_themselves_are_read_anew() {
    for failure in [Failure::Refused, Failure::Nowhere] {
        let mut lane = lane(4, 10);
        lane.changes(events(5..=7), place(7));
        lane.failed(failure);
        assert_eq!((shown(&lane).as_str(), lane.failures()), ("read after 4; cursor 4", 1));
        lane.changes(events(5..=6), place(6));
        lane.failed(failure);
        assert_eq!(lane.failures(), 2);
        lane.changes(events(5..=8), place(8));
        assert_eq!(lane.confirmed(), Some(place(8)));
        assert_eq!(lane.failures(), 0);
    }
}

#[test]
fn rows_that_are_in_no_queue_are_read_anew_under_their_numbers() {
    let mut lane = lane(4, 2);
    lane.gap(gap(5, 20));
    assert_eq!(lane.confirmed(), None);
    lane.rows(Rows { events: events([3, 11]), next: Some(RowMark(9)) });
    assert_eq!(lane.confirmed(), None);
    lane.rows(Rows { events: events([12, 13]), next: None });
    lane.failed(Failure::Nowhere);
    assert_eq!(shown(&lane), "rows of 7/20/3 from Some(9); cursor 4");
    // One has changed since. More than fit into a message come in two, of which the second one stays.
    lane.rows(Rows { events: events([13, 14, 15]), next: None });
    assert_eq!(shown(&lane), "send 2 rows of 7/20/3 from number 3; cursor 4");
    assert_eq!(lane.confirmed(), None);
    lane.failed(Failure::Nowhere);
    assert_eq!(shown(&lane), "send 1 rows of 7/20/3 from number 5; cursor 4");
    assert_eq!(lane.confirmed(), None);
    assert_eq!(shown(&lane), "send end of 7/20/3, 5 rows; cursor 4");
}

#[test]
fn rows_that_some_queue_may_have_stay_as_they_are() {
    for first in [Failure::Unknown, Failure::Refused] {
        let mut lane = lane(4, 2);
        lane.gap(gap(5, 20));
        assert_eq!(lane.confirmed(), None);
        lane.rows(Rows { events: events([3, 11]), next: None });
        for failure in [first, Failure::Nowhere] {
            lane.failed(failure);
            assert_eq!(shown(&lane), "send 2 rows of 7/20/3 from number 1; cursor 4");
        }
    }
}

#[test]
fn a_gap_is_its_begin_its_rows_and_its_end_and_moves_the_cursor_there() {
    let mut lane = lane(4, 2);
    lane.gap(gap(5, 20));
    assert_eq!(shown(&lane), "send gap 7/20/3 lost 5..=20; cursor 4");
    lane.failed(Failure::Nowhere);
    assert_eq!(lane.confirmed(), None);
    assert_eq!(shown(&lane), "rows of 7/20/3 from None; cursor 4");
    // A page of more than fit into a message, one of none, and the last one.
    lane.rows(Rows { events: events([3, 11, 12]), next: Some(RowMark(9)) });
    assert_eq!(shown(&lane), "send 2 rows of 7/20/3 from number 1; cursor 4");
    assert_eq!(lane.confirmed(), None);
    assert_eq!(shown(&lane), "send 1 rows of 7/20/3 from number 3; cursor 4");
    assert_eq!(lane.confirmed(), None);
    assert_eq!(shown(&lane), "rows of 7/20/3 from Some(9); cursor 4");
    lane.rows(Rows { events: Vec::new(), next: Some(RowMark(11)) });
    assert_eq!(shown(&lane), "rows of 7/20/3 from Some(11); cursor 4");
    lane.rows(Rows { events: events([17]), next: None });
    assert_eq!(shown(&lane), "send 1 rows of 7/20/3 from number 4; cursor 4");
    assert_eq!(lane.confirmed(), None);
    assert_eq!(shown(&lane), "send end of 7/20/3, 4 rows; cursor 4");
    assert_eq!(lane.confirmed(), Some(place(20)));
    assert_eq!(shown(&lane), "read after 20; cursor 20");
}

#[test]
fn a_gap_without_rows_ends_at_once() {
    let mut lane = lane(0, 2);
    lane.gap(gap(1, 6));
    assert_eq!(lane.confirmed(), None);
    lane.rows(Rows { events: Vec::new(), next: None });
    assert_eq!(shown(&lane), "send end of 7/6/3, 0 rows; cursor 0");
    assert_eq!(lane.confirmed(), Some(place(6)));
}

#[test]
fn a_restart_begins_at_the_cursor() {
    let mut lane = lane(4, 2);
    lane.gap(gap(5, 20));
    assert_eq!(lane.confirmed(), None);
    lane.restart();
    assert_eq!(shown(&lane), "read after 4; cursor 4");
    lane.gap(gap(5, 22));
    assert_eq!(shown(&lane), "send gap 7/22/3 lost 5..=22; cursor 4");
}

#[test]
fn the_records_of_a_message_are_numbered() {
    let id = gap(5, 20).id();
    let rows = Message::Rows { gap: id, first: 8, events: events([3, 9]) };
    let numbers: Vec<u64> = rows
        .records()
        .map(|record| match record {
            Record::Row { number, gap, .. } if gap == id => number,
            other => panic!("no row: {other:?}"),
        })
        .collect();
    assert_eq!(numbers, [8, 9]);
    let changes = Message::Changes(events([5, 6]));
    let revisions: Vec<u64> = changes.records().map(|record| record.revision()).collect();
    assert_eq!(revisions, [5, 6]);
    assert_eq!(Message::GapBegin(gap(5, 20)).records().len(), 1);
}

#[test]
#[should_panic(expected = "a hole in the feed")]
fn a_hole_in_the_feed_is_never_sent() {
    lane(4, 10).changes(events([5, 7]), place(7));
}

/// A step of two leaders, a network that holds messages back, and a queue.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// So many changes are committed.
    Commit(u8),
    /// A leader reads what it wants, at most so many changes.
    Read(bool, u8),
    /// A leader gives its message to its connection, which delivers it at a later step.
    Send(bool),
    /// The broker stores a message that is under way; the confirm arrives or is lost.
    Store { which: u8, confirm_is_lost: bool },
    /// The broker refuses or returns a message that is under way.
    Refuse { which: u8 },
    /// A leader's connection is lost: it does not know what became of its message, which may arrive
    /// all the same.
    Reset(bool, bool),
    /// The newest cursor that was confirmed is replicated.
    Replicate,
    /// A leader begins anew at the replicated cursor.
    Elect(bool),
    /// Changes up to a share of all are forgotten.
    Forget(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..6u8).prop_map(Step::Commit),
        6 => (any::<bool>(), 1..5u8).prop_map(|(who, most)| Step::Read(who, most)),
        6 => any::<bool>().prop_map(Step::Send),
        6 => (any::<u8>(), prop::bool::weighted(0.2))
            .prop_map(|(which, confirm_is_lost)| Step::Store { which, confirm_is_lost }),
        1 => any::<u8>().prop_map(|which| Step::Refuse { which }),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(who, arrives)| Step::Reset(who, arrives)),
        2 => Just(Step::Replicate),
        1 => any::<bool>().prop_map(Step::Elect),
        1 => (0..100u8).prop_map(Step::Forget),
    ]
}

/// A message on its way, and who waits for its confirm.
struct UnderWay {
    message: Message,
    sender: Option<usize>,
}

struct World {
    newest: u64,
    forgotten: u64,
    lanes: [Lane; 2],
    is_out: [bool; 2],
    network: Vec<UnderWay>,
    queue: Vec<Record>,
    confirmed: Place,
    replicated: Place,
}

impl World {
    fn new() -> World {
        World {
            newest: 0,
            forgotten: 0,
            lanes: [lane(0, 2), lane(0, 2)],
            is_out: [false; 2],
            network: Vec::new(),
            queue: Vec::new(),
            confirmed: Place::default(),
            replicated: Place::default(),
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Commit(changes) => self.newest += u64::from(changes),
            Step::Read(who, most) => self.read(usize::from(who), u64::from(most)),
            Step::Send(who) => self.send(usize::from(who)),
            Step::Store { which, confirm_is_lost } => self.store(which, confirm_is_lost),
            Step::Refuse { which } => {
                let refused = self.arrive(which);
                self.fail(refused.and_then(|one| one.sender), Failure::Refused);
            }
            Step::Reset(who, arrives) => {
                let who = Some(usize::from(who));
                self.network.retain(|one| arrives || one.sender != who);
                self.forget_sender(who);
                self.fail(who, Failure::Unknown);
            }
            Step::Replicate => self.replicated = self.replicated.max(self.confirmed),
            Step::Elect(who) => {
                let who = usize::from(who);
                self.forget_sender(Some(who));
                self.lanes[who] = lane(self.replicated.revision, 2);
                self.is_out[who] = false;
            }
            Step::Forget(share) => {
                self.forgotten = self.forgotten.max(self.newest * u64::from(share) / 100);
            }
        }
    }

    fn read(&mut self, who: usize, most: u64) {
        let lane = &mut self.lanes[who];
        match lane.want() {
            Some(Want::Read { after }) if after < self.forgotten => {
                lane.gap(gap(after + 1, self.newest));
            }
            Some(Want::Read { after }) if after < self.newest => {
                let last = self.newest.min(after + most);
                lane.changes(events(after + 1..=last), place(last));
            }
            Some(Want::Rows { gap, from }) => {
                // Three pages of one row each.
                let page = from.map_or(1, |mark| mark.0);
                let next = (page < 3).then_some(RowMark(page + 1));
                lane.rows(Rows { events: events([page.min(gap.at.revision)]), next });
            }
            Some(Want::Read { .. }) | None => {}
        }
    }

    fn send(&mut self, who: usize) {
        if let Some(message) = self.lanes[who].message().filter(|_| !self.is_out[who]) {
            self.network.push(UnderWay { message: message.clone(), sender: Some(who) });
            self.is_out[who] = true;
        }
    }

    /// One of the messages that are under way; those of different connections in any order.
    fn arrive(&mut self, which: u8) -> Option<UnderWay> {
        let count = self.network.len();
        (count > 0).then(|| self.network.remove(usize::from(which) % count))
    }

    fn store(&mut self, which: u8, confirm_is_lost: bool) {
        let Some(UnderWay { message, sender }) = self.arrive(which) else {
            return;
        };
        self.queue.extend(message.records());
        match sender {
            Some(_) if confirm_is_lost => self.fail(sender, Failure::Unknown),
            Some(who) => {
                self.is_out[who] = false;
                if let Some(cursor) = self.lanes[who].confirmed() {
                    self.confirmed = self.confirmed.max(cursor);
                }
            }
            None => {}
        }
    }

    fn fail(&mut self, sender: Option<usize>, failure: Failure) {
        if let Some(who) = sender
            && std::mem::take(&mut self.is_out[who])
        {
            self.lanes[who].failed(failure);
        }
    }

    fn forget_sender(&mut self, who: Option<usize>) {
        for one in self.network.iter_mut().filter(|one| one.sender == who) {
            one.sender = None;
        }
    }

    /// Nothing goes wrong any more and the first leader goes on until all is sent.
    fn settle(&mut self) {
        while !self.network.is_empty() {
            self.store(0, false);
        }
        while self.lanes[0].cursor().revision < self.newest {
            self.read(0, 5);
            self.send(0);
            self.store(0, false);
        }
    }
}

/// The last revision that the queue stands for, if the first occurrences are in order.
fn end_of(queue: &[Record]) -> Result<u64, String> {
    let mut end = 0;
    for record in queue {
        match record {
            Record::Change(event) if event.revision > end + 1 => {
                return Err(format!("{} after {end}", event.revision));
            }
            Record::GapBegin(gap) if *gap.lost.start() > end + 1 => {
                return Err(format!("a gap from {} after {end}", gap.lost.start()));
            }
            Record::Change(event) => end = end.max(event.revision),
            Record::GapEnd { gap, .. } => end = end.max(gap.at),
            Record::GapBegin(_) | Record::Row { .. } => {}
        }
    }
    Ok(end)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Two leaders of one partition at once, messages refused, lost, delayed past a reset and stored
    /// without their confirm: what the queue has first is in order and without a hole, and no cursor
    /// is ahead of it.
    #[test]
    fn first_occurrences_at_the_queue_are_in_order(steps in prop::collection::vec(step(), 1..200)) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            let end = end_of(&world.queue).map_err(TestCaseError::fail)?;
            let [first, second] = &world.lanes;
            for cursor in [world.confirmed, world.replicated, first.cursor(), second.cursor()] {
                prop_assert!(cursor.revision <= end, "cursor {} ahead of {end}", cursor.revision);
            }
        }
        world.settle();
        prop_assert_eq!(end_of(&world.queue), Ok(world.newest));
    }
}

/// The property above can fail: it catches a leader that takes a refusal for a confirm.
#[test]
fn a_cursor_past_a_refused_message_is_seen_at_the_queue() {
    let mut world = World::new();
    for step in [Step::Commit(2), Step::Read(false, 1), Step::Send(false)] {
        world.take(step);
    }
    world.network.clear();
    world.is_out[0] = false;
    world.lanes[0].confirmed();
    world.settle();
    assert_eq!(end_of(&world.queue), Err("2 after 0".to_owned()));
}
