//! Commands and replies as lines of text.
//!
//! A word is taken as it is, but `""` is empty, `a*3` is `aaa` and `~` is a zero byte. `in=` and `at=`
//! give an expiry, `v=` a version; a transaction is `multi` or `all`, guards, and commands after `|`.

use crate::command::{ExpireCondition, Guard, TransactionMode};
use crate::{Command, Condition, Expiry, Reply, Value};

pub(super) fn parse(line: &str) -> Command<Vec<u8>> {
    let mut parts = line.split(" | ");
    let words: Vec<&str> = parts.next().into_iter().flat_map(|part| part.split(' ')).collect();
    match &words[..] {
        [name @ ("multi" | "all"), guards @ ..] => Command::Transaction {
            guards: guards.iter().map(|word| guard(word)).collect(),
            commands: parts.map(parse).collect(),
            mode: match *name {
                "all" => TransactionMode::AllOrNothing,
                _ => TransactionMode::KeepGoing,
            },
        },
        words => read(words)
            .or_else(|| write(words))
            .or_else(|| write_to_what_is_there(words))
            .unwrap_or_else(|| panic!("no command: {line}")),
    }
}

fn read(words: &[&str]) -> Option<Command<Vec<u8>>> {
    Some(match *words {
        ["get", key] => Command::Get { key: bytes(key) },
        ["getmany", ref keys @ ..] => Command::GetMany { keys: many(keys) },
        ["getrange", key, start, end] => {
            Command::GetRange { key: bytes(key), start: int(start), end: int(end) }
        }
        ["length", key] => Command::Length { key: bytes(key) },
        ["exists", ref keys @ ..] => Command::Exists { keys: many(keys) },
        ["lcs", left, right] => Command::Lcs { left: bytes(left), right: bytes(right) },
        ["describe", key] => Command::Describe { key: bytes(key) },
        _ => return None,
    })
}

fn write(words: &[&str]) -> Option<Command<Vec<u8>>> {
    Some(match *words {
        ["set", key, value, ref options @ ..] => Command::Set {
            key: bytes(key),
            value: bytes(value),
            expiry: expiry(options),
            condition: condition(options),
            return_previous: options.contains(&"get"),
        },
        [name @ ("setmany" | "setmanynx"), ref words @ ..] => Command::SetMany {
            pairs: words.chunks(2).map(|pair| (bytes(pair[0]), bytes(pair[1]))).collect(),
            if_none_exists: name == "setmanynx",
        },
        ["append", key, suffix] => Command::Append { key: bytes(key), suffix: bytes(suffix) },
        ["setrange", key, offset, value] => {
            Command::SetRange { key: bytes(key), offset: int(offset), value: bytes(value) }
        }
        ["increment", key, delta] => Command::Increment { key: bytes(key), delta: int(delta) },
        ["incrementfloat", key, delta] => {
            Command::IncrementFloat { key: bytes(key), delta: bytes(delta) }
        }
        _ => return None,
    })
}

fn write_to_what_is_there(words: &[&str]) -> Option<Command<Vec<u8>>> {
    Some(match *words {
        ["delete", ref keys @ ..] => Command::Delete { keys: many(keys) },
        ["deleteif", key, option] => {
            Command::DeleteIf { key: bytes(key), condition: condition(&[option]) }
        }
        ["getdelete", key] => Command::GetDelete { key: bytes(key) },
        ["getexpire", key, option] => {
            Command::GetExpire { key: bytes(key), expiry: expiry(&[option]) }
        }
        ["expire", key, ref options @ ..] => Command::Expire {
            key: bytes(key),
            at: expiry(options),
            condition: ExpireCondition {
                if_none: options.contains(&"nx"),
                if_some: options.contains(&"xx"),
                if_later: options.contains(&"gt"),
                if_earlier: options.contains(&"lt"),
            },
        },
        ["persist", key] => Command::Persist { key: bytes(key) },
        ["rename", from, to, ref options @ ..] => {
            Command::Rename { from: bytes(from), to: bytes(to), if_absent: options.contains(&"nx") }
        }
        ["copy", from, to, ref options @ ..] => Command::Copy {
            from: bytes(from),
            to: bytes(to),
            replace: options.contains(&"replace"),
        },
        ["clear", limit] => Command::Clear { limit: limit.parse().expect(limit) },
        _ => return None,
    })
}

