//! What a disk holds of one directory, and what a crash may leave of it. The model is as harsh as POSIX lets it be:
//!
//! - Until a sync, each block of a file, its length and each change of the directory may have reached the disk or not, by
//!   itself, whatever came first; a block or a length may also have come half-way (torn at any byte).
//! - What a failed sync covered may be given up by the kernel: it is clean from then on, so that processes go on reading it
//!   and no later sync writes it, unless it is changed again. The power takes it, and so may the kernel, to make room.
//! - A killed process leaves all it has written, and whole blocks of a write it was killed in.

use super::file::{File, Reached};
use super::trace::{Call, Outcome};
use crate::common::Random;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// The name that the journal has in its directory.
pub const JOURNAL: &str = "events";

/// What a broken journal would leave out: the model is not told of it, so that it is as if the program had not done it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    Syncs,
    DirectorySyncs,
    /// What is written beside the journal is renamed without a sync.
    SyncsBesideTheJournal,
    /// What a recovery or a failed write must cut off stays.
    Truncations,
}

#[derive(Clone)]
pub struct Disk {
    pub block_bytes: usize,
    pub left_out: Option<LeftOut>,
    /// Of the choices that the kernel makes where a sync fails, and how many did, so that each replay makes the same.
    seed: u64,
    failures: u64,
    /// Counts the calls.
    time: u64,
    files: Vec<File>,
    /// The directory as processes see it, and as it is on the disk for sure, before the changes.
    names: Names,
    sure_names: Names,
    changes: Vec<Change>,
    handles: HashMap<i64, usize>,
    /// What handles stand for: several may share one, and so a position.
    opened: Vec<Opened>,
    /// When each thread's sync began.
    syncs: HashMap<u32, (i64, u64)>,
}

type Names = BTreeMap<String, usize>;

#[derive(Clone)]
struct Opened {
    /// `None` for the directory.
    file: Option<usize>,
    appends: bool,
    position: usize,
}

#[derive(Clone)]
struct Change {
    time: u64,
    entries: Vec<(String, Option<usize>)>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Dirty,
    GivenUp,
    Sure,
}

impl Disk {
    pub fn new(block_bytes: usize, seed: u64) -> Disk {
        Disk {
            block_bytes,
            left_out: None,
            seed,
            failures: 0,
            time: 0,
            files: Vec::new(),
            names: Names::new(),
            sure_names: Names::new(),
            changes: Vec::new(),
            handles: HashMap::new(),
            opened: Vec::new(),
            syncs: HashMap::new(),
        }
    }

    /// Does what a call did in `dir`, and says what that was; `None` where it did nothing there. Panics at what it does not
    /// know, for then the crashes would not be those that may come.
    pub fn apply(&mut self, call: &Call, dir: &str) -> Option<String> {
        self.time += 1;
        let Outcome::Done(value) = call.outcome else { return self.apply_sync_or_failure(call) };
        let fd = || call.number(0);
        let in_dir = |path: usize| {
            let path = call.path(path);
            path.strip_prefix(dir).and_then(|rest| rest.strip_prefix('/')).map(String::from)
        };
        let (first, second) = match call.name.as_str() {
            "openat" | "openat2" | "unlinkat" | "mkdirat" => (1, 1),
            "renameat" | "renameat2" | "linkat" => (1, 3),
            "symlinkat" => (2, 2),
            _ => (0, 1),
        };
        match call.name.as_str() {
            "open" | "openat" | "openat2" | "creat" => self.open(call, value, first, dir),
            "dup" | "dup2" | "dup3" => self.share(fd(), value),
            "fcntl" if call.args[1].text.starts_with("F_DUPFD") => self.share(fd(), value),
            "fcntl" => None,
            "close" => {
                self.handles.remove(&fd());
                None
            }
            "lseek" => {
                self.opened(fd())?.position = value as usize;
                None
            }
            "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" => self.write(call, value as usize),
            "ftruncate" if self.left_out == Some(LeftOut::Truncations) => None,
            "ftruncate" => {
                let (file, length) = (self.opened(fd())?.file?, call.number(1) as usize);
                let before = self.files[file].bytes.len();
                self.files[file].cut(length, self.time);
                Some(format!("{} cut from {before} to {length}", self.name_of(file)))
            }
            "fsync" | "fdatasync" => self.end_sync(call, true),
            "rename" | "renameat" | "renameat2" => match (in_dir(first), in_dir(second)) {
                (Some(from), Some(to)) => {
                    let file = self.names[&from];
                    let said = format!("{from} renamed {to}");
                    self.change(vec![(to, Some(file)), (from, None)]);
                    Some(said)
                }
                (None, None) => None,
                _ => panic!("renamed into the directory or out of it: {call:?}"),
            },
            "link" | "linkat" => {
                let (from, to) = (in_dir(first), in_dir(second)?);
                let file = self.names[&from.expect("linked from elsewhere")];
                let said = format!("{} linked as {to}", self.name_of(file));
                self.change(vec![(to, Some(file))]);
                Some(said)
            }
            "unlink" | "unlinkat" => {
                let name = in_dir(first)?;
                let said = format!("{name} unlinked");
                self.change(vec![(name, None)]);
                Some(said)
            }
            "truncate" | "symlink" | "symlinkat" | "mkdir" | "mkdirat" => {
                let is_elsewhere = in_dir(if call.name == "symlink" { 1 } else { first }).is_none();
                assert!(is_elsewhere, "the model does not know {call:?}");
                None
            }
            _ => {
                let touched = (0..call.args.len().min(3))
                    .find(|arg| call.args[*arg].text.parse().is_ok_and(|fd: i64| self.handles.contains_key(&fd)));
                let is_harmless = touched.is_none() && !["sync", "io_uring_setup"].contains(&call.name.as_str());
                assert!(is_harmless, "the model does not know {call:?}");
                None
            }
        }
    }

