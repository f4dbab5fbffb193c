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
//! Server-Sent Events go one way. Once its request is read, a subscriber sends nothing, so there is nothing to wait for:
//! a write to it succeeds, would block, or fails. That makes two states, and one thread for each:
//!
//! ```text
//!                 publish: number it, keep it, hand it to every lane (crossbeam channel, bounded)
//!                                       │
//!   ┌───────────────────────────────────┴───────────────────────┐
//!   ▼ lane thread (one a core)                                   ▼ kept events (of each topic)
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
//! It follows one event: limits and [`Config`], [`Event`] and [`Id`], the kept events, the [`Hub`] that publishes and its
//! lanes, the subscriber, HTTP, the routes, the [`Server`] around them, and last the counters and the log.
//!
//! # Locks, outermost first
//! | lock | held | guards |
//! |---|---|---|
//! | `Hub::order` | from numbering an event to the last lane's queue | that ids, kept events and queues have one order |
//! | `Hub::kept` | shortly, never during I/O | the kept events and the table of topics |
//! | `Connection::state` | during one non-blocking write | whose the socket is, and the cursor |
//! | `Shared::guests` | shortly, under no other lock | which connections are open |
//!
//! No lock is held while waiting for a peer. A panic under a lock does not take the others along: they enter the poisoned
//! lock, since every update here leaves its data whole.
//!
//! # Not for
//! Two-way traffic (use WebSockets), TLS (put a proxy before it), events that need a database's guarantees.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::{self, Write as _};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

// ---------------------------------------------------------------------------------------------------------------------
// Limits. Whatever comes from outside has a bound: bytes, counts and waits. Those an operator may want to move are fields
// of `Config`, each with its default and the reason for it; those that follow from the protocol or the design stand here.

/// One write to a live subscriber takes at most this much: loopback buffers megabytes, but a real link only about 65 kB,
/// so larger batches would push every distant subscriber behind.
const BATCH_BYTES: usize = 32 * 1024;
/// A lane's queue in slots. An event takes one and one more for each KiB, so that the queue is bounded in bytes (4 MiB) too.
const QUEUE_SLOTS: usize = 4096;
/// How often a lane looks at its subscribers for closed sockets and due heartbeats. Measured: 0.6 µs a socket.
const SWEEP: Duration = Duration::from_secs(1);
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
const STRAY_BYTES: usize = 64 * 1024;
/// Address space of a connection's thread; only pages that are touched take memory. Handlers run on it.
const STACK_BYTES: usize = 128 * 1024;
/// Threads that only accept and hand over: `std` listens with a backlog of 128, and a herd must not outrun it.
const ACCEPTORS: usize = 2;
const TOPIC_NAME_BYTES: usize = 64;
const TOPICS_PER_STREAM: usize = 16;
const KEY_BYTES: usize = 128;
const HEADER_LINES: usize = 100;
const CHUNK_LINE_BYTES: usize = 256;
/// How long `?poll` waits for its first event, and how soon the next poll comes.
const POLL: Duration = Duration::from_secs(25);
const POLL_RETRY: Duration = Duration::from_millis(100);
/// After a refusal the rest of a request is read for this long, or the reset would overtake the answer
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
const LINGER: Duration = Duration::from_secs(1);
/// Stopping: streams have this long to take their end; then sockets are cut, and threads have until the second to go.
const STOP_GRACE: Duration = Duration::from_millis(700);
const STOP_TIME: Duration = Duration::from_millis(950);
/// What a kept event costs beside its bytes: its place in the queue, its counted pointer, its part of the indexes.
const EVENT_OVERHEAD: usize = 128;

/// Every limit of a [`Server`]; each is a flag of the command, too. [`Config::default`] has the defaults named here.
///
/// ```
/// let small = brooklet::Config { subscribers: 100, keep_bytes: 1024 * 1024, ..Default::default() };
/// assert_eq!(small.heartbeat.as_secs(), 15);
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Listen beyond loopback, where whoever reaches the port may publish (default: no).
    pub open: bool,
    /// Streams at once (10,000). A thread takes 4 memory mappings, and at the usual 65,530 of them a process aborts.
    pub subscribers: usize,
    /// Connections beside the streams (1,000), so that publishing and health have room when streams are full.
    pub connections: usize,
    /// Bytes of a request's head (16 KiB): cookies and proxies make heads of several KiB.
    pub head_bytes: usize,
    /// Bytes of one `POST` body, and of one event published from the program (64 KiB).
    pub body_bytes: usize,
    /// Bytes of one line of a `PUT` (64 KiB).
    pub line_bytes: usize,
    /// To send a whole head, from its first byte on; also for a new connection's first byte (10 s).
    pub head_time: Duration,
    /// To send a whole body; of a `PUT`, a line once begun (30 s).
    pub body_time: Duration,
    /// Between the requests of a connection that is kept alive (15 s).
    pub idle_time: Duration,
    /// Longest silence on a stream (15 s): proxies cut silent streams, many after 60 s, some after 30.
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes>
    pub heartbeat: Duration,
    /// Of a topic's stream (10 min), each drawn from 80 to 100 % of it: ghosts behind a proxy cannot stay.
    pub lifetime: Duration,
    /// In which a subscriber that is behind must take something (10 s).
    pub stall_time: Duration,
    /// Reconnection time that streams are told (3 s); spread over 50 to 150 % where many are sent away at once.
    pub retry: Duration,
    /// Newest events kept of each topic (1,000).
    pub keep_events: usize,
    /// Bytes kept of all topics together (64 MiB), each event counted with 128 bytes of bookkeeping.
    pub keep_bytes: usize,
    /// How long an event is kept (24 h).
    pub keep_age: Duration,
    /// Topic names in use at once (10,000): those with subscribers or kept events.
    pub topics: usize,
    /// Lane threads (0, the default: one a core).
    pub lanes: usize,
    /// What is written to stderr (nothing; the command's default is `info`).
    pub log: Log,
}

impl Default for Config {
    fn default() -> Config {
        let seconds = Duration::from_secs;
        Config {
            open: false,
            subscribers: 10_000,
            connections: 1_000,
            head_bytes: 16 * 1024,
            body_bytes: 64 * 1024,
            line_bytes: 64 * 1024,
            head_time: seconds(10),
            body_time: seconds(30),
            idle_time: seconds(15),
            heartbeat: seconds(15),
            lifetime: seconds(600),
            stall_time: seconds(10),
            retry: seconds(3),
            keep_events: 1_000,
            keep_bytes: 64 * 1024 * 1024,
            keep_age: seconds(24 * 3600),
            topics: 10_000,
            lanes: 0,
            log: Log::Off,
        }
    }
}

impl Config {
    fn check(self) -> io::Result<Config> {
        let Config { head_time, body_time, idle_time, heartbeat, lifetime, stall_time, .. } = self;
        if [head_time, body_time, idle_time, heartbeat, lifetime, stall_time].iter().any(|time| time.as_millis() == 0) {
            return invalid("a time limit of 0 leaves no time for anything: give at least 1ms".into());
        } else if self.connections == 0 {
            return invalid("without any connections nobody could ask for a stream: give at least 1".into());
        }
        Ok(self)
    }
}

/// How much is written to stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Log {
    /// Nothing.
    #[default]
    Off,
    /// Streams that closed, and what limits did.
    Info,
    /// Every request, too.
    Debug,
}

/// Reads a length of time as flags and queries write it: `500ms`, `15s`, `10m`, `24h`; at most ten years.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for any other text.
///
/// ```
/// assert_eq!(brooklet::parse_duration("10m").unwrap().as_secs(), 600);
/// assert!(brooklet::parse_duration("10").is_err());
/// ```
pub fn parse_duration(text: &str) -> io::Result<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit_ms = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match text[..digits].parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)) {
        Some(ms) if unit_ms > 0 && ms <= 315_360_000_000 => Ok(Duration::from_millis(ms)),
        _ => invalid(format!("{} is no length of time: write 500ms, 15s, 10m or 24h", shown(text))),
    }
}

fn invalid<T>(reason: String) -> io::Result<T> {
    Err(io::Error::new(ErrorKind::InvalidInput, reason))
}

/// What came from outside, made fit for a one-line message: quoted, escaped and cut.
fn shown(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{:?}…", &text[..cut]),
        None => format!("{text:?}"),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Event and Id. An event is encoded once, when it is published, into the bytes that every subscriber gets. What 29 clients
// make of these bytes decided their form: LF alone ends a line, one blank line ends an event, nothing else stands between.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/// The place of an event in the one order over all topics, written `MILLISECONDS-SEQUENCE` as Redis streams do.
///
/// ```
/// use brooklet::Id;
/// let id: Id = "1700000000000-2".parse().unwrap();
/// assert!(id > "1700000000000".parse().unwrap()); // that is 1700000000000-0
/// assert_eq!(id.to_string(), "1700000000000-2");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// Unix time in milliseconds when the event was published.
    pub ms: u64,
    /// Counts the events of one millisecond from 0.
    pub seq: u64,
}

impl Id {
    /// The id for an event published now: above this one, also when the clock has gone back.
    fn next(self, now_ms: u64) -> Id {
        if now_ms > self.ms { Id { ms: now_ms, seq: 0 } } else { Id { ms: self.ms, seq: self.seq + 1 } }
    }

