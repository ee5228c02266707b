//! Directories that are made, opened again, refused, joined to a cluster, and set aside.

use std::fs;

use super::*;

#[test]
fn a_directory_keeps_what_it_was_created_with() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path().join("data");
    let created = DataDir::open(&path, Purpose::Alone(16), 2).expect("created").description.clone();
    let mut again = DataDir::open(&path, Purpose::Alone(16), 4).expect("opened");
    assert_eq!(again.description, created);
    again.switch(2, 4).expect("switched");
    drop(again);
    let again = DataDir::open(&path, Purpose::Alone(16), 4).expect("opened");
    assert_eq!((again.description.generation, again.description.workers), (2, 4));
    assert_eq!(again.description.seed(), created.seed());
}

#[test]
fn one_node_at_a_time() {
    let parent = tempfile::tempdir().expect("a directory");
    let _first = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("opened");
    let second = DataDir::open(parent.path(), Purpose::Alone(16), 1);
    assert!(matches!(second, Err(DataDirError::InUse(_))), "{second:?}");
}

#[test]
fn wrong_directories_are_refused() {
    let parent = tempfile::tempdir().expect("a directory");
    drop(DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("created"));
    let other = DataDir::open(parent.path(), Purpose::Alone(32), 1);
    assert!(matches!(other, Err(DataDirError::Partitions { created: 16, asked: 32, .. })));
    fs::write(parent.path().join(DESCRIPTION), "format = 9").expect("written");
    let damaged = DataDir::open(parent.path(), Purpose::Alone(16), 1);
    assert!(matches!(damaged, Err(DataDirError::Description { .. })), "{damaged:?}");

    let foreign = tempfile::tempdir().expect("a directory");
    fs::write(foreign.path().join("thesis.tex"), "precious").expect("written");
    let refused = DataDir::open(foreign.path(), Purpose::Alone(16), 1);
    assert!(matches!(refused, Err(DataDirError::Foreign(_))), "{refused:?}");

    let foreign = tempfile::tempdir().expect("a directory");
    fs::create_dir(foreign.path().join("photos")).expect("made");
    let refused = DataDir::open(foreign.path(), Purpose::Alone(16), 1);
    assert!(matches!(refused, Err(DataDirError::Foreign(_))), "{refused:?}");
}

#[test]
fn logs_that_a_crash_left_are_removed() {
    let parent = tempfile::tempdir().expect("a directory");
    let directory = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("created");
    for (generation, worker) in [(1, 0), (2, 0), (2, 1), (11, 0)] {
        directory.log(generation, worker).expect("made");
    }
    fs::write(parent.path().join("node.toml.new"), "half of i").expect("written");
    drop(directory);
    let mut directory = DataDir::open(parent.path(), Purpose::Alone(16), 1).expect("opened");
    let logs = |directory: &DataDir| {
        let names = directory.folders.list().expect("listed");
        names.into_iter().filter(|name| name.starts_with("log-")).collect::<Vec<_>>()
    };
    assert_eq!(logs(&directory), ["log-1-0"]);
    directory.log(2, 0).expect("made");
    directory.switch(2, 1).expect("switched");
    assert_eq!(logs(&directory), ["log-2-0"]);
}

#[test]
fn a_directory_joins_one_cluster_for_good() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path();
    let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("created");
    assert_eq!((directory.cluster_id(), directory.description.partitions), (None, 16));
    assert_ne!(directory.identity(), NodeId(0));
    directory.join(7, 64).expect("joined");
    directory.join(7, 64).expect("again");
    directory.mark_started().expect("written");
    let node = directory.identity();
    drop(directory);
    let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("opened");
    assert_eq!((directory.cluster_id(), directory.identity()), (Some(7), node));
    assert_eq!(directory.description.partitions, 64);
    let other = directory.join(8, 64).expect_err("another cluster");
    assert!(matches!(other, DataDirError::OtherCluster { own: 7, other: 8, .. }), "{other}");
    let other = directory.join(7, 32).expect_err("another number");
    assert!(matches!(other, DataDirError::Partitions { created: 64, asked: 32, .. }), "{other}");
}

