//! Records that tests can own and number, and short ways to open a log.

use std::{ops::ControlFlow, sync::Arc};

use flux_log::{
    Disk, Entry, Keep, Log, LogError, LogOptions, LogReader, Lsn, Record, RecoveryReport, Scanned,
    State,
};

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

/// Trims up to these snapshots, with no readers; how many segments went.
pub fn trim(log: &mut Log, snapshot: &mut dyn FnMut(u16) -> u64) -> Result<usize, LogError> {
    let keep = &mut |partition| Keep { snapshot: snapshot(partition), from: u64::MAX };
    let trimmed = log.trim(0, keep)?;
    assert!(!trimmed.released && log.pinned_bytes() == 0);
    Ok(trimmed.segments)
}

/// What a scan visits, with the LSNs of the batches, and how it ends.
pub fn scan(reader: &LogReader, from: Lsn) -> (Vec<(Lsn, Owned)>, Result<Scanned, LogError>) {
    let mut records = Vec::new();
    let scanned = reader.scan(from, &mut |lsn, record| {
        records.push((lsn, Owned::from_record(record)));
        ControlFlow::Continue(())
    });
    (records, scanned)
}

/// All that a reader finds, from the oldest segment on.
pub fn scan_all(reader: &LogReader) -> Vec<Owned> {
    let (records, scanned) = scan(reader, reader.segments()[0].base);
    assert_eq!(scanned.unwrap(), Scanned::End(reader.written()));
    records.into_iter().map(|(_, record)| record).collect()
}

/// The file and offset that an error calls damaged.
pub fn damaged_at(error: &LogError) -> Option<(&str, u64)> {
    match error {
        LogError::Damaged { file, offset, .. } => Some((file, *offset)),
        _ => None,
    }
}
