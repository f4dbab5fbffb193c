//! Between the journal's blocks and the history: restoring blocks at the start, and giving out what is kept for a new
//! file.
//!
//! The journal knows no history and the history no blocks, so that each can be read, and replaced, alone; what one must
//! know of the other is here. A snapshot is taken in steps, each in one short hold of the history's lock, since
//! publishing and replays wait for that lock.

use crate::block::{Block, encode_block};
use crate::encoded::Parts;
use crate::event::Id;
use crate::history::{History, Walk};
use crate::rewrite::Snapshot;
use crate::sync::enter;
use std::sync::{Arc, Mutex};

/// How much memory one step of a snapshot takes, which holds the history's lock for about half a millisecond.
const STEP_BYTES: usize = 256 * 1024;
/// How many marks one step gives.
const STEP_MARKS: usize = 1_000;

/// Restores one block of the journal. `bytes` are the whole block, and the blocks come in the order of the file.
pub fn restore(history: &mut History, block: Block, bytes: &[u8]) {
    let Block { id, topic, key, is_mark, frame_at, .. } = block;
    match topic {
        Some(name) if !is_mark => {
            let (fields, frame) = bytes.split_at(frame_at);
            history.restore(name, &Parts::new(id, fields, frame), key);
        }
        _ => history.restore_newest_forgotten(topic, id),
    }
}

/// What a journal that is written anew holds: first what each topic has forgotten, then every event that is still kept
/// when the walk reaches it.
pub struct Kept {
    history: Arc<Mutex<History>>,
    /// For the first block.
    boot: Option<String>,
    /// The newest id that topics which keep nothing have forgotten; none once the first block was given.
    others: Option<Id>,
    /// The topics that kept events when the snapshot began, with the newest id that each had forgotten.
    topics: Vec<(Arc<str>, Id)>,
    /// How many of the topics' marks were given.
    marked: usize,
    walk: Walk,
}

impl Kept {
    /// Begins a snapshot, in one hold of the lock. What is published after this is not in it: the journal copies that.
    pub fn new(shared: &Arc<Mutex<History>>, boot: Option<&str>) -> Kept {
        let history = enter(shared);
        let (topics, others) = history.newest_forgotten_of_each();
        let (boot, walk) = (boot.map(String::from), history.walk());
        Kept { history: shared.clone(), boot, others: Some(others), topics, marked: 0, walk }
    }
}

impl Snapshot for Kept {
    fn next(&mut self) -> Vec<u8> {
        if let Some(others) = self.others.take() {
            return mark("boot", self.boot.as_deref(), others);
        }
        let topics: Vec<_> = self.topics[self.marked..].iter().take(STEP_MARKS).collect();
        self.marked += topics.len();
        if !topics.is_empty() {
            return topics.into_iter().flat_map(|(name, id)| mark("topic", Some(name), *id)).collect();
        }
        enter(&self.history).walk_on(&mut self.walk, STEP_BYTES)
    }

    fn last(&mut self) -> Vec<u8> {
        let history = enter(&self.history);
        // `newest_forgotten` also answers for a topic that has left the table meanwhile.
        let now = |(name, before): &(Arc<str>, Id)| {
            Some((name.clone(), history.newest_forgotten(name))).filter(|(_, id)| id > before)
        };
        let changed: Vec<_> = self.topics.iter().filter_map(now).collect();
        drop(history);
        changed.iter().flat_map(|(name, id)| mark("topic", Some(name), *id)).collect()
    }
}

/// A block without data: everything up to `id` is forgotten.
fn mark(field: &str, value: Option<&str>, id: Id) -> Vec<u8> {
    encode_block(id, &[(field, value)], &format!("id: {id}\n\n")).block().concat()
}
