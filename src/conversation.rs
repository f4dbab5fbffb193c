//! One connection, on its own thread: requests one after another, until it ends or becomes a stream.
//!
//! Whatever goes wrong here ends this connection and no other: a refusal is answered, a panic closes the socket, and in
//! each case the place is given up (`Drop` of `Conversation`). A stream that finds no room is answered with 200, a
//! reconnection time and its end, since a browser gives up for good on anything else.
//!
//! # A small stack
//! What a thread has touched of its stack stays resident for as long as it lives, and a subscriber's lives long. So
//! what happens one after another (reading a head, answering it, following topics) is never inlined into one frame:
//! each uses the same pages again. Otherwise every subscriber takes 15.5 kB instead of 11.5.

use crate::clock::spread;
use crate::config::{Config, Log};
use crate::connection::{AWAKE_TIME, Connection, LINGER, Reason, STOPPING};
use crate::encoded::Framing;
use crate::hub::Core;
use crate::log::{Logger, OncePerSecond};
use crate::places::{MADE_ROOM, Place, Places};
use crate::reader::Reader;
use crate::request::Request;
use crate::response::{Response, stream_head};
use crate::routes::{Reply, Routes, Source};
use crate::subscription::{NO_NAMES, NOT_REACHED, POLL_IS_OVER, Subscription};
use crate::sync::{enter, start_thread};
use crate::text::quoted;
use std::borrow::Cow;
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Instant;

/// Why a stream is rejected. The client is told in a comment; in the log both need the debug level, or a flood would
/// fill it.
const NO_ROOM: Reason = "no room for another stream";

/// What all conversations share. Nothing in it belongs to one of them.
pub struct Shared {
    pub core: Arc<Core>,
    pub places: Arc<Places>,
    pub routes: Routes,
    pub log: Arc<Logger>,
    /// A crowd that is closed to make room must not hide other warnings.
    pub evicted: OncePerSecond,
}

/// A connection on its thread. Dropping it, also by a panic, closes the socket and gives up its place.
struct Conversation {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    /// For the log, once it is a stream: then a line is written at its end.
    path: Option<String>,
    /// Why the stream ended, for that line. A handler's error is a text of its own.
    reason: Cow<'static, str>,
    opened: Instant,
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

/// Starts the thread of a connection that has its place.
///
/// # Errors
/// There is no thread; the connection has given its place up.
pub fn start(shared: Arc<Shared>, c: Arc<Connection>) -> io::Result<()> {
    let name = format!("conn {}", c.serial);
    let conversation = Conversation { shared, c, path: None, reason: "".into(), opened: Instant::now() };
    start_thread(name, Box::new(move || conversation.hold())).map(drop)
}

impl Conversation {
    /// The whole life of a connection.
    fn hold(mut self) {
        let c = &self.c;
        // An accepted socket may have its listener's mode, and an embedder's listener may not block. Without `nodelay`
        // small events wait for the peer to acknowledge the one before (RFC 896). The write timeout is what
        // `write_whole` takes for the stall time.
        let prepared = c.socket.set_nonblocking(false).and(c.socket.set_nodelay(true));
        if prepared.and(c.socket.set_write_timeout(Some(self.config().stall_time))).is_err() {
            return; // it has gone already
        }
        if let Some(Opening { path, framing, head, source }) = self.answer_requests() {
            enter(&self.c.state).framing = framing;
            self.path = Some(quoted(&path));
            // For the log, should the call after this panic.
            self.reason =
                if source.is_handler() { "the handler panicked" } else { "this server panicked: a fault" }.into();
            self.reason = self.stream(head, source);
        }
    }

    fn config(&self) -> &Config {
        &self.shared.core.config
    }

    /// Answers requests until the connection ends, or asks for a stream. The reader's buffer goes with this frame.
    fn answer_requests(&self) -> Option<Opening> {
        let (c, places, config) = (&*self.c, &self.shared.places, self.config());
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
            reader.wait_at_most(config.idle_time);
            // Only a client that has just shown that it asks at once is waited for awake; for all others that would
            // burn the processor for nothing.
            if !places.move_to(Place::Idle, c) || is_keen && c.stay_awake().is_err() {
                return None;
            }
            answered = Instant::now();
        }
    }

