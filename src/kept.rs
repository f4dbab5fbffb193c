//! Between the journal's blocks and the history: taking blocks in at the start, and giving what is kept out for a new file.

use crate::block::{Block, encode_block};
use crate::encoded::Encoded;
use crate::event::Id;
use crate::history::{History, Walk};
use crate::rewrite::Snapshot;
use crate::sync::enter;
use std::sync::{Arc, Mutex};

/// What a step of a snapshot takes of memory, with the history locked: that is about half a millisecond.
const STEP_BYTES: usize = 256 * 1024;
/// The marks of a step.
const STEP_MARKS: usize = 1_000;

/// Takes in a block of the journal.
pub fn restore(history: &mut History, block: Block, bytes: &[u8]) {
    let Block { id, topic, key, is_mark, frame_at, .. } = block;
    match topic {
        Some(name) if !is_mark => {
            let (fields, frame) = bytes.split_at(frame_at);
            history.restore(name, Encoded::new(id, fields, frame), key.map(Arc::from));
        }
        _ => history.restore_forgotten(topic, id),
    }
}

/// What a journal holds that was written anew: what each topic has forgotten, and every event that is kept when its turn
/// comes.
pub struct Kept {
    history: Arc<Mutex<History>>,
    boot: Option<String>,
    others: Option<Id>,
    topics: Vec<(Arc<str>, Id)>,
    /// How many of the topics' marks were given out.
    marked: usize,
    walk: Walk,
}

impl Kept {
    pub fn new(shared: &Arc<Mutex<History>>, boot: Option<&str>) -> Kept {
        let history = enter(shared);
        let (topics, others) = history.all_forgotten();
        let (boot, walk) = (boot.map(String::from), history.walk());
        Kept { history: shared.clone(), boot, others: Some(others), topics, marked: 0, walk }
    }
}

impl Snapshot for Kept {
    fn next(&mut self) -> Vec<Encoded> {
        if let Some(others) = self.others.take() {
            return vec![mark("boot", self.boot.as_deref(), others)];
        }
        let topics: Vec<_> = self.topics[self.marked..].iter().take(STEP_MARKS).collect();
        self.marked += topics.len();
        if !topics.is_empty() {
            return topics.into_iter().map(|(name, forgotten)| mark("topic", Some(name), *forgotten)).collect();
        }
        enter(&self.history).walk_on(&mut self.walk, STEP_BYTES)
    }

    fn last(&mut self) -> Vec<Encoded> {
        let history = enter(&self.history);
        let now = |(name, before): &(Arc<str>, Id)| {
            Some((name.clone(), history.forgotten(name))).filter(|(_, forgotten)| forgotten > before)
        };
        let changed: Vec<_> = self.topics.iter().filter_map(now).collect();
        drop(history);
        changed.iter().map(|(name, forgotten)| mark("topic", Some(name), *forgotten)).collect()
    }
}

fn mark(field: &str, value: Option<&str>, id: Id) -> Encoded {
    encode_block(id, &[(field, value)], &format!("id: {id}\n\n"))
}
