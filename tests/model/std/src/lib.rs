//! `std` as the model has it: what threads wait for each other with, time, and sockets are of this crate; all else is the
//! real thing.
//!
//! In a model all threads are tasks of shuttle on one thread of the system, of which one runs at a time. Each lock, channel,
//! atomic and socket is a *point* where another may go on instead; which one, the seed of the schedule says. So everything
//! that a run depends on is in its seed, and a fault that was found is found again.

pub use ::std::*;

pub mod check;
pub mod fs;
pub mod hash;
pub mod io;
pub mod net;
pub mod panic;
pub mod sync;
pub mod thread;
pub mod time;

/// Another thread may go on here.
pub fn point() {
    shuttle::thread::sleep(Default::default()); // shuttle knows no time: this is a point and nothing else
}

/// A random number below `limit`, of this schedule.
pub fn below(limit: usize) -> usize {
    use shuttle::rand::{RngCore, thread_rng};
    if limit < 2 { 0 } else { (thread_rng().next_u64() % limit as u64) as usize }
}
