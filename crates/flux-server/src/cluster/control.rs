//! A node's part in its cluster: it registers, keeps the topology, and stands for controller.
//!
//! The data plane reads the topology and never waits for this. With the registry away the topology
//! stays as it was; a warning now and then is all that happens.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use flux_core::placement::NodeId;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::data_plane::{DataPlane, NodePartitions};
use super::http::{Client, Peers};
use super::registry::{Placement, Registration, Registry, RegistryState};
use super::saved::{self, Saved};
use super::setup::Setup;
use super::topology::{Topology, Trouble};
use super::{ClusterError, controller, probe};
use crate::config::Settings;

/// How long a start waits for the registry before it says so.
const FIRST_WORD: Duration = Duration::from_secs(3);
/// How long a start waits for the registry, when the node knows its cluster from an earlier one. Its
/// groups may miss it; but only the registry knows whether another process runs as this node.
const REGISTRY_PATIENCE: Duration = Duration::from_secs(1);
/// The shortest wait between two looks.
const LEAST_WAIT: Duration = Duration::from_millis(100);
/// How often lasting trouble is told.
const WARNING_INTERVAL: Duration = Duration::from_secs(30);
/// How long trouble lasts before it is told: servers are restarted, and news may come out of order.
const GRACE: Duration = Duration::from_secs(5);

/// The control plane of one node.
#[derive(Debug)]
pub struct Control {
    core: Arc<Core>,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// What its tasks and its HTTP routes share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) setup: Setup,
    pub(super) registry: Arc<dyn Registry>,
    pub(super) topology: watch::Sender<Arc<Topology>>,
    /// What is wrong with the registry's data, as last seen.
    pub(super) trouble: watch::Sender<Option<Trouble>>,
    /// Whether the node has joined its cluster.
    joined: watch::Sender<Option<u64>>,
    data: OnceLock<Arc<dyn DataPlane>>,
    pub(super) peers: Arc<dyn Peers>,
    /// Wakes the controller before its time.
    pub(super) wake: Notify,
}

/// The control plane as routes and other servers of the node use it.
#[derive(Clone, Debug)]
pub struct ClusterHandle(pub(super) Arc<Core>);

impl Control {
    /// Registers the node. Returns when it is registered or, for a node that has been part of its
    /// cluster before, when the registry stays away. Dropping the future gives up.
    ///
    /// # Errors
    /// Another process has the node's id, or the registry holds another cluster than the node's data.
    pub async fn start(setup: Setup, registry: Arc<dyn Registry>) -> Result<Control, ClusterError> {
        Control::start_among(setup, registry, Arc::new(Client::default())).await
    }

    /// The same, with another way to ask the others.
    pub(super) async fn start_among(
        setup: Setup,
        registry: Arc<dyn Registry>,
        peers: Arc<dyn Peers>,
    ) -> Result<Control, ClusterError> {
        let mut topology = match setup.registration.cluster_id {
            Some(own) => saved::read(&setup.data_dir)
                .filter(|topology| topology.cluster_id == Some(own))
                .unwrap_or_default(),
            // What another node left there is not ours.
            None => Topology::default(),
        };
        topology.cluster_id = setup.registration.cluster_id;
        if let Some(map) = &topology.map {
            setup.check(map)?;
        }
        registry.register(setup.registration.clone());
        if let Err(error) = await_registration(&setup, &*registry, topology.map.is_some()).await {
            registry.close().await;
            return Err(error);
        }
        let trouble = topology.observe(&registry.state().borrow(), Instant::now());
        if let Some(Trouble::OtherCluster { own, other }) = trouble {
            registry.close().await;
            return Err(other_cluster(&setup, own, other));
        }

        let core = Arc::new(Core {
            topology: watch::Sender::new(Arc::new(topology)),
            trouble: watch::Sender::new(trouble),
            joined: watch::Sender::new(setup.registration.cluster_id),
            data: OnceLock::new(),
            peers,
            wake: Notify::new(),
            setup,
            registry,
        });
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(follow(Arc::clone(&core), stopping.clone()).in_current_span());
        tasks.spawn(controller::run(Arc::clone(&core), stopping).in_current_span());
        core.registry.campaign(true);
        Ok(Control { core, tasks, stop })
    }

    /// What is known of the cluster, and how it changes.
    pub fn topology(&self) -> watch::Receiver<Arc<Topology>> {
        self.core.topology.subscribe()
    }

