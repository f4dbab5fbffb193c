//! Sockets: the server's end behaves as one of the system's, the other end is the model's.

use crate::point;
use crate::time::{Duration, Instant, Sleepers};
use ::std::cell::RefCell;
use ::std::collections::{HashMap, VecDeque};
use ::std::io::{self, ErrorKind, Read, Write};
pub use ::std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, ToSocketAddrs};
use ::std::os::fd::{AsRawFd, OwnedFd, RawFd};
use ::std::sync::{Arc, Mutex, MutexGuard};

const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3000);

/// The server's end.
pub struct TcpStream {
    wire: Arc<Wire>,
    port: u16,
}

/// The other end. Dropping it changes nothing.
#[derive(Clone)]
pub struct Peer(Arc<Wire>);

#[derive(Default)]
struct Wire {
    state: Mutex<State>,
    /// Who waits for room, or for bytes, or for the end.
    sleepers: Sleepers,
}

#[derive(Default)]
struct State {
    to_peer: VecDeque<u8>,
    to_server: VecDeque<u8>,
    /// How much `to_peer` takes.
    capacity: usize,
    is_nonblocking: bool,
    write_timeout: Option<Duration>,
    read_timeout: Option<Duration>,
    /// The server has ended its sending side, or closed the socket.
    has_ended: bool,
    is_closed: bool,
    /// The server does not read any more.
    is_deaf: bool,
    /// The peer has ended its sending side.
    peer_has_ended: bool,
    /// The peer has closed its socket: it answers whatever is written with a reset.
    peer_is_gone: bool,
    is_reset: bool,
    /// Not told yet.
    error: Option<ErrorKind>,
}

/// A connection from this port, whose sockets hold this many bytes for the peer.
pub fn pair(port: u16, capacity: usize) -> (TcpStream, Peer) {
    let wire = Arc::new(Wire { state: Mutex::new(State { capacity, ..State::default() }), ..Wire::default() });
    (TcpStream { wire: wire.clone(), port }, Peer(wire))
}

impl Wire {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Does what can be done, or waits for it. There is no point between a try and the wait.
    fn attempt<T>(
        &self,
        timeout: fn(&State) -> Option<Duration>,
        mut attempt: impl FnMut(&mut State) -> Option<io::Result<T>>,
    ) -> io::Result<T> {
        point();
        let mut until = None;
        loop {
            let mut state = self.state();
            if let Some(done) = attempt(&mut state) {
                drop(state);
                self.sleepers.wake_all();
                return done;
            } else if state.is_nonblocking {
                return Err(ErrorKind::WouldBlock.into());
            }
            until = until.or_else(|| timeout(&state).map(|time| Instant::now() + time));
            drop(state);
            let name = shuttle::thread::current().name().unwrap_or_default().to_string();
            assert!(!name.starts_with("lane") && name != "clerk", "{name} waits for a peer");
            if self.sleepers.sleep(until) {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.attempt(|state| state.write_timeout, |state| state.write(bytes))
    }

    fn read(&self, buffer: &mut [u8], is_peek: bool) -> io::Result<usize> {
        self.attempt(|state| state.read_timeout, |state| state.read(buffer, is_peek))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        point();
        change(&mut self.state());
        self.sleepers.wake_all();
    }
}

impl State {
    fn write(&mut self, bytes: &[u8]) -> Option<io::Result<usize>> {
        if let Some(error) = self.error.take() {
            return Some(Err(error.into()));
        } else if self.has_ended || self.is_reset {
            return Some(Err(ErrorKind::BrokenPipe.into()));
        } else if self.peer_is_gone {
            (self.is_reset, self.error) = (true, Some(ErrorKind::ConnectionReset));
            return Some(Ok(bytes.len()));
        }
        let taken = bytes.len().min(self.capacity - self.to_peer.len());
        self.to_peer.extend(&bytes[..taken]);
        (taken > 0 || bytes.is_empty()).then_some(Ok(taken))
    }

    fn read(&mut self, buffer: &mut [u8], is_peek: bool) -> Option<io::Result<usize>> {
        if let Some(error) = self.error.take() {
            return Some(Err(error.into()));
        }
        let taken = buffer.len().min(self.to_server.len());
        if taken > 0 {
            self.to_server.iter().zip(buffer).for_each(|(from, to)| *to = *from);
            self.to_server.drain(..if is_peek { 0 } else { taken });
            return Some(Ok(taken));
        }
        (self.peer_has_ended || self.is_deaf || self.is_reset).then_some(Ok(0))
    }
}

impl TcpStream {
    pub fn connect(_: impl ToSocketAddrs) -> io::Result<TcpStream> {
        Err(ErrorKind::Unsupported.into())
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(SocketAddr::from(([127, 0, 0, 1], self.port)))
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(SERVER)
    }

    pub fn set_nonblocking(&self, mode: bool) -> io::Result<()> {
        self.wire.change(|state| state.is_nonblocking = mode);
        Ok(())
    }

    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_write_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        self.wire.state().write_timeout = time;
        Ok(())
    }

    pub fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        self.wire.state().read_timeout = time;
        Ok(())
    }

    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        point();
        Ok(self.wire.state().error.take().map(io::Error::from))
    }

    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wire.read(buffer, true)
    }

    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.wire.change(|state| {
            state.has_ended |= how != Shutdown::Read;
            state.is_deaf |= how != Shutdown::Write;
        });
        Ok(())
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        let mut state = self.wire.state();
        (state.has_ended, state.is_closed) = (true, true);
        drop(state);
        self.wire.sleepers.wake_all();
    }
}

