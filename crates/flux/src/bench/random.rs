//! Seeded pseudo-random numbers, and the distributions of keys made of them.
//!
//! The same seed gives the same requests. Not for anything that must be hard to guess.

use std::{fmt, str::FromStr};

/// SplitMix64 (Steele, Lea and Flood, 2014): one addition and a mix for each number.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of one stream among many that share a seed.
    pub fn new(seed: u64, stream: u64) -> Random {
        Random(mix(seed ^ mix(stream.wrapping_add(1))))
    }

    /// Any 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which must not be 0. The bias is below `bound` / 2^64.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from 0 (included) to 1 (excluded).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// How often each key is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// All alike.
    Uniform,
    /// The k-th key in proportion to 1 / k^exponent.
    Zipf(f64),
}

const USUAL_EXPONENT: f64 = 0.99;

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Distribution, String> {
        match text.split_once(':') {
            None if text == "uniform" => Ok(Distribution::Uniform),
            None if text == "zipf" => Ok(Distribution::Zipf(USUAL_EXPONENT)),
            Some(("zipf", exponent)) => match exponent.parse::<f64>() {
                Ok(exponent) if exponent > 0.0 && exponent <= 10.0 => {
                    Ok(Distribution::Zipf(exponent))
                }
                _ => Err("the exponent of zipf must be over 0 and at most 10".into()),
            },
            _ => Err("must be uniform, zipf or zipf:EXPONENT".into()),
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Distribution::Uniform => write!(f, "uniform"),
            Distribution::Zipf(exponent) => write!(f, "zipf:{exponent}"),
        }
    }
}

/// Draws numbers from 0 on, the smaller ones more often, by rejection-inversion (Hörmann and
/// Derflinger, "Rejection-inversion to generate variates from monotone discrete distributions",
/// 1996): constant time and memory whatever the count.
#[derive(Clone, Debug)]
pub struct Zipf {
    count: f64,
    exponent: f64,
    integral_at_first: f64,
    integral_at_last: f64,
    /// Points closer than this to the right of their number are always taken.
    squeeze: f64,
}

impl Zipf {
    /// Numbers below `count`.
    pub fn new(count: u64, exponent: f64) -> Zipf {
        let mut zipf = Zipf {
            count: count as f64,
            exponent,
            integral_at_first: 0.0,
            integral_at_last: 0.0,
            squeeze: 0.0,
        };
        zipf.integral_at_first = zipf.integral(1.5) - 1.0;
        zipf.integral_at_last = zipf.integral(zipf.count + 0.5);
        zipf.squeeze = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.density(2.0));
        zipf
    }

    /// The next number.
    pub fn sample(&self, random: &mut Random) -> u64 {
        loop {
            let spread = self.integral_at_first - self.integral_at_last;
            let area = self.integral_at_last + random.unit() * spread;
            let point = self.inverse(area);
            let rank = point.round().clamp(1.0, self.count);
            if rank - point <= self.squeeze
                || area >= self.integral(rank + 0.5) - self.density(rank)
            {
                return rank as u64 - 1;
            }
        }
    }

    fn density(&self, x: f64) -> f64 {
        (-self.exponent * x.ln()).exp()
    }

    /// The integral of `density`, up to a constant: (x^(1-e) - 1) / (1-e), also where e is 1.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        let t = (1.0 - self.exponent) * log;
        let ratio = if t.abs() > 1e-8 { t.exp_m1() / t } else { 1.0 + t / 2.0 };
        ratio * log
    }

    fn inverse(&self, y: f64) -> f64 {
        let t = (y * (1.0 - self.exponent)).max(-1.0);
        let ratio = if t.abs() > 1e-8 { t.ln_1p() / t } else { 1.0 - t / 2.0 };
        (ratio * y).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_a_seed_differ_and_repeat() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.next(), random.next()]
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
    }

    #[test]
    fn below_reaches_every_number_about_as_often() {
        let mut random = Random::new(7, 0);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[random.below(10) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn zipf_follows_its_law() {
        for exponent in [0.5, 0.99, 1.0, 1.5] {
            let (keys, draws) = (1000u64, 200_000u32);
            let zipf = Zipf::new(keys, exponent);
            let mut random = Random::new(3, 0);
            let mut counts = vec![0u32; keys as usize];
            for _ in 0..draws {
                counts[zipf.sample(&mut random) as usize] += 1;
            }
            let total: f64 = (1..=keys).map(|rank| (rank as f64).powf(-exponent)).sum();
            for rank in [1u64, 2, 3, 10] {
                let expected = f64::from(draws) * (rank as f64).powf(-exponent) / total;
                let seen = f64::from(counts[rank as usize - 1]);
                // Five standard deviations.
                let tolerance = 5.0 * expected.sqrt();
                assert!(
                    (seen - expected).abs() < tolerance,
                    "{exponent} {rank}: {seen} {expected}"
                );
            }
            assert!(counts[500..].iter().sum::<u32>() > 0);
        }
    }

    #[test]
    fn zipf_over_one_key_or_a_billion_stays_within_them() {
        let mut random = Random::new(1, 1);
        assert_eq!(Zipf::new(1, 0.99).sample(&mut random), 0);
        let many = Zipf::new(1_000_000_000, 0.99);
        assert!((0..10_000).all(|_| many.sample(&mut random) < 1_000_000_000));
    }

    #[test]
    fn distributions_are_read_and_written() {
        for (text, distribution) in [
            ("uniform", Distribution::Uniform),
            ("zipf", Distribution::Zipf(0.99)),
            ("zipf:1.2", Distribution::Zipf(1.2)),
        ] {
            assert_eq!(text.parse(), Ok(distribution));
            assert_eq!(distribution.to_string().parse(), Ok(distribution));
        }
        for text in ["", "zipf:", "zipf:0", "zipf:-1", "zipf:nan", "zipf:11", "normal"] {
            assert!(text.parse::<Distribution>().is_err(), "{text}");
        }
    }
}
