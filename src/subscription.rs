//! A stream of topics: how it is opened, served while it is behind, and ended.
//!
//! Connecting, resuming and being slow are the same thing, *being behind*: a thread replays everything after the cursor
//! with writes that may wait. Once nothing newer is kept, the subscriber turns live, its socket is the lane's, and the
//! thread is free; where a write of the lane does not fit, the subscriber is queued for a thread again. Between two
//! owners an event could be lost, or written twice:
//!
//! # Why nothing is lost and nothing comes twice
//! 1. The topics count their subscriber before anything else (`History::subscribe`), so from then on publishing hands
//!    its lane every event.
//! 2. The lane is told of the subscriber before it turns live (`Lane::join` in [`Served::turn_live`]), and looks whom
//!    it was told of between taking an event from its queue and writing it (`Worker::write_run`). So a lane that takes
//!    an event which was queued after that knows the subscriber.
//! 3. "Nothing newer is kept" and "live" happen in one hold of the history's lock ([`Served::turn_live`]).
//! 4. Publishing keeps an event before it queues it (`Core::hand_out`). So an event is either kept before 3, and was
//!    replayed; or it is kept after 3, and queued after that, for a lane to which the subscriber is live.
//! 5. A lane skips what is not newer than the cursor (`Worker::write_run`, `Connection::deliver`): what was replayed
//!    and still stands in the queue does not come twice.
//!
//! A stream that begins with the newest of each topic has a floor for each (`cursor.rs`). What 3 and 4 say is then said
//! of what is above the floors, which is all that is wanted; turning live, the cursor moves up to the highest of them,
//! so that it is enough for 5.
//!
//! `make model` runs this in many orders of the threads, and `make model-broken` with one of the legs left out.
//!
//! The way back: whoever falls behind does so under the state's lock, with the cursor at the last whole event and the
//! next one unfinished (`Connection::deliver`). What the lane passes over from then on is kept, or a gap tells of it.
//!
//! # Whose it is
//! Each change of the phase happens under the state's lock, and what the subscriber follows goes with it:
//!
//! | from | to | by | then |
//! |---|---|---|---|
//! | behind | live | its thread | lies in the state, and the thread is free |
//! | live | queued | its lane, or the clerk when its time is over | lies in the state, in the pool's line |
//! | live | closed | its lane | lies in the state, until the clerk notes the end |
//! | behind | queued | its thread, for which others wait | lies in the state, in the pool's line |
//! | queued | behind | a thread of the pool | the thread has it |
//! | behind | closed | its thread | gone |
//!
//! So only one at a time has it, and whoever takes it last notes the end, once.

use crate::clock::spread;
use crate::config::Log;
use crate::connection::{Connection, PATIENCE, Phase, Reason, STOPPING};
use crate::cursor::Next;
use crate::desk::Desk;
use crate::encoded::{Run, Shapes};
use crate::event::Id;
use crate::feed::{NOT_REACHED, reach};
use crate::form::Form;
use crate::history::History;
use crate::hub::Core;
use crate::log::Logger;
use crate::outgoing::{Outgoing, Unfinished};
use crate::places::Places;
use crate::pool::{Kind, Pool, Seat};
use crate::presence::FAR_BEHIND;
use crate::subscriber::{Opened, Subscriber};
use crate::sync::{MutexGuard, enter};
use crate::text::quoted;
use crate::wanted::Wanted;
use std::mem::take;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// How soon a client comes back after a poll. What is published meanwhile is kept, so this only bounds the requests.
const POLL_RETRY: Duration = Duration::from_millis(100);
/// The log writes this end only at its debug level, since polls end all the time.
const POLL_IS_OVER: Reason = "the poll is over";
const LIFETIME_IS_OVER: Reason = "the lifetime is over";
/// The same for this one: a script may ask for one event after another.
const ALL_IS_TAKEN: Reason = "all events that were asked for have been sent";
/// While others wait, a subscriber gives its thread back after so long.
const TURN: Duration = Duration::from_millis(250);
/// Why a stream is rejected. The client is told in a comment; in the log both need the debug level, or a flood would
/// fill it.
pub const NO_ROOM: Reason = "no room for another stream";
pub const NO_THREAD: Reason = "no thread for another stream of a handler";
const NO_NAMES: Reason = "all topic names are in use";

/// What serving streams takes. Shared by all threads.
pub struct Streams {
    pub core: Arc<Core>,
    pub places: Arc<Places>,
    pub pool: Arc<Pool>,
    pub desk: Arc<Desk>,
    pub log: Arc<Logger>,
}

/// A subscriber on a thread. Dropping it, also by a panic, notes its end.
struct Served<'a> {
    streams: &'a Arc<Streams>,
    c: &'a Arc<Connection>,
    /// None once it was given away.
    subscriber: Option<Box<Subscriber>>,
    reason: Reason,
}

