//! `flux admin`: shows a cluster and changes it, through the admin port of any of its nodes.
//!
//! The node does the work and finds the words; here they are asked for and laid out.

mod backup;
mod restore;
mod table;

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Subcommand;
use flux_server::cluster::{
    CallError, Client, ClusterStatus, Done, MoveRequest, NodeReport, NodeRequest, PartitionReport,
    PartitionState, RebalanceRequest, TransferRequest,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Serialize, de::DeserializeOwned};

const AFTER_HELP: &str = "\
NODE is a node's name, node-0badcafe, or a part of it that no other's has.

Examples:
  flux admin status
  flux admin nodes --json
  flux admin partitions --troubled
  flux admin drain cafe            empty a node before it is taken away
  flux admin transfer 7 cafe       have another node lead partition 7
  flux admin backup /var/backups/flux-monday";

/// The node asks all others before it answers, and gives each of them two seconds.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The most partitions that there can be.
const SLOTS: u16 = 16_384;

/// The arguments of `flux admin`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The admin port of any node of the cluster
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:7380", value_parser = crate::args::host_and_port)]
    addr: String,

    /// Print JSON instead of tables and sentences
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Show the cluster in a few lines
    Status,
    /// Show its nodes
    Nodes,
    /// Show its partitions
    Partitions {
        /// Only those that are not as they should be
        #[arg(long)]
        troubled: bool,
    },
    /// Move all replicas away from a node and give it no new ones
    Drain {
        /// The node
        node: String,
    },
    /// Give a drained node replicas again
    Undrain {
        /// The node
        node: String,
    },
    /// Move one replica of a partition to another node
    Move {
        /// The partition
        #[arg(value_parser = partition)]
        partition: u16,
        /// The node that has the replica
        from: String,
        /// The node that is to have it
        to: String,
    },
    /// Have another node lead a partition
    Transfer {
        /// The partition
        #[arg(value_parser = partition)]
        partition: u16,
        /// The node that is to lead it
        node: String,
    },
    /// Look at once for what is out of balance
    Rebalance,
    /// Put the placement map back after etcd has lost its data
    Republish,
    /// Write all keys to a folder while the cluster, or a node alone, goes on
    ///
    /// Each partition's file is as its leader had it at one moment, and holds every write that was
    /// acknowledged before the command began; partitions are of different moments. The folder is made; it
    /// must be empty or hold a backup that was not finished. A snapshot needs room in the node's own
    /// data_dir, too, as every snapshot does.
    Backup {
        /// The folder
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Write all keys of a backup into a cluster or a node alone
    ///
    /// Checks the whole backup first. The number of nodes and of partitions may be another one than that
    /// of the backup. Keys get new versions and keep their time of expiry; those that have expired are
    /// left out. Nobody else should write meanwhile.
    Restore {
        /// The folder
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Restore although there are keys already: those that the backup has too are overwritten, and
        /// all others stay. Also the way to go on after a restore that broke off
        #[arg(long)]
        force: bool,
    },
}

/// Asks the node and prints what it says.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let text = runtime.block_on(answer(args)).map_err(|error| advised(error, &args.addr))?;
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Says what to try where the address is the wrong one.
fn advised(error: anyhow::Error, address: &str) -> anyhow::Error {
    let call = error.chain().find_map(|cause| cause.downcast_ref::<CallError>());
    let advice = match call {
        Some(CallError::Unreachable { address: asked, .. }) if asked == address => {
            "does the node run?"
        }
        Some(CallError::Foreign { address: asked, .. }) if asked == address => {
            "other ports of a node and that of the gateway do not answer such questions."
        }
        _ => return error,
    };
    anyhow::anyhow!(
        "{error:#}; {advice} --addr wants the admin_addr of a node, 127.0.0.1:7380 where it is not set"
    )
}

/// A partition, as a person gives it.
fn partition(text: &str) -> Result<u16, String> {
    let number = text.parse().ok().filter(|number| *number < SLOTS);
    number.ok_or_else(|| format!("a partition is a number, from 0 to {} at most", SLOTS - 1))
}

/// A count with its noun.
fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// A node to ask, and how to show its answers.
struct Node<'a> {
    client: Client,
    args: &'a Args,
}

async fn answer(args: &Args) -> anyhow::Result<String> {
    match &args.command {
        Command::Backup { folder } => {
            let manifest = backup::run(&args.addr, folder).await?;
            return Ok(if args.json { json(&manifest) } else { backup::done(&manifest, folder) });
        }
        Command::Restore { folder, force } => {
            let restored = restore::run(&args.addr, folder, *force).await?;
            return Ok(if args.json { json(&restored) } else { restored.to_string() });
        }
        _ => {}
    }
    let node = Node { client: Client::default(), args };
    let text = match &args.command {
        Command::Status => node.show("/cluster/status", |answer| status(&answer)).await,
        Command::Nodes => {
            node.show("/cluster/nodes", |answer: Vec<NodeReport>| nodes(&answer)).await
        }
        Command::Partitions { troubled } => {
            let keep = |report: &PartitionReport| !troubled || report.state != PartitionState::Ok;
            let mut answer: Vec<PartitionReport> = node.get("/cluster/partitions?all").await?;
            answer.retain(keep);
            Ok(node.shown(&answer, |answer| partitions(answer)))
        }
        Command::Drain { node: name } => {
            node.ask("/cluster/drain", &NodeRequest { node: name.clone() }).await
        }
        Command::Undrain { node: name } => {
            node.ask("/cluster/undrain", &NodeRequest { node: name.clone() }).await
        }
        Command::Move { partition, from, to } => {
            let (partition, from, to) = (*partition, from.clone(), to.clone());
            node.ask("/cluster/move", &MoveRequest { partition, from, to }).await
        }
        Command::Transfer { partition, node: to } => {
            let (partition, to) = (*partition, to.clone());
            let request = TransferRequest { partition, to, forwarded: false };
            node.ask("/cluster/transfer", &request).await
        }
        Command::Rebalance => node.ask("/cluster/rebalance", &RebalanceRequest::default()).await,
        Command::Republish => node.ask("/cluster/republish", &serde_json::json!({})).await,
        Command::Backup { .. } | Command::Restore { .. } => unreachable!("carried out above"),
    };
    Ok(text?)
}

