//! Random writes, watchers that take what they are shown now and then and come again, and changes that are
//! forgotten: each watcher is shown every change that it asks for once, in order, or a gap and the values.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const PARTITIONS: u16 = 2;
const KEYS: [&str; 6] = ["a", "ab", "b", "ba", "c", "abc"];

#[derive(Clone, Debug)]
enum Act {
    Set(usize),
    Remove(usize),
    /// Many changes at once, more than a watcher's buffer takes.
    Burst(usize, u16),
    /// All but the last changes are kept nowhere.
    Forget(u16, u64),
    Replace(u16),
    /// A watcher takes so many messages, as far as there are any.
    Take(usize, usize),
    /// A watcher is cut off and resumes.
    Resume(usize),
    Wait(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => (0..KEYS.len()).prop_map(Act::Set),
        3 => (0..KEYS.len()).prop_map(Act::Remove),
        1 => (0..KEYS.len(), 1..40u16).prop_map(|(key, count)| Act::Burst(key, count)),
        1 => (0..PARTITIONS, 0..5u64).prop_map(|(partition, kept)| Act::Forget(partition, kept)),
        1 => (0..PARTITIONS).prop_map(Act::Replace),
        6 => (0..WATCHERS, 1..12usize).prop_map(|(who, count)| Act::Take(who, count)),
        1 => (0..WATCHERS).prop_map(Act::Resume),
        2 => (0..4000u64).prop_map(Act::Wait),
    ];
    proptest::collection::vec(act, 1..120)
}

const WATCHERS: usize = 4;

/// What a watcher knows and has been promised.
struct Watcher {
    keys: Keys,
    watching: Watching,
    last: Option<Begin>,
    /// By partition, up to where it knows what was changed; none where values come first.
    known: BTreeMap<u16, Option<u64>>,
    values: BTreeMap<Bytes, u64>,
    /// The rows of a gap.
    rows: BTreeMap<u16, BTreeMap<Bytes, u64>>,
}

/// All changes of each partition, in order.
type Changes = Vec<Vec<Event>>;

impl Watcher {
    fn new(rig: &Rig, keys: Keys, begin: &Begin) -> Watcher {
        let watching = rig.open(keys.clone(), begin.clone());
        let of = keys.partitions(rig.watches.partitions).into_iter();
        let known = of.map(|partition| (partition, (*begin == Begin::Now).then_some(0))).collect();
        let (values, rows) = (BTreeMap::new(), BTreeMap::new());
        Watcher { keys, watching, last: None, known, values, rows }
    }

    /// Comes again with its last token, or as at first where it has none.
    fn resume(&mut self, rig: &Rig) {
        if let Some(last) = &self.last {
            self.watching = rig.open(self.keys.clone(), last.clone());
        }
    }

    /// Takes a message, if one comes within a time.
    async fn take(&mut self, rig: &Rig, changes: &Changes, within: Duration) -> bool {
        let Ok(shown) = timeout(within, self.watching.next()).await else { return false };
        let shown = match shown.expect("an end has a reason") {
            Ok(shown) => shown,
            Err(Ended::TooSlow) => {
                self.resume(rig);
                return true;
            }
            Err(ended) => panic!("{ended}"),
        };
        self.last = Some(token(&shown));
        match &shown.what {
            What::Started => {}
            What::KeepAlive => self.has_all(&positions(&shown), changes),
            What::Record(record) => self.is_told(record, changes),
        }
        for (partition, at) in positions(&shown) {
            let known = self.known[&partition].expect("a place only where values are known");
            assert!(at >= known, "the token of partition {partition} is old: {at} < {known}");
        }
        !matches!(shown.what, What::KeepAlive)
    }

    /// No change that it asks for is between what it knows and these places.
    fn has_all(&mut self, positions: &[(u16, u64)], changes: &Changes) {
        for &(partition, at) in positions {
            self.misses_nothing(partition, at, changes);
        }
    }

    fn misses_nothing(&mut self, partition: u16, up_to: u64, changes: &Changes) {
        let known = self.known.get_mut(&partition).expect("a partition that it watches");
        let after = known.expect("changes only where values are known");
        let between = &changes[usize::from(partition)][after as usize..up_to as usize];
        let missed = between.iter().find(|event| self.keys.matches(&event.key));
        assert_eq!(missed, None, "missed by {:?}, which is shown {up_to}", self.keys);
        *known = Some(up_to);
    }