    /// The place just before this one; it need not belong to any event.
    fn before(self) -> Id {
        match self.seq {
            0 => Id { ms: self.ms.saturating_sub(1), seq: u64::MAX },
            seq => Id { ms: self.ms, seq: seq - 1 },
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

impl FromStr for Id {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Id> {
        // `u64::from_str` alone would take a sign.
        let number = |t: &str| {
            if t.bytes().all(|b| b.is_ascii_digit()) { t.parse().ok() } else { None }
        };
        let (ms, seq) = text.split_once('-').unwrap_or((text, "0"));
        match (number(ms), number(seq)) {
            (Some(ms), Some(seq)) => Ok(Id { ms, seq }),
            _ => invalid(format!("{} is no event id: write MILLISECONDS-SEQUENCE", shown(text))),
        }
    }
}

/// One event, to be published to a topic or sent on a handler's stream.
///
/// ```
/// use brooklet::Event;
/// let event = Event::new("line one\nline two").name("note").key("order-7");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Event {
    name: Option<String>,
    id: Option<String>,
    data: String,
    retry: Option<Duration>,
    key: Option<String>,
}

impl Event {
    /// An event with this data. LF, CRLF and CR in it each begin a new `data:` line; the page gets them as LF.
    pub fn new(data: impl Into<String>) -> Event {
        Event { data: data.into(), ..Event::default() }
    }

    /// The event's type, which pages listen for; without it, `message`. May not hold CR, LF or NUL; `gap` is reserved.
    pub fn name(mut self, name: impl Into<String>) -> Event {
        self.name = Some(name.into());
        self
    }

    /// The last event ID, on a handler's stream only (topics number their events). May not hold CR, LF or NUL.
    pub fn id(mut self, id: impl Into<String>) -> Event {
        self.id = Some(id.into());
        self
    }

    /// The reconnection time, in whole milliseconds.
    pub fn retry(mut self, time: Duration) -> Event {
        self.retry = Some(time);
        self
    }

    /// Makes publishing repeatable: a second event of the same topic with this key (1 to 128 bytes) is not published, and
    /// gets the first one's id, for as long as the first is kept.
    pub fn key(mut self, key: impl Into<String>) -> Event {
        self.key = Some(key.into());
        self
    }

    fn check(&self) -> io::Result<()> {
        for (field, text) in [("event name", &self.name), ("id", &self.id)] {
            if let Some(text) = text.as_deref().filter(|t| t.contains(['\r', '\n', '\0'])) {
                return invalid(format!("the {field} {} holds CR, LF or NUL: leave them out", shown(text)));
            }
        }
        Ok(())
    }

    /// The bytes on the wire, with the fields in the order `event`, `id`, `data`, `retry`.
    fn encode(&self, id: Option<&dyn fmt::Display>) -> String {
        let mut out = String::with_capacity(self.data.len() + 96);
        if let Some(name) = self.name.as_deref().filter(|n| !n.is_empty()) {
            out.extend(["event: ", name, "\n"]);
        }
        if let Some(id) = id {
            let _ = writeln!(out, "id: {id}");
        }
        let data = match self.data.contains('\r') {
            true => Cow::Owned(self.data.replace("\r\n", "\n")),
            false => Cow::Borrowed(&self.data),
        };
        for line in data.split(['\n', '\r']) {
            out.extend(["data: ", line, "\n"]);
        }
        if let Some(retry) = self.retry {
            let _ = writeln!(out, "retry: {}", retry.as_millis());
        }
        out.push('\n');
        out
    }
}

/// An event as it is kept, queued and written: its bytes are shared, never copied per subscriber.
#[derive(Clone)]
struct Encoded {
    id: Id,
    bytes: Arc<[u8]>,
}

/// Encoded events in the order of their ids, one after another in one buffer, so that one write can take them all.
#[derive(Default)]
struct Run {
    events: Vec<(Encoded, usize)>, // with the place in `bytes` where it ends
    bytes: Vec<u8>,
}

impl Run {
    fn push(&mut self, event: &Encoded) {
        self.bytes.extend_from_slice(&event.bytes);
        self.events.push((event.clone(), self.bytes.len()));
    }

    fn has_room_for(&self, event: &Encoded) -> bool {
        self.bytes.is_empty() || self.bytes.len() + event.bytes.len() <= BATCH_BYTES
    }

    /// Where the first `count` events end.
    fn end_of(&self, count: usize) -> usize {
        if count == 0 { 0 } else { self.events[count - 1].1 }
    }

    fn newest(&self) -> Id {
        self.events.last().map_or(Id::default(), |(event, _)| event.id)
    }

    fn clear(&mut self) {
        self.events.clear();
        self.bytes.clear();
        self.bytes.shrink_to(2 * BATCH_BYTES); // one event of 448 KiB must not stay for ever
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kept events. Each topic keeps its newest, bounded by count and age; all together stay inside a budget of bytes, and
// whatever must go, the oldest of all goes first. A topic remembers the newest id it has let go: a cursor below that has
// missed something, and is told so by a `gap`. A topic that nobody uses and that keeps nothing goes; the newest id that
// such topics had let go is one number, and counts for every topic that is not in the table. At the start that number is
// the base, so whatever an earlier process had is a gap too.

struct Topic {
    events: VecDeque<(Encoded, Option<Arc<str>>)>, // with their keys
    keys: HashMap<Arc<str>, Id>,
    let_go: Id,
    subscribers: usize,
}

impl Topic {
    /// The kept events after `cursor`, oldest first.
    fn after(&self, cursor: Id) -> impl Iterator<Item = &Encoded> {
        let first = self.events.partition_point(|(event, _)| event.id <= cursor);
        self.events.range(first..).map(|(event, _)| event)
    }
}

struct Kept {
    topics: HashMap<Arc<str>, Topic>,
    /// The oldest event of each topic that keeps any: the next to go is the first.
    oldest: BTreeMap<Id, Arc<str>>,
    bytes: usize,
    count: usize,
    /// The newest id that subscribers may have seen, over all topics.
    newest: Id,
    forgotten: Id,
}

/// Where a new stream wants to begin.
#[derive(Clone, Copy)]
enum Start {
    Now,
    Earliest,
    Ago(Duration),
    Cursor(Id),
    /// A cursor that is none of ours. A refusal would strand the browser, so it is answered with a gap.
    Malformed,
}

/// Events after a cursor that may have been let go.
struct Gap {
    after: Option<Id>,
    oldest: Option<Id>,
    id: Id,
}

impl Gap {
    fn encode(&self) -> Encoded {
        let json = |id: Option<Id>| id.map_or("null".into(), |id| format!("\"{id}\""));
        let data = format!("{{\"after\":{},\"oldest\":{}}}", json(self.after), json(self.oldest));
        Encoded { id: self.id, bytes: Event::new(data).name("gap").encode(Some(&self.id)).into_bytes().into() }
    }
}

/// What a subscriber that is behind gets next.
enum Next {
    Gap(Gap),
    Events,
    Nothing,
}

impl Kept {
    fn new(base: Id) -> Kept {
        let (topics, oldest) = Default::default();
        Kept { topics, oldest, bytes: 0, count: 0, newest: base, forgotten: base }
    }

    /// Puts the topic in the table. The caller uses it at once, by an event or a subscriber: an unused one would stay.
    fn topic(&mut self, name: &str, limit: usize) -> io::Result<&mut Topic> {
        if !self.topics.contains_key(name) {
            if self.topics.len() >= limit {
                let reason = format!("all {limit} topic names are in use: use one of them, or try again later");
                return Err(io::Error::new(ErrorKind::QuotaExceeded, reason));
            }
            let (events, keys) = Default::default();
            self.topics.insert(name.into(), Topic { events, keys, let_go: self.forgotten, subscribers: 0 });
        }
        self.topics.get_mut(name).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn insert(&mut self, name: &str, event: Encoded, key: Option<Arc<str>>, config: &Config) -> io::Result<Arc<str>> {
        let topic = self.topic(name, config.topics)?;
        let (id, first, cost) = (event.id, topic.events.is_empty(), cost(&event, &key));
        topic.keys.extend(key.clone().map(|key| (key, id)));
        topic.events.push_back((event, key));
        let over = topic.events.len() > config.keep_events;
        let name = self.topics.get_key_value(name).map_or_else(|| name.into(), |(name, _)| name.clone());
        self.bytes += cost;
        self.count += 1;
        self.newest = id;
        if first {
            self.oldest.insert(id, name.clone());
        }
        if over {
            self.let_go_oldest_of(&name);
        }
        while self.bytes > config.keep_bytes {
            let Some(name) = self.oldest.values().next().cloned() else {
                break;
            };
            self.let_go_oldest_of(&name);
        }
        Ok(name)
    }

    fn let_go_oldest_of(&mut self, name: &Arc<str>) {
        let Some(topic) = self.topics.get_mut(name) else {
            return;
        };
        let Some((event, key)) = topic.events.pop_front() else {
            return;
        };
        self.oldest.remove(&event.id);
        self.bytes -= cost(&event, &key);
        self.count -= 1;
        topic.let_go = event.id;
        if let Some(key) = key {
            topic.keys.remove(&key);
        }
        // What a busier hour has reserved is given back, or the budget would not bound it.
        if topic.events.len() * 4 < topic.events.capacity() {
            topic.events.shrink_to(topic.events.len() * 2);
            topic.keys.shrink_to(topic.keys.len() * 2);
        }
        match topic.events.front() {
            Some((next, _)) => drop(self.oldest.insert(next.id, name.clone())),
            None => self.forget_if_unused(name),
        }
    }

    fn forget_if_unused(&mut self, name: &str) {
        if let Some(topic) = self.topics.get(name).filter(|t| t.subscribers == 0 && t.events.is_empty()) {
            self.forgotten = self.forgotten.max(topic.let_go);
            self.topics.remove(name);
        }
    }

    /// Lets go what is older than `age`. Whoever takes the lock does this first, so nobody sees an event too old.
    fn expire(&mut self, age: Duration) {
        let limit = self.ago(age);
        while let Some((id, name)) = self.oldest.first_key_value().map(|(id, name)| (*id, name.clone())) {
            if id >= limit {
                break;
            }
            self.let_go_oldest_of(&name);
        }
    }

    /// The cursor that long before the newer of now and the newest id.
    fn ago(&self, time: Duration) -> Id {
        let time_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Id { ms: now_ms().max(self.newest.ms).saturating_sub(time_ms), seq: 0 }
    }

    fn subscribe(&mut self, names: &[String], limit: usize) -> io::Result<Arc<[Arc<str>]>> {
        let mut taken: Vec<Arc<str>> = Vec::with_capacity(names.len());
        for name in names {
            match self.topic(name, limit) {
                Ok(topic) => topic.subscribers += 1,
                Err(full) => {
                    self.unsubscribe(&taken);
                    return Err(full);
                }
            }
            taken.extend(self.topics.get_key_value(name.as_str()).map(|(name, _)| name.clone()));
        }
        Ok(taken.into())
    }

    fn unsubscribe(&mut self, names: &[Arc<str>]) {
        for name in names {
            if let Some(topic) = self.topics.get_mut(name) {
                topic.subscribers -= 1;
            }
            self.forget_if_unused(name);
        }
    }

    fn topics(&self, names: &[Arc<str>]) -> impl Iterator<Item = &Topic> {
        names.iter().filter_map(|name| self.topics.get(name))
    }

    fn let_go(&self, names: &[Arc<str>]) -> Id {
        self.topics(names).map(|topic| topic.let_go).max().unwrap_or(self.forgotten)
    }

    fn oldest_after(&self, names: &[Arc<str>], cursor: Id) -> Option<Id> {
        self.topics(names).filter_map(|topic| topic.after(cursor).next()).map(|event| event.id).min()
    }

    fn gap(&self, names: &[Arc<str>], after: Option<Id>, cursor: Id) -> Gap {
        let oldest = self.oldest_after(names, cursor);
        Gap { after, oldest, id: oldest.map_or(self.let_go(names), Id::before) }
    }

    /// The cursor a new stream starts after, and the gap it must hear first.
    fn start(&self, names: &[Arc<str>], from: Start) -> (Id, Option<Gap>) {
        let resume = |cursor: Id| match cursor < self.let_go(names) {
            true => Some(self.gap(names, Some(cursor), cursor)),
            false => None,
        };
        let nowhere = Id::default();
        let gap = match from {
            Start::Now => return (self.newest, None),
            Start::Earliest => return (self.oldest_after(names, nowhere).map_or(self.newest, Id::before), None),
            Start::Ago(time) => {
                let cursor = self.ago(time).min(self.newest);
                return resume(cursor).map_or((cursor, None), |gap| (gap.id, Some(gap)));
            }
            // From the future: ids of a life of this server that is gone. All that is kept is new to it.
            Start::Cursor(cursor) if cursor > self.newest => Some(self.gap(names, Some(cursor), nowhere)),
            Start::Cursor(cursor) => match resume(cursor) {
                None => return (cursor, None),
                gap => gap,
            },
            Start::Malformed => Some(self.gap(names, None, nowhere)),
        };
        (gap.as_ref().map_or(self.newest, |gap| gap.id), gap)
    }

    /// What comes after `cursor` in all of these topics, in one order, up to one batch. Of what was let go up to `told` the
    /// subscriber knows.
    fn next(&self, names: &[Arc<str>], cursor: Id, told: Id, run: &mut Run) -> Next {
        if self.let_go(names) > cursor.max(told) {
            return Next::Gap(self.gap(names, Some(cursor), cursor));
        }
        let mut heads: Vec<_> = self.topics(names).map(|topic| topic.after(cursor).peekable()).collect();
        loop {
            let ahead = heads.iter_mut().filter_map(|head| head.peek().map(|event| event.id).zip(Some(head)));
            let Some((_, head)) = ahead.min_by_key(|(id, _)| *id) else {
                break;
            };
            match head.next() {
                Some(event) if run.has_room_for(event) => run.push(event),
                _ => break,
            }
        }
        if run.bytes.is_empty() { Next::Nothing } else { Next::Events }
    }
}

fn cost(event: &Encoded, key: &Option<Arc<str>>) -> usize {
    EVENT_OVERHEAD + event.bytes.len() + key.as_ref().map_or(0, |key| 2 * key.len())
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Enters a lock, also one that a panic has poisoned: see the module's docs.
fn enter<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---------------------------------------------------------------------------------------------------------------------
// Hub: publishing, and the lanes. Publishing holds the order lock from numbering an event until it stands in the last
// lane's queue, so ids, kept events and queues all have one order. A lane takes neither the order lock nor the kept lock,
// so a publisher that waits for room in its queue is never waited for in turn.

/// Publishes events, from any thread. Cheap to clone; clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    core: Arc<Core>,
}

struct Core {
    config: Config,
    order: Mutex<Order>,
    kept: Mutex<Kept>,
    lanes: Vec<Sender<ToLane>>,
    counters: Arc<Counters>,
}

struct Order {
    newest: Id,
    stopped: bool,
}

enum ToLane {
    Event(Arc<str>, Encoded),
    /// Takes up a slot for each KiB of the event before it.
    Weight,
    Join(Arc<Connection>, Arc<[Arc<str>]>),
    Leave(u64, Arc<[Arc<str>]>),
    Stop,
}

impl Hub {
    /// Publishes one event to a topic, and returns its id once every lane has it in its queue.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a topic or an event that may not be, [`ErrorKind::QuotaExceeded`] when all topic names
    /// are in use, [`ErrorKind::NotConnected`] once the server is stopping. Nothing is published then.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// let hub = Server::bind("127.0.0.1:0", Config::default())?.hub();
    /// let first = hub.publish("orders", Event::new("{\"id\":7}").name("created").key("7"))?;
    /// let again = hub.publish("orders", Event::new("{\"id\":7}").name("created").key("7"))?;
    /// assert_eq!(first, again); // published once
    /// # Ok(()) }
    /// ```
    pub fn publish(&self, topic: &str, event: Event) -> io::Result<Id> {
        let core = &*self.core;
        check_topic(topic)?;
        core.check(&event)?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
        let mut order = enter(&core.order);
        if order.stopped {
            return Err(io::Error::new(ErrorKind::NotConnected, "the server is stopping"));
        }
        let of_key = |key: &Arc<str>| core.kept().topics.get(topic).and_then(|topic| topic.keys.get(key).copied());
        if let Some(first) = key.as_ref().and_then(of_key) {
            return Ok(first);
        }
        let id = order.newest.next(now_ms());
        let event = Encoded { id, bytes: event.encode(Some(&id)).into_bytes().into() };
        let name = core.kept().insert(topic, event.clone(), key, &core.config)?;
        order.newest = id;
        for lane in &core.lanes {
            let _ = lane.send(ToLane::Event(name.clone(), event.clone()));
            for _ in 0..event.bytes.len() / 1024 {
                let _ = lane.send(ToLane::Weight);
            }
        }
        core.counters.published.fetch_add(1, Relaxed);
        Ok(id)
    }
}

impl Core {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        let mut kept = enter(&self.kept);
        kept.expire(self.config.keep_age);
        kept
    }

    fn check(&self, event: &Event) -> io::Result<()> {
        event.check()?;
        let limit = self.config.body_bytes.max(self.config.line_bytes);
        if event.name.as_deref() == Some("gap") {
            return invalid("the event name gap is the server's own: choose another".into());
        } else if event.id.is_some() {
            return invalid("a topic numbers its events itself: leave the id out".into());
        } else if event.data.len() > limit {
            return invalid(format!("{} bytes of data, where at most {limit} are taken", event.data.len()));
        }
        match event.key.as_deref() {
            Some(key) if key.is_empty() || key.len() > KEY_BYTES => {
                invalid(format!("a key of {} bytes, where 1 to {KEY_BYTES} are taken", key.len()))
            }
            _ => Ok(()),
        }
    }

    fn lane_of(&self, c: &Connection) -> &Sender<ToLane> {
        &self.lanes[c.serial as usize % self.lanes.len()]
    }
}

fn check_topic(name: &str) -> io::Result<()> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._~-".contains(&b);
    match (1..=TOPIC_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits) {
        true => Ok(()),
        false => {
            invalid(format!("{} is no topic name: that is 1 to {TOPIC_NAME_BYTES} of A-Z a-z 0-9 . _ ~ -", shown(name)))
        }
    }
}

/// One of the threads that write to live subscribers. Each subscriber belongs to one lane, from before it first turns live
/// until its thread ends; whether the lane may touch its socket is said by its state.
struct Lane {
    topics: HashMap<Arc<str>, BTreeMap<u64, Arc<Connection>>>,
    everyone: BTreeMap<u64, Arc<Connection>>,
    heartbeat: Duration,
    counters: Arc<Counters>,
}

impl Lane {
    fn run(mut self, queue: &Receiver<ToLane>) {
        let mut run = Run::default();
        let mut sweep_at = Instant::now() + SWEEP;
        loop {
            let mut next = match queue.recv_deadline(sweep_at) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // A run is neighbouring events of one topic. It is written when another topic's event comes, when it has
            // become a batch, and when the queue is empty: so a burst costs a subscriber one write, not one an event.
            let mut topic: Option<Arc<str>> = None;
            while let Some(message) = next {
                match message {
                    ToLane::Event(name, event) => {
                        if topic.as_ref() != Some(&name) || !run.has_room_for(&event) {
                            self.write(topic.as_deref(), &mut run);
                            topic = Some(name);
                        }
                        run.push(&event);
                    }
                    ToLane::Weight => {}
                    ToLane::Join(c, names) => self.join(&c, &names),
                    ToLane::Leave(serial, names) => self.leave(serial, &names),
                    ToLane::Stop => return,
                }
                next = if run.bytes.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            self.write(topic.as_deref(), &mut run);
            if Instant::now() >= sweep_at {
                self.sweep();
                sweep_at = Instant::now() + SWEEP;
            }
        }
    }

    fn join(&mut self, c: &Arc<Connection>, names: &[Arc<str>]) {
        self.everyone.insert(c.serial, c.clone());
        for name in names {
            self.topics.entry(name.clone()).or_default().insert(c.serial, c.clone());
        }
    }

    fn leave(&mut self, serial: u64, names: &[Arc<str>]) {
        self.everyone.remove(&serial);
        for name in names {
            if let Some(subscribers) = self.topics.get_mut(name) {
                subscribers.remove(&serial);
                if subscribers.is_empty() {
                    self.topics.remove(name);
                }
            }
        }
    }

    fn write(&self, topic: Option<&str>, run: &mut Run) {
        let now = Instant::now();
        let mut delivered = 0;
        for c in topic.and_then(|name| self.topics.get(name)).into_iter().flat_map(BTreeMap::values) {
            let mut state = enter(&c.state);
            if state.phase != Phase::Live || state.cursor >= run.newest() {
                continue;
            } else if state.one_shot {
                state.phase = Phase::Behind;
            } else {
                delivered += c.deliver(&mut state, run, now);
            }
            self.wake_if_not_live(c, &state);
        }
        self.counters.delivered.fetch_add(delivered, Relaxed);
        run.clear();
    }

    /// Looks at every live subscriber: has it closed, and is a heartbeat due? No connection's thread wakes for either.
    fn sweep(&self) {
        let now = Instant::now();
        for c in self.everyone.values() {
            let mut state = enter(&c.state);
            if state.phase != Phase::Live {
                continue;
            }
            match c.look(&mut state.stray) {
                Some(reason) => state.phase = Phase::Closed(reason),
                None if now.duration_since(state.wrote) >= self.heartbeat => c.beat(&mut state, now),
                None => continue,
            }
            self.wake_if_not_live(c, &state);
        }
    }

    fn wake_if_not_live(&self, c: &Connection, state: &State) {
        if state.phase != Phase::Live {
            self.counters.woken.fetch_add(1, Relaxed);
            c.wake.notify_one();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Subscriber: one connection, and whose its socket is. `phase` says it, under the subscriber's own lock: while it is live
// the socket is the lane's, else its thread's. Non-blocking mode belongs to the open file, not to a handle, so only the
// owner sets it; everyone else may only shut the socket down. The thread turns live under the kept lock, having seen in
// the same hold that nothing newer is kept; whatever is published after that is queued after that, and whatever is queued
// from before is not newer than the cursor, and skipped. So nothing is lost and nothing comes twice.

/// The line that keeps a silent stream open. No blank line after it: some clients take every blank line for an event.
const HEARTBEAT: &[u8] = b":\n";

struct Connection {
    serial: u64,
    peer: SocketAddr,
    socket: TcpStream,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    phase: Phase,
    /// Everything up to here has been written, or is not for this subscriber.
    cursor: Id,
    unfinished: Option<Unfinished>,
    /// A poll is not written to by its lane: the first event wakes its thread, which replays and ends.
    one_shot: bool,
    wrote: Instant,
    sent: u64,
    stray: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Behind,
    Live,
    Closed(&'static str),
}

/// An event that did not fit into the socket. It must be finished before anything else is written.
struct Unfinished {
    event: Encoded,
    offset: usize,
}

impl Connection {
    fn new(serial: u64, peer: SocketAddr, socket: TcpStream) -> Connection {
        let (phase, cursor) = (Phase::Behind, Id::default());
        let state =
            State { phase, cursor, unfinished: None, one_shot: false, wrote: Instant::now(), sent: 0, stray: 0 };
        Connection { serial, peer, socket, state: Mutex::new(state), wake: Condvar::new() }
    }

    /// One non-blocking write of what in `run` is newer than the cursor. Returns how many events went out whole; where not
    /// all did, the subscriber is behind.
    fn deliver(&self, state: &mut State, run: &Run, now: Instant) -> u64 {
        let first = run.events.partition_point(|(event, _)| event.id <= state.cursor);
        let start = run.end_of(first);
        let reached = match write_now(&self.socket, &run.bytes[start..]) {
            Ok(written) => start + written,
            Err(error) => {
                state.phase = Phase::Closed(reason_of(&error));
                return 0;
            }
        };
        let whole = run.events.partition_point(|(_, end)| *end <= reached);
        if whole > first {
            state.cursor = run.events[whole - 1].0.id;
            state.sent += (whole - first) as u64;
            state.wrote = now;
        }
        if reached < run.bytes.len() {
            state.phase = Phase::Behind;
            let offset = reached - run.end_of(whole);
            state.unfinished = (offset > 0).then(|| Unfinished { event: run.events[whole].0.clone(), offset });
        }
        (whole - first) as u64
    }

    fn beat(&self, state: &mut State, now: Instant) {
        state.wrote = now;
        match write_now(&self.socket, HEARTBEAT) {
            Ok(offset) if offset < HEARTBEAT.len() => {
                let event = Encoded { id: state.cursor, bytes: HEARTBEAT.into() };
                state.unfinished = Some(Unfinished { event, offset });
                state.phase = Phase::Behind;
            }
            Ok(_) => {}
            Err(error) => state.phase = Phase::Closed(reason_of(&error)),
        }
    }

    /// One read that does not wait: says why the connection is closed, if it is, and throws stray bytes away.
    fn look(&self, stray: &mut usize) -> Option<&'static str> {
        match (&self.socket).read(&mut [0; 512]) {
            Ok(0) => Some("the peer closed the connection"),
            Ok(got) => {
                *stray += got;
                (*stray > STRAY_BYTES).then_some("the peer sent too much after its request")
            }
            Err(error) if would_block(&error) || error.kind() == ErrorKind::Interrupted => None,
            Err(error) => Some(reason_of(&error)),
        }
    }

    /// Finishes what stands unfinished with blocking writes: the one place where a subscriber is waited for.
    fn finish(&self, deadline: Instant) -> Result<(), &'static str> {
        let Some(Unfinished { event, offset }) = enter(&self.state).unfinished.take() else {
            return Ok(());
        };
        let result = self.write_waiting(&event.bytes[offset..], Some(deadline));
        let mut state = enter(&self.state);
        if result.is_ok() && event.id > state.cursor {
            state.cursor = event.id;
            state.sent += 1;
        }
        state.wrote = Instant::now();
        result
    }

    fn write_waiting(&self, bytes: &[u8], deadline: Option<Instant>) -> Result<(), &'static str> {
        let done = self.socket.set_nonblocking(false).map_err(|e| reason_of(&e));
        let done = done.and_then(|()| self.write_whole(bytes, deadline));
        self.socket.set_nonblocking(true).map_err(|e| reason_of(&e)).and(done)
    }

    /// Writes all of `bytes` to the socket in blocking mode, as long as the peer takes something in each stall time.
    fn write_whole(&self, mut bytes: &[u8], deadline: Option<Instant>) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            let mut written = (&self.socket).write(bytes);
            if written.as_ref().is_err_and(would_block) {
                // The kernel wakes a blocked writer only once a third of its buffer is free, so less may have been taken.
                self.socket.set_nonblocking(true).map_err(|e| reason_of(&e))?;
                written = (&self.socket).write(bytes);
                self.socket.set_nonblocking(false).map_err(|e| reason_of(&e))?;
            }
            match written {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Err("the peer took nothing in the stall time"),
                Err(error) => return Err(reason_of(&error)),
            }
            if !bytes.is_empty() && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err("the lifetime is over, in the middle of an event");
            }
        }
        Ok(())
    }

    /// The end of a stream that the server decides on. The peer reads why, and when to come back.
    fn end(&self, why: &'static str, retry: Duration) -> &'static str {
        let _ = self.write_waiting(format!(": {why}\nretry: {}\n\n", retry.as_millis()).as_bytes(), None);
        why
    }

    /// Takes the socket from the lane and wakes the thread, if the subscriber is live.
    fn take_back(&self) {
        let mut state = enter(&self.state);
        if state.phase == Phase::Live {
            state.phase = Phase::Behind;
            self.wake.notify_one();
        }
    }
}

/// One write that does not wait; 0 if the socket is full.
fn write_now(mut socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if would_block(&error) => return Ok(0),
            written => return written,
        }
    }
}

/// What a read or write says that would have to wait, or has waited for its timeout.
fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn reason_of(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
            "the peer reset the connection"
        }
        ErrorKind::TimedOut => "the peer stopped answering",
        _ => "the socket failed",
    }
}

