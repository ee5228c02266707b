//! Starts the publisher of a node that has a broker.

use std::sync::Arc;

use flux_cdc::{Feed, Metrics, Publisher, PublisherConfig};

use super::NodeFeed;
use crate::config::Settings;

/// Changes that are read and not confirmed, in bytes.
const IN_FLIGHT_BYTES: usize = 16 * 1024 * 1024;

/// The publisher, and what it counts; none where no broker is set.
pub(crate) fn start(
    feed: &Arc<NodeFeed>,
    settings: &Settings,
) -> Option<(Publisher, Arc<Metrics>)> {
    let url = settings.rabbitmq_url.clone()?;
    let config = PublisherConfig {
        url,
        exchange: settings.cdc_exchange.clone(),
        batch_max_events: settings.cdc_batch_max_events,
        in_flight_bytes: IN_FLIGHT_BYTES,
    };
    let metrics = Arc::new(Metrics::default());
    let feed = Arc::clone(feed) as Arc<dyn Feed>;
    Some((Publisher::start(feed, config, Arc::clone(&metrics)), metrics))
}
