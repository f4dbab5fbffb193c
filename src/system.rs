//! What the system allows this process, and which boot of the machine this is.
//!
//! A thread that cannot map its stack's guard aborts the process from inside its start-up, where no error can be
//! caught. So the limits on connections are lowered to what there is room for before it comes to that. All of this is
//! read from Linux's `/proc` and `/sys`; other systems have neither, and there no limit is lowered.

use crate::config::{Config, FEWEST_THREADS, Log};
use crate::log::Logger;
use crate::sync::{Mutex, STACK_BYTES, enter};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Where address space is limited (`ulimit -v`), a connection is accepted only while this much is free, in KiB: for
/// what all others allocate.
const LEAST_SPACE_KB: usize = 6 * 1024;
/// The same for starting a thread.
const THREADS_SPACE_KB: usize = 12 * 1024;
/// The same for letting a stream in: what is between the two is for publishing and health, and is room for some forty
/// threads.
const STREAMS_SPACE_KB: usize = 18 * 1024;
/// Held back, in KiB: malloc takes 64 MiB at a time for threads' memory, and may leave next to nothing.
const RESERVE_KB: usize = 24 * 1024;
/// Descriptors, tasks and memory mappings that are left for everything but connections: the journal, its lock and its
/// new file; the threads that accept, log and write; what glibc maps in large pieces.
const SPARE_FILES: usize = 16;
const SPARE_TASKS: usize = 16;
const SPARE_MAPPINGS: usize = 1024;
const _: () = assert!(
    (THREADS_SPACE_KB - LEAST_SPACE_KB) * 1024 >= 16 * STACK_BYTES,
    "several threads may start between two looks"
);
const _: () =
    assert!(THREADS_SPACE_KB < STREAMS_SPACE_KB && STREAMS_SPACE_KB < RESERVE_KB && 2 * RESERVE_KB < 64 * 1024);

/// Lowers the limits on connections to what the system gives this process, and says so in the log. Called once, before
/// any connection has a thread, and after the listener and the log have what they need.
///
/// # Errors
/// [`ErrorKind::QuotaExceeded`]: there is no room for two connections, one to publish and one to read, or for the
/// fewest threads.
pub fn fit(mut config: Config, lanes: usize, log: &Logger) -> io::Result<Config> {
    let (room, what) = (files_left(), "open files (ulimit -n)");
    if room < 2 {
        return Err(no_room("two connections", what));
    }
    if config.subscribers.saturating_add(config.connections) > room {
        // An eighth for publishing and health, which must work while all streams are taken.
        config.connections = config.connections.min(room / 8 + 1);
        config.subscribers = config.subscribers.min(room - config.connections);
        let (subscribers, connections) = (config.subscribers, config.connections);
        let line =
            format_args!("room for {subscribers} streams and {connections} connections only: the limit is on {what}");
        log.line(Log::Info, line);
    }
    if let Some(limit_kb) = space_limit_kb() {
        let most = limit_kb.saturating_sub(space_taken_kb()) / 2 * 1024; // the other half is for threads
        if config.keep_bytes > most {
            config.keep_bytes = most;
            let line = format_args!("room for keeping {most} bytes only: the limit is on address space (ulimit -v)");
            log.line(Log::Info, line);
        }
    }
    let threads = [
        (mappings_left() / mappings_for_each(&config), "memory mappings (vm.max_map_count)"),
        (tasks_left().saturating_sub(lanes + SPARE_TASKS), "tasks in its control group (pids.max)"),
    ];
    let (room, what) = threads.into_iter().min().unwrap_or((usize::MAX, ""));
    if room < FEWEST_THREADS {
        return Err(no_room(&format!("{FEWEST_THREADS} threads"), what));
    }
    if config.threads > room {
        config.threads = room;
        log.line(Log::Info, format_args!("room for {room} threads only: the limit is on {what}"));
    }
    Ok(config)
}

fn no_room(missing: &str, what: &str) -> io::Error {
    io::Error::new(ErrorKind::QuotaExceeded, format!("no room for {missing}: the limit is on {what}"))
}

/// The limit on this process's address space, and a part of it that malloc's pieces for threads cannot take: it is held
/// back until all else is used up.
pub struct AddressSpace {
    /// None where there is no limit, which is usual; then nothing is read for each connection either.
    limit_kb: Option<usize>,
    /// One byte with room for more, or with no room where it was given up.
    reserve: Mutex<Vec<u8>>,
}

/// What there is address space for. Streams are rejected first: publishing and health work longest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    Nothing,
    /// Connections that wait for one of the threads that there are.
    Connections,
    Threads,
    Streams,
}