/// A stream of topics, from the side of its connection's thread.
struct Subscription<'a> {
    core: &'a Core,
    c: &'a Connection,
    names: Arc<[Arc<str>]>,
    /// Of what was let go up to here the subscriber knows.
    told: Id,
    deadline: Instant,
    stopping: &'a AtomicBool,
}

impl Subscription<'_> {
    /// Replays, turns live, sleeps until the lane gives the socket back, and begins again, until the stream ends. Returns
    /// why it ended.
    fn follow(mut self, one_shot: bool) -> &'static str {
        let (core, c, config) = (self.core, self.c, &self.core.config);
        let mut run = Run::default();
        let mut answered = enter(&c.state).sent > 0;
        loop {
            if let Err(reason) = c.finish(self.deadline) {
                return reason;
            } else if self.stopping.load(SeqCst) {
                return c.end("the server is stopping", spread(config.retry, 50, 150));
            } else if Instant::now() >= self.deadline {
                match one_shot {
                    true => return c.end("the poll is over", POLL_RETRY),
                    false => return c.end("the lifetime is over", config.retry),
                }
            }
            let cursor = enter(&c.state).cursor;
            let kept = core.kept();
            match kept.next(&self.names, cursor, self.told, &mut run) {
                Next::Nothing if one_shot && answered => {
                    drop(kept);
                    return c.end("the poll is answered", POLL_RETRY);
                }
                Next::Nothing => {
                    let mut state = enter(&c.state);
                    state.phase = Phase::Live;
                    drop(kept);
                    run = Run::default(); // a live subscriber holds no buffer
                    if let Some(reason) = self.sleep(state) {
                        return reason;
                    }
                }
                Next::Gap(gap) => {
                    self.told = kept.let_go(&self.names);
                    drop(kept);
                    core.counters.gaps.fetch_add(1, Relaxed);
                    answered = true;
                    enter(&c.state).unfinished = Some(Unfinished { event: gap.encode(), offset: 0 });
                }
                Next::Events => {
                    drop(kept);
                    answered = true;
                    let mut state = enter(&c.state);
                    core.counters.delivered.fetch_add(c.deliver(&mut state, &run, Instant::now()), Relaxed);
                    run.clear();
                    if let Phase::Closed(reason) = state.phase {
                        return reason;
                    }
                }
            }
        }
    }

    /// Sleeps while the subscriber is live. Returns why the connection closed, if it did.
    fn sleep(&self, mut state: MutexGuard<'_, State>) -> Option<&'static str> {
        while state.phase == Phase::Live {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopping.load(SeqCst) {
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

/// A random part of `time`, between these percentages of it, so that what was sent away at once does not return at once.
fn spread(time: Duration, from: u64, to: u64) -> Duration {
    // The standard library's one source of chance: every `RandomState` has keys of its own.
    let percent = from + RandomState::new().hash_one(0) % (to - from + 1);
    Duration::from_millis((time.as_millis() as u64).saturating_mul(percent) / 100)
}

/// A handler's stream, on its connection's own thread: see [`Server::stream`].
pub struct Stream<'a> {
    c: &'a Connection,
    stopping: &'a AtomicBool,
    query: Vec<(String, String)>,
    last_event_id: Option<String>,
    stray: usize,
}

impl Stream<'_> {
    /// Writes one event at once.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an event that may not be; otherwise the stream is closed, and the error says why: return
    /// it from the handler.
    pub fn send(&mut self, event: &Event) -> io::Result<()> {
        event.check()?;
        let id = event.id.as_ref().map(|id| id as &dyn fmt::Display);
        self.write(event.encode(id).as_bytes(), 1)
    }

    /// Writes a comment, which pages do not see; each line of the text becomes one. As a heartbeat, an empty one.
    ///
    /// # Errors
    /// The stream is closed.
    pub fn comment(&mut self, text: &str) -> io::Result<()> {
        let lines: String = text.split(['\n', '\r']).map(|line| format!(":{line}\n")).collect();
        self.write(lines.as_bytes(), 0)
    }

    fn write(&mut self, bytes: &[u8], events: u64) -> io::Result<()> {
        let result = self.c.write_whole(bytes, None);
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
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.c.socket.set_read_timeout(Some(left))?;
            let closed = self.c.look(&mut self.stray);
            if self.stopping.load(SeqCst) {
                return Err(io::Error::other("the server is stopping"));
            } else if let Some(reason) = closed {
                return Err(io::Error::other(reason));
            }
        }
    }

    /// What the request's query says of `name`, percent-decoded.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
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
    socket: &'a TcpStream,
    buffer: Vec<u8>,
    start: usize,
    deadline: Option<Instant>,
}

impl Reader<'_> {
    fn unread(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// One read, until the deadline. `Ok(0)` at the end.
    fn fill(&mut self) -> io::Result<usize> {
        const CHUNK: usize = 4096;
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(left)?;
        self.buffer.drain(..self.start);
        self.start = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + CHUNK, 0);
        let read = loop {
            match self.socket.read(&mut self.buffer[old..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(old + read.as_ref().unwrap_or(&0));
        read
    }

    fn fill_body(&mut self) -> Result<(), Answer> {
        match self.fill() {
            Ok(0) => Err(Answer::refuse(400, "the connection ended before the body did")),
            Ok(_) => Ok(()),
            Err(error) if would_block(&error) => Err(Answer::refuse(408, "the body took too long")),
            Err(error) => Err(Answer::refuse(400, format!("the body could not be read: {error}"))),
        }
    }

    /// A line of the chunked coding, which ends with CRLF. It is left out of the result.
    fn chunk_line(&mut self) -> Result<String, Answer> {
        let mut seen = 0;
        loop {
            if let Some(lf) = self.unread()[seen..].iter().position(|b| *b == b'\n') {
                let line = &self.unread()[..seen + lf];
                let text = line.strip_suffix(b"\r").and_then(|line| str::from_utf8(line).ok()).map(String::from);
                self.start += seen + lf + 1;
                let text = text.filter(|text| !text.contains(|c: char| c.is_control() && c != '\t'));
                return text.ok_or_else(|| Answer::refuse(400, "a line of the chunked coding does not end with CRLF"));
            }
            seen = self.unread().len();
            if seen > CHUNK_LINE_BYTES {
                return Err(Answer::refuse(400, format!("a chunk's line is longer than {CHUNK_LINE_BYTES} bytes")));
            }
            self.fill_body()?;
        }
    }
}

/// How the rest of a body is told from what follows it ([RFC 9112 §6](https://www.rfc-editor.org/rfc/rfc9112#section-6)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Framing {
    Length(u64),
    ChunkSize,
    Chunk(u64),
    Trailer,
}

const NO_BODY: Framing = Framing::Length(0);

impl Framing {
    /// Appends what has come of the body to `out`, waiting until there is some. False at the body's end.
    fn read(&mut self, reader: &mut Reader, out: &mut Vec<u8>) -> Result<bool, Answer> {
        let mut trailers = 0;
        loop {
            match *self {
                NO_BODY => return Ok(false),
                Framing::Length(left) | Framing::Chunk(left) if left > 0 => {
                    if reader.unread().is_empty() {
                        reader.fill_body()?;
                    }
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(reader.unread().len());
                    out.extend_from_slice(&reader.unread()[..taken]);
                    reader.start += taken;
                    match self {
                        Framing::Length(left) | Framing::Chunk(left) => *left -= taken as u64,
                        _ => {}
                    }
                    return Ok(true);
                }
                Framing::ChunkSize => {
                    let line = reader.chunk_line()?;
                    *self = match chunk_size(&line) {
                        Some(0) => Framing::Trailer,
                        Some(size) => Framing::Chunk(size),
                        None => return Err(Answer::refuse(400, format!("{} is no chunk size", shown(&line)))),
                    };
                }
                Framing::Trailer => {
                    let line = reader.chunk_line()?;
                    trailers += 1;
                    if line.is_empty() {
                        *self = NO_BODY;
                    } else if trailers > HEADER_LINES || !line.contains(':') {
                        return Err(Answer::refuse(400, format!("{} is no trailer field", shown(&line))));
                    }
                }
                _ => match reader.chunk_line()?.is_empty() {
                    true => *self = Framing::ChunkSize,
                    false => return Err(Answer::refuse(400, "a chunk is longer than its size says")),
                },
            }
        }
    }
}

/// `1*HEXDIG [ BWS ";" extensions ]`; extensions are ignored.
fn chunk_size(line: &str) -> Option<u64> {
    let digits = line.split_once(';').map_or(line, |(digits, _)| digits.trim_end_matches([' ', '\t']));
    let is_number = !digits.is_empty() && digits.len() <= 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if is_number { u64::from_str_radix(digits, 16).ok() } else { None }
}

/// What this server wants to know of a request's head.
struct Request {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    body: Framing,
    close: bool,
    expects_continue: bool,
    last_event_id: Option<String>,
}

impl Request {
    /// Reads one head. `None` where the peer has nothing more to ask.
    fn read(reader: &mut Reader, config: &Config) -> Result<Option<Request>, Answer> {
        let mut seen = 0;
        let end = loop {
            // An empty line before a request is skipped (RFC 9112 §2.2).
            while seen == 0 && reader.unread().starts_with(b"\r\n") {
                reader.start += 2;
            }
            if let Some(end) = head_end(reader.unread(), &mut seen)? {
                break end;
            } else if reader.unread().len() > config.head_bytes {
                break usize::MAX;
            }
            if seen == 0 && reader.unread().is_empty() {
                match reader.fill() {
                    Ok(got) if got > 0 => reader.deadline = Some(Instant::now() + config.head_time),
                    _ => return Ok(None),
                }
            } else {
                match reader.fill() {
                    Ok(0) => return Ok(None),
                    Ok(_) => {}
                    Err(error) if would_block(&error) => {
                        let reason = format!("the request's head did not come whole within {:?}", config.head_time);
                        return Err(Answer::refuse(408, reason));
                    }
                    Err(_) => return Ok(None),
                }
            }
        };
        if end > config.head_bytes {
            let (status, what) = match reader.unread().contains(&b'\n') {
                true => (431, "head"),
                false => (414, "request line"),
            };
            let reason = format!("the {what} is longer than the {} bytes that a head may have", config.head_bytes);
            return Err(Answer::refuse(status, reason));
        }
        let request = Request::parse(&reader.unread()[..end])?;
        reader.start += end;
        Ok(Some(request))
    }

    fn parse(head: &[u8]) -> Result<Request, Answer> {
        let bad = |reason: &str| Answer::refuse(400, reason);
        let mut fields = vec![httparse::EMPTY_HEADER; HEADER_LINES];
        let mut parsed = httparse::Request::new(&mut fields);
        match parsed.parse(head) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(bad("the request's head is not whole")),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Answer::refuse(431, format!("more than {HEADER_LINES} header lines")));
            }
            Err(httparse::Error::Version) => return Err(Answer::refuse(505, "only HTTP/1.0 and HTTP/1.1 are spoken")),
            Err(error) => return Err(Answer::refuse(400, format!("the request's head cannot be read: {error}"))),
        }
        let http10 = parsed.version == Some(0);
        let (mut host, mut length, mut coding, mut last_event_id) = (None, None, None, None);
        let (mut close, mut expect) = (http10, None);
        for field in parsed.headers.iter() {
            let value = String::from_utf8_lossy(field.value);
            let slot = match field.name.to_ascii_lowercase().as_str() {
                "host" => &mut host,
                "content-length" => &mut length,
                "transfer-encoding" => &mut coding,
                "expect" => &mut expect,
                "last-event-id" => &mut last_event_id,
                "connection" => {
                    close |= value.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
                    continue;
                }
                _ => continue,
            };
            if slot.replace(value.trim().to_string()).is_some() {
                return Err(Answer::refuse(400, format!("the field {} stands twice", field.name)));
            }
        }
        if host.is_none() && !http10 {
            return Err(bad("the field Host is missing"));
        }
        let body = match (length, coding) {
            (None, None) => NO_BODY,
            (Some(_), Some(_)) => return Err(bad("Content-Length and Transfer-Encoding together say two things")),
            (Some(length), None) => match length.parse() {
                Ok(count) if length.bytes().all(|b| b.is_ascii_digit()) => Framing::Length(count),
                _ => return Err(Answer::refuse(400, format!("{} is no Content-Length", shown(&length)))),
            },
            (None, Some(_)) if http10 => return Err(bad("HTTP/1.0 has no Transfer-Encoding")),
            (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => Framing::ChunkSize,
            (None, Some(coding)) => {
                return Err(Answer::refuse(
                    501,
                    format!("the transfer coding {} is not known: use chunked", shown(&coding)),
                ));
            }
        };
        let expects_continue = match expect.filter(|_| !http10) {
            None => false,
            Some(what) if what.eq_ignore_ascii_case("100-continue") => true,
            Some(what) => {
                return Err(Answer::refuse(417, format!("{} is not expected: 100-continue is", shown(&what))));
            }
        };
        let method = parsed.method.unwrap_or_default().to_string();
        let (path, query) = parse_target(&method, parsed.path.unwrap_or_default())?;
        let last_event_id = last_event_id.filter(|id| !id.is_empty());
        Ok(Request { method, path, query, body, close, expects_continue, last_event_id })
    }

    fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Tells a client that waits for it to send its body.
    fn invite_body(&mut self, c: &Connection) -> Result<(), Answer> {
        if std::mem::take(&mut self.expects_continue) && self.body != NO_BODY {
            c.write_whole(b"HTTP/1.1 100 Continue\r\n\r\n", None).map_err(|why| Answer::refuse(400, why))?;
        }
        Ok(())
    }

    fn read_body(&mut self, c: &Connection, reader: &mut Reader, config: &Config) -> Result<Vec<u8>, Answer> {
        let too_large = || {
            let reason = format!("the body is longer than {} bytes: send less, or lines by PUT", config.body_bytes);
            Answer::refuse(413, reason)
        };
        if matches!(self.body, Framing::Length(length) if length > config.body_bytes as u64) {
            return Err(too_large());
        }
        self.invite_body(c)?;
        reader.deadline = Some(Instant::now() + config.body_time);
        let mut body = Vec::new();
        while self.body.read(reader, &mut body)? {
            if body.len() > config.body_bytes {
                return Err(too_large());
            }
        }
        Ok(body)
    }
}

