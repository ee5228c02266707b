//! The files that an output was rotated into: `FILE.1` is the newest, the highest number the oldest.
//!
//! A rotation is a row of renames, each of which leaves a state from which the next one follows: after
//! a crash anywhere within, it goes on where it was. What this module does not do: decide when to
//! rotate, or read the files.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A file beside another one: its name with something appended.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    beside(path, &format!(".{number}"))
}

/// The lowest number that no file has.
fn first_free(path: &Path) -> io::Result<u32> {
    let mut number = 1;
    while fs::exists(numbered(path, number))? {
        number += 1;
    }
    Ok(number)
}

/// The files that `path` was rotated into, oldest first. They have no gap in their numbers.
///
/// # Errors
/// Where the folder cannot be read.
pub fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let free = first_free(path)?;
    Ok((1..free).rev().map(|number| numbered(path, number)).collect())
}

/// Takes one step towards `path` being free, with at most `keep` files that it was rotated into (0: all
/// are kept). False when nothing is left to do.
pub(crate) fn step(path: &Path, keep: u32) -> io::Result<bool> {
    if !fs::exists(path)? {
        return Ok(false);
    }
    let oldest = first_free(path)? - 1;
    if keep > 0 && oldest >= keep {
        fs::remove_file(numbered(path, oldest))?;
    } else if oldest > 0 {
        fs::rename(numbered(path, oldest), numbered(path, oldest + 1))?;
    } else {
        fs::rename(path, numbered(path, 1))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The files beside `path` with their contents, by what is appended to its name.
    fn files(path: &Path) -> BTreeMap<String, String> {
        let name = path.file_name().expect("a file").to_str().expect("text");
        let entries = fs::read_dir(path.parent().expect("a folder")).expect("it can be read");
        let file = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.expect("an entry");
            let suffix =
                entry.file_name().to_str().expect("text").strip_prefix(name).map(String::from);
            (suffix.expect("a name"), fs::read_to_string(entry.path()).expect("it can be read"))
        };
        entries.map(file).collect()
    }

    fn expected(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|&(suffix, text)| (suffix.to_owned(), text.to_owned())).collect()
    }

    #[test]
    fn the_oldest_goes_and_all_others_move_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out");
        assert!(!step(&path, 2).expect("nothing to do"));
        for text in ["a", "b", "c", "d"] {
            fs::write(&path, text).expect("written");
            while step(&path, 2).expect("a step") {}
        }
        assert_eq!(files(&path), expected(&[(".1", "d"), (".2", "c")]));
        assert_eq!(rotated(&path).expect("the folder can be read").len(), 2);
        // Fewer are to be kept than there are.
        fs::write(&path, "e").expect("written");
        while step(&path, 1).expect("a step") {}
        assert_eq!(files(&path), expected(&[(".1", "e")]));
        for text in ["f", "g", "h"] {
            fs::write(&path, text).expect("written");
            while step(&path, 0).expect("a step") {}
        }
        let all = [(".1", "h"), (".2", "g"), (".3", "f"), (".4", "e")];
        assert_eq!(files(&path), expected(&all));
        let oldest_first = rotated(&path).expect("the folder can be read");
        let texts: Vec<_> =
            oldest_first.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        assert_eq!(texts, ["e", "f", "g", "h"]);
    }
}
