//! Commands on the connection itself.

use flux_proto::resp::{Args, Version, parse_integer, write};

use super::node::ClientFilter;
use super::request::{Outcome, Refusal, Request};
use super::topology::Role;
use super::{ClusterView, NodeCommand, Plan, REDIS_VERSION, Session};

/// The longest name of a connection or library that is kept.
const MAX_NAME_BYTES: usize = 1024;

/// A container without a subcommand, which its arity does not allow.
pub(super) fn container<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    Err(Refusal::arity(request.spec))
}

pub(super) fn ping<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    match request.args.len() {
        1 => write::simple(request.out, "PONG"),
        2 => write::bulk(request.out, request.args.at(1)),
        _ => return Err(Refusal::arity(request.spec)),
    }
    Ok(Plan::Done)
}

pub(super) fn echo<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    write::bulk(request.out, request.args.at(1));
    Ok(Plan::Done)
}

pub(super) fn select<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.integer(1)? != 0 {
        return Err(match (request.node.cluster)().enabled {
            true => Refusal::new("ERR SELECT is not allowed in cluster mode"),
            false => Refusal::DATABASE,
        });
    }
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

pub(super) fn quit<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    write::simple(request.out, "OK");
    Ok(Plan::Close)
}

pub(super) fn reset<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.session.unanswered_watches > 0 {
        return Ok(Plan::Later);
    }
    request.session.reset();
    write::simple(request.out, "RESET");
    Ok(Plan::Done)
}

pub(super) fn auth<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    match request.args.len() {
        2 => Err(Refusal::new(
            "ERR AUTH <password> called without any password configured for the default user. Are \
             you sure your configuration is correct?",
        )),
        3 => {
            authenticate(request.args.at(1))?;
            write::simple(request.out, "OK");
            Ok(Plan::Done)
        }
        _ => Err(Refusal::SYNTAX),
    }
}

/// There is the default user only, and it takes any password.
fn authenticate(user: &[u8]) -> Result<(), Refusal> {
    if user == b"default" {
        Ok(())
    } else {
        Err(Refusal::new("WRONGPASS invalid username-password pair or user is disabled."))
    }
}

pub(super) fn hello<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let Request { args, session, out, node, .. } = request;
    let (args, session) = (*args, &mut **session);
    let version = match args.get(1).map(parse_integer) {
        None => session.version,
        Some(Some(2)) => Version::V2,
        Some(Some(3)) => Version::V3,
        Some(Some(_)) => return Err(Refusal::new("NOPROTO unsupported protocol version")),
        Some(None) => {
            return Err(Refusal::new("ERR Protocol version is not an integer or out of range"));
        }
    };
    if let Some(name) = hello_options(args.from(2))? {
        session.name = name.to_vec();
    }
    session.version = version;
    write_hello(session, &(node.cluster)(), out);
    Ok(Plan::Done)
}

/// Checks the options of HELLO; returns the name that the connection gets, if it gets one.
fn hello_options<'a>(options: Args<'a>) -> Result<Option<&'a [u8]>, Refusal> {
    let mut name = None;
    let mut position = 0;
    while let Some(option) = options.get(position) {
        let arguments = options.len() - position - 1;
        if option.eq_ignore_ascii_case(b"AUTH") && arguments >= 2 {
            authenticate(options.at(position + 1))?;
            position += 3;
        } else if option.eq_ignore_ascii_case(b"SETNAME") && arguments >= 1 {
            name = Some(options.at(position + 1));
            check_name(options.at(position + 1))?;
            position += 2;
        } else {
            let option = String::from_utf8_lossy(option);
            return Err(Refusal::new(format!("ERR Syntax error in HELLO option '{option}'")));
        }
    }
    Ok(name)
}

fn write_hello(session: &Session, cluster: &ClusterView, out: &mut Vec<u8>) {
    let mode = if cluster.enabled { "cluster" } else { "standalone" };
    let role = match cluster.role(cluster.me) {
        Role::Master => "master",
        Role::ReplicaOf(_) => "replica",
    };
    write::map(out, 7, session.version);
    // Clients choose by these what they may send, so they name the server that is understood.
    for (name, value) in [("server", "redis"), ("version", REDIS_VERSION)] {
        write::bulk(out, name.as_bytes());
        write::bulk(out, value.as_bytes());
    }
    write::bulk(out, b"proto");
    write::integer(out, session.version_number());
    write::bulk(out, b"id");
    write::integer(out, session.id.cast_signed());
    for (name, value) in [("mode", mode), ("role", role)] {
        write::bulk(out, name.as_bytes());
        write::bulk(out, value.as_bytes());
    }
    write::bulk(out, b"modules");
    write::array(out, 0);
}

pub(super) fn client_id<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    write::integer(request.out, request.session.id.cast_signed());
    Ok(Plan::Done)
}

pub(super) fn client_info<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let line = request.session.line(request.node.now_ms(), (0, 0));
    write::verbatim(request.out, *b"txt", line.as_bytes(), request.session.version);
    Ok(Plan::Done)
}

pub(super) fn client_getname<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    match request.session.name.as_slice() {
        b"" => write::null(request.out, request.session.version),
        name => write::bulk(request.out, name),
    }
    Ok(Plan::Done)
}

