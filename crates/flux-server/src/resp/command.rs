//! COMMAND, HELP of every container, and commands that there are not: all from the table.

use flux_core::glob;
use flux_proto::resp::{Args, Version, write};

use super::Plan;
use super::request::{Outcome, Refusal, Request};
use super::table::{self, COMMANDS, FLAG_NAMES, READONLY, Spec, lookup};

/// How much of an unknown command is repeated.
const SHOWN_BYTES: usize = 128;

pub(super) fn unknown(args: Args<'_>) -> Refusal {
    let shown = |bytes: &[u8], limit: usize| {
        String::from_utf8_lossy(&bytes[..bytes.len().min(limit)]).into_owned()
    };
    let mut rest = String::new();
    for arg in args.from(1).iter() {
        if rest.len() >= SHOWN_BYTES {
            break;
        }
        rest += &format!("'{}' ", shown(arg, SHOWN_BYTES - rest.len()));
    }
    let name = shown(args.at(0), SHOWN_BYTES);
    Refusal::new(format!("ERR unknown command '{name}', with args beginning with: {rest}"))
}

pub(super) fn unknown_subcommand(container: &Spec, name: &[u8]) -> Refusal {
    let name = String::from_utf8_lossy(&name[..name.len().min(SHOWN_BYTES)]);
    let container = container.name.to_uppercase();
    Refusal::new(format!("ERR unknown subcommand '{name}'. Try {container} HELP."))
}

pub(super) fn help<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let name = request.spec.name.split('|').next().unwrap_or_default();
    let subcommands = lookup(name.as_bytes()).map_or(&[][..], |container| container.subcommands);
    let out = &mut *request.out;
    write::array(out, 1 + subcommands.len() * 2);
    let name = name.to_uppercase();
    write::simple(out, &format!("{name} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"));
    for spec in subcommands {
        let own = spec.name.split('|').next_back().unwrap_or_default();
        write::simple(out, &own.to_uppercase());
        write::simple(out, &format!("    {}", spec.summary));
    }
    Ok(Plan::Done)
}

pub(super) fn count<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    write::integer(request.out, COMMANDS.len() as i64);
    Ok(Plan::Done)
}

pub(super) fn all<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    write::array(request.out, COMMANDS.len());
    for spec in COMMANDS {
        write_info(spec, request.session.version, request.out);
    }
    Ok(Plan::Done)
}

pub(super) fn info<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let names = request.args.from(2);
    if names.is_empty() {
        return all(request);
    }
    write::array(request.out, names.len());
    for name in names.iter() {
        match by_full_name(name) {
            Some(spec) => write_info(spec, request.session.version, request.out),
            None => write::null(request.out, request.session.version),
        }
    }
    Ok(Plan::Done)
}

/// A command, or a subcommand by its name with the `|`.
fn by_full_name(name: &[u8]) -> Option<&'static Spec> {
    match name.iter().position(|&byte| byte == b'|') {
        Some(bar) => table::subcommand(lookup(&name[..bar])?, &name[bar + 1..]),
        None => lookup(name),
    }
}

fn write_info(spec: &Spec, version: Version, out: &mut Vec<u8>) {
    let (first, last, step) = spec.keys;
    write::array(out, 10);
    write::bulk(out, spec.name.as_bytes());
    write::integer(out, i64::from(spec.arity));
    let flags = || FLAG_NAMES.iter().filter(|(flag, _)| spec.has(*flag));
    write::set(out, flags().count(), version);
    for (_, name) in flags() {
        write::simple(out, name);
    }
    for number in [first, last, step] {
        write::integer(out, i64::from(number));
    }
    write::set(out, spec.categories().count(), version);
    for category in spec.categories() {
        write::simple(out, category);
    }
    // Tips.
    write::set(out, 0, version);
    if first == 0 {
        write::set(out, 0, version);
    } else {
        write::set(out, 1, version);
        write_key_spec(spec, version, out);
    }
    if spec.subcommands.is_empty() {
        write::set(out, 0, version);
    } else {
        write::array(out, spec.subcommands.len());
    }
    for sub in spec.subcommands {
        write_info(sub, version, out);
    }
}

