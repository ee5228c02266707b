//! Where a key lives: its slot, and the partition that owns the slot.
//!
//! Slots are those of Redis Cluster, so that cluster-aware clients agree with us: CRC16 (XMODEM) of
//! the key's hash tag, modulo 16384. A partition is a contiguous range of slots and one Raft group.

use std::fmt;
use std::ops::Range;

/// The number of slots, as in Redis Cluster.
pub const SLOTS: u16 = 16384;

/// A hash slot, 0 to 16383.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

/// A partition's number, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionId(pub u16);

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Slot {
    /// The slot of a key. Only the hash tag counts where there is one: the bytes between the first
    /// `{` and the next `}`, if there is at least one.
    pub fn of(key: &[u8]) -> Slot {
        Slot(crc16(hash_tag(key)) % SLOTS)
    }
}

/// How the slots are divided: a power of two of partitions, fixed when the data is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partitions {
    count: u16,
    shift: u32,
}

impl Partitions {
    /// `count` partitions, or `None` unless it is a power of two from 1 to 16384.
    pub fn new(count: u16) -> Option<Partitions> {
        let valid = count.is_power_of_two() && count <= SLOTS;
        valid.then(|| Partitions { count, shift: SLOTS.trailing_zeros() - count.trailing_zeros() })
    }

    /// The number of partitions.
    pub fn count(self) -> u16 {
        self.count
    }

    /// The partition that owns a slot.
    pub fn owner(self, slot: Slot) -> PartitionId {
        PartitionId(slot.0 >> self.shift)
    }

    /// The partition that owns a key.
    pub fn of(self, key: &[u8]) -> PartitionId {
        self.owner(Slot::of(key))
    }

    /// The slots of a partition.
    pub fn slots(self, partition: PartitionId) -> Range<u16> {
        partition.0 << self.shift..(partition.0 + 1) << self.shift
    }

    /// All partitions, in order.
    pub fn iter(self) -> impl Iterator<Item = PartitionId> {
        (0..self.count).map(PartitionId)
    }
}

fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&b| b == b'{') else {
        return key;
    };
    let rest = &key[open + 1..];
    match rest.iter().position(|&b| b == b'}') {
        Some(length) if length > 0 => &rest[..length],
        _ => key,
    }
}

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) as u8 ^ byte)])
}

/// CRC16/XMODEM: polynomial 0x1021, initial value 0.
const CRC16: [u16; 256] = {
    let mut table = [0u16; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = (index as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis_cluster() {
        // The check value of CRC16/XMODEM, then slots as `CLUSTER KEYSLOT` of Redis gives them.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(Slot::of(b"foo"), Slot(12182));
        assert_eq!(Slot::of(b"bar"), Slot(5061));
        assert_eq!(Slot::of(b"{foo}.one"), Slot(12182));
        assert_eq!(Slot::of(b"{}foo"), Slot(crc16(b"{}foo") % SLOTS));
        assert_eq!(Slot::of(b"a{b}{c}"), Slot::of(b"b"));
    }

    #[test]
    fn partitions_cover_every_slot_once() {
        for count in [1, 2, 16, 64, 1024, 16384] {
            let partitions = Partitions::new(count).expect("a power of two");
            for partition in partitions.iter() {
                for slot in partitions.slots(partition) {
                    assert_eq!(partitions.owner(Slot(slot)), partition);
                }
            }
            assert_eq!(partitions.slots(PartitionId(count - 1)).end, SLOTS);
        }
        assert_eq!(Partitions::new(0), None);
        assert_eq!(Partitions::new(3), None);
        assert_eq!(Partitions::new(32768), None);
    }
}
