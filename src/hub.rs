//! Publishing: give an event its id, write it down, hand it out.
//!
//! The order lock is held from numbering an event to the last lane's queue, but not while the journal is written; so
//! ids, journal, history and queues all have one order, and one cursor resumes any set of topics. Whoever finds the
//! journal idle writes it for all who wait, so that they share the cost and nobody is woken to write. With `--fsync`
//! the journal's own thread writes, which costs little beside a sync: a disk that is stuck never holds a publisher, who
//! can be answered when the server stops. A lane takes neither the order lock nor that of the history, so a publisher
//! that waits for room in its queue always gets it. An engine does all of that in its own way: it is asked without any
//! lock, and what it has taken is handed out when it comes back (`feed.rs`).

use crate::bell::Bells;
use crate::block::{encode_block, mark};
use crate::clock::now_ms;
use crate::config::Config;
use crate::connection::STOPPING;
use crate::encoded::{Begun, Encoded, Parts};
use crate::engine::{self, Engine, Entry};
use crate::event::{Event, Id, ids_from};
use crate::history::{History, TopicOverview};
use crate::journal::Journal;
use crate::kept::{Kept, open_journal};
use crate::lane::Lane;
use crate::log::Logger;
use crate::metrics::Counters;
use crate::names::check_topic;
use crate::presence::PresenceHook;
use crate::rewrite::Snapshot;
use crate::sync::{Mutex, MutexGuard, enter, wait};
use crate::unwritten::{Change, Numbered, Order, Turn, Turns, Waits};
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// When stopping, publishers whose events the disk has not taken are told so after this time, which leaves enough for
/// the answer to go out.
pub const STOP_WAIT: Duration = Duration::from_millis(400);

/// Said instead of a plain refusal: nobody knows yet, and only a key makes it safe to try again.
const NOT_TAKEN: &str =
    "the disk has not taken the event yet: it may be published, or not; publish it again with the same key";

/// Publishes events, from any thread. Cheap to clone; clones are the same hub. Each of its methods has an example.
#[derive(Clone)]
pub struct Hub {
    pub(crate) core: Arc<Core>,
}

impl Hub {
    /// Publishes one event to a topic. Returns its id once it is in the journal, if there is one, and on its way to
    /// every subscriber.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a topic or an event that is not allowed, [`ErrorKind::QuotaExceeded`] when all
    /// topic names are in use, [`ErrorKind::ResourceBusy`] when too much waits for the journal's disk,
    /// [`ErrorKind::StorageFull`] when the journal cannot be written (the message has the system's reason),
    /// [`ErrorKind::NotConnected`] once the server is stopping. Nothing is published then, with one exception: if the
    /// disk had not answered when the server stopped, the event may be published, and the message says so. With the
    /// same [`key`](Event::key), publishing it again is safe. Where an [`Engine`] numbers the events, its errors come
    /// here as they are, and `Ok` means that it has the event.
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
        if core.engine.is_some() {
            return Ok(core.publish_outside(vec![Entry::new(topic, event)])?[0]);
        }
        let numbered = core.number(&mut enter(&core.turns.order), topic, &event)?;
        core.settle(numbered)
    }
}

/// What all hubs share.
pub struct Core {
    /// As the system allows it (`system.rs`).
    pub config: Config,
    pub lanes: Vec<Lane>,
    pub counters: Arc<Counters>,
    /// Who in the program waits for a topic.
    pub bells: Bells,
    /// Who is told of subscribers that come and go.
    pub presence: Arc<PresenceHook>,
    /// Set without any lock: stopping must not stand in line behind all who want to publish.
    stopped_at: OnceLock<Instant>,
    /// The outermost lock, and the events that wait for the journal.
    pub turns: Turns,
    /// The last try to write the journal has failed.
    is_journal_failing: AtomicBool,
    /// Locked shortly, under the order lock or alone. A snapshot for the journal has a share of it.
    history: Arc<Mutex<History>>,
    /// Locked shortly, and nothing is locked under it.
    pub begun: Mutex<Begun>,
    /// Numbers the events in our place, and shows them to us through a `Feed`.
    pub engine: Option<Arc<dyn Engine>>,
    pub log: Arc<Logger>,
}

