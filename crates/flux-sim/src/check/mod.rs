//! What must be true of a run, whatever happened to the cluster.
//!
//! The checkers see what clients saw and what replicas did. They know nothing of faults, and are
//! tested by themselves on histories that are wrong.

pub mod consensus;
pub mod feed;
pub mod history;
pub mod linear;
pub mod reference;
pub mod register;
pub mod versions;

use std::fmt;

/// Something that must never be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which promise was broken.
    pub promise: Promise,
    /// What shows it, for a person to read; may have several lines.
    pub evidence: String,
}

/// The promises that are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// Each key behaves as one register that operations change one after the other.
    Linearizable,
    /// The search for an order of a key's operations took too long; not known to be wrong.
    Undecided,
    /// An acknowledged write is in the committed history, where its version says.
    Durable,
    /// A write takes effect once at the most.
    Once,
    /// Versions of a partition are unique, and rise with time.
    Versions,
    /// A term has at most one leader.
    OneLeader,
    /// A replica votes for one candidate in a term.
    OneVote,
    /// Entries of the same index and term are the same, and so is all before them.
    LogMatching,
    /// A committed entry is never another one.
    Committed,
    /// Effects have the revisions 1, 2, 3, … without holes.
    DenseRevisions,
    /// Replicas at the same index have the same table.
    EqualTables,
    /// A replica is not further behind than it says.
    Fresh,
    /// At most one replica of a partition holds a lease.
    OneLease,
    /// What the broker has of a change is the committed one.
    FeedTrue,
    /// Changes come to the broker in the order of their revisions, without a hole.
    FeedOrdered,
    /// The broker has all changes in the end, and what follows from them is the table.
    FeedComplete,
    /// Changes are lost to the broker only where the log that has them had to go.
    GapNeeded,
    /// The cursor passes only what the broker has.
    CursorConfirmed,
    /// Recent changes take no more memory than they may.
    RingBounded,
    /// Once faults have ended, the cluster works and its replicas agree.
    Recovers,
    /// The program does not break by itself.
    Intact,
}

impl Violation {
    /// A broken promise with what shows it.
    pub fn new(promise: Promise, evidence: impl Into<String>) -> Violation {
        Violation { promise, evidence: evidence.into() }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Promise::Linearizable => "not linearizable",
            Promise::Undecided => "linearizability undecided",
            Promise::Durable => "acknowledged write lost",
            Promise::Once => "a write took effect twice",
            Promise::Versions => "versions out of order",
            Promise::OneLeader => "two leaders in one term",
            Promise::OneVote => "two votes in one term",
            Promise::LogMatching => "logs do not match",
            Promise::Committed => "committed entry changed",
            Promise::DenseRevisions => "revisions not dense",
            Promise::EqualTables => "tables differ at the same index",
            Promise::Fresh => "older than it says",
            Promise::OneLease => "two leases at once",
            Promise::FeedTrue => "the broker has what was not committed",
            Promise::FeedOrdered => "changes out of order",
            Promise::FeedComplete => "changes are missing",
            Promise::GapNeeded => "a gap without need",
            Promise::CursorConfirmed => "the cursor is ahead of the broker",
            Promise::RingBounded => "recent changes take too much",
            Promise::Recovers => "does not recover",
            Promise::Intact => "broken",
        })
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise, self.evidence)
    }
}
