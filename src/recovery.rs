//! One pass over a journal, at the start.
//!
//! A stream that ends early ends with its last blank line, says the standard, and that is the whole of recovery. A block
//! whose sum does not fit, or whose id goes back, is damage: it is counted and passed over. One block is in memory beside
//! what the caller keeps.

use crate::block::{Block, read_block};
use std::io::{self, BufReader, IsTerminal, Read, Write};

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
    pub damaged: u64,
    /// Where the first of the damaged ones begin.
    pub damaged_at: Vec<u64>,
    /// It does not begin as every journal does, with the mark of no topic: what came before is missing.
    pub is_headless: bool,
    /// The boot that it was written in, unless it was always synced.
    pub boot: Option<String>,
    /// The machine has died or restarted since, and not everything was synced.
    pub has_rebooted: bool,
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
        let (mut bytes, mut newest) = (Vec::new(), None);
        while let Some(length) = read_block(&mut reader, &mut bytes, limit)? {
            match Block::parse(&bytes) {
                Some(block) if block.is_mark || newest < Some(block.id) => {
                    if found.blocks == 0 {
                        found.is_headless = block.topic.is_some();
                        found.boot = block.boot.map(String::from);
                    }
                    if !block.is_mark {
                        newest = Some(block.id);
                        found.events += 1;
                    }
                    take(block, &bytes);
                }
                _ => {
                    found.damaged += 1;
                    if found.damaged_at.len() < NAMED_DAMAGE {
                        found.damaged_at.push(found.whole);
                    }
                }
            }
            found.whole += length;
            found.blocks += 1;
            progress.show(100 * found.whole / size.max(1));
        }
        progress.clear();
        Ok(found)
    }

    pub fn is_damaged(&self) -> bool {
        self.damaged > 0 || self.is_headless
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
