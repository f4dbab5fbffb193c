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
use crate::engine::Engine;
use crate::feed::Feed;
use crate::hub::{Core, Hub, STOP_WAIT};
use crate::lane::{Ending, Lane};
use crate::log::{Logger, OncePerSecond};
use crate::metrics::Counters;
use crate::places::Places;
use crate::pool::Pool;
use crate::routes::Routes;
use crate::subscription::Streams;
use crate::sync::{Mutex, enter, start_thread};
use crate::system::{self, AddressSpace, Room};
use crate::tending;
use crate::text::invalid;
use crate::tokens::TokensFile;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::{self, ErrorKind};
use std::mem;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
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
/// When stopping, what is published already has this long to go out to live streams.
const HURRY_TIME: Duration = Duration::from_millis(300);
const STOP_TIME: Duration = Duration::from_millis(950);
const _: () = assert!(STOP_WAIT.as_millis() < STOP_GRACE.as_millis() && STOP_GRACE.as_millis() < STOP_TIME.as_millis());
const _: () = assert!(STOP_TIME.as_millis() < 1_000, "the process is gone within a second");
/// How many of the connections that have not ended are named in the log.
const NAMED_PEERS: usize = 10;

/// A server that is bound but does not serve yet: add pages and streams, then [`run`](Server::run) or
/// [`spawn`](Server::spawn) it.
pub struct Server {
    pub(crate) handle: Handle,
}

/// A running server. All of it is done by reference, so an `Arc` or a scope shares it among threads.
///
/// Dropping it stops everything: streams get a reconnection time and their end, and after a second at most every thread
/// has ended. Only these may take longer: handlers that do not return (they find their socket closed), the hook for
/// subscriptions, the journal's thread and programs' own while the disk is stuck, and the log's while its lines are not
/// taken.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Server};
/// let server = Server::bind("127.0.0.1:0", Config::default())?.spawn()?;
/// std::thread::scope(|scope| {
///     scope.spawn(|| server.stop()); // by reference, so from any thread
/// });
/// assert_eq!(server.stop(), 0); // no handler is left running
/// # Ok(()) }
/// ```
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    /// None where the program accepts.
    listening: Option<Listening>,
    address_space: Arc<AddressSpace>,
    /// The threads that accept and admit. None before [`Server::spawn`], and once they are joined.
    acceptors: Mutex<Vec<JoinHandle<()>>>,
    ending: Arc<OnceLock<Ending>>,
    /// The lanes and the clerk, likewise.
    helpers: Mutex<Vec<JoinHandle<()>>>,
    /// The thread that watches the tokens' file ends when this is dropped. It is not waited for: the disk may be stuck.
    watching: Mutex<Option<Sender<()>>>,
    /// How many connections had not ended when it had stopped.
    stopped: OnceLock<usize>,
}

