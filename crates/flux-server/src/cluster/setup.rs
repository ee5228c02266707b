//! What a node brings to its cluster: who it is, and under which addresses others reach it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use flux_core::placement::{PlacementMap, Timing};
use tokio::net::UdpSocket;

use super::ClusterError;
use super::registry::Registration;
use super::waiting::Waiting;
use crate::clock::unix_ms;
use crate::config::Settings;
use crate::data_dir::{DataDir, random_u64};

/// Where a node listens.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// RESP and the native protocol.
    pub data: SocketAddr,
    /// Links between nodes.
    pub peer: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP for administration.
    pub admin: SocketAddr,
}

/// What a node brings along.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Who it is and where it is reached.
    pub registration: Registration,
    /// Where it keeps its data.
    pub data_dir: PathBuf,
    /// What is configured.
    pub settings: Settings,
    /// Where it says what it waits for.
    pub waiting: Waiting,
}

impl Setup {
    /// For the node of a data directory. A listener on all addresses is registered with the one from
    /// which this machine reaches the registry.
    ///
    /// # Errors
    /// Nothing tells which address that is, or there is no randomness.
    pub(crate) async fn new(
        directory: &DataDir,
        settings: &Settings,
        listening: Listening,
        waiting: Waiting,
    ) -> Result<Setup, ClusterError> {
        let towards = &settings.etcd_endpoints;
        let registration = Registration {
            node: directory.identity(),
            cluster: settings.cluster_name.clone(),
            cluster_id: directory.cluster_id(),
            instance: random_u64().map_err(ClusterError::Randomness)?,
            started_ms: unix_ms(),
            data_addr: advertised("data_addr", listening.data, towards).await?,
            peer_addr: advertised("peer_addr", listening.peer, towards).await?,
            grpc_addr: advertised("grpc_addr", listening.grpc, towards).await?,
            admin_addr: advertised("admin_addr", listening.admin, towards).await?,
            zone: settings.zone.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            replaces: directory.replaces(),
            timing: Some(timing(settings)),
        };
        let (data_dir, settings) = (settings.data_dir.clone(), settings.clone());
        Ok(Setup { registration, data_dir, settings, waiting })
    }

    /// Whether a node with these settings can be part of the cluster that the map is of.
    ///
    /// # Errors
    /// It reckons leases by other figures.
    pub(crate) fn check(&self, map: &PlacementMap) -> Result<(), ClusterError> {
        let own = timing(&self.settings);
        match map.timing {
            Some(fixed) if fixed != own => {
                Err(ClusterError::Timing { own, fixed, cluster: map.cluster_id })
            }
            _ => Ok(()),
        }
    }

    /// Tells which settings count for nothing, because the cluster was created with others.
    pub(crate) fn compare(&self, map: &PlacementMap) {
        let Settings { replication_factor, partitions, .. } = self.settings;
        let counts = |setting: &str, here: u32, cluster: u32| {
            tracing::warn!(
                "{setting} is {here} here, and the cluster was created with {cluster}: that counts, and cannot \
                 be changed"
            );
        };
        if replication_factor != map.replication_factor {
            counts("replication_factor", replication_factor.into(), map.replication_factor.into());
        }
        if partitions != 0 && partitions != u32::from(map.partitions) {
            counts("partitions", partitions, map.partitions.into());
        }
    }
}

/// What a node reckons leases by.
pub(super) fn timing(settings: &Settings) -> Timing {
    let Settings { election_timeout_ms, clock_drift_percent, .. } = *settings;
    Timing { election_timeout_ms, clock_drift_percent }
}

/// The address of a listener that other machines can use.
async fn advertised(
    setting: &'static str,
    listener: SocketAddr,
    towards: &[String],
) -> Result<SocketAddr, ClusterError> {
    if !listener.ip().is_unspecified() {
        return Ok(listener);
    }
    for endpoint in towards {
        if let Some(ip) = route(endpoint, listener.is_ipv4()).await {
            return Ok(SocketAddr::new(ip, listener.port()));
        }
    }
    Err(ClusterError::Unreachable { setting, address: listener })
}

/// This machine's address on the way to an endpoint. No packet is sent.
async fn route(endpoint: &str, v4: bool) -> Option<IpAddr> {
    let local = if v4 { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(local).await.ok()?;
    socket.connect(endpoint).await.ok()?;
    Some(socket.local_addr().ok()?.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_on_all_addresses_is_registered_with_one() {
        let towards = ["127.0.0.1:2379".to_owned()];
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let shown = advertised("data_addr", address("0.0.0.0:7379"), &towards).await;
        assert_eq!(shown.expect("a route to loopback"), address("127.0.0.1:7379"));
        let shown = advertised("data_addr", address("10.1.2.3:7379"), &towards).await;
        assert_eq!(shown.expect("taken as it is"), address("10.1.2.3:7379"));
        let shown = advertised("data_addr", address("0.0.0.0:7379"), &[]).await;
        assert!(matches!(shown, Err(ClusterError::Unreachable { setting: "data_addr", .. })));
    }
}
