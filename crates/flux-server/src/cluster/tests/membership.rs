//! Nodes come, go, and come back.

use std::collections::BTreeSet;
use std::time::Duration;

use flux_core::placement::NodeId;

use super::world::World;
use crate::cluster::ClusterError;

async fn seconds(count: u64) {
    tokio::time::sleep(Duration::from_secs(count)).await;
}

#[tokio::test(start_paused = true)]
async fn a_cluster_is_created_when_enough_nodes_have_come() {
    let mut world = World::new();
    world.start(1).await;
    world.start(2).await;
    seconds(60).await;
    assert!(world.topology(1).map.is_none(), "two nodes are not enough for three replicas");
    world.start(3).await;
    world.settle().await;

    let map = world.map();
    assert_eq!((map.partitions, map.replication_factor), (16, 3));
    assert_eq!(map.targets, map.bootstrap);
    assert_eq!(world.placed(), [(1, 16), (2, 16), (3, 16)].into());
    let mut leads: Vec<usize> = world.leads().into_values().collect();
    leads.sort_unstable();
    assert_eq!(leads, [5, 5, 6]);
    for node in 1..=3 {
        let topology = world.topology(node);
        assert_eq!((topology.map.as_ref(), topology.epoch), (Some(&map), 1));
        assert_eq!(topology.cluster_id, Some(map.cluster_id));
        assert!(topology.members.values().all(|member| member.alive));
        assert_eq!(topology.members.len(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_gets_its_share() {
    let mut world = World::with_nodes(3).await;
    world.start(4).await;
    world.settle().await;
    assert_eq!(world.placed(), [(1, 12), (2, 12), (3, 12), (4, 12)].into());
    assert_eq!(world.leads(), [(1, 4), (2, 4), (3, 4), (4, 4)].into());
    assert_ne!(world.map().targets, world.map().bootstrap);
    assert_eq!(world.topology(4).cluster_id, Some(world.cluster_id()));
}

#[tokio::test(start_paused = true)]
async fn a_node_away_for_long_is_replaced_and_not_before() {
    let mut world = World::with_nodes(4).await;
    let before = world.map();
    world.kill(3);
    seconds(500).await;
    assert_eq!(world.map().targets.concat().len(), 48);
    let keeps = |node: u32| world.placed().get(&node).copied().unwrap_or(0);
    assert_eq!(keeps(3), 12, "it may come back");
    assert!(!world.leads().contains_key(&3));
    assert!(!world.topology(1).members[&NodeId(3)].alive);
    seconds(200).await;
    assert_eq!(world.placed(), [(1, 16), (2, 16), (4, 16)].into());

    // Replicas that come are new ones; those that stay are as they were.
    let old: BTreeSet<_> = before.targets.iter().flatten().collect();
    let map = world.map();
    let new: Vec<_> = map.targets.iter().flatten().filter(|id| !old.contains(id)).collect();
    assert!(new.iter().all(|id| id.sequence() >= before.next_sequence), "{new:?}");
    assert_eq!(new.len(), 12);

    // It comes back, empty-handed, and gets its share again.
    world.restart(3, map.cluster_id).await;
    world.settle().await;
    assert_eq!(world.placed(), [(1, 12), (2, 12), (3, 12), (4, 12)].into());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_answers_is_not_replaced() {
    let world = World::with_nodes(4).await;
    // Only its registration is gone.
    world.nodes[&3].control.handle().0.registry.close().await;
    seconds(2000).await;
    assert!(!world.topology(1).members[&NodeId(3)].alive);
    assert_eq!(world.placed()[&3], 12);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_lost_its_data_is_replaced_at_once_by_what_it_is_now() {
    let mut world = World::with_nodes(3).await;
    let cluster = world.cluster_id();
    world.kill(3);
    let mut setup = world.setup(9);
    setup.registration.cluster_id = Some(cluster);
    setup.registration.replaces = Some(NodeId(3));
    world.start_as(setup).await.expect("started");
    world.settle().await;
    assert_eq!(world.placed(), [(1, 16), (2, 16), (9, 16)].into());
}

#[tokio::test(start_paused = true)]
async fn when_the_controller_dies_another_goes_on() {
    let mut world = World::new();
    world.settings.move_concurrency = 1;
    for node in 1..=5 {
        world.start(node).await;
    }
    world.settle().await;
    assert_eq!(world.topology(5).controller, Some(NodeId(1)));
    world.start(6).await;
    // It has begun to give the new node replicas, and is not done.
    seconds(4).await;
    let begun = world.placed()[&6];
    assert!((1..8).contains(&begun), "{begun}");
    world.kill(1);
    seconds(10).await;
    assert_eq!(world.topology(5).controller, Some(NodeId(2)));
    seconds(700).await;
    let mut placed: Vec<usize> = world.placed().into_values().collect();
    placed.sort_unstable();
    assert_eq!(placed, [9, 9, 10, 10, 10]);
    assert_eq!(world.leads().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_second_process_of_a_node_is_refused() {
    let mut world = World::with_nodes(3).await;
    let setup = world.setup(2);
    let refused = world.start_as(setup).await;
    let Err(error @ ClusterError::Duplicate { node: NodeId(2), .. }) = refused else {
        panic!("it runs: {refused:?}");
    };
    let text = error.to_string();
    assert!(
        text.starts_with("two processes run as node-00000002: this one, with peer_addr"),
        "{text}"
    );
    assert!(world.topology(1).members[&NodeId(2)].alive, "the first goes on");
}

#[tokio::test(start_paused = true)]
async fn nodes_that_reckon_leases_otherwise_make_no_cluster_together() {
    let mut world = World::new();
    world.start(1).await;
    world.start(2).await;
    let usual = world.settings.election_timeout_ms;
    world.settings.election_timeout_ms = 5000;
    world.start(3).await;
    seconds(60).await;
    assert!(world.topology(1).map.is_none(), "two that agree are not enough for three replicas");
    world.settings.election_timeout_ms = usual;
    world.start(4).await;
    world.settle().await;
    assert_eq!(world.placed().keys().copied().collect::<Vec<_>>(), [1, 2, 4]);
    let map = world.map();
    assert_eq!(map.timing.map(|timing| timing.election_timeout_ms), Some(usual));

    // The third knows the map by now; whoever starts with it is refused, with the registry or without.
    let placement = world.nodes[&3].control.placement().await;
    let refused = world.nodes[&3].control.check(&placement).expect_err("it runs").to_string();
    assert!(
        refused.contains("election_timeout_ms is 5000 and clock_drift_percent 10"),
        "{refused}"
    );
    assert!(refused.contains("was created with 600 and 10"), "{refused}");
    world.kill(2);
    world.registry.set_away(true);
    world.settings.clock_drift_percent = 0;
    let mut setup = world.setup(2);
    setup.registration.cluster_id = Some(map.cluster_id);
    let refused = world.start_as(setup).await;
    assert!(matches!(refused, Err(ClusterError::Timing { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn a_controller_stays_when_another_comes() {
    let mut world = World::new();
    let earlier = world.registry.attach();
    world.start(2).await;
    seconds(5).await;
    assert!(world.nodes[&2].control.handle().0.registry.state().borrow().leads);
    earlier.register(world.setup(1).registration);
    earlier.campaign(true);
    assert!(!earlier.state().borrow().leads);
    assert!(world.nodes[&2].control.handle().0.registry.state().borrow().leads);
    world.kill(2);
    seconds(1).await;
    assert!(earlier.state().borrow().leads);
}

#[tokio::test(start_paused = true)]
async fn zones_hold_one_replica_each() {
    let mut world = World::new();
    for (node, zone) in [(1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "c"), (6, "c")] {
        let mut setup = world.setup(node);
        setup.registration.zone = zone.to_owned();
        world.start_as(setup).await.expect("started");
    }
    world.settle().await;
    for target in &world.map().targets {
        let zones: BTreeSet<u32> = target.iter().map(|id| id.node().0.div_ceil(2)).collect();
        assert_eq!(zones.len(), 3, "{target:?}");
    }
}
