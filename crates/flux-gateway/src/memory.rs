//! The memory that the bodies of requests and answers share, and reading a request's body within it,
//! within a size and within a time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::StatusCode;
use bytes::Bytes;
use flux_client::{Code, MAX_KEY_BYTES, MAX_VALUE_BYTES};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::ApiError;

/// The largest body: the longest key and the largest value with every byte as a JSON escape of six
/// bytes, and a little for what is around them.
pub(crate) const MAX_BODY_BYTES: usize = 6 * (MAX_KEY_BYTES + MAX_VALUE_BYTES) + 1024;

/// The memory is shared out in pieces of this size.
const PIECE_BYTES: usize = 1024;

/// What is small enough not to be counted.
const SMALL_BYTES: usize = 16 * 1024;

/// The memory for the bodies of all requests and answers under way.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pieces: Arc<Semaphore>,
    timeout: Duration,
}

/// A part of the memory, given back when it is dropped.
pub(crate) type Share = OwnedSemaphorePermit;

/// Bytes with the share of the memory that they take.
struct Held {
    bytes: Vec<u8>,
    _share: Option<Share>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Memory {
    pub(crate) fn new(bytes: usize, timeout: Duration) -> Memory {
        let pieces = (bytes / PIECE_BYTES).min(Semaphore::MAX_PERMITS);
        Memory { pieces: Arc::new(Semaphore::new(pieces)), timeout }
    }

    /// Makes the body of an answer. It holds its share until the last byte is written, however slow
    /// the client reads.
    pub(crate) fn hold(&self, bytes: Vec<u8>) -> Result<Bytes, ApiError> {
        let share = self.take(bytes.len().div_ceil(PIECE_BYTES), None)?;
        Ok(Bytes::from_owner(Held { bytes, _share: share }))
    }

    /// The same of a part of an answer, for which a small one takes no share: of those there is one at a
    /// time.
    pub(crate) fn hold_large(&self, bytes: Vec<u8>) -> Result<Bytes, ApiError> {
        if bytes.len() <= SMALL_BYTES { Ok(bytes.into()) } else { self.hold(bytes) }
    }

    /// Reads a whole body; gives it with its share, none where it is empty.
    pub(crate) async fn receive(&self, body: Body) -> Result<(Vec<u8>, Option<Share>), ApiError> {
        timeout(self.timeout, self.collect(body)).await.unwrap_or_else(|_| {
            let message = format!("the body did not arrive within {:?}", self.timeout);
            Err(ApiError::http(StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, message))
        })
    }

    async fn collect(&self, mut body: Body) -> Result<(Vec<u8>, Option<Share>), ApiError> {
        // With a Content-Length the hint is exact: what is too large is refused before it is read.
        if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        let mut share: Option<Share> = None;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| ApiError::invalid("the body is malformed or cut off"))?;
            let Ok(chunk) = frame.into_data() else {
                continue;
            };
            if bytes.len() + chunk.len() > MAX_BODY_BYTES {
                return Err(too_large());
            }
            let more = self.take((bytes.len() + chunk.len()).div_ceil(PIECE_BYTES), share.as_ref());
            match (&mut share, more?) {
                (Some(share), Some(more)) => share.merge(more),
                (share @ None, more) => *share = more,
                (Some(_), None) => {}
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok((bytes, share))
    }

    /// What is missing to a share of so many pieces.
    fn take(&self, pieces: usize, share: Option<&Share>) -> Result<Option<Share>, ApiError> {
        let missing = pieces.saturating_sub(share.map_or(0, Share::num_permits));
        if missing == 0 {
            return Ok(None);
        }
        let taken = Arc::clone(&self.pieces).try_acquire_many_owned(missing as u32);
        taken
            .map(Some)
            .map_err(|_| ApiError::overloaded("the memory for bodies is in use; try again later"))
    }
}

fn too_large() -> ApiError {
    ApiError::new(Code::TooLarge, format!("the body is over the limit of {MAX_BODY_BYTES} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn memory_is_shared_and_given_back() {
        let memory = Memory::new(10 * PIECE_BYTES, Duration::from_secs(5));
        let body = || Body::from(vec![0; 6 * PIECE_BYTES]);
        let first = memory.receive(body()).await.ok().unwrap();
        assert_eq!(first.0.len(), 6 * PIECE_BYTES);
        let refused = memory.receive(body()).await.err().unwrap();
        assert!(refused.message().contains("memory"), "{refused:?}");
        assert!(memory.hold(vec![0; 6 * PIECE_BYTES]).is_err());
        drop(first);
        let answer = memory.hold(vec![0; 6 * PIECE_BYTES]).unwrap();
        let part = answer.slice(1..2);
        drop(answer);
        assert!(memory.receive(body()).await.is_err(), "a part is still to be written");
        drop(part);
        assert!(memory.receive(body()).await.is_ok());
    }
}
