//! Reads a worker's log back for those who are behind what is in memory.
//!
//! The log is shared by all partitions of the worker. One pass over it serves all who wait, so that many
//! partitions that catch up together do not each read all of it. What is committed is decided by
//! [`History`], as recovery does. Nothing is kept from being trimmed here: see `partition`.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;

use flux_core::Revision;
use flux_core::effect::Effects;
use flux_core::feed::Committed;
use flux_core::replica::{History, Position, StateRecord};
use flux_log::{LogError, LogReader, Lsn, Record, Scanned, State};
use tokio::sync::{mpsc, oneshot};

use super::partition::Older;
use crate::shared::Shared;

/// Readers that may wait for the same log; another one waits for its place.
const MAX_WAITING: usize = 256;

/// What a reader finds in the log.
pub(super) enum Read {
    /// Entries with changes, dense, beginning with the one that holds `after + 1`.
    Entries(Arc<[Older]>),
    /// The log does not have `after + 1`. It goes on behind this revision, if it has later ones.
    Missing { until: Option<Revision> },
}

/// How often a search begins again because the log was trimmed meanwhile, which is seldom and then no wonder.
const MAX_TRIMS: u32 = 8;

struct Question {
    partition: u16,
    after: Revision,
    /// The batch of the log to begin with, if that is known.
    from: Option<Lsn>,
    bytes: usize,
    answer: oneshot::Sender<Result<Read, String>>,
}

/// The thread, as those who ask have it.
#[derive(Debug)]
pub(super) struct CatchUp {
    questions: Option<mpsc::Sender<Question>>,
    thread: Option<JoinHandle<()>>,
}

impl CatchUp {
    /// Starts the thread, which ends when this is dropped.
    pub(super) fn start(
        worker: u16,
        reader: LogReader,
        shared: Arc<Shared>,
    ) -> io::Result<CatchUp> {
        let (questions, waiting) = mpsc::channel(MAX_WAITING);
        let span = tracing::Span::current();
        let run = move || span.in_scope(|| answer_all(waiting, &reader, &shared));
        let thread = std::thread::Builder::new().name(format!("flux-feed-{worker}")).spawn(run)?;
        Ok(CatchUp { questions: Some(questions), thread: Some(thread) })
    }

    /// What the log has after a revision, about so many bytes. `None` if the node is stopping.
    pub(super) async fn read(
        &self,
        partition: u16,
        after: Revision,
        from: Option<Lsn>,
        bytes: usize,
    ) -> Option<Result<Read, String>> {
        let (answer, answered) = oneshot::channel();
        let question = Question { partition, after, from, bytes, answer };
        self.questions.as_ref()?.send(question).await.ok()?;
        answered.await.ok()
    }
}

impl Drop for CatchUp {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            // Its panic, if any, has been reported on its own.
            let _ = thread.join();
        }
    }
}

/// A question under way.
struct Search {
    partition: u16,
    after: Revision,
    from: Lsn,
    bytes: usize,
    history: History,
    entries: Vec<Older>,
    found_bytes: usize,
    /// Where it wanted to begin was trimmed, so often.
    trims: u32,
    /// Why it ends before it has all that it looks for.
    error: Option<String>,
    /// Behind this the log goes on after a hole.
    hole_until: Option<Revision>,
    answer: oneshot::Sender<Result<Read, String>>,
}

fn answer_all(mut waiting: mpsc::Receiver<Question>, reader: &LogReader, shared: &Shared) {
    let mut questions = Vec::with_capacity(MAX_WAITING);
    while waiting.blocking_recv_many(&mut questions, MAX_WAITING) > 0 {
        let mut searches = Vec::with_capacity(questions.len());
        for question in questions.drain(..) {
            let Question { partition, after, from, bytes, answer } = question;
            let oldest = reader.segments().first().map_or(0, |segment| segment.base);
            let from = match from.filter(|from| *from >= oldest) {
                Some(from) => Ok(from),
                None => begin_of(reader, partition, after),
            };
            match from {
                Ok(from) => searches.push(Search::new(partition, after, from, bytes, answer)),
                Err(error) => drop(answer.send(Err(error.to_string()))),
            }
        }
        searches.sort_unstable_by_key(|one| one.from);
        while !searches.is_empty() {
            shared.stats.feed_log_reads.add(1);
            pass(reader, shared, &mut searches);
        }
    }
}