/// Finds the empty line that ends a head, looking on from `seen`. A lone LF is refused: not everyone takes it for an end.
fn head_end(bytes: &[u8], seen: &mut usize) -> Result<Option<usize>, Answer> {
    while let Some(found) = bytes[*seen..].iter().position(|b| *b == b'\n') {
        let lf = *seen + found;
        *seen = lf + 1;
        if lf == 0 || bytes[lf - 1] != b'\r' {
            return Err(Answer::refuse(400, "a line of the head ends with LF alone: end it with CRLF"));
        } else if lf >= 3 && bytes[lf - 2] == b'\n' {
            return Ok(Some(lf + 1));
        }
    }
    *seen = bytes.len();
    Ok(None)
}

/// The path and the query of a request's target, percent-decoded once.
fn parse_target(method: &str, target: &str) -> Result<(String, Vec<(String, String)>), Answer> {
    let bad = || Answer::refuse(400, format!("{} is no target: it begins with a slash", shown(target)));
    let origin_form = match target.strip_prefix("http://").or_else(|| target.strip_prefix("https://")) {
        Some(absolute) => absolute.find(['/', '?']).map_or("/", |slash| &absolute[slash..]),
        None => target,
    };
    if target == "*" && method == "OPTIONS" {
        return Ok(("*".into(), Vec::new()));
    } else if !origin_form.starts_with(['/', '?']) || (target.starts_with('?')) || target.contains('#') {
        return Err(bad());
    }
    let (path, query) = origin_form.split_once('?').unwrap_or((origin_form, ""));
    let path = if path.is_empty() { "/" } else { path };
    let pair = |pair: &str| -> Result<(String, String), Answer> {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Ok((percent_decode(name)?, percent_decode(value)?))
    };
    let query = query.split('&').filter(|text| !text.is_empty()).map(pair).collect::<Result<_, _>>()?;
    Ok((percent_decode(path)?, query))
}

