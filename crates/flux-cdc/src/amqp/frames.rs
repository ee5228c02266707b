//! Writing AMQP 0-9-1 frames: a publish by hand, everything else with `amq-protocol`.
//!
//! Every published change pays for what is here, so a message becomes its frames in one pass into
//! one buffer, without a tree of values in between.
//!
//! What this module does not do: read frames, or send bytes.

use amq_protocol::frame::{AMQPFrame, WriteContext, gen_frame};
use amq_protocol::protocol::AMQPClass;

use crate::message::Publication;

/// The one channel that is used for publishing.
pub const CHANNEL: u16 = 1;
/// The largest frame that is offered and accepted; a broker may ask for smaller ones.
pub const MAX_FRAME_BYTES: u32 = 128 << 10;
/// What AMQP guarantees for every frame. The headers of a publication fit into it.
pub const MIN_FRAME_BYTES: u32 = 4096;

pub(super) const FRAME_METHOD: u8 = 1;
pub(super) const FRAME_HEADER: u8 = 2;
pub(super) const FRAME_BODY: u8 = 3;
pub(super) const FRAME_END: u8 = 0xce;
/// Type, channel and size before the payload, and the end after it.
pub(super) const FRAME_OVERHEAD_BYTES: usize = 8;

const CLASS_BASIC: u16 = 60;
const METHOD_PUBLISH: u16 = 40;
const MANDATORY: u8 = 1;
const PERSISTENT: u8 = 2;

const HAS_CONTENT_TYPE: u16 = 1 << 15;
const HAS_HEADERS: u16 = 1 << 13;
const HAS_DELIVERY_MODE: u16 = 1 << 12;
const HAS_MESSAGE_ID: u16 = 1 << 7;
const HAS_TIMESTAMP: u16 = 1 << 6;

