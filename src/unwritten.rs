//! What waits for the journal, and whose turn it is to write.
//!
//! Events wait here in the order of their ids. Whoever may write takes the journal out of its place, writes what waits
//! without holding any lock, and puts it back; then all who wait look again. However a turn ends, by a panic too, it
//! must end like that: if the journal did not come back, every publisher would wait for ever. An event that is lost on
//! the way tells those who wait for it.

use crate::encoded::Encoded;
use crate::event::Id;
use crate::history::History;
use crate::journal::Journal;
use crate::sync::enter;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

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
}

/// An event that has its id and is not published yet.
pub struct Unwritten {
    pub topic: String,
    pub event: Encoded,
    pub key: Option<Arc<str>>,
    pub outcome: Arc<Outcome>,
}

/// Empty while an event waits for the journal; then how that ended, for all who wait for it: with a key, they are
/// several.
pub type Outcome = OnceLock<Result<(), String>>;

/// An event's id, and what it waits for, if it is not published yet.
pub type Numbered = (Id, Option<Arc<Outcome>>);

impl Drop for Unwritten {
    fn drop(&mut self) {
        let _ = self.outcome.set(Err("whoever wrote it has panicked".into())); // unless it has one
    }
}

impl Order {
    pub fn new(newest: Id, journal: Option<Journal>) -> Order {
        let unwritten = VecDeque::new();
        Order { newest, unwritten, unwritten_bytes: 0, journal, is_claimed: false, is_closed: false }
    }

    /// Adds an event; its id must be the highest.
    pub fn push(&mut self, unwritten: Unwritten) {
        self.unwritten_bytes += unwritten.event.memory();
        self.unwritten.push_back(unwritten);
    }

    /// Takes out the first `count` events, which were written or have failed. Each must be given its outcome.
    pub fn take(&mut self, count: usize) -> Vec<Unwritten> {
        let taken: Vec<_> = self.unwritten.drain(..count).collect();
        self.unwritten_bytes -= taken.iter().map(|unwritten| unwritten.event.memory()).sum::<usize>();
        taken
    }

    /// The event that was published with this key, or still waits for the journal: else two publishers at once could
    /// both publish.
    pub fn find_key(&self, history: &History, topic: &str, key: &Arc<str>) -> Option<Numbered> {
        if let Some(id) = history.id_of_key(topic, key) {
            return Some((id, None));
        }
        let first = self.unwritten.iter().find(|first| first.topic == topic && first.key.as_ref() == Some(key))?;
        Some((first.event.id, Some(first.outcome.clone())))
    }

    /// The bytes of what is to be written next, and how many events they are. Nothing is taken out: that waits for the
    /// result.
    pub fn batch(&self) -> (Vec<u8>, usize) {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for unwritten in &self.unwritten {
            if count > 0 && bytes.len() + unwritten.event.layout.block_len() > WRITE_BYTES {
                break;
            }
            unwritten.event.block().iter().for_each(|part| bytes.extend_from_slice(part));
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
