//! What a node that starts waits for, or that it stops, so that whoever asks it meanwhile can be told.

use tokio::sync::watch;

/// What a node that starts does when it waits for nobody.
pub(crate) const RECOVERING: &str = "recovering";

/// Shared by who waits and who is asked. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Waiting {
    what: watch::Sender<Option<String>>,
}

impl Waiting {
    /// The node does not serve because of this, in words like "waiting for a node". True if that is news.
    pub(crate) fn tell(&self, what: &str) -> bool {
        self.what.send_if_modified(|known| {
            let changed = known.as_deref() != Some(what);
            if changed {
                *known = Some(what.to_owned());
            }
            changed
        })
    }

    /// It waits no more.
    pub(crate) fn end(&self) {
        self.what.send_if_modified(|known| known.take().is_some());
    }

    /// What it waits for, if it does.
    pub(crate) fn what(&self) -> Option<String> {
        self.what.borrow().clone()
    }

    /// Why a node that starts does not serve, for its clients: what it waits for, or its data.
    pub(crate) fn reason(&self) -> String {
        format!("the node is starting: {}", self.what().as_deref().unwrap_or(RECOVERING))
    }

    /// What it waits for, and how that changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.what.subscribe()
    }
}