    fn apply_sync_or_failure(&mut self, call: &Call) -> Option<String> {
        match (call.name.as_str(), call.outcome) {
            ("fsync" | "fdatasync", Outcome::Begun) => {
                let fd = call.number(0);
                let file = self.opened(fd)?.file;
                self.syncs.insert(call.thread, (fd, self.time));
                let name = file.map_or("the directory".into(), |file| self.name_of(file));
                Some(format!("{name}: a sync begins"))
            }
            (_, Outcome::Killed) => None, // nobody knows what became of a sync; of the others, see `settle`
            ("fsync" | "fdatasync", _) => self.end_sync(call, false),
            ("close", _) => {
                self.handles.remove(&call.number(0)); // Linux does, also where it fails
                None
            }
            (name, Outcome::MadeUp) => panic!("{name} was made up, and the model does not know what of it was done"),
            _ => None,
        }
    }

    fn open(&mut self, call: &Call, fd: i64, path: usize, dir: &str) -> Option<String> {
        self.handles.remove(&fd);
        let path = call.path(path);
        let rest = path.strip_prefix(dir)?;
        let flags: String = call.args[1..].iter().map(|arg| arg.text.as_str()).collect();
        let Some(name) = rest.strip_prefix('/').filter(|name| !name.is_empty()) else {
            assert!(rest.is_empty() || rest == "/", "{path} is in no directory that the model knows");
            self.handle(fd, None, false);
            return None;
        };
        let is_strange = |flag: &&str| flags.contains(*flag) || name.contains('/');
        assert!(!["O_SYNC", "O_DSYNC", "O_TMPFILE"].iter().any(is_strange), "the model does not know {call:?}");
        let (file, said) = match self.names.get(name).copied() {
            Some(file) if flags.contains("O_TRUNC") => {
                self.files[file].cut(0, self.time);
                (file, Some(format!("{name} opened, and cut to 0")))
            }
            Some(file) => (file, None),
            None => {
                assert!(flags.contains("O_CREAT") || call.name == "creat", "{name} is not there, says the model");
                self.files.push(File::holding(Vec::new(), self.block_bytes));
                let file = self.files.len() - 1;
                self.change(vec![(name.into(), Some(file))]);
                (file, Some(format!("{name} created")))
            }
        };
        self.handle(fd, Some(file), flags.contains("O_APPEND"));
        said
    }

    fn handle(&mut self, fd: i64, file: Option<usize>, appends: bool) {
        self.opened.push(Opened { file, appends, position: 0 });
        self.handles.insert(fd, self.opened.len() - 1);
    }

    fn opened(&mut self, fd: i64) -> Option<&mut Opened> {
        self.handles.get(&fd).map(|at| &mut self.opened[*at])
    }

    fn share(&mut self, fd: i64, new: i64) -> Option<String> {
        match self.handles.get(&fd).copied() {
            Some(opened) => self.handles.insert(new, opened),
            None => self.handles.remove(&new),
        };
        None
    }

