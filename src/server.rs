//! The server around it all: bind, accept, start and stop.
//!
//! `std` listens with a backlog of 128, and a crowd that comes back at once must not overflow it: clients would wait
//! seconds for their next try. So two threads do nothing but accept; they take no lock, and start nobody. Another finds
//! each newcomer a place and puts it into the line for a thread. Stopping is over within a second, whatever peers and disks
//! do: first streams are ended in order, then sockets are cut, then lanes and the journal end, each with its share of the
//! time.

use crate::clerk;
use crate::config::{Config, Log};
use crate::connection::STOPPING;
use crate::conversation::{self, Shared};
use crate::desk::Desk;
use crate::door::Door;
use crate::hub::{Core, Hub, STOP_WAIT};
use crate::lane::Lane;
use crate::log::{Logger, OncePerSecond};
use crate::metrics::Counters;
use crate::places::Places;
use crate::pool::Pool;
use crate::routes::{Route, Routes};
use crate::stream::Stream;
use crate::subscription::Streams;
use crate::sync::{enter, start_thread};
use crate::system::{self, AddressSpace, Room};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::{self, ErrorKind};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Threads that accept: while the system lets others run instead of one, there is another.
const ACCEPTORS: usize = 2;
/// Connections that were accepted and have no place yet. Beyond them the listener's backlog fills.
const NEWCOMERS: usize = 1_024;
/// Without memory or descriptors accepting fails at once, again and again: this keeps it from spinning meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// When stopping, streams have this long to take their end; then sockets are cut, and threads have until the second
/// time to end. Publishers who wait for the disk are answered within the first.
const STOP_GRACE: Duration = Duration::from_millis(700);
const STOP_TIME: Duration = Duration::from_millis(950);
const _: () = assert!(STOP_WAIT.as_millis() < STOP_GRACE.as_millis() && STOP_GRACE.as_millis() < STOP_TIME.as_millis());
const _: () = assert!(STOP_TIME.as_millis() < 1_000, "the process is gone within a second");
/// How many of the connections that have not ended are named in the log.
const NAMED_PEERS: usize = 10;

/// A server that is bound but does not serve yet: add pages and streams, then [`run`](Server::run) or
/// [`spawn`](Server::spawn) it.
pub struct Server {
    handle: Handle,
}

/// A running server. Dropping it stops everything: streams get a reconnection time and their end, and after a second at
/// most every thread has ended. Only these may take longer: handlers that do not return (they find their socket
/// closed), the journal's thread and programs' own while the disk is stuck, and the log's while stderr takes nothing.
pub struct Handle {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    /// The listening socket as one that can be shut down, which wakes every acceptor. Made at the start, since stopping
    /// must work without a descriptor left.
    doorbell: TcpStream,
    address_space: Arc<AddressSpace>,
    /// The threads that accept and admit. None before [`Server::spawn`], and once they are joined.
    acceptors: Vec<JoinHandle<()>>,
    /// The lanes and the clerk, likewise.
    helpers: Vec<JoinHandle<()>>,
}

