//! CLUSTER, READONLY, READWRITE, ASKING, ROLE and WAIT: what clients of Redis Cluster ask a node.
//!
//! They can look and not touch: replicas and leaders are moved with `flux admin`.

use std::fmt::Write;
use std::ops::RangeInclusive;

use flux_core::Slot;
use flux_core::slot::SLOTS;
use flux_proto::resp::{Version, write};

use super::request::{Outcome, Refusal, Request};
use super::topology::{ClusterNode, ClusterView, Role, SlotCounts, SlotRange};
use super::{NodeCommand, Plan, command};

/// The view, which a node alone has none of.
fn view(request: &Request<'_, '_>) -> Result<ClusterView, Refusal> {
    let view = (request.node.cluster)();
    if view.enabled {
        Ok(view)
    } else {
        Err(Refusal::new("ERR This instance has cluster support disabled"))
    }
}

pub(super) fn help<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    command::help(request)
}

pub(super) fn info<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = view(request)?;
    let SlotCounts { served, electing, lost } = view.slot_counts();
    let masters = view.slots_by_master().iter().filter(|slots| !slots.is_empty()).count();
    let lines = [
        ("cluster_slots_assigned", u64::from(served + electing + lost)),
        ("cluster_slots_ok", served.into()),
        ("cluster_slots_pfail", electing.into()),
        ("cluster_slots_fail", lost.into()),
        ("cluster_known_nodes", view.nodes.len() as u64),
        ("cluster_size", masters as u64),
        ("cluster_current_epoch", view.epoch),
        ("cluster_my_epoch", view.epoch),
        // Nodes do not speak the protocol of Redis with each other.
        ("cluster_stats_messages_sent", 0),
        ("cluster_stats_messages_received", 0),
        ("total_cluster_links_buffer_limit_exceeded", 0),
    ];
    let all_served = lost == 0 && served + electing > 0;
    let mut text = format!("cluster_state:{}\r\n", if all_served { "ok" } else { "fail" });
    for (name, value) in lines {
        write!(text, "{name}:{value}\r\n").expect("writing to a string cannot fail");
    }
    write::verbatim(request.out, *b"txt", text.as_bytes(), request.session.version);
    Ok(Plan::Done)
}

pub(super) fn myid<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = view(request)?;
    write::bulk(request.out, view.nodes.get(view.me).map_or(b"", |node| node.id.as_bytes()));
    Ok(Plan::Done)
}

pub(super) fn nodes<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = view(request)?;
    let mut text = String::new();
    for (node, slots) in view.slots_by_master().iter().enumerate() {
        node_line(&view, node, slots, request.node.now_ms(), &mut text)
            .expect("writing to a string cannot fail");
    }
    write::verbatim(request.out, *b"txt", text.as_bytes(), request.session.version);
    Ok(Plan::Done)
}

/// A line of CLUSTER NODES: id, address, flags, master, ping sent, pong received, epoch, link, slots.
fn node_line(
    view: &ClusterView,
    node: usize,
    slots: &[RangeInclusive<u16>],
    now_ms: u64,
    text: &mut String,
) -> std::fmt::Result {
    let ClusterNode { id, host, port, peer_port, alive, .. } = &view.nodes[node];
    let myself = if node == view.me { "myself," } else { "" };
    let failed = if *alive { "" } else { ",fail" };
    let (role, master) = match view.role(node) {
        Role::Master => ("master", "-"),
        Role::ReplicaOf(master) => ("slave", view.nodes[master].id.as_str()),
    };
    let (heard_at_ms, link) = if *alive { (now_ms, "connected") } else { (0, "disconnected") };
    let epoch = view.epoch;
    write!(
        text,
        "{id} {host}:{port}@{peer_port} {myself}{role}{failed} {master} 0 {heard_at_ms} {epoch} {link}"
    )?;
    for range in slots {
        let (first, last) = (range.start(), range.end());
        if first == last {
            write!(text, " {first}")?;
        } else {
            write!(text, " {first}-{last}")?;
        }
    }
    text.push('\n');
    Ok(())
}

pub(super) fn slots<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = view(request)?;
    let ranges = view.ranges();
    // Clients, redis-py among them, take a node for what it was when it was named first. One that leads
    // a range further down is therefore left out until then.
    let mut nameable: Vec<bool> =
        (0..view.nodes.len()).map(|node| view.role(node) != Role::Master).collect();
    let (out, version) = (&mut *request.out, request.session.version);
    write::array(out, ranges.len());
    for SlotRange { slots, master, replicas } in &ranges {
        nameable[*master] = true;
        let named = || {
            let named = replicas.iter().filter(|node| nameable[**node]);
            named.filter_map(|node| view.nodes.get(*node)).filter(|node| node.alive)
        };
        write::array(out, 3 + named().count());
        write_slots(slots, out);
        for node in [&view.nodes[*master]].into_iter().chain(named()) {
            write::array(out, 4);
            write::bulk(out, node.host.as_bytes());
            write::integer(out, node.port.into());
            write::bulk(out, node.id.as_bytes());
            // Other ways to reach it, which there are none of.
            write::map(out, 0, version);
        }
    }
    Ok(Plan::Done)
}

fn write_slots(slots: &RangeInclusive<u16>, out: &mut Vec<u8>) {
    write::integer(out, i64::from(*slots.start()));
    write::integer(out, i64::from(*slots.end()));
}

