//! The process's own log, on standard error. Metrics are the server's and the gateway's.

use std::io::{self, IsTerminal};

use flux_server::config::{LogFormat, LogLevel, Settings};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

/// Starts logging as the settings say.
pub fn start(settings: &Settings) {
    let level = match settings.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Libraries say at DEBUG and TRACE what only their developers want to know. The AMQP client calls
    // every lost connection an error; who uses it says what that means, once.
    let filter = Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        .with_target("lapin", LevelFilter::OFF)
        .with_target("flux", level);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match settings.log_format {
        LogFormat::Text => registry.with(layer.with_ansi(io::stderr().is_terminal())).init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).init(),
    }
}
