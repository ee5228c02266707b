//! The settings of a node and its gateway: one table, and the struct it fills.
//!
//! The table below is the only place that knows a setting's name, default, unit and meaning. Flags,
//! `FLUX_*` variables, the TOML file, `flux config` and the documentation's table are all read off
//! it; `load` puts the sources together. Nothing here reads the environment or the command line,
//! opens a listener, or touches the data directory: the caller passes what it found.

mod error;
mod kind;
mod load;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, num::NonZero, path::PathBuf, thread};

pub use error::ConfigError;
use flux_cdc::Url;
use kind::{
    Address, Broker, Choice, Count, Endpoints, Folder, Kind, Label, OneOf, PowerOfTwo, Registries,
    Size, Switch,
};
pub use kind::{Form, Fsync, LogFormat, LogLevel};
pub use load::{Configuration, Inputs, Origin};

/// One row of the settings table.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The name in a TOML file; flags and variables are derived from it.
    pub name: &'static str,
    /// The default, as it would be written in the environment.
    pub default: &'static str,
    /// What the value counts or is.
    pub unit: &'static str,
    /// What the setting does, in one sentence or two.
    pub meaning: &'static str,
    /// How the value is written in TOML and on the command line.
    pub form: Form,
    allowed: fn() -> String,
}

impl Setting {
    /// The row of this name.
    pub fn named(name: &str) -> Option<&'static Setting> {
        SETTINGS.iter().find(|setting| setting.name == name)
    }

    /// The flag without its dashes: `data-addr`.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The environment variable: `FLUX_DATA_ADDR`.
    pub fn variable(&self) -> String {
        format!("FLUX_{}", self.name.to_uppercase())
    }

    /// What values are allowed, as the end of a sentence that begins with "must be".
    pub fn allowed(&self) -> String {
        (self.allowed)()
    }
}

