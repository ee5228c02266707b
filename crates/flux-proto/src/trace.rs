//! W3C Trace Context (level 1): which request of a distributed trace something belongs to, as the header
//! `traceparent` and as 25 bytes.
//!
//! What this module does not do: begin traces or spans, or carry `tracestate`.

use std::fmt;

/// The name of the header, in HTTP and in the metadata of gRPC.
pub const TRACEPARENT: &str = "traceparent";

/// The length of a trace context as bytes.
pub const TRACE_BYTES: usize = 25;

/// The bit of the flags that version 00 defines.
const SAMPLED: u8 = 1;

/// Which request of a distributed trace caused a change, as W3C Trace Context has it. Neither id is
/// all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// The id of the whole trace.
    pub trace: [u8; 16],
    /// The id of the caller's span.
    pub span: [u8; 8],
    /// Bit 0: the trace is sampled.
    pub flags: u8,
}

impl TraceContext {
    /// Reads the header `traceparent`: version 00, and of later versions the part that 00 defines.
    pub fn parse(text: &str) -> Option<TraceContext> {
        const LENGTH: usize = 55;
        let bytes = text.as_bytes();
        let (head, rest) = bytes.split_at_checked(LENGTH)?;
        let [version] = unhex(&head[..2])?;
        let (whole, known) = match version {
            0 => (rest.is_empty(), u8::MAX),
            255 => (false, 0),
            _ => (rest.is_empty() || rest[0] == b'-', SAMPLED),
        };
        if !whole || [2, 35, 52].iter().any(|&at| head[at] != b'-') {
            return None;
        }
        let (trace, span) = (unhex(&head[3..35])?, unhex(&head[36..52])?);
        let [flags] = unhex(&head[53..])?;
        TraceContext { trace, span, flags: flags & known }.named()
    }

    /// That of a request with these headers `traceparent`. More than one say nothing, and so does one
    /// that is not valid: the request is then one without.
    pub fn of_headers<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Option<TraceContext> {
        let mut values = values.into_iter();
        let only = values.next().filter(|_| values.next().is_none())?;
        TraceContext::parse(std::str::from_utf8(only).ok()?)
    }

    /// Reads what [`TraceContext::to_bytes`] gives; none where an id is all zeros.
    pub fn from_bytes(bytes: &[u8; TRACE_BYTES]) -> Option<TraceContext> {
        let (trace, rest) = bytes.split_first_chunk()?;
        let (span, rest) = rest.split_first_chunk()?;
        TraceContext { trace: *trace, span: *span, flags: *rest.first()? }.named()
    }

    /// The trace's id, the span's, and the flags, as the native protocol, the frames between nodes and the
    /// log have them.
    pub fn to_bytes(&self) -> [u8; TRACE_BYTES] {
        let mut bytes = [0; TRACE_BYTES];
        bytes[..16].copy_from_slice(&self.trace);
        bytes[16..24].copy_from_slice(&self.span);
        bytes[24] = self.flags;
        bytes
    }

    fn named(self) -> Option<TraceContext> {
        (self.trace != [0; 16] && self.span != [0; 8]).then_some(self)
    }
}

/// As the header `traceparent`, version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trace = u128::from_be_bytes(self.trace);
        let span = u64::from_be_bytes(self.span);
        write!(f, "00-{trace:032x}-{span:016x}-{:02x}", self.flags)
    }
}

