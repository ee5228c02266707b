//! `flux up --nodes N`: a cluster in one process. Its nodes differ in nothing from those of `flux server`,
//! but meet in a registry that is a file, not etcd.
//!
//! ```text
//! <data_dir>/registry.json   the placement map
//! <data_dir>/node-1 … -N     the data directory of each node
//! ```
//!
//! It saves nobody from the loss of a machine: it is for trying, developing and testing a cluster.

use std::time::{Duration, Instant};
use std::{collections::BTreeMap, fs, io, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context, bail};
use flux_server::{
    Node,
    cluster::{Client, ClusterStatus, InProcess},
    config::{Role, Settings, most_partitions},
};
use tokio::task::JoinSet;
use tracing::Instrument as _;

/// The most nodes of one process.
pub const MAX_NODES: u16 = 32;

/// How far apart the ports of two nodes are.
const PORT_STEP: u16 = 100;
/// The placement map.
const REGISTRY: &str = "registry.json";
/// A node's data directory is named so, and its number follows.
const NODE: &str = "node-";
/// How long a start waits until every partition has a leader, and how often it looks.
const LEADERS_TIMEOUT: Duration = Duration::from_secs(20);
const LEADERS_CHECK: Duration = Duration::from_millis(50);
/// How long a node may take to say how many have one.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// What the data directory of a node has in it, and that of `flux up --nodes` has not.
const NODE_DESCRIPTION: &str = "node.toml";

/// Where the data directory belongs to a cluster of `flux up --nodes`, and no cluster is asked for.
pub fn check_alone(settings: &Settings) -> anyhow::Result<()> {
    let directory = &settings.data_dir;
    match nodes_in(directory)? {
        0 => Ok(()),
        count => bail!(
            "data_dir {} holds a cluster of {count} nodes: give --nodes {count}, or another data_dir",
            directory.display()
        ),
    }
}

/// The settings of each node.
///
/// # Errors
/// The data directory was made with more nodes or by a node alone, there are fewer nodes than
/// replicas, or no ports for all of them.
pub fn settings_of_nodes(settings: &Settings, count: u16) -> anyhow::Result<Vec<Settings>> {
    if settings.is_clustered() {
        bail!(
            "etcd_endpoints is set, and --nodes {count} brings a registry of its own: leave out one of them"
        );
    }
    let (factor, partitions) = (settings.replication_factor, settings.partitions);
    let most = most_partitions(factor);
    if partitions > most {
        bail!(
            "partitions is {partitions}, and a cluster has at most {most} with replication_factor {factor}"
        );
    }
    check_directory(settings, count)?;
    let cores = settings.worker_count();
    let workers = match settings.workers {
        0 => (cores / usize::from(count)).max(1),
        workers => workers,
    };
    let nodes: Vec<Settings> = (0..count)
        .map(|index| {
            let shifted = |name, address| shift(name, address, index);
            Ok(Settings {
                data_addr: shifted("data_addr", settings.data_addr)?,
                admin_addr: shifted("admin_addr", settings.admin_addr)?,
                peer_addr: shifted("peer_addr", settings.peer_addr)?,
                grpc_addr: shifted("grpc_addr", settings.grpc_addr)?,
                data_dir: settings.data_dir.join(format!("{NODE}{}", index + 1)),
                workers,
                ..settings.clone()
            })
        })
        .collect::<anyhow::Result<_>>()?;
    check_addresses(&nodes)?;
    Ok(nodes)
}

