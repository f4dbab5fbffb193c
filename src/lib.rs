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
mod encoded;
mod event;
mod history;
mod journal;
mod log;
mod metrics;
mod recovery;
mod sync;
mod system;
mod text;
// uses
use authority::{is_authority, is_loopback, split_port};
use block::{Block, encode_block};
use clock::{date, now_ms, spread};
use config::SWEEP;
pub use config::{Config, Log, Token};
use encoded::{BATCH_BYTES, Encoded, Run};
pub use event::{Event, Id};
use history::{History, Next, Start, Totals};
use journal::Journal;
use log::Logger;
use metrics::{Counters, Gauges};
use sync::{enter, start_thread, try_enter};
use system::AddressSpace;
pub use text::parse_duration;
use text::{LONGEST, invalid, shown};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

// ---------------------------------------------------------------------------------------------------------------------
// Limits. Whatever comes from outside has a bound: bytes, counts and waits. Those an operator may want to move are
// fields of `Config`, each with its default and the reason for it; those that follow from the protocol or the design
// stand here.

/// Writing to so many takes a lane about a millisecond, in which others of a burst come and have to wait. So it waits for
/// them first: as long as another event comes in each `COMPANY_WAIT`, but no longer than `COMPANY_TIME`. A burst of 50 events
/// to 1,000 subscribers then costs 22 % less, and in a flood p99 is an eighth.
const CROWD: usize = 250;
const COMPANY_WAIT: Duration = Duration::from_micros(20);
const COMPANY_TIME: Duration = Duration::from_millis(2);
/// A lane's queue in slots. An event takes one and one more for each KiB, so that the queue is bounded in bytes (4 MiB)
/// too.
const QUEUE_SLOTS: usize = 4096;
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
const STRAY_BYTES: usize = 4 * 1024;
/// Threads that only accept and hand over: `std` listens with a backlog of 128, and a herd must not outrun it.
const ACCEPTORS: usize = 2;
/// Whoever makes room for another loses its place at once, but its thread takes a moment to end. So many may be ending at
/// the same time, beside those that have a place.
const ENDING_THREADS: usize = 128;
const TOPIC_NAME_BYTES: usize = 64;
const TOPICS_PER_STREAM: usize = 16;
const KEY_BYTES: usize = 128;
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
/// A connection that asks again as soon as it is answered is waited for awake, for this long: to put its thread to sleep and
/// wake it on another core takes longer than to answer. One publisher gets 2.8 times as many answers.
const AWAKE_TIME: Duration = Duration::from_micros(50);
/// After a refusal the rest of a request is read for this long, or the reset would overtake the answer
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
const LINGER: Duration = Duration::from_secs(1);
/// Stopping: streams have this long to take their end; then sockets are cut, and threads have until the second to go.
const STOP_GRACE: Duration = Duration::from_millis(700);
const STOP_TIME: Duration = Duration::from_millis(950);
/// What waits for the journal takes at most this much (and one event a publisher), so that a stuck disk does not fill memory.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// The journal is written in pieces of at most this much (or one event), however many publishers wait.
const JOURNAL_BATCH: usize = 1024 * 1024;
/// More than the kernel holds back what is to be written, which is 30 s and a little.
/// <https://docs.kernel.org/admin-guide/sysctl/vm.html#dirty-expire-centisecs>
const HELD_BACK_MS: u64 = 60_000;

// ---------------------------------------------------------------------------------------------------------------------
// Event and Id. An event is encoded once, when it is published, into the bytes that every subscriber gets. What 29
// clients make of these bytes decided their form: LF alone ends a line, one blank line ends an event, nothing else
// stands between.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/// Takes a journal into use, and fills the history with what is in it.
fn open_journal(path: &Path, history: &mut History, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("the journal {}: {error}", path.display()));
    recover(path, history, config, log).map_err(named)
}

fn recover(path: &Path, history: &mut History, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let mut take = |block: Block, bytes: &[u8]| restore(history, block, bytes);
    let (mut journal, found) = Journal::open(path, config, log, &mut take)?;
    history.remove_unused();
    if found.may_lack_events() {
        // What came before, or stood there, is not known, so every topic may have lost something up to now; or for a
        // while after the newest that is known, where the clock has gone back.
        let ms = now_ms().max(history.newest().ms.saturating_add(HELD_BACK_MS));
        history.count_as_forgotten(Id { ms, seq: 0 });
    }
    let Totals { topics, events, .. } = history.totals();
    log.line(Log::Info, format_args!("kept {events} events of {topics} topics"));
    journal.repair(&found, history.block_bytes(), &|boot| snapshot(history, boot))?;
    Ok(journal)
}

