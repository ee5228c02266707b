//! A registry for the nodes of one process: `flux up --nodes 3`.
//!
//! The placement map is kept in a file, so that a restart finds it. Registrations need no lease: the
//! nodes live and die with the process. Nothing here is shared with other processes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use flux_core::placement::NodeId;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::format::StoredMap;
use super::registry::{
    BoxFuture, Placement, Registration, Registry, RegistryError, RegistryState, Snapshot,
};
use super::saved;

/// A registry that several nodes of this process share. Clones are the same one.
#[derive(Clone, Debug)]
pub struct InProcess {
    shared: Arc<Mutex<Shared>>,
}

/// One node's part in it; dropping it takes the registration back.
#[derive(Debug)]
struct Attached {
    shared: Arc<Mutex<Shared>>,
    session: u64,
}

#[derive(Debug, Default)]
struct Shared {
    file: Option<PathBuf>,
    placement: Option<Placement>,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    /// The session of the elected controller, which stays so until it resigns.
    controller: Option<u64>,
    away: bool,
}

#[derive(Debug)]
struct Session {
    state: watch::Sender<RegistryState>,
    registration: Option<Registration>,
    stands: bool,
}

impl InProcess {
    /// A registry that keeps its map in this file, or only in memory.
    ///
    /// # Errors
    /// The file is there and cannot be read, or is no placement map.
    pub fn open(file: Option<PathBuf>) -> Result<InProcess, RegistryError> {
        let unreadable = |path: &PathBuf, error: &dyn std::fmt::Display| {
            RegistryError::Unreadable(format!("cannot read the map in {}: {error}", path.display()))
        };
        let placement = match &file {
            None => None,
            Some(path) => match fs::read(path) {
                Ok(bytes) => {
                    Some(StoredMap::decode(&bytes).map_err(|error| unreadable(path, &error))?)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(unreadable(path, &error)),
            },
        };
        let shared = Shared { file, placement, ..Shared::default() };
        Ok(InProcess { shared: Arc::new(Mutex::new(shared)) })
    }

    /// The registry as one node uses it.
    pub fn attach(&self) -> Arc<dyn Registry> {
        let mut shared = self.shared.lock();
        let session = shared.next_session;
        shared.next_session += 1;
        let state = watch::Sender::new(RegistryState::default());
        shared.sessions.insert(session, Session { state, registration: None, stands: false });
        shared.publish();
        Arc::new(Attached { shared: Arc::clone(&self.shared), session })
    }

    /// Lets it be out of reach, or back again.
    #[cfg(test)]
    pub(super) fn set_away(&self, away: bool) {
        let mut shared = self.shared.lock();
        shared.away = away;
        shared.publish();
    }

    /// Loses the map.
    #[cfg(test)]
    pub(super) fn wipe(&self) {
        let mut shared = self.shared.lock();
        shared.placement = None;
        shared.publish();
    }

    /// Puts a map there as an operator would who restores a backup.
    #[cfg(test)]
    pub(super) fn restore(&self, placement: Placement) {
        let mut shared = self.shared.lock();
        shared.placement = Some(placement);
        shared.publish();
    }
}

impl Shared {
    /// Tells every session what it does not know yet.
    fn publish(&mut self) {
        let mut nodes: BTreeMap<NodeId, (u64, Registration)> = BTreeMap::new();
        for (&session, of) in &self.sessions {
            if let Some(registration) = &of.registration {
                nodes.entry(registration.node).or_insert((session, registration.clone()));
            }
        }
        let stands = |session: &Session| session.stands && session.registration.is_some();
        let elected = self.controller.filter(|id| self.sessions.get(id).is_some_and(stands));
        let first = || self.sessions.iter().find(|(_, session)| stands(session)).map(|(id, _)| *id);
        let controller = elected.or_else(first);
        let standing = controller.and_then(|id| self.sessions.get(&id));
        self.controller = controller;
        let snapshot = Arc::new(Snapshot {
            nodes: nodes.iter().map(|(node, (_, of))| (*node, of.clone())).collect(),
            placement: self.placement.clone(),
            unreadable: None,
            controller: standing.and_then(|of| Some(of.registration.as_ref()?.node)),
        });
        for (id, session) in &self.sessions {
            let owner = session.registration.as_ref().and_then(|of| nodes.get(&of.node));
            let registered = owner.is_some_and(|(owner, _)| owner == id);
            let other = owner.filter(|(owner, _)| owner != id);
            session.state.send_if_modified(|state| {
                let new = if self.away {
                    RegistryState { connected: false, leads: false, ..state.clone() }
                } else {
                    RegistryState {
                        connected: true,
                        failure: None,
                        snapshot: Some(Arc::clone(&snapshot)),
                        registered,
                        leads: controller == Some(*id),
                        conflict: other.map(|(_, of)| Box::new(of.clone())),
                    }
                };
                let changed = *state != new;
                *state = new;
                changed
            });
        }
    }

    fn write(&mut self, placement: &Placement, over: Option<u64>) -> Result<bool, RegistryError> {
        if self.away {
            return Err(RegistryError::Away("it was taken away".to_owned()));
        }
        if self.placement.as_ref().map(|placement| placement.epoch) != over {
            return Ok(false);
        }
        if let Some(file) = &self.file {
            let bytes = StoredMap::encode(placement.epoch, &placement.map);
            saved::replace(file, &bytes).map_err(|error| {
                RegistryError::Away(format!("cannot write {}: {error}", file.display()))
            })?;
        }
        self.placement = Some(placement.clone());
        self.publish();
        Ok(true)
    }
}

impl Attached {
    fn change(&self, change: impl FnOnce(&mut Session)) {
        let mut shared = self.shared.lock();
        if let Some(session) = shared.sessions.get_mut(&self.session) {
            change(session);
            shared.publish();
        }
    }
}

impl Registry for Attached {
    fn state(&self) -> watch::Receiver<RegistryState> {
        let shared = self.shared.lock();
        shared.sessions.get(&self.session).map_or_else(
            || watch::Sender::new(RegistryState::default()).subscribe(),
            |session| session.state.subscribe(),
        )
    }

    fn register(&self, registration: Registration) {
        self.change(|session| session.registration = Some(registration));
    }

    fn campaign(&self, stands: bool) {
        self.change(|session| session.stands = stands);
    }

    fn write<'a>(
        &'a self,
        placement: &'a Placement,
        over: Option<u64>,
    ) -> BoxFuture<'a, Result<bool, RegistryError>> {
        Box::pin(async move { self.shared.lock().write(placement, over) })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.change(|session| {
                session.registration = None;
                session.stands = false;
            });
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        shared.sessions.remove(&self.session);
        shared.publish();
    }
}
