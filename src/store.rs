//! The kept events themselves, whatever their topics: where their bytes are, what they cost, and which keys they have.
//!
//! To free one takes some 100 ns to 2 µs, and a topic that is deleted may have kept a million. So a topic gives them up
//! all at once, after which nobody finds them, and they are freed in pieces; until then they count.

use crate::cells::{Cells, Chain};
use crate::encoded::Parts;
use crate::entry::Entry;
use crate::event::Id;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

pub struct Store {
    /// All kept events (`entry.rs`).
    pub cells: Cells,
    /// The event of each key that is kept, by the hash of its topic's name and the key; forgotten with it. Should two
    /// keys have one hash, which nobody can bring about, the earlier one is forgotten early.
    keys: HashMap<u64, Id>,
    hasher: RandomState,
    /// What topics have given up, and is to be freed yet.
    given_up: Vec<(Arc<str>, VecDeque<Chain>)>,
    pub events: usize,
    /// As [`Entry::cost`] counts.
    pub bytes: usize,
    /// How many bytes of the journal they take.
    pub block_bytes: u64,
}

impl Store {
    /// Room for about so many bytes.
    pub fn new(bytes: usize) -> Store {
        let (keys, hasher, given_up) = Default::default();
        Store { cells: Cells::new(bytes), keys, hasher, given_up, events: 0, bytes: 0, block_bytes: 0 }
    }

    pub fn keep(&mut self, name: &str, event: &Parts, key: Option<&str>, moment_ms: u64) -> (Entry, Chain) {
        let (entry, chain) = Entry::keep(&mut self.cells, event, key.unwrap_or_default(), moment_ms);
        if let Some(key) = key.filter(|key| !key.is_empty()) {
            self.keys.insert(self.hasher.hash_one((name, key)), event.id);
        }
        self.events += 1;
        self.bytes += entry.cost();
        self.block_bytes += entry.layout.block_len() as u64;
        (entry, chain)
    }

    /// The id of the event that was kept with this key. It may be given up by now.
    pub fn id_of_key(&self, name: &str, key: &str) -> Option<Id> {
        self.keys.get(&self.hasher.hash_one((name, key))).copied()
    }

    /// Takes events over that a topic does not keep any more.
    pub fn give_up(&mut self, name: Arc<str>, events: VecDeque<Chain>) {
        self.given_up.push((name, events));
    }

    /// Whether anything is to be freed yet.
    pub fn has_given_up(&self) -> bool {
        !self.given_up.is_empty()
    }

    /// Frees what was given up, at most so many events. Returns how many.
    pub fn free_some(&mut self, most: usize) -> usize {
        let mut freed = 0;
        while freed < most
            && let Some((name, events)) = self.given_up.last_mut()
        {
            let (name, first) = (name.clone(), events.pop_front());
            if events.is_empty() {
                self.given_up.pop();
            }
            first.into_iter().for_each(|chain| self.free(&name, chain));
            freed += 1;
        }
        freed
    }

    /// Frees an event that its topic does not keep any more, and its key, unless a later event has that.
    pub fn free(&mut self, name: &str, chain: Chain) {
        let entry = Entry::of(&self.cells, &chain);
        self.events -= 1;
        self.bytes -= entry.cost();
        self.block_bytes -= entry.layout.block_len() as u64;
        if let Some(key) = entry.key(&self.cells, &chain) {
            let hash = self.hasher.hash_one((name, &*key));
            if self.keys.get(&hash) == Some(&entry.point.id) {
                self.keys.remove(&hash);
            }
            if self.keys.len() * 4 < self.keys.capacity() {
                self.keys.shrink_to(self.keys.len() * 2);
            }
        }
        self.cells.remove(chain);
    }
}
