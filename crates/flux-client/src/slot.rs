//! Where a key lives: its slot as in Redis Cluster, and the partition that the slot falls into.
//!
//! What this module does not do: know who leads a partition.

/// The number of slots.
const SLOTS: u16 = 16384;

/// Whether there can be so many partitions: a power of two, up to one for each slot.
pub(crate) fn is_partition_count(count: usize) -> bool {
    count.is_power_of_two() && count <= usize::from(SLOTS)
}

/// The partition of a key, where the slots are divided into so many: see INFO in docs/protocol.md.
pub(crate) fn partition_of(key: &[u8], partitions: u16) -> u16 {
    let slot = u32::from(crc16(hash_tag(key)) % SLOTS);
    // Both factors are at most 16384, and so the quotient is less than `partitions`.
    (slot * u32::from(partitions) / u32::from(SLOTS)) as u16
}

/// The bytes between the first `{` and the next `}`, if there is at least one; else the key.
fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&byte| byte == b'{') else {
        return key;
    };
    let rest = &key[open + 1..];
    match rest.iter().position(|&byte| byte == b'}') {
        Some(length) if length > 0 => &rest[..length],
        _ => key,
    }
}

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) as u8 ^ byte)])
}

/// CRC16/XMODEM: polynomial 0x1021, initial value 0.
const CRC16: [u16; 256] = {
    let mut table = [0_u16; 256];
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
        let slot = |key| partition_of(key, SLOTS);
        assert_eq!(slot(b"foo"), 12182);
        assert_eq!(slot(b"bar"), 5061);
        assert_eq!(slot(b"{foo}.one"), 12182);
        assert_eq!(slot(b"a{b}{c}"), slot(b"b"));
        assert_eq!(slot(b"{}foo"), crc16(b"{}foo") % SLOTS);
    }

    #[test]
    fn partitions_are_ranges_of_slots() {
        assert_eq!(partition_of(b"foo", 1), 0);
        assert_eq!(partition_of(b"foo", 16), 12182 / 1024);
        assert_eq!(partition_of(b"bar", 64), 5061 / 256);
        let counts = (0..20_000).filter(|&count| is_partition_count(count)).count();
        assert_eq!(counts, 15);
    }
}
