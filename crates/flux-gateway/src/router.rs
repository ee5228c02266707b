//! The routes, and every layer in the order a request passes it.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::error_handling::HandleErrorLayer;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{BoxError, Json, Router};
use flux_client::{Client, Code};
use serde::Serialize;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;

use crate::error::ApiError;
use crate::kv::{self, Api};
use crate::memory::Memory;
use crate::options::Options;
use crate::watch::{self, Watches};

/// The gateway as a service. The limits that concern connections are those of `serve`.
pub fn router(client: Client, options: &Options) -> Router {
    let memory = Memory::new(options.max_body_memory, options.body_timeout);
    // Watches last: they have a limit of their own, and take no request's place.
    let watch = Router::new()
        .route("/api/v1/watch", get(watch::watch))
        .with_state(Watches::new(options, memory.clone()));
    let kv = Router::new()
        .route("/api/v1/kv", get(kv::get).post(kv::set).delete(kv::delete))
        .with_state(Api { client, memory });

    // From the outside in. A request that finds no room is refused rather than kept waiting.
    let layers = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(no_room))
        .layer(LoadShedLayer::new())
        .layer(GlobalConcurrencyLimitLayer::new(options.max_requests));

    // Health passes no layer: it must answer while everything else is refused.
    kv.layer(layers)
        .merge(watch)
        .route("/health", get(health))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    /// Seconds since the Unix epoch.
    time: u64,
}

async fn health() -> Json<Health> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    Json(Health { status: "ok", time })
}

async fn no_room(_: BoxError) -> ApiError {
    ApiError::overloaded("too many requests are under way; try again later")
}

async fn unknown_route(request: Request) -> ApiError {
    let path = crate::form::shorten(request.uri().path());
    ApiError::new(Code::NotFound, format!("no such route: {path}"))
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not allowed here; see the Allow header", request.method());
    ApiError::http(StatusCode::METHOD_NOT_ALLOWED, Code::Unsupported, message)
}
