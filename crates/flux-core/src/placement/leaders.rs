//! Which replica of each partition should lead, so that nodes lead equally many.
//!
//! This is an optimal semi-matching (Harvey, Ladner, Lovász, Tamir: "Semi-matchings for bipartite
//! graphs and load balancing", 2006): as long as there is a chain of partitions that could each be led
//! by the next node, from a node to one that leads at least two fewer, leadership moves along it. When
//! there is none, no choice of leaders is better balanced. It starts from those who lead now, so that
//! little changes. Replicas never move here.

use std::collections::VecDeque;

use super::id::NodeId;

/// For each list of nodes the place of the one that should lead. Those who `may_lead` not are chosen
/// only where there is nobody else. The lists are not empty, and the first of each leads now.
pub(super) fn spread(lists: &[Vec<NodeId>], may_lead: impl Fn(NodeId) -> bool) -> Vec<usize> {
    let mut nodes: Vec<NodeId> =
        lists.iter().flatten().copied().filter(|&node| may_lead(node)).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let index = |node: &NodeId| nodes.binary_search(node).ok();
    let members = lists.iter().map(|list| list.iter().filter_map(index).collect()).collect();
    let mut election =
        Election::new(nodes.len(), members, lists.iter().map(|list| list.first().and_then(index)));
    election.balance();
    let place = |(list, leader): (&Vec<NodeId>, &Option<usize>)| {
        leader.and_then(|leader| list.iter().position(|&node| node == nodes[leader])).unwrap_or(0)
    };
    lists.iter().zip(&election.leaders).map(place).collect()
}

struct Election {
    /// By partition, the nodes that may lead it.
    members: Vec<Vec<usize>>,
    /// By partition, the one that does.
    leaders: Vec<Option<usize>>,
    /// By node, the partitions it leads.
    led: Vec<Vec<usize>>,
}

impl Election {
    fn new(
        nodes: usize,
        members: Vec<Vec<usize>>,
        now: impl Iterator<Item = Option<usize>>,
    ) -> Election {
        let mut election =
            Election { members, leaders: now.collect(), led: vec![Vec::new(); nodes] };
        for (partition, leader) in election.leaders.iter().enumerate() {
            if let Some(leader) = *leader {
                election.led[leader].push(partition);
            }
        }
        for partition in 0..election.leaders.len() {
            if election.leaders[partition].is_none() {
                let free = election.members[partition]
                    .iter()
                    .copied()
                    .min_by_key(|&node| election.led[node].len());
                election.leaders[partition] = free;
                if let Some(leader) = free {
                    election.led[leader].push(partition);
                }
            }
        }
        election
    }

    fn balance(&mut self) {
        // Each change lowers the sum of the squares of what nodes lead, so this ends.
        let mut changed = true;
        while changed {
            changed = false;
            let mut order: Vec<usize> = (0..self.led.len()).collect();
            order.sort_by_key(|&node| std::cmp::Reverse(self.led[node].len()));
            for node in order {
                while let Some(chain) = self.relief(node) {
                    for (partition, to) in chain {
                        self.hand_over(partition, to);
                    }
                    changed = true;
                }
            }
        }
    }

    /// The shortest chain of partitions to hand over, each with its next leader, that takes one from
    /// `from` and gives one to a node with at least two fewer.
    fn relief(&self, from: usize) -> Option<Vec<(usize, usize)>> {
        let enough = self.led[from].len().checked_sub(2)?;
        if self.led.iter().all(|led| led.len() > enough) {
            return None;
        }
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; self.led.len()];
        let mut queue = VecDeque::from([from]);
        while let Some(node) = queue.pop_front() {
            for &partition in &self.led[node] {
                for &next in &self.members[partition] {
                    if next == from || reached[next].is_some() {
                        continue;
                    }
                    reached[next] = Some((node, partition));
                    if self.led[next].len() <= enough {
                        return Some(trace(&reached, next));
                    }
                    queue.push_back(next);
                }
            }
        }
        None
    }

    fn hand_over(&mut self, partition: usize, to: usize) {
        if let Some(from) = self.leaders[partition].replace(to) {
            self.led[from].retain(|&other| other != partition);
        }
        self.led[to].push(partition);
    }
}

/// The way back from a node that a search reached: what is passed on, and to whom.
fn trace(reached: &[Option<(usize, usize)>], end: usize) -> Vec<(usize, usize)> {
    let mut chain = Vec::new();
    let mut to = end;
    while let Some((from, partition)) = reached[to] {
        chain.push((partition, to));
        to = from;
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(text: &str) -> Vec<Vec<NodeId>> {
        let list = |word: &str| word.bytes().map(|b| NodeId((b - b'a' + 1).into())).collect();
        text.split_whitespace().map(list).collect()
    }

    #[test]
    fn who_leads_stays_where_the_balance_is_right() {
        assert_eq!(spread(&lists("abc bca cab"), |_| true), [0, 0, 0]);
        assert_eq!(spread(&lists("abc abc bca cab"), |_| true), [0, 0, 0, 0]);
    }

    #[test]
    fn leadership_moves_along_a_chain() {
        // a leads two and c none, but they share no partition: b passes one on.
        let places = spread(&lists("ab ab bc"), |_| true);
        assert_eq!(places.iter().sum::<usize>(), 2);
        assert_eq!(places[2], 1);
    }

    #[test]
    fn who_may_not_lead_does_so_only_alone() {
        let not_a = |node| node != NodeId(1);
        assert_eq!(spread(&lists("abc a ba"), not_a), [2, 0, 0]);
    }
}
