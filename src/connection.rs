//! One socket, and whose it is.
//!
//! `phase` says it, under the connection's own lock: a live subscriber's socket is its lane's, one that is behind has a
//! thread, one that is queued waits for a thread and is nobody's. Only the owner writes, or the bytes of two events
//! would mix. Non-blocking mode belongs to the open file and not to a handle, so only the owner sets it, too: a lane
//! whose socket was made blocking by another would wait for one slow reader, and all its others with it. Everyone else
//! may only shut the socket down ([`Connection::cut`]).
//!
//! While a subscriber has no thread, what it follows lies in the state. Whoever takes that out owns the socket and the
//! ending: so each ends exactly once. Why nothing is lost or repeated between two owners is shown in `subscription.rs`.

use crate::encoded::{Run, Shape};
use crate::event::Id;
use crate::outgoing::{Outgoing, Unfinished};
use crate::rights::Pass;
use crate::subscriber::Subscriber;
use crate::sync::{Mutex, enter};
use crossbeam_channel::Sender;
use std::convert::Infallible;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a peer gets for the last bytes of its answer. After a refusal the rest of its request is read for this
/// long, or the reset that closing causes would overtake the answer ([RFC 9112
/// §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
pub const LINGER: Duration = Duration::from_secs(1);
/// One write waits this long; then its owner looks whether it may wait on. The kernel wakes a blocked writer only once
/// a third of the buffer is free, but a new write takes whatever is: so a slow peer is served at least this often. Each
/// time costs: with a quarter of this, the p99 of a thousand slow readers over paced connections was twice as long.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// A subscriber has nothing to say after its request; one that sends more than this is closed.
const STRAY_BYTES: usize = 4 * 1024;
/// Why something about a connection ended, for the log and for a handler. Never text from outside.
pub type Reason = &'static str;
pub const STOPPING: Reason = "the server is stopping";
pub const WITHDRAWN: Reason = "the right of its token has ended";
const CLOSED: Reason = "the peer closed the connection";

/// Shared by whoever serves it, its lane and the table in `places.rs`; the socket closes when the last of them drops
/// it.
pub struct Connection {
    /// Counts connections from the start; a lane's lists are sorted by it.
    pub serial: u64,
    pub peer: SocketAddr,
    pub socket: TcpStream,
    /// A peer that takes nothing for this long is closed.
    stall_time: Duration,
    pub state: Mutex<State>,
    /// Why it was cut, if it was: set before the socket is shut down, so whoever then finds it closed can tell.
    pub cut: OnceLock<Reason>,
}

/// What changes hands with the socket. The lock is held during one non-blocking write at most, never while waiting.
pub struct State {
    pub phase: Phase,
    /// What it follows, while it is live or queued, and after it was closed until its end is noted.
    pub subscriber: Option<Box<Subscriber>>,
    /// How a stream goes out, as its request says. Fixed before the stream begins.
    pub shape: Shape,
    /// Everything up to here has been written whole, or is not for this subscriber. It never goes back.
    pub cursor: Id,
    /// Must go out before anything else is written.
    pub unfinished: Option<Unfinished>,
    /// Why it is to end as soon as a frame has ended, if it is.
    pub ending: Option<Reason>,
    /// What its right to a stream rests on, where that may be withdrawn.
    pub pass: Option<Box<Pass>>,
    /// A poll is not written to by its lane: the first event queues it for a thread, which replays and ends.
    pub is_poll: bool,
    /// When anything was last written: from then on silence counts, for the heartbeat.
    pub wrote: Instant,
    /// How long it has taken nothing, in writes that waited for it.
    pub stalled: Duration,
    /// Events that went out whole, gaps with them: for the log and the end of a poll.
    pub sent: u64,
    /// How many more events it takes, gaps not counted; without a limit, more than there ever are.
    pub wanted: u64,
    /// Bytes that the subscriber has sent after its request, of [`STRAY_BYTES`].
    pub stray: usize,
    /// The peer has ended its sending side: it is not read again.
    pub has_said_all: bool,
    /// Of a handler's stream, while it is open. Dropping it tells the handler that waits for something else.
    pub open: Option<Sender<Infallible>>,
}

