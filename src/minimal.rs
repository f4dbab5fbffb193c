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

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, never, select, tick};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, Builder, ThreadId};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

// Whatever can grow has a limit, and every wait has an end (to set them: `config.rs`). So memory is bounded:
// KEPT_BYTES, and for each connection its request, or its queue (16 bytes for each kept event) and the event that it is
// at.
const CONNECTIONS: usize = 1_100; // a thread each, for publishers, too (delivering without waking one: `lane.rs`)
const HEAD_BYTES: usize = 16 * 1024; // browsers send 1 KiB, and cookies
const BODY_BYTES: usize = 64 * 1024; // events are notices, not files (sevenfold on the wire, if it is all newlines)
const KEPT_EVENTS: usize = 1_000; // of all topics: what a page may miss and still resume (of each topic: `history.rs`)
const KEPT_BYTES: usize = 16 * 1024 * 1024;
const QUEUED_EVENTS: usize = 64; // how far a subscriber may fall behind
const PATIENCE: Duration = Duration::from_secs(10); // for a whole request to come, and for a peer to take something
const HEARTBEAT: Duration = Duration::from_secs(15); // proxies cut what is silent for longer
const RETRY_MS: u64 = 3_000; // until a browser comes back
const STOP_TIME: Duration = Duration::from_millis(700); // for all streams to end in order
const PAUSE: Duration = Duration::from_millis(100); // when the system has no descriptor or thread to spare

/// Serves on loopback (beyond it: tokens, `door.rs`). Ctrl-C drops the sending end of `stopping`, which closes that
/// channel. Everybody waits on the other end.
#[allow(dead_code)] // where this file is a module
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args_os().nth(1).unwrap_or("127.0.0.1:3000".into()).to_string_lossy().into_owned();
    let listener = TcpListener::bind(&address).map_err(|error| format!("{address}: {error} (try 127.0.0.1:8080)"))?;
    let bound = listener.local_addr()?;
    if !bound.ip().is_loopback() {
        return Err(format!("{bound}: beyond loopback anybody could publish (try 127.0.0.1:8080)").into());
    }
    let (stop, stopping) = bounded(0);
    let mut stop = Some(stop);
    ctrlc::set_handler(move || drop(stop.take()))?;
    let _ = writeln!(io::stdout(), "brooklet-minimal listens on http://{bound} (open it in a browser)");
    Ok(serve(listener, stopping)?)
}

/// Gives each connection a thread, and a share of the server. Nothing that happens to one of them ends the loop. One
/// connection too many is closed without a word: a browser takes that for a broken network, and tries again (making
/// room for it: `places.rs`).
///
/// The loop ends when the other end of `stopping` is dropped; nothing is ever sent on it. Then each stream gets its
/// end. `all_closed` closes with the last share of the server.
pub fn serve(listener: TcpListener, stopping: Receiver<()>) -> io::Result<()> {
    let (address, stopped) = (listener.local_addr()?, stopping.clone());
    let (open, all_closed) = bounded(0);
    let mut hub = Hub { kept: VecDeque::new(), subscribers: HashMap::new() };
    hub.publish("", ""); // marks the start: whatever an earlier process had counts as forgotten
    let server = Arc::new(Server { hub: Mutex::new(hub), stopping, _open: open });
    // Receiving fails when the channel is closed. The loop below waits for a connection, so it is given one.
    Builder::new().name("stop".into()).spawn(move || stopped.recv().map_err(|_| TcpStream::connect(address)))?;
    while server.stopping.try_recv() == Err(TryRecvError::Empty) {
        let accepted = listener.accept();
        let (connections, share) = (Arc::strong_count(&server), server.clone()); // one share is the loop's
        let start = |(socket, peer)| {
            Builder::new().spawn(move || (connections <= CONNECTIONS).then(|| share.connection(socket, peer)))
        };
        if let Err(error) = accepted.and_then(start) {
            let _ = writeln!(io::stderr(), "cannot accept: {error}"); // eprintln! would panic where nobody reads it
            thread::sleep(PAUSE);
        }
    }
    drop(server);
    let _ = all_closed.recv_timeout(STOP_TIME);
    Ok(())
}

/// What all threads share. Nothing is sent on `_open`; it is there to be dropped.
struct Server {
    hub: Mutex<Hub>,
    stopping: Receiver<()>,
    _open: Sender<()>,
}

