//! A Server-Sent Events server in one file, to be read from top to bottom in a quarter of an hour.
//!
//! A page says `new EventSource('/events/news')` and keeps that connection open. Whoever posts to `/events/news`
//! reaches every page that listens. When a connection breaks, the browser comes back by itself and names the last event
//! it had. So the server keeps the newest events and goes on from there: each event once, and in order.
//!
//! ```text
//! POST ──▶ number it, put it into each subscriber's queue, keep it ──▶ the subscriber's thread ──▶ its socket
//! GET  ──▶ a new queue, which begins with the events it missed ──▲
//! ```
//!
//! Each connection has a thread. What is left out is named in its place, with the file of the library beside this one
//! that has it, such as `lane.rs`. A program of your own takes this file as a module and calls [`serve`].

use crossbeam_channel::{Receiver, Sender, bounded, select, tick};
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{self, ExitCode};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

// Whatever can grow has a limit, and every wait has an end (to set them: `config.rs`). So memory is bounded: KEPT_BYTES, and
// for each connection a queue of 16 bytes for each kept event, and its request or the event it is at (448 KiB at most).
const STREAMS: usize = 1_000; // a thread each; nobody is woken to deliver: `lane.rs`
const CONNECTIONS: usize = STREAMS + 100; // so that one can publish when all streams are taken
const HEAD_BYTES: usize = 16 * 1024; // browsers send 1 KiB, and cookies
const BODY_BYTES: usize = 64 * 1024; // events are notices, not files
const KEPT_EVENTS: usize = 4_000; // of all topics: what a page may miss and still resume (of each topic: `history.rs`)
const KEPT_BYTES: usize = 16 * 1024 * 1024;
const QUEUED_EVENTS: usize = 64; // how far a subscriber may fall behind
const REQUEST_TIME: Duration = Duration::from_secs(10); // for all of it: a byte now and then must not hold a thread
const WRITE_TIME: Duration = Duration::from_secs(10); // in which a peer must take something
const HEARTBEAT: Duration = Duration::from_secs(15); // proxies cut what is silent for longer
const RETRY_MS: u64 = 3_000; // until a browser comes back
const LINGER: Duration = Duration::from_millis(500); // for a peer to take its answer before it is cut off
const STOP_TIME: Duration = Duration::from_millis(700); // for all streams to end in order
const PAUSE: Duration = Duration::from_millis(100); // when the system has no descriptor or thread to spare

/// Ctrl-C closes the stopping channel, on which everybody waits. A second one ends the process at once.
#[allow(dead_code)] // where this file is a module
fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(|part| part.to_string_lossy().into_owned()).collect();
    let address = if arguments.is_empty() { "127.0.0.1:3000".into() } else { arguments.join(" ") };
    let (stop, stopping) = bounded(0);
    let mut stop = Some(stop);
    let served = TcpListener::bind(&address).and_then(|listener| {
        let bound = listener.local_addr()?;
        if !bound.ip().is_loopback() {
            return Err(io::Error::other("beyond loopback anybody could publish (tokens: door.rs)"));
        }
        let on_signal = move || drop(stop.take().unwrap_or_else(|| process::exit(130)));
        ctrlc::set_handler(on_signal).map_err(io::Error::other)?;
        let _ = writeln!(io::stdout(), "brooklet-minimal listens on http://{bound} (open it in a browser)");
        serve(listener, stopping)
    });
    let Err(error) = served else { return ExitCode::SUCCESS };
    log(&format!("cannot serve {address:?}: {error}; give a free address of loopback, such as 127.0.0.1:8080"));
    ExitCode::from(2)
}

