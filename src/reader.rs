//! What came on a connection and is not used yet. Pipelined requests wait here for their turn.
//!
//! Every wait has an end: whoever reads sets a deadline first, and each read waits for what is left of it. So a peer
//! that sends a byte now and then holds its thread no longer than one that sends nothing. The buffer holds what its
//! user still needs (the head or the line so far) and one read more.

use crate::connection::{Connection, LINGER, would_block};
use crate::response::{Response, refuse};
use std::borrow::Cow;
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

/// A client that sends its next request as soon as it has its answer is waited for without sleeping, for this long: to
/// put the thread to sleep and to wake it on another core takes longer than to answer. One publisher gets 2.8 times as
/// many answers.
pub const AWAKE_TIME: Duration = Duration::from_micros(50);
/// What one read takes at most: most requests come in one.
const READ_BYTES: usize = 4096;
/// The same for a read that is known to be of a body: a large one comes in few.
const BODY_READ_BYTES: usize = 16 * 1024;
/// Longest line of the chunked coding: a size with its extensions, or a trailer field. Nobody needs more, and lines
/// that are thrown away must not be a way to send without end.
const CHUNK_LINE_BYTES: usize = 256;

/// Belongs to the connection's thread, for as long as that reads requests.
pub struct Reader<'a> {
    pub c: &'a Connection,
    buffer: Vec<u8>,
    /// `buffer[..start]` has been used; the next read removes it.
    start: usize,
    /// Until when the next read waits.
    deadline: Instant,
    /// The read timeout that the socket was last given, if any: setting it is a call to the system.
    timeout: Option<Duration>,
}

impl<'a> Reader<'a> {
    /// Reads wait for nothing until [`Reader::wait_at_most`] says how long they may.
    pub fn new(c: &'a Connection) -> Reader<'a> {
        Reader { c, buffer: Vec::new(), start: 0, deadline: Instant::now(), timeout: None }
    }

    /// The same, with something that has come already.
    #[cfg(fuzzing)]
    pub fn with(c: &'a Connection, bytes: &[u8]) -> Reader<'a> {
        Reader { buffer: bytes.to_vec(), ..Reader::new(c) }
    }

    /// What has come and is not used yet.
    pub fn unread(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// Takes the first `count` bytes of [`Reader::unread`] as used.
    pub fn use_up(&mut self, count: usize) {
        self.start += count;
    }

    /// Gives up the memory of what has been used, before something that may take long.
    pub fn give_up_memory(&mut self) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.shrink_to_fit();
    }

    /// From now on, reads wait until this time is over, all of them together.
    pub fn wait_at_most(&mut self, time: Duration) {
        self.deadline = Instant::now() + time;
    }

    /// Waits for the next request without sleeping, but not for long; other threads that are due on this core go first.
    pub fn stay_awake(&self) -> io::Result<()> {
        let until = Instant::now() + AWAKE_TIME;
        self.c.socket.set_nonblocking(true)?;
        while self.c.socket.peek(&mut [0]).is_err_and(|error| would_block(&error)) && Instant::now() < until {
            thread::yield_now();
        }
        self.c.socket.set_nonblocking(false)
    }

    /// One read into the buffer, which waits until the deadline; it returns how many bytes came, and 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` where the deadline has passed; what the system says otherwise.
    pub fn fill(&mut self) -> io::Result<usize> {
        // Only when more is read: a burst of pipelined requests is not moved for each of them.
        self.buffer.drain(..self.start);
        self.start = 0;
        let mut buffer = mem::take(&mut self.buffer);
        let read = self.read(&mut buffer, READ_BYTES);
        self.buffer = buffer;
        read
    }

    /// The same, which appends at most `most` bytes to `out`.
    fn read(&mut self, out: &mut Vec<u8>, most: usize) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::WouldBlock.into());
        }
        // In whole milliseconds, so that requests one after another have the same timeout, which is set once.
        let timeout = Some(Duration::from_millis(left.as_millis() as u64 + 1));
        if self.timeout != timeout {
            self.c.socket.set_read_timeout(timeout)?;
            self.timeout = timeout;
        }
        let old = out.len();
        out.resize(old + most, 0);
        let read = loop {
            match (&self.c.socket).read(&mut out[old..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        out.truncate(old + read.as_ref().unwrap_or(&0));
        read
    }

    /// Appends what comes of a body to `out`, without a copy in the buffer; nothing may be unread. `left` is how much
    /// of it may come. Returns how many bytes came.
    pub fn read_body(&mut self, out: &mut Vec<u8>, left: u64) -> Result<usize, Response> {
        let most = usize::try_from(left).map_or(BODY_READ_BYTES, |left| left.min(BODY_READ_BYTES));
        let read = self.read(out, most);
        Reader::in_body(read)
    }

    /// One read into the buffer, in the middle of a body.
    fn fill_body(&mut self) -> Result<(), Response> {
        let read = self.fill();
        Reader::in_body(read).map(drop)
    }

    /// In the middle of a body the end is an error, too: 400, or 408 when it took too long.
    fn in_body(read: io::Result<usize>) -> Result<usize, Response> {
        match read {
            Ok(0) => refuse(400, "the connection ended before the body did"),
            Ok(read) => Ok(read),
            Err(error) if would_block(&error) => refuse(408, "the body took too long"),
            Err(error) => refuse(400, format!("the body could not be read: {error}")),
        }
    }

    /// A line of the chunked coding, without the CRLF that ends it. A lone LF or CR, or another control character, is
    /// refused: some readers end the line there, and others do not (RFC 9112 §2.2).
    pub fn chunk_line(&mut self) -> Result<String, Response> {
        let mut seen = 0;
        loop {
            let lf = self.unread()[seen..].iter().position(|b| *b == b'\n');
            if lf.map_or(self.unread().len(), |lf| seen + lf) > CHUNK_LINE_BYTES {
                return refuse(400, format!("a chunk's line is longer than {CHUNK_LINE_BYTES} bytes"));
            }
            if let Some(lf) = lf {
                let line = self.unread()[..seen + lf].strip_suffix(b"\r").map(String::from_utf8_lossy);
                let line = line.filter(|line| !line.contains(|c: char| c.is_ascii_control() && c != '\t'));
                let line = line.map(Cow::into_owned);
                self.use_up(seen + lf + 1);
                return line.map_or_else(|| refuse(400, "a line of the chunked coding does not end with CRLF"), Ok);
            }
            seen = self.unread().len();
            self.fill_body()?;
        }
    }

    /// Ends our side and reads on for a while after the last response. A socket that is closed with unread bytes resets
    /// the connection, and the reset may overtake the response on its way (RFC 9112 §9.6).
    pub fn linger(&mut self) {
        let _ = self.c.socket.shutdown(Shutdown::Write);
        self.wait_at_most(LINGER);
        while self.fill().is_ok_and(|got| got > 0) {
            self.start = self.buffer.len();
        }
    }
}
