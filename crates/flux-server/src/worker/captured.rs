//! What replicas have applied, on its way to those who follow it; and back, how far it has been passed on.
//!
//! Where nobody follows a partition, nothing is done for each write. Who reads is in `feed`.

use flux_cdc::Led;
use flux_core::replica::Replica;
use flux_core::{Cursor, PartitionId};
use flux_proto::event::Place;

use super::dispatch::Dispatch;
use crate::config::Fsync;
use crate::feed::PartitionFeed;

/// Ticks between two entries that say how far changes are passed on: half a second.
const CURSOR_TICKS: u64 = 10;

/// Ticks between two times that what was read and is not of use any more is let go: ten seconds.
const TIDY_TICKS: u64 = 200;

/// What will be on the disk when a sync ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    partition: PartitionId,
    applied: Cursor,
    cursor: Cursor,
}

/// Up to where a replica has applied the log.
fn applied<W>(replica: &Replica<W>) -> Cursor {
    Cursor { revision: replica.revision(), index: replica.applied().index }
}

impl Dispatch {
    fn feed(&self, partition: PartitionId) -> &PartitionFeed {
        &self.shared.views[usize::from(partition.0)].feed
    }

    /// Gives what a replica has applied to those who follow it.
    pub(super) fn pass_on_changes(&mut self, partition: PartitionId) {
        let Some(replica) = &mut self.replicas[usize::from(partition.0)] else { return };
        if !replica.captures() || replica.is_restoring() {
            return;
        }
        replica.take_committed(&mut self.committed);
        let at = applied(replica);
        self.shared.views[usize::from(partition.0)].feed.grew(&mut self.committed, at);
    }

    /// Begins and ends to keep changes, as they are followed or not; says what is led; and puts into the log how
    /// far changes are passed on.
    pub(super) fn tick_feed(&mut self) {
        self.feed_ticks += 1;
        let limit = self.shared.settings.cdc_memory_bytes as usize;
        let limit = limit / usize::from(self.shared.partitions.count());
        let (now_us, policy) = (self.now.us, self.shared.settings.fsync);
        let mut led = Vec::new();
        for replica in self.replicas.iter_mut().flatten() {
            let partition = replica.partition();
            let feed = &self.shared.views[usize::from(partition.0)].feed;
            let cursor = replica.cursor();
            feed.set_cursor(cursor);
            if policy != Fsync::EverySec {
                feed.set_unconfirmed(cursor.needs(applied(replica)));
            }
            let wanted = feed.is_wanted(now_us);
            if wanted != replica.captures() {
                replica.set_capture(wanted);
                if wanted {
                    let at =
                        Cursor { revision: replica.revision(), index: replica.applied().index };
                    feed.begin(limit, at);
                } else {
                    feed.end();
                }
            }
            if replica.leads() {
                let cursor = Place { revision: cursor.revision, index: cursor.index };
                led.push(Led { partition: partition.0, term: replica.term(), cursor });
            }
        }
        self.tell_led(led);
        if self.feed_ticks.is_multiple_of(CURSOR_TICKS) {
            self.put_cursors();
        }
        if self.feed_ticks.is_multiple_of(TIDY_TICKS) {
            self.own().iter().for_each(|&partition| self.feed(partition).tidy());
        }
    }

    /// Has the logs of all partitions that are led here say how far their changes are passed on.
    pub(super) fn put_cursors(&mut self) {
        for index in 0..self.own().len() {
            self.put_cursor(self.own()[index]);
        }
    }

    /// Tells who follows what is led from here on, where that has changed.
    fn tell_led(&mut self, led: Vec<Led>) {
        let term_of = |one: &Led| (one.partition, one.term);
        if led.iter().map(term_of).eq(self.told_led.iter().map(term_of)) {
            return;
        }
        let mine = |one: &Led| self.shared.owner(PartitionId(one.partition)) == self.worker();
        self.shared.led.send_modify(|all| {
            let others = all.iter().filter(|one| !mine(one));
            *all = others.chain(&led).copied().collect();
        });
        self.told_led = led;
    }

    /// Has the log of a partition that is led here say how far its changes are passed on, if that has moved.
    pub(super) fn put_cursor(&mut self, partition: PartitionId) {
        if self.refusing.is_some() {
            return;
        }
        let confirmed = self.feed(partition).confirmed();
        let Some(replica) = &mut self.replicas[usize::from(partition.0)] else { return };
        if replica.leads() && confirmed > replica.cursor() && replica.propose_cursor(confirmed) {
            self.activate(partition);
        }
    }

    /// Lets all who wait for changes see that the node is stopping.
    pub(super) fn wake_followers(&self) {
        self.shared.views.iter().for_each(|view| view.feed.wake());
    }

    /// What the sync that begins now will have put on the disk, as far as somebody asks.
    pub(super) fn marks(&self) -> Vec<Mark> {
        let followed = self.replicas.iter().flatten().filter(|replica| {
            let publishes = self.shared.settings.rabbitmq_url.is_some();
            publishes || replica.captures()
        });
        let mark = |replica: &Replica<_>| Mark {
            partition: replica.partition(),
            applied: applied(replica),
            cursor: replica.cursor(),
        };
        followed.map(mark).collect()
    }

    /// The sync has ended.
    pub(super) fn note_synced(&self, marks: Vec<Mark>) {
        for Mark { partition, applied, cursor } in marks {
            let feed = self.feed(partition);
            feed.set_synced(applied);
            feed.set_unconfirmed(cursor.needs(applied));
        }
    }
}
