//! The thread that waits for the disk in a worker's stead: it syncs the log and makes new segments.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use flux_log::{PrepareTarget, SyncTarget};

use crate::mailbox::{Mailbox, Return};

enum Job {
    Sync(SyncTarget),
    Prepare(PrepareTarget),
}

/// One job of each kind at a time: the worker waits for the answer before it asks again.
pub(super) struct Syncer {
    sender: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    pub(super) fn start(worker: u16, mailbox: Arc<Mailbox>) -> io::Result<Syncer> {
        let (sender, receiver) = sync_channel(2);
        let run = move || {
            while let Ok(job) = receiver.recv() {
                mailbox.answer(match job {
                    Job::Sync(target) => Return::Synced(target.sync()),
                    Job::Prepare(target) => Return::Prepared(target.run()),
                });
            }
        };
        let thread = std::thread::Builder::new().name(format!("flux-sync-{worker}")).spawn(run)?;
        Ok(Syncer { sender: Some(sender), thread: Some(thread) })
    }

    /// Starts a sync; `Return::Synced` comes when it has ended.
    pub(super) fn sync(&self, target: SyncTarget) {
        self.send(Job::Sync(target));
    }

    /// Makes a segment; `Return::Prepared` comes when it is there.
    pub(super) fn prepare(&self, target: PrepareTarget) {
        self.send(Job::Prepare(target));
    }

    fn send(&self, job: Job) {
        let sender = self.sender.as_ref().expect("there until the worker ends");
        sender.try_send(job).expect("there is room for one job of each kind");
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            // It ends when the sender is gone; its panic, if any, has been reported on its own.
            let _ = thread.join();
        }
    }
}
