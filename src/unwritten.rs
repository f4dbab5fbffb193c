//! What waits for the journal, and whose turn it is to write.
//!
//! Events, and the forgetting of topics, wait here in one order, that of the ids. Whoever may write takes the journal
//! out of its place, writes what waits without holding any lock, and puts it back; then all who wait look again.
//! However a turn ends, by a panic too, it must end like that: if the journal did not come back, every publisher would
//! wait for ever. An event that is lost on the way tells those who wait for it.

use crate::encoded::Encoded;
use crate::event::Id;
use crate::history::History;
use crate::journal::Journal;
use crate::sync::enter;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

/// What waits for the journal takes at most this much memory (and one event for each publisher), so that a stuck disk
/// does not fill it.
const UNWRITTEN_BYTES: usize = 16 * 1024 * 1024;

/// The journal is written in pieces of at most this much (or one event), in bytes: a copy of each is made in memory,
/// however many publishers wait.
const WRITE_BYTES: usize = 1024 * 1024;

/// What the order lock guards.
pub struct Order {
    /// The highest id that was given to an event. Ids of refused events are not given again.
    pub newest: Id,
    /// What the journal does not have yet, in the order of the ids.
    pub unwritten: VecDeque<Unwritten>,
    /// Their memory in bytes, for the bound in `hub.rs`.
    pub unwritten_bytes: usize,
    /// None while somebody writes it, without a journal, and once it is closed.
    pub journal: Option<Journal>,
    /// The journal's own thread has work to do: publishers must leave it the next turn, or a flood would keep it
    /// waiting.
    pub is_claimed: bool,
    /// The journal is closed, and stays so.
    pub is_closed: bool,
    /// How many wait for an engine's feed to reach an id.
    pub waiting: usize,
}

/// A change that has its place in the order, and has not happened yet.
pub struct Unwritten {
    pub change: Change,
    /// What the journal gets, in one write: of several events, one block for all of them.
    pub block: Encoded,
    pub outcome: Arc<Outcome>,
}

pub enum Change {
    /// An event for a topic; or one for each of several topics, published all or none, with neighbouring ids.
    Publish { events: Vec<(String, Encoded)>, key: Option<Arc<str>> },
    /// A topic forgets what it keeps, up to the event that was its newest.
    Forget { topic: String, up_to: Id },
}

impl Change {
    /// Its newest event of this topic, or the one up to which it forgets.
    fn newest_of(&self, name: &str) -> Option<Id> {
        match self {
            Change::Publish { events, .. } => events.iter().find(|(topic, _)| topic == name).map(|(_, event)| event.id),
            Change::Forget { topic, up_to } => Some(*up_to).filter(|_| topic == name),
        }
    }
}

impl Unwritten {
    /// What it takes of memory. A lone event shares its bytes with its block.
    fn memory(&self) -> usize {
        let events = match &self.change {
            Change::Publish { events, .. } if events.len() > 1 => &events[..],
            _ => &[],
        };
        self.block.memory() + events.iter().map(|(_, event)| event.memory()).sum::<usize>()
    }
}

/// Empty while an event waits for the journal; then how that ended, for all who wait for it: with a key, they are
/// several.
pub type Outcome = OnceLock<Result<(), String>>;

/// The id of an event, or up to which a topic forgets; and what that waits for, if it has not happened yet.
pub type Numbered = (Id, Option<Arc<Outcome>>);

impl Drop for Unwritten {
    fn drop(&mut self) {
        let _ = self.outcome.set(Err("whoever wrote it has panicked".into())); // unless it has one
    }
}

impl Order {
    pub fn new(newest: Id, journal: Option<Journal>) -> Order {
        let unwritten = VecDeque::new();
        Order { newest, unwritten, unwritten_bytes: 0, journal, is_claimed: false, is_closed: false, waiting: 0 }
    }

    /// Adds a change; the ids of its events must be the highest.
    pub fn push(&mut self, change: Change, block: Encoded) -> Arc<Outcome> {
        let outcome = Arc::new(Outcome::new());
        let unwritten = Unwritten { change, block, outcome: outcome.clone() };
        self.unwritten_bytes += unwritten.memory();
        self.unwritten.push_back(unwritten);
        outcome
    }

    /// Takes out the first `count` changes, which were written or have failed. Each must be given its outcome.
    pub fn take(&mut self, count: usize) -> Vec<Unwritten> {
        let taken: Vec<_> = self.unwritten.drain(..count).collect();
        self.unwritten_bytes -= taken.iter().map(Unwritten::memory).sum::<usize>();
        taken
    }

