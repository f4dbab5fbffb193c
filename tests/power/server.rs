//! The program itself, started on a directory and recorded by strace, in a boot of its own; and its clients.

use super::disk::JOURNAL;
use super::look::{self, Sight};
use super::trace::{self, CALLS, Call};
use crate::common::{self, BROOKLET, Wire, shell, wait_longer_for};
use brooklet::Id;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub struct Settings<'a> {
    /// Has the journal in it, and the files beside it.
    pub dir: &'a Path,
    /// Where the log of the calls goes, and what it says on stderr.
    pub notes: PathBuf,
    /// Which boot of the machine this is.
    pub boot: usize,
    pub fsync: bool,
    pub keep_events: usize,
    /// Further arguments for strace, which make calls fail; `None` where nothing is recorded.
    pub recorded: Option<&'a [String]>,
}

pub struct Server {
    child: Child,
    /// `None` where the start failed.
    pub addr: Option<SocketAddr>,
    notes: PathBuf,
    is_recorded: bool,
}

impl Server {
    /// Starts it, and waits until it is ready or has given up.
    pub fn start(settings: &Settings) -> Server {
        let Settings { dir, notes, boot, .. } = settings;
        let boot_file = notes.with_extension("boot");
        fs::write(&boot_file, format!("00000000-0000-4000-8000-{boot:012}\n")).unwrap();
        // Another boot for this process alone; and a file that must not grow is an error of the write, not a signal.
        let script = "mount --bind $0 /proc/sys/kernel/random/boot_id && trap '' XFSZ && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]).arg(&boot_file);
        if let Some(faults) = settings.recorded {
            command.args(["strace", "--seccomp-bpf", "-f", "-xx", "-s", "16777216", "-e", "signal=none", "-e", CALLS]);
            command.args(faults).arg("-o").arg(notes.with_extension("calls"));
        }
        command.args([BROOKLET, "--listen", "127.0.0.1:0", "--journal"]);
        command.arg(dir.join(JOURNAL)).arg(format!("--keep-events={}", settings.keep_events));
        command.args(settings.fsync.then_some("--fsync"));
        let stderr = fs::File::create(notes.with_extension("stderr")).unwrap();
        let mut child = common::start(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr));
        let addr = common::address(child.stdout.take().unwrap()).ok();
        Server { child, addr, notes: notes.clone(), is_recorded: settings.recorded.is_some() }
    }

    fn addr(&self) -> SocketAddr {
        self.addr.expect("it is ready")
    }

    /// How much of the log there is now, if there is one: see [`Call::end`].
    pub fn mark(&self) -> u64 {
        fs::metadata(self.notes.with_extension("calls")).map_or(0, |log| log.len())
    }

    pub fn said(&self) -> String {
        fs::read_to_string(self.notes.with_extension("stderr")).unwrap()
    }

    fn process(&self) -> Option<u32> {
        if !self.is_recorded {
            return Some(self.child.id());
        }
        let mut first = String::new();
        BufReader::new(fs::File::open(self.notes.with_extension("calls")).ok()?).read_line(&mut first).ok()?;
        first.split(' ').next()?.parse().ok()
    }

    /// No file may grow past this; `None` takes the limit away. What does not fit of a write is cut off.
    ///
    /// # Errors
    /// The server is gone.
    pub fn limit_files(&self, bytes: Option<u64>) -> Result<(), String> {
        let limit = bytes.map_or("unlimited".into(), |bytes| bytes.to_string());
        let process = self.process().expect("it runs");
        let is_set = shell(&format!("prlimit --pid {process} --fsize={limit}:"));
        if is_set { Ok(()) } else { Err(format!("the server {process} is gone: {}", self.said())) }
    }

    /// Ends it by this signal, and gives what was recorded.
    pub fn end(mut self, signal: &str) -> Vec<Call> {
        let process = self.process();
        if let (Ok(None), Some(process)) = (self.child.try_wait(), process) {
            shell(&format!("kill -{signal} {process} 2>/dev/null")); // it may just be ending by itself
        }
        wait_longer_for("the server to end", || self.child.try_wait().unwrap().map(drop));
        if !self.is_recorded {
            return Vec::new();
        }
        trace::parse(&fs::read_to_string(self.notes.with_extension("calls")).unwrap())
    }

    /// What the topics keep: see [`look::look`].
    ///
    /// # Errors
    /// What came instead of a whole stream.
    pub fn look(&self, topics: &[&str], cursor: Option<Id>) -> Result<Sight, String> {
        look::look(self.addr(), topics, cursor).map_err(|error| format!("{error}; the server says {}", self.said()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let (Ok(None), Some(process)) = (self.child.try_wait(), self.process()) {
            shell(&format!("kill -9 {process} 2>/dev/null"));
            let _ = self.child.wait();
        }
    }
}

/// A connection that publishes, and stays open. Where it is cut off, it comes back for the next request.
pub struct Publisher {
    addr: SocketAddr,
    wire: Option<Wire>,
}

impl Publisher {
    pub fn to(server: &Server) -> Publisher {
        Publisher { addr: server.addr(), wire: None }
    }

    /// The status and the body of the answer; `None` where the connection was cut before its end.
    pub fn ask(&mut self, method: &str, target: &str, body: &str) -> Option<(u16, String)> {
        let mut wire = self.wire.take().or_else(|| TcpStream::connect(self.addr).ok().map(Wire::on))?;
        let length = body.len();
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
        wire.socket.write_all(request.as_bytes()).ok()?;
        let head = wire.head_if_any()?;
        let length = common::header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
        let body = String::from_utf8(wire.take_if_any(length)?).unwrap();
        if common::header(&head, "connection") != Some("close") {
            self.wire = Some(wire);
        }
        Some((head.split(' ').nth(1)?.parse().ok()?, body))
    }
}
