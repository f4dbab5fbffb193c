//! The lines of a body that is still arriving.
//!
//! `tail -F app.log | curl -T -` sends one request for days: each line must be published as it comes, and neither the
//! lines nor the silence between them may take memory or time without a bound. A line once begun must end in time.
//! Between lines silence may last for hours, as it does overnight; but a publisher that has vanished without a packet
//! is silent, too, so it ends at last.

use crate::body::Body;
use crate::config::Config;
use crate::event::Event;
use crate::reader::Reader;
use crate::response::{Response, refuse};
use std::time::Duration;

/// Most lines that are published together. An empty line is one byte of the request but hundreds as an event: 4 KiB of
/// newlines from each of many connections would take much memory at the same time.
const LINES_AT_ONCE: usize = 128;

/// Reads the body for as long as it lasts; nobody else may use the reader meanwhile.
pub struct Lines<'a, 'b> {
    reader: &'a mut Reader<'b>,
    body: &'a mut Body,
    line_limit: usize,
    /// For a line from its first byte to its end.
    line_time: Duration,
    /// For the silence between two lines.
    idle_time: Duration,
    /// What has been read of the body and is not dropped: the rest of one read, and the line that has begun.
    text: Vec<u8>,
    /// Where the next line begins in `text`.
    start: usize,
    /// Which time is running: that of a line that has begun, or that of the silence before it.
    has_begun: bool,
    /// How many lines have been taken, to name the one that is wrong.
    count: usize,
}

impl<'a, 'b> Lines<'a, 'b> {
    /// The lines of a body of which nothing has been read.
    pub fn new(reader: &'a mut Reader<'b>, body: &'a mut Body, config: &Config) -> Lines<'a, 'b> {
        Lines {
            reader,
            body,
            line_limit: config.line_bytes,
            line_time: config.body_time,
            idle_time: config.put_idle_time,
            text: Vec::new(),
            start: 0,
            has_begun: false,
            count: 0,
        }
    }

    /// Waits for a line, and takes those that came with it, too: they are published together, with one write of the
    /// journal. Each becomes an event as `like` is, with the line for its data. False with the last ones.
    ///
    /// # Errors
    /// 400, 408 or 413. What is in `events` by then came before the fault, and is to be published.
    pub fn take_some(&mut self, like: &Event, events: &mut Vec<Event>) -> Result<bool, Response> {
        while let Some(line) = self.next()? {
            self.count += 1;
            match String::from_utf8(line) {
                Ok(data) => events.push(Event { data, ..like.clone() }),
                Err(_) => return refuse(400, format!("line {} is not UTF-8", self.count)),
            }
            if events.len() == LINES_AT_ONCE || !self.text[self.start..].contains(&b'\n') {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for the next line. The last one may lack its LF, but only where the body ends whole: of a body that was
    /// cut off, half a line must not be published.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, Response> {
        let mut searched = self.start; // what was searched for a line's end is not searched again
        loop {
            let lf = self.text[searched..].iter().position(|b| *b == b'\n').map(|at| searched + at);
            self.check_length(lf.unwrap_or(self.text.len()))?;
            if let Some(lf) = lf {
                return Ok(Some(self.take_line(lf, lf + 1)));
            }
            self.drop_taken();
            searched = self.text.len();
            let (read, is_silent) = (self.body.read(self.reader, &mut self.text), !self.has_begun);
            if !read.map_err(|refusal| silence_is_over(refusal, is_silent, self.idle_time))? {
                let end = self.text.len();
                return Ok(if end > 0 { Some(self.take_line(end, end)) } else { None });
            }
        }
    }

    /// The line up to `end`, without the CR that may stand there, also where its LF never came.
    fn take_line(&mut self, end: usize, next: usize) -> Vec<u8> {
        let line = &self.text[self.start..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
        self.start = next;
        line
    }

    /// Refuses a line as soon as it is too long, not only when it ends. Its CR does not count.
    fn check_length(&self, end: usize) -> Result<(), Response> {
        let has_cr = self.text[..end].ends_with(b"\r");
        if end - self.start > self.line_limit.saturating_add(has_cr.into()) {
            return refuse(413, format!("a line is longer than {} bytes (line_bytes)", self.line_limit));
        }
        Ok(())
    }

    /// Leaves in `text` only the line that has begun, and sets the time for the read that follows. The time of a line
    /// runs from when its beginning was first seen; more bytes of it do not extend it.
    fn drop_taken(&mut self) {
        self.has_begun &= self.start == 0;
        self.text.drain(..self.start);
        self.start = 0;
        if self.text.is_empty() {
            self.reader.wait_at_most(self.idle_time);
        } else if !self.has_begun {
            self.reader.wait_at_most(self.line_time);
        }
        self.has_begun = !self.text.is_empty();
    }
}

/// Names the limit where the time that was over is that of the silence between two lines or events.
pub fn silence_is_over(refusal: Response, is_silent: bool, idle_time: Duration) -> Response {
    match refusal.status {
        408 if is_silent => {
            let reason = format!("nothing came within {idle_time:?} (put_idle_time)");
            Response { close: true, ..Response::text(408, reason) }
        }
        _ => refusal,
    }
}