impl Write for &TcpStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wire.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for &TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wire.read(buffer, false)
    }
}

impl Peer {
    /// Takes what has come, at most this much; waits for it. None at the end.
    pub fn take(&self, most: usize) -> Option<Vec<u8>> {
        point();
        loop {
            let mut state = self.0.state();
            let taken = most.min(state.to_peer.len());
            if taken > 0 {
                let bytes = state.to_peer.drain(..taken).collect();
                drop(state);
                self.0.sleepers.wake_all();
                return Some(bytes);
            } else if state.has_ended || state.is_reset {
                return None;
            }
            drop(state);
            self.0.sleepers.sleep(None);
        }
    }

    /// Nobody on the server's side has the socket any more.
    pub fn is_closed(&self) -> bool {
        self.0.state().is_closed
    }

    pub fn send(&self, bytes: &[u8]) {
        self.0.change(|state| state.to_server.extend(bytes));
    }

    /// Ends its sending side, and reads on.
    pub fn end(&self) {
        self.0.change(|state| state.peer_has_ended = true);
    }

    /// Closes its socket.
    pub fn close(&self) {
        self.0.change(|state| (state.peer_has_ended, state.peer_is_gone) = (true, true));
    }

    /// Resets the connection, as one that is closed with unread bytes does.
    pub fn reset(&self) {
        self.0.change(|state| (state.is_reset, state.error) = (true, Some(ErrorKind::ConnectionReset)));
    }
}

/// Accepts nobody: models hand their sockets over themselves. It can be stopped as a real one can.
pub struct TcpListener(Arc<Wire>);

impl TcpListener {
    pub fn bind(_: impl ToSocketAddrs) -> io::Result<TcpListener> {
        Ok(TcpListener(Arc::default()))
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(SERVER)
    }

    pub fn try_clone(&self) -> io::Result<TcpListener> {
        Ok(TcpListener(self.0.clone()))
    }

    pub fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let stopped = |state: &mut State| state.is_deaf.then_some(Err(ErrorKind::InvalidInput.into()));
        self.0.attempt(|_| None, stopped)
    }
}

thread_local! {
    /// What each descriptor that stands for a listener means.
    static LISTENERS: RefCell<HashMap<RawFd, Arc<Wire>>> = RefCell::default();
}

impl From<TcpListener> for OwnedFd {
    fn from(listener: TcpListener) -> OwnedFd {
        let fd = OwnedFd::from(::std::fs::File::open("/dev/null").expect("/dev/null can be opened"));
        LISTENERS.with_borrow_mut(|listeners| listeners.insert(fd.as_raw_fd(), listener.0));
        fd
    }
}

impl From<OwnedFd> for TcpStream {
    fn from(fd: OwnedFd) -> TcpStream {
        let wire = LISTENERS.with_borrow_mut(|listeners| listeners.remove(&fd.as_raw_fd()));
        TcpStream { wire: wire.expect("the descriptor of a listener"), port: 0 }
    }
}
