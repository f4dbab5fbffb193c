//! The file that outlives the process: an event stream itself, so `cat`, `grep` and `tail -F` read it.
//!
//! - *Nothing in it is changed in place.* Blocks are appended; what was forgotten disappears when a new file is written
//!   beside it and renamed (`rewrite.rs`). So whenever the process or the machine dies, one whole journal has the name.
//! - *What was refused is not there.* Where a write or a sync fails, the file is cut back before anybody is answered;
//!   where it cannot be cut, what was refused is overwritten with blank lines, which mean nothing.
//! - *The kernel forgets what it could not sync*: the next sync succeeds, with the data lost. So after a failed one
//!   only a new file, written from memory, is trusted. <https://wiki.postgresql.org/wiki/Fsync_Errors> An earlier
//!   process may have died during a failing sync, or of one: so a start trusts only what a mark in the file says is
//!   sure. With `--fsync` that is the end of a file that was ended in order.
//! - *Unsynced, the end may be missing* after the machine has died, and nothing in the file shows it. So its first
//!   block names the boot, and after another boot all topics count as forgotten up to now. The power may also bring the
//!   file back that had the name before: a synced one shows no loss, and after one of another boot the same ids would
//!   be given again. So the directory is synced with the new name in it before anything is published, and then a mark
//!   is appended; where a start in the same boot does not find it, it writes the file anew.
//! - *The lock is on the file itself*, and once a second its name is checked (`watch.rs`): a file that was moved, cut
//!   or deleted is written anew; where another server's file has the name, nothing is published any more.
//!
//! The journal takes and gives encoded blocks, and knows no history. It waits for the disk: call it without a lock.

use crate::block::{Block, sure_mark};
use crate::config::{Config, Log};
use crate::locked::{beside, is_same, sync_directory_of};
use crate::log::{Logger, OncePerSecond};
use crate::recovery::{Found, block_limit};
use crate::rewrite::{Pause, Rewrite, TakeSnapshot, remove_stale};
use crate::system;
use crate::watch::Watch;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much a journal may grow beyond twice what is kept before it is written anew: a small one is not worth it.
const SLACK_BYTES: u64 = 1024 * 1024;
/// A lost journal is written anew at most this often, so that a broken disk is not kept busy with it.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// Written to see whether a full disk has room again: as much as a large event, or that would fail all the same.
const TRIAL_BYTES: usize = 64 * 1024;

pub struct Journal {
    /// Has its name, and the path that leads to.
    watch: Watch,
    /// Locked. Opened for appending, so that the next block stands at the end also after the file was cut.
    file: Arc<File>,
    /// Up to here the file is whole blocks that were published; what stands after it was refused.
    length: u64,
    /// How long it was when it held nothing but what was kept.
    needed: u64,
    /// How many bytes are kept, as the caller last said.
    kept_bytes: u64,
    health: Health,
    /// Why nothing can be written, as publishers are told.
    reason: String,
    /// When a lost file was last written anew, or tried.
    tried_at: Option<Instant>,
    /// A new file that is being written, step by step.
    rewrite: Option<Rewrite>,
    /// Everything is synced before it is published (`--fsync`).
    syncs: bool,
    /// The boot that it is written in; none if everything is synced.
    boot: Option<String>,
    log: Arc<Logger>,
    /// A flood of refused connections must not use up the journal's turn.
    warned: OncePerSecond,
}

