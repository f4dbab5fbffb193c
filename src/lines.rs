//! The lines of a body that is still arriving.
//!
//! A line once begun must end in time. Between lines silence is fine, for hours: but a publisher that has vanished without a
//! packet says nothing either, so it ends at last.

use crate::body::Body;
use crate::config::Config;
use crate::reader::Reader;
use crate::response::{Response, refuse};
use std::time::Duration;

/// Lines that are published together. An empty line is one byte of the request but hundreds as an event, so 4 KiB of
/// newlines from each of many connections would take much memory at the same time.
const LINES_AT_ONCE: usize = 128;

pub struct Lines<'a, 'b> {
    reader: &'a mut Reader<'b>,
    body: &'a mut Body,
    line_limit: usize,
    line_time: Duration,
    idle_time: Duration,
    text: Vec<u8>,
    /// Where the line that is looked for begins in `text`.
    start: usize,
    /// The time of a line that has begun is running; else that of the silence before it.
    has_begun: bool,
    /// How many lines have been taken.
    count: usize,
}

impl<'a, 'b> Lines<'a, 'b> {
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
    /// journal, before anyone waits for more. False with the last ones. What was taken before an error counts.
    pub fn take_some(&mut self, texts: &mut Vec<String>) -> Result<bool, Response> {
        while let Some(line) = self.next()? {
            self.count += 1;
            match String::from_utf8(line) {
                Ok(text) => texts.push(text),
                Err(_) => return refuse(400, format!("line {} is not UTF-8", self.count)),
            }
            if texts.len() == LINES_AT_ONCE || !self.text[self.start..].contains(&b'\n') {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for the next line. The last one may lack its LF, if the body ends whole.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, Response> {
        let mut searched = self.start;
        loop {
            let lf = self.text[searched..].iter().position(|b| *b == b'\n').map(|at| searched + at);
            self.check_length(lf.unwrap_or(self.text.len()))?;
            if let Some(lf) = lf {
                let line = &self.text[self.start..lf];
                let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
                self.start = lf + 1;
                return Ok(Some(line));
            }
            self.drop_taken();
            searched = self.text.len();
            if !self.body.read(self.reader, &mut self.text).map_err(|refusal| self.explain(refusal))? {
                return Ok(Some(std::mem::take(&mut self.text)).filter(|line| !line.is_empty()));
            }
        }
    }

    fn check_length(&self, end: usize) -> Result<(), Response> {
        let has_cr = self.text[..end].ends_with(b"\r");
        if end - self.start > self.line_limit.saturating_add(has_cr.into()) {
            return refuse(413, format!("a line is longer than {} bytes (--line-bytes)", self.line_limit));
        }
        Ok(())
    }

    /// Leaves in `text` only the line that has begun; its time runs from when it was first seen.
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

    fn explain(&self, refusal: Response) -> Response {
        match refusal.status {
            408 if !self.has_begun => {
                let reason = format!("no line came within {:?} (--put-idle-time)", self.idle_time);
                Response { close: true, ..Response::text(408, reason) }
            }
            _ => refusal,
        }
    }
}
