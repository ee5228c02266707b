//! CONFIG: settings under the names that Redis has for them.
//!
//! What can be changed while the node runs is little, and lasts until it stops: the configuration file
//! is the place for settings.

use std::net::SocketAddr;
use std::path::Path;

use flux_core::{MAX_VALUE_BYTES, glob};
use flux_proto::resp::{parse_integer, write};

use super::request::{Outcome, Refusal, Request};
use super::{NodeCommand, Plan};

/// The settings that `CONFIG` shows.
#[derive(Clone, Copy, Debug)]
pub struct RunningSettings<'a> {
    /// The address of the data listener.
    pub data_addr: SocketAddr,
    /// The data directory.
    pub data_dir: &'a Path,
    /// The fsync policy in Redis's words: `always`, `everysec`, `no`.
    pub fsync: &'a str,
    /// The limit of memory in bytes; 0 for none.
    pub max_memory: u64,
    /// The most connections.
    pub max_clients: usize,
    /// The time after which an idle connection is closed, in seconds; 0 for never.
    pub timeout_s: u64,
    /// Whether the node is one of a cluster.
    pub cluster_enabled: bool,
}

/// Settings under the names that Redis has for them.
pub fn redis_settings(settings: &RunningSettings<'_>) -> Vec<(&'static str, String)> {
    vec![
        ("appendfsync", settings.fsync.to_owned()),
        ("appendonly", "yes".to_owned()),
        ("bind", settings.data_addr.ip().to_string()),
        ("cluster-enabled", if settings.cluster_enabled { "yes" } else { "no" }.to_owned()),
        ("databases", "1".to_owned()),
        ("dir", settings.data_dir.display().to_string()),
        ("maxclients", settings.max_clients.to_string()),
        ("maxmemory", settings.max_memory.to_string()),
        ("maxmemory-policy", "noeviction".to_owned()),
        ("port", settings.data_addr.port().to_string()),
        ("proto-max-bulk-len", MAX_VALUE_BYTES.to_string()),
        ("save", String::new()),
        ("timeout", settings.timeout_s.to_string()),
    ]
}

pub(super) fn get<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let patterns: Vec<Vec<u8>> =
        request.args.from(2).iter().map(<[u8]>::to_ascii_lowercase).collect();
    let matches =
        |name: &str| patterns.iter().any(|pattern| glob::matches(pattern, name.as_bytes()));
    let settings = (request.node.settings)();
    let found = || settings.iter().filter(|(name, _)| matches(name));
    write::map(request.out, found().count(), request.session.version);
    for (name, value) in found() {
        write::bulk(request.out, name.as_bytes());
        write::bulk(request.out, value.as_bytes());
    }
    Ok(Plan::Done)
}

pub(super) fn resetstat<'a>(_: &mut Request<'a, '_>) -> Outcome<'a> {
    Ok(Plan::Node(NodeCommand::ResetStats))
}

pub(super) fn set<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let pairs = request.args.from(2);
    if !pairs.len().is_multiple_of(2) {
        return Err(Refusal::SYNTAX);
    }
    let names = || pairs.iter().step_by(2).map(<[u8]>::to_ascii_lowercase);
    let settings = (request.node.settings)();
    let known = |name: &[u8]| settings.iter().any(|(known, _)| known.as_bytes() == name);
    if let Some(name) = names().find(|name| !known(name)) {
        let name = String::from_utf8_lossy(&name).into_owned();
        return Err(Refusal::new(format!(
            "ERR Unknown option or number of arguments for CONFIG SET - '{name}'"
        )));
    }
    let (mut timeout_s, mut max_clients) = (None, None);
    for (name, value) in names().zip(pairs.iter().skip(1).step_by(2)) {
        match name.as_slice() {
            b"timeout" if timeout_s.is_none() => {
                timeout_s = Some(number("timeout", value, 0, i64::from(i32::MAX))?);
            }
            b"maxclients" if max_clients.is_none() => {
                max_clients = Some(number("maxclients", value, 1, i64::from(u32::MAX))? as usize);
            }
            b"timeout" | b"maxclients" => return Err(failed(&name, "duplicate parameter")),
            _ => return Err(failed(&name, "can't set immutable config")),
        }
    }
    Ok(Plan::Node(NodeCommand::Configure { timeout_s, max_clients }))
}

fn number(name: &str, value: &[u8], least: i64, most: i64) -> Result<u64, Refusal> {
    let reason = match parse_integer(value) {
        Some(number) if (least..=most).contains(&number) => return Ok(number.unsigned_abs()),
        Some(_) => &format!("argument must be between {least} and {most} inclusive"),
        None => "argument couldn't be parsed into an integer",
    };
    Err(failed(name.as_bytes(), reason))
}

fn failed(name: &[u8], reason: &str) -> Refusal {
    let name = String::from_utf8_lossy(name);
    Refusal::new(format!(
        "ERR CONFIG SET failed (possibly related to argument '{name}') - {reason}"
    ))
}
