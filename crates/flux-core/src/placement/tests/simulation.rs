//! Plans at work: a small cluster of model nodes and model leaders that carry targets out, with nodes
//! that come, go, die and drain meanwhile, and reports that may be old.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::desired::{check, moved, place};
use crate::placement::*;
use crate::slot::Partitions;

const MAX_MOVES: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Up,
    Away,
    Dead,
}

/// A partition's Raft group, as far as its members go.
struct Group {
    leader: ReplicaId,
    voters: Vec<ReplicaId>,
    /// The voters of the configuration that a joint one leaves.
    outgoing: Vec<ReplicaId>,
    learners: Vec<ReplicaId>,
    /// The target as the leader knows it.
    seen: Vec<ReplicaId>,
    /// Every replica that was ever dropped.
    dropped: BTreeSet<ReplicaId>,
}

struct World {
    map: PlacementMap,
    nodes: BTreeMap<NodeId, (Placeable, State)>,
    groups: Vec<Group>,
    old_reports: Vec<PartitionStatus>,
    random: u64,
    next_node: u32,
    replicas_made: usize,
}

impl World {
    fn new(zones: &[usize], partitions: u16, r: u8, seed: u64) -> World {
        let places: Vec<Placeable> =
            zones.iter().zip(1..).map(|(&zone, n)| place(n, zone)).collect();
        let layout =
            desired(&places, Partitions::new(partitions).expect("a power of two"), r, None);
        let map = PlacementMap::new(1, r, &layout).expect("a valid map");
        let group = |voters: &Vec<ReplicaId>| Group {
            leader: voters[0],
            voters: voters.clone(),
            outgoing: Vec::new(),
            learners: Vec::new(),
            seen: voters.clone(),
            dropped: BTreeSet::new(),
        };
        World {
            groups: map.bootstrap.iter().map(group).collect(),
            map,
            next_node: 1 + places.len() as u32,
            nodes: places.into_iter().map(|place| (place.node, (place, State::Up))).collect(),
            old_reports: Vec::new(),
            random: seed | 1,
            replicas_made: 0,
        }
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20).is_multiple_of(one_in)
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.nodes[&node].1 == State::Up
    }

    fn quorum_is_up(&self, voters: &[ReplicaId], but: Option<NodeId>) -> bool {
        let up = |replica: &&ReplicaId| self.is_up(replica.node()) && Some(replica.node()) != but;
        voters.is_empty() || voters.iter().filter(up).count() > voters.len() / 2
    }

    fn can_lose(&self, node: NodeId) -> bool {
        let holds = |set: &[ReplicaId]| self.quorum_is_up(set, Some(node));
        self.groups.iter().all(|group| holds(&group.voters) && holds(&group.outgoing))
    }

    /// Each leader may hear of the map, and take one step.
    fn advance(&mut self) {
        for index in 0..self.groups.len() {
            for set in [&self.groups[index].voters, &self.groups[index].outgoing] {
                assert!(self.quorum_is_up(set, None), "partition {index} lost its quorum");
            }
            let leader = self.groups[index].leader;
            if !self.is_up(leader.node()) || !self.groups[index].voters.contains(&leader) {
                let up: Vec<ReplicaId> = self.groups[index]
                    .voters
                    .iter()
                    .copied()
                    .filter(|voter| self.is_up(voter.node()))
                    .collect();
                self.groups[index].leader = up[self.random as usize % up.len()];
            }
            if self.chance(2) {
                self.groups[index].seen = self.map.targets[index].clone();
            }
            if self.chance(2) {
                self.reconfigure(index);
            }
        }
    }

    fn reconfigure(&mut self, index: usize) {
        let group = &self.groups[index];
        let missing: Vec<ReplicaId> =
            group.seen.iter().copied().filter(|r| !group.voters.contains(r)).collect();
        let coming: Vec<ReplicaId> =
            missing.iter().copied().filter(|r| r.may_join(&group.voters)).collect();
        let ready = coming.iter().all(|r| group.learners.contains(r) && self.is_up(r.node()));
        let next: Vec<ReplicaId> = group.seen.clone();
        let safe = self.quorum_is_up(&next, None);
        let group = &mut self.groups[index];
        if !group.outgoing.is_empty() {
            let left = std::mem::take(&mut group.outgoing);
            group.dropped.extend(left.into_iter().filter(|r| !group.voters.contains(r)));
        } else if group.learners != coming {
            let before = std::mem::replace(&mut group.learners, coming);
            group.dropped.extend(before.into_iter().filter(|r| !group.learners.contains(r)));
        } else if missing == coming
            && ready
            && safe
            && next.iter().collect::<BTreeSet<_>>() != group.voters.iter().collect()
        {
            let gone = group.voters.iter().filter(|voter| !next.contains(voter)).count();
            assert!(missing.len() <= 1 && gone <= 1, "one replica at a time");
            assert!(next.iter().all(|r| !group.dropped.contains(r)), "a replica came back");
            let nodes: BTreeSet<NodeId> = next.iter().map(|r| r.node()).collect();
            assert_eq!(nodes.len(), next.len(), "two replicas on a node");
            group.learners.clear();
            group.outgoing = std::mem::replace(&mut group.voters, next);
        }
    }

    fn reports(&self) -> Vec<PartitionStatus> {
        let report = |(group, n): (&Group, u16)| PartitionStatus {
            partition: PartitionId(n),
            leader: Some(group.leader),
            voters: group.voters.clone(),
            learners: group.learners.clone(),
            changing: !group.outgoing.is_empty(),
        };
        self.groups.iter().zip(0..).map(report).collect()
    }

    fn fleet(&self) -> Nodes {
        let of = |state: State| {
            self.nodes.values().filter(move |(_, s)| *s == state).map(|(place, _)| place)
        };
        Nodes {
            up: of(State::Up).cloned().collect(),
            away: of(State::Away).cloned().collect(),
            dead: of(State::Dead).map(|place| place.node).collect(),
        }
    }

    /// The controller's turn; gives whether anything changed.
    fn control(&mut self) -> bool {
        let mut reports = self.reports();
        let old = std::mem::replace(&mut self.old_reports, reports.clone());
        for (report, old) in reports.iter_mut().zip(old) {
            if self.chance(4) {
                *report = old;
            }
        }
        let fleet = self.fleet();
        let steps = plan(&self.map, &fleet, &reports, &Limits { max_moves: MAX_MOVES });
        for step in &steps {
            self.check_step(step);
            self.map.apply(step);
            self.replicas_made += usize::from(step.added.is_some());
        }
        self.map.validate().expect("a valid map");
        let transfers = leader_transfers(&self.map, &fleet, &reports, 2);
        let idle = steps.is_empty() && transfers.is_empty();
        for transfer in transfers {
            let group = &mut self.groups[usize::from(transfer.partition.0)];
            if group.voters.contains(&transfer.to) && group.outgoing.is_empty() {
                group.leader = transfer.to;
            }
        }
        !idle
    }

    fn check_step(&self, step: &Step) {
        let before = &self.map.targets[usize::from(step.partition.0)];
        let new: Vec<&ReplicaId> = step.target.iter().filter(|r| !before.contains(r)).collect();
        assert!(step.target.len() + 1 >= before.len(), "{step:?} from {before:?}");
        assert!(step.target.iter().all(|r| step.reason == Reason::Stalled
            || before.contains(r)
            || Some(*r) == step.added));
        if let Some(added) = step.added {
            assert!(new.contains(&&added));
            assert!(
                self.is_up(added.node()) && !self.map.draining.contains(&added.node()),
                "{step:?}"
            );
        }
    }

    fn under_way(&self) -> usize {
        let set = |list: &[ReplicaId]| list.iter().copied().collect::<BTreeSet<_>>();
        let busy = |(group, target): &(&Group, &Vec<ReplicaId>)| {
            !group.outgoing.is_empty()
                || !group.learners.is_empty()
                || set(&group.voters) != set(target)
        };
        self.groups.iter().zip(&self.map.targets).filter(busy).count()
    }

    fn layout(&self) -> Vec<Vec<NodeId>> {
        self.map.targets.iter().map(|list| list.iter().map(|r| r.node()).collect()).collect()
    }

    fn happen(&mut self, event: &Event) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        let pick = |index: &prop::sample::Index| nodes[index.index(nodes.len())];
        match event {
            Event::Join(zone) => {
                let place = place(self.next_node, *zone);
                self.next_node += 1;
                self.nodes.insert(place.node, (place, State::Up));
            }
            Event::Leave(index) => {
                let node = pick(index);
                if self.is_up(node) && self.can_lose(node) {
                    self.set(node, State::Away);
                }
            }
            Event::Declare(index) => {
                let node = pick(index);
                if self.nodes[&node].1 == State::Away {
                    self.set(node, State::Dead);
                }
            }
            Event::Return(index) => self.set(pick(index), State::Up),
            Event::Drain(index) => {
                self.map.draining.insert(pick(index));
            }
            Event::Keep(index) => {
                self.map.draining.remove(&pick(index));
            }
        }
    }

    fn set(&mut self, node: NodeId, state: State) {
        self.nodes.get_mut(&node).expect("a node that there is").1 = state;
    }
}

