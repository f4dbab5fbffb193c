//! Writing to whoever is live.
//!
//! A lane is a thread that writes to many subscribers, each write without waiting: one that waited would hold up all
//! the others. It drains its queue and writes neighbouring events of one topic as one run, so a burst costs each
//! subscriber one write instead of one for each event, and no thread is woken to deliver. A lane takes neither the
//! order lock nor that of the history, so a publisher that waits for room in its queue, with the order lock held,
//! always gets it. Each subscriber belongs to one lane, from before it first turns live until its thread ends; its
//! state says whether the lane may touch its socket.

use crate::config::SWEEP;
use crate::connection::{Connection, Phase, State};
use crate::encoded::{BATCH_BYTES, Encoded, Framing, Run};
use crate::metrics::Counters;
use crate::sync::{enter, start_thread};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
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

/// What stands in a lane's queue, first in, first out: the proof in `subscription.rs` depends on it.
pub enum ToLane {
    Event(Arc<str>, Encoded),
    /// Takes up a slot for each KiB of the event before it.
    Weight,
    /// A subscriber of these topics, before it turns live.
    Join(Arc<Connection>, Arc<[Arc<str>]>),
    /// Its serial number and topics, after it was live for the last time.
    Leave(u64, Arc<[Arc<str>]>),
    /// Everyone looks at the history again: it has forgotten something without a new event.
    Look,
    /// The lane ends, whatever stands after this.
    Stop,
}

/// Starts a lane. Returns its queue and its thread, which ends at [`ToLane::Stop`] or when all senders are gone.
///
/// # Errors
/// No thread can be started.
pub fn start(
    name: String,
    heartbeat: Duration,
    counters: Arc<Counters>,
) -> io::Result<(Sender<ToLane>, JoinHandle<()>)> {
    let (sender, queue) = bounded(QUEUE_SLOTS);
    let lane = Lane {
        topics: HashMap::new(),
        everyone: Vec::new(),
        run: Run::new(Framing::Chunked),
        topic_of_run: None,
        heartbeat,
        counters,
    };
    Ok((sender, start_thread(name, Box::new(move || lane.work(&queue)))?))
}

/// Hands an event to a lane; waits while its queue is full. Called with the order lock held, in the order of the ids.
pub fn send_event(lane: &Sender<ToLane>, topic: &Arc<str>, event: &Encoded) {
    let _ = lane.send(ToLane::Event(topic.clone(), event.clone()));
    for _ in 0..event.memory() / 1024 {
        let _ = lane.send(ToLane::Weight);
    }
}

/// Everything here is the lane's own: no other thread sees these lists.
struct Lane {
    /// Each topic's subscribers on this lane, live or not.
    topics: HashMap<Arc<str>, Vec<Arc<Connection>>>,
    /// All of them once, for the sweep.
    everyone: Vec<Arc<Connection>>,
    /// Neighbouring events of one topic that have not been written yet. Empty between two batches.
    run: Run,
    topic_of_run: Option<Arc<str>>,
    /// The longest silence that subscribers may see.
    heartbeat: Duration,
    counters: Arc<Counters>,
}