/// Declares `Settings`, its defaults, and the table, from one list of rows.
macro_rules! settings {
    ($($name:ident: $type:ty = $default:literal, $kind:expr, $unit:literal, $meaning:literal;)+) => {
        /// The effective settings of a process. Every value is within what its row allows.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Settings {
            $(#[doc = $meaning] pub $name: $type,)+
        }

        /// Every setting, in the order of documentation.
        pub const SETTINGS: &[Setting] = &[
            $(Setting {
                name: stringify!($name),
                default: $default,
                unit: $unit,
                meaning: $meaning,
                form: $kind.form(),
                allowed: || $kind.allowed(),
            },)+
        ];

        impl Default for Settings {
            fn default() -> Self {
                Settings {
                    $($name: $kind.parse($default).expect("a default of the table is allowed"),)+
                }
            }
        }

        impl Settings {
            /// Sets one setting from text. False, and nothing changed, when the text is not allowed
            /// or there is no setting of that name.
            pub fn assign(&mut self, name: &str, text: &str) -> bool {
                match name {
                    $(stringify!($name) => match $kind.parse(text) {
                        Some(value) => {
                            self.$name = value;
                            true
                        }
                        None => false,
                    },)+
                    _ => false,
                }
            }

            /// A setting's value as text that `assign` takes; `None` for an unknown name. Of a secret,
            /// the text that may be shown.
            pub fn text(&self, name: &str) -> Option<String> {
                match name {
                    $(stringify!($name) => Some($kind.render(&self.$name)),)+
                    _ => None,
                }
            }
        }
    };
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

settings! {
    data_addr: SocketAddr = "127.0.0.1:7379", Address, "address",
        "Where clients connect: RESP and the native protocol on one port.";
    admin_addr: SocketAddr = "127.0.0.1:7380", Address, "address",
        "Where `/health`, `/ready` and `/metrics` are served over HTTP, and where `flux admin` and the \
         cluster's controller ask.";
    peer_addr: SocketAddr = "127.0.0.1:7381", Address, "address",
        "Where the other nodes of a cluster connect; a node alone does not listen there.";
    grpc_addr: SocketAddr = "127.0.0.1:50052", Address, "address",
        "Where the gRPC service `flux.kv.v1.KV` is served.";
    http_addr: SocketAddr = "127.0.0.1:8080", Address, "address",
        "Where the gateway serves HTTP.";
    gateway_kv_endpoints: Vec<String> = "127.0.0.1:7379", Endpoints, "host:port list",
        "The nodes that `flux gateway` talks to. `flux up` uses its own node instead.";
    gateway_grpc_endpoints: Vec<String> = "127.0.0.1:50052", Endpoints, "host:port list",
        "The nodes from which `flux gateway` has what its watchers are shown. `flux up` uses its own nodes \
         instead.";
    data_dir: PathBuf = "./flux-data", Folder, "folder",
        "Where the log and the snapshots are kept; made if it is not there.";
    fsync: Fsync = "always", Choice(Fsync::NAMES), "policy",
        "When a write is safe from a power cut: `always` before it is acknowledged, `everysec` within \
         a second, `no` when the operating system pleases. A killed process loses nothing under any.";
    workers: usize = "0", Count { least: 0, most: 1024 }, "threads",
        "Event loops that own connections and partitions; 0 is one for each core the process may use.";
    partitions: u32 = "0", PowerOfTwo { most: 16384 }, "partitions",
        "Into how many partitions the 16384 slots are divided. Fixed once the data directory or the \
         cluster exists; 0 is what it was created with, and for a new one 16 alone and 64 in a cluster. A \
         cluster has 8192 at most, 16384 with one replica and 4096 with 5 or 7.";
    etcd_endpoints: Vec<String> = "", Registries, "host:port list",
        "The etcd servers that coordinate the cluster, in any order; none is a node alone. Data is read \
         and written without them.";
    cluster_name: String = "flux", Label { empty: false }, "name",
        "Which cluster to be a part of: several may share the etcd servers.";
    replication_factor: u8 = "3", OneOf(&[1, 3, 5, 7]), "replicas",
        "How many nodes hold each partition, and how many must be there before a cluster is created. \
         Fixed once the cluster exists.";
    zone: String = "", Label { empty: true }, "name",
        "What the node shares with others that may fail together with it: a rack, a room, a provider's \
         zone. A partition's replicas are spread over zones where there are enough.";
    replace_after_s: u64 = "600", Count { least: 1, most: 31_536_000 }, "seconds",
        "When a node has been away so long, its replicas are placed on others.";
    registry_ttl_s: u64 = "10", Count { least: 2, most: 300 }, "seconds",
        "When a node has not been heard of by etcd for so long, it counts as away.";
    election_timeout_ms: u64 = "600", Count { least: 200, most: 60_000 }, "milliseconds",
        "When a partition's leader has not been heard of for so long, and up to half of it more, another \
         one is elected. The same on every node, and fixed once the cluster exists.";
    clock_drift_percent: u8 = "10", Count { least: 0, most: 50 }, "percent",
        "By how much the clocks of two nodes may differ in speed. A leader answers reads by itself for so \
         much less than the election timeout. The same on every node, and fixed once the cluster exists.";
    resp_redirect: bool = "false", Switch, "switch",
        "Answers a Redis client that asks a node for a key that another one leads with MOVED, instead of \
         asking that node for it.";
    move_concurrency: usize = "4", Count { least: 1, most: 1024 }, "moves",
        "How many replicas of the cluster move to other nodes at one time.";
    snapshot_rate: u64 = "64mb", Size { least: 64 * KIB }, "bytes a second",
        "How fast a node sends snapshots to others, all together.";
    replication_memory: u64 = "64mb", Size { least: MIB }, "bytes",
        "Recent log of one worker that is kept in memory for its followers; one that is further behind \
         gets a snapshot.";
    rabbitmq_url: Option<Url> = "", Broker, "address",
        "The RabbitMQ broker that every change is published to; none publishes nothing. The password is \
         never shown. The same on every node.";
    cdc_exchange: String = "flux_kv_events", Label { empty: false }, "name",
        "The durable topic exchange that changes are published to; made if it is not there.";
    cdc_retention_bytes: u64 = "4gb", Size { least: MIB }, "bytes",
        "Log of a node that is kept for the broker and for slow readers, divided among its workers, and \
         one segment of each at least. What a reader has not seen by then it gets as a gap and the current \
         values.";
    cdc_memory_bytes: u64 = "64mb", Size { least: MIB }, "bytes",
        "Recent changes of a node that are kept in memory for readers, divided equally among its partitions.";
    cdc_include_previous: bool = "false", Switch, "switch",
        "Changes also carry the value before; the log then holds that too.";
    cdc_batch_max_events: usize = "1", Count { least: 1, most: 1000 }, "events",
        "The most changes in one message. With 1 a message is one change, else a JSON array of a \
         partition's changes in order.";
    max_watches: usize = "4096", Count { least: 1, most: 1_000_000 }, "watches",
        "Watches of a node at one time, and of a gateway; one more is refused.";
    watch_buffer: u64 = "1mb", Size { least: 64 * KIB }, "bytes",
        "Changes that may wait for one slow watcher; one that has more to come and has not caught up \
         in 10 s is told so and ended, and can resume.";
    max_memory: u64 = "0", Size { least: 0 }, "bytes",
        "Memory for keys and values; a write past it is refused, reads and deletes go on. 0 is no \
         limit.";
    max_connections: usize = "10000", Count { least: 1, most: 1_000_000 }, "connections",
        "Client connections to the data port at one time; one more is told so and closed.";
    idle_timeout_s: u64 = "0", Count { least: 0, most: 31_536_000 }, "seconds",
        "How long a client connection may be silent before it is closed; 0 is for ever.";
    output_buffer_limit: u64 = "64mb", Size { least: 64 * KIB }, "bytes",
        "Replies that may wait for one slow reader; a connection that would pass it is closed.";
    overload_wait_ms: u64 = "1000", Count { least: 1, most: 60_000 }, "milliseconds",
        "When the disk has kept a worker's oldest write waiting so long, new ones are refused with \
         OVERLOADED.";
    max_inflight_bytes: u64 = "64mb", Size { least: MIB }, "bytes",
        "Writes of one worker that may be on their way to the disk; past it new ones are refused with \
         OVERLOADED.";
    segment_bytes: u64 = "64mb", Size { least: MIB }, "bytes",
        "The size of one file of the log.";
    snapshot_log_bytes: u64 = "256mb", Size { least: MIB }, "bytes",
        "A worker takes snapshots, and trims its log behind them, when the log is so long and at least \
         as long as the data.";
    shutdown_timeout_ms: u64 = "10000", Count { least: 0, most: 600_000 }, "milliseconds",
        "How long a graceful stop waits for what is in flight; under `flux up` the gateway and the node \
         stop one after the other and have so long each.";
    insecure: bool = "false", Switch, "switch",
        "Allows listeners that other machines can reach, although nothing asks for a password yet.";
    log_level: LogLevel = "info", Choice(LogLevel::NAMES), "level",
        "The least important messages that the process's own log shows.";
    log_format: LogFormat = "text", Choice(LogFormat::NAMES), "format",
        "How the process's own log is written to standard error: lines of text, or of JSON.";
}

/// Which listeners a process opens, and so which addresses must be safe and free of clashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A node with a gateway.
    Up,
    /// A node.
    Server,
    /// A gateway.
    Gateway,
}

