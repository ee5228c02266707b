//! The two protocols of the data port as a load generator needs them: requests are encoded into one
//! buffer, and of a reply only its end and whether it is an error are looked for.

use flux_proto::{
    code::Code,
    native::{
        Condition, Expiry, FrameError, Preface, PrefaceError, Request as NativeRequest,
        RequestHeader, ServerPreface, decode_response, decode_server_preface, encode_preface,
        encode_request,
    },
    resp::{ReplyError, skip_reply, write},
};

use super::workload::{Operation, Request};

/// A protocol whose requests can be sent ahead of the replies.
pub trait Wire {
    /// Appends what a client says first.
    fn hello(&self, output: &mut Vec<u8>);

    /// The length of the server's answer to `hello` at the start of `input`; `None` if it has not
    /// fully arrived.
    fn greeting(&self, input: &[u8]) -> Result<Option<usize>, WireError>;

    /// Appends a request. Ids count up by one.
    fn encode(&self, id: u64, request: &Request<'_>, output: &mut Vec<u8>);

    /// The reply at the start of `input`; `None` if it has not fully arrived.
    fn reply<'a>(&self, input: &'a [u8]) -> Result<Option<WireReply<'a>>, WireError>;
}

/// What a load generator wants to know of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireReply<'a> {
    /// Its length in bytes.
    pub length: usize,
    /// The request's id; `None` where replies come in the order of requests.
    pub id: Option<u64>,
    /// The kind of error, if it is one.
    pub error: Option<&'a [u8]>,
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// What came is not RESP.
    #[error("not RESP: {0}")]
    Resp(#[from] ReplyError),
    /// What came is no frame of the native protocol.
    #[error("not the native protocol: {0}")]
    Frame(#[from] FrameError),
    /// What came first is no preface of the native protocol.
    #[error("not the native protocol: {0}")]
    Preface(#[from] PrefaceError),
    /// The server does not take the connection.
    #[error("the server refused the connection: {0}")]
    Refused(String),
    /// A reply to nothing that was asked.
    #[error("a reply came that belongs to no request")]
    Unasked,
}

/// RESP2.
pub struct Resp;

impl Wire for Resp {
    fn hello(&self, _: &mut Vec<u8>) {}

    fn greeting(&self, _: &[u8]) -> Result<Option<usize>, WireError> {
        Ok(Some(0))
    }

    fn encode(&self, _: u64, request: &Request<'_>, output: &mut Vec<u8>) {
        let Request { operation, key, value, ttl_ms } = *request;
        match (operation, ttl_ms) {
            (Operation::Set, None) => {
                output.extend_from_slice(b"*3\r\n$3\r\nSET\r\n");
                write::bulk(output, key);
                write::bulk(output, value);
            }
            (Operation::Set, Some(ttl_ms)) => {
                output.extend_from_slice(b"*5\r\n$3\r\nSET\r\n");
                write::bulk(output, key);
                write::bulk(output, value);
                output.extend_from_slice(b"$2\r\nPX\r\n");
                write::bulk_integer(output, i64::try_from(ttl_ms).unwrap_or(i64::MAX));
            }
            (Operation::Get, _) => {
                output.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
                write::bulk(output, key);
            }
            (Operation::Incr, _) => {
                output.extend_from_slice(b"*2\r\n$4\r\nINCR\r\n");
                write::bulk(output, key);
            }
            (Operation::Del, _) => {
                output.extend_from_slice(b"*2\r\n$3\r\nDEL\r\n");
                write::bulk(output, key);
            }
        }
    }

    fn reply<'a>(&self, input: &'a [u8]) -> Result<Option<WireReply<'a>>, WireError> {
        let Some((length, is_error)) = skip_reply(input)? else {
            return Ok(None);
        };
        let error = is_error.then(|| first_word(&input[1..length]));
        Ok(Some(WireReply { length, id: None, error }))
    }
}

fn first_word(text: &[u8]) -> &[u8] {
    text.split(u8::is_ascii_whitespace).next().unwrap_or_default()
}

/// Version 1 of the native protocol.
pub struct Native;

impl Wire for Native {
    fn hello(&self, output: &mut Vec<u8>) {
        encode_preface(output, &Preface::default());
    }

    fn greeting(&self, input: &[u8]) -> Result<Option<usize>, WireError> {
        match decode_server_preface(input)? {
            None => Ok(None),
            Some((ServerPreface::Accepted(_), length)) => Ok(Some(length)),
            Some((ServerPreface::Refused { message, .. }, _)) => {
                Err(WireError::Refused(message.to_owned()))
            }
        }
    }

