//! The gRPC service `flux.kv.v1.KV`. Listening, and what is answered before the node serves, is the server's.

mod ask;
mod convert;
mod server;
mod watch;

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use flux_core::command::{KeyFilter, PageLimits};
use flux_core::{Command, PartitionId, Partitions, Reply};
use flux_proto::Code;
use flux_proto::grpc::CODE_TRAILER;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::grpc::kv_v1::kv_server::Kv;
use tonic::codegen::BoxStream;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use crate::clock;
use crate::codes::code_of;
use crate::feed::watch::Watches;
use crate::mailbox::Ask;
use crate::scan::{self, PAGE_BYTES, PAGE_LOOKED_AT, Scope, Walk};
use crate::shared::Shared;
use crate::stale::Age;
use ask::{read_ask, write_ask};
pub(crate) use server::Server;

/// Keys of a batch and writes of a batch.
const MAX_BATCH: usize = 65_536;
const MAX_PAGE: u32 = 10_000;
const DEFAULT_PAGE: u32 = 100;

struct Service {
    shared: Arc<Shared>,
    watches: Arc<Watches>,
}

impl Service {
    fn partitions(&self) -> Partitions {
        self.shared.partitions
    }

    async fn run(
        &self,
        partition: PartitionId,
        command: Command<Vec<u8>>,
        ask: Ask,
    ) -> Result<Reply, Status> {
        answer_of(self.shared.execute(partition, command, ask).await)
    }

    fn keyed(
        &self,
        key: bytes::Bytes,
        ask: Ask,
        command: impl FnOnce(Vec<u8>) -> Command<Vec<u8>>,
    ) -> impl Future<Output = Result<Reply, Status>> {
        let partition = self.partitions().of(&key);
        self.run(partition, command(key.into()), ask)
    }
}

impl Service {
    /// A read of one key, and how old its answer is, for a stale one.
    async fn read(
        &self,
        command: Command<Vec<u8>>,
        ask: Ask,
    ) -> Result<(Reply, Option<Age>), Status> {
        let Command::Get { key } = &command else { unreachable!("only GET reads one key") };
        let partition = self.partitions().of(key);
        let stale = ask.stale;
        let (reply, age) = self.read_in(partition, command, ask).await;
        Ok((answer_of(reply)?, stale.then_some(age)))
    }

    /// A read of a partition: a stale one from the replica here, if there is one, else by the leader.
    async fn read_in(
        &self,
        partition: PartitionId,
        command: Command<Vec<u8>>,
        ask: Ask,
    ) -> (Reply, Age) {
        let now = clock::now();
        if ask.stale
            && let Some(age) = self.shared.age(partition, now)
            && let Some((reply, ..)) = self.shared.read_stale(partition, &command.borrowed(), now)
        {
            self.shared.stats.reads.add(1);
            return (reply, age);
        }
        let ask = Ask { stale: false, ..ask };
        (self.shared.execute(partition, command, ask).await, Age::CURRENT)
    }
}

/// A status with its code's name in a trailer.
fn status(code: Code, message: &str) -> Status {
    let mut status = Status::new(code.grpc(), message);
    status.metadata_mut().insert(CODE_TRAILER, MetadataValue::from_static(code.name()));
    status
}

fn answer_of(reply: Reply) -> Result<Reply, Status> {
    match reply {
        Reply::Error(error) => Err(status(code_of(&error), &error.to_string())),
        reply => Ok(reply),
    }
}

fn invalid(message: impl AsRef<str>) -> Status {
    status(Code::InvalidArgument, message.as_ref())
}

/// A reply that the command never gives: a defect of ours.
fn unexpected(reply: &Reply) -> Status {
    status(Code::Internal, &format!("unexpected reply {reply:?}"))
}

