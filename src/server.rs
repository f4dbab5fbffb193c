//! The server around it all: bind, start, accept.
//!
//! `std` listens with a backlog of 128, and a crowd that comes back at once must not overflow it: clients would wait
//! seconds for their next try. So two threads do nothing but accept; they take no lock, and start nobody. Another finds
//! each newcomer a place and puts it into the line for a thread. How all of it ends is in `stopping.rs`.

use crate::authority::is_loopback_address;
use crate::clerk;
use crate::config::Config;
use crate::conversation::{self, Shared};
use crate::desk::Desk;
use crate::door::Door;
use crate::engine::Engine;
use crate::feed::Feed;
use crate::hub::{Core, Hub};
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
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Threads that accept: while the system lets others run instead of one, there is another.
const ACCEPTORS: usize = 2;
/// Connections that were accepted and have no place yet. Beyond them the listener's backlog fills.
const NEWCOMERS: usize = 1_024;
/// Without memory or descriptors accepting fails at once, again and again: this keeps it from spinning meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A server that is bound but does not serve yet: add pages and streams, then [`run`](Server::run) or
/// [`spawn`](Server::spawn) it.
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Server};
/// let server = Server::bind("127.0.0.1:0", Config::default())?;
/// server.page("/", "text/plain", "hello")?;
/// let server = server.spawn()?;
/// # Ok(()) }
/// ```
pub struct Server {
    pub(crate) handle: Handle,
}

/// A running server. Every method takes it by reference, so an `Arc` or a scope shares it among threads.
///
/// Dropping it stops everything: streams get a reconnection time and their end, and after a second at most every thread
/// has ended. Only these may take longer: handlers that do not return (they find their socket closed), the hook for
/// subscriptions; while the disk is stuck, programs' own threads, the journal's, and the one that reads the tokens'
/// file; and the log's while its lines are not taken.
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
#[must_use = "dropping it stops the server"]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    /// None where the program accepts.
    pub(crate) listening: Option<Listening>,
    address_space: Arc<AddressSpace>,
    /// The threads that accept and admit. None before [`Server::spawn`], and once they are joined.
    pub(crate) acceptors: Mutex<Vec<JoinHandle<()>>>,
    pub(crate) ending: Arc<OnceLock<Ending>>,
    /// The lanes, the clerk, and whoever judges rights, likewise.
    pub(crate) helpers: Mutex<Vec<JoinHandle<()>>>,
    /// The threads that watch the tokens' file and judge rights end when this is dropped. The first is not waited for:
    /// the disk may be stuck.
    pub(crate) watching: Mutex<Option<Sender<()>>>,
    /// How many connections had not ended when it had stopped.
    pub(crate) stopped: OnceLock<usize>,
}

/// An address of our own.
pub(crate) struct Listening {
    listener: Arc<TcpListener>,
    pub(crate) address: SocketAddr,
    /// The listening socket as one that can be shut down, which wakes whoever accepts. Made at the start, since
    /// stopping must work without a descriptor left.
    pub(crate) doorbell: TcpStream,
}

impl Server {
    /// Binds the address and starts the hub, so that publishing works from here on. Port 0 takes any free one.
    ///
    /// # Errors
    /// The address cannot be bound; it is beyond loopback, nobody needs a token to publish, and [`Config::open`] is not
    /// set ([`ErrorKind::PermissionDenied`]); a limit makes no sense, or the file of tokens cannot be read or
    /// understood ([`ErrorKind::InvalidInput`]); the journal cannot be used ([`ErrorKind::ResourceBusy`]: another
    /// process has it; [`ErrorKind::InvalidData`]: the file is none); no thread can be started; or the system has no
    /// room for two connections or a few threads ([`ErrorKind::QuotaExceeded`]).
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// let server = Server::bind("127.0.0.1:0", Config::default().with(|config| config.subscribers = 100))?;
    /// let error = Server::bind("127.0.0.1:0", Config::default().with(|config| config.topics = 0)).err().unwrap();
    /// assert_eq!(error.to_string(), "topics: without any, nothing is published: give at least 1"); // names the field
    /// # Ok(()) }
    /// ```
    pub fn bind(address: impl ToSocketAddrs, config: Config) -> io::Result<Server> {
        Server::bind_to(address, config, None)
    }