#[derive(Clone, Debug)]
enum Event {
    Join(usize),
    Leave(prop::sample::Index),
    Declare(prop::sample::Index),
    Return(prop::sample::Index),
    Drain(prop::sample::Index),
    Keep(prop::sample::Index),
}

fn event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        (0..4_usize).prop_map(Event::Join),
        index().prop_map(Event::Leave),
        index().prop_map(Event::Leave),
        index().prop_map(Event::Declare),
        index().prop_map(Event::Declare),
        index().prop_map(Event::Return),
        index().prop_map(Event::Drain),
        index().prop_map(Event::Keep),
    ]
}

proptest! {
    #[test]
    fn plans_lead_to_balance_and_never_through_a_lost_quorum(
        zones in prop::collection::vec(0..4_usize, 1..9),
        shift in 0..6_u32,
        r in 1..6_u8,
        seed in any::<u64>(),
        events in prop::collection::vec((event(), 0..6_usize), 0..25),
    ) {
        let mut world = World::new(&zones, 1 << shift, r, seed);
        for (event, turns) in &events {
            world.happen(event);
            for _ in 0..*turns {
                world.control();
                prop_assert!(world.under_way() <= MAX_MOVES);
                world.advance();
            }
        }
        for (_, state) in world.nodes.values_mut() {
            if *state == State::Away {
                *state = State::Dead;
            }
        }
        let (start, made) = (world.layout(), world.replicas_made);
        let mut quiet = 0;
        for _ in 0..3000 {
            quiet = if world.control() || world.under_way() > 0 { 0 } else { quiet + 1 };
            world.advance();
            if quiet == 3 {
                break;
            }
        }
        prop_assert_eq!(quiet, 3, "it comes to rest");
        let layout = world.layout();
        let usable: Vec<Placeable> =
            world.fleet().up.into_iter().filter(|place| !world.map.draining.contains(&place.node)).collect();
        if usable.len() >= usize::from(r) {
            check(&usable, r.into(), &layout);
            let made = world.replicas_made - made;
            let moved = moved(&start, &layout);
            prop_assert!(made <= moved + 2 + moved / 10, "{made} replicas made, {moved} in the end");
            for (group, target) in world.groups.iter().zip(&world.map.targets) {
                prop_assert_eq!(group.leader, target[0]);
            }
        }
    }
}
