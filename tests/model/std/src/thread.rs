//! shuttle's threads.

pub use ::std::thread::{Result, available_parallelism};
pub use shuttle::thread::{Builder, JoinHandle, Thread, ThreadId, current, spawn, yield_now};

pub fn sleep(time: crate::time::Duration) {
    crate::time::sleep(time);
}

/// Whether this thread is panicking: all threads of a model are one of the system's, of which `std` would tell.
pub fn panicking() -> bool {
    crate::panic::is_panicking()
}
