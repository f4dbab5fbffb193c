//! The new file that takes a journal's place: written beside it, in steps, while the old one is appended to.
//!
//! First comes what the history keeps, in batches; each is taken in one short hold of the history's lock, and only one
//! is in memory. What is published meanwhile is appended to the old file as ever, and copied from its end. Events that
//! are forgotten before the walk reaches them are missing in the new file, so marks for their topics stand at its end:
//! a gap too many is allowed, a silent hole never. The new file is synced in pieces on the way, so that little is left
//! when it gets the name. It is locked before that, so that no other server can come in between.

use crate::locked::{is_same, sync_directory_of};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How much of the old file's end one step copies, in memory.
const STEP_BYTES: u64 = 256 * 1024;
/// How much is written before it is synced. With `--fsync`, an event's own sync waits behind this one on the disk.
const SYNC_BYTES: u64 = 128 * 1024;
/// How little must be unsynced when it gets the name. A flood that writes more than this during each sync would put
/// that off for ever, so it is tried `LAST_SYNCS` times.
const LAST_BYTES: u64 = 64 * 1024;
const LAST_SYNCS: u32 = 8;
const _: () = assert!(LAST_BYTES < SYNC_BYTES && SYNC_BYTES <= STEP_BYTES);

/// What a new file has to hold. The journal asks for it and knows no history, so that another store could give it.
pub trait Snapshot: Send {
    /// The first block, then marks, then the kept events' blocks, some at a time; none at the end. Takes the history's
    /// lock shortly.
    fn next(&mut self) -> Vec<u8>;
    /// Marks of what has been forgotten since the snapshot began. Asked for once, when nothing can be published.
    fn last(&mut self) -> Vec<u8>;
}

/// Takes a snapshot of what is kept now, for a new file whose first block names this boot.
pub type TakeSnapshot<'a> = &'a dyn Fn(Option<&str>) -> Box<dyn Snapshot>;

/// What takes a while and is done between two steps, when the journal is free for others to append.
pub enum Pause {
    Nothing,
    /// Syncs the new file, to which only the journal's thread writes.
    Sync(Arc<File>),
    /// The old file, which is deleted when this last handle closes (that takes a while), and the journal's path.
    Replaced(Arc<File>, PathBuf),
}

impl Pause {
    /// Does it. Only a failed sync is an error: what is in the new file is not sure then.
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

/// A new file that is being written. Dropped before it has the name, it is deleted.
pub struct Rewrite {
    path: PathBuf,
    file: Arc<File>,
    snapshot: Box<dyn Snapshot>,
    /// All of the snapshot is in the new file; what follows is copied from the old one.
    is_copied: bool,
    /// Bytes of the new file.
    length: u64,
    /// How much of `length` is the snapshot.
    needed: u64,
    /// Bytes written since the last sync.
    unsynced: u64,
    /// Up to here the old file is in the snapshot, or copied.
    copied_to: u64,
    /// How long the old file was at the last step.
    old_length: u64,
    /// How often a sync was tried with everything copied.
    last_syncs: u32,
    /// It is the journal now: dropping this must not delete it.
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
    /// Makes the new file at `path`, with the permissions of the old one, and locks it. The snapshot holds what the old
    /// file has up to `old_length`: both must be taken before anything else is appended.
    ///
    /// # Errors
    /// The file cannot be made, or another process is writing one there.
    pub fn start(path: PathBuf, old: &File, old_length: u64, snapshot: Box<dyn Snapshot>) -> io::Result<Rewrite> {
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

    /// Copies some more. True where everything is copied that was there when the step began.
    ///
    /// # Errors
    /// A file cannot be read or written: the new one is of no use then, and the old one stays as it is.
    pub fn step(&mut self, old: &File, old_length: u64) -> io::Result<bool> {
        if !self.is_copied {
            let blocks = self.snapshot.next();
            self.is_copied = blocks.is_empty();
            self.write(&blocks)?;
            self.needed = self.length;
            return Ok(false);
        }
        // At least twice what has come since the last step, or a flood of events would never be caught up with.
        let most = STEP_BYTES.max(2 * (old_length - self.old_length));
        self.old_length = old_length;
        self.copy(old, most.min(old_length - self.copied_to))?;
        Ok(self.copied_to == old_length)
    }

    /// The file, if it should be synced before the next step; [`Pause::Sync`] does it while others append to the old
    /// file.
    pub fn due_sync(&mut self, is_last: bool) -> Option<Arc<File>> {
        self.last_syncs += u32::from(is_last); // what comes while it is synced is less each time, but for a flood
        let most = match is_last {
            true if self.last_syncs == 1 => 1, // all that is kept: without `--fsync`, the power takes only what is new
            true if self.last_syncs <= LAST_SYNCS => LAST_BYTES,
            _ => SYNC_BYTES,
        };
        if self.unsynced < most {
            return None;
        }
        self.unsynced = 0;
        Some(self.file.clone())
    }

    /// Ends a new file that has all of the old one's blocks. Nothing may be appended to the old one until this has its
    /// name.
    pub fn finish(&mut self, is_synced: bool) -> io::Result<()> {
        let marks = self.snapshot.last();
        self.write(&marks)?;
        self.needed += marks.len() as u64;
        if is_synced { self.file.sync_all() } else { Ok(()) }
    }

    /// Appends whole blocks.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        (&*self.file).write_all(bytes)?;
        self.length += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        Ok(())
    }

    /// Gives the new file the journal's name: in place of the file that has it, or else only where none has it.
    ///
    /// # Errors
    /// The new file was moved or deleted, or somebody has taken the name: then nothing has changed.
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

    /// The new file, locked.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Bytes of the new file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// How long the file would be if nothing had been published while it was written.
    pub fn needed(&self) -> u64 {
        self.needed
    }

    /// Whether the new file still has its own name.
    fn is_there(&self) -> bool {
        is_same(&fs::symlink_metadata(&self.path), &self.file.metadata())
    }

    /// Copies this many bytes from the old file, which must have them.
    fn copy(&mut self, old: &File, length: u64) -> io::Result<()> {
        let mut bytes = vec![0; length as usize];
        old.read_exact_at(&mut bytes, self.copied_to)?;
        self.copied_to += length;
        self.write(&bytes)
    }
}

/// Removes the new file of a process that died half-way. If it died just after giving that file the journal's name,
/// this name is a second one of the journal itself.
///
/// # Errors
/// [`ErrorKind::ResourceBusy`]: the file is locked, so another process is writing it.
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
    if found.is_ok_and(|found| found.is_file()) && !begins_as_journal(path)? {
        let reason =
            format!("{} stands where the new file is written, and is none of ours: move it away", path.display());
        return Err(io::Error::new(ErrorKind::AlreadyExists, reason));
    }
    let _ = fs::remove_file(path);
    Ok(())
}

/// Whether a file is an unfinished journal: the beginning of one, of which a power cut may have left zeros.
fn begins_as_journal(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(5).read_to_end(&mut start)?;
    let fits = |field: &[u8]| start.iter().zip(field).all(|(found, wanted)| [*wanted, 0].contains(found));
    Ok(fits(b"boot:") || fits(b"sum: "))
}