impl Settings {
    /// Checks what no single row can: that no listener is open to other machines unless `insecure`
    /// says so, and that no two listeners want the same port.
    ///
    /// # Errors
    /// `ConfigError::Exposed` or `ConfigError::SameAddress`, naming the settings. The errors say
    /// "default" for where a value is from; `Configuration::validate` knows better.
    pub fn validate(&self, role: Role) -> Result<(), ConfigError> {
        self.check(role, |_| Origin::Default)
    }

    fn check(&self, role: Role, origin: impl Fn(&str) -> Origin) -> Result<(), ConfigError> {
        let (asked, factor) = (self.partitions, self.replication_factor);
        let most = most_partitions(factor);
        if role != Role::Gateway && self.is_clustered() && asked > most {
            let origin = origin("partitions");
            return Err(ConfigError::Partitions { asked, most, factor, origin });
        }
        let listeners = self.listeners(role);
        for &(name, address) in &listeners {
            if !address.ip().to_canonical().is_loopback() && !self.insecure {
                return Err(ConfigError::Exposed { name, address, origin: origin(name) });
            }
        }
        for (at, &(first, a)) in listeners.iter().enumerate() {
            for &(second, b) in &listeners[at + 1..] {
                let overlap =
                    a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
                if a.port() == b.port() && a.port() != 0 && overlap {
                    return Err(ConfigError::SameAddress {
                        first,
                        second,
                        address: b,
                        origin: origin(second),
                    });
                }
            }
        }
        Ok(())
    }

    /// The addresses that a process of this role listens on, by setting.
    pub fn listeners(&self, role: Role) -> Vec<(&'static str, SocketAddr)> {
        let node = [
            ("data_addr", self.data_addr),
            ("admin_addr", self.admin_addr),
            ("peer_addr", self.peer_addr),
            ("grpc_addr", self.grpc_addr),
        ];
        let gateway = [("http_addr", self.http_addr)];
        match role {
            Role::Up => node.into_iter().chain(gateway).collect(),
            Role::Server => node.to_vec(),
            Role::Gateway => gateway.to_vec(),
        }
    }

    /// Whether the node is part of a cluster that etcd coordinates.
    pub fn is_clustered(&self) -> bool {
        !self.etcd_endpoints.is_empty()
    }

    /// How many workers to run: `workers`, or the cores that this process may use.
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => thread::available_parallelism().map_or(1, NonZero::get),
            workers => workers,
        }
    }
}

/// The most partitions of a cluster with so many replicas of each: its placement map names each replica
/// twice, in 19 bytes, and etcd takes requests of 1.5 MiB.
pub fn most_partitions(replication_factor: u8) -> u32 {
    match replication_factor {
        0 | 1 => 16384,
        2 | 3 => 8192,
        _ => 4096,
    }
}

/// The table of settings in Markdown, as it stands in the documentation between the lines
/// `<!-- settings:begin -->` and `<!-- settings:end -->`.
pub fn markdown_table() -> String {
    let mut table =
        String::from("| setting | default | unit | meaning | must be |\n|---|---|---|---|---|\n");
    for setting in SETTINGS {
        let Setting { name, default, unit, meaning, .. } = setting;
        let allowed = setting.allowed();
        let default = if default.is_empty() { "none".to_owned() } else { format!("`{default}`") };
        table += &format!("| `{name}` | {default} | {unit} | {meaning} | {allowed} |\n");
    }
    table
}
