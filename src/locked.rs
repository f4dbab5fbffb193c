//! Whose a file is: the lock on the file itself, and what else belongs to giving it a name.
//!
//! Two servers that append to one journal would give the same ids twice, and each would cut off what the other writes.
//! So whoever uses it holds a lock on it. A lock is on a file and not on its name: whoever has locked a file checks
//! that it still has the name, and whoever gives the name to another file locks that one first. The lock ends with the
//! process, and nothing lies beside the file that somebody could delete.

use crate::system;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Opens a file for reading and appending, makes it where there is none, and locks it.
///
/// # Errors
/// [`ErrorKind::ResourceBusy`]: another process has it; the message says which, where the system tells.
pub fn open_locked(path: &Path) -> io::Result<File> {
    loop {
        let file = open(path)?;
        lock(&file)?;
        if is_same(&fs::metadata(path), &file.metadata()) {
            return Ok(file);
        } // else whoever had the lock has just given the name to a new file
    }
}

/// Opens a file for reading and appending, and makes it where there is none, for its owner alone.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Older versions lock a file `FILE.lock` beside the journal, and not the journal. If it is there, it is locked, too:
/// so we do not start beside a running older version, nor one beside us. It is never made. `held` is our lock on it, if
/// we have one.
///
/// # Errors
/// [`ErrorKind::ResourceBusy`]: an older version has it.
pub fn lock_as_before(path: &Path, held: Option<&File>) -> io::Result<Option<File>> {
    let path = beside(path, ".lock");
    let found = fs::metadata(&path);
    if !found.as_ref().is_ok_and(Metadata::is_file) || held.is_some_and(|held| is_same(&found, &held.metadata())) {
        return Ok(None);
    }
    let file = File::open(&path)?;
    lock(&file)?;
    Ok(Some(file))
}

/// Takes the lock without waiting.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
        Err(TryLockError::WouldBlock) => {
            let holder = file.metadata().ok().and_then(|found| system::lock_holder(found.ino()));
            let holder = holder.map_or("another process".into(), |id| format!("process {id}"));
            let reason = format!("{holder} is writing it: stop that one, or name another file");
            Err(io::Error::new(ErrorKind::ResourceBusy, reason))
        }
    }
}

/// Whether both are the same file: the inode and the device, whatever the names.
pub fn is_same(one: &io::Result<Metadata>, other: &io::Result<Metadata>) -> bool {
    matches!((one, other), (Ok(one), Ok(other)) if (one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// A new name is sure to outlive a power cut only once its directory is synced, not only the file.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

/// The path with something added to the file's name, so that both are on one file system, as renaming needs.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Where a name leads: through its links; or to its own directory, where nothing has the name.
pub fn resolve(given: &Path) -> Option<PathBuf> {
    let in_directory = || Some(given.parent()?.canonicalize().ok()?.join(given.file_name()?));
    given.canonicalize().ok().or_else(in_directory)
}
