//! A stream of topics, while it must be waited for.
//!
//! Connecting, resuming and being slow are the same thing, *being behind*: the connection's thread replays everything
//! after the cursor with writes that wait. Once nothing newer is kept, the subscriber turns live, its socket is the
//! lane's, and the thread sleeps until the lane gives the socket back. Between the two owners an event could be lost,
//! or written twice:
//!
//! # Why nothing is lost and nothing comes twice
//! 1. The topics count their subscriber before anything else (`History::subscribe`), so from then on publishing hands
//!    its lane every event.
//! 2. `ToLane::Join` stands in the lane's queue before the subscriber turns live (`Subscription::serve`). The queue is
//!    first in, first out: a lane that takes an event which was queued after that knows the subscriber.
//! 3. "Nothing newer is kept" and "live" happen in one hold of the history's lock (`Subscription::follow`).
//! 4. Publishing keeps an event before it queues it (`Core::hand_out`). So an event is either kept before 3, and was
//!    replayed; or it is kept after 3, and queued after that, for a lane to which the subscriber is live.
//! 5. A lane skips what is not newer than the cursor (`Lane::write_run`, `Connection::deliver`): what was replayed and
//!    still stands in the queue does not come twice.
//!
//! The way back: whoever falls behind does so under the state's lock, with the cursor at the last whole event and the
//! next one unfinished (`State::fall_behind`). What the lane passes over from then on is kept, or a gap tells of it.

use crate::clock::spread;
use crate::connection::{Connection, Phase, Reason, STOPPING, State};
use crate::cursor::{Next, Start};
use crate::encoded::Encoded;
use crate::event::Id;
use crate::feed::reach;
use crate::hub::Core;
use crate::lane::ToLane;
use crate::sync::enter;
use crossbeam_channel::Sender;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long `?poll` waits for its first event: less than the 30 s after which some proxies cut a silent answer.
pub const POLL_TIME: Duration = Duration::from_secs(25);
/// How soon a client comes back after a poll. What is published meanwhile is kept, so this only bounds the requests.
const POLL_RETRY: Duration = Duration::from_millis(100);
/// The log writes this end only at its debug level, since polls end all the time.
pub const POLL_IS_OVER: Reason = "the poll is over";
/// Why a stream was not opened: the client is told to come back.
pub const NO_NAMES: Reason = "all topic names are in use";
pub const NOT_REACHED: Reason = "events that another server has sent have not come here yet";

/// What a request for a stream of topics has asked for.
pub struct Wanted {
    /// Each once.
    pub names: Vec<String>,
    pub start: Start,
    /// How long it waits for its first event; then it ends. None for a stream that goes on.
    pub poll: Option<Duration>,
}

/// A subscriber, for as long as its topics count it. Dropping it takes it off its lane and off its topics.
pub struct Subscription<'a> {
    core: &'a Core,
    c: &'a Arc<Connection>,
    lane: &'a Sender<ToLane>,
    /// Shared with the lane; each is the topic's own string.
    names: Arc<[Arc<str>]>,
    /// The cursor it starts after, and the gap it must hear first.
    start: (Id, Option<Encoded>),
    /// What each topic had forgotten when the subscriber was last told of a gap.
    told: Vec<Id>,
    /// Until when a poll waits for its first event.
    poll_until: Option<Instant>,
    /// When the lifetime is over.
    deadline: Instant,
}

