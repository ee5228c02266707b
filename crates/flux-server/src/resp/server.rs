//! Commands on the node.

use flux_proto::resp::write;

use super::request::{Outcome, Refusal, Request};
use super::{NodeCommand, Plan, REDIS_VERSION};

/// The longest DEBUG SLEEP.
const MAX_SLEEP_S: f64 = 3600.0;

pub(super) fn info<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    Ok(Plan::Node(NodeCommand::Info { sections: request.args.from(1) }))
}

pub(super) fn dbsize<'a>(_: &mut Request<'a, '_>) -> Outcome<'a> {
    Ok(Plan::Node(NodeCommand::KeyCount))
}

pub(super) fn flush<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let is = |name: &[u8]| request.args.at(1).eq_ignore_ascii_case(name);
    match request.args.len() {
        1 => {}
        2 if is(b"ASYNC") || is(b"SYNC") => {}
        _ => return Err(Refusal::SYNTAX),
    }
    Ok(Plan::Node(NodeCommand::Flush))
}

pub(super) fn time<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let now_us = request.node.now_us;
    write::array(request.out, 2);
    write::bulk_integer(request.out, (now_us / 1_000_000).cast_signed());
    write::bulk_integer(request.out, (now_us % 1_000_000).cast_signed());
    Ok(Plan::Done)
}

pub(super) fn lolwut<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let version = env!("CARGO_PKG_VERSION");
    let text = format!(
        r"
     SET ---.
             \        .----> table
     DEL -----> log -+-----> disk
             /        '----> events
    INCR ---'

Flux-KV ver. {version}, speaks as Redis ver. {REDIS_VERSION}
"
    );
    write::verbatim(request.out, *b"txt", text.as_bytes(), request.session.version);
    Ok(Plan::Done)
}

pub(super) fn debug<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let args = request.args;
    let is = |name: &[u8]| args.at(1).eq_ignore_ascii_case(name);
    if is(b"HELP") && args.len() == 2 {
        let lines = [
            "DEBUG <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
            "SLEEP <seconds>",
            "    Answer after so many seconds; decimals allowed. Other connections go on.",
            "HELP",
            "    Prints this help.",
        ];
        write::array(request.out, lines.len());
        for line in lines {
            write::simple(request.out, line);
        }
        return Ok(Plan::Done);
    }
    if !is(b"SLEEP") || args.len() != 3 {
        let name = String::from_utf8_lossy(args.at(1));
        return Err(Refusal::new(format!(
            "ERR unknown subcommand or wrong number of arguments for '{name}'. Try DEBUG HELP."
        )));
    }
    let seconds: f64 = str::from_utf8(args.at(2))
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|seconds: &f64| !seconds.is_nan())
        .ok_or_else(|| Refusal::new("ERR value is not a valid float"))?;
    if seconds > MAX_SLEEP_S {
        return Err(Refusal::new(format!("ERR sleep is limited to {MAX_SLEEP_S} seconds")));
    }
    // A negative time becomes 0.
    Ok(Plan::Node(NodeCommand::Sleep { milliseconds: (seconds * 1000.0) as u64 }))
}
