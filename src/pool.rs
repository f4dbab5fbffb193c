//! Threads for those who must be waited for, and who goes first.
//!
//! A job is one connection's turn: its requests, or what a subscriber is behind. Threads that have become free take the
//! next job, and another is started only where the first in a line has waited a while without one: so a crowd that
//! comes back at once is served by a few threads, and a crowd that holds its threads gets more, up to the limit. Each
//! kind of job has a share of the threads that the others cannot take, so that none locks another out.
//!
//! Waiting for threads is bounded by what waits: a connection stands in one line at most once, and there are places for
//! so many connections only (`places.rs`).

use crate::config::FEWEST_THREADS;
use crate::desk::Desk;
use crate::sync::{Condvar, Mutex, MutexGuard, enter, start_thread, wait};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that stay when there is nothing to do, so that the next request finds one.
const STAYING: usize = 4;
/// How long the others stay.
const IDLE_TIME: Duration = Duration::from_secs(1);
/// How long the first in a line waits before another thread is started: to end what others have begun takes less.
const START_AFTER: Duration = Duration::from_millis(2);
/// The same where the line moves: then it is mostly the processor that all wait for, which more threads would not help.
const SLOW_AFTER: Duration = Duration::from_millis(10);
/// How long a request waits for its turn before another connection makes room for it, and how long that has had its
/// own turn by then, when a crowd waits: heads need a moment to come.
const ROOM_AFTER: Duration = Duration::from_millis(100);
/// A line that does not move gets this part of its length in new threads at a time.
const STARTED_PART: usize = 16;
const _: () = assert!(STAYING <= FEWEST_THREADS);

/// One turn of a connection.
pub type Job = Box<dyn FnOnce(&mut Seat) + Send>;

/// What a job is about. `Lines::running` is indexed by it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Requests are read and answered: up to half of the threads.
    Request,
    /// A subscriber is behind: up to three quarters, together with handlers.
    Behind,
    /// A program's handler, which returns when it likes: up to a quarter.
    Handler,
}

pub struct Pool {
    limit: usize,
    desk: Arc<Desk>,
    lines: Mutex<Lines>,
    /// Idle threads sleep here.
    work: Condvar,
    /// Notified when a thread has ended.
    ended: Condvar,
    /// How many subscribers wait for a thread.
    behind: AtomicUsize,
    /// Requests wait for a thread, and none may be started for them.
    is_crowded: AtomicBool,
}

#[derive(Default)]
struct Lines {
    requests: VecDeque<Waiting>,
    behind: VecDeque<Waiting>,
    /// How many jobs of each kind run.
    running: [usize; 3],
    threads: usize,
    /// Of them, how many have nothing to do.
    idle: usize,
    /// Jobs that were taken so far, and at the last look: where they are equal, the lines do not move.
    taken: usize,
    seen: usize,
    /// Requests that were taken so far, and at the last look whether others should make room.
    requests_taken: usize,
    requests_seen: usize,
    /// When others are to make room for requests again, at the earliest.
    room_at: Option<Instant>,
    /// The clerk looks at the lines again by itself.
    is_watched: bool,
    is_closed: bool,
}

struct Waiting {
    since: Instant,
    job: Job,
}

/// A job's thread, as the job sees it.
pub struct Seat<'a> {
    pool: &'a Pool,
    kind: Kind,
}

/// How many threads there are, and how many connections have or want one.
pub struct Threads {
    pub threads: usize,
    pub behind: usize,
    pub queued: usize,
}

/// What came of a look at the lines.
pub struct Look {
    /// When to look again; with no lines, when somebody rings.
    pub again_at: Option<Instant>,
    /// How many requests have waited so long that others are to make room for them.
    pub in_want: usize,
    /// Whether all threads could be started that were wanted.
    pub started: io::Result<()>,
}

