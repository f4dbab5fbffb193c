//! One connection's requests, one after another, until it ends or becomes a stream.
//!
//! They are read and answered on a thread of the pool. Whatever goes wrong here ends this connection and no other: a
//! refusal is answered, a panic closes the socket, and in each case the place is given up (`Drop` of `Conversation`). A
//! stream that finds no room is answered with 200, a reconnection time and its end, since a browser gives up for good
//! on anything else; only forms for scripts get 503.

use crate::clock::spread;
use crate::config::{Config, Log};
use crate::connection::{Connection, LINGER, Reason, STOPPING};
use crate::encoded::{Framing, Shape};
use crate::form::Form;
use crate::handler::Outcome;
use crate::log::OncePerSecond;
use crate::places::{MADE_ROOM, Place, Places};
use crate::pool::{Kind, Seat};
use crate::presence::FAR_BEHIND;
use crate::reader::{AWAKE_TIME, Reader};
use crate::request::Request;
use crate::response::{Response, stream_head};
use crate::routes::{Reply, Routes};
use crate::subscriber::Opened;
use crate::subscription::{NO_ROOM, NO_THREAD, Streams};
use crate::sync::{Mutex, enter};
use crate::text::quoted;
use crate::wanted::Wanted;
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

/// A stream of topics that a request has asked for, and all that is kept of the request.
struct Opening {
    path: String,
    shape: Shape,
    lines: String,
    wanted: Wanted,
}

/// What comes of one request.
enum AfterRequest {
    /// Both parts are written, one after the other; then the next request is read, or the connection ends.
    Respond { parts: (Vec<u8>, Arc<[u8]>), close: bool },
    /// No more requests: the connection becomes a stream of topics.
    Open(Opening),
    /// It was a handler's stream, and is over for this reason.
    Ended(Opened, Cow<'static, str>),
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
        match self.answer_requests(seat) {
            AfterRequest::Open(Opening { path, shape, lines, wanted }) => {
                enter(&self.c.state).shape = shape;
                let opened = Opened { path: path.into(), at: Instant::now() };
                self.stream(seat, shape, &lines, wanted, opened);
            }
            AfterRequest::Ended(opened, reason) => (self.opened, self.reason) = (Some(opened), reason),
            AfterRequest::Respond { .. } | AfterRequest::End => {}
        }
    }

    fn config(&self) -> &Config {
        &self.shared.streams.core.config
    }

    fn places(&self) -> &Places {
        &self.shared.streams.places
    }

    /// Answers requests until the connection ends, or asks for a stream; returns what came of the last. The reader's
    /// buffer goes with this frame.
    fn answer_requests(&self, seat: &mut Seat) -> AfterRequest {
        let (c, places, config) = (&*self.c, self.places(), self.config());
        let mut reader = Reader::new(c);
        reader.wait_at_most(config.head_time);
        let mut answered = Instant::now();
        loop {
            let request = Request::read(&mut reader, config);
            let is_keen = answered.elapsed() < 2 * AWAKE_TIME; // also the first one, which comes at once
            let after = match request {
                Ok(None) => AfterRequest::End,
                Ok(Some(request)) => self.answer(seat, &mut reader, request),
                Err(refusal) => self.refuse(&reader, &refusal),
            };
            match after {
                AfterRequest::Open(_) | AfterRequest::Ended(..) | AfterRequest::End => return after,
                AfterRequest::Respond { parts: (first, rest), close } => {
                    // A response gets as long as a body does: some are a page of many KiB over a slow link.
                    let deadline = Instant::now() + config.body_time;
                    if c.write_whole(&first, deadline).and_then(|()| c.write_whole(&rest, deadline)).is_err() {
                        return AfterRequest::End;
                    } else if close {
                        reader.linger();
                        return AfterRequest::End;
                    }
                }
            }
            reader.wait_at_most(config.idle_time + IDLE_GRACE);
            // The thread stays awake only for a client that has just asked again at once: for others that would burn
            // the processor for nothing. What has come already needs no waiting.
            let stays_awake = is_keen && reader.unread().is_empty();
            if !places.move_to(Place::Idle, c) || stays_awake && reader.stay_awake().is_err() {
                return AfterRequest::End;
            }
            answered = Instant::now();
        }
    }