/// What comes after a step.
enum Step {
    Again,
    /// It was given to its lane.
    Live,
    /// Others need the thread.
    Queue,
    End(Reason),
}

impl Streams {
    /// Counts a subscriber and finds its start, in one hold of the history's lock: what is forgotten in between would
    /// be a gap that nobody tells. The response's head and a first block are left unfinished: the block has no data, so
    /// browsers dispatch no event for it; but one that is cut off before its first event resumes from the block's id.
    /// Forms without blocks begin with what they have to say.
    ///
    /// # Errors
    /// All topic names are in use; or with an engine, it has not shown yet what the client has seen elsewhere.
    pub fn open(
        &self,
        c: &Arc<Connection>,
        lane: usize,
        wanted: Wanted,
        head: &str,
        opened: Opened,
    ) -> Result<Box<Subscriber>, (Reason, Opened)> {
        let config = &self.core.config;
        if !reach(&self.core, &wanted.start) {
            return Err((NOT_REACHED, opened));
        }
        let mut history = self.core.history();
        let Ok(names) = history.subscribe(&wanted.names) else { return Err((NO_NAMES, opened)) };
        let ((cursor, gap), told) = (history.start(&names, wanted.start), history.told(&names));
        let floors = history.floors(&names, wanted.start);
        drop(history);
        let retry = if wanted.poll.is_some() { POLL_RETRY } else { config.retry };
        // Where a gap follows, the id comes with it: a client that is cut off before the gap must hear of it again.
        let id = if gap.is_none() { format!("id: {cursor}\n") } else { String::new() };
        let first = format!("retry: {}\n{id}\n", retry.as_millis());
        let mut state = enter(&c.state);
        let mut bytes = head.as_bytes().to_vec();
        if wanted.form == Form::Events {
            bytes.extend(state.shape.framing.wrap(first.as_bytes()));
        }
        let told_gap = gap.filter(|_| wanted.form.tells_gaps());
        if let Some(gap) = &told_gap {
            bytes.extend_from_slice(&gap.shaped(state.shape, None));
            self.core.counters.gaps.fetch_add(1, Relaxed);
            self.core.counters.delivered.fetch_add(1, Relaxed);
        }
        (state.cursor, state.sent, state.is_poll) = (cursor, told_gap.is_some().into(), wanted.poll.is_some());
        state.wanted = wanted.take.unwrap_or(u64::MAX);
        state.unfinished = Some(Unfinished { what: Outgoing::Other(bytes), offset: 0 });
        drop(state);
        let now = Instant::now();
        let deadline = now + spread(config.lifetime, 80, 100);
        let due = wanted.poll.map_or(deadline, |time| deadline.min(now + time));
        self.desk.note_due(due, c.clone());
        let (has_joined, poll_until) = (false, None);
        Ok(Box::new(Subscriber { names, told, floors, lane, has_joined, due, deadline, poll_until, opened }))
    }

    /// Serves a subscriber that was just opened, on the thread of its request.
    pub fn start(self: &Arc<Streams>, seat: &mut Seat, c: &Arc<Connection>, subscriber: Box<Subscriber>) {
        let mut served = Served::new(self, c, subscriber);
        match c.set_nonblocking(true) {
            Err(reason) => served.reason = reason,
            // Where it has no share, because others are slow, it still gets what it takes without waiting: mostly that
            // is all there is, and it is live.
            Ok(()) => match served.begin() {
                Ok(()) => served.serve(seat.change_to(Kind::Behind)),
                Err(reason) => served.reason = reason,
            },
        }
    }

    /// What the clerk does with whom a lane let go.
    pub fn take_over(self: &Arc<Streams>, c: &Arc<Connection>) {
        let mut state = enter(&c.state);
        match state.phase {
            Phase::Queued => {
                drop(state);
                self.hand(c);
            }
            Phase::Closed(reason) => {
                let subscriber = state.subscriber.take();
                drop(state);
                if let Some(subscriber) = subscriber {
                    self.note_end(c, &subscriber, reason);
                }
            }
            _ => {}
        }
    }

    /// Ends a subscriber as soon as a frame has ended, from any thread. Where no reason is given, its time is over.
    pub fn end_soon(self: &Arc<Streams>, c: &Arc<Connection>, why: Option<Reason>) {
        let mut state = enter(&c.state);
        let its_time = if state.is_poll { POLL_IS_OVER } else { LIFETIME_IS_OVER };
        match why {
            Some(why) => state.ending = Some(why),
            None => drop(state.ending.get_or_insert(its_time)),
        }
        if state.phase == Phase::Live && state.subscriber.is_some() {
            state.phase = Phase::Queued;
            drop(state);
            self.hand(c);
        }
    }

