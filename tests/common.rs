//! What the tests share: a server on port 0, a client that speaks raw bytes, and waiting on conditions with deadlines.

use brooklet::{Config, Event, Handle, Id, Server};
use socket2::{Domain, Socket, Type};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Longest that any condition is waited for: a bound against hanging, not a measure of speed. On a machine of which each
/// test gets a fiftieth, what takes two seconds alone is still done by then.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The command.
pub const BROOKLET: &str = env!("CARGO_BIN_EXE_brooklet");

/// The server in one file.
pub const MINIMAL: &str = env!("CARGO_BIN_EXE_brooklet-minimal");

/// A request that always has an answer: `ok`.
pub const HEALTH: &str = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Held while a child starts. Until it runs its program, a child has copies of all our descriptors, also of the lock on a
/// journal whose server another test has just dropped: so nobody may look for that lock meanwhile.
static STARTING: Mutex<()> = Mutex::new(());

pub fn bind(config: Config) -> io::Result<Server> {
    drop(STARTING.lock().unwrap());
    Server::bind("127.0.0.1:0", config)
}

pub fn serve(config: Config) -> Handle {
    bind(config).unwrap().spawn().unwrap()
}

/// All children are started here.
pub fn start(command: &mut Command) -> Child {
    let starting = STARTING.lock().unwrap();
    let child = command.spawn();
    drop(starting);
    child.unwrap()
}

/// Runs a command to its end, without input.
pub fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    start(command).wait_with_output().unwrap()
}

/// Runs a line of shell, which has `kill` where a small system has no such program.
pub fn shell(line: &str) -> bool {
    start(Command::new("sh").args(["-c", line])).wait().unwrap().success()
}

/// Runs the test of this name, which calls this, in a process of its own: for those that take so many of the descriptors
/// which a process may have that others beside it would get none.
pub fn alone(test: &str, body: impl FnOnce()) {
    const ALONE: &str = "TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let mut program = Command::new(std::env::current_exe().unwrap());
    let output = output(program.args([test, "--exact", "--nocapture"]).env(ALONE, test));
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    print!("{stdout}");
    eprint!("{stderr}");
    assert!(output.status.success() && stdout.contains("1 passed"), "{test}, in a process of its own");
}

pub fn serve_default() -> Handle {
    serve(Config::default())
}

/// Closes nobody for taking nothing: where a reader is to wait, a busy machine may take its time.
pub fn patient() -> Config {
    Config::default().with(|config| config.stall_time = Duration::from_secs(3_600))
}

/// Times that soon are over, and long enough for a busy machine to send a whole head.
pub fn short_times() -> Config {
    let short = Duration::from_secs(1);
    Config::default().with(|config| {
        config.head_time = short;
        config.body_time = short;
        config.idle_time = short;
    })
}

pub fn with_journal(path: &str) -> Config {
    Config::default().with(|config| {
        config.journal = Some(path.into());
        config.lanes = 1;
    })
}

/// Waits until `condition` gives a value.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_until(Instant::now() + PATIENCE, what, condition)
}

/// The same, for what may itself take some of the server's times one after another.
pub fn wait_longer_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_until(Instant::now() + 3 * PATIENCE, what, condition)
}

/// Waits until a count has come to `goal`. Much work is given as long as it takes, provided that it goes on.
pub fn wait_for_growth(what: &str, goal: usize, mut count: impl FnMut() -> usize) {
    let mut had = 0;
    while had < goal {
        let now = wait_for(&format!("{what}: {had} of {goal}"), || Some(count()).filter(|now| *now > had));
        had = now;
    }
}

fn wait_until<T>(deadline: Instant, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
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
    Wire::connect(addr).post(target, body)
}

/// Publishes, and returns the id that the answer says.
pub fn publish(addr: SocketAddr, target: &str, body: &str) -> String {
    let answer = post(addr, target, body);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body.trim_end().into()
}