    /// As [`Server::bind`], for a server that shares its topics with others: the engine numbers what is published on
    /// any of them, and shows it to this one by the feed. [`Engine`] has an example.
    ///
    /// # Errors
    /// As for [`Server::bind`]; and a journal is [`ErrorKind::InvalidInput`], since the engine keeps the events.
    pub fn bind_with_engine(
        address: impl ToSocketAddrs,
        config: Config,
        engine: Arc<dyn Engine>,
    ) -> io::Result<(Server, Feed)> {
        check_without_journal(&config)?;
        let server = Server::bind_to(address, config, Some(engine))?;
        let feed = server.feed();
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
    /// is the program that decides who can reach it. On the connections that come over loopback, hosts are checked as
    /// on a server that listens there.
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

    /// As [`Server::new`], for a server that shares its topics with others: see [`Server::bind_with_engine`].
    ///
    /// # Errors
    /// Those of [`Server::bind_with_engine`] that are not about an address.
    ///
    /// ```
    /// # use brooklet::{Config, Engine, Feed, Handle, Server};
    /// # use std::sync::Arc;
    /// fn start(engine: Arc<dyn Engine>, show: impl Fn(Feed) + Send + 'static) -> std::io::Result<Handle> {
    ///     let (server, feed) = Server::new_with_engine(Config::default(), engine)?;
    ///     std::thread::spawn(move || show(feed)); // whatever the engine has taken, until `feed.is_over()`
    ///     server.spawn() // then `Handle::serve` takes connections
    /// }
    /// ```
    pub fn new_with_engine(config: Config, engine: Arc<dyn Engine>) -> io::Result<(Server, Feed)> {
        check_without_journal(&config)?;
        config.check()?;
        let server = Server::start(None, config, Some(engine))?;
        let feed = server.feed();
        Ok((server, feed))
    }

    fn feed(&self) -> Feed {
        Feed { core: Arc::downgrade(&self.handle.shared.streams.core) }
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
        let judge =
            tokens.map(|file| file.watch(shared.routes.door.clone(), shared.streams.clone(), stopping)).transpose()?;
        enter(&handle.helpers).extend(judge);
        tending::start(&shared.streams.core)?;
        Ok(Server { handle })
    }

    /// The hub, to publish with.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.hub().publish("news", Event::new("hello"))?; // before it serves, too
    /// # Ok(()) }
    /// ```
    pub fn hub(&self) -> Hub {
        self.handle.hub()
    }

    /// The address that is bound, also where port 0 was asked for.
    ///
    /// # Errors
    /// [`ErrorKind::AddrNotAvailable`]: it listens nowhere ([`Server::new`]).
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// assert_ne!(server.addr()?.port(), 0);
    /// # Ok(()) }
    /// ```
    pub fn addr(&self) -> io::Result<SocketAddr> {
        self.handle.addr()
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// No thread can be started; or it listens nowhere, so there is nothing to wait for
    /// ([`ErrorKind::AddrNotAvailable`]): [`spawn`](Server::spawn) it.
    ///
    /// ```no_run
    /// # use brooklet::{Config, Server};
    /// fn main() -> std::io::Result<()> {
    ///     Server::bind("127.0.0.1:3000", Config::default())?.run()
    /// }
    /// ```
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
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let handle = server.spawn()?; // to drop it stops the server
    /// println!("http://{}", handle.addr()?);
    /// # Ok(()) }
    /// ```
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
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let handle = server.spawn()?;
    /// handle.hub().publish("news", Event::new("hello"))?;
    /// # Ok(()) }
    /// ```
    pub fn hub(&self) -> Hub {
        Hub { core: self.shared.streams.core.clone() }
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// [`ErrorKind::AddrNotAvailable`]: it listens nowhere ([`Server::new`]).
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let handle = server.spawn()?;
    /// println!("curl -N http://{}/events/news", handle.addr()?);
    /// # Ok(()) }
    /// ```
    pub fn addr(&self) -> io::Result<SocketAddr> {
        let address = self.listening.as_ref().map(|listening| listening.address);
        address.ok_or_else(|| io::Error::new(ErrorKind::AddrNotAvailable, "this server listens nowhere itself"))
    }

    /// Takes over a connection that another accept loop has accepted, from before its first request. Whether its socket
    /// blocks makes no difference. Where there is no room, it is closed, as one of our own would be.
    ///
    /// # Errors
    /// The connection has gone already; or [`ErrorKind::NotConnected`], the server is stopping. The socket is closed.
    /// [`Server::new`] has an example.
    pub fn serve(&self, socket: TcpStream) -> io::Result<()> {
        self.shared.streams.core.check_running()?;
        let peer = socket.peer_addr()?;
        socket.set_nonblocking(false)?; // on some systems it has its listener's mode
        admit(&self.shared, &self.address_space, socket, peer);
        Ok(())
    }
}

/// Whoever can reach the port could publish: beyond loopback that must be wanted. A token or [`Config::open`] says so.
fn check_reach(config: &Config, address: SocketAddr) -> io::Result<()> {
    let needs_token = !config.publish_tokens.is_empty() || config.tokens.is_some();
    if config.open || needs_token || is_loopback_address(address.ip()) {
        return Ok(());
    }
    let what = format!("open: {address} is beyond loopback, so whoever reaches it could publish");
    Err(io::Error::new(ErrorKind::PermissionDenied, format!("{what}: set publish_tokens or tokens, or open")))
}

fn check_without_journal(config: &Config) -> io::Result<()> {
    match config.journal {
        None => Ok(()),
        Some(_) => invalid("journal: an engine keeps the events instead: leave one of the two out"),
    }
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

/// Gives a connection its place and puts it into the line for a thread, or closes it where there is no room. Never
/// waits for the peer.
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
        let taken = format!("all {} places are taken", places.limit());
        let why = if has_space { &taken } else { "no address space is left (ulimit -v)" };
        return log.warn(format_args!("no room for {peer}: {why}"));
    };
    // Once more, now that it has its place: stopping cuts whoever has one, but nobody who gets one after that.
    if core.is_stopping() {
        return places.leave(&c);
    }
    conversation::start(shared.clone(), c);
}