impl Core {
    /// Opens the journal, if there is one, and restores what is in it.
    ///
    /// # Errors
    /// The journal cannot be used: see [`Server::bind`](crate::Server::bind).
    pub fn new(
        config: Config,
        lanes: Vec<Lane>,
        counters: Arc<Counters>,
        log: &Arc<Logger>,
        engine: Option<Arc<dyn Engine>>,
    ) -> io::Result<Core> {
        // Ids begin above those of the journal, and an engine says itself what is missing. With neither, whatever an
        // earlier process had counts as forgotten.
        let begins_anew = config.journal.is_none() && engine.is_none();
        let base = if begins_anew { Id { ms: now_ms(), seq: 0 } } else { Id::default() };
        let history = Arc::new(Mutex::new(History::new(base, engine.is_some(), &config)));
        let journal = config.journal.as_deref().map(|path| open_journal(path, &history, &config, log)).transpose()?;
        counters.journal_bytes.store(journal.as_ref().map_or(0, Journal::length), Relaxed);
        let newest = enter(&history).newest(); // the next id is above all that the journal knows of
        let order = Mutex::new(Order::new(newest, journal));
        Ok(Core {
            lanes,
            counters,
            bells: Bells::default(),
            presence: Arc::default(),
            stopped_at: OnceLock::new(),
            turns: Turns::new(order),
            is_journal_failing: AtomicBool::new(false),
            history,
            engine,
            begun: Mutex::default(),
            log: log.clone(),
            config,
        })
    }

    /// Whether the server is stopping. It never starts again.
    pub fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// # Errors
    /// [`ErrorKind::NotConnected`]: it is stopping.
    pub fn check_running(&self) -> io::Result<()> {
        if self.is_stopping() { Err(io::Error::new(ErrorKind::NotConnected, STOPPING)) } else { Ok(()) }
    }

    /// Whether the last try to write the journal failed, so that publishing would be refused: then `/health` is 503.
    pub fn is_journal_failing(&self) -> bool {
        self.is_journal_failing.load(Relaxed)
    }

    /// Notes whether the journal can be written, and its length.
    pub fn note_journal(&self, is_failing: bool, length: u64) {
        self.is_journal_failing.store(is_failing, Relaxed);
        self.counters.journal_bytes.store(length, Relaxed);
    }

    /// From here on no event gets an id.
    pub fn stop(&self) {
        let _ = self.stopped_at.set(Instant::now()); // the first counts
        drop(enter(&self.turns.order)); // or whoever has just looked, and is falling asleep, would miss it
        self.turns.ended.notify_all();
        self.turns.work.notify_one();
        self.bells.close();
    }

    /// Has the lanes end all live streams, once the server stops. Under the order lock, so that each lane has
    /// everything before it that was published, and nothing after.
    pub fn end_streams(&self) {
        let _order = enter(&self.turns.order);
        let newest = self.history().newest();
        self.lanes.iter().for_each(|lane| lane.end_streams(newest));
    }

