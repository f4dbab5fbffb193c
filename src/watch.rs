//! Whether the journal's name is still its file's.
//!
//! A lock is on a file and not on its name (`locked.rs`). So while the file is in use, somebody may move, delete, cut
//! or replace it, and what is published from then on would go where nobody finds it. Once in [`LOOK_TIME`] the name is
//! therefore followed again, and the file it leads to is compared with the one in use. What was lost can be written
//! anew; but where another server's file has the name, nothing may be. What is done about it is decided in
//! `journal.rs`.

use crate::clock::now_ms;
use crate::locked::{beside, is_same, lock_as_before, open, open_locked, resolve};
use crate::text::invalid;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long events may go into a file that has lost its name.
pub const LOOK_TIME: Duration = Duration::from_secs(1);

pub struct Watch {
    /// What the file was named by, which may be a link; and where that leads.
    given: PathBuf,
    path: PathBuf,
    /// Keeps servers of older versions out.
    old_lock: Option<File>,
    looked_at: Instant,
}

impl Watch {
    /// Opens the file of this name, made where there is none, and locks it.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceBusy`]: another process has it. [`ErrorKind::InvalidInput`]: it is no regular file.
    pub fn start(path: &Path) -> io::Result<(Watch, File)> {
        if !open(path)?.metadata()?.is_file() {
            return invalid("it is no regular file");
        }
        let given = std::path::absolute(path)?;
        let path = path.canonicalize()?; // a link stays one, however often the journal is renamed
        let old_lock = lock_as_before(&path, None)?;
        let file = open_locked(&path)?;
        Ok((Watch { given, path, old_lock, looked_at: Instant::now() }, file))
    }

    /// Where the name led at the last look.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_due(&self) -> bool {
        self.looked_at.elapsed() >= LOOK_TIME
    }

    /// What has happened to the file or its name since the last look; `None` where nothing has. `was_taken` is whether
    /// that look found another server's file; `length` is how long the file should be, where that is known.
    ///
    /// # Errors
    /// Another server's file has the name, or nobody can say whose it is.
    pub fn look(&mut self, file: &File, was_taken: bool, length: Option<u64>) -> io::Result<Option<&'static str>> {
        self.looked_at = Instant::now();
        // It may be a link by now, or none any more.
        self.path = resolve(&self.given).unwrap_or_else(|| self.path.clone());
        let own = file.metadata();
        let size = own.as_ref().map_or(0, Metadata::len);
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Some("was deleted or moved")),
            Err(error) => Err(error),
            // It may be free by now, but what stands there was another server's.
            found if !is_same(&found, &own) && was_taken => Err(io::Error::other("another server's file stands there")),
            found if !is_same(&found, &own) => self.lock_other().map(|_| Some("was replaced")),
            _ if was_taken => Ok(Some("was away")),
            _ if length.is_none_or(|length| size == length) => Ok(None),
            _ if length.is_some_and(|length| size < length) => Ok(Some("was cut")),
            _ => lock_as_before(&self.path, self.old_lock.as_ref()).map(|_| Some("was written to by somebody else")),
        }
    }

    /// Locks the file that has the name instead of ours, so that no server begins to use it meanwhile.
    pub fn lock_other(&self) -> io::Result<File> {
        if !fs::metadata(&self.path)?.is_file() {
            return invalid("no regular file stands there: move it away");
        }
        lock_as_before(&self.path, self.old_lock.as_ref())?;
        open_locked(&self.path)
    }

    /// Gives the file that has the name a second one, which it keeps when a new file gets the first. Returns the
    /// second.
    pub fn keep_aside(&self, why: &str) -> io::Result<PathBuf> {
        let copy = beside(&self.path, &format!(".{why}.{}", now_ms()));
        if fs::hard_link(&self.path, &copy).is_err() {
            let copied = fs::copy(&self.path, &copy).and_then(|_| File::open(&copy)?.sync_all());
            copied.inspect_err(|_| drop(fs::remove_file(&copy)))?;
        }
        Ok(copy)
    }
}
