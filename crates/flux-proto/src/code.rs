//! The one table of error codes, shared by every protocol.
//!
//! Each code has a stable number and name (the native protocol, the details of a gRPC status, the JSON
//! of the gateway), the first word of a RESP error, a gRPC status code and an HTTP status. Numbers and
//! names are never reused or changed. The hundreds tell what a client may do:
//!
//! - 1xx: the request is at fault; sending it again does not help.
//! - 2xx: the client is not allowed.
//! - 3xx: nothing was written; the same request may succeed later, or at another node.
//! - 4xx: it is not known whether the write takes place.
//! - 5xx: the node is at fault; nothing was written.
//!
//! What this module does not do: choose a message. That comes from where the error arises.

use std::fmt;

use tonic::Code as Grpc;

/// Declares the codes and their translations from one table, so that none can be forgotten.
macro_rules! codes {
    ($( $(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal, $resp:literal, $grpc:ident, $http:literal; )+) => {
        /// Why a request was not carried out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Code {
            $( $(#[doc = $doc])+ $variant = $number, )+
        }

        impl Code {
            /// Every code, by number.
            pub const ALL: &[Code] = &[$(Code::$variant),+];

            /// The stable name, such as `CONDITION_FAILED`.
            pub const fn name(self) -> &'static str {
                match self { $(Code::$variant => $name),+ }
            }

            /// The first word of the error in RESP, such as `ERR`.
            pub const fn resp_prefix(self) -> &'static str {
                match self { $(Code::$variant => $resp),+ }
            }

            /// The status code in gRPC.
            pub const fn grpc(self) -> Grpc {
                match self { $(Code::$variant => Grpc::$grpc),+ }
            }

            /// The status in HTTP.
            pub const fn http(self) -> u16 {
                match self { $(Code::$variant => $http),+ }
            }
        }

        impl TryFrom<u16> for Code {
            type Error = UnknownCode;

            fn try_from(number: u16) -> Result<Code, UnknownCode> {
                match number {
                    $( $number => Ok(Code::$variant), )+
                    _ => Err(UnknownCode(number)),
                }
            }
        }
    };
}

codes! {
    // variant         number  name                RESP prefix    gRPC               HTTP

    /// An argument is missing, malformed or out of its range.
    InvalidArgument  = 100, "INVALID_ARGUMENT",  "ERR",         InvalidArgument,    400;
    /// A key, a value or the whole request is over its limit.
    TooLarge         = 101, "TOO_LARGE",         "ERR",         InvalidArgument,    413;
    /// The stored value or the operand is not an integer of 64 bits.
    NotInteger       = 102, "NOT_INTEGER",       "ERR",         FailedPrecondition, 409;
    /// The stored value or the operand is not a floating point number.
    NotFloat         = 103, "NOT_FLOAT",         "ERR",         FailedPrecondition, 409;
    /// The sum does not fit.
    Overflow         = 104, "OVERFLOW",          "ERR",         OutOfRange,         409;
    /// There is no such key where one is needed.
    NotFound         = 105, "NOT_FOUND",         "ERR",         NotFound,           404;
    /// The write's condition does not hold.
    ConditionFailed  = 106, "CONDITION_FAILED",  "CONDITIONFAILED", FailedPrecondition, 412;
    /// The keys of an atomic request are of several partitions.
    CrossSlot        = 107, "CROSS_SLOT",        "CROSSSLOT",   InvalidArgument,    400;
    /// The operation, option or protocol version is not known here.
    Unsupported      = 108, "UNSUPPORTED",       "ERR",         Unimplemented,      501;
    /// The bytes are not a frame of the protocol; the connection is closed.
    Malformed        = 109, "MALFORMED",         "ERR",         InvalidArgument,    400;

    /// The connection has not authenticated, or with a wrong password.
    Unauthenticated  = 200, "UNAUTHENTICATED",   "NOAUTH",      Unauthenticated,    401;
    /// The user may not do this.
    PermissionDenied = 201, "PERMISSION_DENIED", "NOPERM",      PermissionDenied,   403;

    /// Too much work is waiting; try again later.
    Overloaded       = 300, "OVERLOADED",        "OVERLOADED",  ResourceExhausted,  503;
    /// The node's `max_memory` is reached; reads and deletes go on.
    OutOfMemory      = 301, "OUT_OF_MEMORY",     "OOM",         ResourceExhausted,  507;
    /// The disk is full; writes are refused until there is space again.
    DiskFull         = 302, "DISK_FULL",         "DISKFULL",    ResourceExhausted,  507;
    /// This node does not lead the partition; another one does.
    NotLeader        = 303, "NOT_LEADER",        "NOTLEADER",   Unavailable,        503;
    /// The partition cannot serve now: no leader, or the node is still starting.
    Unavailable      = 304, "UNAVAILABLE",       "UNAVAILABLE", Unavailable,        503;
    /// The node is stopping.
    Stopping         = 305, "STOPPING",          "STOPPING",    Unavailable,        503;
    /// The connection limit is reached.
    TooManyClients   = 306, "TOO_MANY_CLIENTS",  "ERR",         ResourceExhausted,  503;
    /// A watcher did not take its events as fast as they came; it can resume.
    WatchTooSlow     = 307, "WATCH_TOO_SLOW",    "ERR",         ResourceExhausted,  503;

    /// The write may or may not take place: ask before trying again.
    OutcomeUnknown   = 400, "OUTCOME_UNKNOWN",   "UNKNOWN",     Unknown,            504;
    /// The deadline passed first; a write may still take place.
    DeadlineExceeded = 401, "DEADLINE_EXCEEDED", "TIMEOUT",     DeadlineExceeded,   504;

    /// The node's log failed: it takes no more writes until it is restarted.
    LogFailed        = 500, "LOG_FAILED",        "LOGFAILED",   Unavailable,        503;
    /// A defect of the node.
    Internal         = 501, "INTERNAL",          "ERR",         Internal,           500;
}

/// A number that is not in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not an error code of this version")]
pub struct UnknownCode(pub u16);

impl Code {
    /// The stable number.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Whether nothing was written and the same request may succeed later or at another node.
    pub const fn is_retryable(self) -> bool {
        matches!(self.number(), 300..400)
    }

    /// Whether the write may have taken place.
    pub const fn outcome_is_unknown(self) -> bool {
        matches!(self.number(), 400..500)
    }

    /// The code with this stable name.
    pub fn from_name(name: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.name() == name)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_distinct_and_convert_back() {
        for (position, &code) in Code::ALL.iter().enumerate() {
            assert_eq!(Code::try_from(code.number()), Ok(code));
            assert_eq!(Code::from_name(code.name()), Some(code));
            assert!(Code::ALL[..position].iter().all(|earlier| earlier.number() < code.number()));
        }
        assert_eq!(Code::try_from(0), Err(UnknownCode(0)));
        assert_eq!(Code::try_from(65535), Err(UnknownCode(65535)));
    }

    #[test]
    fn translations_are_errors_in_every_protocol() {
        for &code in Code::ALL {
            assert_ne!(code.grpc(), Grpc::Ok, "{code}");
            assert!((400..600).contains(&code.http()), "{code}");
            assert!(code.resp_prefix().bytes().all(|b| b.is_ascii_uppercase()), "{code}");
        }
    }

    #[test]
    fn the_hundreds_tell_what_a_client_may_do() {
        assert!(Code::Overloaded.is_retryable() && !Code::Overloaded.outcome_is_unknown());
        assert!(Code::DeadlineExceeded.outcome_is_unknown());
        assert!(!Code::InvalidArgument.is_retryable() && !Code::LogFailed.is_retryable());
    }
}
