//! The admin port: `/health` (the process lives), `/ready` (it serves) and `/metrics` (Prometheus).

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::cluster::{RECOVERING, Waiting};
use crate::feed::report;
use crate::shared::Shared;

/// Set once the node serves.
type Node = Arc<OnceLock<Arc<Shared>>>;

/// What is answered where there is nothing; by it `flux admin` knows a node from other servers.
pub(crate) const UNKNOWN_PATH: &str =
    "there is /health, /ready, /metrics and /cdc, and in a cluster /cluster\n";

/// A node that serves or will.
#[derive(Clone, Debug)]
struct Starting {
    node: Node,
    waiting: Waiting,
}

/// Serves until `stopping` says so. `routes` is set once the node has started.
pub(crate) async fn serve(
    listener: TcpListener,
    node: Node,
    waiting: Waiting,
    routes: Arc<OnceLock<Router>>,
    mut stopping: watch::Receiver<bool>,
) {
    let state = Starting { node, waiting };
    let starting = state.clone();
    let unknown = async || (StatusCode::NOT_FOUND, UNKNOWN_PATH);
    let others = async move |request: Request| match routes.get() {
        Some(routes) => routes.clone().fallback(unknown).oneshot(request).await.into_response(),
        None => {
            let body = axum::Json(serde_json::json!({ "error": starting.waiting.reason() }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    };
    let router = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .fallback(others)
        .with_state(state);
    let stopped = async move {
        // An error means that the node is gone, which ends this too.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
        tracing::error!(%error, "the admin server ended");
    }
}

async fn health() -> &'static str {
    "ok\n"
}

async fn ready(State(starting): State<Starting>) -> (StatusCode, String) {
    let Some(shared) = starting.node.get() else {
        let what = starting.waiting.what();
        let what = what.as_deref().unwrap_or(RECOVERING);
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n"));
    };
    let failure = shared.failure.lock().clone();
    if let Some(failure) = failure {
        let text = format!("the log failed, writes are refused: {failure}\n");
        return (StatusCode::SERVICE_UNAVAILABLE, text);
    }
    // A node that is about to stop says so while it hands over what it leads.
    if let Some(what) = starting.waiting.what() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n"));
    }
    (StatusCode::OK, "ready\n".to_owned())
}

async fn metrics(State(starting): State<Starting>) -> impl IntoResponse {
    let text = starting.node.get().map(|shared| exposition(shared)).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// The node's metrics in Prometheus's text format.
fn exposition(shared: &Shared) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: u64| {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "# HELP flux_{name} {help}\n# TYPE flux_{name} {kind}\nflux_{name} {value}\n"
        );
    };
    for (name, help, value) in shared.stats.iter() {
        metric(&format!("{name}_total"), "counter", help, value);
    }
    let now_us = crate::clock::monotonic_us();
    let serving = shared.views.iter().filter(|view| view.standing.may_serve(now_us)).count();
    let gauges = [
        ("keys", "Keys held.", shared.keys() as u64),
        ("volatile_keys", "Keys that expire.", shared.volatile_keys() as u64),
        ("memory_bytes", "Memory of keys and values.", shared.memory.used()),
        ("memory_limit_bytes", "The setting max_memory; 0 is no limit.", shared.memory.limit()),
        (
            "connections",
            "Open connections on the data port.",
            shared.connections.load(Ordering::Relaxed) as u64,
        ),
        ("log_size_bytes", "Bytes of the log on disk.", shared.log_bytes.load(Ordering::Relaxed)),
        (
            "log_pinned_bytes",
            "Those of them that are kept for nobody but those who follow changes.",
            shared.log_pinned_bytes.load(Ordering::Relaxed),
        ),
        ("watchers", "Open watches.", shared.watchers.load(Ordering::Relaxed) as u64),
        ("partitions", "Partitions of this node.", shared.views.len() as u64),
        ("partitions_serving", "Partitions that this node leads and serves.", serving as u64),
        ("uptime_seconds", "Time since the node served first.", shared.started.elapsed().as_secs()),
    ];
    for (name, help, value) in gauges {
        metric(name, "gauge", help, value);
    }
    for (name, kind, help, value) in report::metrics(shared) {
        metric(name, kind, help, value);
    }
    let troubles = report::troubles(shared);
    if !troubles.is_empty() {
        text.push_str("# HELP flux_cdc_trouble Whether this is wrong with publishing.\n# TYPE flux_cdc_trouble gauge\n");
    }
    for (name, is_so) in troubles {
        let _ = writeln!(text, "flux_cdc_trouble{{kind=\"{name}\"}} {}", u8::from(is_so));
    }
    text
}
