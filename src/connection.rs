//! One socket, and whose it is.
//!
//! `phase` says it, under the connection's own lock: while a subscriber is live the socket is the lane's, else its
//! thread's. Only the owner writes, or the bytes of two events would mix. Non-blocking mode belongs to the open file
//! and not to a handle, so only the owner sets it, too: a lane whose socket was made blocking by another would wait for
//! one slow reader, and all its others with it. Everyone else may only shut the socket down ([`Connection::cut`]), or
//! take it back from the lane for its thread ([`Connection::take_back`]). Why nothing is lost or repeated between the
//! two owners is shown in `subscription.rs`.

use crate::encoded::{Encoded, Framing, Run};
use crate::event::Id;
use crate::sync::enter;
use crossbeam_channel::Sender;
use std::convert::Infallible;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// How long a peer gets for the last bytes of its answer. After a refusal the rest of its request is read for this
/// long, or the reset that closing causes would overtake the answer ([RFC 9112
/// §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
pub const LINGER: Duration = Duration::from_secs(1);
/// A client that sends its next request as soon as it has its answer is waited for without sleeping, for this long: to
/// put the thread to sleep and to wake it on another core takes longer than to answer. One publisher gets 2.8 times as
/// many answers.
pub const AWAKE_TIME: Duration = Duration::from_micros(50);
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
const STRAY_BYTES: usize = 4 * 1024;
/// The comment that keeps a silent stream open. No blank line follows it: some clients take every blank line for an
/// event. <https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes>
const HEARTBEAT: &[u8] = b":\n";
/// Why something about a connection ended, for the log and for a handler. Never text from outside.
pub type Reason = &'static str;
pub const STOPPING: Reason = "the server is stopping";

/// Shared by its thread, its lane and the table in `places.rs`; the socket closes when the last of them drops it.
pub struct Connection {
    /// Counts connections from the start; a lane's lists are sorted by it.
    pub serial: u64,
    pub peer: SocketAddr,
    pub socket: TcpStream,
    pub state: Mutex<State>,
    /// The subscriber's thread sleeps here while its lane has the socket.
    pub wake: Condvar,
    /// Why it was cut, if it was: set before the socket is shut down, so whoever then finds it closed can tell.
    pub cut: OnceLock<Reason>,
}

/// What changes hands with the socket. The lock is held during one non-blocking write at most, never while waiting.
pub struct State {
    pub phase: Phase,
    /// How a stream goes out, which the version of HTTP in its request says. Fixed before the stream begins.
    pub framing: Framing,
    /// Everything up to here has been written whole, or is not for this subscriber. It never goes back.
    pub cursor: Id,
    /// Only while the subscriber is behind; its thread finishes it before it replays.
    pub unfinished: Option<Unfinished>,
    /// A poll is not written to by its lane: the first event wakes its thread, which replays and ends.
    pub is_poll: bool,
    /// When anything was last written: from then on silence counts, for the heartbeat.
    pub wrote: Instant,
    /// Events that went out whole, gaps with them: for the log and the end of a poll.
    pub sent: u64,
    /// Bytes that the subscriber has sent after its request, of [`STRAY_BYTES`].
    pub stray: usize,
    /// Of a handler's stream: while this is here, the stream is open. Dropping it tells the handler that waits for
    /// something else.
    pub open: Option<Sender<Infallible>>,
}

/// Who owns the socket. Its thread turns a subscriber live; the lane, the thread or stopping takes it back; once
/// closed, it stays so.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The socket is the thread's: also before there is a stream, and for handlers' streams.
    Behind,
    /// The socket is the lane's.
    Live,
    /// Nobody writes any more; its thread logs the reason and ends.
    Closed(Reason),
}

/// An event of which only a part fitted into the socket. The rest must go out before anything else is written, or the
/// reader would see two events mixed.
pub struct Unfinished {
    pub event: Encoded,
    pub offset: usize,
}

impl State {
    /// Leaves an event for the thread to finish: from here on the subscriber is behind, and whoever calls this from a
    /// lane must wake the thread. An `offset` of 0 is a whole event.
    pub fn fall_behind(&mut self, event: Encoded, offset: usize) {
        self.phase = Phase::Behind;
        self.unfinished = Some(Unfinished { event, offset });
    }

