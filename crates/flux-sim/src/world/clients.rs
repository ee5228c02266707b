//! Between clients and nodes: requests and answers on their way.

use flux_core::{Error, Reply};

use super::{Event, World};
use crate::check::history::Answer;
use crate::client::{Next, Response};
use crate::node::Waiter;

/// Of a thousand requests, and of a thousand answers, so many are lost.
const LOST_PER_MILLE: u32 = 4;

impl World {
    pub(super) fn client_acts(&mut self, client: u32) {
        let one = &mut self.clients[client as usize];
        if self.settling && !one.is_busy() {
            return;
        }
        let next = one.act(self.now_us, &self.plan);
        self.client_next(client, next);
    }

    pub(super) fn client_receives(
        &mut self,
        client: u32,
        attempt: (u64, usize),
        response: Option<Response>,
    ) {
        let one = &mut self.clients[client as usize];
        let next = one.receive(self.now_us, attempt, response, &self.plan, &mut self.history);
        if !matches!(next, Next::Nothing) {
            self.trace.event(self.now_us, 5);
            self.trace.word(attempt.0);
            match response {
                Some(response) => self.trace.line(
                    self.now_us,
                    format_args!("c{client}#{} h{}: {response:?}", attempt.0, attempt.1),
                ),
                None => self.trace.line(
                    self.now_us,
                    format_args!("c{client}#{} h{}: no answer", attempt.0, attempt.1),
                ),
            }
        }
        self.client_next(client, next);
    }

    fn client_next(&mut self, client: u32, next: Next) {
        match next {
            Next::Nothing => {}
            Next::Pause(for_us) => {
                self.queue.push(self.now_us + for_us, Event::ClientActs(client));
            }
            Next::Send(host, request) => {
                let attempt = request.attempt;
                self.note(4, &[u64::from(client), attempt, host as u64]);
                self.say(format_args!(
                    "c{client}#{attempt} -> h{host} {} {:?}",
                    request.key, request.ask
                ));
                let timeout = self.now_us + self.plan.timeout_us;
                self.queue.push(timeout, Event::ClientTimesOut(client, attempt, host));
                if let Some(at) = self.client_delay() {
                    self.queue.push(at, Event::Request(host, request));
                }
            }
        }
    }

    /// A node has an answer.
    pub(super) fn reply(&mut self, host: usize, waiter: Waiter, partition: u16, reply: Reply) {
        let response = match reply {
            Reply::Value(None) => Response::Answer(Answer::Value(None)),
            Reply::Value(Some(value)) => match number(&value.bytes) {
                Some(number) => Response::Answer(Answer::Value(Some((number, value.version)))),
                None => panic!("a value that nobody wrote: {:?}", value.bytes),
            },
            Reply::Written { version } => Response::Answer(Answer::Written(version)),
            Reply::NotWritten { version } => Response::Answer(Answer::NotWritten(version)),
            Reply::Integer(count) => Response::Answer(Answer::Deleted(count != 0)),
            Reply::Counter { value, version } => Response::Answer(Answer::Counter(value, version)),
            Reply::Error(Error::NotLeader) => Response::NotLeader(self.hint(host, partition)),
            Reply::Error(Error::OutcomeUnknown) => Response::Unknown,
            Reply::Error(Error::AnswerGone) => Response::Gone,
            Reply::Error(_) => Response::Refused,
            other => panic!("no command of the workload has this reply: {other:?}"),
        };
        if let Some(at) = self.client_delay() {
            self.queue.push(at, Event::Response(waiter.0, waiter.1, host, response));
        }
    }

    /// Where a host believes the leader of a partition to be.
    fn hint(&self, host: usize, partition: u16) -> Option<usize> {
        let hosted = self.hosts[host].process.as_ref()?.hosted.get(&partition)?;
        let node = (hosted.view.leader() >> 32) as u32;
        self.hosts.iter().position(|host| host.node == node)
    }

    fn client_delay(&mut self) -> Option<u64> {
        let (low, high) = self.plan.client_delay_us;
        let at = self.now_us + self.random.between(low, high);
        (!self.random.per_mille(LOST_PER_MILLE)).then_some(at)
    }
}

fn number(bytes: &[u8]) -> Option<i64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}
