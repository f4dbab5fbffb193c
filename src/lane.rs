//! Writing to whoever is live.
//!
//! A lane is a thread that writes to many subscribers, each write without waiting: one that waited would hold up all
//! the others. It drains its queue and writes neighbouring events of one topic as one run, so a burst costs each
//! subscriber one write instead of one for each event, and no thread is woken to deliver. A lane takes neither the
//! order lock nor that of the history, so a publisher that waits for room in its queue, with the order lock held,
//! always gets it.
//!
//! A lane never waits, so it never sends to a queue that may be full either, and ends nobody: whom it lets go, because
//! a write did not fit or failed, it lays on the clerk's desk. A subscriber is on its lane's lists from before it first
//! turns live until it ends; its phase says whether the lane may touch its socket.

use crate::clock::spread;
use crate::config::SWEEP;
use crate::connection::{Connection, Phase, STOPPING, State};
use crate::desk::Desk;
use crate::encoded::{BATCH_BYTES, Encoded, Framing, Run, Shapes};
use crate::event::Id;
use crate::metrics::Counters;
use crate::sync::{Mutex, enter, start_thread};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::mem::take;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Slots of a lane's queue. An event takes one, and one more for each KiB, so that the queue is bounded in bytes, too
/// (4 MiB and one event for each publisher).
const QUEUE_SLOTS: usize = 4096;
/// To write to this many subscribers takes a lane about a millisecond, and events that arrive meanwhile need a second
/// write. So before it writes, the lane waits for the rest of a burst: as long as another event comes within each
/// `COMPANY_WAIT`, but no longer than `COMPANY_TIME`. A burst of 50 events to 1,000 subscribers then costs 22 % less,
/// and in a flood p99 is an eighth.
const CROWD: usize = 250;
const COMPANY_WAIT: Duration = Duration::from_micros(20);
const COMPANY_TIME: Duration = Duration::from_millis(2);
const _: () =
    assert!(COMPANY_WAIT.as_micros() < COMPANY_TIME.as_micros() && COMPANY_TIME.as_millis() < SWEEP.as_millis());

/// So many are swept between two batches at most, or a crowd's sweep would hold events up.
const SWEPT_AT_ONCE: usize = 1_000;
/// How long a peer that seems to have gone has to answer with a reset. One that has only ended its sending side does
/// not.
const DOUBT_TIME: Duration = Duration::from_millis(100);
const _: () = assert!((SWEEP.as_millis() + DOUBT_TIME.as_millis()) < 2_000, "a closed tab is noticed within 2 s");

/// A lane, for those who hand something to it.
pub struct Lane {
    queue: Sender<ToLane>,
    /// Who comes and goes, which the lane takes before it writes. Not in its queue, where they would compete with
    /// publishers, and a subscriber that ends would wait for room. Locked shortly; the innermost lock. None once the
    /// lane has ended: whoever came then would be held for as long as the program has a hub.
    changes: Arc<Mutex<Option<Vec<Change>>>>,
}

/// What stands in a lane's queue, first in, first out.
enum ToLane {
    Event(Arc<str>, Encoded),
    /// Takes up a slot for each KiB of the event before it.
    Weight,
    /// Somebody leaves, whose socket should be closed soon.
    Change,
    /// Every live stream ends, after the events before this: the id is the newest of them.
    EndStreams(Id),
    /// Everyone looks at the history again, after the events before this: it has forgotten something without an event.
    Look,
    /// The lane ends, whatever stands after this.
    Stop,
}

/// How live streams end when the server stops.
pub struct Ending {
    pub retry: Duration,
    /// From here on the lanes write no more events: streams end where they are.
    pub hurry_at: Instant,
    /// From here on nothing is written: streams are cut.
    pub deadline: Instant,
}

enum Change {
    /// A subscriber of these topics, before it turns live.
    Join(Arc<Connection>, Arc<[Arc<str>]>),
    /// Its serial number and topics, after it was live for the last time.
    Leave(u64, Arc<[Arc<str>]>),
}