/// Reads on from where the first of these wants to begin, until it and all whom it has met have what they
/// need.
fn pass(reader: &LogReader, shared: &Shared, searches: &mut Vec<Search>) {
    let begin = searches[0].from;
    // Looked at before the scan finds the end: what was applied then is in the log.
    let applied: BTreeMap<u16, u64> = searches
        .iter()
        .map(|one| (one.partition, shared.views[usize::from(one.partition)].standing.applied()))
        .collect();
    let mut met = 0;
    let mut bytes = 0;
    let scanned = reader.scan(begin, &mut |lsn, record| {
        met = met.max(searches.iter().take_while(|one| one.from <= lsn).count());
        bytes += record_bytes(&record);
        let mut at = 0;
        while at < met {
            if searches[at].take(lsn, &record) {
                searches.remove(at).finish();
                met -= 1;
            } else {
                at += 1;
            }
        }
        if met == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    shared.stats.feed_log_read_bytes.add(bytes as u64);
    match scanned {
        Ok(Scanned::Stopped(_)) => {}
        Ok(Scanned::End(_)) => {
            for mut search in searches.drain(..) {
                search.history.release(applied[&search.partition]);
                search.collect();
                search.finish();
            }
        }
        Ok(Scanned::Gone { .. }) => {
            let again: Vec<Search> = searches.drain(..met.max(1)).collect();
            searches.extend(again.into_iter().filter_map(|search| search.begin_again(reader)));
            searches.sort_unstable_by_key(|one| one.from);
        }
        Err(error) => {
            for search in searches.drain(..met.max(1)) {
                search.fail(error.to_string());
            }
        }
    }
}

fn record_bytes(record: &Record<'_>) -> usize {
    match record {
        Record::Entry(entry) => entry.payload.len(),
        Record::State(_) => 0,
    }
}

impl Search {
    fn new(
        partition: u16,
        after: Revision,
        from: Lsn,
        bytes: usize,
        answer: oneshot::Sender<Result<Read, String>>,
    ) -> Search {
        Search {
            partition,
            after,
            from,
            bytes,
            history: History::new(0),
            entries: Vec::new(),
            found_bytes: 0,
            trims: 0,
            error: None,
            hole_until: None,
            answer,
        }
    }

    /// What it was reading was trimmed. Who has found something goes on from there by asking again, for others
    /// the log may still have it, further on.
    fn begin_again(self, reader: &LogReader) -> Option<Search> {
        let Search { partition, after, bytes, trims, .. } = self;
        if !self.entries.is_empty() || trims >= MAX_TRIMS {
            self.finish();
            return None;
        }
        match begin_of(reader, partition, after) {
            Ok(from) => {
                let again = Search::new(partition, after, from, bytes, self.answer);
                Some(Search { trims: trims + 1, ..again })
            }
            Err(error) => {
                self.fail(error.to_string());
                None
            }
        }
    }

    /// Takes a record. Whether nothing more is needed.
    fn take(&mut self, lsn: Lsn, record: &Record<'_>) -> bool {
        if self.answer.is_closed() {
            return true;
        }
        match record {
            Record::State(state) if state.partition == self.partition => {
                let &State { replica, start, term, vote, .. } = state;
                self.history.state(&StateRecord { replica, start, term, vote });
            }
            Record::Entry(entry) if entry.partition == self.partition => {
                let position = Position { term: entry.term, index: entry.index };
                let (commit, entry_type, payload) = (entry.commit, entry.entry_type, entry.payload);
                if let Err(error) = self.history.entry(position, commit, entry_type, payload, lsn) {
                    return self.breaks_off(format!("entry {position:?}: {error}"));
                }
            }
            _ => return false,
        }
        self.collect()
    }

    /// Takes what is known to be committed. Whether nothing more is needed: there is enough, or what was
    /// looked for is not here.
    fn collect(&mut self) -> bool {
        while let Some((entry, lsn)) = self.history.pop() {
            let index = entry.index;
            let entry = match Committed::read(entry) {
                Ok(Some(entry)) => entry,
                Ok(None) => continue,
                Err(error) => {
                    return self
                        .breaks_off(format!("the entry at index {index} is no batch: {error}"));
                }
            };
            let expected = self.entries.last().map_or(self.after + 1, |last| last.entry.last + 1);
            if entry.last < expected {
                continue;
            }
            if entry.first > expected {
                self.hole_until = Some(entry.first - 1);
                return true;
            }
            self.found_bytes += entry.payload.len();
            self.entries.push(Older { entry: Arc::new(entry), lsn });
            if self.found_bytes >= self.bytes {
                return true;
            }
        }
        false
    }

    /// What comes here is none of what was written: that is said, and not that nothing is there.
    fn breaks_off(&mut self, error: String) -> bool {
        self.error = Some(error);
        true
    }

    fn finish(self) {
        let Search { entries, error, hole_until, answer, .. } = self;
        // Who asked may have given up.
        let _ = answer.send(match (entries.is_empty(), error) {
            (false, _) => Ok(Read::Entries(entries.into())),
            (true, None) => Ok(Read::Missing { until: hole_until }),
            (true, Some(error)) => Err(error),
        });
    }

    fn fail(self, error: String) {
        Search { error: Some(error), ..self }.finish();
    }
}

/// A segment's beginning from which on the log has, for sure, all that it has of a partition after a revision.
///
/// Entries that come behind one that is committed have later revisions. So that any segment will do whose first
/// entry of the partition is not behind what is looked for; the newest of them is the least to read.
fn begin_of(reader: &LogReader, partition: u16, after: Revision) -> Result<Lsn, LogError> {
    for _ in 0..MAX_TRIMS {
        if let Some(begin) = search_begin(reader, partition, after)? {
            return Ok(begin);
        }
    }
    Ok(reader.segments().first().map_or(0, |segment| segment.base))
}

/// The same; none if a segment that it looks into is trimmed meanwhile.
fn search_begin(
    reader: &LogReader,
    partition: u16,
    after: Revision,
) -> Result<Option<Lsn>, LogError> {
    let segments = reader.segments();
    let has_some = |highest: &Option<Vec<(u16, u64)>>| {
        highest.as_ref().is_none_or(|all| all.iter().any(|(one, _)| *one == partition))
    };
    let bases: Vec<Lsn> = segments
        .iter()
        .filter(|segment| has_some(&segment.highest))
        .map(|segment| segment.base)
        .collect();
    let (mut low, mut high) = (0, bases.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let Some(first) = first_revision(reader, partition, bases[middle])? else {
            return Ok(None);
        };
        match first {
            Some(first) if first <= after + 1 => low = middle + 1,
            _ => high = middle,
        }
    }
    let oldest = segments.first().map_or(0, |segment| segment.base);
    Ok(Some(low.checked_sub(1).map_or(oldest, |at| bases[at])))
}

/// The first revision of a partition from the beginning of a segment on, if it has one. Nothing if the segment is
/// gone.
fn first_revision(
    reader: &LogReader,
    partition: u16,
    from: Lsn,
) -> Result<Option<Option<Revision>>, LogError> {
    let mut first = None;
    let scanned = reader.scan(from, &mut |_, record| match record {
        Record::Entry(entry) if entry.partition == partition => {
            let batch = Effects::new(entry.payload).ok();
            first = batch.map(|effects| effects.next_revision()).filter(|first| *first > 0);
            if first.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        _ => ControlFlow::Continue(()),
    })?;
    Ok((!matches!(scanned, Scanned::Gone { .. })).then_some(first))
}