pub fn post_request(target: &str, body: &str) -> String {
    format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

pub fn numbered(n: u64, bytes: usize) -> Event {
    Event::new(format!("{n} {}", "x".repeat(bytes)))
}

/// Numbers that look random and are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
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
    pub fn parse(block: &[u8]) -> Seen {
        let text = str::from_utf8(block).unwrap();
        assert!(!text.contains('\r'), "a CR went out: {text:?}");
        let mut seen = Seen::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_string();
            match field {
                "" if value.is_empty() => {} // a heartbeat: on a slow machine any silence may be long enough for one
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
    /// What has come and was not taken yet; of a chunked answer, what stands in its chunks.
    pub buffer: Vec<u8>,
    chunks: Option<Chunks>,
}

/// A chunked answer as our streams are, read strictly: each chunk is whole lines, and an event has one to itself.
#[derive(Default)]
struct Chunks {
    raw: Vec<u8>,
    is_over: bool,
}

impl Chunks {
    /// Takes the whole chunks out of what has come.
    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.raw.extend_from_slice(bytes);
        let mut rest = &self.raw[..];
        while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
            assert!(!self.is_over, "behind the last chunk: {:?}", String::from_utf8_lossy(rest));
            let line = str::from_utf8(&rest[..at]).unwrap();
            let size = usize::from_str_radix(line, 16).unwrap_or_else(|_| panic!("{line:?} is no chunk's size"));
            assert_eq!(line, format!("{size:x}"), "no more digits than needed");
            let Some((chunk, behind)) = rest[at + 2..].split_at_checked(size).filter(|(_, end)| end.len() >= 2) else {
                break;
            };
            let text = str::from_utf8(chunk).unwrap();
            assert!(behind.starts_with(b"\r\n"), "a chunk is longer than it says: {text:?}");
            let blank = text.find("\n\n").map_or(size, |blank| blank + 2);
            assert!(size == 0 || text.ends_with('\n') && blank == size, "not one event: {text:?}");
            self.is_over = size == 0;
            out.extend_from_slice(chunk);
            rest = &behind[2..];
        }
        self.raw = rest.to_vec();
        assert!(
            !self.is_over || self.raw.is_empty(),
            "behind the last chunk: {:?}",
            String::from_utf8_lossy(&self.raw)
        );
    }
}

impl Wire {
    pub fn connect(addr: SocketAddr) -> Wire {
        Wire::on(TcpStream::connect(addr).unwrap())
    }

    pub fn on(socket: TcpStream) -> Wire {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        Wire { socket, buffer: Vec::new(), chunks: None }
    }

    pub fn ask(addr: SocketAddr, request: &str) -> Answer {
        let mut wire = Wire::connect(addr);
        wire.send(request.as_bytes());
        wire.answer()
    }

    pub fn post(&mut self, target: &str, body: &str) -> Answer {
        self.send(post_request(target, body).as_bytes());
        self.answer()
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

    /// Opens a stream of topics and reads its first block, too. Returns the cursor it names; or the gap, which is still to
    /// be read, where one comes first.
    pub fn subscribe(addr: SocketAddr, target: &str, fields: &str) -> (Wire, Id) {
        let mut wire = Wire::stream(addr, target, fields);
        let first = wire.block().expect("a first block");
        assert!(first.data.is_none() && first.event.is_none() && first.retry.is_some(), "{first:?}");
        if first.id.is_some() {
            return (wire, first.id());
        }
        let bytes = wire.take_until(b"\n\n").expect("a gap");
        let gap = Seen::parse(&bytes);
        assert!(gap.is_gap(), "without an id nothing but a gap may follow: {gap:?}");
        wire.buffer.splice(0..0, bytes);
        (wire, gap.id())
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
                self.take_in(&chunk[..got]);
                true
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => {
                let (from, to) = (self.socket.local_addr(), self.socket.peer_addr());
                panic!("reading, {from:?} from {to:?}: {error}; so far {:?}", String::from_utf8_lossy(&self.buffer))
            }
        }
    }

    fn take_in(&mut self, bytes: &[u8]) {
        match &mut self.chunks {
            Some(chunks) => chunks.take(bytes, &mut self.buffer),
            None => self.buffer.extend_from_slice(bytes),
        }
    }

    pub fn head(&mut self) -> String {
        self.head_if_any().unwrap_or_else(|| panic!("no head: {:?}", String::from_utf8_lossy(&self.buffer)))
    }