impl Lane {
    /// Starts a lane. Its thread ends at [`Lane::stop`], or when this is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        name: String,
        heartbeat: Duration,
        ending: Arc<OnceLock<Ending>>,
        desk: Arc<Desk>,
        counters: Arc<Counters>,
    ) -> io::Result<(Lane, JoinHandle<()>)> {
        let (sender, queue) = bounded(QUEUE_SLOTS);
        let changes = Arc::new(Mutex::new(Some(Vec::new())));
        let worker = Worker {
            changes: changes.clone(),
            topics: HashMap::new(),
            everyone: BTreeMap::new(),
            swept_to: None,
            doubtful: VecDeque::new(),
            run: Run::new(Framing::Chunked),
            topic_of_run: None,
            heartbeat,
            ending,
            desk,
            counters,
        };
        Ok((Lane { queue: sender, changes }, start_thread(name, Box::new(move || worker.work(&queue)))?))
    }

    /// Hands an event to the lane; waits while its queue is full. Called with the order lock held, in the order of the
    /// ids.
    pub fn send(&self, topic: &Arc<str>, event: &Encoded) {
        let _ = self.queue.send(ToLane::Event(topic.clone(), event.clone()));
        for _ in 0..event.memory() / 1024 {
            let _ = self.queue.send(ToLane::Weight);
        }
    }

    /// Tells the lane of a subscriber, before it turns live: leg 2 of the proof in `subscription.rs`.
    pub fn join(&self, c: &Arc<Connection>, names: &Arc<[Arc<str>]>) {
        self.note(Change::Join(c.clone(), names.clone()));
    }

    /// Takes a subscriber off the lane, after it was live for the last time. Never waits.
    pub fn leave(&self, serial: u64, names: &Arc<[Arc<str>]>) {
        self.note(Change::Leave(serial, names.clone()));
        // If its queue is full, it looks at the changes anyway.
        let _ = self.queue.try_send(ToLane::Change);
    }

    fn note(&self, change: Change) {
        if let Some(changes) = &mut *enter(&self.changes) {
            changes.push(change);
        }
    }

    /// Ends all live streams, after what is queued already. Called with the order lock held, once the server stops.
    pub fn end_streams(&self, newest: Id) {
        let _ = self.queue.send(ToLane::EndStreams(newest));
    }

    /// Has every subscriber look at the history again, which has forgotten something. Called with the order lock held.
    pub fn look(&self) {
        let _ = self.queue.send(ToLane::Look);
    }

    pub fn stop(&self) {
        let _ = self.queue.send(ToLane::Stop);
    }
}

/// Everything here is the lane's own: no other thread sees these lists.
struct Worker {
    changes: Arc<Mutex<Option<Vec<Change>>>>,
    /// Each topic's subscribers on this lane, live or not, by their serial numbers.
    topics: HashMap<Arc<str>, BTreeMap<u64, Arc<Connection>>>,
    /// All of them once, for the sweep, and handlers' streams.
    everyone: BTreeMap<u64, Arc<Connection>>,
    /// The last serial number that was swept, in the middle of a sweep.
    swept_to: Option<u64>,
    /// Who may have gone, and when to look again.
    doubtful: VecDeque<(Instant, Arc<Connection>)>,
    /// Neighbouring events of one topic that have not been written yet. Empty between two batches.
    run: Run,
    topic_of_run: Option<Arc<str>>,
    /// The longest silence that subscribers may see.
    heartbeat: Duration,
    /// Set when the server stops. Looked at before each run, since thousands of events may stand in the queue.
    ending: Arc<OnceLock<Ending>>,
    desk: Arc<Desk>,
    counters: Arc<Counters>,
}

