//! What a publisher counts, for whoever shows it.
//!
//! What this module does not do: name metrics, or keep what the feed already knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use flux_proto::event::Place;
use parking_lot::Mutex;

use crate::trouble::Trouble;

/// Counters and gauges of a publisher. All are of this process.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Records that were given to a connection, repeats included.
    pub(crate) published: AtomicU64,
    pub(crate) confirmed: AtomicU64,
    pub(crate) returned: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) reconnects: AtomicU64,
    pub(crate) gaps: AtomicU64,
    pub(crate) gap_revisions: AtomicU64,
    pub(crate) in_flight_bytes: AtomicU64,
    troubles: [AtomicBool; Trouble::ALL.len()],
    lanes: Mutex<BTreeMap<u16, Arc<LaneMetrics>>>,
}

/// What is known of one partition that is published.
#[derive(Debug)]
pub(crate) struct LaneMetrics {
    term: u64,
    cursor: AtomicU64,
    /// When the oldest change that is read and not confirmed was committed; 0: none, or not known.
    oldest_ms: AtomicU64,
    gaps: AtomicU64,
}

impl LaneMetrics {
    pub(crate) fn has_read(&self, committed_at_ms: u64) {
        self.oldest_ms.store(committed_at_ms, Relaxed);
    }

    pub(crate) fn confirmed(&self, cursor: Place) {
        self.cursor.store(cursor.revision, Relaxed);
        self.oldest_ms.store(0, Relaxed);
    }

    pub(crate) fn gap(&self) {
        self.gaps.fetch_add(1, Relaxed);
    }
}

/// How a partition's publishing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneStatus {
    /// The partition.
    pub partition: u16,
    /// The term in which this node leads it.
    pub term: u64,
    /// Everything up to this revision is confirmed.
    pub cursor: u64,
    /// When the oldest change that is read and not confirmed was committed, in milliseconds since
    /// the Unix epoch.
    pub oldest_ms: Option<u64>,
    /// Gaps that were begun in this term, those begun anew included.
    pub gaps: u64,
}

/// How far behind all partitions together are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Revisions that can be read and are not confirmed.
    pub events: u64,
    /// The age of the oldest change that is not confirmed, in milliseconds; 0 where none is known.
    pub age_ms: u64,
}

impl Metrics {
    /// Records given to the broker, those sent again included: `cdc_published_total`.
    pub fn published(&self) -> u64 {
        self.published.load(Relaxed)
    }

    /// Records confirmed by the broker: `cdc_confirmed_total`.
    pub fn confirmed(&self) -> u64 {
        self.confirmed.load(Relaxed)
    }

    /// Messages that no queue took: `cdc_returned_total`.
    pub fn returned(&self) -> u64 {
        self.returned.load(Relaxed)
    }

    /// Messages that the broker refused: `cdc_nacked_total`.
    pub fn nacked(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    /// Connections made after the first one: `cdc_reconnects_total`.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Relaxed)
    }

    /// Gaps begun, those begun anew included: `cdc_gaps_total`.
    pub fn gaps(&self) -> u64 {
        self.gaps.load(Relaxed)
    }

    /// Revisions in those gaps: `cdc_gap_revisions_total`.
    pub fn gap_revisions(&self) -> u64 {
        self.gap_revisions.load(Relaxed)
    }

    /// Bytes of changes that are read and not confirmed: `cdc_in_flight_bytes`.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.load(Relaxed)
    }

    /// Whether something is wrong now: `cdc_trouble{kind}`.
    pub fn has_trouble(&self, trouble: Trouble) -> bool {
        self.troubles[trouble as usize].load(Relaxed)
    }

    pub(crate) fn set_trouble(&self, trouble: Trouble, is_active: bool) {
        self.troubles[trouble as usize].store(is_active, Relaxed);
    }

    /// The partitions that are published by this node, in their order.
    pub fn lanes(&self) -> Vec<LaneStatus> {
        let lanes = self.lanes.lock();
        let status = |(&partition, lane): (&u16, &Arc<LaneMetrics>)| LaneStatus {
            partition,
            term: lane.term,
            cursor: lane.cursor.load(Relaxed),
            oldest_ms: Some(lane.oldest_ms.load(Relaxed)).filter(|&at| at > 0),
            gaps: lane.gaps.load(Relaxed),
        };
        lanes.iter().map(status).collect()
    }

    /// `cdc_lag_events` and `cdc_lag_seconds`, at a time in milliseconds since the Unix epoch. `newest` is the
    /// newest revision of a partition that can be read.
    pub fn lag(&self, newest: impl Fn(u16) -> Option<u64>, now_ms: u64) -> Lag {
        let mut lag = Lag::default();
        for lane in self.lanes() {
            let newest = newest(lane.partition).unwrap_or(0);
            lag.events += newest.saturating_sub(lane.cursor);
            let age_ms = lane.oldest_ms.map_or(0, |at| now_ms.saturating_sub(at));
            lag.age_ms = lag.age_ms.max(age_ms);
        }
        lag
    }

    pub(crate) fn begin_lane(&self, partition: u16, term: u64, cursor: Place) -> Arc<LaneMetrics> {
        let lane = Arc::new(LaneMetrics {
            term,
            cursor: AtomicU64::new(cursor.revision),
            oldest_ms: AtomicU64::new(0),
            gaps: AtomicU64::new(0),
        });
        self.lanes.lock().insert(partition, lane.clone());
        lane
    }

    pub(crate) fn end_lane(&self, partition: u16) {
        self.lanes.lock().remove(&partition);
    }
}
