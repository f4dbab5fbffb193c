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
//! | `Core::order` | from numbering an event to the last lane's queue | that ids, kept events and queues have one order |
//! | `Core::kept` | shortly, never during I/O | the kept events and the table of topics |
//! | `Connection::state` | during one non-blocking write | whose the socket is, and the cursor |
//! | `Shared::guests`, `Shared::routes` | shortly, under no other lock | which connections are open; what is at a path |
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
/// How often a lane looks at its subscribers, so that who closes is noticed within two seconds. A look costs about
/// 0.7 µs: at 10,000 subscribers that is half a percent of a core.
const SWEEP: Duration = Duration::from_millis(1_750);
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
const STRAY_BYTES: usize = 4 * 1024;
/// Address space of a connection's thread; only pages that are touched take memory. Handlers run on it.
const STACK_BYTES: usize = 128 * 1024;
/// Threads that only accept and hand over: `std` listens with a backlog of 128, and a herd must not outrun it.
const ACCEPTORS: usize = 2;
/// Threads that may be ending beside those in their places; what the system allows has room for them.
const ENDING_THREADS: usize = 128;
const TOPIC_NAME_BYTES: usize = 64;
const TOPICS_PER_STREAM: usize = 16;
const KEY_BYTES: usize = 128;
const EVENT_NAME_BYTES: usize = 256;
const HEADER_LINES: usize = 100;
const CHUNK_LINE_BYTES: usize = 256;
/// How long `?poll` waits for its first event, and how soon the next poll comes.
const POLL: Duration = Duration::from_secs(25);
const POLL_IS_OVER: Reason = "the poll is over";
const POLL_RETRY: Duration = Duration::from_millis(100);
/// After a refusal the rest of a request is read for this long, or the reset would overtake the answer
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
const LINGER: Duration = Duration::from_secs(1);
/// Stopping: streams have this long to take their end; then sockets are cut, and threads have until the second to go.
const STOP_GRACE: Duration = Duration::from_millis(700);
const STOP_TIME: Duration = Duration::from_millis(950);
/// What a kept event costs beside its bytes: its place in the queue, its counted pointer, its part of the indexes.
const EVENT_OVERHEAD: usize = 128;
const MOST_LANES: usize = 256;
/// Ten years: no time is longer, so that none overflows a clock.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

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
    /// Places for connections that streams cannot take (1,000), so that publishing and health have room when streams are full.
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
    /// Longest silence on a stream of topics (15 s, at least 3.5 s): proxies cut silent streams, many after 60 s, some after 30.
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes>
    pub heartbeat: Duration,
    /// Of a topic's stream (10 min), each drawn from 80 to 100 % of it: ghosts behind a proxy cannot stay.
    pub lifetime: Duration,
    /// In which a subscriber that is behind must take something (10 s; what its system had buffered may double it).
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
    fn check(&self) -> io::Result<()> {
        let Config { head_time, body_time, idle_time, heartbeat, lifetime, stall_time, retry, .. } = *self;
        let times = [head_time, body_time, idle_time, heartbeat, lifetime, stall_time];
        if times.iter().any(|time| time.as_millis() == 0) {
            return invalid("a time limit of 0 leaves no time for anything: give at least 1ms".into());
        } else if times.iter().chain([&retry]).any(|time| *time > LONGEST) {
            return invalid("a time limit of more than ten years is none: give at most 87600h".into());
        } else if heartbeat < 2 * SWEEP {
            return invalid(format!(
                "silence is looked for every {SWEEP:?}: give a heartbeat of at least {:?}",
                2 * SWEEP
            ));
        } else if self.connections == 0 {
            return invalid("without any connections nobody could ask for a stream: give at least 1".into());
        } else if self.lanes > MOST_LANES {
            return invalid(format!(
                "{} lanes are more than any machine has cores: give at most {MOST_LANES}",
                self.lanes
            ));
        }
        Ok(())
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
        Some(ms) if unit_ms > 0 && ms <= LONGEST.as_millis() as u64 => Ok(Duration::from_millis(ms)),
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

    /// Makes publishing repeatable: a second event of the same topic with this key (1 to 128 bytes without CR, LF or NUL) is not published, and
    /// gets the first one's id, for as long as the first is kept.
    pub fn key(mut self, key: impl Into<String>) -> Event {
        self.key = Some(key.into());
        self
    }

    fn check(&self) -> io::Result<()> {
        if let Some(name) = self.name.as_deref().filter(|name| name.len() > EVENT_NAME_BYTES) {
            return invalid(format!(
                "an event name of {} bytes, where at most {EVENT_NAME_BYTES} are taken",
                name.len()
            ));
        }
        for (field, text) in [("event name", &self.name), ("id", &self.id), ("key", &self.key)] {
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
    name: Arc<str>,
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
    Events(Run),
    Nothing,
}

impl Kept {
    fn new(base: Id) -> Kept {
        Kept { topics: HashMap::new(), oldest: BTreeMap::new(), bytes: 0, newest: base, forgotten: base }
    }

    /// The topic's place in the table. The caller uses it at once, by an event or a subscriber: an unused one would stay.
    fn topic(&mut self, name: &str, limit: usize) -> io::Result<&mut Topic> {
        if self.topics.len() >= limit && !self.topics.contains_key(name) {
            let reason = format!("all {limit} topic names are in use: use one of them, or try again later");
            return Err(io::Error::new(ErrorKind::QuotaExceeded, reason));
        }
        let name: Arc<str> = name.into();
        let (events, keys) = (VecDeque::new(), HashMap::new());
        let new = Topic { name: name.clone(), events, keys, let_go: self.forgotten, subscribers: 0 };
        Ok(self.topics.entry(name).or_insert(new))
    }

    /// Keeps an event. Returns its topic's name if anyone follows it: only then need a lane know of the event, since whoever
    /// follows the topic later finds it kept.
    fn insert(
        &mut self,
        name: &str,
        event: Encoded,
        key: Option<Arc<str>>,
        config: &Config,
    ) -> io::Result<Option<Arc<str>>> {
        let topic = self.topic(name, config.topics)?;
        let (id, first, cost) = (event.id, topic.events.is_empty(), cost(&event, &key));
        topic.keys.extend(key.clone().map(|key| (key, id)));
        topic.events.push_back((event, key));
        let over = topic.events.len() > config.keep_events;
        let (name, followed) = (topic.name.clone(), topic.subscribers > 0);
        self.bytes += cost;
        self.newest = id;
        if first {
            self.oldest.insert(id, name.clone());
        }
        if over {
            self.let_go_oldest_of(&name);
        }
        while self.bytes > config.keep_bytes {
            let Some(name) = self.oldest.values().next().cloned() else { break };
            self.let_go_oldest_of(&name);
        }
        Ok(Some(name).filter(|_| followed))
    }

    fn let_go_oldest_of(&mut self, name: &Arc<str>) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        let Some((event, key)) = topic.events.pop_front() else { return };
        self.oldest.remove(&event.id);
        self.bytes -= cost(&event, &key);
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
                Ok(topic) => {
                    topic.subscribers += 1;
                    taken.push(topic.name.clone());
                }
                Err(full) => {
                    self.unsubscribe(&taken);
                    return Err(full);
                }
            }
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

    fn told(&self, names: &[Arc<str>]) -> Vec<Id> {
        self.topics(names).map(|topic| topic.let_go).collect()
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
        let (asked, cursor) = match from {
            Start::Now => return (self.newest, None),
            Start::Earliest => return (self.oldest_after(names, Id::default()).map_or(self.newest, Id::before), None),
            Start::Ago(time) => {
                let cursor = self.ago(time).min(self.newest);
                (Some(cursor), cursor)
            }
            // From the future: an id of an earlier life of this server. All that is kept is new to it.
            Start::Cursor(cursor) if cursor > self.newest => (Some(cursor), Id::default()),
            Start::Cursor(cursor) => (Some(cursor), cursor),
            Start::Malformed => (None, Id::default()),
        };
        if asked == Some(cursor) && cursor >= self.let_go(names) {
            return (cursor, None);
        }
        let gap = self.gap(names, asked, cursor);
        (gap.id, Some(gap))
    }

    /// What comes after `cursor` in all of these topics, in one order, up to one batch. The subscriber knows of what each
    /// topic has let go up to `told`: one number for all would hide what one topic lets go behind another's back.
    fn next(&self, names: &[Arc<str>], cursor: Id, told: &[Id]) -> Next {
        if self.topics(names).zip(told).any(|(topic, told)| topic.let_go > cursor.max(*told)) {
            return Next::Gap(self.gap(names, Some(cursor), cursor));
        }
        let mut run = Run::default();
        let mut heads: Vec<_> = self.topics(names).map(|topic| topic.after(cursor).peekable()).collect();
        loop {
            let ahead = heads.iter_mut().filter_map(|head| head.peek().map(|event| event.id).zip(Some(head)));
            let Some((_, head)) = ahead.min_by_key(|(id, _)| *id) else { break };
            match head.next() {
                Some(event) if run.has_room_for(event) => run.push(event),
                _ => break,
            }
        }
        if run.bytes.is_empty() { Next::Nothing } else { Next::Events(run) }
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
    /// let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let hub = server.hub();
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
        let mut order = enter(&core.order); // held to the end
        if order.stopped {
            return Err(io::Error::new(ErrorKind::NotConnected, "the server is stopping"));
        }
        let of_key = |key: &Arc<str>| core.kept().topics.get(topic).and_then(|topic| topic.keys.get(key).copied());
        if let Some(first) = key.as_ref().and_then(of_key) {
            return Ok(first);
        }
        let id = order.newest.next(now_ms());
        let event = Encoded { id, bytes: event.encode(Some(&id)).into_bytes().into() };
        let followed = core.kept().insert(topic, event.clone(), key, &core.config)?;
        order.newest = id;
        core.counters.published.fetch_add(1, Relaxed);
        let Some(name) = followed else { return Ok(id) };
        for lane in &core.lanes {
            let _ = lane.send(ToLane::Event(name.clone(), event.clone()));
            for _ in 0..event.bytes.len() / 1024 {
                let _ = lane.send(ToLane::Weight);
            }
        }
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
                // Nor may a flood keep the lane from its sweep.
                let go_on = run.bytes.len() < BATCH_BYTES && Instant::now() < sweep_at;
                next = if go_on { queue.try_recv().ok() } else { None };
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
            } else if state.is_poll {
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
            if now.duration_since(state.wrote) + SWEEP > self.heartbeat {
                c.beat(&mut state, now); // a write looks at the socket, too
            } else if let Some(reason) = c.look(&mut state.stray) {
                state.phase = Phase::Closed(reason);
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

/// Why something about a connection ended, for the log and for a handler.
type Reason = &'static str;

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
    is_poll: bool,
    wrote: Instant,
    sent: u64,
    stray: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The socket is the thread's: also before there is a stream, and for handlers' streams.
    Behind,
    /// The socket is the lane's.
    Live,
    Closed(Reason),
}

/// An event that did not fit into the socket. It must be finished before anything else is written.
struct Unfinished {
    event: Encoded,
    offset: usize,
}

impl State {
    /// For the thread to finish, since the subscriber is behind from here on.
    fn leave_unfinished(&mut self, event: Encoded, offset: usize) {
        self.phase = Phase::Behind;
        self.unfinished = Some(Unfinished { event, offset });
    }
}

impl Connection {
    fn new(serial: u64, peer: SocketAddr, socket: TcpStream) -> Connection {
        let (phase, cursor, wrote) = (Phase::Behind, Id::default(), Instant::now());
        let state = State { phase, cursor, unfinished: None, is_poll: false, wrote, sent: 0, stray: 0 };
        Connection { serial, peer, socket, state: Mutex::new(state), wake: Condvar::new() }
    }

    /// One non-blocking write of what in `run` is newer than the cursor. Returns how many events went out whole; where not
    /// all did, the subscriber is behind, and the first of the others unfinished.
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
        if let Some((event, _)) = run.events.get(whole) {
            state.leave_unfinished(event.clone(), reached - run.end_of(whole));
        }
        (whole - first) as u64
    }

    fn beat(&self, state: &mut State, now: Instant) {
        state.wrote = now;
        match write_now(&self.socket, HEARTBEAT) {
            Ok(written) if written == HEARTBEAT.len() => {}
            Ok(offset) => state.leave_unfinished(Encoded { id: state.cursor, bytes: HEARTBEAT.into() }, offset),
            Err(error) => state.phase = Phase::Closed(reason_of(&error)),
        }
    }

    /// One read, which says why the connection is closed, if it is. A subscriber has nothing to say, so stray bytes are
    /// thrown away.
    fn look(&self, stray: &mut usize) -> Option<Reason> {
        match (&self.socket).read(&mut [0; 1024]) {
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
    fn finish(&self, deadline: Instant) -> Result<(), Reason> {
        let Some(Unfinished { event, offset }) = enter(&self.state).unfinished.take() else { return Ok(()) };
        self.write_waiting(&event.bytes[offset..], deadline)?;
        let mut state = enter(&self.state);
        if event.id > state.cursor {
            state.cursor = event.id;
            state.sent += 1;
        }
        state.wrote = Instant::now();
        Ok(())
    }

    /// Writes all of `bytes`, waiting for the peer, and leaves the socket in non-blocking mode, as lanes need it.
    fn write_waiting(&self, bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        self.socket.set_nonblocking(false).map_err(|error| reason_of(&error))?;
        self.write_whole(bytes, deadline)?;
        self.socket.set_nonblocking(true).map_err(|error| reason_of(&error))
    }

    /// Writes all of `bytes` to a socket in blocking mode, as long as the peer takes something in each stall time.
    fn write_whole(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let mut written = (&self.socket).write(bytes);
            if written.as_ref().is_err_and(would_block) {
                // The kernel wakes a blocked writer only once a third of its buffer is free, so less may have been taken.
                let set_nonblocking = |mode| self.socket.set_nonblocking(mode).map_err(|error| reason_of(&error));
                set_nonblocking(true)?;
                written = (&self.socket).write(bytes);
                set_nonblocking(false)?;
            }
            match written {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Err("the peer took nothing in the stall time"),
                Err(error) => return Err(reason_of(&error)),
            }
            if !bytes.is_empty() && Instant::now() >= deadline {
                return Err("the time is over, in the middle of a write");
            }
        }
        Ok(())
    }

    /// The end of a stream that the server decides on. The peer reads why, and when to come back.
    fn end(&self, why: Reason, retry: Duration) -> Reason {
        let bytes = format!(": {why}\nretry: {}\n\n", retry.as_millis());
        let _ = self.write_waiting(bytes.as_bytes(), Instant::now() + LINGER);
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

fn reason_of(error: &io::Error) -> Reason {
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
    lane: &'a Sender<ToLane>,
    names: Arc<[Arc<str>]>,
    /// What each topic had let go when the subscriber was last told of a gap.
    told: Vec<Id>,
    /// For a poll, how long it waits for its first event.
    poll_until: Option<Instant>,
    deadline: Instant,
    stopping: &'a AtomicBool,
}

impl Subscription<'_> {
    /// Replays, turns live, sleeps until the lane gives the socket back, and begins again, until the stream ends. Returns
    /// why it ended.
    fn follow(mut self) -> Reason {
        let (core, c, retry) = (self.core, self.c, self.core.config.retry);
        loop {
            if let Err(reason) = c.finish(self.deadline) {
                return reason;
            } else if self.stopping.load(SeqCst) {
                return c.end("the server is stopping", spread(retry, 50, 150));
            } else if Instant::now() >= self.deadline {
                return c.end("the lifetime is over", retry);
            }
            let state = enter(&c.state);
            let (cursor, sent) = (state.cursor, state.sent);
            drop(state);
            let kept = core.kept();
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
                    enter(&c.state).leave_unfinished(gap.encode(), 0);
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

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        let _ = self.lane.send(ToLane::Leave(self.c.serial, self.names.clone()));
        self.core.kept().unsubscribe(&self.names);
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
    query: Query,
    last_event_id: Option<String>,
    stray: usize,
}

impl Stream<'_> {
    /// Writes one event at once.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an event that may not be; otherwise the stream is closed or the server is stopping, and
    /// the error says so: return it from the handler.
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
            _ if self.stopping.load(SeqCst) => Err(io::Error::other("the server is stopping")),
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
    start: usize,
    deadline: Option<Instant>,
    /// What the socket was last told.
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
            return Err(ErrorKind::TimedOut.into());
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
            if let Some(lf) = self.unread()[seen..].iter().position(|b| *b == b'\n') {
                let line = self.unread()[..seen + lf].strip_suffix(b"\r").and_then(|line| str::from_utf8(line).ok());
                let line = line.filter(|line| !line.contains(|c: char| c.is_control() && c != '\t')).map(String::from);
                self.start += seen + lf + 1;
                return line.map_or_else(|| refuse(400, "a line of the chunked coding does not end with CRLF"), Ok);
            }
            seen = self.unread().len();
            if seen > CHUNK_LINE_BYTES {
                return refuse(400, format!("a chunk's line is longer than {CHUNK_LINE_BYTES} bytes"));
            }
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
    fn of_length(left: u64) -> Body {
        Body { left, chunked: false, in_chunks: false }
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
            if self.chunked && (trailers > HEADER_LINES || !line.contains(':')) {
                return refuse(400, format!("{} is no trailer field", shown(&line)));
            }
        }
        Ok(())
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
    query: Query,
    body: Body,
    close: bool,
    expects_continue: bool,
    last_event_id: Option<String>,
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
                    return refuse(408, format!("the request's head did not come whole within {:?}", config.head_time));
                }
                _ => return Ok(None),
            }
        }
    }

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
        let (mut host, mut length, mut coding, mut expect) = (None, None, None, None);
        let (mut close, mut last_event_id) = (http10, None);
        for field in parsed.headers.iter() {
            // Optional white space is space and tab (RFC 9110 §5.6.3); `trim` alone would take more.
            let value = || String::from_utf8_lossy(field.value).trim_matches([' ', '\t']).to_string();
            let known = match field.name.to_ascii_lowercase().as_str() {
                "host" => &mut host,
                "content-length" => &mut length,
                "transfer-encoding" => &mut coding,
                "expect" => &mut expect,
                "last-event-id" => {
                    // Twice, it is no cursor of ours, and gets a gap: a refusal would strand the browser.
                    last_event_id = Some(last_event_id.map_or_else(value, |first: String| first + ", " + &value()));
                    continue;
                }
                "connection" => {
                    close |= value().split([',', ' ', '\t']).any(|option| option.eq_ignore_ascii_case("close"));
                    continue;
                }
                _ => continue,
            };
            if known.replace(value()).is_some() {
                return refuse(400, format!("the field {} stands twice", field.name));
            }
        }
        if host.is_none() && !http10 {
            return refuse(400, "the field Host is missing");
        }
        let body = match (length, coding) {
            (None, None) => Body::of_length(0),
            (Some(_), Some(_)) => return refuse(400, "Content-Length and Transfer-Encoding together say two things"),
            (Some(length), None) => match length.parse() {
                Ok(count) if length.bytes().all(|b| b.is_ascii_digit()) => Body::of_length(count),
                _ => return refuse(400, format!("{} is no Content-Length", shown(&length))),
            },
            (None, Some(_)) if http10 => return refuse(400, "HTTP/1.0 has no Transfer-Encoding"),
            (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => {
                Body { left: 0, chunked: true, in_chunks: false }
            }
            (None, Some(coding)) => return refuse(501, format!("the transfer coding {} is not known", shown(&coding))),
        };
        let expects_continue = match expect.filter(|_| !http10) {
            None => false,
            Some(what) if what.eq_ignore_ascii_case("100-continue") => true,
            Some(what) => return refuse(417, format!("{} is not expected: 100-continue is", shown(&what))),
        };
        let method = parsed.method.unwrap_or_default().to_string();
        let (path, query) = parse_target(&method, parsed.path.unwrap_or_default())?;
        let last_event_id = last_event_id.filter(|id| !id.is_empty());
        Ok(Request { method, path, query, body, close, expects_continue, last_event_id })
    }

    /// Tells a client that waits for it to send its body.
    fn invite_body(&mut self, reader: &Reader) -> Result<(), Answer> {
        if std::mem::take(&mut self.expects_continue) && !self.body.is_over() {
            let invited = reader.c.write_whole(b"HTTP/1.1 100 Continue\r\n\r\n", Instant::now() + LINGER);
            return invited.or_else(|reason| refuse(400, reason));
        }
        Ok(())
    }

    fn read_body(&mut self, reader: &mut Reader, config: &Config) -> Result<Vec<u8>, Answer> {
        let limit = config.body_bytes;
        let mut body = Vec::new();
        let mut more = self.body.left <= limit as u64;
        if more {
            self.invite_body(reader)?;
            reader.wait_at_most(config.body_time);
        }
        while more && body.len() <= limit {
            more = self.body.read(reader, &mut body)?;
        }
        match self.body.is_over() && body.len() <= limit {
            true => Ok(body),
            false => {
                refuse(413, format!("the body is longer than {limit} bytes (--body-bytes): send less, or lines by PUT"))
            }
        }
    }
}

/// Finds the empty line that ends a head, looking on from `seen`. A lone LF is refused: not everyone takes it for an end.
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

/// The path and the query of a request's target.
fn parse_target(method: &str, target: &str) -> Result<(String, Query), Answer> {
    let absolute = target.strip_prefix("http://").or_else(|| target.strip_prefix("https://"));
    let origin_form = absolute.map_or(target, |rest| rest.find(['/', '?']).map_or("/", |slash| &rest[slash..]));
    let begins_well = origin_form.starts_with('/') || (origin_form.starts_with('?') && absolute.is_some());
    if target == "*" && method == "OPTIONS" {
        return Ok(("*".into(), Query::default()));
    } else if !begins_well || target.contains('#') {
        return refuse(400, format!("{} is no target: it begins with a slash", shown(target)));
    }
    let (path, query) = origin_form.split_once('?').unwrap_or((origin_form, ""));
    let mut parts = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let name = percent_decode(name)?;
        // A cursor that cannot be decoded is none of ours, and gets a gap: a refusal would strand the browser.
        let is_cursor = CURSOR_PARAMETERS.contains(&name.as_str());
        let value = percent_decode(value).or_else(|refusal| if is_cursor { Ok(value.into()) } else { Err(refusal) })?;
        parts.push((name, value));
    }
    Ok((percent_decode(if path.is_empty() { "/" } else { path })?, Query(parts)))
}