impl<'a> Subscription<'a> {
    /// Counts the subscriber and finds its start, in one hold of the history's lock: what is forgotten in between would
    /// be a gap that nobody tells. With an engine, it may first have to show what the client has seen elsewhere.
    pub fn open(
        core: &'a Core,
        c: &'a Arc<Connection>,
        lane: &'a Sender<ToLane>,
        wanted: Wanted,
    ) -> Result<Subscription<'a>, Reason> {
        if !reach(core, &wanted.start) {
            return Err(NOT_REACHED);
        }
        let mut history = core.history();
        let names = history.subscribe(&wanted.names).map_err(|_| NO_NAMES)?;
        let (start, told) = (history.start(&names, wanted.start), history.told(&names));
        drop(history);
        let deadline = Instant::now() + spread(core.config.lifetime, 80, 100);
        let poll_until = wanted.poll.map(|time| Instant::now() + time);
        Ok(Subscription { core, c, lane, names, start, told, poll_until, deadline })
    }

    /// Serves the stream to its end, and returns why it ended.
    pub fn serve(mut self, head: String) -> Reason {
        if let Err(reason) = self.begin(head) {
            return reason;
        }
        let _ = self.lane.send(ToLane::Join(self.c.clone(), self.names.clone()));
        self.follow()
    }

    /// Writes the head and a block without data, which browsers dispatch no event for; but one that is cut off before
    /// its first event resumes from the block's id.
    fn begin(&mut self, head: String) -> Result<(), Reason> {
        let is_poll = self.poll_until.is_some();
        let (cursor, gap) = (self.start.0, self.start.1.take());
        let retry = if is_poll { POLL_RETRY } else { self.core.config.retry };
        // Where a gap follows, the id comes with it: a client that is cut off before the gap must hear of it again.
        let id = if gap.is_none() { format!("id: {cursor}\n") } else { String::new() };
        let first = format!("retry: {}\n{id}\n", retry.as_millis());
        let mut state = enter(&self.c.state);
        (state.cursor, state.sent, state.is_poll) = (cursor, gap.is_some().into(), is_poll);
        let framing = state.framing;
        drop(state);
        let mut bytes = [head.into_bytes(), framing.wrap(first.as_bytes())].concat();
        if let Some(gap) = &gap {
            bytes.extend_from_slice(gap.bytes(framing));
            self.core.counters.gaps.fetch_add(1, Relaxed);
            self.core.counters.delivered.fetch_add(1, Relaxed);
        }
        self.c.write_waiting(&bytes, self.deadline)
    }

    /// Replays, turns live, sleeps until the lane gives the socket back, and begins again, until the stream ends.
    fn follow(&mut self) -> Reason {
        let (core, c) = (self.core, self.c);
        loop {
            // First of all: an event or heartbeat that the lane has begun must end before anything else is written.
            match c.finish(self.deadline) {
                Ok(finished) => core.counters.delivered.fetch_add(finished, Relaxed),
                Err(reason) => return reason,
            };
            if core.is_stopping() {
                return self.end(STOPPING, spread(core.config.retry, 50, 150));
            } else if Instant::now() >= self.deadline {
                return self.end("the lifetime is over", core.config.retry);
            }
            // The state's lock is given up before the history's is taken: whoever takes both takes the history's first.
            let State { cursor, sent, framing, .. } = *enter(&c.state);
            let history = core.history();
            match history.next(&self.names, cursor, &self.told, framing) {
                Next::Nothing if self.poll_until.is_some_and(|until| sent > 0 || Instant::now() >= until) => {
                    drop(history);
                    return self.end(POLL_IS_OVER, POLL_RETRY);
                }
                Next::Nothing => {
                    let mut state = enter(&c.state);
                    state.phase = Phase::Live; // under the history's lock still: see 3 above
                    drop(history);
                    if let Some(reason) = self.sleep(state) {
                        return reason;
                    }
                }
                Next::Gap(gap) => {
                    self.told = history.told(&self.names);
                    drop(history);
                    core.counters.gaps.fetch_add(1, Relaxed);
                    enter(&c.state).fall_behind(gap, 0);
                }
                Next::Events(run) => {
                    drop(history);
                    let mut state = enter(&c.state);
                    core.counters.delivered.fetch_add(c.deliver(&mut state, &run, Instant::now()), Relaxed);
                    if let Phase::Closed(reason) = state.phase {
                        return reason;
                    }
                }
            }
        }
    }

    /// Ends the stream; its last frame must be whole. If its topics keep nothing newer, the client is given the newest
    /// id of all topics to resume from: with its own last id, the page of a quiet topic would hear a gap for what other
    /// topics have forgotten since. Both are looked at in one hold of the history's lock, so nothing lies between the two
    /// ids: whatever stands in a lane's queue is kept already.
    fn end(&self, why: Reason, retry: Duration) -> Reason {
        let cursor = enter(&self.c.state).cursor;
        let history = self.core.history();
        let newest = history.newest();
        let is_ahead = newest > cursor && !history.has_news(&self.names, cursor, &self.told);
        drop(history);
        self.c.end(why, retry, is_ahead.then_some(newest))
    }

    /// Sleeps while the subscriber is live, with the state's lock given up. Returns why the connection closed, if it
    /// did; else the socket is the thread's again.
    fn sleep(&self, mut state: MutexGuard<'_, State>) -> Option<Reason> {
        while state.phase == Phase::Live {
            let until = self.poll_until.unwrap_or(self.deadline).min(self.deadline);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.core.is_stopping() {
                state.phase = Phase::Behind;
                break;
            }
            state = self.c.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match state.phase {
            Phase::Closed(reason) => Some(reason),
            _ => None,
        }
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        // Waits while the lane's queue is full; the lane never waits for us. Until it has taken this, it finds the
        // subscriber not live.
        let _ = self.lane.send(ToLane::Leave(self.c.serial, self.names.clone()));
        self.core.history().unsubscribe(&self.names);
    }
}
