//! A handler's stream: a program writes whatever it likes to a page, for as long as the page is there.
//!
//! The handler has a thread, but is elsewhere most of the time: it waits for something of its own. So its stream is
//! live like a subscriber's, and its lane looks whether the page has closed and writes heartbeats. Both write under the
//! state's lock; the thread takes the socket for itself only where a write must wait, or to sleep on it, so that a
//! closed page ends a sleep at once. Every call says whether the stream is still open, and a handler that returns its
//! errors ends in time.

use crate::asked::Request;
use crate::connection::{Connection, PATIENCE, Phase, Reason, STOPPING, State};
use crate::event::Event;
use crate::follower::{Follower, News};
use crate::hub::Core;
use crate::outgoing::{Outgoing, Unfinished};
use crate::sync::enter;
use crate::text::{LONGEST, with_lf};
use crossbeam_channel::{Receiver, TryRecvError, bounded, select};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

/// How long a sleep that cannot sit on the socket goes on between two looks at it.
const STEP: Duration = Duration::from_millis(50);

/// A handler's stream: see [`Request::stream`] and [`Server::stream`](crate::Server::stream).
///
/// ```
/// # fn main() -> std::io::Result<()> {
/// # use brooklet::{Config, Event, Server};
/// # let server = Server::bind("127.0.0.1:0", Config::default())?;
/// server.stream("/hello", |stream| {
///     stream.comment("here it begins")?;
///     stream.send(&Event::new("hello").name("greeting"))
/// })?;
/// # Ok(()) }
/// ```
pub struct Stream<'a> {
    c: &'a Arc<Connection>,
    core: &'a Core,
    request: &'a Request<'a>,
    /// Disconnected once the connection's state has dropped its half.
    closed: Receiver<Infallible>,
}

impl<'a> Stream<'a> {
    /// Takes a place among the streams, writes the head with these lines in it, and gives the socket to its lane; once
    /// for each request. Returns the lane, too, from which whoever called the handler takes the socket back.
    ///
    /// # Errors
    /// There is no stream, and why.
    pub(crate) fn open(request: &'a Request<'a>, lines: &str) -> Result<(Stream<'a>, usize), Reason> {
        let Request { c, core, .. } = *request;
        let (sender, closed) = bounded(0);
        // Before the place is taken: stopping drops it for all that it finds there.
        enter(&c.state).open = Some(sender);
        let lane = (request.open)(lines)?;
        core.lanes[lane].join(c, &Arc::default());
        enter(&c.state).phase = Phase::Live;
        Ok((Stream { c, core, request, closed }, lane))
    }

    /// What asked for this stream.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/hello", |stream| {
    ///     let name = stream.request().query("name").unwrap_or("you");
    ///     stream.send(&Event::new(format!("hello, {name}")))
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn request(&self) -> &'a Request<'a> {
        self.request
    }
}