impl Lane {
    /// Drains, sweeps when it is time to, and begins again.
    fn work(mut self, queue: &Receiver<ToLane>) {
        let mut sweep_at = Instant::now() + SWEEP;
        loop {
            match queue.recv_deadline(sweep_at) {
                Ok(first) => {
                    if self.drain(first, queue, sweep_at).is_break() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= sweep_at {
                self.sweep();
                sweep_at = Instant::now() + SWEEP;
            }
        }
    }

    /// Takes what stands in the queue, up to one batch, and writes it. A flood must not keep the lane from its sweep.
    fn drain(&mut self, first: ToLane, queue: &Receiver<ToLane>, sweep_at: Instant) -> ControlFlow<()> {
        // From the first message on, so that no event waits longer than this for company.
        let alone_until = Instant::now() + COMPANY_TIME;
        let mut next = Some(first);
        while let Some(message) = next {
            self.take(message)?;
            let is_full = self.run.bytes.len() >= BATCH_BYTES || Instant::now() >= sweep_at;
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
                if self.topic_of_run.as_ref() != Some(&topic) || !self.run.has_room_for(&event) {
                    self.write_run();
                    self.topic_of_run = Some(topic);
                }
                self.run.push(&event);
            }
            ToLane::Weight => {}
            ToLane::Join(c, names) => self.join(&c, &names),
            ToLane::Leave(serial, names) => self.leave(serial, &names),
            ToLane::Look => self.send_back(),
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

    fn join(&mut self, c: &Arc<Connection>, names: &[Arc<str>]) {
        for name in names {
            insert(self.topics.entry(name.clone()).or_default(), c.clone());
        }
        insert(&mut self.everyone, c.clone());
    }

    fn leave(&mut self, serial: u64, names: &[Arc<str>]) {
        for name in names {
            if let Some(subscribers) = self.topics.get_mut(name) {
                remove(subscribers, serial);
                if subscribers.is_empty() {
                    self.topics.remove(name);
                }
            }
        }
        remove(&mut self.everyone, serial);
    }

    /// Writes the run to every live subscriber of its topic. Whoever is behind finds its events in the history.
    fn write_run(&mut self) {
        if self.run.bytes.is_empty() {
            return;
        }
        let now = Instant::now();
        let (mut delivered, mut plain) = (0, None);
        let subscribers = self.topic_of_run.as_ref().and_then(|topic| self.topics.get(topic));
        for c in subscribers.into_iter().flatten() {
            let mut state = enter(&c.state);
            // Not newer than the cursor: it was replayed before the subscriber turned live (leg 5 of the proof).
            if state.phase != Phase::Live || state.cursor >= self.run.newest() {
                continue;
            } else if state.is_poll {
                // Not written here: its thread replays all that is kept, in one go, and ends the stream.
                state.phase = Phase::Behind;
            } else {
                let run = match state.framing {
                    Framing::Chunked => &self.run,
                    // Made once for the run, and only where a peer of HTTP/1.0 follows the topic.
                    Framing::Plain => plain.get_or_insert_with(|| self.run.in_framing(Framing::Plain)),
                };
                delivered += c.deliver(&mut state, run, now);
            }
            self.wake_if_not_live(c, &state);
        }
        self.counters.delivered.fetch_add(delivered, Relaxed);
        self.run.clear();
    }

    /// Sends everyone who is live back to its thread, after what stands before this in the queue.
    fn send_back(&mut self) {
        self.write_run();
        for c in &self.everyone {
            let mut state = enter(&c.state);
            if state.phase == Phase::Live {
                state.phase = Phase::Behind;
                self.wake_if_not_live(c, &state);
            }
        }
    }

    /// Looks at every live subscriber: has it closed, and is a heartbeat due before the next sweep? No thread wakes for
    /// either, unless the subscriber is not live any more.
    fn sweep(&self) {
        let now = Instant::now();
        for c in &self.everyone {
            let mut state = enter(&c.state);
            if state.phase != Phase::Live {
                continue;
            }
            // At the next sweep it would be overdue.
            if now.duration_since(state.wrote) + SWEEP > self.heartbeat {
                c.beat(&mut state, now); // a write looks at the socket, too
            } else if let Some(reason) = c.look(&mut state.stray) {
                state.phase = Phase::Closed(reason);
            }
            self.wake_if_not_live(c, &state);
        }
    }

    /// Once its phase has changed, the socket is its thread's, which sleeps and must be told.
    fn wake_if_not_live(&self, c: &Connection, state: &State) {
        if state.phase != Phase::Live {
            self.counters.woken.fetch_add(1, Relaxed);
            c.wake.notify_one();
        }
    }
}

/// Lists of subscribers are sorted by serial number: a newcomer's is nearly always the highest, so it goes to the end,
/// and whoever leaves is found by halving.
fn insert(list: &mut Vec<Arc<Connection>>, c: Arc<Connection>) {
    list.insert(list.partition_point(|other| other.serial < c.serial), c);
}

fn remove(list: &mut Vec<Arc<Connection>>, serial: u64) {
    if let Ok(at) = list.binary_search_by_key(&serial, |c| c.serial) {
        list.remove(at);
    }
}
