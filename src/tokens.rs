//! The tokens' file, read again whenever it has changed, and the streams whose right is gone.
//!
//! A program gives a page its own token by writing a line, and withdraws it by removing the line. So the file is looked
//! at ten times a second, by a thread that does nothing else: a disk that is stuck must hold nothing up. A file that
//! cannot be read or understood changes nothing. Each stream knows with what it was opened (`Pass`); after each change,
//! and when a right is over, another thread judges all of them again. A stream is given its end, and cut if it does not
//! take that.
//!
//! Between the check of a request and its stream a change may come. So the pass is noted before the check, and rights
//! are changed before streams are judged: one of the two sees the other.

use crate::config::Log;
use crate::connection::{Connection, Phase, STOPPING, WITHDRAWN};
use crate::door::Door;
use crate::log::Logger;
use crate::rights::{Rights, unix_time};
use crate::subscription::Streams;
use crate::sync::{enter, start_thread};
use crate::text::invalid;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the file is looked at, and whether streams must be judged.
const LOOK_TIME: Duration = Duration::from_millis(100);
/// A file that is written in place is empty for a moment, and then half there. So it is read once it stands still
/// between two looks; or after this time, where it is changed all the time.
const STILL_TIME: Duration = Duration::from_millis(500);
const _: () = assert!(STILL_TIME.as_millis() + 3 * LOOK_TIME.as_millis() < 1_000, "a change counts within a second");
/// Two changes in this time may leave the same times in the file's entry (some file systems count in two seconds), so
/// until it is over the content is compared, too.
const COARSE_SECONDS: i64 = 3;
/// Room for a hundred thousand tokens, in bytes.
const FILE_BYTES: u64 = 16 * 1024 * 1024;
/// A stream whose right is gone has this long to take its end.
const END_TIME: Duration = Duration::from_secs(2);

/// The file, and what was last read of it.
pub struct TokensFile {
    path: PathBuf,
    bytes: Vec<u8>,
    /// What the file's entry said before that; none where there was no file.
    stamp: Option<Stamp>,
    /// That entry is old enough to show every later change.
    is_settled: bool,
    /// A change that is waited for to stand still, and since when.
    seen: Option<(Option<Stamp>, Instant)>,
    /// What was last logged about it.
    fault: String,
}

/// What changes with a file's content: where it lies, its length, and its times. That of its entry cannot be set back.
#[derive(Clone, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    length: u64,
    changed: (i64, i64),
    entry_changed: (i64, i64),
}

impl TokensFile {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// It cannot be read or understood.
    pub fn open(path: &Path) -> io::Result<(TokensFile, Rights)> {
        let (path, stamp) = (path.to_path_buf(), Stamp::of(path));
        let mut file =
            TokensFile { path, bytes: Vec::new(), stamp, is_settled: false, seen: None, fault: String::new() };
        match file.read() {
            Ok(rights) => Ok((file, rights.unwrap_or_default())),
            Err(fault) => invalid(format!("tokens: {}: {fault}", file.path.display())),
        }
    }

