//! What clients of Redis Cluster see: `cluster.txt`, where a `#` line starts a new connection and `@` is
//! followed by the node that is asked, and views that no real cluster comes to at will.

use flux_core::Slot;

use super::*;

/// Four partitions on three nodes that lead some, and on one that only follows.
///
/// Slots of `foo`, `a`, `{k}`: 12182, 15495, 7629; of `b`: 3300.
fn view(me: usize) -> ClusterView {
    let node = |number: u32| ClusterNode {
        id: ClusterNode::id(number),
        host: "10.0.0.1".into(),
        port: 7000 + number as u16,
        peer_port: 17000 + number as u16,
        alive: true,
        zone: String::new(),
    };
    let partition = |leader: usize, replicas: &[usize]| ClusterPartition {
        leader: Some(leader),
        replicas: replicas.into(),
    };
    ClusterView {
        enabled: true,
        epoch: 9,
        me,
        nodes: (0..4).map(node).collect(),
        partitions: vec![
            partition(0, &[0, 1, 2]),
            partition(0, &[0, 1, 2]),
            partition(1, &[1, 2, 3]),
            partition(2, &[2, 0, 3]),
        ],
    }
}

fn answer_in(view: &ClusterView, line: &str, session: &mut Session) -> String {
    let mut out = Vec::new();
    let plan = parsed(line, |args| {
        planned_in(view, args, session, &mut out, |plan| match plan {
            Plan::Done => String::new(),
            other => format!("{other:?}"),
        })
    });
    let out = out.escape_ascii().to_string().replace("\\'", "'").replace("\\\"", "\"");
    if plan.is_empty() { out } else { plan }
}

