//! Where errors of the core get their code of the wire, for the native protocol and gRPC.

use flux_core::Error;
use flux_proto::Code;

/// The documented code of an error.
pub(crate) fn code_of(error: &Error) -> Code {
    match error {
        Error::NotInteger => Code::NotInteger,
        Error::NotFloat => Code::NotFloat,
        Error::Overflow | Error::NotFinite => Code::Overflow,
        Error::OffsetOutOfRange | Error::InvalidExpiry | Error::EmptyKey => Code::InvalidArgument,
        Error::NoSuchKey => Code::NotFound,
        Error::KeyTooLong(_)
        | Error::ValueTooLarge(_)
        | Error::WriteTooLarge(_)
        | Error::ReplyTooLarge(_)
        | Error::TooLargeToCompare(_) => Code::TooLarge,
        Error::OutOfMemory { .. } => Code::OutOfMemory,
        Error::Overloaded => Code::Overloaded,
        Error::DiskFull => Code::DiskFull,
        Error::LogFailed(_) => Code::LogFailed,
        Error::NotLeader | Error::NoLeader { .. } => Code::NotLeader,
        Error::OutcomeUnknown | Error::AnswerGone => Code::OutcomeUnknown,
        Error::Stopping => Code::Stopping,
    }
}
