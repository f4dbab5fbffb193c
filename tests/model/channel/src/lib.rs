//! `crossbeam_channel` as the model has it: a queue under one lock.

use model_std::collections::VecDeque;
use model_std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use model_std::time::{Duration, Instant};

/// A queue for at least so many is a lane's. It is far shorter here, so that it is full now and then.
const LONG: usize = 4_096;
const SHORT: usize = 3;

pub struct Sender<T>(Arc<Channel<T>>);

pub struct Receiver<T>(Arc<Channel<T>>);

struct Channel<T> {
    queue: Mutex<Queue<T>>,
    limit: usize,
    changed: Condvar,
}

struct Queue<T> {
    waiting: VecDeque<T>,
    senders: usize,
    receivers: usize,
}

#[derive(Debug)]
pub struct SendError<T>(pub T);

#[derive(Debug)]
pub enum TrySendError<T> {
    Full(T),
    Disconnected(T),
}

#[derive(Debug)]
pub enum SendTimeoutError<T> {
    Timeout(T),
    Disconnected(T),
}

#[derive(Debug, PartialEq, Eq)]
pub enum TryRecvError {
    Empty,
    Disconnected,
}

#[derive(Debug, PartialEq, Eq)]
pub enum RecvTimeoutError {
    Timeout,
    Disconnected,
}

#[derive(Debug, PartialEq, Eq)]
pub struct RecvError;

/// Waits for either of two, looking at them in turn.
#[macro_export]
macro_rules! select {
    (recv($a:expr) -> _ => $first:block recv($b:expr) -> _ => $second:block) => {
        loop {
            if $a.try_recv() != Err($crate::TryRecvError::Empty) {
                break $first;
            } else if $b.try_recv() != Err($crate::TryRecvError::Empty) {
                break $second;
            }
            $crate::pause();
        }
    };
}

pub fn pause() {
    model_std::thread::sleep(Duration::from_millis(1));
}

pub fn bounded<T>(limit: usize) -> (Sender<T>, Receiver<T>) {
    let queue = Mutex::new(Queue { waiting: VecDeque::new(), senders: 1, receivers: 1 });
    let limit = if limit < LONG { limit } else { SHORT };
    let channel = Arc::new(Channel { queue, limit, changed: Condvar::new() });
    (Sender(channel.clone()), Receiver(channel))
}

impl<T> Channel<T> {
    fn enter(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change. None where the time has come.
    fn wait<'a>(&'a self, queue: MutexGuard<'a, Queue<T>>, until: Option<Instant>) -> Option<MutexGuard<'a, Queue<T>>> {
        let Some(until) = until else {
            return Some(self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner));
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        Some(self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    fn send(&self, value: T, until: Option<Instant>) -> Result<(), SendTimeoutError<T>> {
        let mut queue = self.enter();
        while queue.receivers > 0 && queue.waiting.len() >= self.limit {
            match self.wait(queue, until) {
                Some(again) => queue = again,
                None => return Err(SendTimeoutError::Timeout(value)),
            }
        }
        if queue.receivers == 0 {
            return Err(SendTimeoutError::Disconnected(value));
        }
        queue.waiting.push_back(value);
        drop(queue);
        self.changed.notify_all();
        Ok(())
    }

    fn recv(&self, until: Option<Instant>) -> Result<T, RecvTimeoutError> {
        let mut queue = self.enter();
        loop {
            if let Some(value) = queue.waiting.pop_front() {
                drop(queue);
                self.changed.notify_all();
                return Ok(value);
            } else if queue.senders == 0 {
                return Err(RecvTimeoutError::Disconnected);
            }
            queue = self.wait(queue, until).ok_or(RecvTimeoutError::Timeout)?;
        }
    }
}

impl<T> Sender<T> {
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.0.send(value, None).map_err(|error| match error {
            SendTimeoutError::Timeout(value) | SendTimeoutError::Disconnected(value) => SendError(value),
        })
    }

    pub fn send_deadline(&self, value: T, until: Instant) -> Result<(), SendTimeoutError<T>> {
        self.0.send(value, Some(until))
    }

    pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        let mut queue = self.0.enter();
        if queue.receivers == 0 {
            return Err(TrySendError::Disconnected(value));
        } else if queue.waiting.len() >= self.0.limit {
            return Err(TrySendError::Full(value));
        }
        queue.waiting.push_back(value);
        drop(queue);
        self.0.changed.notify_all();
        Ok(())
    }
}

impl<T> Receiver<T> {
    pub fn recv(&self) -> Result<T, RecvError> {
        self.0.recv(None).map_err(|_| RecvError)
    }

    pub fn recv_deadline(&self, until: Instant) -> Result<T, RecvTimeoutError> {
        self.0.recv(Some(until))
    }

    pub fn recv_timeout(&self, time: Duration) -> Result<T, RecvTimeoutError> {
        self.recv_deadline(Instant::now() + time)
    }

    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        let mut queue = self.0.enter();
        let next = queue.waiting.pop_front();
        let error = if queue.senders == 0 { TryRecvError::Disconnected } else { TryRecvError::Empty };
        drop(queue);
        next.inspect(|_| self.0.changed.notify_all()).ok_or(error)
    }

    pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
        model_std::iter::from_fn(|| self.recv().ok())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.0.enter().senders += 1;
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.enter().senders -= 1;
        self.0.changed.notify_all();
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.0.enter().receivers += 1;
        Receiver(self.0.clone())
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.enter().receivers -= 1;
        self.0.changed.notify_all();
    }
}