    /// The end, for whoever finds that the connection is over.
    pub fn close(&mut self, reason: Reason) {
        self.phase = Phase::Closed(reason);
        self.open = None;
    }
}

impl Connection {
    pub fn new(serial: u64, peer: SocketAddr, socket: TcpStream) -> Connection {
        let (phase, framing, cursor) = (Phase::Behind, Framing::Chunked, Id::default());
        let wrote = Instant::now();
        let state =
            State { phase, framing, cursor, unfinished: None, is_poll: false, wrote, sent: 0, stray: 0, open: None };
        Connection { serial, peer, socket, state: Mutex::new(state), wake: Condvar::new(), cut: OnceLock::new() }
    }

    /// One non-blocking write of what in `run` is newer than the cursor. Returns how many events went out whole. Where
    /// not all did, the subscriber is behind, and the first of the rest is unfinished. Only for the owner, with the
    /// state locked throughout.
    pub fn deliver(&self, state: &mut State, run: &Run, now: Instant) -> u64 {
        // Leg 5 of the proof in `subscription.rs`: what was replayed and still stood in the queue is skipped.
        let first = run.events.partition_point(|(event, _)| event.id <= state.cursor);
        let start = run.end_of(first);
        let reached = match write_now(&self.socket, &run.bytes[start..]) {
            Ok(written) => start + written,
            Err(error) => {
                state.phase = Phase::Closed(reason_of(&error));
                return 0;
            }
        };
        // The cursor moves by whole events only: what was begun is finished from `unfinished`, never replayed.
        let whole = run.events.partition_point(|(_, end)| *end <= reached);
        if whole > first {
            state.cursor = run.events[whole - 1].0.id;
            state.sent += (whole - first) as u64;
            state.wrote = now;
        }
        if let Some((event, _)) = run.events.get(whole) {
            state.fall_behind(event.clone(), reached - run.end_of(whole));
        }
        (whole - first) as u64
    }

    /// Writes a heartbeat, without waiting; for the lane. Where it does not fit, the subscriber is behind, with the
    /// rest of it unfinished.
    pub fn beat(&self, state: &mut State, now: Instant) {
        state.wrote = now;
        // With the cursor for an id, so that `finish` can tell it from an event.
        let heartbeat = Encoded::new(state.cursor, b"", HEARTBEAT);
        let bytes = heartbeat.bytes(state.framing);
        match write_now(&self.socket, bytes) {
            Ok(written) if written == bytes.len() => {}
            Ok(offset) => state.fall_behind(heartbeat, offset),
            Err(error) => state.phase = Phase::Closed(reason_of(&error)),
        }
    }

    /// One read, which says why the connection is closed, if it is. A subscriber has nothing to say, so what it sends
    /// is thrown away, up to a limit. A peer that shuts down only its sending side looks closed, too.
    pub fn look(&self, stray: &mut usize) -> Option<Reason> {
        match (&self.socket).read(&mut [0; 1024]) {
            Ok(0) => Some("the peer closed the connection"),
            Ok(got) => {
                *stray += got;
                (*stray > STRAY_BYTES).then_some("the peer sent too much after its request")
            }
            Err(error) if would_block(&error) || error.kind() == ErrorKind::Interrupted => None,
            Err(error) => Some(reason_of(&error)),
        }
    }

    /// Waits for the next request without sleeping, but not for long; other threads that are due on this core go first.
    pub fn stay_awake(&self) -> io::Result<()> {
        let until = Instant::now() + AWAKE_TIME;
        self.socket.set_nonblocking(true)?;
        while self.socket.peek(&mut [0]).is_err_and(|error| would_block(&error)) && Instant::now() < until {
            thread::yield_now();
        }
        self.socket.set_nonblocking(false)
    }

