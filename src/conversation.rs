//! One connection's requests, one after another, until it ends or becomes a stream.
//!
//! They are read and answered on a thread of the pool. Whatever goes wrong here ends this connection and no other: a
//! refusal is answered, a panic closes the socket, and in each case the place is given up (`Drop` of `Conversation`). A
//! stream that finds no room is answered with 200, a reconnection time and its end, since a browser gives up for good on
//! anything else.

use crate::clock::spread;
use crate::config::{Config, Log};
use crate::connection::{AWAKE_TIME, Connection, LINGER, Reason, STOPPING};
use crate::encoded::Framing;
use crate::log::OncePerSecond;
use crate::places::{MADE_ROOM, Place, Places};
use crate::pool::{Kind, Seat};
use crate::reader::Reader;
use crate::request::Request;
use crate::response::{Response, stream_head};
use crate::routes::{Reply, Routes, Source};
use crate::subscriber::Opened;
use crate::subscription::{NO_ROOM, NO_THREAD, Streams};
use crate::sync::enter;
use crate::text::quoted;
use std::borrow::Cow;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

/// An idle connection is closed this much later than its responses say: a request that was sent just before has arrived
/// by then, and is answered.
const IDLE_GRACE: Duration = Duration::from_secs(1);

/// What all conversations share. Nothing in it belongs to one of them.
pub struct Shared {
    pub streams: Arc<Streams>,
    pub routes: Routes,
    /// A crowd that is closed to make room must not hide other warnings.
    pub evicted: OncePerSecond,
}

/// A connection on a thread. Dropping it, also by a panic, closes the socket and gives up its place.
struct Conversation {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    /// For the log, once it is a stream: then a line is written at its end.
    opened: Option<Opened>,
    /// Why the stream ended, for that line. A handler's error is a text of its own.
    reason: Cow<'static, str>,
    /// It is a subscriber now, whose end is noted elsewhere.
    is_over: bool,
}

/// A stream that a request has asked for, and all that is kept of the request.
struct Opening {
    path: String,
    framing: Framing,
    head: String,
    source: Source,
}

/// What comes of one request.
enum AfterRequest {
    /// Both parts are written, one after the other; then the next request is read, or the connection ends.
    Respond { parts: (Vec<u8>, Arc<[u8]>), close: bool },
    /// No more requests: the connection becomes a stream.
    Open(Opening),
    /// Nothing is answered: the peer has gone, or has made room.
    End,
}

/// Puts a connection that has its place into the line for a thread.
pub fn start(shared: Arc<Shared>, c: Arc<Connection>) {
    let pool = shared.streams.pool.clone();
    let conversation = Conversation { shared, c, opened: None, reason: "".into(), is_over: false };
    pool.hand(Kind::Request, Box::new(move |seat| conversation.hold(seat)));
}

impl Conversation {
    /// All of a connection's requests, and a handler's stream.
    fn hold(mut self, seat: &mut Seat) {
        let c = &self.c;
        if !self.places().move_to(Place::Idle, c) || c.prepare().is_err() {
            return; // it has made room, or gone, already
        }
        if let Some(Opening { path, framing, head, source }) = self.answer_requests() {
            enter(&self.c.state).framing = framing;
            self.opened = Some(Opened { path: path.into(), at: Instant::now() });
            // For the log, should the call after this panic.
            self.reason = "the handler panicked".into();
            self.reason = self.stream(seat, &head, source);
        }
    }

    fn config(&self) -> &Config {
        &self.shared.streams.core.config
    }

    fn places(&self) -> &Places {
        &self.shared.streams.places
    }

    /// Answers requests until the connection ends, or asks for a stream. The reader's buffer goes with this frame.
    fn answer_requests(&self) -> Option<Opening> {
        let (c, places, config) = (&*self.c, self.places(), self.config());
        let mut reader = Reader::new(c);
        reader.wait_at_most(config.head_time);
        let mut answered = Instant::now();
        loop {
            let request = Request::read(&mut reader, config);
            let is_keen = answered.elapsed() < 2 * AWAKE_TIME; // also the first one, which comes at once
            let after = match request {
                Ok(None) => AfterRequest::End,
                Ok(Some(request)) => self.answer(&mut reader, request),
                Err(refusal) => self.refuse(&reader, &refusal),
            };
            match after {
                AfterRequest::End => return None,
                AfterRequest::Open(opening) => return Some(opening),
                AfterRequest::Respond { parts: (first, rest), close } => {
                    // A response gets as long as a body does: some are a page of many KiB over a slow link.
                    let deadline = Instant::now() + config.body_time;
                    if c.write_whole(&first, deadline).and_then(|()| c.write_whole(&rest, deadline)).is_err() {
                        return None;
                    } else if close {
                        reader.linger();
                        return None;
                    }
                }
            }
            reader.wait_at_most(config.idle_time + IDLE_GRACE);
            // Only a client that has just shown that it asks at once is waited for awake; for all others that would
            // burn the processor for nothing. What has come already is not waited for.
            let stays_awake = is_keen && reader.unread().is_empty();
            if !places.move_to(Place::Idle, c) || stays_awake && c.stay_awake().is_err() {
                return None;
            }
            answered = Instant::now();
        }
    }