/// Serves until the other end of `stopping` is dropped; nothing is ever sent on it. Then every stream gets its end.
/// Returns when all connections are closed, or after STOP_TIME. Nothing that happens to one connection ends the loop.
pub fn serve(listener: TcpListener, stopping: Receiver<Infallible>) -> io::Result<()> {
    let (address, stopped) = (listener.local_addr()?, stopping.clone());
    let now = now_us(); // whatever an earlier process had counts as forgotten
    let hub = Hub { newest: now, forgotten: now, kept: VecDeque::new(), kept_bytes: 0, subscribers: HashMap::new() };
    let server = Arc::new(Server { hub: Mutex::new(hub), stopping });
    Builder::new().name("stop".into()).spawn(move || {
        let _ = stopped.recv();
        let _ = TcpStream::connect_timeout(&address, PAUSE); // so that the loop looks
    })?;
    loop {
        let accepted = listener.accept();
        if server.stopping.try_recv().is_err_and(|error| error.is_disconnected()) {
            break;
        }
        let (connections, share) = (Arc::strong_count(&server), server.clone()); // each has a share; so has the loop
        let start = |(socket, peer)| Builder::new().spawn(move || share.connection(socket, peer, connections));
        if let Err(error) = accepted.and_then(start) {
            log(&format!("cannot accept: {error}"));
            sleep(PAUSE);
        }
    }
    let deadline = Instant::now() + STOP_TIME;
    while Arc::strong_count(&server) > 1 && Instant::now() < deadline {
        sleep(STOP_TIME / 100);
    }
    Ok(())
}

struct Server {
    hub: Mutex<Hub>,
    stopping: Receiver<Infallible>,
}

impl Server {
    /// One request, then its answer or its stream (more requests on a connection: `conversation.rs`). One connection too many
    /// is closed without a word: a browser takes that for a broken network and tries again (who makes room: `places.rs`).
    fn connection(&self, mut socket: TcpStream, peer: SocketAddr, connections: usize) {
        if connections > CONNECTIONS {
            return;
        }
        let _ = socket.set_nodelay(true).and(socket.set_write_timeout(Some(WRITE_TIME)));
        let last_bytes = match Request::read(&mut socket) {
            Ok(request) => match self.answer(&request) {
                Some(answer) => answer,
                None => self.stream(&request, &mut socket, peer, connections <= STREAMS),
            },
            Err(refusal) => refusal,
        };
        let _ = socket.write_all(last_bytes.as_bytes());
        // Closing a socket with unread input resets it, and the peer may lose what it was told. So read on for a while.
        let _ = socket.shutdown(Shutdown::Write);
        let (deadline, mut unread) = (Instant::now() + LINGER, Vec::new());
        while more(&mut socket, &mut unread, deadline).is_ok() {
            unread.clear();
        }
    }

    /// A whole answer, or None where a stream is asked for. Queries are ignored (types, keys, where to begin: `routes.rs`).
    fn answer(&self, request: &Request) -> Option<String> {
        let answer = match (&*request.method, &*request.path, request.topic()) {
            ("GET", "/test", _) | ("GET", _, Some(_)) => return None,
            ("HEAD", "/test", _) | ("HEAD", _, Some(_)) => STREAM_HEAD.into(),
            ("GET" | "HEAD", "/", _) => answer("200 OK", "text/html; charset=utf-8", PAGE),
            ("POST", _, Some(topic)) => {
                answer("200 OK", TEXT, &format!("{}\n", self.hub().publish(topic, &request.body)))
            }
            (_, "/" | "/test", _) => refusal("405 Method Not Allowed\r\nAllow: GET, HEAD", "GET this"),
            (_, _, Some(_)) => refusal("405 Method Not Allowed\r\nAllow: GET, HEAD, POST", "GET this, or POST to it"),
            _ => refusal("404 Not Found", "there are /, /test, and /events/NAME with 1 to 64 of A-Z a-z 0-9 . _ ~ -"),
        };
        let end = if request.method == "HEAD" { answer.find("\r\n\r\n").map(|end| end + 4) } else { None };
        Some(answer[..end.unwrap_or(answer.len())].into())
    }

