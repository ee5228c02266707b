//! A [`Disk`] on a real directory. It keeps no state of its own: no cache, no retry.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::disk::{Disk, File};

/// Held locked while the directory is in use, so that two processes never write the same log.
const LOCK_FILE: &str = "LOCK";

/// A directory on a file system, locked for this process as long as the value lives.
#[derive(Debug)]
pub struct FileDisk {
    path: PathBuf,
    directory: fs::File,
    _lock: fs::File,
}

impl FileDisk {
    /// Opens the directory, making it (and its parents) if needed, and locks it.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceBusy`] if another [`FileDisk`], of this or another process, has it open.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<FileDisk> {
        let path = path.into();
        create_durably(&path)?;
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK_FILE))
            .map_err(classify)?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => io::Error::new(
                ErrorKind::ResourceBusy,
                format!("{} is in use by another process", path.display()),
            ),
            fs::TryLockError::Error(error) => error,
        })?;
        let directory = fs::File::open(&path)?;
        Ok(FileDisk { path, directory, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes the missing directories of `path` and syncs the parent of each one made.
fn create_durably(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_durably(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists || !path.is_dir() => {
            return Err(classify(error));
        }
        _ => {}
    }
    fs::File::open(parent)?.sync_all()
}

/// Callers look for one kind when space runs out.
fn classify(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::QuotaExceeded => io::Error::new(ErrorKind::StorageFull, error),
        _ => error,
    }
}

impl Disk for FileDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(self.path.join(name))
            .map_err(classify)?;
        Ok(Arc::new(RealFile { file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path.join(name))?;
        Ok(Arc::new(RealFile { file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to)).map_err(classify)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.directory.sync_all().map_err(classify)
    }
}

#[derive(Debug)]
struct RealFile {
    file: fs::File,
}

impl RealFile {
    fn extend_with_zeros(&self, size: u64) -> io::Result<()> {
        const ZEROS: &[u8] = &[0; 1 << 16];
        let mut at = self.file.metadata()?.len();
        while at < size {
            let part = (size - at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }
}

impl File for RealFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset).map_err(classify)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data().map_err(classify)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        loop {
            match fallocate(&self.file, FallocateFlags::empty(), 0, size) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Some file systems cannot reserve blocks; then zeros take them.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    return self.extend_with_zeros(size).map_err(classify);
                }
                Err(errno) => return Err(classify(errno.into())),
            }
        }
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size).map_err(classify)
    }
}