impl Pool {
    /// A pool of at most `limit` threads, of which the first few start now.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(limit: usize, desk: Arc<Desk>) -> io::Result<Arc<Pool>> {
        let (lines, work, ended, behind, is_crowded) = Default::default();
        let pool = Arc::new(Pool { limit, desk, lines, work, ended, behind, is_crowded });
        let started = (0..STAYING.min(limit)).try_for_each(|_| pool.start_worker());
        started.inspect_err(|_| pool.close())?;
        Ok(pool)
    }

    /// Puts a job into its line. Never waits. False where the pool is closed: then the job is dropped, and what it
    /// serves with it, since the last thread may have ended.
    pub fn hand(&self, kind: Kind, job: Job) -> bool {
        let mut lines = enter(&self.lines);
        if lines.is_closed {
            drop(lines); // before the job, which may ask the pool
            return false;
        }
        let waiting = Waiting { since: Instant::now(), job };
        match kind {
            Kind::Behind => lines.behind.push_back(waiting),
            _ => lines.requests.push_back(waiting),
        }
        self.behind.store(lines.behind.len(), Relaxed);
        let waiting = lines.requests.len() + lines.behind.len();
        let must_ring = (waiting > lines.idle || !lines.has_share(kind, self.limit)) && !lines.is_watched;
        lines.is_watched |= must_ring;
        self.wake_one(lines);
        if must_ring {
            self.desk.ring();
        }
        true
    }

    /// Whether a connection that may ask again should rather free its thread.
    pub fn is_crowded(&self) -> bool {
        self.is_crowded.load(Relaxed)
    }

    /// Whether a job of a subscriber that is behind may go on, for all that others wait.
    pub fn is_nobody_waiting(&self) -> bool {
        self.behind.load(Relaxed) == 0
    }

    pub fn threads(&self) -> Threads {
        let lines = enter(&self.lines);
        Threads { threads: lines.threads, behind: lines.running[Kind::Behind as usize], queued: lines.behind.len() }
    }

    /// The clerk's look: starts threads where the first in a line has waited too long, as long as `may_start` lets it.
    pub fn look(self: &Arc<Pool>, may_start: impl Fn() -> bool) -> Look {
        let mut lines = enter(&self.lines);
        let now = Instant::now();
        let is_stuck = lines.taken == lines.seen;
        lines.seen = lines.taken;
        let most = self.limit - lines.threads;
        let is_overdue = |waiting: &Waiting, time| now.duration_since(waiting.since) >= time;
        let mut wanted = 0;
        for (kind, line) in [(Kind::Request, &lines.requests), (Kind::Behind, &lines.behind)] {
            if line.front().is_some_and(|first| is_overdue(first, START_AFTER)) && lines.has_share(kind, self.limit) {
                let is_slow = line.front().is_some_and(|first| is_overdue(first, SLOW_AFTER));
                wanted += if is_stuck { line.len().div_ceil(STARTED_PART) } else { usize::from(is_slow) };
            }
        }
        let mut in_want = 0;
        let is_full = most == 0 || !lines.has_share(Kind::Request, self.limit);
        self.is_crowded.store(is_full && !lines.requests.is_empty(), Relaxed);
        if lines.room_at.is_none_or(|at| now >= at) {
            let served = lines.requests_taken.saturating_sub(lines.requests_seen);
            // Where a quarter of the threads has taken another request meanwhile, the line moves by itself.
            let running = lines.running[Kind::Request as usize];
            if served * 4 < running {
                let overdue = lines.requests.iter().take_while(|waiting| is_overdue(waiting, ROOM_AFTER)).count();
                in_want = overdue.min(running - served);
            }
            // Those that take the place of whoever makes room now do not show that it moves.
            (lines.room_at, lines.requests_seen) = (Some(now + ROOM_AFTER), lines.requests_taken + in_want);
        }
        lines.is_watched = lines.requests.len() + lines.behind.len() > 0;
        let again_at = lines.is_watched.then(|| now + START_AFTER);
        drop(lines);
        let started = (0..wanted.min(most)).try_for_each(|_| match may_start() {
            true => self.start_worker(),
            false => Err(io::Error::new(ErrorKind::OutOfMemory, "no address space is left (ulimit -v)")),
        });
        let in_want = if is_full || started.is_err() { in_want } else { 0 };
        Look { again_at, in_want, started }
    }

    /// From now on no job is taken, and threads end once the lines are empty.
    pub fn close(&self) {
        enter(&self.lines).is_closed = true;
        self.work.notify_all();
    }

    /// Waits until every thread has ended, or until the deadline. Returns how many have not.
    pub fn wait_for_threads(&self, deadline: Instant) -> usize {
        let mut lines = enter(&self.lines);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.threads == 0 || left.is_zero() {
                return lines.threads;
            }
            lines = wait(&self.ended, lines, left);
        }
    }

    /// Wakes a thread that has nothing to do. Where there is none, the next that has ended its job looks by itself, and
    /// this saves a call to the system.
    fn wake_one(&self, lines: MutexGuard<'_, Lines>) {
        let somebody_sleeps = lines.idle > 0;
        drop(lines);
        if somebody_sleeps {
            self.work.notify_one();
        }
    }

    fn start_worker(self: &Arc<Pool>) -> io::Result<()> {
        let mut lines = enter(&self.lines);
        lines.threads += 1;
        let name = format!("serve {}", lines.threads);
        drop(lines);
        let pool = self.clone();
        start_thread(name, Box::new(move || pool.work())).map(drop).inspect_err(|_| enter(&self.lines).threads -= 1)
    }

    /// The life of a thread: one job after another.
    fn work(&self) {
        let mut ended = None;
        while let Some((kind, job)) = self.next(ended) {
            let mut seat = Seat { pool: self, kind };
            // A job's panic must take neither its thread nor the lines along. What it served is ended as it unwinds.
            let _ = catch_unwind(AssertUnwindSafe(|| job(&mut seat)));
            ended = Some(seat.kind);
            // Many short jobs one after another would hold up those who accept for as long as a turn of the processor.
            thread::yield_now();
        }
    }

    /// Waits for the next job, after one of this kind has ended. None where the thread is to end, which it is counted
    /// out for.
    fn next(&self, ended: Option<Kind>) -> Option<(Kind, Job)> {
        let mut lines = enter(&self.lines);
        if let Some(kind) = ended {
            lines.running[kind as usize] -= 1;
        }
        let idle_until = Instant::now() + IDLE_TIME;
        lines.idle += 1;
        loop {
            if let Some((kind, job)) = lines.take(self.limit) {
                lines.idle -= 1;
                self.behind.store(lines.behind.len(), Relaxed);
                return Some((kind, job));
            }
            let left = idle_until.saturating_duration_since(Instant::now());
            let is_over = lines.is_closed && lines.requests.is_empty() && lines.behind.is_empty();
            if is_over || left.is_zero() && lines.idle > STAYING {
                lines.idle -= 1;
                lines.threads -= 1;
                self.ended.notify_all();
                return None;
            }
            lines = wait(&self.work, lines, if left.is_zero() { IDLE_TIME } else { left });
        }
    }
}