    /// Writes a stream, logs why it has ended, and returns its last bytes. An `EventSource` gives up for good on any status but
    /// 200. So where it helps to come back, a stream is opened all the same, and ended in order.
    fn stream(&self, request: &Request, socket: &mut TcpStream, peer: SocketAddr, has_room: bool) -> String {
        let ended = socket.write_all(STREAM_HEAD.as_bytes()).and_then(|()| match request.topic() {
            _ if !has_room => Ok("no room for another stream"),
            Some(topic) => self.follow(topic, request.last_event_id.as_deref(), socket),
            None => self.count(socket),
        });
        let (why, last_bytes) = match ended {
            Ok(why) => (why.into(), format!(": {why}\nretry: {RETRY_MS}\n\n")),
            Err(error) if error.kind() == ErrorKind::WouldBlock => ("nothing was taken for 10 s".into(), String::new()),
            Err(error) => (error.to_string(), String::new()),
        };
        log(&format!("{peer} {} closed: {why}", request.path));
        last_bytes
    }

    /// The article's stream. Its timer is a variable of this function, and a failing write ends both. The first write after
    /// a tab was closed still succeeds, but brings back a reset; the next one fails. So it stops within two seconds.
    fn count(&self, socket: &mut TcpStream) -> io::Result<&'static str> {
        let timer = tick(Duration::from_secs(1));
        for count in 0_u64.. {
            select! {
                recv(timer) -> _ => {
                    let (name, id) = (if count == 5 { "pause" } else { "test" }, now_us() / 1_000);
                    socket.write_all(format!("event: {name}\nid: {id}\ndata: {count}\nretry: 10000\n\n").as_bytes())?;
                }
                recv(self.stopping) -> _ => break,
            }
        }
        Ok(STOPPING)
    }

    fn follow(&self, topic: &str, last_event_id: Option<&str>, socket: &mut TcpStream) -> io::Result<&'static str> {
        let (number, first_block, queue) = self.hub().subscribe(topic, last_event_id);
        let ended = socket.write_all(first_block.as_bytes()).and_then(|()| self.deliver(&queue, socket));
        self.hub().subscribers.remove(&number);
        ended
    }

    /// A slow reader is closed in one of three ways: its queue overflows, so that `publish` drops the sending end, and the
    /// stream ends after what stands in the queue; or the next event in the queue is not kept any more; or it takes nothing for
    /// WRITE_TIME. The browser comes back, and resumes. A closed tab is noticed as in `count`, at the second write.
    fn deliver(&self, queue: &Receiver<Weak<Event>>, socket: &mut TcpStream) -> io::Result<&'static str> {
        loop {
            select! {
                recv(queue) -> event => match event.ok().and_then(|event| event.upgrade()) {
                    Some(event) => socket.write_all(event.text.as_bytes())?,
                    None => return Ok("the subscriber is too slow"),
                },
                recv(self.stopping) -> _ => return Ok(STOPPING),
                default(HEARTBEAT) => socket.write_all(b":\n")?,
            }
        }
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all connections share, behind one lock. In one hold of it an event is numbered, queued and kept; in one hold a
/// subscriber gets what is kept and joins. So nobody misses an event or gets it twice. Nobody waits while holding it, for a
/// full queue refuses at once. A restart loses all of this, and tells who comes back (surviving it: `journal.rs`).
struct Hub {
    newest: u64,    // the last id that was given: microseconds, so that those of the next process are higher
    forgotten: u64, // up to this id, events may be missing from the kept
    kept: VecDeque<Arc<Event>>, // of all topics, in the order of the ids
    kept_bytes: usize,
    subscribers: HashMap<u64, (String, Sender<Weak<Event>>)>, // each with its topic (several: `subscription.rs`)
}

struct Event {
    id: u64,
    topic: String,
    text: String, // as it goes out
}