/// Takes in a block of the journal.
fn restore(kept: &mut History, block: Block, bytes: &[u8]) {
    let Block { id, topic, key, is_mark, frame_at, .. } = block;
    match topic {
        Some(name) if !is_mark => {
            kept.expire();
            kept.insert(name, Encoded { id, block: bytes.into(), frame_at }, key.map(Arc::from));
        }
        _ => kept.restore_forgotten(topic, id),
    }
}

/// What a journal holds that was written anew: what each topic has forgotten, and every kept event.
fn snapshot(kept: &History, boot: Option<&str>) -> Vec<Encoded> {
    let mark = |field, value, id| encode_block(id, &[(field, value)], &format!("id: {id}\n\n"));
    let (topics, others) = kept.all_forgotten();
    let mut blocks = vec![mark("boot", boot, others)];
    blocks.extend(topics.iter().map(|(name, forgotten)| mark("topic", Some(name), *forgotten)));
    blocks.append(&mut kept.all_events());
    blocks
}

// ---------------------------------------------------------------------------------------------------------------------
// Hub: publishing, and the lanes. Publishing holds the order lock from numbering an event until it stands in the last
// lane's queue, so ids, kept events and queues all have one order. A lane takes neither the order lock nor the kept
// lock, so a publisher that waits for room in its queue is never waited for in turn.

/// Publishes events, from any thread. Cheap to clone; clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    core: Arc<Core>,
}

struct Core {
    config: Config,
    /// Set without any lock: stopping must not stand in line behind all who want to publish.
    stopping: AtomicBool,
    /// None without a journal, and once the server has stopped.
    journal: Mutex<Option<Journal>>,
    order: Mutex<Order>,
    /// Notified when a thread has finished writing the journal, so that those who wait for their events look again.
    settled: Condvar,
    kept: Mutex<History>,
    lanes: Vec<Sender<ToLane>>,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Order {
    /// The highest id that was given to an event.
    newest: Id,
    /// What the journal does not have yet, in the order of the ids.
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
}

struct Waiting {
    topic: String,
    event: Encoded,
    key: Option<Arc<str>>,
    outcome: Arc<Outcome>,
}

/// Empty while an event waits for the journal; then how that ended, for all who wait for it.
type Outcome = OnceLock<Result<(), String>>;

enum ToLane {
    Event(Arc<str>, Encoded),
    /// Takes up a slot for each KiB of the event before it.
    Weight,
    Join(Arc<Connection>, Arc<[Arc<str>]>),
    Leave(u64, Arc<[Arc<str>]>),
    Stop,
}

impl Hub {
    /// Publishes one event to a topic, and returns its id once the journal has it, if there is one, and every lane's
    /// queue.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a topic or an event that may not be, [`ErrorKind::QuotaExceeded`] when all topic
    /// names are in use, [`ErrorKind::StorageFull`] when the journal cannot be written (the message has the system's
    /// reason), [`ErrorKind::NotConnected`] once the server is stopping. Nothing is published then.
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
        let numbered = core.number(&mut enter(&core.order), topic, event)?;
        core.settle(numbered)
    }
}

/// An event's id, and what it waits for, if it is not published yet.
type Numbered = (Id, Option<Arc<Outcome>>);

impl Core {
    /// Publishes events that follow one another. Where one cannot be, nor are those after it.
    fn publish_all(&self, topic: &str, events: Vec<Event>) -> (Vec<Id>, io::Result<()>) {
        let (mut numbered, mut published) = (Vec::new(), Vec::new());
        let number_all = || {
            let mut order = enter(&self.order); // held throughout, so that no failure of the journal comes in between
            for event in events {
                numbered.push(self.number(&mut order, topic, event)?);
            }
            Ok(())
        };
        let all_numbered = number_all();
        let all_settled = numbered.into_iter().try_for_each(|event| {
            published.push(self.settle(event)?);
            Ok(())
        });
        (published, all_settled.and(all_numbered))
    }

