//! `cluster.json`: the placement map and the members as a node last knew them, so that it can start
//! while the registry is away. The registry's word counts once it is heard.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::StoredMap;
use super::registry::Registration;
use super::topology::{Member, Topology};

const NAME: &str = "cluster.json";
const FORMAT: u32 = 1;

/// The contents of the file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    format: u32,
    placement: StoredMap,
    members: Vec<SavedMember>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedMember {
    alive: bool,
    #[serde(flatten)]
    registration: Registration,
}

impl Saved {
    /// What is worth keeping of a topology; nothing before there is a map.
    pub(super) fn of(topology: &Topology) -> Option<Saved> {
        let map = topology.map.as_deref()?.clone();
        let member = |member: &Member| SavedMember {
            alive: member.alive,
            registration: member.registration.clone(),
        };
        Some(Saved {
            format: FORMAT,
            placement: StoredMap { epoch: topology.epoch, map },
            members: topology.members.values().map(member).collect(),
        })
    }

    /// The topology to start from. Members that were away are not counted as missed before the
    /// registry says so.
    fn topology(self) -> Result<Topology, String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not format {FORMAT}", self.format));
        }
        let placement = self.placement.placement()?;
        let member = |member: SavedMember| {
            let SavedMember { alive, registration } = member;
            (registration.node, Member { registration, alive, away_since: None })
        };
        Ok(Topology {
            cluster_id: Some(placement.map.cluster_id),
            epoch: placement.epoch,
            map: Some(placement.map),
            members: self.members.into_iter().map(member).collect(),
            ..Topology::default()
        })
    }

    /// Writes it into a data directory.
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(self).expect("plain fields");
        replace(&directory.join(NAME), &bytes)
    }
}

/// Reads the file of a data directory. What is there and cannot be read is told and passed over: the
/// registry has it too.
pub(super) fn read(directory: &Path) -> Option<Topology> {
    let path = directory.join(NAME);
    let topology = match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Saved>(&bytes)
            .map_err(|error| error.to_string())
            .and_then(Saved::topology),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => Err(error.to_string()),
    };
    topology
        .map_err(|error| {
            tracing::warn!(
                file = %path.display(),
                error,
                "what this node remembers of its cluster cannot be read: it starts only when the registry \
                 answers, and then writes the file anew"
            );
        })
        .ok()
}

/// Gives a file new contents, at once or, after a crash, not at all.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}
