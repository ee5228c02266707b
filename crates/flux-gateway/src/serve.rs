//! Connections: accepted within a limit, served, and drained at shutdown.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use flux_client::Client;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::options::Options;
use crate::router::router;
use crate::stall::StallGuard;
use crate::watch::Draining;

/// Room for a request's head: the longest URL that is taken, and headers.
const HEAD_BYTES: usize = 128 * 1024;

/// How long to wait after the system refuses to accept, which it does when it lacks descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is said to a client over the connection limit, before anything of it is read.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/json\r\n\
    retry-after: 1\r\n\
    connection: close\r\n\
    content-length: 81\r\n\
    \r\n\
    {\"error\":{\"code\":\"TOO_MANY_CLIENTS\",\"message\":\"the connection limit is reached\"}}";

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were open when the shutdown was asked for and ended by themselves.
    pub finished: usize,
    /// Connections whose request took too long and was cut off.
    pub cut_off: usize,
}

/// Serves HTTP on the listener until `shutdown` completes; then accepts no more, lets requests under
/// way finish within `drain_timeout`, and returns.
pub async fn serve(
    listener: TcpListener,
    client: Client,
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<Drained> {
    let addr = listener.local_addr()?;
    tracing::info!(%addr, "gateway listening");
    let connections = options.max_connections.saturating_add(options.max_watches);
    let room = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
    let (drain, draining) = watch::channel(());
    let router = router(client, &options).layer(Extension(Draining(draining.clone())));
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            // The buffer of a new socket takes it; nobody waits for a client that does not read.
            let _ = stream.try_write(FULL);
            continue;
        };
        let (write, header) = (options.write_timeout, options.header_timeout);
        let connection = converse(stream, router.clone(), (write, header), draining.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener);
    while connections.try_join_next().is_some() {}
    let open = connections.len();
    drop(drain);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(options.drain_timeout, all_ended).await;
    let cut_off = connections.len();
    connections.shutdown().await;
    Ok(Drained { finished: open - cut_off, cut_off })
}

/// Serves one connection until it ends, or after its request under way once draining starts; a client may
/// read nothing, and take for the head of a request, for so long.
async fn converse(
    stream: TcpStream,
    router: Router,
    (write_timeout, header_timeout): (Duration, Duration),
    mut draining: watch::Receiver<()>,
) {
    // Answers go out at once; a failure to set it costs only time.
    let _ = stream.set_nodelay(true);
    let stream = TokioIo::new(StallGuard::new(stream, write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(stream, TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        // The sender is only ever dropped.
        _ = draining.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