/// Who owns the socket.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A thread: it reads requests, replays to a subscriber, or waits for a handler's peer.
    Behind,
    /// Its lane. A handler's stream is live while its handler neither sleeps on the socket nor waits for a write; it is
    /// written to by both, each under the state's lock.
    Live,
    /// Nobody, until a thread takes it.
    Queued,
    /// Nobody writes any more; whoever has what it followed notes its end.
    Closed(Reason),
}

impl Connection {
    pub fn new(serial: u64, peer: SocketAddr, socket: TcpStream, stall_time: Duration) -> Connection {
        let state = State {
            phase: Phase::Behind,
            subscriber: None,
            shape: Shape::USUAL,
            cursor: Id::default(),
            unfinished: None,
            ending: None,
            pass: None,
            is_poll: false,
            wrote: Instant::now(),
            stalled: Duration::ZERO,
            sent: 0,
            wanted: u64::MAX,
            stray: 0,
            has_said_all: false,
            open: None,
        };
        Connection { serial, peer, socket, stall_time, state: Mutex::new(state), cut: OnceLock::new() }
    }

    /// Sets the socket up for requests. Without `nodelay` small events wait for the peer to acknowledge the one before
    /// (RFC 896).
    ///
    /// # Errors
    /// The peer has gone already.
    pub fn prepare(&self) -> io::Result<()> {
        self.socket.set_nodelay(true)?;
        self.socket.set_write_timeout(Some(PATIENCE.min(self.stall_time)))
    }

