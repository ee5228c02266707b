//! The RESP front: a client's arguments become a plan for partitions, their replies become bytes.
//!
//! Everything here is a function of its arguments: no sockets, no clock, no tables. The worker carries
//! plans out and calls back with the replies. Replies and errors are those of Redis 7.0, whose clients
//! work unchanged; docs/commands.md tells the differences.
//!
//! - `table`: every command, its arity and flags; `plan` looks it up and runs its row.
//! - `strings` with `options`, `keys`, `object`: commands of one or several keys.
//! - `connection`, `transaction`: what changes the `Session`.
//! - `server`, `command`, `config`, `info`: what concerns the node.
//! - `topology`, `cluster`, `redirect`: what clients of Redis Cluster see and are told.
//! - `render`, `errors`: replies.

mod cluster;
mod command;
mod config;
mod connection;
pub mod errors;
mod info;
mod keys;
mod node;
mod object;
mod options;
mod redirect;
mod render;
mod request;
mod server;
mod session;
mod strings;
mod table;
#[cfg(test)]
mod tests;
mod topology;
mod transaction;

use flux_core::{Command, PartitionId, Partitions, Slot, UnixMillis};
use flux_proto::resp::{Args, write};

pub use config::{RunningSettings, redis_settings};
pub use info::{NodeInfo, info};
pub use node::{ClientFilter, NodeCommand, NodeReply, ScanCursor, render_node};
pub use render::{render, render_gathered};
use request::{Refusal, Request};
pub use session::{Session, SlotWalk};
pub use topology::{ClusterNode, ClusterPartition, ClusterView, Route};

/// The version of Redis whose commands and replies these are.
pub const REDIS_VERSION: &str = "7.0.15";

/// What static answers need of the node.
#[derive(Clone, Copy)]
pub struct NodeView<'n> {
    /// How keys are divided.
    pub partitions: Partitions,
    /// The node's time, in microseconds since the Unix epoch.
    pub now_us: u64,
    /// Makes the settings as `CONFIG GET` answers them; see `redis_settings`.
    pub settings: &'n dyn Fn() -> Vec<(&'static str, String)>,
    /// Makes the view of the cluster; called for the commands that show it.
    pub cluster: &'n dyn Fn() -> ClusterView,
    /// Where commands on a slot belong, if clients are to find the right node themselves: asked for every
    /// command with keys. None where commands are taken whatever their keys.
    pub redirect: Option<&'n dyn Fn(Slot) -> Route>,
}

impl NodeView<'_> {
    /// The node's time, in milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> UnixMillis {
        self.now_us / 1000
    }
}

/// What a command asks of the node.
#[derive(Debug)]
pub enum Plan<'a> {
    /// Nothing more: the reply, if there is one, is in `out`.
    Done,
    /// A command of one partition; `render` makes its reply.
    One {
        /// Where the command runs.
        partition: PartitionId,
        /// What runs.
        command: Command<&'a [u8]>,
        /// How its reply is rendered.
        form: Form,
    },
    /// The same for a transaction, whose commands were queued and own their bytes.
    Transaction {
        /// Where the transaction runs.
        partition: PartitionId,
        /// A `Command::Transaction`.
        command: Command<Vec<u8>>,
        /// How its reply is rendered.
        form: Form,
    },
    /// Commands of several partitions, atomic in each; `render_gathered` makes one reply of theirs.
    Many {
        /// Commands with their partitions; at most one for each where they are writes.
        parts: Vec<(PartitionId, Command<&'a [u8]>)>,
        /// How their replies are rendered.
        gather: Gather,
    },
    /// A command that needs more of the node than one table. It runs when all earlier ones of the
    /// connection are answered.
    Node(NodeCommand<'a>),
    /// Nothing was done: plan the same command again when all earlier ones are answered and rendered.
    /// Their replies decide what it does.
    Later,
    /// The connection closes after what is in `out`.
    Close,
}

/// How the reply of one partition is rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// A value, or no value.
    Value,
    /// Bytes.
    Bytes,
    /// An integer, a counter or a length.
    Integer,
    /// `OK`, or no value where a condition did not hold.
    Written,
    /// 1, or 0 where a condition did not hold.
    WrittenCount,
    /// The value before.
    Previous,
    /// Values in the order of their keys.
    Values,
    /// `OK`.
    Renamed,
    /// The longest common subsequence itself.
    LcsText,
    /// Its length.
    LcsLength,
    /// Where its runs of at least `min_length` stand.
    LcsRuns {
        /// Shorter runs are left out.
        min_length: usize,
        /// Each run has its length with it.
        with_length: bool,
    },
    /// The time to live; -1 where there is no expiry, -2 where there is no key.
    TimeLeft {
        /// In seconds, rounded, instead of milliseconds.
        seconds: bool,
        /// The time that it counts from.
        now_ms: UnixMillis,
    },
    /// The time of expiry; -1 and -2 as above.
    ExpiresAt {
        /// In seconds instead of milliseconds.
        seconds: bool,
    },
    /// The type of a value.
    Type,
    /// How Redis would keep the value.
    Encoding,
    /// The seconds since the key was written.
    IdleSeconds {
        /// The time that they count to.
        now_ms: UnixMillis,
    },
    /// 1 where the key is there.
    References,
    /// An error where the key is there.
    Frequency,
    /// Bytes in memory.
    MemoryUsage,
    /// `OK`, after the session took the key's version.
    Watched {
        /// The key.
        key: Box<[u8]>,
    },
    /// An array with the reply of each queued command, or no value where a watched key changed.
    Transaction {
        /// One for each queued command.
        parts: Box<[TransactionPart]>,
    },
}

