//! What becomes a line and what is acknowledged, one delivery at a time and for any queue that delivers
//! at least once.

use bytes::Bytes;
use flux_proto::event::{Event, Gap, Op, Place, read_json};
use proptest::prelude::*;

use super::*;

const PATIENCE: Duration = Duration::from_secs(5);

fn change(partition: u16, revision: u64) -> Record {
    Record::Change(Event {
        op: Op::Set,
        key: Bytes::from_static(b"k"),
        value: Some(Bytes::from(revision.to_string())),
        partition,
        revision,
        version: revision,
        previous_version: 0,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 0,
        trace: None,
    })
}

/// A gap that lost so many revisions after one, with rows.
fn gap(partition: u16, after: u64, lost: u64, rows: u64) -> Vec<Record> {
    let at = Place { revision: after + lost, index: 0 };
    let gap = Gap { partition, lost: after + 1..=at.revision, at, term: 1 };
    let Record::Change(event) = change(partition, 1) else { unreachable!("it is a change") };
    let row = |number| Record::Row { gap: gap.id(), number, event: event.clone() };
    let end = Record::GapEnd { gap: gap.id(), rows };
    [Record::GapBegin(gap.clone())].into_iter().chain((1..=rows).map(row)).chain([end]).collect()
}

/// The body of a message with these records.
fn body(records: &[Record]) -> Vec<u8> {
    let mut body = Vec::new();
    let is_batch = records.len() != 1;
    for record in records {
        body.push(if body.is_empty() { b'[' } else { b',' });
        write_json(record, &mut body);
    }
    if is_batch {
        body.push(b']');
        body
    } else {
        body.split_off(1)
    }
}

fn read(lines: &[u8]) -> Vec<Record> {
    assert!(lines.is_empty() || lines.ends_with(b"\n"));
    lines
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| read_json(line).expect("a line is a record"))
        .collect()
}

fn revisions(intake: &Intake) -> Vec<u64> {
    read(intake.lines()).iter().map(Record::revision).collect()
}

fn intake() -> Intake {
    Intake::new(Ledger::new(), PATIENCE, 100)
}

/// Takes one change per delivery; the tag is the index.
fn take_all(intake: &mut Intake, changes: &[u64], now: Instant) {
    for (tag, &revision) in (1..).zip(changes) {
        intake.take(tag, &body(&[change(0, revision)]), now).expect("a record");
    }
}

fn multiple(tag: u64) -> Ack {
    Ack { tag, multiple: true }
}

fn single(tag: u64) -> Ack {
    Ack { tag, multiple: false }
}

#[test]
fn what_is_written_is_acknowledged_at_once() {
    let (mut intake, now) = (intake(), Instant::now());
    take_all(&mut intake, &[1, 2, 2, 3], now);
    assert_eq!(revisions(&intake), [1, 2, 3]);
    assert_eq!(intake.unsettled(), 4);
    assert_eq!(intake.written(), [multiple(4)]);
    assert_eq!((intake.unsettled(), intake.lines().len()), (0, 0));
    assert_eq!(intake.counts(), Counts { lines: 3, repeats: 1, ..Counts::default() });
    assert_eq!(intake.written(), []);
}

#[test]
fn what_is_ahead_waits_and_holds_up_nobody() {
    let (mut intake, now) = (intake(), Instant::now());
    take_all(&mut intake, &[1, 4, 3], now);
    intake.take(4, &body(&[change(9, 1)]), now).expect("a record");
    assert_eq!(revisions(&intake), [1, 1], "the other partition goes on");
    assert_eq!(intake.written(), [multiple(1), single(4)]);
    assert_eq!(intake.give_up(now), []);
    intake.take(5, &body(&[change(0, 2)]), now).expect("a record");
    assert_eq!(revisions(&intake), [2, 3, 4]);
    assert_eq!(intake.written(), [multiple(5)]);
    assert_eq!(intake.deadline(), None);
}

