//! Records in a file, one a line, read in order.
//!
//! What this module does not do: judge what the records say, or change the file.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flux_proto::event::{Record, read_json};

use super::output::OutputError;

/// The longest line that is read: two values of 16 MiB, of characters that are escaped as six bytes.
const MAX_LINE_BYTES: u64 = 256 << 20;

/// The lines of a file.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: Vec<u8>,
    offset: u64,
    torn_bytes: u64,
}

impl Lines {
    /// The lines of a file from an offset on, where a line begins.
    ///
    /// # Errors
    /// [`OutputError::Io`] where it cannot be opened.
    pub fn open(path: &Path, from: u64) -> Result<Lines, OutputError> {
        let failed = |source| OutputError::io("open", path, source);
        let mut reader = BufReader::with_capacity(256 << 10, File::open(path).map_err(failed)?);
        reader.seek(SeekFrom::Start(from)).map_err(failed)?;
        let path = path.to_owned();
        Ok(Lines { path, reader, line: Vec::new(), offset: from, torn_bytes: 0 })
    }

    /// The next record; none at the end of the last whole line.
    ///
    /// # Errors
    /// [`OutputError::Damaged`] where a whole line is no record, and [`OutputError::Io`].
    pub fn next_record(&mut self) -> Result<Option<Record>, OutputError> {
        self.line.clear();
        let mut limited = self.reader.by_ref().take(MAX_LINE_BYTES);
        let read = limited.read_until(b'\n', &mut self.line);
        let length = read.map_err(|source| OutputError::io("read", &self.path, source))? as u64;
        let Some(line) = self.line.strip_suffix(b"\n") else {
            self.torn_bytes = length;
            return Ok(None);
        };
        let record = read_json(line).map_err(|source| OutputError::Damaged {
            path: self.path.clone(),
            offset: self.offset,
            source,
        })?;
        self.offset += length;
        Ok(Some(record))
    }

    /// Where the line after the last record begins.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes of a line without its end behind the last record, once all records are read.
    pub const fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }
}