    fn is_told(&mut self, record: &Record, changes: &Changes) {
        let partition = record.partition();
        match record {
            Record::Change(event) => {
                assert_eq!(event, &changes[usize::from(partition)][event.revision as usize - 1]);
                assert!(self.keys.matches(&event.key));
                assert!(self.known[&partition] < Some(event.revision), "{event:?} comes again");
                self.misses_nothing(partition, event.revision - 1, changes);
                self.known.insert(partition, Some(event.revision));
                match event.op {
                    Op::Set => self.values.insert(event.key.clone(), event.version),
                    Op::Delete | Op::Expire => self.values.remove(&event.key),
                };
            }
            Record::GapBegin(gap) => {
                assert!(*gap.lost.end() <= gap.at.revision);
                if self.known[&partition].is_some() {
                    self.misses_nothing(partition, gap.lost.start() - 1, changes);
                }
                self.known.insert(partition, None);
                self.rows.insert(partition, BTreeMap::new());
            }
            Record::Row { number, event, .. } => {
                let rows = self.rows.get_mut(&partition).expect("rows are in a gap");
                assert!(self.keys.matches(&event.key));
                assert_eq!(rows.insert(event.key.clone(), event.version), None, "a row twice");
                assert_eq!(rows.len() as u64, *number);
            }
            Record::GapEnd { gap, rows: count } => {
                let rows = self.rows.remove(&partition).expect("a gap that has begun");
                assert_eq!(rows.len() as u64, *count);
                assert!(rows.values().all(|&version| version <= gap.at));
                let of = Partitions::new(PARTITIONS).expect("a power of two");
                self.values.retain(|key, _| of.of(key).0 != partition);
                self.values.extend(rows);
                self.known.insert(partition, Some(gap.at));
            }
        }
    }
}

async fn run(acts: Vec<Act>) {
    let rig = Rig::new(PARTITIONS, Room { bytes: 1 << 20, items: 8 });
    let mut changes: Changes = vec![Vec::new(); usize::from(PARTITIONS)];
    let mut watchers = [
        Watcher::new(&rig, key("ab"), &Begin::Now),
        Watcher::new(&rig, prefix("a"), &Begin::Snapshot),
        Watcher::new(&rig, prefix(""), &Begin::Now),
        Watcher::new(&rig, prefix(""), &Begin::Snapshot),
    ];
    // From now on is from before the first change, once it has begun.
    for watcher in &mut watchers {
        assert!(watcher.take(&rig, &changes, Duration::from_secs(1)).await);
    }
    for act in acts {
        match act {
            Act::Set(which) => write(&rig, &mut changes, which, Op::Set),
            Act::Remove(which) => write(&rig, &mut changes, which, Op::Delete),
            Act::Burst(which, count) => {
                (0..count).for_each(|_| write(&rig, &mut changes, which, Op::Set));
            }
            Act::Forget(partition, kept) => {
                let newest = changes[usize::from(partition)].len() as u64;
                rig.feed.forget_to(partition, newest.saturating_sub(kept));
            }
            Act::Replace(partition) => rig.feed.replace_table(partition),
            Act::Take(who, count) => {
                for _ in 0..count {
                    watchers[who].take(&rig, &changes, Duration::from_millis(1)).await;
                }
            }
            Act::Resume(who) => watchers[who].resume(&rig),
            Act::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
    }
    let live = |keys: &Keys| -> BTreeMap<Bytes, u64> {
        let mut live = BTreeMap::new();
        for event in changes.iter().flatten().filter(|event| keys.matches(&event.key)) {
            match event.op {
                Op::Set => live.insert(event.key.clone(), event.version),
                Op::Delete | Op::Expire => live.remove(&event.key),
            };
        }
        live
    };
    for watcher in &mut watchers {
        // The first sign of life may be from before the last change.
        let mut silent = 0;
        while silent < 3 {
            let is_told = watcher.take(&rig, &changes, Duration::from_secs(60)).await;
            silent = if is_told { 0 } else { silent + 1 };
        }
        let newest = changes.iter().map(|changes| changes.len() as u64);
        let newest: BTreeMap<u16, Option<u64>> = (0..).zip(newest.map(Some)).collect();
        for (partition, known) in &watcher.known {
            assert_eq!(known, &newest[partition], "{:?} knows the newest", watcher.keys);
        }
        assert_eq!(watcher.values, live(&watcher.keys), "{:?}", watcher.keys);
    }
}

fn write(rig: &Rig, changes: &mut Changes, which: usize, op: Op) {
    let key = KEYS[which];
    let PartitionId(partition) = rig.watches.partitions.of(key.as_bytes());
    let changes = &mut changes[usize::from(partition)];
    let previous = changes.iter().rfind(|event| event.key == key.as_bytes());
    let previous_version = previous.map_or(0, |event| event.version);
    let next = changes.len() as u64 + 1;
    let revision = match op {
        Op::Set => Some(rig.set(key, "v")),
        Op::Delete | Op::Expire => rig.remove(op, key),
    };
    let Some(revision) = revision else { return };
    assert_eq!(revision, next);
    let is_set = op == Op::Set;
    changes.push(Event {
        op,
        key: Bytes::from_static(key.as_bytes()),
        value: is_set.then(|| Bytes::from_static(b"v")),
        partition,
        revision,
        version: if is_set { revision } else { 0 },
        previous_version,
        previous_value: None,
        expires_at_ms: None,
        committed_at_ms: 5,
        trace: None,
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn each_watcher_is_shown_each_change_once_in_order(acts in acts()) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true);
        runtime.build().expect("a runtime").block_on(run(acts));
    }
}
