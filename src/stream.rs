//! A handler's stream, on its connection's own thread.
//!
//! A program writes whatever it likes to a page, for as long as the page is there. The socket stays the thread's
//! throughout (the phase is never live), so no lane writes in between. Nobody sweeps it either: that a page has closed
//! is noticed when the handler writes, or while it sleeps on the socket. So every call says whether the stream is still
//! open, and a handler that returns its errors ends in time.

use crate::asked::Request;
use crate::connection::{Connection, Phase, Reason, STOPPING};
use crate::event::Event;
use crate::hub::Core;
use crate::sync::enter;
use crate::text::{LONGEST, with_lf};
use crossbeam_channel::{Receiver, bounded};
use std::convert::Infallible;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// A handler's stream, on its connection's own thread: see [`Request::stream`] and
/// [`Server::stream`](crate::Server::stream).
pub struct Stream<'a> {
    c: &'a Connection,
    core: &'a Core,
    request: &'a Request<'a>,
    /// Bytes that the peer has sent after its request.
    stray: usize,
    /// Disconnected once the connection's state has dropped its half.
    closed: Receiver<Infallible>,
}

impl<'a> Stream<'a> {
    /// Takes a place among the streams and writes the head; once for each request.
    ///
    /// # Errors
    /// There is no stream, and why.
    pub(crate) fn open(request: &'a Request<'a>) -> Result<Stream<'a>, Reason> {
        let (sender, closed) = bounded(0);
        let c = &**request.c;
        // Before the place is taken: stopping drops it for all that it finds there.
        enter(&c.state).open = Some(sender);
        (request.open)()?;
        Ok(Stream { c, core: request.core, request, stray: 0, closed })
    }

    /// What asked for this stream.
    pub fn request(&self) -> &'a Request<'a> {
        self.request
    }
}

impl Stream<'_> {
    /// Writes one event at once.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for an event that may not be; otherwise the stream is closed or the
    /// server is stopping, and the error says so: return it from the handler.
    pub fn send(&mut self, event: &Event) -> io::Result<()> {
        event.check()?;
        self.write(event.encode().as_bytes(), 1)
    }

    /// Writes a comment, which pages do not see; each line of the text becomes one. An empty one is a heartbeat.
    ///
    /// # Errors
    /// The stream is closed, or the server is stopping.
    pub fn comment(&mut self, text: &str) -> io::Result<()> {
        let lines: String = with_lf(text).split('\n').map(|line| format!(":{line}\n")).collect();
        self.write(lines.as_bytes(), 0)
    }

    /// Sleeps on the socket, so that closing the page ends the sleep at once.
    ///
    /// # Errors
    /// The peer closed the connection, or the server is stopping: return the error from the handler.
    pub fn sleep(&mut self, time: Duration) -> io::Result<()> {
        let until = Instant::now() + time.min(LONGEST); // a longer time may overflow, which panics
        loop {
            self.check_open()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.c.socket.set_read_timeout(Some(left))?;
            if let Some(reason) = self.c.look(&mut self.stray) {
                self.check_open()?; // stopping ends the reading side, too
                self.close(reason);
            }
        }
    }

    /// For a `select!` beside a channel of the program's own: nothing ever comes of it, and it is disconnected once the
    /// page has gone or the server is stopping, whatever the handler is doing.
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

    /// Writes one frame, waiting for the peer.
    fn write(&mut self, frame: &[u8], events: u64) -> io::Result<()> {
        self.check_open()?;
        let framing = enter(&self.c.state).framing;
        match self.c.write_whole(&framing.wrap(frame), Instant::now() + LONGEST) {
            Ok(()) => {
                enter(&self.c.state).sent += events;
                self.core.counters.delivered.fetch_add(events, Relaxed);
                Ok(())
            }
            Err(reason) => {
                self.close(reason); // perhaps after half an event: nothing may follow
                Err(io::Error::other(reason))
            }
        }
    }

    /// From here on every call fails with this reason.
    fn close(&self, reason: Reason) {
        enter(&self.c.state).close(reason);
    }

    pub(crate) fn check_open(&self) -> io::Result<()> {
        match enter(&self.c.state).phase {
            Phase::Closed(reason) => Err(io::Error::other(reason)),
            _ if self.core.is_stopping() => Err(io::Error::other(STOPPING)),
            _ => Ok(()),
        }
    }
}