    /// Starts both threads, which end when the other end of `stopping` is dropped. Returns the one that judges: the
    /// other is not to be waited for, since the disk may be stuck.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn watch(
        mut self,
        door: Arc<Door>,
        streams: Arc<Streams>,
        stopping: Receiver<()>,
    ) -> io::Result<JoinHandle<()>> {
        let (log, known) = (streams.log.clone(), door.clone());
        start_looking("tokens", log.clone(), stopping.clone(), move || {
            let changed = self.look(&|line| log.line(Log::Info, format_args!("{line}")));
            if let Some(rights) = changed {
                let (path, count) = (self.path.display(), rights.count());
                log.line(Log::Debug, format_args!("the tokens {path} were read again: there are {count}"));
                known.change_rights(rights);
            }
        })?;
        let log = streams.log.clone();
        let mut judge = Judge { door, streams, ending: Vec::new(), rights: None, judged_at: unix_time() };
        start_looking("rights", log, stopping, move || judge.look())
    }

    /// The new rights, if the file has changed and can be understood.
    fn look(&mut self, log: &dyn Fn(&str)) -> Option<Rights> {
        let stamp = Stamp::of(&self.path);
        if self.is_settled && stamp == self.stamp {
            self.seen = None;
            return None;
        }
        let (seen, since) = self.seen.take().unwrap_or((None, Instant::now()));
        if seen != stamp && since.elapsed() < STILL_TIME {
            self.seen = Some((stamp, since));
            return None;
        }
        self.is_settled = stamp.as_ref().is_some_and(Stamp::is_old);
        self.stamp = stamp;
        let fault = match self.read() {
            Ok(rights) => {
                self.fault.clear();
                return rights;
            }
            Err(fault) => fault,
        };
        if fault != self.fault {
            log(&format!("the tokens {}: {fault}; rights stay as they were", self.path.display()));
            self.fault = fault;
        }
        None
    }

    /// None where the content is the same.
    fn read(&mut self) -> Result<Option<Rights>, String> {
        let mut bytes = Vec::new();
        // To open a pipe waits for whoever writes to it, and what was read from one is not there to be read again.
        let open = || match fs::metadata(&self.path)?.is_file() {
            true => File::open(&self.path),
            false => invalid("it is no regular file: write the rights into one"),
        };
        let read = open().and_then(|file| file.take(FILE_BYTES + 1).read_to_end(&mut bytes));
        read.map_err(|error| error.to_string())?;
        if bytes.len() as u64 > FILE_BYTES {
            return Err(format!("it has more than {FILE_BYTES} bytes"));
        } else if bytes == self.bytes {
            return Ok(None);
        }
        let text =
            str::from_utf8(&bytes).map_err(|error| format!("it is not UTF-8 from byte {} on", error.valid_up_to()))?;
        let rights = Rights::parse(text)?;
        self.bytes = bytes;
        Ok(Some(rights))
    }
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let found = fs::metadata(path).ok()?;
        Some(Stamp {
            file: (found.dev(), found.ino()),
            length: found.len(),
            changed: (found.mtime(), found.mtime_nsec()),
            entry_changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    fn is_old(&self) -> bool {
        self.entry_changed.0.saturating_add(COARSE_SECONDS) <= unix_time() as i64
    }
}

/// Starts a thread that looks ten times a second, until the other end of `stopping` is dropped.
fn start_looking(
    name: &'static str,
    log: Arc<Logger>,
    stopping: Receiver<()>,
    mut look: impl FnMut() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let work = move || {
        while let Err(RecvTimeoutError::Timeout) = stopping.recv_timeout(LOOK_TIME) {
            if catch_unwind(AssertUnwindSafe(&mut look)).is_err() {
                log.line(Log::Info, format_args!("the thread of the {name} has panicked, and goes on"));
            }
        }
    };
    start_thread(name.into(), Box::new(work))
}

struct Judge {
    door: Arc<Door>,
    streams: Arc<Streams>,
    /// Those that were given their end, and when.
    ending: Vec<(Instant, Weak<Connection>)>,
    /// By which all streams were last judged, and when.
    rights: Option<Arc<Rights>>,
    judged_at: u64,
}

impl Judge {
    fn look(&mut self) {
        let (now, Some(rights)) = (unix_time(), self.door.rights()) else { return };
        let has_changed = self.rights.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &rights));
        if has_changed || rights.has_ended_between(self.judged_at, now) {
            end_withdrawn(&self.door, &self.streams, &mut self.ending);
        }
        (self.rights, self.judged_at) = (Some(rights), now);
        self.ending.retain(|(since, c)| match c.upgrade() {
            Some(c) if since.elapsed() >= END_TIME => {
                let mut state = enter(&c.state);
                match self.door.is_withdrawn(&state) {
                    true => c.cut(WITHDRAWN),
                    false => state.ending = state.ending.filter(|why| *why != WITHDRAWN), // it may be withdrawn again
                }
                false
            }
            c => c.is_some(),
        });
    }
}

/// Gives every stream its end whose pass is not good any more.
fn end_withdrawn(door: &Door, streams: &Arc<Streams>, ending: &mut Vec<(Instant, Weak<Connection>)>) {
    for c in streams.places.everyone() {
        let state = enter(&c.state);
        let is_ending = [Some(WITHDRAWN), Some(STOPPING)].contains(&state.ending);
        let is_open = !is_ending && !matches!(state.phase, Phase::Closed(_));
        let is_withdrawn = is_open && door.is_withdrawn(&state);
        drop(state);
        if is_withdrawn {
            streams.end_soon(&c, Some(WITHDRAWN));
            ending.push((Instant::now(), Arc::downgrade(&c)));
        }
    }
}