/// An address of our own.
struct Listening {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    /// The listening socket as one that can be shut down, which wakes whoever accepts. Made at the start, since stopping
    /// must work without a descriptor left.
    doorbell: TcpStream,
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
        Server::bind_to(address, config, None)
    }

    /// As [`Server::bind`], for a server that shares its topics with others: the engine numbers what is published on any
    /// of them, and shows it to this one by the feed. See [`Engine`].
    ///
    /// # Errors
    /// As for [`Server::bind`]; and a journal is [`ErrorKind::InvalidInput`], since the engine keeps the events.
    pub fn bind_with_engine(
        address: impl ToSocketAddrs,
        config: Config,
        engine: Arc<dyn Engine>,
    ) -> io::Result<(Server, Feed)> {
        if config.journal.is_some() {
            return invalid("journal: an engine keeps the events instead: leave one of the two out");
        }
        let server = Server::bind_to(address, config, Some(engine))?;
        let feed = Feed { core: Arc::downgrade(&server.handle.shared.streams.core) };
        Ok((server, feed))
    }

    fn bind_to(address: impl ToSocketAddrs, config: Config, engine: Option<Arc<dyn Engine>>) -> io::Result<Server> {
        config.check()?;
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        check_reach(&config, address)?;
        let doorbell = TcpStream::from(std::os::fd::OwnedFd::from(listener.try_clone()?));
        Server::start(Some(Listening { listener: Arc::new(listener), address, doorbell }), config, engine)
    }

    /// A server that listens nowhere: the program accepts connections itself and hands them to [`Handle::serve`], so it
    /// is the program that decides who can reach it. On the connections that come over loopback, hosts are checked as on
    /// a server that listens there.
    ///
    /// # Errors
    /// Those of [`Server::bind`] that are not about an address.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # use std::net::TcpListener;
    /// let server = Server::new(Config::default())?.spawn()?;
    /// let listener = TcpListener::bind("127.0.0.1:0")?;
    /// # let client = std::net::TcpStream::connect(listener.local_addr()?)?;
    /// # server.stop();
    /// for socket in listener.incoming() {
    ///     if let Err(_gone) = server.serve(socket?) {
    ///         // the client had closed it already, or the server has stopped
    /// #       break;
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub fn new(config: Config) -> io::Result<Server> {
        config.check()?;
        Server::start(None, config, None)
    }

    fn start(listening: Option<Listening>, config: Config, engine: Option<Arc<dyn Engine>>) -> io::Result<Server> {
        let (tokens, rights) = config.tokens.as_deref().map(TokensFile::open).transpose()?.unzip();
        // The log's thread and the listener first: what is left of the system's limits is for connections.
        let log = Arc::new(Logger::start(&config)?);
        // Before the other threads: malloc takes pieces of it for each of them.
        let address_space = Arc::new(AddressSpace::read());
        let lane_count = if config.lanes == 0 { default_lanes() } else { config.lanes };
        let config = system::fit(config, lane_count, &log)?;
        let (mut lanes, mut helpers, counters) = (Vec::new(), Vec::new(), Arc::new(Counters::default()));
        let (desk, ending) = (Arc::new(Desk::default()), Arc::new(OnceLock::new()));
        for n in 0..lane_count {
            let (lane, thread) =
                Lane::start(format!("lane {n}"), config.heartbeat, ending.clone(), desk.clone(), counters.clone())?;
            lanes.push(lane);
            helpers.push(thread);
        }
        let core = Arc::new(Core::new(config, lanes, counters, &log, engine)?);
        let places = Arc::new(Places::new(&core.config));
        let pool = Pool::start(core.config.threads, desk.clone())?;
        let streams = Arc::new(Streams { core: core.clone(), places: places.clone(), pool, desk, log: log.clone() });
        helpers.push(clerk::start(streams.clone(), address_space.clone()).inspect_err(|_| streams.pool.close())?);
        // Only a server on loopback knows all of its names; the door needs its port to tell them from other servers'.
        let door = Arc::new(Door::new(&core.config, rights, listening.as_ref().map(|listening| listening.address)));
        let (watching, stopping) = bounded(0);
        let routes = Routes::new(Hub { core }, door, streams.clone());
        let handle = Handle {
            shared: Arc::new(Shared { streams, routes, evicted: OncePerSecond::default() }),
            listening,
            address_space,
            acceptors: Mutex::default(),
            ending,
            helpers: Mutex::new(helpers),
            watching: Mutex::new(Some(watching)),
            stopped: OnceLock::new(),
        };
        // Where one of these cannot be started, dropping the handle ends those above.
        let shared = &handle.shared;
        tokens.map(|file| file.watch(shared.routes.door.clone(), shared.streams.clone(), stopping)).transpose()?;
        tending::start(&shared.streams.core)?;
        Ok(Server { handle })
    }

    /// The hub, to publish with.
    pub fn hub(&self) -> Hub {
        self.handle.hub()
    }

    /// The address that is bound, also where port 0 was asked for.
    ///
    /// # Errors
    /// [`ErrorKind::AddrNotAvailable`]: it listens nowhere ([`Server::new`]).
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.handle.addr()
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// No thread can be started; or it listens nowhere, so there is nothing to wait for
    /// ([`ErrorKind::AddrNotAvailable`]): [`spawn`](Server::spawn) it.
    pub fn run(self) -> io::Result<()> {
        self.addr()?;
        let handle = self.spawn()?;
        let acceptors = mem::take(&mut *enter(&handle.acceptors));
        for acceptor in acceptors {
            let _ = acceptor.join();
        }
        Ok(())
    }

    /// Serves in the background until the handle is stopped or dropped.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn spawn(self) -> io::Result<Handle> {
        let handle = self.handle;
        let Some(listening) = &handle.listening else { return Ok(handle) };
        let (newcomers, accepted) = bounded(NEWCOMERS);
        for n in 0..ACCEPTORS {
            let (shared, listener, newcomers) = (handle.shared.clone(), listening.listener.clone(), newcomers.clone());
            let accept = Box::new(move || accept_all(&shared, &listener, &newcomers));
            enter(&handle.acceptors).push(start_thread(format!("accept {n}"), accept)?);
        }
        drop(newcomers); // admitting ends with the last acceptor
        let (shared, space) = (handle.shared.clone(), handle.address_space.clone());
        let admit = Box::new(move || admit_all(&shared, &space, &accepted));
        enter(&handle.acceptors).push(start_thread("admit".into(), admit)?);
        Ok(handle)
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
    /// [`ErrorKind::AddrNotAvailable`]: it listens nowhere ([`Server::new`]).
    pub fn addr(&self) -> io::Result<SocketAddr> {
        let address = self.listening.as_ref().map(|listening| listening.address);
        address.ok_or_else(|| io::Error::new(ErrorKind::AddrNotAvailable, "this server listens nowhere itself"))
    }

    /// Takes over a connection that another accept loop has accepted, from before its first request. Whether its socket
    /// blocks makes no difference. Where there is no room, it is closed, as one of our own would be.
    ///
    /// # Errors
    /// The connection has gone already; or [`ErrorKind::NotConnected`], the server is stopping. The socket is closed.
    pub fn serve(&self, socket: TcpStream) -> io::Result<()> {
        self.shared.streams.core.check_running()?;
        let peer = socket.peer_addr()?;
        socket.set_nonblocking(false)?; // on some systems it has its listener's mode
        admit(&self.shared, &self.address_space, socket, peer);
        Ok(())
    }

    /// Stops everything, as dropping does, and returns how many connections' threads have not ended within the second:
    /// they are in handlers that do not return. Whoever calls it again, or meanwhile, waits for the first and gets the
    /// same. Not to be called from a handler, which would wait for itself for a second.
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

/// Whoever can reach the port could publish: beyond loopback that must be wanted. A token or [`Config::open`] says so.
fn check_reach(config: &Config, address: SocketAddr) -> io::Result<()> {
    let needs_token = !config.publish_tokens.is_empty() || config.tokens.is_some();
    if config.open || needs_token || address.ip().is_loopback() {
        return Ok(());
    }
    let reason =
        format!("open: {address} is beyond loopback, so whoever reaches it could publish: set publish_tokens, or open");
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
    if core.is_stopping() {
        return;
    }
    let room = space.look();
    let has_space = room > Room::Nothing;
    if !has_space {
        places.make_room(); // for the next: an ending connection's space is not free at once
    }
    places.close_to_streams(room < Room::Streams);
    let Some(c) = has_space.then(|| places.admit(socket, peer)).flatten() else {
        core.counters.rejected.fetch_add(1, Relaxed);
        let why = if has_space { "are taken" } else { "have no address space (ulimit -v)" };
        return log.warn(format_args!("no room for {peer}: all {} places {why}", places.limit()));
    };
    // Once more, now that it has its place: stopping cuts whoever has one, but nobody who gets one after that.
    if core.is_stopping() {
        return places.leave(&c);
    }
    conversation::start(shared.clone(), c);
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