impl Server {
    /// One request, then its answer or its stream (more requests on a connection: `conversation.rs`).
    fn connection(&self, mut socket: TcpStream, peer: SocketAddr) {
        let _ = socket.set_nodelay(true).and(socket.set_write_timeout(Some(PATIENCE)));
        let (Ok(answer) | Err(answer)) = read(&mut socket).map(|request| self.route(&request, &mut socket, peer));
        let _ = socket.write_all(answer.as_bytes());
        // Closing a socket with unread input resets it, and the peer may lose what it was told. So read on for a while.
        let _ = socket.shutdown(Shutdown::Write);
        let deadline = Instant::now() + PATIENCE;
        while more(&mut socket, &mut Vec::new(), deadline) {}
    }

    /// The routes. Returns a whole answer; or nothing, where a stream was written and has ended. Queries are ignored
    /// (event types, keys: `publishing.rs`; where to begin, polling: `wanted.rs`), names are taken as they are
    /// (escapes: `target.rs`).
    fn route(&self, request: &Request, socket: &mut TcpStream, peer: SocketAddr) -> String {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._~-".contains(&byte);
        let is_name = |name: &str| (1..=64).contains(&name.len()) && name.bytes().all(is_plain);
        let ended = match request.line.rsplit_once('/') {
            Some(("GET ", "")) => return answer("200 OK", "html", PAGE),
            Some(("GET ", "test")) => self.stream(socket, None, ""),
            Some(("GET /events", topic)) if is_name(topic) => self.stream(socket, Some(topic), &request.last_event_id),
            Some(("POST /events", topic)) if is_name(topic) => {
                let id = self.hub.lock().unwrap().publish(topic, &request.body);
                return answer("200 OK", "plain", &id.to_string());
            }
            _ if request.line.starts_with("HEAD ") => return WITHOUT_BODY.into(),
            _ => return answer("404 Not Found", "plain", ROUTES),
        };
        self.hub.lock().unwrap().subscribers.remove(&thread::current().id());
        let (Ok(why) | Err(why)) = ended.map_err(|error| format!("a write failed: {error}"));
        let _ = writeln!(io::stderr(), "{peer} {} closed: {why}", request.line);
        String::new()
    }

    /// Writes a stream until it ends in order, and returns why; or until a write fails.
    ///
    /// `/test` counts seconds. Its timer is a variable in here, so it ends with the stream when a write fails. The
    /// first write after a tab was closed still succeeds, but brings back a reset; the next one fails. So it stops
    /// within two seconds.
    ///
    /// A topic's stream has a queue, and nobody waits for a slow reader. If it takes nothing for PATIENCE, a write
    /// fails ("Resource temporarily unavailable"). If its queue is full, `publish` drops the sending end. If its next
    /// event is not kept any more, the reference to it in the queue is empty. In each case the stream ends; the browser
    /// comes back for what it missed.
    fn stream(&self, socket: &mut TcpStream, topic: Option<&str>, last_event_id: &str) -> io::Result<String> {
        let (timer, (first_block, queue)) = match topic {
            None => (tick(Duration::from_secs(1)), (String::new(), never())),
            Some(topic) => (never(), self.hub.lock().unwrap().subscribe(topic, last_event_id)),
        };
        socket.write_all(format!("{STREAM_HEAD}{first_block}").as_bytes())?;
        let mut count = 0;
        let why = loop {
            select! {
                recv(timer) -> _ => {
                    let (name, id) = (if count == 5 { "pause" } else { "test" }, now_us() / 1_000);
                    socket.write_all(format!("event: {name}\nid: {id}\ndata: {count}\nretry: 10000\n\n").as_bytes())?;
                    count += 1;
                }
                recv(queue) -> event => match event.ok().and_then(|event| event.upgrade()) {
                    Some(event) => socket.write_all(event.text.as_bytes())?,
                    None => break "the subscriber is too slow",
                },
                recv(self.stopping) -> _ => break "the server is stopping",
                default(HEARTBEAT) => socket.write_all(b":\n")?,
            }
        };
        socket.write_all(format!(": {why}\nretry: {RETRY_MS}\n\n").as_bytes())?;
        Ok(why.into())
    }
}

