//! The life of a consumer: deliveries in, lines out, acknowledgements back, and all of it again when
//! the connection breaks.
//!
//! Lines are written together: what came within 100 ms, or half of the prefetch, costs one fdatasync.
//! What this module does not do: decide what is new, or keep it.

use std::time::{Duration, Instant};

use lapin::message::Delivery;
use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_stream::StreamExt;

use super::broker::{Setback, Subscription};
use super::intake::Intake;
use super::output::{Output, OutputError};
use super::{ConsumerConfig, Report};
use crate::ledger::{Hole, Ledger};

/// How long lines wait for others.
const LINGER: Duration = Duration::from_millis(100);
/// So many bytes of lines do not wait.
const ENOUGH_BYTES: usize = 4 << 20;
/// How long what is ahead waits for what is missing.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a graceful stop waits for deliveries that are on their way.
const DRAINING: Duration = Duration::from_secs(5);
/// The pauses between attempts to connect: they double.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Where the broker answers and only something of it is missing, it is asked more often.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Holes that are listed at the end, and deliveries that are named because they are no events.
const MOST_HOLES: usize = 1000;
const MOST_NAMED: u64 = 10;

/// Consumes until `stop` says so. What the consumer has is in the output and the ledger that belongs to
/// it. Must run on a runtime of several threads, since it blocks one while it writes.
///
/// # Errors
/// [`OutputError`] where lines cannot be kept; what was not written was not acknowledged. A broker that
/// cannot be reached is no error: it is tried for ever.
pub async fn consume(
    config: &ConsumerConfig,
    output: Output,
    ledger: Ledger,
    mut stop: watch::Receiver<bool>,
) -> (Report, Result<(), OutputError>) {
    let mut intake = Intake::new(ledger, PATIENCE, usize::from(config.prefetch));
    if config.is_filtered() {
        intake = intake.filtered();
    }
    let mut session =
        Session { config, output, intake, report: Report::default(), due: None, trouble: None };
    let ended = session.run(&mut stop).await;
    session.report.counts = session.intake.counts();
    let ended = ended.and_then(|()| session.output.close(session.intake.ledger()));
    (session.report, ended)
}

struct Session<'a> {
    config: &'a ConsumerConfig,
    output: Output,
    intake: Intake,
    report: Report,
    /// When the lines are to be written that have come.
    due: Option<Instant>,
    /// What was told to be wrong, and since when.
    trouble: Option<(String, Instant)>,
}

