//! Why a call failed, and what is known of its effect.

use flux_proto::Code;
use flux_proto::native::FrameTooLarge;

/// Why a call failed. Nothing was written, except for [`Error::OutcomeUnknown`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A setting of the client is wrong.
    #[error("client configuration: {0}")]
    Config(String),
    /// The node refused the request.
    #[error("{message}")]
    Refused {
        /// Why.
        code: Code,
        /// The node's words.
        message: String,
    },
    /// The request does not fit in a frame.
    #[error(transparent)]
    TooLarge(#[from] FrameTooLarge),
    /// The request did not leave: no connection, or none with room in time.
    #[error("no node can be reached: {0}")]
    Unavailable(String),
    /// A read got no answer in time.
    #[error("no answer in time")]
    Timeout,
    /// A read was sent and its connection broke before the answer.
    #[error("the connection broke before the answer: {0}")]
    ConnectionLost(String),
    /// A write was sent and its answer did not come: it may or may not have taken place. It could not
    /// be sent again safely, or was in vain.
    #[error("outcome unknown, the write may or may not have taken place: {0}")]
    OutcomeUnknown(String),
    /// The node's answer to a read is not what the protocol says.
    #[error("the node's answer cannot be understood: {0}")]
    Protocol(String),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

impl Error {
    /// The code in the table that all protocols share.
    pub fn code(&self) -> Code {
        match self {
            Error::Refused { code, .. } => *code,
            Error::Config(_) => Code::InvalidArgument,
            Error::TooLarge(_) => Code::TooLarge,
            Error::Unavailable(_) | Error::ConnectionLost(_) | Error::Closed => Code::Unavailable,
            Error::Timeout => Code::DeadlineExceeded,
            Error::OutcomeUnknown(_) => Code::OutcomeUnknown,
            Error::Protocol(_) => Code::Internal,
        }
    }
}