    /// Answers one request. Where it lost its place to a newcomer meanwhile, its socket is shut down already.
    #[inline(never)] // a small stack
    fn answer(&self, reader: &mut Reader, mut request: Request) -> AfterRequest {
        if !self.shared.places.move_to(Place::Busy, &self.c) {
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
        let close = request.close || response.close || !request.body.is_over() || self.shared.core.is_stopping();
        AfterRequest::Respond { parts: response.encode(is_head, close), close }
    }

    /// The response to a head that was refused, and so still stands in the reader. To HEAD it has no body.
    fn refuse(&self, reader: &Reader, refusal: &Response) -> AfterRequest {
        let is_head = reader.unread().starts_with(b"HEAD ");
        let line = format_args!("{} {}: {}", self.c.peer, refusal.status, refusal.reason());
        self.shared.log.line(Log::Debug, line);
        AfterRequest::Respond { parts: refusal.encode(is_head, true), close: true }
    }

    /// One line for each response; a stream's line is written when it closes.
    fn log_request(&self, request: &Request, status: u16) {
        if self.shared.log.wants(Log::Debug) {
            let (peer, path) = (self.c.peer, quoted(&request.path));
            self.shared.log.line(Log::Debug, format_args!("{peer} {:.20} {path} {status}", request.method));
        }
    }

    /// Finds a place among the streams, serves the stream to its end, and returns why it ended.
    #[inline(never)] // a small stack
    fn stream(&self, head: String, source: Source) -> Cow<'static, str> {
        let (c, core) = (&self.c, &*self.shared.core);
        let count = self.shared.places.move_to_streams(c);
        // Checked after the move: a server that begins to stop from here on finds this connection among its streams.
        if core.is_stopping() {
            return self.reject(&head, STOPPING).into();
        }
        let Some(count) = count else {
            let was_cut = c.cut.get(); // since its request was read
            return was_cut.copied().unwrap_or_else(|| self.reject(&head, NO_ROOM)).into();
        };
        match source {
            Source::Topics(wanted) => {
                // The lanes take turns. A stream stays with its lane, or its events could overtake each other.
                match Subscription::open(core, c, &core.lanes[count % core.lanes.len()], wanted) {
                    Ok(subscription) => subscription.serve(head).into(),
                    Err(why) => self.reject(&head, why).into(),
                }
            }
            Source::Handler(handled) => handled.serve(core, c, head),
        }
    }

    /// Rejects a stream in a way that a browser comes back from: it is opened, told when to come back, and ended. The
    /// time is spread, or all that were rejected would return at the same moment.
    fn reject(&self, head: &str, why: Reason) -> Reason {
        self.shared.core.counters.rejected.fetch_add(1, Relaxed);
        self.shared.log.warn(format_args!("{} was rejected: {why}", self.c.peer));
        match self.c.write_whole(head.as_bytes(), Instant::now() + LINGER) {
            Ok(()) => self.c.end(why, spread(self.config().retry, 50, 150), None),
            Err(reason) => reason, // half a head: nothing may follow
        }
    }

    /// One line for each stream, in fields that a script can read.
    fn log_closing(&self, path: &str) {
        let (open, sent) = (self.opened.elapsed(), enter(&self.c.state).sent);
        let (seconds, tenths) = (open.as_secs(), open.subsec_millis() / 100);
        let (peer, reason) = (self.c.peer, self.c.cut.get().copied().unwrap_or(&self.reason));
        let line =
            format_args!("closed peer={peer} path={path} reason={reason:?} seconds={seconds}.{tenths} events={sent}");
        let repeats = [POLL_IS_OVER, NO_ROOM, NO_NAMES, NOT_REACHED].contains(&reason); // as fast as a flood
        self.shared.log.line(if repeats { Log::Debug } else { Log::Info }, line);
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.c.socket.shutdown(Shutdown::Write); // the lane may keep the socket open for a moment
        // A stream's line names a panic, too; a connection without a stream is worth a line only where something is
        // wrong.
        if self.c.cut.get() == Some(&MADE_ROOM) {
            self.shared.core.counters.evicted.fetch_add(1, Relaxed);
            self.shared.log.warn_within(&self.shared.evicted, format_args!("{} was closed: {MADE_ROOM}", self.c.peer));
        } else if let Some(path) = &self.path {
            self.log_closing(path);
        } else if thread::panicking() {
            self.shared.log.warn(format_args!("{}: this server panicked: a fault", self.c.peer));
        }
        self.shared.places.leave(&self.c);
    }
}