    /// `None` when the connection ends before.
    pub fn head_if_any(&mut self) -> Option<String> {
        let head = String::from_utf8(self.take_until(b"\r\n\r\n")?).unwrap();
        if header(&head, "transfer-encoding") == Some("chunked") {
            self.chunks = Some(Chunks::default());
            let come = std::mem::take(&mut self.buffer);
            self.take_in(&come);
        }
        Some(head)
    }

    /// Whether the last chunk has come: a stream that was cut has none.
    pub fn is_over(&self) -> bool {
        self.chunks.as_ref().is_some_and(|chunks| chunks.is_over)
    }

    pub fn answer(&mut self) -> Answer {
        let head = self.head();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length: usize = header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
        let body = String::from_utf8(self.take(length)).unwrap();
        Answer { status, head, body }
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let taken = self.take_if_any(length);
        taken.unwrap_or_else(|| panic!("it ended early: {:?}", String::from_utf8_lossy(&self.buffer)))
    }

    /// `None` when the connection ends before.
    pub fn take_if_any(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.buffer.len() < length {
            if !self.fill() {
                return None;
            }
        }
        Some(self.buffer.drain(..length).collect())
    }

    /// The next block of a stream, whatever it holds, without the heartbeats before it.
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

    /// Closes with a reset, so that the server's next write fails, and its port is free at once.
    pub fn reset(self) {
        socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

pub fn wire_arrives(server: &brooklet::Handle, wire: &mut Wire) {
    server.hub().publish("a", Event::new("hello")).unwrap();
    assert_eq!(wire.event().unwrap().data(), "hello");
}

/// Many subscribers read by one thread. Each must see the events numbered from 0 on, once and in order.
pub struct Crowd {
    pub members: Vec<(Wire, u64)>, // with how many events have come
}

impl Crowd {
    pub fn subscribe(addr: SocketAddr, target: &str, count: usize) -> Crowd {
        let subscribe = |_| {
            let (wire, _) = Wire::subscribe(addr, target, "");
            wire.socket.set_nonblocking(true).unwrap();
            (wire, 0)
        };
        Crowd { members: (0..count).map(subscribe).collect() }
    }

    pub fn read_until(&mut self, expected: u64) {
        let all = self.members.len() * expected as usize;
        wait_for_growth(&format!("{expected} events everywhere"), all, || {
            self.members.iter_mut().for_each(Crowd::read);
            self.members.iter().map(|(_, seen)| *seen as usize).sum()
        });
        assert!(self.members.iter().all(|(_, seen)| *seen == expected));
    }

    fn read((wire, seen): &mut (Wire, u64)) {
        let mut chunk = [0; 64 * 1024];
        loop {
            match wire.socket.read(&mut chunk) {
                Ok(0) => panic!("a stream ended after {seen} events"),
                Ok(got) => wire.take_in(&chunk[..got]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("after {seen} events: {error}"),
            }
        }
        let text = str::from_utf8(&wire.buffer).unwrap();
        let whole = text.rfind("\n\n").map_or(0, |end| end + 2);
        for line in text[..whole].lines().filter(|line| !line.is_empty()) {
            match line.split_once(": ") {
                Some(("data", data)) => {
                    assert_eq!(data.split(' ').next().unwrap(), seen.to_string());
                    *seen += 1;
                }
                Some(("id", _)) => {}
                _ => assert_eq!(line, ":", "only events, ids and heartbeats are expected"),
            }
        }
        wire.buffer.drain(..whole);
    }
}

/// A client whose receive buffer is small, or whose segments are a real link's, so that it is soon behind.
pub fn narrow(addr: SocketAddr, receive_buffer: usize, segment: Option<u32>) -> Wire {
    Wire::on(narrow_socket(addr, receive_buffer, segment).unwrap())
}

pub fn narrow_socket(addr: SocketAddr, receive_buffer: usize, segment: Option<u32>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(receive_buffer)?;
    if let Some(segment) = segment {
        socket.set_tcp_mss(segment)?;
    }
    socket.connect(&addr.into())?;
    Ok(socket.into())
}

pub fn open(wire: &mut Wire, target: &str) {
    wire.send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes());
    assert!(wire.head().starts_with("HTTP/1.1 200"));
}

/// The address that a server names in the first line it writes, `http://ADDRESS `; or that line.
pub fn address(stdout: ChildStdout) -> Result<SocketAddr, String> {
    let mut first = String::new();
    BufReader::new(stdout).read_line(&mut first).unwrap();
    let addr = first.split("http://").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    addr.ok_or(first)
}

/// The command, started on port 0. Killed when dropped.
pub struct Process {
    pub child: Child,
    pub addr: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Process {
    pub fn start(flags: &[&str]) -> Process {
        Process::from(Command::new(BROOKLET).args(["--listen", "127.0.0.1:0"]).args(flags))
    }

    /// The server in one file, which has no flags.
    pub fn minimal() -> Process {
        Process::from(Command::new(MINIMAL).arg("127.0.0.1:0"))
    }

    /// The command after a line of shell, which has limited what the system gives.
    pub fn under(line: &str, flags: &str) -> Process {
        let script = format!("{line}; exec {} --listen 127.0.0.1:0 {flags}", BROOKLET);
        Process::from(Command::new("sh").args(["-c", &script]))
    }

    pub fn from(command: &mut Command) -> Process {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = start(command);
        let (log, stderr) = (Arc::new(Mutex::new(String::new())), child.stderr.take().unwrap());
        let copy = log.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *copy.lock().unwrap() += &(line + "\n");
            }
        });
        let addr = address(child.stdout.take().unwrap());
        let addr = addr.unwrap_or_else(|first| panic!("no address in {first:?}; stderr {}", log.lock().unwrap()));
        Process { child, addr, log }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line of the log, which has a thread of its own, that holds `text`.
    pub fn wait_for_log(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return line.into();
            }
            assert!(Instant::now() < deadline, "no {text:?} in the log: {log}");
            thread::sleep(Duration::from_millis(2));
        }
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