    /// Waits until there is a placement map, however long it takes for enough nodes to come.
    pub async fn placement(&self) -> Placement {
        let mut topology = self.topology();
        let mut trouble = self.core.trouble.subscribe();
        let mut again = Instant::now();
        loop {
            if let Some(placement) = topology.borrow_and_update().placement() {
                self.core.setup.waiting.end();
                return placement;
            }
            let what = self.core.awaits(trouble.borrow_and_update().as_ref());
            // What a registry is away for, and other trouble, is told elsewhere.
            if self.core.setup.waiting.tell(&what) || Instant::now() >= again {
                tracing::info!("{what}");
                again = Instant::now() + WARNING_INTERVAL;
            }
            tokio::select! {
                // The registry's side of it ends with the node.
                _ = topology.changed() => {}
                _ = trouble.changed() => {}
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// Whether the node's settings fit its cluster's map; tells what they do not count for.
    ///
    /// # Errors
    /// The node would not be safe in the cluster.
    pub fn check(&self, placement: &Placement) -> Result<(), ClusterError> {
        self.core.setup.check(&placement.map)?;
        self.core.setup.compare(&placement.map);
        Ok(())
    }

    /// Says that the node's data directory now belongs to this cluster, and registers it as a member.
    pub fn joined(&self, cluster_id: u64) {
        self.core.join(cluster_id);
    }

    /// Gives it the node's replicas to report and to hand leadership over from. Once.
    pub fn attach(&self, data: Arc<dyn DataPlane>) {
        // A second one would be a mistake of the caller without consequence: the first goes on.
        let _ = self.core.data.set(data);
    }

    /// For routes.
    pub fn handle(&self) -> ClusterHandle {
        ClusterHandle(Arc::clone(&self.core))
    }

    /// Waits until the node must stop: another process has registered under its id.
    pub async fn failed(&self) -> ClusterError {
        let mut state = self.core.registry.state();
        loop {
            if let Some(error) = duplicate(&self.core.setup, &state.borrow_and_update()) {
                return error;
            }
            if state.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Takes the registration back, so that nobody counts on the node, and ends.
    pub async fn stop(mut self) {
        // Tasks that have ended are not told.
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
        self.core.registry.close().await;
    }
}

impl Core {
    pub(super) fn node(&self) -> NodeId {
        self.setup.registration.node
    }

    pub(super) fn join(&self, cluster_id: u64) {
        self.joined.send_replace(Some(cluster_id));
        let registration =
            Registration { cluster_id: Some(cluster_id), ..self.setup.registration.clone() };
        self.registry.register(registration);
    }

    pub(super) fn data(&self) -> Option<&Arc<dyn DataPlane>> {
        self.data.get()
    }

    /// What a node waits for that has no placement map.
    fn awaits(&self, trouble: Option<&Trouble>) -> String {
        let settings = &self.setup.settings;
        match trouble {
            Some(Trouble::Away(_)) => {
                return awaits_registry(&self.setup, &self.registry.state().borrow());
            }
            Some(other) => {
                return format!("waiting for the placement map: {}", other.advice(settings));
            }
            None => {}
        }
        let topology = self.topology.borrow();
        let registrations = topology.members.values().map(|member| &member.registration);
        let (odd, alike): (Vec<_>, Vec<_>) = registrations.partition(|other| {
            other.timing.is_some_and(|other| Some(other) != self.setup.registration.timing)
        });
        let (here, wanted) = (alike.len(), usize::from(settings.replication_factor));
        let mut text = match wanted.saturating_sub(here) {
            0 => "waiting for the cluster's controller, which creates the cluster; what keeps it from that \
                  is in its log"
                .to_owned(),
            1 => format!("waiting for 1 more node ({here} of {wanted})"),
            missing => format!("waiting for {missing} more nodes ({here} of {wanted})"),
        };
        if let Some(other) = odd.first() {
            text += &format!(
                "; {} is not counted, since its election_timeout_ms or clock_drift_percent is another",
                other.node
            );
        }
        text
    }

    /// How this node's replicas stand.
    pub(super) async fn local_partitions(&self) -> NodePartitions {
        let partitions = match self.data() {
            Some(data) => data.partitions().await,
            None => Vec::new(),
        };
        NodePartitions { node: self.node(), epoch: self.topology.borrow().epoch, partitions }
    }
}

/// Waits until the node is registered, or long enough if it could do without.
async fn await_registration(
    setup: &Setup,
    registry: &dyn Registry,
    known: bool,
) -> Result<(), ClusterError> {
    let mut state = registry.state();
    let begun = Instant::now();
    let mut due = begun + FIRST_WORD;
    let mut asked: Option<(u64, Instant)> = None;
    loop {
        let (connected, what, other) = {
            let state = state.borrow_and_update();
            if let Some(error) = duplicate(setup, &state) {
                return Err(error);
            }
            if state.connected && state.registered {
                setup.waiting.end();
                return Ok(());
            }
            (state.connected, awaits_registry(setup, &state), in_the_way(setup, &state))
        };
        // A process that lives does not lapse: that is soon told, and need not be waited for. One that is slow
        // to answer is asked again.
        let is_due = |other: &Registration| {
            asked.is_none_or(|(instance, at)| {
                instance != other.instance || Instant::now() >= at + FIRST_WORD
            })
        };
        match other {
            Some(other) if is_due(&other) => {
                if probe::lives(&setup.registration, &other).await {
                    return Err(two_processes(setup, &other));
                }
                asked = Some((other.instance, Instant::now()));
            }
            Some(_) => {}
            None => asked = None,
        }
        setup.waiting.tell(&what);
        let now = Instant::now();
        // In touch but not registered: a former process of this node has not lapsed yet.
        if known && !connected && now >= begun + REGISTRY_PATIENCE {
            tracing::warn!("{what}; starting with what was known");
            setup.waiting.end();
            return Ok(());
        }
        // A first attempt that is under way has no cause to tell yet.
        if now >= due && (connected || registry.state().borrow().failure.is_some()) {
            if connected {
                tracing::info!("{what}");
            } else {
                tracing::warn!("{what}");
            }
            due = now + WARNING_INTERVAL;
        }
        let mut wake = if known { due.min(begun + REGISTRY_PATIENCE) } else { due };
        if let Some((_, at)) = asked {
            wake = wake.min(at + FIRST_WORD);
        }
        let wake = wake.max(now + LEAST_WAIT);
        if let Ok(Err(_)) = tokio::time::timeout_at(wake, state.changed()).await {
            return std::future::pending().await;
        }
    }
}

/// What a node waits for that is not registered.
fn awaits_registry(setup: &Setup, state: &RegistryState) -> String {
    if state.connected {
        return "waiting for the registration of this node's former process to lapse".to_owned();
    }
    let endpoints = setup.settings.etcd_endpoints.join(",");
    match &state.failure {
        Some(failure) => format!(
            "waiting for etcd, which does not answer ({failure}): see that it runs, and that etcd_endpoints, \
             now {endpoints}, is right"
        ),
        None => format!("waiting for etcd at {endpoints}"),
    }
}

/// The registration of another process that is where this node's should be.
fn in_the_way(setup: &Setup, state: &RegistryState) -> Option<Registration> {
    let own = &setup.registration;
    let other = state.snapshot.as_ref().filter(|_| state.connected)?.nodes.get(&own.node)?;
    let foreign = other.instance != own.instance && other.peer_addr != own.peer_addr;
    foreign.then(|| other.clone())
}

fn duplicate(setup: &Setup, state: &RegistryState) -> Option<ClusterError> {
    state.conflict.as_deref().map(|other| two_processes(setup, other))
}

fn two_processes(setup: &Setup, other: &Registration) -> ClusterError {
    ClusterError::Duplicate {
        node: setup.registration.node,
        own: setup.registration.peer_addr,
        other: other.peer_addr,
        data_dir: setup.data_dir.clone(),
    }
}

fn other_cluster(setup: &Setup, own: u64, other: u64) -> ClusterError {
    ClusterError::OtherCluster {
        own,
        other,
        name: setup.settings.cluster_name.clone(),
        data_dir: setup.data_dir.clone(),
    }
}

/// Keeps the topology and its copy on disk as the registry says.
async fn follow(core: Arc<Core>, mut stopping: watch::Receiver<bool>) {
    let mut state = core.registry.state();
    let mut joined = core.joined.subscribe();
    let mut saved: Option<Saved> = None;
    let mut lasting: Option<Lasting> = None;
    loop {
        let mut topology = Topology::clone(&core.topology.borrow());
        topology.cluster_id = *joined.borrow_and_update();
        let trouble = topology.observe(&state.borrow_and_update(), Instant::now());
        tell(&core, trouble.as_ref(), &mut lasting);
        core.trouble.send_if_modified(|known| {
            let changed = *known != trouble;
            *known = trouble;
            changed
        });
        core.topology.send_if_modified(|known| {
            let changed = **known != topology;
            if changed {
                *known = Arc::new(topology);
            }
            changed
        });
        save(&core, &mut saved).await;
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            _ = joined.changed() => {}
            () = tokio::time::sleep(GRACE) => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
    }
}

/// Writes the topology to disk if what is kept of it has changed.
async fn save(core: &Arc<Core>, saved: &mut Option<Saved>) {
    if core.joined.borrow().is_none() {
        return;
    }
    let Some(new) = Saved::of(&core.topology.borrow()).filter(|new| saved.as_ref() != Some(new))
    else {
        return;
    };
    let directory = core.setup.data_dir.clone();
    let written = tokio::task::spawn_blocking(move || (new.write(&directory), new)).await;
    match written {
        Ok((Ok(()), new)) => *saved = Some(new),
        Ok((Err(error), _)) => {
            tracing::warn!(%error, "cannot write cluster.json: a start without the registry would use an older one");
        }
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Trouble that lasts.
#[derive(Debug)]
struct Lasting {
    trouble: Trouble,
    since: Instant,
    told: Option<Instant>,
}

/// Logs trouble once it has lasted, now and then while it goes on, and its end.
fn tell(core: &Core, trouble: Option<&Trouble>, lasting: &mut Option<Lasting>) {
    let Some(trouble) = trouble else {
        if lasting.take().is_some_and(|lasting| lasting.told.is_some()) {
            tracing::info!("the registry is well again");
        }
        return;
    };
    let same =
        |of: &Lasting| std::mem::discriminant(&of.trouble) == std::mem::discriminant(trouble);
    if !lasting.as_ref().is_some_and(same) {
        *lasting = Some(Lasting { trouble: trouble.clone(), since: Instant::now(), told: None });
    }
    let Some(lasting) = lasting else {
        return;
    };
    let due = lasting.told.is_none_or(|told| told.elapsed() >= WARNING_INTERVAL);
    if lasting.since.elapsed() < GRACE || !due {
        return;
    }
    lasting.told = Some(Instant::now());
    match trouble {
        Trouble::Away(since) => {
            let cause = core.registry.state().borrow().failure.clone().unwrap_or_default();
            tracing::warn!(
                for_s = since.as_secs(),
                cause,
                "the registry does not answer: data is served, the cluster does not change"
            );
        }
        other => tracing::error!("{}", other.advice(&core.setup.settings)),
    }
}

impl Trouble {
    /// What an operator should know and do.
    pub(super) fn advice(&self, settings: &Settings) -> String {
        let name = &settings.cluster_name;
        match self {
            Trouble::Wiped if !settings.is_clustered() => "the registry has no placement map, but this cluster \
                 had one: the file registry.json is lost. Nothing is created anew; nodes serve on by their own \
                 copy of the map. Put it back with `flux admin republish`"
                .to_owned(),
            Trouble::Away(since) => {
                format!("the registry has not answered for {} s", since.as_secs())
            }
            Trouble::Wiped => format!(
                "the registry has no placement map for cluster_name {name}, but this cluster had one: etcd's \
                 data was lost, or etcd_endpoints or cluster_name are wrong. Nothing is created anew; nodes \
                 serve on by their own copy of the map. If the data is lost, put the map back with `flux admin \
                 republish`; etcd needs no backup of its own"
            ),
            Trouble::OtherCluster { own, other } => format!(
                "the registry's map for cluster_name {name} is of cluster {other:016x}, and this node \
                 belongs to {own:016x}: etcd_endpoints or cluster_name are wrong. The node serves on by its \
                 own copy of the map"
            ),
            Trouble::OlderMap { epoch, known } => format!(
                "the registry's map has epoch {epoch}, this node knows epoch {known}: etcd's data is older \
                 than the cluster. The node serves on by its own copy; put it back with `flux admin republish`"
            ),
            Trouble::Unreadable(reason) => format!(
                "the registry's placement map for cluster_name {name} cannot be read: {reason}. The node \
                 serves on by its own copy"
            ),
        }
    }
}
