//! One request's head, read strictly ([RFC 9112](https://www.rfc-editor.org/rfc/rfc9112)).
//!
//! Whatever two readers could take for two different requests is refused, and the connection closed: between a proxy
//! and this server, such a request would be a way past the proxy's rules. httparse reads the syntax of the fields. The
//! request line is read here, since httparse accepts only two versions of HTTP and gives one error for all others. What
//! the fields mean to the server is decided here, too.

use crate::authority::is_authority;
use crate::body::Body;
use crate::config::Config;
use crate::connection::{LINGER, would_block};
use crate::encoded::Framing;
use crate::reader::Reader;
use crate::response::{Response, refuse};
use crate::target::{Query, Target};
use crate::text::{quoted, skip_space, skip_token};
use std::time::Instant;

/// Most fields of a head; browsers and proxies send some twenty.
const HEADER_LINES: usize = 100;
/// Most tokens of a head that are compared with ours: a head full of cookies would otherwise be hundreds of guesses in
/// one.
const TOKENS_COMPARED: usize = 8;

/// What this server wants to know of a request. All of it is checked; its body is still to be read.
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: Query,
    pub body: Body,
    /// How a stream is sent, where this request asks for one.
    pub framing: Framing,
    /// The connection ends after the response, as the client wants or its version has it (RFC 9112 §9.3).
    pub close: bool,
    /// It waits for `100 Continue` before it sends its body. Taken back once that is sent.
    pub expects_continue: bool,
    /// None where it is empty: so the browser has seen no id yet.
    pub last_event_id: Option<String>,
    /// The host that was asked, perhaps with a port. Only HTTP/1.0 need not say.
    pub host: Option<String>,
    /// The body is an event stream.
    pub is_event_stream: bool,
    /// The origin of the page that asks; without a browser there is none.
    pub origin: Option<String>,
    /// What a preflight asks to send, as it came.
    asked_fields: Option<String>,
    /// A preflight from a page of a wider network than this server's.
    pub asks_private_network: bool,
    /// The tokens that it presents, not compared yet.
    pub tokens: Vec<String>,
    /// All fields as they came, each line with its CRLF, for the program's own routes; no other room looks into them.
    pub fields: String,
}

impl Request {
    /// Waits for one head and reads it. `None` where the peer has nothing more to ask: it closed the connection, or was
    /// idle until the reader's deadline.
    ///
    /// # Errors
    /// 400, 408 (the head was not whole in time), 414, 417, 431, 501 or 505; the connection must be closed after any of
    /// them.
    pub fn read(reader: &mut Reader, config: &Config) -> Result<Option<Request>, Response> {
        // Both belong to the head that is being read; pipelined requests each begin anew.
        let (mut searched, mut has_begun) = (0, false);
        loop {
            // The time for a head runs from its first byte: before that, the connection is idle.
            if !has_begun && !reader.unread().is_empty() {
                has_begun = true;
                reader.wait_at_most(config.head_time);
            }
            while reader.unread().starts_with(b"\r\n") {
                reader.use_up(2); // empty lines before a request are skipped (RFC 9112 §2.2)
                searched = 0; // what follows has moved to the front
            }
            let end = head_end(reader.unread(), &mut searched)?;
            if end.unwrap_or(reader.unread().len()) > config.head_bytes {
                return too_long(reader.unread(), config.head_bytes);
            }
            if let Some(end) = end {
                let request = Request::parse(&reader.unread()[..end])?;
                reader.use_up(end);
                return Ok(Some(request));
            }
            // A peer that ends or is silent before the first byte of a head has nothing more to ask: that is no error.
            match reader.fill() {
                Ok(got) if got > 0 => {}
                Err(error) if would_block(&error) && !reader.unread().is_empty() => {
                    let limit = config.head_time.as_millis();
                    return refuse(408, format!("the request's head did not come whole within {limit} ms"));
                }
                _ => return Ok(None),
            }
        }
    }