impl Worker {
    /// Drains, sweeps when it is time to, and begins again.
    fn work(mut self, queue: &Receiver<ToLane>) {
        let mut sweep_at = Instant::now() + SWEEP;
        loop {
            let doubt_at = self.doubtful.front().map_or(sweep_at, |(at, _)| *at);
            let wake_at = if self.swept_to.is_some() { Instant::now() } else { sweep_at.min(doubt_at) };
            match queue.recv_deadline(wake_at) {
                Ok(first) => {
                    if self.drain(first, queue, wake_at).is_break() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.take_changes(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = Instant::now();
            self.settle_doubts(now);
            if now >= sweep_at || self.swept_to.is_some() {
                self.sweep(now);
                sweep_at = if self.swept_to.is_some() { sweep_at } else { now + SWEEP };
            }
        }
    }

    /// Takes what stands in the queue, up to one batch, and writes it. A flood must not keep the lane from its sweep.
    fn drain(&mut self, first: ToLane, queue: &Receiver<ToLane>, wake_at: Instant) -> ControlFlow<()> {
        // From the first message on, so that no event waits longer than this for company.
        let alone_until = Instant::now() + COMPANY_TIME;
        let until = wake_at.max(alone_until); // in the middle of a sweep there is time for a batch, too
        let mut next = Some(first);
        while let Some(message) = next {
            self.take(message)?;
            let is_full = self.run.bytes.len() >= BATCH_BYTES || Instant::now() >= until;
            if is_full {
                break;
            }
            next = queue.try_recv().ok().or_else(|| self.wait_for_company(queue, alone_until));
        }
        self.write_run();
        ControlFlow::Continue(())
    }

    /// Takes one message. Breaks where the lane is to end.
    fn take(&mut self, message: ToLane) -> ControlFlow<()> {
        match message {
            ToLane::Event(topic, event) => {
                // Of another topic, it would go to other subscribers: what there is goes first, which keeps the order.
                if self.topic_of_run.as_ref() != Some(&topic) || !self.run.has_room_for(event.layout) {
                    self.write_run();
                    self.topic_of_run = Some(topic.clone());
                }
                self.run.push(&topic, &event);
            }
            ToLane::Weight => {}
            ToLane::Change => self.take_changes(),
            ToLane::EndStreams(newest) => {
                self.write_run();
                self.end_streams(Some(newest));
            }
            ToLane::Look => {
                self.write_run();
                self.send_back();
            }
            ToLane::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// With a crowd to write to, waits a moment for the next event of a burst.
    fn wait_for_company(&self, queue: &Receiver<ToLane>, until: Instant) -> Option<ToLane> {
        // With nothing to write, the lane sleeps in its queue instead, where the next message wakes it.
        if self.run.bytes.is_empty() || self.everyone.len() < CROWD || Instant::now() >= until {
            return None;
        }
        thread::sleep(COMPANY_WAIT);
        queue.try_recv().ok()
    }

    fn take_changes(&mut self) {
        let changes = enter(&self.changes).as_mut().map(take).unwrap_or_default();
        for change in changes {
            match change {
                Change::Join(c, names) => {
                    for name in &*names {
                        self.topics.entry(name.clone()).or_default().insert(c.serial, c.clone());
                    }
                    self.everyone.insert(c.serial, c);
                }
                Change::Leave(serial, names) => {
                    for name in &*names {
                        if let Some(subscribers) = self.topics.get_mut(name) {
                            subscribers.remove(&serial);
                            if subscribers.is_empty() {
                                self.topics.remove(name);
                            }
                        }
                    }
                    self.everyone.remove(&serial);
                }
            }
        }
    }

    /// Writes the run to every live subscriber of its topic. Whoever is behind finds its events in the history.
    fn write_run(&mut self) {
        // Whoever turned live before these events were queued has joined before that: leg 2 of the proof.
        self.take_changes();
        if self.run.bytes.is_empty() {
            return;
        }
        let now = Instant::now();
        if self.ending.get().is_some_and(|ending| now >= ending.hurry_at) {
            self.run.clear();
            return self.end_streams(None); // not after an id that they have not seen
        }
        let (mut delivered, mut shapes) = (0, Shapes::of(&self.run));
        let subscribers = self.topic_of_run.as_ref().and_then(|topic| self.topics.get(topic));
        for c in subscribers.into_iter().flatten().map(|(_, c)| c) {
            let mut state = enter(&c.state);
            // Not newer than the cursor: it was replayed before the subscriber turned live (leg 5 of the proof).
            if state.phase != Phase::Live || state.cursor >= self.run.newest() {
                continue;
            } else if state.is_poll {
                // Not written here: a thread replays all that is kept, in one go, and ends the stream.
                self.let_go(c, &mut state, Phase::Queued);
                continue;
            }
            // Others than the usual one are made once for the run, and only where somebody follows the topic in them.
            let run = shapes.get(state.shape);
            match c.deliver(&mut state, run, now) {
                Ok(whole) => delivered += whole,
                Err(reason) => self.let_go(c, &mut state, Phase::Closed(reason)),
            }
            self.let_go_if_behind(c, &mut state);
        }
        self.counters.delivered.fetch_add(delivered, Relaxed);
        self.run.clear();
    }

    /// Looks at the next live subscribers: has one closed, and is a heartbeat due before the next sweep? No thread
    /// wakes for either, unless the subscriber is not live any more.
    fn sweep(&mut self, now: Instant) {
        let next = self.swept_to.map_or(0, |serial| serial + 1);
        self.swept_to = None;
        for (swept, (serial, c)) in self.everyone.range(next..).enumerate() {
            if swept == SWEPT_AT_ONCE {
                self.swept_to = Some(serial - 1);
                break;
            }
            let mut state = enter(&c.state);
            if state.phase != Phase::Live {
                continue;
            }
            let mut looked = c.look(&mut state);
            // At the next sweep it would be overdue. A handler's stream may have something unfinished.
            if looked.is_ok() && now.duration_since(state.wrote) + SWEEP > self.heartbeat && state.unfinished.is_none()
            {
                looked = c.beat(&mut state, now).and(looked);
            }
            match looked {
                Ok(true) => self.doubtful.push_back((now + DOUBT_TIME, c.clone())),
                Ok(false) => {}
                Err(reason) => self.let_go(c, &mut state, Phase::Closed(reason)),
            }
            self.let_go_if_behind(c, &mut state);
        }
    }

    /// Looks again at those who seemed to have gone.
    fn settle_doubts(&mut self, now: Instant) {
        while self.doubtful.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, c)) = self.doubtful.pop_front() else { return };
            let mut state = enter(&c.state);
            if state.phase == Phase::Live
                && let Err(reason) = c.look(&mut state)
            {
                self.let_go(&c, &mut state, Phase::Closed(reason));
            }
        }
    }

    /// Ends every live stream of topics, whose frame has ended, since it is live. A handler ends its own.
    /// `newest` is what they resume after, if they have had everything up to there.
    fn end_streams(&self, newest: Option<Id>) {
        let Some(Ending { retry, deadline, .. }) = self.ending.get() else { return };
        for c in self.everyone.values() {
            let mut state = enter(&c.state);
            if state.phase == Phase::Live && state.subscriber.is_some() {
                if Instant::now() < *deadline {
                    c.end_now(&state, STOPPING, spread(*retry, 50, 150), newest.filter(|id| *id > state.cursor));
                }
                self.let_go(c, &mut state, Phase::Closed(STOPPING));
            }
        }
    }

    fn send_back(&self) {
        for c in self.everyone.values() {
            let mut state = enter(&c.state);
            if state.phase == Phase::Live && state.subscriber.is_some() {
                self.let_go(c, &mut state, Phase::Queued);
            }
        }
    }

    /// A write did not fit, and the rest waits for a thread; or the stream has had all it asked for, and a thread ends
    /// it. A handler's stream has a thread, which finds what is left.
    fn let_go_if_behind(&self, c: &Arc<Connection>, state: &mut State) {
        let wants_thread = state.unfinished.is_some() || state.wanted == 0;
        if state.phase == Phase::Live && wants_thread && state.subscriber.is_some() {
            self.let_go(c, state, Phase::Queued);
        }
    }

    /// From here on the socket is not the lane's. Whoever is let go lies on the desk once: it was live until now.
    fn let_go(&self, c: &Arc<Connection>, state: &mut State, phase: Phase) {
        state.phase = phase;
        state.open = None;
        if state.subscriber.is_some() {
            self.counters.woken.fetch_add(1, Relaxed);
            self.desk.let_go(c.clone());
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let unseen = enter(&self.changes).take();
        drop(unseen); // without the lock: their sockets close
    }
}
