//! The control plane over HTTP, on the admin port: what the other nodes and `flux admin` ask.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;

use super::control::{ClusterHandle, Core};
use super::http::ErrorBody;
use super::operations::{
    Done, MoveRequest, NodeRequest, RebalanceRequest, Refusal, TransferRequest,
};
use super::report::{self, ClusterStatus, NodeReport};

/// The routes below `/cluster/`. What changes something takes JSON, which no page of another site can
/// send without asking first.
pub fn routes(cluster: ClusterHandle) -> Router {
    Router::new()
        .route("/cluster/status", get(status))
        .route("/cluster/nodes", get(nodes))
        .route("/cluster/partitions", get(partitions))
        .route("/cluster/drain", post(drain))
        .route("/cluster/undrain", post(undrain))
        .route("/cluster/move", post(move_replica))
        .route("/cluster/transfer", post(transfer))
        .route("/cluster/rebalance", post(rebalance))
        .route("/cluster/republish", post(republish))
        .with_state(cluster.0)
}

type Node = State<Arc<Core>>;
type Answer = Result<Json<Done>, Refusal>;

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match &self {
            Refusal::Wrong(_) => StatusCode::CONFLICT,
            Refusal::Registry(_) | Refusal::Contended => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::Call(_) => StatusCode::BAD_GATEWAY,
        };
        (status, Json(ErrorBody { error: self.to_string() })).into_response()
    }
}

async fn status(State(core): Node) -> Json<ClusterStatus> {
    let topology = Arc::clone(&core.topology.borrow());
    let answers = report::ask_all(&core, &topology).await;
    Json(report::status(&core, &topology, &answers))
}

async fn nodes(State(core): Node) -> Json<Vec<NodeReport>> {
    let topology = Arc::clone(&core.topology.borrow());
    let answers = report::ask_all(&core, &topology).await;
    Json(report::nodes(&topology, &answers))
}

/// What `GET /cluster/partitions` may ask for.
#[derive(Debug, Deserialize)]
struct Which {
    /// The whole cluster's, not only this node's.
    all: Option<String>,
}

async fn partitions(State(core): Node, Query(which): Query<Which>) -> Response {
    if which.all.is_none() {
        return Json(core.local_partitions().await).into_response();
    }
    let topology = Arc::clone(&core.topology.borrow());
    let answers = report::ask_all(&core, &topology).await;
    let map = topology.map.as_deref();
    Json(map.map_or_else(Vec::new, |map| report::partitions(map, &answers))).into_response()
}

async fn drain(State(core): Node, Json(request): Json<NodeRequest>) -> Answer {
    core.drain(&request).await.map(Json)
}

async fn undrain(State(core): Node, Json(request): Json<NodeRequest>) -> Answer {
    core.undrain(&request).await.map(Json)
}

async fn move_replica(State(core): Node, Json(request): Json<MoveRequest>) -> Answer {
    core.move_replica(&request).await.map(Json)
}

async fn transfer(State(core): Node, Json(request): Json<TransferRequest>) -> Answer {
    core.transfer(&request).await.map(Json)
}

async fn rebalance(State(core): Node, Json(request): Json<RebalanceRequest>) -> Answer {
    core.rebalance(&request).await.map(Json)
}

async fn republish(State(core): Node, Json(_): Json<serde_json::Value>) -> Answer {
    core.republish().await.map(Json)
}
