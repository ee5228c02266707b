//! Each planted bug is found by a sweep of some hundred seeds at the most, and for what it breaks.

use flux_sim::check::Promise;
use flux_sim::plant::Plant;
use flux_sim::sweep::{Settings, sweep};

/// Seeds that a bug may take to be found.
const SEEDS: u64 = 500;

/// What a node breaks that forgets what it said: anything that is built on it.
const SAFETY: &[Promise] = &[
    Promise::Linearizable,
    Promise::Durable,
    Promise::Once,
    Promise::Versions,
    Promise::OneLeader,
    Promise::OneVote,
    Promise::LogMatching,
    Promise::Committed,
    Promise::DenseRevisions,
    Promise::EqualTables,
    Promise::OneLease,
    Promise::Intact,
    // Its leader believes it to have what it lost, and never sends it again.
    Promise::Recovers,
];
const READS: &[Promise] = &[Promise::OneLease, Promise::Linearizable, Promise::Once];

fn is_found(plant: Plant, promises: &[Promise]) {
    let settings = Settings { profile: plant.profile(), plant: Some(plant) };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let summary = sweep(0..SEEDS, settings, threads, 1, &|_, _, _| ());
    let failure = summary.failures.first();
    let failure = failure.unwrap_or_else(|| panic!("{plant:?} is not found by {SEEDS} seeds"));
    let found = failure.violations.iter().any(|one| promises.contains(&one.promise));
    assert!(found, "{plant:?}, seed {}: {:?}", failure.seed, failure.violations);
}

macro_rules! plants {
    ($($name:ident: $plant:ident breaks $promises:expr;)*) => {
        $(
            #[test]
            fn $name() {
                is_found(Plant::$plant, $promises);
            }
        )*
    };
}

plants! {
    skipped_sync: SkippedSync breaks SAFETY;
    votes_not_synced: VotesNotSynced breaks &[Promise::OneVote, Promise::OneLeader];
    acknowledge_before_commit: AcknowledgeBeforeCommit
        breaks &[Promise::Durable, Promise::Linearizable, Promise::Versions];
    wall_clock_lease: WallClockLease breaks READS;
    lease_ignores_drift: LeaseIgnoresDrift breaks READS;
    stale_clock: StaleClock breaks &[Promise::Linearizable];
    ticks_in_bursts: TicksInBursts breaks READS;
    vote_after_restart: VoteAfterRestart breaks READS;
    wake_untold: WakeUntold breaks READS;
    age_by_arrival: AgeByArrival breaks &[Promise::Fresh];
    serve_before_own_term: ServeBeforeOwnTerm breaks &[Promise::Linearizable];
    snapshot_at_wrong_index: SnapshotAtWrongIndex breaks SAFETY;
    snapshot_incomplete: SnapshotIncomplete breaks &[Promise::EqualTables];
    snapshot_without_sessions: SnapshotWithoutSessions
        breaks &[Promise::EqualTables, Promise::Once];
    answers_not_replicated: AnswersNotReplicated breaks &[Promise::Once];
    follower_expires: FollowerExpires breaks &[Promise::EqualTables];
    same_id_after_loss: SameIdAfterLoss breaks &[
        Promise::OneVote,
        Promise::OneLeader,
        Promise::Committed,
        Promise::Durable,
        Promise::Linearizable,
        // Its leader believes it to have what it lost, and never sends it again.
        Promise::Recovers,
    ];
    trimmed_too_far: TrimmedTooFar breaks &[Promise::Intact];
    cursor_before_confirm: CursorBeforeConfirm breaks &[Promise::CursorConfirmed];
    cursor_past_returned: CursorPastReturned breaks &[Promise::CursorConfirmed];
    next_before_confirm: NextBeforeConfirm breaks &[Promise::FeedOrdered];
    feed_before_commit: FeedBeforeCommit breaks &[Promise::FeedTrue];
    log_read_keeps_replaced: LogReadKeepsReplaced breaks &[Promise::FeedTrue];
    snapshot_without_cursor: SnapshotWithoutCursor breaks &[Promise::EqualTables, Promise::GapNeeded];
    trim_ignores_cursor: TrimIgnoresCursor breaks &[Promise::GapNeeded];
    gap_without_asking: GapWithoutAsking breaks &[Promise::GapNeeded];
    gap_without_rows: GapWithoutRows breaks &[Promise::FeedComplete];
    rows_of_later_versions: RowsOfLaterVersions breaks &[Promise::FeedTrue];
    ack_before_write: AckBeforeWrite breaks &[Promise::FeedComplete, Promise::FeedOrdered];
    no_dedup: NoDedup breaks &[Promise::FeedOrdered];
}
