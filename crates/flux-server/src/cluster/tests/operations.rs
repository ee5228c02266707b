//! What an operator sees and does, through any node.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::world::{World, local, names};

async fn done(world: &World, path: &str, body: Value) -> String {
    let answer = world.ask(2, path, Some(body)).await.expect("done");
    answer["message"].as_str().expect("words").to_owned()
}

async fn refused(world: &World, path: &str, body: Value) -> String {
    world.ask(2, path, Some(body)).await.expect_err("it was done")
}

#[tokio::test(start_paused = true)]
async fn a_drained_node_is_emptied_and_may_come_back() {
    let world = World::with_nodes(4).await;
    let said = done(&world, "/cluster/drain", json!({"node": "00000003"})).await;
    assert!(said.starts_with("node-00000003 is being emptied"), "{said}");
    world.settle().await;
    assert_eq!(world.placed(), [(1, 16), (2, 16), (4, 16)].into());
    assert!(!world.leads().contains_key(&3));
    let nodes = world.ask(1, "/cluster/nodes", None).await.expect("nodes");
    let drained = &nodes[2];
    assert_eq!((&drained["draining"], &drained["replicas"]), (&json!(true), &json!(0)));

    done(&world, "/cluster/undrain", json!({"node": "node-00000003"})).await;
    world.settle().await;
    assert_eq!(world.placed()[&3], 12);
    let again = refused(&world, "/cluster/undrain", json!({"node": "00000003"})).await;
    assert_eq!(again, "node-00000003 is not being drained");
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_replicas_have_nowhere_to_go_is_not_drained() {
    let world = World::with_nodes(3).await;
    let said = refused(&world, "/cluster/drain", json!({"node": "00000003"})).await;
    let expected = "node-00000003 cannot be emptied: its replicas need 3 other nodes that are alive and not \
                    draining (replication_factor), and there would be 2. Start 1 more node first";
    assert!(said.starts_with(expected), "{said}");
    assert!(world.map().draining.is_empty());

    let mut world = World::with_nodes(4).await;
    done(&world, "/cluster/drain", json!({"node": "00000003"})).await;
    done(&world, "/cluster/drain", json!({"node": "00000003"})).await;
    let said = refused(&world, "/cluster/drain", json!({"node": "00000004"})).await;
    assert!(said.contains("there would be 2"), "{said}");
    done(&world, "/cluster/undrain", json!({"node": "00000003"})).await;
    world.kill(4);
    world.settle().await;
    let said = refused(&world, "/cluster/drain", json!({"node": "00000003"})).await;
    assert!(said.contains("there would be 2"), "one that is away takes nothing: {said}");
}

#[tokio::test(start_paused = true)]
async fn a_replica_moves_where_an_operator_wants_it() {
    let world = World::with_nodes(4).await;
    let map = world.map();
    let on: Vec<u32> = map.targets[5].iter().map(|id| id.node().0).collect();
    let (from, to) = (on[1], (1..=4).find(|node| !on.contains(node)).expect("a node without"));
    let order = |partition: u16, from: u32, to: u32| json!({"partition": partition, "from": format!("{from:08x}"), "to": format!("{to:08x}")});
    let said = done(&world, "/cluster/move", order(5, from, to)).await;
    assert!(said.starts_with("partition 5 moves from"), "{said}");
    tokio::time::sleep(Duration::from_millis(1)).await;
    let placed: Vec<u32> = world.map().targets[5].iter().map(|id| id.node().0).collect();
    assert_eq!(placed, [on[0], to, on[2]]);
    let again = refused(&world, "/cluster/move", order(5, on[0], to)).await;
    assert_eq!(again, format!("partition 5 has a replica on node-{to:08x}"));
    let same = refused(&world, "/cluster/move", order(5, to, to)).await;
    assert!(same.starts_with(&format!("FROM and TO are both node-{to:08x}: give")), "{same}");
    let none = refused(&world, "/cluster/move", order(99, from, to)).await;
    assert_eq!(none, "there is no partition 99: they are 0 to 15");
    world.settle().await;
    assert_eq!(world.placed(), [(1, 12), (2, 12), (3, 12), (4, 12)].into(), "still in balance");
}

#[tokio::test(start_paused = true)]
async fn a_replica_moves_only_where_its_partition_is_at_rest() {
    let world = World::with_nodes(4).await;
    let target = world.map().targets[5].clone();
    let on: Vec<u32> = target.iter().map(|id| id.node().0).collect();
    let to = (1..=4).find(|node| !on.contains(node)).expect("a node without");
    let order = |from: u32, to: u32| json!({"partition": 5, "from": format!("{from:08x}"), "to": format!("{to:08x}")});
    world.hall.still.store(true, Ordering::Relaxed);
    done(&world, "/cluster/move", order(on[1], to)).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let moving = world.map();
    // Back to where the old replica still votes: a new one would take its place there.
    let back = refused(&world, "/cluster/move", order(to, on[1])).await;
    assert!(back.starts_with("partition 5 is still on its way to where it is to be"), "{back}");
    assert_eq!(world.map().targets[5], moving.targets[5]);
    world.hall.still.store(false, Ordering::Relaxed);
    world.ask(1, "/cluster/partitions", None).await.expect("it follows the map now");
    done(&world, "/cluster/move", order(to, on[1])).await;
}

#[tokio::test(start_paused = true)]
async fn a_partition_is_handed_over_by_whoever_leads_it() {
    let world = World::with_nodes(3).await;
    for partition in 0..3 {
        let partitions = world.ask(3, "/cluster/partitions?all", None).await.expect("all");
        let leader = partitions[partition]["leader"].as_str().expect("a leader").to_owned();
        let to = ["node-00000001", "node-00000002"].into_iter().find(|node| **node != leader);
        let to = to.expect("another node");
        let order = json!({"partition": partition, "to": to});
        let said = done(&world, "/cluster/transfer", order.clone()).await;
        assert_eq!(said, format!("partition {partition} is handed to {to}"));
        let again = done(&world, "/cluster/transfer", order).await;
        assert_eq!(again, format!("{to} leads partition {partition} already"));
    }
    let nobody = refused(&world, "/cluster/transfer", json!({"partition": 0, "to": "x"})).await;
    assert!(nobody.starts_with("there is no node \"x\"; the nodes are node-00000001,"), "{nobody}");
    let several = refused(&world, "/cluster/transfer", json!({"partition": 0, "to": "node"})).await;
    assert_eq!(several, "\"node\" stands for more than one node");
    let none = refused(&world, "/cluster/transfer", json!({"partition": 16, "to": "01"})).await;
    assert_eq!(none, "there is no partition 16: they are 0 to 15");
}

#[tokio::test(start_paused = true)]
async fn any_node_tells_how_the_cluster_is() {
    let mut world = World::with_nodes(3).await;
    let status = world.ask(2, "/cluster/status", None).await.expect("a status");
    let expected = json!({
        "cluster_name": "flux", "cluster_id": format!("{:016x}", world.cluster_id()),
        "node": "node-00000002", "epoch": 1, "controller": "node-00000001",
        "registry_away_s": null, "trouble": null, "replication_factor": 3,
        "nodes_alive": 3, "nodes_away": 0, "nodes_draining": 0, "partitions": 16,
        "partitions_led": 16, "partitions_under_replicated": 0, "partitions_moving": 0, "keys": 48,
    });
    assert_eq!(status, expected);
    let nodes = world.ask(1, "/cluster/nodes", None).await.expect("nodes");
    assert_eq!(names(&nodes).len(), 3);
    let own = local(world.ask(3, "/cluster/partitions", None).await.expect("its own"));
    assert_eq!((own.node.0, own.epoch, own.partitions.len()), (3, 1, 16));
    assert!(done(&world, "/cluster/rebalance", json!({})).await.starts_with("node-00000001 looks"));

    world.kill(3);
    world.settle().await;
    let status = world.ask(2, "/cluster/status", None).await.expect("a status");
    assert_eq!(status["partitions_under_replicated"], json!(16));
    assert_eq!((&status["nodes_alive"], &status["nodes_away"]), (&json!(2), &json!(1)));
    assert_eq!(status["keys"], json!(48));
    let nodes = world.ask(2, "/cluster/nodes", None).await.expect("nodes");
    let lost = &nodes[2];
    for unknown in ["replicas", "leads", "keys", "bytes"] {
        assert_eq!(lost[unknown], Value::Null, "{unknown}");
    }
    assert_eq!((&lost["placed"], &nodes[0]["replicas"]), (&json!(16), &json!(16)));
    world.kill(1);
    world.settle().await;
    let partitions = world.ask(2, "/cluster/partitions?all", None).await.expect("all");
    assert_eq!(partitions[0]["state"], json!("no-leader"));
    assert_eq!(partitions[0]["keys"], Value::Null);
    let status = world.ask(2, "/cluster/status", None).await.expect("a status");
    assert_eq!(status["keys"], Value::Null, "nobody can count them");
}