    /// The process is killed while it writes: whole blocks are there, and the rest is not. Says how much that is.
    pub fn apply_part(&mut self, call: &Call, dir: &str, random: &mut Random) -> Option<usize> {
        let Outcome::Done(count) = call.outcome else { return None };
        let (_, at) = if call.name.contains("write") { self.place(call)? } else { return None };
        let (first, end) = (at / self.block_bytes + 1, (at + count as usize).div_ceil(self.block_bytes));
        let borders = end.checked_sub(first).filter(|borders| *borders > 0)?;
        let part = (first + random.below(borders)) * self.block_bytes - at;
        self.apply(&call.after(part), dir);
        Some(part)
    }

    /// What became of a call in which the process was killed, as the directory shows it.
    pub fn settle(&mut self, call: &Call, dir: &str, left: &BTreeMap<String, Vec<u8>>) -> Outcome {
        let name_in = |path: usize| call.path(path).strip_prefix(dir)?.strip_prefix('/').map(String::from);
        let is_left = |path: usize| name_in(path).is_some_and(|name| left.contains_key(&name));
        let was_done = match call.name.as_str() {
            _ if call.outcome != Outcome::Killed => return call.outcome,
            "write" | "writev" | "pwrite64" => {
                let Some((file, at)) = self.place(call) else { return Outcome::Failed };
                let found = left.get(&self.name_of(file)).and_then(|bytes| bytes.get(at..)).unwrap_or_default();
                let written = found.iter().zip(&call.args[1].bytes).take_while(|(found, sent)| found == sent).count();
                return if written > 0 { Outcome::Done(written as i64) } else { Outcome::Failed };
            }
            "ftruncate" => {
                let file = self.opened(call.number(0)).and_then(|opened| opened.file);
                let found = file.and_then(|file| left.get(&self.name_of(file)));
                found.is_some_and(|bytes| bytes.len() == call.number(1) as usize)
            }
            "openat" => is_left(1),
            "linkat" => is_left(3),
            "link" => is_left(1),
            "rename" | "unlink" => name_in(0).is_some() && !is_left(0),
            "renameat" | "renameat2" | "unlinkat" => name_in(1).is_some() && !is_left(1),
            _ => false,
        };
        if was_done { Outcome::Done(i64::MAX) } else { Outcome::Failed }
    }

    /// Which file a write goes to, and where.
    fn place(&mut self, call: &Call) -> Option<(usize, usize)> {
        let opened = self.opened(call.number(0))?.clone();
        let file = opened.file?;
        let at = match opened.appends {
            true => self.files[file].bytes.len(),
            false if call.name.starts_with('p') => call.number(3) as usize,
            false => opened.position,
        };
        Some((file, at))
    }

    fn write(&mut self, call: &Call, count: usize) -> Option<String> {
        let (file, at) = self.place(call)?;
        self.files[file].write(at, &call.args[1].bytes[..count], self.time);
        if !call.name.starts_with('p') {
            self.opened(call.number(0))?.position = at + count;
        }
        Some(format!("{}: {count} bytes written at {at}", self.name_of(file)))
    }

    fn end_sync(&mut self, call: &Call, has_succeeded: bool) -> Option<String> {
        let (fd, began) = self.syncs.remove(&call.thread)?;
        let file = self.opened(fd)?.file;
        let name = file.map_or("the directory".into(), |file| self.name_of(file));
        let is_left_out = match self.left_out {
            Some(LeftOut::Syncs) => file.is_some(),
            Some(LeftOut::DirectorySyncs) => file.is_none(),
            Some(LeftOut::SyncsBesideTheJournal) => file.is_some() && self.names.get(JOURNAL).copied() != file,
            Some(LeftOut::Truncations) | None => false,
        };
        if is_left_out {
            return None;
        }
        let said = format!("{name}: the sync {}", if has_succeeded { "ends" } else { "fails" });
        if has_succeeded {
            self.sync(file, began)
        } else {
            self.give_up(file, began)
        }
        Some(said)
    }

    fn sync(&mut self, file: Option<usize>, began: u64) {
        if let Some(file) = file {
            return self.files[file].sync(began);
        }
        for change in self.changes.iter_mut().filter(|change| change.time <= began && change.state == State::Dirty) {
            change.state = State::Sure;
        }
        let sure = self.changes.iter().take_while(|change| change.state == State::Sure).count();
        for change in self.changes.drain(..sure) {
            set(&mut self.sure_names, &change.entries);
        }
    }

