use std::fs;

use super::*;

fn settings(directory: &Path) -> Settings {
    Settings { data_dir: directory.to_owned(), workers: 0, ..Settings::default() }
}

fn refused(settings: &Settings, count: u16) -> String {
    settings_of_nodes(settings, count).expect_err("refused").to_string()
}

#[test]
fn each_node_has_ports_a_hundred_above_and_a_directory_of_its_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let nodes = settings_of_nodes(&settings(directory.path()), 3).expect("three nodes");
    let ports: Vec<_> = nodes
        .iter()
        .map(|one| {
            [one.data_addr, one.admin_addr, one.peer_addr, one.grpc_addr].map(|at| at.port())
        })
        .collect();
    let expected =
        [[7379, 7380, 7381, 50052], [7479, 7480, 7481, 50152], [7579, 7580, 7581, 50252]];
    assert_eq!(ports, expected);
    assert_eq!(nodes[2].data_dir, directory.path().join("node-3"));
    assert!(nodes.iter().all(|one| one.workers >= 1));
    assert!(
        nodes.iter().map(|one| one.workers).sum::<usize>()
            <= Settings::default().worker_count().max(3)
    );
}

#[test]
fn free_ports_stay_free_ones_and_given_workers_are_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let any = "127.0.0.1:0".parse().expect("an address");
    let all = Settings {
        data_addr: any,
        admin_addr: any,
        peer_addr: any,
        grpc_addr: any,
        workers: 2,
        ..settings(directory.path())
    };
    let nodes = settings_of_nodes(&all, 5).expect("five nodes");
    assert!(
        nodes.iter().all(|one| one.data_addr == any && one.grpc_addr == any && one.workers == 2)
    );
}

#[test]
fn ports_that_meet_or_end_are_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let meets = Settings {
        grpc_addr: "127.0.0.1:7479".parse().expect("one"),
        ..settings(directory.path())
    };
    let error = refused(&meets, 3);
    assert!(error.contains("127.0.0.1:7479") && error.contains("grpc_addr of node 1"), "{error}");
    let high = Settings {
        grpc_addr: "127.0.0.1:65500".parse().expect("one"),
        ..settings(directory.path())
    };
    assert!(refused(&high, 3).contains("choose a lower one"));
}

#[test]
fn a_directory_of_another_kind_is_refused_and_a_larger_cluster_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let settings = settings(directory.path());
    check_alone(&settings).expect("it is empty");
    assert!(refused(&settings, 2).contains("replication_factor 3"));
    for number in 1..=3 {
        fs::create_dir(directory.path().join(format!("node-{number}"))).expect("a folder");
    }
    let alone = check_alone(&settings).expect_err("a cluster's").to_string();
    assert!(alone.contains("cluster of 3 nodes: give --nodes 3"), "{alone}");
    assert!(refused(&settings, 2).contains("give --nodes 3"));
    assert_eq!(settings_of_nodes(&settings, 5).expect("two more").len(), 5);
    fs::write(directory.path().join("node.toml"), "").expect("a file");
    assert!(refused(&settings, 5).contains("node alone"));
}

#[test]
fn a_cluster_that_exists_may_have_fewer_nodes_than_the_setting_asks_replicas() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::create_dir(directory.path().join("node-2")).expect("a folder");
    fs::write(directory.path().join(REGISTRY), "{}").expect("a file");
    assert_eq!(settings_of_nodes(&settings(directory.path()), 2).expect("as it was").len(), 2);
}

#[test]
fn etcd_and_a_registry_of_its_own_exclude_each_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let etcd = Settings {
        etcd_endpoints: vec!["127.0.0.1:2379".to_owned()],
        ..settings(directory.path())
    };
    assert!(refused(&etcd, 3).contains("etcd_endpoints"));
}
