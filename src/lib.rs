//! brooklet: a Server-Sent Events server in one readable file, on blocking threads and the standard library.
//!
//! # Five lines
//! ```
//! # fn main() -> std::io::Result<()> {
//! use brooklet::{Config, Event, Server};
//!
//! let server = Server::bind("127.0.0.1:0", Config::default())?.spawn()?; // port 0: any free one
//! let id = server.hub().publish("news", Event::new("hello"))?;
//! println!("curl -N http://{}/events/news?since=earliest   # begins with {id}", server.addr()?);
//! # Ok(()) }
//! ```
//! Dropping what [`Server::spawn`] returns stops everything; [`Server::run`] serves until the process ends.
//!
//! # The idea: a live subscriber is never waited for
//! Server-Sent Events go one way. Once its request is read, a subscriber sends nothing, so there is nothing to wait
//! for: a write to it succeeds, would block, or fails. That makes two states, and one thread for each:
//!
//! ```text
//!                 publish: number it, keep it, hand it to every lane (crossbeam channel, bounded)
//!                                       │
//!   ┌───────────────────────────────────┴───────────────────────┐
//!   ▼ lane thread (half the cores have one)                      ▼ kept events (of each topic)
//!  LIVE: one non-blocking write of the encoded bytes            BEHIND: replays everything after its cursor,
//!  straight into the socket                                     on the connection's own thread
//!   ├── would block ──▶ BEHIND       BEHIND ── nothing newer is kept ──▶ LIVE
//!   └── failed ──▶ CLOSED: its thread wakes, logs, ends
//! ```
//!
//! Connecting, resuming and being slow are the same thing, *being behind*, and have one code path. A live subscriber's
//! thread sleeps; no thread is woken to deliver an event, which would cost several times the write itself.
//!
//! # How to read this file
//! It follows one event: limits and [`Config`], [`Event`] and [`Id`], the kept events and the journal, the [`Hub`] that
//! publishes and its lanes, the subscriber, HTTP, the routes, the [`Server`] around them, and last the counters and the
//! log.
//!
//! # Locks, outermost first
//! | lock | held | guards |
//! |---|---|---|
//! | `Core::journal` | while events are written to it; never waited for, only tried | the file, and that one thread writes |
//! | `Core::order` | from numbering an event to the last lane's queue, but not while it is written | that ids, kept events, queues have one order |
//! | `Core::kept` | shortly, never during I/O | the kept events and the table of topics |
//! | `Connection::state` | during one non-blocking write | whose the socket is, and the cursor |
//! | `Shared::connections`, `Shared::routes` | shortly, under no other lock | which connections are open; what is at a path |
//! | `LogQueue::lines`, the date of now | shortly, and nothing is locked under it | what the log's thread has to write |
//!
//! No lock is held while waiting for a peer. A panic under a lock does not take the others along: they enter the
//! poisoned lock, since every update here leaves its data whole.
//!
//! # For those new to threads in Rust
//! An `Arc<T>` is a value with several owners, counted. A `Mutex<T>` holds a value that one thread at a time may touch:
//! `enter(&mutex)` waits for its turn and returns a guard, through which the value is reached; the lock is free again when
//! the guard goes out of scope or is given to `drop`. To wait on a `Condvar` frees the lock, sleeps until another thread
//! notifies, and takes the lock again. An `Atomic…` is a number that needs no lock. A channel is a queue between threads;
//! `bounded` ones let the sender wait while they are full. In this file, `c` is always a `Connection`.
//!
//! # Not for
//! Two-way traffic (use WebSockets), TLS (put a proxy before it), events that need a database's queries.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

// rooms
mod authority;
mod block;
mod clock;
mod config;
mod connection;
mod encoded;
mod event;
mod history;
mod hub;
mod journal;
mod lane;
mod log;
mod metrics;
mod places;
mod recovery;
mod sync;
mod system;
mod text;
// uses
use authority::{is_authority, is_loopback, split_port};
use clock::{date, spread};
pub use config::{Config, Log, Token};
use connection::{AWAKE_TIME, Connection, LINGER, Phase, Reason, STOPPING, State, would_block};
pub use event::{Event, Id};
use history::{Next, Start, Totals};
pub use hub::Hub;
use hub::{Core, check_topic};
use lane::ToLane;
use log::Logger;
use metrics::{Counters, Gauges};
use places::{Counts, Place, Places};
use sync::{enter, start_thread};
use system::AddressSpace;
pub use text::parse_duration;
use text::{LONGEST, invalid, shown};

use crossbeam_channel::Sender;
use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

// ---------------------------------------------------------------------------------------------------------------------
// Limits. Whatever comes from outside has a bound: bytes, counts and waits. Those an operator may want to move are
// fields of `Config`, each with its default and the reason for it; those that follow from the protocol or the design
// stand here.

/// Threads that only accept and hand over: `std` listens with a backlog of 128, and a herd must not outrun it.
const ACCEPTORS: usize = 2;
const TOPICS_PER_STREAM: usize = 16;
const HEADER_LINES: usize = 100;
const QUERY_PARAMETERS: usize = 100;
const TOKENS_SHOWN: usize = 8;
/// Lines of a `PUT` that are published together. An empty line is one byte of the request but hundreds as an event, so
/// 4 KiB of newlines from each of many connections would take much memory at the same time.
const LINES_AT_ONCE: usize = 128;
const CHUNK_LINE_BYTES: usize = 256;
/// How long `?poll` waits for its first event, and how soon the next poll comes.
const POLL: Duration = Duration::from_secs(25);
const POLL_RETRY: Duration = Duration::from_millis(100);
/// Stopping: streams have this long to take their end; then sockets are cut, and threads have until the second to go.
const STOP_GRACE: Duration = Duration::from_millis(700);
const STOP_TIME: Duration = Duration::from_millis(950);

// ---------------------------------------------------------------------------------------------------------------------
// Event and Id. An event is encoded once, when it is published, into the bytes that every subscriber gets. What 29
// clients make of these bytes decided their form: LF alone ends a line, one blank line ends an event, nothing else
// stands between.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

// ---------------------------------------------------------------------------------------------------------------------
const POLL_IS_OVER: Reason = "the poll is over";
const NO_ROOM: Reason = "no room for another stream";
const NO_NAMES: Reason = "all topic names are in use";

/// A stream of topics, from the side of its connection's thread.
struct Subscription<'a> {
    core: &'a Core,
    c: &'a Connection,
    lane: &'a Sender<ToLane>,
    names: Arc<[Arc<str>]>,
    /// What each topic had let go when the subscriber was last told of a gap.
    told: Vec<Id>,
    /// For a poll, how long it waits for its first event.
    poll_until: Option<Instant>,
    deadline: Instant,
}

impl Subscription<'_> {
    /// Replays, turns live, sleeps until the lane gives the socket back, and begins again, until the stream ends.
    /// Returns why it ended.
    fn follow(mut self) -> Reason {
        let (core, c, retry) = (self.core, self.c, self.core.config.retry);
        loop {
            if let Err(reason) = c.finish(self.deadline) {
                return reason;
            } else if core.is_stopping() {
                return c.end(STOPPING, spread(retry, 50, 150));
            } else if Instant::now() >= self.deadline {
                return c.end("the lifetime is over", retry);
            }
            let State { cursor, sent, .. } = *enter(&c.state);
            let kept = core.history();
            match kept.next(&self.names, cursor, &self.told) {
                Next::Nothing if self.poll_until.is_some_and(|until| sent > 0 || Instant::now() >= until) => {
                    drop(kept);
                    return c.end(POLL_IS_OVER, POLL_RETRY);
                }
                Next::Nothing => {
                    let mut state = enter(&c.state);
                    state.phase = Phase::Live; // under the kept lock still: whatever comes now is queued for the lane
                    drop(kept);
                    if let Some(reason) = self.sleep(state) {
                        return reason;
                    }
                }
                Next::Gap(gap) => {
                    self.told = kept.told(&self.names);
                    drop(kept);
                    core.counters.gaps.fetch_add(1, Relaxed);
                    enter(&c.state).fall_behind(gap, 0);
                }
                Next::Events(run) => {
                    drop(kept);
                    let mut state = enter(&c.state);
                    core.counters.delivered.fetch_add(c.deliver(&mut state, &run, Instant::now()), Relaxed);
                    if let Phase::Closed(reason) = state.phase {
                        return reason;
                    }
                }
            }
        }
    }

    /// Sleeps while the subscriber is live. Returns why the connection closed, if it did.
    fn sleep(&self, mut state: MutexGuard<'_, State>) -> Option<Reason> {
        while state.phase == Phase::Live {
            let until = self.poll_until.unwrap_or(self.deadline).min(self.deadline);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.core.is_stopping() {
                state.phase = Phase::Behind;
                break;
            }
            state = self.c.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match state.phase {
            Phase::Closed(reason) => Some(reason),
            _ => None,
        }
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        let _ = self.lane.send(ToLane::Leave(self.c.serial, self.names.clone()));
        self.core.history().unsubscribe(&self.names);
    }
}

