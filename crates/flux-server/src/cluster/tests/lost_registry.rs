//! The registry is away, loses its data, or has other data than the cluster.

use std::sync::Arc;
use std::time::Duration;

use flux_core::placement::NodeId;

use super::world::World;
use crate::cluster::{ClusterError, InProcess, Member, Placement, RegistryError, Topology};

async fn seconds(count: u64) {
    tokio::time::sleep(Duration::from_secs(count)).await;
}

async fn trouble(world: &World, node: u32) -> String {
    let status = world.ask(node, "/cluster/status", None).await.expect("a status");
    status["trouble"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn while_it_is_away_nothing_changes_and_nobody_is_missed() {
    let mut world = World::with_nodes(4).await;
    let before = world.topology(1);
    world.registry.set_away(true);
    seconds(3600).await;
    let during = world.topology(1);
    assert_eq!((&during.map, &during.members), (&before.map, &before.members));
    assert!(during.registry_away_since.is_some());
    assert!(trouble(&world, 1).await.contains("has not answered for 36"));
    let refused = world.ask(1, "/cluster/drain", Some(serde_json::json!({"node": "3"}))).await;
    assert!(refused.is_err(), "{refused:?}");
    for path in ["/cluster/republish", "/cluster/rebalance"] {
        let refused = world.ask(1, path, Some(serde_json::json!({}))).await.expect_err("refused");
        assert!(refused.starts_with("the registry has not answered for 36"), "{path}: {refused}");
    }

    // A node that dies meanwhile is missed from when the registry is back.
    world.kill(4);
    seconds(3600).await;
    world.registry.set_away(false);
    seconds(590).await;
    assert_eq!(world.placed()[&4], 12);
    seconds(60).await;
    assert_eq!(world.placed().get(&4), None);
}

#[tokio::test(start_paused = true)]
async fn absence_is_counted_anew_when_it_was_away() {
    let mut world = World::with_nodes(4).await;
    world.kill(4);
    seconds(500).await;
    world.registry.set_away(true);
    seconds(500).await;
    world.registry.set_away(false);
    seconds(500).await;
    assert_eq!(world.placed()[&4], 12, "it has had no chance to come back");
    seconds(150).await;
    assert_eq!(world.placed().get(&4), None);
}

#[tokio::test(start_paused = true)]
async fn a_node_starts_without_it_from_what_it_knew() {
    let mut world = World::with_nodes(3).await;
    let (before, cluster) = (world.topology(2), world.cluster_id());
    world.registry.set_away(true);
    world.kill(2);
    let begun = tokio::time::Instant::now();
    world.restart(2, cluster).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "its groups may need it");
    let after = world.topology(2);
    assert_eq!((&after.map, after.epoch), (&before.map, before.epoch));
    assert_eq!(after.members.len(), 3);
    assert!(after.members.values().all(|member| member.alive));
    let addresses = |of: &Topology| of.members.values().map(Member::peer_addr).collect::<Vec<_>>();
    assert_eq!(addresses(&after), addresses(&before));
}

#[tokio::test(start_paused = true)]
async fn when_its_data_is_lost_nothing_is_created_and_the_map_can_be_put_back() {
    let mut world = World::with_nodes(3).await;
    let (before, cluster) = (world.topology(1), world.cluster_id());
    world.registry.wipe();
    world.start(4).await;
    seconds(3600).await;
    assert_eq!(world.topology(1).map, before.map);
    assert_eq!(world.topology(4).map, None);
    assert!(trouble(&world, 2).await.contains("the file registry.json is lost"));

    let again = Some(serde_json::json!({}));
    let refused = world.ask(4, "/cluster/republish", again.clone()).await;
    assert_eq!(refused.unwrap_err(), "this node knows no placement map");
    world.ask(2, "/cluster/republish", again.clone()).await.expect("put back");
    world.settle().await;
    assert_eq!(world.cluster_id(), cluster);
    assert!(world.topology(1).epoch > before.epoch);
    assert_eq!(world.placed()[&4], 12, "the cluster changes again");
    assert_eq!(trouble(&world, 2).await, "");
    let refused = world.ask(2, "/cluster/republish", again).await;
    assert_eq!(refused.unwrap_err(), "the registry misses no placement map");
}

#[tokio::test(start_paused = true)]
async fn an_old_backup_of_it_is_not_followed() {
    let mut world = World::with_nodes(3).await;
    let old = world.topology(1).placement().expect("a map");
    world.start(4).await;
    world.settle().await;
    let new = world.topology(1);
    assert!(new.epoch > old.epoch);
    world.registry.restore(old);
    seconds(600).await;
    assert_eq!((&world.topology(1).map, world.topology(1).epoch), (&new.map, new.epoch));
    assert!(trouble(&world, 1).await.contains("is older"));
    world.ask(3, "/cluster/republish", Some(serde_json::json!({}))).await.expect("put back");
    world.settle().await;
    assert_eq!(world.topology(1).map, new.map);
    assert!(world.topology(1).epoch > new.epoch);
    assert_eq!(trouble(&world, 1).await, "");
}

#[tokio::test(start_paused = true)]
async fn another_cluster_is_not_joined() {
    let mut world = World::with_nodes(3).await;
    let cluster = world.cluster_id();
    let mut setup = world.setup(4);
    setup.registration.cluster_id = Some(cluster ^ 1);
    let refused = world.start_as(setup).await;
    let Err(ClusterError::OtherCluster { own, other, .. }) = refused else {
        panic!("it joined: {refused:?}");
    };
    assert_eq!((own, other), (cluster ^ 1, cluster));
    seconds(1).await;
    assert!(!world.topology(1).members.contains_key(&NodeId(4)));

    // One that shows up later is told and not followed.
    let before = world.topology(1);
    let mut map = (*world.map()).clone();
    map.cluster_id ^= 2;
    world.registry.restore(Placement { epoch: 99, map: Arc::new(map) });
    seconds(60).await;
    assert_eq!((&world.topology(1).map, world.topology(1).epoch), (&before.map, before.epoch));
    assert!(trouble(&world, 1).await.contains("this node belongs to"));
}

#[tokio::test(start_paused = true)]
async fn the_registry_of_one_process_is_there_after_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("registry.json");
    let mut world = World::new();
    world.registry = InProcess::open(Some(file.clone())).expect("nothing to read");
    for node in 1..=3 {
        world.start(node).await;
    }
    world.settle().await;
    let (map, cluster) = (world.map(), world.cluster_id());
    for node in 1..=3 {
        world.kill(node);
    }
    world.registry = InProcess::open(Some(file.clone())).expect("read back");
    for node in 1..=3 {
        world.restart(node, cluster).await;
    }
    world.settle().await;
    assert_eq!(world.map(), map);

    std::fs::write(&file, "{\"epoch\":1}").expect("written");
    let damaged = InProcess::open(Some(file));
    assert!(matches!(damaged, Err(RegistryError::Unreadable(_))), "{damaged:?}");
}