/// Whether the file may be appended to: only if it is whole. `make_fit` mends what it can.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    Whole,
    /// A write failed, perhaps half-way, and the file could not be cut back yet.
    Torn,
    /// The file is gone, or what is in it is not sure: a new one must be written first.
    Lost,
    /// Another server's file has the name, or nobody can say whose it is.
    Taken,
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = self.file.unlock(); // also where a process just forked from this one still has the file open
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
        let (watch, file) = Watch::start(path)?;
        remove_stale(&beside(watch.path(), ".new"), &file)?;
        let size = file.metadata()?.len();
        let mut found = Found::read(&file, size, block_limit(config), log.wants(Log::Info), take)?;
        if size > 0 && found.blocks == found.damaged {
            let reason =
                format!("it is no journal, for none of its {size} bytes can be read as one: name another file");
            return Err(io::Error::new(ErrorKind::InvalidData, reason));
        }
        let boot = system::boot_id();
        found.has_rebooted = found.boot.is_some() && found.boot != boot;
        let journal = Journal {
            watch,
            file: Arc::new(file),
            length: found.whole,
            needed: found.whole,
            kept_bytes: 0,
            health: Health::Whole,
            reason: String::new(),
            tried_at: None,
            rewrite: None,
            syncs: config.fsync,
            boot: boot.filter(|_| !config.fsync),
            log: log.clone(),
            warned: OncePerSecond::default(),
        };
        found.describe(started.elapsed()).iter().for_each(|line| journal.say(format_args!("{line}")));
        Ok((journal, found))
    }

    /// The length of the file: whole blocks that were published.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Makes the file one that can be appended to. What a dying process left half-written at its end is cut off. Where
    /// more is damaged, the file is kept aside, and what could be read of it is written anew. So is a file whose first
    /// block must name another boot from here on, and one that may not be on the disk as far as it must be.
    pub fn repair(&mut self, found: &Found, kept_bytes: u64, take_snapshot: TakeSnapshot) -> io::Result<()> {
        (self.needed, self.kept_bytes) = (kept_bytes, kept_bytes);
        let copy = if found.is_damaged() { Some(self.keep_aside("damaged")?) } else { None };
        if found.may_lack_events() || found.boot != self.boot || !self.is_trusted(found) {
            let found_file = self.file.clone();
            let Err(error) = self.rewrite_at_once(take_snapshot) else { return Ok(()) };
            let has_its_name = Arc::ptr_eq(&found_file, &self.file);
            if has_its_name && found.has_rebooted && !found.is_damaged() && !self.syncs {
                // Perhaps the disk is full. The file is whole, and since it names an earlier boot, the next start means
                // a gap too many, but no hole.
                self.say(format_args!("cannot be written anew: {error}"));
                self.take_back()?;
                return self.note_base(take_snapshot);
            } else if has_its_name {
                let _ = copy.map(fs::remove_file); // or each try to start would leave one
            }
            return Err(io::Error::other(format!("it must be written anew, beside itself, and cannot be: {error}")));
        }
        if found.whole < found.size { self.take_back() } else { Ok(()) }
    }

    /// Whether as much of the file is sure as must be before anything more is published: with `--fsync` all of it, else
    /// its name, if the system tells boots apart at all.
    fn is_trusted(&self, found: &Found) -> bool {
        let is_sure = if self.syncs { self.is_on_the_disk(found) } else { found.is_name_sure || self.boot.is_none() };
        is_sure && sync_directory_of(self.watch.path()).is_ok() // somebody may just have moved it here
    }

    /// Appends from where on ids are given, as a new file's first block would: or yet another death might repeat them.
    fn note_base(&mut self, take_snapshot: TakeSnapshot) -> io::Result<()> {
        self.write(&take_snapshot(None).next())?;
        self.file.sync_data()
    }

    /// Whether all that was read has been synced. Only then may it be published again without being written again.
    fn is_on_the_disk(&self, found: &Found) -> bool {
        let ended = found.has_ended && !found.is_damaged() && found.boot.is_none() && found.whole == found.size;
        ended && self.file.sync_data().is_ok()
    }

    /// Appends whole blocks, and syncs them with `--fsync`. Where that fails, none of them is published, nor will a
    /// later start find them, unless the error says so.
    pub fn append(&mut self, blocks: &[u8], kept_bytes: u64, take_snapshot: TakeSnapshot) -> io::Result<()> {
        self.kept_bytes = kept_bytes;
        let result = self.make_fit(take_snapshot).and_then(|()| self.write(blocks));
        if let Err(error) = &result {
            let line =
                format_args!("journal {}: {error}; nothing is published until it works", self.watch.path().display());
            self.log.warn_within(&self.warned, line);
        }
        result
    }

    /// Checks that the file still has its name; to be called once in `watch::LOOK_TIME`, also where nobody publishes.
    /// Where the journal has failed, tries whether it can be written again.
    pub fn look_after(&mut self, has_failed: bool, take_snapshot: TakeSnapshot) -> io::Result<()> {
        self.make_fit(take_snapshot)?;
        if has_failed { self.write(&[b'\n'; TRIAL_BYTES]).and_then(|()| self.take_back_trial()) } else { Ok(()) }
    }

    fn take_back_trial(&mut self) -> io::Result<()> {
        self.length -= TRIAL_BYTES as u64;
        self.take_back()
    }

    /// Whether there is anything for [`Journal::step`] to do.
    pub fn wants_step(&self) -> bool {
        self.rewrite.is_some() || self.has_grown()
    }

    /// Writes some more of a new file, if the old one has grown too large. Others may append before the next step.
    pub fn step(&mut self, take_snapshot: TakeSnapshot) -> Pause {
        self.try_step(take_snapshot).unwrap_or_else(|error| {
            self.abandon(&error);
            Pause::Nothing
        })
    }

    /// Gives up the new file that is being written; the old one grows on.
    pub fn abandon(&mut self, error: &io::Error) {
        self.rewrite = None;
        self.needed = self.length; // not again before it has doubled
        self.say(format_args!("cannot be written anew, and grows on: {error}"));
    }

    /// After a panic nobody knows how far a write came: the file is written anew before anything else.
    pub fn distrust(&mut self) {
        self.rewrite = None;
        self.lose(Health::Lost);
    }

    /// Ends the file in order, if everything in it is sure, so that the next start can trust it.
    pub fn close(mut self) {
        self.rewrite = None;
        if self.health == Health::Torn {
            let _ = self.take_back();
        }
        self.look();
        if self.syncs && self.health == Health::Whole {
            let _ = self.write(&sure_mark().block().concat());
        }
    }

    fn has_grown(&self) -> bool {
        self.health == Health::Whole && self.length > 2 * self.needed.max(self.kept_bytes) + SLACK_BYTES
    }

    fn try_step(&mut self, take_snapshot: TakeSnapshot) -> io::Result<Pause> {
        if self.rewrite.is_none() {
            if !self.has_grown() {
                return Ok(Pause::Nothing);
            }
            self.rewrite = Some(self.start_rewrite(take_snapshot)?);
        }
        let Some(rewrite) = &mut self.rewrite else { return Ok(Pause::Nothing) };
        let is_last = rewrite.step(&self.file, self.length)?;
        if let Some(file) = rewrite.due_sync(is_last) {
            return Ok(Pause::Sync(file));
        } else if !is_last {
            return Ok(Pause::Nothing);
        }
        rewrite.finish(self.syncs)?;
        self.look();
        match self.rewrite.take().filter(|_| self.health == Health::Whole) {
            Some(rewrite) => Ok(Pause::Replaced(self.change_to(rewrite, true, self.syncs)?, self.watch.path().into())),
            None => Ok(Pause::Nothing),
        }
    }

    fn start_rewrite(&self, take_snapshot: TakeSnapshot) -> io::Result<Rewrite> {
        let path = beside(self.watch.path(), ".new");
        Rewrite::start(path, &self.file, self.length, take_snapshot(self.boot.as_deref()))
    }

    /// Makes the file fit to be appended to: ours, whole and trusted.
    fn make_fit(&mut self, take_snapshot: TakeSnapshot) -> io::Result<()> {
        if self.watch.is_due() {
            self.look();
        }
        if self.health == Health::Torn {
            let _ = self.take_back();
        }
        if self.health == Health::Torn {
            self.lose(Health::Lost);
        }
        match self.health {
            Health::Whole | Health::Torn => Ok(()),
            Health::Lost => self.replace_lost(take_snapshot),
            Health::Taken => Err(io::Error::other(self.reason.clone())),
        }
    }

    /// Finds out whether the file still has the name, and is as long as it was. A change is logged once.
    fn look(&mut self) {
        let length = (self.health == Health::Whole).then_some(self.length);
        let what = match self.watch.look(&self.file, self.health == Health::Taken, length) {
            Ok(what) => what,
            Err(error) => {
                let reason = format!("its name is not its own any more: {error}");
                if self.health != Health::Taken {
                    self.say(format_args!(
                        "{reason}; nothing is published until it is deleted or the server restarted"
                    ));
                }
                self.reason = reason;
                return self.lose(Health::Taken);
            }
        };
        if let Some(what) = what
            && self.health != Health::Lost
        {
            self.lose(Health::Lost);
            self.tried_at = None;
            self.say(format_args!("the file {what} while it was in use: it is written anew from what is kept"));
        }
    }

    /// A new file that is being written goes, too: it copies from this one.
    fn lose(&mut self, health: Health) {
        self.rewrite = None;
        self.health = health;
    }

    /// Writes a lost file anew, at most once in `RETRY_TIME`; between two tries, the last error stands.
    fn replace_lost(&mut self, take_snapshot: TakeSnapshot) -> io::Result<()> {
        if self.tried_at.is_some_and(|at| at.elapsed() < RETRY_TIME) {
            return Err(io::Error::other(format!("it must be written anew, and cannot be: {}", self.reason)));
        }
        self.tried_at = Some(Instant::now());
        self.rewrite_at_once(take_snapshot).inspect_err(|error| self.reason = error.to_string())
    }

    /// Writes a new file in one go: nothing can be published before it is there.
    fn rewrite_at_once(&mut self, take_snapshot: TakeSnapshot) -> io::Result<()> {
        self.lose(Health::Lost);
        let mut rewrite = self.start_rewrite(take_snapshot)?;
        while !rewrite.step(&self.file, self.length)? {}
        rewrite.finish(true)?;
        let (mut _other, mut replaces) = (None, true);
        match fs::symlink_metadata(self.watch.path()) {
            Err(error) if error.kind() == ErrorKind::NotFound => replaces = false,
            found if is_same(&found, &self.file.metadata()) => {}
            _ => {
                let other = self.watch.lock_other()?;
                if other.metadata()?.len() > 0 {
                    self.keep_aside("replaced")?;
                }
                _other = Some(other); // stays locked until ours has the name
            }
        }
        self.change_to(rewrite, replaces, true).map(drop)
    }

    /// Gives a new file the journal's name, and returns the old one. It is trusted once the name is on the disk, too.
    /// A file that names the boot then says so. Where another such file has the name, which is sure, so may this one at
    /// once, for each is as good after a loss of power.
    fn change_to(&mut self, mut rewrite: Rewrite, replaces: bool, syncs: bool) -> io::Result<Arc<File>> {
        let mark = self.boot.as_ref().map(|_| sure_mark().block().concat());
        if let Some(mark) = mark.as_ref().filter(|_| !syncs) {
            rewrite.write(mark)?;
        }
        rewrite.take_name(self.watch.path(), replaces)?;
        let old = std::mem::replace(&mut self.file, rewrite.file().clone());
        (self.length, self.needed) = (rewrite.length(), rewrite.needed());
        self.health = Health::Lost;
        if syncs {
            sync_directory_of(self.watch.path())?;
        }
        self.health = Health::Whole;
        if let Some(mark) = mark.filter(|_| syncs) {
            let _ = self.write(&mark); // without it, the next start writes the file anew
        }
        Ok(old)
    }

    /// Appends, and syncs with `--fsync`. A failed write can be cut back; after a failed sync the file is lost.
    fn write(&mut self, blocks: &[u8]) -> io::Result<()> {
        let result = (&*self.file).write_all(blocks).map_err(|error| (error, Health::Whole));
        let synced = || self.file.sync_data().map_err(|error| (error, Health::Lost));
        let Err((error, health)) = result.and_then(|()| if self.syncs { synced() } else { Ok(()) }) else {
            self.length += blocks.len() as u64;
            return Ok(());
        };
        let undone = self.take_back(); // at once: neither a later start nor `tail -F` may see it
        if health == Health::Lost {
            self.lose(health);
        }
        let Err(second) = undone else { return Err(error) };
        let reason = format!("{error}; nor can it be taken out again ({second}), so that a later start may publish it");
        Err(io::Error::new(error.kind(), reason))
    }

    /// Takes what was refused out of the file. Where it cannot be cut, it is overwritten and the file stays torn.
    fn take_back(&mut self) -> io::Result<()> {
        self.health = Health::Torn;
        let size = self.file.metadata()?.len();
        if size > self.length {
            let cut = self.file.set_len(self.length);
            if cut.is_err() {
                self.blot_out(size)?;
            }
            if self.syncs {
                self.file.sync_data()?;
            }
            if cut.is_err() {
                return Ok(());
            }
        }
        self.health = Health::Whole;
        Ok(())
    }

    /// Overwrites the end of the file with blank lines, by another handle: one for appending writes at the end only.
    fn blot_out(&self, size: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.watch.path())?;
        if !is_same(&file.metadata(), &self.file.metadata()) {
            return Err(io::Error::other("the file has lost its name"));
        }
        file.write_all_at(&vec![b'\n'; (size - self.length) as usize], self.length)
    }

    /// Keeps the file that has the journal's name under a second one, and says so.
    fn keep_aside(&self, why: &str) -> io::Result<PathBuf> {
        let copy = self.watch.keep_aside(why)?;
        self.say(format_args!("as it was, it is kept as {}", copy.display()));
        Ok(copy)
    }

    fn say(&self, what: fmt::Arguments) {
        self.log.line(Log::Info, format_args!("journal {}: {what}", self.watch.path().display()));
    }
}
