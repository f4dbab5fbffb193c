//! Responses: a status, some fields, and a body of known length. A refusal is one, too.
//!
//! An error is one line of text that says what was wrong and what would be right. Where a request was understood the
//! connection goes on after it (`decline`). Where it was not, or where nobody can tell where it ends, the connection is
//! closed (`refuse`): what follows could be a second request that somebody has smuggled in (RFC 9112 §11.2).

use crate::clock::date;
use crate::encoded::{Framing, Shape};
use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::Arc;

/// A body up to this size is copied behind its head, so that one write takes both.
const COPIED_BYTES: usize = 4096;

/// Not encoded yet, so that the rooms on its way can add fields: CORS, `Allow`, `Retry-After`.
pub struct Response {
    pub status: u16,
    pub content_type: Cow<'static, str>,
    /// More fields, each line with its CRLF. What goes into them must be checked before: a line break would begin a
    /// field.
    pub fields: String,
    /// Shared: a large page would otherwise be copied for each slow reader.
    pub body: Arc<[u8]>,
    /// The connection ends after it: nobody can tell where its request ends.
    pub close: bool,
}

/// A line of text, and the end of the connection.
pub fn refuse<T>(status: u16, reason: impl fmt::Display) -> Result<T, Response> {
    Err(Response { close: true, ..Response::text(status, reason) })
}

/// A line of text, where the request was understood: the connection goes on.
pub fn decline<T>(status: u16, reason: impl fmt::Display) -> Result<T, Response> {
    Err(Response::text(status, reason))
}

impl Response {
    /// The `content_type` must be one, since it goes into the head as it is; or empty, where there is no body.
    pub fn new(status: u16, content_type: impl Into<Cow<'static, str>>, body: impl Into<Arc<[u8]>>) -> Response {
        let (content_type, body) = (content_type.into(), body.into());
        Response { status, content_type, fields: String::new(), body, close: false }
    }

    /// One line of text, to which the line's end is added.
    pub fn text(status: u16, line: impl fmt::Display) -> Response {
        Response::new(status, "text/plain; charset=utf-8", format!("{line}\n").into_bytes())
    }

    /// Adds a field. Neither `name` nor `value` may come from outside unchecked.
    pub fn field(mut self, name: &str, value: impl fmt::Display) -> Response {
        let _ = write!(self.fields, "{name}: {value}\r\n");
        self
    }

    /// The line of [`Response::text`], for the log.
    pub fn reason(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_string()
    }

    /// What is written first, and what after that: a large body is not copied, a small one goes out with its head in
    /// one write. A response to HEAD is the head only, with the length that the body would have (RFC 9110 §9.3.2); 204
    /// and 304 have neither body nor length (RFC 9110 §8.6), so nor a type: there is nothing that is of it. `nosniff`
    /// keeps browsers from taking a line that quotes a request for a page.
    pub fn encode(&self, head_only: bool, close: bool) -> (Vec<u8>, Arc<[u8]>) {
        let mut head = status_line(self.status);
        let has_body = ![204, 304].contains(&self.status);
        if has_body && !self.content_type.is_empty() {
            let _ = write!(head, "Content-Type: {}\r\n", self.content_type);
        }
        if has_body {
            let _ = write!(head, "Content-Length: {}\r\n", self.body.len());
        }
        let connection = if close { "Connection: close\r\n" } else { "" };
        head.extend(["X-Content-Type-Options: nosniff\r\n", &self.fields, connection, "\r\n"]);
        let mut first = head.into_bytes();
        if head_only || !has_body {
            return (first, Arc::default());
        } else if self.body.len() > COPIED_BYTES {
            return (first, self.body.clone());
        }
        first.extend_from_slice(&self.body);
        (first, Arc::default())
    }
}

/// The head of every stream, up to and with the blank line. Nothing follows a stream on its connection. `no-transform`
/// keeps proxies from compressing it, which would hold events back; nginx buffers a stream to its end unless
/// `X-Accel-Buffering` tells it not to. `lines` are more fields, each with its CRLF.
pub fn stream_head(shape: Shape, lines: &str) -> String {
    let coding = match shape.framing {
        Framing::Chunked => "Transfer-Encoding: chunked\r\n",
        Framing::Plain => "",
    };
    status_line(200)
        + &format!("Content-Type: {}\r\n", shape.form.content_type())
        + "Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n\
           Connection: close\r\n"
        + coding
        + lines
        + "\r\n"
}

/// With the date, which every response has (RFC 9110 §6.6.1). The reason is for people only; a status that is missing
/// in this list has an empty one.
fn status_line(status: u16) -> String {
    let reason = match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    };
    let date = date();
    format!("HTTP/1.1 {status} {reason}\r\nDate: {date}\r\n")
}
