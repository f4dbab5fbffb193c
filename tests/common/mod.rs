//! What the tests share: a server on port 0, a client that speaks raw bytes, and waiting on conditions with deadlines.
#![allow(dead_code)] // each test file uses its part

use brooklet::{Config, Handle, Id, Server};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Longest that any condition is waited for: a bound against hanging, not a measure of speed.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn serve(config: Config) -> Handle {
    Server::bind("127.0.0.1:0", config).unwrap().spawn().unwrap()
}

/// Runs a line of shell, which has `kill` where a small system has no such program.
pub fn shell(line: &str) -> bool {
    Command::new("sh").args(["-c", line]).status().unwrap().success()
}

pub fn serve_default() -> Handle {
    serve(Config::default())
}

/// Waits until `condition` gives a value.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn metric(addr: SocketAddr, name: &str) -> u64 {
    let text = get(addr, "/metrics").body;
    let line = text.lines().find(|line| line.starts_with(&format!("brooklet_{name} ")));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
}

pub fn wait_for_metric(addr: SocketAddr, name: &str, value: u64) {
    wait_for(&format!("{name} to be {value}"), || (metric(addr, name) == value).then_some(()));
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

pub fn get(addr: SocketAddr, target: &str) -> Answer {
    Wire::ask(addr, &format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
}

pub fn post(addr: SocketAddr, target: &str, body: &str) -> Answer {
    let length = body.len();
    Wire::ask(addr, &format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"))
}

/// An event as a page would see it; a block without data has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub event: Option<String>,
    pub id: Option<String>,
    pub data: Option<String>,
    pub retry: Option<u64>,
    pub comments: Vec<String>,
}

impl Seen {
    pub fn data(&self) -> &str {
        self.data.as_deref().unwrap_or_else(|| panic!("no data in {self:?}"))
    }

    pub fn id(&self) -> Id {
        self.id.as_deref().unwrap_or_else(|| panic!("no id in {self:?}")).parse().unwrap()
    }

    pub fn is_gap(&self) -> bool {
        self.event.as_deref() == Some("gap")
    }

    /// Reads one block by the rules of the HTML standard. Panics on what our own bytes must never hold.
    fn parse(block: &[u8]) -> Seen {
        let text = str::from_utf8(block).unwrap();
        assert!(!text.contains('\r'), "a CR went out: {text:?}");
        let mut seen = Seen::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_string();
            match field {
                "" => seen.comments.push(value),
                "event" => seen.event = Some(value),
                "id" => seen.id = Some(value),
                "retry" => seen.retry = Some(value.parse().unwrap()),
                "data" => match &mut seen.data {
                    Some(data) => data.extend(["\n", &value]),
                    None => seen.data = Some(value),
                },
                other => panic!("the field {other:?} went out: {text:?}"),
            }
        }
        seen
    }
}

/// A connection that speaks raw bytes.
pub struct Wire {
    pub socket: TcpStream,
    pub buffer: Vec<u8>,
}

impl Wire {
    pub fn connect(addr: SocketAddr) -> Wire {
        Wire::on(TcpStream::connect(addr).unwrap())
    }

    pub fn on(socket: TcpStream) -> Wire {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        Wire { socket, buffer: Vec::new() }
    }

    pub fn ask(addr: SocketAddr, request: &str) -> Answer {
        let mut wire = Wire::connect(addr);
        wire.send(request.as_bytes());
        wire.answer()
    }

    /// Opens a stream and reads its head; `fields` are further header lines, each with its CRLF.
    pub fn stream(addr: SocketAddr, target: &str, fields: &str) -> Wire {
        let mut wire = Wire::connect(addr);
        wire.send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n").as_bytes());
        let head = wire.head();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert_eq!(header(&head, "content-type"), Some("text/event-stream"), "{head}");
        wire
    }

    /// Opens a stream of topics and reads its first block, too. Returns the cursor it names.
    pub fn subscribe(addr: SocketAddr, target: &str, fields: &str) -> (Wire, Id) {
        let mut wire = Wire::stream(addr, target, fields);
        let first = wire.block().expect("a first block");
        assert!(first.data.is_none() && first.event.is_none() && first.retry.is_some(), "{first:?}");
        (wire, first.id())
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Everything up to and with `end`; `None` when the connection ends before.
    pub fn take_until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "only heartbeats: {:?}", String::from_utf8_lossy(&self.buffer));
            if let Some(at) = self.buffer.windows(end.len()).position(|w| w == end) {
                return Some(self.buffer.drain(..at + end.len()).collect());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    fn fill(&mut self) -> bool {
        let mut chunk = [0; 16 * 1024];
        match self.socket.read(&mut chunk) {
            Ok(0) => false,
            Ok(got) => {
                self.buffer.extend_from_slice(&chunk[..got]);
                true
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("reading: {error}; so far {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }

    pub fn head(&mut self) -> String {
        let head = self.take_until(b"\r\n\r\n");
        let head = head.unwrap_or_else(|| panic!("no head: {:?}", String::from_utf8_lossy(&self.buffer)));
        String::from_utf8(head).unwrap()
    }

    pub fn answer(&mut self) -> Answer {
        let head = self.head();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length: usize = header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
        while self.buffer.len() < length {
            assert!(self.fill(), "the answer ended early: {head}");
        }
        let body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        Answer { status, head, body }
    }

    /// The next block of a stream, whatever it holds; heartbeats before it are among its comments.
    pub fn block(&mut self) -> Option<Seen> {
        self.take_until(b"\n\n").map(|block| Seen::parse(&block))
    }

    /// The next event with data.
    pub fn event(&mut self) -> Option<Seen> {
        loop {
            match self.block() {
                Some(seen) if seen.data.is_some() => return Some(seen),
                Some(_) => {}
                None => return None,
            }
        }
    }

    pub fn rest(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.buffer)
    }

    pub fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The command, started on port 0. Killed when dropped.
pub struct Process {
    pub child: Child,
    pub addr: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Process {
    pub fn start(flags: &[&str]) -> Process {
        Process::from(Command::new(env!("CARGO_BIN_EXE_brooklet")).args(["--listen", "127.0.0.1:0"]).args(flags))
    }

    pub fn from(command: &mut Command) -> Process {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (log, stderr) = (Arc::new(Mutex::new(String::new())), child.stderr.take().unwrap());
        let copy = log.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *copy.lock().unwrap() += &(line + "\n");
            }
        });
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let addr = first.split("http://").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        let addr = addr.unwrap_or_else(|| panic!("no address in {first:?}; stderr {}", log.lock().unwrap()));
        Process { child, addr, log }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn signal(&self, name: &str) {
        assert!(shell(&format!("kill -{name} {}", self.child.id())));
    }

    /// The number that /proc gives for this field of the process's status, such as `Threads` or `VmRSS` (kB).
    pub fn status(&self, field: &str) -> usize {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
