//! A real Redis that can be hurt, servers that share it, publishers that note what they were told, and followers that go
//! from server to server with their last id.

use crate::common::{PATIENCE, Process, Scratch, Wire, has, header, output, post_request, shell, start, wait_for};
use brooklet::Id;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The program, which may be another that speaks the same language: `REDIS_SERVER=valkey-server make redis-test`.
pub fn redis_server() -> String {
    std::env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".into())
}

/// Whether it is there, and what hurts it.
pub fn has_redis() -> bool {
    has(&redis_server()) && has("redis-cli")
}

/// A Redis of our own, in a directory of its own.
pub struct Redis {
    pub port: u16,
    dir: Scratch,
    pub flags: Vec<String>,
    child: Child,
}

impl Redis {
    /// Without anything on the disk.
    pub fn start() -> Redis {
        Redis::with(&["--save", ""])
    }

    pub fn with(flags: &[&str]) -> Redis {
        let dir = Scratch::new();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let flags: Vec<String> = flags.iter().map(|flag| flag.to_string()).collect();
        let child = Redis::run(port, &dir, &flags);
        let redis = Redis { port, dir, flags, child };
        redis.wait();
        redis
    }

    fn run(port: u16, dir: &Scratch, flags: &[String]) -> Child {
        let mut command = Command::new(redis_server());
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(&dir.0);
        command.args(["--repl-diskless-sync-delay", "0"]).args(flags); // a replica is in step at once
        start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    fn wait(&self) {
        let answers = |said: String| said.contains("PONG") || said.contains("NOAUTH");
        wait_for("Redis to answer", || answers(self.try_cli(&["ping"])).then_some(()));
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn try_cli(&self, args: &[&str]) -> String {
        let output = output(Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(args));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn cli(&self, args: &[&str]) -> String {
        let said = self.try_cli(args);
        assert!(!said.starts_with("ERR"), "{args:?}: {said}");
        said.trim_end().into()
    }

    pub fn signal(&self, name: &str) {
        assert!(shell(&format!("kill -{name} {}", self.child.id())));
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// On the same port, with what it finds on the disk.
    pub fn restart(&mut self) {
        self.child = Redis::run(self.port, &self.dir, &self.flags);
        self.wait();
    }

    /// A number that it tells of itself.
    pub fn info(&self, section: &str, name: &str) -> u64 {
        let info = self.cli(&["info", section]);
        let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("no {name} in {info}"))
    }

    /// What its one thread that works has had of the processor.
    pub fn processor_us(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/schedstat", self.child.id())).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap() / 1_000
    }

    /// What the stream holds: the ids of events, and their data.
    pub fn events(&self) -> BTreeMap<Id, String> {
        let said = self.cli(&["xrange", "brooklet", "-", "+"]);
        let (mut events, mut lines) = (BTreeMap::new(), said.lines().peekable());
        let mut id = None;
        while let Some(line) = lines.next() {
            if let Ok(found) = line.parse::<Id>()
                && line.contains('-')
            {
                id = Some(found);
            } else if line == "data"
                && let (Some(id), Some(data)) = (id, lines.next())
            {
                events.insert(id, data.to_string());
            }
        }
        events
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One address, behind which another Redis can be put: it carries bytes to whichever it is turned to, and cuts what it has
/// carried to the one before.
pub struct Relay {
    port: u16,
    to: Arc<Mutex<(u16, Vec<TcpStream>)>>,
}

/// Sees what goes through a relay, first whether it is for Redis, and says whether it goes on.
type Watch = dyn Fn(bool, &[u8]) -> bool + Send + Sync;

impl Relay {
    pub fn to(port: u16) -> Relay {
        Relay::watched(port, |_, _| true)
    }

    pub fn watched(port: u16, watch: impl Fn(bool, &[u8]) -> bool + Send + Sync + 'static) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay { port: listener.local_addr().unwrap().port(), to: Arc::new(Mutex::new((port, Vec::new()))) };
        let (to, watch): (_, Arc<Watch>) = (relay.to.clone(), Arc::new(watch));
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let mut to = to.lock().unwrap();
                let Ok(far) = TcpStream::connect(("127.0.0.1", to.0)) else { continue };
                for (from, into, is_for_redis) in [(&near, &far, true), (&far, &near, false)] {
                    let (from, into, watch) = (clone(from), clone(into), watch.clone());
                    thread::spawn(move || {
                        let _ = carry(&from, &into, |bytes| watch(is_for_redis, bytes));
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                to.1.extend([near, far]);
            }
        });
        relay
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn turn_to(&self, port: u16) {
        let mut to = self.to.lock().unwrap();
        to.0 = port;
        to.1.drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }
}

fn clone(socket: &TcpStream) -> TcpStream {
    socket.try_clone().unwrap()
}

fn carry(mut from: &TcpStream, mut into: &TcpStream, goes_on: impl Fn(&[u8]) -> bool) -> io::Result<()> {
    let mut buffer = [0; 64 * 1024];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            got if goes_on(&buffer[..got]) => into.write_all(&buffer[..got])?,
            _ => {}
        }
    }
}

/// A server that shares what goes through `url`.
pub fn server(url: &str, flags: &[&str]) -> Process {
    Process::start(&[&["--redis", url, "--retry", "100ms"], flags].concat())
}

/// Where the servers are now.
pub type Servers = Arc<Mutex<Vec<SocketAddr>>>;

pub fn addresses(servers: &[Process]) -> Servers {
    Arc::new(Mutex::new(servers.iter().map(|server| server.addr).collect()))
}

/// Set once nobody has to begin anything more.
pub type Over = Arc<AtomicBool>;

/// What a publisher was told of its events.
#[derive(Default)]
pub struct Published {
    /// Told 200.
    pub taken: BTreeMap<Id, String>,
    /// Told that nobody knows, or nothing at all.
    pub perhaps: Vec<String>,
    pub refused: usize,
}

/// Publishes `name 0`, `name 1`, … on one server after another.
pub fn publisher(name: &str, servers: &Servers, over: &Over, topic: &str) -> JoinHandle<Published> {
    let (name, servers, over, target) = (name.to_string(), servers.clone(), over.clone(), format!("/events/{topic}"));
    thread::spawn(move || {
        let mut published = Published::default();
        for n in 0.. {
            if over.load(SeqCst) {
                break;
            }
            let data = format!("{name} {n}");
            let addr = { servers.lock().unwrap()[n % 3] };
            match try_post(addr, &target, &data) {
                Some((200, body)) => drop(published.taken.insert(body.trim().parse().unwrap(), data)),
                Some((503, body)) if body.contains("or not") => published.perhaps.push(data),
                Some((503, _)) => published.refused += 1,
                Some(other) => panic!("{other:?}"),
                None => published.perhaps.push(data), // its server was killed
            }
            thread::sleep(Duration::from_millis(1));
        }
        published
    })
}

/// The status and the body; none where the server is gone.
pub fn try_post(addr: SocketAddr, target: &str, body: &str) -> Option<(u16, String)> {
    try_post_on(&mut Wire::on(TcpStream::connect(addr).ok()?), target, body)
}

/// The same on a connection that may be there.
pub fn try_post_on(wire: &mut Wire, target: &str, body: &str) -> Option<(u16, String)> {
    wire.socket.write_all(post_request(target, body).as_bytes()).ok()?;
    let head = wire.head_if_any()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = header(&head, "content-length")?.parse().ok()?;
    Some((status, String::from_utf8(wire.take(length)).unwrap()))
}

/// Publishes once, with a key of its own unless it has one, and tries again for as long as a busy machine's Redis is too slow.
/// Returns the answer's body.
pub fn publish(addr: SocketAddr, target: &str, body: &str) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let key = format!("{}key=own-{}", if target.contains('?') { '&' } else { '?' }, COUNT.fetch_add(1, SeqCst));
    let target = if target.contains("key=") { target.to_string() } else { format!("{target}{key}") };
    wait_for("an event to be taken", || {
        let (status, body) = try_post(addr, &target, body)?;
        assert!(status == 200 || status == 503, "{status} {body}");
        (status == 200).then(|| body.trim_end().to_string())
    })
}

/// As above, wherever there is a server.
pub fn publish_surely(servers: &Servers, target: &str, data: &str) -> Id {
    wait_for("an event to be taken", || {
        let addr = { servers.lock().unwrap()[0] };
        let (status, body) = try_post(addr, &format!("{target}?key={data}"), data)?;
        (status == 200).then(|| body.trim().parse().unwrap())
    })
}

/// What a follower has had, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Had {
    Event(Id, String),
    Gap,
}

/// Follows a topic from its beginning on, on another server after each cut, until it has had `end`.
pub fn follower(n: usize, servers: &Servers, target: &str) -> JoinHandle<Vec<Had>> {
    let (servers, target) = (servers.clone(), target.to_string());
    thread::spawn(move || {
        let (mut had, mut cursor, mut turn) = (Vec::new(), None, n);
        let deadline = Instant::now() + 4 * PATIENCE;
        while Instant::now() < deadline {
            turn += 1;
            let addr = { servers.lock().unwrap()[turn % 3] };
            if follow(addr, &target, &mut cursor, &mut had) {
                return had;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("follower {n} waited in vain for the end; the last it had: {:?}", had.last());
    })
}

/// One stream to its end. Whether that was `end`.
fn follow(addr: SocketAddr, target: &str, cursor: &mut Option<Id>, had: &mut Vec<Had>) -> bool {
    let Ok(socket) = TcpStream::connect(addr) else { return false };
    let mut wire = Wire::on(socket);
    let field = cursor.map_or(String::new(), |cursor| format!("Last-Event-ID: {cursor}\r\n"));
    let request = format!("GET {target}?since=earliest HTTP/1.1\r\nHost: localhost\r\n{field}\r\n");
    if wire.socket.write_all(request.as_bytes()).is_err() || wire.head_if_any().is_none() {
        return false;
    }
    while let Some(seen) = wire.block() {
        if seen.id.is_some() {
            *cursor = Some(seen.id());
        }
        if seen.is_gap() {
            had.push(Had::Gap);
        } else if let Some(data) = &seen.data {
            if data == "end" {
                return true;
            }
            had.push(Had::Event(seen.id(), data.clone()));
        }
    }
    false
}

/// Holds what a follower has had against what publishers were told, and what Redis has kept.
pub fn check(had: &[Had], taken: &BTreeMap<Id, String>, kept: &BTreeMap<Id, String>) {
    let ids: Vec<Id> =
        had.iter().filter_map(|had| if let Had::Event(id, _) = had { Some(*id) } else { None }).collect();
    assert!(ids.is_sorted_by(|a, b| a < b), "out of order, or twice");
    let events: BTreeMap<Id, &String> =
        had.iter().filter_map(|had| if let Had::Event(id, data) = had { Some((*id, data)) } else { None }).collect();
    let mut datas: Vec<&&String> = events.values().collect();
    datas.sort();
    assert!(datas.is_sorted_by(|a, b| a < b), "an event came under two ids");
    for (id, data) in taken {
        match events.get(id) {
            Some(seen) => assert_eq!(*seen, data),
            None => {
                assert!(!kept.contains_key(id), "{id} ({data}) was taken, is kept, and did not come");
                let before = had.iter().rposition(|had| matches!(had, Had::Event(seen, _) if seen < id));
                let rest = &had[before.map_or(0, |at| at + 1)..];
                let until = rest.iter().position(|had| matches!(had, Had::Event(..))).unwrap_or(rest.len());
                assert!(rest[..until].contains(&Had::Gap), "{id} ({data}) was taken and lost, without a gap");
            }
        }
    }
}
