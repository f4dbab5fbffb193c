//! Responses: a status, some fields, and a body of known length. A refusal is one, too.
//!
//! An error is one line of text that says what was wrong and what would be right. Where a request was understood the
//! connection goes on after it (`decline`); where it was not, or where it ends cannot be told, the connection is closed
//! (`refuse`).

use crate::clock::date;
use crate::encoded::Framing;
use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::Arc;

/// A body up to this size is copied behind its head, so that one write takes both.
const COPIED_BYTES: usize = 4096;

pub struct Response {
    pub status: u16,
    pub content_type: Cow<'static, str>,
    /// More fields, each line with its CRLF.
    pub fields: String,
    /// Shared, since a page that slow readers take their time with would else be copied for each of them.
    pub body: Arc<[u8]>,
    /// Where this request ends on the connection cannot be told.
    pub close: bool,
}

/// One line that says what was wrong and what would be right, and the end of the connection.
pub fn refuse<T>(status: u16, reason: impl fmt::Display) -> Result<T, Response> {
    Err(Response { close: true, ..Response::text(status, reason) })
}

/// The same, where the request was understood: the connection goes on.
pub fn decline<T>(status: u16, reason: impl fmt::Display) -> Result<T, Response> {
    Err(Response::text(status, reason))
}

impl Response {
    pub fn new(status: u16, content_type: impl Into<Cow<'static, str>>, body: impl Into<Arc<[u8]>>) -> Response {
        let (content_type, body) = (content_type.into(), body.into());
        Response { status, content_type, fields: String::new(), body, close: false }
    }

    pub fn text(status: u16, line: impl fmt::Display) -> Response {
        Response::new(status, "text/plain; charset=utf-8", format!("{line}\n").into_bytes())
    }

    pub fn field(mut self, name: &str, value: impl fmt::Display) -> Response {
        let _ = write!(self.fields, "{name}: {value}\r\n");
        self
    }

    /// The line that `text` has written.
    pub fn reason(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_string()
    }

    /// What is written first, and what after that: a large body is not copied, a small one goes out with its head in one
    /// write. A response to HEAD is the head only.
    pub fn encode(&self, head_only: bool, close: bool) -> (Vec<u8>, Arc<[u8]>) {
        let mut head = status_line(self.status);
        if self.status != 204 {
            let _ = write!(head, "Content-Type: {}\r\nContent-Length: {}\r\n", self.content_type, self.body.len());
        }
        let connection = if close { "Connection: close\r\n" } else { "" };
        head.extend(["X-Content-Type-Options: nosniff\r\n", &self.fields, connection, "\r\n"]);
        let mut first = head.into_bytes();
        if head_only || self.status == 204 {
            return (first, Arc::default());
        } else if self.body.len() > COPIED_BYTES {
            return (first, self.body.clone());
        }
        first.extend_from_slice(&self.body);
        (first, Arc::default())
    }
}

/// The head of every stream. nginx holds a stream back to its end unless told.
pub fn stream_head(framing: Framing, cors: &str) -> String {
    let coding = match framing {
        Framing::Chunked => "Transfer-Encoding: chunked\r\n",
        Framing::Plain => "",
    };
    status_line(200)
        + "Content-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\n\
           X-Content-Type-Options: nosniff\r\nConnection: close\r\n"
        + coding
        + cors
        + "\r\n"
}

fn status_line(status: u16) -> String {
    let reason = match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    };
    let date = date();
    format!("HTTP/1.1 {status} {reason}\r\nDate: {date}\r\n")
}
