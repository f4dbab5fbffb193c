//! Lines for stderr, written by a thread of their own.
//!
//! A pipe that takes nothing must hold up neither streams nor stopping. So lines wait in a bounded queue, and what does
//! not fit into it is left out and counted: the next line that fits says how many.

use crate::clock::{date, now_ms};
use crate::config::Log;
use crate::sync::start_thread;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Lines that wait for stderr.
const QUEUED_LINES: usize = 1024;
/// How long stopping waits for them.
const FINISH_TIME: Duration = Duration::from_millis(30);

pub struct Logger {
    wanted: Log,
    queue: Sender<Line>,
    /// Closed once the thread has written the last line.
    finished: Receiver<()>,
    left_out: AtomicU64,
    warned: OncePerSecond,
}

enum Line {
    Text(String),
    End,
}

/// For what repeats as fast as a flood.
#[derive(Default)]
pub struct OncePerSecond(AtomicU64);

impl OncePerSecond {
    fn is_due(&self) -> bool {
        let second = now_ms() / 1000;
        self.0.swap(second, Relaxed) != second
    }
}

impl Logger {
    pub fn start(wanted: Log) -> io::Result<Logger> {
        let (queue, lines) = bounded(QUEUED_LINES);
        let (finish, finished) = bounded(0);
        if wanted > Log::Off {
            let write_all = move || {
                write_until_end(&lines);
                drop(finish);
            };
            start_thread("log".into(), Box::new(write_all))?;
        }
        Ok(Logger { wanted, queue, finished, left_out: AtomicU64::new(0), warned: OncePerSecond::default() })
    }

    /// Whether lines of this level are written: one that is expensive to make need not be made otherwise.
    pub fn wants(&self, level: Log) -> bool {
        level <= self.wanted
    }

    pub fn line(&self, level: Log, line: fmt::Arguments) {
        if !self.wants(level) {
            return;
        }
        let left_out = self.left_out.swap(0, Relaxed);
        let mut text = format!("{} {line}", date());
        if left_out > 0 {
            text += &format!(" ({left_out} lines before this one were left out)");
        }
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Line::Text(text)) {
            self.left_out.fetch_add(left_out + 1, Relaxed);
        }
    }

    /// One line a second at most, of all warnings together.
    pub fn warn(&self, line: fmt::Arguments) {
        self.warn_within(&self.warned, line);
    }

    /// The same, within a limit of its own: a flood of other warnings must not use up its turn.
    pub fn warn_within(&self, limit: &OncePerSecond, line: fmt::Arguments) {
        if limit.is_due() {
            self.line(Log::Info, line);
        }
    }

    /// Waits for a moment until all lines are written. What comes later is not.
    pub fn finish(&self) {
        if self.wants(Log::Info) && self.queue.send_timeout(Line::End, FINISH_TIME).is_ok() {
            let _ = self.finished.recv_timeout(FINISH_TIME);
        }
    }
}

fn write_until_end(lines: &Receiver<Line>) {
    while let Ok(Line::Text(mut line)) = lines.recv() {
        line.push('\n');
        let _ = io::stderr().write_all(line.as_bytes()); // one write, so that no other's line comes in between
    }
}