fn percent_decode(text: &str) -> Result<String, Answer> {
    let bad = || Answer::refusal(400, format!("{} is not percent-encoded UTF-8", shown(text)));
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
    Err(Answer::refusal(status, reason))
}

impl Answer {
    fn new(status: u16, content_type: impl Into<Cow<'static, str>>, body: Vec<u8>) -> Answer {
        Answer { status, content_type: content_type.into(), headers: String::new(), body, close: false }
    }

    fn text(status: u16, line: impl fmt::Display) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", format!("{line}\n").into_bytes())
    }

    fn refusal(status: u16, reason: impl fmt::Display) -> Answer {
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
    format!("HTTP/1.1 {status} {reason}\r\nDate: {}\r\n", http_date(now_ms() / 1000))
}

/// The head of every stream. It is ended by closing, never chunked; nginx holds such a stream back to its end unless told.
fn stream_head() -> String {
    status_line(200)
        + "Content-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\
           Connection: close\r\n\r\n"
}

/// Unix seconds as RFC 9110 §5.6.7 writes a moment: `Sun, 06 Nov 1994 08:49:37 GMT`. Years are counted from March, so that
/// the leap day comes last, in eras of 400 years (146,097 days).
fn http_date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468; // since 0000-03-01
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let year = days / 146_097 * 400 + year_of_era + u64::from(from_march >= 10);
    let month = &"MarAprMayJunJulAugSepOctNovDecJanFeb"[from_march as usize * 3..][..3];
    let weekday = &"ThuFriSatSunMonTueWed"[(days + 6) as usize % 7 * 3..][..3];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