fn percent_decode(text: &str) -> Result<String, Answer> {
    let bad = || Answer::refuse(400, format!("{} is not percent-encoded UTF-8", shown(text)));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
                (digit()? * 16 + digit()?) as u8
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// An answer with a body of known length; refusals are such answers, too.
struct Answer {
    status: u16,
    content_type: Arc<str>,
    headers: String,
    body: Arc<[u8]>,
    /// What comes after this request on the connection cannot be told apart from it.
    close: bool,
}

impl Answer {
    fn new(status: u16, content_type: impl Into<Arc<str>>, body: impl Into<Arc<[u8]>>) -> Answer {
        Answer { status, content_type: content_type.into(), headers: String::new(), body: body.into(), close: false }
    }

    fn text(status: u16, line: impl fmt::Display) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{line}\n").into_bytes())
    }

    /// One line that says what was wrong and what would be right.
    fn refuse(status: u16, reason: impl fmt::Display) -> Answer {
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
        _ => "",
    };
    format!("HTTP/1.1 {status} {reason}\r\nDate: {}\r\n", Civil::now().http_date())
}

/// The head of every stream. It is ended by closing, never chunked; nginx holds such a stream back to its end unless told.
fn stream_head() -> String {
    status_line(200)
        + "Content-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\
           Connection: close\r\n\r\n"
}