impl Node<'_> {
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.client.get(&self.args.addr, path, TIMEOUT).await
    }

    async fn show<T: DeserializeOwned + Serialize>(
        &self,
        path: &str,
        text: impl Fn(T) -> String,
    ) -> Result<String, CallError> {
        let answer = self.get::<T>(path).await?;
        Ok(if self.args.json { json(&answer) } else { text(answer) })
    }

    fn shown<T: Serialize + ?Sized>(&self, answer: &T, text: impl Fn(&T) -> String) -> String {
        if self.args.json { json(answer) } else { text(answer) }
    }

    async fn ask(&self, path: &str, request: &impl Serialize) -> Result<String, CallError> {
        let done: Done = self.client.post(&self.args.addr, path, request, TIMEOUT).await?;
        Ok(self.shown(&done, |done| format!("{}\n", done.message)))
    }
}

/// A bar on standard error, if that is a terminal.
fn progress(length: u64, what: &'static str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {percent:>3}%  {msg}");
    let style = style.expect("the template is well formed").progress_chars("=> ");
    ProgressBar::new(length.max(1)).with_style(style).with_prefix(what)
}

fn json(answer: &(impl Serialize + ?Sized)) -> String {
    let text = serde_json::to_string_pretty(answer).expect("an answer of plain fields");
    text + "\n"
}

fn status(status: &ClusterStatus) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, text: String| lines.push(format!("{name:<12} {text}\n"));
    let id = status.cluster_id.map_or("not created yet".to_owned(), |id| format!("{id:016x}"));
    line("cluster", format!("{} ({id}), epoch {}", status.cluster_name, status.epoch));
    line("controller", status.controller.map_or("none".to_owned(), |node| node.to_string()));
    let away = match status.nodes_away {
        0 => String::new(),
        away => format!(", {away} away"),
    };
    let draining = match status.nodes_draining {
        0 => String::new(),
        draining => format!(", {draining} draining"),
    };
    line("nodes", format!("{} alive{away}{draining}", status.nodes_alive));
    let ClusterStatus { partitions, partitions_led: led, .. } = status;
    let replicas = counted(status.replication_factor.into(), "replica");
    let mut text = format!("{partitions}, {replicas} each");
    for (count, what) in [
        (partitions - led, "without a leader"),
        (status.partitions_under_replicated, "under-replicated"),
        (status.partitions_moving, "moving"),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    line("partitions", text);
    line("keys", table::known(status.keys));
    line(
        "registry",
        match status.registry_away_s {
            None => "in touch".to_owned(),
            Some(away) => format!("away for {away} s"),
        },
    );
    if let Some(trouble) = &status.trouble {
        line("trouble", trouble.clone());
    }
    lines.concat()
}

fn nodes(nodes: &[NodeReport]) -> String {
    let row = |node: &NodeReport| {
        let mut state = match (node.alive, node.answers, node.away_s) {
            (true, true, _) => "alive".to_owned(),
            (true, false, _) => "silent".to_owned(),
            (false, _, Some(away)) => format!("away {away} s"),
            (false, _, None) => "away".to_owned(),
        };
        if node.draining {
            state += ", draining";
        }
        if node.controller {
            state += ", controller";
        }
        vec![
            node.node.to_string(),
            state,
            if node.zone.is_empty() { "-".to_owned() } else { node.zone.clone() },
            table::known(node.replicas),
            node.placed.to_string(),
            table::known(node.leads),
            table::known(node.keys),
            table::known(node.bytes.map(table::size)),
            node.data_addr.to_string(),
            node.admin_addr.to_string(),
            node.version.clone(),
        ]
    };
    let columns = [
        "NODE", "STATE", "ZONE", "REPLICAS", "PLACED", "LEADS", "KEYS", "SIZE", "DATA", "ADMIN",
        "VERSION",
    ];
    table::lay_out(&columns, nodes.iter().map(row))
}

fn partitions(partitions: &[PartitionReport]) -> String {
    let row = |report: &PartitionReport| {
        let on: Vec<_> = report.replicas.iter().map(|replica| replica.node).collect();
        let names: Vec<String> = on.iter().map(ToString::to_string).collect();
        let arrives: Vec<String> = report
            .target
            .iter()
            .filter(|node| !on.contains(node))
            .map(ToString::to_string)
            .collect();
        let state = serde_json::to_value(report.state).expect("a name");
        vec![
            report.partition.to_string(),
            state.as_str().expect("a name").to_owned(),
            report.leader.map_or("-".to_owned(), |node| node.to_string()),
            table::known(report.term),
            table::known(report.revision),
            table::known(report.keys),
            table::known(report.bytes.map(table::size)),
            names.join(" "),
            if arrives.is_empty() { "-".to_owned() } else { arrives.join(" ") },
        ]
    };
    let columns =
        ["PARTITION", "STATE", "LEADER", "TERM", "REVISION", "KEYS", "SIZE", "ON", "TO COME"];
    table::lay_out(&columns, partitions.iter().map(row))
}

#[cfg(test)]
mod tests;
