//! What the broker sends, as far as a publisher needs it.
//!
//! Read by hand instead of with `amq-protocol`, whose parser recurses into tables within tables: a
//! broker gone bad could overflow the stack with one frame, and end the node. No table is looked into
//! here.
//!
//! What this module does not do: know which frame may come when.

use bytes::{Buf, BytesMut};

use super::frames::{FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_METHOD, FRAME_OVERHEAD_BYTES};

const FRAME_HEARTBEAT: u8 = 8;

/// Why bytes are no frame.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It is larger than what was agreed on.
    #[error("a frame of {0} bytes, over the limit")]
    TooLarge(usize),
    /// It does not follow the protocol.
    #[error("not a frame of AMQP 0-9-1")]
    Malformed,
}

/// A frame from the broker.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// The broker is there.
    Heartbeat,
    /// The header of a message that comes back.
    Header {
        /// Its message id, where it has one.
        id: Option<String>,
    },
    /// A part of a message that comes back.
    Body,
    /// `connection.start`.
    Start,
    /// `connection.tune`: 0 means no limit, and no heartbeats.
    Tune {
        /// The largest frame.
        frame_max: u32,
        /// In seconds.
        heartbeat_s: u16,
    },
    /// What was asked for is done.
    Done,
    /// The connection or the channel is closed.
    Close {
        /// The reply code.
        code: u16,
        /// Why.
        text: String,
    },
    /// The broker closed the connection, as it was asked to.
    CloseOk,
    /// `connection.blocked`: the broker takes nothing.
    Blocked {
        /// Why.
        reason: String,
    },
    /// It does again.
    Unblocked,
    /// `basic.ack` or `basic.nack`.
    Confirm {
        /// The delivery tag.
        tag: u64,
        /// All messages up to it.
        multiple: bool,
        /// It is an acknowledgement.
        is_stored: bool,
    },
    /// `basic.return`: its header follows.
    Return {
        /// Why.
        text: String,
        /// Of the message.
        routing_key: String,
    },
    /// A method that means nothing to a publisher.
    Other,
}

/// Takes the next frame, if all of it is here.
///
/// # Errors
/// [`FrameError`]; the input is of no use after that.
pub fn read_frame(input: &mut BytesMut, frame_max: u32) -> Result<Option<Incoming>, FrameError> {
    let Some(&[kind, _, _, a, b, c, d]) = input.first_chunk::<7>() else {
        // A broker that speaks another version answers with `AMQP` and closes.
        return if input.starts_with(b"A") { Err(FrameError::Malformed) } else { Ok(None) };
    };
    let size = u32::from_be_bytes([a, b, c, d]) as usize;
    let length = size.saturating_add(FRAME_OVERHEAD_BYTES);
    if kind == b'A' {
        return Err(FrameError::Malformed);
    }
    if length > frame_max as usize {
        return Err(FrameError::TooLarge(length));
    }
    if input.len() < length {
        return Ok(None);
    }
    let payload = Reader(&input[7..length - 1]);
    let frame = match kind {
        _ if input[length - 1] != FRAME_END => None,
        FRAME_METHOD => method(payload),
        FRAME_HEADER => header(payload),
        FRAME_BODY => Some(Incoming::Body),
        FRAME_HEARTBEAT => Some(Incoming::Heartbeat),
        _ => None,
    };
    input.advance(length);
    frame.map(Some).ok_or(FrameError::Malformed)
}

fn method(mut arguments: Reader<'_>) -> Option<Incoming> {
    let (class, method) = (arguments.u16()?, arguments.u16()?);
    Some(match (class, method) {
        (10, 10) => Incoming::Start,
        (10, 30) => {
            arguments.u16()?;
            Incoming::Tune { frame_max: arguments.u32()?, heartbeat_s: arguments.u16()? }
        }
        // connection.open-ok, channel.open-ok, exchange.declare-ok, confirm.select-ok
        (10, 41) | (20, 11) | (40, 11) | (85, 11) => Incoming::Done,
        (10, 50) | (20, 40) => {
            Incoming::Close { code: arguments.u16()?, text: arguments.short_string()? }
        }
        (10, 51) => Incoming::CloseOk,
        (10, 60) => Incoming::Blocked { reason: arguments.short_string()? },
        (10, 61) => Incoming::Unblocked,
        (60, 50) => {
            arguments.u16()?;
            let text = arguments.short_string()?;
            arguments.short_string()?;
            Incoming::Return { text, routing_key: arguments.short_string()? }
        }
        (60, 80 | 120) => {
            let (tag, bits) = (arguments.u64()?, arguments.u8()?);
            Incoming::Confirm { tag, multiple: bits & 1 != 0, is_stored: method == 80 }
        }
        _ => Incoming::Other,
    })
}

/// The message id is behind all properties of higher bits.
fn header(mut payload: Reader<'_>) -> Option<Incoming> {
    payload.take(12)?;
    let flags = payload.u16()?;
    let has = |bit: u16| flags & 1 << bit != 0;
    for bit in [15, 14] {
        if has(bit) {
            payload.short_string()?;
        }
    }
    if has(13) {
        let table = payload.u32()?;
        payload.take(table as usize)?;
    }
    for bit in [12, 11] {
        if has(bit) {
            payload.u8()?;
        }
    }
    for bit in [10, 9, 8] {
        if has(bit) {
            payload.short_string()?;
        }
    }
    let id = if has(7) { Some(payload.short_string()?) } else { None };
    Some(Incoming::Header { id })
}

