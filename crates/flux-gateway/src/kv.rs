//! The key-value API: set, get and delete of one key. The trace context of a write is handed on.

use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flux_client::{Client, Code, Condition, Expiry, SetOptions, TRACEPARENT, TraceContext};
use serde::Serialize;

use crate::error::ApiError;
use crate::input::{SetInput, key_of_query};
use crate::memory::Memory;

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) client: Client,
    pub(crate) memory: Memory,
}

impl Api {
    /// The client for a write with these headers: it tells the node the trace that they name, if they do.
    fn writer(&self, headers: &HeaderMap) -> Client {
        let values = headers.get_all(TRACEPARENT).iter().map(HeaderValue::as_bytes);
        match TraceContext::of_headers(values) {
            Some(trace) => self.client.with_trace(trace),
            None => self.client.clone(),
        }
    }
}

#[derive(Serialize)]
pub(crate) struct Done {
    success: bool,
}

#[derive(Serialize)]
struct Lookup<'a> {
    value: &'a str,
    found: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
}

/// `POST /api/v1/kv`
pub(crate) async fn set(
    State(api): State<Api>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Json<Done>, ApiError> {
    if query.is_some_and(|query| !query.is_empty()) {
        return Err(ApiError::invalid("the fields belong in the body, not in the query string"));
    }
    let (parts, body) = request.into_parts();
    let format = BodyFormat::of(&parts.headers)?;
    // The share is held until the answer: the value takes no more than the body did.
    let (bytes, _share) = api.memory.receive(body).await?;
    let input = match format {
        BodyFormat::Json => SetInput::from_json(&bytes),
        BodyFormat::Form => SetInput::from_form(&bytes),
    }?;
    drop(bytes);
    let expiry = input.ttl_s.map_or(Expiry::Never, |ttl_s| Expiry::In(ttl_s * 1000));
    let options = SetOptions { expiry, ..SetOptions::default() };
    let client = api.writer(&parts.headers);
    client.set(input.key.as_bytes(), input.value.as_bytes(), options).await?;
    Ok(Json(Done { success: true }))
}

/// `GET /api/v1/kv?key=`
pub(crate) async fn get(
    State(api): State<Api>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let key = key_of_query(query.as_deref())?;
    let Some(value) = api.client.get(key.as_bytes()).await? else {
        let absent = Lookup { value: "", found: false, encoding: None };
        return Ok((StatusCode::NOT_FOUND, Json(absent)).into_response());
    };
    // Other protocols may have written any bytes.
    let json = match std::str::from_utf8(&value.bytes) {
        Ok(value) => serde_json::to_vec(&Lookup { value, found: true, encoding: None }),
        Err(_) => {
            let value = &STANDARD.encode(&value.bytes);
            serde_json::to_vec(&Lookup { value, found: true, encoding: Some("base64") })
        }
    };
    let json = json.map_err(|error| ApiError::new(Code::Internal, error.to_string()))?;
    let kind = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, kind)], Body::from(api.memory.hold(json)?)).into_response())
}

/// `DELETE /api/v1/kv?key=`
pub(crate) async fn delete(
    State(api): State<Api>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Json<Done>, ApiError> {
    let key = key_of_query(query.as_deref())?;
    api.writer(&headers).delete(key.as_bytes(), Condition::Always).await?;
    Ok(Json(Done { success: true }))
}

/// How a body is written.
#[derive(Clone, Copy)]
enum BodyFormat {
    Json,
    Form,
}

impl BodyFormat {
    fn of(headers: &HeaderMap) -> Result<BodyFormat, ApiError> {
        let unsupported = |message: &str| {
            Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::Unsupported, message))
        };
        if headers.contains_key(header::CONTENT_ENCODING) {
            return unsupported("a body with a Content-Encoding is not taken");
        }
        let text = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let mut pieces = text.unwrap_or("").split(';').map(str::trim);
        let format = match pieces.next().unwrap_or("").to_ascii_lowercase().as_str() {
            "application/json" => BodyFormat::Json,
            "application/x-www-form-urlencoded" => BodyFormat::Form,
            _ => {
                return unsupported(
                    "Content-Type must be application/json or application/x-www-form-urlencoded",
                );
            }
        };
        for parameter in pieces {
            let parameter = parameter.to_ascii_lowercase();
            let charset = parameter.strip_prefix("charset=").map(|name| name.trim_matches('"'));
            if charset.is_some_and(|name| name != "utf-8") {
                return unsupported("the charset must be utf-8");
            }
        }
        Ok(format)
    }
}