    /// Threads and descriptors, once they have stopped changing.
    pub fn at_rest(&self) -> (usize, usize) {
        let mut before = (0, 0);
        wait_for("threads and descriptors to come to rest", || {
            thread::sleep(Duration::from_millis(50));
            let now = (self.status("Threads"), self.descriptors());
            (std::mem::replace(&mut before, now) == now).then_some(now)
        })
    }

    /// Waits until there are no more threads and descriptors than `before`.
    pub fn wait_until_at_most(&self, before: (usize, usize)) {
        let now = || (self.status("Threads"), self.descriptors());
        let deadline = Instant::now() + PATIENCE;
        while now().0 > before.0 || now().1 > before.1 {
            assert!(Instant::now() < deadline, "threads and descriptors: {before:?} before, {:?} after", now());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processor time that it has used, in the ticks of /proc, of which Linux has 100 a second.
    pub fn processor_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Ends it in order, and says what it wrote to stderr. Fails if it had not lived until then.
    pub fn finish(mut self) -> String {
        assert!(self.child.try_wait().unwrap().is_none(), "it has ended before: {}", self.log());
        self.signal("TERM");
        let status = self.child.wait().unwrap();
        wait_for("the rest of the log", || (Arc::strong_count(&self.log) == 1).then_some(()));
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        assert!(!log.contains("panicked") && !log.contains("memory allocation"), "{log}");
        log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A clock that a test sets while the command runs by it. What the monotonic clock says is not changed.
pub struct Clock {
    file: String,
    preload: String,
}

impl Clock {
    /// `None`, and said, where faketime is not there.
    pub fn new(dir: &Scratch) -> Option<Clock> {
        if !has("faketime") {
            return None;
        }
        let preload = output(Command::new("faketime").args(["-f", "+0", "sh", "-c", "echo $LD_PRELOAD"]));
        let preload = String::from_utf8(preload.stdout).unwrap().trim().into();
        let clock = Clock { file: dir.path("clock"), preload };
        clock.set("+0");
        Some(clock)
    }

    /// Sets it that much before or after the system's own: `-1h`, `+25h`.
    pub fn set(&self, offset: &str) {
        let new = format!("{}.new", self.file); // renamed, so that nobody reads half of it
        std::fs::write(&new, offset).unwrap();
        std::fs::rename(&new, &self.file).unwrap();
    }

    pub fn start(&self, flags: &[&str]) -> Process {
        let mut command = Command::new(BROOKLET);
        command.env("LD_PRELOAD", &self.preload).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Process::from(command.args(["--listen", "127.0.0.1:0"]).args(flags))
    }
}

/// A control group with these settings; removed when dropped, after the processes in it.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The settings are of version 1 and of version 2. `None`, and said, where the system does not let a test have one.
    pub fn new(controller: &str, settings: [&[(&str, &str)]; 2]) -> Option<Cgroup> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("brooklet-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        for (parent, settings) in [format!("/sys/fs/cgroup/{controller}"), "/sys/fs/cgroup".into()].iter().zip(settings)
        {
            let group = Cgroup(Path::new(parent).join(&name));
            let made = std::fs::create_dir(&group.0).is_ok();
            if made && settings.iter().all(|(file, value)| std::fs::write(group.0.join(file), value).is_ok()) {
                return Some(group);
            }
        }
        left_out(&format!("the right to make a control group ({controller}; root has it)"));
        None
    }

    pub fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    /// Starts the command inside.
    pub fn start(&self, flags: &str) -> Process {
        let (tasks, binary) = (self.0.join("cgroup.procs"), BROOKLET);
        let script = format!("echo $$ >{}; exec {binary} --listen 127.0.0.1:0 {flags}", tasks.display());
        Process::from(Command::new("sh").args(["-c", &script]))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10)); // a process in it is still ending
        }
    }
}

