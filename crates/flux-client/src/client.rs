//! The client: its operations.
//!
//! How one is sent, and sent again, stands in `call`; where to, in `route`.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flux_proto::native::{
    BatchReply, Condition, DeleteReply, Expiry, Guard, Request, Response, Write,
};
use flux_proto::trace::TraceContext;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::budget::RetryBudget;
use crate::dial::{Dial, Tcp};
use crate::directory::Directory;
use crate::node::Nodes;
use crate::route::Target;
use crate::session::Ledger;
use crate::types::{
    Counter, Page, Position, ScanOptions, ServerInfo, SetOptions, SetReply, Stale, Value,
};
use crate::{Config, Error};

/// A client of one node or of a cluster; cheap to clone, and clones share their connections.
///
/// Every call ends by the request timeout at the latest. A call may be dropped at any time; whether a
/// write that was dropped took place is not known.
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    pub(crate) timeout: Duration,
    pub(crate) stale_reads: bool,
    /// Goes with every write.
    pub(crate) trace: Option<TraceContext>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<Config>,
    pub(crate) directory: Arc<Directory>,
    /// Counts choices among nodes, so that they take turns.
    pub(crate) turn: AtomicUsize,
    pub(crate) budget: RetryBudget,
    /// None where writes carry no session.
    pub(crate) ledger: Option<Ledger>,
    /// The directory's task; aborted when the last client is dropped.
    tasks: Mutex<JoinSet<()>>,
}

impl Client {
    /// Connects; fails with [`Error::Unavailable`] where no endpoint can be reached.
    pub async fn connect(config: Config) -> Result<Client, Error> {
        let client = Client::new(config)?;
        client.ready().await?;
        Ok(client)
    }

    /// A client that connects in the background: calls fail with [`Error::Unavailable`] until it
    /// has. Must be called within a tokio runtime.
    pub fn new(config: Config) -> Result<Client, Error> {
        Client::with_dial(config, Arc::new(Tcp))
    }

