//! How a node becomes part of its cluster when it starts: it registers, waits for the placement map, and
//! makes its data directory that of a member.

use std::sync::Arc;
use std::time::Duration;

use crate::cluster::{Control, Etcd, Listening, Registry, Setup, Topology, Waiting};
use crate::config::Settings;
use crate::data_dir::{DataDir, DataDirError, Purpose};
use crate::node::StartError;
use crate::recovery::RecoveryError;
use crate::shared::Shared;
use crate::workers::Membership;

/// How long a worker that is told of a change and cannot take the message has before it is told again.
const TELL_AGAIN: Duration = Duration::from_millis(100);

/// The registry that the settings name; `None` for a node alone.
pub(crate) fn registry(settings: &Settings) -> Option<Arc<dyn Registry>> {
    if !settings.is_clustered() {
        return None;
    }
    let ttl = Duration::from_secs(settings.registry_ttl_s);
    Some(Arc::new(Etcd::start(&settings.etcd_endpoints, &settings.cluster_name, ttl)))
}

/// Registers the node and waits until its cluster exists, however long that takes. A node that is refused
/// takes its registration back, so that nobody counts on it.
pub(crate) async fn join(
    directory: &mut DataDir,
    settings: &Settings,
    listening: Listening,
    registry: Arc<dyn Registry>,
    waiting: &Waiting,
) -> Result<(Control, Membership), StartError> {
    let setup = Setup::new(directory, settings, listening, waiting.clone()).await?;
    let (me, instance) = (setup.registration.node, setup.registration.instance);
    let control = Control::start(setup, registry).await?;
    let cluster_id = match become_member(directory, &control).await {
        Ok(cluster_id) => cluster_id,
        Err(error) => {
            control.stop().await;
            return Err(error);
        }
    };
    control.joined(cluster_id);
    let topology = Arc::clone(&control.topology().borrow());
    Ok((control, Membership { cluster_id, me, instance, topology }))
}

/// Makes the directory that of a member, once there is a map. Returns the cluster.
async fn become_member(directory: &mut DataDir, control: &Control) -> Result<u64, StartError> {
    let placement = tokio::select! {
        placement = control.placement() => placement,
        error = control.failed() => return Err(error.into()),
    };
    control.check(&placement)?;
    let cluster_id = placement.map.cluster_id;
    directory.join(cluster_id, placement.map.partitions)?;
    Ok(cluster_id)
}

/// Whether data that cannot be recovered can be had again from the other nodes.
pub(crate) fn is_damage(error: &StartError) -> bool {
    let StartError::Recovery(error) = error else { return false };
    match error {
        RecoveryError::Missing { .. }
        | RecoveryError::Broken { .. }
        | RecoveryError::Snapshot { .. } => true,
        RecoveryError::Log { source, .. } => matches!(source, flux_log::LogError::Damaged { .. }),
        RecoveryError::Directory(_) => false,
    }
}

/// Sets data that cannot be recovered aside, and makes the node a new one: what it had promised and
/// acknowledged is lost with its data, so it must not come back as itself.
pub(crate) fn begin_anew(settings: &Settings, error: &StartError) -> Result<(), DataDirError> {
    let workers = settings.worker_count() as u16;
    let mut directory = DataDir::open(&settings.data_dir, Purpose::Cluster, workers)?;
    let (old, aside) = (directory.identity(), directory.set_aside()?);
    tracing::error!(
        error = error as &dyn std::error::Error,
        was = %old, now = %directory.identity(), aside = %aside.display(),
        "the data of this node is damaged: it is set aside, and the node joins as a new one and gets its \
         data from the others"
    );
    Ok(())
}

/// Tells the workers of every change of the cluster, for as long as the node runs.
pub(crate) async fn follow(
    shared: Arc<Shared>,
    mut topology: tokio::sync::watch::Receiver<Arc<Topology>>,
) {
    loop {
        let newest = Arc::clone(&topology.borrow_and_update());
        if shared.follow(&newest) {
            if topology.changed().await.is_err() {
                return;
            }
        } else {
            tokio::time::sleep(TELL_AGAIN).await;
        }
    }
}
