//! OBJECT and MEMORY: how a value is kept.

use flux_core::Command;

use super::keys::described;
use super::request::{Outcome, Refusal, Request, integer};
use super::{Form, Plan};

/// Redis's encodings follow from the value itself, so this one reads it.
pub(super) fn encoding<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (partition, key) = request.key(2)?;
    Ok(Plan::One { partition, command: Command::Get { key }, form: Form::Encoding })
}

pub(super) fn freq<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    described(request, 2, Form::Frequency)
}

/// Reads leave no trace, so this is the time since the last write.
pub(super) fn idletime<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let now_ms = request.node.now_ms();
    described(request, 2, Form::IdleSeconds { now_ms })
}

pub(super) fn refcount<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    described(request, 2, Form::References)
}

pub(super) fn memory_usage<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let mut options = request.args.from(3).iter();
    while let Some(option) = options.next() {
        // Samples matter only to values with parts, which there are none of.
        let count = options.next().ok_or(Refusal::SYNTAX)?;
        if !option.eq_ignore_ascii_case(b"SAMPLES") || integer(count)? < 0 {
            return Err(Refusal::SYNTAX);
        }
    }
    described(request, 2, Form::MemoryUsage)
}
