//! The table of commands: what `COMMAND` reports, what arity is checked against, and what carries each
//! command out.

use super::request::{Outcome, Request};
use super::{cluster, command, config, connection, keys, object, server, strings, transaction};

/// A command or, where the name has a `|`, a subcommand.
#[derive(Debug)]
pub(super) struct Spec {
    /// In lower case.
    pub(super) name: &'static str,
    /// How many arguments, the name included; negative: at least so many.
    pub(super) arity: i16,
    pub(super) flags: u32,
    /// Where keys stand: the first, the last (negative: from the end) and the step; 0 for none.
    pub(super) keys: (i8, i8, i8),
    pub(super) group: &'static str,
    /// The version of Redis that has had it first.
    pub(super) since: &'static str,
    pub(super) summary: &'static str,
    pub(super) run: for<'a> fn(&mut Request<'a, '_>) -> Outcome<'a>,
    pub(super) subcommands: &'static [Spec],
}

// Flags as COMMAND INFO names them.
pub(super) const WRITE: u32 = 1;
pub(super) const READONLY: u32 = 1 << 1;
pub(super) const DENYOOM: u32 = 1 << 2;
pub(super) const ADMIN: u32 = 1 << 3;
pub(super) const NOSCRIPT: u32 = 1 << 4;
pub(super) const LOADING: u32 = 1 << 5;
pub(super) const STALE: u32 = 1 << 6;
pub(super) const FAST: u32 = 1 << 7;
pub(super) const NO_AUTH: u32 = 1 << 8;
pub(super) const ALLOW_BUSY: u32 = 1 << 9;
/// Refused inside MULTI: it concerns the whole node, and a transaction one partition.
pub(super) const NO_MULTI: u32 = 1 << 10;
/// Runs at once inside MULTI, too, instead of being queued.
pub(super) const IMMEDIATE: u32 = 1 << 11;
/// Refused while a replica loads its data.
pub(super) const NO_ASYNC_LOADING: u32 = 1 << 12;
// Categories of access control.
pub(super) const KEYSPACE: u32 = 1 << 16;
pub(super) const STRING: u32 = 1 << 17;
pub(super) const DANGEROUS: u32 = 1 << 18;
pub(super) const CONNECTION: u32 = 1 << 19;
pub(super) const TRANSACTION: u32 = 1 << 20;

/// The flags that clients see, with their names.
pub(super) const FLAG_NAMES: [(u32, &str); 12] = [
    (WRITE, "write"),
    (READONLY, "readonly"),
    (DENYOOM, "denyoom"),
    (ADMIN, "admin"),
    (NOSCRIPT, "noscript"),
    (LOADING, "loading"),
    (STALE, "stale"),
    (FAST, "fast"),
    (NO_AUTH, "no_auth"),
    (NO_ASYNC_LOADING, "no_async_loading"),
    (ALLOW_BUSY, "allow_busy"),
    (NO_MULTI, "no_multi"),
];

impl Spec {
    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether a command of so many arguments, the name included, is well-formed.
    pub(super) fn accepts(&self, count: usize) -> bool {
        let arity = usize::from(self.arity.unsigned_abs());
        if self.arity < 0 { count >= arity } else { count == arity }
    }

    /// Where the keys stand in a command of so many arguments, the name included.
    pub(super) fn key_positions(
        &self,
        count: usize,
    ) -> impl ExactSizeIterator<Item = usize> + Clone + use<> {
        let (first, last, step) = self.keys;
        let end = match last {
            _ if first == 0 => 0,
            0.. => last as usize + 1,
            _ => (count + 1).saturating_add_signed(isize::from(last)),
        };
        (first as usize..end.min(count)).step_by(step.max(1) as usize)
    }