/// Appends the frames of a persistent message that must reach a queue.
pub fn write_publish(exchange: &str, publication: &Publication, frame_max: u32, out: &mut Vec<u8>) {
    let Publication { routing_key, message_id, headers, timestamp, body } = publication;
    // Room for the frames and their headers.
    out.reserve(body.len() + body.len() / 256 + 1024);
    frame(FRAME_METHOD, out, |out| {
        out.extend_from_slice(&CLASS_BASIC.to_be_bytes());
        out.extend_from_slice(&METHOD_PUBLISH.to_be_bytes());
        out.extend_from_slice(&[0, 0]);
        short_string(exchange, out);
        short_string(routing_key, out);
        out.push(MANDATORY);
    });
    frame(FRAME_HEADER, out, |out| {
        let has_timestamp = if *timestamp > 0 { HAS_TIMESTAMP } else { 0 };
        let properties =
            HAS_CONTENT_TYPE | HAS_HEADERS | HAS_DELIVERY_MODE | HAS_MESSAGE_ID | has_timestamp;
        out.extend_from_slice(&CLASS_BASIC.to_be_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        out.extend_from_slice(&properties.to_be_bytes());
        short_string("application/json", out);
        sized(out, |out| {
            for (name, value) in headers {
                short_string(name, out);
                out.push(b'S');
                sized(out, |out| out.extend_from_slice(value.as_bytes()));
            }
        });
        out.push(PERSISTENT);
        short_string(message_id, out);
        if *timestamp > 0 {
            out.extend_from_slice(&timestamp.to_be_bytes());
        }
    });
    for part in body.chunks(frame_max as usize - FRAME_OVERHEAD_BYTES) {
        frame(FRAME_BODY, out, |out| out.extend_from_slice(part));
    }
}

fn frame(kind: u8, out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    out.extend_from_slice(&CHANNEL.to_be_bytes());
    sized(out, payload);
    out.push(FRAME_END);
}

/// Writes the length, then the content.
fn sized(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len() + 4;
    out.extend_from_slice(&[0; 4]);
    content(out);
    let length = (out.len() - start) as u32;
    out[start - 4..start].copy_from_slice(&length.to_be_bytes());
}

/// A string of at most 255 bytes; a longer one is cut at a character.
fn short_string(text: &str, out: &mut Vec<u8>) {
    let text = &text[..text.floor_char_boundary(255)];
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// Appends a frame of any other kind.
pub fn write_frame(frame: &AMQPFrame, out: &mut Vec<u8>) {
    let context = WriteContext::from(std::mem::take(out));
    let written = gen_frame(frame)(context).expect("a vector takes everything");
    *out = written.into_inner().0;
}

/// Appends a method.
pub fn write_method(channel: u16, method: AMQPClass, out: &mut Vec<u8>) {
    write_frame(&AMQPFrame::Method(channel, method), out);
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::parse_frame;
    use amq_protocol::protocol::basic;

    use super::*;

    fn publication(body: Vec<u8>) -> Publication {
        Publication {
            routing_key: "set.user.7".to_owned(),
            message_id: "blue/7/41".to_owned(),
            headers: vec![
                ("cloudEvents:id", "blue/7/41".to_owned()),
                ("traceparent", "00-ü".to_owned()),
            ],
            timestamp: 1_709_210_096,
            body,
        }
    }

    fn frames(publication: &Publication, frame_max: u32) -> Vec<AMQPFrame> {
        let mut bytes = Vec::new();
        write_publish("changes", publication, frame_max, &mut bytes);
        let (mut rest, mut frames) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (after, frame) = parse_frame(rest).expect("a frame");
            assert!(rest.len() - after.len() <= frame_max as usize);
            frames.push(frame);
            rest = after;
        }
        frames
    }

    #[test]
    fn a_publish_is_what_the_protocol_says() {
        let frames = frames(&publication(b"{}".to_vec()), MIN_FRAME_BYTES);
        let [
            AMQPFrame::Method(CHANNEL, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))),
            AMQPFrame::Header(CHANNEL, header),
            AMQPFrame::Body(CHANNEL, body),
        ] = frames.as_slice()
        else {
            panic!("other frames: {frames:?}");
        };
        assert_eq!(publish.exchange.as_str(), "changes");
        assert_eq!(publish.routing_key.as_str(), "set.user.7");
        assert!(publish.mandatory && !publish.immediate);
        assert_eq!((header.class_id, header.body_size), (CLASS_BASIC, 2));
        let properties = &header.properties;
        let text = |property: &Option<amq_protocol::types::ShortString>| {
            property.as_ref().map(|text| text.as_str().to_owned())
        };
        assert_eq!(text(properties.content_type()).as_deref(), Some("application/json"));
        assert_eq!(text(properties.message_id()).as_deref(), Some("blue/7/41"));
        assert_eq!(*properties.delivery_mode(), Some(PERSISTENT));
        assert_eq!(*properties.timestamp(), Some(1_709_210_096));
        let headers = properties.headers().as_ref().expect("there are headers").inner();
        let value = |name: &str| headers[name].as_long_string().map(ToString::to_string);
        assert_eq!(value("cloudEvents:id").as_deref(), Some("blue/7/41"));
        assert_eq!(value("traceparent").as_deref(), Some("00-ü"));
        assert_eq!(headers.len(), 2);
        assert_eq!(body, b"{}");
    }

    #[test]
    fn a_large_body_goes_in_frames_of_the_agreed_size() {
        let body: Vec<u8> = (0..20_000).map(|at| at as u8).collect();
        let frames = frames(&publication(body.clone()), MIN_FRAME_BYTES);
        let parts: Vec<&[u8]> = frames
            .iter()
            .filter_map(|frame| match frame {
                AMQPFrame::Body(_, part) => Some(part.as_slice()),
                _ => None,
            })
            .collect();
        assert_eq!(parts.len(), 5);
        assert_eq!(parts.concat(), body);
    }

    #[test]
    fn the_longest_headers_fit_into_the_smallest_frame() {
        let long = "ü".repeat(200);
        let mut publication = publication(b"{}".to_vec());
        publication.message_id = long.clone();
        publication.headers = vec![
            ("cloudEvents:id", long.clone()),
            ("cloudEvents:source", long),
            ("cloudEvents:subject", "k".repeat(crate::message::MAX_SUBJECT_BYTES)),
        ];
        let frames = frames(&publication, MIN_FRAME_BYTES);
        let AMQPFrame::Header(_, header) = &frames[1] else { panic!("no header") };
        // 255 bytes would end within a character.
        let id = header.properties.message_id().as_ref().expect("there is an id");
        assert_eq!(id.as_str(), "ü".repeat(127));
    }
}
