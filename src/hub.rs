//! Publishing: give an event its id, write it down, hand it out.
//!
//! The order lock is held from numbering an event to the last lane's queue, but not while the journal is written; so
//! ids, journal, history and queues all have one order, and one cursor resumes any set of topics. Whoever finds the
//! journal idle writes it for all who wait, so that they share the cost and nobody is woken to write. With `--fsync`
//! the journal's own thread writes, which costs little beside a sync: a disk that is stuck never holds a publisher, who
//! can be answered when the server stops. A lane takes neither the order lock nor that of the history, so a publisher
//! that waits for room in its queue always gets it.

use crate::block::{Block, encode_block};
use crate::clock::now_ms;
use crate::config::{Config, Log};
use crate::connection::STOPPING;
use crate::encoded::{Begun, Parts};
use crate::event::{Event, Id};
use crate::history::{History, Totals};
use crate::journal::Journal;
use crate::kept::{Kept, restore};
use crate::lane::{Ending, Lane};
use crate::log::Logger;
use crate::metrics::Counters;
use crate::rewrite::Snapshot;
use crate::sync::{enter, start_thread};
use crate::text::{invalid, quoted};
use crate::unwritten::{Numbered, Order, Outcome, Turn, Turns, Unwritten};
use crate::watch::LOOK_TIME;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A name stands in paths, logs and the journal, and is kept for as long as it is in use.
const TOPIC_NAME_BYTES: usize = 64;
/// A key is kept as long as its event.
const KEY_BYTES: usize = 128;
/// What waits for the journal takes at most this much memory (and one event for each publisher), so that a stuck disk
/// does not fill it.
const UNWRITTEN_BYTES: usize = 16 * 1024 * 1024;
/// When stopping, publishers whose events the disk has not taken are told so after this time, which leaves enough for
/// the answer to go out.
pub const STOP_WAIT: Duration = Duration::from_millis(400);
/// Longer than the kernel keeps written data before it begins to write it to the disk, which is some 30 s; in ms.
/// <https://docs.kernel.org/admin-guide/sysctl/vm.html#dirty-expire-centisecs>
const HELD_BACK_MS: u64 = 60_000;

/// Said instead of a plain refusal: nobody knows yet, and only a key makes it safe to try again.
const NOT_TAKEN: &str =
    "the disk has not taken the event yet: it may be published, or not; publish it again with the same key";

/// Publishes events, from any thread. Cheap to clone; clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    pub(crate) core: Arc<Core>,
}

impl Hub {
    /// Publishes one event to a topic. Returns its id once it is in the journal, if there is one, and on its way to
    /// every subscriber.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a topic or an event that may not be, [`ErrorKind::QuotaExceeded`] when all topic
    /// names are in use, [`ErrorKind::ResourceBusy`] when too much waits for the journal's disk,
    /// [`ErrorKind::StorageFull`] when the journal cannot be written (the message has the system's reason),
    /// [`ErrorKind::NotConnected`] once the server is stopping. Nothing is published then, with one exception: if the
    /// disk had not answered when the server stopped, the event may be published, and the message says so. With the
    /// same [`key`](Event::key), publishing it again is safe.
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
        let numbered = core.number(&mut enter(&core.turns.order), topic, event)?;
        core.settle(numbered)
    }
}

/// What all hubs share.
pub struct Core {
    /// As the system allows it (`system.rs`).
    pub config: Config,
    pub lanes: Vec<Lane>,
    pub counters: Arc<Counters>,
    /// Set without any lock: stopping must not stand in line behind all who want to publish.
    stopped_at: OnceLock<Instant>,
    /// The outermost lock, and the events that wait for the journal.
    turns: Turns,
    /// The last try to write the journal has failed.
    is_journal_failing: AtomicBool,
    /// Locked shortly, under the order lock or alone. A snapshot for the journal has a share of it.
    history: Arc<Mutex<History>>,
    /// Locked shortly, and nothing is locked under it.
    pub begun: Mutex<Begun>,
    log: Arc<Logger>,
}