    /// One non-blocking write of what in `run` is newer than the cursor, and wanted; a stream's head goes out before
    /// it, in the same write. Returns how many events went out whole. Where not all did, the first of the rest is
    /// unfinished, and the subscriber behind. For the owner, with the state locked.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn deliver(&self, state: &mut State, run: &Run, now: Instant) -> Result<u64, Reason> {
        // Leg 5 of the proof in `subscription.rs`: what was replayed and still stood in the queue is skipped.
        let first = run.events.partition_point(|(id, _)| *id <= state.cursor);
        let last = (first as u64).saturating_add(state.wanted).min(run.events.len() as u64) as usize;
        let (start, end) = (run.end_of(first), run.end_of(last));
        let (head, offset) = Unfinished::take_other(&mut state.unfinished).unwrap_or_default();
        let offset = offset + self.write_some(state, &head[offset..], &run.bytes[start..end])?;
        if offset < head.len() {
            state.unfinished = Some(Unfinished { what: Outgoing::Other(head), offset });
            return Ok(0);
        }
        let reached = start + offset - head.len();
        // The cursor moves by whole events only: what was begun is finished from `unfinished`, never replayed.
        let whole = run.events.partition_point(|(_, end)| *end <= reached);
        if whole > first {
            state.cursor = run.events[whole - 1].0;
            state.sent += (whole - first) as u64;
            state.wanted -= (whole - first) as u64;
            state.wrote = now;
        }
        if reached > start {
            state.stalled = Duration::ZERO;
        }
        if whole < last {
            let what = Outgoing::Event(run.event(whole), run.topic(whole).clone());
            state.unfinished = Some(Unfinished { what, offset: reached - run.end_of(whole) });
        }
        Ok((whole - first) as u64)
    }

    /// Writes a heartbeat without waiting, in forms that have one. What does not fit is unfinished.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn beat(&self, state: &mut State, now: Instant) -> Result<(), Reason> {
        state.wrote = now;
        state.shape.heartbeat().map_or(Ok(()), |bytes| self.write_or_leave(state, bytes).map(drop))
    }

    /// Writes what it can without waiting, and leaves the rest unfinished. Returns whether all went out.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn write_or_leave(&self, state: &mut State, bytes: Vec<u8>) -> Result<bool, Reason> {
        let offset = self.write_some(state, &[], &bytes)?;
        if offset < bytes.len() {
            state.unfinished = Some(Unfinished { what: Outgoing::Other(bytes), offset });
        }
        Ok(state.unfinished.is_none())
    }

    /// Looks whether the peer has gone, without waiting. True where that is in doubt, for the first time: it has ended
    /// its sending side, which looks the same whether it still reads or not. Then a heartbeat is written, which a peer
    /// that has gone answers with a reset; so look again soon.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn look(&self, state: &mut State) -> Result<bool, Reason> {
        // A handler's stream may have the rest of a heartbeat, which nobody else goes on with.
        if let Some((bytes, offset)) = Unfinished::take_other(&mut state.unfinished) {
            self.write_or_leave(state, bytes[offset..].to_vec())?;
        }
        if !state.has_said_all {
            let got = self.read_stray()?;
            return self.note_stray(state, got);
        }
        match self.socket.take_error() {
            Ok(None) => Ok(false),
            _ => Err(CLOSED),
        }
    }

    /// One write that does not wait. A peer that had ended its sending side has closed, where it fails.
    fn write_some(&self, state: &State, head: &[u8], bytes: &[u8]) -> Result<usize, Reason> {
        let both = [IoSlice::new(head), IoSlice::new(bytes)];
        let written = match head {
            [] => write_now(&self.socket, bytes),
            _ => try_now(|| (&self.socket).write_vectored(&both)),
        };
        written.map_err(|reason| if state.has_said_all { CLOSED } else { reason })
    }

    /// One read of what a subscriber has no reason to send. None where nothing came.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn read_stray(&self) -> Result<Option<usize>, Reason> {
        match (&self.socket).read(&mut [0; 1024]) {
            Ok(got) => Ok(Some(got)),
            Err(error) if would_block(&error) || error.kind() == ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(reason_of(&error)),
        }
    }

    /// Takes what [`Connection::read_stray`] has found: stray bytes are thrown away, up to a limit. True as for
    /// [`Connection::look`].
    ///
    /// # Errors
    /// The connection is closed.
    pub fn note_stray(&self, state: &mut State, got: Option<usize>) -> Result<bool, Reason> {
        match got {
            None => return Ok(false),
            Some(0) if self.cut.get().is_some() => return Err(CLOSED),
            Some(0) if state.ending == Some(STOPPING) => return Ok(false), // it was this server that ended it
            Some(0) => {
                state.has_said_all = true;
                if state.unfinished.is_none() {
                    self.write_or_leave(state, state.shape.question())?;
                }
                return Ok(true);
            }
            Some(got) => state.stray += got,
        }
        if state.stray > STRAY_BYTES { Err("the peer sent too much after its request") } else { Ok(false) }
    }

    /// Writes what is unfinished, and waits for the peer where it must; each write as long as `patience` says then, and
    /// no more once that is nothing. Returns whether nothing is unfinished any more, and how many events went out
    /// whole.
    ///
    /// # Errors
    /// The peer took nothing for the stall time, closed or reset the connection, or the deadline has passed. The stream
    /// may have ended in the middle of an event, so nothing may follow.
    pub fn finish(&self, deadline: Instant, patience: &dyn Fn() -> Duration) -> Result<(bool, u64), Reason> {
        let mut state = enter(&self.state);
        let Some(Unfinished { what, offset }) = state.unfinished.take() else { return Ok((true, 0)) };
        let (shape, mut stalled) = (state.shape, state.stalled);
        drop(state); // the write may take a while
        let bytes = what.bytes(shape);
        let mut reached = offset + write_now(&self.socket, &bytes[offset..])?;
        if reached > offset {
            stalled = Duration::ZERO;
        }
        if reached < bytes.len() && !patience().is_zero() {
            self.set_nonblocking(false)?;
            reached += self.write_waiting(&bytes[reached..], deadline, &mut stalled, patience)?;
            self.set_nonblocking(true)?;
        }
        let is_whole = reached == bytes.len();
        drop(bytes);
        let mut state = enter(&self.state);
        state.stalled = stalled;
        if reached > offset {
            state.wrote = Instant::now();
        }
        match what {
            what if !is_whole => {
                state.unfinished = Some(Unfinished { what, offset: reached });
                Ok((false, 0))
            }
            Outgoing::Event(event, _) => {
                state.cursor = event.id;
                state.sent += 1;
                state.wanted -= 1;
                Ok((true, 1))
            }
            Outgoing::Gap(gap) => {
                state.cursor = gap.id;
                state.sent += 1;
                Ok((true, 1))
            }
            Outgoing::Other(_) => Ok((true, 0)),
        }
    }

    /// Writes all of `bytes` to a socket in non-blocking mode, waiting for the peer, and leaves it in that mode.
    ///
    /// # Errors
    /// As for [`Connection::finish`].
    fn write_stream(&self, bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        let reached = write_now(&self.socket, bytes)?;
        if reached < bytes.len() {
            self.set_nonblocking(false)?;
            self.write_whole(&bytes[reached..], deadline)?;
            self.set_nonblocking(true)?;
        }
        Ok(())
    }

    pub fn set_nonblocking(&self, mode: bool) -> Result<(), Reason> {
        self.socket.set_nonblocking(mode).map_err(|error| reason_of(&error))
    }

    /// Writes all of `bytes` to a socket in blocking mode. No lock may be held.
    ///
    /// # Errors
    /// As for [`Connection::finish`].
    pub fn write_whole(&self, bytes: &[u8], deadline: Instant) -> Result<(), Reason> {
        self.write_waiting(bytes, deadline, &mut Duration::default(), &|| PATIENCE).map(drop)
    }

    /// Writes for as long as the peer takes something in each stall time, until all is out or `patience` is nothing,
    /// since others need the thread. The deadline bounds a peer that takes a byte now and then. Returns how much went
    /// out.
    fn write_waiting(
        &self,
        bytes: &[u8],
        deadline: Instant,
        stalled: &mut Duration,
        patience: &dyn Fn() -> Duration,
    ) -> Result<usize, Reason> {
        let (mut written, longest) = (0, PATIENCE.min(self.stall_time));
        let mut timeout = longest; // of the socket: to set it is a call to the system
        let mut set_timeout = |time| {
            let set = if time == timeout { Ok(()) } else { self.socket.set_write_timeout(Some(time)) };
            timeout = time;
            set.map_err(|error| reason_of(&error))
        };
        while written < bytes.len() {
            let (began, patience) = (Instant::now(), patience());
            let left = deadline.saturating_duration_since(began);
            if left.is_zero() {
                return Err("the time is over, in the middle of a write");
            } else if patience.is_zero() {
                break;
            }
            set_timeout(longest.min(left).min(patience).max(Duration::from_millis(1)))?; // 0 would be none
            match (&self.socket).write(&bytes[written..]) {
                Ok(count) => {
                    written += count;
                    *stalled = Duration::ZERO;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => *stalled += began.elapsed(),
                Err(error) => return Err(reason_of(&error)),
            }
            if *stalled >= self.stall_time {
                // Once more without waiting: in the last wait it may have taken less than wakes a writer.
                self.set_nonblocking(true)?;
                let last = write_now(&self.socket, &bytes[written..])?;
                self.set_nonblocking(false)?;
                if last == 0 {
                    return Err("the peer took nothing in the stall time");
                }
                written += last;
                *stalled = Duration::ZERO;
            }
        }
        set_timeout(longest)?;
        Ok(written)
    }

    /// The end of a stream that the server decides on; only for its owner, after a whole frame. Whether the peer takes
    /// it makes no difference to us.
    pub fn end(&self, why: Reason, retry: Duration, id: Option<Id>) -> Reason {
        let shape = enter(&self.state).shape;
        let _ = self.write_stream(&shape.end(why, retry, id), Instant::now() + LINGER);
        why
    }

    /// The same without waiting, for a lane.
    pub fn end_now(&self, state: &State, why: Reason, retry: Duration, id: Option<Id>) {
        let _ = write_now(&self.socket, &state.shape.end(why, retry, id));
    }

    /// The end of a stream without a comment or a reconnection time: the handler has said what it had to say.
    pub fn end_silently(&self) {
        let framing = enter(&self.state).shape.framing;
        let _ = self.write_stream(framing.end(), Instant::now() + LINGER);
    }

    /// Shuts the socket down, from any thread. Whoever waits for it wakes as if the peer had gone, so the true reason
    /// is kept here; the first one counts.
    pub fn cut(&self, why: Reason) {
        let _ = self.cut.set(why);
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// One write that does not wait; 0 if the socket is full. The socket must be in non-blocking mode.
fn write_now(mut socket: &TcpStream, bytes: &[u8]) -> Result<usize, Reason> {
    try_now(|| socket.write(bytes))
}

/// The same for any write.
fn try_now(mut write: impl FnMut() -> io::Result<usize>) -> Result<usize, Reason> {
    loop {
        match write() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if would_block(&error) => return Ok(0),
            written => return written.map_err(|error| reason_of(&error)),
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
