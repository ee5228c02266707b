//! What etcd holds of a cluster, read at one revision and kept up by watch events.

use std::collections::BTreeMap;

use etcd_client::{Event, EventType, KeyValue};
use flux_core::placement::NodeId;

use super::{Options, StoredMap};
use crate::cluster::registry::{Placement, Registration, Snapshot};

/// Where registrations are.
pub(super) const SERVICES: &str = "/services/kv-service/";

/// A registration and how it is held.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) registration: Registration,
    pub(super) lease: i64,
    pub(super) revision: i64,
}

/// Everything of one cluster.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) nodes: BTreeMap<NodeId, Held>,
    placement: Option<Placement>,
    unreadable: Option<String>,
    /// The controller's node id, and its lease.
    pub(super) controller: Option<(Option<NodeId>, i64)>,
}

impl Contents {
    /// Takes in a key that is there.
    pub(super) fn put(&mut self, options: &Options, kv: &KeyValue) {
        let key = String::from_utf8_lossy(kv.key());
        if let Some(name) = key.strip_prefix(SERVICES) {
            let Ok(node) = name.parse::<NodeId>() else {
                return;
            };
            match serde_json::from_slice::<Registration>(kv.value()) {
                Ok(registration)
                    if registration.cluster == options.name && registration.node == node =>
                {
                    let (lease, revision) = (kv.lease(), kv.mod_revision());
                    self.nodes.insert(node, Held { registration, lease, revision });
                }
                // Another cluster's.
                Ok(_) => {}
                Err(error) => tracing::warn!(%key, %error, "a registration that cannot be read"),
            }
        } else if key == options.placement_key() {
            self.unreadable = None;
            match StoredMap::decode(kv.value()) {
                Ok(placement) => self.placement = Some(placement),
                Err(reason) => self.unreadable = Some(reason),
            }
        } else if key == options.controller_key() {
            let node = str::from_utf8(kv.value()).ok().and_then(|name| name.parse().ok());
            self.controller = Some((node, kv.lease()));
        }
    }

    fn delete(&mut self, options: &Options, key: &[u8]) {
        let key = String::from_utf8_lossy(key);
        if let Some(name) = key.strip_prefix(SERVICES) {
            if let Ok(node) = name.parse::<NodeId>() {
                self.nodes.remove(&node);
            }
        } else if key == options.placement_key() {
            self.placement = None;
            self.unreadable = None;
        } else if key == options.controller_key() {
            self.controller = None;
        }
    }

    pub(super) fn apply(&mut self, options: &Options, event: &Event) {
        let Some(kv) = event.kv() else {
            return;
        };
        match event.event_type() {
            EventType::Put => self.put(options, kv),
            EventType::Delete => self.delete(options, kv.key()),
        }
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let node = |(node, held): (&NodeId, &Held)| (*node, held.registration.clone());
        Snapshot {
            nodes: self.nodes.iter().map(node).collect(),
            placement: self.placement.clone(),
            unreadable: self.unreadable.clone(),
            controller: self.controller.and_then(|(node, _)| node),
        }
    }
}
