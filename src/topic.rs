//! What one topic keeps: its newest events, and how far it has forgotten.
//!
//! Events stand in the order of their ids, and of their moments. They go from the front, so what was forgotten is one
//! id: whoever has seen that much has missed nothing.

use crate::encoded::Encoded;
use crate::event::Id;
use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;

/// Bytes that a kept event costs beside its own: its part of the queue, its counted pointer, its part of the indexes.
pub const EVENT_OVERHEAD: usize = 136;
/// The same for a key, whose text is counted twice: in the map and in the event.
const KEY_OVERHEAD: usize = 96;

#[derive(Default)]
pub struct Topic {
    pub name: Arc<str>,
    pub events: VecDeque<KeptEvent>,
    /// What `events` cost ([`KeptEvent::cost`]).
    pub bytes: usize,
    /// The event of each key that is kept; forgotten with it.
    pub keys: HashMap<Arc<str>, Id>,
    pub forgotten: Point,
    pub subscribers: usize,
}

pub struct KeptEvent {
    pub event: Encoded,
    pub key: Option<Arc<str>>,
    pub moment_ms: u64,
}

/// An id and its moment.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    pub id: Id,
    pub moment_ms: u64,
}

/// What a topic has forgotten all at once. To free it takes a while, so it is dropped once no lock is held.
#[derive(Default)]
pub struct Gone {
    pub events: VecDeque<KeptEvent>,
    pub bytes: usize,
    _keys: HashMap<Arc<str>, Id>,
}

impl Topic {
    /// Keeps an event, whose id is the highest.
    pub fn push(&mut self, kept: KeptEvent) {
        self.keys.extend(kept.key.clone().map(|key| (key, kept.event.id)));
        self.bytes += kept.cost();
        self.events.push_back(kept);
    }

    /// Forgets its oldest event, and returns what that was.
    pub fn pop(&mut self) -> Option<(Point, usize)> {
        let kept = self.events.pop_front()?;
        let (point, cost) = (kept.point(), kept.cost());
        self.bytes -= cost;
        self.forgotten = self.forgotten.max(point);
        if let Some(key) = kept.key.filter(|key| self.keys.get(key) == Some(&point.id)) {
            self.keys.remove(&key);
        }
        // Room that a busier hour has reserved is given back: the budget does not count it.
        if self.events.len() * 4 < self.events.capacity() {
            self.events.shrink_to(self.events.len() * 2);
            self.keys.shrink_to(self.keys.len() * 2);
        }
        Some((point, cost))
    }

    /// Forgets all events up to `id`.
    pub fn forget(&mut self, id: Id) -> Gone {
        let count = self.events.partition_point(|kept| kept.event.id <= id);
        let rest = self.events.split_off(count);
        let (events, keys) = (mem::replace(&mut self.events, rest), mem::take(&mut self.keys));
        self.keys = self.events.iter().filter_map(|kept| Some((kept.key.clone()?, kept.event.id))).collect();
        let bytes = events.iter().map(KeptEvent::cost).sum();
        self.bytes -= bytes;
        self.forgotten = events.back().map_or(self.forgotten, |last| self.forgotten.max(last.point()));
        Gone { events, bytes, _keys: keys }
    }

    /// The kept events after `cursor`, oldest first.
    pub fn after(&self, cursor: Id) -> impl Iterator<Item = &Encoded> + Clone {
        let first = self.events.partition_point(|kept| kept.event.id <= cursor);
        self.events.range(first..).map(|kept| &kept.event)
    }

    /// The first kept event since that moment.
    pub fn first_since(&self, moment_ms: u64) -> Option<Id> {
        let first = self.events.partition_point(|kept| kept.moment_ms < moment_ms);
        self.events.get(first).map(|kept| kept.event.id)
    }
}

impl KeptEvent {
    pub fn point(&self) -> Point {
        Point { id: self.event.id, moment_ms: self.moment_ms }
    }

    pub fn cost(&self) -> usize {
        EVENT_OVERHEAD + self.event.memory() + self.key.as_ref().map_or(0, |key| 2 * key.len() + KEY_OVERHEAD)
    }
}
