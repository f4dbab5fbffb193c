//! The events of a body that is still arriving, where it is an event stream: another server's, which is published here.
//!
//! `curl -N https://… | curl -T - …` sends one request for days, so this is bounded as `lines.rs` is: an event once
//! begun must end in time, and between events silence may last for hours. A relay that starts again is sent some events
//! twice. So the id of each becomes its key, and what is still kept here is not published again.

use crate::body::Body;
use crate::config::Config;
use crate::event::Event;
use crate::lines::silence_is_over;
use crate::parser::{Parsed, Parser};
use crate::reader::Reader;
use crate::response::{Response, refuse};
use std::time::Duration;

/// Most events that are published together, as with lines.
const EVENTS_AT_ONCE: usize = 128;
/// Stands before a line of data, which may itself be as long as a line that is published without a field.
const FIELD: &str = "data: ";
/// What another brooklet's `gap` becomes. It says that events may be missing of the other server's, and `gap` itself
/// always speaks of this one; but nobody's gap may pass in silence.
const RELAYED_GAP: &str = "relayed-gap";

/// Reads the body for as long as it lasts; nobody else may use the reader meanwhile.
pub struct Relay<'a, 'b> {
    reader: &'a mut Reader<'b>,
    body: &'a mut Body,
    parser: Parser,
    /// What has come and is not parsed yet.
    bytes: Vec<u8>,
    /// For an event from its first byte to its end.
    event_time: Duration,
    /// For the silence between two events.
    idle_time: Duration,
    /// Which time is running.
    has_begun: bool,
}

impl<'a, 'b> Relay<'a, 'b> {
    /// The events of a body of which nothing has been read.
    pub fn new(reader: &'a mut Reader<'b>, body: &'a mut Body, config: &Config) -> Relay<'a, 'b> {
        Relay {
            reader,
            body,
            parser: Parser::new(config.line_bytes.saturating_add(FIELD.len()), config.data_bytes()),
            bytes: Vec::new(),
            event_time: config.body_time,
            idle_time: config.put_idle_time,
            has_begun: false,
        }
    }

    /// Waits for an event, and takes those that came with it, too. False with the last ones.
    ///
    /// # Errors
    /// 400, 408 or 413. What is in `events` by then came before the fault, and is to be published.
    pub fn take_some(&mut self, events: &mut Vec<Event>) -> Result<bool, Response> {
        let mut parsed = Vec::new();
        let more = self.parse_some(&mut parsed);
        events.extend(parsed.into_iter().map(event_of));
        more
    }

    fn parse_some(&mut self, parsed: &mut Vec<Parsed>) -> Result<bool, Response> {
        loop {
            let used = self.parser.feed(&self.bytes, parsed, EVENTS_AT_ONCE);
            self.bytes.drain(..used.or_else(|reason| refuse(413, reason))?);
            if !parsed.is_empty() {
                return Ok(true);
            }
            self.set_time();
            let (read, is_silent) = (self.body.read(self.reader, &mut self.bytes), !self.has_begun);
            if !read.map_err(|refusal| silence_is_over(refusal, is_silent, self.idle_time))? {
                return Ok(false); // an event that has begun is dropped, as the standard has it
            }
        }
    }

    /// The time of an event runs from when its beginning was first seen; more bytes of it do not extend it.
    fn set_time(&mut self) {
        let has_begun = !self.parser.is_between_events();
        if !has_begun {
            self.reader.wait_at_most(self.idle_time);
        } else if !self.has_begun {
            self.reader.wait_at_most(self.event_time);
        }
        self.has_begun = has_begun;
    }
}

fn event_of(parsed: Parsed) -> Event {
    let name = if parsed.name == "gap" { RELAYED_GAP.into() } else { parsed.name };
    Event { name: Some(name).filter(|name| !name.is_empty()), key: parsed.id, ..Event::new(parsed.data) }
}
