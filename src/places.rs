//! Who is here, and who makes room.
//!
//! A connection is idle (the head of its next request has not come whole), busy (its body is being read, or its answer
//! written), or a stream. When all places are taken, one connection is closed to make room for a newcomer: the one that
//! has kept the server waiting longest. Otherwise a crowd of idle or slow clients could lock everybody else out.
//! Streams never make room, and they cannot take the places that are kept for other connections. While there are few
//! streams, a burst of new connections may use the streams' places, too.

use crate::config::Config;
use crate::connection::{Connection, Reason};
use crate::sync::{Condvar, Mutex, MutexGuard, enter, wait};
use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What a connection's thread finds in `cut` when it was closed for a newcomer.
pub const MADE_ROOM: Reason = "it made room for another";

/// What a connection is doing. `Table::queues` is indexed by it, and "at work" is everything from `Busy` on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It waits for a thread, and nothing of it has been read.
    New,
    /// The head of its next request has not come whole.
    Idle,
    /// Its head has come: its body is read, or its answer written.
    Busy,
    /// The same, for a publisher that has shown its token.
    Trusted,
    /// It is a stream of topics, for the rest of its life.
    Stream,
    /// It is a handler's stream, for the rest of its life.
    Handler,
}

pub struct Places {
    stream_limit: usize,
    other_limit: usize,
    /// No more streams are let in, whatever the limit.
    is_closed_to_streams: AtomicBool,
    /// Held shortly, and under no other lock.
    table: Mutex<Table>,
    /// Notified when a connection has ended; stopping waits here.
    somebody_left: Condvar,
    stall_time: Duration,
}

#[derive(Default)]
struct Table {
    /// Three quarters of the places beside the streams. If publishers with a token held all of them, each newcomer
    /// would be closed for the next one.
    trusted_limit: usize,
    next_serial: u64,
    /// Rises with each move, so that the lowest arrival at a place is whoever came to it first.
    next_arrival: u64,
    /// Spreads the streams evenly over the lanes. Serial numbers would not: where every other connection is a short
    /// request, the streams would all have odd ones.
    streams_opened: usize,
    /// For each place, by their arrival at it: the first has been there longest.
    queues: [BTreeMap<u64, Arc<Connection>>; 6],
    /// The place and the arrival of each connection, by its serial number. Whoever is missing here has made room.
    positions: HashMap<u64, (Place, u64)>,
}

/// How many connections are at each place.
pub struct Counts {
    pub idle: usize,
    pub busy: usize,
    pub trusted: usize,
    pub topics: usize,
    pub handlers: usize,
}

impl Places {
    pub fn new(config: &Config) -> Places {
        let table = Table { trusted_limit: config.connections.min(config.threads / 2) * 3 / 4, ..Table::default() };
        Places {
            stream_limit: config.subscribers,
            other_limit: config.connections,
            is_closed_to_streams: AtomicBool::new(false),
            table: Mutex::new(table),
            somebody_left: Condvar::new(),
            stall_time: config.stall_time,
        }
    }

    /// All the places there are, of streams and others.
    pub fn limit(&self) -> usize {
        self.stream_limit + self.other_limit
    }

    /// Gives a newcomer a place, for which another may have to make room; `None` where there is none. Whoever
    /// serves it must call [`Places::leave`] at its end, or the place is lost for good.
    pub fn admit(&self, socket: TcpStream, peer: SocketAddr) -> Option<Arc<Connection>> {
        let mut table = enter(&self.table);
        if table.positions.len() >= self.limit() && !table.make_room() {
            return None;
        }
        let c = Arc::new(Connection::new(table.next_serial, peer, socket, self.stall_time));
        table.next_serial += 1;
        table.put(c.clone(), Place::New);
        Some(c)
    }

    /// Closes one connection that is not a stream; false where there is none. Also called where descriptors run out.
    pub fn make_room(&self) -> bool {
        enter(&self.table).make_room()
    }

    /// The same where threads run out: only who has a thread can give it up, and who idles has least to lose.
    pub fn free_thread(&self) -> bool {
        enter(&self.table).close_one(vec![Place::Idle, Place::Busy, Place::Trusted])
    }

    /// False where the connection has made room: its socket is shut down, and its thread should end.
    pub fn move_to(&self, place: Place, c: &Connection) -> bool {
        enter(&self.table).move_to(place, c)
    }

    /// Notes that a publisher has shown its token: it makes room last.
    pub fn trust(&self, c: &Connection) {
        enter(&self.table).move_to(Place::Trusted, c);
    }

    /// Puts a connection last at its place: it has just said something, so it is not the first to make room.
    pub fn refresh(&self, c: &Connection) {
        let mut table = enter(&self.table);
        if let Some((place, _)) = table.positions.get(&c.serial).copied() {
            table.move_to(place, c);
        }
    }

