//! One call from its first attempt to its end: what is sent again, and what is known of it then.
//!
//! Where an attempt goes stands in `route`.

use std::time::Duration;

use bytes::Bytes;
use flux_proto::Code;
use flux_proto::native::{
    Failure, FrameTooLarge, Request, RequestHeader, Response, StalePosition, decode_response,
    encode_request, feature,
};
use tokio::time::{Instant, sleep, timeout};

use crate::exchange::Lost;
use crate::route::{Place, Target};
use crate::session::Ticket;
use crate::{Client, Error, backoff};

/// The longest pause before a retry.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long after its start a call may repeat a write: nodes remember a session's answers for longer.
/// See docs/protocol.md, "Sessions".
const REPEAT_WITHIN: Duration = Duration::from_secs(60);

/// What was tried for one call so far.
#[derive(Debug)]
pub(crate) struct Effort<'a> {
    pub(crate) deadline: Instant,
    started: Instant,
    is_write: bool,
    ticket: Option<Ticket<'a>>,
    attempts: u32,
    setbacks: u32,
    /// It was sent on to the leader once, for which nothing is paid.
    was_sent_on: bool,
    /// The write may have been carried out already, for this reason.
    unknown: Option<String>,
}

/// Why an attempt brought no answer, and what may be done about it.
#[derive(Clone, Debug)]
pub(crate) struct Setback {
    pub(crate) error: Error,
    pub(crate) kind: Kind,
}

/// What a setback leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing.
    Final,
    /// It did not leave: nobody can be reached.
    Unsent,
    /// Nothing was done; the node may do it later.
    Busy,
    /// Nothing was done: another node leads, which is known by now or not, or the partition cannot
    /// serve yet.
    Elsewhere { leader_is_known: bool },
    /// No answer came. A write may have been carried out, and may be repeated all the same.
    Lost,
}

impl Setback {
    pub(crate) fn last(error: Error) -> Setback {
        Setback { error, kind: Kind::Final }
    }
}

impl Client {
    /// Sends a request until it is answered, must not be sent again, or time or budget are out.
    pub(crate) async fn call<T>(
        &self,
        target: Target<'_>,
        request: &Request<'_>,
        accept: impl Fn(&Bytes, Response<'_>) -> Option<T>,
    ) -> Result<(T, Option<StalePosition>), Error> {
        let mut effort = self.effort(&target, request).await?;
        loop {
            match self.attempt(&target, request, &effort, &accept).await {
                Ok(answer) => return Ok(answer),
                Err(setback) => self.recover(&mut effort, setback).await?,
            }
        }
    }

    /// The start of a call.
    pub(crate) async fn effort(
        &self,
        target: &Target<'_>,
        request: &Request<'_>,
    ) -> Result<Effort<'_>, Error> {
        let started = Instant::now();
        let deadline = started + self.timeout;
        let is_write = request.opcode().is_write();
        let ticket = match &self.shared.ledger {
            Some(ledger) if is_write => {
                let topology = self.shared.directory.first(deadline).await?.topology;
                Some(ledger.begin(target.partition(&topology).zip(topology.partitions())))
            }
            _ => None,
        };
        self.shared.budget.deposit();
        let (attempts, setbacks, was_sent_on, unknown) = (1, 0, false, None);
        Ok(Effort { deadline, started, is_write, ticket, attempts, setbacks, was_sent_on, unknown })
    }

    /// Decides what follows a setback: another attempt, after a pause, or the end.
    pub(crate) async fn recover(
        &self,
        effort: &mut Effort<'_>,
        setback: Setback,
    ) -> Result<(), Error> {
        let Setback { error, kind } = setback;
        if kind == Kind::Lost && effort.is_write && effort.unknown.is_none() {
            effort.unknown = Some(error.to_string());
            effort.deadline = effort.deadline.min(effort.started + REPEAT_WITHIN);
        }
        match kind {
            Kind::Final => return Err(effort.end(error)),
            Kind::Elsewhere { leader_is_known: true } if !effort.was_sent_on => {
                effort.was_sent_on = true;
                return Ok(());
            }
            Kind::Elsewhere { .. } => {}
            Kind::Unsent | Kind::Busy | Kind::Lost => {
                if effort.attempts >= self.shared.config.retry.max_attempts {
                    return Err(effort.end(error));
                }
                effort.attempts += 1;
            }
        }
        effort.setbacks += 1;
        let limit = backoff::limit(effort.setbacks, self.shared.config.retry.backoff, PAUSE_MAX);
        let pause = backoff::jittered(limit);
        let is_free = kind == Kind::Unsent;
        let in_time = Instant::now() + pause < effort.deadline;
        if !in_time || !is_free && !self.shared.budget.withdraw() {
            return Err(effort.end(error));
        }
        sleep(pause).await;
        Ok(())
    }

