//! The load over gRPC: each client is one HTTP/2 connection, and carries as many calls at a time as
//! the pipeline is deep.

use std::{cell::RefCell, future::poll_fn, rc::Rc, sync::atomic::Ordering};

use anyhow::Context;
use bytes::Bytes;
use flux_proto::grpc::{
    CODE_TRAILER,
    kv_v1::{DeleteRequest, GetRequest, IncrementRequest, SetRequest, kv_client::KvClient},
};
use tokio::time::{Instant, timeout_at};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::{
    lane::{NO_REPLY, Shared, Window},
    measure::Measurements,
    pace::{Pace, Timer},
    phase::{Phase, Share, StartLine, ThreadOutcome, finished},
    workload::{Operation, Request, Workload},
};

/// Runs one thread's part of a phase.
pub async fn run_calls(
    phase: &Phase,
    number: u64,
    start_line: &StartLine,
    shared: &Shared,
) -> anyhow::Result<ThreadOutcome> {
    let mut channels = Vec::new();
    let mut connected = Ok(());
    for client in (number..phase.clients).step_by(phase.threads as usize) {
        match connect(phase.address(client)).await {
            Ok(channel) => channels.push((client, channel)),
            Err(error) => {
                connected = Err(error);
                break;
            }
        }
    }
    let Some(start) = start_line.wait(connected)? else {
        return Ok(None);
    };
    let measurements = Rc::new(RefCell::new(Measurements::default()));
    let window = phase.window(start);
    let lanes = phase.clients * phase.pipeline;
    let mut tasks = Vec::new();
    for (client, channel) in channels {
        for call in 0..phase.pipeline {
            let share = Share { lane: call * phase.clients + client, lanes };
            let caller = Caller {
                client: KvClient::new(channel.clone()),
                workload: Workload::new(phase.shape.clone(), share.lane, lanes),
                pace: phase.pace(start, share),
                window,
                quota: phase.quota(share),
                timer: Timer::exact()?,
                measurements: measurements.clone(),
                shared: shared.clone(),
            };
            tasks.push(tokio::task::spawn_local(caller.run()));
        }
    }
    for task in tasks {
        task.await?;
    }
    Ok(Some(finished(measurements.take(), window)))
}

async fn connect(address: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("`{address}` is no address"))?
        .tcp_nodelay(true);
    endpoint.connect().await.with_context(|| format!("cannot connect to {address}"))
}

/// One call after another.
struct Caller {
    client: KvClient<Channel>,
    workload: Workload,
    pace: Pace,
    window: Window,
    quota: Option<u64>,
    timer: Timer,
    measurements: Rc<RefCell<Measurements>>,
    shared: Shared,
}

impl Caller {
    async fn run(mut self) {
        while let Some(due) = self.next_due().await {
            let measured = due >= self.window.measure_from;
            if measured && let Some(left) = &mut self.quota {
                *left -= 1;
            }
            let request = self.workload.next();
            let operation = request.operation;
            let give_up_at = self.window.give_up_at;
            let call = call(&mut self.client, &request);
            let outcome = match give_up_at {
                None => Some(call.await),
                Some(at) => timeout_at(at, call).await.ok(),
            };
            self.shared.answered.fetch_add(1, Ordering::Relaxed);
            let now = Instant::now();
            self.measurements.borrow_mut().last_reply = Some(now);
            if !measured {
                continue;
            }
            let mut measurements = self.measurements.borrow_mut();
            match outcome {
                Some(Ok(())) => measurements.success(operation, now - due),
                Some(Err(status)) => measurements.failure(&kind(&status), 1),
                None => measurements.failure(NO_REPLY, 1),
            }
        }
        if let (Pace::Open(schedule), Some(end)) = (&self.pace, self.window.stop_at)
            && !self.shared.stop.load(Ordering::Relaxed)
        {
            let left = schedule.left_before(end).min(self.quota.unwrap_or(u64::MAX));
            self.measurements.borrow_mut().unsent += left;
        }
    }

    /// Waits until the next call is due; `None` when there is none.
    async fn next_due(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let due = match &mut self.pace {
            Pace::Closed => now,
            Pace::Open(schedule) => schedule.due(),
        };
        let over = self.quota == Some(0)
            || self.window.stop_at.is_some_and(|end| due >= end)
            || self.window.give_up_at.is_some_and(|at| now >= at)
            || self.shared.stop.load(Ordering::Relaxed);
        if over {
            return None;
        }
        if due > now {
            // A timer that fails lets the call go out early: nothing is lost but its time.
            let _ = poll_fn(|context| self.timer.poll_until(context, due)).await;
        }
        if let Pace::Open(schedule) = &mut self.pace {
            schedule.advance();
        }
        Some(due)
    }
}

async fn call(client: &mut KvClient<Channel>, request: &Request<'_>) -> Result<(), Status> {
    let key = Bytes::copy_from_slice(request.key);
    match request.operation {
        Operation::Set => {
            let value = Bytes::copy_from_slice(request.value);
            let set = SetRequest { key, value, ttl_ms: request.ttl_ms, ..SetRequest::default() };
            client.set(set).await.map(drop)
        }
        Operation::Get => client.get(GetRequest { key, ..GetRequest::default() }).await.map(drop),
        Operation::Incr => client
            .increment(IncrementRequest { key, ..IncrementRequest::default() })
            .await
            .map(drop),
        Operation::Del => {
            client.delete(DeleteRequest { key, ..DeleteRequest::default() }).await.map(drop)
        }
    }
}

/// The error's code in the table of all protocols, or else the status of gRPC.
fn kind(status: &Status) -> String {
    let code = status.metadata().get(CODE_TRAILER).and_then(|code| code.to_str().ok());
    code.map_or_else(|| format!("{:?}", status.code()), str::to_owned)
}
