//! Chains of moves: where a replica that no node with room may have can go all the same, because others
//! move out of its way.

use super::{Board, Leg};

/// Where a chain begins.
#[derive(Clone, Copy)]
pub(super) enum Start {
    /// With a new replica of this partition.
    Partition(usize),
    /// With one of the replicas of this node.
    Node(usize),
}

/// What a chain is to have few of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Few {
    /// Replicas that would else have stayed where they were.
    Moves,
    /// Legs.
    Legs,
}

/// A chain from its start to a node below its quota: each leg after the first takes a replica away from
/// the node that the leg before it gives one to. If there is none, all nodes that one could pass.
///
/// This is a search in breadth, level by level of what counts. Each node is reached once, by the first
/// leg that does, so it takes no longer than looking at each replica and each zone.
pub(super) fn find(board: &Board<'_>, start: Start, few: Few) -> Result<Vec<Leg>, Vec<usize>> {
    let mut search = Search::new(board);
    let end = match start {
        Start::Partition(partition) => search.spread(partition, None).or_else(|| search.run(few)),
        Start::Node(node) => {
            search.reached.push(node);
            search.run(few)
        }
    };
    match end {
        Some(end) => Ok(search.trace(start, end)),
        None => Err(search.reached),
    }
}

struct Search<'a> {
    board: &'a Board<'a>,
    /// By zone, the open nodes that may not have been reached.
    rest: Vec<Vec<usize>>,
    /// By node, the leg that reached it.
    way: Vec<Option<Leg>>,
    /// In the order in which they were reached.
    reached: Vec<usize>,
}

impl<'a> Search<'a> {
    fn new(board: &'a Board<'a>) -> Search<'a> {
        let mut rest: Vec<Vec<usize>> = Vec::new();
        for (node, candidate) in board.candidates.iter().enumerate() {
            let zone = candidate.zone.map_or(0, |zone| zone + 1);
            if zone >= rest.len() {
                rest.resize(zone + 1, Vec::new());
            }
            if candidate.open && !board.hopeless[node] {
                rest[zone].push(node);
            }
        }
        Search { board, rest, way: vec![None; board.candidates.len()], reached: Vec::new() }
    }

    /// Goes on from the nodes that are reached, until one with room is.
    fn run(&mut self, few: Few) -> Option<usize> {
        let mut level = 0;
        while level < self.reached.len() {
            let mut next = level;
            while let Some(&node) = self.reached.get(next) {
                for partition in self.board.movable(node) {
                    let end = if few == Few::Legs || !self.is_home(partition, node) {
                        self.spread(partition, Some(node))
                    } else {
                        self.return_home(partition, node)
                    };
                    if end.is_some() {
                        return end;
                    }
                }
                next += 1;
            }
            for place in level..next {
                let node = self.reached[place];
                for partition in self.board.movable(node) {
                    if let Some(end) = self.spread(partition, Some(node)) {
                        return Some(end);
                    }
                }
            }
            level = next;
        }
        None
    }

    /// Reaches all nodes that may have a partition, or the first of them with room.
    fn spread(&mut self, partition: usize, from: Option<usize>) -> Option<usize> {
        let Search { board, rest, way, reached } = self;
        for nodes in rest {
            let Some(&first) = nodes.first() else { continue };
            if board.is_crowded(partition, from, first) {
                continue;
            }
            let mut end = None;
            nodes.retain(|&to| {
                if way[to].is_none() && (end.is_some() || board.lists[partition].contains(&to)) {
                    return true;
                }
                if way[to].is_none() {
                    way[to] = Some(Leg { partition, from, to });
                    reached.push(to);
                    end = board.below_quota(to).then_some(to);
                }
                false
            });
            if end.is_some() {
                return end;
            }
        }
        None
    }

    /// Reaches the nodes that had a partition at first.
    fn return_home(&mut self, partition: usize, from: usize) -> Option<usize> {
        for &to in &self.board.home[partition] {
            let new = self.way[to].is_none() && !self.board.hopeless[to];
            if new && self.board.accepts(partition, Some(from), to) {
                self.way[to] = Some(Leg { partition, from: Some(from), to });
                self.reached.push(to);
                if self.board.below_quota(to) {
                    return Some(to);
                }
            }
        }
        None
    }

    fn is_home(&self, partition: usize, node: usize) -> bool {
        self.board.home[partition].contains(&node)
    }

    fn trace(&self, start: Start, end: usize) -> Vec<Leg> {
        let start = match start {
            Start::Partition(_) => None,
            Start::Node(node) => Some(node),
        };
        let before =
            |leg: &Leg| leg.from.filter(|_| leg.from != start).and_then(|node| self.way[node]);
        let mut chain: Vec<Leg> = std::iter::successors(self.way[end], before).collect();
        chain.reverse();
        chain
    }
}