/// The rest of a payload.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn short_string(&mut self) -> Option<String> {
        let length = self.u8()?;
        let bytes = self.take(usize::from(length))?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame};
    use amq_protocol::protocol::{AMQPClass, BasicProperties, basic, channel, connection};
    use amq_protocol::types::{FieldTable, ShortString};
    use proptest::prelude::*;

    use super::super::frames::{MIN_FRAME_BYTES, write_frame};
    use super::*;

    fn read(frame: &AMQPFrame) -> Incoming {
        let mut bytes = Vec::new();
        write_frame(frame, &mut bytes);
        let mut input = BytesMut::new();
        // Nothing comes before all of it is here.
        for (at, byte) in bytes.iter().enumerate() {
            let early = if at == 0 { None } else { read_frame(&mut input, 4096).expect("a frame") };
            assert_eq!(early, None);
            input.extend_from_slice(&[*byte]);
        }
        let frame = read_frame(&mut input, 4096).expect("a frame").expect("all of it is here");
        assert!(input.is_empty());
        frame
    }

    fn basic(method: basic::AMQPMethod) -> Incoming {
        read(&AMQPFrame::Method(1, AMQPClass::Basic(method)))
    }

    fn connection(method: connection::AMQPMethod) -> Incoming {
        read(&AMQPFrame::Method(0, AMQPClass::Connection(method)))
    }

    #[test]
    fn what_the_codec_writes_is_read() {
        let tune = connection::Tune { channel_max: 7, frame_max: 131_072, heartbeat: 60 };
        assert_eq!(
            connection(connection::AMQPMethod::Tune(tune)),
            Incoming::Tune { frame_max: 131_072, heartbeat_s: 60 }
        );
        let close = channel::Close {
            reply_code: 404,
            reply_text: ShortString::from("NOT_FOUND"),
            class_id: 60,
            method_id: 40,
        };
        assert_eq!(
            read(&AMQPFrame::Method(1, AMQPClass::Channel(channel::AMQPMethod::Close(close)))),
            Incoming::Close { code: 404, text: "NOT_FOUND".to_owned() }
        );
        let blocked = connection::Blocked { reason: ShortString::from("low on memory") };
        assert_eq!(
            connection(connection::AMQPMethod::Blocked(blocked)),
            Incoming::Blocked { reason: "low on memory".to_owned() }
        );
        let ack = basic::Ack { delivery_tag: u64::MAX, multiple: true };
        assert_eq!(
            basic(basic::AMQPMethod::Ack(ack)),
            Incoming::Confirm { tag: u64::MAX, multiple: true, is_stored: true }
        );
        let nack = basic::Nack { delivery_tag: 3, multiple: false, requeue: true };
        assert_eq!(
            basic(basic::AMQPMethod::Nack(nack)),
            Incoming::Confirm { tag: 3, multiple: false, is_stored: false }
        );
        let returned = basic::Return {
            reply_code: 312,
            reply_text: ShortString::from("NO_ROUTE"),
            exchange: ShortString::from("changes"),
            routing_key: ShortString::from("set.a"),
        };
        assert_eq!(
            basic(basic::AMQPMethod::Return(returned)),
            Incoming::Return { text: "NO_ROUTE".to_owned(), routing_key: "set.a".to_owned() }
        );
        assert_eq!(read(&AMQPFrame::Heartbeat), Incoming::Heartbeat);
    }

    #[test]
    fn a_message_id_is_found_behind_everything_else() {
        let header = |properties| {
            read(&AMQPFrame::Header(
                1,
                AMQPContentHeader { class_id: 60, body_size: 5, properties },
            ))
        };
        let id = BasicProperties::default().with_message_id(ShortString::from("c/7/1"));
        let expected = Incoming::Header { id: Some("c/7/1".to_owned()) };
        assert_eq!(header(id.clone()), expected);
        let text = || ShortString::from("text");
        let all = id
            .with_content_type(text())
            .with_content_encoding(text())
            .with_headers(FieldTable::default())
            .with_delivery_mode(2)
            .with_priority(1)
            .with_correlation_id(text())
            .with_reply_to(text())
            .with_expiration(text())
            .with_timestamp(7)
            .with_app_id(text());
        assert_eq!(header(all), expected);
        assert_eq!(header(BasicProperties::default()), Incoming::Header { id: None });
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_is_here() {
        let mut input = BytesMut::from(&[FRAME_BODY, 0, 1, 0, 0, 16, 0][..]);
        assert_eq!(read_frame(&mut input, 4096), Err(FrameError::TooLarge(4104)));
        for answer in [&b"AMQP\0\0\x08\x00"[..], b"AMQP"] {
            let mut input = BytesMut::from(answer);
            assert_eq!(read_frame(&mut input, 4096), Err(FrameError::Malformed));
        }
    }

    proptest! {
        #[test]
        fn bytes_from_the_broker_never_panic(
            kind in 0..10u8,
            class in prop::sample::select(vec![10u8, 20, 40, 60, 85]),
            method in 0..130u8,
            rest in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut bytes = vec![kind, 0, 1, 0, 0, 0, rest.len() as u8 + 4, 0, class, 0, method];
            bytes.extend_from_slice(&rest);
            bytes.push(FRAME_END);
            let mut input = BytesMut::from(bytes.as_slice());
            while let Ok(Some(_)) = read_frame(&mut input, MIN_FRAME_BYTES) {}
        }
    }
}