#[test]
fn what_an_earlier_consumer_had_may_come_behind_what_it_had_not() {
    let (mut intake, now) = (intake(), Instant::now());
    take_all(&mut intake, &[4, 5, 6, 2, 3, 1, 7], now);
    assert_eq!(revisions(&intake), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((intake.counts().repeats, intake.deadline()), (0, None));
    assert_eq!(intake.written(), [multiple(7)]);
}

#[test]
fn a_queue_that_was_bound_late_begins_with_the_lowest_that_comes() {
    let (mut intake, now) = (intake(), Instant::now());
    take_all(&mut intake, &[44, 45, 43], now);
    assert_eq!((revisions(&intake), intake.written()), (vec![], vec![]));
    assert_eq!(intake.give_up(now + PATIENCE), [], "nothing that ever was in the queue is missing");
    assert_eq!(revisions(&intake), [43, 44, 45]);
    assert_eq!(intake.written(), [multiple(3)]);
    // So does one that begins within a gap.
    for (tag, record) in (10..).zip(&gap(1, 6, 3, 2)[1..]) {
        intake.take(tag, &body(std::slice::from_ref(record)), now).expect("a record");
    }
    assert_eq!(intake.give_up(now), []);
    assert_eq!(intake.give_up(now + PATIENCE), []);
    assert_eq!((read(intake.lines()).len(), intake.deadline()), (3, None));
}

#[test]
fn what_does_not_come_is_given_up() {
    let (mut intake, start) = (intake(), Instant::now());
    take_all(&mut intake, &[1, 9, 5, 6], start);
    assert_eq!(intake.deadline(), Some(start + PATIENCE));
    assert_eq!(intake.give_up(start + PATIENCE - Duration::from_millis(1)), []);
    let later = start + PATIENCE;
    let hole = |from: u64, to: u64| Hole::Revisions { partition: 0, missing: from..=to };
    assert_eq!(intake.give_up(later), [hole(2, 4)]);
    assert_eq!(revisions(&intake), [1, 5, 6]);
    assert_eq!(intake.written(), [multiple(1), single(3), single(4)]);
    // The partition went on, so what else is missing may come as well.
    assert_eq!(intake.deadline(), Some(later + PATIENCE));
    assert_eq!(intake.give_up(later + PATIENCE), [hole(7, 8)]);
    assert_eq!(intake.written(), [multiple(2)]);
    assert_eq!(intake.deadline(), None);
}

#[test]
fn too_much_that_is_ahead_is_not_waited_for() {
    let (mut intake, now) = (Intake::new(Ledger::new(), PATIENCE, 3), Instant::now());
    take_all(&mut intake, &[1, 3, 4], now);
    assert_eq!(intake.give_up(now), []);
    intake.take(4, &body(&[change(0, 6)]), now).expect("a record");
    assert_eq!(intake.give_up(now), [Hole::Revisions { partition: 0, missing: 2..=2 }]);
    assert_eq!(revisions(&intake), [1, 3, 4]);
}

#[test]
fn a_batch_is_done_when_all_of_it_is() {
    let (mut intake, now) = (intake(), Instant::now());
    intake.take(1, &body(&[change(0, 1), change(0, 2)]), now).expect("records");
    intake.take(2, &body(&[change(0, 2), change(0, 3), change(0, 5)]), now).expect("records");
    intake.take(3, b"[]", now).expect("no records");
    assert_eq!(revisions(&intake), [1, 2, 3]);
    assert_eq!(intake.written(), [multiple(1), single(3)]);
    intake.take(4, &body(&[change(0, 4)]), now).expect("a record");
    assert_eq!(revisions(&intake), [4, 5]);
    assert_eq!(intake.written(), [multiple(4)]);
}

#[test]
fn what_is_no_record_is_refused_and_changes_nothing() {
    let (mut intake, now) = (intake(), Instant::now());
    assert!(intake.take(1, b"{}", now).is_err());
    assert!(intake.take(2, b"\xff\x00", now).is_err());
    let half = [b"[", &body(&[change(0, 1)])[..], b",{}]"].concat();
    assert!(intake.take(3, &half, now).is_err());
    assert_eq!((intake.unsettled(), intake.lines().len()), (0, 0));
    intake.take(4, &body(&[change(0, 1)]), now).expect("a record");
    assert_eq!(intake.written(), [multiple(4)]);
}

#[test]
fn after_a_lost_connection_all_that_was_not_acknowledged_may_come_again() {
    let (mut intake, now) = (intake(), Instant::now());
    take_all(&mut intake, &[1, 2, 4], now);
    intake.disconnected();
    assert_eq!((intake.deadline(), intake.unsettled()), (None, 0));
    take_all(&mut intake, &[1, 2, 3, 4], now);
    assert_eq!(revisions(&intake), [1, 2, 3, 4]);
    assert_eq!(intake.written(), [multiple(4)]);
}

#[test]
fn a_consumer_of_some_records_waits_for_no_other() {
    let (intake, now) = (intake(), Instant::now());
    let mut intake = intake.filtered();
    take_all(&mut intake, &[4, 9, 9, 12], now);
    assert_eq!(revisions(&intake), [4, 9, 12]);
    assert_eq!((intake.deadline(), intake.give_up(now)), (None, vec![]));
    assert_eq!(intake.written(), [multiple(4)]);
}

#[test]
fn gaps_are_counted() {
    let (mut intake, now) = (intake(), Instant::now());
    intake.take(1, &body(&gap(0, 0, 9, 2)), now).expect("records");
    intake.take(2, &body(&[change(0, 10)]), now).expect("a record");
    assert_eq!(intake.counts(), Counts { lines: 5, gaps: 1, lost: 9, repeats: 0 });
}

/// What a publisher sends of one partition, in messages.
fn messages(partition: u16) -> impl Strategy<Value = Vec<Vec<Record>>> {
    let part = (1..6_u64, 1..4_usize, proptest::option::weighted(0.2, (1..4_u64, 0..3_u64)));
    proptest::collection::vec(part, 1..6).prop_map(move |parts| {
        let (mut messages, mut revision) = (Vec::new(), 0);
        for (changes, batch, lost) in parts {
            let records: Vec<_> =
                (1..=changes).map(|next| change(partition, revision + next)).collect();
            messages.extend(records.chunks(batch).map(<[Record]>::to_vec));
            revision += changes;
            if let Some((lost, rows)) = lost {
                messages
                    .extend(gap(partition, revision, lost, rows).into_iter().map(|one| vec![one]));
                revision += lost;
            }
        }
        messages
    })
}

/// What happens next at the queue or to its consumer.
#[derive(Clone, Debug)]
enum Step {
    /// It delivers one of the next few messages, which are those that came back in any order.
    Deliver(proptest::sample::Index),
    /// The lines are written and acknowledged.
    Write,
    /// The lines are written, and the connection breaks before the acknowledgement.
    WriteAndLose,
    /// The connection breaks.
    Lose,
    /// The consumer dies; what was written is there.
    Die,
    /// The publisher sends something a second time.
    Repeat(proptest::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => any::<proptest::sample::Index>().prop_map(Step::Deliver),
        4 => Just(Step::Write),
        1 => Just(Step::WriteAndLose),
        1 => Just(Step::Lose),
        1 => Just(Step::Die),
        2 => any::<proptest::sample::Index>().prop_map(Step::Repeat),
    ];
    proptest::collection::vec(step, 0..150)
}

const PREFETCH: usize = 8;

/// A queue with one consumer, and the file that it writes.
struct World {
    queue: VecDeque<Vec<Record>>,
    /// In the order of delivery, with their tags.
    out: Vec<(u64, Vec<Record>)>,
    sent: Vec<Vec<Record>>,
    intake: Intake,
    file: Vec<u8>,
    next_tag: u64,
    now: Instant,
}

impl World {
    fn new(first: &[Vec<Record>], second: &[Vec<Record>]) -> World {
        let mut queue = VecDeque::new();
        for index in 0..first.len().max(second.len()) {
            queue.extend(first.get(index).cloned());
            queue.extend(second.get(index).cloned());
        }
        let intake = Intake::new(Ledger::new(), PATIENCE, PREFETCH);
        let (out, sent, file) = (Vec::new(), Vec::new(), Vec::new());
        World { queue, out, sent, intake, file, next_tag: 1, now: Instant::now() }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Deliver(which) => self.deliver(which.index(PREFETCH)),
            Step::Write => self.write(true),
            Step::WriteAndLose => {
                self.write(false);
                self.lose();
            }
            Step::Lose => self.lose(),
            Step::Die => {
                let mut ledger = Ledger::new();
                for record in read(&self.file) {
                    assert_eq!(ledger.judge(&record), Verdict::Fresh, "a line is there once");
                    ledger.note(&record);
                }
                self.intake = Intake::new(ledger, PATIENCE, PREFETCH);
                self.lose();
            }
            Step::Repeat(which) if !self.sent.is_empty() => {
                let again = which.get(&self.sent).clone();
                self.queue.push_back(again);
            }
            Step::Repeat(_) => {}
        }
    }

    /// Delivers a message that is at most so far from the front.
    fn deliver(&mut self, skip: usize) {
        if self.out.len() == PREFETCH || self.queue.is_empty() {
            return;
        }
        // Further than the room that is left for what comes before it, and it would be given up.
        let room = (PREFETCH - self.out.len() - 1).min(self.queue.len() - 1);
        let message = self.queue.remove(skip.min(room)).expect("it is in the queue");
        let body = body(&message);
        self.intake.take(self.next_tag, &body, self.now).expect("records");
        self.out.push((self.next_tag, message));
        self.next_tag += 1;
    }

    fn write(&mut self, acknowledge: bool) {
        self.file.extend_from_slice(self.intake.lines());
        let acks = self.intake.written();
        if acknowledge {
            let in_file = read(&self.file);
            for ack in acks {
                let taken = |&(tag, _): &(u64, Vec<Record>)| {
                    tag == ack.tag || ack.multiple && tag < ack.tag
                };
                for (_, message) in self.out.extract_if(.., |out| taken(out)) {
                    for record in &message {
                        assert!(
                            in_file.contains(record),
                            "{record:?} is acknowledged and not there"
                        );
                    }
                    self.sent.push(message);
                }
            }
            assert_eq!(self.out.len(), self.intake.unsettled());
        }
    }

    /// What was not acknowledged is the next that is delivered.
    fn lose(&mut self) {
        self.intake.disconnected();
        for (_, message) in self.out.drain(..).rev() {
            self.queue.push_front(message);
        }
    }
}