    /// Sends a request once, and makes sense of the answer.
    pub(crate) async fn attempt<T>(
        &self,
        target: &Target<'_>,
        request: &Request<'_>,
        effort: &Effort<'_>,
        accept: &impl Fn(&Bytes, Response<'_>) -> Option<T>,
    ) -> Result<(T, Option<StalePosition>), Setback> {
        let stale = self.stale_reads && !effort.is_write;
        let place = self.place(target, stale, effort.deadline).await?;
        let (frame, repeatable) = self.frame(&place, request, effort, stale)?;
        let answer = self.answer(&place, frame, effort.deadline, repeatable).await;
        // What became of a write that has left is not known; of a read it does not matter.
        let lost = |error: Error| match (effort.is_write, repeatable) {
            (true, false) => Setback::last(Error::OutcomeUnknown(error.to_string())),
            (true, true) => {
                Setback { error: Error::OutcomeUnknown(error.to_string()), kind: Kind::Lost }
            }
            (false, _) => Setback { error, kind: Kind::Lost },
        };
        let frame = match answer {
            Some(Ok(frame)) => frame,
            Some(Err(Lost::NotSent(reason))) => {
                return Err(Setback { error: Error::Unavailable(reason), kind: Kind::Unsent });
            }
            Some(Err(Lost::Refused(code, message))) => {
                return Err(self.refused(&place, code, message, None));
            }
            Some(Err(Lost::Broken(reason))) => {
                self.shared.directory.want_if_clustered();
                return Err(lost(Error::ConnectionLost(reason)));
            }
            None => return Err(lost(Error::Timeout)),
        };
        place.node.set_silent(false);
        match understand(&frame, effort.is_write, accept)? {
            Ok(answer) => Ok(answer),
            Err(failure) if effort.is_write && failure.code().outcome_is_unknown() => {
                Err(lost(Error::Protocol(failure.message.to_owned())))
            }
            Err(failure) => {
                let message = failure.message.to_owned();
                Err(self.refused(&place, failure.code(), message, Some(&failure)))
            }
        }
    }

    /// The frame of an attempt, and whether it may be sent again though it may be carried out.
    fn frame(
        &self,
        place: &Place,
        request: &Request<'_>,
        effort: &Effort<'_>,
        stale: bool,
    ) -> Result<(Vec<u8>, bool), Setback> {
        let granted = |feature: u16| place.terms.features & feature != 0;
        let ticket = effort.ticket.as_ref().filter(|_| granted(feature::SESSIONS));
        if let (Some(reason), None) = (&effort.unknown, ticket) {
            return Err(Setback::last(Error::OutcomeUnknown(reason.clone())));
        }
        if matches!(request, Request::Scan { partition: Some(_), .. })
            && !granted(feature::PARTITION_SCANS)
        {
            let message = "the node does not scan single partitions".to_owned();
            return Err(Setback::last(Error::Refused { code: Code::Unsupported, message }));
        }
        let left = effort.deadline.saturating_duration_since(Instant::now());
        let header = RequestHeader {
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1),
            session: ticket.map(Ticket::session),
            trace: self.trace.filter(|_| effort.is_write && granted(feature::TRACES)),
            ..RequestHeader::new(0, request.opcode())
        }
        .with_stale(stale)
        .with_position(stale && granted(feature::POSITIONS))
        .with_redirect(place.leads.is_some() && granted(feature::REDIRECTS));
        let too_large = |error: FrameTooLarge| Setback::last(error.into());
        let mut frame = Vec::new();
        encode_request(&mut frame, &header, request).map_err(too_large)?;
        if frame.len() - 4 > place.terms.max_frame_bytes {
            return Err(too_large(FrameTooLarge(frame.len() - 4)));
        }
        Ok((frame, !effort.is_write || ticket.is_some()))
    }

