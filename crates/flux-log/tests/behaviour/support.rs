//! Records that tests can own and number, and short ways to open a log.

use std::sync::Arc;

use flux_log::{Disk, Entry, Log, LogError, LogOptions, Record, RecoveryReport, State};

/// A record with its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owned {
    Entry { partition: u16, entry_type: u8, term: u64, index: u64, commit: u64, payload: Vec<u8> },
    State(State),
}

impl Owned {
    pub fn record(&self) -> Record<'_> {
        match self {
            Owned::Entry { partition, entry_type, term, index, commit, payload } => {
                Record::Entry(Entry {
                    partition: *partition,
                    entry_type: *entry_type,
                    term: *term,
                    index: *index,
                    commit: *commit,
                    payload,
                })
            }
            Owned::State(state) => Record::State(*state),
        }
    }

    pub fn from_record(record: Record<'_>) -> Owned {
        match record {
            Record::Entry(Entry { partition, entry_type, term, index, commit, payload }) => {
                let payload = payload.to_vec();
                Owned::Entry { partition, entry_type, term, index, commit, payload }
            }
            Record::State(state) => Owned::State(state),
        }
    }
}

pub fn entry(partition: u16, index: u64, payload: &[u8]) -> Owned {
    let payload = payload.to_vec();
    Owned::Entry { partition, entry_type: 3, term: 7, index, commit: index - 1, payload }
}

pub fn state(partition: u16, term: u64, vote: u64) -> Owned {
    Owned::State(State { partition, term, vote, commit: term, replica: 1, start: 0 })
}

/// A state of another replica or start than the last one: what came before is void.
pub fn reset(partition: u16, replica: u64, start: u64) -> Owned {
    Owned::State(State { partition, term: 9, vote: 0, commit: start, replica, start })
}

pub fn options(segment_bytes: u64) -> LogOptions {
    LogOptions { segment_bytes, zero_ahead_bytes: 700, ..LogOptions::new(0x5a17) }
}

/// Opens the log and gives what it visited.
pub fn open(
    disk: &(impl Disk + Clone + 'static),
    segment_bytes: u64,
) -> Result<(Log, RecoveryReport, Vec<Owned>), LogError> {
    open_shared(Arc::new(disk.clone()), segment_bytes)
}

pub fn open_shared(
    disk: Arc<dyn Disk>,
    segment_bytes: u64,
) -> Result<(Log, RecoveryReport, Vec<Owned>), LogError> {
    let mut records = Vec::new();
    let (log, report) = Log::open(
        disk,
        options(segment_bytes),
        &mut |record| records.push(Owned::from_record(record)),
        &mut |_| {},
    )?;
    Ok((log, report, records))
}

/// Writes the records as one batch.
pub fn write(log: &mut Log, records: &[Owned]) -> Result<u64, LogError> {
    for record in records {
        log.append(&record.record())?;
    }
    log.write()
}

/// The file and offset that an error calls damaged.
pub fn damaged_at(error: &LogError) -> Option<(&str, u64)> {
    match error {
        LogError::Damaged { file, offset, .. } => Some((file, *offset)),
        _ => None,
    }
}