/// The events and who is there for them, behind one lock. In one hold of it an event is numbered, queued and kept; in
/// one hold a subscriber gets what is kept and joins. So nobody misses an event or gets it twice. Nobody waits while
/// holding it, for a full queue refuses at once; and nothing in here panics, so that `lock` always succeeds.
///
/// The first of the kept events stands for all that are forgotten: it is there for its id, and is not sent any more.
/// Whoever has seen that one or a later one can resume; whoever comes with an earlier id is told of a gap. So it is
/// after a restart, which loses all of this (surviving it: `journal.rs`): ids are microseconds, so old ones are
/// earlier.
struct Hub {
    kept: VecDeque<Arc<Event>>, // of all topics, in the order of the ids; never empty
    subscribers: HashMap<ThreadId, (String, Sender<Weak<Event>>)>, // each with its topic (several: `subscription.rs`)
}

struct Event {
    id: u64,
    topic: String,
    text: String, // as it goes out
}

impl Hub {
    fn publish(&mut self, topic: &str, body: &str) -> u64 {
        let newest = self.kept.back().map_or(0, |event| event.id);
        let id = now_us().max(newest + 1); // they rise even when the clock is set back
        let data = body.replace("\r\n", "\n").replace('\r', "\n").replace('\n', "\ndata: ");
        // The id comes last, because some clients take it at once, and would lose an event that is cut off behind it.
        let event = Arc::new(Event { id, topic: topic.into(), text: format!("data: {data}\nid: {id}\n\n") });
        // The references are weak, so that only what is kept takes memory. A queue that is full is dropped.
        self.subscribers.retain(|_, (name, queue)| name != topic || queue.try_send(Arc::downgrade(&event)).is_ok());
        self.kept.push_back(event);
        let bytes = |kept: &VecDeque<Arc<Event>>| kept.iter().map(|event| event.text.len()).sum::<usize>();
        while self.kept.len() > KEPT_EVENTS || bytes(&self.kept) > KEPT_BYTES {
            self.kept.pop_front();
        }
        id
    }

    /// Returns the first block of the stream, and its queue, which begins with all that was missed. The block says
    /// where to resume, should the stream break before the first event; and it is a `gap`, should events be missing.
    fn subscribe(&mut self, topic: &str, last_event_id: &str) -> (String, Receiver<Weak<Event>>) {
        let [oldest, newest] = [self.kept.front(), self.kept.back()].map(|event| event.map_or(0, |event| event.id));
        let asked = if last_event_id.is_empty() { newest } else { last_event_id.parse().unwrap_or(0) };
        let has_gap = !(oldest..=newest).contains(&asked);
        let cursor = if has_gap { oldest } else { asked };
        let gap = if has_gap { "event: gap\ndata: events may be missing here\n" } else { "" };
        let missed: Vec<_> = self.kept.iter().filter(|event| event.id > cursor && event.topic == topic).collect();
        let (sender, queue) = bounded(missed.len() + QUEUED_EVENTS);
        missed.iter().for_each(|event| drop(sender.try_send(Arc::downgrade(event))));
        self.subscribers.insert(thread::current().id(), (topic.into(), sender));
        (format!("retry: {RETRY_MS}\n{gap}id: {cursor}\n\n"), queue)
    }
}

/// What is needed of HTTP/1.1. A host or a length that two readers could understand in two ways is refused. Left out
/// are HEAD (`conversation.rs`), chunked bodies (`body.rs`), and tokens and pages of other origins (`door.rs`).
struct Request {
    line: String, // such as "GET /test"
    last_event_id: String,
    body: String,
}