impl Server {
    /// Binds the address and starts the hub, so that publishing works from here on. Port 0 takes any free one.
    ///
    /// # Errors
    /// The address cannot be bound; it is beyond loopback and [`Config::open`] is not set
    /// ([`ErrorKind::PermissionDenied`]); a limit makes no sense ([`ErrorKind::InvalidInput`]); the journal cannot be
    /// used ([`ErrorKind::ResourceBusy`]: another process has it; [`ErrorKind::InvalidData`]: the file is none); or no
    /// thread can be started; or the system has no room for two connections ([`ErrorKind::QuotaExceeded`]).
    pub fn bind(address: impl ToSocketAddrs, config: Config) -> io::Result<Server> {
        config.check()?;
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        check_reach(&config, address)?;
        let doorbell = TcpStream::from(std::os::fd::OwnedFd::from(listener.try_clone()?));
        // The log's thread and the listener first: what is left of the system's limits is for connections.
        let log = Arc::new(Logger::start(config.log)?);
        let lane_count = if config.lanes == 0 { default_lanes() } else { config.lanes };
        let config = system::fit(config, lane_count, &log)?;
        let (mut lanes, mut helpers, counters) = (Vec::new(), Vec::new(), Arc::new(Counters::default()));
        let desk = Arc::new(Desk::default());
        for n in 0..lane_count {
            let (lane, thread) = Lane::start(format!("lane {n}"), config.heartbeat, desk.clone(), counters.clone())?;
            lanes.push(lane);
            helpers.push(thread);
        }
        let core = Arc::new(Core::new(config, lanes, counters, &log)?);
        let places = Arc::new(Places::new(&core.config));
        let pool = Pool::start(core.config.threads, desk.clone())?;
        let streams = Arc::new(Streams { core: core.clone(), places: places.clone(), pool, desk, log: log.clone() });
        let address_space = Arc::new(AddressSpace::read());
        helpers.push(clerk::start(streams.clone(), address_space.clone())?);
        // Only a server on loopback knows all of its names; the door needs its port to tell them from other servers'.
        let door = Door::new(&core.config, Some(address.port()).filter(|_| address.ip().is_loopback()));
        let routes = Routes::new(Hub { core }, door, streams.clone());
        let handle = Handle {
            shared: Arc::new(Shared { streams, routes, evicted: OncePerSecond::default() }),
            listener: Arc::new(listener),
            doorbell,
            address_space,
            acceptors: Vec::new(),
            helpers,
        };
        handle.shared.streams.core.start_journal_thread()?;
        Ok(Server { handle })
    }

    /// Answers `GET path` with these bytes: a page, a script, a small answer of one's own.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not begin with a slash, that is the server's own, or that has
    /// control characters, `?` or `#` in it; and for what is no content type.
    pub fn page(&self, path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> io::Result<()> {
        self.handle.shared.routes.add(path, Route::Page(content_type.into(), body.into().into()))
    }

    /// Answers `GET path` with a stream that `handler` writes, on the connection's own thread, until it returns or the
    /// socket closes. The head goes out before the handler is called. The thread's stack has 128 KiB: what is large
    /// belongs on the heap.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not begin with a slash, that is the server's own, or that has
    /// control characters, `?` or `#` in it.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/clock", |stream| {
    ///     for tick in 0.. {
    ///         stream.send(&Event::new(tick.to_string()))?;
    ///         stream.sleep(Duration::from_secs(1))?; // ends at once when the page is closed
    ///     }
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn stream<H>(&self, path: &str, handler: H) -> io::Result<()>
    where
        H: Fn(&mut Stream) -> io::Result<()> + Send + Sync + 'static,
    {
        self.handle.shared.routes.add(path, Route::Stream(Arc::new(handler)))
    }

    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        self.handle.hub()
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn run(self) -> io::Result<()> {
        let mut handle = self.spawn()?;
        for acceptor in handle.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        Ok(())
    }

    /// Serves in the background until the handle is dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn spawn(mut self) -> io::Result<Handle> {
        let handle = &mut self.handle;
        let (newcomers, accepted) = bounded(NEWCOMERS);
        for n in 0..ACCEPTORS {
            let (shared, listener, newcomers) = (handle.shared.clone(), handle.listener.clone(), newcomers.clone());
            let accept = Box::new(move || accept_all(&shared, &listener, &newcomers));
            handle.acceptors.push(start_thread(format!("accept {n}"), accept)?);
        }
        drop(newcomers); // admitting ends with the last acceptor
        let (shared, space) = (handle.shared.clone(), handle.address_space.clone());
        let admit = Box::new(move || admit_all(&shared, &space, &accepted));
        handle.acceptors.push(start_thread("admit".into(), admit)?);
        Ok(self.handle)
    }
}

impl Handle {
    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        Hub { core: self.shared.streams.core.clone() }
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// What the system says when asked for it.
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Takes over a connection that another accept loop has accepted, from before its first request.
    ///
    /// # Errors
    /// The connection has gone already. Where there is no room, it is closed, as one of our own would be.
    pub fn serve(&self, socket: TcpStream) -> io::Result<()> {
        let peer = socket.peer_addr()?;
        admit(&self.shared, &self.address_space, socket, peer);
        Ok(())
    }

