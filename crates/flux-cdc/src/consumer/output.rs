//! Where a consumer's lines go: a file that says by itself what its consumer has, or standard output.
//!
//! **The file is the cursor.** A record is in it or it is not; what was delivered and is not in it is
//! not acknowledged, and comes again. Lines are on the disk (fdatasync) before their deliveries are
//! acknowledged. After a crash the file may end within a line: that line is cut off. A whole line that
//! is no record is damage, and then nothing is written to the file.
//!
//! ```text
//! FILE  FILE.1 …     lines, the newest ones in FILE
//! FILE.cursor        where to begin to read FILE at the start, see `cursor`
//! FILE.lock          held by the consumer that writes
//! ```
//!
//! What this module does not do: decide what becomes a line.

#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flux_proto::event::EventError;

use super::cursor::{Cursor, sync_folder};
use super::lines::Lines;
use super::rotate::{self, beside};
use crate::ledger::{Ledger, Verdict};

/// After so many bytes of lines the cursor is written: this much is read again at a start.
const CURSOR_EVERY_BYTES: u64 = 8 << 20;

/// Why lines cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no room for more lines. What was not written was not acknowledged.
    #[error("there is no room for {path}: free some and start again, nothing is lost")]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// Another consumer holds the lock.
    #[error("another consumer writes to {path}")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is a folder, a device or a pipe.
    #[error("{path} is not a file; without --output the lines go to standard output")]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// A whole line is no record.
    #[error(
        "{path} is damaged at byte {offset}: the line there is no change event, and what follows it cannot be trusted"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the line begins.
        offset: u64,
        /// What is wrong with it.
        source: EventError,
    },
    /// The file has lost lines that were acknowledged.
    #[error(
        "{path} has {length} bytes, and {known} were written: put back what is missing, or remove {path}.cursor to go on with what is there"
    )]
    Short {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// What its cursor says.
        known: u64,
    },
}

impl OutputError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> OutputError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OutputError::Full { path },
            _ => OutputError::Io { action, path, source },
        }
    }
}

/// When an output is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// At how many bytes; 0: never.
    pub bytes: u64,
    /// How many older files are kept; 0: all.
    pub keep: u32,
}

/// What was found in an output when it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Records that were read, since the cursor did not know them.
    pub records: u64,
    /// Bytes of a line without its end, which were cut off.
    pub torn_bytes: u64,
    /// Records that the file has twice. No consumer writes them.
    pub repeats: u64,
    /// How often something is missing in it. A consumer says so when it writes what follows.
    pub holes: u64,
}

/// Where lines go.
#[derive(Debug)]
pub enum Output {
    /// To a file.
    File(Box<LineFile>),
    /// To standard output: nothing is known of it after a restart.
    Stdout,
}

impl Output {
    /// Writes lines, and makes sure that they stay. `ledger` is what the consumer has with them.
    ///
    /// # Errors
    /// [`OutputError`]. None of the lines may be taken for written then.
    pub fn write(&mut self, lines: &[u8], ledger: &Ledger) -> Result<(), OutputError> {
        match self {
            Output::File(file) => file.write(lines, ledger),
            Output::Stdout => {
                let mut out = io::stdout().lock();
                let written = out.write_all(lines).and_then(|()| out.flush());
                written.map_err(|source| {
                    OutputError::io("write to", Path::new("standard output"), source)
                })
            }
        }
    }

    /// Ends the output in an orderly way, so that the next start reads nothing again.
    ///
    /// # Errors
    /// [`OutputError`]; nothing is lost by it.
    pub fn close(self, ledger: &Ledger) -> Result<(), OutputError> {
        match self {
            Output::File(mut file) => file.save_cursor(false, ledger),
            Output::Stdout => Ok(()),
        }
    }
}

/// A file of lines that one consumer writes.
#[derive(Debug)]
pub struct LineFile {
    path: PathBuf,
    file: File,
    rotation: Rotation,
    /// All of it is on the disk.
    length: u64,
    /// The length when the cursor was written.
    cursor_at: u64,
    cursor_every: u64,
    /// Held until this is dropped.
    _lock: File,
}

