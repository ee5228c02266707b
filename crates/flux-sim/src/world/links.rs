//! The connections between nodes that frames travel on: one in each direction. A connection keeps the order
//! of its frames; what is lost breaks it, and all that follows on it is lost too.

use super::{Event, World};
use crate::node::{Frame, Work};
use crate::plan::MS;

/// One direction between two hosts.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    /// The connection, counted from 1.
    session: u64,
    /// The sender holds it for open.
    open: bool,
    /// Something on it was lost.
    broken: bool,
    /// When the last frame on it arrives.
    last_us: u64,
}

impl World {
    fn link(&mut self, from: usize, to: usize) -> &mut Link {
        let hosts = self.hosts.len();
        &mut self.frame_links[from * hosts + to]
    }

    pub(super) fn send_frame(&mut self, host: usize, node: u32, frame: Frame) {
        let Some(target) = self.hosts.iter().position(|host| host.node == node) else { return };
        let link = self.link(host, target);
        if !link.open || link.broken || target == host {
            return;
        }
        let (session, last_us) = (link.session, link.last_us);
        match self.network.send(self.now_us, host, target)[0] {
            Some(at) => {
                let at = at.max(last_us);
                self.link(host, target).last_us = at;
                let from = self.hosts[host].node;
                self.queue.push(at, Event::Frame(target, from, frame));
            }
            None => {
                self.link(host, target).broken = true;
                let notices = self.now_us + self.random.between(MS, 200 * MS);
                self.queue.push(notices, Event::LinkBreaks(host, target, session));
            }
        }
    }

    /// Both ends learn that a connection has broken, the other end perhaps only by the next one.
    pub(super) fn link_breaks(&mut self, from: usize, to: usize, session: u64) {
        let link = self.link(from, to);
        if link.session != session || !link.open {
            return;
        }
        (link.open, link.broken) = (false, true);
        let (own, other) = (self.hosts[from].node, self.hosts[to].node);
        self.deliver(from, Work::LinkDown(other));
        if self.random.per_mille(700) {
            self.deliver(to, Work::LinkDown(own));
        }
        let again = self.now_us + self.random.between(10 * MS, 200 * MS);
        self.queue.push(again, Event::LinkOpens(from, to));
    }

    /// A host opens a connection to another, if that can be reached now.
    pub(super) fn link_opens(&mut self, from: usize, to: usize) {
        let reachable = self.network.reaches(from, to) && self.network.reaches(to, from);
        let up = self.hosts[from].is_awake() && self.hosts[to].process.is_some();
        if self.link(from, to).open || self.hosts[from].process.is_none() {
            return;
        }
        if !reachable || !up {
            let again = self.now_us + self.random.between(20 * MS, 200 * MS);
            self.queue.push(again, Event::LinkOpens(from, to));
            return;
        }
        let at = self.now_us + self.random.between(100, 2 * MS);
        let link = self.link(from, to);
        link.session += 1;
        (link.open, link.broken, link.last_us) = (true, false, at.max(link.last_us));
        let at = link.last_us;
        let node = self.hosts[from].node;
        self.queue.push(at, Event::LinkOpened(to, node));
    }

    /// The process of a host is gone, and its connections with it. A host without power tells nobody.
    pub(super) fn links_end(&mut self, host: usize, power: bool) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            let own = self.link(host, other);
            (own.open, own.broken) = (false, true);
            let theirs = self.link(other, host);
            theirs.broken = true;
            let session = theirs.session;
            let latest = if power { 1500 * MS } else { 20 * MS };
            let notices = self.now_us + self.random.between(MS, latest);
            self.queue.push(notices, Event::LinkBreaks(other, host, session));
            if !power {
                let node = self.hosts[host].node;
                self.queue.push(notices, Event::LinkEnded(other, node));
            }
        }
    }

    /// The process of a host is new, and opens its connections.
    pub(super) fn links_begin(&mut self, host: usize) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            let at = self.now_us + self.random.between(MS, 50 * MS);
            self.queue.push(at, Event::LinkOpens(host, other));
        }
    }

    /// A host has not heard of a node for long, and opens its connection to it anew.
    pub(super) fn link_resets(&mut self, host: usize, node: u32) {
        if let Some(target) = self.hosts.iter().position(|host| host.node == node) {
            let session = self.link(host, target).session;
            self.link_breaks(host, target, session);
        }
    }
}
