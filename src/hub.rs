//! Publishing: number an event, write it down, show it.
//!
//! The order lock is held from numbering an event to the last lane's queue, but not while the journal is written; so ids,
//! journal, history and queues all have one order. Whoever finds the journal at rest writes it for all who wait, so that
//! they share the cost of it. A lane takes neither the order lock nor that of the history, so a publisher that waits for
//! room in its queue is never waited for in turn.

use crate::block::{Block, encode_block};
use crate::clock::now_ms;
use crate::config::{Config, Log};
use crate::connection::STOPPING;
use crate::encoded::Encoded;
use crate::event::{Event, Id};
use crate::history::{History, Totals};
use crate::journal::Journal;
use crate::lane::{ToLane, send_event};
use crate::log::Logger;
use crate::metrics::Counters;
use crate::sync::{enter, try_enter};
use crate::text::{invalid, quoted};
use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

const TOPIC_NAME_BYTES: usize = 64;
const KEY_BYTES: usize = 128;
/// What waits for the journal takes at most this much (and one event a publisher), so that a stuck disk does not fill
/// memory.
const UNWRITTEN_BYTES: usize = 16 * 1024 * 1024;
/// The journal is written in pieces of at most this much (or one event), however many publishers wait.
const WRITE_BYTES: usize = 1024 * 1024;
/// More than the kernel holds back what is to be written, which is 30 s and a little.
/// <https://docs.kernel.org/admin-guide/sysctl/vm.html#dirty-expire-centisecs>
const HELD_BACK_MS: u64 = 60_000;

/// Publishes events, from any thread. Cheap to clone; clones are the same hub.
#[derive(Clone)]
pub struct Hub {
    pub(crate) core: Arc<Core>,
}

impl Hub {
    /// Publishes one event to a topic, and returns its id once the journal has it, if there is one, and every lane's
    /// queue.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a topic or an event that may not be, [`ErrorKind::QuotaExceeded`] when all topic
    /// names are in use, [`ErrorKind::ResourceBusy`] when too much waits for the journal's disk,
    /// [`ErrorKind::StorageFull`] when the journal cannot be written (the message has the system's reason),
    /// [`ErrorKind::NotConnected`] once the server is stopping. Nothing is published then.
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

/// What all hubs share.
pub struct Core {
    pub config: Config,
    pub lanes: Vec<Sender<ToLane>>,
    pub counters: Arc<Counters>,
    /// Set without any lock: stopping must not stand in line behind all who want to publish.
    stopping: AtomicBool,
    /// None without a journal, and once the server has stopped.
    journal: Mutex<Option<Journal>>,
    order: Mutex<Order>,
    /// Notified when a thread has finished writing the journal, so that those who wait for their events look again.
    written: Condvar,
    history: Mutex<History>,
}

struct Order {
    /// The highest id that was given to an event.
    newest: Id,
    /// What the journal does not have yet, in the order of the ids.
    unwritten: VecDeque<Unwritten>,
    unwritten_bytes: usize,
}

struct Unwritten {
    topic: String,
    event: Encoded,
    key: Option<Arc<str>>,
    outcome: Arc<Outcome>,
}

/// Empty while an event waits for the journal; then how that ended, for all who wait for it.
type Outcome = OnceLock<Result<(), String>>;

/// An event's id, and what it waits for, if it is not published yet.
type Numbered = (Id, Option<Arc<Outcome>>);

impl Core {
    /// Takes the journal into use, if there is one.
    pub fn new(
        config: Config,
        lanes: Vec<Sender<ToLane>>,
        counters: Arc<Counters>,
        log: &Arc<Logger>,
    ) -> io::Result<Core> {
        // Ids begin above those of the journal; without one, whatever an earlier process had counts as forgotten.
        let base = if config.journal.is_none() { Id { ms: now_ms(), seq: 0 } } else { Id::default() };
        let mut history = History::new(base, &config);
        let open = |path| open_journal(path, &mut history, &config, log);
        let journal = config.journal.as_deref().map(open).transpose()?;
        counters.journal_bytes.store(journal.as_ref().map_or(0, Journal::length), Relaxed);
        Ok(Core {
            lanes,
            counters,
            stopping: AtomicBool::new(false),
            journal: Mutex::new(journal),
            order: Mutex::new(Order { newest: history.newest(), unwritten: VecDeque::new(), unwritten_bytes: 0 }),
            written: Condvar::new(),
            history: Mutex::new(history),
            config,
        })
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    /// From here on nothing is numbered. False if it had been called before.
    pub fn stop(&self) -> bool {
        !self.stopping.swap(true, SeqCst)
    }

    /// The history, without what is too old.
    pub fn history(&self) -> MutexGuard<'_, History> {
        let mut history = enter(&self.history);
        history.expire();
        history
    }