#[tonic::async_trait]
impl Kv for Service {
    async fn get(
        &self,
        request: Request<wire::GetRequest>,
    ) -> Result<Response<wire::GetResponse>, Status> {
        let ask = read_ask(&request, request.get_ref().consistency);
        let key: Vec<u8> = request.into_inner().key.into();
        let (reply, age) = self.read(Command::Get { key }, ask).await?;
        match reply {
            Reply::Value(value) => {
                let position = age.map(convert::position);
                Ok(Response::new(wire::GetResponse { position, ..convert::found(value) }))
            }
            reply => Err(unexpected(&reply)),
        }
    }

    async fn set(
        &self,
        request: Request<wire::SetRequest>,
    ) -> Result<Response<wire::SetResponse>, Status> {
        let ask = write_ask(&request, request.get_ref().session.as_ref())?;
        let wire::SetRequest { key, value, ttl_ms, keep_ttl, only_if, return_previous, .. } =
            request.into_inner();
        let expiry = convert::expiry(ttl_ms, keep_ttl)?;
        let condition = convert::condition(only_if)?;
        let name = key.clone();
        let set = |key| {
            let value = value.into();
            Command::Set { key, value, expiry, condition, return_previous }
        };
        let (written, version, previous) = match self.keyed(key, ask, set).await? {
            Reply::Written { version } => (true, Some(version), None),
            Reply::NotWritten { version } => (false, Some(version), None),
            Reply::Previous { previous, written } => (written, None, previous),
            reply => return Err(unexpected(&reply)),
        };
        let previous = previous.map(|value| convert::item(name, value));
        Ok(Response::new(wire::SetResponse { written, version, previous }))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteRequest>,
    ) -> Result<Response<wire::DeleteResponse>, Status> {
        let ask = write_ask(&request, request.get_ref().session.as_ref())?;
        let wire::DeleteRequest { key, only_if, .. } = request.into_inner();
        let condition = convert::condition(only_if)?;
        let delete = |key| Command::DeleteIf { key, condition };
        let (deleted, conflict_version) = match self.keyed(key, ask, delete).await? {
            Reply::Integer(count) => (count > 0, None),
            Reply::NotWritten { version } => (false, Some(version)),
            reply => return Err(unexpected(&reply)),
        };
        Ok(Response::new(wire::DeleteResponse { deleted, conflict_version }))
    }

    async fn increment(
        &self,
        request: Request<wire::IncrementRequest>,
    ) -> Result<Response<wire::IncrementResponse>, Status> {
        let ask = write_ask(&request, request.get_ref().session.as_ref())?;
        let wire::IncrementRequest { key, delta, .. } = request.into_inner();
        let delta = delta.unwrap_or(1);
        match self.keyed(key, ask, |key| Command::Increment { key, delta }).await? {
            Reply::Counter { value, version } => {
                Ok(Response::new(wire::IncrementResponse { value, version }))
            }
            reply => Err(unexpected(&reply)),
        }
    }

    async fn batch_get(
        &self,
        request: Request<wire::BatchGetRequest>,
    ) -> Result<Response<wire::BatchGetResponse>, Status> {
        let ask = read_ask(&request, request.get_ref().consistency);
        let keys = request.into_inner().keys;
        check_count("keys", keys.len())?;
        let mut parts: BTreeMap<PartitionId, Vec<usize>> = BTreeMap::new();
        for (position, key) in keys.iter().enumerate() {
            parts.entry(self.partitions().of(key)).or_default().push(position);
        }
        let age = self.shared.age_of_all(parts.keys().copied(), clock::now());
        let wanted = ask.stale;
        // Where a replica is missing the leaders are asked for all.
        let ask = Ask { stale: ask.stale && age.is_some(), ..ask };
        let read = |(&partition, positions): (&PartitionId, &Vec<usize>)| {
            let keys = positions.iter().map(|&position| keys[position].to_vec()).collect();
            self.run(partition, Command::GetMany { keys }, ask.clone())
        };
        let found = together(parts.iter().map(read).collect()).await;
        let mut values = vec![wire::GetResponse::default(); keys.len()];
        for (positions, found) in parts.values().zip(found) {
            match found? {
                Reply::Values(found) => {
                    for (&position, value) in positions.iter().zip(found) {
                        values[position] = convert::found(value);
                    }
                }
                reply => return Err(unexpected(&reply)),
            }
        }
        let age = age.filter(|_| ask.stale).unwrap_or(Age::CURRENT);
        let position = wanted.then(|| convert::position(age));
        Ok(Response::new(wire::BatchGetResponse { values, position }))
    }

