//! Reads of many keys: split by the node that serves them, sent side by side, and put together again.
//!
//! What this module does not do: read keys of several partitions at one moment.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use bytes::Bytes;
use flux_proto::native::{Request, Response};

use crate::call::{Kind, Setback};
use crate::route::Target;
use crate::topology::Topology;
use crate::types::{Position, Stale, Value};
use crate::{Client, Error};

/// The keys that one node is asked for.
struct Part {
    target: Target<'static>,
    /// Where they stand in the whole request.
    positions: Vec<usize>,
}

impl Client {
    /// The values of keys, in the order asked.
    pub(crate) async fn gather(&self, keys: &[&[u8]]) -> Result<Stale<Vec<Option<Value>>>, Error> {
        let whole = Request::BatchGet { keys: keys.to_vec() };
        let mut effort = self.effort(&Target::Any, &whole).await?;
        let mut values = vec![None; keys.len()];
        let mut position = Merged::Nothing;
        let mut pending: Vec<usize> = (0..keys.len()).collect();
        loop {
            let topology = self.shared.directory.first(effort.deadline).await?.topology;
            let parts = self.split(&topology, keys, &pending);
            let request = |part: &Part| Request::BatchGet {
                keys: part.positions.iter().map(|&position| keys[position]).collect(),
            };
            let requests: Vec<_> = parts.iter().map(request).collect();
            let attempt = async |(part, request): (&Part, &Request<'_>)| {
                let accept = |frame: &Bytes, response: Response<'_>| match response {
                    Response::Values(found) if found.len() == part.positions.len() => {
                        let value = |found| Value::new(frame, found);
                        Some(
                            found.iter().map(|found| found.as_ref().map(value)).collect::<Vec<_>>(),
                        )
                    }
                    _ => None,
                };
                self.attempt(&part.target, request, &effort, &accept).await
            };
            let attempts = parts.iter().zip(&requests).map(attempt).collect();
            let outcomes = all(attempts).await;
            pending.clear();
            let mut setback: Option<Setback> = None;
            for (part, outcome) in parts.into_iter().zip(outcomes) {
                match outcome {
                    Ok((found, at)) => {
                        for (&position, value) in part.positions.iter().zip(found) {
                            values[position] = value;
                        }
                        position = position.with(at.map(Position::new));
                    }
                    Err(worse) => {
                        pending.extend(part.positions);
                        setback = Some(match setback {
                            Some(bad) if worse_kind(bad.kind) >= worse_kind(worse.kind) => bad,
                            _ => worse,
                        });
                    }
                }
            }
            match setback {
                None => return Ok(Stale { value: values, position: position.end() }),
                Some(setback) => self.recover(&mut effort, setback).await?,
            }
        }
    }

    /// Sorts keys by the node to ask. Keys of one partition stay together, which is what makes them be
    /// read at one moment.
    fn split(&self, topology: &Topology, keys: &[&[u8]], pending: &[usize]) -> Vec<Part> {
        let partitions = topology.partitions().filter(|_| topology.is_clustered());
        if partitions.is_none() || pending.is_empty() {
            return vec![Part { target: Target::Any, positions: pending.to_vec() }];
        }
        let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        let mut parts: BTreeMap<(Option<u16>, u16), Part> = BTreeMap::new();
        for &position in pending {
            let partition = topology.partition_of(keys[position]).unwrap_or(0);
            let replicas = if self.stale_reads { topology.replicas(partition) } else { &[] };
            let seat = match replicas {
                [] => topology.leader(partition),
                replicas => Some(replicas[turn % replicas.len()]),
            };
            // Without a leader each partition waits for its own.
            let group = (seat, if seat.is_some() { 0 } else { partition });
            let part = parts.entry(group).or_insert_with(|| {
                let seat = seat.filter(|_| !replicas.is_empty());
                let target = match seat.and_then(|seat| topology.seat(seat)) {
                    Some(seat) => Target::Seat(Arc::clone(seat)),
                    None => Target::Partition(partition),
                };
                Part { target, positions: Vec::new() }
            });
            part.positions.push(position);
        }
        parts.into_values().collect()
    }
}

/// Of several setbacks the worst decides what follows.
fn worse_kind(kind: Kind) -> u8 {
    match kind {
        Kind::Elsewhere { leader_is_known: true } => 0,
        Kind::Elsewhere { leader_is_known: false } => 1,
        Kind::Unsent => 2,
        Kind::Busy => 3,
        Kind::Lost => 4,
        Kind::Final => 5,
    }
}

/// The position of what has been answered so far.
enum Merged {
    Nothing,
    All(Position),
    /// An answer came without one.
    Untold,
}

impl Merged {
    fn with(self, position: Option<Position>) -> Merged {
        match (self, position) {
            (Merged::Nothing, Some(position)) => Merged::All(position),
            (Merged::All(all), Some(position)) => Merged::All(all.merge(position)),
            (Merged::Untold, _) | (_, None) => Merged::Untold,
        }
    }

    fn end(self) -> Option<Position> {
        match self {
            Merged::All(position) => Some(position),
            Merged::Nothing | Merged::Untold => None,
        }
    }
}

/// Waits for all of a few futures, side by side.
async fn all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
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