/// A handler's stream, on its connection's own thread: see [`Server::stream`].
pub struct Stream<'a> {
    c: &'a Connection,
    core: &'a Core,
    query: Query,
    last_event_id: Option<String>,
    stray: usize,
}

impl Stream<'_> {
    /// Writes one event at once.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an event that may not be; otherwise the stream is closed or the server is
    /// stopping, and the error says so: return it from the handler.
    pub fn send(&mut self, event: &Event) -> io::Result<()> {
        event.check()?;
        let id = event.id.as_ref().map(|id| id as &dyn fmt::Display);
        self.write(event.encode(id).as_bytes(), 1)
    }

    /// Writes a comment, which pages do not see; each line of the text becomes one. An empty one is a heartbeat.
    ///
    /// # Errors
    /// The stream is closed, or the server is stopping.
    pub fn comment(&mut self, text: &str) -> io::Result<()> {
        let lines: String = text.split(['\n', '\r']).map(|line| format!(":{line}\n")).collect();
        self.write(lines.as_bytes(), 0)
    }

    fn write(&mut self, bytes: &[u8], events: u64) -> io::Result<()> {
        self.check_open()?;
        let result = self.c.write_whole(bytes, Instant::now() + LONGEST);
        let mut state = enter(&self.c.state);
        match result {
            Ok(()) => state.sent += events,
            Err(reason) => state.phase = Phase::Closed(reason), // perhaps after half an event: nothing may follow
        }
        result.map_err(io::Error::other)
    }

    /// Sleeps on the socket, so that closing the page ends the sleep at once.
    ///
    /// # Errors
    /// The peer closed the connection, or the server is stopping: return the error from the handler.
    pub fn sleep(&mut self, time: Duration) -> io::Result<()> {
        let until = Instant::now() + time.min(LONGEST);
        loop {
            self.check_open()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.c.socket.set_read_timeout(Some(left))?;
            if let Some(reason) = self.c.look(&mut self.stray) {
                self.check_open()?; // stopping ends the reading side, too
                enter(&self.c.state).phase = Phase::Closed(reason);
            }
        }
    }

    fn check_open(&self) -> io::Result<()> {
        match enter(&self.c.state).phase {
            Phase::Closed(reason) => Err(io::Error::other(reason)),
            _ if self.core.is_stopping() => Err(io::Error::other(STOPPING)),
            _ => Ok(()),
        }
    }

    /// What the request's query says of `name`, percent-decoded.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name)
    }

    /// The id after which a page that reconnects wants to go on.
    pub fn last_event_id(&self) -> Option<&str> {
        self.last_event_id.as_deref()
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.c.peer
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/1.1, read strictly: whatever two readers could take for two different requests is refused, and the connection
// closed. httparse reads the syntax; what it means is decided here.
// https://www.rfc-editor.org/rfc/rfc9112

/// What came on a connection and is not used yet. Pipelined requests wait here for their turn.
struct Reader<'a> {
    c: &'a Connection,
    buffer: Vec<u8>,
    /// What stands before this in the buffer has been used.
    start: usize,
    deadline: Option<Instant>,
    /// The read timeout that the socket was last given, if it was given any.
    timeout: Option<Option<Duration>>,
}

impl Reader<'_> {
    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    fn wait_at_most(&mut self, time: Duration) {
        self.deadline = Some(Instant::now() + time);
    }

    /// One read, until the deadline. `Ok(0)` at the end.
    fn fill(&mut self) -> io::Result<usize> {
        const CHUNK: usize = 4096;
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(ErrorKind::WouldBlock.into());
        }
        // In whole milliseconds, so that a request after a request need not tell the system the same again.
        let timeout = left.map(|left| Duration::from_millis(left.as_millis() as u64 + 1));
        if self.timeout != Some(timeout) {
            self.c.socket.set_read_timeout(timeout)?;
            self.timeout = Some(timeout);
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + CHUNK, 0);
        let read = loop {
            match (&self.c.socket).read(&mut self.buffer[old..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(old + read.as_ref().unwrap_or(&0));
        read
    }

    fn fill_body(&mut self) -> Result<(), Answer> {
        match self.fill() {
            Ok(0) => refuse(400, "the connection ended before the body did"),
            Ok(_) => Ok(()),
            Err(error) if would_block(&error) => refuse(408, "the body took too long"),
            Err(error) => refuse(400, format!("the body could not be read: {error}")),
        }
    }

    /// A line of the chunked coding, without the CRLF that ends it.
    fn chunk_line(&mut self) -> Result<String, Answer> {
        let mut seen = 0;
        loop {
            let lf = self.unread()[seen..].iter().position(|b| *b == b'\n');
            if lf.map_or(self.unread().len(), |lf| seen + lf) > CHUNK_LINE_BYTES {
                return refuse(400, format!("a chunk's line is longer than {CHUNK_LINE_BYTES} bytes"));
            }
            if let Some(lf) = lf {
                let line = self.unread()[..seen + lf].strip_suffix(b"\r").map(String::from_utf8_lossy);
                let line = line.filter(|line| !line.contains(|c: char| c.is_ascii_control() && c != '\t'));
                let line = line.map(Cow::into_owned);
                self.start += seen + lf + 1;
                return line.map_or_else(|| refuse(400, "a line of the chunked coding does not end with CRLF"), Ok);
            }
            seen = self.unread().len();
            self.fill_body()?;
        }
    }

    /// Reads on for a while after the last answer, so that it arrives before the reset that closing would cause.
    fn linger(&mut self) {
        let _ = self.c.socket.shutdown(Shutdown::Write);
        self.wait_at_most(LINGER);
        while self.fill().is_ok_and(|got| got > 0) {
            self.start = self.buffer.len();
        }
    }
}

/// What is still to come of a body ([RFC 9112 §6](https://www.rfc-editor.org/rfc/rfc9112#section-6)).
struct Body {
    /// Bytes of the body, or of the chunk that is being read.
    left: u64,
    chunked: bool,
    in_chunks: bool,
}

impl Body {
    /// The body that a head announces by these fields.
    fn announced(length: Option<&str>, coding: Option<&str>, http10: bool) -> Result<Body, Answer> {
        let (mut left, chunked) = (0, coding.is_some());
        match (length, coding) {
            (None, None) => {}
            (Some(_), Some(_)) => return refuse(400, "Content-Length and Transfer-Encoding together say two things"),
            (Some(length), None) => match length.parse() {
                Ok(count) if length.bytes().all(|b| b.is_ascii_digit()) => left = count,
                _ => return refuse(400, format!("{} is no Content-Length", shown(length))),
            },
            (None, Some(_)) if http10 => return refuse(400, "HTTP/1.0 has no Transfer-Encoding"),
            (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => {}
            (None, Some(coding)) => {
                // Where chunked is not the last, nobody can tell where the body ends (RFC 9112 §6.3).
                let last = coding.rsplit_once(',').map_or("", |(_, last)| last.trim_matches([' ', '\t']));
                let status = if last.eq_ignore_ascii_case("chunked") { 501 } else { 400 };
                return refuse(status, format!("the transfer coding {} is not known: chunked is", shown(coding)));
            }
        }
        Ok(Body { left, chunked, in_chunks: false })
    }

    fn is_over(&self) -> bool {
        self.left == 0 && !self.chunked
    }

    /// Appends what has come of the body to `out`, waiting until there is some. False at the body's end.
    fn read(&mut self, reader: &mut Reader, out: &mut Vec<u8>) -> Result<bool, Answer> {
        if self.left == 0 && self.chunked {
            self.next_chunk(reader)?;
        }
        if self.left == 0 {
            return Ok(false);
        }
        if reader.unread().is_empty() {
            reader.fill_body()?;
        }
        let taken = usize::try_from(self.left).unwrap_or(usize::MAX).min(reader.unread().len());
        out.extend_from_slice(&reader.unread()[..taken]);
        reader.start += taken;
        self.left -= taken as u64;
        Ok(true)
    }

    fn next_chunk(&mut self, reader: &mut Reader) -> Result<(), Answer> {
        if self.in_chunks && !reader.chunk_line()?.is_empty() {
            return refuse(400, "a chunk is longer than its size says");
        }
        self.in_chunks = true;
        let line = reader.chunk_line()?;
        let Some(size) = chunk_size(&line) else { return refuse(400, format!("{} is no chunk size", shown(&line))) };
        self.left = size;
        let mut trailers = 0;
        while size == 0 && self.chunked {
            let line = reader.chunk_line()?;
            trailers += 1;
            self.chunked = !line.is_empty();
            let is_field = skip_token(&line).is_some_and(|rest| rest.starts_with(':'));
            if self.chunked && (trailers > HEADER_LINES || !is_field) {
                return refuse(400, format!("{} is no trailer field", shown(&line)));
            }
        }
        Ok(())
    }
}

/// `1*HEXDIG *( BWS ";" BWS token [ BWS "=" BWS ( token / quoted-string ) ] )`, of which the extensions are ignored.
/// What does not keep to it, others may take for something else.
fn chunk_size(line: &str) -> Option<u64> {
    let digits = line.bytes().take_while(u8::is_ascii_hexdigit).count();
    let (size, mut rest) = line.split_at(digits);
    while let Some(extension) = skip_space(rest).strip_prefix(';') {
        rest = skip_token(skip_space(extension))?;
        if let Some(value) = skip_space(rest).strip_prefix('=').map(skip_space) {
            rest = value.strip_prefix('"').map_or_else(|| skip_token(value), skip_quoted)?;
        }
    }
    if rest.is_empty() && digits <= 16 { u64::from_str_radix(size, 16).ok() } else { None }
}

fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t'])
}

/// What follows a token; `None` where there is none (RFC 9110 §5.6.2).
fn skip_token(text: &str) -> Option<&str> {
    let rest = text.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c));
    Some(rest).filter(|rest| rest.len() < text.len())
}