/// Lower-case hexadecimal digits of exactly `N` bytes.
fn unhex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of the specification.
    pub(crate) const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// Any trace context, and none.
    pub(crate) fn traces() -> impl Strategy<Value = Option<TraceContext>> {
        let ids = (any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u8>());
        let named = ids.prop_filter_map("an id of zeros", |(trace, span, flags)| {
            TraceContext { trace, span, flags }.named()
        });
        proptest::option::of(named)
    }

    #[test]
    fn a_header_is_read_as_w3c_has_it() {
        let trace = TraceContext::parse(EXAMPLE).expect("the example of the specification");
        assert_eq!((trace.trace[0], trace.span[1], trace.flags), (0x4b, 0xf0, 1));
        assert_eq!(trace.to_string(), EXAMPLE);
        let later = EXAMPLE.replacen("00", "cc", 1);
        assert_eq!(TraceContext::parse(&later), Some(trace));
        assert_eq!(TraceContext::parse(&format!("{later}-later")), Some(trace));
        for wrong in [
            "",
            "00",
            &EXAMPLE[..54],
            &format!("{EXAMPLE}-"),
            &format!("{EXAMPLE}-more"),
            &format!(" {EXAMPLE}"),
            &format!("{EXAMPLE} "),
            &format!("{later}x"),
            &EXAMPLE.replacen("00", "ff", 1),
            &EXAMPLE.to_uppercase(),
            &EXAMPLE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &EXAMPLE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &EXAMPLE.replace('-', "_"),
            &EXAMPLE.replace("4b", "+b"),
            &EXAMPLE.replacen("00", "0x", 1),
            &EXAMPLE.replace("-01", "-0g"),
            &"é".repeat(28),
        ] {
            assert_eq!(TraceContext::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn of_the_flags_of_a_later_version_only_the_known_one_is_taken() {
        let flags = |version: &str, flags: &str| {
            let text = EXAMPLE.replacen("00", version, 1).replace("-01", flags);
            TraceContext::parse(&text).expect("valid").flags
        };
        assert_eq!((flags("00", "-00"), flags("00", "-ff")), (0, 0xff));
        assert_eq!((flags("01", "-ff"), flags("fe", "-fe")), (1, 0));
    }

    #[test]
    fn two_headers_are_none() {
        let of =
            |values: &[&str]| TraceContext::of_headers(values.iter().map(|one| one.as_bytes()));
        let trace = TraceContext::parse(EXAMPLE);
        assert_eq!(of(&[EXAMPLE]), trace);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[EXAMPLE, EXAMPLE]), None);
        assert_eq!(of(&["", EXAMPLE]), None);
        assert_eq!(of(&[&format!("{EXAMPLE},{EXAMPLE}")]), None);
        assert_eq!(TraceContext::of_headers([&b"\xff\xfe"[..]]), None);
    }

    #[test]
    fn golden_bytes() {
        let trace = TraceContext { trace: [1; 16], span: [2; 8], flags: 3 };
        let bytes = *b"\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\
            \x02\x02\x02\x02\x02\x02\x02\x02\x03";
        assert_eq!(trace.to_bytes(), bytes);
        assert_eq!(TraceContext::from_bytes(&bytes), Some(trace));
        let unnamed = |from: usize, to: usize| {
            let mut bytes = bytes;
            bytes[from..to].fill(0);
            TraceContext::from_bytes(&bytes)
        };
        assert_eq!((unnamed(0, 16), unnamed(16, 24)), (None, None));
        assert!(unnamed(0, 15).is_some() && unnamed(17, 25).is_some());
    }

    proptest! {
        #[test]
        fn trace_contexts_read_back_as_themselves(trace in traces()) {
            if let Some(trace) = trace {
                prop_assert_eq!(TraceContext::parse(&trace.to_string()), Some(trace));
                prop_assert_eq!(TraceContext::from_bytes(&trace.to_bytes()), Some(trace));
            }
        }

        /// What is read is written as it was, but for its version and what a later one adds.
        #[test]
        fn what_is_no_header_is_none(
            text in prop_oneof!["[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.{0,3}", ".{0,60}"],
        ) {
            if let Some(trace) = TraceContext::parse(&text) {
                let known = trace.to_string();
                prop_assert_eq!(&known[2..53], &text[2..53]);
                prop_assert_eq!(TraceContext::parse(&known), Some(trace));
            }
        }
    }
}
