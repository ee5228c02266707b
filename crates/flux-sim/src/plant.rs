//! Bugs that a run is given on purpose: a checker that does not find them is of no use.
//!
//! Each lives where the simulator drives the replica, as a mistake of a node's owner would.

use clap::ValueEnum;

/// A planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// Writes are reported persisted when they are written, and never synced.
    SkippedSync,
    /// A term and vote are reported persisted when they are written, and not synced for themselves.
    VotesNotSynced,
    /// A leader counts itself all voters: a write is committed, and acknowledged, when it is proposed.
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
    /// A new leader answers reads before it has applied all that earlier ones acknowledged.
    ServeBeforeOwnTerm,
    /// A received snapshot is installed at a later index than the one it holds.
    SnapshotAtWrongIndex,
    /// The contents of a received snapshot lack a chunk.
    SnapshotIncomplete,
    /// A follower drops expired keys by itself.
    FollowerExpires,
    /// A replica that was lost comes back under its old id, without its votes and log.
    SameIdAfterLoss,
    /// The log is trimmed though no snapshot holds what is in it.
    TrimmedTooFar,
}
