//! Commands that concern the node as a whole, and their replies.

use flux_core::{PartitionId, Slot};
use flux_proto::resp::{Args, write};

use super::Session;

/// A command that needs more than one partition's table.
#[derive(Debug)]
pub enum NodeCommand<'a> {
    /// The number of keys. `NodeReply::Integer`.
    KeyCount,
    /// All keys that match a glob pattern. `NodeReply::Keys`.
    Keys {
        /// The pattern.
        pattern: &'a [u8],
    },
    /// A page of keys. `NodeReply::Page`.
    Scan {
        /// Where the page starts; its partition exists.
        cursor: ScanCursor,
        /// Only keys that match this glob pattern.
        pattern: Option<&'a [u8]>,
        /// How many keys to look at, about; at least 1.
        count: usize,
    },
    /// The keys of a slot that this node holds. `NodeReply::Integer`, or `NodeReply::Keys` if they are to
    /// be listed.
    KeysInSlot {
        /// The slot.
        slot: Slot,
        /// How many keys to list; none to count them all.
        list: Option<usize>,
    },
    /// Some key. `NodeReply::Key`.
    RandomKey,
    /// Deletes all keys. `NodeReply::Ok`.
    Flush,
    /// Figures of the node. `NodeReply::Text` of `info(sections, …)`.
    Info {
        /// The names of the sections; none for the default ones.
        sections: Args<'a>,
    },
    /// The connections, a `Session::line` for each. `NodeReply::Text`.
    ClientList {
        /// Only these connections.
        ids: Option<Vec<u64>>,
    },
    /// Closes connections. `NodeReply::Integer`: how many; or, if `reply_ok`, `Ok` or
    /// `NodeReply::Error("ERR No such client")`.
    ClientKill {
        /// Which ones.
        filter: ClientFilter<'a>,
        /// The old form of the command.
        reply_ok: bool,
    },
    /// Changes settings. `NodeReply::Ok`.
    Configure {
        /// The time after which an idle connection is closed, in seconds; 0 for never.
        timeout_s: Option<u64>,
        /// The most connections.
        max_clients: Option<usize>,
    },
    /// Sets the counters to zero. `NodeReply::Ok`.
    ResetStats,
    /// Lets the connection wait, and nobody else. `NodeReply::Ok`.
    Sleep {
        /// How long.
        milliseconds: u64,
    },
}

/// Which connections a command means: those for which all that is given holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientFilter<'a> {
    /// The number of the connection.
    pub id: Option<u64>,
    /// The client's address.
    pub peer: Option<&'a [u8]>,
    /// The address that the client connected to.
    pub local: Option<&'a [u8]>,
    /// The connection that asks is not meant.
    pub skip_me: bool,
}

impl ClientFilter<'_> {
    /// Whether a connection is meant; `asking` is the number of the one that asks.
    pub fn matches(&self, id: u64, peer: &str, local: &str, asking: u64) -> bool {
        self.id.is_none_or(|wanted| wanted == id)
            && self.peer.is_none_or(|wanted| wanted == peer.as_bytes())
            && self.local.is_none_or(|wanted| wanted == local.as_bytes())
            && !(self.skip_me && id == asking)
    }
}

/// Where SCAN goes on. As a number, 0 is the start and the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanCursor {
    /// The partition.
    pub partition: PartitionId,
    /// The position in its table.
    pub position: u32,
}

impl ScanCursor {
    /// The number that a client sees: under 2^46, which fits a double, as some clients keep it.
    pub fn number(self) -> u64 {
        u64::from(self.position) << 14 | u64::from(self.partition.0 & 0x3fff)
    }

    /// The cursor of a number; `None` if no cursor has it.
    pub fn from_number(number: u64) -> Option<ScanCursor> {
        let position = u32::try_from(number >> 14).ok()?;
        Some(ScanCursor { partition: PartitionId((number & 0x3fff) as u16), position })
    }

    pub(super) fn parse(text: &[u8]) -> Option<ScanCursor> {
        // Unlike other integers, a cursor may have leading zeros.
        let digits = text.iter().all(u8::is_ascii_digit);
        let number = str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()?;
        ScanCursor::from_number(number)
    }
}

/// The answer to a `NodeCommand`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeReply {
    /// `OK`.
    Ok,
    /// A number.
    Integer(i64),
    /// A key, if there is one.
    Key(Option<Vec<u8>>),
    /// Keys.
    Keys(Vec<Vec<u8>>),
    /// A page of keys.
    Page {
        /// Where the next one starts; none at the end.
        next: Option<ScanCursor>,
        /// The keys of this one.
        keys: Vec<Vec<u8>>,
    },
    /// Text for people.
    Text(String),
    /// An error, its code first.
    Error(String),
    /// An error of a partition.
    Failed(flux_core::Error),
}

/// Renders the reply of a `NodeCommand`.
pub fn render_node(reply: &NodeReply, session: &Session, out: &mut Vec<u8>) {
    match reply {
        NodeReply::Ok => write::simple(out, "OK"),
        NodeReply::Integer(number) => write::integer(out, *number),
        NodeReply::Key(Some(key)) => write::bulk(out, key),
        NodeReply::Key(None) => write::null(out, session.version),
        NodeReply::Keys(keys) => bulks(out, keys),
        NodeReply::Page { next, keys } => {
            write::array(out, 2);
            let number = next.map_or(0, ScanCursor::number);
            write::bulk_integer(out, number.cast_signed());
            bulks(out, keys);
        }
        NodeReply::Text(text) => write::verbatim(out, *b"txt", text.as_bytes(), session.version),
        NodeReply::Error(text) => write::error(out, text),
        NodeReply::Failed(error) => write::error(out, &super::errors::text(error)),
    }
}

fn bulks(out: &mut Vec<u8>, keys: &[Vec<u8>]) {
    write::array(out, keys.len());
    for key in keys {
        write::bulk(out, key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_convert_back_and_only_the_start_is_zero() {
        for partition in [0, 1, 15, 16383] {
            for position in [0, 1, u32::MAX] {
                let cursor = ScanCursor { partition: PartitionId(partition), position };
                assert_eq!(ScanCursor::from_number(cursor.number()), Some(cursor));
                assert_eq!(cursor.number() == 0, (partition, position) == (0, 0));
                assert!(cursor.number() < 1 << 46);
            }
        }
        assert_eq!(ScanCursor::from_number(1 << 46), None);
        let parsed = |text: &[u8]| ScanCursor::parse(text).map(ScanCursor::number);
        assert_eq!(parsed(b"00"), Some(0));
        assert_eq!(parsed(b"16385"), Some(16385));
        for text in [&b""[..], b"x", b"-1", b"+1", b" 1", b"18446744073709551616", b"\xff"] {
            assert_eq!(parsed(text), None);
        }
    }

    #[test]
    fn a_filter_means_those_for_which_all_holds() {
        let filter = ClientFilter { peer: Some(b"a:1"), skip_me: true, ..ClientFilter::default() };
        assert!(filter.matches(7, "a:1", "b:2", 8));
        assert!(!filter.matches(7, "a:2", "b:2", 8));
        assert!(!filter.matches(7, "a:1", "b:2", 7));
        let filter = ClientFilter { id: Some(7), local: Some(b"b:2"), ..ClientFilter::default() };
        assert!(filter.matches(7, "a:1", "b:2", 7));
        assert!(!filter.matches(7, "a:1", "b:3", 8));
        assert!(!filter.matches(8, "a:1", "b:2", 8));
    }
}
