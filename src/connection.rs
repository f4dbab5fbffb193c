//! One socket, and whose it is.
//!
//! `phase` says it, under the connection's own lock: while a subscriber is live the socket is the lane's, else its
//! thread's. Non-blocking mode belongs to the open file, not to a handle, so only the owner sets it; everyone else may
//! only shut the socket down. Why nothing is lost or repeated between the two owners is said in `subscription.rs`.

use crate::encoded::{Encoded, Run};
use crate::event::Id;
use crate::sync::enter;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// After a refusal the rest of a request is read for this long, or the reset would overtake the answer
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
pub const LINGER: Duration = Duration::from_secs(1);
/// A connection that asks again as soon as it is answered is waited for awake, for this long: to put its thread to sleep and
/// wake it on another core takes longer than to answer. One publisher gets 2.8 times as many answers.
pub const AWAKE_TIME: Duration = Duration::from_micros(50);
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
pub const STRAY_BYTES: usize = 4 * 1024;
/// The line that keeps a silent stream open. No blank line after it: some clients take every blank line for an event.
pub const HEARTBEAT: &[u8] = b":\n";
/// Why something about a connection ended, for the log and for a handler.
pub type Reason = &'static str;
pub const STOPPING: Reason = "the server is stopping";

pub struct Connection {
    pub serial: u64,
    pub peer: SocketAddr,
    pub socket: TcpStream,
    pub state: Mutex<State>,
    pub wake: Condvar,
    /// Why it was cut, if it was.
    pub cut: OnceLock<Reason>,
}

pub struct State {
    pub phase: Phase,
    /// Everything up to here has been written, or is not for this subscriber.
    pub cursor: Id,
    pub unfinished: Option<Unfinished>,
    /// A poll is not written to by its lane: the first event wakes its thread, which replays and ends.
    pub is_poll: bool,
    pub wrote: Instant,
    pub sent: u64,
    pub stray: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The socket is the thread's: also before there is a stream, and for handlers' streams.
    Behind,
    /// The socket is the lane's.
    Live,
    Closed(Reason),
}

/// An event that did not fit into the socket. It must be finished before anything else is written.
pub struct Unfinished {
    pub event: Encoded,
    pub offset: usize,
}

impl State {
    /// For the thread to finish, since the subscriber is behind from here on.
    pub fn fall_behind(&mut self, event: Encoded, offset: usize) {
        self.phase = Phase::Behind;
        self.unfinished = Some(Unfinished { event, offset });
    }
}

impl Connection {
    pub fn new(serial: u64, peer: SocketAddr, socket: TcpStream) -> Connection {
        let (phase, cursor, wrote) = (Phase::Behind, Id::default(), Instant::now());
        let state = State { phase, cursor, unfinished: None, is_poll: false, wrote, sent: 0, stray: 0 };
        Connection { serial, peer, socket, state: Mutex::new(state), wake: Condvar::new(), cut: OnceLock::new() }
    }

    /// One non-blocking write of what in `run` is newer than the cursor. Returns how many events went out whole; where
    /// not all did, the subscriber is behind, and the first of the others unfinished.
    pub fn deliver(&self, state: &mut State, run: &Run, now: Instant) -> u64 {
        let first = run.events.partition_point(|(event, _)| event.id <= state.cursor);
        let start = run.end_of(first);
        let reached = match write_now(&self.socket, &run.bytes[start..]) {
            Ok(written) => start + written,
            Err(error) => {
                state.phase = Phase::Closed(reason_of(&error));
                return 0;
            }
        };
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

    pub fn beat(&self, state: &mut State, now: Instant) {
        state.wrote = now;
        match write_now(&self.socket, HEARTBEAT) {
            Ok(written) if written == HEARTBEAT.len() => {}
            Ok(offset) => state.fall_behind(Encoded::new(state.cursor, HEARTBEAT), offset),
            Err(error) => state.phase = Phase::Closed(reason_of(&error)),
        }
    }

    /// One read, which says why the connection is closed, if it is. A subscriber has nothing to say, so stray bytes are
    /// thrown away.
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

    /// Waits for the next request without sleeping, but not for long. Whoever else is due on this core goes first.
    pub fn stay_awake(&self) -> io::Result<()> {
        let until = Instant::now() + AWAKE_TIME;
        self.socket.set_nonblocking(true)?;
        while self.socket.peek(&mut [0]).is_err_and(|error| would_block(&error)) && Instant::now() < until {
            thread::yield_now();
        }
        self.socket.set_nonblocking(false)
    }

    /// Finishes what stands unfinished with blocking writes: the one place where a subscriber is waited for. Returns how
    /// many events went out whole.
    pub fn finish(&self, deadline: Instant) -> Result<u64, Reason> {
        let Some(Unfinished { event, offset }) = enter(&self.state).unfinished.take() else { return Ok(0) };
        self.write_waiting(&event.frame()[offset..], deadline)?;
        let mut state = enter(&self.state);
        state.wrote = Instant::now();
        if event.id <= state.cursor {
            return Ok(0); // a heartbeat
        }
        state.cursor = event.id;
        state.sent += 1;
        Ok(1)
    }

    /// Writes all of `bytes`, waiting for the peer, and leaves the socket in non-blocking mode, as lanes need it.
    pub fn write_waiting(&self, bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        self.set_nonblocking(false)?;
        self.write_whole(bytes, deadline)?;
        self.set_nonblocking(true)
    }

    pub fn set_nonblocking(&self, mode: bool) -> Result<(), Reason> {
        self.socket.set_nonblocking(mode).map_err(|error| reason_of(&error))
    }

    /// Writes all of `bytes` to a socket in blocking mode, as long as the peer takes something in each stall time.
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

    /// The end of a stream that the server decides on. The peer reads why, and when to come back; and after which id, if
    /// that is not the last that it was told.
    pub fn end(&self, why: Reason, retry: Duration, id: Option<Id>) -> Reason {
        let id = id.map_or(String::new(), |id| format!("id: {id}\n"));
        let bytes = format!(": {why}\nretry: {}\n{id}\n", retry.as_millis());
        let _ = self.write_waiting(bytes.as_bytes(), Instant::now() + LINGER);
        why
    }

    /// Shuts the socket down, whoever waits for it: to them it looks as if the peer had gone, so the reason is kept here.
    pub fn cut(&self, why: Reason) {
        let _ = self.cut.set(why);
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Takes the socket from the lane and wakes the thread, if the subscriber is live.
    pub fn take_back(&self) {
        let mut state = enter(&self.state);
        if state.phase == Phase::Live {
            state.phase = Phase::Behind;
            self.wake.notify_one();
        }
    }
}

/// One write that does not wait; 0 if the socket is full.
pub fn write_now(mut socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if would_block(&error) => return Ok(0),
            written => return written,
        }
    }
}

/// What a read or write says that would have to wait, or has waited for its timeout.
pub fn would_block(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock // `TimedOut` is the kernel giving up on the peer
}

pub fn reason_of(error: &io::Error) -> Reason {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
            "the peer reset the connection"
        }
        ErrorKind::TimedOut => "the peer stopped answering",
        _ => "the socket failed",
    }
}