pub(super) fn client_setname<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let name = request.args.at(2);
    check_name(name)?;
    request.session.name = name.to_vec();
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

fn check_name(name: &[u8]) -> Result<(), Refusal> {
    if !is_plain(name) {
        return Err(Refusal::new(
            "ERR Client names cannot contain spaces, newlines or special characters.",
        ));
    }
    check_name_length(name)
}

pub(super) fn client_setinfo<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let (attribute, value) = (request.args.at(2), request.args.at(3));
    let place = if attribute.eq_ignore_ascii_case(b"LIB-NAME") {
        &mut request.session.library_name
    } else if attribute.eq_ignore_ascii_case(b"LIB-VER") {
        &mut request.session.library_version
    } else {
        let attribute = String::from_utf8_lossy(attribute);
        return Err(Refusal::new(format!("ERR Unrecognized option '{attribute}'")));
    };
    if !is_plain(value) {
        let attribute = String::from_utf8_lossy(attribute);
        return Err(Refusal::new(format!(
            "ERR {attribute} cannot contain spaces, newlines or special characters."
        )));
    }
    check_name_length(value)?;
    *place = value.to_vec();
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

/// Whether a name breaks no line of `CLIENT LIST`.
fn is_plain(name: &[u8]) -> bool {
    name.iter().all(|byte| (b'!'..=b'~').contains(byte))
}

fn check_name_length(name: &[u8]) -> Result<(), Refusal> {
    if name.len() > MAX_NAME_BYTES {
        return Err(Refusal::new(format!(
            "ERR name of {} bytes is over the limit of {MAX_NAME_BYTES}",
            name.len()
        )));
    }
    Ok(())
}

pub(super) fn client_list<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let args = request.args;
    let is = |position: usize, name: &[u8]| args.at(position).eq_ignore_ascii_case(name);
    if args.len() == 4 && is(2, b"TYPE") {
        return match client_type(args.at(3))? {
            true => Ok(Plan::Node(NodeCommand::ClientList { ids: None })),
            false => {
                write::verbatim(request.out, *b"txt", b"", request.session.version);
                Ok(Plan::Done)
            }
        };
    }
    if args.len() > 3 && is(2, b"ID") {
        let ids = args.from(3).iter().map(parse_client_id);
        let ids: Option<Vec<u64>> = ids.collect();
        let ids = ids.ok_or_else(|| Refusal::new("ERR Invalid client ID"))?;
        return Ok(Plan::Node(NodeCommand::ClientList { ids: Some(ids) }));
    }
    match args.len() {
        2 => Ok(Plan::Node(NodeCommand::ClientList { ids: None })),
        _ => Err(Refusal::SYNTAX),
    }
}

fn parse_client_id(text: &[u8]) -> Option<u64> {
    parse_integer(text).and_then(|id| u64::try_from(id).ok()).filter(|id| *id > 0)
}

/// Whether connections of this type are those that there are.
fn client_type(name: &[u8]) -> Result<bool, Refusal> {
    let is = |other: &&str| name.eq_ignore_ascii_case(other.as_bytes());
    if is(&"normal") {
        return Ok(true);
    }
    if ["master", "replica", "slave", "pubsub"].iter().any(is) {
        return Ok(false);
    }
    let name = String::from_utf8_lossy(name);
    Err(Refusal::new(format!("ERR Unknown client type '{name}'")))
}

pub(super) fn client_kill<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    if request.args.len() == 3 {
        let filter = ClientFilter { peer: Some(request.args.at(2)), ..ClientFilter::default() };
        return Ok(Plan::Node(NodeCommand::ClientKill { filter, reply_ok: true }));
    }
    let mut filter = ClientFilter { skip_me: true, ..ClientFilter::default() };
    let mut possible = true;
    let mut options = request.args.from(2).iter();
    while let Some(option) = options.next() {
        let value = options.next().ok_or(Refusal::SYNTAX)?;
        let is = |name: &[u8]| option.eq_ignore_ascii_case(name);
        if is(b"ID") {
            let id = parse_client_id(value);
            filter.id =
                Some(id.ok_or_else(|| Refusal::new("ERR client-id should be greater than 0"))?);
        } else if is(b"TYPE") {
            possible &= client_type(value)?;
        } else if is(b"ADDR") {
            filter.peer = Some(value);
        } else if is(b"LADDR") {
            filter.local = Some(value);
        } else if is(b"USER") {
            if value != b"default" {
                let user = String::from_utf8_lossy(value);
                return Err(Refusal::new(format!("ERR No such user '{user}'")));
            }
        } else if is(b"SKIPME") && value.eq_ignore_ascii_case(b"yes") {
            filter.skip_me = true;
        } else if is(b"SKIPME") && value.eq_ignore_ascii_case(b"no") {
            filter.skip_me = false;
        } else {
            return Err(Refusal::SYNTAX);
        }
    }
    if !possible {
        write::integer(request.out, 0);
        return Ok(Plan::Done);
    }
    Ok(Plan::Node(NodeCommand::ClientKill { filter, reply_ok: false }))
}