#[test]
fn a_node_of_a_cluster_answers_as_redis_does() {
    let (mut session, mut me) = (session(), 0);
    let mut wrong = Vec::new();
    for line in include_str!("cluster.txt").lines() {
        if line.starts_with('#') {
            session = self::session();
        } else if let Some(node) = line.strip_prefix('@') {
            me = node.parse().expect("a node");
        } else if let Some((line, expected)) = line.split_once(" => ") {
            let answer = answer_in(&view(me), line, &mut session);
            // A plan is told by its beginning.
            let matches = expected
                .strip_suffix('…')
                .map_or(answer == expected, |start| answer.starts_with(start));
            if !matches {
                wrong.push(format!("@{me} {line}\n  expected {expected}\n  answered {answer}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn lines(view: &ClusterView, command: &str) -> Vec<String> {
    let answer = answer_in(view, command, &mut session());
    answer.replace("\\r\\n", "\\n").split("\\n").map(str::to_owned).collect()
}

/// What `CLUSTER SLOTS` tells: each range with the ports of its nodes.
fn slots(view: &ClusterView) -> Vec<(i64, i64, Vec<i64>)> {
    let mut out = Vec::new();
    parsed("cluster slots", |args| {
        planned_in(view, args, &mut session(), &mut out, |plan| {
            assert!(matches!(plan, Plan::Done));
        });
    });
    let (reply, _) = flux_proto::resp::parse_reply(&out).expect("well formed").expect("whole");
    let flux_proto::resp::Reply::Array(ranges) = reply else { panic!("not an array: {reply:?}") };
    let integer = |reply: &flux_proto::resp::Reply| match reply {
        flux_proto::resp::Reply::Integer(number) => *number,
        other => panic!("not an integer: {other:?}"),
    };
    let range = |range: &flux_proto::resp::Reply| {
        let flux_proto::resp::Reply::Array(parts) = range else { panic!("not a range: {range:?}") };
        let port = |node: &flux_proto::resp::Reply| match node {
            flux_proto::resp::Reply::Array(node) => integer(&node[1]),
            other => panic!("not a node: {other:?}"),
        };
        (integer(&parts[0]), integer(&parts[1]), parts[2..].iter().map(port).collect())
    };
    ranges.iter().map(range).collect()
}

#[test]
fn a_node_is_named_as_a_replica_only_after_it_was_named_as_a_master() {
    let expected = [
        // Two partitions with the same nodes are one range. The others lead ranges further down.
        (0, 8191, vec![7000]),
        // Node 3 leads nothing.
        (8192, 12287, vec![7001, 7003]),
        (12288, 16383, vec![7002, 7000, 7003]),
    ];
    assert_eq!(slots(&view(0)), expected);
    let mut view = view(0);
    view.nodes[3].alive = false;
    assert_eq!(slots(&view)[2], (12288, 16383, vec![7002, 7000]));
}

#[test]
fn a_partition_without_a_leader_is_where_its_first_node_is() {
    let mut view = view(3);
    view.partitions[0].leader = None;
    view.nodes[0].alive = false;
    let ranges = slots(&view);
    assert_eq!((ranges[0].0, ranges[0].1, ranges[0].2[0]), (0, 4095, 7001));
    let info = lines(&view, "cluster info");
    for line in [
        "cluster_state:ok",
        "cluster_slots_assigned:16384",
        "cluster_slots_ok:12288",
        "cluster_slots_pfail:4096",
        "cluster_slots_fail:0",
    ] {
        assert!(info.contains(&line.to_owned()), "{info:?}");
    }
    // A node that holds the partition will hear of the leader; another one sends the client there.
    let slot = Slot(0);
    let elsewhere = Route::Elsewhere { host: "10.0.0.1".into(), port: 7001 };
    assert_eq!(view.route(slot), elsewhere);
    view.me = 2;
    assert_eq!(view.route(slot), Route::Here);

    view.nodes[1].alive = false;
    view.nodes[2].alive = false;
    view.me = 3;
    assert_eq!(view.route(slot), Route::Unserved);
    let refused = answer_in(&view, "get b", &mut session());
    assert_eq!(refused, "-CLUSTERDOWN Hash slot not served\\r\\n");
    let info = lines(&view, "cluster info");
    assert!(info.contains(&"cluster_state:fail".to_owned()), "{info:?}");
    assert!(info.contains(&"cluster_slots_fail:4096".to_owned()), "{info:?}");
    // Its slots are nobody's.
    assert_eq!(slots(&view)[0].0, 4096);
}

#[test]
fn a_dead_node_is_shown_as_failed() {
    let mut view = view(0);
    view.nodes[1].alive = false;
    let id = ClusterNode::id(1);
    let nodes = lines(&view, "cluster nodes");
    let line = format!("{id} 10.0.0.1:7001@17001 master,fail - 0 0 9 disconnected 8192-12287");
    assert!(nodes.contains(&line), "{nodes:?}");
    let shards = answer_in(&view, "cluster shards", &mut session());
    assert_eq!(shards.matches("$4\\r\\nfail").count(), 2, "{shards}");
}

#[test]
fn a_view_that_makes_no_sense_is_no_panic() {
    let mut broken = view(7);
    broken.partitions[0] = ClusterPartition { leader: Some(9), replicas: vec![8, 1] };
    broken.partitions[1] = ClusterPartition::default();
    let mut odd = view(0);
    odd.partitions.pop();
    let empty = ClusterView { enabled: true, ..ClusterView::default() };
    for view in [&broken, &odd, &empty] {
        for command in ["slots", "shards", "nodes", "info", "myid"] {
            let answer = answer_in(view, &format!("cluster {command}"), &mut session());
            assert!(!answer.is_empty() && !answer.starts_with('-'), "{command}: {answer}");
        }
        for command in ["role", "hello", "wait 0 0", "get b", "mget b {b}c"] {
            assert!(!answer_in(view, command, &mut session()).is_empty());
        }
        let node = NodeInfo { cluster: view.clone(), ..NodeInfo::default() };
        let sections: OwnedArgs = ["replication"].iter().collect();
        assert!(info(sections.borrowed(), &node).starts_with("# Replication\r\nrole:"));
    }
}

#[test]
fn wait_counts_the_replicas_that_a_majority_needs() {
    let with = |replicas: usize| {
        let mut view = view(0);
        view.partitions[2].replicas = (0..replicas).collect();
        for number in [0, 1, 3] {
            view.partitions[number].replicas = (0..4).chain(0..1).collect();
        }
        answer_in(&view, "wait 5 1000", &mut session())
    };
    assert_eq!(with(1), ":0\\r\\n");
    assert_eq!(with(2), ":1\\r\\n");
    assert_eq!(with(3), ":1\\r\\n");
    assert_eq!(with(4), ":2\\r\\n");
}

#[test]
fn info_tells_of_the_cluster() {
    let text = |me: usize, section: &str| {
        let sections: OwnedArgs = [section].iter().collect();
        info(sections.borrowed(), &NodeInfo { cluster: view(me), ..NodeInfo::default() })
    };
    assert_eq!(text(0, "cluster"), "# Cluster\r\ncluster_enabled:1\r\n");
    assert!(text(0, "server").contains("\r\nredis_mode:cluster\r\n"));
    let expected = "# Replication\r\nrole:master\r\nconnected_slaves:2\r\n\
                    slave0:ip=10.0.0.1,port=7001,state=online,offset=0,lag=0\r\n\
                    slave1:ip=10.0.0.1,port=7002,state=online,offset=0,lag=0\r\n";
    assert_eq!(text(0, "replication"), expected);
    let expected = "# Replication\r\nrole:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:7001\r\n\
                    master_link_status:up\r\nslave_read_only:0\r\nconnected_slaves:0\r\n";
    assert_eq!(text(3, "replication"), expected);
}

#[test]
fn a_plan_knows_the_slot_of_its_first_key() {
    let slot = |line: &str| {
        let mut out = Vec::new();
        planned(line, &mut session(), &mut out, |plan| plan.slot())
    };
    for line in ["get foo", "set foo bar", "del foo a", "mget foo a", "mset foo 1 a 2", "watch foo"]
    {
        assert_eq!(slot(line), Some(Slot(12182)), "{line}");
    }
    assert_eq!(slot("rename {foo}1 {foo}2"), Some(Slot(12182)));
    for line in ["ping", "dbsize", "flushall", "quit"] {
        assert_eq!(slot(line), None, "{line}");
    }
    let mut session = session();
    for line in ["multi", "set foo bar", "get foo"] {
        answer(line, &mut session);
    }
    let mut out = Vec::new();
    assert_eq!(planned("exec", &mut session, &mut out, |plan| plan.slot()), Some(Slot(12182)));
}