    /// Gives an event its place in the order. Without a journal, it is published at once.
    fn number(&self, order: &mut Order, topic: &str, event: Event) -> io::Result<Numbered> {
        if self.stopping.load(SeqCst) {
            return Err(stopped());
        }
        check_topic(topic)?;
        self.check(&event)?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
        let kept = self.kept();
        if let Some(key) = &key {
            // It may repeat an event that is kept, or one that still waits for the journal.
            let first = kept.id_of_key(topic, key);
            let is_first = |waiting: &&Waiting| waiting.topic == topic && waiting.key.as_ref() == Some(key);
            if let Some(first) = first {
                return Ok((first, None));
            } else if let Some(first) = order.waiting.iter().find(is_first) {
                return Ok((first.event.id, Some(first.outcome.clone())));
            }
        }
        kept.check_room(topic)?;
        drop(kept);
        if order.waiting_bytes > WAITING_BYTES {
            return Err(io::Error::new(ErrorKind::ResourceBusy, "the disk is too slow for what waits for the journal"));
        }
        let id = order.newest.next(now_ms());
        order.newest = id;
        let frame = event.encode(Some(&id));
        if self.config.journal.is_none() {
            self.make_visible(topic, Encoded::new(id, frame), key);
            return Ok((id, None));
        }
        let event = encode_block(id, &[("topic", Some(topic)), ("key", key.as_deref())], &frame);
        let outcome = Arc::new(Outcome::new());
        order.waiting_bytes += event.block.len();
        order.waiting.push_back(Waiting { topic: topic.into(), event, key, outcome: outcome.clone() });
        Ok((id, Some(outcome)))
    }

