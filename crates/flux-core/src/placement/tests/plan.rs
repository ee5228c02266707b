//! Single plans: what is done, in what order, and what is left alone.

use std::collections::BTreeSet;

use crate::placement::*;

/// A cluster whose partitions are lists of nodes, called by letters; all are up, in one zone.
struct Cluster {
    map: PlacementMap,
    nodes: Nodes,
    statuses: Vec<PartitionStatus>,
}

fn node(letter: char) -> NodeId {
    NodeId(u32::from(letter))
}

impl Cluster {
    fn new(r: u8, nodes: &str, partitions: &[&str]) -> Cluster {
        let layout: Vec<Vec<NodeId>> =
            partitions.iter().map(|list| list.chars().map(node).collect()).collect();
        let map = PlacementMap::new(1, r, &layout).expect("a valid map");
        let up = nodes
            .chars()
            .map(|letter| Placeable { node: node(letter), zone: String::new() })
            .collect();
        let status = |(voters, n): (&Vec<ReplicaId>, u16)| PartitionStatus {
            partition: PartitionId(n),
            leader: Some(voters[0]),
            voters: voters.clone(),
            learners: Vec::new(),
            changing: false,
        };
        let statuses = map.targets.iter().zip(0..).map(status).collect();
        Cluster { map, nodes: Nodes { up, ..Nodes::default() }, statuses }
    }

    fn lose(&mut self, letters: &str, dead: bool) {
        let lost: BTreeSet<NodeId> = letters.chars().map(node).collect();
        let gone = self.nodes.up.extract_if(.., |place| lost.contains(&place.node));
        if dead {
            self.nodes.dead.extend(gone.map(|place| place.node));
        } else {
            self.nodes.away.extend(gone);
        }
    }

    /// The steps as text, such as `0 Dead abc>abd`; those about leaders left out.
    fn plan(&self, max_moves: usize) -> Vec<String> {
        let letters = |list: &[ReplicaId]| {
            let mut letters: Vec<char> =
                list.iter().filter_map(|replica| char::from_u32(replica.node().0)).collect();
            letters.sort_unstable();
            letters.into_iter().collect::<String>()
        };
        let text = |step: &Step| {
            let (before, after) = (letters(self.map.target(step.partition)), letters(&step.target));
            format!("{} {:?} {before}>{after}", step.partition, step.reason)
        };
        let steps = plan(&self.map, &self.nodes, &self.statuses, &Limits { max_moves });
        steps.iter().filter(|step| step.reason != Reason::Leader).map(text).collect()
    }
}

#[test]
fn a_balanced_cluster_is_left_alone() {
    let cluster = Cluster::new(3, "abc", &["abc", "bca", "cab", "abc"]);
    assert_eq!(plan(&cluster.map, &cluster.nodes, &cluster.statuses, &Limits { max_moves: 9 }), []);
    assert_eq!(leader_transfers(&cluster.map, &cluster.nodes, &cluster.statuses, 9), []);
}

#[test]
fn repairs_come_before_drains_and_drains_before_balance() {
    let mut cluster = Cluster::new(2, "abcdef", &["ab", "ab", "cd", "ed"]);
    cluster.map.draining.insert(node('d'));
    cluster.lose("b", true);
    let all = cluster.plan(9);
    let reasons: Vec<&str> = all.iter().filter_map(|step| step.split(' ').nth(1)).collect();
    // A quorum of two is two: partitions 0 and 1 cannot be repaired.
    assert_eq!(reasons, ["Draining", "Draining"]);

    let mut cluster = Cluster::new(3, "abcdefg", &["abc", "abd", "acd", "efg"]);
    cluster.map.draining.insert(node('e'));
    cluster.lose("b", true);
    let all = cluster.plan(9);
    let reasons: Vec<&str> = all.iter().filter_map(|step| step.split(' ').nth(1)).collect();
    assert_eq!(reasons, ["Dead", "Dead", "Draining"]);
    assert_eq!(cluster.plan(1), all[..1]);
    assert_eq!(cluster.plan(0), [""; 0]);
}

#[test]
fn steps_follow_the_counter_and_lead_to_a_valid_map() {
    let mut cluster = Cluster::new(3, "abcde", &["abc", "abc", "abc", "abc"]);
    let next = cluster.map.next_sequence;
    let steps = plan(&cluster.map, &cluster.nodes, &cluster.statuses, &Limits { max_moves: 3 });
    let added: Vec<u32> =
        steps.iter().filter_map(|step| step.added).map(ReplicaId::sequence).collect();
    assert_eq!(added, [next, next + 1, next + 2]);
    for step in &steps {
        cluster.map.apply(step);
    }
    assert_eq!(cluster.map.validate(), Ok(()));
    assert_eq!(cluster.map.next_sequence, next + 3);

    cluster.map.next_sequence = u32::MAX;
    assert_eq!(cluster.plan(9), [""; 0], "the counter is used up");
}

#[test]
fn what_is_under_way_counts_and_is_left_alone() {
    let mut cluster = Cluster::new(3, "abcd", &["abc", "abc", "abc", "abc"]);
    assert_eq!(cluster.plan(2).len(), 2);
    cluster.statuses[0].changing = true;
    assert_eq!(cluster.plan(2).len(), 1);
    let learner = ReplicaId::new(node('d'), 99);
    cluster.statuses[1].learners.push(learner);
    assert_eq!(cluster.plan(2), [""; 0]);
    assert!(cluster.plan(9).iter().all(|step| step.starts_with(['2', '3'])));
}

