//! What is shown of a node's answers.

use serde_json::{Value, from_value, json};

use super::*;

fn node(name: &str, more: &Value) -> NodeReport {
    let mut fields = json!({
        "node": name, "alive": true, "away_s": null, "answers": true, "draining": false,
        "controller": false, "zone": "", "version": "1.2", "data_addr": "127.0.0.1:1",
        "peer_addr": "127.0.0.1:2", "grpc_addr": "127.0.0.1:3", "admin_addr": "127.0.0.1:4",
        "replicas": 64, "leads": 21, "placed": 64, "keys": 1000, "bytes": 2048,
    });
    for (field, value) in more.as_object().expect("fields") {
        fields[field] = value.clone();
    }
    from_value(fields).expect("a report")
}

#[test]
fn nodes_are_a_table() {
    let text = nodes(&[
        node("node-00000001", &json!({"controller": true, "zone": "a"})),
        node(
            "node-00000002",
            &json!({
                "alive": false, "away_s": 7, "answers": false, "placed": 28,
                "replicas": null, "leads": null, "keys": null, "bytes": null,
            }),
        ),
        node("node-00000003", &json!({"draining": true})),
    ]);
    let expected = "\
NODE           STATE              ZONE  REPLICAS  PLACED  LEADS  KEYS  SIZE    DATA         ADMIN        VERSION
node-00000001  alive, controller  a     64        64      21     1000  2.0 kB  127.0.0.1:1  127.0.0.1:4  1.2
node-00000002  away 7 s           -     ?         28      ?      ?     ?       127.0.0.1:1  127.0.0.1:4  1.2
node-00000003  alive, draining    -     64        64      21     1000  2.0 kB  127.0.0.1:1  127.0.0.1:4  1.2
";
    assert_eq!(text, expected);
}

#[test]
fn partitions_are_a_table() {
    let report = json!({
        "partition": 3, "state": "moving", "leader": "node-00000001", "term": 4, "commit": 9,
        "revision": 8, "keys": 5, "bytes": 100,
        "replicas": [
            {"node": "node-00000001", "replica": "0000000100000001", "role": "leader", "applied": 9},
            {"node": "node-00000002", "replica": "0000000200000002", "role": "follower", "applied": 9},
        ],
        "target": ["node-00000001", "node-00000003"],
    });
    let nobody = json!({
        "partition": 4, "state": "no-leader", "leader": null, "term": null, "commit": null,
        "revision": null, "keys": null, "bytes": null, "replicas": [], "target": ["node-00000001"],
    });
    let text = partitions(&[report, nobody].map(|one| from_value(one).expect("a report")));
    let expected = "\
PARTITION  STATE      LEADER         TERM  REVISION  KEYS  SIZE   ON                           TO COME
3          moving     node-00000001  4     8         5     100 B  node-00000001 node-00000002  node-00000003
4          no-leader  -              ?     ?         ?     ?                                   node-00000001
";
    assert_eq!(text, expected);
}

#[test]
fn a_status_tells_what_is_wrong() {
    let fields = json!({
        "cluster_name": "flux", "cluster_id": "00000000000000ff", "node": "node-00000001",
        "epoch": 12, "controller": null, "registry_away_s": 40, "trouble": "look",
        "replication_factor": 3, "nodes_alive": 2, "nodes_away": 1, "nodes_draining": 0,
        "partitions": 64, "partitions_led": 63, "partitions_under_replicated": 30,
        "partitions_moving": 0, "keys": null,
    });
    let mut report: ClusterStatus = from_value(fields).expect("a status");
    let text = status(&report);
    let expected = "\
cluster      flux (00000000000000ff), epoch 12
controller   none
nodes        2 alive, 1 away
partitions   64, 3 replicas each, 1 without a leader, 30 under-replicated
keys         ?
registry     away for 40 s
trouble      look
";
    assert_eq!(text, expected);
    report.replication_factor = 1;
    assert!(status(&report).contains("\npartitions   64, 1 replica each, "));
}
