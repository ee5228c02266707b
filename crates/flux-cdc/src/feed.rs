//! The border between a node and the readers of its changes.
//!
//! What is read are committed changes only, of each partition in the order of its revisions, every
//! one. A reader that is slow costs the node nothing: what it needs may be gone when it comes, and
//! then it is told what it lost and gets the current values instead.
//!
//! What this module does not do: say where changes are kept, or hold a reader's place for it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use flux_proto::event::{Event, Gap, Place};
use tokio::sync::watch;

/// A future behind a pointer, so that [`Feed`] can be used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What comes after a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Dense from `after + 1`, never empty.
    Changes {
        /// The changes, in the order of their revisions.
        events: Vec<Event>,
        /// The place of the last one.
        through: Place,
    },
    /// `after + 1` is nowhere any more. Next: all pages of `rows(gap)`, then `read(gap.at.revision)`.
    Gap(Gap),
}

/// A page of current values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Keys with their values, as sets. May be empty on any page.
    pub events: Vec<Event>,
    /// Where the next page begins; none: this was the last one.
    pub next: Option<RowMark>,
}

/// Where a page of rows begins. Means something only to the feed that gave it, in the same gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowMark(pub u64);

/// A partition that this node leads and serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Led {
    /// The partition.
    pub partition: u16,
    /// The term in which it leads.
    pub term: u64,
    /// Up to where everything was confirmed when it began to lead.
    pub cursor: Place,
}

/// How much to read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The most events; one comes even if this is 0.
    pub events: usize,
    /// The most bytes of keys and values; one event comes however large it is.
    pub bytes: usize,
    /// Only what a power cut of this node cannot undo. For a reader that cannot take an event back.
    pub synced: bool,
    /// Only what this node has itself: no other node is asked for what its log lacks. For a reader that is
    /// another node, so that none asks on behalf of one that asks.
    pub here_only: bool,
}

/// Why a feed cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// The replica left, or never was of this node.
    #[error("this node has no replica of the partition")]
    NotHere,
    /// The table was replaced during a walk over its rows.
    #[error("the rows changed as a whole: the gap must begin anew")]
    Restart,
    /// What comes next is not in this node's log. Other nodes are asked for it, or one that has it is waited
    /// for: read again soon.
    #[error("what comes next is looked for at other nodes")]
    Later,
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopping,
    /// The log cannot be read back, and nobody else has what is missing.
    #[error("the log cannot be read back: {0}")]
    Log(String),
}

/// Committed changes, partition by partition.
pub trait Feed: Send + Sync + 'static {
    /// The name of the cluster.
    fn cluster(&self) -> &str;

    /// How many partitions the cluster has.
    fn partitions(&self) -> u16;

    /// What this node leads and serves; changes with leadership. `cursor` is the one applied when it
    /// began to lead.
    fn led(&self) -> watch::Receiver<Arc<[Led]>>;

    /// The newest revision that can be read now; none where the partition is not here.
    fn newest(&self, partition: u16) -> Option<u64>;

    /// What comes after a revision. Waits until there is something. Cancel-safe.
    ///
    /// # Errors
    /// Every one but [`FeedError::Restart`].
    fn read(
        &self,
        partition: u16,
        after: u64,
        limit: Limit,
    ) -> BoxFuture<'_, Result<Chunk, FeedError>>;

    /// Keys whose version is at most `at`, in the table's order, all of one position or none, so
    /// that a page may pass the limit. The first page is `from` none.
    ///
    /// # Errors
    /// [`FeedError::Restart`] where the pages would not belong together, and the others.
    fn rows<'a>(
        &'a self,
        gap: &'a Gap,
        from: Option<RowMark>,
        limit: Limit,
    ) -> BoxFuture<'a, Result<Rows, FeedError>>;

    /// The row of one key, as [`Feed::rows`] would have it; none where it has none.
    ///
    /// # Errors
    /// As of [`Feed::rows`].
    fn row(&self, gap: &Gap, key: &[u8]) -> Result<Option<Event>, FeedError>;

    /// A gap of nothing, for a snapshot and then what follows: `at` is what is applied now, and
    /// `lost` is 1 to `at`.
    ///
    /// # Errors
    /// [`FeedError::NotHere`] and [`FeedError::Stopping`].
    fn begin_rows(&self, partition: u16) -> Result<Gap, FeedError>;

    /// Everything up to here is confirmed. Cheap; the node puts it into the log by itself. Never
    /// goes back.
    fn advance(&self, partition: u16, to: Place);
}