/// A moment in UTC, as people write it.
struct Civil {
    year: u64,
    month: usize,
    day: u64,
    weekday: usize,
    second: u64, // of the day
}

impl Civil {
    /// Years are counted from March, so that the leap day comes last, in eras of 400 years (146,097 days).
    fn now() -> Civil {
        let seconds = now_ms() / 1000;
        let days = seconds / 86_400 + 719_468; // since 0000-03-01
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Civil {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as usize,
            day: of_year - (153 * march_month + 2) / 5 + 1,
            weekday: ((days + 3) % 7) as usize,
            second: seconds % 86_400,
        }
    }

    fn clock(&self) -> String {
        format!("{:02}:{:02}:{:02}", self.second / 3600, self.second / 60 % 60, self.second % 60)
    }

    /// As RFC 9110 §5.6.7 has it: `Sun, 06 Nov 1994 08:49:37 GMT`.
    fn http_date(&self) -> String {
        let weekday = &"SunMonTueWedThuFriSat"[self.weekday * 3..][..3];
        let month = &"JanFebMarAprMayJunJulAugSepOctNovDec"[(self.month - 1) * 3..][..3];
        format!("{weekday}, {:02} {month} {:04} {} GMT", self.day, self.year, self.clock())
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Routes: what each request gets. Never strand a browser: an `EventSource` gives up for good on any answer but 200, so a
// stream that there is no room for gets 200, a reconnection time, and its end. Only what will not mend by itself (a path
// that does not exist, a query that cannot be read) is refused for good.

enum Route {
    Page(Arc<str>, Arc<[u8]>),
    Stream(Arc<Handler>),
}

type Handler = dyn Fn(&mut Stream) -> io::Result<()> + Send + Sync;

enum Reply {
    Answer(Answer),
    Open(Opening),
}

/// A stream that a request has asked for. From here on the request and its buffers are not needed any more.
enum Opening {
    Topics { names: Vec<String>, from: Start, poll: Option<Duration> },
    Handler { handler: Arc<Handler>, query: Vec<(String, String)>, last_event_id: Option<String> },
}

impl Shared {
    fn reply(&self, c: &Connection, reader: &mut Reader, request: &mut Request) -> Result<Reply, Answer> {
        let path = std::mem::take(&mut request.path);
        let Some(allow) = self.methods_of(&path) else {
            let reason = format!("there is nothing at {}: topics are at /events/NAME", shown(&path));
            return Err(Answer::text(404, reason));
        };
        match request.method.as_str() {
            "OPTIONS" => return Err(Answer::text(204, "").header("Allow", allow)),
            "GET" | "HEAD" => {}
            method @ ("POST" | "PUT") if allow.contains(method) => {
                let topic = &path["/events/".len()..];
                return match method {
                    "POST" => self.publish(c, reader, request, topic),
                    _ => self.publish_lines(c, reader, request, topic),
                }
                .map(Reply::Answer);
            }
            method @ ("POST" | "PUT" | "DELETE" | "PATCH" | "CONNECT" | "TRACE") => {
                let reason = format!("{method} is not for {}: use one of {allow}", shown(&path));
                return Err(Answer::text(405, reason).header("Allow", allow));
            }
            method => return Err(Answer::text(501, format!("the method {} is not known", shown(method)))),
        }
        request.read_body(c, reader, self.config())?;
        if let Some(names) = path.strip_prefix("/events/") {
            return self.open_topics(request, names).map(Reply::Open);
        }
        let route = enter(&self.routes).get(&path).cloned();
        Ok(match route {
            Some(Route::Page(content_type, body)) => Reply::Answer(Answer::new(200, content_type, body)),
            Some(Route::Stream(handler)) => {
                let (query, last_event_id) = (std::mem::take(&mut request.query), request.last_event_id.take());
                Reply::Open(Opening::Handler { handler, query, last_event_id })
            }
            None if path == "/metrics" => {
                Reply::Answer(Answer::new(200, "text/plain; version=0.0.4", self.metrics().as_bytes()))
            }
            None if self.stopping() => return Err(self.unavailable("the server is stopping")),
            None => Reply::Answer(Answer::text(200, "ok")),
        })
    }

    /// The methods that a path takes, or none where there is nothing.
    fn methods_of(&self, path: &str) -> Option<&'static str> {
        match path {
            _ if path.starts_with("/events/") || path == "*" => Some("GET, HEAD, POST, PUT, OPTIONS"),
            "/health" | "/metrics" => Some("GET, HEAD, OPTIONS"),
            _ => enter(&self.routes).contains_key(path).then_some("GET, HEAD, OPTIONS"),
        }
    }

    fn publish(
        &self,
        c: &Connection,
        reader: &mut Reader,
        request: &mut Request,
        topic: &str,
    ) -> Result<Answer, Answer> {
        let mut event = self.described_event(request, topic, &["event", "retry", "key"])?;
        let body = request.read_body(c, reader, self.config())?;
        event.data = String::from_utf8(body).map_err(|error| {
            Answer::text(400, format!("the body is not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
        })?;
        self.hub.publish(topic, event).map(|id| Answer::text(200, id)).map_err(|error| self.publishing_failed(&error))
    }

    /// The event that a request describes beside its body. Whatever is wrong there is said before the body is read.
    fn described_event(&self, request: &Request, topic: &str, known: &[&str]) -> Result<Event, Answer> {
        if let Some((name, _)) = request.query.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            let reason = format!("the parameter {} is not known: {} are", shown(name), known.join(", "));
            return Err(Answer::text(400, reason));
        }
        let mut event = Event::new("");
        event.name = request.query("event").map(String::from);
        event.key = request.query("key").map(String::from);
        if let Some(retry) = request.query("retry") {
            let number = retry.parse::<u32>().ok().filter(|_| retry.bytes().all(|b| b.is_ascii_digit()));
            let reason = || Answer::text(400, format!("the retry {} is no number of milliseconds", shown(retry)));
            event.retry = Some(Duration::from_millis(number.ok_or_else(reason)?.into()));
        }
        let checked = check_topic(topic).and_then(|()| self.hub.core.check(&event));
        checked.map_err(|error| self.publishing_failed(&error)).map(|()| event)
    }

    fn publishing_failed(&self, error: &io::Error) -> Answer {
        match error.kind() {
            ErrorKind::InvalidInput => Answer::text(400, error),
            _ => self.unavailable(error),
        }
    }

    fn publish_lines(
        &self,
        c: &Connection,
        reader: &mut Reader,
        request: &mut Request,
        topic: &str,
    ) -> Result<Answer, Answer> {
        let event = self.described_event(request, topic, &["event", "retry"])?;
        request.invite_body(c)?;
        let (mut count, mut last) = (0, None);
        let mut publish = |line: &[u8]| {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let text =
                str::from_utf8(line).map_err(|_| Answer::refuse(400, format!("line {} is not UTF-8", count + 1)))?;
            let event = Event { data: text.into(), ..event.clone() };
            last = Some(self.hub.publish(topic, event).map_err(|error| self.publishing_failed(&error))?);
            count += 1;
            Ok(())
        };
        let result = self.each_line(reader, &mut request.body, &mut publish);
        let summary = match last {
            None => "0 events were published".into(),
            Some(id) => format!("{count} events were published, the last with id {id}"),
        };
        match result {
            Ok(()) => Ok(Answer::text(200, summary)),
            Err(refusal) => {
                let reason = String::from_utf8_lossy(&refusal.body).trim_end().to_string();
                Err(Answer { body: format!("{reason}; {summary}\n").into_bytes().into(), ..refusal })
            }
        }
    }

    /// Calls `publish` for every line of a body as soon as it is there. Silence between lines is fine; a line once begun
    /// must end in time.
    fn each_line(
        &self,
        reader: &mut Reader,
        body: &mut Framing,
        publish: &mut dyn FnMut(&[u8]) -> Result<(), Answer>,
    ) -> Result<(), Answer> {
        let config = self.config();
        let mut text = Vec::new();
        reader.deadline = None;
        loop {
            let more = body.read(reader, &mut text)?;
            let mut begin = 0;
            while let Some(length) = text[begin..].iter().position(|b| *b == b'\n') {
                self.check_line(length)?;
                publish(&text[begin..begin + length])?;
                begin += length + 1;
            }
            text.drain(..begin);
            self.check_line(text.len())?;
            if !more {
                return if text.is_empty() { Ok(()) } else { publish(&text) };
            } else if text.is_empty() {
                reader.deadline = None;
            } else if begin > 0 || reader.deadline.is_none() {
                reader.deadline = Some(Instant::now() + config.body_time);
            }
        }
    }

    fn check_line(&self, length: usize) -> Result<(), Answer> {
        match self.config().line_bytes {
            limit if length > limit => Err(Answer::refuse(413, format!("a line is longer than {limit} bytes"))),
            _ => Ok(()),
        }
    }

    fn open_topics(&self, request: &Request, list: &str) -> Result<Opening, Answer> {
        let refuse = |error: io::Error| Answer::text(400, error);
        let mut names: Vec<String> = Vec::new();
        for name in list.split(',') {
            check_topic(name).map_err(refuse)?;
            if !names.iter().any(|known| known == name) {
                names.push(name.into());
            }
        }
        if names.len() > TOPICS_PER_STREAM {
            let reason = format!("{} topics, where a stream takes up to {TOPICS_PER_STREAM}", names.len());
            return Err(Answer::text(400, reason));
        }
        let poll = match request.query("poll") {
            None => None,
            Some("") => Some(POLL),
            Some(time) => Some(parse_duration(time).map_err(refuse)?),
        };
        let since = match request.query("since") {
            None => Start::Now,
            Some("earliest") => Start::Earliest,
            Some(text) => match (parse_duration(text), text.parse()) {
                (Ok(time), _) => Start::Ago(time),
                (_, Ok(id)) => Start::Cursor(id),
                _ => {
                    return Err(Answer::text(
                        400,
                        format!("since is earliest, a time such as 10m, or an id; not {}", shown(text)),
                    ));
                }
            },
        };
        // A page opened anew says `since`; one that comes back says where it was, and that wins.
        let cursors = [request.last_event_id.as_deref(), request.query("last_event_id"), request.query("lastEventId")];
        let from = match cursors.into_iter().flatten().find(|cursor| !cursor.is_empty()) {
            Some(cursor) => cursor.parse().map_or(Start::Malformed, Start::Cursor),
            None => since,
        };
        Ok(Opening::Topics { names, from, poll })
    }

    /// Runs a stream to its end, and returns why it ended.
    fn stream(&self, c: &Arc<Connection>, opening: Opening) -> Cow<'static, str> {
        if self.stopping() {
            return self.send_away(c, "the server is stopping").into();
        } else if !self.move_to_streams(c.serial) {
            return self.send_away(c, "no room for another stream").into();
        }
        match opening {
            Opening::Topics { names, from, poll } => self.stream_topics(c, &names, from, poll).into(),
            Opening::Handler { handler, query, last_event_id } => {
                if let Err(reason) = c.write_whole(stream_head().as_bytes(), None) {
                    return reason.into();
                }
                let result = handler(&mut Stream { c, stopping: &self.stopping, query, last_event_id, stray: 0 });
                if self.stopping() && enter(&c.state).phase == Phase::Behind {
                    return c.end("the server is stopping", spread(self.config().retry, 50, 150)).into();
                }
                result.map_or_else(|error| error.to_string().into(), |()| "the handler returned".into())
            }
        }
    }

    fn stream_topics(
        &self,
        c: &Arc<Connection>,
        names: &[String],
        from: Start,
        poll: Option<Duration>,
    ) -> &'static str {
        let (core, config) = (&*self.hub.core, self.config());
        let mut kept = core.kept();
        let Ok(names) = kept.subscribe(names, config.topics) else {
            drop(kept);
            return self.send_away(c, "all topic names are in use");
        };
        let (cursor, gap) = kept.start(&names, from);
        let told = kept.let_go(&names);
        drop(kept);
        let deadline = Instant::now() + poll.unwrap_or_else(|| spread(config.lifetime, 80, 100));
        let subscription = Subscription { core, c, names, told, deadline, stopping: &self.stopping };

        // A block without data dispatches nothing, but a browser cut off before its first event resumes from this id.
        let retry = if poll.is_some() { POLL_RETRY } else { config.retry };
        let mut head = format!("{}retry: {}\nid: {cursor}\n\n", stream_head(), retry.as_millis()).into_bytes();
        if let Some(gap) = &gap {
            head.extend_from_slice(&gap.encode().bytes);
            core.counters.gaps.fetch_add(1, Relaxed);
        }
        let mut state = enter(&c.state);
        (state.cursor, state.sent, state.one_shot) = (cursor, gap.is_some().into(), poll.is_some());
        drop(state);
        if let Err(reason) = c.write_waiting(&head, None) {
            return reason;
        }
        drop(head);
        let _ = core.lane_of(c).send(ToLane::Join(c.clone(), subscription.names.clone()));
        subscription.follow(poll.is_some())
    }

