//! One pass over a journal, at the start.
//!
//! A stream that ends early ends with its last blank line, says the standard, and that is the whole of recovery. A block
//! whose sum does not fit, or whose id goes back, is damage: it is counted and passed over. Damage may have taken a block's
//! blank line, so the next block is looked for at its end. One block is in memory beside what the caller keeps.

use crate::block::{Block, read_block};
use crate::event::Id;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::time::Duration;

/// How many damaged blocks are named by their offset in the file.
const NAMED_DAMAGE: usize = 10;

/// What a journal held.
#[derive(Default)]
pub struct Found {
    pub size: u64,
    /// Up to here, the file is blocks, each with its blank line.
    pub whole: u64,
    pub blocks: u64,
    pub events: u64,
    newest: Option<Id>,
    pub damaged: u64,
    /// Where the first of the damaged ones begin.
    pub damaged_at: Vec<u64>,
    /// It does not begin as every journal does, with the mark of no topic: what came before is missing.
    pub is_headless: bool,
    /// The boot that it was written in, unless it was always synced.
    pub boot: Option<String>,
    /// The machine has died or restarted since, and not everything was synced.
    pub has_rebooted: bool,
    /// Its last block is a mark of no topic, and not its first: who wrote it ended in order.
    pub has_ended: bool,
}

impl Found {
    /// Reads `size` bytes, and gives each good block to `take`. A block of more than `limit` bytes is damage.
    pub fn read(
        file: impl Read,
        size: u64,
        limit: usize,
        shows_progress: bool,
        take: &mut dyn FnMut(Block, &[u8]),
    ) -> io::Result<Found> {
        let mut reader = BufReader::with_capacity(64 * 1024, file);
        let mut found = Found { size, ..Found::default() };
        let mut progress = Progress { is_shown: shows_progress && io::stderr().is_terminal(), percent: 0 };
        let mut bytes = Vec::new();
        while let Some(length) = read_block(&mut reader, &mut bytes, limit)? {
            if bytes != b"\n" {
                found.take_block(&bytes, take);
            }
            found.whole += length;
            progress.show(100 * found.whole / size.max(1));
        }
        progress.clear();
        Ok(found)
    }

    /// A blank line alone is nothing; everything else is a block, or damage and perhaps a block behind it.
    fn take_block(&mut self, bytes: &[u8], take: &mut dyn FnMut(Block, &[u8])) {
        let is_good = |block: &Block| block.is_mark || self.newest < Some(block.id);
        let whole = Block::parse(bytes).map(|block| (0, block)).filter(|(_, block)| is_good(block));
        let found = whole.or_else(|| Block::parse_after_damage(bytes).filter(|(at, block)| *at > 0 && is_good(block)));
        if !matches!(found, Some((0, _))) {
            self.damaged += 1;
            self.blocks += 1;
            if self.damaged_at.len() < NAMED_DAMAGE {
                self.damaged_at.push(self.whole);
            }
        }
        let is_first = self.blocks == 0;
        self.has_ended = false;
        let Some((at, block)) = found else { return };
        if is_first {
            self.is_headless = block.topic.is_some();
            self.boot = block.boot.map(String::from);
        }
        if !block.is_mark {
            self.newest = Some(block.id);
            self.events += 1;
        }
        self.has_ended = block.topic.is_none() && !is_first;
        self.blocks += 1;
        take(block, &bytes[at..]);
    }

    pub fn is_damaged(&self) -> bool {
        self.damaged > 0 || self.is_headless
    }

    /// What there is to be said of it, a line each.
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

    /// Whether there may have been events that are not in the file, up to now.
    pub fn may_lack_events(&self) -> bool {
        self.is_damaged() || self.has_rebooted || self.size == 0
    }
}

/// A line that changes, for somebody who looks.
struct Progress {
    is_shown: bool,
    percent: u64,
}

impl Progress {
    fn show(&mut self, percent: u64) {
        if self.is_shown && percent > self.percent {
            self.percent = percent;
            let _ = write!(io::stderr(), "\rreading the journal: {percent} %");
        }
    }

    fn clear(&self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "\r{:40}\r", "");
        }
    }
}
