//! Replies of partitions in RESP.

use flux_core::reply::{Description, Lcs};
use flux_core::{Reply, Value};
use flux_proto::resp::{parse_integer, write};

use super::{Form, Gather, Session, TransactionPart, errors};

/// Up to so many bytes Redis keeps a value in one piece with its header.
const EMBEDDED_BYTES: usize = 44;

/// Renders the reply of a `Plan::One` or a `Plan::Transaction`.
pub fn render(form: &Form, reply: &Reply, session: &mut Session, out: &mut Vec<u8>) {
    if let Form::Watched { .. } = form {
        session.unanswered_watches = session.unanswered_watches.saturating_sub(1);
    }
    match (form, reply) {
        (_, Reply::Error(error)) => write::error(out, &errors::text(error)),
        (Form::Value, Reply::Value(value)) => bulk_or_null(value.as_ref(), session, out),
        (Form::Written, Reply::Written { .. }) | (Form::Renamed, Reply::Integer(_)) => {
            write::simple(out, "OK");
        }
        (Form::Written, Reply::NotWritten { .. }) => write::null(out, session.version),
        (Form::WrittenCount, Reply::Written { .. }) => write::integer(out, 1),
        (Form::WrittenCount, Reply::NotWritten { .. }) => write::integer(out, 0),
        (Form::Integer, Reply::Integer(value) | Reply::Counter { value, .. }) => {
            write::integer(out, *value);
        }
        (Form::Bytes, Reply::Bytes(bytes)) => write::bulk(out, bytes),
        (Form::Previous, Reply::Previous { previous, .. }) => {
            bulk_or_null(previous.as_ref(), session, out);
        }
        (Form::Values, Reply::Values(values)) => {
            write::array(out, values.len());
            for value in values {
                bulk_or_null(value.as_ref(), session, out);
            }
        }
        (Form::Encoding, Reply::Value(value)) => match value {
            Some(value) => write::bulk(out, encoding(&value.bytes).as_bytes()),
            None => write::null(out, session.version),
        },
        (_, Reply::Lcs(lcs)) => render_lcs(form, lcs, session, out),
        (Form::Watched { key }, Reply::Described(description)) => {
            session.watch(key, description.map_or(0, |description| description.version));
            write::simple(out, "OK");
        }
        (_, Reply::Described(description)) => render_description(form, description, session, out),
        (Form::Transaction { parts }, Reply::Many(replies)) => {
            render_transaction(parts, replies, session, out);
        }
        (Form::Transaction { .. }, Reply::Aborted { .. }) => {
            write::null_array(out, session.version);
        }
        _ => unexpected(form, out),
    }
}

/// A reply that does not belong to its command. The client hears of it; others are not concerned.
fn unexpected(form: &Form, out: &mut Vec<u8>) {
    tracing::error!(?form, "a partition answered a command with a reply of another kind");
    write::error(out, "ERR internal error: unexpected reply");
}

fn bulk_or_null(value: Option<&Value>, session: &Session, out: &mut Vec<u8>) {
    match value {
        Some(value) => write::bulk(out, &value.bytes),
        None => write::null(out, session.version),
    }
}

/// The encoding that Redis has for a value right after SET.
fn encoding(value: &[u8]) -> &'static str {
    match value {
        value if parse_integer(value).is_some() => "int",
        value if value.len() <= EMBEDDED_BYTES => "embstr",
        _ => "raw",
    }
}

fn render_lcs(form: &Form, lcs: &Lcs, session: &Session, out: &mut Vec<u8>) {
    let (min_length, with_length) = match *form {
        Form::LcsText => return write::bulk(out, &lcs.bytes),
        Form::LcsLength => return write::integer(out, lcs.bytes.len() as i64),
        Form::LcsRuns { min_length, with_length } => (min_length, with_length),
        _ => return unexpected(form, out),
    };
    let runs = || lcs.runs.iter().filter(|run| run.left.len() >= min_length);
    write::map(out, 2, session.version);
    write::bulk(out, b"matches");
    write::array(out, runs().count());
    for run in runs() {
        write::array(out, if with_length { 3 } else { 2 });
        for range in [&run.left, &run.right] {
            write::array(out, 2);
            write::integer(out, range.start as i64);
            write::integer(out, range.end as i64 - 1);
        }
        if with_length {
            write::integer(out, run.left.len() as i64);
        }
    }
    write::bulk(out, b"len");
    write::integer(out, lcs.bytes.len() as i64);
}

