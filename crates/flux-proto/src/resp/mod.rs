//! RESP, the protocol of Redis, in versions 2 and 3.
//!
//! `request` parses what a client sends, `write` appends replies, `reply` parses them on the client's
//! side. Nothing here knows a command. Streamed strings and aggregates of RESP3 are not supported: no
//! Redis server sends or takes them.

mod inline;
pub mod reply;
pub mod request;
pub mod write;

pub use reply::{Reply, ReplyError, parse_reply, skip_reply};
pub use request::{Args, Limits, OwnedArgs, Parsed, ProtocolError, RequestParser};

/// The version of the protocol that a connection speaks. Every connection starts with RESP2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// RESP2.
    #[default]
    V2,
    /// RESP3, after `HELLO 3`.
    V3,
}

/// A 64-bit integer in decimal text as Redis takes it: an optional `-`, no `+`, no leading zeros, no
/// spaces, no `-0`.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    // 19 digits fit an u64, so the sum cannot overflow.
    let mut magnitude = 0u64;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        magnitude = magnitude * 10 + u64::from(digit - b'0');
    }
    if negative { 0i64.checked_sub_unsigned(magnitude) } else { i64::try_from(magnitude).ok() }
}

#[cfg(test)]
mod tests {
    use super::parse_integer;

    #[test]
    fn integers_are_taken_as_redis_takes_them() {
        for number in [0, 1, -1, 9, 10, i64::MAX, i64::MIN, i64::MAX - 1] {
            assert_eq!(parse_integer(number.to_string().as_bytes()), Some(number));
        }
        for text in [
            "",
            "-",
            "+1",
            "-0",
            "00",
            "01",
            "-01",
            " 1",
            "1 ",
            "1a",
            "0x1",
            "1.0",
            "9223372036854775808",
            "-9223372036854775809",
            "99999999999999999999",
        ] {
            assert_eq!(parse_integer(text.as_bytes()), None, "{text:?}");
        }
    }
}
