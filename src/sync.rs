//! Locks, threads, and what a panic may not take along.
//!
//! A panic under a lock does not take the other threads along: they enter the poisoned lock. That is safe only because
//! every update in this house leaves its data whole at each step that may panic; whoever adds one must keep it so.

use std::io;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
pub use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Address space of a thread's stack; only pages that were touched take memory. Programs' handlers run on it too, and
/// are told so ([`Server::stream`](crate::Server::stream)).
pub const STACK_BYTES: usize = 128 * 1024;

/// Starts a thread with a name, which `top -H` and a panic's message show. Memory mappings and tasks are checked before
/// (`system.rs`): where they run out, the process aborts instead of returning an error.
///
/// # Errors
/// The system has no thread to spare.
pub fn start_thread(name: String, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

/// Enters a lock, also one that a panic has poisoned: see above. The order of the locks is in `lib.rs`.
pub fn enter<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on a condition for some time, with the lock given up meanwhile. May return early: look at the condition again.
pub fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
}

/// Calls what a program has given us; None where it panics. What it panics with is a value of the program's, which may
/// panic in its turn where it is dropped: outside of this, that would end the thread.
pub fn call<T>(program: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(program)) {
        Ok(done) => Some(done),
        Err(payload) => {
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(payload)));
            let _ = dropped.map_err(forget); // or there would be no end of it
            None
        }
    }
}