proptest! {
    /// Whatever breaks when: the file has each record once, in the order of its partition, and no
    /// delivery is acknowledged before its records are there.
    #[test]
    fn the_file_has_each_record_once(
        first in messages(3),
        second in messages(4),
        steps in steps(),
    ) {
        let mut world = World::new(&first, &second);
        // A partition begins with what is seen of it first.
        world.deliver(0);
        let other = world.queue.iter().position(|message| message[0].partition() == 4);
        let other = world.queue.remove(other.expect("both have messages")).expect("it is there");
        world.queue.push_front(other);
        world.deliver(0);
        world.write(true);
        for step in &steps {
            world.step(step);
        }
        for _ in 0..=world.queue.len() + world.out.len() {
            world.deliver(0);
            world.write(true);
        }
        prop_assert!(world.queue.is_empty() && world.out.is_empty(), "it goes on by itself");
        prop_assert_eq!(world.intake.give_up(world.now + PATIENCE), []);
        let records = read(&world.file);
        for (partition, messages) in [(3, first), (4, second)] {
            let kept: Vec<_> =
                records.iter().filter(|record| record.partition() == partition).cloned().collect();
            prop_assert_eq!(kept, messages.concat());
        }
    }

    #[test]
    fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut intake = intake();
        let taken = intake.take(1, &body, Instant::now());
        prop_assert_eq!(intake.unsettled(), usize::from(taken.is_ok()));
    }
}