/// What follows a quoted string, whose first quote has been taken.
fn skip_quoted(text: &str) -> Option<&str> {
    let mut escaped = false;
    let end = text.find(|c| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some(&text[end + 1..])
}

/// What this server wants to know of a request's head.
struct Request {
    method: String,
    path: String,
    query: Query,
    body: Body,
    close: bool,
    expects_continue: bool,
    last_event_id: Option<String>,
    /// The host that was asked, perhaps with a port. HTTP/1.0 need not say.
    host: Option<String>,
    origin: Option<String>,
    /// The tokens that were shown.
    tokens: Vec<String>,
}

/// The parts of a query, percent-decoded once.
#[derive(Default)]
struct Query(Vec<(String, String)>);

impl Query {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl Request {
    /// Reads one head. `None` where the peer has nothing more to ask.
    fn read(reader: &mut Reader, config: &Config) -> Result<Option<Request>, Answer> {
        let (mut seen, mut begun) = (0, false);
        loop {
            if !begun && !reader.unread().is_empty() {
                begun = true;
                reader.wait_at_most(config.head_time);
            }
            while reader.unread().starts_with(b"\r\n") {
                (reader.start, seen) = (reader.start + 2, 0); // empty lines before a request are skipped (RFC 9112 §2.2)
            }
            let end = head_end(reader.unread(), &mut seen)?;
            if end.unwrap_or(reader.unread().len()) > config.head_bytes {
                let in_first_line = !reader.unread()[..config.head_bytes].contains(&b'\n');
                let (status, what) = if in_first_line { (414, "request line") } else { (431, "head") };
                return refuse(status, format!("the {what} is longer than the {} bytes of a head", config.head_bytes));
            }
            if let Some(end) = end {
                let request = Request::parse(&reader.unread()[..end])?;
                reader.start += end;
                return Ok(Some(request));
            }
            match reader.fill() {
                Ok(got) if got > 0 => {}
                Err(error) if would_block(&error) && !reader.unread().is_empty() => {
                    let limit = config.head_time.as_millis();
                    return refuse(408, format!("the request's head did not come whole within {limit} ms"));
                }
                _ => return Ok(None),
            }
        }
    }

    /// Never inlined, and nor is `Shared::reply`: what a thread once had on its stack stays resident, so the two shall use
    /// the same page, one after the other. Otherwise every subscriber has 15.2 kB instead of 11.2.
    #[inline(never)]
    fn parse(head: &[u8]) -> Result<Request, Answer> {
        let mut fields = vec![httparse::EMPTY_HEADER; HEADER_LINES];
        let mut parsed = httparse::Request::new(&mut fields);
        match parsed.parse(head) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return refuse(400, "the request's head is not whole"),
            Err(httparse::Error::TooManyHeaders) => {
                return refuse(431, format!("more than {HEADER_LINES} header lines"));
            }
            Err(httparse::Error::Version) => return refuse(505, "only HTTP/1.0 and HTTP/1.1 are spoken"),
            Err(error) => return refuse(400, format!("the request's head cannot be read: {error}")),
        }
        let http10 = parsed.version == Some(0);
        let (mut host, mut length, mut coding, mut expect, mut origin) = (None, None, None, None, None);
        let (mut authorization, mut cookies, mut connection, mut last_event_id) = (None, None, None, None);
        for field in parsed.headers.iter() {
            // What may stand several times is joined to one value (RFC 9110 §5.3), the rest must stand once.
            let (known, joint) = match field.name.to_ascii_lowercase().as_str() {
                "host" => (&mut host, None),
                "content-length" => (&mut length, None),
                "transfer-encoding" => (&mut coding, None),
                "expect" => (&mut expect, None),
                "origin" => (&mut origin, None),
                "authorization" => (&mut authorization, None),
                "cookie" => (&mut cookies, Some("; ")),
                "connection" => (&mut connection, Some(", ")),
                // Two of these are no cursor of ours, and get a gap: a refusal would strand the browser.
                "last-event-id" => (&mut last_event_id, Some(", ")),
                _ => continue,
            };
            // Optional white space is space and tab (RFC 9110 §5.6.3); `trim` alone would take more.
            let value = String::from_utf8_lossy(field.value).trim_matches([' ', '\t']).to_string();
            *known = match (known.take(), joint) {
                (None, _) => Some(value),
                (Some(first), Some(joint)) => Some(first + joint + &value),
                (Some(_), None) => return refuse(400, format!("the field {} stands twice", field.name)),
            };
        }
        match &host {
            None if !http10 => return refuse(400, "the field Host is missing"),
            Some(host) if !is_authority(host) => return refuse(400, format!("{} is no Host", shown(host))),
            _ => {}
        }
        let mut options = connection.iter().flat_map(|options| options.split([',', ' ', '\t']));
        let close = http10 || options.any(|option| option.eq_ignore_ascii_case("close"));
        let tokens = tokens_in(authorization.as_deref(), cookies.as_deref());
        let body = Body::announced(length.as_deref(), coding.as_deref(), http10)?;
        let expects_continue = match expect.filter(|_| !http10) {
            None => false,
            Some(what) if what.eq_ignore_ascii_case("100-continue") => true,
            Some(what) => return refuse(417, format!("{} is not expected: 100-continue is", shown(&what))),
        };
        let method = parsed.method.unwrap_or_default().to_string();
        if method == "CONNECT" {
            return refuse(501, "CONNECT is for proxies, which this is not"); // what follows would not be HTTP
        }
        let (path, query, authority) = parse_target(&method, parsed.path.unwrap_or_default())?;
        let host = authority.or(host); // RFC 9112 §3.2.2: the target's own wins
        let last_event_id = last_event_id.filter(|id| !id.is_empty());
        Ok(Request { method, path, query, body, close, expects_continue, last_event_id, host, origin, tokens })
    }

    /// Tells a client that waits for it to send its body.
    fn invite_body(&mut self, reader: &Reader) -> Result<(), Answer> {
        if std::mem::take(&mut self.expects_continue) && !self.body.is_over() {
            let invited = reader.c.write_whole(b"HTTP/1.1 100 Continue\r\n\r\n", Instant::now() + LINGER);
            return invited.or_else(|reason| refuse(400, reason));
        }
        Ok(())
    }

    fn read_body(&mut self, reader: &mut Reader, config: &Config, is_wanted: bool) -> Result<Vec<u8>, Answer> {
        let limit = config.body_bytes;
        let (mut body, mut length) = (Vec::new(), 0);
        let mut more = self.body.left <= limit as u64;
        if more {
            self.invite_body(reader)?;
            reader.wait_at_most(config.body_time);
        }
        while more && length <= limit {
            let old = body.len();
            more = self.body.read(reader, &mut body)?;
            length += body.len() - old;
            if !is_wanted {
                body.clear(); // nobody shall fill the memory with what is of no use
            }
        }
        if self.body.is_over() && length <= limit {
            return Ok(body);
        }
        refuse(413, format!("the body is longer than {limit} bytes (--body-bytes): send less, or lines by PUT"))
    }
}

/// The tokens that a head shows; a few, or a head full of cookies would be hundreds of guesses.
fn tokens_in(authorization: Option<&str>, cookies: Option<&str>) -> Vec<String> {
    let bearer = authorization.and_then(|value| value.split_once(' '));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let cookies = cookies.into_iter().flat_map(|cookies| cookies.split(';'));
    let cookies = cookies.filter_map(|cookie| skip_space(cookie).strip_prefix("brooklet_token="));
    bearer.into_iter().chain(cookies).filter(|token| !token.is_empty()).take(TOKENS_SHOWN).map(String::from).collect()
}

/// Finds the empty line that ends a head, looking on from `seen`. A lone LF is refused: not everyone takes it for an
/// end.
fn head_end(bytes: &[u8], seen: &mut usize) -> Result<Option<usize>, Answer> {
    while let Some(found) = bytes[*seen..].iter().position(|b| *b == b'\n') {
        let lf = *seen + found;
        *seen = lf + 1;
        if lf == 0 || bytes[lf - 1] != b'\r' {
            return refuse(400, "a line of the head ends with LF alone: end it with CRLF");
        } else if lf >= 3 && bytes[lf - 2] == b'\n' {
            return Ok(Some(lf + 1));
        }
    }
    *seen = bytes.len();
    Ok(None)
}

/// The path and the query of a request's target, and the host where it names one.
fn parse_target(method: &str, target: &str) -> Result<(String, Query, Option<String>), Answer> {
    let scheme = "http://".len();
    let absolute =
        target.get(..scheme).filter(|start| start.eq_ignore_ascii_case("http://")).map(|_| &target[scheme..]);
    let end = absolute.map_or(0, |rest| rest.find(['/', '?']).unwrap_or(rest.len()));
    let (authority, origin_form) = absolute.unwrap_or(target).split_at(end);
    let begins_well = if absolute.is_some() { is_authority(authority) } else { origin_form.starts_with('/') };
    if target == "*" && method == "OPTIONS" {
        return Ok(("*".into(), Query::default(), None));
    } else if !begins_well || target.contains('#') {
        return refuse(400, format!("{} is no target: it begins with a slash, or http://HOST", shown(target)));
    }
    let (path, query) = origin_form.split_once('?').unwrap_or((origin_form, ""));
    let mut parts = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        if parts.len() == QUERY_PARAMETERS {
            return refuse(400, format!("more than {QUERY_PARAMETERS} parameters"));
        }
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let name = percent_decode(name)?;
        // A cursor that cannot be decoded is none of ours, and gets a gap: a refusal would strand the browser.
        let is_cursor = CURSOR_PARAMETERS.contains(&name.as_str());
        let value = percent_decode(value).or_else(|refusal| if is_cursor { Ok(value.into()) } else { Err(refusal) })?;
        parts.push((name, value));
    }
    if path.to_ascii_lowercase().contains("%2f") {
        return refuse(400, format!("{} hides a slash, which a proxy may take for none", shown(path)));
    }
    let path = percent_decode(if path.is_empty() { "/" } else { path })?;
    Ok((path, Query(parts), absolute.map(|_| authority.into())))
}

