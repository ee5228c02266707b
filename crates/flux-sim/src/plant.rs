//! Bugs that a run is given on purpose: a checker that does not find them is of no use.
//!
//! Each lives where the simulator drives the replica, as a mistake of a node's owner would.

use clap::ValueEnum;

use crate::plan::{Fault, Profile};

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// Writes are reported persisted when they are written, and never synced.
    SkippedSync,
    /// A term and vote are reported persisted when they are written, and not synced for themselves.
    VotesNotSynced,
    /// A write is acknowledged when it is proposed.
    AcknowledgeBeforeCommit,
    /// Leases are judged by the wall clock.
    WallClockLease,
    /// Leases are not shortened for clocks that run at different speeds.
    LeaseIgnoresDrift,
    /// A node that was stopped answers reads by the time at which it was stopped.
    StaleClock,
    /// A node that was stopped makes up for the ticks that it missed.
    TicksInBursts,
    /// A node forgets at each start that it may have promised its vote.
    VoteAfterRestart,
    /// A replica that wakes up does not tell its leader, and its node goes on answering beats.
    WakeUntold,
    /// A follower that sleeps counts its age from when an answer to a beat came, not from when it asked.
    AgeByArrival,
    /// A new leader answers reads before it has applied all that earlier ones acknowledged.
    ServeBeforeOwnTerm,
    /// A received snapshot is installed at a later index than the one it holds.
    SnapshotAtWrongIndex,
    /// The contents of a received snapshot lack a chunk.
    SnapshotIncomplete,
    /// The sessions of a received snapshot are dropped.
    SnapshotWithoutSessions,
    /// What a session was answered is known to the node that answered it, and to no other.
    AnswersNotReplicated,
    /// A follower drops expired keys by itself.
    FollowerExpires,
    /// A replica that was lost comes back under its old id, without its votes and log.
    SameIdAfterLoss,
    /// The log is trimmed though no snapshot holds what is in it.
    TrimmedTooFar,
    /// The cursor passes what was sent to the broker, before that is confirmed.
    CursorBeforeConfirm,
    /// The cursor passes what the broker returned because no queue takes it.
    CursorPastReturned,
    /// What comes next is sent before the broker has confirmed what came before.
    NextBeforeConfirm,
    /// Changes are passed on when they are written, before they are committed.
    FeedBeforeCommit,
    /// Where entries of the log were replaced, the first ones are read back and not the last.
    LogReadKeepsReplaced,
    /// The cursor of a received snapshot is dropped.
    SnapshotWithoutCursor,
    /// The log is trimmed though the broker does not have what is in it.
    TrimIgnoresCursor,
    /// What the log lacks is told as a gap, and nobody else is asked for it.
    GapWithoutAsking,
    /// The values that stand for what is lost in a gap are left out.
    GapWithoutRows,
    /// Among those values are such that were written after the gap.
    RowsOfLaterVersions,
    /// The consumer acknowledges what it has not written yet.
    AckBeforeWrite,
    /// The consumer writes whatever comes.
    NoDedup,
}

impl Plant {
    /// The weather in which the bug shows soonest.
    pub fn profile(self) -> Profile {
        match self {
            Plant::WallClockLease | Plant::LeaseIgnoresDrift | Plant::StaleClock => Profile::Clocks,
            Plant::TicksInBursts | Plant::VoteAfterRestart | Plant::ServeBeforeOwnTerm => {
                Profile::Clocks
            }
            Plant::WakeUntold | Plant::AgeByArrival => Profile::Quiet,
            Plant::VotesNotSynced => Profile::Elections,
            Plant::SnapshotAtWrongIndex
            | Plant::SnapshotIncomplete
            | Plant::SnapshotWithoutSessions => Profile::Members,
            Plant::SameIdAfterLoss => Profile::Storm,
            Plant::CursorBeforeConfirm
            | Plant::CursorPastReturned
            | Plant::NextBeforeConfirm
            | Plant::FeedBeforeCommit
            | Plant::LogReadKeepsReplaced
            | Plant::SnapshotWithoutCursor
            | Plant::TrimIgnoresCursor
            | Plant::GapWithoutAsking
            | Plant::GapWithoutRows
            | Plant::RowsOfLaterVersions
            | Plant::AckBeforeWrite
            | Plant::NoDedup => Profile::Feed,
            _ => Profile::Mixed,
        }
    }

    /// The faults that must come together for the bug to show, where any others would only be in the way.
    pub fn faults(self) -> Option<&'static [Fault]> {
        match self {
            Plant::VoteAfterRestart => Some(&[Fault::OneWay, Fault::Kill]),
            Plant::TicksInBursts => Some(&[Fault::OneWay, Fault::Freeze]),
            _ => None,
        }
    }
}