    /// Reads a whole head, with the empty line at its end.
    ///
    /// # Errors
    /// As for [`Request::read`].
    pub fn parse(head: &[u8]) -> Result<Request, Response> {
        let line_end = head.iter().position(|b| *b == b'\n').map_or(head.len(), |lf| lf + 1);
        let (line, lines) = head.split_at(line_end);
        let line = String::from_utf8_lossy(line.strip_suffix(b"\r\n").unwrap_or(line)); // a target has ASCII only
        let RequestLine { method, target, is_http10 } = RequestLine::parse(&line)?;
        let mut headers = [httparse::EMPTY_HEADER; HEADER_LINES];
        let headers = match httparse::parse_headers(lines, &mut headers) {
            Ok(httparse::Status::Complete((_, headers))) => headers,
            Ok(httparse::Status::Partial) => return refuse(400, "the request's head is not whole"),
            Err(httparse::Error::TooManyHeaders) => {
                return refuse(431, format!("more than {HEADER_LINES} header lines"));
            }
            Err(error) => return refuse(400, format!("the request's head cannot be read: {error}")),
        };
        let fields = Fields::read(headers)?;
        // RFC 9112 §3.2; two fields `Host` were refused before.
        match &fields.host {
            None if !is_http10 => return refuse(400, "the field Host is missing"),
            Some(host) if !is_authority(host) => return refuse(400, format!("{} is no Host", quoted(host))),
            _ => {}
        }
        let body = Body::announced(fields.content_length.as_deref(), fields.transfer_encoding.as_deref(), is_http10)?;
        let expects_continue = !is_http10 && fields.expects_continue()?;
        if method == "CONNECT" {
            return refuse(501, "CONNECT is for proxies, which this is not"); // what follows would not be HTTP
        }
        let target = Target::parse(method, target)?;
        let is_event_stream = fields.is_event_stream();
        let asks_private_network = fields.private_network.as_deref() == Some("true");
        Ok(Request {
            method: method.into(),
            path: target.path,
            query: target.query,
            body,
            framing: if is_http10 { Framing::Plain } else { Framing::Chunked },
            close: is_http10 || fields.says_close(),
            expects_continue,
            tokens: fields.tokens(),
            last_event_id: fields.last_event_id.filter(|id| !id.is_empty()),
            host: target.authority.or(fields.host), // RFC 9112 §3.2.2: the target's own wins
            is_event_stream,
            asks_private_network,
            asked_fields: fields.asked_fields,
            origin: fields.origin,
            fields: String::from_utf8_lossy(lines).into_owned(),
        })
    }

    /// The names of the fields that a preflight asks to send; what is no name is left out, since this goes into a head.
    pub fn asked_fields(&self) -> String {
        let names =
            self.asked_fields.iter().flat_map(|list| list.split(',')).map(|name| name.trim_matches([' ', '\t']));
        names.filter(|name| skip_token(name) == Some("")).collect::<Vec<_>>().join(", ")
    }

    /// Tells a client that waits for it to send its body (RFC 9110 §10.1.1). Called only once the request is accepted,
    /// so that a client whose request is refused need not send the body for nothing.
    pub fn invite_body(&mut self, reader: &Reader) -> Result<(), Response> {
        if std::mem::take(&mut self.expects_continue) && !self.body.is_over() {
            let invited = reader.c.write_whole(b"HTTP/1.1 100 Continue\r\n\r\n", Instant::now() + LINGER);
            return invited.or_else(|reason| refuse(400, reason));
        }
        Ok(())
    }