    /// Publishes events that follow one another. Where one cannot be, nor are those after it.
    pub fn publish_all(&self, topic: &str, events: Vec<Event>) -> (Vec<Id>, io::Result<()>) {
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

    /// Whether this may be published, but for its topic.
    pub fn check(&self, event: &Event) -> io::Result<()> {
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

    /// Once nothing waits for the journal any more, another server may have it, though the program still holds a hub. Where
    /// the disk takes longer than stopping may, whoever is writing closes it afterwards.
    pub fn close_journal(&self, deadline: Instant) {
        let mut order = enter(&self.order);
        loop {
            if order.unwritten.is_empty()
                && let Some(mut journal) = try_enter(&self.journal)
            {
                *journal = None;
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            order = self.written.wait_timeout(order, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives an event its id. Without a journal, it is published at once.
    fn number(&self, order: &mut Order, topic: &str, event: Event) -> io::Result<Numbered> {
        if self.is_stopping() {
            return Err(stopped());
        }
        check_topic(topic)?;
        self.check(&event)?;
        let key: Option<Arc<str>> = event.key.as_deref().map(Arc::from);
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
        let frame = event.encode(Some(&id));
        if self.config.journal.is_none() {
            self.show(topic, Encoded::new(id, frame), key);
            return Ok((id, None));
        }
        let event = encode_block(id, &[("topic", Some(topic)), ("key", key.as_deref())], &frame);
        let outcome = Arc::new(Outcome::new());
        order.unwritten_bytes += event.block.len();
        order.unwritten.push_back(Unwritten { topic: topic.into(), event, key, outcome: outcome.clone() });
        Ok((id, Some(outcome)))
    }

    /// Waits until an event is in the journal and shown.
    fn settle(&self, (id, outcome): Numbered) -> io::Result<Id> {
        let Some(outcome) = outcome else { return Ok(id) };
        let mut order = enter(&self.order);
        while outcome.get().is_none() {
            // Under the order lock, so that the journal cannot come to rest between finding it taken and falling
            // asleep.
            order = match try_enter(&self.journal) {
                Some(mut journal) => {
                    drop(order);
                    self.write_for_all(&mut journal)?
                }
                None => self.written.wait(order).unwrap_or_else(PoisonError::into_inner),
            };
        }
        match outcome.get() {
            Some(Err(reason)) => Err(io::Error::new(ErrorKind::StorageFull, format!("the journal failed: {reason}"))),
            _ => Ok(id),
        }
    }

    /// Writes what waits for the journal, shows it, and wakes all who wait.
    fn write_for_all(&self, journal: &mut Option<Journal>) -> io::Result<MutexGuard<'_, Order>> {
        self.write_batch(journal.as_mut().ok_or_else(stopped)?); // it is closed only when nothing waits
        let order = enter(&self.order);
        if self.is_stopping() && order.unwritten.is_empty() {
            *journal = None; // stopping found it taken, and may not have waited for so long
        }
        self.written.notify_all();
        Ok(order)
    }

    /// Numbering goes on meanwhile: the order lock is not held while the file is written.
    fn write_batch(&self, journal: &mut Journal) {
        let (bytes, mut count) = enter(&self.order).batch();
        let kept_bytes = enter(&self.history).block_bytes();
        let result = journal.append(&bytes, kept_bytes, &|boot| snapshot(&enter(&self.history), boot));
        let result = result.map_err(|error| error.to_string());
        self.counters.journal_bytes.store(journal.length(), Relaxed);
        let mut order = enter(&self.order);
        if result.is_err() {
            count = order.unwritten.len(); // what came later must not be published before it
        }
        let settled: Vec<_> = order.unwritten.drain(..count).collect();
        for unwritten in settled {
            order.unwritten_bytes -= unwritten.event.block.len();
            if result.is_ok() {
                self.show(&unwritten.topic, unwritten.event, unwritten.key);
            }
            let _ = unwritten.outcome.set(result.clone());
        }
    }

    /// Keeps an event, and hands it to every lane. Called in the order of the ids, under the order lock.
    fn show(&self, topic: &str, event: Encoded, key: Option<Arc<str>>) {
        let followed = enter(&self.history).insert(topic, event.clone(), key);
        self.counters.published.fetch_add(1, Relaxed);
        if let Some(topic) = followed {
            self.lanes.iter().for_each(|lane| send_event(lane, &topic, &event));
        }
    }
}

impl Order {
    /// The event that was published with this key, or still waits for the journal.
    fn find_key(&self, history: &History, topic: &str, key: &Arc<str>) -> Option<Numbered> {
        if let Some(id) = history.id_of_key(topic, key) {
            return Some((id, None));
        }
        let first = self.unwritten.iter().find(|first| first.topic == topic && first.key.as_ref() == Some(key))?;
        Some((first.event.id, Some(first.outcome.clone())))
    }

    /// The bytes of what is written next, and how many events they are.
    fn batch(&self) -> (Vec<u8>, usize) {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for unwritten in &self.unwritten {
            if count > 0 && bytes.len() + unwritten.event.block.len() > WRITE_BYTES {
                break;
            }
            bytes.extend_from_slice(&unwritten.event.block);
            count += 1;
        }
        (bytes, count)
    }
}

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
fn open_journal(path: &Path, history: &mut History, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("the journal {}: {error}", path.display()));
    recover(path, history, config, log).map_err(named)
}

fn recover(path: &Path, history: &mut History, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let (mut newest_event, mut newest_mark) = (Id::default(), Id::default());
    let mut take = |block: Block, bytes: &[u8]| {
        let newest = if block.is_mark { &mut newest_mark } else { &mut newest_event };
        *newest = block.id.max(*newest);
        restore(history, block, bytes);
    };
    let (mut journal, found) = Journal::open(path, config, log, &mut take)?;
    history.remove_unused();
    if found.may_lack_events() {
        history.count_as_forgotten(after_what_is_lost(newest_event, newest_mark));
    }
    let Totals { topics, events, .. } = history.totals();
    log.line(Log::Info, format_args!("kept {events} events of {topics} topics"));
    journal.repair(&found, history.block_bytes(), &|boot| snapshot(history, boot))?;
    Ok(journal)
}

/// An id above all that may have been published and lost. What came before, or stood there, is not known, so that is up to now;
/// where the clock has gone back, also for a while after the newest event. But this rule itself puts ids ahead of the clock:
/// they have the millisecond of the mark that a start has written, until the clock passes it. To add the while again at each
/// start would put them ahead without end.
fn after_what_is_lost(newest_event: Id, newest_mark: Id) -> Id {
    let now = now_ms();
    let lost_until = match newest_event.ms > newest_mark.ms {
        true => newest_event.ms.saturating_add(HELD_BACK_MS),
        false => newest_mark.ms.min(now).saturating_add(HELD_BACK_MS).max(newest_mark.ms.saturating_add(1)),
    };
    Id { ms: now.max(lost_until), seq: 0 }
}

/// Takes in a block of the journal.
pub fn restore(history: &mut History, block: Block, bytes: &[u8]) {
    let Block { id, topic, key, is_mark, frame_at, .. } = block;
    match topic {
        Some(name) if !is_mark => {
            history.restore(name, Encoded { id, block: bytes.into(), frame_at }, key.map(Arc::from));
        }
        _ => history.restore_forgotten(topic, id),
    }
}

/// What a journal holds that was written anew: what each topic has forgotten, and every kept event.
pub fn snapshot(history: &History, boot: Option<&str>) -> Vec<Encoded> {
    let mark = |field, value, id| encode_block(id, &[(field, value)], &format!("id: {id}\n\n"));
    let (topics, others) = history.all_forgotten();
    let mut blocks = vec![mark("boot", boot, others)];
    blocks.extend(topics.iter().map(|(name, forgotten)| mark("topic", Some(name), *forgotten)));
    blocks.append(&mut history.all_events());
    blocks
}
