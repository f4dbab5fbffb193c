//! One pass over a journal, at the start.
//!
//! The standard says that an event stream which ends early ends with its last blank line; that is the whole of
//! recovery. A block whose sum does not fit, or whose id goes back, is damage: it is counted and skipped. Damage may
//! have taken a block's blank line, so the next block is looked for at its end. Only one block is in memory beside what
//! the caller keeps, so a journal of any size can be read. What is found decides whether the file may be appended to
//! (`Journal::repair`). <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>

use crate::block::{Block, is_torn_block, read_block};
use crate::config::Config;
use crate::event::Id;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::time::Duration;

/// How many damaged blocks are named in the log, by their offset in the file: enough to look at them.
const NAMED_DAMAGE: usize = 10;

/// A block of up to this size is read, whatever the limits are now: an earlier process may have taken larger events.
const LEAST_BLOCK_LIMIT: usize = 16 * 1024 * 1024;

/// The largest block that is no damage: marks and bookkeeping, and an event's data, each byte of which may have become
/// a line of its own.
pub fn block_limit(config: &Config) -> usize {
    let of_one_event = config.data_bytes().saturating_mul(8).saturating_add(4096);
    config.keep_bytes.max(of_one_event).max(LEAST_BLOCK_LIMIT)
}

/// What a journal held.
#[derive(Default)]
pub struct Found {
    /// The file's length in bytes, when reading began.
    pub size: u64,
    /// Up to here, the file is blocks, each with its blank line. The rest was cut off by whatever ended the process.
    pub whole: u64,
    /// Good and damaged ones. Where all are damaged, the file is no journal.
    pub blocks: u64,
    pub events: u64,
    /// The id of the last event; the next must be above it.
    newest: Option<Id>,
    pub damaged: u64,
    /// Where the first damaged blocks begin.
    pub damaged_at: Vec<u64>,
    /// Its first block is not a mark that says what all topics have forgotten, as in every journal: what came before is
    /// missing.
    pub is_headless: bool,
    /// The boot that is named in it; none if everything in it was synced. Older versions also appended it to a synced
    /// file.
    pub boot: Option<String>,
    /// It names its boot, and has a mark that says that its own name is on the disk (`Journal::change_to`).
    pub is_name_sure: bool,
    /// It was not synced, and the machine has died or restarted since: its end may be missing, which nothing in it
    /// shows.
    pub has_rebooted: bool,
    /// Its last block is a mark without a topic, and not its first: whoever wrote it ended in order.
    pub has_ended: bool,
}

impl Found {
    /// Reads the file to its end, `size` bytes of which are expected, and gives each good block to `take`, with its
    /// bytes. A block of more than `limit` bytes is damage.
    ///
    /// # Errors
    /// The file cannot be read; damage is no error.
    pub fn read(
        file: impl Read,
        size: u64,
        limit: usize,
        shows_progress: bool,
        take: &mut dyn FnMut(Block, &[u8]),
    ) -> io::Result<Found> {
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        let mut found = Found { size, ..Found::default() };
        let mut progress = Progress { is_wanted: shows_progress && io::stderr().is_terminal(), percent: 0 };
        let mut bytes = Vec::new();
        while let Some(length) = read_block(&mut reader, &mut bytes, limit)? {
            if bytes != b"\n" {
                found.take_block(&bytes, take);
            }
            found.whole += length;
            progress.show(100 * found.whole / size.max(1));
        }
        progress.clear();
        if found.whole < size && !is_torn_block(&bytes) {
            found.count_damage(); // no dying process leaves that, so events that were published may have stood there
        }
        Ok(found)
    }

    /// What begins at `whole` cannot be read.
    fn count_damage(&mut self) {
        self.damaged += 1;
        self.blocks += 1;
        if self.damaged_at.len() < NAMED_DAMAGE {
            self.damaged_at.push(self.whole);
        }
    }

    /// A blank line alone is nothing; everything else is a block, or damage with perhaps a block at its end.
    fn take_block(&mut self, bytes: &[u8], take: &mut dyn FnMut(Block, &[u8])) {
        // A mark may repeat an id, or say a lower one: it moves nothing back.
        let is_good = |block: &Block| block.is_mark || self.newest < Some(block.id);
        let whole = Block::parse(bytes).map(|block| (0, block)).filter(|(_, block)| is_good(block));
        let found = whole.or_else(|| Block::parse_after_damage(bytes).filter(|(at, block)| *at > 0 && is_good(block)));
        let is_first = self.blocks == 0;
        if !matches!(found, Some((0, _))) {
            self.count_damage();
        }
        self.has_ended = false;
        let Some((at, block)) = found else { return };
        if is_first {
            self.is_headless = block.topic.is_some() || block.id == Id::default();
        }
        self.has_ended = block.topic.is_none() && !is_first;
        match block.boot {
            Some(boot) => self.boot = Some(boot.into()),
            None => self.is_name_sure |= self.has_ended && self.boot.is_some(),
        }
        if !block.is_mark {
            self.newest = Some(block.newest());
            self.events += 1;
        }
        self.blocks += 1;
        take(block, &bytes[at..]);
    }

    /// Whether something is missing or unreadable before the file's end.
    pub fn is_damaged(&self) -> bool {
        self.damaged > 0 || self.is_headless
    }

    /// What there is to say about it in the log, a line each.
    pub fn describe(&self, took: Duration) -> Vec<String> {
        let Found { size, whole, events, damaged, damaged_at, .. } = self;
        let mut lines = vec![format!("read {events} events, {size} bytes, in {} ms", took.as_millis())];
        if self.is_headless {
            lines.push("its beginning is missing".into());
        }
        if *damaged > 0 {
            lines.push(format!("{damaged} of its blocks cannot be read, at bytes {damaged_at:?}"));
        }
        if self.has_rebooted {
            lines.push("the machine has died or restarted since, so the last seconds before may be missing".into());
        }
        if whole < size {
            lines.push(format!("{} bytes of a block that was not whole are cut off", size - whole));
        }
        lines
    }

    /// Whether events may have been published that are not in the file. Then every topic has a gap up to now.
    pub fn may_lack_events(&self) -> bool {
        self.is_damaged() || self.has_rebooted || self.size == 0
    }
}

/// A line that changes, for somebody who waits at a terminal. A large journal takes seconds.
struct Progress {
    is_wanted: bool,
    percent: u64,
}

impl Progress {
    fn show(&mut self, percent: u64) {
        if self.is_wanted && percent > self.percent {
            self.percent = percent;
            let _ = write!(io::stderr(), "\rreading the journal: {percent} %");
        }
    }

    fn clear(&self) {
        if self.is_wanted {
            let _ = write!(io::stderr(), "\r{:40}\r", "");
        }
    }
}