    /// Reads the whole body. It is collected only where it is wanted; otherwise it is read to find the next request,
    /// and takes no memory.
    ///
    /// # Errors
    /// 413 where it is longer than [`Config::body_bytes`]; 400 or 408 where it does not come whole.
    pub fn read_body(&mut self, reader: &mut Reader, config: &Config, is_wanted: bool) -> Result<Vec<u8>, Response> {
        let limit = config.body_bytes;
        // A body that announces too much is refused before it is invited.
        let (mut body, mut length) = (Vec::new(), 0);
        if self.body.left <= limit as u64 {
            self.invite_body(reader)?;
            reader.wait_at_most(config.body_time);
            body.reserve_exact(if is_wanted { self.body.left as usize } else { 0 }); // not by doubling
            // A chunk says its size before it comes, as a whole body does: too much of it is not waited for.
            while self.body.coming(reader)? <= (limit - length) as u64 {
                let old = body.len();
                if !self.body.read(reader, &mut body)? {
                    return Ok(body);
                }
                length += body.len() - old;
                if !is_wanted {
                    body.clear();
                }
            }
        }
        refuse(413, format!("the body is longer than {limit} bytes (body_bytes): send less, or lines by PUT"))
    }
}

/// The first line of a head: three parts with one space between them, where other readers take any white space (RFC
/// 9112 §3).
struct RequestLine<'a> {
    method: &'a str,
    target: &'a str,
    is_http10: bool,
}

impl RequestLine<'_> {
    fn parse(line: &str) -> Result<RequestLine<'_>, Response> {
        let mut parts = line.split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return no_request_line(line);
        };
        if skip_token(method) != Some("") || target.is_empty() {
            return no_request_line(line);
        }
        let is_http10 = match version.strip_prefix("HTTP/").map(str::as_bytes) {
            Some([b'1', b'.', minor]) if minor.is_ascii_digit() => *minor == b'0', // 1.2 is read as 1.1 (RFC 9110 §2.5)
            Some([major, b'.', minor]) if major.is_ascii_digit() && minor.is_ascii_digit() => {
                return refuse(505, format!("{version} is not spoken here, only HTTP/1.0 and HTTP/1.1"));
            }
            _ => return refuse(400, format!("{} is no version of HTTP: write HTTP/1.1", quoted(version))),
        };
        Ok(RequestLine { method, target, is_http10 })
    }
}

/// The refusal of a first line that is no request line.
fn no_request_line<T>(line: &str) -> Result<T, Response> {
    let reason = "is no request line: write METHOD TARGET HTTP/1.1, with one space between them and none in them";
    refuse(400, format!("{} {reason}", quoted(line)))
}

/// The fields of a head that this server knows, with one value each. All others are ignored.
#[derive(Default)]
struct Fields {
    host: Option<String>,
    content_length: Option<String>,
    transfer_encoding: Option<String>,
    content_type: Option<String>,
    expect: Option<String>,
    origin: Option<String>,
    authorization: Option<String>,
    cookie: Option<String>,
    connection: Option<String>,
    last_event_id: Option<String>,
    asked_fields: Option<String>,
    private_network: Option<String>,
}

impl Fields {
    /// Collects the fields that are known.
    ///
    /// # Errors
    /// 400 where a field stands twice that may stand only once: two readers could each take another.
    fn read(headers: &[httparse::Header]) -> Result<Fields, Response> {
        let mut fields = Fields::default();
        for header in headers {
            let Some((field, joint)) = fields.named(header.name) else { continue };
            // Optional white space is space and tab (RFC 9110 §5.6.3); `trim` alone would take more.
            let value = String::from_utf8_lossy(header.value).trim_matches([' ', '\t']).to_string();
            *field = match (field.take(), joint) {
                (None, _) => Some(value),
                (Some(first), Some(joint)) => Some(first + joint + &value),
                (Some(_), None) => return refuse(400, format!("the field {} stands twice", header.name)),
            };
        }
        Ok(fields)
    }

