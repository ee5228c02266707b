//! What clients did and saw: the operations on each key, with their times.

use std::collections::BTreeMap;
use std::fmt;

/// Values that clients write are multiples of this, and what they add together is less: so a value says
/// which write it came from, and what was added to it since.
pub const VALUE_STEP: i64 = 1 << 36;

/// A key of the workload: a partition and a number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The partition it belongs to.
    pub partition: u16,
    /// Which of the partition's keys.
    pub number: u16,
}

impl Key {
    /// The bytes of the key.
    pub fn bytes(self) -> Vec<u8> {
        self.to_string().into_bytes()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}/k{}", self.partition, self.number)
    }
}

/// What a client asked of a key. All values are decimal numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A linearizable read.
    Get,
    /// An unconditional write.
    Set(i64),
    /// A write if the key is absent.
    SetIfAbsent(i64),
    /// A write if the key has the version; 0 means absent.
    SetIfVersion(u64, i64),
    /// A removal.
    Delete,
    /// An addition; an absent key counts as 0.
    Increment(i64),
}

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To `Get`: value and version, `None` for absent.
    Value(Option<(i64, u64)>),
    /// The write took place and gave the key this version.
    Written(u64),
    /// The condition did not hold; the key has this version, 0 for absent.
    NotWritten(u64),
    /// To `Delete`: whether the key was there.
    Deleted(bool),
    /// To `Increment`: the sum, and the version it gave the key.
    Counter(i64, u64),
}

/// One operation, from the moment it was first sent to the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Who asked.
    pub client: u32,
    /// What was asked.
    pub call: Call,
    /// When it was first sent, in true microseconds.
    pub invoked_us: u64,
    /// Session and sequence of a write that is repeated until it is answered.
    pub once: Option<(u64, u64)>,
    /// When the answer came and what it was. `None`: the outcome is unknown, it may take effect at any
    /// time from `invoked_us` on, or never.
    pub returned: Option<(u64, Answer)>,
}

impl Operation {
    /// The value that it writes, if that is no other operation's.
    pub fn own_value(&self) -> Option<i64> {
        match self.call {
            Call::Set(value) | Call::SetIfAbsent(value) | Call::SetIfVersion(_, value) => {
                Some(value)
            }
            Call::Get | Call::Delete | Call::Increment(_) => None,
        }
    }

    /// The version that the operation is known to have given its key.
    pub fn written_version(&self) -> Option<u64> {
        match self.returned? {
            (_, Answer::Written(version) | Answer::Counter(_, version)) => Some(version),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {:<3} {:>10.6} .. ", self.client, self.invoked_us as f64 / 1e6)?;
        match self.returned {
            Some((at, answer)) => {
                write!(f, "{:>10.6}  {:?} -> {answer:?}", at as f64 / 1e6, self.call)
            }
            None => write!(f, "{:>10}  {:?} -> outcome unknown", "", self.call),
        }
    }
}

/// All operations of a run that took effect or may have, by key.
#[derive(Clone, Debug, Default)]
pub struct History {
    keys: BTreeMap<Key, Vec<Operation>>,
}

impl History {
    /// Adds an operation. Leave out reads without an answer and writes that were refused: neither
    /// changes anything, and a refused write that takes effect all the same then shows as a fault.
    pub fn add(&mut self, key: Key, operation: Operation) {
        self.keys.entry(key).or_default().push(operation);
    }

    /// Keys in order, with their operations in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = (Key, &[Operation])> {
        self.keys.iter().map(|(key, operations)| (*key, operations.as_slice()))
    }

    /// Leaves out operations for which `keep` is false.
    pub fn retain(&mut self, mut keep: impl FnMut(&Operation) -> bool) {
        self.keys.values_mut().for_each(|operations| operations.retain(|one| keep(one)));
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.keys.values().map(Vec::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}
