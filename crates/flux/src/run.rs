//! `flux up`, `flux server` and `flux gateway`: builds what the role asks for, runs it until a
//! signal, and drains it in order: first the gateway, whose requests need the node, then the node.

use std::{
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use flux_client::Client;
use flux_gateway::{Drained, Options};
use flux_server::{
    Node, StartError,
    config::{Role, Settings},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

use crate::stop::Stop;

/// Runs until a signal, or until something fails that the process cannot do without.
pub async fn run(role: Role, settings: &Settings) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::listen()?;
    // Opened before the data is recovered, which may take long: a wrong address is told at once.
    let http = match role {
        Role::Up | Role::Gateway => Some(listen(settings).await?),
        Role::Server => None,
    };
    let node = match role {
        Role::Up | Role::Server => tokio::select! {
            node = Node::start(settings) => Some(node?),
            (signal, _) = stop.requested() => {
                tracing::info!(signal, "stopped before the node served; nothing is lost");
                return Ok(ExitCode::SUCCESS);
            }
        },
        Role::Gateway => None,
    };
    let mut gateway = match http {
        Some(listener) => {
            Some(Gateway::start(listener, endpoints(node.as_ref(), settings), settings)?)
        }
        None => None,
    };
    announce(node.as_ref(), gateway.as_ref())?;
    let outcome = tokio::select! {
        (signal, _) = stop.requested() => {
            tracing::info!(signal, "stopping; a second signal ends at once");
            Ok(())
        }
        ended = failed(&mut gateway) => ended,
        error = node_failed(node.as_ref()) => Err(error.into()),
    };
    tokio::spawn(stop.end_at_next());
    let drained = drain(gateway, node).await;
    outcome.and(drained).map(|()| ExitCode::SUCCESS)
}

async fn listen(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address = settings.http_addr;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: give http_addr another address, or stop the process that has it"))
}

/// The nodes that the gateway talks to: the one in this process, if there is one.
fn endpoints(node: Option<&Node>, settings: &Settings) -> Vec<String> {
    match node {
        Some(node) => vec![reachable(node.addresses().data).to_string()],
        None => settings.gateway_kv_endpoints.clone(),
    }
}

/// An address of this machine that reaches a listener.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// A gateway that serves.
struct Gateway {
    address: SocketAddr,
    client: Client,
    shutdown: oneshot::Sender<()>,
    serving: JoinHandle<io::Result<Drained>>,
}

impl Gateway {
    fn start(
        listener: TcpListener,
        endpoints: Vec<String>,
        settings: &Settings,
    ) -> anyhow::Result<Gateway> {
        let address = listener.local_addr()?;
        let client = Client::new(flux_client::Config::new(endpoints))?;
        let drain_timeout = Duration::from_millis(settings.shutdown_timeout_ms);
        let options = Options { drain_timeout, ..Options::default() };
        let (shutdown, asked) = oneshot::channel();
        let asked = async {
            // A sender that is gone asks for the same.
            let _ = asked.await;
        };
        let serving = tokio::spawn(flux_gateway::serve(listener, client.clone(), options, asked));
        Ok(Gateway { address, client, shutdown, serving })
    }

    async fn stop(self) -> anyhow::Result<()> {
        // A gateway that has ended cannot be asked to.
        let _ = self.shutdown.send(());
        let Drained { finished, cut_off } = self.serving.await?.context("the gateway failed")?;
        self.client.close().await;
        tracing::info!(finished, cut_off, "gateway stopped");
        Ok(())
    }
}

/// Ends only if the node cannot go on.
async fn node_failed(node: Option<&Node>) -> StartError {
    match node {
        Some(node) => node.failed().await,
        None => std::future::pending().await,
    }
}

/// Ends only if the gateway does, which it should not before it is asked to.
async fn failed(gateway: &mut Option<Gateway>) -> anyhow::Result<()> {
    let Some(running) = gateway else {
        return std::future::pending().await;
    };
    let ended = (&mut running.serving).await;
    *gateway = None;
    ended?.context("the gateway failed")?;
    anyhow::bail!("the gateway ended by itself")
}

async fn drain(gateway: Option<Gateway>, node: Option<Node>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let gateway_stopped = match gateway {
        Some(gateway) => gateway.stop().await,
        None => Ok(()),
    };
    if let Some(node) = node {
        node.shutdown().await.context("the log could not be closed properly")?;
    }
    gateway_stopped?;
    tracing::info!(elapsed_ms = begun.elapsed().as_millis() as u64, "stopped");
    Ok(())
}

/// Logs that the process serves, and prints what a person at a terminal can try.
fn announce(node: Option<&Node>, gateway: Option<&Gateway>) -> io::Result<()> {
    let http = gateway.map(|gateway| gateway.address);
    let mut out = io::stdout().lock();
    match (node.map(Node::addresses), http) {
        (Some(node), Some(http)) => {
            let flux_server::Addresses { data, grpc, admin, .. } = node;
            out.write_all(banner(data, grpc, admin, http).as_bytes())?;
            tracing::info!(%data, %grpc, %admin, %http, "ready");
        }
        (Some(node), None) => {
            tracing::info!(data = %node.data, grpc = %node.grpc, admin = %node.admin, "ready");
        }
        (None, Some(http)) => tracing::info!(%http, "ready"),
        (None, None) => {}
    }
    out.flush()
}

fn banner(data: SocketAddr, grpc: SocketAddr, admin: SocketAddr, http: SocketAddr) -> String {
    let (try_http, try_data) = (reachable(http), reachable(data));
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "Flux-KV {version} is up

  RESP, native  {data}
  gRPC          {grpc}
  HTTP          http://{http}
  admin         http://{admin}/health /ready /metrics

Try:
  curl -d key=greeting -d value=hello http://{try_http}/api/v1/kv
  redis-cli -h {} -p {} get greeting
  flux cli --addr {try_data}

Ctrl-C stops it.

",
        try_data.ip(),
        try_data.port()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_over_loopback() {
        for (listener, reached) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:2", "[::1]:2"),
            ("127.0.0.1:3", "127.0.0.1:3"),
            ("192.168.0.1:4", "192.168.0.1:4"),
        ] {
            let address = reachable(listener.parse().expect("an address"));
            assert_eq!(address.to_string(), reached);
        }
    }

    #[test]
    fn the_banner_gives_lines_that_can_be_run() {
        let address = |text: &str| text.parse().expect("an address");
        let text = banner(
            address("0.0.0.0:7379"),
            address("127.0.0.1:50052"),
            address("127.0.0.1:7380"),
            address("127.0.0.1:8080"),
        );
        assert!(text.contains("redis-cli -h 127.0.0.1 -p 7379 get greeting\n"), "{text}");
        assert!(text.contains("flux cli --addr 127.0.0.1:7379\n"), "{text}");
        assert!(text.contains(" http://127.0.0.1:8080/api/v1/kv\n"), "{text}");
    }
}