    /// The categories of access control, in Redis's order.
    pub(super) fn categories(&self) -> impl Iterator<Item = &'static str> {
        let admin = self.has(ADMIN);
        [
            (self.has(KEYSPACE), "@keyspace"),
            (self.has(READONLY), "@read"),
            (self.has(WRITE), "@write"),
            (self.has(STRING), "@string"),
            (admin, "@admin"),
            (self.has(FAST), "@fast"),
            (!self.has(FAST), "@slow"),
            (admin || self.has(DANGEROUS), "@dangerous"),
            (self.has(CONNECTION), "@connection"),
            (self.has(TRANSACTION), "@transaction"),
        ]
        .into_iter()
        .filter_map(|(belongs, name)| belongs.then_some(name))
    }
}

/// One row for each command, with the subcommands of a container in `{}` behind it.
macro_rules! commands {
    ($($name:literal $arity:literal [$($flags:tt)*] $keys:tt $group:literal $since:literal $summary:literal => $run:path $({ $($subcommands:tt)* })?;)*) => {
        &[$(Spec {
            name: $name,
            arity: $arity,
            flags: $($flags)*,
            keys: $keys,
            group: $group,
            since: $since,
            summary: $summary,
            run: $run,
            subcommands: commands!($($($subcommands)*)?),
        }),*]
    };
}