    /// The kernel could not write all of it: of the rest, some is given up and some is not.
    fn give_up(&mut self, file: Option<usize>, began: u64) {
        self.failures += 1;
        let mut random = of_seed(self.seed.wrapping_add(self.failures));
        let all = random.below(2) == 0;
        let mut is_given_up = || all || random.below(2) == 0;
        if let Some(file) = file {
            return self.files[file].give_up(began, is_given_up);
        }
        for change in self.changes.iter_mut().filter(|change| change.time <= began && change.state == State::Dirty) {
            if is_given_up() {
                change.state = State::GivenUp;
            }
        }
    }

    fn change(&mut self, entries: Vec<(String, Option<usize>)>) {
        set(&mut self.names, &entries);
        self.changes.push(Change { time: self.time, entries, state: State::Dirty });
    }

    fn name_of(&self, file: usize) -> String {
        let found = self.names.iter().find(|(_, of)| **of == file);
        found.map_or("a file without a name".into(), |(name, _)| name.clone())
    }

    /// The process is gone, and what it has written is there, unless the kernel may read again what it has given up.
    pub fn after_kill(mut self, may_read_again: bool, random: &mut Random) -> Disk {
        self.handles.clear();
        self.opened.clear();
        self.syncs.clear();
        for file in 0..self.files.len() {
            if may_read_again && random.below(3) == 0 {
                self.files[file].read_again(random);
            }
        }
        self
    }

    /// The syncs that have begun and not ended fail, which nobody is told: the process is killed, and the kernel has
    /// forgotten it by the next start.
    pub fn fail_what_is_begun(&mut self) {
        self.time += 1;
        for (_, (fd, began)) in std::mem::take(&mut self.syncs) {
            let file = self.opened(fd).and_then(|opened| opened.file);
            self.give_up(file, began);
        }
    }

    /// The power was lost: what is left, which is sure from then on.
    pub fn after_power_loss(&self, reached: Reached, random: &mut Random) -> Disk {
        let (in_order, mut is_over) = (random.below(2) == 0, false);
        let mut names = self.sure_names.clone();
        for change in &self.changes {
            let has_reached = change.state == State::Sure
                || match reached {
                    Reached::Nothing => false,
                    Reached::Everything => true,
                    Reached::Some => {
                        let has_reached = random.below(2) == 0 && !(in_order && is_over);
                        is_over |= !has_reached;
                        has_reached
                    }
                };
            if has_reached {
                set(&mut names, &change.entries);
            }
        }
        let mut left = Disk::new(self.block_bytes, self.seed ^ random.below(usize::MAX) as u64);
        left.files = self.files.iter().map(|file| file.after_power_loss(reached, random)).collect();
        left.left_out = self.left_out;
        (left.names, left.sure_names) = (names.clone(), names);
        left
    }

    /// What processes see in the directory.
    pub fn seen(&self) -> BTreeMap<String, Vec<u8>> {
        self.names.iter().map(|(name, file)| (name.clone(), self.files[*file].bytes.clone())).collect()
    }

    /// Makes a directory that holds it, in which a file of two names is one file.
    pub fn make(&self, dir: &Path) {
        fs::create_dir(dir).unwrap();
        let mut made = HashMap::new();
        for (name, file) in &self.names {
            let path = dir.join(name);
            match made.get(file) {
                None => fs::write(&path, &self.files[*file].bytes).unwrap(),
                Some(first) => fs::hard_link(first, &path).unwrap(),
            }
            made.entry(file).or_insert(path);
        }
    }

    /// What is seen and what is sure, a line a file.
    pub fn describe(&self) -> String {
        let line = |(name, file): (&String, &usize)| {
            let is_sure = if self.sure_names.get(name) == Some(file) { "" } else { ", a name that is not synced" };
            format!("    {name}{is_sure}: {}\n", self.files[*file].describe())
        };
        self.names.iter().map(line).collect()
    }
}