impl Stream<'_> {
    /// Writes one event at once.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for an event that is not allowed; otherwise the stream is closed
    /// or the server is stopping, and the error says so: return it from the handler.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/once", |stream| stream.send(&Event::new("7").name("order").id("7")))?;
    /// # Ok(()) }
    /// ```
    pub fn send(&mut self, event: &Event) -> io::Result<()> {
        event.check()?;
        self.write(event.encode().as_bytes(), 1)
    }

    /// Writes a comment, which pages do not see; each line of the text becomes one. An empty one is a heartbeat.
    ///
    /// # Errors
    /// The stream is closed, or the server is stopping.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Server};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/quiet", |stream| stream.comment("nothing to see here"))?; // : nothing to see here
    /// # Ok(()) }
    /// ```
    pub fn comment(&mut self, text: &str) -> io::Result<()> {
        let lines: String = with_lf(text).split('\n').map(|line| format!(":{line}\n")).collect();
        self.write(lines.as_bytes(), 0)
    }

    /// Sleeps on the socket, so that closing the page ends the sleep at once.
    ///
    /// # Errors
    /// The peer closed the connection, or the server is stopping: return the error from the handler.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// # use std::time::Duration;
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/clock", |stream| {
    ///     loop {
    ///         stream.send(&Event::new("tick"))?;
    ///         stream.sleep(Duration::from_secs(1))?;
    ///     }
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn sleep(&mut self, time: Duration) -> io::Result<()> {
        let until = Instant::now() + time.min(LONGEST); // a longer time may overflow, which panics
        loop {
            self.check_open()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.rest(left);
        }
    }

    /// Waits for a while, on the socket where that tells of the page's end.
    fn rest(&self, time: Duration) {
        let heartbeat = self.core.config.heartbeat;
        let mut state = enter(&self.c.state);
        if state.phase != Phase::Live {
            return; // its lane has just found it closed
        }
        let silent = state.wrote.elapsed();
        if state.unfinished.is_some() || state.has_said_all {
            drop(state);
            thread::sleep(time.min(STEP)); // to read would return at once, or heartbeats be late
            state = enter(&self.c.state);
            let looked = self.c.look(&mut state).map(drop);
            return close_if_err(&mut state, looked);
        } else if silent >= heartbeat {
            let beaten = self.c.beat(&mut state, Instant::now());
            return close_if_err(&mut state, beaten);
        }
        state.phase = Phase::Behind;
        drop(state);
        let timeout = time.min(heartbeat - silent).max(Duration::from_millis(1)); // 0 would be none
        let sat = self.c.socket.set_read_timeout(Some(timeout)).map_err(|_| "the socket failed");
        let got = sat.and(self.c.set_nonblocking(false)).and_then(|()| self.c.read_stray());
        let got = self.c.set_nonblocking(true).and(got);
        let mut state = enter(&self.c.state);
        state.phase = Phase::Live;
        let noted = got.and_then(|got| self.c.note_stray(&mut state, got)).map(drop);
        close_if_err(&mut state, noted);
    }

    /// Waits for what a follower gets next, for as long as the page is there: so a stream serves what the program makes
    /// of topics.
    ///
    /// # Errors
    /// The page has gone, or the server is stopping: return the error from the handler.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, News, Server, Since};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// server.stream("/shouted", |stream| {
    ///     let mut news = stream.request().hub().subscribe(["news"], Since::Now)?;
    ///     loop {
    ///         match stream.wait_for(&mut news)? {
    ///             News::Event(event) => stream.send(&Event::new(event.data.to_uppercase()))?,
    ///             _ => stream.comment("some news were missed")?, // a gap
    ///         }
    ///     }
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn wait_for(&self, news: &mut Follower) -> io::Result<News> {
        loop {
            self.check_open()?;
            match news.try_next() {
                Ok(item) => return Ok(item),
                // It may be of another server of the program's.
                Err(TryRecvError::Disconnected) => return Err(io::Error::other(STOPPING)),
                Err(TryRecvError::Empty) => {}
            }
            select! {
                recv(self.closed) -> _ => {}
                recv(news.ready()) -> _ => {}
            }
        }
    }

    /// For a `select!` beside a channel of the program's own: nothing ever comes of it, and it is disconnected once the
    /// page has gone or the server is stopping, whatever the handler is doing. What is sent on a channel that several
    /// pages share reaches one of them; what is for all of them is better published to a topic.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # use brooklet::{Config, Event, Server};
    /// use brooklet::crossbeam_channel::{select, unbounded};
    /// # let server = Server::bind("127.0.0.1:0", Config::default())?;
    /// let (_sender, moves) = unbounded::<String>(); // a program's own
    /// server.stream("/moves", move |stream| {
    ///     loop {
    ///         select! {
    ///             recv(stream.closed()) -> _ => return Ok(()),
    ///             recv(moves) -> text => match text {
    ///                 Ok(text) => stream.send(&Event::new(text))?,
    ///                 Err(_) => return Ok(()), // no more moves
    ///             },
    ///         }
    ///     }
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn closed(&self) -> &Receiver<Infallible> {
        &self.closed
    }

    /// Writes one frame: at once where it fits, else it waits for the peer.
    fn write(&mut self, frame: &[u8], events: u64) -> io::Result<()> {
        self.check_open()?;
        let mut state = enter(&self.c.state);
        if let Phase::Closed(reason) = state.phase {
            return Err(io::Error::other(reason));
        }
        let bytes = state.shape.framing.wrap(frame);
        let written = match &mut state.unfinished {
            // The rest of a heartbeat goes first.
            Some(Unfinished { what: Outgoing::Other(before), .. }) => {
                before.extend_from_slice(&bytes);
                Ok(false)
            }
            _ => self.c.write_or_leave(&mut state, bytes),
        };
        match written {
            Ok(true) => state.wrote = Instant::now(),
            Ok(false) => {
                state.phase = Phase::Behind;
                drop(state);
                let finished = self.c.finish(Instant::now() + LONGEST, &|| PATIENCE).map(drop);
                state = enter(&self.c.state);
                state.phase = Phase::Live;
                close_if_err(&mut state, finished);
            }
            Err(reason) => close_if_err(&mut state, Err(reason)),
        }
        if let Phase::Closed(reason) = state.phase {
            return Err(io::Error::other(reason));
        }
        state.sent += events;
        self.core.counters.delivered.fetch_add(events, Relaxed);
        Ok(())
    }

    pub(crate) fn check_open(&self) -> io::Result<()> {
        match enter(&self.c.state).phase {
            Phase::Closed(reason) => Err(io::Error::other(reason)),
            _ if self.core.is_stopping() => Err(io::Error::other(STOPPING)),
            _ => Ok(()),
        }
    }
}

/// Perhaps after half an event: nothing may follow, and every call fails with this reason.
fn close_if_err(state: &mut State, done: Result<(), Reason>) {
    if let Err(reason) = done {
        state.phase = Phase::Closed(reason);
        state.open = None;
    }
}