    /// Waits until an event is in the journal and visible. Whoever finds the journal at rest becomes the writer, for all who
    /// wait, so that they share the cost of it; the others sleep until it has finished, and look again.
    fn settle(&self, (id, outcome): Numbered) -> io::Result<Id> {
        let Some(outcome) = outcome else { return Ok(id) };
        let mut order = enter(&self.order);
        while outcome.get().is_none() {
            // Under the order lock, so that the journal cannot come to rest between finding it taken and falling
            // asleep.
            let Some(mut journal) = try_enter(&self.journal) else {
                order = self.settled.wait(order).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(order);
            self.write_batch(journal.as_mut().ok_or_else(stopped)?); // it is closed only when nothing waits
            order = enter(&self.order);
            if self.stopping.load(SeqCst) && order.waiting.is_empty() {
                *journal = None; // stopping found it taken, and may not have waited for so long
            }
            drop(journal);
            self.settled.notify_all();
        }
        match outcome.get() {
            Some(Err(reason)) => Err(io::Error::new(ErrorKind::StorageFull, format!("the journal failed: {reason}"))),
            _ => Ok(id),
        }
    }

    /// Writes what waits for the journal, and makes it visible. Numbering goes on meanwhile: the order lock is not
    /// held.
    fn write_batch(&self, journal: &mut Journal) {
        let (mut batch, mut count) = (Vec::new(), 0);
        for waiting in &enter(&self.order).waiting {
            if count > 0 && batch.len() + waiting.event.block.len() > JOURNAL_BATCH {
                break;
            }
            batch.extend_from_slice(&waiting.event.block);
            count += 1;
        }
        let kept_bytes = enter(&self.kept).block_bytes();
        let result = journal
            .append(&batch, kept_bytes, &|boot| snapshot(&enter(&self.kept), boot))
            .map_err(|error| error.to_string());
        self.counters.journal_bytes.store(journal.length(), Relaxed);
        let mut order = enter(&self.order);
        if result.is_err() {
            count = order.waiting.len(); // what came later must not be published before it
        }
        let settled: Vec<_> = order.waiting.drain(..count).collect();
        for waiting in settled {
            order.waiting_bytes -= waiting.event.block.len();
            if result.is_ok() {
                self.make_visible(&waiting.topic, waiting.event, waiting.key);
            }
            let _ = waiting.outcome.set(result.clone());
        }
    }

    /// Once nothing waits for the journal any more, another server may have it, though the program still holds a hub. Where
    /// the disk takes longer than stopping may, whoever is writing closes it afterwards.
    fn close_journal(&self, deadline: Instant) {
        let mut order = enter(&self.order);
        loop {
            if order.waiting.is_empty()
                && let Some(mut journal) = try_enter(&self.journal)
            {
                *journal = None;
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            order = self.settled.wait_timeout(order, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Keeps an event, and hands it to every lane. Called in the order of the ids, under the order lock.
    fn make_visible(&self, topic: &str, event: Encoded, key: Option<Arc<str>>) {
        let followed = enter(&self.kept).insert(topic, event.clone(), key);
        self.counters.published.fetch_add(1, Relaxed);
        let Some(name) = followed else { return };
        for lane in &self.lanes {
            let _ = lane.send(ToLane::Event(name.clone(), event.clone()));
            for _ in 0..event.frame().len() / 1024 {
                let _ = lane.send(ToLane::Weight);
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, History> {
        let mut kept = enter(&self.kept);
        kept.expire();
        kept
    }

    fn check(&self, event: &Event) -> io::Result<()> {
        event.check()?;
        let limit = self.config.data_bytes();
        if event.name.as_deref() == Some("gap") {
            return invalid("the event name gap is the server's own: choose another");
        } else if event.id.is_some() {
            return invalid("a topic numbers its events itself: leave the id out");
        } else if event.data.len() > limit {
            return invalid(format!("{} bytes of data, where at most {limit} are taken", event.data.len()));
        }
        match event.key.as_ref().map(String::len) {
            Some(length) if !(1..=KEY_BYTES).contains(&length) => {
                invalid(format!("a key of {length} bytes, where 1 to {KEY_BYTES} are taken"))
            }
            _ => Ok(()),
        }
    }
}

fn stopped() -> io::Error {
    io::Error::new(ErrorKind::NotConnected, STOPPING)
}

fn check_topic(name: &str) -> io::Result<()> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._~-".contains(&b);
    if (1..=TOPIC_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits) {
        return Ok(());
    }
    invalid(format!("{} is no topic name: that is 1 to {TOPIC_NAME_BYTES} of A-Z a-z 0-9 . _ ~ -", shown(name)))
}

/// One of the threads that write to live subscribers. Each subscriber belongs to one lane, from before it first turns
/// live until its thread ends; whether the lane may touch its socket is said by its state.
struct Lane {
    topics: HashMap<Arc<str>, Vec<Arc<Connection>>>,
    everyone: Vec<Arc<Connection>>,
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
            // become a batch, and when the queue is empty (and stays so, with a crowd): so a burst costs a subscriber one
            // write, not one an event.
            let mut topic: Option<Arc<str>> = None;
            let alone_until = Instant::now() + COMPANY_TIME;
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
                let is_worth_it = go_on && !run.bytes.is_empty() && self.everyone.len() >= CROWD;
                if next.is_none() && is_worth_it && Instant::now() < alone_until {
                    thread::sleep(COMPANY_WAIT);
                    next = queue.try_recv().ok();
                }
            }
            self.write(topic.as_deref(), &mut run);
            if Instant::now() >= sweep_at {
                self.sweep();
                sweep_at = Instant::now() + SWEEP;
            }
        }
    }

    fn join(&mut self, c: &Arc<Connection>, names: &[Arc<str>]) {
        for name in names {
            join(self.topics.entry(name.clone()).or_default(), c.clone());
        }
        join(&mut self.everyone, c.clone());
    }

    fn leave(&mut self, serial: u64, names: &[Arc<str>]) {
        for name in names {
            if let Some(subscribers) = self.topics.get_mut(name) {
                leave(subscribers, serial);
                if subscribers.is_empty() {
                    self.topics.remove(name);
                }
            }
        }
        leave(&mut self.everyone, serial);
    }

    fn write(&self, topic: Option<&str>, run: &mut Run) {
        let now = Instant::now();
        let mut delivered = 0;
        for c in topic.and_then(|name| self.topics.get(name)).into_iter().flatten() {
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
        for c in &self.everyone {
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

/// Lists of subscribers are sorted by serial number: who comes is nearly always the last, and who leaves is found soon.
fn join(list: &mut Vec<Arc<Connection>>, c: Arc<Connection>) {
    list.insert(list.partition_point(|other| other.serial < c.serial), c);
}

fn leave(list: &mut Vec<Arc<Connection>>, serial: u64) {
    if let Ok(at) = list.binary_search_by_key(&serial, |c| c.serial) {
        list.remove(at);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Subscriber: one connection, and whose its socket is. `phase` says it, under the subscriber's own lock: while it is
// live the socket is the lane's, else its thread's. Non-blocking mode belongs to the open file, not to a handle, so
// only the owner sets it; everyone else may only shut the socket down. The thread turns live under the kept lock,
// having seen in the same hold that nothing newer is kept; whatever is published after that is queued after that, and
// whatever is queued from before is not newer than the cursor, and skipped. So nothing is lost and nothing comes twice.

/// The line that keeps a silent stream open. No blank line after it: some clients take every blank line for an event.
const HEARTBEAT: &[u8] = b":\n";

/// Why something about a connection ended, for the log and for a handler.
type Reason = &'static str;

const STOPPING: Reason = "the server is stopping";
const POLL_IS_OVER: Reason = "the poll is over";
const NO_ROOM: Reason = "no room for another stream";
const NO_NAMES: Reason = "all topic names are in use";

struct Connection {
    serial: u64,
    /// Where it is in `Connections`, under whose lock these change.
    place: AtomicUsize,
    turn: AtomicU64,
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
        Connection {
            serial,
            place: AtomicUsize::new(WAITING),
            turn: AtomicU64::new(0),
            peer,
            socket,
            state: Mutex::new(state),
            wake: Condvar::new(),
        }
    }

    /// One non-blocking write of what in `run` is newer than the cursor. Returns how many events went out whole; where
    /// not all did, the subscriber is behind, and the first of the others unfinished.
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
            Ok(offset) => state.leave_unfinished(Encoded::new(state.cursor, HEARTBEAT), offset),
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

    /// Waits for the next request without sleeping, but not for long. Whoever else is due on this core goes first.
    fn stay_awake(&self) -> io::Result<()> {
        let until = Instant::now() + AWAKE_TIME;
        self.socket.set_nonblocking(true)?;
        while self.socket.peek(&mut [0]).is_err_and(|error| would_block(&error)) && Instant::now() < until {
            thread::yield_now();
        }
        self.socket.set_nonblocking(false)
    }

    /// Finishes what stands unfinished with blocking writes: the one place where a subscriber is waited for.
    fn finish(&self, deadline: Instant) -> Result<(), Reason> {
        let Some(Unfinished { event, offset }) = enter(&self.state).unfinished.take() else { return Ok(()) };
        self.write_waiting(&event.frame()[offset..], deadline)?;
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
        self.set_nonblocking(false)?;
        self.write_whole(bytes, deadline)?;
        self.set_nonblocking(true)
    }

    fn set_nonblocking(&self, mode: bool) -> Result<(), Reason> {
        self.socket.set_nonblocking(mode).map_err(|error| reason_of(&error))
    }

    /// Writes all of `bytes` to a socket in blocking mode, as long as the peer takes something in each stall time.
    fn write_whole(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let mut written = (&self.socket).write(bytes);
            if written.as_ref().is_err_and(would_block) {
                // The time has passed, but the peer may have taken something: the kernel wakes a blocked writer only
                // once a third of its buffer is free. So try once more without waiting.
                self.set_nonblocking(true)?;
                written = (&self.socket).write(bytes);
                self.set_nonblocking(false)?;
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
    error.kind() == ErrorKind::WouldBlock // `TimedOut` is the kernel giving up on the peer
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
}

impl Subscription<'_> {
    /// Replays, turns live, sleeps until the lane gives the socket back, and begins again, until the stream ends.
    /// Returns why it ended.
    fn follow(mut self) -> Reason {
        let (core, c, retry) = (self.core, self.c, self.core.config.retry);
        loop {
            if let Err(reason) = c.finish(self.deadline) {
                return reason;
            } else if core.stopping.load(SeqCst) {
                return c.end(STOPPING, spread(retry, 50, 150));
            } else if Instant::now() >= self.deadline {
                return c.end("the lifetime is over", retry);
            }
            let State { cursor, sent, .. } = *enter(&c.state);
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
                    enter(&c.state).leave_unfinished(gap, 0);
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
            if left.is_zero() || self.core.stopping.load(SeqCst) {
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
            _ if self.stopping.load(SeqCst) => Err(io::Error::other(STOPPING)),
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
    connections: Mutex<Connections>,
    someone_left: Condvar,
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
                    let mut connections = enter(&self.connections);
                    // Some places are for others, or each newcomer would have to go for the next.
                    if connections.places[TRUSTED].len() < self.config().connections * 3 / 4 {
                        connections.move_on(reader.c, TRUSTED);
                    }
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
            let place = c.place.load(Relaxed);
            enter(&self.connections).move_on(c, place); // who has something to say is not the first to make room
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
        let lane = match self.move_to_streams(c) {
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
                let result =
                    handler(&mut Stream { c, stopping: &self.hub.core.stopping, query, last_event_id, stray: 0 });
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
        let mut kept = core.kept();
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

/// Where the connections are, each place in the order in which they came to it: the first has been there longest.
#[derive(Default)]
struct Connections {
    next_serial: u64,
    next_turn: u64,
    threads: usize,
    /// Spreads the streams over the lanes; serial numbers would not, where every other connection is short.
    streams_opened: usize,
    /// With their turns, which rise.
    places: [VecDeque<(u64, Arc<Connection>)>; 4],
}

/// The place of a connection whose next request's head has not come whole.
const WAITING: usize = 0;
/// Its head has come: its body is read, or its answer written.
const BUSY: usize = 1;
/// The same, for a publisher that has shown its token.
const TRUSTED: usize = 2;
/// It is a stream, for the rest of its life.
const STREAMS: usize = 3;

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
            let (sender, queue) = crossbeam_channel::bounded(QUEUE_SLOTS);
            let (topics, everyone) = Default::default();
            let lane = Lane { topics, everyone, heartbeat: config.heartbeat, counters: counters.clone() };
            lanes.push(sender);
            threads.push(start_thread(format!("lane {n}"), Box::new(move || lane.run(&queue)))?);
        }
        // Ids begin above those of the journal; without one, whatever an earlier process had counts as let go.
        let now = Id { ms: now_ms(), seq: 0 };
        let mut kept = History::new(if config.journal.is_none() { now } else { Id::default() }, &config);
        let open = |path| open_journal(path, &mut kept, &config, &log);
        let journal = config.journal.as_deref().map(open).transpose()?;
        counters.journal_bytes.store(journal.as_ref().map_or(0, Journal::length), Relaxed);
        let order = Order { newest: kept.newest(), ..Order::default() };
        let (journal, order, kept) = (Mutex::new(journal), Mutex::new(order), Mutex::new(kept));
        let (stopping, settled) = (AtomicBool::new(false), Condvar::new());
        let core = Core { config, stopping, journal, order, settled, kept, lanes, counters };
        let hub = Hub { core: Arc::new(core) };
        let loopback_port = Some(address.port()).filter(|_| address.ip().is_loopback());
        let shared = Shared {
            hub,
            routes: Mutex::default(),
            connections: Mutex::default(),
            someone_left: Condvar::new(),
            loopback_port,
            address_space: AddressSpace::read(),
            log,
        };
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
        if shared.hub.core.stopping.swap(true, SeqCst) {
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
        self.hub.core.stopping.load(SeqCst)
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
                        enter(&self.connections).make_room();
                        thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }

    /// Gives a connection its thread, or closes it where there is no room.
    fn admit(self: &Arc<Shared>, socket: TcpStream, peer: SocketAddr) {
        let config = self.config();
        let mut connections = enter(&self.connections);
        let has_space = self.address_space.has_room();
        let places = config.connections + config.subscribers;
        let taken = connections.places.iter().map(VecDeque::len).sum::<usize>();
        // A place may be given away before the thread that had it has ended, but not too many such threads at once.
        let has_thread = has_space && connections.threads < places + ENDING_THREADS;
        let room = has_thread && (taken < places || connections.make_room());
        if !has_space {
            connections.make_room(); // for the next: an ending thread's space is not free at once
        }
        if self.stopping() || !room {
            drop(connections);
            self.hub.core.counters.sent_away.fetch_add(1, Relaxed);
            let what = if has_space { "places are taken" } else { "places have no address space (ulimit -v)" };
            return self.log.warn(format_args!("no room for {peer}: all {places} {what}"));
        }
        let serial = connections.next_serial;
        let c = Arc::new(Connection::new(serial, peer, socket));
        connections.next_serial += 1;
        connections.threads += 1;
        connections.put(c.clone(), WAITING);
        drop(connections);
        let thread =
            ConnectionThread { shared: self.clone(), c, path: None, reason: "".into(), opened: Instant::now() };
        if let Err(error) = start_thread(format!("conn {serial}"), Box::new(move || thread.converse())) {
            self.log.warn(format_args!("no thread for {peer}: {error}")); // it was dropped, and has left its place
            enter(&self.connections).make_room();
        }
    }

    /// Finds a stream its place, and numbers it; `None` where there is no room.
    fn move_to_streams(&self, c: &Connection) -> Option<usize> {
        let mut connections = enter(&self.connections);
        if connections.places[STREAMS].len() >= self.config().subscribers || !connections.move_on(c, STREAMS) {
            return None;
        }
        connections.streams_opened += 1;
        Some(connections.streams_opened)
    }

    /// Ends every connection: streams with their reconnection time, publishers with their answer; who waits for a
    /// request may still ask for the server's health meanwhile. Returns how many did not end in time.
    fn say_goodbye(&self, deadline: Instant) -> usize {
        let started = Instant::now();
        let connections = enter(&self.connections);
        let at_work: Vec<_> = connections.places[BUSY..].iter().flatten().map(|(_, c)| c.clone()).collect();
        drop(connections);
        for c in at_work {
            c.take_back();
            let _ = c.socket.shutdown(Shutdown::Read); // wakes who waits for a body or a handler's timer
        }
        self.wait_while(started + STOP_GRACE, |connections| {
            connections.places[BUSY..].iter().any(|place| !place.is_empty())
        });
        for c in enter(&self.connections).everyone() {
            let _ = c.socket.shutdown(Shutdown::Both); // wakes who waits for a request, or a slow peer
        }
        self.wait_while(deadline, |connections| connections.threads > 0);
        let connections = enter(&self.connections);
        let left = connections.threads;
        if left > 0 {
            let peers: Vec<String> = connections.everyone().take(10).map(|c| c.peer.to_string()).collect();
            self.log.line(Log::Info, format_args!("{left} connections did not end: {}", peers.join(" ")));
        }
        left
    }

    fn wait_while(&self, deadline: Instant, mut condition: impl FnMut(&mut Connections) -> bool) {
        let (left, connections) = (deadline.saturating_duration_since(Instant::now()), enter(&self.connections));
        drop(self.someone_left.wait_timeout_while(connections, left, &mut condition));
    }
}

impl Connections {
    /// Closes one connection for a newcomer; false where there are only streams. It is the one that has been waiting longest.
    /// But where a crowd came at once, it has not been waiting for long either (fewer have come since than three quarters of
    /// those that are here): then the one that has been busy longest goes. Who has shown a token goes last.
    fn make_room(&mut self) -> bool {
        let [waiting, busy, trusted, _] = &mut self.places;
        let recent = self.next_serial.saturating_sub((waiting.len() + busy.len()) as u64 * 3 / 4);
        let just_came = waiting.front().is_none_or(|(_, c)| c.serial >= recent);
        let longest = if just_came { busy.pop_front() } else { None };
        let longest = longest.or_else(|| waiting.pop_front()).or_else(|| trusted.pop_front());
        longest.inspect(|(_, c)| drop(c.socket.shutdown(Shutdown::Both))).is_some()
    }

    fn everyone(&self) -> impl Iterator<Item = &Arc<Connection>> {
        self.places.iter().flatten().map(|(_, c)| c)
    }

    /// False where the connection has lost its place to a newcomer.
    fn move_on(&mut self, c: &Connection, to: usize) -> bool {
        let found = self.leave(c);
        let present = found.is_some();
        found.into_iter().for_each(|c| self.put(c, to));
        present
    }

    fn leave(&mut self, c: &Connection) -> Option<Arc<Connection>> {
        let place = &mut self.places[c.place.load(Relaxed)];
        let at = place.binary_search_by_key(&c.turn.load(Relaxed), |(turn, _)| *turn).ok()?;
        place.remove(at).map(|(_, c)| c)
    }

    fn put(&mut self, c: Arc<Connection>, place: usize) {
        self.next_turn += 1;
        c.place.store(place, Relaxed);
        c.turn.store(self.next_turn, Relaxed);
        self.places[place].push_back((self.next_turn, c));
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
                    if !enter(&self.connections).move_on(c, BUSY) {
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
            if !enter(&self.connections).move_on(c, WAITING) {
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
        let mut connections = enter(&shared.connections);
        connections.threads -= 1;
        connections.leave(c);
        shared.someone_left.notify_all();
    }
}

// ---------------------------------------------------------------------------------------------------------------------

impl Shared {
    fn metrics(&self) -> String {
        let connections = enter(&self.connections);
        let [waiting, busy, trusted, streams] = connections.places.each_ref().map(VecDeque::len);
        drop(connections);
        let Totals { topics, events, bytes } = self.hub.core.kept().totals();
        let gauges = Gauges {
            subscribers: streams,
            connections: waiting + busy + trusted,
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