    /// Answers one request. Where it lost its place to a newcomer meanwhile, its socket is shut down already.
    fn answer(&self, reader: &mut Reader, mut request: Request) -> AfterRequest {
        if !self.places().move_to(Place::Busy, &self.c) {
            return AfterRequest::End;
        }
        let is_head = request.method == "HEAD";
        let (framing, cors) = (request.framing, self.shared.routes.door.cors(&request));
        let mut response = match self.shared.routes.reply(reader, &mut request) {
            Ok(Reply::Response(response)) | Err(response) => response,
            Ok(Reply::Stream(_)) if is_head => {
                self.log_request(&request, 200);
                let head = stream_head(framing, &cors).into_bytes();
                return AfterRequest::Respond { parts: (head, Arc::default()), close: true };
            }
            Ok(Reply::Stream(source)) => {
                let head = stream_head(framing, &cors);
                return AfterRequest::Open(Opening { path: request.path, framing, head, source });
            }
        };
        response.fields += &cors; // refusals, too: without these lines no page of another origin could read why
        self.log_request(&request, response.status);
        // A body that was not read whole stands before the next request, which nobody could find.
        let close =
            request.close || response.close || !request.body.is_over() || self.shared.streams.core.is_stopping();
        if !close {
            let idle_time = self.config().idle_time.as_secs();
            response.fields += &format!("Connection: keep-alive\r\nKeep-Alive: timeout={idle_time}\r\n");
        }
        AfterRequest::Respond { parts: response.encode(is_head, close), close }
    }

    /// The response to a head that was refused, and so still stands in the reader. To HEAD it has no body.
    fn refuse(&self, reader: &Reader, refusal: &Response) -> AfterRequest {
        let is_head = reader.unread().starts_with(b"HEAD ");
        let line = format_args!("{} {}: {}", self.c.peer, refusal.status, refusal.reason());
        self.shared.streams.log.line(Log::Debug, line);
        AfterRequest::Respond { parts: refusal.encode(is_head, true), close: true }
    }

    /// One line for each response; a stream's line is written when it closes.
    fn log_request(&self, request: &Request, status: u16) {
        if self.shared.streams.log.wants(Log::Debug) {
            let (peer, path) = (self.c.peer, quoted(&request.path));
            self.shared.streams.log.line(Log::Debug, format_args!("{peer} {:.20} {path} {status}", request.method));
        }
    }

    /// Finds a place among the streams, and serves a handler's to its end, or gives a subscriber away. Returns why the
    /// stream ended, if it did.
    fn stream(&mut self, seat: &mut Seat, head: &str, source: Source) -> Cow<'static, str> {
        let (c, streams) = (self.c.clone(), self.shared.streams.clone());
        let place = if source.is_handler() { Place::Handler } else { Place::Stream };
        let count = streams.places.move_to_streams(place, &c);
        // Checked after the move: a server that begins to stop from here on finds this connection among its streams.
        if streams.core.is_stopping() {
            return self.reject(head, STOPPING).into();
        }
        let Some(count) = count else {
            let was_cut = c.cut.get(); // since its request was read
            return was_cut.copied().unwrap_or_else(|| self.reject(head, NO_ROOM)).into();
        };
        // The lanes take turns.
        let lane = count % streams.core.lanes.len();
        match source {
            Source::Topics(wanted) => {
                let Some(opened) = self.opened.take() else { return "".into() };
                match streams.open(&c, lane, wanted, head, opened) {
                    Ok(subscriber) => {
                        self.is_over = true;
                        streams.start(seat, &c, subscriber);
                        "".into()
                    }
                    Err((reason, opened)) => {
                        self.opened = Some(opened);
                        self.reject(head, reason).into()
                    }
                }
            }
            Source::Handler(_) if !seat.change_to(Kind::Handler) => self.reject(head, NO_THREAD).into(),
            Source::Handler(handled) => handled.serve(&streams.core, &c, lane, head),
        }
    }

    /// Rejects a stream in a way that a browser comes back from: it is opened, told when to come back, and ended. The
    /// time is spread, or all that were rejected would return at the same moment.
    fn reject(&self, head: &str, why: Reason) -> Reason {
        self.shared.streams.core.counters.rejected.fetch_add(1, Relaxed);
        self.shared.streams.log.warn(format_args!("{} was rejected: {why}", self.c.peer));
        match self.c.write_whole(head.as_bytes(), Instant::now() + LINGER).and(self.c.set_nonblocking(true)) {
            Ok(()) => self.c.end(why, spread(self.config().retry, 50, 150), None),
            Err(reason) => reason, // half a head: nothing may follow
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let (c, streams) = (&self.c, &self.shared.streams);
        let _ = c.socket.shutdown(Shutdown::Write); // the lane may keep the socket open for a moment
        // A stream's line names a panic, too; a connection without a stream is worth a line only where something is
        // wrong.
        if c.cut.get() == Some(&MADE_ROOM) {
            streams.core.counters.evicted.fetch_add(1, Relaxed);
            streams.log.warn_within(&self.shared.evicted, format_args!("{} was closed: {MADE_ROOM}", c.peer));
        } else if let Some(opened) = &self.opened {
            streams.log_end(c, opened, &self.reason);
        } else if thread::panicking() {
            streams.log.warn(format_args!("{}: this server panicked: a fault", c.peer));
        }
        streams.places.leave(c);
    }
}