    /// Finishes the unfinished event with writes that wait for the peer. Returns how
    /// many events went out whole.
    ///
    /// # Errors
    /// The peer took nothing for the stall time, closed or reset the connection, or the deadline has passed. The stream
    /// may have ended in the middle of an event, so nothing may follow.
    pub fn finish(&self, deadline: Instant) -> Result<u64, Reason> {
        let mut state = enter(&self.state);
        let Some(Unfinished { event, offset }) = state.unfinished.take() else { return Ok(0) };
        let framing = state.framing;
        drop(state);
        self.write_waiting(&event.bytes(framing)[offset..], deadline)?; // without the lock: it may take the stall time
        let mut state = enter(&self.state);
        state.wrote = Instant::now();
        if event.id <= state.cursor {
            return Ok(0); // a heartbeat
        }
        state.cursor = event.id;
        state.sent += 1;
        Ok(1)
    }

    /// Writes all of `bytes`, waiting for the peer, and leaves the socket in non-blocking mode, as a lane needs it. For
    /// streams; everything else uses [`Connection::write_whole`], since its reads wait, too.
    pub fn write_waiting(&self, bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        self.set_nonblocking(false)?;
        self.write_whole(bytes, deadline)?;
        self.set_nonblocking(true)
    }

    fn set_nonblocking(&self, mode: bool) -> Result<(), Reason> {
        self.socket.set_nonblocking(mode).map_err(|error| reason_of(&error))
    }

    /// Writes all of `bytes` to a socket in blocking mode, for as long as the peer takes something in each stall time,
    /// which is the socket's write timeout. The deadline bounds a peer that takes a byte now and then. No lock may be
    /// held.
    ///
    /// # Errors
    /// As for [`Connection::finish`].
    pub fn write_whole(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let mut written = (&self.socket).write(bytes);
            if written.as_ref().is_err_and(would_block) {
                // The time has passed, but the peer may have taken something: the kernel wakes a blocked writer only
                // once a third of its buffer is free. So try once more without waiting.
                self.set_nonblocking(true)?;
                written = (&self.socket).write(bytes);
                self.set_nonblocking(false)?;
            }
            match written {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Err("the peer took nothing in the stall time"),
                Err(error) => return Err(reason_of(&error)),
            }
            if !bytes.is_empty() && Instant::now() >= deadline {
                return Err("the time is over, in the middle of a write");
            }
        }
        Ok(())
    }

    /// The end of a stream that the server decides on; only after a whole frame. The peer reads why, when to come back,
    /// and after which id, if that is not the last one it has been sent. Whether it takes that makes no difference to
    /// us.
    pub fn end(&self, why: Reason, retry: Duration, id: Option<Id>) -> Reason {
        let id = id.map_or(String::new(), |id| format!("id: {id}\n"));
        let block = format!(": {why}\nretry: {}\n{id}\n", retry.as_millis());
        let framing = enter(&self.state).framing;
        let bytes = [&framing.wrap(block.as_bytes()), framing.end()].concat();
        let _ = self.write_waiting(&bytes, Instant::now() + LINGER);
        why
    }

    /// The end of a stream without a comment or a reconnection time: the handler has said what it had to say.
    pub fn end_silently(&self) {
        let framing = enter(&self.state).framing;
        let _ = self.write_waiting(framing.end(), Instant::now() + LINGER);
    }

    /// Shuts the socket down, from any thread. Whoever waits for it wakes as if the peer had gone, so the true reason
    /// is kept here; the first one counts.
    pub fn cut(&self, why: Reason) {
        let _ = self.cut.set(why);
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Takes the socket from the lane and wakes the thread, if the subscriber is live; tells a handler that its stream
    /// is over. Stopping does so, to let each end in order.
    pub fn take_back(&self) {
        let mut state = enter(&self.state);
        state.open = None;
        if state.phase == Phase::Live {
            state.phase = Phase::Behind;
            self.wake.notify_one();
        }
    }
}

/// One write that does not wait; 0 if the socket is full. The socket must be in non-blocking mode.
fn write_now(mut socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if would_block(&error) => return Ok(0),
            written => return written,
        }
    }
}

/// Whether a read or write would have to wait, or has waited for its whole timeout: the kernel reports both alike.
pub fn would_block(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock // `TimedOut` is the kernel giving up on a silent peer
}

/// In our own words, which do not differ from system to system, so that logs can be searched for them.
fn reason_of(error: &io::Error) -> Reason {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
            "the peer reset the connection"
        }
        ErrorKind::TimedOut => "the peer stopped answering",
        _ => "the socket failed",
    }
}