// ---------------------------------------------------------------------------------------------------------------------
// Routes: what each request gets. Never strand a browser: an `EventSource` gives up for good on any answer but 200, so a
// stream that there is no room for gets 200, a reconnection time, and its end. Only what will not mend by itself (a path
// that does not exist, a query that cannot be read) is refused for good.

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
    routes: Mutex<HashMap<String, Route>>,
    guests: Mutex<Guests>,
    someone_left: Condvar,
    stopping: AtomicBool,
    log: Logger,
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
    fn reply(&self, reader: &mut Reader, request: &mut Request, path: &str) -> Result<Reply, Answer> {
        let Some(allow) = self.methods_of(path) else {
            return Err(Answer::text(404, format!("there is nothing at {}: topics are at /events/NAME", shown(path))));
        };
        let topic = path.strip_prefix("/events/");
        match (request.method.as_str(), topic) {
            ("OPTIONS", _) => return Ok(Reply::Answer(Answer::text(204, "").header("Allow", allow))),
            ("POST", Some(topic)) => return self.publish(reader, request, topic).map(Reply::Answer),
            ("PUT", Some(topic)) => return self.publish_lines(reader, request, topic).map(Reply::Answer),
            ("GET" | "HEAD", _) => {}
            (method @ ("POST" | "PUT" | "DELETE" | "PATCH" | "CONNECT" | "TRACE"), _) => {
                let reason = format!("{method} is not for {}: use one of {allow}", shown(path));
                return Err(Answer::text(405, reason).header("Allow", allow));
            }
            (method, _) => return Err(Answer::text(501, format!("the method {} is not known", shown(method)))),
        }
        request.read_body(reader, self.config())?;
        if let Some(names) = topic {
            return open_topics(request, names).map(Reply::Stream);
        }
        let route = enter(&self.routes).get(path).cloned();
        Ok(match route {
            Some(Route::Stream(handler)) => {
                let (query, last_event_id) = (std::mem::take(&mut request.query), request.last_event_id.take());
                Reply::Stream(Opening::Handler { handler, query, last_event_id })
            }
            Some(Route::Page(content_type, body)) => Reply::Answer(Answer::new(200, content_type, body)),
            None if path == "/metrics" => {
                Reply::Answer(Answer::new(200, "text/plain; version=0.0.4", self.metrics().into_bytes()))
            }
            None if self.stopping() => Reply::Answer(self.unavailable("the server is stopping")),
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

    fn publish(&self, reader: &mut Reader, request: &mut Request, topic: &str) -> Result<Answer, Answer> {
        let mut event = self.describe(request, topic, &["event", "retry", "key"])?;
        let body = request.read_body(reader, self.config()).map_err(|refusal| self.blame(refusal, ""))?;
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
        let mut lines = Lines { reader, body: &mut request.body, config: self.config(), text: Vec::new(), start: 0 };
        let (mut count, mut last) = (0, None);
        let result = loop {
            let line = match lines.next() {
                Ok(Some(line)) => line,
                Ok(None) => break Ok(()),
                Err(refusal) => break Err(refusal),
            };
            let Ok(data) = String::from_utf8(line) else {
                break refuse(400, format!("line {} is not UTF-8", count + 1));
            };
            match self.hub.publish(topic, Event { data, ..event.clone() }) {
                Ok(id) => (count, last) = (count + 1, Some(id)),
                Err(error) => break Err(Answer { close: true, ..self.not_published(&error) }),
            }
        };
        let summary = format!("published {count}{}", last.map_or(String::new(), |id| format!(", last id {id}")));
        result.map_err(|refusal| self.blame(refusal, &format!("; {summary}"))).map(|()| Answer::text(200, summary))
    }

    /// The event that a request describes beside its body. Whatever is wrong there is said before the body is read.
    fn describe(&self, request: &Request, topic: &str, known: &[&str]) -> Result<Event, Answer> {
        if let Some((name, _)) = request.query.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            let reason = format!("the parameter {} is not known: {} are", shown(name), known.join(", "));
            return Err(Answer::text(400, reason));
        }
        let mut event = Event::new("");
        event.name = request.query.get("event").map(String::from);
        event.key = request.query.get("key").map(String::from);
        if let Some(retry) = request.query.get("retry") {
            let number = retry.parse::<u32>().ok().filter(|_| retry.bytes().all(|b| b.is_ascii_digit()));
            let reason = || Answer::text(400, format!("the retry {} is no number of milliseconds", shown(retry)));
            event.retry = Some(Duration::from_millis(number.ok_or_else(reason)?.into()));
        }
        let checked = check_topic(topic).and_then(|()| self.hub.core.check(&event));
        checked.map_err(|error| self.not_published(&error)).map(|()| event)
    }

    fn not_published(&self, error: &io::Error) -> Answer {
        match error.kind() {
            ErrorKind::InvalidInput => Answer::text(400, error),
            _ => self.unavailable(error),
        }
    }

    /// Adds to a refusal how far it came. A body that stopping has cut off is not its sender's fault.
    fn blame(&self, refusal: Answer, so_far: &str) -> Answer {
        if self.stopping() {
            return Answer { close: true, ..self.unavailable(format!("the server is stopping{so_far}")) };
        }
        let reason = String::from_utf8_lossy(&refusal.body);
        Answer { body: format!("{}{so_far}\n", reason.trim_end()).into_bytes(), ..refusal }
    }

    fn unavailable(&self, reason: impl fmt::Display) -> Answer {
        Answer::text(503, reason).header("Retry-After", self.config().retry.as_millis().div_ceil(1000))
    }

    /// Runs a stream to its end, and returns why it ended.
    fn stream(&self, c: &Arc<Connection>, opening: Opening) -> Cow<'static, str> {
        let lane = match self.move_to_streams(c.serial) {
            _ if self.stopping() => return self.send_away(c, "the server is stopping").into(),
            None => return self.send_away(c, "no room for another stream").into(),
            Some(number) => &self.hub.core.lanes[number % self.hub.core.lanes.len()],
        };
        match opening {
            Opening::Topics { names, start, poll } => self.stream_topics(c, lane, &names, start, poll).into(),
            Opening::Handler { handler, query, last_event_id } => {
                if let Err(reason) = c.write_whole(stream_head().as_bytes(), Instant::now() + LONGEST) {
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
        lane: &Sender<ToLane>,
        names: &[String],
        start: Start,
        poll: Option<Duration>,
    ) -> Reason {
        let (core, config, is_poll) = (&*self.hub.core, self.config(), poll.is_some());
        let mut kept = core.kept();
        let Ok(names) = kept.subscribe(names, config.topics) else {
            drop(kept);
            return self.send_away(c, "all topic names are in use");
        };
        let (cursor, gap) = kept.start(&names, start);
        let told = kept.told(&names);
        drop(kept);
        let deadline = Instant::now() + spread(config.lifetime, 80, 100);
        let poll_until = poll.map(|time| Instant::now() + time);
        let subscription = Subscription { core, c, lane, names, told, poll_until, deadline, stopping: &self.stopping };

        // A block without data dispatches nothing, but a browser cut off before its first event resumes from this id.
        let retry = if is_poll { POLL_RETRY } else { config.retry };
        let mut head = format!("{}retry: {}\nid: {cursor}\n\n", stream_head(), retry.as_millis()).into_bytes();
        if let Some(gap) = &gap {
            head.extend_from_slice(&gap.encode().bytes);
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

    fn send_away(&self, c: &Connection, why: Reason) -> Reason {
        self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
        let _ = c.write_whole(stream_head().as_bytes(), Instant::now() + LINGER);
        c.end(why, spread(self.config().retry, 50, 150))
    }
}

/// The lines of a body that is still arriving.
struct Lines<'a, 'b> {
    reader: &'a mut Reader<'b>,
    body: &'a mut Body,
    config: &'a Config,
    text: Vec<u8>,
    /// Where the line that is looked for begins in `text`.
    start: usize,
}

impl Lines<'_, '_> {
    /// Waits for the next line. The last one may lack its LF, if the body ends whole.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Answer> {
        let mut seen = self.start;
        loop {
            let lf = self.text[seen..].iter().position(|b| *b == b'\n');
            let end = lf.map_or(self.text.len(), |lf| seen + lf);
            if end - self.start > self.config.line_bytes {
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
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
    if names.len() > TOPICS_PER_STREAM {
        let reason = format!("{} topics, where a stream takes up to {TOPICS_PER_STREAM}", names.len());
        return Err(Answer::text(400, reason));
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
    let parameters = CURSOR_PARAMETERS.map(|name| request.query.get(name));
    let cursors = [request.last_event_id.as_deref(), parameters[0], parameters[1]];
    let cursor = cursors.into_iter().flatten().find(|text| !text.is_empty());
    let start = cursor.map_or(since, |text| text.parse().map_or(Start::Malformed, Start::Cursor));
    Ok(Opening::Topics { names, start, poll })
}

// ---------------------------------------------------------------------------------------------------------------------
// Server: accept, refuse, stop. A connection is waiting (in its head, or idle between requests), busy, or a stream. When all
// places are taken, the one that has waited longest makes room, so that a crowd of idle or slow ones cannot lock the others
// out. Streams never take all the places; while there are few streams, a herd that comes back at once has theirs, too.

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
    lanes: Vec<JoinHandle<()>>,
}

/// Where the connections are, by their serial numbers, so that the first of each is the oldest.
#[derive(Default)]
struct Guests {
    next_serial: u64,
    threads: usize,
    /// Spreads the streams over the lanes; serial numbers would not, where every other connection is short.
    streams_opened: usize,
    waiting: Place,
    busy: Place,
    streams: Place,
}

type Place = BTreeMap<u64, Arc<Connection>>;

impl Server {
    /// Binds the address and starts the hub, so that publishing works from here on. Port 0 takes any free one.
    ///
    /// # Errors
    /// The address cannot be bound; it is beyond loopback and [`Config::open`] is not set
    /// ([`ErrorKind::PermissionDenied`]); a limit makes no sense ([`ErrorKind::InvalidInput`]); or no thread can be started.
    pub fn bind(address: impl ToSocketAddrs, config: Config) -> io::Result<Server> {
        config.check()?;
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        if !config.open && !address.ip().is_loopback() {
            let reason =
                format!("{address} is beyond loopback, so whoever reaches it could publish: say so with --open");
            return Err(io::Error::new(ErrorKind::PermissionDenied, reason));
        }
        let doorbell = TcpStream::from(std::os::fd::OwnedFd::from(listener.try_clone()?));
        let log = Logger::start(config.log)?;
        let config = fit_to_system(config, &log);
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let (mut lanes, mut threads, counters) = (Vec::new(), Vec::new(), Arc::new(Counters::default()));
        for n in 0..if config.lanes == 0 { cores } else { config.lanes } {
            let (sender, queue) = crossbeam_channel::bounded(QUEUE_SLOTS);
            let (topics, everyone) = Default::default();
            let lane = Lane { topics, everyone, heartbeat: config.heartbeat, counters: counters.clone() };
            lanes.push(sender);
            threads.push(thread::Builder::new().name(format!("lane {n}")).spawn(move || lane.run(&queue))?);
        }
        let base = Id { ms: now_ms(), seq: 0 };
        let (order, kept) = (Mutex::new(Order { newest: base, stopped: false }), Mutex::new(Kept::new(base)));
        let hub = Hub { core: Arc::new(Core { config, order, kept, lanes, counters }) };
        let (routes, guests, someone_left, stopping) = Default::default();
        let shared = Shared { hub, routes, guests, someone_left, stopping, log };
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
        enter(&self.handle.shared.routes).insert(path.into(), route);
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
        for lane in self.lanes.drain(..) {
            let _ = lane.join();
        }
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
        self.stopping.load(SeqCst)
    }

    fn accept_all(self: &Arc<Shared>, listener: &TcpListener) {
        while !self.stopping() {
            match listener.accept() {
                Ok((socket, peer)) => self.admit(socket, peer),
                Err(_) if self.stopping() => return,
                Err(error) => {
                    self.log.warn(format_args!("accepting failed: {error}"));
                    if matches!(error.raw_os_error(), Some(23 | 24)) {
                        // Without descriptors (ENFILE, EMFILE) this repeats until one is given back: it must not spin.
                        enter(&self.guests).close_longest_waiting();
                        thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }

    /// Gives a connection its thread, or closes it where there is no room.
    fn admit(self: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
        let config = self.config();
        let mut guests = enter(&self.guests);
        let places = config.connections + config.subscribers;
        let taken = guests.waiting.len() + guests.busy.len() + guests.streams.len();
        // A place may be given away before the thread that had it has ended, but not too many such threads at once.
        let room = (taken < places || guests.close_longest_waiting()) && guests.threads < places + ENDING_THREADS;
        if self.stopping() || !room {
            drop(guests);
            self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
            return self.log.warn(format_args!("no room for {peer}: all {places} places are taken"));
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
            self.log.warn(format_args!("no thread for {peer}: {error}")); // its `Guest` was dropped, and has left
        }
    }

    /// Finds a stream its place, and numbers it; `None` where there is no room.
    fn move_to_streams(&self, serial: u64) -> Option<usize> {
        let mut guests = enter(&self.guests);
        if guests.streams.len() >= self.config().subscribers {
            return None;
        }
        let c = guests.busy.remove(&serial);
        guests.streams.extend(c.map(|c| (serial, c)));
        guests.streams_opened += 1;
        Some(guests.streams_opened)
    }

    /// Ends every connection: streams with their reconnection time, publishers with their answer; who waits for a request may
    /// still ask for the server's health meanwhile. Returns how many did not end in time.
    fn say_goodbye(&self) -> usize {
        let started = Instant::now();
        let guests = enter(&self.guests);
        let at_work: Vec<_> = guests.busy.values().chain(guests.streams.values()).cloned().collect();
        drop(guests);
        for c in at_work {
            c.take_back();
            let _ = c.socket.shutdown(Shutdown::Read); // wakes who waits for a body or a handler's timer
        }
        self.wait_while(started + STOP_GRACE, |guests| guests.busy.len() + guests.streams.len() > 0);
        for c in enter(&self.guests).everyone() {
            let _ = c.socket.shutdown(Shutdown::Both); // wakes who waits for a request, or a slow peer
        }
        self.wait_while(started + STOP_TIME, |guests| guests.threads > 0);
        let guests = enter(&self.guests);
        let left = guests.threads;
        if left > 0 {
            let peers: Vec<String> = guests.everyone().take(10).map(|c| c.peer.to_string()).collect();
            self.log.line(Log::Info, format_args!("{left} connections did not end: {}", peers.join(" ")));
        }
        left
    }

    fn wait_while(&self, deadline: Instant, mut condition: impl FnMut(&mut Guests) -> bool) {
        let (left, guests) = (deadline.saturating_duration_since(Instant::now()), enter(&self.guests));
        drop(self.someone_left.wait_timeout_while(guests, left, &mut condition));
    }
}

impl Guests {
    fn close_longest_waiting(&mut self) -> bool {
        let Some((_, c)) = self.waiting.pop_first() else { return false };
        let _ = c.socket.shutdown(Shutdown::Both);
        true
    }

    fn everyone(&self) -> impl Iterator<Item = &Arc<Connection>> {
        [&self.waiting, &self.busy, &self.streams].into_iter().flat_map(BTreeMap::values)
    }

    /// A request has come whole: the connection is busy from here on, unless it had to make room just now.
    fn begin_request(&mut self, serial: u64) -> bool {
        let c = self.waiting.remove(&serial);
        let present = c.is_some();
        self.busy.extend(c.map(|c| (serial, c)));
        present
    }

    fn end_request(&mut self, serial: u64) {
        let c = self.busy.remove(&serial);
        self.waiting.extend(c.map(|c| (serial, c)));
    }
}

/// A connection on its thread. Dropping it, also by a panic, closes the socket and takes it from the list.
struct Guest {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    path: Option<String>, // once it is a stream
    reason: Cow<'static, str>,
    opened: Instant,
}

impl Guest {
    fn converse(mut self) {
        let (c, config) = (&self.c, self.shared.config());
        let prepared = c.socket.set_nonblocking(false).and(c.socket.set_nodelay(true));
        if prepared.and(c.socket.set_write_timeout(Some(config.stall_time))).is_err() {
            return; // it has gone already
        }
        if let Some((path, opening)) = self.shared.requests(c) {
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
        let mut reader = Reader { c, buffer: Vec::new(), start: 0, deadline: None, timeout: None };
        reader.wait_at_most(config.head_time);
        loop {
            let (answer, head_only, close) = match Request::read(&mut reader, config) {
                Ok(None) => return None,
                Err(refusal) => (refusal, false, true),
                Ok(Some(mut request)) => {
                    if !enter(&self.guests).begin_request(c.serial) {
                        return None;
                    }
                    let (path, is_head) = (std::mem::take(&mut request.path), request.method == "HEAD");
                    let answer = match self.reply(&mut reader, &mut request, &path) {
                        Ok(Reply::Stream(_)) if is_head => {
                            let _ = c.write_whole(stream_head().as_bytes(), Instant::now() + LINGER);
                            return None;
                        }
                        Ok(Reply::Stream(opening)) => return Some((path, opening)),
                        Ok(Reply::Answer(answer)) | Err(answer) => answer,
                    };
                    let (peer, method, status) = (c.peer, &request.method, answer.status);
                    self.log.line(Log::Debug, format_args!("{peer} {method} {path:?} {status}"));
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
            enter(&self.guests).end_request(c.serial);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let (c, shared) = (&self.c, &self.shared);
        let _ = c.socket.shutdown(Shutdown::Write); // its lane may hold the socket for a moment longer
        if let Some(path) = &self.path {
            let (open, sent) = (self.opened.elapsed(), enter(&c.state).sent);
            let (seconds, tenths) = (open.as_secs(), open.subsec_millis() / 100);
            let (peer, reason) = (c.peer, &self.reason);
            let line = format_args!(
                "closed peer={peer} path={path:?} reason={reason:?} seconds={seconds}.{tenths} events={sent}"
            );
            shared.log.line(if *reason == POLL_IS_OVER { Log::Debug } else { Log::Info }, line);
        }
        let mut guests = enter(&shared.guests);
        guests.threads -= 1;
        let Guests { waiting, busy, streams, .. } = &mut *guests;
        [waiting, busy, streams].into_iter().for_each(|place| drop(place.remove(&c.serial)));
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
        let (topics, bytes) = (kept.topics.len(), kept.bytes);
        let events: usize = kept.topics.values().map(|topic| topic.events.len()).sum();
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
}

/// Lines for stderr, written by a thread of their own: a pipe that takes nothing must hold up neither streams nor stopping.
/// What does not fit into its queue is left out.
struct Logger {
    wanted: Log,
    queue: Sender<Option<String>>,
    finished: Receiver<()>,
    warned_at: AtomicU64,
}

impl Logger {
    fn start(wanted: Log) -> io::Result<Logger> {
        let (queue, lines) = crossbeam_channel::bounded(1024);
        let (running, finished) = crossbeam_channel::bounded(0);
        if wanted > Log::Off {
            let write_all = move || {
                let _running = running; // dropped when the last line is written
                while let Ok(Some(line)) = lines.recv() {
                    let _ = writeln!(io::stderr(), "{line}");
                }
            };
            thread::Builder::new().name("log".into()).spawn(write_all)?;
        }
        Ok(Logger { wanted, queue, finished, warned_at: AtomicU64::new(0) })
    }

    fn line(&self, level: Log, line: fmt::Arguments) {
        if level <= self.wanted {
            let _ = self.queue.try_send(Some(format!("{} {line}", http_date(now_ms() / 1000))));
        }
    }

    /// For what repeats as fast as a flood: one line a second at most.
    fn warn(&self, line: fmt::Arguments) {
        let second = now_ms() / 1000;
        if self.warned_at.swap(second, Relaxed) != second {
            self.line(Log::Info, line);
        }
    }

    fn finish(&self) {
        let _ = self.queue.try_send(None);
        let _ = self.finished.recv_timeout(Duration::from_millis(30));
    }
}

/// Lowers the limits on connections to what the system gives this process: a thread that cannot map its stack's guard
/// aborts the process from inside its start-up, where no error can be caught, so it must not come to that.
fn fit_to_system(mut config: Config, log: &Logger) -> Config {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default(); // elsewhere than on Linux: no lowering
    let limits = read("/proc/self/limits");
    let files =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let files = files.unwrap_or(usize::MAX).saturating_sub(open + 16);
    let mappings = read("/proc/sys/vm/max_map_count").trim().parse().unwrap_or(usize::MAX);
    let threads = mappings.saturating_sub(read("/proc/self/maps").lines().count() + 1024) / 4;
    let room = files.min(threads).max(2);
    if config.subscribers.saturating_add(config.connections) > room {
        config.connections = config.connections.min(room / 8 + 1);
        config.subscribers = config.subscribers.min(room - config.connections);
        let (subscribers, connections) = (config.subscribers, config.connections);
        let what = if files < threads { "open files (ulimit -n)" } else { "memory mappings (vm.max_map_count)" };
        let line =
            format_args!("room for {subscribers} streams and {connections} connections only: the limit is on {what}");
        log.line(Log::Info, line);
    }
    config
}