impl Hub {
    fn publish(&mut self, topic: &str, body: &str) -> u64 {
        self.newest = now_us().max(self.newest + 1); // ids rise even when the clock is set back
        let id = self.newest;
        let data = body.replace("\r\n", "\n").replace('\r', "\n").replace('\n', "\ndata: ");
        // The id comes last, because some clients take it at once, and would lose an event that is cut off behind it.
        let event = Arc::new(Event { id, topic: topic.into(), text: format!("data: {data}\nid: {id}\n\n") });
        // References in queues are weak, so that only what is kept takes memory. A queue that is full is dropped.
        self.subscribers.retain(|_, (name, queue)| name != topic || queue.try_send(Arc::downgrade(&event)).is_ok());
        self.kept_bytes += event.text.len();
        self.kept.push_back(event);
        while self.kept.len() > KEPT_EVENTS || self.kept_bytes > KEPT_BYTES {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.kept_bytes -= oldest.text.len();
            self.forgotten = oldest.id;
        }
        id
    }

    /// Returns the subscriber's number, the first block of its stream, and its queue with all that it has missed. The block
    /// says where to resume, should the stream break before the first event; and it is a `gap` where events after
    /// `last_event_id` may be lost.
    fn subscribe(&mut self, topic: &str, last_event_id: Option<&str>) -> (u64, String, Receiver<Weak<Event>>) {
        self.newest = now_us().max(self.newest + 1);
        let number = self.newest; // above all events so far
        let asked = match last_event_id {
            None => Some(number), // from now on
            Some(id) => id.parse().ok(),
        };
        let (cursor, gap) = match asked.filter(|id| (self.forgotten..=number).contains(id)) {
            Some(cursor) => (cursor, ""),
            None => (self.forgotten, "event: gap\ndata: events may be missing here\n"),
        };
        let missed: Vec<_> = self.kept.iter().filter(|event| event.id > cursor && event.topic == topic).collect();
        let (sender, queue) = bounded(missed.len() + QUEUED_EVENTS);
        for event in missed {
            let _ = sender.try_send(Arc::downgrade(event));
        }
        self.subscribers.insert(number, (topic.into(), sender));
        (number, format!("retry: {RETRY_MS}\n{gap}id: {cursor}\n\n"), queue)
    }
}

/// What is needed of HTTP/1.1, read strictly: what two readers could understand in two ways is refused. Left out are chunked
/// bodies (`body.rs`), escapes and hosts in the target (`target.rs`), and the `Date` of an answer (`response.rs`).
struct Request {
    method: String,
    path: String,
    last_event_id: Option<String>,
    body: String,
}

impl Request {
    fn topic(&self) -> Option<&str> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._~-".contains(&byte);
        self.path.strip_prefix("/events/").filter(|name| (1..=64).contains(&name.len()) && name.bytes().all(is_allowed))
    }

    /// The error is a whole answer, which refuses the request.
    fn read(socket: &mut TcpStream) -> Result<Request, String> {
        let (deadline, mut bytes) = (Instant::now() + REQUEST_TIME, Vec::new());
        let (mut request, head, length) = loop {
            match Request::parse(&bytes)? {
                Some(parsed) => break parsed,
                None => more(socket, &mut bytes, deadline)?,
            }
        };
        while bytes.len() < head + length {
            more(socket, &mut bytes, deadline)?;
        }
        let body = bytes[head..head + length].to_vec();
        request.body = String::from_utf8(body).map_err(|_| refusal(BAD, "the body is not UTF-8"))?;
        Ok(request)
    }

    /// Understands the head once it is whole; returns its length, too, and that of the body.
    fn parse(bytes: &[u8]) -> Result<Option<(Request, usize, usize)>, String> {
        use httparse::{EMPTY_HEADER, Error, Status};
        let mut fields = [EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut fields);
        let end = match head.parse(bytes) {
            Ok(Status::Partial) if bytes.len() <= HEAD_BYTES => return Ok(None),
            Ok(Status::Complete(end)) if end <= HEAD_BYTES => end,
            Ok(_) | Err(Error::TooManyHeaders) => return Err(refusal(LARGE, "a head is 16 KiB and 64 fields at most")),
            Err(Error::Version) => return Err(refusal("505 HTTP Version Not Supported", "this is HTTP/1.1")),
            Err(error) => return Err(refusal(BAD, &format!("this is no request of HTTP/1.1: {error}"))),
        };
        let field = |name: &str| {
            let mut values = head.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
            let value = values.next().map(|field| String::from_utf8_lossy(field.value));
            require(values.next().is_none(), BAD, &format!("{name} was sent twice")).map(|()| value)
        };
        // Pages of other sites may try to publish, or give a name of theirs our address (tokens, allowed origins: `door.rs`).
        let (host, origin) = (field("Host")?.unwrap_or_default(), field("Origin")?);
        require(!host.is_empty(), BAD, "the field Host is missing")?;
        require(is_loopback(&host), "403 Forbidden", "this Host is not loopback: use localhost or 127.0.0.1")?;
        let is_own = origin.is_none_or(|origin| origin == format!("http://{host}"));
        require(is_own || head.method != Some("POST"), "403 Forbidden", "pages of another origin may not publish")?;
        require(field("Transfer-Encoding")?.is_none(), "501 Not Implemented", "send a Content-Length, not chunks")?;
        let length = field("Content-Length")?.unwrap_or("0".into());
        let is_number = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        require(is_number, BAD, "Content-Length is not a number")?;
        let length = length.parse().unwrap_or(usize::MAX); // too many digits are too many bytes
        require(length <= BODY_BYTES, "413 Content Too Large", "a body is 64 KiB at most")?;
        require(field("Expect")?.is_none(), "417 Expectation Failed", "send the body at once, without Expect")?;
        let request = Request {
            method: head.method.unwrap_or_default().into(),
            path: head.path.unwrap_or_default().split('?').next().unwrap_or_default().into(),
            last_event_id: field("Last-Event-ID")?.filter(|id| !id.is_empty()).map(Into::into),
            body: String::new(),
        };
        Ok(Some((request, end, length)))
    }
}