    /// The history, without what is too old. Whoever holds it may take a connection's state, but not the order lock.
    pub fn history(&self) -> MutexGuard<'_, History> {
        let mut history = enter(&self.history);
        history.expire();
        history
    }

    /// Publishes one event to each of these topics (each named once): to all of them, with neighbouring ids, or to
    /// none. A topic that keeps an event with this key stays as it is, and its id is that event's. Returns an id for
    /// each.
    ///
    /// # Errors
    /// As for [`Hub::publish`].
    pub fn publish_each(&self, topics: &[&str], event: &Event) -> io::Result<Vec<Id>> {
        if self.engine.is_some() {
            return self.publish_outside(topics.iter().map(|topic| Entry::new(*topic, event.clone())).collect());
        }
        let numbered = self.number_each(&mut enter(&self.turns.order), topics, event)?;
        numbered.into_iter().map(|event| self.settle(event)).collect()
    }

    /// Forgets what a topic keeps, in the order of the ids: what is published before this, and nothing after. Streams
    /// go on; whoever resumes from before the newest of it hears a gap. Returns the id of that newest event, if there
    /// was any, once the journal has it.
    ///
    /// # Errors
    /// As for [`Hub::publish`]. Nothing is forgotten then.
    pub fn forget(&self, topic: &str) -> io::Result<Option<Id>> {
        if self.engine.is_some() {
            return Ok(self.publish_outside(vec![Entry::forget(topic)])?.pop());
        }
        let numbered = self.number_forgetting(&mut enter(&self.turns.order), topic)?;
        let forgotten = numbered.map(|up_to| self.settle(up_to)).transpose();
        self.free_forgotten();
        forgotten
    }

    /// All topics that are in use, in the order of their names.
    pub fn topics(&self) -> Vec<TopicOverview> {
        let mut topics = self.history().overview();
        topics.sort_by(|a, b| a.name.cmp(&b.name)); // without the lock
        topics
    }

    /// Publishes events that follow one another, as the lines of a `PUT` do. Where one cannot be published, those after
    /// it are not either. Returns the ids of those that were.
    ///
    /// # Errors
    /// As for [`Hub::publish`], for the first that was not.
    pub fn publish_all(&self, topic: &str, events: Vec<Event>) -> (Vec<Id>, io::Result<()>) {
        if self.engine.is_some() {
            let published = self.publish_outside(events.into_iter().map(|event| Entry::new(topic, event)).collect());
            return published.map_or_else(|error| (Vec::new(), Err(error)), |ids| (ids, Ok(())));
        }
        let (mut numbered, mut published) = (Vec::new(), Vec::new());
        let mut number_all = || {
            // Held throughout: a failing journal then refuses the last of them, never one between two others.
            let mut order = enter(&self.turns.order);
            for event in &events {
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
            order = wait(&self.turns.ended, order, left);
        }
    }

    /// Gives an event its id. Without a journal, it is published at once; else it waits, and the caller must
    /// [`Core::settle`] it.
    fn number(&self, order: &mut Order, topic: &str, event: &Event) -> io::Result<Numbered> {
        self.check_open(event)?;
        check_topic(topic)?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
        // Under the order lock: of two publishers with one key, the second sees the first one's event.
        let history = self.history();
        if let Some(first) = key.as_ref().and_then(|key| order.find_key(&history, topic, key)) {
            return Ok(first);
        }
        history.check_room(&[topic])?;
        drop(history);
        self.turns.check_disk(order, self.config.threads / 4)?;
        Ok(self.place(order, topic, event, key))
    }

    /// The same for one event in several topics, in all of them or in none. Nothing may fail once the first is placed.
    fn number_each(&self, order: &mut Order, topics: &[&str], event: &Event) -> io::Result<Vec<Numbered>> {
        self.check_open(event)?;
        topics.iter().try_for_each(|topic| check_topic(topic))?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
        let history = self.history();
        let find = |topic: &&str| key.as_ref().and_then(|key| order.find_key(&history, topic, key));
        let found: Vec<Option<Numbered>> = topics.iter().map(find).collect();
        let new = topics.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(topic, _)| *topic);
        let new: Vec<&str> = new.collect();
        history.check_room(&new)?;
        drop(history);
        self.turns.check_disk(order, self.config.threads / 4)?;
        let mut placed = match self.config.journal.is_some() && new.len() > 1 {
            true => self.place_together(order, &new, event, key),
            false => new.iter().map(|topic| self.place(order, topic, event, key.clone())).collect(),
        }
        .into_iter();
        Ok(found.into_iter().filter_map(|found| found.or_else(|| placed.next())).collect())
    }

    /// Places an event that may be published.
    fn place(&self, order: &mut Order, topic: &str, event: &Event, key: Option<Arc<str>>) -> Numbered {
        let id = order.newest.next();
        order.newest = id;
        // Both ways make the same event; for the journal, its fields stand before the frame. The id is inside the
        // frame, so whoever numbers events must do so before this.
        if self.config.journal.is_none() {
            let frame = event.encode_with_id(id);
            self.hand_out(topic, &Parts::new(id, b"", frame.as_bytes()), key.as_deref());
            return (id, None);
        }
        let block = block_of(id, topic, event);
        (id, Some(order.push(Change::Publish { events: vec![(topic.into(), block.clone())], key }, block)))
    }

    /// Places an event in several topics. One block of the journal holds all of them, so that no crash can part them:
    /// it has the first one's id, from which the others are counted on (`kept.rs`).
    fn place_together(
        &self,
        order: &mut Order,
        topics: &[&str],
        event: &Event,
        key: Option<Arc<str>>,
    ) -> Vec<Numbered> {
        let ids: Vec<Id> = ids_from(order.newest.next()).take(topics.len()).collect();
        order.newest = ids.last().copied().unwrap_or(order.newest);
        let block = block_of(ids[0], &topics.join(","), event);
        let events = ids.iter().zip(topics).map(|(id, topic)| (topic.to_string(), block_of(*id, topic, event)));
        let outcome = order.push(Change::Publish { events: events.collect(), key }, block);
        ids.into_iter().map(|id| (id, Some(outcome.clone()))).collect()
    }

    /// Gives the forgetting of a topic its place in the order: just after the topic's newest event.
    fn number_forgetting(&self, order: &mut Order, topic: &str) -> io::Result<Option<Numbered>> {
        check_topic(topic)?;
        self.check_running()?;
        let history = self.history();
        let (newest, forgotten) = (order.find_newest(&history, topic), history.newest_forgotten(topic));
        drop(history);
        let Some((up_to, None)) = newest else { return Ok(newest) };
        if self.config.journal.is_none() {
            self.history().forget(topic, up_to);
            return Ok(newest);
        }
        self.turns.check_disk(order, self.config.threads / 4)?;
        let change = Change::Forget { topic: topic.into(), up_to };
        // The mark says as well what it may have lost before, with a crash: that may be newer than all that it keeps.
        let mark = mark("topic", Some(topic), up_to.max(forgotten));
        Ok(Some((up_to, Some(order.push(change, mark)))))
    }

    fn check_open(&self, event: &Event) -> io::Result<()> {
        self.check_running()?;
        event.check_for_topic(&self.config)
    }

    /// Waits until an event is in the journal and handed out, writing the journal itself where nobody else does.
    fn settle(&self, (id, outcome): Numbered) -> io::Result<Id> {
        let Some(outcome) = outcome else { return Ok(id) };
        let _waits = Waits::new(&self.turns.waiting);
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
                Some(left) => wait(ended, order, left),
            };
        }
        match outcome.get() {
            Some(Err(reason)) => Err(io::Error::new(ErrorKind::StorageFull, format!("the journal failed: {reason}"))),
            _ => Ok(id),
        }
    }

    /// Writes what waits, one batch, and settles it. Numbering goes on meanwhile, for the order lock is not held while
    /// the disk works.
    pub fn write_batch(&self, turn: &mut Turn) {
        let (bytes, mut count) = enter(&self.turns.order).batch();
        if count == 0 {
            return;
        }
        let kept_bytes = enter(&self.history).block_bytes(); // tells the journal whether it has grown too large
        let result = turn.journal().append(&bytes, kept_bytes, &|boot| self.snapshot(boot));
        self.note_journal(result.is_err(), turn.journal().length());
        let result = result.map_err(|error| error.to_string());
        let mut order = enter(&self.turns.order);
        if result.is_err() {
            count = order.unwritten.len(); // all that wait: none may be published after one that was refused
        }
        for unwritten in order.take(count) {
            if result.is_ok() {
                self.make_happen(&unwritten.change);
            }
            let _ = unwritten.outcome.set(result.clone());
        }
    }

    /// What a new journal has to hold, as it is kept now.
    pub fn snapshot(&self, boot: Option<&str>) -> Box<dyn Snapshot> {
        Box::new(Kept::new(&self.history, boot))
    }

    /// Publishes through the engine. Returns once it has the entries; they are shown when they come back from it.
    fn publish_outside(&self, entries: Vec<Entry>) -> io::Result<Vec<Id>> {
        for entry in &entries {
            check_topic(&entry.topic)?;
            self.check_open(entry.event.as_ref().unwrap_or(&Event::default()))?;
        }
        let mut published: Vec<_> = entries.iter().filter(|entry| !entry.is_forget()).map(Entry::topic).collect();
        published.dedup(); // the lines of a `PUT` are all of one topic
        self.history().check_room(&published)?;
        self.engine.as_ref().map_or(Ok(Vec::new()), |engine| engine::publish(&**engine, &entries))
    }

    /// Called in the order of the changes, under the order lock.
    fn make_happen(&self, change: &Change) {
        match change {
            Change::Publish { events, key } => {
                events.iter().for_each(|(topic, event)| self.hand_out(topic, &event.parts(), key.as_deref()));
            }
            // What stands in a lane's queue goes out all the same; whoever falls behind before it has that hears a gap.
            Change::Forget { topic, up_to } => self.history().forget(topic, *up_to),
        }
    }

    /// Frees the memory of what was forgotten. Not under the order lock, since it may take a while.
    pub fn free_forgotten(&self) {
        while enter(&self.history).expire() {} // others may have the lock in between
    }

    /// Keeps an event, and then queues it for every lane, in this order: leg 4 of the proof in `subscription.rs`.
    /// Called in the order of the ids, under the order lock; it may wait for room in a queue.
    pub fn hand_out(&self, topic: &str, event: &Parts, key: Option<&str>) {
        let (followed, is_over) = enter(&self.history).insert(topic, event, key);
        while is_over && enter(&self.history).fit() {} // others may have the lock in between
        self.counters.published.fetch_add(1, Relaxed);
        if let Some(topic) = followed {
            let event = event.encode();
            self.lanes.iter().for_each(|lane| lane.send(&topic, &event));
            self.bells.ring(&topic);
        }
    }
}

/// What the journal has of an event in this topic, or in several with commas between them.
fn block_of(id: Id, topics: &str, event: &Event) -> Encoded {
    encode_block(id, &[("topic", Some(topics)), ("key", event.key.as_deref())], &event.encode_with_id(id))
}