#[test]
fn data_of_a_node_alone_joins_no_cluster() {
    let parent = tempfile::tempdir().expect("a directory");
    let mut directory = DataDir::open(parent.path(), Purpose::Cluster, 1).expect("created");
    directory.mark_started().expect("written");
    let refused = directory.join(7, 64);
    assert!(matches!(refused, Err(DataDirError::Alone(_))), "{refused:?}");
    assert_eq!(directory.cluster_id(), None);
    drop(directory);
    let refused = DataDir::open(parent.path(), Purpose::Cluster, 1);
    assert!(matches!(refused, Err(DataDirError::Alone(_))), "{refused:?}");
}

#[test]
fn data_of_a_cluster_is_not_touched_by_a_node_alone() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path();
    let mut directory = DataDir::open(path, Purpose::Cluster, 1).expect("created");
    directory.join(7, 64).expect("joined");
    directory.mark_started().expect("written");
    // What a crash left, and the next start of the node itself removes.
    directory.log(2, 0).expect("made");
    drop(directory);
    for partitions in [0, 64, 16] {
        let refused = DataDir::open(path, Purpose::Alone(partitions), 2);
        let Err(error @ DataDirError::OfCluster { cluster: 7, .. }) = refused else {
            panic!("opened: {refused:?}");
        };
        let text = error.to_string();
        assert!(text.contains("cluster 0000000000000007"), "{text}");
        assert!(text.contains("give etcd_endpoints"), "{text}");
    }
    assert!(path.join("log-2-0").is_dir());
    DataDir::open(path, Purpose::Cluster, 1).expect("its own node opens it");
}

#[test]
fn a_directory_without_a_cluster_reads_as_ever() {
    let parent = tempfile::tempdir().expect("a directory");
    let text = "format = 1\nnode_id = \"node-0badcafe\"\nhash_seed = \"00000000000000ff\"\n\
                partitions = 16\nworkers = 1\ngeneration = 1\nstarted = true\n";
    fs::write(parent.path().join(DESCRIPTION), text).expect("written");
    let mut directory = DataDir::open(parent.path(), Purpose::Alone(0), 1).expect("opened");
    assert_eq!(directory.identity(), NodeId(0x0bad_cafe));
    assert_eq!((directory.cluster_id(), directory.replaces()), (None, None));
    directory.switch(1, 1).expect("written");
    drop(directory);
    let written = fs::read_to_string(parent.path().join(DESCRIPTION)).expect("read");
    assert_eq!(written, text, "what an older version reads too");
}

#[test]
fn data_that_is_set_aside_makes_another_node() {
    let parent = tempfile::tempdir().expect("a directory");
    let path = parent.path();
    let mut directory = DataDir::open(path, Purpose::Cluster, 2).expect("created");
    directory.join(7, 64).expect("joined");
    for worker in 0..2 {
        directory.log(1, worker).expect("made");
    }
    directory.snapshots().expect("made");
    directory.mark_started().expect("written");
    fs::write(path.join("log-1-1/1.log"), "damaged").expect("written");
    let old = directory.identity();
    let aside = directory.set_aside().expect("moved");
    assert_eq!(aside, path.join("damaged-1"));
    assert_eq!(fs::read(aside.join("log-1-1/1.log")).expect("kept"), b"damaged");
    assert!(aside.join("snapshots").is_dir() && !path.join("snapshots").exists());
    assert_ne!(directory.identity(), old);
    assert_eq!((directory.replaces(), directory.cluster_id()), (Some(old), Some(7)));
    assert_eq!((directory.description.generation, directory.description.started), (2, false));
    drop(directory);

    // A crash came after the new identity was written, and before anything was moved.
    let mut directory = DataDir::open(path, Purpose::Cluster, 2).expect("opened");
    let second = directory.identity();
    directory.log(2, 0).expect("made");
    let description = Description {
        node_id: "node-00000009".to_owned(),
        replaces: Some(second.to_string()),
        generation: 3,
        aside: Some(2),
        ..directory.description.clone()
    };
    directory.describe(description).expect("written");
    drop(directory);
    let directory = DataDir::open(path, Purpose::Cluster, 2).expect("opened");
    assert!(path.join("damaged-2/log-2-0").is_dir() && !path.join("log-2-0").exists());
    assert_eq!((directory.identity(), directory.replaces()), (NodeId(9), Some(second)));
    assert_eq!(directory.description.aside, None);
}
