//! Tells the program of subscribers that come and go.
//!
//! The program's hook may take its time, publish, or panic. So it has a thread of its own, which holds no lock while it
//! calls the hook, and what it panics with ends there: neither a lane nor the clerk ever waits for it. What it has not
//! heard yet waits in a queue, in the order in which it happened. While that is long, whoever comes waits a moment, and
//! is then told to come back: a hook that is stuck must not hold the threads that publishers need. Whoever goes does
//! not wait. So the queue has about `WAITING` beginnings at most, and one end for each subscriber that is open.

use crate::connection::Reason;
use crate::sync::{Condvar, Mutex, MutexGuard, call, enter, start_thread, wait};
use std::collections::VecDeque;
use std::io;
use std::mem::replace;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many calls may wait before newcomers do.
const WAITING: usize = 1_024;
/// How long a newcomer waits for room in the queue, with a thread that others may want: less than the 100 ms after
/// which one connection makes room for another's request (`pool.rs`).
const ROOM_TIME: Duration = Duration::from_millis(50);
/// Said to a newcomer for which there is none by then.
pub const FAR_BEHIND: Reason = "the program's hook is far behind";
/// The longest that anybody here sleeps without looking again.
const SLEEP_TIME: Duration = Duration::from_secs(60);

/// A subscriber of topics that has come, or gone: see [`Server::on_subscription`](crate::Server::on_subscription).
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Presence, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// server.on_subscription(|Presence { topics, peer, ended, .. }| match ended {
///     None => println!("{peer} follows {}", topics.join(",")),
///     Some(reason) => println!("{peer} has gone: {reason}"),
/// })?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Presence {
    /// The topics that it follows, each once.
    pub topics: Arc<[Arc<str>]>,
    /// The other end's address; behind a proxy, the proxy's. With its port it names one subscription among those that
    /// are open.
    pub peer: SocketAddr,
    /// Why it has ended, in the log's words; None where it begins.
    pub ended: Option<Reason>,
}

/// The program's hook, if it has set one, and what it is still to hear.
#[derive(Default)]
pub struct PresenceHook {
    queue: Mutex<Queue>,
    /// Notified when something was put into the queue or taken out of it.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    is_wanted: bool,
    is_closed: bool,
    has_ended: bool,
    waiting: VecDeque<Presence>,
}

impl PresenceHook {
    /// Sets the hook; once.
    ///
    /// # Errors
    /// There is one already ([`AlreadyExists`](io::ErrorKind::AlreadyExists)), or no thread can be started.
    pub fn set(self: &Arc<PresenceHook>, hook: impl Fn(&Presence) + Send + 'static) -> io::Result<()> {
        if replace(&mut enter(&self.queue).is_wanted, true) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a hook for subscriptions already"));
        }
        let this = self.clone();
        let call_all = move || {
            this.call_all(&hook);
            drop(hook); // it may hold a hub
            enter(&this.queue).has_ended = true;
            this.changed.notify_all();
        };
        // Without its thread nobody would take anything out of the queue.
        start_thread("presence".into(), Box::new(call_all))
            .map(drop)
            .inspect_err(|_| enter(&self.queue).is_wanted = false)
    }

    /// Whether another subscription may begin: asked before each. Waits a moment while the hook is far behind; no lock
    /// may be held.
    pub fn has_room(&self) -> bool {
        let deadline = Instant::now() + ROOM_TIME;
        let mut queue = enter(&self.queue);
        while queue.waiting.len() >= WAITING && !queue.is_closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = wait(&self.changed, queue, left);
        }
        true
    }

    /// A subscription begins. Never waits.
    pub fn note_begin(&self, topics: &Arc<[Arc<str>]>, peer: SocketAddr) {
        self.put(enter(&self.queue), Presence { topics: topics.clone(), peer, ended: None });
    }

    /// A subscription has ended. Never waits.
    pub fn note_end(&self, topics: &Arc<[Arc<str>]>, peer: SocketAddr, reason: Reason) {
        self.put(enter(&self.queue), Presence { topics: topics.clone(), peer, ended: Some(reason) });
    }

    fn put(&self, mut queue: MutexGuard<'_, Queue>, presence: Presence) {
        if queue.is_wanted {
            queue.waiting.push_back(presence);
            self.changed.notify_all();
        }
    }

    /// Nothing more happens: waits until the hook has heard all of it, or until the deadline.
    pub fn close(&self, deadline: Instant) {
        let mut queue = enter(&self.queue);
        queue.is_closed = true;
        self.changed.notify_all();
        while queue.is_wanted && !queue.has_ended && Instant::now() < deadline {
            queue = wait(&self.changed, queue, deadline.saturating_duration_since(Instant::now()));
        }
    }

    /// The life of the thread: one call after another, until nothing more happens.
    fn call_all(&self, hook: &impl Fn(&Presence)) {
        let mut queue = enter(&self.queue);
        loop {
            if let Some(presence) = queue.waiting.pop_front() {
                self.changed.notify_all();
                drop(queue);
                call(|| hook(&presence));
                queue = enter(&self.queue);
            } else if queue.is_closed {
                return;
            } else {
                queue = wait(&self.changed, queue, SLEEP_TIME);
            }
        }
    }
}