pub(super) fn shards<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = view(request)?;
    let mut shards: Vec<(Vec<RangeInclusive<u16>>, usize, Vec<usize>)> = Vec::new();
    for SlotRange { slots, master, replicas } in view.ranges() {
        match shards.iter_mut().find(|(_, at, others)| *at == master && *others == replicas) {
            Some((ranges, ..)) => ranges.push(slots),
            None => shards.push((vec![slots], master, replicas)),
        }
    }
    for node in 0..view.nodes.len() {
        let leads = shards.iter().any(|(_, master, _)| *master == node);
        if !leads && view.role(node) == Role::Master {
            shards.push((Vec::new(), node, Vec::new()));
        }
    }
    let (out, version) = (&mut *request.out, request.session.version);
    write::array(out, shards.len());
    for (ranges, master, replicas) in &shards {
        write::map(out, 2, version);
        write::bulk(out, b"slots");
        write::array(out, ranges.len() * 2);
        for slots in ranges {
            write_slots(slots, out);
        }
        write::bulk(out, b"nodes");
        write::array(out, 1 + replicas.len());
        write_shard_node(&view.nodes[*master], "master", out, version);
        for replica in replicas {
            write_shard_node(&view.nodes[*replica], "replica", out, version);
        }
    }
    Ok(Plan::Done)
}

fn write_shard_node(node: &ClusterNode, role: &str, out: &mut Vec<u8>, version: Version) {
    let text = |out: &mut Vec<u8>, name: &str, value: &str| {
        write::bulk(out, name.as_bytes());
        write::bulk(out, value.as_bytes());
    };
    let number = |out: &mut Vec<u8>, name: &str, value: i64| {
        write::bulk(out, name.as_bytes());
        write::integer(out, value);
    };
    write::map(out, 7, version);
    text(out, "id", &node.id);
    number(out, "port", node.port.into());
    text(out, "ip", &node.host);
    text(out, "endpoint", &node.host);
    text(out, "role", role);
    // Each partition has a history of its own, so a node has no offset.
    number(out, "replication-offset", 0);
    text(out, "health", if node.alive { "online" } else { "fail" });
}

pub(super) fn keyslot<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    write::integer(request.out, Slot::of(request.args.at(2)).0.into());
    Ok(Plan::Done)
}

pub(super) fn countkeysinslot<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    let slot = u16::try_from(request.integer(2)?).ok().filter(|slot| *slot < SLOTS);
    let slot = slot.ok_or_else(|| Refusal::new("ERR Invalid slot"))?;
    Ok(Plan::Node(NodeCommand::KeysInSlot { slot: Slot(slot), list: None }))
}

pub(super) fn getkeysinslot<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    let (slot, count) = (request.integer(2)?, request.integer(3)?);
    let slot = u16::try_from(slot).ok().filter(|slot| *slot < SLOTS);
    let (Some(slot), Ok(limit)) = (slot, usize::try_from(count)) else {
        return Err(Refusal::new("ERR Invalid slot or number of keys"));
    };
    Ok(Plan::Node(NodeCommand::KeysInSlot { slot: Slot(slot), list: Some(limit) }))
}

/// The subcommands that change a cluster of Redis.
pub(super) fn administer<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    let name = request.spec.name.to_uppercase().replace('|', " ");
    Err(Refusal::new(format!(
        "ERR {name} is not supported: nodes, replicas and leaders are managed with `flux admin`"
    )))
}

pub(super) fn readonly<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    set_readonly(request, true)
}

pub(super) fn readwrite<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    set_readonly(request, false)
}

fn set_readonly<'a>(request: &mut Request<'a, '_>, readonly: bool) -> Outcome<'a> {
    view(request)?;
    request.session.readonly = readonly;
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

/// Slots do not move key by key here, so there is nothing that may be asked for early.
pub(super) fn asking<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    view(request)?;
    write::simple(request.out, "OK");
    Ok(Plan::Done)
}

pub(super) fn role<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    let view = (request.node.cluster)();
    let out = &mut *request.out;
    // Offsets are 0: each partition has a history of its own.
    if let Role::ReplicaOf(master) = view.role(view.me) {
        let ClusterNode { host, port, alive, .. } = &view.nodes[master];
        write::array(out, 5);
        write::bulk(out, b"slave");
        write::bulk(out, host.as_bytes());
        write::integer(out, i64::from(*port));
        write::bulk(out, if *alive { b"connected" } else { b"connect" });
        write::integer(out, 0);
        return Ok(Plan::Done);
    }
    let replicas = view.my_replicas();
    write::array(out, 3);
    write::bulk(out, b"master");
    write::integer(out, 0);
    write::array(out, replicas.len());
    for replica in replicas {
        write::array(out, 3);
        write::bulk(out, replica.host.as_bytes());
        write::bulk_integer(out, replica.port.into());
        write::bulk_integer(out, 0);
    }
    Ok(Plan::Done)
}

/// A write is acknowledged when a majority of its replicas has it, and replies are in order: whatever the
/// connection has been answered is on so many replicas already, and how many more have it is not known.
pub(super) fn wait<'a>(request: &mut Request<'a, '_>) -> Outcome<'a> {
    request.integer(1)?;
    let timeout = request.integer(2);
    let timeout =
        timeout.map_err(|_| Refusal::new("ERR timeout is not an integer or out of range"))?;
    if timeout < 0 {
        return Err(Refusal::new("ERR timeout is negative"));
    }
    let replicas = (request.node.cluster)().acknowledging_replicas();
    write::integer(request.out, replicas as i64);
    Ok(Plan::Done)
}
