//! The client: its operations, and which failed request is sent again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use flux_proto::Code;
use flux_proto::native::{
    BatchReply, Condition, DeleteReply, Expiry, FrameTooLarge, Guard, Request, RequestHeader,
    Response, Write, decode_response, encode_request,
};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::budget::RetryBudget;
use crate::exchange::Lost;
use crate::link::{Link, State};
use crate::types::{Counter, Page, ScanOptions, ServerInfo, SetOptions, SetReply, Value};
use crate::{Config, Error, backoff};

/// The longest pause before a retry.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// A client of one node or several; cheap to clone, and clones share their connections.
///
/// Every call ends by the request timeout at the latest. A call may be dropped at any time; whether a
/// write that was dropped took place is not known.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
    timeout: Duration,
    stale_reads: bool,
}

#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    links: Vec<Link>,
    next_link: AtomicUsize,
    budget: RetryBudget,
    /// Aborted when the last client is dropped.
    tasks: Mutex<JoinSet<()>>,
}

impl Client {
    /// Connects; fails with [`Error::Unavailable`] where no endpoint can be reached.
    pub async fn connect(config: Config) -> Result<Client, Error> {
        let client = Client::new(config)?;
        client.link(Instant::now() + client.timeout).await?;
        Ok(client)
    }

    /// A client that connects in the background: calls fail with [`Error::Unavailable`] until it
    /// has. Must be called within a tokio runtime.
    pub fn new(config: Config) -> Result<Client, Error> {
        config.check()?;
        let config = Arc::new(config);
        let mut tasks = JoinSet::new();
        let mut links = Vec::new();
        // Neighbours in the list are of different endpoints, so that turns alternate between them.
        for _ in 0..config.connections_per_endpoint {
            for endpoint in &config.endpoints {
                let (link, task) = Link::new(endpoint.clone(), Arc::clone(&config));
                links.push(link);
                tasks.spawn(task);
            }
        }
        let budget = RetryBudget::new(config.retry.budget_percent, config.retry.reserve);
        let timeout = config.request_timeout;
        let tasks = Mutex::new(tasks);
        let shared = Shared { config, links, next_link: AtomicUsize::new(0), budget, tasks };
        Ok(Client { shared: Arc::new(shared), timeout, stale_reads: false })
    }