#[test]
fn a_partition_without_a_known_leader_holds_up_balance_but_no_repair() {
    let mut cluster = Cluster::new(3, "abcd", &["abc", "abc", "abc", "abc"]);
    cluster.statuses[0].leader = None;
    cluster.statuses.remove(1);
    assert_eq!(cluster.plan(2), [""; 0]);
    cluster.lose("c", true);
    assert_eq!(cluster.plan(2), ["2 Dead abc>abd", "3 Dead abc>abd"]);
}

#[test]
fn a_node_that_is_away_keeps_what_it_has_and_gets_nothing() {
    let mut cluster = Cluster::new(3, "abcd", &["abc", "abc", "abc", "abc"]);
    cluster.lose("a", false);
    assert_eq!(cluster.plan(9), [""; 0]);
    let mut cluster = Cluster::new(3, "abcd", &["abc", "abc", "abc", "abc"]);
    cluster.lose("d", false);
    assert_eq!(cluster.plan(9), [""; 0]);
}

#[test]
fn a_replica_with_nowhere_to_go_stays() {
    let mut cluster = Cluster::new(3, "abc", &["abc", "bca"]);
    cluster.map.draining.insert(node('a'));
    cluster.lose("b", true);
    assert_eq!(cluster.plan(9), [""; 0]);
    // With one node more, the dead one's replica goes first.
    cluster.nodes.up.push(Placeable { node: node('d'), zone: String::new() });
    assert_eq!(cluster.plan(9), ["0 Dead abc>acd", "1 Dead abc>acd"]);
}

#[test]
fn a_partition_grows_and_shrinks_by_one() {
    let mut cluster = Cluster::new(1, "abc", &["a"]);
    cluster.map.replication_factor = 3;
    assert_eq!(cluster.plan(9).len(), 1);
    assert!(cluster.plan(9)[0].starts_with("0 Missing a>a"));
    let mut cluster = Cluster::new(3, "abc", &["abc"]);
    cluster.map.replication_factor = 1;
    assert_eq!(cluster.plan(9).len(), 1);
    assert!(cluster.plan(9)[0].starts_with("0 Surplus abc>"));
}

#[test]
fn a_move_to_a_node_that_died_is_taken_back_or_goes_elsewhere() {
    let mut cluster = Cluster::new(3, "abcd", &["abc"]);
    let step = cluster.map.replace(PartitionId(0), node('c'), node('d')).expect("a step");
    cluster.map.apply(&step);
    assert_eq!(cluster.plan(9), [""; 0], "under way");
    cluster.lose("d", true);
    assert_eq!(cluster.plan(9), ["0 Stalled abd>abc"]);
    cluster.map.draining.insert(node('c'));
    cluster.nodes.up.push(Placeable { node: node('e'), zone: String::new() });
    assert_eq!(cluster.plan(9), ["0 Stalled abd>abe"]);
}

#[test]
fn a_move_to_where_a_voter_still_is_is_taken_back() {
    let mut cluster = Cluster::new(3, "abcd", &["abc"]);
    let next = cluster.map.next_sequence;
    cluster.map.targets[0][0] = ReplicaId::new(node('a'), next);
    cluster.map.next_sequence += 1;
    let voters = cluster.statuses[0].voters.clone();
    let steps = plan(&cluster.map, &cluster.nodes, &cluster.statuses, &Limits { max_moves: 9 });
    let [step] = &steps[..] else { panic!("{steps:?}") };
    assert_eq!(step.reason, Reason::Stalled);
    assert!(step.target.iter().all(|replica| voters.contains(replica)), "{step:?}");
}

#[test]
fn a_replica_that_was_dropped_never_comes_back() {
    // The move from c to d was taken back too late: c is gone.
    let mut cluster = Cluster::new(3, "abcd", &["abc"]);
    let step = cluster.map.replace(PartitionId(0), node('c'), node('d')).expect("a step");
    cluster.map.next_sequence += 1;
    cluster.statuses[0].voters = step.target;
    assert_eq!(cluster.plan(9), ["0 Stalled abc>abd"]);
}

#[test]
fn leadership_goes_from_those_who_lead_most_to_the_preferred() {
    let mut cluster = Cluster::new(2, "abc", &["ab", "ab", "bc", "ca"]);
    for partition in [0, 1, 3] {
        let status = &mut cluster.statuses[partition];
        status.leader = status.voters.iter().copied().find(|voter| voter.node() == node('a'));
    }
    cluster.map.targets[0].reverse();
    let transfers = |cluster: &Cluster, limit| -> Vec<u16> {
        let transfers = leader_transfers(&cluster.map, &cluster.nodes, &cluster.statuses, limit);
        transfers.iter().map(|transfer| transfer.partition.0).collect()
    };
    // a leads three, b one and c none.
    assert_eq!(transfers(&cluster, 1), [3]);
    assert_eq!(transfers(&cluster, 9), [3, 0]);
    cluster.statuses[3].changing = true;
    assert_eq!(transfers(&cluster, 9), [0]);
    cluster.lose("b", false);
    assert_eq!(transfers(&cluster, 9), [0; 0]);
}

#[test]
fn a_draining_node_leads_only_where_it_is_alone() {
    let mut cluster = Cluster::new(2, "ab", &["ab", "ab", "ba", "ba"]);
    cluster.map.draining.insert(node('a'));
    let steps = plan(&cluster.map, &cluster.nodes, &cluster.statuses, &Limits { max_moves: 9 });
    assert_eq!(steps.len(), 2);
    assert!(
        steps
            .iter()
            .all(|step| step.reason == Reason::Leader && step.target[0].node() == node('b'))
    );
}
