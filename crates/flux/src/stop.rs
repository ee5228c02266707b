//! SIGINT and SIGTERM: the first asks for a graceful stop, the second ends the process at once.

use std::{io, process};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals, listened to from `Stop::listen` on.
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

/// What an exit code adds to the number of the signal that ended a process.
const SIGNALLED: i32 = 128;

impl Stop {
    /// Takes the signals over. Needs a tokio runtime.
    pub fn listen() -> io::Result<Stop> {
        Ok(Stop {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for a signal; its name and number.
    pub async fn requested(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.interrupt.recv() => ("SIGINT", SignalKind::interrupt().as_raw_value()),
            _ = self.terminate.recv() => ("SIGTERM", SignalKind::terminate().as_raw_value()),
        }
    }

    /// Ends the process at the next signal. To be spawned when the graceful stop begins.
    pub async fn end_at_next(mut self) {
        let (name, number) = self.requested().await;
        tracing::warn!(signal = name, "second signal: ending at once");
        process::exit(SIGNALLED + number);
    }
}
