//! Walks over keys for a connection: the steps that can be taken here are taken at once, and the reply of
//! a partition that another node leads comes later.

use flux_core::{Error, Reply};
use parking_lot::Mutex;

use super::Worker;
use super::dispatch::Dispatch;
use crate::connection::{Connection, Slot, WalkRender};
use crate::mailbox::{Ask, Origin};
use crate::resp::Session;
use crate::scan::Walk;
use crate::stale::Age;

impl Worker {
    /// Takes a walk for a connection that has nothing under way.
    pub(super) fn walk(
        &mut self,
        key: usize,
        mut walk: Walk,
        render: WalkRender,
        session: Option<&Mutex<Session>>,
    ) {
        let connection = &mut self.connections[key];
        let origin = Origin {
            worker: self.id,
            part: 0,
            connection: key as u32,
            serial: connection.serial,
            sequence: connection.next_sequence(),
        };
        match self.dispatch.go_on(&mut walk, origin) {
            Some(outcome) => {
                let session = session.map(Mutex::lock);
                render.put(walk, outcome, session.as_deref(), &mut connection.output);
            }
            None => {
                connection.push(Slot::Walk { walk: Box::new(walk), render, outcome: None });
                // Later requests of the connection must not run between its steps.
                connection.barrier = true;
            }
        }
    }
}

/// Gives a reply to the walk that waits for it, and goes on with it. The reply comes back if there is no
/// such walk; nothing does while the walk has more steps.
pub(super) fn continue_walk(
    connection: &mut Connection,
    dispatch: &mut Dispatch,
    origin: Origin,
    reply: Reply,
) -> Option<Reply> {
    let Some((walk, outcome)) = connection.walk(origin.sequence) else { return Some(reply) };
    let taken = walk.take(reply, Age::CURRENT);
    *outcome = match taken {
        Ok(()) => dispatch.go_on(walk, origin),
        Err(error) => Some(Err(error)),
    };
    outcome.is_some().then_some(Reply::Integer(0))
}

impl Dispatch {
    /// Takes the steps of a walk until it ends, which is its outcome, or has to wait for a partition.
    fn go_on(&mut self, walk: &mut Walk, origin: Origin) -> Option<Result<(), Error>> {
        loop {
            let Some((partition, command)) = walk.step() else { return Some(Ok(())) };
            let age = self.shared().age(partition, self.now).filter(|_| walk.ask.stale);
            let here = match age {
                Some(_) => self.read_stale(partition, &command),
                None => self.read(partition, &command),
            };
            let reply = match here {
                Some(reply) => reply,
                // Whoever is asked leads, or says that it does not: the answer is not a stale one.
                None => {
                    let ask = Ask { stale: false, ..walk.ask.clone() };
                    self.submit(partition, &command, ask, origin)?
                }
            };
            if let Err(error) = walk.take(reply, age.unwrap_or(Age::CURRENT)) {
                return Some(Err(error));
            }
        }
    }
}