/// The reply of one queued command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransactionPart {
    /// The next reply of the partition, in this form.
    Partition(Form),
    /// Rendered already: the command needed no partition.
    Rendered(Box<[u8]>),
}

/// How the replies of several partitions become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gather {
    /// The values of keys, in the order asked.
    Values {
        /// For each key the part that has it; keys of a part are in the order asked.
        part_of_key: Box<[u16]>,
    },
    /// The sum.
    Sum {
        /// Whether the commands are writes, some of which may have happened when others failed.
        is_write: bool,
    },
    /// `OK`, when every part was written.
    Written,
    /// `OK`, after the session took the versions of the keys.
    Watched {
        /// The keys of the parts, in their order.
        keys: Box<[Box<[u8]>]>,
    },
}

/// Makes a plan of a command.
///
/// What needs no partition is answered into `out` at once. Commands of one connection must be planned
/// in the order they came, and their replies must be rendered in that order.
pub fn plan<'a>(
    args: Args<'a>,
    session: &mut Session,
    node: &NodeView<'_>,
    out: &mut Vec<u8>,
) -> Plan<'a> {
    session.last_active_ms = node.now_ms();
    match find(args) {
        Ok(None) => Plan::Done,
        Ok(Some(spec)) => {
            session.last_command = spec.name;
            if let Some(route) = node.redirect
                && let Err(refusal) = redirect::check(route, spec, args, session)
            {
                redirect::note(spec, session);
                write::error(out, &refusal.0);
                return Plan::Done;
            }
            if let Some(transaction) = &mut session.transaction
                && !spec.has(table::IMMEDIATE)
            {
                let queued = transaction.push(spec, args);
                transaction::answer_queued(queued, out);
                return Plan::Done;
            }
            run(&mut Request { args, spec, session, node, out })
        }
        Err(refusal) => {
            if refusal.0.starts_with("EXECABORT") {
                session.transaction = None;
            } else if let Some(transaction) = &mut session.transaction {
                transaction.failed = true;
            }
            write::error(out, &refusal.0);
            Plan::Done
        }
    }
}

/// Carries out a command, in or out of a transaction.
fn run<'a>(request: &mut Request<'a, '_>) -> Plan<'a> {
    (request.spec.run)(request).unwrap_or_else(|refusal| {
        write::error(request.out, &refusal.0);
        Plan::Done
    })
}

/// The row of a command, or of its subcommand; none for a command without even a name.
fn find(args: Args<'_>) -> Result<Option<&'static table::Spec>, Refusal> {
    let Some(name) = args.get(0) else {
        return Ok(None);
    };
    let Some(spec) = table::lookup(name) else {
        return Err(command::unknown(args));
    };
    if spec.subcommands.is_empty() || args.len() == 1 {
        let well_formed = spec.accepts(args.len());
        return if well_formed { Ok(Some(spec)) } else { Err(Refusal::arity(spec)) };
    }
    match table::subcommand(spec, args.at(1)) {
        Some(sub) if sub.accepts(args.len()) => Ok(Some(sub)),
        Some(sub) => Err(Refusal::arity(sub)),
        None => Err(command::unknown_subcommand(spec, args.at(1))),
    }
}