    /// The answer to a frame. A node of a cluster that does not answer is given up for another one
    /// where that leads by now, or has a replica as well. `None`: time is over.
    async fn answer(
        &self,
        place: &Place,
        frame: Vec<u8>,
        deadline: Instant,
        repeatable: bool,
    ) -> Option<Result<Bytes, Lost>> {
        let answer = place.node.link(place.link).send(frame, deadline);
        if !repeatable || !place.has_others {
            return answer.await;
        }
        tokio::pin!(answer);
        let directory = &self.shared.directory;
        let addr = place.node.addr();
        loop {
            let silence = self.shared.config.silence_timeout;
            if let Ok(answer) = timeout(silence, &mut answer).await {
                return answer;
            }
            place.node.set_silent(true);
            let Some(partition) = place.leads else {
                return Some(Err(Lost::Broken(format!("{addr}: no answer within {silence:?}"))));
            };
            let known = directory.known();
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                _ = directory.refreshed(&known, deadline) => {}
            }
            if directory.known().topology.leader_addr(partition) != Some(addr) {
                return Some(Err(Lost::Broken(format!("{addr}: no answer, and it leads no more"))));
            }
        }
    }

    /// What a refusal by the node leaves to be done.
    fn refused(
        &self,
        place: &Place,
        code: Code,
        message: String,
        failure: Option<&Failure<'_>>,
    ) -> Setback {
        let directory = &self.shared.directory;
        let kind = match code {
            code if !is_of_the_place(code) || !directory.want_if_clustered() => match code {
                Code::Overloaded | Code::Unavailable | Code::NotLeader | Code::Stopping => {
                    Kind::Busy
                }
                // Lack of memory or disk space does not pass so fast.
                _ => Kind::Final,
            },
            Code::NotLeader => {
                let hint = failure.and_then(|failure| failure.leader);
                let partition = hint.map(|hint| hint.partition).or(place.leads);
                if let Some(hint) = hint.filter(|hint| !hint.leader_addr.is_empty()) {
                    directory.correct(|now| now.with_leader(hint.partition, hint.leader_addr));
                } else if let Some(partition) = partition {
                    let addr = place.node.addr();
                    directory.correct(|now| now.without_leader(partition, addr));
                }
                let topology = directory.known().topology;
                let leader = partition.and_then(|partition| topology.leader_addr(partition));
                let leader_is_known = leader.is_some_and(|leader| leader != place.node.addr());
                Kind::Elsewhere { leader_is_known }
            }
            _ => Kind::Elsewhere { leader_is_known: false },
        };
        Setback { error: Error::Refused { code, message }, kind }
    }
}

impl Effort<'_> {
    /// How the call ends. After an attempt that may have been carried out, no refusal of a later one
    /// can tell that it was not.
    fn end(&mut self, error: Error) -> Error {
        match self.unknown.take() {
            Some(reason) => Error::OutcomeUnknown(reason),
            None => error,
        }
    }
}

/// Whether an error says that the partition is not served here now, and nothing was written.
fn is_of_the_place(code: Code) -> bool {
    matches!(code, Code::NotLeader | Code::Unavailable | Code::Stopping | Code::LogFailed)
}

/// An answer with how old it is, or what the node refused it for.
type Understood<'f, T> = Result<(T, Option<StalePosition>), Failure<'f>>;

/// Makes sense of a response frame. One that cannot be understood leaves a write undecided.
fn understand<'f, T>(
    frame: &'f Bytes,
    is_write: bool,
    accept: &impl Fn(&Bytes, Response<'_>) -> Option<T>,
) -> Result<Understood<'f, T>, Setback> {
    let strange = |text: String| {
        let unknown = Error::OutcomeUnknown;
        Setback::last(if is_write { unknown(text) } else { Error::Protocol(text) })
    };
    let decoded = match decode_response(frame) {
        Ok(Some((decoded, _))) => decoded,
        Ok(None) => return Err(strange("half a frame".to_owned())),
        Err(error) => return Err(strange(error.to_string())),
    };
    match decoded.response().map_err(|error| strange(error.to_string()))? {
        Ok(response) => match accept(frame, response) {
            Some(answer) => Ok(Ok((answer, decoded.position))),
            None => Err(strange("the answer is of another operation".to_owned())),
        },
        Err(failure) => Ok(Err(failure)),
    }
}
