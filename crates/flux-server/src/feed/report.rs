//! How change capture stands, for `/metrics` and `/cdc` of the admin port.

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use flux_cdc::Trouble;
use serde::Serialize;
use std::sync::Arc;

use crate::clock::unix_ms;
use crate::shared::Shared;

/// A metric: its name, what it is, its help and its value.
pub(crate) type Metric = (&'static str, &'static str, &'static str, u64);

/// What all followers of changes together have and need.
pub(crate) fn metrics(shared: &Shared) -> Vec<Metric> {
    let ring_bytes = shared.views.iter().map(|view| view.feed.ring_bytes() as u64).sum();
    let mut all = vec![("feed_ring_bytes", "gauge", "Memory of recent changes.", ring_bytes)];
    let Some(metrics) = shared.published.get() else { return all };
    let lag = metrics.lag(|partition| newest(shared, partition), unix_ms());
    all.extend([
        (
            "cdc_published_total",
            "counter",
            "Records given to the broker, repeats included.",
            metrics.published(),
        ),
        (
            "cdc_confirmed_total",
            "counter",
            "Records that the broker confirmed.",
            metrics.confirmed(),
        ),
        ("cdc_returned_total", "counter", "Messages that no queue took.", metrics.returned()),
        ("cdc_nacked_total", "counter", "Messages that the broker refused.", metrics.nacked()),
        (
            "cdc_reconnects_total",
            "counter",
            "Connections to the broker after the first.",
            metrics.reconnects(),
        ),
        (
            "cdc_gaps_total",
            "counter",
            "Gaps begun: changes were gone before they were published.",
            metrics.gaps(),
        ),
        ("cdc_gap_revisions_total", "counter", "Changes in those gaps.", metrics.gap_revisions()),
        (
            "cdc_in_flight_bytes",
            "gauge",
            "Changes read and not confirmed.",
            metrics.in_flight_bytes(),
        ),
        (
            "cdc_lag_events",
            "gauge",
            "Changes led here that the broker has not confirmed.",
            lag.events,
        ),
        ("cdc_lag_seconds", "gauge", "Age of the oldest of them.", lag.age_ms / 1000),
    ]);
    all
}

/// What is wrong with publishing, each kind with whether it is so now. None where nothing is published.
pub(crate) fn troubles(shared: &Shared) -> Vec<(&'static str, bool)> {
    let Some(metrics) = shared.published.get() else { return Vec::new() };
    Trouble::ALL.iter().map(|&trouble| (trouble.name(), metrics.has_trouble(trouble))).collect()
}

fn newest(shared: &Shared, partition: u16) -> Option<u64> {
    Some(shared.views.get(usize::from(partition))?.standing.place()?.revision)
}

/// `GET /cdc`.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    Router::new().route("/cdc", get(report)).with_state(shared)
}

#[derive(Serialize)]
struct Report {
    /// A broker is set.
    publishes: bool,
    /// What is wrong now.
    troubles: Vec<&'static str>,
    lag_events: u64,
    lag_ms: u64,
    /// What is led and published here.
    partitions: Vec<Partition>,
}

#[derive(Serialize)]
struct Partition {
    partition: u16,
    term: u64,
    /// Everything up to this revision is confirmed, here; and as the group has it.
    confirmed: u64,
    cursor: u64,
    newest: u64,
    lag_events: u64,
    /// Gaps that were begun since this node leads it.
    gaps: u64,
}

async fn report(State(shared): State<Arc<Shared>>) -> Json<Report> {
    let Some(metrics) = shared.published.get() else {
        return Json(Report {
            publishes: false,
            troubles: Vec::new(),
            lag_events: 0,
            lag_ms: 0,
            partitions: Vec::new(),
        });
    };
    let lag = metrics.lag(|partition| newest(&shared, partition), unix_ms());
    let partitions = metrics.lanes().into_iter().map(|lane| {
        let newest = newest(&shared, lane.partition).unwrap_or(0);
        Partition {
            partition: lane.partition,
            term: lane.term,
            confirmed: lane.cursor,
            cursor: shared.views[usize::from(lane.partition)].feed.cursor().revision,
            newest,
            lag_events: newest.saturating_sub(lane.cursor),
            gaps: lane.gaps,
        }
    });
    let troubles = troubles(&shared);
    Json(Report {
        publishes: true,
        troubles: troubles.into_iter().filter(|(_, is_so)| *is_so).map(|(name, _)| name).collect(),
        lag_events: lag.events,
        lag_ms: lag.age_ms,
        partitions: partitions.collect(),
    })
}