    /// Stops everything, as dropping does, and returns how many connections' threads have not ended within the second.
    pub fn stop(mut self) -> usize {
        self.stop_once()
    }

    /// Stops in this order: accepting, connections, lanes, journal, log; each is still needed by those before it. 0
    /// where it has stopped already.
    fn stop_once(&mut self) -> usize {
        let Streams { core, pool, desk, log, .. } = &*self.shared.streams;
        if !core.stop() {
            return 0;
        }
        if self.doorbell.shutdown(Shutdown::Both).is_err() {
            // Not every system lets a listening socket be shut down; a connection wakes an acceptor, too.
            let _ = self.addr().map(|address| self.acceptors.iter().for_each(|_| drop(TcpStream::connect(address))));
        }
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        let deadline = Instant::now() + STOP_TIME; // for connections and journal together
        let left = end_connections(&self.shared.streams, deadline);
        pool.close();
        pool.wait_for_threads(deadline);
        desk.close();
        core.lanes.iter().for_each(Lane::stop);
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
        core.close_journal(deadline);
        log.finish();
        left
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop_once();
    }
}

/// Whoever can reach the port could publish: beyond loopback that must be wanted. A token or [`Config::open`] says so.
fn check_reach(config: &Config, address: SocketAddr) -> io::Result<()> {
    if config.open || !config.publish_tokens.is_empty() || address.ip().is_loopback() {
        return Ok(());
    }
    let reason = format!(
        "{address} is beyond loopback, so whoever reaches it could publish: give --publish-token TOKEN, or say --open"
    );
    Err(io::Error::new(ErrorKind::PermissionDenied, reason))
}

fn default_lanes() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get()).div_ceil(2)
}

/// Accepts, until stopping wakes it. One connection's failure never ends it.
fn accept_all(shared: &Shared, listener: &TcpListener, newcomers: &Sender<(TcpStream, SocketAddr)>) {
    let Streams { core, places, log, .. } = &*shared.streams;
    while !core.is_stopping() {
        match listener.accept() {
            Ok(newcomer) => drop(newcomers.send(newcomer)),
            Err(_) if core.is_stopping() => return,
            Err(error) => {
                log.warn(format_args!("accepting failed: {error}"));
                // These two are about one connection. Everything else is about this process, and room may help it.
                if ![ErrorKind::ConnectionAborted, ErrorKind::Interrupted].contains(&error.kind()) {
                    places.make_room();
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }
}

/// Admits whoever was accepted, until nobody accepts any more.
fn admit_all(shared: &Arc<Shared>, space: &AddressSpace, accepted: &Receiver<(TcpStream, SocketAddr)>) {
    accepted.iter().for_each(|(socket, peer)| admit(shared, space, socket, peer));
}

/// Gives a connection its place and puts it into the line for a thread, or closes it where there is no room. Never waits
/// for the peer.
fn admit(shared: &Arc<Shared>, space: &AddressSpace, socket: TcpStream, peer: SocketAddr) {
    let Streams { core, places, log, .. } = &*shared.streams;
    let room = space.look();
    let has_space = room > Room::Nothing;
    if !has_space {
        places.make_room(); // for the next: an ending connection's space is not free at once
    }
    places.close_to_streams(room < Room::Streams);
    let has_way = has_space && !core.is_stopping();
    let Some(c) = has_way.then(|| places.admit(socket, peer)).flatten() else {
        core.counters.rejected.fetch_add(1, Relaxed);
        let why = if has_space { "are taken" } else { "have no address space (ulimit -v)" };
        return log.warn(format_args!("no room for {peer}: all {} places {why}", places.limit()));
    };
    conversation::start(shared.clone(), c);
}

/// Ends every connection: streams with their reconnection time, publishers with their response. Idle ones are cut last,
/// so that they can still ask for `/health`. Returns how many did not end in time.
fn end_connections(streams: &Streams, deadline: Instant) -> usize {
    let (places, grace) = (&streams.places, Instant::now() + STOP_GRACE);
    streams.core.end_streams(grace);
    for c in places.at_work() {
        enter(&c.state).ending = Some(STOPPING);
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
