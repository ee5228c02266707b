//! The one shape of errors: `{"error":{"code":…,"message":…}}` and a status that fits the code.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flux_client::{Code, Error};
use serde::Serialize;

/// An answer other than success.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: Code,
    message: String,
}

#[derive(Serialize)]
struct Shape<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    code: &'static str,
    message: &'a str,
}

impl ApiError {
    /// An error with the status that the table gives its code.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> ApiError {
        let status = StatusCode::from_u16(code.http());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        ApiError { status, code, message: message.into() }
    }

    /// An error of HTTP itself, which has a closer status than the table.
    pub(crate) fn http(status: StatusCode, code: Code, message: impl Into<String>) -> ApiError {
        ApiError { status, code, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(Code::InvalidArgument, message)
    }

    pub(crate) fn overloaded(message: impl Into<String>) -> ApiError {
        ApiError::new(Code::Overloaded, message)
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Whether the same request may be answered in a while.
    pub(crate) fn may_pass(&self) -> bool {
        let statuses = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
        statuses.contains(&self.status) && self.code.is_retryable()
    }
}

impl From<Error> for ApiError {
    /// Addresses and causes stay in the log; the node's own words are meant for clients.
    fn from(error: Error) -> ApiError {
        let code = error.code();
        let message = match error {
            Error::Refused { message, .. } => return ApiError::new(code, message),
            Error::TooLarge(error) => return ApiError::new(code, error.to_string()),
            Error::Unavailable(_) | Error::Closed => "no node can be reached; nothing was written",
            Error::Timeout => "no answer in time",
            Error::ConnectionLost(_) => "the connection to the node was lost",
            Error::OutcomeUnknown(_) => {
                "outcome unknown: the write may or may not have taken place"
            }
            Error::Config(_) | Error::Protocol(_) => "internal error",
        };
        tracing::debug!(%error, %code, "request failed");
        ApiError::new(code, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = Inner { code: self.code.name(), message: &self.message };
        let mut response = (self.status, Json(Shape { error })).into_response();
        if self.may_pass() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