    fn encode(&self, id: u64, request: &Request<'_>, output: &mut Vec<u8>) {
        let Request { operation, key, value, ttl_ms } = *request;
        let condition = Condition::Always;
        let native = match operation {
            Operation::Set => NativeRequest::Set {
                key,
                value,
                expiry: ttl_ms.map_or(Expiry::Never, Expiry::In),
                condition,
                return_previous: false,
            },
            Operation::Get => NativeRequest::Get { key },
            Operation::Incr => NativeRequest::Increment { key, delta: 1 },
            Operation::Del => NativeRequest::Delete { key, condition },
        };
        let header = RequestHeader::new(id, native.opcode());
        encode_request(output, &header, &native).expect("sizes are checked at the start");
    }

    fn reply<'a>(&self, input: &'a [u8]) -> Result<Option<WireReply<'a>>, WireError> {
        let Some((frame, length)) = decode_response(input)? else {
            return Ok(None);
        };
        let error = (frame.status != 0)
            .then(|| Code::try_from(frame.status).map_or("unknown code", Code::name).as_bytes());
        // An error under id 0 concerns the connection: all that is in flight is lost with it.
        if frame.id == 0 {
            let kind = String::from_utf8_lossy(error.unwrap_or_default()).into_owned();
            return Err(WireError::Refused(kind));
        }
        Ok(Some(WireReply { length, id: Some(frame.id), error }))
    }
}

#[cfg(test)]
mod tests {
    use flux_proto::native::{
        Accepted, Opcode, Response, encode_error, encode_response, encode_server_preface,
    };

    use super::*;

    fn request(operation: Operation, ttl_ms: Option<u64>) -> Request<'static> {
        Request { operation, key: b"key:1", value: b"hello", ttl_ms }
    }

    #[test]
    fn resp_requests_are_what_redis_expects() {
        let encoded = |operation, ttl_ms| {
            let mut output = Vec::new();
            Resp.encode(1, &request(operation, ttl_ms), &mut output);
            String::from_utf8(output).unwrap()
        };
        assert_eq!(
            encoded(Operation::Set, None),
            "*3\r\n$3\r\nSET\r\n$5\r\nkey:1\r\n$5\r\nhello\r\n"
        );
        assert_eq!(
            encoded(Operation::Set, Some(250)),
            "*5\r\n$3\r\nSET\r\n$5\r\nkey:1\r\n$5\r\nhello\r\n$2\r\nPX\r\n$3\r\n250\r\n"
        );
        assert_eq!(encoded(Operation::Get, Some(1)), "*2\r\n$3\r\nGET\r\n$5\r\nkey:1\r\n");
        assert_eq!(encoded(Operation::Incr, None), "*2\r\n$4\r\nINCR\r\n$5\r\nkey:1\r\n");
        assert_eq!(encoded(Operation::Del, None), "*2\r\n$3\r\nDEL\r\n$5\r\nkey:1\r\n");
    }

    #[test]
    fn resp_errors_are_named_by_their_first_word() {
        let input = b"-OVERLOADED try later\r\n$5\r\nhello\r\n$2";
        let reply = Resp.reply(input).unwrap().unwrap();
        assert_eq!((reply.length, reply.error), (23, Some(&b"OVERLOADED"[..])));
        let reply = Resp.reply(&input[23..]).unwrap().unwrap();
        assert_eq!((reply.length, reply.error), (11, None));
        assert_eq!(Resp.reply(&input[34..]).unwrap(), None);
        assert!(Resp.reply(b"?").is_err());
    }

    #[test]
    fn native_replies_carry_the_request_id() {
        let mut input = Vec::new();
        encode_response(
            &mut input,
            7,
            Opcode::Increment,
            &Response::Counter { value: 1, version: 2 },
        )
        .unwrap();
        let first = input.len();
        encode_error(&mut input, 8, Opcode::Set as u8, Code::Overloaded, "try later");
        let reply = Native.reply(&input).unwrap().unwrap();
        assert_eq!((reply.length, reply.id, reply.error), (first, Some(7), None));
        let reply = Native.reply(&input[first..]).unwrap().unwrap();
        assert_eq!((reply.id, reply.error), (Some(8), Some(&b"OVERLOADED"[..])));
        assert_eq!(Native.reply(&input[..first - 1]).unwrap(), None);
        let mut last = Vec::new();
        encode_error(&mut last, 0, 0, Code::Stopping, "");
        assert!(Native.reply(&last).unwrap_err().to_string().contains("STOPPING"));
    }

    #[test]
    fn a_native_connection_begins_with_prefaces() {
        let mut accepted = Vec::new();
        let preface = ServerPreface::Accepted(Accepted::new("node", 16));
        encode_server_preface(&mut accepted, &preface);
        assert_eq!(Native.greeting(&accepted).unwrap(), Some(accepted.len()));
        assert_eq!(Native.greeting(&accepted[..5]).unwrap(), None);
        let mut refused = Vec::new();
        encode_server_preface(&mut refused, &ServerPreface::VERSION_MISMATCH);
        assert!(Native.greeting(&refused).unwrap_err().to_string().contains("no protocol version"));
        let mut hello = Vec::new();
        Native.hello(&mut hello);
        assert!(flux_proto::native::is_native(hello[0]));
    }
}