impl AddressSpace {
    pub fn read() -> AddressSpace {
        let space = AddressSpace { limit_kb: space_limit_kb(), reserve: Mutex::new(vec![0]) };
        space.look(); // takes the reserve
        space
    }

    /// Looks at what is left. Reads a file of `/proc`, but only where there is a limit.
    pub fn look(&self) -> Room {
        let Some(limit_kb) = self.limit_kb else { return Room::Streams };
        let mut reserve = enter(&self.reserve);
        let left_kb = || limit_kb.saturating_sub(space_taken_kb());
        let mut left = left_kb();
        let is_held = reserve.capacity() > 1;
        if !is_held && left >= 2 * RESERVE_KB {
            let _ = reserve.try_reserve_exact(RESERVE_KB * 1024);
        } else if is_held && left < STREAMS_SPACE_KB {
            reserve.shrink_to(1); // freed whole, it would count for malloc as a usual size
            left = left_kb();
        }
        match left {
            STREAMS_SPACE_KB.. => Room::Streams,
            THREADS_SPACE_KB.. => Room::Threads,
            LEAST_SPACE_KB.. => Room::Connections,
            _ => Room::Nothing,
        }
    }
}

fn space_limit_kb() -> Option<usize> {
    field_of("/proc/self/limits", "Max address space").map(|bytes| bytes / 1024)
}

fn space_taken_kb() -> usize {
    field_of("/proc/self/status", "VmSize:").unwrap_or(usize::MAX)
}

/// Names this boot of the machine; `None` where the system does not tell. A different one in the journal means that the
/// machine has died or restarted since. <https://docs.kernel.org/admin-guide/sysctl/kernel.html#random>
pub fn boot_id() -> Option<String> {
    let id = read("/proc/sys/kernel/random/boot_id").trim().to_string();
    Some(id).filter(|id| !id.is_empty())
}

/// The process that has locked the file with this inode, for an error's message; `None` where the system does not tell.
/// Files of two file systems may share a number, but hardly two that are both locked.
pub fn lock_holder(inode: u64) -> Option<u32> {
    let end = format!(":{inode}");
    read("/proc/locks").lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`: the process, then the device and the inode.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|file| file.ends_with(&end));
        fields.get(4).filter(|_| is_it)?.parse().ok()
    })
}

/// How many more files this process may open.
fn files_left() -> usize {
    let open = match fs::read_dir("/proc/self/fd") {
        Ok(open) => open.count(),
        Err(error) if error.kind() == ErrorKind::NotFound => 0, // not Linux
        Err(_) => return 0,                                     // there is no descriptor to look with
    };
    field_of("/proc/self/limits", "Max open files").unwrap_or(usize::MAX).saturating_sub(open + SPARE_FILES)
}

/// How many more memory mappings it may have.
fn mappings_left() -> usize {
    let mapped = read("/proc/self/maps").lines().count();
    field_of("/proc/sys/vm/max_map_count", "").unwrap_or(usize::MAX).saturating_sub(mapped + SPARE_MAPPINGS)
}

/// Memory mappings for each connection: a thread takes 4, which are its stack, its signal stack, and their guards.
/// glibc maps each allocation of 128 KiB or more by itself, and a buffer that doubles gets there from 64 KiB.
fn mappings_for_each(config: &Config) -> usize {
    if config.head_bytes.max(config.data_bytes()) > 64 * 1024 { 6 } else { 4 }
}

/// How many tasks the control groups around this process leave it. Its own is written `0::/GROUP`, of version 1
/// `8:pids:/GROUP`; each group above it has a limit, too. <https://docs.kernel.org/admin-guide/cgroup-v2.html#pid>
fn tasks_left() -> usize {
    let mut least = usize::MAX;
    for line in read("/proc/self/cgroup").lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let root = match parts.next() {
            Some("") => "/sys/fs/cgroup",
            Some("pids") => "/sys/fs/cgroup/pids",
            _ => continue,
        };
        for group in Path::new(parts.next().unwrap_or_default().trim_start_matches('/')).ancestors() {
            let directory = Path::new(root).join(group);
            let (most, now) = (field_of(directory.join("pids.max"), ""), field_of(directory.join("pids.current"), ""));
            if let (Some(most), Some(now)) = (most, now) {
                least = least.min(most.saturating_sub(now));
            }
        }
    }
    least
}

/// The first number after `name` in a file; `None` where the file or the name is missing, or where the word for "no
/// limit" stands there.
fn field_of(path: impl AsRef<Path>, name: &str) -> Option<usize> {
    read(path).lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