    /// Puts a queued subscriber into the line for a thread. Where there are none any more, it ends.
    fn hand(self: &Arc<Streams>, c: &Arc<Connection>) {
        let (streams, queued) = (self.clone(), c.clone());
        let serve = move |_: &mut Seat| {
            let mut state = enter(&queued.state);
            let Some(subscriber) = state.subscriber.take() else { return };
            state.phase = Phase::Behind;
            drop(state);
            Served::new(&streams, &queued, subscriber).serve(true);
        };
        if !self.pool.hand(Kind::Behind, Box::new(serve)) {
            let subscriber = enter(&c.state).subscriber.take();
            subscriber.iter().for_each(|subscriber| self.note_end(c, subscriber, STOPPING));
        }
    }

    /// Notes the end of a subscriber. Only for whoever has taken it out of the state.
    fn note_end(&self, c: &Connection, subscriber: &Subscriber, reason: Reason) {
        enter(&c.state).phase = Phase::Closed(reason);
        self.desk.forget_due(subscriber.due, c.serial);
        if subscriber.has_joined {
            self.core.lanes[subscriber.lane].leave(c.serial, &subscriber.names);
        }
        self.core.history().unsubscribe(&subscriber.names);
        let _ = c.socket.shutdown(Shutdown::Write); // its lane may keep the socket open for a moment
        self.log_end(c, &subscriber.opened, reason);
        self.core.presence.note_end(&subscriber.names, c.peer, c.cut.get().copied().unwrap_or(reason));
        self.places.leave(c);
    }

    /// One line for each stream, in fields that a script can read.
    pub fn log_end(&self, c: &Connection, opened: &Opened, reason: &str) {
        let (open, sent) = (opened.at.elapsed(), enter(&c.state).sent);
        let (seconds, tenths) = (open.as_secs(), open.subsec_millis() / 100);
        let (peer, path, reason) = (c.peer, quoted(&opened.path), c.cut.get().copied().unwrap_or(reason));
        let line =
            format_args!("closed peer={peer} path={path} reason={reason:?} seconds={seconds}.{tenths} events={sent}");
        // These ends come as fast as a flood may.
        let repeats =
            [POLL_IS_OVER, ALL_IS_TAKEN, NO_ROOM, NO_THREAD, NO_NAMES, NOT_REACHED, FAR_BEHIND].contains(&reason);
        self.log.line(if repeats { Log::Debug } else { Log::Info }, line);
    }
}