    /// The event that was published with this key, or still waits for the journal: else two publishers at once could
    /// both publish.
    pub fn find_key(&self, history: &History, topic: &str, key: &Arc<str>) -> Option<Numbered> {
        for Unwritten { change, outcome, .. } in self.unwritten.iter().rev() {
            match change {
                Change::Publish { key: known, .. } if known.as_ref() != Some(key) => {}
                Change::Publish { .. } => {
                    if let Some(id) = change.newest_of(topic) {
                        return Some((id, Some(outcome.clone())));
                    }
                }
                Change::Forget { topic: forgotten, .. } if forgotten == topic => return None, // the key with the event
                Change::Forget { .. } => {}
            }
        }
        history.id_of_key(topic, key).map(|id| (id, None))
    }

    /// Up to which id a topic has to forget, so that it keeps nothing; and what that waits for, where it is on its way
    /// already. None where it keeps nothing.
    pub fn find_newest(&self, history: &History, topic: &str) -> Option<Numbered> {
        let waiting = self.unwritten.iter().rev().find_map(|last| Some((last, last.change.newest_of(topic)?)));
        match waiting {
            Some((Unwritten { change: Change::Forget { .. }, outcome, .. }, id)) => Some((id, Some(outcome.clone()))),
            Some((_, id)) => Some((id, None)),
            None => history.newest_of(topic).map(|id| (id, None)),
        }
    }

    /// The bytes of what is to be written next, and how many changes they are. Nothing is taken out: that waits for the
    /// result.
    pub fn batch(&self) -> (Vec<u8>, usize) {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for unwritten in &self.unwritten {
            if count > 0 && bytes.len() + unwritten.block.layout.block_len() > WRITE_BYTES {
                break;
            }
            unwritten.block.block().iter().for_each(|part| bytes.extend_from_slice(part));
            count += 1;
        }
        (bytes, count)
    }
}

/// The order, and those who wait for their turn or for their events. Both sleep with the order lock given up.
pub struct Turns {
    pub order: Mutex<Order>,
    /// Notified when a turn has ended; publishers sleep here.
    pub ended: Condvar,
    /// The journal's own thread sleeps here.
    pub work: Condvar,
    /// How many publishers wait for the journal.
    pub waiting: AtomicUsize,
}

impl Turns {
    pub fn new(order: Mutex<Order>) -> Turns {
        Turns { order, ended: Condvar::new(), work: Condvar::new(), waiting: AtomicUsize::new(0) }
    }

    /// Whether another event may wait for the journal. Each publisher that waits has a thread, and others must not be
    /// locked out because a disk is stuck: so there are at most `most_waiting`.
    pub fn check_disk(&self, order: &Order, most_waiting: usize) -> io::Result<()> {
        if order.unwritten_bytes > UNWRITTEN_BYTES || self.waiting.load(Relaxed) >= most_waiting.max(1) {
            return Err(io::Error::new(ErrorKind::ResourceBusy, "the disk is too slow for what waits for the journal"));
        }
        Ok(())
    }
}

/// The journal while somebody writes it. Dropping it puts the journal back and wakes everybody.
pub struct Turn<'a> {
    turns: &'a Turns,
    journal: Option<Journal>,
}

impl<'a> Turn<'a> {
    /// Begins a turn with the journal that was just taken out of the order.
    pub fn new(turns: &'a Turns, journal: Journal) -> Turn<'a> {
        Turn { turns, journal: Some(journal) }
    }

    /// The journal. It may wait for the disk, so no lock may be held.
    pub fn journal(&mut self) -> &mut Journal {
        self.journal.as_mut().expect("it is taken out only at the end of a turn")
    }

    /// Closes the journal in order, and for good.
    pub fn close(mut self) {
        self.journal.take().into_iter().for_each(Journal::close);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut order = enter(&self.turns.order);
        if thread::panicking() {
            let count = order.unwritten.len();
            drop(order.take(count)); // some of them may be in the file, so that it is not trusted any more
            self.journal.iter_mut().for_each(Journal::distrust);
        }
        // A turn that ends without the journal has closed it, or has panicked over that: nobody may wait for it again.
        order.is_closed |= self.journal.is_none();
        order.journal = self.journal.take();
        self.turns.ended.notify_all();
        self.turns.work.notify_one();
    }
}

/// One that is counted for as long as it waits.
pub struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    pub fn new(count: &'a AtomicUsize) -> Waits<'a> {
        count.fetch_add(1, Relaxed);
        Waits(count)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