    /// Finds a stream of topics or of a handler its place, and returns how many there have been so far; `None` where
    /// there is no room. From then on it makes room for nobody.
    pub fn move_to_streams(&self, place: Place, c: &Connection) -> Option<usize> {
        let mut table = enter(&self.table);
        let streams = table.queue(Place::Stream).len() + table.queue(Place::Handler).len();
        let is_full = streams >= self.stream_limit || self.is_closed_to_streams.load(Relaxed);
        if is_full || !table.move_to(place, c) {
            return None;
        }
        table.streams_opened += 1;
        Some(table.streams_opened)
    }

    /// Lets no more streams in, or lets them in again. Those that are there stay.
    pub fn close_to_streams(&self, is_closed: bool) {
        self.is_closed_to_streams.store(is_closed, Relaxed);
    }

    /// Gives up the place of a connection that has ended, if it still has one.
    pub fn leave(&self, c: &Connection) {
        let mut table = enter(&self.table);
        table.take_out(c);
        self.somebody_left.notify_all();
    }

    /// How many are at each place now.
    pub fn counts(&self) -> Counts {
        let [new, idle, busy, trusted, topics, handlers] = enter(&self.table).queues.each_ref().map(BTreeMap::len);
        Counts { idle: new + idle, busy, trusted, topics, handlers }
    }

    /// Those that wait for something else than their next request: stopping ends that.
    pub fn at_work(&self) -> Vec<Arc<Connection>> {
        let table = enter(&self.table);
        let queues = [Place::Busy, Place::Trusted, Place::Handler].map(|place| &table.queues[place as usize]);
        queues.into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Everyone who has a place.
    pub fn everyone(&self) -> Vec<Arc<Connection>> {
        enter(&self.table).queues.iter().flat_map(BTreeMap::values).cloned().collect()
    }

    /// Waits until nobody is at work and no stream is open, or until the deadline.
    pub fn wait_for_work(&self, deadline: Instant) {
        let is_at_work = |table: &Table| table.queues[Place::Busy as usize..].iter().any(|queue| !queue.is_empty());
        drop(self.wait_while(deadline, is_at_work));
    }

    /// Waits until nobody has a place, or until the deadline. Returns how many still have one.
    pub fn wait_for_all(&self, deadline: Instant) -> usize {
        self.wait_while(deadline, |table| !table.positions.is_empty()).positions.len()
    }

    fn wait_while(&self, deadline: Instant, condition: impl Fn(&Table) -> bool) -> MutexGuard<'_, Table> {
        let mut table = enter(&self.table);
        while condition(&table) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            table = wait(&self.somebody_left, table, left);
        }
        table
    }
}

impl Table {
    fn queue(&mut self, place: Place) -> &mut BTreeMap<u64, Arc<Connection>> {
        &mut self.queues[place as usize]
    }

    /// Closes the connection that has been idle longest. But where a crowd has just arrived, nobody has been idle for
    /// long, and it is the one that has been busy longest. Whoever waits for a thread comes next, and publishers that
    /// have shown a token are the last of all.
    fn make_room(&mut self) -> bool {
        let [first, second] =
            if self.somebody_idles() { [Place::Idle, Place::Busy] } else { [Place::Busy, Place::Idle] };
        self.close_one(vec![first, second, Place::New, Place::Trusted])
    }

    /// Closes the one that has been longest at the first of these places where there is any. Where those with a token
    /// are too many, it is whoever has been silent longest, token or not: a publisher that has vanished without a word
    /// goes before those that live.
    fn close_one(&mut self, mut order: Vec<Place>) -> bool {
        if self.queue(Place::Trusted).len() > self.trusted_limit {
            order.sort_by_key(|place| self.queue(*place).first_key_value().map_or(u64::MAX, |(arrival, _)| *arrival));
        }
        let Some((_, c)) = order.into_iter().find_map(|place| self.queue(place).pop_first()) else { return false };
        self.positions.remove(&c.serial);
        c.cut(MADE_ROOM);
        true
    }

    /// Whether somebody was idle before the crowd of now arrived: three quarters as many have come since as are here
    /// now. Measured in newcomers and not in time, so that it holds however fast a crowd comes.
    fn somebody_idles(&mut self) -> bool {
        let here = self.queue(Place::Idle).len() + self.queue(Place::Busy).len();
        let crowd_begins = self.next_serial.saturating_sub(here as u64 * 3 / 4);
        self.queue(Place::Idle).first_key_value().is_some_and(|(_, c)| c.serial < crowd_begins)
    }

    fn move_to(&mut self, place: Place, c: &Connection) -> bool {
        let Some(c) = self.take_out(c) else { return false };
        self.put(c, place);
        true
    }

    fn take_out(&mut self, c: &Connection) -> Option<Arc<Connection>> {
        let (place, arrival) = self.positions.remove(&c.serial)?;
        self.queue(place).remove(&arrival)
    }

    fn put(&mut self, c: Arc<Connection>, place: Place) {
        self.next_arrival += 1;
        let arrival = self.next_arrival;
        self.positions.insert(c.serial, (place, arrival));
        self.queue(place).insert(arrival, c);
    }
}
