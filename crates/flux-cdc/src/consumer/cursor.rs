//! Where to begin to read an output when its consumer starts: a file beside it.
//!
//! The output itself says what the consumer has; the cursor saves the time of reading all of it. It is
//! replaced as a whole, so it is the old one or the new one after a crash. It is written after what it
//! speaks of is on the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rotate::beside;
use crate::ledger::Ledger;

const FORMAT: u32 = 1;

/// What the consumer had at a place in its output.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cursor {
    format: u32,
    /// The bytes of the output, at the end of a line.
    pub bytes: u64,
    /// The output is being rotated: either its length is `bytes`, or it is the next one and empty.
    pub is_rotating: bool,
    /// What the consumer had.
    pub ledger: Ledger,
}

impl Cursor {
    pub(crate) const fn new(bytes: u64, is_rotating: bool, ledger: Ledger) -> Cursor {
        Cursor { format: FORMAT, bytes, is_rotating, ledger }
    }

    /// Where the cursor of an output is.
    pub(crate) fn path(output: &Path) -> PathBuf {
        beside(output, ".cursor")
    }

    /// The cursor of an output; none if there is none, or it is not one of this format.
    pub(crate) fn read(output: &Path) -> io::Result<Option<Cursor>> {
        match fs::read(Cursor::path(output)) {
            Ok(text) => {
                let cursor: Option<Cursor> = serde_json::from_slice(&text).ok();
                Ok(cursor.filter(|cursor| cursor.format == FORMAT))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the cursor of an output.
    pub(crate) fn save(&self, output: &Path) -> io::Result<()> {
        let (path, new) = (Cursor::path(output), beside(output, ".cursor.new"));
        let mut text = serde_json::to_vec(self).expect("plain fields");
        text.push(b'\n');
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        sync_folder(output)
    }
}

/// Makes the names in a file's folder outlive a power cut.
pub(crate) fn sync_folder(file: &Path) -> io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
