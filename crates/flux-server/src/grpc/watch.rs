//! `Watch`: requests as what a watcher wants, and what it is shown as messages.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use flux_cdc::Feed;
use flux_core::MAX_KEY_BYTES;
use flux_proto::Code;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::grpc::watch::kind_of;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::Status;
use wire::watch_response::Kind;

use super::{invalid, status};
use crate::feed::watch::{
    Begin, Ended, Keys, NodeRoutes, Refused, Room, Routes, Shown, Wanted, Watches, Watching, What,
};
use crate::shared::Shared;

const KEEP_ALIVE_MS: u32 = 15_000;
const LEAST_KEEP_ALIVE_MS: u32 = 1_000;
const MOST_KEEP_ALIVE_MS: u32 = 60_000;
/// Changes that may wait for a watcher, however small they are.
const MAX_WAITING: usize = 4096;

/// The watches of a node.
pub(super) fn watches(
    shared: &Arc<Shared>,
    feed: Arc<dyn Feed>,
    stopping: watch::Receiver<bool>,
) -> Watches {
    let routes = Arc::new(NodeRoutes(Arc::clone(shared)));
    let room = Room { bytes: shared.settings.watch_buffer as usize, items: MAX_WAITING };
    let limits = (shared.settings.max_watches, room);
    let (open, stats) = (Arc::clone(&shared.watchers), Arc::clone(&shared.stats));
    let elsewhere = (routes as Arc<dyn Routes>, Arc::clone(&shared.nodes));
    Watches::new(feed, elsewhere, shared.token_cluster(), limits, open, stats, stopping)
}

/// Begins a watch.
pub(super) fn open(watches: &Watches, request: wire::WatchRequest) -> Result<Messages, Status> {
    match watches.open(wanted(request)?) {
        Ok(watching) => Ok(Messages(watching)),
        Err(Refused::Invalid(message)) => Err(invalid(message)),
        Err(refused @ Refused::TooMany) => Err(status(Code::Overloaded, &refused.to_string())),
    }
}

fn wanted(request: wire::WatchRequest) -> Result<Wanted, Status> {
    use wire::watch_request::{From, Keys as Asked};
    let wire::WatchRequest { keys, from, partitions, here_only, keep_alive_ms, own_log_only } =
        request;
    let keys = match keys {
        Some(Asked::Key(key)) if key.is_empty() => return Err(invalid("key must not be empty")),
        Some(Asked::Key(key) | Asked::Prefix(key)) if key.len() > MAX_KEY_BYTES => {
            return Err(invalid(format!("no key is longer than {MAX_KEY_BYTES} bytes")));
        }
        Some(Asked::Key(key)) => Keys::One(key),
        Some(Asked::Prefix(prefix)) => Keys::Prefix(prefix),
        None => Keys::Prefix(Bytes::new()),
    };
    let begin = match from {
        None => Begin::Now,
        Some(From::Token(token)) => Begin::Token(token),
        Some(From::Snapshot(true)) => Begin::Snapshot,
        Some(From::Snapshot(false)) => {
            return Err(invalid("snapshot must be true if it is set"));
        }
    };
    let keep_alive_ms = match keep_alive_ms {
        0 => KEEP_ALIVE_MS,
        LEAST_KEEP_ALIVE_MS..=MOST_KEEP_ALIVE_MS => keep_alive_ms,
        _ => {
            let message = format!(
                "keep_alive_ms must be 0 or from {LEAST_KEEP_ALIVE_MS} to {MOST_KEEP_ALIVE_MS}"
            );
            return Err(invalid(message));
        }
    };
    let keep_alive = Duration::from_millis(u64::from(keep_alive_ms));
    Ok(Wanted { keys, begin, partitions, here_only, own_log_only, keep_alive })
}

/// A watch as the messages of its stream.
#[derive(Debug)]
pub(super) struct Messages(Watching);

impl Stream for Messages {
    type Item = Result<wire::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let shown = Pin::new(&mut self.0).poll_next(context);
        shown.map(|shown| Some(shown?.map(message).map_err(|ended| ended_status(&ended))))
    }
}

fn message(Shown { what, token }: Shown) -> wire::WatchResponse {
    let kind = match what {
        What::Started => Kind::Started(wire::Started {}),
        What::Record(record) => kind_of(&record),
        What::KeepAlive => Kind::KeepAlive(wire::KeepAlive {}),
    };
    wire::WatchResponse { kind: Some(kind), token: token.into() }
}

fn ended_status(ended: &Ended) -> Status {
    let code = match ended {
        Ended::TooSlow => Code::WatchTooSlow,
        Ended::Stopping => Code::Stopping,
        Ended::NotHere | Ended::Unavailable => Code::Unavailable,
    };
    status(code, &ended.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_watched_is_refused_with_the_field() {
        use wire::watch_request::{From, Keys as Asked};
        let empty =
            wire::WatchRequest { keys: Some(Asked::Key(Bytes::new())), ..Default::default() };
        let snapshot =
            wire::WatchRequest { from: Some(From::Snapshot(false)), ..Default::default() };
        let keep_alive = |keep_alive_ms| wire::WatchRequest { keep_alive_ms, ..Default::default() };
        for (request, word) in [
            (empty, "key"),
            (snapshot, "snapshot"),
            (keep_alive(999), "keep_alive_ms"),
            (keep_alive(60_001), "keep_alive_ms"),
        ] {
            let status = wanted(request).expect_err("refused");
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(word), "{status}");
        }
        let all = wanted(wire::WatchRequest::default()).expect("valid");
        assert_eq!((all.keys, all.begin), (Keys::Prefix(Bytes::new()), Begin::Now));
        assert_eq!(all.keep_alive, Duration::from_secs(15));
    }
}
