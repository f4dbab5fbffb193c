//! One connection, on its own thread: requests one after another, until it ends or becomes a stream.
//!
//! # A small stack
//! What a thread once had on its stack stays resident as long as it lives, and a subscriber's lives long. So what happens
//! one after another (reading a head, answering it, following topics) is never inlined into one frame: each uses the
//! same page again. Otherwise every subscriber takes 15.5 kB instead of 11.5.

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
use crate::subscription::{POLL_IS_OVER, Subscription};
use crate::sync::{enter, start_thread};
use crate::text::quoted;
use std::borrow::Cow;
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Instant;

const NO_ROOM: Reason = "no room for another stream";
const NO_NAMES: Reason = "all topic names are in use";

/// What all conversations share.
pub struct Shared {
    pub core: Arc<Core>,
    pub places: Arc<Places>,
    pub routes: Routes,
    pub log: Arc<Logger>,
    /// A crowd that is evicted must not use up the turn of other warnings.
    pub evicted: OncePerSecond,
}

/// A connection on its thread. Dropping it, also by a panic, closes the socket and gives up its place.
struct Conversation {
    shared: Arc<Shared>,
    c: Arc<Connection>,
    /// For the log, once it is a stream.
    path: Option<String>,
    reason: Cow<'static, str>,
    opened: Instant,
}

/// A stream that a request has asked for.
struct Opening {
    path: String,
    framing: Framing,
    head: String,
    source: Source,
}

/// What comes of one request.
enum Turn {
    /// Both parts are written, one after the other.
    Respond {
        parts: (Vec<u8>, Arc<[u8]>),
        close: bool,
    },
    Open(Opening),
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
    fn hold(mut self) {
        let c = &self.c;
        let prepared = c.socket.set_nonblocking(false).and(c.socket.set_nodelay(true));
        if prepared.and(c.socket.set_write_timeout(Some(self.config().stall_time))).is_err() {
            return; // it has gone already
        }
        if let Some(Opening { path, framing, head, source }) = self.answer_requests() {
            enter(&self.c.state).framing = framing;
            self.path = Some(quoted(&path));
            // What is logged if the next line never returns.
            self.reason =
                if source.is_handler() { "the handler panicked" } else { "this server panicked: a fault" }.into();
            self.reason = self.stream(head, source);
        }
    }

    fn config(&self) -> &Config {
        &self.shared.core.config
    }

    /// Answers requests until the connection ends, or asks for a stream.
    fn answer_requests(&self) -> Option<Opening> {
        let (c, places, config) = (&*self.c, &self.shared.places, self.config());
        let mut reader = Reader::new(c);
        reader.wait_at_most(config.head_time);
        let mut answered = Instant::now();
        loop {
            let request = Request::read(&mut reader, config);
            let is_keen = answered.elapsed() < 2 * AWAKE_TIME; // the first of a connection counts, too: it comes at once
            let turn = match request {
                Ok(None) => Turn::End,
                Ok(Some(request)) => self.answer(&mut reader, request),
                Err(refusal) => self.refuse(&reader, &refusal),
            };
            match turn {
                Turn::End => return None,
                Turn::Open(opening) => return Some(opening),
                Turn::Respond { parts: (first, rest), close } => {
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
            if !places.move_to(Place::Idle, c) || is_keen && c.stay_awake().is_err() {
                return None;
            }
            answered = Instant::now();
        }
    }

    #[inline(never)] // a small stack
    fn answer(&self, reader: &mut Reader, mut request: Request) -> Turn {
        if !self.shared.places.move_to(Place::Busy, &self.c) {
            return Turn::End;
        }
        let is_head = request.method == "HEAD";
        let (framing, cors) = (request.framing, self.shared.routes.door.cors(&request));
        let mut response = match self.shared.routes.reply(reader, &mut request) {
            Ok(Reply::Response(response)) | Err(response) => response,
            Ok(Reply::Stream(_)) if is_head => {
                self.log_request(&request, 200);
                let head = stream_head(framing, &cors).into_bytes();
                return Turn::Respond { parts: (head, Arc::default()), close: true };
            }
            Ok(Reply::Stream(source)) => {
                let head = stream_head(framing, &cors);
                return Turn::Open(Opening { path: request.path, framing, head, source });
            }
        };
        response.fields += &cors;
        self.log_request(&request, response.status);
        let close = request.close || response.close || !request.body.is_over() || self.shared.core.is_stopping();
        Turn::Respond { parts: response.encode(is_head, close), close }
    }

    /// The response to a head that was refused, and so still stands unread.
    fn refuse(&self, reader: &Reader, refusal: &Response) -> Turn {
        let is_head = reader.unread().starts_with(b"HEAD ");
        let line = format_args!("{} {}: {}", self.c.peer, refusal.status, refusal.reason());
        self.shared.log.line(Log::Debug, line);
        Turn::Respond { parts: refusal.encode(is_head, true), close: true }
    }

    /// A stream's line is written when it closes.
    fn log_request(&self, request: &Request, status: u16) {
        if self.shared.log.wants(Log::Debug) {
            let (peer, path) = (self.c.peer, quoted(&request.path));
            self.shared.log.line(Log::Debug, format_args!("{peer} {:.20} {path} {status}", request.method));
        }
    }

    /// Serves a stream to its end, and returns why it ended.
    #[inline(never)] // a small stack
    fn stream(&self, head: String, source: Source) -> Cow<'static, str> {
        let (c, core) = (&self.c, &*self.shared.core);
        let count = self.shared.places.move_to_streams(c);
        if core.is_stopping() {
            return self.send_away(&head, STOPPING).into();
        }
        let Some(count) = count else {
            let was_cut = c.cut.get(); // since its request was read
            return was_cut.copied().unwrap_or_else(|| self.send_away(&head, NO_ROOM)).into();
        };
        match source {
            Source::Topics(wanted) => {
                match Subscription::open(core, c, &core.lanes[count % core.lanes.len()], wanted) {
                    Some(subscription) => subscription.serve(head).into(),
                    None => self.send_away(&head, NO_NAMES).into(),
                }
            }
            Source::Handler(handled) => handled.serve(core, c, head),
        }
    }

    /// Opens a stream only to say when to come back, and ends it.
    fn send_away(&self, head: &str, why: Reason) -> Reason {
        self.shared.core.counters.sent_away.fetch_add(1, Relaxed);
        self.shared.log.warn(format_args!("{} is sent away: {why}", self.c.peer));
        match self.c.write_whole(head.as_bytes(), Instant::now() + LINGER) {
            Ok(()) => self.c.end(why, spread(self.config().retry, 50, 150), None),
            Err(reason) => reason, // half a head: nothing may follow
        }
    }

    fn log_closing(&self, path: &str) {
        let (open, sent) = (self.opened.elapsed(), enter(&self.c.state).sent);
        let (seconds, tenths) = (open.as_secs(), open.subsec_millis() / 100);
        let (peer, reason) = (self.c.peer, self.c.cut.get().copied().unwrap_or(&self.reason));
        let line =
            format_args!("closed peer={peer} path={path} reason={reason:?} seconds={seconds}.{tenths} events={sent}");
        let repeats = [POLL_IS_OVER, NO_ROOM, NO_NAMES].contains(&reason); // as fast as a flood
        self.shared.log.line(if repeats { Log::Debug } else { Log::Info }, line);
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.c.socket.shutdown(Shutdown::Write); // its lane may hold the socket for a moment longer
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
