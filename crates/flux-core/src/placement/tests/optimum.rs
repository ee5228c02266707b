//! The fewest moves that lead from one layout to another with the same loads: a minimum-cost flow, by
//! the textbook, to measure the real thing against.

use std::collections::BTreeMap;

use crate::placement::{NodeId, Placeable};

struct Edge {
    to: usize,
    room: usize,
    cost: i64,
}

/// A flow network; each edge is followed by its reverse.
#[derive(Default)]
struct Network {
    edges: Vec<Edge>,
    out: Vec<Vec<usize>>,
}

impl Network {
    fn vertex(&mut self) -> usize {
        self.out.push(Vec::new());
        self.out.len() - 1
    }

    fn connect(&mut self, from: usize, to: usize, room: usize, cost: i64) {
        self.out[from].push(self.edges.len());
        self.edges.push(Edge { to, room, cost });
        self.out[to].push(self.edges.len());
        self.edges.push(Edge { to: from, room: 0, cost: -cost });
    }

    /// Sends one unit at the lowest cost (Bellman and Ford); gives the cost.
    fn send(&mut self, source: usize, sink: usize) -> Option<i64> {
        let mut best: Vec<Option<(i64, usize)>> = vec![None; self.out.len()];
        best[source] = Some((0, usize::MAX));
        let mut changed = true;
        while changed {
            changed = false;
            for from in 0..self.out.len() {
                let Some((so_far, _)) = best[from] else { continue };
                for &number in &self.out[from] {
                    let edge = &self.edges[number];
                    let cost = so_far + edge.cost;
                    if edge.room > 0 && best[edge.to].is_none_or(|(other, _)| cost < other) {
                        best[edge.to] = Some((cost, number));
                        changed = true;
                    }
                }
            }
        }
        let (cost, _) = best[sink]?;
        let mut vertex = sink;
        while let Some((_, number)) = best[vertex].filter(|_| vertex != source) {
            self.edges[number].room -= 1;
            self.edges[number ^ 1].room += 1;
            vertex = self.edges[number ^ 1].to;
        }
        Some(cost)
    }
}

/// The fewest replicas that must be new where they are for each node to hold its part of `loads`, with
/// `wanted` replicas for each partition and at most `cap` of them in a zone.
pub(super) fn fewest_moves(
    nodes: &[Placeable],
    before: &[Vec<NodeId>],
    loads: &[usize],
    wanted: usize,
    cap: usize,
) -> usize {
    let mut network = Network::default();
    let (source, sink) = (network.vertex(), network.vertex());
    let places: Vec<usize> = nodes.iter().map(|_| network.vertex()).collect();
    for (&place, &load) in places.iter().zip(loads) {
        network.connect(place, sink, load, 0);
    }
    for list in before {
        let partition = network.vertex();
        network.connect(source, partition, wanted, 0);
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        for (node, &place) in nodes.iter().zip(&places) {
            let zone = *zones.entry(&node.zone).or_insert_with(|| {
                let zone = network.vertex();
                network.connect(partition, zone, cap, 0);
                zone
            });
            network.connect(zone, place, 1, i64::from(!list.contains(&node.node)));
        }
    }
    let mut total = 0;
    for _ in 0..before.len() * wanted {
        total += network.send(source, sink).expect("the loads are possible");
    }
    usize::try_from(total).expect("no cost is negative")
}