    fn send_away(&self, c: &Connection, why: &'static str) -> &'static str {
        self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
        let _ = c.write_whole(stream_head().as_bytes(), None);
        c.end(why, spread(self.config().retry, 50, 150))
    }

    fn unavailable(&self, reason: impl fmt::Display) -> Answer {
        let seconds = self.config().retry.as_millis().div_ceil(1000);
        Answer::text(503, reason).header("Retry-After", seconds)
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        let _ = self.core.lane_of(self.c).send(ToLane::Leave(self.c.serial, self.names.clone()));
        self.core.kept().unsubscribe(&self.names);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Server: accept, refuse, stop. A connection is waiting (in its head, or idle between requests), busy, or a stream. When
// waiting and busy ones take all the places, the one that has waited longest makes room, so that a crowd of idle or slow
// ones cannot lock the others out. Streams have places of their own.

/// A server that is bound but does not serve yet: add pages and streams, then [`run`](Server::run) or
/// [`spawn`](Server::spawn) it.
pub struct Server {
    handle: Handle,
}

/// A running server. Dropping it stops everything: streams get a reconnection time and their end, and after a second at
/// most every thread is gone, but for handlers that do not return (they find their socket closed).
pub struct Handle {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    /// The listening socket as one that can be shut down, which wakes every acceptor. Made at the start, since stopping
    /// must work without a descriptor left.
    doorbell: TcpStream,
    acceptors: Vec<JoinHandle<()>>,
}

struct Shared {
    hub: Hub,
    routes: Mutex<HashMap<String, Route>>,
    guests: Mutex<Guests>,
    someone_left: Condvar,
    stopping: AtomicBool,
    lanes: Mutex<Vec<JoinHandle<()>>>,
    warned_at: AtomicU64,
}

#[derive(Default)]
struct Guests {
    next_serial: u64,
    threads: usize,
    waiting: BTreeMap<u64, Arc<Connection>>,
    busy: BTreeMap<u64, Arc<Connection>>,
    streams: BTreeMap<u64, Arc<Connection>>,
}

impl Clone for Route {
    fn clone(&self) -> Route {
        match self {
            Route::Page(content_type, body) => Route::Page(content_type.clone(), body.clone()),
            Route::Stream(handler) => Route::Stream(handler.clone()),
        }
    }
}

impl Server {
    /// Binds the address and starts the hub, so that publishing works from here on. Port 0 takes any free one.
    ///
    /// # Errors
    /// The address cannot be bound; it is beyond loopback and [`Config::open`] is not set
    /// ([`ErrorKind::PermissionDenied`]); or no thread can be started.
    pub fn bind(address: impl ToSocketAddrs, config: Config) -> io::Result<Server> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        if !config.open && !address.ip().is_loopback() {
            let reason =
                format!("{address} is beyond loopback, so whoever reaches it could publish: say so with --open");
            return Err(io::Error::new(ErrorKind::PermissionDenied, reason));
        }
        let config = fit_to_system(config.check()?);
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let lanes = if config.lanes == 0 { cores } else { config.lanes };
        let counters = Arc::new(Counters::default());
        let base = Id { ms: now_ms(), seq: 0 };
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        for n in 0..lanes {
            let (sender, queue) = crossbeam_channel::bounded(QUEUE_SLOTS);
            let (topics, everyone) = Default::default();
            let lane = Lane { topics, everyone, heartbeat: config.heartbeat, counters: counters.clone() };
            queues.push(sender);
            threads.push(thread::Builder::new().name(format!("lane {n}")).spawn(move || lane.run(&queue))?);
        }
        let (order, kept) = (Mutex::new(Order { newest: base, stopped: false }), Mutex::new(Kept::new(base)));
        let hub = Hub { core: Arc::new(Core { config, order, kept, lanes: queues, counters }) };
        let (routes, guests, someone_left, stopping, warned_at) = Default::default();
        let shared =
            Arc::new(Shared { hub, routes, guests, someone_left, stopping, lanes: Mutex::new(threads), warned_at });
        let doorbell = TcpStream::from(std::os::fd::OwnedFd::from(listener.try_clone()?));
        Ok(Server { handle: Handle { shared, listener: Arc::new(listener), doorbell, acceptors: Vec::new() } })
    }

    /// Answers `GET path` with these bytes: a page, a script, a small answer of one's own.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not begin with a slash, or that is the server's own.
    pub fn page(&self, path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> io::Result<()> {
        self.route(path, Route::Page(content_type.into(), body.into().into()))
    }

    /// Answers `GET path` with a stream that `handler` writes, on the connection's own thread, until it returns or the
    /// socket closes. The head goes out before the handler is called.
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
        enter(&self.handle.shared.routes).insert(path.into(), route);
        Ok(())
    }

    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        self.handle.hub()
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// What the system says when asked for it.
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.handle.addr()
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
            let acceptor = thread::Builder::new().name(format!("accept {n}"));
            self.handle.acceptors.push(acceptor.spawn(move || shared.accept_all(&listener))?);
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
        if shared.stopping.swap(true, SeqCst) {
            return 0;
        }
        enter(&shared.hub.core.order).stopped = true;
        if self.doorbell.shutdown(Shutdown::Both).is_err() {
            // Not every system lets a listening socket be shut down; a connection wakes an acceptor, too.
            let _ = self.addr().map(|address| self.acceptors.iter().for_each(|_| drop(TcpStream::connect(address))));
        }
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        let left = shared.say_goodbye();
        for lane in &shared.hub.core.lanes {
            let _ = lane.send(ToLane::Stop);
        }
        for lane in enter(&shared.lanes).drain(..) {
            let _ = lane.join();
        }
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
        self.stopping.load(SeqCst)
    }

    fn accept_all(self: &Arc<Shared>, listener: &TcpListener) {
        while !self.stopping() {
            match listener.accept() {
                Ok((socket, peer)) => self.admit(socket, peer),
                Err(_) if self.stopping() => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // Without descriptors this repeats until one is given back, so it must not spin.
                    self.warn(format_args!("accepting failed: {error}"));
                    enter(&self.guests).close_longest_waiting();
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    /// Gives a connection its thread, or closes it where there is no room.
    fn admit(self: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
        let config = self.config();
        let mut guests = enter(&self.guests);
        let full = guests.waiting.len() + guests.busy.len() >= config.connections;
        let room =
            (!full || guests.close_longest_waiting()) && guests.threads < config.connections + config.subscribers;
        if self.stopping() || !room {
            drop(guests);
            self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
            return self.warn(format_args!("no room for {peer}: all {} connections are in use", config.connections));
        }
        let serial = guests.next_serial;
        let c = Arc::new(Connection::new(serial, peer, socket));
        guests.next_serial += 1;
        guests.threads += 1;
        guests.waiting.insert(serial, c.clone());
        drop(guests);
        let guest = Guest { shared: self.clone(), c, path: None, reason: "".into(), opened: Instant::now() };
        let thread = thread::Builder::new().name(format!("conn {serial}")).stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(move || guest.converse()) {
            self.warn(format_args!("no thread for {peer}: {error}")); // its `Guest` was dropped, and has left
        }
    }

    /// A request has come whole: the connection is busy from here on, unless it had to make room just now.
    fn begin_request(&self, serial: u64) -> bool {
        let mut guests = enter(&self.guests);
        let c = guests.waiting.remove(&serial);
        let present = c.is_some();
        guests.busy.extend(c.map(|c| (serial, c)));
        present
    }

    fn end_request(&self, serial: u64) {
        let mut guests = enter(&self.guests);
        let c = guests.busy.remove(&serial);
        guests.waiting.extend(c.map(|c| (serial, c)));
    }

    fn move_to_streams(&self, serial: u64) -> bool {
        let mut guests = enter(&self.guests);
        let room = guests.streams.len() < self.config().subscribers;
        let c = if room { guests.busy.remove(&serial) } else { None };
        guests.streams.extend(c.map(|c| (serial, c)));
        room
    }

    /// Ends every connection: streams with their reconnection time, publishers with their answer. Returns how many did not
    /// end in time.
    fn say_goodbye(&self) -> usize {
        let started = Instant::now();
        let everyone = enter(&self.guests).everyone();
        for c in &everyone {
            c.take_back();
            let _ = c.socket.shutdown(Shutdown::Read); // wakes who waits for a request, a body or a handler's timer
        }
        self.wait_until_empty(started + STOP_GRACE);
        for c in enter(&self.guests).everyone() {
            let _ = c.socket.shutdown(Shutdown::Both); // wakes who waits for a slow peer
        }
        let left = self.wait_until_empty(started + STOP_TIME);
        if left > 0 {
            let peers: Vec<String> =
                enter(&self.guests).everyone().iter().take(10).map(|c| c.peer.to_string()).collect();
            self.log(Log::Info, format_args!("{left} connections did not end: {}", peers.join(" ")));
        }
        left
    }

    fn wait_until_empty(&self, deadline: Instant) -> usize {
        let mut guests = enter(&self.guests);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if guests.threads == 0 || left.is_zero() {
                return guests.threads;
            }
            guests = self.someone_left.wait_timeout(guests, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Guests {
    fn close_longest_waiting(&mut self) -> bool {
        let longest = self.waiting.pop_first();
        longest.inspect(|(_, c)| drop(c.socket.shutdown(Shutdown::Both))).is_some()
    }

    fn everyone(&self) -> Vec<Arc<Connection>> {
        [&self.waiting, &self.busy, &self.streams].into_iter().flat_map(BTreeMap::values).cloned().collect()
    }
}

/// A connection on its thread. Dropping it, also by a panic, takes it from the list and closes the socket.
struct Guest {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    path: Option<String>, // once it is a stream
    reason: Cow<'static, str>,
    opened: Instant,
}

impl Guest {
    fn converse(mut self) {
        let config = self.shared.config();
        let prepared = self.c.socket.set_nonblocking(false).and(self.c.socket.set_nodelay(true));
        if prepared.and(self.c.socket.set_write_timeout(Some(config.stall_time))).is_err() {
            return; // it has gone already
        }
        if let Some((path, opening)) = self.shared.requests(&self.c) {
            self.path = Some(path);
            self.reason = "the handler panicked".into(); // unless it gets past the next line
            self.reason = self.shared.stream(&self.c, opening);
        }
    }
}

impl Shared {
    /// Answers requests until the connection ends, or asks for a stream.
    fn requests(&self, c: &Connection) -> Option<(String, Opening)> {
        let config = self.config();
        let deadline = Some(Instant::now() + config.head_time);
        let mut reader = Reader { socket: &c.socket, buffer: Vec::new(), start: 0, deadline };
        loop {
            let (answer, head_only, close) = match Request::read(&mut reader, config) {
                Ok(None) => return None,
                Err(refusal) => (refusal, false, true),
                Ok(Some(mut request)) => {
                    if !self.begin_request(c.serial) {
                        return None;
                    }
                    let path = request.path.clone();
                    let answer = match self.reply(c, &mut reader, &mut request) {
                        Ok(Reply::Open(_)) if request.is_head() => {
                            let _ = c.write_whole(stream_head().as_bytes(), None);
                            return None;
                        }
                        Ok(Reply::Open(opening)) => return Some((path, opening)),
                        Ok(Reply::Answer(answer)) | Err(answer) => answer,
                    };
                    self.log(Log::Debug, format_args!("{} {} {path:?} {}", c.peer, request.method, answer.status));
                    let close = request.close || answer.close || request.body != NO_BODY || self.stopping();
                    (answer, request.is_head(), close)
                }
            };
            if c.write_whole(&answer.encode(head_only, close), None).is_err() {
                return None;
            } else if close {
                linger(&mut reader);
                return None;
            }
            reader.deadline = Some(Instant::now() + config.idle_time);
            self.end_request(c.serial);
        }
    }
}

/// Reads on for a while after the last answer, so that it arrives before the reset that closing would cause.
fn linger(reader: &mut Reader) {
    let _ = reader.socket.shutdown(Shutdown::Write);
    reader.deadline = Some(Instant::now() + LINGER);
    while reader.fill().is_ok_and(|got| got > 0) {
        reader.start = reader.buffer.len();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let (c, shared) = (&self.c, &self.shared);
        let _ = c.socket.shutdown(Shutdown::Write); // its lane may hold the socket for a moment longer
        if let Some(path) = &self.path {
            let (seconds, sent) = (self.opened.elapsed().as_secs_f64(), enter(&c.state).sent);
            let (peer, reason) = (c.peer, &self.reason);
            let line =
                format_args!("closed peer={peer} path={path:?} reason={reason:?} seconds={seconds:.1} events={sent}");
            shared.log(Log::Info, line);
        }
        let mut guests = enter(&shared.guests);
        let serial = c.serial;
        let _ = guests.streams.remove(&serial).or(guests.busy.remove(&serial)).or(guests.waiting.remove(&serial));
        guests.threads -= 1;
        shared.someone_left.notify_all();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Counters, the log, and what the system allows.

#[derive(Default)]
struct Counters {
    published: AtomicU64,
    delivered: AtomicU64,
    woken: AtomicU64,
    gaps: AtomicU64,
    sent_away: AtomicU64,
}

impl Shared {
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>
    fn metrics(&self) -> String {
        let (core, counters) = (&*self.hub.core, &*self.hub.core.counters);
        let guests = enter(&self.guests);
        let (streams, connections) = (guests.streams.len(), guests.waiting.len() + guests.busy.len());
        drop(guests);
        let kept = core.kept();
        let (topics, events, bytes) = (kept.topics.len(), kept.count, kept.bytes);
        drop(kept);
        let total = |counter: &AtomicU64| counter.load(Relaxed);
        let mut text = String::new();
        for (name, kind, value, help) in [
            ("subscribers", "gauge", streams as u64, "Streams that are open."),
            ("connections", "gauge", connections as u64, "Connections beside the streams."),
            ("topics", "gauge", topics as u64, "Topic names in use."),
            ("kept_events", "gauge", events as u64, "Events kept for replaying."),
            ("kept_bytes", "gauge", bytes as u64, "Bytes kept for replaying, with bookkeeping."),
            ("published_total", "counter", total(&counters.published), "Events published."),
            ("delivered_total", "counter", total(&counters.delivered), "Events written to subscribers."),
            ("woken_total", "counter", total(&counters.woken), "Times a live subscriber's thread was woken."),
            ("gaps_total", "counter", total(&counters.gaps), "Gaps that subscribers were told of."),
            ("sent_away_total", "counter", total(&counters.sent_away), "Connections and streams without room."),
        ] {
            let _ =
                write!(text, "# HELP brooklet_{name} {help}\n# TYPE brooklet_{name} {kind}\nbrooklet_{name} {value}\n");
        }
        text
    }

    fn log(&self, level: Log, line: fmt::Arguments) {
        write_log(self.config().log, level, line);
    }

    /// For what repeats as fast as a flood: one line a second at most.
    fn warn(&self, line: fmt::Arguments) {
        let now = now_ms() / 1000;
        if self.warned_at.swap(now, Relaxed) != now {
            self.log(Log::Info, line);
        }
    }
}

fn write_log(wanted: Log, level: Log, line: fmt::Arguments) {
    if level <= wanted {
        let now = Civil::now();
        let _ = writeln!(io::stderr(), "{:04}-{:02}-{:02}T{}Z {line}", now.year, now.month, now.day, now.clock());
    }
}

/// Lowers the limits on connections to what the system gives this process: a thread that cannot map its stack's guard
/// aborts the process from inside its start-up, where no error can be caught, so it must not come to that.
fn fit_to_system(mut config: Config) -> Config {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default(); // elsewhere than on Linux: no lowering
    let entries = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
    let limits = read("/proc/self/limits");
    let descriptors =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    let descriptors = descriptors.unwrap_or(usize::MAX).saturating_sub(entries("/proc/self/fd") + 16);
    let mappings = read("/proc/sys/vm/max_map_count").trim().parse().unwrap_or(usize::MAX);
    let threads = mappings.saturating_sub(read("/proc/self/maps").lines().count() + 1024) / 4;
    let room = descriptors.min(threads).max(2);
    if config.subscribers.saturating_add(config.connections) > room {
        config.connections = config.connections.min(room / 8 + 1);
        config.subscribers = config.subscribers.min(room - config.connections);
        let (subscribers, connections) = (config.subscribers, config.connections);
        let what = if descriptors < threads { "open files (ulimit -n)" } else { "memory mappings (vm.max_map_count)" };
        let line =
            format_args!("room for {subscribers} streams and {connections} connections only: the limit is on {what}");
        write_log(config.log, Log::Info, line);
    }
    config
}