fn render_description(
    form: &Form,
    description: &Option<Description>,
    session: &Session,
    out: &mut Vec<u8>,
) {
    let times = |out: &mut Vec<u8>, number: fn(u64, u64) -> u64, now_ms: u64| {
        let number = match description {
            None => -2,
            Some(Description { expires_at_ms: None, .. }) => -1,
            Some(Description { expires_at_ms: Some(at), .. }) => {
                i64::try_from(number(*at, now_ms)).unwrap_or(i64::MAX)
            }
        };
        write::integer(out, number);
    };
    match *form {
        // Redis rounds both, so that a time to live just set reads as it was set.
        Form::TimeLeft { seconds: true, now_ms } => {
            times(out, |at, now| at.saturating_sub(now).saturating_add(500) / 1000, now_ms);
        }
        Form::TimeLeft { seconds: false, now_ms } => {
            times(out, u64::saturating_sub, now_ms);
        }
        Form::ExpiresAt { seconds: true } => times(out, |at, _| at.saturating_add(500) / 1000, 0),
        Form::ExpiresAt { seconds: false } => times(out, |at, _| at, 0),
        Form::Type => write::simple(out, if description.is_some() { "string" } else { "none" }),
        Form::IdleSeconds { .. } | Form::References | Form::Frequency | Form::MemoryUsage => {
            match description {
                Some(description) => render_object(form, description, out),
                None => write::null(out, session.version),
            }
        }
        _ => unexpected(form, out),
    }
}

fn render_object(form: &Form, description: &Description, out: &mut Vec<u8>) {
    match *form {
        Form::IdleSeconds { now_ms } => {
            let idle = (now_ms / 1000).saturating_sub(u64::from(description.written_at_s));
            write::integer(out, i64::try_from(idle).unwrap_or(i64::MAX));
        }
        Form::References => write::integer(out, 1),
        Form::MemoryUsage => write::integer(out, description.memory_bytes as i64),
        Form::Frequency => write::error(
            out,
            "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note \
             that when switching between policies at runtime LRU and LFU data will take some time to \
             adjust.",
        ),
        _ => unexpected(form, out),
    }
}

fn render_transaction(
    parts: &[TransactionPart],
    replies: &[Reply],
    session: &mut Session,
    out: &mut Vec<u8>,
) {
    write::array(out, parts.len());
    let mut replies = replies.iter();
    for part in parts {
        match part {
            TransactionPart::Rendered(bytes) => out.extend_from_slice(bytes),
            TransactionPart::Partition(form) => match replies.next() {
                Some(reply) => render(form, reply, session, out),
                None => unexpected(form, out),
            },
        }
    }
}

/// Renders the replies of a `Plan::Many`, in the order of its parts.
pub fn render_gathered(
    gather: &Gather,
    replies: &[Reply],
    session: &mut Session,
    out: &mut Vec<u8>,
) {
    if let Gather::Watched { .. } = gather {
        session.unanswered_watches = session.unanswered_watches.saturating_sub(1);
    }
    let failed = || replies.iter().filter(|reply| matches!(reply, Reply::Error(_)));
    if let Some(Reply::Error(error)) = failed().next() {
        let mut text = errors::text(error);
        let is_write = matches!(gather, Gather::Sum { is_write: true } | Gather::Written);
        if is_write && failed().count() < replies.len() {
            // The error's own words say that nothing was written, which holds for a part only.
            let (failed, all) = (failed().count(), replies.len());
            text += &format!(
                " (the keys of {failed} of {all} partitions; those of the others were written)"
            );
        }
        return write::error(out, &text);
    }
    match gather {
        Gather::Values { part_of_key } => render_values(part_of_key, replies, session, out),
        Gather::Sum { .. } => {
            let numbers = replies.iter().map(|reply| match reply {
                Reply::Integer(number) => *number,
                _ => 0,
            });
            write::integer(out, numbers.sum());
        }
        Gather::Written => write::simple(out, "OK"),
        Gather::Watched { keys } => {
            for (key, reply) in keys.iter().zip(replies) {
                if let Reply::Described(description) = reply {
                    session.watch(key, description.map_or(0, |description| description.version));
                }
            }
            write::simple(out, "OK");
        }
    }
}

/// Puts the values of each part back to the places of their keys.
fn render_values(part_of_key: &[u16], replies: &[Reply], session: &Session, out: &mut Vec<u8>) {
    let mut parts: Vec<_> = replies
        .iter()
        .map(|reply| match reply {
            Reply::Values(values) => values.iter(),
            _ => [].iter(),
        })
        .collect();
    write::array(out, part_of_key.len());
    for &part in part_of_key {
        let value = parts.get_mut(usize::from(part)).and_then(Iterator::next);
        bulk_or_null(value.and_then(Option::as_ref), session, out);
    }
}