impl LineFile {
    /// Opens a file, or makes it, and reads what its consumer has.
    ///
    /// # Errors
    /// [`OutputError`], where it is not there for this consumer alone, or not as it was left.
    pub fn open(path: &Path, rotation: Rotation) -> Result<(LineFile, Ledger, Found), OutputError> {
        let failed = |action| move |source| OutputError::io(action, path, source);
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(OutputError::NotAFile { path: path.to_owned() });
        }
        let lock = lock(path)?;
        let cursor = Cursor::read(path).map_err(failed("read the cursor of"))?;
        if let Some(Cursor { is_rotating: true, bytes, .. }) = &cursor
            && fs::metadata(path).is_ok_and(|metadata| metadata.len() == *bytes)
        {
            while rotate::step(path, rotation.keep).map_err(failed("rotate"))? {}
        }
        let mut found = Found::default();
        let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
        let short = |known| OutputError::Short { path: path.to_owned(), length, known };
        let (from, mut ledger) = match cursor {
            // It is the next one, which is empty until there is a cursor of its own.
            Some(Cursor { is_rotating: true, ledger, .. }) if length == 0 => (0, ledger),
            Some(Cursor { is_rotating, bytes, .. }) if is_rotating || length < bytes => {
                return Err(short(bytes));
            }
            Some(Cursor { bytes, ledger, .. }) => (bytes, ledger),
            None => (0, read_rotated(path, &mut found)?),
        };
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let file = options.open(path).map_err(failed("open"))?;
        let mut lines = Lines::open(path, from)?;
        read(&mut lines, &mut ledger, &mut found)?;
        found.torn_bytes = lines.torn_bytes();
        let mut opened = LineFile {
            path: path.to_owned(),
            file,
            rotation,
            length: lines.offset(),
            cursor_at: 0,
            cursor_every: CURSOR_EVERY_BYTES,
            _lock: lock,
        };
        opened.cut().map_err(failed("cut"))?;
        // Of a consumer that was killed, what it wrote last may not be on the disk yet, and from now on
        // it is acknowledged when it comes again.
        opened.file.sync_all().map_err(failed("sync"))?;
        opened.save_cursor(false, &ledger)?;
        Ok((opened, ledger, found))
    }

    fn write(&mut self, lines: &[u8], ledger: &Ledger) -> Result<(), OutputError> {
        if lines.is_empty() {
            return Ok(());
        }
        let written = self.file.write_all(lines).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // What a failed sync leaves in memory would be read, and believed, at the next start.
            let _ = self.cut();
            return Err(OutputError::io("write to", &self.path, source));
        }
        self.length += lines.len() as u64;
        if self.rotation.bytes > 0 && self.length >= self.rotation.bytes {
            self.rotate(ledger)
        } else if self.length - self.cursor_at >= self.cursor_every {
            self.save_cursor(false, ledger)
        } else {
            Ok(())
        }
    }

    /// Makes the file end with its last whole line.
    fn cut(&mut self) -> io::Result<()> {
        self.file.set_len(self.length)?;
        self.file.seek(SeekFrom::Start(self.length)).map(drop)
    }

    /// Goes on in a new file. A crash anywhere in here is mended by `open`.
    fn rotate(&mut self, ledger: &Ledger) -> Result<(), OutputError> {
        self.save_cursor(true, ledger)?;
        let rotated = (|| {
            while rotate::step(&self.path, self.rotation.keep)? {}
            let file =
                OpenOptions::new().read(true).write(true).create_new(true).open(&self.path)?;
            sync_folder(&self.path)?;
            Ok(file)
        })();
        self.file = rotated.map_err(|source| OutputError::io("rotate", &self.path, source))?;
        self.length = 0;
        self.save_cursor(false, ledger)
    }

    fn save_cursor(&mut self, is_rotating: bool, ledger: &Ledger) -> Result<(), OutputError> {
        let saved = Cursor::new(self.length, is_rotating, ledger.clone()).save(&self.path);
        saved.map_err(|source| OutputError::io("write", &Cursor::path(&self.path), source))?;
        self.cursor_at = self.length;
        Ok(())
    }
}

/// Keeps other consumers away for as long as the file is held.
fn lock(path: &Path) -> Result<File, OutputError> {
    let name = beside(path, ".lock");
    let failed = |source| OutputError::io("lock", &name, source);
    let options = OpenOptions::new().write(true).create(true).truncate(false).clone();
    let lock = options.open(&name).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OutputError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// What the consumer had when the file began, from the files before it: for where there is no cursor.
fn read_rotated(path: &Path, found: &mut Found) -> Result<Ledger, OutputError> {
    let mut ledger = Ledger::new();
    let files = rotate::rotated(path).map_err(|source| OutputError::io("read", path, source))?;
    for file in files {
        let mut lines = Lines::open(&file, 0)?;
        read(&mut lines, &mut ledger, found)?;
        found.holes += u64::from(lines.torn_bytes() > 0);
    }
    Ok(ledger)
}

/// Notes all records of the lines that are left.
fn read(lines: &mut Lines, ledger: &mut Ledger, found: &mut Found) -> Result<(), OutputError> {
    while let Some(record) = lines.next_record()? {
        found.records += 1;
        found.holes += u64::from(ledger.skip_to(&record).is_some());
        match ledger.judge(&record) {
            Verdict::Fresh => ledger.note(&record),
            Verdict::Repeat | Verdict::Ahead { .. } => found.repeats += 1,
        }
    }
    Ok(())
}
