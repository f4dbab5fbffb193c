//! An event stream, read as the standard says, from bytes that come piece by piece.
//!
//! A line ends with LF, CR or CRLF; where a CR is the last byte so far, its line has ended all the same, or the event
//! would wait for the next one. A blank line ends an event. One without data is none, and one that the stream ends in
//! the middle of is dropped. What is not UTF-8 becomes U+FFFD, and a BOM at the beginning is passed over. A line and an
//! event's data have a limit each, so a stream that never ends either takes no more memory than that. `retry` is for
//! the reader's own connection, so it is passed over here.
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>

use std::mem::take;

/// What a stream may begin with, and means nothing.
const BOM: &[u8] = b"\xEF\xBB\xBF";

/// One event of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Its type; empty where it has none.
    pub name: String,
    pub data: String,
    /// The id that stands in this very event, unless that is empty. In the standard an id goes on to count for the
    /// events after it, which have none; but there it says where the stream is, and here which event this is.
    pub id: Option<String>,
}

/// Reads one stream.
pub struct Parser {
    line_limit: usize,
    data_limit: usize,
    /// The line that has begun.
    line: Vec<u8>,
    /// An LF that comes next belongs to the CR before it.
    is_after_cr: bool,
    /// No line has ended yet: a BOM may stand at the beginning.
    is_first_line: bool,
    /// The event that has begun.
    event: Parsed,
    /// It has data: perhaps an empty line of it.
    has_data: bool,
    /// Any of its fields has come.
    has_fields: bool,
    /// How many events have ended.
    count: usize,
}

impl Parser {
    /// The limits are bytes of one line, without its end, and of one event's data.
    pub fn new(line_limit: usize, data_limit: usize) -> Parser {
        Parser {
            line_limit,
            data_limit,
            line: Vec::new(),
            is_after_cr: false,
            is_first_line: true,
            event: Parsed::default(),
            has_data: false,
            has_fields: false,
            count: 0,
        }
    }

    /// Whether neither a line nor an event has begun.
    pub fn is_between_events(&self) -> bool {
        self.line.is_empty() && !self.has_fields
    }

    /// Reads on, until `most` events have ended or all of `bytes` is used, and returns how much was.
    ///
    /// # Errors
    /// What is too long. The events that have ended before are in `events`; nothing may be read after it.
    pub fn feed(&mut self, bytes: &[u8], events: &mut Vec<Parsed>, most: usize) -> Result<usize, String> {
        let mut used = 0;
        while used < bytes.len() && events.len() < most {
            let rest = &bytes[used..];
            let is_end_of_crlf = take(&mut self.is_after_cr) && rest[0] == b'\n';
            if is_end_of_crlf {
                used += 1;
                continue;
            }
            let end = rest.iter().position(|b| [b'\n', b'\r'].contains(b));
            let part = &rest[..end.unwrap_or(rest.len())];
            if self.line.len() + part.len() > self.line_limit {
                return Err(self.too_long("a line", self.line_limit));
            }
            self.line.extend_from_slice(part);
            used += part.len();
            if end.is_some() {
                self.is_after_cr = rest[part.len()] == b'\r';
                used += 1;
                events.extend(self.end_line()?);
            }
        }
        Ok(used)
    }

    /// Takes the line that has ended. Returns the event, where it ends one.
    fn end_line(&mut self) -> Result<Option<Parsed>, String> {
        let line = take(&mut self.line);
        let line = if take(&mut self.is_first_line) { line.strip_prefix(BOM).unwrap_or(&line) } else { &line };
        let line = String::from_utf8_lossy(line);
        if line.is_empty() {
            let event = take(&mut self.event);
            self.has_fields = false;
            let ended = take(&mut self.has_data).then_some(event);
            self.count += usize::from(ended.is_some());
            return Ok(ended);
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        self.has_fields |= !field.is_empty(); // a comment has no name
        match field {
            "event" => self.event.name = value.into(),
            "data" => self.add_data(value)?,
            "id" if !value.contains('\0') => self.event.id = Some(value.to_string()).filter(|id| !id.is_empty()),
            _ => {}
        }
        Ok(None)
    }

    fn add_data(&mut self, line: &str) -> Result<(), String> {
        if self.has_data {
            self.event.data.push('\n');
        }
        self.has_data = true;
        if self.event.data.len() + line.len() > self.data_limit {
            return Err(self.too_long("the data", self.data_limit));
        }
        self.event.data.push_str(line);
        Ok(())
    }

    fn too_long(&self, what: &str, limit: usize) -> String {
        format!("{what} of event {} is longer than {limit} bytes (line_bytes)", self.count + 1)
    }
}
