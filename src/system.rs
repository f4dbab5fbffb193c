//! What the system allows this process, and which run of the machine it is.
//!
//! A thread that cannot map its stack's guard aborts the process from inside its start-up, where no error can be caught.
//! So limits on connections are lowered to what there is room for before it comes to that. All of this is read from
//! Linux's /proc and /sys; on other systems nothing is there, and no limit is lowered.

use crate::config::{Config, Log};
use crate::log::Logger;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Where address space is limited (`ulimit -v`), a newcomer is taken only while this much is free: for its thread, and for
/// what all others allocate.
const SPARE_SPACE_KB: usize = 12 * 1024;
/// Descriptors, tasks and memory mappings that are left for everything but connections.
const SPARE_FILES: usize = 16;
const SPARE_TASKS: usize = 16;
const SPARE_MAPPINGS: usize = 1024;

/// Lowers the limits on connections to what the system gives this process.
///
/// # Errors
/// There is no room for two connections.
pub fn fit(mut config: Config, lanes: usize, log: &Logger) -> io::Result<Config> {
    let limits = [
        (files_left(), "open files (ulimit -n)"),
        (mappings_left() / mappings_for_each(&config), "memory mappings (vm.max_map_count)"),
        (tasks_left().saturating_sub(lanes + SPARE_TASKS), "tasks in its control group (pids.max)"),
    ];
    let (room, what) = limits.into_iter().min().unwrap_or((usize::MAX, ""));
    if room < 2 {
        let reason = format!("no room for two connections: the limit is on {what}");
        return Err(io::Error::new(ErrorKind::QuotaExceeded, reason));
    }
    if config.subscribers.saturating_add(config.connections) > room {
        config.connections = config.connections.min(room / 8 + 1);
        config.subscribers = config.subscribers.min(room - config.connections);
        let (subscribers, connections) = (config.subscribers, config.connections);
        let line =
            format_args!("room for {subscribers} streams and {connections} connections only: the limit is on {what}");
        log.line(Log::Info, line);
    }
    Ok(config)
}

/// The limit on this process's address space.
pub struct AddressSpace {
    limit_kb: Option<usize>,
}

impl AddressSpace {
    pub fn read() -> AddressSpace {
        AddressSpace { limit_kb: field_of("/proc/self/limits", "Max address space").map(|bytes| bytes / 1024) }
    }

    /// Whether another thread can start: std aborts the process where its signal stack finds no space.
    pub fn has_room(&self) -> bool {
        let Some(limit_kb) = self.limit_kb else { return true };
        field_of("/proc/self/status", "VmSize:").is_some_and(|taken_kb| taken_kb + SPARE_SPACE_KB <= limit_kb)
    }
}

/// The run of the machine that this is; `None` where the system does not tell.
pub fn boot_id() -> Option<String> {
    let id = read("/proc/sys/kernel/random/boot_id").trim().to_string();
    Some(id).filter(|id| !id.is_empty())
}

/// The process that has locked the file of this number; `None` where the system does not tell. Several file systems may have
/// files of one number, but hardly locked ones.
pub fn lock_holder(inode: u64) -> Option<u32> {
    let end = format!(":{inode}");
    read("/proc/locks").lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|file| file.ends_with(&end));
        fields.get(4).filter(|_| is_it)?.parse().ok()
    })
}

fn files_left() -> usize {
    let open = match fs::read_dir("/proc/self/fd") {
        Ok(open) => open.count(),
        Err(error) if error.kind() == ErrorKind::NotFound => 0, // not Linux
        Err(_) => return 0,                                     // there is no descriptor to look with
    };
    field_of("/proc/self/limits", "Max open files").unwrap_or(usize::MAX).saturating_sub(open + SPARE_FILES)
}

fn mappings_left() -> usize {
    let mapped = read("/proc/self/maps").lines().count();
    field_of("/proc/sys/vm/max_map_count", "").unwrap_or(usize::MAX).saturating_sub(mapped + SPARE_MAPPINGS)
}

/// A thread takes 4: its stack, its signal stack, and their guards. glibc gives each buffer of 128 KiB one of its own.
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

/// The first number behind `name` in a file; `None` where it is not there, or is the word for no limit.
fn field_of(path: impl AsRef<Path>, name: &str) -> Option<usize> {
    read(path).lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