/// Reads on, but not beyond the deadline.
fn more(socket: &mut TcpStream, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), String> {
    let mut chunk = [0; 4096];
    let left = deadline.saturating_duration_since(Instant::now()); // none left is an error, just like none in time
    match socket.set_read_timeout(Some(left)).and_then(|()| socket.read(&mut chunk)) {
        Ok(0) => return Err(refusal(BAD, "the request ended early")),
        Ok(got) => bytes.extend_from_slice(&chunk[..got]),
        Err(error) if error.kind() == ErrorKind::Interrupted => {}
        Err(_) => return Err(refusal("408 Request Timeout", "a whole request must come within 10 s")),
    }
    Ok(())
}

fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches(|c: char| c.is_ascii_digit()).strip_suffix(':').unwrap_or(host); // without the port
    let address = name.trim_matches(['[', ']']).parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn require(is_right: bool, status: &str, text: &str) -> Result<(), String> {
    if is_right { Ok(()) } else { Err(refusal(status, text)) }
}

fn refusal(status: &str, text: &str) -> String {
    answer(status, TEXT, &format!("{text}\n"))
}

fn answer(status: &str, kind: &str, text: &str) -> String {
    let length = text.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")
}

fn log(text: &str) {
    let _ = writeln!(io::stderr(), "{text}"); // eprintln! would panic where nobody reads it
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64)
}

const STOPPING: &str = "the server is stopping";
const BAD: &str = "400 Bad Request";
const LARGE: &str = "431 Request Header Fields Too Large";
const TEXT: &str = "text/plain; charset=utf-8";
const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\n\
                           X-Accel-Buffering: no\r\nConnection: close\r\n\r\n";

const PAGE: &str = r#"<!doctype html>
<html lang="en"><meta charset="utf-8"><title>brooklet in one file</title><link rel="icon" href="data:,">
<pre id="log"></pre>
<script>
const source = new EventSource('test');
const show = event => document.getElementById('log').append(
  `${event.type} ${event.data ?? ''} readyState ${source.readyState} ${source.url}\n`);
for (const type of ['open', 'message', 'test', 'error']) source.addEventListener(type, show);
source.addEventListener('pause', event => {
  source.close(); // without which the browser would come back
  show(event);
});
</script>
"#;