fn percent_decode(text: &str) -> Result<String, Answer> {
    let bad = || Answer::refusal(400, &format!("{} is not percent-encoded UTF-8", shown(text)));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(mut byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
            byte = (digit()? * 16 + digit()?) as u8;
        }
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// An answer with a body of known length; refusals are such answers, too.
struct Answer {
    status: u16,
    content_type: Cow<'static, str>,
    headers: String,
    body: Vec<u8>,
    /// Where this request ends on the connection cannot be told.
    close: bool,
}

/// One line that says what was wrong and what would be right, and the end of the connection.
fn refuse<T>(status: u16, reason: impl fmt::Display) -> Result<T, Answer> {
    Err(Answer::refusal(status, &reason))
}

/// The same, where the request was understood: the connection goes on.
fn decline<T>(status: u16, reason: impl fmt::Display) -> Result<T, Answer> {
    Err(Answer::text(status, reason))
}

impl Answer {
    fn new(status: u16, content_type: impl Into<Cow<'static, str>>, body: Vec<u8>) -> Answer {
        Answer { status, content_type: content_type.into(), headers: String::new(), body, close: false }
    }

    fn text(status: u16, line: impl fmt::Display) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{line}\n").into_bytes())
    }

    fn refusal(status: u16, reason: &dyn fmt::Display) -> Answer {
        Answer { close: true, ..Answer::text(status, reason) }
    }

    fn header(mut self, name: &str, value: impl fmt::Display) -> Answer {
        let _ = write!(self.headers, "{name}: {value}\r\n");
        self
    }

    fn encode(&self, head_only: bool, close: bool) -> Vec<u8> {
        let mut head = status_line(self.status);
        if self.status != 204 {
            let _ = write!(head, "Content-Type: {}\r\nContent-Length: {}\r\n", self.content_type, self.body.len());
        }
        let connection = if close { "Connection: close\r\n" } else { "" };
        head.extend(["X-Content-Type-Options: nosniff\r\n", &self.headers, connection, "\r\n"]);
        let mut bytes = head.into_bytes();
        if !head_only && self.status != 204 {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

fn status_line(status: u16) -> String {
    let reason = match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    };
    let date = date();
    format!("HTTP/1.1 {status} {reason}\r\nDate: {date}\r\n")
}

/// The head of every stream. It is ended by closing, never chunked; nginx holds such a stream back to its end unless
/// told.
fn stream_head(cors: &str) -> String {
    status_line(200)
        + "Content-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\
           X-Content-Type-Options: nosniff\r\nConnection: close\r\n"
        + cors
        + "\r\n"
}

// ---------------------------------------------------------------------------------------------------------------------
// Routes: what each request gets. Never strand a browser: an `EventSource` gives up for good on any answer but 200, so
// a stream that there is no room for gets 200, a reconnection time, and its end. Only what will not mend by itself (a
// path that does not exist, a query that cannot be read) is refused for good.

/// The parameters that say where a page was; a widely used polyfill has its own.
const CURSOR_PARAMETERS: [&str; 2] = ["last_event_id", "lastEventId"];

#[derive(Clone)]
enum Route {
    Page(String, Vec<u8>),
    Stream(Arc<Handler>),
}

/// What the threads of all connections share.
struct Shared {
    hub: Hub,
    /// By their paths. They are few.
    routes: Mutex<Vec<(String, Route)>>,
    places: Places,
    /// The port, if the server is on loopback.
    loopback_port: Option<u16>,
    address_space: AddressSpace,
    log: Arc<Logger>,
}

type Handler = dyn Fn(&mut Stream) -> io::Result<()> + Send + Sync;

enum Reply {
    Answer(Answer),
    Stream(Opening),
}

/// A stream that a request has asked for. From here on the request and its buffers are not needed any more.
enum Opening {
    Topics { names: Vec<String>, start: Start, poll: Option<Duration> },
    Handler { handler: Arc<Handler>, query: Query, last_event_id: Option<String> },
}

impl Shared {
    /// Never inlined: see `Request::parse`.
    #[inline(never)]
    fn reply(&self, reader: &mut Reader, request: &mut Request, path: &str) -> Result<Reply, Answer> {
        self.check_host(request)?;
        let Some(allow) = self.methods_of(path) else {
            return decline(404, format!("there is nothing at {}: topics are at /events/NAME", shown(path)));
        };
        let topic = path.strip_prefix("/events/");
        match (request.method.as_str(), topic) {
            ("OPTIONS", _) => return Ok(Reply::Answer(Answer::text(204, "").header("Allow", allow))),
            ("POST" | "PUT", Some(topic)) => {
                self.check_origin(request)?;
                check_token(&self.config().publish_tokens, "publishing", request)?;
                if !self.config().publish_tokens.is_empty() {
                    self.places.trust(reader.c);
                }
                let is_post = request.method == "POST";
                let publish = if is_post { Shared::publish } else { Shared::publish_lines };
                return publish(self, reader, request, topic).map(Reply::Answer);
            }
            ("GET" | "HEAD", _) => {}
            (method @ ("POST" | "PUT" | "DELETE" | "PATCH" | "TRACE"), _) => {
                let reason = format!("{method} is not for {}: use one of {allow}", shown(path));
                return Err(Answer::text(405, reason).header("Allow", allow));
            }
            (method, _) => return decline(501, format!("the method {} is not known", shown(method))),
        }
        let route = enter(&self.routes).iter().find(|(known, _)| known == path).map(|(_, route)| route.clone());
        if topic.is_some() || path == "/metrics" || matches!(route, Some(Route::Stream(_))) {
            check_token(&self.config().subscribe_tokens, "reading", request)?;
        }
        request.read_body(reader, self.config(), false)?;
        if let Some(names) = topic {
            return open_topics(request, names).map(Reply::Stream);
        }
        Ok(match route {
            Some(Route::Stream(handler)) => {
                let (query, last_event_id) = (std::mem::take(&mut request.query), request.last_event_id.take());
                Reply::Stream(Opening::Handler { handler, query, last_event_id })
            }
            Some(Route::Page(content_type, body)) => {
                // A foreign frame around a page that publishes would borrow its origin for a click.
                Reply::Answer(Answer::new(200, content_type, body).header("X-Frame-Options", "SAMEORIGIN"))
            }
            None if path == "/metrics" => {
                Reply::Answer(Answer::new(200, "text/plain; version=0.0.4", self.metrics().into_bytes()))
            }
            None if self.stopping() => Reply::Answer(self.unavailable(STOPPING)),
            None => Reply::Answer(Answer::text(200, "ok")),
        })
    }

    /// On loopback, only names of loopback are this server's: a page elsewhere may have its own name resolved to here
    /// (DNS rebinding), and would then read and publish as if it came from here.
    fn check_host(&self, request: &Request) -> Result<(), Answer> {
        let Some(host) = request.host.as_deref().map(|host| split_port(host).0) else { return Ok(()) };
        let names_it = |origin: &String| {
            origin.split_once("://").is_some_and(|(_, authority)| split_port(authority).0.eq_ignore_ascii_case(host))
        };
        if self.loopback_port.is_none() || is_loopback(host) || self.config().allow_origins.iter().any(names_it) {
            return Ok(());
        }
        refuse(
            403,
            format!(
                "{} is not this server: behind a proxy, start it with --allow-origin https://…, and pass that host on",
                shown(host)
            ),
        )
    }

    /// A page of another origin may publish only where that is allowed: its reader's browser may be inside a wall that
    /// the page is not. What does not come from a browser has no origin.
    fn check_origin(&self, request: &Request) -> Result<(), Answer> {
        let Some(origin) = request.origin.as_deref() else { return Ok(()) };
        let host = request.host.as_deref().unwrap_or_default();
        let is_of_host = |origin: &str| origin.split_once("://").is_some_and(|(_, own)| own.eq_ignore_ascii_case(host));
        // Where the public origin is named, its scheme counts: what came over plain HTTP, somebody else may have written.
        let is_own = is_of_host(origin) && !self.config().allow_origins.iter().any(|known| is_of_host(known));
        if is_own || self.is_allowed(origin) {
            return Ok(());
        }
        decline(403, format!("pages of {} may not publish: allow them with --allow-origin", shown(origin)))
    }

    /// Named as allowed, or one of ours: all names of loopback at this server's own port are one origin.
    fn is_allowed(&self, origin: &str) -> bool {
        let (host, port) = split_port(origin.strip_prefix("http://").unwrap_or_default());
        let is_ours =
            is_loopback(host) && self.loopback_port.is_some_and(|own| port.unwrap_or("80").parse() == Ok(own));
        is_ours && is_authority(host) || self.config().allow_origins.iter().any(|known| known == origin && known != "*")
    }

    /// The header lines that let a page of another origin read an answer;
    /// <https://fetch.spec.whatwg.org/#http-cors-protocol>
    fn cors(&self, request: &Request) -> String {
        let (origin, origins) = (request.origin.as_deref().unwrap_or_default(), &self.config().allow_origins);
        let all = origins.iter().any(|known| known == "*");
        let allowed = self.is_allowed(origin);
        let (mut lines, methods, fields) = match (allowed, all) {
            (true, _) => (
                format!("Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Allow-Credentials: true\r\n"),
                "GET, HEAD, POST, PUT",
                "Authorization, Cache-Control, Content-Type, Last-Event-ID",
            ),
            (_, true) => ("Access-Control-Allow-Origin: *\r\n".into(), "GET, HEAD", "Cache-Control, Last-Event-ID"),
            _ => return if origins.is_empty() { String::new() } else { "Vary: Origin\r\n".into() },
        };
        if request.method == "OPTIONS" {
            lines += &format!("Access-Control-Allow-Methods: {methods}\r\nAccess-Control-Allow-Headers: {fields}\r\n");
            lines += "Access-Control-Max-Age: 600\r\n";
        }
        lines + "Vary: Origin\r\n"
    }

    /// The methods that a path takes, or none where there is nothing.
    fn methods_of(&self, path: &str) -> Option<&'static str> {
        match path {
            _ if path.starts_with("/events/") || path == "*" => Some("GET, HEAD, POST, PUT, OPTIONS"),
            "/health" | "/metrics" => Some("GET, HEAD, OPTIONS"),
            _ => enter(&self.routes).iter().any(|(known, _)| known == path).then_some("GET, HEAD, OPTIONS"),
        }
    }

    fn publish(&self, reader: &mut Reader, request: &mut Request, topic: &str) -> Result<Answer, Answer> {
        let mut event = self.describe(request, topic, &["event", "retry", "key"])?;
        let body = request.read_body(reader, self.config(), true).map_err(|refusal| self.blame(refusal, ""))?;
        event.data = String::from_utf8(body).map_err(|error| {
            Answer::text(400, format!("the body is not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
        })?;
        self.hub.publish(topic, event).map(|id| Answer::text(200, id)).map_err(|error| self.not_published(&error))
    }

    /// Publishes every line as soon as it is there. Silence between lines is fine; a line once begun must end in time.
    fn publish_lines(&self, reader: &mut Reader, request: &mut Request, topic: &str) -> Result<Answer, Answer> {
        let event = self.describe(request, topic, &["event", "retry"])?;
        request.invite_body(reader)?;
        reader.deadline = None;
        let c = reader.c;
        let mut lines = Lines::new(reader, &mut request.body, self.config());
        let (mut count, mut last) = (0, None);
        let result = loop {
            let mut texts = Vec::new();
            let more = lines.take_some(&mut texts);
            let events = texts.into_iter().map(|data| Event { data, ..event.clone() }).collect();
            self.places.refresh(c);
            let (ids, published) = self.hub.core.publish_all(topic, events);
            (count, last) = (count + ids.len(), ids.last().copied().or(last));
            if let Err(error) = published {
                break Err(Answer { close: true, ..self.not_published(&error) });
            }
            match more {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(refusal) => break Err(refusal),
            }
        };
        let summary = format!("published {count}{}", last.map_or(String::new(), |id| format!(", last id {id}")));
        result.map_err(|refusal| self.blame(refusal, &format!("; {summary}"))).map(|()| Answer::text(200, summary))
    }

    /// The event that a request's query describes; its data comes with the body. What is wrong here is said before that.
    fn describe(&self, request: &Request, topic: &str, known: &[&str]) -> Result<Event, Answer> {
        if let Some((name, _)) = request.query.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            return decline(400, format!("the parameter {} is not known: {} are", shown(name), known.join(", ")));
        }
        let mut event = Event::new("");
        event.name = request.query.get("event").map(String::from);
        event.key = request.query.get("key").map(String::from);
        if let Some(retry) = request.query.get("retry") {
            let number = retry.parse::<u32>().ok().filter(|_| retry.bytes().all(|b| b.is_ascii_digit()));
            let reason = || {
                Answer::text(400, format!("the retry {} is no number of milliseconds up to {}", shown(retry), u32::MAX))
            };
            event.retry = Some(Duration::from_millis(number.ok_or_else(reason)?.into()));
        }
        let checked = check_topic(topic).and_then(|()| self.hub.core.check(&event));
        checked.map_err(|error| self.not_published(&error)).map(|()| event)
    }

    fn not_published(&self, error: &io::Error) -> Answer {
        match error.kind() {
            ErrorKind::InvalidInput => Answer::text(400, error),
            ErrorKind::StorageFull => Answer { status: 507, ..self.unavailable(error) },
            _ => self.unavailable(error),
        }
    }

    /// Adds to a refusal how far it came. A body that stopping has cut off is not its sender's fault.
    fn blame(&self, refusal: Answer, so_far: &str) -> Answer {
        if self.stopping() {
            return Answer { close: true, ..self.unavailable(format!("{STOPPING}{so_far}")) };
        }
        let reason = String::from_utf8_lossy(&refusal.body);
        Answer { body: format!("{}{so_far}\n", reason.trim_end()).into_bytes(), ..refusal }
    }

    fn unavailable(&self, reason: impl fmt::Display) -> Answer {
        Answer::text(503, reason).header("Retry-After", self.config().retry.as_millis().div_ceil(1000))
    }

    /// Runs a stream to its end, and returns why it ended.
    fn stream(&self, c: &Arc<Connection>, head: String, opening: Opening) -> Cow<'static, str> {
        let lane = match self.places.move_to_streams(c) {
            _ if self.stopping() => return self.send_away(c, &head, STOPPING).into(),
            None => return self.send_away(c, &head, NO_ROOM).into(),
            Some(number) => &self.hub.core.lanes[number % self.hub.core.lanes.len()],
        };
        match opening {
            Opening::Topics { names, start, poll } => self.stream_topics(c, lane, head, &names, start, poll).into(),
            Opening::Handler { handler, query, last_event_id } => {
                if let Err(reason) = c.write_whole(head.as_bytes(), Instant::now() + LONGEST) {
                    return reason.into();
                }
                drop(head);
                let result = handler(&mut Stream { c, core: &self.hub.core, query, last_event_id, stray: 0 });
                if self.stopping() && enter(&c.state).phase == Phase::Behind {
                    return c.end(STOPPING, spread(self.config().retry, 50, 150)).into();
                }
                result.map_or_else(|error| error.to_string().into(), |()| "the handler returned".into())
            }
        }
    }

    fn stream_topics(
        &self,
        c: &Arc<Connection>,
        lane: &Sender<ToLane>,
        mut head: String,
        names: &[String],
        start: Start,
        poll: Option<Duration>,
    ) -> Reason {
        let (core, config, is_poll) = (&*self.hub.core, self.config(), poll.is_some());
        let mut kept = core.history();
        let Ok(names) = kept.subscribe(names) else {
            drop(kept);
            return self.send_away(c, &head, NO_NAMES);
        };
        let (cursor, gap) = kept.start(&names, start);
        let told = kept.told(&names);
        drop(kept);
        let deadline = Instant::now() + spread(config.lifetime, 80, 100);
        let poll_until = poll.map(|time| Instant::now() + time);
        let subscription = Subscription { core, c, lane, names, told, poll_until, deadline };

        // A block without data dispatches nothing, but a browser cut off before its first event resumes from this id.
        let retry = if is_poll { POLL_RETRY } else { config.retry };
        let _ = write!(head, "retry: {}\nid: {cursor}\n\n", retry.as_millis());
        let mut head = head.into_bytes();
        if let Some(gap) = &gap {
            head.extend_from_slice(gap.frame());
            core.counters.gaps.fetch_add(1, Relaxed);
        }
        let mut state = enter(&c.state);
        (state.cursor, state.sent, state.is_poll) = (cursor, gap.is_some().into(), is_poll);
        drop(state);
        if let Err(reason) = c.write_waiting(&head, deadline) {
            return reason;
        }
        drop(head);
        let _ = lane.send(ToLane::Join(c.clone(), subscription.names.clone()));
        subscription.follow()
    }

    fn send_away(&self, c: &Connection, head: &str, why: Reason) -> Reason {
        self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
        self.log.warn(format_args!("{} is sent away: {why}", c.peer));
        let _ = c.write_whole(head.as_bytes(), Instant::now() + LINGER);
        c.end(why, spread(self.config().retry, 50, 150))
    }
}

/// Checks that one of these tokens was shown. All are compared, whichever fits.
fn check_token(known: &[Token], what: &str, request: &Request) -> Result<(), Answer> {
    let fit = |shown: &String| known.iter().filter(|token| token.is(shown)).count();
    if known.is_empty() || request.tokens.iter().map(fit).sum::<usize>() > 0 {
        return Ok(());
    } else if request.tokens.is_empty() {
        let reason = format!("{what} needs a token: Authorization: Bearer TOKEN, or the cookie brooklet_token");
        return Err(Answer::text(401, reason).header("WWW-Authenticate", "Bearer realm=\"brooklet\""));
    }
    decline(403, format!("this token is not good for {what}"))
}

/// The lines of a body that is still arriving.
struct Lines<'a, 'b> {
    reader: &'a mut Reader<'b>,
    body: &'a mut Body,
    config: &'a Config,
    text: Vec<u8>,
    /// Where the line that is looked for begins in `text`.
    start: usize,
    /// How many lines have been taken.
    count: usize,
}

impl<'a, 'b> Lines<'a, 'b> {
    fn new(reader: &'a mut Reader<'b>, body: &'a mut Body, config: &'a Config) -> Lines<'a, 'b> {
        Lines { reader, body, config, text: Vec::new(), start: 0, count: 0 }
    }

    /// Waits for a line, and takes those that came with it, too: they are published together, with one write of the
    /// journal, before anyone waits for more. False with the last ones. What was taken before an error counts.
    fn take_some(&mut self, texts: &mut Vec<String>) -> Result<bool, Answer> {
        while let Some(line) = self.next()? {
            self.count += 1;
            let reason = |_| Answer::refusal(400, &format!("line {} is not UTF-8", self.count));
            texts.push(String::from_utf8(line).map_err(reason)?);
            if texts.len() == LINES_AT_ONCE || !self.text[self.start..].contains(&b'\n') {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for the next line. The last one may lack its LF, if the body ends whole.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Answer> {
        let mut seen = self.start;
        loop {
            let lf = self.text[seen..].iter().position(|b| *b == b'\n');
            let end = lf.map_or(self.text.len(), |lf| seen + lf);
            let has_cr = self.text[..end].ends_with(b"\r");
            if end - self.start > self.config.line_bytes.saturating_add(has_cr.into()) {
                return refuse(413, format!("a line is longer than {} bytes (--line-bytes)", self.config.line_bytes));
            }
            if lf.is_some() {
                let line = &self.text[self.start..end];
                let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
                self.start = end + 1;
                return Ok(Some(line));
            }
            if self.start > 0 {
                self.text.drain(..self.start);
                (self.start, self.reader.deadline) = (0, None);
            }
            seen = self.text.len();
            if self.text.is_empty() {
                self.reader.deadline = None;
            } else if self.reader.deadline.is_none() {
                self.reader.wait_at_most(self.config.body_time);
            }
            if !self.body.read(self.reader, &mut self.text)? {
                return Ok(Some(std::mem::take(&mut self.text)).filter(|line| !line.is_empty()));
            }
        }
    }
}

fn open_topics(request: &Request, list: &str) -> Result<Opening, Answer> {
    let bad = |error: io::Error| Answer::text(400, error);
    let mut names: Vec<String> = Vec::new();
    for name in list.split(',') {
        check_topic(name).map_err(bad)?;
        if names.iter().any(|known| known == name) {
            continue;
        } else if names.len() == TOPICS_PER_STREAM {
            return decline(400, format!("a stream takes up to {TOPICS_PER_STREAM} topics, and these are more"));
        }
        names.push(name.into());
    }
    let poll = match request.query.get("poll") {
        None => None,
        Some("") => Some(POLL),
        Some(time) => Some(parse_duration(time).map_err(bad)?),
    };
    let since = match request.query.get("since") {
        None => Start::Now,
        Some("earliest") => Start::Earliest,
        Some(text) => match (parse_duration(text), text.parse()) {
            (Ok(time), _) => Start::Ago(time),
            (_, Ok(id)) => Start::After(Some(id)),
            _ => return decline(400, format!("since is earliest, a time such as 10m, or an id; not {}", shown(text))),
        },
    };
    // A page opened anew says `since`; one that comes back says where it was, and that wins.
    let parameters = CURSOR_PARAMETERS.map(|name| request.query.get(name));
    let cursors = [request.last_event_id.as_deref(), parameters[0], parameters[1]];
    let cursor = cursors.into_iter().flatten().find(|text| !text.is_empty());
    let start = cursor.map_or(since, |text| Start::After(text.parse().ok()));
    Ok(Opening::Topics { names, start, poll })
}

// ---------------------------------------------------------------------------------------------------------------------
// Server: accept, refuse, stop. A connection is waiting (in its head, or idle between requests), busy (in its body or
// its answer), or a stream. When all places are taken, the one that has been waiting longest makes room, or else the
// one that has been busy longest, so that no crowd of idle or slow ones can lock the others out. Streams never take all
// the places; while there are few streams, a herd that comes back at once has theirs, too.

/// A server that is bound but does not serve yet: add pages and streams, then [`run`](Server::run) or
/// [`spawn`](Server::spawn) it.
pub struct Server {
    handle: Handle,
}

/// A running server. Dropping it stops everything: streams get a reconnection time and their end, and after a second at
/// most every thread has done its work, but for handlers that do not return (they find their socket closed), programs' own
/// threads that wait for a stuck disk, and the log's where stderr takes nothing.
pub struct Handle {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    /// The listening socket as one that can be shut down, which wakes every acceptor. Made at the start, since stopping
    /// must work without a descriptor left.
    doorbell: TcpStream,
    acceptors: Vec<JoinHandle<()>>,
    lanes: Vec<JoinHandle<()>>,
}

impl Server {
    /// Binds the address and starts the hub, so that publishing works from here on. Port 0 takes any free one.
    ///
    /// # Errors
    /// The address cannot be bound; it is beyond loopback and [`Config::open`] is not set
    /// ([`ErrorKind::PermissionDenied`]); a limit makes no sense ([`ErrorKind::InvalidInput`]); the journal cannot be
    /// used ([`ErrorKind::ResourceBusy`]: another process has it; [`ErrorKind::InvalidData`]: the file is none); or no
    /// thread can be started; or the system has no room for two connections ([`ErrorKind::QuotaExceeded`]).
    pub fn bind(address: impl ToSocketAddrs, config: Config) -> io::Result<Server> {
        config.check()?;
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        if !config.open && config.publish_tokens.is_empty() && !address.ip().is_loopback() {
            let reason = format!(
                "{address} is beyond loopback, so whoever reaches it could publish: \
                 give --publish-token TOKEN, or say --open"
            );
            return Err(io::Error::new(ErrorKind::PermissionDenied, reason));
        }
        let doorbell = TcpStream::from(std::os::fd::OwnedFd::from(listener.try_clone()?));
        let log = Arc::new(Logger::start(config.log)?);
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let lane_count = if config.lanes == 0 { cores.div_ceil(2) } else { config.lanes };
        let config = system::fit(config, lane_count, &log)?;
        let (mut lanes, mut threads, counters) = (Vec::new(), Vec::new(), Arc::new(Counters::default()));
        for n in 0..lane_count {
            let (lane, thread) = lane::start(format!("lane {n}"), config.heartbeat, counters.clone())?;
            lanes.push(lane);
            threads.push(thread);
        }
        let core = Core::new(config, lanes, counters, &log)?;
        let places = Places::new(core.config.subscribers, core.config.connections);
        let hub = Hub { core: Arc::new(core) };
        let loopback_port = Some(address.port()).filter(|_| address.ip().is_loopback());
        let shared =
            Shared { hub, routes: Mutex::default(), places, loopback_port, address_space: AddressSpace::read(), log };
        let (shared, listener) = (Arc::new(shared), Arc::new(listener));
        Ok(Server { handle: Handle { shared, listener, doorbell, acceptors: Vec::new(), lanes: threads } })
    }

    /// Answers `GET path` with these bytes: a page, a script, a small answer of one's own.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not begin with a slash, or that is the server's own.
    pub fn page(&self, path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> io::Result<()> {
        self.route(path, Route::Page(content_type.into(), body.into()))
    }

    /// Answers `GET path` with a stream that `handler` writes, on the connection's own thread, until it returns or the
    /// socket closes. The head goes out before the handler is called. The thread's stack has 128 KiB: what is large
    /// belongs on the heap.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not begin with a slash, or that is the server's own.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/clock", |stream| {
    ///     for tick in 0.. {
    ///         stream.send(&Event::new(tick.to_string()))?;
    ///         stream.sleep(Duration::from_secs(1))?; // ends at once when the page is closed
    ///     }
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn stream<H>(&self, path: &str, handler: H) -> io::Result<()>
    where
        H: Fn(&mut Stream) -> io::Result<()> + Send + Sync + 'static,
    {
        self.route(path, Route::Stream(Arc::new(handler)))
    }

    fn route(&self, path: &str, route: Route) -> io::Result<()> {
        if !path.starts_with('/') || path.starts_with("/events/") || ["/health", "/metrics"].contains(&path) {
            return invalid(format!("{} cannot be routed: begin with a slash, and not with /events/", shown(path)));
        }
        let mut routes = enter(&self.handle.shared.routes);
        routes.retain(|(known, _)| known != path);
        routes.push((path.into(), route));
        Ok(())
    }

    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        self.handle.hub()
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn run(self) -> io::Result<()> {
        let mut handle = self.spawn()?;
        for acceptor in handle.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        Ok(())
    }

    /// Serves in the background until the handle is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn spawn(mut self) -> io::Result<Handle> {
        for n in 0..ACCEPTORS {
            let (shared, listener) = (self.handle.shared.clone(), self.handle.listener.clone());
            let accept_all = Box::new(move || shared.accept_all(&listener));
            self.handle.acceptors.push(start_thread(format!("accept {n}"), accept_all)?);
        }
        Ok(self.handle)
    }
}

impl Handle {
    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        self.shared.hub.clone()
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// What the system says when asked for it.
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Takes over a connection that another accept loop has accepted, from before its first request.
    ///
    /// # Errors
    /// The connection has gone already. Where there is no room, it is closed, as one of our own would be.
    pub fn serve(&self, socket: TcpStream) -> io::Result<()> {
        let peer = socket.peer_addr()?;
        self.shared.admit(socket, peer);
        Ok(())
    }

    /// Stops everything, as dropping does, and returns how many connections' threads have not ended within the second.
    pub fn stop(mut self) -> usize {
        self.stop_once()
    }

    fn stop_once(&mut self) -> usize {
        let shared = &self.shared;
        if !shared.hub.core.stop() {
            return 0;
        }
        if self.doorbell.shutdown(Shutdown::Both).is_err() {
            // Not every system lets a listening socket be shut down; a connection wakes an acceptor, too.
            let _ = self.addr().map(|address| self.acceptors.iter().for_each(|_| drop(TcpStream::connect(address))));
        }
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        let deadline = Instant::now() + STOP_TIME;
        let left = shared.say_goodbye(deadline);
        for lane in &shared.hub.core.lanes {
            let _ = lane.send(ToLane::Stop);
        }
        for lane in self.lanes.drain(..) {
            let _ = lane.join();
        }
        shared.hub.core.close_journal(deadline);
        shared.log.finish();
        left
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop_once();
    }
}

impl Shared {
    fn config(&self) -> &Config {
        &self.hub.core.config
    }

    fn stopping(&self) -> bool {
        self.hub.core.is_stopping()
    }

    fn accept_all(self: &Arc<Shared>, listener: &TcpListener) {
        while !self.stopping() {
            match listener.accept() {
                Ok((socket, peer)) => self.admit(socket, peer),
                Err(_) if self.stopping() => return,
                Err(error) => {
                    self.log.warn(format_args!("accepting failed: {error}"));
                    if ![ErrorKind::ConnectionAborted, ErrorKind::Interrupted].contains(&error.kind()) {
                        // Without memory or descriptors this repeats until there is some again: it must not spin.
                        self.places.make_room();
                        thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }

    /// Gives a connection its thread, or closes it where there is no room.
    fn admit(self: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
        let has_space = self.address_space.has_room();
        if !has_space {
            self.places.make_room(); // for the next: an ending thread's space is not free at once
        }
        let admitted = if has_space && !self.stopping() { self.places.admit(socket, peer) } else { None };
        let Some(c) = admitted else {
            self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
            let (limit, what) =
                (self.places.limit(), if has_space { "are taken" } else { "have no address space (ulimit -v)" });
            return self.log.warn(format_args!("no room for {peer}: all {limit} places {what}"));
        };
        let name = format!("conn {}", c.serial);
        let thread =
            ConnectionThread { shared: self.clone(), c, path: None, reason: "".into(), opened: Instant::now() };
        if let Err(error) = start_thread(name, Box::new(move || thread.converse())) {
            self.log.warn(format_args!("no thread for {peer}: {error}")); // it was dropped, and has left its place
            self.places.make_room();
        }
    }

    /// Ends every connection: streams with their reconnection time, publishers with their answer; who waits for a
    /// request may still ask for the server's health meanwhile. Returns how many did not end in time.
    fn say_goodbye(&self, deadline: Instant) -> usize {
        let started = Instant::now();
        for c in self.places.at_work() {
            c.take_back();
            let _ = c.socket.shutdown(Shutdown::Read); // wakes who waits for a body or a handler's timer
        }
        self.places.wait_for_work(started + STOP_GRACE);
        for c in self.places.everyone() {
            let _ = c.socket.shutdown(Shutdown::Both); // wakes who waits for a request, or a slow peer
        }
        let left = self.places.wait_for_threads(deadline);
        if left > 0 {
            let peers: Vec<String> = self.places.everyone().iter().take(10).map(|c| c.peer.to_string()).collect();
            self.log.line(Log::Info, format_args!("{left} connections did not end: {}", peers.join(" ")));
        }
        left
    }
}

/// A connection on its thread. Dropping it, also by a panic, closes the socket and takes it from the list.
struct ConnectionThread {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    path: Option<String>, // for the log, once it is a stream
    reason: Cow<'static, str>,
    opened: Instant,
}

impl ConnectionThread {
    fn converse(mut self) {
        let (c, config) = (&self.c, self.shared.config());
        let prepared = c.socket.set_nonblocking(false).and(c.socket.set_nodelay(true));
        if prepared.and(c.socket.set_write_timeout(Some(config.stall_time))).is_err() {
            return; // it has gone already
        }
        if let Some((path, head, opening)) = self.shared.requests(c) {
            self.path = Some(shown(&path));
            self.reason = "the handler panicked".into(); // what is logged if the next line never returns
            self.reason = self.shared.stream(&self.c, head, opening);
        }
    }
}

impl Shared {
    /// Answers requests until the connection ends, or asks for a stream: returns its path, its head, and what it is.
    fn requests(&self, c: &Connection) -> Option<(String, String, Opening)> {
        let config = self.config();
        let mut reader = Reader { c, buffer: Vec::new(), start: 0, deadline: None, timeout: None };
        reader.wait_at_most(config.head_time);
        let mut answered = Instant::now();
        loop {
            let request = Request::read(&mut reader, config);
            let keen = answered.elapsed() < 2 * AWAKE_TIME; // the first of a connection counts, too: it comes at once
            let (answer, head_only, close) = match request {
                Ok(None) => return None,
                Err(refusal) => {
                    let is_head = reader.unread().starts_with(b"HEAD "); // its head is still there, since it was refused
                    let reason = String::from_utf8_lossy(&refusal.body);
                    self.log.line(Log::Debug, format_args!("{} {}: {}", c.peer, refusal.status, reason.trim_end()));
                    (refusal, is_head, true)
                }
                Ok(Some(mut request)) => {
                    if !self.places.move_to(Place::Busy, c) {
                        return None;
                    }
                    let (path, is_head) = (std::mem::take(&mut request.path), request.method == "HEAD");
                    let cors = self.cors(&request);
                    let mut answer = match self.reply(&mut reader, &mut request, &path) {
                        Ok(Reply::Stream(_)) if is_head => {
                            self.log_request(c, &request, &path, 200);
                            let _ = c.write_whole(stream_head(&cors).as_bytes(), Instant::now() + LINGER);
                            return None;
                        }
                        Ok(Reply::Stream(opening)) => return Some((path, stream_head(&cors), opening)),
                        Ok(Reply::Answer(answer)) | Err(answer) => answer,
                    };
                    answer.headers += &cors;
                    self.log_request(c, &request, &path, answer.status);
                    let close = request.close || answer.close || !request.body.is_over() || self.stopping();
                    (answer, is_head, close)
                }
            };
            let deadline = Instant::now() + config.body_time;
            if c.write_whole(&answer.encode(head_only, close), deadline).is_err() {
                return None;
            } else if close {
                reader.linger();
                return None;
            }
            reader.wait_at_most(config.idle_time);
            if !self.places.move_to(Place::Idle, c) {
                return None;
            }
            if keen && c.stay_awake().is_err() {
                return None;
            }
            answered = Instant::now();
        }
    }

    /// A stream's line is written when it closes.
    fn log_request(&self, c: &Connection, request: &Request, path: &str, status: u16) {
        if self.log.wants(Log::Debug) {
            self.log.line(Log::Debug, format_args!("{} {:.20} {} {status}", c.peer, request.method, shown(path)));
        }
    }
}

impl Drop for ConnectionThread {
    fn drop(&mut self) {
        let (c, shared) = (&self.c, &self.shared);
        let _ = c.socket.shutdown(Shutdown::Write); // its lane may hold the socket for a moment longer
        if let Some(path) = &self.path {
            let (open, sent) = (self.opened.elapsed(), enter(&c.state).sent);
            let (seconds, tenths) = (open.as_secs(), open.subsec_millis() / 100);
            let (peer, reason) = (c.peer, &self.reason);
            let line = format_args!(
                "closed peer={peer} path={path} reason={reason:?} seconds={seconds}.{tenths} events={sent}"
            );
            let repeats = [POLL_IS_OVER, NO_ROOM, NO_NAMES].contains(&&**reason); // as fast as a flood
            shared.log.line(if repeats { Log::Debug } else { Log::Info }, line);
        }
        shared.places.leave(c);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

impl Shared {
    fn metrics(&self) -> String {
        let Counts { idle, busy, trusted, streams } = self.places.counts();
        let Totals { topics, events, bytes } = self.hub.core.history().totals();
        let gauges = Gauges {
            subscribers: streams,
            connections: idle + busy + trusted,
            topics,
            kept_events: events,
            kept_bytes: bytes,
        };
        metrics::render(&gauges, &self.hub.core.counters)
    }
}

#[cfg(fuzzing)]
#[path = "../tests/fuzz/reach.rs"]
pub mod fuzzing;