    /// The place for a field, and what joins its values where it may stand several times (RFC 9110 §5.3; cookies: RFC
    /// 9113 §8.2.3). All others may stand only once.
    fn named(&mut self, name: &str) -> Option<(&mut Option<String>, Option<&'static str>)> {
        Some(match name.to_ascii_lowercase().as_str() {
            "host" => (&mut self.host, None),
            "content-length" => (&mut self.content_length, None),
            "transfer-encoding" => (&mut self.transfer_encoding, Some(", ")),
            "content-type" => (&mut self.content_type, None),
            "expect" => (&mut self.expect, None),
            "origin" => (&mut self.origin, None),
            "authorization" => (&mut self.authorization, None),
            "cookie" => (&mut self.cookie, Some("; ")),
            "connection" => (&mut self.connection, Some(", ")),
            "access-control-request-headers" => (&mut self.asked_fields, Some(", ")),
            "access-control-request-private-network" => (&mut self.private_network, None),
            // Two of these, joined, are no id: that gets a gap, since a browser gives up for good on a refusal.
            "last-event-id" => (&mut self.last_event_id, Some(", ")),
            _ => return None,
        })
    }

    /// Whether the type is `text/event-stream`, with parameters or without.
    fn is_event_stream(&self) -> bool {
        let essence = self.content_type.as_deref().and_then(|value| value.split(';').next()).unwrap_or_default();
        essence.trim_end_matches([' ', '\t']).eq_ignore_ascii_case("text/event-stream")
    }

    /// Whether `close` is among the options of `Connection` (RFC 9110 §7.6.1).
    fn says_close(&self) -> bool {
        let mut options = self.connection.iter().flat_map(|options| options.split([',', ' ', '\t']));
        options.any(|option| option.eq_ignore_ascii_case("close"))
    }

    /// Whether the client waits for `100 Continue`; another expectation is refused with 417 (RFC 9110 §10.1.1).
    fn expects_continue(&self) -> Result<bool, Response> {
        match &self.expect {
            None => Ok(false),
            Some(what) if what.eq_ignore_ascii_case("100-continue") => Ok(true),
            Some(what) => refuse(417, format!("{} is not expected: 100-continue is", quoted(what))),
        }
    }

    /// The tokens of `Authorization: Bearer TOKEN` (RFC 6750 §2.1) and of the cookie `brooklet_token`, which a
    /// browser's `EventSource` can send where it cannot set fields.
    fn tokens(&self) -> Vec<String> {
        let bearer = self.authorization.as_deref().and_then(|value| value.split_once(' '));
        let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
        let cookies = self.cookie.iter().flat_map(|cookies| cookies.split(';'));
        let cookies = cookies.filter_map(|cookie| skip_space(cookie).strip_prefix("brooklet_token="));
        let tokens = bearer.into_iter().chain(cookies).filter(|token| !token.is_empty());
        tokens.take(TOKENS_COMPARED).map(String::from).collect()
    }
}

/// Finds the empty line that ends a head, looking on from `searched`: a head that comes byte by byte is searched once,
/// not once for each byte. A lone LF is refused: not every reader takes it for the end of a line (RFC 9112 §2.2).
fn head_end(bytes: &[u8], searched: &mut usize) -> Result<Option<usize>, Response> {
    while let Some(found) = bytes[*searched..].iter().position(|b| *b == b'\n') {
        let lf = *searched + found;
        *searched = lf + 1;
        if lf == 0 || bytes[lf - 1] != b'\r' {
            return refuse(400, "a line of the head ends with LF alone: end it with CRLF");
        } else if lf >= 3 && bytes[lf - 2] == b'\n' {
            return Ok(Some(lf + 1));
        }
    }
    *searched = bytes.len();
    Ok(None)
}

/// The refusal of a head that is longer than the limit: what exactly was too long decides the status.
fn too_long<T>(head: &[u8], limit: usize) -> Result<T, Response> {
    let begun = &head[..limit];
    if begun.contains(&b'\n') {
        return refuse(431, format!("the head is longer than the {limit} bytes of a head"));
    }
    let line = String::from_utf8_lossy(begun);
    match skip_token(&line) {
        // A method longer than any that is known is an unknown one (RFC 9112 §3).
        Some("") => refuse(501, format!("a method of more than {limit} bytes is not known")),
        Some(rest) if rest.starts_with(' ') && !rest[1..].contains(' ') => {
            refuse(414, format!("the request line is longer than the {limit} bytes of a head"))
        }
        _ => no_request_line(&line),
    }
}
