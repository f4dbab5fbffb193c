//! How a server stops: within a second, whatever peers and disks do.
//!
//! First streams are ended in order, then sockets are cut, then lanes and the journal end, each with its share of the
//! time. A thread that does not end is one of a handler that does not return: it is counted, and finds its socket
//! closed.

use crate::config::Log;
use crate::connection::STOPPING;
use crate::hub::STOP_WAIT;
use crate::lane::{Ending, Lane};
use crate::server::{Handle, Listening};
use crate::subscription::Streams;
use crate::sync::enter;
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// When stopping, streams have this long to take their end; then sockets are cut, and threads have until the second
/// time to end. Publishers who wait for the disk are answered within the first.
const STOP_GRACE: Duration = Duration::from_millis(700);
/// When stopping, what is published already has this long to go out to live streams.
const HURRY_TIME: Duration = Duration::from_millis(300);
const STOP_TIME: Duration = Duration::from_millis(950);
const _: () = assert!(STOP_WAIT.as_millis() < STOP_GRACE.as_millis() && STOP_GRACE.as_millis() < STOP_TIME.as_millis());
const _: () = assert!(STOP_TIME.as_millis() < 1_000, "the process is gone within a second");
/// How many of the connections that have not ended are named in the log.
const NAMED_PEERS: usize = 10;

impl Handle {
    /// Stops everything, as dropping does, and returns how many connections' threads have not ended within the second:
    /// they are in handlers that do not return. Whoever calls it again, or meanwhile, waits for the first and gets the
    /// same. Not to be called from a handler or the hook for subscriptions: each would wait for itself for a second.
    pub fn stop(&self) -> usize {
        *self.stopped.get_or_init(|| self.stop_once())
    }

    /// Stops in this order: accepting, connections, lanes, journal, log; each is still needed by those before it.
    fn stop_once(&self) -> usize {
        let Streams { core, pool, desk, log, .. } = &*self.shared.streams;
        let started = Instant::now();
        let (grace, deadline) = (started + STOP_GRACE, started + STOP_TIME); // for connections and journal together
        let ending = Ending { retry: core.config.retry, hurry_at: started + HURRY_TIME, deadline: grace };
        let _ = self.ending.set(ending);
        core.stop();
        let acceptors = mem::take(&mut *enter(&self.acceptors));
        if let Some(Listening { doorbell, address, .. }) = &self.listening
            && doorbell.shutdown(Shutdown::Both).is_err()
        {
            // Not every system lets a listening socket be shut down; a connection wakes whoever accepts, too.
            acceptors.iter().for_each(|_| drop(TcpStream::connect(address)));
        }
        *enter(&self.watching) = None;
        for acceptor in acceptors {
            let _ = acceptor.join();
        }
        let left = end_connections(&self.shared.streams, grace, deadline);
        // In this order, so that nobody hands anything to those who have ended.
        core.lanes.iter().for_each(Lane::stop);
        desk.close();
        for helper in mem::take(&mut *enter(&self.helpers)) {
            let _ = helper.join();
        }
        pool.close();
        pool.wait_for_threads(deadline);
        core.presence.close(deadline);
        core.close_journal(deadline);
        log.finish();
        left
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Ends every connection: streams with their reconnection time, publishers with their response. Idle ones are cut last,
/// so that they can still ask for `/health`. Returns how many did not end in time.
fn end_connections(streams: &Streams, grace: Instant, deadline: Instant) -> usize {
    let places = &streams.places;
    streams.core.end_streams();
    for c in places.at_work() {
        let mut state = enter(&c.state);
        state.ending = Some(STOPPING);
        state.open = None; // wakes a handler that waits for this
        drop(state);
        let _ = c.socket.shutdown(Shutdown::Read); // wakes who waits for a body or a handler's timer
    }
    places.wait_for_work(grace);
    let everyone = places.everyone();
    // Wakes who waits for a request, or a slow peer. Who is not reached is closed with the process.
    everyone.iter().take_while(|_| Instant::now() < deadline).for_each(|c| c.cut(STOPPING));
    drop(everyone);
    let left = places.wait_for_all(deadline);
    if left > 0 {
        let peers: Vec<String> = places.everyone().iter().take(NAMED_PEERS).map(|c| c.peer.to_string()).collect();
        streams.log.line(Log::Info, format_args!("{left} connections did not end: {}", peers.join(" ")));
    }
    left
}
