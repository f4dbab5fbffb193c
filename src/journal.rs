//! The file that outlives the process: an event stream itself, so `cat`, `grep` and `tail -F` read it.
//!
//! Nothing in it is changed in place. Blocks are appended, and what was forgotten disappears when the file is written anew
//! beside itself and renamed; so whenever the process or the machine dies, one whole journal has the name. Where it is not
//! synced, only its end may be missing after the machine's death, which nothing in the file shows: so its first block
//! names the boot, and after another one all topics count as forgotten up to now.
//!
//! The journal takes and gives encoded blocks, and knows no history: whoever uses it says what a new file has to hold.

use crate::block::Block;
use crate::clock::now_ms;
use crate::config::{Config, Log};
use crate::encoded::Encoded;
use crate::log::{Logger, OncePerSecond};
use crate::recovery::Found;
use crate::system;
use crate::text::invalid;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a journal may grow beyond twice what is kept before it is written anew: a small one is not worth it.
const SLACK_BYTES: u64 = 1024 * 1024;
/// A journal that failed is tried again this often, so that a broken disk is not kept busy with rewriting.
const RETRY_TIME: Duration = Duration::from_secs(1);

pub struct Journal {
    path: PathBuf,
    /// Opened for appending: after the file was cut, the next block stands at its end.
    file: File,
    /// Up to here, the file is whole blocks that were published.
    length: u64,
    /// How long it was when it held nothing but what was kept.
    needed: u64,
    health: Health,
    tried_at: Option<Instant>,
    is_synced: bool,
    /// The run of the machine that it was begun in, unless everything is synced: should the machine die, the kernel may
    /// not have written the end of it.
    boot: Option<String>,
    log: Arc<Logger>,
    /// A flood of refused connections must not use up the journal's turn.
    warned: OncePerSecond,
    /// The journal's own file is replaced now and then, so the lock is on one beside it.
    lock: File,
}

/// Makes the blocks of a new file; its first one names this boot.
pub type Snapshot<'a> = &'a dyn Fn(Option<&str>) -> Vec<Encoded>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Whole,
    /// A write failed, perhaps half-way: the file must be cut back.
    Torn,
    /// A sync failed. The kernel forgets what it could not write, so that the next sync would succeed with the data
    /// lost: only a new file, synced from memory, is trusted again. <https://wiki.postgresql.org/wiki/Fsync_Errors>
    Unsynced,
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = self.lock.unlock(); // also where a process just forked from this one still has the file open
    }
}

impl Journal {
    /// Locks the file and reads it: each good block goes to `take`. Before anything is appended, [`Journal::repair`] is
    /// told what was found.
    ///
    /// # Errors
    /// [`ErrorKind::ResourceBusy`]: another process has it. [`ErrorKind::InvalidData`]: the file is no journal.
    pub fn open(
        path: &Path,
        config: &Config,
        log: &Arc<Logger>,
        take: &mut dyn FnMut(Block, &[u8]),
    ) -> io::Result<(Journal, Found)> {
        let started = Instant::now();
        if !open(path)?.metadata()?.is_file() {
            return invalid("it is no regular file");
        }
        let path = path.canonicalize()?; // a link stays one, however often the journal is renamed
        let lock = lock(&beside(&path, ".lock"))?;
        let file = open(&path)?; // again: whoever had the lock may have renamed another one there
        if config.fsync {
            // What an earlier process wrote and named may not be safe yet, and is shown from here on.
            file.sync_data()?;
            sync_directory_of(&path)?;
        }
        let size = file.metadata()?.len();
        // Marks and bookkeeping beside one event's data, each byte of which may become a line of its own.
        let block_limit = config.keep_bytes.max(config.data_bytes().saturating_mul(8).saturating_add(4096));
        let mut found = Found::read(&file, size, block_limit, log.wants(Log::Info), take)?;
        if size > 0 && found.blocks == found.damaged {
            let reason =
                format!("it is no journal, for none of its {size} bytes can be read as one: name another file");
            return Err(io::Error::new(ErrorKind::InvalidData, reason));
        }
        let boot = system::boot_id();
        found.has_rebooted = found.boot.is_some() && found.boot != boot;
        let journal = Journal {
            path,
            file,
            length: found.whole,
            needed: found.whole,
            health: Health::Whole,
            tried_at: None,
            is_synced: config.fsync,
            boot: boot.filter(|_| !config.fsync),
            log: log.clone(),
            warned: OncePerSecond::default(),
            lock,
        };
        journal.tell(&found, started.elapsed());
        Ok((journal, found))
    }