/// Starts the nodes side by side, since a new cluster is there only when enough of them are, and waits
/// until it serves.
pub async fn start(data_dir: &Path, nodes: &[Settings]) -> anyhow::Result<Vec<Node>> {
    let registry = Arc::new(InProcess::open(Some(data_dir.join(REGISTRY)))?);
    let mut starting = JoinSet::new();
    for (number, settings) in (1..).zip(nodes) {
        let (settings, registry) = (settings.clone(), Arc::clone(&registry));
        // Lines of the log say which node speaks, whatever the level that is shown.
        let span = tracing::error_span!("node", number);
        let start = async move {
            let started = Node::start_in(&settings, || Some(registry.attach())).await;
            (number, started.with_context(|| format!("node {number}")))
        };
        starting.spawn(start.instrument(span));
    }
    let mut started = BTreeMap::new();
    while let Some(ended) = starting.join_next().await {
        let (number, node) =
            ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        started.insert(number, node?);
    }
    let nodes: Vec<Node> = started.into_values().collect();
    await_leaders(&nodes).await;
    Ok(nodes)
}

/// Waits until every partition has a leader, but not for ever: what is served is served.
async fn await_leaders(nodes: &[Node]) {
    let Some(first) = nodes.first() else { return };
    let (client, admin) = (Client::default(), first.addresses().admin);
    let begun = Instant::now();
    while begun.elapsed() < LEADERS_TIMEOUT {
        let asked = client.get::<ClusterStatus>(admin, "/cluster/status", STATUS_TIMEOUT).await;
        if asked.is_ok_and(|status| status.partitions_led == status.partitions) {
            return;
        }
        tokio::time::sleep(LEADERS_CHECK).await;
    }
    tracing::warn!("some partitions have no leader yet");
}

fn check_directory(settings: &Settings, count: u16) -> anyhow::Result<()> {
    let directory = &settings.data_dir;
    let path = directory.display();
    if directory.join(NODE_DESCRIPTION).exists() {
        bail!(
            "data_dir {path} holds the data of a node alone, which cannot become a cluster: start it without \
             --nodes, or give --nodes another data_dir (`flux admin backup` and `flux admin restore` take \
             the keys along)"
        );
    }
    let before = nodes_in(directory)?;
    if before > count {
        bail!(
            "data_dir {path} holds a cluster of {before} nodes, and --nodes {count} would leave some of them \
             out: give --nodes {before}"
        );
    }
    let factor = settings.replication_factor;
    if !directory.join(REGISTRY).exists() && count < u16::from(factor) {
        bail!(
            "--nodes {count} is fewer than replication_factor {factor}: a partition has each replica on \
             another node"
        );
    }
    Ok(())
}

/// How many nodes a data directory has been started with: the highest number of one.
fn nodes_in(directory: &Path) -> anyhow::Result<u16> {
    let failed = || format!("cannot read data_dir {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        // The node says what is wrong with it.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(0),
        Err(error) => return Err(error).with_context(failed),
    };
    let mut count = 0;
    for entry in entries {
        let name = entry.with_context(failed)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(NODE)?.parse().ok());
        count = count.max(number.unwrap_or(0));
    }
    Ok(count)
}

/// The address of the node with this index.
fn shift(name: &str, address: SocketAddr, index: u16) -> anyhow::Result<SocketAddr> {
    let mut shifted = address;
    // Port 0 is any free one, for each of them.
    if address.port() != 0 {
        let port = index.checked_mul(PORT_STEP).and_then(|by| address.port().checked_add(by));
        let port = port.with_context(|| {
            format!("{name} is {address}, and its port plus {PORT_STEP} for each further node is none: choose a lower one")
        })?;
        shifted.set_port(port);
    }
    Ok(shifted)
}

fn check_addresses(nodes: &[Settings]) -> anyhow::Result<()> {
    let mut taken: Vec<(usize, &str, SocketAddr)> = Vec::new();
    for (number, node) in (1..).zip(nodes) {
        // The gateway's address is that of none of them, and not shifted.
        let role = if number == 1 { Role::Up } else { Role::Server };
        for (name, address) in node.listeners(role) {
            let other = taken.iter().find(|(_, _, other)| *other == address && address.port() != 0);
            if let Some((of, other, _)) = other {
                bail!(
                    "{name} of node {number} would be {address}, which is {other} of node {of}: each node's \
                     ports are {PORT_STEP} above those of the one before; choose others"
                );
            }
            taken.push((number, name, address));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
