//! The text of INFO.
//!
//! Names are Redis's where a figure means the same, so that what reads them works; figures that Redis
//! has and a node has not are left out.

use std::fmt::Write;

use flux_proto::resp::Args;

use super::topology::{ClusterNode, Role};
use super::{ClusterView, REDIS_VERSION};

/// The figures that INFO shows.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    /// The node's name.
    pub node_id: String,
    /// The port of the data listener.
    pub tcp_port: u16,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// Microseconds since the Unix epoch.
    pub now_us: u64,
    /// The configuration file; empty for none.
    pub config_file: String,
    /// Threads that own connections and partitions.
    pub workers: usize,
    /// Raft groups.
    pub partitions: usize,
    /// Connections that are open.
    pub connected_clients: usize,
    /// The most of them.
    pub max_clients: usize,
    /// Bytes that keys and values take.
    pub used_memory: u64,
    /// Resident bytes of the process.
    pub resident_memory: u64,
    /// The limit of `used_memory`; 0 for none.
    pub max_memory: u64,
    /// The fsync policy in Redis's words: `always`, `everysec`, `no`.
    pub fsync: &'static str,
    /// Bytes of the log on disk.
    pub log_bytes: u64,
    /// When the last snapshot was finished, in seconds since the Unix epoch; 0 for never.
    pub last_snapshot_s: u64,
    /// Why the node takes no writes; empty if it does.
    pub write_failure: String,
    /// Connections since the start, and those that were refused.
    pub connections_received: u64,
    /// Connections refused because of the limit.
    pub rejected_connections: u64,
    /// Commands since the start.
    pub commands_processed: u64,
    /// Bytes received and sent.
    pub net_input_bytes: u64,
    /// Bytes sent.
    pub net_output_bytes: u64,
    /// Reads that found a key.
    pub keyspace_hits: u64,
    /// Reads that found none.
    pub keyspace_misses: u64,
    /// Keys removed because they expired.
    pub expired_keys: u64,
    /// Writes refused because too much work was waiting.
    pub overloaded: u64,
    /// Seconds of the processor's time, in the kernel and in the program.
    pub cpu_s: (f64, f64),
    /// Keys.
    pub keys: u64,
    /// Keys with an expiry.
    pub volatile_keys: u64,
    /// What the node knows of its cluster.
    pub cluster: ClusterView,
}

type Section = (&'static str, fn(&NodeInfo, &mut String) -> std::fmt::Result);

const SECTIONS: [Section; 9] = [
    ("Server", server),
    ("Clients", clients),
    ("Memory", memory),
    ("Persistence", persistence),
    ("Stats", stats),
    ("Replication", replication),
    ("CPU", cpu),
    ("Cluster", cluster),
    ("Keyspace", keyspace),
];

/// The text of these sections, or of all where none is named.
pub fn info(sections: Args<'_>, node: &NodeInfo) -> String {
    let wanted = |name: &str| {
        sections.is_empty()
            || sections.iter().any(|section| {
                [name, "all", "default", "everything"]
                    .iter()
                    .any(|known| section.eq_ignore_ascii_case(known.as_bytes()))
            })
    };
    let mut text = String::new();
    for (name, write) in SECTIONS.iter().filter(|(name, _)| wanted(name)) {
        if !text.is_empty() {
            text += "\r\n";
        }
        text += &format!("# {name}\r\n");
        write(node, &mut text).expect("writing to a string cannot fail");
    }
    text
}

/// Writes `name:value` lines.
macro_rules! lines {
    ($text:ident, $($name:literal: $value:expr),+ $(,)?) => {{
        $(write!($text, concat!($name, ":{}\r\n"), $value)?;)+
        Ok(())
    }};
}

fn server(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    lines!(text,
        "redis_version": REDIS_VERSION,
        "redis_mode": if node.cluster.enabled { "cluster" } else { "standalone" },
        "flux_version": env!("CARGO_PKG_VERSION"),
        "os": std::env::consts::OS,
        "arch_bits": usize::BITS,
        "process_id": std::process::id(),
        "run_id": node.node_id,
        "tcp_port": node.tcp_port,
        "server_time_usec": node.now_us,
        "uptime_in_seconds": node.uptime_s,
        "uptime_in_days": node.uptime_s / 86_400,
        "config_file": node.config_file,
        "flux_workers": node.workers,
        "flux_partitions": node.partitions,
    )
}

fn clients(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    lines!(text,
        "connected_clients": node.connected_clients,
        "maxclients": node.max_clients,
        "blocked_clients": 0,
    )
}

fn memory(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    lines!(text,
        "used_memory": node.used_memory,
        "used_memory_human": human(node.used_memory),
        "used_memory_rss": node.resident_memory,
        "used_memory_rss_human": human(node.resident_memory),
        "maxmemory": node.max_memory,
        "maxmemory_human": human(node.max_memory),
        "maxmemory_policy": "noeviction",
    )
}

fn persistence(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    let failed = !node.write_failure.is_empty();
    lines!(text,
        "loading": 0,
        "rdb_last_save_time": node.last_snapshot_s,
        "aof_enabled": 1,
        "aof_last_write_status": if failed { "err" } else { "ok" },
        "aof_current_size": node.log_bytes,
        "flux_fsync": node.fsync,
        "flux_write_failure": node.write_failure.replace(['\r', '\n'], " "),
    )
}

fn stats(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    lines!(text,
        "total_connections_received": node.connections_received,
        "total_commands_processed": node.commands_processed,
        "total_net_input_bytes": node.net_input_bytes,
        "total_net_output_bytes": node.net_output_bytes,
        "rejected_connections": node.rejected_connections,
        "expired_keys": node.expired_keys,
        "evicted_keys": 0,
        "keyspace_hits": node.keyspace_hits,
        "keyspace_misses": node.keyspace_misses,
        "flux_overloaded_writes": node.overloaded,
    )
}

fn replication(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    let view = &node.cluster;
    if let Role::ReplicaOf(master) = view.role(view.me) {
        let ClusterNode { host, port, alive, .. } = &view.nodes[master];
        return lines!(text,
            "role": "slave",
            "master_host": host,
            "master_port": port,
            "master_link_status": if *alive { "up" } else { "down" },
            "slave_read_only": 0,
            "connected_slaves": 0,
        );
    }
    let replicas = view.my_replicas();
    write!(text, "role:master\r\nconnected_slaves:{}\r\n", replicas.len())?;
    for (number, ClusterNode { host, port, alive, .. }) in replicas.iter().enumerate() {
        let state = if *alive { "online" } else { "wait_bgsave" };
        write!(text, "slave{number}:ip={host},port={port},state={state},offset=0,lag=0\r\n")?;
    }
    Ok(())
}

fn cluster(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    lines!(text, "cluster_enabled": u8::from(node.cluster.enabled))
}

fn cpu(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    let (system, user) = node.cpu_s;
    lines!(text,
        "used_cpu_sys": format_args!("{system:.6}"),
        "used_cpu_user": format_args!("{user:.6}"),
    )
}

fn keyspace(node: &NodeInfo, text: &mut String) -> std::fmt::Result {
    if node.keys > 0 {
        let (keys, volatile) = (node.keys, node.volatile_keys);
        write!(text, "db0:keys={keys},expires={volatile},avg_ttl=0\r\n")?;
    }
    Ok(())
}

/// A number of bytes as Redis shows it to people: `1.50K`.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let (mut amount, mut unit) = (bytes as f64, 0);
    while amount >= 1024.0 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{amount:.2}{}", UNITS[unit]) }
}