    async fn batch_write(
        &self,
        request: Request<wire::BatchWriteRequest>,
    ) -> Result<Response<wire::BatchWriteResponse>, Status> {
        let ask = write_ask(&request, request.get_ref().session.as_ref())?;
        let wire::BatchWriteRequest { ops, guards, .. } = request.into_inner();
        check_count("ops", ops.len())?;
        check_count("guards", guards.len())?;
        let batch = convert::batch(ops, guards, self.partitions())?;
        let Some((partition, command)) = batch else {
            let written = wire::BatchWriteResponse { written: true, ..Default::default() };
            return Ok(Response::new(written));
        };
        let response = match self.run(partition, command, ask).await? {
            Reply::Many(replies) => wire::BatchWriteResponse {
                written: true,
                results: replies.iter().map(convert::write_result).collect(),
                failed_op: None,
            },
            Reply::Aborted { position } => wire::BatchWriteResponse {
                written: false,
                results: Vec::new(),
                failed_op: position.map(|position| position as u32),
            },
            reply => return Err(unexpected(&reply)),
        };
        Ok(Response::new(response))
    }

    async fn scan(
        &self,
        request: Request<wire::ScanRequest>,
    ) -> Result<Response<wire::ScanResponse>, Status> {
        let ask = read_ask(&request, request.get_ref().consistency);
        let wire::ScanRequest { prefix, page_token, limit, keys_only, .. } = request.into_inner();
        let limit = match limit {
            0 => DEFAULT_PAGE,
            1..=MAX_PAGE => limit,
            _ => return Err(invalid(format!("limit {limit} is over {MAX_PAGE}"))),
        };
        let count = self.partitions().count();
        let cursor = scan::cursor_from_bytes(&page_token, count)
            .ok_or_else(|| invalid("page_token is not one that a page gave"))?;
        let limits = PageLimits { matches: limit, looked_at: PAGE_LOOKED_AT, bytes: PAGE_BYTES };
        let filter = KeyFilter::Prefix(prefix.into());
        let mut walk = Walk::new(Scope::All(count), cursor, filter, keys_only, limits);
        while let Some((partition, command)) = walk.step() {
            let (reply, age) = self.read_in(partition, command.to_owned(), ask.clone()).await;
            let taken = walk.take(reply, age);
            taken.map_err(|error| status(code_of(&error), &error.to_string()))?;
        }
        let token = scan::cursor_to_bytes(walk.next());
        let position = walk.age.filter(|_| ask.stale).map(convert::position);
        let items = walk.items.into_iter();
        let items = items.map(|one| convert::item(one.key.into(), one.value)).collect();
        Ok(Response::new(wire::ScanResponse { items, next_page_token: token.into(), position }))
    }

    type WatchStream = BoxStream<wire::WatchResponse>;

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let messages = watch::open(&self.watches, request.into_inner())?;
        Ok(Response::new(Box::pin(messages)))
    }
}

fn check_count(field: &str, count: usize) -> Result<(), Status> {
    if count > MAX_BATCH {
        let message = format!("{count} {field} are over the limit of {MAX_BATCH}");
        return Err(status(Code::TooLarge, &message));
    }
    Ok(())
}

/// Waits for all of some futures, side by side.
async fn together<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut is_pending = false;
        for (future, output) in futures.iter_mut().zip(&mut outputs) {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(ready) => *output = Some(ready),
                    Poll::Pending => is_pending = true,
                }
            }
        }
        if is_pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    outputs.into_iter().flatten().collect()
}