impl Core {
    /// Opens the journal, if there is one, and restores what is in it.
    ///
    /// # Errors
    /// The journal cannot be used: see [`Server::bind`](crate::Server::bind).
    pub fn new(config: Config, lanes: Vec<Lane>, counters: Arc<Counters>, log: &Arc<Logger>) -> io::Result<Core> {
        // Ids begin above those of the journal; without one, whatever an earlier process had counts as forgotten.
        let base = if config.journal.is_none() { Id { ms: now_ms(), seq: 0 } } else { Id::default() };
        let history = Arc::new(Mutex::new(History::new(base, &config)));
        let journal = config.journal.as_deref().map(|path| open_journal(path, &history, &config, log)).transpose()?;
        counters.journal_bytes.store(journal.as_ref().map_or(0, Journal::length), Relaxed);
        let newest = enter(&history).newest(); // the next id is above all that the journal knows of
        let order = Mutex::new(Order::new(newest, journal));
        Ok(Core {
            lanes,
            counters,
            stopped_at: OnceLock::new(),
            turns: Turns { order, ended: Condvar::new(), work: Condvar::new() },
            is_journal_failing: AtomicBool::new(false),
            history,
            begun: Mutex::default(),
            log: log.clone(),
            config,
        })
    }

    /// Starts the journal's own thread, if there is a journal. It ends once the server has stopped and nothing waits.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start_journal_thread(self: &Arc<Core>) -> io::Result<()> {
        if self.config.journal.is_some() {
            let core = self.clone();
            start_thread("journal".into(), Box::new(move || core.tend_journal()))?;
        }
        Ok(())
    }

    /// Whether the server is stopping. It never starts again.
    pub fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// Whether the last try to write the journal failed, so that publishing would be refused: then `/health` is 503.
    pub fn is_journal_failing(&self) -> bool {
        self.is_journal_failing.load(Relaxed)
    }

    /// From here on no event gets an id. False if the server was stopping already.
    pub fn stop(&self) -> bool {
        let is_first = self.stopped_at.set(Instant::now()).is_ok();
        drop(enter(&self.turns.order)); // or whoever has just looked, and is falling asleep, would miss it
        self.turns.ended.notify_all();
        self.turns.work.notify_one();
        is_first
    }

    /// Has the lanes end all live streams, once the server stops. Under the order lock, so that each lane has everything
    /// before it that was published, and nothing after.
    pub fn end_streams(&self, deadline: Instant) {
        let _order = enter(&self.turns.order);
        let ending = Ending { newest: self.history().newest(), retry: self.config.retry, deadline };
        self.lanes.iter().for_each(|lane| lane.end_streams(ending));
    }

    /// The history, without what is too old. Whoever holds it may take a connection's state, but not the order lock.
    pub fn history(&self) -> MutexGuard<'_, History> {
        let mut history = enter(&self.history);
        history.expire();
        history
    }

    /// Publishes events that follow one another, as the lines of a `PUT` do. Where one cannot be published, those after
    /// it are not either. Returns the ids of those that were.
    ///
    /// # Errors
    /// As for [`Hub::publish`], for the first that was not.
    pub fn publish_all(&self, topic: &str, events: Vec<Event>) -> (Vec<Id>, io::Result<()>) {
        let (mut numbered, mut published) = (Vec::new(), Vec::new());
        let number_all = || {
            // Held throughout: a failing journal then refuses the last of them, never one between two others.
            let mut order = enter(&self.turns.order);
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

    /// Whether this event may be published to a topic. Its data may still be missing: queries are checked before bodies
    /// are read.
    pub fn check(&self, event: &Event) -> io::Result<()> {
        event.check()?;
        let limit = self.config.data_bytes();
        if event.id.is_some() {
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

    /// Waits until the journal is closed, which it is once nothing waits for it. Then another server may have it,
    /// though the program still holds a hub. Where the disk takes longer than stopping may, the journal's thread closes
    /// it afterwards.
    pub fn close_journal(&self, deadline: Instant) {
        let mut order = enter(&self.turns.order);
        while self.config.journal.is_some() && !order.is_closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            order = self.turns.ended.wait_timeout(order, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives an event its id. Without a journal, it is published at once; else it waits, and the caller must
    /// [`Core::settle`] it.
    fn number(&self, order: &mut Order, topic: &str, event: Event) -> io::Result<Numbered> {
        if self.is_stopping() {
            return Err(stopped());
        }
        check_topic(topic)?;
        self.check(&event)?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
        // Under the order lock: of two publishers with one key, the second sees the first one's event.
        let history = self.history();
        if let Some(first) = key.as_ref().and_then(|key| order.find_key(&history, topic, key)) {
            return Ok(first);
        }
        history.check_room(topic)?;
        drop(history);
        if order.unwritten_bytes > UNWRITTEN_BYTES {
            return Err(io::Error::new(ErrorKind::ResourceBusy, "the disk is too slow for what waits for the journal"));
        }
        let id = order.newest.next(now_ms());
        order.newest = id;
        let frame = event.encode_with_id(id);
        // Both ways make the same event; for the journal, its fields stand before the frame. The id is inside the frame,
        // so whoever numbers events must do so before this.
        if self.config.journal.is_none() {
            self.hand_out(topic, &Parts::new(id, b"", frame.as_bytes()), key.as_deref());
            return Ok((id, None));
        }
        let event = encode_block(id, &[("topic", Some(topic)), ("key", key.as_deref())], &frame);
        let outcome = Arc::new(Outcome::new());
        order.push(Unwritten { topic: topic.into(), event, key, outcome: outcome.clone() });
        Ok((id, Some(outcome)))
    }

    /// Waits until an event is in the journal and handed out, writing the journal itself where nobody else does.
    fn settle(&self, (id, outcome): Numbered) -> io::Result<Id> {
        let Some(outcome) = outcome else { return Ok(id) };
        let mut order = enter(&self.turns.order);
        while outcome.get().is_none() {
            // The lock is held from here until this thread sleeps: otherwise a turn could end in between, and nobody
            // would wake it.
            let turn = if self.config.fsync || order.is_claimed { None } else { order.journal.take() };
            if let Some(journal) = turn {
                drop(order);
                self.write_batch(&mut Turn::new(&self.turns, journal));
                order = enter(&self.turns.order);
                continue;
            }
            self.turns.work.notify_one(); // with `--fsync`, the journal's own thread writes; it may be asleep
            let left = self.stopped_at.get().map(|at| (*at + STOP_WAIT).saturating_duration_since(Instant::now()));
            let ended = &self.turns.ended;
            order = match left {
                None => ended.wait(order).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => {
                    return Err(io::Error::new(ErrorKind::NotConnected, format!("{STOPPING}, and {NOT_TAKEN}")));
                }
                Some(left) => ended.wait_timeout(order, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        match outcome.get() {
            Some(Err(reason)) => Err(io::Error::new(ErrorKind::StorageFull, format!("the journal failed: {reason}"))),
            _ => Ok(id),
        }
    }

    /// The journal's own thread. With `--fsync` it does all of the writing; else only what no publisher should have to
    /// wait for: it checks the file's name, writes a new one step by step, and closes it.
    fn tend_journal(&self) {
        let (mut look_at, mut failed) = (Instant::now() + LOOK_TIME, None);
        while !enter(&self.turns.order).is_closed {
            let tended = catch_unwind(AssertUnwindSafe(|| self.take_turn(&mut look_at, &mut failed)));
            if tended.is_err() {
                self.log.line(Log::Info, format_args!("the journal's thread has panicked, and goes on"));
                thread::sleep(LOOK_TIME); // what made it panic may do so again: not in a loop
            }
        }
    }

    /// One turn of the journal's own thread. `failed` is what went wrong since the last one, when it had no journal.
    fn take_turn(&self, look_at: &mut Instant, failed: &mut Option<io::Error>) {
        let mut turn = Turn::new(&self.turns, self.wait_for_turn(*look_at));
        self.write_batch(&mut turn);
        if *look_at <= Instant::now() {
            *look_at = Instant::now() + LOOK_TIME;
            let looked = turn.journal().look_after(self.is_journal_failing(), &|boot| self.snapshot(boot));
            self.is_journal_failing.store(looked.is_err(), Relaxed);
        }
        if let Some(error) = failed.take() {
            turn.journal().abandon(&error);
        }
        let pause = turn.journal().step(&|boot| self.snapshot(boot));
        self.counters.journal_bytes.store(turn.journal().length(), Relaxed);
        let has_ended = self.is_stopping() && enter(&self.turns.order).unwritten.is_empty();
        if has_ended {
            return turn.close();
        }
        drop(turn); // the pause may take a while, in which others append
        *failed = pause.pass().err();
    }

    /// Waits until there is something to do, claims the next turn, and waits for the journal.
    fn wait_for_turn(&self, look_at: Instant) -> Journal {
        let mut order = enter(&self.turns.order);
        loop {
            let left = look_at.saturating_duration_since(Instant::now());
            let wants_step = order.journal.as_ref().is_some_and(Journal::wants_step);
            let has_events = self.config.fsync && !order.unwritten.is_empty();
            let has_work = wants_step || has_events || left.is_zero() || self.is_stopping();
            if has_work && let Some(journal) = order.journal.take() {
                order.is_claimed = false;
                return journal;
            }
            // Somebody is writing: claimed, the journal is ours next, and the end of that turn wakes us.
            order.is_claimed |= has_work;
            let left = if has_work { LOOK_TIME } else { left };
            order = self.turns.work.wait_timeout(order, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes what waits, one batch, and settles it. Numbering goes on meanwhile, for the order lock is not held while
    /// the disk works.
    fn write_batch(&self, turn: &mut Turn) {
        let (bytes, mut count) = enter(&self.turns.order).batch();
        if count == 0 {
            return;
        }
        let kept_bytes = enter(&self.history).block_bytes(); // tells the journal whether it has grown too large
        let result = turn.journal().append(&bytes, kept_bytes, &|boot| self.snapshot(boot));
        self.is_journal_failing.store(result.is_err(), Relaxed);
        let result = result.map_err(|error| error.to_string());
        self.counters.journal_bytes.store(turn.journal().length(), Relaxed);
        let mut order = enter(&self.turns.order);
        if result.is_err() {
            count = order.unwritten.len(); // all that wait: none may be published after one that was refused
        }
        for unwritten in order.take(count) {
            if result.is_ok() {
                self.hand_out(&unwritten.topic, &unwritten.event.parts(), unwritten.key.as_deref());
            }
            let _ = unwritten.outcome.set(result.clone());
        }
    }

    /// What a new journal has to hold, as it is kept now.
    fn snapshot(&self, boot: Option<&str>) -> Box<dyn Snapshot> {
        Box::new(Kept::new(&self.history, boot))
    }

    /// Keeps an event, and then queues it for every lane, in this order: leg 4 of the proof in `subscription.rs`.
    /// Called in the order of the ids, under the order lock; it may wait for room in a queue.
    fn hand_out(&self, topic: &str, event: &Parts, key: Option<&str>) {
        let followed = enter(&self.history).insert(topic, event, key);
        self.counters.published.fetch_add(1, Relaxed);
        if let Some(topic) = followed {
            let event = event.encode();
            self.lanes.iter().for_each(|lane| lane.send(&topic, &event));
        }
    }
}

/// Topic names need no escaping in paths, in lists with commas, in logs or in the journal.
pub fn check_topic(name: &str) -> io::Result<()> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._~-".contains(&b);
    if (1..=TOPIC_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits) {
        return Ok(());
    }
    invalid(format!("{} is no topic name: that is 1 to {TOPIC_NAME_BYTES} of A-Z a-z 0-9 . _ ~ -", quoted(name)))
}

fn stopped() -> io::Error {
    io::Error::new(ErrorKind::NotConnected, STOPPING)
}

/// Takes a journal into use, and fills the history with what is in it.
fn open_journal(path: &Path, history: &Arc<Mutex<History>>, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("the journal {}: {error}", path.display()));
    recover(path, history, config, log).map_err(named)
}

/// Restores the history from the journal, then makes the file fit to be appended to.
fn recover(path: &Path, shared: &Arc<Mutex<History>>, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let mut history = enter(shared);
    let (mut newest_event, mut newest_mark) = (Id::default(), Id::default());
    let mut take = |block: Block, bytes: &[u8]| {
        let newest = if block.is_mark { &mut newest_mark } else { &mut newest_event };
        *newest = block.id.max(*newest);
        restore(&mut history, block, bytes);
    };
    let (mut journal, found) = Journal::open(path, config, log, &mut take)?;
    history.remove_unused();
    if found.may_lack_events() {
        history.count_as_forgotten(after_what_is_lost(newest_event, newest_mark));
    }
    // The lock is given up before the file is repaired: a snapshot takes it.
    let Totals { topics, events, .. } = history.totals();
    log.line(Log::Info, format_args!("kept {events} events of {topics} topics"));
    let kept_bytes = history.block_bytes();
    drop(history);
    journal.repair(&found, kept_bytes, &|boot| Box::new(Kept::new(shared, boot)))?;
    Ok(journal)
}

/// An id above every event that may have been published and lost. All of them were published before now; so it is the
/// time of now, unless the clock was set back. Then the newest event in the file tells the time, and what was lost came
/// within `HELD_BACK_MS` of it.
///
/// A start that uses this puts ids ahead of the clock: its mark has such an id, and so have all events until the clock
/// passes it. If the next start added `HELD_BACK_MS` to that again, ids would run further ahead each time. So where no
/// event is later than the newest mark, the time is added to the clock, and the id need only be above the mark.
fn after_what_is_lost(newest_event: Id, newest_mark: Id) -> Id {
    let now = now_ms();
    let lost_until = match newest_event.ms > newest_mark.ms {
        true => newest_event.ms.saturating_add(HELD_BACK_MS),
        false => newest_mark.ms.min(now).saturating_add(HELD_BACK_MS).max(newest_mark.ms.saturating_add(1)),
    };
    Id { ms: now.max(lost_until), seq: 0 }
}
