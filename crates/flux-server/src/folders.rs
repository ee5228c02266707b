//! A directory with one level of directories below it, each a [`Disk`] of its own: the ground that a
//! data directory stands on. What is kept where is `data_dir`'s business.
//!
//! Two implementations exist: [`RealFolders`], and one on simulated disks in the tests.

use std::fmt::Debug;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flux_log::{Disk, FileDisk};

/// The directory, in use by this value alone as long as it lives.
pub(crate) trait Folders: Debug + Send + Sync {
    /// Its path, for messages.
    fn path(&self) -> &Path;
    /// The files of the directory itself.
    fn root(&self) -> &dyn Disk;
    /// The names of the directories in it.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Opens one of them, making it if it does not exist.
    fn open(&self, name: &str) -> io::Result<Arc<dyn Disk>>;
    /// Moves one of them into another, which is made if it does not exist.
    fn set_aside(&self, name: &str, into: &str) -> io::Result<()>;
    /// Removes one of them with its files. A crash may leave any part of it.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// A directory of the file system.
#[derive(Debug)]
pub(crate) struct RealFolders {
    path: PathBuf,
    root: FileDisk,
}

impl RealFolders {
    /// Opens the directory, making it if it does not exist, and locks it.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if it is in use.
    pub(crate) fn open(path: &Path) -> io::Result<RealFolders> {
        Ok(RealFolders { path: path.to_owned(), root: FileDisk::open(path)? })
    }
}

impl Folders for RealFolders {
    fn path(&self) -> &Path {
        &self.path
    }

    fn root(&self) -> &dyn Disk {
        &self.root
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(FileDisk::open(self.path.join(name))?))
    }

    fn set_aside(&self, name: &str, into: &str) -> io::Result<()> {
        let into = self.path.join(into);
        fs::create_dir_all(&into)?;
        fs::rename(self.path.join(name), into.join(name))?;
        fs::File::open(&into)?.sync_all()?;
        self.root.sync_dir()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_dir_all(self.path.join(name))
    }
}