impl<'a> Served<'a> {
    fn new(streams: &'a Arc<Streams>, c: &'a Arc<Connection>, subscriber: Box<Subscriber>) -> Served<'a> {
        Served { streams, c, subscriber: Some(subscriber), reason: "this server panicked: a fault" }
    }

    /// Serves it until it is live, has ended, or its turn is over because others need the thread. It may be that the
    /// thread must not wait for the peer at all.
    fn serve(mut self, may_wait: bool) {
        let (pool, until) = (&self.streams.pool, Instant::now() + TURN);
        let patience = || match pool.is_nobody_waiting() {
            true => PATIENCE,
            false => until.saturating_duration_since(Instant::now()), // what is left of its turn
        };
        loop {
            match self.step(&patience, may_wait) {
                Step::Again => {}
                Step::Live => return,
                Step::Queue => return self.queue(),
                Step::End(reason) => return self.reason = reason,
            }
        }
    }

    /// Finishes what was begun, and takes the next step: a run of events, a gap, or to turn live.
    fn step(&mut self, patience: &dyn Fn() -> Duration, may_wait: bool) -> Step {
        let (core, c) = (&*self.streams.core, self.c);
        let Some(subscriber) = &mut self.subscriber else { return Step::Live };
        // First of all: an event or heartbeat that the lane has begun must end before anything else is written.
        match c.finish(subscriber.deadline, &|| if may_wait { patience() } else { Duration::ZERO }) {
            Ok((true, finished)) => core.counters.delivered.fetch_add(finished, Relaxed),
            Ok((false, _)) => return Step::Queue,
            Err(reason) => return Step::End(reason),
        };
        // The state's lock is given up before the history's is taken: whoever takes both takes the history's first.
        let state = enter(&c.state);
        let (cursor, shape, ending, is_poll) = (state.cursor, state.shape, state.ending, state.is_poll);
        let is_polled = is_poll && (state.sent > 0 || ending.is_some());
        let has_taken_all = state.wanted == 0;
        drop(state);
        if core.is_stopping() {
            return self.end(STOPPING, spread(core.config.retry, 50, 150));
        } else if let Some(why) = ending.filter(|why| *why != POLL_IS_OVER) {
            return self.end(why, core.config.retry);
        } else if has_taken_all {
            let (why, retry) = if is_poll { (POLL_IS_OVER, POLL_RETRY) } else { (ALL_IS_TAKEN, core.config.retry) };
            return self.end(why, retry);
        } else if patience().is_zero() {
            return Step::Queue;
        }
        let history = core.history();
        // Without its bound a poll would go on for as long as events come faster than its reader takes them.
        let until = is_polled.then(|| *subscriber.poll_until.get_or_insert(history.newest()));
        match history.next(&subscriber.names, cursor, &subscriber.told, &subscriber.floors, shape.framing) {
            next if until.is_some_and(|until| cursor >= until || matches!(next, Next::Nothing)) => {
                drop(history);
                self.end(POLL_IS_OVER, POLL_RETRY)
            }
            Next::Nothing => self.turn_live(history),
            Next::Gap(gap) => {
                subscriber.told = history.told(&subscriber.names);
                drop(history);
                let mut state = enter(&c.state);
                if shape.form.tells_gaps() {
                    core.counters.gaps.fetch_add(1, Relaxed);
                    state.unfinished = Some(Unfinished { what: Outgoing::Gap(gap), offset: 0 });
                } else {
                    state.cursor = gap.id;
                }
                Step::Again
            }
            Next::Events(run) => {
                drop(history);
                self.deliver(&run).map_or_else(Step::End, |()| Step::Again)
            }
        }
    }

    /// Of a stream that has just been opened, writes the head and the first events in one go, so that a crowd that
    /// comes back costs one write for each, as far as the kernel takes it.
    fn begin(&self) -> Result<(), Reason> {
        let Some(subscriber) = &self.subscriber else { return Ok(()) };
        let state = enter(&self.c.state);
        if state.ending.is_some() {
            return Ok(()); // its right has ended since it was checked: it gets no event
        }
        let (cursor, framing) = (state.cursor, state.shape.framing);
        drop(state);
        let history = self.streams.core.history();
        let next = history.next(&subscriber.names, cursor, &subscriber.told, &subscriber.floors, framing);
        drop(history);
        if let Next::Events(run) = next { self.deliver(&run) } else { Ok(()) }
    }

    /// Writes a run without waiting.
    fn deliver(&self, run: &Run) -> Result<(), Reason> {
        let (core, mut state) = (&*self.streams.core, enter(&self.c.state));
        let shape = state.shape;
        let whole = self.c.deliver(&mut state, Shapes::of(run).get(shape), Instant::now())?;
        core.counters.delivered.fetch_add(whole, Relaxed);
        if let Some(Unfinished { what: Outgoing::Event(event, _), .. }) = &mut state.unfinished {
            *event = enter(&core.begun).share(event);
        }
        Ok(())
    }

    /// Gives the socket to the lane, in the hold of the history's lock that has shown that nothing newer is kept: 2 and
    /// 3 of the proof. Not where it is to end: who ends live streams may have passed by just before.
    fn turn_live(&mut self, history: MutexGuard<'_, History>) -> Step {
        let Some(subscriber) = &mut self.subscriber else { return Step::Live };
        if !subscriber.has_joined {
            self.streams.core.lanes[subscriber.lane].join(self.c, &subscriber.names);
            subscriber.has_joined = true;
        }
        let mut state = enter(&self.c.state);
        if state.ending.is_some() || self.streams.core.is_stopping() {
            return Step::Again;
        }
        // Whatever is not newer than the highest floor has been replayed, or is not wanted: from here on, no floor
        // matters.
        state.cursor = take(&mut subscriber.floors).into_iter().fold(state.cursor, Id::max);
        state.subscriber = self.subscriber.take();
        state.phase = Phase::Live;
        drop((state, history));
        Step::Live
    }

    /// Gives the thread back, and waits for another one.
    fn queue(mut self) {
        let mut state = enter(&self.c.state);
        state.subscriber = self.subscriber.take();
        state.phase = Phase::Queued;
        drop(state);
        self.streams.hand(self.c);
    }

    /// Ends the stream; its last frame must be whole. If its topics keep nothing newer, the client is given the newest
    /// id of all topics to resume from: with its own last id, the page of a quiet topic would hear a gap for what other
    /// topics have forgotten since. Both are looked at in one hold of the history's lock, so nothing lies between the
    /// two ids: whatever stands in a lane's queue is kept already.
    fn end(&self, why: Reason, retry: Duration) -> Step {
        let Some(subscriber) = &self.subscriber else { return Step::Live };
        let cursor = enter(&self.c.state).cursor;
        let history = self.streams.core.history();
        let newest = history.newest();
        let is_ahead =
            newest > cursor && !history.has_news(&subscriber.names, cursor, &subscriber.told, &subscriber.floors);
        drop(history);
        Step::End(self.c.end(why, retry, is_ahead.then_some(newest)))
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        if let Some(subscriber) = self.subscriber.take() {
            self.streams.note_end(self.c, &subscriber, self.reason);
        }
    }
}
