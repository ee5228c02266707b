//! How a call wants to be carried out: its consistency, its session, its trace and its deadline.

use std::time::Duration;

use flux_core::Trace;
use flux_core::session::Once;
use flux_proto::grpc::kv_v1 as wire;
use flux_proto::trace::{TRACEPARENT, TraceContext};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Request, Status};

use super::invalid;
use crate::mailbox::Ask;

/// That of a read.
pub(super) fn read_ask<T>(request: &Request<T>, consistency: i32) -> Ask {
    // A value that is not known here asks for more than a stale read, if for anything.
    let stale = consistency == wire::Consistency::Stale as i32;
    Ask { stale, patience: patience(request.metadata()), ..Ask::default() }
}

/// That of a write.
pub(super) fn write_ask<T>(
    request: &Request<T>,
    session: Option<&wire::Session>,
) -> Result<Ask, Status> {
    let once = session.map(once).transpose()?;
    let metadata = request.metadata();
    let (trace, patience) = (trace(metadata), patience(metadata));
    Ok(Ask { once, trace, patience, ..Ask::default() })
}

/// The trace that a call belongs to.
fn trace(metadata: &MetadataMap) -> Option<Box<Trace>> {
    let values = metadata.get_all(TRACEPARENT).iter().map(MetadataValue::as_encoded_bytes);
    TraceContext::of_headers(values).map(|trace| Box::new(trace.to_bytes()))
}

fn once(session: &wire::Session) -> Result<Once, Status> {
    let &wire::Session { id, sequence, acked_below } = session;
    if id == 0 {
        return Err(invalid("session.id must not be 0"));
    }
    if acked_below > sequence {
        return Err(invalid("session.acked_below must be at most session.sequence"));
    }
    Ok(Once { session: id, sequence, acked_below })
}

/// How long the client waits, as the header `grpc-timeout` has it.
fn patience(metadata: &MetadataMap) -> Option<Duration> {
    parse_timeout(metadata.get("grpc-timeout")?.to_str().ok()?)
}

/// A timeout of gRPC: up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let valid = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| valid)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_up_to_eight_digits_and_a_unit() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("1u"), Some(Duration::from_micros(1)));
        for text in ["", "m", "100000000S", "-1S", "1s", "1\u{e9}", "+1S", " 1S"] {
            assert_eq!(parse_timeout(text), None, "{text}");
        }
    }

    #[test]
    fn a_trace_is_read_from_one_valid_entry() {
        let read = |values: &[&'static str]| {
            let mut request = Request::new(());
            for value in values {
                request.metadata_mut().append(TRACEPARENT, MetadataValue::from_static(value));
            }
            write_ask(&request, None).expect("no session to be wrong").trace.map(|trace| *trace)
        };
        let [one, other] = [
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
        ];
        let parsed = TraceContext::parse(one).expect("valid").to_bytes();
        assert_eq!(read(&[one]), Some(parsed));
        let zeros = "00-00000000000000000000000000000000-b7ad6b7169203331-01";
        for values in [&[][..], &["00-0af7"], &[zeros], &[one, other], &[one, one]] {
            assert_eq!(read(values), None, "{values:?}");
        }
    }

    #[test]
    fn a_session_that_cannot_be_is_refused() {
        let session = |id, sequence, acked_below| wire::Session { id, sequence, acked_below };
        assert!(once(&session(0, 1, 0)).is_err());
        assert!(once(&session(1, 1, 2)).is_err());
        let whole = Once { session: 7, sequence: 3, acked_below: 3 };
        assert_eq!(once(&session(7, 3, 3)).expect("valid"), whole);
    }
}
