//! The links between nodes: how long a message takes, whether it arrives, and how often.
//!
//! It decides and moves nothing: the world puts what it decides into its queue of events.

use crate::random::Random;

/// How messages fare while nothing is cut off.
#[derive(Clone, Debug)]
pub struct LinkQuality {
    /// Least and most time that a message takes, in microseconds.
    pub delay_us: (u64, u64),
    /// Of a thousand messages so many are slow, by up to `slow_us`.
    pub slow_per_mille: u32,
    /// The most that a slow message takes, in microseconds.
    pub slow_us: u64,
    /// Of a thousand messages so many are lost.
    pub drop_per_mille: u32,
    /// Of a thousand messages so many arrive twice.
    pub duplicate_per_mille: u32,
    /// Whether messages of one link arrive in the order sent, as over TCP.
    pub in_order: bool,
}

/// All links of a number of hosts, each in its two directions.
#[derive(Debug)]
pub struct Network {
    hosts: usize,
    quality: LinkQuality,
    /// Directed: what is sent over a link that is cut is lost.
    cut: Vec<bool>,
    /// When the last message of a link arrives.
    last_us: Vec<u64>,
    random: Random,
    /// Messages that were lost and that came twice.
    pub lost: u64,
    /// Messages that came twice.
    pub duplicated: u64,
}

impl Network {
    /// A network without cuts.
    pub fn new(hosts: usize, quality: LinkQuality, random: Random) -> Network {
        let links = hosts * hosts;
        let (cut, last_us) = (vec![false; links], vec![0; links]);
        Network { hosts, quality, cut, last_us, random, lost: 0, duplicated: 0 }
    }

    /// Changes how messages fare from now on.
    pub fn set_quality(&mut self, quality: LinkQuality) {
        self.quality = quality;
    }

    /// Cuts one direction of a link.
    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut[from * self.hosts + to] = true;
    }

    /// Cuts both directions between every host of `group` and every host that is not in it.
    pub fn isolate(&mut self, group: &[usize]) {
        for &inside in group {
            for outside in (0..self.hosts).filter(|host| !group.contains(host)) {
                self.cut(inside, outside);
                self.cut(outside, inside);
            }
        }
    }

    /// Ends all cuts.
    pub fn heal(&mut self) {
        self.cut.fill(false);
    }

    /// Whether a direction of a link is not cut.
    pub fn reaches(&self, from: usize, to: usize) -> bool {
        !self.cut[from * self.hosts + to]
    }

    /// Whether something is cut.
    pub fn is_cut(&self) -> bool {
        self.cut.contains(&true)
    }

    /// When a message sent now arrives: never, once or twice.
    pub fn send(&mut self, now_us: u64, from: usize, to: usize) -> [Option<u64>; 2] {
        let link = from * self.hosts + to;
        if self.cut[link] || self.random.per_mille(self.quality.drop_per_mille) {
            self.lost += 1;
            return [None, None];
        }
        let first = self.arrival(now_us, link);
        if !self.random.per_mille(self.quality.duplicate_per_mille) {
            return [Some(first), None];
        }
        self.duplicated += 1;
        [Some(first), Some(self.arrival(now_us, link))]
    }

    fn arrival(&mut self, now_us: u64, link: usize) -> u64 {
        let (low, high) = self.quality.delay_us;
        let mut at = now_us + self.random.between(low, high);
        if self.random.per_mille(self.quality.slow_per_mille) {
            at += self.random.below(self.quality.slow_us);
        }
        if self.quality.in_order {
            at = at.max(self.last_us[link]);
            self.last_us[link] = at;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quality() -> LinkQuality {
        LinkQuality {
            delay_us: (100, 900),
            slow_per_mille: 100,
            slow_us: 50_000,
            drop_per_mille: 0,
            duplicate_per_mille: 0,
            in_order: false,
        }
    }

    fn arrivals(network: &mut Network) -> Vec<u64> {
        (0..500).filter_map(|at| network.send(at, 0, 1)[0]).collect()
    }

    #[test]
    fn order_is_kept_only_where_it_is_promised() {
        let mut network = Network::new(3, quality(), Random::new(1));
        assert!(!arrivals(&mut network).is_sorted());
        network.set_quality(LinkQuality { in_order: true, ..quality() });
        assert!(arrivals(&mut network).is_sorted());
    }

    #[test]
    fn cuts_have_a_direction_and_heal() {
        let mut network = Network::new(3, quality(), Random::new(1));
        network.cut(0, 1);
        assert_eq!(network.send(0, 0, 1), [None, None]);
        assert_ne!(network.send(0, 1, 0), [None, None]);
        network.isolate(&[2]);
        assert_eq!(network.send(0, 2, 1), [None, None]);
        assert_eq!(network.send(0, 0, 2), [None, None]);
        network.heal();
        assert!(!network.is_cut());
        assert_ne!(network.send(0, 0, 1), [None, None]);
        assert_eq!(network.lost, 3);
    }

    #[test]
    fn some_are_lost_and_some_come_twice() {
        let lossy = LinkQuality { drop_per_mille: 200, duplicate_per_mille: 200, ..quality() };
        let mut network = Network::new(2, lossy, Random::new(1));
        let sent: Vec<_> = (0..1000).map(|at| network.send(at, 0, 1)).collect();
        let lost = sent.iter().filter(|arrivals| **arrivals == [None, None]).count();
        let twice = sent.iter().filter(|arrivals| arrivals[1].is_some()).count();
        assert!((100..300).contains(&lost) && (100..300).contains(&twice), "{lost} and {twice}");
    }
}
