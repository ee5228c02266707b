//! Which request comes next: the mix of operations, the choice of keys, and their bytes.

use std::{fmt, str::FromStr};

use super::random::{Distribution, Random, Zipf};

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Writes a value.
    Set,
    /// Reads a value.
    Get,
    /// Adds 1 to a counter; counters have keys of their own.
    Incr,
    /// Removes a key.
    Del,
}

impl Operation {
    /// Every operation, in the order of reports.
    pub const ALL: [Operation; 4] =
        [Operation::Set, Operation::Get, Operation::Incr, Operation::Del];

    /// The name in a mix and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Set => "set",
            Operation::Get => "get",
            Operation::Incr => "incr",
            Operation::Del => "del",
        }
    }
}

/// How many of each operation there are, in proportion to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    weights: [u32; 4],
}

impl Mix {
    /// Only this operation.
    pub fn only(operation: Operation) -> Mix {
        let mut weights = [0; 4];
        weights[operation as usize] = 1;
        Mix { weights }
    }

    fn total(&self) -> u64 {
        self.weights.iter().map(|weight| u64::from(*weight)).sum()
    }

    fn pick(&self, random: &mut Random) -> Operation {
        let mut left = random.below(self.total());
        for operation in Operation::ALL {
            let weight = u64::from(self.weights[operation as usize]);
            if left < weight {
                return operation;
            }
            left -= weight;
        }
        unreachable!("a number below the sum of the weights falls on one of them")
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Mix, String> {
        let mut weights = [0; 4];
        for part in text.split(',') {
            let (name, weight) = part.trim().split_once('=').unwrap_or((part.trim(), "1"));
            let operation =
                Operation::ALL.into_iter().find(|operation| operation.name() == name).ok_or_else(
                    || format!("`{name}` is no operation: set, get, incr and del are"),
                )?;
            let slot = &mut weights[operation as usize];
            if *slot != 0 {
                return Err(format!("`{name}` is given twice"));
            }
            *slot =
                weight.parse().ok().filter(|weight| *weight <= 1_000_000).ok_or_else(|| {
                    format!("the weight of `{name}` must be a number up to 1000000")
                })?;
        }
        let mix = Mix { weights };
        if mix.total() == 0 { Err("all weights are 0".into()) } else { Ok(mix) }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for operation in Operation::ALL {
            let weight = self.weights[operation as usize];
            if weight > 0 {
                write!(f, "{separator}{}={weight}", operation.name())?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// What all lanes of a phase have in common.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The operations.
    pub mix: Mix,
    /// How keys are chosen; `None` for each once, in order.
    pub distribution: Option<Distribution>,
    /// How many keys there are.
    pub keys: u64,
    /// The length of a key.
    pub key_size: usize,
    /// The length of a value.
    pub value_size: usize,
    /// When a written key expires.
    pub ttl_ms: Option<u64>,
    /// Where all randomness comes from.
    pub seed: u64,
}

impl Shape {
    /// The least length of a key that tells `keys` keys apart.
    pub fn least_key_size(keys: u64) -> usize {
        PREFIX_BYTES + digits(keys.saturating_sub(1))
    }
}

fn digits(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// One request, ready to be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What it does.
    pub operation: Operation,
    /// To which key.
    pub key: &'a [u8],
    /// What `Set` writes.
    pub value: &'a [u8],
    /// When what `Set` writes expires.
    pub ttl_ms: Option<u64>,
}

const PREFIX_BYTES: usize = 4;
const VALUE_PREFIX: &[u8; PREFIX_BYTES] = b"key:";
const COUNTER_PREFIX: &[u8; PREFIX_BYTES] = b"ctr:";

enum Choice {
    InOrder { next: u64, step: u64 },
    Uniform,
    Zipf(Zipf),
}

/// The endless requests of one lane.
pub struct Workload {
    shape: Shape,
    random: Random,
    choice: Choice,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl Workload {
    /// The requests of lane `lane` of `lanes`.
    pub fn new(shape: Shape, lane: u64, lanes: u64) -> Workload {
        let mut random = Random::new(shape.seed, lane);
        let choice = match shape.distribution {
            None => Choice::InOrder { next: lane, step: lanes },
            Some(Distribution::Uniform) => Choice::Uniform,
            Some(Distribution::Zipf(exponent)) => Choice::Zipf(Zipf::new(shape.keys, exponent)),
        };
        let value = (0..shape.value_size).map(|_| b'a' + random.below(26) as u8).collect();
        let key = vec![b'0'; shape.key_size];
        Workload { shape, random, choice, key, value }
    }

    /// The next request.
    pub fn next(&mut self) -> Request<'_> {
        let number = match &mut self.choice {
            Choice::InOrder { next, step } => {
                let number = *next % self.shape.keys;
                *next += *step;
                number
            }
            Choice::Uniform => self.random.below(self.shape.keys),
            Choice::Zipf(zipf) => zipf.sample(&mut self.random),
        };
        let operation = self.shape.mix.pick(&mut self.random);
        write_key(&mut self.key, operation, number);
        let ttl_ms = self.shape.ttl_ms;
        Request { operation, key: &self.key, value: &self.value, ttl_ms }
    }
}

/// A prefix and the number, with as many leading zeros as the key is long.
fn write_key(key: &mut [u8], operation: Operation, mut number: u64) {
    let prefix = if operation == Operation::Incr { COUNTER_PREFIX } else { VALUE_PREFIX };
    key[..PREFIX_BYTES].copy_from_slice(prefix);
    for digit in key[PREFIX_BYTES..].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn shape(mix: &str, distribution: Option<Distribution>) -> Shape {
        Shape {
            mix: mix.parse().expect("a good mix"),
            distribution,
            keys: 100,
            key_size: 16,
            value_size: 8,
            ttl_ms: None,
            seed: 1,
        }
    }

    #[test]
    fn mixes_are_read_and_written() {
        let mix: Mix = "set=50, get=50".parse().unwrap();
        assert_eq!(mix.to_string(), "set=50,get=50");
        assert_eq!("get".parse(), Ok(Mix::only(Operation::Get)));
        for (text, problem) in [
            ("", "`` is no operation"),
            ("put=1", "`put` is no operation"),
            ("set=x", "the weight of `set`"),
            ("set=-1", "the weight of `set`"),
            ("set=0", "all weights are 0"),
            ("set=1,set=2", "`set` is given twice"),
        ] {
            let error = text.parse::<Mix>().unwrap_err();
            assert!(error.starts_with(problem), "{text}: {error}");
        }
    }

    #[test]
    fn operations_come_in_proportion() {
        let mut workload = Workload::new(shape("set=10,get=30", Some(Distribution::Uniform)), 0, 1);
        let sets = (0..10_000).filter(|_| workload.next().operation == Operation::Set).count();
        assert!((2_250..2_750).contains(&sets), "{sets}");
    }

    #[test]
    fn keys_in_order_are_each_written_once_by_all_lanes() {
        let mut seen = BTreeSet::new();
        for lane in 0..3 {
            let mut workload = Workload::new(shape("set", None), lane, 3);
            for _ in 0..(100 - lane).div_ceil(3) {
                assert!(seen.insert(workload.next().key.to_vec()));
            }
        }
        assert_eq!(seen.len(), 100);
        assert_eq!(seen.first().unwrap(), b"key:000000000000");
        assert_eq!(seen.last().unwrap(), b"key:000000000099");
    }

    #[test]
    fn counters_have_keys_of_their_own() {
        let mut workload = Workload::new(shape("incr", Some(Distribution::Zipf(0.99))), 0, 1);
        assert!(workload.next().key.starts_with(b"ctr:"));
        assert_eq!(Shape::least_key_size(100), 6);
        assert_eq!(Shape::least_key_size(101), 7);
        assert_eq!(Shape::least_key_size(1), 5);
    }
}
