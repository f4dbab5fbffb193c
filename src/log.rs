//! The log's lines, written by a thread of their own.
//!
//! A pipe that nobody reads, or a program that takes its time over a line, must hold up neither streams nor stopping.
//! So lines wait in a bounded queue; a line that does not fit is dropped and counted, and the next one that fits says
//! how many are missing. Whatever can repeat as fast as a flood is limited to one line a second, or it would push
//! everything else out of the log.

use crate::clock::{date, now_ms};
use crate::config::{Config, Log, LogTo};
use crate::sync::start_thread;
use crate::text::one_line;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Lines that may wait for stderr, some 200 KB: enough for a burst, and a reader that has stopped needs no more.
const QUEUED_LINES: usize = 1024;
/// How long stopping waits for the queue to take its last line, and then for the thread to have written it.
const FINISH_TIME: Duration = Duration::from_millis(30);

/// Shared by all; no lock is needed to write a line.
pub struct Logger {
    /// Lines of a level above this one are not even formatted.
    wanted: Log,
    queue: Sender<Line>,
    /// Closed once the thread has written the last line.
    finished: Receiver<()>,
    /// Lines dropped since the last one that fitted.
    left_out: AtomicU64,
    warned: OncePerSecond,
}

/// What stands in the queue.
enum Line {
    Text(String),
    /// The thread ends here; what is queued after this is never written.
    End,
}

/// Lets something through once a second, for what repeats as fast as a flood. It holds the second in which it last did.
#[derive(Default)]
pub struct OncePerSecond(AtomicU64);

impl OncePerSecond {
    /// True for the first who asks in a second, and for nobody else: the swap decides between threads.
    fn is_due(&self) -> bool {
        let second = now_ms() / 1000;
        self.0.swap(second, Relaxed) != second
    }
}

impl Logger {
    /// Starts the thread, unless nothing is to be written.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(config: &Config) -> io::Result<Logger> {
        let (wanted, to) = (config.log, config.log_to.clone());
        let (queue, lines) = bounded(QUEUED_LINES);
        let (finish, finished) = bounded(0);
        if wanted > Log::Off {
            let write_all = move || {
                write_until_end(&lines, &to);
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

    /// Queues one line, with the date before it. Never waits for stderr, so it may be called under a lock.
    pub fn line(&self, level: Log, line: fmt::Arguments) {
        if !self.wants(level) {
            return;
        }
        let left_out = self.left_out.swap(0, Relaxed);
        let mut text = one_line(format!("{} {line}", date()));
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

    /// One line a second by a limit of the caller's own: a flood of other warnings must not hide its own.
    pub fn warn_within(&self, limit: &OncePerSecond, line: fmt::Arguments) {
        if limit.is_due() {
            self.line(Log::Info, line);
        }
    }

    /// Waits a moment for all lines to be written, so that the last ones before the process ends are not lost. What is
    /// logged later may be.
    pub fn finish(&self) {
        let deadline = Instant::now() + FINISH_TIME;
        if self.wants(Log::Info) && self.queue.send_deadline(Line::End, deadline).is_ok() {
            let _ = self.finished.recv_deadline(deadline);
        }
    }
}

fn write_until_end(lines: &Receiver<Line>, to: &LogTo) {
    while let Ok(Line::Text(line)) = lines.recv() {
        to.write(line);
    }
}
