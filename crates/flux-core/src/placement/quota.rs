//! How many replicas each node should hold. Which ones is not decided here.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::arrange::{Candidate, Rules};

/// The number of replicas that each candidate should hold when every one of `partitions` has what the
/// rules want. Equal to within one, but for zones that are too small for an equal share and nodes that
/// are closed, which keep their `loads`. Where nodes could have one more, those get it that hold most,
/// so that least moves.
pub(super) fn quotas(
    candidates: &[Candidate],
    loads: &[usize],
    partitions: usize,
    rules: Rules,
) -> Vec<usize> {
    let mut quota = loads.to_vec();
    let mut zones: BTreeMap<Option<usize>, Zone> = BTreeMap::new();
    let mut left = partitions * rules.wanted;
    for (index, candidate) in candidates.iter().enumerate() {
        let zone = zones.entry(candidate.zone).or_default();
        if candidate.open {
            zone.open.push(index);
        } else {
            zone.closed_load += loads[index];
            left = left.saturating_sub(loads[index]);
        }
    }
    let mut zones: Vec<Zone> = zones.into_values().filter(|zone| !zone.open.is_empty()).collect();
    for zone in &mut zones {
        let by_rule = (rules.zone_cap * partitions).saturating_sub(zone.closed_load);
        zone.room = by_rule.min(zone.open.len() * partitions);
    }
    // A zone without room for an equal share gets what it has room for, which raises the share of the
    // others, so that the next may become too small.
    while let Some(place) = too_small(&zones, left) {
        let zone = zones.swap_remove(place);
        let total = zone.room.min(left);
        left -= total;
        share(&mut [zone], total, loads, &mut quota);
    }
    share(&mut zones, left, loads, &mut quota);
    quota
}

/// The open nodes of a zone.
#[derive(Default)]
struct Zone {
    open: Vec<usize>,
    closed_load: usize,
    /// The most replicas that the open nodes may hold together.
    room: usize,
}

fn too_small(zones: &[Zone], left: usize) -> Option<usize> {
    let nodes: usize = zones.iter().map(|zone| zone.open.len()).sum();
    zones.iter().position(|zone| zone.open.len() * left >= zone.room * nodes)
}

/// Divides a total among the nodes of zones that have room for it.
fn share(zones: &mut [Zone], total: usize, loads: &[usize], quota: &mut [usize]) {
    let mut nodes: Vec<(usize, usize)> = Vec::new();
    for (place, zone) in zones.iter().enumerate() {
        nodes.extend(zone.open.iter().map(|&node| (node, place)));
    }
    if nodes.is_empty() {
        return;
    }
    let (each, mut over) = (total / nodes.len(), total % nodes.len());
    nodes.sort_by_key(|&(node, _)| (Reverse(loads[node]), node));
    for zone in zones.iter_mut() {
        zone.room = zone.room.saturating_sub(each * zone.open.len());
    }
    for (node, place) in nodes {
        let one_more = over > 0 && zones[place].room > 0;
        if one_more {
            over -= 1;
            zones[place].room -= 1;
        }
        quota[node] = each + usize::from(one_more);
    }
}

#[cfg(test)]
mod tests {
    use super::super::id::NodeId;
    use super::*;

    /// Candidates by their zones; a capital letter is a closed one.
    fn candidates(zones: &str) -> Vec<Candidate> {
        let zone = |b: u8| usize::from(b.to_ascii_lowercase() - b'a');
        let one = |(b, n): (u8, u32)| Candidate {
            node: NodeId(n),
            zone: Some(zone(b)),
            open: b.is_ascii_lowercase(),
        };
        zones.bytes().zip(1..).map(one).collect()
    }

    fn of(zones: &str, loads: &[usize], wanted: usize, zone_cap: usize) -> Vec<usize> {
        quotas(&candidates(zones), loads, 8, Rules { wanted, zone_cap })
    }

    #[test]
    fn the_one_more_goes_to_who_holds_most() {
        assert_eq!(of("aaaaa", &[0, 6, 4, 7, 7], 3, 3), [4, 5, 5, 5, 5]);
        assert_eq!(of("aaaaa", &[0; 5], 3, 3), [5, 5, 5, 5, 4]);
    }

    #[test]
    fn a_small_zone_gets_all_it_may_and_the_others_the_rest() {
        assert_eq!(of("abbccc", &[0; 6], 3, 1), [8, 4, 4, 3, 3, 2]);
        assert_eq!(of("abbbcccc", &[0; 8], 3, 2), [3; 8]);
        assert_eq!(of("abcd", &[0; 4], 3, 1), [6; 4]);
    }

    #[test]
    fn closed_nodes_keep_what_they_have() {
        assert_eq!(of("aAaa", &[6, 6, 6, 6], 3, 3), [6; 4]);
        assert_eq!(of("aAaa", &[0, 9, 0, 0], 3, 3), [5, 9, 5, 5]);
        assert_eq!(of("aBcc", &[8, 8, 4, 4], 3, 1), [8, 8, 4, 4]);
    }
}