/// Where keys stand in a command, in the form that Redis 7 has for it.
fn write_key_spec(spec: &Spec, version: Version, out: &mut Vec<u8>) {
    let (first, last, step) = spec.keys;
    let flags = if spec.has(READONLY) { ["RO", "access"] } else { ["RW", "update"] };
    write::map(out, 3, version);
    write::bulk(out, b"flags");
    write::set(out, flags.len(), version);
    for flag in flags {
        write::simple(out, flag);
    }
    write::bulk(out, b"begin_search");
    write_typed(out, version, "index", &[("index", first)]);
    write::bulk(out, b"find_keys");
    let last = if last < 0 { last } else { last - first };
    write_typed(out, version, "range", &[("lastkey", last), ("keystep", step), ("limit", 0)]);
}

fn write_typed(out: &mut Vec<u8>, version: Version, kind: &str, fields: &[(&str, i8)]) {
    write::map(out, 2, version);
    write::bulk(out, b"type");
    write::bulk(out, kind.as_bytes());
    write::bulk(out, b"spec");
    write::map(out, fields.len(), version);
    for (name, value) in fields {
        write::bulk(out, name.as_bytes());
        write::integer(out, i64::from(*value));
    }
}

pub(super) fn docs<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let names = request.args.from(2);
    let specs: Vec<&Spec> = if names.is_empty() {
        COMMANDS.iter().collect()
    } else {
        names.iter().filter_map(by_full_name).collect()
    };
    write_docs(&specs, request.session.version, request.out);
    Ok(Plan::Done)
}

fn write_docs(specs: &[&Spec], version: Version, out: &mut Vec<u8>) {
    write::map(out, specs.len(), version);
    for spec in specs {
        write::bulk(out, spec.name.as_bytes());
        let has_subcommands = !spec.subcommands.is_empty();
        write::map(out, 3 + usize::from(has_subcommands), version);
        let fields = [("summary", spec.summary), ("since", spec.since), ("group", spec.group)];
        for (name, value) in fields {
            write::bulk(out, name.as_bytes());
            write::bulk(out, value.as_bytes());
        }
        if has_subcommands {
            write::bulk(out, b"subcommands");
            let subcommands: Vec<&Spec> = spec.subcommands.iter().collect();
            write_docs(&subcommands, version, out);
        }
    }
}

pub(super) fn list<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let args = request.args;
    let is = |position: usize, name: &[u8]| args.at(position).eq_ignore_ascii_case(name);
    let wanted = args.at(4).to_ascii_lowercase();
    let matches: &dyn Fn(&Spec) -> bool = match args.len() {
        2 => &|_| true,
        5 if is(2, b"FILTERBY") && is(3, b"PATTERN") => {
            &|spec| glob::matches(&wanted, spec.name.as_bytes())
        }
        5 if is(2, b"FILTERBY") && is(3, b"ACLCAT") => {
            &|spec| spec.categories().any(|category| category.as_bytes()[1..] == wanted)
        }
        5 if is(2, b"FILTERBY") && is(3, b"MODULE") => &|_| false,
        _ => return Err(Refusal::SYNTAX),
    };
    let every = COMMANDS.iter().flat_map(|spec| [spec].into_iter().chain(spec.subcommands));
    let names: Vec<&str> = every.filter(|spec| matches(spec)).map(|spec| spec.name).collect();
    write::array(request.out, names.len());
    for name in names {
        write::bulk(request.out, name.as_bytes());
    }
    Ok(Plan::Done)
}

pub(super) fn getkeys<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let args = request.args.from(2);
    let container = lookup(args.at(0));
    let spec = container.and_then(|spec| match spec.subcommands {
        [] => Some(spec),
        _ => table::subcommand(spec, args.at(1)),
    });
    let spec = spec.ok_or_else(|| Refusal::new("ERR Invalid command specified"))?;
    if spec.keys.0 == 0 {
        return Err(Refusal::new("ERR The command has no key arguments"));
    }
    if !spec.accepts(args.len()) {
        return Err(Refusal::new("ERR Invalid number of arguments specified for command"));
    }
    let keys = spec.key_positions(args.len());
    write::array(request.out, keys.clone().count());
    for position in keys {
        write::bulk(request.out, args.at(position));
    }
    Ok(Plan::Done)
}