    /// Answers one request. Where it lost its place to a newcomer meanwhile, its socket is shut down already.
    fn answer(&self, seat: &mut Seat, reader: &mut Reader, mut request: Request) -> AfterRequest {
        if !self.places().move_to(Place::Busy, &self.c) {
            return AfterRequest::End;
        }
        let is_head = request.method == "HEAD";
        let (framing, cors) = (request.framing, self.shared.routes.door.cors(&request));
        let at = Instant::now();
        let outcome = match self.shared.routes.reply(reader, &mut request) {
            Ok(Reply::Response(response)) | Err(response) => Outcome::Respond(response),
            Ok(Reply::Topics(wanted)) => Outcome::Follow(wanted, String::new()),
            Ok(Reply::Handler(handled)) => {
                reader.give_up_memory(); // a handler's stream may last
                let seat = Mutex::new(seat); // a request may be lent to other threads
                let open = |lines: &str| self.open(&mut enter(&seat), framing, &(cors.clone() + lines));
                handled.run(&self.shared.streams.core, &self.c, &open)
            }
        };
        let mut response = match outcome {
            Outcome::Respond(response) => response,
            Outcome::Failed(error) => {
                let response = self.shared.routes.failed(&error);
                if response.status >= 500 {
                    let path = quoted(&request.path);
                    self.shared.streams.log.warn(format_args!("the handler of {path} failed: {error}"));
                }
                response
            }
            Outcome::Ended(reason) => return AfterRequest::Ended(Opened { path: request.path.into(), at }, reason),
            Outcome::Follow(wanted, lines) if !is_head => {
                let shape = Shape { form: wanted.form, framing };
                return AfterRequest::Open(Opening { path: request.path, shape, lines: cors + &lines, wanted });
            }
            Outcome::Follow(Wanted { form, .. }, lines) => return self.head(&request, form, cors + &lines),
            Outcome::Head(lines) => return self.head(&request, Form::Events, cors + &lines),
        };
        response.fields += &cors; // refusals, too: without these lines no page of another origin could read why
        self.log_request(&request, response.status);
        // A body that was not read whole stands before the next request, which nobody could find.
        let close = request.close
            || response.close
            || !request.body.is_over()
            || self.shared.streams.core.is_stopping()
            || self.shared.streams.pool.is_crowded();
        if !close {
            let idle_time = self.config().idle_time.as_secs();
            response.fields += &format!("Connection: keep-alive\r\nKeep-Alive: timeout={idle_time}\r\n");
        }
        AfterRequest::Respond { parts: response.encode(is_head, close), close }
    }

    /// The head of a stream, to a HEAD.
    fn head(&self, request: &Request, form: Form, lines: String) -> AfterRequest {
        self.log_request(request, 200);
        let head = stream_head(Shape { form, framing: request.framing }, &lines).into_bytes();
        AfterRequest::Respond { parts: (head, Arc::default()), close: true }
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

    /// Finds a stream of topics its place, and gives the subscriber away.
    fn stream(&mut self, seat: &mut Seat, shape: Shape, lines: &str, wanted: Wanted, opened: Opened) {
        let (c, streams) = (self.c.clone(), self.shared.streams.clone());
        if !streams.core.presence.has_room() {
            return (self.opened, self.reason) = (Some(opened), self.reject(shape, lines, FAR_BEHIND).into());
        }
        let lane = match self.take_place(Place::Stream, shape, lines) {
            Ok(lane) => lane,
            Err(reason) => return (self.opened, self.reason) = (Some(opened), reason.into()),
        };
        match streams.open(&c, lane, wanted, &stream_head(shape, lines), opened) {
            Ok(subscriber) => {
                self.is_over = true;
                streams.core.presence.note_begin(&subscriber.names, c.peer);
                streams.start(seat, &c, subscriber);
            }
            Err((reason, opened)) => {
                (self.opened, self.reason) = (Some(opened), self.reject(shape, lines, reason).into());
            }
        }
    }

    /// Opens a handler's stream: its place, its thread's share, its head. Returns its lane.
    fn open(&self, seat: &mut Seat, framing: Framing, lines: &str) -> Result<usize, Reason> {
        let shape = Shape { form: Form::Events, framing };
        enter(&self.c.state).shape = shape;
        let lane = self.take_place(Place::Handler, shape, lines)?;
        if !seat.change_to(Kind::Handler) {
            return Err(self.reject(shape, lines, NO_THREAD));
        }
        self.c.write_whole(stream_head(shape, lines).as_bytes(), Instant::now() + self.config().body_time)?;
        self.c.set_nonblocking(true)?;
        Ok(lane)
    }

    /// Finds a place among the streams, and a lane: they take turns. Or rejects the stream.
    fn take_place(&self, place: Place, shape: Shape, lines: &str) -> Result<usize, Reason> {
        let core = &self.shared.streams.core;
        let count = self.places().move_to_streams(place, &self.c);
        // Checked after the move: a server that begins to stop from here on finds this connection among its streams.
        if core.is_stopping() {
            return Err(self.reject(shape, lines, STOPPING));
        }
        let was_cut = self.c.cut.get().copied(); // since its request was read
        let count = count.ok_or_else(|| was_cut.unwrap_or_else(|| self.reject(shape, lines, NO_ROOM)))?;
        Ok(count % core.lanes.len())
    }

    /// Rejects a stream in a way that a browser comes back from: it is opened, told when to come back, and ended. The
    /// time is spread, or all that were rejected would return at the same moment. A script would take an empty stream
    /// for success, so other forms are refused.
    fn reject(&self, shape: Shape, lines: &str, why: Reason) -> Reason {
        self.shared.streams.core.counters.rejected.fetch_add(1, Relaxed);
        self.shared.streams.log.warn(format_args!("{} was rejected: {why}", self.c.peer));
        let retry = spread(self.config().retry, 50, 150);
        let head = match shape.form {
            Form::Events => stream_head(shape, lines).into_bytes(),
            Form::Lines | Form::Json => {
                let mut refusal = Response::text(503, why).field("Retry-After", retry.as_millis().div_ceil(1000));
                refusal.fields += lines;
                refusal.encode(false, true).0
            }
        };
        match self.c.write_whole(&head, Instant::now() + LINGER).and(self.c.set_nonblocking(true)) {
            Ok(()) if shape.form == Form::Events => self.c.end(why, retry, None),
            Ok(()) => why,
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