/// Whether a program that a test needs is there.
pub fn has(program: &str) -> bool {
    shell(&format!("command -v {program} >/dev/null")) || left_out(&format!("{program} (`make setup` installs it)"))
}

/// Says what a test is left out for; under `CI=true` that is a failure. Returns false, for `has`.
pub fn left_out(missing: &str) -> bool {
    let test = thread::current().name().unwrap_or_default().to_string();
    eprintln!("left out: {test} needs {missing}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "missing: {missing}");
    false
}

/// A directory that goes when it is dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        // In memory where that is offered: thousands of small journals are synced here.
        let parent = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { env!("CARGO_TARGET_TMPDIR") };
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("brooklet-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let path = Path::new(parent).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The median of any probe, on a machine that has nothing else to do; the expectation is a tenth of it.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// Someone who has nothing to do with the crowd: subscribed before it came, and asks, publishes and subscribes anew while
/// it is there.
pub struct Bystander {
    addr: SocketAddr,
    early: Wire,
    published: usize,
    /// How long health, publishing, and a new stream with its first event took.
    times: [Vec<Duration>; 3],
    /// A server without a crowd, and how long its health took at the same times: what the machine alone makes slow.
    calm: (Handle, Vec<Duration>),
}

impl Bystander {
    pub fn new(addr: SocketAddr) -> Bystander {
        let (early, _) = Wire::subscribe(addr, "/events/calm", "");
        Bystander { addr, early, published: 0, times: Default::default(), calm: (serve_default(), Vec::new()) }
    }

    pub fn probe(&mut self) {
        assert!(self.probe_with(), "no room for a stream");
    }

    /// Where streams are full, a new one is rejected, kindly. Returns whether there was room.
    pub fn probe_with(&mut self) -> bool {
        let started = Instant::now();
        get(self.calm.0.addr().unwrap(), "/health");
        self.calm.1.push(started.elapsed());
        let started = Instant::now();
        let health = get(self.addr, "/health");
        self.times[0].push(started.elapsed());
        assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
        let started = Instant::now();
        self.publish();
        self.times[1].push(started.elapsed());
        let started = Instant::now();
        let mut stream = Wire::stream(self.addr, "/events/calm", "");
        let first = stream.block().expect("a first block");
        if first.id.is_none() {
            assert!(first.retry.is_some() && stream.rest().is_empty(), "{first:?}");
            return false;
        }
        self.publish();
        assert_eq!(stream.event().expect("an event").data(), (self.published - 1).to_string());
        self.times[2].push(started.elapsed());
        true
    }

    pub fn publish(&mut self) {
        let answer = post(self.addr, "/events/calm", &self.published.to_string());
        assert_eq!(answer.status, 200, "{answer:?}");
        self.published += 1;
    }

    /// The stream from before the crowd has had every event.
    pub fn finish(mut self, what: &str) {
        for n in 0..self.published {
            assert_eq!(self.early.event().expect("the early stream goes on").data(), n.to_string());
        }
        let median = |times: &mut Vec<Duration>| {
            times.sort();
            times[times.len() / 2]
        };
        let longest = PROBE_TIME.max(10 * median(&mut self.calm.1));
        for (kind, times) in ["health", "publish", "stream"].iter().zip(&mut self.times) {
            let median = median(times);
            println!("{what}: {kind} {} times, median {median:?}, longest {:?}", times.len(), times.last());
            assert!(median < longest, "{what}: {kind} took {median:?}");
        }
    }
}

/// What was said about a shortage: of each kind of warning not more than a line a second, and one for the second in which
/// it began.
pub fn assert_few_warnings(log: &str, since: Instant) {
    let lines = log.lines().filter(|line| !line.contains(" closed peer="));
    let (evictions, others): (Vec<&str>, Vec<&str>) =
        lines.partition(|line| line.ends_with("it made room for another"));
    for lines in [evictions, others] {
        assert!(lines.len() as u64 <= since.elapsed().as_secs() + 3, "{} lines: {log}", lines.len());
    }
}

/// Opens streams until `attempts` have been made. Those without room are told when to come back, and their stream ends.
pub fn press_in(addr: SocketAddr, attempts: usize) -> Crowd {
    let mut crowd = Crowd { members: Vec::new() };
    for _ in 0..attempts {
        let mut wire = Wire::stream(addr, "/events/a", "");
        let first = wire.block().expect("a first block");
        if first.id.is_some() {
            wire.socket.set_nonblocking(true).unwrap();
            crowd.members.push((wire, 0));
        } else {
            assert!(first.retry.is_some(), "{first:?}");
            assert_eq!((first.comments, wire.rest().len()), (vec!["no room for another stream".to_string()], 0));
        }
    }
    crowd
}

/// The blocks of a journal, each with its blank line; what follows the last one is left out.
pub fn blocks(bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut blocks, mut block) = (Vec::new(), Vec::new());
    for line in bytes.split_inclusive(|b| *b == b'\n') {
        block.extend_from_slice(line);
        if line == b"\n" {
            blocks.push(std::mem::take(&mut block));
        }
    }
    blocks
}

pub fn is_event(block: &[u8]) -> bool {
    block.split(|b| *b == b'\n').any(|line| line.starts_with(b"data: "))
}

/// What goes out on the wire of a block that stands in the journal.
pub fn frame(block: &[u8]) -> Vec<u8> {
    let sum = block.windows(5).position(|w| w == b"sum: ").unwrap();
    let end = block[sum..].iter().position(|b| *b == b'\n').unwrap();
    block[sum + end + 1..].to_vec()
}

/// Everything that a topic keeps, as it goes out, without the first block and the end. Leaves with a reset: after a close
/// in order the server's port stays taken for a minute, and who starts thousands of servers then waits for a free port.
pub fn kept(addr: SocketAddr, topics: &str) -> Vec<Vec<u8>> {
    let mut stream = Wire::stream(addr, &format!("/events/{topics}?since=earliest&poll=1ms"), "");
    let all = blocks(&stream.rest());
    assert!(stream.is_over(), "it was cut: {} blocks came", all.len());
    stream.reset();
    all[1..all.len() - 1].to_vec()
}

/// A block with the sum that it should have.
pub fn sealed(fields: &str, frame: &str) -> String {
    let sum = crc32fast::hash([fields, frame].concat().as_bytes());
    format!("{fields}sum: {sum:08x}\n{frame}")
}

pub fn id_of(frame: &[u8]) -> Id {
    let text = str::from_utf8(frame).unwrap();
    text.lines().find_map(|line| line.strip_prefix("id: ")).unwrap().parse().unwrap()
}