    /// The same client with another request timeout.
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        Client { timeout, ..self.clone() }
    }

    /// The same client, whose reads any replica may answer from what it has applied.
    pub fn with_stale_reads(&self) -> Client {
        Client { stale_reads: true, ..self.clone() }
    }

    /// Closes all connections, also those of clones. Calls under way end as if the connection had
    /// broken, so finish them first.
    pub async fn close(&self) {
        let tasks = &self.shared.tasks;
        let mut tasks = std::mem::take(&mut *tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }

    /// The value of a key, if it is there.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        self.call(&Request::Get { key }, |frame, response| match response {
            Response::Value(value) => Some(value.map(|value| Value::new(frame, &value))),
            _ => None,
        })
        .await
    }

    /// Writes a value.
    pub async fn set(
        &self,
        key: &[u8],
        value: &[u8],
        options: SetOptions,
    ) -> Result<SetReply, Error> {
        let SetOptions { expiry, condition, return_previous } = options;
        let request = Request::Set { key, value, expiry, condition, return_previous };
        self.call(&request, |frame, response| match response {
            Response::Set(reply) => Some(SetReply::new(frame, &reply)),
            _ => None,
        })
        .await
    }

    /// Removes a key.
    pub async fn delete(&self, key: &[u8], condition: Condition) -> Result<DeleteReply, Error> {
        self.call(&Request::Delete { key, condition }, |_, response| match response {
            Response::Deleted(reply) => Some(reply),
            _ => None,
        })
        .await
    }

    /// Adds to a number in decimal text; an absent key counts as 0.
    pub async fn increment(&self, key: &[u8], delta: i64) -> Result<Counter, Error> {
        self.call(&Request::Increment { key, delta }, |_, response| match response {
            Response::Counter { value, version } => Some(Counter { value, version }),
            _ => None,
        })
        .await
    }

    /// Sets when a key expires, with `Expiry::In` or `Expiry::At`; false where there is no key.
    pub async fn expire(&self, key: &[u8], expiry: Expiry) -> Result<bool, Error> {
        self.call(&Request::Expire { key, expiry }, |_, response| changed(&response)).await
    }

    /// Removes a key's expiry; false where there was none.
    pub async fn persist(&self, key: &[u8]) -> Result<bool, Error> {
        self.call(&Request::Persist { key }, |_, response| changed(&response)).await
    }

    /// The values of keys of any partitions, in the order asked. Keys of one partition are read at
    /// one moment.
    pub async fn batch_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Value>>, Error> {
        let expected = keys.len();
        self.call(&Request::BatchGet { keys: keys.to_vec() }, move |frame, response| {
            let Response::Values(values) = response else {
                return None;
            };
            let values = values.iter().map(|v| v.as_ref().map(|v| Value::new(frame, v)));
            (values.len() == expected).then(|| values.collect())
        })
        .await
    }

    /// Writes keys of one partition, all or none; keys of several are refused with
    /// `Code::CrossSlot`.
    pub async fn batch_write(
        &self,
        guards: &[Guard<'_>],
        writes: &[Write<'_>],
    ) -> Result<BatchReply, Error> {
        let request = Request::BatchWrite { guards: guards.to_vec(), writes: writes.to_vec() };
        self.call(&request, |_, response| match response {
            Response::Batch(reply) => Some(reply),
            _ => None,
        })
        .await
    }

    /// A page of keys; `cursor` is none for the first page, then what the page before gave.
    pub async fn scan(&self, options: &ScanOptions, cursor: Option<&[u8]>) -> Result<Page, Error> {
        let request = Request::Scan {
            prefix: &options.prefix,
            cursor: cursor.unwrap_or_default(),
            limit: options.limit,
            keys_only: options.keys_only,
            partition: None,
        };
        self.call(&request, |frame, response| match response {
            Response::Page(page) => Some(Page::new(frame, &page)),
            _ => None,
        })
        .await
    }

    /// Makes sure that a node answers.
    pub async fn ping(&self) -> Result<(), Error> {
        self.call(&Request::Ping { payload: b"" }, |_, response| match response {
            Response::Pong { .. } => Some(()),
            _ => None,
        })
        .await
    }

    /// A node's account of itself and of who leads.
    pub async fn info(&self) -> Result<ServerInfo, Error> {
        self.call(&Request::Info, |_, response| match response {
            Response::Info(info) => Some(ServerInfo::new(&info)),
            _ => None,
        })
        .await
    }

    /// Sends a request until it is answered, must not be sent again, or time or budget are out.
    async fn call<T>(
        &self,
        request: &Request<'_>,
        accept: impl Fn(&Bytes, Response<'_>) -> Option<T>,
    ) -> Result<T, Error> {
        let retry = &self.shared.config.retry;
        let deadline = Instant::now() + self.timeout;
        let is_write = request.opcode().is_write();
        self.shared.budget.deposit();
        let mut attempt = 1;
        loop {
            let outcome = match self.attempt(request, deadline).await {
                Ok(frame) => understand(&frame, is_write, &accept),
                Err(error) => Err(error),
            };
            let error = match outcome {
                Err(error) if is_repeatable(&error) => error,
                decided => return decided,
            };
            let limit = backoff::limit(attempt, retry.backoff, RETRY_PAUSE_MAX);
            let pause = backoff::jittered(limit);
            let in_time = Instant::now() + pause < deadline;
            if attempt >= retry.max_attempts || !in_time || !self.shared.budget.withdraw() {
                return Err(error);
            }
            attempt += 1;
            sleep(pause).await;
        }
    }

    /// Sends a request once; gives the whole response frame.
    async fn attempt(&self, request: &Request<'_>, deadline: Instant) -> Result<Bytes, Error> {
        let (link, max_frame_bytes) = self.link(deadline).await?;
        let opcode = request.opcode();
        let left = deadline.saturating_duration_since(Instant::now());
        let header = RequestHeader {
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1),
            ..RequestHeader::new(0, opcode).with_stale(self.stale_reads && !opcode.is_write())
        };
        let mut frame = Vec::new();
        encode_request(&mut frame, &header, request)?;
        if frame.len() - 4 > max_frame_bytes {
            return Err(FrameTooLarge(frame.len() - 4).into());
        }
        match link.send(frame, deadline).await {
            Some(Ok(frame)) => Ok(frame),
            Some(Err(Lost::NotSent(reason))) => Err(Error::Unavailable(reason)),
            Some(Err(Lost::Refused(code, message))) => Err(Error::Refused { code, message }),
            Some(Err(Lost::Broken(reason))) if opcode.is_write() => {
                Err(Error::OutcomeUnknown(reason))
            }
            Some(Err(Lost::Broken(reason))) => Err(Error::ConnectionLost(reason)),
            None if opcode.is_write() => Err(Error::OutcomeUnknown(Error::Timeout.to_string())),
            None => Err(Error::Timeout),
        }
    }

    /// A link that is up, in turn; waits for one only while none is known to be down.
    async fn link(&self, deadline: Instant) -> Result<(&Link, usize), Error> {
        let links = &self.shared.links;
        let first = self.shared.next_link.fetch_add(1, Ordering::Relaxed);
        loop {
            let mut connecting = None;
            let mut down = None;
            for offset in 0..links.len() {
                let link = &links[first.wrapping_add(offset) % links.len()];
                if link.is_closed() {
                    return Err(Error::Closed);
                }
                match link.state() {
                    State::Up { max_frame_bytes } => return Ok((link, max_frame_bytes)),
                    State::Connecting => connecting = Some(link),
                    State::Down(reason) => down = Some(reason),
                }
            }
            let Some(link) = connecting else {
                return Err(Error::Unavailable(down.map_or_else(String::new, |r| r.to_string())));
            };
            if tokio::time::timeout_at(deadline, link.settled()).await.is_err() {
                return Err(Error::Unavailable("no connection in time".to_owned()));
            }
        }
    }
}

fn changed(response: &Response<'_>) -> Option<bool> {
    match response {
        Response::Changed(changed) => Some(*changed),
        _ => None,
    }
}

/// Makes an answer of a response frame. One that cannot be understood leaves a write undecided.
fn understand<T>(
    frame: &Bytes,
    is_write: bool,
    accept: impl Fn(&Bytes, Response<'_>) -> Option<T>,
) -> Result<T, Error> {
    let strange = |text: String| {
        if is_write { Error::OutcomeUnknown(text) } else { Error::Protocol(text) }
    };
    let decoded = match decode_response(frame) {
        Ok(Some((decoded, _))) => decoded.response().map_err(|error| strange(error.to_string()))?,
        Ok(None) => return Err(strange("half a frame".to_owned())),
        Err(error) => return Err(strange(error.to_string())),
    };
    match decoded {
        Ok(response) => accept(frame, response)
            .ok_or_else(|| strange("the answer is of another operation".to_owned())),
        Err(failure) if is_write && failure.code().outcome_is_unknown() => {
            Err(Error::OutcomeUnknown(failure.message.to_owned()))
        }
        Err(failure) => {
            Err(Error::Refused { code: failure.code(), message: failure.message.to_owned() })
        }
    }
}

/// Whether the request had no effect and may do better soon or elsewhere. Lack of memory or disk
/// space does not pass so fast.
fn is_repeatable(error: &Error) -> bool {
    match error {
        Error::Unavailable(_) | Error::ConnectionLost(_) => true,
        Error::Refused { code, .. } => {
            matches!(code, Code::Overloaded | Code::Unavailable | Code::NotLeader | Code::Stopping)
        }
        _ => false,
    }
}
