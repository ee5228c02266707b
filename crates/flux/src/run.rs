//! `flux up`, `flux server` and `flux gateway`: builds what the role asks for, runs it until a
//! signal, and drains it in order: first the gateway, whose requests need the node, then the node.

use std::{
    future::poll_fn,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    task::Poll,
    time::{Duration, Instant},
};

use anyhow::Context;
use flux_client::Client;
use flux_gateway::{Drained, Options};
use flux_server::{
    Addresses, Node, StartError,
    config::{Role, Settings},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

use crate::{stop::Stop, up};

/// Runs until a signal, or until something fails that the process cannot do without. `count` is the
/// number of nodes in this process; the role `Gateway` has none.
pub async fn run(role: Role, settings: &Settings, count: u16) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::listen()?;
    let cluster = match count {
        0 => Vec::new(),
        1 => up::check_alone(settings).map(|()| Vec::new())?,
        count => up::settings_of_nodes(settings, count)?,
    };
    // Opened before the data is recovered, which may take long: a wrong address is told at once.
    let http = match role {
        Role::Up | Role::Gateway => Some(listen(settings).await?),
        Role::Server => None,
    };
    let nodes = tokio::select! {
        nodes = start(settings, &cluster, count) => nodes?,
        (signal, _) = stop.requested() => {
            tracing::info!(signal, "stopped before the node served; nothing is lost");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let mut gateway = match http {
        Some(listener) => Some(Gateway::start(listener, &nodes, settings)?),
        None => None,
    };
    announce(&nodes, gateway.as_ref())?;
    let outcome = tokio::select! {
        (signal, _) = stop.requested() => {
            tracing::info!(signal, "stopping; a second signal ends at once");
            Ok(())
        }
        ended = failed(&mut gateway) => ended,
        error = node_failed(&nodes) => Err(error.into()),
    };
    tokio::spawn(stop.end_at_next());
    let drained = drain(gateway, nodes).await;
    outcome.and(drained).map(|()| ExitCode::SUCCESS)
}

/// Starts the nodes of this process: those of `cluster`, or one.
async fn start(settings: &Settings, cluster: &[Settings], count: u16) -> anyhow::Result<Vec<Node>> {
    match count {
        0 => Ok(Vec::new()),
        1 => Ok(vec![Node::start(settings).await?]),
        _ => up::start(&settings.data_dir, cluster).await,
    }
}

async fn listen(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address = settings.http_addr;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}: give http_addr another address, or stop the process that has it"))
}

/// Where the gateway reaches the nodes: those in this process, if there are any, else as configured.
fn endpoints(
    nodes: &[Node],
    configured: &[String],
    address: impl Fn(Addresses) -> SocketAddr,
) -> Vec<String> {
    if nodes.is_empty() {
        return configured.to_vec();
    }
    nodes.iter().map(|node| reachable(address(node.addresses())).to_string()).collect()
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
        nodes: &[Node],
        settings: &Settings,
    ) -> anyhow::Result<Gateway> {
        let address = listener.local_addr()?;
        let kv_endpoints = endpoints(nodes, &settings.gateway_kv_endpoints, |node| node.data);
        let client = Client::new(flux_client::Config::new(kv_endpoints))?;
        let drain_timeout = Duration::from_millis(settings.shutdown_timeout_ms);
        let grpc_endpoints = endpoints(nodes, &settings.gateway_grpc_endpoints, |node| node.grpc);
        let max_watches = settings.max_watches;
        let options = Options { drain_timeout, grpc_endpoints, max_watches, ..Options::default() };
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

/// Ends only if a node cannot go on.
async fn node_failed(nodes: &[Node]) -> StartError {
    let mut waiting: Vec<_> = nodes.iter().map(|node| Box::pin(node.failed())).collect();
    poll_fn(|context| {
        for one in &mut waiting {
            if let Poll::Ready(error) = one.as_mut().poll(context) {
                return Poll::Ready(error);
            }
        }
        Poll::Pending
    })
    .await
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

/// Stops the nodes one after the other: each hands over what it leads to those that are left.
async fn drain(gateway: Option<Gateway>, nodes: Vec<Node>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let gateway_stopped = match gateway {
        Some(gateway) => gateway.stop().await,
        None => Ok(()),
    };
    let mut nodes_stopped = Ok(());
    for node in nodes {
        let id = node.id().to_owned();
        let stopped = node.shutdown().await;
        let stopped =
            stopped.with_context(|| format!("the log of {id} could not be closed properly"));
        nodes_stopped = nodes_stopped.and(stopped);
    }
    nodes_stopped?;
    gateway_stopped?;
    tracing::info!(elapsed_ms = begun.elapsed().as_millis() as u64, "stopped");
    Ok(())
}

/// Logs that the process serves, and prints what a person at a terminal can try.
fn announce(nodes: &[Node], gateway: Option<&Gateway>) -> io::Result<()> {
    let http = gateway.map(|gateway| gateway.address);
    let named: Vec<(&str, Addresses)> =
        nodes.iter().map(|node| (node.id(), node.addresses())).collect();
    let mut out = io::stdout().lock();
    match (&*named, http) {
        ([], None) => {}
        ([], Some(http)) => tracing::info!(%http, "ready"),
        (&[(_, node)], None) => {
            tracing::info!(data = %node.data, grpc = %node.grpc, admin = %node.admin, "ready");
        }
        (&[(_, Addresses { data, grpc, admin, .. })], Some(http)) => {
            out.write_all(banner(data, grpc, admin, http).as_bytes())?;
            tracing::info!(%data, %grpc, %admin, %http, "ready");
        }
        (nodes, http) => {
            out.write_all(cluster_banner(nodes, http).as_bytes())?;
            for (id, Addresses { data, grpc, admin, peer }) in nodes {
                tracing::info!(node = id, %data, %grpc, %admin, %peer, "ready");
            }
        }
    }
    out.flush()
}

fn cluster_banner(nodes: &[(&str, Addresses)], http: Option<SocketAddr>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!(
        "Flux-KV {version} is up, a cluster of {} nodes in one process

  {:<15}{:<23}{:<23}{}
",
        nodes.len(),
        "node",
        "RESP, native",
        "gRPC",
        "admin"
    );
    for (id, Addresses { data, grpc, admin, .. }) in nodes {
        let (data, grpc) = (data.to_string(), grpc.to_string());
        text += &format!("  {id:<15}{data:<23}{grpc:<23}http://{admin}\n");
    }
    let (_, first) = nodes[0];
    let (_, last) = nodes[nodes.len() - 1];
    let (first_admin, last_data) = (reachable(first.admin), reachable(last.data));
    if let Some(http) = http {
        text += &format!(
            "
  HTTP, by all   http://{http}

Try:
  curl -d key=greeting -d value=hello http://{}/api/v1/kv",
            reachable(http)
        );
    }
    text += &format!(
        "
  redis-cli -h {} -p {} get greeting
  flux admin --addr {first_admin} nodes

Ctrl-C stops it, node after node.

",
        last_data.ip(),
        last_data.port()
    );
    text
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
    fn the_banner_of_a_cluster_names_every_node() {
        let address = |text: &str| text.parse().expect("an address");
        let addresses = |port: u16| {
            let at = |port: u16| address(&format!("127.0.0.1:{port}"));
            Addresses {
                data: at(port),
                admin: at(port + 1),
                peer: at(port + 2),
                grpc: at(port + 3),
            }
        };
        let nodes = [("node-0000000a", addresses(7379)), ("node-0000000b", addresses(7479))];
        let text = cluster_banner(&nodes, Some(address("0.0.0.0:8080")));
        for words in [
            "a cluster of 2 nodes",
            "  node-0000000a  127.0.0.1:7379         127.0.0.1:7382         http://127.0.0.1:7380\n",
            "  node-0000000b  127.0.0.1:7479 ",
            "curl -d key=greeting -d value=hello http://127.0.0.1:8080/api/v1/kv\n",
            "redis-cli -h 127.0.0.1 -p 7479 get greeting\n",
            "flux admin --addr 127.0.0.1:7380 nodes\n",
        ] {
            assert!(text.contains(words), "{words:?} in {text}");
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