/// Every command.
pub(super) static COMMANDS: &[Spec] = commands! {
    "get" 2 [READONLY | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Returns the value of a key." => strings::get;
    "set" -3 [WRITE | DENYOOM | STRING] (1, 1, 1) "string" "1.0.0"
        "Sets the value of a key." => strings::set;
    "setnx" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Sets the value of a key that does not exist." => strings::setnx;
    "setex" 4 [WRITE | DENYOOM | STRING] (1, 1, 1) "string" "2.0.0"
        "Sets the value of a key and its time to live in seconds." => strings::setex;
    "psetex" 4 [WRITE | DENYOOM | STRING] (1, 1, 1) "string" "2.6.0"
        "Sets the value of a key and its time to live in milliseconds." => strings::psetex;
    "getset" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Sets the value of a key and returns the one before." => strings::getset;
    "getdel" 2 [WRITE | FAST | STRING] (1, 1, 1) "string" "6.2.0"
        "Deletes a key and returns its value." => strings::getdel;
    "getex" -2 [WRITE | FAST | STRING] (1, 1, 1) "string" "6.2.0"
        "Returns the value of a key and changes its expiry." => strings::getex;
    "mget" -2 [READONLY | FAST | STRING] (1, -1, 1) "string" "1.0.0"
        "Returns the values of keys; atomic per partition." => strings::mget;
    "mset" -3 [WRITE | DENYOOM | STRING] (1, -1, 2) "string" "1.0.1"
        "Sets the values of keys; atomic per partition." => strings::mset;
    "msetnx" -3 [WRITE | DENYOOM | STRING] (1, -1, 2) "string" "1.0.1"
        "Sets the values of keys of one partition, if none of them exists." => strings::msetnx;
    "append" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "2.0.0"
        "Appends to a value." => strings::append;
    "strlen" 2 [READONLY | FAST | STRING] (1, 1, 1) "string" "2.2.0"
        "Returns the length of a value." => strings::strlen;
    "getrange" 4 [READONLY | STRING] (1, 1, 1) "string" "2.4.0"
        "Returns a part of a value." => strings::getrange;
    "substr" 4 [READONLY | STRING] (1, 1, 1) "string" "1.0.0"
        "Returns a part of a value; the old name of GETRANGE." => strings::getrange;
    "setrange" 4 [WRITE | DENYOOM | STRING] (1, 1, 1) "string" "2.2.0"
        "Overwrites a part of a value." => strings::setrange;
    "incr" 2 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Adds one to an integer." => strings::incr;
    "decr" 2 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Subtracts one from an integer." => strings::decr;
    "incrby" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Adds to an integer." => strings::incrby;
    "decrby" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "1.0.0"
        "Subtracts from an integer." => strings::decrby;
    "incrbyfloat" 3 [WRITE | DENYOOM | FAST | STRING] (1, 1, 1) "string" "2.6.0"
        "Adds to a floating point number." => strings::incrbyfloat;
    "lcs" -3 [READONLY | STRING] (1, 2, 1) "string" "7.0.0"
        "Finds the longest common subsequence of two values of one partition." => strings::lcs;

    "del" -2 [WRITE | KEYSPACE] (1, -1, 1) "generic" "1.0.0"
        "Deletes keys; atomic per partition." => keys::delete;
    "unlink" -2 [WRITE | FAST | KEYSPACE] (1, -1, 1) "generic" "4.0.0"
        "Deletes keys, as DEL." => keys::delete;
    "exists" -2 [READONLY | FAST | KEYSPACE] (1, -1, 1) "generic" "1.0.0"
        "Counts the keys that exist." => keys::exists;
    "touch" -2 [READONLY | FAST | KEYSPACE] (1, -1, 1) "generic" "3.2.1"
        "Counts the keys that exist, as EXISTS." => keys::exists;
    "type" 2 [READONLY | FAST | KEYSPACE] (1, 1, 1) "generic" "1.0.0"
        "Returns the type of a value." => keys::kind;
    "keys" 2 [READONLY | KEYSPACE | DANGEROUS | NO_MULTI] (0, 0, 0) "generic" "1.0.0"
        "Returns all keys that match a pattern." => keys::keys;
    "scan" -2 [READONLY | KEYSPACE | NO_MULTI] (0, 0, 0) "generic" "2.8.0"
        "Walks the keys, a page at a time." => keys::scan;
    "randomkey" 1 [READONLY | KEYSPACE | NO_MULTI] (0, 0, 0) "generic" "1.0.0"
        "Returns some key." => keys::random;
    "rename" 3 [WRITE | KEYSPACE] (1, 2, 1) "generic" "1.0.0"
        "Renames a key within its partition." => keys::rename;
    "renamenx" 3 [WRITE | FAST | KEYSPACE] (1, 2, 1) "generic" "1.0.0"
        "Renames a key within its partition, if the new name does not exist." => keys::renamenx;
    "copy" -3 [WRITE | DENYOOM | KEYSPACE] (1, 2, 1) "generic" "6.2.0"
        "Copies a key within its partition." => keys::copy;
    "expire" -3 [WRITE | FAST | KEYSPACE] (1, 1, 1) "generic" "1.0.0"
        "Sets the time to live of a key in seconds." => keys::expire;
    "pexpire" -3 [WRITE | FAST | KEYSPACE] (1, 1, 1) "generic" "2.6.0"
        "Sets the time to live of a key in milliseconds." => keys::pexpire;
    "expireat" -3 [WRITE | FAST | KEYSPACE] (1, 1, 1) "generic" "1.2.0"
        "Sets when a key expires, in seconds since the Unix epoch." => keys::expireat;
    "pexpireat" -3 [WRITE | FAST | KEYSPACE] (1, 1, 1) "generic" "2.6.0"
        "Sets when a key expires, in milliseconds since the Unix epoch." => keys::pexpireat;
    "ttl" 2 [READONLY | FAST | KEYSPACE] (1, 1, 1) "generic" "1.0.0"
        "Returns the time to live of a key in seconds." => keys::ttl;
    "pttl" 2 [READONLY | FAST | KEYSPACE] (1, 1, 1) "generic" "2.6.0"
        "Returns the time to live of a key in milliseconds." => keys::pttl;
    "expiretime" 2 [READONLY | FAST | KEYSPACE] (1, 1, 1) "generic" "7.0.0"
        "Returns when a key expires, in seconds since the Unix epoch." => keys::expiretime;
    "pexpiretime" 2 [READONLY | FAST | KEYSPACE] (1, 1, 1) "generic" "7.0.0"
        "Returns when a key expires, in milliseconds since the Unix epoch." => keys::pexpiretime;
    "persist" 2 [WRITE | FAST | KEYSPACE] (1, 1, 1) "generic" "2.2.0"
        "Removes the expiry of a key." => keys::persist;
    "object" -2 [0] (0, 0, 0) "generic" "2.2.3"
        "A container of commands about how a value is kept." => connection::container {
        "object|encoding" 3 [READONLY | KEYSPACE] (2, 2, 1) "generic" "2.2.3"
            "Returns how Redis would keep the value." => object::encoding;
        "object|freq" 3 [READONLY | KEYSPACE] (2, 2, 1) "generic" "4.0.0"
            "Answers that access frequencies are not tracked." => object::freq;
        "object|idletime" 3 [READONLY | KEYSPACE] (2, 2, 1) "generic" "2.2.3"
            "Returns the seconds since the key was last written." => object::idletime;
        "object|refcount" 3 [READONLY | KEYSPACE] (2, 2, 1) "generic" "2.2.3"
            "Returns 1 for every key." => object::refcount;
        "object|help" 2 [LOADING | STALE | KEYSPACE] (0, 0, 0) "generic" "6.2.0"
            "Lists the subcommands." => command::help;
    };
    "memory" -2 [0] (0, 0, 0) "server" "4.0.0"
        "A container of commands about memory." => connection::container {
        "memory|usage" -3 [READONLY] (2, 2, 1) "server" "4.0.0"
            "Returns what a key takes in memory, in bytes." => object::memory_usage;
        "memory|help" 2 [LOADING | STALE] (0, 0, 0) "server" "4.0.0"
            "Lists the subcommands." => command::help;
    };

    "ping" -1 [FAST | CONNECTION] (0, 0, 0) "connection" "1.0.0"
        "Answers PONG, or the message." => connection::ping;
    "echo" 2 [LOADING | STALE | FAST | CONNECTION] (0, 0, 0) "connection" "1.0.0"
        "Answers the message." => connection::echo;
    "hello" -1 [NOSCRIPT | LOADING | STALE | FAST | NO_AUTH | ALLOW_BUSY | CONNECTION] (0, 0, 0) "connection" "6.0.0"
        "Chooses the version of the protocol." => connection::hello;
    "auth" -2 [NOSCRIPT | LOADING | STALE | FAST | NO_AUTH | ALLOW_BUSY | CONNECTION] (0, 0, 0) "connection" "1.0.0"
        "Authenticates the connection." => connection::auth;
    "select" 2 [LOADING | STALE | FAST | CONNECTION] (0, 0, 0) "connection" "1.0.0"
        "Selects the database, of which there is one: 0." => connection::select;
    "quit" -1 [NOSCRIPT | LOADING | STALE | FAST | NO_AUTH | ALLOW_BUSY | CONNECTION | IMMEDIATE] (0, 0, 0) "connection" "1.0.0"
        "Closes the connection." => connection::quit;
    "reset" 1 [NOSCRIPT | LOADING | STALE | FAST | NO_AUTH | ALLOW_BUSY | CONNECTION | IMMEDIATE] (0, 0, 0) "connection" "6.2.0"
        "Makes the connection as it was when it was opened." => connection::reset;
    "client" -2 [0] (0, 0, 0) "connection" "2.4.0"
        "A container of commands about connections." => connection::container {
        "client|getname" 2 [NOSCRIPT | LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "2.6.9"
            "Returns the name of the connection." => connection::client_getname;
        "client|help" 2 [LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "5.0.0"
            "Lists the subcommands." => command::help;
        "client|id" 2 [NOSCRIPT | LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "5.0.0"
            "Returns the number of the connection." => connection::client_id;
        "client|info" 2 [NOSCRIPT | LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "6.2.0"
            "Describes the connection." => connection::client_info;
        "client|kill" -3 [ADMIN | NOSCRIPT | LOADING | STALE | CONNECTION | NO_MULTI] (0, 0, 0) "connection" "2.4.0"
            "Closes connections." => connection::client_kill;
        "client|list" -2 [ADMIN | NOSCRIPT | LOADING | STALE | CONNECTION | NO_MULTI] (0, 0, 0) "connection" "2.4.0"
            "Describes all connections." => connection::client_list;
        "client|setinfo" 4 [NOSCRIPT | LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "7.2.0"
            "Tells the name and version of the client's library." => connection::client_setinfo;
        "client|setname" 3 [NOSCRIPT | LOADING | STALE | CONNECTION] (0, 0, 0) "connection" "2.6.9"
            "Names the connection." => connection::client_setname;
    };

    "multi" 1 [NOSCRIPT | LOADING | STALE | FAST | ALLOW_BUSY | TRANSACTION | IMMEDIATE] (0, 0, 0) "transactions" "1.2.0"
        "Starts a transaction: commands are queued until EXEC." => transaction::multi;
    "exec" 1 [NOSCRIPT | LOADING | STALE | TRANSACTION | IMMEDIATE] (0, 0, 0) "transactions" "1.2.0"
        "Executes the queued commands as one; their keys must be of one partition." => transaction::exec;
    "discard" 1 [NOSCRIPT | LOADING | STALE | FAST | ALLOW_BUSY | TRANSACTION | IMMEDIATE] (0, 0, 0) "transactions" "2.0.0"
        "Drops the queued commands." => transaction::discard;
    "watch" -2 [NOSCRIPT | LOADING | STALE | FAST | ALLOW_BUSY | TRANSACTION | IMMEDIATE] (1, -1, 1) "transactions" "2.2.0"
        "Makes the next EXEC depend on keys that do not change." => transaction::watch;
    "unwatch" 1 [NOSCRIPT | LOADING | STALE | FAST | ALLOW_BUSY | TRANSACTION] (0, 0, 0) "transactions" "2.2.0"
        "Forgets the watched keys." => transaction::unwatch;

    "command" -1 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "2.8.13"
        "Describes the commands." => command::all {
        "command|count" 2 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "2.8.13"
            "Counts the commands." => command::count;
        "command|docs" -2 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "7.0.0"
            "Returns what commands are for." => command::docs;
        "command|getkeys" -4 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "2.8.13"
            "Returns the keys in a command." => command::getkeys;
        "command|help" 2 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "5.0.0"
            "Lists the subcommands." => command::help;
        "command|info" -2 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "2.8.13"
            "Describes commands." => command::info;
        "command|list" -2 [LOADING | STALE | CONNECTION] (0, 0, 0) "server" "7.0.0"
            "Names the commands." => command::list;
    };
    "config" -2 [0] (0, 0, 0) "server" "2.0.0"
        "A container of commands about settings." => connection::container {
        "config|get" -3 [ADMIN | NOSCRIPT | LOADING | STALE] (0, 0, 0) "server" "2.0.0"
            "Returns settings under the names that Redis has for them." => config::get;
        "config|help" 2 [LOADING | STALE] (0, 0, 0) "server" "5.0.0"
            "Lists the subcommands." => command::help;
        "config|resetstat" 2 [ADMIN | NOSCRIPT | LOADING | STALE | NO_MULTI] (0, 0, 0) "server" "2.0.0"
            "Sets the counters of INFO to zero." => config::resetstat;
        "config|set" -4 [ADMIN | NOSCRIPT | LOADING | STALE | NO_MULTI] (0, 0, 0) "server" "2.0.0"
            "Changes settings until the next start." => config::set;
    };
    "info" -1 [LOADING | STALE | DANGEROUS | NO_MULTI] (0, 0, 0) "server" "1.0.0"
        "Returns figures of the node." => server::info;
    "dbsize" 1 [READONLY | FAST | KEYSPACE | NO_MULTI] (0, 0, 0) "server" "1.0.0"
        "Counts the keys." => server::dbsize;
    "flushdb" -1 [WRITE | KEYSPACE | DANGEROUS | NO_MULTI] (0, 0, 0) "server" "1.0.0"
        "Deletes all keys, partition by partition." => server::flush;
    "flushall" -1 [WRITE | KEYSPACE | DANGEROUS | NO_MULTI] (0, 0, 0) "server" "1.0.0"
        "Deletes all keys, partition by partition." => server::flush;
    "time" 1 [LOADING | STALE | FAST] (0, 0, 0) "server" "2.6.0"
        "Returns the node's time." => server::time;
    "lolwut" -1 [READONLY | FAST] (0, 0, 0) "server" "5.0.0"
        "Returns the version, and a picture." => server::lolwut;
    "debug" -2 [ADMIN | NOSCRIPT | LOADING | STALE | NO_MULTI] (0, 0, 0) "server" "1.0.0"
        "A container of commands for tests." => server::debug;
    "wait" 3 [NOSCRIPT | CONNECTION] (0, 0, 0) "generic" "3.0.0"
        "Returns how many replicas have the connection's writes." => cluster::wait;

    "cluster" -2 [0] (0, 0, 0) "cluster" "3.0.0"
        "A container of commands about the cluster." => connection::container {
        "cluster|addslots" -3 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|addslotsrange" -4 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "7.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|bumpepoch" 2 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|countkeysinslot" 3 [STALE | NO_MULTI] (0, 0, 0) "cluster" "3.0.0"
            "Counts the keys of a slot on this node." => cluster::countkeysinslot;
        "cluster|delslots" -3 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|delslotsrange" -4 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "7.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|failover" -2 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|flushslots" 2 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|forget" 3 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|getkeysinslot" 4 [STALE | NO_MULTI] (0, 0, 0) "cluster" "3.0.0"
            "Returns keys of a slot on this node." => cluster::getkeysinslot;
        "cluster|help" 2 [LOADING | STALE] (0, 0, 0) "cluster" "5.0.0"
            "Lists the subcommands." => cluster::help;
        "cluster|info" 2 [STALE] (0, 0, 0) "cluster" "3.0.0"
            "Returns the state of the cluster." => cluster::info;
        "cluster|keyslot" 3 [STALE] (0, 0, 0) "cluster" "3.0.0"
            "Returns the slot of a key." => cluster::keyslot;
        "cluster|meet" -4 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|myid" 2 [STALE] (0, 0, 0) "cluster" "3.0.0"
            "Returns the id of this node." => cluster::myid;
        "cluster|nodes" 2 [STALE] (0, 0, 0) "cluster" "3.0.0"
            "Describes the nodes, a line for each." => cluster::nodes;
        "cluster|replicate" 3 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|reset" -2 [ADMIN | NOSCRIPT | STALE] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|saveconfig" 2 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|set-config-epoch" 3 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|setslot" -4 [ADMIN | STALE | NO_ASYNC_LOADING] (0, 0, 0) "cluster" "3.0.0"
            "Is refused: `flux admin` does such things." => cluster::administer;
        "cluster|shards" 2 [STALE] (0, 0, 0) "cluster" "7.0.0"
            "Returns the slots and the nodes that have them, by node." => cluster::shards;
        "cluster|slots" 2 [STALE] (0, 0, 0) "cluster" "3.0.0"
            "Returns the slots and the nodes that have them, by slot." => cluster::slots;
    };
    "readonly" 1 [LOADING | STALE | FAST | CONNECTION] (0, 0, 0) "cluster" "3.0.0"
        "Lets the connection read from replicas, which may be behind." => cluster::readonly;
    "readwrite" 1 [LOADING | STALE | FAST | CONNECTION] (0, 0, 0) "cluster" "3.0.0"
        "Ends what READONLY began." => cluster::readwrite;
    "asking" 1 [FAST | CONNECTION] (0, 0, 0) "cluster" "3.0.0"
        "Is accepted; no slot is ever half moved." => cluster::asking;
    "role" 1 [NOSCRIPT | LOADING | STALE | FAST | ADMIN] (0, 0, 0) "server" "2.8.12"
        "Returns whether the node leads, and who has its keys besides." => cluster::role;
};

/// The longest name is shorter than this.
const MAX_NAME_BYTES: usize = 16;

const BUCKETS: usize = 512;
const EMPTY: u8 = u8::MAX;

/// Positions in `COMMANDS` by the hash of the name, with linear probing.
static INDEX: [u8; BUCKETS] = {
    let mut index = [EMPTY; BUCKETS];
    let mut position = 0;
    while position < COMMANDS.len() {
        let name = COMMANDS[position].name.as_bytes();
        assert!(name.len() < MAX_NAME_BYTES);
        let mut bucket = hash(name);
        while index[bucket] != EMPTY {
            bucket = (bucket + 1) % BUCKETS;
        }
        index[bucket] = position as u8;
        position += 1;
    }
    index
};

/// Few names, all known: a hash of the length and three characters is enough.
const fn hash(name: &[u8]) -> usize {
    let length = name.len();
    if length == 0 {
        return 0;
    }
    let (first, middle, last) = (name[0], name[length / 2], name[length - 1]);
    (first as usize * 31 + middle as usize * 7 + last as usize * 3 + length * 61) % BUCKETS
}

/// The command of this name, in upper or lower case.
pub(super) fn lookup(name: &[u8]) -> Option<&'static Spec> {
    let mut lower = [0; MAX_NAME_BYTES];
    let lower = lower.get_mut(..name.len())?;
    for (to, from) in lower.iter_mut().zip(name) {
        *to = from.to_ascii_lowercase();
    }
    let mut bucket = hash(lower);
    loop {
        // There are more buckets than commands, so the search ends.
        let spec = COMMANDS.get(usize::from(INDEX[bucket]))?;
        if spec.name.as_bytes() == lower {
            return Some(spec);
        }
        bucket = (bucket + 1) % BUCKETS;
    }
}

/// The subcommand of this name, which is the part after the `|`.
pub(super) fn subcommand(container: &Spec, name: &[u8]) -> Option<&'static Spec> {
    container.subcommands.iter().find(|spec| {
        let own = spec.name.split_once('|').map_or("", |(_, own)| own);
        own.as_bytes().eq_ignore_ascii_case(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_found_in_any_case() {
        for spec in COMMANDS {
            let found = lookup(spec.name.as_bytes()).expect("in the table");
            assert!(std::ptr::eq(found, spec));
            let found = lookup(spec.name.to_uppercase().as_bytes()).expect("in the table");
            assert!(std::ptr::eq(found, spec));
            for sub in spec.subcommands {
                let (container, name) = sub.name.split_once('|').expect("a subcommand");
                assert_eq!(container, spec.name);
                assert!(std::ptr::eq(subcommand(spec, name.as_bytes()).expect("listed"), sub));
            }
        }
        for name in
            ["", "ge", "gett", "lpush", "client|id", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
        {
            assert!(lookup(name.as_bytes()).is_none(), "{name}");
        }
    }

    #[test]
    fn most_commands_are_found_at_once() {
        let mut probes = 0;
        for spec in COMMANDS {
            let mut bucket = hash(spec.name.as_bytes());
            while COMMANDS[usize::from(INDEX[bucket])].name != spec.name {
                bucket = (bucket + 1) % BUCKETS;
                probes += 1;
            }
        }
        assert!(probes < COMMANDS.len() / 4, "{probes} extra probes");
        for name in ["get", "set"] {
            assert_eq!(COMMANDS[usize::from(INDEX[hash(name.as_bytes())])].name, name);
        }
    }
}
