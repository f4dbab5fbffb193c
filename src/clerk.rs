//! The clerk: one thread that does what lanes and acceptors may not, since they never wait.
//!
//! It takes whom lanes let go and hands them to threads or notes their end, ends whose time is over, starts threads
//! where somebody waits too long for one, has idle connections make room where no thread may be started, and forgets
//! what is too old. None of this waits for a peer or a disk. What it does to whom is decided by the phases
//! (`subscription.rs`), so it needs no state of its own.

use crate::subscription::Streams;
use crate::sync::start_thread;
use crate::system::{AddressSpace, Room};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that it sleeps without being rung for.
const SLEEP_TIME: Duration = Duration::from_secs(60);
/// How long it waits before it asks for a thread again where the system has none to give.
const NO_THREAD_PAUSE: Duration = Duration::from_millis(20);
/// How long it leaves the history to others where more is to be forgotten than goes at a time.
const FORGET_PAUSE: Duration = Duration::from_millis(1);

/// Starts the clerk. It ends once its desk is closed.
///
/// # Errors
/// No thread can be started.
pub fn start(streams: Arc<Streams>, space: Arc<AddressSpace>) -> io::Result<JoinHandle<()>> {
    start_thread("clerk".into(), Box::new(move || work(&streams, &space)))
}

fn work(streams: &Arc<Streams>, space: &AddressSpace) {
    let mut wake_at = Instant::now() + SLEEP_TIME;
    while let Some(work) = streams.desk.wait(wake_at) {
        for c in &work.let_go {
            // One that panics must not take all the others along.
            let _ = catch_unwind(AssertUnwindSafe(|| streams.take_over(c)));
        }
        work.due.iter().for_each(|c| streams.end_soon(c, None));
        wake_at = look_at_threads(streams, space);
        if streams.core.history().has_more() {
            wake_at = wake_at.min(Instant::now() + FORGET_PAUSE);
        }
    }
}

/// Starts the threads that are missing, and makes room where none may be started. Returns when to look again.
fn look_at_threads(streams: &Streams, space: &AddressSpace) -> Instant {
    let look = streams.pool.look(|| space.look() >= Room::Threads);
    for _ in 0..look.in_want {
        streams.places.free_thread();
    }
    match look.started {
        Ok(()) => look.again_at.unwrap_or_else(|| Instant::now() + SLEEP_TIME),
        Err(error) => {
            streams.log.warn(format_args!("no thread for those who wait: {error}"));
            Instant::now() + NO_THREAD_PAUSE
        }
    }
}