    /// As [`Client::new`], with connections that `dial` opens.
    pub fn with_dial(config: Config, dial: Arc<dyn Dial>) -> Result<Client, Error> {
        config.check()?;
        let config = Arc::new(config);
        let nodes = Nodes::new(Arc::clone(&config), dial);
        let directory = Arc::new(Directory::new(Arc::clone(&config), nodes)?);
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&directory).run());
        let budget = RetryBudget::new(config.retry.budget_percent, config.retry.reserve);
        let timeout = config.request_timeout;
        let ledger = config.sessions.then(Ledger::new);
        let (turn, tasks) = (AtomicUsize::new(0), Mutex::new(tasks));
        let shared = Shared { config, directory, turn, budget, ledger, tasks };
        Ok(Client { shared: Arc::new(shared), timeout, stale_reads: false, trace: None })
    }

    /// Waits until a node is connected and was asked who leads.
    pub async fn ready(&self) -> Result<(), Error> {
        let deadline = Instant::now() + self.timeout;
        let placed = self.place(&Target::Any, false, deadline).await;
        placed.map(|_| ()).map_err(|setback| setback.error)
    }

    /// The same client with another request timeout.
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        Client { timeout, ..self.clone() }
    }

    /// The same client, whose reads any replica may answer from what it has applied.
    pub fn with_stale_reads(&self) -> Client {
        Client { stale_reads: true, ..self.clone() }
    }

    /// The same client, whose writes tell that they belong to this trace: it comes with the events of what
    /// they change. A node that does not know of traces writes all the same.
    pub fn with_trace(&self, trace: TraceContext) -> Client {
        Client { trace: Some(trace), ..self.clone() }
    }

    /// Closes all connections, also those of clones. Calls under way end as if the connection had
    /// broken, so finish them first.
    pub async fn close(&self) {
        let tasks = &self.shared.tasks;
        let mut tasks = std::mem::take(&mut *tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.shared.directory.close().await;
    }

    /// The value of a key, if it is there.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        Ok(self.read(key).await?.value)
    }

    /// The value of a key as any replica has it, and how old that is.
    pub async fn stale_get(&self, key: &[u8]) -> Result<Stale<Option<Value>>, Error> {
        self.with_stale_reads().read(key).await
    }

    async fn read(&self, key: &[u8]) -> Result<Stale<Option<Value>>, Error> {
        let request = Request::Get { key };
        let answer = self.call(Target::Key(key), &request, |frame, response| match response {
            Response::Value(value) => Some(value.map(|value| Value::new(frame, &value))),
            _ => None,
        });
        let (value, position) = answer.await?;
        Ok(Stale { value, position: position.map(Position::new) })
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
        let answer = self.call(Target::Key(key), &request, |frame, response| match response {
            Response::Set(reply) => Some(SetReply::new(frame, &reply)),
            _ => None,
        });
        Ok(answer.await?.0)
    }

    /// Removes a key.
    pub async fn delete(&self, key: &[u8], condition: Condition) -> Result<DeleteReply, Error> {
        let request = Request::Delete { key, condition };
        let answer = self.call(Target::Key(key), &request, |_, response| match response {
            Response::Deleted(reply) => Some(reply),
            _ => None,
        });
        Ok(answer.await?.0)
    }

    /// Adds to a number in decimal text; an absent key counts as 0.
    pub async fn increment(&self, key: &[u8], delta: i64) -> Result<Counter, Error> {
        let request = Request::Increment { key, delta };
        let answer = self.call(Target::Key(key), &request, |_, response| match response {
            Response::Counter { value, version } => Some(Counter { value, version }),
            _ => None,
        });
        Ok(answer.await?.0)
    }

    /// Sets when a key expires, with `Expiry::In` or `Expiry::At`; false where there is no key.
    pub async fn expire(&self, key: &[u8], expiry: Expiry) -> Result<bool, Error> {
        let request = Request::Expire { key, expiry };
        Ok(self.call(Target::Key(key), &request, |_, response| changed(&response)).await?.0)
    }

    /// Removes a key's expiry; false where there was none.
    pub async fn persist(&self, key: &[u8]) -> Result<bool, Error> {
        let request = Request::Persist { key };
        Ok(self.call(Target::Key(key), &request, |_, response| changed(&response)).await?.0)
    }

    /// The values of keys of any partitions, in the order asked. Keys of one partition are read at
    /// one moment.
    pub async fn batch_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Value>>, Error> {
        Ok(self.gather(keys).await?.value)
    }

    /// The values of keys as any replicas have them, and how old the oldest is.
    pub async fn stale_batch_get(
        &self,
        keys: &[&[u8]],
    ) -> Result<Stale<Vec<Option<Value>>>, Error> {
        self.with_stale_reads().gather(keys).await
    }

    /// Writes keys of one partition, all or none; keys of several are refused with
    /// `Code::CrossSlot`.
    pub async fn batch_write(
        &self,
        guards: &[Guard<'_>],
        writes: &[Write<'_>],
    ) -> Result<BatchReply, Error> {
        let request = Request::BatchWrite { guards: guards.to_vec(), writes: writes.to_vec() };
        let written = writes.first().map(|write| match *write {
            Write::Set { key, .. } | Write::Delete { key, .. } | Write::Increment { key, .. } => {
                key
            }
        });
        let key = guards.first().map(|guard| guard.key).or(written);
        let target = key.map_or(Target::Any, Target::Key);
        let answer = self.call(target, &request, |_, response| match response {
            Response::Batch(reply) => Some(reply),
            _ => None,
        });
        Ok(answer.await?.0)
    }

    /// A page of keys; `cursor` is none for the first page, then what the page before gave.
    pub async fn scan(&self, options: &ScanOptions, cursor: Option<&[u8]>) -> Result<Page, Error> {
        self.page(options, cursor).await
    }

    /// Makes sure that a node answers.
    pub async fn ping(&self) -> Result<(), Error> {
        let request = Request::Ping { payload: b"" };
        let answer = self.call(Target::Any, &request, |_, response| match response {
            Response::Pong { .. } => Some(()),
            _ => None,
        });
        answer.await.map(|_| ())
    }

    /// A node's account of itself and of the cluster.
    pub async fn info(&self) -> Result<ServerInfo, Error> {
        let answer = self.call(Target::Any, &Request::Info, |_, response| match response {
            Response::Info(info) => Some(ServerInfo::new(&info)),
            _ => None,
        });
        Ok(answer.await?.0)
    }
}

fn changed(response: &Response<'_>) -> Option<bool> {
    match response {
        Response::Changed(changed) => Some(*changed),
        _ => None,
    }
}