/// Whenever more has come, all of it is read anew, until it is a whole request. The error is an answer that refuses it.
fn read(socket: &mut TcpStream) -> Result<Request, String> {
    let refuse = |status: &str, why: &str| Err(answer(status, "plain", why));
    let (deadline, mut bytes) = (Instant::now() + PATIENCE, Vec::new());
    while more(socket, &mut bytes, deadline) {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut fields);
        let end = match head.parse(&bytes) {
            Ok(httparse::Status::Complete(end)) if end <= HEAD_BYTES => end,
            Ok(httparse::Status::Partial) if bytes.len() <= HEAD_BYTES => continue,
            Ok(_) => return refuse("431 Request Header Fields Too Large", "a head is 16 KiB at most"),
            Err(error) => return refuse("400 Bad Request", &format!("this is no request of HTTP/1.1: {error}")),
        };
        // A field that was sent twice has both values, with a comma between them. No value below may have one.
        let field = |name: &str| {
            let lines = head.headers.iter().filter(|line| line.name.eq_ignore_ascii_case(name));
            lines.map(|line| String::from_utf8_lossy(line.value)).reduce(|one, two| one + ", " + two)
        };
        // Pages of other sites may try to publish, or have a name of theirs lead to our address.
        let host = field("Host").unwrap_or_default();
        let name = host.trim_end_matches(char::is_numeric).strip_suffix(':').unwrap_or(&host).trim_matches(['[', ']']);
        let is_ours = name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let is_foreign = field("Origin").is_some_and(|origin| origin != format!("http://{host}"));
        let digits = field("Content-Length").unwrap_or("0".into());
        let length = digits.parse().ok().filter(|_| !digits.starts_with('+')); // `parse` would take that
        let (method, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
        let refusals = [
            (!is_ours, "400 Bad Request", "this needs one Host, and of loopback: localhost or 127.0.0.1"),
            (is_foreign && method == "POST", "403 Forbidden", "pages of another origin may not publish"),
            (!["GET", "HEAD", "POST"].contains(&method), "501 Not Implemented", "there are GET and POST"),
            (field("Transfer-Encoding").is_some(), "501 Not Implemented", "send a Content-Length, not chunks"),
            (length.is_none(), "400 Bad Request", "Content-Length must be a number, 65536 at most"),
            (length > Some(BODY_BYTES), "413 Content Too Large", "a body is 64 KiB at most"),
            (field("Expect").is_some(), "417 Expectation Failed", "send the body at once, without Expect"),
        ];
        if let Some((_, status, text)) = refusals.iter().find(|(applies, ..)| *applies) {
            return refuse(status, text);
        }
        let Some(body) = bytes.get(end..end + length.unwrap_or(0)) else { continue };
        let Ok(body) = str::from_utf8(body) else { return refuse("400 Bad Request", "the body is not UTF-8") };
        let line = format!("{method} {}", target.split('?').next().unwrap_or_default());
        let last_event_id = field("Last-Event-ID").unwrap_or_default().into();
        return Ok(Request { line, last_event_id, body: body.into() });
    }
    refuse("408 Request Timeout", "the request did not come whole within 10 s")
}

/// Reads on, but not beyond the deadline: a byte now and then must not hold a thread. Says whether something has come.
fn more(socket: &mut TcpStream, bytes: &mut Vec<u8>, deadline: Instant) -> bool {
    let mut chunk = [0; 4096];
    let left = deadline.saturating_duration_since(Instant::now()); // none left is an error, just like none in time
    let got = socket.set_read_timeout(Some(left)).and_then(|()| socket.read(&mut chunk)).unwrap_or(0);
    bytes.extend_from_slice(&chunk[..got]);
    got > 0
}

fn answer(status: &str, kind: &str, text: &str) -> String {
    let fields = format!("Content-Type: text/{kind}; charset=utf-8\r\nContent-Length: {}", text.len() + 1);
    format!("HTTP/1.1 {status}\r\n{fields}\r\nConnection: close\r\n\r\n{text}\n")
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64)
}

const WITHOUT_BODY: &str = "HTTP/1.1 501 Not Implemented\r\nConnection: close\r\n\r\n";
const ROUTES: &str = "there are GET /, GET /test, GET and POST /events/NAME with 1 to 64 of A-Z a-z 0-9 . _ ~ -";
const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\
                           Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\r\n";

const PAGE: &str = r#"<!doctype html>
<html lang="en"><meta charset="utf-8"><title>brooklet in one file</title><link rel="icon" href="data:,">
<pre id="log"></pre><script>
const source = new EventSource('test');
const show = event => document.getElementById('log').append(
  `${event.type} ${event.data ?? ''} readyState ${source.readyState} ${source.url}\n`);
source.addEventListener('pause', () => source.close()); // without which the browser would come back
for (const type of ['open', 'message', 'test', 'error', 'pause']) source.addEventListener(type, show);
</script>"#;