    /// The length of the file: whole blocks that were published.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Makes the file one that can be appended to. What a dying process left half-written at its end is cut off. Where
    /// more than that is damaged, the file is kept aside, and what could be read of it is written anew; so is a file whose
    /// first block must say something else of the boot from here on.
    pub fn repair(&mut self, found: &Found, kept_bytes: u64, snapshot: Snapshot) -> io::Result<()> {
        self.needed = kept_bytes;
        if found.is_damaged() {
            let copy = beside(&self.path, &format!(".damaged.{}", now_ms()));
            fs::hard_link(&self.path, &copy).or_else(|_| fs::copy(&self.path, &copy).map(drop))?;
            self.say(format_args!("as it was, it is kept as {}", copy.display()));
        }
        if found.may_lack_events() || found.boot != self.boot {
            match self.rewrite(snapshot) {
                Ok(()) => return Ok(()),
                // Perhaps the disk is full. The file is whole, and as it names an earlier boot, the next start brings a
                // gap too many, but no hole.
                Err(error) if found.boot.is_some() && !found.is_damaged() && self.health == Health::Whole => {
                    self.say(format_args!("cannot be written anew: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        if found.whole < found.size { self.cut_back() } else { Ok(()) }
    }

    /// Appends whole blocks. Where that fails, none of them is published.
    pub fn append(&mut self, blocks: &[u8], kept_bytes: u64, snapshot: Snapshot) -> io::Result<()> {
        let result = self.prepare(kept_bytes, snapshot).and_then(|()| self.write(blocks));
        if let Err(error) = &result {
            let line = format_args!("journal {}: {error}; nothing is published until it works", self.path.display());
            self.log.warn_within(&self.warned, line);
        }
        result
    }

    /// Makes the file fit to be appended to: whole, trusted, and not much larger than what is kept.
    fn prepare(&mut self, kept_bytes: u64, snapshot: Snapshot) -> io::Result<()> {
        match self.health {
            Health::Whole => {}
            Health::Torn => self.cut_back()?,
            Health::Unsynced => return self.replace_unsynced(snapshot),
        }
        if self.length > 2 * self.needed.max(kept_bytes) + SLACK_BYTES {
            self.needed = self.length; // should this fail, not again before it has doubled
            if let Err(error) = self.rewrite(snapshot) {
                self.say(format_args!("cannot be written anew, and grows on: {error}"));
            }
        }
        if self.health == Health::Whole { Ok(()) } else { Err(io::Error::other("its directory could not be synced")) }
    }

    fn replace_unsynced(&mut self, snapshot: Snapshot) -> io::Result<()> {
        if self.tried_at.is_some_and(|at| at.elapsed() < RETRY_TIME) {
            return Err(io::Error::other("it could not be synced, and must be written anew first"));
        }
        self.tried_at = Some(Instant::now());
        self.rewrite(snapshot)
    }

    fn write(&mut self, blocks: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(blocks) {
            self.health = Health::Torn;
            let _ = self.cut_back(); // at once, for those who follow the file; else before the next block
            return Err(error);
        }
        if self.is_synced
            && let Err(error) = self.file.sync_data()
        {
            self.health = Health::Unsynced;
            return Err(error);
        }
        self.length += blocks.len() as u64;
        Ok(())
    }

    fn cut_back(&mut self) -> io::Result<()> {
        self.file.set_len(self.length)?;
        self.health = Health::Whole;
        Ok(())
    }

    /// Writes a new file beside the journal, and gives it the journal's name once it is on the disk. Until its name is on
    /// the disk, too, it is not trusted.
    fn rewrite(&mut self, snapshot: Snapshot) -> io::Result<()> {
        let blocks = snapshot(self.boot.as_deref());
        let new_path = beside(&self.path, ".new");
        let _ = fs::remove_file(&new_path); // of a process that died half-way
        let written = self.write_new(&new_path, &blocks);
        let renamed = written.and_then(|new| fs::rename(&new_path, &self.path).map(|()| new));
        if renamed.is_err() {
            let _ = fs::remove_file(&new_path);
        }
        self.file = renamed?;
        self.length = blocks.iter().map(|event| event.block_len() as u64).sum();
        self.needed = self.length;
        self.health = Health::Unsynced;
        sync_directory_of(&self.path)?;
        self.health = Health::Whole;
        Ok(())
    }

    fn write_new(&self, path: &Path, blocks: &[Encoded]) -> io::Result<File> {
        let new = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)?;
        new.set_permissions(self.file.metadata()?.permissions())?;
        let mut out = BufWriter::with_capacity(64 * 1024, &new);
        blocks.iter().flat_map(Encoded::block).try_for_each(|part| out.write_all(part))?;
        out.flush()?;
        drop(out);
        new.sync_all()?;
        Ok(new)
    }

    fn tell(&self, found: &Found, took: Duration) {
        let Found { size, whole, events, damaged, damaged_at, .. } = found;
        self.say(format_args!("read {events} events, {size} bytes, in {} ms", took.as_millis()));
        if found.is_headless {
            self.say(format_args!("its beginning is missing"));
        }
        if *damaged > 0 {
            self.say(format_args!("{damaged} of its blocks cannot be read, at bytes {damaged_at:?}"));
        }
        if found.has_rebooted {
            self.say(format_args!(
                "the machine has died or restarted since, so the last seconds before may be missing"
            ));
        }
        if whole < size {
            self.say(format_args!("{} bytes of a block that was not whole are cut off", size - whole));
        }
    }

    fn say(&self, what: fmt::Arguments) {
        self.log.line(Log::Info, format_args!("journal {}: {what}", self.path.display()));
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Locks a file for this process, and writes into it who that is.
fn lock(path: &Path) -> io::Result<File> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).mode(0o600).open(path).map_err(named)?;
    let is_file = file.metadata().map_err(named)?.is_file();
    let mut holder = Vec::new();
    if is_file {
        let _ = (&file).take(100).read_to_end(&mut holder);
    }
    let holder = String::from_utf8_lossy(&holder);
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::Error(error)) => return Err(named(error)),
        Err(fs::TryLockError::WouldBlock) => {
            let reason = format!("{} is writing it: stop that one, or name another file", holder.trim());
            return Err(io::Error::new(ErrorKind::ResourceBusy, reason));
        }
    }
    // A power cut may leave zeros of it.
    let is_empty = holder.trim_matches('\0').is_empty();
    if !is_file || !is_empty && !holder.starts_with("process ") {
        return invalid(format!("{} is something else than its lock: move it away", path.display()));
    }
    let who = format!("process {}\n", std::process::id());
    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(who.as_bytes())).map_err(named)?;
    Ok(file)
}
