//! shuttle's locks, with waits on a condition that end in time.

use crate::point;
use crate::time::{Duration, Instant, Sleepers};
use ::std::ops::{Deref, DerefMut};
pub use ::std::sync::*;
pub use shuttle::sync::atomic;

#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

pub struct MutexGuard<'a, T> {
    guard: shuttle::sync::MutexGuard<'a, T>,
    mutex: &'a Mutex<T>,
}

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(shuttle::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        match self.0.lock() {
            Ok(guard) => Ok(MutexGuard { guard, mutex: self }),
            Err(poisoned) => Err(PoisonError::new(MutexGuard { guard: poisoned.into_inner(), mutex: self })),
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[derive(Default)]
pub struct Condvar(Sleepers);

pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub const fn new() -> Condvar {
        Condvar(Sleepers::new())
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.wait_until(guard, None).0
    }

    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let (locked, is_late) = self.wait_until(guard, Some(Instant::now() + time));
        match locked {
            Ok(guard) => Ok((guard, WaitTimeoutResult(is_late))),
            Err(poisoned) => Err(PoisonError::new((poisoned.into_inner(), WaitTimeoutResult(is_late)))),
        }
    }

    fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        until: Option<Instant>,
    ) -> (LockResult<MutexGuard<'a, T>>, bool) {
        let mutex = guard.mutex;
        drop(guard); // has its point before the lock is free and none after: nobody can wake this thread before it sleeps
        let is_late = self.0.sleep(until);
        (mutex.lock(), is_late)
    }

    pub fn notify_one(&self) {
        point();
        self.0.wake_one();
    }

    pub fn notify_all(&self) {
        point();
        self.0.wake_all();
    }
}

/// The real one, with its points. Where several want to fill it, they wait as threads of the model.
#[derive(Debug)]
pub struct OnceLock<T> {
    value: ::std::sync::OnceLock<T>,
    filling: Mutex<()>,
}

impl<T> OnceLock<T> {
    pub const fn new() -> OnceLock<T> {
        OnceLock { value: ::std::sync::OnceLock::new(), filling: Mutex::new(()) }
    }

    pub fn get(&self) -> Option<&T> {
        point();
        self.value.get()
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        point();
        self.value.set(value)
    }

    pub fn get_or_init(&self, fill: impl FnOnce() -> T) -> &T {
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        match self.value.get() {
            Some(value) => value,
            None => {
                let value = fill();
                self.value.get_or_init(|| value)
            }
        }
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> OnceLock<T> {
        OnceLock::new()
    }
}
