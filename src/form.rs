//! The forms in which a stream goes out: an event stream, or lines that a script reads without a parser for one.
//!
//! `as=lines` is the data alone; `as=json` is one JSON object a line, with all that an event has ([NDJSON]). Both are
//! made from the event's frame wherever somebody reads them, and never kept: a lane makes them once for a batch, a
//! replay once for each of its runs. Each event is whole lines in either form, so that nobody who is cut off takes a
//! part of one for the whole.
//!
//! [NDJSON]: https://github.com/ndjson/ndjson-spec

use crate::event::Id;
use std::fmt::Write;

/// What the events of a stream look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As the standard has it.
    Events,
    /// The lines of the data.
    Lines,
    /// An object a line.
    Json,
}

impl Form {
    /// The value of the parameter `as`.
    pub fn parse(text: &str) -> Option<Form> {
        match text {
            "lines" => Some(Form::Lines),
            "json" => Some(Form::Json),
            _ => None,
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Form::Events => "text/event-stream",
            Form::Lines => "text/plain; charset=utf-8",
            Form::Json => "application/x-ndjson",
        }
    }

    /// Whether its reader is told of gaps. Lines are data and nothing else.
    pub fn tells_gaps(self) -> bool {
        self != Form::Lines
    }

    /// What keeps a silent stream open, if anything does. For events no blank line follows it: some clients take every
    /// blank line for an event. An object has the same names as all others, so that none of them need be looked for.
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes>
    pub fn heartbeat(self) -> Option<&'static str> {
        match self {
            Form::Events => Some(":\n"),
            Form::Lines => None,
            Form::Json => Some("{\"id\":null,\"topic\":null,\"event\":\"heartbeat\",\"data\":null}\n"),
        }
    }

    /// An event in this form, made from its frame. A gap is of no topic.
    pub fn make(self, id: Id, topic: Option<&str>, frame: &str) -> String {
        let mut out = String::with_capacity(frame.len() + 96); // for the names; what must be escaped makes it grow
        match self {
            Form::Events => out.push_str(frame),
            Form::Lines => {
                values(frame, "data").for_each(|line| out.extend([line, "\n"]));
                if out.is_empty() {
                    out.push('\n'); // a journal may hold events without data, and an empty chunk would end the stream
                }
            }
            Form::Json => {
                let _ = write!(out, "{{\"id\":\"{id}\",\"topic\":");
                match topic {
                    Some(name) => push_quoted(&mut out, [name]),
                    None => out.push_str("null"),
                }
                out.push_str(",\"event\":");
                push_quoted(&mut out, [values(frame, "event").next().unwrap_or("message")]);
                out.push_str(",\"data\":");
                push_quoted(&mut out, values(frame, "data"));
                out.push_str("}\n");
            }
        }
        out
    }
}

/// The values of a field of a frame, a line each.
pub fn values<'a>(frame: &'a str, field: &'a str) -> impl Iterator<Item = &'a str> {
    let value = move |line: &'a str| line.strip_prefix(field)?.strip_prefix(':');
    frame.split('\n').filter_map(value).map(|value| value.strip_prefix(' ').unwrap_or(value))
}

/// Adds lines as one JSON string ([RFC 8259 §7](https://www.rfc-editor.org/rfc/rfc8259#section-7)).
fn push_quoted<'a>(out: &mut String, lines: impl IntoIterator<Item = &'a str>) {
    out.push('"');
    for (n, line) in lines.into_iter().enumerate() {
        if n > 0 {
            out.push_str("\\n");
        }
        let mut rest = line;
        while let Some(at) = rest.find(is_escaped) {
            out.push_str(&rest[..at]);
            let mut chars = rest[at..].chars();
            let _ = match chars.next() {
                Some(c @ ('"' | '\\')) => write!(out, "\\{c}"),
                Some(c) => write!(out, "\\u{:04x}", u32::from(c)),
                None => Ok(()),
            };
            rest = chars.as_str();
        }
        out.push_str(rest);
    }
    out.push('"');
}

/// Beside what must be escaped, what many readers of lines take for a line's end (Python's `splitlines`), and what a
/// terminal would obey.
fn is_escaped(c: char) -> bool {
    matches!(c, '"' | '\\' | '\0'..='\x1f' | '\x7f'..='\u{9f}' | '\u{2028}' | '\u{2029}')
}
