//! Locks and threads.
//!
//! A panic under a lock does not take the others along: they enter the poisoned lock, since every update in this house
//! leaves its data whole.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Address space of a thread; only pages that are touched take memory. Handlers run on it.
pub const STACK_BYTES: usize = 128 * 1024;

pub fn start_thread(name: String, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

/// Enters a lock, also one that a panic has poisoned: see the module's docs.
pub fn enter<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
