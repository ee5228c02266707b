//! Why a configuration is refused. Each message names the setting, where it was set, and what to
//! do.

use std::{io, net::SocketAddr, path::PathBuf};

use super::{Origin, SETTINGS, Setting};

/// A configuration that stops the start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there, or was asked for, but cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: not valid TOML: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// There is no such setting.
    #[error("{origin}: there is no setting `{name}`{}; the settings are {}", hint(name), names())]
    Unknown {
        /// As it was written, in a setting's spelling.
        name: String,
        /// Where.
        origin: Origin,
    },
    /// The setting exists, but not with this value.
    #[error("{origin}: `{name}` is {value:?}, but must be {allowed}")]
    Refused {
        /// The setting.
        name: &'static str,
        /// As it was written; of a secret nothing but `***`.
        value: String,
        /// Where.
        origin: Origin,
        /// What would be allowed.
        allowed: String,
    },
    /// The file sets it at its top and in a table.
    #[error("{origin}: `{name}` is set twice in the file; keep one of the two")]
    Twice {
        /// The setting.
        name: String,
        /// Where for the second time.
        origin: Origin,
    },
    /// A listener could be reached from other machines.
    #[error(
        "{origin}: `{name}` is {address}, which other machines can reach, and nothing asks them for a \
         password. Use a loopback address such as 127.0.0.1:{}, or, if you trust everyone who can \
         reach it, give --insecure (FLUX_INSECURE=true, or insecure = true in the file)",
        address.port()
    )]
    Exposed {
        /// The setting.
        name: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Where it was set.
        origin: Origin,
    },
    /// More partitions than a placement map in etcd can have.
    #[error(
        "{origin}: `partitions` is {asked}, but etcd keeps the map of at most {most} with {factor} replicas each"
    )]
    Partitions {
        /// The setting.
        asked: u32,
        /// What is possible.
        most: u32,
        /// The setting `replication_factor`.
        factor: u8,
        /// Where it was set.
        origin: Origin,
    },
    /// Two listeners want one port.
    #[error(
        "{origin}: `{second}` is {address}, but `{first}` listens there; give them different ports"
    )]
    SameAddress {
        /// The setting that has the port.
        first: &'static str,
        /// The setting that wants it too.
        second: &'static str,
        /// The second one's value.
        address: SocketAddr,
        /// Where the second one was set.
        origin: Origin,
    },
}

fn names() -> String {
    SETTINGS.iter().map(|setting| setting.name).collect::<Vec<_>>().join(", ")
}

/// " (did you mean …?)" when a setting's name is close to the one that was written.
fn hint(name: &str) -> String {
    let closest = SETTINGS.iter().min_by_key(|setting| distance(name, setting.name));
    match closest {
        Some(Setting { name: close, .. }) if distance(name, close) <= 2 + close.len() / 6 => {
            format!(" (did you mean `{close}`?)")
        }
        _ => String::new(),
    }
}

/// How many single-byte edits lie between two names (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