impl Session<'_> {
    async fn run(&mut self, stop: &mut watch::Receiver<bool>) -> Result<(), OutputError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let opened = tokio::select! {
                opened = Subscription::open(self.config) => opened,
                () = stopped(stop) => return Ok(()),
            };
            let setback = match opened {
                Ok(mut subscription) => {
                    self.told_right(&subscription);
                    pause = FIRST_PAUSE;
                    let ended = self.serve(&mut subscription, stop).await?;
                    self.intake.disconnected();
                    let Some(setback) = ended else {
                        subscription.close().await;
                        return Ok(());
                    };
                    setback
                }
                Err(setback) => setback,
            };
            self.tell_wrong(&setback);
            let is_there = matches!(setback, Setback::NoExchange(_) | Setback::QueueDeleted);
            tokio::select! {
                () = sleep(pause) => {}
                () = stopped(stop) => return Ok(()),
            }
            pause = (pause * 2).min(if is_there { LONGEST_WAIT } else { LONGEST_PAUSE });
        }
    }

    /// Takes deliveries until something breaks, or until `stop`: none then.
    async fn serve(
        &mut self,
        subscription: &mut Subscription,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<Option<Setback>, OutputError> {
        loop {
            let wake = [self.due, self.intake.deadline()].into_iter().flatten().min();
            let ended = tokio::select! {
                delivery = subscription.consumer.next() => match delivery {
                    Some(Ok(delivery)) => {
                        self.take(delivery, subscription).await;
                        None
                    }
                    Some(Err(error)) => Some(Setback::Lost(error)),
                    None => Some(Setback::QueueDeleted),
                },
                () = sleep_until(wake.unwrap_or_else(Instant::now).into()), if wake.is_some() => None,
                () = stopped(stop) => {
                    self.drain(subscription).await?;
                    return Ok(None);
                }
            };
            if ended.is_some() {
                // What the ledger has must be in the output, or it would be taken for a repeat.
                self.write(subscription).await?;
                return Ok(ended);
            }
            let now = Instant::now();
            for hole in self.intake.give_up(now) {
                self.lost(hole);
            }
            let is_enough = self.intake.unsettled() * 2 >= usize::from(self.config.prefetch)
                || self.intake.lines().len() >= ENOUGH_BYTES;
            match self.due {
                Some(due) if is_enough || now >= due => self.write(subscription).await?,
                None if self.intake.unsettled() > 0 => self.due = Some(now + LINGER),
                Some(_) | None => {}
            }
        }
    }

    async fn take(&mut self, delivery: Delivery, subscription: &Subscription) {
        let tag = delivery.delivery_tag;
        let taken = self.intake.take(tag, &delivery.data, Instant::now());
        for &(partition, revision) in self.intake.repeats() {
            tracing::debug!(partition, revision, "a repeat is dropped");
        }
        let Err(error) = taken else { return };
        self.report.unreadable += 1;
        if self.report.unreadable <= MOST_NAMED {
            let id = delivery.properties.message_id().as_ref().map_or("", |id| id.as_str());
            tracing::error!(
                routing_key = delivery.routing_key.as_str(),
                message_id = id,
                error = &error as &dyn std::error::Error,
                "a message is no change event: it is rejected"
            );
        }
        subscription.reject(tag).await;
    }

    /// Writes the lines, and acknowledges what they stand for.
    async fn write(&mut self, subscription: &Subscription) -> Result<(), OutputError> {
        self.due = None;
        block_in_place(|| self.output.write(self.intake.lines(), self.intake.ledger()))?;
        let acks = self.intake.written();
        subscription.acknowledge(&acks).await;
        Ok(())
    }

    /// Ends in order: takes what is on its way, writes and acknowledges it. What still waits for
    /// something stays in the queue.
    async fn drain(&mut self, subscription: &mut Subscription) -> Result<(), OutputError> {
        subscription.cancel().await;
        let end = Instant::now() + DRAINING;
        while let Ok(Some(Ok(delivery))) =
            timeout(end.saturating_duration_since(Instant::now()), subscription.consumer.next())
                .await
        {
            self.take(delivery, subscription).await;
            if self.intake.lines().len() >= ENOUGH_BYTES {
                self.write(subscription).await?;
            }
        }
        self.write(subscription).await
    }

    fn lost(&mut self, hole: Hole) {
        tracing::error!(%hole, "events are missing: they did not come within {PATIENCE:?}");
        self.report.holes += 1;
        if self.report.listed_holes.len() < MOST_HOLES {
            self.report.listed_holes.push(hole);
        }
    }

    /// Says once what is wrong, for as long as it is the same.
    fn tell_wrong(&mut self, setback: &Setback) {
        let text = setback.to_string();
        let since = match &self.trouble {
            Some((told, _)) if *told == text => return,
            Some((_, since)) => *since,
            None => Instant::now(),
        };
        let (broker, error) = (&self.config.address, setback as &dyn std::error::Error);
        if setback.needs_a_person() {
            tracing::error!(%broker, error, "no events come; trying again");
        } else {
            tracing::warn!(%broker, error, "no events come; trying again");
        }
        self.trouble = Some((text, since));
    }

    fn told_right(&mut self, subscription: &Subscription) {
        let (broker, queue) = (&self.config.address, &self.config.queue);
        let (waiting, others) =
            (subscription.queue.message_count(), subscription.queue.consumer_count());
        match self.trouble.take() {
            Some((_, since)) => {
                tracing::info!(%broker, queue, waiting, after = ?since.elapsed(), "consuming again");
            }
            None => tracing::info!(%broker, queue, waiting, "consuming"),
        }
        if others > 0 {
            tracing::info!(
                others,
                "the queue has another consumer: this one gets events when that one ends"
            );
        }
        if subscription.is_foreign {
            tracing::warn!(
                queue,
                "the queue was made by somebody else, with other settings: without \
                 x-single-active-consumer events are shared with other consumers"
            );
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Nobody is left to ask for it: that asks for it, too.
    let _ = stop.wait_for(|&stop| stop).await;
}
