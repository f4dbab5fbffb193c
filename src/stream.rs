//! A handler's stream, on its connection's own thread.
//!
//! A program writes whatever it likes to a page, for as long as the page is there. The socket stays the thread's
//! throughout (the phase is never live), so no lane writes in between. Nobody sweeps it either: that a page has closed
//! is noticed when the handler writes, or while it sleeps on the socket. So every call says whether the stream is still
//! open, and a handler that returns its errors ends in time.

use crate::clock::spread;
use crate::connection::{Connection, Phase, Reason, STOPPING};
use crate::event::Event;
use crate::hub::Core;
use crate::sync::enter;
use crate::target::Query;
use crate::text::{LONGEST, with_lf};
use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// What writes a stream. Its error ends the stream, and is the reason in the log.
pub type Handler = dyn Fn(&mut Stream) -> io::Result<()> + Send + Sync;

/// A handler's stream, on its connection's own thread: see [`Server::stream`](crate::Server::stream).
pub struct Stream<'a> {
    c: &'a Connection,
    core: &'a Core,
    query: Query,
    last_event_id: Option<String>,
    /// Bytes that the peer has sent after its request.
    stray: usize,
}

/// A handler, and what it may ask of its request.
pub struct Handled {
    pub handler: Arc<Handler>,
    pub query: Query,
    pub last_event_id: Option<String>,
}

impl Handled {
    /// Writes the head, runs the handler, and returns why the stream ended. No lock may be held: a handler takes its
    /// time.
    pub fn serve(self, core: &Core, c: &Connection, head: String) -> Cow<'static, str> {
        if let Err(reason) = c.write_whole(head.as_bytes(), Instant::now() + LONGEST) {
            return reason.into();
        }
        drop(head); // while the handler runs, its memory is of no use
        let Handled { handler, query, last_event_id } = self;
        let result = handler(&mut Stream { c, core, query, last_event_id, stray: 0 });
        // An end is written only after a whole frame; a stream that is closed may be in the middle of one.
        if core.is_stopping() && enter(&c.state).phase == Phase::Behind {
            return c.end(STOPPING, spread(core.config.retry, 50, 150), None).into();
        }
        if enter(&c.state).phase == Phase::Behind {
            c.end_silently();
        }
        match result {
            Ok(()) => "the handler returned".into(),
            Err(error) => error.to_string().into(),
        }
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
        let until = Instant::now() + time.min(LONGEST);
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

    /// What the request's query says of `name`, percent-decoded.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name)
    }

    /// The id after which a page that reconnects wants to go on.
    pub fn last_event_id(&self) -> Option<&str> {
        self.last_event_id.as_deref()
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.c.peer
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
        enter(&self.c.state).phase = Phase::Closed(reason);
    }

    fn check_open(&self) -> io::Result<()> {
        match enter(&self.c.state).phase {
            Phase::Closed(reason) => Err(io::Error::other(reason)),
            _ if self.core.is_stopping() => Err(io::Error::other(STOPPING)),
            _ => Ok(()),
        }
    }
}
