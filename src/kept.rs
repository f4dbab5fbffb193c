//! Between the journal's blocks and the history: opening the journal and restoring its blocks at the start, and giving
//! out what is kept for a new file.
//!
//! The journal knows no history and the history no blocks, so that each can be read, and replaced, alone; what one must
//! know of the other is here. A snapshot is taken in steps, each in one short hold of the history's lock, since
//! publishing and replays wait for that lock.

use crate::block::{Block, encode_block, mark};
use crate::clock::now_ms;
use crate::config::{Config, Log};
use crate::encoded::{Encoded, Parts};
use crate::event::{Id, ids_from};
use crate::history::{History, Totals};
use crate::journal::Journal;
use crate::log::Logger;
use crate::rewrite::Snapshot;
use crate::sync::enter;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::slice::from_ref;
use std::sync::{Arc, Mutex};

/// How much memory one step of a snapshot takes, which holds the history's lock for about half a millisecond.
const STEP_BYTES: usize = 256 * 1024;
/// How many marks one step gives.
const STEP_MARKS: usize = 1_000;
/// Longer than the kernel keeps written data before it begins to write it to the disk, which is some 30 s; in ms.
/// <https://docs.kernel.org/admin-guide/sysctl/vm.html#dirty-expire-centisecs>
const HELD_BACK_MS: u64 = 60_000;

/// Takes a journal into use, and fills the history with what is in it.
pub fn open_journal(
    path: &Path,
    history: &Arc<Mutex<History>>,
    config: &Config,
    log: &Arc<Logger>,
) -> io::Result<Journal> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("the journal {}: {error}", path.display()));
    recover(path, history, config, log).map_err(named)
}

/// Restores the history from the journal, then makes the file fit to be appended to.
fn recover(path: &Path, shared: &Arc<Mutex<History>>, config: &Config, log: &Arc<Logger>) -> io::Result<Journal> {
    let mut history = enter(shared);
    let (mut newest_event, mut newest_mark) = (Id::default(), Id::default());
    let mut take = |block: Block, bytes: &[u8]| {
        // A topic's mark has the id of one of its events.
        let newest = if block.topic.is_none() { &mut newest_mark } else { &mut newest_event };
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

/// Restores one block of the journal. `bytes` are the whole block, and the blocks come in the order of the file.
pub fn restore(history: &mut History, block: Block, bytes: &[u8]) {
    let Block { id, topic, key, is_mark, frame_at, .. } = block;
    match topic {
        Some(name) if !is_mark => {
            let (fields, frame) = bytes.split_at(frame_at);
            if !name.contains(',') {
                return history.restore(name, &Parts::new(id, fields, frame), key);
            }
            for (id, name) in ids_from(id).zip(name.split(',')) {
                history.restore(name, &with_own_id(id, name, key, frame).parts(), key);
            }
        }
        _ => history.restore_newest_forgotten(topic, id),
    }
}

/// One of the events that were published together, of which the block has the first one's id at the end of its frame.
fn with_own_id(id: Id, name: &str, key: Option<&str>, frame: &[u8]) -> Encoded {
    let frame = String::from_utf8_lossy(frame); // it has been read as text before
    let before_id = frame.rfind("id: ").unwrap_or(frame.len());
    encode_block(id, &[("topic", Some(name)), ("key", key)], &format!("{}id: {id}\n\n", &frame[..before_id]))
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

/// A walk over the kept events, some at a time, so that nobody waits long for the lock meanwhile. What is forgotten
/// before the walk reaches it is left out, and so is what is published after it began.
struct Walk {
    /// The next event of each topic.
    heads: BTreeMap<Id, Arc<str>>,
    until: Id,
}

impl Kept {
    /// Begins a snapshot, in one hold of the lock. What is published after this is not in it: the journal copies that.
    pub fn new(shared: &Arc<Mutex<History>>, boot: Option<&str>) -> Kept {
        let history = enter(shared);
        let (topics, others) = history.newest_forgotten_of_each();
        let (boot, walk) = (boot.map(String::from), Walk::new(&history));
        Kept { history: shared.clone(), boot, others: Some(others), topics, marked: 0, walk }
    }
}

impl Snapshot for Kept {
    fn next(&mut self) -> Vec<u8> {
        if let Some(others) = self.others.take() {
            return mark("boot", self.boot.as_deref(), others).block().concat();
        }
        let topics: Vec<_> = self.topics[self.marked..].iter().take(STEP_MARKS).collect();
        self.marked += topics.len();
        if !topics.is_empty() {
            return topics.into_iter().flat_map(|(name, id)| mark("topic", Some(name), *id).block().concat()).collect();
        }
        self.walk.go_on(&enter(&self.history))
    }

    fn last(&mut self) -> Vec<u8> {
        let history = enter(&self.history);
        // `newest_forgotten` also answers for a topic that has left the table meanwhile.
        let now = |(name, before): &(Arc<str>, Id)| {
            Some((name.clone(), history.newest_forgotten(name))).filter(|(_, id)| id > before)
        };
        let changed: Vec<_> = self.topics.iter().filter_map(now).collect();
        drop(history);
        changed.iter().flat_map(|(name, id)| mark("topic", Some(name), *id).block().concat()).collect()
    }
}

impl Walk {
    fn new(history: &History) -> Walk {
        Walk { heads: history.oldest_of_each().collect(), until: history.newest() }
    }

    /// The blocks of the next events, in the order of their ids. None at the end.
    fn go_on(&mut self, history: &History) -> Vec<u8> {
        let mut blocks = Vec::new();
        while blocks.len() < STEP_BYTES
            && let Some((id, name)) = self.heads.pop_first()
        {
            let rest = history.topics(from_ref(&name)).next().map(|topic| history.after(topic, id.before()));
            for (entry, chain) in rest.into_iter().flatten() {
                let is_next = self.heads.first_key_value().is_none_or(|(other, _)| entry.point.id < *other);
                if entry.point.id > self.until {
                    break; // this topic's walk is over
                } else if !is_next || blocks.len() >= STEP_BYTES {
                    self.heads.insert(entry.point.id, name);
                    break;
                }
                for part in entry.layout.block() {
                    history.copy(chain, part, &mut blocks);
                }
            }
        }
        blocks
    }
}