impl Lines {
    /// Takes the first job whose kind has a share left. Requests first: they are short, or evicted.
    fn take(&mut self, limit: usize) -> Option<(Kind, Job)> {
        for kind in [Kind::Request, Kind::Behind] {
            if !self.has_share(kind, limit) {
                continue;
            }
            let line = if kind == Kind::Request { &mut self.requests } else { &mut self.behind };
            if let Some(waiting) = line.pop_front() {
                self.running[kind as usize] += 1;
                self.taken += 1;
                self.requests_taken += usize::from(kind == Kind::Request);
                return Some((kind, waiting.job));
            }
        }
        None
    }

    /// Whether another job of this kind may run. So at least a quarter of the threads is there for requests, and
    /// another for subscribers that are behind, whatever the others do.
    fn has_share(&self, kind: Kind, limit: usize) -> bool {
        let [requests, behind, handlers] = self.running;
        match kind {
            Kind::Request => requests < limit / 2,
            Kind::Behind => behind + handlers < limit - limit / 4,
            Kind::Handler => handlers < limit / 4,
        }
    }
}

impl Seat<'_> {
    /// Has the job go on as one of another kind. False where that kind has no share left; then it must end soon.
    pub fn change_to(&mut self, kind: Kind) -> bool {
        let mut lines = enter(&self.pool.lines);
        let has_share = lines.has_share(kind, self.pool.limit);
        if has_share {
            lines.running[self.kind as usize] -= 1;
            lines.running[kind as usize] += 1;
            self.kind = kind;
            self.pool.wake_one(lines); // for whoever waited for this share
        }
        has_share
    }
}