/// Numbers that look random, also where the seeds are neighbours.
pub fn of_seed(seed: u64) -> Random {
    let mut random = Random(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    (0..8).for_each(|_| _ = random.below(2));
    random
}

fn set(names: &mut Names, entries: &[(String, Option<usize>)]) {
    for (name, file) in entries {
        match file {
            Some(file) => names.insert(name.clone(), *file),
            None => names.remove(name),
        };
    }
}

mod tests {
    use super::*;
    use crate::power::trace::parse;

    /// A log with its strings as strace writes them; here they stand in single quotes.
    fn calls(log: &str) -> Vec<Call> {
        let text = |text: &str| text.bytes().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
        let parts = log.split('\'').enumerate();
        let log: String =
            parts.map(|(at, part)| if at % 2 == 1 { format!("\"{}\"", text(part)) } else { part.into() }).collect();
        parse(&log)
    }

    /// What is on the disk for sure after these calls in `/d`, and what is said of them.
    fn left(log: &str) -> (BTreeMap<String, Vec<u8>>, Vec<String>) {
        let mut disk = Disk::new(512, 1);
        let said = calls(log).iter().filter_map(|call| disk.apply(call, "/d")).collect();
        (disk.after_power_loss(Reached::Nothing, &mut Random(1)).seen(), said)
    }

    const RENAMED: &str = "7 openat(AT_FDCWD, '/d/new', O_WRONLY|O_CREAT|O_APPEND, 0600) = 5\n\
        7 writev(5, [{iov_base='one', iov_len=3}, {iov_base='two', iov_len=3}], 2) = 6\n\
        7 fsync(5)    = 0\n\
        7 rename('/d/new', '/d/events') = 0\n\
        7 openat(AT_FDCWD, '/d', O_RDONLY|O_CLOEXEC) = 6\n";

    #[test]
    fn a_name_is_undone_unless_the_directory_was_synced() {
        assert!(left(RENAMED).0.is_empty());
        assert!(left(&format!("{RENAMED}7 fsync(6) = -1 EIO (Input/output error) (INJECTED)\n")).0.is_empty());
        assert!(left(&format!("{RENAMED}7 fsync(6) = 0 (INJECTED)\n")).0.is_empty(), "it only seems to be synced");
        let (found, said) = left(&format!("{RENAMED}7 fsync(6) = 0\n"));
        assert_eq!(found, BTreeMap::from([("events".into(), b"onetwo".to_vec())]));
        assert_eq!(said[..2], ["new created", "new: 6 bytes written at 0"]);
    }

    #[test]
    fn what_another_thread_writes_during_a_sync_is_not_covered_by_it() {
        let log = format!(
            "{RENAMED}7 fsync(6) = 0\n\
             8 fdatasync(5 <unfinished ...>\n\
             7 write(5, 'three', 5 <unfinished ...>\n\
             8 <... fdatasync resumed>) = 0\n\
             7 <... write resumed>) = 5\n"
        );
        assert_eq!(left(&log).0["events"], b"onetwo");
        assert_eq!(left(&format!("{log}8 fdatasync(5) = 0\n")).0["events"], b"onetwothree");
    }

    #[test]
    fn a_descriptor_belongs_to_whoever_got_it_while_another_thread_was_closing_it() {
        let log = format!(
            "8 close(5 <unfinished ...>\n\
             {RENAMED}7 fsync(6) = 0\n\
             8 <... close resumed>) = 0\n\
             7 write(5, 'three', 5) = 5\n\
             7 fsync(5) = 0\n"
        );
        assert_eq!(left(&log).0["events"], b"onetwothree");
    }

    #[test]
    fn what_was_done_of_a_call_in_which_the_process_was_killed_is_seen_from_what_it_left() {
        let found = |log: &str, name: &str, bytes: &[u8]| {
            let mut disk = Disk::new(512, 1);
            let calls = calls(&format!("{RENAMED}{log}"));
            let (last, others) = calls.split_last().unwrap();
            others.iter().for_each(|call| drop(disk.apply(call, "/d")));
            disk.settle(last, "/d", &BTreeMap::from([(name.into(), bytes.to_vec())]))
        };
        let write = "7 write(5, 'three', 5 <unfinished ...>) = ?\n";
        assert_eq!(found(write, "events", b"onetwo"), Outcome::Failed);
        assert_eq!(found(write, "events", b"onetwoth"), Outcome::Done(2));
        let rename = "8 rename('/d/events', '/d/old' <unfinished ...>\n8 <... rename resumed>) = ?\n";
        assert_eq!(found(rename, "events", b"onetwo"), Outcome::Failed);
        assert!(matches!(found(rename, "old", b"onetwo"), Outcome::Done(_)));
        let cut = "7 ftruncate(5, 3 <unfinished ...>) = ?\n";
        assert_eq!(found(cut, "events", b"onetwo"), Outcome::Failed);
        assert!(matches!(found(cut, "events", b"one"), Outcome::Done(_)));
    }
}
