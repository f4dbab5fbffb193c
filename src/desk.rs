//! What waits for the clerk: the thread that does what a lane may not, since a lane never waits.
//!
//! Lanes lay down whom they let go, the pool rings where somebody waits for a thread, and each subscriber leaves the
//! moment at which it is due. Nobody waits to lay something down: the list has no bound but one, that each connection
//! lies here at most once. It does, because only who changes its phase from live lays it down, under the state's lock.

use crate::connection::Connection;
use crate::sync::{Condvar, Mutex, enter, wait};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// What the clerk takes at once: where thousands are let go, it must still look at the threads meanwhile.
const TAKEN_AT_ONCE: usize = 1_000;

#[derive(Default)]
pub struct Desk {
    papers: Mutex<Papers>,
    bell: Condvar,
}

#[derive(Default)]
struct Papers {
    let_go: VecDeque<Arc<Connection>>,
    /// When each subscriber's time is over, with its serial number.
    due: BTreeMap<(Instant, u64), Arc<Connection>>,
    /// Somebody has rung.
    has_rung: bool,
    is_closed: bool,
}

/// What the clerk takes from its desk.
pub struct Work {
    /// Queued, or closed.
    pub let_go: Vec<Arc<Connection>>,
    /// Their time is over.
    pub due: Vec<Arc<Connection>>,
}

impl Desk {
    /// Lays down whom a lane let go. Never waits; may be called under the connection's state.
    pub fn let_go(&self, c: Arc<Connection>) {
        let mut papers = enter(&self.papers);
        papers.let_go.push_back(c);
        if papers.let_go.len() == 1 {
            self.bell.notify_one();
        }
    }

    /// Has the clerk look at everything now.
    pub fn ring(&self) {
        let mut papers = enter(&self.papers);
        if !papers.has_rung {
            papers.has_rung = true;
            self.bell.notify_one();
        }
    }

    /// From `at` on the clerk ends this subscriber.
    pub fn note_due(&self, at: Instant, c: Arc<Connection>) {
        let mut papers = enter(&self.papers);
        papers.due.insert((at, c.serial), c);
        if papers.due.first_key_value().is_some_and(|((first, _), _)| *first == at) {
            self.bell.notify_one(); // it sleeps until a later moment
        }
    }

    /// The subscriber has ended before.
    pub fn forget_due(&self, at: Instant, serial: u64) {
        enter(&self.papers).due.remove(&(at, serial));
    }

    /// The clerk is to end: the server has stopped, and nobody needs what still lies here.
    pub fn close(&self) {
        *enter(&self.papers) = Papers { is_closed: true, ..Papers::default() };
        self.bell.notify_one();
    }

    /// Waits until something is here or due, somebody has rung, or the time has come. None once it is closed.
    pub fn wait(&self, until: Instant) -> Option<Work> {
        let mut papers = enter(&self.papers);
        loop {
            let now = Instant::now();
            let due_at = papers.due.first_key_value().map(|((at, _), _)| *at);
            let wake_at = due_at.map_or(until, |at| at.min(until));
            if papers.is_closed {
                return None;
            } else if !papers.let_go.is_empty() || papers.has_rung || wake_at <= now {
                papers.has_rung = false;
                let mut due = Vec::new();
                while let Some(first) = papers.due.first_entry().filter(|first| first.key().0 <= now) {
                    due.push(first.remove());
                }
                let count = papers.let_go.len().min(TAKEN_AT_ONCE);
                return Some(Work { let_go: papers.let_go.drain(..count).collect(), due });
            }
            papers = wait(&self.bell, papers, wake_at.duration_since(now));
        }
    }
}
