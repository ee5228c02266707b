//! Starts nodes on simulated machines, and asks them.

use std::net::SocketAddr;

use flux_core::{Command, Condition, Expiry, PartitionId, Partitions, Reply};
use mio::net::TcpListener;

use super::machine::Machine;
use crate::config::{Fsync, Settings};
use crate::data_dir::{DataDir, Purpose};
use crate::folders::Folders;
use crate::mailbox::Ask;
use crate::node::StartError;
use crate::shared::Shared;
use crate::workers::Workers;

/// Settings under which little work makes many segments and snapshots.
pub(super) fn small(workers: usize, fsync: Fsync) -> Settings {
    Settings {
        workers,
        fsync,
        partitions: 4,
        segment_bytes: 16 * 1024,
        snapshot_log_bytes: 48 * 1024,
        shutdown_timeout_ms: 5000,
        ..Settings::default()
    }
}

/// Opens the machine's data directory and starts a node's workers on it.
pub(super) fn start(machine: &Machine, settings: &Settings) -> Result<Workers, StartError> {
    start_in(machine.folders(), settings)
}

/// The same, wherever the directory is.
pub(super) fn start_in(
    folders: Box<dyn Folders>,
    settings: &Settings,
) -> Result<Workers, StartError> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let purpose = Purpose::Alone(settings.partitions as u16);
    let directory = DataDir::open_in(folders, purpose, settings.worker_count() as u16)?;
    let workers = Workers::start(settings, directory, address, None)?;
    workers.listen(listener);
    Ok(workers)
}

/// The partition of a key under `small`.
pub(super) fn partition_of(key: &str) -> PartitionId {
    Partitions::new(4).expect("a power of two").of(key.as_bytes())
}

pub(super) fn set(key: &str, value: &[u8]) -> Command<Vec<u8>> {
    Command::Set {
        key: key.as_bytes().to_vec(),
        value: value.to_vec(),
        expiry: Expiry::Never,
        condition: Condition::Always,
        return_previous: false,
    }
}

/// Carries out a command on the partition of `key`.
pub(super) async fn ask(shared: &Shared, key: &str, command: Command<Vec<u8>>) -> Reply {
    shared.execute(shared.partitions.of(key.as_bytes()), command, Ask::default()).await
}

pub(super) async fn value(shared: &Shared, key: &str) -> Option<Vec<u8>> {
    match ask(shared, key, Command::Get { key: key.as_bytes().to_vec() }).await {
        Reply::Value(value) => value.map(|value| value.bytes),
        other => panic!("a read of {key} answered {other:?}"),
    }
}