fn bytes(word: &str) -> Vec<u8> {
    if word == "\"\"" {
        return Vec::new();
    }
    match word.split_once('*') {
        Some((unit, times)) => unit.repeat(times.parse().expect(word)).into_bytes(),
        None => word.replace('~', "\0").into_bytes(),
    }
}

fn many(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| bytes(word)).collect()
}

fn int(word: &str) -> i64 {
    word.parse().expect(word)
}

fn guard(word: &str) -> Guard<Vec<u8>> {
    let (key, version) = word.split_once(":v=").expect(word);
    Guard { key: bytes(key), version: version.parse().expect(word) }
}

fn expiry(options: &[&str]) -> Expiry {
    let named = options.iter().find_map(|option| match option.split_once('=') {
        Some(("in", ms)) => Some(Expiry::In(ms.parse().expect(option))),
        Some(("at", ms)) => Some(Expiry::At(ms.parse().expect(option))),
        _ => (*option == "keep").then_some(Expiry::Keep),
    });
    named.unwrap_or(Expiry::Never)
}

fn condition(options: &[&str]) -> Condition {
    let named = options.iter().find_map(|option| match option.split_once('=') {
        Some(("v", version)) => Some(Condition::IfVersion(version.parse().expect(option))),
        _ if *option == "nx" => Some(Condition::IfAbsent),
        _ if *option == "xx" => Some(Condition::IfPresent),
        _ => None,
    });
    named.unwrap_or(Condition::Always)
}

pub(super) fn render(reply: &Reply) -> String {
    let list = |replies: Vec<String>| format!("[{}]", replies.join(", "));
    match reply {
        Reply::Value(value) => render_value(value),
        Reply::Values(values) => list(values.iter().map(render_value).collect()),
        Reply::Bytes(bytes) => text(bytes),
        Reply::Integer(number) => number.to_string(),
        Reply::Counter { value, version } => format!("{value} v={version}"),
        Reply::Written { version } => format!("written v={version}"),
        Reply::NotWritten { version } => format!("not written v={version}"),
        Reply::Previous { previous, written } => {
            format!(
                "{}, {}",
                render_value(previous),
                if *written { "written" } else { "not written" }
            )
        }
        Reply::Lcs(lcs) => {
            let runs = lcs.runs.iter().map(|run| format!("{:?}={:?}", run.left, run.right));
            format!("{} {}", text(&lcs.bytes), list(runs.collect()))
        }
        Reply::Described(None) => "nil".to_string(),
        Reply::Described(Some(known)) => format!(
            "v={} at={:?} bytes={} written={}",
            known.version, known.expires_at_ms, known.value_bytes, known.written_at_s
        ),
        Reply::Many(replies) => list(replies.iter().map(render).collect()),
        Reply::Aborted { position: None } => "aborted".to_string(),
        Reply::Aborted { position: Some(position) } => format!("aborted by {position}"),
        Reply::Error(error) => format!("error: {error}"),
        Reply::Page { next, items, .. } => format!("{} keys, then {next:?}", items.len()),
    }
}

fn render_value(value: &Option<Value>) -> String {
    match value {
        None => "nil".to_string(),
        Some(Value { bytes, version, expires_at_ms: None }) => {
            format!("{} v={version}", text(bytes))
        }
        Some(Value { bytes, version, expires_at_ms: Some(at) }) => {
            format!("{} v={version} at={at}", text(bytes))
        }
    }
}

fn text(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "\"\"".to_string();
    }
    String::from_utf8_lossy(bytes).replace('\0', "~")
}
