//! The new file that takes a journal's place: written beside it, some at a time, while the old one is appended to.
//!
//! First comes what the history keeps, in batches; each is taken in one short hold of the history's lock, and no more than
//! one is in memory. What is published meanwhile is appended to the old file as ever, and copied from its end. Events that
//! are forgotten before the copying comes by are missing in the new file, so at its end stand marks for their topics: a gap
//! too many is allowed, a silent hole never. The file is synced in pieces on the way, so that little is left to be synced
//! when it gets the name. It is locked before it has the name, so that no other server can come in between.

use crate::encoded::Encoded;
use crate::locked::{is_same, sync_directory_of};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is copied of the old file's end at once.
const STEP_BYTES: u64 = 256 * 1024;
/// What is written before it is synced: with `--fsync` events wait for it, as for a sync of their own.
const SYNC_BYTES: u64 = 128 * 1024;
/// What is left to be synced when it gets the name, unless events keep coming faster than that.
const LAST_BYTES: u64 = 64 * 1024;
const LAST_SYNCS: u32 = 8;

/// What a new file has to hold. The journal itself knows no history.
pub trait Snapshot: Send {
    /// The first block, then marks, then the kept events, some at a time; at the end none.
    fn next(&mut self) -> Vec<Encoded>;
    /// Marks of what was forgotten since the snapshot began.
    fn last(&mut self) -> Vec<Encoded>;
}

/// What takes a while and is done between two steps, while others may append.
pub enum Pause {
    Nothing,
    Sync(Arc<File>),
    /// The file that was replaced, whose last handle this is, and the directory in which that was done.
    Replaced(Arc<File>, PathBuf),
}

impl Pause {
    pub fn pass(self) -> io::Result<()> {
        match self {
            Pause::Nothing => Ok(()),
            Pause::Sync(file) => file.sync_data(),
            Pause::Replaced(_old, path) => {
                let _ = sync_directory_of(&path); // with `--fsync` it was, before anything was appended
                Ok(())
            }
        }
    }
}

pub struct Rewrite {
    path: PathBuf,
    file: Arc<File>,
    snapshot: Box<dyn Snapshot>,
    /// Whether all of the snapshot is in the new file.
    is_copied: bool,
    length: u64,
    /// How much of `length` is the snapshot.
    needed: u64,
    unsynced: u64,
    /// Up to here the old file is known to the snapshot, or copied.
    copied_to: u64,
    /// How long the old file was at the last step.
    old_length: u64,
    last_syncs: u32,
    has_name: bool,
}

impl Drop for Rewrite {
    fn drop(&mut self) {
        if !self.has_name && self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Rewrite {
    /// Makes the new file at `path`, with the permissions of the old one. The snapshot holds what the old file has up to
    /// `old_length`.
    pub fn begin(path: PathBuf, old: &File, old_length: u64, snapshot: Box<dyn Snapshot>) -> io::Result<Rewrite> {
        remove_stale(&path, old)?;
        let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path)?;
        let new = Rewrite {
            path,
            file: Arc::new(file),
            snapshot,
            is_copied: false,
            length: 0,
            needed: 0,
            unsynced: 0,
            copied_to: old_length,
            old_length,
            last_syncs: 0,
            has_name: false,
        };
        new.file.try_lock()?;
        new.file.set_permissions(old.metadata()?.permissions())?;
        Ok(new)
    }

    /// Copies some more. True where no more than one step is left.
    pub fn step(&mut self, old: &File, old_length: u64) -> io::Result<bool> {
        if !self.is_copied {
            let blocks = self.snapshot.next();
            self.is_copied = blocks.is_empty();
            self.write(&joined(&blocks))?;
            self.needed = self.length;
            return Ok(false);
        }
        // At least twice what has come since the last step, or a flood of events would never be caught up with.
        let most = STEP_BYTES.max(2 * (old_length - self.old_length));
        self.old_length = old_length;
        self.copy(old, most.min(old_length - self.copied_to))?;
        Ok(self.copied_to == old_length)
    }

    /// The file, if it should be synced before the next step, where the old file has to wait for nothing.
    pub fn due_sync(&mut self, is_last: bool) -> Option<Arc<File>> {
        self.last_syncs += u32::from(is_last); // what comes while it is synced is less each time, but for a flood
        let most = if is_last && self.last_syncs <= LAST_SYNCS { LAST_BYTES } else { SYNC_BYTES };
        if self.unsynced < most {
            return None;
        }
        self.unsynced = 0;
        Some(self.file.clone())
    }

    /// Ends a new file that has all of the old one's blocks. Nothing may be appended to the old one from here on.
    pub fn finish(&mut self, is_synced: bool) -> io::Result<()> {
        let marks = joined(&self.snapshot.last());
        self.write(&marks)?;
        self.needed += marks.len() as u64;
        if is_synced { self.file.sync_all() } else { Ok(()) }
    }

    /// Gives the new file the journal's name: in place of the file that has it, or else only where none has it.
    pub fn take_name(&mut self, path: &Path, replaces: bool) -> io::Result<()> {
        if !self.is_there() {
            return Err(io::Error::other(format!("{} is not there any more", self.path.display())));
        }
        if replaces {
            fs::rename(&self.path, path)?;
        } else {
            match fs::hard_link(&self.path, path) {
                Ok(()) => fs::remove_file(&self.path)?,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => return Err(error),
                Err(_) => fs::rename(&self.path, path)?, // not every file system has hard links
            }
        }
        self.has_name = true;
        Ok(())
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// How long it would be if nothing had been published meanwhile.
    pub fn needed(&self) -> u64 {
        self.needed
    }

    /// Whether the new file's own name is still its own.
    fn is_there(&self) -> bool {
        is_same(&fs::symlink_metadata(&self.path), &self.file.metadata())
    }

    fn copy(&mut self, old: &File, length: u64) -> io::Result<()> {
        let mut bytes = vec![0; length as usize];
        old.read_exact_at(&mut bytes, self.copied_to)?;
        self.copied_to += length;
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        (&*self.file).write_all(bytes)?;
        self.length += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        Ok(())
    }
}

fn joined(blocks: &[Encoded]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(blocks.iter().map(Encoded::block_len).sum());
    blocks.iter().flat_map(Encoded::block).for_each(|part| bytes.extend_from_slice(part));
    bytes
}

/// Removes the new file of a process that died half-way; one that is being written is locked. What died just after giving it
/// the journal's name has left the journal itself under this name, too.
pub fn remove_stale(path: &Path, journal: &File) -> io::Result<()> {
    let found = fs::symlink_metadata(path);
    if found.is_err() {
        return Ok(());
    }
    if found.as_ref().is_ok_and(|found| found.is_file())
        && !is_same(&found, &journal.metadata())
        && let Err(TryLockError::WouldBlock) = File::open(path)?.try_lock()
    {
        let reason = format!("{} is being written by another process", path.display());
        return Err(io::Error::new(ErrorKind::ResourceBusy, reason));
    }
    let _ = fs::remove_file(path);
    Ok(())
}
